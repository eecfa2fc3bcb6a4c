"""The providers against servers that misbehave: a typed error within the deadline, and nothing of it leaks."""

from __future__ import annotations

import base64
import logging
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import pytest

from sqlalchemy_kravn_crypto.exceptions import (
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
    SettingsError,
)
from sqlalchemy_kravn_crypto.providers.aws import AwsProvider
from sqlalchemy_kravn_crypto.providers.azure import AzureProvider
from sqlalchemy_kravn_crypto.providers.base import Deadline, KeyProvider, WrappedKey
from sqlalchemy_kravn_crypto.providers.transport import MAX_ANSWER_SIZE, tls_context
from sqlalchemy_kravn_crypto.providers.vault import VaultProvider
from tests import hostile_server as hostile
from tests.aws_server import BINDING, KMS, UNUSED_KEY, Aws, Credentials
from tests.azure_server import Answer, AzureVault
from tests.certificates import Authority
from tests.hostile_server import HostileServer, Listener, Raw, answers

E = TypeVar("E", bound=ProviderError)

# Not drawn anew: it is in the names of tests, which all workers must have alike.
MARK = "text-of-the-answer-5b0e7c1f9ad24386"


@dataclass
class Victim:
    """A provider, and the server that it is sent to with its credentials and a data key."""

    provider: KeyProvider
    wrapped: WrappedKey
    secret: str
    behave: Callable[[Raw], None]
    count: Callable[[], int]
    result: Callable[[Any], Any]
    """Makes the body of an answer around the result of an unwrap."""
    pauses: list[float]
    data_key: bytes = b""

    def wrap(self, seconds: float = 10) -> WrappedKey:
        self.data_key = secrets.token_bytes(32)
        return self.provider.wrap(self.data_key, BINDING, Deadline(seconds))

    def unwrap(self, seconds: float = 10) -> bytes:
        return self.provider.unwrap(self.wrapped, BINDING, Deadline(seconds))


@pytest.fixture
def server() -> Iterator[HostileServer]:
    running = HostileServer()
    yield running
    running.close()


@pytest.fixture
def vault_victim(server: HostileServer) -> Victim:
    pauses: list[float] = []
    token = f"s.{secrets.token_hex(12)}"
    return Victim(
        provider=VaultProvider(address=server.url, token=token, key="kravn", sleep=pauses.append),
        wrapped=WrappedKey("transit/kravn:v1", b"vault:v1:" + base64.b64encode(bytes(60))),
        secret=token,
        behave=lambda raw: setattr(server, "raw", raw),
        count=lambda: len(server.requests),
        result=lambda value: {"data": {"plaintext": value}},
        pauses=pauses,
    )


@pytest.fixture
def azure_victim(azure_vault: AzureVault) -> Victim:
    pauses: list[float] = []
    [version] = azure_vault.keys["kravn"]
    key_identifier = f"{azure_vault.url}/keys/kravn/{version}"
    return Victim(
        provider=AzureProvider(**azure_vault.settings(sleep=pauses.append)),
        wrapped=WrappedKey(key_identifier, bytes(256)),
        secret=azure_vault.client_secret,
        behave=lambda raw: setattr(azure_vault, "vault_raw", raw),
        count=lambda: azure_vault.count("wrapkey") + azure_vault.count("unwrapkey"),
        result=lambda value: {"kid": key_identifier, "value": value},
        pauses=pauses,
    )


@pytest.fixture
def aws_victim(aws: Aws, aws_credentials: Credentials) -> Victim:
    pauses: list[float] = []
    return Victim(
        provider=AwsProvider(**aws.settings(UNUSED_KEY, sleep=pauses.append)),
        wrapped=WrappedKey(UNUSED_KEY, bytes(180)),
        secret=aws_credentials.secret,
        behave=lambda raw: aws.raw.update({KMS: raw}),
        count=lambda: len(aws.requests),
        result=lambda value: {"KeyId": UNUSED_KEY, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT", "Plaintext": value},
        pauses=pauses,
    )


@pytest.fixture(params=["vault", "azure", "aws"])
def victim(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Victim:
    caplog.set_level(logging.DEBUG)
    chosen: Victim = request.getfixturevalue(f"{request.param}_victim")
    return chosen


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.close()


def forms(value: bytes) -> set[str]:
    standard, url_safe = base64.b64encode(value).decode(), base64.urlsafe_b64encode(value).decode()
    return {
        repr(value)[2:-1],
        value.decode("latin-1"),
        value.hex(),
        standard.rstrip("="),
        url_safe.rstrip("="),
        quote(standard.rstrip("="), safe=""),
    }


def is_of_an_sdk(filename: str) -> bool:
    return not {"hvac", "azure", "botocore", "msal", "requests", "urllib3", "http"}.isdisjoint(Path(filename).parts)


def assert_leaks_nothing(error: BaseException, logs: pytest.LogCaptureFixture, *kept: bytes) -> None:
    """Check that no form of what is kept is in the error, in what led to it, or in a log."""
    assert error.__cause__ is None
    assert error.__context__ is None
    frames = traceback.format_exception(error)
    shown = "\n".join([str(error), repr(error), repr(error.args), repr(vars(error)), *frames, logs.text])
    records = "\n".join(repr(record.__dict__) for record in logs.records)
    assert not [frame for frame in traceback.extract_tb(error.__traceback__) if is_of_an_sdk(frame.filename)]
    for value in kept:
        assert not [form for form in forms(value) if form in shown or form in records]


def assert_refused(
    victim: Victim, expected: type[E], logs: pytest.LogCaptureFixture, *, wrap: bool = True, seconds: float = 10
) -> E:
    with pytest.raises(expected) as caught:
        victim.wrap(seconds) if wrap else victim.unwrap(seconds)
    assert caught.type is expected
    assert caught.value.provider == victim.provider.name
    kept = [victim.secret.encode(), MARK.encode(), *([victim.data_key] if wrap else [])]
    assert_leaks_nothing(caught.value, logs, *kept)
    return caught.value


# --- Redirects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_redirect_is_never_followed(
    victim: Victim, listener: Listener, caplog: pytest.LogCaptureFixture, status: int, scheme: str
) -> None:
    victim.behave(answers(status, MARK.encode(), f"Location: {scheme}://{listener.address}/{MARK}"))
    error = assert_refused(victim, ProviderResponseError, caplog)
    assert "redirect" in str(error)
    assert not listener.was_contacted()
    assert victim.count() == 1


# --- Bounds on the size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        hostile.ENDLESS_BODY,
        hostile.ENDLESS_CHUNKS,
        hostile.ENDLESS_HEADERS,
        answers(200, b"[" + b" " * MAX_ANSWER_SIZE + b"]"),
        answers(500, b" " * MAX_ANSWER_SIZE),
    ],
    ids=["body", "chunks", "headers", "just above", "error"],
)
def test_an_answer_beyond_the_bound_is_refused(victim: Victim, caplog: pytest.LogCaptureFixture, raw: Raw) -> None:
    victim.behave(raw)
    error = assert_refused(victim, ProviderResponseError, caplog)
    assert "100,000" in str(error)


def test_interim_answers_without_an_end_are_refused(victim: Victim, caplog: pytest.LogCaptureFixture) -> None:
    """By the bound on bytes, or by Python's own bound on their number, which its newest releases have."""
    victim.behave(hostile.ENDLESS_INTERIM_ANSWERS)
    error = assert_refused(victim, ProviderResponseError, caplog)
    assert any(reason in str(error) for reason in ("100,000", "what is not HTTP"))


def test_an_answer_just_within_the_bound_is_read(vault_victim: Victim) -> None:
    data_key = secrets.token_bytes(32)
    body = str(vault_victim.result(base64.b64encode(data_key).decode())).replace("'", '"')
    vault_victim.behave(answers(200, body.encode() + b" " * (MAX_ANSWER_SIZE - 1000)))
    assert vault_victim.unwrap() == data_key


@pytest.mark.parametrize(
    "raw",
    [
        hostile.GZIP_BOMB,
        *(answers(200, b"{}", f"Content-Encoding: {coding}") for coding in ("gzip", "deflate", "br", "identity")),
    ],
)
def test_a_content_coding_is_refused(victim: Victim, caplog: pytest.LogCaptureFixture, raw: Raw) -> None:
    victim.behave(raw)
    error = assert_refused(victim, ProviderResponseError, caplog)
    assert "compressed" in str(error)


def test_no_content_coding_is_asked_for(server: HostileServer, vault_victim: Victim) -> None:
    server.raw = answers(200, {})
    with pytest.raises(ProviderResponseError):
        vault_victim.wrap()
    head = server.requests[0].partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    assert b"accept-encoding: identity" in head


# --- The deadline ----------------------------------------------------------------------------------------------------


@contextmanager
def ended_by_the_client() -> Iterator[None]:
    """Check that it was the client who gave up, long before the server would have."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < hostile.ENOUGH


@pytest.mark.parametrize(
    "raw",
    [
        hostile.DRIPS_HEADERS,
        hostile.DRIPS_BODY,
        hostile.DRIPS_CHUNKS,
        hostile.DRIPS_INTERIM_ANSWERS,
        hostile.is_silent,
    ],
    ids=["headers", "body", "chunks", "interim answers", "silence"],
)
def test_the_deadline_ends_an_answer_that_does_not(victim: Victim, caplog: pytest.LogCaptureFixture, raw: Raw) -> None:
    victim.behave(raw)
    with ended_by_the_client():
        error = assert_refused(victim, ProviderUnavailableError, caplog, seconds=0.5)
    assert "0.5 seconds" in str(error)
    assert victim.count() <= 1


def test_all_requests_of_an_operation_share_the_deadline(
    azure_vault: AzureVault, azure_victim: Victim, caplog: pytest.LogCaptureFixture
) -> None:
    azure_vault.login_raw = hostile.DRIPS_BODY
    with ended_by_the_client():
        assert_refused(azure_victim, ProviderUnavailableError, caplog, seconds=0.5)
    assert azure_victim.count() == 0


def test_a_deadline_that_has_passed_sends_nothing(victim: Victim, caplog: pytest.LogCaptureFixture) -> None:
    moments = iter([0.0, *[1.0] * 50])
    with pytest.raises(ProviderUnavailableError):
        victim.provider.wrap(bytes(32), BINDING, Deadline(1, lambda: next(moments)))
    assert victim.count() == 0


def test_a_tls_handshake_that_never_ends_is_ended(azure_vault: AzureVault, server: HostileServer) -> None:
    server.raw = hostile.is_silent
    provider = AzureProvider(**azure_vault.settings(resolve=lambda _host, _port: ("127.0.0.1", server.port)))
    with ended_by_the_client(), pytest.raises(ProviderUnavailableError, match=r"0\.3 seconds"):
        provider.wrap(bytes(32), b"", Deadline(0.3))


# --- Answers that break parsers --------------------------------------------------------------------------------------

GARBAGE = {
    "not JSON": MARK.encode(),
    "nothing": b"",
    "an empty object": b"{}",
    "null": b"null",
    "a number": b"1",
    "a huge number": b"9" * 5000,
    "a list": b"[1]",
    "a string": f'"{MARK}"'.encode(),
    "numbers for errors": b'{"errors":[1]}',
    "a string for errors": f'{{"errors":"{MARK}","error":"{MARK}"}}'.encode(),
    "errors in errors": b'{"error":{"code":1,"innererror":[]},"errors":[[],{}]}',
    "brackets": b"[" * 90_000,
    "braces": b'{"error":' * 10_000,
    "not UTF-8": b'{"errors":["\xff"]}',
    "another encoding": '{"data":{}}'.encode("utf-16"),
    "null for data": b'{"data":null,"kid":null,"value":null}',
    "a list for data": b'{"data":[],"kid":[],"value":[]}',
}


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("status", [200, 400, 403, 503])
@pytest.mark.parametrize("operation", ["wrap", "unwrap"])
def test_garbage_ends_in_a_provider_error(
    victim: Victim, caplog: pytest.LogCaptureFixture, body: bytes, status: int, operation: str
) -> None:
    victim.behave(answers(status, body))
    with pytest.raises(ProviderError) as caught:
        victim.wrap() if operation == "wrap" else victim.unwrap()
    if status == 200:
        assert caught.type is ProviderResponseError
    assert_leaks_nothing(caught.value, caplog, victim.secret.encode(), MARK.encode())


@pytest.mark.parametrize(
    "data",
    [
        f"{MARK}\r\n\r\n".encode(),
        b"\x16\x03\x01\x00\x00",
        f"HTTP/1.1 {MARK} OK\r\n\r\n".encode(),
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X-Many: 1\r\n" * 200 + b"\r\n",
    ],
    ids=["text", "TLS", "status", "a long header", "many headers"],
)
def test_what_is_not_http_is_refused(victim: Victim, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    victim.behave(hostile.sends(data))
    assert_refused(victim, ProviderResponseError, caplog)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 418, 429, 500, 502, 503])
def test_a_request_that_is_echoed_leaks_nothing(victim: Victim, caplog: pytest.LogCaptureFixture, status: int) -> None:
    victim.behave(hostile.echoes(status))
    with pytest.raises(ProviderError) as caught:
        victim.wrap()
    assert_leaks_nothing(caught.value, caplog, victim.secret.encode(), victim.data_key)


@pytest.mark.parametrize("size", [0, 1, 31, 33, 64])
def test_a_data_key_of_another_size_is_refused(victim: Victim, caplog: pytest.LogCaptureFixture, size: int) -> None:
    value = secrets.token_bytes(size)
    text = base64.urlsafe_b64encode(value).rstrip(b"=") if victim.provider.name == "azure" else base64.b64encode(value)
    victim.behave(answers(200, victim.result(text.decode())))
    error = assert_refused(victim, ProviderResponseError, caplog, wrap=False)
    if size > 1:
        assert_leaks_nothing(error, caplog, value)


def test_another_data_key_is_for_the_key_check_to_notice(victim: Victim) -> None:
    other = bytes(range(32))
    text = base64.urlsafe_b64encode(other).rstrip(b"=") if victim.provider.name == "azure" else base64.b64encode(other)
    victim.behave(answers(200, victim.result(text.decode())))
    assert victim.unwrap() == other


@pytest.mark.parametrize("value", [None, 1, [], {}, True, "!" * 44, "A" * 42 + "B=", "A" * 42 + "B", " " + "A" * 43])
def test_a_data_key_in_another_form_is_refused(victim: Victim, caplog: pytest.LogCaptureFixture, value: object) -> None:
    victim.behave(answers(200, victim.result(value)))
    assert_refused(victim, ProviderResponseError, caplog, wrap=False)


# --- Attempts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_three_times(victim: Victim, caplog: pytest.LogCaptureFixture, status: int) -> None:
    victim.behave(answers(status, MARK.encode()))
    assert_refused(victim, ProviderUnavailableError, caplog)
    assert victim.count() == 3
    assert victim.pauses == [0.2, 0.8]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 418, 501])
def test_what_will_not_pass_is_tried_once(victim: Victim, status: int) -> None:
    victim.behave(answers(status, {}))
    with pytest.raises(ProviderError):
        victim.unwrap()
    assert victim.count() == 1
    assert victim.pauses == []


def test_a_lost_connection_is_tried_again(victim: Victim, caplog: pytest.LogCaptureFixture) -> None:
    victim.behave(hostile.hangs_up)
    assert_refused(victim, ProviderUnavailableError, caplog)
    assert victim.count() == 3


@pytest.mark.parametrize(
    "data",
    [
        hostile.http_answer(200, MARK.encode(), length=5000),
        f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{MARK}".encode(),
    ],
    ids=["body", "chunks"],
)
def test_a_truncated_answer_is_tried_again(victim: Victim, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    victim.behave(hostile.sends(data))
    assert_refused(victim, ProviderUnavailableError, caplog)
    assert victim.count() == 3


def test_the_server_says_how_long_to_wait(victim: Victim, caplog: pytest.LogCaptureFixture) -> None:
    victim.behave(answers(429, {}, "Retry-After: 2"))
    assert_refused(victim, ProviderUnavailableError, caplog)
    assert victim.pauses == [2, 2]


@pytest.mark.parametrize("wait", ["Mon, 23 Nov 2026 00:00:00 GMT", "-1", "nan", "1e9", "\xb2"])
def test_a_wait_in_another_form_is_ignored(victim: Victim, wait: str) -> None:
    header = f"Retry-After: {wait}".encode("latin-1")
    victim.behave(hostile.sends(b"HTTP/1.1 503 Down\r\nContent-Length: 0\r\n" + header + b"\r\n\r\n"))
    with pytest.raises(ProviderUnavailableError):
        victim.unwrap()
    assert victim.pauses == [0.2, 0.8]


@pytest.mark.parametrize("wait", ["11", "9" * 400])
def test_nobody_waits_beyond_the_deadline(victim: Victim, wait: str) -> None:
    victim.behave(answers(503, {}, f"Retry-After: {wait}"))
    with pytest.raises(ProviderUnavailableError):
        victim.unwrap()
    assert victim.count() == 1
    assert victim.pauses == []


# --- Where it connects to --------------------------------------------------------------------------------------------


def test_nobody_listens(vault_victim: Victim, server: HostileServer, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    provider = VaultProvider(
        address=f"http://127.0.0.1:{port}", token=vault_victim.secret, key="kravn", sleep=vault_victim.pauses.append
    )
    vault_victim.provider = provider
    assert_refused(vault_victim, ProviderUnavailableError, caplog)
    assert len(vault_victim.pauses) == 2


@pytest.mark.parametrize("error", [OSError, socket.gaierror])
def test_a_name_that_does_not_resolve(azure_vault: AzureVault, error: type[OSError]) -> None:
    def resolve(_host: str, _port: int) -> tuple[str, int]:
        raise error(MARK)

    provider = AzureProvider(**azure_vault.settings(resolve=resolve, sleep=lambda _: None))
    with pytest.raises(ProviderUnavailableError) as caught:
        provider.wrap(bytes(32), b"", Deadline(10))
    assert caught.value.__context__ is None
    assert MARK not in str(caught.value)


def test_the_environment_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: HostileServer, listener: Listener, vault_victim: Victim
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://{listener.address}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password something\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "VAULT_CACERT", "VAULT_CLIENT_CERT", "VAULT_TOKEN"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    monkeypatch.setenv("VAULT_ADDR", f"http://{listener.address}")
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "session-keys"))
    provider = VaultProvider(address=server.url, token=vault_victim.secret, key="kravn")
    server.raw = answers(200, {"data": {"ciphertext": "vault:v1:AAAA"}})
    provider.wrap(bytes(32), b"", Deadline(10))
    assert not listener.was_contacted()
    assert b"authorization" not in server.requests[0].lower()
    assert not (tmp_path / "session-keys").exists()


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.mark.parametrize("names", [["localhost"], ["kravn.vault.azure.net.example"]])
def test_a_certificate_for_another_host_is_refused(
    azure_vault: AzureVault, authority: Authority, caplog: pytest.LogCaptureFixture, names: list[str]
) -> None:
    impostor = HostileServer(authority.issue(*names))
    try:
        settings = azure_vault.settings(
            resolve=lambda _host, _port: ("127.0.0.1", impostor.port), ca_bundle=authority.ca_bundle
        )
        with pytest.raises(ProviderUnavailableError, match="KRAVN_KMS_AZURE_CA_BUNDLE") as caught:
            AzureProvider(**settings).wrap(bytes(32), b"", Deadline(10))
        assert_leaks_nothing(caught.value, caplog, azure_vault.client_secret.encode())
        assert impostor.requests == []
    finally:
        impostor.close()


@pytest.mark.parametrize("trusted", ["public", "other"])
def test_a_certificate_of_another_authority_is_refused(
    azure_vault: AzureVault, authority: Authority, trusted: str
) -> None:
    bundle = authority.ca_bundle if trusted == "other" else None
    with pytest.raises(ProviderUnavailableError, match="not trusted"):
        AzureProvider(**azure_vault.settings(ca_bundle=bundle)).wrap(bytes(32), b"", Deadline(10))
    assert azure_vault.requests == []


def test_all_addresses_of_a_host_are_tried(server: HostileServer) -> None:
    server.raw = answers(200, {"data": {"ciphertext": "vault:v1:AAAA"}})
    provider = VaultProvider(address=f"http://localhost:{server.port}", token="t", key="kravn")
    assert provider.wrap(bytes(32), b"", Deadline(10)).master_key == "transit/kravn:v1"


def test_vault_over_tls_uses_the_ca_bundle(authority: Authority) -> None:
    server = HostileServer(authority.issue("vault.example"))
    server.raw = answers(200, {"data": {"ciphertext": "vault:v7:AAAA"}})
    try:
        provider = VaultProvider(
            address="https://vault.example:8200",
            token="t",
            key="kravn",
            ca_bundle=authority.ca_bundle,
            resolve=lambda host, port: (
                ("127.0.0.1", server.port) if (host, port) == ("vault.example", 8200) else ("", 0)
            ),
        )
        assert provider.wrap(bytes(32), b"", Deadline(10)).master_key == "transit/kravn:v7"
        assert b"host: vault.example:8200\r\n" in server.requests[0].lower()
    finally:
        server.close()


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_a_ca_bundle_without_certificates_is_a_wrong_setting(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bundle.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match="KRAVN_KMS_VAULT_CA_BUNDLE"):
        tls_context(path, "KRAVN_KMS_VAULT_CA_BUNDLE")


# --- The login service -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("status", [200, 400])
def test_garbage_from_the_login_service(
    azure_vault: AzureVault, azure_victim: Victim, caplog: pytest.LogCaptureFixture, body: bytes, status: int
) -> None:
    caplog.set_level(logging.DEBUG)
    azure_vault.login_raw = answers(status, body)
    with pytest.raises(ProviderError) as caught:
        azure_victim.wrap()
    assert_leaks_nothing(caught.value, caplog, azure_victim.secret.encode(), MARK.encode(), azure_victim.data_key)


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_client_secret_that_is_echoed_leaks_nothing(
    azure_vault: AzureVault, azure_victim: Victim, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.DEBUG)

    def raw(connection: socket.socket, body: bytes) -> None:
        if body:
            hostile.answers(status, {"error": "invalid_client", "error_description": body.decode()})(connection, body)
            return
        base = "https://login.microsoftonline.com/t"
        found = {"issuer": base, "token_endpoint": f"{base}/token", "authorization_endpoint": f"{base}/authorize"}
        hostile.answers(200, found)(connection, body)

    azure_vault.login_raw = raw
    with pytest.raises(ProviderError) as caught:
        azure_victim.wrap()
    assert_leaks_nothing(caught.value, caplog, azure_victim.secret.encode(), azure_victim.data_key)


def test_no_credential_is_logged_when_all_is_well(
    azure_vault: AzureVault, azure_victim: Victim, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    azure_victim.wrapped = azure_victim.wrap()
    assert azure_victim.unwrap() == azure_victim.data_key
    tokens = [token.encode() for token in azure_vault.tokens]
    assert_leaks_nothing(ValueError(), caplog, azure_victim.secret.encode(), azure_victim.data_key, *tokens)


def test_the_login_service_fails_for_a_moment(azure_vault: AzureVault, azure_victim: Victim) -> None:
    azure_vault.login_answers.extend([Answer(503), Answer(429, headers={"Retry-After": "3"})])
    azure_victim.wrap()
    assert azure_victim.pauses == [0.2, 3]
