"""What becomes of stored values when a column or its table is renamed."""

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    create_engine,
    insert,
    literal_column,
    select,
    text,
    type_coerce,
    update,
)

from sqlalchemy_kravn_crypto import (
    DataKey,
    Encrypted,
    EncryptedBytes,
    EncryptedJSON,
    EncryptedString,
    Keyring,
    aead,
    use_keyring,
)
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, from_text
from sqlalchemy_kravn_crypto.exceptions import AuthenticationError, ColumnError, WrongColumnError
from sqlalchemy_kravn_crypto.types import EncryptedType
from tests import reference
from tests.leaks import leaked

MARKER = "S3CR3T" + "-marker"
KEY = bytes(range(32))
STORAGES = ["binary", "text"]


@pytest.fixture(autouse=True)
def _keyring() -> Iterator[None]:
    with use_keyring(Keyring(DataKey(KEY))):
        yield


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url)
    yield made
    made.dispose()


def declared(type_: Any, table: str = "accounts", column: str = "secret") -> Table:
    return Table(table, MetaData(), Column("id", Integer, primary_key=True), Column(column, type_))


def hint_of(engine: Engine, row: int, storage: str) -> bytes:
    with engine.connect() as connection:
        raw = connection.execute(text("SELECT secret FROM accounts WHERE id = :id"), {"id": row}).scalar_one()
    return (from_text(raw) if storage == "text" else bytes(raw))[10:12]


def renamed(engine: Engine, storage: str) -> None:
    """Have one row that was written before its table and its column were renamed."""
    before = declared(EncryptedJSON(storage=storage), "users", "credentials")
    with engine.begin() as connection:
        before.create(connection)
        connection.execute(insert(before), {"id": 1, "credentials": {"token": MARKER}})
        connection.execute(text("ALTER TABLE users RENAME TO accounts"))
        connection.execute(text("ALTER TABLE accounts RENAME COLUMN credentials TO secret"))


@pytest.mark.parametrize("storage", STORAGES)
def test_renamed_column_says_what_to_do(engine: Engine, storage: str) -> None:
    renamed(engine, storage)
    table = declared(EncryptedJSON(storage=storage))
    with engine.connect() as connection, pytest.raises(WrongColumnError) as caught:
        connection.scalars(select(table.c.secret)).all()
    assert "'accounts.secret' was written for a column of another name" in str(caught.value)
    assert "earlier_names=('table.column',)" in str(caught.value)
    assert "associated_data='table.column'" in str(caught.value)
    assert leaked(caught.value, MARKER) == []


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"associated_data": "users.credentials"}, "users.credentials"),
        ({"earlier_names": ("users.credentials",)}, "accounts.secret"),
        ({"earlier_names": ["never.used", "users.credentials"]}, "accounts.secret"),
        ({"associated_data": "new.name", "earlier_names": dict.fromkeys(["users.credentials"])}, "new.name"),
        ({"earlier_names": ("users.credentials", "users.credentials", "accounts.secret")}, "accounts.secret"),
    ],
    ids=["pinned", "earlier", "second earlier", "pinned and earlier", "twice"],
)
def test_renamed_column_reads_what_was_written_before(
    engine: Engine, options: dict[str, Any], written: str, storage: str
) -> None:
    renamed(engine, storage)
    table = declared(EncryptedJSON(storage=storage, **options))
    with engine.begin() as connection:
        connection.execute(insert(table), {"id": 2, "secret": ["new"]})
        assert connection.scalars(select(table.c.secret).order_by(table.c.id)).all() == [{"token": MARKER}, ["new"]]
    assert hint_of(engine, 1, storage) == reference.hint("users.credentials")
    assert hint_of(engine, 2, storage) == reference.hint(written)
    with engine.begin() as connection:
        connection.execute(update(table).values(secret={"token": "again"}))
        assert connection.scalars(select(table.c.secret)).all() == [{"token": "again"}] * 2
    assert hint_of(engine, 1, storage) == reference.hint(written)


def test_names_that_are_not_given_stay_refused(engine: Engine) -> None:
    table = declared(EncryptedJSON(earlier_names=("other.name",)))
    renamed(engine, "binary")
    with engine.connect() as connection, pytest.raises(WrongColumnError):
        connection.scalars(select(table.c.secret)).all()


def frame(name: str, value: bytes = b'\x01"x"') -> bytes:
    return reference.frame(KEY, name, os.urandom(24), value)


def test_one_decryption_for_a_value_of_any_name(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("first.name", "second.name", "third.name")
    table = declared(EncryptedJSON(earlier_names=names))
    decrypted: list[bytes] = []

    class Counting:
        def __init__(self, key: bytes) -> None:
            self._aead = AESGCM(key)

        def decrypt(self, nonce: bytes, body: bytes, associated_data: bytes) -> bytes:
            decrypted.append(associated_data)
            return self._aead.decrypt(nonce, body, associated_data)

    monkeypatch.setattr(aead, "AESGCM", Counting)
    raw = type_coerce(table.c.secret, LargeBinary())
    with engine.begin() as connection:
        table.create(connection)
        for row, name in enumerate((*names, "accounts.secret"), 1):
            connection.execute(insert(table), {"id": row})
            connection.execute(
                update(table).where(table.c.id == row).values({table.c.secret: type_coerce(frame(name), raw.type)})
            )
            assert connection.scalars(select(table.c.secret).where(table.c.id == row)).all() == ["x"]
            assert [data[12:] for data in decrypted] == [reference.lp(name.encode())]
            decrypted.clear()
        moved = frame("first.name")
        forged = moved[:10] + reference.hint("second.name") + moved[12:]
        connection.execute(update(table).values({table.c.secret: type_coerce(forged, raw.type)}))
        with pytest.raises(AuthenticationError):
            connection.scalars(select(table.c.secret).where(table.c.id == 1)).all()
        assert len(decrypted) == 1


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", [EncryptedJSON, EncryptedString, EncryptedBytes])
def test_one_name_without_a_tuple_is_refused(type_: Callable[..., Any]) -> None:
    with pytest.raises(ColumnError, match=r"takes several names: \('table\.column',\)"):
        type_(earlier_names="users.credentials")
    with pytest.raises(ColumnError, match="takes several names"):
        Encrypted(Integer, earlier_names="users.credentials")


def colliding(name: str) -> str:
    """Find a name that shares the hint of another, as one in 65,536 does."""
    hint = ColumnName(name).hint
    return next(other for other in (f"t{number}.c" for number in range(10_000_000)) if ColumnName(other).hint == hint)


def test_names_with_one_hint_are_refused() -> None:
    other = colliding("accounts.secret")
    assert reference.hint(other) == reference.hint("accounts.secret")
    refused: list[dict[str, Any]] = [
        {"earlier_names": (other,)},
        {"earlier_names": ("fine.name", other)},
        {"earlier_names": ("accounts.secret", other)},
        {"earlier_names": ("accounts.secret",), "associated_data": other},
        {"earlier_names": (other, "accounts.secret"), "associated_data": "fine.name"},
    ]
    for options in refused:
        with pytest.raises(ColumnError) as caught:
            declared(EncryptedJSON(**options))
        assert repr(other) in str(caught.value)
        assert "'accounts.secret'" in str(caught.value)
        assert "share the 2 bytes by which stored values tell names apart" in str(caught.value)
        assert "Pin another name with associated_data, or drop an earlier one" in str(caught.value)
    declared(EncryptedJSON(earlier_names=(other,), associated_data="fine.name"))


# --- The type --------------------------------------------------------------------------------------------------------

NAMES = ("first.name", "second.name")


def test_repr_has_the_names() -> None:
    shown = repr(EncryptedJSON(earlier_names=list(NAMES)))
    assert shown == "EncryptedJSON(earlier_names=('first.name', 'second.name'))"
    assert eval(shown, {"EncryptedJSON": EncryptedJSON}).earlier_names == NAMES  # noqa: S307 - what a migration does with it
    assert repr(EncryptedJSON()) == "EncryptedJSON()"


def unshared(type_: EncryptedType[Any]) -> Any:
    table = Table("t", MetaData(), Column("a", type_), Column("b", type_))
    assert table.c.b.type is not type_
    return table.c.b.type


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda type_: type_.copy(), lambda type_: pickle.loads(pickle.dumps(type_)), unshared],  # noqa: S301 - just written
)
@pytest.mark.parametrize("type_", [EncryptedJSON, EncryptedString, lambda **options: Encrypted(Integer, **options)])
def test_copies_read_the_earlier_names(copied: Callable[[Any], Any], type_: Callable[..., Any]) -> None:
    made = copied(type_(associated_data="present.name", earlier_names=NAMES))
    assert made.earlier_names == NAMES
    assert made.column_name == "present.name"
    payload = made._codec.encode(5 if isinstance(made, Encrypted) else "five")
    process: Any = made.process_result_value
    for name in (*NAMES, "present.name"):
        assert process(frame(name, payload), None) in {5, "five"}
    with pytest.raises(WrongColumnError):
        process(frame("other.name", payload), None)


def test_statements_that_differ_in_the_earlier_names_only_share_no_processor(engine: Engine) -> None:
    table = declared(LargeBinary())
    reading, refusing = (EncryptedJSON(associated_data="present.name", earlier_names=names) for names in (NAMES, ()))

    def statement(type_: Any) -> Any:
        return select(type_coerce(literal_column("secret"), type_)).select_from(table)

    assert statement(reading)._generate_cache_key() != statement(refusing)._generate_cache_key()
    assert statement(reading)._generate_cache_key() == statement(copy.copy(reading))._generate_cache_key()
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(insert(table), {"id": 1, "secret": frame("first.name")})
        for _ in range(2):
            assert connection.scalars(statement(reading)).all() == ["x"]
            with pytest.raises(WrongColumnError):
                connection.scalars(statement(refusing)).all()
