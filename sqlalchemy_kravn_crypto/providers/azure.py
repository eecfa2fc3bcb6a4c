"""Data keys wrapped by an RSA key of Azure Key Vault or Managed HSM, with RSA-OAEP-256.

The right it needs is the role Key Vault Crypto User on the key, of which it uses ``wrapKey`` and ``unwrapKey``.

The SDK's ``CryptographyClient`` is not used: it fetches the public key and wraps with it locally, which proves nothing
about the right to unwrap, and reports the name it was given in place of the version that wrapped.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import urlsplit

from ..derivation import KEY_SIZE
from ..exceptions import (
    MasterKeyNotFoundError,
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
    SettingsError,
    UnwrapRefusedError,
)
from .base import Deadline, KeyProvider, WrappedKey
from .extras import import_extra

import_extra("azure", "requests", "azure.identity", "azure.keyvault.keys")

from azure.core.exceptions import ClientAuthenticationError  # noqa: E402 - these need the extra
from azure.core.pipeline.transport import RequestsTransport  # noqa: E402
from azure.core.rest import HttpRequest  # noqa: E402
from azure.identity import AzureAuthorityHosts, ClientSecretCredential  # noqa: E402
from azure.keyvault.keys import KeyClient  # noqa: E402
from requests import Response  # noqa: E402

from .transport import (  # noqa: E402
    Resolve,
    Route,
    as_given,
    bounded_session,
    detached,
    json_object,
    provider_error_behind,
    tls_context,
)

_ALGORITHM: Final = "RSA-OAEP-256"
_RSA_SIZES: Final = frozenset({256, 384, 512})  # bytes

_AUTHORITIES: Final = {
    "vault.azure.net": AzureAuthorityHosts.AZURE_PUBLIC_CLOUD,
    "managedhsm.azure.net": AzureAuthorityHosts.AZURE_PUBLIC_CLOUD,
    "vault.azure.cn": AzureAuthorityHosts.AZURE_CHINA,
    "managedhsm.azure.cn": AzureAuthorityHosts.AZURE_CHINA,
    "vault.usgovcloudapi.net": AzureAuthorityHosts.AZURE_GOVERNMENT,
    "managedhsm.usgovcloudapi.net": AzureAuthorityHosts.AZURE_GOVERNMENT,
}

_VAULT_URL: Final = re.compile(r"https://([a-z0-9](?:[a-z0-9-]{0,125}[a-z0-9])?)\.([a-z.]+)/?")
_KEY: Final = re.compile(r"([A-Za-z0-9-]{1,127})(?:/([0-9A-Fa-f]{32}))?")
_TENANT: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
_CLIENT_ID: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_CLIENT_SECRET: Final = re.compile(r"[!-~]{1,1024}")

_VERSION: Final = re.compile(r"[0-9A-Fa-f]{32}")

_DISCOVERED: Final = ("token_endpoint", "authorization_endpoint", "issuer")
_GRANTED: Final = ("access_token", "token_type")

_UNUSABLE: Final = frozenset({"keydisabled", "keyexpired", "keynotyetvalid", "keyoperationforbidden"})


class AzureProvider(KeyProvider):
    """Wraps data keys under an RSA key, as a service principal with a client secret.

    RSA-OAEP takes no additional data and needs the public key only: a wrapped key is bound to nothing, and whoever
    knows the public key can make one. ``binding`` is therefore unused.

    :param vault_url: such as ``https://kravn.vault.azure.net``.
    :param key: the name of the master key, which wraps under its newest version, or ``name/version``.
    :param tenant_id: the tenant of the service principal.
    :param client_id: the service principal.
    :param client_secret: its secret.
    :param ca_bundle: a PEM file with the CA certificates to trust instead of the public ones.
    :param resolve: maps the host and port of a URL to those that are connected to.
    :param sleep: waits a number of seconds between two attempts.
    :raises SettingsError: if one of them is not what it must be.
    """

    name: ClassVar[str] = "azure"
    authenticates: ClassVar[bool] = False
    binds: ClassVar[bool] = False

    def __init__(  # noqa: PLR0913 - one for each setting
        self,
        *,
        vault_url: str,
        key: str,
        tenant_id: str,
        client_id: str,
        client_secret: str,
        ca_bundle: Path | str | None = None,
        resolve: Resolve = as_given,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._vault_url, self._authority = _checked_vault_url(vault_url)
        self._host = self._vault_url.removeprefix("https://")
        self._key, self._version = _checked_key(key)
        self._tenant_id = _checked(tenant_id, _TENANT, "KRAVN_KMS_AZURE_TENANT_ID", "the GUID or domain of a tenant")
        self._client_id = _checked(client_id, _CLIENT_ID, "KRAVN_KMS_AZURE_CLIENT_ID", "the GUID of an application")
        self._client_secret = _checked(
            client_secret, _CLIENT_SECRET, "KRAVN_KMS_AZURE_CLIENT_SECRET", "up to 1,024 printable ASCII characters"
        )
        self._route = Route(tls_context(ca_bundle, "KRAVN_KMS_AZURE_CA_BUNDLE"), resolve, sleep)

    def __repr__(self) -> str:
        return f"<AzureProvider {self.master_key}>"

    @property
    def master_key(self) -> str:
        """The key identifier without a version: ``https://<vault>/keys/<name>``."""
        return f"{self._vault_url}/keys/{self._key}"

    def recognises(self, master_key: str) -> bool:
        """Tell whether ``master_key`` is the identifier of any version of the configured key."""
        return self._version_of(master_key) is not None

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:  # noqa: ARG002 - no AAD in OAEP
        """Wrap a data key under the newest version of the master key, or the configured one."""
        key_identifier, blob = self._call("wrapkey", self._version, data_key, deadline)
        if len(blob) not in _RSA_SIZES:
            raise self._malformed()
        return WrappedKey(key_identifier, blob)

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:  # noqa: ARG002 - no AAD in OAEP
        """Unwrap a data key under the recorded version of the master key."""
        version = self._version_of(wrapped.master_key)
        if version is None:
            raise UnwrapRefusedError(
                f"The data key is recorded as wrapped under the master key {wrapped.master_key}, no version of "
                f"{self.master_key}. Check KRAVN_KMS_AZURE_VAULT_URL and KRAVN_KMS_AZURE_KEY.",
                provider=self.name,
            )
        _, data_key = self._call("unwrapkey", version, wrapped.blob, deadline)
        if len(data_key) != KEY_SIZE:
            raise self._malformed()
        return data_key

    def _call(self, operation: str, version: str, value: bytes, deadline: Deadline) -> tuple[str, bytes]:
        """Return the identifier of the version that was used, and the result."""
        status, answer = self._post(operation, version, value, deadline)
        if status != 200:
            raise self._refusal(status, answer, operation)
        key_identifier, result = answer.get("kid"), _decoded(answer.get("value"))
        if not isinstance(key_identifier, str) or result is None:
            raise self._malformed()
        used = self._version_of(key_identifier)
        if used is None or (version and used != version):
            raise self._malformed()
        return f"{self.master_key}/{used}", result

    def _post(self, operation: str, version: str, value: bytes, deadline: Deadline) -> tuple[int, dict[str, object]]:
        """Send one operation and return the status and the JSON object of the answer, whatever they are."""
        # The SDK too sends an empty version where it means the newest: /keys/name//wrapkey.
        request = HttpRequest(
            "POST", f"keys/{self._key}/{version}/{operation}", json={"alg": _ALGORITHM, "value": _encoded(value)}
        )
        error: ProviderError
        try:
            with bounded_session(deadline, self.name, self._route, inspect=self._inspect) as session:
                transport = RequestsTransport(session=session, session_owner=False)
                credential = ClientSecretCredential(
                    self._tenant_id,
                    self._client_id,
                    self._client_secret,
                    authority=self._authority,
                    disable_instance_discovery=True,
                    transport=transport,
                    retry_total=0,
                )
                client = KeyClient(
                    self._vault_url, credential, transport=transport, retry_total=0, permit_redirects=False
                )
                # Streamed, since what is not is parsed and, where that fails, quoted in an exception.
                response = client.send_request(request, stream=True)
                return response.status_code, json_object(response.read())
        # Whatever the SDK raises may quote what was sent or received, and callers are promised ProviderErrors.
        except Exception as raised:  # noqa: BLE001
            error = provider_error_behind(raised) or (
                self._denied_login() if isinstance(raised, ClientAuthenticationError) else self._malformed()
            )
        raise detached(error)

    def _inspect(self, response: Response) -> None:
        """Keep every answer of the login service from the SDK that it would quote in a log or an exception."""
        url = urlsplit(response.url)
        if url.hostname == self._host:
            return
        status = response.status_code
        if status == 429 or status >= 500:
            raise self._unavailable(status, "login service")
        if status != 200:
            raise self._denied_login()
        answer = json_object(response.content)
        fields = _DISCOVERED if url.path.endswith("/.well-known/openid-configuration") else _GRANTED
        if not all(isinstance(answer.get(field), str) for field in fields):
            raise self._malformed()

    def _version_of(self, key_identifier: str) -> str | None:
        """Return the version that an identifier names, or None unless it is one of the configured key."""
        base, _, version = key_identifier.rpartition("/")
        # Names are the same in upper and lower case to Key Vault.
        same_key = base.lower() == self.master_key.lower()
        return version.lower() if same_key and _VERSION.fullmatch(version) else None

    def _refusal(self, status: int, answer: dict[str, object], operation: str) -> ProviderError:
        if status == 429 or status >= 500:
            return self._unavailable(status, "key vault")
        if status == 404:
            return MasterKeyNotFoundError(
                f"The key vault {self._host} has no master key {self._key}, or not the version of it that was asked "
                "for. Check KRAVN_KMS_AZURE_VAULT_URL and KRAVN_KMS_AZURE_KEY; a deleted key can be recovered.",
                provider=self.name,
            )
        if (
            status == 409
            or (status == 403 and _UNUSABLE & _codes(answer))
            or (status == 400 and operation == "wrapkey")
        ):
            return MasterKeyUnusableError(
                f"The key vault {self._host} does not allow the master key {self._key} to be used for {operation}. It "
                "must be an RSA key that is enabled, within its dates, not being deleted, and permits wrapKey and "
                "unwrapKey.",
                provider=self.name,
            )
        if status in {401, 403}:
            return ProviderDeniedError(
                f"The key vault {self._host} refused {operation} with the master key {self._key} (HTTP {status}). The "
                "application in KRAVN_KMS_AZURE_CLIENT_ID needs the role Key Vault Crypto User on the key, and the "
                "vault's firewall must let this host in.",
                provider=self.name,
            )
        if status == 400:
            return UnwrapRefusedError(
                f"The key vault {self._host} refused to unwrap a data key under the master key {self._key}: the "
                "wrapped key was altered, or is not under this version. Check that the database and "
                "KRAVN_KMS_AZURE_KEY belong together.",
                provider=self.name,
            )
        return self._malformed()

    def _unavailable(self, status: int, what: str) -> ProviderUnavailableError:
        return ProviderUnavailableError(
            f"The {what} of Azure could not serve the request (HTTP {status}). Check the status of Azure and the "
            f"limits of {self._host}, then start again.",
            provider=self.name,
        )

    def _denied_login(self) -> ProviderDeniedError:
        return ProviderDeniedError(
            "Azure refused to log in. Check KRAVN_KMS_AZURE_TENANT_ID, which must be the tenant of "
            f"{self._host} too, KRAVN_KMS_AZURE_CLIENT_ID, and KRAVN_KMS_AZURE_CLIENT_SECRET, which may have expired.",
            provider=self.name,
        )

    def _malformed(self) -> ProviderResponseError:
        return ProviderResponseError(
            f"What answered for {self._host} did not answer as a key vault does. Check KRAVN_KMS_AZURE_VAULT_URL, and "
            "that no proxy is in between.",
            provider=self.name,
        )


def _codes(answer: dict[str, object]) -> frozenset[str]:
    """Return the codes of an error answer and of the errors inside of it, in lower case."""
    codes = set()
    error = answer.get("error")
    while isinstance(error, dict):
        named = {name.lower(): value for name, value in error.items()}
        if isinstance(named.get("code"), str):
            codes.add(named["code"].lower())
        error = named.get("innererror")
    return frozenset(codes)


def _encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _decoded(text: object) -> bytes | None:
    """Decode unpadded base64url of the one form that encoding gives."""
    if not isinstance(text, str):
        return None
    try:
        value = base64.b64decode(text + "=" * (-len(text) % 4), altchars="-_", validate=True)
    except ValueError:
        return None
    return value if _encoded(value) == text else None


def _checked(value: str, pattern: re.Pattern[str], setting: str, meaning: str) -> str:
    if not pattern.fullmatch(value):
        raise SettingsError(f"{setting} must be {meaning}.")
    return value


def _checked_key(key: str) -> tuple[str, str]:
    found = _KEY.fullmatch(key)
    if not found:
        raise SettingsError(
            "KRAVN_KMS_AZURE_KEY must be the name of a key, of up to 127 ASCII letters, digits and '-', or "
            "name/version with a version of 32 hexadecimal characters."
        )
    return found[1], (found[2] or "").lower()


def _checked_vault_url(vault_url: str) -> tuple[str, str]:
    """Return the URL in the form that key identifiers have, and the host that logs in for its cloud."""
    found = _VAULT_URL.fullmatch(vault_url.lower())
    authority = _AUTHORITIES.get(found[2]) if found else None
    if found is None or authority is None:
        raise SettingsError(
            "KRAVN_KMS_AZURE_VAULT_URL must be https:// and the host of a key vault, such as "
            "https://kravn.vault.azure.net, and nothing after it. The host ends with one of: "
            f"{', '.join(_AUTHORITIES)}."
        )
    return f"https://{found[1]}.{found[2]}", authority
