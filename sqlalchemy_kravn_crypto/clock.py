"""Two clocks: the database's, which all processes share, and this process's, which only measures how long ago it was.

No time of one machine is ever compared with a time of another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, DateTime, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

Clock = Callable[[], float]
"""Seconds since an arbitrary moment."""


# On Linux the monotonic clock stands still while the machine is suspended; a lease must run out meanwhile.
process_clock: Final[Clock] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
"""The seconds of this process, that go on while it is stopped and while the machine sleeps."""


class database_now(FunctionElement[datetime]):  # noqa: N801 - a function of SQL
    """The database's time, now and not at the start of the transaction, in UTC."""

    type = DateTime(timezone=True)
    inherit_cache = True


@compiles(database_now)
def _now(_element: Any, _compiler: Any, **_: Any) -> str:
    return "CURRENT_TIMESTAMP"


@compiles(database_now, "postgresql")
def _now_postgresql(_element: Any, _compiler: Any, **_: Any) -> str:
    return "clock_timestamp()"


@compiles(database_now, "sqlite")
def _now_sqlite(_element: Any, _compiler: Any, **_: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f', 'now')"


@compiles(database_now, "mysql")
@compiles(database_now, "mariadb")
def _now_mysql(_element: Any, _compiler: Any, **_: Any) -> str:
    return "UTC_TIMESTAMP(6)"


def read_database_time(connection: Connection) -> datetime:
    """Return the database's time, with its zone, to the second below."""
    now = as_utc(connection.execute(select(database_now())).scalar_one())
    return now.replace(microsecond=0)


def as_utc(moment: datetime) -> datetime:
    """Return a time of the database with its zone; SQLite and MariaDB give UTC without one."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def for_database(connection: Connection, moment: datetime) -> datetime:
    """Return a time as the database stores it: only PostgreSQL has a type with a zone."""
    moment = moment.astimezone(UTC)
    return moment if connection.dialect.name == "postgresql" else moment.replace(tzinfo=None)
