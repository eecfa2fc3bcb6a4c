"""What only a database driver can tell of a connection, or can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Dialect

from .wrapping import Blocking, run_here

T = TypeVar("T")

_SERVER_STATUS_IN_TRANS: Final = 1  # of MySQL's protocol

_IN_TRANSACTION: Final[dict[str, Callable[[Any], bool]]] = {
    "psycopg": lambda driver: driver.info.transaction_status != 0,
    "psycopg_async": lambda driver: driver.info.transaction_status != 0,
    "psycopg2": lambda driver: driver.info.transaction_status != 0,
    "asyncpg": lambda driver: driver.is_in_transaction(),
    "pysqlite": lambda driver: driver.in_transaction,
    "aiosqlite": lambda driver: driver.in_transaction,
    "pymysql": lambda driver: bool(driver.server_status & _SERVER_STATUS_IN_TRANS),
}


def is_idle(connection: Connection) -> bool | None:
    """Tell whether the driver has no transaction open; ``None`` where it is not known how to ask it."""
    ask = _IN_TRANSACTION.get(connection.dialect.driver)
    return None if ask is None else not ask(connection.connection.driver_connection)


def is_autocommit(connection: Connection) -> bool:
    """Tell whether each statement is a transaction of its own."""
    dbapi_connection: Any = connection.connection.dbapi_connection
    # PyMySQL's is a method that sets it.
    ask = getattr(dbapi_connection, "get_autocommit", None)
    return bool(ask()) if ask is not None else getattr(dbapi_connection, "autocommit", False) is True


def knows_binary(dialect: Dialect) -> bool:
    """Tell whether the cursors of a driver can be asked for PostgreSQL's binary format."""
    return dialect.driver == "psycopg" and not dialect.is_async


def ask_for_binary(cursor: Any) -> None:
    """Have a cursor ask for all columns of its next result in binary."""
    cursor.format = 1  # psycopg.pq.Format.BINARY


def blocking_for(connection: Connection) -> Blocking:
    """Return what runs a call to the KMS for a connection, off the event loop where its driver has one."""
    if not connection.dialect.is_async:
        return run_here

    import asyncio  # noqa: PLC0415 - synchronous programs do without

    from sqlalchemy.util import await_only  # noqa: PLC0415 - as above

    def in_thread(function: Callable[[], T], /) -> T:
        return await_only(asyncio.to_thread(function))

    return in_thread


@contextmanager
def waiting_briefly(connection: Connection, milliseconds: int) -> Iterator[None]:
    """Bound the wait for SQLite's one lock on writing; elsewhere nobody else holds what is waited for."""
    if connection.dialect.name != "sqlite":
        yield
        return
    before = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {milliseconds}")
    try:
        yield
    finally:
        if not connection.invalidated:  # by an interrupt, which must not become another error
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {before}")
