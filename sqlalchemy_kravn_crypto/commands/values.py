"""The commands on stored values: rekey, census, forget-column."""

# ruff: noqa: ARG001, PLR0913 - each option is an argument, and what runs a command reads `debug`

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..census import Census
from ..changes import Operator
from ..exceptions import WrongStateError
from ..known_columns import KnownColumn, recorded
from ..lifecycle import rekeying
from ..lifecycle.evidence import forget_column as forget
from ..lifecycle.evidence import record_census
from ..lifecycle.retirement import Targets
from ..rekey import RekeyResult
from ..rows import StoredRows, connect, read_rows
from .options import Actor, AsJson, Debug, DryRun, Metadata, Reason, Schemas, Url, share, targets
from .output import Output
from .progress import progress_shown
from .running import DONE, REFUSED, with_operator


def rekey(
    *,
    url: Url,
    metadata: Metadata = None,
    schemas: Schemas = "",
    shard: Annotated[
        str | None,
        typer.Option(help="Do a fixed share, as 3/16; without one, workers take what is left.", metavar="I/N"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="How many values are in one transaction.", min=1)] = 1000,
    max_rows_per_second: Annotated[float | None, typer.Option(help="Go no faster than that.", min=1.0)] = None,
    reason: Reason = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Re-encrypt every stale value to the primary. Exit code 1 while anything is left."""
    where, part = targets(metadata, schemas), share(shard)

    def work(operator: Operator) -> RekeyResult:
        with progress_shown(operator.engine) as on_progress:
            return rekeying.rekey_values(
                operator,
                where,
                shard=part,
                batch_size=batch_size,
                max_rows_per_second=max_rows_per_second,
                reason=reason,
                dry_run=dry_run,
                on_progress=on_progress,
            )

    result = with_operator(url, work, actor=actor)
    out = Output(as_json=as_json)
    out.result({"dry_run": dry_run, "is_complete": result.is_complete} | result.as_dict())
    if dry_run:
        _show_left(out, result)
        out.say(f"{sum(result.left.values())} values could be moved to data key {result.key_id}.")
        return DONE
    out.say(f"{result.counts.rekeyed} values were moved to data key {result.key_id}.")
    for value in result.unreadable:
        key = json.dumps([str(part) for part in value.key])
        out.labelled("unreadable", f"{value.column} {key} {value.error}")
    if result.counts.unreadable > len(result.unreadable):
        out.labelled("unreadable", f"{result.counts.unreadable} in all")
    _show_left(out, result)
    return DONE if result.is_complete else REFUSED


def _show_left(out: Output, result: RekeyResult) -> None:
    out.table("left", ("column", "values"), [(label, str(count)) for label, count in result.left.items()])
    for unreachable in result.unreachable:
        out.labelled("unreachable", unreachable.reason)


def census(
    *,
    url: Url,
    metadata: Metadata = None,
    schemas: Schemas = "",
    reason: Reason = None,
    actor: Actor = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do not put the count on record.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Count the values of every column by their data keys. Exit code 1 if a column cannot be counted."""
    where = targets(metadata, schemas)
    found, rows = with_operator(
        url, lambda operator: _counted(operator, where, reason=reason, dry_run=dry_run), actor=actor
    )
    out = Output(as_json=as_json)
    out.result({"dry_run": dry_run} | found.as_dict())
    out.table("values", ("column", "data key", "state", "values"), _counts(found, rows))
    for unreachable in found.unreachable:
        out.labelled("unreachable", unreachable.reason)
    return REFUSED if found.unreachable else DONE


def _counted(operator: Operator, where: Targets, *, reason: str | None, dry_run: bool) -> tuple[Census, StoredRows]:
    found = record_census(operator, where, reason=reason, dry_run=dry_run)
    with connect(operator.engine) as connection:
        return found, read_rows(connection)


def _counts(found: Census, rows: StoredRows) -> list[tuple[str, str, str, str]]:
    lines = []
    for column in found.columns:
        label = column.column.label
        for key_id, count in column.keys.items():
            row = rows.key(key_id)
            lines.append((label, key_id, "unknown" if row is None else row.state.value, str(count)))
        lines += [(label, prefix, "legacy", str(count)) for prefix, count in column.legacy.items()]
        others = {"unrecognised": column.unrecognised, "null": column.nulls}
        lines += [(label, "", kind, str(count)) for kind, count in others.items() if count]
    return lines


def forget_column(
    column: Annotated[
        str, typer.Argument(help="The column; without a schema: TABLE.COLUMN.", metavar="SCHEMA.TABLE.COLUMN")
    ],
    *,
    url: Url,
    reason: Reason = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Take a column off the record of columns that hold encrypted values: they are no longer counted."""
    found = with_operator(
        url, lambda operator: _forgotten(operator, column, reason=reason, dry_run=dry_run), actor=actor
    )
    out = Output(as_json=as_json)
    out.result({"dry_run": dry_run, "schema": found.schema, "table": found.table, "column": found.column})
    out.say(f"{found.label} {'could be' if dry_run else 'is'} off the record.")
    return DONE


def _forgotten(operator: Operator, label: str, *, reason: str | None, dry_run: bool) -> KnownColumn:
    """Find the column by its label, since a name may have dots in it, and forget it."""
    with connect(operator.engine) as connection:
        found = [column for column in recorded(connection) if column.label == label]
    if len(found) != 1:
        raise WrongStateError(
            f"{label} is {'more than one column' if found else 'not'} on record. `kravn-crypto status` lists those "
            "that are."
        )
    forget(operator, *found[0].place, reason=reason, dry_run=dry_run)
    return found[0]
