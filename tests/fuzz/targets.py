"""What is fuzzed: a plain function for every parser, what it may raise, and valid inputs to begin with.

The first byte of most inputs says how much of the structure is right. What follows it may be taken as it is, or go
where a mutation at random would hardly ever get: into the payload of a frame under the right key, into a row that is
authenticated again, behind the headers of an answer over HTTP.
"""

from __future__ import annotations

import json
import os
import tempfile
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final
from unittest import mock

from sqlalchemy_kravn_crypto import exceptions as errors
from tests.leaks import attributes

KEY: Final = bytes(range(32))
MARKER: Final = "S3CR3T-fuzzing-marker"
"""What stands in plaintexts, answers and settings, and must be in no error."""

TOKEN: Final = "t0ken-fuzzing-marker"
"""What is logged in with."""

NAME: Final = "note.content"

Run = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One parser.

    :ivar name: what it is called on the command line, and in the names of files.
    :ivar make: prepares it once, and returns the function that takes an input.
    :ivar allowed: what it may raise.
    :ivar seeds: returns valid inputs.
    :ivar secrets: what must not be in an error.
    :ivar share: its part of all inputs, in relation to the others.
    :ivar max_len: how long an input may be, in bytes.
    """

    name: str
    make: Callable[[], Run]
    allowed: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    secrets: tuple[bytes, ...] = (MARKER.encode(),)
    share: int = 1
    max_len: int = 1024
    spelled: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spelled", tuple(text for secret in self.secrets for text in _spelled(secret)))


class FindingError(AssertionError):
    """An input was not handled as it must be."""


TARGETS: Final[dict[str, Target]] = {}


@cache
def prepared(name: str) -> Run:
    return TARGETS[name].make()


def check(target: Target, data: bytes) -> bool:
    """Give an input to a target, and tell whether it was refused.

    :raises FindingError: if something else was raised than may be, or what was raised shows a secret.
    """
    refusal: Exception | None = None
    try:
        prepared(target.name)(data)
    except target.allowed as error:
        refusal = error
    except Exception as error:
        msg = f"{target.name} raises {type(error).__module__}.{type(error).__qualname__}"
        raise FindingError(msg) from error
    if refusal is None:
        return False
    shown = _shown(refusal)
    if any(spelling in shown for spelling in target.spelled):
        msg = f"{target.name} raises a {type(refusal).__qualname__} that shows a secret"
        raise FindingError(msg) from refusal
    if refusal.__cause__ is not None or refusal.__context__ is not None:
        msg = f"{target.name} raises a {type(refusal).__qualname__} that leads to another error"
        raise FindingError(msg) from refusal
    return True


def _shown(error: Exception) -> str:
    return " ".join([str(error), *map(repr, (*error.args, *attributes(error)))]).lower()


def _spelled(secret: bytes) -> list[str]:
    # The ends of base64 depend on what follows, so they are left out.
    encoded = b64encode(secret).decode().rstrip("=")[:-1]
    return [text.lower() for text in (secret.hex(), repr(secret)[2:-1], encoded)]


def _target(**values: Any) -> Callable[[Callable[[], Run]], Callable[[], Run]]:
    def declare(make: Callable[[], Run]) -> Callable[[], Run]:
        name = make.__name__.strip("_").replace("_", "-")
        TARGETS[name] = Target(name=name, make=make, **values)
        return make

    return declare


# --- Values ----------------------------------------------------------------------------------------------------------

NONCE: Final = bytes(range(24))
RAW, HEADED, ENCRYPTED = range(3)
"""What follows the first byte: a frame; its nonce and body, behind the right header; a payload to be encrypted."""


def _frame(data: bytes) -> bytes:
    from sqlalchemy_kravn_crypto.ciphertext import FRAME_START, ColumnName
    from sqlalchemy_kravn_crypto.keyring import DataKey

    key, name = _key(DataKey), _name(ColumnName)
    mode, content = data[0] % 3 if data else RAW, data[1:]
    if mode == HEADED:
        return bytes(FRAME_START + key.key_id + name.hint + content)
    return bytes(key.encrypt(NONCE, content, name)) if mode == ENCRYPTED else content


@cache
def _key(make: Any) -> Any:
    return make(KEY)


@cache
def _name(make: Any) -> Any:
    return make(NAME)


def _frames() -> list[bytes]:
    payload = b"\x01" + json.dumps({"token": MARKER}).encode()
    frame = _frame(bytes([ENCRYPTED]) + payload)
    return [bytes([RAW]) + frame, bytes([HEADED]) + frame[12:], bytes([ENCRYPTED]) + payload]


@_target(allowed=(errors.DecryptionError,), seeds=_frames, secrets=(MARKER.encode(), KEY), share=3)
def _binary_frames() -> Run:
    from sqlalchemy.dialects import sqlite

    from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, Keyring, use_keyring

    column, dialect, keyring = EncryptedJSON(associated_data=NAME), sqlite.dialect(), Keyring(DataKey(KEY))
    read = column.result_processor(dialect, None)
    assert read is not None

    def run(data: bytes) -> object:
        with use_keyring(keyring):
            return read(_frame(data))

    return run


def _texts() -> list[bytes]:
    from sqlalchemy_kravn_crypto.ciphertext import to_text

    readable = bytes([ENCRYPTED]) + b"\x03" + MARKER.encode()
    return [*(bytes([RAW]) + to_text(_frame(seed)).encode() for seed in (readable, *_frames())), readable]


@_target(allowed=(errors.DecryptionError,), seeds=_texts, secrets=(MARKER.encode(), KEY), share=3)
def _text_frames() -> Run:
    from sqlalchemy.dialects import sqlite

    from sqlalchemy_kravn_crypto import DataKey, EncryptedString, Keyring, use_keyring
    from sqlalchemy_kravn_crypto.ciphertext import key_id_of_text_start, to_text

    column = EncryptedString(associated_data=NAME, storage="text")
    read, keyring = column.result_processor(sqlite.dialect(), None), Keyring(DataKey(KEY))
    assert read is not None

    def run(data: bytes) -> object:
        is_raw = not data or data[0] % 3 == RAW
        text = data[1:].decode(errors="replace") if is_raw else to_text(_frame(data))
        key_id_of_text_start(text[:23])
        with use_keyring(keyring):
            return read(text)

    return run


KINDS: Final = (*range(1, 5), *range(0x10, 0x12), 0x92, *range(0x13, 0x1A), 0x9A, 0x1B)
"""The first byte of every kind of payload."""


def _payloads() -> list[bytes]:
    frozen = json.loads((Path(__file__).parents[1] / "vectors" / "frames.json").read_text("utf-8"))["frames"]
    found = {bytes.fromhex(one["payload"]) for one in frozen if "payload" in one}
    return sorted({*found, b"\x03" + MARKER.encode(), b"\x01" + json.dumps([MARKER, 1.5, None]).encode()}, key=repr)


@_target(allowed=(errors.MalformedPayloadError,), seeds=_payloads, share=6)
def _payload_decoders() -> Run:
    """Every codec reads every payload, and what one reads it writes as the same bytes, or reads again as equal."""
    from sqlalchemy_kravn_crypto.codecs import documents, scalars

    codecs: dict[int, list[Any]] = {
        0x01: [documents.JSONCodec()],
        0x03: [scalars.TextCodec()],
        0x04: [scalars.BytesCodec()],
        0x10: [scalars.IntegerCodec()],
        0x92: [scalars.DecimalCodec()],
        0x13: [scalars.BooleanCodec()],
        0x14: [scalars.DateCodec()],
        0x15: [scalars.TimeCodec()],
        0x16: [scalars.DateTimeCodec(aware=False)],
        0x17: [scalars.DateTimeCodec(aware=True)],
        0x18: [scalars.UuidCodec(), scalars.UuidCodec(as_text=True)],
        0x19: [scalars.IntervalCodec()],
        0x9A: [scalars.EnumCodec({"RED": 1, "GREEN": 2})],
        0x1B: [scalars.FloatCodec()],
    }
    codecs[0x02], codecs[0x11] = codecs[0x01], codecs[0x10]
    everyone = [codec for kind in codecs for codec in codecs[kind]]

    def read(codec: Any, payload: bytes) -> tuple[bool, Any]:
        refusal = None
        try:
            return True, codec.decode(payload)
        except errors.MalformedPayloadError as error:
            refusal = error
        shown = _shown(refusal)
        assert not any(spelling in shown for spelling in _spelled(MARKER.encode()))
        return False, None

    def run(data: bytes) -> None:
        # The first byte where it is a kind; else it chooses one, so that few inputs end there.
        kind = data[0] if data and data[0] in KINDS else KINDS[data[0] % len(KINDS)] if data else KINDS[0]
        payload = bytes([kind]) + data[1:]
        for codec in everyone if len(data) % 16 == 0 else codecs[kind]:
            was_read, value = read(codec, payload)
            if was_read and value is not None:
                written = codec.encode(value)
                # JSON has spaces, escapes and orders; a codec of one spelling gives it back.
                assert written == payload if kind not in {0x01, 0x02} else codec.same(codec.decode(written), value)

    return run


def _objects() -> list[bytes]:
    return [
        b"\x01" + json.dumps({"name": MARKER, "age": 3, "tags": ["a"], "when": "2024-01-01T00:00:00Z"}).encode(),
        b"\x02" + json.dumps({"name": MARKER, "age": 2**80}).encode(),
    ]


@_target(allowed=(errors.MalformedPayloadError,), seeds=_objects)
def _object_payloads() -> Run:
    from datetime import datetime

    from pydantic import BaseModel

    from sqlalchemy_kravn_crypto.codecs.objects import ObjectCodec

    class Person(BaseModel):
        name: str
        age: int
        tags: list[str] = []
        when: datetime | None = None

    return ObjectCodec(Person).decode


# --- The key store ---------------------------------------------------------------------------------------------------

_ROW_COLUMNS: Final = 19
_DELETE: Final = 250


@dataclass(frozen=True)
class _Edit:
    """One change of a row, as it is written in an input: row, column, type, length, and the value."""

    row: int
    column: int
    kind: int
    value: bytes

    def written(self) -> bytes:
        return bytes([self.row, self.column, self.kind, len(self.value)]) + self.value


def _edits(data: bytes) -> Iterator[_Edit]:
    while len(data) >= 4:
        row, column, kind, length = data[:4]
        yield _Edit(row, column, kind, data[4 : 4 + length])
        data = data[4 + length :]


def _as_database_value(edit: _Edit) -> Any:
    """Return the value as a type that SQLite knows, which keeps any of them in any column."""
    text = edit.value.decode(errors="replace")
    number = int.from_bytes(edit.value[:8], "big", signed=True)
    return (text, edit.value, number, None, number / 7)[edit.kind % 5]


SIGNED: Final = 1


def _rows_seeds() -> list[bytes]:
    by_value = [
        _Edit(2, column, 0, value)
        for column, value in enumerate(
            (b"5", b"default", b"00" * 8, b"retired", b"default", b"3", b"x", b"vault", b"transit/kravn:v1", b"AAAA")
        )
    ]
    standby = [_Edit(2, 10, 0, b"vault"), _Edit(2, 11, 0, b"transit/kravn:v2"), _Edit(2, 12, 0, b"AAAA")]
    return [
        bytes([SIGNED]),
        *(bytes([signed]) + edit.written() for edit in by_value for signed in (0, SIGNED)),
        bytes([SIGNED]) + b"".join(edit.written() for edit in standby),
        bytes([SIGNED]) + _Edit(1, 13, 3, b"").written() + _Edit(1, 15, 0, MARKER.encode()).written(),
        bytes([SIGNED]) + _Edit(0, 5, 2, bytes(8)).written() + _Edit(0, 16, 0, b"2024-01-01 00:00:00").written(),
        bytes([0]) + _Edit(1, _DELETE, 0, b"").written(),
    ]


def _untyped(connection: Any, table: Any) -> None:
    """Create a table without types and constraints, for whoever can write to the database can drop those."""
    columns = ", ".join(f'"{column.name}"' for column in table.columns)
    connection.exec_driver_sql(f"CREATE TABLE {table.name} ({columns})")


def _insert(connection: Any, table: Any, rows: list[dict[str, Any]]) -> None:
    names = [column.name for column in table.columns]
    places = ", ".join("?" * len(names))
    connection.exec_driver_sql(f"DELETE FROM {table.name}")  # noqa: S608 - a constant
    for row in rows:
        connection.exec_driver_sql(f"INSERT INTO {table.name} VALUES ({places})", tuple(row[name] for name in names))  # noqa: S608 - the same


def _changed(rows: list[dict[str, Any]], data: bytes) -> list[dict[str, Any]]:
    changed = [dict(row) for row in rows]
    for edit in _edits(data):
        if not changed:
            break
        at = edit.row % len(changed)
        if edit.column == _DELETE:
            del changed[at]
        else:
            names = list(changed[at])
            changed[at][names[edit.column % len(names)]] = _as_database_value(edit)
    return changed


_STORED: Final = "SELECT * FROM {} ORDER BY id"


@cache
def _deployment() -> Any:
    """Make a key store with a key of every state, and a trail of events."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import StaticPool

    from sqlalchemy_kravn_crypto.lifecycle import promote, rotate
    from tests.fixtures_deployment import Deployment

    # In memory, and for as long as the process: nothing is left behind.
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    with tempfile.TemporaryDirectory() as directory:
        made = Deployment(engine, Path(directory))
        made.open()
        operator = made.operator()
        rotate(operator)
        promote(operator, reason=MARKER)
        rotate(operator)
        opened = made.open()
    with engine.connect() as connection:
        stored = {
            name: [dict(row) for row in connection.exec_driver_sql(_STORED.format(name)).mappings()]
            for name in ("kms_keys", "kms_events")
        }
    return made, opened, stored


@_target(allowed=(errors.KravnCryptoError,), seeds=_rows_seeds, secrets=(KEY,), share=4)
def _key_rows() -> Run:
    """Rows as a database returns them, with their MACs made anew or not, opened with the MAC key and the KMS."""
    from sqlalchemy import create_engine

    from sqlalchemy_kravn_crypto.rows import select_rows
    from sqlalchemy_kravn_crypto.schema import TABLES
    from sqlalchemy_kravn_crypto.wrapping import run_here

    made, opened, stored = _deployment()
    store, secrets, mac_key = made.store(), opened.secrets, opened.mac_key
    connection = create_engine("sqlite://").connect()
    _untyped(connection, TABLES.keys)

    def run(data: bytes) -> object:
        _insert(connection, TABLES.keys, _changed(stored["kms_keys"], data[1:]))
        rows = select_rows(connection)
        if data[:1] and data[0] & SIGNED:
            rows = mac_key.sign(rows)
        store._provisioned(rows)
        if data[:1] and data[0] & 2:
            return store.reopen(rows, opened)
        return store._load(rows, secrets, None, run_here)

    return run


def _events_seeds() -> list[bytes]:
    edits = [_Edit(1, column, 0, b"2024-01-01") for column in range(10)]
    return [
        bytes([SIGNED]),
        *(bytes([signed]) + edit.written() for edit in edits for signed in (0, SIGNED)),
        bytes([SIGNED]) + _Edit(0, 7, 0, b'{"state": "primary", "a": [1]}').written(),
        bytes([SIGNED]) + _Edit(0, 1, 2, bytes(8)).written(),
    ]


def _chained(rows: list[dict[str, Any]], hash_of: Callable[[Any], str]) -> str:
    """Give every event the hashes that make a chain of them, for those have no key."""
    from datetime import UTC, datetime

    newest = str(rows[0]["previous_hash"]) if rows else ""
    for row in rows:
        row["previous_hash"] = newest
        try:
            moment: Any = datetime.fromisoformat(row["occurred_at"]).replace(tzinfo=UTC)
        except (TypeError, ValueError):
            moment = row["occurred_at"]
        newest = row["hash"] = hash_of(row | {"occurred_at": moment})
    return newest


@_target(allowed=(errors.KeyStoreError,), seeds=_events_seeds, share=2)
def _event_chain() -> Run:
    """The audit trail, with its hashes made anew or not."""
    from sqlalchemy import create_engine

    from sqlalchemy_kravn_crypto.events import hash_of, read_events
    from sqlalchemy_kravn_crypto.schema import TABLES

    _, _, stored = _deployment()
    connection = create_engine("sqlite://").connect()
    _untyped(connection, TABLES.events)

    def run(data: bytes) -> None:
        rows = _changed(stored["kms_events"], data[1:])
        newest = str(rows[-1]["hash"]) if rows else None
        if data[:1] and data[0] & SIGNED:
            newest = _chained(rows, hash_of)
        _insert(connection, TABLES.events, rows)
        for found in read_events(connection, newest):
            json.dumps(found.as_dict())

    return run


# --- The answers of a KMS --------------------------------------------------------------------------------------------

_STATUSES: Final = (200, 400, 401, 403, 404, 429, 500, 503, 412, 472, 473, 302)
_BINDING: Final = b"".join(
    len(part).to_bytes(4, "big") + part
    for part in (b"sqlalchemy-kravn-crypto/wrap/v1", b"default", b"00000000-0000-0000-0000-000000000000", bytes(8))
)


class _Wire:
    """What a provider is connected to: takes what is sent, and gives the answer in pieces."""

    def __init__(self, answer: bytes) -> None:
        self._left = memoryview(answer)

    def settimeout(self, _seconds: float) -> None:
        pass

    def sendall(self, _data: bytes) -> None:
        pass

    def recv_into(self, buffer: Any) -> int:
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _http(data: bytes) -> bytes:
    """Return the bytes of an answer: all of them, or the body behind headers that are right."""
    mode, content = data[0] if data else 0, data[1:]
    if mode < len(_STATUSES):
        length = f"Content-Length: {len(content)}\r\nContent-Type: application/json\r\n\r\n"
        return f"HTTP/1.1 {_STATUSES[mode]} Status\r\n{length}".encode() + content
    return content


@contextmanager
def _answered(answers: Callable[[Any], bytes]) -> Iterator[None]:
    """Have every connection be one that gives an answer; everything above the socket is the real thing."""
    from sqlalchemy_kravn_crypto.providers import transport

    @contextmanager
    def connected(_self: Any, url: Any) -> Iterator[Any]:
        yield _Wire(answers(url))

    with mock.patch.object(transport._BoundedAdapter, "connected", connected):
        yield


def _answer_seeds(*bodies: Any) -> list[bytes]:
    texts = [json.dumps(body).encode() for body in (*bodies, {"errors": [MARKER, TOKEN]}, [1], None)]
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nRetry-After: 1\r\n\r\n{}"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    by_status = [bytes([mode]) + texts[-3] for mode in range(len(_STATUSES))]
    return [*(b"\x00" + text for text in texts), *by_status, b"\xff" + raw, b"\xff" + chunked]


def _both_ways(provider: Any, blob: bytes, master_key: str) -> Run:
    """Return what wraps and unwraps with one answer for both; an operation that the KMS refuses is one that ends."""
    from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey

    wrapped = WrappedKey(master_key, blob)

    def run(data: bytes) -> object:
        with _answered(lambda _url: _http(data[1:])):
            if data[:1] and data[0] % 2:
                return provider.wrap(KEY, _BINDING, Deadline(30))
            return provider.unwrap(wrapped, _BINDING, Deadline(30))

    return run


def _wrapping(seeds: list[bytes]) -> list[bytes]:
    return [bytes([way]) + seed for seed in seeds for way in (0, 1)]


def _no_sleep(_seconds: float) -> None:
    pass


_PLAIN: Final = b64encode(KEY).decode()
_SECRETS: Final = (KEY, TOKEN.encode(), MARKER.encode())


def _vault_seeds() -> list[bytes]:
    lease = {"request_id": "a", "lease_id": "", "renewable": False, "lease_duration": 0}
    return _wrapping(
        _answer_seeds(
            {**lease, "data": {"plaintext": _PLAIN}},
            {**lease, "data": {"ciphertext": "vault:v1:AAAA", "key_version": 1}},
            {"auth": {"client_token": "hvs.abc", "lease_duration": 60}},
            {"errors": ["encryption key not found"]},
            {"errors": ["cipher: message authentication failed"]},
        )
    )


@_target(allowed=(errors.ProviderError,), seeds=_vault_seeds, secrets=_SECRETS, share=2)
def _vault_answers() -> Run:
    from sqlalchemy_kravn_crypto.providers.vault import VaultProvider

    provider = VaultProvider(address="https://vault.test", token=TOKEN, key="kravn", sleep=_no_sleep)
    return _both_ways(provider, b"vault:v1:AAAA", "transit/kravn:v1")


@_target(allowed=(errors.ProviderError,), seeds=_vault_seeds, secrets=_SECRETS)
def _vault_login_answers() -> Run:
    from sqlalchemy_kravn_crypto.providers.vault import VaultProvider

    provider = VaultProvider(
        address="https://vault.test", auth="approle", role_id="role", secret_id=TOKEN, key="kravn", sleep=_no_sleep
    )
    return lambda data: _logged_in(provider, data)


def _logged_in(provider: Any, data: bytes) -> object:
    from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey

    good = b"\x00" + json.dumps({"data": {"plaintext": _PLAIN}}).encode()
    answers = iter([data[1:]])
    # The first answer is that to the login, if it is not one that is worth another attempt.
    with _answered(lambda _url: _http(next(answers, good))):
        return provider.unwrap(WrappedKey("transit/kravn:v1", b"vault:v1:AAAA"), _BINDING, Deadline(30))


def _azure_seeds() -> list[bytes]:
    key = "https://kravn.vault.azure.net/keys/kravn/0123456789abcdef0123456789abcdef"
    return _wrapping(
        _answer_seeds(
            {"kid": key, "value": urlsafe_b64encode(KEY).decode().rstrip("=")},
            {"kid": key, "value": urlsafe_b64encode(bytes(256)).decode().rstrip("=")},
            {"token_type": "Bearer", "expires_in": 3600, "access_token": MARKER},
            {"error": {"code": "Forbidden", "message": MARKER, "innererror": {"code": "ForbiddenByPolicy"}}},
            {"error": "invalid_client", "error_description": MARKER, "error_codes": [7000215]},
        )
    )


class _GivenToken:
    """What stands for the login, which has a target of its own in no other way than through the SDK."""

    def get_token(self, *_scopes: str, **_options: Any) -> Any:
        from azure.core.credentials import AccessToken

        return AccessToken(TOKEN, 2**33)


@_target(allowed=(errors.ProviderError,), seeds=_azure_seeds, secrets=_SECRETS)
def _azure_answers() -> Run:
    """What Key Vault answers to who is logged in."""
    from sqlalchemy_kravn_crypto.providers.azure import AzureProvider

    tenant = "00000000-0000-0000-0000-000000000001"
    provider = AzureProvider(
        vault_url="https://kravn.vault.azure.net",
        key="kravn",
        tenant_id=tenant,
        client_id=tenant,
        client_secret=TOKEN,
        sleep=_no_sleep,
    )
    recorded = f"{provider.master_key}/0123456789abcdef0123456789abcdef"
    run = _both_ways(provider, bytes(256), recorded)

    def logged_in(data: bytes) -> object:
        with mock.patch.object(type(provider._login), "credential", return_value=_GivenToken()):
            return run(data)

    return logged_in


# --- Settings and files ----------------------------------------------------------------------------------------------


def _settings_seeds() -> list[bytes]:
    vault = f"KMS_PROVIDER=vault\nKMS_VAULT_ADDR=https://vault.test\nKMS_VAULT_KEY=kravn\nKMS_VAULT_TOKEN={MARKER}"
    azure = "KMS_PROVIDER=azure\nKMS_AZURE_VAULT_URL=https://kravn.vault.azure.net\nKMS_AZURE_KEY=kravn"
    pinned = "KMS_PINNED_KEYS=0123456789abcdef, 0123456789abcde0\nKMS_TIMEOUT=5\nLEASE=60\nFENCE=transaction"
    secret = f"SECRET={MARKER * 2}\nSECRET_RETIRED={MARKER}\nDEPLOYMENT_ID=00000000-0000-0000-0000-000000000001"
    return [text.encode() for text in (vault, azure, pinned, secret, "KMS_PROXY=http://proxy.test:3128", "SECRT=1")]


@_target(allowed=(errors.ConfigurationError,), seeds=_settings_seeds)
def _settings() -> Run:
    from sqlalchemy_kravn_crypto.configuration import provider_of
    from sqlalchemy_kravn_crypto.settings import Settings

    def run(data: bytes) -> object:
        # As the environment is decoded: what is no UTF-8 is in it as lone surrogates.
        lines = data.replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
        pairs = (line.partition("=") for line in lines if "=" in line)
        # A name is shown on purpose; and no file but those of the seeds is to be read.
        environment = {
            f"KRAVN_{name}": value
            for name, _, value in pairs
            if name and MARKER[:4] not in name and not name.upper().endswith("_FILE")
        }
        with mock.patch.dict(os.environ, environment, clear=True):
            return provider_of(Settings.from_environment())

    return run


@_target(
    allowed=(errors.SecretFileError,),
    seeds=lambda: [KEY.hex().encode(), KEY.hex().encode() + b"\n", KEY.hex().upper().encode(), MARKER.encode()],
    secrets=(KEY, MARKER.encode()),
)
def _secret_key() -> Run:
    from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret

    descriptor, name = tempfile.mkstemp()
    os.close(descriptor)
    path = Path(name)

    def run(data: bytes) -> object:
        path.write_bytes(data)
        return BootstrapSecret.from_file(path)

    return run
