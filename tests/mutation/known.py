"""The survivors that are known to be harmless: what ``docs/reliability.md`` lists."""

from __future__ import annotations

from pathlib import Path
from re import MULTILINE
from re import compile as compile_pattern
from typing import Final

from .mutants import Change

_PAGE: Final = Path(__file__).parents[2] / "docs" / "reliability.md"

_ENTRY: Final = compile_pattern(r"^ *\* `([\w.]+)`, `([\w.]+)`: (`+)(.*?)\3 → (`+)(.*?)\5$", MULTILINE)
"""``* `module`, `function`: `before` → `after` ``, on one line."""


def known_survivors() -> set[Change]:
    """Return the changes that the page lists."""
    page = _PAGE.read_text(encoding="utf-8")
    return {Change(module, function, before, after) for module, function, _, before, _, after in _ENTRY.findall(page)}
