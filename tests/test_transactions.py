"""Which transactions were open at a moment, on each kind of database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, text

from sqlalchemy_kravn_crypto.transactions import mark, open_since

NUMBERS = Table("number", MetaData(), Column("number", Integer))


@pytest.fixture(params=["postgres_url", "mariadb_url"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = create_engine(request.getfixturevalue(request.param))
    NUMBERS.create(made)
    yield made
    made.dispose()


def eventually(condition: Callable[[], Any]) -> None:
    """Wait until it is so: MariaDB's own list of transactions is a tenth of a second old for who asks often."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def marked(engine: Engine) -> str:
    with engine.connect() as connection:
        return mark(connection)


def still_open(engine: Engine, moment: str) -> list[str]:
    with engine.connect() as connection:
        return open_since(connection, moment)


def test_a_transaction_that_writes_is_open_until_it_ends(engine: Engine) -> None:
    eventually(lambda: still_open(engine, marked(engine)) == [])
    with engine.connect() as writer:
        writer.execute(NUMBERS.insert().values(number=1))
        moment = marked(engine)
        eventually(lambda: still_open(engine, moment))
        (found,) = still_open(engine, moment)
        kind, ask = (
            ("backend", "pg_backend_pid") if engine.dialect.name == "postgresql" else ("thread", "CONNECTION_ID")
        )
        assert found == f"{kind} {writer.execute(text(f'SELECT {ask}()')).scalar_one()}"
        assert still_open(engine, moment) == [found]
        writer.commit()
    eventually(lambda: still_open(engine, moment) == [])


def test_a_transaction_that_begins_later_does_not_count(engine: Engine) -> None:
    eventually(lambda: still_open(engine, marked(engine)) == [])
    with engine.connect() as first:
        first.execute(NUMBERS.insert().values(number=1))
        moment = marked(engine)
        first.commit()
        time_of_mark = time.monotonic()
        # MariaDB knows since when a transaction is open to the second.
        eventually(lambda: time.monotonic() > time_of_mark + 1)
        with engine.connect() as later:
            later.execute(NUMBERS.insert().values(number=2))
            eventually(lambda: still_open(engine, marked(engine)))
            assert still_open(engine, moment) == []


def test_the_transaction_that_asks_is_not_one_of_them(engine: Engine) -> None:
    eventually(lambda: still_open(engine, marked(engine)) == [])
    with engine.connect() as connection:
        connection.execute(NUMBERS.insert().values(number=1))
        moment = mark(connection)
        connection.commit()
        connection.execute(NUMBERS.insert().values(number=2))
        eventually(lambda: open_since(connection, moment) == [])


def test_a_rollback_ends_it_too(engine: Engine) -> None:
    with engine.connect() as writer:
        writer.execute(NUMBERS.insert().values(number=1))
        moment = marked(engine)
        eventually(lambda: still_open(engine, moment))
        writer.rollback()
    eventually(lambda: still_open(engine, moment) == [])


def test_a_prepared_transaction_is_open_though_nobody_is_connected(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    NUMBERS.create(engine)
    with engine.connect() as connection:
        connection.execute(NUMBERS.insert().values(number=1))
        moment = marked(engine)
        connection.execute(text("PREPARE TRANSACTION 'prepared'"))
    engine.dispose()
    assert still_open(engine, moment) == ["a prepared transaction"]
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("COMMIT PREPARED 'prepared'"))
    assert still_open(engine, moment) == []
    engine.dispose()


@pytest.mark.parametrize("others", [0, 1, 3])
def test_the_newest_transaction_counts_like_the_ones_before(postgres_url: str, others: int) -> None:
    engine = create_engine(postgres_url)
    NUMBERS.create(engine)
    with ExitStack() as open_ones:
        writers = [open_ones.enter_context(engine.connect()) for _ in range(others + 1)]
        for writer in writers:
            writer.execute(NUMBERS.insert().values(number=1))
        moment = marked(engine)
        for writer in writers[:-1]:
            writer.commit()
        number = writers[-1].execute(text("SELECT pg_backend_pid()")).scalar_one()
        with engine.begin() as connection:  # others go on meanwhile
            connection.execute(NUMBERS.insert().values(number=2))
        assert still_open(engine, moment) == [f"backend {number}"]
        writers[-1].commit()
        assert still_open(engine, moment) == []
    engine.dispose()


def test_on_sqlite_there_are_none_for_who_holds_its_lock(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    NUMBERS.create(engine)
    with engine.connect() as connection:
        connection.execute(NUMBERS.insert().values(number=1))
        moment = mark(connection)
        assert moment == ""
        assert open_since(connection, moment) == []
    engine.dispose()


def test_those_that_began_later_are_not_named(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    NUMBERS.create(engine)
    with engine.connect() as first, engine.connect() as later:
        first.execute(NUMBERS.insert().values(number=1))
        moment = marked(engine)
        later.execute(NUMBERS.insert().values(number=2))
        number = first.execute(text("SELECT pg_backend_pid()")).scalar_one()
        assert still_open(engine, moment) == [f"backend {number}"]
    engine.dispose()
