"""The Azure provider: the real SDK with a local server that speaks the protocols of Entra ID and Key Vault."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sqlalchemy_kravn_crypto.exceptions import (
    MasterKeyNotFoundError,
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderResponseError,
    ProviderUnavailableError,
    SettingsError,
    UnwrapRefusedError,
)
from sqlalchemy_kravn_crypto.providers.azure import AzureProvider
from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey
from tests.azure_server import Answer, AzureVault

DATA_KEY = os.urandom(32)


def provider(azure_vault: AzureVault, **other: Any) -> AzureProvider:
    return AzureProvider(**azure_vault.settings(**{"sleep": lambda _: None, **other}))


def wrap(azure_vault: AzureVault, **other: Any) -> WrappedKey:
    return provider(azure_vault, **other).wrap(DATA_KEY, b"binding", Deadline(20))


def unwrap(azure_vault: AzureVault, wrapped: WrappedKey, **other: Any) -> bytes:
    return provider(azure_vault, **other).unwrap(wrapped, b"binding", Deadline(20))


# --- Wrapping and unwrapping -----------------------------------------------------------------------------------------


def test_a_data_key_comes_back(azure_vault: AzureVault) -> None:
    [version] = azure_vault.keys["kravn"]
    wrapped = wrap(azure_vault)
    assert wrapped.master_key == f"https://kravn.vault.azure.net/keys/kravn/{version}"
    assert len(wrapped.blob) == 256
    assert unwrap(azure_vault, wrapped) == DATA_KEY


def test_threads_may_share_a_provider(azure_vault: AzureVault) -> None:
    shared = provider(azure_vault)
    data_keys = [os.urandom(32) for _ in range(12)]

    def there_and_back(data_key: bytes) -> bytes:
        return shared.unwrap(shared.wrap(data_key, b"", Deadline(60)), b"", Deadline(60))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(there_and_back, data_keys)) == data_keys


def test_each_takes_one_authorised_request(azure_vault: AzureVault) -> None:
    unwrap(azure_vault, wrap(azure_vault))
    assert (azure_vault.count("wrapkey"), azure_vault.count("unwrapkey")) == (1, 1)
    assert {request.method for request in azure_vault.requests if request.authorised} == {"POST"}


def test_the_key_vault_wraps_and_not_the_sdk(azure_vault: AzureVault) -> None:
    azure_vault.denied.add("wrapkey")
    with pytest.raises(ProviderDeniedError):
        wrap(azure_vault)


def test_it_says_that_it_neither_authenticates_nor_binds(azure_vault: AzureVault) -> None:
    assert not AzureProvider.authenticates
    assert not AzureProvider.binds
    wrapped = wrap(azure_vault)
    assert provider(azure_vault).unwrap(wrapped, b"another binding", Deadline(20)) == DATA_KEY


def test_an_altered_wrapped_key_is_refused(azure_vault: AzureVault) -> None:
    wrapped = wrap(azure_vault)
    altered = WrappedKey(wrapped.master_key, wrapped.blob[:-1] + bytes([wrapped.blob[-1] ^ 1]))
    with pytest.raises(UnwrapRefusedError) as caught:
        unwrap(azure_vault, altered)
    assert caught.value.provider == "azure"
    assert caught.value.__context__ is None


def test_a_record_of_another_master_key_is_not_sent(azure_vault: AzureVault) -> None:
    wrapped = wrap(azure_vault)
    moved = WrappedKey(wrapped.master_key.replace("/kravn/", "/another/"), wrapped.blob)
    with pytest.raises(UnwrapRefusedError, match="KRAVN_KMS_AZURE_KEY"):
        unwrap(azure_vault, moved)
    assert azure_vault.count("unwrapkey") == 0


# --- The life of the master key --------------------------------------------------------------------------------------


def test_rotating_the_master_key_leaves_old_wrapped_keys_readable(azure_vault: AzureVault) -> None:
    old = wrap(azure_vault)
    version = azure_vault.rotate()
    new = wrap(azure_vault)
    assert new.master_key.endswith(version)
    assert not old.master_key.endswith(version)
    assert unwrap(azure_vault, old) == unwrap(azure_vault, new) == DATA_KEY


def test_a_pinned_version_keeps_wrapping_and_others_are_unwrapped(azure_vault: AzureVault) -> None:
    [version] = azure_vault.keys["kravn"]
    azure_vault.rotate()
    newest = wrap(azure_vault)
    pinned = wrap(azure_vault, key=f"kravn/{version}")
    assert pinned.master_key.endswith(version)
    assert unwrap(azure_vault, newest, key=f"kravn/{version}") == DATA_KEY


def test_a_wrapped_key_under_another_version_is_refused(azure_vault: AzureVault) -> None:
    old = wrap(azure_vault)
    version = azure_vault.rotate()
    with pytest.raises(UnwrapRefusedError):
        unwrap(azure_vault, WrappedKey(f"{azure_vault.url}/keys/kravn/{version}", old.blob))


@pytest.mark.parametrize("code", ["KeyDisabled", "KeyExpired", "KeyNotYetValid", "KeyOperationForbidden"])
def test_a_master_key_that_may_not_be_used(azure_vault: AzureVault, code: str) -> None:
    wrapped = wrap(azure_vault)
    azure_vault.refuse(code)
    for operation in (lambda: wrap(azure_vault), lambda: unwrap(azure_vault, wrapped)):
        with pytest.raises(MasterKeyUnusableError, match="enabled"):
            operation()


def test_the_code_may_be_spelt_another_way(azure_vault: AzureVault) -> None:
    azure_vault.vault_answers.append(
        Answer(403, {"error": {"code": "Forbidden", "innerError": {"code": "keydisabled"}}})
    )
    with pytest.raises(MasterKeyUnusableError):
        wrap(azure_vault)


def test_a_master_key_being_deleted(azure_vault: AzureVault) -> None:
    azure_vault.vault_answers.append(Answer(409, {"error": {"code": "Conflict"}}))
    with pytest.raises(MasterKeyUnusableError):
        wrap(azure_vault)


def test_a_master_key_that_is_no_rsa_key(azure_vault: AzureVault) -> None:
    azure_vault.vault_answers.append(Answer(400, {"error": {"code": "BadParameter"}}))
    with pytest.raises(MasterKeyUnusableError, match="RSA"):
        wrap(azure_vault)


def test_a_master_key_that_is_missing(azure_vault: AzureVault) -> None:
    with pytest.raises(MasterKeyNotFoundError, match="KRAVN_KMS_AZURE_KEY"):
        wrap(azure_vault, key="missing")


def test_a_version_that_is_missing(azure_vault: AzureVault) -> None:
    wrapped = wrap(azure_vault)
    azure_vault.keys["kravn"].clear()
    with pytest.raises(MasterKeyNotFoundError):
        unwrap(azure_vault, wrapped)


# --- Rights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"client_secret": "wrong"},
        {"client_id": "99999999-7777-8888-9999-000000000000"},
        {"tenant_id": "99999999-2222-3333-4444-555555555555"},
        {"tenant_id": "another.example"},
    ],
)
def test_credentials_that_are_refused(azure_vault: AzureVault, settings: dict[str, str]) -> None:
    with pytest.raises(ProviderDeniedError, match="KRAVN_KMS_AZURE_CLIENT_SECRET") as caught:
        wrap(azure_vault, **settings)
    assert caught.value.__context__ is None
    assert azure_vault.count("wrapkey") == 0


@pytest.mark.parametrize("operation", ["wrapkey", "unwrapkey"])
def test_a_missing_role(azure_vault: AzureVault, operation: str) -> None:
    wrapped = wrap(azure_vault)
    azure_vault.denied.add(operation)
    with pytest.raises(ProviderDeniedError, match="Key Vault Crypto User"):
        wrap(azure_vault) if operation == "wrapkey" else unwrap(azure_vault, wrapped)


def test_a_firewall(azure_vault: AzureVault) -> None:
    azure_vault.vault_answers.append(
        Answer(403, {"error": {"code": "Forbidden", "innererror": {"code": "ForbiddenByFirewall"}}})
    )
    with pytest.raises(ProviderDeniedError, match="firewall"):
        wrap(azure_vault)


def test_a_token_that_the_key_vault_never_accepts(azure_vault: AzureVault) -> None:
    azure_vault.accepts_tokens = False
    with pytest.raises(ProviderDeniedError):
        wrap(azure_vault)
    assert azure_vault.count("wrapkey") == 0


def test_a_token_that_was_revoked_between_two_requests(azure_vault: AzureVault) -> None:
    wrapped = wrap(azure_vault)
    azure_vault.tokens.clear()
    assert unwrap(azure_vault, wrapped) == DATA_KEY


def test_a_key_vault_that_asks_for_a_token_for_somebody_else(azure_vault: AzureVault) -> None:
    azure_vault.accepts_tokens = False
    azure_vault.resource = "https://storage.example"
    with pytest.raises(ProviderResponseError):
        wrap(azure_vault)
    assert azure_vault.count("wrapkey") == 0


# --- The service -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_key_vault_that_recovers(azure_vault: AzureVault, status: int) -> None:
    azure_vault.vault_answers.extend([Answer(status), Answer(status)])
    wrapped = wrap(azure_vault)
    assert azure_vault.count("wrapkey") == 3
    assert unwrap(azure_vault, wrapped) == DATA_KEY


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_key_vault_that_does_not_recover(azure_vault: AzureVault, status: int) -> None:
    azure_vault.vault_answers.extend([Answer(status)] * 9)
    with pytest.raises(ProviderUnavailableError):
        wrap(azure_vault)
    assert azure_vault.count("wrapkey") == 3


def test_a_login_service_that_does_not_recover(azure_vault: AzureVault) -> None:
    azure_vault.login_answers.extend([Answer(503)] * 9)
    with pytest.raises(ProviderUnavailableError, match="login service"):
        wrap(azure_vault)
    assert azure_vault.count("wrapkey") == 0


VERSION = "0" * 32


@pytest.mark.parametrize(
    "key_identifier",
    [
        None,
        1,
        "",
        "https://kravn.vault.azure.net/keys/kravn",
        "https://kravn.vault.azure.net/keys/kravn/",
        "https://kravn.vault.azure.net/keys/kravn/newest",
        f"https://kravn.vault.azure.net/keys/another/{VERSION}",
        f"https://another.vault.azure.net/keys/kravn/{VERSION}",
        f"http://kravn.vault.azure.net/keys/kravn/{VERSION}",
        f"https://kravn.vault.azure.net/keys/kravn/{VERSION}\n",
        f"https://kravn.vault.azure.net/keys/kravn/{VERSION}/x",
        f"https://kravn.vault.azure.net/secrets/kravn/{VERSION}",
    ],
)
def test_an_identifier_of_something_else_is_refused(azure_vault: AzureVault, key_identifier: Any) -> None:
    azure_vault.vault_answers.append(Answer(200, {"kid": key_identifier, "value": "A" * 342}))
    with pytest.raises(ProviderResponseError):
        wrap(azure_vault)


def test_another_version_than_was_asked_for_is_refused(azure_vault: AzureVault) -> None:
    wrapped = wrap(azure_vault)
    answer = Answer(200, {"kid": f"{azure_vault.url}/keys/kravn/{VERSION}", "value": "A" * 43})
    azure_vault.vault_answers.append(answer)
    with pytest.raises(ProviderResponseError):
        unwrap(azure_vault, wrapped)


@pytest.mark.parametrize("size", [0, 32, 255, 257, 1024])
def test_a_wrapped_key_of_no_rsa_size_is_refused(azure_vault: AzureVault, size: int) -> None:
    [version] = azure_vault.keys["kravn"]
    value = "A" * -(-size * 4 // 3)
    azure_vault.vault_answers.append(Answer(200, {"kid": f"{azure_vault.url}/keys/kravn/{version}", "value": value}))
    with pytest.raises(ProviderResponseError):
        wrap(azure_vault)


def test_another_data_key_is_for_the_key_check_to_notice(azure_vault: AzureVault) -> None:
    wrapped = wrap(azure_vault)
    azure_vault.unwrapped = bytes(range(32))
    assert unwrap(azure_vault, wrapped) == bytes(range(32))


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "",
        "../decrypt/kek",
        "a/b",
        "k?x",
        "k#x",
        "%2e%2e",
        "a b",
        "k\n",
        "k_x",
        f"k/{VERSION}/",
        f"k/{VERSION[1:]}",
        f"k/{VERSION}\n",
    ],
)
def test_a_key_that_is_no_name(azure_vault: AzureVault, key: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_AZURE_KEY"):
        provider(azure_vault, key=key)
    assert azure_vault.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "kravn.vault.azure.net",
        "http://kravn.vault.azure.net",
        "https://vault.azure.net",
        "https://kravn.vault.azure.net.example",
        "https://kravn.example",
        "https://a.b.vault.azure.net",
        "https://user@kravn.vault.azure.net",
        "https://kravn.vault.azure.net:443",
        "https://kravn.vault.azure.net/keys",
        "https://kravn.vault.azure.net?x",
        "https://kravn.vault.azure.net\n",
        "https://127.0.0.1",
    ],
)
def test_a_vault_url_that_is_refused(azure_vault: AzureVault, url: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_AZURE_VAULT_URL"):
        provider(azure_vault, vault_url=url)


@pytest.mark.parametrize(
    "url",
    [
        "https://kravn.vault.azure.net/",
        "https://KRAVN.vault.azure.net",
        "https://kravn.vault.azure.cn",
        "https://kravn.vault.usgovcloudapi.net",
        "https://kravn.managedhsm.azure.net",
    ],
)
def test_a_vault_url_that_is_accepted(azure_vault: AzureVault, url: str) -> None:
    assert provider(azure_vault, vault_url=url).master_key == f"{url.lower().rstrip('/')}/keys/kravn"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tenant_id", ""),
        ("tenant_id", "a/b"),
        ("tenant_id", "a\n"),
        ("client_id", ""),
        ("client_id", "a b"),
        ("client_secret", ""),
        ("client_secret", "a\n"),
        ("client_secret", "a" * 1025),
    ],
)
def test_credentials_that_cannot_be_sent(azure_vault: AzureVault, name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"KRAVN_KMS_AZURE_{name.upper()}") as caught:
        provider(azure_vault, **{name: value})
    assert len(value) < 100 or value not in str(caught.value)


def test_what_it_recognises(azure_vault: AzureVault) -> None:
    it = provider(azure_vault)
    assert it.recognises(f"https://kravn.vault.azure.net/keys/kravn/{VERSION}")
    assert it.recognises(f"https://kravn.vault.azure.net/keys/Kravn/{VERSION}")
    for other in (
        it.master_key,
        f"{it.master_key}/",
        f"{it.master_key}/x",
        f"https://x.vault.azure.net/keys/kravn/{VERSION}",
    ):
        assert not it.recognises(other)


def test_the_client_secret_is_not_shown(azure_vault: AzureVault) -> None:
    assert azure_vault.client_secret not in repr(provider(azure_vault))


# --- The extras ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("vault", "hvac"),
        ("vault", "requests"),
        ("azure", "azure.identity"),
        ("azure", "azure.keyvault.keys"),
        ("azure", "azure"),
    ],
)
def test_a_missing_package_names_the_extra(name: str, missing: str) -> None:
    program = f"""
import sys
sys.modules[{missing!r}] = None
from sqlalchemy_kravn_crypto.exceptions import MissingExtraError
try:
    import sqlalchemy_kravn_crypto.providers.{name}
except MissingExtraError as error:
    assert error.__context__ is None and error.__cause__ is None
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert f"pip install 'sqlalchemy-kravn-crypto[{name}]'" in ran.stdout
