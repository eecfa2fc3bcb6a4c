"""A new data key, and how it becomes the primary; a new secret of the deployment."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..changes import Change, Operator, changing
from ..exceptions import ReplicasBehindError, StandbyError, WrongStateError
from ..keystore import NO_PROVIDER, bootstrap_row
from ..promotion import held_by_all, older_than, pending_key, promote_pending
from ..replicas import live_replicas
from ..rows import KeyRow, MacKey, StoredRows
from ..schema import State

if TYPE_CHECKING:
    from ..bootstrap import BootstrapSecret

logger = logging.getLogger(__name__)


def rotate(operator: Operator, *, reason: str | None = None, dry_run: bool = False) -> KeyRow | None:
    """Make a data key, wrap it and check it; it is pending until it is promoted.

    :param dry_run: only see whether it could be done.
    :return: the row of the new key, ``None`` in a dry run.
    :raises WrongStateError: if another key is pending, or there is no KMS.
    :raises StandbyError: if the other keys have a standby, and this one would not.
    :raises ProviderError: if a KMS does not wrap and unwrap.
    """
    store, provider = operator.store, operator.store.provider
    if provider is None:
        raise WrongStateError(
            "In mode none, the data key comes from KRAVN_SECRET: rotate that with `kravn-crypto rotate-secret`."
        )
    with changing(operator) as change:
        _refuse_second_pending(change.rows)
        if operator.standby is None and any(row.standby_provider for row in change.rows.keys):
            raise StandbyError(
                "The data keys have a standby KMS, and a new one would have none. Name it in KRAVN_STANDBY_KMS_PROVIDER"
                " and the settings that go with it, or give the standby up with `kravn-crypto standby remove`."
            )
        if dry_run:
            return None
        made = store.new_key_row(provider, change.rows.next_id(), change.rows.in_control(), standby=operator.standby)
        details = {"provider": made.provider, "master_key": made.master_key}
        change.save(change.rows.with_key(made), "rotate", key_id=made.key_id, reason=reason, details=details)
    logger.info("data key %s is pending", made.key_id)
    return made


def promote(
    operator: Operator,
    *,
    after: float | None = None,
    force: bool = False,
    reason: str | None = None,
    dry_run: bool = False,
) -> StoredRows:
    """Make the pending data key the primary, and retire the primary.

    :param after: go by how long it has been pending, in seconds, and not by what the processes say that they hold.
    :param force: go by neither. A process that does not hold the key fails on every value that others write.
    :param dry_run: only see whether it could be done.
    :return: the rows of the key store.
    :raises WrongStateError: if no key is pending.
    :raises UnpinnedKeyError: if key ids are pinned and its is not.
    :raises ReplicasBehindError: if a live process does not hold it, named.
    :raises TooEarlyError: if it has not been pending for long enough.
    :raises KeyStoreLockedError: if a transaction that writes under the primary does not end.
    """
    if force:
        logger.warning("promoting without knowing whether every process holds the new data key")
    ready = _anyhow if force else held_by_all if after is None else older_than(after)
    if dry_run:
        with changing(operator) as change:
            ready(change, pending_key(change))
            return change.rows
    return promote_pending(lambda: changing(operator), ready, reason=reason)


def _anyhow(_change: Change, _pending: KeyRow) -> None:
    pass


def rotate_secret(
    operator: Operator, *, force: bool = False, reason: str | None = None, dry_run: bool = False
) -> StoredRows:
    """Authenticate the rows with ``KRAVN_SECRET_NEXT``, and in mode ``none`` bring in its bootstrap key as pending.

    All processes must have been deployed with ``KRAVN_SECRET_NEXT`` before. Safe to repeat.

    :param force: do not ask whether they have.
    :param dry_run: only see whether it could be done.
    :return: the rows of the key store.
    :raises WrongStateError: if there is no next secret, or the rows are authenticated with a key that the KMS wraps.
    :raises ReplicasBehindError: if a live process does not have the next secret, named.
    """
    with changing(operator) as change:
        following = change.secrets.next
        if following is None:
            raise WrongStateError(
                "There is no next secret: set KRAVN_SECRET_NEXT for every process and for this command, beside "
                "KRAVN_SECRET."
            )
        if change.rows.in_control().wrapped_key is not None:
            raise WrongStateError(
                "The rows of kms_keys are authenticated with a key that the KMS wraps, so KRAVN_SECRET plays no part."
            )
        mac_key = MacKey(following.mac_key)
        if not force:
            _refuse_without(change, mac_key)
        after = _with_next_bootstrap_key(operator, change.rows, following)
        if not dry_run and (after != change.rows or not mac_key.signed(change.rows.in_control())):
            details = {"mac_key": mac_key.key_id.hex()}
            change.save(after, "rotate-secret", reason=reason, details=details, mac_key=mac_key)
        return change.rows


def _refuse_without(change: Change, mac_key: MacKey) -> None:
    behind = [
        replica.label for replica in live_replicas(change.connection) if mac_key.key_id.hex() not in replica.mac_key_ids
    ]
    if behind:
        raise ReplicasBehindError(
            f"KRAVN_SECRET_NEXT is not yet set for {', '.join(behind)}: they could not verify the rows any more. "
            "Deploy it to all, then run this again.",
            replicas=tuple(behind),
        )


def _with_next_bootstrap_key(operator: Operator, rows: StoredRows, following: BootstrapSecret) -> StoredRows:
    made = bootstrap_row(rows.next_id(), following)
    if operator.store.provider is not None or rows.key(made.required("key_id")) is not None:
        return rows
    primary = rows.in_state(State.PRIMARY)
    if primary is None or primary.provider != NO_PROVIDER:
        return rows
    _refuse_second_pending(rows)
    return rows.with_key(made.in_state(State.PENDING))


def _refuse_second_pending(rows: StoredRows) -> None:
    pending = rows.in_state(State.PENDING)
    if pending is not None:
        raise WrongStateError(
            f"Data key {pending.key_id} is pending already. Promote it with `kravn-crypto promote` first."
        )
