"""A database whose clock goes only when it is told to, so that leases and waiting periods take no time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine, create_engine, event, text

BEGINNING = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)


class DatabaseClock:
    """The clock of one database: every engine from :meth:`connected` goes by it.

    SQLite takes a function of ours in the place of its own. PostgreSQL looks for functions along the search path, where
    ``pg_catalog`` comes first only as long as it is not named.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._now = BEGINNING
        self._setting: Engine | None = None
        if not url.startswith("sqlite"):
            self._setting = create_engine(url)
            self._install(self._setting)

    def _install(self, engine: Engine) -> None:
        with engine.begin() as connection:
            database = connection.execute(text("SELECT current_database()")).scalar_one()
            connection.execute(text("CREATE TABLE test_clock (now timestamptz NOT NULL)"))
            connection.execute(text("INSERT INTO test_clock VALUES (:now)"), {"now": self._now})
            connection.execute(
                text(
                    "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE "
                    "AS 'SELECT now FROM public.test_clock'"
                )
            )
            connection.execute(text(f'ALTER DATABASE "{database}" SET search_path = public, pg_catalog'))

    def connected(self, **options: Any) -> Engine:
        """Return an engine of the database."""
        engine = create_engine(self._url, **options)
        if self._setting is None:
            event.listen(engine, "connect", self._take_the_place_of_strftime)
        return engine

    def _take_the_place_of_strftime(self, driver_connection: Any, _record: Any) -> None:
        driver_connection.create_function("strftime", -1, self._strftime)

    def _strftime(self, _format: str, _when: str, later: str = "0 seconds") -> str:
        """Return the time as the one format has it that is asked for, so many seconds later."""
        return f"{self._now + timedelta(seconds=float(later.removesuffix(' seconds'))):%Y-%m-%d %H:%M:%S.%f}"

    def pass_(self, seconds: float) -> None:
        """Let time pass."""
        self._now += timedelta(seconds=seconds)
        if self._setting is not None:
            with self._setting.begin() as connection:
                connection.execute(text("UPDATE test_clock SET now = :now"), {"now": self._now})

    def dispose(self) -> None:
        """Give back the connection that the clock is set on."""
        if self._setting is not None:
            self._setting.dispose()
