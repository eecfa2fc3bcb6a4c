"""What can be found out about a server before anybody logs in: the way there, its TLS certificate, its clock."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from requests import Request

from ..exceptions import ProviderError
from .base import Deadline, Finding, detached
from .findings import CLOCK, REACHABILITY, TLS, bad, clocks_apart, good, unchecked, utc_now, valid_until
from .transport import Route, bounded_session, connected

_DATE: Final = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")  # RFC 9110

# X509_V_ERR_… of OpenSSL
_UNTRUSTED: Final = frozenset({2, 18, 19, 20, 21})
_EXPIRED: Final = 10
_NOT_YET_VALID: Final = 9
_OTHER_HOST: Final = frozenset({62, 64})


@dataclass(frozen=True, slots=True)
class Server:
    """A server that a provider speaks to.

    :param what: what it is, as in *that of the Vault*.
    :param url: one that it answers to anybody, be it with an error; nothing secret is sent there.
    :param setting: the setting that its address comes from.
    :param ca_setting: the setting of the authorities that are trusted.
    :param ca_bundle: its value; ``None`` for the public ones.
    """

    what: str
    url: str
    setting: str
    ca_setting: str
    ca_bundle: Path | str | None = None

    @property
    def place(self) -> str:
        """Its host, and its port where that is another than usual."""
        return urlsplit(self.url).netloc

    @property
    def is_encrypted(self) -> bool:
        """Whether TLS is spoken."""
        return self.url.startswith("https:")


@dataclass(frozen=True, slots=True)
class _Certificate:
    version: str
    start: datetime
    end: datetime


def inspect_server(server: Server, deadline: Deadline, provider: str, route: Route) -> Iterator[Finding]:
    """Find out whether a server can be reached by the route of a provider, who it proves to be, and what time it has.

    :param provider: the provider's name.
    """
    there = f"{server.place}{'' if route.proxy is None else f' through the proxy {_proxy(route)}'}"
    certificate: _Certificate | None = None
    refusal: ssl.SSLError | None = None
    failure: Finding | None = None
    try:
        certificate = _shown(server, deadline, provider, route)
    except ProviderError as error:
        failure = bad(REACHABILITY, str(error))
    except ssl.SSLError as error:
        refusal = error
    except (OSError, UnicodeError) as error:  # of a name that is none, the lookup says the latter
        failure = _unreachable(server, route, there, error)
    if failure is not None:
        yield failure
        return
    yield good(REACHABILITY, f"{there} takes connections.")
    if refusal is not None:
        yield _refused(server, refusal)
        return
    if certificate is not None:
        yield from _verified(server, certificate)
    yield _clock(server, deadline, provider, route)


# --- The way there, and TLS ------------------------------------------------------------------------------------------


def _shown(server: Server, deadline: Deadline, provider: str, route: Route) -> _Certificate | None:
    with connected(server.url, deadline, provider, route) as connection:
        if not isinstance(connection, ssl.SSLSocket):
            return None
        certificate = connection.getpeercert() or {}
        start, end = (str(certificate.get(field, "")) for field in ("notBefore", "notAfter"))
        return _Certificate(connection.version() or "TLS", _moment(start), _moment(end))


def _moment(of_certificate: str) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(of_certificate), UTC)


def _proxy(route: Route) -> str:
    return "" if route.proxy is None else f"{route.proxy.host}:{route.proxy.port}"


def _unreachable(server: Server, route: Route, there: str, error: OSError | UnicodeError) -> Finding:
    via = server.is_encrypted and route.proxy is not None
    setting = "KRAVN_KMS_PROXY" if via else server.setting
    if isinstance(error, socket.gaierror | UnicodeError):
        name = _proxy(route) if via else server.place
        return bad(REACHABILITY, f"The host of {name} has no address here.", f"Check {setting}, and DNS.")
    if isinstance(error, TimeoutError):
        return bad(
            REACHABILITY,
            f"{there} did not answer in time.",
            f"Check {setting}, and that the network and its firewalls let this host through.",
        )
    reason = error.strerror or type(error).__name__
    return bad(
        REACHABILITY,
        f"{there} cannot be connected to: {reason}.",
        f"Check {setting}, and that the network lets this host through.",
    )


def _refused(server: Server, error: ssl.SSLError) -> Finding:
    code = error.verify_code if isinstance(error, ssl.SSLCertVerificationError) else None
    if code == _EXPIRED:
        return bad(TLS, f"The TLS certificate of {server.place} has expired.", "Renew it; or check this clock.")
    if code == _NOT_YET_VALID:
        return bad(TLS, f"The TLS certificate of {server.place} is not valid yet.", "Check this machine's clock.")
    if code in _OTHER_HOST:
        return bad(
            TLS,
            f"The TLS certificate that {server.place} shows is for another host.",
            f"Check {server.setting}: it must have the name that the certificate has.",
        )
    if code in _UNTRUSTED:
        return bad(
            TLS,
            f"The TLS certificate of {server.place} is of no authority in {_authorities(server)}.",
            f"A private authority goes into {server.ca_setting}, with those in between. Or who is it that answers?",
        )
    if code is not None:
        return bad(TLS, f"The TLS certificate of {server.place} is not valid (OpenSSL says {code}).", "Renew it.")
    return bad(
        TLS,
        f"{server.place} does not complete a TLS handshake.",
        f"Check that the port in {server.setting} is one of TLS 1.2 or newer.",
    )


def _verified(server: Server, certificate: _Certificate) -> Iterator[Finding]:
    yield good(TLS, f"{certificate.version}, verified for {server.place} by {_authorities(server)}.")
    yield valid_until(
        TLS,
        f"The certificate of {server.place}",
        (certificate.start, certificate.end),
        advice="See to it that it is renewed.",
    )


def _authorities(server: Server) -> str:
    return f"{server.ca_setting}={server.ca_bundle}" if server.ca_bundle else "the public authorities"


# --- The clock -------------------------------------------------------------------------------------------------------


def _clock(server: Server, deadline: Deadline, provider: str, route: Route) -> Finding:
    """Compare this machine's clock with the one that dates the answers of a server, whatever they say."""
    before = utc_now()
    failure: str | None = None
    said = ""
    try:
        said = _date(server, deadline, provider, route)
    except ProviderError as error:
        failure = str(error)
    if failure is not None:
        return unchecked(CLOCK, failure)
    there = _parsed(said)
    if there is None:
        return unchecked(CLOCK, f"{server.place} does not say what time it is.")
    return clocks_apart(there, server.what, before=before, after=utc_now())


def _date(server: Server, deadline: Deadline, provider: str, route: Route) -> str:
    error: ProviderError
    plain = not server.is_encrypted
    try:
        with (
            bounded_session(deadline, provider, route, plain_http=plain) as session,
            closing(session.send(Request("GET", server.url).prepare())) as response,
        ):
            return response.headers.get("Date", "")
    except ProviderError as raised:
        error = raised
    raise detached(error)


def _parsed(date: str) -> datetime | None:
    try:
        return parsedate_to_datetime(date) if _DATE.fullmatch(date) else None
    except ValueError:  # the 31st of February
        return None
