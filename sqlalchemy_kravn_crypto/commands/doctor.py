"""The command that examines a configuration before it is rolled out: doctor."""

# ruff: noqa: ARG001 - each option is an argument, and what runs a command reads `debug`

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Final

import typer
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from ..database_checks import DATABASE
from ..doctor import examine, worst
from ..providers.base import Finding, Level
from ..providers.findings import bad
from ..status import database_error
from .options import AsJson, Debug
from .output import Output, printable
from .running import DONE, REFUSED, with_engine

_COLOURS: Final = {Level.GOOD: "green", Level.WARNING: "yellow", Level.BAD: "bold red"}
_WIDTH: Final = 9  # characters: the longest word for a level, and two spaces


def doctor(
    *,
    url: Annotated[
        str | None,
        typer.Option(
            "--url", envvar="DATABASE_URL", help="The database, if it is to be examined as well.", metavar="URL"
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Check settings, KMS and, with a URL, the database, before they are rolled out. Exit code 1 if anything is bad."""
    findings = _examined(url)
    level = worst(findings)
    out = Output(as_json=as_json)
    out.result({"level": level, "findings": findings})
    if not as_json:
        _show(out, findings)
    return REFUSED if level is Level.BAD else DONE


def _examined(url: str | None) -> list[Finding]:
    if url is None:
        return examine()
    reason = _unusable(url)
    if reason is not None:
        return [*examine(), bad(DATABASE, reason, "Check the URL.")]
    return with_engine(url, examine)


def _unusable(url: str) -> str | None:
    """Return why no engine can be made of a URL, if none can."""
    try:
        create_engine(url).dispose()
    except SQLAlchemyError as error:
        return database_error(error)
    except ModuleNotFoundError as error:
        return f"{error}. Install it, or name another driver in the URL, as in postgresql+psycopg://"
    return None


def _show(out: Output, findings: Sequence[Finding]) -> None:
    """Print a line for each finding: where a terminal is, in colour."""
    if not sys.stdout.isatty():
        for finding in findings:
            out.say(f"{finding.level:<{_WIDTH}}{finding.subject}: {_text(finding)}")
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import, and a pipe does without
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    lines = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings:
        level = Text(finding.level, style=_COLOURS[finding.level])
        lines.add_row(level, Text(printable(finding.subject)), Text(printable(_text(finding))))
    Console().print(lines)


def _text(finding: Finding) -> str:
    return f"{finding.message} {finding.advice}".strip()
