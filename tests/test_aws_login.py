"""The chain of credentials of AWS's SDK on our transport, and what it may not log."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sqlalchemy_kravn_crypto.exceptions import (
    CredentialError,
    CredentialExpiredError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
)
from sqlalchemy_kravn_crypto.providers.base import Deadline
from tests import hostile_server as hostile
from tests.aws_server import (
    BINDING,
    CONTAINER,
    INSTANCE,
    KMS,
    POD,
    ROLE,
    SSO,
    STS,
    Answer,
    Aws,
    Credentials,
    Deployment,
    operate,
    scripted,
    sts_refused,
)
from tests.hostile_server import Listener, Raw, answers
from tests.leaks import found_in, leaked

pytestmark = pytest.mark.usefixtures("aws_home")


@pytest.fixture
def deployment(aws: Aws) -> Deployment:
    return Deployment(aws)


# --- Where credentials come from -------------------------------------------------------------------------------------


def test_from_the_environment(deployment: Deployment, aws_credentials: Credentials) -> None:
    deployment.wrap()
    assert deployment.signer() == aws_credentials.access_key
    assert "x-amz-security-token" not in deployment.aws.requests[-1].headers


def test_a_session_token_is_sent_and_signed(
    deployment: Deployment, aws_credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", aws_credentials.token)
    deployment.wrap()
    headers = deployment.aws.requests[-1].headers
    assert headers["x-amz-security-token"] == aws_credentials.token
    assert "host;x-amz-date;x-amz-security-token;x-amz-target" in headers["authorization"]


def test_from_a_profile(deployment: Deployment, aws_credentials: Credentials, aws_home: Path) -> None:
    others = Credentials()
    (aws_home / ".aws" / "credentials").write_text(f"[default]\n{Credentials().ini()}\n[kravn]\n{others.ini()}")
    deployment.wrap(profile="kravn")
    # A profile that is asked for counts more than the environment.
    assert deployment.signer() == others.access_key
    deployment.wrap()
    assert deployment.signer() == aws_credentials.access_key


def test_from_the_profile_that_the_environment_names(
    deployment: Deployment, aws_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = Credentials()
    (aws_home / "credentials").write_text(f"[kravn]\n{others.ini()}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(aws_home / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "kravn")
    deployment.wrap()
    assert deployment.signer() == others.access_key


def test_credentials_are_read_anew_for_every_operation(deployment: Deployment, aws_home: Path) -> None:
    provider = deployment.provider()
    for _ in range(2):
        made = Credentials()
        (aws_home / ".aws" / "credentials").write_text(f"[default]\n{made.ini()}")
        provider.wrap(bytes(32), BINDING, Deadline(20))
        assert deployment.signer() == made.access_key


def test_from_a_process(deployment: Deployment, aws_home: Path) -> None:
    made = Credentials()
    said = {"Version": 1, "AccessKeyId": made.access_key, "SecretAccessKey": made.secret}
    (aws_home / "said").write_text(json.dumps(said))
    (aws_home / ".aws" / "config").write_text(f"[default]\ncredential_process = cat {aws_home / 'said'}\n")
    deployment.wrap()
    assert deployment.signer() == made.access_key


def test_a_role_is_assumed_with_what_the_chain_finds(deployment: Deployment, aws_credentials: Credentials) -> None:
    wrapped = deployment.wrap()
    deployment.aws.requests.clear()
    assert deployment.unwrap(wrapped, role=ROLE, external_id="kravn:42") == deployment.data_key
    assert [(request.host, request.operation) for request in deployment.aws.requests] == [
        (STS, "AssumeRole"),
        (KMS, "Decrypt"),
    ]
    login, operation = deployment.aws.requests
    assert f"Credential={aws_credentials.access_key}/" in login.headers["authorization"]
    assert "/eu-central-1/sts/aws4_request" in login.headers["authorization"]
    for sent in ("RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fteams%2Fkravn", "RoleSessionName=kravn-crypto"):
        assert sent in login.body.decode()
    assert "ExternalId=kravn%3A42" in login.body.decode()
    assert operation.headers["x-amz-security-token"]
    assert deployment.signer() != aws_credentials.access_key


def test_a_role_that_needs_no_external_id(deployment: Deployment, aws_credentials: Credentials) -> None:
    granted = Credentials()
    deployment.aws.answers[STS].append(granted.granted())
    deployment.wrap(role=ROLE)
    assert deployment.signer() == granted.access_key
    assert deployment.aws.requests[-1].headers["x-amz-security-token"] == granted.token
    assert b"ExternalId" not in deployment.aws.requests[0].body


def test_a_profile_may_name_a_role_and_its_source(deployment: Deployment, aws_home: Path) -> None:
    source, granted = Credentials(), Credentials()
    (aws_home / ".aws" / "config").write_text(
        f"[profile kravn]\nrole_arn = {ROLE}\nsource_profile = base\n[profile base]\n{source.ini()}"
    )
    deployment.aws.answers[STS].append(granted.granted())
    deployment.wrap(profile="kravn")
    assert deployment.aws.operations() == ["AssumeRole", "Encrypt"]
    assert f"Credential={source.access_key}/" in deployment.aws.requests[0].headers["authorization"]
    assert deployment.signer() == granted.access_key


@pytest.fixture
def web_identity(aws_home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The token of a Kubernetes service account, as EKS has it mounted."""
    token = f"header.{secrets.token_urlsafe(40)}.signature"
    (aws_home / "token").write_text(token)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(aws_home / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    return token


def test_from_a_web_identity(deployment: Deployment, web_identity: str, aws_home: Path) -> None:
    wrapped = deployment.wrap()
    assert deployment.unwrap(wrapped) == deployment.data_key
    login = "AssumeRoleWithWebIdentity"
    assert deployment.aws.operations() == [login, "Encrypt", login, "Decrypt"]
    first = deployment.aws.requests[0]
    assert first.host == STS
    assert f"WebIdentityToken={web_identity}" in first.body.decode()
    assert "authorization" not in first.headers
    # The kubelet renews the file, and the next operation takes the new one.
    (aws_home / "token").write_text("another.token.altogether")
    deployment.unwrap(wrapped)
    assert "WebIdentityToken=another.token.altogether" in deployment.aws.requests[-2].body.decode()


def test_a_role_may_be_assumed_with_a_web_identity(deployment: Deployment, web_identity: str) -> None:
    deployment.wrap(role=ROLE)
    assert deployment.aws.operations() == ["AssumeRoleWithWebIdentity", "AssumeRole", "Encrypt"]


def test_from_a_container(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Credentials()
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/1")
    deployment.aws.absent.remove(CONTAINER)
    deployment.aws.answers[CONTAINER].append(Answer(200, made.offered()))
    deployment.wrap()
    assert deployment.aws.operations() == ["/v2/credentials/1", "Encrypt"]
    assert deployment.signer() == made.access_key


def test_from_the_agent_of_eks(deployment: Deployment, aws_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Credentials()
    (aws_home / "pod-token").write_text("token-of-the-pod")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://{POD}/v1/credentials")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(aws_home / "pod-token"))
    deployment.aws.absent.remove(POD)
    deployment.aws.answers[POD].append(Answer(200, made.offered()))
    deployment.wrap()
    assert deployment.aws.requests[0].headers["authorization"] == "token-of-the-pod"
    assert deployment.signer() == made.access_key


def test_a_container_may_be_the_source_of_a_profile(
    deployment: Deployment, aws_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (aws_home / ".aws" / "config").write_text(f"[default]\nrole_arn = {ROLE}\ncredential_source = EcsContainer\n")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/1")
    made = Credentials()
    deployment.aws.absent.remove(CONTAINER)
    deployment.aws.answers[CONTAINER].append(Answer(200, made.offered()))
    deployment.wrap()
    assert deployment.aws.operations() == ["/v2/credentials/1", "AssumeRole", "Encrypt"]
    assert f"Credential={made.access_key}/" in deployment.aws.requests[1].headers["authorization"]


def test_from_the_instance(deployment: Deployment) -> None:
    deployment.aws.absent.remove(INSTANCE)
    deployment.wrap()
    role = "/latest/meta-data/iam/security-credentials/"
    assert deployment.aws.operations() == ["/latest/api/token", role, f"{role}default-role", "Encrypt"]
    assert deployment.aws.requests[1].headers["x-aws-ec2-metadata-token"] == "fake-imdsv2-token"
    assert deployment.signer() == "test-key"


SIGNED_IN = """[profile kravn]
sso_start_url = https://kravn.awsapps.com/start
sso_region = eu-west-1
sso_account_id = 123456789012
sso_role_name = kravn
"""


def sign_in(aws_home: Path, hours: float) -> str:
    token = secrets.token_urlsafe(30)
    (aws_home / ".aws" / "config").write_text(SIGNED_IN)
    (aws_home / "sso").mkdir()
    expires = (datetime.now(UTC) + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")
    cached = json.dumps({"accessToken": token, "expiresAt": expires})
    name = hashlib.sha1(b"https://kravn.awsapps.com/start", usedforsecurity=False).hexdigest()
    (aws_home / "sso" / f"{name}.json").write_text(cached)
    return token


def test_from_a_sign_in(deployment: Deployment, aws_home: Path) -> None:
    token, made = sign_in(aws_home, 8), Credentials()
    granted = {"accessKeyId": made.access_key, "secretAccessKey": made.secret, "sessionToken": made.token}
    expiration = int(time.time() + 3600) * 1000
    deployment.aws.answers[SSO].append(Answer(200, {"roleCredentials": {**granted, "expiration": expiration}}))
    deployment.wrap(profile="kravn")
    assert deployment.aws.requests[0].headers["x-amz-sso_bearer_token"] == token
    assert deployment.signer() == made.access_key


@pytest.mark.parametrize("said", ["expired", "refused", "absent"])
def test_a_sign_in_that_is_over(aws: Aws, aws_home: Path, said: str) -> None:
    sign_in(aws_home, -1 if said == "expired" else 8)
    if said == "absent":
        next((aws_home / "sso").iterdir()).unlink()
    refusal = Answer(401, {"message": "no"}, {"x-amzn-ErrorType": "UnauthorizedException"})
    aws.answers[SSO].append(refusal)
    with pytest.raises(CredentialExpiredError, match="aws sso login"):
        operate(scripted(aws, profile="kravn"), "Decrypt")
    assert KMS not in aws.hosts()


# --- No credentials --------------------------------------------------------------------------------------------------


def refused_login(aws: Aws, expected: type[ProviderError], **settings: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        operate(scripted(aws, **settings), "Decrypt")
    assert caught.type is expected
    assert caught.value.provider == "aws"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert "botocore" not in "".join(traceback.format_exception(caught.value))
    assert KMS not in aws.hosts()
    return caught.value


def test_none_at_all(aws: Aws) -> None:
    assert "No AWS credentials were found" in str(refused_login(aws, CredentialError))


def test_an_instance_without_a_role(aws: Aws) -> None:
    aws.absent.remove(INSTANCE)
    aws.answers[INSTANCE].extend([Answer(200, b"token"), Answer(404, b"")])
    assert "No AWS credentials were found" in str(refused_login(aws, CredentialError))


def test_half_of_them(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA0000000000000000")
    assert "PartialCredentialsError" in str(refused_login(aws, CredentialError))


def test_a_line_break_in_them(aws: Aws, aws_credentials: Credentials, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        with monkeypatch.context() as patched:
            patched.setenv(name, f"{aws_credentials.secret}\nx: y")
            error = refused_login(aws, CredentialError)
        assert "line break" in str(error)
        assert leaked(error, aws_credentials.secret) == []


@pytest.mark.parametrize("named", ["setting", "environment"])
def test_a_profile_that_is_not_there(aws: Aws, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    if named == "environment":
        monkeypatch.setenv("AWS_PROFILE", "missing")
    error = refused_login(aws, CredentialError, **({"profile": "missing"} if named == "setting" else {}))
    assert "ProfileNotFound" in str(error)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("nothing that is one", "ConfigParseError"),
        (f"[default]\nrole_arn = {ROLE}\nsource_profile = missing\n", "InvalidConfigError"),
        (f"[default]\nrole_arn = {ROLE}\ncredential_source = Elsewhere\n", "InvalidConfigError"),
        (f"[default]\nrole_arn = {ROLE}\n", "PartialCredentialsError"),
        ("[default]\ncredential_process = false\n", "CredentialRetrievalError"),
        ("[default]\ncredential_process = echo secret-of-the-process\n", "JSONDecodeError"),
        ("[default]\ncredential_process = /nothing/there\n", "FileNotFoundError"),
    ],
)
def test_a_configuration_that_is_wrong(aws: Aws, aws_home: Path, config: str, kind: str) -> None:
    (aws_home / ".aws" / "config").write_text(config)
    error = refused_login(aws, CredentialError)
    assert kind in str(error)
    assert leaked(error, "secret-of-the-process") == []


def test_a_web_identity_without_its_file(aws: Aws, web_identity: str, aws_home: Path) -> None:
    (aws_home / "token").unlink()
    assert "FileNotFoundError" in str(refused_login(aws, CredentialError))


def test_a_web_identity_without_its_role(aws: Aws, web_identity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ROLE_ARN")
    assert "InvalidConfigError" in str(refused_login(aws, CredentialError))


def test_nobody_is_asked_for_the_code_of_a_device(aws: Aws, aws_home: Path) -> None:
    (aws_home / ".aws" / "config").write_text(
        f"[profile kravn]\nrole_arn = {ROLE}\nsource_profile = base\nmfa_serial = arn:aws:iam::123456789012:mfa/me\n"
        f"[profile base]\n{Credentials().ini()}"
    )
    assert "MFA" in str(refused_login(aws, CredentialError, profile="kravn"))


def test_a_container_that_gives_what_has_expired(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/1")
    aws.absent.remove(CONTAINER)
    aws.answers[CONTAINER].extend([Answer(200, Credentials().offered(hours=-1))] * 2)
    refused_login(aws, CredentialExpiredError)


@pytest.mark.parametrize("there", [False, True])
def test_a_container_that_gives_none(aws: Aws, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:  # noqa: FBT001
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/1")
    if there:
        aws.absent.remove(CONTAINER)
        aws.answers[CONTAINER].extend([Answer(403, {"message": "no association"})] * 3)
    assert "CredentialRetrievalError" in str(refused_login(aws, CredentialError))


def test_a_container_elsewhere_is_not_asked(aws: Aws, monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://198.51.100.1/credentials")
    refused_login(aws, CredentialError, resolve=lambda _host, _port: tuple(listener.address.split(":")))
    assert not listener.was_contacted()


LOGIN_ERRORS: dict[str, type[ProviderError]] = {
    "AccessDenied": ProviderDeniedError,
    "InvalidIdentityToken": ProviderDeniedError,
    "IDPRejectedClaim": ProviderDeniedError,
    "RegionDisabledException": ProviderDeniedError,
    "InvalidClientTokenId": ProviderDeniedError,
    "SignatureDoesNotMatch": ProviderDeniedError,
    "ExpiredToken": CredentialExpiredError,
    "ExpiredTokenException": CredentialExpiredError,
    "IDPCommunicationError": ProviderUnavailableError,
    "Throttling": ProviderUnavailableError,
    "ValidationError": ProviderResponseError,
    "SomethingNew": ProviderResponseError,
}


@pytest.mark.parametrize("code", LOGIN_ERRORS)
def test_every_error_of_sts(aws: Aws, aws_credentials: Credentials, code: str) -> None:
    message = f"words of {secrets.token_hex(8)}"
    aws.answers[STS].extend([sts_refused(code, 400 if code == "Throttling" else 403, message)] * 3)
    error = refused_login(aws, LOGIN_ERRORS[code], role=ROLE)
    assert leaked(error, message, aws_credentials.secret) == []


@pytest.mark.parametrize("code", LOGIN_ERRORS)
def test_every_error_of_sts_for_a_web_identity(aws: Aws, web_identity: str, code: str) -> None:
    message = f"words of {secrets.token_hex(8)}"
    aws.answers[STS].extend([sts_refused(code, 400 if code == "Throttling" else 403, message)] * 3)
    error = refused_login(aws, LOGIN_ERRORS[code])
    assert leaked(error, message, web_identity) == []


@pytest.mark.parametrize("status", [500, 503])
def test_sts_that_cannot_serve(aws: Aws, aws_credentials: Credentials, status: int) -> None:
    aws.answers[STS].extend([Answer(status)] * 3)
    refused_login(aws, ProviderUnavailableError, role=ROLE)
    assert len(aws.requests) == 3


# --- A login service that misbehaves ---------------------------------------------------------------------------------

MARK = f"text-of-the-answer-{secrets.token_hex(8)}"

MISBEHAVIOUR: dict[str, tuple[Raw, type[ProviderError]]] = {
    "redirect": (answers(307, MARK.encode(), f"Location: https://{MARK}/"), ProviderResponseError),
    "endless": (hostile.ENDLESS_BODY, ProviderResponseError),
    "compressed": (hostile.GZIP_BOMB, ProviderResponseError),
    "no HTTP": (hostile.sends(f"{MARK}\r\n\r\n".encode()), ProviderResponseError),
    "hangs up": (hostile.hangs_up, ProviderUnavailableError),
    "silent": (hostile.is_silent, ProviderUnavailableError),
    "drips": (hostile.DRIPS_BODY, ProviderUnavailableError),
    "not XML": (answers(200, MARK.encode()), ProviderResponseError),
    "nothing": (answers(200, b""), ProviderResponseError),
    "JSON": (answers(200, {"Credentials": {"AccessKeyId": MARK}}), ProviderResponseError),
    "no credentials": (answers(200, b"<AssumeRoleResponse/>"), ProviderResponseError),
    "half": (
        answers(
            200,
            f"<a><AssumeRoleResult><Credentials><AccessKeyId>{MARK}</AccessKeyId></Credentials>"
            "</AssumeRoleResult></a>".encode(),
        ),
        ProviderResponseError,
    ),
    "entities": (
        answers(200, b'<!DOCTYPE a [<!ENTITY b "' + b"c" * 1000 + b'">]><a>' + b"&b;" * 15_000 + b"</a>"),
        ProviderResponseError,
    ),
    "nested": (answers(200, b"<a>" * 30_000), ProviderResponseError),
    "error without words": (answers(403, b"<Error/>"), ProviderResponseError),
    "error in JSON": (answers(403, {"Error": {"Code": MARK, "Message": MARK}}), ProviderResponseError),
    "echo": (hostile.echoes(400), ProviderResponseError),
}
ENDLESS = {"silent", "drips"}


@pytest.mark.parametrize("behaviour", MISBEHAVIOUR)
def test_a_login_service_that_misbehaves(
    aws: Aws, aws_credentials: Credentials, caplog: pytest.LogCaptureFixture, behaviour: str
) -> None:
    caplog.set_level(logging.DEBUG)
    raw, expected = MISBEHAVIOUR[behaviour]
    aws.raw[STS] = raw
    start = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        operate(scripted(aws, role=ROLE), "Encrypt", seconds=1 if behaviour in ENDLESS else 60)
    assert time.monotonic() - start < hostile.ENOUGH
    assert caught.type is expected
    assert leaked(caught.value, MARK, *aws_credentials.everything()) == []
    assert found_in(logged(caplog), MARK, *aws_credentials.everything()) == []
    assert KMS not in aws.hosts()


def test_sts_that_cannot_be_reached_is_named(aws: Aws, aws_credentials: Credentials) -> None:
    aws.raw[STS] = hostile.hangs_up
    assert STS in str(refused_login(aws, ProviderUnavailableError, role=ROLE))


def test_sts_is_not_trusted_without_its_certificate(aws: Aws, aws_credentials: Credentials) -> None:
    error = refused_login(aws, ProviderUnavailableError, role=ROLE, ca_bundle=None)
    assert "KRAVN_KMS_AWS_CA_BUNDLE" in str(error)
    assert aws.requests == []


@pytest.mark.parametrize(
    "raw",
    [
        answers(302, b"", "Location: http://198.51.100.1/"),
        hostile.ENDLESS_BODY,
        hostile.GZIP_BOMB,
        hostile.sends(b"nothing\r\n\r\n"),
        hostile.hangs_up,
        hostile.is_silent,
        answers(200, b"[" * 90_000),
        answers(200, {"AccessKeyId": 1, "SecretAccessKey": [], "Token": {}, "Expiration": 0}),
        answers(200, {"AccessKeyId": MARK, "SecretAccessKey": 1, "Token": None, "Expiration": "2099-01-01T00:00:00Z"}),
        answers(500, MARK.encode()),
    ],
)
@pytest.mark.parametrize("host", [INSTANCE, CONTAINER])
def test_a_metadata_service_that_misbehaves(
    aws: Aws, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, host: str, raw: Raw
) -> None:
    caplog.set_level(logging.DEBUG)
    if host == CONTAINER:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/1")
    aws.absent.remove(host)
    aws.raw[host] = raw
    start = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        operate(scripted(aws), "Decrypt", seconds=1 if raw is hostile.is_silent else 60)
    assert time.monotonic() - start < hostile.ENOUGH
    assert caught.value.__context__ is None
    assert leaked(caught.value, MARK) == []
    assert found_in(logged(caplog), MARK) == []
    assert KMS not in aws.hosts()


def test_a_silent_instance_takes_no_more_than_its_share(aws: Aws) -> None:
    aws.absent.remove(INSTANCE)
    aws.raw[INSTANCE] = hostile.is_silent
    start = time.monotonic()
    assert "No AWS credentials were found" in str(refused_login(aws, CredentialError))
    assert time.monotonic() - start < hostile.ENOUGH


# --- What is not read from the environment ---------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.close()


DIVERSIONS = {
    "AWS_ENDPOINT_URL": "http://{}",
    "AWS_ENDPOINT_URL_KMS": "http://{}",
    "AWS_ENDPOINT_URL_STS": "http://{}",
    "AWS_CA_BUNDLE": "/nothing/there",
    "REQUESTS_CA_BUNDLE": "/nothing/there",
    "HTTPS_PROXY": "http://{}",
    "HTTP_PROXY": "http://{}",
    "http_proxy": "http://{}",
    "https_proxy": "http://{}",
    "ALL_PROXY": "http://{}",
    "AWS_STS_REGIONAL_ENDPOINTS": "legacy",
    "AWS_DEFAULT_REGION": "us-west-2",
    "AWS_REGION": "us-west-2",
    "AWS_DEFAULTS_MODE": "auto",
    "AWS_MAX_ATTEMPTS": "9",
    "AWS_RETRY_MODE": "adaptive",
    "AWS_CSM_ENABLED": "true",
}


@pytest.mark.parametrize("variable", DIVERSIONS)
def test_a_variable_that_diverts_requests_is_not_honoured(
    deployment: Deployment, listener: Listener, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, DIVERSIONS[variable].format(listener.address))
    deployment.aws.absent.remove(INSTANCE)
    deployment.wrap(role=ROLE)
    assert not listener.was_contacted()
    assert deployment.aws.hosts() == {INSTANCE, STS, KMS}


def test_a_configuration_that_diverts_requests_is_not_honoured(
    deployment: Deployment, listener: Listener, aws_home: Path
) -> None:
    elsewhere = f"http://{listener.address}"
    (aws_home / ".aws" / "config").write_text(
        f"[default]\nendpoint_url = {elsewhere}\nservices = elsewhere\nca_bundle = /nothing/there\n"
        f"proxy = {elsewhere}\nhttps_proxy = {elsewhere}\nregion = us-west-2\nsts_regional_endpoints = legacy\n"
        f"defaults_mode = auto\n{Credentials().ini()}"
        f"[services elsewhere]\nsts =\n  endpoint_url = {elsewhere}\nkms =\n  endpoint_url = {elsewhere}\n"
    )
    deployment.wrap(role=ROLE)
    assert not listener.was_contacted()
    assert deployment.aws.hosts() == {STS, KMS}


def test_the_instance_is_not_asked_where_it_is(
    deployment: Deployment, aws_credentials: Credentials, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_DEFAULTS_MODE", "auto")
    monkeypatch.setenv("HTTP_PROXY", f"http://{listener.address}")
    deployment.wrap(role=ROLE)
    assert not listener.was_contacted()
    assert deployment.aws.hosts() == {STS, KMS}


def test_the_instance_is_asked_no_more_often_than_the_transport_asks(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "9")
    aws.absent.remove(INSTANCE)
    aws.answers[INSTANCE].extend([Answer(200, b"token"), *[Answer(404)] * 9])
    refused_login(aws, CredentialError)
    assert len(aws.requests) == 2


def test_monitoring_is_sent_nothing(
    deployment: Deployment, aws_credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as monitor:
        monitor.bind(("127.0.0.1", 0))
        monitor.settimeout(0)
        monkeypatch.setenv("AWS_CSM_ENABLED", "true")
        monkeypatch.setenv("AWS_CSM_PORT", str(monitor.getsockname()[1]))
        deployment.wrap(role=ROLE)
        with pytest.raises(BlockingIOError):
            monitor.recv(1)


def test_sts_is_tried_no_more_often_than_the_transport_tries(
    aws: Aws, aws_credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "9")
    aws.answers[STS].extend([Answer(503)] * 20)
    refused_login(aws, ProviderUnavailableError, role=ROLE)
    assert len(aws.requests) == 3


# --- Logs ------------------------------------------------------------------------------------------------------------


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return caplog.text + "\n".join(repr(record.__dict__) for record in caplog.records)


@pytest.mark.parametrize("way", ["environment", "role", "web identity", "container", "instance", "profile", "sign-in"])
def test_nothing_that_is_secret_is_logged(
    deployment: Deployment,
    aws_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    way: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    first, second = Credentials(), Credentials()
    kept = [*first.everything(), *second.everything()]
    settings: dict[str, Any] = {}
    aws = deployment.aws
    if way in {"environment", "role"}:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", first.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", first.secret)
        monkeypatch.setenv("AWS_SESSION_TOKEN", first.token)
    if way == "role":
        settings["role"] = ROLE
        aws.answers[STS].extend([second.granted()] * 2)
    if way == "web identity":
        kept.append(request.getfixturevalue("web_identity"))
        aws.answers[STS].extend([second.granted("AssumeRoleWithWebIdentity")] * 2)
    if way == "container":
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/1")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "token-of-the-container")
        kept.append("token-of-the-container")
        aws.absent.remove(CONTAINER)
        aws.answers[CONTAINER].extend([Answer(200, first.offered())] * 2)
    if way == "instance":
        aws.absent.remove(INSTANCE)
        told = [Answer(200, b"token-of-the-instance"), Answer(200, b"role"), Answer(200, first.offered())]
        kept.append("token-of-the-instance")
        aws.answers[INSTANCE].extend(told * 2)
    if way == "profile":
        (aws_home / ".aws" / "config").write_text(
            f"[profile kravn]\nrole_arn = {ROLE}\nsource_profile = base\n[profile base]\n{first.ini()}"
        )
        settings["profile"] = "kravn"
        aws.answers[STS].extend([second.granted()] * 2)
    if way == "sign-in":
        kept.append(sign_in(aws_home, 8))
        settings["profile"] = "kravn"
        granted = {"accessKeyId": first.access_key, "secretAccessKey": first.secret, "sessionToken": first.token}
        told = [Answer(200, {"roleCredentials": {**granted, "expiration": int(time.time() + 3600) * 1000}})]
        aws.answers[SSO].extend(told * 2)
    wrapped = deployment.wrap(**settings)
    assert deployment.unwrap(wrapped, **settings) == deployment.data_key
    assert aws.operations()[-1] == "Decrypt"
    assert found_in(logged(caplog), deployment.data_key, wrapped.blob, *kept) == []


def test_what_others_log_in_the_meantime_is_kept(
    deployment: Deployment, aws_credentials: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    parsers = logging.getLogger("botocore.parsers")

    def resolve(host: str, port: int) -> tuple[str, int]:
        if host == STS:
            parsers.debug("of ours")
            other = threading.Thread(target=parsers.debug, args=("of others",))
            other.start()
            other.join()
        return deployment.aws.resolve(host, port)

    parsers.debug("before")
    deployment.wrap(role=ROLE, resolve=resolve)
    parsers.debug("after")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("botocore")]
    assert said == ["before", "of others", "after"]


def test_logs_come_back_after_an_error(aws: Aws, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    refused_login(aws, CredentialError)
    logging.getLogger("botocore.credentials").debug("after")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("botocore")] == ["after"]
