"""Measuring in processes of their own: what happens once a process, or must not be mixed with what happened before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from .measuring import rotated

_ROOT: Final = Path(__file__).parents[1]


def output_of(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a module of this package in a new process and return what it prints.

    Of the settings of the package, it has those that are given and none from the surroundings.

    :raises RuntimeError: if it fails, with what it said.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("KRAVN_") and name != "PYTHONDONTWRITEBYTECODE"
    }
    done = subprocess.run(  # noqa: S603 - this package's own modules
        [sys.executable, "-m", f"{__package__}.{module}", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**inherited, "PYTHONPYCACHEPREFIX": _bytecode().name, **(environment or {})},
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stdout


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
