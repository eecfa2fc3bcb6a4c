"""Start-up: settings, key store and provider into the process-wide key context; and the same by hand."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

from sqlalchemy import Engine

from . import following, guards
from .clock import process_clock
from .configuration import key_store, settings_from_environment, watch_settings
from .context import publish, put_aside
from .exceptions import AlreadyConfiguredError, ConfigurationError
from .keystore import Opened
from .rows import StoredRows, connect, read_rows
from .types import encrypted_columns
from .watch import Watch
from .wrapping import Blocking, run_here

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from .providers.base import KeyProvider
    from .settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Process:
    """What this process was configured with."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.engine: Engine | None = None
        self.settings: Settings | None = None
        self.provider: KeyProvider | None = None
        self.deployment_id = ""


_process: Final = _Process()

# A child forked while another thread was starting up would wait for that thread's lock for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: setattr(_process, "lock", threading.Lock()))


def configure(  # noqa: PLR0913 - each is a choice of its own
    engine: Engine,
    settings: Settings | None = None,
    *,
    provider: KeyProvider | None = None,
    key_store_engine: Engine | None = None,
    check_statements: bool = True,
    redact_errors: bool = True,
    binary_results: bool = True,
) -> None:
    """Open the key store of an engine's database and make its data keys the ones of this process.

    Call it once at start-up, before the first session. The very first boot also makes the first data key. From then on
    the process follows the key store, at the beginning of the engine's transactions: it takes in new keys and leaves a
    heartbeat. Calling it again with the same engine and settings, or with another engine whose database has the same
    key store, changes nothing but that the other engine is guarded and followed too.

    :param engine: a synchronous engine; see :func:`configure_async` for the other kind.
    :param settings: instead of those from the environment.
    :param provider: the KMS, in place of one that the settings name: one of your own, or one for tests.
    :param key_store_engine: the engine that was configured first, where the key store is in its database and not in
        this one's.
    :param check_statements: refuse what the engine is to execute if it sorts, groups, computes with or overwrites
        encrypted columns in SQL.
    :param redact_errors: name the types of parameters in the errors of the engine instead of the values.
    :param binary_results: ask psycopg for results with encrypted values in PostgreSQL's binary format, where it loads
        all of their columns the same from either.
    :raises ConfigurationError: if a setting is wrong.
    :raises AlreadyConfiguredError: if the process already uses another key store or other settings.
    :raises KeyStoreError: if the key store does not allow the process to start.
    :raises ProviderError: if the KMS does not.
    """
    is_async: bool = engine.dialect.is_async  # an AsyncEngine has the attribute too
    if is_async:
        raise ConfigurationError(
            "configure() takes a synchronous Engine. For an AsyncEngine: await configure_async(engine)."
        )
    settings = settings or settings_from_environment()
    _refuse_fence_elsewhere(settings, key_store_engine)
    with _process.lock:
        _configure(key_store_engine or engine, settings, provider, run_here)
    if key_store_engine is not None:
        following.follow(key_store_engine)
    following.follow(engine, key_store_engine)
    guards.install(
        engine, check_statements=check_statements, redact_errors=redact_errors, binary_results=binary_results
    )


async def configure_async(  # noqa: PLR0913 - as above
    engine: AsyncEngine,
    settings: Settings | None = None,
    *,
    provider: KeyProvider | None = None,
    key_store_engine: AsyncEngine | None = None,
    check_statements: bool = True,
    redact_errors: bool = True,
) -> None:
    """Do what :func:`configure` does, for an engine with an asynchronous driver. The event loop is not blocked."""
    import asyncio  # noqa: PLC0415 - as below

    from sqlalchemy.ext.asyncio import AsyncEngine  # noqa: PLC0415 - synchronous programs do without
    from sqlalchemy.util import await_only, greenlet_spawn  # noqa: PLC0415 - as above

    if not isinstance(engine, AsyncEngine):
        raise ConfigurationError("configure_async() takes an AsyncEngine. For a synchronous Engine: configure(engine).")

    def in_thread(function: Callable[[], T], /) -> T:
        return await_only(asyncio.to_thread(function))

    if settings is None:
        settings = await asyncio.to_thread(settings_from_environment)
    _refuse_fence_elsewhere(settings, key_store_engine)
    elsewhere = None if key_store_engine is None else key_store_engine.sync_engine
    await greenlet_spawn(_configure, elsewhere or engine.sync_engine, settings, provider, in_thread)
    if elsewhere is not None:
        following.follow(elsewhere)
    following.follow(engine.sync_engine, elsewhere)
    guards.install(engine.sync_engine, check_statements=check_statements, redact_errors=redact_errors)


def reset() -> None:
    """Forget what the process was configured with, keys included; for tests, or before another key store."""
    following.stop()
    _process.engine = _process.settings = _process.provider = None
    _process.deployment_id = ""
    publish(None)


@contextmanager
def set_aside() -> Iterator[None]:
    """Within a ``with`` block, do as if the process had not been configured; afterwards, as before. For tests."""
    before = _process.engine, _process.settings, _process.provider, _process.deployment_id
    watched = following.current()
    following.resume(None, None)  # its heartbeat stays
    with put_aside():
        reset()
        try:
            yield
        finally:
            reset()
            _process.engine, _process.settings, _process.provider, _process.deployment_id = before
            following.resume(*watched)


def provision(engine: Engine, settings: Settings | None = None, *, new_database: bool = False) -> StoredRows:
    """Make the first data key by hand, where boots may not (``KRAVN_KMS_PROVISION=never``).

    If it is there already, nothing is made, and the key store is opened to see whether it is as it should be.

    Import the models first: the encrypted columns that they declare are looked at for values under a lost key.

    :param new_database: fill an empty key store without looking for such values.
    :return: the rows of the key store.
    """
    store = key_store(settings or settings_from_environment())
    rows, made = store.provision(engine, encrypted_columns(), look_for_data=not new_database, pin_later=True)
    if not made:
        replace(store, may_provision=False).open(engine)
    return rows


def _refuse_fence_elsewhere(settings: Settings, key_store_engine: object) -> None:
    if key_store_engine is not None and settings.fence.value == "transaction":
        raise ConfigurationError(
            "KRAVN_FENCE=transaction locks the primary in the transaction that writes, so it takes the key store in "
            "the same database. Where it is in another, use KRAVN_FENCE=lease."
        )


def _configure(engine: Engine, settings: Settings, provider: KeyProvider | None, blocking: Blocking) -> None:
    if _process.settings is not None:
        _refuse_another(engine, settings, provider)
        return
    for weakness in settings.weaknesses():
        logger.warning("%s", weakness)
    store, started = key_store(settings, provider), process_clock()
    opened: Opened = store.open(engine, encrypted_columns(), blocking=blocking)
    _process.engine, _process.settings, _process.provider = engine, settings, provider
    _process.deployment_id = opened.deployment_id
    following.start(Watch(store, opened, watch_settings(settings), opened_at=started), engine)
    logger.info("configured with %r of deployment %s", opened.keyring, opened.deployment_id)


def _refuse_another(engine: Engine, settings: Settings, provider: KeyProvider | None) -> None:
    if settings != _process.settings or provider is not _process.provider:
        raise AlreadyConfiguredError(
            "This process is already configured with other settings or another provider. Call reset() first if that "
            "is what you want."
        )
    if engine is _process.engine:
        return
    rows = _read(engine)
    if rows.control is None or rows.control.deployment_id != _process.deployment_id:
        raise AlreadyConfiguredError(
            "This process already uses the key store of another database. A process has one. If the values of this "
            "database are under its keys: configure(engine, key_store_engine=the_first_engine)."
        )


def _read(engine: Engine) -> StoredRows:
    with connect(engine) as connection:
        return read_rows(connection)
