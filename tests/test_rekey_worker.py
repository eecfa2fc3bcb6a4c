"""One worker and several: who does what, what becomes of a shard whose worker dies, pace and memory."""

import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, update

from sqlalchemy_kravn_crypto.ledger import Counts, Shard, claim, finish, planned_shards, progress
from sqlalchemy_kravn_crypto.rekey import RekeyResult, plan, rekey, rekey_shard
from sqlalchemy_kravn_crypto.schema import TABLES
from tests.rekeying import (
    NEW,
    NEW_KEY,
    OLD,
    OLD_KEY,
    ONLY_NEW,
    WatchedKeyring,
    at_once,
    contents,
    engine_of,
    fill,
    known_column,
    let_leases_lapse,
    payloads,
    ready,
    statements_of,
    stored,
    table_of,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def engine(any_database_url: str) -> Iterator[Engine]:
    made = engine_of(any_database_url)
    yield made
    made.dispose()


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Engine]:
    made = engine_of(postgres_url)
    yield made
    made.dispose()


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Engine]:
    made = engine_of(sqlite_url)
    yield made
    made.dispose()


# --- Several workers -------------------------------------------------------------------------------------------------


def test_workers_by_lease_never_do_the_same_shard(engine: Engine) -> None:
    table = table_of(engine)
    fill(engine, table, [stored(OLD, str(number).encode()) for number in range(60)])
    done: dict[int, list[int]] = {0: [], 1: []}
    both_have_one = threading.Barrier(2)

    def work(worker: int) -> RekeyResult:
        def enter(shard: Shard, _counts: Counts) -> None:
            if not done[worker]:
                both_have_one.wait(30)
            done[worker].append(shard.number)

        return rekey(engine, NEW, [known_column()], shards=6, batch_size=10, on_progress=enter)

    results = at_once(2, work)
    assert sorted(done[0] + done[1]) == list(range(6))
    assert sum(result.counts.rekeyed for result in results) == 60
    assert all(result.is_complete for result in results)
    assert payloads(ONLY_NEW, contents(engine, table)) == [str(number).encode() for number in range(60)]


def test_a_shard_of_a_dead_worker_is_taken_over_when_its_lease_is_over(engine: Engine) -> None:
    table = table_of(engine)
    fill(engine, table, [stored(OLD, b"x")] * 4)
    shards = plan(engine, [known_column()], NEW, shards=2)
    with ready(engine) as connection:
        assert claim(connection, "dead", shards) is not None
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        let_leases_lapse(engine)

    result = rekey(engine, NEW, [known_column()], sleep=wait)
    assert len(waited) == 1
    assert (result.counts, result.is_complete) == (Counts(rekeyed=4), True)


def test_who_has_lost_a_shard_changes_nothing_of_it(engine: Engine) -> None:
    table = table_of(engine)
    before = [stored(OLD, b"x")] * 4
    fill(engine, table, before)

    def lose() -> None:
        let_leases_lapse(engine)
        with ready(engine) as connection:
            shards = planned_shards(connection, [known_column()], NEW.primary_key_id)
            taken.append(claim(connection, "other", shards))

    def give_up(_seconds: float) -> None:
        assert contents(engine, table) == before
        with ready(engine) as connection:
            assert finish(connection, taken[0])

    taken: list[Any] = []
    shard = plan(engine, [known_column()], NEW)[0]
    whole = Shard(shard.column, 0, shard.key_id, None, None, 4)
    with engine.begin() as connection:
        connection.execute(TABLES.rekeys.delete().where(TABLES.rekeys.c.shard > 0))
        connection.execute(update(TABLES.rekeys).values(upper_bound=None))
    result = rekey_shard(engine, WatchedKeyring(NEW_KEY, [OLD_KEY], lose), whole, sleep=give_up)
    assert result.counts == Counts()
    assert contents(engine, table) == before


@pytest.mark.parametrize("batches", [1, 5])
def test_after_a_kill_the_next_goes_on_where_it_was(database_url: str, batches: int) -> None:
    engine = engine_of(database_url)
    table = table_of(engine)
    fill(engine, table, [stored(OLD, str(number).encode()) for number in range(90)])
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.rekey_process", database_url, "10"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    replaced = 0
    for _ in range(batches):
        replaced = int(program.stdout.readline())
        if replaced < batches * 10:
            program.stdin.write("\n")
            program.stdin.flush()
    os.kill(program.pid, signal.SIGKILL)
    program.communicate()
    assert replaced == batches * 10
    by_first = contents(engine, table)[:replaced]
    assert payloads(ONLY_NEW, by_first) == [str(number).encode() for number in range(replaced)]
    with engine.connect() as connection:
        assert progress(connection)[0].rows_seen == replaced
    seen = statements_of(engine)
    result = rekey(engine, NEW, [known_column()], batch_size=10, sleep=lambda _: let_leases_lapse(engine))
    assert (result.counts, result.is_complete) == (Counts(rekeyed=90 - replaced), True)
    assert len([one for one in seen if one.startswith("UPDATE a ")]) == (90 - replaced) / 10
    assert contents(engine, table)[:replaced] == by_first
    assert payloads(ONLY_NEW, contents(engine, table)) == [str(number).encode() for number in range(90)]
    engine.dispose()


# --- Pace and memory -------------------------------------------------------------------------------------------------


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_goes_no_faster_than_it_may(sqlite: Engine) -> None:
    fill(sqlite, table_of(sqlite), [stored(OLD, b"x")] * 50)
    clock = FakeClock()
    batches: list[int] = []
    rekey(
        sqlite,
        NEW,
        [known_column()],
        shards=1,
        max_rows_per_second=10,
        clock=clock,
        sleep=clock.sleep,
        on_progress=lambda _, counts: batches.append(counts.seen),
    )
    assert batches == [10] * 5
    assert clock.slept == pytest.approx([1.0] * 5)


def test_what_went_slowly_is_not_made_up_for(sqlite: Engine) -> None:
    fill(sqlite, table_of(sqlite), [stored(OLD, b"x")] * 30)
    clock = FakeClock()

    def dawdle(_shard: Shard, _counts: Counts) -> None:
        clock.now += 60.0 if len(clock.slept) == 0 and clock.now < 1060 else 0.25

    rekey(
        sqlite,
        NEW,
        [known_column()],
        shards=1,
        max_rows_per_second=10,
        clock=clock,
        sleep=clock.sleep,
        on_progress=dawdle,
    )
    assert clock.slept == pytest.approx([0.75, 0.75])


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"max_rows_per_second": 0.5}])
def test_a_pace_is_at_least_one(sqlite: Engine, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        rekey(sqlite, NEW, [], **arguments)


def test_never_reads_more_than_a_batch(postgres: Engine) -> None:
    table = table_of(postgres)
    fill(postgres, table, [stored(OLD, b"x")] * 500)
    read: list[int] = []

    @event.listens_for(postgres, "after_cursor_execute")
    def _see(_connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT") and "FROM kms" not in statement:
            read.append(cursor.rowcount)

    rekey(postgres, NEW, [known_column()], shards=4, batch_size=50)
    assert max(read) == 50
    assert read.count(50) >= 8


def test_memory_does_not_grow_with_rows(sqlite: Engine) -> None:
    table = table_of(sqlite)
    peaks = []
    for rows in (400, 4000):
        with sqlite.begin() as connection:
            connection.execute(table.delete())
        fill(sqlite, table, [stored(OLD, b"x" * 2000)] * rows)
        rekey(
            sqlite, NEW, [known_column()], shards=1, batch_size=100
        )  # so that all that is kept for ever is there already
        with sqlite.begin() as connection:
            connection.execute(update(table).values(secret=stored(OLD, b"x" * 2000)))
        tracemalloc.start()
        assert rekey(sqlite, NEW, [known_column()], shards=1, batch_size=100).counts == Counts(rekeyed=rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.5
