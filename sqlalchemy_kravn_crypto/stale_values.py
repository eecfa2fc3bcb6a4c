"""The stale values of one column within a range of primary keys: read in batches, replaced if still the same.

Core only, on bare tables: no event of the ORM, no ``onupdate``, no version counter takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Uuid,
    and_,
    bindparam,
    case,
    cast,
    event,
    func,
    select,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.types import NULLTYPE, LargeBinary

from .bulk_update import BulkUpdate
from .columns import TEXT
from .drivers import ask_for_binary, knows_binary
from .key_ranges import Key, KeyColumns
from .known_columns import Located
from .rows import OWN_TABLES

_MYSQL: Final = frozenset({"mysql", "mariadb"})
_BINARY: Final = "kravn_crypto_binary"
"""The execution option of statements whose rows psycopg is to ask for in PostgreSQL's binary format."""


class StaleValues:
    """The values of a column that are not NULL and not under one key, in a range of primary keys.

    :param key_id: the key that values are to be under.
    :param lower: the first key of the range, as text; ``None`` if it is open.
    :param upper: the first key behind the range, as text; ``None`` if it is open.
    :raises ColumnUnreachableError: if the table has no primary key to walk along.
    """

    def __init__(
        self, located: Located, key_id: str, dialect: str, *, lower: str | None = None, upper: str | None = None
    ) -> None:
        self.keys = KeyColumns(located.key, located.known.label, dialect)
        self._located = located
        self._dialect = dialect
        self._bulk = BulkUpdate(located.table, located.value, self.keys)
        within = [located.not_under(key_id)]
        if upper is not None:
            within.append(self.keys.before(self.keys.from_text(upper)))
        from_lower = [] if lower is None else [self.keys.after(self.keys.from_text(lower), or_at=True)]
        self._all = [*within, *from_lower]
        self._first = self._reading(self._all)
        self._next = self._reading([*within, self.keys.after(self.keys.parameters("kravn_last"))])

    # --- Reading -----------------------------------------------------------------------------------------------------

    def read(self, connection: Connection, after: Key | None, limit: int) -> Sequence[Any]:
        """Return the next rows: the primary key, the stored value as the driver has it, and what identifies the row.

        :param after: the last key of the rows before; ``None`` at the beginning of the range.
        """
        statement = self._first if after is None else self._next
        parameters = {"kravn_limit": limit} | ({} if after is None else self.keys.named("kravn_last", after))
        options: dict[str, Any] = {**OWN_TABLES, _BINARY: self._is_read_in_binary(connection)}
        return connection.execute(statement, parameters, execution_options=options).all()

    def _is_read_in_binary(self, connection: Connection) -> bool:
        """Tell whether rows are asked for in the binary format, which spares both sides the hexadecimal of the values.

        That is a tenth of the whole work. With a key of another type, rows are asked for as text: so psycopg returns
        what it does not know, such as an enum, as a string, and not as bytes.
        """
        if not knows_binary(connection.dialect) or not isinstance(self._located.value.type, LargeBinary):
            return False
        if not all(isinstance(key.type, Integer | Uuid) for key in self.keys.columns):
            return False
        if not event.contains(connection, "before_cursor_execute", _ask_if_told):
            event.listen(connection, "before_cursor_execute", _ask_if_told)
        return True

    def _reading(self, conditions: Sequence[ColumnElement[bool]]) -> Any:
        key = self.keys.columns
        return (
            select(*key, type_coerce(self._readable(), NULLTYPE), *self._located.identity)
            .where(*conditions)
            .order_by(*key)
            .limit(bindparam("kravn_limit", type_=Integer()))
        )

    def _readable(self) -> ColumnElement[Any]:
        """Return the value, in a way that the driver does not stumble over what is no value.

        Python's driver of SQLite ends a query with an error where text is no UTF-8. Of what is no frame in any case,
        something else is selected that is none either.
        """
        value = self._located.value
        if self._dialect != "sqlite":
            return value
        is_text = func.typeof(value) == "text"
        if self._located.known.storage != TEXT:
            return case((is_text, "text"), else_=type_coerce(value, NULLTYPE))
        octets = cast(value, LargeBinary)
        is_ascii = and_(value.op("NOT GLOB")("*[^ -~]*"), func.length(value) == func.length(octets))  # GLOB ends at NUL
        return case((and_(is_text, is_ascii), type_coerce(value, NULLTYPE)), else_=octets)

    def count(self, connection: Connection) -> int:
        """Return how many there are."""
        statement = select(func.count()).select_from(self._located.table).where(*self._all)
        return connection.execute(statement, execution_options=OWN_TABLES).scalar_one()

    def split(self, connection: Connection, parts: int) -> tuple[list[str], int]:
        """Return the bounds between ranges with as many of them each, as text, and how many there are in each.

        :param parts: how many ranges; fewer if there are fewer values.
        """
        number = func.row_number().over(order_by=self.keys.columns).label("number")
        total = func.count().over().label("total")
        numbered = select(*self.keys.columns, number, total).where(*self._all).subquery()
        *key, place, of = numbered.columns
        size = (of + (parts - 1)) // parts
        firsts = select(*key, size).where((place - 1) % size == 0).order_by(place)
        rows = connection.execute(firsts, execution_options=OWN_TABLES).all()
        return [self.keys.to_text(tuple(row[:-1])) for row in rows[1:]], rows[0][-1] if rows else 0

    # --- Replacing ---------------------------------------------------------------------------------------------------

    def replace(self, connection: Connection, keys: Sequence[Key], before: Sequence[Any], after: Sequence[Any]) -> int:
        """Store new values where the stored one is still the one that was read; return in how many rows it was.

        The first statements of a transaction, which the caller commits. A row that somebody else has locked is waited
        for but briefly, and then left as it is.
        """
        if not keys:
            return 0
        if self._dialect == "postgresql":
            return self._bulk.execute(connection, keys, before, after)
        if self._dialect in _MYSQL:
            free = self._lock(connection, keys)
            rows = [row for row in zip(keys, before, after, strict=True) if row[0] in free]
        else:
            rows = list(zip(keys, before, after, strict=True))
        return self._replace_one_by_one(connection, rows)

    def _lock(self, connection: Connection, keys: Sequence[Key]) -> set[Key]:
        """Lock those rows that nobody else has locked, and return their keys."""
        columns = self.keys.columns
        listed = columns[0].in_([key[0] for key in keys]) if len(columns) == 1 else tuple_(*columns).in_(list(keys))
        statement = select(*columns).where(listed).with_for_update(skip_locked=True)
        return {tuple(row) for row in connection.execute(statement, execution_options=OWN_TABLES)}

    def _replace_one_by_one(self, connection: Connection, rows: Sequence[tuple[Key, Any, Any]]) -> int:
        if not rows:
            return 0
        columns, value = self.keys.columns, self._located.value
        names = [f"kravn_key_{place}" for place in range(len(columns))]
        same_key = (one == bindparam(name, type_=one.type) for one, name in zip(columns, names, strict=True))
        statement = (
            update(self._located.table)
            .values({value: bindparam("kravn_after", type_=value.type)} | {kept: kept for kept in self._located.kept})
            .where(*same_key, value == bindparam("kravn_before", type_=value.type))
        )
        parameters = [
            dict(zip(names, key, strict=True), kravn_before=before, kravn_after=after) for key, before, after in rows
        ]
        return connection.execute(statement, parameters, execution_options=OWN_TABLES).rowcount


def _ask_if_told(_connection: Any, cursor: Any, _sql: str, _parameters: Any, context: Any, _many: bool) -> None:  # noqa: FBT001 - SQLAlchemy calls it
    if context is not None and context.execution_options.get(_BINARY):
        ask_for_binary(cursor)
