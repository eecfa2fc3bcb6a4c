"""The command line: arguments to functions, errors to exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, MetaData, create_engine
from sqlalchemy.exc import SQLAlchemyError

from . import boot
from .exceptions import ConfigurationError, KravnCryptoError
from .rows import StoredRows
from .schema import State

T = TypeVar("T")

app = typer.Typer(
    name="kravn-crypto",
    help="Encrypted SQLAlchemy columns whose data key is wrapped by your own key manager.",
    no_args_is_help=True,
    add_completion=False,
    # Typer's own traceback shows the local variables of every frame, secrets included.
    pretty_exceptions_enable=False,
)

Url = Annotated[
    str,
    typer.Option(
        "--url", envvar="DATABASE_URL", help="The database, such as postgresql+psycopg://user@host/name.", metavar="URL"
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, print the traceback.")]


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app()


def _reporting(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an error into one line and exit code 1."""

    @wraps(command)
    def reported(*args: Any, debug: bool, **options: Any) -> None:
        try:
            command(*args, debug=debug, **options)
        except (KravnCryptoError, SQLAlchemyError, ModuleNotFoundError) as error:
            if debug:
                raise
            message = _one_line(error)
        else:
            return
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(1)

    return reported


def _one_line(error: Exception) -> str:
    if isinstance(error, KravnCryptoError):
        return str(error)
    if isinstance(error, SQLAlchemyError):
        return boot.database_error(error)
    return f"{error}. Install it, or name another driver in the URL, as in postgresql+psycopg://"


def _with_engine(url: str, function: Callable[[Engine], T]) -> T:
    """Call a function with an engine, whether the URL names a synchronous or an asynchronous driver."""
    engine = create_engine(url)
    if not engine.dialect.is_async:
        try:
            return function(engine)
        finally:
            engine.dispose()

    import asyncio  # noqa: PLC0415 - slow to import, and most commands do without

    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - as above
    from sqlalchemy.util import greenlet_spawn  # noqa: PLC0415 - as above

    async def in_greenlet() -> T:
        asynchronous = create_async_engine(url)
        try:
            return await greenlet_spawn(function, asynchronous.sync_engine)
        finally:
            await asynchronous.dispose()

    return asyncio.run(in_greenlet())


@app.command("migrate")
@_reporting
def _migrate(
    *,
    url: Url,
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements instead of running them.")] = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Create or upgrade the tables of the key store. Safe to run twice."""
    from .migrate import migrate, print_sql  # noqa: PLC0415 - Alembic is slow to import, and the others do without

    if sql:
        print_sql(url)
        return
    _with_engine(url, migrate)
    typer.echo("The tables of the key store are up to date.")


@app.command("provision")
@_reporting
def _provision(
    *,
    url: Url,
    metadata: Annotated[
        str | None,
        typer.Option(
            help="Where the models are, as package.module:Base; they are looked at for old data.", metavar="MODULE:NAME"
        ),
    ] = None,
    new_database: Annotated[
        bool,
        typer.Option("--new-database", help="The database holds no encrypted data, so there is nothing to look at."),
    ] = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Make the first data key of the configured provider, unless there is one."""
    if (metadata is None) is not new_database:
        raise ConfigurationError(
            "Say either where the models are (--metadata package.module:Base), so that old data is found, or that "
            "there is no old data (--new-database)."
        )
    if metadata is not None:
        _import_metadata(metadata)
    rows = _with_engine(url, lambda engine: boot.provision(engine, new_database=new_database))
    print_provisioned(rows)


@app.command("status")
@_reporting
def _status(
    *,
    url: Url,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Show the provider, the data keys and their states; and what would keep a process from starting."""
    found = _with_engine(url, boot.status)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), default=datetime.isoformat, indent=2))
    else:
        _print_status(found, Console())
    if found.problems:
        raise typer.Exit(1)


@app.command("demo")
@_reporting
def _demo(*, debug: Debug = False) -> None:  # noqa: ARG001 - read by the decorator
    """Show the main job on an embedded SQLite, with no KMS. Needs no settings and leaves nothing behind."""
    from .demo import run  # noqa: PLC0415 - its models are of no use to the others

    run(typer.echo)


def print_provisioned(rows: StoredRows) -> None:
    """Print the data keys, and what to pin where nothing authenticates them."""
    for row in rows.keys:
        typer.echo(f"{row.key_id} {row.state.value} {row.provider}")
    if rows.control is not None and rows.control.row_mac is None:
        primary = next(row.key_id for row in rows.keys if row.state is State.PRIMARY)
        typer.echo(f"Nothing authenticates these rows. Set KRAVN_KMS_PINNED_KEYS={primary} for every process.")


def _print_status(found: boot.Status, console: Console) -> None:
    typer.echo(f"provider:      {found.provider or 'unknown'}")
    typer.echo(f"deployment id: {found.deployment_id or 'none yet'}")
    typer.echo(f"epoch:         {'none yet' if found.epoch is None else found.epoch}")
    typer.echo(f"secret.key:    {found.secret_file or 'unknown'}")
    if console.is_terminal:
        table = Table()
        for heading in ("data key", "state", "provider", "master key", "since"):
            table.add_column(heading, no_wrap=heading != "master key", overflow="fold")
        for key in found.keys:
            table.add_row(key.key_id, key.state, key.provider, key.master_key, _time(key.since))
        console.print(table)
    else:
        for key in found.keys:
            typer.echo(f"data key:      {key.key_id} {key.state} {key.provider} {key.master_key} {_time(key.since)}")
    for name in found.unknown_settings:
        typer.echo(f"unknown:       {name}")
    for warning in found.warnings:
        typer.echo(f"warning:       {warning}")
    for problem in found.problems:
        typer.echo(f"problem:       {problem.error}: {problem.message}")


def _time(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def _import_metadata(path: str) -> MetaData:
    """Import the user's models, and see that there is a ``MetaData`` where they say."""
    module_name, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - sys.path holds strings
    failure = ""
    try:
        found = getattr(importlib.import_module(module_name), name or "Base")
    except (ImportError, AttributeError, ValueError) as error:
        failure = str(error)
    if failure:
        raise ConfigurationError(f"--metadata {path} cannot be imported: {failure}")
    metadata = getattr(found, "metadata", found)
    if not isinstance(metadata, MetaData):
        raise ConfigurationError(f"--metadata {path} is neither a declarative base nor a MetaData.")
    return metadata
