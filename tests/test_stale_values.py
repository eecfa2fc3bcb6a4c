"""The stale values of a range: what is read in which order, how it is divided, and what is replaced."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Connection, Engine, Integer, String, update

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.known_columns import located
from sqlalchemy_kravn_crypto.stale_values import StaleValues
from tests.rekeying import NEW, OLD, contents, engine_of, fill, known_column, ready, stored, table_of


@pytest.fixture
def engine(any_database_url: str) -> Iterator[Engine]:
    made = engine_of(any_database_url)
    yield made
    made.dispose()


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with ready(engine) as made:
        yield made


def values_in(connection: Connection, storage: str = "binary", **bounds: Any) -> StaleValues:
    found = located(connection, known_column(storage))
    return StaleValues(found, NEW.primary_key_id, connection.dialect.name, **bounds)


@pytest.mark.parametrize("storage", ["binary", "text"])
def test_reads_stale_values_in_the_order_of_their_keys(engine: Engine, connection: Connection, storage: str) -> None:
    plain: Any = "plaintext" if storage == "text" else b"plaintext"
    empty = plain[:0]
    values = [stored(OLD, b"x", storage), None, stored(NEW, b"x", storage), plain, empty, stored(OLD, b"y", storage)]
    fill(engine, table_of(engine, storage), values)
    stale = values_in(connection, storage)
    assert stale.count(connection) == 4
    expected = [(0, values[0]), (3, plain), (4, empty), (5, values[5])]
    assert [tuple(row) for row in stale.read(connection, None, 10)] == expected
    assert [tuple(row) for row in stale.read(connection, None, 2)] == expected[:2]
    assert [tuple(row) for row in stale.read(connection, (3,), 10)] == expected[2:]
    assert stale.read(connection, (5,), 10) == []


def test_a_range_is_from_its_lower_bound_to_before_its_upper(engine: Engine, connection: Connection) -> None:
    fill(engine, table_of(engine), [stored(OLD, b"x")] * 10)
    keys = values_in(connection).keys
    stale = values_in(connection, lower=keys.to_text((3,)), upper=keys.to_text((6,)))
    assert stale.count(connection) == 3
    assert [row[0] for row in stale.read(connection, None, 10)] == [3, 4, 5]
    assert [row[0] for row in stale.read(connection, (4,), 10)] == [5]


@pytest.mark.parametrize(
    ("parts", "firsts", "size"), [(1, [], 7), (2, [4], 4), (3, [3, 6], 3), (50, [1, 2, 3, 4, 5, 6], 1)]
)
def test_divides_by_the_stale_values(
    engine: Engine, connection: Connection, parts: int, firsts: list[int], size: int
) -> None:
    fill(engine, table_of(engine), [*[stored(OLD, b"x")] * 7, *[stored(NEW, b"x")] * 5, None])
    stale = values_in(connection)
    bounds, rows = stale.split(connection, parts)
    assert [stale.keys.from_text(bound) for bound in bounds] == [(first,) for first in firsts]
    assert rows == size


def test_nothing_is_not_divided(engine: Engine, connection: Connection) -> None:
    table_of(engine)
    assert values_in(connection).split(connection, 4) == ([], 0)


@pytest.mark.parametrize("storage", ["binary", "text"])
@pytest.mark.parametrize("composite", [False, True])
def test_replaces_what_is_still_there(
    engine: Engine,
    connection: Connection,
    storage: str,
    composite: bool,  # noqa: FBT001 - of the test
) -> None:
    columns: list[Column[Any]] = [Column("id", Integer, primary_key=True, autoincrement=False)]
    if composite:
        columns.append(Column("more", String(5), primary_key=True, default="more"))
    table = table_of(engine, storage, *columns)
    before = [stored(OLD, bytes([number]), storage) for number in range(4)]
    after = [stored(NEW, bytes([number]), storage) for number in range(4)]
    fill(engine, table, before)
    changed = stored(OLD, b"changed", storage)
    with engine.begin() as other:
        other.execute(update(table).where(table.c.id == 2).values(secret=changed))
    stale = values_in(connection, storage)
    keys = [(number, "more")[: len(columns)] for number in range(4)]
    assert stale.replace(connection, keys, before, after) == 3
    connection.commit()
    assert contents(engine, table) == [after[0], after[1], changed, after[3]]
    assert stale.replace(connection, [], [], []) == 0


def test_without_a_primary_key_it_cannot_be_walked_through(engine: Engine, connection: Connection) -> None:
    table_of(engine, "binary", Column("id", Integer))
    with pytest.raises(errors.ColumnUnreachableError, match="no primary key"):
        values_in(connection)
