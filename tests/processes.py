"""What the tests ask of the system about processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

PATIENCE: Final = 30.0
"""Seconds that something may take which is certain to come."""


class UnavailableError(Exception):
    """Something that the tests need is not here and cannot be installed, or does not run. It says why."""


def wait_until(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait for what is certain to come; a test that waits in vain fails."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def environment_with(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of this process with these settings of the library and no others.

    :param settings: by their names without the prefix.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KRAVN_")}
    return inherited | {f"KRAVN_{name}": value for name, value in settings.items()}


def run(
    command: Sequence[str | Path],
    *,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    given: str = "",
    **how: Any,
) -> str:
    """Return what a program prints.

    :param environment: variables beside those of this process.
    :param given: what it reads.
    :param how: more for ``subprocess.run``.
    :raises UnavailableError: if it fails, with all that it says.
    """
    shown = " ".join(map(str, command))
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command,
            check=False,
            input=given,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **(environment or {})},
            timeout=timeout,
            **how,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{shown} did not end within {timeout:.0f} s.") from error
    if done.returncode != 0:
        raise UnavailableError(f"{shown} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


@contextmanager
def forked(
    worker: Path, arguments: Sequence[str], number: int, settings: Mapping[str, str], directory: Path
) -> Iterator[list[socket.socket]]:
    """Start a program that forks a process for each of so many sockets, give the other ends, and end them all.

    :param worker: the program; it gets the descriptors of its ends behind its arguments.
    :param settings: those of the library, by their names without the prefix.
    """
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(number)]
        theirs = [stack.enter_context(pair[1]) for pair in pairs]
        ours = [stack.enter_context(pair[0]) for pair in pairs]
        descriptors = [channel.fileno() for channel in theirs]
        program = subprocess.Popen(
            [sys.executable, str(worker), *arguments, *map(str, descriptors)],
            pass_fds=descriptors,
            env=environment_with(settings),
            cwd=directory,
            start_new_session=True,
        )
        stack.callback(program.wait)
        stack.callback(os.killpg, program.pid, signal.SIGKILL)
        for channel in theirs:
            channel.close()
        yield ours


def is_running(number: int) -> bool:
    """Tell whether there is a process of this number; the zombie of one is for whoever inherited it."""
    return _stat(number)[:1] not in ([], ["Z"])


def children(parent: int = 0) -> set[int]:
    """Return the processes that one has started, this one if none is named, and not yet waited for."""
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return {number for number in numbers if _stat(number)[1:2] == [str(parent or os.getpid())]}


def _stat(number: int) -> list[str]:
    """Return the state of a process, its parent and more; nothing if there is none of this number."""
    with suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return []
