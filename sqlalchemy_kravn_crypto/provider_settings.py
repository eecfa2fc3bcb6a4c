"""The settings of each KMS, and which of them it cannot do without."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, SecretStr


class Provider(StrEnum):
    """Which KMS wraps the data keys, of those that this distribution knows. Entry points add others."""

    NONE = "none"
    VAULT = "vault"
    AZURE = "azure"
    AWS = "aws"
    GCP = "gcp"
    PKCS11 = "pkcs11"


class VaultAuth(StrEnum):
    """How to log in to Vault."""

    TOKEN = "token"  # noqa: S105 - a name
    APPROLE = "approle"
    KUBERNETES = "kubernetes"
    JWT = "jwt"
    CERT = "cert"


class AzureAuth(StrEnum):
    """How to log in to Azure."""

    SECRET = "secret"  # noqa: S105 - a name
    CERTIFICATE = "certificate"
    WORKLOAD = "workload"
    MANAGED = "managed"


class Mechanism(StrEnum):
    """How an HSM wraps."""

    GCM = "aes-gcm"
    KWP = "aes-kwp"


class _Part(BaseModel):
    """Settings that are read as part of all, and so need no validator of their own, which is slow to build."""

    model_config = ConfigDict(defer_build=True)


class ProxySettings(_Part):
    """How the KMS is reached, whichever it is."""

    kms_proxy: str | None = None
    """``http://host:port`` of a proxy that is asked to ``CONNECT``."""

    kms_proxy_user: str | None = None
    kms_proxy_password: SecretStr | None = None


class VaultSettings(_Part):
    """A Transit engine of HashiCorp Vault or OpenBao."""

    kms_vault_addr: str | None = None
    kms_vault_key: str | None = None
    kms_vault_namespace: str | None = None
    kms_vault_mount: str = "transit"
    kms_vault_ca_bundle: Path | None = None

    kms_vault_auth: VaultAuth = VaultAuth.TOKEN
    kms_vault_auth_mount: str | None = None
    """Where the auth method is mounted; by default at its own name."""

    kms_vault_token: SecretStr | None = None
    kms_vault_role_id: str | None = None
    kms_vault_secret_id: SecretStr | None = None
    kms_vault_role: str | None = None
    """The role of the auth method ``kubernetes``, ``jwt`` or ``cert``."""

    kms_vault_jwt: SecretStr | None = None
    kms_vault_client_cert: Path | None = None
    kms_vault_client_key: Path | None = None


class AzureSettings(_Part):
    """A key of Azure Key Vault or Managed HSM."""

    kms_azure_vault_url: str | None = None
    kms_azure_key: str | None = None
    kms_azure_ca_bundle: Path | None = None

    kms_azure_auth: AzureAuth = AzureAuth.SECRET
    kms_azure_authority: str | None = None
    """The login service of a sovereign cloud, ``https://host``."""

    kms_azure_tenant_id: str | None = None
    kms_azure_client_id: str | None = None
    kms_azure_client_secret: SecretStr | None = None
    kms_azure_client_certificate: Path | None = None
    kms_azure_client_certificate_password: SecretStr | None = None
    kms_azure_federated_token: SecretStr | None = None


class AwsSettings(_Part):
    """A key of AWS KMS."""

    kms_aws_key: str | None = None
    """The ARN of the key."""

    kms_aws_endpoint: str | None = None
    kms_aws_ca_bundle: Path | None = None
    kms_aws_profile: str | None = None
    kms_aws_role: str | None = None
    """The ARN of a role to assume."""

    kms_aws_external_id: str | None = None


class GcpSettings(_Part):
    """A key of Google Cloud KMS."""

    kms_gcp_key: str | None = None
    """``projects/…/locations/…/keyRings/…/cryptoKeys/…``."""

    kms_gcp_endpoint: str | None = None
    kms_gcp_ca_bundle: Path | None = None
    kms_gcp_credentials: SecretStr | None = None
    """What the console gives as a JSON file; without it, the default credentials of the machine."""


class Pkcs11Settings(_Part):
    """A key of an HSM."""

    kms_pkcs11_module: Path | None = None
    """The library of the HSM's vendor."""

    kms_pkcs11_token: str | None = None
    kms_pkcs11_pin: SecretStr | None = None
    kms_pkcs11_key: str | None = None
    """The label of the key."""

    kms_pkcs11_key_id: str | None = None
    """Which of several keys of that label wraps, in hexadecimal digits."""

    kms_pkcs11_mechanism: Mechanism = Mechanism.GCM


class ProviderSettings(ProxySettings, VaultSettings, AzureSettings, AwsSettings, GcpSettings, Pkcs11Settings):
    """The settings of all of them."""


SECRETS: Final = (
    "kms_proxy_password",
    "kms_vault_token",
    "kms_vault_secret_id",
    "kms_vault_jwt",
    "kms_azure_client_secret",
    "kms_azure_client_certificate_password",
    "kms_azure_federated_token",
    "kms_gcp_credentials",
    "kms_pkcs11_pin",
)
"""Those that are secrets."""

_TO_LOG_IN: Final = {
    VaultAuth.TOKEN: ("kms_vault_token",),
    VaultAuth.APPROLE: ("kms_vault_role_id", "kms_vault_secret_id"),
    VaultAuth.KUBERNETES: ("kms_vault_role",),
    VaultAuth.JWT: ("kms_vault_role", "kms_vault_jwt"),
    VaultAuth.CERT: ("kms_vault_client_cert", "kms_vault_client_key"),
    AzureAuth.SECRET: ("kms_azure_tenant_id", "kms_azure_client_id", "kms_azure_client_secret"),
    AzureAuth.CERTIFICATE: ("kms_azure_tenant_id", "kms_azure_client_id", "kms_azure_client_certificate"),
    AzureAuth.WORKLOAD: ("kms_azure_tenant_id", "kms_azure_client_id", "kms_azure_federated_token"),
    AzureAuth.MANAGED: (),
}


def required(settings: ProviderSettings, provider: str) -> tuple[str, ...]:
    """Return the names of the settings that a KMS cannot do without."""
    match provider:
        case Provider.VAULT:
            return ("kms_vault_addr", "kms_vault_key", *_TO_LOG_IN[settings.kms_vault_auth])
        case Provider.AZURE:
            return ("kms_azure_vault_url", "kms_azure_key", *_TO_LOG_IN[settings.kms_azure_auth])
        case Provider.AWS:
            return ("kms_aws_key",)
        case Provider.GCP:
            return ("kms_gcp_key",)
        case Provider.PKCS11:
            return ("kms_pkcs11_module", "kms_pkcs11_token", "kms_pkcs11_pin", "kms_pkcs11_key")
        case _:
            return ()
