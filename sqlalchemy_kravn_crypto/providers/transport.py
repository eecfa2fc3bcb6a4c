"""The one way to a KMS over HTTP: a ``requests.Session`` that both SDKs accept and that no server can abuse.

The sessions of ``requests`` bound the silence between two bytes, follow redirects with the body, inflate what they are
sent and read without end. What is sent here holds credentials and data keys in plaintext, and what is awaited is a few
hundred bytes that an application waits for at its start. Hence an exchange of its own over ``http.client``: one
deadline for all requests of an operation, one bound on the size of an answer, one connection for each request, no
redirects, no content codings, nothing from the environment, and errors that hold no byte of what was sent or received.
"""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urlsplit

import certifi
from requests import PreparedRequest, Response, Session
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse

from ..exceptions import (
    CredentialExpiredError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
    SettingsError,
)
from .base import Deadline, detached
from .proxy import Proxy

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_ANSWER_SIZE: Final = 100_000
"""Bound on one HTTP answer, headers and body together, in bytes. An answer of a KMS has less than 5,000."""

_PAUSES: Final = (0.2, 0.8)
"""Seconds before the second and the third attempt at a request, which is the last, unless the server asks for more."""

_WORTH_RETRYING: Final = frozenset({429, 500, 502, 503, 504})

_FRAMING: Final = frozenset({"content-length", "transfer-encoding", "connection"})

_MAX_TUNNEL_ANSWER: Final = 16_384  # bytes
_TUNNELLED: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})[ \r]")

_CERTIFICATE_REFUSED: Final = frozenset(
    {
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "TLSV1_ALERT_UNKNOWN_CA",
        "TLSV1_ALERT_ACCESS_DENIED",
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    }
)
_CERTIFICATE_EXPIRED: Final = frozenset({"SSLV3_ALERT_CERTIFICATE_EXPIRED", "SSLV3_ALERT_CERTIFICATE_REVOKED"})

_PORTS: Final = {"http": 80, "https": 443}

Address = tuple[str, int]
"""A host name or an IP address, and a port."""

Resolve = Callable[[str, int], Address]
"""Maps the host and port of a URL to what is connected to; TLS still verifies the host of the URL."""

Inspect = Callable[[Response], None]
"""Sees every answer before the SDK does, and raises a ProviderError for one that the SDK must not see."""


def as_given(host: str, port: int) -> Address:
    """Connect to the host and port of the URL."""
    return host, port


def _let_pass(_response: Response) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Route:
    """How the requests of a provider travel.

    :param tls: from :func:`tls_context`.
    :param resolve: where to connect to.
    :param sleep: waits a number of seconds between two attempts.
    :param proxy: what ``https://`` goes through; it is asked for the host of the URL, and looks that up itself.
    :param client_certificate: the settings of what ``tls`` shows as the client's certificate, for messages.
    """

    tls: ssl.SSLContext
    resolve: Resolve = as_given
    sleep: Callable[[float], None] = time.sleep
    proxy: Proxy | None = None
    client_certificate: str = "the TLS client certificate"


def bounded_session(
    deadline: Deadline, provider: str, route: Route, *, inspect: Inspect = _let_pass, plain_http: bool = False
) -> Session:
    """Make the session that one operation of a provider sends all its requests through.

    Requests are repeated after a lost connection, 429 and 5xx, as long as the deadline allows: wrapping and unwrapping
    may be repeated without harm. Its ``send`` raises
    :class:`~sqlalchemy_kravn_crypto.exceptions.ProviderUnavailableError` where no answer came, and
    :class:`~sqlalchemy_kravn_crypto.exceptions.ProviderResponseError` for an answer outside of the bounds.

    :param deadline: when the whole operation must have ended, however many requests it takes.
    :param provider: the provider's name, for the errors.
    :param route: how the requests travel.
    :param inspect: sees every answer before the SDK does.
    :param plain_http: whether ``http://`` is allowed beside ``https://``.
    """
    adapter = _BoundedAdapter(deadline, provider, route, inspect)
    session = Session()
    session.trust_env = False
    session.adapters.clear()
    session.mount("https://", adapter)
    if plain_http:
        session.mount("http://", adapter)
    return session


@contextmanager
def connected(url: str, deadline: Deadline, provider: str, route: Route) -> Iterator[socket.socket]:
    """Connect to the host of a URL as a request to it would, and send nothing.

    The socket is an ``ssl.SSLSocket``, its handshake done and its certificate verified, unless the URL is plain HTTP.

    :raises ProviderError: if the deadline passes, or the proxy does not connect.
    :raises OSError: if the host has no address, takes no connection or fails the handshake.
    """
    adapter = _BoundedAdapter(deadline, provider, route, _let_pass)
    with adapter.connected(urlsplit(url)) as connection:
        yield connection


def tls_context(ca_bundle: Path | str | None, setting: str) -> ssl.SSLContext:
    """Make a context that verifies certificates and host names, and takes nothing from the environment.

    :param ca_bundle: a PEM file with the certificates to trust instead of the public ones.
    :param setting: the name of the setting that ``ca_bundle`` comes from.
    :raises SettingsError: if there is no such file, or no certificate in it.
    """
    # Not ssl.create_default_context: that one writes session secrets to where SSLKEYLOGFILE says.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not _loads(context, str(ca_bundle or certifi.where())):
        raise SettingsError(f"{setting} must be the path of a readable PEM file that holds CA certificates.")
    return context


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in the body of an answer, or an empty one if the body is anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def provider_error_behind(error: BaseException) -> ProviderError | None:
    """Return the ProviderError that an SDK wrapped into an exception of its own, if that is what it did."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, ProviderError):
        behind = behind.__cause__ or behind.__context__
    return behind


class _BoundedAdapter(HTTPAdapter):
    def __init__(self, deadline: Deadline, provider: str, route: Route, inspect: Inspect) -> None:
        super().__init__(max_retries=0)
        self._deadline = deadline
        self._provider = provider
        self._route = route
        self._inspect = inspect

    def send(self, request: PreparedRequest, *_: object, **__: object) -> Response:
        """Send a request and read its whole answer.

        What a caller says about time-outs, proxies and the verification of certificates is ignored.
        """
        response = self._attempt(request)
        for shortest in _PAUSES:
            if response is not None and response.status_code not in _WORTH_RETRYING:
                break
            pause = max(shortest, _retry_after(response))
            if pause >= self._remaining():
                break
            self._route.sleep(pause)
            response = self._attempt(request)
        if response is None:
            raise ProviderUnavailableError(
                f"The {self._provider} KMS could not be reached, or cut the connection. Check its address, that it is "
                "up, and that it can be reached from here.",
                provider=self._provider,
            )
        self._inspect(response)
        return response

    def _attempt(self, request: PreparedRequest) -> Response | None:
        """Send a request once; None if the connection failed or was lost."""
        error: ProviderError
        try:
            return self._exchange(request)
        except ProviderError as raised:
            error = raised
        except ssl.SSLCertVerificationError:
            error = ProviderUnavailableError(
                f"The TLS certificate of the {self._provider} KMS is not trusted, or is for another host. Check its "
                f"address; a private CA goes into KRAVN_KMS_{self._provider.upper()}_CA_BUNDLE.",
                provider=self._provider,
            )
        except (OSError, http.client.IncompleteRead) as failure:
            refused = self._certificate_refused(failure)
            if refused is None:
                return None
            error = refused
        except (http.client.HTTPException, ValueError):
            error = self._malformed("with what is not HTTP")
        raise detached(error)

    def _certificate_refused(self, failure: Exception) -> ProviderError | None:
        reason = failure.reason if isinstance(failure, ssl.SSLError) else ""
        if reason in _CERTIFICATE_EXPIRED:
            return CredentialExpiredError(
                f"The {self._provider} KMS says that the TLS client certificate has expired or was revoked. Check "
                f"{self._route.client_certificate}, and the clocks of both.",
                provider=self._provider,
            )
        if reason in _CERTIFICATE_REFUSED:
            return ProviderDeniedError(
                f"The {self._provider} KMS wants a TLS client certificate of an authority that it trusts, and was "
                f"shown none or another. Check {self._route.client_certificate}.",
                provider=self._provider,
            )
        return None

    def _exchange(self, request: PreparedRequest) -> Response:
        url = urlsplit(request.url or "")
        with self.connected(url) as connected:
            connection = http.client.HTTPConnection(url.netloc)
            connection.sock = _BoundedSocket(connected, self._remaining, self._too_large)
            sent = request.headers.copy()
            sent.update({"Host": url.netloc, "Accept-Encoding": "identity", "Connection": "close"})
            # Whoever refuses the client's certificate says so and hangs up, which can fail the write. Read it all the
            # same; if there is nothing, reading fails as well.
            with suppress(OSError):
                connection.request(request.method or "GET", request.path_url, _as_bytes(request.body), dict(sent))
            answer = connection.getresponse()
            self._refuse_unless_plain(answer)
            content = answer.read()
        # Framing says how the bytes came, which is over: what the SDK gets is a whole body.
        headers = answer.headers
        kept = {name: ", ".join(headers.get_all(name, [])) for name in headers if name.lower() not in _FRAMING}
        raw = HTTPResponse(
            io.BytesIO(content), kept, answer.status, reason=answer.reason, preload_content=False, decode_content=False
        )
        return self.build_response(request, raw)

    def _refuse_unless_plain(self, answer: http.client.HTTPResponse) -> None:
        if 300 <= answer.status < 400:
            raise self._malformed("with a redirect, which is never followed: it would take credentials along")
        if answer.getheader("Content-Encoding"):
            raise self._malformed("with a compressed body, which it was asked not to")

    @contextmanager
    def connected(self, url: SplitResult) -> Iterator[socket.socket]:
        host, port = url.hostname or "", url.port or _PORTS[url.scheme]
        proxy = self._route.proxy if url.scheme == "https" else None
        address = self._route.resolve(host, port) if proxy is None else (proxy.host, proxy.port)
        with self._opened(address) as plain:
            if url.scheme == "http":
                yield plain
                return
            if proxy is not None:
                self._tunnel(plain, proxy, host, port)
            plain.settimeout(self._remaining())
            with self._route.tls.wrap_socket(plain, server_hostname=host) as encrypted:
                yield encrypted

    def _tunnel(self, connected: socket.socket, proxy: Proxy, host: str, port: int) -> None:
        """Have a proxy connect to the host; from then on it passes on bytes (RFC 9110, section 9.3.6)."""
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if proxy.authorization is not None:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        connected.settimeout(self._remaining())
        connected.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            # One byte at a time, since what follows is not for this loop; the answer is short.
            connected.settimeout(self._remaining())
            received = connected.recv(1)
            if not received or len(answer) == _MAX_TUNNEL_ANSWER:
                break
            answer += received
        status = _TUNNELLED.match(answer)
        if status is None or not answer.endswith(b"\r\n\r\n"):
            raise self._no_tunnel(proxy, "did not answer as an HTTP proxy does. Check KRAVN_KMS_PROXY.")
        if status[1] == b"407":
            raise self._no_tunnel(
                proxy, "asks for credentials. Check KRAVN_KMS_PROXY_USER and KRAVN_KMS_PROXY_PASSWORD."
            )
        if not status[1].startswith(b"2"):
            raise self._no_tunnel(
                proxy, f"does not connect to {target} (HTTP {status[1].decode()}). Check that it may, and can."
            )

    def _no_tunnel(self, proxy: Proxy, what: str) -> ProviderUnavailableError:
        return ProviderUnavailableError(f"The proxy at {proxy.host}:{proxy.port} {what}", provider=self._provider)

    def _opened(self, address: Address) -> socket.socket:
        """Connect to the first address of a host that accepts, all within the one deadline."""
        failure = OSError()
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        for tried, (family, kind, protocol, _, target) in enumerate(found):
            # One that swallows packets must leave time for the next.
            share = self._remaining() / (len(found) - tried)
            connecting = socket.socket(family, kind, protocol)
            try:
                connecting.settimeout(share)
                connecting.connect(target)
                connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                connecting.close()
                failure = error
            else:
                return connecting
        raise failure

    def _remaining(self) -> float:
        return self._deadline.remaining(self._provider)

    def _too_large(self) -> ProviderResponseError:
        return self._malformed(f"with more than {MAX_ANSWER_SIZE:,} bytes")

    def _malformed(self, what: str) -> ProviderResponseError:
        return ProviderResponseError(
            f"The {self._provider} KMS answered {what}. Check that its address is that of the KMS itself and not of a "
            "proxy or a standby in front of it.",
            provider=self._provider,
        )


class _BoundedSocket(io.RawIOBase):
    """What ``http.client`` needs of a socket, with the deadline before every read and write and a bound on the reads.

    The time-out of a socket alone bounds one read, and a server that sends a byte now and then is never silent.
    """

    def __init__(
        self, connected: socket.socket, remaining: Callable[[], float], too_large: Callable[[], ProviderError]
    ) -> None:
        super().__init__()
        self._connected = connected
        self._remaining = remaining
        self._too_large = too_large
        self._left = MAX_ANSWER_SIZE

    def sendall(self, data: bytes) -> None:
        self._connected.settimeout(self._remaining())
        self._connected.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._connected.settimeout(self._remaining())
        count = self._connected.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise self._too_large()
        return count

    def close(self) -> None:
        """Leave the socket open: ``http.client`` closes it with the answer still to be read. Whoever opened it does."""


def _loads(context: ssl.SSLContext, path: str) -> bool:
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ValueError):
        return False
    return bool(context.cert_store_stats()["x509"])


def _as_bytes(body: object) -> bytes | None:
    if body is None or isinstance(body, bytes):
        return body
    if isinstance(body, str):
        return body.encode()
    raise TypeError


def _retry_after(response: Response | None) -> float:
    """Return the seconds that an answer asks to wait. The form with a date is not worth a clock: 0."""
    value = "" if response is None else response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0
