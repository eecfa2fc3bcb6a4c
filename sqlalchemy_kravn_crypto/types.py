"""Column types: column value to ciphertext and back with the current keyring, and nothing else.

Processors do no I/O: those of an asynchronous Core result run outside of SQLAlchemy's greenlet, where none is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, NoReturn, TypeVar

from sqlalchemy import Column, Table, event
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.base import SchemaEventTarget
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import LargeBinary, Text, TypeDecorator, TypeEngine, to_instance

from .ciphertext import ColumnName, to_text
from .codecs.base import Codec
from .codecs.documents import JSONCodec
from .codecs.scalars import BytesCodec, TextCodec
from .codecs.selection import codec_for
from .columns import BINARY, STORAGES, TEXT, EncryptedColumn, frame_of, register, registered
from .comparator import RefusingComparator
from .context import current_keyring, keyring_to_write, report_unknown_key
from .declarations import refuse_meaningless
from .exceptions import ColumnError, UnknownKeyError, UnstorableValueError
from .row_binding import AwaitingRow, BoundColumn, listen
from .row_identity import identifying, split, with_row

T = TypeVar("T")

# Their drivers take bytes and return bytes, so SQLAlchemy's own processors between would only cost time.
_PLAIN_BYTES = frozenset({"mariadb", "mysql", "postgresql", "sqlite"})


class _Attachment:
    """The name of the column that a type belongs to.

    A box, since SQLAlchemy copies the type for every dialect, and may do so before the column is in a table.
    """

    __slots__ = ("bound", "column", "name")

    def __init__(self, name: ColumnName | None) -> None:
        self.name = name
        self.column: Column[Any] | None = None
        self.bound: BoundColumn | None = None


class EncryptedType(TypeDecorator[T], Generic[T]):
    """Base of the encrypted column types.

    Values are bound to the column that they are written for: one that is copied to another column does not decrypt
    there. In SQL they can be tested for NULL; every other operator raises ``UnsupportedOperationError``.

    :param associated_data: the name to bind values to, ``"table.column"`` by convention. Without it, it is the names of
        table and column as declared, without the schema; pin it before renaming either.
    :param storage: ``"binary"`` (``BYTEA``, ``BLOB``, ``LONGBLOB``) or ``"text"``.
    :param earlier_names: names that stored values may be bound to besides, from before a rename. They are read; what is
        written is bound to the present name.
    :param bind_row: the name of the column, or the names of the columns, of the same table that values are bound to
        besides: a key that the program generates, a tenant. A value that is copied to a row where these differ does not
        decrypt there.
    :raises ColumnError: if any of them is malformed.
    """

    impl = LargeBinary
    cache_ok = True
    comparator_factory = RefusingComparator

    _codec: Codec

    def __init__(
        self,
        *,
        associated_data: str | None = None,
        storage: str = BINARY,
        earlier_names: Iterable[str] = (),
        bind_row: str | Iterable[str] = (),
    ) -> None:
        super().__init__()
        if storage not in STORAGES:
            raise ColumnError(f"storage must be one of {', '.join(map(repr, STORAGES))}.")
        if isinstance(earlier_names, str):
            raise ColumnError("earlier_names takes several names: ('table.column',).")
        self.associated_data = associated_data
        self.storage = storage
        self.earlier_names = tuple(earlier_names)
        self.bind_row = (bind_row,) if isinstance(bind_row, str) else tuple(bind_row)
        self._is_text = storage == TEXT
        self._attachment = _Attachment(None if associated_data is None else _column_name(associated_data))
        self._earlier = tuple(_column_name(name) for name in self.earlier_names)
        self._owner: int | None = None
        if associated_data is not None:
            self._refuse_ambiguous_names()

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
            parent.type = unshared = self.copy()
            unshared._attachment = _Attachment(None if self.associated_data is None else self._attachment.name)  # noqa: SLF001 - a copy
            unshared._owner = None  # noqa: SLF001 - the same
            unshared._set_parent(parent, outer=outer, **kw)  # noqa: SLF001 - the same method
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
        refuse_meaningless(column, table)
        if self.associated_data is None:
            self._attachment.name = ColumnName(f"{table.name}.{column.name}")
            self._refuse_ambiguous_names()
        if self.bind_row:
            self._attachment.column = column
            from .bound_objects import listen as listen_to_mappers  # noqa: PLC0415 - Core does without the ORM

            listen()
            listen_to_mappers()
        register(column)

    @property
    def bound_column(self) -> BoundColumn | None:
        """The column with those that identify its row, or ``None`` if values are bound to no row.

        :raises ColumnError: if values cannot be bound to those.
        """
        return self._bound_column() if self.bind_row else None

    def _bound_column(self) -> BoundColumn:
        attachment = self._attachment
        if attachment.bound is None:
            column, name = attachment.column, self._name().name
            if column is None:
                raise ColumnError(f"{self!r} belongs to no column of a table, so its values have no row.")
            # Not when the type is attached: then the table does not have all of its columns yet.
            attachment.bound = BoundColumn(column, identifying(column.table, self.bind_row, name))
        return attachment.bound

    def _refuse_ambiguous_names(self) -> None:
        by_hint = {name.hint: name.name for name in self._earlier}
        for known in (*self._earlier, self._name()):
            if by_hint.setdefault(known.hint, known.name) != known.name:
                raise ColumnError(
                    f"{known.name!r} and {by_hint[known.hint]!r} share the 2 bytes by which stored values tell names "
                    "apart. Pin another name with associated_data, or drop an earlier one."
                )

    @property
    def _static_cache_key(self) -> Any:
        # What decides how values are processed: statements that differ in it must not share processors. Of the
        # parameters SQLAlchemy looks at the positional ones only.
        key = super()._static_cache_key
        if not isinstance(key, tuple):
            return key
        return (
            *key,
            ("column", self.column_name, self.earlier_names),
            ("storage", self.storage),
            ("row", self.bind_row),
        )

    def __repr__(self) -> str:
        parameters = self._shown_parameters()
        if self.associated_data is not None:
            parameters.append(f"associated_data={self.associated_data!r}")
        if self.storage != BINARY:
            parameters.append(f"storage={self.storage!r}")
        if self.earlier_names:
            parameters.append(f"earlier_names={self.earlier_names!r}")
        if self.bind_row:
            parameters.append(f"bind_row={self.bind_row!r}")
        return f"{type(self).__name__}({', '.join(parameters)})"

    def _shown_parameters(self) -> list[str]:
        return []

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

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        """Return what encrypts a value on its way to the database."""
        if type(self).process_bind_param is not EncryptedType.process_bind_param:
            return super().bind_processor(dialect)
        own = None if dialect.name in _PLAIN_BYTES else self.impl_instance.bind_processor(dialect)
        # For bytes, and not for a bytearray, Python's sqlite3 looks for an adapter first, with every value.
        binary = bytearray if dialect.name == "sqlite" else bytes
        if own is None:
            return self._encryptor(binary)
        driver: Callable[[Any], Any] = own
        return self._encryptor(lambda frame: driver(binary(frame)))

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        """Return what decrypts a value that was loaded."""
        if type(self).process_result_value is not EncryptedType.process_result_value:
            return super().result_processor(dialect, coltype)
        own = None if dialect.name in _PLAIN_BYTES else self.impl_instance.result_processor(dialect, coltype)
        decrypt = self._decryptor()
        if own is None:
            return decrypt
        driver: Callable[[Any], Any] = own
        return lambda stored: decrypt(driver(stored))

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002 - fixed
        """Encrypt a value on its way to the database; ``None`` is SQL NULL.

        :raises NotConfiguredError: before ``configure(engine)``.
        :raises UnstorableValueError: if the value would not come back equal.
        """
        return self._encryptor(bytes)(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002 - fixed
        """Decrypt a value that was loaded.

        :raises NotConfiguredError: before ``configure(engine)``.
        :raises DecryptionError: if it is not what was written here, or its data key is not at hand.
        """
        return self._decryptor()(value)

    # Closures, since they are called for every value: looking the same things up on `self` costs a tenth of the whole.

    def _encryptor(self, binary: Callable[[bytes], Any]) -> Callable[[Any], Any]:
        if self.bind_row:
            return self._binder(binary)
        attachment, unattached, encode = self._attachment, self._name, self._codec.encode
        stored = to_text if self._is_text else binary

        def encrypt(value: Any) -> Any:
            if value is None:
                return None
            keyring = keyring_to_write()
            name = attachment.name or unattached()
            try:
                payload = encode(value)
            except UnstorableValueError as error:
                refused = error
            else:
                return stored(keyring.encrypt(payload, name))
            raise refused.for_column(name.name)

        return encrypt

    def _binder(self, binary: Callable[[bytes], Any]) -> Callable[[Any], Any]:
        bound, name, encode = self._bound_column(), self._name(), self._codec.encode
        stored = to_text if self._is_text else binary

        def await_row(value: Any) -> Any:
            if value is None:
                return None
            keyring = keyring_to_write()
            try:
                payload = encode(value)
            except UnstorableValueError as error:
                refused = error
            else:
                return AwaitingRow(bound, lambda row: stored(keyring.encrypt(payload, name.of_row(row))))
            raise refused.for_column(name.name)

        return await_row

    def _unbinder(self) -> Callable[[Any], Any]:
        name, earlier, decode, label = self._name(), self._earlier, self._codec.decode, self.column_name
        columns = len(self.bind_row)

        def decrypt(selected: Any) -> Any:
            if selected is None:
                return None
            keyring = current_keyring()
            row, stored = split(selected, columns, label)
            frame = frame_of(stored, self.storage, label)
            try:
                payload = keyring.decrypt(frame, name.of_row(row), [one.of_row(row) for one in earlier])
            except UnknownKeyError:
                report_unknown_key()
                raise
            return decode(payload)

        return decrypt

    def column_expression(self, colexpr: ColumnElement[Any]) -> ColumnElement[Any]:
        """Return what a value is selected as: of a column that is bound to its row, with the identity of the row.

        :raises UnsupportedOperationError: if the columns that identify the row are not to be had there.
        """
        bound = self.bound_column
        if bound is None:
            return colexpr
        return with_row(colexpr, bound.identity, is_text=self._is_text, type_=self, bound=self.column_name)

    def _decryptor(self) -> Callable[[Any], Any]:
        if self.bind_row:
            return self._unbinder()
        attachment, unattached, decode, earlier = self._attachment, self._name, self._codec.decode, self._earlier
        is_text = self._is_text

        def decrypt(stored: Any) -> Any:
            if stored is None:
                return None
            keyring = current_keyring()
            if is_text or type(stored) is not bytes:
                stored = frame_of(stored, self.storage, self.column_name)
            try:
                payload = keyring.decrypt(stored, attachment.name or unattached(), earlier)
            except UnknownKeyError:
                report_unknown_key()
                raise
            return decode(payload)

        return decrypt

    def compare_values(self, x: Any, y: Any) -> bool:
        """Tell whether no UPDATE is needed to get from one value to the other.

        Stricter than ``==``, by which 1, 1.0 and ``True`` are the same.
        """
        if x is None or y is None:
            return x is y
        return self._codec.same(x, y)

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


class EncryptedJSON(EncryptedType[Any]):
    """Any JSON value, encrypted.

    ``None`` is SQL NULL; ``sqlalchemy.JSON.NULL`` is an encrypted ``null``, which loads as ``None``. What would not
    come back equal is refused when it is written.

    .. code-block:: python

        class Plugin(Base):
            __tablename__ = "plugin"
            id: Mapped[int] = mapped_column(primary_key=True)
            credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)

    :param python_type: a pydantic model, a ``TypedDict``, a dataclass, or any other type that pydantic knows, such as
        ``list[Model]``. Values are then objects of that type, and what does not fit it is refused on both ways.
    """

    cache_ok = True
    hashable = False
    """Values may be dicts and lists, so ``unique()`` tells rows apart by identity, as with ``sqlalchemy.JSON``."""

    _codec: Codec = JSONCodec()

    def __init__(
        self,
        python_type: Any = None,
        *,
        associated_data: str | None = None,
        storage: str = BINARY,
        earlier_names: Iterable[str] = (),
        bind_row: str | Iterable[str] = (),
    ) -> None:
        if isinstance(python_type, str):
            raise ColumnError("EncryptedJSON takes a Python type; a name goes into associated_data='table.column'.")
        super().__init__(
            associated_data=associated_data, storage=storage, earlier_names=earlier_names, bind_row=bind_row
        )
        self._python_type = python_type
        if python_type is not None:
            from .codecs.objects import ObjectCodec  # noqa: PLC0415 - pydantic is slow to import

            self._codec = ObjectCodec(python_type)

    @property
    def python_type(self) -> Any:
        """The type of the values: what was given, else ``dict``, as with ``sqlalchemy.JSON``."""
        return self._python_type or dict

    @property
    def _static_cache_key(self) -> Any:
        key = super()._static_cache_key
        return (*key, ("codec", self._codec)) if isinstance(key, tuple) and self._python_type is not None else key

    def _shown_parameters(self) -> list[str]:
        if self._python_type is None:
            return []
        return [self._python_type.__name__ if isinstance(self._python_type, type) else repr(self._python_type)]


class EncryptedString(EncryptedType[str]):
    """Text of any length, encrypted."""

    cache_ok = True
    python_type = str

    _codec: Codec = TextCodec()


class EncryptedBytes(EncryptedType[bytes]):
    """Bytes of any number, encrypted."""

    cache_ok = True
    python_type = bytes

    _codec: Codec = BytesCodec()


class Encrypted(EncryptedType[T]):
    """Values of another SQLAlchemy type, encrypted: each loads exactly as it was stored.

    .. code-block:: python

        born: Mapped[date] = mapped_column(Encrypted(Date))
        salary: Mapped[Decimal] = mapped_column(Encrypted(Numeric))
        seen: Mapped[datetime] = mapped_column(Encrypted(DateTime(timezone=True)))

    What the type declares of sizes (``String(50)``, ``Numeric(10, 2)``) is not enforced, and nothing is rounded.

    :param type_: ``Integer``, ``Numeric``, ``Float``, ``Boolean``, ``Date``, ``Time``, ``DateTime``, ``Interval``,
        ``Uuid``, ``Enum``, ``String``, ``LargeBinary``, ``JSON`` or a subclass of one, or a ``TypeDecorator`` over one;
        a class or an instance.
    :raises ColumnError: if it is another.
    """

    cache_ok = True

    def __init__(
        self,
        type_: TypeEngine[T] | type[TypeEngine[T]],
        *,
        associated_data: str | None = None,
        storage: str = BINARY,
        earlier_names: Iterable[str] = (),
        bind_row: str | Iterable[str] = (),
    ) -> None:
        super().__init__(
            associated_data=associated_data, storage=storage, earlier_names=earlier_names, bind_row=bind_row
        )
        self.type_: TypeEngine[T] = to_instance(type_)
        self._codec = codec_for(self.type_)
        self.hashable = self.type_.hashable

    @property
    def python_type(self) -> Any:
        """The type of the values."""
        return self.type_.python_type

    def _shown_parameters(self) -> list[str]:
        return [repr(self.type_)]


def encrypted_columns() -> list[EncryptedColumn]:
    """Return every encrypted column that this process has declared, in a stable order."""
    found = [
        EncryptedColumn(column, column.type.storage)
        for column in registered()
        if isinstance(column.type, EncryptedType) and column.table is not None
    ]
    return sorted(found, key=lambda encrypted: encrypted.label)


def _column_name(name: str) -> ColumnName:
    if not name:
        raise ColumnError("A name to bind values to must not be empty; give one such as 'users.credentials'.")
    return ColumnName(name)
