"""What must hold when all is over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Engine, select

from sqlalchemy_kravn_crypto.census import Census
from sqlalchemy_kravn_crypto.context import use_keyring
from sqlalchemy_kravn_crypto.events import read_rows_and_events
from sqlalchemy_kravn_crypto.keyring import Keyring
from sqlalchemy_kravn_crypto.lifecycle import Targets
from sqlalchemy_kravn_crypto.replicas import read_replicas

from .tables import ENTRIES_OF_THREAD, RECORDED, Account, Base, Entry, WrongValueError, check, count
from .worker import Done

GROWTH: Final = 16 * 2**20
"""By how many bytes the resident set of a process may have grown after a quarter of its work."""

_MANY: Final = 1_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    what: str
    found: str
    expected: str
    is_right: bool


def equal(what: str, found: object, expected: object) -> Finding:
    """Return what was found, which is right if it is what was expected."""
    return Finding(what, _said(found), _said(expected), found == expected)


def _said(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def at_work(done: Sequence[Done], share: int) -> Iterator[Finding]:
    """Check what the processes say.

    :param share: how many values all were to write, and to read.
    """
    yield equal("errors in a thread, and warnings", sum(len(one.errors) for one in done), 0)
    for what, found in (("written", sum(one.written for one in done)), ("read", sum(one.read for one in done))):
        yield Finding(f"values {what} by the threads", f"{found:,}", f"{share:,} or more", found >= share)
    grown = max(one.end - one.warm for one in done)
    limit = f"{GROWTH / 2**20:.0f} MiB or less"
    yield Finding("most that a process grew", f"{grown / 2**20:.1f} MiB", limit, grown <= GROWTH)


def stored(engine: Engine, done: Sequence[Done], keyring: Keyring) -> Iterator[Finding]:
    """Check what is in the tables now."""
    changes = [sum(counts) for counts in zip(*(one.changes for one in done), strict=True)]
    entries = [added for one in done for added in one.entries]
    wrong = lost = 0
    with use_keyring(keyring), engine.connect() as connection:
        accounts = select(Account.id, Account.version, Account.document, Account.remark)
        for row, version, document, remark in connection.execute(accounts).all():
            wrong += not _is_right(row, version, document, remark)
            lost += abs(changes[row] - version)
        found = [0] * len(entries)
        parts = connection.execution_options(yield_per=_MANY)
        for row, document, remark in parts.execute(select(Entry.id, Entry.document, Entry.remark)):
            wrong += not _is_right(row, 0, document, remark)
            found[row // ENTRIES_OF_THREAD] += 1
    yield equal("rows that do not hold what was written", wrong, 0)
    yield equal("changes that were lost", lost, 0)
    yield equal("rows that were added", sum(found), sum(entries))
    yield equal(
        "threads of which a row was lost", sum(one != other for one, other in zip(found, entries, strict=True)), 0
    )


def _is_right(row: int, version: int, document: dict[str, object], remark: str | None) -> bool:
    try:
        check(row, version, document, remark)
    except WrongValueError:
        return False
    return True


def nonces(connection: Connection, written: int) -> Iterator[Finding]:
    """Check the database's record of all values that were ever written.

    :param written: how many there must be.
    """
    record = connection.execute(RECORDED).one()
    yield equal("values that came into the database", record.written, written)
    yield equal("of them not encrypted", record.others, 0)
    yield equal("different nonces of them", record.nonces, record.written)


def keys(connection: Connection, retired: Sequence[str], primary: str) -> Iterator[Finding]:
    """Check the key store, and that nothing is left under a data key but the primary."""
    found = census(connection)
    rows, events = read_rows_and_events(connection)
    states = [str(row.state.value) for row in rows.keys]
    yield equal("data keys", ", ".join(states), ", ".join([*["disabled"] * len(retired), "primary"]))
    yield equal("the primary", ", ".join(row.key_id or "" for row in rows.keys[-1:]), primary)
    yield equal("values under a disabled data key", sum(map(found.of_key, retired)), 0)
    yield equal("values under anything but the primary", found.stale(primary) + len(found.unreachable), 0)
    yield equal("values under the primary", found.of_key(primary), held(connection))
    actions = [event.action for event in events]
    # read_rows_and_events() has verified every hash, and the newest one in the control row.
    yield equal(
        "rotate, promote, disable in the audit trail",
        "/".join(str(actions.count(action)) for action in ("rotate", "promote", "disable")),
        "/".join([str(len(retired))] * 3),
    )
    yield equal("heartbeats of processes that have ended", len(read_replicas(connection)), 0)


def census(connection: Connection) -> Census:
    """Count what is in the tables."""
    return Targets(Base.metadata).count(connection)


def held(connection: Connection) -> int:
    """Return how many values the rows must hold."""
    return sum(count(row) for table in (Account, Entry) for row in connection.scalars(select(table.id)))
