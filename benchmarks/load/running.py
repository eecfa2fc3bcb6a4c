"""A run: the processes are started, the data keys replaced meanwhile, and what is left is checked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Final

from sqlalchemy import create_engine, insert

from sqlalchemy_kravn_crypto.context import use_keyring
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.settings import Settings

from ..processes import helper
from . import checks
from .checks import Finding
from .keys import Keys
from .tables import ACCOUNTS, Account, count, create, values_of
from .worker import Done

_LOOKS_IN_LEASE: Final = 12
"""As with the defaults: a look every 15 seconds, and a lease of 180."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much there is to do.

    :ivar values: how many values are written, and how many are read.
    :ivar threads: how many there are in each process.
    :ivar rotations: how many times the data key is replaced.
    :ivar lease: of the processes, in seconds.
    :ivar seconds: after how many seconds it has failed.
    """

    values: int
    processes: int
    threads: int
    rotations: int
    lease: float
    seconds: float


@dataclass(slots=True)
class Outcome:
    """What was found.

    :ivar errors: of the threads, as they were raised.
    :ivar facts: what there was besides, for whoever reads it.
    """

    findings: list[Finding] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """Whether everything is as it must be."""
        return not self.errors and all(finding.is_right for finding in self.findings)


def run(load: Load, url: str, kms: Mapping[str, str], say: Callable[[str], object] = lambda _: None) -> Outcome:
    """Do it.

    :param url: of a PostgreSQL database that is empty.
    :param kms: the settings of the KMS, by their environment variables.
    :param say: told what is being done.
    :raises TimeoutError: if the processes do not take in a data key in time.
    :raises RuntimeError: if one of them ends before it is told to.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        engine = create_engine(url)
        stack.callback(engine.dispose)
        settings = {**kms, "KRAVN_LEASE": str(load.lease), "KRAVN_LOOK_INTERVAL": str(load.lease / _LOOKS_IN_LEASE)}
        settings["KRAVN_DATA_DIR"] = str(directory)
        migrate(engine)
        create(engine)
        given = {name.removeprefix("KRAVN_").lower(): value for name, value in settings.items()}
        keys = Keys(engine, Settings(**given), load.seconds)
        with use_keyring(keys.keyring), engine.begin() as connection:
            rows = [{"id": row, "version": 0, **values_of(row, 0, Random(row))} for row in range(ACCOUNTS)]
            connection.execute(insert(Account), rows)
        threads = load.processes * load.threads
        share = -(-load.values // threads)
        say("the processes start")
        paths = [directory / f"{number}.json" for number in range(load.processes)]
        workers = []
        for number, path in enumerate(paths):
            numbers = map(str, (number * load.threads, load.threads, threads, share, load.seconds))
            workers.append(stack.enter_context(helper("load.worker", url, *numbers, str(path), environment=settings)))
        for worker in workers:
            worker.begin()
        for number in range(load.rotations):
            say(f"data key {number + 2} takes the place of data key {number + 1}")
            keys.replace()
        rotated = time.monotonic()
        say("the retired data keys are disabled")
        keys.disable_retired()
        say("the processes do the rest of their share")
        for worker in workers:
            worker.begin()
        for worker in workers:
            worker.wait()
        done = [Done(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]
        ended = time.monotonic()
        say("what is left is checked")
        outcome = Outcome(errors=[error for one in done for error in one.errors])
        outcome.findings += checks.at_work(done, load.values)
        outcome.findings += checks.stored(engine, done, keys.operator.store.open(engine).keyring)
        written = sum(map(count, range(ACCOUNTS))) + sum(one.written for one in done) + keys.rekeyed
        with engine.connect() as connection:
            outcome.findings += checks.nonces(connection, written)
            outcome.findings += checks.keys(connection, keys.retired, keys.primary)
        outcome.facts = {
            "transactions": f"{sum(one.transactions for one in done):,}",
            "changes without a lock that another thread forestalled": f"{sum(one.conflicts for one in done):,}",
            "values re-encrypted by the rekeys": f"{keys.rekeyed:,}",
            "rekeys run again for values that came late under a retired data key": str(keys.repeated),
            "resident set of a process at a quarter of its work": _sizes([one.warm for one in done]),
            "at the end": _sizes([one.end for one in done]),
            "time": (
                f"{ended - began:.0f} s, of which the rotations with their rekeys {rotated - began:.0f} s; "
                f"then {time.monotonic() - ended:.0f} s of checks"
            ),
        }
    return outcome


def _sizes(sizes: list[int]) -> str:
    return f"{min(sizes) / 2**20:.0f} to {max(sizes) / 2**20:.0f} MiB"
