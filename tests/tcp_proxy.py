"""A TCP proxy that holds back connections on demand."""

import contextlib
import socket
import threading
from urllib.parse import urlsplit

from tests.accepting import Accepting


class TCPProxy(Accepting):
    """Forwards connections to a server. From a given number on, it holds what they send until it is released.

    :param target: the URL of the server.
    :param hold_from: the first connection that is held, counted from 0; ``None`` holds none.
    """

    def __init__(self, target: str, hold_from: int | None = None) -> None:
        parsed = urlsplit(target)
        self._target = (parsed.hostname, parsed.port)
        self._hold_from = hold_from
        self._released = threading.Event()
        self._held: set[socket.socket] = set()
        self.connections = 0
        super().__init__()
        self.address = f"{parsed.scheme}://127.0.0.1:{self.port}"

    def hold_from(self, connection: int) -> None:
        """Hold what comes from a connection on, counted from 0, until it is released again."""
        self._released.clear()
        self._hold_from = connection

    def release(self) -> None:
        """Forward what is held and everything after it."""
        self._released.set()

    def close(self) -> None:
        self.release()
        self.stop_accepting()

    def _accepted(self, connection: socket.socket) -> None:
        if self._hold_from is not None and self.connections >= self._hold_from:
            self._held.add(connection)
        self.connections += 1

    def _serve(self, connection: socket.socket) -> None:
        if connection in self._held:
            self._released.wait()
        with contextlib.suppress(OSError), connection, socket.create_connection(self._target) as server:
            back = threading.Thread(target=self._pump, args=(server, connection), daemon=True)
            back.start()
            self._pump(connection, server)
            back.join()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
