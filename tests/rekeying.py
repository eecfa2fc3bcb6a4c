"""What the tests of counting and re-encrypting have in common: two keys, and tables of values under them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from sqlalchemy import Column, Connection, Engine, Integer, MetaData, Table, create_engine, event, select, update
from sqlalchemy.types import TypeEngine

from sqlalchemy_kravn_crypto.ciphertext import ColumnName, to_text
from sqlalchemy_kravn_crypto.clock import as_utc, read_database_time
from sqlalchemy_kravn_crypto.columns import TEXT, frame_of
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from sqlalchemy_kravn_crypto.known_columns import KnownColumn
from sqlalchemy_kravn_crypto.schema import TABLES
from sqlalchemy_kravn_crypto.types import EncryptedJSON

OLD_KEY = DataKey(b"o" * 32)
NEW_KEY = DataKey(b"n" * 32)
OLD = Keyring(OLD_KEY)
NEW = Keyring(NEW_KEY, [OLD_KEY])
ONLY_NEW = Keyring(NEW_KEY)


class WatchedKeyring(Keyring):
    """Calls a function before the first value of a batch is re-encrypted: after it was read, before it is replaced."""

    def __init__(self, primary: DataKey, others: Iterable[DataKey], meanwhile: Callable[[], None]) -> None:
        super().__init__(primary, others)
        self.meanwhile: Callable[[], None] | None = meanwhile

    def reencryptor(self, name: ColumnName, earlier: Iterable[ColumnName] = ()) -> Callable[[bytes], bytes]:
        reencrypt = super().reencryptor(name, earlier)

        def watched(frame: bytes) -> bytes:
            if self.meanwhile is not None:
                meanwhile, self.meanwhile = self.meanwhile, None
                meanwhile()
            return reencrypt(frame)

        return watched


def engine_of(url: str, **options: Any) -> Engine:
    """Return an engine whose database has the tables of this package, all of them empty."""
    made = create_engine(url, **options)
    TABLES.keys.metadata.create_all(made)
    return made


def known_column(storage: str = "binary", *, table: str = "a", schema: str = "", earlier: Iterable[str] = ()) -> Any:
    return KnownColumn(schema, table, "secret", storage, f"{table}.secret", tuple(earlier))


def stored(keyring: Keyring, payload: bytes, storage: str = "binary", name: str = "a.secret") -> Any:
    """Return a value as it is stored."""
    frame = keyring.encrypt(payload, ColumnName(name))
    return to_text(frame) if storage == TEXT else frame


def opened(keyring: Keyring, value: Any, storage: str = "binary", name: str = "a.secret") -> bytes:
    """Return the payload of a value as it is stored."""
    return keyring.decrypt(frame_of(value, storage, name), ColumnName(name))


def table_of(
    engine: Engine, storage: str = "binary", *keys: Column[Any], name: str = "a", schema: str | None = None
) -> Table:
    """Create a table with a primary key and a column `secret`, of the type that the database gets for it."""
    type_: TypeEngine[Any] = EncryptedJSON(storage=storage).load_dialect_impl(engine.dialect)
    ids = keys or (Column("id", Integer, primary_key=True, autoincrement=False),)
    table = Table(name, MetaData(), *ids, Column("secret", type_), schema=schema)
    table.create(engine)
    return table


def fill(engine: Engine, table: Table, values: Iterable[Any]) -> None:
    """Insert values, with ids from 0."""
    rows = [{"id": number, "secret": value} for number, value in enumerate(values)]
    with engine.begin() as connection:
        connection.execute(table.insert(), rows)


def values_of(connection: Connection, table: Table) -> list[Any]:
    """Return the stored values in the order of the primary key."""
    found = connection.execute(select(table.c.secret).order_by(*table.primary_key.columns)).scalars()
    return list(found)


def contents(engine: Engine, table: Table) -> list[Any]:
    with engine.connect() as connection:
        return values_of(connection, table)


def payloads(keyring: Keyring, values: Iterable[Any], storage: str = "binary") -> list[bytes]:
    return [opened(keyring, value, storage) for value in values]


def statements_of(engine: Engine) -> list[str]:
    """Return the list that every statement from now on is added to."""
    seen: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def _see(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(" ".join(statement.split()))

    return seen


# --- Workers ---------------------------------------------------------------------------------------------------------


def ready(engine: Engine) -> Connection:
    """Connect as a worker does."""
    made = engine.connect()
    return made if engine.dialect.name == "sqlite" else made.execution_options(isolation_level="READ COMMITTED")


def let_leases_lapse(engine: Engine) -> None:
    """Do to the ledger what the passing of time does."""
    with engine.begin() as connection:
        past = read_database_time(connection).replace(tzinfo=None) - timedelta(seconds=1)
        if engine.dialect.name == "postgresql":
            past = as_utc(past)
        connection.execute(
            update(TABLES.rekeys).where(TABLES.rekeys.c.leased_until.is_not(None)).values(leased_until=past)
        )


def at_once(number: int, action: Any) -> list[Any]:
    """Call a function with numbers from 0 in as many threads at once, and return what they return."""
    barrier, results, failures = threading.Barrier(number), list[Any](), list[BaseException]()

    def run(which: int) -> None:
        try:
            barrier.wait(30)
            results.append(action(which))
        except BaseException as error:  # noqa: BLE001 - of another thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(which,)) for which in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    return results
