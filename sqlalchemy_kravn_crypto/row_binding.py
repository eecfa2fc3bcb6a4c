"""Values that wait for their row on their way to the database, since the processor of a column sees no other column.

The processor of a bound column encodes a value and leaves it unencrypted; when the statement is about to be executed,
the row is read off its parameters. A driver that such a value reaches some other way refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import BindParameter, Column, Engine, Insert, Update, event
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import BinaryExpression, BooleanClauseList, Grouping

from .compiled_statements import statement_of
from .exceptions import UnsupportedOperationError
from .row_identity import Identifying, identity_of, is_exact, text_of
from .secrecy import KeepsSecret

# How SQLAlchemy names the parameters of a VALUES with several rows.
_OF_A_ROW: Final = re.compile(r"(?P<column>.*)(?P<row>_m[0-9]+)", re.DOTALL)
_FIRST_ROW: Final = "_m0"


@dataclass(frozen=True, slots=True)
class BoundColumn:
    """A column whose values are bound to their row.

    :ivar identity: the columns that identify a row, of the same table.
    """

    column: Column[Any]
    identity: tuple[Identifying, ...]

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the columns that identify a row."""
        return frozenset(column.key for column, _ in self.identity)

    @property
    def label(self) -> str:
        """Table and column, for messages."""
        return f"{self.column.table}.{self.column.name}"


class AwaitingRow(KeepsSecret):
    """A value of a bound column that is not encrypted yet. It cannot be printed, pickled or copied.

    :param encrypt: takes the identity of the row, and returns what is stored.
    :ivar stored: what is stored, once the row is known.
    """

    __slots__ = ("bound", "encrypt", "stored")

    def __init__(self, bound: BoundColumn, encrypt: Callable[[bytes], Any]) -> None:
        self.bound = bound
        self.encrypt = encrypt
        self.stored: Any = None

    def __repr__(self) -> str:
        return f"<a value of {self.bound.label} that awaits its row>"


def listen() -> None:
    """Have values bound to their rows on every engine of this process. To call it again does nothing."""
    if not event.contains(Engine, "before_cursor_execute", _before_cursor_execute):
        event.listen(Engine, "before_cursor_execute", _before_cursor_execute, retval=True)


def bound_columns(table: Any) -> list[BoundColumn]:
    """Return the columns of a table whose values are bound to their row."""
    found = (getattr(column.type, "bound_column", None) for column in getattr(table, "columns", ()))
    return [bound for bound in found if bound is not None]


# --- Before a statement is executed ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Plan:
    """Where the parameters of a compiled statement say which row a value is for.

    :ivar refusal: why the statement is not executed.
    :ivar names: the names of parameters, by the keys of the columns that are set or compared with them. Of no other
        parameter is it known that it is of the column, whatever its name.
    :ivar defaults: the keys of columns that take their default.
    :ivar several_rows: whether one set of parameters is of several rows; their names go on with that of the row.
    """

    refusal: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    defaults: frozenset[str] = frozenset()
    several_rows: bool = False


# SQLAlchemy keeps compiled statements, so each is looked at once and not with every execution.
_plans: Final[WeakKeyDictionary[SQLCompiler, _Plan | None]] = WeakKeyDictionary()

# An INSERT of many rows is executed in several batches of what is bound with the first.
_bound: Final[WeakSet[Any]] = WeakSet()


def _before_cursor_execute(
    _connection: Any, cursor: Any, sql: str, parameters: Any, context: Any, _many: Any
) -> tuple[str, Any]:
    compiled = getattr(context, "compiled", None)
    if not isinstance(compiled, SQLCompiler):
        return sql, parameters
    plan = None
    try:
        if compiled not in _plans:
            _plans[compiled] = _plan(compiled)
        plan = _plans[compiled]
        if plan is None:
            return sql, parameters
        if context not in _bound:
            _bind_all(plan, context)
            _bound.add(context)
    except BaseException:
        cursor.close()  # SQLAlchemy closes it only once it has been used
        raise
    return sql, _settled(parameters)


def _settled(parameters: Any) -> Any:
    """Return parameters with what is stored in the place of what awaited its row."""
    if isinstance(parameters, AwaitingRow):
        return parameters.stored
    if isinstance(parameters, Mapping):
        return {name: _settled(value) for name, value in parameters.items()}
    if type(parameters) in {list, tuple}:
        return type(parameters)(map(_settled, parameters))
    return parameters


def _bind_all(plan: _Plan, context: Any) -> None:
    """Encrypt what awaits its row in all parameters of a statement.

    :raises UnsupportedOperationError: if the statement does not say which row that is.
    """
    if plan.refusal is not None:
        raise UnsupportedOperationError(plan.refusal)
    for named, processed in zip(context.compiled_parameters, context.parameters, strict=True):
        _bind(plan, context.compiled, named, processed)


def _bind(plan: _Plan, compiled: Any, named: Mapping[str, Any], processed: Any) -> None:
    """Encrypt what awaits its row in one set of parameters.

    :param named: the parameters as they were given.
    :param processed: the same as the processors have made them, in the order of the driver or by name.
    """
    for name, value in _awaiting(compiled, processed):
        row = ""
        if plan.several_rows:
            found = _OF_A_ROW.fullmatch(name or "")
            if found is None or found["column"] != value.bound.column.key:
                raise UnsupportedOperationError(
                    f"It is not seen for which row a value of {value.bound.label} is. Execute the INSERT with a list "
                    "of parameters instead of values([…])."
                )
            row = found["row"]
        texts = []
        for column, kind in value.bound.identity:
            parameter = plan.names.get(column.key)
            given = None if parameter is None else named.get(parameter + row)
            if row == _FIRST_ROW and given is None and parameter in plan.defaults:
                given = named.get(parameter)  # named as that of a single row is
            text = text_of(kind, given)
            if text is None:
                raise UnsupportedOperationError(_unknown_row(value.bound, column))
            texts.append(text)
        value.stored = value.encrypt(identity_of(texts))


def _unknown_row(bound: BoundColumn, column: Column[Any]) -> str:
    return (
        f"{bound.label} is bound to its row by {column.name!r}, and the statement does not say its value as a Python "
        "value of the column's type. An INSERT must have it, so it cannot be generated by the database: use "
        "default=uuid.uuid4, for example. An UPDATE must name it, in its WHERE (column == value) or "
        "among its values; on MySQL and MariaDB a string in WHERE only counts if the column is declared with a binary "
        "collation."
    )


def _awaiting(compiled: Any, processed: Any) -> Iterator[tuple[str | None, AwaitingRow]]:
    """Yield what awaits its row, with the names of the parameters."""
    if isinstance(processed, Mapping):
        # A name that a driver could not take has been replaced by another.
        given = {escaped: name for name, escaped in (compiled.escaped_bind_names or {}).items()}
        values: Iterable[tuple[Any, Any]] = ((given.get(name, name), value) for name, value in processed.items())
    else:
        names = compiled.positiontup or ()
        # With an IN there are more values than names; then there is one row, and no name is needed.
        values = zip(names if len(names) == len(processed) else [None] * len(processed), processed, strict=True)
    for name, value in values:
        if isinstance(value, AwaitingRow):
            yield name, value


# --- What a statement says of its rows -------------------------------------------------------------------------------


def _plan(compiled: Any) -> _Plan | None:
    """Return where a statement says which rows its values are for, or ``None`` if that is nobody's concern."""
    statement = statement_of(compiled)
    bound = bound_columns(getattr(statement, "table", None))
    binds = any(getattr(parameter.type, "bind_row", ()) for parameter in compiled.binds.values())
    if isinstance(statement, Insert):
        return _insert_plan(compiled, statement, bound) if binds else None
    if isinstance(statement, Update) and bound:
        return _update_plan(compiled, statement, bound)
    if not binds:
        return None
    return _Plan(
        "A value of a column that is bound to its row is a parameter of a statement that is neither an INSERT nor an "
        "UPDATE of its table. Write it in a statement of its own."
    )


def _insert_plan(compiled: Any, statement: Any, bound: list[BoundColumn]) -> _Plan:
    several = bool(statement._multi_values)  # noqa: SLF001 - there is no public way to see it
    names = {key: key for key in statement.table.columns.keys()} if several else _assigned(compiled, statement)[1]  # noqa: SIM118 - of a collection that iterates over columns
    defaults = frozenset(column.key for column in compiled.insert_prefetch)
    plan = _Plan(names=names, defaults=defaults, several_rows=several)
    clause = statement._post_values_clause  # noqa: SLF001 - as above
    if clause is None:
        return plan
    changed = getattr(clause, "update_values_to_set", None) or getattr(clause, "update", None) or ()
    keys = {getattr(key, "key", key) for key, *_ in (changed.items() if isinstance(changed, Mapping) else changed)}
    target = {getattr(one, "key", one) for one in getattr(clause, "inferred_target_elements", None) or ()}
    for one in bound:
        # Unless the conflict is about what identifies the row, the row that is updated is another than was inserted.
        if keys & one.keys or (one.column.key in keys and not one.keys <= target):
            plan.refusal = (
                f"{one.label} is bound to its row by {_names(one)}, so an INSERT may update it only where the conflict "
                f"is about {_names(one)}: index_elements must have it, and set_ must not. Otherwise update the row in "
                "a statement of its own."
            )
    return plan


def _update_plan(compiled: Any, statement: Any, bound: list[BoundColumn]) -> _Plan:
    keys, names = _assigned(compiled, statement)
    # Of what is assigned, in SQL too, the former value is not that of the row for which values are written.
    compared = {key: name for key, name in _compared(compiled, statement).items() if key not in keys}
    plan = _Plan(names=compared | names)
    for one in bound:
        if one.keys & keys and one.column.key not in keys:
            plan.refusal = (
                f"{one.label} is bound to its row by {_names(one)}, which the UPDATE changes, so that the value could "
                f"no longer be read. Load the value, and assign it to {one.column.key!r} in the same UPDATE."
            )
    return plan


def _names(bound: BoundColumn) -> str:
    return " and ".join(repr(column.name) for column, _ in bound.identity)


def _assigned(compiled: Any, statement: Any) -> tuple[set[str], dict[str, str]]:
    """Return the keys of the columns that a statement assigns, and the names of the parameters that it assigns them."""
    columns = statement.table.columns
    given = [key for key in compiled.column_keys or () if key in columns]
    given += [column.key for column in (*compiled.insert_prefetch, *compiled.update_prefetch)]
    keys, names = set(given), dict(zip(given, given, strict=True))
    for values in (statement._values or {}, dict(getattr(statement, "_ordered_values", None) or ())):  # noqa: SLF001 - as above
        for column, value in values.items():
            key = getattr(column, "key", column)
            keys.add(key)
            if isinstance(value, BindParameter):
                names[key] = _name_of(compiled, value) or key
            else:
                names.pop(key, None)
    return keys, names


def _compared(compiled: Any, statement: Any) -> dict[str, str]:
    """Return the names of the parameters that columns of the table are equal to in every row that is updated."""
    names: dict[str, str] = {}
    # By hash, since comparing builds SQL, and the ORM's copies of a column have the hash of the column.
    columns = {hash(column): column.key for column in statement.table.columns if is_exact(column, compiled.dialect)}
    waiting = list(statement._where_criteria)  # noqa: SLF001 - as above
    while waiting:
        part = waiting.pop()
        if isinstance(part, Grouping):
            waiting.append(part.element)
        elif isinstance(part, BooleanClauseList) and part.operator is operators.and_:
            waiting += part.clauses
        elif isinstance(part, BinaryExpression) and part.operator is operators.eq:
            for column, value in ((part.left, part.right), (part.right, part.left)):
                name = _name_of(compiled, value) if isinstance(value, BindParameter) else None
                if name is not None and hash(column) in columns:
                    names[columns[hash(column)]] = name
    return names


def _name_of(compiled: Any, parameter: BindParameter[Any]) -> str | None:
    """Return the name that a parameter has in a compiled statement, where it may be a copy, or ``None``."""
    name: str | None = compiled.bind_names.get(compiled.binds.get(parameter.key))
    return name
