"""Write ``tests/vectors/cases.json``: what a reader must do, one case each. See ``vectors/README.md``.

As ``make_frames``, from ``tests.reference`` and nothing of the package.
"""

import hmac
import json
import unicodedata
from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests import reference
from tests.make_frames import drawn, good_kinds, good_values, with_byte

OUTPUT = Path(__file__).parent / "vectors" / "cases.json"
SOURCE = (
    "tests/make_cases.py, from the description of the format and independently of the package. Frames of version 0xF9, "
    "algorithm 0x02. keys, payload and stored are in hexadecimal; text is as in text storage; value is the value as "
    "text: see README.md."
)

NAME, OLD, OLDER = "plugin.credentials", "plugins.secrets", "addon.secrets"
KEY, SECOND, THIRD = drawn("key", 32), drawn("second key", 32), drawn("third key", 32)
JSON_KINDS = (b"\x01", b"\x02")
SUCCESS = "success"

MALFORMED, ALGORITHM, UNKNOWN, COLUMN, TAG, PAYLOAD = (
    "MalformedCiphertextError",
    "UnsupportedAlgorithmError",
    "UnknownKeyError",
    "WrongColumnError",
    "AuthenticationError",
    "MalformedPayloadError",
)

JSON_TRUE = b"\x01true"

Case = dict[str, Any]


def case(
    comment: str,
    expected: str,
    stored: bytes | str,
    *,
    type_: str = "json",
    keys: tuple[bytes, ...] = (KEY,),
    name: str = NAME,
    earlier: tuple[str, ...] = (),
) -> Case:
    return {
        "comment": comment,
        "expected": expected,
        "keys": [key.hex() for key in keys],
        "type": type_,
        "name": name,
        "earlier_names": list(earlier),
        **({"text": stored} if isinstance(stored, str) else {"stored": stored.hex()}),
    }


def framed(payload: bytes, name: str = NAME, key: bytes = KEY) -> bytes:
    return reference.frame(key, name, drawn(f"case of {payload[:40].hex()}", 24), payload)


def opens(comment: str, type_: str, payload: bytes, value: str, **context: Any) -> Case:
    stored = context.pop("stored", framed(payload))
    return case(comment, SUCCESS, stored, type_=type_, **context) | {"payload": payload.hex(), "value": value}


# --- Which key, which name -------------------------------------------------------------------------------------------


def same_hint(name: str) -> str:
    candidates = (f"plugin.credentials_{number}" for number in count())
    return next(found for found in candidates if reference.hint(found) == reference.hint(name))


def key_and_name_cases() -> Iterator[Case]:
    payload, keys, earlier = b"\x01true", (KEY, SECOND, THIRD), (OLD, OLDER)
    twin, written = same_hint(NAME), framed(payload)
    for place, key in enumerate(keys, 1):
        stored = framed(payload, key=key)
        yield opens(f"under key {place} of three", "json", payload, "true", keys=keys, stored=stored)
    for name in (NAME, *earlier):
        comment = f"of {name}, with two earlier names"
        yield opens(comment, "json", payload, "true", earlier=earlier, stored=framed(payload, name))
    text = reference.text(framed(payload, OLDER, THIRD))
    yield opens("all at once, as text", "json", payload, "true", keys=keys, earlier=earlier, stored=text)
    yield opens("own name, an earlier of the same hint", "json", payload, "true", earlier=(twin,), stored=written)

    def bad(comment: str, error: str, stored: bytes, **context: Any) -> Case:
        return case(comment, error, stored, **context)

    yield bad("under none of two keys", UNKNOWN, framed(payload, key=THIRD), keys=(KEY, SECOND))
    yield bad("no key at hand", UNKNOWN, written, keys=())
    second_id = reference.key_id(SECOND)
    yield bad("key id of another key at hand", TAG, written[:2] + second_id + written[10:], keys=(KEY, SECOND))
    yield bad("key id cut to zeros", UNKNOWN, written[:9] + b"\0" + written[10:])
    check_id = reference.expand(KEY, "key-check")[:8]
    yield bad("key check for key id", UNKNOWN, written[:2] + check_id + written[10:])
    yield bad("of an earlier name that is not declared", COLUMN, framed(payload, OLD), earlier=(OLDER,))
    yield bad("of the present name, read as the earlier", COLUMN, written, name=OLD)
    yield bad("an earlier name of the present's hint", TAG, framed(payload, twin), earlier=(twin,))
    yield bad("hint of an earlier name", TAG, written[:10] + reference.hint(OLD) + written[12:], earlier=(OLD,))
    yield bad("with the schema", COLUMN, framed(payload, f"public.{NAME}"))
    yield bad("with a space behind", COLUMN, framed(payload, f"{NAME} "))
    composed, taken_apart = (unicodedata.normalize(form, "t.grün") for form in ("NFC", "NFD"))
    yield bad("the name in another normal form", COLUMN, framed(payload, taken_apart), name=composed)


# --- The frame -------------------------------------------------------------------------------------------------------


def misread_derivations() -> Iterator[tuple[str, bytes]]:
    """Return frames as a writer makes them that misreads one step; their headers are right."""
    nonce, payload, header = (
        drawn("misread", 24),
        b"\x01true",
        b"\xf9\x02" + reference.key_id(KEY) + reference.hint(NAME),
    )
    key, encoded = reference.expand(KEY, "aead/02"), NAME.encode()
    right = header + reference.lp(encoded)
    for what, data in {
        "nothing": b"",
        "the header alone": header,
        "the name alone": encoded,
        "no length before the name": header + encoded,
        "a length of 8 bytes": header + len(encoded).to_bytes(8, "big") + encoded,
        "a little-endian length": header + len(encoded).to_bytes(4, "little") + encoded,
        "the length of both": reference.lp(header + encoded),
        "a length before the header too": reference.lp(header, encoded),
        "the nonce too": header + nonce + reference.lp(encoded),
        "no hint": header[:10] + reference.lp(encoded),
    }.items():
        yield f"associated data: {what}", header + nonce + reference.xaes_encrypt(key, nonce, payload, data)
    info = b"sqlalchemy-kravn-crypto/v1"
    for what, wrong in {
        "the data key itself": KEY,
        "purpose aead/01": reference.expand(KEY, "aead/01"),
        "purpose in capitals": reference.expand(KEY, "AEAD/02"),
        "info without lengths": reference.hkdf_expand(KEY, info + b"aead/02", 32),
        "extract first": reference.expand(hmac.digest(bytes(32), KEY, "sha256"), "aead/02"),
    }.items():
        yield f"key: {what}", header + nonce + reference.xaes_encrypt(wrong, nonce, payload, right)
    for what, subkey, short in (
        ("no subkey", key, nonce[12:]),
        ("the first half of the nonce in GCM", reference.xaes_subkey(key, nonce), nonce[:12]),
        ("the subkey of the second half", reference.xaes_subkey(key, nonce[12:]), nonce[12:]),
        ("the halves of the subkey the other way round", swapped(reference.xaes_subkey(key, nonce)), nonce[12:]),
    ):
        yield f"cipher: {what}", header + nonce + AESGCM(subkey).encrypt(short, payload, right)
    tagged = reference.xaes_encrypt(key, nonce, payload, right)
    yield "the tag first", header + nonce + tagged[-16:] + tagged[:-16]
    yield "a tag of zeros", header + nonce + tagged[:-16] + bytes(16)
    yield "no tag, but 16 bytes more", header + nonce + tagged[:-16] + b" " * 16


def swapped(subkey: bytes) -> bytes:
    return subkey[16:] + subkey[:16]


def error_of_flip(offset: int) -> str:
    ends = {1: MALFORMED, 2: ALGORITHM, 10: UNKNOWN, 12: COLUMN}
    return next((error for end, error in ends.items() if offset < end), TAG)


def frame_cases() -> Iterator[Case]:
    frame = framed(b"\x01{}")
    for size in range(52):
        yield case(f"the first {size} bytes", MALFORMED, frame[:size])
    for size in range(52, len(frame)):
        yield case(f"the first {size} bytes", TAG, frame[:size])
    for offset, byte in enumerate(frame):
        yield case(
            f"highest bit of byte {offset} flipped", error_of_flip(offset), with_byte(frame, offset, byte ^ 0x80)
        )
    for what, stored in misread_derivations():
        yield case(what, TAG, stored)
    unknown, foreign = framed(b"\x01{}", key=SECOND), framed(b"\x01{}", OLD)
    twice_foreign, no_kind = framed(b"\x01{}", OLD, SECOND), framed(b"\x00")
    for comment, error, stored in (
        ("magic before algorithm", MALFORMED, b"\xf8\x01" + frame[2:]),
        ("magic before length", MALFORMED, b"\xf8\x02"),
        ("algorithm before length", ALGORITHM, b"\xf9\x03" + frame[2:51]),
        ("algorithm before key", ALGORITHM, b"\xf9\x03" + unknown[2:]),
        ("length before key", MALFORMED, unknown[:51]),
        ("length before name", MALFORMED, foreign[:51]),
        ("key before name", UNKNOWN, twice_foreign),
        ("key before tag", UNKNOWN, with_byte(unknown, 40, unknown[40] ^ 1)),
        ("name before tag", COLUMN, with_byte(foreign, 40, foreign[40] ^ 1)),
        ("tag before payload", TAG, with_byte(no_kind, len(no_kind) - 1, no_kind[-1] ^ 1)),
    ):
        yield case(f"order of checks: {comment}", error, stored)


# --- Text storage ----------------------------------------------------------------------------------------------------


def text_cases() -> Iterator[Case]:
    for payload in (b"\x01{}", b"\x01[1]", b"\x01null"):
        frame = framed(payload)
        text = reference.text(frame)
        value = payload[1:].decode()
        yield opens(f"length {len(frame) % 3} modulo 3", "json", payload, value, stored=text)
        yield case(f"padding at length {len(frame) % 3}", MALFORMED, text + "=" * (-len(frame) % 3 or 1))
    yield from bad_texts(framed(b"\x01{}"), framed(b"\x01[1]"))


def bad_texts(one: bytes, two: bytes) -> Iterator[Case]:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for frame, unused in ((one, 4), (two, 2)):
        text = reference.text(frame)
        for bits in range(1, 1 << unused):
            other = text[:-1] + alphabet[alphabet.index(text[-1]) + bits]
            yield case(f"unused bits {bits} of {unused}", MALFORMED, other)
    text = reference.text(one)
    for comment, stored in {
        "carriage return and newline inside": f"{text[:40]}\r\n{text[40:]}",
        "carriage return behind": f"{text}\r",
        "tab before": f"\t{text}",
        "no-break space behind": f"{text}\u00a0",
        "full stop inside": f"{text[:40]}.{text[40:]}",
        "= inside": f"{text[:40]}={text[40:]}",
        "byte order mark before": f"\ufeff{text}",
        "a fullwidth letter": f"{text[:-1]}\uff21",
        "prefix of version 2": f"enc:v2:{text[7:]}",
        "prefix without its last colon": f"enc:v3{text[7:]}",
        "prefix with a space": f"enc:v3: {text[7:]}",
        "one character": "enc:v3:-",
        "F9 alone": "enc:v3:-Q",
        "F9 alone, with unused bits": "enc:v3:-R",
        "F9 02 alone": "enc:v3:-QI",
        "51 bytes": reference.text(one[:51]),
        "magic F8": reference.text(with_byte(one, 0, 0xF8)),
    }.items():
        yield case(f"text: {comment}", MALFORMED, stored)
    for error, other_frame in {
        ALGORITHM: with_byte(one, 1, 1),
        UNKNOWN: framed(b"\x01{}", key=SECOND),
        COLUMN: framed(b"\x01{}", OLD),
        TAG: with_byte(one, 36, one[36] ^ 1),
        PAYLOAD: framed(b"\x05"),
    }.items():
        yield case(f"text of a frame with {error}", error, reference.text(other_frame))
    yield case("text: F9 01 alone", ALGORITHM, "enc:v3:-QE")


# --- Payloads --------------------------------------------------------------------------------------------------------


def documents() -> Iterator[Case]:
    deep = "[" * 254 + "]" * 254
    for comment, text, value in (
        ("white space", ' {\t"a" :\r\n1 } ', '{"a":1}'),
        ("of two members of a name the last counts", '{"a":1,"b":2,"a":3}', '{"a":3,"b":2}'),
        ("of two members of a name, one an object", '{"a":{"b":1},"a":{"c":2}}', '{"a":{"c":2}}'),
        ("escapes", '"\\u00fc\\n\\"\\/\\\\\\ud83d\\udd11"', '"ü\\n\\"/\\\\\U0001f511"'),
        ("an escaped name is the same name", '{"a":1,"\\u0061":2}', '{"a":2}'),
        ("__proto__", '{"__proto__":{"a":1}}', '{"__proto__":{"a":1}}'),
        ("254 levels", deep, deep),
        ("the greatest binary64", "1.7976931348623157e308", "1.7976931348623157e308"),
        ("a number below every binary64", "1e-400", "1e-400"),
    ):
        for kind in JSON_KINDS:
            yield opens(f"JSON of kind {kind.hex()}: {comment}", "json", kind + text.encode(), value)
    for kind, number in (
        (b"\x01", 2**64 - 1),
        (b"\x01", -(2**63)),
        (b"\x02", 2**64),
        (b"\x02", -(2**63) - 1),
        (b"\x02", 2**14_000 - 1),
    ):
        comment = f"JSON of kind {kind.hex()}: {'negative ' * (number < 0)}integer of {number.bit_length()} bits"
        yield opens(comment, "json", kind + str(number).encode(), str(number))
    for comment, content in bad_documents().items():
        for kind in JSON_KINDS:
            yield case(f"JSON of kind {kind.hex()}: {comment}", PAYLOAD, framed(kind + content))
    for comment, text in {
        "beyond binary64": "[1e400]",
        "below binary64's least": "[-1e400]",
        "a lone high surrogate": '"\\ud800"',
        "a lone low surrogate": '"\\udc00"',
        "surrogates the wrong way round": '"\\udd11\\ud83d"',
        "a lone surrogate in a name": '{"\\ud800":1}',
    }.items():
        for kind in JSON_KINDS:
            yield case(f"JSON of kind {kind.hex()}: {comment}", PAYLOAD, framed(kind + text.encode()))


def bad_documents() -> dict[str, bytes]:
    texts = 'nul True Infinity +1 01 -01 .5 5. 1e 0x1 - -a 1,2 [1,] [,1] [1 {1:2} {a:1} {"a"} {"a":} ] } " \'1\''
    return {
        **{text: text.encode() for text in texts.split()},
        "two values": b"1 2",
        "a comment": b"/**/1",
        "a comma behind the last member": b'{"a":1,}',
        "a control character in text": b'"\x1f"',
        "an unknown escape": b'"\\x41"',
        "half an escape": b'"\\u00f"',
        "byte order mark": b"\xef\xbb\xbf1",
        "no-break space": b"\xc2\xa01",
        "form feed": b"\x0c1",
        "NUL behind": b"1\0",
        "white space alone": b" \n",
        "overlong UTF-8": b'"\xc0\x80"',
        "a surrogate in UTF-8": b'"\xed\xa0\x80"',
        "half a character": b'"\xc3"',
        "UTF-16": "[1]".encode("utf-16-le"),
        "text storage": b"enc:v3:-QKl",
    }


def kinds_nobody_reads() -> Iterator[Case]:
    first: dict[str, bytes] = {}
    for type_, _, payload in good_values():
        first.setdefault(type_, payload)
    for other, payload in first.items():
        yield case(f"json: the payload of {other}", PAYLOAD, framed(payload))
    for type_, payload in {"json": b"\x01null", **first}.items():
        for kind in sorted({0x00, 0x05, 0x0F, 0x12, 0x1A, 0x1C, 0x7F, 0x80, 0xFF, payload[0] ^ 0x80}):
            yield case(f"{type_}: kind {kind:02X}", PAYLOAD, framed(bytes([kind]) + payload[1:]), type_=type_)
        yield case(f"{type_}: empty", PAYLOAD, framed(b""), type_=type_)
        for error, name in ((COLUMN, OLD), (TAG, same_hint(NAME))):
            yield case(f"{type_}: of {name}", error, framed(payload, name), type_=type_)


def values() -> Iterator[Case]:
    for comment, type_, payload, value in (
        ("byte order mark", "text", b"\x03\xef\xbb\xbfa", "\ufeffa"),
        ("the last code points", "text", b"\x03\xf4\x8f\xbf\xbf\xef\xbf\xbf", "\U0010ffff\uffff"),
        ("combining characters as they are", "text", b"\x03u\xcc\x88", "u\u0308"),
        ("kind in the bytes", "bytes", b"\x04\x04", "04"),
        ("greatest exponent", "decimal", b"\x92" + reference.padded(b"1E+999999999999999999"), "1E+999999999999999999"),
        ("least exponent", "decimal", b"\x92" + reference.padded(b"0E-1999999999999999997"), "0E-1999999999999999997"),
        ("last without an exponent", "decimal", b"\x92" + reference.padded(b"0.000001"), "0.000001"),
        ("zero before it needs an exponent", "decimal", b"\x92" + reference.padded(b"0.000000"), "0.000000"),
        ("zero that needs an exponent", "decimal", b"\x92" + reference.padded(b"0E-7"), "0E-7"),
        ("leap day of a century", "date", b"\x142000-02-29", "2000-02-29"),
        ("subnormal", "float", b"\x1b\x80\x0f" + b"\xff" * 6, "-0x0.fffffffffffffp-1022"),
    ):
        yield opens(f"{type_}: {comment}", type_, payload, value)
    below = timedelta.min // timedelta(microseconds=1) - 1
    for comment, type_, payload in (
        ("beyond Unicode", "text", b"\x03\xf4\x90\x80\x80"),
        ("half a character", "text", b"\x03a\xe2\x82"),
        ("a continuation alone", "text", b"\x03\x80"),
        ("overlong, of three bytes", "text", b"\x03\xe0\x80\x80"),
        ("nothing", "integer", b"\x10"),
        ("no digits", "integer", b"\x11"),
        ("a sign alone", "integer", b"\x11-"),
        ("two signs", "integer", b"\x11--" + b"9" * 40),
        ("zero as text", "integer", b"\x110"),
        ("as text, 16 bytes", "integer", b"\x11" + b"9" * 16),
        ("leading zeros, negative", "integer", b"\x11-0" + b"9" * 40),
        ("hexadecimal", "integer", b"\x11" + b"f" * 40),
        ("as text, of kind 10", "integer", b"\x10" + b"9" * 40),
        ("14,001 bits, negative", "integer", reference.integer_payload(-(2**14_000))),
        ("80 before the padding's", "decimal", b"\x92" + reference.padded(b"1\x80")),
        ("ones behind 80", "decimal", b"\x92" + b"1\x80" + b"\x01" * 46),
        ("beyond the greatest exponent", "decimal", b"\x92" + reference.padded(b"1E+1000000000000000000")),
        ("below the least exponent", "decimal", b"\x92" + reference.padded(b"1E-1999999999999999998")),
        ("a zero below the least exponent", "decimal", b"\x92" + reference.padded(b"0E-1999999999999999998")),
        ("an exponent where none is needed", "decimal", b"\x92" + reference.padded(b"1.2E+1")),
        ("no exponent where one is needed", "decimal", b"\x92" + reference.padded(b"0.0000001")),
        ("two digits before the point", "decimal", b"\x92" + reference.padded(b"12.3E+5")),
        ("leading zero of the exponent", "decimal", b"\x92" + reference.padded(b"1E+03")),
        ("exponent without a sign", "decimal", b"\x92" + reference.padded(b"1E3")),
        ("zero before the point and an exponent", "decimal", b"\x92" + reference.padded(b"0.5E-10")),
        ("zero with a fraction and an exponent", "decimal", b"\x92" + reference.padded(b"0.0E-10")),
        ("a comma", "decimal", b"\x92" + reference.padded(b"1,5")),
        ("a minus sign of typographers", "decimal", b"\x92" + reference.padded("\u22121".encode())),
        ("nothing", "boolean", b"\x13"),
        ("text", "boolean", b"\x13true"),
        ("leap day of no leap year", "date", b"\x141900-02-29"),
        ("31 April", "date", b"\x141999-04-31"),
        ("month 00", "date", b"\x141999-00-10"),
        ("day 00", "date", b"\x141999-01-00"),
        ("a sign", "date", b"\x14+999-01-01"),
        ("five digits", "date", b"\x1410000-01-01"),
        ("minute 60", "time", b"\x1512:60:00.000000"),
        ("second 61", "time", b"\x1512:30:61.000000"),
        ("nine digits", "time", b"\x1512:30:00.000000000"),
        ("hour 25", "naive datetime", b"\x161999-12-31T25:00:00.000000"),
        ("year 0000", "naive datetime", b"\x160000-12-31T00:00:00.000000"),
        ("Z", "naive datetime", b"\x161999-12-31T12:30:00.000000Z"),
        ("-24:00:00", "aware datetime", b"\x171999-12-31T12:30:00.000000-24:00:00"),
        ("+23:60:00", "aware datetime", b"\x171999-12-31T12:30:00.000000+23:60:00"),
        ("no such day", "aware datetime", b"\x171999-02-30T12:30:00.000000+01:00:00"),
        ("+1:00:00", "aware datetime", b"\x171999-12-31T12:30:00.000000+1:00:00"),
        ("with hyphens", "uuid", b"\x1800112233-4455-6677-8899-aabbccddeeff"),
        ("below the shortest", "interval", b"\x19" + reference.sixteen_bytes(below)),
        ("the shortest of 16 bytes", "interval", b"\x19" + reference.sixteen_bytes(-(2**127))),
        ("8 bytes", "interval", b"\x19" + bytes(8)),
        ("NaN with a sign", "float", b"\x1b\xff\xf8" + bytes(6)),
        ("NaN of ones", "float", b"\x1b" + b"\xff" * 8),
        ("another normal form", "enum", reference.enum_payload("gru\u0308n")),
        ("half the padding", "enum", reference.enum_payload("red")[:25]),
        ("a space behind", "enum", reference.enum_payload("red ")),
        ("NUL behind", "enum", reference.enum_payload("red\0")),
        ("padding of a multiple of 16", "enum", b"\x9ared\x80" + bytes(12)),
        ("padding of PKCS #7", "enum", b"\x9ared" + bytes([45]) * 45),
        ("48 bytes without a block more", "enum", b"\x9a" + b"n" * 48),
        ("51 times n", "enum", reference.enum_payload("n" * 51)),
    ):
        yield case(f"{type_}: {comment}", PAYLOAD, framed(payload), type_=type_)


# --- Values that are bound to their row ------------------------------------------------------------------------------


def of_row(row: list[str] | None, name: str = NAME) -> bytes:
    return reference.frame(KEY, name, drawn(f"of the row {row}", 24), JSON_TRUE, row)


def row_cases() -> Iterator[Case]:
    uuid = "0f0e0d0c0b0a09080706050403020100"
    rows = (["1"], ["-9223372036854775808"], [uuid], [""], ["größe", "\N{GRINNING FACE}"], ["tenant", uuid, "7"])
    for row in rows:
        yield opens(f"of the row {row}", "json", JSON_TRUE, "true", stored=of_row(row)) | {"row": row}
    yield opens("of a row, as text", "json", JSON_TRUE, "true", stored=reference.text(of_row(["1"]))) | {"row": ["1"]}
    written = of_row(["1"], OLD)
    yield opens("of a row, of an earlier name", "json", JSON_TRUE, "true", stored=written, earlier=(OLD,)) | {
        "row": ["1"]
    }
    moved: tuple[tuple[str, list[str] | None, list[str] | None], ...] = (
        ("another row", ["1"], ["2"]),
        ("no row, read with one", None, ["1"]),
        ("a row, read without", ["1"], None),
        ("an empty identity, read without", [], None),
        ("no row, read with an empty identity", None, []),
        ("an empty text, read as no text", [""], []),
        ("two texts, read as one", ["a", "b"], ["ab"]),
        ("two texts, cut elsewhere", ["a", "bc"], ["ab", "c"]),
        ("two texts in another order", ["a", "b"], ["b", "a"]),
        ("one more text", ["1"], ["1", ""]),
        ("one text less", ["1", "2"], ["1"]),
        ("an integer with a zero before it", ["1"], ["01"]),
        ("an integer with a plus before it", ["1"], ["+1"]),
        ("a UUID in capitals", [uuid], [uuid.upper()]),
        ("a UUID with hyphens", [uuid], [f"{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:]}"]),
        ("another normal form", ["gr\u00f6\u00dfe"], ["gro\u0308\u00dfe"]),
        ("a space behind it", ["a"], ["a "]),
    )
    for comment, written_for, read_in in moved:
        found = case(f"of a row: {comment}", TAG, of_row(written_for))
        yield found if read_in is None else found | {"row": read_in}
    header = of_row(None)[:12]
    for comment, associated_data in {
        "the texts without their lengths": header + reference.lp(NAME.encode()) + reference.lp(b"1"),
        "the identity without its length": header + reference.lp(NAME.encode()) + reference.lp(reference.lp(b"1"))[4:],
        "the identity before the name": header + reference.lp(reference.lp(b"1")) + reference.lp(NAME.encode()),
    }.items():
        nonce = drawn(comment, 24)
        key = reference.expand(KEY, "aead/02")
        stored = header + nonce + reference.xaes_encrypt(key, nonce, JSON_TRUE, associated_data)
        yield case(f"of a row: {comment}", TAG, stored) | {"row": ["1"]}


# --- One after another, all that kinds.json opens ---------------------------------------------------------------------


def every_kind() -> Iterator[Case]:
    for entry in good_kinds():
        stored, payload = bytes.fromhex(entry["frame"]), bytes.fromhex(entry["payload"])
        yield opens(f"of every kind: {entry['comment']}", entry["type"], payload, entry["value"], stored=stored)


def cases() -> list[Case]:
    found = (key_and_name_cases, frame_cases, text_cases, documents, kinds_nobody_reads, values, row_cases, every_kind)
    return [entry for make in found for entry in make()]


def main() -> None:
    document = {"source": SOURCE, "cases": cases()}
    OUTPUT.write_text(json.dumps(document, ensure_ascii=True, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
