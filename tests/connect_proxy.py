"""An HTTP proxy that takes CONNECT and nothing else, and notes what it was asked for."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Mapping

from tests.accepting import Accepting
from tests.hostile_server import ENOUGH, Raw


class ConnectProxy(Accepting):
    """A tunnel from the names that clients ask for to where their servers really are.

    :param targets: the port on this machine for each ``host:port``.
    :param user: who it lets pass, with a password after a colon; ``None`` for everybody.
    """

    def __init__(self, targets: Mapping[str, int], user: str | None = None) -> None:
        self._targets = targets
        self._authorization = None if user is None else "Basic " + base64.b64encode(user.encode()).decode()
        self.raw: Raw | None = None
        """What it answers instead of connecting."""
        self.requests: list[str] = []
        self.passed: list[bytes] = []
        """The bytes that went through it, of both directions."""
        super().__init__()
        self.url = f"http://127.0.0.1:{self.port}"

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(ENOUGH)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                received = connection.recv(1)
                if not received:
                    return
                head += received
            self.requests.append(head.decode())
            if self.raw is not None:
                self.raw(connection, b"")
                return
            self._connect(connection, head.decode())

    def _connect(self, client: socket.socket, head: str) -> None:
        target = head.split(" ", 2)[1]
        if self._authorization is not None and f"\r\nProxy-Authorization: {self._authorization}\r\n" not in head:
            client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        if not head.startswith("CONNECT ") or target not in self._targets:
            client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            return
        with socket.create_connection(("127.0.0.1", self._targets[target])) as server:
            server.settimeout(ENOUGH)
            client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 tests\r\n\r\n")
            back = threading.Thread(target=self._pass_on, args=(server, client))
            back.start()
            self._pass_on(client, server)
            back.join()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while received := source.recv(65536):
                self.passed.append(received)
                target.sendall(received)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
