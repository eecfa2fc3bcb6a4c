"""How a process follows the key store while it serves, on both databases and on every kind of driver."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, delete, event, insert, literal, select, text, update
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, configure, configure_async, context, reset
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.changes import Operator, changing
from sqlalchemy_kravn_crypto.ciphertext import ColumnName
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.following import current, follow, start
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from sqlalchemy_kravn_crypto.keystore import KeyStore
from sqlalchemy_kravn_crypto.lifecycle.rotation import promote, rotate
from sqlalchemy_kravn_crypto.replicas import read_replicas
from sqlalchemy_kravn_crypto.schema import TABLES, State
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.transactions import mark, open_since
from sqlalchemy_kravn_crypto.watch import Watch, WatchSettings
from tests.fixtures_postgres import asynchronous
from tests.misbehaving_kms import MisbehavingKMS

SECRET = "correct horse battery staple, and forty more characters"
ROOT = bytes(range(32))
KEYS = TABLES.keys
LEASE = 180.0
INTERVAL = 15.0


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)
    number: Mapped[int] = mapped_column(default=0)


class Clock:
    """The process's clock, that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def connected() -> Iterator[Callable[..., Engine]]:
    """Make engines that are disposed of."""
    made: list[Engine] = []

    def connect(url: Any, **options: Any) -> Engine:
        made.append(create_engine(url, **options))
        return made[-1]

    yield connect
    reset()
    for engine in made:
        engine.dispose()


def with_tables(engine: Engine) -> Engine:
    TABLES.keys.metadata.create_all(engine)
    Base.metadata.create_all(engine)
    return engine


@pytest.fixture
def engine(database_url: str, connected: Callable[..., Engine]) -> Engine:
    return with_tables(connected(database_url))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kms() -> MisbehavingKMS:
    return MisbehavingKMS()


@pytest.fixture
def store(kms: MisbehavingKMS, tmp_path: Path) -> KeyStore:
    return KeyStore(provider=kms, secret=None, secret_file=secret_file(tmp_path))


def secret_file(directory: Path) -> Path:
    path = directory / "secret.key"
    path.write_text(ROOT.hex())
    path.chmod(0o600)
    return path


@pytest.fixture
def operator(engine: Engine, store: KeyStore, connected: Callable[..., Engine]) -> Operator:
    return Operator(engine=connected(engine.url), store=store)


@pytest.fixture
def boot(engine: Engine, store: KeyStore, clock: Clock) -> Callable[..., Watch]:
    """Be a process that has just started."""

    def start_up(**settings: Any) -> Watch:
        watch = Watch(
            settings.pop("store", store),
            settings.pop("opened", None) or store.open(engine),
            WatchSettings(interval=INTERVAL, lease=LEASE, **settings),
            clock=clock,
        )
        start(watch, engine)
        follow(engine)
        return watch

    return start_up


def put(engine: Engine, number: int) -> None:
    with Session(engine) as session:
        session.add(Note(id=number, content={"number": number}))
        session.commit()


def numbers(engine: Engine) -> list[int]:
    with Session(engine) as session:
        return sorted(note.content["number"] for note in session.scalars(select(Note)))


def key_ids(engine: Engine) -> dict[int, str]:
    """Return under which data key each value is."""
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT id, content FROM note ORDER BY id")).all()
    return {row.id: bytes(row.content)[2:10].hex() for row in rows}


def beats(operator: Operator) -> list[tuple[str, frozenset[str]]]:
    with operator.engine.connect() as connection:
        return [(replica.primary_key_id, replica.key_ids) for replica in read_replicas(connection)]


def rotated(operator: Operator) -> str:
    made = rotate(operator)
    assert made is not None
    return made.required("key_id")


def promoted(operator: Operator) -> bool:
    try:
        promote(operator)
    except errors.ReplicasBehindError:
        return False
    return True


def statements(engine: Engine) -> list[str]:
    found: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _k, statement, *_: found.append(statement))
    return found


# --- A look ---------------------------------------------------------------------------------------------------------


def test_the_first_transaction_leaves_a_heartbeat_and_records_the_columns(
    engine: Engine, boot: Any, operator: Operator
) -> None:
    boot()
    assert beats(operator) == []
    with engine.connect() as connection:
        connection.execute(select(literal(1)))
        connection.rollback()
    keyring = current_keyring()
    assert beats(operator) == [(keyring.primary_key_id, keyring.key_ids)]
    with operator.engine.connect() as connection:
        recorded = connection.execute(select(TABLES.columns.c.table_name, TABLES.columns.c.name)).all()
    assert ("note", "note.content") in recorded


@pytest.mark.parametrize("option", [{"stream_results": True}, {"yield_per": 10}], ids=["stream_results", "yield_per"])
def test_a_connection_whose_rows_come_through_a_cursor_of_the_server_leaves_a_heartbeat_too(
    engine: Engine, boot: Any, clock: Clock, operator: Operator, option: dict[str, Any]
) -> None:
    """Else a process that has no others would be taken for dead: no cursor can be declared for an UPDATE."""
    boot()

    def look() -> None:
        with engine.connect().execution_options(**option) as connection:
            assert connection.scalars(select(literal(1))).all() == [1]
        keyring = current_keyring()
        assert beats(operator) == [(keyring.primary_key_id, keyring.key_ids)]

    look()
    pending = rotated(operator)
    clock.pass_(INTERVAL)
    look()
    assert pending in current_keyring().key_ids
    with operator.engine.connect() as connection:
        assert "note" in connection.scalars(select(TABLES.columns.c.table_name)).all()


def test_until_a_look_is_due_nothing_is_asked_of_the_database(engine: Engine, boot: Any, clock: Clock) -> None:
    boot()
    put(engine, 1)
    sent = statements(engine)
    clock.pass_(INTERVAL - 1)
    put(engine, 2)
    assert numbers(engine) == [1, 2]
    assert not [statement for statement in sent if "kms_" in statement]
    clock.pass_(1)
    assert numbers(engine) == [1, 2]
    looks = [statement for statement in sent if "kms_" in statement]
    assert [statement.split()[0] for statement in looks] == ["SELECT", "UPDATE"]


def test_a_pending_key_is_taken_in_and_then_written_under(
    engine: Engine, boot: Any, operator: Operator, clock: Clock, kms: MisbehavingKMS
) -> None:
    boot()
    put(engine, 1)
    before = current_keyring().primary_key_id
    pending = rotated(operator)
    with pytest.raises(errors.ReplicasBehindError, match=pending) as caught:
        promote(operator)
    assert len(caught.value.replicas) == 1
    unwrapped = kms.calls["unwrap"]
    clock.pass_(INTERVAL)
    put(engine, 2)
    assert kms.calls["unwrap"] == unwrapped + 1
    assert current_keyring().key_ids >= {before, pending}
    assert current_keyring().primary_key_id == before
    promote(operator)
    put(engine, 3)
    clock.pass_(INTERVAL)
    put(engine, 4)
    assert kms.calls["unwrap"] == unwrapped + 1
    assert key_ids(engine) == {1: before, 2: before, 3: before, 4: pending}
    assert numbers(engine) == [1, 2, 3, 4]
    assert beats(operator) == [(pending, current_keyring().key_ids)]


def test_core_statements_are_encrypted_after_the_look_too(
    engine: Engine, boot: Any, operator: Operator, clock: Clock
) -> None:
    """Core binds the values of the first statement before the transaction begins."""
    boot()
    put(engine, 1)
    pending = rotated(operator)
    promote(operator, force=True)
    clock.pass_(INTERVAL)
    with engine.begin() as connection:
        connection.execute(insert(Note), [{"id": 2, "content": {"number": 2}}])
    assert key_ids(engine)[2] == pending


def test_what_a_look_says_outlives_the_transaction_that_it_was_made_in(
    engine: Engine, boot: Any, operator: Operator
) -> None:
    boot()
    with engine.connect() as connection:
        connection.execute(select(literal(1)))
        connection.rollback()
    assert len(beats(operator)) == 1


def test_a_value_under_a_key_that_is_not_known_yet_brings_about_a_look(
    engine: Engine, boot: Any, operator: Operator, clock: Clock
) -> None:
    boot()
    put(engine, 1)
    clock.pass_(2)
    pending = rotated(operator)
    _write_under(operator, pending, 2)
    with Session(engine) as session, pytest.raises(errors.UnknownKeyError, match=pending):
        session.scalars(select(Note)).all()
    assert numbers(engine) == [1, 2]


def test_values_under_keys_that_do_not_exist_ask_the_kms_for_nothing(
    engine: Engine, boot: Any, clock: Clock, kms: MisbehavingKMS
) -> None:
    boot()
    put(engine, 0)
    with engine.begin() as connection:
        forged = [
            {"id": number, "content": Keyring(DataKey.generate()).encrypt(b"\x01{}", ColumnName("note.content"))}
            for number in range(1, 21)
        ]
        connection.execute(text("INSERT INTO note (id, content, number) VALUES (:id, :content, 0)"), forged)
    sent, asked = statements(engine), kms.calls.copy()
    for number in range(1, 21):
        with Session(engine) as session, pytest.raises(errors.UnknownKeyError):
            session.get_one(Note, number)
        clock.pass_(0.1)
    assert kms.calls == asked
    looks = [statement for statement in sent if "kms_keys" in statement]
    assert 0 < len(looks) <= 3  # one a second


def test_a_process_that_was_stopped_within_a_transaction_reads_what_was_written_meanwhile(
    engine: Engine, boot: Any, operator: Operator, clock: Clock
) -> None:
    boot()
    put(engine, 1)
    with Session(engine) as session:
        assert session.scalars(select(Note.number)).all() == [0]
        session.get_one(Note, 1)
        clock.pass_(LEASE + 1)
        if engine.dialect.name == "sqlite":
            session.rollback()  # it has one writer, who would wait for this reader
            clock.pass_(-LEASE - 1)
            session.execute(select(literal(1)))
            clock.pass_(LEASE + 1)
        pending = rotated(operator)
        promote(operator, force=True)
        _write_under(operator, pending, 2)
        assert {note.content["number"] for note in session.scalars(select(Note))} == {1, 2}


def test_a_process_that_is_stopped_between_execution_and_result_reads_what_was_returned(
    postgres_url: str, store: KeyStore, clock: Clock, connected: Callable[..., Engine]
) -> None:
    engine = with_tables(connected(postgres_url))
    operator = Operator(engine=connected(postgres_url), store=store)
    start(Watch(store, store.open(engine), WatchSettings(interval=INTERVAL, lease=LEASE), clock=clock), engine)
    put(engine, 1)

    stops = iter([True])

    def stopped(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT note") and next(stops, False):
            pending = rotated(operator)
            promote(operator, force=True)
            _write_under(operator, pending, 2)
            clock.pass_(LEASE + 1)

    event.listen(engine, "before_cursor_execute", stopped)
    follow(engine)
    assert numbers(engine) == [1, 2]


def test_a_process_that_is_stopped_before_the_result_reads_what_is_under_a_key_that_was_disabled_meanwhile(
    postgres_url: str, store: KeyStore, clock: Clock, connected: Callable[..., Engine]
) -> None:
    engine = with_tables(connected(postgres_url))
    operator = Operator(engine=connected(postgres_url), store=store)
    start(Watch(store, store.open(engine), WatchSettings(interval=INTERVAL, lease=LEASE), clock=clock), engine)
    put(engine, 1)
    before = current_keyring().primary_key_id
    stops = iter([True])

    def stopped(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT note") and next(stops, False):
            rotated(operator)
            promote(operator, force=True)
            with changing(operator) as change:
                row = change.rows.key(before)
                assert row is not None
                change.save(change.rows.with_key(row.in_state(State.DISABLED)), "disable", key_id=before)
            clock.pass_(LEASE + 1)

    event.listen(engine, "after_cursor_execute", stopped)
    follow(engine)
    assert numbers(engine) == [1]
    with pytest.raises(errors.DisabledKeyError, match=before):  # in the next transaction, it is as for everybody
        numbers(engine)
    assert all(before not in held for _, held in beats(operator))


def _write_under(operator: Operator, key_id: str, number: int) -> None:
    """Write as another process would, that already encrypts under a key."""
    key = operator.store.open(operator.engine).keyring.data_key(key_id)
    assert key is not None
    frame = Keyring(key).encrypt(f'\x01{{"number":{number}}}'.encode(), ColumnName("note.content"))
    with operator.engine.begin() as connection:
        connection.execute(
            text("INSERT INTO note (id, content, number) VALUES (:id, :content, 0)"), {"id": number, "content": frame}
        )


# --- When it cannot look --------------------------------------------------------------------------------------------


@pytest.fixture
def on_postgres(
    postgres_url: str, store: KeyStore, clock: Clock, connected: Callable[..., Engine]
) -> tuple[Engine, Operator]:
    """Be a process that has just started, on PostgreSQL, and an operator beside it."""
    engine = with_tables(connected(postgres_url))
    start(Watch(store, store.open(engine), WatchSettings(interval=INTERVAL, lease=LEASE), clock=clock), engine)
    follow(engine)
    return engine, Operator(engine=connected(postgres_url), store=store)


def test_a_heartbeat_is_left_although_a_long_transaction_has_just_looked(
    on_postgres: tuple[Engine, Operator], clock: Clock
) -> None:
    """Else a process whose transactions are all long would be taken for dead."""
    engine, operator = on_postgres
    put(engine, 1)
    before = beats(operator)
    rotated(operator)
    for _ in range(2):
        with Session(engine) as session:
            session.get_one(Note, 1)
            clock.pass_(INTERVAL)
            session.scalars(select(Note.number)).all()
        with operator.engine.connect() as connection:
            earlier = [replica.seen_at for replica in read_replicas(connection)]
        numbers(engine)
        with operator.engine.connect() as connection:
            assert [replica.seen_at for replica in read_replicas(connection)] > earlier
    assert beats(operator) != before


def test_what_an_old_snapshot_showed_is_looked_at_again_by_the_next_transaction(
    on_postgres: tuple[Engine, Operator], clock: Clock
) -> None:
    engine, operator = on_postgres
    put(engine, 1)
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        connection.execute(select(Note.number)).all()
        pending = rotated(operator)
        promote(operator, force=True)
        _write_under(operator, pending, 2)
        clock.pass_(INTERVAL)
        assert connection.execute(select(Note.content)).all() == [({"number": 1},)]
    assert numbers(engine) == [1, 2]


def test_in_a_transaction_that_is_longer_than_the_lease_whatever_is_returned_is_read(
    on_postgres: tuple[Engine, Operator], clock: Clock
) -> None:
    """The others take the process for dead, and do not wait until it looks before a key is promoted."""
    engine, operator = on_postgres
    put(engine, 1)
    with Session(engine) as session:
        session.get_one(Note, 1)
        clock.pass_(LEASE)
        session.scalars(select(Note)).all()  # with a look, so that the next is not due
        pending = rotated(operator)
        promote(operator, force=True)
        _write_under(operator, pending, 2)
        assert {note.content["number"] for note in session.scalars(select(Note))} == {1, 2}


def test_in_a_transaction_that_is_longer_than_the_lease_an_old_snapshot_is_looked_at_once(
    on_postgres: tuple[Engine, Operator], clock: Clock
) -> None:
    engine, _ = on_postgres
    put(engine, 1)
    sent = statements(engine)
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        connection.execute(select(Note.number)).all()
        clock.pass_(LEASE)
        for _ in range(3):
            connection.execute(select(Note.number)).all()
    assert len([statement for statement in sent if "kms_keys" in statement]) == 1


class SlowOnce(MisbehavingKMS):
    """A KMS that lets the first who asks for a data key after :meth:`arm` wait."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.goes_on = threading.Event(), threading.Event()
        self._is_armed = False

    def arm(self) -> None:
        self._is_armed = True

    def _answer(self, operation: str) -> None:
        super()._answer(operation)
        if self._is_armed:
            self._is_armed = False
            self.asked.set()
            assert self.goes_on.wait(60)


def test_when_a_stopped_process_goes_on_no_thread_reads_without_the_keys_that_another_is_fetching(
    postgres_url: str, clock: Clock, connected: Callable[..., Engine], tmp_path: Path
) -> None:
    kms = SlowOnce()
    store = KeyStore(provider=kms, secret=None, secret_file=secret_file(tmp_path))
    engine = with_tables(connected(postgres_url))
    operator = Operator(engine=connected(postgres_url), store=store)
    start(Watch(store, store.open(engine), WatchSettings(interval=INTERVAL, lease=LEASE), clock=clock), engine)
    follow(engine)
    put(engine, 1)
    clock.pass_(LEASE + 1)
    pending = rotated(operator)
    promote(operator, force=True)
    _write_under(operator, pending, 2)
    kms.arm()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(numbers, engine)
        try:
            assert kms.asked.wait(60)
            assert numbers(engine) == [1, 2]
        finally:
            kms.goes_on.set()
        assert first.result() == [1, 2]


def test_in_a_transaction_that_is_longer_than_the_lease_a_kms_that_is_down_is_asked_once(
    on_postgres: tuple[Engine, Operator], clock: Clock, kms: MisbehavingKMS
) -> None:
    engine, operator = on_postgres
    put(engine, 1)
    with Session(engine) as session:
        session.get_one(Note, 1)
        clock.pass_(LEASE)
        rotated(operator)
        promote(operator, force=True)
        kms.down = True
        asked = kms.calls["unwrap"]
        for _ in range(3):
            assert session.scalars(select(Note.id)).all() == [1]
    assert kms.calls["unwrap"] == asked + 1


def test_without_a_look_a_process_reads_and_does_not_write_when_its_lease_is_over(
    engine: Engine, boot: Any, operator: Operator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    boot()
    put(engine, 1)
    with operator.engine.begin() as connection:
        connection.execute(text("ALTER TABLE kms_keys RENAME TO kms_keys_away"))
    clock.pass_(LEASE)
    put(engine, 2)  # the last moment of the lease
    clock.pass_(1)
    with pytest.raises(errors.LeaseExpiredError, match="log"):
        put(engine, 3)
    assert numbers(engine) == [1, 2]
    assert len([record for record in caplog.records if "look of the key store failed" in record.getMessage()]) == 1
    with operator.engine.begin() as connection:
        connection.execute(text("ALTER TABLE kms_keys_away RENAME TO kms_keys"))
    clock.pass_(INTERVAL)
    put(engine, 3)
    assert numbers(engine) == [1, 2, 3]


def test_while_the_kms_is_down_a_pending_key_is_left_out_and_serving_goes_on(
    engine: Engine, boot: Any, operator: Operator, clock: Clock, kms: MisbehavingKMS
) -> None:
    boot()
    put(engine, 1)
    before = current_keyring().primary_key_id
    pending = rotated(operator)
    kms.down = True
    for number in range(2, 40):
        clock.pass_(INTERVAL)
        put(engine, number)
    asked = kms.calls["unwrap"]
    assert current_keyring().primary_key_id == before
    assert pending not in current_keyring().key_ids
    with pytest.raises(errors.ReplicasBehindError):
        promote(operator)
    kms.down = False
    clock.pass_(4 * INTERVAL)
    put(engine, 40)
    assert pending in current_keyring().key_ids
    assert kms.calls["unwrap"] == asked + 1
    promote(operator)


def test_a_primary_that_cannot_be_unwrapped_is_waited_for_until_the_lease_is_over(
    engine: Engine, boot: Any, operator: Operator, clock: Clock, kms: MisbehavingKMS
) -> None:
    boot()
    put(engine, 1)
    pending = rotated(operator)
    promote(operator, force=True)
    kms.down = True
    clock.pass_(INTERVAL)
    put(engine, 2)
    clock.pass_(LEASE)
    with pytest.raises(errors.LeaseExpiredError):
        put(engine, 3)
    assert numbers(engine) == [1, 2]
    kms.down = False
    clock.pass_(INTERVAL)
    put(engine, 3)
    assert key_ids(engine)[3] == pending


def test_a_key_store_that_went_back_is_said_and_not_written_under(
    engine: Engine, boot: Any, operator: Operator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    boot()
    with operator.engine.connect() as connection:
        old = [dict(row) for row in connection.execute(select(KEYS)).mappings()]
    rotated(operator)
    promote(operator)
    put(engine, 1)
    with operator.engine.begin() as connection:
        connection.execute(delete(KEYS))
        connection.execute(insert(KEYS), old)
    for _ in range(int(LEASE / INTERVAL) + 1):
        clock.pass_(INTERVAL)
        assert numbers(engine) == [1]
    with pytest.raises(errors.LeaseExpiredError):
        put(engine, 2)
    assert "went back from epoch" in caplog.text


@pytest.mark.parametrize("fence", [False, True])
def test_nothing_is_written_under_a_key_that_went_with_a_restored_backup(
    engine: Engine, boot: Any, operator: Operator, clock: Clock, *, fence: bool
) -> None:
    boot(fence=fence)
    put(engine, 1)
    with operator.engine.connect() as connection:
        old = [dict(row) for row in connection.execute(select(KEYS)).mappings()]
    rotated(operator)
    clock.pass_(INTERVAL)
    numbers(engine)
    promote(operator)
    clock.pass_(INTERVAL)
    put(engine, 2)
    with operator.engine.connect() as connection:
        new = [dict(row) for row in connection.execute(select(KEYS)).mappings()]

    def restore(rows: list[dict[str, Any]]) -> None:
        with operator.engine.begin() as connection:
            connection.execute(delete(KEYS))
            connection.execute(insert(KEYS), rows)
        clock.pass_(INTERVAL)

    restore(old)
    for _ in range(2):
        with pytest.raises(errors.LeaseExpiredError):
            put(engine, 3)
    assert numbers(engine) == [1, 2]
    restore(new)
    put(engine, 3)
    assert key_ids(engine)[3] == current_keyring().primary_key_id


def test_rows_that_somebody_else_wrote_are_not_taken_in(
    engine: Engine, boot: Any, operator: Operator, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    boot()
    put(engine, 1)
    held = current_keyring().key_ids
    pending = rotated(operator)
    with operator.engine.begin() as connection:
        connection.execute(update(KEYS).where(KEYS.c.key_id == pending).values(master_key="transit/kravn:v9"))
    clock.pass_(INTERVAL)
    assert numbers(engine) == [1]
    assert current_keyring().key_ids == held
    assert "was altered" in caplog.text


def test_a_connection_that_died_in_the_pool_is_replaced_by_the_look(
    postgres_url: str, store: KeyStore, connected: Callable[..., Engine]
) -> None:
    engine, other = with_tables(connected(postgres_url, pool_size=1, max_overflow=0)), connected(postgres_url)
    clock = Clock()
    start(Watch(store, store.open(engine), WatchSettings(interval=INTERVAL, lease=LEASE), clock=clock), engine)
    follow(engine)
    put(engine, 1)
    with other.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    clock.pass_(INTERVAL)
    put(engine, 2)
    assert numbers(engine) == [1, 2]


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
def test_only_what_sees_the_newest_renews_the_lease(
    postgres_url: str, store: KeyStore, clock: Clock, connected: Callable[..., Engine], isolation: str
) -> None:
    engine = with_tables(connected(postgres_url, isolation_level=isolation))
    start(Watch(store, store.open(engine), WatchSettings(interval=INTERVAL, lease=LEASE), clock=clock), engine)
    follow(engine)
    with Session(engine) as session:
        session.execute(select(literal(1)))
        for _ in range(20):
            clock.pass_(INTERVAL)
            session.execute(select(literal(1)))
        session.add(Note(id=1, content={"number": 1}))
        if isolation == "READ COMMITTED":
            session.commit()
        else:
            with pytest.raises(errors.LeaseExpiredError):
                session.flush()


def test_a_read_only_database_is_followed_without_a_heartbeat(
    postgres_url: str, store: KeyStore, clock: Clock, connected: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    writable = with_tables(connected(postgres_url))
    operator = Operator(engine=writable, store=store)
    opened = store.open(writable)
    engine = connected(postgres_url, connect_args={"options": "-c default_transaction_read_only=on"})
    start(Watch(store, opened, WatchSettings(interval=INTERVAL, lease=LEASE), clock=clock), engine)
    follow(engine)
    assert numbers(engine) == []
    pending = rotated(operator)
    for _ in range(3):
        clock.pass_(INTERVAL)
        assert numbers(engine) == []
    assert pending in current_keyring().key_ids
    assert beats(operator) == []
    assert len([record for record in caplog.records if "heartbeat" in record.getMessage()]) >= 1
    assert len([r for r in caplog.records if "heartbeat" in r.getMessage() and r.levelno >= logging.WARNING]) == 1


# --- Adoption -------------------------------------------------------------------------------------------------------


def test_an_adopted_kms_is_pending_until_processes_without_it_have_ended(
    engine: Engine, boot: Any, operator: Operator, clock: Clock, kms: MisbehavingKMS, tmp_path: Path
) -> None:
    without = KeyStore(provider=None, secret=None, secret_file=secret_file(tmp_path))
    old = boot(store=without, opened=without.open(engine))
    put(engine, 1)
    bootstrap = current_keyring().primary_key_id
    # A second process starts with the KMS, while the first lives.
    new = boot()
    assert {state for _, state in _states(operator)} == {State.PRIMARY, State.PENDING}
    put(engine, 2)
    assert current_keyring().primary_key_id == bootstrap
    assert without.open(engine).keyring.primary_key_id == bootstrap  # mode none still boots
    with operator.engine.begin() as connection:
        old.leave(connection)
    clock.pass_(INTERVAL)
    put(engine, 3)
    adopted = current_keyring().primary_key_id
    assert dict(_states(operator)) == {bootstrap: State.RETIRED, adopted: State.PRIMARY}
    put(engine, 4)
    assert key_ids(engine)[4] == adopted
    assert key_ids(engine)[1] == key_ids(engine)[2] == bootstrap
    assert numbers(engine) == [1, 2, 3, 4]
    with pytest.raises(errors.ProviderMismatchError):
        without.open(engine)
    assert new.replica_id != old.replica_id


def _states(operator: Operator) -> list[tuple[str, State]]:
    with operator.engine.connect() as connection:
        return [(row.key_id, State(row.state)) for row in connection.execute(select(KEYS).where(KEYS.c.id > 1))]


# --- The fence ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fenced(boot: Any) -> Watch:
    watch: Watch = boot(fence=True)
    return watch


def test_with_a_fence_a_write_is_under_the_primary_of_the_moment(
    engine: Engine, fenced: Watch, operator: Operator
) -> None:
    put(engine, 1)
    pending = rotated(operator)
    promote(operator, force=True)
    put(engine, 2)  # no look is due
    assert key_ids(engine)[2] == pending
    with engine.begin() as connection:
        connection.execute(update(Note).where(Note.id == 1), {"content": {"number": 1}})
    assert key_ids(engine)[1] == pending


def test_a_transaction_that_writes_keeps_the_primary_from_being_retired(
    postgres_url: str, store: KeyStore, clock: Clock, connected: Callable[..., Engine]
) -> None:
    engine = with_tables(connected(postgres_url))
    impatient = KeyStore(**{name: getattr(store, name) for name in ("provider", "secret", "secret_file")}, timeout=0.1)
    operator = Operator(engine=connected(postgres_url), store=impatient)
    settings = WatchSettings(interval=INTERVAL, lease=LEASE, fence=True)
    start(Watch(store, store.open(engine), settings, clock=clock), engine)
    follow(engine)
    before = current_keyring().primary_key_id
    with Session(engine) as session:
        session.add(Note(id=1, content={"number": 1}))
        session.flush()
        pending = rotated(operator)
        with pytest.raises(errors.KeyStoreLockedError, match="writes encrypted values"):
            promote(operator, force=True)
        # From here on others write under the successor, so that nobody keeps the operator waiting any more.
        put(engine, 2)
        session.add(Note(id=3, content={"number": 3}))
        session.commit()
    promote(operator, force=True)
    assert key_ids(engine) == {1: before, 2: pending, 3: pending}
    assert dict(_states(operator))[pending] is State.PRIMARY


def test_who_writes_under_the_successor_is_waited_for_before_that_is_disabled(
    postgres_url: str, store: KeyStore, clock: Clock, connected: Callable[..., Engine]
) -> None:
    """Nothing else tells that it is there, since it took no lock; it may be stopped before its first statement."""
    engine = with_tables(connected(postgres_url))
    settings = WatchSettings(interval=INTERVAL, lease=LEASE, fence=True)
    start(Watch(store, store.open(engine), settings, clock=clock), engine)
    follow(engine)
    operator = Operator(engine=connected(postgres_url), store=store)
    pending = rotated(operator)
    with operator.engine.begin() as connection:
        primary = connection.execute(select(KEYS.c.key_id).where(KEYS.c.state == State.PRIMARY)).scalar_one()
    with changing(operator) as change:
        row = change.rows.key(pending)
        assert row is not None
        change.save(change.rows.with_key(replace(row, closing=primary)), "close", key_id=primary)
    with engine.connect() as writer:
        writer.execute(update(Note).where(Note.id == 1).values(content={"number": 1}))  # there is no such row
        with operator.engine.connect() as connection:
            moment = mark(connection)
            assert len(open_since(connection, moment)) == 1
            writer.commit()
            assert open_since(connection, moment) == []


def test_the_lock_is_taken_again_when_a_savepoint_that_it_was_taken_in_is_rolled_back(
    postgres_url: str, store: KeyStore, clock: Clock, connected: Callable[..., Engine]
) -> None:
    engine = with_tables(connected(postgres_url))
    settings = WatchSettings(interval=INTERVAL, lease=LEASE, fence=True)
    start(Watch(store, store.open(engine), settings, clock=clock), engine)
    follow(engine)
    sent = statements(engine)
    with Session(engine) as session:
        nested = session.begin_nested()
        session.add(Note(id=1, content={"number": 1}))
        session.flush()
        nested.rollback()
        session.add_all([Note(id=2, content={"number": 2}), Note(id=3, content={"number": 3})])
        session.flush()
        session.add(Note(id=4, content={"number": 4}))
        session.commit()
    assert len([statement for statement in sent if "FOR SHARE" in statement]) == 2


@pytest.mark.parametrize("planted", [{"primary_of": "default"}, {"closing": "00" * 8}])
def test_a_key_that_somebody_else_made_the_primary_is_not_written_under(
    engine: Engine, fenced: Watch, operator: Operator, planted: dict[str, str]
) -> None:
    """Such as a retired one that is known to have leaked."""
    put(engine, 1)
    leaked = current_keyring().primary_key_id
    rotated(operator)
    promote(operator, force=True)
    put(engine, 2)
    primary = current_keyring().primary_key_id
    with operator.engine.begin() as connection:
        if "primary_of" in planted:
            connection.execute(update(KEYS).where(KEYS.c.key_id == primary).values(state="retired", primary_of=None))
        state = "primary" if "primary_of" in planted else "pending"
        connection.execute(update(KEYS).where(KEYS.c.key_id == leaked).values(state=state, **planted))
    with pytest.raises(errors.LeaseExpiredError, match=leaked):
        put(engine, 3)
    assert numbers(engine) == [1, 2]


def test_in_autocommit_a_fenced_process_does_not_write(
    postgres_url: str, store: KeyStore, clock: Clock, connected: Callable[..., Engine]
) -> None:
    engine = with_tables(connected(postgres_url, isolation_level="AUTOCOMMIT"))
    settings = WatchSettings(interval=INTERVAL, lease=LEASE, fence=True)
    start(Watch(store, store.open(engine), settings, clock=clock), engine)
    follow(engine)
    with engine.connect() as connection, pytest.raises(errors.UnsupportedOperationError, match="AUTOCOMMIT"):
        connection.execute(insert(Note), [{"id": 1, "content": {"number": 1}, "number": 0}])
    assert numbers(engine) == []


def test_what_does_not_look_like_a_write_is_refused_by_a_fence(engine: Engine, fenced: Watch) -> None:
    statement = text("INSERT INTO note (id, content, number) VALUES (1, :content, 0)").bindparams(content={"number": 1})
    typed = Note.__table__.c.content.type
    statement = statement.bindparams(statement._bindparams["content"]._with_binary_element_type(typed))
    with engine.connect() as connection, pytest.raises(errors.UnsupportedOperationError, match="KRAVN_FENCE"):
        connection.execute(statement)
    one = insert(Note).values(id=1, content={"number": 1}, number=0).returning(Note.id).cte("one")
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection, pytest.raises(errors.UnsupportedOperationError, match="KRAVN_FENCE"):
            connection.execute(select(one.c.id))


def test_statements_without_encrypted_values_take_no_lock(engine: Engine, fenced: Watch) -> None:
    put(engine, 1)
    sent = statements(engine)
    with engine.begin() as connection:
        connection.execute(select(Note))
        connection.execute(update(Replaced), {"number": 7})
    assert not [statement for statement in sent if "kms_" in statement]


class Replaced(Base):
    __tablename__ = "replaced"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


# --- Asynchronous drivers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fence", ["lease", "transaction"])
def test_an_asynchronous_process_follows_the_same_way(
    database_url: str, kms: MisbehavingKMS, tmp_path: Path, connected: Callable[..., Engine], fence: str
) -> None:
    engine = with_tables(connected(database_url))
    settings = Settings(data_dir=tmp_path, look_interval=0.05, fence=fence)
    secret_file(tmp_path)
    store = KeyStore(provider=kms, secret=None, secret_file=tmp_path / "secret.key")
    operator = Operator(engine=engine, store=store)

    async def run() -> tuple[str, list[Any]]:
        asynchronous_engine = create_async_engine(asynchronous(database_url))
        await configure_async(asynchronous_engine, settings, provider=kms)
        async with asynchronous_engine.begin() as connection:
            await connection.execute(insert(Note), [{"id": 1, "content": {"number": 1}, "number": 0}])
        pending = await asyncio.to_thread(rotated, operator)
        while not await asyncio.to_thread(promoted, operator):
            async with asynchronous_engine.connect() as connection:
                await connection.execute(select(Note.__table__))
        while current_keyring().primary_key_id != pending:
            async with asynchronous_engine.connect() as connection:
                await connection.execute(select(Note.__table__))
        async with asynchronous_engine.begin() as connection:
            await connection.execute(insert(Note), [{"id": 2, "content": {"number": 2}, "number": 0}])
        async with asynchronous_engine.connect() as connection:
            rows = (await connection.execute(select(Note.__table__.c.content).order_by(Note.id))).scalars().all()
            streamed = [row.content async for row in await connection.stream(select(Note.__table__).order_by(Note.id))]
        assert rows == streamed
        await asynchronous_engine.dispose()
        return pending, list(rows)

    pending, rows = asyncio.run(asyncio.wait_for(run(), 60))
    assert rows == [{"number": 1}, {"number": 2}]
    assert key_ids(engine)[2] == pending


# --- What configure does --------------------------------------------------------------------------------------------


def test_configure_starts_it_and_reset_takes_the_heartbeat_away(
    engine: Engine, kms: MisbehavingKMS, operator: Operator, tmp_path: Path
) -> None:
    secret_file(tmp_path)
    configure(engine, Settings(data_dir=tmp_path), provider=kms)
    put(engine, 1)
    assert len(beats(operator)) == 1
    watch, watched = current()
    assert watch is not None
    assert watched is engine
    reset()
    assert beats(operator) == []
    with pytest.raises(errors.NotConfiguredError):
        context.current_keyring()
