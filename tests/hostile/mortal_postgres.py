"""A PostgreSQL server that loses its power, and comes back on what is on its disk."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from tests.postgres import _INITDB, _free_port, _run, _runnable_programs, _unprivileged_user, _wait_for
from tests.processes import children


class MortalPostgres:
    """A server of its own, as durable as PostgreSQL is when nothing is configured.

    :param settings: what is configured nevertheless.
    """

    def __init__(self, **settings: str) -> None:
        self._stack = ExitStack()
        self._home = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kravn-pg-", ignore_cleanup_errors=True))
        )
        self._user = _unprivileged_user(self._home)
        self._programs = _runnable_programs(self._home, self._user)
        password = secrets.token_urlsafe()
        password_file = self._home / "password"
        password_file.write_text(password)
        initdb: list[Path | str] = [self._programs / "initdb", f"--pgdata={self._home / 'data'}", *_INITDB]
        _run([*initdb, "--username=postgres", f"--pwfile={password_file}"], self._home, self._user)
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self._home),
            **settings,
        }
        self.url = URL.create("postgresql+psycopg", "postgres", password, "127.0.0.1", _free_port(), "postgres")
        self.start()

    def start(self) -> None:
        """Start it, on what is on the disk."""
        command: list[Any] = [self._programs / "postgres", "-D", self._home / "data", "-p", str(self.url.port)]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        with (self._home / "log").open("a") as log:
            self._server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self._home, **self._user
            )
        _wait_for(self.url, self._server, self._home / "log")

    def lose_power(self) -> None:
        """Kill all of its processes. The first is stopped before, so that it starts no more."""
        self._server.send_signal(signal.SIGSTOP)
        for number in (self._server.pid, *children(self._server.pid)):
            os.kill(number, signal.SIGKILL)
        self._server.wait()

    def close(self) -> None:
        if self._server.poll() is None:
            self.lose_power()
        self._stack.close()
