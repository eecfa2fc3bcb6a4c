"""What a whole statement may do with encrypted columns: what the comparator cannot see, since no operator is asked.

Sorting, grouping and SQL functions would work on ciphertext; UNION, CASE and coalesce of columns with different names
would decrypt under the wrong one; and what is assigned in SQL is stored as it is, be it plaintext or another column's
ciphertext.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import singledispatch
from itertools import chain
from typing import Any, Final

from sqlalchemy import (
    BinaryExpression,
    BindParameter,
    Case,
    Cast,
    ColumnClause,
    ColumnElement,
    CompoundSelect,
    Delete,
    Extract,
    FromClause,
    Insert,
    LargeBinary,
    ScalarSelect,
    Select,
    SelectBase,
    UnaryExpression,
    Update,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import ClauseElement, ClauseList, ExpressionClauseList, Grouping, Label
from sqlalchemy.sql.functions import FunctionElement

from .comparator import is_null, refuse_operator, shown_name
from .exceptions import UnsupportedOperationError
from .types import EncryptedType

_RIGHT_ON_CIPHERTEXT: Final = frozenset(
    {
        "bit_length",
        "char_length",
        "count",
        "length",
        "num_nonnulls",
        "num_nulls",
        "octet_length",
        "pg_column_size",
        "pg_typeof",
        "typeof",
    }
)
"""SQL functions that count and measure what is stored."""

_HANDING_ON: Final = frozenset({"any_value", "array_agg", "first_value", "lag", "last_value", "lead", "nth_value"})
"""SQL functions that return what is stored in some row, or an array of it."""

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
    parts = list(_parts(statement))
    # Nearly all statements have nothing encrypted in them, and are not to be looked at any closer.
    if any(map(_concerns_encryption, parts)):
        for part in parts:
            _check(part)


def _concerns_encryption(part: Any) -> bool:
    # Of a table all columns, since some are referred to by nothing but their names.
    columns = part.c if isinstance(part, FromClause) else (part,)
    return any(_encryption(column) is not None for column in columns)


def _parts(statement: ClauseElement) -> Iterator[Any]:
    """Yield everything that a statement consists of, once."""
    # By identity, since comparing builds SQL.
    found: dict[int, Any] = {}
    waiting: list[Any] = [statement]
    while waiting:
        part = waiting.pop()
        if id(part) not in found:
            found[id(part)] = part
            yield part
            waiting += part.get_children()
            waiting += _unlisted_parts(part)


def _unlisted_parts(part: Any) -> Iterator[Any]:
    """Yield the children that SQLAlchemy does not list as such."""
    if isinstance(part, (Insert, Update)):
        yield part.table
    if isinstance(part, ColumnClause) and part.table is not None:
        yield part.table  # a subquery, of which an UPDATE or DELETE may use no more than this column
    elif isinstance(part, Select):
        yield from _columns_of(part)  # those of mapped classes
    elif isinstance(part, Insert):
        clause = part._post_values_clause  # noqa: SLF001 - there is no public way to see it
        conditions = (getattr(clause, name, None) for name in ("inferred_target_whereclause", "update_whereclause"))
        assigned = (value for row in _rows_of(part) for value in row.values())
        changed = (value for _, value in _conflict_values(clause))
        for value in map(_expression, chain(conditions, assigned, changed)):
            if isinstance(value, ClauseElement):
                yield value


@singledispatch
def _check(element: Any) -> None:
    """Check one part of a statement by itself; most are harmless."""
    # Windows, ordered aggregates and DISTINCT ON, of which each database's have no base in common with the others.
    for clause in _clauses(getattr(element, "order_by", None)):
        _refuse_order(clause)
    for clause in _clauses(getattr(element, "partition_by", None)):
        _refuse_group(clause)
    for clause in getattr(element, "_distinct_on", ()):
        _refuse_operator(operators.distinct_op, clause)


@_check.register
def _(select: Select) -> None:  # type: ignore[type-arg] # generic in SQLAlchemy's stubs of one release only
    _refuse_as_condition(select._where_criteria, select._having_criteria)  # noqa: SLF001 - there is no public way
    for clause in select._order_by_clauses:  # noqa: SLF001 - as above
        _refuse_order(clause, select)
    _check_groups([_unwrapped(clause, select) for clause in select._group_by_clauses])  # noqa: SLF001 - as above
    for clause in select._distinct_on:  # noqa: SLF001 - as above
        _refuse_operator(operators.distinct_op, clause)


@_check.register
def _(compound: CompoundSelect) -> None:  # type: ignore[type-arg] # as above
    for clause in compound._order_by_clauses:  # noqa: SLF001 - as above
        _refuse_order(clause, compound)
    for position in zip(*map(_columns_of, compound.selects), strict=False):
        _check_choice(position, getattr(position[0], "type", None), "union")


@_check.register
def _(function: FunctionElement) -> None:  # type: ignore[type-arg] # as above
    name = str(getattr(function, "name", "")).lower()
    if not hasattr(function, "clauses"):
        return  # the next value of a sequence
    if name in _CHOOSING:
        _check_choice(function.clauses, function.type, name)
    elif name in _HANDING_ON:
        _check_choice(list(function.clauses)[:1], getattr(function.type, "item_type", function.type), name)
    elif name not in _RIGHT_ON_CIPHERTEXT:
        for argument in function.clauses:
            _refuse_function(name, argument)


@_check.register
def _(extract: Extract) -> None:
    _refuse_function("extract", extract.expr)


@_check.register
def _(comparison: BinaryExpression) -> None:  # type: ignore[type-arg] # as above
    sides = comparison.left, comparison.right
    if comparison.operator in _NULL_TESTS and any(map(is_null, sides)):
        return
    for side in sides:
        for operand in _operands(side):
            _refuse_operator(comparison.operator, operand)


@_check.register
def _(expression: ExpressionClauseList) -> None:  # type: ignore[type-arg] # as above
    if expression.operator is operators.comma_op:
        _check_choice(expression.clauses, getattr(expression.type, "item_type", None), "array")
        return
    for clause in expression.clauses:
        _refuse_operator(expression.operator, clause)


@_check.register
def _(unary: UnaryExpression) -> None:  # type: ignore[type-arg] # as above
    if unary.operator is not operators.exists:
        _refuse_operator(unary.operator or unary.modifier, unary.element)


@_check.register
def _(case: Case) -> None:  # type: ignore[type-arg] # as above
    compared = [condition for condition, _ in case.whens]
    _refuse_as_condition(compared if case.value is None else [case.value, *compared])
    results = [result for _, result in case.whens]
    _check_choice(results if case.else_ is None else [*results, case.else_], case.type, "case")


@_check.register
def _(cast: Cast) -> None:  # type: ignore[type-arg] # as above
    if _encryption(cast.clause) is not None and not isinstance(cast.type, (LargeBinary, EncryptedType)):
        raise UnsupportedOperationError(
            f"{shown_name(cast.clause)} is encrypted, so a CAST in SQL would convert ciphertext. Load the value and "
            f"convert it in Python. {_CIPHERTEXT_MEANT}"
        )


@_check.register
def _(insert: Insert) -> None:
    _check_assignments(insert)
    for key, value in _conflict_values(insert._post_values_clause):  # noqa: SLF001 - as above
        _check_assignment(insert.table, key, value)
    if insert.select is not None and insert._select_names:  # noqa: SLF001 - as above
        for key, value in zip(insert._select_names, _columns_of(insert.select), strict=False):  # noqa: SLF001 - as above
            _check_assignment(insert.table, key, value, takes_type=False)


@_check.register
def _(update: Update) -> None:
    _refuse_as_condition(update._where_criteria)  # noqa: SLF001 - as above
    _check_assignments(update)


@_check.register
def _(delete: Delete) -> None:
    _refuse_as_condition(delete._where_criteria)  # noqa: SLF001 - as above


# --- What is assigned ------------------------------------------------------------------------------------------------


def _check_assignments(statement: Insert | Update) -> None:
    for row in _rows_of(statement):
        for key, value in row.items():
            _check_assignment(statement.table, key, value)


def _rows_of(statement: Insert | Update) -> Iterator[Mapping[Any, Any]]:
    """Yield what a statement itself assigns, as opposed to the parameters that it is executed with."""
    yield statement._values or {}  # noqa: SLF001 - there is no public way to see it
    yield dict(getattr(statement, "_ordered_values", None) or ())  # in SQLAlchemy 2.0
    for row in chain.from_iterable(statement._multi_values):  # noqa: SLF001 - as above
        yield row if isinstance(row, Mapping) else dict(zip(statement.table.c, row, strict=False))


def _conflict_values(clause: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what ON CONFLICT or ON DUPLICATE KEY assigns."""
    for name in ("update_values_to_set", "update"):
        values = getattr(clause, name, None) or ()
        yield from values.items() if isinstance(values, Mapping) else values


def _check_assignment(table: Any, key: Any, value: Any, *, takes_type: bool = True) -> None:
    """Check one assignment.

    :param takes_type: whether a bound parameter without a type of its own takes the column's.
    """
    column = table.c.get(key) if isinstance(key, str) else key
    value = _expression(value)
    if column is None or not isinstance(value, ClauseElement) or _is_null_of_any_type(value):
        return
    target, source = _encryption(column), _encryption(value)
    if source is None:
        if target is None or (takes_type and isinstance(value, BindParameter) and value.type._isnull):  # noqa: SLF001 - as above
            return
        raise UnsupportedOperationError(
            f"{shown_name(column)} is encrypted, and what is assigned to it in SQL would be stored as it is, in "
            "plaintext. Assign a Python value."
        )
    if target is None:
        raise UnsupportedOperationError(
            f"{shown_name(value)} is encrypted, and {column.name!r}, which it is assigned to, is not. Load the value "
            f"and assign it. {_CIPHERTEXT_MEANT}"
        )
    is_selected = not takes_type
    if (target.bind_row or source.bind_row) and (is_selected or not _is_of_the_same_row(table, column, value)):
        raise UnsupportedOperationError(
            f"{shown_name(column)} is assigned the ciphertext of {shown_name(value)}, which is bound to its row and "
            "can only be decrypted there. Load the value and assign it."
        )
    if not _reads(target, source):
        raise UnsupportedOperationError(
            f"{shown_name(column)} is assigned the ciphertext of {shown_name(value)}, which can only be decrypted "
            "there. Load the value and assign it, or give both columns the same associated_data."
        )


# --- What is chosen from several -------------------------------------------------------------------------------------


def _check_choice(alternatives: Iterable[Any], result: Any, where: str) -> None:
    """Check that what is chosen from several can be decrypted as the type of the result, whichever it is."""
    found = [value for value in alternatives if not _is_null_of_any_type(value)]
    encrypted = [value for value in found if _encryption(value) is not None]
    if not encrypted or isinstance(result, LargeBinary):
        return
    names = ", ".join(sorted({shown_name(value) for value in encrypted}))
    first = result if isinstance(result, EncryptedType) else encrypted[0].type
    if not all(_reads(first, _encryption(value)) for value in found):
        raise UnsupportedOperationError(
            f"{names} would be mixed by {where!r} with what is encrypted under another name, or not at all, so what "
            "comes out could not be decrypted. Select them separately, or give the columns the same associated_data."
        )
    if first is not result:
        raise UnsupportedOperationError(
            f"{names} is encrypted, and would come out of {where!r} as ciphertext, since SQLAlchemy does not know the "
            "type of the result. Give a function type_=column.type, and a NULL that comes first cast(null(), "
            "column.type)."
        )


def _is_of_the_same_row(table: Any, column: Any, value: Any) -> bool:
    """Tell whether a value is a column itself, or what an upsert would have inserted into it."""
    source: Any = getattr(value, "table", None)
    if getattr(value, "key", None) != column.key:
        return False
    return source is table or (getattr(source, "element", None) is table and source.name in {"excluded", "new"})


def _reads(target: EncryptedType[Any], source: EncryptedType[Any] | None) -> bool:
    """Tell whether one type decrypts all that another may have encrypted."""
    if source is None:
        return False
    if source.bind_row != target.bind_row:
        return False
    written = {source.column_name, *source.earlier_names}
    return source.storage == target.storage and written <= {target.column_name, *target.earlier_names}


def _is_null_of_any_type(value: Any) -> bool:
    while isinstance(value, (Cast, Label, Grouping)) or type(value).__name__ == "TypeCoerce":
        value = value.clause if hasattr(value, "clause") else value.element
    return is_null(value)


# --- What is sorted and grouped --------------------------------------------------------------------------------------


def _refuse_order(clause: Any, statement: Any = None) -> None:
    _refuse_operator(operators.asc_op, _unwrapped(clause, statement))


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


def _expression(value: Any) -> Any:
    """Return the expression of an attribute of a mapped class, which SQLAlchemy 2.0 keeps as it is given."""
    return value.__clause_element__() if hasattr(value, "__clause_element__") else value


def _encryption(expression: Any) -> EncryptedType[Any] | None:
    type_ = getattr(expression, "type", None)
    return type_ if isinstance(type_, EncryptedType) else None


def _refuse_operator(operator: Any, expression: Any) -> None:
    if _encryption(expression) is not None:
        refuse_operator(operator, expression)


def _refuse_function(name: str, argument: Any) -> None:
    if _encryption(argument) is not None:
        raise UnsupportedOperationError(
            f"{shown_name(argument)} is encrypted, so the SQL function {name!r} would work on ciphertext. Load the "
            f"value and compute in Python. {_CIPHERTEXT_MEANT}"
        )


def _refuse_as_condition(*conditions: Iterable[Any]) -> None:
    for condition in chain.from_iterable(conditions):
        _refuse_operator(operators.is_true, condition)


def _operands(side: Any) -> Iterator[Any]:
    """Yield what is compared on one side of an operator: of a tuple, a list and a subquery each part."""
    while isinstance(side, (Grouping, ScalarSelect)):
        side = side.element
    if isinstance(side, (ClauseList, ExpressionClauseList)):
        for clause in side.clauses:
            yield from _operands(clause)
    elif isinstance(side, SelectBase):
        yield from _columns_of(side)
    else:
        yield side


def _unwrapped(clause: Any, statement: Any = None) -> Any:
    """Return what a clause sorts or groups by, without direction, label and parentheses."""
    while isinstance(clause, (UnaryExpression, Grouping, Label)) or "label_reference" in clause.__visit_name__:
        element = clause.element
        if isinstance(element, str):
            return _named(element, statement)
        clause = element
    return clause


def _named(name: str, statement: Any) -> Any:
    """Return what is meant by ``order_by("name")``: a column that is selected, or one that could be."""
    if statement is None:
        return None  # in a window, of which it is not known to which SELECT it belongs
    sources = [] if isinstance(statement, CompoundSelect) else statement.get_final_froms()
    for column in chain(statement.selected_columns, *(source.c for source in sources)):
        if name in {column.key, getattr(column, "_tq_label", None)}:
            return column
    return None


def _clauses(clauses: Any) -> Iterator[Any]:
    if isinstance(clauses, ClauseList):
        yield from clauses.clauses
    elif isinstance(clauses, ColumnElement):
        yield clauses


def _columns_of(select: Any) -> list[Any]:
    return list(select._all_selected_columns)  # noqa: SLF001 - selected_columns leaves out text()
