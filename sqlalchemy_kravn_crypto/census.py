"""How many values are under which data key, counted by the database from their leading bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, and_, case, cast, func, literal, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import LargeBinary

from .ciphertext import (
    FRAME_START,
    KEY_PREFIX_SIZE,
    LEGACY_PREFIXES,
    TEXT_FRAME_START,
    TEXT_HEADER_SIZE,
    key_id_of_start,
    key_id_of_text_start,
)
from .columns import TEXT
from .exceptions import ColumnUnreachableError
from .known_columns import KnownColumn, Located, located
from .rows import OWN_TABLES
from .schema import TABLES, State

_LEGACY_SIZE: Final = len(LEGACY_PREFIXES[0])


@dataclass(frozen=True, slots=True)
class ColumnCensus:
    """The values of one column.

    :ivar keys: how many are under each key id.
    :ivar legacy: how many begin with each prefix of an earlier format.
    :ivar unrecognised: how many are neither: plaintext, or of another program.
    """

    column: KnownColumn
    keys: dict[str, int] = field(default_factory=dict)
    nulls: int = 0
    legacy: dict[str, int] = field(default_factory=dict)
    unrecognised: int = 0

    def stale(self, primary_key_id: str) -> int:
        """Return how many values are not under the primary, in whatever format."""
        others = sum(count for key_id, count in self.keys.items() if key_id != primary_key_id)
        return others + sum(self.legacy.values()) + self.unrecognised

    def as_dict(self) -> dict[str, Any]:
        """Return the same for JSON."""
        return {
            "column": self.column.label,
            "keys": self.keys,
            "nulls": self.nulls,
            "legacy": self.legacy,
            "unrecognised": self.unrecognised,
        }


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A column whose values could not be counted, and why."""

    column: KnownColumn
    reason: str

    def as_dict(self) -> dict[str, str]:
        """Return the same for JSON."""
        return {"column": self.column.label, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Census:
    """The values of all known columns.

    :ivar unreachable: the columns that could not be counted. While there are any, nothing is certain.
    """

    columns: tuple[ColumnCensus, ...]
    unreachable: tuple[Unreachable, ...] = ()

    def of_key(self, key_id: str) -> int:
        """Return how many values are under a data key, as far as they could be counted."""
        return sum(column.keys.get(key_id, 0) for column in self.columns)

    def stale(self, primary_key_id: str) -> int:
        """Return how many values are not under the primary, as far as they could be counted."""
        return sum(column.stale(primary_key_id) for column in self.columns)

    def as_dict(self) -> dict[str, Any]:
        """Return the same for JSON."""
        return {
            "columns": [column.as_dict() for column in self.columns],
            "unreachable": [column.as_dict() for column in self.unreachable],
        }


def census(connection: Connection, columns: Sequence[KnownColumn]) -> Census:
    """Count the values of columns by key id.

    Each column is one pass over its table, and a second one if it has values that are under none of the keys on record.
    A column that is not there or may not be read does not keep the others from being counted.
    """
    keys = TABLES.keys.c
    held = select(keys.key_id).where(keys.key_id.is_not(None), keys.state != State.DESTROYED.value)
    key_ids = list(connection.scalars(held, execution_options=OWN_TABLES))
    counted: list[ColumnCensus] = []
    unreachable: list[Unreachable] = []
    for column in columns:
        try:
            # A savepoint, since on PostgreSQL an error ends what has begun.
            with connection.begin_nested():
                counted.append(_count(connection, located(connection, column), key_ids))
        except ColumnUnreachableError as error:
            unreachable.append(Unreachable(column, str(error)))
        except DBAPIError as error:
            # The message of the server, which for a SELECT without values of ours names no more than table and column.
            said = (str(error.orig).strip() or type(error.orig).__name__).splitlines()[0]
            unreachable.append(Unreachable(column, f"{column.label} cannot be read: {said}"))
    return Census(tuple(counted), tuple(unreachable))


def _count(connection: Connection, column: Located, key_ids: Sequence[str]) -> ColumnCensus:
    under = [column.under(key_id) for key_id in key_ids]
    # To compare with what is known takes the database less than to group by it.
    counts = select(func.count(), func.count(column.value), *(func.count(case((one, 1))) for one in under))
    rows, values, *of_keys = connection.execute(counts.select_from(column.table), execution_options=OWN_TABLES).one()
    keys = Counter(dict(zip(key_ids, of_keys, strict=True)))
    legacy: Counter[str] = Counter()
    unrecognised = 0
    if keys.total() != values:
        for start, found in connection.execute(_starts_of_others(column, key_ids), execution_options=OWN_TABLES):
            key_id = key_id_of_text_start(start) if isinstance(start, str) else key_id_of_start(bytes(start))
            prefix = start if isinstance(start, str) else bytes(start).decode("latin-1")
            if key_id is not None:
                keys[key_id] += int(found)
            elif prefix in LEGACY_PREFIXES:
                legacy[prefix] += int(found)
            else:
                unrecognised += int(found)
    return ColumnCensus(column.known, dict(+keys), rows - values, dict(legacy), unrecognised)


def _starts_of_others(column: Located, key_ids: Sequence[str]) -> Select[Any]:
    """Return the query for how the values begin that are under no known key, and how many begin so.

    The database itself brings together what is no frame, or a column of plaintext would give a row for each value.
    """
    is_text = column.known.storage == TEXT
    size = TEXT_HEADER_SIZE if is_text else KEY_PREFIX_SIZE
    first_part = func.substr(column.value, 1, size, type_=column.value.type)
    # SQLite keeps text as text in a column of bytes, and no text is equal to any bytes.
    start: ColumnElement[Any] = first_part if is_text else cast(first_part, LargeBinary())
    begins = (
        select(start.label("start"), func.count().label("count"))
        .where(column.value.is_not(None), *map(column.not_under, key_ids))
        .group_by(start)
        .subquery()
    )
    frame_start: Any = TEXT_FRAME_START if is_text else FRAME_START
    legacy: list[Any] = list(LEGACY_PREFIXES) if is_text else [prefix.encode() for prefix in LEGACY_PREFIXES]

    def first(length: int) -> Any:
        return func.substr(begins.c.start, 1, length, type_=column.value.type)

    kind = case(
        (and_(first(len(frame_start)) == frame_start, func.length(begins.c.start) == size), begins.c.start),
        (first(_LEGACY_SIZE).in_(legacy), first(_LEGACY_SIZE)),
        else_=literal(frame_start[:0], column.value.type),
    ).label("kind")
    return select(kind, func.sum(begins.c.count)).group_by(kind)
