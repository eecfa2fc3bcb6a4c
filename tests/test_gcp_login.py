"""How the Google provider logs in: every kind of credentials, where they are from, and services that misbehave."""

from __future__ import annotations

import json
import logging
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote

import jwt
import pytest
from requests.adapters import HTTPAdapter

from sqlalchemy_kravn_crypto.exceptions import (
    CredentialError,
    CredentialExpiredError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
)
from sqlalchemy_kravn_crypto.providers.base import Deadline
from sqlalchemy_kravn_crypto.providers.credentials import Credential
from sqlalchemy_kravn_crypto.providers.gcp import GcpProvider
from tests import hostile_server as hostile
from tests.gcp_server import ACCOUNT, METADATA_HOST, SCOPE, Answer, CloudKms
from tests.hostile_server import Listener, Raw, answers, http_answer, sends
from tests.test_transport import assert_leaks_nothing

E = TypeVar("E", bound=ProviderError)

DATA_KEY = secrets.token_bytes(32)
MARK = "text-of-the-answer-5b0e7c1f9ad24386"  # in the names of tests, which all workers must have alike
SETTING = "KRAVN_KMS_GCP_CREDENTIALS"


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.close()


def provider(gcp_kms: CloudKms, credentials: str | Credential | None, **other: Any) -> GcpProvider:
    return GcpProvider(**gcp_kms.settings(credentials=credentials, **{"sleep": lambda _: None, **other}))


def wrap(gcp_kms: CloudKms, credentials: str | Credential | None, **other: Any) -> None:
    provider(gcp_kms, credentials, **other).wrap(DATA_KEY, b"binding", Deadline(20))


def asked(gcp_kms: CloudKms) -> list[tuple[str, str]]:
    """Return which hosts the logins were at, and what they asked for."""
    return [(request.host, request.path) for request in gcp_kms.requests]


STS = ("sts.googleapis.com", "/v1/token")
OAUTH = ("oauth2.googleapis.com", "/token")
IMPERSONATION = ("iamcredentials.googleapis.com", f"/v1/projects/-/serviceAccounts/{ACCOUNT}:generateAccessToken")
MACHINE = (METADATA_HOST, "/computeMetadata/v1/instance/service-accounts/default/token")


# --- A service account -----------------------------------------------------------------------------------------------


def test_a_service_account_signs_its_own_token(gcp_kms: CloudKms) -> None:
    wrap(gcp_kms, gcp_kms.service_account.text)
    assert gcp_kms.requests == []
    claims = jwt.decode(gcp_kms.calls[0].token, options={"verify_signature": False})
    assert (claims["iss"], claims["sub"], claims["scope"]) == (ACCOUNT, ACCOUNT, SCOPE)
    assert claims["exp"] - claims["iat"] == 3600


def test_credentials_are_read_anew_for_each_operation(gcp_kms: CloudKms, tmp_path: Path) -> None:
    file = tmp_path / "credentials.json"
    file.write_text(json.dumps({**gcp_kms.service_account.info, "client_email": "another@example.com"}))
    it = provider(gcp_kms, Credential(SETTING, path=file))
    with pytest.raises(CredentialExpiredError):
        it.wrap(DATA_KEY, b"", Deadline(20))
    file.write_text(gcp_kms.service_account.text)
    it.wrap(DATA_KEY, b"", Deadline(20))
    file.unlink()
    with pytest.raises(CredentialError, match=f"{SETTING}_FILE"):
        it.wrap(DATA_KEY, b"", Deadline(20))


def test_every_operation_logs_in(gcp_kms: CloudKms) -> None:
    it = provider(gcp_kms, json.dumps(gcp_kms.user))
    it.wrap(DATA_KEY, b"", Deadline(20))
    it.wrap(DATA_KEY, b"", Deadline(20))
    assert asked(gcp_kms) == [OAUTH, OAUTH]
    assert gcp_kms.calls[0].token != gcp_kms.calls[1].token


# --- The default credentials -----------------------------------------------------------------------------------------


def test_the_machine_has_credentials(gcp_kms: CloudKms) -> None:
    wrap(gcp_kms, None)
    assert asked(gcp_kms) == [MACHINE]
    assert unquote(gcp_kms.requests[0].query) == f"scopes={SCOPE}"
    assert gcp_kms.calls[0].token in gcp_kms.tokens


def test_a_file_that_the_environment_names_goes_before(
    gcp_kms: CloudKms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "adc.json"
    file.write_text(gcp_kms.service_account.text)
    of_gcloud(tmp_path, gcp_kms.user)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    wrap(gcp_kms, None)
    assert gcp_kms.requests == []


def test_the_setting_goes_before_both(gcp_kms: CloudKms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere")
    wrap(gcp_kms, gcp_kms.service_account.text)


def of_gcloud(directory: Path, info: dict[str, Any]) -> None:
    (directory / "gcloud").mkdir()
    (directory / "gcloud" / "application_default_credentials.json").write_text(json.dumps(info))


def test_what_gcloud_left_goes_before_the_machine(gcp_kms: CloudKms, tmp_path: Path) -> None:
    of_gcloud(tmp_path, gcp_kms.user)
    wrap(gcp_kms, None)
    assert asked(gcp_kms) == [OAUTH]


def test_gcloud_has_a_directory_of_its_own(gcp_kms: CloudKms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".config").mkdir()
    of_gcloud(tmp_path / ".config", gcp_kms.user)
    monkeypatch.delenv("CLOUDSDK_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    wrap(gcp_kms, None)
    assert asked(gcp_kms) == [OAUTH]


@pytest.mark.parametrize("content", [None, "", "x" * 70_000])
def test_a_file_that_the_environment_names_wrongly(
    gcp_kms: CloudKms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "adc.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    with pytest.raises(CredentialError, match="GOOGLE_APPLICATION_CREDENTIALS") as caught:
        wrap(gcp_kms, None)
    assert str(file) in str(caught.value)
    assert gcp_kms.requests == []


def test_nothing_to_log_in_with(gcp_kms: CloudKms) -> None:
    def resolve(host: str, port: int) -> tuple[str, int]:
        if host == METADATA_HOST:
            raise socket.gaierror
        return gcp_kms.resolve(host, port)

    with pytest.raises(CredentialError, match=f"{SETTING} is not set") as caught:
        wrap(gcp_kms, None, resolve=resolve)
    assert caught.value.provider == "gcp"
    assert caught.value.__context__ is None


def test_a_machine_without_a_service_account(gcp_kms: CloudKms) -> None:
    gcp_kms.runs_as_service_account = False
    with pytest.raises(CredentialError, match="runs as none"):
        wrap(gcp_kms, None)


def test_somebody_else_who_answers_for_the_metadata_server(gcp_kms: CloudKms) -> None:
    gcp_kms.login_answers.append(Answer(200, {"access_token": "t", "expires_in": 1, "token_type": "Bearer"}))
    with pytest.raises(ProviderResponseError):
        wrap(gcp_kms, None)
    assert gcp_kms.calls == []


# --- Credentials that are exchanged ----------------------------------------------------------------------------------


def test_a_user_of_gcloud(gcp_kms: CloudKms) -> None:
    wrap(gcp_kms, json.dumps(gcp_kms.user))
    assert gcp_kms.requests[0].form["grant_type"] == "refresh_token"
    assert "scope" not in gcp_kms.requests[0].form
    assert gcp_kms.calls[0].metadata["x-goog-user-project"] == "kravn-test"


def test_a_token_of_somebody_else_in_a_file(gcp_kms: CloudKms, tmp_path: Path) -> None:
    file = tmp_path / "token"
    [token] = gcp_kms.subject_tokens
    file.write_text(token)
    wrap(gcp_kms, gcp_kms.external_account({"file": str(file)}))
    assert asked(gcp_kms) == [STS]
    assert gcp_kms.requests[0].form["scope"] == SCOPE


def test_a_token_in_a_file_is_read_anew(gcp_kms: CloudKms, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("an expired one")
    it = provider(gcp_kms, gcp_kms.external_account({"file": str(file)}))
    with pytest.raises(CredentialExpiredError, match="expired"):
        it.wrap(DATA_KEY, b"", Deadline(20))
    file.write_text(next(iter(gcp_kms.subject_tokens)))
    it.wrap(DATA_KEY, b"", Deadline(20))


@pytest.mark.parametrize("url", ["https://tokens.example/token", "http://169.254.169.254/token"])
def test_a_token_of_somebody_else_at_an_address(gcp_kms: CloudKms, url: str) -> None:
    form = {"type": "json", "subject_token_field_name": "value"}
    source = {"url": url, "headers": {"Metadata": "True"}, "format": form}
    wrap(gcp_kms, gcp_kms.external_account(source))
    assert asked(gcp_kms) == [(url.split("/")[2], "/token"), STS]
    assert gcp_kms.requests[0].headers["metadata"] == "True"


AWS = {
    "environment_id": "aws1",
    "region_url": "http://169.254.169.254/latest/meta-data/placement/availability-zone",
    "url": "http://169.254.169.254/latest/meta-data/iam/security-credentials",
    "imdsv2_session_token_url": "http://169.254.169.254/latest/api/token",
    "regional_cred_verification_url": "https://sts.{region}.amazonaws.com?Action=GetCallerIdentity&Version=2011-06-15",
}
OF_AWS = {"subject_token_type": "urn:ietf:params:aws:token-type:aws4_request"}


def test_a_workload_on_aws(gcp_kms: CloudKms, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    role = {"AccessKeyId": "AKIAEXAMPLE", "SecretAccessKey": secrets.token_hex(20), "Token": "session"}
    gcp_kms.login_answers.extend(
        [
            Answer(200, b"session-of-imds"),
            Answer(200, b"eu-central-1b"),
            Answer(200, b"session-of-imds"),
            Answer(200, b"the-role"),
            Answer(200, role),
        ]
    )
    wrap(gcp_kms, gcp_kms.external_account(AWS, **OF_AWS))
    assert {request.host for request in gcp_kms.requests[:-1]} == {"169.254.169.254"}
    signed = json.loads(unquote(gcp_kms.requests[-1].form["subject_token"]))
    assert signed["url"].startswith("https://sts.eu-central-1.amazonaws.com")
    assert role["SecretAccessKey"] not in json.dumps(signed)


@pytest.mark.parametrize("kind", ["external", "service account", "user"])
def test_a_service_account_that_is_impersonated(gcp_kms: CloudKms, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "token"
    file.write_text(next(iter(gcp_kms.subject_tokens)))
    url = f"https://{IMPERSONATION[0]}{IMPERSONATION[1]}"
    impersonated = {"type": "impersonated_service_account", "service_account_impersonation_url": url, "delegates": []}
    credentials, first = {
        "external": (gcp_kms.external_account({"file": str(file)}, service_account_impersonation_url=url), STS),
        "service account": (
            json.dumps({**impersonated, "source_credentials": gcp_kms.service_account.info}),
            OAUTH,
        ),
        "user": (json.dumps({**impersonated, "source_credentials": gcp_kms.user}), OAUTH),
    }[kind]
    wrap(gcp_kms, credentials)
    assert asked(gcp_kms) == [first, IMPERSONATION]


# --- Credentials that are refused ------------------------------------------------------------------------------------


def refused(gcp_kms: CloudKms, credentials: str, expected: type[E]) -> E:
    with pytest.raises(expected) as caught:
        wrap(gcp_kms, credentials)
    assert caught.type is expected
    assert caught.value.provider == "gcp"
    assert caught.value.__context__ is None
    assert gcp_kms.calls == []
    return caught.value


def test_a_program_is_not_run_for_a_token(gcp_kms: CloudKms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_EXTERNAL_ACCOUNT_ALLOW_EXECUTABLES", "1")
    source = {"executable": {"command": f"touch {tmp_path}/ran", "timeout_millis": 5000}}
    assert "program" in str(refused(gcp_kms, gcp_kms.external_account(source), CredentialError))
    assert not (tmp_path / "ran").exists()


def test_a_client_certificate_is_not_shown(gcp_kms: CloudKms, tmp_path: Path) -> None:
    """It would not be: the bounded session has none, so that the exchange could not succeed."""
    pem = gcp_kms.authority.issue("workload.example")
    config = tmp_path / "certificate_config.json"
    config.write_text(json.dumps({"cert_configs": {"workload": {"cert_path": str(pem), "key_path": str(pem)}}}))
    source = {"certificate": {"certificate_config_location": str(config)}}
    credentials = gcp_kms.external_account(source, subject_token_type="urn:ietf:params:oauth:token-type:mtls")
    assert "certificates" in str(refused(gcp_kms, credentials, CredentialError))
    assert gcp_kms.requests == []


MALFORMED: dict[str, Callable[[CloudKms], Any]] = {
    "two sources": lambda kms: json.loads(kms.external_account({"file": "/x", "url": "https://tokens.example/token"})),
    "no source": lambda kms: json.loads(kms.external_account({})),
    "a list for a source": lambda kms: {**json.loads(kms.external_account({})), "credential_source": []},
    "a text for a source": lambda kms: {**json.loads(kms.external_account({})), "credential_source": "file"},
    "nothing": lambda _: {},
    "a list": lambda _: [1],
    "no type": lambda kms: {**kms.service_account.info, "type": None},
    "a list for a type": lambda kms: {**kms.service_account.info, "type": ["service_account"]},
    "an appliance": lambda kms: {**kms.service_account.info, "type": "gdch_service_account"},
    "a workforce": lambda kms: {**kms.user, "type": "external_account_authorized_user"},
    "no private key": lambda kms: {**kms.service_account.info, "private_key": None},
    "a damaged private key": lambda kms: {
        **kms.service_account.info,
        "private_key": kms.service_account.private_key.replace("A", ""),
    },
    "no account": lambda kms: {k: v for k, v in kms.service_account.info.items() if k != "client_email"},
    "no refresh token": lambda kms: {k: v for k, v in kms.user.items() if k != "refresh_token"},
    "nobody to impersonate": lambda kms: {"type": "impersonated_service_account", "source_credentials": kms.user},
    "no source to impersonate with": lambda _: {"type": "impersonated_service_account"},
}


@pytest.mark.parametrize("make", MALFORMED.values(), ids=MALFORMED)
def test_credentials_that_cannot_be_used(
    gcp_kms: CloudKms, caplog: pytest.LogCaptureFixture, make: Callable[[CloudKms], Any]
) -> None:
    caplog.set_level(logging.DEBUG)
    error = refused(gcp_kms, json.dumps(make(gcp_kms)), CredentialError)
    assert SETTING in str(error)
    assert gcp_kms.requests == []
    assert_nothing_kept_leaks(gcp_kms, error, caplog)


@pytest.mark.parametrize("text", ["", "{", "null", "[" * 60_000, '{"type":' * 8000, "\x00", f'"{MARK}"'])
def test_credentials_that_are_no_json(gcp_kms: CloudKms, caplog: pytest.LogCaptureFixture, text: str) -> None:
    error = refused(gcp_kms, text, CredentialError)
    assert_leaks_nothing(error, caplog, MARK.encode())


def test_a_token_that_is_not_there(gcp_kms: CloudKms, tmp_path: Path) -> None:
    credentials = gcp_kms.external_account({"file": str(tmp_path / "missing")})
    assert SETTING in str(refused(gcp_kms, credentials, CredentialError))
    (tmp_path / "missing").mkdir()
    assert SETTING in str(refused(gcp_kms, credentials, CredentialError))


ELSEWHERE = [
    "https://tokens.example/v1/token",
    "http://sts.googleapis.com/v1/token",
    "https://sts.googleapis.com.example/v1/token",
    "https://sts.googleapis.com@tokens.example/v1/token",
    "https://user@sts.googleapis.com/v1/token",
    "https://sts.googleapis.com:8443/v1/token",
    "https://storage.googleapis.com/v1/token",
    "https://x.sts.googleapis.com/v1/token",
    "https://sts.a.b.rep.googleapis.com/v1/token",
    "https://tokens.example#@sts.googleapis.com/v1/token",
    "https:sts.googleapis.com/v1/token",
    "file:///etc/passwd",
    "ftp://sts.googleapis.com/v1/token",
]


@pytest.mark.parametrize("url", ELSEWHERE)
def test_a_token_goes_to_google_and_to_nobody_else(
    gcp_kms: CloudKms, tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    [token] = gcp_kms.subject_tokens
    file.write_text(token)
    with pytest.raises(ProviderError) as caught:
        wrap(gcp_kms, gcp_kms.external_account({"file": str(file)}, token_url=url))
    assert caught.type is CredentialError
    assert gcp_kms.requests == []
    assert gcp_kms.calls == []
    assert_nothing_kept_leaks(gcp_kms, caught.value, caplog)


def test_an_address_that_two_parsers_could_take_apart_differently(gcp_kms: CloudKms, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(next(iter(gcp_kms.subject_tokens)))
    url = "https://sts.googleapis.com\\@tokens.example/v1/token"
    refused(gcp_kms, gcp_kms.external_account({"file": str(file)}, token_url=url), ProviderDeniedError)
    assert {request.host for request in gcp_kms.requests} == {"sts.googleapis.com"}


@pytest.mark.parametrize("url", ELSEWHERE)
def test_an_assertion_goes_to_google_and_to_nobody_else(gcp_kms: CloudKms, url: str) -> None:
    impersonation = f"https://{IMPERSONATION[0]}{IMPERSONATION[1]}"
    source = {**gcp_kms.service_account.info, "token_uri": url}
    credentials = {
        "type": "impersonated_service_account",
        "service_account_impersonation_url": impersonation,
        "source_credentials": source,
    }
    refused(gcp_kms, json.dumps(credentials), CredentialError)
    assert gcp_kms.requests == []


@pytest.mark.parametrize("host", ["tokens.example", "storage.googleapis.com"])
def test_a_token_to_impersonate_with_goes_to_google_and_to_nobody_else(
    gcp_kms: CloudKms, tmp_path: Path, host: str
) -> None:
    file = tmp_path / "token"
    file.write_text(next(iter(gcp_kms.subject_tokens)))
    url = f"https://{host}{IMPERSONATION[1]}"
    credentials = gcp_kms.external_account({"file": str(file)}, service_account_impersonation_url=url)
    refused(gcp_kms, credentials, CredentialError)
    assert asked(gcp_kms) == [STS]


@pytest.mark.parametrize(
    "url",
    [
        "http://tokens.example/token",
        "http://127.0.0.1/token",
        "http://169.254.169.254:8080/token",
        "http://169.254.169.254.example/token",
        "file:///etc/passwd",
    ],
)
def test_only_a_metadata_server_is_asked_without_tls(gcp_kms: CloudKms, url: str) -> None:
    refused(gcp_kms, gcp_kms.external_account({"url": url}), CredentialError)
    assert gcp_kms.requests == []


def test_what_names_a_source_of_tokens_gets_none(gcp_kms: CloudKms) -> None:
    """The address of the external token is one more that may be asked, but not with what it gave."""
    source = {"url": "https://tokens.example/token"}
    credentials = gcp_kms.external_account(source, token_url="https://storage.googleapis.com/v1/token")
    refused(gcp_kms, credentials, CredentialError)
    assert asked(gcp_kms) == [("tokens.example", "/token")]


def test_the_environment_sends_nobody_elsewhere(
    gcp_kms: CloudKms, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"):
        monkeypatch.setenv(name, listener.address)
    monkeypatch.setenv("GCE_METADATA_MTLS_MODE", "strict")
    monkeypatch.setenv("GOOGLE_API_USE_CLIENT_CERTIFICATE", "true")
    wrap(gcp_kms, None)
    wrap(gcp_kms, json.dumps(gcp_kms.user))
    assert not listener.was_contacted()


def test_no_session_but_the_bounded_one_is_used(
    gcp_kms: CloudKms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def send(*_: object, **__: object) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr(HTTPAdapter, "send", send)
    monkeypatch.setenv("GOOGLE_SDK_EXPERIMENTAL_PYTHON_REGIONAL_ACCESS_BOUNDARY_LOOKUP_ENABLED", "true")
    file = tmp_path / "token"
    file.write_text(next(iter(gcp_kms.subject_tokens)))
    url = f"https://{IMPERSONATION[0]}{IMPERSONATION[1]}"
    for credentials in (
        None,
        gcp_kms.service_account.text,
        json.dumps(gcp_kms.user),
        gcp_kms.external_account({"file": str(file)}, service_account_impersonation_url=url),
    ):
        wrap(gcp_kms, credentials)
    assert asked(gcp_kms) == [MACHINE, OAUTH, STS, IMPERSONATION]


# --- Logins that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer(400, {"error": "invalid_grant", "error_description": MARK}), CredentialExpiredError),
        (Answer(400, {"error": "invalid_grant", "error_subtype": "invalid_rapt"}), CredentialExpiredError),
        (Answer(400, {"error": "invalid_target", "error_description": MARK}), ProviderDeniedError),
        (Answer(401, {"error": "invalid_client"}), ProviderDeniedError),
        (Answer(403, {"error": "unauthorized_client"}), ProviderDeniedError),
        (Answer(403, {"error": {"code": 403, "message": MARK, "status": "PERMISSION_DENIED"}}), ProviderDeniedError),
        (Answer(404, MARK.encode()), ProviderDeniedError),
        (Answer(400, {"error": ["invalid_grant"]}), ProviderDeniedError),
    ],
)
@pytest.mark.parametrize("kind", ["user", "external"])
def test_a_login_that_is_refused(
    gcp_kms: CloudKms,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    answer: Answer,
    expected: type[ProviderError],
    kind: str,
) -> None:
    file = tmp_path / "token"
    file.write_text(next(iter(gcp_kms.subject_tokens)))
    gcp_kms.login_answers.append(answer)
    credentials = json.dumps(gcp_kms.user) if kind == "user" else gcp_kms.external_account({"file": str(file)})
    error = refused(gcp_kms, credentials, expected)
    assert_nothing_kept_leaks(gcp_kms, error, caplog)
    assert len(gcp_kms.requests) == 1


def test_an_account_that_may_not_be_impersonated(gcp_kms: CloudKms) -> None:
    gcp_kms.login_answers.extend(
        [
            Answer(200, {"access_token": "t", "expires_in": 60, "token_type": "Bearer"}),
            Answer(403, {"error": {"code": 403, "status": "PERMISSION_DENIED"}}),
        ]
    )
    credentials = {
        "type": "impersonated_service_account",
        "service_account_impersonation_url": f"https://{IMPERSONATION[0]}{IMPERSONATION[1]}",
        "source_credentials": gcp_kms.user,
    }
    assert "Token Creator" in str(refused(gcp_kms, json.dumps(credentials), ProviderDeniedError))


def test_a_metadata_server_that_refuses(gcp_kms: CloudKms) -> None:
    gcp_kms.login_answers.append(Answer(403, MARK.encode()))
    with pytest.raises(ProviderDeniedError, match="metadata server"):
        wrap(gcp_kms, None)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("kind", ["user", "machine"])
def test_a_login_service_that_does_not_recover(gcp_kms: CloudKms, status: int, kind: str) -> None:
    gcp_kms.login_answers.extend([Answer(status, MARK.encode())] * 9)
    pauses: list[float] = []
    with pytest.raises(ProviderUnavailableError, match=f"HTTP {status}"):
        wrap(gcp_kms, None if kind == "machine" else json.dumps(gcp_kms.user), sleep=pauses.append)
    assert len(gcp_kms.requests) == 3
    assert pauses == [0.2, 0.8]
    assert gcp_kms.calls == []


def test_a_login_service_that_recovers(gcp_kms: CloudKms) -> None:
    gcp_kms.login_answers.extend([Answer(503), Answer(429)])
    wrap(gcp_kms, json.dumps(gcp_kms.user))


# --- Login services that misbehave -----------------------------------------------------------------------------------


def assert_nothing_kept_leaks(gcp_kms: CloudKms, error: BaseException, logs: pytest.LogCaptureFixture) -> None:
    private_key = gcp_kms.service_account.private_key
    kept = [
        gcp_kms.refresh_token,
        gcp_kms.client_secret,
        private_key,
        *re.findall(r"[A-Za-z0-9+/]{64}", private_key),
        *gcp_kms.subject_tokens,
        *gcp_kms.tokens,
        *(call.token for call in gcp_kms.calls),
        *(request.form["assertion"] for request in gcp_kms.requests if b"assertion=" in request.body),
        MARK,
    ]
    assert_leaks_nothing(error, logs, DATA_KEY, *(text.encode() for text in kept))


@pytest.fixture(params=["machine", "user", "external", "source"])
def login(request: pytest.FixtureRequest, gcp_kms: CloudKms, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Credentials of a kind that needs a login service. Everything is logged, by the SDK's own loggers too."""
    for name in ("", "google", "urllib3"):
        caplog.set_level(logging.DEBUG, logger=name)
    file = tmp_path / "token"
    file.write_text(next(iter(gcp_kms.subject_tokens)))
    kinds = {
        "machine": "",
        "user": json.dumps(gcp_kms.user),
        "external": gcp_kms.external_account({"file": str(file)}),
        "source": gcp_kms.external_account({"url": "https://tokens.example/token"}),
    }
    return kinds[request.param]


def misled(
    gcp_kms: CloudKms, logs: pytest.LogCaptureFixture, login: str, raw: Raw, seconds: float = 10
) -> ProviderError:
    gcp_kms.login_raw = raw
    start = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        provider(gcp_kms, login or None).wrap(DATA_KEY, b"", Deadline(seconds))
    assert time.monotonic() - start < hostile.ENOUGH
    assert gcp_kms.calls == []
    assert caught.value.provider == "gcp"
    assert_nothing_kept_leaks(gcp_kms, caught.value, logs)
    return caught.value


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_never_followed(
    gcp_kms: CloudKms, listener: Listener, caplog: pytest.LogCaptureFixture, login: str, status: int
) -> None:
    raw = answers(status, MARK.encode(), f"Location: http://{listener.address}/{MARK}")
    assert type(misled(gcp_kms, caplog, login, raw)) is ProviderResponseError
    assert not listener.was_contacted()


@pytest.mark.parametrize(
    "raw",
    [hostile.ENDLESS_BODY, hostile.ENDLESS_HEADERS, answers(200, b" " * 100_001), answers(400, b" " * 100_001)],
    ids=["body", "headers", "just above", "error"],
)
def test_an_answer_beyond_the_bound_is_refused(
    gcp_kms: CloudKms, caplog: pytest.LogCaptureFixture, login: str, raw: Raw
) -> None:
    assert type(misled(gcp_kms, caplog, login, raw)) is ProviderResponseError


@pytest.mark.parametrize(
    "raw", [hostile.is_silent, hostile.DRIPS_BODY, hostile.DRIPS_HEADERS], ids=["silence", "body", "headers"]
)
def test_the_deadline_ends_an_answer_that_does_not(
    gcp_kms: CloudKms, caplog: pytest.LogCaptureFixture, login: str, raw: Raw
) -> None:
    error = misled(gcp_kms, caplog, login, raw, seconds=0.5)
    assert type(error) is ProviderUnavailableError
    assert "0.5 seconds" in str(error)


@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_a_request_that_is_echoed_leaks_nothing(
    gcp_kms: CloudKms, caplog: pytest.LogCaptureFixture, login: str, status: int
) -> None:
    def raw(connection: socket.socket, body: bytes) -> None:
        error = {"error": body.decode(), "error_description": f"{body.decode()} {MARK}", "error_uri": MARK}
        connection.sendall(http_answer(status, json.dumps(error).encode()))

    misled(gcp_kms, caplog, login, raw)


GARBAGE = {
    "not JSON": MARK.encode(),
    "nothing": b"",
    "an empty object": b"{}",
    "null": b"null",
    "a list": b"[1]",
    "a string": f'"{MARK}"'.encode(),
    "brackets": b"[" * 90_000,
    "not UTF-8": b'{"access_token":"\xff"}',
    "null for a token": b'{"access_token":null,"expires_in":1,"token_type":"Bearer"}',
    "a list for a token": b'{"access_token":["x"],"expires_in":1,"token_type":"Bearer"}',
    "an empty token": b'{"access_token":"","expires_in":3599,"token_type":"Bearer"}',
    "two lines": json.dumps({"access_token": f"{MARK}\r\nx: y", "expires_in": 9, "token_type": "Bearer"}).encode(),
    "beyond ASCII": json.dumps({"access_token": f"{MARK}\u20ac", "expires_in": 9, "token_type": "Bearer"}).encode(),
    "a long token": json.dumps({"access_token": MARK * 2000, "expires_in": 9, "token_type": "Bearer"}).encode(),
    "a life of text": json.dumps({"access_token": " ", "expires_in": MARK, "token_type": "Bearer"}).encode(),
    "no life": json.dumps({"access_token": " ", "expires_in": None, "token_type": "Bearer"}).encode(),
    "a long life": json.dumps({"access_token": " ", "expires_in": 10**30, "token_type": "Bearer"}).encode(),
}


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused(gcp_kms: CloudKms, caplog: pytest.LogCaptureFixture, login: str, body: bytes) -> None:
    raw = answers(200, body, "Metadata-Flavor: Google")
    assert type(misled(gcp_kms, caplog, login, raw)) is ProviderResponseError


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x00\x00", f"{MARK}\r\n\r\n".encode()], ids=["TLS", "text"])
def test_what_is_not_http_is_refused(
    gcp_kms: CloudKms, caplog: pytest.LogCaptureFixture, login: str, data: bytes
) -> None:
    assert type(misled(gcp_kms, caplog, login, sends(data))) is ProviderResponseError


def test_nothing_is_logged_when_all_is_well(
    gcp_kms: CloudKms, caplog: pytest.LogCaptureFixture, login: str, tmp_path: Path
) -> None:
    del login  # what it does to the loggers
    file = tmp_path / "token"
    url = f"https://{IMPERSONATION[0]}{IMPERSONATION[1]}"
    impersonated = {"type": "impersonated_service_account", "service_account_impersonation_url": url}
    for credentials in (
        None,
        json.dumps(gcp_kms.user),
        gcp_kms.external_account({"file": str(file)}, service_account_impersonation_url=url),
        json.dumps({**impersonated, "source_credentials": gcp_kms.service_account.info}),
    ):
        wrap(gcp_kms, credentials)
    assert len(gcp_kms.calls) == 4
    assert_nothing_kept_leaks(gcp_kms, ValueError(), caplog)
