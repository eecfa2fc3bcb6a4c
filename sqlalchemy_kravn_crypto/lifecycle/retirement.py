"""The end of a data key: loaded by nobody, and some day gone, with proof that nothing is under it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, MetaData

from ..census import Census, census
from ..changes import Change, Operator, changing
from ..clock import as_utc, read_database_time
from ..events import Event, read_events
from ..exceptions import KeyInUseError, NotConfirmedError, ReplicasBehindError, TooEarlyError, WrongStateError
from ..known_columns import KnownColumn, known
from ..replicas import live_replicas
from ..rows import KeyRow, connect
from ..schema import State
from ..transactions import mark, open_since

Sleep = Callable[[float], None]

Progress = Callable[[str], None]
"""Told what is waited for."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Where values are looked for: the columns on record, and what the operator names besides.

    :ivar metadata: the user's models.
    :ivar schemas: the schemas that ``schema_translate_map`` moves tables to.
    """

    metadata: MetaData | None = None
    schemas: Sequence[str] = ()

    def columns(self, connection: Connection) -> list[KnownColumn]:
        """Return the columns.

        :raises ColumnUnreachableError: if the database has no schema of a name that was given.
        """
        return known(connection, self.metadata, self.schemas)

    def count(self, connection: Connection) -> Census:
        """Count what is in them.

        :raises ColumnUnreachableError: if the database has no schema of a name that was given.
        """
        return census(connection, self.columns(connection))


def disable(  # noqa: PLR0913 - what is looked at, and how it is waited
    operator: Operator,
    key_id: str,
    *,
    targets: Targets | None = None,
    reason: str | None = None,
    dry_run: bool = False,
    wait: bool = True,
    sleep: Sleep = time.sleep,
    progress: Progress = lambda _: None,
) -> KeyRow:
    """Let nobody load a retired data key any more; :func:`enable` takes it back.

    Two counts must find no value under it. The first is made when no process can encrypt under it any more, a lease
    after it was retired; the second another lease later, when every transaction that was open at the first has ended. A
    first count that an earlier call recorded will do.

    :param dry_run: only see whether it could be done now.
    :param wait: wait for the leases; else say how long it is still to wait.
    :param sleep: how to wait.
    :raises WrongStateError: if the key is not retired.
    :raises KeyInUseError: if there are values under it, a column cannot be counted, or a transaction is still open.
    :raises ReplicasBehindError: if a live process still encrypts under it.
    :raises TooEarlyError: if a lease is not over, and ``wait`` is not set.
    """
    targets = targets or Targets()

    def until_a_lease_after(moment: datetime, what: str) -> None:
        with connect(operator.engine) as connection:
            left = _left(connection, operator, moment)
        if left > 0 and (dry_run or not wait):
            raise TooEarlyError(f"Data key {key_id}: {what}. Try again in {left:.0f} seconds.", seconds=left)
        if left > 0:
            progress(f"{what}; {left:.0f} seconds to go")
            sleep(left)

    with changing(operator) as change:
        events = _trail(change)
        _in_state(change, key_id, State.RETIRED)
        _refuse_writers(change, key_id)
    retired_at = _retired_at(events, key_id)
    until_a_lease_after(retired_at, "processes may still encrypt under it until their leases are over")
    first = _first_count(events, key_id, retired_at + _lease(operator))
    if first is None and dry_run:
        with connect(operator.engine) as connection:
            _refuse_values(targets.count(connection), key_id)
        raise TooEarlyError(
            f"Data key {key_id}: a count finds nothing under it now, and a second count must find nothing either, a "
            f"lease of {operator.lease:g} seconds later. Without --dry-run, both are made.",
            seconds=operator.lease,
        )
    if first is None:
        first = _record_first_count(operator, key_id, targets)
    until_a_lease_after(first.occurred_at, "a second count must find nothing either, a lease after the first")
    with changing(operator) as change:
        row = _in_state(change, key_id, State.RETIRED)
        _refuse_writers(change, key_id)
        still_open = open_since(change.connection, str(first.details["transactions"]))
        if still_open:
            raise KeyInUseError(
                f"Transactions that were open when the values under data key {key_id} were first counted still are, "
                f"and what they wrote is not counted: {', '.join(still_open)}. End them, then run this again."
            )
        second = _refuse_values(targets.count(change.connection), key_id)
        if dry_run:
            return row
        disabled = row.in_state(State.DISABLED)
        details = {"census_before": first.details["census"], "census": second.as_dict()}
        change.save(change.rows.with_key(disabled), "disable", key_id=key_id, reason=reason, details=details)
        return disabled


def enable(operator: Operator, key_id: str, *, reason: str | None = None, dry_run: bool = False) -> KeyRow:
    """Let every process load a disabled data key again, for reading.

    :raises WrongStateError: if it is not disabled.
    """
    with changing(operator) as change:
        retired = _in_state(change, key_id, State.DISABLED).in_state(State.RETIRED)
        if not dry_run:
            change.save(change.rows.with_key(retired), "enable", key_id=key_id, reason=reason)
        return retired


def destroy(  # noqa: PLR0913 - each is something that has to be said
    operator: Operator,
    key_id: str,
    *,
    reason: str,
    backups_expired: bool = False,
    after_days: float = 7.0,
    now: bool = False,
    targets: Targets | None = None,
    dry_run: bool = False,
) -> KeyRow:
    """Delete the wrapped key for good, and leave a tombstone, so that what is under it fails as destroyed.

    :param reason: why; it goes into the audit trail.
    :param backups_expired: confirms that no backup is left that anybody will want to read values under it from.
    :param after_days: for how many days it must have been disabled.
    :param now: shred what is under it, on purpose and at once. It need not be disabled, and there may be values.
    :raises WrongStateError: if it is not disabled; with ``now``, nor retired.
    :raises NotConfirmedError: if no reason is given, or the backups are not said to have expired.
    :raises TooEarlyError: if it has not been disabled for long enough.
    :raises KeyInUseError: if there are values under it, or a column cannot be counted.
    """
    if not reason.strip():
        raise NotConfirmedError(
            "Destroying a data key cannot be undone. Give a reason for the audit trail: --reason TEXT."
        )
    if not now and not backups_expired:
        raise NotConfirmedError(
            f"What backups hold under data key {key_id} cannot be read once it is destroyed. Say --backups-expired if "
            "no backup from before its values were rekeyed will be needed; or --now to shred them on purpose."
        )
    with changing(operator) as change:
        row = _in_state(change, key_id, State.DISABLED, *([State.RETIRED] if now else []))
        if not now:
            _refuse_before(change, key_id, timedelta(days=after_days))
        counted = (targets or Targets()).count(change.connection)
        if not now:
            _refuse_values(counted, key_id)
        if dry_run:
            return row
        tombstone = replace(
            row.in_state(State.DESTROYED),
            wrapped_key=None,
            standby_provider=None,
            standby_master_key=None,
            standby_wrapped_key=None,
        )
        details = {"census": counted.as_dict(), "backups_expired": backups_expired, "now": now}
        change.save(change.rows.with_key(tombstone), "destroy", key_id=key_id, reason=reason, details=details)
        return tombstone


def destroyable_at(events: Sequence[Event], key_id: str, after_days: float) -> datetime | None:
    """Return from when on a disabled data key may be destroyed, or ``None`` if it is not on record since when it is."""
    disabled_at = _last(events, "disable", key_id)
    return None if disabled_at is None else disabled_at + timedelta(days=after_days)


# --- What is refused -------------------------------------------------------------------------------------------------


def _in_state(change: Change, key_id: str, *states: State) -> KeyRow:
    row = change.rows.key(key_id)
    if row is None:
        raise WrongStateError(f"There is no data key {key_id}. `kravn-crypto status` lists them.")
    if row.state not in states:
        raise WrongStateError(f"Data key {key_id} is {row.state.value}, and must be {' or '.join(states)} for that.")
    return row


def _refuse_writers(change: Change, key_id: str) -> None:
    writers = tuple(replica.label for replica in live_replicas(change.connection) if replica.primary_key_id == key_id)
    if writers:
        raise ReplicasBehindError(
            f"Data key {key_id} is still what {', '.join(writers)} encrypts under. Each looks at the key store at the "
            "beginning of a transaction; one that has ended no longer counts when its lease is over.",
            replicas=writers,
        )


def _refuse_values(counted: Census, key_id: str) -> Census:
    if counted.unreachable:
        columns = ", ".join(unreachable.column.label for unreachable in counted.unreachable)
        raise KeyInUseError(
            f"It is not known what is under data key {key_id}, since these columns cannot be counted: {columns}. Make "
            "them reachable, or take them off the record with `kravn-crypto forget-column`."
        )
    values = counted.of_key(key_id)
    if values:
        raise KeyInUseError(
            f"{values} values are under data key {key_id}. Move them with `kravn-crypto rekey`; `kravn-crypto census` "
            "says where they are."
        )
    return counted


def _refuse_before(change: Change, key_id: str, age: timedelta) -> None:
    allowed_at = destroyable_at(_trail(change), key_id, age / timedelta(days=1))
    if allowed_at is None:
        raise WrongStateError(f"It is not on record since when data key {key_id} is disabled. Enable and disable it.")
    left = (allowed_at - read_database_time(change.connection)).total_seconds()
    if left > 0:
        raise TooEarlyError(
            f"Data key {key_id} may be destroyed from {allowed_at:%Y-%m-%d %H:%M} UTC on, when it has been disabled "
            f"for {age / timedelta(days=1):g} days.",
            seconds=left,
        )


# --- When it was -----------------------------------------------------------------------------------------------------


def _trail(change: Change) -> list[Event]:
    return read_events(change.connection, change.rows.in_control().events_hash)


def _last(events: Sequence[Event], action: str, key_id: str) -> datetime | None:
    return max(
        (event.occurred_at for event in events if event.action == action and event.key_id == key_id), default=None
    )


def _retired_at(events: Sequence[Event], key_id: str) -> datetime:
    """Return when a key was retired: nobody encrypts under it since then, but until their lease is over."""
    found = [event.occurred_at for event in events if event.details.get("retired") == key_id]
    if not found:
        raise WrongStateError(f"The audit trail does not say since when data key {key_id} is retired.")
    return max(found)


def _lease(operator: Operator) -> timedelta:
    with connect(operator.engine) as connection:
        longest = max((replica.lease for replica in live_replicas(connection)), default=0)
    return timedelta(seconds=max(longest, operator.lease))


def _left(connection: Connection, operator: Operator, moment: datetime) -> float:
    """Return for how many seconds a lease that began at a moment of the database's clock still lasts."""
    # A second more, since events are recorded to the second.
    over_at = moment + _lease(operator) + timedelta(seconds=1)
    return (over_at - as_utc(read_database_time(connection))).total_seconds()


# --- The first count -------------------------------------------------------------------------------------------------


def _first_count(events: Sequence[Event], key_id: str, not_before: datetime) -> Event | None:
    """Return the last count on record that found nothing under the key when nobody could encrypt under it any more."""
    found = [
        event
        for event in events
        if event.action == "count" and event.key_id == key_id and event.occurred_at > not_before
    ]
    return found[-1] if found else None


def _record_first_count(operator: Operator, key_id: str, targets: Targets) -> Event:
    with connect(operator.engine) as connection:
        # The mark before the count: whoever is open at the count was open at the mark, or began after it.
        details: dict[str, Any] = {"transactions": mark(connection)}
        details["census"] = _refuse_values(targets.count(connection), key_id).as_dict()
    with changing(operator) as change:
        change.save(change.rows, "count", key_id=key_id, details=details)
        recorded = change.rows.in_control().events_hash
    # The lock went with the commit, and others may have done something since.
    with changing(operator) as change:
        return next(event for event in _trail(change) if event.hash == recorded)
