"""How to log in to Google Cloud: from the credentials, or from the machine, to the metadata of a call.

``google.auth.default`` finds the same credentials, and does more: it runs ``gcloud`` and asks the network for a project
that nobody needs here, goes wherever a credentials file or the environment sends it, and logs assertions. Here
google-auth signs and exchanges, and whatever it sends goes through the bounded session, to Google's token services, to
the metadata server of the machine, or to the one address that the credentials name for their own token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from google.auth import aws, identity_pool, impersonated_credentials
from google.oauth2 import credentials as user_credentials
from google.oauth2 import service_account
from requests import Request, Response, Session

from ..exceptions import (
    CredentialError,
    CredentialExpiredError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
)
from ..secrecy import KeepsSecret
from .base import Deadline, detached
from .credentials import Credential, read_secret
from .transport import Route, bounded_session, json_object, provider_error_behind

SETTING: Final = "KRAVN_KMS_GCP_CREDENTIALS"

_NAME: Final = "gcp"
_SCOPE: Final = "https://www.googleapis.com/auth/cloudkms"

# Those of Google itself, of a region, and of a Private Service Connect endpoint.
_TOKEN_SERVICE: Final = re.compile(
    r"(?:oauth2|sts|iamcredentials)(?:-[a-z0-9-]{1,63}\.p|\.[a-z0-9-]{1,63}\.rep)?\.googleapis\.com"
)
_METADATA_HOST: Final = "metadata.google.internal"
_METADATA_TOKEN: Final = f"http://{_METADATA_HOST}/computeMetadata/v1/instance/service-accounts/default/token"
_METADATA_FLAVOR: Final = {"Metadata-Flavor": "Google"}

_PLAIN_HOSTS: Final = frozenset({_METADATA_HOST, "169.254.169.254"})
"""Metadata servers, the only ones without TLS: they are beside the machine, and nothing routes their address."""

_TOKEN: Final = re.compile(r"[!-~]{1,16384}")
_PROJECT: Final = re.compile(r"[a-z0-9.:-]{1,128}")


class _Credentials(Protocol):
    """The two calls of google-auth's credentials, of which few have type annotations."""

    def refresh(self, request: Callable[..., _Answer]) -> None: ...

    def apply(self, headers: dict[str, str]) -> None: ...


class GoogleLogin(KeepsSecret):
    """Logs in anew for every operation, since credentials are renewed and revoked while a process runs.

    :param credentials: the text of a credentials file; ``None`` for the default ones of the machine: the file that
        ``GOOGLE_APPLICATION_CREDENTIALS`` names, that of ``gcloud``, or the metadata server.
    :param route: how the requests travel.
    """

    def __init__(self, credentials: Credential | None, route: Route) -> None:
        self._credentials = credentials
        self._route = route

    def metadata(self, deadline: Deadline) -> list[tuple[str, str]]:
        """Log in, and return the metadata of a call that proves it.

        :raises ProviderError: if there are no credentials, or they are refused, or nobody answers in time.
        """
        found = self._found()
        exchange = _Exchange()
        error: ProviderError
        try:
            with bounded_session(deadline, _NAME, self._route, inspect=exchange.inspect, plain_http=True) as session:
                exchange.session = session
                headers = _of_machine(exchange) if found is None else _exchanged(found, exchange)
                return _checked(headers)
        except ProviderError as raised:
            error = raised
        # Whatever else the SDK raises may quote what was sent or received, and callers are promised ProviderErrors.
        except Exception as raised:  # noqa: BLE001
            error = provider_error_behind(raised) or _malformed()
        if found is None and isinstance(error, ProviderUnavailableError) and not exchange.was_answered:
            deadline.remaining(_NAME)
            error = _no_credentials()
        raise detached(error)

    def kind(self) -> str:
        """Return what sort of credentials there are, as their file names it; nothing for the machine's.

        :raises CredentialError: if they cannot be read.
        """
        found = self._found()
        kind = None if found is None else json_object(found[1].encode()).get("type")
        return kind if isinstance(kind, str) and kind in _KINDS else ""

    def _found(self) -> tuple[str, str] | None:
        """Return what names the credentials, for messages, and their text; ``None`` if they are the machine's."""
        if self._credentials is not None:
            return SETTING, self._credentials.reveal(_NAME)
        path = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or _path_of_gcloud()
        if path is None:
            return None
        text, reason = read_secret(Path(path))
        if reason:
            raise CredentialError(
                f"The default credentials of Google Cloud are in {path}, which cannot be used: {reason}. Check "
                f"GOOGLE_APPLICATION_CREDENTIALS, or set {SETTING}_FILE.",
                provider=_NAME,
            )
        return path, text


class _Answer:
    """An answer as google-auth reads it."""

    def __init__(self, response: Response) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.data = response.content


class _Exchange:
    """What google-auth takes for its transport, in place of its own one.

    That one logs requests with assertions in them, mounts other adapters for mutual TLS, and has no idea of where it
    may go.
    """

    def __init__(self) -> None:
        self.session = Session()
        self.source = ""
        """Where the credentials say that their own token is from, if that is an address."""
        self.was_answered = False

    def __call__(
        self,
        url: str,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        **_: object,
    ) -> _Answer:
        """Send a request. Time-outs and client certificates are not the SDK's to choose."""
        request = self.session.prepare_request(Request(method, url, headers=headers, data=body))
        if not self._may_go_to(request.url or ""):
            raise CredentialError(
                "The credentials of Google Cloud, or the environment, name an address that no login may go to. It "
                "must be https:// and a token service of Google (oauth2, sts or iamcredentials.googleapis.com), the "
                "https:// address in credential_source, or http:// and the metadata server.",
                provider=_NAME,
            )
        return _Answer(self.session.send(request))

    def _may_go_to(self, url: str) -> bool:
        # The transport takes apart the same text in the same way.
        parts, source = urlsplit(url), urlsplit(self.source)
        if parts.scheme == "http":
            return parts.netloc in _PLAIN_HOSTS
        return _TOKEN_SERVICE.fullmatch(parts.netloc) is not None or parts[:2] == source[:2]

    def inspect(self, response: Response) -> None:
        """Keep from the SDK what it would quote in an exception, or try again without an end."""
        self.was_answered = True
        host, status = urlsplit(response.url).netloc, response.status_code
        if status == 429 or status >= 500:
            raise ProviderUnavailableError(
                f"{_who(host)} could not serve the request (HTTP {status}). Check the status of Google Cloud, then "
                "start again.",
                provider=_NAME,
            )
        if status != 200:
            raise _refusal(host, response)


def _of_machine(exchange: _Exchange) -> dict[str, str]:
    """Log in as the service account that the machine or the pod runs as.

    One request, and not google-auth's ``compute_engine``: that one asks for more, and waits for certificates.
    """
    answer = exchange(f"{_METADATA_TOKEN}?scopes={_SCOPE}", headers=_METADATA_FLAVOR)
    token = json_object(answer.data).get("access_token")
    # Whoever answers for this name on another network does not send the header.
    if answer.headers.get("Metadata-Flavor") != "Google" or not isinstance(token, str):
        raise _malformed()
    return {"authorization": f"Bearer {token}"}


def _exchanged(found: tuple[str, str], exchange: _Exchange) -> dict[str, str]:
    """Log in with credentials, by whatever exchange they need."""
    name, text = found
    credentials = _loaded(json_object(text.encode()), exchange)
    if credentials is None:
        raise CredentialError(
            f"{name} holds no credentials of Google Cloud that can be used here. They must be the JSON of a service "
            "account, an external account whose token is from a file, an address or AWS, an impersonated service "
            "account, or a user of gcloud. A program is not run for a token, and client certificates are not sent.",
            provider=_NAME,
        )
    failed = False
    headers: dict[str, str] = {}
    try:
        credentials.refresh(exchange)
        credentials.apply(headers)
    except ProviderError:
        raise
    except Exception as raised:
        if provider_error_behind(raised) or exchange.was_answered:
            raise
        failed = True
    if failed:
        raise CredentialError(
            f"What {name} says cannot be logged in with: a file or a variable that it goes by is missing, or a key in "
            "it is damaged.",
            provider=_NAME,
        )
    return headers


def _loaded(info: dict[str, Any], exchange: _Exchange) -> _Credentials | None:
    """Return the credentials, or ``None`` for those that are malformed or of another kind."""
    kind = info.get("type")
    make = _KINDS.get(kind) if isinstance(kind, str) else None
    if make is None:
        return None
    try:
        exchange.source = str(info.get("credential_source", {}).get("url", ""))
        return make(info)
    except Exception:  # noqa: BLE001 - a private key may be in what the SDK raises
        return None


def _of_service_account(info: dict[str, Any]) -> _Credentials:
    # Google takes a token that the account signed itself: one request less, to one host less.
    load: Callable[..., Any] = service_account.Credentials.from_service_account_info
    credentials: _Credentials = load(info, scopes=[_SCOPE]).with_always_use_jwt_access(True)  # noqa: FBT003 - the SDK's
    return credentials


def _of_user(info: dict[str, Any]) -> _Credentials:
    # Without a scope, since gcloud asked the user for those there are.
    load: Callable[..., _Credentials] = user_credentials.Credentials.from_authorized_user_info
    return load(info)


def _of_external_account(info: dict[str, Any]) -> _Credentials:
    source = info["credential_source"]
    if "certificate" in source:
        raise ValueError
    load: Callable[..., _Credentials] = (
        aws.Credentials.from_info if "environment_id" in source else identity_pool.Credentials.from_info
    )
    return load(info, scopes=[_SCOPE])


def _of_impersonated(info: dict[str, Any]) -> _Credentials:
    load: Callable[..., _Credentials] = impersonated_credentials.Credentials.from_impersonated_service_account_info
    return load(info, scopes=[_SCOPE])


_KINDS: Final[dict[str, Callable[[dict[str, Any]], _Credentials]]] = {
    "service_account": _of_service_account,
    "authorized_user": _of_user,
    "external_account": _of_external_account,
    "impersonated_service_account": _of_impersonated,
}


def _checked(headers: dict[str, str]) -> list[tuple[str, str]]:
    """Return the metadata, of which gRPC would quote in an exception what it does not take."""
    scheme, _, token = headers["authorization"].partition(" ")
    if scheme != "Bearer" or not _TOKEN.fullmatch(token):
        raise _malformed()
    metadata = [("authorization", f"Bearer {token}")]
    project = headers.get("x-goog-user-project")
    if project is not None and _PROJECT.fullmatch(project):
        metadata.append(("x-goog-user-project", project))
    return metadata


def _path_of_gcloud() -> str | None:
    """Return the path of what ``gcloud auth application-default login`` wrote, if it did."""
    directory = os.environ.get("CLOUDSDK_CONFIG")
    if not directory and os.name == "nt":
        directory = str(Path(os.environ.get("APPDATA", "")) / "gcloud")
    path = Path(directory or "~/.config/gcloud").expanduser() / "application_default_credentials.json"
    return str(path) if path.is_file() else None


def _who(host: str) -> str:
    if host == _METADATA_HOST:
        return "The metadata server"
    return "The token service of Google" if _TOKEN_SERVICE.fullmatch(host) else "The source of the external token"


def _refusal(host: str, response: Response) -> ProviderError:
    if host == _METADATA_HOST and response.status_code == 404:
        return CredentialError(
            "The metadata server knows of no service account: this machine runs as none. Attach one to it, or set "
            f"{SETTING}_FILE.",
            provider=_NAME,
        )
    if _TOKEN_SERVICE.fullmatch(host) and json_object(response.content).get("error") == "invalid_grant":
        return CredentialExpiredError(
            "Google does not accept what was to be logged in with, or no longer: it has expired or was revoked, or "
            f"its account was deleted. Renew what {SETTING}_FILE or the default credentials name, and check the clock "
            "of this machine.",
            provider=_NAME,
        )
    return ProviderDeniedError(
        f"{_who(host)} refused to log in (HTTP {response.status_code}). Check the credentials: the audience, the "
        "attribute condition of the workload identity pool, and the role Workload Identity User or Service Account "
        "Token Creator on a service account that is to be impersonated.",
        provider=_NAME,
    )


def _no_credentials() -> CredentialError:
    return CredentialError(
        f"There is nothing to log in to Google Cloud with: {SETTING} is not set, nor GOOGLE_APPLICATION_CREDENTIALS, "
        "gcloud has left no credentials, and there is no metadata server, as on Google's own machines. Set "
        f"{SETTING}_FILE.",
        provider=_NAME,
    )


def _malformed() -> ProviderResponseError:
    return ProviderResponseError(
        "What answered the login did not answer as a token service or a metadata server of Google does. Check that no "
        "proxy is in between.",
        provider=_NAME,
    )
