// Decrypts a stored value. Written from docs/format.md, with the JDK alone, which has no JSON: for that see Json.java.
import static java.nio.charset.StandardCharsets.*;
import java.math.BigInteger;
import java.nio.ByteBuffer;
import java.security.*;
import java.time.*;
import java.util.*;
import java.util.regex.*;
import javax.crypto.*;
import javax.crypto.spec.*;

final class Decrypt {
    static final String CLOCK = "(?:[01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d";
    static final List<String> MEMBERS = List.of("red", "gr\u00fcn", "", "n".repeat(47), "n".repeat(48));
    static final class Refused extends RuntimeException { Refused(String error) { super(error); } }
    static void need(boolean condition, String... error) {
        if (!condition) throw new Refused(error.length > 0 ? error[0] : "MalformedPayloadError");
    }
    static byte[] lp(byte[]... parts) {
        ByteBuffer joined = ByteBuffer.allocate(Arrays.stream(parts).mapToInt(part -> 4 + part.length).sum());
        for (byte[] part : parts) joined.putInt(part.length).put(part);
        return joined.array();
    }
    static byte[] lp(List<String> texts) {
        return lp(texts.stream().map(text -> text.getBytes(UTF_8)).toArray(byte[][]::new));
    }
    static byte[] expand(byte[] key, String purpose) throws Exception {
        Mac mac = Mac.getInstance("HmacSHA256");
        mac.init(new SecretKeySpec(key, "HmacSHA256"));
        mac.update(lp(List.of("sqlalchemy-kravn-crypto/v1", purpose)));
        return mac.doFinal(new byte[] {1});
    }
    static byte[] subkey(byte[] key, ByteBuffer nonce) throws Exception {
        Cipher aes = Cipher.getInstance("AES/ECB/NoPadding");
        aes.init(Cipher.ENCRYPT_MODE, new SecretKeySpec(key, "AES"));
        ByteBuffer l = ByteBuffer.wrap(aes.doFinal(new byte[16]));
        long high = l.getLong(0) << 1 | l.getLong(8) >>> 63;
        long low = l.getLong(8) << 1 ^ (l.getLong(0) < 0 ? 0x87 : 0);
        long start = Integer.toUnsignedLong(nonce.getInt(0)) ^ high, end = nonce.getLong(4) ^ low;
        ByteBuffer blocks = ByteBuffer.allocate(32).putLong(0x0001_5800_0000_0000L ^ start).putLong(end);
        return aes.doFinal(blocks.putLong(0x0002_5800_0000_0000L ^ start).putLong(end).array());
    }
    static byte[] fromText(String text) {
        need(text.matches("enc:v3:(?:[\\w-]{4})*+(?:[\\w-]{2,3})?"), "MalformedCiphertextError");
        byte[] frame = Base64.getUrlDecoder().decode(text.substring(7));
        String canonical = Base64.getUrlEncoder().withoutPadding().encodeToString(frame);
        need(text.endsWith(":" + canonical), "MalformedCiphertextError");
        return frame;
    }
    static byte[] payload(byte[] frame, List<byte[]> keys, List<String> names, List<String> row) throws Exception {
        need(frame.length > 0 && frame[0] == (byte) 0xf9, "MalformedCiphertextError");
        need(frame.length < 2 || frame[1] == 2, "UnsupportedAlgorithmError");
        need(frame.length >= 52, "MalformedCiphertextError");
        byte[] key = null;
        for (byte[] one : keys)
            if (key == null && Arrays.equals(expand(one, "key-id"), 0, 8, frame, 2, 10)) key = one;
        need(key != null, "UnknownKeyError");
        String name = null;
        for (String one : names) {
            byte[] hash = MessageDigest.getInstance("SHA-256").digest(one.getBytes(UTF_8));
            if (name == null && Arrays.equals(hash, 0, 2, frame, 10, 12)) name = one;
        }
        need(name != null, "WrongColumnError");
        byte[] subkey = subkey(expand(key, "aead/02"), ByteBuffer.wrap(frame, 12, 24).slice());
        Cipher gcm = Cipher.getInstance("AES/GCM/NoPadding");
        gcm.init(Cipher.DECRYPT_MODE, new SecretKeySpec(subkey, "AES"), new GCMParameterSpec(128, frame, 24, 12));
        gcm.updateAAD(frame, 0, 12);
        gcm.updateAAD(lp(List.of(name)));
        if (row != null) gcm.updateAAD(lp(lp(row)));
        return gcm.doFinal(frame, 36, frame.length - 36);
    }
    static String utf8(byte[] bytes) throws Exception {
        return UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes)).toString();
    }
    static Matcher matched(byte[] bytes, String pattern) {
        Matcher found = Pattern.compile(pattern).matcher(new String(bytes, ISO_8859_1));
        need(found.matches());
        return found;
    }
    static byte[] sized(byte[] bytes, int length) {
        need(bytes.length == length);
        return bytes;
    }
    static byte[] unpad(byte[] padded) {
        need(padded.length % 48 == 0);
        return matched(padded, "(?s)(.*)\\x80\\x00{0,47}").group(1).getBytes(ISO_8859_1);
    }
    static BigInteger interval(byte[] bytes) {
        BigInteger number = new BigInteger(sized(bytes, 16)), end = new BigInteger("86400000000000000000");
        need(number.compareTo(end) < 0 && number.compareTo(BigInteger.valueOf(86_400_000_000L).subtract(end)) >= 0);
        return number;
    }
    static BigInteger bigInteger(byte[] bytes) {
        BigInteger number = new BigInteger(matched(bytes, "-?[1-9]\\d*").group());
        need(number.bitLength() > 127 && number.abs().bitLength() <= 14_000);
        return number;
    }
    static String decimal(byte[] bytes) {
        Matcher found = matched(bytes, "-?(0|[1-9]\\d*)(?:\\.(\\d+))?(?:E([+-][1-9]\\d*))?");
        String whole = found.group(1), fraction = Objects.toString(found.group(2), ""), given = found.group(3);
        String digits = (whole + fraction).replaceFirst("^0+(?=.)", "");
        BigInteger last = new BigInteger(Objects.toString(given, "0")).subtract(BigInteger.valueOf(fraction.length()));
        BigInteger first = last.add(BigInteger.valueOf(digits.length() - 1));
        need(last.compareTo(BigInteger.valueOf(-1_999_999_999_999_999_997L)) >= 0);
        need(first.compareTo(BigInteger.valueOf(999_999_999_999_999_999L)) <= 0);
        boolean plain = last.signum() <= 0 && first.compareTo(BigInteger.valueOf(-6)) >= 0;
        boolean scientific = given != null && whole.length() == 1 && (!whole.equals("0") || fraction.isEmpty());
        need(plain ? given == null : scientific);
        return found.group();
    }
    static String date(byte[] bytes, String behind) {
        String text = matched(bytes, "\\d{4}-\\d\\d-\\d\\d" + behind).group();
        need(LocalDate.parse(text.substring(0, 10)).getYear() > 0);
        return text;
    }
    static String real(long bits) {
        long exponent = bits >>> 52 & 0x7ff, fraction = bits & (1L << 52) - 1;
        need(exponent != 0x7ff);
        String shown = String.format("0x%d.%013xp%+d", Math.min(exponent, 1), fraction, Math.max(exponent, 1) - 1023);
        return (bits < 0 ? "-" : "") + (bits << 1 == 0 ? "0x0.0p+0" : shown);
    }
    static String member(String text) {
        need(MEMBERS.contains(text));
        return text;
    }
    static Object value(String type, byte[] payload) throws Exception {
        need(payload.length > 0);
        byte[] rest = Arrays.copyOfRange(payload, 1, payload.length);
        return switch (String.format("%s %02x", type, payload[0])) {
            case "json 01", "json 02" -> Json.written(Json.parsed(utf8(rest)));
            case "text 03" -> utf8(rest);
            case "bytes 04" -> HexFormat.of().formatHex(rest);
            case "integer 10" -> new BigInteger(sized(rest, 16));
            case "integer 11" -> bigInteger(rest);
            case "boolean 13" -> matched(rest, "[\0\1]").group().equals("\1");
            case "date 14" -> date(rest, "");
            case "time 15" -> matched(rest, CLOCK + "\\.\\d{6}").group();
            case "naive datetime 16" -> date(rest, "T" + CLOCK + "\\.\\d{6}");
            case "aware datetime 17" -> date(rest, "T" + CLOCK + "\\.\\d{6}(?!-00:00:00)[+-]" + CLOCK);
            case "uuid 18" -> new UUID(ByteBuffer.wrap(sized(rest, 16)).getLong(0), ByteBuffer.wrap(rest).getLong(8));
            case "interval 19" -> interval(rest);
            case "float 1b" -> real(ByteBuffer.wrap(sized(rest, 8)).getLong());
            case "decimal 92" -> decimal(unpad(rest));
            case "enum 9a" -> member(utf8(unpad(rest)));
            default -> throw new Refused("MalformedPayloadError");
        };
    }
}
