"""The commands before there is a key to speak of: migrate, provision, demo."""

# ruff: noqa: ARG001 - each option is an argument, and what runs a command reads `debug`

from __future__ import annotations

from typing import Annotated

import typer

from .. import boot
from ..exceptions import ConfigurationError
from ..rows import StoredRows
from ..schema import State
from .options import Debug, Metadata, Url, import_metadata
from .running import DONE, with_engine


def migrate(
    *,
    url: Url,
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements instead of running them.")] = False,
    debug: Debug = False,
) -> int:
    """Create or upgrade the tables of the key store. Safe to run twice."""
    from .. import migrate as migrations  # noqa: PLC0415 - Alembic is slow to import, and the others do without

    if sql:
        migrations.print_sql(url)
        return DONE
    with_engine(url, migrations.migrate)
    typer.echo("The tables of the key store are up to date.")
    return DONE


def provision(
    *,
    url: Url,
    metadata: Metadata = None,
    new_database: Annotated[
        bool,
        typer.Option("--new-database", help="The database holds no encrypted data, so there is nothing to look at."),
    ] = False,
    debug: Debug = False,
) -> int:
    """Make the first data key of the configured provider, unless there is one."""
    if (metadata is None) is not new_database:
        raise ConfigurationError(
            "Say either where the models are (--metadata package.module:Base), so that old data is found, or that "
            "there is no old data (--new-database)."
        )
    if metadata is not None:
        import_metadata(metadata)
    print_provisioned(with_engine(url, lambda engine: boot.provision(engine, new_database=new_database)))
    return DONE


def print_provisioned(rows: StoredRows) -> None:
    """Print the data keys, and what to pin where nothing authenticates them."""
    for row in rows.keys:
        typer.echo(f"{row.key_id} {row.state.value} {row.provider}")
    if rows.control is not None and rows.control.row_mac is None:
        primary = next(row.key_id for row in rows.keys if row.state is State.PRIMARY)
        typer.echo(f"Nothing authenticates these rows. Set KRAVN_KMS_PINNED_KEYS={primary} for every process.")


def demo(*, debug: Debug = False) -> int:
    """Show the main job on an embedded SQLite, with no KMS. Needs no settings and leaves nothing behind."""
    from ..demo import run  # noqa: PLC0415 - its models are of no use to the others

    run(typer.echo)
    return DONE
