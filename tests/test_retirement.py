"""The end of a data key: disabled with proof that nothing is under it, and destroyed some day."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.changes import Operator, changing
from sqlalchemy_kravn_crypto.events import Event
from sqlalchemy_kravn_crypto.keyring import Keyring
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, declared, record
from sqlalchemy_kravn_crypto.lifecycle import (
    Targets,
    add_standby,
    destroy,
    disable,
    enable,
    evidence,
    promote,
    record_census,
    rotate,
)
from sqlalchemy_kravn_crypto.lifecycle.retirement import destroyable_at
from sqlalchemy_kravn_crypto.schema import State
from sqlalchemy_kravn_crypto.transactions import mark, open_since
from tests.fixtures_deployment import LEASE, METADATA, NAME, Deployment, VersionedKMS

TARGETS = Targets(METADATA)
DAY = 86_400.0


@pytest.fixture
def retired(running: Deployment) -> Deployment:
    """Give a deployment whose first data key of a KMS has been retired just now, with no process alive."""
    rotate(running.operator())
    promote(running.operator())
    return running


def old_key(deployment: Deployment) -> str:
    """Return the key id of the data key that was retired."""
    return next(
        row.required("key_id")
        for row in deployment.rows().keys
        if row.provider != "none" and row.state is not State.PRIMARY
    )


def transactions_are_open(deployment: Deployment) -> bool:
    with deployment.engine.connect() as connection:
        return open_since(connection, mark(connection)) != []


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait as MariaDB's list of transactions does: who reads it within a tenth of a second gets the one of before."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def disabled(deployment: Deployment, key_id: str, **options: Any) -> None:
    """Disable a key without waiting for real."""
    wait_until(lambda: not transactions_are_open(deployment))
    disable(deployment.operator(), key_id, **{"targets": TARGETS, "sleep": lambda _: None, **options})


def refused(deployment: Deployment, command: Callable[[], object], error: type[Exception], match: str) -> Any:
    """See a command refuse, and leave everything as it is."""
    before = deployment.everything()
    with pytest.raises(error, match=match) as caught:
        command()
    assert deployment.everything() == before
    assert caught.value.__context__ is None
    return caught.value


# --- Which keys -------------------------------------------------------------------------------------------------------


def test_only_a_retired_key_is_disabled(retired: Deployment) -> None:
    primary = retired.key_id(State.PRIMARY)
    refused(retired, lambda: disabled(retired, primary), errors.WrongStateError, "is primary, and must be retired")
    refused(
        retired,
        lambda: disabled(retired, "00" * 8),
        errors.WrongStateError,
        "There is no data key 0000000000000000. `kravn-crypto status` lists them",
    )
    pending = rotate(retired.operator())
    assert pending is not None
    pending_id = pending.required("key_id")
    refused(retired, lambda: disabled(retired, pending_id), errors.WrongStateError, "is pending, and must be retired")


def test_only_a_disabled_key_is_enabled(retired: Deployment) -> None:
    key_id = old_key(retired)
    operator = retired.operator()
    refused(retired, lambda: enable(operator, key_id), errors.WrongStateError, "is retired, and must be disabled")
    refused(retired, lambda: enable(operator, "00" * 8), errors.WrongStateError, "There is no data key")


def test_only_a_disabled_key_is_destroyed_and_a_retired_one_on_purpose(retired: Deployment) -> None:
    key_id, primary, operator = old_key(retired), retired.key_id(State.PRIMARY), retired.operator()

    def destroyed(one: str, **options: Any) -> Callable[[], object]:
        return lambda: destroy(operator, one, reason="r", backups_expired=True, targets=TARGETS, **options)

    refused(retired, destroyed(key_id), errors.WrongStateError, "is retired, and must be disabled")
    refused(retired, destroyed(primary), errors.WrongStateError, "is primary, and must be disabled")
    refused(retired, destroyed(primary, now=True), errors.WrongStateError, "must be disabled or retired")
    refused(retired, destroyed("00" * 8, now=True), errors.WrongStateError, "There is no data key")
    destroyed(key_id, now=True)()
    refused(retired, destroyed(key_id, now=True), errors.WrongStateError, "is destroyed, and must be")
    refused(retired, lambda: enable(operator, key_id), errors.WrongStateError, "is destroyed, and must be disabled")
    refused(retired, lambda: disabled(retired, key_id), errors.WrongStateError, "is destroyed, and must be retired")


# --- disable ----------------------------------------------------------------------------------------------------------


def test_a_key_is_disabled_after_two_counts_a_lease_apart(retired: Deployment) -> None:
    key_id = old_key(retired)
    slept: list[float] = []
    said: list[str] = []
    wait_until(lambda: not transactions_are_open(retired))
    row = disable(
        retired.operator(), key_id, targets=TARGETS, reason="planned", sleep=slept.append, progress=said.append
    )
    assert row.state is State.DISABLED
    assert retired.states()[key_id] is State.DISABLED
    # Since then: a lease after it was retired, then a lease after the first count.
    assert len(slept) == len(said) == 2
    assert all(LEASE - 60 < seconds <= LEASE + 1 for seconds in slept)
    assert "may still encrypt under it" in said[0]
    assert "a second count" in said[1]
    count, disabling = retired.events()[-2:]
    assert (count.action, count.key_id) == ("count", key_id)
    assert (disabling.action, disabling.key_id, disabling.reason) == ("disable", key_id, "planned")
    assert disabling.details["census_before"] == count.details["census"]
    assert disabling.details["census"]["columns"]
    keyring = retired.open().keyring
    assert key_id not in keyring.key_ids
    frame = Keyring(_key_of(retired, key_id)).encrypt(b"\x01{}", NAME)
    with pytest.raises(errors.DisabledKeyError, match=f"kravn-crypto enable {key_id}"):
        keyring.decrypt(frame, NAME)


def _key_of(deployment: Deployment, key_id: str) -> Any:
    """Return a data key whatever its state, as one that has held it all the while."""
    from sqlalchemy_kravn_crypto.providers.base import Deadline
    from sqlalchemy_kravn_crypto.wrapping import checked_key, unwrapping

    row = deployment.row(key_id)
    deployment_id = deployment.rows().in_control().required("deployment_id")
    return checked_key(row, unwrapping(deployment.kms, row, deployment_id, Deadline(10))())


def test_the_longest_lease_of_a_live_process_is_waited_for(retired: Deployment) -> None:
    retired.heartbeat(holds=set(), under=retired.key_id(State.PRIMARY), lease=1000)
    retired.heartbeat(holds=set(), under=retired.key_id(State.PRIMARY), lease=5000, age=6000)  # has ended
    slept: list[float] = []
    disabled(retired, old_key(retired), sleep=slept.append)
    assert all(940 < seconds <= 1001 for seconds in slept)


def test_without_waiting_it_says_how_long_it_is_still_to_wait(retired: Deployment) -> None:
    key_id = old_key(retired)
    early = refused(
        retired,
        lambda: disabled(retired, key_id, wait=False),
        errors.TooEarlyError,
        f"{key_id}: processes may still encrypt under it until their leases are over. Try again in",
    )
    assert 0 < early.seconds <= LEASE + 1
    retired.let_pass(LEASE + 2)
    with pytest.raises(errors.TooEarlyError, match="a second count must find nothing either") as caught:
        disabled(retired, key_id, wait=False)
    assert LEASE - 60 < caught.value.seconds <= LEASE + 1
    assert retired.actions()[-1] == "count"
    # The first count is on record, and is not made again.
    refused(retired, lambda: disabled(retired, key_id, wait=False), errors.TooEarlyError, "a second count")
    retired.let_pass(LEASE + 2)
    disabled(retired, key_id, wait=False)
    assert retired.states()[key_id] is State.DISABLED
    assert retired.actions().count("count") == 1


def test_a_count_while_processes_could_still_encrypt_under_it_does_not_do(retired: Deployment) -> None:
    key_id = old_key(retired)
    with changing(retired.operator()) as change:
        change.save(change.rows, "count", key_id=key_id, details={"transactions": "", "census": {}})
    disabled(retired, key_id)
    assert retired.actions()[-3:] == ["count", "count", "disable"]


def test_a_count_from_before_it_was_retired_again_does_not_do(retired: Deployment) -> None:
    """Such as the one of another key."""
    key_id = old_key(retired)
    retired.let_pass(LEASE + 2)
    with changing(retired.operator()) as change:
        change.save(change.rows, "count", key_id="00" * 8, details={"transactions": "", "census": {}})
    retired.let_pass(LEASE + 2)
    disabled(retired, key_id)
    assert [event.key_id for event in retired.events() if event.action == "count"] == ["00" * 8, key_id]


def test_values_under_it_keep_a_key_from_being_disabled(retired: Deployment) -> None:
    key_id = old_key(retired)
    retired.put_under(1, key_id)
    refused(
        retired,
        lambda: disabled(retired, key_id),
        errors.KeyInUseError,
        rf"1 values are under data key {key_id}\. Move them with `kravn-crypto rekey`",
    )
    retired.take_away_values()
    retired.put_under(1, retired.key_id(State.PRIMARY))
    disabled(retired, key_id)


def test_a_value_that_is_written_between_the_counts_is_found_by_the_second(retired: Deployment) -> None:
    """By a process that was stopped for long, and that has neither looked nor left a heartbeat since."""
    key_id = old_key(retired)
    waits: list[float] = []

    def write_at_the_second(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            retired.put_under(1, key_id)

    with pytest.raises(errors.KeyInUseError, match="1 values are under"):
        disabled(retired, key_id, sleep=write_at_the_second)
    assert retired.states()[key_id] is State.RETIRED


@pytest.mark.parametrize("at", [0, 2])
def test_a_live_process_that_encrypts_under_it_is_waited_for(retired: Deployment, at: int) -> None:
    key_id = old_key(retired)
    retired.heartbeat(holds={key_id}, under=key_id, lease=60, age=100)  # has ended
    retired.heartbeat(holds={key_id}, under=retired.key_id(State.PRIMARY))  # has it for reading
    waits: list[float] = []

    def beat(seconds: float = 0.0) -> None:
        waits.append(seconds)
        if len(waits) == at:
            retired.heartbeat(holds={key_id}, under=key_id)

    if at == 0:
        retired.heartbeat(holds={key_id}, under=key_id)
    with pytest.raises(errors.ReplicasBehindError, match=f"Data key {key_id} is still what process") as caught:
        disabled(retired, key_id, sleep=beat)
    assert len(caught.value.replicas) == 1
    assert "when its lease is over" in str(caught.value)
    assert retired.states()[key_id] is State.RETIRED


def test_a_recorded_column_that_cannot_be_counted_keeps_it_from_being_disabled(retired: Deployment) -> None:
    key_id = old_key(retired)
    with retired.engine.begin() as connection:
        record(connection, [KnownColumn("", "gone", "secret", "binary", "gone.secret")])
    refused(
        retired,
        lambda: disabled(retired, key_id),
        errors.KeyInUseError,
        r"cannot be counted: gone\.secret\. .*kravn-crypto forget-column",
    )


def test_columns_on_record_are_counted_though_nobody_names_them(retired: Deployment) -> None:
    key_id = old_key(retired)
    retired.put_under(1, key_id)
    with retired.engine.begin() as connection:
        record(connection, declared(METADATA))
    refused(retired, lambda: disabled(retired, key_id, targets=None), errors.KeyInUseError, "1 values are under")


def test_a_dry_run_of_disable_writes_nothing_and_waits_for_nothing(retired: Deployment) -> None:
    key_id = old_key(retired)

    def dry(**options: Any) -> Callable[[], object]:
        return lambda: disabled(retired, key_id, dry_run=True, sleep=None, **options)

    refused(retired, dry(), errors.TooEarlyError, "until their leases are over")
    retired.let_pass(LEASE + 2)
    refused(retired, dry(), errors.TooEarlyError, "a second count")
    retired.put_under(1, key_id)
    refused(retired, dry(), errors.KeyInUseError, "1 values are under")
    retired.take_away_values()
    with pytest.raises(errors.TooEarlyError):
        disabled(retired, key_id, wait=False)
    retired.let_pass(LEASE + 2)
    before = retired.everything()
    dry()()
    assert retired.everything() == before
    disabled(retired, key_id, wait=False)


def test_since_when_a_key_is_retired_must_be_on_record(running: Deployment) -> None:
    operator = running.operator()
    rotate(operator)
    primary, pending = running.rows().in_state(State.PRIMARY), running.rows().in_state(State.PENDING)
    assert primary is not None
    assert pending is not None
    with changing(operator) as change:
        rows = change.rows.with_key(primary.in_state(State.RETIRED)).with_key(pending.in_state(State.PRIMARY))
        change.save(rows, "test")
    refused(
        running,
        lambda: disabled(running, primary.required("key_id")),
        errors.WrongStateError,
        "does not say since when data key .* is retired",
    )


def test_the_bootstrap_key_is_retired_by_the_adoption_of_a_kms(deployment: Deployment) -> None:
    deployment.open(provider=None)
    bootstrap = deployment.key_id(State.PRIMARY)
    deployment.open()
    disabled(deployment, bootstrap)
    deployment.secret_file.unlink()  # the rows are signed with it
    with pytest.raises(errors.RowAuthenticationError):
        deployment.open()


def test_a_transaction_that_is_open_since_the_first_count_is_waited_for(retired: Deployment) -> None:
    """It may hold values that no count can see. SQLite has none, for who holds its lock."""
    key_id = old_key(retired)
    if retired.engine.dialect.name == "sqlite":
        disabled(retired, key_id)
        return
    other = create_engine(retired.engine.url)
    with other.connect() as connection:
        connection.execute(text("INSERT INTO deployed_note (id) VALUES (99)"))
        wait_until(lambda: transactions_are_open(retired))
        with pytest.raises(errors.KeyInUseError, match=r"Transactions that were open.*still are.*End them") as caught:
            disable(retired.operator(), key_id, targets=TARGETS, sleep=lambda _: None)
        connection.commit()
    assert any(name in str(caught.value) for name in ("backend ", "thread "))
    assert retired.states()[key_id] is State.RETIRED
    disabled(retired, key_id)
    assert retired.states()[key_id] is State.DISABLED
    other.dispose()


# --- enable -----------------------------------------------------------------------------------------------------------


def test_a_disabled_key_comes_back_for_reading(retired: Deployment) -> None:
    key_id = old_key(retired)
    disabled(retired, key_id)
    before = retired.everything()
    assert enable(retired.operator(), key_id, dry_run=True).state is State.RETIRED
    assert retired.everything() == before
    assert enable(retired.operator(actor="alice"), key_id, reason="a value was left").state is State.RETIRED
    event = retired.events()[-1]
    assert (event.action, event.key_id, event.actor, event.reason) == ("enable", key_id, "alice", "a value was left")
    keyring = retired.open().keyring
    assert key_id in keyring.key_ids
    assert keyring.primary_key_id != key_id


# --- destroy ----------------------------------------------------------------------------------------------------------


def destroyed(operator: Operator, key_id: str, **options: Any) -> Any:
    given = {"reason": "end of its life", "backups_expired": True, "after_days": 7.0, "targets": TARGETS, **options}
    return destroy(operator, key_id, **given)


def test_a_destroyed_key_leaves_a_tombstone(retired: Deployment) -> None:
    standby = VersionedKMS("azure", mount="elsewhere")
    add_standby(retired.operator(standby=standby))
    key_id = old_key(retired)
    frame = Keyring(_key_of(retired, key_id)).encrypt(b"\x01{}", NAME)
    disabled(retired, key_id)
    retired.let_pass(7 * DAY + 1)
    destroyed(retired.operator(actor="alice"), key_id)
    row = retired.row(key_id)
    assert row.state is State.DESTROYED
    assert (row.wrapped_key, row.standby_wrapped_key, row.standby_provider, row.standby_master_key) == (None,) * 4
    event = retired.events()[-1]
    assert (event.action, event.actor, event.reason) == ("destroy", "alice", "end of its life")
    assert event.details["backups_expired"] is True
    assert event.details["now"] is False
    assert event.details["census"]["columns"]
    keyring = retired.open().keyring
    with pytest.raises(errors.DestroyedKeyError, match=f"kravn-crypto evidence {key_id}"):
        keyring.decrypt(frame, NAME)
    assert evidence(retired.operator(), key_id)["has_wrapped_key"] is False
    calls = retired.kms.calls.copy()
    retired.open()
    assert retired.kms.calls - calls == {"unwrap": 1}


def test_it_must_have_been_disabled_for_long_enough(retired: Deployment) -> None:
    key_id, operator = old_key(retired), retired.operator()
    disabled(retired, key_id)
    retired.let_pass(7 * DAY - 3600)
    disabled_at = next(event.occurred_at for event in retired.events() if event.action == "disable")
    allowed_at = disabled_at + timedelta(days=7)
    assert destroyable_at(retired.events(), key_id, 7) == allowed_at
    early = refused(
        retired,
        lambda: destroyed(operator, key_id),
        errors.TooEarlyError,
        rf"may be destroyed from {allowed_at:%Y-%m-%d %H:%M} UTC on, when it has been disabled for 7 days",
    )
    assert 0 < early.seconds <= 3600
    # Who brings it back in between begins anew.
    enable(operator, key_id)
    disabled(retired, key_id)
    retired.let_pass(3601)
    refused(retired, lambda: destroyed(operator, key_id), errors.TooEarlyError, "for 7 days")
    destroyed(operator, key_id, after_days=0)


def test_since_when_a_key_is_disabled_must_be_on_record(retired: Deployment) -> None:
    key_id, operator = old_key(retired), retired.operator()
    with changing(operator) as change:
        change.save(change.rows.with_key(retired.row(key_id).in_state(State.DISABLED)), "test")
    assert destroyable_at(retired.events(), key_id, 7) is None
    refused(
        retired,
        lambda: destroyed(operator, key_id, after_days=0),
        errors.WrongStateError,
        "not on record since when .* is disabled. Enable and disable it",
    )


@pytest.mark.parametrize("reason", ["", "  ", "\n\t"])
@pytest.mark.parametrize("now", [False, True])
def test_without_a_reason_nothing_is_destroyed(sqlite_deployment: Deployment, reason: str, now: bool) -> None:  # noqa: FBT001 - a parameter
    operator = sqlite_deployment.operator()
    refused(
        sqlite_deployment,
        lambda: destroyed(operator, "00" * 8, reason=reason, now=now),
        errors.NotConfirmedError,
        "Give a reason for the audit trail: --reason TEXT",
    )


def test_the_backups_must_be_said_to_have_expired(retired: Deployment) -> None:
    key_id, operator = old_key(retired), retired.operator()
    disabled(retired, key_id)
    refused(
        retired,
        lambda: destroyed(operator, key_id, backups_expired=False, after_days=0),
        errors.NotConfirmedError,
        "Say --backups-expired if .*or --now to shred them",
    )
    destroyed(operator, key_id, backups_expired=False, now=True)


def test_values_under_it_keep_a_key_from_being_destroyed(retired: Deployment) -> None:
    """Such as those of a backup that was restored since it was disabled."""
    key_id, operator = old_key(retired), retired.operator()
    frame = Keyring(_key_of(retired, key_id)).encrypt(b"\x01{}", NAME)
    disabled(retired, key_id)
    retired.put_frame(1, frame)
    retired.put_frame(2, frame)
    refused(retired, lambda: destroyed(operator, key_id, after_days=0), errors.KeyInUseError, "2 values are under")
    retired.take_away_values()
    with retired.engine.begin() as connection:
        record(connection, [KnownColumn("", "gone", "secret", "binary", "gone.secret")])
    refused(retired, lambda: destroyed(operator, key_id, after_days=0), errors.KeyInUseError, r"gone\.secret")


def test_shredding_is_at_once_and_says_what_was_lost(retired: Deployment) -> None:
    key_id, operator = old_key(retired), retired.operator()
    retired.put_under(1, key_id)
    with retired.engine.begin() as connection:
        record(connection, [KnownColumn("", "gone", "secret", "binary", "gone.secret")])
    destroyed(operator, key_id, backups_expired=False, now=True)
    assert retired.states()[key_id] is State.DESTROYED
    details = retired.events()[-1].details
    assert (details["now"], details["backups_expired"]) == (True, False)
    assert key_id in str(details["census"])
    assert "gone" in str(details["census"])


def test_a_dry_run_of_destroy_destroys_nothing(retired: Deployment) -> None:
    key_id, operator = old_key(retired), retired.operator()
    disabled(retired, key_id)
    refused(retired, lambda: destroyed(operator, key_id, dry_run=True), errors.TooEarlyError, "7 days")
    before = retired.everything()
    assert destroyed(operator, key_id, after_days=0, dry_run=True).wrapped_key is not None
    assert destroyed(operator, key_id, now=True, dry_run=True).wrapped_key is not None
    assert retired.everything() == before


# --- What all of them rest on -----------------------------------------------------------------------------------------


def test_with_a_broken_trail_nothing_is_disabled_or_destroyed(retired: Deployment) -> None:
    key_id = old_key(retired)

    def altered(stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"actor": "mallory"} if row["id"] == 2 else row for row in stored]

    retired.rewrite_events(altered)
    with pytest.raises(errors.AuditTrailError, match="event 2 was altered"):
        disabled(retired, key_id)
    assert retired.states()[key_id] is State.RETIRED


@pytest.mark.parametrize("state", ["disabled", "retired"])
def test_a_state_that_somebody_else_wrote_is_refused(retired: Deployment, state: str) -> None:
    key_id, operator = old_key(retired), retired.operator()
    if state == "retired":
        disabled(retired, key_id)
    retired.tamper(retired.row(key_id).id, state=state)
    for command in (
        lambda: destroyed(operator, key_id, after_days=0, now=True),
        lambda: enable(operator, key_id),
        lambda: disabled(retired, key_id),
    ):
        with pytest.raises(errors.RowAuthenticationError, match="Find out who writes to the table"):
            command()


def test_the_count_that_decides_is_made_under_the_lock(retired: Deployment) -> None:
    """So that nobody changes the key store between the count and what rests on it."""
    key_id = old_key(retired)
    sent: list[str] = []
    event.listen(retired.engine, "before_cursor_execute", lambda _c, _k, statement, *_: sent.append(statement))
    disabled(retired, key_id)
    lock = {"sqlite": "BEGIN IMMEDIATE"}.get(retired.engine.dialect.name, "FOR UPDATE")
    last_lock = max(number for number, statement in enumerate(sent) if lock in statement)
    last_count = max(number for number, statement in enumerate(sent) if "deployed_note" in statement)
    assert last_lock < last_count < len(sent) - 1


def test_when_a_key_may_be_destroyed_is_reckoned_from_when_it_was_last_disabled() -> None:
    def happened(number: int, action: str, key_id: str) -> Event:
        return Event(
            id=number,
            occurred_at=datetime(2026, 1, number, tzinfo=UTC),
            actor="a",
            host="h",
            action=action,
            key_id=key_id,
            previous_hash="",
            hash="",
        )

    trail = [happened(1, "disable", "a"), happened(2, "disable", "b"), happened(3, "enable", "a")]
    assert destroyable_at(trail, "a", 7.5) == datetime(2026, 1, 8, 12, tzinfo=UTC)
    assert destroyable_at([*trail, happened(4, "disable", "a")], "a", 0) == datetime(2026, 1, 4, tzinfo=UTC)
    assert destroyable_at(trail, "c", 7) is None


def test_the_census_before_is_there_for_the_auditor(retired: Deployment) -> None:
    retired.put_under(1, retired.key_id(State.PRIMARY))
    counted = record_census(retired.operator(), TARGETS)
    disabled(retired, old_key(retired))
    assert retired.events()[-1].details["census"] == counted.as_dict()
    assert replace(TARGETS, schemas=()) == TARGETS
