"""The database itself refuses plaintext in an encrypted column."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    create_engine,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.schema import CreateTable

from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, Keyring, use_keyring
from sqlalchemy_kravn_crypto.ciphertext_checks import add_ciphertext_checks, check_name, ciphertext_checks
from sqlalchemy_kravn_crypto.exceptions import ColumnError

BINARY, TEXT = "credentials", 'an "odd" name'
VALUE = {"token": "s3cr3t"}


def refused() -> AbstractContextManager[Any]:
    # What MariaDB calls error 4025, a failed constraint, is an OperationalError for PyMySQL.
    return pytest.raises((IntegrityError, OperationalError), match=r"(?i)constraint.*_ciphertext")


def declared(metadata: MetaData) -> Table:
    table = Table(
        "Plugin",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("plain", LargeBinary),
        Column(BINARY, EncryptedJSON),
        Column(TEXT, EncryptedJSON(storage="text")),
    )
    add_ciphertext_checks(metadata)
    return table


@pytest.fixture
def engine(any_database_url: str) -> Iterator[Engine]:
    made = create_engine(any_database_url)
    with use_keyring(Keyring(DataKey.generate())):
        yield made
    made.dispose()


@pytest.fixture
def table(engine: Engine) -> Table:
    made = declared(MetaData())
    made.create(engine)
    with engine.begin() as connection:
        connection.execute(insert(made), {"id": 1, "plain": b"plain", BINARY: VALUE, TEXT: VALUE})
    return made


def store(engine: Engine, table: Table, column: str, value: Any) -> None:
    """Store a value as it is, as another program would."""
    by_type: Any = LargeBinary() if isinstance(value, bytes) else Text()
    with engine.begin() as connection:
        raw = Table(table.name, MetaData(), Column("id", Integer), Column(column, by_type))
        connection.execute(update(raw).values({column: value}))


def ddl(database: str, table: Table) -> str:
    return str(CreateTable(table).compile(dialect=make_url(f"{database}://").get_dialect()()))


def test_ciphertext_and_null_are_stored(engine: Engine, table: Table) -> None:
    with engine.begin() as connection:
        connection.execute(insert(table), {"id": 2, BINARY: None, TEXT: None})
        connection.execute(insert(table), {"id": 3, BINARY: {}, TEXT: {}})
        connection.execute(update(table).where(table.c.id == 3).values({BINARY: VALUE, TEXT: VALUE}))
        found = connection.execute(select(table.c[BINARY], table.c[TEXT]).order_by(table.c.id)).all()
    assert [tuple(row) for row in found] == [(VALUE, VALUE), (None, None), (VALUE, VALUE)]


@pytest.mark.parametrize("column", [BINARY, TEXT])
def test_what_sql_text_assigns_is_refused(engine: Engine, table: Table, column: str) -> None:
    with refused(), engine.begin() as connection:
        connection.execute(update(table).values({column: text("'plain'")}))
    if column == BINARY:
        with refused(), engine.begin() as connection:
            connection.execute(update(table).values({column: table.c.plain}))


@pytest.mark.parametrize("value", [b"{}", b"", b"\xf8\xf9", b"enc:v3:"])
def test_bytes_of_another_program_are_refused(engine: Engine, table: Table, value: bytes) -> None:
    with refused():
        store(engine, table, BINARY, value)


@pytest.mark.parametrize("value", ["{}", "", "ENC:V3:", "enc:v3", " enc:v3:"])
def test_text_of_another_program_is_refused(engine: Engine, table: Table, value: str) -> None:
    with refused():
        store(engine, table, TEXT, value)


def test_values_of_later_algorithms_are_accepted(engine: Engine, table: Table) -> None:
    store(engine, table, BINARY, b"\xf9\x7f")
    store(engine, table, TEXT, "enc:v3:--")


def test_sqlite_takes_no_value_of_another_type(sqlite_url: str) -> None:
    """A column has no type there, and text that begins with the same letters is not equal to bytes."""
    engine = create_engine(sqlite_url)
    table = declared(MetaData())
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), {"id": 1})
    for column, value in [(BINARY, "X'F9' in text"), (BINARY, "249"), (BINARY, ""), (TEXT, b"enc:v3:bytes")]:
        with refused():
            store(engine, table, column, value)
    engine.dispose()


def test_the_database_knows_it_by_name(engine: Engine, table: Table) -> None:
    names = {check["name"] for check in inspect(engine).get_check_constraints(table.name)}
    assert names == {check_name(table.name, BINARY), check_name(table.name, TEXT)} == set(ciphertext_checks(table))


def test_calling_it_again_adds_what_was_declared_since() -> None:
    metadata = MetaData()
    table = declared(metadata)
    later = Table("later", metadata, Column("id", Integer, primary_key=True), Column("secret", EncryptedJSON))
    add_ciphertext_checks(metadata)
    add_ciphertext_checks(later)
    assert [len(ciphertext_checks(found)) for found in (table, later)] == [2, 1]
    assert len(table.constraints) == 3
    table.append_column(Column("one_more", EncryptedJSON))
    add_ciphertext_checks(table)
    assert len(ciphertext_checks(table)) == 3


def test_the_names_are_not_put_into_the_naming_convention() -> None:
    metadata = MetaData(naming_convention={"ck": "check_%(table_name)s_%(constraint_name)s"})
    statement = ddl("sqlite", declared(metadata))
    assert 'CONSTRAINT "ck_Plugin_credentials_ciphertext" CHECK' in statement
    assert "check_" not in statement


def test_a_copied_table_has_constraints_of_its_own() -> None:
    table = declared(MetaData())
    copy = table.to_metadata(MetaData(), name="copy")
    add_ciphertext_checks(table)
    assert len(table.constraints) == len(copy.constraints) == 3
    assert ciphertext_checks(copy).keys() == ciphertext_checks(table).keys()
    # Those of a copy are in no order.
    lines = [{line.strip(", ") for line in ddl("sqlite", found).splitlines()[2:]} for found in (table, copy)]
    assert lines[0] == lines[1]


def test_names_are_short_enough_and_differ() -> None:
    assert check_name("plugin", "credentials") == "ck_plugin_credentials_ciphertext"
    long = [check_name("t" * 60, "c" * 60), check_name("t" * 60, "c" * 61), check_name("ü" * 40, "c")]
    assert long[0] == "ck_" + "t" * 36 + "_81a1d9788267_ciphertext"
    assert len({*long, check_name("a b", "c"), check_name("a_b", "c"), check_name("a-b", "c")}) == 6
    assert all(len(name.encode()) <= 63 for name in long)


def test_a_long_name_is_found_again(engine: Engine) -> None:
    table = Table("t" * 60, MetaData(), Column("id", Integer, primary_key=True), Column("c" * 60, EncryptedJSON))
    add_ciphertext_checks(table)
    table.create(engine)
    found = inspect(engine).get_check_constraints(table.name)
    assert {check["name"] for check in found} == set(ciphertext_checks(table))


@pytest.mark.parametrize(
    ("database", "binary", "textual"),
    [
        (
            "postgresql",
            r"""credentials IS NULL OR substring(credentials from 1 for 1) = '\xf9'::bytea""",
            """"an ""odd"" name" IS NULL OR substring("an ""odd"" name" from 1 for 7) = 'enc:v3:\'""",
        ),
        (
            "mysql",
            "credentials IS NULL OR substr(credentials, 1, 1) = X'F9'",
            '`an "odd" name` IS NULL OR substr(`an "odd" name`, 1, 7) = \'enc:v3:\'',
        ),
    ],
    ids=["postgresql", "mysql"],
)
def test_columns_are_quoted(database: str, binary: str, textual: str) -> None:
    statement = ddl(database, declared(MetaData()))
    assert f"CHECK ({binary})" in statement
    assert f"CHECK ({textual})" in statement


def test_another_database_is_an_error_that_names_it() -> None:
    with pytest.raises(ColumnError, match="oracle"):
        ddl("oracle", declared(MetaData()))
