"""A proxy on the way to the KMS: asked to CONNECT, within the deadline, and told nothing."""

from __future__ import annotations

import contextlib
import pickle
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from requests import Response

from sqlalchemy_kravn_crypto.configuration import provider_of
from sqlalchemy_kravn_crypto.exceptions import ProviderError, ProviderUnavailableError, SettingsError
from sqlalchemy_kravn_crypto.providers.base import Deadline
from sqlalchemy_kravn_crypto.providers.proxy import Proxy, proxy_of
from sqlalchemy_kravn_crypto.providers.transport import Route, bounded_session, tls_context
from sqlalchemy_kravn_crypto.settings import Settings
from tests import hostile_server as hostile
from tests.certificates import Authority
from tests.connect_proxy import ConnectProxy
from tests.hostile_server import HostileServer, Raw, answers, http_answer, sends
from tests.leaks import leaked

HOST = "kms.example"
BODY = "body-6f1d0c3b9e8a4725"
PASSWORD = "p4ss-90c2f7d1e6a8b354"


class Way:
    """A KMS that only the proxy finds, and the way there."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        self.kms = HostileServer(self.authority.issue(HOST))
        self.kms.raw = answers(200, {"answer": "yes"})
        self.proxy = ConnectProxy({f"{HOST}:443": self.kms.port}, user=f"kravn:{PASSWORD}")

    def through(self, proxy: Proxy | None) -> Route:
        return Route(
            tls_context(self.authority.ca_bundle, "KRAVN_KMS_VAULT_CA_BUNDLE"), sleep=lambda _: None, proxy=proxy
        )

    def ask(
        self, *, user: str | None = "kravn", password: str = PASSWORD, host: str = HOST, seconds: float = 10
    ) -> Response:
        proxy = Proxy("127.0.0.1", self.proxy.port, user, password)
        with bounded_session(Deadline(seconds), "vault", self.through(proxy)) as session:
            return session.post(f"https://{host}/v1/wrap", data=BODY)

    def close(self) -> None:
        self.proxy.close()
        self.kms.close()


@pytest.fixture
def way(tmp_path: Path) -> Iterator[Way]:
    made = Way(tmp_path)
    yield made
    made.close()


def refusal(way: Way, **how: Any) -> ProviderUnavailableError:
    with pytest.raises(ProviderError) as caught:
        way.ask(**how)
    assert caught.type is ProviderUnavailableError
    assert caught.value.provider == "vault"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert leaked(caught.value, BODY) == []
    assert leaked(caught.value, PASSWORD) == []
    assert isinstance(caught.value, ProviderUnavailableError)
    return caught.value


# --- The tunnel ------------------------------------------------------------------------------------------------------


def test_a_request_goes_through_the_proxy(way: Way) -> None:
    assert way.ask().json() == {"answer": "yes"}
    [connect] = way.proxy.requests
    assert connect.startswith(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\n")
    [request] = way.kms.requests
    assert request.endswith(BODY.encode())
    assert b"proxy-authorization" not in request.lower()


def test_the_proxy_sees_nothing_of_what_travels(way: Way) -> None:
    way.ask()
    passed = b"".join(way.proxy.passed)
    assert len(passed) > 1000
    assert BODY.encode() not in passed
    assert BODY not in "".join(way.proxy.requests)


def test_without_a_user_nothing_is_said_of_one(way: Way) -> None:
    error = refusal(way, user=None)
    assert "KRAVN_KMS_PROXY_USER" in str(error)
    assert "Proxy-Authorization" not in way.proxy.requests[0]


def test_a_wrong_password_is_said_and_sent_once(way: Way) -> None:
    error = refusal(way, password="wrong")
    assert "asks for credentials" in str(error)
    assert len(way.proxy.requests) == 1


def test_a_host_that_the_proxy_refuses(way: Way) -> None:
    assert "does not connect to other.example:443 (HTTP 403)" in str(refusal(way, host="other.example"))
    assert way.kms.requests == []


def test_the_certificate_is_that_of_the_kms_and_not_of_the_proxy(way: Way, tmp_path: Path) -> None:
    with HostileServerFor(Authority(tmp_path).issue("other.example")) as other:
        way.proxy._targets = {f"{HOST}:443": other.port}
        assert "certificate" in str(refusal(way))
        assert other.requests == []


def test_the_variables_of_other_programs_are_not_read(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, way.proxy.url)
    monkeypatch.setenv("NO_PROXY", HOST)
    direct = Route(way.through(None).tls, resolve=lambda *_: ("127.0.0.1", way.kms.port))
    with bounded_session(Deadline(10), "vault", direct) as session:
        assert session.get(f"https://{HOST}/").status_code == 200
    assert way.proxy.requests == []
    assert way.ask().status_code == 200
    assert len(way.proxy.requests) == 1


def test_plain_http_to_this_machine_does_not_go_through_it(way: Way) -> None:
    with HostileServerFor(None) as local:
        local.raw = answers(200, {})
        route = way.through(Proxy("127.0.0.1", way.proxy.port))
        with bounded_session(Deadline(10), "vault", route, plain_http=True) as session:
            assert session.get(local.url).status_code == 200
    assert way.proxy.requests == []


@contextlib.contextmanager
def HostileServerFor(certificate: Path | None) -> Iterator[HostileServer]:  # noqa: N802 - it stands for the class
    server = HostileServer(certificate)
    try:
        yield server
    finally:
        server.close()


# --- A proxy that misbehaves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        sends(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
        sends(b"\r\n\r\n"),
        sends(b"HTTP/2 200 OK\r\n\r\n"),
        sends(b"HTTP/1.1 200"),
        sends(b"HTTP/1.1 " + b"9" * 20_000),
        hostile.ENDLESS_HEADERS,
        sends(http_answer(301, b"", f"Location: http://{HOST}/")),
        sends(http_answer(407, BODY.encode())),
        sends(http_answer(502, BODY.encode())),
    ],
    ids=["SSH", "nothing", "HTTP/2", "cut", "long line", "endless", "redirect", "credentials", "bad gateway"],
)
def test_what_is_no_tunnel_is_not_used(way: Way, raw: Raw) -> None:
    way.proxy.raw = raw
    error = refusal(way)
    assert f"The proxy at 127.0.0.1:{way.proxy.port}" in str(error)
    assert len(way.proxy.requests) == 1
    assert way.kms.requests == []


@pytest.mark.parametrize("raw", [hostile.is_silent, hostile.DRIPS_HEADERS], ids=["silent", "drip"])
def test_the_deadline_holds_for_the_proxy_too(way: Way, raw: Raw) -> None:
    way.proxy.raw = raw
    assert "did not answer within 0.5 seconds" in str(refusal(way, seconds=0.5))


def test_what_the_proxy_says_in_place_of_the_kms_is_not_taken(way: Way) -> None:
    way.proxy.raw = sends(b"HTTP/1.1 200 OK\r\n\r\n" + http_answer(200, b'{"answer": "forged"}'))
    error = refusal(way)
    assert "forged" not in str(error)


def test_a_proxy_that_is_not_there(way: Way) -> None:
    closed = Proxy("127.0.0.1", 1)
    with bounded_session(Deadline(5), "vault", way.through(closed)) as session, pytest.raises(ProviderUnavailableError):
        session.get(f"https://{HOST}/")


# --- The settings ----------------------------------------------------------------------------------------------------


def test_what_the_settings_say_reaches_the_provider(way: Way) -> None:
    provider = provider_of(
        Settings(
            kms_provider="vault",
            kms_vault_addr=f"https://{HOST}",
            kms_vault_key="kravn",
            kms_vault_token="s.token",
            kms_vault_ca_bundle=way.authority.ca_bundle,
            kms_proxy=way.proxy.url,
            kms_proxy_user="kravn",
            kms_proxy_password=PASSWORD,
        )
    )
    assert provider is not None
    way.kms.raw = answers(200, {"data": {"ciphertext": "vault:v1:AAAA"}})
    assert provider.wrap(bytes(32), b"binding", Deadline(10)).master_key == "transit/kravn:v1"
    assert len(way.proxy.requests) == 1


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("http://proxy:3128", "proxy", 3128),
        ("http://proxy.bank.example:8080/", "proxy.bank.example", 8080),
        ("http://10.0.0.1:1", "10.0.0.1", 1),
        ("http://[fd00::1]:3128", "fd00::1", 3128),
    ],
)
def test_an_address(address: str, host: str, port: int) -> None:
    assert proxy_of(address) == Proxy(host, port)


@pytest.mark.parametrize(
    "address",
    [
        "proxy:3128",
        "https://proxy:3128",
        "socks5://proxy:1080",
        "http://proxy",
        "http://proxy:0",
        "http://proxy:65536",
        f"http://user:{PASSWORD}@proxy:3128",
        "http://proxy:3128/path",
        "http://proxy:3128\r\nX: y",
        "http://:3128",
        "",
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_PROXY must be http://") as caught:
        proxy_of(address)
    assert leaked(caught.value, PASSWORD) == []


@pytest.mark.parametrize(
    ("user", "password"),
    [("", "x"), ("a:b", "x"), ("a\r\nb", "x"), ("a", f"{PASSWORD}\r\n"), ("a" * 257, "x"), ("a", "x" * 1025)],
)
def test_what_is_no_user_or_password(user: str, password: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_PROXY_USER") as caught:
        proxy_of("http://proxy:3128", user, password)
    assert leaked(caught.value, PASSWORD) == []


@pytest.mark.parametrize(
    ("address", "user", "password", "missing"),
    [
        (None, "user", None, r"need KRAVN_KMS_PROXY\."),
        (None, None, PASSWORD, r"need KRAVN_KMS_PROXY\."),
        ("http://proxy:3128", None, PASSWORD, r"needs KRAVN_KMS_PROXY_USER\."),
    ],
)
def test_what_belongs_together(address: str | None, user: str | None, password: str | None, missing: str) -> None:
    with pytest.raises(SettingsError, match=missing):
        proxy_of(address, user, password)


def test_nothing_shows_the_password() -> None:
    proxy = Proxy("proxy", 3128, "user", PASSWORD)
    assert PASSWORD not in repr(proxy)
    with pytest.raises(TypeError, match="holds a secret"):
        pickle.dumps(proxy)
    assert PASSWORD in proxy.url
    assert Proxy("fd00::1", 3128).url == "http://[fd00::1]:3128"
    assert Proxy("proxy", 3128, "us er", "p:@/").url == "http://us%20er:p%3A%40%2F@proxy:3128"


def test_a_user_outside_of_ascii_is_sent_as_utf_8() -> None:
    assert Proxy("proxy", 3128, "jörg", "geheim").authorization == "Basic asO2cmc6Z2VoZWlt"


def test_the_route_verifies_host_names(way: Way) -> None:
    assert way.through(None).tls.verify_mode is ssl.CERT_REQUIRED
    assert way.through(None).tls.check_hostname
