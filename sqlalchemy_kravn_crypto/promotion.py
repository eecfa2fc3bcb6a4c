"""From pending to primary: when every live process holds the key, so that none meets a value that it cannot read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta

from sqlalchemy import Connection

from .changes import Change
from .clock import as_utc, read_database_time
from .exceptions import ReplicasBehindError, TooEarlyError, UnpinnedKeyError, WrongStateError
from .keystore import NO_PROVIDER
from .replicas import Replica, live_replicas
from .rows import KeyRow, StoredRows
from .schema import State

Readiness = Callable[[Change, KeyRow], None]
"""Raises if a pending data key may not become primary yet."""


def pending_key(change: Change) -> KeyRow:
    """Return the pending data key.

    :raises WrongStateError: if there is none.
    :raises UnpinnedKeyError: if key ids are pinned and its is not: no process would start when it is the primary.
    """
    pending = change.rows.in_state(State.PENDING)
    if pending is None:
        raise WrongStateError("No data key is pending that could be promoted. Make one with `kravn-crypto rotate`.")
    _refuse_unpinned(change, pending)
    return pending


def _refuse_unpinned(change: Change, pending: KeyRow) -> None:
    if change.pinned and pending.provider != NO_PROVIDER and pending.key_id not in change.pinned:
        raise UnpinnedKeyError(
            f"Data key {pending.key_id} is pending, but KRAVN_KMS_PINNED_KEYS does not name it. If you made it, add it "
            "there for every process and for this command; if not, find out who writes to kms_keys.",
            key_id=pending.key_id or "",
        )


def replicas_without(connection: Connection, key_id: str) -> list[Replica]:
    """Return the live processes that do not hold a data key."""
    return [replica for replica in live_replicas(connection) if key_id not in replica.key_ids]


def held_by_all(change: Change, pending: KeyRow) -> None:
    """Check that every live process holds the key.

    :raises ReplicasBehindError: naming those that do not.
    """
    behind = replicas_without(change.connection, pending.required("key_id"))
    if behind:
        names = tuple(replica.label for replica in behind)
        raise ReplicasBehindError(
            f"Data key {pending.key_id} is not yet held by {', '.join(names)}. Each looks for it at the beginning of a "
            "transaction; look in the log of one that does not take it in. One that has ended without saying so no "
            "longer counts when its lease is over.",
            replicas=names,
        )


def older_than(seconds: float) -> Readiness:
    """Check instead that the key has been pending for some time, where processes cannot leave heartbeats.

    :raises TooEarlyError: if it has not.
    """

    def check(change: Change, pending: KeyRow) -> None:
        if pending.created_at is None:
            raise WrongStateError(f"It is not on record since when data key {pending.key_id} is pending.")
        # Not less than none: the database's time is read to the second below, and the row's may be more precise.
        age = max(read_database_time(change.connection) - as_utc(pending.created_at), timedelta())
        left = (timedelta(seconds=seconds) - age).total_seconds()
        if left > 0:
            raise TooEarlyError(
                f"Data key {pending.key_id} has been pending for {age.total_seconds():.0f} of {seconds:g} seconds. Try "
                f"again in {left:.0f}.",
                seconds=left,
            )

    return check


def promote_pending(
    changing: Callable[[], AbstractContextManager[Change]], ready: Readiness, *, reason: str | None = None
) -> StoredRows:
    """Make the pending key the primary and retire the primary, in two transactions; safe to repeat after a crash.

    The first says which primary is closing: from then on new values are under its successor, which all hold, and no
    further transaction takes the lock on the primary's row that the second waits for. Without it, writers that overlap
    each other could keep an operator waiting without end.

    :param changing: begins a change.
    :raises WrongStateError: if no key is pending.
    :raises UnpinnedKeyError: if key ids are pinned and its is not.
    :raises KeyStoreLockedError: if a transaction that was writing under the primary does not end.
    """
    with changing() as change:
        pending = pending_key(change)
        ready(change, pending)
        primary = _primary(change.rows)
        if pending.closing is None:
            closing = change.rows.with_key(replace(pending, closing=primary.key_id))
            details = {"successor": pending.key_id}
            change.save(closing, "close", key_id=primary.key_id, reason=reason, details=details)
    with changing() as change:
        closed = change.rows.in_state(State.PENDING)
        if closed is None or closed.closing is None:  # somebody else has done it meanwhile
            return change.rows
        _refuse_unpinned(change, closed)
        ready(change, closed)
        primary = _primary(change.rows)
        retired = change.rows.with_key(primary.in_state(State.RETIRED))
        promoted = retired.with_key(replace(closed.in_state(State.PRIMARY), closing=None))
        change.save(promoted, "promote", key_id=closed.key_id, reason=reason, details={"retired": primary.key_id})
        return change.rows


def _primary(rows: StoredRows) -> KeyRow:
    primary = rows.in_state(State.PRIMARY)
    if primary is None:
        raise WrongStateError("No data key is primary. Restore kms_keys from a backup.")
    return primary
