"""One mutant against its tests, in a process of its own that is forked from one that has imported what takes time."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from .mutants import PACKAGE, path_of

_OPTIONS: Final = (
    "-x",
    "-q",
    "--assert=plain",
    "--tb=short",
    "-p",
    "no:cacheprovider",
    # The same examples at each run, and no deadline, so that a mutant is killed each time or never.
    "--hypothesis-profile=ci",
)


class _Instead(importlib.abc.MetaPathFinder):
    """Gives a module another source. Nothing is written, so no tree has to be mended afterwards."""

    def __init__(self, module: str, source: str) -> None:
        self._name, self._source, self._path = f"{PACKAGE}.{module}", source, str(path_of(module))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=_Source(self._path, self._source))


class _Source(importlib.abc.Loader):
    def __init__(self, path: str, source: str) -> None:
        self._path, self._source = path, source

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, self._path, "exec"), vars(module))  # noqa: S102 - it is what is to be tested


class Trial:
    """A run of the tests in a child process.

    :param module: the module that has another source.
    :param source: the source.
    :param tests: arguments of pytest.
    :param limit: seconds after which it counts as killed.
    :param log: where the output goes.
    """

    def __init__(self, module: str, source: str, tests: Sequence[str], limit: float, log: Path) -> None:
        if PACKAGE in sys.modules:
            message = f"{PACKAGE} is imported already, so no test would see a mutant"
            raise RuntimeError(message)
        self.log, self._limit, self.started = log, limit, time.monotonic()
        self._pid = os.fork()
        if self._pid == 0:
            _run_tests(module, source, tests, log)

    def survived(self) -> bool | None:
        """Tell whether all tests passed; ``None`` as long as they run."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid:
            self._kill_the_rest()
            return status == 0
        if time.monotonic() - self.started < self._limit:
            return None
        self._kill_the_rest()
        os.waitpid(self._pid, 0)
        return False

    def _kill_the_rest(self) -> None:
        """Kill whatever the tests have started and not ended; they lead a process group of their own."""
        try:
            os.killpg(self._pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _run_tests(module: str, source: str, tests: Sequence[str], log: Path) -> None:
    """Run the tests, and end the process: without cleaning up what is the parent's."""
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.meta_path.insert(0, _Instead(module, source))
        code = int(pytest.main([*_OPTIONS, *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)
