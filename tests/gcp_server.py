"""Google Cloud KMS on a local gRPC port, with real AES-GCM, and the services that log in to it, for Google's SDKs."""

from __future__ import annotations

import json
import os
import re
import ssl
import struct
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import google_crc32c
import grpc
import jwt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.cloud.kms_v1 import DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse

from tests.certificates import Authority
from tests.hostile_server import Raw

KMS_HOST = "cloudkms.googleapis.com"
TOKEN_HOSTS = ("oauth2.googleapis.com", "sts.googleapis.com", "iamcredentials.googleapis.com")
METADATA_HOST = "metadata.google.internal"
LINK_LOCAL = "169.254.169.254"

KEY = "projects/kravn-test/locations/europe-west3/keyRings/app/cryptoKeys/kravn"
ACCOUNT = "app@kravn-test.iam.gserviceaccount.com"
AUDIENCE = "//iam.googleapis.com/projects/1234567890/locations/global/workloadIdentityPools/pool/providers/cluster"
SCOPE = "https://www.googleapis.com/auth/cloudkms"

_METADATA_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"
_IMPERSONATION_PATH = f"/v1/projects/-/serviceAccounts/{ACCOUNT}:generateAccessToken"
_GRANT_OF_JWT = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_GRANT_OF_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_REQUESTS: dict[str, Any] = {"Encrypt": EncryptRequest, "Decrypt": DecryptRequest}


@dataclass(frozen=True)
class Status:
    """A call that ends without an answer."""

    code: grpc.StatusCode
    details: str = ""


@dataclass(frozen=True)
class Call:
    """A call of the KMS, whatever came of it."""

    operation: str
    request: Any
    metadata: dict[str, str]

    @property
    def token(self) -> str:
        return self.metadata.get("authorization", "").removeprefix("Bearer ")


@dataclass
class Answer:
    """An HTTP answer; a body that is not bytes is sent as JSON."""

    status: int
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request to one of the services that log in."""

    method: str
    host: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def form(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(self.body.decode()).items()}


class CloudKms:
    """Cloud KMS and the login services at their real host names, reached through ``resolve``."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="gcp-")
        self.authority = Authority(Path(self._directory.name))
        self.ca_bundle = self.authority.ca_bundle
        certificate = self.authority.issue(KMS_HOST, *TOKEN_HOSTS, "tokens.example")
        self.service_account = ServiceAccount(ACCOUNT)
        self.calls: list[Call] = []
        self.requests: list[Request] = []
        self.reset()
        self._kms, self.port = served(self.handle, certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._logins = [_LoginServer(self, context), _LoginServer(self, None)]
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}) for server in self._logins
        ]
        for thread in self._threads:
            thread.start()

    def reset(self) -> None:
        """Return to one version of the master key and no switch set."""
        self.versions: dict[int, bytes] = {1: os.urandom(32)}
        self.disabled: set[int] = set()
        self.denied: set[str] = set()
        self.tokens: set[str] = set()
        self.revoked = False
        """Whether the key of the service account was deleted."""
        self.subject_tokens = {f"subject-{uuid.uuid4().hex}"}
        self.refresh_token = f"refresh-{uuid.uuid4().hex}"
        self.client_secret = f"secret-{uuid.uuid4().hex}"
        self.runs_as_service_account = True
        self.answers: deque[bytes | Status] = deque()
        self.behave: Callable[[Call], bytes | Status] | None = None
        self.alter: Callable[[Any], None] | None = None
        """Changes what would have been answered."""
        self.login_answers: deque[Answer] = deque()
        self.login_raw: Raw | None = None
        self.calls.clear()
        self.requests.clear()

    # --- What a provider is configured with ---

    def settings(self, **other: Any) -> dict[str, Any]:
        """Return keyword arguments for ``GcpProvider``, with those given in place of the usual ones."""
        return {
            "key": KEY,
            "credentials": self.service_account.text,
            "ca_bundle": self.ca_bundle,
            "resolve": self.resolve,
            **other,
        }

    def resolve(self, host: str, port: int) -> tuple[str, int]:
        """Map the host names of Google, and no other, to these servers."""
        secure, plain = (server.server_address[1] for server in self._logins)
        ports = {(KMS_HOST, 443): self.port, ("tokens.example", 443): secure}
        ports |= dict.fromkeys(((host, 443) for host in TOKEN_HOSTS), secure)
        ports |= dict.fromkeys(((host, 80) for host in (METADATA_HOST, LINK_LOCAL)), plain)
        if (host, port) not in ports:
            raise OSError
        return "127.0.0.1", ports[host, port]

    def external_account(self, source: dict[str, Any], **other: Any) -> str:
        """Return the credentials of a workload that has a token of somebody else's."""
        return json.dumps(
            {
                "type": "external_account",
                "audience": AUDIENCE,
                "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
                "token_url": "https://sts.googleapis.com/v1/token",
                "credential_source": source,
                **other,
            }
        )

    @property
    def user(self) -> dict[str, Any]:
        """The credentials of a user of gcloud."""
        return {
            "type": "authorized_user",
            "client_id": "client.apps.googleusercontent.com",
            "client_secret": self.client_secret,
            "refresh_token": self.refresh_token,
            "quota_project_id": "kravn-test",
        }

    # --- Switches ---

    @property
    def primary(self) -> str:
        return f"{KEY}/cryptoKeyVersions/{max(self.versions)}"

    def rotate(self) -> str:
        """Make a new primary version and return its name."""
        self.versions[max(self.versions) + 1] = os.urandom(32)
        return self.primary

    def count(self, operation: str) -> int:
        return sum(call.operation == operation for call in self.calls)

    def stop(self) -> None:
        self._kms.stop(None).wait()
        for server, thread in zip(self._logins, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
        self._directory.cleanup()

    # --- The KMS ---

    def handle(self, operation: str, sent: bytes, metadata: dict[str, str]) -> bytes | Status:
        call = Call(operation, _REQUESTS[operation].deserialize(sent), metadata)
        self.calls.append(call)
        if self.behave is not None:
            return self.behave(call)
        return self.answers.popleft() if self.answers else self._operate(call)

    def _operate(self, call: Call) -> bytes | Status:
        request = call.request
        if not self._knows(call.token):
            return Status(grpc.StatusCode.UNAUTHENTICATED, "Request had invalid authentication credentials.")
        # Google sends a call to the location that this names, and answers without it that it cannot.
        if call.metadata.get("x-goog-request-params") != f"name={quote(request.name, safe='/')}":
            return Status(grpc.StatusCode.INVALID_ARGUMENT, "The request concerns another location.")
        if call.operation in self.denied:
            permission = f"cloudkms.cryptoKeyVersions.useTo{call.operation}"
            return Status(
                grpc.StatusCode.PERMISSION_DENIED,
                f"Permission '{permission}' denied on resource (or it may not exist).",
            )
        if request.name != KEY:
            return Status(grpc.StatusCode.NOT_FOUND, f"CryptoKey {request.name} not found.")
        if _is_damaged(request, "plaintext", "ciphertext", "additional_authenticated_data"):
            return Status(grpc.StatusCode.INVALID_ARGUMENT, "Checksum verification failed.")
        return self._encrypt(request) if call.operation == "Encrypt" else self._decrypt(request)

    def _encrypt(self, request: Any) -> bytes | Status:
        version = max(self.versions)
        if version in self.disabled:
            return _not_enabled(version)
        nonce = os.urandom(12)
        sealed = AESGCM(self.versions[version]).encrypt(nonce, request.plaintext, request.additional_authenticated_data)
        ciphertext = struct.pack(">I", version) + nonce + sealed
        answer = EncryptResponse(
            name=self.primary,
            ciphertext=ciphertext,
            ciphertext_crc32c=google_crc32c.value(ciphertext),
            verified_plaintext_crc32c=_has(request, "plaintext_crc32c"),
            verified_additional_authenticated_data_crc32c=_has(request, "additional_authenticated_data_crc32c"),
        )
        return self._altered(answer)

    def _decrypt(self, request: Any) -> bytes | Status:
        failed = Status(
            grpc.StatusCode.INVALID_ARGUMENT, "Decryption failed: verify that 'name' refers to the correct CryptoKey."
        )
        if len(request.ciphertext) < 16:
            return failed
        version = struct.unpack(">I", request.ciphertext[:4])[0]
        if version not in self.versions:
            return failed
        if version in self.disabled:
            return _not_enabled(version)
        try:
            plaintext = AESGCM(self.versions[version]).decrypt(
                request.ciphertext[4:16], request.ciphertext[16:], request.additional_authenticated_data
            )
        except InvalidTag:
            return failed
        return self._altered(DecryptResponse(plaintext=plaintext, plaintext_crc32c=google_crc32c.value(plaintext)))

    def _altered(self, answer: Any) -> bytes:
        if self.alter is not None:
            self.alter(answer)
        serialized: bytes = type(answer).serialize(answer)
        return serialized

    def _knows(self, token: str) -> bool:
        return token in self.tokens or (not self.revoked and self.service_account.signed(token, SCOPE))

    # --- The services that log in ---

    def answer(self, request: Request) -> Answer:
        if self.login_answers:
            return self.login_answers.popleft()
        services = {
            ("GET", METADATA_HOST, _METADATA_PATH): self._of_machine,
            ("POST", "oauth2.googleapis.com", "/token"): self._of_grant,
            ("POST", "sts.googleapis.com", "/v1/token"): self._of_exchange,
            ("POST", "iamcredentials.googleapis.com", _IMPERSONATION_PATH): self._of_impersonation,
            ("GET", "tokens.example", "/token"): self._of_elsewhere,
            ("GET", LINK_LOCAL, "/token"): self._of_elsewhere,
        }
        service = services.get((request.method, request.host, request.path))
        return Answer(404) if service is None else service(request)

    def _of_elsewhere(self, _request: Request) -> Answer:
        return Answer(200, {"value": next(iter(self.subject_tokens))})

    def _issued(self) -> str:
        token = f"ya29.{uuid.uuid4().hex}"
        self.tokens.add(token)
        return token

    def _of_machine(self, request: Request) -> Answer:
        if request.headers.get("metadata-flavor") != "Google":
            return Answer(403)
        if not self.runs_as_service_account:
            return Answer(404, headers={"Metadata-Flavor": "Google"})
        token = {"access_token": self._issued(), "expires_in": 3599, "token_type": "Bearer"}
        return Answer(200, token, {"Metadata-Flavor": "Google"})

    def _of_grant(self, request: Request) -> Answer:
        form = request.form
        if form["grant_type"] == _GRANT_OF_JWT:
            is_good = self.service_account.signed(form["assertion"], "https://www.googleapis.com/auth/iam")
        else:
            is_good = (form["refresh_token"], form["client_secret"]) == (self.refresh_token, self.client_secret)
        if not is_good:
            return Answer(400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."})
        return Answer(200, {"access_token": self._issued(), "expires_in": 3599, "token_type": "Bearer"})

    def _of_exchange(self, request: Request) -> Answer:
        form = request.form
        if (form["grant_type"], form["audience"]) != (_GRANT_OF_EXCHANGE, AUDIENCE):
            return Answer(400, {"error": "invalid_target", "error_description": "The audience is invalid."})
        is_of_aws = form["subject_token_type"] == "urn:ietf:params:aws:token-type:aws4_request"
        if form["subject_token"] not in self.subject_tokens and not is_of_aws:
            return Answer(400, {"error": "invalid_grant", "error_description": "ID Token is stale to sign-in."})
        return Answer(
            200,
            {
                "access_token": self._issued(),
                "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
                "token_type": "Bearer",
                "expires_in": 3599,
            },
        )

    def _of_impersonation(self, request: Request) -> Answer:
        if request.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            return Answer(401, {"error": {"code": 401, "status": "UNAUTHENTICATED"}})
        if json.loads(request.body)["scope"] != [SCOPE]:
            return Answer(400, {"error": {"code": 400, "status": "INVALID_ARGUMENT"}})
        return Answer(200, {"accessToken": self._issued(), "expireTime": "2099-01-01T00:00:00Z"})


class ServiceAccount:
    """A service account and the one key it has."""

    def __init__(self, email: str) -> None:
        private = rsa.generate_private_key(65537, 2048)
        self._public = private.public_key()
        self.private_key = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        self.info = {
            "type": "service_account",
            "project_id": "kravn-test",
            "private_key_id": "0" * 40,
            "private_key": self.private_key,
            "client_email": email,
            "client_id": "1" * 21,
            "token_uri": "https://oauth2.googleapis.com/token",
        }
        self.text = json.dumps(self.info)

    def signed(self, token: str, scope: str) -> bool:
        """Tell whether a token is one of this account's, valid now and for that scope."""
        try:
            claims = jwt.decode(
                token,
                self._public,
                algorithms=["RS256"],
                issuer=self.info["client_email"],
                options={"require": ["exp", "iat"], "verify_aud": False},
            )
        except jwt.InvalidTokenError:
            return False
        return claims.get("scope") == scope


def served(
    handle: Callable[[str, bytes, dict[str, str]], bytes | Status],
    certificate: Path,
    compression: grpc.Compression | None = None,
    port: int = 0,
) -> tuple[grpc.Server, int]:
    """Start a gRPC server for the two operations over TLS, and return it and its port."""
    # The SDK has no servicer for Cloud KMS, so bytes come and bytes go.
    server = grpc.server(ThreadPoolExecutor(8), compression=compression)
    handlers = {operation: _handler(handle, operation) for operation in _REQUESTS}
    service = grpc.method_handlers_generic_handler("google.cloud.kms.v1.KeyManagementService", handlers)
    server.add_generic_rpc_handlers((service,))
    _, chain, private = re.split(rb"(?=-----BEGIN )", certificate.read_bytes())
    port = server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([(private, chain)]))
    server.start()
    return server, port


def _handler(
    handle: Callable[[str, bytes, dict[str, str]], bytes | Status], operation: str
) -> grpc.RpcMethodHandler[bytes, bytes]:
    def run(sent: bytes, context: grpc.ServicerContext) -> bytes:
        metadata = {name: str(value) for name, value in context.invocation_metadata()}
        answer = handle(operation, sent, metadata)
        if isinstance(answer, Status):
            context.abort(answer.code, answer.details)
        return answer

    return grpc.unary_unary_rpc_method_handler(run)


def _has(request: Any, name: str) -> bool:
    return bool(type(request).pb(request).HasField(name))


def _is_damaged(request: Any, *names: str) -> bool:
    return any(
        _has(request, f"{name}_crc32c")
        and getattr(request, f"{name}_crc32c") != google_crc32c.value(getattr(request, name))
        for name in names
        if hasattr(request, name)
    )


def _not_enabled(version: int) -> Status:
    return Status(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"{KEY}/cryptoKeyVersions/{version} is not enabled, current state is: DISABLED.",
    )


class _LoginHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one segment for each answer, or every one waits for a delayed acknowledgement
    server: _LoginServer

    def handle_any(self) -> None:
        kms = self.server.kms
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.headers["Host"], url.path, url.query, headers, body)
        kms.requests.append(request)
        self.close_connection = True
        if kms.login_raw is not None:
            kms.login_raw(self.connection, body)
            return
        answer = kms.answer(request)
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - the names that the base class looks for

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has in the base class
        """Say nothing."""


class _LoginServer(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, kms: CloudKms, context: ssl.SSLContext | None) -> None:
        self.kms = kms
        self._context = context
        super().__init__(("127.0.0.1", 0), _LoginHandler)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # The handshake is made in the thread of the request: in accept() a client that fails it would stop them all.
        try:
            request.settimeout(30)
            if self._context is None:
                _LoginHandler(request, client_address, self)
                request.close()
                return
            with self._context.wrap_socket(request, server_side=True) as encrypted:
                _LoginHandler(encrypted, client_address, self)
        except OSError:
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are part of the tests."""
