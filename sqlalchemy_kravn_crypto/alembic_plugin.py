"""What Alembic's autogenerate knows of our tables: that they are not the user's to drop.

Alembic loads this module through the entry point group ``alembic.plugins``, whenever it is imported itself; so it must
not import Alembic at its top.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from .schema import TABLE_NAMES, VERSION_TABLE

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations.ops import UpgradeOps
    from alembic.runtime.plugins import Plugin
    from alembic.util import PriorityDispatchResult

_OURS: Final = frozenset((*TABLE_NAMES, VERSION_TABLE))


def setup(plugin: Plugin) -> None:
    """Register with Alembic; it calls this once."""
    from alembic.util import DispatchPriority  # noqa: PLC0415 - see the module's docstring

    plugin.add_autogenerate_comparator(keep_our_tables, "schema", priority=DispatchPriority.LAST)


def keep_our_tables(
    context: AutogenContext, upgrade_ops: UpgradeOps, _schemas: set[str | None]
) -> PriorityDispatchResult:
    """Take back what autogenerate proposes for our tables where the user's ``MetaData`` does not have them.

    Where it has them, through ``kms_tables(metadata)``, they are the user's to migrate like any other.
    """
    from alembic.util import PriorityDispatchResult  # noqa: PLC0415 - see the module's docstring

    theirs = {table.name for table in context.sorted_tables}
    kept = _OURS - theirs
    upgrade_ops.ops[:] = [operation for operation in upgrade_ops.ops if not _concerns(operation, kept)]
    return PriorityDispatchResult.CONTINUE


def _concerns(operation: Any, names: frozenset[str]) -> bool:
    return getattr(operation, "schema", None) is None and getattr(operation, "table_name", None) in names


class _IterableModule(ModuleType):
    """A module that is its own only item. Alembic before 1.20.1 iterates over what an entry point loads."""

    def __iter__(self) -> Iterator[ModuleType]:
        yield self


sys.modules[__name__].__class__ = _IterableModule
