"""Measuring in processes of their own: what happens once a process, or must not be mixed with what happened before."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from .measuring import rotated

_ROOT: Final = Path(__file__).parents[1]
_STATUS: Final = Path("/proc/self/status")


def output_of(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a module of this package in a new process and return what it prints.

    Of the settings of the package, it has those that are given and none from the surroundings.

    :raises RuntimeError: if it fails, with what it said.
    """
    done = subprocess.run(  # noqa: S603 - this package's own modules
        _command(module, arguments),
        check=False,
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env=_surroundings(environment),
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stdout


class Helper:
    """A process that does something whenever it is told to, and then prints numbers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.wait()

    def begin(self) -> None:
        """Have it begin."""
        assert self.process.stdin is not None  # noqa: S101 - it was started with one
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def wait(self) -> list[int]:
        """Wait until it has done that, and return the numbers.

        :raises RuntimeError: if it ended instead; it has printed why.
        """
        assert self.process.stdout is not None  # noqa: S101 - as above
        line = self.process.stdout.readline()
        if not line:
            msg = "a process that was to be measured ended"
            raise RuntimeError(msg)
        return [int(number) for number in line.split()]


@contextmanager
def helper(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Helper]:
    """Have a module of this package run in a new process: it prints an empty line once it is ready.

    Its settings are those of :func:`output_of`. At the end of the block it is killed.
    """
    with subprocess.Popen(  # noqa: S603 - this package's own modules
        _command(module, arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env=_surroundings(environment),
    ) as process:
        try:
            yield Helper(process)
        finally:
            process.kill()


def _command(module: str, arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", f"{__package__}.{module}", *arguments]


def _surroundings(environment: Mapping[str, str] | None) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("KRAVN_") and name != "PYTHONDONTWRITEBYTECODE"
    }
    return {**inherited, "PYTHONPYCACHEPREFIX": _bytecode().name, **(environment or {})}


@cache
def _bytecode() -> TemporaryDirectory[str]:
    """Return where compiled modules are kept: the first process of a kind compiles, and the others load that."""
    return TemporaryDirectory()


def least(
    commands: Mapping[str, tuple[str, ...]], rounds: int, environment: Mapping[str, str] | None = None
) -> dict[str, list[float]]:
    """Return the least of each number that each command prints. The commands, a module and arguments, take turns."""
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        for name in rotated(tuple(commands), number):
            printed = [float(text) for text in output_of(*commands[name], environment=environment).split()]
            found[name] = [min(pair) for pair in zip(found.get(name, [inf] * len(printed)), printed, strict=True)]
    return found


def peak() -> int:
    """Return the largest resident set that this process has had, in bytes."""
    # On Linux, what getrusage() tells begins with the peak of the process that started this one.
    if _STATUS.exists():
        return _of_status("VmHWM")
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def resident() -> int:
    """Return the resident set of this process, in bytes. Linux tells."""
    return _of_status("VmRSS")


def _of_status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines())
    return int(lines[name].split()[0]) * 1024
