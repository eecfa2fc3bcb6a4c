"""Tells which extra to install where a provider's packages are missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ..exceptions import MissingExtraError


def import_extra(extra: str, *names: str) -> list[ModuleType]:
    """Import modules that an extra of this distribution brings.

    :param extra: the name of the extra, such as ``vault``.
    :param names: the dotted names of the modules.
    :raises MissingExtraError: if one of them is not installed.
    """
    modules = [module for module in map(_imported, names) if module]
    if len(modules) < len(names):
        raise MissingExtraError(
            f"The {extra} provider needs packages that are not installed. Run: "
            f"pip install 'sqlalchemy-kravn-crypto[{extra}]'"
        )
    return modules


def _imported(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return None
