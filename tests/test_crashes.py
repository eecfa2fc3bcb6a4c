"""The end of a process at every step of every command: after each statement, around each commit, in each KMS call.

What is committed by then must be sound: one key to write under, no key without its check, no value that nobody reads, a
whole audit trail. And whoever runs the command again gets to where it would have come without the crash.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Connection, Engine, Integer, LargeBinary, MetaData, Table, event, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, following, use_keyring
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecrets
from sqlalchemy_kravn_crypto.changes import Operator
from sqlalchemy_kravn_crypto.ciphertext import parse
from sqlalchemy_kravn_crypto.events import read_events
from sqlalchemy_kravn_crypto.keyring import Keyring
from sqlalchemy_kravn_crypto.keystore import KeyStore, Opened
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, declared, record
from sqlalchemy_kravn_crypto.ledger import progress
from sqlalchemy_kravn_crypto.lifecycle import (
    Targets,
    add_standby,
    destroy,
    disable,
    enable,
    forget_column,
    promote,
    record_census,
    remove_standby,
    rewrap,
    rotate,
    rotate_secret,
    switch_to_standby,
)
from sqlalchemy_kravn_crypto.providers.base import Deadline, KeyProvider, WrappedKey
from sqlalchemy_kravn_crypto.rekey import rekey
from sqlalchemy_kravn_crypto.replicas import beat, leave
from sqlalchemy_kravn_crypto.rows import StoredRows, connect, read_rows
from sqlalchemy_kravn_crypto.schema import TABLES, State
from sqlalchemy_kravn_crypto.testing import FakeKMS
from sqlalchemy_kravn_crypto.watch import Watch, WatchSettings
from sqlalchemy_kravn_crypto.wrapping import Blocking, run_here
from tests.database_clock import DatabaseClock

SECRET = "correct horse battery staple, and forty more characters"
NEXT_SECRET = "another one that is as long, and nobody will guess either"
ROOT = bytes(range(32))
LEASE = 180.0
DAY = 86400.0
VALUES = {number: {"number": number} for number in range(1, 8)}


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "crash_note"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


STORED = Table("crash_note", MetaData(), Column("id", Integer), Column("content", LargeBinary))
NOTES = KnownColumn("", "crash_note", "content", "binary", "crash_note.content")
GONE = KnownColumn("", "gone", "secret", "binary", "gone.secret")


# --- The end of a process -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """No ``except Exception`` catches it."""


class Death:
    """Ends a process at one of its steps. Whatever it still tries after that does not reach the database."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps = self._at = 0
        self._cursors: list[Any] = []
        self.has_come = False

    def await_at(self, step: int) -> None:
        """Let it come at a step; at 0, never."""
        self._steps, self._at, self.has_come = 0, step, False
        self._cursors.clear()

    def step(self) -> bool:
        with self._lock:
            self._steps += 1
            if self._steps == self._at:
                self.has_come = True
            return self.has_come

    def strike(self) -> None:
        if self.step():
            raise Killed

    def refuse(self) -> None:
        if self.has_come:
            raise Killed

    def awaits(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let it come over what is done through an engine."""
        commit = engine.dialect.do_commit

        def commit_between_steps(connection: Any) -> None:
            self.refuse()
            self.strike()
            commit(connection)
            self.strike()

        monkeypatch.setattr(engine.dialect, "do_commit", commit_between_steps)
        event.listen(engine, "before_cursor_execute", lambda _connection, cursor, *_: self._executing(cursor))
        event.listen(engine, "after_cursor_execute", lambda *_: self._executed())

    def _executing(self, cursor: Any) -> None:
        self.refuse()
        if self._at:
            self._cursors.append(cursor)

    def _executed(self) -> None:
        if self.step():
            # The system does so; here the error's traceback would keep them, and with them SQLite's lock.
            for cursor in self._cursors:
                cursor.close()
            raise Killed


class MortalKMS(FakeKMS):
    """A KMS in whose calls a process may end, before and after the answer; and whose master key has versions."""

    def __init__(self, name: str, death: Death) -> None:
        super().__init__(name)
        self.version = 1
        self._death = death

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        self._step()
        wrapped = super().wrap(data_key, binding, deadline)
        self._step()
        return WrappedKey(f"{self.master_key}:v{self.version}", wrapped.blob)

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        self._step()
        unwrapped = super().unwrap(wrapped, binding, deadline)
        self._step()
        return unwrapped

    def _step(self) -> None:
        # The call is in a thread of its own; the process comes to its end when it goes on to the database.
        if self._death.step():
            raise errors.ProviderUnavailableError("The process has come to its end.", provider=self.name)


STRETCHED: dict[tuple[object, ...], BootstrapSecrets] = {}


class QuickStore(KeyStore):
    """A key store that stretches a secret once in all these tests and not at every step; it takes 0.2 s."""

    __slots__ = ()

    def secrets(self, rows: StoredRows, blocking: Blocking = run_here) -> BootstrapSecrets:
        if self.secret is None and self.next_secret is None:
            return super().secrets(rows, blocking)
        content = self.secret_file.read_bytes() if self.secret_file.exists() else None
        with_file = any(row.provider == "none" and row.master_key == "file" for row in rows.keys)
        asked = self.secret, self.next_secret, self.retired_secrets, content, with_file
        if asked not in STRETCHED:
            STRETCHED[asked] = super().secrets(rows, blocking)
        return STRETCHED[asked]


# --- A deployment ---------------------------------------------------------------------------------------------------


class Deployment:
    """A database with its key store and its values, seen through an engine that nothing happens to."""

    def __init__(self, url: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = DatabaseClock(url)
        self.outside = self.clock.connected()
        self.mortal = self.clock.connected()
        self.death = Death()
        self.death.awaits(self.mortal, monkeypatch)
        self.kms, self.second_kms = MortalKMS("fake", self.death), MortalKMS("second", self.death)
        self.secret_file = directory / "secret.key"
        TABLES.keys.metadata.create_all(self.outside)
        Base.metadata.create_all(self.outside)
        self._kept: list[tuple[Table, list[dict[str, Any]]]] = []
        self._kept_file: bytes | None = None

    def store(self, provider: KeyProvider | None, **options: Any) -> KeyStore:
        return QuickStore(**{"provider": provider, "secret": None, "secret_file": self.secret_file} | options)

    def operator(self, store: KeyStore, *, standby: KeyProvider | None = None, outside: bool = False) -> Operator:
        engine = self.outside if outside else self.mortal
        return Operator(engine=engine, store=store, standby=standby, lease=LEASE)

    def with_secret_file(self) -> None:
        self.secret_file.write_text(ROOT.hex())
        self.secret_file.chmod(0o600)

    def keyring(self, store: KeyStore) -> Keyring:
        return dataclasses.replace(store, may_provision=False).open(self.outside).keyring

    def write(self, store: KeyStore, numbers: Sequence[int] = tuple(VALUES)) -> None:
        with use_keyring(self.keyring(store)), Session(self.outside) as session:
            session.add_all(Note(id=number, content=VALUES[number]) for number in numbers)
            session.commit()

    def rows(self) -> StoredRows:
        with connect(self.outside) as connection:
            return read_rows(connection)

    def actions(self) -> list[str]:
        """Return the audit trail, verified."""
        with connect(self.outside) as connection:
            control = read_rows(connection).control
            trail = read_events(connection, None if control is None else control.events_hash)
        return [one.action for one in trail]

    def columns(self) -> set[tuple[str, str]]:
        with connect(self.outside) as connection:
            return {(row.table_name, row.column_name) for row in connection.execute(select(TABLES.columns))}

    def under(self) -> set[str]:
        """Return the key ids that values are under."""
        with self.outside.connect() as connection:
            return {parse(frame).key_id.hex() for frame in connection.execute(select(STORED.c.content)).scalars()}

    def keep(self) -> None:
        """Remember everything, for :meth:`bring_back`."""
        with self.outside.connect() as connection:
            self._kept = [
                (table, [dict(row) for row in connection.execute(select(table)).mappings()])
                for table in (*TABLES, STORED)
            ]
        self._kept_file = self.secret_file.read_bytes() if self.secret_file.exists() else None

    def bring_back(self) -> None:
        with self.outside.begin() as connection:
            for table, rows in self._kept:
                connection.execute(table.delete())
                if rows:
                    connection.execute(insert(table), rows)
        self.secret_file.unlink(missing_ok=True)
        if self._kept_file is not None:
            self.secret_file.write_bytes(self._kept_file)
            self.secret_file.chmod(0o600)


@pytest.fixture
def deployment(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    made = Deployment(database_url, tmp_path, monkeypatch)
    yield made
    following.resume(None, None)
    for engine in (made.outside, made.mortal):
        engine.dispose()
    made.clock.dispose()


# --- The commands ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command, from a deployment in some state to one in another.

    :ivar run: the command, as a process that may end.
    :ivar store: how the key store is opened afterwards, and at any time in between.
    :ivar states: of the data keys in the end, in the order in which they were made.
    :ivar actions: what the command adds to the audit trail.
    :ivar done: what it raises once all is done; nothing for one that may be repeated.
    :ivar until_adopted: how it is opened as well, until a KMS is adopted.
    :ivar keeps_running: how a process opens the key store that was there before and goes on; none for the first.
    :ivar shreds: whether values are meant to be lost.
    :ivar settled: what else is so in the end.
    """

    run: Callable[[], object]
    store: KeyStore
    states: str
    actions: tuple[str, ...] = ()
    done: tuple[type[Exception], str] | None = None
    until_adopted: KeyStore | None = None
    keeps_running: KeyStore | None = None
    shreds: bool = False
    settled: Callable[[], bool] = field(default=lambda: True)


Start = Callable[[Deployment], Case]


def with_kms(deployment: Deployment, **options: Any) -> KeyStore:
    """Have a key store whose one data key a KMS wraps, and values under it; the KMS wraps the MAC key, too."""
    store = deployment.store(deployment.kms, **options)
    store.open(deployment.outside)
    deployment.write(store)
    return store


def rotated(deployment: Deployment, store: KeyStore, *, standby: KeyProvider | None = None) -> None:
    assert rotate(deployment.operator(store, standby=standby, outside=True)) is not None


def retired(deployment: Deployment, store: KeyStore) -> str:
    """Have a second data key, the first being retired; return the first's key id."""
    rotated(deployment, store)
    promote(deployment.operator(store, outside=True))
    return deployment.rows().keys[0].required("key_id")


def rekeyed(deployment: Deployment, store: KeyStore) -> str:
    first = retired(deployment, store)
    assert rekey(deployment.outside, deployment.keyring(store), [NOTES]).is_complete
    return first


def disabled(deployment: Deployment, store: KeyStore) -> str:
    first = rekeyed(deployment, store)
    disable(deployment.operator(store, outside=True), first, sleep=deployment.clock.pass_)
    return first


def provision_without_kms(deployment: Deployment) -> Case:
    store = deployment.store(None)
    return Case(run=lambda: store.open(deployment.mortal, []), store=store, states="primary", actions=("provision",))


def provision_with_kms(deployment: Deployment) -> Case:
    store = deployment.store(deployment.kms)
    return Case(run=lambda: store.open(deployment.mortal, []), store=store, states="primary", actions=("provision",))


def provision_with_kms_and_secret(deployment: Deployment) -> Case:
    store = deployment.store(deployment.kms, secret=SECRET)
    return Case(
        run=lambda: store.provision(deployment.mortal),
        store=store,
        states="retired primary",
        actions=("provision",),
    )


def without_kms(deployment: Deployment) -> KeyStore:
    deployment.with_secret_file()
    store = deployment.store(None)
    store.open(deployment.outside)
    deployment.write(store)
    return store


def adopt_alone(deployment: Deployment) -> Case:
    before, store = without_kms(deployment), deployment.store(deployment.kms)
    return Case(
        run=lambda: store.open(deployment.mortal),
        store=store,
        until_adopted=before,
        states="retired primary",
        actions=("adopt",),
    )


def adopt_among_others(deployment: Deployment) -> Case:
    """Boot with a KMS while a process runs without; when that has ended, its key becomes primary by itself."""
    before = without_kms(deployment)
    opened = before.open(deployment.outside)
    store = deployment.store(deployment.kms)

    def says(connection: Connection) -> None:
        beat(
            connection,
            "the other",
            epoch=opened.rows.epoch,
            primary_key_id=opened.keyring.primary_key_id,
            key_ids=opened.keyring.key_ids,
            mac_key_ids=opened.mac_key_ids,
            lease=LEASE,
        )

    with deployment.outside.begin() as connection:
        says(connection)

    def boot_and_serve() -> None:
        watch = Watch(store, store.open(deployment.mortal), WatchSettings(interval=0.0, lease=LEASE))
        watch._recorded.update(set(declared(None)) - {NOTES})  # those of other tests are not in this database
        following.resume(watch, deployment.mortal)
        following.follow(deployment.mortal)
        serve()
        with deployment.mortal.begin() as connection:
            leave(connection, "the other")
        serve()
        # The process is replaced by the next; that it takes its heartbeat with it is not what this is about.
        with deployment.mortal.begin() as connection:
            watch.leave(connection)

    def serve() -> None:
        with deployment.mortal.connect() as connection:
            connection.execute(select(STORED.c.id)).all()

    return Case(
        run=boot_and_serve,
        store=store,
        until_adopted=before,
        states="retired primary",
        actions=("adopt", "close", "promote"),
    )


def rotate_once(deployment: Deployment) -> Case:
    store = with_kms(deployment)
    return Case(
        run=lambda: rotate(deployment.operator(store)),
        store=store,
        states="primary pending",
        actions=("rotate",),
        done=(errors.WrongStateError, "is pending already"),
        keeps_running=store,
    )


def rotate_with_a_standby(deployment: Deployment) -> Case:
    store = with_kms(deployment)
    add_standby(deployment.operator(store, standby=deployment.second_kms, outside=True))
    return Case(
        run=lambda: rotate(deployment.operator(store, standby=deployment.second_kms)),
        store=store,
        states="primary pending",
        actions=("rotate",),
        done=(errors.WrongStateError, "is pending already"),
        keeps_running=deployment.store(deployment.second_kms),
        settled=lambda: all(row.standby_wrapped_key for row in deployment.rows().keys),
    )


def promote_once(deployment: Deployment) -> Case:
    store = with_kms(deployment)
    rotated(deployment, store)
    return Case(
        run=lambda: promote(deployment.operator(store)),
        store=store,
        states="retired primary",
        actions=("close", "promote"),
        done=(errors.WrongStateError, "No data key is pending"),
        keeps_running=store,
    )


def rekey_all(deployment: Deployment) -> Case:
    store = with_kms(deployment)
    retired(deployment, store)
    keyring = deployment.keyring(store)

    def run() -> None:
        # A worker that was killed keeps its shard until its lease is over.
        done = rekey(
            deployment.mortal, keyring, [NOTES], shards=2, batch_size=3, sleep=lambda _: deployment.clock.pass_(61)
        )
        assert done.is_complete

    def is_finished() -> bool:
        with connect(deployment.outside) as connection:
            (found,) = progress(connection)
        return deployment.under() == {keyring.primary_key_id} and not found.unfinished

    return Case(run=run, store=store, states="retired primary", keeps_running=store, settled=is_finished)


def disable_once(deployment: Deployment) -> Case:
    store = with_kms(deployment)
    first = rekeyed(deployment, store)
    return Case(
        run=lambda: disable(deployment.operator(store), first, sleep=deployment.clock.pass_),
        store=store,
        states="disabled primary",
        actions=("count", "disable"),
        done=(errors.WrongStateError, f"{first} is disabled"),
        keeps_running=store,
    )


def enable_once(deployment: Deployment) -> Case:
    store = with_kms(deployment)
    first = disabled(deployment, store)
    return Case(
        run=lambda: enable(deployment.operator(store), first),
        store=store,
        states="retired primary",
        actions=("enable",),
        done=(errors.WrongStateError, f"{first} is retired"),
        keeps_running=store,
    )


def destroy_once(deployment: Deployment) -> Case:
    store = with_kms(deployment)
    first = disabled(deployment, store)
    deployment.clock.pass_(8 * DAY)
    return Case(
        run=lambda: destroy(deployment.operator(store), first, reason="worn out", backups_expired=True),
        store=store,
        states="destroyed primary",
        actions=("destroy",),
        done=(errors.WrongStateError, f"{first} is destroyed"),
        keeps_running=store,
        settled=lambda: deployment.rows().keys[0].wrapped_key is None,
    )


def destroy_at_once(deployment: Deployment) -> Case:
    store = with_kms(deployment)
    first = retired(deployment, store)
    return Case(
        run=lambda: destroy(deployment.operator(store), first, reason="to shred what is under it", now=True),
        store=store,
        states="destroyed primary",
        actions=("destroy",),
        done=(errors.WrongStateError, f"{first} is destroyed"),
        keeps_running=store,
        shreds=True,
        settled=lambda: deployment.rows().keys[0].wrapped_key is None,
    )


def rewrap_all(deployment: Deployment) -> Case:
    store = with_kms(deployment)

    def run() -> None:
        deployment.kms.version = 2
        rewrap(deployment.operator(store))

    def is_rewrapped() -> bool:
        rows = deployment.rows()
        return {row.master_key for row in (rows.in_control(), *rows.keys)} == {"fake/master-key:v2"}

    return Case(
        run=run,
        store=store,
        states="primary",
        actions=("rewrap",) * 2,
        keeps_running=store,
        settled=is_rewrapped,
    )


def standbys(deployment: Deployment) -> list[tuple[str | None, str | None]]:
    rows = deployment.rows()
    return [(row.provider, row.standby_provider) for row in (rows.in_control(), *rows.keys)]


def add_a_standby(deployment: Deployment) -> Case:
    store = with_kms(deployment)
    retired(deployment, store)
    return Case(
        run=lambda: add_standby(deployment.operator(store, standby=deployment.second_kms)),
        store=store,
        states="retired primary",
        actions=("standby-add",) * 3,
        keeps_running=store,
        settled=lambda: standbys(deployment) == [("fake", "second")] * 3,
    )


def with_standby(deployment: Deployment) -> KeyStore:
    store = with_kms(deployment)
    retired(deployment, store)
    add_standby(deployment.operator(store, standby=deployment.second_kms, outside=True))
    return store


def switch_to_the_standby(deployment: Deployment) -> Case:
    before, store = with_standby(deployment), deployment.store(deployment.second_kms)
    return Case(
        run=lambda: switch_to_standby(deployment.operator(store, standby=deployment.kms)),
        store=store,
        states="retired primary",
        actions=("standby-switch",),
        done=(errors.StandbyError, "is wrapped by 'second' under 'second/master-key' in the first place already"),
        keeps_running=before,
        settled=lambda: standbys(deployment) == [("second", "fake")] * 3,
    )


def switch_from_a_lost_kms(deployment: Deployment) -> Case:
    with_standby(deployment)
    store = deployment.store(deployment.second_kms)
    return Case(
        run=lambda: switch_to_standby(deployment.operator(store), lost=True),
        store=store,
        states="retired primary",
        actions=("standby-switch",),
        done=(errors.StandbyError, "in the first place already"),
        keeps_running=store,
        settled=lambda: standbys(deployment) == [("second", None)] * 3,
    )


def remove_the_standby(deployment: Deployment) -> Case:
    store = with_standby(deployment)
    return Case(
        run=lambda: remove_standby(deployment.operator(store)),
        store=store,
        states="retired primary",
        actions=("standby-remove",),
        done=(errors.StandbyError, "No data key has a standby"),
        keeps_running=store,
        settled=lambda: standbys(deployment) == [("fake", None)] * 3,
    )


def change_the_secret(deployment: Deployment) -> Case:
    before = with_kms(deployment, secret=SECRET)
    store = dataclasses.replace(before, next_secret=NEXT_SECRET)
    return Case(
        run=lambda: rotate_secret(deployment.operator(store)),
        store=store,
        states="retired primary",
        actions=("rotate-secret",),
        keeps_running=store,
        settled=lambda: opens_with_the_next_secret(deployment, store),
    )


def change_the_secret_without_kms(deployment: Deployment) -> Case:
    before = deployment.store(None, secret=SECRET)
    before.open(deployment.outside)
    deployment.write(before)
    store = dataclasses.replace(before, next_secret=NEXT_SECRET)
    return Case(
        run=lambda: rotate_secret(deployment.operator(store)),
        store=store,
        states="primary pending",
        actions=("rotate-secret",),
        keeps_running=store,
        settled=lambda: opens_with_the_next_secret(deployment, store),
    )


def opens_with_the_next_secret(deployment: Deployment, store: KeyStore) -> bool:
    """Tell whether the deployment is ready for the next secret in the place of the first."""
    after = dataclasses.replace(store, secret=NEXT_SECRET, next_secret=None, retired_secrets=(SECRET,))
    return read(deployment, deployment.keyring(after)) == VALUES


def forget_a_column(deployment: Deployment) -> Case:
    store = with_kms(deployment)
    with deployment.outside.begin() as connection:
        record(connection, [GONE, NOTES])
    return Case(
        run=lambda: forget_column(deployment.operator(store), "", "gone", "secret"),
        store=store,
        states="primary",
        actions=("forget-column",),
        done=(errors.WrongStateError, "gone.secret is not on record"),
        keeps_running=store,
        settled=lambda: deployment.columns() == {("crash_note", "content")},
    )


def put_a_census_on_record(deployment: Deployment) -> Case:
    store = with_kms(deployment)
    with deployment.outside.begin() as connection:
        record(connection, [NOTES])
    return Case(
        run=lambda: record_census(deployment.operator(store), Targets()),
        store=store,
        states="primary",
        actions=("census",),
        keeps_running=store,
    )


STARTS: list[Start] = [
    provision_without_kms,
    provision_with_kms,
    provision_with_kms_and_secret,
    adopt_alone,
    adopt_among_others,
    rotate_once,
    rotate_with_a_standby,
    promote_once,
    rekey_all,
    disable_once,
    enable_once,
    destroy_once,
    destroy_at_once,
    rewrap_all,
    add_a_standby,
    switch_to_the_standby,
    switch_from_a_lost_kms,
    remove_the_standby,
    change_the_secret,
    change_the_secret_without_kms,
    forget_a_column,
    put_a_census_on_record,
]


# --- What always holds ----------------------------------------------------------------------------------------------


def read(deployment: Deployment, keyring: Keyring) -> dict[int, dict[str, Any]]:
    with use_keyring(keyring), Session(deployment.outside) as session:
        return {note.id: note.content for note in session.scalars(select(Note))}


def check(deployment: Deployment, case: Case, running: Opened | None) -> None:
    """Check that what is committed is sound."""
    rows = deployment.rows()
    deployment.actions()
    if not rows.keys:
        assert rows.epoch == 0
        return
    assert all(row.key_check for row in rows.keys)
    primaries = [row for row in rows.keys if row.state is State.PRIMARY]
    successors = [row for row in rows.keys if row.closing is not None]
    assert len(primaries) == 1
    assert len(successors) <= 1
    assert all(row.state is State.PENDING and row.closing == primaries[0].key_id for row in successors)
    (writable,) = successors or primaries
    opened = [one.open(deployment.outside) for one in stores(case, rows)]
    if running is not None and case.keeps_running is not None:
        opened.append(case.keeps_running.reopen(rows, running))
    assert all(one.keyring.primary_key_id == writable.key_id for one in opened)
    if case.until_adopted is not None and primaries[0].provider == "none":
        # Without the KMS its key cannot be written under, also while it is about to become the primary.
        opened.append(case.until_adopted.open(deployment.outside))
        assert opened[-1].keyring.primary_key_id == primaries[0].key_id
    for one in opened:
        if case.shreds and rows.in_state(State.DESTROYED) is not None:
            with pytest.raises(errors.DestroyedKeyError):
                read(deployment, one.keyring)
        else:
            assert read(deployment, one.keyring).items() <= VALUES.items()


def stores(case: Case, rows: StoredRows) -> Iterator[KeyStore]:
    """Return how the key store must open: with what it holds, nothing being made anew."""
    if case.until_adopted is None or any(row.provider != "none" for row in rows.keys):
        yield dataclasses.replace(case.store, may_provision=False)


def run_until_death(deployment: Deployment, case: Case) -> bool:
    """Run the command as a process that ends at the step that was set; tell whether it did."""
    has_ended = False
    try:
        case.run()
    except (Killed, errors.ProviderUnavailableError):
        has_ended = True
    finally:
        following.resume(None, None)
        came = deployment.death.has_come
        deployment.death.await_at(0)
        deployment.mortal.dispose()
    assert came or not has_ended
    return came


def run_again(case: Case) -> None:
    """Run the command once more, which may say that all is done."""
    refused = None
    try:
        case.run()
    except errors.KravnCryptoError as error:
        refused = error
    if refused is not None:
        assert case.done is not None, refused
        expected, text = case.done
        assert isinstance(refused, expected), refused
        assert text in str(refused)


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.__name__.replace("_", "-"))
def test_a_crash_at_any_step_leaves_a_sound_key_store_and_the_command_completes_when_it_is_run_again(
    deployment: Deployment, start: Start
) -> None:
    case = start(deployment)
    running = None if case.keeps_running is None else case.keeps_running.open(deployment.outside)
    before, values = deployment.actions(), len(deployment.under()) and VALUES
    deployment.keep()
    step = 0
    while True:
        step += 1
        deployment.bring_back()
        deployment.kms.version = 1
        deployment.death.await_at(step)
        if not run_until_death(deployment, case):
            break
        check(deployment, case, running)
        run_again(case)
        settle(deployment, case, running, before, values or {})
    assert step > 5
    settle(deployment, case, running, before, values or {})
    if case.done is not None:
        expected, text = case.done
        with pytest.raises(expected, match=text):
            case.run()
        settle(deployment, case, running, before, values or {})


def settle(
    deployment: Deployment, case: Case, running: Opened | None, before: list[str], values: dict[int, dict[str, Any]]
) -> None:
    """Check that everything is as the command leaves it, with the crash as without."""
    check(deployment, case, running)
    rows = deployment.rows()
    assert " ".join(row.state for row in rows.keys) == case.states
    assert all(row.closing is None for row in rows.keys)
    added = deployment.actions()[len(before) :]
    if case.actions == ("census",):
        assert set(added) == {"census"}  # another count, not the same again
    else:
        assert added == list(case.actions)
    if not case.shreds:
        assert read(deployment, deployment.keyring(case.store)) == values
    assert case.settled()
