"""The calls that no scheme of this kind can do without, and nothing between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import orjson
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from sqlalchemy import Dialect
from sqlalchemy.types import LargeBinary

FLOOR: Final = "floor"


def write_and_read() -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    """Return what encodes and encrypts a document, and what decrypts and decodes it.

    For timing alone: nothing is checked, and what is encrypted is not secret, since the nonce that is drawn is not the
    one that is used.
    """
    update = Cipher(AES(os.urandom(32)), ECB()).encryptor().update  # noqa: S305 - as the scheme derives its keys
    urandom, dumps, loads = os.urandom, orjson.dumps, orjson.loads
    blocks, nonce, associated_data = os.urandom(32), os.urandom(12), os.urandom(32)

    def write(value: Any) -> bytes:
        urandom(24)
        return AESGCM(update(blocks)).encrypt(nonce, dumps(value), associated_data)

    def read(body: bytes) -> Any:
        return loads(AESGCM(update(blocks)).decrypt(nonce, body, associated_data))

    return write, read


def value_and_reencrypt(plaintext: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Return an encrypted value, and what decrypts such a value and encrypts it under another key; as above."""
    old, new = (Cipher(AES(os.urandom(32)), ECB()).encryptor().update for _ in range(2))  # noqa: S305 - as above
    urandom, blocks, nonce, associated_data = os.urandom, os.urandom(32), os.urandom(12), os.urandom(32)

    def reencrypt(body: bytes) -> bytes:
        payload = AESGCM(old(blocks)).decrypt(nonce, body, associated_data)
        urandom(24)
        return AESGCM(new(blocks)).encrypt(nonce, payload, associated_data)

    return AESGCM(old(blocks)).encrypt(nonce, plaintext, associated_data), reencrypt


class Floor(LargeBinary):
    """A column type that does nothing more than these calls."""

    cache_ok = True

    def __init__(self) -> None:
        super().__init__()
        self._write, self._read = write_and_read()

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        """Return what encrypts; SQLite's driver takes a bytearray sooner than bytes."""
        write = self._write
        return (lambda value: bytearray(write(value))) if dialect.name == "sqlite" else write

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:  # noqa: ARG002 - fixed
        """Return what decrypts."""
        return self._read
