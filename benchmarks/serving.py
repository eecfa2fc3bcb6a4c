"""Reading single rows while all rows are re-encrypted."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from random import Random
from statistics import quantiles
from time import perf_counter
from typing import Final

from sqlalchemy import Integer, bindparam, func, select

from sqlalchemy_kravn_crypto.ledger import progress

from .figures import Effort, Figure, Section
from .measuring import rotated as turns
from .processes import Helper
from .rotated import Rotated, rotated_table

_ROWS_PER_SECOND: Final = 2_000
_DURING: Final = "during a rekey"
_WITHOUT: Final = "without one"

SECTION: Final = Section(
    "serving",
    "Serving while values are re-encrypted",
    "One process reads a row of a PostgreSQL table by its primary key and decrypts its document, one transaction after "
    f"the other, while another re-encrypts the table with `--max-rows-per-second {_ROWS_PER_SECOND}`; divided by the "
    "same while that one is stopped, in turns. Each turn gives the time that 99 of 100 reads keep within, and the best "
    "turn of each kind counts.",
)

_TARGET: Final = 2.0


def measure(effort: Effort) -> Iterator[Figure]:
    """Read in turns, with and without a rekey."""
    rows = effort.rekey_rows
    random = Random(rows)
    best = {_DURING: inf, _WITHOUT: inf}
    with rotated_table() as table:
        table.fill(rows)
        with table.worker(_ROWS_PER_SECOND) as worker:
            worker.begin()
            for number in range(effort.serving_rounds):
                for name in turns((_DURING, _WITHOUT), number):
                    ids = [random.randint(1, rows) for _ in range(effort.serving_reads)]
                    if name == _DURING:
                        seen = _seen(table)
                        found = _percentile(table, ids)
                        _check_that_it_went_on(table, seen)
                    else:
                        with _stopped(worker):
                            found = _percentile(table, ids)
                    best[name] = min(best[name], found)
    yield Figure(
        f"99th percentile of a read, {_DURING}",
        _WITHOUT,
        best[_DURING] / best[_WITHOUT],
        _TARGET,
        f"{best[_DURING] * 1e6:.0f} : {best[_WITHOUT] * 1e6:.0f} µs",
    )


def _percentile(table: Rotated, ids: list[int]) -> float:
    """Return the seconds that 99 of 100 reads keep within."""
    columns = table.table.c
    statement = select(columns.document).where(columns.id == bindparam("id", type_=Integer()))
    times: list[float] = []
    gc.collect()
    gc.disable()
    try:
        for number in ids:
            began = perf_counter()
            with table.engine.begin() as connection:
                connection.execute(statement, {"id": number}).scalar_one()
            times.append(perf_counter() - began)
    finally:
        gc.enable()
    return quantiles(times, n=100)[-1]


@contextmanager
def _stopped(worker: Helper) -> Iterator[None]:
    os.kill(worker.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)


def _seen(table: Rotated) -> int:
    with table.engine.begin() as connection:
        return sum(column.rows_seen for column in progress(connection))


def _check_that_it_went_on(table: Rotated, before: int) -> None:
    """Raise if nothing was re-encrypted meanwhile."""
    with table.engine.begin() as connection:
        column = progress(connection)
        total = connection.execute(select(func.count()).select_from(table.table)).scalar_one()
    after = sum(one.rows_seen for one in column)
    if not before < after < total:
        msg = f"{after - before} values were re-encrypted while rows were read, so the times mean nothing"
        raise AssertionError(msg)
