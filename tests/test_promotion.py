"""From pending to primary: not before every live process holds the key, and in two steps that can be repeated."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, text, update

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.changes import Change, changing
from sqlalchemy_kravn_crypto.lifecycle import disable, promote, rotate
from sqlalchemy_kravn_crypto.promotion import (
    held_by_all,
    older_than,
    pending_key,
    promote_pending,
    replicas_without,
)
from sqlalchemy_kravn_crypto.schema import TABLES, State
from tests.fixtures_deployment import NAME, Deployment


class Crash(BaseException):
    """An operator's process ends here."""


@pytest.fixture
def rotated(running: Deployment) -> Deployment:
    """Give a deployment with a pending key, which no process holds, since none lives."""
    rotate(running.operator())
    return running


def anyhow(_change: Change, _pending: Any) -> None:
    pass


def promoted_by(deployment: Deployment, ready: Any = held_by_all, reason: str | None = None) -> Any:
    operator = deployment.operator()
    return promote_pending(lambda: changing(operator), ready, reason=reason)


# --- What it does ---------------------------------------------------------------------------------------------------


def test_the_pending_key_becomes_the_primary_and_the_primary_is_retired(rotated: Deployment) -> None:
    before, pending = rotated.key_id(State.PRIMARY), rotated.key_id(State.PENDING)
    epoch = rotated.rows().epoch
    rows = promoted_by(rotated, reason="planned")
    assert rows == replace(rotated.rows(), control=rows.control, keys=rows.keys)
    assert rotated.states() | {before: State.RETIRED, pending: State.PRIMARY} == rotated.states()
    assert [row.key_id for row in rotated.rows().keys if row.primary_of] == [pending]
    assert [row.closing for row in rotated.rows().keys] == [None, None, None]
    assert rotated.rows().epoch == epoch + 2
    *_, close, promotion = rotated.events()
    assert (close.action, close.key_id, close.details) == ("close", before, {"successor": pending})
    assert (promotion.action, promotion.key_id, promotion.details) == ("promote", pending, {"retired": before})
    assert (close.reason, promotion.reason) == ("planned", "planned")
    assert rotated.open().keyring.primary_key_id == pending


def test_values_of_before_stay_readable(running: Deployment) -> None:
    running.put(1, running.open().keyring)
    rotate(running.operator())
    promoted_by(running)
    keyring = running.open().keyring
    with running.engine.connect() as connection:
        frame = bytes(connection.execute(text("SELECT content FROM deployed_note")).scalar_one())
    assert keyring.decrypt(frame, NAME) == b'\x01{"number":1}'
    assert keyring.is_stale(frame)


def test_without_a_pending_key_there_is_nothing_to_promote(running: Deployment) -> None:
    before = running.everything()
    with pytest.raises(errors.WrongStateError, match="kravn-crypto rotate"):
        promoted_by(running)
    with changing(running.operator()) as change, pytest.raises(errors.WrongStateError, match="kravn-crypto rotate"):
        pending_key(change)
    assert running.everything() == before


def test_without_a_primary_it_says_to_restore_the_table(rotated: Deployment) -> None:
    operator = rotated.operator()
    primary = rotated.rows().in_state(State.PRIMARY)
    assert primary is not None
    with changing(operator) as change:
        change.save(change.rows.with_key(primary.in_state(State.RETIRED)), "test")
    with pytest.raises(errors.WrongStateError, match=r"No data key is primary\. Restore kms_keys from a backup"):
        promoted_by(rotated)


# --- Who must hold it -------------------------------------------------------------------------------------------------


def test_every_live_process_must_hold_it(rotated: Deployment) -> None:
    before, pending = rotated.key_id(State.PRIMARY), rotated.key_id(State.PENDING)
    rotated.heartbeat(holds={before, pending}, under=before)
    behind = rotated.heartbeat(holds={before}, under=before)
    with rotated.engine.begin() as connection:
        named = update(TABLES.replicas).where(TABLES.replicas.c.replica_id == behind)
        connection.execute(named.values(host="web-7", process_id=4711))
    unchanged = rotated.everything()
    with pytest.raises(
        errors.ReplicasBehindError, match=rf"{pending} is not yet held by process 4711 on web-7\."
    ) as one:
        promoted_by(rotated)
    assert one.value.replicas == ("process 4711 on web-7",)
    assert "look in the log" in str(one.value)
    assert rotated.everything() == unchanged
    with rotated.engine.connect() as connection:
        assert [replica.replica_id for replica in replicas_without(connection, pending)] == [behind]
        assert len(replicas_without(connection, "00" * 8)) == 2


def test_all_who_are_behind_are_named(rotated: Deployment) -> None:
    before = rotated.key_id(State.PRIMARY)
    for number in range(3):
        behind = rotated.heartbeat(holds={before}, under=before)
        with rotated.engine.begin() as connection:
            named = update(TABLES.replicas).where(TABLES.replicas.c.replica_id == behind)
            connection.execute(named.values(host=f"web-{number}", process_id=number))
    with pytest.raises(errors.ReplicasBehindError) as caught:
        promoted_by(rotated)
    assert set(caught.value.replicas) == {f"process {number} on web-{number}" for number in range(3)}
    assert all(name in str(caught.value) for name in caught.value.replicas)


def test_who_has_ended_no_longer_counts_when_its_lease_is_over(rotated: Deployment) -> None:
    before = rotated.key_id(State.PRIMARY)
    rotated.heartbeat(holds={before}, under=before, lease=60, age=70)
    promoted_by(rotated)


def test_a_process_that_starts_between_the_steps_and_does_not_hold_it_is_waited_for(rotated: Deployment) -> None:
    before, pending = rotated.key_id(State.PRIMARY), rotated.key_id(State.PENDING)
    asked = []

    def ready(change: Change, row: Any) -> None:
        asked.append(row.key_id)
        if len(asked) == 2:
            raise errors.ReplicasBehindError("MARKER")

    with pytest.raises(errors.ReplicasBehindError, match="MARKER"):
        promoted_by(rotated, ready)
    assert asked == [pending, pending]
    assert rotated.states()[before] is State.PRIMARY
    # From here on everybody encrypts under the successor, which the primary's row need not be locked for.
    assert rotated.row(pending).closing == before
    assert rotated.open().keyring.primary_key_id == pending
    promoted_by(rotated)
    assert rotated.states()[pending] is State.PRIMARY
    assert rotated.actions().count("close") == 1


# --- How long it has been pending -------------------------------------------------------------------------------------


def test_it_may_go_by_how_long_the_key_has_been_pending(rotated: Deployment) -> None:
    before, pending = rotated.key_id(State.PRIMARY), rotated.key_id(State.PENDING)
    rotated.heartbeat(holds={before}, under=before)  # is not asked
    row_id = rotated.row(pending).id
    created_at = rotated.row(pending).created_at
    assert created_at is not None
    rotated.tamper(row_id, created_at=created_at - timedelta(seconds=100))
    with pytest.raises(errors.TooEarlyError, match=rf"{pending} has been pending for \d+ of 600 seconds") as caught:
        promoted_by(rotated, older_than(600))
    assert 0 < caught.value.seconds <= 501
    assert f"Try again in {caught.value.seconds:.0f}" in str(caught.value)
    assert rotated.states()[pending] is State.PENDING
    assert rotated.row(pending).closing is None
    rotated.tamper(row_id, created_at=created_at - timedelta(seconds=601))
    promoted_by(rotated, older_than(600))
    assert rotated.states()[pending] is State.PRIMARY


def test_how_long_it_has_been_pending_must_be_on_record(rotated: Deployment) -> None:
    with changing(rotated.operator()) as change:
        undated = replace(pending_key(change), created_at=None)
        with pytest.raises(errors.WrongStateError, match=r"not on record since when data key .* is pending"):
            older_than(0)(change, undated)


def test_a_pending_key_that_is_not_pinned_is_not_promoted_not_even_by_force(rotated: Deployment) -> None:
    pending = rotated.key_id(State.PENDING)
    others = frozenset(row.required("key_id") for row in rotated.rows().keys) - {pending}
    before = rotated.everything()
    for dry_run in (True, False):
        with pytest.raises(errors.UnpinnedKeyError) as caught:
            promote(rotated.operator(store=rotated.store(pinned=others)), force=True, dry_run=dry_run)
        assert caught.value.key_id == pending
    assert rotated.everything() == before
    promote(rotated.operator(store=rotated.store(pinned=others | {pending})), force=True)
    assert rotated.key_id(State.PRIMARY) == pending


def test_a_key_that_comes_in_between_the_two_steps_and_is_not_pinned_is_not_promoted(rotated: Deployment) -> None:
    """Closing the primary is one transaction, and promoting its successor another."""
    pending = rotated.key_id(State.PENDING)
    others = frozenset(row.required("key_id") for row in rotated.rows().keys) - {pending}
    pinned = iter([others | {pending}, others])

    def begin() -> AbstractContextManager[Change]:
        return changing(rotated.operator(store=rotated.store(pinned=next(pinned))))

    with pytest.raises(errors.UnpinnedKeyError):
        promote_pending(begin, lambda *_: None)
    assert rotated.states()[pending] is State.PENDING


# --- Again, and at the same time --------------------------------------------------------------------------------------


def crashing(deployment: Deployment, at: int) -> Any:
    """Begin changes, of which one ends in the middle."""
    operator, begun = deployment.operator(), []

    def begin() -> AbstractContextManager[Change]:
        begun.append(True)
        if len(begun) == at:
            raise Crash
        return changing(operator)

    return begin


def test_after_a_crash_between_the_steps_it_is_taken_up(rotated: Deployment) -> None:
    before, pending = rotated.key_id(State.PRIMARY), rotated.key_id(State.PENDING)
    with pytest.raises(Crash):
        promote_pending(crashing(rotated, 2), anyhow)
    assert (rotated.states()[before], rotated.states()[pending]) == (State.PRIMARY, State.PENDING)
    with pytest.raises(errors.WrongStateError, match=f"{pending} is pending already"):
        rotate(rotated.operator())
    promoted_by(rotated)
    assert (rotated.states()[before], rotated.states()[pending]) == (State.RETIRED, State.PRIMARY)
    assert rotated.actions()[-2:] == ["close", "promote"]
    with pytest.raises(errors.WrongStateError, match="No data key is pending"):
        promoted_by(rotated)


def test_somebody_else_may_do_the_second_step(rotated: Deployment) -> None:
    pending = rotated.key_id(State.PENDING)
    operator, begun = rotated.operator(), []

    def begin() -> AbstractContextManager[Change]:
        begun.append(True)
        if len(begun) == 2:
            promoted_by(rotated)
        return changing(operator)

    rows = promote_pending(begin, held_by_all)
    assert rows.in_state(State.PRIMARY) == rotated.row(pending)
    assert rotated.actions().count("promote") == 1


def test_somebody_else_may_have_rotated_again_meanwhile(rotated: Deployment) -> None:
    """A key that is pending by then has nothing to do with this promotion."""
    first = rotated.key_id(State.PENDING)
    operator, begun = rotated.operator(), []

    def begin() -> AbstractContextManager[Change]:
        begun.append(True)
        if len(begun) == 2:
            promoted_by(rotated)
            rotate(rotated.operator())
        return changing(operator)

    promote_pending(begin, held_by_all)
    assert rotated.states()[first] is State.PRIMARY
    assert rotated.row(rotated.key_id(State.PENDING)).closing is None


# --- Rows that are not genuine ----------------------------------------------------------------------------------------


def test_a_planted_pending_key_is_not_promoted(running: Deployment) -> None:
    primary = running.rows().in_state(State.PRIMARY)
    assert primary is not None
    with running.engine.begin() as connection:
        planted = dict(connection.execute(select(TABLES.keys).where(TABLES.keys.c.id == primary.id)).mappings().one())
        planted |= {"id": 9, "key_id": "ab" * 8, "state": "pending", "primary_of": None}
        connection.execute(TABLES.keys.insert(), [planted])
    for command in (
        lambda: promoted_by(running, anyhow),
        lambda: promote(running.operator(), force=True),
        lambda: disable(running.operator(), primary.required("key_id")),
        running.open,
    ):
        with pytest.raises(errors.RowAuthenticationError, match="Find out who writes to the table"):
            command()
    assert running.states()["ab" * 8] is State.PENDING
    assert running.states()[primary.required("key_id")] is State.PRIMARY


@pytest.mark.parametrize("values", [{"closing": None}, {"state": "retired", "primary_of": None}, {"epoch": 1}])
def test_half_a_promotion_that_somebody_turned_back_is_refused(rotated: Deployment, values: dict[str, Any]) -> None:
    with pytest.raises(Crash):
        promote_pending(crashing(rotated, 2), anyhow)
    in_state = {"closing": State.PENDING, "state": State.PRIMARY, "epoch": State.CONTROL}[next(iter(values))]
    row = rotated.rows().control if in_state is State.CONTROL else rotated.rows().in_state(in_state)
    assert row is not None
    rotated.tamper(row.id, **values)
    with pytest.raises(errors.RowAuthenticationError):
        promoted_by(rotated)
