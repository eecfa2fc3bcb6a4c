"""A TCP proxy that holds one exchange with a server where it is, until its client ends."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Final, Literal
from urllib.parse import urlsplit

from tests.accepting import Accepting

Place = Literal["asked", "answered", "half answered"]
"""Where an exchange is held: before the server hears of it, when it has answered, or in the middle of its answer."""

PLACES: Final[tuple[Place, ...]] = ("asked", "answered", "half answered")


class Gate(Accepting):
    """Forwards connections to a server, each of which is one exchange; those that it is told of, it holds.

    :param target: the URL of the server.
    :ivar connections: how many there have been.
    :ivar is_holding: that the last that it was told of has come to its place.
    """

    def __init__(self, target: str) -> None:
        parsed = urlsplit(target)
        self._target = (parsed.hostname, parsed.port)
        self._places: dict[int, Place] = {}
        self._to_hold: dict[socket.socket, Place] = {}
        self.connections = 0
        self.is_holding = threading.Event()
        super().__init__()
        self.address = f"{parsed.scheme}://127.0.0.1:{self.port}"

    def hold(self, later: int, place: Place) -> None:
        """Hold the connection that is so many after the next one."""
        self.is_holding.clear()
        self._places[self.connections + later] = place

    def _accepted(self, connection: socket.socket) -> None:
        place = self._places.pop(self.connections, None)
        if place is not None:
            self._to_hold[connection] = place
        self.connections += 1

    def _serve(self, connection: socket.socket) -> None:
        place = self._to_hold.pop(connection, None)
        with contextlib.suppress(OSError), connection:
            if place == "asked":
                self._pump(connection, None)
                return
            with socket.create_connection(self._target) as server:
                back = threading.Thread(target=self._answer, args=(server, connection, place), daemon=True)
                back.start()
                self._pump(connection, server)
                back.join()

    def _pump(self, source: socket.socket, sink: socket.socket | None) -> None:
        """Pass on what is said until there is no more; without a sink, keep it."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if sink is None:
                    self.is_holding.set()
                else:
                    sink.sendall(data)
            if sink is not None:
                sink.shutdown(socket.SHUT_WR)

    def _answer(self, server: socket.socket, client: socket.socket, place: Place | None) -> None:
        if place is None:
            self._pump(server, client)
            return
        with contextlib.suppress(OSError):
            data = server.recv(65536)
            if place == "half answered":
                client.sendall(data[: len(data) // 2])
            self.is_holding.set()
