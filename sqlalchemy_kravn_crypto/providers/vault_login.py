"""What requests to Vault are authenticated with: a token as it is given, or one that an auth method gives for a login.

Each operation of the provider logs in anew: the next one may be days away, and what there is to log in with may have
been renewed by then.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from requests import Response

from ..exceptions import (
    CredentialError,
    CredentialExpiredError,
    MasterKeyNotFoundError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderSealedError,
    ProviderUnavailableError,
    SettingsError,
)
from ..secrecy import KeepsSecret
from .credentials import Credential, Form, FormedSecret, as_credential, read_secret
from .findings import Validity, validity_of
from .jwt import JWT, claims_of
from .transport import json_object

PROVIDER: Final = "vault"

SERVICE_ACCOUNT_TOKEN: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
"""Where Kubernetes puts the token of a pod's service account, and a new one before that expires."""

CLIENT_CERTIFICATE: Final = "KRAVN_KMS_VAULT_CLIENT_CERT and KRAVN_KMS_VAULT_CLIENT_KEY"

_SEGMENT: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?")
_ROLE_ID: Final = re.compile(r"[!-~]{1,4096}")

Post = Callable[[str, Mapping[str, str]], Response]
"""Sends a JSON object to a path below ``/v1/``, without a token, and returns the answer, whatever its status."""


_TOKEN: Final = Form(
    re.compile(r"[!-~]{1,8192}"), "a token of printable ASCII characters, without spaces or line breaks"
)
_SECRET_ID: Final = Form(
    re.compile(r"[!-~]{1,4096}"), "a secret id of printable ASCII characters, without spaces or line breaks"
)


def _secret(given: str | Credential | None, setting: str, form: Form, auth: str) -> FormedSecret:
    if given is None:
        raise SettingsError(f"KRAVN_KMS_VAULT_AUTH={auth} needs {setting}.")
    return FormedSecret(as_credential(given, setting), form, PROVIDER)


class Login(KeepsSecret, ABC):
    """How a token is come by."""

    subject: str
    """Which token it is, for messages."""

    @abstractmethod
    def token(self, post: Post) -> str:
        """Return a token, for one operation.

        :param post: sends what there is to be sent.
        :raises ProviderError: if there is none to be had.
        """

    @abstractmethod
    def not_accepted(self) -> CredentialExpiredError:
        """Return the error for a token that Vault does not accept."""

    def validity(self) -> Validity | None:
        """Return from when until when what is logged in with is valid, if it says so itself.

        :raises CredentialError: if it cannot be had.
        """
        return None


class GivenToken(Login):
    """A token that somebody else gets and renews.

    :param token: the token.
    :param address: where the Vault is, for messages.
    :raises SettingsError: if the token is missing, or cannot be sent.
    """

    def __init__(self, token: str | Credential | None, address: str) -> None:
        self._address = address
        self._token = _secret(token, "KRAVN_KMS_VAULT_TOKEN", _TOKEN, "token")
        self.subject = f"the token in {self._token.setting}"

    def token(self, post: Post) -> str:  # noqa: ARG002 - nothing is to be sent
        """Return the token as it is now."""
        return self._token.now()

    def not_accepted(self) -> CredentialExpiredError:
        """Return the error for a token that Vault does not accept."""
        return CredentialExpiredError(
            f"The Vault at {self._address} does not accept {self.subject}. It has expired, was revoked or used up, or "
            "never was one of this Vault, or it may not be used from this address: Vault does not tell which. Put a "
            "valid one there.",
            provider=PROVIDER,
        )


class MethodLogin(Login):
    """A token that an auth method gives for a login.

    :param method: the type of the auth method.
    :param mount: where it is mounted; by default at its own name.
    :param address: where the Vault is, for messages.
    :param body: returns what to log in with as it is now.
    :param check: what to check if the login is refused.
    :param validity: returns from when until when it is valid, if it says so itself.
    :raises SettingsError: if ``mount`` is no path.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - each is another thing for each method
        self,
        method: str,
        mount: str | None,
        address: str,
        body: Callable[[], dict[str, str]],
        check: str,
        validity: Callable[[], Validity | None] = lambda: None,
    ) -> None:
        self._method = method
        self._mount = checked_path(method if mount is None else mount, "KRAVN_KMS_VAULT_AUTH_MOUNT")
        self._address = address
        self._body = body
        self._check = check
        self._validity = validity
        self.subject = f"the token of the login at auth/{self._mount}"

    def token(self, post: Post) -> str:
        """Log in, and return the token that it gives."""
        response = post(f"auth/{self._mount}/login", self._body())
        if response.status_code != 200:
            raise self._refusal(response)
        auth = json_object(response.content).get("auth")
        token = auth.get("client_token") if isinstance(auth, dict) else None
        if not isinstance(token, str) or not _TOKEN.pattern.fullmatch(token):
            raise self._malformed()
        return token

    def validity(self) -> Validity | None:
        """Return from when until when what is logged in with is valid, if it says so itself."""
        return self._validity()

    def not_accepted(self) -> CredentialExpiredError:
        """Return the error for a token that Vault gave, and does not accept."""
        return CredentialExpiredError(
            f"The Vault at {self._address} does not accept {self.subject}, which it has just given. Check the role's "
            "token_ttl, token_num_uses and token_bound_cidrs.",
            provider=PROVIDER,
        )

    def _refusal(self, response: Response) -> ProviderError:
        out_of_service = outage(response, self._address)
        if out_of_service is not None:
            return out_of_service
        status = response.status_code
        if status == 404:
            return MasterKeyNotFoundError(
                f"The Vault at {self._address} has nothing to log in at under auth/{self._mount}. Check "
                "KRAVN_KMS_VAULT_NAMESPACE and KRAVN_KMS_VAULT_AUTH_MOUNT.",
                provider=PROVIDER,
            )
        if status not in {400, 401, 403}:
            return self._malformed(f" (HTTP {status})")
        if self._method == "approle" and says(response, "invalid role or secret id", "invalid secret id"):
            return CredentialExpiredError(
                f"The Vault at {self._address} refused the login at auth/{self._mount}. The secret id has expired, was "
                "used up or destroyed, or it or the role id never was one of this Vault: Vault does not tell which. "
                f"Check {self._check}.",
                provider=PROVIDER,
            )
        if self._method in {"jwt", "kubernetes"} and says(response, "token is expired"):
            return CredentialExpiredError(
                f"The Vault at {self._address} refused the login at auth/{self._mount}: the JWT has expired by its "
                "clock. Check that whatever renews it is running, and the clocks of both.",
                provider=PROVIDER,
            )
        return ProviderDeniedError(
            f"The Vault at {self._address} refused the login at auth/{self._mount} (HTTP {status}). Check that an auth "
            f"method of the type {self._method} is mounted there (KRAVN_KMS_VAULT_AUTH_MOUNT), and {self._check}.",
            provider=PROVIDER,
        )

    def _malformed(self, detail: str = "") -> ProviderResponseError:
        return ProviderResponseError(
            f"The server at {self._address} did not answer the login at auth/{self._mount} with a token{detail}. Check "
            f"KRAVN_KMS_VAULT_ADDR, that auth/{self._mount} is of the type {self._method}, and that it wants no second "
            "factor.",
            provider=PROVIDER,
        )


class ClientCertificate:
    """A certificate that is shown in the TLS handshake, read anew for every operation.

    :param certificate: a PEM file with the certificate and those that lead to its authority.
    :param key: a PEM file with its private key, without a passphrase; may be the same file.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate = certificate
        self._key = key

    def load_into(self, context: ssl.SSLContext) -> None:
        """Have connections show the certificate.

        :raises CredentialError: if one of the files cannot be read, or they do not belong together.
        :raises CredentialExpiredError: if the certificate has expired.
        """
        self._refuse_expired()
        loaded = True
        try:
            # The passphrase would else be asked for at the terminal.
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
        except (OSError, ValueError):
            loaded = False
        if not loaded:
            raise CredentialError(
                f"KRAVN_KMS_VAULT_CLIENT_KEY names {self._key}, which cannot be used. It must be readable, and hold in "
                "PEM, without a passphrase, the private key of the first certificate in KRAVN_KMS_VAULT_CLIENT_CERT.",
                provider=PROVIDER,
            )

    def validity(self) -> Validity:
        """Return from when until when the certificate is valid.

        :raises CredentialError: if it cannot be read.
        """
        certificate = self._read()
        return certificate.not_valid_before_utc, certificate.not_valid_after_utc

    def _read(self) -> x509.Certificate:
        text, reason = read_secret(self._certificate)
        certificate = None if reason else _first_certificate(text)
        if certificate is None:
            raise CredentialError(
                f"KRAVN_KMS_VAULT_CLIENT_CERT names {self._certificate}, which cannot be used: "
                f"{reason or 'it holds no certificate in PEM'}.",
                provider=PROVIDER,
            )
        return certificate

    def _refuse_expired(self) -> None:
        end = self._read().not_valid_after_utc
        if end <= dt.datetime.now(dt.UTC):
            raise CredentialExpiredError(
                f"The certificate in KRAVN_KMS_VAULT_CLIENT_CERT ({self._certificate}) expired at {end:%Y-%m-%d %H:%M} "
                "UTC by this machine's clock. Check that whatever renews it is running.",
                provider=PROVIDER,
            )


def login_with(  # noqa: PLR0913 - one for each setting
    auth: str,
    *,
    address: str,
    mount: str | None,
    token: str | Credential | None,
    role_id: str | None,
    secret_id: str | Credential | None,
    role: str | None,
    jwt: str | Credential | None,
) -> Login:
    """Return how to log in, from the settings.

    :param auth: ``token``, or the type of an auth method: ``approle``, ``kubernetes``, ``jwt`` or ``cert``.
    :raises SettingsError: if one of the settings is missing, or not what it must be.
    """
    match auth:
        case "token":
            return GivenToken(token, address)
        case "approle":
            return _approle(mount, address, role_id, secret_id)
        case "kubernetes":
            default = Credential("KRAVN_KMS_VAULT_JWT", path=SERVICE_ACCOUNT_TOKEN)
            check = (
                "that the role in KRAVN_KMS_VAULT_ROLE is for the service account, the namespace and the audience of "
                "the JWT, that its pod still runs, and that the auth method may review tokens (system:auth-delegator)"
            )
            return _with_jwt(auth, mount, address, role, default if jwt is None else jwt, check)
        case "jwt":
            check = (
                "that the role in KRAVN_KMS_VAULT_ROLE is for the issuer, the subject and the audience of the JWT, and "
                "that the auth method has the key that signed it"
            )
            return _with_jwt(auth, mount, address, role, jwt, check)
        case "cert":
            return _cert(mount, address, role)
    raise SettingsError("KRAVN_KMS_VAULT_AUTH must be token, approle, kubernetes, jwt or cert.")


def _approle(mount: str | None, address: str, role_id: str | None, secret_id: str | Credential | None) -> Login:
    if role_id is None or not _ROLE_ID.fullmatch(role_id):
        raise SettingsError(
            "KRAVN_KMS_VAULT_AUTH=approle needs KRAVN_KMS_VAULT_ROLE_ID, a role id of printable ASCII characters."
        )
    secret = _secret(secret_id, "KRAVN_KMS_VAULT_SECRET_ID", _SECRET_ID, "approle")
    check = f"KRAVN_KMS_VAULT_ROLE_ID and {secret.setting}, and from which addresses the role may be used"
    return MethodLogin("approle", mount, address, lambda: {"role_id": role_id, "secret_id": secret.now()}, check)


def _with_jwt(  # noqa: PLR0913, PLR0917 - two auth methods differ in the last two only
    method: str, mount: str | None, address: str, role: str | None, jwt: str | Credential | None, check: str
) -> Login:
    name = _checked_role(role, method)
    secret = _secret(jwt, "KRAVN_KMS_VAULT_JWT", JWT, method)
    return MethodLogin(
        method,
        mount,
        address,
        lambda: {"role": name, "jwt": _unexpired(secret)},
        check,
        lambda: validity_of(_claims(secret.now(), secret.setting)),
    )


def _cert(mount: str | None, address: str, role: str | None) -> Login:
    body = {} if role is None else {"name": _checked_role(role, "cert")}
    which = "some role trusts" if role is None else "the role in KRAVN_KMS_VAULT_ROLE trusts"
    check = f"that {which} the authority of the certificate in KRAVN_KMS_VAULT_CLIENT_CERT, and allows its names"
    return MethodLogin("cert", mount, address, lambda: body, check)


def client_certificate(
    certificate: Path | str | None, key: Path | str | None, auth: str, address: str
) -> ClientCertificate | None:
    """Return the TLS client certificate that the settings name, if they do.

    :raises SettingsError: if they name half of one, none where one is to be logged in with, or one where there is no
        TLS.
    """
    if certificate is None and key is None:
        if auth == "cert":
            raise SettingsError(f"KRAVN_KMS_VAULT_AUTH=cert needs {CLIENT_CERTIFICATE}.")
        return None
    if certificate is None or key is None:
        raise SettingsError(f"{CLIENT_CERTIFICATE} need each other. They may name the same file.")
    if not address.startswith("https:"):
        raise SettingsError(f"{CLIENT_CERTIFICATE} need TLS: KRAVN_KMS_VAULT_ADDR must begin with https://.")
    return ClientCertificate(Path(certificate), Path(key))


def checked_path(path: str, setting: str, *, separator: str | None = "/") -> str:
    """Return a path of names without slashes around it.

    :param setting: the variable that it is from.
    :param separator: what is between two names; None if there may be one only.
    :raises SettingsError: if it is none.
    """
    segments = path.strip(separator).split(separator) if separator else [path]
    if not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise SettingsError(
            f"{setting} must be a name of up to 128 ASCII letters, digits, '_', '-' and '.', which begins and ends "
            f"with a letter, a digit or '_'{', or several such names between slashes' if separator else ''}."
        )
    return "/".join(segments)


def outage(response: Response, address: str) -> ProviderUnavailableError | None:
    """Return the error for an answer that says that the Vault at an address serves nobody now, if it says so."""
    status = response.status_code
    if status == 501 or (status == 503 and says(response, "sealed")):
        return ProviderSealedError(
            f"The Vault at {address} is sealed or not initialised. Unseal it, then start again.", provider=PROVIDER
        )
    if status == 429 or status >= 500:
        return ProviderUnavailableError(
            f"The Vault at {address} could not serve the request (HTTP {status}). Check its health and its rate "
            "limits, then start again.",
            provider=PROVIDER,
        )
    return None


def says(response: Response, *words: str) -> bool:
    """Tell whether an error of the answer contains one of the words, which are in lower case."""
    return any(word in error.lower() for error in _errors(response) for word in words)


def refuses_token(response: Response) -> bool:
    """Tell whether an answer of 403 is about the token itself, and not about what its policies allow.

    Newer releases of HashiCorp Vault call it an ``invalid token``. Older ones, and OpenBao, say no more than
    ``permission denied`` in both cases; but what the policies do not allow, all of them put as ``1 error occurred:``.
    """
    return says(response, "invalid token") or _errors(response) == ["permission denied"]


def _errors(response: Response) -> list[str]:
    errors = json_object(response.content).get("errors")
    return [error for error in errors if isinstance(error, str)] if isinstance(errors, list) else []


def _checked_role(role: str | None, method: str) -> str:
    if role is None:
        raise SettingsError(f"KRAVN_KMS_VAULT_AUTH={method} needs KRAVN_KMS_VAULT_ROLE.")
    return checked_path(role, "KRAVN_KMS_VAULT_ROLE", separator=None)


def _unexpired(secret: FormedSecret) -> str:
    """Return a JWT as it is now, unless it says of itself that it has expired. Whether it is genuine, Vault sees to."""
    jwt = secret.now()
    expires = _claims(jwt, secret.setting).get("exp", math.inf)
    if expires <= time.time():
        since = dt.datetime.fromtimestamp(expires, dt.UTC)
        raise CredentialExpiredError(
            f"The JWT in {secret.setting} expired at {since:%Y-%m-%d %H:%M:%S} UTC by this machine's clock. Check that "
            "whatever renews it is running.",
            provider=PROVIDER,
        )
    return jwt


def _claims(jwt: str, setting: str) -> dict[str, Any]:
    """Return what a JWT says; ``exp`` is a number, if it is there."""
    claims = claims_of(jwt)
    expires = claims.get("exp", math.inf)
    # Python reads NaN from JSON too, and of that no comparison holds.
    if not claims or type(expires) not in {int, float} or not expires >= 0:
        raise CredentialError(
            f"What is in {setting} has the form of a JWT, but its claims cannot be read. Check what writes it.",
            provider=PROVIDER,
        )
    return claims


def _first_certificate(pem: str) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError:
        return None
