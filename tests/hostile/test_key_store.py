"""Key tables that were altered, swapped, planted, rolled back or emptied, and what processes and commands make of them.

14. Wrapped keys that are swapped, or come from another deployment: no process starts.
15. A data key that somebody made with the public key of the KMS: no process starts, and none that runs takes it in.
19. Key tables from before a rotation, put back under processes that run: they stop writing. Values of a destroyed key
    that are put back fail as destroyed.

Beyond those, whatever is done to a row: refused where there is a MAC key. What nothing notices has a test that says so.
"""

from __future__ import annotations

import json
import logging
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import DateTime, Engine, Integer, delete, insert, select, text
from sqlalchemy.exc import IntegrityError

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto import following, reset
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.events import hash_of
from sqlalchemy_kravn_crypto.known_columns import declared, record
from sqlalchemy_kravn_crypto.lifecycle import Targets, disable, enable, evidence, promote, rekey_values, rewrap, rotate
from sqlalchemy_kravn_crypto.rekey import plan
from sqlalchemy_kravn_crypto.rows import connect, read_rows, write_rows
from sqlalchemy_kravn_crypto.schema import State
from sqlalchemy_kravn_crypto.status import status
from tests.azure_server import AzureVault
from tests.hostile.attacked import (
    EVENTS,
    FAST,
    KEYS,
    WAYS,
    WITH_MAC,
    Attacked,
    Base,
    Master,
    Row,
    Tables,
    Templates,
    held,
    planted,
)
from tests.openbao import OpenBao
from tests.processes import wait_until
from tests.program import Program, RefusedError
from tests.test_runbooks import KMS
from tests.test_runbooks import Deployment as Runbook

SECRET = "correct horse battery staple, and forty more characters"
TIMES = {"created_at", "updated_at"}
"""What no row MAC covers, and nothing rests on."""


@pytest.fixture(scope="module")
def master(openbao: OpenBao) -> Iterator[Master]:
    azure = AzureVault()
    yield Master(openbao, azure)
    azure.stop()


@pytest.fixture(scope="module")
def templates(master: Master, tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return Templates(master, tmp_path_factory.mktemp("attacked"))


@pytest.fixture(autouse=True)
def _quick_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretch a secret once, and not in each of a thousand boots; it takes 0.2 s."""
    monkeypatch.setattr(BootstrapSecret, "from_secret", _stretched)


_stretched = cache(BootstrapSecret.from_secret)


@pytest.fixture
def attacked(request: pytest.FixtureRequest, templates: Templates, tmp_path: Path) -> Iterator[Attacked]:
    """Give a deployment that is authenticated in the way that the test names."""
    made = templates.copy(request.param, tmp_path)
    yield made
    reset()


def authenticated(*ways: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("attacked", ways, indirect=True)


def replaced(rows: list[Row], old: Row, **values: Any) -> list[Row]:
    return [row | values if row == old else row for row in rows]


def with_state(row: Row, state: str) -> Row:
    return row | {"state": state, "primary_of": row["keyring"] if state == "primary" else None}


# --- The deployment itself -------------------------------------------------------------------------------------------


@authenticated(*WAYS)
def test_undisturbed_it_starts_and_reads_what_it_wrote(attacked: Attacked) -> None:
    """Else every refusal below would prove nothing."""
    states = {row["state"] for row in attacked.rows()}
    assert states == {"control", "pending", "primary", "retired", "disabled", "destroyed"}
    attacked.drop_constraints()
    with attacked.running():
        assert [attacked.number(1), attacked.number(2)] == [1, 2]
        attacked.put(3)
        assert attacked.key_of(3) == attacked.row("primary")["key_id"]


# --- Each column of each row -----------------------------------------------------------------------------------------


def edits(name: str, row: Row, rows: list[Row]) -> list[Any]:
    """Return what a column is changed to: nothing, what another row has, something else."""
    value, type_ = row[name], KEYS.c[name].type
    tried: list[Any] = [] if name == "id" else [None]
    tried += [other[name] for other in rows if other[name] not in {None, value}][:1]
    if name == "state":
        tried += [state.value for state in State]
    elif isinstance(type_, DateTime):
        tried += [value + timedelta(days=1)]
    elif isinstance(type_, Integer):
        tried += [0, 77, (value or 0) - 1]
    else:
        tried += ["", "x", f"{value}x", (value or "")[:-1]]
        tried += [(value or "").swapcase()]
    return [one for number, one in enumerate(tried) if one != value and one not in tried[:number]]


def edited(attacked: Attacked, name: str) -> Iterator[tuple[Row, Any]]:
    """Change a column of each row to one thing after the other, and give the row and what it was changed to."""
    attacked.drop_constraints()
    rows = attacked.rows()
    for row in rows:
        for value in edits(name, row, rows):
            attacked.write(replaced(rows, row, **{name: value}))
            yield row, value


@authenticated(*WITH_MAC)
@pytest.mark.parametrize("name", [column.name for column in KEYS.columns if column.name not in TIMES])
def test_an_edit_of_any_column_of_any_row_is_refused(attacked: Attacked, name: str) -> None:
    of_rows = []
    for row, _ in edited(attacked, name):
        attacked.refuses()
        of_rows.append(row["id"])
    assert all(of_rows.count(row["id"]) >= 2 for row in attacked.rows())


@authenticated(*WITH_MAC)
@pytest.mark.parametrize("name", sorted(TIMES))
def test_an_edit_of_a_time_is_not_noticed(attacked: Attacked, name: str) -> None:
    for _, value in edited(attacked, name):
        if value is not None:
            attacked.start()
            assert [attacked.number(1), attacked.number(2)] == [1, 2]


NOT_NOTICED_WITH_PINS = {
    "closing",
    "deployment_id",
    "epoch",
    "events_hash",
    "keyring",
    "primary_of",
    "row_mac",
    "standby_master_key",
    "standby_provider",
    "standby_wrapped_key",
    *TIMES,
}
"""The columns whose edits pins alone do not notice, as long as there is something in them where there must be."""


def reads_what_it_wrote_or_nothing(attacked: Attacked) -> None:
    for number in (1, 2):
        try:
            assert attacked.number(number) == number
        except errors.UnknownKeyError:
            assert attacked.key_of(number) not in held()


@authenticated("pins")
@pytest.mark.parametrize("name", [column.name for column in KEYS.columns])
def test_with_pins_alone_an_edit_is_refused_or_not_noticed_and_every_key_is_pinned(
    attacked: Attacked, name: str
) -> None:
    noticed = []
    for _, value in edited(attacked, name):
        try:
            attacked.start()
        except errors.KeyStoreError:
            if value not in {None, ""}:
                noticed.append(value)
        else:
            assert held() <= attacked.pins
            reads_what_it_wrote_or_nothing(attacked)
    assert bool(noticed) is (name not in NOT_NOTICED_WITH_PINS)


# --- States ----------------------------------------------------------------------------------------------------------


def transitions(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """Give the rows with one key in another state; where it becomes the primary, the primary is retired."""
    for row in rows:
        for state in State:
            if "control" in {row["state"], state.value} or state.value == row["state"]:
                continue
            changed = [with_state(row, state.value) if other is row else other for other in rows]
            if state is State.PRIMARY:
                changed = [
                    with_state(other, "retired") if other["state"] == "primary" and other["id"] != row["id"] else other
                    for other in changed
                ]
            yield row["state"], state.value, changed


@authenticated(*WITH_MAC)
def test_a_key_in_another_state_is_refused(attacked: Attacked) -> None:
    done = set()
    for before, after, rows in transitions(attacked.rows()):
        attacked.write(rows)
        attacked.refuses()
        done.add((before, after))
    keys = {"pending", "primary", "retired", "disabled", "destroyed"}
    assert done == {(before, after) for before in keys for after in keys - {before}}


@authenticated("pins")
def test_with_pins_alone_the_state_of_a_pinned_key_is_not_noticed(attacked: Attacked) -> None:
    """A pinned key that was retired, because it leaked perhaps, is the primary again. No other key is ever loaded."""
    noticed = set()
    for before, after, rows in transitions(attacked.rows()):
        attacked.write(rows)
        try:
            attacked.start()
        except errors.KeyStoreError:
            noticed.add((before, after))
        else:
            assert held() <= attacked.pins
            reads_what_it_wrote_or_nothing(attacked)
    live, gone = {"pending", "primary", "retired"}, {"disabled", "destroyed"}
    unpinned = {(before, after) for before in gone for after in live}
    # Of those that are pinned: none is the primary any more. A pending one that is not pinned is left out.
    without_primary = {("primary", after) for after in {"pending", "retired", *gone}}
    assert unpinned - {("disabled", "pending")} <= noticed
    assert without_primary <= noticed
    assert ("retired", "primary") not in noticed
    assert ("pending", "primary") not in noticed


@authenticated("pins")
def test_with_pins_alone_a_retired_key_is_written_under_again_and_that_is_not_noticed(attacked: Attacked) -> None:
    retired = attacked.row("retired")
    attacked.write(next(rows for *states, rows in transitions(attacked.rows()) if states == ["retired", "primary"]))
    with attacked.running():
        attacked.put(3)
    assert attacked.key_of(3) == retired["key_id"]


# --- 14 --------------------------------------------------------------------------------------------------------------


def swapped(rows: list[Row], one: Row, other: Row, *names: str) -> list[Row]:
    first = replaced(rows, one, **{name: other[name] for name in names})
    return replaced(first, other, **{name: one[name] for name in names})


@authenticated(*WITH_MAC)
def test_14_wrapped_keys_that_are_swapped_are_refused(attacked: Attacked) -> None:
    rows, primary, retired = attacked.rows(), attacked.row("primary"), attacked.row("retired")
    attacked.write(swapped(rows, primary, retired, "wrapped_key"))
    assert isinstance(attacked.refuses(), errors.RowAuthenticationError)
    attacked.write(swapped(rows, primary, retired, "state", "primary_of", "row_mac"))
    assert isinstance(attacked.refuses(), errors.RowAuthenticationError)


@authenticated("pins")
def test_14_with_pins_alone_wrapped_keys_that_are_swapped_are_another_key(attacked: Attacked) -> None:
    rows, primary, retired = attacked.rows(), attacked.row("primary"), attacked.row("retired")
    attacked.write(swapped(rows, primary, retired, "wrapped_key"))
    with pytest.raises(errors.WrongKeyError):
        attacked.start()
    attacked.write(swapped(rows, primary, retired, "key_check"))
    with pytest.raises(errors.WrongKeyError):
        attacked.start()


@authenticated("file", "secret")
def test_14_keys_that_are_swapped_and_signed_are_refused_by_what_they_are_bound_to(attacked: Attacked) -> None:
    """By somebody who has the secret too: Vault does not unwrap them, and of Azure's the key check is another."""
    rows, primary, retired = attacked.rows(), attacked.row("primary"), attacked.row("retired")
    attacked.write(swapped(rows, primary, retired, "wrapped_key"))
    sign(attacked)
    refusal = errors.UnwrapRefusedError if attacked.way == "file" else errors.WrongKeyError
    with pytest.raises(refusal):
        attacked.start()


def sign(attacked: Attacked) -> None:
    """Make the rows genuine, as somebody does who has the secret."""
    with connect(attacked.engine) as connection:
        before = read_rows(connection)
        write_rows(connection, before, attacked.mac_key().sign(before))
        connection.commit()


@authenticated(*WAYS)
def test_14_the_keys_of_another_deployment_are_refused(
    attacked: Attacked, templates: Templates, tmp_path: Path
) -> None:
    """Even one with the same master key and the same secret; alone, with its whole row, and as the only ones."""
    other = templates.another(attacked.way, tmp_path / "other")
    rows, primary, foreign = attacked.rows(), attacked.row("primary"), other.row("primary")
    assert foreign["key_id"] != primary["key_id"]
    taken = {name: foreign[name] for name in ("key_id", "key_check", "wrapped_key", "row_mac")}
    for values in ({"wrapped_key": foreign["wrapped_key"]}, taken):
        attacked.write(replaced(rows, primary, **values))
        with pytest.raises(errors.KeyStoreError):
            attacked.start()
    control, *_ = rows
    attacked.write([control, *other.rows()[1:]])
    with pytest.raises(errors.KeyStoreError):
        attacked.start()


@authenticated(*WAYS)
def test_all_tables_of_another_deployment_are_refused_where_the_id_is_set_or_keys_are_pinned(
    attacked: Attacked, templates: Templates, tmp_path: Path
) -> None:
    """With the same master key and the same secret, they are genuine; what was written here is not under their keys."""
    other = templates.another(attacked.way, tmp_path / "other")
    deployment_id = attacked.rows()[0]["deployment_id"]
    attacked.restore(other.dump())
    with pytest.raises(errors.DeploymentMismatchError):
        attacked.start(deployment_id=deployment_id)
    if attacked.way == "pins":
        with pytest.raises(errors.UnpinnedKeyError):
            attacked.start()
    else:
        attacked.start()
        with pytest.raises(errors.UnknownKeyError):
            attacked.number(2)


@authenticated(*WITH_MAC)
def test_a_wrapped_key_that_is_rolled_back_to_an_earlier_wrap_is_refused(attacked: Attacked, master: Master) -> None:
    before, before_row = attacked.rows(), attacked.row("primary")
    master.rotate(attacked.way)
    rewrap(attacked.operator())
    after, row = attacked.rows(), attacked.row("primary")
    assert row["master_key"] != before_row["master_key"]
    earlier = {name: before_row[name] for name in ("master_key", "wrapped_key")}
    for values in (earlier, earlier | {"row_mac": before_row["row_mac"]}):
        attacked.write(replaced(after, row, **values))
        assert isinstance(attacked.refuses(), errors.RowAuthenticationError)
    attacked.write([after[0], *before[1:]])
    assert isinstance(attacked.refuses(), errors.RowAuthenticationError)
    attacked.write(after)
    attacked.start()
    assert attacked.number(2) == 2


@authenticated("pins")
def test_with_pins_alone_an_earlier_wrap_that_the_kms_still_opens_is_not_noticed(
    attacked: Attacked, master: Master
) -> None:
    before = attacked.row("primary")
    master.rotate(attacked.way)
    rewrap(attacked.operator())
    earlier = {name: before[name] for name in ("master_key", "wrapped_key")}
    attacked.write(replaced(attacked.rows(), attacked.row("primary"), **earlier))
    attacked.start()
    assert attacked.number(2) == 2


# --- 15 --------------------------------------------------------------------------------------------------------------


@authenticated("secret", "pins")
@pytest.mark.parametrize("state", ["primary", "retired", "pending"])
def test_15_a_key_that_was_wrapped_with_the_public_key_is_not_loaded(
    attacked: Attacked, master: Master, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the place of a key that is there. The KMS would unwrap it, and its key check is right."""
    rows, row = attacked.rows(), attacked.row(state)
    known = planted(row, master)
    attacked.write(replaced(rows, row, **known))
    if attacked.way == "secret":
        assert isinstance(attacked.refuses(), errors.RowAuthenticationError)
    elif state == "pending":
        with caplog.at_level(logging.WARNING):
            attacked.start()
        assert known["key_id"] not in held()
        assert f"{known['key_id']} is not in KRAVN_KMS_PINNED_KEYS" in caplog.text
    else:
        assert isinstance(attacked.refuses(), errors.UnpinnedKeyError)


@authenticated("secret", "pins")
def test_15_a_key_that_is_planted_under_the_id_of_a_genuine_one_is_another_key(
    attacked: Attacked, master: Master
) -> None:
    row = attacked.row("primary")
    known = planted(row, master)
    for values in (known | {"key_id": row["key_id"]}, {"wrapped_key": known["wrapped_key"]}):
        attacked.write(replaced(attacked.rows(), attacked.row("primary"), **values))
        with pytest.raises(errors.WrongKeyError if attacked.way == "pins" else errors.RowAuthenticationError):
            attacked.start()


@authenticated(*WAYS)
@pytest.mark.parametrize("state", ["primary", "pending"])
def test_15_a_process_that_runs_does_not_take_in_a_planted_key(attacked: Attacked, master: Master, state: str) -> None:
    with attacked.running(look_interval=0.05) as engine:
        before = held()
        rows, row = attacked.rows(), attacked.row(state)
        control, *_ = rows
        known = planted(row, master) if attacked.way in {"secret", "pins"} else row | {"key_id": "ab" * 8}
        attacked.write([control | {"epoch": control["epoch"] + 1}, *replaced(rows, row, **known)[1:]])
        attacked.provider.asked.clear()
        looked(engine)
        assert known["key_id"] not in held()
        assert held() <= before
        assert attacked.number(2) == 2


def looked(engine: Engine, times: int = 3) -> None:
    """Begin transactions until the process has looked at the key store so often."""
    watch = following.current()[0]
    assert watch is not None
    for _ in range(times):
        before = watch._looked_at

        def has_looked(before: float = before) -> bool:
            with engine.begin() as connection:
                connection.execute(text("SELECT 1"))
            return watch._looked_at > before

        wait_until(has_looked)


@authenticated(*WAYS)
def test_15_a_planted_pending_key_is_not_promoted(attacked: Attacked, master: Master) -> None:
    row = attacked.row("pending")
    known = planted(row, master) if attacked.way in {"secret", "pins"} else row | {"key_id": "ab" * 8}
    attacked.write(replaced(attacked.rows(), row, **known))
    refusal = errors.UnpinnedKeyError if attacked.way == "pins" else errors.RowAuthenticationError
    with pytest.raises(refusal):
        promote(attacked.operator(), force=True)
    assert attacked.row("pending")["key_id"] == known["key_id"]


# --- Rows too many, too few, or of another time ----------------------------------------------------------------------


@authenticated(*WITH_MAC)
def test_a_row_that_is_deleted_is_refused(attacked: Attacked) -> None:
    rows = attacked.rows()
    for row in rows:
        attacked.write([other for other in rows if other != row])
        attacked.refuses()


@authenticated("pins")
def test_with_pins_alone_a_row_that_is_deleted_is_not_noticed_but_for_control_row_and_primary(
    attacked: Attacked,
) -> None:
    rows, noticed = attacked.rows(), set()
    for row in rows:
        attacked.write([other for other in rows if other != row])
        try:
            attacked.start()
        except errors.KeyStoreError:
            noticed.add(row["state"])
    assert noticed == {"control", "primary"}


@authenticated(*WAYS)
def test_an_epoch_that_is_turned_back_is_refused_by_whoever_starts_with_a_mac_key(attacked: Attacked) -> None:
    control, *keys = attacked.rows()
    attacked.write([control | {"epoch": 1}, *keys])
    if attacked.way == "pins":
        attacked.start()  # states and epoch are not authenticated
    else:
        assert isinstance(attacked.refuses(), errors.RowAuthenticationError)


@authenticated(*WITH_MAC)
def test_a_row_that_is_inserted_or_duplicated_is_refused(attacked: Attacked) -> None:
    attacked.drop_constraints()
    rows = attacked.rows()
    for row in rows:
        for values in ({"id": row["id"]}, {"id": 99}, {"id": 99, "key_id": "ab" * 8}, {"id": 0, "key_id": None}):
            attacked.write([*rows, row | values])
            attacked.refuses()


@authenticated("pins")
def test_with_pins_alone_a_duplicate_of_a_key_is_not_noticed_and_a_second_control_row_or_primary_is_refused(
    attacked: Attacked,
) -> None:
    attacked.drop_constraints()
    rows = attacked.rows()
    noticed = set()
    for row in rows:
        attacked.write([*rows, row | {"id": row["id"] if row["state"] == "control" else 99}])
        try:
            attacked.start()
        except errors.KeyStoreError:
            noticed.add(row["state"])
        else:
            assert held() <= attacked.pins
    assert noticed == {"control", "primary"}


@authenticated(*WAYS)
def test_two_primaries_are_refused(attacked: Attacked) -> None:
    attacked.drop_constraints()
    for state in ("retired", "pending"):
        rows = attacked.rows()
        attacked.write(replaced(rows, attacked.row(state), state="primary", primary_of="default"))
        assert isinstance(attacked.refuses(), (errors.RowAuthenticationError, errors.MalformedRowError))
        attacked.write(rows)


@authenticated(*WAYS)
def test_a_second_control_row_is_refused(attacked: Attacked) -> None:
    """Where the primary key of the table was dropped. Which of the two would be read is the database's choice."""
    attacked.drop_constraints()
    rows = attacked.rows()
    for control in (rows[0], rows[0] | {"epoch": 1}):
        attacked.write([*rows, control])
        assert isinstance(attacked.refuses(), errors.MalformedRowError)


@authenticated(*WAYS)
def test_without_a_control_row_no_process_starts(attacked: Attacked) -> None:
    attacked.execute("DELETE FROM kms_keys WHERE id = 1")
    assert isinstance(attacked.refuses(), errors.MalformedRowError)
    with pytest.raises(errors.MalformedRowError):
        rotate(attacked.operator())


@authenticated(*WAYS)
def test_an_emptied_key_store_is_not_filled_over_the_values(attacked: Attacked) -> None:
    attacked.execute("DELETE FROM kms_keys")
    with pytest.raises(errors.ExistingDataError):
        attacked.start()
    attacked.write([{"id": 1, "state": "control", "epoch": 0, "deployment_id": "00000000-0000-0000-0000-000000000000"}])
    with pytest.raises(errors.ExistingDataError):
        attacked.start()
    assert len(attacked.rows()) == 1


@authenticated(*WITH_MAC)
def test_an_old_row_beside_new_ones_is_refused(attacked: Attacked) -> None:
    """A row as it once was, with the MAC that it once had, and all rows but the control row."""
    attacked.drop_constraints()
    old, new = attacked.earlier["rotate"][KEYS], attacked.rows()
    for row in old:
        [current] = [other for other in new if other["id"] == row["id"]]
        if row["row_mac"] != current["row_mac"]:
            attacked.write(replaced(new, current, **row))
            attacked.refuses()
    attacked.write([new[0], *old[1:]])
    assert isinstance(attacked.refuses(), errors.RowAuthenticationError)


@authenticated(*WAYS)
@pytest.mark.parametrize("before", ["rotate", "disable", "destroy"])
def test_key_tables_that_are_put_back_as_a_whole_are_not_noticed_by_a_process_that_starts(
    attacked: Attacked, before: str
) -> None:
    """Pins keep it from loading keys that were unpinned when they were disabled, or destroyed."""
    dumped = attacked.earlier[before]
    [primary] = [row for row in dumped[KEYS] if row["state"] == "primary"]
    attacked.restore(dumped)
    if attacked.way == "pins" and before != "rotate":
        assert isinstance(attacked.refuses(), errors.UnpinnedKeyError)
        return
    attacked.start()
    assert current_keyring().primary_key_id == primary["key_id"]
    with pytest.raises(errors.UnknownKeyError):
        attacked.number(2)


@authenticated(*WITH_MAC)
def test_where_the_kms_opens_no_earlier_wraps_key_tables_that_are_put_back_are_of_no_use(
    attacked: Attacked, master: Master
) -> None:
    """What helps against key tables that are put back is outside of the database."""
    master.rotate(attacked.way)
    rewrap(attacked.operator())
    with master.opens_newest_only(attacked.way):
        attacked.start()
        assert attacked.number(2) == 2
        attacked.restore(attacked.earlier["destroy"])
        with pytest.raises(errors.MasterKeyUnusableError):
            attacked.start()


def test_two_primaries_are_refused_by_postgresql_and_when_its_constraints_are_dropped_by_us(
    postgres_url: str, master: Master, tmp_path: Path
) -> None:
    made = Attacked(postgres_url, "wrapped", master.provider("wrapped"), tmp_path)
    made.build()
    forced = "UPDATE kms_keys SET state = 'primary', primary_of = 'default' WHERE state = 'retired'"
    with pytest.raises(IntegrityError):
        made.execute(forced)
    made.execute("ALTER TABLE kms_keys DROP CONSTRAINT uq_kms_keys_primary_of")
    with made.running(**FAST) as engine:
        before = held()
        assert made.execute(forced) == 1
        assert made.execute("UPDATE kms_keys SET epoch = epoch + 1 WHERE id = 1") == 1
        looked(engine)
        assert held() == before
        assert made.number(2) == 2
        assert refuses_to_write(made, 100)
    assert isinstance(made.refuses(), errors.MalformedRowError)


def is_refused(action: Callable[[], object], error: type[Exception]) -> bool:
    """Try something, and tell whether it is refused; that it is not yet is no error."""
    try:
        action()
    except error:
        return True
    return False


# --- 19: put back under processes that run ---------------------------------------------------------------------------


def refuses_to_write(attacked: Attacked, first: int) -> bool:
    """Write rows, one after the other, until it is refused."""
    numbers = iter(range(first, first + 10_000))
    wait_until(lambda: is_refused(lambda: attacked.put(next(numbers)), errors.LeaseExpiredError))
    return True


@authenticated(*WAYS)
def test_19_key_tables_from_before_a_rotation_are_not_written_under_by_a_process_that_runs(
    attacked: Attacked, caplog: pytest.LogCaptureFixture
) -> None:
    newest = attacked.dump()
    with attacked.running(**FAST) as engine:
        attacked.put(3)
        with caplog.at_level(logging.WARNING):
            attacked.restore(attacked.earlier["rotate"])
            assert refuses_to_write(attacked, 100)
        assert "went back from epoch" in caplog.text
        assert [attacked.number(1), attacked.number(2), attacked.number(3)] == [1, 2, 3]
        looked(engine)
        assert is_refused(lambda: attacked.put(99), errors.LeaseExpiredError)
        attacked.restore(newest)
        looked(engine)
        attacked.put(4)
        assert attacked.number(4) == 4


@authenticated(*WAYS)
def test_19_an_epoch_that_is_turned_back_stops_the_writing_of_a_process_that_runs(attacked: Attacked) -> None:
    with attacked.running(**FAST):
        attacked.put(3)
        control, *keys = attacked.rows()
        attacked.write([control | {"epoch": control["epoch"] - 1}, *keys])
        assert refuses_to_write(attacked, 100)
        assert attacked.number(3) == 3


@authenticated(*WAYS)
def test_19_a_state_that_is_edited_is_not_taken_in_by_a_process_that_runs(attacked: Attacked) -> None:
    """With pins alone, it is: the retired key is written under again."""
    primary, retired = attacked.row("primary"), attacked.row("retired")
    with attacked.running(**FAST) as engine:
        control, *keys = next(
            rows for *states, rows in transitions(attacked.rows()) if states == ["retired", "primary"]
        )
        attacked.write([control | {"epoch": control["epoch"] + 1}, *keys])
        looked(engine)
        expected = retired if attacked.way == "pins" else primary
        assert current_keyring().primary_key_id == expected["key_id"]
        if attacked.way == "pins":
            attacked.put(3)
            assert attacked.key_of(3) == retired["key_id"]
        else:
            assert refuses_to_write(attacked, 100)


class Site(Runbook):
    """A deployment on PostgreSQL with processes of its own, and its database's owner."""

    def dump(self) -> Tables:
        with self.engine.connect() as connection:
            return {
                table: [dict(row) for row in connection.execute(select(table)).mappings()] for table in (KEYS, EVENTS)
            }

    def restore(self, dumped: Tables) -> None:
        with self.engine.begin() as connection:
            for table, rows in dumped.items():
                connection.execute(delete(table))
                connection.execute(insert(table), rows)


@pytest.fixture
def site(postgres_url: str, openbao: OpenBao, request: pytest.FixtureRequest) -> Iterator[Site]:
    with ExitStack() as stack:
        secret = {"KRAVN_SECRET": SECRET} if request.param == "secret" else {}
        yield Site(postgres_url, stack, secret | {"KRAVN_LEASE": "1"} | KMS(openbao).settings())


@pytest.mark.parametrize("site", ["secret", "wrapped"], indirect=True)
def test_19_a_dump_from_before_a_rotation_stops_the_writers_of_a_fleet_until_the_newest_is_back(site: Site) -> None:
    """Processes of their own, on PostgreSQL. What they wrote before is read by each of them all the while."""
    writers = [site.start(), site.start()]
    writers[0].put(1)
    old = site.dump()
    site.run("rotate")
    pending = site.in_state(State.PENDING)
    wait_until(lambda: all(pending in writer.held() for writer in writers))
    site.run("promote")
    wait_until(lambda: all(writer.primary() == pending for writer in writers))
    writers[0].put(2)
    newest = site.dump()
    site.restore(old)
    numbers = iter(range(100, 10_000))
    for writer in writers:
        wait_until(lambda writer=writer: refused_by(writer, next(numbers)))  # type: ignore[misc]  # a default
        assert {1, 2} <= set(writer.numbers())
        assert "went back from epoch" in writer.log()
    late = site.start()
    with pytest.raises(RefusedError, match="UnknownKeyError"):
        late.numbers()
    late.stop()
    site.restore(newest)
    for writer in writers:
        wait_until(lambda writer=writer: not refused_by(writer, next(numbers)))  # type: ignore[misc]  # as above
    assert writers[0].numbers() == writers[1].numbers() == site.start().numbers()
    assert site.keys_of_values() == {pending, *(row["key_id"] for row in old[KEYS] if row["state"] == "primary")}


def refused_by(writer: Program, number: int) -> bool:
    error = ""
    try:
        writer.put(number)
    except RefusedError as refusal:
        error = refusal.error
    assert error in {"", "LeaseExpiredError"}
    return bool(error)


@pytest.mark.parametrize("site", ["wrapped"], indirect=True)
def test_19_values_of_a_destroyed_key_that_are_put_back_fail_as_destroyed(site: Site) -> None:
    """Whoever runs, and whoever starts; also where a process that runs is shown the key tables from before that."""
    process = site.start(KRAVN_LEASE="60")
    process.put(1)
    [old] = site.keys_of_values()
    site.execute("CREATE TABLE backup AS SELECT * FROM plugin")
    site.run("rotate")
    wait_until(lambda: site.in_state(State.PENDING) in process.held())
    site.run("promote")
    site.run("rekey")
    wait_until(lambda: process.primary() != old)
    keys = site.dump()
    site.run("destroy", old, "--now", "--reason", "it leaked")
    wait_until(lambda: old not in process.held())
    site.execute("DELETE FROM plugin", "INSERT INTO plugin SELECT * FROM backup")
    for reader in (process, site.start()):
        with pytest.raises(RefusedError, match="DestroyedKeyError"):
            reader.numbers()
    site.restore(keys)
    for _ in range(3):
        with pytest.raises(RefusedError, match="DestroyedKeyError"):
            process.numbers()


# --- The audit trail -------------------------------------------------------------------------------------------------

Trail = Callable[[list[Row]], list[Row]]


def with_new_hashes(events: list[Row]) -> list[Row]:
    """Return a trail that is whole in itself: the hashes have no key."""
    newest, made = "0" * 64, []
    for number, row in enumerate(events, 1):
        values = row | {"id": number, "previous_hash": newest, "occurred_at": row["occurred_at"].replace(tzinfo=UTC)}
        newest = hash_of(values)
        made.append(row | {"id": number, "previous_hash": values["previous_hash"], "hash": newest})
    return made


FORGED_TRAILS: dict[str, Trail] = {
    "emptied": lambda _: [],
    "end_cut_off": lambda events: events[:-1],
    "beginning_cut_off": lambda events: events[1:],
    "one_taken_out": lambda events: [*events[:3], *events[4:]],
    "edited": lambda events: [events[0] | {"actor": "somebody else"}, *events[1:]],
    "end_edited": lambda events: [*events[:-1], events[-1] | {"reason": "none"}],
    "reordered": lambda events: [events[1] | {"id": 1}, events[0] | {"id": 2}, *events[2:]],
    "one_added": lambda events: [*events, events[-1] | {"id": len(events) + 1, "previous_hash": events[-1]["hash"]}],
    "one_added_with_its_hash": lambda events: with_new_hashes([*events, events[-1]]),
    "edited_with_all_hashes": lambda events: with_new_hashes([events[0] | {"actor": "somebody else"}, *events[1:]]),
    "cut_off_with_all_hashes": lambda events: with_new_hashes(events[1:]),
}


@authenticated(*WAYS)
@pytest.mark.parametrize("forged", FORGED_TRAILS)
def test_a_trail_that_was_forged_is_not_noticed_by_a_start_but_by_whoever_reads_it(
    attacked: Attacked, forged: str
) -> None:
    dumped = attacked.dump()
    attacked.restore({EVENTS: FORGED_TRAILS[forged](dumped[EVENTS])})
    retired = attacked.row("retired")["key_id"]
    attacked.start()
    assert attacked.number(2) == 2
    reset()
    with pytest.raises(errors.AuditTrailError):
        evidence(attacked.operator(), retired)
    with pytest.raises(errors.AuditTrailError):
        disable(attacked.operator(), retired, targets=Targets(Base.metadata), sleep=lambda _: None)
    problems = status(attacked.engine, attacked.settings(), provider=attacked.provider).problems
    assert [problem.error for problem in problems] == ["AuditTrailError"]
    assert attacked.dump()[KEYS] == dumped[KEYS]


@authenticated(*WAYS)
def test_a_trail_that_was_forged_in_the_middle_is_not_noticed_by_who_appends_to_it(attacked: Attacked) -> None:
    """It goes on from the end, which is under the row MAC; cut off at the end, nothing is appended."""
    events = attacked.dump(EVENTS)[EVENTS]
    attacked.restore({EVENTS: FORGED_TRAILS["edited"](events)})
    promote(attacked.operator())
    attacked.restore({EVENTS: attacked.dump(EVENTS)[EVENTS][:-1]})
    with pytest.raises(errors.AuditTrailError):
        rotate(attacked.operator())


@authenticated(*WAYS)
def test_a_forged_trail_whose_end_the_control_row_names_is_refused_with_a_mac_key(attacked: Attacked) -> None:
    """With pins alone it is not noticed."""
    events = with_new_hashes(attacked.dump(EVENTS)[EVENTS][:1])
    control, *keys = attacked.rows()
    attacked.restore({EVENTS: events, KEYS: [control | {"events_hash": events[-1]["hash"]}, *keys]})
    retired = attacked.row("retired")["key_id"]
    if attacked.way == "pins":
        assert evidence(attacked.operator(), retired)["trail"]["events"] == 1
    else:
        with pytest.raises(errors.RowAuthenticationError):
            evidence(attacked.operator(), retired)


# --- What nothing authenticates --------------------------------------------------------------------------------------


def rotated_away(attacked: Attacked) -> str:
    """Have value 1 under a retired key that is to be disabled, and its column on record; return the key id."""
    attacked.execute("DELETE FROM kms_columns")  # of this process are also those of other tests
    with connect(attacked.engine) as connection:
        record(connection, declared(Base.metadata))
        connection.commit()
    return str(attacked.row("retired")["key_id"])


def disabled(attacked: Attacked, key_id: str, metadata: Any = None) -> None:
    disable(attacked.operator(), key_id, targets=Targets(metadata), sleep=lambda _: None)


@authenticated("secret")
def test_a_column_that_is_deleted_from_the_record_is_not_noticed_unless_the_models_are_named(
    attacked: Attacked,
) -> None:
    key_id = rotated_away(attacked)
    with pytest.raises(errors.KeyInUseError):
        disabled(attacked, key_id)
    attacked.execute("DELETE FROM kms_columns")
    with pytest.raises(errors.KeyInUseError):
        disabled(attacked, key_id, Base.metadata)
    disabled(attacked, key_id)
    with attacked.running(), pytest.raises(errors.DisabledKeyError):
        attacked.number(1)
    enable(attacked.operator(), key_id)
    with attacked.running():
        assert attacked.number(1) == 1


@authenticated("secret")
@pytest.mark.parametrize("values", ["storage = 'text'", "column_name = 'id'"])
def test_a_column_whose_record_was_edited_is_not_noticed_unless_the_models_are_named(
    attacked: Attacked, values: str
) -> None:
    key_id = rotated_away(attacked)
    attacked.execute(f"UPDATE kms_columns SET {values} WHERE table_name = 'attacked_note'")  # noqa: S608 - of this file
    with pytest.raises(errors.KeyInUseError):
        disabled(attacked, key_id, Base.metadata)
    disabled(attacked, key_id)


@authenticated("secret")
@pytest.mark.parametrize("values", ["table_name = 'nowhere'", "column_name = 'nothing'", "schema_name = 'nowhere'"])
def test_a_column_on_record_that_is_not_there_keeps_every_key_from_being_disabled(
    attacked: Attacked, values: str
) -> None:
    key_id = rotated_away(attacked)
    attacked.execute(f"UPDATE kms_columns SET {values} WHERE table_name = 'attacked_note'")  # noqa: S608 - of this file
    with pytest.raises(errors.KeyInUseError, match="cannot be counted"):
        disabled(attacked, key_id)


@authenticated("secret")
def test_a_column_on_record_under_another_name_is_read_by_no_rekey_and_stays_as_it_is(attacked: Attacked) -> None:
    """Its values are left, reported, and keep their key."""
    key_id = rotated_away(attacked)
    attacked.execute("UPDATE kms_columns SET name = 'attacked_note.other'")
    result = rekey_values(attacked.operator())
    assert (result.counts.rekeyed, result.counts.unreadable, result.is_complete) == (0, 1, False)
    with pytest.raises(errors.KeyInUseError):
        disabled(attacked, key_id)
    assert rekey_values(attacked.operator(), Targets(Base.metadata)).is_complete
    with attacked.running():
        assert attacked.number(1) == 1


def key_text(key: int) -> str:
    """Return a primary key as the ledger has it."""
    return json.dumps([b64encode(b"\x10" + key.to_bytes(16, "big")).decode()])


KEY_0, KEY_5 = key_text(0), key_text(5)


@authenticated("secret")
@pytest.mark.parametrize(
    "values",
    ["finished_at = updated_at", f"lower_bound = '{KEY_5}'", f"upper_bound = '{KEY_0}'"],
    ids=["finished", "from_5_on", "up_to_0"],
)
def test_a_plan_that_was_edited_is_followed_and_what_it_leaves_out_is_counted_and_done_with_a_new_one(
    attacked: Attacked, values: str
) -> None:
    retired = rotated_away(attacked)
    operator, targets = attacked.operator(), Targets(Base.metadata)
    plan(attacked.engine, declared(Base.metadata), operator.store.open(attacked.engine).keyring)
    assert attacked.execute(f"UPDATE kms_rekeys SET {values}") > 0  # noqa: S608 - of this file
    assert attacked.key_of(1) == retired
    assert rekey_values(operator, targets).is_complete
    assert attacked.key_of(1) != retired
    with attacked.running():
        assert [attacked.number(1), attacked.number(2)] == [1, 2]


GARBAGE_LISTS = ("MARKER", '{"MARKER": 1}', "[1]", "[" * 100_000)


@authenticated("secret")
@pytest.mark.parametrize("name", ["earlier_names", "row_identity"])
def test_garbage_in_the_record_of_columns_stops_the_commands_that_go_by_it_and_no_process(
    attacked: Attacked, name: str
) -> None:
    """A process that declares the column puts it right."""
    key_id = rotated_away(attacked)
    for garbage in GARBAGE_LISTS:
        attacked.execute(f"UPDATE kms_columns SET {name} = :garbage", garbage=garbage)  # noqa: S608 - of this file
        for command in (
            lambda: disabled(attacked, key_id),
            lambda: disabled(attacked, key_id, Base.metadata),
            lambda: rekey_values(attacked.operator()),
        ):
            with pytest.raises(
                errors.MalformedRowError, match=r"row of kms_columns for 'attacked_note\.content'"
            ) as it:
                command()
            assert "MARKER" not in "".join(traceback.format_exception(it.value))
        problems = status(attacked.engine, attacked.settings(), provider=attacked.provider).problems
        assert [problem.error for problem in problems] == ["MalformedRowError"]
        with attacked.running():
            assert [attacked.number(1), attacked.number(2)] == [1, 2]
            attacked.put(3)
            attacked.execute("DELETE FROM attacked_note WHERE id = 3")
        with pytest.raises(errors.KeyInUseError):
            disabled(attacked, key_id)


@authenticated("secret")
@pytest.mark.parametrize("name", ["lower_bound", "upper_bound", "position"])
def test_garbage_in_the_plan_of_a_rekey_ends_it_in_an_error_of_this_library_until_the_plan_is_cleared(
    attacked: Attacked, name: str
) -> None:
    rotated_away(attacked)
    operator, targets = attacked.operator(), Targets(Base.metadata)
    plan(attacked.engine, declared(Base.metadata), operator.store.open(attacked.engine).keyring)
    for garbage in (*GARBAGE_LISTS, "5", "[]", '["MARKER"]', "null"):
        assert attacked.execute(f"UPDATE kms_rekeys SET {name} = :garbage", garbage=garbage) > 0  # noqa: S608
        with pytest.raises(errors.MalformedRowError, match="kms_rekeys") as caught:
            rekey_values(operator, targets)
        assert "MARKER" not in "".join(traceback.format_exception(caught.value))
        assert [attacked.key_of(1)] == [attacked.row("retired")["key_id"]]
    attacked.execute("DELETE FROM kms_rekeys")
    assert rekey_values(operator, targets).is_complete
