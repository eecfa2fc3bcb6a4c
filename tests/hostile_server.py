"""What a server can do to its clients, as functions that answer a request, and a server that does it."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.accepting import Accepting

Raw = Callable[[socket.socket, bytes], None]
"""Answers a request by writing to the connection; gets the body of the request too."""

ENOUGH = 20.0
"""Seconds after which a behaviour without an end gives up, so that a client without a deadline fails its test."""


def http_answer(status: int, body: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {len(body) if length is None else length}"]
    if not any(header.startswith("Content-Type") for header in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def answers(status: int, body: Any, *headers: str) -> Raw:
    """Answer with a body of bytes, or with anything else as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return sends(http_answer(status, content, *headers))


def sends(data: bytes) -> Raw:
    def raw(connection: socket.socket, _body: bytes) -> None:
        connection.sendall(data)

    return raw


def echoes(status: int) -> Raw:
    """Answer with an error that quotes the request."""

    def raw(connection: socket.socket, body: bytes) -> None:
        error = {"errors": [body.decode()], "error": {"code": body.decode(), "message": body.decode()}}
        connection.sendall(http_answer(status, json.dumps(error).encode()))

    return raw


def repeats(start: bytes, more: bytes, pause: float = 0) -> Raw:
    """Send a start, and then the same again and again."""

    def raw(connection: socket.socket, _body: bytes) -> None:
        end = time.monotonic() + ENOUGH
        connection.sendall(start)
        while time.monotonic() < end:
            connection.sendall(more)
            time.sleep(pause)

    return raw


def is_silent(connection: socket.socket, _body: bytes) -> None:
    connection.settimeout(ENOUGH)
    connection.recv(1)


def hangs_up(_connection: socket.socket, _body: bytes) -> None:
    """Close the connection without an answer."""


DRIPS_HEADERS = repeats(b"HTTP/1.1 200 OK\r\nX-Drip: ", b"x", 0.02)
DRIPS_BODY = repeats(b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n", b" ", 0.02)
DRIPS_CHUNKS = repeats(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.02)
DRIPS_INTERIM_ANSWERS = repeats(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02)

ENDLESS_BODY = repeats(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536)
ENDLESS_CHUNKS = repeats(
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"
)
ENDLESS_HEADERS = repeats(b"HTTP/1.1 200 OK\r\n", b"X-Long: " + b"x" * 60_000 + b"\r\n")
ENDLESS_INTERIM_ANSWERS = repeats(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100)

GZIP_BOMB = answers(200, gzip.compress(bytes(50_000_000)), "Content-Encoding: gzip")


class Listener:
    """A server that should never be talked to, and tells whether it was."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(0)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def was_contacted(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._socket.accept()[0].close()
            return True
        return False

    def close(self) -> None:
        self._socket.close()


class HostileServer(Accepting):
    """Answers every request as ``raw`` does, over TLS if it is given a certificate."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.raw: Raw = hangs_up
        self.requests: list[bytes] = []
        self._context: ssl.SSLContext | None = None
        if certificate:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate)
        super().__init__()
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self.port}"

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(ENOUGH)
            if not self._context:
                self._answer(connection)
                return
            with self._context.wrap_socket(connection, server_side=True) as encrypted:
                self._answer(encrypted)

    def _answer(self, connection: socket.socket) -> None:
        head, body = self._read(connection)
        self.requests.append(head + b"\r\n\r\n" + body)
        self.raw(connection, body)

    @staticmethod
    def _read(connection: socket.socket) -> tuple[bytes, bytes]:
        """Read a request; return its head and its body, of which a client that hangs up has sent less."""
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
        fields = [line.partition(b":") for line in head.lower().split(b"\r\n")]
        length = next((int(value) for name, _, value in fields if name == b"content-length"), 0)
        while len(body) < length and (received := connection.recv(65536)):
            body += received
        return head, body
