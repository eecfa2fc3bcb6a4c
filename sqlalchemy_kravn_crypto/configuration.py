"""The settings into what they name: a provider, a key store, an operator."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sqlalchemy import Engine

from .changes import Operator
from .exceptions import ConfigurationError
from .keystore import NO_PROVIDER, KeyStore
from .providers.proxy import Proxy, proxy_of
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
    if provider is not None and settings.kms_provider != NO_PROVIDER:
        raise ConfigurationError(
            f"configure() was given the provider {provider.name!r}, but the settings name "
            f"{str(settings.kms_provider)!r}. Leave one of them out."
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
    """Construct the configured provider; the only place that imports one.

    :raises SettingsError: if one of its settings is not what it must be.
    :raises MissingExtraError: if its packages are not installed.
    """
    make = _MAKERS.get(settings.kms_provider)
    if make is not None:
        return make(settings)
    if settings.kms_provider == NO_PROVIDER:
        return None
    from .providers.discovery import provider_from  # noqa: PLC0415 - the others do without
    from .settings import provider_prefix  # noqa: PLC0415 - pydantic is slow to import

    prefix = provider_prefix(settings.kms_provider, str(settings.model_config["env_prefix"]))
    return provider_from(settings.kms_provider, os.environ, prefix)


def _vault(settings: Settings) -> KeyProvider:
    from .providers.vault import VaultProvider  # noqa: PLC0415 - needs an extra

    return VaultProvider(
        address=settings.kms_vault_addr or "",
        token=settings.credential("kms_vault_token"),
        key=settings.kms_vault_key or "",
        namespace=settings.kms_vault_namespace,
        mount=settings.kms_vault_mount,
        ca_bundle=settings.kms_vault_ca_bundle,
        auth=settings.kms_vault_auth.value,
        auth_mount=settings.kms_vault_auth_mount,
        role_id=settings.kms_vault_role_id,
        secret_id=settings.credential("kms_vault_secret_id"),
        role=settings.kms_vault_role,
        jwt=settings.credential("kms_vault_jwt"),
        client_cert=settings.kms_vault_client_cert,
        client_key=settings.kms_vault_client_key,
        proxy=_proxy(settings),
    )


def _azure(settings: Settings) -> KeyProvider:
    from .providers.azure import AzureProvider  # noqa: PLC0415 - needs an extra

    return AzureProvider(
        vault_url=settings.kms_azure_vault_url or "",
        key=settings.kms_azure_key or "",
        tenant_id=settings.kms_azure_tenant_id,
        client_id=settings.kms_azure_client_id,
        client_secret=settings.credential("kms_azure_client_secret"),
        ca_bundle=settings.kms_azure_ca_bundle,
        auth=settings.kms_azure_auth.value,
        authority=settings.kms_azure_authority,
        client_certificate=settings.kms_azure_client_certificate,
        client_certificate_password=settings.credential("kms_azure_client_certificate_password"),
        federated_token=settings.credential("kms_azure_federated_token"),
        proxy=_proxy(settings),
    )


def _aws(settings: Settings) -> KeyProvider:
    from .providers.aws import AwsProvider  # noqa: PLC0415 - needs an extra

    return AwsProvider(
        key=settings.kms_aws_key or "",
        endpoint=settings.kms_aws_endpoint,
        ca_bundle=settings.kms_aws_ca_bundle,
        profile=settings.kms_aws_profile,
        role=settings.kms_aws_role,
        external_id=settings.kms_aws_external_id,
        proxy=_proxy(settings),
    )


def _gcp(settings: Settings) -> KeyProvider:
    from .providers.gcp import GcpProvider  # noqa: PLC0415 - needs an extra

    return GcpProvider(
        key=settings.kms_gcp_key or "",
        endpoint=settings.kms_gcp_endpoint,
        ca_bundle=settings.kms_gcp_ca_bundle,
        credentials=settings.credential("kms_gcp_credentials"),
        proxy=_proxy(settings),
    )


def _pkcs11(settings: Settings) -> KeyProvider:
    from .providers.pkcs11 import Pkcs11Provider  # noqa: PLC0415 - needs an extra

    return Pkcs11Provider(
        module=settings.kms_pkcs11_module or "",
        token=settings.kms_pkcs11_token or "",
        pin=settings.credential("kms_pkcs11_pin"),
        key=settings.kms_pkcs11_key or "",
        key_id=settings.kms_pkcs11_key_id,
        mechanism=settings.kms_pkcs11_mechanism.value,
    )


def _proxy(settings: Settings) -> Proxy | None:
    password = settings.kms_proxy_password
    return proxy_of(
        settings.kms_proxy, settings.kms_proxy_user, None if password is None else password.get_secret_value()
    )


_MAKERS: Final[dict[str, Callable[[Settings], KeyProvider]]] = {
    "vault": _vault,
    "azure": _azure,
    "aws": _aws,
    "gcp": _gcp,
    "pkcs11": _pkcs11,
}
