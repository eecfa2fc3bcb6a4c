"""A PostgreSQL table of documents under a data key that is retired, and processes that move them to the next one."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from pydantic import SecretStr
from sqlalchemy import Engine, create_engine, insert, text
from sqlalchemy.schema import Table

from sqlalchemy_kravn_crypto import configure, kms_tables, reset
from sqlalchemy_kravn_crypto.configuration import operator
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, declared
from sqlalchemy_kravn_crypto.lifecycle import promote, rotate_secret
from sqlalchemy_kravn_crypto.settings import Provider, Settings

from .databases import OURS, POSTGRESQL, Store, store_of
from .documents import KINDS, Documents
from .processes import Helper, helper

KIND: Final = "190 B"
_DISTINCT: Final = 10_000
"""How many documents there are; a longer table has each of them several times."""


@dataclass(frozen=True, slots=True)
class Rotated:
    """The table. This process is configured for it, and encrypts under the new data key.

    :ivar environment: the settings of another process that is to be configured for it.
    """

    engine: Engine
    table: Table
    environment: Mapping[str, str]

    @property
    def columns(self) -> list[KnownColumn]:
        """What there is to move and to count: the documents."""
        return declared(self.table.metadata)

    @property
    def url(self) -> str:
        """Where it is."""
        return self.engine.url.render_as_string(hide_password=False)

    def fill(self, stale: int, fresh: int = 0) -> None:
        """Have so many rows under the old key, behind them so many under the new one, and no others."""
        with self.engine.begin() as connection:
            connection.execute(text(f"TRUNCATE {self.table.name}"))
            for state, first, last in (("stale", 1, stale), ("fresh", stale + 1, stale + fresh)):
                connection.execute(
                    text(
                        f"INSERT INTO {self.table.name} SELECT number, document "  # noqa: S608 - names of this module
                        "FROM generate_series(CAST(:first AS integer), CAST(:last AS integer)) AS number "
                        f"JOIN {state} ON id = number % :distinct + 1 ORDER BY number"
                    ),
                    {"first": first, "last": last, "distinct": _DISTINCT},
                )
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f"VACUUM (ANALYZE) {self.table.name}"))
            connection.execute(text("CHECKPOINT"))

    def add_index(self) -> None:
        """Have another column and an index on it, as the tables of programs do."""
        with self.engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE {self.table.name} ADD name text DEFAULT md5(random()::text)"))
            connection.execute(text(f"CREATE INDEX ON {self.table.name} (name)"))

    def worker(self, rows_per_second: float | None = None) -> AbstractContextManager[Helper]:
        """Have a process that re-encrypts all that is stale whenever it is told to.

        It prints how many values it has replaced, and how many bytes of memory it has had at its peak.
        """
        throttle = () if rows_per_second is None else (str(rows_per_second),)
        return helper("rekeying", self.url, *throttle, environment=self.environment)


@contextmanager
def rotated_table() -> Iterator[Rotated]:
    """Have such a table, empty, in a server of its own."""
    old, new = (secrets.token_hex(32) for _ in range(2))
    before = Settings(kms_provider=Provider.NONE, secret=SecretStr(old), secret_next=SecretStr(new))
    after = Settings(kms_provider=Provider.NONE, secret=SecretStr(new), secret_retired=SecretStr(old))
    with ExitStack() as stack:
        engine = create_engine(stack.enter_context(POSTGRESQL.serve()))
        stack.callback(engine.dispose)
        stack.callback(reset)
        store = store_of(OURS, engine)
        kms_tables(store.table.metadata)
        store.table.metadata.create_all(engine)
        configure(engine, before)
        _keep(store, "stale")
        reset()
        commands = operator(engine, before)
        rotate_secret(commands)
        promote(commands)
        configure(engine, after)
        _keep(store, "fresh")
        with engine.begin() as connection:
            # It would be in the way of some rounds, and not of others.
            connection.execute(text(f"ALTER TABLE {store.table.name} SET (autovacuum_enabled = off)"))
        yield Rotated(engine, store.table, {"KRAVN_SECRET": new, "KRAVN_SECRET_RETIRED": old})


def _keep(store: Store, name: str) -> None:
    """Have a table of the documents as they are encrypted now."""
    documents = Documents(KINDS[KIND], _DISTINCT).fresh()
    rows = [{"id": number, "document": document} for number, document in enumerate(documents, 1)]
    with store.engine.begin() as connection:
        connection.execute(insert(store.table), rows)
        connection.execute(text(f"CREATE TABLE {name} AS SELECT * FROM {store.table.name}"))  # noqa: S608 - as above
    store.clear()
