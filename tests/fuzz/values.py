"""Targets: stored values, from the frame down to what a codec reads."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

from sqlalchemy_kravn_crypto import exceptions as errors

from .mutators import json_behind
from .target import KEY, MARKER, Run, shown, spellings, target

NAME: Final = "note.content"

NONCE: Final = bytes(range(24))
RAW, HEADED, ENCRYPTED = range(3)
"""What follows the first byte: a frame; its nonce and body, behind the right header; a payload to be encrypted."""


def _frame(data: bytes) -> bytes:
    from sqlalchemy_kravn_crypto.ciphertext import FRAME_START, ColumnName
    from sqlalchemy_kravn_crypto.keyring import DataKey

    key, name = _key(DataKey), _name(ColumnName)
    mode, content = data[0] % 3 if data else RAW, data[1:]
    if mode == HEADED:
        return bytes(FRAME_START + key.key_id + name.hint + content)
    return bytes(key.encrypt(NONCE, content, name)) if mode == ENCRYPTED else content


@cache
def _key(make: Any) -> Any:
    return make(KEY)


@cache
def _name(make: Any) -> Any:
    return make(NAME)


def _frames() -> list[bytes]:
    payload = b"\x01" + json.dumps({"token": MARKER}).encode()
    frame = _frame(bytes([ENCRYPTED]) + payload)
    return [bytes([RAW]) + frame, bytes([HEADED]) + frame[12:], bytes([ENCRYPTED]) + payload]


@target(
    allowed=(errors.DecryptionError,), seeds=_frames, mutator=json_behind(2), secrets=(MARKER.encode(), KEY), share=5
)
def binary_frames() -> Run:
    from sqlalchemy.dialects import sqlite

    from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, Keyring, use_keyring

    column, dialect, keyring = EncryptedJSON(associated_data=NAME), sqlite.dialect(), Keyring(DataKey(KEY))
    read = column.result_processor(dialect, None)
    assert read is not None

    def run(data: bytes) -> object:
        with use_keyring(keyring):
            return read(_frame(data))

    return run


def _texts() -> list[bytes]:
    from sqlalchemy_kravn_crypto.ciphertext import to_text

    readable = bytes([ENCRYPTED]) + b"\x03" + MARKER.encode()
    return [*(bytes([RAW]) + to_text(_frame(seed)).encode() for seed in (readable, *_frames())), readable]


@target(allowed=(errors.DecryptionError,), seeds=_texts, secrets=(MARKER.encode(), KEY), share=5)
def text_frames() -> Run:
    from sqlalchemy.dialects import sqlite

    from sqlalchemy_kravn_crypto import DataKey, EncryptedString, Keyring, use_keyring
    from sqlalchemy_kravn_crypto.ciphertext import key_id_of_text_start, to_text

    column = EncryptedString(associated_data=NAME, storage="text")
    read, keyring = column.result_processor(sqlite.dialect(), None), Keyring(DataKey(KEY))
    assert read is not None

    def run(data: bytes) -> object:
        is_raw = not data or data[0] % 3 == RAW
        text = data[1:].decode(errors="replace") if is_raw else to_text(_frame(data))
        key_id_of_text_start(text[:23])
        with use_keyring(keyring):
            return read(text)

    return run


KINDS: Final = (*range(1, 5), *range(0x10, 0x12), 0x92, *range(0x13, 0x1A), 0x9A, 0x1B)
"""The first byte of every kind of payload."""


def _payloads() -> list[bytes]:
    frozen = json.loads((Path(__file__).parents[1] / "vectors" / "frames.json").read_text("utf-8"))["frames"]
    found = {bytes.fromhex(one["payload"]) for one in frozen if "payload" in one}
    return sorted({*found, b"\x03" + MARKER.encode(), b"\x01" + json.dumps([MARKER, 1.5, None]).encode()}, key=repr)


@target(allowed=(errors.MalformedPayloadError,), seeds=_payloads, mutator=json_behind(1), share=10)
def payload_decoders() -> Run:
    """Every codec reads every payload, and what one reads it writes as the same bytes, or reads again as equal."""
    from sqlalchemy_kravn_crypto.codecs import documents, scalars

    codecs: dict[int, list[Any]] = {
        0x01: [documents.JSONCodec()],
        0x03: [scalars.TextCodec()],
        0x04: [scalars.BytesCodec()],
        0x10: [scalars.IntegerCodec()],
        0x92: [scalars.DecimalCodec()],
        0x13: [scalars.BooleanCodec()],
        0x14: [scalars.DateCodec()],
        0x15: [scalars.TimeCodec()],
        0x16: [scalars.DateTimeCodec(aware=False)],
        0x17: [scalars.DateTimeCodec(aware=True)],
        0x18: [scalars.UuidCodec(), scalars.UuidCodec(as_text=True)],
        0x19: [scalars.IntervalCodec()],
        0x9A: [scalars.EnumCodec({"RED": 1, "GREEN": 2})],
        0x1B: [scalars.FloatCodec()],
    }
    codecs[0x02], codecs[0x11] = codecs[0x01], codecs[0x10]
    everyone = [codec for kind in codecs for codec in codecs[kind]]

    def read(codec: Any, payload: bytes) -> tuple[bool, Any]:
        refusal = None
        try:
            return True, codec.decode(payload)
        except errors.MalformedPayloadError as error:
            refusal = error
        text = shown(refusal)
        assert not any(spelling in text for spelling in spellings(MARKER.encode()))
        return False, None

    def run(data: bytes) -> None:
        # The first byte where it is a kind; else it chooses one, so that few inputs end there.
        kind = data[0] if data and data[0] in KINDS else KINDS[data[0] % len(KINDS)] if data else KINDS[0]
        payload = bytes([kind]) + data[1:]
        for codec in everyone if len(data) % 16 == 0 else codecs[kind]:
            was_read, value = read(codec, payload)
            if was_read and value is not None:
                written = codec.encode(value)
                # JSON has spaces, escapes and orders; a codec of one spelling gives it back.
                assert written == payload if kind not in {0x01, 0x02} else codec.same(codec.decode(written), value)

    return run


def _objects() -> list[bytes]:
    return [
        b"\x01" + json.dumps({"name": MARKER, "age": 3, "tags": ["a"], "when": "2024-01-01T00:00:00Z"}).encode(),
        b"\x02" + json.dumps({"name": MARKER, "age": 2**80}).encode(),
    ]


@target(allowed=(errors.MalformedPayloadError,), seeds=_objects, mutator=json_behind(1), share=3)
def object_payloads() -> Run:
    from datetime import datetime

    from pydantic import BaseModel

    from sqlalchemy_kravn_crypto.codecs.objects import ObjectCodec

    class Person(BaseModel):
        name: str
        age: int
        tags: list[str] = []
        when: datetime | None = None

    return ObjectCodec(Person).decode
