"""The settings into what they name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.configuration import (
    key_store,
    operator,
    provider_of,
    settings_from_environment,
    standby_from_environment,
    watch_settings,
)
from sqlalchemy_kravn_crypto.providers.azure import AzureProvider
from sqlalchemy_kravn_crypto.providers.vault import VaultProvider
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.testing import FakeKMS

SECRET = "MARKER of a secret, with as many characters as it takes"
VAULT = {
    "KMS_PROVIDER": "vault",
    "KMS_VAULT_ADDR": "https://vault.example:8200",
    "KMS_VAULT_TOKEN": "MARKER-token",
    "KMS_VAULT_KEY": "kravn",
    "KMS_VAULT_MOUNT": "keys",
}
AZURE = {
    "KMS_PROVIDER": "azure",
    "KMS_AZURE_VAULT_URL": "https://v.vault.azure.net",
    "KMS_AZURE_KEY": "kravn",
    "KMS_AZURE_TENANT_ID": "tenant",
    "KMS_AZURE_CLIENT_ID": "client",
    "KMS_AZURE_CLIENT_SECRET": "MARKER-client-secret",
}
Environment = Callable[..., None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    def set_up(variables: dict[str, str], prefix: str = "KRAVN_") -> None:
        for name, value in variables.items():
            monkeypatch.setenv(prefix + name, value)

    return set_up


def test_an_operator_is_made_of_the_environment(environment: Environment, tmp_path: Path) -> None:
    environment(VAULT | {"SECRET": SECRET, "SECRET_NEXT": SECRET + "!", "LEASE": "77", "DATA_DIR": str(tmp_path)})
    environment({"SECRET_RETIRED": f"{SECRET}1\n\n {SECRET}2 \n", "KMS_TIMEOUT": "3", "KMS_PROVISION": "never"})
    engine, standby = create_engine("sqlite://"), FakeKMS()
    made = operator(engine, standby=standby, actor="alice")
    assert (made.engine, made.standby, made.actor, made.lease) == (engine, standby, "alice", 77.0)
    store = made.store
    assert isinstance(store.provider, VaultProvider)
    assert "keys/kravn" in store.provider.master_key
    assert (store.secret, store.next_secret) == (SECRET, SECRET + "!")
    assert store.retired_secrets == (f"{SECRET}1", f"{SECRET}2")
    assert (store.timeout, store.may_provision) == (3.0, False)
    assert store.secret_file == tmp_path / "secret.key"
    for shown in (repr(made), str(made), repr(store)):
        assert "MARKER" not in shown


def test_settings_in_code_come_in_the_place_of_the_environment(environment: Environment) -> None:
    environment({"LEASE": "77", "SECRET": "short"})
    made = operator(create_engine("sqlite://"), Settings(lease=99, secret=SECRET))
    assert (made.lease, made.store.secret, made.store.provider) == (99.0, SECRET, None)


def test_a_wrong_setting_is_refused(environment: Environment) -> None:
    environment({"SECRT": SECRET})
    with pytest.raises(errors.SettingsError, match="Did you mean KRAVN_SECRET"):
        operator(create_engine("sqlite://"))
    with pytest.raises(errors.SettingsError, match="Did you mean KRAVN_SECRET"):
        settings_from_environment()


def test_a_kms_in_code_is_the_only_one(environment: Environment) -> None:
    kms = FakeKMS()
    assert key_store(Settings(), kms).provider is kms
    environment(VAULT)
    with pytest.raises(errors.ConfigurationError, match=r"the provider 'fake', but the settings name 'vault'\. Leave"):
        key_store(Settings(), kms)


@pytest.mark.parametrize("name", ["", "none"])
def test_a_kms_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="must have a name other than 'none'"):
        key_store(Settings(), FakeKMS(name))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (15.0, 180.0, False, True)),
        ({"look_interval": 2, "lease": 9}, (2.0, 9.0, False, True)),
        ({"fence": "transaction"}, (15.0, 180.0, True, True)),
        ({"kms_provision": "never"}, (15.0, 180.0, False, False)),
    ],
)
def test_how_a_process_follows_is_a_matter_of_its_settings(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    made = watch_settings(Settings(**given))
    assert (made.interval, made.lease, made.fence, made.may_promote) == expected


# --- The standby ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "kind", "master_key"),
    [(VAULT, VaultProvider, "keys/kravn"), (AZURE, AzureProvider, "v.vault.azure.net")],
    ids=["vault", "azure"],
)
def test_the_standby_has_settings_of_its_own(
    environment: Environment, variables: dict[str, str], kind: type, master_key: str
) -> None:
    environment(variables, "KRAVN_STANDBY_")
    standby = standby_from_environment()
    assert isinstance(standby, kind)
    assert master_key in standby.master_key
    assert "MARKER" not in repr(standby)
    # The first is not touched by them, nor are they by those of the first.
    assert provider_of(Settings()) is None


def test_the_settings_of_the_first_are_not_those_of_the_standby(environment: Environment) -> None:
    environment(VAULT)
    with pytest.raises(errors.SettingsError, match="There is no standby KMS: set KRAVN_STANDBY_KMS_PROVIDER"):
        standby_from_environment()
    environment(VAULT | {"KMS_VAULT_ADDR": "https://other.example:8200", "KMS_VAULT_MOUNT": "other"}, "KRAVN_STANDBY_")
    assert "other/kravn" in standby_from_environment().master_key
    first = provider_of(Settings())
    assert first is not None
    assert "keys/kravn" in first.master_key


def test_what_a_standby_misses_is_named_with_its_prefix(environment: Environment) -> None:
    environment({"KMS_PROVIDER": "vault", "KMS_VAULT_KEY": "kravn"}, "KRAVN_STANDBY_")
    with pytest.raises(errors.SettingsError) as caught:
        standby_from_environment()
    assert str(caught.value) == (
        "KRAVN_STANDBY_KMS_PROVIDER=vault also needs KRAVN_STANDBY_KMS_VAULT_ADDR, KRAVN_STANDBY_KMS_VAULT_TOKEN."
    )


def test_a_misspelt_setting_of_a_standby_is_refused(environment: Environment) -> None:
    environment(VAULT | {"KMS_VAULT_ADR": "https://vault.example"}, "KRAVN_STANDBY_")
    with pytest.raises(errors.SettingsError, match="Did you mean KRAVN_STANDBY_KMS_VAULT_ADDR"):
        standby_from_environment()


def test_the_secret_of_a_standby_may_be_in_a_file(environment: Environment, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("MARKER-token\n")
    given = {name: value for name, value in VAULT.items() if name != "KMS_VAULT_TOKEN"}
    environment(given | {"KMS_VAULT_TOKEN_FILE": str(path)}, "KRAVN_STANDBY_")
    assert isinstance(standby_from_environment(), VaultProvider)
    environment({"KMS_VAULT_TOKEN": "MARKER"}, "KRAVN_STANDBY_")
    with pytest.raises(errors.SettingsError, match=r"KRAVN_STANDBY_KMS_VAULT_TOKEN and .*_FILE are both set") as caught:
        standby_from_environment()
    assert "MARKER" not in str(caught.value)
