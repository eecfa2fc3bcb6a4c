"""Write ``tests/vectors/frames.json`` and ``kinds.json``: run once per version of the frame. See ``vectors/README.md``.

Everything in them comes from ``tests.reference``, and nothing from the package.
"""

import hashlib
import json
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

from tests import reference

OUTPUT = Path(__file__).parent / "vectors" / "frames.json"
SOURCE = (
    "tests/make_frames.py, from the description of the format and independently of the package. Frames of version "
    "0xF9, algorithm 0x02. key, nonce, payload, frame and stored are in hexadecimal; text is as in text storage."
)

KINDS_OUTPUT = OUTPUT.with_name("kinds.json")
KINDS_SOURCE = (
    "tests/make_frames.py, from the description of the format and independently of the package. Frames of version "
    "0xF9, algorithm 0x02, of columns of every type but JSON. key, nonce, payload, frame and stored are in "
    "hexadecimal; value is the value as text: see README.md."
)

NAME = "plugin.credentials"

Entry = dict[str, Any]


def drawn(label: str, size: int) -> bytes:
    """Return bytes that look random and are the same every time."""
    return hashlib.shake_128(b"frames of 0xF9: " + label.encode()).digest(size)


def good(comment: str, payload: bytes, name: str = NAME, key: bytes | None = None) -> Entry:
    key = drawn("key", 32) if key is None else key
    nonce = drawn(comment, 24)
    frame = reference.frame(key, name, nonce, payload)
    return {
        "comment": comment,
        "key": key.hex(),
        "name": name,
        "nonce": nonce.hex(),
        "payload": payload.hex(),
        "frame": frame.hex(),
        "text": reference.text(frame),
    }


def good_frames() -> list[Entry]:
    zeros, ones = bytes(32), b"\xff" * 32
    return [
        good("a small document", b'\x01{"token":"s3cr3t"}'),
        good("JSON null", b"\x01null"),
        good("an empty text", b'\x01""'),
        good("an empty dict", b"\x01{}"),
        good("text beyond ASCII, in UTF-8", '\x01"grün 鍵 \U0001f511 \\u0000"'.encode()),
        good("an integer beyond 64 bits", b'\x02{"n":18446744073709551616}'),
        good("a document of one kilobyte", b'\x01{"blob":"' + b"x" * 1024 + b'"}'),
        good("plaintext that looks like text storage", b'\x01"enc:v3:-QKl"'),
        good("a key of zeros", b"\x01true", key=zeros),
        good("a key of ones", b"\x01false", key=ones),
        good("a name beyond ASCII", b"\x01[1,2.5,null]", name="benutzer.schlüssel_鍵"),
        good("a name of one character", b"\x01[]", name="a"),
        good("a name with several dots and spaces", b"\x01[[]]", name="my table.a.b c"),
    ]


def bad(comment: str, error: str, stored: bytes, name: str = NAME) -> Entry:
    return {
        "comment": comment,
        "key": drawn("key", 32).hex(),
        "name": name,
        "stored": stored.hex(),
        "error": error,
    }


def with_byte(frame: bytes, offset: int, byte: int) -> bytes:
    return frame[:offset] + bytes([byte]) + frame[offset + 1 :]


def other_name_with_the_same_hint(name: str) -> str:
    return next(
        candidate
        for candidate in (f"plugin.credentials_{number}" for number in count())
        if reference.hint(candidate) == reference.hint(name)
    )


def bad_frames(frame: bytes) -> list[Entry]:
    key = drawn("key", 32)
    nonce = drawn("bad", 24)
    malformed, authentication = "MalformedCiphertextError", "AuthenticationError"
    boundaries = {
        1: "the magic",
        2: "the algorithm",
        10: "the key id",
        12: "the name hint",
        36: "the nonce",
        51: "half a tag",
    }
    fields = {
        0: ("the magic", malformed),
        1: ("the algorithm", "UnsupportedAlgorithmError"),
        2: ("the key id", "UnknownKeyError"),
        9: ("the last byte of the key id", "UnknownKeyError"),
        10: ("the name hint", "WrongColumnError"),
        11: ("the last byte of the name hint", "WrongColumnError"),
        12: ("the half of the nonce that the subkey is made of", authentication),
        35: ("the half of the nonce that is GCM's", authentication),
        36: ("the ciphertext", authentication),
        len(frame) - 16: ("the tag", authentication),
        len(frame) - 1: ("the last byte of the tag", authentication),
    }
    return [
        bad("empty", malformed, b""),
        bad("plaintext", malformed, b"hello"),
        bad("plaintext JSON", malformed, b'{"token":"s3cr3t"}'),
        bad("text storage in a binary column", malformed, reference.text(frame).encode()),
        *(
            bad(f"magic {magic:#04x}", malformed, with_byte(frame, 0, magic))
            for magic in (0x00, 0x01, 0x7B, 0xF8, 0xFA, 0xFF)
        ),
        *(
            bad(f"algorithm {algorithm:#04x}", "UnsupportedAlgorithmError", with_byte(frame, 1, algorithm))
            for algorithm in (0x00, 0x01, 0x03, 0xFF)
        ),
        bad("algorithm 0x01, and nothing else", "UnsupportedAlgorithmError", b"\xf9\x01"),
        *(bad(f"truncated after {what}", malformed, frame[:size]) for size, what in boundaries.items()),
        bad("truncated by its last byte", authentication, frame[:-1]),
        bad("truncated to a frame's minimum", authentication, frame[:52]),
        bad("one byte more", authentication, frame + b"\0"),
        bad("twice", authentication, frame + frame),
        *(
            bad(f"flipped bit in {what}", error, with_byte(frame, offset, frame[offset] ^ 1))
            for offset, (what, error) in fields.items()
        ),
        bad(
            "under another data key", "UnknownKeyError", reference.frame(drawn("other key", 32), NAME, nonce, b"\x011")
        ),
        bad("of another column", "WrongColumnError", frame, name="plugin.settings"),
        bad("of another column whose hint is the same", authentication, frame, other_name_with_the_same_hint(NAME)),
        bad("the name in other capitals", "WrongColumnError", frame, name="Plugin.credentials"),
        *(
            bad(f"payload: {what}", "MalformedPayloadError", reference.frame(key, NAME, nonce, payload))
            for what, payload in {
                "empty": b"",
                "no JSON after its kind": b"\x01",
                "broken JSON": b'\x01{"a":',
                "broken JSON of kind 02": b"\x02[1,",
                "NaN": b"\x01NaN",
                "NaN of kind 02": b"\x02NaN",
                "infinity of kind 02": b"\x02[-Infinity]",
                "UTF-16 of kind 02": b"\x02" + "1".encode("utf-16"),
                "no UTF-8": b'\x01"\xff"',
                "kind 00": b"\x00null",
                "kind 03, text": b"\x03text",
                "kind 7B, JSON without a kind": b'{"a":1}',
                "kind 81, padded JSON": b"\x81null",
            }.items()
        ),
    ]


def bad_texts() -> list[Entry]:
    # 52 + 5 bytes fill their characters; 52 + 3 leave the last one with unused bits.
    frame = reference.frame(drawn("key", 32), NAME, drawn("bad text", 24), b"\x01null")
    short = reference.frame(drawn("key", 32), NAME, drawn("bad text", 24), b"\x01{}")
    text, loose = reference.text(frame), reference.text(short)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    non_canonical = loose[:-1] + alphabet[alphabet.index(loose[-1]) + 1]
    body = text.removeprefix("enc:v3:")
    assert len(frame) % 3 == 0
    assert len(short) % 3 == 1
    assert "-" in body
    assert "_" in body
    forms = {
        "empty": "",
        "plaintext": "hello",
        "plaintext JSON": '{"token":"s3cr3t"}',
        "the prefix alone": "enc:v3:",
        "no prefix": body,
        "prefix of version 1": f"enc:v1:{body}",
        "prefix of version 4": f"enc:v4:{body}",
        "prefix in capitals": f"ENC:V3:{body}",
        "prefix twice": f"enc:v3:{text}",
        "space before": f" {text}",
        "space behind": f"{text} ",
        "newline behind": f"{text}\n",
        "newline inside": f"{text[:40]}\n{text[40:]}",
        "NUL behind": f"{text}\0",
        "! inside": f"{text[:40]}!{text[40:]}",
        "! behind": f"{text}!",
        "+ for -": text.replace("-", "+"),
        "/ for _": text.replace("_", "/"),
        "padding where none is needed": f"{text}=",
        "padding": f"{loose}==",
        "half of the padding": f"{loose}=",
        "non-canonical last character": non_canonical,
        "a character too many": f"{text}A",
        "a letter beyond ASCII": f"{text[:-1]}ä",
        "a digit beyond ASCII": f"{text[:-1]}٣",
        "frame in hexadecimal": f"enc:v3:{frame.hex()}",
    }
    return [
        {"comment": comment, "key": drawn("key", 32).hex(), "name": NAME, "text": form, "error": error}
        for comment, form in forms.items()
        for error in ["MalformedCiphertextError"]
    ]


def zone(**offset: int) -> timezone:
    return timezone(timedelta(**offset))


def good_values() -> list[tuple[str, str, bytes]]:
    """Return type, value as text, and payload."""
    texts = ["", "hello", "grün 鍵 \U0001f511 \0", '{"token":"s3cr3t"}', "enc:v3:-QKl", "\x02", "x" * 1000]
    numbers = [0, 1, -1, 255, 256, -(2**63), 2**64, 2**127 - 1, -(2**127)]
    big_numbers = [2**127, -(2**127) - 1, 10**40, 2**14_000 - 1]
    decimals = "0 -0 0.00 1 -1 1.50 -1.500 0.1 1E+3 1.2E-7 0.0000012 1E-100 0E+3 -0E-20 12345678901234567890.123456789"
    long_decimals = ["1" * 46, "1" * 47, "1" * 48, "0." + "9" * 200]
    dates = [date(1, 1, 1), date(999, 2, 3), date(1970, 1, 1), date(2024, 2, 29), date(9999, 12, 31)]
    times = [time(0), time(23, 59, 59, 999_999), time(12, 30), time(1, 2, 3, 4)]
    naive = [datetime.combine(*pair) for pair in zip(dates, [*times, time(7)], strict=True)]
    zones = [UTC, zone(hours=2), zone(hours=-3, minutes=-30), zone(minutes=53, seconds=28), zone(seconds=-1)]
    zones += [zone(hours=23, minutes=59, seconds=59), zone(hours=-23, minutes=-59, seconds=-59)]
    aware = [datetime(2024, 10, 27, 2, 30, 0, 5, found) for found in zones]
    aware += [datetime(1, 1, 1, tzinfo=zone(hours=14)), datetime(9999, 12, 31, 23, tzinfo=zone(hours=-12))]
    uuids = [UUID(int=0), UUID(int=2**128 - 1), UUID("00112233-4455-6677-8899-aabbccddeeff")]
    intervals = [timedelta(), timedelta(microseconds=-1), timedelta(1, 2, 3), timedelta.min, timedelta.max]
    names = ["red", "grün", "", "n" * 47, "n" * 48]
    floats = [0.0, -0.0, 1.0, -0.1, 1e22, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308]
    return [
        *(("text", value, reference.text_payload(value)) for value in texts),
        *(("bytes", value.hex(), reference.bytes_payload(value)) for value in (b"", b"\0", b"\xff\x80", b"text")),
        *(("integer", str(value), reference.integer_payload(value)) for value in [*numbers, *big_numbers]),
        *(
            ("decimal", value, reference.decimal_payload(Decimal(value)))
            for value in [*decimals.split(), *long_decimals]
        ),
        *(("boolean", str(value).lower(), reference.boolean_payload(value)) for value in (False, True)),
        *(("date", reference.date_payload(value)[1:].decode(), reference.date_payload(value)) for value in dates),
        *(("time", reference.time_payload(value)[1:].decode(), reference.time_payload(value)) for value in times),
        *(
            (name, reference.datetime_payload(value)[1:].decode(), reference.datetime_payload(value))
            for name, values in {"naive datetime": naive, "aware datetime": aware}.items()
            for value in values
        ),
        *(("uuid", str(value), reference.uuid_payload(value)) for value in uuids),
        *(
            ("interval", str(value // timedelta(microseconds=1)), reference.interval_payload(value))
            for value in intervals
        ),
        *(("enum", value, reference.enum_payload(value)) for value in names),
        *(("float", value.hex(), reference.float_payload(value)) for value in floats),
    ]


def good_kinds() -> list[Entry]:
    return [
        good(f"{type_} {number}", payload) | {"type": type_, "value": value}
        for number, (type_, value, payload) in enumerate(good_values())
    ]


def spelt(first: bytes, *texts: str) -> dict[str, bytes]:
    return {f"spelt {text!r}": first + text.encode() for text in texts}


def bad_payloads() -> dict[str, dict[str, bytes]]:
    """Return for each type what a column of it does not read; beyond what is so for every type."""
    zeros = bytes(16)
    return {
        "text": {"no UTF-8": b"\x03\xff", "overlong": b"\x03\xc0\x80", "a surrogate": b"\x03\xed\xa0\x80"},
        "bytes": {"padded": b"\x84" + reference.padded(b"")},
        "integer": {
            "15 bytes": b"\x10" + zeros[1:],
            "17 bytes": b"\x10" + zeros + b"\0",
            "as text, though it has room": b"\x11" + b"170141183460469231731687303715884105727",
            "as text, though it has room, negative": b"\x11" + b"-170141183460469231731687303715884105728",
            "leading zero": b"\x110170141183460469231731687303715884105728",
            "plus": b"\x11+170141183460469231731687303715884105728",
            "underscore": b"\x11170141183460469231731687303715884_105728",
            "newline": b"\x11170141183460469231731687303715884105728\n",
            "14,001 bits": reference.integer_payload(2**14_000),
        },
        "decimal": {
            "unpadded": b"\x121.50",
            "kind 12, padded": b"\x12" + reference.padded(b"1.50"),
            "no padding": b"\x921.50",
            "nothing": b"\x92",
            "empty": b"\x92" + reference.padded(b""),
            "48 zeros": b"\x92" + bytes(48),
            "a block too many": b"\x92" + reference.padded(b"1.50") + bytes(48),
            "47 bytes": b"\x92" + reference.padded(b"1.50")[:-1],
            "ends with another byte": b"\x92" + reference.padded(b"1.50")[:-1] + b"\x01",
            **{
                comment: b"\x92" + reference.padded(payload[1:])
                for comment, payload in spelt(
                    *(b"\x92", "NaN", "sNaN", "Infinity", "-Infinity", "1e3", "1E3", "1000E+0", "+1", ".5", "1.", "01"),
                    *(" 1", "1_0", "1\n", "0.00000012", "\u0661", "x"),
                ).items()
            },
        },
        "boolean": {"02": b"\x13\x02", "FF": b"\x13\xff", "two bytes": b"\x13\x01\x00"},
        "date": spelt(
            *(b"\x14", "19991231", "1999-W52-5", "1999-13-01", "1999-02-29", "0000-01-01", "1999-12-1", "1999/12/31"),
            *("1999-12-31T00:00:00", " 1999-12-31", "1999-12-3\u0661", "1999-12-31\n", "1999-12-32"),
        ),
        "time": spelt(
            *(b"\x15", "12:30", "12:30:00", "12:30:00.000", "123000.000000", "12:30:60.000000", "24:00:00.000000"),
            *("12:30:00,000000", "T12:30:00.000000", "12:30:00.000000+00:00", "12:30:00.000000Z", "12:30:00.0000001"),
        ),
        "naive datetime": spelt(
            *(b"\x16", "1999-12-31", "1999-12-31T12:30:00", "1999-12-31 12:30:00.000000", "19991231T123000.000000"),
            *("1999-12-31T12:30:00.000000+00:00:00", "1999-02-29T12:30:00.000000", "1999-12-31t12:30:00.000000"),
            "1999-12-31T24:00:00.000000",
        ),
        "aware datetime": spelt(
            b"\x17",
            *(
                f"1999-12-31T12:30:00.000000{offset}"
                for offset in [
                    *("", "Z", "+00:00", "+01:00", "-00:00:00", "+24:00:00", "+0100:00", "+010000", "+01:00:00.000001"),
                    *("+01:60:00", "+01:00:60", "+01:00:00 ", "\u221201:00:00"),
                ]
            ),
            "1999-12-31T12:30:00+01:00:00",
        ),
        "uuid": {
            "15 bytes": b"\x18" + zeros[1:],
            "17 bytes": b"\x18" + zeros + b"\0",
            "hexadecimal": b"\x18" + b"0" * 32,
        },
        "interval": {
            "15 bytes": b"\x19" + zeros[1:],
            "17 bytes": b"\x19" + zeros + b"\0",
            "one beyond the longest": b"\x19" + reference.sixteen_bytes(timedelta.max // timedelta(microseconds=1) + 1),
            "the longest of 16 bytes": b"\x19" + reference.sixteen_bytes(2**127 - 1),
        },
        "enum": {
            "no member": reference.enum_payload("blue"),
            "another case": reference.enum_payload("RED"),
            "unpadded": b"\x1ared",
            "kind 1A, padded": b"\x1a" + reference.padded(b"red"),
            "no padding": b"\x9ared",
            "a block too many": reference.enum_payload("red") + bytes(48),
            "no UTF-8": b"\x9a" + reference.padded(b"\xff"),
        },
        "float": {
            "infinity": b"\x1b\x7f\xf0" + bytes(6),
            "minus infinity": b"\x1b\xff\xf0" + bytes(6),
            "NaN": b"\x1b\x7f\xf8" + bytes(6),
            "signalling NaN": b"\x1b\x7f\xf0" + bytes(5) + b"\1",
            "7 bytes": b"\x1b" + bytes(7),
            "9 bytes": b"\x1b" + bytes(9),
            "4 bytes": b"\x1b" + bytes(4),
        },
    }


def bad_kinds() -> list[Entry]:
    """Return what a column of each type does not read: of its own kind, and the first value of every other type."""
    key, nonce = drawn("key", 32), drawn("bad kind", 24)
    first: dict[str, bytes] = {}
    for type_, _, payload in good_values():
        first.setdefault(type_, payload)
    found = [
        (type_, what, payload)
        for type_, payloads in bad_payloads().items()
        for what, payload in {"nothing at all": b"", **payloads}.items()
    ]
    found += [
        (type_, f"the payload of {other}", payload)
        for type_ in first
        for other, payload in {**first, "JSON": b"\x01null", "big JSON": b"\x0218446744073709551616"}.items()
        if type_ != other
    ]
    return [
        bad(f"{type_}: {what}", "MalformedPayloadError", reference.frame(key, NAME, nonce, payload)) | {"type": type_}
        for type_, what, payload in found
    ]


def main() -> None:
    frames = good_frames()
    document = {
        "source": SOURCE,
        "frames": frames,
        "must_fail": [*bad_frames(bytes.fromhex(frames[0]["frame"])), *bad_texts()],
    }
    kinds = {"source": KINDS_SOURCE, "frames": good_kinds(), "must_fail": bad_kinds()}
    for path, written in {OUTPUT: document, KINDS_OUTPUT: kinds}.items():
        path.write_text(json.dumps(written, ensure_ascii=True, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
