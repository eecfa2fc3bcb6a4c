"""The commands on a second KMS that can unwrap the same data keys: standby add, switch, remove."""

# ruff: noqa: ARG001, PLR0913 - each option is an argument, and what runs a command reads `debug`

from __future__ import annotations

from typing import Annotated

import typer

from ..configuration import standby_from_environment
from ..lifecycle import rewrapping
from ..rows import StoredRows
from .keys import as_document, show_rewrapped
from .options import Actor, AsJson, Debug, DryRun, Reason, Url
from .output import Output
from .running import DONE, with_operator


def add(
    *,
    url: Url,
    reason: Reason = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Wrap every data key by the KMS of KRAVN_STANDBY_KMS_PROVIDER, too."""
    done = with_operator(
        url,
        lambda operator: rewrapping.add_standby(operator, reason=reason, dry_run=dry_run),
        actor=actor,
        standby=standby_from_environment(),
    )
    show_rewrapped(Output(as_json=as_json), done, dry_run=dry_run)
    return DONE


def switch(
    *,
    url: Url,
    lost: Annotated[
        bool, typer.Option("--lost", help="The first KMS is gone for good: do not ask it, and keep nothing of it.")
    ] = False,
    reason: Reason = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Make the standby the first KMS and the first the standby, once the fleet has been deployed with it."""
    rows = with_operator(
        url,
        lambda operator: rewrapping.switch_to_standby(operator, lost=lost, reason=reason, dry_run=dry_run),
        actor=actor,
        standby=None if lost else standby_from_environment(),
    )
    return _show(rows, as_json=as_json, dry_run=dry_run)


def remove(
    *,
    url: Url,
    reason: Reason = None,
    actor: Actor = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Give up what the standby KMS wrapped."""
    rows = with_operator(
        url, lambda operator: rewrapping.remove_standby(operator, reason=reason, dry_run=dry_run), actor=actor
    )
    return _show(rows, as_json=as_json, dry_run=dry_run)


def _show(rows: StoredRows, *, as_json: bool, dry_run: bool) -> int:
    out = Output(as_json=as_json)
    out.result({"dry_run": dry_run, "epoch": rows.epoch, "keys": [as_document(row) for row in rows.keys]})
    if dry_run:
        out.say("It could be done. The data keys now:")
    out.table(
        "data key",
        ("key", "state", "master key", "standby"),
        [(row.key_id or "", row.state.value, row.master_key or "", row.standby_master_key or "") for row in rows.keys],
    )
    return DONE
