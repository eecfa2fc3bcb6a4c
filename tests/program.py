"""A program with one encrypted table, as a process of its own: what the runbooks and the grants are tried with.

Run as a program with the database's URL. It configures itself from the environment, and then does what the lines on its
standard input ask for, each a JSON object; it answers each with one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, func, select, type_coerce
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import LargeBinary

from sqlalchemy_kravn_crypto import EncryptedJSON, configure
from sqlalchemy_kravn_crypto.context import current_keyring
from tests.processes import environment_with

ROOT = Path(__file__).parents[1]
_PATIENCE = 120.0  # seconds for one answer


class Base(DeclarativeBase):
    pass


class Plugin(Base):
    __tablename__ = "plugin"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


# --- The program -----------------------------------------------------------------------------------------------------


def _do(engine: Engine, asked: dict[str, Any]) -> Any:
    with Session(engine) as session:
        match asked:
            case {"do": "put", "number": number}:
                session.add(Plugin(id=number, credentials={"number": number}))
                session.commit()
            case {"do": "change", "number": number}:
                session.get_one(Plugin, number).credentials = {"number": -number}
                session.commit()
            case {"do": "numbers"}:
                return sorted(plugin.credentials["number"] for plugin in session.scalars(select(Plugin)))
            case {"do": "look"}:
                session.execute(select(func.count()).select_from(Plugin))
            case {"do": "keyring"}:
                keyring = current_keyring()
                return {"primary": keyring.primary_key_id, "held": sorted(keyring.key_ids)}
    return None


def _answered(action: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"answer": action()}
    except Exception as error:  # noqa: BLE001 - whatever it is, the test is told
        return {"error": type(error).__name__, "message": str(error)}


def main(url: str) -> None:
    """Serve until the input ends."""

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)  # noqa: T201 - that is how it answers

    engine = create_engine(url)
    if os.environ.get("READ_ONLY"):

        @event.listens_for(engine, "connect")
        def _read_only(connection: Any, _: Any) -> None:
            # As every session of a PostgreSQL server that follows another is.
            connection.read_only = True

    started = _answered(lambda: configure(engine))
    say(started)
    if "error" in started:
        sys.exit(1)
    for line in sys.stdin:
        say(_answered(partial(_do, engine, json.loads(line))))


# --- Who talks to it -------------------------------------------------------------------------------------------------


class RefusedError(Exception):
    """What the program raised."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(f"{error}: {message}")
        self.error = error


class Program:
    """One process of the program.

    :raises RefusedError: if it does not start.
    """

    def __init__(self, url: str, environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it is closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.program", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=environment_with({}) | dict(environment),
            text=True,
        )
        try:
            self._answer()
        except BaseException:
            self.kill()
            raise

    @property
    def process_id(self) -> int:
        return self._process.pid

    def _ask(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        watchdog = threading.Timer(_PATIENCE, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        assert line, self.log()
        answer = json.loads(line)
        if "error" in answer:
            raise RefusedError(answer["error"], answer["message"])
        return answer["answer"]

    def put(self, number: int) -> None:
        self._ask("put", number=number)

    def change(self, number: int) -> None:
        self._ask("change", number=number)

    def numbers(self) -> list[int]:
        found: list[int] = self._ask("numbers")
        return found

    def look(self) -> None:
        """Begin a transaction that reads no encrypted value."""
        self._ask("look")

    def primary(self) -> str:
        """Look, and return the data key that it encrypts under."""
        self.look()
        key_id: str = self._ask("keyring")["primary"]
        return key_id

    def held(self) -> set[str]:
        """Look, and return the data keys that it holds."""
        self.look()
        return set(self._ask("keyring")["held"])

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def stop(self) -> None:
        """Let it end as a deploy does. Harmless when repeated."""
        if not self._log.closed:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(_PATIENCE)
            self._close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._log.close()


def key_ids(url: str) -> dict[int, str]:
    """Return under which data key each value is."""
    engine = create_engine(url)
    frame = type_coerce(Plugin.credentials, LargeBinary())
    with engine.connect() as connection:
        rows = connection.execute(select(Plugin.id, frame).order_by(Plugin.id)).all()
    engine.dispose()
    return {number: bytes(stored)[2:10].hex() for number, stored in rows}


if __name__ == "__main__":
    main(sys.argv[1])
