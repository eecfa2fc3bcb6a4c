"""Data keys wrapped by the Transit engine of HashiCorp Vault or OpenBao.

The right it needs is ``update`` on ``<mount>/encrypt/<key>`` and ``<mount>/decrypt/<key>``, and nothing else. With
``create`` as well, Transit answers a misspelt key by making a new one.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Final, Protocol

from ..derivation import KEY_SIZE
from ..exceptions import (
    MasterKeyNotFoundError,
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderSealedError,
    ProviderUnavailableError,
    SettingsError,
    UnwrapRefusedError,
)
from .base import MAX_MASTER_KEY_LENGTH, Deadline, KeyProvider, WrappedKey
from .extras import import_extra

_adapters, _engines, _ = import_extra("vault", "hvac.adapters", "hvac.api.secrets_engines", "requests")

from requests import Response  # noqa: E402 - needs the extra

from .transport import Resolve, Route, as_given, bounded_session, detached, json_object, tls_context  # noqa: E402

_SEGMENT: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?")
_ADDRESS: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?/?"
)
_TOKEN: Final = re.compile(r"[!-~]{1,8192}")
_CIPHERTEXT: Final = re.compile(r"vault:v([1-9][0-9]{0,9}):[A-Za-z0-9+/]+={0,2}")
_NO_CIPHERTEXT: Final = "vault:v1:" + base64.b64encode(bytes(12 + KEY_SIZE + 16)).decode()
_VERSION_ROOM: Final = len(":v") + 10


class _Transit(Protocol):
    """The two calls of hvac's ``Transit``, which has no type annotations, as they are made here."""

    def encrypt_data(self, name: str, *, plaintext: str, associated_data: str, mount_point: str) -> Response: ...

    def decrypt_data(self, name: str, *, ciphertext: str, associated_data: str, mount_point: str) -> Response: ...


class VaultProvider(KeyProvider):
    """Wraps data keys under a key of a Transit engine, bound by its ``associated_data``.

    The master key must be of an AEAD type: ``aes256-gcm96``, Transit's own default, ``aes128-gcm96`` or
    ``chacha20-poly1305``.

    :param address: ``https://host[:port]``; ``http://`` for a loopback host only.
    :param token: what authenticates the requests.
    :param key: the name of the master key.
    :param namespace: the namespace that the engine is in, if any.
    :param mount: where the engine is mounted.
    :param ca_bundle: a PEM file with the CA certificates to trust instead of the public ones.
    :param resolve: maps the address's host and port to those that are connected to.
    :param sleep: waits a number of seconds between two attempts.
    :raises SettingsError: if one of them is not what it must be.
    """

    name: ClassVar[str] = "vault"
    authenticates: ClassVar[bool] = True
    binds: ClassVar[bool] = True

    def __init__(  # noqa: PLR0913 - one for each setting
        self,
        *,
        address: str,
        token: str,
        key: str,
        namespace: str | None = None,
        mount: str = "transit",
        ca_bundle: Path | str | None = None,
        resolve: Resolve = as_given,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address = _checked_address(address)
        self._token = _checked_token(token)
        self._key = _checked_path(key, "KRAVN_KMS_VAULT_KEY", separator=None)
        self._mount = _checked_path(mount, "KRAVN_KMS_VAULT_MOUNT")
        self._namespace = _checked_path(namespace, "KRAVN_KMS_VAULT_NAMESPACE") if namespace else None
        self._master_key = "/".join(part for part in (self._namespace, self._mount, self._key) if part)
        if len(self._master_key) > MAX_MASTER_KEY_LENGTH - _VERSION_ROOM:
            raise SettingsError("KRAVN_KMS_VAULT_NAMESPACE and KRAVN_KMS_VAULT_MOUNT are too long together.")
        self._route = Route(tls_context(ca_bundle, "KRAVN_KMS_VAULT_CA_BUNDLE"), resolve, sleep)

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
        response = self._post("encrypt", base64.b64encode(data_key).decode(), binding, deadline)
        if response.status_code == 403 and self._is_missing(deadline):
            raise self._not_found()
        ciphertext = self._field(response, "encrypt", "ciphertext")
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
        data_key = _decoded(self._field(self._post("decrypt", ciphertext, binding, deadline), "decrypt", "plaintext"))
        if data_key is None or len(data_key) != KEY_SIZE:
            raise self._malformed()
        return data_key

    def _post(self, operation: str, value: str, binding: bytes, deadline: Deadline) -> Response:
        """Send one operation and return the answer, whatever its status."""
        plain_http = self._address.startswith("http:")
        bound = base64.b64encode(binding).decode()
        error: ProviderError
        try:
            with bounded_session(deadline, self.name, self._route, plain_http=plain_http) as session:
                # The adapter rather than hvac.Client, which takes what is missing from VAULT_* variables and
                # ~/.vault-token; and no exceptions of hvac's, which quote the answer.
                adapter = _adapters.RawAdapter(
                    base_uri=self._address,
                    token=self._token,
                    namespace=self._namespace,
                    session=session,
                    allow_redirects=False,
                    ignore_exceptions=True,
                )
                transit: _Transit = _engines.Transit(adapter)
                if operation == "encrypt":
                    return transit.encrypt_data(
                        self._key, plaintext=value, associated_data=bound, mount_point=self._mount
                    )
                return transit.decrypt_data(self._key, ciphertext=value, associated_data=bound, mount_point=self._mount)
        except ProviderError as raised:
            error = raised
        # Whatever else the SDK raises may quote what was sent, and callers are promised ProviderErrors.
        except Exception:  # noqa: BLE001
            error = self._malformed()
        raise detached(error)

    def _field(self, response: Response, operation: str, field: str) -> str:
        if response.status_code != 200:
            raise self._refusal(response, operation)
        data = json_object(response.content).get("data")
        value = data.get(field) if isinstance(data, dict) else None
        if not isinstance(value, str):
            raise self._malformed()
        return value

    def _is_missing(self, deadline: Deadline) -> bool:
        """Tell whether the master key is missing, where ``encrypt`` was denied.

        To encrypt under a key that is missing is to create it, so Transit denies that for want of ``create``, in the
        words it has for any denial. To decrypt is not, and then Transit says what is wrong.
        """
        return _says(self._post("decrypt", _NO_CIPHERTEXT, b"", deadline), "key not found")

    def _refusal(self, response: Response, operation: str) -> ProviderError:
        status = response.status_code
        if status == 501 or (status == 503 and _says(response, "sealed")):
            return ProviderSealedError(
                f"The Vault at {self._address} is sealed or not initialised. Unseal it, then start again.",
                provider=self.name,
            )
        if status == 429 or status >= 500:
            return ProviderUnavailableError(
                f"The Vault at {self._address} could not serve the request (HTTP {status}). Check its health and its "
                "rate limits, then start again.",
                provider=self.name,
            )
        if status in {401, 403}:
            return ProviderDeniedError(
                f"The Vault at {self._address} refused to {operation} under the master key {self._master_key}. Either "
                "KRAVN_KMS_VAULT_TOKEN is wrong or expired, or its policies lack the capability update on "
                f"{self._mount}/{operation}/{self._key}.",
                provider=self.name,
            )
        if status == 404 or _says(response, "key not found"):
            return self._not_found()
        if status == 400:
            return self._bad_request(response, operation)
        return self._malformed(f" (HTTP {status})")

    def _bad_request(self, response: Response, operation: str) -> ProviderError:
        if _says(response, "too old"):
            return MasterKeyUnusableError(
                f"The version of the master key {self._master_key} that wrapped the data key is older than its "
                "min_decryption_version allows. Lower that again if the version was not trimmed, and rewrap the data "
                "keys before raising it.",
                provider=self.name,
            )
        if operation == "encrypt" or _says(response, "soft-deleted", "non-aead", "key derivation"):
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


def _says(response: Response, *words: str) -> bool:
    """Tell whether an error of the answer contains one of the words, which are in lower case."""
    errors = json_object(response.content).get("errors")
    if not isinstance(errors, list):
        return False
    return any(word in error.lower() for error in errors if isinstance(error, str) for word in words)


def _version_of(ciphertext: str) -> str | None:
    found = _CIPHERTEXT.fullmatch(ciphertext)
    return found[1] if found else None


def _decoded(text: str) -> bytes | None:
    """Decode base64 of the one form that encoding gives."""
    try:
        value = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return value if base64.b64encode(value).decode() == text else None


def _checked_path(path: str, setting: str, *, separator: str | None = "/") -> str:
    segments = path.strip(separator).split(separator) if separator else [path]
    if not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise SettingsError(
            f"{setting} must be a name of up to 128 ASCII letters, digits, '_', '-' and '.', which begins and ends "
            f"with a letter, a digit or '_'{', or several such names between slashes' if separator else ''}."
        )
    return "/".join(segments)


def _checked_token(token: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise SettingsError(
            "KRAVN_KMS_VAULT_TOKEN must be a token of printable ASCII characters, without spaces or line breaks."
        )
    return token


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
