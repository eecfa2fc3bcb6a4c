"""Single values come back equal and of the same type, or are refused with their type and never the value."""

import enum
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Context, Decimal, localcontext
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, from_text
from sqlalchemy_kravn_crypto.codecs.base import MAX_INTEGER_BITS, Codec, Kind
from sqlalchemy_kravn_crypto.codecs.documents import JSONCodec
from sqlalchemy_kravn_crypto.codecs.scalars import (
    BooleanCodec,
    BytesCodec,
    DateCodec,
    DateTimeCodec,
    DecimalCodec,
    EnumCodec,
    FloatCodec,
    IntegerCodec,
    IntervalCodec,
    TextCodec,
    TimeCodec,
    UuidCodec,
)
from sqlalchemy_kravn_crypto.exceptions import ColumnError, MalformedPayloadError, UnstorableValueError
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from tests import make_frames, reference
from tests.leaks import leaked

ROOT = Path(__file__).parents[1]
MARKER = "S3CR3T" + "-marker"
FROZEN: dict[str, list[dict[str, str]]] = json.loads(
    (ROOT / "tests" / "vectors" / "kinds.json").read_text("utf-8"),
)


class Colour(enum.Enum):
    RED = "r"
    GREEN = MARKER
    CRIMSON = RED


class Level(enum.IntEnum):
    HIGH = 3


class Word(enum.StrEnum):
    ONE = "one"


TEXT, BYTES, INTEGER, DECIMAL, FLOAT, BOOLEAN = (
    TextCodec(),
    BytesCodec(),
    IntegerCodec(),
    DecimalCodec(),
    FloatCodec(),
    BooleanCodec(),
)
DATE, TIME, NAIVE, AWARE = DateCodec(), TimeCodec(), DateTimeCodec(aware=False), DateTimeCodec(aware=True)
UUID_, UUID_TEXT, INTERVAL = UuidCodec(), UuidCodec(as_text=True), IntervalCodec()
COLOUR = EnumCodec({"RED": Colour.RED, "GREEN": Colour.GREEN, "CRIMSON": Colour.CRIMSON})
WORDS = EnumCodec({text: text for text in ("red", "grün", "", "n" * 47, "n" * 48)})

CODECS: dict[str, Codec] = {
    "text": TEXT,
    "bytes": BYTES,
    "integer": INTEGER,
    "decimal": DECIMAL,
    "boolean": BOOLEAN,
    "date": DATE,
    "time": TIME,
    "naive datetime": NAIVE,
    "aware datetime": AWARE,
    "uuid": UUID_,
    "interval": INTERVAL,
    "enum": WORDS,
    "float": FLOAT,
}
"""By the types of the vectors."""

ALL_CODECS: dict[str, Codec] = {**CODECS, "uuid text": UUID_TEXT, "enum of a class": COLOUR, "JSON": JSONCodec()}

FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "text": str,
    "bytes": bytes.fromhex,
    "integer": int,
    "decimal": Decimal,
    "boolean": "true".__eq__,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "naive datetime": datetime.fromisoformat,
    "aware datetime": datetime.fromisoformat,
    "uuid": UUID,
    "interval": lambda text: timedelta(microseconds=int(text)),
    "enum": str,
    "float": float.fromhex,
}


def exactly(value: Any) -> Any:
    """Return what tells values apart that are equal for Python."""
    kind = type(value)
    if kind is Decimal:
        return kind, value.as_tuple()
    if kind is float:
        return kind, value.hex()
    if kind is datetime:
        return kind, value.replace(tzinfo=None), value.utcoffset()
    return kind, value


def refused(codec: Codec, value: Any, match: str = "The value, of type") -> UnstorableValueError:
    with pytest.raises(UnstorableValueError, match=match) as caught:
        codec.encode(value)
    error = caught.value
    assert error.path == "$"
    assert error.type_name == type(value).__name__
    assert error.type_name in str(error)
    assert leaked(error, MARKER) == []
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


def unread(codec: Codec, payload: bytes) -> MalformedPayloadError:
    with pytest.raises(MalformedPayloadError) as caught:
        codec.decode(payload)
    error = caught.value
    assert leaked(error, MARKER, payload if len(payload) > 8 else "") == []
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


def entries(found: list[dict[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", found, ids=[entry["comment"] for entry in found])


# --- Frozen values, and the page -------------------------------------------------------------------------------------


@entries(FROZEN["frames"])
def test_reads_and_writes_the_frozen_value(entry: dict[str, str]) -> None:
    codec, name = CODECS[entry["type"]], ColumnName(entry["name"])
    keyring = Keyring(DataKey(bytes.fromhex(entry["key"])))
    payload = keyring.decrypt(from_text(entry["text"]), name)
    assert payload == keyring.decrypt(bytes.fromhex(entry["frame"]), name) == bytes.fromhex(entry["payload"])
    value = FROM_TEXT[entry["type"]](entry["value"])
    assert exactly(codec.decode(payload)) == exactly(value)
    assert codec.encode(value) == payload


@entries(FROZEN["must_fail"])
def test_refuses_the_frozen_bad_value(entry: dict[str, str]) -> None:
    keyring = Keyring(DataKey(bytes.fromhex(entry["key"])))
    payload = keyring.decrypt(bytes.fromhex(entry["stored"]), ColumnName(entry["name"]))
    assert type(unread(CODECS[entry["type"]], payload)) is getattr(errors, entry["error"])


def test_frozen_file_is_what_its_script_writes() -> None:
    assert make_frames.good_kinds() == FROZEN["frames"]
    assert make_frames.bad_kinds() == FROZEN["must_fail"]


def test_every_type_is_frozen() -> None:
    assert {entry["type"] for entry in FROZEN["frames"]} == CODECS.keys()
    assert {entry["type"] for entry in FROZEN["must_fail"]} == CODECS.keys()


def rows(cells: str) -> list[tuple[str, ...]]:
    return re.findall(cells, (ROOT / "docs" / "format.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


REFERENCES: dict[str, tuple[Any, Any, Codec]] = {
    "text": (str, reference.text_payload, TEXT),
    "bytes": (bytes.fromhex, reference.bytes_payload, BYTES),
    "integer": (int, reference.integer_payload, INTEGER),
    "decimal": (Decimal, reference.decimal_payload, DECIMAL),
    "Boolean": ("true".__eq__, reference.boolean_payload, BOOLEAN),
    "date": (date.fromisoformat, reference.date_payload, DATE),
    "time": (time.fromisoformat, reference.time_payload, TIME),
    "datetime": (datetime.fromisoformat, reference.datetime_payload, NAIVE),
    "UUID": (UUID, reference.uuid_payload, UUID_),
    "interval": (FROM_TEXT["interval"], reference.interval_payload, INTERVAL),
    "float": (float, reference.float_payload, FLOAT),
    "enum": (str, reference.enum_payload, WORDS),
}


def test_the_examples_of_the_page_can_be_recomputed() -> None:
    examples = rows(r"^\| (\w+) \| `([^`|]+)` \| `([0-9a-f]+)` \|$")
    assert {name for name, _, _ in examples} == REFERENCES.keys()
    for name, text, payload in examples:
        from_text_of, encode, codec = REFERENCES[name]
        value = from_text_of(text)
        codec = AWARE if name == "datetime" and value.tzinfo else codec
        assert encode(value).hex() == payload
        assert codec.encode(value).hex() == payload
        assert exactly(codec.decode(bytes.fromhex(payload))) == exactly(value)


def test_the_page_has_every_kind_and_its_length() -> None:
    found = rows(r"^\| `([0-9A-F]{2})` \| [^|]+ \| [^|]+ \| ([^|]+) \|$")
    assert {int(kind, 16) & 0x7F for kind, _ in found} == set(Kind)
    fixed = {int(kind, 16): int(size) for kind, size in found if size.isdigit()}
    assert len(fixed) == 9
    for entry in FROZEN["frames"]:
        payload = bytes.fromhex(entry["payload"])
        if payload[0] in fixed:
            assert len(payload) == 1 + fixed[payload[0]]
        elif payload[0] & 0x80:
            assert len(payload) % 48 == 1


# --- What comes back -------------------------------------------------------------------------------------------------

OFFSETS = st.integers(-86_399, 86_399).map(lambda seconds: timezone(timedelta(seconds=seconds)))
ZONES = st.sampled_from(["Europe/Berlin", "Africa/Monrovia", "Asia/Kathmandu", "America/St_Johns", "UTC"]).map(ZoneInfo)
DECIMALS = st.builds(
    lambda sign, digits, exponent: Decimal((sign, tuple(digits), exponent)),
    st.integers(0, 1),
    st.lists(st.integers(0, 9), min_size=1, max_size=120),
    st.integers(-400, 400),
)
VALUES: list[tuple[str, st.SearchStrategy[Any], Any]] = [
    ("text", st.text(), reference.text_payload),
    ("bytes", st.binary(), reference.bytes_payload),
    ("integer", st.integers() | st.integers(-(2**200), 2**200), reference.integer_payload),
    ("decimal", DECIMALS | st.decimals(allow_nan=False, allow_infinity=False), reference.decimal_payload),
    ("boolean", st.booleans(), reference.boolean_payload),
    ("date", st.dates(), reference.date_payload),
    ("time", st.times(), reference.time_payload),
    ("naive datetime", st.datetimes(), reference.datetime_payload),
    ("aware datetime", st.datetimes(timezones=OFFSETS | ZONES | st.just(UTC)), reference.datetime_payload),
    ("uuid", st.uuids(), reference.uuid_payload),
    ("interval", st.timedeltas(), reference.interval_payload),
    ("float", st.floats(allow_nan=False, allow_infinity=False), reference.float_payload),
]


@pytest.mark.parametrize(("name", "values", "expected"), VALUES, ids=[name for name, _, _ in VALUES])
def test_any_value_comes_back_exactly_and_is_written_as_the_page_says(
    name: str, values: st.SearchStrategy[Any], expected: Any
) -> None:
    @given(values, values)
    def check(value: Any, other: Any) -> None:
        codec = CODECS[name]
        payload = codec.encode(value)
        assert payload == expected(value)
        loaded = codec.decode(payload)
        assert exactly(loaded) == exactly(value)
        assert codec.encode(loaded) == payload
        assert codec.same(value, loaded)
        assert codec.same(value, other) == (exactly(value) == exactly(other))
        if payload[0] not in {Kind.TEXT, Kind.BYTES}:
            unread(codec, payload + b"\0")
        if payload[0] not in {Kind.TEXT, Kind.BYTES, Kind.BIG_INTEGER}:
            unread(codec, payload[:-1])

    check()


@given(st.uuids())
def test_any_uuid_as_text_comes_back(value: UUID) -> None:
    assert UUID_TEXT.encode(str(value)) == UUID_.encode(value)
    assert exactly(UUID_TEXT.decode(UUID_.encode(value))) == (str, str(value))


@given(st.sampled_from(sorted(ALL_CODECS)), st.sampled_from([*range(0x20), *range(0x80, 0xA0)]), st.binary(max_size=60))
def test_arbitrary_payload_is_read_as_what_would_write_it_or_refused(name: str, kind: int, content: bytes) -> None:
    codec, payload = ALL_CODECS[name], bytes([kind]) + content
    try:
        value = codec.decode(payload)
    except MalformedPayloadError as error:
        assert error.__context__ is None  # noqa: PT017 - it is raised or not
        return
    if name not in {"JSON", "enum of a class"}:
        assert codec.encode(value) == payload


@pytest.mark.parametrize("name", ALL_CODECS)
def test_refuses_the_payloads_of_every_other_type(name: str) -> None:
    own = {"uuid text": "uuid", "enum of a class": "enum"}.get(name, name)
    for entry in FROZEN["frames"]:
        if entry["type"] != own:
            unread(ALL_CODECS[name], bytes.fromhex(entry["payload"]))


@pytest.mark.parametrize("name", ALL_CODECS)
def test_refuses_the_values_of_every_other_type(name: str) -> None:
    """But those that load as equal: integers in columns of decimals and floats, and text that is all of these."""
    taken = {"decimal": {"integer"}, "uuid text": {"text", "enum"}, "enum": {"text"}, "text": {"enum"}}
    taken["JSON"] = {"text", "enum", "integer", "float", "boolean"}
    for entry in FROZEN["frames"]:
        type_ = entry["type"]
        if type_ == name or type_ in taken.get(name, set()):
            continue
        value = FROM_TEXT[type_](entry["value"])
        if name == "float" and type_ == "integer" and abs(value) < 2**1000 and float(value) == value:
            assert exactly(FLOAT.decode(FLOAT.encode(value))) == exactly(float(value))
            continue
        error = refused(ALL_CODECS[name], value)
        assert len(entry["value"]) < 5 or entry["value"] not in str(error)


@pytest.mark.parametrize("name", ALL_CODECS)
@pytest.mark.parametrize(
    "value",
    [object(), [], (), {}, {MARKER}, 1j, MARKER.encode, type, NotImplemented, ..., Colour],
    ids=lambda value: type(value).__name__,
)
def test_refuses_what_is_of_no_column_type(name: str, value: Any) -> None:
    if name == "JSON" and value in ([], {}):
        return
    refused(ALL_CODECS[name], value)
    assert ALL_CODECS[name].same(value, value)
    assert not ALL_CODECS[name].same(value, MARKER)


@pytest.mark.parametrize("name", ALL_CODECS)
def test_none_is_no_value(name: str) -> None:
    if name != "JSON":
        refused(ALL_CODECS[name], None)


class Hostile:
    """Stands for a class of the user's that raises wherever it can, and says with what."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError(MARKER)

    __hash__ = None  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        raise RuntimeError(MARKER)

    def __str__(self) -> str:
        raise RuntimeError(MARKER)

    __repr__ = __str__


def hostile(base: type[Any], *arguments: Any) -> Any:
    body = {"__eq__": Hostile.__eq__, "__hash__": None, "__str__": Hostile.__str__, "__repr__": Hostile.__repr__}
    return type("HostileValue", (base,), body)(*arguments)


HOSTILE = [
    pytest.param(TEXT, hostile(str, MARKER), id="str"),
    pytest.param(BYTES, hostile(bytes, MARKER.encode()), id="bytes"),
    pytest.param(INTEGER, hostile(int, 5), id="int"),
    pytest.param(DECIMAL, hostile(Decimal, "1.5"), id="Decimal"),
    pytest.param(FLOAT, hostile(float, 1.5), id="float"),
    pytest.param(DATE, hostile(date, 2024, 1, 2), id="date"),
    pytest.param(TIME, hostile(time, 1, 2), id="time"),
    pytest.param(UUID_TEXT, hostile(str, "00112233-4455-6677-8899-aabbccddeeff"), id="text of a UUID"),
    pytest.param(INTERVAL, hostile(timedelta, 1), id="timedelta"),
]


@pytest.mark.parametrize(("codec", "value"), HOSTILE)
def test_refuses_a_subclass_that_cannot_be_compared(codec: Codec, value: Any) -> None:
    refused(codec, value, "would not come back equal")
    assert not codec.same(value, hostile(str, "x"))


@pytest.mark.parametrize("name", ALL_CODECS)
def test_refuses_what_raises_wherever_it_is_touched(name: str) -> None:
    value = Hostile()
    refused(ALL_CODECS[name], value)
    if name != "JSON":
        assert not ALL_CODECS[name].same(value, 1)


# --- Text and bytes --------------------------------------------------------------------------------------------------


class Shouting(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "something else"

    def encode(self, *arguments: Any) -> bytes:
        return b"something else"


class TextWord(str, enum.Enum):  # noqa: UP042 - the one whose str() is not its text
    ONE = "one"


@pytest.mark.parametrize("value", [Word.ONE, TextWord.ONE, Shouting("one")], ids=lambda value: type(value).__name__)
def test_subclass_of_str_is_its_text(value: str) -> None:
    assert TEXT.encode(value) == b"\x03one"
    assert exactly(TEXT.decode(b"\x03one")) == (str, "one")
    assert TEXT.same(value, "one")


@pytest.mark.parametrize("value", [MARKER + "\ud800", "\ud83d\ude00" + MARKER, Shouting(MARKER + "\udfff")])
def test_refuses_a_lone_surrogate(value: str) -> None:
    refused(TEXT, value, "lone surrogate")


@pytest.mark.parametrize("convert", [bytes, bytearray, memoryview, type("Subclass", (bytes,), {})])
def test_bytes_in_every_form_load_as_bytes(convert: Any) -> None:
    payload = BYTES.encode(convert(b"\0\xff"))
    assert type(payload) is bytes
    assert payload == b"\x04\0\xff"
    assert exactly(BYTES.decode(payload)) == (bytes, b"\0\xff")
    assert BYTES.same(convert(b"\0\xff"), b"\0\xff")


def test_parts_of_a_memoryview_come_back_and_those_of_numbers_do_not() -> None:
    assert BYTES.encode(memoryview(b"abcdef")[::2]) == b"\x04ace"
    refused(BYTES, memoryview(struct.pack("2i", 1, 2)).cast("i"), "would not come back equal")
    released = memoryview(b"abc")
    released.release()
    refused(BYTES, released)


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [2**127, -(2**127) - 1, 2**MAX_INTEGER_BITS - 1, -(2**MAX_INTEGER_BITS) + 1], ids=int.bit_length
)
def test_integer_that_does_not_fit_16_bytes_is_text(number: int) -> None:
    payload = INTEGER.encode(number)
    assert payload == b"\x11" + str(number).encode()
    assert INTEGER.decode(payload) == number


@pytest.mark.parametrize("number", [2**MAX_INTEGER_BITS, -(2**MAX_INTEGER_BITS), 10**5000], ids=int.bit_length)
def test_refuses_an_integer_that_is_too_big(number: int) -> None:
    refused(INTEGER, number, "14,000 bits")


@pytest.mark.parametrize("codec", [INTEGER, DECIMAL, FLOAT])
def test_a_boolean_is_no_number_and_a_number_no_boolean(codec: Codec) -> None:
    refused(codec, True)  # noqa: FBT003 - the value
    refused(codec, False)  # noqa: FBT003 - the value
    for value in (0, 1, 1.0, "true", Decimal(1)):
        refused(BOOLEAN, value)


def test_subclass_of_int_is_its_number() -> None:
    class Odd(int):
        def __int__(self) -> int:
            return 7

    for value in (Level.HIGH, Odd(3)):
        assert exactly(INTEGER.decode(INTEGER.encode(value))) == (int, 3)
        assert exactly(DECIMAL.decode(DECIMAL.encode(value))) == exactly(Decimal(3))
        assert exactly(FLOAT.decode(FLOAT.encode(value))) == exactly(3.0)


def test_refuses_rather_than_raising_where_python_reads_fewer_digits() -> None:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        refused(INTEGER, 2**MAX_INTEGER_BITS - 1)
    finally:
        sys.set_int_max_str_digits(limit)


@pytest.mark.parametrize("value", [Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), Decimal("-Infinity")])
def test_refuses_a_decimal_that_is_no_number(value: Decimal) -> None:
    refused(DECIMAL, value, "NaN or infinite")
    assert DECIMAL.same(value, value)


def test_refuses_a_float_for_a_decimal_and_a_decimal_for_a_float() -> None:
    refused(DECIMAL, 0.5, r"Decimal\(str\(value\)\)")
    refused(FLOAT, Decimal("0.5"), "is not a float")


@pytest.mark.parametrize(("one", "other"), [("1.0", "1.00"), ("-0", "0"), ("0E+3", "0"), ("10", "1E+1")])
def test_decimals_that_are_equal_but_not_alike_are_not_the_same(one: str, other: str) -> None:
    assert not DECIMAL.same(Decimal(one), Decimal(other))
    assert exactly(DECIMAL.decode(DECIMAL.encode(Decimal(one)))) == exactly(Decimal(one))


def test_decimals_do_not_depend_on_the_context() -> None:
    value, payload = Decimal("-1.23456789E-50"), DECIMAL.encode(Decimal("-1.23456789E-50"))
    with localcontext(Context(prec=1, capitals=0, traps=[])):
        assert DECIMAL.encode(value) == payload
        assert exactly(DECIMAL.decode(payload)) == exactly(value)
        unread(DECIMAL, b"\x92" + reference.padded(b"x"))
        unread(DECIMAL, b"\x92" + reference.padded(b"NaN"))
        assert DECIMAL.encode(12345) == reference.decimal_payload(Decimal(12345))


def test_extreme_decimals_come_back() -> None:
    for text in ("1E+999999999999999999", "-9.99E-999999999999999999", "1" * 30_000, "0." + "0" * 1000 + "1"):
        value = Decimal(text)
        assert exactly(DECIMAL.decode(DECIMAL.encode(value))) == exactly(value)


@pytest.mark.parametrize(("size", "blocks"), [(1, 1), (46, 1), (47, 1), (48, 2), (95, 2), (96, 3)])
def test_decimals_are_padded(size: int, blocks: int) -> None:
    assert len(DECIMAL.encode(Decimal("1" * size))) == 1 + 48 * blocks


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, type("Real", (float,), {})("nan")])
def test_refuses_a_float_that_is_no_number(value: float) -> None:
    refused(FLOAT, value, "NaN or infinite")
    assert FLOAT.same(value, value)


@pytest.mark.parametrize("number", [2**53 + 1, 10**400, -(10**400)])
def test_refuses_an_integer_that_no_float_is_equal_to(number: int) -> None:
    refused(FLOAT, number, "would not come back equal")


def test_sign_of_zero_is_kept_and_told_apart() -> None:
    assert math.copysign(1, FLOAT.decode(FLOAT.encode(-0.0))) == -1
    assert not FLOAT.same(0.0, -0.0)
    assert FLOAT.same(1, 1.0)


# --- Dates and times -------------------------------------------------------------------------------------------------


def test_refuses_what_would_lose_a_part() -> None:
    refused(DATE, datetime(2024, 1, 2, tzinfo=UTC), r"\.date\(\)")
    refused(NAIVE, datetime(2024, 1, 2, tzinfo=UTC), r"DateTime\(timezone=True\)")
    refused(AWARE, datetime(2024, 1, 2), r"DateTime\(timezone=False\)")  # noqa: DTZ001 - what is refused
    refused(NAIVE, date(2024, 1, 2), "is not a datetime")
    refused(AWARE, date(2024, 1, 2), "is not a datetime")
    refused(TIME, time(1, 2, tzinfo=UTC), "offset from UTC")
    refused(AWARE, datetime(2024, 1, 2, tzinfo=timezone(timedelta(microseconds=1))), "fraction of a second")


class Zone(tzinfo):
    """Stands for a time zone of the user's."""

    def __init__(self, offset: timedelta | Exception | None) -> None:
        self._offset = offset

    def utcoffset(self, when: datetime | None) -> timedelta | None:
        if isinstance(self._offset, Exception):
            raise self._offset
        return self._offset

    def dst(self, when: datetime | None) -> timedelta | None:
        return None

    def tzname(self, when: datetime | None) -> str:
        return MARKER


def test_a_time_zone_of_the_users_own_is_its_offset() -> None:
    value = datetime(2024, 1, 2, tzinfo=Zone(timedelta(hours=-3)))
    loaded = AWARE.decode(AWARE.encode(value))
    assert loaded == value
    assert loaded.tzinfo == timezone(timedelta(hours=-3))
    refused(AWARE, datetime(2024, 1, 2, tzinfo=Zone(None)), "no offset")
    refused(NAIVE, datetime(2024, 1, 2, tzinfo=Zone(None)), "offset")
    refused(AWARE, datetime(2024, 1, 2, tzinfo=Zone(RuntimeError(MARKER))))


def test_loads_utc_as_utc() -> None:
    for zone in (UTC, ZoneInfo("UTC"), ZoneInfo("Europe/London")):
        assert AWARE.decode(AWARE.encode(datetime(2024, 1, 2, tzinfo=zone))).tzinfo is UTC


@pytest.mark.parametrize("fold", [0, 1])
def test_hour_that_the_clock_shows_twice_keeps_its_instant(fold: int) -> None:
    value = datetime(2024, 10, 27, 2, 30, fold=fold, tzinfo=ZoneInfo("Europe/Berlin"))
    loaded = AWARE.decode(AWARE.encode(value))
    assert loaded.utcoffset() == timedelta(hours=2 - fold)
    assert loaded.astimezone(UTC) == value.astimezone(UTC)
    assert loaded.fold == 0


def test_fold_is_not_kept_where_it_means_nothing() -> None:
    assert NAIVE.decode(NAIVE.encode(datetime(2024, 1, 2, fold=1))).fold == 0  # noqa: DTZ001 - naive
    assert TIME.decode(TIME.encode(time(1, fold=1))).fold == 0


def test_offsets_of_the_nineteenth_century_have_seconds() -> None:
    value = datetime(1890, 1, 1, tzinfo=ZoneInfo("Europe/Berlin"))
    assert AWARE.encode(value)[-9:] == b"+00:53:28"
    assert AWARE.decode(AWARE.encode(value)) == value


class Stamp(datetime):
    """Stands for pandas' Timestamp, which is finer than a datetime, and prints itself in a way of its own."""

    nanosecond = 0

    def isoformat(self, *arguments: Any, **named: Any) -> str:
        return "something else"

    def replace(self, *arguments: Any, **named: Any) -> "Stamp":
        raise RuntimeError(MARKER)

    def __sub__(self, other: Any) -> Any:
        raise RuntimeError(MARKER)

    def __rsub__(self, other: Any) -> Any:
        plain = datetime.__sub__(self, other)
        return plain if not self.nanosecond else [plain, self.nanosecond]


@pytest.mark.parametrize(("codec", "zone"), [(NAIVE, None), (AWARE, UTC), (AWARE, ZoneInfo("Europe/Berlin"))])
def test_subclass_of_datetime_is_taken_if_it_is_no_finer(codec: Codec, zone: tzinfo | None) -> None:
    value = Stamp(2024, 10, 27, 2, 30, 0, 5, tzinfo=zone)
    loaded = codec.decode(codec.encode(value))
    assert type(loaded) is datetime
    assert loaded.replace(tzinfo=None) == datetime(2024, 10, 27, 2, 30, 0, 5)  # noqa: DTZ001 - naive
    value.nanosecond = 7
    refused(codec, value, "would not come back equal")


@pytest.mark.parametrize("difference", [-1, 1])
@pytest.mark.parametrize(("codec", "zone"), [(NAIVE, None), (AWARE, UTC)])
def test_refuses_a_datetime_that_is_earlier_or_later_than_what_it_prints(
    codec: Codec, zone: tzinfo | None, difference: int
) -> None:
    class Shifted(datetime):
        def __rsub__(self, other: Any) -> Any:
            return timedelta(microseconds=difference)

    refused(codec, Shifted(2024, 1, 2, tzinfo=zone), "would not come back equal")


def test_error_of_a_datetime_says_whether_the_column_holds_offsets() -> None:
    assert "is not a datetime with an offset from UTC" in str(refused(AWARE, 5))
    assert "is not a datetime without an offset from UTC" in str(refused(NAIVE, 5))


def test_subclasses_of_the_others_are_taken() -> None:
    for codec, base, arguments in (
        (DATE, date, (2024, 1, 2)),
        (TIME, time, (1, 2)),
        (INTERVAL, timedelta, (1, 2, 3)),
        (UUID_, UUID, ("00112233-4455-6677-8899-aabbccddeeff",)),
        (DECIMAL, Decimal, ("1.50",)),
        (FLOAT, float, (1.5,)),
    ):
        value = type("Subclass", (base,), {})(*arguments)
        loaded = codec.decode(codec.encode(value))
        assert type(loaded) is base
        assert loaded == value


# --- UUIDs and enums -------------------------------------------------------------------------------------------------


def test_refuses_every_other_spelling_of_a_uuid() -> None:
    text = "00112233-4455-6677-8899-aabbccddeeff"
    for other in (text.upper(), text.replace("-", ""), f"{{{text}}}", f"urn:uuid:{text}", f" {text}", UUID(text)):
        refused(UUID_TEXT, other)
    refused(UUID_TEXT, MARKER, "is no UUID")
    refused(UUID_, text, "is not a UUID")


def test_members_of_an_enum_are_their_names() -> None:
    assert COLOUR.encode(Colour.RED) == reference.enum_payload("RED")
    assert COLOUR.decode(reference.enum_payload("RED")) is Colour.RED
    assert COLOUR.decode(COLOUR.encode(Colour.GREEN)) is Colour.GREEN
    assert COLOUR.same(Colour.RED, Colour.CRIMSON)
    assert not COLOUR.same(Colour.RED, Colour.GREEN)


def test_an_alias_is_read_and_never_written() -> None:
    assert COLOUR.decode(reference.enum_payload("CRIMSON")) is Colour.RED
    assert COLOUR.encode(Colour.CRIMSON) == reference.enum_payload("RED")


def test_refuses_what_is_no_member_of_a_class() -> None:
    other = enum.Enum("Colour", {"RED": "r", "GREEN": MARKER})  # type: ignore[misc]
    for value in ("RED", "r", MARKER, other.GREEN, Word.ONE):
        refused(COLOUR, value, "is not a member of its enum")


@pytest.mark.parametrize(
    ("member", "equal"), [(Level.HIGH, 3), (Word.ONE, "one"), (TextWord.ONE, "one")], ids=["int", "StrEnum", "str"]
)
def test_refuses_what_is_only_equal_to_a_member(member: Any, equal: Any) -> None:
    codec = EnumCodec({"member": member})
    assert codec.decode(codec.encode(member)) is member
    refused(codec, equal)


def test_a_combination_of_flags_is_no_member() -> None:
    flags = enum.Flag("Flags", ["A", "B"])  # type: ignore[misc]
    codec = EnumCodec(dict(flags.__members__))
    refused(codec, flags.A | flags.B)


def test_member_that_is_equal_to_nothing_comes_back() -> None:
    class Special(float, enum.Enum):
        NOTHING = math.nan

    codec = EnumCodec(dict(Special.__members__))
    assert codec.decode(codec.encode(Special.NOTHING)) is Special.NOTHING


def test_texts_without_a_class_are_themselves() -> None:
    for value in ("red", Shouting("red"), "grün", "", "n" * 47, "n" * 48):
        assert exactly(WORDS.decode(WORDS.encode(value))) == (str, str.__str__(value))
    refused(WORDS, MARKER, "is not a member of its enum")


def test_error_of_a_member_that_is_gone_names_neither_it_nor_the_others() -> None:
    error = unread(COLOUR, reference.enum_payload(MARKER))
    assert "removed or renamed" in str(error)
    assert "RED" not in str(error)


@pytest.mark.parametrize(
    "padding",
    [b"\x80", b"\x80" + bytes(40), b"\x80" + bytes(42), b"\x80" + bytes(89), b"\x80" + bytes(40) + b"\x01", b""],
)
def test_error_of_a_member_with_wrong_padding_says_that_another_program_wrote_it(padding: bytes) -> None:
    known = reference.enum_payload("ABSENT")
    assert known[1:] == b"ABSENT\x80" + bytes(41)
    assert "removed or renamed" in str(unread(COLOUR, known))
    assert "Another program wrote it" in str(unread(COLOUR, known[:1] + b"ABSENT" + padding))


@pytest.mark.parametrize("members", [{"a\ud800": 1}, {1: 1}, {b"a": 1}], ids=["surrogate", "number", "bytes"])
def test_refuses_an_enum_whose_members_are_not_stored_as_text(members: dict[Any, Any]) -> None:
    with pytest.raises(ColumnError, match="must be Unicode text") as caught:
        EnumCodec(members)
    assert caught.value.__context__ is None


# --- Lengths ---------------------------------------------------------------------------------------------------------


def lengths(codec: Codec, values: list[Any]) -> Iterator[int]:
    return (len(codec.encode(value)) for value in values)


def test_each_short_type_has_one_length() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    for codec, values in (
        (INTEGER, [0, 1, -1, 2**100, -(2**127), 2**127 - 1]),
        (FLOAT, [0.0, 1, 1e300, -5e-324]),
        (BOOLEAN, [True, False]),
        (DATE, [date.min, date.max]),
        (TIME, [time.min, time.max, time(1)]),
        (NAIVE, [datetime.min, datetime.max, datetime(2024, 1, 2)]),  # noqa: DTZ001, DTZ901 - naive
        (AWARE, [datetime(year, 7, 1, tzinfo=zone) for year in (1, 1890, 2024) for zone in (UTC, berlin)]),
        (UUID_, [UUID(int=0), UUID(int=2**128 - 1)]),
        (INTERVAL, [timedelta.min, timedelta(), timedelta.max]),
        (DECIMAL, [Decimal(0), Decimal("-123456789.12345"), Decimal("1E-99")]),
        (COLOUR, list(Colour)),
    ):
        assert len(set(lengths(codec, values))) == 1
