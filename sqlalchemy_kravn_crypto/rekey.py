"""Re-encrypting every stale value to the primary, frame by frame, while the application goes on.

A payload is decrypted under the key and the name of its frame and encrypted under the primary for the same name: no
codec, no Python value. A value is replaced only if it is still the one that was read: whoever changes it meanwhile
wins, and it is seen again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, Engine, or_, select

from .census import Census, Unreachable, census
from .clock import Clock, process_clock
from .context import keyring_to_write
from .exceptions import ColumnUnreachableError, OutdatedKeyringError
from .key_ranges import KeyColumns
from .keyring import Keyring
from .known_columns import KnownColumn, located
from .ledger import Counts, Shard, planned_shards, unfinished_shards, write_plan
from .rekey_worker import OnProgress, Pace, UnreadableValue, Worker
from .rows import OWN_TABLES, connect
from .schema import TABLES, State
from .stale_values import StaleValues

DEFAULT_SHARDS: Final = 16
"""How many shards a column is planned in."""

FOLLOWED: Final = 180.0
"""For how many seconds after the first pass values are followed that come late under a retired key.

That is the lease of a process by default: one that has not seen the new primary for so long writes nothing any more.
"""

_PAUSE: Final = 1.0  # seconds between passes that only follow


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What one worker did of a shard.

    :ivar counts: what became of the values that it saw; a conflict may have been settled when it was seen again.
    :ivar unreadable: the first 1,000 of the values that do not decrypt.
    """

    shard: Shard
    counts: Counts = field(default_factory=Counts)
    unreadable: tuple[UnreadableValue, ...] = ()


@dataclass(frozen=True, slots=True)
class RekeyResult:
    """What :func:`rekey` did, and what is left.

    :ivar left: how many stale values each column still has, of those that have any; of a static share, in its shards.
    :ivar unreachable: the columns that could not be walked through or counted.
    :ivar census: of all columns, afterwards; ``None`` for a static share.
    """

    key_id: str
    counts: Counts
    unreadable: tuple[UnreadableValue, ...]
    left: dict[str, int]
    unreachable: tuple[Unreachable, ...]
    census: Census | None = None

    @property
    def is_complete(self) -> bool:
        """Whether no stale value is left, as far as can be known, and all can be."""
        return not self.left and not self.unreachable

    def as_dict(self) -> dict[str, Any]:
        """Return the same for JSON."""
        return {
            "key_id": self.key_id,
            "rekeyed": self.counts.rekeyed,
            "conflicts": self.counts.conflicts,
            "unreadable": [value.as_dict() for value in self.unreadable],
            "unreadable_count": self.counts.unreadable,
            "left": self.left,
            "unreachable": [column.as_dict() for column in self.unreachable],
            "census": None if self.census is None else self.census.as_dict(),
        }


# --- The functions ---------------------------------------------------------------------------------------------------


def plan(
    engine: Engine, columns: Sequence[KnownColumn], keyring: Keyring | None = None, *, shards: int = DEFAULT_SHARDS
) -> list[Shard]:
    """Divide the stale values of columns into shards, write the plan into the ledger and return what is to be done.

    A plan for the same primary that is not finished is kept, also where another process makes it at the same time.

    :param keyring: without one, the keyring of this process.
    :param shards: how many shards each column is divided into; fewer where it has fewer stale values.
    :raises ColumnUnreachableError: if a column is not there, or its table has no primary key to walk along.
    :raises OutdatedKeyringError: if the primary of the keyring is not the one on record.
    """
    with connect(engine) as connection:
        return _planned(_prepared(connection), columns, keyring or keyring_to_write(), shards)


def rekey_shard(  # noqa: PLR0913 - all but the first three are for tests and for the command line
    engine: Engine,
    keyring: Keyring | None,
    shard: Shard,
    *,
    batch_size: int = 1000,
    max_rows_per_second: float | None = None,
    clock: Clock = process_clock,
    sleep: Callable[[float], None] = time.sleep,
    on_progress: OnProgress | None = None,
) -> ShardResult:
    """Re-encrypt the stale values of one shard, from where the last worker came to; wait while another is at it.

    :param keyring: without one, the keyring of this process, which must be configured.
    :param batch_size: how many values are in memory at once, and in one transaction.
    :param max_rows_per_second: bound on the values seen in a second, at least 1; without one there is none.
    :param clock: seconds since any moment.
    :param sleep: waits for as many seconds as it is given.
    :param on_progress: called after every batch.
    :raises ColumnUnreachableError: if the column is not there, or its table has no primary key to walk along.
    :raises OutdatedKeyringError: if the primary of the keyring is not the one that the shard was planned for.
    :raises LeaseExpiredError: if it is no longer certain that the primary of this process is that of all.
    """
    pace = Pace(batch_size, max_rows_per_second, clock, sleep)
    with connect(engine) as connection:
        worker = Worker(_prepared(connection), keyring, pace, on_progress)
        done = worker.work([shard])
    return ShardResult(shard, *done)


def rekey(  # noqa: PLR0913 - as above
    engine: Engine,
    keyring: Keyring | None,
    columns: Sequence[KnownColumn],
    *,
    shard: tuple[int, int] | None = None,
    shards: int = DEFAULT_SHARDS,
    batch_size: int = 1000,
    max_rows_per_second: float | None = None,
    clock: Clock = process_clock,
    sleep: Callable[[float], None] = time.sleep,
    on_progress: OnProgress | None = None,
) -> RekeyResult:
    """Re-encrypt every stale value of columns to the primary, and tell what is left.

    Any number of processes may do so at once, and share the work. While stale values are left and the last pass has
    replaced some, or was but the rest of an earlier one, there is another, until :data:`FOLLOWED` is over: who writes
    under a retired key for longer has to be ended first. A column that cannot be reached is reported and does not keep
    the others waiting.

    :param shard: do a fixed share of the shards only, ``(3, 16)`` being the third of sixteen, in one pass; who does
        the last should count with :func:`census`.
    :raises OutdatedKeyringError: if the primary of the keyring is not the one on record.

    The other parameters and errors are those of :func:`plan` and :func:`rekey_shard`.
    """
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard is (1, n) to (n, n), not {shard}")
    pace = Pace(batch_size, max_rows_per_second, clock, sleep)
    with connect(engine) as connection:
        worker = Worker(_prepared(connection), keyring, pace, on_progress)
        reachable, unreachable = reachable_columns(connection, columns)
        if shard is not None:
            return _rekey_share(worker, reachable, unreachable, shards, shard)
        counts = Counts()
        followed_until: float | None = None
        while True:
            current = worker.keyring()
            # Of an earlier plan, only the rest is done, and what is finished of it may have values left.
            is_rest = bool(unfinished_shards(connection, reachable, current.primary_key_id))
            done = worker.work(_planned(connection, reachable, current, shards))
            counts = Counts(counts.rekeyed, counts.conflicts) + done.counts
            found = census(connection, columns)
            connection.rollback()
            key_id = worker.keyring().primary_key_id
            left = {one.column.label: one.stale(key_id) for one in found.columns if one.stale(key_id)}
            is_in_vain = not done.counts.rekeyed or sum(left.values()) <= done.counts.unreadable
            if not left or (is_in_vain and not is_rest):
                break
            if followed_until is None:
                followed_until = clock() + FOLLOWED
            elif clock() < followed_until:
                sleep(_PAUSE)
            else:
                break
    beyond = {one.column: one for one in (*found.unreachable, *unreachable)}
    return RekeyResult(key_id, counts, done.unreadable, left, tuple(beyond.values()), found)


def _rekey_share(
    worker: Worker,
    columns: Sequence[KnownColumn],
    unreachable: Sequence[Unreachable],
    shards: int,
    share: tuple[int, int],
) -> RekeyResult:
    number, of = share
    keyring = worker.keyring()
    _planned(worker.connection, columns, keyring, -(-shards // of) * of)
    # With those that are finished, since values may be left in them.
    planned = planned_shards(worker.connection, columns, keyring.primary_key_id)
    mine = [shard for shard in planned if shard.number % of == number - 1]
    done = worker.work(mine)
    left = {shard.column.label: 0 for shard in mine}
    for shard in mine:
        left[shard.column.label] += worker.values_of(shard).count(worker.connection)
    worker.connection.rollback()
    left = {label: count for label, count in left.items() if count}
    return RekeyResult(keyring.primary_key_id, done.counts, done.unreadable, left, tuple(unreachable))


# --- Plans -----------------------------------------------------------------------------------------------------------


def _prepared(connection: Connection) -> Connection:
    """Return a connection on which each statement sees what others have committed before it."""
    if connection.dialect.name != "sqlite":
        connection.execution_options(isolation_level="READ COMMITTED")
    return connection


def _planned(connection: Connection, columns: Sequence[KnownColumn], keyring: Keyring, shards: int) -> list[Shard]:
    key_id = keyring.primary_key_id
    keys = TABLES.keys.c
    # While a primary is closing, everybody already encrypts under its successor.
    is_successor = keys.closing.is_not(None)
    statement = (
        select(keys.key_id).where(or_(keys.state == State.PRIMARY.value, is_successor)).order_by(is_successor.desc())
    )
    on_record = connection.execute(statement, execution_options=OWN_TABLES).scalars().first()
    if on_record not in {None, key_id}:
        raise OutdatedKeyringError(
            f"Values would be moved to data key {key_id}, but the primary on record is {on_record}. Start this process "
            "again, so that it loads it."
        )
    for column in columns:
        found = located(connection, column)
        values = StaleValues(found, key_id, connection.dialect.name)
        if not unfinished_shards(connection, [column], key_id):
            bounds, rows = values.split(connection, shards)
            connection.rollback()
            write_plan(connection, column, key_id, bounds, rows)
    planned = unfinished_shards(connection, columns, key_id)
    connection.rollback()
    return planned


def reachable_columns(
    connection: Connection, columns: Sequence[KnownColumn]
) -> tuple[list[KnownColumn], list[Unreachable]]:
    """Divide columns into those that are there and can be walked through, and the others."""
    reachable: list[KnownColumn] = []
    unreachable: list[Unreachable] = []
    for column in columns:
        try:
            KeyColumns(located(connection, column).key, column.label, connection.dialect.name)
        except ColumnUnreachableError as error:
            unreachable.append(Unreachable(column, str(error)))
        else:
            reachable.append(column)
    connection.rollback()
    return reachable, unreachable
