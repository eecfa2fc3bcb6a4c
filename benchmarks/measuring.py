"""Timing of contestants side by side, so that what slows the machine for a while slows all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import Any, Final, TypeVar

T = TypeVar("T")

_PATIENCE: Final = 10.0  # seconds after which no round is added to those that were asked for
_BETTER: Final = 0.99  # of the best time so far: less is noise


@dataclass(frozen=True, slots=True)
class Contestant:
    """Something to be timed against others."""

    name: str
    prepare: Callable[[], Any]
    """Makes what the run needs, fresh for every round; not timed."""

    run: Callable[[Any], Any]
    """What is timed. What it returns is freed after the clock was stopped."""


def race(contestants: Sequence[Contestant], rounds: int) -> dict[str, float]:
    """Return the best time of each contestant, in seconds.

    Every round has all of them. The best time is the one with the fewest interruptions: where the machine is busy, it
    takes more rounds to have one, so they go on while best times still get better. The garbage collector runs before,
    and not during a run.

    :param rounds: how many there are where the machine is quiet.
    """
    best = dict.fromkeys((contestant.name for contestant in contestants), inf)
    gc.collect()
    gc.freeze()  # the modules, which would make each collection slow
    try:
        began, number, last = perf_counter(), 0, rounds
        while number < last:
            for contestant in rotated(contestants, number):
                elapsed = _time(contestant)
                if elapsed < best[contestant.name] * _BETTER and perf_counter() - began < _PATIENCE:
                    last = max(last, number + 1 + rounds // 2)
                best[contestant.name] = min(best[contestant.name], elapsed)
            number += 1
    finally:
        gc.unfreeze()
    return best


def rotated(contestants: Sequence[T], number: int) -> Sequence[T]:
    """Return the contestants of a round, which begins with another one than the round before."""
    first = number % len(contestants)
    return [*contestants[first:], *contestants[:first]]


def _time(contestant: Contestant) -> float:
    prepared = contestant.prepare()
    gc.collect()
    gc.disable()
    try:
        began = perf_counter()
        result = contestant.run(prepared)
        elapsed = perf_counter() - began
    finally:
        gc.enable()
    del result, prepared
    return elapsed


def beside(ours: float, theirs: float, count: int) -> str:
    """Return two times, in microseconds for each of so many values or rows."""
    return f"{ours / count * 1e6:.2f} : {theirs / count * 1e6:.2f} µs"
