"""Counting the values of a column by data key, beside counting them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from sqlalchemy import func, select

from sqlalchemy_kravn_crypto.census import census

from .figures import Effort, Figure, Section
from .measuring import Contestant, beside, race
from .rotated import Rotated, rotated_table

SECTION: Final = Section(
    "census",
    "Counting values by data key",
    "A PostgreSQL table of documents of 190 bytes, half of them under a retired data key and half under the primary: "
    "`census` of the encrypted column, divided by `SELECT count(document)` of the same table, which scans it too and "
    "looks at whether there is a value.",
)

_TARGET: Final = 2.0
_OURS: Final = "census"
_THEIRS: Final = "SELECT count(document)"


def measure(effort: Effort) -> Iterator[Figure]:
    """Race the two."""
    rows = effort.census_rows
    half = rows // 2
    with rotated_table() as rotated:
        rotated.fill(half, rows - half)
        best = race(
            [
                Contestant(_OURS, lambda: None, lambda _: _census(rotated, [half, rows - half])),
                Contestant(_THEIRS, lambda: None, lambda _: _count(rotated, rows)),
            ],
            effort.census_rounds,
        )
    yield Figure(
        f"{rows:,} rows", _THEIRS, best[_OURS] / best[_THEIRS], _TARGET, beside(best[_OURS], best[_THEIRS], rows)
    )


def _census(rotated: Rotated, expected: list[int]) -> None:
    with rotated.engine.connect() as connection:
        counted = census(connection, rotated.columns).columns[0]
    _check(sorted(counted.keys.values()), expected)


def _count(rotated: Rotated, expected: int) -> None:
    with rotated.engine.connect() as connection:
        counted = connection.execute(select(func.count(rotated.table.c.document))).scalar_one()
    _check(counted, expected)


def _check(counted: object, expected: object) -> None:
    """Raise if the values were not counted."""
    if counted != expected:
        msg = f"{counted} were counted where {expected} are, so the times mean nothing"
        raise AssertionError(msg)
