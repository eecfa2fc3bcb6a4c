"""The database's clock, whatever the zone of machine and session; and the process's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, select, text
from sqlalchemy.dialects import mssql, mysql, oracle, postgresql, sqlite

from sqlalchemy_kravn_crypto.clock import as_utc, database_now, for_database, process_clock, read_database_time
from sqlalchemy_kravn_crypto.schema import TABLES

EVENTS = TABLES.events
MOMENT = datetime(2026, 3, 29, 1, 30, 15, 123456, tzinfo=UTC)


@pytest.fixture
def engine(any_database_url: str) -> Iterator[Engine]:
    made = create_engine(any_database_url)
    yield made
    made.dispose()


def elsewhere(connection: Connection, hours: int) -> None:
    """Let a session be in another zone."""
    statements = {
        "postgresql": f"SET TIME ZONE INTERVAL '{hours:+d}:00' HOUR TO MINUTE",
        "mariadb": f"SET time_zone = '{hours:+03d}:00'",
    }
    if connection.dialect.name in statements:
        connection.execute(text(statements[connection.dialect.name]))


@pytest.mark.parametrize("hours", [-11, 0, 13])
def test_the_databases_time_is_utc_in_every_zone(engine: Engine, hours: int) -> None:
    with engine.connect() as connection:
        elsewhere(connection, hours)
        before = datetime.now(UTC)
        read = read_database_time(connection)
        after = datetime.now(UTC)
    assert read.utcoffset() == timedelta(0)
    assert read.microsecond == 0
    # The server is this machine.
    assert before - timedelta(seconds=1) < read <= after


def test_it_goes_on_within_a_transaction(engine: Engine) -> None:
    with engine.connect() as connection:
        first = as_utc(connection.execute(select(database_now())).scalar_one())
        end = time.monotonic() + 30
        while as_utc(connection.execute(select(database_now())).scalar_one()) == first:
            assert time.monotonic() < end


@pytest.mark.parametrize("hours", [-11, 13])
def test_what_is_stored_of_it_comes_back_as_the_same_moment(engine: Engine, hours: int) -> None:
    TABLES.keys.metadata.create_all(engine)
    values = {"id": 1, "actor": "a", "host": "h", "action": "x", "previous_hash": "p", "hash": "h"}
    with engine.connect() as connection:
        elsewhere(connection, hours)
        connection.execute(EVENTS.insert().values(values | {"occurred_at": database_now()}))
        connection.commit()
        before = as_utc(connection.execute(select(EVENTS.c.occurred_at)).scalar_one())
    with engine.connect() as connection:
        assert as_utc(connection.execute(select(EVENTS.c.occurred_at)).scalar_one()) == before
        assert abs(before - as_utc(connection.execute(select(database_now())).scalar_one())) < timedelta(minutes=10)


@pytest.mark.parametrize("hours", [-11, 13])
def test_a_moment_is_stored_as_it_is(engine: Engine, hours: int) -> None:
    TABLES.keys.metadata.create_all(engine)
    values = {"id": 1, "actor": "a", "host": "h", "action": "x", "previous_hash": "p", "hash": "h"}
    moment = MOMENT.replace(microsecond=0).astimezone(timezone(timedelta(hours=5, minutes=45)))
    with engine.connect() as connection:
        elsewhere(connection, hours)
        connection.execute(EVENTS.insert().values(values | {"occurred_at": for_database(connection, moment)}))
        connection.commit()
    with engine.connect() as connection:
        assert as_utc(connection.execute(select(EVENTS.c.occurred_at)).scalar_one()) == moment


def test_a_time_without_a_zone_is_utc_and_one_with_is_told_in_utc() -> None:
    assert as_utc(MOMENT.replace(tzinfo=None)) == MOMENT
    moved = MOMENT.astimezone(timezone(timedelta(hours=-7)))
    assert as_utc(moved) == MOMENT
    assert as_utc(moved).utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("dialect", "written"),
    [
        (postgresql, "clock_timestamp()"),
        (sqlite, "strftime('%Y-%m-%d %H:%M:%f', 'now')"),
        (mysql, "UTC_TIMESTAMP(6)"),
        (mssql, "CURRENT_TIMESTAMP"),
        (oracle, "CURRENT_TIMESTAMP"),
    ],
    ids=lambda value: getattr(value, "__name__", "").rpartition(".")[2],
)
def test_each_database_is_asked_in_its_own_words(dialect: Any, written: str) -> None:
    assert str(select(database_now()).compile(dialect=dialect.dialect())).startswith(f"SELECT {written} AS ")


def test_the_processs_clock_only_goes_on() -> None:
    read = [process_clock() for _ in range(1000)]
    assert read == sorted(read)


def test_the_processs_clock_goes_on_while_the_machine_sleeps() -> None:
    """The clock that stands still meanwhile is not the one that is read."""
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= process_clock() <= time.clock_gettime(time.CLOCK_BOOTTIME)
