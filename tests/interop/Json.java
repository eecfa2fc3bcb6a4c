// What the JDK lacks: JSON, by the grammar of RFC 8259. Numbers and names of values stay as they are spelt.
import static java.nio.charset.StandardCharsets.UTF_8;
import static java.util.stream.Collectors.joining;
import java.util.*;
import java.util.regex.*;

final class Json {
    static final String TEXT = "\"((?:[^\"\\\\\\x00-\\x1f]|\\\\(?:[\"\\\\/bfnrt]|u[0-9a-fA-F]{4}))*+)\"";
    static final String SPELT = "true|false|null|-?(?:0|[1-9]\\d*+)((?:\\.\\d++)?(?:[eE][+-]?\\d++)?)";
    static final Pattern TOKEN = Pattern.compile("[ \\t\\r\\n]*+(?:([]\\[{},:]|\\z)|(" + SPELT + ")|" + TEXT + ")");
    record Spelt(String text) {}
    final Matcher token;
    Json(String text) {
        token = TOKEN.matcher(text);
        Decrypt.need(token.lookingAt());
    }
    /** Goes to the next token, if this one is as it should be. */
    void pass(boolean fitting) {
        Decrypt.need(fitting && token.region(token.end(), token.regionEnd()).lookingAt());
    }
    boolean takes(String mark) {
        boolean there = mark.equals(token.group(1));
        if (there) pass(true);
        return there;
    }
    String text() {
        Decrypt.need(token.group(4) != null);
        String text = Pattern.compile("\\\\(u....|.)").matcher(token.group(4)).replaceAll(escape -> {
            String letter = escape.group(1);
            int at = "bfnrt".indexOf(letter);
            if (letter.length() > 1) letter = Character.toString(HexFormat.fromHexDigits(letter, 1, 5));
            return Matcher.quoteReplacement(at < 0 ? letter : "\b\f\n\r\t".substring(at, at + 1));
        });
        pass(UTF_8.newEncoder().canEncode(text));
        return text;
    }
    Object value(int depth) {
        Decrypt.need(depth < 255);
        if (takes("[")) {
            List<Object> items = new ArrayList<>();
            if (takes("]")) return items;
            do items.add(value(depth + 1)); while (takes(","));
            Decrypt.need(takes("]"));
            return items;
        }
        if (takes("{")) {
            Map<String, Object> members = new TreeMap<>();
            if (takes("}")) return members;
            do {
                String name = text();
                Decrypt.need(takes(":"));
                members.put(name, value(depth + 1));
            } while (takes(","));
            Decrypt.need(takes("}"));
            return members;
        }
        if (token.group(4) != null) return text();
        String spelt = token.group(2), behind = token.group(3);
        pass(spelt != null && (behind == null || behind.isEmpty() || Double.isFinite(Double.parseDouble(spelt))));
        return new Spelt(spelt);
    }
    static Object parsed(String text) {
        Json json = new Json(text);
        Object value = json.value(0);
        Decrypt.need("".equals(json.token.group(1)));
        return value;
    }
    static String written(Object value) {
        if (value instanceof Map<?, ?> members) {
            return members.entrySet().stream()
                    .map(member -> written(member.getKey()) + ":" + written(member.getValue()))
                    .collect(joining(",", "{", "}"));
        }
        if (value instanceof List<?> items) {
            return items.stream().map(Json::written).collect(joining(",", "[", "]"));
        }
        if (value instanceof Spelt spelt) return spelt.text();
        return Pattern.compile("[\"\\\\\\x00-\\x1f]").matcher((String) value).replaceAll(found -> {
            int at = "\b\f\n\r\t\"\\".indexOf(found.group());
            String unnamed = String.format("u%04x", (int) found.group().charAt(0));
            String escape = at < 0 ? unnamed : "bfnrt\"\\".substring(at, at + 1);
            return Matcher.quoteReplacement("\\" + escape);
        }).transform(text -> "\"" + text + "\"");
    }
}
