"""The list of encrypted columns that this process has declared, and what lies in one."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, insert, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, Keyring, use_keyring
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, to_text
from sqlalchemy_kravn_crypto.columns import BINARY, STORAGES, TEXT, EncryptedColumn, frame_of
from sqlalchemy_kravn_crypto.exceptions import MalformedCiphertextError
from sqlalchemy_kravn_crypto.types import encrypted_columns
from tests.leaks import leaked

MARKER = "S3CR3T" + "-marker"
KEYRING = Keyring(DataKey.generate())
FRAME = KEYRING.encrypt(b"\x01null", ColumnName("columns_test.value"))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url)
    yield made
    made.dispose()


def table_with(storage: str, **options: Any) -> Table:
    columns: list[Column[Any]] = [
        Column("id", Integer, primary_key=True),
        Column("plain", Integer),
        Column("value", EncryptedJSON(storage=storage)),
    ]
    return Table("columns_test", MetaData(), *columns, **options)


def encrypted(table: Table) -> EncryptedColumn:
    (found,) = [one for one in encrypted_columns() if one.column.table is table]
    return found


# --- Which columns there are -----------------------------------------------------------------------------------------


def test_declared_columns_are_listed_with_their_storage() -> None:
    class Base(DeclarativeBase):
        pass

    class Declared(Base):
        __tablename__ = "columns_test_declared"
        id: Mapped[int] = mapped_column(primary_key=True)
        plain: Mapped[str]
        first: Mapped[Any] = mapped_column(EncryptedJSON)
        second: Mapped[Any] = mapped_column("in_database", EncryptedJSON(storage="text"))

    assert Declared.metadata is Base.metadata
    found = [one for one in encrypted_columns() if one.column.table.metadata is Base.metadata]
    assert [(one.label, one.storage) for one in found] == [
        ("columns_test_declared.first", BINARY),
        ("columns_test_declared.in_database", TEXT),
    ]


def test_label_has_the_schema() -> None:
    assert encrypted(table := table_with(BINARY, schema="tenant")).label == "tenant.columns_test.value"
    assert table.schema == "tenant"


def test_order_is_that_of_the_labels() -> None:
    tables = [Table(name, MetaData(), Column("x", EncryptedJSON())) for name in ("columns_c", "columns_a", "columns_b")]
    found = [one.label for one in encrypted_columns() if one.column.table in tables]
    assert found == ["columns_a.x", "columns_b.x", "columns_c.x"]


def test_column_is_listed_once_however_it_is_used() -> None:
    table = table_with(BINARY)
    before = {id(one.column) for one in encrypted_columns()}
    used = (table.alias(), table.select().subquery(), table.select().cte())
    assert [source.c.value.name for source in used] == ["value"] * 3
    assert {id(one.column) for one in encrypted_columns()} <= before
    assert encrypted(table).column is table.c.value


def test_copy_of_a_table_is_listed_beside_it() -> None:
    table = table_with(BINARY)
    copied = table.to_metadata(MetaData(), name="columns_test_copy")
    assert encrypted(table).label == "columns_test.value"
    assert encrypted(copied).label == "columns_test_copy.value"


def test_column_goes_when_its_table_does() -> None:
    def labels() -> list[str]:
        return [one.label for one in encrypted_columns()]

    table = Table("columns_test_gone", MetaData(), Column("x", EncryptedJSON()))
    assert f"{table.name}.x" in labels()
    del table
    gc.collect()
    assert "columns_test_gone.x" not in labels()


def test_column_without_a_table_is_not_listed() -> None:
    column: Column[Any] = Column("columns_test_alone", EncryptedJSON())
    assert [one for one in encrypted_columns() if one.column.name == column.name] == []


# --- What the database returned --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [FRAME, bytearray(FRAME), memoryview(FRAME)], ids=lambda value: type(value).__name__)
def test_frame_of_binary_storage_is_what_any_driver_returns(stored: Any) -> None:
    frame = frame_of(stored, BINARY, "t.c")
    assert frame == FRAME
    assert type(frame) is bytes


def test_frame_of_text_storage_is_decoded() -> None:
    assert frame_of(to_text(FRAME), TEXT, "t.c") == FRAME


@pytest.mark.parametrize(
    ("stored", "storage"),
    [
        (MARKER, BINARY),
        (to_text(FRAME), BINARY),
        (5, BINARY),
        (2.5, BINARY),
        ({MARKER: 1}, BINARY),
        (MARKER, TEXT),
        (MARKER.encode(), TEXT),
        (FRAME, TEXT),
        (to_text(FRAME).encode(), TEXT),
        (5, TEXT),
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_of_another_type_than_the_storage_is_no_frame(stored: Any, storage: str) -> None:
    with pytest.raises(MalformedCiphertextError) as caught:
        frame_of(stored, storage, "t.c")
    assert leaked(caught.value, MARKER, FRAME[12:]) == []
    assert caught.value.__context__ is None


# --- One frame of a column -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_first_frame_is_one_that_is_stored(engine: Engine, storage: str) -> None:
    table = table_with(storage)
    with engine.begin() as connection, use_keyring(KEYRING):
        table.create(connection)
        assert encrypted(table).first_frame(connection) is None
        connection.execute(insert(table), [{"id": 1, "plain": 1}])
        assert encrypted(table).first_frame(connection) is None
        connection.execute(insert(table), [{"id": 2, "value": {"a": MARKER}}])
        frame = encrypted(table).first_frame(connection)
    assert frame is not None
    assert KEYRING.decrypt(frame, ColumnName("columns_test.value")) == b'\x01{"a":"' + MARKER.encode() + b'"}'


@pytest.mark.parametrize("storage", STORAGES)
def test_first_frame_of_a_table_or_column_that_is_not_there_is_none(engine: Engine, storage: str) -> None:
    table = table_with(storage)
    with engine.begin() as connection:
        assert encrypted(table).first_frame(connection) is None
        connection.execute(text("CREATE TABLE columns_test (id INTEGER PRIMARY KEY)"))
        assert encrypted(table).first_frame(connection) is None


def test_first_frame_refuses_plaintext_in_text_storage(engine: Engine) -> None:
    table = table_with(TEXT)
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(text("INSERT INTO columns_test (id, value) VALUES (1, :value)"), {"value": MARKER})
        with pytest.raises(MalformedCiphertextError) as caught:
            encrypted(table).first_frame(connection)
    assert leaked(caught.value, MARKER) == []


def test_first_frame_of_binary_storage_is_taken_apart_by_others(engine: Engine) -> None:
    table = table_with(BINARY)
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(text("INSERT INTO columns_test (id, value) VALUES (1, :value)"), {"value": MARKER.encode()})
        assert encrypted(table).first_frame(connection) == MARKER.encode()


@pytest.mark.parametrize(
    ("storage", "stored"),
    [(BINARY, MARKER), (BINARY, 5), (TEXT, MARKER.encode()), (TEXT, FRAME)],
    ids=["text as binary", "number as binary", "bytes as text", "frame as text"],
)
def test_first_frame_refuses_a_value_of_another_type(sqlite_url: str, storage: str, stored: Any) -> None:
    """SQLite stores whatever it is given."""
    engine = create_engine(sqlite_url)
    table = table_with(storage)
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(text("INSERT INTO columns_test (id, value) VALUES (1, :value)"), {"value": stored})
        with pytest.raises(MalformedCiphertextError) as caught:
            encrypted(table).first_frame(connection)
    engine.dispose()
    assert leaked(caught.value, MARKER) == []
