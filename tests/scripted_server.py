"""A server that answers by what is in the path of a request, each in a way of its own."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from tests.hostile_server import HostileServer, Raw, answers


def dated(status: int, body: Any, ahead: float = 0) -> Raw:
    """Answer as a server does whose clock is so many seconds ahead."""

    def raw(connection: socket.socket, sent: bytes) -> None:
        moment = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead), usegmt=True)
        answers(status, body, f"Date: {moment}")(connection, sent)

    return raw


class ScriptedServer(HostileServer):
    """Answers a request as the first name says that is in its path, and any other request as ``otherwise``.

    Connections on which nothing is sent are not noted.
    """

    def __init__(self, by_name: Mapping[str, Raw], otherwise: Raw, certificate: Path | None = None) -> None:
        super().__init__(certificate)
        self.by_name = dict(by_name)
        self.raw = otherwise

    def _answer(self, connection: socket.socket) -> None:
        head, body = self._read(connection)
        if not head:
            return
        self.requests.append(head + b"\r\n\r\n" + body)
        path = head.split(b" ", 2)[1].decode()
        raw = next((raw for name, raw in self.by_name.items() if name in path), self.raw)
        raw(connection, body)
