"""The audit trail: rows of ``kms_events``, only ever appended, each with the hash of the one before.

The hash of the newest is in the control row of ``kms_keys``, under its row MAC, so that somebody who does not hold the
MAC key cannot cut off the end of the trail either.
"""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final

from sqlalchemy import Connection, insert, select

from .clock import as_utc, for_database, read_database_time
from .derivation import length_prefixed
from .exceptions import AuditTrailError
from .rows import OWN_TABLES, StoredRows, fetch_all, read_rows
from .schema import TABLES

_EVENTS: Final = TABLES.events
_GENESIS: Final = "0" * 64
"""What the first event has in the place of the hash of the one before."""

_DOMAIN: Final = b"sqlalchemy-kravn-crypto/event/v1"
_NULL: Final = b"\xff\xff\xff\xff"  # no length that LP can write
_MAX_NAME: Final = 255
_LAST_ID: Final = 2**63 - 1
_TEXTS: Final = ("actor", "host", "action", "key_id", "reason", "details", "previous_hash", "hash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that was done to the key store.

    :ivar actor: who did it: what the operator said, else the user that the process ran as.
    :ivar host: the machine that it was done from.
    :ivar details: what else there is to say, as JSON can hold it.
    """

    id: int
    occurred_at: datetime
    actor: str
    host: str
    action: str
    key_id: str | None = None
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    previous_hash: str
    hash: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "id": self.id,
            "occurred_at": _time(self.occurred_at),
            "actor": self.actor,
            "host": self.host,
            "action": self.action,
            "key_id": self.key_id,
            "reason": self.reason,
            "details": dict(self.details),
            "hash": self.hash,
        }


def append(  # noqa: PLR0913 - an event is what, by whom, about which key, why
    connection: Connection,
    action: str,
    *,
    newest_hash: str | None,
    actor: str | None = None,
    key_id: str | None = None,
    reason: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> str:
    """Append an event; the caller holds the lock, and puts the returned hash into the control row.

    :param newest_hash: the hash in the control row, ``None`` where there is none yet.
    :return: the hash of the new event.
    :raises AuditTrailError: if the newest event is not the one that the control row names.
    """
    newest_id, found_hash = _newest(connection)
    if found_hash != newest_hash or type(newest_id) is not int or newest_id >= _LAST_ID:
        raise _broken("its end is not the one that kms_keys names")
    values: dict[str, Any] = {
        "id": newest_id + 1,
        "occurred_at": read_database_time(connection),
        "actor": (actor or _user())[:_MAX_NAME],
        "host": socket.gethostname()[:_MAX_NAME],
        "action": action,
        "key_id": key_id,
        "reason": reason,
        "details": json.dumps(dict(details), sort_keys=True) if details else None,
        "previous_hash": newest_hash or _GENESIS,
    }
    values["hash"] = hash_of(values)
    stored = values | {"occurred_at": for_database(connection, values["occurred_at"])}
    connection.execute(insert(_EVENTS).values(stored), execution_options=OWN_TABLES)
    return str(values["hash"])


def hash_of_newest(connection: Connection) -> str | None:
    """Return the hash of the newest event, for a key store that is empty and names none."""
    return _newest(connection)[1]


def _newest(connection: Connection) -> tuple[int, str | None]:
    statement = select(_EVENTS.c.id, _EVENTS.c.hash).order_by(_EVENTS.c.id.desc()).limit(1)
    return next(((newest.id, newest.hash) for newest in fetch_all(connection, statement, _no_text)), (0, None))


def hash_of(values: Mapping[str, Any]) -> str:
    """Return the hash of an event: SHA-256 over the LP of a domain and of every column but the hash, in their order.

    The time is text, in UTC and to the second; NULL is four bytes 0xFF.
    """
    digest = sha256(length_prefixed(_DOMAIN))
    for column in _EVENTS.columns:
        if column.name != "hash":
            value = values[column.name]
            text = _time(value) if isinstance(value, datetime) else value
            digest.update(_NULL if text is None else length_prefixed(str(text).encode()))
    return digest.hexdigest()


def read_events(connection: Connection, newest_hash: str | None) -> list[Event]:
    """Return the whole trail, oldest first.

    :param newest_hash: the hash in the control row.
    :raises AuditTrailError: if an event was altered, left out or added.
    """
    found: list[dict[str, Any]] = []
    expected_hash, expected_id = _GENESIS, 1
    for values in _rows(connection):
        if values["id"] != expected_id or values["previous_hash"] != expected_hash:
            raise _broken(f"event {expected_id} is missing, or another stands in its place")
        if values["hash"] != hash_of(values):
            raise _broken(f"event {expected_id} was altered")
        found.append(values)
        expected_hash, expected_id = values["hash"], expected_id + 1
    if (found[-1]["hash"] if found else None) != newest_hash:
        raise _broken("its end is not the one that kms_keys names")
    # Only now: the hashes have no key, so up to here the details may be anybody's.
    return [_event(values) for values in found]


def read_rows_and_events(connection: Connection) -> tuple[StoredRows, list[Event]]:
    """Return the rows of the key store and the whole trail that belongs to them, without a lock.

    They are read one after the other, since not every database gives both as of one moment. If they do not belong
    together, and the rows have changed meanwhile, they are read again. The caller's transaction ends.

    :raises KeyStoreError: if a row is not one that this library writes.
    :raises AuditTrailError: if an event was altered, left out or added.
    """
    rows = read_rows(connection)
    while True:
        connection.rollback()
        failure = ""
        try:
            return rows, read_events(connection, rows.in_control().events_hash)
        except AuditTrailError as error:
            failure = str(error)
        connection.rollback()
        before, rows = rows, read_rows(connection)
        if rows.in_control().events_hash == before.in_control().events_hash:
            raise AuditTrailError(failure)


def _event(values: dict[str, Any]) -> Event:
    # Whoever can write to kms_keys as well can make the hashes anew, and SQLite keeps anything in any column.
    if not all(isinstance(values[name], str | None) for name in _TEXTS):
        raise _broken(f"what event {values['id']} says is no text")
    details: Any = None
    with suppress(ValueError, RecursionError):
        details = json.loads(values["details"] or "{}")
    if not isinstance(details, dict):
        raise _broken(f"the details of event {values['id']} are none")
    return Event(**(values | {"details": details}))


def _rows(connection: Connection) -> list[dict[str, Any]]:
    statement = select(_EVENTS).order_by(_EVENTS.c.id)
    try:
        found = fetch_all(connection, statement, _no_text)
        return [row._asdict() | {"occurred_at": as_utc(row.occurred_at)} for row in found]
    except (AttributeError, OverflowError, TypeError, ValueError):  # on SQLite a time may be anything
        pass
    raise _broken("the time of an event is none")


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return "unknown"


def _no_text() -> AuditTrailError:
    return _broken("a text of an event is none")


def _broken(what: str) -> AuditTrailError:
    return AuditTrailError(
        f"The audit trail kms_events is broken: {what}. Find out who writes to the table, and restore it from a backup."
    )
