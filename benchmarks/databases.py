"""The databases: SQLite in memory, and a PostgreSQL server of this run's own with psycopg."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from pydantic import SecretStr
from sqlalchemy import JSON, URL, Engine, create_engine, event, make_url, text
from sqlalchemy.orm import registry
from sqlalchemy.pool import StaticPool
from sqlalchemy.schema import Column, Table
from sqlalchemy.types import Integer, TypeEngine

from sqlalchemy_kravn_crypto import EncryptedJSON, configure, kms_tables, reset
from sqlalchemy_kravn_crypto.drivers import ask_for_binary, knows_binary
from sqlalchemy_kravn_crypto.settings import Provider, Settings

from .floor import FLOOR, Floor

OURS: Final = "EncryptedJSON"
PLAIN: Final = "JSON"
_TYPES: Final[dict[str, Callable[[], TypeEngine[Any]]]] = {OURS: EncryptedJSON, PLAIN: JSON, FLOOR: Floor}


@dataclass(frozen=True, slots=True)
class Store:
    """A table of two columns, the second of which holds documents, and the class that is mapped to it."""

    name: str
    engine: Engine
    table: Table
    model: type[Any]

    def clear(self) -> None:
        """Delete all rows."""
        statement = "DELETE FROM" if self.engine.dialect.name == "sqlite" else "TRUNCATE"
        with self.engine.begin() as connection:
            connection.execute(text(f"{statement} {self.table.name}"))


def store_of(name: str, engine: Engine) -> Store:
    """Return the table of one of the column types."""
    mapper_registry = registry()
    type_ = _TYPES[name]()
    table = Table(
        f"rows_{name.lower()}",
        mapper_registry.metadata,
        Column("id", Integer, primary_key=True),
        Column("document", type_),
    )
    model = type(name, (), {})
    mapper_registry.map_imperatively(model, table)
    return Store(name, engine, table, model)


@contextmanager
def open_stores(url: URL, settings: Settings, *others: str) -> Iterator[list[Store]]:
    """Have a table with encrypted documents, and one of each of the other types, each with an engine of its own.

    The process is configured for the first as a program would do it, so the guards of the package are in place.
    """
    with ExitStack() as stack:
        stores = [store_of(name, stack.enter_context(_engine(url))) for name in (OURS, *others)]
        kms_tables(stores[0].table.metadata)
        for store in stores:
            store.table.metadata.create_all(store.engine)
        stack.callback(reset)
        configure(stores[0].engine, settings)
        for store in stores:
            if store.name == FLOOR and knows_binary(store.engine.dialect):
                # What the package does for its own type; here are but numbers and bytes, so it always may.
                event.listen(store.engine, "before_cursor_execute", lambda _, cursor, *__: ask_for_binary(cursor))
        yield stores


@dataclass(frozen=True, slots=True)
class Database:
    """A kind of database."""

    name: str
    serve: Callable[[], AbstractContextManager[URL]]
    """Have one that is empty; its URL."""

    @contextmanager
    def stores(self) -> Iterator[list[Store]]:
        """Have the tables of all types in one of its own, under a key that is made for it."""
        settings = Settings(kms_provider=Provider.NONE, secret=SecretStr(secrets.token_hex(32)))
        with self.serve() as url, open_stores(url, settings, PLAIN, FLOOR) as stores:
            yield stores


@contextmanager
def _engine(url: URL) -> Iterator[Engine]:
    # One connection is enough, and SQLite's memory has just this one.
    engine = create_engine(url, poolclass=StaticPool)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _memory() -> Iterator[URL]:
    yield make_url("sqlite://")


@contextmanager
def _postgresql() -> Iterator[URL]:
    from tests.postgres import fresh_database, postgres_serving  # noqa: PLC0415 - only where there is to be one

    with postgres_serving().serve() as server, fresh_database(server) as url:
        yield url


SQLITE: Final = Database("SQLite", _memory)
POSTGRESQL: Final = Database("PostgreSQL", _postgresql)
