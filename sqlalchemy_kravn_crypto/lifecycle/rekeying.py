"""Every stale value to the primary, as an operator has it done: refused where it cannot be whole, and put on record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection

from ..census import Census, Unreachable, census
from ..changes import Operator, changing
from ..clock import Clock, process_clock
from ..exceptions import ColumnUnreachableError, OutdatedKeyringError
from ..keyring import Keyring
from ..known_columns import KnownColumn, record
from ..ledger import Counts, Shard
from ..rekey import RekeyResult, reachable_columns, rekey
from ..rekey_worker import OnProgress
from ..rows import connect, select_rows
from ..schema import State
from .retirement import Targets


def rekey_values(  # noqa: PLR0913 - how fast, which share, and what is said of it
    operator: Operator,
    targets: Targets | None = None,
    *,
    shard: tuple[int, int] | None = None,
    batch_size: int = 1000,
    max_rows_per_second: float | None = None,
    reason: str | None = None,
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
    clock: Clock = process_clock,
    sleep: Callable[[float], None] = time.sleep,
) -> RekeyResult:
    """Re-encrypt every stale value of every known column to the primary, and put the beginning and the end on record.

    Any number of processes may do so at once. One that was stopped leaves its beginning in the audit trail without an
    end; the next goes on where it was.

    :param shard: do a fixed share only, ``(3, 16)`` being the third of sixteen. The values of all columns are then not
        counted, neither before nor afterwards.
    :param batch_size: how many values are in memory at once, and in one transaction.
    :param max_rows_per_second: bound on the values seen in a second, at least 1; without one there is none.
    :param dry_run: only see whether every column can be reached, and how many values are stale.
    :param on_progress: called after every batch.
    :raises ColumnUnreachableError: if a column cannot be walked through or read; then nothing is re-encrypted.
    :raises OutdatedKeyringError: if another data key becomes the primary meanwhile.
    :raises KeyStoreError: if the key store is not genuine.
    :raises ProviderError: if the KMS does not unwrap a data key.
    """
    keyring = replace(operator.store, may_provision=False).open(operator.engine).keyring
    with connect(operator.engine) as connection:
        columns = _columns(connection, targets or Targets())
        before = None if shard is not None and not dry_run else _counted(connection, columns)
    if dry_run:
        return _without_doing(keyring.primary_key_id, before)
    said: dict[str, Any] = {"to": keyring.primary_key_id, "shard": None if shard is None else "{}/{}".format(*shard)}
    with changing(operator) as change:
        record(change.connection, columns)
        details = {"at": "beginning", "census": None if before is None else before.as_dict()}
        change.save(change.rows, "rekey", reason=reason, details=said | details)
    result = rekey(
        operator.engine,
        keyring,
        columns,
        shard=shard,
        batch_size=batch_size,
        max_rows_per_second=max_rows_per_second,
        clock=clock,
        sleep=sleep,
        on_progress=_while_primary(operator, keyring, on_progress),
    )
    with changing(operator) as change:
        change.save(change.rows, "rekey", reason=reason, details=said | {"at": "end"} | _on_record(result))
    return result


def _columns(connection: Connection, targets: Targets) -> list[KnownColumn]:
    """Return the columns of targets.

    :raises ColumnUnreachableError: if one of them cannot be walked through.
    """
    columns = targets.columns(connection)
    _, unreachable = reachable_columns(connection, columns)
    _refuse(unreachable)
    return columns


def _counted(connection: Connection, columns: Sequence[KnownColumn]) -> Census:
    found = census(connection, columns)
    _refuse(found.unreachable)
    return found


def _refuse(unreachable: Sequence[Unreachable]) -> None:
    if unreachable:
        reasons = " ".join(one.reason for one in unreachable)
        raise ColumnUnreachableError(f"Nothing was re-encrypted. {reasons}")


def _without_doing(key_id: str, counted: Census | None) -> RekeyResult:
    columns = () if counted is None else counted.columns
    left = {one.column.label: one.stale(key_id) for one in columns if one.stale(key_id)}
    return RekeyResult(key_id, Counts(), (), left, (), counted)


def _on_record(result: RekeyResult) -> dict[str, Any]:
    """Return what the audit trail says of a result: not which rows are unreadable, since their keys may be personal."""
    found = result.as_dict()
    return {
        "rekeyed": found["rekeyed"],
        "conflicts": found["conflicts"],
        "unreadable": found["unreadable_count"],
        "left": found["left"],
        "unreachable": found["unreachable"],
        "census": found["census"],
    }


def _while_primary(operator: Operator, keyring: Keyring, on_progress: OnProgress | None) -> OnProgress:
    """Return what is called after every batch, and stops the work when another data key is encrypted under.

    Else values that others write under that one could not be read here, and would be moved back from it.
    """

    def after_batch(shard: Shard, counts: Counts) -> None:
        if on_progress is not None:
            on_progress(shard, counts)
        with connect(operator.engine) as connection:
            rows = select_rows(connection)
        successor = next((row for row in rows.keys if row.closing is not None), rows.in_state(State.PRIMARY))
        if successor is None or successor.key_id != keyring.primary_key_id:
            raise OutdatedKeyringError(
                f"Values were being moved to data key {keyring.primary_key_id}, but another one has been promoted "
                "meanwhile. Run this again: it moves them to that one."
            )

    return after_batch
