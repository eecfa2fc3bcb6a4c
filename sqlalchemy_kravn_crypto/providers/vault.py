"""Data keys wrapped by the Transit engine of HashiCorp Vault or OpenBao.

The right it needs is ``update`` on ``<mount>/encrypt/<key>`` and ``<mount>/decrypt/<key>``, and nothing else. With
``create`` as well, Transit answers a misspelt key by making a new one.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from ..base64_text import from_base64, to_base64
from ..derivation import KEY_SIZE
from ..exceptions import (
    CredentialError,
    MasterKeyNotFoundError,
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    SettingsError,
    UnwrapRefusedError,
)
from .base import MAX_MASTER_KEY_LENGTH, Deadline, Finding, KeyProvider, WrappedKey, detached
from .credentials import Credential
from .extras import import_extra
from .proxy import Proxy

_adapters, _engines, _ = import_extra("vault", "hvac.adapters", "hvac.api.secrets_engines", "requests")

from requests import Response, Session  # noqa: E402 - these need the extra

from .inspection import Server  # noqa: E402
from .transport import Resolve, Route, as_given, bounded_session, json_object, tls_context  # noqa: E402
from .vault_examination import ExaminedVault, examine_vault  # noqa: E402
from .vault_login import (  # noqa: E402
    CLIENT_CERTIFICATE,
    checked_path,
    client_certificate,
    login_with,
    outage,
    refuses_token,
    says,
)

_ADDRESS: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?/?"
)
_CIPHERTEXT: Final = re.compile(r"vault:v([1-9][0-9]{0,9}):[A-Za-z0-9+/]+={0,2}")
_NO_CIPHERTEXT: Final = "vault:v1:" + to_base64(bytes(12 + KEY_SIZE + 16))
_VERSION_ROOM: Final = len(":v") + 10
_CA_BUNDLE: Final = "KRAVN_KMS_VAULT_CA_BUNDLE"


class _Transit(Protocol):
    """The two calls of hvac's ``Transit``, which has no type annotations, as they are made here."""

    def encrypt_data(self, name: str, *, plaintext: str, associated_data: str, mount_point: str) -> Response: ...

    def decrypt_data(self, name: str, *, ciphertext: str, associated_data: str, mount_point: str) -> Response: ...


class VaultProvider(KeyProvider):
    """Wraps data keys under a key of a Transit engine, bound by its ``associated_data``.

    The master key must be of an AEAD type: ``aes256-gcm96``, Transit's own default, ``aes128-gcm96`` or
    ``chacha20-poly1305``.

    :param address: ``https://host[:port]``; ``http://`` for a loopback host only.
    :param token: what authenticates the requests, with ``auth="token"``.
    :param key: the name of the master key.
    :param namespace: the namespace that the engine and the auth method are in, if any.
    :param mount: where the engine is mounted.
    :param ca_bundle: a PEM file with the CA certificates to trust instead of the public ones.
    :param auth: ``token``, or the type of the auth method to log in with: ``approle``, ``kubernetes``, ``jwt`` or
        ``cert``.
    :param auth_mount: where the auth method is mounted; by default at its own name.
    :param role_id: the role id of ``approle``.
    :param secret_id: the secret id of ``approle``.
    :param role: the role of ``kubernetes``, ``jwt`` or ``cert``; for the last, any that fits by default.
    :param jwt: what proves to ``kubernetes`` or ``jwt`` who it is; by default, for the former, the token that the pod's
        service account has in a file.
    :param client_cert: a PEM file with the TLS client certificate to show, whatever ``auth`` is.
    :param client_key: a PEM file with its private key.
    :param proxy: what the connections go through.
    :param resolve: maps the address's host and port to those that are connected to.
    :param sleep: waits a number of seconds between two attempts.
    :raises SettingsError: if one of them is not what it must be.
    """

    name = "vault"
    authenticates = True
    binds = True

    def __init__(  # noqa: PLR0913 - one for each setting
        self,
        *,
        address: str,
        token: str | Credential | None = None,
        key: str,
        namespace: str | None = None,
        mount: str = "transit",
        ca_bundle: Path | str | None = None,
        auth: str = "token",
        auth_mount: str | None = None,
        role_id: str | None = None,
        secret_id: str | Credential | None = None,
        role: str | None = None,
        jwt: str | Credential | None = None,
        client_cert: Path | str | None = None,
        client_key: Path | str | None = None,
        proxy: Proxy | None = None,
        resolve: Resolve = as_given,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address = _checked_address(address)
        self._key = checked_path(key, "KRAVN_KMS_VAULT_KEY", separator=None)
        self._mount = checked_path(mount, "KRAVN_KMS_VAULT_MOUNT")
        self._namespace = checked_path(namespace, "KRAVN_KMS_VAULT_NAMESPACE") if namespace else None
        self._master_key = "/".join(part for part in (self._namespace, self._mount, self._key) if part)
        if len(self._master_key) > MAX_MASTER_KEY_LENGTH - _VERSION_ROOM:
            raise SettingsError("KRAVN_KMS_VAULT_NAMESPACE and KRAVN_KMS_VAULT_MOUNT are too long together.")
        self._login = login_with(
            auth,
            address=self._address,
            mount=auth_mount,
            token=token,
            role_id=role_id,
            secret_id=secret_id,
            role=role,
            jwt=jwt,
        )
        self._client_certificate = client_certificate(client_cert, client_key, auth, self._address)
        self._ca_bundle = ca_bundle
        self._route = Route(
            tls_context(ca_bundle, _CA_BUNDLE), resolve, sleep, proxy, client_certificate=CLIENT_CERTIFICATE
        )

    def __repr__(self) -> str:
        return f"<VaultProvider {self._master_key} at {self._address}>"

    @property
    def master_key(self) -> str:
        """``[namespace/]mount/key``."""
        return self._master_key

    def recognises(self, master_key: str) -> bool:
        """Tell whether ``master_key`` is ``[namespace/]mount/key:vN`` of the configured key."""
        path, _, version = master_key.rpartition(":v")
        return path == self._master_key and version.isascii() and version.isdecimal()

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        """Wrap a data key under the newest version of the master key."""
        plaintext, bound = to_base64(data_key), to_base64(binding)

        def encrypt(transit: _Transit) -> Response:
            response = transit.encrypt_data(
                self._key, plaintext=plaintext, associated_data=bound, mount_point=self._mount
            )
            if response.status_code == 403 and not refuses_token(response) and self._is_missing(transit, bound):
                raise self._not_found()
            return response

        ciphertext = self._field(self._logged_in(deadline, encrypt), "encrypt", "ciphertext")
        version = _version_of(ciphertext)
        if version is None:
            raise self._malformed()
        return WrappedKey(f"{self._master_key}:v{version}", ciphertext.encode())

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        """Unwrap a data key under the version of the master key that its wrapped key names."""
        ciphertext = wrapped.blob.decode("ascii", "replace")
        version = _version_of(ciphertext)
        if version is None or wrapped.master_key != f"{self._master_key}:v{version}":
            raise UnwrapRefusedError(
                f"The data key is recorded as wrapped under the master key {wrapped.master_key}, and its wrapped key "
                f"is not one of {self._master_key}. Check KRAVN_KMS_VAULT_NAMESPACE, KRAVN_KMS_VAULT_MOUNT and "
                "KRAVN_KMS_VAULT_KEY.",
                provider=self.name,
            )
        bound = to_base64(binding)
        response = self._logged_in(deadline, lambda transit: self._decrypt(transit, ciphertext, bound))
        data_key = from_base64(self._field(response, "decrypt", "plaintext"))
        if data_key is None or len(data_key) != KEY_SIZE:
            raise self._malformed()
        return data_key

    def _decrypt(self, transit: _Transit, ciphertext: str, bound: str) -> Response:
        return transit.decrypt_data(self._key, ciphertext=ciphertext, associated_data=bound, mount_point=self._mount)

    def _is_missing(self, transit: _Transit, bound: str) -> bool:
        """Tell whether the master key is missing, where ``encrypt`` was denied.

        To encrypt under a key that is missing is to create it, so Transit denies that for want of ``create``, in the
        words it has for any denial. To decrypt is not, and then Transit says what is wrong.
        """
        return says(self._decrypt(transit, _NO_CIPHERTEXT, bound), "key not found")

    def examine(self, deadline: Deadline) -> Iterator[Finding]:
        """Find out how long the token lasts and what else it may do; each question takes a login of its own."""
        return examine_vault(
            ExaminedVault(
                server=Server(
                    what="the Vault",
                    url=f"{self._address}/v1/sys/seal-status",
                    setting="KRAVN_KMS_VAULT_ADDR",
                    ca_setting=_CA_BUNDLE,
                    ca_bundle=self._ca_bundle,
                ),
                route=self._route,
                current_route=self._current_route,
                login=self._login,
                client_certificate=self._client_certificate,
                send=lambda path, body: self._authenticated(deadline, partial(_sent, path=path, body=body)),
                mount=self._mount,
                key=self._key,
            ),
            deadline,
        )

    def _logged_in(self, deadline: Deadline, operation: Callable[[_Transit], Response]) -> Response:
        """Log in, do one operation with the token, and return its answer, whatever its status."""
        return self._authenticated(deadline, lambda adapter: operation(_engines.Transit(adapter)))

    def _authenticated(self, deadline: Deadline, operation: Callable[[Any], Response]) -> Response:
        """Log in, do something with an adapter that has the token, and return the answer, whatever its status."""
        plain_http = self._address.startswith("http:")
        error: ProviderError
        try:
            with bounded_session(deadline, self.name, self._current_route(), plain_http=plain_http) as session:
                anonymous = self._adapter(session, None)

                def post(path: str, body: Mapping[str, str]) -> Response:
                    response: Response = anonymous.post(f"/v1/{path}", json=dict(body))
                    return response

                token = self._login.token(post)
                return operation(self._adapter(session, token))
        except ProviderError as raised:
            error = raised
        # Whatever else the SDK raises may quote what was sent, and callers are promised ProviderErrors.
        except Exception:  # noqa: BLE001
            error = self._malformed()
        raise detached(error)

    def _current_route(self) -> Route:
        """Return the route with the client certificate as it is now."""
        if self._client_certificate is None:
            return self._route
        try:
            tls = tls_context(self._ca_bundle, _CA_BUNDLE)
        except SettingsError as raised:
            failure = str(raised)
        else:
            self._client_certificate.load_into(tls)
            return replace(self._route, tls=tls)
        raise CredentialError(failure, provider=self.name)

    def _adapter(self, session: Session, token: str | None) -> Any:
        # The adapter rather than hvac.Client, which takes what is missing from VAULT_* variables and ~/.vault-token;
        # and no exceptions of hvac's, which quote the answer.
        return _adapters.RawAdapter(
            base_uri=self._address,
            token=token,
            namespace=self._namespace,
            session=session,
            allow_redirects=False,
            ignore_exceptions=True,
        )

    def _field(self, response: Response, operation: str, field: str) -> str:
        if response.status_code != 200:
            raise self._refusal(response, operation)
        data = json_object(response.content).get("data")
        value = data.get(field) if isinstance(data, dict) else None
        if not isinstance(value, str):
            raise self._malformed()
        return value

    def _refusal(self, response: Response, operation: str) -> ProviderError:
        out_of_service = outage(response, self._address)
        if out_of_service is not None:
            return out_of_service
        status = response.status_code
        if status == 403 and refuses_token(response):
            return self._login.not_accepted()
        if status in {401, 403}:
            return self._denied(response, operation)
        if status == 404 or says(response, "key not found"):
            return self._not_found()
        if status == 400:
            return self._bad_request(response, operation)
        return self._malformed(f" (HTTP {status})")

    def _denied(self, response: Response, operation: str) -> ProviderDeniedError:
        right = f"the capability update on {self._mount}/{operation}/{self._key}"
        if says(response, "permission denied"):
            why = f"The policies of {self._login.subject} lack {right}, or give it for other associated data only."
        else:
            why = (
                f"It does not say why: check that {self._login.subject} is valid and that its policies have {right}, "
                "and that no proxy answers in its place."
            )
        return ProviderDeniedError(
            f"The Vault at {self._address} refused to {operation} under the master key {self._master_key} (HTTP "
            f"{response.status_code}). {why}",
            provider=self.name,
        )

    def _bad_request(self, response: Response, operation: str) -> ProviderError:
        if says(response, "too old"):
            return MasterKeyUnusableError(
                f"The version of the master key {self._master_key} that wrapped the data key is older than its "
                "min_decryption_version allows. Lower that again if the version was not trimmed, and rewrap the data "
                "keys before raising it.",
                provider=self.name,
            )
        if operation == "encrypt" or says(response, "soft-deleted", "non-aead", "key derivation"):
            return MasterKeyUnusableError(
                f"The master key {self._master_key} cannot wrap data keys. It must be of type aes256-gcm96 or another "
                "AEAD type, not derived, and not deleted. Check KRAVN_KMS_VAULT_KEY.",
                provider=self.name,
            )
        return UnwrapRefusedError(
            f"The Vault at {self._address} refused to unwrap a data key under the master key {self._master_key}: the "
            "wrapped key was altered, belongs to another deployment, or the master key was deleted and made anew. "
            "Check that the database and KRAVN_KMS_VAULT_KEY belong together.",
            provider=self.name,
        )

    def _not_found(self) -> MasterKeyNotFoundError:
        return MasterKeyNotFoundError(
            f"The Vault at {self._address} has no master key {self._master_key}. Check KRAVN_KMS_VAULT_KEY, "
            "KRAVN_KMS_VAULT_MOUNT and KRAVN_KMS_VAULT_NAMESPACE, or create the key: vault write -f "
            f"{self._mount}/keys/{self._key}",
            provider=self.name,
        )

    def _malformed(self, detail: str = "") -> ProviderResponseError:
        return ProviderResponseError(
            f"The server at {self._address} did not answer as a Transit engine does{detail}. Check "
            "KRAVN_KMS_VAULT_ADDR, and that KRAVN_KMS_VAULT_MOUNT is a Transit engine.",
            provider=self.name,
        )


def _sent(adapter: Any, *, path: str, body: Mapping[str, Any] | None) -> Response:
    response: Response = adapter.get(f"/v1/{path}") if body is None else adapter.post(f"/v1/{path}", json=dict(body))
    return response


def _version_of(ciphertext: str) -> str | None:
    found = _CIPHERTEXT.fullmatch(ciphertext)
    return found[1] if found else None


def _checked_address(address: str) -> str:
    found = _ADDRESS.fullmatch(address)
    if not found or int(found["port"] or 443) not in range(1, 65536):
        raise SettingsError(
            "KRAVN_KMS_VAULT_ADDR must be https:// and a host, with a port if it is not 443, and nothing after it."
        )
    if found["scheme"] == "http" and not _is_loopback(found["host"]):
        raise SettingsError(
            "KRAVN_KMS_VAULT_ADDR must begin with https://. http:// is taken for a loopback host only, since the token "
            "and the data keys would travel in the clear."
        )
    return address.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
