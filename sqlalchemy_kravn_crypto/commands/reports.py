"""The commands that only tell: status, evidence."""

# ruff: noqa: ARG001 - each option is an argument, and what runs a command reads `debug`

from __future__ import annotations

from typing import Any

from ..lifecycle.evidence import evidence as trail_of
from ..status import KeyStatus, ReplicaStatus, Status
from ..status import status as look
from .options import AsJson, Debug, KeyId, Url
from .output import NOTHING, Output, time_of
from .running import DONE, REFUSED, with_engine, with_operator


def evidence(
    key_id: KeyId,
    *,
    url: Url,
    debug: Debug = False,
) -> int:
    """Print the audit trail of a data key as JSON: who, when, from where, why, and the counts before and after."""
    found: dict[str, Any] = with_operator(url, lambda operator: trail_of(operator, key_id), actor=None)
    Output(as_json=True).result(found)
    return DONE


def status(
    *,
    url: Url,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Show keys, processes, a rekey and the audit trail; and what would keep a process from starting."""
    found = with_engine(url, look)
    out = Output(as_json=as_json)
    out.result(found)
    _show_deployment(out, found)
    _show_keys(out, found)
    _show_values(out, found)
    for name in found.unknown_settings:
        out.labelled("unknown", name)
    for warning in found.warnings:
        out.labelled("warning", warning)
    for problem in found.problems:
        out.labelled("problem", f"{problem.error}: {problem.message}")
    return REFUSED if found.problems else DONE


def _show_deployment(out: Output, found: Status) -> None:
    out.labelled("provider", found.provider or "unknown")
    out.labelled("deployment id", found.deployment_id or "none yet")
    out.labelled("epoch", "none yet" if found.epoch is None else str(found.epoch))
    out.labelled("secret.key", found.secret_file or "unknown")
    if found.trail is not None:
        out.labelled("audit trail", f"verified, {found.trail.events} events, {time_of(found.trail.newest) or NOTHING}")


def _show_keys(out: Output, found: Status) -> None:
    out.table(
        "data key",
        ("data key", "state", "provider", "master key", "since", "standby", "may be destroyed"),
        map(_key, found.keys),
    )
    if found.pending is not None:
        waits = f"waits for {', '.join(found.pending.behind)}" if found.pending.behind else "held by every live process"
        begun = ", being promoted" if found.pending.is_successor else ""
        out.labelled("pending", f"{found.pending.key_id} {waits}{begun}")
    out.table(
        "process",
        ("process", "state", "epoch", "primary", "keys", "seen", "version"),
        map(_process, found.replicas),
    )


def _key(key: KeyStatus) -> tuple[str, ...]:
    standby = f"{key.standby_provider} {key.standby_master_key}" if key.standby_provider else ""
    return (
        key.key_id,
        key.state,
        key.provider,
        key.master_key,
        time_of(key.since),
        standby,
        time_of(key.destroyable_at),
    )


def _process(process: ReplicaStatus) -> tuple[str, ...]:
    return (
        f"{process.host}/{process.process_id}",
        "alive" if process.is_alive else "gone",
        str(process.epoch),
        process.primary_key_id,
        ",".join(process.key_ids),
        time_of(process.seen_at),
        process.version,
    )


def _show_values(out: Output, found: Status) -> None:
    out.table(
        "rekey",
        ("column", "to", "state", "seen", "of about", "moved", "conflicts", "unreadable"),
        [
            (
                column.label,
                column.key_id,
                "finished" if column.unfinished == 0 else f"{column.shards - column.unfinished}/{column.shards}",
                *map(str, (column.rows_seen, column.rows_total, column.rekeyed, column.conflicts, column.unreadable)),
            )
            for column in found.rekeys
        ],
    )
    out.table("column", ("encrypted column on record",), [(label,) for label in found.columns])
