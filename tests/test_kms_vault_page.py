"""docs/kms-vault.md: its commands are run as they stand there, and do what the page says."""

from __future__ import annotations

import base64
import json
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sqlalchemy_kravn_crypto import exceptions
from sqlalchemy_kravn_crypto.configuration import provider_of
from sqlalchemy_kravn_crypto.derivation import key_id_of
from sqlalchemy_kravn_crypto.exceptions import MasterKeyNotFoundError, ProviderDeniedError
from sqlalchemy_kravn_crypto.providers.base import Deadline, KeyProvider, WrappedKey
from sqlalchemy_kravn_crypto.providers.vault import VaultProvider
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.wrapping import MAC_KEYRING, binding, wrap
from tests.kubernetes_api import KubernetesAPI
from tests.openbao import OpenBao

PAGE = Path(__file__).parents[1] / "docs" / "kms-vault.md"
DEPLOYMENT_ID = "0b0f3c2e-58a1-4a7e-9d52-7f6f2b1c9e11"
OTHER_ID = "c2f1a6de-3d39-4f0e-8f0c-1f4de8c5a6b7"

KEY = "The engine and the master key"
POLICY = "The policy"
BOOT = "Replicas that only unwrap"
PINNED = "One deployment under a master key"
TOKEN = "A token"
APPROLE = "AppRole"
KUBERNETES = "Kubernetes"
JWT = "JWT"
CERTIFICATE = "A TLS client certificate"
AUDIT = "The audit log"
TRIED = {KEY, POLICY, BOOT, PINNED, TOKEN, APPROLE, KUBERNETES, JWT, CERTIFICATE, AUDIT}


def sections() -> dict[str, str]:
    """Return what stands under each heading, without what stands under those below it."""
    parts = re.split(r"^#{1,3} (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", sections()[title], flags=re.MULTILINE | re.DOTALL)


class Administrator:
    """Somebody who gives the commands of the page to a server that is new."""

    def __init__(self, server: OpenBao, directory: Path) -> None:
        self.server = server
        self.directory = directory

    def run(self, title: str, *, block: int | None = None, **environment: str) -> str:
        """Give the commands under a heading, or one block of them, and return what they print."""
        found = blocks(title, "sh")
        assert found
        script = "".join(found if block is None else found[block : block + 1])
        done = self.server.run(script, self.directory, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def token(self, policy: str) -> str:
        created = self.server.write("auth/token/create", policies=[policy], no_default_policy=True, no_parent=True)
        return str(created["auth"]["client_token"])


@pytest.fixture(scope="module")
def administrator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Administrator]:
    """The engine, the master key and the policy are made, as the page has it."""
    server = OpenBao()
    server.unmount("transit")
    made = Administrator(server, tmp_path_factory.mktemp("administrator"))
    shown = made.run(KEY)
    made.run(POLICY)
    for option in ("exportable", "allow_plaintext_backup", "deletion_allowed"):
        assert re.search(rf"^{option} +false$", shown, flags=re.MULTILINE)
    yield made
    server.stop()


class Shell:
    """The environment of a process that is configured as the page says."""

    def __init__(self, administrator: Administrator, monkeypatch: pytest.MonkeyPatch) -> None:
        self._server = administrator.server
        self._monkeypatch = monkeypatch

    def provider(self, title: str, **actual: object) -> KeyProvider:
        """Return the provider of the settings under a heading.

        :param actual: what stands in the place of a value of the page, which must be there.
        """
        [block] = blocks(title, "ini")
        settings = dict(line.split("=", 1) for line in block.splitlines())
        for name, value in {"KRAVN_KMS_VAULT_ADDR": self._server.address, **actual}.items():
            assert name in settings
            settings[name] = str(value)
        for name, value in settings.items():
            self._monkeypatch.setenv(name, value)
        self._monkeypatch.setenv("KRAVN_KMS_PROVIDER", "vault")
        made = provider_of(Settings.from_environment())
        assert made is not None
        return made


@pytest.fixture
def shell(administrator: Administrator, monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(administrator, monkeypatch)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def provision(provider: KeyProvider, deployment_id: str = DEPLOYMENT_ID, keyring: str = "default") -> bytes:
    """Wrap a new key as a deployment does, with all its checks, and return it."""
    key = secrets.token_bytes(32)
    wrap(provider, key, keyring=keyring, deployment_id=deployment_id, timeout=20)
    return key


def provider_with(administrator: Administrator, policy: str, **other: str) -> KeyProvider:
    return VaultProvider(**administrator.server.settings(token=administrator.token(policy), **other))


def test_all_commands_of_the_page_are_tried() -> None:
    assert {title for title in sections() if blocks(title, "sh")} == TRIED


# --- Policies --------------------------------------------------------------------------------------------------------


def test_the_policy_is_enough_and_makes_no_key(administrator: Administrator) -> None:
    provision(provider_with(administrator, "kravn"))
    misspelt = provider_with(administrator, "kravn", key="krvan")
    with pytest.raises(ProviderDeniedError):
        misspelt.wrap(bytes(32), b"", Deadline(20))
    assert administrator.server.names("transit/keys") == ["kravn"]


def test_the_policy_to_unwrap_only(administrator: Administrator) -> None:
    administrator.run(BOOT)
    bound = binding("default", DEPLOYMENT_ID, bytes(8))
    wrapped = provider_with(administrator, "kravn").wrap(bytes(32), bound, Deadline(20))
    replica = provider_with(administrator, "kravn-boot")
    assert replica.unwrap(wrapped, bound, Deadline(20)) == bytes(32)
    with pytest.raises(ProviderDeniedError, match="update on transit/encrypt/kravn"):
        replica.wrap(bytes(32), bound, Deadline(20))


@pytest.fixture
def pinned(administrator: Administrator) -> KeyProvider:
    administrator.run(PINNED, block=0, KRAVN_DEPLOYMENT_ID=DEPLOYMENT_ID)
    return provider_with(administrator, "kravn-pinned")


@pytest.mark.parametrize("keyring", ["default", MAC_KEYRING])
def test_a_pinned_policy_is_enough_for_its_deployment(pinned: KeyProvider, keyring: str) -> None:
    provision(pinned, keyring=keyring)


@pytest.mark.parametrize(
    "bound",
    [
        binding("default", OTHER_ID, bytes(8)),
        binding("another", DEPLOYMENT_ID, bytes(8)),
        binding("default", DEPLOYMENT_ID.upper(), bytes(8)),
        binding("default", DEPLOYMENT_ID[:-1], bytes(8)),
        binding("default", DEPLOYMENT_ID, b""),
        b"",
    ],
)
def test_a_pinned_policy_denies_all_else(administrator: Administrator, pinned: KeyProvider, bound: bytes) -> None:
    wrapped = provider_with(administrator, "kravn").wrap(bytes(32), bound, Deadline(20))
    with pytest.raises(ProviderDeniedError, match="other associated data") as caught:
        pinned.unwrap(wrapped, bound, Deadline(20))
    assert caught.type is ProviderDeniedError
    with pytest.raises(ProviderDeniedError):
        pinned.wrap(bytes(32), bound, Deadline(20))


def test_a_pinned_policy_denies_what_is_not_bound(administrator: Administrator, pinned: KeyProvider) -> None:
    """Also in a batch, beside associated data that is allowed: that would else bind nothing."""
    text = base64.b64encode(bytes(32)).decode()
    allowed = base64.b64encode(binding("default", DEPLOYMENT_ID, bytes(8))).decode()
    token = administrator.token("kravn-pinned")
    batch = [{"plaintext": text}]
    for fields, status in (
        ({"plaintext": text, "associated_data": allowed}, 200),
        ({"plaintext": text}, 403),
        ({"batch_input": batch}, 403),
        ({"plaintext": text, "associated_data": allowed, "batch_input": batch}, 403),
        ({"plaintext": text, "associated_data": allowed, "nonce": ""}, 403),
    ):
        assert administrator.server.status_of("transit/encrypt/kravn", token, **fields) == status, fields


def test_a_missing_key_is_told_in_spite_of_a_pinned_policy(administrator: Administrator, pinned: KeyProvider) -> None:
    administrator.server.delete_key("kravn")
    try:
        with pytest.raises(MasterKeyNotFoundError):
            pinned.wrap(bytes(32), binding("default", DEPLOYMENT_ID, bytes(8)), Deadline(20))
    finally:
        administrator.server.create_key("kravn")


def test_a_policy_for_one_data_key(administrator: Administrator) -> None:
    full = provider_with(administrator, "kravn")
    keys = [secrets.token_bytes(32) for _ in range(2)]
    bounds = [binding("default", DEPLOYMENT_ID, key_id_of(key)) for key in keys]
    wrapped = [full.wrap(key, bound, Deadline(20)) for key, bound in zip(keys, bounds, strict=True)]
    administrator.run(PINNED, block=1, KRAVN_DEPLOYMENT_ID=DEPLOYMENT_ID, KEY_ID=key_id_of(keys[0]).hex())
    archive = provider_with(administrator, "kravn-archive")
    assert archive.unwrap(wrapped[0], bounds[0], Deadline(20)) == keys[0]
    with pytest.raises(ProviderDeniedError):
        archive.unwrap(wrapped[1], bounds[1], Deadline(20))
    with pytest.raises(ProviderDeniedError):
        archive.wrap(keys[0], bounds[0], Deadline(20))


def test_the_prefix_is_as_long_as_the_page_says() -> None:
    texts = [base64.b64encode(binding("default", DEPLOYMENT_ID, secrets.token_bytes(8))).decode() for _ in range(9)]
    assert len({text[:120] for text in texts}) == 1
    assert len({text[120:] for text in texts}) == 9
    assert "a fixed prefix of 120 characters" in sections()[PINNED]


# --- Logins ----------------------------------------------------------------------------------------------------------


def assert_logs_in(administrator: Administrator, provider: KeyProvider, login: str) -> None:
    """Check that it may do what a deployment needs, with one login for each operation and a token like the page's."""
    mark = len(administrator.server.audit_entries())
    provision(provider)
    asked = administrator.server.audit_entries()[mark:]
    paths = [entry["request"]["path"] for entry in asked]
    assert paths == [login, "transit/encrypt/kravn", login, "transit/decrypt/kravn", login, "transit/decrypt/kravn"]
    for entry in asked[1::2]:
        assert (entry["auth"]["policies"], entry["auth"]["token_type"]) == (["kravn"], "batch")


def test_a_token(administrator: Administrator, shell: Shell, tmp_path: Path) -> None:
    token = written(tmp_path / "token", administrator.run(TOKEN))
    provision(shell.provider(TOKEN, KRAVN_KMS_VAULT_TOKEN_FILE=token))


def test_approle(administrator: Administrator, shell: Shell, tmp_path: Path) -> None:
    administrator.run(APPROLE, block=0)
    role_id = administrator.run(APPROLE, block=1)
    secret_file = written(tmp_path / "secret-id", administrator.run(APPROLE, block=2))
    provider = shell.provider(APPROLE, KRAVN_KMS_VAULT_ROLE_ID=role_id, KRAVN_KMS_VAULT_SECRET_ID_FILE=secret_file)
    assert_logs_in(administrator, provider, "auth/approle/login")


def test_kubernetes(administrator: Administrator, shell: Shell, tmp_path: Path) -> None:
    api = KubernetesAPI(administrator.server.certificate)
    try:
        written(administrator.directory / "ca.crt", administrator.server.authority.ca_bundle.read_text())
        administrator.run(KUBERNETES, KUBERNETES_HOST=api.url, REVIEWER_JWT=api.reviewer)
        token = written(tmp_path / "vault", api.issue("app", "prod", audience="vault"))
        provider = shell.provider(KUBERNETES, KRAVN_KMS_VAULT_JWT_FILE=token)
        assert_logs_in(administrator, provider, "auth/kubernetes/login")
        written(token, api.issue("app", "staging", audience="vault"))
        with pytest.raises(ProviderDeniedError):
            provision(provider)
    finally:
        api.stop()


def test_jwt(administrator: Administrator, shell: Shell, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()
    written(administrator.directory / "idp.pem", pem)
    administrator.run(JWT)

    def signed(subject: str) -> str:
        now = int(time.time())
        claims = {"iss": "https://idp.example", "sub": subject, "aud": "vault", "iat": now, "exp": now + 600}
        return jwt.encode(claims, key, algorithm="ES256")

    token = written(tmp_path / "jwt", signed("app"))
    provider = shell.provider(JWT, KRAVN_KMS_VAULT_JWT_FILE=token)
    assert_logs_in(administrator, provider, "auth/jwt/login")
    written(token, signed("another"))
    with pytest.raises(ProviderDeniedError):
        provision(provider)


def test_a_certificate(administrator: Administrator, shell: Shell) -> None:
    authority = administrator.server.authority
    written(administrator.directory / "clients-ca.pem", authority.ca_bundle.read_text())
    administrator.run(CERTIFICATE)
    client, other = authority.issue_client("app.prod.example"), authority.issue_client("another.example")
    actual: dict[str, Any] = {
        "KRAVN_KMS_VAULT_ADDR": administrator.server.tls_address,
        "KRAVN_KMS_VAULT_CA_BUNDLE": authority.ca_bundle,
    }
    provider = shell.provider(
        CERTIFICATE, **actual, KRAVN_KMS_VAULT_CLIENT_CERT=client.certificate, KRAVN_KMS_VAULT_CLIENT_KEY=client.key
    )
    assert_logs_in(administrator, provider, "auth/cert/login")
    foreign = shell.provider(
        CERTIFICATE, **actual, KRAVN_KMS_VAULT_CLIENT_CERT=other.certificate, KRAVN_KMS_VAULT_CLIENT_KEY=other.key
    )
    with pytest.raises(ProviderDeniedError):
        provision(foreign)


# --- The audit log ---------------------------------------------------------------------------------------------------


def test_the_audit_log_names_the_data_key_and_shows_no_secret(administrator: Administrator, tmp_path: Path) -> None:
    log = tmp_path / "audit.log"
    administrator.run(AUDIT, AUDIT_LOG=str(log))
    token = administrator.token("kravn")
    provider = VaultProvider(**administrator.server.settings(token=token))
    key = secrets.token_bytes(32)
    bound = binding("default", DEPLOYMENT_ID, key_id_of(key))
    wrapped: WrappedKey = provider.wrap(key, bound, Deadline(20))
    provider.unwrap(wrapped, bound, Deadline(20))
    text = log.read_text()
    for secret in (token, base64.b64encode(key).decode(), wrapped.blob.decode()):
        assert secret not in text
    asked = [json.loads(line)["request"] for line in text.splitlines() if '"type":"request"' in line]
    named = [(one["path"], one["data"]["associated_data"]) for one in asked if one["path"].endswith("crypt/kravn")]
    shown = base64.b64encode(bound).decode()
    assert named == [("transit/encrypt/kravn", shown), ("transit/decrypt/kravn", shown)]


def test_the_errors_of_the_page_exist() -> None:
    named = set(re.findall(r"`(\w+Error)`", PAGE.read_text(encoding="utf-8")))
    assert len(named) == 3
    assert all(hasattr(exceptions, name) for name in named)
