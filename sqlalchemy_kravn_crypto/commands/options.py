"""The options that several commands have."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Annotated

import typer
from sqlalchemy import MetaData

from ..exceptions import ConfigurationError
from ..lifecycle.retirement import Targets

Url = Annotated[
    str,
    typer.Option(
        "--url", envvar="DATABASE_URL", help="The database, such as postgresql+psycopg://user@host/name.", metavar="URL"
    ),
]
KeyId = Annotated[str, typer.Argument(help="The key id: 16 hexadecimal characters.", metavar="KEY_ID")]
Metadata = Annotated[
    str | None,
    typer.Option(help="Where the models are, as package.module:Base; Base may be a MetaData.", metavar="MODULE:NAME"),
]
Schemas = Annotated[
    str,
    typer.Option(help="The schemas that schema_translate_map moves tables to, as a,b.", metavar="NAMES"),
]
Reason = Annotated[str | None, typer.Option(help="Why, for the audit trail.", metavar="TEXT")]
Actor = Annotated[
    str | None,
    typer.Option(help="Who does it, for the audit trail; by default the user of this process.", metavar="NAME"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only see whether it could be done; change nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, print the traceback.")]


def targets(metadata: str | None, schemas: str) -> Targets:
    """Return where values are looked for besides the columns on record."""
    names = tuple(filter(None, map(str.strip, schemas.split(","))))
    return Targets(None if metadata is None else import_metadata(metadata), names)


def import_metadata(path: str) -> MetaData:
    """Import the user's models, and see that there is a ``MetaData`` where they say.

    :raises ConfigurationError: if there is none.
    """
    module_name, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - sys.path holds strings
    failure = ""
    try:
        found = getattr(importlib.import_module(module_name), name or "Base")
    except Exception as error:  # noqa: BLE001 - a module of the user's may raise anything
        failure = f"{type(error).__name__}: {error}"
    if failure:
        raise ConfigurationError(f"--metadata {path} cannot be imported. {failure}")
    metadata = getattr(found, "metadata", found)
    if not isinstance(metadata, MetaData):
        raise ConfigurationError(f"--metadata {path} is neither a declarative base nor a MetaData.")
    return metadata


def share(text: str | None) -> tuple[int, int] | None:
    """Return what ``--shard`` says: ``3/16`` is the third of sixteen.

    :raises ConfigurationError: if it is none.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, flags=re.ASCII)
    number, of = (0, 0) if match is None else (int(match[1]), int(match[2]))
    if not 1 <= number <= of:
        raise ConfigurationError(f"--shard {text} is not a share such as 3/16, the third of sixteen.")
    return number, of
