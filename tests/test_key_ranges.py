"""Bounds of primary keys: as text and back, and as conditions that walk along a key of any type."""

import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import (
    VARBINARY,
    Column,
    Date,
    DateTime,
    Engine,
    Enum,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    Uuid,
    column,
    create_engine,
    select,
)
from sqlalchemy.dialects import postgresql

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.key_ranges import KeyColumns
from sqlalchemy_kravn_crypto.known_columns import located
from tests.rekeying import known_column

UUIDS = [uuid.UUID(int=number << 100 | number) for number in range(9)]
MOMENTS = [datetime(2026, 1, 1, 12, 0, second, tzinfo=UTC) for second in range(9)]
SHORT_BYTES = LargeBinary().with_variant(VARBINARY(16), "mysql", "mariadb")
KEYS: dict[str, tuple[list[Column[Any]], list[tuple[Any, ...]]]] = {
    "integer": ([Column("i", Integer, primary_key=True)], [(number * 7 - 20,) for number in range(9)]),
    "string": ([Column("s", String(40), primary_key=True)], [(f"ключ {number} ' %s",) for number in range(9)]),
    "uuid": ([Column("u", Uuid, primary_key=True)], [(one,) for one in UUIDS]),
    "bytes": (
        [Column("b", SHORT_BYTES, primary_key=True)],
        [(bytes([200, number]),) for number in range(9)],
    ),
    "date": ([Column("d", Date, primary_key=True)], [(date(2026, 1, 1 + number),) for number in range(9)]),
    "composite": (
        [Column("s", String(9), primary_key=True), Column("i", Integer, primary_key=True)],
        [(letter, number) for letter in "abc" for number in (-1, 0, 5)],
    ),
    "of three": (
        [Column(name, Integer, primary_key=True, autoincrement=False) for name in "xyz"],
        [(x, y, z) for x in (1, 2) for y in (1, 2) for z in (0, 9)],
    ),
}


@pytest.fixture
def engine(any_database_url: str) -> Iterator[Engine]:
    made = create_engine(any_database_url)
    yield made
    made.dispose()


@pytest.mark.parametrize("kind", KEYS)
def test_walks_along_keys_as_reflected(engine: Engine, kind: str) -> None:
    columns, keys = KEYS[kind]
    copies = [Column(one.name, one.type, primary_key=True, autoincrement=False) for one in columns]
    table = Table("a", MetaData(), *copies, Column("secret", LargeBinary))
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(
            table.insert(), [dict(zip(table.primary_key.columns.keys(), key, strict=True)) for key in keys]
        )
        found = located(connection, known_column())
        ranges = KeyColumns(found.key, "a.secret", engine.dialect.name)
        everything = select(*found.key).select_from(found.table).order_by(*found.key)
        ordered = [tuple(row) for row in connection.execute(everything)]
        for place, key in enumerate(ordered):
            again = ranges.from_text(ranges.to_text(key))
            assert again == key
            assert [type(value) for value in again] == [type(value) for value in key]
            for condition, expected in (
                (ranges.after(again), ordered[place + 1 :]),
                (ranges.after(again, or_at=True), ordered[place:]),
                (ranges.before(again), ordered[:place]),
                (ranges.before(again, or_at=True), ordered[: place + 1]),
            ):
                rows = connection.execute(everything.where(condition))
                assert [tuple(row) for row in rows] == expected


def test_parameters_stand_for_a_key(engine: Engine) -> None:
    columns, keys = KEYS["composite"]
    table = Table("a", MetaData(), *(Column(one.name, one.type, primary_key=True) for one in columns))
    table.create(engine)
    ranges = KeyColumns(tuple(table.primary_key.columns), "a.secret", engine.dialect.name)
    statement = select(*table.c).where(ranges.after(ranges.parameters("from"))).order_by(*table.c)
    with engine.begin() as connection:
        connection.execute(table.insert(), [dict(zip("si", key, strict=True)) for key in keys])
        for place, key in enumerate(keys):
            rows = connection.execute(statement, ranges.named("from", key))
            assert [tuple(row) for row in rows] == keys[place + 1 :]


def test_keeps_every_digit_and_zone() -> None:
    ranges = KeyColumns([column("n", Numeric(30, 20)), column("t", DateTime(timezone=True))], "a.secret", "postgresql")
    key = (Decimal("1.00000000000000000001"), MOMENTS[3])
    assert ranges.from_text(ranges.to_text(key)) == key


NO_KEYS = {
    "no JSON": "MARKER",
    "a number": "5",
    "a string": '"MARKER"',
    "null": "null",
    "an object": '{"EAAAAAAAAAAAAAAAAAAAAAA=": 1}',
    "numbers": "[5]",
    "no base64": '["MARKER!"]',
    "base64 with what is none": '["EAAAAAAAAAAAAAAAAAAAAAA!="]',
    "another type": '["A01BUktFUg=="]',
    "no payload": '[""]',
    "no values": "[]",
    "too many values": '["EAAAAAAAAAAAAAAAAAAAAAE=", "EAAAAAAAAAAAAAAAAAAAAAE="]',
    "brackets": "[" * 100_000,
}


@pytest.mark.parametrize("text", NO_KEYS.values(), ids=NO_KEYS)
def test_text_that_is_no_key_of_the_table_is_refused(text: str) -> None:
    ranges = KeyColumns([column("i", Integer)], "a.secret", "postgresql")
    assert ranges.from_text('["EAAAAAAAAAAAAAAAAAAAAAE="]') == (1,)
    with pytest.raises(errors.MalformedRowError, match=r"plan for a\.secret in kms_rekeys") as caught:
        ranges.from_text(text)
    assert caught.value.__context__ is None
    assert "MARKER" not in str(caught.value)


def test_without_a_primary_key_there_is_no_way() -> None:
    with pytest.raises(errors.ColumnUnreachableError, match=r"a\.secret.*no primary key"):
        KeyColumns([], "a.secret", "postgresql")


@pytest.mark.parametrize("dialect", ["postgresql", "mariadb"])
def test_a_type_that_cannot_be_written_down_is_refused(dialect: str) -> None:
    with pytest.raises(errors.ColumnUnreachableError, match="column address") as caught:
        KeyColumns([column("i", Integer), column("address", postgresql.INET)], "a.secret", dialect)
    assert caught.value.__context__ is None


def test_an_enum_is_walked_along_but_where_it_sorts_otherwise_than_it_compares() -> None:
    columns = [column("e", Enum("b", "a"))]
    ranges = KeyColumns(columns, "a.secret", "postgresql")
    assert ranges.from_text(ranges.to_text(("b",))) == ("b",)
    with pytest.raises(errors.ColumnUnreachableError, match="column e"):
        KeyColumns(columns, "a.secret", "mariadb")
