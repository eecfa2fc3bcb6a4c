"""A TCP proxy that counts the exchanges of a client with its server, and does harm from one of them on."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final

from tests.accepting import Accepting

_RESET: Final = struct.pack("ii", 1, 0)

Harm = Callable[["FaultProxy", "Link"], None]


class Link:
    """One connection that goes through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.server_spoke_last = True  # so that the client's first word begins an exchange
        self.is_silent = False

    def cut(self) -> None:
        """Reset both sides."""
        for side in (self.client, self.server):
            with contextlib.suppress(OSError):
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


class FaultProxy(Accepting):
    """Forwards connections to a server. An exchange is what the client says, and what the server answers to it.

    From the exchange that it is told of, it does harm: see the functions below. Connections that come after it meet
    the same, until :meth:`heal`.

    :param target: host and port of the server.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._links: set[Link] = set()
        self.heal()
        super().__init__()

    def heal(self) -> None:
        """Do no more harm, and end what is open."""
        with self._lock:
            links, self._links = self._links, set()
            self._asks: Harm | None = None
            self._answers: Callable[[bytes], bytes] | None = None
            self._at = 0
            self._bytes = -1
            self.exchanges = 0
            self.said = 0
            self.has_struck = threading.Event()
        for link in links:
            link.cut()

    def harm(self, at: int, *, asks: Harm | None = None, answers: Callable[[bytes], bytes] | None = None) -> None:
        """Do harm from an exchange on, counted from 1.

        :param asks: what is done instead of forwarding what the client says.
        :param answers: what is made of the server's next answer, before the connection is cut.
        """
        self.heal()
        self._at, self._asks, self._answers = at, asks, answers

    def cut_after(self, answered: int) -> None:
        """Cut once the server has said so many bytes."""
        self.heal()
        self._bytes = answered

    def close(self) -> None:
        self.stop_accepting()
        self.heal()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, socket.create_connection(self._target) as server:
            link = Link(connection, server)
            with self._lock:
                self._links.add(link)
            back = threading.Thread(target=self._pump, args=(link, server, connection, self._server_says), daemon=True)
            back.start()
            self._pump(link, connection, server, self._client_says)
            back.join()
            with self._lock:
                self._links.discard(link)

    @staticmethod
    def _pump(
        link: Link, source: socket.socket, sink: socket.socket, says: Callable[[Link, bytes], bytes | None]
    ) -> None:
        try:
            while data := source.recv(65536):
                passed = says(link, data)
                if passed:
                    sink.sendall(passed)
                if passed is None:
                    link.cut()
                    return
            if not link.is_silent:
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            link.cut()

    def _client_says(self, link: Link, data: bytes) -> bytes | None:
        with self._lock:
            if link.server_spoke_last:
                self.exchanges += 1
                link.server_spoke_last = False
            if not self._at or self.exchanges < self._at:
                return data
            if self._asks is None:
                return data
            self.has_struck.set()
            harm = self._asks
        harm(self, link)
        return b"" if link.is_silent else None

    def _server_says(self, link: Link, data: bytes) -> bytes | None:
        with self._lock:
            link.server_spoke_last = True
            if link.is_silent:
                return b""
            if self._answers is not None and self._at and self.exchanges >= self._at:
                self.has_struck.set()
                data, harmed = self._answers(data), True
            else:
                harmed = 0 <= self._bytes <= self.said + len(data)
                if harmed:
                    self.has_struck.set()
                    data = data[: max(0, self._bytes - self.said)]
            self.said += len(data)
        if harmed:
            with contextlib.suppress(OSError):
                link.client.sendall(data)
                link.client.shutdown(socket.SHUT_WR)
            return None
        return data


# --- What may be done to what a client says --------------------------------------------------------------------------


def lose(_: FaultProxy, __: Link) -> None:
    """Cut the connection; the server never hears of it."""


def swallow(_: FaultProxy, link: Link) -> None:
    """Keep the connection, and let nothing through in either direction any more."""
    link.is_silent = True


# --- What may be made of a server's answer ---------------------------------------------------------------------------


def nothing(_: bytes) -> bytes:
    return b""


def half(answer: bytes) -> bytes:
    return answer[: len(answer) // 2]


def garbled(answer: bytes) -> bytes:
    """Every byte is another one."""
    return bytes(byte ^ 0x55 for byte in answer)


def one_bit_off(answer: bytes) -> bytes:
    """One bit in the middle is another one."""
    middle = len(answer) // 2
    return answer[:middle] + bytes([answer[middle] ^ 0x01]) + answer[middle + 1 :] if answer else answer
