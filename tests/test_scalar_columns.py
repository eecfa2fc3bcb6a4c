"""Columns of text, bytes, numbers, dates and the like: round trips, change detection, and what each refuses."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from functools import partial
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy import JSON, Column, Engine, Integer, MetaData, Table, create_engine, event, insert, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import (
    DataKey,
    Encrypted,
    EncryptedBytes,
    EncryptedJSON,
    EncryptedString,
    Keyring,
    use_keyring,
)
from sqlalchemy_kravn_crypto.exceptions import MalformedPayloadError, UnstorableValueError
from tests.leaks import leaked
from tests.postgres import fresh_database

MARKER = "S3CR3T" + "-marker"


class Colour(Enum):
    RED = 1
    GREEN = 2


class Reversed(sa.TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value[::-1]

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value[::-1]


AWARE = datetime(2024, 2, 29, 12, 30, 15, 123456, timezone(timedelta(hours=5, minutes=30)))

MIDNIGHT = datetime(2024, 1, 1)  # noqa: DTZ001 - without an offset, as some columns have it


def of(type_: Any) -> Callable[..., Any]:
    return partial(Encrypted, type_)


# What is declared, what is stored, and what is refused as no value of the type.
KINDS: dict[str, tuple[Any, list[Any], Any]] = {
    "string": (EncryptedString, ["", MARKER, "grün 鍵 🔑 \0", "x" * 100_000], 5),
    "bytes": (EncryptedBytes, [b"", b"\xf9\x02" + b"\0" * 80, MARKER.encode()], MARKER),
    "integer": (of(Integer), [0, -1, 2**63, -(2**200)], True),
    "numeric": (of(sa.Numeric(10, 2)), [Decimal("1.00"), Decimal("-0.000"), Decimal("1E+40")], 1.5),
    "float": (of(sa.Float), [0.0, 1e-320, 0.1], "1.5"),
    "boolean": (of(sa.Boolean), [True, False], 1),
    "date": (of(sa.Date), [date(1, 1, 1), date(2024, 2, 29)], MIDNIGHT),
    "time": (of(sa.Time), [time(), time(23, 59, 59, 999999)], "12:00"),
    "naive": (of(sa.DateTime), [MIDNIGHT, MIDNIGHT.replace(microsecond=1)], AWARE),
    "aware": (of(sa.DateTime(timezone=True)), [AWARE, datetime.max.replace(tzinfo=UTC)], date(2024, 1, 1)),
    "interval": (of(sa.Interval), [timedelta(), timedelta(days=-3, microseconds=1)], 5),
    "uuid": (of(sa.Uuid), [UUID(int=0), UUID(int=2**128 - 1)], "not one"),
    "enum": (of(sa.Enum(Colour)), [Colour.RED, Colour.GREEN], "BLUE"),
    "decorator": (of(Reversed), ["abc", MARKER], 5),
    "json": (EncryptedJSON, [{"a": [1, None]}, [], ""], object()),
}
STORAGES = ["binary", "text"]

METADATA = MetaData()


class Base(DeclarativeBase):
    metadata = METADATA


def columns() -> list[Column[Any]]:
    made = [
        Column(f"{name}_{storage}", kind[0](storage=storage)) for name, kind in KINDS.items() for storage in STORAGES
    ]
    return [Column("id", Integer, primary_key=True), *made]


class Everything(Base):
    __table__ = Table("everything", METADATA, *columns())
    id: Mapped[int]


TABLE = METADATA.tables["everything"]


@pytest.fixture(autouse=True)
def _keyring() -> Iterator[None]:
    with use_keyring(Keyring(DataKey.generate())):
        yield


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Give a database that all tests of the module share, for there are many columns to create."""
    with ExitStack() as stack:
        if request.param == "sqlite":
            engine = create_engine(f"sqlite:///{tmp_path_factory.mktemp('columns') / 'test.db'}")
        else:
            engine = create_engine(stack.enter_context(fresh_database(request.getfixturevalue("postgres_server"))))
        METADATA.create_all(engine)
        yield engine
        engine.dispose()


@pytest.fixture
def engine(shared: Engine) -> Engine:
    with shared.begin() as connection:
        for table in METADATA.sorted_tables:
            connection.execute(sa.delete(table))
    return shared


@pytest.fixture
def updates(engine: Engine) -> Iterator[list[str]]:
    """Collect the UPDATEs that are executed."""
    executed: list[str] = []

    def record(*arguments: Any) -> None:
        if arguments[2].startswith("UPDATE"):
            executed.append(arguments[2])

    event.listen(engine, "before_cursor_execute", record)
    yield executed
    event.remove(engine, "before_cursor_execute", record)


def exactly(value: Any) -> tuple[Any, ...]:
    """Return what tells values apart that are equal for Python: 1 and 1.0, 0.0 and -0.0, and offsets from UTC."""
    offset = value.utcoffset() if isinstance(value, datetime) else None
    return type(value), str(value), value, offset


# --- Round trips -----------------------------------------------------------------------------------------------------


def test_values_come_back_through_orm_and_core(engine: Engine) -> None:
    with Session(engine) as session:
        for kind, (_, given, _) in KINDS.items():
            for storage in STORAGES:
                name = f"{kind}_{storage}"
                column = TABLE.c[name]
                session.execute(sa.delete(TABLE))
                session.add_all(Everything(**{"id": number, name: value}) for number, value in enumerate(given))
                session.flush()
                session.expunge_all()
                attribute: Any = getattr(Everything, name)
                loaded = [getattr(found, name) for found in session.scalars(select(Everything).order_by(Everything.id))]
                assert list(map(exactly, loaded)) == list(map(exactly, given)), name
                assert all(type(one) is type(other) for one, other in zip(loaded, given, strict=True))
                session.execute(update(Everything).values({attribute: given[0]}))
                connection = session.connection()
                assert list(map(exactly, connection.scalars(select(column)))) == [exactly(given[0])] * len(given), name
                returned = connection.scalars(insert(TABLE).returning(column), {"id": 99, name: given[-1]}).one()
                assert exactly(returned) == exactly(given[-1]), name
                connection.execute(insert(TABLE).values({"id": 100, name: None}))
                assert connection.scalar(select(column).where(TABLE.c.id == 100)) is None
                raw = connection.exec_driver_sql(f"SELECT {name} FROM everything WHERE id = 99").scalar_one()  # noqa: S608 - fixed
                assert MARKER not in str(raw)
                assert str(raw).startswith("enc:v3:") if storage == "text" else bytes(raw)[:2] == b"\xf9\x02"


@pytest.mark.parametrize("kind", KINDS)
def test_other_values_are_refused(engine: Engine, kind: str) -> None:
    for storage in STORAGES:
        with Session(engine) as session:
            session.add(Everything(**{f"{kind}_{storage}": KINDS[kind][2]}))
            with pytest.raises(UnstorableValueError) as caught:
                session.flush()
            assert leaked(caught.value, MARKER) == []
            session.rollback()


def test_columns_of_one_name_refuse_what_another_type_wrote(database_url: str) -> None:
    """As when the type of a column was changed without its values."""
    engine = create_engine(database_url)
    metadata = MetaData()
    made = {
        kind: Table("one", MetaData(), Column("id", Integer, primary_key=True), Column("value", KINDS[kind][0]()))
        for kind in KINDS
    }
    Table("one", metadata, Column("id", Integer, primary_key=True), Column("value", EncryptedJSON()))
    metadata.create_all(engine)
    alike = {frozenset({"string", "decorator"})}
    with engine.connect() as connection:
        for number, (writer, table) in enumerate(made.items()):
            connection.execute(insert(table), {"id": number, "value": KINDS[writer][1][0]})
            for reader, read in made.items():
                statement = select(read.c.value).where(read.c.id == number)
                if reader == writer or {reader, writer} in alike:
                    connection.execute(statement).all()
                    continue
                with pytest.raises(MalformedPayloadError, match="decrypts, but is of kind") as caught:
                    connection.execute(statement).all()
                assert leaked(caught.value, MARKER) == []
    engine.dispose()


def test_rows_can_be_made_unique_where_values_are_hashable(engine: Engine) -> None:
    hashable = [kind for kind in KINDS if kind != "json"]
    with Session(engine) as session:
        values = {f"{kind}_binary": KINDS[kind][1][0] for kind in hashable}
        session.add_all([Everything(id=1, **values), Everything(id=2, **values)])
        session.flush()
        for kind in hashable:
            attribute: Any = getattr(Everything, f"{kind}_binary")
            assert attribute.type.hashable
            assert session.scalars(select(attribute)).unique().all() == [KINDS[kind][1][0]], kind
            assert len(session.execute(select(Everything, attribute)).unique().all()) == 2
    assert not Encrypted(JSON).hashable


# --- Which assignments are changes -----------------------------------------------------------------------------------

MINUS = timezone(timedelta(hours=-1))

CHANGES: list[Any] = [
    pytest.param("json", 1, True, id="1 to True"),
    pytest.param("json", 1, 1.0, id="1 to 1.0"),
    pytest.param("json", 0.0, -0.0, id="0.0 to -0.0"),
    pytest.param("json", {"a": [0]}, {"a": [False]}, id="0 to False within"),
    pytest.param("json", [1], [1, 1], id="list"),
    pytest.param("json", None, JSON.NULL, id="None to null"),
    pytest.param("json", JSON.NULL, None, id="null to None"),
    pytest.param("json", {}, None, id="dict to None"),
    pytest.param("numeric", Decimal("1.0"), Decimal("1.00"), id="1.0 to 1.00"),
    pytest.param("numeric", Decimal(0), Decimal("-0"), id="0 to -0"),
    pytest.param("float", 0.0, -0.0, id="float 0.0 to -0.0"),
    pytest.param("aware", AWARE, AWARE.astimezone(MINUS), id="offset"),
    pytest.param("string", "", None, id="empty text to None"),
    pytest.param("enum", Colour.RED, Colour.GREEN, id="enum"),
    pytest.param("decorator", "ab", "ba", id="decorator"),
]

UNCHANGED: list[Any] = [
    pytest.param("json", {"a": 1, "b": [{}]}, {"a": 1, "b": [{}]}, id="dict"),
    pytest.param("json", {"a": 1, "b": 2}, {"b": 2, "a": 1}, id="order of keys"),
    pytest.param("json", {"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}, id="order of keys within"),
    pytest.param("json", JSON.NULL, JSON.NULL, id="null"),
    pytest.param("json", None, None, id="None"),
    pytest.param("json", 2**70, 2**70, id="big integer"),
    pytest.param("numeric", Decimal("1.50"), Decimal("1.50"), id="decimal"),
    pytest.param("aware", AWARE, AWARE.replace(), id="datetime"),
    pytest.param("string", MARKER, "".join(MARKER), id="text"),
    pytest.param("bytes", b"xy", bytes([120, 121]), id="bytes"),
    pytest.param("uuid", UUID(int=5), UUID(int=5), id="UUID"),
    pytest.param("interval", timedelta(days=1), timedelta(hours=24), id="interval"),
    pytest.param("enum", Colour.RED, Colour.RED, id="enum"),
]


def assigned(engine: Engine, name: str, before: Any, after: Any) -> Any:
    """Return what is stored after one value was loaded and another assigned."""
    with Session(engine) as session:
        session.add(Everything(id=1, **{name: before}))
        session.commit()
        found = session.get_one(Everything, 1)
        assert getattr(found, name) == before
        setattr(found, name, after)
        session.commit()
        return session.scalars(select(TABLE.c[name])).one()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("kind", "before", "after"), CHANGES)
def test_other_value_is_written(
    engine: Engine, updates: list[str], kind: str, before: Any, after: Any, storage: str
) -> None:
    if before is JSON.NULL:
        with Session(engine) as session:
            session.add(one := Everything(id=1, **{f"{kind}_{storage}": before}))
            session.flush()
            setattr(one, f"{kind}_{storage}", after)
            session.commit()
            assert session.scalar(select(TABLE.c.id).where(TABLE.c[f"{kind}_{storage}"].is_(None))) == 1
    else:
        stored = assigned(engine, f"{kind}_{storage}", before, after)
        assert exactly(stored) == exactly(None if after is JSON.NULL else after)
    assert len(updates) == 1


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("kind", "before", "after"), [case for case in UNCHANGED if case.id != "null"])
def test_equal_value_is_not_written(
    engine: Engine, updates: list[str], kind: str, before: Any, after: Any, storage: str
) -> None:
    stored = assigned(engine, f"{kind}_{storage}", before, after)
    assert exactly(stored) == exactly(before)
    assert updates == []


def test_null_that_is_assigned_again_is_not_written(engine: Engine, updates: list[str]) -> None:
    with Session(engine) as session:
        one: Any = Everything(id=1, json_binary=JSON.NULL)
        session.add(one)
        session.flush()
        one.json_binary = JSON.NULL
        session.flush()
    assert updates == []


class Model(Base):
    __tablename__ = "model"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[Decimal | None] = mapped_column(Encrypted(sa.Numeric))


def test_annotated_model_serves(engine: Engine, updates: list[str]) -> None:
    with Session(engine) as session:
        session.add(Model(id=1, amount=Decimal("1.0")))
        session.commit()
        model = session.get_one(Model, 1)
        assert model.amount == Decimal("1.0")
        model.amount = Decimal("1.00")
        session.commit()
        assert str(model.amount) == "1.00"
        session.refresh(model)
        model.amount = Decimal("1.00")
        session.commit()
    assert len(updates) == 1
