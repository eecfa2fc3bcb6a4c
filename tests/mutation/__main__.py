"""Test the tests: try all mutants of the modules that everything else depends on, and compare with what is known.

Run as ``python -m tests.mutation``, with the names of modules if it is not to be all of them. It fails when a mutant
survives that ``docs/reliability.md`` does not list, and when one that is listed there is killed or gone.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from .known import known_survivors
from .mutants import Change, Mutant, mutants_of, path_of
from .trial import Trial

_IMPORTED_BEFORE_THE_FORK: Final = (
    "botocore.session",
    "cryptography.hazmat.primitives.asymmetric.rsa",
    "cryptography.x509",
    "docker",
    "google.cloud.kms_v1",
    "hypothesis.strategies",
    "jwt",
    "ormsgpack",
    "orjson",
    "psycopg",
    "pydantic",
    "pymysql",
    "requests",
    "sqlalchemy.orm",
)
"""What takes most of the time of a trial, were it imported in each. Nothing here imports the package."""

_SQLITE_ONLY: Final = ("-k", "not postgresql and not mariadb")

TESTS: Final[dict[str, tuple[str, ...]]] = {
    "aead": ("tests/test_aead.py",),
    "ciphertext": ("tests/test_ciphertext.py",),
    "keyring": ("tests/test_keyring.py",),
    "codecs.base": ("tests/test_documents.py", "tests/test_scalars.py"),
    "codecs.documents": ("tests/test_documents.py",),
    "codecs.objects": ("tests/test_objects.py",),
    "codecs.scalars": ("tests/test_scalars.py",),
    "codecs.selection": ("tests/test_selection.py",),
    "keystore": ("tests/test_keystore.py", *_SQLITE_ONLY),
}
"""The tests of each module: those that are about it, and fast."""

_LEAST_LIMIT: Final = 15.0
"""Seconds that any mutant gets, however fast the tests are."""


def main(modules: Sequence[str]) -> int:
    """Try all mutants of the modules, and return the status to exit with."""
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    for name in _IMPORTED_BEFORE_THE_FORK:
        importlib.import_module(name)
    known, wrong = known_survivors(), 0
    with tempfile.TemporaryDirectory() as logs:
        for module in modules or TESTS:
            began = time.monotonic()
            mutants = mutants_of(module)
            limit = _time_limit(module, Path(logs))
            found = set(_survivors(mutants, TESTS[module], limit, Path(logs)))
            expected = {change for change in known if change.module == module}
            minutes = (time.monotonic() - began) / 60
            survived = sum(mutant.change in found for mutant in mutants)
            _say(f"{module}: {len(mutants)} mutants, {len(mutants) - survived} killed, {survived} survived", minutes)
            wrong += _differences("survives, and is not listed in docs/reliability.md", found - expected)
            wrong += _differences("is listed in docs/reliability.md, and does not survive", expected - found)
    return 1 if wrong else 0


def _time_limit(module: str, logs: Path) -> float:
    """Return the seconds that a mutant gets: five times those of the module as it is, which must pass its tests."""
    source = path_of(module).read_text(encoding="utf-8")
    trial = Trial(module, source, TESTS[module], 600.0, logs / "unchanged")
    while (survived := trial.survived()) is None:
        time.sleep(0.05)
    if not survived:
        message = f"the tests of {module} do not pass as it is:\n{trial.log.read_text(encoding='utf-8')[-4000:]}"
        raise SystemExit(message)
    return max(_LEAST_LIMIT, 5 * (time.monotonic() - trial.started))


def _survivors(mutants: Sequence[Mutant], tests: Sequence[str], limit: float, logs: Path) -> Iterator[Change]:
    """Try all mutants, as many at a time as ``MUTATION_JOBS`` says, and yield the changes of those that survive."""
    jobs = int(os.environ.get("MUTATION_JOBS", "1"))
    waiting, running = list(enumerate(mutants)), dict[int, tuple[Mutant, Trial]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            number, mutant = waiting.pop(0)
            trial = Trial(mutant.change.module, mutant.source, tests, limit, logs / str(number))
            running[number] = mutant, trial
        time.sleep(0.01)
        for number, (mutant, trial) in list(running.items()):
            survived = trial.survived()
            if survived is not None:
                del running[number]
            if survived:
                _say(f"  survives: {mutant.change}")
                yield mutant.change


def _differences(verdict: str, changes: set[Change]) -> int:
    for change in sorted(changes):
        _say(f"  {verdict}:\n  * `{change.module}`, `{change.function}`: `{change.before}` → `{change.after}`")
    return len(changes)


def _say(text: str, minutes: float | None = None) -> None:
    sys.stdout.write(text + ("\n" if minutes is None else f", {minutes:.1f} minutes\n"))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
