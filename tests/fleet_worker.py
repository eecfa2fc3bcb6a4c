"""The fleet: processes that write and read rows of one table for as long as they are told to.

Run as a program with the database's URL, the file of the board, a seed and the descriptors of one socket for each
worker. It imports once and forks, so that what takes time is the serving.
"""

from __future__ import annotations

import json
import mmap
import os
import select as sockets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from random import Random
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, configure, reset
from sqlalchemy_kravn_crypto.exceptions import DisabledKeyError, LeaseExpiredError
from sqlalchemy_kravn_crypto.providers import vault
from sqlalchemy_kravn_crypto.settings import Settings

IMPORTED_BEFORE_THE_FORK = (vault,)

ROWS: Final = 40
_MOST_ERRORS: Final = 3
_SIZE: Final = 8
_TRANSACTIONS, _REFUSED, _UNDER_DISABLED, _IN_FLIGHT, _COMMITTED = range(5)
_WIDTH: Final = _COMMITTED + ROWS


class Base(DeclarativeBase):
    pass


class Tally(Base):
    """How often each worker has changed a row, in its encrypted document; and how often all of them, in the clear."""

    __tablename__ = "tally"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int]
    content: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


class Board:
    """What each worker has done, in a file that it maps: what it noted is there also when it was killed.

    :param path: the file.
    :param workers: how many there are.
    """

    def __init__(self, path: Path, workers: int) -> None:
        if not path.exists():
            path.write_bytes(bytes(_SIZE * _WIDTH * workers))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._numbers = memoryview(self._map).cast("q")

    def line(self, worker: int) -> Line:
        """Return the part of one worker."""
        return Line(self._numbers[worker * _WIDTH : (worker + 1) * _WIDTH])

    def close(self) -> None:
        """Forget it; no line may be in use."""
        self._numbers.release()
        self._map.close()


class Line:
    """What one worker has done."""

    def __init__(self, numbers: memoryview) -> None:
        self._numbers: Any = numbers

    @property
    def transactions(self) -> int:
        """How many transactions it has ended."""
        return int(self._numbers[_TRANSACTIONS])

    @property
    def refused(self) -> int:
        """How often it was refused for want of a lease."""
        return int(self._numbers[_REFUSED])

    @property
    def under_disabled(self) -> int:
        """How often it met a value under a disabled data key."""
        return int(self._numbers[_UNDER_DISABLED])

    def committed(self, row: int) -> tuple[int, int]:
        """Return how often it has changed a row, at least and at most."""
        certain = int(self._numbers[_COMMITTED + row])
        return certain, certain + (int(self._numbers[_IN_FLIGHT]) >> row & 1)

    def begin(self, rows: Collection[int]) -> None:
        """Note that a transaction may commit changes of rows from now on."""
        self._numbers[_IN_FLIGHT] = sum(1 << row for row in rows)

    def end(self, rows: Collection[int] = ()) -> None:
        """Note that a transaction has ended, and which rows it has changed."""
        # Who is killed between these lines leaves a row that is certain and in flight: at most one more than it has.
        for row in rows:
            self._numbers[_COMMITTED + row] += 1
        self._numbers[_IN_FLIGHT] = 0
        self._numbers[_TRANSACTIONS] += 1

    def note_refused(self) -> None:
        self._numbers[_REFUSED] += 1

    def note_under_disabled(self) -> None:
        self._numbers[_UNDER_DISABLED] += 1

    def release(self) -> None:
        """Let go of the board."""
        self._numbers.release()


class TornError(Exception):
    """The encrypted and the clear part of a row do not belong together."""


def check(row: int, version: int, content: Mapping[str, Any]) -> None:
    """See that what was read of a row belongs together."""
    if sum(content["by"].values()) != version or content["row"] != row:
        message = f"row {row} of version {version} holds {content}"
        raise TornError(message)


class Worker:
    """One process of the fleet.

    :param lease: for how many seconds it writes without a look; its longest transactions are longer.
    """

    def __init__(self, number: int, engine: Engine, line: Line, random: Random, lease: float) -> None:
        self._name = str(number)
        self._engine = engine
        self._line = line
        self._random = random
        self._lease = lease
        self.errors: list[str] = []

    def serve(self, ways: Collection[Callable[[], Any]], is_over: Callable[[], bool]) -> None:
        """Do one thing after the other; what fails is kept, and the next is tried."""
        chosen = list(ways)
        while not is_over():
            try:
                self._random.choice(chosen)()
            except DisabledKeyError:
                self._line.note_under_disabled()
                self._line.end()
            except Exception:  # noqa: BLE001 - all are failures, and the test reports them
                self._line.end()
                if len(self.errors) < _MOST_ERRORS:
                    self.errors.append(traceback.format_exc(limit=-6))

    @property
    def writing(self) -> list[Callable[[], None]]:
        """The ways to change rows."""
        return [
            lambda: self._write(self._lock_by_orm),
            lambda: self._write(self._lock_by_core),
            lambda: self._write(self._compare_by_core),
        ]

    @property
    def reading(self) -> list[Callable[[], None]]:
        """The ways to read rows; by far the most often, short ones."""
        short = [self._read_by_orm, self._read_by_core, self._read_page_by_orm, self._read_page_by_core]
        return [
            *short * 8,
            lambda: self._read_for_long("READ COMMITTED"),
            lambda: self._read_for_long("REPEATABLE READ"),
        ]

    # --- Writing -----------------------------------------------------------------------------------------------------

    def _write(self, way: Callable[[list[int]], bool]) -> None:
        # In the order of their ids, so that no two writers wait for each other.
        rows = sorted(self._random.sample(range(ROWS), self._random.choice((1, 1, 1, 2, 4))))
        self._line.begin(rows)
        committed = False
        try:
            committed = way(rows)
        except LeaseExpiredError:
            self._line.note_refused()
        self._line.end(rows if committed else ())

    def _changed(self, content: Mapping[str, Any]) -> dict[str, Any]:
        by = content["by"]
        return {**content, "by": {**by, self._name: by.get(self._name, 0) + 1}}

    def _lock_by_orm(self, rows: list[int]) -> bool:
        with Session(self._engine) as session:
            for row in rows:
                tally = session.get_one(Tally, row, with_for_update=True)
                check(tally.id, tally.version, tally.content)
                tally.content, tally.version = self._changed(tally.content), tally.version + 1
            session.commit()
        return True

    def _lock_by_core(self, rows: list[int]) -> bool:
        with self._engine.begin() as connection:
            for row in rows:
                statement = select(Tally.version, Tally.content).where(Tally.id == row).with_for_update()
                version, content = connection.execute(statement).one()
                check(row, version, content)
                self._update(connection, row, version, content)
        return True

    def _compare_by_core(self, rows: list[int]) -> bool:
        with self._engine.begin() as connection:
            statement = select(Tally.id, Tally.version, Tally.content).where(Tally.id.in_(rows)).order_by(Tally.id)
            for row, version, content in connection.execute(statement).all():
                check(row, version, content)
                if not self._update(connection, row, version, content):
                    connection.rollback()
                    return False
        return True

    def _update(self, connection: Connection, row: int, version: int, content: Mapping[str, Any]) -> bool:
        statement = (
            update(Tally)
            .where(Tally.id == row, Tally.version == version)
            .values(version=version + 1, content=self._changed(content))
        )
        return connection.execute(statement).rowcount == 1

    # --- Reading -----------------------------------------------------------------------------------------------------

    def _read_by_orm(self) -> None:
        with Session(self._engine) as session:
            tally = session.get_one(Tally, self._random.randrange(ROWS))
            check(tally.id, tally.version, tally.content)
        self._line.end()

    def _read_by_core(self) -> None:
        with self._engine.connect() as connection:
            self._read_row(connection)
        self._line.end()

    def _read_page_by_orm(self) -> None:
        with Session(self._engine) as session:
            for tally in session.scalars(select(Tally).order_by(Tally.id).limit(ROWS // 2)):
                check(tally.id, tally.version, tally.content)
        self._line.end()

    def _read_page_by_core(self) -> None:
        with self._engine.connect() as connection:
            for row, version, content in connection.execute(select(Tally.id, Tally.version, Tally.content)):
                check(row, version, content)
        self._line.end()

    def _read_for_long(self, isolation_level: Any) -> None:
        until = time.monotonic() + self._random.uniform(0.5, 1.5) * self._lease
        with self._engine.connect().execution_options(isolation_level=isolation_level) as connection:
            while time.monotonic() < until:
                self._read_row(connection)
        self._line.end()

    def _read_row(self, connection: Connection) -> None:
        row = self._random.randrange(ROWS)
        version, content = connection.execute(select(Tally.version, Tally.content).where(Tally.id == row)).one()
        check(row, version, content)


def work(url: str, number: int, line: Line, seed: int, connection: socket.socket) -> None:
    """Be one worker: say the process id, be told whether to write or to read, and say what failed."""
    with connection.makefile("rw") as channel:

        def say(text: str) -> None:
            channel.write(f"{text}\n")
            channel.flush()

        def is_over() -> bool:
            return bool(sockets.select([connection], [], [], 0)[0])

        say(str(os.getpid()))
        task = channel.readline().strip()
        if not task:
            return  # never needed
        errors: list[str] = []
        try:
            settings = Settings()
            engine = create_engine(url, connect_args={"application_name": f"worker-{number}"})
            configure(engine, settings)
            worker = Worker(number, engine, line, Random(f"{seed}/{number}"), settings.lease)
            errors = worker.errors
            worker.serve(worker.writing if task == "write" else worker.reading, is_over)
            reset()
            engine.dispose()
        except Exception:  # noqa: BLE001 - it is a failure, and the test reports it
            errors.append(traceback.format_exc(limit=-6))
        line.release()
        say(json.dumps(errors))


def main(url: str, path: str, seed: int, descriptors: list[int]) -> None:
    """Fork one worker for each socket and wait for all."""
    board = Board(Path(path), len(descriptors))
    for number, descriptor in enumerate(descriptors):
        if os.fork() == 0:
            for others in descriptors[number + 1 :]:
                os.close(others)  # or a worker that ends would not be seen to
            with socket.socket(fileno=descriptor) as connection:
                work(url, number, board.line(number), seed, connection)
            sys.exit()
        os.close(descriptor)
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(argument) for argument in sys.argv[4:]])
