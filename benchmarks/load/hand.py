"""One thread that writes and reads rows, and sees that what it reads is right."""

from __future__ import annotations

import time
import traceback
from array import array
from collections.abc import Callable, Iterable
from random import Random
from threading import Event
from typing import Any, Final

from sqlalchemy import Connection, Engine, insert, select, update
from sqlalchemy.orm import Session

from .tables import ACCOUNTS, ENTRIES_OF_THREAD, Account, Entry, WrongValueError, check, count, values_of

BULK: Final = 100
"""How many rows there are in a bulk statement or a page."""

_SINGLE: Final = 6
"""How many times as often as a bulk statement a single one is chosen."""

_PAUSE: Final = 0.25  # seconds between transactions when the share is done, until all is over
_MOST_ERRORS: Final = 3


class Hand:
    """A thread's work: its share of the values, and then a little more until it is told that all is over.

    :param number: which of all threads it is.
    :param threads: how many there are.
    :param share: how many values to write, and how many to read.
    :ivar changes: how often it has committed a change of each account.
    :ivar entries: how many rows it has added.
    """

    def __init__(self, engine: Engine, number: int, threads: int, share: int) -> None:
        self._engine = engine
        self._number = number
        self._threads = threads
        self._share = share
        self._random = Random(number)
        self._versions = array("q", bytes(8 * ACCOUNTS))  # the newest that it has seen of each account
        self.changes = array("q", bytes(8 * ACCOUNTS))
        self.entries = self.written = self.read = self.transactions = self.conflicts = 0
        self.errors: list[str] = []

    @property
    def progress(self) -> float:
        """How much of its share is done, from 0 to 1 and beyond."""
        return min(self.written, self.read) / self._share

    def work(self, is_over: Event, until: float) -> None:
        """Write and read. What fails is kept; after some failures it gives up.

        :param until: when it gives up, on the monotonic clock.
        """
        while self.progress < 1 or not is_over.wait(_PAUSE):
            if time.monotonic() > until:
                self.errors.append("it was not done in time")
                return
            try:
                self._choose()()
            except Exception:  # noqa: BLE001 - all are failures, and the run reports them
                self.errors.append(traceback.format_exc(limit=-6))
                if len(self.errors) == _MOST_ERRORS:
                    return
            self.transactions += 1

    def _choose(self) -> Callable[[], None]:
        single: list[Callable[[], None]]
        bulk: list[Callable[[], None]]
        if self.written <= self.read:
            single = [self._change_by_orm, self._change_by_core, self._compare_by_core, self._add_by_orm]
            bulk = [self._add_all_by_orm, self._add_all_by_core, self._change_all_by_orm]
        else:
            single = [self._read_by_orm, self._read_by_core]
            bulk = [self._read_page_by_orm, self._read_page_by_core, self._read_entries_by_orm, self._read_in_parts]
        return self._random.choice(single if self._random.randrange(_SINGLE + 1) else bulk)

    # --- Writing -----------------------------------------------------------------------------------------------------

    def _account(self) -> int:
        return self._random.randrange(ACCOUNTS)

    def _changed(self, row: int, version: int) -> dict[str, Any]:
        return {"version": version + 1, **values_of(row, version + 1, self._random)}

    def _note_changed(self, rows: Iterable[int]) -> None:
        for row in rows:
            self.changes[row] += 1
            self.written += count(row)

    def _change_by_orm(self) -> None:
        row = self._account()
        with Session(self._engine) as session:
            account = session.get_one(Account, row, with_for_update=True)
            self._see(row, account.version, account.document, account.remark)
            for name, value in self._changed(row, account.version).items():
                setattr(account, name, value)
            session.commit()
        self._note_changed([row])

    def _change_by_core(self) -> None:
        row = self._account()
        with self._engine.begin() as connection:
            version = self._read_account(connection, row, is_locking=True)
            connection.execute(update(Account).where(Account.id == row).values(self._changed(row, version)))
        self._note_changed([row])

    def _compare_by_core(self) -> None:
        """Change a row without a lock, unless somebody else has."""
        row = self._account()
        with self._engine.begin() as connection:
            version = self._read_account(connection, row)
            statement = update(Account).where(Account.id == row, Account.version == version)
            is_mine = connection.execute(statement.values(self._changed(row, version))).rowcount == 1
        if is_mine:
            self._note_changed([row])
        else:
            self.conflicts += 1

    def _change_all_by_orm(self) -> None:
        # In the order of their ids, as everybody does, so that no two wait for each other.
        rows = self._random.sample(range(ACCOUNTS), BULK)
        with Session(self._engine) as session:
            locked = select(Account.id, Account.version).where(Account.id.in_(rows)).order_by(Account.id)
            found = session.execute(locked.with_for_update()).all()
            session.execute(update(Account), [{"id": row, **self._changed(row, version)} for row, version in found])
            session.commit()
        self._note_changed(rows)

    def _new(self, rows: int) -> list[dict[str, Any]]:
        first = self._number * ENTRIES_OF_THREAD + self.entries
        return [{"id": row, **values_of(row, 0, self._random)} for row in range(first, first + rows)]

    def _note_added(self, rows: list[dict[str, Any]]) -> None:
        self.entries += len(rows)
        self.written += sum(count(row["id"]) for row in rows)

    def _add_by_orm(self) -> None:
        self._add(self._new(1))

    def _add_all_by_orm(self) -> None:
        self._add(self._new(BULK))

    def _add(self, rows: list[dict[str, Any]]) -> None:
        with Session(self._engine) as session:
            session.add_all(Entry(**row) for row in rows)
            session.commit()
        self._note_added(rows)

    def _add_all_by_core(self) -> None:
        rows = self._new(BULK)
        with self._engine.begin() as connection:
            connection.execute(insert(Entry), rows)
        self._note_added(rows)

    # --- Reading -----------------------------------------------------------------------------------------------------

    def _see(self, row: int, version: int, document: Any, remark: str | None) -> None:
        """Check what was read of an account, also that it is not older than what was seen before."""
        self.read += check(row, version, document, remark)
        if version < self._versions[row]:
            raise WrongValueError(f"row {row} went back from version {self._versions[row]} to {version}")
        self._versions[row] = version

    def _read_account(self, connection: Connection, row: int, *, is_locking: bool = False) -> int:
        statement = select(Account.version, Account.document, Account.remark).where(Account.id == row)
        found = connection.execute(statement.with_for_update() if is_locking else statement).one()
        self._see(row, *found)
        version: int = found.version
        return version

    def _read_by_orm(self) -> None:
        row = self._account()
        with Session(self._engine) as session:
            account = session.get_one(Account, row)
            self._see(row, account.version, account.document, account.remark)

    def _read_by_core(self) -> None:
        with self._engine.connect() as connection:
            self._read_account(connection, self._account())

    def _read_page_by_orm(self) -> None:
        statement = select(Account).where(Account.id >= self._account()).order_by(Account.id).limit(BULK)
        with Session(self._engine) as session:
            for account in session.scalars(statement):
                self._see(account.id, account.version, account.document, account.remark)

    def _first_entry(self) -> int:
        """Return an id at which rows may begin that some thread has added."""
        return self._random.randrange(self._threads) * ENTRIES_OF_THREAD + self._random.randrange(self.entries + 1)

    def _read_page_by_core(self) -> None:
        statement = select(Entry.id, Entry.document, Entry.remark).where(Entry.id >= self._first_entry())
        with self._engine.connect() as connection:
            for row, document, remark in connection.execute(statement.order_by(Entry.id).limit(BULK)):
                self.read += check(row, 0, document, remark)

    def _read_entries_by_orm(self) -> None:
        statement = select(Entry).where(Entry.id >= self._first_entry()).order_by(Entry.id).limit(BULK)
        with Session(self._engine) as session:
            for entry in session.scalars(statement):
                self.read += check(entry.id, 0, entry.document, entry.remark)

    def _read_in_parts(self) -> None:
        """Read through a cursor of the server, of which the rows come while the transaction lasts."""
        statement = select(Account.id, Account.version, Account.document, Account.remark).order_by(Account.id)
        with self._engine.connect().execution_options(yield_per=BULK // 4) as connection:
            for found in connection.execute(statement.where(Account.id >= self._account()).limit(BULK)):
                self._see(*found)
