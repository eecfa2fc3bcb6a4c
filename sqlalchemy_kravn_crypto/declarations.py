"""What is refused when an encrypted column is declared: what means nothing on ciphertext, or would store plaintext."""

from __future__ import annotations

from typing import Any

from sqlalchemy import CheckConstraint, Column, Index, Table, UnaryExpression, event
from sqlalchemy.schema import ColumnCollectionConstraint

from .columns import is_registered
from .exceptions import ColumnError


def refuse_meaningless(column: Column[Any], table: Table) -> None:
    """Refuse a column with properties that an encrypted one cannot have.

    :raises ColumnError: naming the column, the property and the reason.
    """
    for flag in ("primary_key", "unique", "index"):
        if getattr(column, flag):
            raise _no_key(column, table, flag)
    if column.foreign_keys:
        raise _no_key(column, table, "a foreign key")
    if column.server_default is not None or column.server_onupdate is not None:
        raise ColumnError(
            f"{table.name}.{column.name} is encrypted, so it cannot have a server_default or be computed: the database "
            "would hold plaintext. Use default=."
        )
    for kind, default in (("default", column.default), ("onupdate", column.onupdate)):
        if default is not None and (default.is_clause_element or default.is_sequence):
            raise ColumnError(
                f"{table.name}.{column.name} is encrypted, so its {kind} cannot be an SQL expression: the database "
                "would hold plaintext. Give a value or a Python function."
            )


def _no_key(column: Column[Any], table: Table, what: str) -> ColumnError:
    return ColumnError(
        f"{table.name}.{column.name} is encrypted, so it cannot be {what}: equal values have different ciphertexts."
    )


# A column of a table is known as encrypted before the constraints of the table are attached to it.


@event.listens_for(ColumnCollectionConstraint, "after_parent_attach")
def _refuse_constraint(constraint: ColumnCollectionConstraint, parent: Any) -> None:
    if isinstance(constraint, CheckConstraint) or not isinstance(parent, Table):
        return
    for column in constraint.columns:
        if is_registered(column):
            raise _no_key(column, parent, f"in a {type(constraint).__name__}")


@event.listens_for(Index, "after_parent_attach")
def _refuse_index(index: Index, parent: Any) -> None:
    # An index on an expression, such as the leading bytes that hold the key id, is right.
    for expression in index.expressions:
        while isinstance(expression, UnaryExpression):
            expression = expression.element  # noqa: PLW2901 - without its direction
        if isinstance(expression, Column) and is_registered(expression) and isinstance(parent, Table):
            raise _no_key(expression, parent, "indexed")
