"""AWS at its real host names, for the real SDK: a TLS front that notes and scripts, and moto's server behind it.

Also the services at link-local addresses that give an instance or a container its credentials.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import ssl
import subprocess
import sys
import tempfile
import threading
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import botocore.session

from sqlalchemy_kravn_crypto.providers.aws import AwsProvider
from sqlalchemy_kravn_crypto.providers.base import Deadline, KeyProvider, WrappedKey
from sqlalchemy_kravn_crypto.wrapping import binding
from tests.certificates import Authority
from tests.hostile_server import Raw

REGION = "eu-central-1"
KMS = "kms.eu-central-1.amazonaws.com"
STS = "sts.eu-central-1.amazonaws.com"
SSO = "portal.sso.eu-west-1.amazonaws.com"
OTHER_KMS = "kms.eu-west-1.amazonaws.com"
VPC_ENDPOINT = "vpce-0a1b2c-kms.eu-central-1.vpce.amazonaws.com"
INSTANCE = "169.254.169.254"
CONTAINER = "169.254.170.2"
POD = "169.254.170.23"

DEPLOYMENT_ID = "0b9e8f1c-5d2a-4f6e-9a3b-7c1d2e3f4a5b"
KEY_ID = bytes(range(8))
BINDING = binding("default", DEPLOYMENT_ID, KEY_ID)

UNUSED_KEY = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
"""A key that is not in moto, for answers that are scripted."""

WRAPPED = WrappedKey(UNUSED_KEY, bytes(180))

ROLE = "arn:aws:iam::123456789012:role/teams/kravn"

_TLS = (KMS, STS, SSO, OTHER_KMS, VPC_ENDPOINT)
_PLAIN = (INSTANCE, CONTAINER, POD)

_RUNNING = re.compile(r"Running on http://127\.0\.0\.1:(\d+)")
_RESULTS = {"TrentService.Encrypt", "TrentService.Decrypt"}


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
    headers: dict[str, str]
    body: bytes

    @property
    def operation(self) -> str:
        """``Encrypt`` of KMS, ``AssumeRole`` of STS; otherwise the path."""
        target = self.headers.get("x-amz-target", "")
        action = parse_qs(self.body.decode("latin-1")).get("Action", [""])[0]
        return target.rpartition(".")[2] or action or self.path


class Moto:
    """moto's own server in a process of its own: inside of this one it would put itself into the SDK."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            if found := _RUNNING.search(line):
                self.port = int(found[1])
                break
        else:
            raise AssertionError("".join(said))
        # It goes on to log every request, and must not fill the pipe.
        self._reading = threading.Thread(target=self._process.stderr.read)
        self._reading.start()

    def client(self, service: str, region: str = REGION) -> Any:
        return botocore.session.Session().create_client(
            service,
            region_name=region,
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id="AKIAADMINISTRATOR000",
            aws_secret_access_key="administrator",
        )

    def forward(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            # Moto knows no host of an endpoint in a VPC, behind which is the KMS of the region.
            host = request.headers["host"] if request.host != VPC_ENDPOINT else KMS
            connection.request(request.method, request.path, request.body, {**request.headers, "host": host})
            answer = connection.getresponse()
            return Answer(answer.status, answer.read(), {"Content-Type": answer.getheader("Content-Type") or ""})
        finally:
            connection.close()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._reading.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


class Aws:
    """What ``resolve`` leads to in place of AWS. Everything is answered by moto unless a switch says otherwise."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="aws-")
        self.authority = Authority(Path(self._directory.name))
        self.ca_bundle = self.authority.ca_bundle
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.authority.issue(*_TLS))
        self.requests: list[Request] = []
        self.reset()
        self._servers = [_Server(self, context), _Server(self, None)]
        self.ports = [server.socket.getsockname()[1] for server in self._servers]
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}) for server in self._servers
        ]
        for thread in self._threads:
            thread.start()

    def reset(self) -> None:
        """Return to no switch set. What is in moto stays."""
        self.answers: dict[str, deque[Answer]] = {host: deque() for host in (*_TLS, *_PLAIN)}
        """What a host answers next, in place of moto."""
        self.raw: dict[str, Raw] = {}
        """How a host answers, whatever it is asked."""
        self.absent = {CONTAINER, POD, INSTANCE}
        """Where nobody is."""
        self.requests.clear()

    @cached_property
    def moto(self) -> Moto:
        return Moto()

    @cached_property
    def kms(self) -> Any:
        return self.moto.client("kms")

    @cached_property
    def iam(self) -> Any:
        return self.moto.client("iam")

    # --- What a provider is configured with ---

    def settings(self, key: str, **other: Any) -> dict[str, Any]:
        """Return keyword arguments for ``AwsProvider``, with those given in place of the usual ones."""
        return {"key": key, "ca_bundle": self.ca_bundle, "resolve": self.resolve, "sleep": lambda _: None, **other}

    def resolve(self, host: str, port: int) -> tuple[str, int]:
        """Map the host names and addresses of AWS, and no other, to this machine."""
        if (port, host) in {*((443, name) for name in _TLS), (8443, VPC_ENDPOINT)}:
            return "127.0.0.1", self.ports[0]
        if port == 80 and host in _PLAIN and host not in self.absent:
            return "127.0.0.1", self.ports[1]
        raise OSError

    def create_key(self, **options: Any) -> str:
        """Make a master key and return its ARN."""
        arn: str = self.kms.create_key(**options)["KeyMetadata"]["Arn"]
        return arn

    # --- What happened ---

    def operations(self) -> list[str]:
        """Return what was asked for, in order."""
        return [request.operation for request in self.requests]

    def hosts(self) -> set[str]:
        return {request.host for request in self.requests}

    def stop(self) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
        if "moto" in vars(self):
            self.moto.stop()
        self._directory.cleanup()

    def answer(self, request: Request) -> Answer:
        if self.answers[request.host]:
            return self.answers[request.host].popleft()
        answer = self.moto.forward(request)
        if answer.status == 200 and request.headers.get("x-amz-target") in _RESULTS:
            # KMS says so in every answer, moto in none.
            answer.body = {**json.loads(answer.body), "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}
        return answer


class Credentials:
    """Credentials that no log and no error may show."""

    def __init__(self) -> None:
        self.access_key = "AKIA" + secrets.token_hex(8).upper()
        self.secret = secrets.token_urlsafe(30)
        self.token = secrets.token_urlsafe(60)

    def ini(self) -> str:
        return f"aws_access_key_id = {self.access_key}\naws_secret_access_key = {self.secret}\n"

    def offered(self, hours: float = 6) -> dict[str, str]:
        """Return what a container or an instance is told."""
        expires = datetime.now(UTC) + timedelta(hours=hours)
        return {
            "Code": "Success",
            "AccessKeyId": self.access_key,
            "SecretAccessKey": self.secret,
            "Token": self.token,
            "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def granted(self, action: str = "AssumeRole") -> Answer:
        """Return what STS says to whoever may have them."""
        body = (
            f'<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{action}Result><Credentials>'
            f"<AccessKeyId>{self.access_key}</AccessKeyId><SecretAccessKey>{self.secret}</SecretAccessKey>"
            f"<SessionToken>{self.token}</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>"
            f"</{action}Result><ResponseMetadata><RequestId>1</RequestId></ResponseMetadata></{action}Response>"
        )
        return Answer(200, body.encode(), {"Content-Type": "text/xml"})

    def everything(self) -> list[str]:
        return [self.secret, self.token]


class Deployment:
    """A master key of its own in moto."""

    def __init__(self, aws: Aws) -> None:
        self.aws = aws
        self.key = aws.create_key()
        self.data_key = os.urandom(32)

    def provider(self, **other: Any) -> AwsProvider:
        return AwsProvider(**{**self.aws.settings(self.key), **other})

    def wrap(self, bound: bytes = BINDING, **other: Any) -> WrappedKey:
        return self.provider(**other).wrap(self.data_key, bound, Deadline(20))

    def unwrap(self, wrapped: WrappedKey, bound: bytes = BINDING, **other: Any) -> bytes:
        return self.provider(**other).unwrap(wrapped, bound, Deadline(20))

    def signer(self) -> str:
        """Return the access key that the last request to KMS was signed with."""
        request = next(request for request in reversed(self.aws.requests) if request.host == KMS)
        return request.headers["authorization"].partition("Credential=")[2].partition("/")[0]


def scripted(aws: Aws, **other: Any) -> AwsProvider:
    """Return a provider whose key is not in moto."""
    return AwsProvider(**aws.settings(UNUSED_KEY, **other))


def operate(provider: KeyProvider, operation: str, seconds: float = 20) -> None:
    if operation == "Encrypt":
        provider.wrap(bytes(32), BINDING, Deadline(seconds))
    else:
        provider.unwrap(WRAPPED, BINDING, Deadline(seconds))


def refused(code: str, status: int = 400, message: str = "") -> Answer:
    """Return an error as KMS words it."""
    return Answer(status, {"__type": code, "message": message}, {"Content-Type": "application/x-amz-json-1.1"})


def sts_refused(code: str, status: int = 403, message: str = "") -> Answer:
    """Return an error as STS words it."""
    body = (
        '<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>'
        f"<Code>{code}</Code><Message>{message}</Message></Error><RequestId>1</RequestId></ErrorResponse>"
    )
    return Answer(status, body.encode(), {"Content-Type": "text/xml"})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one segment for each answer, or every one waits for a delayed acknowledgement
    server: _Server

    def handle_any(self) -> None:
        aws = self.server.aws
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        host = headers["host"].partition(":")[0]
        request = Request(self.command, host, self.path, headers, body)
        aws.requests.append(request)
        self.close_connection = True
        if raw := aws.raw.get(host):
            raw(self.connection, body)
            return
        answer = aws.answer(request)
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - the names that the base class looks for

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has in the base class
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, aws: Aws, context: ssl.SSLContext | None) -> None:
        self.aws = aws
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
