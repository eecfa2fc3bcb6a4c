"""What a server can do to its clients in HTTP/2, once TLS is there, as functions for ``HostileServer``."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Callable
from pathlib import Path

from tests.hostile_server import ENOUGH, HostileServer, Raw, repeats

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _CONTINUATION = 0, 1, 3, 4, 6, 7, 9
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4


def http2_server(certificate: Path) -> HostileServer:
    """Return a server that agrees with its clients on HTTP/2."""
    server = HostileServer(certificate)
    assert server._context is not None
    server._context.set_alpn_protocols(["h2"])
    return server


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def field(name: bytes, value: bytes) -> bytes:
    """Return a header field as a literal that is not indexed (RFC 7541, section 6.2.2)."""
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


def headers(status: bytes, *fields: bytes, flags: int = _END_HEADERS) -> bytes:
    return frame(_HEADERS, flags, 1, field(b":status", status) + b"".join(fields))


def answers_without_grpc(status: bytes, *fields: bytes) -> Raw:
    """Answer as a web server does that knows nothing of gRPC."""
    head = headers(status, field(b"content-type", b"text/html"), *fields)
    return _to_request(lambda connection: connection.sendall(head + frame(_DATA, _END_STREAM, 1, b"<html>no</html>")))


def _to_request(answer: Callable[[socket.socket], None]) -> Raw:
    """Shake hands, wait for the first request, answer, and then wait for the client to hang up."""

    def raw(connection: socket.socket, body: bytes) -> None:
        connection.settimeout(ENOUGH)
        connection.sendall(frame(_SETTINGS, 0, 0) + frame(_SETTINGS, _ACK, 0))
        received = body.removeprefix(b"SM\r\n\r\n")
        kind = None
        while kind != _HEADERS:
            size = int.from_bytes(received[:3], "big") + 9
            while len(received) < max(size, 9):
                more = connection.recv(65536)
                if not more:
                    return
                received += more
                size = int.from_bytes(received[:3], "big") + 9
            kind, received = received[3], received[size:]
        answer(connection)
        while connection.recv(65536):
            pass

    return raw


def _endlessly(start: bytes, more: bytes, pause: float = 0) -> Raw:
    return _to_request(lambda connection: repeats(start, more, pause)(connection, b""))


_OK = headers(b"200", field(b"content-type", b"application/grpc"))
_COMPRESSED = headers(b"200", field(b"content-type", b"application/grpc"), field(b"grpc-encoding", b"gzip"))
_BOMB = gzip.compress(bytes(50_000_000))
_MESSAGE_START = frame(_DATA, 0, 1, b"\0" + (90_000).to_bytes(4, "big"))

DRIPS_MESSAGE = _endlessly(_OK + _MESSAGE_START, frame(_DATA, 0, 1, b"x"), 0.02)
ENDLESS_MESSAGE = _endlessly(_OK + _MESSAGE_START, frame(_DATA, 0, 1, b"x" * 16_000))
DRIPS_HEADERS = _endlessly(
    frame(_HEADERS, 0, 1, field(b":status", b"200")), frame(_CONTINUATION, 0, 1, field(b"x", b"x")), 0.02
)
LARGE_MESSAGE = _endlessly(
    _OK + frame(_DATA, 0, 1, b"\0" + (200_000_000).to_bytes(4, "big")), frame(_DATA, 0, 1, b"x" * 16_000)
)
ENDLESS_HEADERS = _endlessly(
    frame(_HEADERS, 0, 1, field(b":status", b"200")), frame(_CONTINUATION, 0, 1, field(b"x-long", b"x" * 100) * 100)
)
ENDLESS_INTERIM_ANSWERS = _endlessly(b"", headers(b"103") * 100)
ENDLESS_PINGS = _endlessly(_OK, frame(_PING, 0, 0, bytes(8)) * 100)
ENDLESS_SETTINGS = _endlessly(_OK, frame(_SETTINGS, 0, 0) * 100)
GZIP_BOMB = _to_request(
    lambda connection: connection.sendall(
        _COMPRESSED
        + frame(_DATA, 0, 1, b"\1" + len(_BOMB).to_bytes(4, "big"))
        + b"".join(frame(_DATA, 0, 1, _BOMB[start : start + 16_000]) for start in range(0, len(_BOMB), 16_000))
        + frame(_HEADERS, _END_HEADERS | _END_STREAM, 1, field(b"grpc-status", b"0"))
    )
)
GOES_AWAY = _to_request(lambda connection: connection.sendall(frame(_GOAWAY, 0, 0, bytes(8))))
RESETS = _to_request(lambda connection: connection.sendall(frame(_RST_STREAM, 0, 1, (2).to_bytes(4, "big"))))
