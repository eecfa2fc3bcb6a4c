"""Results of psycopg in PostgreSQL's binary format, where encrypted values are among them.

As text, which is what psycopg asks for by itself, bytes come in hexadecimal: twice as many, which the server writes and
the driver reads for nothing. The format is one for all columns of a result. So binary is asked for only where psycopg
loads every one of them the same either way, which is known by the types that the server gave the same statement before,
and by what the connection loads these types with.
"""

from __future__ import annotations

from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy.sql.compiler import SQLCompiler

from .compiled_statements import statement_of
from .drivers import ask_for_binary
from .exceptions import ResultTypesChangedError
from .types import EncryptedType

_BYTEA: Final = 17

_ALIKE: Final = {
    16: ("BoolLoader", "BoolBinaryLoader"),
    _BYTEA: ("ByteaLoader", "ByteaBinaryLoader"),
    19: ("TextLoader", "TextBinaryLoader"),  # name
    20: ("IntLoader", "Int8BinaryLoader"),
    21: ("IntLoader", "Int2BinaryLoader"),
    23: ("IntLoader", "Int4BinaryLoader"),
    25: ("TextLoader", "TextBinaryLoader"),
    1042: ("TextLoader", "TextBinaryLoader"),  # char
    1043: ("TextLoader", "TextBinaryLoader"),  # varchar
    1082: ("DateLoader", "DateBinaryLoader"),
    1083: ("TimeLoader", "TimeBinaryLoader"),
    1114: ("TimestampLoader", "TimestampBinaryLoader"),
    1184: ("TimestamptzLoader", "TimestamptzBinaryLoader"),
    1700: ("NumericLoader", "NumericBinaryLoader"),
    2950: ("UUIDLoader", "UUIDBinaryLoader"),
}
"""By the OID of a type, the names of psycopg's own loaders of text and of binary, where they return the same.

Not among them: ``real`` and ``double precision``, which the server may round in text; ``interval``, whose text means
what a setting says; ``json``, for which SQLAlchemy has loaders of its own; and what has an OID of its database's own,
such as an enum, which psycopg returns as a string from text and as bytes from binary.
"""

_DRIVER: Final = frozenset({"psycopg", "psycopg_binary", "psycopg_c"})

_Types = tuple[int, ...]

# The types of the results of a compiled statement; empty if it is to be left as it is.
_known: Final[WeakKeyDictionary[SQLCompiler, _Types]] = WeakKeyDictionary()


def ask_if_alike(
    _connection: Any, cursor: Any, _statement: str, _parameters: Any, context: Any, executemany: Any
) -> None:
    """Ask for binary where the types of the result are known and loaded alike. For ``before_cursor_execute``."""
    compiled = _selecting(cursor, context, executemany)
    types = _known.get(compiled) if compiled is not None else None
    if types and _are_loaded_alike(cursor, types):
        ask_for_binary(cursor)


def look_at_types(
    _connection: Any, cursor: Any, _statement: str, _parameters: Any, context: Any, executemany: Any
) -> None:
    """Keep in mind what types a result has. For ``after_cursor_execute``.

    :raises ResultTypesChangedError: if binary was asked for, and they are others than before, not all loaded alike.
    """
    compiled = _selecting(cursor, context, executemany)
    if compiled is None:
        return
    known = _known.get(compiled)
    if known is None:
        types = _types_of(cursor)
        _known[compiled] = types if _BYTEA in types and _ALIKE.keys() >= set(types) and _has_encrypted(compiled) else ()
    elif known and cursor.format and (types := _types_of(cursor)) != known:
        alike = _are_loaded_alike(cursor, types)
        _known[compiled] = types if alike else ()
        if not alike:
            raise ResultTypesChangedError(
                "A column that a statement selects has another type in the database than before: was its table "
                "migrated, or has each tenant its own? Execute the statement again. With "
                "configure(engine, binary_results=False) it does not matter."
            )


def _selecting(cursor: Any, context: Any, executemany: Any) -> SQLCompiler | None:
    """Return the compiled statement if it is a SELECT, on one of psycopg's own cursors that know both formats."""
    compiled = None if context is None or executemany else context.compiled
    if not isinstance(compiled, SQLCompiler) or not getattr(compiled.statement, "is_select", False):
        return None
    driver = context.dialect.dbapi
    return compiled if type(cursor) in (driver.Cursor, driver.ServerCursor) else None


def _types_of(cursor: Any) -> _Types:
    result = cursor.pgresult
    return () if result is None else tuple(map(result.ftype, range(result.nfields)))


def _are_loaded_alike(cursor: Any, types: _Types) -> bool:
    """Tell whether the connection loads these types with psycopg's own loaders that return the same."""
    find = cursor.adapters.get_loader
    return all((_own_name(find(one, 0)), _own_name(find(one, 1))) == _ALIKE.get(one) for one in types)


def _own_name(loader: Any) -> str | None:
    return loader.__name__ if loader is not None and loader.__module__.partition(".")[0] in _DRIVER else None


def _has_encrypted(compiled: SQLCompiler) -> bool:
    selected = getattr(statement_of(compiled), "selected_columns", ())
    return any(isinstance(column.type, EncryptedType) for column in selected)
