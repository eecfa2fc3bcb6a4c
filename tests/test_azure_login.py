"""The ways to log in to Azure: the real SDK with a local server that plays Entra ID, machines and a key vault."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import pickle
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sqlalchemy_kravn_crypto.configuration import provider_of
from sqlalchemy_kravn_crypto.exceptions import (
    CredentialError,
    CredentialExpiredError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
    SettingsError,
)
from sqlalchemy_kravn_crypto.providers.azure import AzureProvider
from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey
from sqlalchemy_kravn_crypto.providers.credentials import Credential
from sqlalchemy_kravn_crypto.providers.proxy import Proxy
from sqlalchemy_kravn_crypto.settings import Settings
from tests import hostile_server as hostile
from tests.azure_identities import ClientCertificate, Issuer, rsa_key
from tests.azure_server import (
    CLIENT_ID,
    IDENTITY_ID,
    LOGIN_HOST,
    METADATA_HOST,
    PRIVATE_LOGIN_HOST,
    PRIVATE_VAULT_HOST,
    TENANT_ID,
    VAULT_HOST,
    Answer,
    AzureVault,
    Request,
    login_refusal,
)
from tests.connect_proxy import ConnectProxy
from tests.hostile_server import Listener, Raw, answers
from tests.test_transport import GARBAGE, MARK, assert_leaks_nothing, ended_by_the_client

DATA_KEY = secrets.token_bytes(32)

APPLICATION_WAYS = ["secret", "secret file", "certificate", "encrypted certificate", "workload"]
MANAGED_WAYS = ["machine", "machine's other", "app service", "app service's other"]
WAYS = APPLICATION_WAYS + MANAGED_WAYS


@pytest.fixture(autouse=True)
def _no_variables_of_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("AZURE_", "IDENTITY_", "IMDS_", "MSI_", "MSAL_")) or name == "REGION_NAME":
            monkeypatch.delenv(name)


@dataclass
class Client:
    """Somebody with a way to log in, set up on both sides."""

    vault: AzureVault
    directory: Path
    monkeypatch: pytest.MonkeyPatch
    issuer: Issuer

    @property
    def secret_file(self) -> Path:
        return self.directory / "secret"

    @property
    def token_file(self) -> Path:
        return self.directory / "token"

    @property
    def certificate_file(self) -> Path:
        return self.directory / "client.pem"

    def certificate(self, **how: Any) -> ClientCertificate:
        """Replace the certificate by one that is registered with the application."""
        made = ClientCertificate(self.certificate_file, **how)
        self.vault.application.certificates.append(made.certificate)
        return made

    def way(self, name: str) -> dict[str, Any]:
        """Return the settings of a way to log in."""
        application = {"tenant_id": TENANT_ID, "client_id": CLIENT_ID}
        match name:
            case "secret":
                return {"auth": "secret", "client_secret": self.vault.client_secret, **application}
            case "secret file":
                self.secret_file.write_text(f"{self.vault.client_secret}\n")
                secret = Credential("KRAVN_KMS_AZURE_CLIENT_SECRET", path=self.secret_file)
                return {"auth": "secret", "client_secret": secret, **application}
            case "certificate":
                self.certificate()
                return {"auth": "certificate", "client_certificate": self.certificate_file, **application}
            case "encrypted certificate":
                self.certificate(password="passphrase")
                password = Credential("KRAVN_KMS_AZURE_CLIENT_CERTIFICATE_PASSWORD", value="passphrase")
                return {
                    "auth": "certificate",
                    "client_certificate": str(self.certificate_file),
                    "client_certificate_password": password,
                    **application,
                }
            case "workload":
                self.token_file.write_text(self.issuer.token())
                token = Credential("KRAVN_KMS_AZURE_FEDERATED_TOKEN", path=self.token_file)
                return {"auth": "workload", "federated_token": token, **application}
        if name.startswith("app service"):
            for variable, value in self.vault.app_service().items():
                self.monkeypatch.setenv(variable, value)
        return {"auth": "managed", "client_id": IDENTITY_ID if name.endswith("other") else None}

    def provider(self, way: str, **other: Any) -> AzureProvider:
        return self.provider_with(**{**self.way(way), **other})

    def provider_with(self, **settings: Any) -> AzureProvider:
        usual = {
            "vault_url": self.vault.url,
            "key": "kravn",
            "ca_bundle": self.vault.ca_bundle,
            "resolve": self.vault.resolve,
            "sleep": lambda _: None,
        }
        return AzureProvider(**{**usual, **settings})

    @property
    def logins(self) -> list[Request]:
        """The requests for a token."""
        return [request for request in self.vault.requests if request.path.endswith("/token")]

    def secrets(self) -> list[bytes]:
        """Return what must be seen by nobody but Azure."""
        read = [path.read_bytes() for path in (self.certificate_file, self.token_file) if path.exists()]
        sent = [request.form.get("client_assertion", "") for request in self.logins]
        texts = [self.vault.client_secret, self.vault.identity_header, "passphrase", *sent, *self.vault.tokens]
        found = [*(text.encode() for text in texts), *(line for content in read for line in content.splitlines())]
        # What is shorter than that is no secret, and may well be a word of a message.
        return [DATA_KEY, MARK.encode(), *(value for value in found if len(value) > 8 and b"-----" not in value)]


@pytest.fixture
def client(azure_vault: AzureVault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    assert azure_vault.application.issuer is not None
    return Client(azure_vault, tmp_path, monkeypatch, azure_vault.application.issuer)


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.close()


def wrap(provider: AzureProvider, seconds: float = 20) -> WrappedKey:
    return provider.wrap(DATA_KEY, b"binding", Deadline(seconds))


def refused(
    client: Client, provider: AzureProvider, logs: pytest.LogCaptureFixture, *, seconds: float = 20
) -> ProviderError:
    """Return the error of an operation, which must have got no further than to the login and gives nothing away."""
    logs.set_level(logging.DEBUG)
    with pytest.raises(ProviderError) as caught:
        wrap(provider, seconds)
    assert caught.value.provider == "azure"
    assert client.vault.count("wrapkey") == 0
    assert_leaks_nothing(caught.value, logs, *client.secrets())
    return caught.value


# --- All is well -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_each_operation_logs_in_once(client: Client, way: str) -> None:
    provider = client.provider(way)
    wrapped = wrap(provider)
    assert len(client.logins) == 1
    assert provider.unwrap(wrapped, b"binding", Deadline(20)) == DATA_KEY
    assert len(client.logins) == 2
    assert (client.vault.count("wrapkey"), client.vault.count("unwrapkey")) == (1, 1)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_secret_is_logged(client: Client, way: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    provider = client.provider(way)
    provider.unwrap(wrap(provider), b"binding", Deadline(20))
    assert [record for record in caplog.records if record.name.startswith(("azure", "msal"))]
    assert_leaks_nothing(ValueError(), caplog, *client.secrets())
    assert len(client.vault.tokens) == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_provider_shows_and_gives_away_nothing(client: Client, way: str) -> None:
    provider = client.provider(way)
    assert repr(provider) == f"<AzureProvider https://{VAULT_HOST}/keys/kravn>"
    for keeper in (provider, provider._login):
        with pytest.raises(TypeError, match="holds a secret"):
            pickle.dumps(keeper)


def test_where_one_logs_in(client: Client) -> None:
    for way in WAYS:
        wrap(client.provider(way))
        for variable in client.vault.app_service():
            client.monkeypatch.delenv(variable, raising=False)
    assert [request.host for request in client.logins] == [
        *[LOGIN_HOST] * 5,
        *[METADATA_HOST] * 2,
        *[f"127.0.0.1:{client.vault.metadata_port}"] * 2,
    ]
    assert [request.query.get("client_id") for request in client.logins][-4:] == [None, IDENTITY_ID] * 2


def test_what_an_application_shows(client: Client) -> None:
    wrap(client.provider("certificate"))
    wrap(client.provider("workload"))
    signed, federated = client.vault.application.assertions
    assert signed.claims["sub"] == CLIENT_ID
    assert signed.claims["exp"] - signed.claims["iat"] == pytest.approx(600)
    assert federated.claims["sub"] == client.issuer.subject
    assert not [request for request in client.logins if "client_secret" in request.form]


def test_a_claims_challenge_is_answered_by_another_login(client: Client) -> None:
    for way in ("secret", "certificate", "workload"):
        client.vault.claims = "acrs"
        provider = client.provider(way)
        before = len(client.logins)
        wrap(provider)
        first, second = client.logins[before:]
        assert "acrs" not in first.form.get("claims", "")
        assert "acrs" in second.form["claims"]


# --- Renewed while the process runs ----------------------------------------------------------------------------------


def test_a_new_client_secret_is_taken_up(client: Client) -> None:
    provider = client.provider("secret file")
    wrap(provider)
    client.vault.application.secret = "the-next-secret"
    with pytest.raises(ProviderDeniedError):
        wrap(provider)
    client.secret_file.write_text("the-next-secret")
    wrap(provider)
    assert [request.form["client_secret"] for request in client.logins][-1] == "the-next-secret"


def test_a_new_certificate_is_taken_up(client: Client) -> None:
    provider = client.provider("certificate")
    wrap(provider)
    client.vault.application.certificates.clear()
    with pytest.raises(ProviderDeniedError):
        wrap(provider)
    client.certificate(name="another")
    wrap(provider)


def test_a_new_federated_token_is_taken_up(client: Client) -> None:
    provider = client.provider("workload")
    wrap(provider)
    client.token_file.write_text(client.issuer.token(lifetime=-1))
    with pytest.raises(CredentialExpiredError):
        wrap(provider)
    renewed = client.issuer.token()
    client.token_file.write_text(renewed)
    wrap(provider)
    assert [request.form["client_assertion"] for request in client.logins][-1] == renewed


def test_the_settings_say_where_the_files_are(client: Client) -> None:
    """The way through configuration.py: only the proxy knows where the hosts really are."""
    client.way("workload")
    client.monkeypatch.setenv("KRAVN_KMS_AZURE_FEDERATED_TOKEN_FILE", str(client.token_file))
    proxy = ConnectProxy({f"{VAULT_HOST}:443": client.vault.port, f"{LOGIN_HOST}:443": client.vault.port})
    try:
        provider = provider_of(
            Settings(
                kms_provider="azure",
                kms_azure_vault_url=client.vault.url,
                kms_azure_key="kravn",
                kms_azure_auth="workload",
                kms_azure_tenant_id=TENANT_ID,
                kms_azure_client_id=CLIENT_ID,
                kms_azure_ca_bundle=client.vault.ca_bundle,
                kms_proxy=proxy.url,
            )
        )
        assert isinstance(provider, AzureProvider)
        wrap(provider)
        client.token_file.write_text(client.issuer.token(lifetime=-1))
        with pytest.raises(CredentialExpiredError):
            wrap(provider)
    finally:
        proxy.close()


# --- What cannot be logged in with -----------------------------------------------------------------------------------


def never_sent(client: Client, provider: AzureProvider, logs: pytest.LogCaptureFixture) -> ProviderError:
    error = refused(client, provider, logs)
    assert client.vault.requests == []
    return error


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"", "it is empty"), (b"\xff", "not UTF-8"), (b"x" * 70_000, "more than 65,536 bytes")],
)
@pytest.mark.parametrize("way", ["secret file", "certificate", "workload"])
def test_a_file_that_cannot_be_used(
    client: Client, way: str, content: bytes | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    provider = client.provider(way)
    path = {"secret file": client.secret_file, "certificate": client.certificate_file, "workload": client.token_file}
    path[way].unlink()
    if content is not None:
        path[way].write_bytes(content)
    error = never_sent(client, provider, caplog)
    assert type(error) is CredentialError
    assert str(path[way]) in str(error)
    assert reason in str(error)


@pytest.mark.parametrize(
    ("way", "content"),
    [
        ("secret file", "two words"),
        ("secret file", "two\nlines"),
        ("secret file", "x" * 1025),
        ("secret file", "schlüssel"),
        ("workload", "no token"),
        ("workload", "a.b"),
        ("workload", "a.b.c.d"),
        ("workload", "a.b.c"),
        ("workload", "a.bm8gSlNPTg.c"),
        ("workload", "a.WzFd.c"),
        ("workload", "a.e30.c"),
        ("workload", "eyJhbGciOiJub25lIn0.e30."),
    ],
)
def test_a_credential_that_is_malformed(
    client: Client, way: str, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    provider = client.provider(way)
    (client.secret_file if way == "secret file" else client.token_file).write_text(content)
    error = never_sent(client, provider, caplog)
    assert type(error) is CredentialError
    setting = "CLIENT_SECRET" if way == "secret file" else "FEDERATED_TOKEN"
    assert f"KRAVN_KMS_AZURE_{setting} must be" in str(error)


def without_certificate(client: Client) -> None:
    client.certificate_file.write_bytes(client.certificate().key_pem)


def without_key(client: Client) -> None:
    client.certificate_file.write_bytes(client.certificate().certificate_pem)


def with_the_key_of_somebody_else(client: Client) -> None:
    theirs = client.certificate(name="another").key_pem
    client.certificate_file.write_bytes(client.certificate().certificate_pem + theirs)


def with_a_broken_certificate(client: Client) -> None:
    text = client.certificate().path.read_text()
    client.certificate_file.write_text(text.replace("MII", "AAA", 1))


def with_a_broken_key(client: Client) -> None:
    made = client.certificate()
    client.certificate_file.write_bytes(made.certificate_pem + made.key_pem.replace(b"MII", b"AAA", 1))


@pytest.mark.parametrize(
    ("make", "password", "reason"),
    [
        (without_certificate, None, "no certificate in it"),
        (with_a_broken_certificate, None, "no certificate in it"),
        (without_key, None, "no private key in it."),
        (with_a_broken_key, None, "no private key in it."),
        (with_the_key_of_somebody_else, None, "not that of its first certificate"),
        (lambda client: client.certificate(elliptic=True), None, "no RSA key"),
        (lambda client: client.certificate(password="passphrase"), None, "_PASSWORD is not set"),
        (lambda client: client.certificate(password="passphrase"), "wrong", "_PASSWORD is wrong"),
        (lambda client: client.certificate(), "passphrase", "_PASSWORD is set"),
    ],
)
def test_a_certificate_that_cannot_be_used(
    client: Client,
    make: Callable[[Client], object],
    password: str | None,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    provider = client.provider("certificate", client_certificate_password=password)
    make(client)
    error = never_sent(client, provider, caplog)
    assert type(error) is CredentialError
    assert f"KRAVN_KMS_AZURE_CLIENT_CERTIFICATE names {client.certificate_file}" in str(error)
    assert reason in str(error)


def test_a_certificate_that_has_expired_is_not_used(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    provider = client.provider("certificate")
    made = client.certificate(expires=-dt.timedelta(seconds=1))
    error = never_sent(client, provider, caplog)
    assert type(error) is CredentialExpiredError
    assert f"expired at {made.certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC" in str(error)


@pytest.mark.parametrize(
    ("expires", "shown"), [(1_700_000_000, "2023-11-14 22:13:20 UTC"), (1.5, "1970"), (-1e300, "1970")]
)
def test_a_federated_token_that_has_expired_is_not_sent(
    client: Client, expires: float, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    provider = client.provider("workload")
    client.token_file.write_text(client.issuer.token(exp=expires))
    error = never_sent(client, provider, caplog)
    assert type(error) is CredentialExpiredError
    assert f"KRAVN_KMS_AZURE_FEDERATED_TOKEN expired at {shown}" in str(error)


@pytest.mark.parametrize("expires", [None, "soon", [], float("nan")])
def test_a_federated_token_without_an_end_is_for_azure_to_judge(
    client: Client, expires: Any, caplog: pytest.LogCaptureFixture
) -> None:
    provider = client.provider("workload")
    client.vault.login_answers.append(login_refusal(700024))
    client.token_file.write_text(client.issuer.token(exp=expires))
    assert type(refused(client, provider, caplog)) is CredentialExpiredError
    assert len(client.logins) == 1


# --- Expired or forbidden --------------------------------------------------------------------------------------------


def test_a_client_secret_that_has_expired(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    error = refused(client, client.provider("secret", client_secret=client.vault.application.expired_secret), caplog)
    assert type(error) is CredentialExpiredError
    assert "KRAVN_KMS_AZURE_CLIENT_SECRET" in str(error)


@pytest.mark.parametrize("code", [700024, 50173])
@pytest.mark.parametrize("way", ["certificate", "workload"])
def test_an_assertion_that_azure_says_is_no_longer_valid(
    client: Client, way: str, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    client.vault.login_answers.append(login_refusal(code))
    error = refused(client, client.provider(way), caplog)
    assert type(error) is CredentialExpiredError
    setting = "CLIENT_CERTIFICATE" if way == "certificate" else "FEDERATED_TOKEN"
    assert f"KRAVN_KMS_AZURE_{setting} is no longer valid" in str(error)


@pytest.mark.parametrize(
    "claims",
    [
        {"sub": "system:serviceaccount:default:another"},
        {"iss": "https://oidc.example/another"},
        {"aud": ["https://kubernetes.default.svc"]},
        {"signer": "another"},
    ],
)
def test_a_federated_token_that_azure_does_not_take(
    client: Client, claims: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    provider = client.provider("workload")
    client.token_file.write_text(client.issuer.token(**claims))
    error = refused(client, provider, caplog)
    assert type(error) is ProviderDeniedError
    assert "federated credential" in str(error)


def test_a_certificate_that_is_not_registered(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    provider = client.provider("certificate")
    client.vault.application.certificates.clear()
    error = refused(client, provider, caplog)
    assert type(error) is ProviderDeniedError
    assert "KRAVN_KMS_AZURE_CLIENT_CERTIFICATE" in str(error)


@pytest.mark.parametrize("way", ["secret", "certificate", "workload"])
@pytest.mark.parametrize("other", [{"client_id": IDENTITY_ID}, {"tenant_id": "another.example"}])
def test_somebody_else(client: Client, way: str, other: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    error = refused(client, client.provider(way, **other), caplog)
    assert type(error) is ProviderDeniedError
    assert "KRAVN_KMS_AZURE_TENANT_ID" in str(error)
    assert "KRAVN_KMS_AZURE_CLIENT_ID" in str(error)


@pytest.mark.parametrize("codes", [None, "7000222", 7000222, ["7000222"], {"7000222": 1}, [[7000222]], [True], []])
def test_error_codes_in_another_form_tell_nothing(client: Client, codes: Any, caplog: pytest.LogCaptureFixture) -> None:
    client.vault.login_answers.append(Answer(401, {"error": "invalid_client", "error_codes": codes}))
    assert type(refused(client, client.provider("workload"), caplog)) is ProviderDeniedError


@pytest.mark.parametrize("way", WAYS)
def test_a_login_that_the_key_vault_does_not_take(client: Client, way: str, caplog: pytest.LogCaptureFixture) -> None:
    client.vault.accepts_tokens = False
    error = refused(client, client.provider(way), caplog)
    assert type(error) is ProviderDeniedError
    assert "does not accept a login that Azure has just given" in str(error)


@pytest.mark.parametrize("way", ["secret", "certificate", "workload", "machine", "app service"])
def test_a_login_that_was_revoked(client: Client, way: str, caplog: pytest.LogCaptureFixture) -> None:
    client.vault.revoked = True
    error = refused(client, client.provider(way), caplog)
    assert type(error) is CredentialExpiredError
    assert "revoked" in str(error)


@pytest.mark.parametrize("way", ["secret", "workload", "machine"])
def test_a_right_that_is_missing(client: Client, way: str) -> None:
    client.vault.denied.add("wrapkey")
    with pytest.raises(ProviderDeniedError, match=r"HTTP 403.*Key Vault Crypto User") as caught:
        wrap(client.provider(way))
    assert caught.type is ProviderDeniedError


# --- Managed identities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", MANAGED_WAYS)
def test_an_identity_that_is_not_there(client: Client, way: str, caplog: pytest.LogCaptureFixture) -> None:
    client.vault.identities = set()
    error = refused(client, client.provider(way), caplog)
    assert type(error) is ProviderDeniedError
    assert "KRAVN_KMS_AZURE_CLIENT_ID" in str(error)


@pytest.mark.parametrize("way", ["machine", "app service"])
@pytest.mark.parametrize(("status", "times"), [(404, 1), (410, 1), (429, 3), (500, 3), (503, 3)])
def test_an_endpoint_that_cannot_serve(
    client: Client, way: str, status: int, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    client.vault.metadata_answers.extend([Answer(status, MARK.encode())] * 9)
    error = refused(client, client.provider(way), caplog)
    assert type(error) is ProviderUnavailableError
    assert f"HTTP {status}" in str(error)
    assert len(client.logins) == times


def test_an_endpoint_that_recovers(client: Client) -> None:
    client.vault.metadata_answers.extend([Answer(429), Answer(500)])
    wrap(client.provider("machine"))
    assert len(client.logins) == 3


def test_a_host_that_is_not_in_azure(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    def resolve(host: str, port: int) -> tuple[str, int]:
        if host == METADATA_HOST:
            raise OSError
        return client.vault.resolve(host, port)

    error = refused(client, client.provider("machine", resolve=resolve), caplog)
    assert type(error) is ProviderUnavailableError
    assert "KRAVN_KMS_AZURE_AUTH" in str(error)


@pytest.mark.parametrize(
    "variable",
    [
        "IDENTITY_SERVER_THUMBPRINT",
        "IMDS_ENDPOINT",
        "MSI_ENDPOINT",
        "AZURE_POD_IDENTITY_AUTHORITY_HOST",
        "AZURE_FEDERATED_TOKEN_FILE",
    ],
)
def test_a_variable_that_leads_to_another_kind_of_host(
    client: Client, variable: str, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    client.monkeypatch.setenv(variable, f"http://{listener.address}")
    error = never_sent(client, client.provider("machine"), caplog)
    assert type(error) is CredentialError
    assert f"{variable} is set" in str(error)
    assert not listener.was_contacted()


@pytest.mark.parametrize("variable", ["IDENTITY_SERVER_THUMBPRINT", "IMDS_ENDPOINT"])
def test_it_is_no_app_service_either(client: Client, variable: str, caplog: pytest.LogCaptureFixture) -> None:
    provider = client.provider("app service")
    client.monkeypatch.setenv(variable, "0" * 40)
    assert f"{variable} is set" in str(never_sent(client, provider, caplog))


@pytest.mark.parametrize("variable", ["MSI_ENDPOINT", "MSI_SECRET"])
def test_app_service_has_variables_of_an_older_kind_beside_its_own(client: Client, variable: str) -> None:
    provider = client.provider("app service")
    client.monkeypatch.setenv(variable, f"{MARK}")
    wrap(provider)


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "http://identity.example/msi/token",
        "http://8.8.8.8/msi/token",
        "http://10.0.0.1/msi/token",
        "https://127.0.0.1/msi/token",
        "http://127.0.0.1",
        "http://127.0.0.1:80@identity.example/msi/token",
        "http://user@127.0.0.1/msi/token",
        "http://127.0.0.1.identity.example/",
        "http://127.0.0.1/msi/token?resource=x",
        "http://127.0.0.1/msi/token\n",
        "http://[fd00::1]/",
        "http://[::1/",
        "http://999.0.0.1/",
    ],
)
def test_an_endpoint_that_is_not_next_to_us(client: Client, endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    provider = client.provider("app service")
    client.monkeypatch.setenv("IDENTITY_ENDPOINT", endpoint)
    error = never_sent(client, provider, caplog)
    assert type(error) is CredentialError
    assert "IDENTITY_ENDPOINT does not begin with http:// and a loopback" in str(error)


@pytest.mark.parametrize("endpoint", ["http://localhost:{}/msi/token", "http://169.254.129.5:8081/msi/token"])
def test_an_endpoint_that_is_next_to_us(client: Client, endpoint: str) -> None:
    asked: list[tuple[str, int]] = []

    def resolve(host: str, port: int) -> tuple[str, int]:
        asked.append((host, port))
        return ("127.0.0.1", client.vault.metadata_port) if port != 443 else client.vault.resolve(host, port)

    provider = client.provider("app service", resolve=resolve)
    client.monkeypatch.setenv("IDENTITY_ENDPOINT", endpoint.format(client.vault.metadata_port))
    wrap(provider)
    assert {host for host, port in asked if port != 443} == {endpoint.split("/")[2].partition(":")[0]}


@pytest.mark.parametrize("header", [None, "", "two words", f"{MARK}\r\nX: y", "x" * 5000])
def test_a_header_that_cannot_be_sent(client: Client, header: str | None, caplog: pytest.LogCaptureFixture) -> None:
    provider = client.provider("app service")
    if header is None:
        client.monkeypatch.delenv("IDENTITY_HEADER")
    else:
        client.monkeypatch.setenv("IDENTITY_HEADER", header)
    error = never_sent(client, provider, caplog)
    assert type(error) is CredentialError
    assert "IDENTITY_HEADER is no header" in str(error)


# --- Which hosts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["secret", "certificate", "workload"])
def test_the_cloud_of_somebody_else(client: Client, way: str) -> None:
    provider = client.provider(
        way, vault_url=f"https://{PRIVATE_VAULT_HOST}", authority=f"https://{PRIVATE_LOGIN_HOST.upper()}/"
    )
    wrapped = wrap(provider)
    assert wrapped.master_key.startswith(f"https://{PRIVATE_VAULT_HOST}/keys/kravn/")
    assert provider.unwrap(wrapped, b"binding", Deadline(20)) == DATA_KEY
    assert {request.host for request in client.logins} == {PRIVATE_LOGIN_HOST}


def test_another_login_service_for_a_known_cloud(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    provider = client.provider("secret", authority=f"https://{PRIVATE_LOGIN_HOST}")
    error = refused(client, provider, caplog)
    assert type(error) is ProviderDeniedError
    assert {request.host for request in client.vault.requests} <= {PRIVATE_LOGIN_HOST, VAULT_HOST}


def test_a_private_key_vault_may_ask_for_tokens_for_itself_only(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.vault.accepts_tokens = False
    client.vault.resource = "https://vault.azure.net"
    provider = client.provider(
        "secret", vault_url=f"https://{PRIVATE_VAULT_HOST}", authority=f"https://{PRIVATE_LOGIN_HOST}"
    )
    assert type(refused(client, provider, caplog)) is ProviderResponseError
    assert not [request for request in client.logins if "vault.azure.net" in request.form["scope"]]


@pytest.mark.parametrize(
    "authority",
    [
        "",
        "login.stack.example",
        "http://login.stack.example",
        "https://login.stack.example:443",
        "https://login.stack.example/adfs",
        "https://login.stack.example?x",
        "https://user@login.stack.example",
        "https://login.stack.example\n",
        "https://login",
        "https://login..example",
        "https://.example",
        "https://login.example.",
        "https://login_1.example",
        "https://-login.example",
        "https://127.0.0.1",
        "https://[::1]",
        f"https://{'a' * 64}.example",
        f"https://{'a.' * 124}example",
    ],
)
def test_what_is_no_authority(client: Client, authority: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_AZURE_AUTHORITY"):
        client.provider("secret", authority=authority)
    if authority:
        with pytest.raises(SettingsError, match="KRAVN_KMS_AZURE_VAULT_URL"):
            client.provider("secret", vault_url=authority, authority=f"https://{PRIVATE_LOGIN_HOST}")


def test_without_an_authority_only_known_clouds(client: Client) -> None:
    with pytest.raises(SettingsError, match="Unless KRAVN_KMS_AZURE_AUTHORITY is set"):
        client.provider("secret", vault_url=f"https://{PRIVATE_VAULT_HOST}")


@pytest.mark.parametrize("way", ["secret", "certificate", "workload"])
def test_the_variables_of_other_programs_are_not_read(client: Client, way: str, listener: Listener) -> None:
    for variable in ("AZURE_AUTHORITY_HOST", "AZURE_KUBERNETES_TOKEN_PROXY", "IDENTITY_ENDPOINT", "MSI_ENDPOINT"):
        client.monkeypatch.setenv(variable, f"https://{listener.address}")
    for variable in ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "AZURE_FEDERATED_TOKEN_FILE"):
        client.monkeypatch.setenv(variable, "another")
    wrap(client.provider(way))
    assert not listener.was_contacted()


@pytest.mark.parametrize("variable", ["AZURE_REGIONAL_AUTHORITY_NAME", "MSAL_FORCE_REGION"])
@pytest.mark.parametrize("way", ["secret", "certificate"])
def test_nobody_is_led_to_a_region(client: Client, way: str, variable: str, caplog: pytest.LogCaptureFixture) -> None:
    client.monkeypatch.setenv(variable, "westeurope")
    error = refused(client, client.provider(way), caplog)
    assert type(error) is ProviderResponseError
    assert variable in str(error)
    assert {request.host for request in client.vault.requests} <= {LOGIN_HOST, VAULT_HOST}
    assert client.logins == []


def test_nobody_asks_the_machine_for_its_region(client: Client) -> None:
    client.monkeypatch.setenv("AZURE_REGIONAL_AUTHORITY_NAME", "tryautodetect")
    wrap(client.provider("secret"))
    assert {request.host for request in client.vault.requests} == {LOGIN_HOST, VAULT_HOST}


@pytest.mark.parametrize(
    ("way", "hosts"),
    [
        ("secret", {VAULT_HOST, LOGIN_HOST}),
        ("certificate", {VAULT_HOST, LOGIN_HOST}),
        ("workload", {VAULT_HOST, LOGIN_HOST}),
        ("machine", {VAULT_HOST}),
        ("app service", {VAULT_HOST}),
    ],
)
def test_what_goes_through_a_proxy(client: Client, way: str, hosts: set[str]) -> None:
    proxy = ConnectProxy({f"{host}:443": client.vault.port for host in (VAULT_HOST, LOGIN_HOST)})
    try:
        wrap(client.provider(way, proxy=Proxy("127.0.0.1", proxy.port)))
        assert {request.split()[1] for request in proxy.requests} == {f"{host}:443" for host in hosts}
        assert len(client.logins) == 1
    finally:
        proxy.close()


# --- Who answers the login misbehaves --------------------------------------------------------------------------------

HOSTILE_WAYS = ["secret", "certificate", "workload", "machine", "app service"]


def misbehave(client: Client, raw: Raw) -> None:
    client.vault.login_raw = client.vault.metadata_raw = raw


def on_token(client: Client, raw: Raw) -> None:
    """Misbehave when a token is asked for, and tell truthfully before where to ask for one."""
    base = f"https://{LOGIN_HOST}/{TENANT_ID}"
    found = {"issuer": base, "token_endpoint": f"{base}/token", "authorization_endpoint": f"{base}/authorize"}

    def login(connection: socket.socket, body: bytes) -> None:
        (raw if body else answers(200, found))(connection, body)

    client.vault.login_raw, client.vault.metadata_raw = login, raw


@pytest.mark.parametrize("when", [misbehave, on_token])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("way", HOSTILE_WAYS)
def test_a_redirect_is_not_followed(
    client: Client,
    way: str,
    status: int,
    when: Callable[[Client, Raw], None],
    listener: Listener,
    caplog: pytest.LogCaptureFixture,
) -> None:
    when(client, answers(status, MARK.encode(), f"Location: http://{listener.address}/{MARK}"))
    error = refused(client, client.provider(way), caplog)
    assert type(error) is ProviderResponseError
    assert "redirect" in str(error)
    assert not listener.was_contacted()


@pytest.mark.parametrize("raw", [hostile.ENDLESS_BODY, hostile.ENDLESS_HEADERS, hostile.GZIP_BOMB])
@pytest.mark.parametrize("way", HOSTILE_WAYS)
def test_too_much_is_refused(client: Client, way: str, raw: Raw, caplog: pytest.LogCaptureFixture) -> None:
    on_token(client, raw)
    assert type(refused(client, client.provider(way), caplog)) is ProviderResponseError


@pytest.mark.parametrize("raw", [hostile.DRIPS_BODY, hostile.DRIPS_HEADERS, hostile.is_silent])
@pytest.mark.parametrize("way", HOSTILE_WAYS)
def test_the_deadline_holds_for_the_login(client: Client, way: str, raw: Raw, caplog: pytest.LogCaptureFixture) -> None:
    on_token(client, raw)
    with ended_by_the_client():
        error = refused(client, client.provider(way), caplog, seconds=0.5)
    assert type(error) is ProviderUnavailableError


@pytest.mark.parametrize("status", [200, 400, 401, 403, 500])
@pytest.mark.parametrize("way", HOSTILE_WAYS)
def test_what_is_echoed_goes_no_further(
    client: Client, way: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    def raw(connection: socket.socket, body: bytes) -> None:
        said = f"{body.decode()} {client.vault.identity_header} {MARK}"
        echo = {"error": said, "error_description": said, "message": said, "access_token": said, "token_type": said}
        answers(status, echo)(connection, body)

    on_token(client, raw)
    refused(client, client.provider(way), caplog)


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("way", HOSTILE_WAYS)
def test_garbage_is_refused(
    client: Client, way: str, status: int, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    on_token(client, answers(status, body))
    error = refused(client, client.provider(way), caplog)
    assert type(error) is (ProviderResponseError if status == 200 else ProviderDeniedError)


TOKEN = "granted-" + secrets.token_hex(16)
GOOD = {"access_token": TOKEN, "token_type": "Bearer", "expires_in": "3600", "expires_on": "9999999999"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"access_token": None},
        {"access_token": ""},
        {"access_token": ["a"]},
        {"access_token": f"a\r\nX: {MARK}"},
        {"access_token": f"a {MARK}"},
        {"access_token": "ä"},
        {"access_token": "a" * 40_000},
        {"token_type": MARK},
        {"token_type": None},
        {"expires_in": MARK, "expires_on": MARK},
        {"expires_in": None, "expires_on": None},
        {"expires_in": -1, "expires_on": -1},
        {"expires_in": 1.5, "expires_on": 1.5},
        {"expires_in": [1], "expires_on": [1]},
        {"expires_in": 10**40, "expires_on": 10**40},
        {"expires_in": True, "expires_on": True},
    ],
)
@pytest.mark.parametrize("way", HOSTILE_WAYS)
def test_a_token_in_another_form_is_refused(
    client: Client, way: str, wrong: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    on_token(client, answers(200, {**GOOD, **wrong}))
    assert type(refused(client, client.provider(way), caplog)) is ProviderResponseError


@pytest.mark.parametrize("way", HOSTILE_WAYS)
def test_what_is_not_needed_of_an_answer_reaches_nobody(
    client: Client, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The SDK would log some of it, and fail at the rest with a part of it in the exception."""
    caplog.set_level(logging.DEBUG)
    more = {"id_token": MARK, "client_info": MARK, "refresh_in": MARK, "scope": MARK, "foci": [MARK], MARK: MARK}

    def raw(connection: socket.socket, body: bytes) -> None:
        echo = {"echo": body.decode(), "header": client.vault.identity_header}
        answers(200, {**GOOD, **more, **echo}, f"X-Echo: {MARK}")(connection, body)

    client.vault.tokens[TOKEN] = ""
    on_token(client, raw)
    wrap(client.provider(way))
    assert_leaks_nothing(ValueError(), caplog, *client.secrets())


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_endpoint": "https://login.example/t/token"},
        {"token_endpoint": f"https://{LOGIN_HOST}.example/t/token"},
        {"token_endpoint": f"https://{LOGIN_HOST}@login.example/t/token"},
        {"token_endpoint": f"http://{LOGIN_HOST}/t/token"},
        {"token_endpoint": f"https://{LOGIN_HOST}//{MARK}"},
        {"token_endpoint": f"https://{LOGIN_HOST}/t/token?{MARK}"},
        {"token_endpoint": f"https://{LOGIN_HOST}"},
        {"token_endpoint": [MARK]},
        {"token_endpoint": None},
        {"issuer": None},
        {"authorization_endpoint": 1},
    ],
)
@pytest.mark.parametrize("way", ["secret", "certificate"])
def test_a_login_service_that_names_somebody_else(
    client: Client, way: str, wrong: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    base = f"https://{LOGIN_HOST}/{TENANT_ID}"
    found = {"issuer": base, "token_endpoint": f"{base}/token", "authorization_endpoint": f"{base}/authorize"}
    client.vault.login_answers.append(Answer(200, {**found, **wrong}))
    error = refused(client, client.provider(way), caplog)
    assert type(error) is ProviderResponseError
    assert client.logins == []


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["", "Secret", "token", "default", "managed "])
def test_a_way_that_does_not_exist(client: Client, auth: str) -> None:
    with pytest.raises(
        SettingsError, match="KRAVN_KMS_AZURE_AUTH must be one of secret, certificate, workload, managed"
    ):
        client.provider("secret", auth=auth)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("secret", "tenant_id"),
        ("secret", "client_id"),
        ("secret", "client_secret"),
        ("certificate", "tenant_id"),
        ("certificate", "client_id"),
        ("certificate", "client_certificate"),
        ("workload", "tenant_id"),
        ("workload", "client_id"),
        ("workload", "federated_token"),
    ],
)
def test_a_setting_that_is_missing(client: Client, way: str, name: str) -> None:
    with pytest.raises(SettingsError, match=f"KRAVN_KMS_AZURE_{name.upper()} must be"):
        client.provider(way, **{name: None})


def test_settings_that_are_malformed(client: Client) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_AZURE_CLIENT_ID"):
        client.provider("machine", client_id="a b")
    with pytest.raises(SettingsError, match="KRAVN_KMS_AZURE_FEDERATED_TOKEN must be a signed JWT") as caught:
        client.provider("workload", federated_token=f"{MARK} {MARK}")
    assert MARK not in str(caught.value)


@pytest.mark.parametrize("way", ["secret file", "workload"])
def test_a_file_is_looked_at_when_there_is_one(client: Client, way: str) -> None:
    settings = client.way(way)
    path = client.secret_file if way == "secret file" else client.token_file
    good = path.read_text()
    path.write_text(f"{MARK} {MARK}")
    with pytest.raises(SettingsError, match="must be") as caught:
        client.provider_with(**settings)
    assert MARK not in str(caught.value)
    path.unlink()
    provider = client.provider_with(**settings)
    path.write_text(good)
    wrap(provider)


def test_secrets_may_be_given_as_text(client: Client) -> None:
    wrap(client.provider("workload", federated_token=client.issuer.token()))
    wrap(client.provider("encrypted certificate", client_certificate_password="passphrase"))


# --- The page --------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "kms-azure.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", [text for language, text in BLOCKS if language == "ini"])
def test_the_settings_on_the_page_are_whole(client: Client, block: str) -> None:
    examples = {"/run/secrets/azure-client-secret": client.vault.client_secret}
    for name, value in (line.split("=", 1) for line in block.splitlines()):
        filled = re.sub("<[^>]+>", "x", value)
        if name.endswith("_FILE"):
            path = client.directory / name
            path.write_text(examples.get(value, client.issuer.token()))
            filled = str(path)
        client.monkeypatch.setenv(name, filled)
    settings = Settings.from_environment()
    assert isinstance(provider_of(settings), AzureProvider)


def test_the_page_has_the_settings_of_every_way() -> None:
    ways = re.findall("KRAVN_KMS_AZURE_AUTH=(.*)", PAGE)
    assert sorted(ways) == ["certificate", "managed", "workload"]
    assert len([language for language, _ in BLOCKS if language == "ini"]) == 5


@pytest.mark.parametrize("block", [text for language, text in BLOCKS if language == "sh"])
def test_the_commands_on_the_page_are_shell(block: str) -> None:
    shell = shutil.which("sh")
    assert shell is not None
    checked = subprocess.run([shell, "-n"], input=block, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_role_on_the_page_is_what_the_provider_uses(client: Client) -> None:
    role = json.loads(next(text for _, text in BLOCKS if "DataActions" in text).split("EOF")[1].strip(" \n<"))
    actions = {action.removesuffix("/action").rpartition("/")[2] for action in role["DataActions"]}
    provider = client.provider("secret")
    provider.unwrap(wrap(provider), b"binding", Deadline(20))
    done = [request for request in client.vault.requests if request.host == VAULT_HOST and request.authorised]
    assert {request.path.rpartition("/")[2].removesuffix("key") for request in done} == actions


def test_the_server_checks_what_it_is_shown(client: Client) -> None:
    """Else the tests above would prove nothing."""
    application = client.vault.application
    form = {
        "client_id": CLIENT_ID,
        "client_assertion": client.issuer.token(signer="another"),
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    }
    assert rsa_key("issuer") is not rsa_key("another")
    assert application.refusal(form, "") == 5000221
    assert application.refusal({**form, "client_assertion": client.issuer.token(lifetime=-1)}, "") == 700024
    assert application.refusal({**form, "client_assertion": client.issuer.token()}, "") == 0
    assert json.loads(json.dumps(application.assertions[-1].claims))["sub"] == client.issuer.subject
