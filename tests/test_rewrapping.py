"""Data keys from one master key, or one version of it, to another; and a second KMS that can open the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.changes import changing
from sqlalchemy_kravn_crypto.lifecycle import (
    Rewrapped,
    Targets,
    add_standby,
    destroy,
    promote,
    remove_standby,
    rewrap,
    rotate,
    switch_to_standby,
)
from sqlalchemy_kravn_crypto.providers.vault import VaultProvider
from sqlalchemy_kravn_crypto.schema import State
from tests.fixtures_deployment import NAME, Deployment, VersionedKMS
from tests.openbao import OpenBao


@pytest.fixture
def standby() -> VersionedKMS:
    return VersionedKMS("azure", mount="elsewhere")


@pytest.fixture
def wrapped_mac(deployment: Deployment) -> Deployment:
    """Give a deployment without a secret: its KMS wraps the key of the row MACs, too."""
    deployment.secret_file.unlink()
    deployment.open()
    return deployment


def key_ids(deployment: Deployment) -> list[str]:
    """Return the key ids of all that is wrapped, in the order of the rows."""
    rows = deployment.rows()
    control = ["row-mac"] if rows.in_control().wrapped_key else []
    return control + [row.required("key_id") for row in rows.keys if row.wrapped_key]


def master_keys(deployment: Deployment) -> list[str | None]:
    rows = deployment.rows()
    return [row.master_key for row in (rows.in_control(), *rows.keys) if row.wrapped_key]


def standbys(deployment: Deployment) -> list[tuple[str | None, str | None]]:
    rows = deployment.rows()
    return [
        (row.standby_provider, row.standby_master_key) for row in (rows.in_control(), *rows.keys) if row.wrapped_key
    ]


def refused(deployment: Deployment, command: Callable[[], object], error: type[Exception], match: str) -> None:
    before = deployment.everything()
    with pytest.raises(error, match=match) as caught:
        command()
    assert deployment.everything() == before
    assert caught.value.__context__ is None


# --- rewrap -----------------------------------------------------------------------------------------------------------


def test_every_key_is_wrapped_anew_under_the_newest_version(running: Deployment) -> None:
    rotate(running.operator())
    promote(running.operator())
    rotate(running.operator())
    running.put(1, running.open().keyring)
    before, held = running.rows(), running.open().keyring.key_ids
    running.kms.version = 2
    done = rewrap(running.operator(actor="alice"), reason="yearly")
    assert done == [Rewrapped(one, "transit/kravn:v1", "transit/kravn:v2") for one in key_ids(running)]
    assert len(done) == 3
    assert master_keys(running) == ["transit/kravn:v2"] * 3
    blobs = {row.wrapped_key for rows in (before, running.rows()) for row in rows.keys if row.wrapped_key}
    assert len(blobs) == 6
    assert [row.key_check for row in running.rows().keys] == [row.key_check for row in before.keys]
    assert [row.state for row in running.rows().keys] == [row.state for row in before.keys]
    assert running.open().keyring.key_ids == held
    rewraps = [event for event in running.events() if event.action == "rewrap"]
    assert [event.key_id for event in rewraps] == key_ids(running)
    assert {event.reason for event in rewraps} == {"yearly"}
    assert rewraps[0].details == {"before": "transit/kravn:v1", "after": "transit/kravn:v2", "standby": None}


def test_what_is_under_the_newest_version_already_stays(running: Deployment) -> None:
    before = running.everything()
    assert rewrap(running.operator()) == [
        Rewrapped(one, "transit/kravn:v1", "transit/kravn:v1") for one in key_ids(running)
    ]
    assert running.everything() == before


def test_the_key_of_the_row_macs_is_rewrapped_too(wrapped_mac: Deployment) -> None:
    wrapped_mac.kms.version = 2
    done = rewrap(wrapped_mac.operator())
    assert [one.key_id for one in done] == ["row-mac", wrapped_mac.key_id(State.PRIMARY)]
    assert master_keys(wrapped_mac) == ["transit/kravn:v2"] * 2
    assert wrapped_mac.open().mac_key is not None
    wrapped_mac.kms.version = 3
    rewrap(wrapped_mac.operator())
    assert master_keys(wrapped_mac) == ["transit/kravn:v3"] * 2
    assert wrapped_mac.events()


def test_disabled_keys_are_rewrapped_and_destroyed_ones_are_not(running: Deployment) -> None:
    gone, kept = running.key_id(State.PRIMARY), ""
    for _ in range(2):
        rotate(running.operator())
        promote(running.operator())
    kept = next(row.required("key_id") for row in running.rows().keys if row.wrapped_key and row.key_id != gone)
    destroy(running.operator(), gone, reason="r", now=True, targets=Targets())
    with changing(running.operator()) as change:
        change.save(change.rows.with_key(running.row(kept).in_state(State.DISABLED)), "test")
    running.kms.version = 2
    assert {one.key_id for one in rewrap(running.operator())} == {kept, running.key_id(State.PRIMARY)}
    assert running.row(kept).master_key == "transit/kravn:v2"
    assert running.row(kept).state is State.DISABLED
    assert running.row(gone).wrapped_key is None


def test_a_dry_run_of_rewrap_asks_the_kms_for_nothing(running: Deployment) -> None:
    running.kms.version = 2
    before, calls = running.everything(), running.kms.calls.copy()
    assert rewrap(running.operator(), dry_run=True) == [
        Rewrapped(one, "transit/kravn:v1", "transit/kravn:v1") for one in key_ids(running)
    ]
    assert running.everything() == before
    assert running.kms.calls == calls


def test_in_mode_none_nothing_is_wrapped(deployment: Deployment) -> None:
    deployment.open(provider=None)
    operator = deployment.operator(store=deployment.store(provider=None))
    for command in (rewrap, add_standby, switch_to_standby, remove_standby):
        with pytest.raises(errors.WrongStateError, match="Set KRAVN_KMS_PROVIDER"):
            command(operator)


def test_a_kms_that_fails_in_the_middle_leaves_what_was_done_and_the_rest_as_it_was(running: Deployment) -> None:
    rotate(running.operator())
    promote(running.operator())
    running.kms.version = 2
    wraps = []

    def asked(operation: str) -> None:
        wraps.extend([operation] if operation == "wrap" else [])
        if len(wraps) == 2:
            raise errors.ProviderUnavailableError("MARKER", provider="vault")

    running.kms.asked = asked
    with pytest.raises(errors.ProviderUnavailableError, match="MARKER"):
        rewrap(running.operator())
    running.kms.asked = lambda _: None
    assert master_keys(running) == ["transit/kravn:v2", "transit/kravn:v1"]
    assert running.open().keyring.key_ids == running.states().keys()
    rewrap(running.operator())
    assert master_keys(running) == ["transit/kravn:v2"] * 2
    assert running.actions().count("rewrap") == 2


@pytest.mark.parametrize("returned", [b"", b"x" * 31, b"x" * 32])
def test_another_key_than_is_on_record_is_not_wrapped(running: Deployment, returned: bytes) -> None:
    running.kms.version = 2
    running.kms.returns = returned
    calls = running.kms.calls["wrap"]
    with pytest.raises(errors.WrongKeyError, match=running.key_id(State.PRIMARY)):
        rewrap(running.operator())
    running.kms.returns = None
    assert running.kms.calls["wrap"] == calls
    assert master_keys(running) == ["transit/kravn:v1"]


def test_another_mac_key_than_is_on_record_is_not_wrapped(wrapped_mac: Deployment) -> None:
    wrapped_mac.kms.version = 2
    unwraps = []

    def asked(operation: str) -> None:
        unwraps.append(operation)
        # The first unwrap opens the key store, the second is for its deployment id.
        wrapped_mac.kms.returns = b"x" * 32 if len(unwraps) > 2 else None

    before = wrapped_mac.everything()
    wrapped_mac.kms.asked = asked
    with pytest.raises(errors.WrongKeyError, match="another MAC key than was wrapped"):
        rewrap(wrapped_mac.operator())
    wrapped_mac.kms.asked, wrapped_mac.kms.returns = lambda _: None, None
    assert wrapped_mac.everything() == before


def test_a_row_that_changes_meanwhile_is_not_overwritten(running: Deployment) -> None:
    running.kms.version = 2

    def rewrapped_meanwhile(operation: str) -> None:
        if operation == "wrap":
            running.kms.asked = lambda _: None
            rewrap(running.operator())

    running.kms.asked = rewrapped_meanwhile
    with pytest.raises(
        errors.ChangedMeanwhileError, match=f"{running.key_id(State.PRIMARY)} meanwhile.*run this again"
    ):
        rewrap(running.operator())
    assert running.actions().count("rewrap") == 1
    rewrap(running.operator())


def test_what_else_changes_meanwhile_is_no_hindrance(wrapped_mac: Deployment) -> None:
    """Such as another key, the epoch and the end of the trail."""
    wrapped_mac.kms.version = 2

    def rotated_meanwhile(operation: str) -> None:
        if operation == "wrap":
            wrapped_mac.kms.asked = lambda _: None
            rotate(wrapped_mac.operator())

    wrapped_mac.kms.asked = rotated_meanwhile
    rewrap(wrapped_mac.operator())
    assert wrapped_mac.actions() == ["provision", "rotate", "rewrap", "rewrap"]
    assert master_keys(wrapped_mac) == ["transit/kravn:v2"] * 3
    wrapped_mac.open()


def test_rows_that_somebody_else_wrote_are_not_rewrapped(running: Deployment) -> None:
    running.kms.version = 2
    running.tamper(3, master_key="transit/kravn:v7")
    calls = running.kms.calls.copy()
    with pytest.raises(errors.RowAuthenticationError):
        rewrap(running.operator())
    assert running.kms.calls == calls


def test_a_process_that_has_the_key_need_not_ask_again(running: Deployment) -> None:
    opened = running.open()
    running.kms.version = 2
    rewrap(running.operator())
    calls = running.kms.calls.copy()
    assert running.store().reopen(running.rows(), opened).keyring.key_ids == opened.keyring.key_ids
    assert running.kms.calls == calls


# --- The standby ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["secret", "wrapped MAC key"])
def covered(request: pytest.FixtureRequest, deployment: Deployment, standby: VersionedKMS) -> Deployment:
    """Give a deployment with a standby, and two data keys of its KMS."""
    if request.param == "wrapped MAC key":
        deployment.secret_file.unlink()
    deployment.open()
    rotate(deployment.operator())
    promote(deployment.operator())
    add_standby(deployment.operator(standby=standby))
    return deployment


def test_either_of_the_two_opens_every_key(covered: Deployment, standby: VersionedKMS) -> None:
    held = covered.open().keyring.key_ids
    assert set(standbys(covered)) == {("azure", "elsewhere/kravn:v1")}
    calls = covered.kms.calls.copy()
    assert covered.open(provider=standby).keyring.key_ids == held
    assert covered.kms.calls == calls
    adding = [event for event in covered.events() if event.action == "standby-add"]
    assert len(adding) == len(key_ids(covered))
    assert {event.details["standby"] for event in adding} == {"elsewhere/kravn:v1"}
    assert covered.rows().keys[-1].wrapped_key != covered.rows().keys[-1].standby_wrapped_key


def test_adding_again_changes_nothing(covered: Deployment, standby: VersionedKMS) -> None:
    before, calls = covered.everything(), standby.calls.copy()
    done = add_standby(covered.operator(standby=standby))
    assert done == [Rewrapped(one, "elsewhere/kravn:v1", "elsewhere/kravn:v1") for one in key_ids(covered)]
    assert covered.everything() == before
    assert standby.calls == calls


def test_adding_after_a_failure_goes_on_where_it_was(running: Deployment, standby: VersionedKMS) -> None:
    rotate(running.operator())
    promote(running.operator())
    wraps = []

    def asked(operation: str) -> None:
        wraps.extend([operation] if operation == "wrap" else [])
        if len(wraps) == 2:
            raise errors.ProviderUnavailableError("MARKER", provider="azure")

    standby.asked = asked
    with pytest.raises(errors.ProviderUnavailableError, match="MARKER"):
        add_standby(running.operator(standby=standby))
    assert standbys(running) == [("azure", "elsewhere/kravn:v1"), (None, None)]
    standby.asked = lambda _: None
    add_standby(running.operator(standby=standby))
    assert set(standbys(running)) == {("azure", "elsewhere/kravn:v1")}


def test_without_a_second_kms_it_says_what_to_set(running: Deployment) -> None:
    match = "set KRAVN_STANDBY_KMS_PROVIDER"
    refused(running, lambda: add_standby(running.operator()), errors.StandbyError, match)


def test_another_standby_must_be_removed_first(covered: Deployment) -> None:
    other = VersionedKMS("azure", mount="third")
    match = "has another standby already: 'azure' under 'elsewhere/kravn:v1'. Remove it first"
    refused(covered, lambda: add_standby(covered.operator(standby=other)), errors.StandbyError, match)
    assert other.calls == {}


def test_the_kms_itself_is_no_standby(covered: Deployment) -> None:
    """Such as after settings were copied and not changed: nothing would be left if it was lost."""
    same = covered.kms
    refused(
        covered,
        lambda: add_standby(covered.operator(standby=same)),
        errors.StandbyError,
        "the standby is the KMS itself. Name",
    )


def test_without_one_the_kms_itself_is_no_standby_either(running: Deployment) -> None:
    same = running.kms
    for dry_run in (True, False):
        refused(
            running,
            lambda dry_run=dry_run: add_standby(running.operator(standby=same), dry_run=dry_run),  # type: ignore[misc]
            errors.StandbyError,
            "is the KMS itself",
        )
    assert standbys(running) == [(None, None)]


def test_another_mount_of_the_same_kind_of_kms_is_a_standby(running: Deployment) -> None:
    other = VersionedKMS("vault", mount="other")
    add_standby(running.operator(standby=other))
    assert running.open(provider=other).keyring.key_ids == running.states().keys()
    running.kms.version = other.version = 2
    rewrap(running.operator())
    assert (master_keys(running), standbys(running)) == (["transit/kravn:v2"], [("vault", "other/kravn:v1")])
    # A process that is deployed with the standby rewraps what that has wrapped.
    rewrap(running.operator(store=running.store(provider=other)))
    assert (master_keys(running), standbys(running)) == (["transit/kravn:v2"], [("vault", "other/kravn:v2")])
    running.open()
    running.open(provider=other)


def test_a_standby_that_tells_nothing_of_who_wrapped_does_not_wrap_the_mac_key(wrapped_mac: Deployment) -> None:
    nobody = VersionedKMS("azure", mount="elsewhere", authenticates=False)
    match = "does not tell who wrapped a key.*Take a standby that does"
    refused(wrapped_mac, lambda: add_standby(wrapped_mac.operator(standby=nobody)), errors.StandbyError, match)
    assert nobody.calls == {}


def test_a_standby_that_tells_nothing_of_who_wrapped_will_do_beside_a_secret(running: Deployment) -> None:
    nobody = VersionedKMS("azure", mount="elsewhere", authenticates=False)
    add_standby(running.operator(standby=nobody))
    assert running.open(provider=nobody).keyring.key_ids == running.states().keys()


@pytest.mark.parametrize("broken", ["first", "standby"])
def test_both_must_answer(running: Deployment, standby: VersionedKMS, broken: str) -> None:
    operator = running.operator(standby=standby)
    switched = running.kms if broken == "first" else standby
    switched.down = True
    refused(running, lambda: add_standby(operator), errors.ProviderUnavailableError, "down")
    refused(running, lambda: add_standby(operator, dry_run=True), errors.ProviderUnavailableError, "down")


def test_a_dry_run_of_adding_writes_nothing(running: Deployment, standby: VersionedKMS) -> None:
    before = running.everything()
    done = add_standby(running.operator(standby=standby), dry_run=True)
    assert done == [Rewrapped(one, None, "elsewhere/kravn:v1") for one in key_ids(running)]
    assert running.everything() == before


# --- switch -----------------------------------------------------------------------------------------------------------


def test_the_standby_becomes_the_first_and_the_first_the_standby(covered: Deployment, standby: VersionedKMS) -> None:
    held, epoch, old = covered.open().keyring.key_ids, covered.rows().epoch, covered.kms
    operator = covered.operator(store=covered.store(provider=standby), standby=old)
    rows = switch_to_standby(operator, reason="moving")
    assert rows.epoch == covered.rows().epoch == epoch + 1
    assert set(master_keys(covered)) == {"elsewhere/kravn:v1"}
    assert set(standbys(covered)) == {("vault", "transit/kravn:v1")}
    event = covered.events()[-1]
    assert (event.action, event.reason, event.details) == ("standby-switch", "moving", {"lost": False})
    for provider in (standby, old):
        assert covered.open(provider=provider).keyring.key_ids == held
    # And back.
    switch_to_standby(covered.operator(standby=standby))
    assert set(master_keys(covered)) == {"transit/kravn:v1"}
    remove_standby(covered.operator())
    assert set(standbys(covered)) == {(None, None)}
    assert covered.open().keyring.key_ids == held


def test_when_the_first_is_lost_it_is_not_asked_and_nothing_of_it_is_kept(
    covered: Deployment, standby: VersionedKMS
) -> None:
    covered.kms.down = True
    calls = covered.kms.calls.copy()
    operator = covered.operator(store=covered.store(provider=standby))
    refused(covered, lambda: switch_to_standby(operator), errors.StandbyError, "There is no second KMS")
    switch_to_standby(operator, lost=True)
    assert covered.kms.calls == calls
    assert set(standbys(covered)) == {(None, None)}
    assert covered.events()[-1].details == {"lost": True}
    assert covered.open(provider=standby).keyring.key_ids == covered.states().keys()
    with pytest.raises(errors.ProviderMismatchError):
        covered.open()


def test_unless_it_is_lost_the_first_must_answer(covered: Deployment, standby: VersionedKMS) -> None:
    covered.kms.down = True
    operator = covered.operator(store=covered.store(provider=standby), standby=covered.kms)
    refused(covered, lambda: switch_to_standby(operator), errors.ProviderUnavailableError, "down")


def test_the_two_must_open_the_same_key(covered: Deployment, standby: VersionedKMS) -> None:
    covered.kms.returns = b"x" * 32
    operator = covered.operator(store=covered.store(provider=standby), standby=covered.kms)
    with pytest.raises(errors.WrongKeyError):
        switch_to_standby(operator)
    covered.kms.returns = None
    assert set(master_keys(covered)) == {"transit/kravn:v1"}


def test_the_settings_must_name_the_standby_by_then(covered: Deployment, standby: VersionedKMS) -> None:
    match = "'vault' under 'transit/kravn' in the first place already.*deploy its settings as KRAVN_KMS_… first"
    refused(covered, lambda: switch_to_standby(covered.operator(standby=standby)), errors.StandbyError, match)


def test_every_key_must_have_a_standby(covered: Deployment, standby: VersionedKMS) -> None:
    last = covered.rows().keys[-1]
    with changing(covered.operator()) as change:
        alone = replace(last, standby_provider=None, standby_master_key=None, standby_wrapped_key=None)
        change.save(change.rows.with_key(alone.in_state(State.DISABLED)), "test")
        first = next(row for row in change.rows.keys if row.wrapped_key and row.id != last.id)
        change.save(change.rows.with_key(first.in_state(State.PRIMARY)), "test")
    operator = covered.operator(store=covered.store(provider=standby), standby=covered.kms)
    match = f"{last.key_id} has no wrap by 'azure' under 'elsewhere/kravn' as its standby. Deploy the settings"
    refused(covered, lambda: switch_to_standby(operator), errors.StandbyError, match)


def test_a_dry_run_of_the_switch_asks_both_and_switches_nothing(covered: Deployment, standby: VersionedKMS) -> None:
    before = covered.everything()
    operator = covered.operator(store=covered.store(provider=standby), standby=covered.kms)
    asked = covered.kms.calls["unwrap"]
    assert switch_to_standby(operator, dry_run=True) == covered.rows()
    assert covered.kms.calls["unwrap"] > asked
    assert covered.everything() == before


def test_what_changes_during_the_switch_is_not_overwritten(covered: Deployment, standby: VersionedKMS) -> None:
    operator = covered.operator(store=covered.store(provider=standby), standby=covered.kms)
    rotating = covered.operator(standby=standby)

    def rotated_meanwhile(operation: str) -> None:
        covered.kms.asked = lambda _: None
        rotate(rotating)

    covered.kms.asked = rotated_meanwhile
    with pytest.raises(errors.ChangedMeanwhileError, match=r"the key store meanwhile\. Nothing of it was written"):
        switch_to_standby(operator)
    assert "standby-switch" not in covered.actions()
    assert covered.rows().in_state(State.PENDING) is not None
    switch_to_standby(operator)
    assert set(master_keys(covered)) == {"elsewhere/kravn:v1"}


# --- remove -----------------------------------------------------------------------------------------------------------


def test_what_the_standby_wrapped_is_given_up(covered: Deployment, standby: VersionedKMS) -> None:
    before = covered.rows()
    rows = remove_standby(covered.operator(), reason="no longer needed")
    assert rows.epoch == covered.rows().epoch == before.epoch + 1
    assert set(standbys(covered)) == {(None, None)}
    assert all(row.standby_wrapped_key is None for row in covered.rows().keys)
    assert covered.rows().in_control().standby_wrapped_key is None
    event = covered.events()[-1]
    assert (event.action, event.reason) == ("standby-remove", "no longer needed")
    assert event.details == {"standby": "elsewhere/kravn:v1"}
    covered.open()
    with pytest.raises(errors.ProviderMismatchError):
        covered.open(provider=standby)
    refused(covered, lambda: remove_standby(covered.operator()), errors.StandbyError, "No data key has a standby")


def test_the_one_that_the_settings_name_is_not_removed(covered: Deployment, standby: VersionedKMS) -> None:
    operator = covered.operator(store=covered.store(provider=standby), standby=covered.kms)
    match = "which the settings name as the KMS. Make it the first with `kravn-crypto standby switch`"
    refused(covered, lambda: remove_standby(operator), errors.StandbyError, match)


def test_a_dry_run_of_the_removal_removes_nothing(covered: Deployment) -> None:
    before = covered.everything()
    assert remove_standby(covered.operator(), dry_run=True) == covered.rows()
    assert covered.everything() == before


# --- Real master keys -------------------------------------------------------------------------------------------------


@pytest.fixture
def transit(openbao: OpenBao) -> Iterator[OpenBao]:
    openbao.create_key("rewrapped")
    yield openbao
    openbao.delete_key("rewrapped")


@pytest.mark.parametrize("mac_key", ["of a secret", "wrapped"])
def test_after_rewrapping_the_old_version_of_a_transit_key_is_not_needed(
    deployment: Deployment, transit: OpenBao, mac_key: str
) -> None:
    if mac_key == "wrapped":
        deployment.secret_file.unlink()
    token = transit.issue_token("rewrapped")
    deployment.kms = VaultProvider(**transit.settings(key="rewrapped", token=token))  # type: ignore[assignment]
    frame = deployment.open().keyring.encrypt(b"\x01{}", NAME)
    rotate(deployment.operator())
    transit.rotate("rewrapped")
    promote(deployment.operator())
    done = rewrap(deployment.operator())
    assert {(one.before or "")[-3:] for one in done} == {":v1"}
    assert {one.after[-3:] for one in done} == {":v2"}
    assert len(done) == len(key_ids(deployment)) == (3 if mac_key == "wrapped" else 2)
    transit.set_min_decryption_version(2, "rewrapped")
    opened = deployment.open()
    assert opened.keyring.decrypt(frame, NAME) == b"\x01{}"
    rewrap(deployment.operator())
    # Without it, what is under the old version is lost with that.
    rotate(deployment.operator())
    transit.rotate("rewrapped")
    transit.set_min_decryption_version(3, "rewrapped")
    with pytest.raises(errors.MasterKeyUnusableError):
        deployment.open()
