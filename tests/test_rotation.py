"""A new data key, its promotion, and a new secret, as commands."""

from __future__ import annotations

import logging
from base64 import b64decode
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, text

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret
from sqlalchemy_kravn_crypto.keyring import DataKey
from sqlalchemy_kravn_crypto.keystore import KeyStore
from sqlalchemy_kravn_crypto.lifecycle import add_standby, promote, rotate, rotate_secret
from sqlalchemy_kravn_crypto.rows import MacKey
from sqlalchemy_kravn_crypto.schema import TABLES, State
from tests.fixtures_deployment import BOOTSTRAP, Deployment, VersionedKMS

NEXT = "the next secret, with as many characters as it takes"
NEXT_SECRET = BootstrapSecret.from_secret(NEXT)
NEXT_KEY_ID = DataKey(NEXT_SECRET.data_key).key_id.hex()
NEXT_MAC_KEY_ID = MacKey(NEXT_SECRET.mac_key).key_id.hex()
BOOTSTRAP_KEY_ID = DataKey(BOOTSTRAP.data_key).key_id.hex()


# --- rotate -----------------------------------------------------------------------------------------------------------


def test_rotate_makes_a_pending_key_that_is_wrapped_and_checked(running: Deployment) -> None:
    before, calls = running.rows(), running.kms.calls.copy()
    made = rotate(running.operator(actor="alice"), reason="planned")
    assert made is not None
    # Wrapped, unwrapped to compare, refused under another binding.
    assert running.kms.calls - calls == {"wrap": 1, "unwrap": 2}
    row = running.row(made.required("key_id"))
    assert (row.state, row.primary_of, row.closing) == (State.PENDING, None, None)
    assert (row.provider, row.master_key, row.keyring) == ("vault", "transit/kravn:v1", "default")
    assert row.id == max(known.id for known in before.keys) + 1
    assert (row.standby_provider, row.standby_wrapped_key) == (None, None)
    assert running.rows().epoch == before.epoch + 1
    event = running.events()[-1]
    assert (event.action, event.actor, event.key_id, event.reason) == ("rotate", "alice", made.key_id, "planned")
    assert event.details == {"provider": "vault", "master_key": "transit/kravn:v1"}
    keyring = running.open().keyring
    assert made.key_id in keyring.key_ids
    assert keyring.primary_key_id == running.key_id(State.PRIMARY)


def test_the_new_key_is_unlike_all_others(running: Deployment) -> None:
    for _ in range(3):
        rotate(running.operator())
        promote(running.operator())
    assert len(running.states()) == len({row.wrapped_key for row in running.rows().keys}) == 5


def test_one_pending_key_at_a_time(running: Deployment) -> None:
    first = rotate(running.operator())
    assert first is not None
    before, calls = running.everything(), running.kms.calls.copy()
    for dry_run in (False, True):
        with pytest.raises(errors.WrongStateError, match=f"{first.key_id} is pending already. Promote it with") as one:
            rotate(running.operator(), dry_run=dry_run)
        assert one.value.__context__ is None
    assert running.everything() == before
    assert running.kms.calls == calls


def test_without_a_kms_rotate_names_the_other_command(running: Deployment) -> None:
    with pytest.raises(errors.WrongStateError, match="kravn-crypto rotate-secret"):
        rotate(running.operator(store=running.store(provider=None)))


def test_before_the_first_boot_there_is_nothing_to_rotate(deployment: Deployment) -> None:
    with pytest.raises(errors.NotProvisionedError, match="kravn-crypto provision"):
        rotate(deployment.operator())
    assert deployment.rows().keys == ()
    assert deployment.kms.calls == {}


@pytest.mark.parametrize("switch", ["down", "sealed", "denies", "ignores_binding"])
def test_a_kms_that_does_not_wrap_leaves_no_key(running: Deployment, switch: str) -> None:
    before = running.everything()
    setattr(running.kms, switch, True)
    with pytest.raises(errors.ProviderError):
        rotate(running.operator())
    setattr(running.kms, switch, False)
    assert running.everything() == before


def test_a_kms_that_unwraps_to_another_key_leaves_no_key(running: Deployment) -> None:
    before = running.everything()
    running.kms.returns = b"x" * 32
    with pytest.raises(errors.WrongKeyError, match="It was not stored"):
        rotate(running.operator())
    running.kms.returns = None
    assert running.everything() == before


def test_a_dry_run_of_rotate_makes_nothing(running: Deployment) -> None:
    before, calls = running.everything(), running.kms.calls.copy()
    assert rotate(running.operator(), dry_run=True) is None
    assert running.everything() == before
    assert running.kms.calls == calls


def test_where_the_keys_have_a_standby_the_new_one_must(running: Deployment) -> None:
    standby = VersionedKMS("azure", mount="elsewhere")
    add_standby(running.operator(standby=standby))
    before = running.everything()
    with pytest.raises(errors.StandbyError, match=r"KRAVN_STANDBY_KMS_PROVIDER.*standby remove"):
        rotate(running.operator())
    assert running.everything() == before
    made = rotate(running.operator(standby=standby))
    assert made is not None
    row = running.row(made.required("key_id"))
    assert (row.standby_provider, row.standby_master_key) == ("azure", "elsewhere/kravn:v1")
    # The standby alone serves.
    assert made.key_id in running.open(provider=standby).keyring.key_ids


def test_a_standby_that_does_not_answer_leaves_no_key(running: Deployment) -> None:
    standby = VersionedKMS("azure", mount="elsewhere")
    add_standby(running.operator(standby=standby))
    before = running.everything()
    standby.down = True
    with pytest.raises(errors.ProviderUnavailableError):
        rotate(running.operator(standby=standby))
    assert running.everything() == before


# --- promote ----------------------------------------------------------------------------------------------------------


def test_promote_goes_by_heartbeats(running: Deployment) -> None:
    made = rotate(running.operator())
    assert made is not None
    before = running.key_id(State.PRIMARY)
    running.heartbeat(holds={before}, under=before)
    unchanged = running.everything()
    for dry_run in (True, False):
        with pytest.raises(errors.ReplicasBehindError, match=f"{made.key_id} is not yet held by"):
            promote(running.operator(), dry_run=dry_run)
    assert running.everything() == unchanged


def test_a_dry_run_of_promote_promotes_nothing(running: Deployment) -> None:
    with pytest.raises(errors.WrongStateError, match="kravn-crypto rotate"):
        promote(running.operator(), dry_run=True)
    rotate(running.operator())
    before = running.everything()
    assert promote(running.operator(), dry_run=True) == running.rows()
    assert running.everything() == before


def test_promote_after_goes_by_time_alone(running: Deployment) -> None:
    rotate(running.operator())
    before = running.key_id(State.PRIMARY)
    running.heartbeat(holds={before}, under=before)
    for dry_run in (True, False):
        with pytest.raises(errors.TooEarlyError, match=r"of 3600 seconds\. Try again in") as caught:
            promote(running.operator(), after=3600, dry_run=dry_run)
        assert 0 < caught.value.seconds <= 3601
    assert running.states()[before] is State.PRIMARY
    pending = running.row(running.key_id(State.PENDING))
    assert pending.created_at is not None
    running.tamper(pending.id, created_at=pending.created_at - timedelta(seconds=3601))
    promote(running.operator(), after=3600)
    assert running.states()[before] is State.RETIRED


def test_promote_by_force_goes_by_nothing_and_says_so(running: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    made = rotate(running.operator())
    assert made is not None
    before = running.key_id(State.PRIMARY)
    running.heartbeat(holds={before}, under=before)
    rows = promote(running.operator(), force=True, reason="the key leaked")
    assert {row.key_id: row.state for row in rows.keys} == running.states()
    assert running.states()[made.required("key_id")] is State.PRIMARY
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "promoting without knowing whether every process holds the new data key" in warnings
    assert running.events()[-1].reason == "the key leaked"


# --- rotate-secret ----------------------------------------------------------------------------------------------------


def moving(deployment: Deployment, **settings: Any) -> KeyStore:
    """Return how a process opens the key store that has been deployed with the next secret."""
    return deployment.store(next_secret=NEXT, **settings)


def moved(deployment: Deployment, **settings: Any) -> KeyStore:
    """Return how a process does that has the next secret in the place of the current one."""
    return deployment.store(secret=NEXT, **settings)


def signed_with(deployment: Deployment) -> set[str]:
    rows = deployment.rows()
    return {b64decode(row.row_mac or "")[:8].hex() for row in (rows.in_control(), *rows.keys)}


def test_rotate_secret_signs_all_rows_with_the_next(running: Deployment) -> None:
    operator = running.operator(store=moving(running))
    assert signed_with(running) == {MacKey(BOOTSTRAP.mac_key).key_id.hex()}
    epoch = running.rows().epoch
    rows = rotate_secret(operator, reason="it leaked")
    assert signed_with(running) == {NEXT_MAC_KEY_ID}
    assert rows.epoch == running.rows().epoch == epoch + 1
    event = running.events()[-1]
    assert (event.action, event.reason, event.details) == ("rotate-secret", "it leaked", {"mac_key": NEXT_MAC_KEY_ID})
    # With a KMS, the bootstrap key of the next secret plays no part.
    assert NEXT_KEY_ID not in running.states()
    for store in (moving(running), moved(running)):
        assert store.open(running.engine).keyring.key_ids == running.states().keys()
    with pytest.raises(errors.RowAuthenticationError, match="rotate-secret"):
        running.open()


def test_rotate_secret_again_changes_nothing(running: Deployment) -> None:
    operator = running.operator(store=moving(running))
    rotate_secret(operator)
    before = running.everything()
    rotate_secret(operator)
    assert running.everything() == before


def test_rotate_secret_without_a_next_one_says_what_to_set(running: Deployment) -> None:
    before = running.everything()
    with pytest.raises(errors.WrongStateError, match="set KRAVN_SECRET_NEXT for every process"):
        rotate_secret(running.operator())
    assert running.everything() == before


def test_where_the_kms_wraps_the_mac_key_the_secret_plays_no_part(deployment: Deployment) -> None:
    deployment.secret_file.unlink()
    deployment.open()
    before = deployment.everything()
    with pytest.raises(errors.WrongStateError, match="KRAVN_SECRET plays no part"):
        rotate_secret(deployment.operator(store=moving(deployment)), force=True)
    assert deployment.everything() == before


def test_every_process_must_have_the_next_secret_first(running: Deployment) -> None:
    primary = running.key_id(State.PRIMARY)
    running.heartbeat(holds={primary}, under=primary, mac_key_ids={NEXT_MAC_KEY_ID, "aa" * 8})
    running.heartbeat(holds={primary}, under=primary, mac_key_ids={"aa" * 8}, lease=60, age=100)  # has ended
    operator = running.operator(store=moving(running))
    rotate_secret(operator, dry_run=True)
    behind = running.heartbeat(holds={primary}, under=primary, mac_key_ids={"aa" * 8})
    before = running.everything()
    for dry_run in (True, False):
        with pytest.raises(errors.ReplicasBehindError, match="KRAVN_SECRET_NEXT is not yet set for process") as caught:
            rotate_secret(operator, dry_run=dry_run)
        assert len(caught.value.replicas) == 1
        assert "Deploy it to all" in str(caught.value)
    assert running.everything() == before
    rotate_secret(operator, force=True)
    assert signed_with(running) == {NEXT_MAC_KEY_ID}
    assert behind


def test_what_a_process_says_that_has_the_next_secret_is_what_the_command_asks_for(running: Deployment) -> None:
    assert NEXT_MAC_KEY_ID in moving(running).open(running.engine).mac_key_ids
    assert NEXT_MAC_KEY_ID not in running.open().mac_key_ids
    assert NEXT_MAC_KEY_ID not in running.open(retired_secrets=(NEXT,)).mac_key_ids


def test_a_dry_run_of_rotate_secret_signs_nothing(running: Deployment) -> None:
    before = running.everything()
    assert rotate_secret(running.operator(store=moving(running)), dry_run=True) == running.rows()
    assert running.everything() == before


def test_in_mode_none_the_next_bootstrap_key_comes_in_as_pending(deployment: Deployment) -> None:
    deployment.open(provider=None)
    old = deployment.open(provider=None).keyring
    deployment.put(1, old)
    operator = deployment.operator(store=moving(deployment, provider=None))
    rotate_secret(operator)
    assert deployment.states() == {BOOTSTRAP_KEY_ID: State.PRIMARY, NEXT_KEY_ID: State.PENDING}
    assert (deployment.row(NEXT_KEY_ID).provider, deployment.row(NEXT_KEY_ID).master_key) == ("none", "secret")
    assert signed_with(deployment) == {NEXT_MAC_KEY_ID}
    before = deployment.everything()
    rotate_secret(operator)
    assert deployment.everything() == before
    promote(operator)
    assert deployment.states() == {BOOTSTRAP_KEY_ID: State.RETIRED, NEXT_KEY_ID: State.PRIMARY}
    # The old one, which is a file here, decrypts what is still under it.
    keyring = moved(deployment, provider=None).open(deployment.engine).keyring
    assert keyring.primary_key_id == NEXT_KEY_ID
    assert keyring.key_ids == {BOOTSTRAP_KEY_ID, NEXT_KEY_ID}
    rotate_secret(operator)
    assert deployment.states() == {BOOTSTRAP_KEY_ID: State.RETIRED, NEXT_KEY_ID: State.PRIMARY}


def test_from_one_secret_to_another_the_old_one_is_named_as_retired(sqlite_deployment: Deployment) -> None:
    deployment, first = sqlite_deployment, "the first secret, with as many characters as it takes"
    with deployment.engine.begin() as connection:
        connection.execute(text("DELETE FROM kms_keys"))
        connection.execute(text("DELETE FROM kms_events"))
    deployment.open(provider=None, secret=first)
    operator = deployment.operator(store=moving(deployment, provider=None, secret=first))
    rotate_secret(operator)
    promote(operator)
    with pytest.raises(errors.BootstrapKeyError, match="KRAVN_SECRET_RETIRED"):
        moved(deployment, provider=None).open(deployment.engine)
    opened = moved(deployment, provider=None, retired_secrets=(first,)).open(deployment.engine)
    assert len(opened.keyring.key_ids) == 2
    # A retired secret authenticates nothing.
    with pytest.raises(errors.RowAuthenticationError):
        deployment.store(provider=None, secret=first, retired_secrets=(NEXT,)).open(deployment.engine)


def test_in_mode_none_a_pending_key_of_a_kms_is_waited_for(deployment: Deployment) -> None:
    deployment.open(provider=None)
    deployment.heartbeat(holds={BOOTSTRAP_KEY_ID}, under=BOOTSTRAP_KEY_ID, mac_key_ids={NEXT_MAC_KEY_ID})
    deployment.open()
    pending = deployment.key_id(State.PENDING)
    before = deployment.everything()
    with pytest.raises(errors.WrongStateError, match=f"{pending} is pending already"):
        rotate_secret(deployment.operator(store=moving(deployment, provider=None)))
    assert deployment.everything() == before


def test_a_secret_that_is_the_current_one_is_signed_with_already(running: Deployment) -> None:
    store = moving(running)
    rotate_secret(running.operator(store=store))
    before = running.everything()
    rotate_secret(running.operator(store=moving(running, secret=NEXT)))
    assert running.everything() == before


def test_no_secret_is_in_a_row_or_an_event(deployment: Deployment) -> None:
    deployment.open(provider=None)
    operator = deployment.operator(store=moving(deployment, provider=None))
    rotate_secret(operator, reason="r")
    with deployment.engine.connect() as connection:
        shown = repr([connection.execute(select(table)).all() for table in (TABLES.keys, TABLES.events)])
    assert NEXT not in shown
    assert NEXT_SECRET.data_key.hex() not in shown
    assert NEXT_SECRET.mac_key.hex() not in shown
