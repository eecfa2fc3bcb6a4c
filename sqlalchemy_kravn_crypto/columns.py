"""Every encrypted column that this process has declared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakValueDictionary

from sqlalchemy import Column, Connection, inspect, select, type_coerce
from sqlalchemy.types import LargeBinary, Text

from .ciphertext import from_text
from .exceptions import MalformedCiphertextError

BINARY: Final = "binary"
TEXT: Final = "text"
STORAGES: Final = (BINARY, TEXT)

# By identity, since comparing columns builds SQL. A column goes when its table does.
_columns: Final[WeakValueDictionary[int, Column[Any]]] = WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class EncryptedColumn:
    """One encrypted column of one table, as declared.

    :ivar storage: ``binary`` or ``text``.
    """

    column: Column[Any]
    storage: str

    @property
    def label(self) -> str:
        """Schema, table and column, for messages."""
        return f"{self.column.table}.{self.column.name}"

    def first_frame(self, connection: Connection) -> bytes | None:
        """Return the stored frame of any one row, or ``None`` where there is no table, column or value.

        :raises MalformedCiphertextError: if the value is no frame.
        """
        table = self.column.table
        inspector = inspect(connection)
        if not inspector.has_table(table.name, schema=table.schema):
            return None
        if self.column.name not in {found["name"] for found in inspector.get_columns(table.name, schema=table.schema)}:
            return None
        stored = type_coerce(self.column, Text() if self.storage == TEXT else LargeBinary())
        value: Any = connection.execute(select(stored).where(self.column.is_not(None)).limit(1)).scalar()
        if value is None:
            return None
        return frame_of(value, self.storage, self.label)


def frame_of(stored: Any, storage: str, label: str | None) -> bytes:
    """Return the frame of what the database returned for a column.

    :raises MalformedCiphertextError: if it is not of the storage's type, or no canonical text.
    """
    if storage == TEXT:
        if isinstance(stored, str):
            return from_text(stored)
    elif isinstance(stored, (bytes, bytearray, memoryview)):
        return bytes(stored)
    raise MalformedCiphertextError(
        f"The database returned a {type(stored).__name__} for {label}, whose storage is {storage}. Does the column in "
        "the database have the type that the migration gave it?"
    )


def register(column: Column[Any]) -> None:
    """Remember a column that was declared with an encrypted type."""
    _columns[id(column)] = column


def is_registered(column: Column[Any]) -> bool:
    """Tell whether a column was declared with an encrypted type, in this process."""
    return _columns.get(id(column)) is column


def registered() -> list[Column[Any]]:
    """Return every encrypted column that this process has declared and still has."""
    return list(_columns.values())
