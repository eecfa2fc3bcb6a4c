"""What may be asked of an encrypted column in SQL: whether it is NULL, and nothing else about its value."""

from __future__ import annotations

from operator import eq, ge, gt, le, lt, ne
from typing import Any, Final, NoReturn

from sqlalchemy import BinaryExpression, BindParameter, Boolean, ColumnElement, Table
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import Grouping, Label, Null
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeDecorator

from .exceptions import UnsupportedOperationError

_NULL_TESTS: Final = frozenset(
    {eq, ne, operators.is_, operators.is_not, operators.is_distinct_from, operators.is_not_distinct_from}
)
_SYMBOLS: Final = {eq: "==", ne: "!=", lt: "<", le: "<=", gt: ">", ge: ">="}
_PARTS: Final = frozenset({operators.getitem, operators.json_getitem_op, operators.json_path_getitem_op})
_ORDER: Final = frozenset(
    {operators.asc_op, operators.desc_op, operators.nulls_first_op, operators.nulls_last_op, operators.collate}
)


def is_null(value: Any) -> bool:
    """Tell whether a value is ``None`` or SQL's NULL."""
    return value is None or isinstance(value, Null)


def shown_name(expression: Any) -> str:
    """Return what an encrypted expression is called in the program, else in the database, for messages."""
    while isinstance(expression, (Label, Grouping)):
        expression = expression.element
    annotations: Any = getattr(expression, "_annotations", {})
    entity, key = annotations.get("parententity"), annotations.get("proxy_key")
    if entity is not None and key is not None:
        return f"{entity.class_.__name__}.{key}"
    for column in getattr(expression, "base_columns", ()):
        if isinstance(getattr(column, "table", None), Table):
            return f"{column.table.name}.{column.name}"
    return getattr(expression.type, "column_name", None) or "an encrypted value"


def refuse_operator(operator: Any, expression: Any) -> NoReturn:
    """Raise the error for an operator on an encrypted expression, with what to do instead."""
    name = shown_name(expression)
    if operator in _PARTS:
        instead = "Load the value and take the part in Python."
    elif operator in _ORDER:
        instead = "Load the rows and sort them in Python, or keep what you sort by in a column of its own."
    elif operator is operators.distinct_op:
        instead = "Load the values and compare them in Python."
    else:
        instead = (
            "Only is_(None) and is_not(None) can be asked. Select by other columns, and compare or compute in Python."
        )
    symbol = getattr(operator, "opstring", None) or _SYMBOLS.get(operator) or operator.__name__.removesuffix("_op")
    raise UnsupportedOperationError(
        f"{name} is encrypted, and equal values have different ciphertexts, so {symbol!r} cannot be done in SQL. "
        f"{instead}"
    )


class _RefusedComparison(BinaryExpression[bool]):
    """An encrypted column compared with another column, which may be compiled by nobody.

    Not refused where it is written: SQLAlchemy looks for columns in lists and dicts, which compares them.
    """

    inherit_cache = False


@compiles(_RefusedComparison)
def _refuse_to_compile(element: _RefusedComparison, _compiler: Any, **_: Any) -> NoReturn:
    refuse_operator(element.operator, element.left)


class RefusingComparator(TypeDecorator.Comparator[Any]):
    """Operators of an encrypted column: tests for NULL pass, all others raise where they are written.

    :raises UnsupportedOperationError: for all others.
    """

    __slots__ = ()

    def operate(self, op: OperatorType, *other: Any, **kwargs: Any) -> ColumnElement[Any]:
        """Pass a test for NULL, refuse everything else."""
        if len(other) == 1 and op in _NULL_TESTS:
            compared = other[0]
            if is_null(compared):
                return super().operate(op, compared, **kwargs)
            if op is eq or op is ne:
                if hasattr(compared, "__clause_element__"):
                    compared = compared.__clause_element__()
                if isinstance(compared, ColumnElement):
                    comparison: Any = op
                    return _RefusedComparison(self.expr, compared, comparison, type_=Boolean())
        # Of what stands before an attribute of a mapped class SQLAlchemy makes a parameter of its type, and asks that.
        is_reversed = isinstance(self.expr, BindParameter) and other and isinstance(other[0], ColumnElement)
        refuse_operator(op, other[0] if is_reversed else self.expr)

    def reverse_operate(self, op: OperatorType, other: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG002 - fixed
        """Refuse: what is computed from a value is computed in Python."""
        refuse_operator(op, self.expr)
