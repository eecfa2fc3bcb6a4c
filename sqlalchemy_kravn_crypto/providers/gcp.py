"""Data keys wrapped by a key of Google Cloud KMS, through gRPC.

The rights it needs are ``cloudkms.cryptoKeyVersions.useToEncrypt`` and ``useToDecrypt`` on the key, and nothing else.

The SDK's client is not used, only its messages: it logs requests with the data key in them, repeats for a minute
whatever the deadline says, and takes answers of any size.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

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
from .base import MAX_WRAPPED_KEY_SIZE, Deadline, Finding, KeyProvider, WrappedKey, detached
from .credentials import Credential, as_credential
from .extras import import_extra
from .fork_gate import ForkGate
from .proxy import Proxy

import_extra("gcp", "google.auth", "google_crc32c", "grpc", "requests")
import_extra("gcp", "google.cloud.kms_v1")  # after grpc, for want of which it raises an error of its own

import certifi  # noqa: E402 - comes with requests, and these need the extra
import google_crc32c  # noqa: E402
import grpc  # noqa: E402
from google.cloud.kms_v1 import (  # noqa: E402
    DecryptRequest,
    DecryptResponse,
    EncryptRequest,
    EncryptResponse,
)

from .gcp_examination import ExaminedGcp, examine_gcp  # noqa: E402
from .gcp_login import SETTING, GoogleLogin  # noqa: E402
from .inspection import Server  # noqa: E402
from .transport import MAX_ANSWER_SIZE, Resolve, Route, as_given, tls_context  # noqa: E402

_CA_BUNDLE: Final = "KRAVN_KMS_GCP_CA_BUNDLE"
_ENDPOINT: Final = "cloudkms.googleapis.com"
_SERVICE: Final = "/google.cloud.kms.v1.KeyManagementService"

_KEY: Final = re.compile(
    r"projects/(?:[a-z0-9.-]{1,100}:)?[a-z0-9][a-z0-9-]{0,62}/locations/[a-z0-9-]{1,63}"
    r"/keyRings/[A-Za-z0-9_-]{1,63}/cryptoKeys/[A-Za-z0-9_-]{1,63}"
)
_VERSION: Final = re.compile(r"/cryptoKeyVersions/[1-9][0-9]{0,17}")
_HOST: Final = re.compile(r"(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)(?::(?P<port>[0-9]{1,5}))?")

_PAUSES: Final = (0.2, 0.8)
"""Seconds before the second and the third attempt, which is the last."""

_GATE: Final = ForkGate()

_CHANNEL: Final[tuple[tuple[str, str | int], ...]] = (
    ("grpc.max_receive_message_length", MAX_ANSWER_SIZE),
    # Else it lets a server send more and more that nobody has read: tens of megabytes with some releases.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", MAX_ANSWER_SIZE),
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    # Nothing of http_proxy, https_proxy and grpc_proxy, and nothing of GRPC_ADDRESS_HTTP_PROXY.
    ("grpc.enable_http_proxy", 0),
    ("grpc.address_http_proxy_enabled_addresses", ""),
    # Longer than any operation, so that no ping is sent; but without it, there is no time-out below either.
    ("grpc.keepalive_time_ms", 300_000),
)

_TRANSIENT: Final = frozenset(
    {
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
    }
)
"""What over HTTP would be 429, 5xx or a lost connection."""

_NOT_ACCEPTED: Final = (
    "{host} does not accept the login, or no longer: the service account or its key was deleted or disabled, or the "
    "clock of this machine is wrong. Renew what {setting}_FILE or the default credentials name."
)
_DENIED: Final = (
    "Google Cloud KMS refused {operation} with the master key {key}, or there is no such key. The login needs "
    "cloudkms.cryptoKeyVersions.useTo{operation} on it, as in the role Cloud KMS CryptoKey {operation}er; the Cloud "
    "KMS API must be enabled in its project, and no VPC Service Controls perimeter may be in between."
)
_NOT_FOUND: Final = (
    "Google Cloud KMS has no master key {key}. Check KRAVN_KMS_GCP_KEY: project, location, key ring and key."
)
_UNUSABLE: Final = (
    "Google Cloud KMS does not allow {operation} with the master key {key}. Its primary version, or the version that "
    "wrapped the data key, must be enabled: gcloud kms keys versions list shows it, enable and restore bring it back. "
    "The purpose of the key must be symmetric encryption, and its location one that {host} serves."
)

_REFUSALS: Final[dict[grpc.StatusCode, tuple[type[ProviderError], str]]] = {
    grpc.StatusCode.UNAUTHENTICATED: (CredentialExpiredError, _NOT_ACCEPTED),
    grpc.StatusCode.PERMISSION_DENIED: (ProviderDeniedError, _DENIED),
    grpc.StatusCode.NOT_FOUND: (MasterKeyNotFoundError, _NOT_FOUND),
    grpc.StatusCode.FAILED_PRECONDITION: (MasterKeyUnusableError, _UNUSABLE),
    grpc.StatusCode.INVALID_ARGUMENT: (MasterKeyUnusableError, _UNUSABLE),
}
"""What a status means that is not for the moment only. ``{operation}`` is ``Encrypt`` or ``Decrypt``."""


class _Trouble(Enum):
    """What gRPC itself found wrong, by the words that it has for it."""

    TRUST = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification", "peer certificate")
    TUNNEL = ("HTTP proxy",)
    SIZE = ("larger than max", "exceeds hard limit")
    PROTOCOL = ("Failed parsing HTTP/2", "http1.x server", "ALPN property", "header with status: 3")


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a call has no answer, without the text that came with it."""

    status: grpc.StatusCode
    trouble: _Trouble | None = None

    @property
    def may_pass(self) -> bool:
        return self.trouble is None and self.status in _TRANSIENT


class GcpProvider(KeyProvider):
    """Wraps data keys under a symmetric key of Cloud KMS, bound by its additional authenticated data.

    :param key: ``projects/<project>/locations/<location>/keyRings/<ring>/cryptoKeys/<key>``, which wraps under its
        primary version.
    :param endpoint: ``host[:port]`` of a regional endpoint or one of Private Service Connect.
    :param ca_bundle: a PEM file with the CA certificates to trust instead of the public ones.
    :param credentials: the JSON text of a credentials file; without it, the default credentials of the machine.
    :param proxy: what the connections go through, if anything.
    :param resolve: maps a host and its port to those that are connected to.
    :param sleep: waits a number of seconds between two attempts.
    :raises SettingsError: if one of them is not what it must be.
    """

    name = "gcp"
    authenticates = True
    binds = True

    def __init__(  # noqa: PLR0913 - one for each setting
        self,
        *,
        key: str,
        endpoint: str | None = None,
        ca_bundle: Path | str | None = None,
        credentials: str | Credential | None = None,
        proxy: Proxy | None = None,
        resolve: Resolve = as_given,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not _KEY.fullmatch(key):
            raise SettingsError(
                "KRAVN_KMS_GCP_KEY must be projects/<project>/locations/<location>/keyRings/<ring>/cryptoKeys/<key>, "
                "as gcloud kms keys list shows it, without a version."
            )
        self._key = key
        self._host, self._port = _checked_endpoint(endpoint or _ENDPOINT)
        tls = tls_context(ca_bundle, _CA_BUNDLE)
        self._ca_bundle = ca_bundle
        # gRPC has a TLS of its own, and would look for certificates where the environment says.
        self._roots = Path(ca_bundle or certifi.where()).read_bytes()
        self._route = Route(tls, resolve, sleep, proxy)
        # Never connected. Without any channel gRPC shuts down, and a process that forks while it does so has a child in
        # which gRPC hangs.
        self._awake = grpc.insecure_channel("dns:///localhost")
        self._login = GoogleLogin(None if credentials is None else as_credential(credentials, SETTING), self._route)

    def __repr__(self) -> str:
        return f"<GcpProvider {self._key} at {self._host}>"

    @property
    def master_key(self) -> str:
        """The resource name of the key, without a version."""
        return self._key

    def recognises(self, master_key: str) -> bool:
        """Tell whether ``master_key`` is the resource name of any version of the configured key."""
        return master_key.startswith(self._key) and _VERSION.fullmatch(master_key.removeprefix(self._key)) is not None

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        """Wrap a data key under the primary version of the master key."""
        request = EncryptRequest(
            name=self._key,
            plaintext=data_key,
            plaintext_crc32c=google_crc32c.value(data_key),
            additional_authenticated_data=binding,
            additional_authenticated_data_crc32c=google_crc32c.value(binding),
        )
        answer = self._parsed(EncryptResponse, self._call("Encrypt", EncryptRequest.serialize(request), deadline))
        if (
            not answer.verified_plaintext_crc32c
            or not answer.verified_additional_authenticated_data_crc32c
            or answer.ciphertext_crc32c != google_crc32c.value(answer.ciphertext)
        ):
            raise self._damaged()
        if not self.recognises(answer.name) or not 0 < len(answer.ciphertext) <= MAX_WRAPPED_KEY_SIZE:
            raise self._malformed()
        return WrappedKey(answer.name, answer.ciphertext)

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        """Unwrap a data key under the version of the master key that wrapped it, which the wrapped key tells."""
        if not self.recognises(wrapped.master_key):
            raise UnwrapRefusedError(
                f"The data key is recorded as wrapped under the master key {wrapped.master_key}, no version of "
                f"{self._key}. Check KRAVN_KMS_GCP_KEY.",
                provider=self.name,
            )
        request = DecryptRequest(
            name=self._key,
            ciphertext=wrapped.blob,
            ciphertext_crc32c=google_crc32c.value(wrapped.blob),
            additional_authenticated_data=binding,
            additional_authenticated_data_crc32c=google_crc32c.value(binding),
        )
        answer = self._parsed(DecryptResponse, self._call("Decrypt", DecryptRequest.serialize(request), deadline))
        data_key: bytes = answer.plaintext
        if answer.plaintext_crc32c != google_crc32c.value(data_key):
            raise self._damaged()
        if len(data_key) != KEY_SIZE:
            raise self._malformed()
        return data_key

    def examine(self, deadline: Deadline) -> Iterator[Finding]:
        """Find out what else the login may do with the key, and whether it is by a key that does not expire."""
        place = self._host if self._port == 443 else f"{self._host}:{self._port}"
        server = Server("Google", f"https://{place}/", "KRAVN_KMS_GCP_ENDPOINT", _CA_BUNDLE, self._ca_bundle)
        return examine_gcp(ExaminedGcp(server, self._route, self._login, self._key), deadline)

    def _call(self, operation: str, request: bytes, deadline: Deadline) -> bytes:
        """Log in, send one operation, and return the answer."""
        routing = ("x-goog-request-params", f"name={quote(self._key, safe='/')}")
        metadata = (*self._login.metadata(deadline), routing)
        outcome = self._attempt(operation, request, metadata, deadline)
        for pause in _PAUSES:
            if isinstance(outcome, bytes) or not outcome.may_pass or pause >= deadline.remaining(self.name):
                break
            self._route.sleep(pause)
            outcome = self._attempt(operation, request, metadata, deadline)
        if isinstance(outcome, _Failure):
            raise self._refusal(operation, outcome, deadline)
        return outcome

    def _attempt(
        self, operation: str, request: bytes, metadata: tuple[tuple[str, str], ...], deadline: Deadline
    ) -> bytes | _Failure:
        """Send one operation over a connection of its own."""
        error: ProviderError
        try:
            left = deadline.remaining(self.name)
            with _GATE.call(), self._channel(left) as channel:
                # Bytes there and back: what gRPC fails to turn into messages it logs.
                call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"{_SERVICE}/{operation}")
                return call(request, timeout=left, metadata=metadata)
        except ProviderError as raised:
            error = raised
        except grpc.RpcError as raised:
            return _failure(raised)
        except OSError:  # of resolve
            return _Failure(grpc.StatusCode.UNAVAILABLE)
        # gRPC quotes what it does not take.
        except Exception:  # noqa: BLE001
            error = self._malformed()
        raise detached(error)

    def _channel(self, left: float) -> grpc.Channel:
        """Return a channel whose connection ends soon after the deadline, whatever the server does."""
        proxy = self._route.proxy
        host, port = (proxy.host, proxy.port) if proxy else self._route.resolve(self._host, self._port)
        milliseconds = int(left * 1000) + 1
        options: list[tuple[str, str | int]] = [
            *_CHANNEL,
            ("grpc.default_authority", self._host),
            ("grpc.ssl_target_name_override", self._host),
            # Closing a channel waits for a handshake, and for what a server that does not read was sent. These bound
            # both: how long it may take to connect, and, as TCP_USER_TIMEOUT, how long to acknowledge.
            ("grpc.min_reconnect_backoff_ms", milliseconds),
            ("grpc.keepalive_timeout_ms", milliseconds),
        ]
        if proxy is not None:
            # What gRPC makes of its argument grpc.http_proxy, but for what no_proxy says in the environment.
            options.append(("grpc.http_connect_server", f"{self._host}:{self._port}"))
            if proxy.authorization is not None:
                options.append(("grpc.http_connect_headers", f"Proxy-Authorization:{proxy.authorization}"))
        target = f"dns:///[{host}]:{port}" if ":" in host else f"dns:///{host}:{port}"
        return grpc.secure_channel(target, grpc.ssl_channel_credentials(self._roots), options)

    def _parsed(self, kind: Any, answer: bytes) -> Any:
        try:
            return kind.deserialize(answer)
        except Exception:  # noqa: BLE001, S110 - it may quote the answer; raised below
            pass
        raise self._malformed()

    def _refusal(self, operation: str, failure: _Failure, deadline: Deadline) -> ProviderError:
        if failure.trouble is _Trouble.SIZE:
            return self._too_large()
        if failure.trouble is _Trouble.PROTOCOL:
            return self._malformed()
        if failure.status in _TRANSIENT:
            return self._unavailable(failure, deadline)
        if failure.status is grpc.StatusCode.INVALID_ARGUMENT and operation == "Decrypt":
            return self._unwrap_refused()
        if failure.status not in _REFUSALS:
            return self._malformed()
        kind, message = _REFUSALS[failure.status]
        return kind(
            message.format(operation=operation, key=self._key, host=self._host, setting=SETTING), provider=self.name
        )

    def _unavailable(self, failure: _Failure, deadline: Deadline) -> ProviderUnavailableError:
        proxy = self._route.proxy
        if failure.trouble is _Trouble.TRUST:
            message = (
                f"The TLS certificate of {self._host} is not trusted, or is for another host. Check "
                "KRAVN_KMS_GCP_ENDPOINT; a private CA goes into KRAVN_KMS_GCP_CA_BUNDLE."
            )
        elif failure.trouble is _Trouble.TUNNEL and proxy is not None:
            message = (
                f"The proxy at {proxy.host}:{proxy.port} does not connect to {self._host}:{self._port}. Check "
                "KRAVN_KMS_PROXY, KRAVN_KMS_PROXY_USER and KRAVN_KMS_PROXY_PASSWORD, and that it may connect to there."
            )
        elif failure.status is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = (
                f"{self._host} did not answer within {deadline.seconds:g} seconds. Check that it can be reached from "
                "here; KRAVN_KMS_TIMEOUT sets the bound."
            )
        elif failure.status is grpc.StatusCode.UNAVAILABLE:
            through = "" if proxy is None else f" through the proxy at {proxy.host}:{proxy.port}"
            message = (
                f"{self._host} could not be reached{through}, cut the connection, or cannot serve now. Check "
                "KRAVN_KMS_GCP_ENDPOINT, that it can be reached from here, and the status of Google Cloud."
            )
        else:
            message = (
                f"{self._host} could not serve the request ({failure.status.name}). Check the status of Google Cloud "
                "and the quotas of the project, then start again."
            )
        return ProviderUnavailableError(message, provider=self.name)

    def _unwrap_refused(self) -> UnwrapRefusedError:
        return UnwrapRefusedError(
            f"Google Cloud KMS refused to unwrap a data key under the master key {self._key}: the wrapped key was "
            "altered, or belongs to another key or deployment. Check that the database and KRAVN_KMS_GCP_KEY belong "
            "together.",
            provider=self.name,
        )

    def _damaged(self) -> ProviderResponseError:
        return ProviderResponseError(
            f"A checksum in the answer of {self._host} is missing or wrong: something was damaged on the way. Start "
            "again; if it stays, find out what is between here and there.",
            provider=self.name,
        )

    def _too_large(self) -> ProviderResponseError:
        return ProviderResponseError(
            f"{self._host} answered with more than {MAX_ANSWER_SIZE:,} bytes, or with an endless header. Check "
            "KRAVN_KMS_GCP_ENDPOINT.",
            provider=self.name,
        )

    def _malformed(self) -> ProviderResponseError:
        return ProviderResponseError(
            f"{self._host} did not answer as Google Cloud KMS does. Check KRAVN_KMS_GCP_ENDPOINT, and that "
            "KRAVN_KMS_GCP_KEY is spelt as gcloud kms keys list shows it.",
            provider=self.name,
        )


def _failure(error: grpc.RpcError) -> _Failure:
    # gRPC tells its own troubles in the details of a status only. A server that says the same is taken at its word.
    details = error.details() or ""
    found = (trouble for trouble in _Trouble if any(words in details for words in trouble.value))
    return _Failure(error.code(), next(found, None))


def _checked_endpoint(endpoint: str) -> tuple[str, int]:
    found = _HOST.fullmatch(endpoint)
    port = int((found and found["port"]) or 443)
    if found is None or port not in range(1, 65536):
        raise SettingsError(
            "KRAVN_KMS_GCP_ENDPOINT must be the name of a host, with a port after a colon if it is not 443, and "
            f"nothing else. Without it, it is {_ENDPOINT}."
        )
    return found["host"].lower(), port
