"""What is installed on an engine: it checks statements, and keeps values out of SQLAlchemy's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from weakref import WeakSet

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import StatementError
from sqlalchemy.sql.compiler import SQLCompiler

from .statements import check_statement

# SQLAlchemy keeps compiled statements, so each is checked once and not with every execution.
_checked: Final[WeakSet[SQLCompiler]] = WeakSet()


def install(engine: Engine, *, check_statements: bool = True, redact_errors: bool = True) -> None:
    """Install the guards on an engine. What is installed already stays, and is not installed again."""
    if check_statements:
        _listen(engine, "before_cursor_execute", _check_before_execution)
    if redact_errors:
        _listen(engine, "handle_error", _redact_error)


def _listen(engine: Engine, name: str, listener: Any) -> None:
    if not event.contains(engine, name, listener):
        event.listen(engine, name, listener)


def _check_before_execution(
    _connection: Any, _cursor: Any, _statement: str, _parameters: Any, context: Any, _executemany: Any
) -> None:
    compiled = context.compiled if context is not None else None
    if not isinstance(compiled, SQLCompiler) or compiled in _checked:
        return
    # Of a statement of the ORM, what it made of the one that was written.
    made: Any = getattr(compiled.compile_state, "statement", None)
    written: Any = compiled.statement
    check_statement(written if made is None else made)
    _checked.add(compiled)


def _redact_error(context: ExceptionContext) -> None:
    error = context.sqlalchemy_exception
    if isinstance(error, StatementError) and error.params is not None:
        error.params = _redacted(error.params)


def _redacted(parameters: Any) -> Any:
    """Return parameters with the names of their types in the place of the values."""
    if isinstance(parameters, Mapping):
        return {name: f"<{type(value).__name__}>" for name, value in parameters.items()}
    if isinstance(parameters, (list, tuple)):
        return [
            _redacted(item) if isinstance(item, (Mapping, list, tuple)) else f"<{type(item).__name__}>"
            for item in parameters
        ]
    return f"<{type(parameters).__name__}>"
