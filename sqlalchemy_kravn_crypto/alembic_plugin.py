"""What Alembic's autogenerate knows of us: what our types are called in a migration, and that our tables stay.

Alembic loads this module through the entry point group ``alembic.plugins``, whenever it is imported itself; so it must
not import Alembic at its top.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import CheckConstraint, Table

from .ciphertext_checks import check_name, ciphertext_checks
from .columns import TEXT
from .schema import TABLE_NAMES, VERSION_TABLE
from .types import EncryptedType

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations.ops import AlterColumnOp, CreateCheckConstraintOp, ModifyTableOps, UpgradeOps
    from alembic.runtime.plugins import Plugin
    from alembic.util import PriorityDispatchResult

# Below Alembic's own, so that what it is configured to print includes this.
logger = logging.getLogger("alembic.autogenerate.sqlalchemy_kravn_crypto")

Rendered = str | Literal[False] | None
RenderItem = Callable[[str, Any, "AutogenContext"], Rendered]

_OURS: Final = frozenset((*TABLE_NAMES, VERSION_TABLE))


def setup(plugin: Plugin) -> None:
    """Register with Alembic; it calls this once."""
    from alembic.util import DispatchPriority  # noqa: PLC0415 - see the module's docstring

    plugin.add_autogenerate_comparator(render_our_types, "autogenerate")
    plugin.add_autogenerate_comparator(compare_checks, "table", priority=DispatchPriority.LAST)
    plugin.add_autogenerate_comparator(keep_our_tables, "schema", priority=DispatchPriority.LAST)


# --- Types -----------------------------------------------------------------------------------------------------------


def render_our_types(context: AutogenContext, _upgrade_ops: UpgradeOps) -> PriorityDispatchResult:
    """Have encrypted types written as the plain types of SQLAlchemy that they are in the database.

    A migration then depends on nothing of ours, and holds no name that values are bound to.
    """
    from alembic.util import PriorityDispatchResult  # noqa: PLC0415 - see the module's docstring

    theirs = context.opts.get("render_item")
    # The options are those of the last run where env.py configures one context several times.
    if not isinstance(theirs, _RenderingOurTypes):
        context.opts["render_item"] = _RenderingOurTypes(theirs)
    return PriorityDispatchResult.CONTINUE


class _RenderingOurTypes:
    """A ``render_item`` after the user's own, which goes first."""

    def __init__(self, theirs: RenderItem | None) -> None:
        self._theirs = theirs

    def __call__(self, kind: str, item: Any, context: AutogenContext) -> Rendered:
        rendered = self._theirs(kind, item, context) if self._theirs else False
        if rendered is False and kind == "type" and isinstance(item, EncryptedType):
            return _plain_type(item, context)
        return rendered


def _plain_type(item: EncryptedType[Any], context: AutogenContext) -> str:
    """Return the source of what ``EncryptedType.load_dialect_impl`` gives on each database."""
    sa = context.opts.get("sqlalchemy_module_prefix") or ""
    context.imports.add("from sqlalchemy.dialects import mysql")
    if item.storage == TEXT:
        return (
            f"{sa}Text().with_variant({sa}Text(collation='C'), 'postgresql')"
            ".with_variant(mysql.LONGTEXT(charset='ascii', collation='ascii_bin'), 'mysql', 'mariadb')"
        )
    return f"{sa}LargeBinary().with_variant(mysql.LONGBLOB(), 'mysql', 'mariadb')"


# --- CHECK constraints -----------------------------------------------------------------------------------------------


def compare_checks(
    context: AutogenContext,
    table_ops: ModifyTableOps,
    _schema: str | None,
    table_name: str,
    stored: Table | None,
    declared: Table | None,
) -> PriorityDispatchResult:
    """Propose the constraints of ``add_ciphertext_checks`` that a table lacks, and to drop those that block a change.

    Alembic itself compares no CHECK constraints, unless the user has added the plugin that does.
    """
    from alembic.operations import ops  # noqa: PLC0415 - see the module's docstring
    from alembic.util import PriorityDispatchResult  # noqa: PLC0415 - the same

    if stored is None or declared is None:
        return PriorityDispatchResult.CONTINUE
    _let_checks_be_written()
    _warn_of_plaintext([operation for operation in table_ops.ops if isinstance(operation, ops.AlterColumnOp)])
    # SQLite cannot change the constraints of a table; in batch mode Alembic makes the table anew.
    if context.dialect.name == "sqlite" and not context.opts.get("render_as_batch"):
        return PriorityDispatchResult.CONTINUE
    proposed = {getattr(operation, "constraint_name", None) for operation in table_ops.ops}
    present = {found.name: found for found in stored.constraints if isinstance(found, CheckConstraint)}
    for name, check in ciphertext_checks(declared).items():
        if name not in present and name not in proposed and _passes(context, check, is_stored=False):
            table_ops.ops.append(ops.AddConstraintOp.from_constraint(check))
    encrypted = {column.name for column in declared.columns if isinstance(column.type, EncryptedType)}
    for gone in [column.name for column in stored.columns if column.name not in encrypted]:
        name = check_name(table_name, gone)
        if name in present and name not in proposed and _passes(context, present[name], is_stored=True):
            table_ops.ops.append(ops.DropConstraintOp.from_constraint(present[name]))
    return PriorityDispatchResult.CONTINUE


def _let_checks_be_written() -> None:
    """Add to Alembic 1.18 what later releases have: a CHECK constraint of its own in a migration's text."""
    from alembic import __version__ as release  # noqa: PLC0415 - see the module's docstring
    from alembic.autogenerate import renderers  # noqa: PLC0415 - the same
    from alembic.operations import ops  # noqa: PLC0415 - the same

    if release.startswith("1.18."):
        renderers.dispatch_for(ops.CreateCheckConstraintOp, replace=True)(_written_check)


def _written_check(context: AutogenContext, operation: CreateCheckConstraintOp) -> str:
    in_batch = context._has_batch  # noqa: SLF001 - there is no public way to see it
    prefix = "batch_op." if in_batch else context.opts.get("alembic_module_prefix") or ""
    condition = context.migration_context.impl.render_ddl_sql_expr(operation.to_constraint().sqltext)
    arguments = [f"{prefix}f({str(operation.constraint_name)!r})", repr(condition)]
    if not in_batch:
        arguments.insert(1, repr(str(operation.table_name)))
        arguments += [f"schema={str(operation.schema)!r}"] if operation.schema else []
    return f"{prefix}create_check_constraint({', '.join(arguments)})"


def _passes(context: AutogenContext, check: CheckConstraint, *, is_stored: bool) -> bool:
    """Ask the user's ``include_object``."""
    passes: bool = context.run_object_filters(check, check.name, "check_constraint", is_stored, None)
    return passes


def _warn_of_plaintext(changes: list[AlterColumnOp]) -> None:
    for change in changes:
        if isinstance(change.modify_type, EncryptedType):
            warnings.warn(
                f"Autogenerate changes the type of {change.table_name}.{change.column_name} to an encrypted one, which "
                "encrypts nothing. If the column holds plaintext, do not run that: add a new column, encrypt into it "
                "from Python, and drop the old one, as docs/migrations.md of sqlalchemy-kravn-crypto shows.",
                stacklevel=2,
            )


# --- Tables ----------------------------------------------------------------------------------------------------------


def keep_our_tables(
    context: AutogenContext, upgrade_ops: UpgradeOps, _schemas: set[str | None]
) -> PriorityDispatchResult:
    """Take back what autogenerate proposes for our tables where the user's ``MetaData`` does not have them.

    Where it has them, through ``kms_tables(metadata)``, they are the user's to migrate like any other.
    """
    from alembic.util import PriorityDispatchResult  # noqa: PLC0415 - see the module's docstring

    theirs = {table.name for table in context.sorted_tables}
    kept = _OURS - theirs
    concerned = {_table_of(operation) for operation in upgrade_ops.ops} & kept
    if concerned:
        upgrade_ops.ops[:] = [operation for operation in upgrade_ops.ops if _table_of(operation) not in kept]
        # Alembic has already said that it detected removed tables.
        logger.info("Kept %s, which `kravn-crypto migrate` sees to", ", ".join(sorted(map(str, concerned))))
    return PriorityDispatchResult.CONTINUE


def _table_of(operation: Any) -> str | None:
    """Return the table of the default schema that an operation is about, if it is about one."""
    return getattr(operation, "table_name", None) if getattr(operation, "schema", None) is None else None


class _IterableModule(ModuleType):
    """A module that is its own only item. Alembic before 1.20.1 iterates over what an entry point loads."""

    def __iter__(self) -> Iterator[ModuleType]:
        yield self


sys.modules[__name__].__class__ = _IterableModule
