"""What the servers and proxies of the tests have in common that speak in bare bytes."""

from __future__ import annotations

import socket
import threading


class Accepting:
    """Accepts connections on a port of this machine, and serves each of them in a thread.

    A subclass calls ``__init__`` last: it is at work from then on.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._serving: list[threading.Thread] = []
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if not self.port:
                connection.close()
                return
            self._accepted(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._serving.append(thread)
            thread.start()

    def _accepted(self, connection: socket.socket) -> None:
        """Hear of a connection, one after the other in their order, before it is served."""

    def _serve(self, connection: socket.socket) -> None:
        """Serve one connection, and close it."""
        raise NotImplementedError

    @property
    def is_serving(self) -> bool:
        """Whether a connection is still open here."""
        return any(thread.is_alive() for thread in self._serving)

    def stop_accepting(self) -> None:
        """Accept no more connections. Those that are open stay."""
        port, self.port = self.port, 0
        # That a listening socket is closed wakes nobody up on some systems.
        socket.create_connection(("127.0.0.1", port)).close()
        self._accepting.join()
        self._listener.close()

    def close(self) -> None:
        """Accept no more connections, and wait for the end of those that are open."""
        self.stop_accepting()
        for thread in self._serving:
            thread.join()
