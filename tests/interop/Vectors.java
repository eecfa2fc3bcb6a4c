// Reads the vectors named on the command line and prints, for each stored value in order, what it holds or why it is
// refused; what must come out is not looked at.
import java.io.PrintStream;
import java.nio.charset.*;
import java.nio.file.*;
import java.time.DateTimeException;
import java.util.*;
import java.util.stream.Stream;
import javax.crypto.AEADBadTagException;

final class Vectors {
    /** The texts that an entry has under these names, each of them one text or several. */
    static List<String> texts(Map<?, ?> entry, String... names) {
        return Stream.of(names).map(entry::get).filter(Objects::nonNull)
                .flatMap(found -> found instanceof List<?> several ? several.stream() : Stream.of(found))
                .map(String.class::cast).toList();
    }
    static Map<String, String> open(Map<?, ?> entry, String field) throws Exception {
        String stored = (String) entry.get(field), type = Objects.toString(entry.get("type"), "json");
        List<byte[]> keys = texts(entry, "key", "keys").stream().map(HexFormat.of()::parseHex).toList();
        List<String> row = entry.containsKey("row") ? texts(entry, "row") : null;
        try {
            byte[] frame = field.equals("text") ? Decrypt.fromText(stored) : HexFormat.of().parseHex(stored);
            byte[] payload = Decrypt.payload(frame, keys, texts(entry, "name", "earlier_names"), row);
            String value = Decrypt.value(type, payload).toString();
            return new TreeMap<>(Map.of("payload", HexFormat.of().formatHex(payload), "value", value));
        } catch (Decrypt.Refused refused) {
            return Map.of("error", refused.getMessage());
        } catch (AEADBadTagException wrong) {
            return Map.of("error", "AuthenticationError");
        } catch (CharacterCodingException | DateTimeException malformed) {
            return Map.of("error", "MalformedPayloadError");
        }
    }
    public static void main(String[] paths) throws Exception {
        PrintStream out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
        for (String path : paths) {
            Map<?, ?> document = (Map<?, ?>) Json.parsed(Files.readString(Path.of(path)));
            for (String name : List.of("cases", "frames", "must_fail")) {
                for (Object entry : document.get(name) instanceof List<?> entries ? entries : List.of()) {
                    Map<?, ?> members = (Map<?, ?>) entry;
                    for (String field : List.of("stored", "frame", "text")) {
                        if (members.containsKey(field)) out.println(Json.written(open(members, field)));
                    }
                }
            }
        }
    }
}
