"""Write ``tests/vectors/frames.json``: run once per version of the frame. See ``tests/vectors/README.md``.

Everything in it comes from ``tests.reference``, and nothing from the package.
"""

import hashlib
import json
from itertools import count
from pathlib import Path
from typing import Any

from tests import reference

OUTPUT = Path(__file__).parent / "vectors" / "frames.json"
SOURCE = (
    "tests/make_frames.py, from the description of the format and independently of the package. Frames of version "
    "0xF9, algorithm 0x02. key, nonce, payload, frame and stored are in hexadecimal; text is as in text storage."
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


def main() -> None:
    frames = good_frames()
    document = {
        "source": SOURCE,
        "frames": frames,
        "must_fail": [*bad_frames(bytes.fromhex(frames[0]["frame"])), *bad_texts()],
    }
    OUTPUT.write_text(json.dumps(document, ensure_ascii=True, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
