"""The contract of a codec: a Python value to payload bytes and back, the same value or an error.

A payload starts with one byte that names its kind, so that a value of one kind never loads as another:

.. code-block:: text

    01  JSON
    02  JSON that needs Python's own decoder: integers beyond 64 bits
    03  text in UTF-8
    04  bytes
    10  integer, 16 bytes two's complement, big-endian
    11  integer in decimal text
    12  Decimal
    13  Boolean, 1 byte
    14  date
    15  time of day
    16  date and time without an offset
    17  date and time with an offset from UTC
    18  UUID, 16 bytes
    19  interval
    1A  name of an enum's member
    1B  binary floating point, 8 bytes
    80  added to a kind: padded
"""

from __future__ import annotations

from enum import IntEnum
from re import compile as compile_pattern
from typing import Any, Final, Protocol

from ..exceptions import MalformedPayloadError, UnstorableValueError

PADDED: Final = 0x80
"""Bit of the first byte that tells that the content is padded."""

MAX_INTEGER_BITS: Final = 14_000
"""Bound on an integer, in bits. Python reads at most 4,300 decimal digits from text unless told otherwise, which is
14,284 bits."""

PLAIN_KEY: Final = compile_pattern(r"[A-Za-z_][A-Za-z0-9_]{0,63}").fullmatch
"""Tells whether a key is shaped like a name. Another may be data itself, so it does not go into an error."""


class Kind(IntEnum):
    """The first byte of a payload."""

    JSON = 0x01
    BIG_JSON = 0x02
    TEXT = 0x03
    BYTES = 0x04
    INTEGER = 0x10
    BIG_INTEGER = 0x11
    DECIMAL = 0x12
    BOOLEAN = 0x13
    DATE = 0x14
    TIME = 0x15
    NAIVE_DATETIME = 0x16
    AWARE_DATETIME = 0x17
    UUID = 0x18
    INTERVAL = 0x19
    ENUM = 0x1A
    FLOAT = 0x1B


class Codec(Protocol):
    """Turns values into payloads and back. Values are never ``None``: that is SQL NULL, and not encrypted."""

    def encode(self, value: Any) -> bytes:
        """Return the payload of a value.

        :raises UnstorableValueError: if it would not come back equal.
        """

    def decode(self, payload: bytes) -> Any:
        """Return the value of a payload.

        :raises MalformedPayloadError: if this codec did not write it.
        """

    def same(self, one: Any, other: Any) -> bool:
        """Tell whether two values are stored alike, so that no UPDATE is needed to get from one to the other."""


def unstorable(path: str, value: Any, reason: str) -> UnstorableValueError:
    """Return the error for a part of a value that would not come back equal. It names the type, never the value."""
    name = type(value).__name__
    place = "" if path == "$" else f" at {path}"
    return UnstorableValueError(f"The value{place}, of type {name}, {reason}.", path=path, type_name=name)


def unreadable(payload: bytes, kinds: tuple[int, ...], holds: str) -> MalformedPayloadError:
    """Return the error for a payload that a codec cannot read.

    :param kinds: the first bytes that the codec reads.
    :param holds: what its columns hold, in the singular: ``a date``.
    """
    if not payload or payload[0] in kinds:
        return MalformedPayloadError(f"The value decrypts, but is not {holds}. Another program wrote it.")
    return MalformedPayloadError(
        f"The value decrypts, but is of kind {payload[0]:#04x}, which a column that holds {holds} does not read. It "
        "was written through a column of another type with the same name."
    )
