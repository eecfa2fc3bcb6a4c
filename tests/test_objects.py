"""Objects that pydantic knows come back equal, or are refused; no error shows what is in them."""

import dataclasses
import importlib.util
import subprocess
import sys
import typing
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Json,
    PrivateAttr,
    SecretStr,
    computed_field,
    field_serializer,
    field_validator,
    model_serializer,
)
from pydantic_core import PydanticCustomError
from sqlalchemy import JSON
from typing_extensions import TypedDict

from sqlalchemy_kravn_crypto.codecs import objects
from sqlalchemy_kravn_crypto.codecs.documents import JSONCodec
from sqlalchemy_kravn_crypto.codecs.objects import ObjectCodec
from sqlalchemy_kravn_crypto.exceptions import (
    ColumnError,
    MalformedPayloadError,
    MissingExtraError,
    UnstorableValueError,
)
from tests.leaks import chained, leaked

MARKER = "S3CR3T" + "-marker"


class Address(BaseModel):
    street: str
    number: int | None = None


class Profile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    born: datetime | None = None
    balance: Decimal = Decimal(0)
    id: UUID = UUID(int=0)
    tags: set[str] = set()
    address: Address | None = None
    big: int = 0
    login: str = Field(default="", alias="logIn")

    @computed_field
    def shouted(self) -> str:
        return self.name.upper()


class Subprofile(Profile):
    pass


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0


@dataclasses.dataclass(eq=False)
class Incomparable:
    x: int


class Options(TypedDict, total=False):
    theme: str
    size: int


class Masked(BaseModel):
    secret: SecretStr


class Excluding(BaseModel):
    kept: str = ""
    left_out: str = Field(default="", exclude=True)


class Lossy(BaseModel):
    amount: float

    @field_serializer("amount")
    def rounded(self, amount: float) -> float:
        return round(amount)


class Private(BaseModel):
    _cache: str = PrivateAttr("")


class Loose(BaseModel):
    anything: Any = None


class Sourced(BaseModel):
    parsed: Json[dict[str, int]]


class Hostile(BaseModel):
    """Raises in what it is asked to, and says with what."""

    name: str = ""
    fails_in: str = ""

    @field_serializer("name")
    def fail_to_dump(self, name: str) -> str:
        if self.fails_in == "dump":
            raise LookupError(MARKER)
        return name

    @field_validator("fails_in")
    @classmethod
    def fail_to_load(cls, fails_in: str) -> str:
        if fails_in == "load":
            raise LookupError(MARKER)
        if fails_in == "value":
            raise ValueError(MARKER)
        if fails_in == "custom":
            raise PydanticCustomError("S3CR3T-marker", MARKER)
        if fails_in == "named":
            raise PydanticCustomError("kind_of_" + MARKER[:6], MARKER)
        return fails_in

    def __eq__(self, other: object) -> bool:
        if self.fails_in == "compare":
            raise LookupError(MARKER)
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]


FULL = Profile(
    name="Ada",
    born=datetime(1815, 12, 10, 1, 2, 3, 4, UTC),
    balance=Decimal("1.50"),
    id=UUID(int=7),
    tags={"a", "b"},
    address=Address(street="grün", number=3),
    big=2**80,
    logIn="ada",
)
STORED: list[tuple[Any, Any]] = [
    (Profile, Profile(name="x")),
    (Profile, FULL),
    (Point, Point(1.5, 2)),
    (Options, {"theme": "dark"}),
    (Options, {}),
    (list[Profile], [FULL, Profile(name="x")]),
    (list[Profile], []),
    (dict[str, Address], {"home": Address(street="x")}),
    (dict[int, Point], {1: Point(1)}),
    (tuple[int, str], (1, "x")),
    (Address | Point, Point(1)),
    (Annotated[int, Field(gt=3)], 5),
    (Literal["a", "b"], "a"),
    (frozenset[int], frozenset({1, 2})),
    (Sourced, Sourced(parsed='{"a":1}')),  # type: ignore[arg-type]
    (Masked, Masked(secret=SecretStr("**********"))),
    (Loose, Loose(anything={"a": [1, None]})),
    (Loose, Loose()),
]


def refused(codec: ObjectCodec, value: Any, match: str) -> None:
    with pytest.raises(UnstorableValueError, match=match) as caught:
        codec.encode(value)
    harmless(caught.value)


def unread(codec: ObjectCodec, payload: bytes, match: str) -> None:
    with pytest.raises(MalformedPayloadError, match=match) as caught:
        codec.decode(payload)
    harmless(caught.value)


def harmless(error: BaseException) -> None:
    assert leaked(error, MARKER) == []
    assert list(chained(error)) == [error]


# --- What comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("python_type", "value"), STORED, ids=[repr(value)[:40] for _, value in STORED])
def test_object_comes_back_equal_and_is_json(python_type: Any, value: Any) -> None:
    codec = ObjectCodec(python_type)
    payload = codec.encode(value)
    loaded = codec.decode(payload)
    assert type(loaded) is type(value)
    assert loaded == value
    assert JSONCodec().encode(JSONCodec().decode(payload)) == payload
    assert codec.same(value, loaded)


def filled(*elements: Any) -> set[Any]:
    """Return a set that was filled in this order, which a literal is not."""
    made = set[Any]()
    for element in elements:
        made.add(element)
    return made


# The three collide in a small table, so who came first is gone through first.
EQUAL = filled(1, 9, 17), filled(17, 9, 1)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(*EQUAL, True), (EQUAL[0], {17, 9, 2}, False), ({1, 0}, {0, True}, False), ({1, 0}, {0, 1.0}, False)],
)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_the_order_of_a_set_is_no_change(one: set[Any], other: set[Any], *, same: bool, nested: bool) -> None:
    assert [*EQUAL[0]] != [*EQUAL[1]]
    codec = ObjectCodec(list[dict[str, set[Any]]] if nested else set[Any])
    assert codec.same(*([[{"tags": tags}] for tags in (one, other)] if nested else (one, other))) is same


class Reshaped(BaseModel):
    """Has sets, and beside them what is not of the same shape in JSON as in Python."""

    tags: set[Any]
    fields: dict[str, set[Any]] = {}
    others: Any = None

    @field_serializer("others", when_used="json")
    def as_json(self, others: Any) -> Any:
        return others["json"]


@pytest.mark.parametrize(
    "others",
    [
        {"python": 1, "json": [[1]]},
        {"python": 1, "json": [[1], [2], [3]]},
        {"python": 1, "json": {"a": 1}},
        {"python": 1, "json": {"a": 1, "b": 2, "c": 3}},
        {"python": 1, "json": "ab"},
        {"python": 1, "json": 5},
    ],
    ids=["shorter list", "longer list", "shorter dict", "longer dict", "text", "number"],
)
@pytest.mark.parametrize("plain", [dict, list, tuple, set], ids=lambda plain: plain.__name__)
def test_what_has_another_shape_in_json_is_compared_as_that(plain: Any, others: dict[str, Any]) -> None:
    class Shown(plain):  # type: ignore[misc]
        """A container of Python, of two elements, that knows what it is in JSON."""

        def __getitem__(self, key: Any) -> Any:
            return others[key] if key == "json" else super().__getitem__(key)

    codec = ObjectCodec(Reshaped)
    value = Shown({"x": 1, "y": 2})
    one, other = (Reshaped(tags=tags, others=value) for tags in EQUAL)
    assert codec._dumped(one) != codec._dumped(other)
    assert codec.same(one, other)
    assert not codec.same(one, Reshaped(tags={1, 9, 18}, others=value))


@pytest.mark.parametrize("count", [2, 300])
def test_the_order_of_a_set_is_no_change_however_many_there_are(count: int) -> None:
    """Python has one object for each small integer, but not for this length."""
    lists, dicts = ObjectCodec(list[set[Any]]), ObjectCodec(dict[int, set[Any]])
    one, other = ([tags] * count for tags in EQUAL)
    assert lists.same(one, other)
    assert dicts.same(dict(enumerate(one)), dict(enumerate(other)))
    assert not lists.same(one, [*other[1:], {17, 9, 2}])
    assert not dicts.same(dict(enumerate(one)), dict(enumerate([*other[1:], {17, 9, 2}])))


def test_the_order_of_a_list_is_a_change() -> None:
    assert not ObjectCodec(list[int]).same([1, 2], [2, 1])
    assert not ObjectCodec(tuple[int, int]).same((1, 2), (2, 1))


def test_kind_is_that_of_the_json() -> None:
    codec = ObjectCodec(Address)
    assert codec.encode(Address(street="x", number=1)) == b'\x01{"street":"x","number":1}'
    assert codec.encode(Address(street="x", number=2**64)) == b'\x02{"street":"x","number":18446744073709551616}'


def test_aliases_are_stored_and_computed_fields_are_not() -> None:
    document = JSONCodec().decode(ObjectCodec(Profile).encode(Profile(name="x", logIn="y")))
    assert document["logIn"] == "y"
    assert "login" not in document
    assert "shouted" not in document


@given(st.builds(Point, st.floats(allow_nan=False, allow_infinity=False), st.floats(-1, 1)))
def test_any_point_comes_back(point: Point) -> None:
    codec = ObjectCodec(Point)
    assert codec.decode(codec.encode(point)) == point


def test_type_may_refer_to_one_that_is_declared_later() -> None:
    class Node(BaseModel):
        child: "Leaf | None" = None

    codec = ObjectCodec(list[Node])

    class Leaf(BaseModel):
        x: int

    Node.model_rebuild(_types_namespace={"Leaf": Leaf})
    value = [Node(child=Leaf(x=1))]
    assert codec.decode(codec.encode(value)) == value


def test_field_that_was_added_has_its_default_and_one_that_was_dropped_is_ignored() -> None:
    payload = b'\x01{"street":"x","dropped":1}'
    assert ObjectCodec(Address).decode(payload) == Address(street="x")


# --- What is refused -------------------------------------------------------------------------------------------------

LOSSY: list[Any] = [
    pytest.param(Masked, Masked(secret=SecretStr(MARKER)), "what loads is not equal", id="secret"),
    pytest.param(Excluding, Excluding(left_out=MARKER), "what loads is not equal", id="excluded field"),
    pytest.param(Lossy, Lossy(amount=1.5), "what loads is not equal", id="lossy serializer"),
    pytest.param(Profile, Subprofile(name=MARKER), "what loads is not equal|cannot be dumped", id="subclass"),
    pytest.param(Incomparable, Incomparable(1), "what loads is not equal", id="no equality"),
    pytest.param(Loose, Loose(anything=(1, MARKER)), "what loads is not equal", id="tuple for anything"),
    pytest.param(Loose, Loose(anything={1: MARKER}), "what loads is not equal", id="integer key"),
    pytest.param(Loose, Loose(anything=Point(1)), "what loads is not equal", id="dataclass for anything"),
    pytest.param(
        Loose, Loose(anything=object()), "pydantic raises PydanticSerializationError", id="object for anything"
    ),
    pytest.param(bytes, MARKER.encode() + b"\xff", "pydantic raises UnicodeDecodeError", id="bytes"),
    pytest.param(Profile, {"name": MARKER}, "pydantic raises PydanticSerializationError", id="dict for a model"),
    pytest.param(Point, {"x": 1.0}, "pydantic raises PydanticSerializationError", id="dict for a dataclass"),
    pytest.param(list[Address], [{"street": MARKER}], "PydanticSerializationError", id="dict in a list of models"),
    pytest.param(Profile, MARKER, "pydantic raises PydanticSerializationError", id="text for a model"),
    pytest.param(Profile, JSON.NULL, "what loads is not equal", id="JSON null"),
    pytest.param(Options, {"theme": 5}, "pydantic raises PydanticSerializationError", id="wrong type in a dict"),
    pytest.param(
        Profile,
        Profile.model_construct(name=5),
        "pydantic raises PydanticSerializationError",
        id="model that was not validated",
    ),
    pytest.param(
        Annotated[int, Field(gt=3)], 2, "1 error, the first at \\$ \\(greater_than\\)", id="against its schema"
    ),
    pytest.param(
        Hostile, Hostile.model_construct(name=MARKER, fails_in="dump"), "PydanticSerializationError", id="dump"
    ),
    pytest.param(Hostile, Hostile.model_construct(fails_in="load"), "a validator raises LookupError", id="load"),
    pytest.param(
        Hostile, Hostile.model_construct(fails_in="compare"), "comparing them raises LookupError", id="compare"
    ),
]


@pytest.mark.parametrize(("python_type", "value", "reason"), LOSSY)
def test_refuses_what_would_not_come_back_equal(python_type: Any, value: Any, reason: str) -> None:
    codec = ObjectCodec(python_type)
    refused(codec, value, reason)
    refused(codec, value, f"of type {type(value).__name__}, ")
    assert codec.same(value, value)


def test_refuses_private_attributes() -> None:
    value = Private()
    assert ObjectCodec(Private).encode(value) == b"\x01{}"
    value._cache = MARKER
    refused(ObjectCodec(Private), value, "what loads is not equal")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_refuses_floats_that_json_does_not_have(number: float) -> None:
    refused(ObjectCodec(Point), Point(1, number), "would not come back equal|NaN or infinite")
    refused(ObjectCodec(Loose), Loose(anything=[number]), "would not come back equal|NaN or infinite")


def test_refuses_what_is_too_deep() -> None:
    value: Any = MARKER
    for _ in range(300):
        value = [value]
    refused(ObjectCodec(Loose), Loose(anything=value), "value")


# --- What is read ----------------------------------------------------------------------------------------------------

PERSON = b'"balance":"0","id":"00000000-0000-0000-0000-000000000000","tags":[],"big":0,"logIn":""'


@pytest.mark.parametrize(
    ("python_type", "payload", "reason"),
    [
        (Profile, b"\x01{}", r"does not fit Profile: 1 error, the first at \$\.name \(missing\)"),
        (Profile, b'\x01{"name":5,"big":"S3CR3T-marker"}', r"2 errors, the first at \$\.name \(string_type\)"),
        (Profile, b'\x01{"name":"x","address":{"street":[]}}', r"at \$\.address\.street \(string_type\)"),
        (Profile, b'\x01{"name":"x","S3CR3T-marker":1}', r'1 error, the first at \$\["…"\] \(extra_forbidden\)'),
        (
            list[Profile],
            b'\x01[{"name":"x"},{"name":"S3CR3T-marker","big":1.5}]',
            r"at \$\[1\]\.big \(int_from_float\)",
        ),
        (dict[str, int], b'\x01{"S3CR3T-marker":"S3CR3T-marker"}', r'at \$\["…"\] \(int_parsing\)'),
        (Profile, b"\x01null", r"at \$ \(model_type\)"),
        (Profile, b'\x01"S3CR3T-marker"', r"at \$ \(model_type\)"),
        (Hostile, b'\x01{"fails_in":"load"}', "a validator raises LookupError"),
        (Hostile, b'\x01{"fails_in":"value"}', r"at \$\.fails_in \(value_error\)"),
        (Hostile, b'\x01{"fails_in":"custom"}', r"at \$\.fails_in \(of a validator's own\)"),
        (Hostile, b'\x01{"fails_in":"named"}', r"at \$\.fails_in \(of a validator's own\)"),
        (Point, b'\x01{"x":NaN}', "is not JSON"),
        (Point, b'\x01{"x":1', "is not JSON"),
        (Point, b"\x01", "is not JSON"),
        (Point, b"", "is not JSON"),
        (Point, b'\x03{"x":1}', "kind 0x03"),
        (Point, b'\x81{"x":1}', "kind 0x81"),
        (Point, b'{"x":1}', "kind 0x7b"),
    ],
    ids=range(19),
)
def test_refuses_a_payload_that_does_not_fit(python_type: Any, payload: bytes, reason: str) -> None:
    unread(ObjectCodec(python_type), payload, reason)


@pytest.mark.parametrize("kind", [kind for kind in range(256) if kind not in {1, 2}])
def test_refuses_every_other_kind(kind: int) -> None:
    unread(ObjectCodec(Any), bytes([kind]) + b"null", f"kind {kind:#04x}")


# --- The same --------------------------------------------------------------------------------------------------------


def test_same_is_equal_and_stored_alike() -> None:
    options, loose = ObjectCodec(Options), ObjectCodec(Loose)
    assert options.same({"theme": "x", "size": 1}, {"size": 1, "theme": "x"})
    assert not options.same({"theme": "x"}, {"theme": "y"})
    assert not loose.same(Loose(anything=1), Loose(anything=True))
    assert not loose.same(Loose(anything=1), Loose(anything=1.0))
    assert loose.same(Loose(anything={"a": 1, "b": 2}), Loose(anything={"b": 2, "a": 1}))


def test_what_cannot_be_stored_is_only_like_itself() -> None:
    codec, one = ObjectCodec(Hostile), Hostile.model_construct(fails_in="dump")
    assert codec.same(one, one)
    assert not codec.same(one, Hostile.model_construct(fails_in="dump"))
    assert not codec.same(Hostile.model_construct(fails_in="compare"), one)
    assert not codec.same(*(Hostile.model_construct(fails_in="compare") for _ in range(2)))
    assert not codec.same(MARKER, one)


class Null(BaseModel):
    """Is null in JSON, unless it raises, and is equal to all others."""

    fails: bool

    @model_serializer
    def dump(self) -> None:
        if self.fails:
            raise LookupError(MARKER)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Null)

    __hash__ = None  # type: ignore[assignment]


def test_what_cannot_be_dumped_is_not_like_null() -> None:
    codec = ObjectCodec(Null)
    assert codec.same(Null(fails=False), Null(fails=False))
    assert not codec.same(Null(fails=True), Null(fails=False))
    assert not codec.same(Null(fails=False), Null(fails=True))


# --- Types that pydantic does not know -------------------------------------------------------------------------------


class Unknown:
    pass


class Broken:
    @classmethod
    def __get_pydantic_core_schema__(cls, *arguments: Any) -> Any:
        raise LookupError(MARKER)


@pytest.mark.parametrize(
    ("python_type", "error_name"),
    [
        (Unknown, "PydanticSchemaGenerationError"),
        (list[Unknown], "PydanticSchemaGenerationError"),
        (Broken, "LookupError"),
    ],
    ids=["class", "list", "broken"],
)
def test_refuses_a_type_without_a_schema_when_it_is_used(python_type: Any, error_name: str) -> None:
    codec = ObjectCodec(python_type)
    for use in (lambda: codec.encode(1), lambda: codec.decode(b"\x011"), lambda: codec.same([1], [1])):
        with pytest.raises(ColumnError, match=error_name) as caught:
            use()
        harmless(caught.value)


class OldOptions(typing.TypedDict):
    size: int


def test_typed_dict_of_the_standard_library_is_taken_or_the_other_one_named() -> None:
    codec = ObjectCodec(OldOptions)
    if sys.version_info >= (3, 12):
        assert codec.encode({"size": 1}) == b'\x01{"size":1}'
        return
    with pytest.raises(ColumnError, match=r"typing_extensions before Python 3\.12") as caught:
        codec.encode({"size": 1})
    harmless(caught.value)


def test_says_what_to_install_without_pydantic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(MissingExtraError, match="pip install pydantic") as caught:
        ObjectCodec(int).encode(1)
    harmless(caught.value)


def test_it_can_be_imported_without_pydantic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    spec = importlib.util.find_spec(objects.__name__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_pydantic_is_not_imported_before_it_is_used() -> None:
    program = (
        "import sys; from sqlalchemy_kravn_crypto.codecs.objects import ObjectCodec; codec = ObjectCodec(list[int]); "
        "assert 'pydantic' not in sys.modules; codec.encode([1]); assert 'pydantic' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
