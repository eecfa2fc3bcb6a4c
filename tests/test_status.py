"""The status of a deployment, at every stage of a key's life and by whoever may only read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, event, insert, text, update

from sqlalchemy_kravn_crypto.changes import Change, Operator, changing
from sqlalchemy_kravn_crypto.configuration import operator as operator_of
from sqlalchemy_kravn_crypto.events import read_events
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, record
from sqlalchemy_kravn_crypto.ledger import Counts, advance, claim, unfinished_shards, write_plan
from sqlalchemy_kravn_crypto.lifecycle import destroy, disable, enable, promote, rotate_secret
from sqlalchemy_kravn_crypto.promotion import promote_pending
from sqlalchemy_kravn_crypto.replicas import beat, new_replica_id
from sqlalchemy_kravn_crypto.rows import connect, read_rows
from sqlalchemy_kravn_crypto.schema import TABLES, State
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.status import KeyStatus, Status, status

FIRST = "MARKER the first secret of a deployment"
SECOND = "MARKER the second secret, that follows it"
EVENTS = TABLES.events
REPLICAS = TABLES.replicas
NOTE = KnownColumn("", "note", "content", "binary", "note.content")


class Deployment:
    """A key store in mode ``none``, since that needs no KMS."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        self.engine = create_engine(url)
        self._directory = directory
        TABLES.keys.metadata.create_all(self.engine)
        self.operator().store.open(self.engine)

    def settings(self) -> Settings:
        return Settings(
            secret=FIRST,
            secret_next=SECOND,
            data_dir=self._directory,
            lease=0.2,
            look_interval=0.1,
            destroy_after_days=3,
        )

    def operator(self) -> Operator:
        return operator_of(self.engine, self.settings())

    def status(self) -> Status:
        return status(self.engine, self.settings())

    def key(self, state: str) -> KeyStatus:
        (key,) = [key for key in self.status().keys if key.state == state]
        return key

    def heartbeat(self, *key_ids: str, primary: str, age: float = 0.0) -> None:
        replica_id = new_replica_id()
        with self.engine.begin() as connection:
            beat(connection, replica_id, epoch=7, primary_key_id=primary, key_ids=key_ids, mac_key_ids=[], lease=60)
            mine = update(REPLICAS).where(REPLICAS.c.replica_id == replica_id)
            moment = connection.execute(REPLICAS.select().where(REPLICAS.c.replica_id == replica_id)).one().seen_at
            connection.execute(mine.values(seen_at=moment - timedelta(seconds=age)))

    def occurred_at(self, action: str) -> datetime:
        with connect(self.engine) as connection:
            events = read_events(connection, read_rows(connection).in_control().events_hash)
        return [event.occurred_at for event in events if event.action == action][-1]


@pytest.fixture
def deployment(database_url: str, tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(database_url, tmp_path)
    yield made
    made.engine.dispose()


def test_the_states_of_the_keys_and_since_when(deployment: Deployment) -> None:
    first = deployment.key("primary")
    assert (first.since, first.destroyable_at) == (deployment.occurred_at("provision"), None)
    rotate_secret(deployment.operator())
    second = deployment.key("pending")
    promote(deployment.operator())
    assert deployment.key("primary").key_id == second.key_id
    assert deployment.key("primary").since == deployment.occurred_at("promote")
    retired = deployment.key("retired")
    assert (retired.key_id, retired.since) == (first.key_id, deployment.occurred_at("promote"))
    disable(deployment.operator(), first.key_id)
    disabled_at = deployment.occurred_at("disable")
    disabled = deployment.key("disabled")
    assert (disabled.since, disabled.destroyable_at) == (disabled_at, disabled_at + timedelta(days=3))
    enable(deployment.operator(), first.key_id)
    assert (deployment.key("retired").since, deployment.key("retired").destroyable_at) == (
        deployment.occurred_at("enable"),
        None,
    )
    destroy(deployment.operator(), first.key_id, reason="a test", now=True)
    assert deployment.key("destroyed").since == deployment.occurred_at("destroy")
    assert deployment.status().problems == ()


def test_what_only_signs_a_row_again_does_not_change_since_when_it_is_what_it_is(deployment: Deployment) -> None:
    with deployment.engine.begin() as connection:
        connection.execute(update(TABLES.keys).values(updated_at=TABLES.keys.c.created_at))
    since = deployment.key("primary").since
    rotate_secret(deployment.operator())
    assert deployment.key("primary").since == since


def test_processes_and_who_keeps_a_pending_key_from_being_promoted(deployment: Deployment) -> None:
    primary = deployment.key("primary").key_id
    rotate_secret(deployment.operator())
    pending = deployment.key("pending").key_id
    found = deployment.status().pending
    assert found is not None
    assert (found.key_id, found.is_successor, found.behind) == (pending, False, ())
    deployment.heartbeat(primary, primary=primary)
    deployment.heartbeat(primary, primary=primary, age=3600)
    deployment.heartbeat(primary, pending, primary=primary)
    told = deployment.status()
    assert told.pending is not None
    assert len(told.pending.behind) == 1
    assert {(replica.is_alive, replica.key_ids) for replica in told.replicas} == {
        (True, (primary,)),
        (False, (primary,)),
        (True, tuple(sorted((primary, pending)))),
    }
    assert {(replica.epoch, replica.primary_key_id) for replica in told.replicas} == {(7, primary)}
    assert told.problems == ()


def test_a_promotion_that_has_begun(deployment: Deployment) -> None:
    rotate_secret(deployment.operator())

    class CrashedError(Exception):
        pass

    begun = 0

    def changing_once() -> AbstractContextManager[Change]:
        nonlocal begun
        begun += 1
        if begun > 1:
            raise CrashedError
        return changing(deployment.operator())

    with pytest.raises(CrashedError):
        promote_pending(changing_once, lambda *_: None)
    found = deployment.status().pending
    assert found is not None
    assert found.is_successor


def test_how_far_a_rekey_is_and_which_columns_are_on_record(deployment: Deployment) -> None:
    key_id = deployment.key("primary").key_id
    with deployment.engine.begin() as connection:
        record(connection, [NOTE])
    with connect(deployment.engine) as connection:
        write_plan(connection, NOTE, key_id, ['["Nw=="]'], 10)
        shards = unfinished_shards(connection, [NOTE], key_id)
        connection.rollback()
        claimed = claim(connection, new_replica_id(), shards)
        assert claimed is not None
        advance(connection, claimed, None, Counts(rekeyed=6, conflicts=2, unreadable=1))
        connection.commit()
    found = deployment.status()
    assert found.columns == ("note.content",)
    (column,) = found.rekeys
    assert (column.label, column.key_id, column.rows_total, column.rows_seen) == ("note.content", key_id, 20, 9)
    assert (column.rekeyed, column.conflicts, column.unreadable) == (6, 2, 1)
    assert (column.shards, column.unfinished) == (2, 2)


def broken(deployment: Deployment, change: Callable[[Engine], None]) -> list[str]:
    change(deployment.engine)
    found = deployment.status()
    assert found.keys  # everything else is told all the same
    return [f"{problem.error}: {problem.message}" for problem in found.problems]


def _altered(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(update(EVENTS).where(EVENTS.c.id == 1).values(actor="mallory"))


def _cut_off(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(EVENTS.delete().where(EVENTS.c.id == 2))


def _extended(engine: Engine) -> None:
    with engine.begin() as connection:
        row = dict(connection.execute(EVENTS.select().where(EVENTS.c.id == 2)).mappings().one())
        connection.execute(insert(EVENTS).values(row | {"id": 3, "previous_hash": row["hash"]}))


@pytest.mark.parametrize("change", [_altered, _cut_off, _extended])
def test_a_broken_trail_is_a_problem(deployment: Deployment, change: Callable[[Engine], None]) -> None:
    rotate_secret(deployment.operator())
    trail = deployment.status().trail
    assert trail is not None
    assert trail.events == 2
    (problem,) = broken(deployment, change)
    assert problem.startswith("AuditTrailError: The audit trail kms_events is broken")
    assert deployment.status().trail is None


def test_a_change_between_reading_rows_and_trail_is_no_broken_trail(deployment: Deployment) -> None:
    reads = 0

    def change_meanwhile(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        nonlocal reads
        if "FROM kms_events" in statement and reads == 0:
            reads += 1
            other = create_engine(deployment.url)
            rotate_secret(operator_of(other, deployment.settings()))
            other.dispose()

    event.listen(deployment.engine, "before_cursor_execute", change_meanwhile)
    found = deployment.status()
    assert (reads, found.problems) == (1, ())
    assert found.trail is not None
    assert found.trail.events == 2


@pytest.mark.parametrize("table", ["kms_events", "kms_replicas", "kms_columns", "kms_rekeys"])
def test_a_table_that_cannot_be_read_is_a_problem_and_the_rest_is_told(deployment: Deployment, table: str) -> None:
    def drop(engine: Engine) -> None:
        with engine.begin() as connection:
            connection.execute(text(f"DROP TABLE {table}"))

    (problem,) = broken(deployment, drop)
    assert "The database: " in problem
    assert table in problem


def test_whoever_may_only_read_is_told_everything(postgres_url: str, tmp_path: Path) -> None:
    deployment = Deployment(postgres_url, tmp_path)
    rotate_secret(deployment.operator())
    deployment.heartbeat(deployment.key("primary").key_id, primary=deployment.key("primary").key_id)
    everything = deployment.status()
    role = f"reader_{new_replica_id().replace('-', '_')}"
    with deployment.engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {role}"))
        tables = ", ".join(table.name for table in TABLES)
        connection.execute(text(f"GRANT SELECT ON {tables} TO {role}"))
    reader = create_engine(postgres_url)

    @event.listens_for(reader, "connect")
    def _become(driver_connection: object, _: object) -> None:
        cursor = driver_connection.cursor()  # type: ignore[attr-defined] # psycopg's
        cursor.execute(f"SET SESSION ROLE {role}")
        driver_connection.commit()  # type: ignore[attr-defined] # the same

    found = status(reader, deployment.settings())
    assert found.problems == ()
    assert found == everything
    reader.dispose()
    with deployment.engine.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {role}"))
        connection.execute(text(f"DROP ROLE {role}"))
    deployment.engine.dispose()


def test_a_file_that_may_only_be_read_does(sqlite_url: str, tmp_path: Path) -> None:
    deployment = Deployment(sqlite_url, tmp_path)
    everything = deployment.status()
    reader = create_engine(f"sqlite:///file:{tmp_path / 'test.db'}?mode=ro&uri=true")
    assert status(reader, deployment.settings()) == everything
    reader.dispose()
    deployment.engine.dispose()


def test_no_secret_is_in_it(deployment: Deployment) -> None:
    rotate_secret(deployment.operator())
    with deployment.engine.connect() as connection:
        stored = connection.execute(TABLES.keys.select().where(TABLES.keys.c.state == State.PRIMARY)).mappings().one()
    shown = repr(deployment.status())
    assert "MARKER" not in shown
    assert stored["key_check"] not in shown
    assert stored["row_mac"] not in shown
