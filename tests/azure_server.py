"""Microsoft Entra ID and Azure Key Vault on one local TLS port, for the real SDK, with real RSA keys.

On a port without TLS are the endpoints for managed identities: that of virtual machines and that of App Service.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.azure_identities import Application, Issuer, padless, unpadded
from tests.certificates import Authority

VAULT_HOST = "kravn.vault.azure.net"
LOGIN_HOST = "login.microsoftonline.com"
PRIVATE_VAULT_HOST = "kravn.vault.stack.example"
PRIVATE_LOGIN_HOST = "login.stack.example"
METADATA_HOST = "169.254.169.254"
TENANT_ID = "11111111-2222-3333-4444-555555555555"
CLIENT_ID = "66666666-7777-8888-9999-000000000000"
IDENTITY_ID = "77777777-7777-8888-9999-000000000000"
"""A managed identity that a user assigned."""

_LOGIN_HOSTS = {VAULT_HOST: LOGIN_HOST, PRIVATE_VAULT_HOST: PRIVATE_LOGIN_HOST}
"""Where the owners of a key vault log in."""

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
    query: Mapping[str, str]
    headers: Mapping[str, str]
    token: str

    @property
    def form(self) -> dict[str, str]:
        return dict(parse_qsl(self.body.decode()))


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
        context.load_cert_chain(authority.issue(*_LOGIN_HOSTS, *_LOGIN_HOSTS.values()))
        self.client_secret = f"secret~{uuid.uuid4().hex}"
        self.requests: list[Request] = []
        # RSA keys take long to make: those of one test are used again in the next, never twice in one.
        self._pool: list[rsa.RSAPrivateKey] = []
        self.reset()
        self._servers = [_Server(self, context), _Server(self, None)]
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}) for server in self._servers
        ]
        for thread in self._threads:
            thread.start()

    def reset(self) -> None:
        """Return to one fresh version of the master key and no switch set."""
        self.keys: dict[str, dict[str, KeyVersion]] = {}
        self.application = Application(CLIENT_ID, self.client_secret, expired_secret=f"{self.client_secret}-old")
        self.application.issuer = Issuer()
        self.identities: set[str | None] = {None, IDENTITY_ID}
        """The managed identities of the machine; ``None`` is its own."""
        self.identity_header = uuid.uuid4().hex
        self.tokens: dict[str, str] = {}
        """Those that were given out, and the claims that were asked of each."""
        self.denied: set[str] = set()
        self.vault_answers: deque[Answer] = deque()
        self.login_answers: deque[Answer] = deque()
        self.unwrapped: bytes | None = None
        self.metadata_answers: deque[Answer] = deque()
        self.resource: str | None = None
        """What the key vault says that a token must be for, in place of the truth."""
        self.accepts_tokens = True
        self.claims = ""
        """What it wants a token to claim."""
        self.revoked = False
        """Whether it wants that of every token again."""
        self.vault_raw: Raw | None = None
        self.login_raw: Raw | None = None
        self.metadata_raw: Raw | None = None
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
        """Map the hosts that are played here, and no other, to their server."""
        if port == 443 and host in {*_LOGIN_HOSTS, *_LOGIN_HOSTS.values()}:
            return "127.0.0.1", self.port
        if (host, port) in {(METADATA_HOST, 80), ("127.0.0.1", self.metadata_port)}:
            return "127.0.0.1", self.metadata_port
        raise OSError

    @property
    def port(self) -> int:
        """The port of all that speaks TLS."""
        return self._servers[0].server_address[1]

    @property
    def metadata_port(self) -> int:
        """The port of the endpoints for managed identities."""
        return self._servers[1].server_address[1]

    def app_service(self) -> dict[str, str]:
        """Return the variables by which App Service tells a program of its endpoint."""
        return {
            "IDENTITY_ENDPOINT": f"http://127.0.0.1:{self.metadata_port}/msi/token",
            "IDENTITY_HEADER": self.identity_header,
        }

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
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()
        self._directory.cleanup()

    def count(self, operation: str) -> int:
        """Count the authorised requests for ``wrapkey`` or ``unwrapkey``, or those for ``token``."""
        return sum(
            request.path.endswith(f"/{operation}") and (request.authorised or operation == "token")
            for request in self.requests
        )

    # --- The protocols ---

    def answer(self, request: Request) -> Answer:
        if request.host in _LOGIN_HOSTS.values():
            return self.login_answers.popleft() if self.login_answers else self._log_in(request)
        if request.host not in _LOGIN_HOSTS:
            return self.metadata_answers.popleft() if self.metadata_answers else self._identify(request)
        if not request.authorised:
            return _error(401, "Unauthorized", headers={"WWW-Authenticate": self._challenge(request)})
        return self.vault_answers.popleft() if self.vault_answers else self._operate(request)

    def accepts(self, token: str) -> bool:
        return self.accepts_tokens and token in self.tokens and self.claims in self.tokens[token] and not self.revoked

    def _challenge(self, request: Request) -> str:
        login = f"https://{_LOGIN_HOSTS[request.host]}"
        if self.accepts_tokens and request.token in self.tokens:
            claims = padless(json.dumps({"access_token": {self.claims: {"essential": True}}}).encode())
            authorization = f'authorization_uri="{login}/common/oauth2/authorize"'
            return f'Bearer realm="", {authorization}, error="insufficient_claims", claims="{claims}"'
        resource = self.resource or self._resource_of(request.host)
        return f'Bearer authorization="{login}/{TENANT_ID}", resource="{resource}"'

    @staticmethod
    def _resource_of(vault_host: str) -> str:
        return f"https://{vault_host.partition('.')[2]}"

    def _log_in(self, request: Request) -> Answer:
        base = f"https://{request.host}/{TENANT_ID}"
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
            return login_refusal(90002)
        form = request.form
        [vault_host] = [vault for vault, login in _LOGIN_HOSTS.items() if login == request.host]
        refusal = self.application.refusal(form, f"{base}/oauth2/v2.0/token")
        if not refusal and (form["grant_type"], form["scope"]) != (
            "client_credentials",
            f"{self._resource_of(vault_host)}/.default",
        ):
            refusal = 70011
        if refusal:
            return login_refusal(refusal)
        token = self._new_token(form.get("claims", ""))
        return Answer(200, {"token_type": "Bearer", "expires_in": 3599, "ext_expires_in": 3599, "access_token": token})

    def _identify(self, request: Request) -> Answer:
        """Answer as the endpoint of virtual machines does, or that of App Service."""
        is_app_service = request.path == "/msi/token"
        wanted = ("2019-08-01" if is_app_service else "2018-02-01", self._resource_of(VAULT_HOST))
        if is_app_service:
            good = request.headers["X-IDENTITY-HEADER"] == self.identity_header
        else:
            good = request.path == "/metadata/identity/oauth2/token" and request.headers["Metadata"] == "true"
        if request.method != "GET" or not good or (request.query["api-version"], request.query["resource"]) != wanted:
            return Answer(400, {"error": "invalid_request", "error_description": "Bad request"})
        if request.query.get("client_id") not in self.identities:
            if is_app_service:
                return Answer(
                    400, {"statusCode": 400, "message": "No User Assigned or Delegated Managed Identity found"}
                )
            return Answer(400, {"error": "invalid_request", "error_description": "Identity not found"})
        now = int(time.time())
        granted = {
            "access_token": self._new_token(""),
            "client_id": request.query.get("client_id", "88888888-7777-8888-9999-000000000000"),
            "expires_on": str(now + 86_400),
            "resource": request.query["resource"],
            "token_type": "Bearer",
        }
        if not is_app_service:
            granted |= {"expires_in": "86400", "ext_expires_in": "86400", "not_before": str(now), "refresh_token": ""}
        return Answer(200, granted)

    def _new_token(self, claims: str) -> str:
        token = uuid.uuid4().hex
        self.tokens[token] = claims
        return token

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
        return Answer(200, {"kid": f"https://{request.host}/keys/{name}/{version}", "value": padless(result)})

    def _compute(self, operation: str, key: rsa.RSAPrivateKey, sent: dict[str, str]) -> bytes | None:
        if sent["alg"] != "RSA-OAEP-256":
            return None
        value = unpadded(sent["value"])
        if operation == "wrapkey":
            return key.public_key().encrypt(value, _PADDING)
        try:
            unwrapped = key.decrypt(value, _PADDING)
        except ValueError:
            return None
        return unwrapped if self.unwrapped is None else self.unwrapped

    def raw(self, request: Request) -> Raw | None:
        if request.host in _LOGIN_HOSTS.values():
            return self.login_raw
        if request.host not in _LOGIN_HOSTS:
            return self.metadata_raw
        return self.vault_raw if request.authorised else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one segment for each answer, or every one waits for a delayed acknowledgement
    server: _Server

    def handle_any(self) -> None:
        vault = self.server.vault
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        authorised = scheme == "Bearer" and vault.accepts(token)
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        request = Request(
            self.command, self.headers["Host"], url.path, authorised, body, query, dict(self.headers), token
        )
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

    def __init__(self, vault: AzureVault, context: ssl.SSLContext | None) -> None:
        self.vault = vault
        self._context = context
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # The handshake is made in the thread of the request: in accept() a client that fails it would stop them all.
        try:
            request.settimeout(30)
            if self._context is None:
                with request:
                    _Handler(request, client_address, self)
                return
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


def login_refusal(code: int) -> Answer:
    """Answer as Entra ID does to a login that it refuses, with the number of one of its errors."""
    error, status = {90002: ("invalid_request", 400), 700016: ("unauthorized_client", 400)}.get(
        code, ("invalid_client", 401)
    )
    description = f"AADSTS{code}: No. Trace ID: {uuid.uuid4()} Correlation ID: {uuid.uuid4()}"
    return Answer(status, {"error": error, "error_description": description, "error_codes": [code]})
