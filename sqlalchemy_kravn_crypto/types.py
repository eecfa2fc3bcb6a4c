"""Column types: column value to ciphertext and back with the current keyring, and nothing else.

Processors do no I/O: those of an asynchronous Core result run outside of SQLAlchemy's greenlet, where none is possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from sqlalchemy import Column, Table, event
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.base import SchemaEventTarget
from sqlalchemy.types import LargeBinary, Text, TypeDecorator, TypeEngine

from .ciphertext import ColumnName, to_text
from .codecs.base import Codec
from .codecs.documents import JSONCodec
from .columns import BINARY, STORAGES, TEXT, EncryptedColumn, frame_of, register, registered
from .context import current_keyring
from .exceptions import ColumnError


class _Attachment:
    """The name of the column that a type belongs to.

    A box, since SQLAlchemy copies the type for every dialect, and may do so before the column is in a table.
    """

    __slots__ = ("name",)

    def __init__(self, name: ColumnName | None) -> None:
        self.name = name


class EncryptedType(TypeDecorator[Any]):
    """Base of the encrypted column types.

    Values are bound to the column that they are written for: one that is copied to another column does not decrypt
    there.

    :param associated_data: the name to bind values to, ``"table.column"`` by convention. Without it, it is the names of
        table and column as declared, without the schema; pin it before renaming either.
    :param storage: ``"binary"`` (``BYTEA``, ``BLOB``, ``LONGBLOB``) or ``"text"``.
    :raises ColumnError: if either is malformed.
    """

    impl = LargeBinary
    cache_ok = True
    hashable = False
    """Values may be dicts and lists, so ``unique()`` tells rows apart by identity, as with ``sqlalchemy.JSON``."""

    _codec: ClassVar[Codec]

    def __init__(self, associated_data: str | None = None, *, storage: str = BINARY) -> None:
        super().__init__()
        if associated_data == "":
            raise ColumnError("associated_data must not be empty; give a name such as 'users.credentials'.")
        if storage not in STORAGES:
            raise ColumnError(f"storage must be one of {', '.join(map(repr, STORAGES))}.")
        self.associated_data = associated_data
        self.storage = storage
        self._attachment = _Attachment(None if associated_data is None else ColumnName(associated_data))
        self._owner: int | None = None

    # --- Which column this is ----------------------------------------------------------------------------------------

    @property
    def column_name(self) -> str | None:
        """The name that values are bound to, or ``None`` while the type belongs to no column of a table."""
        return None if self._attachment.name is None else self._attachment.name.name

    def _set_parent(self, parent: SchemaEventTarget, outer: bool = False, **kw: Any) -> None:  # noqa: FBT001, FBT002 - fixed
        """Learn the column's name once it is in a table. SQLAlchemy calls this for every column that has the type."""
        if not isinstance(parent, Column):
            return
        if self._owner not in {None, id(parent)}:
            # One instance in two columns, or the copy of another column's, would give both the second one's name.
            parent.type = type(self)(self.associated_data, storage=self.storage)
            parent.type._set_parent(parent, outer=outer, **kw)  # noqa: SLF001 - the same method
            return
        self._owner = id(parent)
        table: Any = parent.table
        if table is not None:
            self._attach(parent, table)
        else:
            event.listen(parent, "after_parent_attach", self._attach)

    def _attach(self, column: Column[Any], table: Any) -> None:
        if column.type is not self or not isinstance(table, Table):
            return
        _refuse_meaningless(column, table)
        if self.associated_data is None:
            self._attachment.name = ColumnName(f"{table.name}.{column.name}")
        register(column)

    @property
    def _static_cache_key(self) -> Any:
        # Name and storage decide how values are processed, so statements that differ in them must not share processors.
        # Of the parameters SQLAlchemy looks at the positional ones only.
        key = super()._static_cache_key
        if not isinstance(key, tuple):
            return key
        return (*key, ("column_name", self.column_name), ("storage", self.storage))

    def __repr__(self) -> str:
        parameters = [] if self.associated_data is None else [repr(self.associated_data)]
        if self.storage != BINARY:
            parameters.append(f"storage={self.storage!r}")
        return f"{type(self).__name__}({', '.join(parameters)})"

    # --- What the database sees --------------------------------------------------------------------------------------

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the type of the stored value on one database."""
        # Not adapted to the driver: SQLAlchemy does that for parameters, and in DDL it would make VARCHAR of TEXT.
        if dialect.name in {"mysql", "mariadb"}:
            from sqlalchemy.dialects.mysql import LONGBLOB, LONGTEXT  # noqa: PLC0415 - slow, and here it is loaded

            # BLOB and TEXT end at 64 KiB there. Text is compared byte by byte, since base64 tells cases apart.
            return LONGTEXT(charset="ascii", collation="ascii_bin") if self.storage == TEXT else LONGBLOB()
        if self.storage == TEXT:
            return Text(collation="C") if dialect.name == "postgresql" else Text()
        return LargeBinary()

    def with_variant(self, type_: Any, *dialect_names: str) -> NoReturn:
        """Refuse: a variant would store plaintext on its database."""
        raise ColumnError(
            f"{type(self).__name__} has no variants: {type_!r} on {', '.join(dialect_names)} would store plaintext. "
            "The type chooses the right storage on every database by itself."
        )

    # --- The way of a value ------------------------------------------------------------------------------------------

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002 - fixed
        """Encrypt a value on its way to the database; ``None`` is SQL NULL.

        :raises NotConfiguredError: before ``configure(engine)``.
        :raises UnstorableValueError: if the value would not come back equal.
        """
        if value is None:
            return None
        frame = current_keyring().encrypt(self._codec.encode(value), self._name())
        return to_text(frame) if self.storage == TEXT else frame

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002 - fixed
        """Decrypt a value that was loaded.

        :raises NotConfiguredError: before ``configure(engine)``.
        :raises DecryptionError: if it is not what was written here, or its data key is not at hand.
        """
        if value is None:
            return None
        keyring = current_keyring()
        frame = frame_of(value, self.storage, self.column_name)
        return self._codec.decode(keyring.decrypt(frame, self._name()))

    def literal_processor(self, dialect: Dialect) -> Callable[[Any], str]:  # noqa: ARG002 - fixed
        """Refuse to render a value into SQL text.

        Here and not in the processor that would be returned: SQLAlchemy prints the value where that one raises.
        """
        raise ColumnError(
            f"A value of {self.column_name or 'an encrypted column'} cannot be rendered into SQL text; pass it as a "
            "bound parameter (without literal_binds)."
        )

    def _name(self) -> ColumnName:
        name = self._attachment.name
        if name is None:
            raise ColumnError(
                f"{self!r} belongs to no column of a table, so it is not known what to bind its values to. Use the "
                "column's own type (table.c.column.type), or give associated_data='table.column'."
            )
        return name


class EncryptedJSON(EncryptedType):
    """Any JSON value, encrypted.

    ``None`` is SQL NULL; ``sqlalchemy.JSON.NULL`` is an encrypted ``null``, which loads as ``None``. What would not
    come back equal is refused when it is written.

    .. code-block:: python

        class Plugin(Base):
            __tablename__ = "plugin"
            id: Mapped[int] = mapped_column(primary_key=True)
            credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)
    """

    cache_ok = True

    _codec = JSONCodec()


def encrypted_columns() -> list[EncryptedColumn]:
    """Return every encrypted column that this process has declared, in a stable order."""
    found = [
        EncryptedColumn(column, column.type.storage)
        for column in registered()
        if isinstance(column.type, EncryptedType) and column.table is not None
    ]
    return sorted(found, key=lambda encrypted: encrypted.label)


def _refuse_meaningless(column: Column[Any], table: Table) -> None:
    """Refuse what means nothing on values that are encrypted anew each time, or would put plaintext into the schema."""
    for flag in ("primary_key", "unique", "index"):
        if getattr(column, flag):
            raise ColumnError(
                f"{table.name}.{column.name} is encrypted, so it cannot be {flag}: equal values have different "
                "ciphertexts."
            )
    if column.server_default is not None:
        raise ColumnError(
            f"{table.name}.{column.name} is encrypted, so it cannot have a server_default or be computed: the database "
            "would hold plaintext. Use default=."
        )
