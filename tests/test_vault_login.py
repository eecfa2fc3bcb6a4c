"""How the Vault provider logs in: with a real OpenBao server, and with servers that misbehave."""

from __future__ import annotations

import base64
import datetime as dt
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sqlalchemy_kravn_crypto.exceptions import (
    CredentialError,
    CredentialExpiredError,
    MasterKeyNotFoundError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderSealedError,
    ProviderUnavailableError,
    SettingsError,
)
from sqlalchemy_kravn_crypto.providers import vault_login
from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey
from sqlalchemy_kravn_crypto.providers.credentials import Credential
from sqlalchemy_kravn_crypto.providers.transport import Route, bounded_session, tls_context
from sqlalchemy_kravn_crypto.providers.vault import VaultProvider
from tests import hostile_server as hostile
from tests.client_certificates import ClientAuthority, ClientFiles
from tests.hostile_server import HostileServer, Listener, Raw, answers
from tests.kubernetes_api import KubernetesAPI
from tests.openbao import OpenBao
from tests.test_transport import GARBAGE, MARK, assert_leaks_nothing, ended_by_the_client

BINDING = b"what the data key belongs to"
ISSUER = "https://idp.example"
PATIENCE = 30.0  # seconds that something may take which is certain to come


@dataclass
class Deployment:
    """A master key of its own on the shared server, and an auth method of its own to log in with.

    :ivar policy: the policy that the role gives.
    :ivar settings: what the provider is configured with, beside the key.
    :ivar held: the secrets that are sent to log in, as they are now.
    """

    server: OpenBao
    method: str
    key: str = field(default_factory=lambda: f"key-{secrets.token_hex(4)}")
    data_key: bytes = field(default_factory=lambda: os.urandom(32))
    settings: dict[str, Any] = field(default_factory=dict)
    held: Callable[[], list[str]] = list
    renew: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.server.create_key(self.key)
        self.policy = self.server.write_policy(self.key)
        self.mount = f"{self.method}-{secrets.token_hex(4)}"

    @property
    def role(self) -> dict[str, Any]:
        """What every role is given: a token that lives a minute, and whose only policy is the deployment's."""
        return {
            "token_policies": self.policy,
            "token_no_default_policy": True,
            "token_type": "batch",
            "token_ttl": "60s",
        }

    def provider(self, **other: Any) -> VaultProvider:
        logins = {"auth": self.method, "auth_mount": self.mount, "token": None, **self.settings}
        return VaultProvider(**self.server.settings(key=self.key, sleep=lambda _: None, **logins | other))

    def wrap(self, **other: Any) -> WrappedKey:
        return self.provider(**other).wrap(self.data_key, BINDING, Deadline(20))

    def refused(self, expected: type[ProviderError], **other: Any) -> str:
        """Check that neither wrapping nor unwrapping is possible, and return what the error says."""
        provider = self.provider(**other)
        wrapped = WrappedKey(f"transit/{self.key}:v1", b"vault:v1:" + base64.b64encode(bytes(60)))
        said = set()
        for operation in (
            lambda: provider.wrap(self.data_key, BINDING, Deadline(20)),
            lambda: provider.unwrap(wrapped, BINDING, Deadline(20)),
        ):
            with pytest.raises(ProviderError) as caught:
                operation()
            assert caught.type is expected, caught.value
            assert caught.value.provider == "vault"
            assert caught.value.__context__ is None
            assert not [secret for secret in self.held() if secret in str(caught.value)]
            said.add(str(caught.value).replace("decrypt", "encrypt"))
        [message] = said
        return message


# --- One deployment for each auth method -----------------------------------------------------------------------------


@pytest.fixture
def token(openbao: OpenBao, tmp_path: Path) -> Deployment:
    deployment = Deployment(openbao, "token")
    path = tmp_path / "token"

    def renew() -> None:
        path.write_text(f"{openbao.issue_token(deployment.key)}\n")

    renew()
    deployment.renew = renew
    deployment.held = lambda: [path.read_text().strip()]
    deployment.settings = {"token": Credential("KRAVN_KMS_VAULT_TOKEN", path=path)}
    return deployment


def new_secret_id(deployment: Deployment, **options: Any) -> str:
    created = deployment.server.write(f"auth/{deployment.mount}/role/app/secret-id", **options)
    return str(created["data"]["secret_id"])


@pytest.fixture
def approle(openbao: OpenBao, tmp_path: Path) -> Deployment:
    deployment = Deployment(openbao, "approle")
    openbao.enable_auth(deployment.mount, "approle")
    role = f"auth/{deployment.mount}/role/app"
    openbao.write(role, **deployment.role)
    path = tmp_path / "secret_id"

    def renew() -> None:
        path.write_text(new_secret_id(deployment))

    renew()
    deployment.renew = renew
    deployment.held = lambda: [path.read_text()]
    deployment.settings = {
        "role_id": openbao.read(f"{role}/role-id")["role_id"],
        "secret_id": Credential("KRAVN_KMS_VAULT_SECRET_ID", path=path),
    }
    return deployment


@pytest.fixture(scope="session")
def kubernetes_api(openbao: OpenBao) -> Iterator[KubernetesAPI]:
    api = KubernetesAPI(openbao.certificate)
    yield api
    api.stop()


@pytest.fixture
def kubernetes(openbao: OpenBao, kubernetes_api: KubernetesAPI, tmp_path: Path) -> Deployment:
    deployment = Deployment(openbao, "kubernetes")
    openbao.enable_auth(deployment.mount, "kubernetes")
    openbao.write(
        f"auth/{deployment.mount}/config",
        kubernetes_host=kubernetes_api.url,
        kubernetes_ca_cert=openbao.authority.ca_bundle.read_text(),
        token_reviewer_jwt=kubernetes_api.reviewer,
    )
    bound = {"bound_service_account_names": "app", "bound_service_account_namespaces": "prod", "audience": "vault"}
    openbao.write(f"auth/{deployment.mount}/role/app", **deployment.role, **bound)
    path = tmp_path / "service-account-token"

    def renew() -> None:
        path.write_text(kubernetes_api.issue("app", "prod"))

    renew()
    deployment.renew = renew
    deployment.held = lambda: [path.read_text()]
    deployment.settings = {"role": "app", "jwt": Credential("KRAVN_KMS_VAULT_JWT", path=path)}
    return deployment


IDENTITY_PROVIDER = ec.generate_private_key(ec.SECP256R1())


def signed(key: ec.EllipticCurvePrivateKey = IDENTITY_PROVIDER, **claims: Any) -> str:
    """Return a JWT of the identity provider that logs in, but for these claims. Those given as None are left out."""
    usual = {"iss": ISSUER, "sub": "app", "aud": "vault", "iat": int(time.time()), "exp": int(time.time()) + 600}
    kept = {name: value for name, value in (usual | claims).items() if value is not None}
    return jwt.encode(kept, key, algorithm="ES256", headers={"kid": "1"})


def public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


@pytest.fixture
def jwt_login(openbao: OpenBao, tmp_path: Path) -> Deployment:
    deployment = Deployment(openbao, "jwt")
    openbao.enable_auth(deployment.mount, "jwt")
    keys = [public_pem(IDENTITY_PROVIDER)]
    openbao.write(f"auth/{deployment.mount}/config", jwt_validation_pubkeys=keys, bound_issuer=ISSUER)
    bound = {"role_type": "jwt", "user_claim": "sub", "bound_subject": "app", "bound_audiences": "vault"}
    openbao.write(f"auth/{deployment.mount}/role/app", **deployment.role, **bound)
    path = tmp_path / "jwt"

    def renew() -> None:
        path.write_text(signed(jti=secrets.token_hex(8)))

    renew()
    deployment.renew = renew
    deployment.held = lambda: [path.read_text()]
    deployment.settings = {"role": "app", "jwt": Credential("KRAVN_KMS_VAULT_JWT", path=path)}
    return deployment


@pytest.fixture
def cert(openbao: OpenBao) -> Deployment:
    deployment = Deployment(openbao, "cert")
    openbao.enable_auth(deployment.mount, "cert")
    name = f"app-{deployment.key}"
    openbao.write(
        f"auth/{deployment.mount}/certs/app",
        certificate=openbao.authority.ca_bundle.read_text(),
        allowed_common_names=name,
        **deployment.role,
    )
    files = openbao.authority.issue_client(name)

    def renew() -> None:
        openbao.authority.issue_client(name)

    deployment.renew = renew
    deployment.settings = {"role": "app", **tls(openbao, files)}
    return deployment


def tls(server: OpenBao, files: ClientFiles | None) -> dict[str, Any]:
    """Return the settings for the listener with TLS."""
    settings: dict[str, Any] = {"address": server.tls_address, "ca_bundle": server.authority.ca_bundle}
    return settings if files is None else {**settings, "client_cert": files.certificate, "client_key": files.key}


METHODS = ["approle", "kubernetes", "jwt", "cert"]


def chosen(request: pytest.FixtureRequest, method: str) -> Deployment:
    deployment: Deployment = request.getfixturevalue("jwt_login" if method == "jwt" else method)
    return deployment


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Deployment:
    return chosen(request, request.param)


@pytest.fixture(params=["token", *METHODS])
def deployment(request: pytest.FixtureRequest) -> Deployment:
    return chosen(request, request.param)


# --- Logging in ------------------------------------------------------------------------------------------------------


def test_a_data_key_comes_back(deployment: Deployment) -> None:
    wrapped = deployment.wrap()
    assert wrapped.master_key == f"transit/{deployment.key}:v1"
    assert deployment.provider().unwrap(wrapped, BINDING, Deadline(20)) == deployment.data_key


def test_one_login_for_each_operation(method: Deployment) -> None:
    provider = method.provider()
    mark = len(method.server.audit_entries())
    wrapped = provider.wrap(method.data_key, BINDING, Deadline(20))
    provider.unwrap(wrapped, BINDING, Deadline(20))
    login, key = f"auth/{method.mount}/login", method.key
    assert method.server.paths_since(mark) == [login, f"transit/encrypt/{key}", login, f"transit/decrypt/{key}"]


def test_a_token_that_is_given_takes_no_login(token: Deployment) -> None:
    mark = len(token.server.audit_entries())
    token.wrap()
    assert token.server.paths_since(mark) == [f"transit/encrypt/{token.key}"]


def test_a_login_carries_no_token_and_its_token_no_other_policy(method: Deployment) -> None:
    mark = len(method.server.audit_entries())
    method.wrap()
    login, encrypt = method.server.audit_entries()[mark:]
    assert "client_token" not in login["request"]
    assert encrypt["auth"]["policies"] == [method.policy]
    assert encrypt["auth"]["token_type"] == "batch"


def test_a_refused_right_takes_one_login_too(method: Deployment) -> None:
    method.server.write(f"sys/policies/acl/{method.policy}", policy=f'path "transit/decrypt/{method.key}" {{}}')
    mark = len(method.server.audit_entries())
    with pytest.raises(ProviderDeniedError):
        method.wrap()
    paths = method.server.paths_since(mark)
    assert paths.count(f"auth/{method.mount}/login") == 1
    assert paths[1:] == [f"transit/encrypt/{method.key}", f"transit/decrypt/{method.key}"]


def test_what_was_renewed_in_its_file_is_taken_up(deployment: Deployment) -> None:
    provider = deployment.provider()
    wrapped = provider.wrap(deployment.data_key, BINDING, Deadline(20))
    before = deployment.held()
    deployment.renew()
    assert not before or deployment.held() != before
    assert provider.unwrap(wrapped, BINDING, Deadline(20)) == deployment.data_key


def test_only_what_was_renewed_still_works(token: Deployment, approle: Deployment, cert: Deployment) -> None:
    """The old one is made invalid, so what was read at the first operation cannot have served for the second."""
    providers = [(one, one.provider()) for one in (token, approle, cert)]
    wrapped = [provider.wrap(one.data_key, BINDING, Deadline(20)) for one, provider in providers]
    token.server.revoke(*token.held())
    [secret_id] = approle.held()
    approle.server.write(f"auth/{approle.mount}/role/app/secret-id/destroy", secret_id=secret_id)
    cert.server.authority.issue_client(f"app-{cert.key}", expires=dt.datetime.now(dt.UTC) - dt.timedelta(hours=1))
    for (_, provider), key in zip(providers, wrapped, strict=True):
        with pytest.raises(CredentialExpiredError):
            provider.unwrap(key, BINDING, Deadline(20))
    for one, _ in providers:
        one.renew()
    for (one, provider), key in zip(providers, wrapped, strict=True):
        assert provider.unwrap(key, BINDING, Deadline(20)) == one.data_key


def test_a_secret_may_be_given_as_text(approle: Deployment, jwt_login: Deployment) -> None:
    approle.wrap(secret_id=approle.held()[0])
    jwt_login.wrap(jwt=jwt_login.held()[0])


def test_threads_may_share_a_provider(approle: Deployment) -> None:
    provider = approle.provider()
    data_keys = [os.urandom(32) for _ in range(12)]

    def there_and_back(data_key: bytes) -> bytes:
        return provider.unwrap(provider.wrap(data_key, data_key, Deadline(60)), data_key, Deadline(60))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(there_and_back, data_keys)) == data_keys


@pytest.mark.parametrize("auth", METHODS)
def test_an_auth_method_is_by_default_at_its_own_name(auth: str, tmp_path: Path) -> None:
    authority = ClientAuthority(tmp_path)
    server = HostileServer(authority.issue("localhost"))
    server.raw = answers(403, {"errors": ["permission denied"]})
    client = authority.issue_client("app")
    try:
        provider = VaultProvider(
            address=f"https://localhost:{server.port}",
            key="kravn",
            ca_bundle=authority.ca_bundle,
            namespace="team/a",
            auth=auth,
            role_id="an-id",
            secret_id="a-secret",
            role="app",
            jwt=signed(),
            client_cert=client.certificate,
            client_key=client.key,
        )
        with pytest.raises(ProviderDeniedError, match=rf"auth/{auth} .*type {auth}"):
            provider.wrap(bytes(32), BINDING, Deadline(20))
        [request] = map(bytes.lower, server.requests)
        assert request.startswith(f"post /v1/auth/{auth}/login http/1.1\r\n".encode())
        assert b"\r\nx-vault-namespace: team/a\r\n" in request
        assert b"x-vault-token" not in request
    finally:
        server.close()


def test_in_a_namespace(openbao: OpenBao) -> None:
    name = f"team-{secrets.token_hex(4)}"
    openbao.create_namespace(name)
    openbao.mount("transit", namespace=name)
    openbao.create_key("kravn", namespace=name)
    policy = openbao.write_policy("kravn", namespace=name)
    openbao.enable_auth("jwt", "jwt", namespace=name)
    openbao.write("auth/jwt/config", namespace=name, jwt_validation_pubkeys=[public_pem(IDENTITY_PROVIDER)])
    role = {"role_type": "jwt", "user_claim": "sub", "bound_subject": "app", "bound_audiences": "vault"}
    openbao.write("auth/jwt/role/app", namespace=name, token_policies=policy, token_no_default_policy=True, **role)
    provider = VaultProvider(**openbao.settings(token=None, namespace=name, auth="jwt", role="app", jwt=signed()))
    wrapped = provider.wrap(bytes(32), BINDING, Deadline(20))
    assert wrapped.master_key == f"{name}/transit/kravn:v1"
    assert provider.unwrap(wrapped, BINDING, Deadline(20)) == bytes(32)


def test_an_engine_in_a_namespace_below_that_of_the_auth_method(approle: Deployment) -> None:
    name = f"team-{secrets.token_hex(4)}"
    approle.server.create_namespace(name)
    approle.server.mount("transit", namespace=name)
    approle.server.create_key(approle.key, namespace=name)
    approle.server.write_policy(approle.key, mount=f"{name}/transit")
    provider = approle.provider(mount=f"{name}/transit")
    wrapped = provider.wrap(approle.data_key, BINDING, Deadline(20))
    assert wrapped.master_key == f"{name}/transit/{approle.key}:v1"
    assert provider.unwrap(wrapped, BINDING, Deadline(20)) == approle.data_key


def test_a_missing_namespace(method: Deployment) -> None:
    with pytest.raises(MasterKeyNotFoundError, match="KRAVN_KMS_VAULT_NAMESPACE"):
        method.wrap(namespace="missing")


def test_a_missing_auth_method(method: Deployment) -> None:
    assert "KRAVN_KMS_VAULT_AUTH_MOUNT" in method.refused(ProviderDeniedError, auth_mount="missing")


def test_a_sealed_server(method: Deployment) -> None:
    provider = method.provider()
    method.server.seal()
    try:
        with pytest.raises(ProviderSealedError):
            provider.wrap(bytes(32), BINDING, Deadline(20))
    finally:
        method.server.unseal()


# --- A token that has expired, and one that is forbidden something ---------------------------------------------------


def test_a_token_that_was_revoked(token: Deployment) -> None:
    token.server.revoke(*token.held())
    message = token.refused(CredentialExpiredError)
    assert "KRAVN_KMS_VAULT_TOKEN" in message
    assert "expired" in message


@pytest.mark.parametrize("value", ["s.never-valid", "hvs.CAESI", "x"])
def test_a_token_that_never_was_valid_is_not_told_from_an_expired_one(token: Deployment, value: str) -> None:
    message = token.refused(CredentialExpiredError, token=value)
    assert "does not tell which" in message
    assert value == "x" or value not in message


@pytest.mark.parametrize("kind", ["service", "batch"])
def test_a_token_that_expires(token: Deployment, kind: str) -> None:
    created = token.server.write(
        "auth/token/create", policies=[token.policy], type=kind, ttl="1s", renewable=False, no_default_policy=True
    )
    provider = token.provider(token=created["auth"]["client_token"])
    end = time.monotonic() + PATIENCE
    expired: CredentialExpiredError | None = None
    while expired is None:
        assert time.monotonic() < end
        try:
            provider.wrap(token.data_key, BINDING, Deadline(20))
        except CredentialExpiredError as error:
            expired = error
    assert "KRAVN_KMS_VAULT_TOKEN" in str(expired)


def test_a_token_that_was_used_up(token: Deployment) -> None:
    created = token.server.write("auth/token/create", policies=[token.policy], num_uses=1, no_default_policy=True)
    value = created["auth"]["client_token"]
    token.wrap(token=value)
    assert "used up" in token.refused(CredentialExpiredError, token=value)


@pytest.mark.parametrize("no_default_policy", [True, False])
def test_a_token_whose_policies_lack_the_right_has_not_expired(token: Deployment, no_default_policy: bool) -> None:  # noqa: FBT001
    other = token.server.write_policy("another")
    created = token.server.write("auth/token/create", policies=[other], no_default_policy=no_default_policy)
    message = token.refused(ProviderDeniedError, token=created["auth"]["client_token"])
    assert f"update on transit/encrypt/{token.key}" in message
    assert "the token in KRAVN_KMS_VAULT_TOKEN" in message


def test_a_role_whose_policies_lack_the_right(method: Deployment) -> None:
    method.server.write(f"sys/policies/acl/{method.policy}", policy='path "transit/encrypt/another" {}')
    message = method.refused(ProviderDeniedError)
    assert f"the token of the login at auth/{method.mount}" in message
    assert f"update on transit/encrypt/{method.key}" in message
    assert "KRAVN_KMS_VAULT_TOKEN" not in message


def test_a_token_that_may_not_be_used_from_here(token: Deployment, approle: Deployment) -> None:
    token.server.write("auth/token/roles/far", allowed_policies=[token.policy], token_bound_cidrs="192.0.2.0/24")
    created = token.server.write("auth/token/create/far", policies=[token.policy])
    assert "from this address" in token.refused(CredentialExpiredError, token=created["auth"]["client_token"])
    role = f"auth/{approle.mount}/role/app"
    approle.server.write(role, token_bound_cidrs="192.0.2.0/24", **approle.role)
    assert "token_bound_cidrs" in approle.refused(CredentialExpiredError)


SAID = {
    "OpenBao, of the token": ("permission denied", CredentialExpiredError),
    "HashiCorp Vault, of the token": (
        "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n",
        CredentialExpiredError,
    ),
    "both, of the policies": ("1 error occurred:\n\t* permission denied\n\n", ProviderDeniedError),
    "an old Vault, of the policies": ("1 error(s) occurred:\n\n* permission denied", ProviderDeniedError),
    "somebody else": ("Forbidden", ProviderDeniedError),
    "nobody": (None, ProviderDeniedError),
}


@pytest.fixture
def server() -> Iterator[HostileServer]:
    running = HostileServer()
    yield running
    running.close()


@pytest.mark.parametrize(("said", "expected"), SAID.values(), ids=SAID)
@pytest.mark.parametrize("status", [401, 403])
def test_what_a_vault_says_of_a_token(
    server: HostileServer, said: str | None, expected: type[ProviderError], status: int
) -> None:
    server.raw = answers(status, {"errors": [] if said is None else [said]})
    provider = VaultProvider(address=server.url, token="s.secret-token", key="kravn")
    with pytest.raises(ProviderDeniedError) as caught:
        provider.unwrap(WrappedKey("transit/kravn:v1", b"vault:v1:AAAA"), BINDING, Deadline(10))
    assert caught.type is (expected if status == 403 else ProviderDeniedError)
    assert "KRAVN_KMS_VAULT_TOKEN" in str(caught.value)
    if said in {None, "Forbidden"}:
        assert "does not say why" in str(caught.value)


def test_the_probe_for_a_missing_key_is_not_made_with_a_bad_token(server: HostileServer) -> None:
    server.raw = answers(403, {"errors": ["permission denied"]})
    with pytest.raises(CredentialExpiredError):
        VaultProvider(address=server.url, token="t", key="kravn").wrap(bytes(32), BINDING, Deadline(10))
    assert len(server.requests) == 1


# --- AppRole ---------------------------------------------------------------------------------------------------------


def test_a_secret_id_that_was_destroyed(approle: Deployment) -> None:
    approle.server.write(f"auth/{approle.mount}/role/app/secret-id/destroy", secret_id=approle.held()[0])
    message = approle.refused(CredentialExpiredError)
    assert "KRAVN_KMS_VAULT_SECRET_ID" in message
    assert "does not tell which" in message


def test_a_secret_id_that_expires(approle: Deployment) -> None:
    provider = approle.provider(secret_id=new_secret_id(approle, ttl="1s"))
    end = time.monotonic() + PATIENCE
    expired = False
    while not expired:
        assert time.monotonic() < end
        try:
            provider.wrap(approle.data_key, BINDING, Deadline(20))
        except CredentialExpiredError:
            expired = True


def test_a_secret_id_that_was_used_up(approle: Deployment) -> None:
    secret_id = new_secret_id(approle, num_uses=1)
    approle.wrap(secret_id=secret_id)
    approle.refused(CredentialExpiredError, secret_id=secret_id)


@pytest.mark.parametrize("wrong", [{"secret_id": "wrong"}, {"role_id": "wrong"}])
def test_a_role_id_or_secret_id_that_never_was_valid(approle: Deployment, wrong: dict[str, str]) -> None:
    message = approle.refused(CredentialExpiredError, **wrong)
    assert "KRAVN_KMS_VAULT_ROLE_ID" in message


def test_a_secret_id_that_is_wrapped_is_none(approle: Deployment) -> None:
    created = approle.server.write(f"auth/{approle.mount}/role/app/secret-id", wrap_ttl="60s")
    approle.refused(CredentialExpiredError, secret_id=created["wrap_info"]["token"])


def test_a_secret_id_that_may_not_be_used_from_here(approle: Deployment) -> None:
    secret_id = new_secret_id(approle, cidr_list="192.0.2.0/24")
    assert "addresses" in approle.refused(ProviderDeniedError, secret_id=secret_id)


# --- JWT -------------------------------------------------------------------------------------------------------------


def refused_before_anything_is_sent(deployment: Deployment, expected: type[ProviderError], **other: Any) -> str:
    mark = len(deployment.server.audit_entries())
    message = deployment.refused(expected, **other)
    assert deployment.server.paths_since(mark) == []
    return message


@pytest.mark.parametrize("auth", ["jwt", "kubernetes"])
@pytest.mark.parametrize("expires", [0, 0.5, 1_700_000_000, 1_700_000_000.75])
def test_a_jwt_that_says_that_it_has_expired_is_not_sent(
    request: pytest.FixtureRequest, auth: str, expires: float
) -> None:
    deployment = chosen(request, auth)
    token = signed(exp=None, iat=None, nbf=None)
    header, _, signature = token.split(".")
    claims = base64.urlsafe_b64encode(json.dumps({"exp": expires}).encode()).rstrip(b"=").decode()
    message = refused_before_anything_is_sent(deployment, CredentialExpiredError, jwt=f"{header}.{claims}.{signature}")
    since = dt.datetime.fromtimestamp(expires, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    assert f"KRAVN_KMS_VAULT_JWT expired at {since}" in message


def test_a_jwt_that_expires_is_refused_from_then_on(jwt_login: Deployment) -> None:
    jwt_login.wrap(jwt=signed(exp=int(time.time()) + 60))
    refused_before_anything_is_sent(jwt_login, CredentialExpiredError, jwt=signed(exp=int(time.time()) - 1))


def test_a_jwt_need_not_expire(jwt_login: Deployment) -> None:
    jwt_login.wrap(jwt=signed(exp=None))


@pytest.mark.parametrize(
    "claims",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"text",
        b"\xff\xfe",
        b"[" * 45_000,
        b'{"exp":null}',
        b'{"exp":"1700000000"}',
        b'{"exp":true}',
        b'{"exp":[]}',
        b'{"exp":-1}',
        b'{"exp":-1e400}',
        b'{"exp":NaN}',
        b'{"exp":' + b"9" * 5000 + b"}",
    ],
)
def test_a_jwt_whose_claims_cannot_be_read_is_not_sent(jwt_login: Deployment, claims: bytes) -> None:
    part = base64.urlsafe_b64encode(claims).rstrip(b"=").decode() or "A"
    message = refused_before_anything_is_sent(jwt_login, CredentialError, jwt=f"e30.{part}.e30")
    assert "KRAVN_KMS_VAULT_JWT" in message
    assert part[:40] not in message or len(part) < 5


@pytest.mark.parametrize("expires", [b"1e400", b"Infinity", b"1e300", b"9" * 400])
def test_whether_a_jwt_may_never_expire_is_for_vault_to_say(jwt_login: Deployment, expires: bytes) -> None:
    part = base64.urlsafe_b64encode(b'{"exp":' + expires + b"}").rstrip(b"=").decode()
    jwt_login.refused(ProviderDeniedError, jwt=f"e30.{part}.e30")


@pytest.mark.parametrize(
    "wrong",
    [
        # Made when it is needed, since it is valid for minutes only.
        lambda: {"jwt": signed(aud="another")},
        lambda: {"jwt": signed(sub="another")},
        lambda: {"jwt": signed(iss="https://another.example")},
        lambda: {"jwt": signed(ec.generate_private_key(ec.SECP256R1()))},
        lambda: {"role": "another"},
    ],
    ids=["audience", "subject", "issuer", "key", "role"],
)
def test_a_jwt_that_the_role_is_not_for(jwt_login: Deployment, wrong: Callable[[], dict[str, str]]) -> None:
    assert "KRAVN_KMS_VAULT_ROLE" in jwt_login.refused(ProviderDeniedError, **wrong())


@pytest.mark.parametrize("said", ["invalid expiration time (exp) claim: token is expired", "Token is expired (exp)"])
@pytest.mark.parametrize("auth", ["jwt", "kubernetes"])
def test_a_jwt_that_has_expired_by_the_clock_of_vault(server: HostileServer, auth: str, said: str) -> None:
    server.raw = answers(400 if auth == "jwt" else 403, {"errors": [f"error validating token: {said}"]})
    provider = VaultProvider(address=server.url, key="kravn", auth=auth, role="app", jwt=signed())
    with pytest.raises(CredentialExpiredError, match="clocks of both"):
        provider.wrap(bytes(32), BINDING, Deadline(10))


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def test_the_token_of_a_pod_that_was_deleted(kubernetes: Deployment, kubernetes_api: KubernetesAPI) -> None:
    kubernetes.wrap()
    kubernetes_api.delete_pods()
    assert "its pod still runs" in kubernetes.refused(ProviderDeniedError)


@pytest.mark.parametrize(
    ("account", "namespace", "audience"),
    [("another", "prod", "vault"), ("app", "another", "vault"), ("app", "prod", "another")],
)
def test_a_service_account_that_the_role_is_not_for(
    kubernetes: Deployment, kubernetes_api: KubernetesAPI, account: str, namespace: str, audience: str
) -> None:
    jwt_of_pod = kubernetes_api.issue(account, namespace, audience=audience)
    assert "KRAVN_KMS_VAULT_ROLE" in kubernetes.refused(ProviderDeniedError, jwt=jwt_of_pod)


def test_vault_may_not_review_tokens(kubernetes: Deployment, kubernetes_api: KubernetesAPI) -> None:
    kubernetes.server.write(
        f"auth/{kubernetes.mount}/config",
        kubernetes_host=kubernetes_api.url,
        kubernetes_ca_cert=kubernetes.server.authority.ca_bundle.read_text(),
        token_reviewer_jwt=kubernetes_api.issue("another", "prod"),
    )
    assert "system:auth-delegator" in kubernetes.refused(ProviderDeniedError)


def test_the_token_of_the_service_account_is_found_by_itself(
    kubernetes: Deployment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert str(vault_login.SERVICE_ACCOUNT_TOKEN) == "/var/run/secrets/kubernetes.io/serviceaccount/token"
    path = tmp_path / "mounted"
    monkeypatch.setattr(vault_login, "SERVICE_ACCOUNT_TOKEN", path)
    provider = kubernetes.provider(jwt=None)
    with pytest.raises(CredentialError, match=str(path)):
        provider.wrap(kubernetes.data_key, BINDING, Deadline(20))
    path.write_text(kubernetes.held()[0])
    provider.wrap(kubernetes.data_key, BINDING, Deadline(20))


# --- TLS client certificates -----------------------------------------------------------------------------------------


def test_any_role_that_fits_the_certificate(cert: Deployment) -> None:
    cert.wrap(role=None)


def test_a_certificate_that_the_role_is_not_for(cert: Deployment) -> None:
    other = cert.server.authority.issue_client("another")
    for role in ("app", None, "missing"):
        files = {"client_cert": other.certificate, "client_key": other.key}
        assert "KRAVN_KMS_VAULT_CLIENT_CERT" in cert.refused(ProviderDeniedError, role=role, **files)


def test_a_certificate_that_has_expired_is_not_shown(cert: Deployment) -> None:
    end = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=5)
    cert.server.authority.issue_client(f"app-{cert.key}", expires=end)
    message = refused_before_anything_is_sent(cert, CredentialExpiredError)
    assert "KRAVN_KMS_VAULT_CLIENT_CERT" in message
    assert f"expired at {end:%Y-%m-%d %H:%M} UTC" in message


def test_a_listener_that_wants_a_certificate_with_any_login(token: Deployment, approle: Deployment) -> None:
    files = token.server.authority.issue_client("any")
    for deployment in (token, approle):
        provider = deployment.provider(**tls(token.server, files))
        wrapped = provider.wrap(deployment.data_key, BINDING, Deadline(20))
        assert provider.unwrap(wrapped, BINDING, Deadline(20)) == deployment.data_key


def test_a_listener_that_is_shown_no_certificate_or_a_foreign_one(token: Deployment, tmp_path: Path) -> None:
    for files in (None, ClientAuthority(tmp_path).issue_client("foreign")):
        message = refused_before_anything_is_sent(token, ProviderDeniedError, **tls(token.server, files))
        assert "KRAVN_KMS_VAULT_CLIENT_CERT and KRAVN_KMS_VAULT_CLIENT_KEY" in message


def test_a_listener_that_takes_the_certificate_for_expired(openbao: OpenBao) -> None:
    """It goes by the clock of the server, so the one that looks at ours first is left out."""
    files = openbao.authority.issue_client("expired", expires=dt.datetime.now(dt.UTC) - dt.timedelta(hours=1))
    context = tls_context(openbao.authority.ca_bundle, "KRAVN_KMS_VAULT_CA_BUNDLE")
    context.load_cert_chain(files.certificate, files.key)
    route = Route(context, client_certificate="KRAVN_KMS_VAULT_CLIENT_CERT")
    with (
        bounded_session(Deadline(20), "vault", route) as session,
        pytest.raises(CredentialExpiredError, match="KRAVN_KMS_VAULT_CLIENT_CERT"),
    ):
        session.post(f"{openbao.tls_address}/v1/auth/cert/login", json={})


def test_what_refuses_the_certificate_is_heard_however_early_it_hangs_up(openbao: OpenBao, tmp_path: Path) -> None:
    """The write of the request fails then, or does not, as it happens; what was said must be read in either case."""
    files = ClientAuthority(tmp_path).issue_client("foreign")
    context = tls_context(openbao.authority.ca_bundle, "KRAVN_KMS_VAULT_CA_BUNDLE")
    context.load_cert_chain(files.certificate, files.key)
    for _ in range(40):
        with (
            bounded_session(Deadline(20), "vault", Route(context)) as session,
            pytest.raises(ProviderDeniedError, match="client certificate"),
        ):
            session.post(f"{openbao.tls_address}/v1/auth/cert/login", json={})


def broken(files: ClientFiles, other: ClientFiles) -> Iterator[tuple[str, Callable[[], object]]]:
    """Return what may be wrong with the files of a certificate, and the setting that has to be named."""
    certificate, key = "KRAVN_KMS_VAULT_CLIENT_CERT", "KRAVN_KMS_VAULT_CLIENT_KEY"
    yield certificate, files.certificate.unlink
    yield certificate, lambda: files.certificate.write_bytes(b"")
    yield certificate, lambda: files.certificate.write_bytes(b"\xff" * 100)
    yield certificate, lambda: files.certificate.write_bytes(files.key.read_bytes())
    yield (
        certificate,
        lambda: files.certificate.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"),
    )
    yield certificate, lambda: files.certificate.write_bytes(b" " * 70_000)
    yield key, files.key.unlink
    yield key, lambda: files.key.write_bytes(b"")
    yield key, lambda: files.key.write_bytes(files.certificate.read_bytes())
    yield key, lambda: files.key.write_bytes(other.key.read_bytes())


@pytest.mark.parametrize("which", range(10))
def test_files_that_are_no_certificate_and_its_key(cert: Deployment, which: int) -> None:
    files = ClientFiles(cert.settings["client_cert"], cert.settings["client_key"])
    setting, spoil = list(broken(files, cert.server.authority.issue_client("another")))[which]
    provider = cert.provider()
    spoil()
    path = cert.settings[setting.removeprefix("KRAVN_KMS_VAULT_").lower()]
    with pytest.raises(CredentialError, match=rf"{setting} names {path}, which cannot be used"):
        provider.wrap(cert.data_key, BINDING, Deadline(20))
    cert.renew()
    provider.wrap(cert.data_key, BINDING, Deadline(20))


def test_a_key_with_a_passphrase_is_refused_and_nobody_asked(cert: Deployment) -> None:
    cert.server.authority.issue_client(f"app-{cert.key}", passphrase="a passphrase")
    assert "passphrase" in refused_before_anything_is_sent(cert, CredentialError)


def test_certificate_and_key_may_be_in_one_file(cert: Deployment, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(cert.settings["client_key"].read_bytes() + cert.settings["client_cert"].read_bytes())
    cert.wrap(client_cert=both, client_key=both)


def test_a_ca_bundle_that_is_gone(cert: Deployment, tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_bytes(cert.server.authority.ca_bundle.read_bytes())
    provider = cert.provider(ca_bundle=bundle)
    bundle.unlink()
    with pytest.raises(CredentialError, match="KRAVN_KMS_VAULT_CA_BUNDLE") as caught:
        provider.wrap(cert.data_key, BINDING, Deadline(20))
    assert caught.value.__context__ is None


# --- Servers that misbehave at the login -----------------------------------------------------------------------------


WRAPS = answers(200, {"data": {"ciphertext": "vault:v1:AAAA"}})


@dataclass
class Victim:
    """A provider that logs in at a server, and sends it the data key only if that went well."""

    provider: VaultProvider
    server: HostileServer
    secret: str
    data_key: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def behave(self, raw: Raw, otherwise: Raw = WRAPS) -> None:
        """Answer a login like this, and anything else as if all were well."""

        def answer(connection: socket.socket, body: bytes) -> None:
            login = b'"secret_id"' in body or b'"jwt"' in body
            (raw if login else otherwise)(connection, body)

        self.server.raw = answer

    def assert_refused(
        self, expected: type[ProviderError], logs: pytest.LogCaptureFixture, *, requests: int = 1, seconds: float = 10
    ) -> str:
        with pytest.raises(ProviderError) as caught:
            self.provider.wrap(self.data_key, BINDING, Deadline(seconds))
        assert isinstance(caught.value, expected)
        assert caught.value.provider == "vault"
        assert_leaks_nothing(caught.value, logs, self.secret.encode(), MARK.encode(), self.data_key)
        sent = b"".join(self.server.requests)
        assert base64.b64encode(self.data_key) not in sent
        assert len(self.server.requests) <= requests
        return str(caught.value)


@pytest.fixture(params=["approle", "jwt"])
def victim(request: pytest.FixtureRequest, server: HostileServer, caplog: pytest.LogCaptureFixture) -> Victim:
    caplog.set_level(logging.DEBUG)
    secret = secrets.token_hex(16) if request.param == "approle" else signed()
    provider = VaultProvider(
        address=server.url,
        key="kravn",
        auth=request.param,
        role_id="an-id",
        secret_id=secret,
        role="app",
        jwt=secret,
        sleep=lambda _: None,
    )
    return Victim(provider, server, secret)


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.close()


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_redirect_is_never_followed(
    victim: Victim, listener: Listener, caplog: pytest.LogCaptureFixture, status: int, scheme: str
) -> None:
    victim.behave(answers(status, MARK.encode(), f"Location: {scheme}://{listener.address}/{MARK}"))
    assert "redirect" in victim.assert_refused(ProviderResponseError, caplog)
    assert not listener.was_contacted()


@pytest.mark.parametrize(
    "raw",
    [hostile.ENDLESS_BODY, hostile.ENDLESS_CHUNKS, hostile.ENDLESS_HEADERS, hostile.GZIP_BOMB],
    ids=["body", "chunks", "headers", "gzip"],
)
def test_an_answer_beyond_the_bounds_is_refused(victim: Victim, caplog: pytest.LogCaptureFixture, raw: Raw) -> None:
    victim.behave(raw)
    victim.assert_refused(ProviderResponseError, caplog)


@pytest.mark.parametrize(
    "raw",
    [hostile.DRIPS_HEADERS, hostile.DRIPS_BODY, hostile.DRIPS_CHUNKS, hostile.is_silent],
    ids=["headers", "body", "chunks", "silence"],
)
def test_the_deadline_ends_a_login_that_does_not(victim: Victim, caplog: pytest.LogCaptureFixture, raw: Raw) -> None:
    victim.behave(raw)
    with ended_by_the_client():
        assert "0.5 seconds" in victim.assert_refused(ProviderUnavailableError, caplog, seconds=0.5)


def test_login_and_operation_share_the_deadline(victim: Victim, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0

    def takes_eleven_seconds(connection: socket.socket, body: bytes) -> None:
        nonlocal now
        now += 11
        answers(200, {"auth": {"client_token": "s.good"}})(connection, body)

    victim.behave(takes_eleven_seconds)
    victim.provider.wrap(victim.data_key, BINDING, Deadline(12, lambda: now))
    assert len(victim.server.requests) == 2
    victim.server.requests.clear()
    now = 0.0
    with pytest.raises(ProviderUnavailableError, match="10 seconds") as caught:
        victim.provider.wrap(victim.data_key, BINDING, Deadline(10, lambda: now))
    assert len(victim.server.requests) == 1
    assert_leaks_nothing(caught.value, caplog, victim.secret.encode(), victim.data_key)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 412, 418, 429, 500, 502, 503])
def test_a_login_that_is_echoed_leaks_nothing(victim: Victim, caplog: pytest.LogCaptureFixture, status: int) -> None:
    victim.behave(hostile.echoes(status))
    victim.assert_refused(ProviderError, caplog, requests=3)


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("status", [200, 400, 403])
def test_garbage(victim: Victim, caplog: pytest.LogCaptureFixture, body: bytes, status: int) -> None:
    victim.behave(answers(status, body))
    victim.assert_refused(ProviderResponseError if status == 200 else ProviderDeniedError, caplog)


@pytest.mark.parametrize(
    "auth",
    [
        None,
        [],
        "text",
        {},
        {"client_token": None},
        {"client_token": ""},
        {"client_token": 1},
        {"client_token": ["s.good"]},
        {"client_token": {"s": "good"}},
        {"client_token": "a b"},
        {"client_token": "a\n"},
        {"client_token": "a\r\nX-Evil: 1"},
        {"client_token": "\u00e4"},
        {"client_token": "a" * 8193},
        {"client_token": "", "mfa_requirement": {"mfa_request_id": MARK}},
    ],
)
def test_a_login_without_a_token_that_can_be_sent(
    victim: Victim, caplog: pytest.LogCaptureFixture, auth: object
) -> None:
    victim.behave(answers(200, {"auth": auth, "data": MARK}))
    assert "with a token" in victim.assert_refused(ProviderResponseError, caplog)


def test_a_wrapped_login_is_no_login(victim: Victim, caplog: pytest.LogCaptureFixture) -> None:
    victim.behave(answers(200, {"auth": None, "wrap_info": {"token": MARK}}))
    victim.assert_refused(ProviderResponseError, caplog)


def test_a_connection_that_is_lost_at_the_login_is_tried_again(
    victim: Victim, caplog: pytest.LogCaptureFixture
) -> None:
    victim.behave(hostile.hangs_up)
    victim.assert_refused(ProviderUnavailableError, caplog, requests=3)
    assert len(victim.server.requests) == 3


def test_no_secret_is_logged_or_shown_when_all_is_well(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    provider = deployment.provider()
    wrapped = provider.wrap(deployment.data_key, BINDING, Deadline(20))
    provider.unwrap(wrapped, BINDING, Deadline(20))
    kept = [secret.encode() for secret in deployment.held()]
    assert_leaks_nothing(ValueError(), caplog, deployment.data_key, *kept)
    shown = f"{provider!r} {provider} {provider._login!r} {vars(provider)}"
    assert not [secret for secret in deployment.held() if secret in shown]


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "settings"),
    [
        ("KRAVN_KMS_VAULT_AUTH", {"auth": "ldap"}),
        ("KRAVN_KMS_VAULT_AUTH", {"auth": ""}),
        ("KRAVN_KMS_VAULT_TOKEN", {}),
        ("KRAVN_KMS_VAULT_TOKEN", {"token": ""}),
        ("KRAVN_KMS_VAULT_TOKEN", {"token": Credential("KRAVN_KMS_VAULT_TOKEN", value="MARKER a")}),
        ("KRAVN_KMS_VAULT_ROLE_ID", {"auth": "approle", "secret_id": "MARKER"}),
        ("KRAVN_KMS_VAULT_ROLE_ID", {"auth": "approle", "secret_id": "MARKER", "role_id": "a b"}),
        ("KRAVN_KMS_VAULT_SECRET_ID", {"auth": "approle", "role_id": "r"}),
        ("KRAVN_KMS_VAULT_SECRET_ID", {"auth": "approle", "role_id": "r", "secret_id": "MARKER\n"}),
        ("KRAVN_KMS_VAULT_ROLE", {"auth": "kubernetes"}),
        ("KRAVN_KMS_VAULT_ROLE", {"auth": "kubernetes", "role": "a/b"}),
        ("KRAVN_KMS_VAULT_ROLE", {"auth": "jwt", "jwt": "a.b.c"}),
        ("KRAVN_KMS_VAULT_JWT", {"auth": "jwt", "role": "r"}),
        ("KRAVN_KMS_VAULT_JWT", {"auth": "jwt", "role": "r", "jwt": "MARKER"}),
        ("KRAVN_KMS_VAULT_JWT", {"auth": "jwt", "role": "r", "jwt": "MARKER.MARKER.MARKER."}),
        ("KRAVN_KMS_VAULT_JWT", {"auth": "kubernetes", "role": "r", "jwt": "MARKER.a+b.c"}),
        ("KRAVN_KMS_VAULT_CLIENT_CERT", {"auth": "cert"}),
        ("KRAVN_KMS_VAULT_CLIENT_KEY", {"auth": "cert", "client_cert": "c"}),
        ("KRAVN_KMS_VAULT_CLIENT_CERT", {"auth": "token", "token": "t", "client_key": "k"}),
        ("KRAVN_KMS_VAULT_ROLE", {"auth": "cert", "client_cert": "c", "client_key": "k", "role": "a b"}),
        (
            "KRAVN_KMS_VAULT_ADDR",
            {"auth": "cert", "client_cert": "c", "client_key": "k", "address": "http://localhost:8200"},
        ),
        *(
            ("KRAVN_KMS_VAULT_AUTH_MOUNT", {"auth": "jwt", "role": "r", "jwt": "a.b.c", "auth_mount": mount})
            for mount in ("", "..", "a/../b", "a//b", "a?b", "a b", "\u00e4")
        ),
    ],
)
def test_settings_that_cannot_log_in(setting: str, settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=setting) as caught:
        VaultProvider(**{"address": "https://vault.example", "key": "kravn", **settings})
    assert "MARKER" not in str(caught.value)


def test_a_file_may_come_later(approle: Deployment, tmp_path: Path) -> None:
    path = tmp_path / "later"
    provider = approle.provider(secret_id=Credential("KRAVN_KMS_VAULT_SECRET_ID", path=path))
    with pytest.raises(CredentialError, match=f"KRAVN_KMS_VAULT_SECRET_ID_FILE names {path}"):
        provider.wrap(approle.data_key, BINDING, Deadline(20))
    path.write_text("two words")
    with pytest.raises(CredentialError, match="KRAVN_KMS_VAULT_SECRET_ID must be") as caught:
        provider.wrap(approle.data_key, BINDING, Deadline(20))
    assert "two words" not in str(caught.value)
    path.write_text(approle.held()[0] + "\n")
    provider.wrap(approle.data_key, BINDING, Deadline(20))


def test_a_login_cannot_be_pickled(deployment: Deployment) -> None:
    with pytest.raises(TypeError, match="secret"):
        deployment.provider()._login.__reduce__()
