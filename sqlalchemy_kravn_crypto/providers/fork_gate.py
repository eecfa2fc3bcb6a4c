"""Keeps forks and calls apart, for a library that cannot be forked while it is at work."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 30.0
"""For how many seconds a fork waits; a call that takes longer hangs, and a program that forks must not hang with it."""


class ForkGate:
    """Many calls may be under way at once, and a fork by Python's ``os.fork`` waits for all of them.

    It lasts as long as the process.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._changed = threading.Condition(threading.Lock())
        self._calls = 0
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._close, after_in_parent=self._open, after_in_child=self._abandon)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Be a call, for as long as the ``with`` block lasts."""
        with self._changed:
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def _close(self) -> None:
        # The lock stays taken until the fork is over, so that no call begins meanwhile.
        self._changed.acquire()
        self._changed.wait_for(lambda: self._calls == 0, self._patience)

    def _open(self) -> None:
        self._changed.release()

    def _abandon(self) -> None:
        # Of the threads that called and that waited, none is here.
        self._changed = threading.Condition(threading.Lock())
        self._calls = 0
