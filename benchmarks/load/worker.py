"""Run in a process of its own: threads that write and read through one pool, from one line of input to the next.

It prints an empty line when it is ready, another when all is over, and what it found is in a file.
"""

from __future__ import annotations

import json
import logging
import select
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Final

from sqlalchemy import create_engine

from sqlalchemy_kravn_crypto import configure, reset

from ..processes import resident
from .hand import Hand

WARM: Final = 0.25
"""Which part of the work is done before it counts by how much the process grows."""

_POOL: Final = 5
"""Connections that a process keeps; up to one for each thread are opened and closed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What one process has done.

    :ivar changes: how often it has committed a change of each account.
    :ivar entries: how many rows each of its threads has added.
    :ivar conflicts: how often another thread was faster, where a change was tried without a lock.
    :ivar warm: bytes of the resident set when a quarter of the work was done.
    :ivar end: the same at the end.
    :ivar errors: of its threads, and what the package warned of.
    """

    written: int
    read: int
    transactions: int
    conflicts: int
    changes: list[int]
    entries: list[int]
    warm: int
    end: int
    errors: list[str]


class Warnings(logging.Handler):
    """Keeps what the package warns of: where all is well, that is nothing."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.found.append(record.getMessage())


def main(url: str, first: int, count: int, threads: int, share: int, seconds: float, path: Path) -> None:  # noqa: PLR0913, PLR0917 - its arguments
    """Work.

    :param first: which of all threads the first one of this process is.
    :param count: how many threads this process has, of all ``threads``.
    :param share: how many values each is to write and to read.
    :param seconds: for how long at most.
    :param path: where what was found is written to.
    """
    warnings = Warnings()
    logging.getLogger("sqlalchemy_kravn_crypto").addHandler(warnings)
    engine = create_engine(url, pool_size=min(_POOL, count), max_overflow=count)
    configure(engine)
    hands = [Hand(engine, number, threads, share) for number in range(first, first + count)]
    is_over = Event()
    until = time.monotonic() + seconds
    running = [Thread(target=hand.work, args=(is_over, until)) for hand in hands]
    print(flush=True)  # noqa: T201 - to who started this process
    sys.stdin.readline()
    for thread in running:
        thread.start()
    warm = 0
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        if not warm and all(hand.progress >= WARM for hand in hands):
            warm = resident()
    is_over.set()
    for thread in running:
        thread.join()
    end = resident()
    reset()
    engine.dispose()
    done = Done(
        written=sum(hand.written for hand in hands),
        read=sum(hand.read for hand in hands),
        transactions=sum(hand.transactions for hand in hands),
        conflicts=sum(hand.conflicts for hand in hands),
        changes=[sum(changes) for changes in zip(*(hand.changes for hand in hands), strict=True)],
        entries=[hand.entries for hand in hands],
        warm=warm or end,
        end=end,
        errors=[*(error for hand in hands for error in hand.errors), *warnings.found],
    )
    path.write_text(json.dumps(asdict(done)), encoding="utf-8")
    print(flush=True)  # noqa: T201 - as above


if __name__ == "__main__":
    _url, _first, _count, _threads, _share, _seconds, _path = sys.argv[1:]
    main(_url, int(_first), int(_count), int(_threads), int(_share), float(_seconds), Path(_path))
