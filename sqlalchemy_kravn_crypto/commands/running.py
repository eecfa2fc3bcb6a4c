"""How a command is run: with an engine or an operator, and an error becomes one line and exit code 1."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, TypeVar

import typer
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import SQLAlchemyError

from ..changes import Operator
from ..configuration import operator, settings_from_environment, standby_from_environment
from ..exceptions import KravnCryptoError
from ..status import database_error
from .output import note

if TYPE_CHECKING:
    from ..providers.base import KeyProvider
    from ..settings import Settings

T = TypeVar("T")

DONE: Final = 0
REFUSED: Final = 1
"""The exit code of a command that refused or failed, or left something to be done."""

_STANDBY_PROVIDER: Final = "KRAVN_STANDBY_KMS_PROVIDER"


def reporting(command: Callable[..., int]) -> Callable[..., None]:
    """Turn what a command returns into the exit code, and an error into one line and exit code 1.

    With ``debug``, the error is left as it is.
    """

    @wraps(command)
    def reported(*args: Any, debug: bool, **options: Any) -> None:
        try:
            code = command(*args, debug=debug, **options)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                raise
            code, message = REFUSED, _one_line(error)
        else:
            message = ""
        if message:
            note(f"Error: {message}")
        if code != DONE:
            raise typer.Exit(code)

    return reported


def _one_line(error: Exception) -> str:
    if isinstance(error, KravnCryptoError):
        return str(error)
    if isinstance(error, SQLAlchemyError):
        return database_error(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error}. Install it, or name another driver in the URL, as in postgresql+psycopg://"
    if isinstance(error, OSError):
        # Some asynchronous drivers raise the network's own.
        return f"{type(error).__name__}: {error.strerror or 'the database or a file is not to be had'}."
    return f"{type(error).__name__}. Run it again with --debug for what happened and where."


def with_engine(url: str, function: Callable[[Engine], T]) -> T:
    """Call a function with an engine, whether the URL names a synchronous or an asynchronous driver."""
    # Neither an error nor its traceback is to show what was bound.
    engine = create_engine(url, hide_parameters=True)
    if not engine.dialect.is_async:
        try:
            return function(engine)
        finally:
            engine.dispose()

    import asyncio  # noqa: PLC0415 - slow to import, and most commands do without

    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - as above
    from sqlalchemy.util import greenlet_spawn  # noqa: PLC0415 - as above

    async def in_greenlet() -> T:
        asynchronous = create_async_engine(url, hide_parameters=True)
        try:
            return await greenlet_spawn(function, asynchronous.sync_engine)
        finally:
            await asynchronous.dispose()

    return asyncio.run(in_greenlet())


def with_operator(
    url: str,
    function: Callable[[Operator], T],
    *,
    actor: str | None,
    settings: Settings | None = None,
    standby: KeyProvider | None = None,
) -> T:
    """Call a function with an operator of the key store in the database of a URL."""
    settings = settings or settings_from_environment()
    return with_engine(url, lambda engine: function(operator(engine, settings, standby=standby, actor=actor)))


def standby_if_named() -> KeyProvider | None:
    """Return the standby KMS, if the environment names one."""
    named = next((value for name, value in os.environ.items() if name.upper() == _STANDBY_PROVIDER), "").strip()
    return None if named in {"", "none"} else standby_from_environment()
