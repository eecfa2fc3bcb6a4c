"""Re-encrypting all values of a table: beside an ``UPDATE`` that writes as much, by two processes, and in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import repeat
from typing import Final

import orjson
from sqlalchemy import text

from .documents import KINDS, Documents
from .figures import Effort, Figure, Section
from .floor import FLOOR, value_and_reencrypt
from .measuring import Contestant, beside, race
from .processes import Helper
from .rotated import KIND, Rotated, rotated_table

SECTION: Final = Section(
    "rekey",
    "Re-encrypting to another data key",
    "A PostgreSQL table of a primary key and documents of 190 bytes, all of which are under a retired data key; before "
    "each run it is filled anew and vacuumed. Workers are processes of their own that are connected and have their "
    "keys; what is timed is all of `rekey`: the plan, re-encrypting, and the census at the end. The other one is "
    "`UPDATE t SET document = document || ''`, which writes as much and encrypts nothing, in one transaction; 2.86 "
    "times as long is 0.35 of its rows a second. The floor is decrypting and encrypting as many values in memory, "
    "divided by that `UPDATE` as well: nothing is read, looked at or written. Where the `UPDATE` has nothing to keep "
    "but the primary key, it is short beside that; so the same is shown of a table that has an index on another column "
    "too. Two workers that take 0.62 of the time of one do 1.6 times as many rows a second. Memory is the peak of a "
    "worker's resident set.",
)

_ONE_TARGET: Final = 1 / 0.35
_TWO_TARGET: Final = 1 / 1.6
_MEMORY_TARGET: Final = 1.05
_UPDATE: Final = "UPDATE"
_ONE: Final = "one worker"
_TWO: Final = "two workers"


def measure(effort: Effort) -> Iterator[Figure]:
    """Race the workers and the ``UPDATE``, and look at what a worker takes of memory."""
    rows = effort.rekey_rows
    with rotated_table() as rotated:
        with ExitStack() as stack:
            workers = [stack.enter_context(rotated.worker()) for _ in range(2)]
            update = _contestant(_UPDATE, rotated, rows, lambda: _update(rotated, rows))
            one = _contestant(_ONE, rotated, rows, lambda: _rekey(workers[:1], rows))
            two = _contestant(_TWO, rotated, rows, lambda: _rekey(workers, rows))
            best = race([update, one, two, _floor(rows)], effort.rekey_rounds)
            yield _figure(f"{rows:,} rows, one worker", best, (_ONE, _UPDATE), _ONE_TARGET, rows)
            yield _figure(f"{rows:,} rows, the floor", best, (FLOOR, _UPDATE), None, rows)
            yield _figure(f"{rows:,} rows, two workers", best, (_TWO, _ONE), _TWO_TARGET, rows)
            rotated.add_index()
            best = race([update, one], effort.rekey_rounds)
            yield _figure(f"{rows:,} rows, another index, one worker", best, (_ONE, _UPDATE), _ONE_TARGET, rows)
        yield _memory(rotated, effort)


def _figure(label: str, best: Mapping[str, float], names: tuple[str, str], target: float | None, rows: int) -> Figure:
    ours, theirs = (best[name] for name in names)
    return Figure(label, names[1], ours / theirs, target, beside(ours, theirs, rows))


def _contestant(name: str, rotated: Rotated, rows: int, run: Callable[[], None]) -> Contestant:
    return Contestant(name, lambda: rotated.fill(rows), lambda _: run())


def _floor(rows: int) -> Contestant:
    value, reencrypt = value_and_reencrypt(orjson.dumps(Documents(KINDS[KIND], 1).fresh()[0]))
    return Contestant(FLOOR, lambda: None, lambda _: deque(map(reencrypt, repeat(value, rows)), maxlen=0))


def _update(rotated: Rotated, rows: int) -> None:
    statement = f"UPDATE {rotated.table.name} SET document = document || ''"  # noqa: S608 - a name of this package
    with rotated.engine.begin() as connection:
        updated = connection.execute(text(statement)).rowcount
    _check(updated, rows)


def _rekey(workers: Sequence[Helper], rows: int) -> None:
    for worker in workers:
        worker.begin()
    _check(sum(worker.wait()[0] for worker in workers), rows)


def _memory(rotated: Rotated, effort: Effort) -> Figure:
    few, many = (_peak(rotated, rows) for rows in (effort.rekey_few_rows, effort.rekey_many_rows))
    return Figure(
        f"memory, {effort.rekey_many_rows:,} rows",
        f"{effort.rekey_few_rows:,} rows",
        many / few,
        _MEMORY_TARGET,
        f"{many / 2**20:.1f} : {few / 2**20:.1f} MiB",
    )


def _peak(rotated: Rotated, rows: int) -> int:
    rotated.fill(rows)
    with rotated.worker() as worker:
        worker.begin()
        moved, peak = worker.wait()
    _check(moved, rows)
    return peak


def _check(done: int, rows: int) -> None:
    """Raise if not all rows were done."""
    if done != rows:
        msg = f"{done} of {rows} rows were done, so the times mean nothing"
        raise AssertionError(msg)
