"""Which declarations of encrypted columns are refused, and that every column gets a name of its own."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import (
    JSON,
    CheckConstraint,
    Column,
    Computed,
    FetchedValue,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Sequence,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    desc,
    func,
    insert,
    inspect,
    literal,
    literal_column,
    null,
    nulls_last,
    select,
    text,
    type_coerce,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.declarative import AbstractConcreteBase
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    configure_mappers,
    declared_attr,
    mapped_column,
    polymorphic_union,
    registry,
)
from sqlalchemy.schema import CreateIndex

from sqlalchemy_kravn_crypto import (
    DataKey,
    Encrypted,
    EncryptedBytes,
    EncryptedJSON,
    EncryptedString,
    Keyring,
    guards,
    use_keyring,
)
from sqlalchemy_kravn_crypto.exceptions import ColumnError, UnsupportedOperationError, WrongColumnError
from tests.leaks import leaked

MARKER = "S3CR3T" + "-marker"

TYPES: list[Any] = [
    EncryptedJSON,
    EncryptedJSON(storage="text"),
    EncryptedString(),
    EncryptedBytes(),
    Encrypted(Integer),
    EncryptedJSON(associated_data="pinned.name"),
]


def declared(*parts: Any) -> Table:
    return Table("t", MetaData(), Column("id", Integer, primary_key=True), Column("n", Integer), *parts)


def encrypted(*parts: Any, type_: Any = EncryptedJSON, **options: Any) -> Column[Any]:
    return Column("value", type_, *parts, **options)


def refusal(declare: Callable[[], Any]) -> str:
    with pytest.raises(ColumnError) as caught:
        declare()
    assert type(caught.value) is ColumnError
    assert leaked(caught.value, MARKER) == []
    assert caught.value.__context__ is None
    assert str(caught.value).startswith("t.value is encrypted, so ")
    return str(caught.value)


# --- The column ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", TYPES, ids=repr)
@pytest.mark.parametrize("flag", ["primary_key", "unique", "index"])
def test_flag_that_means_nothing_on_ciphertext_is_refused(flag: str, type_: Any) -> None:
    metadata = MetaData()
    column = encrypted(type_=type_, **{flag: True})
    message = refusal(lambda: Table("t", metadata, column))
    assert message == f"t.value is encrypted, so it cannot be {flag}: equal values have different ciphertexts."
    assert metadata.tables == {}


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        pytest.param([], {"server_default": '{"a": 1}'}, id="text"),
        pytest.param([], {"server_default": text("'{}'")}, id="SQL"),
        pytest.param([], {"server_default": null()}, id="null"),
        pytest.param([], {"server_default": FetchedValue()}, id="trigger"),
        pytest.param([], {"server_default": literal({"a": MARKER}, EncryptedJSON())}, id="literal"),
        pytest.param([], {"server_onupdate": FetchedValue()}, id="trigger on update"),
        pytest.param([FetchedValue()], {}, id="FetchedValue"),
        pytest.param([FetchedValue(for_update=True)], {}, id="FetchedValue on update"),
        pytest.param([Computed("'x'")], {}, id="computed"),
        pytest.param([Identity()], {}, id="identity"),
    ],
)
def test_value_of_the_server_is_refused(parts: list[Any], options: dict[str, Any]) -> None:
    message = refusal(lambda: declared(encrypted(*parts, **options)))
    assert "it cannot have a server_default or be computed: the database would hold plaintext. Use default=" in message


@pytest.mark.parametrize("kind", ["default", "onupdate"])
@pytest.mark.parametrize(
    "value",
    [
        pytest.param(func.now(), id="function"),
        pytest.param(text(f"'{MARKER}'"), id="text"),
        pytest.param(literal_column(f"'{MARKER}'"), id="literal column"),
        pytest.param(literal(MARKER), id="literal"),
        pytest.param(select(1).scalar_subquery(), id="subquery"),
    ],
)
def test_sql_expression_as_a_default_is_refused(kind: str, value: Any) -> None:
    message = refusal(lambda: declared(encrypted(**{kind: value})))
    assert f"its {kind} cannot be an SQL expression" in message
    assert "Give a value or a Python function" in message


def test_sequence_is_refused() -> None:
    assert "its default cannot be an SQL expression" in refusal(lambda: declared(encrypted(Sequence("numbers"))))


def test_foreign_key_is_refused() -> None:
    for column in (encrypted(ForeignKey("other.id")), encrypted(ForeignKey("other.id", ondelete="CASCADE"))):
        assert "it cannot be a foreign key" in refusal(lambda made=column: declared(made))  # type: ignore[misc]


def test_column_that_is_appended_later_is_refused_too() -> None:
    assert "unique" in refusal(lambda: declared().append_column(encrypted(unique=True)))
    assert "server_default" in refusal(lambda: declared().append_column(encrypted(server_default="x")))


def test_model_is_refused() -> None:
    options: list[dict[str, Any]] = [
        {"unique": True},
        {"index": True},
        {"server_default": "x"},
        {"insert_default": func.now()},
        {"default": func.now()},
    ]
    for each in options:

        class OwnBase(DeclarativeBase):
            pass

        attributes = {
            "__tablename__": "t",
            "id": mapped_column(Integer, primary_key=True),
            "value": mapped_column(EncryptedJSON, **each),
        }
        refusal(lambda base=OwnBase, parts=attributes: type("Model", (base,), parts))  # type: ignore[misc]


@pytest.mark.parametrize("variant", [Text(), LargeBinary(), JSON(), EncryptedJSON(), Text], ids=repr)
@pytest.mark.parametrize("dialects", [("sqlite",), ("postgresql", "mysql")], ids=repr)
def test_variant_is_refused(variant: Any, dialects: tuple[str, ...]) -> None:
    for type_ in (EncryptedJSON(), EncryptedString(), Encrypted(Integer)):
        with pytest.raises(ColumnError, match="would store plaintext"):
            type_.with_variant(variant, *dialects)


@pytest.mark.parametrize("storage", ["", "BINARY", "jsonb", None, 1])
def test_unknown_storage_is_refused(storage: Any) -> None:
    with pytest.raises(ColumnError, match="'binary', 'text'"):
        EncryptedJSON(storage=storage)


def test_empty_name_is_refused() -> None:
    with pytest.raises(ColumnError, match="must not be empty"):
        EncryptedJSON(associated_data="")
    with pytest.raises(ColumnError, match="must not be empty"):
        EncryptedJSON(earlier_names=[""])


# --- The table -------------------------------------------------------------------------------------------------------

CONSTRAINTS: dict[str, Callable[[Any], Any]] = {
    "UniqueConstraint": UniqueConstraint,
    "UniqueConstraint of several": lambda column: UniqueConstraint("n", column),
    "PrimaryKeyConstraint": PrimaryKeyConstraint,
    "ForeignKeyConstraint": lambda column: ForeignKeyConstraint([column], ["other.id"]),
    "ForeignKeyConstraint of several": lambda column: ForeignKeyConstraint(["n", column], ["other.id", "other.n"]),
    "ExcludeConstraint": lambda column: ExcludeConstraint((column, "=")),
    "ExcludeConstraint of several": lambda column: ExcludeConstraint(("n", "="), (column, "=")),
    "Index": lambda column: Index("by_value", column),
    "Index of several": lambda column: Index("by_value", "n", column),
    "unique Index": lambda column: Index("by_value", column, unique=True),
    "hash Index": lambda column: Index("by_value", column, postgresql_using="hash"),
}
OF_THE_PRIMARY_KEY = "ignore:Table 't' specifies columns:sqlalchemy.exc.SAWarning"


def see_constraint(name: str, message: str) -> None:
    wanted = "indexed" if "Index" in name else f"in a {name.split(maxsplit=1)[0]}"
    assert f"it cannot be {wanted}" in message or "it cannot be a foreign key" in message


@pytest.mark.filterwarnings(OF_THE_PRIMARY_KEY)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraint_by_name_is_refused(name: str) -> None:
    see_constraint(name, refusal(lambda: declared(encrypted(), CONSTRAINTS[name]("value"))))


@pytest.mark.filterwarnings(OF_THE_PRIMARY_KEY)
@pytest.mark.parametrize("name", [name for name in CONSTRAINTS if "several" not in name])
def test_constraint_by_column_is_refused(name: str) -> None:
    column = encrypted()
    see_constraint(name, refusal(lambda: declared(column, CONSTRAINTS[name](column))))


@pytest.mark.filterwarnings(OF_THE_PRIMARY_KEY)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraint_that_is_added_later_is_refused(name: str) -> None:
    table = declared(encrypted())
    see_constraint(name, refusal(lambda: table.append_constraint(CONSTRAINTS[name]("value"))))
    if "several" not in name:
        table = declared(encrypted())
        made = CONSTRAINTS[name]
        see_constraint(name, refusal(lambda: table.append_constraint(made(table.c.value))))


@pytest.mark.filterwarnings(OF_THE_PRIMARY_KEY)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraint_of_a_model_is_refused(name: str) -> None:
    def declare() -> None:
        class OwnBase(DeclarativeBase):
            pass

        class Model(OwnBase):
            __tablename__ = "t"
            __table_args__ = (CONSTRAINTS[name]("value"),)
            id: Mapped[int] = mapped_column(primary_key=True)
            n: Mapped[int]
            value: Mapped[Any] = mapped_column(EncryptedJSON)

    see_constraint(name, refusal(declare))


def test_sorted_index_is_refused() -> None:
    for direction in (desc, nulls_last, lambda column: nulls_last(desc(column))):
        table = declared(encrypted())
        # SQLAlchemy 2.1 asks the column, whose operators are refused by themselves.
        with pytest.raises((ColumnError, UnsupportedOperationError), match=r"t\.value is encrypted"):
            Index("by_value", direction(table.c.value))


def test_what_is_right_on_ciphertext_is_allowed() -> None:
    column = encrypted(default=dict, onupdate=lambda: {"a": 1}, info={"any": "thing"}, nullable=False)
    prefix = func.substr(type_coerce(column, LargeBinary()), 1, 10)
    table = declared(
        column,
        Column("constant", EncryptedJSON, default={"a": 1}, onupdate=[]),
        Column("callable", EncryptedString, default=lambda context: str(context.get_current_parameters()["n"])),
        CheckConstraint(column.is_not(None)),
        CheckConstraint("length(value) > 50"),
        Index("by_key", prefix),
        Index("by_n", "n", postgresql_include=["value"], postgresql_where=column.is_not(None)),
        Index("by_length", func.length(column)),
        UniqueConstraint("n"),
        ForeignKeyConstraint(["n"], ["t.id"]),
    )
    make_dialect: Any = postgresql.dialect
    rendered = {str(index.name): str(CreateIndex(index).compile(dialect=make_dialect())) for index in table.indexes}
    assert rendered["by_key"] == "CREATE INDEX by_key ON t (substr(value, 1, 10))"
    assert rendered["by_n"] == "CREATE INDEX by_n ON t (n) INCLUDE (value) WHERE value IS NOT NULL"
    engine = create_engine("sqlite://")
    table.metadata.create_all(engine)
    with use_keyring(Keyring(DataKey.generate())), engine.connect() as connection:
        connection.execute(insert(table), [{"id": 1, "n": 1}])
        assert connection.execute(select(table)).one() == (1, 1, {}, {"a": 1}, "1")
        with pytest.raises(IntegrityError):
            connection.execute(insert(table), [{"id": 2, "n": 2, "value": None}])
    engine.dispose()


def test_other_columns_are_not_hindered() -> None:
    table = Table(
        "t",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("blob", LargeBinary, unique=True, index=True, server_default="x"),
        encrypted(),
        UniqueConstraint("blob", "id"),
        Index("by_blob", "blob"),
    )
    assert len(table.indexes) == 2
    copied = table.to_metadata(MetaData())
    assert len(copied.indexes) == 2
    assert "indexed" in refusal(lambda: Index("by_value", copied.c.value))


# --- Names -----------------------------------------------------------------------------------------------------------


def names_of(model: Any) -> dict[str, str | None]:
    columns = inspect(model).local_table.c
    return {column.name: column.type.column_name for column in columns if hasattr(column.type, "column_name")}


def test_each_model_that_shares_a_mixin_and_a_type_has_names_of_its_own() -> None:
    shared: Any = Encrypted(Integer)

    class Base(DeclarativeBase):
        type_annotation_map = {dict[str, Any]: EncryptedJSON(storage="text"), str: EncryptedString}  # noqa: RUF012 - SQLAlchemy's way

    class Mixin:
        mixed: Mapped[dict[str, Any]]
        number: Mapped[int] = mapped_column(shared)

        @declared_attr
        def by_function(self) -> Mapped[int]:
            return mapped_column(shared)

    class Abstract(Mixin, Base):
        __abstract__ = True
        id: Mapped[int] = mapped_column(primary_key=True)
        note: Mapped[str]

    class First(Abstract):
        __tablename__ = "first"

    class Second(Abstract):
        __tablename__ = "second"
        own: Mapped[str | None]

    for model, name, own in ((First, "first", set()), (Second, "second", {"own"})):
        columns = {"mixed", "number", "by_function", "note"} | own
        assert names_of(model) == {column: f"{name}.{column}" for column in columns}


def concrete(*, associated_data: str | None) -> tuple[Any, Any, Any]:
    class Base(DeclarativeBase):
        pass

    class Person(AbstractConcreteBase, Base):
        strict_attrs = True
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[Any] = mapped_column(EncryptedJSON(associated_data=associated_data), nullable=True)

    class Manager(Person):
        __tablename__ = "manager"
        __mapper_args__ = {"polymorphic_identity": "manager", "concrete": True}  # noqa: RUF012 - SQLAlchemy's way

    class Engineer(Person):
        __tablename__ = "engineer"
        __mapper_args__ = {"polymorphic_identity": "engineer", "concrete": True}  # noqa: RUF012 - SQLAlchemy's way
        extra: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)

    configure_mappers()
    return Person, Manager, Engineer


@pytest.mark.parametrize("guarded", [True, False])
def test_concrete_inheritance_over_several_tables_needs_one_name(database_url: str, *, guarded: bool) -> None:
    engine = create_engine(database_url)
    if guarded:
        guards.install(engine)
    person, manager, engineer = concrete(associated_data=None)
    assert (names_of(manager), names_of(engineer)) == (
        {"value": "manager.value"},
        {"value": "engineer.value", "extra": "engineer.extra"},
    )
    person.metadata.create_all(engine)
    with use_keyring(Keyring(DataKey.generate())), Session(engine) as session:
        session.add_all([manager(id=1, value=["m"]), engineer(id=2, value=["e"], extra=["x"])])
        session.flush()
        session.expire_all()
        assert session.scalars(select(manager)).one().value == ["m"]
        with pytest.raises(UnsupportedOperationError if guarded else WrongColumnError, match="associated_data"):
            session.scalars(select(person)).all()
    engine.dispose()


def test_concrete_inheritance_with_one_name_works(database_url: str) -> None:
    engine = create_engine(database_url)
    guards.install(engine)
    person, manager, engineer = concrete(associated_data="person.value")
    person.metadata.create_all(engine)
    with use_keyring(Keyring(DataKey.generate())), Session(engine) as session:
        session.add_all([manager(id=1, value=["m"]), engineer(id=2, value=["e"], extra=["x"])])
        session.flush()
        for _ in range(2):
            session.expunge_all()
            found = session.scalars(select(person).order_by(person.id)).all()
            assert [(type(each), each.value) for each in found] == [(manager, ["m"]), (engineer, ["e"])]
            assert found[1].extra == ["x"]
    engine.dispose()


def test_polymorphic_union_by_hand_works(database_url: str) -> None:
    registered = registry()
    tables = [
        Table(
            name,
            registered.metadata,
            Column("id", Integer, primary_key=True),
            Column("value", EncryptedJSON(associated_data="person.value")),
            *extra,
        )
        for name, extra in (("manager", [Column("own", EncryptedJSON)]), ("engineer", []))
    ]
    make_union: Any = polymorphic_union  # without types in SQLAlchemy
    union = make_union({"manager": tables[0], "engineer": tables[1]}, "kind", "people")
    engine = create_engine(database_url)
    guards.install(engine)
    registered.metadata.create_all(engine)
    with use_keyring(Keyring(DataKey.generate())), engine.connect() as connection:
        connection.execute(insert(tables[0]), {"id": 1, "value": ["m"], "own": ["o"]})
        connection.execute(insert(tables[1]), {"id": 2, "value": ["e"]})
        statement = select(union.c.id, union.c.value, union.c.own, union.c.kind).order_by(union.c.id)
        assert connection.execute(statement).all() == [(1, ["m"], ["o"], "manager"), (2, ["e"], None, "engineer")]
        with pytest.raises(UnsupportedOperationError, match=r"person\.value|manager\.value|engineer\.value"):
            connection.execute(statement.order_by(None).order_by(union.c.value))
    engine.dispose()
