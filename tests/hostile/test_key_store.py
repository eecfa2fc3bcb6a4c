"""Key tables that were altered, swapped, planted, rolled back or emptied, and what processes and commands make of them.

14. Wrapped keys that are swapped, or come from another deployment: no process starts.
15. A data key that somebody made with the public key of the KMS: no process starts, and none that runs takes it in.
19. Key tables from before a rotation, put back under processes that run: they stop writing. Values of a destroyed key
    that are put back fail as destroyed.

Beyond those, whatever is done to a row: refused where there is a MAC key. What nothing notices has a test that says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import DateTime, Engine, Integer, create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto import reset
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.events import hash_of
from sqlalchemy_kravn_crypto.lifecycle import Targets, disable, evidence, promote, rekey_values, rewrap, rotate
from sqlalchemy_kravn_crypto.rows import connect, read_rows, write_rows
from sqlalchemy_kravn_crypto.schema import TABLES, State
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
    Note,
    Row,
    Templates,
    held,
    planted,
)
from tests.openbao import OpenBao
from tests.processes import wait_until

BOOTSTRAP = ("secret", "file")
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
    primary, retired = attacked.row("primary"), attacked.row("retired")
    attacked.write(swapped(attacked.rows(), primary, retired, "wrapped_key"))
    with pytest.raises(errors.WrongKeyError):
        attacked.start()
    attacked.write(swapped(attacked.rows(), *(attacked.row(state) for state in ("primary", "retired")), "key_check"))
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
    home = tmp_path / "other"
    home.mkdir()
    other = Attacked(f"sqlite:///{home / 'a.db'}", attacked.way, templates.master.provider(attacked.way), home)
    other.build()
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
    home = tmp_path / "other"
    home.mkdir()
    other = Attacked(f"sqlite:///{home / 'a.db'}", attacked.way, templates.master.provider(attacked.way), home)
    other.build()
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
        with pytest.raises(errors.UnpinnedKeyError):  # nor is it made the primary for the attacker
            promote(attacked.operator(), force=True)
            attacked.start()
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
    from sqlalchemy_kravn_crypto import following  # noqa: PLC0415 - what a test alone wants to know

    watch = following.current()[0]
    assert watch is not None
    for _ in range(times):
        before = watch._looked_at

        def has_looked(before: float = before) -> bool:
            with engine.begin() as connection:
                connection.execute(text("SELECT 1"))
            return watch._looked_at > before

        wait_until(has_looked)
