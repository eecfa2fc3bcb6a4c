"""CHECK constraints by which the database itself refuses plaintext in an encrypted column."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any, Final, NoReturn

from sqlalchemy import Boolean, CheckConstraint, ColumnElement, MetaData, Table
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import conv
from sqlalchemy.sql.compiler import SQLCompiler

from .ciphertext import MAGIC, TEXT_PREFIX
from .columns import TEXT
from .exceptions import ColumnError
from .types import EncryptedType

# PostgreSQL cuts longer names off, and MySQL refuses those of more than 64. SQLAlchemy does not unquote what it reads
# from SQLite, so the name must need no quotes there.
_LONGEST_NAME: Final = 63
_NOT_PLAIN: Final = re.compile(r"[^A-Za-z0-9_]")


def add_ciphertext_checks(target: MetaData | Table) -> None:
    """Add to every encrypted column a CHECK constraint that a stored value is NULL or begins as ciphertext does.

    Plaintext that another program writes, or that SQL text assigns, is then refused by the database. Call it where the
    models are, after the last of them; ``create_all`` and ``alembic revision --autogenerate`` then see to the
    constraints. Calling it again adds those of the columns that were declared since.

    :param target: the tables, or one of them.
    :raises ColumnError: later, when the SQL is made, on a database other than PostgreSQL, SQLite, MySQL and MariaDB.
    """
    for table in [target] if isinstance(target, Table) else target.tables.values():
        present = ciphertext_checks(table)
        for column in table.columns:
            name = check_name(table.name, column.name)
            if isinstance(column.type, EncryptedType) and name not in present:
                # Not a name for the naming convention of the MetaData to put into its template.
                begins = BeginsAsCiphertext(column.name, column.type.storage)
                CheckConstraint(begins, name=conv(name), table=table)


def ciphertext_checks(table: Table) -> dict[str, CheckConstraint]:
    """Return the constraints that :func:`add_ciphertext_checks` has added to a table, by name."""
    return {
        str(constraint.name): constraint
        for constraint in table.constraints
        if isinstance(constraint, CheckConstraint) and isinstance(constraint.sqltext, BeginsAsCiphertext)
    }


def check_name(table_name: str, column_name: str) -> str:
    """Return the name of one column's constraint: always the same, and one that every database takes and gives back."""
    name = f"ck_{table_name}_{column_name}_ciphertext"
    plain = _NOT_PLAIN.sub("_", name)
    if plain == name and len(name) <= _LONGEST_NAME:
        return name
    ending = f"_{sha256(name.encode()).hexdigest()[:12]}_ciphertext"
    return plain.removesuffix("_ciphertext")[: _LONGEST_NAME - len(ending)] + ending


class BeginsAsCiphertext(ColumnElement[bool]):
    """Whether a column is NULL or begins as a stored value does, whatever its algorithm.

    It holds the column's name and not the column: SQLAlchemy attaches a constraint to the table of every column that it
    finds in one, and Alembic makes constraints of the same expression for tables of its own.

    :param storage: ``binary`` or ``text``.
    """

    inherit_cache = False

    def __init__(self, name: str, storage: str) -> None:
        self.type = Boolean()
        self.name = name
        self.is_text = storage == TEXT


@compiles(BeginsAsCiphertext)
def _on_another_database(_element: BeginsAsCiphertext, compiler: SQLCompiler, **_: Any) -> NoReturn:
    raise ColumnError(
        f"It is not known how {compiler.dialect.name} tests whether a column begins as ciphertext: "
        "add_ciphertext_checks() is for PostgreSQL, SQLite, MySQL and MariaDB."
    )


@compiles(BeginsAsCiphertext, "postgresql")
def _on_postgresql(element: BeginsAsCiphertext, compiler: SQLCompiler, **_: Any) -> str:
    column = compiler.preparer.quote(element.name)
    if element.is_text:
        return f"{column} IS NULL OR substring({column} from 1 for {len(TEXT_PREFIX)}) = '{TEXT_PREFIX}'"
    return f"{column} IS NULL OR substring({column} from 1 for 1) = '\\x{MAGIC:02x}'::bytea"


@compiles(BeginsAsCiphertext, "sqlite")
def _on_sqlite(element: BeginsAsCiphertext, compiler: SQLCompiler, **_: Any) -> str:
    # A column there takes values of every type, and compares text with text and bytes with bytes only.
    # IS and not =, since the start of no bytes at all is NULL, and what is NULL passes.
    column = compiler.preparer.quote(element.name)
    if element.is_text:
        kind, length, start = "text", len(TEXT_PREFIX), f"'{TEXT_PREFIX}'"
    else:
        kind, length, start = "blob", 1, f"X'{MAGIC:02X}'"
    return f"{column} IS NULL OR (typeof({column}) = '{kind}' AND substr({column}, 1, {length}) IS {start})"


@compiles(BeginsAsCiphertext, "mysql", "mariadb")
def _on_mysql(element: BeginsAsCiphertext, compiler: SQLCompiler, **_: Any) -> str:
    column = compiler.preparer.quote(element.name)
    if element.is_text:
        return f"{column} IS NULL OR substr({column}, 1, {len(TEXT_PREFIX)}) = '{TEXT_PREFIX}'"
    return f"{column} IS NULL OR substr({column}, 1, 1) = X'{MAGIC:02X}'"
