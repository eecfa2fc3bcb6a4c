"""The figures as a table, as a page of documentation and as a plot."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from rich.table import Table

from .figures import Figure, Section

MARKDOWN: Final = "benchmarks.md"
PLOT: Final = "benchmarks.svg"
_PACKAGES: Final = ("SQLAlchemy", "cryptography", "orjson", "psycopg")


def table(sections: Sequence[Section]) -> Table:
    """Return all figures as one table for the terminal."""
    made = Table(title="Ours divided by the other's: below 1 is faster or smaller", title_justify="left")
    for heading in ("What", "Against"):
        made.add_column(heading)
    for heading in ("Ratio", "Target", "Ours : theirs"):
        made.add_column(heading, justify="right")
    for section in sections:
        made.add_section()
        made.add_row(f"[bold]{section.title}")
        for figure in section.figures:
            made.add_row(figure.label, figure.against, _coloured(figure), _number(figure.target), figure.detail)
    return made


def machine() -> str:
    """Return what of the machine and its software the figures depend on, and nothing that tells whose it is."""
    versions = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    implementation = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{implementation}, {versions}; {platform.system()} on {platform.machine()}, {os.cpu_count()} CPUs"


def write(sections: Sequence[Section], directory: Path) -> None:
    """Write the page and the plot."""
    from .plot import save  # noqa: PLC0415 - slow to import

    (directory / MARKDOWN).write_text(_markdown(sections), encoding="utf-8")
    save(sections, directory / PLOT)


def _markdown(sections: Sequence[Section]) -> str:
    lines = [
        "# Benchmarks",
        "",
        (
            "Written by `tox -e bench`. Each figure is a ratio: what this package takes, divided by what the other one "
            "takes, so below 1 is better. Both were measured in the same run, in turns, and the best of several rounds "
            "counts; documents are made anew for every round."
        ),
        "",
        f"{machine()}.",
        "",
        f"![The ratios as bars]({PLOT})",
    ]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.method, ""]
        lines += ["| What | Against | Ratio | Target | |", "|---|---|--:|--:|---|"]
        lines += map(_line, section.figures)
    return "\n".join(lines) + "\n"


def _line(figure: Figure) -> str:
    verdict = {None: "", True: "✓", False: "missed"}[figure.is_met]
    # Times say something about one machine only; a reason or an amount does about all.
    remark = figure.detail if figure.ratio is None or " : " not in figure.detail else ""
    cells = (figure.label, figure.against, _number(figure.ratio), _number(figure.target), f"{verdict} {remark}".strip())
    return f"| {' | '.join(cells)} |"


def _number(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _coloured(figure: Figure) -> str:
    colour = {None: "default", True: "green", False: "red"}[figure.is_met]
    return f"[{colour}]{_number(figure.ratio)}"
