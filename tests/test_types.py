"""The column types on both databases, through the ORM and Core."""

import copy
import json
import os
import pickle
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import pytest
from sqlalchemy import (
    ARRAY,
    JSON,
    Column,
    Engine,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    bindparam,
    create_engine,
    func,
    insert,
    inspect,
    literal,
    literal_column,
    null,
    select,
    text,
    true,
    type_coerce,
    union_all,
    update,
    values,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    column_property,
    declared_attr,
    joinedload,
    mapped_column,
    registry,
    relationship,
)
from sqlalchemy.schema import CreateTable
from sqlalchemy.sql import quoted_name

from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, Keyring, use_keyring
from sqlalchemy_kravn_crypto import exceptions as errors
from tests import reference
from tests.leaks import leaked

MARKER = "S3CR3T" + "-marker"
NEIGHBOUR = "N3IGHBOUR" + "-marker"
KEY = bytes(range(32))
VALUE = {"token": MARKER, "list": [1, 1.5, True, None, {"grün": "鍵 🔑"}]}
UNSTORABLE = {"token": MARKER, "bad": (1, MARKER)}

STORAGES = ["binary", "text"]
COLUMNS = ["as_binary", "as_text"]


class Base(DeclarativeBase):
    pass


class Plugin(Base):
    __tablename__ = "plugin"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None]
    as_binary: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)
    as_text: Mapped[Any] = mapped_column(EncryptedJSON(storage="text"), nullable=True)
    by_default: Mapped[Any] = mapped_column(EncryptedJSON, default=dict, onupdate=lambda: {"updated": MARKER})
    constant: Mapped[Any] = mapped_column(EncryptedJSON, default={"constant": [MARKER]})
    items: Mapped[list["Item"]] = relationship(order_by="Item.id")


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    plugin_id: Mapped[int | None] = mapped_column(ForeignKey("plugin.id"))
    required: Mapped[Any] = mapped_column(EncryptedJSON, nullable=False)
    number: Mapped[int | None] = mapped_column(unique=True)


PLUGIN = Base.metadata.tables["plugin"]


@pytest.fixture(autouse=True)
def keyring() -> Iterator[Keyring]:
    with use_keyring(Keyring(DataKey(KEY))) as used:
        yield used


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url)
    Base.metadata.create_all(made)
    yield made
    made.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as opened:
        yield opened


def stored(engine: Engine, column: str, table: str = "plugin", where: str = "1 = 1") -> list[bytes | str | None]:
    """Return what is in the database, without any type of ours."""
    quote = engine.dialect.identifier_preparer.quote
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(f"SELECT {quote(column)} FROM {quote(table)} WHERE {where}").scalars().all()  # noqa: S608 - fixed by the test
    return [row if isinstance(row, str) or row is None else bytes(row) for row in rows]


def frame_in(value: bytes | str | None) -> bytes:
    if isinstance(value, str):
        assert value.startswith("enc:v3:")
        value = urlsafe_b64decode(value.removeprefix("enc:v3:") + "==")
    assert value is not None
    return value


def declared(name: str, *columns: Column[Any], schema: str | None = None) -> Table:
    return Table(name, MetaData(), Column("id", Integer, primary_key=True), *columns, schema=schema)


# --- Round trips -----------------------------------------------------------------------------------------------------

VALUES = [
    pytest.param(VALUE, id="document"),
    pytest.param({}, id="empty dict"),
    pytest.param([], id="empty list"),
    pytest.param("", id="empty text"),
    pytest.param(0, id="zero"),
    pytest.param(False, id="false"),
    pytest.param([None], id="null inside"),
    pytest.param(1.5, id="float"),
    pytest.param(2**80, id="big integer"),
    pytest.param("nul \0 inside", id="NUL"),
    pytest.param("enc:v3:-QKl", id="like text storage"),
    pytest.param("enc:v1:AAAA", id="like an earlier text storage"),
    pytest.param("\xf9\x02" + "x" * 60, id="like a frame"),
    pytest.param({"deep": [[[{"a": [MARKER]}]]]}, id="nested"),
    pytest.param({"blob": "x" * 1_000_000}, id="one megabyte"),
]


@pytest.mark.parametrize("field", COLUMNS)
@pytest.mark.parametrize("value", VALUES)
def test_value_comes_back_through_the_orm(session: Session, engine: Engine, value: Any, field: str) -> None:
    session.add(Plugin(id=1, **{field: value}))
    session.commit()
    session.expire_all()
    loaded = getattr(session.get_one(Plugin, 1), field)
    assert loaded == value
    assert type(loaded) is type(value)
    (raw,) = stored(engine, field)
    assert isinstance(raw, str if field == "as_text" else bytes)


@pytest.mark.parametrize("field", COLUMNS)
@pytest.mark.parametrize("value", VALUES)
def test_value_comes_back_through_core(engine: Engine, value: Any, field: str) -> None:
    column = PLUGIN.c[field]
    with engine.begin() as connection:
        connection.execute(insert(PLUGIN), {"id": 1, field: value})
        connection.execute(insert(PLUGIN).values({"id": 2, field: value}))
        connection.execute(insert(PLUGIN), [{"id": number, field: value} for number in (3, 4)])
        connection.execute(insert(PLUGIN).values([{"id": number, field: value} for number in (5, 6)]))
        assert connection.scalars(select(column).order_by(PLUGIN.c.id)).all() == [value] * 6


@pytest.mark.parametrize("field", COLUMNS)
def test_what_is_stored_is_the_specified_frame(session: Session, engine: Engine, field: str) -> None:
    session.add(Plugin(**{field: VALUE}))
    session.commit()
    frame = frame_in(*stored(engine, field))
    payload = b"\x01" + json.dumps(VALUE, ensure_ascii=False, separators=(",", ":")).encode()
    assert frame[:2] == b"\xf9\x02"
    assert frame == reference.frame(KEY, f"plugin.{field}", frame[12:36], payload)


@pytest.mark.parametrize("field", COLUMNS)
def test_what_is_stored_holds_no_plaintext_and_differs_each_time(session: Session, engine: Engine, field: str) -> None:
    session.add_all(Plugin(**{field: VALUE}) for _ in range(20))
    session.commit()
    frames = [frame_in(raw) for raw in stored(engine, field)]
    assert len({frame[12:36] for frame in frames}) == len({frame[36:] for frame in frames}) == 20
    for raw, frame in zip(stored(engine, field), frames, strict=True):
        assert MARKER.encode() not in frame
        assert MARKER not in str(raw)
        assert frame[:2].hex() == "f902"


def test_long_list_of_rows_comes_back_in_order(session: Session) -> None:
    session.add_all(Plugin(id=number, as_binary=[number], as_text={"n": number}) for number in range(1, 501))
    session.commit()
    rows = session.execute(select(Plugin.id, Plugin.as_binary, Plugin.as_text).order_by(Plugin.id)).all()
    assert [tuple(row) for row in rows] == [(number, [number], {"n": number}) for number in range(1, 501)]


# --- NULL, null and defaults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", COLUMNS)
def test_none_is_sql_null(session: Session, engine: Engine, field: str) -> None:
    column = PLUGIN.c[field]
    session.add_all([Plugin(id=1, **{field: None}), Plugin(id=2), Plugin(id=3, **{field: VALUE})])
    session.execute(insert(PLUGIN), [{"id": 4, field: None}])
    session.execute(insert(PLUGIN).values({"id": 5, field: null()}))
    session.commit()
    assert stored(engine, field, where="id <> 3") == [None] * 4
    assert session.scalars(select(column).where(PLUGIN.c.id != 3)).all() == [None] * 4
    for condition in (column.is_(None), column == None, column.is_(null())):  # noqa: E711 - that is what is tested
        assert session.scalars(select(PLUGIN.c.id).where(condition).order_by(PLUGIN.c.id)).all() == [1, 2, 4, 5]
    assert session.scalars(select(PLUGIN.c.id).where(column.is_not(None))).all() == [3]


@pytest.mark.parametrize("field", COLUMNS)
def test_json_null_is_an_encrypted_null(session: Session, engine: Engine, field: str) -> None:
    session.add(Plugin(id=1, **{field: JSON.NULL}))
    session.commit()
    frame = frame_in(*stored(engine, field))
    assert frame == reference.frame(KEY, f"plugin.{field}", frame[12:36], b"\x01null")
    session.expire_all()
    assert getattr(session.get_one(Plugin, 1), field) is None
    assert session.scalars(select(PLUGIN.c.id).where(PLUGIN.c[field].is_(None))).all() == []


def test_update_to_none_is_sql_null(session: Session, engine: Engine) -> None:
    session.add(Plugin(id=1, as_binary=VALUE))
    session.commit()
    session.get_one(Plugin, 1).as_binary = None
    session.commit()
    assert stored(engine, "as_binary") == [None]


def test_defaults_are_encrypted(session: Session, engine: Engine) -> None:
    session.add_all([Plugin(id=1), Plugin(id=2)])
    session.execute(insert(PLUGIN), [{"id": 3}, {"id": 4}])
    session.commit()
    rows = session.execute(select(Plugin.by_default, Plugin.constant)).all()
    assert [tuple(row) for row in rows] == [({}, {"constant": [MARKER]})] * 4
    for column in ("by_default", "constant"):
        for raw in stored(engine, column):
            frame = frame_in(raw)
            assert frame[:2] == b"\xf9\x02"
            assert MARKER.encode() not in frame


def test_constant_default_is_not_shared_by_loaded_rows(session: Session) -> None:
    session.add_all([Plugin(id=1), Plugin(id=2)])
    session.commit()
    one, other = session.scalars(select(Plugin).order_by(Plugin.id))
    one.constant["constant"].append("changed")
    assert other.constant == {"constant": [MARKER]}


def test_value_of_onupdate_is_encrypted(session: Session, engine: Engine) -> None:
    session.add(Plugin(id=1, by_default={"first": 1}))
    session.commit()
    session.get_one(Plugin, 1).note = "changed"
    session.commit()
    assert session.get_one(Plugin, 1).by_default == {"updated": MARKER}
    assert MARKER.encode() not in frame_in(*stored(engine, "by_default"))


# --- Ways to write and read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", COLUMNS)
def test_bulk_insert_returns_what_was_written(session: Session, field: str) -> None:
    column = getattr(Plugin, field)
    rows = [{field: {"n": number}} for number in range(1_200)]
    returned = session.scalars(insert(Plugin).returning(column, sort_by_parameter_order=True), rows).all()
    assert returned == [{"n": number} for number in range(1_200)]
    inserted = session.scalars(insert(Plugin).returning(Plugin), [{field: VALUE}]).one()
    assert getattr(inserted, field) == VALUE


@pytest.mark.parametrize("field", COLUMNS)
def test_updates_are_encrypted_anew(session: Session, engine: Engine, field: str) -> None:
    column = getattr(Plugin, field)
    session.add(Plugin(id=1, **{field: [0]}))
    session.commit()
    seen = stored(engine, field)

    def check(value: Any) -> None:
        session.commit()
        session.expire_all()
        assert getattr(session.get_one(Plugin, 1), field) == value
        session.commit()
        (raw,) = stored(engine, field)
        assert raw not in seen
        assert MARKER.encode() not in frame_in(raw)
        seen.append(raw)

    setattr(session.get_one(Plugin, 1), field, {"attribute": MARKER})
    check({"attribute": MARKER})
    session.execute(update(Plugin).values({column: {"statement": MARKER}}))
    check({"statement": MARKER})
    session.execute(update(Plugin), [{"id": 1, field: {"bulk": MARKER}}])
    check({"bulk": MARKER})
    session.execute(update(PLUGIN).where(PLUGIN.c.id == 1), {field: {"core": MARKER}})
    check({"core": MARKER})
    session.merge(Plugin(id=1, **{field: {"merged": MARKER}}))
    check({"merged": MARKER})
    returned = session.scalars(update(Plugin).values({column: {"returned": MARKER}}).returning(column)).one()
    assert returned == {"returned": MARKER}
    check({"returned": MARKER})


def test_assigning_an_equal_value_writes_nothing(session: Session, engine: Engine) -> None:
    session.add(Plugin(id=1, as_binary={"a": [1]}))
    session.commit()
    before = stored(engine, "as_binary")
    plugin = session.get_one(Plugin, 1)
    assert plugin.as_binary == {"a": [1]}
    plugin.as_binary = {"a": [1]}
    session.commit()
    assert stored(engine, "as_binary") == before


def test_refresh_loads_what_another_transaction_wrote(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Plugin(id=1, as_binary=[1], as_text=[1]))
        session.commit()
        plugin = session.get_one(Plugin, 1)
        session.commit()
        with engine.begin() as other:
            other.execute(update(PLUGIN).values(as_binary=[2], as_text=[2]))
        session.refresh(plugin)
        assert (plugin.as_binary, plugin.as_text) == ([2], [2])


def test_upsert_encrypts_what_it_sets(engine: Engine) -> None:
    dialect_insert: Any = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[engine.dialect.name]
    with engine.begin() as connection:
        connection.execute(insert(PLUGIN), {"id": 1, "as_binary": ["first"]})
        statement = dialect_insert(PLUGIN).values(id=1, as_binary=["second"])
        statement = statement.on_conflict_do_update(
            index_elements=["id"], set_={"as_binary": statement.excluded.as_binary}
        )
        connection.execute(statement)
        assert connection.scalars(select(PLUGIN.c.as_binary)).all() == [["second"]]
        connection.execute(
            dialect_insert(PLUGIN)
            .values(id=1, as_binary=["third"])
            .on_conflict_do_update(index_elements=["id"], set_={"as_binary": {"set": MARKER}})
        )
        assert connection.scalars(select(PLUGIN.c.as_binary)).all() == [{"set": MARKER}]


def selections() -> dict[str, Any]:
    column = PLUGIN.c.as_binary
    alias, orm_alias = PLUGIN.alias("other"), aliased(Plugin)
    subquery = select(PLUGIN).subquery()
    nested = select(subquery.c.as_binary.label("renamed")).subquery()
    cte = select(column.label("in_cte")).cte()
    return {
        "column": select(column),
        "attribute": select(Plugin.as_binary),
        "label": select(column.label("labelled")),
        "alias": select(alias.c.as_binary),
        "aliased entity": select(orm_alias.as_binary),
        "subquery": select(subquery.c.as_binary),
        "renamed in a nested subquery": select(nested.c.renamed),
        "CTE": select(cte.c.in_cte),
        "scalar subquery": select(select(column).scalar_subquery()),
        "correlated subquery": select(select(column).where(PLUGIN.c.id == alias.c.id).scalar_subquery()).select_from(
            alias
        ),
        "union": union_all(select(column), select(column).where(PLUGIN.c.id < 0)),
        "type_coerce": select(type_coerce(literal_column("plugin.as_binary"), column.type)).select_from(PLUGIN),
        "text with columns": text("SELECT as_binary AS found FROM plugin").columns(found=column.type),
        "coalesce": select(func.coalesce(column, column)),
        "distinct": select(column).distinct(),
    }


@pytest.mark.parametrize("name", selections())
def test_value_is_decrypted_however_it_is_selected(engine: Engine, name: str) -> None:
    with engine.begin() as connection:
        connection.execute(insert(PLUGIN), {"id": 1, "as_binary": VALUE})
        statement = selections()[name]
        for _ in range(2):  # the second time from the cache of statements
            assert connection.execute(statement).scalars().all() == [VALUE]


def test_null_count_length_and_group_by_work_on_ciphertext(engine: Engine) -> None:
    column = PLUGIN.c.as_binary
    with engine.begin() as connection:
        connection.execute(insert(PLUGIN), [{"id": number, "as_binary": "x" * 10} for number in (1, 2, 3)])
        assert connection.scalar(select(func.count(column))) == 3
        # 36 bytes before the ciphertext, kind, quotes and ten characters, and the tag.
        assert set(connection.scalars(select(func.length(column)))) == {36 + 1 + 12 + 16}
        rows = connection.execute(select(PLUGIN.c.id, column, func.count()).group_by(PLUGIN.c.id, column)).all()
        assert sorted(tuple(row) for row in rows) == [(number, "x" * 10, 1) for number in (1, 2, 3)]


def test_rows_can_be_made_unique_as_with_plain_json(session: Session) -> None:
    session.add(Plugin(id=1, as_binary=VALUE, items=[Item(required=1), Item(required=2)]))
    session.commit()
    session.expire_all()
    plugin = session.scalars(select(Plugin).options(joinedload(Plugin.items))).unique().one()
    assert [item.required for item in plugin.items] == [1, 2]
    # The legacy query makes rows unique by itself.
    assert session.query(Plugin, Plugin.as_binary).all() == [(plugin, VALUE)]
    assert session.query(Plugin.as_binary).all() == [(VALUE,)]
    with pytest.raises(InvalidRequestError, match="non-hashable"):
        session.execute(select(Plugin, Plugin.as_binary)).unique().all()
    assert EncryptedJSON.hashable is JSON.hashable is False


def test_mutable_dict_tracks_changes(database_url: str) -> None:
    class OwnBase(DeclarativeBase):
        pass

    class Tracked(OwnBase):
        __tablename__ = "tracked"
        id: Mapped[int] = mapped_column(primary_key=True)
        first: Mapped[Any] = mapped_column(MutableDict.as_mutable(EncryptedJSON()))
        second: Mapped[Any] = mapped_column(MutableDict.as_mutable(EncryptedJSON(storage="text")))

    engine = create_engine(database_url)
    OwnBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Tracked(id=1, first={"a": 1}, second={"a": 1}))
        session.commit()
        tracked = session.get_one(Tracked, 1)
        tracked.first["b"] = 2
        tracked.second["c"] = 3
        session.commit()
        session.expire_all()
        assert (dict(tracked.first), dict(tracked.second)) == ({"a": 1, "b": 2}, {"a": 1, "c": 3})
    engine.dispose()


# --- The name that values are bound to -------------------------------------------------------------------------------


def type_of(column: Any) -> EncryptedJSON:
    assert isinstance(column.type, EncryptedJSON)
    return column.type


def name_of(column: Any) -> str | None:
    return type_of(column).column_name


@pytest.mark.parametrize("type_", [EncryptedJSON, EncryptedJSON(), EncryptedJSON(storage="text")], ids=repr)
def test_name_is_that_of_table_and_column(type_: Any) -> None:
    assert name_of(declared("users", Column("profile", type_)).c.profile) == "users.profile"


def test_name_has_no_schema() -> None:
    assert name_of(declared("users", Column("profile", EncryptedJSON()), schema="tenant").c.profile) == "users.profile"


def test_name_of_a_column_that_is_appended_later() -> None:
    table = declared("users")
    column: Column[Any] = Column("profile", EncryptedJSON())
    assert name_of(column) is None
    table.append_column(column)
    assert name_of(column) == "users.profile"


def test_name_can_be_pinned() -> None:
    column: Column[Any] = Column("profile", EncryptedJSON(associated_data="people.profile"))
    assert name_of(column) == "people.profile"
    assert name_of(declared("users", column).c.profile) == "people.profile"


def test_name_is_the_databases_and_not_pythons() -> None:
    registered = registry()

    @registered.mapped
    class User:
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        renamed: Mapped[Any] = mapped_column("db_name", EncryptedJSON)

    assert name_of(inspect(User).columns["renamed"]) == "users.db_name"
    table = declared("users", Column("db_name", EncryptedJSON(), key="renamed"))
    assert name_of(table.c.renamed) == "users.db_name"


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("benutzer_ü", "schlüssel_鍵"),
        ("my table", 'with "quotes"'),
        ("order", "select"),
        ("MiXed", "CaSe"),
        ("a.b", "c"),
    ],
)
def test_any_name_serves(engine: Engine, table: str, column: str) -> None:
    made = declared(table, Column(column, EncryptedJSON()))
    assert name_of(made.c[column]) == f"{table}.{column}"
    with engine.begin() as connection:
        made.create(connection)
        connection.execute(made.insert().values({"id": 1, column: VALUE}))
        assert connection.scalars(select(made.c[column])).all() == [VALUE]
    frame = frame_in(*stored(engine, column, table))
    assert frame[10:12] == reference.hint(f"{table}.{column}")


def test_quoted_name_gives_the_same_name() -> None:
    table = declared(quoted_name("users", quote=True), Column(quoted_name("profile", quote=True), EncryptedJSON()))
    name = name_of(table.c.profile)
    assert name == "users.profile"
    assert type(name) is str


def test_one_instance_in_two_columns_has_both_names(engine: Engine) -> None:
    shared = EncryptedJSON(storage="text")
    first = declared("first", Column("a", shared), Column("b", shared))
    second = declared("second", Column("a", shared))
    assert [name_of(column) for column in (first.c.a, first.c.b, second.c.a)] == ["first.a", "first.b", "second.a"]
    assert [type_of(column).storage for column in (first.c.a, first.c.b, second.c.a)] == ["text"] * 3
    with engine.begin() as connection:
        for table in (first, second):
            table.create(connection)
        connection.execute(insert(first), {"id": 1, "a": ["a"], "b": ["b"]})
        connection.execute(insert(second), {"id": 1, "a": ["second"]})
        assert connection.execute(select(first.c.a, first.c.b, second.c.a).join(second, true())).one() == (
            ["a"],
            ["b"],
            ["second"],
        )
    for column, name in (("a", "first"), ("b", "first"), ("a", "second")):
        frame = frame_in(*stored(engine, column, name))
        assert frame[10:12] == reference.hint(f"{name}.{column}")


def test_one_pinned_instance_in_two_columns_keeps_the_pinned_name() -> None:
    shared = EncryptedJSON(associated_data="pinned.name")
    table = declared("t", Column("a", shared), Column("b", shared))
    assert [name_of(table.c.a), name_of(table.c.b)] == ["pinned.name"] * 2


def test_names_in_mixins_and_abstract_bases() -> None:
    class OwnBase(DeclarativeBase):
        pass

    class Mixin:
        mixed: Mapped[Any] = mapped_column(EncryptedJSON())
        as_class: Mapped[Any] = mapped_column(EncryptedJSON)

        @declared_attr
        def by_function(self) -> Mapped[Any]:
            return mapped_column(EncryptedJSON())

    class Abstract(OwnBase):
        __abstract__ = True
        id: Mapped[int] = mapped_column(primary_key=True)
        inherited: Mapped[Any] = mapped_column(EncryptedJSON())

    class First(Mixin, Abstract):
        __tablename__ = "first"

    class Second(Mixin, Abstract):
        __tablename__ = "second"

    for name, model in (("first", inspect(First)), ("second", inspect(Second))):
        for column in ("mixed", "as_class", "by_function", "inherited"):
            assert name_of(model.columns[column]) == f"{name}.{column}"


def test_names_in_joined_single_table_and_concrete_inheritance() -> None:
    class OwnBase(DeclarativeBase):
        pass

    class Parent(OwnBase):
        __tablename__ = "parent"
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "parent"}  # noqa: RUF012 - SQLAlchemy's way
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        base: Mapped[Any] = mapped_column(EncryptedJSON)

    class Joined(Parent):
        __tablename__ = "joined"
        __mapper_args__ = {"polymorphic_identity": "joined"}  # noqa: RUF012 - SQLAlchemy's way
        id: Mapped[int] = mapped_column(ForeignKey("parent.id"), primary_key=True)
        own: Mapped[Any] = mapped_column(EncryptedJSON)

    class Single(Parent):
        __mapper_args__ = {"polymorphic_identity": "single"}  # noqa: RUF012 - SQLAlchemy's way
        extra: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)

    class Concrete(Parent):
        __tablename__ = "concrete"
        __mapper_args__ = {"concrete": True, "polymorphic_identity": "concrete"}  # noqa: RUF012 - SQLAlchemy's way
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        base: Mapped[Any] = mapped_column(EncryptedJSON)

    assert name_of(inspect(Joined).columns["base"]) == "parent.base"
    assert name_of(inspect(Joined).columns["own"]) == "joined.own"
    assert name_of(inspect(Single).columns["extra"]) == "parent.extra"
    assert name_of(inspect(Single).columns["base"]) == "parent.base"
    assert name_of(inspect(Concrete).columns["base"]) == "concrete.base"

    engine = create_engine("sqlite://")
    OwnBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(
            [Joined(base=["j"], own=["own"]), Single(base=["s"], extra=["x"]), Concrete(kind="c", base=["c"])]
        )
        session.commit()
        session.expire_all()
        joined, single = session.scalars(select(Parent).order_by(Parent.kind)).all()
        assert isinstance(joined, Joined)
        assert isinstance(single, Single)
        assert (joined.base, joined.own, single.base, single.extra) == (["j"], ["own"], ["s"], ["x"])
        assert session.scalars(select(Concrete.base)).all() == [["c"]]
    engine.dispose()


@pytest.mark.parametrize("mapped_to", [EncryptedJSON, EncryptedJSON(), EncryptedJSON(storage="text")], ids=repr)
def test_names_by_type_annotation_map(mapped_to: Any) -> None:
    class OwnBase(DeclarativeBase):
        type_annotation_map = {dict[str, Any]: mapped_to}  # noqa: RUF012 - SQLAlchemy's way

    class First(OwnBase):
        __tablename__ = "first"
        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[dict[str, Any]]
        b: Mapped[dict[str, Any] | None]

    class Second(OwnBase):
        __tablename__ = "second"
        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[dict[str, Any]]

    assert [name_of(inspect(First).columns[name]) for name in "ab"] == ["first.a", "first.b"]
    assert name_of(inspect(Second).columns["a"]) == "second.a"
    assert inspect(First).columns["b"].nullable


def test_names_of_an_annotated_column() -> None:
    class OwnBase(DeclarativeBase):
        pass

    encrypted = Annotated[dict[str, Any], mapped_column(EncryptedJSON())]

    class First(OwnBase):
        __tablename__ = "first"
        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[encrypted]
        b: Mapped[encrypted]

    assert [name_of(inspect(First).columns[name]) for name in "ab"] == ["first.a", "first.b"]


def test_names_of_copied_tables() -> None:
    table = declared(
        "users", Column("profile", EncryptedJSON()), Column("pinned", EncryptedJSON(associated_data="pinned.name"))
    )
    copied = table.to_metadata(MetaData())
    renamed = table.to_metadata(MetaData(), name="people", schema="other")
    assert [name_of(column) for column in (copied.c.profile, copied.c.pinned)] == ["users.profile", "pinned.name"]
    assert [name_of(column) for column in (renamed.c.profile, renamed.c.pinned)] == ["people.profile", "pinned.name"]
    assert [name_of(column) for column in (table.c.profile, table.c.pinned)] == ["users.profile", "pinned.name"]


def test_column_that_overrides_a_reflected_one_has_its_name(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(insert(PLUGIN), {"id": 1, "as_binary": VALUE})
    reflected = Table("plugin", MetaData(), Column("as_binary", EncryptedJSON()), autoload_with=engine)
    assert name_of(reflected.c.as_binary) == "plugin.as_binary"
    with engine.connect() as connection:
        assert connection.scalars(select(reflected.c.as_binary)).all() == [VALUE]


def test_column_property_and_query_expression_keep_the_name(engine: Engine) -> None:
    registered = registry()

    @registered.mapped
    class View:
        __table__ = Table(
            "plugin", MetaData(), Column("id", Integer, primary_key=True), Column("as_binary", EncryptedJSON())
        )
        again = column_property(__table__.c.as_binary.label("again"))

    with Session(engine) as session:
        session.execute(insert(PLUGIN), {"id": 1, "as_binary": VALUE})
        assert session.scalars(select(View.again)).one() == VALUE


def test_renamed_table_reads_earlier_values_under_the_pinned_name(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(insert(PLUGIN), {"id": 1, "as_binary": VALUE})
        connection.execute(text("ALTER TABLE plugin RENAME TO extension"))
        unpinned = declared("extension", Column("as_binary", EncryptedJSON()))
        with pytest.raises(errors.WrongColumnError, match="associated_data"):
            connection.scalars(select(unpinned.c.as_binary)).all()
        pinned = declared("extension", Column("as_binary", EncryptedJSON(associated_data="plugin.as_binary")))
        assert connection.scalars(select(pinned.c.as_binary)).all() == [VALUE]


@pytest.mark.parametrize("schema", ["tenant_a", "tenant_b"])
def test_table_in_a_schema_has_values_that_another_schema_reads(engine: Engine, schema: str) -> None:
    table = declared("users", Column("profile", EncryptedJSON()), schema="tenant_a")
    with engine.connect() as connection:
        for name in ("tenant_a", "tenant_b"):
            create = {"postgresql": f"CREATE SCHEMA {name}", "sqlite": f"ATTACH ':memory:' AS {name}"}
            connection.exec_driver_sql(create[engine.dialect.name])
            connection.exec_driver_sql(
                f"CREATE TABLE {name}.users (id INTEGER PRIMARY KEY, "
                f"profile {'BYTEA' if engine.dialect.name == 'postgresql' else 'BLOB'})"
            )
        translated = connection.execution_options(schema_translate_map={"tenant_a": schema})
        translated.execute(insert(table), {"id": 1, "profile": VALUE})
        assert translated.scalars(select(table.c.profile)).all() == [VALUE]
        connection.exec_driver_sql(f"INSERT INTO tenant_b.users SELECT id + 1, profile FROM {schema}.users")  # noqa: S608 - fixed
        everywhere = connection.execution_options(schema_translate_map={"tenant_a": "tenant_b"})
        assert everywhere.scalars(select(table.c.profile).where(table.c.id == 2)).all() == [VALUE]


def test_statements_that_differ_in_the_column_only_share_no_processor(engine: Engine) -> None:
    one, other = declared("one", Column("s", EncryptedJSON())), declared("other", Column("s", EncryptedJSON()))
    both = declared("both", Column("s", LargeBinary()))
    frames = [
        {"id": 1, "s": reference.frame(KEY, "one.s", os.urandom(24), b'\x01"one"')},
        {"id": 2, "s": reference.frame(KEY, "other.s", os.urandom(24), b'\x01"other"')},
    ]

    def reading(type_: Any, row: int) -> Any:
        return select(type_coerce(literal_column("s"), type_)).select_from(both).where(both.c.id == row)

    def writing(type_: Any, row: int) -> Any:
        return update(both).where(both.c.id == row).values(s=bindparam("value", ["new"], type_=type_))

    with engine.begin() as connection:
        both.create(connection)
        connection.execute(insert(both), frames)
        for _ in range(2):
            assert connection.scalars(reading(one.c.s.type, 1)).all() == ["one"]
            assert connection.scalars(reading(other.c.s.type, 2)).all() == ["other"]
            assert connection.scalars(reading(EncryptedJSON(associated_data="one.s"), 1)).all() == ["one"]
            assert connection.scalars(reading(EncryptedJSON(associated_data="other.s"), 2)).all() == ["other"]
            for type_, row in ((one.c.s.type, 2), (other.c.s.type, 1), (EncryptedJSON(associated_data="one.s"), 2)):
                with pytest.raises(errors.WrongColumnError):
                    connection.scalars(reading(type_, row)).all()
            with pytest.raises(errors.ColumnError):
                connection.scalars(reading(EncryptedJSON(), 1)).all()
        for type_, row in ((one.c.s.type, 1), (other.c.s.type, 2), (one.c.s.type, 1)):
            connection.execute(writing(type_, row))
        hints = [bytes(frame)[10:12] for frame in connection.scalars(select(both.c.s).order_by(both.c.id))]
    assert hints == [reference.hint("one.s"), reference.hint("other.s")]


def test_statements_that_differ_in_the_storage_only_share_no_processor(sqlite_url: str) -> None:
    """As when a column is copied from one storage to the other under one name; SQLite has a column for both."""
    engine = create_engine(sqlite_url)
    table = declared("one", Column("s", LargeBinary()))
    frame = reference.frame(KEY, "one.s", os.urandom(24), b'\x01"one"')
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(text("INSERT INTO one VALUES (1, :s)"), {"s": frame})
        connection.execute(text("INSERT INTO one VALUES (2, :s)"), {"s": reference.text(frame)})
        for row, storage, kind in ((1, "binary", "blob"), (2, "text", "text")) * 2:
            type_ = EncryptedJSON(associated_data="one.s", storage=storage)
            of_row = table.c.id == row
            assert (
                connection.scalar(select(type_coerce(literal_column("s"), type_)).select_from(table).where(of_row))
                == "one"
            )
            connection.execute(update(table).where(of_row).values(s=bindparam("value", "one", type_=type_)))
            assert connection.scalar(select(func.typeof(table.c.s)).where(of_row)) == kind
    engine.dispose()


def test_types_are_cached_by_name_and_storage() -> None:
    def key(*columns: Any) -> Any:
        return select(*columns)._generate_cache_key()

    table = declared("t", Column("a", EncryptedJSON()), Column("b", EncryptedJSON()))
    named_alike = declared("t", Column("a", EncryptedJSON()))
    coerced = [
        type_coerce(literal_column("x"), type_)
        for type_ in (
            table.c.a.type,
            table.c.b.type,
            EncryptedJSON(associated_data="t.c"),
            EncryptedJSON(associated_data="t.c", storage="text"),
        )
    ]
    keys = [key(one) for one in coerced]
    assert all(one is not None for one in keys)
    assert len({one.key for one in keys}) == 4
    assert key(type_coerce(literal_column("x"), named_alike.c.a.type)) == keys[0]


# --- Types that belong to no column ----------------------------------------------------------------------------------


def test_type_of_no_column_neither_encrypts_nor_decrypts(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(insert(PLUGIN), {"id": 1, "as_binary": VALUE, "as_text": VALUE})
        reads: list[Any] = [
            select(type_coerce(PLUGIN.c.as_binary, EncryptedJSON())),
            select(type_coerce(PLUGIN.c.as_text, EncryptedJSON(storage="text"))),
            text("SELECT as_binary FROM plugin").columns(as_binary=EncryptedJSON()),
            select(literal_column("as_binary", EncryptedJSON)).select_from(PLUGIN),
        ]
        for statement in reads:
            with pytest.raises(errors.ColumnError, match=r"belongs to no column.*associated_data='table\.column'"):
                connection.execute(statement).all()
        writes: list[Any] = [
            select(literal({"a": MARKER}, EncryptedJSON())),
            text("SELECT :value").bindparams(bindparam("value", {"a": MARKER}, type_=EncryptedJSON())),
            update(PLUGIN).values(as_binary=type_coerce({"a": MARKER}, EncryptedJSON())),
        ]
        for statement in writes:
            with pytest.raises(errors.ColumnError) as caught:
                connection.execute(statement)
            assert leaked(caught.value, MARKER) == []


def test_pinned_type_of_no_column_serves(engine: Engine) -> None:
    with engine.begin() as connection:
        value = literal(VALUE, EncryptedJSON(associated_data="plugin.as_binary"))
        connection.execute(update(PLUGIN).values(as_binary=value))
        connection.execute(insert(PLUGIN), {"id": 1})
        connection.execute(update(PLUGIN).values(as_binary=value))
        assert connection.scalars(select(PLUGIN.c.as_binary)).all() == [VALUE]
        assert connection.scalars(select(value)).all() == [VALUE]


def test_array_of_values_is_refused(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    table = declared("arrays", Column("values", ARRAY(EncryptedJSON())))
    with engine.connect() as connection:
        table.create(connection)
        with pytest.raises(errors.ColumnError) as caught:
            connection.execute(insert(table), {"id": 1, "values": [{"a": MARKER}]})
    engine.dispose()
    assert leaked(caught.value, MARKER) == []


def test_variant_of_another_type_neither_encrypts_nor_stores_plaintext(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    table = declared("variants", Column("value", LargeBinary().with_variant(EncryptedJSON(), "sqlite")))
    with engine.connect() as connection:
        table.create(connection)
        with pytest.raises(errors.ColumnError) as caught:
            connection.execute(insert(table), {"id": 1, "value": {"a": MARKER}})
    engine.dispose()
    assert leaked(caught.value, MARKER) == []


# --- Values that are not what was written ----------------------------------------------------------------------------


def test_value_moved_to_another_column_is_refused(engine: Engine) -> None:
    table = declared("people", Column("ssn", EncryptedJSON()), Column("phone", EncryptedJSON()))
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(insert(table), {"id": 1, "ssn": MARKER, "phone": "555"})
        connection.exec_driver_sql("UPDATE people SET ssn = phone, phone = ssn")
        for column, name in ((table.c.ssn, "people.ssn"), (table.c.phone, "people.phone")):
            with pytest.raises(errors.WrongColumnError, match=name) as caught:
                connection.scalars(select(column)).all()
            assert leaked(caught.value, MARKER) == []


def test_value_moved_to_another_row_is_read(engine: Engine) -> None:
    """Binding to the row is something that a column will have to ask for."""
    with engine.begin() as connection:
        connection.execute(insert(PLUGIN), [{"id": 1, "as_binary": ["one"]}, {"id": 2, "as_binary": ["two"]}])
        connection.exec_driver_sql("UPDATE plugin SET as_binary = (SELECT p.as_binary FROM plugin p WHERE p.id = 1)")
        assert connection.scalars(select(PLUGIN.c.as_binary).order_by(PLUGIN.c.id)).all() == [["one"], ["one"]]


LEGACY = "enc:v1:AAAAAAAAAAAAAAAAAAAA:BBBBBBBBBBBBBBBBBBBB"


@pytest.mark.parametrize("plaintext", ["", "hello", MARKER, f'{{"a": "{MARKER}"}}', LEGACY, "enc:v3:", "null"])
@pytest.mark.parametrize("field", COLUMNS)
def test_plaintext_in_the_column_is_refused(engine: Engine, field: str, plaintext: str) -> None:
    if field == "as_text":
        changes: list[Any] = [plaintext]
    elif engine.dialect.name == "postgresql":
        changes = [plaintext.encode()]
    else:
        changes = [plaintext.encode(), plaintext]
    for change in changes:
        with Session(engine) as session:
            session.add(Plugin(id=1, **{field: VALUE}))
            session.flush()
            session.execute(text(f"UPDATE plugin SET {field} = :value"), {"value": change})  # noqa: S608 - fixed
            session.expire_all()
            with pytest.raises(errors.MalformedCiphertextError) as caught:
                session.get_one(Plugin, 1)
            assert leaked(caught.value, MARKER, "hello") == []
            with pytest.raises(errors.MalformedCiphertextError):
                session.connection().scalars(select(PLUGIN.c[field])).all()


@pytest.mark.parametrize("change", [5, 1.5], ids=repr)
@pytest.mark.parametrize("field", COLUMNS)
def test_number_in_the_column_is_refused(sqlite_url: str, field: str, change: float) -> None:
    """SQLite stores whatever it is given."""
    engine = create_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(PLUGIN), {"id": 1, field: VALUE})
        connection.execute(text(f"UPDATE plugin SET {field} = :value"), {"value": change})  # noqa: S608 - fixed
        with pytest.raises(errors.MalformedCiphertextError):
            connection.scalars(select(PLUGIN.c[field])).all()
    engine.dispose()


@pytest.mark.parametrize("field", COLUMNS)
def test_altered_truncated_and_foreign_values_are_refused(engine: Engine, field: str) -> None:
    name = f"plugin.{field}"
    good = reference.frame(KEY, name, os.urandom(24), b'\x01"' + MARKER.encode() + b'"')
    foreign_key = os.urandom(32)
    cases = [
        (good[:-1] + bytes([good[-1] ^ 1]), errors.AuthenticationError),
        (good[:-1], errors.AuthenticationError),
        (good[:51], errors.MalformedCiphertextError),
        (b"\xf9\x03" + good[2:], errors.UnsupportedAlgorithmError),
        (reference.frame(foreign_key, name, os.urandom(24), b"\x011"), errors.UnknownKeyError),
        (reference.frame(KEY, "other.name", os.urandom(24), b"\x011"), errors.WrongColumnError),
        (reference.frame(KEY, name, os.urandom(24), b"\x03" + MARKER.encode()), errors.MalformedPayloadError),
        (reference.frame(KEY, name, os.urandom(24), b'\x01{"' + MARKER.encode()), errors.MalformedPayloadError),
    ]
    with engine.begin() as connection:
        connection.execute(insert(PLUGIN), {"id": 1})
        for frame, expected in [(good, None), *cases]:
            value: Any = reference.text(frame) if field == "as_text" else frame
            connection.execute(text(f"UPDATE plugin SET {field} = :value"), {"value": value})  # noqa: S608 - fixed
            if expected is None:
                assert connection.scalars(select(PLUGIN.c[field])).all() == [MARKER]
                continue
            with pytest.raises(expected) as caught:
                connection.scalars(select(PLUGIN.c[field])).all()
            assert type(caught.value) is expected
            assert leaked(caught.value, MARKER, frame[12:36], frame[36:]) == []


# --- What the database sees -------------------------------------------------------------------------------------------

DIALECTS: dict[str, Any] = {
    module.__name__.rpartition(".")[2]: module.dialect() for module in (mysql, postgresql, sqlite)
}


@pytest.mark.parametrize(
    ("dialect", "storage", "expected"),
    [
        ("postgresql", "binary", "BYTEA"),
        ("postgresql", "text", 'TEXT COLLATE "C"'),
        ("sqlite", "binary", "BLOB"),
        ("sqlite", "text", "TEXT"),
        ("mysql", "binary", "LONGBLOB"),
        ("mysql", "text", "LONGTEXT CHARACTER SET ascii COLLATE ascii_bin"),
    ],
)
def test_database_type_of_each_storage(dialect: str, storage: str, expected: str) -> None:
    table = Table("t", MetaData(), Column("value", EncryptedJSON(storage=storage)))
    ddl = str(CreateTable(table).compile(dialect=DIALECTS[dialect]))
    assert ddl.partition("value ")[2].partition("\n")[0].strip() == expected


# --- Copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "type_",
    [EncryptedJSON(), EncryptedJSON(associated_data="a.b"), EncryptedJSON(associated_data="a.b", storage="text")],
    ids=repr,
)
def test_repr_makes_the_same_type_again(type_: EncryptedJSON) -> None:
    again = eval(repr(type_), {"EncryptedJSON": EncryptedJSON})  # noqa: S307 - what a migration does with it
    assert (again.associated_data, again.storage) == (type_.associated_data, type_.storage)


def pickled(value: Any) -> Any:
    dumped = pickle.dumps(value)
    assert KEY not in dumped
    assert reference.expand(KEY, "aead/02") not in dumped
    return pickle.loads(dumped)  # noqa: S301 - just written


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, copy.copy, lambda type_: type_.copy()])
@pytest.mark.parametrize("name", [None, "pinned.name"])
def test_copy_of_a_type_keeps_the_name(copied: Callable[[Any], Any], name: str | None) -> None:
    table = declared("t", Column("c", EncryptedJSON(associated_data=name, storage="text")))
    copy_of_type = copied(table.c.c.type)
    assert copy_of_type.column_name == (name or "t.c")
    assert copy_of_type.storage == "text"
    assert copied(EncryptedJSON(associated_data=name)).column_name == name


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_copy_of_all_tables_reads_and_writes(engine: Engine, copied: Callable[[Any], Any]) -> None:
    original = MetaData()
    Table("plugin", original, Column("id", Integer, primary_key=True), Column("as_binary", EncryptedJSON()))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE item")
        connection.exec_driver_sql("DROP TABLE plugin")
        original.create_all(connection)
        # Use makes SQLAlchemy remember things on the type.
        connection.execute(insert(original.tables["plugin"]), {"id": 1, "as_binary": VALUE})
        assert connection.scalars(select(original.tables["plugin"].c.as_binary)).all() == [VALUE]
        table = copied(original).tables["plugin"]
        assert table is not original.tables["plugin"]
        assert connection.scalars(select(table.c.as_binary)).all() == [VALUE]
        connection.execute(insert(table), {"id": 2, "as_binary": ["copy"]})
        assert connection.scalars(select(PLUGIN.c.as_binary).where(PLUGIN.c.id == 2)).all() == [["copy"]]


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_copy_of_a_pickled_table_has_its_own_name(copied: Callable[[Any], Any]) -> None:
    metadata = copied(declared("t", Column("c", EncryptedJSON())).metadata)
    renamed = metadata.tables["t"].to_metadata(MetaData(), name="renamed")
    assert name_of(renamed.c.c) == "renamed.c"
    assert name_of(metadata.tables["t"].c.c) == "t.c"


def test_error_of_an_unstorable_value_names_the_column(session: Session) -> None:
    session.add(Plugin(as_text=UNSTORABLE))
    with pytest.raises(
        errors.UnstorableValueError, match=r"^plugin\.as_text: The value at \$\.bad, of type tuple"
    ) as caught:
        session.flush()
    assert (caught.value.path, caught.value.type_name) == ("$.bad", "tuple")
    assert caught.value.__context__ is None


# --- Nothing is shown ------------------------------------------------------------------------------------------------


def literal_statements() -> dict[str, Any]:
    value = {"token": MARKER}
    table_value = values(
        Column("x", EncryptedJSON(associated_data="plugin.as_binary")), name="v", literal_binds=True
    ).data([(value,)])
    return {
        "insert": insert(PLUGIN).values(as_binary=value),
        "insert text": insert(PLUGIN).values(as_text=value),
        "update": update(PLUGIN).values(as_binary=value),
        "literal": select(literal(value, EncryptedJSON(associated_data="plugin.as_binary"))),
        "literal of a type of no column": select(literal(value, EncryptedJSON())),
        "literal_execute": select(bindparam("v", value, type_=PLUGIN.c.as_binary.type, literal_execute=True)),
        "values": select(table_value),
    }


@pytest.mark.parametrize("name", literal_statements())
def test_value_is_never_rendered_into_sql(engine: Engine, name: str) -> None:
    statement = literal_statements()[name]
    with pytest.raises(errors.ColumnError, match="cannot be rendered into SQL text") as caught:
        statement.compile(engine, compile_kwargs={"literal_binds": True})
    assert leaked(caught.value, MARKER) == []
    if name in {"literal_execute", "values"}:
        with engine.connect() as connection, pytest.raises(errors.ColumnError) as caught:
            connection.execute(statement)
        assert leaked(caught.value, MARKER) == []


class Failing(dict[str, Any]):
    """Stands for a value whose own class fails while it is looked at."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        raise RuntimeError(MARKER)


@pytest.mark.parametrize("field", COLUMNS)
def test_error_of_a_value_whose_class_fails_is_not_wrapped(sqlite_url: str, field: str) -> None:
    engine = create_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with engine.connect() as connection, pytest.raises(errors.UnstorableValueError) as caught:
        connection.execute(insert(PLUGIN), {"note": NEIGHBOUR, field: Failing(a=MARKER)})
    engine.dispose()
    assert leaked(caught.value, MARKER, NEIGHBOUR) == []


def test_error_of_a_deep_value_in_a_deep_stack_is_not_wrapped(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    Base.metadata.create_all(engine)
    value: Any = MARKER
    for _ in range(400):
        value = {"deeper": value}

    def at_depth(frames: int) -> None:
        if frames:
            at_depth(frames - 1)
        else:
            with Session(engine) as session:
                session.add(Plugin(note=NEIGHBOUR, as_binary=value))
                session.flush()

    with pytest.raises(errors.UnstorableValueError, match="nested more than 254 levels") as caught:
        at_depth(500)
    engine.dispose()
    assert leaked(caught.value, MARKER, NEIGHBOUR) == []


# --- Threads ---------------------------------------------------------------------------------------------------------

THREADS = 8
ROUND_TRIPS = 500


def test_threads_share_types_and_keyring(database_url: str, keyring: Keyring) -> None:
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if database_url.startswith("sqlite") else {}
    engine = create_engine(database_url, pool_size=THREADS, **options)
    Base.metadata.create_all(engine)

    def work(thread: int) -> int:
        done = 0
        with use_keyring(keyring), engine.connect() as connection:
            for number in range(ROUND_TRIPS):
                row = thread * ROUND_TRIPS + number
                value = {"thread": thread, "number": number, "token": MARKER}
                connection.execute(insert(PLUGIN), {"id": row, "as_binary": value, "as_text": value})
                found = connection.execute(select(PLUGIN.c.as_binary, PLUGIN.c.as_text).where(PLUGIN.c.id == row)).one()
                done += tuple(found) == (value, value)
                if number % 50 == 49:
                    connection.commit()
        return done

    with ThreadPoolExecutor(THREADS) as threads:
        assert list(threads.map(work, range(THREADS))) == [ROUND_TRIPS] * THREADS
    frames = [frame_in(raw) for column in COLUMNS for raw in stored(engine, column)]
    engine.dispose()
    assert len({frame[12:36] for frame in frames}) == len(frames) == 2 * THREADS * ROUND_TRIPS
