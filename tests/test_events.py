"""The audit trail: what it says, and that nobody who lacks the MAC key alters it unseen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError

from sqlalchemy_kravn_crypto import events
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.changes import changing
from sqlalchemy_kravn_crypto.events import append, hash_of, hash_of_newest, read_events
from sqlalchemy_kravn_crypto.lifecycle import rotate
from sqlalchemy_kravn_crypto.schema import TABLES
from tests import reference
from tests.fixtures_deployment import Deployment

GENESIS = "0" * 64
COLUMNS = ("id", "occurred_at", "actor", "host", "action", "key_id", "reason", "details", "previous_hash")


def described_hash(values: dict[str, Any]) -> str:
    """Compute an event's hash from the description of the format alone."""

    def lp(value: Any) -> bytes:
        return b"\xff\xff\xff\xff" if value is None else reference.lp(str(value).encode())

    texts = values | {"occurred_at": f"{values['occurred_at']:%Y-%m-%dT%H:%M:%SZ}"}
    covered = b"".join(lp(texts[name]) for name in COLUMNS)
    return hashlib.sha256(reference.lp(b"sqlalchemy-kravn-crypto/event/v1") + covered).hexdigest()


def stored(deployment: Deployment) -> list[dict[str, Any]]:
    with deployment.engine.connect() as connection:
        found = connection.execute(select(TABLES.events).order_by(TABLES.events.c.id)).mappings()
        return [dict(row) for row in found]


def written(deployment: Deployment, *actions: str) -> str | None:
    """Append events and return the hash of the newest."""
    newest = None
    for action in actions:
        with deployment.engine.begin() as connection:
            newest = append(connection, action, newest_hash=newest, actor="alice", details={"of": action})
    return newest


def read(deployment: Deployment, newest: str | None) -> list[events.Event]:
    with deployment.engine.connect() as connection:
        return read_events(connection, newest)


# --- What it says ---------------------------------------------------------------------------------------------------


def test_an_event_says_who_when_what_and_why(deployment: Deployment) -> None:
    details = {"text": "zażółć 🔑", "number": 7, "none": None, "nested": {"a": [1]}}
    before = datetime.now(UTC) - timedelta(seconds=2)
    with deployment.engine.begin() as connection:
        newest = append(
            connection,
            "rotate",
            newest_hash=None,
            actor="alice",
            key_id="0123456789abcdef",
            reason="planned, and: zażółć",
            details=details,
        )
    (event,) = read(deployment, newest)
    assert (event.id, event.actor, event.action, event.key_id) == (1, "alice", "rotate", "0123456789abcdef")
    assert (event.reason, event.details) == ("planned, and: zażółć", details)
    assert (event.previous_hash, event.hash) == (GENESIS, newest)
    assert event.host
    assert event.occurred_at.tzinfo is not None
    assert event.occurred_at.microsecond == 0
    assert before < event.occurred_at < datetime.now(UTC) + timedelta(seconds=2)
    shown = event.as_dict()
    assert shown["occurred_at"] == f"{event.occurred_at:%Y-%m-%dT%H:%M:%SZ}"
    assert shown["details"] == details
    assert shown["hash"] == newest
    with pytest.raises(FrozenInstanceError):
        event.actor = "mallory"  # type: ignore[misc]


def test_without_an_actor_it_is_the_user_of_the_process(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "bob")
    with deployment.engine.begin() as connection:
        newest = append(connection, "rotate", newest_hash=None)
    assert read(deployment, newest)[0].actor == "bob"


def test_a_user_without_a_name_is_unknown(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    with deployment.engine.begin() as connection:
        newest = append(connection, "rotate", newest_hash=None)
    assert read(deployment, newest)[0].actor == "unknown"


def test_a_long_actor_is_cut_off_and_the_trail_is_whole(deployment: Deployment) -> None:
    with deployment.engine.begin() as connection:
        newest = append(connection, "rotate", newest_hash=None, actor="ä" * 300)
    assert read(deployment, newest)[0].actor == "ä" * 255


def test_the_hashes_are_the_ones_that_the_format_describes(deployment: Deployment) -> None:
    written(deployment, "provision", "rotate", "promote")
    previous = GENESIS
    for values in stored(deployment):
        assert values["previous_hash"] == previous
        assert values["hash"] == described_hash(values)
        previous = values["hash"]
    assert tuple(column.name for column in TABLES.events.columns if column.name != "hash") == COLUMNS


def test_the_hash_is_of_the_moment_whatever_the_zone_that_it_is_told_in() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    values = dict.fromkeys(COLUMNS) | {"id": 1, "occurred_at": moment, "previous_hash": GENESIS}
    elsewhere = values | {"occurred_at": moment.astimezone(timezone(timedelta(hours=5, minutes=30)))}
    assert hash_of(values) == hash_of(elsewhere) == described_hash(values)
    assert hash_of(values) != hash_of(values | {"occurred_at": moment + timedelta(seconds=1)})


def test_null_and_an_empty_text_have_hashes_of_their_own() -> None:
    values = dict.fromkeys(COLUMNS) | {"id": 1, "occurred_at": datetime(2026, 1, 2, tzinfo=UTC)}
    assert hash_of(values) != hash_of(values | {"reason": ""})
    # What one column ends with is not what the next begins with.
    assert hash_of(values | {"actor": "ab", "host": "c"}) != hash_of(values | {"actor": "a", "host": "bc"})


def test_an_empty_trail_is_whole(deployment: Deployment) -> None:
    assert read(deployment, None) == []
    with deployment.engine.connect() as connection:
        assert hash_of_newest(connection) is None


def test_two_that_append_at_once_do_not_both_follow_the_same_event(deployment: Deployment) -> None:
    newest = written(deployment, "provision")
    (first,) = stored(deployment)
    twin = first | {"id": 2, "previous_hash": GENESIS, "hash": newest}
    with deployment.engine.connect() as connection, pytest.raises(IntegrityError):
        connection.execute(insert(TABLES.events), [twin])


# --- What somebody does to it ----------------------------------------------------------------------------------------

Rewritten = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def altered(place: int, **values: Any) -> Rewritten:
    return lambda stored: [row | values if row["id"] == place else row for row in stored]


def chained(stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Number and hash events anew, as somebody can who knows the format; there is no key in it."""
    previous = GENESIS
    made = []
    for number, row in enumerate(stored, start=1):
        values = row | {"id": number, "previous_hash": previous}
        previous = described_hash(values)
        made.append(values | {"hash": previous})
    return made


def swapped(stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first, second, third = stored
    return [first, second | {"id": 3}, third | {"id": 2}]


BROKEN = {
    "an actor altered": (altered(2, actor="bob"), "event 2 was altered"),
    "a reason added": (altered(2, reason="because"), "event 2 was altered"),
    "a reason where there was NULL": (altered(2, reason=""), "event 2 was altered"),
    "details altered": (altered(2, details='{"of": "other"}'), "event 2 was altered"),
    "a host altered": (altered(1, host="elsewhere"), "event 1 was altered"),
    "an action altered": (altered(3, action="enable"), "event 3 was altered"),
    "a key id added": (altered(3, key_id="00" * 8), "event 3 was altered"),
    "a time altered": (altered(1, occurred_at=datetime(2020, 1, 1)), "event 1 was altered"),  # noqa: DTZ001 - as stored
    "a hash altered": (altered(3, hash="f" * 64), "event 3 was altered"),
    "a previous hash altered": (altered(2, previous_hash="f" * 64), "event 2 is missing"),
    "the first left out": (lambda stored: stored[1:], "event 1 is missing"),
    "one in the middle left out": (lambda stored: [stored[0], stored[2]], "event 2 is missing"),
    "two swapped": (swapped, "event 2 is missing"),
    "a number left out": (altered(3, id=4), "event 3 is missing"),
    "the last left out": (lambda stored: stored[:2], "end is not the one"),
    "all left out": (lambda stored: [], "end is not the one"),
    "one added": (lambda stored: chained([*stored, stored[0]]), "end is not the one"),
    "the middle left out and hashed anew": (lambda stored: chained([stored[0], stored[2]]), "end is not the one"),
    "one altered and hashed anew": (lambda stored: chained(altered(2, actor="bob")(stored)), "end is not the one"),
    "details that are no JSON": (lambda stored: chained(altered(2, details="{")(stored)), "end is not the one"),
}


@pytest.mark.parametrize(("rewritten", "said"), BROKEN.values(), ids=BROKEN)
def test_a_trail_that_was_altered_is_broken(deployment: Deployment, rewritten: Any, said: str) -> None:
    newest = written(deployment, "provision", "rotate", "promote")
    assert [event.action for event in read(deployment, newest)] == ["provision", "rotate", "promote"]
    _rewrite(deployment, rewritten)
    with pytest.raises(errors.AuditTrailError, match=said) as caught:
        read(deployment, newest)
    assert "restore it from a backup" in str(caught.value)
    assert caught.value.__context__ is None


def _rewrite(deployment: Deployment, rewritten: Rewritten) -> None:
    def in_place(stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
        made = rewritten(stored)
        return made or [stored[0] | {"id": 99}]

    deployment.rewrite_events(in_place)
    with deployment.engine.begin() as connection:
        connection.execute(text("DELETE FROM kms_events WHERE id = 99"))


@pytest.mark.parametrize(
    "rewritten",
    [
        lambda stored: stored[:-1],
        lambda stored: [],
        lambda stored: chained([*stored, stored[0] | {"action": "promote"}]),
        lambda stored: chained(altered(1, actor="bob")(stored)),
    ],
    ids=["truncated", "emptied", "extended", "rewritten"],
)
def test_nothing_is_appended_to_a_trail_that_does_not_end_where_it_must(
    running: Deployment, rewritten: Rewritten
) -> None:
    rotate(running.operator())
    _rewrite(running, rewritten)
    before, trail = running.rows(), stored(running)
    with changing(running.operator()) as change, pytest.raises(errors.AuditTrailError, match="end is not the one"):
        change.save(change.rows, "census")
    with pytest.raises(errors.AuditTrailError, match="end is not the one"):
        read(running, before.in_control().events_hash)
    assert (running.rows(), stored(running)) == (before, trail)
    assert running.open().keyring.key_ids == running.states().keys()  # serving goes on


def test_the_end_of_the_trail_cannot_be_moved_without_the_mac_key(running: Deployment) -> None:
    rotate(running.operator())
    first, *_ = stored(running)
    running.rewrite_events(lambda stored: stored[:1])
    running.tamper(1, events_hash=first["hash"])
    with pytest.raises(errors.RowAuthenticationError, match="altered"):
        running.open()
    with pytest.raises(errors.RowAuthenticationError, match="altered"), changing(running.operator()):
        pass


def test_the_trail_of_an_emptied_key_store_goes_on(running: Deployment) -> None:
    with running.engine.begin() as connection:
        connection.execute(text("DELETE FROM kms_keys"))
    running.open()
    assert running.actions() == ["provision", "provision"]


def test_nothing_follows_the_last_event_that_has_a_number(running: Deployment) -> None:
    """The number of the newest event is not looked at with its hash, and the next one is made of it."""
    with running.engine.begin() as connection:
        connection.execute(text("UPDATE kms_events SET id = :id"), {"id": 2**63 - 1})
    with pytest.raises(errors.AuditTrailError, match="end is not the one"):
        rotate(running.operator())


def test_text_that_is_no_utf8_is_an_altered_event(sqlite_deployment: Deployment) -> None:
    """SQLite keeps it, and its driver does not return it."""
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(text("UPDATE kms_events SET actor = CAST(x'ff' AS TEXT)"))
    with pytest.raises(errors.AuditTrailError, match="restore it from a backup") as caught:
        sqlite_deployment.events()
    assert caught.value.__context__ is None
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(text("UPDATE kms_events SET actor = 'a', hash = CAST(x'ff' AS TEXT)"))
    with pytest.raises(errors.AuditTrailError, match="restore it from a backup"):
        rotate(sqlite_deployment.operator())


@pytest.mark.parametrize("time", ["MARKER", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"])
def test_a_time_that_is_none_is_an_altered_event(sqlite_deployment: Deployment, time: str) -> None:
    """SQLite keeps any text as a time."""
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(text("UPDATE kms_events SET occurred_at = :time"), {"time": time})
    with pytest.raises(errors.AuditTrailError, match="restore it from a backup") as caught:
        sqlite_deployment.events()
    assert caught.value.__context__ is None
