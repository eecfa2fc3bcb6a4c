"""A TCP proxy that holds back connections on demand."""

import contextlib
import socket
import threading
from urllib.parse import urlsplit


class TCPProxy:
    """Forwards connections to a server. From a given number on, it holds what they send until it is released.

    :param target: the URL of the server.
    :param hold_from: the first connection that is held, counted from 0; ``None`` holds none.
    """

    def __init__(self, target: str, hold_from: int | None = None) -> None:
        parsed = urlsplit(target)
        self._target = (parsed.hostname, parsed.port)
        self._hold_from = hold_from
        self._released = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"{parsed.scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def hold_from(self, connection: int) -> None:
        """Hold what comes from a connection on, counted from 0, until it is released again."""
        self._released.clear()
        self._hold_from = connection

    def release(self) -> None:
        """Forward what is held and everything after it."""
        self._released.set()

    def close(self) -> None:
        self.release()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                held = self._hold_from is not None and self.connections >= self._hold_from
                self.connections += 1
                threading.Thread(target=self._serve, args=(client, held), daemon=True).start()

    def _serve(self, client: socket.socket, held: bool) -> None:  # noqa: FBT001 - a thread's argument
        if held:
            self._released.wait()
        with contextlib.suppress(OSError), client, socket.create_connection(self._target) as server:
            back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
            back.start()
            self._pump(client, server)
            back.join()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
