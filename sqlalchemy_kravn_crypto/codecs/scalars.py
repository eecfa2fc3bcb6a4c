"""Single values to payload bytes and back: text, bytes, numbers, dates and times, UUIDs, intervals, enums.

Each codec loads exactly what was stored, or refuses it when it is written. A subclass of the type that a codec loads is
taken if what loads is equal to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from math import isfinite
from re import compile as compile_pattern
from struct import Struct
from typing import Any, Final
from uuid import UUID

from ..exceptions import ColumnError, MalformedPayloadError, UnstorableValueError
from .base import MAX_INTEGER_BITS, PADDED, Kind, unreadable, unstorable

PAD_BLOCK: Final = 48
"""Padded content is as long as the next multiple of this, in bytes."""

_LOSSY: Final = "would not come back equal"
_INTEGER_SIZE: Final = 16
_INTEGER_MAX: Final = 2**127 - 1
_INTEGER_MIN: Final = -(2**127)
_BIG_INTEGER_TEXT: Final = compile_pattern(rb"-?[1-9][0-9]*").fullmatch
_BINARY64: Final = Struct(">d")
_MICROSECOND: Final = timedelta(microseconds=1)
_NO_TIME: Final = timedelta()

_TEXT: Final = bytes([Kind.TEXT])
_BYTES: Final = bytes([Kind.BYTES])
_INTEGER: Final = bytes([Kind.INTEGER])
_BIG_INTEGER: Final = bytes([Kind.BIG_INTEGER])
_DECIMAL: Final = bytes([Kind.DECIMAL | PADDED])
_FALSE: Final = bytes([Kind.BOOLEAN, 0])
_TRUE: Final = bytes([Kind.BOOLEAN, 1])
_DATE: Final = bytes([Kind.DATE])
_TIME: Final = bytes([Kind.TIME])
_NAIVE_DATETIME: Final = bytes([Kind.NAIVE_DATETIME])
_AWARE_DATETIME: Final = bytes([Kind.AWARE_DATETIME])
_UUID: Final = bytes([Kind.UUID])
_INTERVAL: Final = bytes([Kind.INTERVAL])
_ENUM: Final = bytes([Kind.ENUM | PADDED])
_FLOAT: Final = bytes([Kind.FLOAT])


class ScalarCodec:
    """What the codecs of single values have in common. Each says how to write a payload, and how to read it."""

    _holds: str
    _kinds: tuple[int, ...]
    _type: type[Any]

    def encode(self, value: Any) -> bytes:
        """Return the payload of a value.

        :raises UnstorableValueError: if it would not come back equal.
        """
        written: bytes | str = _LOSSY
        try:
            written = self._write(value)
            # Only of exactly this type is it known that what loads is equal.
            if type(value) is not self._type and type(written) is bytes:
                written = written if self._is_equal(self._read(written), value) else _LOSSY
        except Exception:  # noqa: BLE001 - a value's own class may raise anything, and SQLAlchemy would print the row
            written = _LOSSY
        if isinstance(written, bytes):
            return written
        raise unstorable("$", value, written)

    def decode(self, payload: bytes) -> Any:
        """Return the value of a payload.

        :raises MalformedPayloadError: if this codec did not write it.
        """
        try:
            if payload[0] in self._kinds:
                return self._read(payload)
        except (IndexError, ValueError, ArithmeticError):
            pass
        raise unreadable(payload, self._kinds, self._holds)

    def same(self, one: Any, other: Any) -> bool:
        """Tell whether two values are stored alike; what cannot be stored is only like itself."""
        if one is other:
            return True
        try:
            return self.encode(one) == self.encode(other)
        except UnstorableValueError:
            return False

    def _write(self, value: Any) -> bytes | str:
        """Return the payload of a value, or why it has none. May raise anything where the value's class does."""
        raise NotImplementedError

    def _read(self, payload: bytes) -> Any:
        """Return the value of a payload of the right kind; raise ``ValueError`` or the like if it is malformed."""
        raise NotImplementedError

    def _is_equal(self, loaded: Any, value: Any) -> bool:
        """Tell whether what loads is equal to a value of another type, such as a subclass."""
        return loaded is value or bool(loaded == value)

    def _is_not(self) -> str:
        return f"is not {self._holds}"


class TextCodec(ScalarCodec):
    """Text, in UTF-8. A member of a ``StrEnum`` is its text."""

    _holds = "text"
    _kinds = (Kind.TEXT,)
    _type = str

    def _write(self, value: Any) -> bytes | str:
        if not isinstance(value, str):
            return self._is_not()
        try:
            # By the method of str itself, since a subclass may convert itself to something else.
            return _TEXT + str.__str__(value).encode()
        except UnicodeEncodeError:
            return "holds a lone surrogate, which is no Unicode text"

    def _read(self, payload: bytes) -> str:
        return payload[1:].decode()


class BytesCodec(ScalarCodec):
    """Bytes, as they are; ``bytearray`` and ``memoryview`` load as ``bytes``."""

    _holds = "bytes"
    _kinds = (Kind.BYTES,)
    _type = bytes

    def _write(self, value: Any) -> bytes | str:
        if type(value) is bytes:
            return _BYTES + value
        return (
            _BYTES + memoryview(value).tobytes()
            if isinstance(value, bytes | bytearray | memoryview)
            else self._is_not()
        )

    def _read(self, payload: bytes) -> bytes:
        return payload[1:]


class IntegerCodec(ScalarCodec):
    """Integers of at most 14,000 bits. Those within 128 bits all have one length."""

    _holds = "an integer"
    _kinds = (Kind.INTEGER, Kind.BIG_INTEGER)
    _type = int

    def _write(self, value: Any) -> bytes | str:
        if not isinstance(value, int) or isinstance(value, bool):
            return self._is_not()
        number = int.__int__(value)
        if _INTEGER_MIN <= number <= _INTEGER_MAX:
            return _INTEGER + number.to_bytes(_INTEGER_SIZE, "big", signed=True)
        if number.bit_length() > MAX_INTEGER_BITS:
            return f"has more than {MAX_INTEGER_BITS:,} bits"
        return _BIG_INTEGER + str(number).encode()

    def _read(self, payload: bytes) -> int:
        content = payload[1:]
        if payload[0] == Kind.INTEGER:
            return _read_integer(content)
        number = int(content) if _BIG_INTEGER_TEXT(content) else 0
        if _INTEGER_MIN <= number <= _INTEGER_MAX or number.bit_length() > MAX_INTEGER_BITS:
            raise ValueError
        return number


class DecimalCodec(ScalarCodec):
    """Decimals with their trailing zeros, exponent and sign of zero; integers load as decimals. Padded."""

    _holds = "a decimal"
    _kinds = (Kind.DECIMAL | PADDED,)
    _type = Decimal

    def _write(self, value: Any) -> bytes | str:
        if isinstance(value, int) and not isinstance(value, bool):
            value = Decimal(int.__int__(value))
        if not isinstance(value, Decimal):
            return "is not a decimal; convert it with Decimal(str(value))" if type(value) is float else self._is_not()
        if not Decimal.is_finite(value):
            return "is NaN or infinite, which no column holds"
        # Lower-case where the caller's decimal context says so.
        return _DECIMAL + _pad(Decimal.__str__(value).upper().encode())

    def _read(self, payload: bytes) -> Decimal:
        number = Decimal(_unpad(payload[1:]).decode("ascii"))
        if self._write(number) != payload:
            raise ValueError
        return number


class FloatCodec(ScalarCodec):
    """Floats, to the bit; integers that a float is equal to load as floats."""

    _holds = "a float"
    _kinds = (Kind.FLOAT,)
    _type = float

    def _write(self, value: Any) -> bytes | str:
        if isinstance(value, float):
            number = float.__float__(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            number = float(int.__int__(value))
        else:
            return self._is_not()
        return _FLOAT + _BINARY64.pack(number) if isfinite(number) else "is NaN or infinite, which no column holds"

    def _read(self, payload: bytes) -> float:
        number: float = _BINARY64.unpack(_sized(payload[1:], _BINARY64.size))[0]
        if not isfinite(number):
            raise ValueError
        return number


class BooleanCodec(ScalarCodec):
    """``True`` and ``False``, and nothing that is only equal to them."""

    _holds = "a Boolean"
    _kinds = (Kind.BOOLEAN,)
    _type = bool

    def _write(self, value: Any) -> bytes | str:
        if value is True:
            return _TRUE
        return _FALSE if value is False else self._is_not()

    def _read(self, payload: bytes) -> bool:
        if payload not in {_FALSE, _TRUE}:
            raise ValueError
        return payload == _TRUE


class _ISOCodec(ScalarCodec):
    """Text of ISO 8601 in one of its many forms: what is read must be what would be written."""

    def _read(self, payload: bytes) -> Any:
        value = self._type.fromisoformat(payload[1:].decode("ascii"))
        if self._write(value) != payload:
            raise ValueError
        return value


class DateCodec(_ISOCodec):
    """Dates, and no datetimes, whose time would be lost."""

    _holds = "a date"
    _kinds = (Kind.DATE,)
    _type = date

    def _write(self, value: Any) -> bytes | str:
        if isinstance(value, datetime):
            return "has a time, which a column of dates does not hold; store its .date()"
        return _DATE + date.isoformat(value).encode() if isinstance(value, date) else self._is_not()


class TimeCodec(_ISOCodec):
    """Times of day without an offset from UTC. ``fold`` is not kept."""

    _holds = "a time of day"
    _kinds = (Kind.TIME,)
    _type = time

    def _write(self, value: Any) -> bytes | str:
        if not isinstance(value, time):
            return self._is_not()
        if value.tzinfo is not None:
            return "has an offset from UTC, which a column of times does not hold; store a datetime"
        return _TIME + time.isoformat(value, "microseconds").encode()


class DateTimeCodec(_ISOCodec):
    """Datetimes, either all with or all without an offset from UTC. ``fold`` is not kept.

    :param aware: whether with an offset. The offset comes back, and so the instant; the name of the time zone does not.
    """

    _type = datetime

    def __init__(self, *, aware: bool) -> None:
        self._aware = aware
        self._kinds = (Kind.AWARE_DATETIME if aware else Kind.NAIVE_DATETIME,)
        self._holds = f"a datetime {'with' if aware else 'without'} an offset from UTC"

    def _write(self, value: Any) -> bytes | str:
        if not isinstance(value, datetime):
            return self._is_not()
        if not self._aware:
            if value.tzinfo is not None:
                return "has an offset from UTC, which the column does not hold; declare DateTime(timezone=True)"
            return _NAIVE_DATETIME + datetime.isoformat(value, timespec="microseconds").encode()
        text = datetime.isoformat(value, timespec="microseconds")
        # What follows the 26 characters of date and time: +HH:MM, then :SS if it is not zero, then a fraction.
        if len(text) == 26:
            return "has no offset from UTC; give it a tzinfo, or declare DateTime(timezone=False)"
        if len(text) > 35:
            return "has an offset from UTC with a fraction of a second"
        return _AWARE_DATETIME + (text if len(text) == 35 else f"{text}:00").encode()

    def _is_equal(self, loaded: Any, value: Any) -> bool:
        # Not by ==, for which a time that the clock shows twice is equal to none in another time zone.
        return bool(loaded - value == _NO_TIME)


class UuidCodec(ScalarCodec):
    """UUIDs.

    :param as_text: whether they are text in Python: lower-case, with hyphens.
    """

    _holds = "a UUID"
    _kinds = (Kind.UUID,)

    def __init__(self, *, as_text: bool = False) -> None:
        self._type = str if as_text else UUID

    def _write(self, value: Any) -> bytes | str:
        if not isinstance(value, self._type):
            return self._is_not()
        if self._type is UUID:
            return _UUID + bytes(value.bytes)
        text = str.__str__(value)
        try:
            uuid = UUID(text)
        except ValueError:
            return "is no UUID"
        return (
            _UUID + uuid.bytes
            if str(uuid) == text
            else "is a UUID, but not in lower case with hyphens: str(UUID(value))"
        )

    def _read(self, payload: bytes) -> UUID | str:
        uuid = UUID(bytes=payload[1:])
        return uuid if self._type is UUID else str(uuid)


class IntervalCodec(ScalarCodec):
    """Intervals, to the microsecond."""

    _holds = "an interval"
    _kinds = (Kind.INTERVAL,)
    _type = timedelta

    def _write(self, value: Any) -> bytes | str:
        if not isinstance(value, timedelta):
            return self._is_not()
        microseconds = (value.days * 86_400 + value.seconds) * 1_000_000 + value.microseconds
        return _INTERVAL + microseconds.to_bytes(_INTEGER_SIZE, "big", signed=True)

    def _read(self, payload: bytes) -> timedelta:
        return _MICROSECOND * _read_integer(payload[1:])


class EnumCodec(ScalarCodec):
    """The members of an enum, each as a text; padded, since the length of a name often tells which it is.

    :param members: the member of each text. Of several texts of one member, the first is written, and all are read.
    :raises ColumnError: if a text is none.
    """

    _holds = "a member of its enum"
    _kinds = (Kind.ENUM | PADDED,)
    _type = object

    def __init__(self, members: Mapping[str, Any]) -> None:
        if not all(map(_is_unicode, members)):
            raise ColumnError("What an Enum stores for its members must be Unicode text; see its values_callable.")
        self._members = {_ENUM + _pad(text.encode()): member for text, member in members.items()}
        self._payloads = {member: payload for payload, member in reversed(self._members.items())}
        self._types = {type(member) for member in self._payloads}

    def _write(self, value: Any) -> bytes | str:
        if isinstance(value, str) and str in self._types:
            value = str.__str__(value)
        # By type too, since a member of an IntEnum is equal to its number, and of a StrEnum to its text.
        if type(value) in self._types and value in self._payloads:
            return self._payloads[value]
        return self._is_not()

    def _read(self, payload: bytes) -> Any:
        if payload in self._members:
            return self._members[payload]
        _unpad(payload[1:]).decode()
        raise MalformedPayloadError(
            "The value decrypts, but is a member that the column's Enum does not have. It was removed or renamed after "
            "the value was written; keep it, or an alias of that name with omit_aliases=False, until no value has it."
        )


def _sized(content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise ValueError
    return content


def _read_integer(content: bytes) -> int:
    return int.from_bytes(_sized(content, _INTEGER_SIZE), "big", signed=True)


def _pad(content: bytes) -> bytes:
    """Append 80 and then zeros up to a multiple of 48 bytes (ISO/IEC 7816-4)."""
    return content + b"\x80" + bytes(-(len(content) + 1) % PAD_BLOCK)


def _unpad(padded: bytes) -> bytes:
    content = padded.rpartition(b"\x80")[0]
    if _pad(content) != padded:
        raise ValueError
    return content


def _is_unicode(text: Any) -> bool:
    try:
        str.encode(text)
    except (TypeError, UnicodeEncodeError):
        return False
    return True
