"""What psycopg returns of stale values: the exact keys and bytes, in whichever format it asks for them."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import BigInteger, Connection, Enum, MetaData, Uuid, create_engine, event, insert
from sqlalchemy.dialects.postgresql import DOMAIN
from sqlalchemy.schema import Column, Table
from sqlalchemy.types import Integer, LargeBinary, String, Text

from sqlalchemy_kravn_crypto.columns import BINARY, TEXT
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, located
from sqlalchemy_kravn_crypto.stale_values import StaleValues

KEY_ID = "00" * 8
FRAMES = [b"\xf9\x02first\x00\\x27", b"\xf9\x02second\xff"]


@pytest.fixture
def connection(postgres_url: str) -> Iterator[Connection]:
    engine = create_engine(postgres_url)
    with engine.connect() as opened:
        yield opened
    engine.dispose()


def stored(connection: Connection, keys: list[tuple[Any, ...]], *types: Any, storage: str = BINARY) -> StaleValues:
    columns = [Column(f"key{place}", type_, primary_key=True) for place, type_ in enumerate(types)]
    values: list[Any] = FRAMES if storage == BINARY else ["enc:v3:first", "enc:v3:second"]
    metadata = MetaData()
    table = Table("secret", metadata, *columns, Column("content", LargeBinary if storage == BINARY else Text))
    metadata.create_all(connection)
    rows = [
        {f"key{place}": part for place, part in enumerate(key)} | {"content": value}
        for key, value in zip(keys, values, strict=True)
    ]
    connection.execute(insert(table), rows)
    found = located(connection, KnownColumn("", "secret", "content", storage, "secret.content"))
    return StaleValues(found, KEY_ID, connection.dialect.name)


@pytest.mark.parametrize(
    ("types", "keys"),
    [
        ((Integer,), [(-1,), (2**31 - 1,)]),
        ((BigInteger, Integer), [(1, 2), (2**62, -5)]),
        ((Uuid,), [(uuid.UUID(int=1),), (uuid.UUID(int=2**127),)]),
        ((String(20),), [("a",), ("z\\x41",)]),
        ((Integer, String(20)), [(1, "b"), (1, "c")]),
        ((Enum("RED", "GREEN", name="colour"),), [("RED",), ("GREEN",)]),
        ((DOMAIN("positive", Integer),), [(1,), (2,)]),
    ],
    ids=["integer", "two integers", "uuid", "string", "integer and string", "enum", "domain"],
)
def test_keys_and_values_are_read_as_they_are(
    connection: Connection, types: tuple[Any, ...], keys: list[tuple[Any, ...]]
) -> None:
    values = stored(connection, keys, *types)
    first = values.read(connection, None, 1)
    read = [*first, *values.read(connection, tuple(first[0][:-1]), 10)]
    assert [tuple(row) for row in read] == [(*key, frame) for key, frame in zip(keys, FRAMES, strict=True)]
    assert [[type(part) for part in row] for row in read] == [[*map(type, keys[0]), bytes]] * 2


def test_text_is_read_as_it_is(connection: Connection) -> None:
    values = stored(connection, [(1,), (2,)], Integer, storage=TEXT)
    assert [tuple(row) for row in values.read(connection, None, 10)] == [(1, "enc:v3:first"), (2, "enc:v3:second")]


def test_bytes_are_asked_for_as_bytes_and_by_no_other_statement(connection: Connection) -> None:
    formats: list[tuple[bool, int]] = []
    values = stored(connection, [(1,), (2,)], Integer)
    event.listen(
        connection,
        "after_cursor_execute",
        lambda _c, cursor, sql, *_: formats.append(("ORDER BY" in sql, int(cursor.format))),
    )
    values.read(connection, None, 10)
    values.count(connection)
    assert formats == [(True, 1), (False, 0)]
