"""How far a rekey is: a bar on a terminal, a line now and then elsewhere, both on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import Engine

from ..clock import Clock, process_clock
from ..ledger import Counts, Shard, progress
from ..rekey_worker import OnProgress
from ..rows import connect
from .output import note

_ON_TERMINAL: Final = 0.5
_IN_LOG: Final = 10.0


@dataclass(slots=True)
class Meter:
    """How fast values are seen, by all workers, and how long it will go on."""

    clock: Clock
    seen: int = 0
    total: int = 0
    _first: tuple[float, int] | None = field(default=None)

    def update(self, seen: int, total: int) -> None:
        """Take in how many have been seen of about how many."""
        if self._first is None or seen < self.seen:  # of a new plan, when there is another pass
            self._first = self.clock(), seen
        self.seen, self.total = seen, max(total, seen)

    def __str__(self) -> str:
        said = f"{self.seen:,} of {self.total:,} values"
        began, before = self._first or (self.clock(), self.seen)
        elapsed, done = self.clock() - began, self.seen - before
        if elapsed <= 0 or done <= 0:
            return said
        minutes, seconds = divmod(round((self.total - self.seen) * elapsed / done), 60)
        return f"{said}, {done / elapsed:,.0f} a second, {minutes}:{seconds:02} left"


class Display:
    """Shows how far the ledger says that it is, and not more often than is good for who reads it.

    :param interval: how many seconds pass between two looks at the ledger.
    :param show: shows the meter.
    """

    def __init__(self, engine: Engine, meter: Meter, interval: float, show: Callable[[], None]) -> None:
        self._engine = engine
        self._meter = meter
        self._interval = interval
        self._show = show
        self._due = meter.clock()
        self._key_id: str | None = None

    def after_batch(self, shard: Shard, _: Counts) -> None:
        """Show it if it is time to."""
        self._key_id = shard.key_id
        if self._meter.clock() >= self._due:
            self._due = self._meter.clock() + self._interval
            self.refresh()

    def refresh(self) -> None:
        """Show it now, if there has been anything to do."""
        if self._key_id is None:
            return
        with connect(self._engine) as connection:
            columns = [column for column in progress(connection) if column.key_id == self._key_id]
        self._meter.update(sum(column.rows_seen for column in columns), sum(column.rows_total for column in columns))
        self._show()


@contextmanager
def progress_shown(engine: Engine, clock: Clock = process_clock) -> Iterator[OnProgress]:
    """Give what is to be called after every batch."""
    from rich.console import Console  # noqa: PLC0415 - slow to import, and few commands need it
    from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415 - as above

    console = Console(stderr=True)
    meter = Meter(clock)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        lines = Display(engine, meter, _IN_LOG, lambda: note(f"rekey: {meter}"))
        yield lines.after_batch
        lines.refresh()
        return

    def move() -> None:
        bar.update(task, completed=meter.seen, total=meter.total, description=str(meter))

    with Progress(BarColumn(), TextColumn("{task.description}", markup=False), console=console) as bar:
        task = bar.add_task("", total=None)
        display = Display(engine, meter, _ON_TERMINAL, move)
        yield display.after_batch
        display.refresh()
