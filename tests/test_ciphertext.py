"""The frame and its text form: packed as specified, and taken apart only if they are exactly that."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.ciphertext import (
    KEY_PREFIX_SIZE,
    LEGACY_PREFIXES,
    MIN_FRAME_SIZE,
    TEXT_FRAME_START,
    TEXT_HEADER_SIZE,
    TEXT_KEY_PREFIX_SIZE,
    ColumnName,
    from_text,
    key_id_of_start,
    key_id_of_text_start,
    key_prefix,
    parse,
    text_key_prefix,
    to_text,
)
from tests import reference
from tests.leaks import leaked

FROZEN: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "frames.json").read_text("utf-8"))
FRAMES: list[dict[str, str]] = FROZEN["frames"]

FRAME = bytes.fromhex(FRAMES[0]["frame"])
TEXT = FRAMES[0]["text"]
MARKER = "plain" + "text" + "0123456789" * 6


def entries(found: list[dict[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", found, ids=[one["comment"] for one in found])


@entries(FRAMES)
def test_frozen_frame_is_taken_apart(entry: dict[str, str]) -> None:
    frame = bytes.fromhex(entry["frame"])
    key, name = bytes.fromhex(entry["key"]), entry["name"]
    header = b"\xf9\x02" + reference.key_id(key) + hashlib.sha256(name.encode()).digest()[:2]
    parsed = parse(frame)
    assert parsed == (header, header[2:10], header[10:12], bytes.fromhex(entry["nonce"]), frame[36:])
    assert parsed.header + parsed.nonce + parsed.body == frame


@entries(FRAMES)
def test_frozen_frame_has_its_text_form(entry: dict[str, str]) -> None:
    assert to_text(bytes.fromhex(entry["frame"])) == entry["text"]
    assert from_text(entry["text"]) == bytes.fromhex(entry["frame"])


@entries(FRAMES)
def test_associated_data_are_the_header_and_the_name(entry: dict[str, str]) -> None:
    name = ColumnName(entry["name"])
    header = bytes.fromhex(entry["frame"])[:12]
    encoded = entry["name"].encode()
    assert name.hint == header[10:12]
    for key_id in (header[2:10], bytes(8), header[2:10]):
        expected = b"\xf9\x02" + key_id + name.hint
        associated_data = expected + len(encoded).to_bytes(4, "big") + encoded
        assert name.bound_to(key_id) == (key_id, expected, associated_data)


@entries([entry for entry in FROZEN["must_fail"] if "text" in entry])
def test_refuses_what_is_no_canonical_text_form(entry: dict[str, str]) -> None:
    with pytest.raises(getattr(errors, entry["error"])):
        parse(from_text(entry["text"]))


@entries(
    [
        entry
        for entry in FROZEN["must_fail"]
        if "stored" in entry and entry["error"] in {"MalformedCiphertextError", "UnsupportedAlgorithmError"}
    ]
)
def test_refuses_what_is_no_frame_before_any_key_is_looked_for(entry: dict[str, str]) -> None:
    with pytest.raises(getattr(errors, entry["error"])):
        parse(bytes.fromhex(entry["stored"]))


@given(st.binary(max_size=200))
def test_text_form_comes_back(frame: bytes) -> None:
    text = to_text(frame)
    assert text == reference.text(frame)
    if frame:
        assert from_text(text) == frame


def test_first_12_bytes_are_16_characters_of_their_own() -> None:
    shared = {to_text(FRAME[:12] + bytes([byte]) * 40)[: len("enc:v3:") + 16] for byte in range(256)}
    assert shared == {to_text(FRAME[:12])}


def test_no_text_has_a_second_spelling() -> None:
    alphabet = [chr(code) for code in range(256)]
    for position in range(len(TEXT)):
        for character in alphabet:
            altered = TEXT[:position] + character + TEXT[position + 1 :]
            frame = b""
            try:
                frame = from_text(altered)
            except errors.MalformedCiphertextError:
                continue
            assert (frame == FRAME) is (altered == TEXT), (position, character)


@given(st.text(max_size=120))
def test_arbitrary_text_is_refused_or_canonical(text: str) -> None:
    for candidate in (text, f"enc:v3:{text}"):
        try:
            frame = from_text(candidate)
        except errors.MalformedCiphertextError:
            continue
        assert reference.text(frame) == candidate


@given(st.text(max_size=400))
def test_no_unicode_text_parses_as_a_frame(text: str) -> None:
    with pytest.raises(errors.MalformedCiphertextError):
        parse(text.encode())


@given(st.binary(max_size=120), st.sampled_from([b"", b"\xf9", b"\xf9\x02"]))
def test_arbitrary_bytes_parse_as_the_format_says(tail: bytes, head: bytes) -> None:
    frame = head + tail
    if frame[:1] != b"\xf9" or (frame[:2] == b"\xf9\x02" and len(frame) < 52) or frame == b"\xf9":
        expected: type[Exception] = errors.MalformedCiphertextError
    elif frame[:2] != b"\xf9\x02":
        expected = errors.UnsupportedAlgorithmError
    else:
        assert b"".join(parse(frame)[index] for index in (0, 3, 4)) == frame
        return
    with pytest.raises(expected):
        parse(frame)


@pytest.mark.parametrize("size", range(MIN_FRAME_SIZE))
def test_refuses_every_length_below_the_minimum(size: int) -> None:
    assert MIN_FRAME_SIZE == 12 + 24 + 16
    with pytest.raises(errors.MalformedCiphertextError):
        parse(FRAME[:size])


def test_the_error_names_the_algorithm() -> None:
    with pytest.raises(errors.UnsupportedAlgorithmError, match="algorithm 0x07,"):
        parse(b"\xf9\x07" + FRAME[2:])


def test_what_values_in_text_storage_begin_with() -> None:
    # F9 02 is 111110 010000 0010..: two whole characters.
    assert TEXT_FRAME_START == "enc:v3:-Q"
    assert LEGACY_PREFIXES[0] == "enc:v0:"
    assert LEGACY_PREFIXES[-1] == "enc:v9:"
    assert len(LEGACY_PREFIXES) == 10


def test_the_frame_of_an_empty_payload_is_a_frame() -> None:
    assert parse(FRAME[:MIN_FRAME_SIZE]).body == FRAME[36:52]


@pytest.mark.parametrize(
    ("read", "stored"),
    [
        pytest.param(parse, MARKER.encode(), id="plaintext"),
        pytest.param(parse, b"\xf9\x07" + MARKER.encode(), id="unknown algorithm"),
        pytest.param(parse, FRAME[:51], id="truncated"),
        pytest.param(from_text, MARKER, id="plaintext in text storage"),
        pytest.param(from_text, "enc:v3:" + MARKER + "!", id="foreign character"),
        pytest.param(from_text, TEXT + "=", id="padding"),
        pytest.param(from_text, "enc:v3:" + MARKER + "\xe4", id="beyond ASCII"),
    ],
)
def test_error_shows_nothing_of_the_value(read: Callable[[Any], object], stored: Any) -> None:
    with pytest.raises(errors.DecryptionError) as caught:
        read(stored)
    assert leaked(caught.value, MARKER, FRAME[2:10], FRAME[12:36], FRAME[36:51], TEXT[7:]) == []
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=2, max_size=2), st.binary(max_size=40))
def test_the_start_of_a_value_tells_its_key(key_id: bytes, hint: bytes, rest: bytes) -> None:
    frame = b"\xf9\x02" + key_id + hint + bytes(24) + rest + bytes(16)
    in_text = to_text(frame)
    assert frame.startswith(key_prefix(key_id.hex()))
    assert len(key_prefix(key_id.hex())) == KEY_PREFIX_SIZE == 10
    assert in_text.startswith(text_key_prefix(key_id.hex()))
    assert in_text.startswith(TEXT_FRAME_START)
    assert len(text_key_prefix(key_id.hex())) == TEXT_KEY_PREFIX_SIZE == 7 + 13
    assert TEXT_HEADER_SIZE == 7 + 16
    assert key_id_of_start(frame[:KEY_PREFIX_SIZE]) == key_id.hex()
    assert key_id_of_text_start(in_text[:TEXT_HEADER_SIZE]) == key_id.hex()


@given(st.binary(min_size=8, max_size=8), st.integers(0, 61))
def test_another_key_has_another_start(key_id: bytes, bit: int) -> None:
    other = (int.from_bytes(key_id, "big") ^ 1 << 63 - bit).to_bytes(8, "big")
    assert key_prefix(key_id.hex()) != key_prefix(other.hex())
    assert text_key_prefix(key_id.hex()) != text_key_prefix(other.hex())


@pytest.mark.parametrize("start", [b"", FRAME[:9], FRAME[:11], b"\xf9\x03" + FRAME[2:10], b"plaintext!"])
def test_what_is_no_start_of_a_frame_has_no_key(start: bytes) -> None:
    assert key_id_of_start(start) is None


@pytest.mark.parametrize(
    "start", ["", TEXT[:22], TEXT[:24], TEXT[:27], TEXT[:22] + "!", "enc:v2" + TEXT[6:23], "p" * 23]
)
def test_what_is_no_start_of_text_storage_has_no_key(start: str) -> None:
    assert key_id_of_text_start(start) is None
