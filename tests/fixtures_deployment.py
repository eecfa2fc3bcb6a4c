"""A deployment for the tests of a key's life: a database with a key store, a KMS, and what others do to both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, delete, insert, select, text, update

from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret
from sqlalchemy_kravn_crypto.changes import Operator
from sqlalchemy_kravn_crypto.ciphertext import ColumnName
from sqlalchemy_kravn_crypto.clock import as_utc, for_database
from sqlalchemy_kravn_crypto.events import Event, hash_of, read_events
from sqlalchemy_kravn_crypto.keyring import Keyring
from sqlalchemy_kravn_crypto.keystore import KeyStore, Opened
from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey
from sqlalchemy_kravn_crypto.replicas import beat, new_replica_id
from sqlalchemy_kravn_crypto.rows import KeyRow, MacKey, StoredRows, connect, read_rows, write_rows
from sqlalchemy_kravn_crypto.schema import TABLES, State
from sqlalchemy_kravn_crypto.types import EncryptedJSON
from tests.misbehaving_kms import MisbehavingKMS

ROOT = bytes(range(32))
BOOTSTRAP = BootstrapSecret._from_root("file", ROOT)
NAME = ColumnName("deployed_note.content")
METADATA = MetaData()
NOTES = Table(
    "deployed_note", METADATA, Column("id", Integer, primary_key=True), Column("content", EncryptedJSON, nullable=True)
)
LEASE = 180.0


class VersionedKMS(MisbehavingKMS):
    """A KMS whose master key has versions, and which tells when it is asked for something."""

    def __init__(self, name: str = "vault", *, mount: str = "transit", authenticates: bool = True) -> None:
        super().__init__(name=name, authenticates=authenticates)
        self.mount = mount
        self.version = 1
        self.asked: Callable[[str], None] = lambda _: None

    @property
    def master_key(self) -> str:
        return f"{self.mount}/kravn"

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        wrapped = super().wrap(data_key, binding, deadline)
        return replace(wrapped, master_key=f"{self.master_key}:v{self.version}")

    def _answer(self, operation: str) -> None:
        super()._answer(operation)
        self.asked(operation)


class Deployment:
    """One database with its key store, made with ``secret.key`` and a KMS that is in this process."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self.engine = engine
        self.kms = VersionedKMS()
        self.secret_file = directory / "secret.key"
        self.secret_file.write_text(ROOT.hex())
        self.secret_file.chmod(0o600)
        TABLES.keys.metadata.create_all(engine)
        METADATA.create_all(engine)

    # --- The processes of it ---

    def store(self, **settings: Any) -> KeyStore:
        given = {"provider": self.kms, "secret": None, "secret_file": self.secret_file, **settings}
        return KeyStore(**given)

    def open(self, **settings: Any) -> Opened:
        return self.store(**settings).open(self.engine)

    def operator(self, *, store: KeyStore | None = None, **others: Any) -> Operator:
        return Operator(engine=self.engine, store=store or self.store(), **{"lease": LEASE, **others})

    def heartbeat(
        self,
        *,
        holds: Collection[str],
        under: str,
        lease: float = LEASE,
        mac_key_ids: Collection[str] = (),
        age: float = 0.0,
    ) -> str:
        """Be another process, that last looked some seconds ago."""
        replica_id = new_replica_id()
        with self.engine.begin() as connection:
            beat(
                connection,
                replica_id,
                epoch=1,
                primary_key_id=under,
                key_ids=holds,
                mac_key_ids=mac_key_ids,
                lease=lease,
            )
            seen_at = connection.execute(
                select(TABLES.replicas.c.seen_at).where(TABLES.replicas.c.replica_id == replica_id)
            ).scalar_one()
            aged = update(TABLES.replicas).where(TABLES.replicas.c.replica_id == replica_id)
            connection.execute(aged.values(seen_at=seen_at - timedelta(seconds=age)))
        return replica_id

    # --- What is there ---

    def rows(self) -> StoredRows:
        with connect(self.engine) as connection:
            return read_rows(connection)

    def states(self) -> dict[str, State]:
        return {row.required("key_id"): row.state for row in self.rows().keys}

    def row(self, key_id: str) -> KeyRow:
        found = self.rows().key(key_id)
        assert found is not None
        return found

    def key_id(self, state: State) -> str:
        found = self.rows().in_state(state)
        assert found is not None
        return found.required("key_id")

    def events(self) -> list[Event]:
        """Return the audit trail, verified."""
        rows = self.rows()
        with connect(self.engine) as connection:
            return read_events(connection, None if rows.control is None else rows.control.events_hash)

    def actions(self) -> list[str]:
        return [event.action for event in self.events()]

    def everything(self) -> tuple[StoredRows, list[Event]]:
        """Return what a command that refuses leaves as it is."""
        return self.rows(), self.events()

    # --- Values ---

    def put(self, number: int, keyring: Keyring) -> None:
        self.put_frame(number, keyring.encrypt(f'\x01{{"number":{number}}}'.encode(), NAME))

    def put_under(self, number: int, key_id: str) -> None:
        key = self.open().keyring.data_key(key_id)
        assert key is not None
        self.put(number, Keyring(key))

    def put_frame(self, number: int, frame: bytes) -> None:
        with self.engine.begin() as connection:
            statement = text("INSERT INTO deployed_note (id, content) VALUES (:id, :content)")
            connection.execute(statement, {"id": number, "content": frame})

    def take_away_values(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(delete(NOTES))

    # --- What others do to it ---

    def tamper(self, row_id: int, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(update(TABLES.keys).where(TABLES.keys.c.id == row_id).values(values))

    def rewrite_events(self, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        """Write the trail anew, without a hash that is made for it."""
        events = TABLES.events
        with self.engine.begin() as connection:
            stored = [dict(row) for row in connection.execute(select(events).order_by(events.c.id)).mappings()]
            connection.execute(delete(events))
            connection.execute(insert(events), change(stored))

    def let_pass(self, seconds: float) -> None:
        """Let all that is in the audit trail have happened so much earlier, and sign it as if it had."""
        before = self.rows()
        newest = [before.in_control().events_hash]

        def earlier(stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
            newest[0] = "0" * 64
            with self.engine.connect() as connection:
                for values in stored:
                    moved: datetime = values["occurred_at"] - timedelta(seconds=seconds)
                    values |= {"occurred_at": moved, "previous_hash": newest[0]}
                    values["hash"] = newest[0] = hash_of(values | {"occurred_at": as_utc(moved)})
                    values["occurred_at"] = for_database(connection, as_utc(moved))
            return stored

        self.rewrite_events(earlier)
        after = replace(before, control=replace(before.in_control(), events_hash=newest[0]))
        with self.engine.begin() as connection:
            write_rows(connection, before, MacKey(BOOTSTRAP.mac_key).sign(after))


@pytest.fixture
def deployment(any_database_url: str, tmp_path: Path) -> Iterator[Deployment]:
    """Give a deployment on each kind of database, whose first process has not started yet."""
    engine = create_engine(any_database_url)
    yield Deployment(engine, tmp_path)
    engine.dispose()


@pytest.fixture
def running(deployment: Deployment) -> Deployment:
    """Give a deployment that has its first data key."""
    deployment.open()
    return deployment


@pytest.fixture
def sqlite_deployment(sqlite_url: str, tmp_path: Path) -> Iterator[Deployment]:
    """Give a running deployment on SQLite, where one kind of database will do."""
    engine = create_engine(sqlite_url)
    made = Deployment(engine, tmp_path)
    made.open()
    yield made
    engine.dispose()
