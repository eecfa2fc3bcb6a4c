"""The command line of the benchmarks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from . import counting, following, memory, peers, rekey, report, rows, serving, startup, values
from .databases import POSTGRESQL, SQLITE
from .figures import QUICK, THOROUGH, Effort, Figure, Section

_DOCUMENTATION: Final = Path(__file__).parents[1] / "docs"


class Name(StrEnum):
    """What can be measured alone."""

    ROWS = "rows"
    VALUES = "values"
    PEERS = "peers"
    START = "start"
    MEMORY = "memory"
    REKEY = "rekey"
    CENSUS = "census"
    SERVING = "serving"
    FOLLOWING = "following"


_NEEDS_POSTGRESQL: Final = {Name.REKEY, Name.CENSUS, Name.SERVING}


def main(
    *,
    only: Annotated[list[Name] | None, typer.Option(help="Measure this section; may be given several times.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows and rounds.")] = False,
    postgres: Annotated[bool, typer.Option(help="Start a PostgreSQL server and measure on it too.")] = True,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory to write the page and the plot to; a whole, thorough run writes to docs."),
    ] = None,
) -> None:
    """Measure how fast the package is, as ratios, and print them as a table."""
    # That a secret file was made is news to a program, not here.
    logging.getLogger("sqlalchemy_kravn_crypto").setLevel(logging.ERROR)
    effort = QUICK if quick else THOROUGH
    console = Console()
    if not console.is_terminal:
        console.width = 160
    names = [name for name in only or Name if postgres or name not in _NEEDS_POSTGRESQL]
    sections = [_measured(name, effort, postgres=postgres, console=console) for name in names]
    console.print(report.table(sections))
    console.print(report.machine())
    if output is None and not quick and not only and postgres:
        output = _DOCUMENTATION
    if output is not None:
        report.write(sections, output)


def _measured(name: Name, effort: Effort, *, postgres: bool, console: Console) -> Section:
    section, figures = _begun(name, effort, postgres=postgres)
    with ExitStack() as stack:
        status = stack.enter_context(console.status(section.title))
        for figure in figures:
            section.figures.append(figure)
            status.update(f"{section.title}: {figure.label}")
    return section


def _begun(name: Name, effort: Effort, *, postgres: bool) -> tuple[Section, Iterable[Figure]]:  # noqa: PLR0911 - one for each
    """Return a section and what will measure its figures one by one."""
    databases = (SQLITE, POSTGRESQL) if postgres else (SQLITE,)
    match name:
        case Name.ROWS:
            return rows.SECTION, rows.measure(effort, databases)
        case Name.VALUES:
            return values.SECTION, values.measure(effort)
        case Name.PEERS:
            return peers.SECTION, peers.measure(effort)
        case Name.START:
            return startup.SECTION, startup.measure(effort)
        case Name.MEMORY:
            return memory.SECTION, memory.measure(effort)
        case Name.REKEY:
            return rekey.SECTION, rekey.measure(effort)
        case Name.CENSUS:
            return counting.SECTION, counting.measure(effort)
        case Name.SERVING:
            return serving.SECTION, serving.measure(effort)
        case Name.FOLLOWING:
            return following.SECTION, following.measure(effort, databases)


if __name__ == "__main__":
    typer.run(main)
