"""Data keys wrapped by an RSA key of Azure Key Vault or Managed HSM, with RSA-OAEP-256.

The rights it needs are to wrap and to unwrap with the key, of those that the role Key Vault Crypto User has.

The SDK's ``CryptographyClient`` is not used: it fetches the public key and wraps with it locally, which proves nothing
about the right to unwrap, and reports the name it was given in place of the version that wrapped.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from ..derivation import KEY_SIZE
from ..exceptions import (
    CredentialExpiredError,
    MasterKeyNotFoundError,
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
    SettingsError,
    UnwrapRefusedError,
)
from .base import Deadline, Finding, KeyProvider, WrappedKey, detached
from .credentials import Credential
from .extras import import_extra
from .proxy import Proxy

import_extra("azure", "requests", "azure.identity", "azure.keyvault.keys")

from azure.core.exceptions import ClientAuthenticationError  # noqa: E402 - these need the extra
from azure.core.pipeline.transport import RequestsTransport  # noqa: E402
from azure.core.rest import HttpRequest  # noqa: E402
from azure.identity import AzureAuthorityHosts  # noqa: E402
from azure.keyvault.keys import KeyClient  # noqa: E402

from .azure_examination import ExaminedAzure, NotedCredential, ReadKey, examine_azure  # noqa: E402
from .azure_login import HOST, MAX_HOST_LENGTH, PROVIDER, checked_authority, confine, login_of  # noqa: E402
from .inspection import Server  # noqa: E402
from .transport import (  # noqa: E402
    Resolve,
    Route,
    as_given,
    bounded_session,
    json_object,
    provider_error_behind,
    tls_context,
)

if TYPE_CHECKING:
    from azure.core.credentials import TokenCredential

_CA_BUNDLE: Final = "KRAVN_KMS_AZURE_CA_BUNDLE"
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

_VAULT_URL: Final = re.compile(rf"https://({HOST})/?")
_KEY: Final = re.compile(r"([A-Za-z0-9-]{1,127})(?:/([0-9A-Fa-f]{32}))?")
_VERSION: Final = re.compile(r"[0-9A-Fa-f]{32}")

_UNUSABLE: Final = frozenset({"keydisabled", "keyexpired", "keynotyetvalid", "keyoperationforbidden"})


class _Answer(NamedTuple):
    status: int
    body: dict[str, object]
    revoked: bool
    """Whether it says that the login was valid and no longer is (continuous access evaluation)."""


class AzureProvider(KeyProvider):
    """Wraps data keys under an RSA key.

    RSA-OAEP takes no additional data and needs the public key only: a wrapped key is bound to nothing, and whoever
    knows the public key can make one. ``binding`` is therefore unused.

    :param vault_url: such as ``https://kravn.vault.azure.net``.
    :param key: the name of the master key, which wraps under its newest version, or ``name/version``.
    :param tenant_id: the tenant that logs in, for all but managed identities.
    :param client_id: the application that logs in, or a managed identity that a user assigned.
    :param client_secret: its secret, for ``auth="secret"``.
    :param ca_bundle: a PEM file with the CA certificates to trust instead of the public ones.
    :param auth: how to log in: ``secret``, ``certificate``, ``workload`` or ``managed``.
    :param authority: the login service of a sovereign or private cloud, ``https://host``; by default that of the key
        vault's cloud.
    :param client_certificate: a PEM file with a certificate and its private key, for ``auth="certificate"``.
    :param client_certificate_password: what the private key is encrypted with, if it is.
    :param federated_token: a token of the issuer that the application trusts, for ``auth="workload"``.
    :param proxy: what requests go through, other than those for a managed identity.
    :param resolve: maps the host and port of a URL to those that are connected to.
    :param sleep: waits a number of seconds between two attempts.
    :raises SettingsError: if one of them is not what it must be.
    """

    name = PROVIDER
    authenticates = False
    binds = False

    def __init__(  # noqa: PLR0913 - one for each setting
        self,
        *,
        vault_url: str,
        key: str,
        tenant_id: str | None = None,
        client_id: str | None = None,
        client_secret: str | Credential | None = None,
        ca_bundle: Path | str | None = None,
        auth: str = "secret",
        authority: str | None = None,
        client_certificate: Path | str | None = None,
        client_certificate_password: str | Credential | None = None,
        federated_token: str | Credential | None = None,
        proxy: Proxy | None = None,
        resolve: Resolve = as_given,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        given = None if authority is None else checked_authority(authority)
        self._vault_url, login_host = _checked_vault_url(vault_url, given)
        self._host = self._vault_url.removeprefix("https://")
        self._key, self._version = _checked_key(key)
        self._login = login_of(
            auth,
            authority=login_host,
            tenant_id=tenant_id,
            client_id=client_id,
            client_secret=client_secret,
            client_certificate=client_certificate,
            client_certificate_password=client_certificate_password,
            federated_token=federated_token,
        )
        self._ca_bundle = ca_bundle
        self._route = Route(tls_context(ca_bundle, _CA_BUNDLE), resolve, sleep, proxy)

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
        answer = self._post(operation, version, value, deadline)
        if answer.status != 200:
            raise self._refusal(answer, operation)
        key_identifier, result = answer.body.get("kid"), _decoded(answer.body.get("value"))
        if not isinstance(key_identifier, str) or result is None:
            raise self._malformed()
        used = self._version_of(key_identifier)
        if used is None or (version and used != version):
            raise self._malformed()
        return f"{self.master_key}/{used}", result

    def examine(self, deadline: Deadline) -> Iterator[Finding]:
        """Find out how long the login lasts, and whether the key may be read, which wrapping does without."""
        servers = tuple(self._servers())
        read_key = partial(self._read_key, deadline)
        return examine_azure(ExaminedAzure(servers, self._route, self._login, read_key), deadline)

    def _servers(self) -> Iterator[Server]:
        """Return the servers that are talked to over TLS, each with a URL that it answers to anybody."""
        vault = f"{self._vault_url}/keys/{self._key}"
        yield Server("the key vault", vault, "KRAVN_KMS_AZURE_VAULT_URL", _CA_BUNDLE, self._ca_bundle)
        for origin in self._login.origins():
            if origin.startswith("https:"):
                login = f"{origin}common/v2.0/.well-known/openid-configuration"
                yield Server("the login service", login, "KRAVN_KMS_AZURE_AUTHORITY", _CA_BUNDLE, self._ca_bundle)

    def _read_key(self, deadline: Deadline) -> ReadKey:
        """Log in and try to read the key, which needs a right that wrapping does not."""
        noted: list[NotedCredential] = []

        def note(credential: TokenCredential) -> TokenCredential:
            noted.append(NotedCredential(credential))
            return noted[-1]

        request = HttpRequest("GET", "/".join(filter(None, ("keys", self._key, self._version))))
        answer = self._sent(request, deadline, note)
        if answer.status in {200, 403, 404}:
            return ReadKey(answer.status, answer.body, _codes(answer.body), noted[0].ends)
        raise self._malformed() if answer.status == 400 else self._refusal(answer, "to be read")

    def _post(self, operation: str, version: str, value: bytes, deadline: Deadline) -> _Answer:
        """Log in, send one operation and return the answer, whatever it says."""
        # The SDK too sends an empty version where it means the newest: /keys/name//wrapkey.
        request = HttpRequest(
            "POST", f"keys/{self._key}/{version}/{operation}", json={"alg": _ALGORITHM, "value": _encoded(value)}
        )
        return self._sent(request, deadline)

    def _sent(
        self,
        request: HttpRequest,
        deadline: Deadline,
        note: Callable[[TokenCredential], TokenCredential] = lambda credential: credential,
    ) -> _Answer:
        """Log in, send a request and return the answer, whatever it says.

        :param note: is given what logs in, and returns it or what takes its place.
        """
        error: ProviderError
        try:
            with bounded_session(deadline, self.name, self._route) as session:
                confine(session, self._vault_url, self._login)
                transport = RequestsTransport(session=session, session_owner=False)
                client = KeyClient(
                    self._vault_url,
                    note(self._login.credential(transport)),
                    transport=transport,
                    retry_total=0,
                    permit_redirects=False,
                )
                # Streamed, since what is not is parsed and, where that fails, quoted in an exception.
                response = client.send_request(request, stream=True)
                revoked = "claims=" in response.headers.get("WWW-Authenticate", "")
                return _Answer(response.status_code, json_object(response.read()), revoked)
        # Whatever the SDK raises may quote what was sent or received, and callers are promised ProviderErrors.
        except Exception as raised:  # noqa: BLE001
            error = provider_error_behind(raised) or (
                self._login.denied() if isinstance(raised, ClientAuthenticationError) else self._malformed()
            )
        raise detached(error)

    def _version_of(self, key_identifier: str) -> str | None:
        """Return the version that an identifier names, or None unless it is one of the configured key."""
        base, _, version = key_identifier.rpartition("/")
        # Names are the same in upper and lower case to Key Vault.
        same_key = base.lower() == self.master_key.lower()
        return version.lower() if same_key and _VERSION.fullmatch(version) else None

    def _refusal(self, answer: _Answer, operation: str) -> ProviderError:
        status = answer.status
        if status == 429 or status >= 500:
            return self._unavailable(status)
        if status == 404:
            return MasterKeyNotFoundError(
                f"The key vault {self._host} has no master key {self._key}, or not the version of it that was asked "
                "for. Check KRAVN_KMS_AZURE_VAULT_URL and KRAVN_KMS_AZURE_KEY; a deleted key can be recovered.",
                provider=self.name,
            )
        if (
            status == 409
            or (status == 403 and _UNUSABLE & _codes(answer.body))
            or (status == 400 and operation == "wrapkey")
        ):
            return MasterKeyUnusableError(
                f"The key vault {self._host} does not allow the master key {self._key} to be used for {operation}. It "
                "must be an RSA key that is enabled, within its dates, not being deleted, and permits wrapKey and "
                "unwrapKey.",
                provider=self.name,
            )
        if status in {401, 403}:
            return self._denied(answer, operation)
        if status == 400:
            return UnwrapRefusedError(
                f"The key vault {self._host} refused to unwrap a data key under the master key {self._key}: the "
                "wrapped key was altered, or is not under this version. Check that the database and "
                "KRAVN_KMS_AZURE_KEY belong together.",
                provider=self.name,
            )
        return self._malformed()

    def _denied(self, answer: _Answer, operation: str) -> ProviderDeniedError:
        if answer.status == 403:
            return ProviderDeniedError(
                f"The key vault {self._host} refused {operation} with the master key {self._key} (HTTP 403). Who logs "
                "in needs the role Key Vault Crypto User on the key, or another that may wrap and unwrap, and the "
                "firewall of the key vault must let this host in.",
                provider=self.name,
            )
        # HTTP 401: this is about the login, which Azure had just given.
        if answer.revoked:
            return CredentialExpiredError(
                f"The key vault {self._host} no longer accepts the login: it was revoked. Check in Microsoft Entra ID "
                "whether who logs in was disabled or blocked.",
                provider=self.name,
            )
        return ProviderDeniedError(
            f"The key vault {self._host} does not accept a login that Azure has just given. Who logs in must be of the "
            "tenant of the key vault: check KRAVN_KMS_AZURE_TENANT_ID, and KRAVN_KMS_AZURE_AUTHORITY if it is set.",
            provider=self.name,
        )

    def _unavailable(self, status: int) -> ProviderUnavailableError:
        return ProviderUnavailableError(
            f"The key vault {self._host} could not serve the request (HTTP {status}). Check the status of Azure and "
            "the limits of the key vault, then start again.",
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


def _checked_key(key: str) -> tuple[str, str]:
    found = _KEY.fullmatch(key)
    if not found:
        raise SettingsError(
            "KRAVN_KMS_AZURE_KEY must be the name of a key, of up to 127 ASCII letters, digits and '-', or "
            "name/version with a version of 32 hexadecimal characters."
        )
    return found[1], (found[2] or "").lower()


def _checked_vault_url(vault_url: str, authority: str | None) -> tuple[str, str]:
    """Return the URL in the form that key identifiers have, and the host that logs in for it.

    :param authority: that host, if the settings name it: then the key vault may be of a cloud that is not known here.
    """
    found = _VAULT_URL.fullmatch(vault_url.lower())
    if authority is None and found is not None:
        authority = _AUTHORITIES.get(found[1].partition(".")[2])
    if found is None or authority is None or len(found[1]) > MAX_HOST_LENGTH:
        raise SettingsError(
            "KRAVN_KMS_AZURE_VAULT_URL must be https:// and the host of a key vault, such as "
            "https://kravn.vault.azure.net, and nothing after it. Unless KRAVN_KMS_AZURE_AUTHORITY is set, the host is "
            f"a name before one of: {', '.join(_AUTHORITIES)}."
        )
    return f"https://{found[1]}", authority
