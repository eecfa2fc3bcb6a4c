"""Targets: what a KMS answers when it is asked to wrap, to unwrap, or about a configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from sqlalchemy_kravn_crypto import exceptions as errors

from . import providers
from .mutators import json_behind
from .target import KEY, MARKER, SECRETS, TOKEN, Run, spellings, target
from .wire import (
    BINDING,
    PLAIN,
    Wire,
    answer_seeds,
    answered,
    behind,
    both_ways,
    http,
    one_of,
)

# --- Over HTTP -------------------------------------------------------------------------------------------------------


def _vault_seeds() -> list[bytes]:
    lease = {"request_id": "a", "lease_id": "", "renewable": False, "lease_duration": 0}
    return behind(
        (0, 1),
        answer_seeds(
            {**lease, **providers.VAULT_UNWRAPPED},
            {**lease, "data": {"ciphertext": "vault:v1:AAAA", "key_version": 1}},
            {"errors": ["encryption key not found"]},
            {"errors": ["cipher: message authentication failed"]},
        ),
    )


@target(allowed=(errors.ProviderError,), seeds=_vault_seeds, mutator=json_behind(2), secrets=SECRETS, share=1)
def vault_answers() -> Run:
    return both_ways(providers.vault(), b"vault:v1:AAAA", "transit/kravn:v1")


def _azure_seeds() -> list[bytes]:
    return behind(
        (0, 1),
        answer_seeds(
            providers.AZURE_UNWRAPPED,
            providers.AZURE_WRAPPED,
            {"error": {"code": "Forbidden", "message": MARKER, "innererror": {"code": "ForbiddenByPolicy"}}},
        ),
    )


@target(allowed=(errors.ProviderError,), seeds=_azure_seeds, mutator=json_behind(2), secrets=SECRETS, share=0.5)
def azure_answers() -> Run:
    """What Key Vault answers to who is logged in."""
    provider = providers.azure()
    run = both_ways(provider, bytes(256), f"{providers.AZURE_KEY}/{providers.VERSION}")

    def logged_in(data: bytes) -> object:
        with mock.patch.object(type(provider._login), "credential", return_value=providers.GivenToken()):
            return run(data)

    return logged_in


def _aws_seeds() -> list[bytes]:
    return behind(
        (0, 1),
        answer_seeds(
            providers.AWS_UNWRAPPED,
            providers.AWS_WRAPPED,
            {"__type": "com.amazonaws.kms#InvalidCiphertextException", "message": MARKER},
            {"__type": "ThrottlingException", "message": MARKER},
        ),
    )


@target(allowed=(errors.ProviderError,), seeds=_aws_seeds, mutator=json_behind(2), secrets=SECRETS, share=0.5)
def aws_answers() -> Run:
    """What KMS answers to who has credentials, which have a target of their own."""
    from botocore.credentials import ReadOnlyCredentials

    provider = providers.aws()
    run = both_ways(provider, b"wrapped", providers.ARN)
    found = ReadOnlyCredentials("AKIAIOSFODNN7EXAMPLE", TOKEN, None)

    def logged_in(data: bytes) -> object:
        with (
            mock.patch.object(type(provider._login), "_sdk_session"),
            mock.patch.object(type(provider._login), "_found", return_value=found),
        ):
            return run(data)

    return logged_in


# --- Over gRPC -------------------------------------------------------------------------------------------------------

_FIELDS, _RAW = range(2)


def _gcp_seeds() -> list[bytes]:
    messages = [providers.GCP_UNWRAPPED, providers.GCP_WRAPPED, [[1, MARKER]], [[3, MARKER]]]
    fields = [bytes([_FIELDS]) + json.dumps(message).encode() for message in messages]
    raw = [bytes([_RAW]) + providers.fields_message(message) for message in messages]
    words = ("CERTIFICATE_VERIFY_FAILED", "HTTP proxy", "larger than max", "ALPN property", MARKER)
    statuses = [bytes([number]) + words[number % len(words)].encode() for number in range(2, 20)]
    return behind((0, 1), [*fields, *raw, *statuses])


@target(allowed=(errors.ProviderError,), seeds=_gcp_seeds, mutator=json_behind(2), secrets=SECRETS, share=2)
def gcp_answers() -> Run:
    """The bytes of a message, those of fields that are right in themselves, or a status with its details."""
    import grpc

    from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey

    provider = providers.gcp("{}")
    wrapped = WrappedKey(f"{providers.GCP_KEY}/cryptoKeyVersions/1", b"wrapped")
    statuses = list(grpc.StatusCode)

    def channel(data: bytes) -> providers.Channel:
        mode, content = data[0] if data else _RAW, data[1:]
        if mode == _RAW:
            return providers.Channel(content)
        if mode == _FIELDS:
            try:
                return providers.Channel(providers.fields_message(json.loads(content)))
            except (ValueError, RecursionError):
                return providers.Channel(content)
        details = content.decode(errors="replace") if content else None
        return providers.Channel(status=statuses[mode % len(statuses)], details=details)

    def run(data: bytes) -> object:
        login = mock.patch.object(type(provider._login), "metadata", return_value=[("authorization", TOKEN)])
        with login, providers.through(channel(data[1:])):
            if data[:1] and data[0] % 2:
                return provider.wrap(KEY, BINDING, Deadline(30))
            return provider.unwrap(wrapped, BINDING, Deadline(30))

    return run


# --- From a process that talks to an HSM -----------------------------------------------------------------------------

_OTHER_PLAIN: Final = "/" * 43 + "="
"""What an HSM unwraps here: other bytes than it wraps, since those are looked for in errors."""


def _pkcs11_seeds() -> list[bytes]:
    attributes = {"SENSITIVE": True, "EXTRACTABLE": False, "VALUE_LEN": 32, "WRAP": None, "MODIFIABLE": True}
    answers = [
        {"value": _OTHER_PLAIN},
        {"value": "A" * 80, "key_id": "0102"},
        {"attributes": attributes, "flags": ["USER_PIN_COUNT_LOW"], "key_id": "0102", "model": "SoftHSM v2"},
        {"stage": "login", "code": "PinIncorrect"},
        {"stage": "library", "code": "NotLoaded", "detail": "no such file"},
        {"stage": "key", "code": "SeveralKeys", "ids": ["01", "02"]},
        {"stage": "use", "code": "0x42"},
    ]
    lines = [json.dumps(answer).encode() for answer in answers]
    others = [b"\x00\x00", b"\x00\x02" + lines[0], b"\x03\x8b"]
    return [*behind((0, 1, 2, 4, 5), [b"\x01" + line for line in lines]), *others]


@target(
    allowed=(errors.ProviderError,), seeds=_pkcs11_seeds, mutator=json_behind(2), secrets=(KEY, TOKEN.encode()), share=1
)
def pkcs11_answers() -> Run:
    """What the process writes, with the end of a line or without, and the status that it ends with.

    What it says that the loader of the operating system has said is shown on purpose, so there is no marker in it.
    """
    from sqlalchemy_kravn_crypto.providers import bounded_process
    from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey

    recorded = f"{providers.pkcs11().master_key};id=%01%02"
    kinds = {"aes-gcm": b"\x01" + bytes(60), "aes-kwp": b"\x02" + bytes(40)}

    def run(data: bytes) -> object:
        way, how, line = data[:1] or b"\0", data[1] if len(data) > 1 else 0, data[2:]
        mechanism = list(kinds)[way[0] // 3 % 2]
        # One that has refused a PIN does not ask again.
        provider = providers.pkcs11(mechanism=mechanism)
        with mock.patch.object(bounded_process, "_running", return_value=_ended(line + b"\n" * (how % 2), how)):
            match way[0] % 3:
                case 0:
                    return provider.unwrap(WrappedKey(recorded, kinds[mechanism]), BINDING, Deadline(30))
                case 1:
                    return provider.wrap(KEY, BINDING, Deadline(30))
                case _:
                    _unspoken(provider.examine(Deadline(30)), KEY, TOKEN.encode())
                    return None

    return run


@contextmanager
def _ended(written: bytes, status: int) -> Iterator[Any]:
    """Stand for a process that has written something and ended; a pipe takes as much as is allowed here at once."""
    reading, request = os.pipe()
    answer, writing = os.pipe()
    os.write(writing, written)
    os.close(writing)
    with (
        os.fdopen(reading, "rb", buffering=0),
        os.fdopen(request, "wb", buffering=0) as stdin,
        os.fdopen(answer, "rb", buffering=0) as stdout,
    ):
        yield SimpleNamespace(stdin=stdin, stdout=stdout, returncode=status - 128)


def _unspoken(findings: Any, *secrets: bytes) -> None:
    """See that nothing of what was found says a secret."""
    for finding in findings:
        said = f"{finding.subject} {finding.message} {finding.advice}".lower()
        assert not any(spelling in said for secret in secrets for spelling in spellings(secret)), (
            "a finding shows a secret"
        )


# --- Examinations, and what is on the way ----------------------------------------------------------------------------


def _examination_seeds() -> list[bytes]:
    lookup = {"data": {"ttl": 3600, "creation_ttl": 7200, "num_uses": 3}}
    paths = ["delete", "read", "update", "create", "root"]
    mount = ["keys/kravn", "keys/kravn/config", "keys/kravn/trim", "export/encryption-key/kravn", "backup/kravn"]
    held = {f"transit/{path}": ["update"] for path in (*mount, "encrypt/kravn")}
    capabilities = {"data": {**held, "sys/policies/acl/kravn": paths}}
    key = {"key": {"kid": MARKER}, "attributes": {"enabled": True, "exportable": True, "iat": 1, "exp": 4_000_000_000}}
    permissions = {"permissions": ["cloudkms.cryptoKeys.update"]}
    return behind(range(4), answer_seeds(lookup, capabilities, key, permissions))


@target(allowed=(), seeds=_examination_seeds, mutator=json_behind(2), secrets=SECRETS, share=0.1)
def examinations() -> Run:
    """What ``doctor`` finds out from a Vault, an Azure key vault, AWS and Google Cloud: it raises nothing at all."""
    from sqlalchemy_kravn_crypto.providers.base import Deadline

    vault, azure, aws, gcp = providers.vault(), providers.azure(), providers.aws(), providers.gcp("{}")

    def run(data: bytes) -> None:
        provider = (vault, azure, aws, gcp)[data[0] % 4 if data else 0]
        with (
            mock.patch.dict(os.environ, providers.ACCESS_KEY, clear=True),
            mock.patch.object(type(azure._login), "credential", return_value=providers.GivenToken()),
            mock.patch.object(type(gcp._login), "metadata", return_value=[("authorization", TOKEN)]),
            answered(lambda _url: http(data[1:])),
        ):
            _unspoken(provider.examine(Deadline(30)), *SECRETS)

    return run


def _proxy_seeds() -> list[bytes]:
    heads = [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.0 407 Who\r\nProxy-Authenticate: Basic",
        b"HTTP/1.1 503 No\r\nX: " + MARKER.encode(),
    ]
    return [head + b"\r\n\r\n" for head in heads]


@target(allowed=(errors.ProviderError,), seeds=_proxy_seeds, secrets=SECRETS)
def proxy_answers() -> Run:
    """What a proxy answers that is asked to connect."""
    from sqlalchemy_kravn_crypto.providers import transport
    from sqlalchemy_kravn_crypto.providers.base import Deadline
    from sqlalchemy_kravn_crypto.providers.proxy import proxy_of

    proxy = proxy_of("http://proxy.test:3128", "kravn", TOKEN)
    route = transport.Route(transport.tls_context(None, ""), proxy=proxy)

    def run(data: bytes) -> None:
        adapter: Any = transport._BoundedAdapter(Deadline(30), "vault", route, lambda _: None)
        adapter._tunnel(Wire(data), proxy, "vault.test", 443)

    return run


# --- What is recorded of a wrapped key -------------------------------------------------------------------------------

_RECORDED: Final = (
    ("transit/kravn:v1", b"vault:v1:AAAA"),
    (f"{providers.AZURE_KEY}/{providers.VERSION}", bytes(256)),
    (providers.ARN, b"wrapped"),
    (f"{providers.GCP_KEY}/cryptoKeyVersions/1", b"wrapped"),
    ("pkcs11:token=kravn;object=kravn;type=secret-key;id=%01", b"\x01" + bytes(60)),
)


def _recorded_seeds() -> list[bytes]:
    return [bytes([number]) + key.encode() + b"\n" + blob for number, (key, blob) in enumerate(_RECORDED)]


@target(allowed=(errors.ProviderError,), seeds=_recorded_seeds, secrets=SECRETS, share=0.1)
def wrapped_keys() -> Run:
    """A master key and a wrapped key as a row has them, with a KMS that answers as if nothing were wrong."""
    from sqlalchemy_kravn_crypto.providers import bounded_process
    from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey

    made = (providers.vault(), providers.azure(), providers.aws(), providers.gcp("{}"), providers.pkcs11())
    answer = {**providers.VAULT_UNWRAPPED, **providers.AWS_UNWRAPPED}
    steps = [
        ("vault.azure.net", json.dumps(providers.AZURE_UNWRAPPED).encode()),
        ("", json.dumps(answer).encode()),
    ]
    unwrapped = providers.Channel(providers.fields_message(providers.GCP_UNWRAPPED))
    line = json.dumps({"value": PLAIN}).encode() + b"\n"

    def run(data: bytes) -> object:
        provider = made[data[0] % len(made) if data else 0]
        key, _, blob = data[1:].partition(b"\n")
        master_key = key.decode(errors="surrogateescape")
        provider.recognises(master_key)
        with (
            mock.patch.dict(os.environ, providers.ACCESS_KEY, clear=True),
            mock.patch.object(type(made[1]._login), "credential", return_value=providers.GivenToken()),
            mock.patch.object(type(made[3]._login), "metadata", return_value=[("authorization", TOKEN)]),
            mock.patch.object(bounded_process, "_running", side_effect=lambda *_: _ended(line, 0)),
            providers.through(unwrapped),
            answered(one_of(steps, -1, b"\x00" + steps[-1][1])),
        ):
            return provider.unwrap(WrappedKey(master_key, blob), BINDING, Deadline(30))

    return run
