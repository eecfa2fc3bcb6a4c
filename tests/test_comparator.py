"""Operators of encrypted columns: which are refused, where, and with what message."""

from collections.abc import Callable, Iterator
from operator import add, and_, eq, floordiv, ge, gt, le, lshift, lt, mod, mul, ne, neg, or_, rshift, sub, truediv
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    create_engine,
    insert,
    null,
    select,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    column_property,
    foreign,
    mapped_column,
    relationship,
)
from sqlalchemy.types import LargeBinary

from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, EncryptedString, Keyring, use_keyring
from sqlalchemy_kravn_crypto.exceptions import UnsupportedOperationError
from tests.leaks import leaked

MARKER = "S3CR3T" + "-marker"
SECRET = {"token": MARKER}


class Base(DeclarativeBase):
    pass


class Plugin(Base):
    __tablename__ = "plugins"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    credentials: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)
    token: Mapped[str | None] = mapped_column("in_database", EncryptedString(storage="text"))
    pinned: Mapped[Any] = mapped_column(EncryptedJSON(associated_data="earlier.name"), nullable=True)
    uses: Mapped[list["Use"]] = relationship(back_populates="plugin")

    @hybrid_property
    def secret(self) -> Any:
        return self.credentials


class Use(Base):
    __tablename__ = "uses"

    id: Mapped[int] = mapped_column(primary_key=True)
    plugin_id: Mapped[int | None] = mapped_column(ForeignKey("plugins.id"))
    details: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)
    plugin: Mapped[Plugin | None] = relationship(back_populates="uses")


TABLE = Base.metadata.tables["plugins"]


class View(Base):
    __table__ = TABLE
    __mapper_args__ = {"exclude_properties": ["token"]}  # noqa: RUF012 - SQLAlchemy's way
    again = column_property(TABLE.c.credentials)


def expressions() -> dict[str, tuple[Any, str]]:
    """Return expressions that are encrypted, each with what messages call it."""
    column = TABLE.c.credentials
    subquery, named = select(Plugin).subquery(), select(TABLE).subquery("named")
    return {
        "attribute": (Plugin.credentials, "Plugin.credentials"),
        "attribute with another name than its column": (Plugin.token, "Plugin.token"),
        "aliased": (aliased(Plugin).credentials, "Plugin.credentials"),
        "named alias": (aliased(Plugin, name="other").credentials, "Plugin.credentials"),
        "hybrid": (Plugin.secret, "Plugin.credentials"),
        "column_property": (View.again, "View.again"),
        "label of an attribute": (Plugin.credentials.label("x"), "Plugin.credentials"),
        "column": (column, "plugins.credentials"),
        "column with a pinned name": (TABLE.c.pinned, "plugins.pinned"),
        "label of a column with a pinned name": (select(TABLE).subquery().c.pinned.label("x"), "plugins.pinned"),
        "column with another name than its attribute": (TABLE.c.in_database, "plugins.in_database"),
        "label": (column.label("x"), "plugins.credentials"),
        "label of a label": (column.label("x").label("y"), "plugins.credentials"),
        "alias": (TABLE.alias("other").c.credentials, "plugins.credentials"),
        "subquery": (subquery.c.credentials, "plugins.credentials"),
        "named subquery": (named.c.credentials, "plugins.credentials"),
        "label in a subquery": (select(column.label("x")).subquery().c.x, "plugins.credentials"),
        "CTE": (select(TABLE).cte().c.credentials, "plugins.credentials"),
        "lateral": (select(TABLE).lateral().c.credentials, "plugins.credentials"),
        "union": (union_all(select(TABLE), select(TABLE)).subquery().c.credentials, "plugins.credentials"),
        "scalar subquery": (select(column).scalar_subquery(), "plugins.credentials"),
        "type_coerce": (type_coerce(Plugin.name, column.type), "plugins.credentials"),
    }


EXPRESSIONS = expressions()


def before(operator: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    return lambda x: operator(x, 1)


def after(operator: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    return lambda x: operator(1, x)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "==": lambda x: x == SECRET,
    "!=": lambda x: x != SECRET,
    "== text": lambda x: x == MARKER,
    "<": lambda x: x < MARKER,
    "<=": lambda x: x <= MARKER,
    ">": lambda x: x > MARKER,
    ">=": lambda x: x >= MARKER,
    "in_": lambda x: x.in_([SECRET]),
    "not_in": lambda x: x.not_in([MARKER]),
    "in_ of a subquery": lambda x: x.in_(select(TABLE.c.name)),
    "in_ of nothing": lambda x: x.in_([]),
    "like": lambda x: x.like(MARKER),
    "not_like": lambda x: x.not_like(MARKER),
    "ilike": lambda x: x.ilike(MARKER),
    "between": lambda x: x.between(MARKER, MARKER),
    "contains": lambda x: x.contains(MARKER),
    "icontains": lambda x: x.icontains(MARKER),
    "startswith": lambda x: x.startswith(MARKER),
    "endswith": lambda x: x.endswith(MARKER),
    "regexp_match": lambda x: x.regexp_match(MARKER),
    "regexp_replace": lambda x: x.regexp_replace(MARKER, MARKER),
    "match": lambda x: x.match(MARKER),
    "concat": lambda x: x.concat(MARKER),
    "op": lambda x: x.op("->")(MARKER),
    "bool_op": lambda x: x.bool_op("@>")(MARKER),
    "is_ of a value": lambda x: x.is_(True),
    "is_not of a value": lambda x: x.is_not(MARKER),
    "is_distinct_from": lambda x: x.is_distinct_from(SECRET),
    "is_not_distinct_from": lambda x: x.is_not_distinct_from(SECRET),
    "is_distinct_from another column": lambda x: x.is_distinct_from(TABLE.c.in_database),
    "key": lambda x: x[MARKER],
    "position": lambda x: x[0],
    "slice": lambda x: x[1:2],
    "list": list,
    "in": lambda x: SECRET in x,
    "desc": lambda x: x.desc(),
    "asc": lambda x: x.asc(),
    "nulls_first": lambda x: x.nulls_first(),
    "nulls_last": lambda x: x.nulls_last(),
    "distinct": lambda x: x.distinct(),
    "collate": lambda x: x.collate("C"),
    "any_": lambda x: x.any_(),
    "all_": lambda x: x.all_(),
    "~": lambda x: ~x,
    "-x": neg,
    "bitwise_and": lambda x: x.bitwise_and(1),
    **{f"x {operator.__name__} 1": before(operator) for operator in (add, sub, mul, mod, lshift, rshift)},
    **{f"1 {operator.__name__} x": after(operator) for operator in (add, sub, mul, truediv, floordiv, mod)},
    "text + x": lambda x: MARKER + x,
    "x + column": lambda x: x + TABLE.c.name,
    "x < column": lambda x: x < TABLE.c.name,
    "x | y": lambda x: or_(x, x),
    "x & y": lambda x: and_(x, x),
}


def refusal(operation: Callable[[], Any]) -> str:
    """Return the message with which an operation is refused where it is written."""
    with pytest.raises(UnsupportedOperationError) as caught:
        operation()
    assert type(caught.value) is UnsupportedOperationError
    assert leaked(caught.value, MARKER) == []
    assert caught.value.__context__ is None
    return str(caught.value)


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operator_is_refused_where_it_is_written(expression: str, operation: str) -> None:
    written, name = EXPRESSIONS[expression]
    message = refusal(lambda: OPERATIONS[operation](written))
    assert message.startswith(f"{name} is encrypted, and equal values have different ciphertexts, so '")
    assert "cannot be done in SQL. " in message
    assert "Python" in message


@pytest.mark.parametrize(
    ("operation", "symbol", "instead"),
    [
        ("==", "==", "Only is_(None) and is_not(None) can be asked"),
        ("<", "<", "Select by other columns"),
        ("like", "like", "Select by other columns"),
        ("in_", "in", "Select by other columns"),
        ("op", "->", "compute in Python"),
        ("key", "getitem", "take the part in Python"),
        ("desc", "desc", "sort them in Python"),
        ("collate", "collate", "sort them in Python"),
        ("distinct", "distinct", "compare them in Python"),
    ],
)
def test_message_names_the_operator_and_what_to_do_instead(operation: str, symbol: str, instead: str) -> None:
    message = refusal(lambda: OPERATIONS[operation](Plugin.credentials))
    assert f"so {symbol!r} cannot" in message
    assert instead in message


@pytest.mark.parametrize("field", ["credentials", "secret"])
def test_filter_by_a_value_is_refused(field: str) -> None:
    assert "Plugin.credentials" in refusal(lambda: select(Plugin).filter_by(**{field: SECRET}))
    assert "Plugin.credentials" in refusal(lambda: Session().query(Plugin).filter_by(**{field: SECRET}))


def test_values_in_comparators_of_relationships_are_refused() -> None:
    assert "Use.details" in refusal(lambda: Plugin.uses.any(details=SECRET))
    assert "Plugin.credentials" in refusal(lambda: Use.plugin.has(credentials=SECRET))
    assert "Use.details" in refusal(lambda: Plugin.uses.of_type(Use).any(Use.details == SECRET))
    assert "Plugin.credentials" in refusal(lambda: select(Use).join(Use.plugin.and_(Plugin.credentials == SECRET)))


def test_name_of_a_type_that_belongs_to_no_column() -> None:
    pinned = type_coerce(Plugin.name, EncryptedJSON(associated_data="pinned.name"))
    assert refusal(lambda: pinned == SECRET).startswith("pinned.name is encrypted")
    assert refusal(lambda: type_coerce(Plugin.name, EncryptedJSON()) == SECRET).startswith("an encrypted value is")


# --- What may be asked -----------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = create_engine("sqlite://")
    Base.metadata.create_all(made)
    yield made
    made.dispose()


@pytest.fixture(autouse=True)
def _keyring() -> Iterator[None]:
    with use_keyring(Keyring(DataKey.generate())):
        yield


IS_NULL: dict[str, Callable[[Any], Any]] = {
    "is_": lambda x: x.is_(None),
    "is_ null()": lambda x: x.is_(null()),
    "==": lambda x: x == None,  # noqa: E711 - that is what is tested
    "== null()": lambda x: x == null(),
    "is_not_distinct_from": lambda x: x.is_not_distinct_from(None),
    "reversed": lambda x: None == x,  # noqa: E711, SIM300 - as above
    "not is_not": lambda x: ~x.is_not(None),
    "not !=": lambda x: ~(x != None),  # noqa: E711 - as above
}
IS_NOT_NULL: dict[str, Callable[[Any], Any]] = {
    "is_not": lambda x: x.is_not(None),
    "!=": lambda x: x != None,  # noqa: E711 - as above
    "is_distinct_from": lambda x: x.is_distinct_from(None),
    "is_distinct_from null()": lambda x: x.is_distinct_from(null()),
    "not is_": lambda x: ~x.is_(None),
}


@pytest.mark.parametrize("field", ["credentials", "token"])
@pytest.mark.parametrize("test", [*IS_NULL, *IS_NOT_NULL])
def test_null_can_be_asked_for(engine: Engine, test: str, field: str) -> None:
    expected = [1] if test in IS_NULL else [2]
    asked = (IS_NULL | IS_NOT_NULL)[test]
    with Session(engine) as session:
        session.add_all([Plugin(id=1), Plugin(id=2, credentials=SECRET, token=MARKER)])
        session.flush()
        attribute, alias = getattr(Plugin, field), aliased(Plugin)
        column = Plugin.__table__.c[{"token": "in_database"}.get(field, field)]
        inner = select(Plugin.id, attribute.label("x")).subquery()
        assert session.scalars(select(Plugin.id).where(asked(attribute))).all() == expected
        assert session.scalars(select(alias.id).where(asked(getattr(alias, field)))).all() == expected
        assert session.scalars(select(TABLE.c.id).where(asked(column))).all() == expected
        assert session.scalars(select(inner.c.id).where(asked(inner.c.x))).all() == expected
        assert session.scalars(select(Plugin.id).where(asked(attribute.label("y")))).all() == expected


def test_null_can_be_asked_for_by_name(engine: Engine) -> None:
    with Session(engine) as session:
        plugin = Plugin(id=1, uses=[Use(id=1), Use(id=2, details=SECRET)])
        session.add_all([plugin, Plugin(id=2, credentials=SECRET)])
        session.flush()
        assert session.scalars(select(Plugin).filter_by(credentials=None)).all() == [plugin]
        assert session.scalars(select(Plugin).filter_by(secret=None)).all() == [plugin]
        assert session.query(Plugin).filter_by(credentials=None).all() == [plugin]
        assert session.scalars(select(Plugin).where(Plugin.uses.any(details=None))).all() == [plugin]
        assert session.scalars(select(Use.id).where(Use.plugin.has(credentials=None)).order_by(Use.id)).all() == [1, 2]


# --- One column and another ------------------------------------------------------------------------------------------

DIALECTS: dict[str, Any] = {
    module.__name__.rpartition(".")[2]: module.dialect() for module in (mysql, postgresql, sqlite)
}

COMPARISONS: dict[str, Callable[[], Any]] = {
    "attributes": lambda: Plugin.credentials == Plugin.token,
    "not equal": lambda: Plugin.credentials != Plugin.token,
    "with itself": lambda: Plugin.credentials == Plugin.credentials,
    "with a plain column": lambda: Plugin.credentials == Plugin.name,
    "columns": lambda: TABLE.c.credentials == TABLE.c.name,
    "aliased": lambda: aliased(Plugin).credentials == Plugin.credentials,
    "with a function": lambda: Plugin.credentials == select(Use.details).scalar_subquery(),
    "negated": lambda: ~(Plugin.credentials == Plugin.name),
    "hybrid": lambda: Plugin.secret == Plugin.name,
    "label": lambda: Plugin.credentials.label("x") == Plugin.name,
}


@pytest.mark.parametrize("dialect", [None, *DIALECTS])
@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparison_of_columns_cannot_be_compiled(comparison: str, dialect: str | None) -> None:
    written = COMPARISONS[comparison]()
    statements = [
        select(TABLE.c.id).where(written),
        select(Plugin).where(written),
        select(written),
        update(Plugin).where(written).values(name="x"),
    ]
    for statement in statements:
        message = refusal(lambda made=statement: made.compile(dialect=DIALECTS.get(dialect or "")))  # type: ignore[misc]
        assert "lugin" in message
        assert ".credentials is encrypted" in message


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparison_of_columns_is_not_executed_without_guards(engine: Engine, comparison: str) -> None:
    with Session(engine) as session:
        for _ in range(2):
            refusal(lambda: session.execute(select(Plugin).where(COMPARISONS[comparison]())))
        for synchronize in ("fetch", False):
            statement = update(Plugin).where(COMPARISONS[comparison]()).values(name="x")
            with pytest.raises(UnsupportedOperationError):
                session.execute(statement, execution_options={"synchronize_session": synchronize})
            session.rollback()


@pytest.mark.parametrize("synchronize", ["auto", "evaluate"])
def test_comparison_of_columns_is_not_evaluated_in_python(engine: Engine, synchronize: str) -> None:
    with Session(engine) as session:
        session.add(plugin := Plugin(id=1, name="before", credentials="same", token="same"))
        session.flush()
        statement = update(Plugin).where(Plugin.credentials == Plugin.token).values(name="after")
        options = {"synchronize_session": synchronize}
        assert "Plugin.credentials" in refusal(lambda: session.execute(statement, execution_options=options))
        assert plugin.name == "before"


def test_relationship_on_encrypted_columns_is_refused(engine: Engine) -> None:
    class OwnBase(DeclarativeBase):
        pass

    class Parent(OwnBase):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[Any] = mapped_column(EncryptedJSON)
        children: Mapped[list["Child"]] = relationship(
            primaryjoin=lambda: foreign(Child.value) == Parent.value, viewonly=True
        )

    class Child(OwnBase):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[Any] = mapped_column(EncryptedJSON)

    OwnBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Parent(id=1, value=SECRET))
        session.flush()
        assert "value is encrypted" in refusal(lambda: session.get_one(Parent, 1).children)
        assert "value is encrypted" in refusal(lambda: session.execute(select(Parent).join(Parent.children)))


def test_columns_can_be_looked_for_in_lists_and_dicts() -> None:
    """SQLAlchemy does so all the time, which compares them."""
    columns: list[Any] = [Plugin.credentials, Plugin.id, TABLE.c.credentials]
    assert Plugin.credentials in columns
    assert TABLE.c.in_database not in columns
    assert columns.index(TABLE.c.credentials) in {0, 2}
    assert {Plugin.credentials: 1}[Plugin.credentials] == 1
    assert bool(TABLE.c.credentials == TABLE.c.credentials)
    assert not bool(TABLE.c.credentials == TABLE.c.in_database)
    assert not bool(TABLE.c.credentials != TABLE.c.credentials)


def test_ciphertext_itself_can_be_compared(engine: Engine) -> None:
    raw = type_coerce(TABLE.c.credentials, LargeBinary())
    with engine.begin() as connection:
        connection.execute(insert(TABLE), [{"id": 1, "credentials": SECRET}, {"id": 2, "credentials": SECRET}])
        frame = connection.scalar(select(raw).where(TABLE.c.id == 1))
        assert connection.scalars(select(TABLE.c.id).where(raw == frame)).all() == [1]
        assert connection.scalars(select(TABLE.c.id).order_by(raw.desc(), TABLE.c.id)).all() in ([1, 2], [2, 1])


def test_other_types_keep_their_operators() -> None:
    table = Table("t", MetaData(), Column("a", Integer), Column("b", LargeBinary()), Column("c", EncryptedJSON()))
    for operator in (eq, ne, lt, le, gt, ge):
        assert operator(table.c.a, 1).compile() is not None
        assert operator(table.c.b, b"x").compile() is not None
