"""The two constructions that every other derivation is put together from: ``LP`` and ``Expand``."""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

KEY_SIZE: Final = 32
"""Length in bytes of a data key and of everything that is derived from one."""

KEY_ID_SIZE: Final = 8
"""Length in bytes of a key id."""

_DOMAIN: Final = b"sqlalchemy-kravn-crypto/v1"


def length_prefixed(*parts: bytes) -> bytes:
    """Join byte strings so that no two different lists of them give the same result.

    Each is preceded by its length in bytes as 4 big-endian bytes.
    """
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def split_length_prefixed(joined: bytes) -> list[bytes]:
    """Take apart what :func:`length_prefixed` joined.

    :raises ValueError: if it is nothing that this returns.
    """
    parts = []
    start = 0
    while start < len(joined):
        end = start + 4 + int.from_bytes(joined[start : start + 4], "big")
        # Fewer than 4 bytes of a length end before the first byte of their part, too.
        if end > len(joined):
            msg = "these are no length-prefixed parts"
            raise ValueError(msg)
        parts.append(joined[start + 4 : end])
        start = end
    return parts


def expand(key: bytes, purpose: str) -> bytes:
    """Derive 32 bytes for one purpose from a uniformly random key.

    HKDF-Expand (RFC 5869, section 2.3) with SHA-256. The key is the pseudorandom key itself: the extract step is for
    keys that are not uniform, and every key here is.
    """
    info = length_prefixed(_DOMAIN, purpose.encode())
    return HKDFExpand(algorithm=SHA256(), length=KEY_SIZE, info=info).derive(key)


def key_id_of(key: bytes) -> bytes:
    """Return the 8 bytes that name a key without revealing it."""
    return expand(key, "key-id")[:KEY_ID_SIZE]
