"""Microsoft Entra ID and Azure Key Vault on one local TLS port, for the real SDK, with real RSA keys."""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.certificates import Authority

VAULT_HOST = "kravn.vault.azure.net"
LOGIN_HOST = "login.microsoftonline.com"
TENANT_ID = "11111111-2222-3333-4444-555555555555"
CLIENT_ID = "66666666-7777-8888-9999-000000000000"

_PADDING = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
_OPERATION = re.compile(r"/keys/([A-Za-z0-9-]+)/([0-9a-f]{32}|)/(wrapkey|unwrapkey)")


@dataclass
class Answer:
    """An HTTP answer; a body that is not bytes is sent as JSON."""

    status: int
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    method: str
    host: str
    path: str
    authorised: bool
    body: bytes


@dataclass
class KeyVersion:
    private: rsa.RSAPrivateKey
    refusal: str = ""
    """The code of the error that the version answers with, such as ``KeyDisabled``."""


Raw = Callable[[socket.socket, bytes], None]
"""Answers a request by writing to the connection whatever it likes; gets the body of the request too."""


class AzureVault:
    """A key vault at its real host name, reached through ``resolve``, with the master key ``kravn``."""

    url = f"https://{VAULT_HOST}"
    key = "kravn"

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="azure-")
        authority = Authority(Path(self._directory.name))
        self.ca_bundle = authority.ca_bundle
        self.authority = authority
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority.issue(VAULT_HOST, LOGIN_HOST))
        self.client_secret = f"secret~{uuid.uuid4().hex}"
        self.requests: list[Request] = []
        # RSA keys take long to make: those of one test are used again in the next, never twice in one.
        self._pool: list[rsa.RSAPrivateKey] = []
        self.reset()
        self._server = _Server(self, context)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def reset(self) -> None:
        """Return to one fresh version of the master key and no switch set."""
        self.keys: dict[str, dict[str, KeyVersion]] = {}
        self.tokens: set[str] = set()
        self.denied: set[str] = set()
        self.vault_answers: deque[Answer] = deque()
        self.login_answers: deque[Answer] = deque()
        self.unwrapped: bytes | None = None
        self.resource = "https://vault.azure.net"
        self.accepts_tokens = True
        self.vault_raw: Raw | None = None
        self.login_raw: Raw | None = None
        self.requests.clear()
        self.rotate()

    # --- What a provider is configured with ---

    def settings(self, **other: Any) -> dict[str, Any]:
        """Return keyword arguments for ``AzureProvider``, with those given in place of the usual ones."""
        return {
            "vault_url": self.url,
            "key": self.key,
            "tenant_id": TENANT_ID,
            "client_id": CLIENT_ID,
            "client_secret": self.client_secret,
            "ca_bundle": self.ca_bundle,
            "resolve": self.resolve,
            **other,
        }

    def resolve(self, host: str, port: int) -> tuple[str, int]:
        """Map the two host names, and no other, to this server."""
        if (host, port) not in {(VAULT_HOST, 443), (LOGIN_HOST, 443)}:
            raise OSError
        address: tuple[str, int] = self._server.socket.getsockname()
        return address

    # --- Switches ---

    def rotate(self, key: str = key) -> str:
        """Make a new version of a master key, or the first one, and return its name."""
        made = sum(map(len, self.keys.values()))
        if made == len(self._pool):
            self._pool.append(rsa.generate_private_key(65537, 2048))
        version = uuid.uuid4().hex
        self.keys.setdefault(key, {})[version] = KeyVersion(self._pool[made])
        return version

    def refuse(self, code: str, key: str = key) -> None:
        """Make all versions of a master key answer 403 with a code such as ``KeyDisabled``."""
        for version in self.keys[key].values():
            version.refusal = code

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._directory.cleanup()

    def count(self, operation: str) -> int:
        """Count the authorised requests for ``wrapkey`` or ``unwrapkey``, or those for ``token``."""
        return sum(
            request.path.endswith(f"/{operation}") and (request.authorised or operation == "token")
            for request in self.requests
        )

    # --- The protocols ---

    def answer(self, request: Request) -> Answer:
        if request.host == LOGIN_HOST:
            return self.login_answers.popleft() if self.login_answers else self._log_in(request)
        if not request.authorised:
            challenge = f'Bearer authorization="https://{LOGIN_HOST}/{TENANT_ID}", resource="{self.resource}"'
            return _error(401, "Unauthorized", headers={"WWW-Authenticate": challenge})
        return self.vault_answers.popleft() if self.vault_answers else self._operate(request)

    def _log_in(self, request: Request) -> Answer:
        base = f"https://{LOGIN_HOST}/{TENANT_ID}"
        if request.path == f"/{TENANT_ID}/v2.0/.well-known/openid-configuration":
            return Answer(
                200,
                {
                    "issuer": f"{base}/v2.0",
                    "token_endpoint": f"{base}/oauth2/v2.0/token",
                    "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                },
            )
        if request.path != f"/{TENANT_ID}/oauth2/v2.0/token":
            return Answer(400, {"error": "invalid_tenant", "error_description": "AADSTS90002: Tenant not found."})
        form = parse_qs(request.body.decode())
        if form.get("client_id") != [CLIENT_ID]:
            return Answer(400, {"error": "unauthorized_client", "error_description": "AADSTS700016: Not found."})
        if form.get("client_secret") != [self.client_secret]:
            return Answer(401, {"error": "invalid_client", "error_description": "AADSTS7000215: Invalid secret."})
        token = uuid.uuid4().hex
        self.tokens.add(token)
        return Answer(200, {"token_type": "Bearer", "expires_in": 3599, "access_token": token})

    def _operate(self, request: Request) -> Answer:
        found = _OPERATION.fullmatch(request.path)
        if not found or request.method != "POST":
            return _error(400, "BadParameter")
        name, version, operation = found.groups()
        versions = self.keys.get(name, {})
        # An empty version, between two slashes, is the newest.
        version = version or next(reversed(versions), "")
        if version not in versions:
            return _error(404, "KeyNotFound")
        refusal = "ForbiddenByRbac" if operation in self.denied else versions[version].refusal
        if refusal:
            return _error(403, "Forbidden", refusal)
        result = self._compute(operation, versions[version].private, json.loads(request.body))
        if result is None:
            return _error(400, "BadParameter")
        return Answer(200, {"kid": f"{self.url}/keys/{name}/{version}", "value": _padless(result)})

    def _compute(self, operation: str, key: rsa.RSAPrivateKey, sent: dict[str, str]) -> bytes | None:
        if sent["alg"] != "RSA-OAEP-256":
            return None
        value = _unpadded(sent["value"])
        if operation == "wrapkey":
            return key.public_key().encrypt(value, _PADDING)
        try:
            unwrapped = key.decrypt(value, _PADDING)
        except ValueError:
            return None
        return unwrapped if self.unwrapped is None else self.unwrapped

    def raw(self, request: Request) -> Raw | None:
        if request.host == LOGIN_HOST:
            return self.login_raw
        return self.vault_raw if request.authorised else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one segment for each answer, or every one waits for a delayed acknowledgement
    server: _Server

    def handle_any(self) -> None:
        vault = self.server.vault
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        authorised = vault.accepts_tokens and scheme == "Bearer" and token in vault.tokens
        request = Request(self.command, self.headers["Host"], urlsplit(self.path).path, authorised, body)
        vault.requests.append(request)
        self.close_connection = True
        if raw := vault.raw(request):
            raw(self.connection, body)
            return
        answer = vault.answer(request)
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = handle_any  # noqa: N815 - the names that the base class looks for

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has in the base class
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, vault: AzureVault, context: ssl.SSLContext) -> None:
        self.vault = vault
        self._context = context
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # The handshake is made in the thread of the request: in accept() a client that fails it would stop them all.
        try:
            request.settimeout(30)
            with self._context.wrap_socket(request, server_side=True) as encrypted:
                _Handler(encrypted, client_address, self)
        except OSError:
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are part of the tests."""


def _error(status: int, code: str, inner: str = "", *, headers: dict[str, str] | None = None) -> Answer:
    error: dict[str, Any] = {"code": code, "message": f"{code} {inner}"}
    if inner:
        error["innererror"] = {"code": inner}
    return Answer(status, {"error": error}, headers or {})


def _padless(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
