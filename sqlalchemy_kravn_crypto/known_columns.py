"""Every encrypted column that any process has declared, and where it is in the database.

What is counted, re-encrypted and destroyed goes by ``kms_columns`` as well as by the models at hand, so that a column
whose model is gone is not forgotten with its values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnClause,
    ColumnElement,
    Connection,
    Function,
    MetaData,
    TableClause,
    and_,
    column,
    delete,
    func,
    inspect,
    select,
    table,
    text,
)
from sqlalchemy.exc import NoSuchTableError, OperationalError
from sqlalchemy.types import NULLTYPE, LargeBinary, Text, TypeEngine

from .ciphertext import KEY_PREFIX_SIZE, TEXT_KEY_PREFIX_SIZE, key_prefix, text_key_prefix
from .columns import BINARY, TEXT, EncryptedColumn
from .exceptions import ColumnUnreachableError, MalformedRowError, UnsupportedDatabaseError
from .row_identity import IdentityColumn, Kind, identity_text
from .rows import OWN_TABLES, fetch_all
from .schema import TABLES
from .types import EncryptedType, encrypted_columns

_COLUMNS: Final = TABLES.columns

_UPSERTING: Final = {"postgresql": "postgresql", "sqlite": "sqlite", "mysql": "mysql", "mariadb": "mysql"}
"""The databases that can insert a row or update the one that is there, and where SQLAlchemy has how."""

# Reflection has it only for columns that have a default as well.
_ON_UPDATE: Final = text(
    "SELECT column_name FROM information_schema.columns WHERE table_schema = coalesce(:schema, database()) "
    "AND table_name = :table AND extra LIKE '%on update%' ORDER BY ordinal_position"
)


@dataclass(frozen=True, slots=True, order=True)
class KnownColumn:
    """One encrypted column of one table. Plain values, so that it can be pickled and sent to another process.

    :ivar schema: empty for the default schema.
    :ivar storage: ``binary`` or ``text``.
    :ivar name: the name that values are bound to.
    :ivar earlier_names: names that stored values may be bound to besides.
    :ivar row_identity: the columns that identify the row that values are bound to; empty if they are bound to none.
    """

    schema: str
    table: str
    column: str
    storage: str
    name: str
    earlier_names: tuple[str, ...] = ()
    row_identity: tuple[IdentityColumn, ...] = ()

    @property
    def label(self) -> str:
        """Schema, table and column, for messages."""
        return ".".join(part for part in (self.schema, self.table, self.column) if part)

    @property
    def place(self) -> tuple[str, str, str]:
        """Schema, table and column: what there is one column of."""
        return self.schema, self.table, self.column


# --- What is declared ------------------------------------------------------------------------------------------------


def declared(metadata: MetaData | None = None) -> list[KnownColumn]:
    """Return the encrypted columns of all tables of a ``MetaData``, or without one of all that this process has made.

    Where several are declared for one place, they are one column with all of their names.
    """
    if metadata is None:
        found = encrypted_columns()
    else:
        columns = (column for table in metadata.tables.values() for column in table.columns)
        found = [EncryptedColumn(one, one.type.storage) for one in columns if isinstance(one.type, EncryptedType)]
    known: dict[tuple[str, str, str], KnownColumn] = {}
    for encrypted in found:
        new = _known(encrypted)
        before = known.get(new.place, new)
        known[new.place] = replace(before, earlier_names=_others(before.name, *before.earlier_names, *_names(new)))
    return sorted(known.values())


def _known(encrypted: EncryptedColumn) -> KnownColumn:
    owner: Any = encrypted.column.table
    type_: Any = encrypted.column.type
    earlier = tuple(type_.earlier_names)
    name = str(type_.column_name)
    bound = type_.bound_column
    row = () if bound is None else tuple(one.on_record for one in bound.identity)
    # str() of each, since SQLAlchemy's quoted names are of a class of their own.
    return KnownColumn(
        str(owner.schema or ""), str(owner.name), str(encrypted.column.name), encrypted.storage, name, earlier, row
    )


def _names(known: KnownColumn) -> tuple[str, ...]:
    return (known.name, *known.earlier_names)


def _others(name: str, *names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(other for other in names if other != name))


# --- What is on record -----------------------------------------------------------------------------------------------


def record(connection: Connection, columns: Iterable[KnownColumn]) -> None:
    """Put columns on record that are not, or are with another storage or other names. The caller commits.

    One query where nothing is new, and one more call of the driver for all that is. Several processes may do the same
    at once, in any isolation level in which one sees what the other has committed. What is on record is compared as it
    is stored and not parsed, so that a row that somebody else wrote is put right if it is of one of the columns, and is
    in nobody's way if it is not.

    :raises UnsupportedDatabaseError: if it is not known how this database inserts what another process may insert too.
    """
    present: set[_Row] = set()
    with suppress(MalformedRowError):
        present = set(_stored(connection))
    # All in the same order, so that of two processes one waits for the other, and not each for the other.
    missing = [row for row in map(_row, sorted(set(columns))) if row not in present]
    if missing:
        rows = [row._asdict() for row in missing]
        connection.execute(_upsert(connection.dialect.name), rows, execution_options=OWN_TABLES)


def recorded(connection: Connection) -> list[KnownColumn]:
    """Return the columns on record.

    :raises MalformedRowError: if a row is not one that this library writes.
    """
    return sorted(map(_parsed, _stored(connection)))


class _Row(NamedTuple):
    """A row of ``kms_columns``, as it is stored."""

    schema_name: str
    table_name: str
    column_name: str
    storage: str
    name: str
    earlier_names: str | None
    row_identity: str | None


_PLACE: Final = _Row._fields[:3]


def _stored(connection: Connection) -> list[_Row]:
    statement = select(*(_COLUMNS.c[name] for name in _Row._fields))
    return [
        _Row(*row) for row in fetch_all(connection, statement, lambda: _malformed("A text in kms_columns is none."))
    ]


def _row(known: KnownColumn) -> _Row:
    names = json.dumps(known.earlier_names) if known.earlier_names else None
    identity = json.dumps(known.row_identity) if known.row_identity else None
    return _Row(*known.place, known.storage, known.name, names, identity)


def _parsed(row: _Row) -> KnownColumn:
    try:
        return KnownColumn(
            _identifier(row.schema_name),
            _identifier(row.table_name),
            _identifier(row.column_name),
            _storage(row.storage),
            _text(row.name),
            tuple(map(_text, _listed(row.earlier_names))),
            tuple(IdentityColumn(_identifier(name), Kind(kind)) for name, kind in _listed(row.row_identity)),
        )
    except (RecursionError, TypeError, ValueError):
        pass
    raise _malformed(f"The row of kms_columns {_place_shown(row)} is not one that this library writes.")


def _malformed(what: str) -> MalformedRowError:
    return MalformedRowError(
        f"{what} Find out who writes to the table, and delete the row; the next process that starts and declares the "
        "column writes it anew."
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):  # SQLite keeps any value in any column
        raise TypeError
    return value


def _identifier(value: Any) -> str:
    name = _text(value)
    if "\0" in name:  # no database has such a name, and some drivers refuse the query
        raise ValueError
    return name


def _storage(value: Any) -> str:
    storage = _text(value)
    if storage not in {BINARY, TEXT}:
        raise ValueError
    return storage


def _listed(stored: Any) -> list[Any]:
    found = [] if stored is None else json.loads(_text(stored))
    if not isinstance(found, list):
        raise TypeError
    return found


def _place_shown(row: _Row) -> str:
    place: tuple[Any, ...] = row[:3]
    if not all(isinstance(name, str) for name in place):
        return "whose names are no text"
    return f"for {'.'.join(filter(None, place))[:400]!r}"


def forget(connection: Connection, schema: str, table: str, column: str) -> bool:
    """Take a column off the record, and tell whether it was on it. The caller commits.

    Its values are then no longer counted, so that the keys they are under can be destroyed.
    """
    columns = _COLUMNS.c
    found = connection.execute(
        delete(_COLUMNS).where(
            columns.schema_name == schema, columns.table_name == table, columns.column_name == column
        ),
        execution_options=OWN_TABLES,
    )
    return found.rowcount > 0


def _upsert(dialect: str) -> Any:
    family = _UPSERTING.get(dialect)
    if family is None:
        raise UnsupportedDatabaseError(
            f"It is not known how {dialect} inserts a row that another process may insert too."
        )
    # Here, where the engine has loaded it: with the package, each program would load the dialects of all databases.
    insert: Any = import_module(f"sqlalchemy.dialects.{family}").insert(_COLUMNS)
    others = [name for name in _Row._fields if name not in _PLACE]
    if family == "mysql":
        return insert.on_duplicate_key_update({name: insert.inserted[name] for name in others})
    new = {name: insert.excluded[name] for name in others}
    return insert.on_conflict_do_update(index_elements=list(_PLACE), set_=new)


# --- All that are known ----------------------------------------------------------------------------------------------


def known(connection: Connection, metadata: MetaData | None = None, schemas: Sequence[str] = ()) -> list[KnownColumn]:
    """Return the columns on record and those of a ``MetaData``; of a column that is both, as the models have it.

    Where programs move tables with ``schema_translate_map``, one declared column is many in the database: name the
    schemas that the tables are moved to. Each column of the default schema, or of a schema that the database does not
    have (a placeholder, therefore), is then taken wherever its table is: in each of ``schemas``, and in its own. One
    whose table is in none of them stays what it was declared as, and is unreachable; a schema without the table has no
    values of it.

    :param schemas: names of schemas.
    :raises ColumnUnreachableError: if the database has no schema of such a name.
    """
    found = {one.place: one for one in (*recorded(connection), *(declared(metadata) if metadata is not None else ()))}
    if not schemas:
        return sorted(found.values())
    inspector = inspect(connection)
    present = set(inspector.get_schema_names())
    for name in schemas:
        if name not in present:
            raise ColumnUnreachableError(f"The database has no schema {name!r}. Correct the list of schemas.")
    tables = {schema: set(inspector.get_table_names(schema=schema or None)) for schema in ("", *schemas)}
    placed: dict[tuple[str, str, str], KnownColumn] = {}
    for one in found.values():
        places = [one] if one.schema in present else _places(one, schemas, tables)
        placed |= {to.place: found.get(to.place, to) for to in places}
    return sorted(placed.values())


def _places(one: KnownColumn, schemas: Sequence[str], tables: dict[str, set[str]]) -> list[KnownColumn]:
    """Return a column in each schema that its table is in; if it is in none, the column as it is."""
    own = ("",) if one.schema == "" else ()
    return [replace(one, schema=schema) for schema in (*own, *schemas) if one.table in tables[schema]] or [one]


# --- Where they are --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Located:
    """A column in the database, and what is needed of its table.

    The table is a bare one, without the types, defaults and events of the models, so that what is done with it leaves
    no trace but the value.

    :ivar value: the stored value, as the plain type of its storage.
    :ivar key: the columns of the primary key, in its order; empty if there is none.
    :ivar kept: columns that the database would change with every UPDATE that does not name them.
    :ivar identity: the texts that identify the row that the value is bound to; empty if it is bound to none.
    """

    known: KnownColumn
    table: TableClause
    value: ColumnClause[Any]
    key: tuple[ColumnClause[Any], ...]
    kept: tuple[ColumnClause[Any], ...] = ()
    identity: tuple[ColumnElement[str], ...] = ()

    def under(self, key_id: str) -> ColumnElement[bool]:
        """Return the condition that the value is under a data key.

        In text storage the last 2 of the 64 bits of the key id are not looked at.
        """
        start, prefix = self._start(key_id)
        equal: ColumnElement[bool] = start == prefix
        return equal

    def not_under(self, key_id: str) -> ColumnElement[bool]:
        """Return the condition that there is a value, and that it is not under a data key."""
        start, prefix = self._start(key_id)
        # On SQLite the start of no bytes at all is NULL.
        return and_(self.value.is_not(None), start.is_distinct_from(prefix))

    def _start(self, key_id: str) -> tuple[Function[Any], Any]:
        """Return how the value begins, and how those under a data key do."""
        if self.known.storage == TEXT:
            size, prefix = TEXT_KEY_PREFIX_SIZE, text_key_prefix(key_id)
            return func.substr(self.value, 1, size, type_=self.value.type), prefix
        return func.substr(self.value, 1, KEY_PREFIX_SIZE, type_=self.value.type), key_prefix(key_id)


def located(connection: Connection, known: KnownColumn) -> Located:
    """Find a column in the database.

    :raises ColumnUnreachableError: if it is not there.
    """
    inspector = inspect(connection)
    schema = known.schema or None
    present: dict[str, Any] = {}
    key: list[str] = []
    missing = False
    try:
        present = {found["name"]: found for found in inspector.get_columns(known.table, schema=schema)}
        key = inspector.get_pk_constraint(known.table, schema=schema)["constrained_columns"]
    except NoSuchTableError:
        missing = True
    except OperationalError:
        # To SQLite a schema is a database, and one that is not there an error of its own.
        if connection.dialect.name != "sqlite" or schema in inspector.get_schema_names():
            raise
        missing = True
    needed = {known.column, *(one.name for one in known.row_identity)}
    if missing or not needed <= present.keys():
        what = "table" if missing else "column" if known.column not in present else "column that identifies its rows"
        raise ColumnUnreachableError(
            f"{known.label} holds encrypted values, or did, but the {what} is not there. Migrate the database, or name "
            "the schemas where the tables are in several; if the values are gone for good, take the column off the "
            "record with `kravn-crypto forget-column`."
        )
    stored: TypeEngine[Any] = Text() if known.storage == TEXT else LargeBinary()
    value: ColumnClause[Any] = column(known.column, stored)
    keys = tuple(column(name, _without_domain(present[name]["type"])) for name in key)
    kept = tuple(column(name, NULLTYPE) for name in _changed_by_itself(connection, known) if name != known.column)
    rows = [column(one.name, present[one.name]["type"]) for one in known.row_identity]
    others = {one.name: one for one in (*rows, *kept, *keys)}
    found = table(known.table, value, *others.values(), schema=schema)
    identity = tuple(identity_text(found.c[one.name], one.kind) for one in known.row_identity)
    return Located(known, found, value, keys, kept, identity)


def _without_domain(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type that a domain of PostgreSQL is of, or the type."""
    from sqlalchemy.dialects.postgresql import DOMAIN  # noqa: PLC0415 - slow, and serving does without

    return type_.data_type if isinstance(type_, DOMAIN) else type_


def _changed_by_itself(connection: Connection, known: KnownColumn) -> list[str]:
    """Return the columns of the table that the database changes with every UPDATE, as MySQL and MariaDB do."""
    if connection.dialect.name not in {"mysql", "mariadb"}:
        return []
    parameters = {"schema": known.schema or None, "table": known.table}
    return list(connection.scalars(_ON_UPDATE, parameters))
