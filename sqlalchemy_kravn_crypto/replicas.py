"""The heartbeats: each process's row in ``kms_replicas``, and which processes are alive."""

from __future__ import annotations

import math
import os
import socket
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Select, delete, insert, select, update

from .clock import as_utc, database_now
from .exceptions import MalformedRowError
from .rows import OWN_TABLES, fetch_all
from .schema import TABLES

T = TypeVar("T")

_REPLICAS: Final = TABLES.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One process, as it last said of itself.

    :ivar key_ids: the data keys that it holds.
    :ivar primary_key_id: the data key that it encrypts under.
    :ivar mac_key_ids: the keys with which it can verify a row of ``kms_keys``.
    :ivar lease: for how many seconds it goes on writing without a look at the key store.
    :ivar is_alive: whether its last word is not older than its lease, by the database's clock.
    """

    replica_id: str
    host: str
    process_id: int
    version: str
    epoch: int
    key_ids: frozenset[str]
    primary_key_id: str
    mac_key_ids: frozenset[str]
    lease: int
    seen_at: datetime
    is_alive: bool

    @property
    def label(self) -> str:
        """Host and process, for messages."""
        return f"process {self.process_id} on {self.host}"


def new_replica_id() -> str:
    """Return an id for a process."""
    return str(uuid.uuid4())


def beat(  # noqa: PLR0913 - what a process says of itself
    connection: Connection,
    replica_id: str,
    *,
    epoch: int,
    primary_key_id: str,
    key_ids: Collection[str],
    mac_key_ids: Collection[str],
    lease: float,
) -> None:
    """Write a process's row; the caller commits."""
    said: dict[str, Any] = {
        "epoch": epoch,
        "primary_key_id": primary_key_id,
        "key_ids": ",".join(sorted(key_ids)),
        "mac_key_ids": ",".join(sorted(mac_key_ids)),
        "lease": math.ceil(lease),
        "seen_at": database_now(),
    }
    mine = update(_REPLICAS).where(_REPLICAS.c.replica_id == replica_id).values(said)
    if connection.execute(mine, execution_options=OWN_TABLES).rowcount == 0:
        first = {
            "replica_id": replica_id,
            "host": socket.gethostname()[:255],
            "process_id": os.getpid(),
            "version": version("sqlalchemy-kravn-crypto")[:32],
            "started_at": database_now(),
        }
        connection.execute(insert(_REPLICAS).values(said | first), execution_options=OWN_TABLES)


def leave(connection: Connection, replica_id: str) -> None:
    """Take a process's row away; the caller commits."""
    connection.execute(delete(_REPLICAS).where(_REPLICAS.c.replica_id == replica_id), execution_options=OWN_TABLES)


def read_replicas(connection: Connection) -> list[Replica]:
    """Return every process that has a row, whether alive or not.

    :raises MalformedRowError: if a row is not one that this library writes.
    """
    statement = select(_REPLICAS, database_now().label("now")).order_by(_REPLICAS.c.started_at, _REPLICAS.c.replica_id)
    return _each(connection, statement, lambda row: _replica(row._asdict()))


def live_replicas(connection: Connection) -> list[Replica]:
    """Return the processes whose last word is not older than their lease."""
    return [replica for replica in read_replicas(connection) if replica.is_alive]


def forget_dead(connection: Connection, age: timedelta) -> int:
    """Delete the rows of processes that ended without taking theirs away, and said nothing for so long.

    :raises MalformedRowError: if a row is not one that this library writes.
    """
    statement = select(_REPLICAS.c.replica_id, _REPLICAS.c.seen_at, database_now().label("now"))
    silent_for = _each(connection, statement, lambda row: (row.replica_id, as_utc(row.now) - as_utc(row.seen_at)))
    dead = [replica_id for replica_id, silence in silent_for if silence > age]
    if dead:
        connection.execute(delete(_REPLICAS).where(_REPLICAS.c.replica_id.in_(dead)), execution_options=OWN_TABLES)
    return len(dead)


def _each(connection: Connection, statement: Select[Any], take: Callable[[Any], T]) -> list[T]:
    try:
        return [take(row) for row in fetch_all(connection, statement, _malformed)]
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        pass
    raise _malformed()


def _malformed() -> MalformedRowError:
    return MalformedRowError(
        "A row of kms_replicas is not one that this library writes. Find out who writes to the table, and clear it with"
        " DELETE FROM kms_replicas; then wait for a lease, in which every process leaves its row again."
    )


_KINDS: Final[dict[str, Any]] = {
    "replica_id": str,
    "host": str,
    "process_id": int,
    "version": str,
    "epoch": int,
    "primary_key_id": str | None,
    "lease": int | None,
}
"""Of what is taken as it is; for SQLite keeps any value in any column."""


def _replica(row: dict[str, Any]) -> Replica:
    if not all(isinstance(row[name], kind) for name, kind in _KINDS.items()):
        raise TypeError
    lease = row["lease"] or 0
    seen_at = as_utc(row["seen_at"])
    return Replica(
        replica_id=row["replica_id"],
        host=row["host"],
        process_id=row["process_id"],
        version=row["version"],
        epoch=row["epoch"],
        key_ids=_ids(row["key_ids"]),
        primary_key_id=row["primary_key_id"] or "",
        mac_key_ids=_ids(row["mac_key_ids"]),
        lease=lease,
        seen_at=seen_at,
        is_alive=as_utc(row["now"]) - seen_at <= timedelta(seconds=lease),
    )


def _ids(text: str | None) -> frozenset[str]:
    return frozenset(filter(None, (text or "").split(",")))
