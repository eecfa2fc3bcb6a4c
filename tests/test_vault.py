"""The Vault provider with a real OpenBao server."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sqlalchemy_kravn_crypto.exceptions import (
    CredentialExpiredError,
    MasterKeyNotFoundError,
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderSealedError,
    ProviderUnavailableError,
    SettingsError,
    UnwrapRefusedError,
)
from sqlalchemy_kravn_crypto.providers.base import Deadline, KeyProvider, WrappedKey
from sqlalchemy_kravn_crypto.providers.vault import VaultProvider
from tests.hostile_server import HostileServer, answers
from tests.openbao import OpenBao

BINDING = b"what the data key belongs to"


class Deployment:
    """A master key of its own on the shared server, and a token that may wrap and unwrap under it only."""

    def __init__(self, server: OpenBao) -> None:
        self.server = server
        self.key = f"key-{secrets.token_hex(4)}"
        self.data_key = os.urandom(32)
        server.create_key(self.key)
        self.token = server.issue_token(self.key)

    def provider(self, **other: Any) -> VaultProvider:
        settings = {"key": self.key, "token": self.token, "sleep": lambda _: None, **other}
        return VaultProvider(**self.server.settings(**settings))

    def wrap(self, **other: Any) -> WrappedKey:
        return self.provider(**other).wrap(self.data_key, BINDING, Deadline(20))

    def unwrap(self, wrapped: WrappedKey, binding: bytes = BINDING, **other: Any) -> bytes:
        return self.provider(**other).unwrap(wrapped, binding, Deadline(20))

    def count(self, operation: str) -> int:
        return self.server.count(f"transit/{operation}/{self.key}")


@pytest.fixture
def deployment(openbao: OpenBao) -> Deployment:
    return Deployment(openbao)


@pytest.fixture
def namespace(openbao: OpenBao) -> str:
    name = f"team-{secrets.token_hex(4)}"
    openbao.create_namespace(name)
    openbao.mount("transit", namespace=name)
    openbao.create_key("kravn", namespace=name)
    return name


# --- Wrapping and unwrapping -----------------------------------------------------------------------------------------


def test_a_data_key_comes_back(deployment: Deployment) -> None:
    wrapped = deployment.wrap()
    assert wrapped.master_key == f"transit/{deployment.key}:v1"
    assert wrapped.blob.startswith(b"vault:v1:")
    assert deployment.unwrap(wrapped) == deployment.data_key


def test_threads_may_share_a_provider(deployment: Deployment) -> None:
    provider = deployment.provider()
    data_keys = [os.urandom(32) for _ in range(24)]

    def there_and_back(data_key: bytes) -> bytes:
        return provider.unwrap(provider.wrap(data_key, data_key, Deadline(60)), data_key, Deadline(60))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, data_keys)) == data_keys


def test_each_takes_one_request(deployment: Deployment) -> None:
    deployment.unwrap(deployment.wrap())
    assert (deployment.count("encrypt"), deployment.count("decrypt")) == (1, 1)


def test_the_data_key_is_sent_to_nothing_but_transit(deployment: Deployment) -> None:
    before = len(deployment.server.audit_entries())
    deployment.unwrap(deployment.wrap())
    paths = [entry["request"]["path"] for entry in deployment.server.audit_entries()[before:]]
    assert paths == [f"transit/encrypt/{deployment.key}", f"transit/decrypt/{deployment.key}"]


@pytest.mark.parametrize("binding", [b"", b"another", BINDING + b"\0", BINDING[:-1]])
def test_another_binding_is_refused(deployment: Deployment, binding: bytes) -> None:
    wrapped = deployment.wrap()
    with pytest.raises(UnwrapRefusedError) as caught:
        deployment.unwrap(wrapped, binding)
    assert caught.value.provider == "vault"
    assert caught.value.__context__ is None


def test_an_altered_wrapped_key_is_refused(deployment: Deployment) -> None:
    wrapped = deployment.wrap()
    for position in range(len("vault:v1:"), len(wrapped.blob), 7):
        other = b"B" if wrapped.blob[position : position + 1] == b"A" else b"A"
        blob = wrapped.blob[:position] + other + wrapped.blob[position + 1 :]
        with pytest.raises(UnwrapRefusedError):
            deployment.unwrap(WrappedKey(wrapped.master_key, blob))


def test_a_wrapped_key_of_another_master_key_is_refused(deployment: Deployment) -> None:
    other = Deployment(deployment.server)
    moved = WrappedKey(f"transit/{deployment.key}:v1", other.wrap().blob)
    with pytest.raises(UnwrapRefusedError):
        deployment.unwrap(moved)


@pytest.mark.parametrize(
    "blob", [b"x", b"vault:v0:AAAA", b"vault:v1:", b"vault:v1:AA\n", b"\xff" * 40, b"vault:v2:AAAA"]
)
def test_what_is_no_wrapped_key_of_the_record_is_not_sent(deployment: Deployment, blob: bytes) -> None:
    with pytest.raises(UnwrapRefusedError):
        deployment.unwrap(WrappedKey(f"transit/{deployment.key}:v1", blob))
    assert deployment.count("decrypt") == 0


def test_a_record_of_another_master_key_is_not_sent(deployment: Deployment) -> None:
    wrapped = deployment.wrap()
    with pytest.raises(UnwrapRefusedError, match="KRAVN_KMS_VAULT_KEY"):
        deployment.unwrap(WrappedKey("transit/another:v1", wrapped.blob))
    assert deployment.count("decrypt") == 0


def test_in_a_namespace(openbao: OpenBao, namespace: str) -> None:
    token = openbao.issue_token(namespace=namespace)
    provider = VaultProvider(**openbao.settings(token=token, namespace=namespace))
    wrapped = provider.wrap(bytes(32), BINDING, Deadline(20))
    assert wrapped.master_key == f"{namespace}/transit/kravn:v1"
    assert provider.unwrap(wrapped, BINDING, Deadline(20)) == bytes(32)


def test_on_another_mount(openbao: OpenBao) -> None:
    mount = f"teams/{secrets.token_hex(4)}"
    openbao.mount(mount)
    openbao.create_key(mount=mount)
    provider = VaultProvider(**openbao.settings(token=openbao.issue_token(mount=mount), mount=f"/{mount}/"))
    wrapped = provider.wrap(bytes(32), BINDING, Deadline(20))
    assert wrapped.master_key == f"{mount}/kravn:v1"
    assert provider.unwrap(wrapped, BINDING, Deadline(20)) == bytes(32)


def test_a_boot_needs_the_right_to_unwrap_only(deployment: Deployment) -> None:
    wrapped = deployment.wrap()
    token = deployment.server.issue_token(deployment.key, rights=("decrypt",))
    assert deployment.unwrap(wrapped, token=token) == deployment.data_key
    with pytest.raises(ProviderDeniedError):
        deployment.wrap(token=token)


# --- The life of the master key --------------------------------------------------------------------------------------


def test_rotating_the_master_key_leaves_old_wrapped_keys_readable(deployment: Deployment) -> None:
    old = deployment.wrap()
    deployment.server.rotate(deployment.key)
    new = deployment.wrap()
    assert (old.master_key[-3:], new.master_key[-3:]) == (":v1", ":v2")
    assert deployment.unwrap(old) == deployment.unwrap(new) == deployment.data_key


def test_a_version_that_is_too_old(deployment: Deployment) -> None:
    wrapped = deployment.wrap()
    deployment.server.rotate(deployment.key)
    deployment.server.set_min_decryption_version(2, deployment.key)
    with pytest.raises(MasterKeyUnusableError, match="min_decryption_version"):
        deployment.unwrap(wrapped)
    deployment.server.set_min_decryption_version(1, deployment.key)
    assert deployment.unwrap(wrapped) == deployment.data_key


def test_a_master_key_made_anew_under_the_same_name(deployment: Deployment) -> None:
    wrapped = deployment.wrap()
    deployment.server.recreate_key(deployment.key)
    with pytest.raises(UnwrapRefusedError, match="made anew"):
        deployment.unwrap(wrapped)


def test_a_master_key_that_was_deleted(deployment: Deployment) -> None:
    wrapped = deployment.wrap()
    deployment.server.delete_key(deployment.key)
    with pytest.raises(MasterKeyNotFoundError, match="KRAVN_KMS_VAULT_KEY"):
        deployment.unwrap(wrapped)


@pytest.mark.parametrize("options", [{"type": "rsa-2048"}, {"type": "ed25519"}, {"derived": True}])
def test_a_master_key_of_a_type_that_cannot_bind(openbao: OpenBao, options: dict[str, Any]) -> None:
    key = f"key-{secrets.token_hex(4)}"
    openbao.create_key(key, **options)
    provider = VaultProvider(**openbao.settings(key=key, token=openbao.issue_token(key)))
    with pytest.raises(MasterKeyUnusableError, match="aes256-gcm96"):
        provider.wrap(bytes(32), BINDING, Deadline(20))
    with pytest.raises(MasterKeyUnusableError, match="aes256-gcm96"):
        provider.unwrap(WrappedKey(f"transit/{key}:v1", b"vault:v1:" + b"A" * 80), BINDING, Deadline(20))


@pytest.mark.parametrize("key_type", ["aes128-gcm96", "chacha20-poly1305", "xchacha20-poly1305"])
def test_a_master_key_of_another_type_that_binds(openbao: OpenBao, key_type: str) -> None:
    key = f"key-{secrets.token_hex(4)}"
    openbao.create_key(key, type=key_type)
    provider = VaultProvider(**openbao.settings(key=key, token=openbao.issue_token(key)))
    wrapped = provider.wrap(bytes(32), BINDING, Deadline(20))
    assert provider.unwrap(wrapped, BINDING, Deadline(20)) == bytes(32)
    with pytest.raises(UnwrapRefusedError):
        provider.unwrap(wrapped, b"another", Deadline(20))


def test_a_master_key_that_is_missing(openbao: OpenBao) -> None:
    token = openbao.issue_token("missing")
    provider = VaultProvider(**openbao.settings(key="missing", token=token))
    with pytest.raises(MasterKeyNotFoundError, match="transit/keys/missing"):
        provider.wrap(bytes(32), BINDING, Deadline(20))
    with pytest.raises(MasterKeyNotFoundError):
        provider.unwrap(WrappedKey("transit/missing:v1", b"vault:v1:" + b"A" * 80), BINDING, Deadline(20))


# --- Rights ----------------------------------------------------------------------------------------------------------


def assert_denied(
    deployment: Deployment, wrapped: WrappedKey, expected: type[ProviderDeniedError], **other: Any
) -> None:
    for operation in (lambda: deployment.wrap(**other), lambda: deployment.unwrap(wrapped, **other)):
        with pytest.raises(ProviderDeniedError, match="KRAVN_KMS_VAULT_TOKEN") as caught:
            operation()
        assert caught.type is expected
        assert other.get("token", deployment.token) not in str(caught.value)
        assert caught.value.__context__ is None


def test_a_wrong_token(deployment: Deployment) -> None:
    assert_denied(deployment, deployment.wrap(), CredentialExpiredError, token="s.wrong")


def test_a_revoked_token(deployment: Deployment) -> None:
    wrapped = deployment.wrap()
    deployment.server.revoke(deployment.token)
    assert_denied(deployment, wrapped, CredentialExpiredError)


def test_a_token_for_another_master_key(deployment: Deployment) -> None:
    token = deployment.server.issue_token("another")
    assert_denied(deployment, deployment.wrap(), ProviderDeniedError, token=token)


def test_a_token_without_the_capability_update(deployment: Deployment) -> None:
    token = deployment.server.issue_token(deployment.key, capabilities=("read",))
    assert_denied(deployment, deployment.wrap(), ProviderDeniedError, token=token)


def test_a_missing_mount(deployment: Deployment) -> None:
    with pytest.raises(MasterKeyNotFoundError, match="KRAVN_KMS_VAULT_MOUNT"):
        deployment.wrap(mount="missing", token=deployment.server.root_token)


def test_a_missing_namespace(deployment: Deployment) -> None:
    with pytest.raises(MasterKeyNotFoundError, match="KRAVN_KMS_VAULT_NAMESPACE"):
        deployment.wrap(namespace="missing")


def test_a_namespace_without_the_engine(deployment: Deployment) -> None:
    name = f"team-{secrets.token_hex(4)}"
    deployment.server.create_namespace(name)
    with pytest.raises(MasterKeyNotFoundError):
        deployment.wrap(namespace=name, token=deployment.server.root_token)


def test_a_mount_of_another_engine(deployment: Deployment) -> None:
    mount = f"kv-{secrets.token_hex(4)}"
    deployment.server.mount(mount, engine="kv")
    with pytest.raises(ProviderResponseError, match="KRAVN_KMS_VAULT_MOUNT"):
        deployment.wrap(mount=mount, token=deployment.server.root_token)


# --- The server ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(deployment: Deployment) -> Iterator[Deployment]:
    deployment.server.seal()
    yield deployment
    deployment.server.unseal()


def test_a_sealed_server(sealed: Deployment) -> None:
    for operation in (
        sealed.wrap,
        lambda: sealed.unwrap(WrappedKey(f"transit/{sealed.key}:v1", b"vault:v1:" + b"A" * 80)),
    ):
        with pytest.raises(ProviderSealedError, match="Unseal"):
            operation()


def test_a_server_that_stopped() -> None:
    server = OpenBao()
    try:
        provider = VaultProvider(**server.settings(sleep=lambda _: None))
        provider.wrap(bytes(32), BINDING, Deadline(20))
    finally:
        server.stop()
    with pytest.raises(ProviderUnavailableError) as caught:
        provider.wrap(bytes(32), BINDING, Deadline(20))
    assert caught.type is ProviderUnavailableError


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_recovers(status: int) -> None:
    server = HostileServer()
    try:
        recovered = answers(200, {"data": {"ciphertext": "vault:v3:AAAA"}})
        queue = [answers(status, {"errors": []}), answers(status, {"errors": []}), recovered]

        def raw(connection: socket.socket, body: bytes) -> None:
            queue.pop(0)(connection, body)

        server.raw = raw
        provider = VaultProvider(address=server.url, token="t", key="kravn", sleep=lambda _: None)
        assert provider.wrap(bytes(32), BINDING, Deadline(20)) == WrappedKey("transit/kravn:v3", b"vault:v3:AAAA")
        assert len(server.requests) == 3
    finally:
        server.close()


@pytest.mark.parametrize(
    "ciphertext",
    [
        "",
        "vault:v1:",
        "vault:v0:AAAA",
        "vault:v:AAAA",
        "v1:AAAA",
        "vault:v1:AA-A",
        "vault:v1:AAAA\n",
        "vault:v1:" + "A" * 4096,
    ],
)
def test_what_is_no_wrapped_key_is_refused(ciphertext: str) -> None:
    server = HostileServer()
    try:
        server.raw = answers(200, {"data": {"ciphertext": ciphertext}})
        provider = VaultProvider(address=server.url, token="t", key="kravn")
        with pytest.raises(ProviderResponseError):
            provider.wrap(bytes(32), BINDING, Deadline(20))
    finally:
        server.close()


# --- Settings --------------------------------------------------------------------------------------------------------

NO_NAMES = [
    "../decrypt/kek",
    "..",
    ".",
    "",
    "a//b",
    "k?x",
    "k#x",
    "%2e%2e",
    "a b",
    "k\n",
    "\nk",
    "k\0",
    "k\u00e4",
    "-k",
    "a" * 129,
]


@pytest.mark.parametrize("name", [*NO_NAMES, "a/b", "/a"])
def test_a_key_that_is_no_name(openbao: OpenBao, name: str) -> None:
    before = len(openbao.audit_entries())
    with pytest.raises(SettingsError, match="KRAVN_KMS_VAULT_KEY"):
        VaultProvider(**openbao.settings(key=name))
    assert len(openbao.audit_entries()) == before


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_mount_that_is_no_path(openbao: OpenBao, name: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_VAULT_MOUNT"):
        VaultProvider(**openbao.settings(mount=name))


@pytest.mark.parametrize("name", [name for name in NO_NAMES if name])
def test_a_namespace_that_is_no_path(openbao: OpenBao, name: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_VAULT_NAMESPACE"):
        VaultProvider(**openbao.settings(namespace=name))


def test_a_path_that_is_too_long_to_record() -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_VAULT_NAMESPACE"):
        VaultProvider(address="https://v", token="t", key="k", namespace="/".join(["a" * 128] * 8))


@pytest.mark.parametrize("token", ["", "a b", "a\n", "a\r\nX-Evil: 1", "t\u00f6ken", "a" * 9000])
def test_a_token_that_cannot_be_sent(openbao: OpenBao, token: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_VAULT_TOKEN") as caught:
        VaultProvider(**openbao.settings(token=token))
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "vault.example",
        "ftp://vault.example",
        "https://",
        "https://user@vault.example",
        "https://user:password@vault.example",
        "https://vault.example/path",
        "https://vault.example?x",
        "https://vault.example#x",
        "https://vault.example:0",
        "https://vault.example:65536",
        "https://vault.example:x",
        "https://vault.example\n",
        "https://vault example",
        "http://vault.example",
        "http://127.0.0.1.example",
        "http://localhost.example",
        "http://192.0.2.1:8200",
        "http://[2001:db8::1]:8200",
    ],
)
def test_an_address_that_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_VAULT_ADDR"):
        VaultProvider(address=address, token="t", key="kravn")


@pytest.mark.parametrize(
    "address",
    [
        "https://vault.example",
        "https://vault.example/",
        "https://vault_1:8200",
        "https://[2001:db8::1]:8200",
        "http://localhost:8200",
        "http://127.0.0.1:8200",
        "http://[::1]:8200",
    ],
)
def test_an_address_that_is_accepted(address: str) -> None:
    assert VaultProvider(address=address, token="t", key="kravn").master_key == "transit/kravn"


def test_what_it_recognises() -> None:
    provider = VaultProvider(address="https://v", token="t", key="kravn", namespace="a/b/", mount="m/n")
    assert provider.master_key == "a/b/m/n/kravn"
    assert provider.recognises("a/b/m/n/kravn:v1")
    assert provider.recognises("a/b/m/n/kravn:v20")
    for other in ("a/b/m/n/kravn", "a/b/m/n/kravn:v", "a/b/m/n/kravn:vx", "m/n/kravn:v1", "kravn:v1", "", ":v1"):
        assert not provider.recognises(other)


def test_the_token_is_not_shown() -> None:
    provider: KeyProvider = VaultProvider(address="https://v", token="s.secret-token", key="kravn")
    assert "secret-token" not in repr(provider)
    assert "secret-token" not in str(provider)
    assert "transit/kravn" in repr(provider)


def test_all_errors_are_provider_errors(deployment: Deployment) -> None:
    with pytest.raises(ProviderError):
        deployment.provider().unwrap(WrappedKey("x", b"x"), b"", Deadline(-1))
