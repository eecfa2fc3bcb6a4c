"""What a configuration for Google Cloud KMS is worth: the way there, what is logged in with, and its permissions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from requests import Request, Response

from ..exceptions import ProviderError, ProviderUnavailableError
from .base import Deadline, Finding, Level, detached
from .findings import CREDENTIALS, REACHABILITY, RIGHTS, bad, good, unchecked, warning
from .gcp_login import SETTING, GoogleLogin
from .inspection import Server, inspect_server
from .transport import Route, bounded_session, json_object

_NAME: Final = "gcp"

_DANGEROUS: Final = {
    "cloudkms.cryptoKeyVersions.destroy": "destroy versions of the key",
    "cloudkms.cryptoKeyVersions.update": "disable versions of the key",
    "cloudkms.cryptoKeys.update": "change which version is primary and when one is destroyed",
    "cloudkms.cryptoKeys.setIamPolicy": "give anybody any permission on the key",
}
"""Permissions that should not be there, and what can be done with each."""


@dataclass(frozen=True, slots=True)
class ExaminedGcp:
    """A provider's configuration, as it is examined.

    :ivar server: where the KMS is; its URL ends with a slash.
    :ivar route: how it is reached.
    :ivar login: how it is logged in.
    :ivar key: the resource name of the key.
    """

    server: Server
    route: Route
    login: GoogleLogin
    key: str


def examine_gcp(gcp: ExaminedGcp, deadline: Deadline) -> Iterator[Finding]:
    """Examine it. Nothing is changed."""
    reached = list(inspect_server(gcp.server, deadline, _NAME, gcp.route))
    yield from reached
    if any(finding.level is Level.BAD for finding in reached):
        return
    metadata = _login(gcp, deadline)
    if isinstance(metadata, ProviderError):
        yield bad(REACHABILITY if isinstance(metadata, ProviderUnavailableError) else CREDENTIALS, str(metadata))
        yield unchecked(RIGHTS, "that needs a login.")
        return
    yield from _permissions(gcp, metadata, deadline)
    yield from _long_lived(gcp)


def _login(gcp: ExaminedGcp, deadline: Deadline) -> Mapping[str, str] | ProviderError:
    try:
        return dict(gcp.login.metadata(deadline))
    except ProviderError as error:
        return error


def _long_lived(gcp: ExaminedGcp) -> Iterator[Finding]:
    """Tell of a key that whoever finds it can log in with until somebody deletes it."""
    if gcp.login.kind() == "service_account":
        yield warning(
            CREDENTIALS,
            "The key of a service account is logged in with, which does not expire by itself.",
            f"Where you can, attach the account to the machine or the pod and do without {SETTING}.",
        )


# --- What may be done ------------------------------------------------------------------------------------------------


def _permissions(gcp: ExaminedGcp, metadata: Mapping[str, str], deadline: Deadline) -> Iterator[Finding]:
    """Ask which permissions there are on the key; everybody may ask that of their own."""
    response = _asked(gcp, metadata, deadline)
    if isinstance(response, ProviderError):
        yield unchecked(RIGHTS, str(response))
        return
    if response.status_code == 401:
        yield bad(
            CREDENTIALS,
            "Google does not accept the login: the service account or its key was deleted or disabled, or the clock of "
            "this machine is wrong.",
            f"Renew what {SETTING}_FILE or the default credentials name.",
        )
        yield unchecked(RIGHTS, "that needs a login.")
        return
    held = json_object(response.content).get("permissions", [])
    if response.status_code != 200 or not isinstance(held, list):
        yield unchecked(RIGHTS, f"Google does not say which permissions there are (HTTP {response.status_code}).")
        return
    yield good(CREDENTIALS, "Google accepts the login.")
    yield _excess([meaning for permission, meaning in _DANGEROUS.items() if permission in held])


def _excess(meanings: list[str]) -> Finding:
    if not meanings:
        return good(RIGHTS, "As far as Google tells, the login may neither destroy, disable or change the key.")
    return bad(
        RIGHTS,
        f"Your login may also {'; '.join(meanings)}.",
        "Give it a role of docs/kms-gcp.md on the key alone, and none on key ring or project.",
    )


def _asked(gcp: ExaminedGcp, metadata: Mapping[str, str], deadline: Deadline) -> Response | ProviderError:
    # Over HTTP, which Google serves at the same address: one method does not need a gRPC service of its own.
    request = Request(
        "POST",
        f"{gcp.server.url}v1/{gcp.key}:testIamPermissions",
        headers={**metadata, "Content-Type": "application/json"},
        data=json.dumps({"permissions": list(_DANGEROUS)}).encode(),
    ).prepare()
    try:
        with (
            bounded_session(deadline, _NAME, gcp.route) as session,
            closing(session.send(request)) as response,
        ):
            return response
    except ProviderError as error:
        return detached(error)
