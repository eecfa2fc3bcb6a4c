"""What a configuration for Vault is worth: the way there, how long its token lasts, and what else that may do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from requests import Response

from ..exceptions import ProviderError, ProviderUnavailableError
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
    warning,
)
from .inspection import Server, inspect_server
from .transport import Route, json_object
from .vault_login import PROVIDER, ClientCertificate, GivenToken, Login, outage, refuses_token, says

_LOOKUP: Final = "auth/token/lookup-self"
_CAPABILITIES: Final = "sys/capabilities-self"
_MAX_TTL: Final = 100 * 366 * 86_400  # seconds; of what lasts longer, no date is to be told

_LEAST_PRIVILEGE: Final = "Give it a policy of its own that allows no more than docs/kms-vault.md says."


@dataclass(frozen=True, slots=True)
class _Excess:
    """A right that should not be there.

    :ivar path: on what, with places for the mount and the key.
    :ivar capabilities: of which one is enough.
    :ivar meaning: what can be done with it.
    """

    path: str
    capabilities: frozenset[str]
    meaning: str


_WRITES: Final = frozenset({"create", "update"})
_DANGEROUS: Final = (
    _Excess("{mount}/keys/{key}", frozenset({"delete"}), "delete the key"),
    _Excess("{mount}/keys/{key}/config", _WRITES, "allow that the key is deleted or exported"),
    _Excess("{mount}/keys/{key}/trim", _WRITES, "destroy versions of the key"),
    _Excess("{mount}/export/encryption-key/{key}", frozenset({"read"}), "export the key"),
    _Excess("{mount}/backup/{key}", frozenset({"read"}), "take the key along as a backup"),
    _Excess("sys/policies/acl/{key}", _WRITES, "write policies, and so give itself any right"),
)
_ENCRYPT: Final = "{mount}/encrypt/{key}"


@dataclass(frozen=True, slots=True)
class ExaminedVault:
    """A provider's configuration, as it is examined.

    :ivar server: where it is.
    :ivar route: how it is reached.
    :ivar current_route: returns the same, with the client certificate as it is now.
    :ivar login: how a token is come by.
    :ivar send: gets a token and sends one request with it to a path below ``/v1/``: a POST if there is a body.
    :ivar client_certificate: what is shown in the TLS handshake, if anything.
    """

    server: Server
    route: Route
    current_route: Callable[[], Route]
    login: Login
    send: Callable[[str, Mapping[str, Any] | None], Response]
    client_certificate: ClientCertificate | None
    mount: str
    key: str


def examine_vault(vault: ExaminedVault, deadline: Deadline) -> Iterator[Finding]:
    """Examine it. Nothing is changed, except that logging in and asking use up what has a number of uses."""
    route, failure = _route(vault)
    reached = list(inspect_server(vault.server, deadline, PROVIDER, route))
    yield from reached
    if failure is not None:
        yield failure
    elif all(finding.level is not Level.BAD for finding in reached):
        yield from _login(vault, deadline.seconds)


def _route(vault: ExaminedVault) -> tuple[Route, Finding | None]:
    """Return how to get there, be it without the client certificate, and what is wrong with that."""
    try:
        return vault.current_route(), None
    except ProviderError as error:
        return vault.route, bad(CREDENTIALS, str(error))


# --- What is logged in with ------------------------------------------------------------------------------------------


def _long_lived(vault: ExaminedVault) -> Iterator[Finding]:
    """Find out until when that is valid which somebody else renews."""
    lasting = {"The JWT": vault.login.validity}
    if vault.client_certificate is not None:
        lasting["The certificate in KRAVN_KMS_VAULT_CLIENT_CERT"] = vault.client_certificate.validity
    for what, validity in lasting.items():
        found = _validity(validity)
        if found is not None:
            yield valid_until(CREDENTIALS, what, found, advice="See to it that it is renewed.")


def _validity(validity: Callable[[], Validity | None]) -> Validity | None:
    try:
        return validity()
    except ProviderError:
        return None  # logging in fails for the same reason, and that is told


def _login(vault: ExaminedVault, timeout: float) -> Iterator[Finding]:
    """Log in, and find out how long that lasts and what may be done with it."""
    response = _answer(vault, _LOOKUP, None)
    if isinstance(response, ProviderError):
        yield _failed(response)
        yield unchecked(RIGHTS, "that needs a token.")
        return
    if response.status_code == 200 or _lacks_right(response):
        yield good(CREDENTIALS, f"The Vault accepts {vault.login.subject}.")
        yield from _long_lived(vault)
    yield from _lifetime(vault, response, timeout)
    yield from _rights(vault)


def _answer(vault: ExaminedVault, path: str, body: Mapping[str, Any] | None) -> Response | ProviderError:
    """Return the answer to a request with a token, or what is wrong with the Vault or with the token."""
    try:
        response = vault.send(path, body)
    except ProviderError as error:
        return error
    if response.status_code == 403 and refuses_token(response):
        return vault.login.not_accepted()
    return outage(response, vault.server.place) or response


def _failed(error: ProviderError) -> Finding:
    return bad(REACHABILITY if isinstance(error, ProviderUnavailableError) else CREDENTIALS, str(error))


def _lacks_right(response: Response) -> bool:
    return response.status_code == 403 and says(response, "permission denied")


def _lifetime(vault: ExaminedVault, response: Response, timeout: float) -> Iterator[Finding]:
    data = _data(response)
    if _lacks_right(response):
        yield unchecked(
            CREDENTIALS,
            f"how long {vault.login.subject} lasts.",
            f"To see it: read on {_LOOKUP}, which the policy default has.",
        )
        return
    ttl, full, uses = (_number(data, name) for name in ("ttl", "creation_ttl", "num_uses"))
    if response.status_code != 200 or ttl is None or full is None or uses is None:
        yield unchecked(CREDENTIALS, f"how long {vault.login.subject} lasts: no Vault answers {_LOOKUP} like this.")
        return
    if not isinstance(vault.login, GivenToken):
        yield _each_login(ttl, timeout)
        return
    if uses:
        yield warning(CREDENTIALS, f"The token is good for {uses} more requests.", "Take one without token_num_uses.")
    if ttl:
        end = utc_now() + timedelta(seconds=ttl)
        advice = "Have it renewed in a file, KRAVN_KMS_VAULT_TOKEN_FILE, or log in by an auth method."
        yield valid_until(CREDENTIALS, "The token", (end - timedelta(seconds=full), end), advice=advice)
    else:
        yield warning(CREDENTIALS, "The token never expires.", "Log in by an auth method, with short-lived tokens.")


def _each_login(ttl: int, timeout: float) -> Finding:
    message = f"Each login is good for {ttl} seconds."
    if 0 < ttl < timeout:
        return warning(CREDENTIALS, message, "Let token_ttl of the role be longer than KRAVN_KMS_TIMEOUT.")
    return good(CREDENTIALS, message)


def _number(data: Mapping[str, Any], name: str) -> int | None:
    value = data.get(name)
    return value if type(value) is int and 0 <= value <= _MAX_TTL else None


# --- What may be done with it ----------------------------------------------------------------------------------------


def _rights(vault: ExaminedVault) -> Iterator[Finding]:
    """Ask what the token may do besides what it is for."""
    paths = {excess: excess.path.format(mount=vault.mount, key=vault.key) for excess in _DANGEROUS}
    encrypt = _ENCRYPT.format(mount=vault.mount, key=vault.key)
    response = _answer(vault, _CAPABILITIES, {"paths": [*paths.values(), encrypt]})
    if isinstance(response, ProviderError):
        yield unchecked(RIGHTS, str(response))
        return
    if _lacks_right(response):
        yield unchecked(
            RIGHTS,
            "what else the token may do.",
            f"To see it: update on {_CAPABILITIES}, which the policy default has.",
        )
        return
    held = {path: _capabilities(response, path) for path in (*paths.values(), encrypt)}
    if response.status_code != 200 or None in held.values():
        yield unchecked(RIGHTS, f"what else the token may do: no Vault answers {_CAPABILITIES} like this.")
        return
    granted = {path: capabilities or frozenset() for path, capabilities in held.items()}
    if any("root" in capabilities for capabilities in granted.values()):
        yield bad(RIGHTS, "This is a root token: it may do everything in this Vault.", _LEAST_PRIVILEGE)
        return
    yield from _excess({excess: granted[path] for excess, path in paths.items()}, granted[encrypt], encrypt)


def _excess(held: Mapping[_Excess, frozenset[str]], on_encrypt: frozenset[str], encrypt: str) -> Iterator[Finding]:
    dangerous = [excess.meaning for excess, capabilities in held.items() if capabilities & excess.capabilities]
    if dangerous:
        yield bad(RIGHTS, f"Your token may also {'; '.join(dangerous)}.", _LEAST_PRIVILEGE)
    if "create" in on_encrypt:
        yield warning(
            RIGHTS,
            "The token may make keys: with a misspelt KRAVN_KMS_VAULT_KEY, Transit makes a new one.",
            f"Leave out create on {encrypt}; update is enough.",
        )
    if not dangerous and "create" not in on_encrypt:
        yield good(RIGHTS, "The token may neither make, delete, reconfigure or export the key nor write policies.")


def _capabilities(response: Response, path: str) -> frozenset[str] | None:
    value = _data(response).get(path)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return None
    return frozenset(value)


def _data(response: Response) -> Mapping[str, Any]:
    data = json_object(response.content).get("data")
    return data if isinstance(data, dict) else {}
