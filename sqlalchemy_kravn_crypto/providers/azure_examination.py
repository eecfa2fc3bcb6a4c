"""What a configuration for Azure is worth: the way to the key vault and to the login, how long that lasts, and rights.

Nobody is told by Azure what else they may do. What can be seen without a try that changes something is whether the key
may be read, and then what the key vault says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..exceptions import ProviderError, ProviderUnavailableError
from .azure_login import PROVIDER, Login
from .base import Deadline, Finding, Level
from .findings import (
    CREDENTIALS,
    REACHABILITY,
    RIGHTS,
    Validity,
    bad,
    good,
    unchecked,
    utc_now,
    valid_until,
    validity_of,
    warning,
)
from .inspection import Server, inspect_server
from .transport import Route

if TYPE_CHECKING:
    from azure.core.credentials import AccessToken, TokenCredential

_MASTER_KEY: Final = "master key"
_BY_THE_NETWORK: Final = frozenset({"forbiddenbyconnection", "forbiddenbyfirewall"})


class NotedCredential:
    """Logs in as another credential does, and notes how long that lasts.

    :ivar ends: until when the login is good, in seconds since 1970; ``None`` before there was one.
    """

    def __init__(self, credential: TokenCredential) -> None:
        self._credential = credential
        self.ends: float | None = None

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        """Log in."""
        token = self._credential.get_token(*scopes, **options)
        self.ends = token.expires_on
        return token


@dataclass(frozen=True, slots=True)
class ReadKey:
    """What came of an attempt to read the master key.

    :ivar status: the HTTP status.
    :ivar body: what the key vault says.
    :ivar codes: of the error and those inside of it, in lower case.
    :ivar login_ends: until when the login is good that it took, in seconds since 1970.
    """

    status: int
    body: Mapping[str, object]
    codes: frozenset[str]
    login_ends: float | None


@dataclass(frozen=True, slots=True)
class ExaminedAzure:
    """A provider's configuration, as it is examined.

    :ivar servers: the key vault, and where one logs in if that is over TLS.
    :ivar route: how they are reached.
    :ivar login: how it is logged in.
    :ivar read_key: logs in and reads the master key; what is neither that nor a refusal of it is raised.
    """

    servers: tuple[Server, ...]
    route: Route
    login: Login
    read_key: Callable[[], ReadKey]


def examine_azure(azure: ExaminedAzure, deadline: Deadline) -> Iterator[Finding]:
    """Examine it. Nothing is changed."""
    reached: list[Finding] = []
    for server in azure.servers:
        reached += inspect_server(server, deadline, PROVIDER, azure.route)
    yield from reached
    if any(finding.level is Level.BAD for finding in reached):
        return
    read = _answer(azure)
    if isinstance(read, ProviderError):
        yield bad(REACHABILITY if isinstance(read, ProviderUnavailableError) else CREDENTIALS, str(read))
        yield unchecked(RIGHTS, "that needs a login.")
        return
    yield from _credentials(azure, read, deadline.seconds)
    yield from _rights(read)


def _answer(azure: ExaminedAzure) -> ReadKey | ProviderError:
    try:
        return azure.read_key()
    except ProviderError as error:
        return error


# --- What is logged in with ------------------------------------------------------------------------------------------


def _credentials(azure: ExaminedAzure, read: ReadKey, timeout: float) -> Iterator[Finding]:
    if read.login_ends is None:
        yield good(CREDENTIALS, "Azure accepts the login.")
    else:
        yield _each_login(int(read.login_ends - utc_now().timestamp()), timeout)
    validity = _validity(azure.login)
    if validity is not None:
        what = f"What is in {azure.login.setting}"
        yield valid_until(CREDENTIALS, what, validity, advice="See to it that it is renewed.")
    elif azure.login.ends_unknown:
        yield unchecked(
            CREDENTIALS,
            f"until when {azure.login.setting} is valid, which takes rights in Microsoft Entra ID.",
            "Look with: az ad app credential list --id CLIENT_ID. Or log in without one: KRAVN_KMS_AZURE_AUTH.",
        )


def _each_login(seconds: int, timeout: float) -> Finding:
    message = f"Azure accepts the login, and each is good for {seconds} seconds."
    if seconds < timeout:
        return warning(CREDENTIALS, message, "Check this machine's clock.")
    return good(CREDENTIALS, message)


def _validity(login: Login) -> Validity | None:
    try:
        return login.validity()
    except ProviderError:
        return None  # it has just been logged in with; its file is being written anew


# --- What may be done, and what the key is ---------------------------------------------------------------------------


def _rights(read: ReadKey) -> Iterator[Finding]:
    if read.status == 403 and read.codes & _BY_THE_NETWORK:
        # An attempt to wrap says what to do.
        yield unchecked(RIGHTS, "the key vault does not let this host read the key, whoever logs in.")
    elif read.status == 403:
        yield good(RIGHTS, "The login may not read the key, so it has no role that is made for more than wrapping.")
    elif read.status == 404:
        # An attempt to wrap says so as well, and what to do.
        yield unchecked(RIGHTS, "there is no such key, or the login may not know of it.")
    else:
        yield warning(
            RIGHTS,
            "The login may read the key as well, as most roles allow: whoever has the public part can wrap, though not "
            "unwrap. Whether it may change or delete the key, Azure does not tell.",
            "Give it a role with the two data actions of docs/kms-azure.md alone.",
        )
        yield from _key(read.body)


def _key(body: Mapping[str, object]) -> Iterator[Finding]:
    """Tell what the key vault says of the key."""
    attributes = body.get("attributes")
    if not isinstance(attributes, dict):
        yield unchecked(_MASTER_KEY, "no key vault describes a key like this.")
        return
    if attributes.get("exportable") is True:
        yield bad(_MASTER_KEY, "The key may be exported.", "Make one that is not exportable, and rewrap.")
    validity = validity_of(attributes)
    if validity is not None:
        yield valid_until(_MASTER_KEY, "The key", validity, advice="Rotate it, then run kravn-crypto rewrap.")
