"""The ledger on each database: one plan whoever makes it, shards by lease, and counts that add up."""

import pickle
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, select, update

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto import ledger
from sqlalchemy_kravn_crypto.clock import as_utc, read_database_time
from sqlalchemy_kravn_crypto.ledger import Claim, Counts, Progress, Shard
from sqlalchemy_kravn_crypto.schema import TABLES
from tests.rekeying import at_once, engine_of, known_column, let_leases_lapse, ready

A, B = known_column(), known_column("text", table="b", schema="s")
KEY, OTHER_KEY = "11" * 8, "22" * 8
BOUNDS = ['["Zg=="]', '["bQ=="]']
REKEYS = TABLES.rekeys


@pytest.fixture
def engine(any_database_url: str) -> Iterator[Engine]:
    made = engine_of(any_database_url)
    yield made
    made.dispose()


@pytest.fixture
def in_memory() -> Iterator[Engine]:
    """Give SQLite alone, which keeps in a column what is not of its type."""
    made = engine_of("sqlite://")
    yield made
    made.dispose()


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with ready(engine) as made:
        yield made


# --- Plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_is_ranges_without_gaps(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, BOUNDS, 70)
    shards = ledger.unfinished_shards(connection, [A], KEY)
    assert shards == [
        Shard(A, 0, KEY, None, BOUNDS[0], 70),
        Shard(A, 1, KEY, BOUNDS[0], BOUNDS[1], 70),
        Shard(A, 2, KEY, BOUNDS[1], None, 70),
    ]
    assert pickle.loads(pickle.dumps(shards)) == shards  # noqa: S301 - made here


def test_a_plan_without_bounds_is_one_shard(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, [], 0)
    assert ledger.planned_shards(connection, [A], KEY) == [Shard(A, 0, KEY, None, None, 0)]


def test_plans_of_columns_do_not_touch_each_other(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, BOUNDS, 1)
    ledger.write_plan(connection, B, KEY, [], 2)
    assert [shard.column for shard in ledger.unfinished_shards(connection, [A, B], KEY)] == [A, A, A, B]
    assert ledger.unfinished_shards(connection, [B], KEY) == [Shard(B, 0, KEY, None, None, 2)]
    assert ledger.unfinished_shards(connection, [], KEY) == []


def test_an_unfinished_plan_is_kept(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, BOUNDS, 70)
    before = ledger.unfinished_shards(connection, [A], KEY)
    ledger.write_plan(connection, A, KEY, [], 5)
    assert ledger.unfinished_shards(connection, [A], KEY) == before


def test_a_plan_for_another_key_is_replaced(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, BOUNDS, 70)
    ledger.write_plan(connection, A, OTHER_KEY, [], 5)
    assert ledger.unfinished_shards(connection, [A], KEY) == []
    assert ledger.unfinished_shards(connection, [A], OTHER_KEY) == [Shard(A, 0, OTHER_KEY, None, None, 5)]


def test_a_finished_plan_is_replaced(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, [], 70)
    assert ledger.finish(connection, taken(connection, "me"))
    ledger.write_plan(connection, A, KEY, BOUNDS, 5)
    assert len(ledger.unfinished_shards(connection, [A], KEY)) == 3


@pytest.mark.parametrize("before", [None, OTHER_KEY], ids=["first plan", "after another"])
def test_of_many_who_plan_at_once_one_does(engine: Engine, before: str | None) -> None:
    if before:
        with ready(engine) as connection:
            ledger.write_plan(connection, A, before, BOUNDS, 1)

    def plan(number: int) -> None:
        with ready(engine) as connection:
            ledger.write_plan(connection, A, KEY, BOUNDS[: number % 3], 100 + number)

    at_once(6, plan)
    with ready(engine) as connection:
        shards = ledger.planned_shards(connection, [A], KEY)
    assert len({shard.rows for shard in shards}) == 1
    assert [shard.upper for shard in shards] == [*BOUNDS[: len(shards) - 1], None]
    assert len(shards) == (shards[0].rows - 100) % 3 + 1


# --- Workers ---------------------------------------------------------------------------------------------------------


def taken(connection: Connection, worker: str, *columns: Any) -> Claim:
    claimed = ledger.claim(connection, worker, ledger.planned_shards(connection, columns or [A], KEY))
    assert claimed is not None
    return claimed


def test_a_shard_is_taken_by_one(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, BOUNDS[:1], 1)
    first, second = taken(connection, "one"), taken(connection, "two")
    assert (first.shard.number, second.shard.number) == (0, 1)
    assert ledger.claim(connection, "three", [first.shard, second.shard]) is None


def test_only_shards_that_were_asked_for_are_taken(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, BOUNDS, 1)
    last = ledger.unfinished_shards(connection, [A], KEY)[2:]
    claimed = ledger.claim(connection, "me", last)
    assert claimed is not None
    assert claimed.shard == last[0]
    assert ledger.claim(connection, "me", last) is None
    assert ledger.claim(connection, "me", []) is None


def test_of_many_who_take_at_once_each_has_another(engine: Engine) -> None:
    with ready(engine) as connection:
        ledger.write_plan(connection, A, KEY, [f'["{number}"]' for number in range(11)], 1)
        shards = ledger.planned_shards(connection, [A], KEY)

    def take(number: int) -> list[int]:
        mine = []
        with ready(engine) as connection:
            while claimed := ledger.claim(connection, str(number), shards):
                mine.append(claimed.shard.number)
        return mine

    assert sorted(number for numbers in at_once(4, take) for number in numbers) == list(range(12))


def test_a_lease_ends_on_the_clock_of_the_database(engine: Engine, connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, [], 1)
    taken(connection, "dead")
    ends, now = connection.execute(select(REKEYS.c.leased_until)).scalar_one(), read_database_time(connection)
    assert abs(as_utc(ends) - now - ledger.LEASE) < timedelta(seconds=30)
    connection.rollback()
    shards = ledger.planned_shards(connection, [A], KEY)
    assert ledger.claim(connection, "living", shards) is None
    let_leases_lapse(engine)
    claimed = ledger.claim(connection, "living", shards)
    assert claimed is not None
    assert claimed.worker == "living"


def test_a_lease_until_later_than_any_is_waited_for_by_nobody(engine: Engine, connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, [], 1)
    taken(connection, "somebody")
    with engine.begin() as elsewhere:
        now = read_database_time(elsewhere)
        elsewhere.execute(update(REKEYS).values(leased_until=now + timedelta(seconds=50)))
    shards = ledger.planned_shards(connection, [A], KEY)
    assert ledger.claim(connection, "me", shards) is None
    with engine.begin() as elsewhere:
        elsewhere.execute(update(REKEYS).values(leased_until=now + timedelta(days=1)))
    claimed = ledger.claim(connection, "me", shards)
    assert claimed is not None
    assert claimed.worker == "me"


@pytest.mark.parametrize("name", ["shard", "lower_bound", "upper_bound", "position", "rows_total"])
def test_what_sqlite_keeps_in_any_column_is_told_apart_from_a_plan(in_memory: Engine, name: str) -> None:
    with ready(in_memory) as connection:
        ledger.write_plan(connection, A, KEY, [], 1)
        shards = ledger.planned_shards(connection, [A], KEY)
        connection.exec_driver_sql(f"UPDATE kms_rekeys SET {name} = x'00'")  # noqa: S608 - of this file
        with pytest.raises(errors.MalformedRowError, match="row of kms_rekeys"):
            ledger.planned_shards(connection, [A], KEY)
        if name != "shard":
            with pytest.raises(errors.MalformedRowError, match="row of kms_rekeys"):
                ledger.claim(connection, "me", shards)


def test_times_that_are_none_are_in_nobodys_way(in_memory: Engine) -> None:
    with ready(in_memory) as connection:
        ledger.write_plan(connection, A, KEY, [], 1)
        connection.exec_driver_sql("UPDATE kms_rekeys SET leased_until = 'x', created_at = 'x', updated_at = 'x'")
        assert ledger.advance(connection, taken(connection, "me"), None, Counts())


def test_a_sum_of_what_is_no_number_is_no_progress(in_memory: Engine) -> None:
    with ready(in_memory) as connection:
        ledger.write_plan(connection, A, KEY, [], 1)
        assert [one.rows_total for one in ledger.progress(connection)] == [1]
        connection.exec_driver_sql("UPDATE kms_rekeys SET rows_total = 9e999")
        with pytest.raises(errors.MalformedRowError, match="row of kms_rekeys"):
            ledger.progress(connection)


def test_a_shard_that_is_there_twice_is_tried_once(in_memory: Engine) -> None:
    """Whoever owns the database can drop the primary key."""
    with ready(in_memory) as connection:
        ledger.write_plan(connection, A, KEY, [], 1)
        shards = ledger.planned_shards(connection, [A], KEY)
        connection.exec_driver_sql("CREATE TABLE copied AS SELECT * FROM kms_rekeys")
        connection.exec_driver_sql("INSERT INTO copied SELECT * FROM kms_rekeys")
        connection.exec_driver_sql("DROP TABLE kms_rekeys")
        connection.exec_driver_sql("ALTER TABLE copied RENAME TO kms_rekeys")
        connection.commit()
        executed: list[str] = []

        @event.listens_for(in_memory, "before_cursor_execute")
        def _count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            executed.append(statement)
            assert len(executed) <= 2

        with pytest.raises(errors.MalformedRowError, match="row of kms_rekeys"):
            ledger.claim(connection, "me", shards)


def test_text_that_is_no_utf8_is_no_plan(in_memory: Engine) -> None:
    """SQLite keeps it, and its driver does not return it."""
    with ready(in_memory) as connection:
        ledger.write_plan(connection, A, KEY, [], 1)
        shards = ledger.planned_shards(connection, [A], KEY)
        connection.exec_driver_sql("UPDATE kms_rekeys SET position = CAST(x'ff' AS TEXT)")
        with pytest.raises(errors.MalformedRowError, match="row of kms_rekeys") as caught:
            ledger.planned_shards(connection, [A], KEY)
        assert caught.value.__context__ is None
        with pytest.raises(errors.MalformedRowError, match="row of kms_rekeys"):
            ledger.claim(connection, "me", shards)


def test_progress_towards_what_is_no_key_is_none(in_memory: Engine) -> None:
    with ready(in_memory) as connection:
        ledger.write_plan(connection, A, KEY, [], 1)
        connection.exec_driver_sql("UPDATE kms_rekeys SET key_id = x'00'")
        with pytest.raises(errors.MalformedRowError, match="row of kms_rekeys"):
            ledger.progress(connection)


def test_who_takes_over_goes_on_where_the_other_was(engine: Engine, connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, [], 1)
    dead = taken(connection, "dead")
    assert dead.position is None
    assert ledger.advance(connection, dead, '["here"]', Counts(3, 2, 1))
    connection.commit()
    let_leases_lapse(engine)
    living = taken(connection, "living")
    assert living.position == '["here"]'
    assert not ledger.advance(connection, dead, '["there"]', Counts(1, 0, 0))
    connection.rollback()
    assert not ledger.finish(connection, dead)
    assert ledger.advance(connection, living, '["further"]', Counts(1, 0, 0))
    connection.commit()
    assert ledger.finish(connection, living)
    assert not ledger.are_unfinished(connection, [living.shard])


def test_a_batch_extends_the_lease(engine: Engine, connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, [], 1)
    claimed = taken(connection, "me")
    let_leases_lapse(engine)
    assert ledger.advance(connection, claimed, None, Counts())
    connection.commit()
    assert ledger.claim(connection, "other", [claimed.shard]) is None


def test_what_is_given_back_can_be_taken_at_once(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, [], 1)
    claimed = taken(connection, "me")
    ledger.advance(connection, claimed, '["here"]', Counts(1))
    connection.commit()
    ledger.release(connection, claimed)
    again = taken(connection, "other")
    assert again.position == '["here"]'


def test_a_shard_that_was_planned_anew_is_not_entered_by_who_had_it(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, [], 1)
    before = taken(connection, "me")
    ledger.write_plan(connection, A, OTHER_KEY, [], 1)
    assert not ledger.advance(connection, before, None, Counts(1))
    assert not ledger.finish(connection, before)
    assert ledger.claim(connection, "me", [before.shard]) is None
    assert not ledger.are_unfinished(connection, [before.shard])


def test_a_claim_has_the_bounds_on_record(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, [], 1)
    outdated = taken(connection, "me")
    ledger.finish(connection, outdated)
    ledger.write_plan(connection, A, KEY, BOUNDS, 9)
    claimed = ledger.claim(connection, "me", [outdated.shard])
    assert claimed is not None
    assert claimed.shard == Shard(A, 0, KEY, None, BOUNDS[0], 9)


def test_progress_adds_up(connection: Connection) -> None:
    ledger.write_plan(connection, A, KEY, BOUNDS, 70)
    ledger.write_plan(connection, B, OTHER_KEY, [], 5)
    for counts in (Counts(10, 2, 1), Counts(5, 0, 3)):
        claimed = taken(connection, str(uuid.uuid4()))
        assert ledger.advance(connection, claimed, None, counts)
        connection.commit()
    ledger.finish(connection, claimed)
    assert ledger.progress(connection) == [
        Progress("a.secret", KEY, 210, 21, 15, 2, 4, shards=3, unfinished=2),
        Progress("s.b.secret", OTHER_KEY, 5, 0, 0, 0, 0, shards=1, unfinished=1),
    ]


def test_nothing_is_planned_in_the_beginning(connection: Connection) -> None:
    assert ledger.progress(connection) == []
