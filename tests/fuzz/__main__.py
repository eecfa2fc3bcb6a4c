"""Fuzz every target with atheris, each in a process of its own: ``python -m tests.fuzz --inputs 1000000``.

As many run at a time as ``FUZZ_JOBS`` says, one by default.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from .targets import TARGETS, Target

_COVERED: Final = re.compile(r"cov: ([0-9]+) .*?corp: ([0-9]+)")
_FINDINGS: Final = Path(tempfile.gettempdir()) / "kravn-fuzz-findings"


@dataclass(frozen=True)
class Outcome:
    """What became of one target."""

    target: Target
    inputs: int
    seconds: float
    status: int
    output: str


def main(
    inputs: Annotated[int, typer.Option(help="How many there are for all targets together.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="What the fuzzer's random numbers begin with.")] = 1,
    findings: Annotated[Path, typer.Option(help="Where inputs are kept that fail.")] = _FINDINGS,
    target: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
) -> None:
    """Run all targets, and fail if one of them did."""
    unknown = sorted(set(target or ()) - TARGETS.keys())
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: no target; there are {', '.join(sorted(TARGETS))}")
    chosen = [TARGETS[name] for name in target or sorted(TARGETS)]
    findings.mkdir(parents=True, exist_ok=True)
    shares = sum(one.share for one in chosen)
    counts = [math.ceil(inputs * one.share / shares) for one in chosen]
    outcomes, console = [], Console()
    table = Table("target", "inputs", "coverage", "corpus", "seconds", "result")
    with ThreadPoolExecutor(int(os.environ.get("FUZZ_JOBS", "1"))) as pool:
        for outcome in pool.map(lambda one, count: _run(one, count, seed, findings), chosen, counts):
            outcomes.append(outcome)
            row = _row(outcome, findings)
            table.add_row(*row)
            if outcome.status:
                console.print(outcome.output[-4000:], markup=False, highlight=False)
            console.print("  ".join(row), markup=False, highlight=False)
    console.print(table)
    raise typer.Exit(int(any(outcome.status for outcome in outcomes)))


def _row(outcome: Outcome, findings: Path) -> list[str]:
    covered = _COVERED.findall(outcome.output)
    result = "ok" if outcome.status == 0 else f"FOUND, see {findings}"
    return [
        outcome.target.name,
        f"{outcome.inputs:,}",
        *(covered[-1] if covered else ("", "")),
        f"{outcome.seconds:.0f}",
        result,
    ]


def _run(target: Target, inputs: int, seed: int, findings: Path) -> Outcome:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(target.seeds()):
            (Path(corpus) / f"seed-{number}").write_bytes(data)
        options = [
            f"-runs={inputs}",
            f"-seed={seed}",
            f"-max_len={target.max_len}",
            "-timeout=20",
            "-rss_limit_mb=1024",
            f"-artifact_prefix={findings}/{target.name}-",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.one", target.name, *options, corpus],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    output = done.stdout.decode(errors="replace")
    return Outcome(target, inputs, time.monotonic() - begun, done.returncode, output)


if __name__ == "__main__":
    typer.run(main)
