"""A provider of every KMS, as the targets construct it, with what it needs in the environment."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Self
from unittest import mock

from .target import KEY, TOKEN
from .wire import PLAIN, no_sleep

ARN: Final = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
ROLE: Final = "arn:aws:iam::111122223333:role/kravn"
GCP_KEY: Final = "projects/kravn/locations/europe-west3/keyRings/kravn/cryptoKeys/kravn"
AZURE_KEY: Final = "https://kravn.vault.azure.net/keys/kravn"
VERSION: Final = "0123456789abcdef0123456789abcdef"
TENANT: Final = "00000000-0000-0000-0000-000000000001"

NOTHING_OF_AWS: Final = {
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "HOME": "/nonexistent",
}
ACCESS_KEY: Final = {**NOTHING_OF_AWS, "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": TOKEN}


def vault(**other: Any) -> Any:
    from sqlalchemy_kravn_crypto.providers.vault import VaultProvider

    given: dict[str, Any] = {"token": TOKEN} if "auth" not in other else {}
    return VaultProvider(address="https://vault.test", key="kravn", sleep=no_sleep, **given, **other)


def azure(**other: Any) -> Any:
    from sqlalchemy_kravn_crypto.providers.azure import AzureProvider

    given = {"tenant_id": TENANT, "client_id": TENANT, "sleep": no_sleep, **other}
    if given.get("auth", "secret") == "secret":
        given["client_secret"] = TOKEN
    return AzureProvider(vault_url="https://kravn.vault.azure.net", key="kravn", **given)


def aws(**other: Any) -> Any:
    from sqlalchemy_kravn_crypto.providers.aws import AwsProvider

    return AwsProvider(key=ARN, sleep=no_sleep, **other)


def gcp(credentials: dict[str, Any] | str | None = None) -> Any:
    from sqlalchemy_kravn_crypto.providers.gcp import GcpProvider

    text = json.dumps(credentials) if isinstance(credentials, dict) else credentials
    return GcpProvider(key=GCP_KEY, credentials=text, sleep=no_sleep)


def pkcs11(**other: Any) -> Any:
    from sqlalchemy_kravn_crypto.providers.pkcs11 import Pkcs11Provider

    return Pkcs11Provider(module=Path(__file__), token="kravn", pin=TOKEN, key="kravn", **other)


class GivenToken:
    """What stands for the login to Azure, which has a target of its own."""

    def get_token(self, *_scopes: str, **_options: Any) -> Any:
        from azure.core.credentials import AccessToken

        return AccessToken(TOKEN, 2**33)


# --- Google Cloud, above gRPC ----------------------------------------------------------------------------------------


@dataclass
class Channel:
    """What stands for a channel of gRPC: gives the bytes of a message, or a status with its details."""

    message: bytes = b""
    status: Any = None
    details: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def unary_unary(self, _method: str) -> Callable[..., bytes]:
        import grpc

        class Refused(grpc.RpcError):
            def code(_self) -> Any:  # noqa: N805 - self is the channel
                return self.status

            def details(_self) -> str | None:  # noqa: N805 - as above
                return self.details

        def call(_request: bytes, **_: Any) -> bytes:
            if self.status is not None:
                raise Refused
            return self.message

        return call


@contextmanager
def one_tls_context() -> Iterator[None]:
    """Have providers be made without reading the public authorities again, which takes longer than all the rest."""
    from sqlalchemy_kravn_crypto.providers import azure, gcp

    made = _tls_context()
    with (
        mock.patch.object(azure, "tls_context", return_value=made),
        mock.patch.object(gcp, "tls_context", return_value=made),
    ):
        yield


@cache
def _tls_context() -> Any:
    from sqlalchemy_kravn_crypto.providers.transport import tls_context

    return tls_context(None, "")


@contextmanager
def through(channel: Channel) -> Iterator[None]:
    """Have the provider for Google Cloud take this for its channel."""
    from sqlalchemy_kravn_crypto.providers import gcp

    with mock.patch.object(gcp.GcpProvider, "_channel", return_value=channel):
        yield


def fields_message(fields: Any) -> bytes:
    """Return a message of protobuf: of pairs of a number, and an integer, a text, bytes in a list, or ``crc`` of those.

    What is none is left out, so that every JSON gives a message.
    """
    import google_crc32c

    written = b""
    last = b""
    for pair in fields if isinstance(fields, list) else []:
        match pair:
            case [int(number), value] if 0 < number < 2**29:
                pass
            case _:
                continue
        if value == "crc":
            value = [8, google_crc32c.value(last)]
        match value:
            case int():
                written += _varint(number << 3) + _varint(value % 2**64)
            case str() | [str()]:
                last = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else _decoded(value[0])
                written += _varint(number << 3 | 2) + _varint(len(last)) + last
            case [int(), int(inner)]:
                content = _varint(8) + _varint(inner % 2**64)
                written += _varint(number << 3 | 2) + _varint(len(content)) + content
    return written


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError:
        return text.encode("utf-8", "surrogatepass")


def _varint(number: int) -> bytes:
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    return bytes([*written, number])


GCP_UNWRAPPED: Final = [[1, [PLAIN]], [2, "crc"], [3, 1], [4, 1]]
GCP_WRAPPED: Final = [[1, f"{GCP_KEY}/cryptoKeyVersions/1"], [2, ["AAAA"]], [4, "crc"], [5, 1], [6, 1], [7, 1]]

# --- What is right for an answer of each KMS -------------------------------------------------------------------------

VAULT_UNWRAPPED: Final = {"data": {"plaintext": PLAIN}}
AWS_UNWRAPPED: Final = {"KeyId": ARN, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT", "Plaintext": PLAIN}
AWS_WRAPPED: Final = {"KeyId": ARN, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT", "CiphertextBlob": "AAAA"}
AZURE_UNWRAPPED: Final = {
    "kid": f"{AZURE_KEY}/{VERSION}",
    "value": base64.urlsafe_b64encode(KEY).decode().rstrip("="),
}
AZURE_WRAPPED: Final = {
    "kid": f"{AZURE_KEY}/{VERSION}",
    "value": base64.urlsafe_b64encode(bytes(256)).decode().rstrip("="),
}
