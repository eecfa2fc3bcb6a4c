"""A deployment whose key store has a data key in each state, and what somebody who owns its database does to it.

The key store is authenticated in one of four ways, with a real KMS:

* ``secret``: the MAC key comes from ``KRAVN_SECRET``; the KMS is Azure's, which authenticates nothing.
* ``file``: it comes from ``secret.key``; the KMS is Vault.
* ``wrapped``: there is no secret, and Vault wraps the MAC key.
* ``pins``: there is no secret, the KMS is Azure's, and the operator pins the key ids. Nothing authenticates the rows.
"""

from __future__ import annotations

import secrets
import shutil
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from sqlalchemy import (
    Column,
    Engine,
    LargeBinary,
    MetaData,
    NullPool,
    Table,
    create_engine,
    delete,
    event,
    insert,
    select,
    text,
    type_coerce,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, configure, exceptions, is_configured, reset
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret
from sqlalchemy_kravn_crypto.changes import Operator
from sqlalchemy_kravn_crypto.configuration import key_store
from sqlalchemy_kravn_crypto.configuration import operator as operator_of
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.keyring import DataKey
from sqlalchemy_kravn_crypto.lifecycle import Targets, destroy, disable, promote, rotate
from sqlalchemy_kravn_crypto.providers.azure import AzureProvider
from sqlalchemy_kravn_crypto.providers.base import Deadline, KeyProvider, WrappedKey
from sqlalchemy_kravn_crypto.providers.vault import VaultProvider
from sqlalchemy_kravn_crypto.rows import MacKey, connect, read_rows
from sqlalchemy_kravn_crypto.schema import TABLES
from sqlalchemy_kravn_crypto.settings import Settings
from tests.azure_server import AzureVault
from tests.openbao import OpenBao

SECRET: Final = "a secret of a deployment whose database is not its own"
ROOT: Final = bytes(range(32))
WITH_MAC: Final = ("secret", "file", "wrapped")
WAYS: Final = (*WITH_MAC, "pins")
KEYS: Final = TABLES.keys
EVENTS: Final = TABLES.events
LEASE: Final = 0.4
FAST: Final = {"look_interval": 0.05, "lease": LEASE}

Row = dict[str, Any]
Tables = dict[Table, list[Row]]


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "attacked_note"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


class _Watched(KeyProvider):
    """Notes under which bindings it is asked to unwrap."""

    asked: list[bytes]

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        self.asked.append(binding)
        return super().unwrap(wrapped, binding, deadline)  # type: ignore[safe-super]  # of the provider's class


class _Vault(_Watched, VaultProvider):
    pass


class _Azure(_Watched, AzureProvider):
    pass


class Attacked:
    """One deployment, on SQLite or wherever else.

    :ivar pins: the key ids that the operator has pinned.
    :ivar earlier: the key tables from before some changes of them.
    """

    def __init__(self, url: str, way: str, provider: _Watched, directory: Path) -> None:
        self.url = url
        self.way = way
        self.provider = provider
        self.directory = directory
        self.pins: frozenset[str] = frozenset()
        self.earlier: dict[str, Tables] = {}
        # Without a pool, so that the file of SQLite can be copied.
        self.engine: Engine = create_engine(url, poolclass=NullPool)
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", lambda driver, _: driver.execute("PRAGMA synchronous = OFF"))
        if way == "file":
            path = directory / "secret.key"
            path.write_text(ROOT.hex())
            path.chmod(0o600)

    # --- As its processes and operators are ---

    def settings(self, **others: Any) -> Settings:
        given: dict[str, Any] = {"data_dir": self.directory, "destroy_after_days": 0.0}
        if self.way == "secret":
            given["secret"] = SECRET
        if self.way == "pins":
            given["kms_pinned_keys"] = ",".join(self.pins)
        return Settings(**{**given, **others})

    def operator(self, **others: Any) -> Operator:
        return operator_of(self.engine, self.settings(**others), provider=self.provider)

    def start(self, **others: Any) -> None:
        """Start as a process of the program does."""
        reset()
        configure(self.engine, self.settings(**others), provider=self.provider)

    @contextmanager
    def running(self, **others: Any) -> Iterator[Engine]:
        """Be a process of the program for as long as the block lasts."""
        self.start(**others)
        try:
            yield self.engine
        finally:
            reset()

    def refuses(self, **others: Any) -> Exception:
        """See that no process starts, and that the KMS is not asked for a data key; return the error."""
        asked = self.provider.asked
        asked.clear()
        with pytest.raises((exceptions.KeyStoreError, exceptions.UnwrapRefusedError)) as caught:
            self.start(**others)
        assert not is_configured()
        # The MAC key, where it is wrapped, is what tells whether anything else is genuine.
        assert [bound for bound in asked if b"row-mac" not in bound] == []
        return caught.value

    def put(self, number: int) -> None:
        with Session(self.engine) as session:
            session.add(Note(id=number, content={"number": number}))
            session.commit()

    def number(self, row: int) -> int:
        with Session(self.engine) as session:
            content: dict[str, int] = session.execute(select(Note.content).where(Note.id == row)).scalar_one()
        return content["number"]

    def key_of(self, row: int) -> str:
        """Return the data key that a value is under."""
        with self.engine.connect() as connection:
            stored = select(type_coerce(Note.content, LargeBinary())).where(Note.id == row)
            return bytes(connection.execute(stored).scalar_one())[2:10].hex()

    def mac_key(self) -> MacKey:
        """Return what somebody has who has the secret of the deployment as well."""
        secret = (
            BootstrapSecret.from_secret(SECRET) if self.way == "secret" else BootstrapSecret._from_root("file", ROOT)
        )
        return MacKey(secret.mac_key)

    # --- As somebody is who owns the database ---

    def dump(self, *tables: Table) -> Tables:
        with self.engine.connect() as connection:
            return {
                table: [dict(row) for row in connection.execute(select(table).order_by(*table.primary_key)).mappings()]
                for table in tables or (KEYS, EVENTS)
            }

    def restore(self, dumped: Tables) -> None:
        with self.engine.begin() as connection:
            for table, rows in dumped.items():
                connection.execute(delete(table))
                if rows:
                    connection.execute(insert(table), rows)

    def rows(self) -> list[Row]:
        """Return the rows of ``kms_keys``."""
        return self.dump(KEYS)[KEYS]

    def write(self, rows: list[Row]) -> None:
        """Put rows in the place of those of ``kms_keys``."""
        self.restore({KEYS: rows})

    def row(self, state: str) -> Row:
        """Return the row of the KMS's data key that is in a state."""
        [found] = [row for row in self.rows() if row["state"] == state and row["provider"] != "none"]
        return found

    def drop_constraints(self) -> None:
        """Make ``kms_keys`` a table that keeps whatever is put into it."""
        rows = self.rows()
        bare = Table(KEYS.name, MetaData(), *(Column(column.name, column.type) for column in KEYS.columns))
        KEYS.drop(self.engine)
        bare.create(self.engine)
        self.write(rows)

    def execute(self, statement: str, **parameters: Any) -> int:
        with self.engine.begin() as connection:
            return connection.execute(text(statement), parameters).rowcount

    # --- How it came to be ---

    def build(self) -> None:
        """Have a key in every state, and two values: 1 under the retired one, and 2 under the primary."""
        TABLES.keys.metadata.create_all(self.engine)
        Base.metadata.create_all(self.engine)
        rows, _ = key_store(self.settings(), self.provider).provision(self.engine, pin_later=True)
        self._pin(*(row.required("key_id") for row in rows.keys))
        first = self._primary()
        second = self._rotated()
        self._disabled(first)
        self.earlier["destroy"] = self.dump()
        destroy(self.operator(), first, reason="its time is over", backups_expired=True, after_days=0)
        self._pin(first, unpin=True)
        third = self._rotated()
        self.earlier["disable"] = self.dump()
        self._disabled(second)
        self._pin(second, unpin=True)
        with self.running():
            self.put(1)
        self.earlier["rotate"] = self.dump()
        fourth = self._rotated()
        with self.running():
            self.put(2)
        assert (self.key_of(1), self.key_of(2)) == (third, fourth)
        made = rotate(self.operator())
        assert made is not None
        self._pin(made.required("key_id"))

    def _pin(self, *key_ids: str, unpin: bool = False) -> None:
        if self.way == "pins":
            self.pins = self.pins - set(key_ids) if unpin else self.pins | set(key_ids)

    def _primary(self) -> str:
        with connect(self.engine) as connection:
            return next(row.required("key_id") for row in read_rows(connection).keys if row.primary_of)

    def _rotated(self) -> str:
        made = rotate(self.operator())
        assert made is not None
        self._pin(made.required("key_id"))
        promote(self.operator())
        return self._primary()

    def _disabled(self, key_id: str) -> None:
        disable(self.operator(), key_id, targets=Targets(Base.metadata), sleep=lambda _: None)


class Master:
    """The two KMS, each with one master key for all deployments of a way."""

    def __init__(self, openbao: OpenBao, azure: AzureVault) -> None:
        self.openbao = openbao
        self.azure = azure
        self.key = f"attacked-{secrets.token_hex(4)}"
        openbao.create_key(self.key)
        self._token = openbao.issue_token(self.key)
        self._versions = 1

    def provider(self, way: str) -> _Watched:
        provider: _Watched
        if way in {"secret", "pins"}:
            provider = _Azure(**self.azure.settings())
        else:
            provider = _Vault(**self.openbao.settings(key=self.key, token=self._token))
        provider.asked = []
        return provider

    def rotate(self, way: str) -> None:
        """Make a new version of the master key."""
        if way in {"secret", "pins"}:
            self.azure.rotate()
        else:
            self.openbao.rotate(self.key)
            self._versions += 1

    @contextmanager
    def opens_newest_only(self, way: str) -> Iterator[None]:
        """Let the KMS open nothing that was wrapped under an earlier version of the master key."""
        earlier = list(self.azure.keys[self.azure.key].values())[:-1] if way == "secret" else []
        newest = 1 if way == "secret" else self._versions
        for version in earlier:
            version.refusal = "KeyDisabled"
        self.openbao.set_min_decryption_version(newest, self.key)
        try:
            yield
        finally:
            for version in earlier:
                version.refusal = ""
            self.openbao.set_min_decryption_version(1, self.key)

    def wrapped_by_anybody(self, data_key: bytes, master_key: str) -> str:
        """Wrap with nothing but the public key of a version of Azure's master key, as a row has it."""
        version = self.azure.keys[self.azure.key][master_key.rpartition("/")[2]]
        scheme = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        return b64encode(version.private.public_key().encrypt(data_key, scheme)).decode()


class Templates:
    """Deployments that are built once for each way, and copied for each test."""

    def __init__(self, master: Master, directory: Path) -> None:
        self.master = master
        self._directory = directory
        self._built: dict[str, Attacked] = {}

    def another(self, way: str, directory: Path) -> Attacked:
        """Build a deployment of its own in a new directory, with the same master key and the same secret."""
        directory.mkdir()
        made = Attacked(f"sqlite:///{directory / 'a.db'}", way, self.master.provider(way), directory)
        made.build()
        return made

    def copy(self, way: str, directory: Path) -> Attacked:
        if way not in self._built:
            self._built[way] = self.another(way, self._directory / way)
        template = self._built[way]
        shutil.copy(self._directory / way / "a.db", directory / "a.db")
        copied = Attacked(f"sqlite:///{directory / 'a.db'}", way, self.master.provider(way), directory)
        copied.pins, copied.earlier = template.pins, template.earlier
        return copied


def planted(row: Row, master: Master, key: bytes = b"known to the attacker, 32 bytes!") -> Row:
    """Return a row whose data key the attacker knows, and which is right in all that takes no MAC key."""
    data_key = DataKey(key)
    return row | {
        "key_id": data_key.key_id.hex(),
        "wrapped_key": master.wrapped_by_anybody(key, row["master_key"]),
        "key_check": b64encode(data_key.check).decode(),
    }


def held() -> frozenset[str]:
    """Return the data keys that this process holds."""
    return current_keyring().key_ids
