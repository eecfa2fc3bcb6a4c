"""A change of the key store: under the lock, on verified rows, all of it or nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import create_engine, event, select, text

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecrets
from sqlalchemy_kravn_crypto.changes import changing, changing_on
from sqlalchemy_kravn_crypto.rows import MacKey
from sqlalchemy_kravn_crypto.schema import TABLES, State
from sqlalchemy_kravn_crypto.watch import Watch, WatchSettings
from sqlalchemy_kravn_crypto.wrapping import run_here
from tests.fixtures_deployment import BOOTSTRAP, ROOT, Deployment
from tests.leaks import spellings

SECRET = "MARKER of a secret, with as many characters as it takes"


class Crash(BaseException):
    """The process ends here."""


def test_a_change_writes_rows_event_and_epoch_as_one(running: Deployment) -> None:
    before = running.rows()
    primary = before.in_state(State.PRIMARY)
    assert primary is not None
    with changing(running.operator(actor="alice")) as change:
        assert change.rows == before
        changed = change.rows.with_key(replace(primary, closing="x"))
        change.save(changed, "test", key_id=primary.key_id, reason="r", details={"a": 1})
        assert change.rows.epoch == before.epoch + 1
    after = running.rows()
    assert after.epoch == before.epoch + 1
    assert running.row(primary.required("key_id")).closing == "x"
    event = running.events()[-1]
    assert (event.action, event.actor, event.key_id, event.reason) == ("test", "alice", primary.key_id, "r")
    assert event.details == {"a": 1}
    assert after.in_control().events_hash == event.hash
    MacKey(BOOTSTRAP.mac_key).verify(after)


def test_an_event_alone_leaves_the_epoch(running: Deployment) -> None:
    """So that no process takes in what has not changed."""
    epoch = running.rows().epoch
    with changing(running.operator()) as change:
        change.save(change.rows, "test")
        change.save(change.rows, "again")
    assert running.rows().epoch == epoch
    assert running.actions()[-2:] == ["test", "again"]
    running.open()


def test_another_mac_key_is_a_change_of_its_own(running: Deployment) -> None:
    epoch = running.rows().epoch
    key = MacKey(b"k" * 32)
    with changing(running.operator()) as change:
        change.save(change.rows, "test", mac_key=key)
    assert running.rows().epoch == epoch + 1
    key.verify(running.rows())


def test_what_is_not_saved_is_not_done(running: Deployment) -> None:
    before = running.everything()
    with changing(running.operator()) as change:
        change.connection.execute(text("UPDATE kms_keys SET epoch = 99 WHERE id = 1"))
    with pytest.raises(Crash), changing(running.operator()):
        raise Crash
    assert running.everything() == before


@pytest.mark.parametrize("number", range(1, 6))
def test_a_change_that_ends_in_the_middle_is_none(running: Deployment, number: int) -> None:
    before = running.everything()
    primary = before[0].in_state(State.PRIMARY)
    assert primary is not None
    sent: list[str] = []
    armed = [False]

    def crash(_c: Any, _k: Any, statement: str, *_: Any) -> None:
        if armed[0]:
            sent.append(statement)
            if len(sent) == number:
                raise Crash

    event.listen(running.engine, "after_cursor_execute", crash)

    def save() -> None:
        with changing(running.operator()) as change:
            armed[0] = True
            change.save(change.rows.with_key(replace(primary, closing="x")), "test")
            raise Crash  # the statements that a change takes are fewer

    with pytest.raises(Crash):
        save()
    armed[0] = False
    if len(sent) < number:
        assert running.actions()[-1] == "test"
        assert len(sent) >= 4  # the end of the trail, the event, the row and the control row
    else:
        assert running.everything() == before
        running.open()


def test_before_the_first_boot_there_is_nothing_to_change(deployment: Deployment) -> None:
    with (
        pytest.raises(errors.NotProvisionedError, match=r"The first process to start makes it; or `kravn-crypto"),
        changing(deployment.operator()),
    ):
        pass
    assert deployment.rows().control is None


def test_who_holds_another_mac_key_changes_nothing(running: Deployment) -> None:
    before = running.everything()
    running.secret_file.write_text(ROOT[::-1].hex())
    with pytest.raises(errors.KeyStoreError), changing(running.operator()):
        pass
    running.secret_file.write_text(ROOT.hex())
    assert running.everything() == before


@pytest.mark.parametrize(
    ("row_id", "values"),
    [(1, {"epoch": 0}), (1, {"epoch": 99}), (2, {"state": "disabled"}), (3, {"master_key": "transit/kravn:v9"})],
)
def test_rows_that_somebody_else_wrote_are_not_built_upon(
    running: Deployment, row_id: int, values: dict[str, Any]
) -> None:
    running.tamper(row_id, **values)
    with pytest.raises(errors.RowAuthenticationError, match="Find out who writes"), changing(running.operator()):
        pass


def test_the_lock_is_waited_for_with_a_bound(running: Deployment) -> None:
    """MariaDB counts whole seconds."""
    impatient = running.operator(store=running.store(timeout=0.05))
    with (
        changing(running.operator()),
        pytest.raises(errors.KeyStoreLockedError, match=r"Another process has held the lock on kms_keys for more than"),
        changing(impatient),
    ):
        pass
    with changing(impatient):
        pass


def test_a_transaction_that_keeps_the_primary_is_named_and_nothing_is_changed(postgres_url: str, tmp_path: Any) -> None:
    engine, other = create_engine(postgres_url), create_engine(postgres_url)
    deployment = Deployment(engine, tmp_path)
    deployment.open()
    before = deployment.everything()
    primary = deployment.rows().in_state(State.PRIMARY)
    assert primary is not None
    with other.connect() as writer:
        writer.execute(select(TABLES.keys).where(TABLES.keys.c.id == primary.id).with_for_update(read=True))
        with (
            pytest.raises(errors.KeyStoreLockedError, match=r"Nothing was changed; end it, or try again") as caught,
            changing(deployment.operator(store=deployment.store(timeout=0.05))) as change,
        ):
            change.save(change.rows.with_key(primary.in_state(State.RETIRED)), "test")
        assert caught.value.__context__ is None
    assert deployment.everything() == before
    for one in (engine, other):
        one.dispose()


def test_in_the_middle_of_a_programs_work_the_lock_is_had_at_once_or_not_at_all(running: Deployment) -> None:
    opened, store = running.open(), running.store()
    other = create_engine(running.engine.url)
    with (
        changing(running.operator()),
        other.connect() as connection,
        pytest.raises(errors.KeyStoreLockedError, match=r"more than 0\.2 seconds"),
        changing_on(connection, store, opened, blocking=run_here),
    ):
        pass
    with other.connect() as connection, changing_on(connection, store, opened, blocking=run_here) as change:
        change.save(change.rows, "test")
        connection.rollback()  # it is committed already
    assert running.actions()[-1] == "test"
    other.dispose()


# --- Nothing is given away -------------------------------------------------------------------------------------------


def holders(deployment: Deployment, check: Callable[[Any], None]) -> None:
    """Hand each object that holds secrets to a check."""
    store = deployment.store(secret=SECRET, next_secret=SECRET + "!", retired_secrets=(SECRET + "?",))
    with deployment.engine.begin() as connection:
        connection.execute(text("DELETE FROM kms_keys"))
        connection.execute(text("DELETE FROM kms_events"))
    operator = deployment.operator(store=store, standby=deployment.kms)
    opened = store.open(deployment.engine)
    with changing(operator) as change:
        for holder in (
            store,
            operator,
            opened,
            opened.secrets,
            opened.mac_key,
            opened.keyring,
            change,
            Watch(store, opened, WatchSettings()),
            BootstrapSecrets(BOOTSTRAP, BOOTSTRAP, (BOOTSTRAP,)),
        ):
            check(holder)


def test_no_holder_of_secrets_is_pickled_or_copied(sqlite_deployment: Deployment) -> None:
    def check(holder: Any) -> None:
        for operation in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="holds a secret and cannot be pickled or copied"):
                operation(holder)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match="holds a secret"):
                pickle.dumps(holder, protocol)

    holders(sqlite_deployment, check)


def test_no_holder_of_secrets_shows_one(sqlite_deployment: Deployment) -> None:
    keys = (BOOTSTRAP.data_key, BOOTSTRAP.mac_key, ROOT)

    def check(holder: Any) -> None:
        for shown in (repr(holder), str(holder), f"{holder}", repr([holder])):
            assert "MARKER" not in shown
            assert [one for key in keys for one in spellings(key) if one in shown] == []

    holders(sqlite_deployment, check)


def test_an_engines_password_is_not_shown_by_an_operator(sqlite_deployment: Deployment) -> None:
    engine = create_engine("postgresql+psycopg://user:MARKER@nowhere/database")
    operator = replace(sqlite_deployment.operator(), engine=engine)
    assert "MARKER" not in repr(operator)
    assert "nowhere" in repr(operator)
