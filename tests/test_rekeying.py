"""Rekeying as an operator has it done: refused where it cannot be whole, and on record from beginning to end."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, func, select, text

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.events import Event
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, record, recorded
from sqlalchemy_kravn_crypto.ledger import Counts, Shard
from sqlalchemy_kravn_crypto.lifecycle import Targets, promote, record_census, rekey_values, rotate
from sqlalchemy_kravn_crypto.schema import TABLES, State
from sqlalchemy_kravn_crypto.types import EncryptedJSON
from tests.fixtures_deployment import METADATA, NAME, Deployment

WHERE = Targets(METADATA)
LABEL = "deployed_note.content"


def promoted(deployment: Deployment) -> tuple[str, str]:
    """Put another key in the place of the primary, and return both key ids."""
    before = deployment.key_id(State.PRIMARY)
    rotate(deployment.operator())
    promote(deployment.operator())
    return before, deployment.key_id(State.PRIMARY)


def rekeys(deployment: Deployment) -> list[Event]:
    return [event for event in deployment.events() if event.action == "rekey"]


def values(deployment: Deployment) -> dict[int, bytes]:
    with deployment.engine.connect() as connection:
        found = connection.execute(text("SELECT id, content FROM deployed_note"))
        return {row.id: bytes(row.content) for row in found}


def put_stale(deployment: Deployment, number: int) -> tuple[str, str]:
    """Store so many values, then put another key in the place of the one that they are under."""
    old = deployment.open().keyring
    for key in range(1, number + 1):
        deployment.put(key, old)
    return promoted(deployment)


def test_every_stale_value_is_moved_and_the_counts_before_and_after_are_on_record(running: Deployment) -> None:
    old, new = put_stale(running, 5)
    result = rekey_values(running.operator(actor="alice"), WHERE, reason="the yearly rotation", batch_size=2)
    assert (result.key_id, result.counts.rekeyed, result.is_complete) == (new, 5, True)
    keyring = running.open().keyring
    assert {frame[2:10].hex() for frame in values(running).values()} == {new}
    assert all(keyring.decrypt(frame, NAME) for frame in values(running).values())
    began, ended = rekeys(running)
    assert {event.actor for event in (began, ended)} == {"alice"}
    assert {event.reason for event in (began, ended)} == {"the yearly rotation"}
    assert (began.details["at"], began.details["to"], began.details["shard"]) == ("beginning", new, None)
    assert began.details["census"]["columns"][0]["keys"] == {old: 5}
    assert (ended.details["at"], ended.details["rekeyed"], ended.details["left"]) == ("end", 5, {})
    assert ended.details["census"]["columns"][0]["keys"] == {new: 5}
    assert (began.key_id, ended.key_id) == (None, None)  # it is about all keys, and in the evidence of each


def test_the_columns_are_on_record_afterwards(running: Deployment) -> None:
    promoted(running)
    rekey_values(running.operator(), WHERE)
    with running.engine.connect() as connection:
        assert [column.label for column in recorded(connection)] == [LABEL]


def test_a_census_puts_the_columns_on_record_too(running: Deployment) -> None:
    record_census(running.operator(), WHERE, dry_run=True)
    with running.engine.connect() as connection:
        assert recorded(connection) == []
    record_census(running.operator(), WHERE)
    with running.engine.connect() as connection:
        assert [column.label for column in recorded(connection)] == [LABEL]


def test_a_dry_run_counts_and_changes_nothing(running: Deployment) -> None:
    _, new = put_stale(running, 3)
    before = running.everything(), values(running)
    for shard in (None, (1, 2)):
        result = rekey_values(running.operator(), WHERE, dry_run=True, shard=shard)
        assert (result.key_id, result.left, result.is_complete) == (new, {LABEL: 3}, False)
    assert (running.everything(), values(running)) == before
    with running.engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(TABLES.rekeys)) == 0


def recorded_besides(deployment: Deployment, table: str) -> None:
    with deployment.engine.begin() as connection:
        record(connection, [KnownColumn("", table, "secret", "binary", f"{table}.secret")])


def test_while_a_column_cannot_be_reached_nothing_is_moved(running: Deployment) -> None:
    put_stale(running, 3)
    recorded_besides(running, "gone")
    before = running.everything(), values(running)
    for dry_run in (True, False):
        with pytest.raises(errors.ColumnUnreachableError, match=r"^Nothing was re-encrypted.*gone\.secret.*forget-col"):
            rekey_values(running.operator(), WHERE, dry_run=dry_run)
    assert (running.everything(), values(running)) == before


def test_a_table_without_a_primary_key_is_one_that_cannot_be_reached(running: Deployment) -> None:
    metadata = MetaData()
    Table("heap", metadata, Column("number", Integer), Column("secret", EncryptedJSON))
    metadata.create_all(running.engine)
    with pytest.raises(errors.ColumnUnreachableError, match=r"heap\.secret"):
        rekey_values(running.operator(), Targets(metadata))
    assert rekeys(running) == []


def test_what_does_not_decrypt_is_left_and_its_rows_are_not_in_the_trail(running: Deployment) -> None:
    put_stale(running, 2)
    strange = Keyring(DataKey(b"?" * 32))
    running.put(987654, strange)
    result = rekey_values(running.operator(), WHERE)
    assert (result.counts.rekeyed, result.counts.unreadable, result.left) == (2, 1, {LABEL: 1})
    assert not result.is_complete
    assert [(value.column, value.key, value.error) for value in result.unreadable] == [
        (LABEL, (987654,), "UnknownKeyError")
    ]
    ended = rekeys(running)[-1]
    assert (ended.details["unreadable"], ended.details["left"]) == (1, {LABEL: 1})
    assert "987654" not in str(ended.as_dict())


def test_a_share_is_not_counted_and_all_shares_are_all(running: Deployment) -> None:
    _, new = put_stale(running, 8)
    for number in (1, 2):
        result = rekey_values(running.operator(), WHERE, shard=(number, 2))
        assert (result.census, result.is_complete) == (None, True)
    assert {frame[2:10].hex() for frame in values(running).values()} == {new}
    assert [event.details["shard"] for event in rekeys(running)] == ["1/2", "1/2", "2/2", "2/2"]
    assert all(event.details["census"] is None for event in rekeys(running))


def test_when_another_key_is_promoted_meanwhile_the_work_stops(running: Deployment) -> None:
    put_stale(running, 6)
    seen: list[Counts] = []

    def promote_another(_: Shard, counts: Counts) -> None:
        if not seen:
            promoted(running)
        seen.append(counts)

    with pytest.raises(errors.OutdatedKeyringError, match="promoted meanwhile"):
        rekey_values(running.operator(), WHERE, batch_size=2, on_progress=promote_another)
    assert len(seen) == 1
    assert [event.details["at"] for event in rekeys(running)] == ["beginning"]
    result = rekey_values(running.operator(), WHERE, batch_size=2)
    assert (result.key_id, result.counts.rekeyed) == (running.key_id(State.PRIMARY), 6)


def test_it_goes_on_where_it_was_stopped(running: Deployment) -> None:
    put_stale(running, 6)

    class StoppedError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        rekey_values(running.operator(), WHERE, batch_size=2, on_progress=stop)
    assert rekey_values(running.operator(), WHERE).counts.rekeyed < 6
    assert {frame[2:10].hex() for frame in values(running).values()} == {running.key_id(State.PRIMARY)}


def test_without_a_genuine_key_store_nothing_is_moved(running: Deployment) -> None:
    put_stale(running, 2)
    before = values(running)
    running.tamper(2, master_key="transit/another:v1")
    with pytest.raises(errors.KeyStoreError):
        rekey_values(running.operator(), WHERE)
    assert values(running) == before


def test_an_empty_key_store_is_not_filled(deployment: Deployment) -> None:
    with pytest.raises(errors.NotProvisionedError):
        rekey_values(deployment.operator(), WHERE)
    assert deployment.rows().keys == ()
