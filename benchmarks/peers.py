"""What else encrypts a column or a value: each is given the same documents as ``EncryptedJSON``."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from typing import Any, Final

from cryptography.fernet import Fernet
from sqlalchemy import Column, Dialect, LargeBinary, MetaData, Table, Text
from sqlalchemy.types import TypeDecorator

from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, Keyring, use_keyring

from .documents import KINDS, Documents
from .figures import Effort, Figure, Section
from .measuring import beside
from .values import OURS, SQLITE, Processors, check, dialect_of, processors, race_processors

SECTION: Final = Section(
    "peers",
    "Other ways to encrypt a column",
    "The processors of the types alone, as above, on SQLite's dialect. Where the other one takes text, `json.dumps` "
    "and `json.loads` of the standard library are in front of it; a value that is decrypted when first used is used. "
    "Tink is called directly, without a column type.",
)

_TARGET: Final = 0.5


class _Inapplicable(Exception):  # noqa: N818 - it is a reason
    """A peer works in a way that this section does not measure."""


class _FernetJSON(TypeDecorator[Any]):
    """The type that most projects write for themselves."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self) -> None:
        super().__init__()
        self._fernet = Fernet(Fernet.generate_key())

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002 - fixed
        return None if value is None else self._fernet.encrypt(json.dumps(value).encode())

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002 - fixed
        return None if value is None else json.loads(self._fernet.decrypt(value))


def _sqlalchemy_utils(engine: str) -> Processors:
    encrypted = import_module("sqlalchemy_utils.types.encrypted.encrypted_type")
    type_ = encrypted.StringEncryptedType(Text, os.urandom(32).hex(), getattr(encrypted, engine))
    return _behind_json(processors("", type_, dialect_of(SQLITE)))


def _advanced_alchemy() -> Processors:
    types = import_module("advanced_alchemy.types")
    return _behind_json(processors("", types.EncryptedText(key=os.urandom(32)), dialect_of(SQLITE)))


def _advanced_alchemy_pgcrypto() -> Processors:
    msg = "encrypts in the database, with the key in every statement: there is nothing to time in the process"
    raise _Inapplicable(msg)


def _sqlalchemy_encrypted_field() -> Processors:
    package = import_module("sqlalchemy_encrypted_field")
    package.configure(base64.b64encode(os.urandom(32)).decode())
    table = Table("plugin", MetaData(), Column("credentials", package.EncryptedJson()))
    own = processors("", table.c.credentials.type, dialect_of(SQLITE))

    def read(stored: Any) -> Any:
        value = own.read(stored)
        len(value)  # now it is decrypted
        return value

    return Processors("", own.write, read)


def _fernet() -> Processors:
    return processors("", _FernetJSON(), dialect_of(SQLITE))


def _tink() -> Processors:
    tink, aead = import_module("tink"), import_module("tink.aead")
    aead.register()
    primitive = tink.new_keyset_handle(aead.aead_key_templates.AES256_GCM).primitive(aead.Aead)
    associated_data = b"plugin.credentials"
    return Processors(
        "",
        lambda value: primitive.encrypt(json.dumps(value).encode(), associated_data),
        lambda stored: json.loads(primitive.decrypt(stored, associated_data)),
    )


def _behind_json(inner: Processors) -> Processors:
    write, read = inner.write, inner.read
    return Processors("", lambda value: write(json.dumps(value)), lambda stored: json.loads(read(stored)))


# What it is, the distribution that it is part of, and how it is made.
_PEERS: Final[tuple[tuple[str, str, Callable[[], Processors]], ...]] = (
    ("StringEncryptedType, AES-GCM", "SQLAlchemy-Utils", lambda: _sqlalchemy_utils("AesGcmEngine")),
    ("StringEncryptedType, Fernet", "SQLAlchemy-Utils", lambda: _sqlalchemy_utils("FernetEngine")),
    ("EncryptedText, Fernet", "advanced-alchemy", _advanced_alchemy),
    ("EncryptedText, pgcrypto", "advanced-alchemy", _advanced_alchemy_pgcrypto),
    ("EncryptedJson, AES-GCM", "sqlalchemy-encrypted-field", _sqlalchemy_encrypted_field),
    ("a TypeDecorator of one's own, Fernet", "cryptography", _fernet),
    ("AES256_GCM", "tink", _tink),
)


def measure(effort: Effort) -> Iterator[Figure]:
    """Race all peers at once, for every kind of document. One that cannot take part is in the table with the reason."""
    with use_keyring(Keyring(DataKey.generate())):
        for kind, make in KINDS.items():
            documents = Documents(make, effort.values)
            ours = processors(OURS, EncryptedJSON(associated_data="plugin.credentials"), dialect_of(SQLITE))
            running, absent = _running(documents)
            ways = race_processors([ours, *running], documents, effort.value_rounds)
            for way, best in zip(("write", "read"), ways, strict=True):
                for peer in running:
                    yield Figure(
                        f"{kind}: {way}",
                        peer.name,
                        best[OURS] / best[peer.name],
                        _TARGET,
                        beside(best[OURS], best[peer.name], len(documents)),
                    )
            for name, reason in absent.items():
                yield Figure(kind, name, None, _TARGET, reason)


def _running(documents: Documents) -> tuple[list[Processors], dict[str, str]]:
    """Return the peers that work here, and why the others do not."""
    running, absent = [], {}
    for description, distribution, make in _PEERS:
        name = f"{distribution}: {description}"
        try:
            made = make()
            peer = Processors(f"{distribution} {version(distribution)}: {description}", made.write, made.read)
            check(peer, documents)
        except _Inapplicable as error:
            absent[name] = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is that does not work, the table says so
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            running.append(peer)
    return running, absent
