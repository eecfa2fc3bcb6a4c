"""A KMS that attacks, a key that is not the one, names that are paths, and what can happen to a real Vault.

Every victim, which is a provider's key calls or one of its logins, meets every behaviour, but for these cells:

===================  ====================================  ==========================================================
behaviour            not for                               why
===================  ====================================  ==========================================================
a redirect           pkcs11                                a pipe to a worker has no other place to lead to
a gzip bomb          pkcs11                                what comes through the pipe is never inflated
drip of the headers  pkcs11                                an answer is one line, without headers
another data key     the logins                            a login returns no data key
TLS                  pkcs11, aws instance, azure machine,  a pipe; and metadata services at fixed local addresses
                     gcp machine                           speak plain HTTP
names of keys        pkcs11                                a label is in no path
===================  ====================================  ==========================================================

For gcp a redirect is an answer of a web server over HTTP/2, since gRPC has none of its own, and null for a data key is
the empty one, since protobuf has no null. For pkcs11 the black hole is a module that never finishes loading, and
silence is a worker that never answers.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import gc
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import google_crc32c
import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.cloud.kms_v1 import DecryptResponse, EncryptResponse
from sqlalchemy import Engine, create_engine, select

from sqlalchemy_kravn_crypto import configure, is_configured, reset
from sqlalchemy_kravn_crypto.exceptions import (
    ConfigurationError,
    CredentialError,
    KravnCryptoError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
    WrongKeyError,
)
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.providers.aws import AwsProvider
from sqlalchemy_kravn_crypto.providers.azure import AzureProvider
from sqlalchemy_kravn_crypto.providers.base import Deadline, KeyProvider, WrappedKey
from sqlalchemy_kravn_crypto.providers.gcp import GcpProvider
from sqlalchemy_kravn_crypto.providers.pkcs11 import Pkcs11Provider
from sqlalchemy_kravn_crypto.providers.vault import VaultProvider
from sqlalchemy_kravn_crypto.schema import TABLES
from sqlalchemy_kravn_crypto.settings import Settings
from tests import hostile_http2, hostile_server
from tests.aws_server import BINDING, INSTANCE, KMS, ROLE, STS, UNUSED_KEY, Aws, Credentials
from tests.azure_server import LOGIN_HOST, TENANT_ID, VAULT_HOST, AzureVault
from tests.certificates import Authority
from tests.gcp_server import KEY, KMS_HOST, Call, CloudKms, Status
from tests.hostile_http2 import http2_server
from tests.hostile_server import HostileServer, Listener, Raw, answers
from tests.leaks import found_in, leaked
from tests.openbao import OpenBao
from tests.processes import environment_with
from tests.scripted_server import ScriptedServer
from tests.softhsm import Token
from tests.test_pkcs11 import worker
from tests.test_transport import assert_leaks_nothing

MARK = "text-of-the-answer-5b0e7c1f9ad24386"
SECRET = "correct horse battery staple, and forty more characters"
SHORT, LONG = 0.5, 10.0  # seconds
SPARE = 0.5  # seconds beyond the deadline
MAX_GROWTH = 5_000_000  # bytes

VAULT = "vault.example"


# --- The victims -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Victim:
    """A provider, and the server that it is sent to with its credentials and a data key.

    :ivar make: makes the provider, with settings in place of the usual ones.
    :ivar behave: makes the server do as one of the behaviours.
    :ivar secrets: what it logs in with.
    :ivar host: the host that is attacked, and whose certificate ``authority`` issues.
    """

    make: Callable[..., KeyProvider]
    behave: Callable[[Behaviour], None]
    secrets: list[str]
    wrapped: WrappedKey = dataclasses.field(default_factory=lambda: WrappedKey("none", b"none"))
    result: Callable[[Any], Raw] | None = None
    host: str = ""
    port: int = 443
    authority: Authority | None = None
    resolve: Callable[[str, int], tuple[str, int]] = lambda host, port: (host, port)
    other: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def provider(self) -> KeyProvider:
        return self.make(**self.other)

    def lead_to(self, address: tuple[str, int], **settings: Any) -> None:
        """Have the host that is attacked be at another address."""

        def resolve(host: str, port: int) -> tuple[str, int]:
            return address if host == self.host else self.resolve(host, port)

        self.other = {"resolve": resolve, **settings}


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """What a server does, in the three ways in which victims talk.

    :ivar lasts: whether only the deadline ends it.
    """

    expected: tuple[type[ProviderError], ...]
    http: Raw | None = None
    http2: Raw | None = None
    worker: str | None = None
    operates: Callable[[Call], bytes | Status] | None = None
    lasts: bool = False


RESULT = {"vault": {"data": {"ciphertext": "vault:v1:AAAA"}}}


@contextmanager
def vault(tmp_path: Path, path: str, secret: str, **settings: Any) -> Iterator[Victim]:
    authority = Authority(tmp_path)
    good = answers(200, RESULT["vault"])
    server = ScriptedServer({}, good, authority.issue(VAULT))

    def make(**other: Any) -> KeyProvider:
        usual = {"address": f"https://{VAULT}", "key": "kravn", "ca_bundle": authority.ca_bundle}
        return VaultProvider(**{**usual, "resolve": resolve, "sleep": lambda _: None, **settings, **other})

    def resolve(_host: str, _port: int) -> tuple[str, int]:
        return "127.0.0.1", server.port

    def behave(behaviour: Behaviour) -> None:
        assert behaviour.http is not None
        server.by_name = {path: behaviour.http}

    yield Victim(
        make,
        behave,
        [secret],
        WrappedKey("transit/kravn:v1", b"vault:v1:" + base64.b64encode(bytes(60))),
        lambda value: answers(200, {"data": {"plaintext": value}}),
        VAULT,
        443,
        authority,
        resolve,
    )
    server.close()


@pytest.fixture
def vault_key(tmp_path: Path) -> Iterator[Victim]:
    token = f"s.{secrets.token_hex(12)}"
    with vault(tmp_path, "transit", token, token=token) as victim:
        yield victim


@pytest.fixture
def vault_login(tmp_path: Path) -> Iterator[Victim]:
    secret = secrets.token_hex(16)
    with vault(tmp_path, "auth/approle/login", secret, auth="approle", role_id="an-id", secret_id=secret) as victim:
        yield victim


def azure(azure_vault: AzureVault, attacked: str, **settings: Any) -> Victim:
    [version] = azure_vault.keys["kravn"]
    key_identifier = f"{azure_vault.url}/keys/kravn/{version}"
    base = f"https://{LOGIN_HOST}/{TENANT_ID}"
    found = {"issuer": base, "token_endpoint": f"{base}/token", "authorization_endpoint": f"{base}/authorize"}

    def behave(behaviour: Behaviour) -> None:
        raw = behaviour.http
        assert raw is not None

        def login(connection: socket.socket, body: bytes) -> None:
            # The request without a body asks where to log in, and sends no secret.
            (raw if body else answers(200, found))(connection, body)

        setattr(azure_vault, attacked, login if attacked == "login_raw" else raw)

    return Victim(
        lambda **other: AzureProvider(**azure_vault.settings(**{"sleep": lambda _: None, **settings, **other})),
        behave,
        [azure_vault.client_secret],
        WrappedKey(key_identifier, bytes(256)),
        lambda value: answers(200, {"kid": key_identifier, "value": value}),
        VAULT_HOST if attacked == "vault_raw" else LOGIN_HOST,
        443,
        azure_vault.authority,
        azure_vault.resolve,
    )


@pytest.fixture
def azure_key(azure_vault: AzureVault) -> Victim:
    return azure(azure_vault, "vault_raw")


@pytest.fixture
def azure_login(azure_vault: AzureVault) -> Victim:
    return azure(azure_vault, "login_raw")


@pytest.fixture
def azure_machine(azure_vault: AzureVault, monkeypatch: pytest.MonkeyPatch) -> Victim:
    for name in list(os.environ):
        if name.startswith(("AZURE_", "IDENTITY_", "IMDS_", "MSI_")):
            monkeypatch.delenv(name)
    victim = azure(azure_vault, "metadata_raw", auth="managed", client_id=None, client_secret=None, tenant_id=None)
    return dataclasses.replace(victim, host="169.254.169.254", authority=None)


def of_aws(aws: Aws, host: str, kept: list[str], key: str = UNUSED_KEY, **settings: Any) -> Victim:
    def behave(behaviour: Behaviour) -> None:
        assert behaviour.http is not None
        aws.raw[host] = behaviour.http

    def result(value: Any) -> Raw:
        return answers(200, {"KeyId": key, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT", "Plaintext": value})

    return Victim(
        lambda **other: AwsProvider(**aws.settings(key, **{**settings, **other})),
        behave,
        kept,
        WrappedKey(key, bytes(180)),
        result,
        host,
        443,
        aws.authority,
        aws.resolve,
    )


@pytest.fixture
def aws_key(aws: Aws, aws_credentials: Credentials) -> Victim:
    return of_aws(aws, KMS, aws_credentials.everything(), aws.create_key())


@pytest.fixture
def aws_sts(aws: Aws, aws_credentials: Credentials) -> Victim:
    return of_aws(aws, STS, aws_credentials.everything(), role=ROLE)


@pytest.fixture
def aws_instance(aws: Aws, aws_home: Path) -> Victim:
    aws.absent.remove(INSTANCE)
    return dataclasses.replace(of_aws(aws, INSTANCE, []), authority=None)


@pytest.fixture
def gcp_key(gcp_kms: CloudKms) -> Iterator[Victim]:
    server = http2_server(gcp_kms.authority.issue(KMS_HOST))

    def resolve(host: str, port: int) -> tuple[str, int]:
        return ("127.0.0.1", server.port) if host == KMS_HOST else gcp_kms.resolve(host, port)

    def behave(behaviour: Behaviour) -> None:
        if behaviour.operates is not None:
            gcp_kms.behave = behaviour.operates
            made.other = {}
            return
        assert behaviour.http2 is not None
        server.raw = behaviour.http2
        made.other = {"resolve": resolve}

    made = Victim(
        lambda **other: GcpProvider(**gcp_kms.settings(**{"sleep": lambda _: None, **other})),
        behave,
        [gcp_kms.service_account.private_key],
        WrappedKey(gcp_kms.primary, secrets.token_bytes(60)),
        None,
        KMS_HOST,
        443,
        gcp_kms.authority,
        gcp_kms.resolve,
    )
    yield made
    server.close()


def gcp_login(gcp_kms: CloudKms, credentials: str | None, host: str, kept: list[str]) -> Victim:
    return Victim(
        lambda **other: GcpProvider(
            **gcp_kms.settings(**{"sleep": lambda _: None, "credentials": credentials, **other})
        ),
        lambda behaviour: setattr(gcp_kms, "login_raw", behaviour.http),
        kept,
        WrappedKey(gcp_kms.primary, secrets.token_bytes(60)),
        None,
        host,
        443,
        gcp_kms.authority,
        gcp_kms.resolve,
    )


@pytest.fixture
def gcp_user(gcp_kms: CloudKms) -> Victim:
    kept = [gcp_kms.client_secret, gcp_kms.refresh_token]
    return gcp_login(gcp_kms, json.dumps(gcp_kms.user), "oauth2.googleapis.com", kept)


@pytest.fixture
def gcp_machine(gcp_kms: CloudKms) -> Victim:
    return gcp_login(gcp_kms, None, "metadata.google.internal", [])


@pytest.fixture
def pkcs11(hsm_token: Token) -> Victim:
    def behave(behaviour: Behaviour) -> None:
        assert behaviour.worker is not None
        made.other = {"command": worker(behaviour.worker)}

    made = Victim(
        lambda **other: Pkcs11Provider(**hsm_token.settings(**other)),
        behave,
        [hsm_token.pin],
        WrappedKey("pkcs11:token=bank;object=kravn;type=secret-key;id=%01", bytes(60)),
    )
    return made


KEYS: Final = ("vault_key", "azure_key", "aws_key", "gcp_key", "pkcs11")
LOGINS: Final = (
    "vault_login", "azure_login", "azure_machine", "aws_sts", "aws_instance", "gcp_user", "gcp_machine",
)  # fmt: skip
VICTIMS: Final = KEYS + LOGINS
WITHOUT_TLS: Final = {"pkcs11", "azure_machine", "aws_instance", "gcp_machine"}


@pytest.fixture
def victim(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Victim:
    for name in ("", "google", "grpc", "urllib3", "botocore", "azure", "msal"):
        caplog.set_level(logging.DEBUG, logger=name)
    chosen: Victim = request.getfixturevalue(request.param)
    return chosen


def all_but(*absent: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("victim", [name for name in VICTIMS if name not in absent], indirect=True)


# --- What is asked of each -------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Return what the kernel says of this process's memory, in bytes: ``VmRSS``, or its peak ``VmHWM``."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def measured(operation: Callable[[Deadline], object], seconds: float) -> tuple[ProviderError, float, int]:
    """Return the error of an operation, how many seconds it took, and by how many bytes the process grew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.monotonic()
    with pytest.raises(ProviderError) as caught:
        operation(Deadline(seconds))
    return caught.value, time.monotonic() - start, resident("VmHWM") - before


def refused(victim: Victim, logs: pytest.LogCaptureFixture, *, lasts: bool = False, wrap: bool = True) -> ProviderError:
    """Have the victim attacked, and check time, memory and that nothing leaks.

    Threads of other programs can delay one attempt, and what is imported at the first takes memory once. What is wrong
    with the provider is wrong with each of three.
    """
    seconds = SHORT if lasts else LONG
    provider, kept = victim.provider, [MARK, *victim.secrets]

    def operation(deadline: Deadline) -> object:
        if not wrap:
            return provider.unwrap(victim.wrapped, BINDING, deadline)
        data_key = secrets.token_bytes(32)
        kept.append(data_key.decode("latin-1"))
        return provider.wrap(data_key, BINDING, deadline)

    for _ in range(3):
        error, elapsed, growth = measured(operation, seconds)
        assert error.provider == provider.name
        encoded = [text.encode("latin-1") for text in kept]
        assert_leaks_nothing(error, logs, *encoded)
        assert leaked(error, *encoded) == []
        assert found_in(logs.text, *encoded) == []
        if elapsed < seconds + SPARE and growth < MAX_GROWTH:
            break
    assert elapsed < seconds + SPARE
    assert growth < MAX_GROWTH
    return error


# --- Behaviours ------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.close()


@all_but("pkcs11")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_nothing_to_another_host(
    victim: Victim, listener: Listener, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    target = f"http://{listener.address}/{MARK}"
    location = hostile_http2.field(b"location", target.encode())
    victim.behave(
        Behaviour(
            (),
            answers(status, MARK.encode(), f"Location: {target}"),
            hostile_http2.answers_without_grpc(str(status).encode(), location),
        )
    )
    assert type(refused(victim, caplog)) is ProviderResponseError
    assert not listener.was_contacted()


RESPONSE, UNAVAILABLE = (ProviderResponseError,), (ProviderUnavailableError,)
LARGE = hostile_server.repeats(b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n", b" " * 65536)

BEHAVIOURS: Final = {
    # gRPC resets a stream that goes beyond what it announced, which is a lost connection and tried again.
    "endless body": Behaviour(
        (*RESPONSE, *UNAVAILABLE),
        hostile_server.ENDLESS_BODY,
        hostile_http2.ENDLESS_MESSAGE,
        "while True: sys.stdout.write('a' * 1000)",
    ),
    "200 MB": Behaviour(
        RESPONSE, LARGE, hostile_http2.LARGE_MESSAGE, "for _ in range(200): sys.stdout.write('a' * 1_000_000)"
    ),
    "gzip bomb": Behaviour(RESPONSE, hostile_server.GZIP_BOMB, hostile_http2.GZIP_BOMB),
    "drip of the body": Behaviour(
        UNAVAILABLE,
        hostile_server.DRIPS_BODY,
        hostile_http2.DRIPS_MESSAGE,
        "while True: print('a', end='', flush=True); time.sleep(0.02)",
        lasts=True,
    ),
    "drip of the headers": Behaviour(
        UNAVAILABLE, hostile_server.DRIPS_HEADERS, hostile_http2.DRIPS_HEADERS, lasts=True
    ),
    "silence": Behaviour(
        UNAVAILABLE, hostile_server.is_silent, hostile_server.is_silent, "time.sleep(600)", lasts=True
    ),
    "a number": Behaviour(RESPONSE, answers(200, b"1"), None, "print(1)", lambda _: b"1"),
    "a list": Behaviour(RESPONSE, answers(200, b"[1]"), None, "print('[1]')", lambda _: b"[1]"),
    "brackets": Behaviour(RESPONSE, answers(200, b"[" * 90_000), None, "print('[' * 90_000)", lambda _: b"[" * 90_000),
    "echo": Behaviour(
        (ProviderError,),
        hostile_server.echoes(500),
        None,
        "answer(**request, stage='use', code=request['pin'])",
        lambda call: Status(grpc.StatusCode.INTERNAL, f"{MARK} {call.request.plaintext.hex()} {call.token}"),
    ),
}
NOT_FOR_PKCS11: Final = {"gzip bomb", "drip of the headers"}


@pytest.mark.parametrize(
    ("behaviour", "victim"),
    [
        pytest.param(name, victim, id=f"{name}-{victim}")
        for name in BEHAVIOURS
        for victim in VICTIMS
        if (name, victim) not in {(absent, "pkcs11") for absent in NOT_FOR_PKCS11}
    ],
    indirect=["victim"],
)
def test_a_hostile_answer_is_a_typed_error_in_time(
    request: pytest.FixtureRequest, victim: Victim, caplog: pytest.LogCaptureFixture, behaviour: str
) -> None:
    chosen = BEHAVIOURS[behaviour]
    victim.behave(chosen)
    error = refused(victim, caplog, lasts=chosen.lasts)
    # A machine that does not say who it is is one without credentials: aws looks for others, and there are none.
    others = (CredentialError,) if "aws_instance" in request.node.callspec.id else ()
    assert isinstance(error, (*chosen.expected, *others))
    if chosen.lasts and not any(name in request.node.callspec.id for name in ("aws_instance", "azure_machine")):
        assert f"{SHORT} seconds" in str(error)


@contextmanager
def black_hole() -> Iterator[tuple[str, int]]:
    """Give an address from which nothing comes: the one place in its queue is taken, so the kernel drops all else."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for connection in waiting:
            connection.settimeout(0)
            connection.connect_ex(full.getsockname())
        yield full.getsockname()
        for connection in waiting:
            connection.close()


@all_but()
def test_a_black_hole_is_left_at_the_deadline(
    request: pytest.FixtureRequest, victim: Victim, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with black_hole() as address:
        if "pkcs11" in request.node.callspec.id:
            os.mkfifo(tmp_path / "library.so")
            victim.other = {"module": tmp_path / "library.so"}
        else:
            victim.lead_to(address)
        error = refused(victim, caplog, lasts=True)
    # As above.
    expected = CredentialError if "aws_instance" in request.node.callspec.id else ProviderUnavailableError
    assert isinstance(error, (expected, ProviderUnavailableError))


# --- TLS -------------------------------------------------------------------------------------------------------------


def self_signed(directory: Path, host: str) -> Path:
    """Return the path of a PEM file with a certificate that vouches for itself, and its private key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = directory / "self-signed.pem"
    path.write_bytes(certificate.public_bytes(pem) + private)
    return path


@all_but(*WITHOUT_TLS)
@pytest.mark.parametrize("case", ["another name", "expired", "self-signed"])
def test_a_certificate_that_proves_nothing_is_refused(
    request: pytest.FixtureRequest, victim: Victim, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    authority = victim.authority
    assert authority is not None
    now = dt.datetime.now(dt.UTC)
    if case == "self-signed":
        certificate = self_signed(tmp_path, victim.host)
    elif case == "expired":
        certificate = authority.issue(victim.host, start=now - dt.timedelta(days=3), end=now - dt.timedelta(days=1))
    else:
        certificate = authority.issue("elsewhere.example")
    make = http2_server if "gcp_key" in request.node.callspec.id else HostileServer
    impostor = make(certificate)
    try:
        victim.lead_to(("127.0.0.1", impostor.port))
        error = refused(victim, caplog)
        assert type(error) is ProviderUnavailableError
        assert "_CA_BUNDLE" in str(error)
        # gRPC looks at the name when the handshake is over, and hangs up without a byte.
        assert b"".join(impostor.requests).strip() == b""
    finally:
        impostor.close()


# --- Another data key ------------------------------------------------------------------------------------------------

OTHER = bytes(range(100, 132))
BLOB = "vault:v1:" + base64.b64encode(bytes(60)).decode()
VALUES: Final = {"another 32": OTHER, "31": OTHER[:31], "33": OTHER + b"x", "0": b"", "null": None}


def wraps_then_returns(
    name: str, victim: Victim, value: bytes | None, gcp_kms: CloudKms, *, wraps: bool = True
) -> Behaviour:
    """Make a KMS that unwraps to something else, after it wrapped as it should if that is what it is asked first."""
    encoded = None if value is None else base64.b64encode(value).decode()
    if name == "azure_key" and value is not None:
        encoded = base64.urlsafe_b64encode(value).rstrip(b"=").decode()
    master_key = victim.wrapped.master_key
    results: dict[str, Any] = {
        "vault_key": {"data": {"ciphertext": BLOB}},
        "azure_key": {"kid": master_key, "value": base64.urlsafe_b64encode(bytes(256)).rstrip(b"=").decode()},
        "aws_key": {
            "KeyId": master_key,
            "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
            "CiphertextBlob": base64.b64encode(bytes(180)).decode(),
        },
    }
    wrapped = answers(200, results.get(name))
    asked = 0

    def http(connection: socket.socket, body: bytes) -> None:
        nonlocal asked
        asked += 1
        assert victim.result is not None
        (wrapped if wraps and asked == 1 else victim.result(encoded))(connection, body)

    def operates(call: Call) -> bytes | Status:
        if call.operation == "Decrypt":
            returned = value or b""
            answer = DecryptResponse(plaintext=returned, plaintext_crc32c=google_crc32c.value(returned))
            return bytes(DecryptResponse.serialize(answer))
        sealed = bytes(60)
        return bytes(
            EncryptResponse.serialize(
                EncryptResponse(
                    name=gcp_kms.primary,
                    ciphertext=sealed,
                    ciphertext_crc32c=google_crc32c.value(sealed),
                    verified_plaintext_crc32c=True,
                    verified_additional_authenticated_data_crc32c=True,
                )
            )
        )

    program = f"""
    if request['operation'] == 'wrap':
        answer(value=coded(bytes(60)), key_id='01')
    else:
        answer(value={encoded!r})
    """
    return Behaviour((), http, None, program, operates)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = create_engine(f"sqlite:///{tmp_path / 'database'}")
    migrate(made)
    yield made
    made.dispose()


def stored(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(TABLES.keys).order_by(TABLES.keys.c.id)))


@pytest.mark.parametrize("case", VALUES)
@all_but(*LOGINS)
def test_a_first_boot_stores_no_key_that_the_kms_does_not_give_back(
    request: pytest.FixtureRequest,
    victim: Victim,
    engine: Engine,
    gcp_kms: CloudKms,
    caplog: pytest.LogCaptureFixture,
    case: str,
) -> None:
    name = next(name for name in KEYS if name in request.node.callspec.id)
    value = VALUES[case]
    victim.behave(wraps_then_returns(name, victim, value, gcp_kms))
    before = stored(engine)
    with pytest.raises(KravnCryptoError) as caught:
        configure(engine, Settings(secret=SECRET), provider=victim.provider)
    assert caught.type is (WrongKeyError if case == "another 32" else ProviderResponseError)
    assert not is_configured()
    assert stored(engine) == before == []
    kept = [SECRET.encode(), *(text.encode() for text in victim.secrets), *([value] if value else [])]
    assert_leaks_nothing(caught.value, caplog, *kept)


@pytest.mark.parametrize("case", ["another 32", "31"])
@all_but(*LOGINS)
def test_a_later_boot_takes_no_key_but_the_one_that_was_stored(
    request: pytest.FixtureRequest,
    victim: Victim,
    engine: Engine,
    openbao: OpenBao,
    gcp_kms: CloudKms,
    caplog: pytest.LogCaptureFixture,
    case: str,
) -> None:
    name = next(name for name in KEYS if name in request.node.callspec.id)
    honest = VaultProvider(**openbao.settings()) if name == "vault_key" else victim.provider
    configure(engine, Settings(secret=SECRET), provider=honest)
    reset()
    value = VALUES[case]
    victim.behave(wraps_then_returns(name, victim, value, gcp_kms, wraps=False))
    before = stored(engine)
    with pytest.raises(KravnCryptoError) as caught:
        configure(engine, Settings(secret=SECRET), provider=victim.provider)
    assert caught.type is (WrongKeyError if case == "another 32" else ProviderResponseError)
    assert not is_configured()
    assert len(before) > 1
    assert stored(engine) == before
    kept = [SECRET.encode(), *(text.encode() for text in victim.secrets), *([value] if value else [])]
    assert_leaks_nothing(caught.value, caplog, *kept)


# --- Names of keys ---------------------------------------------------------------------------------------------------

NAMES: Final = {
    "a path": "../decrypt/kek",
    "a segment more": "a/b",
    "a query": "k?x",
    "percent": "%2e%2e",
    "newline": "kravn\nx",
}
AT: Final = {
    "vault": ("VAULT_KEY", "{}", {"VAULT_ADDR": "https://vault.example", "VAULT_TOKEN": "s.token"}),
    "azure": (
        "AZURE_KEY",
        "{}",
        {
            "AZURE_VAULT_URL": "https://kravn.vault.azure.net",
            "AZURE_TENANT_ID": TENANT_ID,
            "AZURE_CLIENT_ID": TENANT_ID,
            "AZURE_CLIENT_SECRET": "secret",
        },
    ),
    "aws": ("AWS_KEY", UNUSED_KEY.rpartition("/")[0] + "/{}", {}),
    "gcp": ("GCP_KEY", KEY.rpartition("/")[0] + "/{}", {}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("provider", AT)
def test_a_name_that_is_a_path_is_refused_before_any_request(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, listener: Listener, provider: str, name: str
) -> None:
    setting, form, others = AT[provider]
    given = {"KMS_PROVIDER": provider, "SECRET": SECRET, **{f"KMS_{key}": value for key, value in others.items()}}
    # Whatever is sent would go there.
    given |= {f"KMS_{setting}": form.format(NAMES[name]), "KMS_PROXY": f"http://{listener.address}"}
    for key, value in given.items():
        monkeypatch.setenv(f"KRAVN_{key}", value)
    with pytest.raises(ConfigurationError, match=f"KRAVN_KMS_{setting}"):
        configure(engine)
    assert not listener.was_contacted()
    assert stored(engine) == []


# --- A real Vault ----------------------------------------------------------------------------------------------------

BOOTS: Final = """
import os
from sqlalchemy import create_engine
from sqlalchemy_kravn_crypto import configure
configure(create_engine(os.environ["DATABASE_URL"]))
"""


@dataclasses.dataclass
class Deployment:
    """What a program is configured with, and its database."""

    openbao: OpenBao
    engine: Engine
    environment: dict[str, str]

    @property
    def key(self) -> str:
        return self.environment["KRAVN_KMS_VAULT_KEY"]

    def boot(self) -> subprocess.CompletedProcess[str]:
        return self._run("-c", BOOTS)

    def provision(self) -> subprocess.CompletedProcess[str]:
        return self._run("-m", "sqlalchemy_kravn_crypto", "provision", "--new-database")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = environment_with({}) | self.environment
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def assert_refused(self, run: Callable[[], subprocess.CompletedProcess[str]], *words: str) -> None:
        before = stored(self.engine)
        result = run()
        assert result.returncode != 0
        said = result.stdout + result.stderr
        assert all(word in said for word in words), said
        assert found_in(said, SECRET, self.environment["KRAVN_KMS_VAULT_TOKEN"]) == []
        assert stored(self.engine) == before


@pytest.fixture
def deployment(openbao: OpenBao, engine: Engine) -> Deployment:
    key = f"kravn-{secrets.token_hex(6)}"
    openbao.create_key(key)
    environment = {
        "DATABASE_URL": str(engine.url),
        "KRAVN_SECRET": SECRET,
        "KRAVN_KMS_PROVIDER": "vault",
        "KRAVN_KMS_VAULT_ADDR": openbao.address,
        "KRAVN_KMS_VAULT_KEY": key,
        "KRAVN_KMS_VAULT_TOKEN": openbao.issue_token(key),
        # Of a server that is sealed or busy; a boot tries again until then.
        "KRAVN_KMS_TIMEOUT": "5",
    }
    return Deployment(openbao, engine, environment)


def revoked(deployment: Deployment) -> None:
    deployment.openbao.revoke(deployment.environment["KRAVN_KMS_VAULT_TOKEN"])


def without_decrypt(deployment: Deployment) -> None:
    token = deployment.openbao.issue_token(deployment.key, rights=("encrypt",))
    deployment.environment["KRAVN_KMS_VAULT_TOKEN"] = token


def in_another_namespace(deployment: Deployment) -> None:
    deployment.environment["KRAVN_KMS_VAULT_NAMESPACE"] = "missing"


def too_old(deployment: Deployment) -> None:
    deployment.openbao.rotate(deployment.key)
    deployment.openbao.set_min_decryption_version(2, deployment.key)


def deleted(deployment: Deployment) -> None:
    deployment.openbao.delete_key(deployment.key)


def recreated(deployment: Deployment) -> None:
    deployment.openbao.recreate_key(deployment.key)


@pytest.mark.parametrize(
    ("happens", "error"),
    [
        (revoked, "CredentialExpiredError"),
        (without_decrypt, "ProviderDeniedError"),
        (too_old, "MasterKeyUnusableError"),
        (deleted, "MasterKeyNotFoundError"),
        (recreated, "UnwrapRefusedError"),
    ],
)
def test_a_program_ends_when_vault_no_longer_opens_its_key(
    deployment: Deployment, happens: Callable[[Deployment], None], error: str
) -> None:
    assert deployment.boot().returncode == 0
    assert len(stored(deployment.engine)) > 1
    happens(deployment)
    deployment.assert_refused(deployment.boot, error)


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (revoked, "KRAVN_KMS_VAULT_TOKEN"),
        (without_decrypt, "KRAVN_KMS_VAULT_TOKEN"),
        (in_another_namespace, "KRAVN_KMS_VAULT_NAMESPACE"),
        (deleted, "KRAVN_KMS_VAULT_KEY"),
    ],
)
def test_provisioning_writes_nothing_that_vault_would_not_open(
    deployment: Deployment, happens: Callable[[Deployment], None], words: str
) -> None:
    happens(deployment)
    deployment.assert_refused(deployment.provision, words)
    assert stored(deployment.engine) == []


@pytest.fixture
def sealed(deployment: Deployment) -> Iterator[Deployment]:
    assert deployment.boot().returncode == 0
    deployment.openbao.seal()
    yield deployment
    deployment.openbao.unseal()


def test_a_program_ends_while_vault_is_sealed(sealed: Deployment) -> None:
    sealed.assert_refused(sealed.boot, "ProviderSealedError")


def test_provisioning_writes_nothing_while_vault_is_sealed(deployment: Deployment) -> None:
    deployment.openbao.seal()
    try:
        deployment.assert_refused(deployment.provision, "Unseal")
    finally:
        deployment.openbao.unseal()
    assert stored(deployment.engine) == []


def test_a_program_that_is_moved_to_another_namespace_ends(deployment: Deployment) -> None:
    assert deployment.boot().returncode == 0
    in_another_namespace(deployment)
    deployment.assert_refused(deployment.boot, "ProviderMismatchError")
