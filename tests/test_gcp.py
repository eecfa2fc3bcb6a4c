"""The Google provider: its SDKs with a local gRPC server that does as Cloud KMS, and with servers that misbehave."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import pickle
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import google_crc32c
import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sqlalchemy_kravn_crypto.configuration import provider_of
from sqlalchemy_kravn_crypto.exceptions import (
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
from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey
from sqlalchemy_kravn_crypto.providers.gcp import GcpProvider
from sqlalchemy_kravn_crypto.providers.proxy import Proxy
from sqlalchemy_kravn_crypto.settings import Settings
from tests import hostile_http2
from tests import hostile_server as hostile
from tests.certificates import Authority
from tests.connect_proxy import ConnectProxy
from tests.gcp_server import KEY, KMS_HOST, Call, CloudKms, Status, served
from tests.hostile_http2 import http2_server
from tests.hostile_server import HostileServer, Listener, Raw
from tests.test_transport import assert_leaks_nothing

E = TypeVar("E", bound=ProviderError)

DATA_KEY = os.urandom(32)
BINDING = b"\x00\x00\x00\x07binding"
Code = grpc.StatusCode
MARK = "text-of-the-answer-5b0e7c1f9ad24386"  # in the names of tests, which all workers must have alike


def provider(gcp_kms: CloudKms, **other: Any) -> GcpProvider:
    return GcpProvider(**gcp_kms.settings(**{"sleep": lambda _: None, **other}))


def wrap(gcp_kms: CloudKms, **other: Any) -> WrappedKey:
    return provider(gcp_kms, **other).wrap(DATA_KEY, BINDING, Deadline(20))


def unwrap(gcp_kms: CloudKms, wrapped: WrappedKey, binding: bytes = BINDING, **other: Any) -> bytes:
    return provider(gcp_kms, **other).unwrap(wrapped, binding, Deadline(20))


class Victim:
    """A provider, and the server that it is sent to with its credentials and a data key."""

    def __init__(
        self, kms: CloudKms, logs: pytest.LogCaptureFixture, streams: pytest.CaptureFixture[str], **settings: Any
    ) -> None:
        self.kms = kms
        self.pauses: list[float] = []
        self.provider = provider(kms, sleep=self.pauses.append, **settings)
        self.wrapped = WrappedKey(kms.primary, secrets.token_bytes(60))
        self._logs = logs
        self._streams = streams

    def assert_refused(self, *expected: type[E], wrap: bool = True, seconds: float = 10) -> E:
        """Check the error, and that nothing of what was sent or received is in it or in what was logged."""
        data_key = secrets.token_bytes(32)
        deadline = Deadline(seconds)
        with pytest.raises(expected) as caught:
            self.provider.wrap(data_key, BINDING, deadline) if wrap else self.provider.unwrap(
                self.wrapped, BINDING, deadline
            )
        assert caught.type in expected
        assert caught.value.provider == "gcp"
        tokens = [call.token.encode() for call in self.kms.calls]
        kept = [data_key, self.wrapped.blob, MARK.encode(), *tokens, self.kms.service_account.private_key.encode()]
        self.assert_leaks_nothing(caught.value, *kept)
        return caught.value

    def assert_leaks_nothing(self, error: BaseException, *kept: bytes) -> None:
        assert_leaks_nothing(error, self._logs, *kept)
        frames = traceback.extract_tb(error.__traceback__)
        assert not [frame for frame in frames if {"google", "grpc", "proto"} & set(Path(frame.filename).parts)]
        written = self._streams.readouterr()
        for value in kept:
            assert value.decode("latin-1") not in written.out + written.err


@pytest.fixture
def victim(gcp_kms: CloudKms, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Victim:
    # The SDKs' loggers pass on to nobody until somebody asks for them.
    for name in ("", "google", "grpc"):
        caplog.set_level(logging.DEBUG, logger=name)
    return Victim(gcp_kms, caplog, capfd)


# --- Wrapping and unwrapping -----------------------------------------------------------------------------------------


def test_a_data_key_comes_back(gcp_kms: CloudKms) -> None:
    wrapped = wrap(gcp_kms)
    assert wrapped.master_key == f"{KEY}/cryptoKeyVersions/1"
    assert DATA_KEY not in wrapped.blob
    assert unwrap(gcp_kms, wrapped) == DATA_KEY


def test_each_takes_one_call_and_no_other_request(gcp_kms: CloudKms) -> None:
    unwrap(gcp_kms, wrap(gcp_kms))
    assert [call.operation for call in gcp_kms.calls] == ["Encrypt", "Decrypt"]
    assert gcp_kms.requests == []


def test_calls_name_the_key_and_not_its_version(gcp_kms: CloudKms) -> None:
    unwrap(gcp_kms, wrap(gcp_kms))
    assert {call.request.name for call in gcp_kms.calls} == {KEY}
    # What Google sends a call to the right region by.
    assert {call.metadata["x-goog-request-params"] for call in gcp_kms.calls} == {f"name={KEY}"}


def test_everything_that_is_sent_has_a_checksum(gcp_kms: CloudKms) -> None:
    wrapped = wrap(gcp_kms)
    unwrap(gcp_kms, wrapped)
    encrypt, decrypt = (call.request for call in gcp_kms.calls)
    assert encrypt.plaintext_crc32c == google_crc32c.value(DATA_KEY)
    assert encrypt.additional_authenticated_data_crc32c == google_crc32c.value(BINDING)
    assert decrypt.ciphertext_crc32c == google_crc32c.value(wrapped.blob)
    assert decrypt.additional_authenticated_data_crc32c == google_crc32c.value(BINDING)


def test_threads_may_share_a_provider(gcp_kms: CloudKms) -> None:
    shared = provider(gcp_kms)
    data_keys = [os.urandom(32) for _ in range(12)]

    def there_and_back(data_key: bytes) -> bytes:
        return shared.unwrap(shared.wrap(data_key, b"", Deadline(60)), b"", Deadline(60))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(there_and_back, data_keys)) == data_keys


def test_no_thread_stays(gcp_kms: CloudKms) -> None:
    before = set(threading.enumerate())
    unwrap(gcp_kms, wrap(gcp_kms))
    of_servers = ("process_request_thread", "ThreadPoolExecutor")
    left = [thread for thread in set(threading.enumerate()) - before if not any(n in thread.name for n in of_servers)]
    assert left == []


def test_it_authenticates_and_binds(gcp_kms: CloudKms) -> None:
    assert GcpProvider.authenticates
    assert GcpProvider.binds
    wrapped = wrap(gcp_kms)
    for other in (b"", BINDING[:-1], BINDING + b"x", BINDING.swapcase()):
        with pytest.raises(UnwrapRefusedError):
            unwrap(gcp_kms, wrapped, other)


@pytest.mark.parametrize("position", [0, 3, 4, 20, -1])
def test_an_altered_wrapped_key_is_refused(gcp_kms: CloudKms, position: int) -> None:
    wrapped = wrap(gcp_kms)
    blob = bytearray(wrapped.blob)
    blob[position] ^= 1
    with pytest.raises(UnwrapRefusedError) as caught:
        unwrap(gcp_kms, WrappedKey(wrapped.master_key, bytes(blob)))
    assert caught.value.provider == "gcp"
    assert caught.value.__context__ is None


@pytest.mark.parametrize("blob", [b"x", b"x" * 15, bytes(4096)])
def test_garbage_is_refused(gcp_kms: CloudKms, blob: bytes) -> None:
    with pytest.raises(UnwrapRefusedError):
        unwrap(gcp_kms, WrappedKey(gcp_kms.primary, blob))


def test_a_record_of_another_master_key_is_not_sent(gcp_kms: CloudKms) -> None:
    wrapped = wrap(gcp_kms)
    moved = WrappedKey(wrapped.master_key.replace("/kravn/", "/another/"), wrapped.blob)
    with pytest.raises(UnwrapRefusedError, match="KRAVN_KMS_GCP_KEY"):
        unwrap(gcp_kms, moved)
    assert gcp_kms.count("Decrypt") == 0


# --- The life of the master key --------------------------------------------------------------------------------------


def test_rotating_the_master_key_leaves_old_wrapped_keys_readable(gcp_kms: CloudKms) -> None:
    old = wrap(gcp_kms)
    gcp_kms.rotate()
    new = wrap(gcp_kms)
    assert (old.master_key, new.master_key) == (f"{KEY}/cryptoKeyVersions/1", f"{KEY}/cryptoKeyVersions/2")
    assert unwrap(gcp_kms, old) == unwrap(gcp_kms, new) == DATA_KEY


def test_a_version_that_is_disabled_or_destroyed(gcp_kms: CloudKms) -> None:
    wrapped = wrap(gcp_kms)
    gcp_kms.disabled.add(1)
    for operation in (lambda: wrap(gcp_kms), lambda: unwrap(gcp_kms, wrapped)):
        with pytest.raises(MasterKeyUnusableError, match="gcloud kms keys versions list"):
            operation()
    gcp_kms.rotate()
    assert unwrap(gcp_kms, wrap(gcp_kms)) == DATA_KEY
    with pytest.raises(MasterKeyUnusableError):
        unwrap(gcp_kms, wrapped)


def test_a_master_key_that_is_missing(gcp_kms: CloudKms) -> None:
    with pytest.raises(MasterKeyNotFoundError, match="KRAVN_KMS_GCP_KEY"):
        wrap(gcp_kms, key=f"{KEY}2")


@pytest.mark.parametrize("operation", ["Encrypt", "Decrypt"])
def test_a_missing_right(gcp_kms: CloudKms, operation: str) -> None:
    wrapped = wrap(gcp_kms)
    gcp_kms.denied.add(operation)
    with pytest.raises(ProviderDeniedError, match=f"useTo{operation}.*CryptoKey {operation}er") as caught:
        wrap(gcp_kms) if operation == "Encrypt" else unwrap(gcp_kms, wrapped)
    assert caught.type is ProviderDeniedError


def test_a_boot_that_may_only_unwrap(gcp_kms: CloudKms) -> None:
    wrapped = wrap(gcp_kms)
    gcp_kms.denied.add("Encrypt")
    assert unwrap(gcp_kms, wrapped) == DATA_KEY


def test_a_key_of_the_service_account_that_was_deleted(gcp_kms: CloudKms) -> None:
    gcp_kms.revoked = True
    with pytest.raises(CredentialExpiredError, match="KRAVN_KMS_GCP_CREDENTIALS_FILE"):
        wrap(gcp_kms)
    assert gcp_kms.count("Encrypt") == 1


# --- What a status means ---------------------------------------------------------------------------------------------

MEANINGS: dict[grpc.StatusCode, tuple[type[ProviderError], type[ProviderError]]] = {
    Code.ABORTED: (ProviderUnavailableError, ProviderUnavailableError),
    Code.ALREADY_EXISTS: (ProviderResponseError, ProviderResponseError),
    Code.CANCELLED: (ProviderUnavailableError, ProviderUnavailableError),
    Code.DATA_LOSS: (ProviderUnavailableError, ProviderUnavailableError),
    Code.DEADLINE_EXCEEDED: (ProviderUnavailableError, ProviderUnavailableError),
    Code.FAILED_PRECONDITION: (MasterKeyUnusableError, MasterKeyUnusableError),
    Code.INTERNAL: (ProviderUnavailableError, ProviderUnavailableError),
    Code.INVALID_ARGUMENT: (MasterKeyUnusableError, UnwrapRefusedError),
    Code.NOT_FOUND: (MasterKeyNotFoundError, MasterKeyNotFoundError),
    Code.OUT_OF_RANGE: (ProviderResponseError, ProviderResponseError),
    Code.PERMISSION_DENIED: (ProviderDeniedError, ProviderDeniedError),
    Code.RESOURCE_EXHAUSTED: (ProviderUnavailableError, ProviderUnavailableError),
    Code.UNAUTHENTICATED: (CredentialExpiredError, CredentialExpiredError),
    Code.UNAVAILABLE: (ProviderUnavailableError, ProviderUnavailableError),
    Code.UNIMPLEMENTED: (ProviderResponseError, ProviderResponseError),
    Code.UNKNOWN: (ProviderUnavailableError, ProviderUnavailableError),
}
"""The errors of a wrap and of an unwrap."""

TRANSIENT = [code for code, (error, _) in MEANINGS.items() if error is ProviderUnavailableError]


def test_every_status_has_a_meaning() -> None:
    assert set(MEANINGS) == set(Code) - {Code.OK}


@pytest.mark.parametrize("code", MEANINGS)
@pytest.mark.parametrize("operation", ["wrap", "unwrap"])
def test_a_status_is_the_right_error(victim: Victim, code: grpc.StatusCode, operation: str) -> None:
    victim.kms.behave = lambda _: Status(code, MARK)
    victim.assert_refused(MEANINGS[code][operation == "unwrap"], wrap=operation == "wrap")
    assert len(victim.kms.calls) == (3 if code in TRANSIENT else 1)
    assert victim.pauses == ([0.2, 0.8] if code in TRANSIENT else [])


@pytest.mark.parametrize("code", TRANSIENT)
def test_a_service_that_recovers(gcp_kms: CloudKms, code: grpc.StatusCode) -> None:
    gcp_kms.answers.extend([Status(code), Status(code)])
    wrapped = wrap(gcp_kms)
    assert gcp_kms.count("Encrypt") == 3
    assert unwrap(gcp_kms, wrapped) == DATA_KEY


def test_each_attempt_connects_anew(gcp_kms: CloudKms) -> None:
    """Within a channel, gRPC makes a pause of its own before it connects again."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    started: list[grpc.Server] = []

    def start(_: float) -> None:
        started.append(served(gcp_kms.handle, gcp_kms.authority.issue(KMS_HOST), port=port)[0])

    try:
        wrap(gcp_kms, sleep=start, resolve=lambda *_: ("127.0.0.1", port))
    finally:
        for server in started:
            server.stop(None).wait()
    assert len(started) == 1


def test_nobody_waits_beyond_the_deadline(victim: Victim) -> None:
    victim.kms.behave = lambda _: Status(Code.UNAVAILABLE)
    with pytest.raises(ProviderUnavailableError):
        victim.provider.wrap(DATA_KEY, BINDING, Deadline(0.2))
    assert victim.pauses == []


def test_the_quota_is_told_from_an_answer_that_is_too_large(victim: Victim) -> None:
    victim.kms.behave = lambda _: Status(Code.RESOURCE_EXHAUSTED, "Quota exceeded for quota metric.")
    assert "quotas" in str(victim.assert_refused(ProviderUnavailableError))
    victim.kms.behave = lambda _: bytes(100_001)
    assert "100,000" in str(victim.assert_refused(ProviderResponseError))


# --- Answers that are not what they must be --------------------------------------------------------------------------


def without(*names: str) -> Callable[[Any], None]:
    def alter(answer: Any) -> None:
        for name in names:
            type(answer).pb(answer).ClearField(name)

    return alter


def with_other(name: str, value: Any) -> Callable[[Any], None]:
    return lambda answer: setattr(answer, name, value)


@pytest.mark.parametrize(
    "alter",
    [
        without("verified_plaintext_crc32c"),
        without("verified_additional_authenticated_data_crc32c"),
        without("ciphertext_crc32c"),
        with_other("ciphertext_crc32c", 0),
        with_other("ciphertext_crc32c", -1),
        with_other("ciphertext", bytes(60)),
    ],
)
def test_a_wrap_whose_checksums_are_missing_or_wrong_is_refused(victim: Victim, alter: Callable[[Any], None]) -> None:
    victim.kms.alter = alter
    assert "checksum" in str(victim.assert_refused(ProviderResponseError))
    assert victim.pauses == []


@pytest.mark.parametrize(
    "alter", [without("plaintext_crc32c"), with_other("plaintext_crc32c", 0), with_other("plaintext", bytes(32))]
)
def test_an_unwrap_whose_checksum_is_missing_or_wrong_is_refused(victim: Victim, alter: Callable[[Any], None]) -> None:
    victim.wrapped = wrap(victim.kms)
    victim.kms.alter = alter
    assert "checksum" in str(victim.assert_refused(ProviderResponseError, wrap=False))


@pytest.mark.parametrize(
    "name",
    [
        "",
        KEY,
        f"{KEY}/cryptoKeyVersions/",
        f"{KEY}/cryptoKeyVersions/0",
        f"{KEY}/cryptoKeyVersions/01",
        f"{KEY}/cryptoKeyVersions/x",
        f"{KEY}/cryptoKeyVersions/1\n",
        f"{KEY}/cryptoKeyVersions/1/x",
        f"{KEY}/cryptoKeyVersions/" + "1" * 19,
        f"{KEY}/importJobs/1",
        f"{KEY}2/cryptoKeyVersions/1",
        f"{KEY.replace('/kravn-test/', '/another/')}/cryptoKeyVersions/1",
        MARK,
    ],
)
def test_the_name_of_something_else_is_refused(victim: Victim, name: str) -> None:
    victim.kms.alter = with_other("name", name)
    victim.assert_refused(ProviderResponseError)


@pytest.mark.parametrize("size", [0, 4097, 60_000])
def test_a_wrapped_key_that_no_row_could_hold_is_refused(victim: Victim, size: int) -> None:
    def alter(answer: Any) -> None:
        answer.ciphertext = bytes(size)
        answer.ciphertext_crc32c = google_crc32c.value(bytes(size))

    victim.kms.alter = alter
    victim.assert_refused(ProviderResponseError)


def returns(data_key: bytes) -> Callable[[Any], None]:
    def alter(answer: Any) -> None:
        answer.plaintext = data_key
        answer.plaintext_crc32c = google_crc32c.value(data_key)

    return alter


@pytest.mark.parametrize("size", [0, 1, 31, 33, 64])
def test_a_data_key_of_another_size_is_refused(victim: Victim, size: int) -> None:
    value = secrets.token_bytes(size)
    victim.wrapped = wrap(victim.kms)
    victim.kms.alter = returns(value)
    error = victim.assert_refused(ProviderResponseError, wrap=False)
    if size > 1:
        victim.assert_leaks_nothing(error, value)


def test_another_data_key_is_for_the_key_check_to_notice(gcp_kms: CloudKms) -> None:
    wrapped = wrap(gcp_kms)
    gcp_kms.alter = returns(bytes(range(32)))
    assert unwrap(gcp_kms, wrapped) == bytes(range(32))


GARBAGE = {
    "nothing": b"",
    "text": MARK.encode(),
    "zeros": bytes(1000),
    "a message cut off": b"\x0a\x7fprojects",
    "not UTF-8": b"\x0a\x02\xff\xfe",
    "groups in groups": b"\x0b" * 90_000,
    "another field's type": b"\x08\x01\x10\x01",
}


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("operation", ["wrap", "unwrap"])
def test_garbage_in_place_of_a_message_is_refused(victim: Victim, body: bytes, operation: str) -> None:
    victim.kms.behave = lambda _: body
    victim.assert_refused(ProviderResponseError, wrap=operation == "wrap")


@pytest.mark.parametrize("code", MEANINGS)
@pytest.mark.parametrize("operation", ["wrap", "unwrap"])
def test_a_request_that_is_echoed_leaks_nothing(victim: Victim, code: grpc.StatusCode, operation: str) -> None:
    def echo(call: Call) -> Status:
        sent = call.request.plaintext if call.operation == "Encrypt" else call.request.ciphertext
        return Status(code, f"{sent.decode('latin-1')} {sent.hex()} {sent!r} {call.token} {MARK}")

    victim.kms.behave = echo
    victim.assert_refused(MEANINGS[code][operation == "unwrap"], wrap=operation == "wrap")


def test_nothing_is_logged_when_all_is_well(victim: Victim) -> None:
    data_key = secrets.token_bytes(32)
    wrapped = victim.provider.wrap(data_key, BINDING, Deadline(10))
    assert victim.provider.unwrap(wrapped, BINDING, Deadline(10)) == data_key
    tokens = [call.token.encode() for call in victim.kms.calls]
    assert len(tokens) == 2
    victim.assert_leaks_nothing(ValueError(), data_key, *tokens, victim.kms.service_account.private_key.encode())


# --- Bounds on the size ----------------------------------------------------------------------------------------------


def unknown_field(size: int) -> bytes:
    """Return a protobuf field 1000 of that many zeros, which readers leave out."""
    length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    return b"\xc2\x3e" + length + bytes(size)


def test_an_answer_just_within_the_bound_is_read(gcp_kms: CloudKms) -> None:
    wrapped = wrap(gcp_kms)

    def behave(call: Call) -> bytes | Status:
        answer = gcp_kms._operate(call)
        assert isinstance(answer, bytes)
        return answer + unknown_field(100_000 - len(answer) - 5)

    gcp_kms.behave = behave
    assert unwrap(gcp_kms, wrapped) == DATA_KEY


@pytest.mark.parametrize("size", [100_001, 5_000_000])
def test_an_answer_beyond_the_bound_is_refused(victim: Victim, size: int) -> None:
    victim.kms.behave = lambda _: bytes(size)
    assert "100,000" in str(victim.assert_refused(ProviderResponseError))
    assert victim.pauses == []


def test_an_answer_that_grows_when_it_is_inflated_is_refused(victim: Victim) -> None:
    victim.kms.behave = lambda _: bytes(50_000_000)
    server, port = served(victim.kms.handle, victim.kms.authority.issue(KMS_HOST), compression=grpc.Compression.Gzip)
    try:
        victim.provider = provider(victim.kms, resolve=lambda *_: ("127.0.0.1", port))
        assert "100,000" in str(victim.assert_refused(ProviderResponseError))
    finally:
        server.stop(None).wait()


def test_a_status_with_an_endless_text_is_refused(victim: Victim) -> None:
    victim.kms.behave = lambda _: Status(Code.INTERNAL, MARK * 1000)
    victim.assert_refused(ProviderResponseError)


# --- Servers that do not speak as one must ---------------------------------------------------------------------------


@contextmanager
def ended_by_the_client() -> Iterator[None]:
    """Check that it was the client who gave up, long before the server would have."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < hostile.ENOUGH


@pytest.fixture
def impostor(victim: Victim, tmp_path: Path) -> Iterator[HostileServer]:
    """A server in the place of the KMS, with its certificate, that speaks HTTP/2 as it likes."""
    authority = Authority(tmp_path)
    server = http2_server(authority.issue(KMS_HOST))
    settings = {"ca_bundle": authority.ca_bundle, "resolve": lambda *_: ("127.0.0.1", server.port)}
    victim.provider = provider(victim.kms, sleep=victim.pauses.append, **settings)
    yield server
    server.close()


@pytest.mark.parametrize(
    "raw",
    [
        hostile.is_silent,
        hostile_http2.DRIPS_MESSAGE,
        hostile_http2.ENDLESS_PINGS,
        hostile_http2.ENDLESS_SETTINGS,
    ],
    ids=["silence", "message", "pings", "settings"],
)
def test_the_deadline_ends_an_answer_that_does_not(victim: Victim, impostor: HostileServer, raw: Raw) -> None:
    impostor.raw = raw
    with ended_by_the_client():
        error = victim.assert_refused(ProviderUnavailableError, seconds=0.5)
    assert "0.5 seconds" in str(error)
    assert len(impostor.requests) == 1
    assert_hung_up(impostor)


def assert_hung_up(server: HostileServer | ConnectProxy) -> None:
    """Check that the client closes its connections soon: what serves them ends when it does."""
    end = time.monotonic() + hostile.ENOUGH / 2
    while server.is_serving:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (hostile_http2.ENDLESS_MESSAGE, ProviderUnavailableError),
        (hostile_http2.ENDLESS_HEADERS, ProviderResponseError),
        (hostile_http2.ENDLESS_INTERIM_ANSWERS, ProviderUnavailableError),
    ],
    ids=["message", "headers", "interim answers"],
)
def test_what_has_no_end_is_not_read_to_it(
    victim: Victim, impostor: HostileServer, raw: Raw, expected: type[ProviderError]
) -> None:
    impostor.raw = raw
    with ended_by_the_client():
        victim.assert_refused(expected)


@pytest.mark.parametrize(
    "raw",
    [hostile.hangs_up, hostile_http2.GOES_AWAY, hostile_http2.RESETS],
    ids=["hangs up", "goes away", "resets"],
)
def test_a_lost_connection_is_tried_again(victim: Victim, impostor: HostileServer, raw: Raw) -> None:
    impostor.raw = raw
    victim.assert_refused(ProviderUnavailableError)
    assert len(impostor.requests) == 3
    assert victim.pauses == [0.2, 0.8]


@pytest.mark.parametrize(
    "raw",
    [
        hostile.sends(MARK.encode() * 10),
        hostile.answers(503, {}),
        hostile.DRIPS_HEADERS,
        hostile_http2.answers_without_grpc(b"302"),
        hostile_http2.answers_without_grpc(b"404"),
    ],
    ids=["text", "an error of HTTP/1", "drips", "redirect", "not found"],
)
def test_what_is_not_grpc_is_refused(victim: Victim, impostor: HostileServer, raw: Raw) -> None:
    impostor.raw = raw
    victim.assert_refused(ProviderResponseError)
    assert len(impostor.requests) == 1


@pytest.mark.parametrize("raw", [hostile.answers(200, {}), hostile.ENDLESS_BODY], ids=["short", "endless"])
def test_a_web_server_that_answers_that_all_is_well(victim: Victim, impostor: HostileServer, raw: Raw) -> None:
    impostor.raw = raw
    # gRPC before 1.82 has no words for it, and then it is one that cannot be reached.
    victim.assert_refused(ProviderResponseError, ProviderUnavailableError)


@pytest.mark.parametrize("status", [b"429", b"500", b"502", b"503", b"504"])
def test_an_error_of_a_web_server_in_front_is_tried_again(
    victim: Victim, impostor: HostileServer, status: bytes
) -> None:
    impostor.raw = hostile_http2.answers_without_grpc(status)
    victim.assert_refused(ProviderUnavailableError)
    assert len(impostor.requests) == 3


def test_a_server_that_agrees_on_no_http2_is_refused(victim: Victim, impostor: HostileServer) -> None:
    assert impostor._context is not None
    impostor._context.set_alpn_protocols(["http/1.1"])
    victim.assert_refused(ProviderResponseError)


def test_a_tls_handshake_that_never_ends_is_ended(victim: Victim) -> None:
    server = HostileServer()
    server.raw = hostile.is_silent
    victim.provider = provider(victim.kms, resolve=lambda *_: ("127.0.0.1", server.port))
    try:
        with ended_by_the_client():
            assert "0.3 seconds" in str(victim.assert_refused(ProviderUnavailableError, seconds=0.3))
    finally:
        server.close()


def test_what_is_not_tls_is_refused(victim: Victim) -> None:
    server = HostileServer()
    server.raw = hostile.answers(200, {})
    victim.provider = provider(victim.kms, sleep=victim.pauses.append, resolve=lambda *_: ("127.0.0.1", server.port))
    try:
        victim.assert_refused(ProviderUnavailableError)
        assert not [request for request in server.requests if b"Bearer" in request]
    finally:
        server.close()


def test_a_connection_that_is_refused_fails_at_once(victim: Victim) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    victim.provider = provider(victim.kms, sleep=victim.pauses.append, resolve=lambda *_: ("127.0.0.1", port))
    with ended_by_the_client():
        assert "could not be reached" in str(victim.assert_refused(ProviderUnavailableError, seconds=60))
    assert victim.pauses == [0.2, 0.8]


def test_a_host_that_swallows_packets_is_given_up_at_the_deadline(victim: Victim) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        # The one place in its queue is taken, so the kernel answers nobody else.
        waiting = [socket.socket() for _ in range(3)]
        for connection in waiting:
            connection.settimeout(0)
            connection.connect_ex(address)
        victim.provider = provider(victim.kms, resolve=lambda *_: address)
        with ended_by_the_client():
            error = victim.assert_refused(ProviderUnavailableError, seconds=0.5)
        for connection in waiting:
            connection.close()
    assert "0.5 seconds" in str(error)


def test_a_host_that_is_unknown(victim: Victim) -> None:
    victim.provider = provider(victim.kms, sleep=victim.pauses.append, endpoint="kms.invalid", resolve=lambda *at: at)
    victim.assert_refused(ProviderUnavailableError)
    victim.provider = provider(victim.kms, sleep=victim.pauses.append, endpoint="kms.invalid")
    victim.assert_refused(ProviderUnavailableError)


def test_what_nobody_expected_is_not_quoted(victim: Victim) -> None:
    def resolve(_host: str, _port: int) -> NoReturn:
        raise RuntimeError(MARK)

    victim.provider = provider(victim.kms, resolve=resolve)
    victim.assert_refused(ProviderResponseError)


def test_a_deadline_that_has_passed_sends_nothing(gcp_kms: CloudKms) -> None:
    moments = iter([0.0, *[1.0] * 50])
    with pytest.raises(ProviderUnavailableError):
        provider(gcp_kms).wrap(DATA_KEY, BINDING, Deadline(1, lambda: next(moments)))
    assert gcp_kms.calls == []
    assert gcp_kms.requests == []


def test_the_login_and_the_call_share_the_deadline(victim: Victim) -> None:
    victim.kms.login_raw = hostile.DRIPS_BODY
    victim.provider = provider(victim.kms, credentials=json.dumps(victim.kms.user))
    with ended_by_the_client():
        victim.assert_refused(ProviderUnavailableError, seconds=0.5)
    assert victim.kms.calls == []


# --- TLS -------------------------------------------------------------------------------------------------------------


def self_signed(directory: Path, *, days: int) -> Path:
    """Return the path of a PEM file with a certificate of the KMS that vouches for itself, and its private key.

    :param days: when it ends, counted from now.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, KMS_HOST)])
    end = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - dt.timedelta(days=30))
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(KMS_HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = directory / f"self-signed-{days}.pem"
    path.write_bytes(certificate.public_bytes(pem) + private)
    return path


@pytest.mark.parametrize("case", ["another host", "another authority", "public", "self-signed", "expired"])
def test_a_certificate_that_proves_nothing_is_refused(victim: Victim, tmp_path: Path, case: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    authority, stranger = Authority(tmp_path), Authority(other)
    certificate, trusted = {
        "another host": (authority.issue("kms.example", f"x.{KMS_HOST}"), authority.ca_bundle),
        "another authority": (stranger.issue(KMS_HOST), authority.ca_bundle),
        "public": (authority.issue(KMS_HOST), None),
        "self-signed": (self_signed(tmp_path, days=7), authority.ca_bundle),
        "expired": (expired := self_signed(tmp_path, days=-1), expired),
    }[case]
    server, port = served(victim.kms.handle, certificate)
    try:
        victim.provider = provider(
            victim.kms, ca_bundle=trusted, resolve=lambda *_: ("127.0.0.1", port), sleep=victim.pauses.append
        )
        assert "KRAVN_KMS_GCP_CA_BUNDLE" in str(victim.assert_refused(ProviderUnavailableError))
        assert victim.kms.calls == []
        assert victim.pauses == []
    finally:
        server.stop(None).wait()


def test_the_same_certificate_within_its_dates_is_accepted(gcp_kms: CloudKms, tmp_path: Path) -> None:
    certificate = self_signed(tmp_path, days=7)
    server, port = served(gcp_kms.handle, certificate)
    try:
        wrap(gcp_kms, ca_bundle=certificate, resolve=lambda *_: ("127.0.0.1", port))
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("cloudkms.europe-west3.rep.googleapis.com", ("cloudkms.europe-west3.rep.googleapis.com", 443)),
        ("CloudKMS-psc.p.googleapis.com:8443", ("cloudkms-psc.p.googleapis.com", 8443)),
    ],
)
def test_another_endpoint(gcp_kms: CloudKms, tmp_path: Path, endpoint: str, address: tuple[str, int]) -> None:
    authority, asked = Authority(tmp_path), []
    server, port = served(gcp_kms.handle, authority.issue(address[0]))

    def resolve(host: str, port_of_url: int) -> tuple[str, int]:
        asked.append((host, port_of_url))
        return "127.0.0.1", port

    try:
        wrap(gcp_kms, endpoint=endpoint, ca_bundle=authority.ca_bundle, resolve=resolve)
    finally:
        server.stop(None).wait()
    assert asked == [address]


# --- The environment and the proxy -----------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.close()


def test_the_environment_changes_nothing(
    gcp_kms: CloudKms, listener: Listener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://{listener.address}")
    monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY", listener.address)
    monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "127.0.0.0/8")
    for name in ("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "SSLKEYLOGFILE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    for credentials in (gcp_kms.service_account.text, json.dumps(gcp_kms.user), None):
        assert unwrap(gcp_kms, wrap(gcp_kms, credentials=credentials)) == DATA_KEY
    assert not listener.was_contacted()
    assert list(tmp_path.iterdir()) == []


PASSWORD = "p4ss-" + secrets.token_hex(8)


@pytest.fixture
def proxy(gcp_kms: CloudKms) -> Iterator[ConnectProxy]:
    """A proxy that finds Google Cloud, for the one user that it lets pass."""
    ports = {
        f"{KMS_HOST}:443": gcp_kms.port,
        "oauth2.googleapis.com:443": gcp_kms.resolve("sts.googleapis.com", 443)[1],
    }
    running = ConnectProxy(ports, user=f"kravn:{PASSWORD}")
    yield running
    running.close()


def through(proxy: ConnectProxy, password: str = PASSWORD) -> Proxy:
    return Proxy("127.0.0.1", proxy.port, "kravn", password)


def nowhere(host: str, port: int) -> tuple[str, int]:
    raise OSError


@pytest.mark.parametrize("exempt", ["", f"{KMS_HOST},127.0.0.1,.googleapis.com"])
def test_everything_goes_through_the_proxy(
    gcp_kms: CloudKms, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, exempt: str
) -> None:
    monkeypatch.setenv("no_proxy", exempt)
    monkeypatch.setenv("no_grpc_proxy", exempt)
    user = json.dumps(gcp_kms.user)
    wrapped = wrap(gcp_kms, credentials=user, proxy=through(proxy), resolve=nowhere)
    assert unwrap(gcp_kms, wrapped) == DATA_KEY
    assert [request.partition(" HTTP/1.1\r\n")[0] for request in proxy.requests] == [
        "CONNECT oauth2.googleapis.com:443",
        f"CONNECT {KMS_HOST}:443",
    ]
    passed = b"".join(proxy.passed)
    assert len(passed) > 1000
    for value in (DATA_KEY, BINDING, gcp_kms.calls[0].token.encode(), gcp_kms.refresh_token.encode()):
        assert value not in passed


def test_no_connection_stays(gcp_kms: CloudKms, proxy: ConnectProxy) -> None:
    it = provider(gcp_kms, proxy=through(proxy))
    assert it.unwrap(it.wrap(DATA_KEY, BINDING, Deadline(20)), BINDING, Deadline(20)) == DATA_KEY
    assert len(proxy.requests) == 2
    assert_hung_up(proxy)


def test_the_certificate_is_that_of_the_kms_and_not_of_the_proxy(
    victim: Victim, proxy: ConnectProxy, tmp_path: Path
) -> None:
    server, port = served(victim.kms.handle, Authority(tmp_path).issue(KMS_HOST))
    proxy._targets = {f"{KMS_HOST}:443": port}
    victim.provider = provider(victim.kms, proxy=through(proxy))
    try:
        assert "certificate" in str(victim.assert_refused(ProviderUnavailableError))
        assert victim.kms.calls == []
    finally:
        server.stop(None).wait()


def test_a_proxy_that_lets_somebody_else_pass(victim: Victim, proxy: ConnectProxy) -> None:
    victim.provider = provider(victim.kms, proxy=through(proxy, "wr0ng-password"), sleep=victim.pauses.append)
    error = victim.assert_refused(ProviderUnavailableError)
    assert "KRAVN_KMS_PROXY_PASSWORD" in str(error)
    assert victim.pauses == []
    victim.assert_leaks_nothing(error, b"wr0ng-password", b"kravn:wr0ng-password")


def test_a_proxy_that_may_not_connect_there(victim: Victim, proxy: ConnectProxy) -> None:
    proxy._targets = {}
    victim.provider = provider(victim.kms, proxy=through(proxy))
    assert f"127.0.0.1:{proxy.port}" in str(victim.assert_refused(ProviderUnavailableError))


@pytest.mark.parametrize(
    "raw",
    [
        hostile.hangs_up,
        hostile.sends(b"SSH-2.0-OpenSSH\r\n\r\n"),
        hostile.answers(302, MARK.encode(), "Location: http://127.0.0.1/"),
        hostile.ENDLESS_HEADERS,
        hostile.is_silent,
        hostile.DRIPS_HEADERS,
    ],
    ids=["hangs up", "SSH", "redirect", "endless", "silence", "drips"],
)
def test_a_proxy_that_misbehaves(victim: Victim, proxy: ConnectProxy, raw: Raw) -> None:
    proxy.raw = raw
    victim.provider = provider(victim.kms, proxy=through(proxy))
    with ended_by_the_client():
        error = victim.assert_refused(ProviderUnavailableError, seconds=0.5)
    victim.assert_leaks_nothing(error, PASSWORD.encode())


# --- Fork ------------------------------------------------------------------------------------------------------------

FORKS = """
import json, os, signal, sys, threading
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy_kravn_crypto import EncryptedJSON, configure
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.providers.base import Deadline
from sqlalchemy_kravn_crypto.providers.gcp import GcpProvider

class Base(DeclarativeBase):
    pass

class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[dict] = mapped_column(EncryptedJSON)

given = json.loads(sys.stdin.read())
kms = GcpProvider(resolve=lambda *_: ("127.0.0.1", given["port"]), **given["settings"])
engine = create_engine("sqlite:///" + given["database"])
migrate(engine)
configure(engine, provider=kms)
Base.metadata.create_all(engine)

def write(id):
    with Session(engine) as session:
        session.add(Note(id=id, content={"a": id}))
        session.commit()

def read(id):
    with Session(engine) as session:
        return session.scalars(select(Note.content).where(Note.id == id)).one()

def there_and_back():
    key = os.urandom(32)
    return kms.unwrap(kms.wrap(key, b"fork", Deadline(60)), b"fork", Deadline(60)) == key

def forked(work):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends it if gRPC hangs
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

"""

BOOTS = """
write(0)
engine.dispose()
for id in (1, 2):
    def work():
        write(id)
        return there_and_back() and read(0) == {"a": 0} and read(id) == {"a": id} and forked(there_and_back) == 0
    assert forked(work) == 0
    assert there_and_back()
    assert read(id) == {"a": id}
print("both have ended")
"""

IS_AT_WORK = """
ended = threading.Event()

def works():
    while not ended.is_set():
        assert there_and_back()

working = [threading.Thread(target=works) for _ in range(2)]
for thread in working:
    thread.start()
codes = [forked(there_and_back) for _ in range(20)]
ended.set()
for thread in working:
    thread.join()
assert codes == [0] * 20, codes
assert there_and_back()
print("all have ended")
"""


def ran(gcp_kms: CloudKms, directory: Path, program: str) -> str:
    """Return what a program with a provider prints."""
    settings = {"key": KEY, "ca_bundle": str(gcp_kms.ca_bundle), "credentials": gcp_kms.service_account.text}
    given = {"port": gcp_kms.port, "settings": settings, "database": str(directory / "fork.db")}
    command = [sys.executable, "-c", FORKS + program]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_that_has_booted_may_fork(gcp_kms: CloudKms, tmp_path: Path) -> None:
    """The parent used gRPC before, and both use it after."""
    assert ran(gcp_kms, tmp_path, BOOTS) == "both have ended\n"
    assert gcp_kms.count("Encrypt") == 2 + 2 * 3


def test_a_process_may_fork_while_it_talks_to_the_kms(gcp_kms: CloudKms, tmp_path: Path) -> None:
    assert ran(gcp_kms, tmp_path, IS_AT_WORK) == "all have ended\n"


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "",
        "kravn",
        f"{KEY}/",
        f"/{KEY}",
        f"{KEY}\n",
        f"{KEY}/cryptoKeyVersions/1",
        KEY.replace("kravn-test", ""),
        KEY.replace("kravn-test", "a/b"),
        KEY.replace("kravn-test", ".."),
        KEY.replace("kravn-test", "Kravn"),
        KEY.replace("europe-west3", "europe west3"),
        KEY.replace("app", "a.b"),
        KEY.replace("app", "%2e"),
        KEY.replace("/kravn", "/"),
        KEY.replace("cryptoKeys/kravn", "cryptoKeys/" + "k" * 64),
        KEY.replace("locations", "regions"),
        f"https://cloudkms.googleapis.com/v1/{KEY}",
    ],
)
def test_a_key_that_is_no_resource_name(gcp_kms: CloudKms, key: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_GCP_KEY"):
        provider(gcp_kms, key=key)


@pytest.mark.parametrize("project", ["kravn-test", "example.com:kravn-test", "123456789012"])
def test_a_key_that_is_accepted(gcp_kms: CloudKms, project: str) -> None:
    key = KEY.replace("kravn-test", project)
    assert provider(gcp_kms, key=key).master_key == key


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://cloudkms.googleapis.com",
        "cloudkms.googleapis.com/",
        "cloudkms.googleapis.com:0",
        "cloudkms.googleapis.com:65536",
        "cloudkms.googleapis.com:x",
        "cloudkms.googleapis.com\n",
        "-x.example",
        "user@cloudkms.googleapis.com",
        "a b",
        "dns:///x",
        "unix:/x",
    ],
)
def test_an_endpoint_that_is_refused(gcp_kms: CloudKms, endpoint: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_GCP_ENDPOINT"):
        provider(gcp_kms, endpoint=endpoint)


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_a_ca_bundle_without_certificates(gcp_kms: CloudKms, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bundle.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match="KRAVN_KMS_GCP_CA_BUNDLE"):
        provider(gcp_kms, ca_bundle=path)


def test_what_it_recognises(gcp_kms: CloudKms) -> None:
    it = provider(gcp_kms)
    assert it.master_key == KEY
    assert it.recognises(f"{KEY}/cryptoKeyVersions/1")
    assert it.recognises(f"{KEY}/cryptoKeyVersions/20")
    for other in (
        "",
        KEY,
        f"{KEY}/",
        f"{KEY}/cryptoKeyVersions/",
        f"{KEY}/cryptoKeyVersions/x",
        f"{KEY}/cryptoKeyVersions/1/",
        f"{KEY}x/cryptoKeyVersions/1",
        f"x{KEY}/cryptoKeyVersions/1",
        "/cryptoKeyVersions/1",
    ):
        assert not it.recognises(other)


def test_the_settings_name_a_provider(gcp_kms: CloudKms) -> None:
    settings = Settings(
        kms_provider="gcp",
        kms_gcp_key=KEY,
        kms_gcp_endpoint="cloudkms.example:8443",
        kms_gcp_ca_bundle=gcp_kms.ca_bundle,
        kms_gcp_credentials=gcp_kms.service_account.text,
        kms_proxy="http://proxy.example:3128",
    )
    made = provider_of(settings)
    assert isinstance(made, GcpProvider)
    assert repr(made) == f"<GcpProvider {KEY} at cloudkms.example>"
    assert made._route.proxy == Proxy("proxy.example", 3128)


def test_it_keeps_its_secrets(gcp_kms: CloudKms) -> None:
    it = provider(gcp_kms)
    private_key = re.sub(r"\s", "", gcp_kms.service_account.private_key)
    for shown in (repr(it), str(it), repr(vars(it))):
        assert private_key[40:80] not in re.sub(r"\\\\n|\s", "", shown)
    with pytest.raises(TypeError, match="secret"):
        pickle.dumps(it)


@pytest.mark.parametrize(
    "missing", ["google", "google.auth", "google.cloud.kms_v1", "google_crc32c", "grpc", "requests"]
)
def test_a_missing_package_names_the_extra(missing: str) -> None:
    program = f"""
import sys
sys.modules[{missing!r}] = None
from sqlalchemy_kravn_crypto.exceptions import MissingExtraError
try:
    import sqlalchemy_kravn_crypto.providers.gcp
except MissingExtraError as error:
    assert error.__context__ is None and error.__cause__ is None
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "pip install 'sqlalchemy-kravn-crypto[gcp]'" in ran.stdout
