"""The settings into what they name: a provider, a key store, an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Engine

from .changes import Operator
from .exceptions import ConfigurationError
from .keystore import NO_PROVIDER, KeyStore
from .watch import WatchSettings

if TYPE_CHECKING:
    from .providers.base import KeyProvider
    from .settings import Settings


def settings_from_environment() -> Settings:
    """Read the environment.

    :raises SettingsError: if a setting is wrong.
    """
    from .settings import Settings  # noqa: PLC0415 - pydantic is slow to import

    return Settings.from_environment()


def standby_from_environment() -> KeyProvider:
    """Return the standby KMS that the environment names.

    :raises SettingsError: if it names none, or a setting is wrong.
    """
    from .settings import StandbySettings  # noqa: PLC0415 - pydantic is slow to import

    provider = provider_of(StandbySettings.from_environment())
    if provider is None:
        raise ConfigurationError("The standby must be a KMS.")
    return provider


def operator(
    engine: Engine,
    settings: Settings | None = None,
    *,
    provider: KeyProvider | None = None,
    standby: KeyProvider | None = None,
    actor: str | None = None,
) -> Operator:
    """Return what the commands on the key store need to know.

    :param engine: the engine of the database that holds the key store.
    :param settings: instead of those from the environment.
    :param provider: the KMS, in place of one that the settings name.
    :param standby: the second KMS, for the commands that deal with one.
    :param actor: who it is, for the audit trail; by default the user that the process runs as.
    :raises ConfigurationError: if a setting is wrong.
    """
    settings = settings or settings_from_environment()
    store = key_store(settings, provider)
    return Operator(engine=engine, store=store, standby=standby, actor=actor, lease=settings.lease)


def watch_settings(settings: Settings) -> WatchSettings:
    """Return how a process follows the key store."""
    return WatchSettings(
        interval=settings.look_interval,
        lease=settings.lease,
        fence=settings.fence.value == "transaction",
        may_promote=settings.kms_provision.value != "never",
    )


def key_store(settings: Settings, provider: KeyProvider | None = None) -> KeyStore:
    """Return how the settings open the key store.

    :raises ConfigurationError: if the settings and the provider contradict each other.
    """
    if provider is not None and settings.kms_provider.value != NO_PROVIDER:
        raise ConfigurationError(
            f"configure() was given the provider {provider.name!r}, but the settings name "
            f"{settings.kms_provider.value!r}. Leave one of them out."
        )
    if provider is not None and provider.name in {"", NO_PROVIDER}:
        raise ConfigurationError(f"The provider given to configure() must have a name other than {NO_PROVIDER!r}.")
    return KeyStore(
        provider=provider_of(settings) if provider is None else provider,
        secret=None if settings.secret is None else settings.secret.get_secret_value(),
        secret_file=settings.secret_file,
        deployment_id=None if settings.deployment_id is None else str(settings.deployment_id),
        pinned=settings.kms_pinned_keys,
        timeout=settings.kms_timeout,
        may_provision=settings.kms_provision.value != "never",
        next_secret=None if settings.secret_next is None else settings.secret_next.get_secret_value(),
        retired_secrets=settings.retired_secrets,
    )


def provider_of(settings: Settings) -> KeyProvider | None:
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
