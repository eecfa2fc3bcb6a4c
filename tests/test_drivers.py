"""What each driver tells of a connection, and how a process looks with the asynchronous ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from sqlalchemy_kravn_crypto import configure_async, reset
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.drivers import blocking_for, is_autocommit, is_idle, waiting_briefly
from sqlalchemy_kravn_crypto.lifecycle import promote, rotate
from sqlalchemy_kravn_crypto.replicas import read_replicas
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.wrapping import run_here
from tests.fixtures_deployment import NOTES, Deployment

SYNCHRONOUS = ["postgresql+psycopg", "sqlite+pysqlite", "mariadb+pymysql"]
ASYNCHRONOUS = ["postgresql+asyncpg", "postgresql+psycopg_async", "sqlite+aiosqlite"]


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """Give a database for the driver that is the parameter of the test."""
    driver: str = request.param
    fixture = {"postgresql": "postgres_url", "sqlite": "sqlite_url", "mariadb": "mariadb_url"}[driver.partition("+")[0]]
    found = make_url(request.getfixturevalue(fixture)).set(drivername=driver)
    return found.render_as_string(hide_password=False)


def see_a_transaction(connection: Connection) -> None:
    """See that a driver tells an open transaction from none."""
    assert is_idle(connection) is True
    connection.execute(text("CREATE TABLE number (number INTEGER)"))
    connection.commit()
    assert is_idle(connection) is True
    connection.execute(text("INSERT INTO number VALUES (1)"))
    assert is_idle(connection) is False
    connection.rollback()
    assert is_idle(connection) is True
    connection.execute(text("INSERT INTO number VALUES (1)"))
    connection.commit()
    assert is_idle(connection) is True
    assert is_autocommit(connection) is False


@pytest.mark.parametrize("url", SYNCHRONOUS, indirect=True)
def test_a_driver_tells_whether_a_transaction_is_open(url: str) -> None:
    engine = create_engine(url)
    with engine.connect() as connection:
        see_a_transaction(connection)
        assert blocking_for(connection) is run_here
    engine.dispose()


@pytest.mark.parametrize("url", ASYNCHRONOUS, indirect=True)
def test_an_asynchronous_driver_tells_whether_a_transaction_is_open(url: str) -> None:
    async def run() -> None:
        engine = create_async_engine(url)
        async with engine.connect() as connection:
            await connection.run_sync(see_a_transaction)
        await engine.dispose()

    asyncio.run(run())


@pytest.mark.parametrize("url", ["postgresql+psycopg", "mariadb+pymysql"], indirect=True)
def test_a_driver_tells_whether_it_commits_by_itself(url: str) -> None:
    """That of SQLite does not: there it shows after a statement that writes."""
    engine = create_engine(url)
    with engine.connect() as connection:
        assert is_autocommit(connection) is False
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        assert is_autocommit(connection) is True
    with engine.connect() as connection:
        assert is_autocommit(connection) is False
    engine.dispose()


@pytest.mark.parametrize("url", ["postgresql+asyncpg", "postgresql+psycopg_async"], indirect=True)
def test_an_asynchronous_driver_tells_whether_it_commits_by_itself(url: str) -> None:
    async def run() -> list[bool]:
        engine = create_async_engine(url)
        found = []
        for level in ("READ COMMITTED", "AUTOCOMMIT"):
            async with engine.execution_options(isolation_level=level).connect() as connection:
                found.append(await connection.run_sync(is_autocommit))
        await engine.dispose()
        return found

    assert asyncio.run(run()) == [False, True]


@pytest.mark.parametrize("url", ["sqlite+pysqlite"], indirect=True)
def test_of_a_driver_that_is_not_known_it_is_not_known(url: str) -> None:
    engine = create_engine(url)
    engine.dialect.driver = "unheard-of"
    with engine.connect() as connection:
        assert is_idle(connection) is None
    engine.dispose()


@pytest.mark.parametrize("url", ASYNCHRONOUS, indirect=True)
def test_what_blocks_runs_in_another_thread_where_there_is_an_event_loop(url: str) -> None:
    def runs_in(connection: Connection) -> tuple[Any, Any]:
        return blocking_for(connection)(threading.get_ident), threading.get_ident()

    async def run() -> tuple[Any, Any]:
        engine = create_async_engine(url)
        async with engine.connect() as connection:
            found = await connection.run_sync(runs_in)
        await engine.dispose()
        return found

    there, here = asyncio.run(run())
    assert there != here


def test_the_wait_for_sqlites_lock_is_as_before_afterwards(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, connect_args={"timeout": 7})
    with engine.connect() as connection:
        with waiting_briefly(connection, 200):
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 200
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 7000
        with pytest.raises(ZeroDivisionError), waiting_briefly(connection, 200):
            raise ZeroDivisionError
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 7000
    engine.dispose()


@pytest.mark.parametrize("url", ["postgresql+psycopg", "mariadb+pymysql"], indirect=True)
def test_elsewhere_there_is_no_such_lock(url: str) -> None:
    engine = create_engine(url)
    with engine.connect() as connection, waiting_briefly(connection, 200):
        assert is_idle(connection) is True
    engine.dispose()


# --- A look with each asynchronous driver -----------------------------------------------------------------------------


@pytest.fixture
def shared(url: str, tmp_path: Path) -> Iterator[Deployment]:
    synchronous = {"asyncpg": "postgresql+psycopg", "psycopg_async": "postgresql+psycopg", "aiosqlite": "sqlite"}
    parsed = make_url(url)
    engine = create_engine(parsed.set(drivername=synchronous[parsed.get_driver_name()]))
    yield Deployment(engine, tmp_path)
    reset()
    engine.dispose()


@pytest.mark.parametrize("fence", ["lease", "transaction"])
@pytest.mark.parametrize("url", ASYNCHRONOUS, indirect=True)
def test_a_process_looks_with_every_asynchronous_driver(shared: Deployment, url: str, fence: str) -> None:
    settings = Settings(data_dir=shared.secret_file.parent, look_interval=0.05, fence=fence)

    def holders(key_id: str) -> list[bool]:
        with shared.engine.connect() as connection:
            return [key_id in replica.key_ids for replica in read_replicas(connection)]

    async def run() -> None:
        engine = create_async_engine(url)
        await configure_async(engine, settings, provider=shared.kms)
        loop_thread, asked = threading.get_ident(), []
        shared.kms.asked = lambda _: asked.append(threading.get_ident())
        async with engine.begin() as connection:
            await connection.execute(insert(NOTES), [{"id": 1, "content": {"number": 1}}])
        made = await asyncio.to_thread(rotate, shared.operator())
        assert made is not None
        key_id = made.required("key_id")
        asked.clear()
        while await asyncio.to_thread(holders, key_id) != [True]:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
        # The KMS was asked, and the loop did not wait for it.
        assert asked
        assert loop_thread not in asked
        await asyncio.to_thread(promote, shared.operator())
        while current_keyring().primary_key_id != key_id:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
        async with engine.begin() as connection:
            rows = (await connection.execute(select(NOTES))).all()
        assert [row.content for row in rows] == [{"number": 1}]
        await engine.dispose()

    asyncio.run(asyncio.wait_for(run(), 60))
