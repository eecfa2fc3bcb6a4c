"""Fuzz every target with atheris, each in a process of its own: ``python -m tests.fuzz --inputs 1000000``."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

if len(sys.argv) > 1 and sys.argv[1] == "--one":
    import atheris

    # What was imported before is not instrumented, and without that there is no coverage to be guided by.
    with atheris.instrument_imports(include=["sqlalchemy_kravn_crypto"], enable_loader_override=False):
        from .targets import TARGETS, Target, check, prepared

        prepared(sys.argv[2])
else:
    from .targets import TARGETS, Target, check

_COVERED = re.compile(r"cov: ([0-9]+) .*?corp: ([0-9]+)")


def main() -> int:
    """Run all targets, or be the process of one; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many there are for all targets together")
    parser.add_argument("--seed", type=int, default=1, help="what the fuzzer's random numbers begin with")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "kravn-fuzz-findings")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only this one; may be repeated")
    parser.add_argument("--one", choices=sorted(TARGETS), help=argparse.SUPPRESS)
    given, for_atheris = parser.parse_known_args()
    if given.one:
        _be(TARGETS[given.one], for_atheris)
    chosen = [TARGETS[name] for name in given.target or sorted(TARGETS)]
    given.findings.mkdir(parents=True, exist_ok=True)
    table = Table("target", "inputs", "coverage", "corpus", "seconds", "result")
    shares = sum(target.share for target in chosen)
    failed = 0
    for target in chosen:
        inputs = -(-given.inputs * target.share // shares)
        begun = time.monotonic()
        status, output = _run(target, inputs, given.seed, given.findings)
        covered = _COVERED.findall(output)
        result = "ok" if status == 0 else f"FOUND, see {given.findings}"
        table.add_row(
            target.name,
            f"{inputs:,}",
            *(covered[-1] if covered else ("", "")),
            f"{time.monotonic() - begun:.0f}",
            result,
        )
        if status:
            failed += 1
            Console().print(output[-4000:], markup=False, highlight=False)
    Console().print(table)
    return int(failed > 0)


def _run(target: Target, inputs: int, seed: int, findings: Path) -> tuple[int, str]:
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
            [sys.executable, "-m", "tests.fuzz", "--one", target.name, *options, corpus],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    return done.returncode, done.stdout.decode(errors="replace")


def _be(target: Target, options: list[str]) -> None:
    def run(data: bytes) -> None:
        check(target, data)

    atheris.Setup([sys.argv[0], *options], run)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
