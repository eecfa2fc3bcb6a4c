"""The heartbeats of processes, by the clock of each kind of database."""

from __future__ import annotations

import os
import socket
import uuid
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import pytest
from sqlalchemy import select, text, update

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.lifecycle import promote, rotate
from sqlalchemy_kravn_crypto.replicas import (
    Replica,
    beat,
    forget_dead,
    leave,
    live_replicas,
    new_replica_id,
    read_replicas,
)
from sqlalchemy_kravn_crypto.schema import TABLES, State
from tests.fixtures_deployment import Deployment

REPLICAS = TABLES.replicas
ONE, TWO = "0123456789abcdef", "fedcba9876543210"


def replicas(deployment: Deployment) -> list[Replica]:
    with deployment.engine.connect() as connection:
        return read_replicas(connection)


def said(deployment: Deployment, replica_id: str, **values: Any) -> None:
    """Write what a process would not."""
    with deployment.engine.begin() as connection:
        connection.execute(update(REPLICAS).where(REPLICAS.c.replica_id == replica_id).values(values))


def test_a_heartbeat_says_who_a_process_is_and_what_it_holds(deployment: Deployment) -> None:
    replica_id = deployment.heartbeat(holds={TWO, ONE}, under=ONE, lease=90.2, mac_key_ids={"aa" * 8, "bb" * 8})
    (replica,) = replicas(deployment)
    assert replica.replica_id == replica_id
    assert (replica.host, replica.process_id) == (socket.gethostname(), os.getpid())
    assert replica.version == version("sqlalchemy-kravn-crypto")
    assert replica.epoch == 1
    assert replica.key_ids == {ONE, TWO}
    assert replica.primary_key_id == ONE
    assert replica.mac_key_ids == {"aa" * 8, "bb" * 8}
    assert replica.lease == 91  # never shorter than the lease is
    assert replica.seen_at.tzinfo is not None
    assert replica.is_alive
    assert replica.label == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_process_that_holds_nothing_says_so(deployment: Deployment) -> None:
    deployment.heartbeat(holds=set(), under=ONE)
    (replica,) = replicas(deployment)
    assert (replica.key_ids, replica.mac_key_ids) == (frozenset(), frozenset())


def test_the_next_heartbeat_takes_the_place_of_the_one_before(deployment: Deployment) -> None:
    replica_id = deployment.heartbeat(holds={ONE}, under=ONE, age=100)
    (first,) = replicas(deployment)
    started_at = _started_at(deployment)
    with deployment.engine.begin() as connection:
        beat(connection, replica_id, epoch=7, primary_key_id=TWO, key_ids={TWO}, mac_key_ids=(), lease=5)
    (second,) = replicas(deployment)
    assert second.replica_id == replica_id
    assert (second.epoch, second.primary_key_id, second.key_ids, second.lease) == (7, TWO, frozenset({TWO}), 5)
    assert second.seen_at - first.seen_at >= timedelta(seconds=99)
    assert _started_at(deployment) == started_at


def _started_at(deployment: Deployment) -> Any:
    with deployment.engine.connect() as connection:
        return connection.execute(select(REPLICAS.c.started_at)).scalar_one()


def test_a_heartbeat_that_was_swept_away_is_left_anew(deployment: Deployment) -> None:
    replica_id = deployment.heartbeat(holds={ONE}, under=ONE)
    with deployment.engine.begin() as connection:
        leave(connection, replica_id)
        beat(connection, replica_id, epoch=1, primary_key_id=ONE, key_ids={ONE}, mac_key_ids=(), lease=5)
    assert [replica.replica_id for replica in replicas(deployment)] == [replica_id]


@pytest.mark.parametrize(("age", "is_alive"), [(0, True), (50, True), (70, False), (100_000, False)])
def test_a_process_is_alive_until_its_own_lease_is_over(deployment: Deployment, age: float, is_alive: bool) -> None:  # noqa: FBT001 - a parameter
    deployment.heartbeat(holds={ONE}, under=ONE, lease=60, age=age)
    patient = deployment.heartbeat(holds={ONE}, under=ONE, lease=1_000_000, age=age)
    assert [replica.is_alive for replica in replicas(deployment) if replica.replica_id != patient] == [is_alive]
    with deployment.engine.connect() as connection:
        assert len(live_replicas(connection)) == 1 + is_alive


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "America/Adak"])
def test_the_zone_of_machine_and_session_plays_no_part(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    statements = {
        "postgresql": f"SET TIME ZONE '{zone}'",
        "mariadb": f"SET time_zone = '{'+13:00' if zone.startswith('Pacific') else '-10:00'}'",
    }
    deployment.heartbeat(holds={ONE}, under=ONE, lease=60)
    with deployment.engine.connect() as connection:
        if deployment.engine.dialect.name in statements:
            connection.execute(text(statements[deployment.engine.dialect.name]))
        elsewhere = new_replica_id()
        beat(connection, elsewhere, epoch=1, primary_key_id=ONE, key_ids={ONE}, mac_key_ids=(), lease=60)
        connection.commit()
        assert len(live_replicas(connection)) == 2
    assert [replica.is_alive for replica in replicas(deployment)] == [True, True]


def test_who_leaves_takes_away_its_own_heartbeat_alone(deployment: Deployment) -> None:
    going, staying = (deployment.heartbeat(holds={ONE}, under=ONE) for _ in range(2))
    with deployment.engine.begin() as connection:
        leave(connection, going)
        leave(connection, going)
    assert [replica.replica_id for replica in replicas(deployment)] == [staying]


def test_only_the_long_dead_are_forgotten(deployment: Deployment) -> None:
    deployment.heartbeat(holds={ONE}, under=ONE, age=90_000)
    deployment.heartbeat(holds={ONE}, under=ONE, age=100_000)
    dead = deployment.heartbeat(holds={ONE}, under=ONE, lease=60, age=80_000)
    alive = deployment.heartbeat(holds={ONE}, under=ONE)
    with deployment.engine.begin() as connection:
        assert forget_dead(connection, timedelta(days=1)) == 2
        assert forget_dead(connection, timedelta(days=1)) == 0
    assert {replica.replica_id for replica in replicas(deployment)} == {dead, alive}


def test_ids_are_not_used_twice() -> None:
    made = {new_replica_id() for _ in range(100)}
    assert len(made) == 100
    assert {uuid.UUID(one).version for one in made} == {4}


def test_no_schema_translate_map_moves_the_table(deployment: Deployment) -> None:
    with deployment.engine.connect() as connection:
        moved = connection.execution_options(schema_translate_map={None: "elsewhere"})
        beat(moved, new_replica_id(), epoch=1, primary_key_id=ONE, key_ids={ONE}, mac_key_ids=(), lease=60)
        moved.commit()
        (replica,) = live_replicas(moved)
        assert forget_dead(moved, timedelta(days=1)) == 0
        leave(moved, replica.replica_id)
        assert read_replicas(moved) == []


# --- Rows that no process leaves --------------------------------------------------------------------------------------


def test_without_a_lease_a_process_is_not_alive(deployment: Deployment) -> None:
    """The column came with a later migration: an earlier release leaves NULL, and knows of no keys to wait for."""
    replica_id = deployment.heartbeat(holds={ONE}, under=ONE, age=2)
    said(deployment, replica_id, lease=None, primary_key_id=None, mac_key_ids=None)
    (replica,) = replicas(deployment)
    assert (replica.is_alive, replica.primary_key_id, replica.mac_key_ids) == (False, "", frozenset())


def test_what_is_no_key_id_counts_as_no_key(running: Deployment) -> None:
    """Whoever can write the table can hold up a promotion, and cannot bring one about."""
    pending = rotate(running.operator())
    assert pending is not None
    replica_id = running.heartbeat(holds={pending.required("key_id")}, under=ONE)
    said(running, replica_id, key_ids=f" ,,{pending.key_id}x,*,%,'; DROP TABLE kms_keys", host="x" * 255)
    with pytest.raises(errors.ReplicasBehindError, match="x" * 255):
        promote(running.operator())
    assert running.states()[pending.required("key_id")] is State.PENDING
    said(running, replica_id, lease=-1)
    assert not replicas(running)[0].is_alive
    promote(running.operator())


@pytest.mark.parametrize(
    "garbage",
    [
        {"seen_at": "'MARKER'"},
        {"seen_at": "x'00ff'"},
        {"started_at": "'MARKER'"},
        {"lease": "'MARKER'"},
        {"lease": "1e18"},
        {"lease": "9223372036854775807"},
        {"key_ids": "x'00ff'"},
        {"mac_key_ids": "x'00ff'"},
        {"primary_key_id": "x'00ff'"},
        {"replica_id": "x'00ff'"},
        {"host": "x'00ff'"},
        {"version": "x'00ff'"},
        {"process_id": "'MARKER'"},
        {"epoch": "'MARKER'"},
        {"epoch": "0.5"},
        {"lease": "0.5"},
        {"host": "CAST(x'ff' AS TEXT)"},
    ],
    ids=str,
)
def test_a_heartbeat_that_is_garbage_is_refused_by_name(sqlite_deployment: Deployment, garbage: dict[str, str]) -> None:
    """SQLite keeps any value in any column."""
    deployment = sqlite_deployment
    deployment.heartbeat(holds={ONE}, under=ONE)
    ((column, value),) = garbage.items()
    with deployment.engine.begin() as connection:
        connection.execute(text(f"UPDATE kms_replicas SET {column} = {value}"))  # noqa: S608 - a parameter of the test
    with pytest.raises(errors.MalformedRowError, match="kms_replicas") as caught:
        replicas(deployment)
    assert "DELETE FROM kms_replicas" in str(caught.value)
    assert "MARKER" not in str(caught.value)
    assert caught.value.__context__ is None
    rotate(deployment.operator())
    with pytest.raises(errors.MalformedRowError, match="kms_replicas"):
        promote(deployment.operator())


@pytest.mark.parametrize("garbage", ["'MARKER'", "17", "x'00ff'", "CAST(x'ff' AS TEXT)"])
def test_the_dead_are_not_told_from_garbage(sqlite_deployment: Deployment, garbage: str) -> None:
    sqlite_deployment.heartbeat(holds={ONE}, under=ONE)
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(text(f"UPDATE kms_replicas SET seen_at = {garbage}"))  # noqa: S608 - a parameter of the test
        with pytest.raises(errors.MalformedRowError, match="kms_replicas") as caught:
            forget_dead(connection, timedelta(days=1))
    assert caught.value.__context__ is None
