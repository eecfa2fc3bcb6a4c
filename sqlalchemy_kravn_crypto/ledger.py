"""The ledger ``kms_rekeys``: which part of which column has been moved to which key, and who is at it.

Each row is a shard: a range of primary keys of one column. Workers take one by one, for a time on the database's clock
that they extend with every batch; whoever dies leaves a shard that another goes on with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    DateTime,
    and_,
    bindparam,
    delete,
    false,
    func,
    insert,
    not_,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from .clock import database_now
from .exceptions import MalformedRowError
from .known_columns import KnownColumn
from .rows import OWN_TABLES, fetch_all
from .schema import TABLES

LEASE: Final = timedelta(seconds=60)
"""For how long a worker has a shard without saying that it is still at it."""

_REKEYS: Final = TABLES.rekeys
_C: Final = _REKEYS.c

# Without the times, since nothing is made of them here and those that are none would end a query with an error.
_SHARDS: Final = select(
    _C.schema_name,
    _C.table_name,
    _C.column_name,
    _C.shard,
    _C.key_id,
    _C.lower_bound,
    _C.upper_bound,
    _C.position,
    _C.rows_total,
)


@dataclass(frozen=True, slots=True)
class Shard:
    """A range of one column's rows. Plain values, so that it can be pickled and sent to another process.

    :ivar number: which shard of the column it is, from 0.
    :ivar key_id: the key that its values are to be under.
    :ivar lower: the first primary key, as text; ``None`` if the range has no beginning.
    :ivar upper: the first primary key behind it, as text; ``None`` if it has no end.
    :ivar rows: about how many stale values it had when it was planned.
    """

    column: KnownColumn
    number: int
    key_id: str
    lower: str | None
    upper: str | None
    rows: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A shard that a worker has.

    :ivar position: the last primary key that is done, as text; ``None`` at the beginning.
    """

    shard: Shard
    worker: str
    position: str | None


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of stale values that were seen.

    :ivar rekeyed: replaced.
    :ivar conflicts: not replaced, since somebody else changed or locked the row meanwhile.
    :ivar unreadable: left, since they do not decrypt.
    """

    rekeyed: int = 0
    conflicts: int = 0
    unreadable: int = 0

    @property
    def seen(self) -> int:
        """All of them."""
        return self.rekeyed + self.conflicts + self.unreadable

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rekeyed + other.rekeyed, self.conflicts + other.conflicts, self.unreadable + other.unreadable
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one column is.

    :ivar rows_total: about how many stale values there were when it was planned.
    :ivar rows_seen: how many have been seen since.
    :ivar shards: how many shards there are, and how many are not finished.
    """

    label: str
    key_id: str
    rows_total: int
    rows_seen: int
    rekeyed: int
    conflicts: int
    unreadable: int
    shards: int
    unfinished: int


# --- Plans -----------------------------------------------------------------------------------------------------------


def planned_shards(connection: Connection, columns: Iterable[KnownColumn], key_id: str) -> list[Shard]:
    """Return the shards of columns that are planned for a key."""
    return _shards(connection, columns, key_id, true())


def unfinished_shards(connection: Connection, columns: Iterable[KnownColumn], key_id: str) -> list[Shard]:
    """Return those of them that are not finished."""
    return _shards(connection, columns, key_id, _C.finished_at.is_(None))


def _shards(
    connection: Connection, columns: Iterable[KnownColumn], key_id: str, condition: ColumnElement[bool]
) -> list[Shard]:
    by_place = {column.place: column for column in columns}
    statement = _SHARDS.where(_of(by_place.values()), _C.key_id == key_id, condition).order_by(
        _C.schema_name, _C.table_name, _C.column_name, _C.shard
    )
    found = fetch_all(connection, statement, _malformed)
    return [_shard(by_place[row.schema_name, row.table_name, row.column_name], row) for row in found]


def write_plan(connection: Connection, column: KnownColumn, key_id: str, bounds: Sequence[str], rows: int) -> None:
    """Put the plan of a column in place of one that is finished or for another key. Commits.

    Of several processes that do so at once, one succeeds, and the others find its plan: they wait for each other at the
    rows of the plan before, or where there is none at the first of their own. The lock on the key store is left alone,
    so that who only re-encrypts needs no right to write to ``kms_keys``.

    :param bounds: the bounds between the shards.
    :param rows: about how many stale values there are in each.
    """
    taken = False
    try:
        # A write comes first, since that locks the plan on every database.
        _execute(connection, update(_REKEYS).where(_of([column])).values(updated_at=database_now()))
        if not unfinished_shards(connection, [column], key_id):
            _execute(connection, delete(_REKEYS).where(_of([column])))
            edges = [None, *bounds, None]
            for number, (lower, upper) in enumerate(pairwise(edges)):
                shard = Shard(column, number, key_id, lower, upper, rows)
                _execute(connection, insert(_REKEYS).values(_row(shard)))
    except IntegrityError:
        taken = True
    if taken:
        connection.rollback()
    else:
        connection.commit()


def _row(shard: Shard) -> dict[str, Any]:
    counts = dict.fromkeys(("rows_seen", "rekeyed", "conflicts", "unreadable"), 0)
    return {
        "schema_name": shard.column.schema,
        "table_name": shard.column.table,
        "column_name": shard.column.column,
        "shard": shard.number,
        "key_id": shard.key_id,
        "lower_bound": shard.lower,
        "upper_bound": shard.upper,
        "rows_total": shard.rows,
        "created_at": database_now(),
        "updated_at": database_now(),
        **counts,
    }


def _shard(column: KnownColumn, row: Any) -> Shard:
    shard = Shard(column, row.shard, row.key_id, row.lower_bound, row.upper_bound, row.rows_total)
    texts = (shard.lower, shard.upper, row.position)
    numbers = (shard.number, shard.rows)
    if not all(type(number) is int for number in numbers) or not all(isinstance(one, str | None) for one in texts):
        raise _malformed()
    return shard


def _malformed() -> MalformedRowError:
    return MalformedRowError(
        "A row of kms_rekeys is not one that this library writes. Find out who writes to it, and empty it; then "
        "run `kravn-crypto rekey` again, which plans anew."
    )


# --- Workers ---------------------------------------------------------------------------------------------------------


def claim(connection: Connection, worker: str, shards: Sequence[Shard]) -> Claim | None:
    """Take the first shard that nobody is at, for ``LEASE``; ``None`` if there is none. Commits.

    :param worker: who takes it; a name of up to 36 characters that nobody else has.
    :raises MalformedRowError: if a shard is not one that this library writes.
    """
    # A lease until later than that was given by nobody, and would be waited for without an end.
    is_leased = and_(_C.leased_until >= database_now(), _C.leased_until <= _latest_lease_end())
    free = and_(_C.finished_at.is_(None), or_(_C.leased_until.is_(None), not_(is_leased)))
    statement = (
        _SHARDS.where(_any_of(shards), free)
        .order_by(_C.schema_name, _C.table_name, _C.column_name, _C.shard)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    while True:
        row = next(iter(fetch_all(connection, statement, _malformed)), None)
        if row is None:
            connection.rollback()
            return None
        place = row.schema_name, row.table_name, row.column_name
        # With the bounds on record, which are others where the same was planned once more.
        shard = _shard(next(one.column for one in shards if one.column.place == place), row)
        # SQLite has no lock on rows: there, somebody may have been faster, and the condition does not hold any more.
        taken = update(_REKEYS).where(_any_of([shard]), free).values(worker=worker, leased_until=_lease_end())
        count = _execute(connection, taken)
        if count == 1:
            connection.commit()
            return Claim(shard, worker, row.position)
        connection.rollback()
        if count:  # more than the primary key allows, so somebody has dropped it
            raise _malformed()


def advance(connection: Connection, claimed: Claim, position: str | None, counts: Counts) -> bool:
    """Enter a batch and extend the lease; tell whether the worker still has the shard. The caller commits.

    :param position: the last primary key of the batch, as text; ``None`` to begin anew.
    """
    numbers = {
        "seen": counts.seen,
        "replaced": counts.rekeyed,
        "in_conflict": counts.conflicts,
        "not_read": counts.unreadable,
    }
    return _execute(connection, _ADVANCE, _mine(claimed) | numbers | {"reached": position}) == 1


def finish(connection: Connection, claimed: Claim) -> bool:
    """Enter that a shard is done; tell whether the worker still had it. Commits."""
    done = _execute(connection, _FINISH, _mine(claimed)) == 1
    connection.commit()
    return done


def release(connection: Connection, claimed: Claim) -> None:
    """Give a shard back before its lease is over. Commits."""
    _execute(connection, _RELEASE, _mine(claimed))
    connection.commit()


def are_unfinished(connection: Connection, shards: Sequence[Shard]) -> bool:
    """Tell whether any shard of a plan is still to be done, by whomever."""
    statement = select(func.count()).select_from(_REKEYS).where(_any_of(shards), _C.finished_at.is_(None))
    return bool(connection.execute(statement, execution_options=OWN_TABLES).scalar_one())


def progress(connection: Connection) -> list[Progress]:
    """Return how far all columns are that a plan has been made for.

    :raises MalformedRowError: if a row is not one that this library writes.
    """
    place = _C.schema_name, _C.table_name, _C.column_name
    sums = (func.sum(_C[name]) for name in ("rows_total", "rows_seen", "rekeyed", "conflicts", "unreadable"))
    shards = func.count(), func.count(_C.shard) - func.count(_C.finished_at)
    statement = select(*place, _C.key_id, *sums, *shards).group_by(*place, _C.key_id).order_by(*place, _C.key_id)
    try:
        return [_progress(*row) for row in fetch_all(connection, statement, _malformed)]
    except (ArithmeticError, TypeError, ValueError):  # SQLite keeps any value in any column
        pass
    raise _malformed()


def _progress(schema: str, table: str, column: str, key_id: Any, *numbers: int) -> Progress:
    if not isinstance(key_id, str):
        raise TypeError
    return Progress(".".join(filter(None, (schema, table, column))), key_id, *map(int, numbers))


def _of(columns: Iterable[KnownColumn]) -> ColumnElement[bool]:
    return or_(
        false(),
        *(
            and_(_C.schema_name == one.schema, _C.table_name == one.table, _C.column_name == one.column)
            for one in columns
        ),
    )


def _any_of(shards: Sequence[Shard]) -> ColumnElement[bool]:
    """Return the condition that a row is one of some shards, in the plan that they are of."""
    numbers: dict[tuple[KnownColumn, str], list[int]] = {}
    for shard in shards:
        numbers.setdefault((shard.column, shard.key_id), []).append(shard.number)
    return or_(
        false(), *(and_(_of([column]), _C.key_id == key_id, _C.shard.in_(n)) for (column, key_id), n in numbers.items())
    )


def _execute(connection: Connection, statement: Any, parameters: dict[str, Any] | None = None) -> int:
    return connection.execute(statement, parameters, execution_options=OWN_TABLES).rowcount


# --- What a worker executes with every batch, made once --------------------------------------------------------------


class _lease_end(FunctionElement[datetime]):  # noqa: N801 - a function of SQL
    """When a lease that begins now is over, by the database's clock, in UTC."""

    type = DateTime(timezone=True)
    inherit_cache = True
    seconds = LEASE.seconds


class _latest_lease_end(_lease_end):  # noqa: N801 - as above
    """A time that no lease goes beyond, nor one that is given meanwhile, or by a clock that was set back a little."""

    inherit_cache = True
    seconds = 2 * LEASE.seconds


@compiles(_lease_end, "postgresql")
def _lease_end_postgresql(element: Any, _compiler: Any, **_: Any) -> str:
    return f"clock_timestamp() + interval '{element.seconds} seconds'"


@compiles(_lease_end, "sqlite")
def _lease_end_sqlite(element: Any, _compiler: Any, **_: Any) -> str:
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now', '{element.seconds} seconds')"


@compiles(_lease_end, "mysql")
@compiles(_lease_end, "mariadb")
def _lease_end_mysql(element: Any, _compiler: Any, **_: Any) -> str:
    return f"UTC_TIMESTAMP(6) + INTERVAL {element.seconds} SECOND"


def _mine(claimed: Claim) -> dict[str, Any]:
    column = claimed.shard.column
    return {
        "of_schema": column.schema,
        "of_table": column.table,
        "of_column": column.column,
        "of_shard": claimed.shard.number,
        "of_key": claimed.shard.key_id,
        "of_worker": claimed.worker,
    }


_MINE: Final = update(_REKEYS).where(
    _C.schema_name == bindparam("of_schema"),
    _C.table_name == bindparam("of_table"),
    _C.column_name == bindparam("of_column"),
    _C.shard == bindparam("of_shard"),
    _C.key_id == bindparam("of_key"),
    _C.worker == bindparam("of_worker"),
    _C.finished_at.is_(None),
)
_ADVANCE: Final = _MINE.values(
    position=bindparam("reached"),
    rows_seen=_C.rows_seen + bindparam("seen"),
    rekeyed=_C.rekeyed + bindparam("replaced"),
    conflicts=_C.conflicts + bindparam("in_conflict"),
    unreadable=_C.unreadable + bindparam("not_read"),
    leased_until=_lease_end(),
    updated_at=database_now(),
)
_FINISH: Final = _MINE.values(finished_at=database_now(), updated_at=database_now())
_RELEASE: Final = _MINE.values(worker=None, leased_until=None)
