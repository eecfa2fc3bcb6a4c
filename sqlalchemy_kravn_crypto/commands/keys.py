"""The commands of a data key's life: rotate, promote, disable, enable, destroy, rewrap, rotate-secret."""

# ruff: noqa: ARG001, PLR0913 - each option is an argument, and what runs a command reads `debug`

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..configuration import settings_from_environment
from ..exceptions import ConfigurationError
from ..lifecycle import retirement, rewrapping, rotation
from ..rows import KeyRow, StoredRows
from ..schema import State
from .options import Actor, AsJson, Debug, DryRun, KeyId, Metadata, Reason, Schemas, Url, targets
from .output import Output, note
from .running import DONE, standby_if_named, with_operator


def rotate(
    *,
    url: Url,
    reason: Reason = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Make a new data key. It is pending until it is promoted."""
    made = with_operator(
        url,
        lambda operator: rotation.rotate(operator, reason=reason, dry_run=dry_run),
        actor=actor,
        standby=standby_if_named(),
    )
    out = Output(as_json=as_json)
    out.result({"dry_run": dry_run, "key": None if made is None else as_document(made)})
    out.say(
        "A data key could be made."
        if made is None
        else f"Data key {made.key_id} is pending. When every process holds it: kravn-crypto promote"
    )
    return DONE


def promote(
    *,
    url: Url,
    after: Annotated[
        float | None,
        typer.Option(help="Go by how long it has been pending, not by what the processes hold.", metavar="SECONDS"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Go by neither. Processes without the key will fail.")] = False,
    reason: Reason = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Make the pending data key the primary, when every live process holds it; retire the primary."""
    if force and after is not None:
        raise ConfigurationError("--after and --force contradict each other. Leave one of them out.")
    rows = with_operator(
        url,
        lambda operator: rotation.promote(operator, after=after, force=force, reason=reason, dry_run=dry_run),
        actor=actor,
    )
    out = Output(as_json=as_json)
    _show_rows(out, rows, dry_run=dry_run)
    out.say(
        f"Data key {_key_id(rows, State.PENDING)} could be promoted."
        if dry_run
        else f"Data key {_key_id(rows, State.PRIMARY)} is primary. Move the values to it with: kravn-crypto rekey"
    )
    return DONE


def disable(
    key_id: KeyId,
    *,
    url: Url,
    metadata: Metadata = None,
    schemas: Schemas = "",
    wait: Annotated[bool, typer.Option(help="Wait for the leases, or say how long they last.")] = True,
    reason: Reason = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Let no process load a retired data key any more, after two counts have found nothing under it."""
    where = targets(metadata, schemas)
    row = with_operator(
        url,
        lambda operator: retirement.disable(
            operator, key_id, targets=where, reason=reason, dry_run=dry_run, wait=wait, progress=note
        ),
        actor=actor,
    )
    return _show_key(row, "disabled", as_json=as_json, dry_run=dry_run)


def enable(
    key_id: KeyId,
    *,
    url: Url,
    reason: Reason = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Let every process load a disabled data key again, for reading."""
    row = with_operator(
        url, lambda operator: retirement.enable(operator, key_id, reason=reason, dry_run=dry_run), actor=actor
    )
    return _show_key(row, "enabled", as_json=as_json, dry_run=dry_run)


def destroy(
    key_id: KeyId,
    *,
    url: Url,
    reason: Reason = None,
    backups_expired: Annotated[
        bool, typer.Option("--backups-expired", help="No backup is left that is to be read with this key.")
    ] = False,
    now: Annotated[
        bool, typer.Option("--now", help="Shred what is under it, on purpose and at once, whatever it is.")
    ] = False,
    metadata: Metadata = None,
    schemas: Schemas = "",
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Delete the wrapped key for good and leave a tombstone. A reason must be given."""
    where, settings = targets(metadata, schemas), settings_from_environment()
    row = with_operator(
        url,
        lambda operator: retirement.destroy(
            operator,
            key_id,
            reason=reason or "",
            backups_expired=backups_expired,
            after_days=settings.destroy_after_days,
            now=now,
            targets=where,
            dry_run=dry_run,
        ),
        actor=actor,
        settings=settings,
    )
    return _show_key(row, "destroyed", as_json=as_json, dry_run=dry_run)


def rewrap(
    *,
    url: Url,
    reason: Reason = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Wrap every data key anew, under the newest version of its master key."""
    done = with_operator(url, lambda operator: rewrapping.rewrap(operator, reason=reason, dry_run=dry_run), actor=actor)
    show_rewrapped(Output(as_json=as_json), done, dry_run=dry_run)
    return DONE


def rotate_secret(
    *,
    url: Url,
    force: Annotated[
        bool, typer.Option("--force", help="Do not ask whether every process has KRAVN_SECRET_NEXT.")
    ] = False,
    reason: Reason = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Authenticate the key store with KRAVN_SECRET_NEXT; without a KMS, bring in its data key as pending, too."""
    rows = with_operator(
        url,
        lambda operator: rotation.rotate_secret(operator, force=force, reason=reason, dry_run=dry_run),
        actor=actor,
    )
    out = Output(as_json=as_json)
    _show_rows(out, rows, dry_run=dry_run)
    if dry_run:
        out.say("KRAVN_SECRET_NEXT could take the place of KRAVN_SECRET.")
        return DONE
    out.say("The key store is authenticated with KRAVN_SECRET_NEXT.")
    if rows.in_state(State.PENDING) is not None:
        out.say(f"Data key {_key_id(rows, State.PENDING)} is pending. Then: kravn-crypto promote, kravn-crypto rekey")
    return DONE


# --- What they print -------------------------------------------------------------------------------------------------


def as_document(row: KeyRow) -> dict[str, Any]:
    """Return what may be told of a data key's row."""
    return {
        "key_id": row.key_id,
        "state": row.state.value,
        "provider": row.provider,
        "master_key": row.master_key,
        "standby_provider": row.standby_provider,
        "standby_master_key": row.standby_master_key,
    }


def show_rewrapped(out: Output, done: Sequence[rewrapping.Rewrapped], *, dry_run: bool) -> None:
    """Print what became of wrapped keys."""
    out.result({"dry_run": dry_run, "keys": done})
    out.table("data key", ("key", "before", "after"), [(one.key_id, one.before or "", one.after) for one in done])


def _show_rows(out: Output, rows: StoredRows, *, dry_run: bool) -> None:
    out.result({"dry_run": dry_run, "epoch": rows.epoch, "keys": [as_document(row) for row in rows.keys]})


def _show_key(row: KeyRow, done: str, *, as_json: bool, dry_run: bool) -> int:
    out = Output(as_json=as_json)
    out.result({"dry_run": dry_run, "key": as_document(row)})
    out.say(f"Data key {row.key_id} {'could be' if dry_run else 'is'} {done}.")
    return DONE


def _key_id(rows: StoredRows, state: State) -> str:
    row = rows.in_state(state)
    return "" if row is None else row.key_id or ""
