"""The command line of the load."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..databases import POSTGRESQL
from ..report import machine
from .running import Load, Outcome, run


def main(  # noqa: PLR0913 - each is an option
    *,
    values: Annotated[int, typer.Option(min=1, help="How many values are written, and how many are read.")] = 1_000_000,
    processes: Annotated[int, typer.Option(min=1, help="How many processes there are.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="How many threads there are in each.")] = 8,
    rotations: Annotated[int, typer.Option(min=0, help="How many times the data key is replaced.")] = 3,
    lease: Annotated[
        float, typer.Option(min=1, help="KRAVN_LEASE, in seconds; a look comes twelve times in one.")
    ] = 180,
    seconds: Annotated[float, typer.Option(min=1, help="After how many seconds it has failed.")] = 1800,
    report: Annotated[Path | None, typer.Option(help="File to write the figures to, as Markdown.")] = None,
) -> None:
    """Write and read encrypted values from many processes while data keys come and go, and check every one of them."""
    load = Load(values=values, processes=processes, threads=threads, rotations=rotations, lease=lease, seconds=seconds)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    with POSTGRESQL.serve() as url, _vault() as kms:
        outcome = run(load, url.render_as_string(hide_password=False), kms, console.log)
    console.print(_table(load, outcome))
    console.print(machine())
    for error in outcome.errors[:3]:
        console.print(error, markup=False)
    if report is not None:
        report.write_text(markdown(load, outcome), encoding="utf-8")
    if not outcome.is_right:
        raise typer.Exit(1)


@contextmanager
def _vault() -> Iterator[dict[str, str]]:
    """Have a KMS, and the settings of a deployment that may wrap and unwrap with it."""
    from tests.openbao import OpenBao  # noqa: PLC0415 - only where there is to be one

    server = OpenBao()
    try:
        yield {
            "KRAVN_KMS_PROVIDER": "vault",
            "KRAVN_KMS_VAULT_ADDR": server.address,
            "KRAVN_KMS_VAULT_TOKEN": server.token,
            "KRAVN_KMS_VAULT_KEY": server.key,
        }
    finally:
        server.stop()


def _title(load: Load) -> str:
    return (
        f"{load.processes} processes with {load.threads} threads each, {load.values:,} values, "
        f"{load.rotations} rotations, a lease of {load.lease:g} seconds"
    )


def _table(load: Load, outcome: Outcome) -> Table:
    made = Table("What", title=_title(load), title_justify="left")
    made.add_column("Found", justify="right")
    made.add_column("Must be", justify="right")
    for finding in outcome.findings:
        colour = "green" if finding.is_right else "red"
        made.add_row(finding.what, f"[{colour}]{finding.found}", finding.expected)
    made.add_section()
    for what, found in outcome.facts.items():
        made.add_row(what, found)
    return made


def markdown(load: Load, outcome: Outcome) -> str:
    """Return the section of a page that says what was found."""
    command = " ".join(["tox -e load", *(["--", *sys.argv[1:]] if sys.argv[1:] else [])])
    lines = [
        "## Load",
        "",
        f"Made by `{command}`: {_title(load)}. {machine()}.",
        "",
        "| What | Found | Must be | |",
        "|---|--:|--:|---|",
        *(
            f"| {finding.what} | {finding.found} | {finding.expected} | {'✓' if finding.is_right else 'wrong'} |"
            for finding in outcome.findings
        ),
        *(f"| {what} | {found} | | |" for what, found in outcome.facts.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
