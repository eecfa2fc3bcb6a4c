"""What a benchmark finds: ratios, each beside what it should be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Figure:
    """One ratio: what this package takes, divided by what the other one takes. Below 1 is better than the other."""

    label: str
    against: str
    ratio: float | None
    """``None`` if it could not be measured; the detail says why."""

    target: float | None = None
    detail: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached, as far as there is one."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio <= self.target


@dataclass(frozen=True, slots=True)
class Section:
    """Figures of one kind."""

    name: str
    title: str
    method: str
    """What was measured, in a few sentences for whoever reads the table alone."""

    figures: list[Figure] = field(default_factory=list)

    def add(self, figures: Iterable[Figure]) -> None:
        """Append figures."""
        self.figures.extend(figures)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    rows: int
    row_rounds: int
    values: int
    value_rounds: int
    start_rounds: int
    memory_rows: int
    memory_rounds: int
    rekey_rows: int
    rekey_rounds: int
    rekey_few_rows: int
    rekey_many_rows: int
    census_rows: int
    census_rounds: int
    serving_reads: int
    serving_rounds: int
    transactions: int
    transaction_rounds: int


THOROUGH = Effort(
    rows=20_000,
    row_rounds=7,
    values=500,
    value_rounds=100,
    start_rounds=21,
    memory_rows=100_000,
    memory_rounds=3,
    rekey_rows=200_000,
    rekey_rounds=5,
    rekey_few_rows=10_000,
    rekey_many_rows=1_000_000,
    census_rows=1_000_000,
    census_rounds=9,
    serving_reads=3_000,
    serving_rounds=9,
    transactions=500,
    transaction_rounds=21,
)
QUICK = Effort(
    rows=4_000,
    row_rounds=15,
    values=500,
    value_rounds=30,
    start_rounds=7,
    memory_rows=30_000,
    memory_rounds=1,
    rekey_rows=20_000,
    rekey_rounds=3,
    rekey_few_rows=10_000,
    rekey_many_rows=100_000,
    census_rows=400_000,
    census_rounds=5,
    serving_reads=1_000,
    serving_rounds=3,
    transactions=200,
    transaction_rounds=7,
)
