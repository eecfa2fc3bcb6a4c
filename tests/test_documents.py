"""JSON values come back equal and of the same type, or are refused with the place, the type and never the value."""

import enum
import json
import math
import sys
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import JSON
from sqlalchemy.ext.mutable import MutableDict, MutableList

from sqlalchemy_kravn_crypto.codecs import documents
from sqlalchemy_kravn_crypto.codecs.base import MAX_INTEGER_BITS
from sqlalchemy_kravn_crypto.codecs.documents import MAX_DEPTH, JSONCodec
from sqlalchemy_kravn_crypto.exceptions import MalformedPayloadError, UnstorableValueError
from tests.leaks import leaked

MARKER = "S3CR3T" + "-marker"
CODEC = JSONCodec()


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Real(float):
    pass


class Colour(enum.Enum):
    RED = MARKER


class Level(enum.IntEnum):
    HIGH = 3


class Word(enum.StrEnum):
    ONE = "one"


class TextWord(str, enum.Enum):  # noqa: UP042 - the one whose str() is not its text
    ONE = "one"


Point = namedtuple("Point", ["x", "y"])  # noqa: PYI024 - the untyped kind is what people have


@dataclass
class Record:
    secret: str


class Opaque:
    def __repr__(self) -> str:
        return MARKER

    __str__ = __repr__


class Unequal(dict[str, Any]):
    """Stands for a class of the user's whose comparison fails, and says with what."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        raise RuntimeError(MARKER)


class Lying(dict[str, Any]):
    """Stands for one that is not what it iterates over."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return False


def types_of(value: Any) -> Any:
    """Return a value with each part replaced by its type; for Python, 1 and True and 1.0 are equal."""
    if type(value) is dict:
        return {key: types_of(item) for key, item in value.items()}
    if type(value) is list:
        return [types_of(item) for item in value]
    return type(value)


def nested(depth: int, container: Callable[[Any], Any] = lambda inner: [inner]) -> Any:
    value: Any = container(MARKER)
    for _ in range(depth - 1):
        value = container(value)
    return value


def round_trip(value: Any) -> Any:
    return CODEC.decode(CODEC.encode(value))


# --- What comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        "",
        0,
        False,
        True,
        1,
        1.0,
        {"a": 1, "b": 1.0, "c": True, "d": None, "e": "1"},
        [[], {}, [{}], {"a": []}],
        [None],
        {"": {"": ""}},
        {"z": 1, "a": 2, "m": 3},
        "nul \0 inside",
        "\x1f\x7f\x80\x85\u2028\u2029\ufeff\ufffe\uffff\U0010ffff",
        'quotes " and \\ and / and \r\n\t',
        "grün 鍵 🔑 e\u0301 é",
        {"grün 鍵 \0": "key"},
        "enc:v3:-QKl",
        "null",
        2**53,
        2**53 + 1,
        -(2**53) - 1,
        2**63 - 1,
        2**63,
        2**64 - 1,
        -(2**63),
        0.1,
        1e22,
        1e23,
        5e-324,
        1.7976931348623157e308,
        2.2250738585072014e-308,
        123456789.123456789,
        "x" * 1_000_000,
        list(range(100_000)),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_value_comes_back_with_its_types_as_plain_json(value: Any) -> None:
    payload = CODEC.encode(value)
    decoded = CODEC.decode(payload)
    assert decoded == value
    assert types_of(decoded) == types_of(value)
    assert payload[:1] == b"\x01"
    assert json.loads(payload[1:]) == value


def test_what_is_plainly_json_is_not_decoded_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """That costs a third more; it is for what orjson might write as something else."""

    def compare(value: Any) -> bytes:
        raise AssertionError(value)

    monkeypatch.setattr(documents, "_encode_checked", compare)
    # CB is the first byte of a float in MessagePack, and the others have it elsewhere.
    for value in ({"a": ["x", 1, True, None, {}]}, [0.5, -1e300], 0xCB, "\u02c0", [0xCB7F]):
        assert json.loads(CODEC.encode(value)[1:]) == value


def test_payload_beyond_64_bits_is_compact_json_in_utf_8() -> None:
    assert CODEC.encode({"n": 2**64, "grün": [1]}) == '\x02{"n":18446744073709551616,"grün":[1]}'.encode()


def test_number_that_the_constant_for_null_is_equal_to_comes_back() -> None:
    """``JSON.NULL`` is an integer to Python."""
    number = int(JSON.NULL)
    assert number == JSON.NULL
    assert CODEC.encode(Number(number)) == f"\x01{number}".encode()
    assert round_trip([number, 2**80]) == [number, 2**80]


def test_order_of_keys_comes_back() -> None:
    assert list(round_trip({"z": 1, "a": 2, "m": 3})) == ["z", "a", "m"]


def test_sign_of_zero_comes_back() -> None:
    assert math.copysign(1, round_trip(-0.0)) == -1
    assert math.copysign(1, round_trip(0.0)) == 1


@pytest.mark.parametrize(
    "number",
    [2**64, -(2**63) - 1, 10**30, -(10**30), 2**MAX_INTEGER_BITS - 1, -(2**MAX_INTEGER_BITS) + 1],
    ids=lambda number: f"{number.bit_length()} bits",
)
def test_integer_beyond_64_bits_comes_back_as_kind_02(number: int) -> None:
    for value in (number, [number], {"n": [1, 2.5, "grün", None, {"n": number}]}):
        payload = CODEC.encode(value)
        assert payload[:1] == b"\x02"
        decoded = CODEC.decode(payload)
        assert decoded == value
        assert types_of(decoded) == types_of(value)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda parts: st.lists(parts) | st.dictionaries(st.text(), parts),
)


def integers_in(value: Any) -> list[int]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in integers_in(item)]
    if isinstance(value, list):
        return [number for item in value for number in integers_in(item)]
    return [value] if type(value) is int else []


@given(JSON_VALUES)
def test_any_json_value_comes_back_with_its_types(value: Any) -> None:
    payload = CODEC.encode(value)
    decoded = CODEC.decode(payload)
    assert decoded == value
    assert types_of(decoded) == types_of(value)
    is_big = any(not -(2**63) <= number < 2**64 for number in integers_in(value))
    assert payload[0] == (0x02 if is_big else 0x01)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_comes_back_bit_by_bit(number: float) -> None:
    assert round_trip([number])[0].hex() == number.hex()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(OrderedDict(a=1), {"a": 1}, id="OrderedDict"),
        pytest.param(defaultdict(list, a=[1]), {"a": [1]}, id="defaultdict"),
        pytest.param(MutableDict(a={"b": 1}), {"a": {"b": 1}}, id="MutableDict"),
        pytest.param(MutableList([1, [2]]), [1, [2]], id="MutableList"),
        pytest.param(Text("text"), "text", id="str subclass"),
        pytest.param(Number(3), 3, id="int subclass"),
        pytest.param([Number(2**70)], [2**70], id="int subclass beyond 64 bits"),
        pytest.param(Real(0.5), 0.5, id="float subclass"),
        pytest.param(Word.ONE, "one", id="StrEnum"),
        pytest.param({"word": TextWord.ONE}, {"word": "one"}, id="str and Enum"),
        pytest.param(Level.HIGH, 3, id="IntEnum"),
    ],
)
def test_subclass_of_a_json_type_comes_back_equal_as_that_type(value: Any, expected: Any) -> None:
    payload = CODEC.encode(value)
    decoded = CODEC.decode(payload)
    assert decoded == value == expected
    assert types_of(decoded) == types_of(expected)
    assert payload[0] == (0x02 if 2**70 in integers_in(expected) else 0x01)


def test_json_null_at_the_top_is_null_and_comes_back_as_none() -> None:
    assert CODEC.encode(JSON.NULL) == b"\x01null"
    assert CODEC.decode(b"\x01null") is None


# --- What is refused -------------------------------------------------------------------------------------------------

UNSTORABLE = [
    pytest.param(float("nan"), "float", id="NaN"),
    pytest.param(float("inf"), "float", id="infinity"),
    pytest.param(float("-inf"), "float", id="minus infinity"),
    pytest.param(Real("nan"), "Real", id="NaN of a float subclass"),
    pytest.param(2**MAX_INTEGER_BITS, "int", id="integer of 14,001 bits"),
    pytest.param(-(2**MAX_INTEGER_BITS), "int", id="negative integer of 14,001 bits"),
    pytest.param(10**5000, "int", id="integer of 5,001 digits"),
    pytest.param((1, MARKER), "tuple", id="tuple"),
    pytest.param((), "tuple", id="empty tuple"),
    pytest.param(Point(1, MARKER), "Point", id="namedtuple"),
    pytest.param({MARKER}, "set", id="set"),
    pytest.param(frozenset({MARKER}), "frozenset", id="frozenset"),
    pytest.param(MARKER.encode(), "bytes", id="bytes"),
    pytest.param(bytearray(MARKER.encode()), "bytearray", id="bytearray"),
    pytest.param(memoryview(MARKER.encode()), "memoryview", id="memoryview"),
    pytest.param(datetime(2024, 1, 2, tzinfo=UTC), "datetime", id="datetime"),
    pytest.param(date(2024, 1, 2), "date", id="date"),
    pytest.param(time(1, 2), "time", id="time"),
    pytest.param(timedelta(1), "timedelta", id="timedelta"),
    pytest.param(UUID(int=1), "UUID", id="UUID"),
    pytest.param(Decimal("1.5"), "Decimal", id="Decimal"),
    pytest.param(Fraction(1, 3), "Fraction", id="Fraction"),
    pytest.param(1 + 2j, "complex", id="complex"),
    pytest.param(Colour.RED, "Colour", id="Enum"),
    pytest.param(Record(MARKER), "Record", id="dataclass"),
    pytest.param(Record, "type", id="class"),
    pytest.param(Opaque(), "Opaque", id="object"),
    pytest.param(PurePosixPath(MARKER), "PurePosixPath", id="path"),
    pytest.param(range(3), "range", id="range"),
    pytest.param(iter([MARKER]), "list_iterator", id="iterator"),
    pytest.param(MARKER + "\ud800", "str", id="lone surrogate"),
    pytest.param("\ud83d\ude00" + MARKER, "str", id="two halves of a surrogate pair"),
    pytest.param(Text(MARKER + "\udfff"), "Text", id="lone surrogate of a str subclass"),
]

PLACES = [
    pytest.param(lambda value: value, "$", id="top"),
    pytest.param(lambda value: [0, "", [None, value]], "$[2][1]", id="list"),
    pytest.param(lambda value: {"a": [{}, {"b_1": value}], "z": 1}, "$.a[1].b_1", id="dict"),
    pytest.param(lambda value: {MARKER: value}, '$["…"]', id="key that may be data"),
    pytest.param(lambda value: {"x" * 65: [value]}, '$["…"][0]', id="long key"),
    pytest.param(lambda value: {"": value}, '$["…"]', id="empty key"),
    # With an integer beyond 64 bits it goes another way.
    pytest.param(lambda value: [2**80, {"big": 2**80, "it": value}], "$[1].it", id="beside a big integer"),
]


@pytest.mark.parametrize(("place", "path"), PLACES)
@pytest.mark.parametrize(("value", "type_name"), UNSTORABLE)
def test_refuses_with_path_and_type_and_never_the_value(
    value: Any, type_name: str, place: Callable[[Any], Any], path: str
) -> None:
    with pytest.raises(UnstorableValueError) as caught:
        CODEC.encode(place(value))
    assert (caught.value.path, caught.value.type_name) == (path, type_name)
    assert (f" at {path}," in str(caught.value)) is (path != "$")
    assert type_name in str(caught.value)
    assert leaked(caught.value, MARKER) == []
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize(("place", "path"), PLACES[1:])
def test_refuses_json_null_inside_of_a_value(place: Callable[[Any], Any], path: str) -> None:
    with pytest.raises(UnstorableValueError, match="use None inside of a value") as caught:
        CODEC.encode(place(JSON.NULL))
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("key", "type_name"),
    [
        (1, "int"),
        (1.5, "float"),
        (True, "bool"),
        (None, "NoneType"),
        (("a",), "tuple"),
        (b"a", "bytes"),
        (UUID(int=1), "UUID"),
        (Word.ONE, "Word"),
        (Text("a"), "Text"),
        (MARKER + "\ud800", "str"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize(("place", "path"), PLACES)
def test_refuses_a_key_that_is_not_text(key: Any, type_name: str, place: Callable[[Any], Any], path: str) -> None:
    with pytest.raises(UnstorableValueError) as caught:
        CODEC.encode(place({"fine": 1, key: MARKER}))
    assert (caught.value.path, caught.value.type_name) == (path, type_name)
    assert leaked(caught.value, MARKER) == []


def test_refuses_keys_that_json_would_make_equal() -> None:
    for value in ({1: "a", "1": "b"}, {"1": "b", 1: "a"}, {None: 1, "null": 2}, {True: 1, "true": 2}):
        with pytest.raises(UnstorableValueError, match="JSON's keys are text"):
            CODEC.encode(value)


def test_names_the_first_of_several_parts() -> None:
    with pytest.raises(UnstorableValueError) as caught:
        CODEC.encode({"a": [1, {"deep": (1,)}], "b": b"", 3: 4})
    assert caught.value.path == "$.a[1].deep"


@pytest.mark.parametrize("value", [Unequal(a=MARKER), Lying(a=MARKER)], ids=["raises", "says no"])
@pytest.mark.parametrize("place", [lambda value: value, lambda value: [2**80, {"a": value}]], ids=["top", "inside"])
def test_refuses_what_cannot_be_compared(value: Any, place: Callable[[Any], Any]) -> None:
    with pytest.raises(UnstorableValueError, match="would not come back equal") as caught:
        CODEC.encode(place(value))
    assert leaked(caught.value, MARKER) == []
    assert caught.value.__context__ is None


class Changing(dict[str, Any]):
    """Stands for a value that another thread changes: infinite as soon as it has been looked at."""

    __hash__ = None

    def __init__(self) -> None:
        super().__init__(n=2**80)
        self.looks = 0

    def items(self) -> Any:
        self.looks += 1
        return {"n": 2**80 if self.looks == 1 else math.inf}.items()

    def __eq__(self, other: object) -> bool:
        return other in ({"n": 2**80}, {"n": math.inf})


def test_refuses_what_becomes_infinite_while_it_is_written() -> None:
    """It would be a payload that nobody can read."""
    value = Changing()
    with pytest.raises(UnstorableValueError, match="would not come back equal"):
        CODEC.encode(value)
    assert value.looks == 2


# --- The same --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("big", [{}, {"big": 2**80}], ids=["64 bits", "big integer"])
def test_values_are_the_same_if_they_are_equal_with_their_types_whatever_the_order_of_keys(big: dict[str, int]) -> None:
    value = {"a": [1, {"x": None}], "b": 0.5, "c": "grün"} | big
    other = dict(reversed(json.loads(json.dumps(value)).items()))
    assert list(other) != list(value)
    assert CODEC.same(value, other)
    assert CODEC.same(other, value)
    for change in ({"a": [{"x": None}, 1]}, {"b": 0.25}, {"c": "grun"}, {"d": None}):
        assert not CODEC.same(value, value | change)
        assert not CODEC.same(value | change, value)


@pytest.mark.parametrize(
    ("one", "other"), [(1, True), (1, 1.0), (0, False), (0.0, -0.0), ("a", "b"), (1, "1"), ([], {})]
)
@pytest.mark.parametrize("big", [[], [2**80]], ids=["64 bits", "big integer"])
def test_values_of_other_types_or_signs_are_not_the_same(one: Any, other: Any, big: list[int]) -> None:
    for first, second in ((one, other), (other, one)):
        assert not CODEC.same(first, second)
        assert not CODEC.same([first, *big], [second, *big])
        assert CODEC.same([first, *big], [first, *big])


def test_numbers_that_are_greater_or_less_are_not_the_same() -> None:
    for one, other in ((1, 2), (2**80, 2**81), ([1], [2]), (0.5, 0.75)):
        assert not CODEC.same(one, other)
        assert not CODEC.same(other, one)


def test_subclass_is_the_same_as_what_it_is_stored_as() -> None:
    assert CODEC.same(MutableDict(a=[1]), {"a": [1]})
    assert CODEC.same(Word.ONE, "one")
    assert not CODEC.same(Level.HIGH, 4)


def test_json_null_is_the_same_as_itself_alone() -> None:
    assert CODEC.same(JSON.NULL, JSON.NULL)
    assert not CODEC.same(JSON.NULL, int(JSON.NULL))
    assert not CODEC.same(int(JSON.NULL), JSON.NULL)
    assert not CODEC.same(JSON.NULL, "null")


def test_what_cannot_be_compared_or_stored_is_a_change() -> None:
    """So it is written, and refused with an error that shows nothing."""
    for value in (Unequal(a=1), Lying(a=1), Opaque(), {1: {2}}):
        assert CODEC.same(value, value)
        assert not CODEC.same({"a": 1}, value)
        assert not CODEC.same(value, {"a": 1})
    assert not CODEC.same({1}, {1})


# --- Depth -----------------------------------------------------------------------------------------------------------

CONTAINERS = [
    pytest.param(lambda inner: [inner], id="lists"),
    pytest.param(lambda inner: {"key": inner}, id="dicts"),
    pytest.param(lambda inner: MutableDict(key=inner), id="subclasses"),
]


@pytest.mark.parametrize("container", CONTAINERS[:2])
def test_deepest_value_comes_back(container: Callable[[Any], Any]) -> None:
    assert MAX_DEPTH == 254
    value = nested(MAX_DEPTH, container)
    assert CODEC.encode(value)[:1] == b"\x01"
    assert round_trip(value) == value


@pytest.mark.parametrize("container", CONTAINERS[:2])
def test_deepest_value_with_a_big_integer_comes_back(container: Callable[[Any], Any]) -> None:
    value = {"deep": nested(MAX_DEPTH - 1, container), "n": 2**80}
    assert CODEC.encode(value)[:1] == b"\x02"
    assert round_trip(value) == value


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 300, 1_000, 100_000])
@pytest.mark.parametrize("container", CONTAINERS)
def test_refuses_what_is_deeper(depth: int, container: Callable[[Any], Any]) -> None:
    value = nested(depth, container)
    with pytest.raises(UnstorableValueError, match="nested more than 254 levels deep") as caught:
        CODEC.encode(value)
    assert leaked(caught.value, MARKER) == []
    assert caught.value.__context__ is None


def test_refuses_what_contains_itself() -> None:
    around_list: list[Any] = [1]
    around_list.append({"again": around_list})
    around_dict: dict[str, Any] = {"a": 1}
    around_dict["again"] = [around_dict]
    for value in (around_list, around_dict):
        with pytest.raises(UnstorableValueError, match="contains itself"):
            CODEC.encode(value)


def at_depth(frames: int, function: Callable[[], Any]) -> Any:
    return function() if frames == 0 else at_depth(frames - 1, function)


@pytest.mark.parametrize("left", [40, 60, 100, 200, 400])
@pytest.mark.parametrize("depth", [100, MAX_DEPTH, MAX_DEPTH + 1, 100_000])
@pytest.mark.parametrize("bottom", [MARKER, 2**80, (MARKER,)], ids=["text", "big integer", "tuple"])
def test_stores_or_refuses_with_little_stack_left(left: int, depth: int, bottom: Any) -> None:
    """Whatever else was raised, SQLAlchemy would print the row with it."""
    value = bottom
    for _ in range(depth):
        value = {"key": value}
    frame, used = sys._getframe(), 0
    while frame.f_back is not None:
        frame, used = frame.f_back, used + 1

    def encode() -> bytes | UnstorableValueError:
        try:
            return CODEC.encode(value)
        except UnstorableValueError as error:
            return error

    result = at_depth(sys.getrecursionlimit() - used - left, encode)
    if isinstance(result, bytes):
        assert depth <= MAX_DEPTH
        assert CODEC.decode(result) == value
    else:
        assert leaked(result, MARKER) == []


# --- What is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x01", id="nothing after kind 01"),
        pytest.param(b"\x02", id="nothing after kind 02"),
        pytest.param(b'\x01{"S3CR3T-marker":', id="broken JSON"),
        pytest.param(b'\x02{"S3CR3T-marker":', id="broken JSON of kind 02"),
        pytest.param(b'\x01{"S3CR3T-marker":1} x', id="more after the JSON"),
        pytest.param(b'\x02{"S3CR3T-marker":1} x', id="more after the JSON of kind 02"),
        pytest.param(b'\x01"S3CR3T-marker\\ud800"', id="half a surrogate pair"),
        pytest.param(b'\x02["S3CR3T-marker\\udfff"]', id="half a surrogate pair of kind 02"),
        pytest.param(b"\x01NaN", id="NaN"),
        pytest.param(b"\x02NaN", id="NaN of kind 02"),
        pytest.param(b"\x02[Infinity]", id="infinity of kind 02"),
        pytest.param(b'\x02{"S3CR3T-marker":-Infinity}', id="minus infinity of kind 02"),
        pytest.param(b'\x01"S3CR3T-marker\xff"', id="no UTF-8"),
        pytest.param(b'\x02"S3CR3T-marker\xff"', id="no UTF-8 of kind 02"),
        pytest.param(b"\x02" + '"S3CR3T-marker"'.encode("utf-16"), id="UTF-16 of kind 02"),
        pytest.param(b"\x02" + '"S3CR3T-marker"'.encode("utf-32"), id="UTF-32 of kind 02"),
        pytest.param(b"\x02\xef\xbb\xbf1", id="byte order mark of kind 02"),
        pytest.param(b"\x02" + b"1" * 5_000, id="integer of 5,000 digits"),
        pytest.param(b"\x01" + b"[" * 100_000 + b"]" * 100_000, id="too deep"),
        pytest.param(b"\x02" + b"[" * 100_000 + b"]" * 100_000, id="too deep of kind 02"),
        pytest.param(b'\x02{"a":' * 100_000, id="too deep and broken"),
        pytest.param(b"\x80null", id="padded"),
        *(pytest.param(bytes([kind]) + b"null", id=f"kind {kind:02x}") for kind in (0, *range(3, 256))),
    ],
)
def test_refuses_a_payload_that_it_did_not_write(payload: bytes) -> None:
    with pytest.raises(MalformedPayloadError) as caught:
        CODEC.decode(payload)
    assert leaked(caught.value, MARKER, payload[:20] if len(payload) > 8 else "") == []
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_error_of_another_kind_names_it() -> None:
    for payload in (b"\x03text", b"\x03\x01", b"\x03\x02"):
        with pytest.raises(
            MalformedPayloadError, match="is of kind 0x03, which a column that holds JSON does not read"
        ):
            CODEC.decode(payload)


def test_error_of_its_own_kind_names_no_other() -> None:
    for payload in (b"\x01text", b"\x02\x03", b""):
        with pytest.raises(MalformedPayloadError, match=r"but is not JSON\. Another program wrote it"):
            CODEC.decode(payload)


@given(st.binary(max_size=60), st.sampled_from([b"", b"\x01", b"\x02"]))
def test_arbitrary_payload_decodes_or_is_refused(tail: bytes, kind: bytes) -> None:
    payload = kind + tail
    try:
        value = CODEC.decode(payload)
    except MalformedPayloadError:
        return
    assert payload[0] in {0x01, 0x02}
    # Kind 01 has no integers beyond 64 bits, so that its readers may take them for floats.
    read_integer = (
        int if payload[0] == 0x02 else lambda text: int(text) if -(2**63) <= int(text) < 2**64 else float(text)
    )
    assert json.loads(payload[1:].decode(), parse_int=read_integer) == value


class _Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


class _Number(int):
    def __int__(self) -> int:
        return 7

    def __str__(self) -> str:
        return "something else"


def test_a_subclass_that_converts_itself_to_something_else_is_stored_as_what_it_is() -> None:
    codec = JSONCodec()
    assert codec.encode([_Text("a"), _Number(3)]) == b'\x01["a",3]'
