"""A PostgreSQL server that loses its power, and comes back on what is on its disk."""

from __future__ import annotations

import os
import signal

from tests.postgres import LocalPostgres
from tests.processes import children


class MortalPostgres(LocalPostgres):
    """A server of its own, as durable as PostgreSQL is when nothing is configured.

    :param settings: what is configured nevertheless.
    """

    def __init__(self, **settings: str) -> None:
        super().__init__(settings)

    def lose_power(self) -> None:
        """Kill all of its processes. The first is stopped before, so that it starts no more."""
        self._server.send_signal(signal.SIGSTOP)
        for number in (self._server.pid, *children(self._server.pid)):
            os.kill(number, signal.SIGKILL)
        self._server.wait()
