"""Three processes and two operators in any interleaving, against a model that knows the rules and none of the code.

Every command and every rekey is stopped after each of its transactions, and goes on when the others have done something
else; a writer may be stopped between the encryption of a value and the statement that carries it. Whatever is committed
is compared with what was there before, byte by byte of the file: which moves of a key were allowed, what was written
under it, and who could still need it.
"""

from __future__ import annotations

import logging
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from greenlet import greenlet  # type: ignore[import-untyped]
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, event, insert, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, context, following, use_keyring
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.changes import Operator
from sqlalchemy_kravn_crypto.derivation import key_id_of
from sqlalchemy_kravn_crypto.events import read_events
from sqlalchemy_kravn_crypto.keystore import KeyStore
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, declared, record
from sqlalchemy_kravn_crypto.lifecycle import (
    Targets,
    add_standby,
    destroy,
    disable,
    enable,
    promote,
    record_census,
    remove_standby,
    rewrap,
    rotate,
)
from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey
from sqlalchemy_kravn_crypto.rekey import rekey
from sqlalchemy_kravn_crypto.rows import connect, read_rows
from sqlalchemy_kravn_crypto.schema import TABLES
from sqlalchemy_kravn_crypto.testing import FakeKMS
from sqlalchemy_kravn_crypto.watch import Watch, WatchSettings
from tests.database_clock import DatabaseClock
from tests.leaks import found_in, leaked, pickled, spellings

LEASE = 180
INTERVAL = 15
DAY = 86400
DESTROY_AFTER = 7
PROCESSES = 3
OPERATORS = 2
VALUES = 5
PATIENCE = 4000
"""How often a command is stopped at most; more often, and it would never come to an end."""


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "model_note"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


NOTES = KnownColumn("", "model_note", "content", "binary", "model_note.content")

# What a command may say instead of doing something.
REFUSALS = (
    errors.WrongStateError,
    errors.ReplicasBehindError,
    errors.KeyInUseError,
    errors.TooEarlyError,
    errors.ChangedMeanwhileError,
    errors.StandbyError,
    errors.OutdatedKeyringError,
)


class Killed(BaseException):
    """The end of a process that no ``except Exception`` catches."""


class RecordingKMS(FakeKMS):
    """A KMS that remembers every key that it was given, and whose master key has versions."""

    def __init__(self, name: str, keys: dict[str, bytes]) -> None:
        super().__init__(name)
        self.version = 1
        self._keys = keys

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        # One key id is one key, for ever.
        assert self._keys.setdefault(key_id_of(data_key).hex(), data_key) == data_key
        return WrappedKey(f"{self.master_key}:v{self.version}", super().wrap(data_key, binding, deadline).blob)


class ImpatientStore(KeyStore):
    """A key store that does not wait long for a lock that nobody here gives back meanwhile."""

    __slots__ = ()

    @property
    def lock_wait(self) -> float:
        return 0.01


# --- What runs, and where it may stop -------------------------------------------------------------------------------


class Run:
    """Something that is done bit by bit, as a thread would, but one at a time.

    :cvar current: what goes on right now.
    :ivar wakes_at: until when it sleeps.
    :ivar went_on_at: when it last went on.
    :ivar longest_stop: the longest time that it was stopped for.
    :ivar met_a_lock: whether meanwhile another was stopped with SQLite's one lock.
    :ivar stops_before_writing: whether it stops when a value is encrypted and not yet on its way to the database.
    :ivar encrypted_at: when that was.
    :ivar writes: the number and the content of the value that it writes.
    :ivar has_written: whether it has, and not yet committed it.
    """

    current: ClassVar[Run | None] = None

    def __init__(self, name: str, function: Callable[[], object], now: float, process: Process | None = None) -> None:
        self.name = name
        self.process = process
        self.wakes_at = 0.0
        self.went_on_at = now
        self.longest_stop = 0.0
        self.met_a_lock = False
        self.writes: tuple[int, Any] | None = None
        self.has_written = False
        self.stops_before_writing = False
        self.encrypted_at: float | None = None
        self._greenlet: Any = greenlet(function)

    @property
    def is_over(self) -> bool:
        return bool(self._greenlet.dead)

    def go_on(self) -> None:
        """Go on until it stops or is over, or raise what it does."""
        Run.current = self
        try:
            self._greenlet.switch()
        finally:
            Run.current = None

    def stop(self) -> None:
        """Let others do something."""
        if self.process is not None and self.process.is_looking:
            return  # a thread that stops in the midst of a look is not what is to be seen here
        self._greenlet.parent.switch()
        if self.process is not None and self.process.is_killed:
            raise Killed


def pause() -> None:
    """Let others do something, if it is something that is done bit by bit."""
    if Run.current is not None:
        Run.current.stop()


class Process:
    """A process of the application. What is one per process in Python is swapped in while it runs."""

    def __init__(self, model: Model, engine: Engine, *, fence: bool) -> None:
        self.engine = engine
        self.is_killed = False
        self.started_at = model.now
        self._model = model
        self._kept = _held()
        with self.running():
            context.publish(None)
            opened = model.store.open(engine)
            following.resume(None, None)
            self.watch = Watch(
                model.store, opened, WatchSettings(interval=INTERVAL, lease=LEASE, fence=fence), clock=self.clock
            )
            # The models of other tests are not in this database.
            self.watch._recorded.update(declared(None))
            following.start(self.watch, engine)
            following.follow(engine)

    def clock(self) -> float:
        """Return this process's own time, which has nothing to do with that of others but its pace."""
        return self._model.now - self.started_at + 77.0

    @property
    def is_looking(self) -> bool:
        return self.watch._looking.locked()

    @contextmanager
    def running(self) -> Iterator[None]:
        others, own = _held(), self._kept
        _hold(own)
        try:
            yield
        finally:
            self._kept = _held()
            _hold(others)

    @property
    def keys(self) -> frozenset[str]:
        with self.running():
            return context.current_keyring().key_ids

    @property
    def primary(self) -> str:
        with self.running():
            return context.current_keyring().primary_key_id

    @property
    def may_encrypt(self) -> bool:
        with self.running():
            try:
                context.keyring_to_write()
            except errors.LeaseExpiredError:
                return False
            return True


Held = tuple[tuple[Watch | None, Engine | None], dict[str, Any]]


def _held() -> Held:
    return following.current(), {name: getattr(context._process, name) for name in context._KeyContext.__slots__}


def _hold(held: Held) -> None:
    following.resume(*held[0])
    for name, value in held[1].items():
        setattr(context._process, name, value)


# --- The model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """What the file says of a data key."""

    state: str
    closing: str | None
    check: str
    has_wrap: bool


Committed = tuple[int, dict[str, Key], dict[int, bytes]]
"""The epoch, the data keys by their key ids, and the stored values."""


class Model:
    """What must be so, whatever the code does: the moves of a key, and what each of them rests on."""

    def __init__(self, directory: Path, *, fence: bool) -> None:
        self.fence = fence
        self.now = 0.0
        self.values: dict[int, Any] = {}
        self.data_keys: dict[str, bytes] = {}
        self.retired_at: dict[str, float] = {}
        self.disabled_at: dict[str, float] = {}
        self.seen: Counter[str] = Counter()
        self.processes: list[Process | None] = [None] * PROCESSES
        self.path = directory / "model.db"
        self.clock = DatabaseClock(f"sqlite:///{self.path}")
        self.kms = RecordingKMS("first", self.data_keys)
        self.standby = RecordingKMS("second", self.data_keys)
        self.store: KeyStore = ImpatientStore(provider=self.kms, secret=None, secret_file=directory / "no secret.key")
        self._engines: list[Engine] = []
        self._file = sqlite3.connect(self.path, isolation_level=None)
        self._before: Committed = (0, {}, {})
        self.outside = self.engine()
        with self.outside.begin() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            TABLES.keys.metadata.create_all(connection)
            Base.metadata.create_all(connection)
            record(connection, [NOTES])

    def engine(self) -> Engine:
        """Return an engine that stops after each of its transactions."""
        engine = self.clock.connected(connect_args={"timeout": 0.02})
        self._engines.append(engine)
        commit, roll_back = engine.dialect.do_commit, engine.dialect.do_rollback

        def commit_and_stop(connection: Any) -> None:
            commit(connection)
            self.check()
            self.remember()
            pause()

        def roll_back_and_stop(connection: Any) -> None:
            roll_back(connection)
            pause()

        vars(engine.dialect).update(do_commit=commit_and_stop, do_rollback=roll_back_and_stop)

        @event.listens_for(engine, "connect")
        def _(driver_connection: Any, _record: Any) -> None:
            driver_connection.execute("PRAGMA synchronous = OFF")

        @event.listens_for(engine, "before_cursor_execute")
        def _(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            run = Run.current
            if run is None:
                return
            if run.process is not None and run.process.is_killed:
                raise Killed
            if run.writes is not None and statement.startswith("UPDATE model_note"):
                run.has_written = True
            if run.stops_before_writing and statement.startswith("UPDATE model_note"):
                run.stops_before_writing = False
                run.encrypted_at = self.now
                pause()

        return engine

    def remember(self) -> None:
        """Take note of the value that has just been committed."""
        run = Run.current
        if run is not None and run.has_written and run.writes is not None:
            number, content = run.writes
            self.values[number] = content
            run.has_written = False

    def alive(self) -> list[Process]:
        return [process for process in self.processes if process is not None]

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        self.clock.pass_(seconds)

    def key_ids(self) -> list[str]:
        return list(self._before[1])

    def in_state(self, state: str) -> list[str]:
        return [key_id for key_id, key in self._before[1].items() if key.state == state]

    def under(self, key_id: str) -> list[int]:
        return [number for number, frame in self._before[2].items() if _key_id(frame) == key_id]

    def stored(self) -> Committed:
        """Read what is committed, without any of the code."""
        (epoch,) = self._file.execute("SELECT coalesce(max(epoch), 0) FROM kms_keys WHERE id = 1").fetchone()
        keys = {
            row[0]: Key(row[1], row[2], row[3], row[4] is not None)
            for row in self._file.execute(
                "SELECT key_id, state, closing, key_check, wrapped_key FROM kms_keys WHERE id > 1 ORDER BY id"
            )
        }
        return epoch, keys, dict(self._file.execute("SELECT id, content FROM model_note ORDER BY id"))

    def check(self) -> None:
        """Compare what has just been committed with what was there before."""
        (epoch, keys, values), (epoch_before, keys_before, values_before) = after, before = self.stored(), self._before
        self._before = after
        if after == before:
            return
        # I4. Whatever changes about a key is a new epoch.
        assert epoch >= epoch_before
        assert keys == keys_before or epoch > epoch_before
        # I1.
        states = Counter(key.state for key in keys.values())
        assert states["primary"] == bool(keys)
        assert states["pending"] <= 1
        # I5. No key vanishes, and none becomes another.
        for key_id, key in keys_before.items():
            assert keys[key_id].check == key.check
        for key_id, key in keys.items():
            assert key.has_wrap == (key.state != "destroyed")
            self._check_move(key_id, keys_before.get(key_id), key)
        # I3.
        for number in values:
            if values[number] != values_before.get(number):
                self._check_written(keys, _key_id(values[number]))
        # I6.
        for number in values:
            assert keys[_key_id(values[number])].state != "destroyed", number

    def _check_move(self, key_id: str, before: Key | None, after: Key) -> None:
        was = "" if before is None else before.state
        if before is not None and before.closing is None and after.closing is not None:
            assert self.in_state("primary") == [after.closing]
            self._check_held_by_all(key_id)
            self.seen["close"] += 1
        if was == after.state:
            return
        self.seen[f"{was} > {after.state}"] += 1
        match was, after.state:
            case ("", "primary"):
                assert len(self._before[1]) == 1
            case ("", "pending"):
                pass
            case ("pending", "primary"):
                assert before is not None
                assert before.closing is not None
                self._check_held_by_all(key_id)
            case ("primary", "retired"):
                self.retired_at[key_id] = self.now
            case ("disabled", "retired"):
                pass
            case ("retired", "disabled"):
                assert self.now >= self.retired_at[key_id] + 2 * LEASE
                assert self.under(key_id) == []
                assert not [one for one in self.alive() if one.primary == key_id and one.may_encrypt]
                self.disabled_at[key_id] = self.now
            case ("disabled", "destroyed"):
                assert self.now >= self.disabled_at[key_id] + DESTROY_AFTER * DAY
            case move:
                pytest.fail(f"no key goes this way: {move}")

    def _check_held_by_all(self, key_id: str) -> None:
        """Check that a key is held by every process that goes on without a look: all that have said that they live."""
        for process in self.alive():
            if process.may_encrypt and process.watch.has_beaten:
                assert key_id in process.keys

    def _check_written(self, keys: dict[str, Key], key_id: str) -> None:
        key = keys[key_id]
        if key.state == "primary" or (key.state == "pending" and key.closing is not None):
            return
        assert not self.fence, f"a value was written under a key that is {key.state}"
        assert key.state == "retired"
        run = Run.current
        encrypted_at = self.now if run is None or run.encrypted_at is None else run.encrypted_at
        assert encrypted_at <= self.retired_at[key_id] + LEASE
        self.seen["written late"] += 1

    def close(self) -> None:
        self._file.close()
        for engine in self._engines:
            engine.dispose()


def _key_id(frame: bytes) -> str:
    return bytes(frame)[2:10].hex()


# --- What may be done -----------------------------------------------------------------------------------------------


def commands(model: Model, operator: Operator, pick: int) -> dict[str, Callable[[], object]]:
    """Return what an operator may run; of the keys that a command is for, the pick says which."""

    def key_in(state: str) -> str:
        found = model.in_state(state) or model.key_ids()
        return found[pick % len(found)]

    def sleep(seconds: float) -> None:
        wait(model, seconds)

    def rewrap_all() -> None:
        model.kms.version += 1
        rewrap(operator)

    return {
        "rotate": partial(rotate, operator),
        "promote": partial(promote, operator),
        "disable": partial(disable, operator, key_in("retired"), sleep=sleep),
        "enable": partial(enable, operator, key_in("disabled")),
        "destroy": partial(destroy, operator, key_in("disabled"), reason="worn out", backups_expired=True),
        "rewrap": rewrap_all,
        "add-standby": partial(add_standby, operator),
        "remove-standby": partial(remove_standby, operator),
        "census": partial(record_census, operator, Targets()),
    }


PICKS = st.integers(0, 11)
TIMES = st.sampled_from([200, 1, 2, 3, 5, 8, 13])

COMMANDS = ("rotate", "promote", "disable", "enable", "destroy", "rewrap", "add-standby", "remove-standby", "census")

NAMES = st.none() | st.sampled_from(COMMANDS)


def next_command(model: Model) -> str:
    """Return what an operator would do who wants to take a key through its whole life."""
    if model.in_state("pending"):
        return "promote"
    if model.in_state("retired"):
        return "disable"
    return "destroy" if model.in_state("disabled") else "rotate"


def wait(model: Model, seconds: float) -> None:
    """Stop until the time has come, which others let pass."""
    run = Run.current
    assert run is not None
    run.wakes_at = model.now + seconds
    while model.now < run.wakes_at:
        pause()


class Lifecycle(RuleBasedStateMachine):
    """What may happen, in any order.

    :cvar fence: whether the processes hold the primary with every transaction that writes.
    :cvar seen: which moves there were, in all runs.
    """

    fence: ClassVar[bool] = False
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        self.model = Model(Path(self._directory.name), fence=self.fence)
        self.operators = [
            Operator(engine=self.model.engine(), store=self.model.store, standby=self.model.standby, lease=LEASE)
            for _ in range(OPERATORS)
        ]
        self.runs: list[Run] = []
        self._written = 0
        self.said: list[str] = []
        self.log = _Log(self.said)
        logging.getLogger("sqlalchemy_kravn_crypto").addHandler(self.log)

    # --- Processes ---

    @initialize(processes=st.integers(1, PROCESSES), steps=st.integers(0, 5))
    def begin(self, processes: int, steps: int) -> None:
        """Begin anywhere in the life of the first key, with values under it."""
        for _ in range(processes):
            self.boot(0)
        process, operator = self.process(0), self.operators[0]
        with process.running(), process.engine.begin() as connection:
            for number in range(VALUES):
                connection.execute(insert(Note).values(id=number, content={"number": 0}))
                self.model.values[number] = {"number": 0}

        def rekey_all() -> None:
            with process.running():
                assert rekey(process.engine, None, [NOTES]).is_complete

        life: list[Callable[[], object]] = [
            partial(rotate, operator),
            partial(promote, operator),
            rekey_all,
            partial(self.all_look, LEASE + 2),
            lambda: disable(operator, self.model.in_state("retired")[0], sleep=self.all_look),
        ]
        for step in life[:steps]:
            self.all_look(INTERVAL)
            step()

    @precondition(lambda self: None in self.model.processes)
    @rule(pick=PICKS)
    def boot(self, pick: int) -> None:
        free = [which for which, process in enumerate(self.model.processes) if process is None]
        self.model.processes[free[pick % len(free)]] = Process(self.model, self.model.engine(), fence=self.fence)

    @precondition(lambda self: len(self.model.alive()) > 1)
    @rule(pick=PICKS, is_killed=st.booleans())
    def end(self, pick: int, *, is_killed: bool) -> None:
        """End as by SIGKILL, in the midst of everything, or when all is done."""
        process = self.process(pick)
        process.is_killed = is_killed
        runs = [run for run in self.runs if run.process is process]
        if is_killed:
            for run in runs:
                while run in self.runs:
                    self.go_one_step(run)
        elif runs:
            return
        else:
            with process.running():
                following.stop()
        self.model.processes[self.model.processes.index(process)] = None

    @rule(pick=PICKS)
    def read(self, pick: int) -> None:
        """Every value is readable for every process at any time; nobody ever has to try again."""
        assert self.read_by(self.process(pick)) == self.model.values

    @rule(pick=PICKS, number=st.integers(0, VALUES - 1), is_stopped=st.booleans())
    def write(self, pick: int, number: int, *, is_stopped: bool) -> None:
        process = self.process(pick)
        if any(run.process is process and run.name == "write" for run in self.runs):
            return
        self._written += 1
        content = {"number": self._written}

        def change() -> None:
            with process.engine.begin() as connection:
                connection.execute(update(Note).where(Note.id == number).values(content=content))

        run = Run("write", change, self.model.now, process)
        run.writes = number, content
        run.stops_before_writing = is_stopped
        self.start(run)
        if not is_stopped:
            self.finish(run)

    @rule(pick=PICKS, times=TIMES)
    def move_values(self, pick: int, times: int) -> None:
        process = self.process(pick)
        if any(run.process is process and run.name == "rekey" for run in self.runs):
            return

        def move() -> None:
            done = rekey(
                process.engine, None, [NOTES], shards=2, batch_size=2, sleep=lambda seconds: wait(self.model, seconds)
            )
            assert done.unreadable == ()
            self.model.seen["rekeyed"] += done.counts.rekeyed
            self.model.seen["conflicts"] += done.counts.conflicts

        self.start(Run("rekey", move, self.model.now, process), times)

    def process(self, pick: int) -> Process:
        alive = self.model.alive()
        return alive[pick % len(alive)]

    # --- Operators ---

    @rule(which=st.integers(0, OPERATORS - 1), name=NAMES, pick=PICKS, times=TIMES)
    def command(self, which: int, name: str | None, pick: int, times: int) -> None:
        if f"operator {which}" not in {run.name for run in self.runs}:
            command = commands(self.model, self.operators[which], pick)[name or next_command(self.model)]
            self.start(Run(f"operator {which}", command, self.model.now), times)

    # --- Time ---

    @precondition(lambda self: self.runs)
    @rule(turns=st.lists(st.tuples(PICKS, TIMES), min_size=1, max_size=6))
    def go_on(self, turns: list[tuple[int, int]]) -> None:
        for pick, times in turns:
            if self.runs:
                self.go_on_with(self.runs[pick % len(self.runs)], times)

    @rule(
        seconds=st.sampled_from([1, INTERVAL, LEASE // 2, LEASE + 2, DESTROY_AFTER * DAY + 1]), all_read=st.booleans()
    )
    def time_passes(self, seconds: int, *, all_read: bool) -> None:
        """Let time pass; but no statement takes longer than a lease, which is what the lease is for."""
        until = self.model.now + seconds
        for run in list(self.runs):
            if run.encrypted_at is not None and run.encrypted_at + LEASE < until:
                self.model.pass_(max(0.0, run.encrypted_at + LEASE - self.model.now))
                self.finish(run)
        self.model.pass_(max(0.0, until - self.model.now))
        if all_read:
            self.all_read()

    # --- Bit by bit ---

    def start(self, run: Run, times: int = 1) -> None:
        self.runs.append(run)
        self.go_on_with(run, times)

    def go_on_with(self, run: Run, times: int = 1) -> None:
        for _ in range(times):
            if run in self.runs and self.model.now >= run.wakes_at:
                self.go_one_step(run)

    def go_one_step(self, run: Run) -> None:
        run.longest_stop = max(run.longest_stop, self.model.now - run.went_on_at)
        run.went_on_at = self.model.now
        # With the fence, a writer has the lock on the primary when it encrypts, and on SQLite with it the one of all.
        run.met_a_lock |= self.fence and any(other.encrypted_at is not None for other in self.runs if other is not run)
        try:
            if run.process is None:
                run.go_on()
            else:
                with run.process.running():
                    run.go_on()
        except REFUSALS as error:
            self.refused(error)
        except errors.LeaseExpiredError as error:
            assert run.longest_stop > LEASE
            self.refused(error)
        except (errors.KeyStoreLockedError, OperationalError) as error:
            assert run.met_a_lock
            self.refused(error)
        except Killed:
            assert run.process is not None
            assert run.process.is_killed
        if run.is_over:
            self.runs.remove(run)

    def refused(self, error: Exception) -> None:
        self.model.seen[type(error).__name__] += 1
        assert leaked(error, *self.model.data_keys.values()) == []

    def finish(self, run: Run) -> None:
        for _ in range(PATIENCE):
            if run not in self.runs:
                return
            self.go_on_with(run)
        pytest.fail("it does not come to an end")

    def read_by(self, process: Process) -> dict[int, Any]:
        with process.running(), process.engine.connect() as connection:
            return {row.id: row.content for row in connection.execute(select(Note.id, Note.content))}

    # --- The end ---

    @invariant()
    def no_secret_shows(self) -> None:
        """I7, of what is not in the file."""
        if not self.model.data_keys:
            return
        keys = self.model.data_keys.values()
        shown = [*self.said, *(repr((one, one.store)) for one in self.operators)]
        for process in self.model.alive():
            with process.running():
                keyring = context.current_keyring()
            for holder in (process.watch, process.watch._opened, keyring, process.watch._opened.rows):
                shown.append(repr(holder))
                shown.append(pickled(holder))
        assert found_in("\n".join(shown), *keys) == []

    def teardown(self) -> None:
        try:
            if self.model.alive():
                self.settle()
        finally:
            logging.getLogger("sqlalchemy_kravn_crypto").removeHandler(self.log)
            self.model.close()
            self._directory.cleanup()

    def settle(self) -> None:
        """Let everything come to its end, and see a whole life of a key from there."""
        model, (operator, *_) = self.model, self.operators
        for _ in range(PATIENCE):
            if not self.runs:
                break
            self.time_passes(1, all_read=False)
            for run in list(self.runs):
                self.go_on_with(run)
        assert not self.runs
        type(self).seen.update(model.seen)  # what follows happens every time
        self.all_look(LEASE + 1)
        if not model.in_state("pending"):
            rotate(operator)
        self.all_look(INTERVAL)
        promote(operator)
        self.all_look(INTERVAL)
        process = model.alive()[0]
        with process.running():
            moved = rekey(process.engine, None, [NOTES], batch_size=3)
        assert moved.is_complete
        for key_id in model.in_state("retired"):
            disable(operator, key_id, sleep=self.all_look)
        self.all_look(DESTROY_AFTER * DAY + 1)
        for key_id in model.in_state("disabled"):
            destroy(operator, key_id, reason="worn out", backups_expired=True)
        self.all_look(INTERVAL)
        self.agree()
        self.no_secret_shows()
        self.file_holds_no_key()

    def all_look(self, seconds: float) -> None:
        self.model.pass_(seconds)
        self.all_read()

    def all_read(self) -> None:
        for process in self.model.alive():
            assert self.read_by(process) == self.model.values

    def agree(self) -> None:
        """I2 and I9: all hold the same keys, those that whoever starts now holds, and read the same."""
        opened = self.model.store.open(self.model.outside)
        (primary,) = self.model.in_state("primary")
        for process in self.model.alive():
            assert (process.primary, process.keys) == (primary, opened.keyring.key_ids)
        with use_keyring(opened.keyring), self.model.outside.connect() as connection:
            found = {row.id: row.content for row in connection.execute(select(Note.id, Note.content))}
        assert found == self.model.values
        with connect(self.model.outside) as connection:
            assert read_events(connection, read_rows(connection).in_control().events_hash)

    def file_holds_no_key(self) -> None:
        """I7, of the file and of what SQLite has beside it."""
        written = b"".join(path.read_bytes() for path in self.model.path.parent.iterdir())
        for key in self.model.data_keys.values():
            for spelling in (key, *(text.encode("latin-1") for text in spellings(key) if "\\x" not in text)):
                assert spelling not in written


class _Log(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


class FencedLifecycle(Lifecycle):
    fence = True
    seen: ClassVar[Counter[str]] = Counter()


MACHINES = pytest.mark.parametrize("machine", [Lifecycle, FencedLifecycle])


@MACHINES
def test_any_interleaving_of_processes_and_operators_keeps_the_invariants(machine: type[Lifecycle]) -> None:
    machine.seen.clear()
    run_state_machine_as_test(
        machine,
        settings=settings(
            derandomize=True,
            database=None,
            max_examples=30,
            stateful_step_count=50,
            phases=[Phase.generate],  # to make a failure shorter takes minutes; add Phase.shrink for that
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert machine.seen.keys() >= {"close", "pending > primary", "primary > retired", "retired > disabled"}


@pytest.fixture
def begun() -> Iterator[Callable[[type[Lifecycle], int], Lifecycle]]:
    """Begin with two processes, so many steps into the life of the first key."""
    made: list[Lifecycle] = []

    def begin(machine: type[Lifecycle], steps: int) -> Lifecycle:
        made.append(machine())
        made[-1].begin(processes=2, steps=steps)
        return made[-1]

    yield begin
    for one in made:
        one.teardown()


@MACHINES
def test_whoever_writes_at_any_moment_of_a_rekey_wins(
    machine: type[Lifecycle], begun: Callable[[type[Lifecycle], int], Lifecycle]
) -> None:
    moved: Counter[str] = Counter()
    for times in range(1, 30):
        one = begun(machine, 2)
        one.all_look(INTERVAL)
        one.move_values(0, times)
        for number in range(VALUES):
            one.write(1, number, is_stopped=False)
        while one.runs:
            one.model.pass_(1)
            one.go_on_with(one.runs[0])
        one.all_read()
        assert one.model.under(one.model.in_state("retired")[0]) == []
        moved.update(one.model.seen)
    assert moved["rekeyed"]
    assert moved["conflicts"]


@pytest.mark.parametrize("times", range(1, 40))
def test_another_command_at_any_moment_of_a_count_is_no_broken_trail(
    times: int, begun: Callable[[type[Lifecycle], int], Lifecycle]
) -> None:
    one = begun(Lifecycle, 4)
    one.command(0, "disable", 0, times)
    one.command(1, "census", 0, PATIENCE)
    while one.runs:
        one.model.pass_(1)
        one.go_on_with(one.runs[0])
    assert len(one.model.in_state("disabled")) == 1
