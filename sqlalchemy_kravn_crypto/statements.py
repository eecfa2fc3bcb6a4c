"""What a whole statement may do with encrypted columns: what the comparator cannot see, since no operator is asked.

Sorting, grouping and SQL functions would work on ciphertext; UNION, CASE and coalesce of columns with different names
would decrypt under the wrong one; and what is assigned in SQL is stored as it is, be it plaintext or another column's
ciphertext.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import singledispatch
from typing import Any, Final

from sqlalchemy import (
    BinaryExpression,
    BindParameter,
    Case,
    Cast,
    ColumnElement,
    CompoundSelect,
    Insert,
    LargeBinary,
    Over,
    Select,
    UnaryExpression,
    Update,
    WithinGroup,
)
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import ClauseElement, ClauseList, Grouping, Label, Tuple
from sqlalchemy.sql.functions import FunctionElement

from .comparator import is_null, refuse_operator, shown_name
from .exceptions import UnsupportedOperationError
from .types import EncryptedType

_RIGHT_ON_CIPHERTEXT: Final = frozenset(
    {
        "any_value",
        "array_agg",
        "bit_length",
        "char_length",
        "count",
        "first_value",
        "lag",
        "last_value",
        "lead",
        "length",
        "nth_value",
        "num_nonnulls",
        "num_nulls",
        "octet_length",
        "pg_column_size",
        "pg_typeof",
        "typeof",
    }
)
"""SQL functions that count or hand on what is stored without looking into it."""

_CHOOSING: Final = frozenset({"coalesce", "ifnull", "nvl"})
"""SQL functions that return one of their arguments."""

_NULL_TESTS: Final = frozenset(
    {operators.is_, operators.is_not, operators.is_distinct_from, operators.is_not_distinct_from}
)
_CIPHERTEXT_MEANT: Final = "If the ciphertext is what you mean, use type_coerce(column, LargeBinary()) there."


def check_statement(statement: ClauseElement) -> None:
    """Refuse a statement that would be silently wrong on ciphertext, or store what cannot be decrypted.

    :raises UnsupportedOperationError: naming the column and what to do instead.
    """
    for element in visitors.iterate(statement):
        _check(element)


@singledispatch
def _check(element: Any) -> None:
    """Check one part of a statement by itself; most are harmless."""


@_check.register
def _(select: Select) -> None:  # type: ignore[type-arg] # generic in SQLAlchemy's stubs of one release only
    selected = {column.key: column for column in select.selected_columns}
    for clause in select._order_by_clauses:  # noqa: SLF001 - there is no public way to see it
        _refuse_order(clause, selected)
    _check_groups([_unwrapped(clause, selected) for clause in select._group_by_clauses])  # noqa: SLF001 - as above
    for clause in select._distinct_on:  # noqa: SLF001 - as above
        _refuse_operator(operators.distinct_op, clause)


@_check.register
def _(compound: CompoundSelect) -> None:  # type: ignore[type-arg] # as above
    for clause in compound._order_by_clauses:  # noqa: SLF001 - as above
        _refuse_order(clause, {column.key: column for column in compound.selected_columns})
    for position in zip(*map(_columns_of, compound.selects), strict=False):
        _check_same_name(position, "union")


@_check.register
def _(function: FunctionElement) -> None:  # type: ignore[type-arg] # as above
    name = str(getattr(function, "name", "")).lower()
    arguments = list(function.clauses)
    if name in _CHOOSING:
        _check_same_name(arguments, name)
    elif name not in _RIGHT_ON_CIPHERTEXT:
        for argument in arguments:
            if _encryption(argument) is not None:
                raise UnsupportedOperationError(
                    f"{shown_name(argument)} is encrypted, so the SQL function {name!r} would work on ciphertext. Load "
                    f"the value and compute in Python. {_CIPHERTEXT_MEANT}"
                )


@_check.register
def _(comparison: BinaryExpression) -> None:  # type: ignore[type-arg] # as above
    sides = comparison.left, comparison.right
    if comparison.operator in _NULL_TESTS and any(map(is_null, sides)):
        return
    for side in sides:
        for part in side.clauses if isinstance(side, (Tuple, ClauseList)) else (side,):
            _refuse_operator(comparison.operator, part)


@_check.register
def _(unary: UnaryExpression) -> None:  # type: ignore[type-arg] # as above
    if unary.operator is not operators.exists:
        _refuse_operator(unary.operator or unary.modifier, unary.element)


@_check.register
def _(case: Case) -> None:  # type: ignore[type-arg] # as above
    results = [result for _, result in case.whens]
    _check_same_name(results if case.else_ is None else [*results, case.else_], "case")


@_check.register
def _(cast: Cast) -> None:  # type: ignore[type-arg] # as above
    encryption = _encryption(cast.clause)
    if encryption is not None and not isinstance(cast.type, (LargeBinary, EncryptedType)):
        raise UnsupportedOperationError(
            f"{shown_name(cast.clause)} is encrypted, so a CAST in SQL would convert ciphertext. Load the value and "
            f"convert it in Python. {_CIPHERTEXT_MEANT}"
        )


@_check.register
def _(window: Over) -> None:  # type: ignore[type-arg] # as above
    for clause in _clauses(window.order_by):
        _refuse_order(clause, {})
    for clause in _clauses(window.partition_by):
        _refuse_group(clause)


@_check.register
def _(aggregate: WithinGroup) -> None:  # type: ignore[type-arg] # as above
    for clause in _clauses(aggregate.order_by):
        _refuse_order(clause, {})


@_check.register
def _(insert: Insert) -> None:
    _check_assignments(insert)
    clause = insert._post_values_clause  # noqa: SLF001 - ON CONFLICT and ON DUPLICATE KEY, whose children are not visited
    for name in ("update_values_to_set", "update"):
        changes = getattr(clause, name, None) or {}
        for key, value in changes.items() if hasattr(changes, "items") else changes:
            _check_assignment(insert.table, key, value)
    if insert.select is not None and insert._select_names:  # noqa: SLF001 - as above
        for key, value in zip(insert._select_names, _columns_of(insert.select), strict=False):  # noqa: SLF001 - as above
            _check_assignment(insert.table, key, value)


@_check.register
def _(update: Update) -> None:
    _check_assignments(update)


# --- What is assigned ------------------------------------------------------------------------------------------------


def _check_assignments(statement: Insert | Update) -> None:
    rows: list[Any] = [statement._values or {}]  # noqa: SLF001 - there is no public way to see them
    for several in statement._multi_values:  # noqa: SLF001 - as above
        rows += several
    for row in rows:
        if hasattr(row, "items"):
            for key, value in row.items():
                _check_assignment(statement.table, key, value)


def _check_assignment(table: Any, key: Any, value: Any) -> None:
    column = table.c.get(key) if isinstance(key, str) else key
    target = _encryption(column)
    if target is None or not isinstance(value, ClauseElement) or is_null(value):
        return
    source = _encryption(value)
    if source is None:
        if isinstance(value, BindParameter) and value.type._isnull:  # noqa: SLF001 - it takes the column's type
            return
        raise UnsupportedOperationError(
            f"{shown_name(column)} is encrypted, and what is assigned to it in SQL would be stored as it is, in "
            "plaintext. Assign a Python value."
        )
    if (source.column_name, source.storage) != (target.column_name, target.storage):
        raise UnsupportedOperationError(
            f"{shown_name(column)} is assigned the ciphertext of {shown_name(value)}, which can only be decrypted "
            "there. Load the value and assign it, or give both columns the same associated_data."
        )


# --- What is chosen from several -------------------------------------------------------------------------------------


def _check_same_name(alternatives: Iterable[Any], where: str) -> None:
    found = [value for value in alternatives if not _is_null_of_any_type(value)]
    encrypted = [value for value in found if _encryption(value) is not None]
    if not encrypted:
        return
    kinds = {(_encryption(value).column_name, _encryption(value).storage) for value in encrypted}  # type: ignore[union-attr] # filtered above
    if len(kinds) > 1 or len(encrypted) < len(found):
        names = ", ".join(sorted({shown_name(value) for value in encrypted}))
        raise UnsupportedOperationError(
            f"{names} would be mixed by {where!r} with what is encrypted under another name, or not at all, so what "
            "comes out could not be decrypted. Select them separately, or give the columns the same associated_data."
        )


def _is_null_of_any_type(value: Any) -> bool:
    while isinstance(value, (Cast, Label, Grouping)) or type(value).__name__ == "TypeCoerce":
        value = value.clause if hasattr(value, "clause") else value.element
    return is_null(value)


# --- What is sorted and grouped --------------------------------------------------------------------------------------


def _refuse_order(clause: Any, selected: Mapping[Any, Any]) -> None:
    expression = _unwrapped(clause, selected)
    if _encryption(expression) is not None:
        refuse_operator(operators.asc_op, expression)


def _check_groups(groups: list[Any]) -> None:
    """Let whole rows be grouped: where the primary key is among the groups, ciphertext adds nothing to it."""
    known = {hash(group) for group in groups}
    for group in groups:
        if _encryption(group) is None:
            continue
        key = list(getattr(getattr(group, "table", None), "primary_key", ()))
        if not key and any(_encryption(other) is None for other in groups):
            continue
        if not key or any(hash(column) not in known for column in key):
            _refuse_group(group)


def _refuse_group(group: Any) -> None:
    if _encryption(group) is not None:
        raise UnsupportedOperationError(
            f"{shown_name(group)} is encrypted, and equal values have different ciphertexts, so rows cannot be grouped "
            "by it. Load the rows and group them in Python, or group by the table's primary key too."
        )


# --- Parts -----------------------------------------------------------------------------------------------------------


def _encryption(expression: Any) -> EncryptedType[Any] | None:
    type_ = getattr(expression, "type", None)
    return type_ if isinstance(type_, EncryptedType) else None


def _refuse_operator(operator: Any, expression: Any) -> None:
    if _encryption(expression) is not None:
        refuse_operator(operator, expression)


def _unwrapped(clause: Any, selected: Mapping[Any, Any]) -> Any:
    """Return what a clause sorts or groups by, without direction, label and parentheses."""
    while isinstance(clause, (UnaryExpression, Grouping, Label)) or "label_reference" in clause.__visit_name__:
        element = clause.element
        if isinstance(element, str):
            return selected.get(element, clause._text_clause)  # noqa: SLF001 - order_by("name")
        clause = element
    return clause


def _clauses(clauses: Any) -> Iterator[Any]:
    if isinstance(clauses, ClauseList):
        yield from clauses.clauses
    elif isinstance(clauses, ColumnElement):
        yield clauses


def _columns_of(select: Any) -> list[Any]:
    return list(getattr(select, "_all_selected_columns", None) or select.selected_columns)
