"""A process that counts in encrypted rows without a rest, and looks at the key store only if it must.

Run as a program with the database's URL and the names of the ways in which it changes rows; it configures itself from
the environment. On the line ``pause`` it stops until the next line; on one with an event of an engine, it inserts a
row, and stops there. At the end of its input it says what it did.
"""

from __future__ import annotations

import itertools
import json
import os
import select as descriptors
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from sqlalchemy import Engine, create_engine, event, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, configure, reset
from sqlalchemy_kravn_crypto.exceptions import KravnCryptoError
from tests.processes import environment_with

ROWS: Final = 6
_ROOT: Final = Path(__file__).parents[2]
_PATIENCE: Final = 120.0


class Base(DeclarativeBase):
    pass


class Tally(Base):
    """How often a row was changed: in the clear, and encrypted."""

    __tablename__ = "stale_tally"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int]
    content: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


# --- The program -----------------------------------------------------------------------------------------------------


def change_by_orm(engine: Engine, row: int) -> bool:
    """Lock a row and count in it."""
    with Session(engine) as session:
        tally = session.get_one(Tally, row, with_for_update=True)
        tally.version, tally.content = tally.version + 1, {"count": tally.content["count"] + 1}
        session.commit()
    return True


def change_by_core(engine: Engine, row: int) -> bool:
    """Count in a row unless somebody else has done so meanwhile; tell whether it was counted."""
    with engine.begin() as connection:
        version, content = connection.execute(select(Tally.version, Tally.content).where(Tally.id == row)).one()
        unchanged = update(Tally).where(Tally.id == row, Tally.version == version)
        changed = unchanged.values(version=version + 1, content={"count": content["count"] + 1})
        return connection.execute(changed).rowcount == 1


def change_blindly(engine: Engine, row: int) -> bool:
    """Count in a row without a look at what is encrypted in it, which may be under a key that is not known here."""
    with engine.begin() as connection:
        version = connection.execute(select(Tally.version).where(Tally.id == row).with_for_update()).scalar_one()
        changed = update(Tally).where(Tally.id == row).values(version=version + 1, content={"count": version + 1})
        connection.execute(changed)
    return True


def wait_at(place: str) -> None:
    """Say where it is, and wait for the next line."""
    print(place, flush=True)  # noqa: T201 - to the test
    sys.stdin.readline()


WAYS: Final = {"orm": change_by_orm, "core": change_by_core, "blindly": change_blindly}


def insert_held(engine: Engine, number: int, at: str) -> None:
    """Insert a row, and wait for a line on the way."""

    def wait(_connection: object, *more: Any) -> None:
        if not more or more[1].startswith("INSERT INTO stale_tally"):
            wait_at("held")

    with Session(engine) as session:
        session.add(Tally(id=number, version=0, content={"count": 0}))
        event.listen(engine, at, wait)
        session.commit()
        event.remove(engine, at, wait)
    print("committed", flush=True)  # noqa: T201 - as above


def main(url: str, ways: list[str]) -> None:
    """Count until the input ends."""
    engine = create_engine(url)
    configure(engine)
    counted, refused = Counter[int](), Counter[str]()
    numbers = itertools.count(os.getpid())
    print("ready", flush=True)  # noqa: T201 - as above
    for turn in itertools.count():
        if descriptors.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline().strip()
            if not line:
                break
            if line == "pause":
                wait_at("paused")
            else:
                insert_held(engine, next(numbers), line)
        row, change = turn % ROWS, WAYS[ways[turn // ROWS % len(ways)]]
        try:
            counted[row] += change(engine, row)
        except KravnCryptoError as error:
            refused[type(error).__name__] += 1
    reset()
    print(json.dumps({"counted": counted, "refused": refused}), flush=True)  # noqa: T201 - as above


# --- Who talks to it -------------------------------------------------------------------------------------------------


class StaleWriter:
    """One process of the program, which is at work when this returns."""

    def __init__(self, url: str, variables: Mapping[str, str], ways: Collection[str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it is closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.stale_writer", url, *ways],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=_ROOT,
            env=environment_with(variables),
            text=True,
        )
        self.counted = Counter[int]()
        self.refused = Counter[str]()
        self.hears("ready")

    def _says(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self._log.seek(0)
        assert line, self._log.read()
        return line.strip()

    def hears(self, line: str) -> None:
        assert self._says() == line

    def says(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def pause(self) -> None:
        """Have it stop between two transactions."""
        self.says("pause")
        self.hears("paused")

    def resume(self) -> None:
        self.says("go")

    def hold(self, at: Literal["before_cursor_execute", "commit"]) -> None:
        """Have it insert a row, and stop when the value is encrypted and not sent, or when it is not committed."""
        self.says(at)
        self.hears("held")

    def go_on(self) -> None:
        """Let it commit what it is held at, and then count again."""
        self.says("go")
        self.hears("committed")

    def stop(self) -> None:
        """Let it end, and take in what it did."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        found = json.loads(self._says())
        self.counted = Counter({int(row): count for row, count in found["counted"].items()})
        self.refused = Counter(found["refused"])
        assert self._process.wait(_PATIENCE) == 0

    def kill(self) -> None:
        """End it at once. Harmless after :meth:`stop`."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._log.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
