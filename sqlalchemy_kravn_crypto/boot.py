"""Start-up: settings, key store and provider into the process-wide key context; and the same by hand."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from . import guards
from .context import current_keyring, is_configured, publish
from .exceptions import AlreadyConfiguredError, ConfigurationError, KravnCryptoError, NotProvisionedError
from .keystore import NO_PROVIDER, KeyStore, Opened
from .rows import KeyRow, StoredRows, connect, read_rows
from .types import encrypted_columns
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


def configure(
    engine: Engine,
    settings: Settings | None = None,
    *,
    provider: KeyProvider | None = None,
    check_statements: bool = True,
    redact_errors: bool = True,
) -> None:
    """Open the key store of an engine's database and make its data keys the ones of this process.

    Call it once at start-up, before the first session. The very first boot also makes the first data key. Calling it
    again with the same engine and settings, or with another engine whose database has the same key store, changes
    nothing but that the other engine is guarded too.

    :param engine: a synchronous engine; see :func:`configure_async` for the other kind.
    :param settings: instead of those from the environment.
    :param provider: the KMS, in place of one that the settings name: one of your own, or one for tests.
    :param check_statements: refuse what the engine is to execute if it sorts, groups, computes with or overwrites
        encrypted columns in SQL.
    :param redact_errors: name the types of parameters in the errors of the engine instead of the values.
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
    with _process.lock:
        _configure(engine, settings or _settings(), provider, run_here)
    guards.install(engine, check_statements=check_statements, redact_errors=redact_errors)


async def configure_async(
    engine: AsyncEngine,
    settings: Settings | None = None,
    *,
    provider: KeyProvider | None = None,
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

    settings = settings or await asyncio.to_thread(_settings)
    await greenlet_spawn(_configure, engine.sync_engine, settings, provider, in_thread)
    guards.install(engine.sync_engine, check_statements=check_statements, redact_errors=redact_errors)


def reset() -> None:
    """Forget what the process was configured with, keys included; for tests, or before another key store."""
    _process.engine = _process.settings = _process.provider = None
    _process.deployment_id = ""
    publish(None)


@contextmanager
def set_aside() -> Iterator[None]:
    """Within a ``with`` block, do as if the process had not been configured; afterwards, as before. For tests."""
    before = _process.engine, _process.settings, _process.provider, _process.deployment_id
    # In an empty context, since `use_keyring` may be in effect here.
    keyring = Context().run(lambda: current_keyring() if is_configured() else None)
    reset()
    try:
        yield
    finally:
        _process.engine, _process.settings, _process.provider, _process.deployment_id = before
        publish(keyring)


def provision(engine: Engine, settings: Settings | None = None, *, new_database: bool = False) -> StoredRows:
    """Make the first data key by hand, where boots may not (``KRAVN_KMS_PROVISION=never``).

    If it is there already, nothing is made, and the key store is opened to see whether it is as it should be.

    Import the models first: the encrypted columns that they declare are looked at for values under a lost key.

    :param new_database: fill an empty key store without looking for such values.
    :return: the rows of the key store.
    """
    store = _key_store(settings or _settings())
    rows, made = store.provision(engine, encrypted_columns(), look_for_data=not new_database, pin_later=True)
    if not made:
        replace(store, may_provision=False).open(engine)
    return rows


@dataclass(frozen=True, slots=True)
class Problem:
    """What keeps a process from starting, or will."""

    error: str
    message: str


@dataclass(frozen=True, slots=True)
class KeyStatus:
    """One data key on record."""

    key_id: str
    state: str
    provider: str
    master_key: str
    created_at: datetime | None
    since: datetime | None


@dataclass(frozen=True, slots=True)
class Status:
    """What there is to say about a deployment without changing anything."""

    provider: str | None
    secret_file: str | None
    deployment_id: str | None = None
    epoch: int | None = None
    keys: tuple[KeyStatus, ...] = ()
    unknown_settings: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = field(default=())


def status(engine: Engine, settings: Settings | None = None) -> Status:
    """Try everything that a boot does, and report instead of raising.

    That is one KMS call for each live data key; before the first boot, a throw-away key is wrapped and unwrapped. The
    database is only read.
    """
    from .settings import unknown_variables  # noqa: PLC0415 - pydantic is slow to import

    problems: list[Problem] = []
    if settings is None:
        settings = _reported(problems, _settings)
    rows = _reported(problems, lambda: _read(engine))
    found = Status(None, None, unknown_settings=tuple(unknown_variables(os.environ)))
    if settings is not None:
        weaknesses = tuple(settings.weaknesses())
        found = replace(
            found, provider=settings.kms_provider.value, secret_file=str(settings.secret_file), warnings=weaknesses
        )
        _try_boot(engine, settings, rows, problems)
    if rows is not None and rows.control is not None:
        keys = tuple(map(_key_status, rows.keys))
        found = replace(found, deployment_id=rows.control.deployment_id, epoch=rows.control.epoch, keys=keys)
    return replace(found, problems=tuple(problems))


def _try_boot(engine: Engine, settings: Settings, rows: StoredRows | None, problems: list[Problem]) -> None:
    store = _reported(problems, lambda: _key_store(settings))
    if store is None or rows is None:
        return
    _reported(problems, lambda: replace(store, may_provision=False).open(engine))
    if problems and problems[-1].error == NotProvisionedError.__name__ and store.may_provision:
        _reported(problems, store.rehearse)


def _configure(engine: Engine, settings: Settings, provider: KeyProvider | None, blocking: Blocking) -> None:
    if _process.settings is not None:
        _refuse_another(engine, settings, provider)
        return
    for weakness in settings.weaknesses():
        logger.warning("%s", weakness)
    opened: Opened = _key_store(settings, provider).open(engine, encrypted_columns(), blocking=blocking)
    _process.engine, _process.settings, _process.provider = engine, settings, provider
    _process.deployment_id = opened.deployment_id
    publish(opened.keyring)
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
            "This process already uses the key store of another database. A process has one; call reset() first, or "
            "use the engine without configuring it if its values are under the keys that are loaded."
        )


def _settings() -> Settings:
    from .settings import Settings  # noqa: PLC0415 - pydantic is slow to import

    return Settings.from_environment()


def _key_store(settings: Settings, provider: KeyProvider | None = None) -> KeyStore:
    if provider is not None and settings.kms_provider.value != NO_PROVIDER:
        raise ConfigurationError(
            f"configure() was given the provider {provider.name!r}, but the settings name "
            f"{settings.kms_provider.value!r}. Leave one of them out."
        )
    if provider is not None and provider.name in {"", NO_PROVIDER}:
        raise ConfigurationError(f"The provider given to configure() must have a name other than {NO_PROVIDER!r}.")
    return KeyStore(
        provider=_provider(settings) if provider is None else provider,
        secret=None if settings.secret is None else settings.secret.get_secret_value(),
        secret_file=settings.secret_file,
        deployment_id=None if settings.deployment_id is None else str(settings.deployment_id),
        pinned=settings.kms_pinned_keys,
        timeout=settings.kms_timeout,
        may_provision=settings.kms_provision.value != "never",
    )


def _provider(settings: Settings) -> KeyProvider | None:
    """Construct the configured provider; the only place that imports one."""
    from .settings import Provider  # noqa: PLC0415 - pydantic is slow to import

    match settings.kms_provider:
        case Provider.NONE:
            return None
        case Provider.VAULT:
            from .providers.vault import VaultProvider  # noqa: PLC0415 - needs an extra

            return VaultProvider(
                address=settings.kms_vault_addr or "",
                token=_revealed(settings, "kms_vault_token"),
                key=settings.kms_vault_key or "",
                namespace=settings.kms_vault_namespace,
                mount=settings.kms_vault_mount,
                ca_bundle=settings.kms_vault_ca_bundle,
            )
        case Provider.AZURE:
            from .providers.azure import AzureProvider  # noqa: PLC0415 - needs an extra

            return AzureProvider(
                vault_url=settings.kms_azure_vault_url or "",
                key=settings.kms_azure_key or "",
                tenant_id=settings.kms_azure_tenant_id or "",
                client_id=settings.kms_azure_client_id or "",
                client_secret=_revealed(settings, "kms_azure_client_secret"),
                ca_bundle=settings.kms_azure_ca_bundle,
            )


def _revealed(settings: Settings, name: str) -> str:
    secret = getattr(settings, name)
    return "" if secret is None else secret.get_secret_value()


def _read(engine: Engine) -> StoredRows:
    with connect(engine) as connection:
        return read_rows(connection)


def _reported(problems: list[Problem], function: Callable[[], T]) -> T | None:
    try:
        return function()
    except KravnCryptoError as error:
        problems.append(Problem(type(error).__name__, str(error)))
    except SQLAlchemyError as error:
        problems.append(Problem(type(error).__name__, database_error(error)))
    return None


def database_error(error: SQLAlchemyError) -> str:
    """Return the first line of a database's error, without statement and parameters."""
    cause = getattr(error, "orig", None) or error
    return f"The database: {(str(cause).strip() or type(cause).__name__).splitlines()[0]}"


def _key_status(row: KeyRow) -> KeyStatus:
    return KeyStatus(
        key_id=row.key_id or "",
        state=row.state.value,
        provider=row.provider or "",
        master_key=row.master_key or "",
        created_at=_utc(row.created_at),
        since=_utc(row.updated_at),
    )


def _utc(moment: datetime | None) -> datetime | None:
    """Return a time of the database with its zone; SQLite and MariaDB give UTC without one."""
    if moment is None:
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
