"""The state of a deployment at a glance: what there is to say without changing anything, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Final, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from .clock import as_utc
from .configuration import key_store, settings_from_environment
from .events import Event, read_rows_and_events
from .exceptions import MALFORMED_URL, KravnCryptoError, NotProvisionedError
from .known_columns import recorded
from .ledger import Progress, progress
from .lifecycle.retirement import destroyable_at
from .replicas import Replica, read_replicas
from .rows import KeyRow, StoredRows, connect, read_rows
from .schema import State

if TYPE_CHECKING:
    from .providers.base import KeyProvider
    from .settings import Settings

T = TypeVar("T")

_MOVES: Final = ("provision", "adopt", "rotate", "promote", "disable", "enable", "destroy")
"""The actions that bring the key that they are about into another state."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What keeps a process from starting, or will; or what cannot be told for want of a right."""

    error: str
    message: str


@dataclass(frozen=True, slots=True)
class KeyStatus:
    """One data key on record.

    :ivar since: since when it is in its state.
    :ivar destroyable_at: of a disabled key, from when on it may be destroyed.
    """

    key_id: str
    state: str
    provider: str
    master_key: str
    standby_provider: str | None
    standby_master_key: str | None
    created_at: datetime | None
    since: datetime | None
    destroyable_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One process, as it last said of itself.

    :ivar is_alive: whether its last word is not older than its lease.
    """

    host: str
    process_id: int
    version: str
    is_alive: bool
    epoch: int
    primary_key_id: str
    key_ids: tuple[str, ...]
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class PendingStatus:
    """The data key that is to be the primary next.

    :ivar is_successor: whether the promotion has begun, so that everybody encrypts under it already.
    :ivar behind: the live processes that do not hold it.
    """

    key_id: str
    is_successor: bool
    behind: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrailStatus:
    """The audit trail, verified."""

    events: int
    newest: datetime | None


@dataclass(frozen=True, slots=True)
class Status:
    """What there is to say about a deployment.

    :ivar trail: ``None`` if it could not be verified; then there is a problem.
    :ivar rekeys: how far the columns are that a plan has been made for.
    :ivar columns: the columns on record.
    """

    provider: str | None
    secret_file: str | None
    deployment_id: str | None = None
    epoch: int | None = None
    keys: tuple[KeyStatus, ...] = ()
    pending: PendingStatus | None = None
    replicas: tuple[ReplicaStatus, ...] = ()
    rekeys: tuple[Progress, ...] = ()
    columns: tuple[str, ...] = ()
    trail: TrailStatus | None = None
    unknown_settings: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def status(engine: Engine, settings: Settings | None = None, *, provider: KeyProvider | None = None) -> Status:
    """Try everything that a boot does, verify the audit trail, and report instead of raising.

    That is one KMS call for each live data key; before the first boot, a throw-away key is wrapped and unwrapped. The
    database is only read: the right to SELECT from the tables will do.

    :param provider: the KMS, in place of one that the settings name.
    """
    from .settings import unknown_variables  # noqa: PLC0415 - pydantic is slow to import

    problems: list[Problem] = []
    if settings is None:
        settings = _reported(problems, settings_from_environment)
    rows = _reported(problems, lambda: _read(engine))
    found = Status(None, None, unknown_settings=tuple(unknown_variables(os.environ)))
    if settings is not None:
        found = replace(
            found,
            provider=str(settings.kms_provider),
            secret_file=str(settings.secret_file),
            warnings=tuple(settings.weaknesses()),
        )
        _try_boot(engine, settings, provider, rows, problems)
    if rows is not None and rows.control is not None:
        found = _with_records(found, engine, settings, rows, problems)
    return replace(found, problems=tuple(problems))


def database_error(error: SQLAlchemyError) -> str:
    """Return the first line of a database's error, without statement and parameters."""
    if type(error) is ArgumentError:  # not of a subclass, which says what driver there is none of
        return MALFORMED_URL
    cause = getattr(error, "orig", None) or error
    return f"The database: {(str(cause).strip() or type(cause).__name__).splitlines()[0]}"


def _reported(problems: list[Problem], function: Callable[[], T]) -> T | None:
    try:
        return function()
    except KravnCryptoError as error:
        problems.append(Problem(type(error).__name__, str(error)))
    except SQLAlchemyError as error:
        problems.append(Problem(type(error).__name__, database_error(error)))
    return None


def _read(engine: Engine) -> StoredRows:
    with connect(engine) as connection:
        return read_rows(connection)


def _try_boot(
    engine: Engine,
    settings: Settings,
    provider: KeyProvider | None,
    rows: StoredRows | None,
    problems: list[Problem],
) -> None:
    store = _reported(problems, lambda: key_store(settings, provider))
    if store is None or rows is None:
        return
    _reported(problems, lambda: replace(store, may_provision=False).open(engine))
    if problems and problems[-1].error == NotProvisionedError.__name__ and store.may_provision:
        _reported(problems, store.rehearse)


# --- What the tables say ---------------------------------------------------------------------------------------------


def _with_records(
    found: Status, engine: Engine, settings: Settings | None, rows: StoredRows, problems: list[Problem]
) -> Status:
    """Add what is in the tables; what cannot be read is a problem, and keeps nothing else from being told."""
    control = rows.in_control()
    events = _reported(problems, lambda: _verified_trail(engine))
    replicas = _reported(problems, lambda: _replicas(engine)) or []
    after_days = None if settings is None else settings.destroy_after_days
    return replace(
        found,
        deployment_id=control.deployment_id,
        epoch=control.epoch,
        keys=tuple(_key(row, events or [], after_days) for row in rows.keys),
        pending=_pending(rows, replicas),
        replicas=tuple(map(_replica, replicas)),
        rekeys=tuple(_reported(problems, lambda: _progress(engine)) or ()),
        columns=tuple(_reported(problems, lambda: _columns(engine)) or ()),
        trail=None if events is None else TrailStatus(len(events), events[-1].occurred_at if events else None),
    )


def _verified_trail(engine: Engine) -> list[Event]:
    with connect(engine) as connection:
        return read_rows_and_events(connection)[1]


def _replicas(engine: Engine) -> list[Replica]:
    with connect(engine) as connection:
        return read_replicas(connection)


def _progress(engine: Engine) -> list[Progress]:
    with connect(engine) as connection:
        return progress(connection)


def _columns(engine: Engine) -> list[str]:
    with connect(engine) as connection:
        return [column.label for column in recorded(connection)]


def _key(row: KeyRow, events: Sequence[Event], after_days: float | None) -> KeyStatus:
    key_id = row.key_id or ""
    disabled = row.state is State.DISABLED and after_days is not None
    return KeyStatus(
        key_id=key_id,
        state=row.state.value,
        provider=row.provider or "",
        master_key=row.master_key or "",
        standby_provider=row.standby_provider,
        standby_master_key=row.standby_master_key,
        created_at=None if row.created_at is None else as_utc(row.created_at),
        since=_since(row, events),
        destroyable_at=destroyable_at(events, key_id, after_days or 0.0) if disabled else None,
    )


def _since(row: KeyRow, events: Sequence[Event]) -> datetime | None:
    for event in reversed(events):
        if (event.key_id == row.key_id and event.action in _MOVES) or event.details.get("retired") == row.key_id:
            return event.occurred_at
    # Not moved by any event: the bootstrap key beside the first key of a KMS, or made before there were events.
    return None if row.updated_at is None else as_utc(row.updated_at)


def _pending(rows: StoredRows, replicas: Sequence[Replica]) -> PendingStatus | None:
    pending = rows.in_state(State.PENDING)
    if pending is None:
        return None
    key_id = pending.key_id or ""
    behind = tuple(replica.label for replica in replicas if replica.is_alive and key_id not in replica.key_ids)
    return PendingStatus(key_id, pending.closing is not None, behind)


def _replica(replica: Replica) -> ReplicaStatus:
    return ReplicaStatus(
        host=replica.host,
        process_id=replica.process_id,
        version=replica.version,
        is_alive=replica.is_alive,
        epoch=replica.epoch,
        primary_key_id=replica.primary_key_id,
        key_ids=tuple(sorted(replica.key_ids)),
        seen_at=replica.seen_at,
    )
