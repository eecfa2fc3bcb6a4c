"""Replicas that are killed, frozen and late, while keys are made, replaced and taken away.

16. Twelve processes provision at once, and whoever holds the lock is killed while it asks the KMS, one after the other:
    one key, which all that are left agree on, and a wrap for each that was killed at most.
17. Processes that never look at the key store by themselves write while a key is replaced, re-encrypted and destroyed.
    With a fence they write nothing under a retired key, and lose nothing. Without one, that key is not taken away.
18. A process that re-encrypts is killed after each of its statements, while others change what it has read: whoever
    begins anew gets to the same end. What is corrupt is named, and keeps the key from being disabled and destroyed.
    That every other command, and the end of a process around commits, has the same outcome is in test_crashes.py.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Final

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    NullPool,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.orm import Session

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto import use_keyring
from sqlalchemy_kravn_crypto.changes import Operator
from sqlalchemy_kravn_crypto.ciphertext import parse
from sqlalchemy_kravn_crypto.configuration import operator as operator_of
from sqlalchemy_kravn_crypto.events import read_events
from sqlalchemy_kravn_crypto.keystore import KeyStore
from sqlalchemy_kravn_crypto.ledger import Counts, Shard
from sqlalchemy_kravn_crypto.lifecycle import Targets, destroy, disable, enable, promote, rekey_values, rotate
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.rekey import RekeyResult
from sqlalchemy_kravn_crypto.rekey_worker import OnProgress
from sqlalchemy_kravn_crypto.rows import connect, read_rows
from sqlalchemy_kravn_crypto.schema import TABLES
from sqlalchemy_kravn_crypto.settings import Settings
from tests.database_clock import DatabaseClock
from tests.hostile import mortal_rekey
from tests.hostile.gate import PLACES, Gate
from tests.hostile.mortal_rekey import CHANGED, Note
from tests.hostile.stale_writer import ROWS, Base, StaleWriter, Tally
from tests.openbao import OpenBao
from tests.processes import environment_with, wait_until
from tests.race import PATIENCE, SECRET, lock_holder, outcome, replicas, vault
from tests.race_worker import Base as RaceBase
from tests.rekeying import let_leases_lapse

ASKED_UNDER_THE_LOCK: Final = 3
"""How often the KMS is asked by who makes the key: to wrap, to unwrap, and to unwrap under a wrong binding."""

ROTATIONS: Final = 3
LEASE: Final = 1200.0
PASSES: Final = 5
"""How often a rekey goes through a column where a minute passes with each wait, and others write without an end."""

IDLE: Final = ROWS
"""A row that no process changes."""

STORED: Final = Table(
    "mortal_note", MetaData(), Column("id", Integer), Column("clear", LargeBinary), Column("content", LargeBinary)
)
CORRUPT, EMPTY = 4, 5
"""The ids of a row whose value does not decrypt, and of one without a value."""


# --- 16 --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(openbao: OpenBao) -> Iterator[Gate]:
    made = Gate(openbao.address)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(16), ids=lambda seed: f"seed-{seed}")
def test_16_whoever_holds_the_lock_is_killed_while_it_asks_the_kms_and_the_rest_agree_on_one_key(
    postgres_url: str, openbao: OpenBao, gate: Gate, tmp_path: Path, seed: int
) -> None:
    random = Random(seed)
    is_adopted = random.random() < 0.5
    kills = [(random.randrange(ASKED_UNDER_THE_LOCK), random.choice(PLACES)) for _ in range(random.randint(1, 6))]
    print(f"adopted: {is_adopted}, kills: {kills}")  # noqa: T201 - pytest shows it with a failure
    key = f"race-{uuid.uuid4().hex[:12]}"
    openbao.create_key(key)
    engine: Engine = create_engine(postgres_url, poolclass=NullPool)
    migrate(engine)
    RaceBase.metadata.create_all(engine)
    if is_adopted:  # then the row that is the lock is there already
        KeyStore(provider=None, secret=SECRET, secret_file=tmp_path / "secret.key").open(engine)
    killed, holder = set[int](), 0
    with replicas(postgres_url, vault(openbao, gate.address, key), tmp_path) as started:
        for number, kill in enumerate(kills):
            gate.hold(*kill)
            if number == 0:
                for replica in started:
                    replica.go()
            else:
                os.kill(holder, signal.SIGKILL)
            assert gate.is_holding.wait(PATIENCE)
            holder = lock_holder(engine)
            assert holder not in killed
            killed.add(holder)
        os.kill(holder, signal.SIGKILL)
        outcome([replica for replica in started if replica.pid not in killed], engine)
    assert len(killed) == len(kills)
    unheard = kills.count((0, "asked"))
    assert openbao.count(f"transit/encrypt/{key}") == 1 + len(kills) - unheard
    with connect(engine) as connection:
        rows = read_rows(connection)
        assert [(row.provider, row.state.value) for row in rows.keys] == [("none", "retired"), ("vault", "primary")]
        trail = read_events(connection, rows.in_control().events_hash)
    assert [event.action for event in trail] == (["provision", "adopt"] if is_adopted else ["provision"])
    engine.dispose()


# --- 17 --------------------------------------------------------------------------------------------------------------


class Leap:
    """A clock that goes a minute ahead with every wait, so that what is bounded by time is over after a few."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def sleep(self, _seconds: float) -> None:
        self._now += 60


class Stale:
    """A deployment with a KMS, whose processes hold it no more often than they must, and whose clock goes if told to.

    Their own clocks go as always: to the database, a process is dead as soon as it pleases the test, and yet writes.
    """

    def __init__(self, url: str, openbao: OpenBao, fence: str) -> None:
        key = f"stale-{uuid.uuid4().hex[:12]}"
        openbao.create_key(key)
        self.clock = DatabaseClock(url)
        self.engine = self.clock.connected(poolclass=NullPool)
        self.variables = {
            "LOOK_INTERVAL": "600",
            "LEASE": str(LEASE),
            "FENCE": fence,
            "KMS_PROVIDER": "vault",
            "KMS_VAULT_ADDR": openbao.address,
            "KMS_VAULT_TOKEN": openbao.issue_token(key),
            "KMS_VAULT_KEY": key,
        }
        settings = Settings(**{name.lower(): value for name, value in self.variables.items()})
        self.operator: Operator = operator_of(self.engine, settings)
        migrate(self.engine)
        Base.metadata.create_all(self.engine)
        keyring = self.operator.store.open(self.engine).keyring
        with use_keyring(keyring), Session(self.engine) as session:
            session.add_all(Tally(id=row, version=0, content={"count": 0}) for row in (*range(ROWS), IDLE))
            session.commit()
        self.targets = Targets(Base.metadata)

    def promote_new(self) -> str:
        """Make a new key the primary without regard to anybody, and return which one was it before."""
        before = self.operator.store.open(self.engine).keyring.primary_key_id
        rotate(self.operator)
        promote(self.operator, force=True)
        return before

    def rekey(self, on_progress: OnProgress | None = None) -> RekeyResult:
        leap = Leap()
        return rekey_values(self.operator, self.targets, on_progress=on_progress, clock=leap, sleep=leap.sleep)

    def disable(self, key_id: str) -> None:
        disable(self.operator, key_id, targets=self.targets, sleep=self.clock.pass_)

    def destroy(self, key_id: str) -> None:
        destroy(self.operator, key_id, reason="its time", backups_expired=True, after_days=0, targets=self.targets)

    def frames_under(self, key_id: str) -> set[bytes]:
        with self.engine.connect() as connection:
            frames = connection.scalars(select(type_coerce(Tally.content, LargeBinary))).all()
        return {frame for frame in frames if parse(frame).key_id.hex() == key_id}

    def changes(self) -> int:
        with self.engine.connect() as connection:
            return connection.scalars(select(func.sum(Tally.version))).one()

    def wait_for_changes(self, number: int = 6 * ROWS) -> None:
        """Wait until so many changes have been committed since; by default, all rows have been, as it goes in turn."""
        goal = self.changes() + number
        wait_until(lambda: self.changes() >= goal, PATIENCE)

    def check(self, writers: Sequence[StaleWriter]) -> None:
        """See that each row counts what the processes say that they committed."""
        with use_keyring(self.operator.store.open(self.engine).keyring), Session(self.engine) as session:
            tallies = session.scalars(select(Tally)).all()
            found = {tally.id: (tally.version, tally.content["count"]) for tally in tallies if tally.id <= IDLE}
        said = [sum(writer.counted[row] for writer in writers) for row in range(ROWS)]
        assert min(said) > 0
        assert found == {row: (count, count) for row, count in enumerate([*said, 0])}


@pytest.fixture
def stale(postgres_url: str, openbao: OpenBao, fence: str) -> Iterator[Stale]:
    made = Stale(postgres_url, openbao, fence)
    yield made
    made.engine.dispose()
    made.clock.dispose()


@pytest.fixture
def writers(stale: Stale, postgres_url: str, ways: list[str]) -> Iterator[list[StaleWriter]]:
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            made.append(StaleWriter(postgres_url, stale.variables, ways))
            stack.callback(made[-1].kill)
        yield made


@pytest.mark.parametrize(("fence", "ways"), [("transaction", ["orm", "core"])], ids=["transaction"])
def test_17_with_a_fence_who_never_looks_writes_nothing_under_a_retired_key(
    stale: Stale, writers: list[StaleWriter]
) -> None:
    replaced: list[str] = []

    @event.listens_for(stale.engine, "before_cursor_execute")
    def _replacing(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE stale_tally "):
            replaced.append(statement)
            while paused:
                paused.pop().resume()
            stale.wait_for_changes()  # so that none that was read is still there, but the idle one

    paused: list[StaleWriter] = []
    retired = []
    for number in range(ROTATIONS):
        stale.wait_for_changes()
        if number % 2:  # or they had written every row anew before it is read
            for writer in writers:
                writer.pause()
            paused += writers
        key_id = stale.promote_new()
        left = stale.frames_under(key_id)
        if not paused:
            stale.wait_for_changes(2)
        assert stale.frames_under(key_id) <= left
        # A row that is locked at the moment is left, and done by the next.
        wait_until(lambda: stale.rekey().is_complete, PATIENCE)
        assert stale.frames_under(key_id) == set()
        stale.wait_for_changes()
        stale.disable(key_id)
        stale.wait_for_changes()
        stale.destroy(key_id)
        stale.wait_for_changes()
        assert stale.frames_under(key_id) == set()
        retired.append(key_id)
    for writer in writers:
        writer.stop()
        assert sum(writer.refused.values()) <= ROTATIONS, writer.refused
    assert len(replaced) > ROTATIONS
    assert [stale.frames_under(key_id) for key_id in retired] == [set()] * ROTATIONS
    stale.check(writers)


@pytest.mark.parametrize(("fence", "ways"), [("lease", ["blindly"])], ids=["lease"])
def test_17_without_a_fence_a_key_that_who_never_looks_writes_under_is_not_taken_away(
    stale: Stale, writers: list[StaleWriter]
) -> None:
    stale.wait_for_changes()
    keyring = stale.operator.store.open(stale.engine).keyring
    before = keyring.primary_key_id
    rotate(stale.operator)
    with pytest.raises(errors.ReplicasBehindError):
        promote(stale.operator)
    promote(stale.operator, force=True)

    # Whoever re-encrypts meanwhile comes to an end, and says that it is not done.
    batches = []

    def write_more(_shard: Shard, counts: Counts) -> None:
        batches.append(counts)
        assert len(batches) <= PASSES * (ROWS + 1)
        stale.wait_for_changes()
        with use_keyring(keyring), stale.engine.begin() as connection:
            connection.execute(update(Tally).where(Tally.id == IDLE).values(content={"count": 0}))

    result = stale.rekey(write_more)
    assert result.left == {"stale_tally.content": ROWS + 1}
    assert result.counts.rekeyed >= PASSES
    with pytest.raises(errors.ReplicasBehindError):
        stale.disable(before)

    # To the database, all of them are dead now; they write nevertheless.
    stale.clock.pass_(LEASE + 1)
    stale.wait_for_changes()
    with pytest.raises(errors.KeyInUseError, match="values are under"):
        stale.disable(before)
    with pytest.raises(errors.WrongStateError):
        stale.destroy(before)

    # What is not committed when values are counted is waited for.
    held, other = writers
    other.stop()
    held.hold("commit")
    wait_until(lambda: stale.rekey().is_complete, PATIENCE)
    with pytest.raises(errors.KeyInUseError, match="still are"):
        stale.disable(before)
    held.go_on()
    held.hold("before_cursor_execute")
    assert stale.frames_under(before) != set()
    with pytest.raises(errors.KeyInUseError, match="values are under"):
        stale.disable(before)
    assert stale.rekey().is_complete

    # Of a value that the database has not seen yet, nobody knows; when it comes, the key can still be brought back.
    stale.disable(before)
    held.go_on()
    with pytest.raises(errors.KeyInUseError, match="values are under"):
        stale.destroy(before)
    held.stop()
    enable(stale.operator, before)
    assert stale.rekey().is_complete
    stale.disable(before)
    stale.destroy(before)
    assert stale.frames_under(before) == set()
    for writer in writers:
        assert writer.refused == {}
    stale.check(writers)


# --- 18 --------------------------------------------------------------------------------------------------------------


class Mortal:
    """A deployment in the middle of a rotation: a key has been promoted, and all values are under the one before."""

    def __init__(self, url: str, openbao: OpenBao, directory: Path) -> None:
        key = f"mortal-{uuid.uuid4().hex[:12]}"
        openbao.create_key(key)
        self.variables = {
            "DATA_DIR": str(directory),
            "LOOK_INTERVAL": "0.05",
            "LEASE": "0.2",
            "KMS_PROVIDER": "vault",
            "KMS_VAULT_ADDR": openbao.address,
            "KMS_VAULT_TOKEN": openbao.issue_token(key),
            "KMS_VAULT_KEY": key,
        }
        self.url = url
        self.engine = create_engine(url, poolclass=NullPool)
        settings = Settings(**{name.lower(): value for name, value in self.variables.items()})
        self.operator: Operator = operator_of(self.engine, settings)
        self.targets = Targets(mortal_rekey.Base.metadata)
        migrate(self.engine)
        mortal_rekey.Base.metadata.create_all(self.engine)
        keyring = self.operator.store.open(self.engine).keyring
        self.retired = keyring.primary_key_id
        with use_keyring(keyring), Session(self.engine) as session:
            values = {number: f"value {number}".encode() for number in range(1, EMPTY)} | {EMPTY: None}
            session.add_all(Note(id=number, clear=value, content=value) for number, value in values.items())
            session.commit()
        rotate(self.operator)
        promote(self.operator, force=True)
        self.keyring = self.operator.store.open(self.engine).keyring
        self.corrupt = bytearray(self.frames()[CORRUPT])
        self.corrupt[-1] ^= 1
        self.put(CORRUPT, bytes(self.corrupt))
        with self.engine.connect() as connection:
            self._kept = [dict(row) for row in connection.execute(select(STORED)).mappings()]

    def put(self, number: int, frame: bytes | None) -> None:
        with self.engine.begin() as connection:
            connection.execute(STORED.update().where(STORED.c.id == number).values(content=frame))

    def frames(self) -> dict[int, bytes]:
        with self.engine.connect() as connection:
            found = connection.execute(select(STORED.c.id, STORED.c.content).order_by(STORED.c.id)).all()
        return {number: bytes(frame) for number, frame in found if frame is not None}

    def bring_back(self) -> None:
        """Have the values under the retired key again, and no plan."""
        with self.engine.begin() as connection:
            connection.execute(delete(STORED))
            connection.execute(insert(STORED), self._kept)
            connection.execute(delete(TABLES.rekeys))

    def wait_for_the_end(self) -> None:
        """Wait until the database has seen that a process has gone, and has let go of what that one had locked."""
        others = text(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
            "AND backend_type = 'client backend'"
        )

        def is_alone() -> bool:
            with self.engine.connect() as connection:
                found = connection.scalars(others).all()
            return not found

        if self.engine.dialect.name == "postgresql":
            wait_until(is_alone)

    def check(self) -> set[str]:
        """See that each value is the one that was written last, and return the keys that values are under."""
        frames = self.frames()
        assert frames.pop(CORRUPT) == bytes(self.corrupt)
        with use_keyring(self.keyring), Session(self.engine) as session:
            notes = session.execute(select(Note.id, Note.clear, Note.content).where(Note.id != CORRUPT)).all()
        assert [number for number, _, _ in sorted(notes)] == [1, 2, 3, EMPTY]
        assert all(clear == content for _, clear, content in notes)
        return {parse(frame).key_id.hex() for frame in frames.values()}

    def state(self) -> tuple[object, ...]:
        """Return what is committed, but for random values and times."""
        plan = TABLES.rekeys.c
        numbers = plan.shard, plan.lower_bound, plan.position, plan.rows_seen, plan.rekeyed, plan.conflicts
        times = plan.leased_until.is_not(None), plan.finished_at.is_not(None)
        with self.engine.connect() as connection:
            clear = connection.execute(select(STORED.c.id, STORED.c["clear"]).order_by(STORED.c.id)).all()
            planned = connection.execute(select(*numbers, *times).order_by(plan.shard)).all()
        under = [parse(frame).key_id for number, frame in self.frames().items() if number != CORRUPT]
        return (*map(tuple, clear), *map(tuple, planned), *under)

    def rekey(self) -> RekeyResult:
        """Re-encrypt everything, and wait for nobody who was killed."""
        return rekey_values(self.operator, self.targets, sleep=lambda _: let_leases_lapse(self.engine))


@pytest.fixture
def mortal(database_url: str, openbao: OpenBao, tmp_path: Path) -> Iterator[Mortal]:
    made = Mortal(database_url, openbao, tmp_path)
    yield made
    made.engine.dispose()


def test_18_whoever_begins_anew_after_a_kill_at_any_statement_gets_to_the_same_end(mortal: Mortal) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.hostile.mortal_rekey", mortal.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=environment_with(mortal.variables),
        text=True,
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        met = set[tuple[object, ...]]()
        for statement in itertools.count():
            mortal.bring_back()
            program.stdin.write(f"{statement}\n")
            program.stdin.flush()
            answer = program.stdout.readline().strip()
            mortal.wait_for_the_end()
            mortal.check()
            if answer != "killed" and statement > 0:
                break
            # Whoever begins anew sees what is committed, and nothing else: once for each state is enough.
            state = mortal.state()
            if state not in met:
                met.add(state)
                resumed = mortal.rekey()
                assert (resumed.left, resumed.counts.unreadable) == ({"mortal_note.content": 1}, 1)
                assert mortal.check() == {mortal.keyring.primary_key_id}
                after = mortal.frames()
                assert mortal.rekey().counts.rekeyed == 0
                assert mortal.frames() == after
    whole = json.loads(answer)
    assert (whole["rekeyed"], whole["conflicts"], whole["unreadable_count"]) == (2, 2, 1)
    assert [one["key"] for one in whole["unreadable"]] == [[str(CORRUPT)]]
    assert len(met) > 5 * len(CHANGED)


def test_18_a_value_that_does_not_decrypt_keeps_its_key_from_being_disabled_and_destroyed(mortal: Mortal) -> None:
    result = mortal.rekey()
    assert not result.is_complete
    assert [(one.key, one.error) for one in result.unreadable] == [((CORRUPT,), "AuthenticationError")]
    with pytest.raises(errors.KeyInUseError, match="1 values are under"):
        disable(mortal.operator, mortal.retired, targets=mortal.targets)
    mortal.put(CORRUPT, None)
    disable(mortal.operator, mortal.retired, targets=mortal.targets)
    mortal.put(CORRUPT, bytes(mortal.corrupt))  # as of a backup
    with pytest.raises(errors.KeyInUseError, match="1 values are under"):
        destroy(
            mortal.operator,
            mortal.retired,
            reason="its time",
            backups_expired=True,
            after_days=0,
            targets=mortal.targets,
        )
