"""Targets: what answers a login, be it a service of the KMS, of the machine, or of somebody else."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock

from sqlalchemy_kravn_crypto import exceptions as errors

from . import providers
from .mutators import json_behind
from .target import MARKER, SECRETS, TOKEN, Run, target
from .wire import BINDING, Steps, answer_seeds, answered, behind, http, one_of

_ACCESS: Final = {"AccessKeyId": "AKIAIOSFODNN7EXAMPLE", "SecretAccessKey": MARKER, "Token": MARKER}
_UNTIL: Final = "2099-01-01T00:00:00Z"


@dataclass(frozen=True)
class Way:
    """One way to log in.

    :ivar provider: makes the provider.
    :ivar steps: what is asked, in the order of the answers that are right.
    :ivar environment: the environment that it is logged in in.
    """

    provider: Callable[[], Any]
    steps: Steps
    environment: dict[str, str] = field(default_factory=dict)


def _logged_in(ways: list[Way], master_key: str, blob: bytes) -> Run:
    """Return what logs in and unwraps: the first byte says in which way, the second which of the answers is fuzzed."""
    from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey

    made = [(way.provider(), way) for way in ways]
    wrapped = WrappedKey(master_key, blob)

    def run(data: bytes) -> object:
        way, step = data[:2].ljust(2, b"\0")
        provider, chosen = made[way % len(made)]
        with (
            mock.patch.dict(os.environ, chosen.environment, clear=True),
            answered(one_of(chosen.steps, step, data[2:])),
        ):
            return provider.unwrap(wrapped, BINDING, Deadline(30))

    return run


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def _step_seeds(ways: list[Way], *others: bytes) -> list[bytes]:
    """Return the right answer to each step, each of the others, and a few for every status."""
    found = []
    for number, way in enumerate(ways):
        for step, (_, body) in enumerate(way.steps):
            found += [bytes([number, step, status]) + body for status in (0, 1, 3, 6)]
            found += [bytes([number, step, 1]) + other for other in others]
    return found


# --- Vault -----------------------------------------------------------------------------------------------------------


def _vault_seeds() -> list[bytes]:
    granted = {"auth": {"client_token": "hvs.abc", "lease_duration": 60}}
    return behind((0,), behind((0,), answer_seeds(granted, {"errors": ["invalid role or secret ID"]})))


@target(allowed=(errors.ProviderError,), seeds=_vault_seeds, mutator=json_behind(3), secrets=SECRETS, share=0.3)
def vault_login_answers() -> Run:
    way = Way(
        lambda: providers.vault(auth="approle", role_id="role", secret_id=TOKEN),
        [("/login", b"{}"), ("", _dump(providers.VAULT_UNWRAPPED))],
    )
    return _logged_in([way], "transit/kravn:v1", b"vault:v1:AAAA")


# --- Azure -----------------------------------------------------------------------------------------------------------

_JWT: Final = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (b"{}", b'{"exp": 4e9}', b"x"))


def _azure_ways() -> list[Way]:
    tenant = f"https://login.microsoftonline.com/{providers.TENANT}"
    discovered = {
        "token_endpoint": f"{tenant}/oauth2/v2.0/token",
        "authorization_endpoint": f"{tenant}/oauth2/v2.0/authorize",
        "issuer": f"{tenant}/v2.0",
    }
    granted = {"token_type": "Bearer", "expires_in": 3600, "access_token": MARKER}
    vault = ("vault.azure.net", _dump(providers.AZURE_UNWRAPPED))
    entra = [("openid-configuration", _dump(discovered)), ("/token", _dump(granted)), vault]
    return [
        Way(providers.azure, entra),
        Way(lambda: providers.azure(auth="managed"), [("169.254.169.254", _dump(granted)), vault]),
        Way(lambda: providers.azure(auth="workload", federated_token=_JWT), entra),
    ]


@target(
    allowed=(errors.ProviderError,),
    seeds=lambda: _step_seeds(_azure_ways(), _dump({"error": "invalid_client", "error_codes": [7000215], "x": MARKER})),
    mutator=json_behind(3),
    secrets=SECRETS,
    share=0.2,
)
def azure_login_answers() -> Run:
    return _logged_in(_azure_ways(), f"{providers.AZURE_KEY}/{providers.VERSION}", bytes(256))


@target(
    allowed=(errors.ProviderError,),
    seeds=lambda: [b'{"exp": 4e9, "iat": 1}', b'{"exp": 1}', b'{"exp": "1"}', b'{"exp": 9e99, "nbf": -1}'],
    mutator=json_behind(0),
    share=0.1,
)
def federated_tokens() -> Run:
    """What a token of the workload says of itself, and that it can be examined."""
    from sqlalchemy_kravn_crypto.providers.azure_login import login_of
    from sqlalchemy_kravn_crypto.providers.base import Deadline

    vault = _dump(providers.AZURE_UNWRAPPED)
    of_application: dict[str, Any] = dict.fromkeys(
        ("client_secret", "client_certificate", "client_certificate_password")
    )
    of_application |= {"authority": "login.test", "tenant_id": providers.TENANT, "client_id": providers.TENANT}

    def run(data: bytes) -> object:
        claims = base64.urlsafe_b64encode(data or b"{}").decode().rstrip("=")
        token = f"e30.{claims}.eA"
        login = login_of("workload", federated_token=token, **of_application)
        login.validity()
        with providers.one_tls_context():
            provider = providers.azure(auth="workload", federated_token=token)
        with answered(lambda _url: http(b"\x00" + vault)):
            list(provider.examine(Deadline(30)))
        return login.credential(mock.Mock())

    return run


# --- AWS -------------------------------------------------------------------------------------------------------------


def _assumed(action: str) -> bytes:
    return (
        f'<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{action}Result><Credentials>'
        f"<AccessKeyId>AKIAIOSFODNN7EXAMPLE</AccessKeyId><SecretAccessKey>{MARKER}</SecretAccessKey>"
        f"<SessionToken>{MARKER}</SessionToken><Expiration>{_UNTIL}</Expiration></Credentials>"
        f"</{action}Result><ResponseMetadata><RequestId>1</RequestId></ResponseMetadata></{action}Response>"
    ).encode()


_STS_ERROR: Final = (
    '<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>'
    f"<Code>ExpiredToken</Code><Message>{MARKER}</Message></Error><RequestId>1</RequestId></ErrorResponse>"
).encode()

_PROFILE: Final = (
    "[profile kravn]\nsso_start_url = https://kravn.awsapps.com/start\nsso_region = eu-west-1\n"
    "sso_account_id = 123456789012\nsso_role_name = kravn\n"
)


def _aws_ways(directory: str) -> list[Way]:
    kms = ("https://kms.", _dump(providers.AWS_UNWRAPPED))
    offered = _dump({**_ACCESS, "Code": "Success", "Type": "AWS-HMAC", "Expiration": _UNTIL, "LastUpdated": _UNTIL})
    granted = {"accessKeyId": "AKIAIOSFODNN7EXAMPLE", "secretAccessKey": MARKER, "sessionToken": MARKER}
    nothing = providers.NOTHING_OF_AWS
    pod = {**nothing, "AWS_ROLE_ARN": providers.ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": f"{directory}/token"}
    return [
        Way(
            lambda: providers.aws(role=providers.ROLE),
            [("https://sts.", _assumed("AssumeRole")), kms],
            providers.ACCESS_KEY,
        ),
        Way(providers.aws, [("https://sts.", _assumed("AssumeRoleWithWebIdentity")), kms], pod),
        Way(
            providers.aws,
            [("169.254.170.2", offered), kms],
            {**nothing, "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/role"},
        ),
        Way(
            providers.aws,
            [
                ("/api/token", b"token"),
                ("/security-credentials/role", offered),
                ("/security-credentials/", b"role"),
                kms,
            ],
            nothing,
        ),
        Way(
            lambda: providers.aws(profile="kravn"),
            [("sso", _dump({"roleCredentials": {**granted, "expiration": 4_000_000_000_000}})), kms],
            {**nothing, "AWS_CONFIG_FILE": f"{directory}/config"},
        ),
    ]


@target(
    allowed=(errors.ProviderError,),
    seeds=lambda: _step_seeds(_aws_ways(""), _STS_ERROR, _dump({"__type": "ForbiddenException", "message": MARKER})),
    mutator=json_behind(3),
    secrets=SECRETS,
    share=0.05,
)
def aws_login_answers() -> Run:
    """What answers the chain of credentials: STS, a container, an instance, and where one signs in."""
    import hashlib

    import botocore.credentials
    from botocore.loaders import create_loader

    directory = Path(tempfile.mkdtemp())
    (directory / "token").write_text(_JWT)
    (directory / "config").write_text(_PROFILE)
    name = hashlib.sha1(b"https://kravn.awsapps.com/start", usedforsecurity=False).hexdigest()
    (directory / f"{name}.json").write_text(json.dumps({"accessToken": TOKEN, "expiresAt": _UNTIL}))
    run = _logged_in(_aws_ways(str(directory)), providers.ARN, b"wrapped")

    # Each session of the SDK would read megabytes of JSON again.
    loader = create_loader()

    def in_directory(data: bytes) -> object:
        with (
            mock.patch.object(botocore.credentials.SSOProvider, "_SSO_TOKEN_CACHE_DIR", str(directory)),
            mock.patch("botocore.session.create_loader", return_value=loader),
        ):
            return run(data)

    return in_directory


# --- Google Cloud ----------------------------------------------------------------------------------------------------

_USER: Final = {
    "type": "authorized_user",
    "client_id": "client.apps.googleusercontent.com",
    "client_secret": TOKEN,
    "refresh_token": TOKEN,
    "quota_project_id": "kravn-test",
}
_IMPERSONATE: Final = "https://iamcredentials.googleapis.com/v1/projects/-/serviceAccounts/a@b.test:generateAccessToken"
_IMPERSONATED: Final = {
    "type": "impersonated_service_account",
    "service_account_impersonation_url": _IMPERSONATE,
    "delegates": [],
    "source_credentials": _USER,
}


def _external(source: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {
        "type": "external_account",
        "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/q",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": "https://sts.googleapis.com/v1/token",
        "credential_source": source,
        **other,
    }


_LINK_LOCAL: Final = "http://169.254.169.254/latest"
_ON_AWS: Final = _external(
    {
        "environment_id": "aws1",
        "region_url": f"{_LINK_LOCAL}/meta-data/placement/availability-zone",
        "url": f"{_LINK_LOCAL}/meta-data/iam/security-credentials",
        "imdsv2_session_token_url": f"{_LINK_LOCAL}/api/token",
        "regional_cred_verification_url": "https://sts.{region}.amazonaws.com?Action=GetCallerIdentity",
    },
    subject_token_type="urn:ietf:params:aws:token-type:aws4_request",
)
_FROM_URL: Final = _external(
    {"url": "https://tokens.test/token", "format": {"type": "json", "subject_token_field_name": "t"}}
)


def _gcp_steps() -> list[tuple[str, bytes]]:
    granted = {"access_token": MARKER, "token_type": "Bearer", "expires_in": 3599, "scope": ""}
    exchanged = {**granted, "issued_token_type": "urn:ietf:params:oauth:token-type:access_token"}
    return [
        ("oauth2.googleapis.com", _dump(granted)),
        ("sts.googleapis.com", _dump(exchanged)),
        (":generateAccessToken", _dump({"accessToken": MARKER, "expireTime": _UNTIL})),
        ("metadata.google.internal", _dump(granted)),
        ("tokens.test", _dump({"t": MARKER})),
        ("/api/token", b"token"),
        ("availability-zone", b"eu-central-1a"),
        ("/security-credentials/role", _dump({**_ACCESS, "Code": "Success"})),
        ("/security-credentials", b"role"),
        ("", b"{}"),
    ]


def _gcp_ways() -> list[Way]:
    steps = _gcp_steps()
    named = {part: (part, body) for part, body in steps}
    chosen: list[tuple[dict[str, Any] | None, tuple[str, ...]]] = [
        (None, ("metadata.google.internal",)),
        (_USER, ("oauth2.googleapis.com",)),
        (_IMPERSONATED, (":generateAccessToken", "oauth2.googleapis.com")),
        (_FROM_URL, ("tokens.test", "sts.googleapis.com")),
        (
            _ON_AWS,
            (
                "/api/token",
                "availability-zone",
                "/security-credentials/role",
                "/security-credentials",
                "sts.googleapis.com",
            ),
        ),
    ]
    return [
        Way(partial(providers.gcp, found), [named[part] for part in parts], {"HOME": "/nonexistent"})
        for found, parts in chosen
    ]


@contextmanager
def _unwrapping() -> Iterator[None]:
    with providers.through(providers.Channel(providers.fields_message(providers.GCP_UNWRAPPED))):
        yield


@target(
    allowed=(errors.ProviderError,),
    seeds=lambda: _step_seeds(_gcp_ways(), _dump({"error": "invalid_grant", "error_description": MARKER})),
    mutator=json_behind(3),
    secrets=SECRETS,
    share=0.3,
)
def gcp_login_answers() -> Run:
    """What answers google-auth: the token services of Google, a metadata server, and the source of another token."""
    run = _logged_in(_gcp_ways(), f"{providers.GCP_KEY}/cryptoKeyVersions/1", b"wrapped")

    def unwrapped(data: bytes) -> object:
        with _unwrapping():
            return run(data)

    return unwrapped


@target(
    allowed=(errors.ProviderError, errors.ConfigurationError),
    seeds=lambda: [_dump(one) for one in (_USER, _IMPERSONATED, _FROM_URL, _ON_AWS)],
    mutator=json_behind(0),
    secrets=(TOKEN.encode(),),
    share=0.2,
)
def gcp_credentials() -> Run:
    """A credentials file, with services that answer as if nothing were wrong."""
    from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey

    wrapped, steps = WrappedKey(f"{providers.GCP_KEY}/cryptoKeyVersions/1", b"wrapped"), _gcp_steps()

    def run(data: bytes) -> object:
        with providers.one_tls_context():
            provider = providers.gcp(data.decode(errors="replace"))
        provider._login.kind()
        with (
            mock.patch.dict(os.environ, {"HOME": "/nonexistent"}, clear=True),
            answered(one_of(steps, len(steps) - 1, b"\x00{}")),
            _unwrapping(),
        ):
            return provider.unwrap(wrapped, BINDING, Deadline(30))

    return run
