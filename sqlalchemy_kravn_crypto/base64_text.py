"""Bytes as base64 text, and back: of the one form that encoding gives.

Python's decoder takes several texts for one value: with other bits in the last character, for one.
"""

from __future__ import annotations

from base64 import b64decode, b64encode


def to_base64(value: bytes) -> str:
    """Encode bytes with padding and without line breaks, by RFC 4648, section 4."""
    return b64encode(value).decode("ascii")


def from_base64(text: object) -> bytes | None:
    """Decode what :func:`to_base64` makes, or return ``None`` for anything else."""
    if not isinstance(text, str):
        return None
    try:
        value = b64decode(text, validate=True)
    except ValueError:
        return None
    return value if to_base64(value) == text else None
