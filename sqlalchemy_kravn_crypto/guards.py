"""What is installed on an engine: it checks statements, keeps values out of errors, and has results sent in binary."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import StatementError
from sqlalchemy.sql.compiler import SQLCompiler

from .binary_results import ask_if_alike, look_at_types
from .compiled_statements import statement_of
from .drivers import knows_binary
from .exceptions import UnsupportedOperationError
from .statements import check_statement

# SQLAlchemy keeps compiled statements, so each is checked once and not with every execution.
_checked: Final[WeakSet[SQLCompiler]] = WeakSet()

# What listens to the events of each engine.
_installed: Final[WeakKeyDictionary[Engine, set[Any]]] = WeakKeyDictionary()

# asyncpg repeats a parameter that it cannot send, whatever hide_parameters says.
_REPEATED: Final = re.compile(r"(invalid input for query argument [^:]*): .*", re.DOTALL)


def install(
    engine: Engine, *, check_statements: bool = True, redact_errors: bool = True, binary_results: bool = True
) -> None:
    """Install the guards on an engine. What is installed already stays, and is not installed again."""
    if check_statements:
        _listen(engine, "before_cursor_execute", _check_before_execution)
    if redact_errors:
        _listen(engine, "handle_error", _redact_error)
    if binary_results and engine.dialect.name == "postgresql" and knows_binary(engine.dialect):
        _listen(engine, "before_cursor_execute", ask_if_alike)
        _listen(engine, "after_cursor_execute", look_at_types)


def _listen(engine: Engine, name: str, listener: Any) -> None:
    # Not event.contains(): it goes by the address of the engine, which may be that of an earlier one.
    listening = _installed.setdefault(engine, set())
    if listener not in listening:
        event.listen(engine, name, listener)
        listening.add(listener)


def _check_before_execution(
    _connection: Any, cursor: Any, _statement: str, _parameters: Any, context: Any, _executemany: Any
) -> None:
    compiled = context.compiled if context is not None else None
    if not isinstance(compiled, SQLCompiler) or compiled in _checked:
        return
    try:
        check_statement(statement_of(compiled))
    except UnsupportedOperationError:
        cursor.close()  # SQLAlchemy closes it only once it has been used
        raise
    _checked.add(compiled)


def _redact_error(context: ExceptionContext) -> None:
    error = context.sqlalchemy_exception
    if isinstance(error, StatementError) and error.params is not None:
        error.params = _redacted(error.params)
        if _REPEATED.search(str(error.orig)):
            _redact_driver_error(error)


def _redact_driver_error(error: StatementError) -> None:
    """Take a parameter out of the messages of SQLAlchemy's, the adapter's and the driver's error."""
    driver = None if error.orig is None else error.orig.__cause__
    for found in (error, error.orig, driver):
        if found is not None:
            found.args = tuple(_REPEATED.sub(r"\1", one) if isinstance(one, str) else one for one in found.args)
    if driver is not None:
        # The error of asyncpg's encoder, which may hold the parameter as well.
        driver.__cause__ = driver.__context__ = None


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
