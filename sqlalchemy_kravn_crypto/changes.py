"""One change of the key store: under the lock, on verified rows, with its event, signed and written as one."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection, Engine

from .bootstrap import BootstrapSecrets
from .events import append
from .exceptions import NotProvisionedError
from .keystore import KeyStore, Opened
from .providers.base import KeyProvider
from .rows import MacKey, StoredRows, connect, locked, read_rows, take_lock, within_lock_timeout, write_rows
from .secrecy import KeepsSecret
from .wrapping import Blocking, run_here

_AT_ONCE: Final = 0.2
"""Bound on the wait for the lock in the middle of a program's work, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator(KeepsSecret):
    """Who changes the key store, and with what.

    :param engine: the engine of the database that holds the key store.
    :param store: how the key store is opened.
    :param standby: the second KMS, where there is one.
    :param actor: who it is, for the audit trail; by default the user that the process runs as.
    :param lease: for how many seconds a process goes on writing without a look at the key store.
    """

    engine: Engine
    store: KeyStore
    standby: KeyProvider | None = None
    actor: str | None = None
    lease: float = 180.0


class Change(KeepsSecret):
    """What is done within one transaction under the lock.

    :ivar rows: the rows as they are now, verified.
    :ivar secrets: the secrets of this process.
    :ivar pinned: the key ids that the operator pins; empty where none are.
    """

    __slots__ = ("_actor", "_commit", "_mac_key", "connection", "pinned", "rows", "secrets")

    def __init__(  # noqa: PLR0913 - what a change is made of
        self,
        connection: Connection,
        rows: StoredRows,
        secrets: BootstrapSecrets,
        mac_key: MacKey | None,
        *,
        actor: str | None,
        pinned: frozenset[str],
        commit: Callable[[], None],
    ) -> None:
        self.connection = connection
        self.pinned = pinned
        self.rows = rows
        self.secrets = secrets
        self._mac_key = mac_key
        self._actor = actor
        self._commit = commit

    def save(  # noqa: PLR0913 - an event is what, about which key, why
        self,
        after: StoredRows,
        action: str,
        *,
        key_id: str | None = None,
        reason: str | None = None,
        details: Mapping[str, Any] | None = None,
        mac_key: MacKey | None = None,
    ) -> None:
        """Write the rows and the event that says so, and commit.

        :param after: the rows as they are to be; where they are as before, only the event is written.
        :param mac_key: what signs them from now on, in the place of what has.
        :raises KeyStoreLockedError: if a transaction that writes under the primary keeps its row.
        """
        before = self.rows
        control = after.in_control()
        events_hash = append(
            self.connection,
            action,
            newest_hash=control.events_hash,
            actor=self._actor,
            key_id=key_id,
            reason=reason,
            details=details,
        )
        epoch = before.epoch if after == before and mac_key is None else before.epoch + 1
        signing = mac_key or self._mac_key
        after = replace(after, control=replace(control, epoch=epoch, events_hash=events_hash))
        signed = after if signing is None else signing.sign(after)
        within_lock_timeout(
            lambda: write_rows(self.connection, before, signed),
            "A transaction that writes encrypted values has kept the primary for too long. Nothing was changed; end "
            "it, or try again.",
        )
        self._commit()
        self.rows = signed


@contextmanager
def changing(operator: Operator) -> Iterator[Change]:
    """Hold the lock on the key store; what is not saved is not done.

    :raises KeyStoreError: if the key store is empty, not genuine, or locked for too long.
    """
    store = operator.store
    with connect(operator.engine) as connection:
        secrets = store.secrets(read_rows(connection))
    with locked(operator.engine, str(uuid.uuid4()), store.lock_wait) as connection:
        rows, mac_key = _verified(connection, store, secrets)
        yield Change(
            connection, rows, secrets, mac_key, actor=operator.actor, pinned=store.pinned, commit=connection.commit
        )


@contextmanager
def changing_on(connection: Connection, store: KeyStore, opened: Opened, *, blocking: Blocking) -> Iterator[Change]:
    """Do the same at once or not at all, on a connection of the user's between two transactions of theirs."""

    def commit() -> None:
        # Not the Connection's own, to which the user's transaction is already beginning.
        connection.dialect.do_commit(connection.connection)

    take_lock(connection, opened.deployment_id, _AT_ONCE, keep_isolation=True)
    rows, mac_key = _verified(connection, store, opened.secrets, opened, blocking)
    yield Change(connection, rows, opened.secrets, mac_key, actor=None, pinned=store.pinned, commit=commit)


def _verified(
    connection: Connection,
    store: KeyStore,
    secrets: BootstrapSecrets,
    opened: Opened | None = None,
    blocking: Blocking = run_here,
) -> tuple[StoredRows, MacKey | None]:
    rows = read_rows(connection)
    if not rows.keys:
        raise NotProvisionedError(
            "The key store holds no data key yet. The first process to start makes it; or `kravn-crypto provision`."
        )
    mac_key, _ = store.checked(rows, secrets, opened, blocking)
    return rows, mac_key
