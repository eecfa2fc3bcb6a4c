"""Which encrypted columns are known, and where they are, on each database."""

import pickle
import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    Uuid,
    create_engine,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import NullType

from sqlalchemy_kravn_crypto import EncryptedJSON, EncryptedString
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, to_text
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from sqlalchemy_kravn_crypto.known_columns import (
    KnownColumn,
    declared,
    forget,
    known,
    located,
    record,
    recorded,
)
from sqlalchemy_kravn_crypto.schema import TABLES

A = KnownColumn("", "a", "secret", "binary", "a.secret")
B = KnownColumn("tenant", "b", "secret", "text", "b.secret", ("b.old", "b.older"))


@pytest.fixture
def engine(any_database_url: str) -> Iterator[Engine]:
    made = create_engine(any_database_url)
    TABLES.columns.metadata.create_all(made)
    yield made
    made.dispose()


def statements(engine: Engine) -> list[str]:
    """Return the list that every statement from now on is added to."""
    seen: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def _see(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    return seen


# --- What is declared ------------------------------------------------------------------------------------------------


def test_a_column_is_plain_values() -> None:
    assert pickle.loads(pickle.dumps(B)) == B  # noqa: S301 - made here
    assert (A.label, B.label) == ("a.secret", "tenant.b.secret")


def test_declares_every_encrypted_column_of_a_metadata() -> None:
    metadata = MetaData()
    Table("plain", metadata, Column("id", Integer, primary_key=True), Column("note", Text))
    Table(
        "a",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("secret", EncryptedJSON(associated_data="pinned", earlier_names=("first",), storage="text")),
        Column("other", EncryptedString),
        schema="s",
    )
    assert declared(metadata) == [
        KnownColumn("s", "a", "other", "binary", "a.other"),
        KnownColumn("s", "a", "secret", "text", "pinned", ("first",)),
    ]


def test_declares_inherited_and_renamed_columns_once_for_each_table() -> None:
    class Base(DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(8))
        secret: Mapped[str] = mapped_column("db_secret", EncryptedString)
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "p"}  # noqa: RUF012 - as SQLAlchemy has it

    class Single(Parent):
        extra: Mapped[str | None] = mapped_column(EncryptedString)
        __mapper_args__ = {"polymorphic_identity": "s"}  # noqa: RUF012 - as above

    assert [(one.table, one.column, one.name) for one in declared(Base.metadata)] == [
        ("parent", "db_secret", "parent.db_secret"),
        ("parent", "extra", "parent.extra"),
    ]


def test_declares_those_of_the_process_without_a_metadata() -> None:
    table = Table("of_this_process", MetaData(), Column("id", Integer, primary_key=True), Column("c", EncryptedJSON))
    assert KnownColumn("", "of_this_process", "c", "binary", "of_this_process.c") in declared()
    assert table is not None  # a column goes when its table does


def test_two_declarations_of_one_place_are_one_column_with_all_names() -> None:
    tables = [
        Table("twice", MetaData(), Column("id", Integer, primary_key=True), Column("c", EncryptedJSON(**names)))
        for names in ({"associated_data": "x"}, {"associated_data": "y", "earlier_names": ("x", "z")})
    ]
    found = [one for one in declared() if one.table == "twice"]
    assert len(found) == 1
    assert {found[0].name, *found[0].earlier_names} == {"x", "y", "z"}
    assert tables


# --- What is on record -----------------------------------------------------------------------------------------------


def test_what_is_recorded_comes_back(engine: Engine) -> None:
    with engine.begin() as connection:
        record(connection, [B, A])
    with engine.connect() as connection:
        assert recorded(connection) == [A, B]


def test_recording_what_is_known_is_one_query(engine: Engine) -> None:
    with engine.begin() as connection:
        record(connection, [A, B])
    seen = statements(engine)
    with engine.begin() as connection:
        record(connection, [A, B])
    assert [statement.split()[0] for statement in seen] == ["SELECT"]


def test_however_many_are_new_they_are_one_call(engine: Engine) -> None:
    many = [KnownColumn("", f"t{number}", "secret", "binary", f"t{number}.secret") for number in range(100)]
    seen = statements(engine)
    with engine.begin() as connection:
        record(connection, [A, B, *many])
    assert [statement.split()[0] for statement in seen] == ["SELECT", "INSERT"]
    with engine.connect() as connection:
        assert recorded(connection) == sorted([A, B, *many])


def test_a_new_name_or_storage_replaces_the_one_on_record(engine: Engine) -> None:
    changed = KnownColumn("", "a", "secret", "text", "renamed", ("a.secret",))
    with engine.begin() as connection:
        record(connection, [A])
    with engine.begin() as connection:
        record(connection, [changed])
    with engine.connect() as connection:
        assert recorded(connection) == [changed]


def test_is_recorded_outside_of_translated_schemas(engine: Engine) -> None:
    moved = engine.execution_options(schema_translate_map={None: "nowhere"})
    with moved.begin() as connection:
        record(connection, [A])
        assert recorded(connection) == [A]
        assert forget(connection, "", "a", "secret")


def test_many_processes_record_the_same_at_once(engine: Engine) -> None:
    columns = [KnownColumn("", "a", f"column_{number}", "binary", "name") for number in range(20)]
    barrier = threading.Barrier(6)
    failures: list[BaseException] = []

    def start() -> None:
        try:
            with engine.connect() as connection:
                if engine.dialect.name != "sqlite":
                    connection.execution_options(isolation_level="READ COMMITTED")
                assert recorded(connection) == []
                connection.rollback()
                barrier.wait(30)
                record(connection, columns)
                connection.commit()
        except BaseException as error:  # noqa: BLE001 - of another thread
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    with engine.connect() as connection:
        assert recorded(connection) == sorted(columns)


NO_LISTS = {
    "no JSON": "MARKER",
    "an object": '{"MARKER": 1}',
    "a string": '"MARKER"',
    "numbers": "[1, 2]",
    "brackets": "[" * 60_000,
    "no text at all": "",
}


@pytest.mark.parametrize("name", ["earlier_names", "row_identity"])
@pytest.mark.parametrize("value", NO_LISTS.values(), ids=NO_LISTS)
def test_a_list_on_record_that_is_none_is_told_apart_and_put_right_by_who_declares_the_column(
    engine: Engine, name: str, value: str
) -> None:
    """Whoever declares another column goes on as well, and does not touch it."""
    set_ = text(f"UPDATE kms_columns SET {name} = :value WHERE table_name = 'a'")  # noqa: S608 - of this file
    with engine.begin() as connection:
        record(connection, [A])
        connection.execute(set_, {"value": value})
        record(connection, [B])
    with engine.connect() as connection:
        with pytest.raises(errors.MalformedRowError, match=r"row of kms_columns for 'a\.secret'") as caught:
            recorded(connection)
        assert caught.value.__context__ is None
        assert "MARKER" not in str(caught.value)
    with engine.begin() as connection:
        record(connection, [A])
        assert recorded(connection) == [A, B]


@pytest.mark.parametrize("value", ["NULL", "17", "x'00'", "'MARKER'"])
@pytest.mark.parametrize("name", ["storage", "name", "schema_name", "table_name", "column_name"])
def test_what_sqlite_keeps_in_a_column_of_text_is_told_apart_from_what_this_library_writes(
    name: str, value: str
) -> None:
    engine = create_engine("sqlite://")
    bare = Table("kms_columns", MetaData(), *(Column(one.name, NullType()) for one in TABLES.columns.columns))
    with engine.begin() as connection:
        # Without affinities and constraints, as somebody makes it who owns the database.
        connection.exec_driver_sql(f"CREATE TABLE kms_columns ({', '.join(bare.columns.keys())})")
        connection.execute(insert(bare), [{"schema_name": "", "table_name": "a", "column_name": "b"}])
        connection.exec_driver_sql("UPDATE kms_columns SET storage = 'binary', name = 'a.b'")
        assert recorded(connection) == [KnownColumn("", "a", "b", "binary", "a.b")]
        connection.exec_driver_sql(f"UPDATE kms_columns SET {name} = {value}")  # noqa: S608 - of this file
        if value == "'MARKER'" and name != "storage":  # a name like any other
            assert len(recorded(connection)) == 1
        else:
            with pytest.raises(errors.MalformedRowError, match="row of kms_columns"):
                recorded(connection)
    engine.dispose()


def test_text_that_is_no_utf8_stops_nobody_who_declares_a_column() -> None:
    """SQLite keeps it, and its driver does not return it."""
    engine = create_engine("sqlite://")
    TABLES.columns.create(engine)
    with engine.begin() as connection:
        record(connection, [A, B])
        connection.exec_driver_sql("UPDATE kms_columns SET name = CAST(x'ff' AS TEXT) WHERE table_name = 'a'")
        with pytest.raises(errors.MalformedRowError, match="text in kms_columns") as caught:
            recorded(connection)
        assert caught.value.__context__ is None
        record(connection, [A])
        assert recorded(connection) == [A, B]
    engine.dispose()


@pytest.mark.parametrize("name", ["schema_name", "table_name", "column_name", "row_identity"])
def test_a_name_that_no_database_has_is_told_apart(name: str) -> None:
    engine = create_engine("sqlite://")
    TABLES.columns.create(engine)
    value = '[["i\\u0000d", "integer"]]' if name == "row_identity" else "MARKER\0"
    with engine.begin() as connection:
        record(connection, [A])
        connection.execute(update(TABLES.columns).values({name: value}))
        with pytest.raises(errors.MalformedRowError, match="row of kms_columns"):
            recorded(connection)
    engine.dispose()


def test_forgets_one_column(engine: Engine) -> None:
    with engine.begin() as connection:
        record(connection, [A, B])
        assert forget(connection, "tenant", "b", "secret")
        assert not forget(connection, "tenant", "b", "secret")
    with engine.connect() as connection:
        assert recorded(connection) == [A]


def test_another_database_is_refused() -> None:
    class Elsewhere:
        class dialect:  # noqa: N801 - as in SQLAlchemy
            name = "oracle"

        def execute(self, *_: object, **__: object) -> list[object]:
            return []

    elsewhere: Connection = Elsewhere()  # type: ignore[assignment]
    with pytest.raises(errors.UnsupportedDatabaseError, match="oracle"):
        record(elsewhere, [A])


# --- All that are known ----------------------------------------------------------------------------------------------


def test_known_is_the_record_and_the_models_which_win(engine: Engine) -> None:
    metadata = MetaData()
    Table("a", metadata, Column("id", Integer, primary_key=True), Column("secret", EncryptedJSON(associated_data="x")))
    Table("c", metadata, Column("id", Integer, primary_key=True), Column("secret", EncryptedJSON))
    with engine.begin() as connection:
        record(connection, [A, B])
        assert known(connection) == [A, B]
        assert known(connection, metadata) == [
            KnownColumn("", "a", "secret", "binary", "x"),
            KnownColumn("", "c", "secret", "binary", "c.secret"),
            B,
        ]


@pytest.fixture
def tenants(postgres_url: str) -> Iterator[Connection]:
    """A database in which the table `a` is in two of three tenants, and `shared` in the default schema only."""
    made = create_engine(postgres_url)
    TABLES.columns.metadata.create_all(made)
    with made.begin() as connection:
        for name in ("one", "two", "three"):
            connection.execute(text(f"CREATE SCHEMA {name}"))
        for name in ("one", "two"):
            connection.execute(text(f"CREATE TABLE {name}.a (id int PRIMARY KEY, secret bytea)"))
        connection.execute(text("CREATE TABLE shared (id int PRIMARY KEY, secret bytea)"))
        yield connection
    made.dispose()


def test_a_column_of_the_default_schema_is_in_every_tenant_that_has_its_table(tenants: Connection) -> None:
    record(tenants, [A])
    assert [one.schema for one in known(tenants, schemas=["one", "two", "three"])] == ["one", "two"]


def test_a_column_whose_table_is_in_the_default_schema_too_is_taken_there_besides(tenants: Connection) -> None:
    record(tenants, [A])
    tenants.execute(text("CREATE TABLE a (id int PRIMARY KEY, secret bytea)"))
    assert [one.schema for one in known(tenants, schemas=["one"])] == ["", "one"]


def test_a_placeholder_for_a_schema_is_every_tenant_and_not_the_default_schema(tenants: Connection) -> None:
    record(tenants, [KnownColumn("placeholder", "a", "secret", "binary", "a.secret")])
    tenants.execute(text("CREATE TABLE a (id int PRIMARY KEY, secret bytea)"))
    assert [one.schema for one in known(tenants, schemas=["one", "two"])] == ["one", "two"]


def test_shared_columns_and_those_of_real_schemas_stay_where_they_are(tenants: Connection) -> None:
    shared = KnownColumn("", "shared", "secret", "binary", "shared.secret")
    fixed = KnownColumn("two", "a", "secret", "binary", "a.secret")
    record(tenants, [shared, fixed])
    assert known(tenants, schemas=["one", "three"]) == [shared, fixed]


def test_a_table_that_is_nowhere_stays_known(tenants: Connection) -> None:
    lost = KnownColumn("", "lost", "secret", "binary", "lost.secret")
    record(tenants, [lost])
    assert known(tenants, schemas=["one"]) == [lost]


def test_a_misspelt_tenant_is_refused(tenants: Connection) -> None:
    with pytest.raises(errors.ColumnUnreachableError, match="'tow'"):
        known(tenants, schemas=["one", "tow"])


# --- Where they are --------------------------------------------------------------------------------------------------


def test_finds_the_primary_key_and_the_plain_value(engine: Engine) -> None:
    table = Table(
        "a",
        MetaData(),
        Column("second", Uuid, primary_key=True),
        Column("first", String(20), primary_key=True),
        Column("secret", LargeBinary),
    )
    table.create(engine)
    with engine.connect() as connection:
        found = located(connection, A)
    assert [column.name for column in found.key] == ["second", "first"]
    assert isinstance(found.value.type, LargeBinary)
    assert not isinstance(found.value.type, EncryptedJSON)
    assert found.kept == ()


def test_a_table_without_a_primary_key_is_found(engine: Engine) -> None:
    Table("a", MetaData(), Column("secret", LargeBinary)).create(engine)
    with engine.connect() as connection:
        assert located(connection, A).key == ()


@pytest.mark.parametrize("missing", ["table", "column"])
def test_what_is_not_there_is_unreachable(engine: Engine, missing: str) -> None:
    if missing == "column":
        Table("a", MetaData(), Column("id", Integer, primary_key=True)).create(engine)
    with engine.connect() as connection, pytest.raises(errors.ColumnUnreachableError, match=missing) as caught:
        located(connection, A)
    assert "a.secret" in str(caught.value)
    assert "forget-column" in str(caught.value)
    assert caught.value.__context__ is None


def test_a_column_in_a_schema_that_is_not_there_is_unreachable(engine: Engine) -> None:
    with engine.connect() as connection, pytest.raises(errors.ColumnUnreachableError, match="table is not") as caught:
        located(connection, B)
    assert "tenant.b.secret" in str(caught.value)
    assert caught.value.__context__ is None


def test_another_failure_of_the_database_is_no_missing_table() -> None:
    """The schema is there, and what fails is something else."""
    engine = create_engine("sqlite://")

    @event.listens_for(engine, "before_cursor_execute")
    def _fail(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "table_xinfo" in statement or "table_info" in statement:
            message = "statement"
            raise OperationalError(message, None, Exception("disk I/O error"))

    with engine.connect() as connection, pytest.raises(OperationalError, match="disk I/O error"):
        located(connection, KnownColumn("main", "a", "secret", "binary", "a.secret"))
    engine.dispose()


def test_sees_what_mariadb_changes_by_itself(mariadb_url: str) -> None:
    engine = create_engine(mariadb_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE TABLE a (id int PRIMARY KEY, secret longblob, made DATETIME DEFAULT CURRENT_TIMESTAMP, "
                "changed DATETIME DEFAULT CURRENT_TIMESTAMP ON UPDATE CURRENT_TIMESTAMP, "
                "changed_too TIMESTAMP(3) NULL ON UPDATE CURRENT_TIMESTAMP(3))"
            )
        )
        assert [column.name for column in located(connection, A).kept] == ["changed", "changed_too"]
    engine.dispose()


@pytest.mark.parametrize("storage", ["binary", "text"])
def test_tells_by_the_database_which_values_are_under_a_key(engine: Engine, storage: str) -> None:
    one, other = Keyring(DataKey.generate()), Keyring(DataKey.generate())
    as_stored = to_text if storage == "text" else bytes
    type_ = EncryptedJSON(storage=storage).load_dialect_impl(engine.dialect)
    table = Table("a", MetaData(), Column("id", Integer, primary_key=True), Column("secret", type_))
    table.create(engine)
    values = [as_stored(keyring.encrypt(b"x", ColumnName("a.secret"))) for keyring in (one, other, one)]
    with engine.begin() as connection:
        rows = [{"id": number, "secret": value} for number, value in enumerate([*values, None], start=1)]
        connection.execute(table.insert(), rows)
        found = located(connection, KnownColumn("", "a", "secret", storage, "a.secret"))
        ids = select(found.key[0]).select_from(found.table)
        under = connection.scalars(ids.where(found.under(one.primary_key_id)))
        assert sorted(under) == [1, 3]
