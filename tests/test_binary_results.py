"""Results with encrypted values that psycopg asks for in binary: what is in them is what it loads from text."""

import asyncio
import datetime as dt
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg.types.numeric import FloatLoader
from sqlalchemy import (
    Boolean,
    Connection,
    Date,
    DateTime,
    Double,
    Engine,
    Enum,
    Interval,
    Numeric,
    SmallInteger,
    Time,
    Uuid,
    create_engine,
    event,
    insert,
    literal_column,
    make_url,
    select,
    text,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, DOMAIN, ENUM, INET, JSONB, REAL
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, joinedload, mapped_column, relationship
from sqlalchemy.schema import Column, ForeignKey, MetaData, Table
from sqlalchemy.types import CHAR, JSON, BigInteger, Integer, LargeBinary, String, Text, TypeEngine

from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, EncryptedString, Keyring, guards, use_keyring
from sqlalchemy_kravn_crypto.exceptions import ResultTypesChangedError

SECRET = {"token": "tok-7f"}
TEXT, BINARY = psycopg.pq.Format.TEXT, psycopg.pq.Format.BINARY


@pytest.fixture(autouse=True)
def _keyring() -> Iterator[None]:
    with use_keyring(Keyring(DataKey.generate())):
        yield


@contextmanager
def engine_of(url: str, **options: Any) -> Iterator[tuple[Engine, list[int]]]:
    """Have an engine with guards, and the formats in which its statements on secrets had their results."""
    engine = create_engine(url, **options)
    formats: list[int] = []

    def note(_connection: Any, cursor: Any, sql: str, *_: Any) -> None:
        if "secret" in sql and sql.startswith(("SELECT", "WITH", "INSERT", "UPDATE")):
            formats.append(cursor.format)

    guards.install(engine)
    event.listen(engine, "after_cursor_execute", note)
    try:
        yield engine, formats
    finally:
        engine.dispose()


@pytest.fixture
def guarded(postgres_url: str) -> Iterator[tuple[Engine, list[int]]]:
    with engine_of(postgres_url) as found:
        yield found


def table_with(*types: TypeEngine[Any], secret: TypeEngine[Any] | None = None) -> Table:
    columns = [Column(f"c{place}", type_) for place, type_ in enumerate(types)]
    return Table(
        "plugin",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("secret", secret or EncryptedJSON()),
        *columns,
    )


def fill(engine: Engine, table: Table, rows: list[tuple[Any, ...]]) -> None:
    with engine.begin() as connection:
        table.metadata.create_all(connection)
        connection.execute(
            insert(table),
            [
                {"id": number, "secret": SECRET, **{f"c{place}": value for place, value in enumerate(row)}}
                for number, row in enumerate(rows)
            ],
        )


def read(connection: Connection, statement: Any, *, schema: str | None = None) -> list[tuple[Any, ...]]:
    options: Any = {} if schema is None else {"schema_translate_map": {None: schema}}
    return [tuple(row) for row in connection.execute(statement, execution_options=options)]


def shown(rows: list[tuple[Any, ...]]) -> list[list[tuple[type[Any], str]]]:
    """Return values so that 1 and True, 1.1 and 1.10, and two zones of one moment, are not the same."""
    return [[(type(value), repr(value)) for value in row] for row in rows]


def comparable(value: Any) -> Any:
    """Return what equals the same value, as NaN does not, nor an hour that a zone has twice."""
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        return value.astimezone(dt.UTC)
    return "NaN" if isinstance(value, Decimal) and value.is_nan() else value


NOON = dt.datetime(2026, 3, 29, 12, 0, 0, 123456)  # noqa: DTZ001 - what a column without time zone holds

ALIKE: dict[str, tuple[TypeEngine[Any], list[Any]]] = {
    "smallint": (SmallInteger(), [0, -(2**15), 2**15 - 1, None]),
    "integer": (Integer(), [0, -(2**31), 2**31 - 1, None]),
    "bigint": (BigInteger(), [0, -(2**63), 2**63 - 1, None]),
    "boolean": (Boolean(), [True, False, None]),
    "bytea": (LargeBinary(), [b"", b"\x00\\x41\xff", bytes(range(256)), None]),
    "text": (Text(), ["", "\\x41", "żółć \N{SNOWMAN}\n", None]),
    "varchar": (String(20), ["", "a'b", "é" * 20, None]),
    "char": (CHAR(5), ["     ", "ab   ", "abcde", None]),
    "uuid": (Uuid(), [uuid.UUID(int=0), uuid.UUID(int=2**128 - 1), None]),
    "uuid as text": (Uuid(as_uuid=False), [str(uuid.UUID(int=5)), None]),
    "date": (Date(), [dt.date(1, 1, 1), dt.date(2026, 2, 28), dt.date(9999, 12, 31), None]),
    "time": (Time(), [dt.time(0), dt.time(23, 59, 59, 999999), None]),
    "timestamp": (DateTime(), [NOON.replace(year=1), NOON, NOON.replace(year=9999), None]),
    "timestamptz": (
        DateTime(timezone=True),
        [
            dt.datetime(1900, 1, 1, tzinfo=dt.UTC),
            # The hour that is there twice in Berlin.
            dt.datetime(2026, 10, 25, 0, 30, tzinfo=dt.UTC),
            dt.datetime(2026, 10, 25, 1, 30, tzinfo=dt.UTC),
            NOON.replace(tzinfo=dt.timezone(dt.timedelta(hours=-9, minutes=-30))),
            None,
        ],
    ),
    "numeric": (
        Numeric(),
        [*map(Decimal, ("0", "1.1", "1.10", "-0.00012300", "1E+30", "123456789012345678901234567890.5", "NaN")), None],
    ),
    "numeric as float": (Numeric(20, 5, asdecimal=False), [1.5, -2.25, None]),
    "numeric with a scale": (Numeric(20, 5), [Decimal("1.5"), Decimal("-99999.00001"), None]),
    "domain": (DOMAIN("positive", Integer), [1, 7, None]),
}

LEFT: dict[str, tuple[TypeEngine[Any], list[Any]]] = {
    "real": (REAL(), [0.1, 1e10, None]),
    "double precision": (Double(), [0.1, -1e300, None]),
    "interval": (Interval(), [dt.timedelta(days=40, seconds=-1), None]),
    "json": (JSON(), [{"a": [1, None]}, "x"]),
    "jsonb": (JSONB(), [{"a": [1, None]}, "x"]),
    "enum": (Enum("RED", "GREEN", name="colour"), ["RED", "GREEN", None]),
    "array": (ARRAY(Integer), [[1, 2], [], None]),
    "inet": (INET(), ["10.0.0.1", None]),
    "array of uuid": (ARRAY(Uuid), [[uuid.UUID(int=3)], None]),
}


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/St_Johns"])
@pytest.mark.parametrize("name", ALIKE)
def test_what_is_loaded_from_binary_is_what_is_loaded_from_text(
    guarded: tuple[Engine, list[int]], name: str, zone: str
) -> None:
    engine, formats = guarded
    type_, values = ALIKE[name]
    table = table_with(type_)
    fill(engine, table, [(value,) for value in values])
    statement = select(table).order_by(table.c.id)
    with engine.connect() as connection:
        connection.execute(text("SELECT set_config('TimeZone', :zone, false)"), {"zone": zone})
        formats.clear()
        first, second, third = (read(connection, statement) for _ in range(3))
    assert formats == [TEXT, BINARY, BINARY]
    assert shown(first) == shown(second) == shown(third)
    assert [row[1] for row in first] == [SECRET] * len(values)
    for row, value in zip(first, values, strict=True):
        assert comparable(row[2]) == comparable(value)


@pytest.mark.parametrize("name", LEFT)
def test_what_may_be_loaded_otherwise_is_asked_for_as_text(guarded: tuple[Engine, list[int]], name: str) -> None:
    engine, formats = guarded
    type_, values = LEFT[name]
    table = table_with(type_)
    fill(engine, table, [(value,) for value in values])
    formats.clear()
    with engine.connect() as connection:
        first, *others = (read(connection, select(table).order_by(table.c.id)) for _ in range(3))
    assert formats == [TEXT] * 3
    assert [shown(rows) for rows in others] == [shown(first)] * 2
    assert [row[1] for row in first] == [SECRET] * len(values)


def test_types_of_the_database_count_and_not_those_that_are_declared(guarded: tuple[Engine, list[int]]) -> None:
    engine, formats = guarded
    fill(engine, table_with(ENUM("RED", "GREEN", name="colour")), [("RED",)])
    declared = table_with(String(20))
    formats.clear()
    with engine.connect() as connection:
        rows = [read(connection, select(declared)) for _ in range(3)]
    assert rows == [[(0, SECRET, "RED")]] * 3
    assert formats == [TEXT] * 3


def test_only_statements_that_select_encrypted_values_are_asked_in_binary(guarded: tuple[Engine, list[int]]) -> None:
    engine, formats = guarded
    table = table_with(LargeBinary())
    fill(engine, table, [(b"plain",)])
    ciphertext = type_coerce(table.c.secret, LargeBinary()).label("secret")
    selected = {
        "encrypted": (select(table.c.secret), BINARY),
        "aliased": (select(table.alias("secrets").c.secret), BINARY),
        "in a CTE": (select(select(table.c.secret).cte("secrets")), BINARY),
        "in a union": (union_all(select(table.c.secret), select(table.c.secret)), BINARY),
        "labelled": (select(table.c.secret.label("other_secret")), BINARY),
        "for update": (select(table.c.secret).with_for_update(), BINARY),
        "plain": (select(table.c.c0, literal_column("1").label("secret")), TEXT),
        "ciphertext": (select(ciphertext), TEXT),
        "in a condition": (select(table.c.id).where(table.c.secret.is_not(None)), TEXT),
        "text": (text("SELECT secret FROM plugin"), TEXT),
        "returning": (update(table).values(c0=b"x").returning(table.c.secret), TEXT),
    }
    for name, (statement, expected) in selected.items():
        formats.clear()
        with engine.begin() as connection:
            rows = [read(connection, statement) for _ in range(2)]
        assert rows[0] == rows[1], name
        assert formats == [TEXT, expected], name


def test_text_columns_can_declare_their_type(guarded: tuple[Engine, list[int]]) -> None:
    engine, formats = guarded
    table = table_with()
    fill(engine, table, [()])
    statement = text("SELECT id, secret FROM plugin").columns(table.c.id, table.c.secret)
    formats.clear()
    with engine.connect() as connection:
        assert [read(connection, statement) for _ in range(2)] == [[(0, SECRET)]] * 2
    assert formats == [TEXT, BINARY]


def test_text_storage_gains_nothing_and_is_left(guarded: tuple[Engine, list[int]]) -> None:
    engine, formats = guarded
    table = table_with(secret=EncryptedString(storage="text"))
    with engine.begin() as connection:
        table.metadata.create_all(connection)
        connection.execute(insert(table), {"id": 1, "secret": "tok"})
        formats.clear()
        assert [read(connection, select(table)) for _ in range(2)] == [[(1, "tok")]] * 2
    assert formats == [TEXT, TEXT]


def test_no_rows_and_nothing_but_null(guarded: tuple[Engine, list[int]]) -> None:
    engine, formats = guarded
    table = table_with()
    fill(engine, table, [()])
    with engine.begin() as connection:
        connection.execute(update(table).values(secret=None))
        formats.clear()
        assert [read(connection, select(table)) for _ in range(2)] == [[(0, None)]] * 2
        assert [read(connection, select(table).where(table.c.id < 0)) for _ in range(2)] == [[]] * 2
    assert formats == [TEXT, BINARY] * 2


# --- What the program has of its own ---------------------------------------------------------------------------------


def test_loader_of_the_program_is_used_whenever_it_comes(guarded: tuple[Engine, list[int]]) -> None:
    engine, formats = guarded
    table = table_with(Text())
    fill(engine, table, [("a",)])

    class Shouting(psycopg.adapt.Loader):
        def load(self, data: Any) -> str:
            return bytes(data).decode().upper()

    statement = select(table)
    formats.clear()
    with engine.connect() as connection:
        assert [read(connection, statement) for _ in range(2)] == [[(0, SECRET, "a")]] * 2
        driver: Any = connection.connection.driver_connection
        driver.adapters.register_loader("text", Shouting)
        assert read(connection, statement) == [(0, SECRET, "A")]
        connection.invalidate()
    with engine.connect() as connection:
        assert read(connection, statement) == [(0, SECRET, "a")]
    assert formats == [TEXT, BINARY, TEXT, BINARY]


def test_one_of_the_drivers_loaders_in_place_of_another_is_used(guarded: tuple[Engine, list[int]]) -> None:
    engine, formats = guarded
    table = table_with(Numeric())
    fill(engine, table, [(Decimal("1.5"),)])
    formats.clear()
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.adapters.register_loader("numeric", FloatLoader)
        raw = select(table.c.secret, type_coerce(table.c.c0, Text()))
        assert shown([row[1:] for _ in range(3) for row in read(connection, raw)]) == [[(float, "1.5")]] * 3
        connection.invalidate()
    assert formats == [TEXT] * 3


def test_cursors_that_do_not_know_the_format_are_left(postgres_url: str) -> None:
    table = table_with()
    with engine_of(postgres_url, connect_args={"cursor_factory": psycopg.ClientCursor}) as (engine, formats):
        fill(engine, table, [()])
        formats.clear()
        with engine.connect() as connection:
            assert [read(connection, select(table)) for _ in range(3)] == [[(0, SECRET)]] * 3
        assert formats == [TEXT] * 3


def test_it_can_be_turned_off(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    guards.install(engine, binary_results=False)
    formats: list[int] = []
    event.listen(engine, "after_cursor_execute", lambda _c, cursor, *_: formats.append(cursor.format))
    table = table_with()
    fill(engine, table, [()])
    formats.clear()
    with engine.connect() as connection:
        assert [read(connection, select(table)) for _ in range(3)] == [[(0, SECRET)]] * 3
    assert formats == [TEXT] * 3
    engine.dispose()


def test_asynchronous_psycopg_is_left(postgres_url: str) -> None:
    table = table_with()
    formats: list[int] = []

    async def read_twice() -> list[list[tuple[Any, ...]]]:
        engine = create_async_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
        guards.install(engine.sync_engine)
        event.listen(
            engine.sync_engine,
            "after_cursor_execute",
            lambda _, cursor, sql, *__: formats.append(cursor._cursor.format) if "secret" in sql else None,
        )
        async with engine.connect() as connection:
            rows = [[tuple(row) for row in await connection.execute(select(table))] for _ in range(2)]
        await engine.dispose()
        return rows

    with engine_of(postgres_url) as (engine, _):
        fill(engine, table, [()])
    assert asyncio.run(read_twice()) == [[(0, SECRET)]] * 2
    assert formats == [TEXT, TEXT]


# --- Types that change while the program is running ------------------------------------------------------------------


@pytest.fixture
def unprepared(postgres_url: str) -> Iterator[tuple[Engine, list[int]]]:
    """Have an engine without prepared statements, for which PostgreSQL itself refuses what this is about."""
    with engine_of(postgres_url, connect_args={"prepare_threshold": None}) as found:
        yield found


def migrate(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


@pytest.mark.parametrize("stream", [False, True])
def test_type_that_binary_would_load_otherwise_is_refused_once(
    unprepared: tuple[Engine, list[int]], *, stream: bool
) -> None:
    engine, formats = unprepared
    table = table_with(String(20))
    fill(engine, table, [("RED",)])
    statement = select(table).execution_options(stream_results=stream)
    formats.clear()
    with engine.connect() as connection:
        assert [read(connection, statement) for _ in range(2)] == [[(0, SECRET, "RED")]] * 2
    migrate(engine, "CREATE TYPE colour AS ENUM ('RED')", "ALTER TABLE plugin ALTER c0 TYPE colour USING c0::colour")
    with engine.connect() as connection:
        with pytest.raises(ResultTypesChangedError, match="another type in the database than before") as caught:
            read(connection, statement)
        assert "tok-7f" not in repr(caught.value)
        assert [read(connection, statement) for _ in range(2)] == [[(0, SECRET, "RED")]] * 2
    assert formats == [TEXT, BINARY, TEXT, TEXT]  # what is refused is not noted


def test_type_that_is_loaded_alike_is_followed(unprepared: tuple[Engine, list[int]]) -> None:
    engine, formats = unprepared
    table = table_with(Integer())
    fill(engine, table, [(7,)])
    statement = select(table)
    formats.clear()
    with engine.connect() as connection:
        first = [read(connection, statement) for _ in range(2)]
    migrate(engine, "ALTER TABLE plugin ALTER c0 TYPE bigint")
    with engine.connect() as connection:
        assert [*first, read(connection, statement), read(connection, statement)] == [[(0, SECRET, 7)]] * 4
    assert formats == [TEXT, BINARY, BINARY, BINARY]


def test_tenant_whose_table_is_another_is_refused_once(unprepared: tuple[Engine, list[int]]) -> None:
    engine, formats = unprepared
    table = table_with(String(20))
    fill(engine, table, [("a",)])
    migrate(
        engine,
        "CREATE EXTENSION citext",
        "CREATE SCHEMA tenant",
        "CREATE TABLE tenant.plugin (LIKE plugin)",
        "ALTER TABLE tenant.plugin ALTER c0 TYPE citext",
        "INSERT INTO tenant.plugin SELECT * FROM plugin",
    )
    statement = select(table)
    with engine.connect() as connection:
        formats.clear()
        assert [read(connection, statement, schema="public") for _ in range(2)] == [[(0, SECRET, "a")]] * 2
        with pytest.raises(ResultTypesChangedError):
            read(connection, statement, schema="tenant")
        for schema in ("tenant", "public", "tenant"):
            assert read(connection, statement, schema=schema) == [(0, SECRET, "a")]
    assert formats == [TEXT, BINARY, TEXT, TEXT, TEXT]


# --- The ORM, and rows that are not all read at once -----------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Owner(Base):
    __tablename__ = "owner"
    id: Mapped[int] = mapped_column(primary_key=True)
    plugins: Mapped[list["Plugin"]] = relationship()


class Plugin(Base):
    __tablename__ = "plugin"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int] = mapped_column(ForeignKey("owner.id"))
    secret: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


@pytest.mark.parametrize("way", ["entities", "joined", "lazy", "get", "refresh"])
def test_orm_loads_the_same(guarded: tuple[Engine, list[int]], way: str) -> None:
    engine, formats = guarded
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Owner(id=1, plugins=[Plugin(id=number, secret={"number": number}) for number in range(3)]))
        session.commit()
    formats.clear()

    def load(session: Session) -> list[Plugin]:
        if way == "entities":
            return list(session.scalars(select(Plugin).order_by(Plugin.id)))
        if way == "joined":
            return list(session.scalars(select(Owner).options(joinedload(Owner.plugins))).unique().one().plugins)
        if way == "lazy":
            return session.get_one(Owner, 1).plugins
        found = [session.get_one(Plugin, number) for number in range(3)]
        if way == "refresh":
            for plugin in found:
                session.refresh(plugin)
        return found

    for _ in range(2):
        with Session(engine) as session:
            assert sorted((plugin.id, plugin.secret["number"]) for plugin in load(session)) == [(0, 0), (1, 1), (2, 2)]
    assert formats[0] == TEXT
    assert formats[-1] == BINARY


@pytest.mark.parametrize("options", [{"yield_per": 2}, {"stream_results": True}, {"max_row_buffer": 1}])
def test_streams_are_the_same(guarded: tuple[Engine, list[int]], options: dict[str, Any]) -> None:
    engine, formats = guarded
    table = table_with(Text())
    fill(engine, table, [(str(number),) for number in range(5)])
    formats.clear()
    with engine.connect() as connection:
        for _ in range(2):
            with connection.execution_options(**options).execute(select(table).order_by(table.c.id)) as result:
                assert [tuple(row) for row in result] == [(number, SECRET, str(number)) for number in range(5)]
    assert formats == [TEXT, BINARY]
