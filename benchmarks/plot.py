"""The plot: one bar for each ratio, with 1.0 and the targets marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .figures import Figure, Section

_MET: Final = "#4c9f70"
_MISSED: Final = "#c8553d"
_NO_TARGET: Final = "#8a9ba8"
_COLOURS: Final = {True: _MET, False: _MISSED, None: _NO_TARGET}
_TARGET: Final = "#1b1b1e"
_BEHIND_TEXT: Final = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
_BAR_HEIGHT: Final = 0.24  # inches, with what is between two bars
_FRAME_HEIGHT: Final = 0.75  # inches of title and scale around the bars of a section


def save(sections: Sequence[Section], path: Path) -> None:
    """Draw all ratios into one file. The same figures give the same file."""
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.size": 9, "font.family": "DejaVu Sans"}
    ):
        heights = [_FRAME_HEIGHT + _BAR_HEIGHT * max(1, len(section.figures)) for section in sections]
        canvas = Canvas(figsize=(10, sum(heights) + 0.5), layout="constrained")
        axes = canvas.subplots(len(sections), squeeze=False, height_ratios=heights)[:, 0]
        for section, area in zip(sections, axes, strict=True):
            _draw(section, area)
        canvas.suptitle("Ours divided by the other's: shorter is better", fontsize=11, weight="bold")
        canvas.legend(
            handles=[
                Patch(color=_MET, label="target reached"),
                Patch(color=_MISSED, label="target missed"),
                Patch(color=_NO_TARGET, label="no target"),
                Line2D([], [], color=_TARGET, marker="|", markersize=10, markeredgewidth=2, lw=0, label="target"),
            ],
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
        canvas.savefig(path, metadata={"Date": None})


def _draw(section: Section, area: Axes) -> None:
    places = range(len(section.figures))
    widths = [figure.ratio or 0.0 for figure in section.figures]
    area.barh(places, widths, height=0.7, color=[_COLOURS[figure.is_met] for figure in section.figures])
    area.axvline(1.0, color="#555555", linewidth=1, linestyle="--", zorder=0)
    for place, figure in zip(places, section.figures, strict=True):
        if figure.target is not None and figure.ratio is not None:
            area.plot([figure.target] * 2, [place - 0.42, place + 0.42], color=_TARGET, linewidth=2)
        text = f"{figure.ratio:.2f}" if figure.ratio is not None else "not measured"
        right = max(figure.ratio or 0.0, (figure.target or 0.0) if figure.ratio is not None else 0.0)
        area.text(right + 0.02, place, text, va="center", fontsize=8, bbox=_BEHIND_TEXT)
    area.set_yticks(places, [_label(figure, section) for figure in section.figures])
    area.set_ylim(len(section.figures) - 0.4, -0.6)
    area.set_xlim(0, max(1.15, *(max(figure.ratio or 0, figure.target or 0) + 0.15 for figure in section.figures)))
    area.set_title(section.title, loc="left", fontsize=10, weight="bold")
    area.spines[["top", "right"]].set_visible(False)


def _label(figure: Figure, section: Section) -> str:
    if len({other.against for other in section.figures}) == 1:
        return figure.label
    return f"{figure.label}, against {figure.against}"
