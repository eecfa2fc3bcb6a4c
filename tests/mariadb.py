"""A MariaDB server for the tests, from Debian's packages, as a process.

The packages are those of the programs alone, which neither make a database of their own nor start a service.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pymysql
from sqlalchemy.engine import URL

from tests.debian import ensure, program, to_be_installed
from tests.postgres import _unprivileged_user
from tests.processes import UnavailableError, run

_PACKAGES: Final = ("mariadb-server-core", "mariadb-client-core")
# The last is what the second needs of the second package.
_PROGRAMS: Final = ("mariadbd", "mariadb-install-db", "my_print_defaults")
_USER: Final = "root"
_START_TIMEOUT: Final = 60.0
# What is lost when the machine loses power is of no interest here.
_CONFIGURATION: Final = {
    "character-set-server": "utf8mb4",
    "innodb-buffer-pool-size": "64M",
    "innodb-doublewrite": "0",
    "innodb-fast-shutdown": "2",
    "innodb-flush-log-at-trx-commit": "0",
    "innodb-log-file-size": "16M",
    "max-connections": "200",
    "skip-log-bin": "1",
}


def mariadb_description() -> str:
    """Return what the tests will run.

    :raises UnavailableError: if they cannot run any.
    """
    if missing := _missing():
        return to_be_installed(missing, _PACKAGES)
    version = run([program("mariadbd"), "--version"], timeout=_START_TIMEOUT)
    return f"{version.partition(' for ')[0].strip()}, started directly"


@contextmanager
def serve_mariadb() -> Iterator[URL]:
    """Start a server of its own, which listens on a socket alone; the URL is the superuser's."""
    ensure(_missing, _PACKAGES)
    with ExitStack() as stack:
        # Short, since the path of a socket has 107 characters at most.
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kravn-my-", ignore_cleanup_errors=True)))
        user = _unprivileged_user(home)
        _initialise(home, user)
        log = stack.enter_context((home / "log").open("w"))
        server = subprocess.Popen(
            [
                program("mariadbd"),
                "--no-defaults",
                f"--datadir={home / 'data'}",
                f"--socket={home / 'socket'}",
                f"--pid-file={home / 'pid'}",
                "--skip-networking",
                *(f"--{name}={value}" for name, value in _CONFIGURATION.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=home,
            **user,
        )
        stack.callback(_stop, server)
        _wait_for(home / "socket", server, home / "log")
        yield URL.create(
            "mariadb+pymysql",
            _USER,
            host="localhost",
            database="mysql",
            query={"unix_socket": str(home / "socket"), "charset": "utf8mb4"},
        )


@contextmanager
def fresh_mariadb_database(server: URL) -> Iterator[URL]:
    """Have a database that nobody used before, for as long as the block lasts."""
    name = f"test_{secrets.token_hex(6)}"
    with pymysql.connect(user=_USER, unix_socket=str(server.query["unix_socket"]), autocommit=True) as connection:
        cursor = connection.cursor()
        cursor.execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        try:
            yield server.set(database=name)
        finally:
            # A test that failed may have left a transaction open, whose locks DROP would wait for.
            cursor.execute("SELECT id FROM information_schema.processlist WHERE db = %s", (name,))
            for (other,) in cursor.fetchall():
                with suppress(pymysql.OperationalError):  # it has ended by itself
                    cursor.execute("KILL %s", (other,))
            cursor.execute(f"DROP DATABASE {name}")


def _missing() -> str:
    return ", ".join(name for name in _PROGRAMS if not program(name))


def _initialise(home: Path, user: dict[str, Any]) -> None:
    command = [
        program("mariadb-install-db"),
        "--no-defaults",
        f"--datadir={home / 'data'}",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
    ]
    # Servers that are set up at once would otherwise give their temporary tables the same names in one directory.
    run(command, timeout=_START_TIMEOUT, environment={"TMPDIR": str(home)}, cwd=home, **user)


def _wait_for(path: Path, server: subprocess.Popen[bytes], log: Path) -> None:
    # Not with PyMySQL, which leaves its socket open where it cannot connect.
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                client.connect(str(path))
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(f"MariaDB did not start:\n{log.read_text()}") from error
            time.sleep(0.02)
        else:
            return


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
