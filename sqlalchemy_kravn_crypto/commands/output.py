"""What the commands print: tables for people, lines for pipes, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import typer

NOTHING: Final = "-"
"""What stands for an empty cell, so that every line of a table has as many words."""

_LABEL: Final = 15  # characters


class Output:
    """Where a command prints to.

    :param as_json: print one JSON document on standard output and nothing else there.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def result(self, document: object) -> None:
        """Print what a program is to read."""
        if self.as_json:
            typer.echo(json.dumps(document, default=_plain, indent=2))

    def say(self, text: str) -> None:
        """Print what a person is to read."""
        if not self.as_json:
            typer.echo(printable(text))

    def labelled(self, label: str, text: str) -> None:
        """Print a line that begins with what it is about."""
        self.say(f"{label + ':':<{_LABEL}}{text}")

    def table(self, label: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table: where a terminal is, with lines around it, elsewhere one labelled line for each row."""
        if self.as_json:
            return
        cells = [[printable(cell) or NOTHING for cell in row] for row in rows]
        if not cells:
            return
        if not sys.stdout.isatty():
            for row in cells:
                typer.echo(f"{label + ':':<{_LABEL}}{' '.join(row)}")
            return
        from rich.console import Console  # noqa: PLC0415 - slow to import, and a pipe does without
        from rich.table import Table  # noqa: PLC0415 - as above
        from rich.text import Text  # noqa: PLC0415 - as above

        table = Table(title=label, title_justify="left")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))  # a string of ours could be taken for markup
        Console().print(table)


def note(text: str) -> None:
    """Print on standard error what is not the result."""
    typer.echo(printable(text), err=True)


def printable(text: str) -> str:
    """Return a text on one line, without what a terminal would take for a command: much of it is from the database."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def time_of(moment: datetime | None) -> str:
    """Return a time in UTC, to the second."""
    return "" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _plain(value: object) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    msg = f"{type(value).__name__} is not to be printed"
    raise TypeError(msg)
