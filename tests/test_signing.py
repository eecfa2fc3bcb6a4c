"""Keys to sign with: derived as described, rotated with the data keys, and shown to nobody."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from sqlalchemy_kravn_crypto import DataKey, Keyring, SigningKey, signing_key, use_keyring
from sqlalchemy_kravn_crypto.changes import Operator
from sqlalchemy_kravn_crypto.context import end_lease, publish, put_aside
from sqlalchemy_kravn_crypto.exceptions import NotConfiguredError
from sqlalchemy_kravn_crypto.lifecycle import promote, rotate
from sqlalchemy_kravn_crypto.schema import State
from tests import reference
from tests.fixtures_deployment import Deployment

ONE, TWO, THREE = (bytes([number]) * 32 for number in (1, 2, 3))


def ids(key: SigningKey) -> list[str]:
    return [one.key_id for one in key.all]


def rotated(commands: Operator) -> str:
    row = rotate(commands)
    assert row is not None
    return row.required("key_id")


def id_of(key: bytes) -> str:
    return reference.key_id(key).hex()


# --- The derivation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", ["sessions", "a", "password reset/v2", "~" * 128])
def test_it_is_derived_as_the_format_says(purpose: str) -> None:
    with use_keyring(Keyring(DataKey(ONE))):
        key = signing_key(purpose)
    assert key.key == reference.expand(ONE, f"signing/{purpose}")
    assert key.key_id == id_of(ONE)
    assert key.previous == ()


def test_each_purpose_and_each_data_key_has_its_own() -> None:
    found = set()
    for data_key in (ONE, TWO):
        with use_keyring(Keyring(DataKey(data_key))):
            found |= {signing_key(purpose).key for purpose in ("sessions", "session", "links")}
    assert len(found) == 6
    assert found.isdisjoint({ONE, TWO, reference.expand(ONE, "aead/02"), reference.expand(ONE, "key-check")})


@pytest.mark.parametrize("purpose", ["", "x" * 129, "sitzung\u00e4", "a\nb", "a\x00"])
def test_what_is_no_purpose(purpose: str) -> None:
    with use_keyring(Keyring(DataKey(ONE))), pytest.raises(ValueError, match="128 printable ASCII"):
        signing_key(purpose)


def test_without_a_configuration_there_is_none() -> None:
    with put_aside(), pytest.raises(NotConfiguredError):
        signing_key("sessions")


# --- The others ------------------------------------------------------------------------------------------------------


def test_the_others_verify_in_the_order_in_which_they_are_held() -> None:
    with use_keyring(Keyring(DataKey(ONE), [DataKey(THREE), DataKey(TWO)])):
        key = signing_key("sessions")
    assert ids(key) == [id_of(ONE), id_of(THREE), id_of(TWO)]
    assert [one.key for one in key.previous] == [reference.expand(other, "signing/sessions") for other in (THREE, TWO)]
    assert key.with_id(id_of(TWO)) is key.previous[1]
    assert key.with_id(id_of(ONE)) is key
    assert key.with_id("0" * 16) is None


def test_a_bootstrap_key_verifies_only_until_a_kms_has_the_primary() -> None:
    bootstrap = id_of(ONE)
    before = Keyring(DataKey(ONE), [DataKey(TWO)], bootstrap=[bootstrap])
    after = Keyring(DataKey(TWO), [DataKey(ONE)], bootstrap=[bootstrap])
    with use_keyring(before):
        assert ids(signing_key("sessions")) == [bootstrap, id_of(TWO)]
    with use_keyring(after):
        assert ids(signing_key("sessions")) == [id_of(TWO)]
        assert signing_key("sessions").with_id(bootstrap) is None
        assert ids(signing_key("sessions", accept_bootstrap=True)) == [id_of(TWO), bootstrap]


@pytest.mark.parametrize("state", ["disabled", "destroyed"])
def test_a_key_that_was_taken_away_verifies_nothing_though_values_are_still_read(state: str) -> None:
    earlier = Keyring(DataKey(ONE), [DataKey(TWO)])
    gone = {"disabled": (), "destroyed": (), state: (id_of(TWO),)}
    keyring = Keyring(DataKey(ONE), disabled=gone["disabled"], destroyed=gone["destroyed"]).keeping(earlier)
    assert id_of(TWO) in keyring.key_ids
    with use_keyring(keyring):
        assert ids(signing_key("sessions")) == [id_of(ONE)]


def test_what_a_keyring_keeps_changes_nothing_about_the_bootstrap_key() -> None:
    earlier = Keyring(DataKey(ONE), [DataKey(TWO), DataKey(THREE)])
    keyring = Keyring(DataKey(ONE), [DataKey(THREE)], disabled=[id_of(TWO)], bootstrap=[id_of(THREE)]).keeping(earlier)
    with use_keyring(keyring):
        assert ids(signing_key("sessions")) == [id_of(ONE)]


def test_signing_goes_on_when_the_lease_is_over() -> None:
    with put_aside():
        publish(Keyring(DataKey(ONE)))
        end_lease()
        assert signing_key("sessions").key_id == id_of(ONE)


# --- The life of a key -----------------------------------------------------------------------------------------------


def test_it_follows_a_rotation(running: Deployment) -> None:
    commands = running.operator()
    first, bootstrap = running.key_id(State.PRIMARY), running.key_id(State.RETIRED)
    held: list[list[str]] = []

    def look() -> None:
        with use_keyring(running.open().keyring):
            held.append(ids(signing_key("sessions")))

    look()
    second = rotated(commands)
    look()
    promote(commands, after=0)
    look()
    third = rotated(commands)
    promote(commands, after=0)
    look()
    assert held == [[first], [first, second], [second, first], [third, second, first]]
    assert bootstrap not in {key_id for one in held for key_id in one}


# --- Nothing is shown ------------------------------------------------------------------------------------------------


def test_nothing_shows_a_key() -> None:
    with use_keyring(Keyring(DataKey(ONE), [DataKey(TWO)])):
        key = signing_key("sessions")
    assert repr(key) == f"<SigningKey {id_of(ONE)} previous=1>"
    for shown in (repr(key), str(key), repr(key.all), repr(key.previous)):
        assert key.key.hex() not in shown
        assert repr(key.key)[2:-1] not in shown
    with pytest.raises(TypeError, match="holds a secret"):
        pickle.dumps(key)


def test_the_page_names_what_there_is() -> None:
    page = (Path(__file__).parents[1] / "docs" / "signing.md").read_text(encoding="utf-8")
    with use_keyring(Keyring(DataKey(ONE))):
        key = signing_key("sessions")
    for name in ("key", "key_id", "previous", "with_id"):
        assert f"key.{name}" in page
        assert hasattr(key, name)
