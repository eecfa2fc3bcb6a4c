"""The identity of a row: as bytes that a value is bound to, and as SQL that brings it along when the value is read.

A type sees nothing of a row but its own value. So in the columns clause of a statement a bound column is rendered as
one expression of the columns that identify the row and of the stored value:

.. code-block:: text

    hex(text of the first column) "." [hex(text of the second column) "."]… stored value

The text of a column is the same on every database: an integer in decimal, a string as it is, a UUID as 32 lower-case
hexadecimal characters. In hexadecimal is its UTF-8. The identity is ``LP(text)`` of each, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple, NoReturn
from uuid import UUID

from sqlalchemy import Column, Enum, FromClause, Integer, String, Table, Text, Uuid, func, literal_column
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement, Label
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import CHAR, TypeEngine

from .derivation import length_prefixed
from .exceptions import ColumnError, MalformedCiphertextError, UnsupportedDatabaseError, UnsupportedOperationError

_SEPARATOR: Final = "."
_IS_NULL: Final = "-"

# Under these, two strings are equal only if their bytes are; under others an UPDATE may find a row by another spelling.
_BYTEWISE: Final = ("_bin", "binary", "posix", "ucs_basic")


class Kind(StrEnum):
    """How the value of an identifying column becomes text."""

    INTEGER = "integer"
    TEXT = "text"
    UUID = "uuid"


class IdentityColumn(NamedTuple):
    """One of the columns that identify a row, as it is put on record.

    :ivar name: its name in the database.
    """

    name: str
    kind: Kind


class Identifying(NamedTuple):
    """One of the columns that identify a row, as it is declared."""

    column: Column[Any]
    kind: Kind

    @property
    def on_record(self) -> IdentityColumn:
        """What is put on record of it."""
        # str(), since SQLAlchemy's quoted names are of a class of their own.
        return IdentityColumn(str(self.column.name), self.kind)


def identifying(table: Table, names: Sequence[str], bound: str) -> tuple[Identifying, ...]:
    """Return the columns of a table that a value is to be bound to.

    :param bound: the name of the column of the value, for messages.
    :raises ColumnError: if there is none of such a name, or its values can change, be NULL, or have no one spelling.
    """
    present = {column.name: column for column in table.columns}
    found = []
    for name in names:
        column = present.get(name)
        if column is None:
            raise ColumnError(f"{bound} is to be bound to its row by {name!r}, but {table.name} has no such column.")
        found.append(Identifying(column, _checked_kind(column, bound)))
    return tuple(found)


def _kind_of(column: Column[Any]) -> Kind | None:
    """Return how the value of a column becomes text, or ``None`` if there is no one way."""
    type_: TypeEngine[Any] = column.type
    if isinstance(type_, Integer):
        return Kind.INTEGER
    if isinstance(type_, Uuid):
        return Kind.UUID
    # A database pads CHAR, and an Enum is the name of something else.
    if isinstance(type_, String) and not isinstance(type_, (CHAR, Enum)):
        return Kind.TEXT
    return None


def _checked_kind(column: Column[Any], bound: str) -> Kind:
    what = f"{bound} is to be bound to its row by {column.name!r}, "
    kind = _kind_of(column)
    if kind is None:
        raise ColumnError(f"{what}whose type is none of Integer, String and Uuid: its text differs between databases.")
    if column.nullable:
        raise ColumnError(f"{what}which may be NULL. Declare it nullable=False, or name another column.")
    collation = getattr(column.type, "collation", None)
    if collation and not _is_bytewise(collation):
        raise ColumnError(
            f"{what}whose collation takes different strings for equal, so that an UPDATE would bind the value to "
            "another spelling than the row's. Give it a binary collation, or name another column."
        )
    for key in column.foreign_keys:
        if key.onupdate and key.onupdate.upper() not in {"NO ACTION", "RESTRICT"}:
            raise ColumnError(
                f"{what}which the database changes by itself (ON UPDATE {key.onupdate}), so that the value could no "
                "longer be read. Name another column."
            )
    return kind


def is_exact(column: Any, dialect: Dialect) -> bool:
    """Tell whether a value of an identifying column that a row is found by is spelt as it is in the row.

    On MySQL and MariaDB a string is, unless declared otherwise, compared without regard to case and trailing spaces.
    """
    if dialect.name not in {"mysql", "mariadb"} or not isinstance(column.type, String):
        return True
    collation = getattr(column.type.dialect_impl(dialect), "collation", None)
    return bool(collation) and _is_bytewise(collation)


def _is_bytewise(collation: Any) -> bool:
    name = str(collation).lower()
    return name == "c" or name.endswith(_BYTEWISE)


# --- As bytes --------------------------------------------------------------------------------------------------------


def text_of(kind: Kind, value: Any) -> str | None:
    """Return the text of the value of an identifying column, or ``None`` if it has none."""
    if kind is Kind.INTEGER and isinstance(value, int) and not isinstance(value, bool):
        return str(int(value))
    if kind is Kind.TEXT and isinstance(value, str):
        return str.__str__(value) if _is_unicode(value) else None
    if kind is Kind.UUID:
        if isinstance(value, UUID):
            return value.hex
        if isinstance(value, str):
            return _uuid(value)
    return None


def identity_of(texts: Iterable[str]) -> bytes:
    """Return the identity of a row: ``LP`` of the text of each of its identifying columns."""
    return length_prefixed(*(text.encode() for text in texts))


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _uuid(value: str) -> str | None:
    try:
        return UUID(value).hex
    except ValueError:
        return None


# --- As SQL ----------------------------------------------------------------------------------------------------------


class _AsText(FunctionElement[str]):
    """The value of a column as text, in SQL."""

    name = "kravn_as_text"
    inherit_cache = True
    type = Text()


def identity_text(column: ColumnElement[Any], kind: Kind) -> ColumnElement[str]:
    """Return the text of the value of an identifying column, in SQL."""
    text = _AsText(column)
    if kind is not Kind.UUID:
        return text
    # Databases without a type for it keep it with hyphens or without, and in either case.
    return func.lower(func.replace(text, literal_column("'-'"), literal_column("''")), type_=Text())


class WithRow(FunctionElement[Any]):
    """A stored value with the identity of its row before it, in SQL.

    :param is_text: whether it is stored as text.
    """

    name = "kravn_with_row"
    inherit_cache = False  # made while a statement is compiled, so never part of what a cached one is looked up by

    def __init__(
        self,
        stored: ColumnElement[Any],
        identity: Sequence[ColumnElement[str]],
        *,
        is_text: bool,
        type_: TypeEngine[Any],
    ) -> None:
        super().__init__(stored, *identity)
        self.type = type_
        self.is_text = is_text


def with_row(
    expression: ColumnElement[Any],
    identity: Sequence[Identifying],
    *,
    is_text: bool,
    type_: TypeEngine[Any],
    bound: str | None,
) -> WithRow:
    """Return what a bound column is selected as.

    :param expression: the column, of its table or of an alias or subquery of it.
    :param identity: the identifying columns, of the table.
    :raises UnsupportedOperationError: if it is not seen from there which row the value is of.
    """
    stored = expression.element if isinstance(expression, Label) else expression
    source = getattr(stored, "table", None)
    texts = []
    for column, kind in identity:
        found = source.corresponding_column(column) if isinstance(source, FromClause) else None
        if found is not None:
            texts.append(identity_text(found, kind))
    if len(texts) != len(identity):
        names = " and ".join(repr(column.name) for column, _ in identity)
        raise UnsupportedOperationError(
            f"{bound or 'A column'} is bound to its row by {names}, which cannot be seen where its value is selected. "
            f"Select the column of the table itself, or of a subquery that has {names} too."
        )
    return WithRow(stored, texts, is_text=is_text, type_=type_)


def split(value: Any, columns: int, bound: str | None) -> tuple[bytes, Any]:
    """Take apart what a bound column was selected as: the identity of the row, and the stored value.

    :raises UnsupportedOperationError: if it was selected some other way.
    :raises MalformedCiphertextError: if the row has no identity.
    """
    if isinstance(value, (bytearray, memoryview)):
        value = bytes(value)
    texts = []
    rest = value
    for _ in range(columns):
        first, separator, rest = _partition(rest)
        if first == _IS_NULL:
            raise MalformedCiphertextError(f"A value of {bound} is in a row of which an identifying column is NULL.")
        text = _from_hex(first) if separator else None
        if text is None:
            raise UnsupportedOperationError(
                f"A value of {bound}, which is bound to its row, was loaded without its row: by a textual statement, "
                "or a function. Select the column itself."
            )
        texts.append(text)
    return identity_of(texts), rest


def _partition(value: Any) -> tuple[str, bool, Any]:
    if isinstance(value, bytes):
        start, separator, rest = value.partition(_SEPARATOR.encode())
        return (start.decode("ascii", "replace"), bool(separator), rest)
    if isinstance(value, str):
        text, found, after = value.partition(_SEPARATOR)
        return text, bool(found), after
    return "", False, value


def _from_hex(text: str) -> str | None:
    try:
        return bytes.fromhex(text).decode()
    except ValueError:
        return None


def _texts(element: Any, compiler: Any, kw: dict[str, Any]) -> list[str]:
    # What belongs to the expression as a whole, and not to its parts.
    for name in ("add_to_result_map", "within_columns_clause", "within_label_clause"):
        kw.pop(name, None)
    return [compiler.process(clause, **kw) for clause in element.clauses]


@compiles(_AsText)
@compiles(WithRow)
def _refuse(_element: _AsText | WithRow, compiler: Any, **_: Any) -> NoReturn:
    raise UnsupportedDatabaseError(
        f"It is not known how {compiler.dialect.name} gives the identity of a row. Columns with bind_row are for "
        "PostgreSQL, SQLite, MySQL and MariaDB."
    )


@compiles(_AsText, "postgresql")
@compiles(_AsText, "sqlite")
def _standard_text(element: _AsText, compiler: Any, **kw: Any) -> str:
    (column,) = _texts(element, compiler, kw)
    return f"CAST({column} AS TEXT)"


@compiles(_AsText, "mysql")
@compiles(_AsText, "mariadb")
def _mysql_text(element: _AsText, compiler: Any, **kw: Any) -> str:
    (column,) = _texts(element, compiler, kw)
    return f"CAST({column} AS CHAR CHARACTER SET utf8mb4)"


@compiles(WithRow, "postgresql")
def _postgresql_with_row(element: WithRow, compiler: Any, **kw: Any) -> str:
    stored, *texts = _texts(element, compiler, kw)
    start = " || ".join(
        f"coalesce(encode(convert_to({text}, 'UTF8'), 'hex'), '{_IS_NULL}') || '{_SEPARATOR}'" for text in texts
    )
    return f"({start} || {stored})" if element.is_text else f"(convert_to({start}, 'UTF8') || {stored})"


@compiles(WithRow, "sqlite")
def _sqlite_with_row(element: WithRow, compiler: Any, **kw: Any) -> str:
    stored, *texts = _texts(element, compiler, kw)
    # hex() gives '' for NULL, hence no coalesce. What is put together is text to SQLite, whatever bytes it has.
    start = " || ".join(f"iif({text} IS NULL, '{_IS_NULL}', hex({text})) || '{_SEPARATOR}'" for text in texts)
    return f"({start} || {stored})" if element.is_text else f"CAST({start} || {stored} AS BLOB)"


@compiles(WithRow, "mysql")
@compiles(WithRow, "mariadb")
def _mysql_with_row(element: WithRow, compiler: Any, **kw: Any) -> str:
    stored, *texts = _texts(element, compiler, kw)
    parts = [part for text in texts for part in (f"coalesce(hex({text}), '{_IS_NULL}')", f"'{_SEPARATOR}'")]
    if element.is_text:
        return f"concat({', '.join(parts)}, {stored})"
    return f"concat(CAST(concat({', '.join(parts)}) AS BINARY), {stored})"
