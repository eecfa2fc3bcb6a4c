"""What is found out about a server before anybody logs in: the way there, its certificate, its clock."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sqlalchemy_kravn_crypto.providers.base import Deadline, Finding, Level
from sqlalchemy_kravn_crypto.providers.inspection import Server, inspect_server
from sqlalchemy_kravn_crypto.providers.proxy import Proxy
from sqlalchemy_kravn_crypto.providers.transport import Route, tls_context
from tests import hostile_server as hostile
from tests.certificates import Authority
from tests.connect_proxy import ConnectProxy
from tests.hostile_server import HostileServer, Raw, answers
from tests.leaks import found_in
from tests.scripted_server import dated

HOST = "kms.example"
GOOD, WARNING, BAD = Level.GOOD, Level.WARNING, Level.BAD
MARK = "MARKER-of-what-the-server-says"
DAY = timedelta(days=1)

Serve = Callable[..., HostileServer]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that end with the test, and answer with a body that is not to be told of."""
    started: list[HostileServer] = []

    def start(certificate: Path | None = None, raw: Raw | None = None) -> HostileServer:
        server = HostileServer(certificate)
        server.raw = dated(403, {"errors": [MARK]}) if raw is None else raw
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


def server_at(url: str, ca_bundle: Path | None = None) -> Server:
    return Server("the KMS", url, "KRAVN_KMS_VAULT_ADDR", "KRAVN_KMS_VAULT_CA_BUNDLE", ca_bundle)


def to(port: int, authority: Authority | None = None, **others: Any) -> Route:
    bundle = None if authority is None else authority.ca_bundle
    return Route(tls_context(bundle, "KRAVN_KMS_VAULT_CA_BUNDLE"), lambda *_: ("127.0.0.1", port), **others)


def inspect(server: Server, route: Route, seconds: float = 10) -> list[Finding]:
    return list(inspect_server(server, Deadline(seconds), "vault", route))


def levels(findings: Iterable[Finding]) -> list[tuple[str, Level]]:
    return [(finding.subject, finding.level) for finding in findings]


def the(findings: Iterable[Finding], subject: str, level: Level) -> Finding:
    (finding,) = [finding for finding in findings if (finding.subject, finding.level) == (subject, level)]
    return finding


# --- The way there ---------------------------------------------------------------------------------------------------


def test_a_server_that_is_as_it_should_be(serve: Serve, authority: Authority) -> None:
    end = datetime.now(UTC) + 30 * DAY
    server = serve(authority.issue(HOST, start=end - 90 * DAY, end=end))
    found = inspect(server_at(f"https://{HOST}:8200/", authority.ca_bundle), to(server.port, authority))
    assert levels(found) == [("reachability", GOOD), ("tls", GOOD), ("tls", GOOD), ("clock", GOOD)]
    assert found[0].message == f"{HOST}:8200 takes connections."
    assert found[1].message == (
        f"TLSv1.3, verified for {HOST}:8200 by KRAVN_KMS_VAULT_CA_BUNDLE={authority.ca_bundle}."
    )
    assert f"{end:%Y-%m-%d %H:%M} UTC, for 29 days" in found[2].message
    # On the first connection nothing is sent after the handshake.
    assert [request.partition(b" ")[0] for request in server.requests if request.strip()] == [b"GET"]
    assert found_in(repr(found), MARK) == []


def test_over_plain_http_there_is_no_certificate(serve: Serve) -> None:
    server = serve()
    assert levels(inspect(server_at(server.url), to(server.port))) == [("reachability", GOOD), ("clock", GOOD)]


def test_a_port_that_nobody_listens_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (finding,) = inspect(server_at(f"https://{HOST}"), to(port))
    assert (finding.subject, finding.level) == ("reachability", BAD)
    assert "refused" in finding.message
    assert "KRAVN_KMS_VAULT_ADDR" in finding.advice


@pytest.mark.parametrize("host", ["no_such_host_.localdomain", f"{'x' * 64}.example"])
def test_a_name_that_has_no_address(host: str) -> None:
    route = Route(tls_context(None, ""), lambda _, port: (host, port))
    (finding,) = inspect(server_at(f"https://{HOST}"), route)
    assert (finding.subject, finding.level) == ("reachability", BAD)
    assert finding.message == f"The host of {HOST} has no address here."
    assert "DNS" in finding.advice


def test_a_server_that_says_nothing_is_left_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        (finding,) = inspect(server_at(f"https://{HOST}"), to(silent.getsockname()[1]), seconds=0.3)
        assert time.monotonic() - started < hostile.ENOUGH / 2
    assert (finding.subject, finding.level) == ("reachability", BAD)
    assert "in time" in finding.message


def test_a_deadline_that_has_passed_is_told_of(serve: Serve) -> None:
    server = serve()
    moments = iter([0.0])
    deadline = Deadline(1, lambda: next(moments, 2.0))
    (finding,) = inspect_server(server_at(server.url), deadline, "vault", to(server.port))
    assert (finding.subject, finding.level) == ("reachability", BAD)
    assert "within 1 seconds" in finding.message


# --- The certificate -------------------------------------------------------------------------------------------------


def certificate_of(authority: Authority, start: timedelta, end: timedelta) -> Path:
    now = datetime.now(UTC)
    return authority.issue(HOST, start=now + start, end=now + end)


@pytest.mark.parametrize(
    ("start", "end", "word"),
    [(-10 * DAY, -DAY, "has expired"), (DAY, 10 * DAY, "not valid yet")],
)
def test_a_certificate_out_of_its_time(
    serve: Serve, authority: Authority, start: timedelta, end: timedelta, word: str
) -> None:
    server = serve(certificate_of(authority, start, end))
    found = inspect(server_at(f"https://{HOST}", authority.ca_bundle), to(server.port, authority))
    assert levels(found) == [("reachability", GOOD), ("tls", BAD)]
    assert word in found[1].message
    assert server.requests == []


def test_a_certificate_that_is_about_to_end(serve: Serve, authority: Authority) -> None:
    server = serve(certificate_of(authority, -87 * DAY, 3 * DAY))
    found = inspect(server_at(f"https://{HOST}", authority.ca_bundle), to(server.port, authority))
    finding = the(found, "tls", WARNING)
    assert "for 2 days" in finding.message
    assert "renewed" in finding.advice
    assert BAD not in dict(levels(found)).values()


def test_a_certificate_for_another_host(serve: Serve, authority: Authority) -> None:
    server = serve(authority.issue("other.example"))
    found = inspect(server_at(f"https://{HOST}", authority.ca_bundle), to(server.port, authority))
    finding = the(found, "tls", BAD)
    assert "another host" in finding.message
    assert "KRAVN_KMS_VAULT_ADDR" in finding.advice


def test_a_certificate_of_another_authority(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    server = serve(Authority(tmp_path / "other").issue(HOST))
    for known in (None, authority):
        bundle = None if known is None else known.ca_bundle
        found = inspect(server_at(f"https://{HOST}", bundle), to(server.port, known))
        finding = the(found, "tls", BAD)
        assert ("the public authorities" if known is None else str(bundle)) in finding.message
        assert "KRAVN_KMS_VAULT_CA_BUNDLE" in finding.advice


def test_a_server_that_speaks_no_tls(serve: Serve) -> None:
    server = serve(raw=hostile.sends(MARK.encode()))
    found = inspect(server_at(f"https://{HOST}:8200"), to(server.port))
    assert levels(found) == [("reachability", GOOD), ("tls", BAD)]
    assert "handshake" in found[1].message
    assert found_in(repr(found), MARK) == []


# --- The proxy -------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxied(serve: Serve, authority: Authority) -> Iterator[tuple[ConnectProxy, Server, Route]]:
    server = serve(authority.issue(HOST))
    proxy = ConnectProxy({f"{HOST}:443": server.port}, "user:MARKER-password")
    through = Proxy("127.0.0.1", proxy.port, "user", "MARKER-password")
    route = replace(to(1, authority), proxy=through)
    yield proxy, server_at(f"https://{HOST}", authority.ca_bundle), route
    proxy.close()


def test_through_a_proxy(proxied: tuple[ConnectProxy, Server, Route]) -> None:
    proxy, server, route = proxied
    found = inspect(server, route)
    assert levels(found) == [("reachability", GOOD), ("tls", GOOD), ("tls", GOOD), ("clock", GOOD)]
    assert f"through the proxy 127.0.0.1:{proxy.port}" in found[0].message
    assert len(proxy.requests) == 2
    assert "MARKER" not in repr(found)


def test_a_proxy_that_does_not_let_pass(proxied: tuple[ConnectProxy, Server, Route]) -> None:
    _, server, route = proxied
    assert route.proxy is not None
    (finding,) = inspect(server, replace(route, proxy=replace(route.proxy, password="MARKER-of-another")))
    assert (finding.subject, finding.level) == ("reachability", BAD)
    assert "KRAVN_KMS_PROXY_PASSWORD" in finding.message
    (finding,) = inspect(replace(server, url="https://other.example"), route)
    assert (finding.subject, finding.level) == ("reachability", BAD)
    assert "other.example:443 (HTTP 403)" in finding.message
    assert "MARKER" not in repr(finding)


@pytest.mark.parametrize("host", ["127.0.0.1", "no_such_host_.localdomain"])
def test_a_proxy_that_is_not_there(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (finding,) = inspect(server_at(f"https://{HOST}"), to(1, proxy=Proxy(host, port, "user", "MARKER")))
    assert (finding.subject, finding.level) == ("reachability", BAD)
    assert f"{host}:{port}" in finding.message
    assert "KRAVN_KMS_PROXY" in finding.advice
    assert "MARKER" not in repr(finding)


# --- The clock -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead", "level", "word"),
    [
        (0, GOOD, "less than"),
        (50, GOOD, "less than"),
        (-50, GOOD, "less than"),
        (200, WARNING, "3 minutes behind"),
        (-200, WARNING, "3 minutes ahead"),
        (3700, BAD, "61 minutes behind"),
        (-3700, BAD, "61 minutes ahead"),
    ],
)
def test_the_clock_of_a_server(serve: Serve, ahead: float, level: Level, word: str) -> None:
    server = serve(raw=dated(403, MARK.encode(), ahead))
    finding = the(inspect(server_at(server.url), to(server.port)), "clock", level)
    assert word in finding.message
    assert "the KMS" in finding.message


@pytest.mark.parametrize(
    "date",
    [
        None,
        "",
        MARK,
        "Mon, 99 Jan 2030 00:00:00 GMT",
        "Mon, 01 Jan 99999 00:00:00 GMT",
        "Mon, 01 Xyz 2030 00:00:00 GMT",
        "Mon, 01 Jan 2030 00:00:00 -0000",
        "Mon, 01 Jan 2030 00:00:00",
        "1893456000",
        "9" * 50_000,
    ],
)
def test_a_server_that_does_not_say_what_time_it_is(serve: Serve, date: str | None) -> None:
    server = serve(raw=answers(200, MARK.encode(), *([] if date is None else [f"Date: {date}"])))
    found = inspect(server_at(server.url), to(server.port))
    assert the(found, "clock", WARNING).message.startswith("Not checked: ")
    assert found_in(repr(found), MARK) == []


HOSTILE = {
    "hangs up": hostile.hangs_up,
    "redirects": answers(307, MARK.encode(), f"Location: https://{MARK}/"),
    "compresses": hostile.GZIP_BOMB,
    "says no HTTP": hostile.sends(MARK.encode()),
    "drips headers": hostile.DRIPS_HEADERS,
    "drips a body": hostile.DRIPS_BODY,
    "sends without end": hostile.ENDLESS_BODY,
    "sends headers without end": hostile.ENDLESS_HEADERS,
    "is silent": hostile.is_silent,
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_a_server_does_with_the_question_keeps_nothing_else_from_being_told(serve: Serve, raw: Raw) -> None:
    server = serve(raw=raw)
    started = time.monotonic()
    found = inspect(server_at(server.url), replace(to(server.port), sleep=lambda _: None), seconds=1)
    assert time.monotonic() - started < hostile.ENOUGH / 2
    assert levels(found) == [("reachability", GOOD), ("clock", WARNING)]
    assert found_in(repr(found), MARK) == []
