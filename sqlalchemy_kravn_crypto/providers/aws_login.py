"""What requests to AWS are signed with: the SDK's own chain of credentials, on our transport and kept from its logs.

Of the SDK this uses the chain and the signature. Its clients are not used for KMS: they write the body of every request
and of every answer to their log, and with them every data key. The chain has clients of its own, for STS and SSO; what
those send passes an event whose handler may answer in place of the network, and ours does.
"""

from __future__ import annotations

import io
import logging
import pkgutil
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, Final
from urllib.parse import urlsplit

from ..exceptions import (
    CredentialError,
    CredentialExpiredError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
    SettingsError,
)
from .base import Deadline, detached
from .extras import import_extra

_botocore, _auth, _awsrequest, _config, _credentials, _errors, _session, _utils, _ = import_extra(
    "aws",
    "botocore",
    "botocore.auth",
    "botocore.awsrequest",
    "botocore.config",
    "botocore.credentials",
    "botocore.exceptions",
    "botocore.session",
    "botocore.utils",
    "requests",
)

from requests import PreparedRequest, Request, Response  # noqa: E402 - these need the extra
from urllib3 import HTTPResponse  # noqa: E402

from .transport import Route, bounded_session, provider_error_behind  # noqa: E402

NAME: Final = "aws"

PARTITIONS: Final = {
    "aws": "amazonaws.com",
    "aws-cn": "amazonaws.com.cn",
    "aws-us-gov": "amazonaws.com",
    "aws-eusc": "amazonaws.eu",
    "aws-iso": "c2s.ic.gov",
    "aws-iso-b": "sc2s.sgov.gov",
    "aws-iso-e": "cloud.adc-e.uk",
    "aws-iso-f": "csp.hci.ic.gov",
}
"""The clouds of AWS, as ARNs name them, and where their services are."""

_ROLE: Final = re.compile(rf"arn:(?:{'|'.join(PARTITIONS)}):iam::[0-9]{{12}}:role/[A-Za-z0-9_+=,.@/-]{{1,576}}")
_EXTERNAL_ID: Final = re.compile(r"[A-Za-z0-9_+=,.@:/-]{2,1224}")
_PROFILE: Final = re.compile(r"[^\x00-\x1f\x7f\]]{1,256}")

_ROLE_SESSION: Final = {"RoleSessionName": "kravn-crypto", "DurationSeconds": 900}
_GRANTED: Final = ("AccessKeyId", "SecretAccessKey", "SessionToken")

_PAUSES: Final = (0.2, 0.8)
"""Seconds before the second and the third attempt at a request that came too soon."""

_METADATA_SECONDS: Final = 2.0
"""Bound on an answer of the services at link-local addresses. Where there are none, what is sent to them is lost."""

_TRANSIENT: Final = frozenset(
    {
        "DependencyTimeoutException",
        "IDPCommunicationError",
        "InternalFailure",
        "KMSInternalException",
        "KeyUnavailableException",
        "LimitExceededException",
        "RequestLimitExceeded",
        "ServiceUnavailable",
        "ServiceUnavailableException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException"})
_UNKNOWN: Final = frozenset(
    {
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "UnrecognizedClientException",
    }
)
_MISSIGNED: Final = frozenset(
    {
        "IncompleteSignature",
        "IncompleteSignatureException",
        "InvalidSignatureException",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
    }
)
_NOT_OPEN: Final = frozenset({"OptInRequired", "RegionDisabledException"})
_LOGIN_DENIED: Final = frozenset(
    {"AccessDenied", "AccessDeniedException", "ForbiddenException", "IDPRejectedClaim", "InvalidIdentityToken"}
)

# What the chain raises, by name: not every release of the SDK has them all.
_SIGNED_OUT: Final = frozenset({"LoginError", "SSOError", "TokenRetrievalError"})
_UNEXPECTED: Final = frozenset({"AttributeError", "KeyError", "RecursionError", "ResponseParserError", "TypeError"})
"""What the chain raises for an answer that it takes for granted is otherwise."""

_silenced: ContextVar[bool] = ContextVar("_silenced", default=False)


@dataclass(frozen=True, slots=True)
class CredentialSort:
    """Of what sort credentials are.

    :ivar method: where the chain found them, in its own words, such as ``env`` or ``iam-role``.
    :ivar is_temporary: whether they end by themselves.
    :ivar ends: when, if it is known; then they are renewed, too.
    """

    method: str
    is_temporary: bool
    ends: datetime | None


class AwsLogin:
    """Finds credentials anew for every operation, and signs with them.

    They come from the chain that every SDK of AWS has: environment, profile, web identity, container, instance.

    :param region: the region whose KMS and STS are asked.
    :param route: how the requests travel.
    :param profile: the profile of the shared configuration to use; then not the environment.
    :param role: the ARN of a role to assume with what the chain finds.
    :param external_id: what the role's trust policy asks for, if it does.
    :raises SettingsError: if one of them is not what it must be.
    """

    def __init__(
        self, region: str, route: Route, *, profile: str | None, role: str | None, external_id: str | None
    ) -> None:
        if profile is not None and not _PROFILE.fullmatch(profile):
            raise SettingsError("KRAVN_KMS_AWS_PROFILE must be the name of a profile, of up to 256 characters.")
        if role is not None and not _ROLE.fullmatch(role):
            raise SettingsError(
                "KRAVN_KMS_AWS_ROLE must be the ARN of a role, such as arn:aws:iam::111122223333:role/kravn."
            )
        if external_id is not None and (role is None or not _EXTERNAL_ID.fullmatch(external_id)):
            raise SettingsError(
                "KRAVN_KMS_AWS_EXTERNAL_ID must be 2 to 1,224 ASCII letters, digits and characters of _+=,.@:/-. It "
                "needs KRAVN_KMS_AWS_ROLE."
            )
        self._region = region
        self._route = route
        self._profile = profile
        self._role = role
        self._external_id = external_id

    def post(self, service: str, url: str, headers: Mapping[str, str], body: bytes, deadline: Deadline) -> Response:
        """Sign a request, send it, and return the answer whatever its status.

        :raises ProviderError: if there are no credentials, or no answer.
        """
        error: ProviderError
        try:
            with _silence():
                signed = _awsrequest.AWSRequest(method="POST", url=url, headers=headers, data=body)
                _auth.SigV4Auth(self._found(self._sdk_session(deadline)), service, self._region).add_auth(signed)
            request = Request("POST", url, headers=dict(signed.headers.items()), data=body).prepare()
            return _send(request, deadline, self._route)
        # Whatever the SDK raises may quote credentials, and callers are promised ProviderErrors.
        except Exception as raised:  # noqa: BLE001
            error = provider_error_behind(raised) or _login_error(raised)
        raise detached(error)

    def sort(self, deadline: Deadline) -> CredentialSort:
        """Return of what sort the credentials are, and see that the role can be assumed, if there is one.

        :raises ProviderError: if there are none.
        """
        error: ProviderError
        try:
            with _silence():
                session = self._sdk_session(deadline)
                self._found(session)
                found = _in_chain(session)
                ends = getattr(found, "_expiry_time", None)  # those that are renewed have it, and tell it in no way
                has_token = bool(found.get_frozen_credentials().token)
                return CredentialSort(str(found.method), has_token, ends if isinstance(ends, datetime) else None)
        except Exception as raised:  # noqa: BLE001 - as above
            error = provider_error_behind(raised) or _login_error(raised)
        raise detached(error)

    def _found(self, session: Any) -> Any:
        """Return credentials as they are now."""
        found = _in_chain(session)
        # A web identity, for one, is exchanged for credentials only now.
        credentials = found.get_frozen_credentials() if self._role is None else self._assumed(session)
        parts = (credentials.access_key, credentials.secret_key, credentials.token or "")
        if not all(part.isascii() and part.isprintable() and " " not in part for part in parts):
            raise CredentialError(
                "The AWS credentials hold characters that none have, such as a line break. Check where they are set.",
                provider=NAME,
            )
        return credentials

    def _assumed(self, session: Any) -> Any:
        external_id = {} if self._external_id is None else {"ExternalId": self._external_id}
        answer = session.create_client("sts").assume_role(RoleArn=self._role, **_ROLE_SESSION, **external_id)
        granted = answer.get("Credentials", {})
        if not all(granted.get(name) for name in _GRANTED):
            raise _malformed()
        return _credentials.ReadOnlyCredentials(*(granted[name] for name in _GRANTED))

    def _sdk_session(self, deadline: Deadline) -> Any:
        """Make a session of the SDK that sends nothing by itself, and only to AWS's own endpoints."""
        session = _session.Session(profile=self._profile)
        for name, value in {
            "region": self._region,
            "sts_regional_endpoints": "regional",
            "defaults_mode": "legacy",  # "auto" asks the instance where it is
            "csm_enabled": False,  # reports every request to a port of this host
            "metadata_service_num_attempts": 1,
        }.items():
            session.set_config_variable(name, value)
        once = {"total_max_attempts": 1, "mode": "standard"}
        session.set_default_client_config(_config.Config(retries=once, ignore_configured_endpoint_urls=True))
        session.register("before-send", lambda request, **_: _for_sdk(self._log_in(request, deadline)))
        chain = session.get_component("credential_provider")
        metadata = _MetadataSession(deadline, self._route)
        container = _utils.ContainerMetadataFetcher(session=metadata, sleep=self._route.sleep)
        _replace(chain.get_provider("container-role"), "_fetcher", container)
        _replace(chain.get_provider("iam-role")._role_fetcher, "_session", metadata)  # noqa: SLF001 - no other way
        _replace(chain.get_provider("assume-role"), "_prompter", _refuse_to_prompt)
        return session

    def _log_in(self, request: Any, deadline: Deadline) -> Response:
        """Send a request of the chain's own clients, to STS or SSO."""
        sent = _from_sdk(request)
        try:
            return _send(sent, deadline, self._route)
        except ProviderUnavailableError as raised:
            reason = str(raised)
        raise ProviderUnavailableError(
            f"Logging in to AWS needs {urlsplit(sent.url or '').hostname}; from a VPC without a way out it takes an "
            f"endpoint for that, too. {reason}",
            provider=NAME,
        )


def _in_chain(session: Any) -> Any:
    """Return what the chain finds, once for a session."""
    found = session.get_credentials()
    if found is None:
        raise CredentialError(
            "No AWS credentials were found: not in the environment, nor in the shared configuration, and neither "
            "a container nor the instance offers any. Give the process a role, or set KRAVN_KMS_AWS_PROFILE.",
            provider=NAME,
        )
    return found


class _MetadataSession:
    """The HTTP session of the chain for the services that give a container or an instance its credentials."""

    def __init__(self, deadline: Deadline, route: Route) -> None:
        self._deadline = deadline
        self._route = route

    def send(self, request: Any) -> Any:
        """Send a request, and say that nobody is there where the SDK would find that out."""
        soon = Deadline(min(_METADATA_SECONDS, self._deadline.remaining(NAME)))
        try:
            return _for_sdk(_send(_from_sdk(request), soon, self._route, plain_http=True))
        except ProviderUnavailableError:
            self._deadline.remaining(NAME)
        raise _errors.ConnectTimeoutError(endpoint_url=request.url)


def refusal(code: str, status: int, service: str) -> ProviderError | None:
    """Return what an answer means that any service of AWS may give, or ``None`` for another.

    :param code: the code of the error in the answer.
    :param status: its HTTP status.
    :param service: the service that gave it, for the message.
    """
    if status == 429 or status >= 500 or code in _TRANSIENT:
        return ProviderUnavailableError(
            f"AWS {service} could not serve the request (HTTP {status}{f', {code}' if code in _TRANSIENT else ''}). "
            "Check the status of AWS in this region and the account's request quotas, then start again.",
            provider=NAME,
        )
    if code in _EXPIRED:
        return CredentialExpiredError(
            f"AWS {service} says that the credentials have expired. Renew them where they come from; they are read "
            "anew for every operation.",
            provider=NAME,
        )
    if code in _UNKNOWN:
        return ProviderDeniedError(
            f"AWS {service} does not know the credentials: they were deleted or revoked, or are for another cloud than "
            "that of the key.",
            provider=NAME,
        )
    if code in _MISSIGNED:
        return ProviderDeniedError(
            f"AWS {service} did not accept the signature. Either the secret access key is wrong, or this machine's "
            "clock is off by minutes.",
            provider=NAME,
        )
    if code in _NOT_OPEN:
        return ProviderDeniedError(
            f"AWS {service} is not open to this account in this region. Enable the region for the account.",
            provider=NAME,
        )
    return None


def _send(request: PreparedRequest, deadline: Deadline, route: Route, *, plain_http: bool = False) -> Response:
    """Send a request, and again if AWS says that it came too soon.

    It says so with status 400, which the transport does not repeat.
    """
    with bounded_session(deadline, NAME, route, plain_http=plain_http) as session:
        response = session.send(request)
        for pause in _PAUSES:
            if response.status_code != 400 or b"Throttling" not in response.content:
                break
            if pause >= deadline.remaining(NAME):
                break
            route.sleep(pause)
            response = session.send(request)
        return response


def _login_error(raised: Exception) -> ProviderError:
    """Return what is to be said where the chain raised an exception of its own, and not a word of that."""
    kinds = {kind.__name__ for kind in type(raised).__mro__}
    if isinstance(raised, _errors.ClientError):
        details = raised.response
        status = details.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _login_refusal(details.get("Error", {}).get("Code", ""), status)
    if kinds & _SIGNED_OUT:
        return CredentialExpiredError(
            "The AWS profile needs somebody to sign in, or the sign-in has expired: aws sso login. A service should "
            "have a role instead.",
            provider=NAME,
        )
    if kinds & _UNEXPECTED:
        return _malformed()
    if type(raised) is RuntimeError:
        return CredentialExpiredError(
            "What gives this process its AWS credentials gave some that have expired. Check the clock, and what "
            "renews them.",
            provider=NAME,
        )
    # The names of the SDK's exceptions say what is wrong, and unlike their messages nothing else.
    return CredentialError(
        f"The AWS credentials cannot be had ({type(raised).__name__}). Check the variables AWS_*, the profile and its "
        "files, or the role that the container or the instance is to have.",
        provider=NAME,
    )


def _login_refusal(code: str, status: int) -> ProviderError:
    found = refusal(code, status, "STS")
    if found is not None:
        return found
    if code in _LOGIN_DENIED:
        return ProviderDeniedError(
            "AWS refused to let this process take on its role. Check KRAVN_KMS_AWS_ROLE, KRAVN_KMS_AWS_EXTERNAL_ID, "
            "the role's trust policy, and that the identity that assumes it has the right sts:AssumeRole.",
            provider=NAME,
        )
    return _malformed()


def _malformed() -> ProviderResponseError:
    return ProviderResponseError(
        "What answered where this process logs in did not answer as AWS does. Check that no proxy is in between.",
        provider=NAME,
    )


def _refuse_to_prompt(_prompt: object) -> str:
    raise CredentialError(
        "The AWS profile asks for the code of an MFA device, and nobody is there to type it. Use another profile.",
        provider=NAME,
    )


def _replace(holder: object, name: str, value: object) -> None:
    """Replace an attribute, and see that it was there: what a later SDK renames would quietly stay as it was."""
    if not hasattr(holder, name):
        raise ProviderError(
            "This release of botocore is another than the AWS provider knows. Install an earlier one, and report this.",
            provider=NAME,
        )
    setattr(holder, name, value)


def _from_sdk(request: Any) -> PreparedRequest:
    headers = {name: value if isinstance(value, str) else value.decode() for name, value in request.headers.items()}
    return Request(request.method, request.url, headers=headers, data=request.body).prepare()


def _for_sdk(response: Response) -> Any:
    raw = HTTPResponse(io.BytesIO(response.content), preload_content=False)
    return _awsrequest.AWSResponse(response.url, response.status_code, response.headers, raw)


# --- The SDK's logs --------------------------------------------------------------------------------------------------


class _Silence(logging.Filter):
    """Drops what the SDK logs while it works for us, in this thread only: headers, tokens, whole answers of STS."""

    def filter(self, _record: logging.LogRecord) -> bool:
        return not _silenced.get()


_SILENCE: Final = _Silence()


@contextmanager
def _silence() -> Iterator[None]:
    # A filter counts for the logger that it is on, not for those below. Adding it once more changes nothing.
    for logger in _loggers():
        logger.addFilter(_SILENCE)
    before = _silenced.set(True)
    try:
        yield
    finally:
        _silenced.reset(before)


@cache
def _loggers() -> tuple[logging.Logger, ...]:
    """Return the loggers of all modules of the SDK, also of those that it imports later."""
    names = ["botocore"]
    for module in pkgutil.iter_modules(_botocore.__path__, "botocore."):
        names.append(module.name)
        if module.ispkg:
            inside = [f"{path}/{module.name.rpartition('.')[2]}" for path in _botocore.__path__]
            names += [inner.name for inner in pkgutil.iter_modules(inside, f"{module.name}.")]
    return tuple(map(logging.getLogger, names))
