"""What the tests ask of the system about processes."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

PATIENCE: Final = 30.0
"""Seconds that something may take which is certain to come."""


def wait_until(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait for what is certain to come; a test that waits in vain fails."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
