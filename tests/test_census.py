"""Counting values by key id on each database, in both storages."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Engine, LargeBinary, MetaData, Table, create_engine, insert, make_url, text

from sqlalchemy_kravn_crypto.census import Census, ColumnCensus, _starts_of_others, census
from sqlalchemy_kravn_crypto.known_columns import located
from sqlalchemy_kravn_crypto.schema import TABLES
from tests.rekeying import NEW, OLD, engine_of, fill, known_column, statements_of, stored, table_of

PLAIN: dict[str, list[Any]] = {
    "binary": [b"\xf9", b"\xf9\x02short", b"plain", b""],
    "text": ["enc:v3", "enc:v3:-QI", "plain", ""],
}


@pytest.fixture
def engine(any_database_url: str) -> Iterator[Engine]:
    made = engine_of(any_database_url)
    yield made
    made.dispose()


def as_stored(value: str, storage: str) -> Any:
    return value if storage == "text" else value.encode()


def enter_key(engine: Engine, key_id: str, state: str = "retired") -> None:
    with engine.begin() as connection:
        row = {"id": int(key_id[:6], 16) + 2, "key_id": key_id, "keyring": "default", "state": state}
        connection.execute(insert(TABLES.keys).values(row))


def count(engine: Engine, *columns: Any) -> Census:
    with engine.connect() as connection:
        return census(connection, columns)


@pytest.mark.parametrize("on_record", [True, False], ids=["on record", "not on record"])
@pytest.mark.parametrize("storage", ["binary", "text"])
def test_counts_by_key_id(engine: Engine, storage: str, on_record: bool) -> None:  # noqa: FBT001 - of the test
    if on_record:
        enter_key(engine, OLD.primary_key_id)
        enter_key(engine, NEW.primary_key_id, state="pending")
    table = table_of(engine, storage)
    values = [stored(OLD, b"x", storage)] * 3 + [stored(NEW, b"y" * 5000, storage)] * 2 + [None] * 4
    fill(engine, table, values)
    column = known_column(storage)
    found = count(engine, column)
    assert found.columns == (ColumnCensus(column, {OLD.primary_key_id: 3, NEW.primary_key_id: 2}, nulls=4),)
    assert found.unreachable == ()
    assert found.of_key(OLD.primary_key_id) == 3
    assert found.of_key("00" * 8) == 0
    assert found.stale(NEW.primary_key_id) == 3
    assert found.stale("00" * 8) == 5


@pytest.mark.parametrize("storage", ["binary", "text"])
def test_legacy_formats_have_rows_of_their_own_and_are_stale(engine: Engine, storage: str) -> None:
    table = table_of(engine, storage)
    legacy = ["enc:v1:gAAAA", "enc:v1:other", "enc:v2:x", "enc:v3:not base64url, nor long"]
    values = [as_stored(value, storage) for value in legacy] + PLAIN[storage] + [stored(NEW, b"x", storage)]
    fill(engine, table, values)
    found = count(engine, known_column(storage)).columns[0]
    short = 1 if storage == "text" else 0  # "enc:v3:-QI" has the prefix, and no more of a frame
    assert found.legacy == {"enc:v1:": 2, "enc:v2:": 1, "enc:v3:": 1 + short}
    assert found.unrecognised == 4 - short
    assert found.keys == {NEW.primary_key_id: 1}
    assert found.stale(NEW.primary_key_id) == 8


@pytest.mark.parametrize("storage", ["binary", "text"])
def test_what_only_looks_like_a_frame_is_not_under_a_key(engine: Engine, storage: str) -> None:
    table = table_of(engine, storage)
    other_algorithm = b"\xf9\x03" + bytes(60)
    looks_alike = "enc:v3:-QIAAAAAAAA!!!!!!!!!!!!!" if storage == "text" else other_algorithm
    fill(engine, table, [looks_alike])
    found = count(engine, known_column(storage)).columns[0]
    assert (found.keys, found.legacy, found.unrecognised) == ({}, {}, 1)


@pytest.mark.parametrize("storage", ["binary", "text"])
def test_the_database_brings_plaintext_together(engine: Engine, storage: str) -> None:
    table = table_of(engine, storage)
    fill(engine, table, [as_stored(f"{number} plaintext", storage) for number in range(500)])
    with engine.connect() as connection:
        rows = connection.execute(_starts_of_others(located(connection, known_column(storage)), [])).all()
    assert len(rows) == 1
    assert rows[0][1] == 500


def test_one_pass_is_enough_where_all_keys_are_on_record(engine: Engine) -> None:
    enter_key(engine, OLD.primary_key_id)
    table = table_of(engine)
    fill(engine, table, [stored(OLD, b"x"), None])
    seen = statements_of(engine)
    count(engine, known_column())
    assert len([statement for statement in seen if "FROM a" in statement]) == 1


def test_an_empty_value_is_counted_beside_those_of_known_keys(engine: Engine) -> None:
    enter_key(engine, OLD.primary_key_id)
    fill(engine, table_of(engine), [stored(OLD, b"x"), b"", b"short"])
    found = count(engine, known_column()).columns[0]
    assert (found.keys, found.unrecognised) == ({OLD.primary_key_id: 1}, 2)


def test_values_under_a_destroyed_key_are_counted(engine: Engine) -> None:
    enter_key(engine, OLD.primary_key_id, state="destroyed")
    fill(engine, table_of(engine), [stored(OLD, b"x")])
    assert count(engine, known_column()).of_key(OLD.primary_key_id) == 1


def test_an_empty_table_and_one_without_a_primary_key_are_counted(engine: Engine) -> None:
    table_of(engine)
    bare = Table("bare", MetaData(), Column("secret", LargeBinary))
    bare.create(engine)
    with engine.begin() as connection:
        connection.execute(bare.insert(), [{"secret": stored(OLD, b"x")}])
    found = count(engine, known_column(), known_column(table="bare"))
    assert [one.keys for one in found.columns] == [{}, {OLD.primary_key_id: 1}]


def test_what_cannot_be_reached_is_listed_and_the_others_are_counted(engine: Engine) -> None:
    fill(engine, table_of(engine), [stored(OLD, b"x")])
    gone = known_column(table="gone")
    found = count(engine, gone, known_column())
    assert [one.column for one in found.unreachable] == [gone]
    assert "forget-column" in found.unreachable[0].reason
    assert found.of_key(OLD.primary_key_id) == 1


def test_what_may_not_be_read_is_listed_with_the_reason(postgres_url: str) -> None:
    engine = engine_of(postgres_url)
    fill(engine, table_of(engine), [stored(OLD, b"x")])
    fill(engine, table_of(engine, name="b"), [stored(OLD, b"x", name="b.secret")])
    with engine.begin() as connection:
        connection.execute(text("DROP ROLE IF EXISTS counter"))
        connection.execute(text("CREATE ROLE counter LOGIN PASSWORD 'counter'"))
        connection.execute(text("GRANT SELECT ON kms_keys, b TO counter"))
    limited = create_engine(make_url(postgres_url).set(username="counter", password="counter"))
    found = count(limited, known_column(), known_column(table="b"))
    assert [one.reason for one in found.unreachable] == ["a.secret cannot be read: permission denied for table a"]
    assert found.of_key(OLD.primary_key_id) == 1
    limited.dispose()
    with engine.begin() as connection:
        connection.execute(text("DROP OWNED BY counter"))
        connection.execute(text("DROP ROLE counter"))
    engine.dispose()


def test_counts_in_schemas_and_whatever_the_engine_translates(postgres_url: str) -> None:
    engine = engine_of(postgres_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
    fill(engine, table_of(engine), [stored(OLD, b"x")] * 2)
    fill(engine, table_of(engine, schema="tenant"), [stored(OLD, b"x")])
    moved = engine.execution_options(schema_translate_map={None: "tenant", "tenant": None})
    found = count(moved, known_column(), known_column(schema="tenant"))
    assert [one.keys for one in found.columns] == [{OLD.primary_key_id: 2}, {OLD.primary_key_id: 1}]
    engine.dispose()


def test_sqlite_may_hold_text_in_a_column_of_bytes(sqlite_url: str) -> None:
    engine = engine_of(sqlite_url)
    table_of(engine)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO a VALUES (1, 'enc:v1:token'), (2, '{\"a\": 1}'), (3, 42)"))
    found = count(engine, known_column()).columns[0]
    assert (found.legacy, found.unrecognised) == ({"enc:v1:": 1}, 2)
    engine.dispose()


def test_is_json(engine: Engine) -> None:
    fill(engine, table_of(engine), [stored(OLD, b"x"), b"enc:v1:", b"plain", None])
    found = count(engine, known_column(), known_column(table="gone"))
    as_json = json.loads(json.dumps(found.as_dict()))
    assert as_json["columns"] == [
        {
            "column": "a.secret",
            "keys": {OLD.primary_key_id: 1},
            "nulls": 1,
            "legacy": {"enc:v1:": 1},
            "unrecognised": 1,
        }
    ]
    assert [one["column"] for one in as_json["unreachable"]] == ["gone.secret"]
