"""One UPDATE of many rows of a PostgreSQL table, each to a value of its own if it still has the value that was read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Final

from sqlalchemy import (
    ColumnClause,
    ColumnElement,
    Connection,
    Integer,
    TableClause,
    Text,
    and_,
    bindparam,
    cast,
    column,
    func,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import LargeBinary

from .key_ranges import Key, KeyColumns
from .rows import OWN_TABLES

# PostgreSQL looks for a deadlock when somebody has waited for a second, and ends the transaction of whoever finds it.
# That must not be the application, so a batch waits for less. Nor must a worker that is frozen keep its locks for ever.
_BOUNDS: Final = text(
    "SELECT set_config('lock_timeout', '50ms', true), set_config('idle_in_transaction_session_timeout', '10s', true)"
)
_LOCK_NOT_AVAILABLE: Final = "55P03"
_DEADLOCK_DETECTED: Final = "40P01"
_PLACES: Final = ("before_at", "before_size", "after_at", "after_size")
_PREFIX: Final = "kravn_"  # of the names of parameters, since one must not be that of a column


class BulkUpdate:
    """What replaces the values of one column.

    All values go to the server as one parameter, with their places in it: an array of them costs the driver more than
    encrypting them does.
    """

    def __init__(self, table: TableClause, value: ColumnClause[Any], keys: KeyColumns) -> None:
        self._table, self._value, self._keys = table, value, keys
        # That the rows are within the range of the batch follows from their keys; said, it keeps any plan to the range.
        self._within = (
            keys.after(keys.parameters(f"{_PREFIX}first"), or_at=True),
            keys.before(keys.parameters(f"{_PREFIX}last"), or_at=True),
        )
        self._of_all = self._update_all()

    def execute(self, connection: Connection, keys: Sequence[Key], before: Sequence[Any], after: Sequence[Any]) -> int:
        """Replace values, and return in how many rows. For the beginning of a transaction, which the caller commits.

        A row that somebody else has locked for longer than a moment is left as it is.

        :param keys: the primary keys, in their order.
        :param before: the values that were read.
        :param after: the values to replace them with.
        """
        parameters = self._parameters(keys, before, after)
        try:
            connection.execute(_BOUNDS)
            return self._rows_updated(connection, self._of_all, parameters)
        except DBAPIError as error:
            if not _waited(error):
                raise
        connection.rollback()
        connection.execute(_BOUNDS)
        return self._rows_updated(connection, self._update_unlocked(), parameters)

    def _rows_updated(self, connection: Connection, statement: Any, parameters: dict[str, Any]) -> int:
        return connection.execute(statement, parameters, execution_options=OWN_TABLES).rowcount

    # --- The statements ----------------------------------------------------------------------------------------------

    def _update_all(self) -> Any:
        new, value = self._new(), self._value
        return (
            update(self._table)
            .values({value: self._taken(new, "after")})
            .where(*_same_key(self._keys.columns, new), value == self._taken(new, "before"), *self._within)
        )

    def _update_unlocked(self) -> Any:
        new, locked = self._new(), self._table.alias("locked")
        keys = [locked.c[key.name] for key in self._keys.columns]
        unchanged = and_(*_same_key(keys, new), locked.c[self._value.name] == self._taken(new, "before"))
        free = (
            select(
                *(key.label(f"key_{place}") for place, key in enumerate(keys)), self._taken(new, "after").label("after")
            )
            .select_from(new.join(locked, unchanged))
            # Not as a DELETE locks, so that a row that only a foreign key holds on to is not passed over.
            .with_for_update(of=locked, key_share=True, skip_locked=True)
            .subquery("free")
        )
        return (
            update(self._table)
            .values({self._value: free.c.after})
            .where(*_same_key(self._keys.columns, free), *self._within)
        )

    def _new(self) -> Any:
        """Return the keys of the batch and the places of their values as a table."""
        arrays: list[Any] = []
        columns: list[Any] = []
        for place, key in enumerate(self._keys.columns):
            columns.append(column(f"key_{place}", key.type))
            arrays.append(_array(f"key_{place}", key.type))
        for name in _PLACES:
            columns.append(column(name, Integer()))
            arrays.append(_array(name, Integer()))
        return func.unnest(*arrays).table_valued(*columns, name="new").render_derived()

    def _taken(self, new: Any, name: str) -> Any:
        values = bindparam(_PREFIX + name, type_=LargeBinary())
        part = func.substring(values, new.c[f"{name}_at"], new.c[f"{name}_size"], type_=LargeBinary())
        if isinstance(self._value.type, Text):
            # Cut as bytes, since to find a character the server would count all before it.
            return func.convert_from(part, literal_column("'UTF8'"), type_=Text())
        return part

    # --- The parameters ----------------------------------------------------------------------------------------------

    def _parameters(self, keys: Sequence[Key], before: Sequence[Any], after: Sequence[Any]) -> dict[str, Any]:
        parameters = self._keys.named(f"{_PREFIX}first", keys[0]) | self._keys.named(f"{_PREFIX}last", keys[-1])
        for place, key in enumerate(self._keys.columns):
            parameters[f"{_PREFIX}key_{place}"] = _listed([values[place] for values in keys], key.type)
        for name, values in (("before", before), ("after", after)):
            stored = [one.encode() for one in values] if isinstance(self._value.type, Text) else values
            sizes = [len(one) for one in stored]
            parameters[_PREFIX + name] = b"".join(stored)
            parameters[f"{_PREFIX}{name}_size"] = _listed(sizes, Integer())
            parameters[f"{_PREFIX}{name}_at"] = _listed(list(accumulate(sizes[:-1], initial=1)), Integer())
        return parameters


def _same_key(columns: Iterable[Any], table: Any) -> list[ColumnElement[bool]]:
    return [column == table.c[f"key_{place}"] for place, column in enumerate(columns)]


def _array(name: str, type_: Any) -> Any:
    """Return a parameter that is an array; one of integers is written here, since the driver takes long over it."""
    if isinstance(type_, Integer):
        return cast(bindparam(_PREFIX + name, type_=Text()), ARRAY(type_))
    return bindparam(_PREFIX + name, type_=ARRAY(type_))


def _listed(values: Sequence[Any], type_: Any) -> Any:
    return f"{{{','.join(map(str, values))}}}" if isinstance(type_, Integer) else list(values)


def _waited(error: DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    return state in {_LOCK_NOT_AVAILABLE, _DEADLOCK_DETECTED}
