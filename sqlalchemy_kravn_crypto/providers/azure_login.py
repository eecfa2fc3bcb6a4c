"""How to log in to Azure: with a secret, a certificate, the token of a workload, or as a managed identity.

Each operation logs in anew and reads again what it logs in with: the next one may be days away. The classes of
``azure-identity`` do it; what they log and what they put into exceptions is why no answer reaches them as it came.
"""

from __future__ import annotations

import datetime as dt
import io
import ipaddress
import json
import os
import re
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ..exceptions import (
    CredentialError,
    CredentialExpiredError,
    ProviderDeniedError,
    ProviderResponseError,
    ProviderUnavailableError,
    SettingsError,
)
from ..secrecy import KeepsSecret
from .credentials import Credential, Form, FormedSecret, as_credential, read_secret
from .extras import import_extra
from .findings import Validity, validity_of

import_extra("azure", "requests", "azure.identity")

from azure.core.pipeline.transport import RequestsTransport  # noqa: E402 - these need the extra
from azure.identity import (  # noqa: E402
    CertificateCredential,
    ClientAssertionCredential,
    ClientSecretCredential,
    ManagedIdentityCredential,
)
from requests import PreparedRequest, Response, Session  # noqa: E402
from requests.adapters import BaseAdapter, HTTPAdapter  # noqa: E402
from urllib3 import HTTPResponse  # noqa: E402

from .jwt import JWT, claims_of  # noqa: E402
from .transport import json_object  # noqa: E402

if TYPE_CHECKING:
    from azure.core.credentials import TokenCredential

PROVIDER: Final = "azure"
"""The name of the provider, in errors."""

HOST: Final = r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
"""What a host name looks like, in lower case: several labels, and no IP address."""

MAX_HOST_LENGTH: Final = 253

_WAYS: Final = ("secret", "certificate", "workload", "managed")

_AUTHORITY: Final = re.compile(rf"https://({HOST})/?")
_TENANT: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
_CLIENT_ID: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_DISCOVERED: Final = ("token_endpoint", "authorization_endpoint", "issuer")
_ACCESS_TOKEN: Final = re.compile(r"[!-~]{1,32768}")
_SECONDS: Final = re.compile(r"[0-9]{1,10}")

# Of https://login.microsoftonline.com/error: a client secret that has expired, an assertion outside of its time,
# and logins that were revoked.
_EXPIRED: Final = frozenset({7000222, 700024, 50173})

_IMDS: Final = "http://169.254.169.254/metadata/identity/oauth2/token"
_HEADER: Final = re.compile(r"[!-~]{1,4096}")
_NEXT_TO_US: Final = re.compile(
    r"http://(?P<host>localhost|[0-9.]+|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?/[A-Za-z0-9._~/-]*"
)

# Where these are set, the SDK asks somebody else, or logs in another way: on a Service Fabric and with Azure Arc ...
_OTHER_HOSTS: Final = ("IDENTITY_SERVER_THUMBPRINT", "IMDS_ENDPOINT")
# ... or, where there is no App Service, in Azure Machine Learning, Cloud Shell and pods.
_OTHER_THAN_APP_SERVICE: Final = ("MSI_ENDPOINT", "AZURE_POD_IDENTITY_AUTHORITY_HOST", "AZURE_FEDERATED_TOKEN_FILE")


_CLIENT_SECRET: Final = Form(re.compile(r"[!-~]{1,1024}"), "up to 1,024 printable ASCII characters")


class Login(KeepsSecret, ABC):
    """One way to log in, for one operation after the other."""

    setting = ""
    """The setting with what it logs in with, if there is one."""
    ends_unknown = False
    """Whether what it logs in with ends at a time that only Azure knows."""

    def validity(self) -> Validity | None:
        """Return from when until when what it logs in with is valid, if it says so itself.

        :raises CredentialError: if it cannot be had.
        """
        return None

    @abstractmethod
    def origins(self) -> tuple[str, ...]:
        """Return what the URLs of all its requests begin with.

        :raises CredentialError: if the environment leads somewhere else.
        """

    @abstractmethod
    def credential(self, transport: RequestsTransport) -> TokenCredential:
        """Read what is to be logged in with, and return what logs in with it, once.

        :raises CredentialError: if it cannot be had.
        :raises CredentialExpiredError: if it says of itself that it is no longer valid.
        """

    @abstractmethod
    def checked(self, response: Response) -> dict[str, object]:
        """Return those fields of an answer that the SDK needs, after checking each.

        :raises ProviderError: if the answer is anything but what was asked for.
        """

    @abstractmethod
    def denied(self) -> ProviderDeniedError:
        """Return the error of a login that was refused."""

    def unreachable(self, error: ProviderUnavailableError) -> ProviderUnavailableError:
        """Return the error of a request that nobody answered."""
        return error


@dataclass(frozen=True, slots=True)
class _Application:
    """The service principal that logs in, and where.

    :param authority: the host of the login service.
    :param tenant_id: its tenant.
    :param client_id: its application.
    """

    authority: str
    tenant_id: str
    client_id: str


class _ApplicationLogin(Login):
    """A login with the login service of Microsoft Entra ID."""

    remedy: str
    """What to check in Azure if it was refused."""

    def __init__(self, application: _Application) -> None:
        self._application = application

    def origins(self) -> tuple[str, ...]:
        return (f"https://{self._application.authority}/",)

    def checked(self, response: Response) -> dict[str, object]:
        status, answer = response.status_code, json_object(response.content)
        if status == 429 or status >= 500:
            raise ProviderUnavailableError(
                f"The login service of Azure at {self._application.authority} could not serve the request (HTTP "
                f"{status}). Check the status of Azure, then start again.",
                provider=PROVIDER,
            )
        if status != 200:
            raise self._expired() if _EXPIRED & _error_codes(answer) else self.denied()
        if urlsplit(response.url).path.endswith("/.well-known/openid-configuration"):
            found = self._discovered(answer)
        else:
            found = _granted(answer, "expires_in")
        if found is None:
            raise ProviderResponseError(
                f"What answered for {self._application.authority} did not answer as the login service of Azure does. "
                "Check KRAVN_KMS_AZURE_AUTHORITY, if it is set, and that no proxy is in between.",
                provider=PROVIDER,
            )
        return found

    def _discovered(self, answer: dict[str, object]) -> dict[str, object] | None:
        found = {field: answer.get(field) for field in _DISCOVERED}
        if not all(isinstance(value, str) for value in found.values()):
            return None
        # A login is sent to it, so it is not for the answer to name another host.
        here = rf"{re.escape(self.origins()[0])}[A-Za-z0-9.-]+/[A-Za-z0-9./_-]+"
        return found if re.fullmatch(here, str(found["token_endpoint"])) else None

    def denied(self) -> ProviderDeniedError:
        return ProviderDeniedError(
            "Azure refused to log in. Check KRAVN_KMS_AZURE_TENANT_ID, which must be the tenant of the key vault too, "
            f"KRAVN_KMS_AZURE_CLIENT_ID, and {self.setting}: {self.remedy}.",
            provider=PROVIDER,
        )

    def _expired(self) -> CredentialExpiredError:
        return CredentialExpiredError(
            f"Azure refused to log in, since what is in {self.setting} is no longer valid: it has expired, or was "
            "revoked. Renew it, and check the clock of this host.",
            provider=PROVIDER,
        )


class _SecretLogin(_ApplicationLogin):
    """A login with a client secret."""

    setting = "KRAVN_KMS_AZURE_CLIENT_SECRET"
    ends_unknown = True
    remedy = "it must be the value of a client secret of the application, and not its id"

    def __init__(self, application: _Application, secret: str | Credential | None) -> None:
        super().__init__(application)
        self._secret = FormedSecret(as_credential(secret or "", self.setting), _CLIENT_SECRET, PROVIDER)

    def credential(self, transport: RequestsTransport) -> TokenCredential:
        return ClientSecretCredential(
            self._application.tenant_id,
            self._application.client_id,
            self._secret.now(),
            authority=self._application.authority,
            disable_instance_discovery=True,
            transport=transport,
            retry_total=0,
        )


class _CertificateLogin(_ApplicationLogin):
    """A login with an assertion that is signed with the private key of a certificate."""

    setting = "KRAVN_KMS_AZURE_CLIENT_CERTIFICATE"
    remedy = "the certificate must be one of the application's, and not have expired there"

    def __init__(self, application: _Application, path: Path | str | None, password: str | Credential | None) -> None:
        super().__init__(application)
        if path is None:
            raise SettingsError(f"{self.setting} must be the path of a PEM file.")
        self._path = Path(path)
        self._password = None if password is None else as_credential(password, f"{self.setting}_PASSWORD")

    def credential(self, transport: RequestsTransport) -> TokenCredential:
        pem, password, certificate = self._read()
        if certificate.not_valid_after_utc <= dt.datetime.now(dt.UTC):
            raise CredentialExpiredError(
                f"The certificate in {self._path}, which {self.setting} names, expired at "
                f"{_moment(certificate.not_valid_after_utc)}. Renew it, or correct the clock of this host.",
                provider=PROVIDER,
            )
        return CertificateCredential(
            self._application.tenant_id,
            self._application.client_id,
            certificate_data=pem,
            password=password,
            authority=self._application.authority,
            disable_instance_discovery=True,
            transport=transport,
            retry_total=0,
        )

    def validity(self) -> Validity:
        certificate = self._read()[2]
        return certificate.not_valid_before_utc, certificate.not_valid_after_utc

    def _read(self) -> tuple[bytes, bytes | None, x509.Certificate]:
        """Return the content of the file, what its private key is encrypted with, and the certificate in it."""
        password = None if self._password is None else self._password.reveal(PROVIDER).encode()
        text, reason = read_secret(self._path)
        certificate = None
        if not reason:
            certificate, reason = _certificate(text.encode(), password)
        if certificate is None:
            raise CredentialError(
                f"{self.setting} names {self._path}, which cannot be used: {reason}. It must be a PEM file with a "
                "certificate and its RSA private key.",
                provider=PROVIDER,
            )
        return text.encode(), password, certificate


class _WorkloadLogin(_ApplicationLogin):
    """A login with the token that Kubernetes or another issuer has for this workload."""

    setting = "KRAVN_KMS_AZURE_FEDERATED_TOKEN"
    remedy = (
        "the application must have a federated credential for the issuer, the subject and the audience of the token"
    )

    def __init__(self, application: _Application, token: str | Credential | None) -> None:
        super().__init__(application)
        self._token = FormedSecret(as_credential(token or "", self.setting), JWT, PROVIDER)

    def credential(self, transport: RequestsTransport) -> TokenCredential:
        token = self._token.now()
        claims = claims_of(token)
        if not claims:
            raise self._token.malformed()
        expires = claims.get("exp")
        if isinstance(expires, int | float) and expires <= time.time():
            raise CredentialExpiredError(
                f"The token in {self.setting} expired at {_moment(_from_timestamp(expires))}. Check that whatever "
                "renews its file is running, and the clock of this host.",
                provider=PROVIDER,
            )
        # Not WorkloadIdentityCredential, which reads the file at most every ten minutes, and from the environment
        # where else to send the token.
        return ClientAssertionCredential(
            self._application.tenant_id,
            self._application.client_id,
            lambda: token,
            authority=self._application.authority,
            transport=transport,
            retry_total=0,
        )

    def validity(self) -> Validity | None:
        return validity_of(claims_of(self._token.now()))


class _ManagedLogin(Login):
    """A login with what Azure knows of the machine: a virtual machine's metadata service, or App Service's endpoint.

    Both are on the machine or on the wire next to it, and speak plain HTTP; nothing else is talked to that way.
    """

    def __init__(self, client_id: str | None) -> None:
        self._client_id = client_id

    def origins(self) -> tuple[str, ...]:
        url = urlsplit(_identity_endpoint())
        return (f"{url.scheme}://{url.netloc}/",)

    def credential(self, transport: RequestsTransport) -> TokenCredential:
        return ManagedIdentityCredential(client_id=self._client_id, transport=transport, retry_total=0)

    def checked(self, response: Response) -> dict[str, object]:
        status = response.status_code
        # 404 and 410 are how the metadata service says that it is being updated.
        if status in {404, 410, 429} or status >= 500:
            raise ProviderUnavailableError(
                f"The endpoint for managed identities at {urlsplit(response.url).netloc} could not serve the request "
                f"(HTTP {status}). Start again in a minute.",
                provider=PROVIDER,
            )
        if status != 200:
            raise self.denied()
        # The SDK reads the one of the metadata service, and the other of App Service.
        lifetime = "expires_in" if response.url.startswith(_IMDS) else "expires_on"
        found = _granted(json_object(response.content), lifetime)
        if found is None:
            raise ProviderResponseError(
                f"What answered at {urlsplit(response.url).netloc} did not answer as an endpoint for managed "
                "identities does. Is this host a virtual machine or an App Service of Azure? See KRAVN_KMS_AZURE_AUTH.",
                provider=PROVIDER,
            )
        return found

    def denied(self) -> ProviderDeniedError:
        return ProviderDeniedError(
            "Azure has no managed identity for this host, or not the one in KRAVN_KMS_AZURE_CLIENT_ID. Assign it to "
            "the virtual machine or the App Service; it must be of the tenant of the key vault.",
            provider=PROVIDER,
        )

    def unreachable(self, error: ProviderUnavailableError) -> ProviderUnavailableError:  # noqa: ARG002 - the base's
        return ProviderUnavailableError(
            "No endpoint for managed identities answered. It is there on virtual machines and App Services of Azure "
            "only, and a network policy may keep containers from it. Elsewhere, set KRAVN_KMS_AZURE_AUTH to another "
            "way to log in.",
            provider=PROVIDER,
        )


def login_of(  # noqa: PLR0913 - one for each setting
    auth: str,
    *,
    authority: str,
    tenant_id: str | None,
    client_id: str | None,
    client_secret: str | Credential | None,
    client_certificate: Path | str | None,
    client_certificate_password: str | Credential | None,
    federated_token: str | Credential | None,
) -> Login:
    """Return the way to log in that the settings name.

    :param auth: ``secret``, ``certificate``, ``workload`` or ``managed``.
    :param authority: the host of the login service.
    :raises SettingsError: if one of the settings that it needs is missing, or is not what it must be.
    """
    if auth not in _WAYS:
        raise SettingsError(f"KRAVN_KMS_AZURE_AUTH must be one of {', '.join(_WAYS)}.")
    if auth == "managed":
        return _ManagedLogin(None if client_id is None else _checked_client_id(client_id))
    application = _Application(
        authority,
        _checked(tenant_id or "", _TENANT, "KRAVN_KMS_AZURE_TENANT_ID", "the GUID or domain of a tenant"),
        _checked_client_id(client_id or ""),
    )
    if auth == "secret":
        return _SecretLogin(application, client_secret)
    if auth == "certificate":
        return _CertificateLogin(application, client_certificate, client_certificate_password)
    return _WorkloadLogin(application, federated_token)


def checked_authority(authority: str) -> str:
    """Return the host of a login service.

    :param authority: ``https://host``.
    :raises SettingsError: if it is anything else.
    """
    found = _AUTHORITY.fullmatch(authority.lower())
    if found is None or len(found[1]) > MAX_HOST_LENGTH:
        raise SettingsError(
            "KRAVN_KMS_AZURE_AUTHORITY must be https:// and the host of a login service, such as "
            "https://login.microsoftonline.com, and nothing after it."
        )
    return found[1]


def confine(session: Session, vault_url: str, login: Login) -> None:
    """Have a session send requests to a key vault and to where one logs in, and to no other host.

    What it discovers, and what the environment says of regions, may name others to the SDK.

    :param session: from ``bounded_session``.
    :param vault_url: ``https://host``.
    :raises CredentialError: if the environment names an endpoint that is not to be talked to.
    """
    bounded = session.get_adapter(vault_url)
    session.adapters.clear()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _NowhereElse())
    for origin in login.origins():
        session.mount(origin, _LoginAdapter(bounded, login))
    session.mount(f"{vault_url}/", bounded)


class _LoginAdapter(HTTPAdapter):
    """Gives the SDK an answer of its own making: the rest of one, it would log or quote in an exception."""

    def __init__(self, bounded: BaseAdapter, login: Login) -> None:
        super().__init__()
        self._bounded = bounded
        self._login = login

    def send(self, request: PreparedRequest, *_: object, **__: object) -> Response:
        unreachable: ProviderUnavailableError
        try:
            response = self._bounded.send(request)
        except ProviderUnavailableError as error:
            unreachable = error
        else:
            content = json.dumps(self._login.checked(response)).encode()
            headers = {"Content-Type": "application/json"}
            return self.build_response(
                request, HTTPResponse(io.BytesIO(content), headers, status=200, preload_content=False)
            )
        raise self._login.unreachable(unreachable)


class _NowhereElse(HTTPAdapter):
    def send(self, *_: object, **__: object) -> Response:
        raise ProviderResponseError(
            "The way to log in to Azure leads to a host that is neither the key vault nor its login service; nothing "
            "was sent there. Unset AZURE_REGIONAL_AUTHORITY_NAME and MSAL_FORCE_REGION. Managed identities of Azure "
            "Arc are not supported.",
            provider=PROVIDER,
        )


def _identity_endpoint() -> str:
    """Return where the SDK will ask for a managed identity, which it finds in the environment."""
    is_app_service = "IDENTITY_ENDPOINT" in os.environ or "IDENTITY_HEADER" in os.environ
    for name in _OTHER_HOSTS if is_app_service else (*_OTHER_HOSTS, *_OTHER_THAN_APP_SERVICE):
        if name in os.environ:
            raise _unsupported(f"{name} is set")
    if not is_app_service:
        return _IMDS
    endpoint = os.environ.get("IDENTITY_ENDPOINT", "")
    if not _is_next_to_us(endpoint):
        raise _unsupported("IDENTITY_ENDPOINT does not begin with http:// and a loopback or link-local address")
    if not _HEADER.fullmatch(os.environ.get("IDENTITY_HEADER", "")):
        raise _unsupported("IDENTITY_HEADER is no header")
    return endpoint


def _unsupported(why: str) -> CredentialError:
    return CredentialError(
        f"Managed identities are taken from virtual machines and App Services of Azure, but {why}. Correct or unset "
        "it, or set KRAVN_KMS_AZURE_AUTH to another way to log in.",
        provider=PROVIDER,
    )


def _is_next_to_us(endpoint: str) -> bool:
    """Tell whether a URL is that of a service on this machine or on the link, over plain HTTP."""
    found = _NEXT_TO_US.fullmatch(endpoint)
    if found is None:
        return False
    if found["host"] == "localhost":
        return True
    try:
        address = ipaddress.ip_address(found["host"].strip("[]"))
    except ValueError:
        return False
    return address.is_loopback or address.is_link_local


def _granted(answer: dict[str, object], lifetime: str) -> dict[str, object] | None:
    token, seconds = answer.get("access_token"), str(answer.get(lifetime))
    if not isinstance(token, str) or not _ACCESS_TOKEN.fullmatch(token) or not _SECONDS.fullmatch(seconds):
        return None
    if str(answer.get("token_type")).lower() != "bearer":
        return None
    return {"token_type": "Bearer", "access_token": token, lifetime: seconds}


def _error_codes(answer: dict[str, object]) -> frozenset[int]:
    codes = answer.get("error_codes")
    return frozenset(code for code in codes if isinstance(code, int)) if isinstance(codes, list) else frozenset()


def _certificate(pem: bytes, password: bytes | None) -> tuple[x509.Certificate | None, str]:
    """Return the certificate of a PEM file, or why it and its private key cannot be used."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        return None, "there is no certificate in it"
    key, reason = _private_key(pem, password)
    if key is None:
        return None, reason
    if key.public_key() != certificate.public_key():
        return None, "its private key is not that of its first certificate"
    return certificate, ""


def _private_key(pem: bytes, password: bytes | None) -> tuple[RSAPrivateKey | None, str]:
    setting = f"{_CertificateLogin.setting}_PASSWORD"
    try:
        key = load_pem_private_key(pem, password)
    except TypeError:
        if password is None:
            return None, f"its private key is encrypted, and {setting} is not set"
        return None, f"its private key is not encrypted, but {setting} is set"
    except (ValueError, UnsupportedAlgorithm):
        wrong = "" if password is None else f", or {setting} is wrong"
        return None, f"there is no private key in it{wrong}"
    return (key, "") if isinstance(key, RSAPrivateKey) else (None, "its private key is no RSA key")


def _from_timestamp(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(max(seconds, 0), dt.UTC)  # what is long before 1970 has no datetime


def _moment(when: dt.datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M:%S} UTC"


def _checked_client_id(client_id: str) -> str:
    return _checked(client_id, _CLIENT_ID, "KRAVN_KMS_AZURE_CLIENT_ID", "the GUID of an application or an identity")


def _checked(value: str, pattern: re.Pattern[str], setting: str, meaning: str) -> str:
    if not pattern.fullmatch(value):
        raise SettingsError(f"{setting} must be {meaning}.")
    return value
