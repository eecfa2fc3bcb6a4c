"""Processes that re-encrypt, each of which is killed right after one of its statements.

Run as a program with the database's URL; the key store is that of the environment. It forks a process for each line,
the number of the statement after which that one kills itself. It answers with ``killed``, or with what the process did
if it came to its end before. For 0 it does all by itself.

Somebody else is at work as well, and changes just the values that a process has read and is about to replace.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Final

from sqlalchemy import Engine, NullPool, create_engine, event, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_kravn_crypto import EncryptedBytes, Keyring, use_keyring
from sqlalchemy_kravn_crypto.configuration import operator as operator_of
from sqlalchemy_kravn_crypto.lifecycle import Targets, rekey_values
from sqlalchemy_kravn_crypto.providers import vault
from sqlalchemy_kravn_crypto.settings import Settings

IMPORTED_BEFORE_THE_FORK = (vault,)

CHANGED: Final = {1: (1, "retired"), 2: (2, "primary")}
"""Which row is changed when a value is about to be replaced for the first and the second time, and under which key."""


class Base(DeclarativeBase):
    pass


class Note(Base):
    """What is encrypted is beside it in the clear, and both are changed in one statement."""

    __tablename__ = "mortal_note"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    clear: Mapped[bytes | None]
    content: Mapped[bytes | None] = mapped_column(EncryptedBytes)


class Life:
    """What all processes have from before the fork: engines that are not connected, and know the statements."""

    def __init__(self, url: str) -> None:
        self._last = self._executed = self._replaced = 0
        self._keyrings: dict[str, Keyring] = {}
        self._another = create_engine(url, poolclass=NullPool)
        self._engine = create_engine(url, poolclass=NullPool)
        event.listen(self._engine, "before_cursor_execute", self._before)
        event.listen(self._engine, "after_cursor_execute", self._after)

    def run(self, last: int) -> None:
        """Re-encrypt everything, unless the statement comes after which the process is to end; 0 never comes."""
        operator = operator_of(self._engine, Settings())
        primary = operator.store.open(self._another).keyring
        others = map(primary.data_key, primary.key_ids - {primary.primary_key_id})
        (retired,) = filter(None, others)
        self._keyrings = {"primary": primary, "retired": Keyring(retired)}
        self._last, self._executed, self._replaced = last, 0, 0
        result = rekey_values(operator, Targets(Base.metadata))
        print(json.dumps(result.as_dict()), flush=True)  # noqa: T201 - to the test

    def _before(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE mortal_note "):
            self._replaced += 1
            if self._replaced in CHANGED:
                row, state = CHANGED[self._replaced]
                change(self._another, row, self._keyrings[state])

    def _after(self, *_: object) -> None:
        self._executed += 1
        if self._executed == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def change(engine: Engine, row: int, keyring: Keyring) -> None:
    """Change a value as somebody else does who encrypts under a key of theirs."""
    value = f"changed {row}".encode()
    with use_keyring(keyring), engine.begin() as connection:
        connection.execute(update(Note).where(Note.id == row).values(clear=value, content=value))


def main(url: str) -> None:
    """Serve until the input ends."""
    life = Life(url)
    for line in sys.stdin:
        if line == "0\n":
            life.run(0)  # here, so that the others know the statements
            continue
        child = os.fork()
        if child == 0:
            life.run(int(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            print("killed", flush=True)  # noqa: T201 - as above
        elif status:
            sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
