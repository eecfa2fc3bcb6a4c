"""What an auditor asks for."""

from __future__ import annotations

import json

import pytest

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, record, recorded
from sqlalchemy_kravn_crypto.lifecycle import (
    Targets,
    add_standby,
    destroy,
    evidence,
    forget_column,
    promote,
    record_census,
    rotate,
)
from sqlalchemy_kravn_crypto.schema import State
from tests.fixtures_deployment import METADATA, Deployment, VersionedKMS

TARGETS = Targets(METADATA)
GONE = KnownColumn("", "gone", "secret", "binary", "gone.secret")


def test_evidence_is_all_that_is_on_record_of_a_key(running: Deployment) -> None:
    operator = running.operator(actor="alice")
    first = running.key_id(State.PRIMARY)
    made = rotate(operator, reason="planned")
    assert made is not None
    promote(operator)
    found = evidence(operator, first)
    assert json.loads(json.dumps(found)) == found
    assert (found["key_id"], found["state"], found["provider"]) == (first, "retired", "vault")
    assert (found["master_key"], found["standby_master_key"]) == ("transit/kravn:v1", None)
    assert found["has_wrapped_key"] is True
    assert found["deployment_id"] == running.rows().in_control().deployment_id
    assert found["epoch"] == running.rows().epoch
    # What made it, what closed it and what retired it; not how its successor was made.
    assert [event["action"] for event in found["events"]] == ["provision", "close", "promote"]
    assert found["trail"] == {"events": 4, "newest_hash": running.rows().in_control().events_hash}
    of_successor = evidence(operator, made.required("key_id"))
    assert [event["action"] for event in of_successor["events"]] == ["rotate", "close", "promote"]
    assert {event["actor"] for event in of_successor["events"]} == {"alice"}


def test_what_concerns_all_keys_concerns_each(running: Deployment) -> None:
    first = running.key_id(State.PRIMARY)
    record_census(running.operator(), TARGETS)
    add_standby(running.operator(standby=VersionedKMS("azure", mount="elsewhere")))
    found = evidence(running.operator(), first)
    assert [event["action"] for event in found["events"]] == ["provision", "census", "standby-add"]
    assert found["standby_master_key"] == "elsewhere/kravn:v1"


def test_a_destroyed_key_has_evidence(running: Deployment) -> None:
    first = running.key_id(State.PRIMARY)
    rotate(running.operator())
    promote(running.operator())
    destroy(running.operator(), first, reason="on request", now=True, targets=TARGETS)
    found = evidence(running.operator(), first)
    assert (found["state"], found["has_wrapped_key"]) == ("destroyed", False)
    assert found["events"][-1]["reason"] == "on request"
    assert found["events"][-1]["details"]["now"] is True


def test_no_wrapped_key_and_no_check_is_evidence(running: Deployment) -> None:
    first = running.key_id(State.PRIMARY)
    row, shown = running.row(first), json.dumps(evidence(running.operator(), first))
    for secret in (row.wrapped_key, row.key_check, row.row_mac):
        assert secret
        assert secret not in shown


def test_of_a_key_that_is_not_there_there_is_no_evidence(running: Deployment) -> None:
    with pytest.raises(errors.WrongStateError, match=r"There is no data key 0{16}\. `kravn-crypto status` lists them"):
        evidence(running.operator(), "00" * 8)


def test_a_broken_trail_is_no_evidence(running: Deployment) -> None:
    rotate(running.operator())
    running.rewrite_events(lambda stored: stored[:1])
    with pytest.raises(errors.AuditTrailError, match="its end is not the one"):
        evidence(running.operator(), running.key_id(State.PRIMARY))


def test_evidence_changes_nothing(running: Deployment) -> None:
    before = running.everything()
    evidence(running.operator(), running.key_id(State.PRIMARY))
    assert running.everything() == before


# --- census -----------------------------------------------------------------------------------------------------------


def test_a_census_is_put_on_record(running: Deployment) -> None:
    first = running.key_id(State.PRIMARY)
    running.put(1, running.open().keyring)
    epoch = running.rows().epoch
    counted = record_census(running.operator(actor="alice"), TARGETS, reason="monthly")
    assert counted.of_key(first) == 1
    event = running.events()[-1]
    assert (event.action, event.actor, event.reason, event.key_id) == ("census", "alice", "monthly", None)
    assert event.details == {"census": counted.as_dict()}
    assert running.rows().epoch == epoch


def test_a_dry_run_of_the_census_counts_and_is_not_on_record(running: Deployment) -> None:
    running.put(1, running.open().keyring)
    before = running.everything()
    assert record_census(running.operator(), TARGETS, dry_run=True).of_key(running.key_id(State.PRIMARY)) == 1
    assert running.everything() == before


def test_a_column_that_cannot_be_counted_is_said_and_not_hidden(running: Deployment) -> None:
    with running.engine.begin() as connection:
        record(connection, [GONE])
    counted = record_census(running.operator(), TARGETS)
    assert [unreachable.column for unreachable in counted.unreachable] == [GONE]
    assert "gone" in str(running.events()[-1].details)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_schema_that_is_not_there_is_refused(running: Deployment, dry_run: bool) -> None:  # noqa: FBT001 - a parameter
    before = running.everything()
    with pytest.raises(errors.ColumnUnreachableError, match="nowhere"):
        record_census(running.operator(), Targets(METADATA, ["nowhere"]), dry_run=dry_run)
    assert running.everything() == before


# --- forget-column ----------------------------------------------------------------------------------------------------


def test_a_column_is_forgotten_on_purpose(running: Deployment) -> None:
    kept = KnownColumn("", "kept", "secret", "binary", "kept.secret")
    with running.engine.begin() as connection:
        record(connection, [GONE, kept])
    before = running.everything()
    forget_column(running.operator(), "", "gone", "secret", dry_run=True)
    with running.engine.connect() as connection:
        assert recorded(connection) == [GONE, kept]
    assert running.everything() == before
    forget_column(running.operator(actor="alice"), "", "gone", "secret", reason="dropped in spring")
    with running.engine.connect() as connection:
        assert recorded(connection) == [kept]
    event = running.events()[-1]
    assert (event.action, event.actor, event.reason) == ("forget-column", "alice", "dropped in spring")
    assert event.details == {"schema": "", "table": "gone", "column": "secret"}


@pytest.mark.parametrize(
    ("names", "label"),
    [(("", "gone", "other"), r"gone\.other"), (("tenant", "gone", "secret"), r"tenant\.gone\.secret")],
)
def test_what_is_not_on_record_is_not_forgotten(running: Deployment, names: tuple[str, str, str], label: str) -> None:
    with running.engine.begin() as connection:
        record(connection, [GONE])
    before = running.everything()
    for dry_run in (True, False):
        with pytest.raises(errors.WrongStateError, match=f"{label} is not on record"):
            forget_column(running.operator(), *names, dry_run=dry_run)
    assert running.everything() == before
