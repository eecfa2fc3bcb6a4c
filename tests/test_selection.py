"""Every SQLAlchemy type has the codec that loads what SQLAlchemy would load, or is refused with what to use instead."""

import enum
import json
import uuid
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import types
from sqlalchemy.dialects import mssql, mysql, oracle, postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

from sqlalchemy_kravn_crypto.codecs.base import Codec
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
from sqlalchemy_kravn_crypto.codecs.selection import DecoratedCodec, codec_for
from sqlalchemy_kravn_crypto.exceptions import ColumnError, MalformedPayloadError, UnstorableValueError
from sqlalchemy_kravn_crypto.types import EncryptedJSON
from tests import reference
from tests.leaks import leaked

MARKER = "S3CR3T" + "-marker"


class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"
    CRIMSON = RED


class Empty(enum.Enum):
    pass


NAIVE = datetime(2024, 1, 2, 3, 4, 5, 6)  # noqa: DTZ001 - naive
AWARE = NAIVE.replace(tzinfo=UTC)
ONE = uuid.UUID(int=1)

SERVED: list[tuple[Any, type[Any], Any]] = [
    *((type_, TextCodec, "text") for type_ in (sa.String, sa.Text, sa.Unicode, sa.UnicodeText, sa.CHAR, sa.String(2))),
    *((type_, TextCodec, "text") for type_ in (postgresql.CITEXT, mysql.LONGTEXT, oracle.NCLOB, mssql.NTEXT)),
    *((type_, BytesCodec, b"bytes") for type_ in (sa.LargeBinary, sa.BLOB, sa.VARBINARY, sa.BINARY(2))),
    *((type_, BytesCodec, b"bytes") for type_ in (postgresql.BYTEA, mysql.LONGBLOB, oracle.RAW, mssql.IMAGE)),
    *((type_, IntegerCodec, 2**70) for type_ in (sa.Integer, sa.SmallInteger, sa.BigInteger, mysql.TINYINT)),
    *((type_, DecimalCodec, Decimal("1.234")) for type_ in (sa.Numeric, sa.DECIMAL, sa.Numeric(3, 1), mysql.NUMERIC)),
    *((type_, DecimalCodec, Decimal("1.50")) for type_ in (sa.Float(asdecimal=True), sa.Double(asdecimal=True))),
    *((type_, FloatCodec, 0.1) for type_ in (sa.Float, sa.Double, sa.REAL, sa.Float(2), sa.Numeric(asdecimal=False))),
    *((type_, FloatCodec, 0.1) for type_ in (postgresql.DOUBLE_PRECISION, oracle.BINARY_DOUBLE, mysql.FLOAT)),
    *((type_, BooleanCodec, True) for type_ in (sa.Boolean, mssql.BIT)),
    *((type_, DateCodec, date(2024, 1, 2)) for type_ in (sa.Date, sa.DATE, sqlite.DATE)),
    *((type_, TimeCodec, time(1, 2)) for type_ in (sa.Time, sa.TIME, mysql.TIME(fsp=6), postgresql.TIME)),
    *((type_, DateTimeCodec, NAIVE) for type_ in (sa.DateTime, sa.TIMESTAMP, sqlite.DATETIME, mysql.DATETIME)),
    *((type_, DateTimeCodec, AWARE) for type_ in (sa.DateTime(timezone=True), postgresql.TIMESTAMP(timezone=True))),
    *((type_, UuidCodec, ONE) for type_ in (sa.Uuid, sa.UUID, postgresql.UUID, mssql.UNIQUEIDENTIFIER)),
    *((type_, UuidCodec, str(ONE)) for type_ in (sa.Uuid(as_uuid=False), postgresql.UUID(as_uuid=False))),
    *((type_, IntervalCodec, timedelta(1)) for type_ in (sa.Interval, postgresql.INTERVAL, oracle.INTERVAL)),
    *((type_, JSONCodec, {"a": [1]}) for type_ in (sa.JSON, sa.JSON(none_as_null=True), postgresql.JSON)),
    *((type_, JSONCodec, {"a": [1]}) for type_ in (postgresql.JSONB, mysql.JSON, sqlite.JSON, mssql.JSON)),
    *((type_, EnumCodec, Colour.GREEN) for type_ in (sa.Enum(Colour), postgresql.ENUM(Colour), mysql.ENUM(Colour))),
    *((type_, EnumCodec, "red") for type_ in (sa.Enum("red", "green"), postgresql.ENUM("red", name="colour"))),
]


def named(found: list[tuple[Any, type[Any], Any]]) -> list[str]:
    return [f"{getattr(type_, '__name__', type(type_).__name__)}-{codec.__name__}" for type_, codec, _ in found]


@pytest.mark.parametrize(("type_", "expected", "value"), SERVED, ids=named(SERVED))
def test_type_has_the_codec_of_its_values(type_: Any, expected: type[Any], value: Any) -> None:
    codec = codec_for(type_)
    assert type(codec) is expected
    loaded = codec.decode(codec.encode(value))
    assert type(loaded) is type(value)
    assert loaded == value


def every_type() -> list[type[TypeEngine[Any]]]:
    modules = (types, postgresql, mysql, sqlite, oracle, mssql)
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return sorted((type_ for type_ in found if issubclass(type_, TypeEngine)), key=full_name)


def full_name(type_: type[Any]) -> str:
    return f"{type_.__module__}.{type_.__name__}"


@pytest.mark.parametrize("type_", every_type(), ids=full_name)
def test_every_type_has_a_codec_of_its_python_type_or_is_refused(type_: type[TypeEngine[Any]]) -> None:
    try:
        codec = codec_for(type_)
    except ColumnError as error:
        assert error.__context__ is None  # noqa: PT017 - it is refused or not
        return
    instance = type_()
    try:
        python_type = instance.python_type
    except NotImplementedError:
        pytest.fail("It is not known what its values are, and yet it has a codec.")
    samples: dict[type[Any], Any] = {type(value): value for _, _, value in SERVED if value is not AWARE}
    samples[object] = [1, "JSON"]
    sample = samples[python_type]
    assert codec.decode(codec.encode(sample)) == sample


# --- Enums -----------------------------------------------------------------------------------------------------------


def test_enum_is_stored_as_sqlalchemy_would() -> None:
    by_value = sa.Enum(Colour, values_callable=lambda found: [member.value for member in found])
    assert codec_for(sa.Enum(Colour)).encode(Colour.RED) == reference.enum_payload("RED")
    assert codec_for(by_value).encode(Colour.RED) == reference.enum_payload("r")
    assert codec_for(by_value).decode(reference.enum_payload("g")) is Colour.GREEN


@pytest.mark.parametrize("options", [{}, {"omit_aliases": False}, {"values_callable": lambda found: ["x", "y"]}])
def test_enum_agrees_with_sqlalchemys_own_processors(options: dict[str, Any]) -> None:
    type_: Any = sa.Enum(Colour, **options)
    codec, dialect = codec_for(type_), sqlite.dialect()
    write, read = type_.bind_processor(dialect), type_.result_processor(dialect, None)
    for member in Colour:
        assert codec.encode(member) == reference.enum_payload(write(member))
    for text in type_.enums:
        assert codec.decode(reference.enum_payload(text)) is read(text)


def test_alias_is_read_only_where_it_is_not_omitted() -> None:
    assert codec_for(sa.Enum(Colour, omit_aliases=False)).decode(reference.enum_payload("CRIMSON")) is Colour.RED
    with pytest.raises(MalformedPayloadError, match="removed or renamed"):
        codec_for(sa.Enum(Colour)).decode(reference.enum_payload("CRIMSON"))


@pytest.mark.parametrize("value", ["RED", "r", MARKER])
def test_enum_of_a_class_takes_members_only(value: str) -> None:
    with pytest.raises(UnstorableValueError) as caught:
        codec_for(sa.Enum(Colour)).encode(value)
    assert leaked(caught.value, MARKER) == []


def test_enum_of_texts_takes_its_texts_only() -> None:
    codec = codec_for(sa.Enum("red", "green"))
    with pytest.raises(UnstorableValueError):
        codec.encode(MARKER)


@pytest.mark.parametrize("type_", [sa.Enum, sa.Enum(), sa.Enum(Empty)])
def test_refuses_an_enum_without_members(type_: Any) -> None:
    with pytest.raises(ColumnError, match="needs its members"):
        codec_for(type_)


# --- What is refused -------------------------------------------------------------------------------------------------


class OwnProcessor(sa.String):
    def bind_processor(self, dialect: Dialect) -> Any:
        return str.upper


class OwnExpression(sa.String):
    def bind_expression(self, bindvalue: Any) -> Any:
        return sa.func.upper(bindvalue)


class OwnDecoration(TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: Any) -> Any:
        return str.upper


class Point(UserDefinedType[Any]):
    cache_ok = True


class Shy(UserDefinedType[Any]):
    cache_ok = True

    @property
    def python_type(self) -> Any:
        raise RuntimeError(MARKER)


class AlreadyEncrypted(TypeDecorator[Any]):
    impl = EncryptedJSON
    cache_ok = True


class AroundVariants(TypeDecorator[Any]):
    impl = sa.String
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return sa.String().with_variant(sa.Text(), "mysql")


class Undecided(TypeDecorator[Any]):
    impl = sa.String
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        raise RuntimeError(MARKER)


class Demanding(TypeDecorator[Any]):
    impl = sa.String
    cache_ok = True

    def __init__(self, _: int) -> None:
        super().__init__()


REFUSED = [
    (sa.Time(timezone=True), "Use Time, or"),
    (postgresql.TIME(timezone=True), "Use Time, or"),
    (sa.PickleType, "runs what is in it. Use JSON"),
    (sa.ARRAY(sa.Integer), "use JSON"),
    (postgresql.ARRAY(sa.Integer), "use JSON"),
    (sa.ARRAY, "give an instance"),
    (types.NullType, "Give their type"),
    (types.NULLTYPE, "Give their type"),
    (sa.String().with_variant(sa.Text(), "mysql"), "without with_variant"),
    (AroundVariants, "without with_variant"),
    (EncryptedJSON, "an encrypted type already"),
    (EncryptedJSON(associated_data="a.b", storage="text"), "an encrypted type already"),
    (AlreadyEncrypted, "an encrypted type already"),
    (OwnProcessor, "Use a TypeDecorator with process_bind_param"),
    (OwnExpression(5), "its bind_expression would not be called"),
    (OwnDecoration, "its result_processor would not be called"),
    (mysql.SET("a", "b"), "its bind_processor would not be called"),
    (oracle.NUMBER, "Use Integer or Numeric"),
    (Shy, "not known what its values are"),
    (Point, "not known what its values are"),
    (postgresql.HSTORE, "not known what its values are"),
    (postgresql.INET, "not known what its values are"),
    (postgresql.INT4RANGE, "not known what its values are"),
    (mysql.YEAR, "not known what its values are"),
    (types.TypeEngine, "not known what its values are"),
    (Undecided, "load_dialect_impl raises RuntimeError"),
    (Demanding, "give an instance"),
    (str, "must be a SQLAlchemy type"),
    ("String", "must be a SQLAlchemy type"),
    (None, "must be a SQLAlchemy type"),
]


@pytest.mark.parametrize(("type_", "advice"), REFUSED, ids=[repr(type_)[:40] for type_, _ in REFUSED])
def test_refuses_and_says_what_to_use(type_: Any, advice: str) -> None:
    with pytest.raises(ColumnError) as caught:
        codec_for(type_)
    assert advice in str(caught.value)
    assert leaked(caught.value, MARKER) == []
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


# --- Decorators ------------------------------------------------------------------------------------------------------


class Lowered(TypeDecorator[str]):
    """Converts on the way in only."""

    impl = sa.String(50)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None or value == "nothing" else value.lower()


class Tags(TypeDecorator[set[str]]):
    """Converts both ways."""

    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: set[str] | None, dialect: Dialect) -> Any:
        return None if value is None else {name: 1 for name in value}  # noqa: C420 - the order is any

    def process_result_value(self, value: Any, dialect: Dialect) -> set[str] | None:
        return None if value is None else set(value)


class OnEveryDatabase(TypeDecorator[uuid.UUID]):
    """The recipe of SQLAlchemy's documentation."""

    impl = sa.CHAR
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.UUID())
        return dialect.type_descriptor(sa.CHAR(32))

    def process_bind_param(self, value: uuid.UUID | None, dialect: Dialect) -> Any:
        return value if value is None or dialect.name == "postgresql" else value.hex

    def process_result_value(self, value: Any, dialect: Dialect) -> uuid.UUID | None:
        return value if value is None or isinstance(value, uuid.UUID) else uuid.UUID(value)


class Plain(TypeDecorator[Any]):
    impl = sa.Integer
    cache_ok = True


class Hostile(TypeDecorator[Any]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        if value == MARKER:
            raise RuntimeError(value)
        return value

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        raise RuntimeError(value)


class Document(TypeDecorator[Any]):
    """An older way to have JSON everywhere."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return json.dumps(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return json.loads(value)


@pytest.mark.parametrize(
    ("type_", "value", "payload", "expected"),
    [
        (Lowered, "ABC", b"\x03abc", "abc"),
        (Tags(), {"a"}, b'\x01{"a":1}', {"a"}),
        (OnEveryDatabase, ONE, b"\x0300000000000000000000000000000001", ONE),
        (Plain, 5, reference.integer_payload(5), 5),
        (Document, {"a": (1,)}, b'\x03{"a": [1]}', {"a": [1]}),
    ],
    ids=["one way", "both ways", "by database", "no way", "JSON in text"],
)
def test_decorator_converts_around_the_codec_of_its_impl(type_: Any, value: Any, payload: bytes, expected: Any) -> None:
    codec = codec_for(type_)
    assert type(codec) is DecoratedCodec
    assert codec.encode(value) == payload
    assert codec.decode(payload) == expected


def test_decorator_of_a_decorator() -> None:
    class Twice(TypeDecorator[Any]):
        impl = Lowered
        cache_ok = True

        def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
            return f"{value}!"

    assert codec_for(Twice).encode("ABC") == b"\x03abc!"


def test_decorated_values_are_the_same_if_what_is_stored_is() -> None:
    lowered, tags, hostile = codec_for(Lowered), codec_for(Tags), codec_for(Hostile)
    assert lowered.same("ABC", "abc")
    assert not lowered.same("ABC", "abd")
    assert not lowered.same("nothing", "NOTHING")
    assert tags.same({"a", "b"}, {"b", "a"})
    assert not tags.same({"a", "b"}, {"b"})
    assert hostile.same(MARKER, MARKER)
    assert not hostile.same(MARKER, "x")
    assert not hostile.same(object(), object())


def test_decorated_values_that_are_equal_are_not_the_same_if_what_is_stored_is_not() -> None:
    class Loose(TypeDecorator[Any]):
        impl = sa.JSON
        cache_ok = True

    loose = codec_for(Loose)
    assert loose.same({"a": 1}, {"a": 1})
    assert not loose.same([1], [True])
    assert not loose.same([1], [1.0])


@pytest.mark.parametrize("attribute", ["storage", "column_name"])
def test_decorator_with_an_attribute_of_its_own_is_not_taken_for_an_encrypted_type(attribute: str) -> None:
    assert codec_for(type("Named", (Lowered,), {attribute: "x"})).encode("ABC") == b"\x03abc"


def raises_nothing_else(codec: Codec, value: Any, match: str) -> None:
    with pytest.raises(UnstorableValueError, match=match) as caught:
        codec.encode(value)
    assert leaked(caught.value, MARKER) == []
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_what_a_decorator_raises_is_named_by_its_type() -> None:
    codec = codec_for(Hostile)
    raises_nothing_else(codec, MARKER, r"of type str, .*Hostile\.process_bind_param makes it raise RuntimeError")
    with pytest.raises(MalformedPayloadError, match=r"Hostile\.process_result_value .* raises RuntimeError") as caught:
        codec.decode(b"\x03" + MARKER.encode())
    assert leaked(caught.value, MARKER) == []
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_refuses_what_a_decorator_turns_into_nothing_or_into_another_type() -> None:
    raises_nothing_else(codec_for(Lowered), "nothing", "becomes None")
    raises_nothing_else(codec_for(Hostile), 5, "of type int, is not text")
    with pytest.raises(MalformedPayloadError, match="kind 0x01"):
        codec_for(Lowered).decode(b"\x01null")
