"""One UPDATE of many rows of PostgreSQL: keys of every type, values of any length, and rows that others have locked."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, select, text

from sqlalchemy_kravn_crypto.bulk_update import BulkUpdate
from sqlalchemy_kravn_crypto.key_ranges import KeyColumns
from sqlalchemy_kravn_crypto.known_columns import Located, located
from tests.rekeying import engine_of, known_column

KEYS = {
    "smallint": ("smallint", "number"),
    "bigint": ("bigint", "number + 5000000000"),
    "numeric": ("numeric(30, 10)", "number + 0.0000000001"),
    "double precision": ("double precision", "number * 0.1"),
    "text": ("text", "'k''ey {\"' || number || '\",NULL}\\'"),
    "collated": ('text COLLATE "C"', "'key' || number"),
    "varchar": ("varchar(20)", "'key' || number"),
    "padded": ("char(9)", "'key' || number"),
    "uuid": ("uuid", "gen_random_uuid()"),
    "bytea": ("bytea", "decode(lpad(to_hex(number), 4, '0'), 'hex')"),
    "date": ("date", "date '2026-01-01' + number"),
    "timestamp": ("timestamp", "timestamp '2026-01-01' + number * interval '1 microsecond'"),
    "timestamptz": ("timestamptz", "timestamptz '2026-01-01' + number * interval '1 microsecond'"),
    "time": ("time", "time '12:00' + number * interval '1 microsecond'"),
    "interval": ("interval", "number * interval '90 minutes'"),
    "boolean": ("boolean", "number = 1"),
    "enum": ("mood", "('{sad,ok,happy}'::mood[])[number]"),
    "domain": ("tiny", "number"),
}


@pytest.fixture
def engine(postgres_url: str) -> Iterator[Engine]:
    made = engine_of(postgres_url)
    with made.begin() as connection:
        connection.execute(text("CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy')"))
        connection.execute(text("CREATE DOMAIN tiny AS int CHECK (value < 100)"))
    yield made
    made.dispose()


def table_of(connection: Connection, type_: str, key: str, rows: int, storage: str = "bytea") -> Located:
    """Create a table with a key of two columns and the values 1, 2 and so on."""
    value = "number::text::bytea" if storage == "bytea" else "number::text"
    connection.execute(text(f"CREATE TABLE a (k {type_}, n int, secret {storage}, PRIMARY KEY (k, n))"))
    numbers = f"SELECT {key}, number, {value} FROM generate_series(1, {rows}) AS number"  # noqa: S608 - of the test
    connection.execute(text(f"INSERT INTO a {numbers}"))
    connection.commit()
    return located(connection, known_column("binary" if storage == "bytea" else "text"))


def bulk_update_of(found: Located) -> BulkUpdate:
    return BulkUpdate(found.table, found.value, KeyColumns(found.key, "a.secret", "postgresql"))


def read(connection: Connection, found: Located) -> tuple[list[Any], list[Any]]:
    rows = connection.execute(select(*found.key, found.value).order_by(*found.key)).all()
    connection.rollback()
    return [tuple(row[:-1]) for row in rows], [row[-1] for row in rows]


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("kind", KEYS)
def test_finds_the_rows_by_keys_of_every_type(engine: Engine, kind: str, locked: bool) -> None:  # noqa: FBT001 - of the test
    rows = 2 if kind == "boolean" else 3
    with engine.connect() as connection, engine.connect() as other:
        found = table_of(connection, *KEYS[kind], rows)
        keys, before = read(connection, found)
        if locked:
            other.execute(text("SELECT FROM a WHERE n = 1 FOR UPDATE"))
        after = [value + b" and more" * number for number, value in enumerate(before, start=1)]
        expected = [old if locked and old == b"1" else new for old, new in zip(before, after, strict=True)]
        assert bulk_update_of(found).execute(connection, keys, before, after) == rows - locked
        connection.commit()
        assert read(connection, found) == (keys, expected)


@pytest.mark.parametrize("storage", ["bytea", "text"])
def test_takes_values_of_any_length(engine: Engine, storage: str) -> None:
    with engine.connect() as connection:
        found = table_of(connection, "int", "number", 300, storage)
        keys, before = read(connection, found)
        longer: Any = [(value * (number % 7 * 40)) for number, value in enumerate(before)]
        assert bulk_update_of(found).execute(connection, keys, before, longer) == 300
        connection.commit()
        assert read(connection, found) == (keys, longer)
        assert bulk_update_of(found).execute(connection, keys, longer, before) == 300
        connection.commit()
        assert read(connection, found) == (keys, before)


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("storage", ["bytea", "text"])
def test_replaces_only_what_is_still_there(engine: Engine, storage: str, locked: bool) -> None:  # noqa: FBT001 - of the test
    with engine.connect() as connection, engine.connect() as other:
        found = table_of(connection, "int", "number", 6, storage)
        keys, before = read(connection, found)
        connection.execute(text("UPDATE a SET secret = '3x' WHERE n = 3"))
        connection.execute(text("UPDATE a SET secret = NULL WHERE n = 4"))
        connection.execute(text("DELETE FROM a WHERE n = 5"))
        connection.commit()
        if locked:
            other.execute(text("SELECT FROM a WHERE n = 1 FOR UPDATE"))
        after: Any = [value + value[:0].join([value] * 2) for value in before]
        assert bulk_update_of(found).execute(connection, keys, before, after) == 3 - locked
        connection.commit()
        assert [
            number for number, value in zip([1, 2, 3, 4, 6], read(connection, found)[1], strict=True) if value in after
        ] == ([2, 6] if locked else [1, 2, 6])


def test_touches_no_row_that_was_not_named(engine: Engine) -> None:
    with engine.connect() as connection:
        found = table_of(connection, "int", "number", 10)
        keys, before = read(connection, found)
        named = [1, 4, 7]
        changed = bulk_update_of(found).execute(
            connection, [keys[one] for one in named], [before[one] for one in named], [b"x"] * 3
        )
        connection.commit()
        assert changed == 3
        assert [value == b"x" for value in read(connection, found)[1]] == [one in named for one in range(10)]


def test_bounds_its_waits_in_its_own_transaction_only(engine: Engine) -> None:
    bounds = text("SELECT current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout')")
    with engine.connect() as connection:
        found = table_of(connection, "int", "number", 1)
        keys, before = read(connection, found)
        bulk_update_of(found).execute(connection, keys, before, [b"x"])
        assert connection.execute(bounds).one() == ("50ms", "10s")
        connection.commit()
        assert connection.execute(bounds).one() == ("0", "0")


def test_an_error_of_another_kind_is_raised(engine: Engine) -> None:
    with engine.connect() as connection:
        found = table_of(connection, "int", "number", 1)
        keys, before = read(connection, found)
        connection.execute(text("ALTER TABLE a ADD CHECK (secret <> 'x')"))
        connection.commit()
        with pytest.raises(Exception, match="violates check constraint"):
            bulk_update_of(found).execute(connection, keys, before, [b"x"])
