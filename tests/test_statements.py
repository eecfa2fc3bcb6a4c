"""Whole statements on encrypted columns: those that are right on ciphertext work, the others are not executed."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    Sequence,
    String,
    Table,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    collate,
    column,
    create_engine,
    delete,
    desc,
    distinct,
    event,
    except_,
    exists,
    extract,
    func,
    insert,
    inspect,
    intersect,
    lambda_stmt,
    lateral,
    literal,
    literal_column,
    not_,
    null,
    nulls_last,
    or_,
    select,
    tablesample,
    text,
    true,
    try_cast,
    tuple_,
    type_coerce,
    union,
    union_all,
    update,
    values,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    Bundle,
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    column_property,
    contains_eager,
    joinedload,
    mapped_column,
    relationship,
    selectin_polymorphic,
    selectinload,
    subqueryload,
    with_loader_criteria,
    with_polymorphic,
)
from sqlalchemy.schema import CreateTable, DropTable

from sqlalchemy_kravn_crypto import (
    DataKey,
    EncryptedJSON,
    EncryptedString,
    Keyring,
    configure,
    configure_async,
    guards,
    use_keyring,
)
from sqlalchemy_kravn_crypto.exceptions import MalformedCiphertextError, UnstorableValueError, UnsupportedOperationError
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.statements import check_statement
from tests.fixtures_postgres import asynchronous
from tests.leaks import leaked
from tests.postgres import fresh_database

MARKER = "S3CR3T" + "-marker"
KEYRING = Keyring(DataKey(bytes(range(32))))


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str | None]
    s: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)
    o: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)
    t: Mapped[str | None] = mapped_column(EncryptedString(storage="text"))
    renamed: Mapped[Any] = mapped_column("in_database", EncryptedJSON, nullable=True)
    items: Mapped[list["Item"]] = relationship(back_populates="account", order_by="Item.id")
    contents: AssociationProxy[list[Any]] = association_proxy("items", "s")
    sorted_items: Mapped[list["Item"]] = relationship(order_by="Item.s", viewonly=True)


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[int | None] = mapped_column(ForeignKey("account.id"))
    note: Mapped[str | None]
    s: Mapped[Any] = mapped_column(EncryptedJSON(associated_data="account.s"), nullable=True)
    moved: Mapped[Any] = mapped_column(EncryptedJSON(earlier_names=["account.o"]), nullable=True)
    by_default: Mapped[Any] = mapped_column(EncryptedJSON, default=lambda: ["default"])
    account: Mapped[Account | None] = relationship(back_populates="items")


class Animal(Base):
    __tablename__ = "animal"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012 - SQLAlchemy's way

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    secret: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)


class Dog(Animal):
    __tablename__ = "dog"
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012 - SQLAlchemy's way

    id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True)
    bone: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)


class Cat(Animal):
    __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012 - SQLAlchemy's way

    mouse: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str | None]
    title: Mapped[str | None]
    body: Mapped[str | None]
    data: Mapped[Any] = mapped_column(JSON, nullable=True)
    blob: Mapped[bytes | None]
    amount: Mapped[int | None]
    account_id: Mapped[int | None] = mapped_column(ForeignKey("account.id"))


ACCOUNT, ITEM, NOTE = (Base.metadata.tables[name] for name in ("account", "item", "note"))


class View(Base):
    __table__ = ACCOUNT
    __mapper_args__ = {"include_properties": ["id", "s"]}  # noqa: RUF012 - SQLAlchemy's way
    again = column_property(ACCOUNT.c.s.label("again"))


class LoweredView(Base):
    __table__ = ACCOUNT
    __mapper_args__ = {"include_properties": ["id"]}  # noqa: RUF012 - SQLAlchemy's way
    lowered = column_property(func.lower(ACCOUNT.c.t))


A = aliased(Account)

# What a type checker would not let through.
CONDITION: Any = Account.t
DESCENDING: Any = desc
UPSERTS: dict[str, Any] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


@pytest.fixture(autouse=True)
def _keyring() -> Iterator[None]:
    with use_keyring(KEYRING):
        yield


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give the URL of a database that all tests of the module share: what they write, they roll back."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('statements') / 'test.db'}"
        return
    with fresh_database(request.getfixturevalue("postgres_server")) as fresh:
        yield fresh.render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def engine(url: str) -> Iterator[Engine]:
    made = create_engine(url)
    guards.install(made)
    Base.metadata.create_all(made)
    with use_keyring(KEYRING), Session(made) as session:
        session.add_all(
            [
                Account(
                    id=1, kind="a", s={"n": 1}, o=["o"], t="text", renamed="r", items=[Item(id=1, s="i1"), Item(id=2)]
                ),
                Account(id=2, kind="b", s={"n": 2}, items=[Item(id=3, s="i3", note="n")]),
                Account(id=3, kind="b", s={"n": 2}),
                Animal(id=1, secret="animal"),
                Dog(id=2, secret="dog", bone=["bone"]),
                Cat(id=3, secret="cat", mouse=["mouse"]),
                Note(id=1, kind="a", title="first", body="b1", data={"k": [1, 2]}, blob=b"\x01", amount=3),
            ]
        )
        session.add(Note(id=2, kind="b", title="second", body="b2", amount=1, account_id=1))
        session.commit()
    yield made
    made.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as opened:
        yield opened


def contents(connection: Connection) -> list[Any]:
    """Return all that is stored, without any type of ours."""
    found = []
    for table in ("account", "item", "animal", "dog", "note"):
        rows = connection.exec_driver_sql(f"SELECT * FROM {table} ORDER BY id").all()  # noqa: S608 - fixed
        found += [[bytes(one) if isinstance(one, memoryview) else one for one in row] for row in rows]
    return found


# --- What works ------------------------------------------------------------------------------------------------------

N1, N2 = {"n": 1}, {"n": 2}
IDS = [(1,), (2,), (3,)]
BOTH = [(1, N1), (2, N2), (3, N2)]


def using(source: Any, make: Callable[[Any], Any]) -> Any:
    return make(source)


def recursive() -> Any:
    start = select(Account.id, Account.s).where(Account.id == 1).cte("walk", recursive=True)
    step = select(Account.id, Account.s).join(start, Account.id == start.c.id + 1)
    walk = start.union_all(step)
    return select(walk.c.id, walk.c.s).order_by(walk.c.id)


def grouped() -> Any:
    columns = ACCOUNT.c
    return select(Account.id, Account.s, func.count(Item.id)).outerjoin(Item).group_by(*columns).order_by(Account.id)


SELECTS: dict[str, tuple[Callable[[], Any], list[Any]]] = {
    "whole values": (lambda: select(Account.id, Account.s).order_by(Account.id), BOTH),
    "NULL": (lambda: select(Account.id).where(Account.t.is_(None)).order_by(Account.id), [(2,), (3,)]),
    "not NULL": (lambda: select(Account.id).where(Account.t.is_not(None)), [(1,)]),
    "NULL among others": (
        lambda: select(Account.id).where(or_(Account.t == null(), Account.id == 1)).order_by(Account.id),
        IDS,
    ),
    "NULL as a column": (lambda: select(Account.o.is_(None)).order_by(Account.id), [(False,), (True,), (True,)]),
    "label": (lambda: select(Account.s.label("x")).order_by(Account.id), [(N1,), (N2,), (N2,)]),
    "bundle": (lambda: select(Bundle("b", Account.id, Account.s)).where(Account.id == 1), [((1, N1),)]),
    "alias": (lambda: select(A.s).where(A.s.is_not(None), A.id == 1), [(N1,)]),
    "Core alias": (lambda: select(ACCOUNT.alias("x").c.s).limit(0), []),
    "subquery": (lambda: using(select(Account).subquery(), lambda q: select(q.c.id, q.c.s).order_by(q.c.id)), BOTH),
    "aliased subquery": (
        lambda: using(aliased(Account, select(Account).subquery()), lambda a: select(a.id, a.s).order_by(a.id)),
        BOTH,
    ),
    "scalar subquery": (lambda: select(select(Account.s).where(Account.id == 1).scalar_subquery()), [(N1,)]),
    "correlated subquery": (
        lambda: select(Item.id, select(Account.s).where(Account.id == Item.account_id).scalar_subquery()).order_by(
            Item.id
        ),
        [(1, N1), (2, N1), (3, N2)],
    ),
    "CTE": (lambda: using(select(Account).cte(), lambda c: select(c.c.id, c.c.s).order_by(c.c.id)), BOTH),
    "recursive CTE": (recursive, BOTH),
    "union_all with itself": (
        lambda: union_all(select(Account.id, Account.s), select(A.id, A.s).where(A.id == 1)).order_by("id"),
        [(1, N1), *BOTH],
    ),
    "union with itself": (lambda: union(select(Account.id, Account.s), select(A.id, A.s)).order_by("id"), BOTH),
    "union of one name": (
        lambda: union_all(select(Account.id, Account.s), select(Item.id + 10, Item.s)).order_by("id"),
        [*BOTH, (11, "i1"), (12, None), (13, "i3")],
    ),
    "union with an earlier name": (
        lambda: union_all(select(Item.id, Item.moved).where(Item.id < 0), select(Account.id, Account.o)).order_by("id"),
        [(1, ["o"]), (2, None), (3, None)],
    ),
    "union with NULL": (
        lambda: union_all(select(Account.id, Account.s), select(literal(9), cast(null(), Account.s.type))).order_by(
            "id"
        ),
        [*BOTH, (9, None)],
    ),
    "union with a NULL that comes first": (
        lambda: union_all(
            select(literal(0).label("id"), cast(null(), Account.s.type)), select(Account.id, Account.s)
        ).order_by("id"),
        [(0, None), *BOTH],
    ),
    "except and intersect of whole rows": (
        lambda: using(
            except_(select(Account.id, Account.s), select(A.id, A.s).where(A.id > 1)).subquery(),
            lambda e: select(e.c.id, e.c.s),
        ),
        [(1, N1)],
    ),
    "intersection of whole rows": (
        lambda: intersect(select(Account.id, Account.s), select(A.id, A.s).where(A.id > 1)).order_by("id"),
        BOTH[1:],
    ),
    "distinct rows": (lambda: select(Account.id, Account.s).distinct().order_by(Account.id), BOTH),
    "rows grouped whole": (grouped, [(1, N1, 2), (2, N2, 1), (3, N2, 0)]),
    "rows grouped by the key": (
        lambda: select(Account.kind, func.count()).group_by(Account.kind).order_by(Account.kind),
        [("a", 1), ("b", 2)],
    ),
    "rows of a subquery grouped whole": (
        lambda: using(
            select(Account.id, Account.s).subquery(),
            lambda q: select(q.c.id, q.c.s, func.count()).group_by(q.c.id, q.c.s).order_by(q.c.id),
        ),
        [(1, N1, 1), (2, N2, 1), (3, N2, 1)],
    ),
    "count": (lambda: select(func.count(Account.s), func.count(Account.o), func.count()), [(3, 1, 3)]),
    "count with a filter": (lambda: select(func.count(Account.s).filter(Account.kind == "b")), [(2,)]),
    "length": (lambda: select(func.length(Account.s) > 50).where(Account.id == 1), [(True,)]),
    "order by length": (lambda: select(Account.id).order_by(func.length(Account.t).is_(None), Account.id), IDS),
    "exists": (lambda: select(exists(select(Account.s).where(Account.o.is_not(None)))), [(True,)]),
    "where exists": (lambda: select(Account.id).where(Account.items.any(Item.s.is_(None))), [(1,)]),
    "has": (lambda: select(Item.id).where(Item.account.has(o=None)), [(3,)]),
    "join": (
        lambda: select(Account.s, Item.s).join(Account.items).order_by(Item.id),
        [(N1, "i1"), (N1, None), (N2, "i3")],
    ),
    "coalesce": (
        lambda: select(func.coalesce(Item.s, Account.s)).join(Item.account).order_by(Item.id),
        [("i1",), (N1,), ("i3",)],
    ),
    "coalesce that begins with NULL": (
        lambda: select(func.coalesce(null(), Account.s)).order_by(Account.id),
        [(N1,), (N2,), (N2,)],
    ),
    "function with a type": (
        lambda: select(func.coalesce(Item.s, Account.s, type_=Account.s.type)).join(Item.account).where(Item.id == 2),
        [(N1,)],
    ),
    "case": (
        lambda: select(case((Item.s.is_(None), Account.s), else_=Item.s)).join(Item.account).order_by(Item.id),
        [("i1",), (N1,), ("i3",)],
    ),
    "case with NULL": (
        lambda: select(case((Account.kind == "a", Account.s), else_=None)).order_by(Account.id),
        [(N1,), (None,), (None,)],
    ),
    "case that begins with NULL": (
        lambda: select(case((Account.kind == "a", null()), else_=Account.s)).order_by(Account.id),
        [(None,), (N2,), (N2,)],
    ),
    "window over another column": (
        lambda: select(
            Account.id, func.row_number().over(partition_by=Account.kind, order_by=desc(Account.id)), Account.s
        ).order_by(Account.id),
        [(1, 1, N1), (2, 2, N2), (3, 1, N2)],
    ),
    "lag": (
        lambda: select(func.lag(Account.s, type_=Account.s.type).over(order_by=Account.id)).order_by(Account.id),
        [(None,), (N1,), (N2,)],
    ),
    "first_value": (
        lambda: select(func.first_value(Account.s, type_=Account.s.type).over(order_by=Account.id)).order_by(
            Account.id
        ),
        [(N1,)] * 3,
    ),
    "text with columns": (
        lambda: select(Account.id, Account.s).from_statement(
            text("SELECT id, s FROM account ORDER BY id").columns(Account.id, Account.s)
        ),
        BOTH,
    ),
    "order by another column's name": (
        lambda: select(Account.id, Account.s).order_by("kind", desc("id")),
        [BOTH[0], BOTH[2], BOTH[1]],
    ),
    "lambda": (lambda: lambda_stmt(lambda: select(Account.id, Account.s)) + (lambda q: q.order_by(Account.id)), BOTH),
    "column_property": (lambda: select(ACCOUNT.c.id, View.again).order_by(ACCOUNT.c.id), BOTH),
    "association proxy": (lambda: select(Account.id).where(Account.contents.is_(None)), [(1,)]),
    "ciphertext sorted": (
        lambda: select(func.count()).select_from(
            select(Account.id).order_by(type_coerce(Account.s, LargeBinary())).limit(2).subquery()
        ),
        [(2,)],
    ),
    "ciphertext grouped": (
        lambda: using(
            type_coerce(Account.s, LargeBinary()),
            lambda raw: select(func.count(distinct(raw)), func.min(func.length(raw)) > 50),
        ),
        [(3, True)],
    ),
    "ciphertext in a CAST": (lambda: select(func.length(cast(Account.s, LargeBinary()))).where(Account.id == -1), []),
    "ciphertext of two columns": (
        lambda: select(func.count()).select_from(
            union_all(
                select(type_coerce(Account.s, LargeBinary())), select(type_coerce(Account.o, LargeBinary()))
            ).subquery()
        ),
        [(6,)],
    ),
    "ciphertext by coalesce": (
        lambda: select(func.length(func.coalesce(Account.o, Account.s, type_=LargeBinary())) > 0),
        [(True,)] * 3,
    ),
}


@pytest.mark.parametrize("name", SELECTS)
def test_what_is_right_on_ciphertext_gives_the_right_rows(session: Session, name: str) -> None:
    statement, expected = SELECTS[name]
    for _ in range(2):  # the second time from the cache of statements
        assert [tuple(row) for row in session.execute(statement())] == expected


POSTGRES_SELECTS: dict[str, tuple[Callable[[], Any], list[Any]]] = {
    "array_agg": (lambda: select(func.array_agg(Account.s)).where(Account.id == 1), [([N1],)]),
    "array_agg sorted by another column": (
        lambda: select(func.array_agg(postgresql.aggregate_order_by(Account.s, Account.id.desc()))),
        [([N2, N2, N1],)],
    ),
    "array of one name": (
        lambda: select(postgresql.array([Account.s, Item.s])).join(Account.items).where(Item.id == 1),
        [([N1, "i1"],)],
    ),
    "lateral": (
        lambda: using(
            lateral(select(Item.s).where(Item.account_id == Account.id).order_by(Item.id).limit(1)),
            lambda each: select(Account.id, each.c.s).join(each, true()).order_by(Account.id),
        ),
        [(1, "i1"), (2, "i3")],
    ),
    "distinct on another column": (
        lambda: select(Account.s).distinct(Account.kind).order_by(Account.kind, Account.id),
        [(N1,), (N2,)],
    ),
    "values of another table": (
        lambda: using(
            values(Column("n", Integer), name="v").data([(2,)]),
            lambda v: select(Account.s).join(v, v.c.n == Account.id),
        ),
        [(N2,)],
    ),
    "null functions": (lambda: select(func.num_nulls(Account.s, Account.o)).order_by(Account.id), [(0,), (1,), (1,)]),
    "grouped by the primary key alone": (
        lambda: select(Account.s, func.count(Item.id)).join(Item).group_by(Account.id).order_by(Account.id),
        [(N1, 2), (N2, 1)],
    ),
}


# DISTINCT ON is an extension in SQLAlchemy 2.1, and deprecated as it was.
distinct_on = pytest.mark.filterwarnings("ignore:Passing expression to ``distinct``")


@distinct_on
@pytest.mark.parametrize("name", POSTGRES_SELECTS)
@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_what_is_right_on_ciphertext_in_postgresql(session: Session, name: str) -> None:
    statement, expected = POSTGRES_SELECTS[name]
    for _ in range(2):
        assert [tuple(row) for row in session.execute(statement())] == expected


ANIMALS = [("Animal", "animal"), ("Cat", "cat"), ("Dog", "dog")]

ENTITIES: dict[str, Callable[[], Any]] = {
    "plain": lambda: select(Account),
    "joinedload": lambda: select(Account).options(joinedload(Account.items)),
    "selectinload": lambda: select(Account).options(selectinload(Account.items)),
    "subqueryload": lambda: select(Account).options(subqueryload(Account.items)),
    "contains_eager": lambda: (
        select(Account).outerjoin(Account.items).options(contains_eager(Account.items)).order_by(Item.id)
    ),
    "joinedload within a LIMIT": lambda: select(Account).options(joinedload(Account.items)).limit(10),
    "back and forth": lambda: select(Account).options(selectinload(Account.items).joinedload(Item.account)),
    "criteria": lambda: select(Account).options(with_loader_criteria(Account, lambda cls: cls.s.is_not(None))),
    "yield_per": lambda: select(Account).options(selectinload(Account.items)),
    "from a subquery": lambda: using(
        select(Account).subquery(), lambda q: select(aliased(Account, q)).order_by(q.c.id)
    ),
    "from a union": lambda: select(Account).from_statement(
        union_all(select(Account).where(Account.id < 2), select(Account).where(Account.id >= 2)).order_by(text("id"))
    ),
    "distinct": lambda: select(Account).distinct(),
    "for update": lambda: select(Account).with_for_update(),
}


@pytest.mark.parametrize("name", ENTITIES)
def test_entities_load_with_every_strategy(session: Session, name: str) -> None:
    for _ in range(2):
        session.expunge_all()
        statement = ENTITIES[name]()
        if not name.startswith(("from", "contains")):
            statement = statement.order_by(Account.id)
        options = {"yield_per": 2} if name == "yield_per" else {}
        found = session.scalars(statement, execution_options=options)
        accounts = sorted(found if options else found.unique(), key=lambda account: account.id)
        assert [(account.id, account.s) for account in accounts] == BOTH
        assert [[item.s for item in account.items] for account in accounts] == [["i1", None], ["i3"], []]
        assert [list(account.contents) for account in accounts] == [["i1", None], ["i3"], []]


@pytest.mark.parametrize("how", ["plain", "with_polymorphic", "selectin_polymorphic"])
def test_entities_with_inheritance_load(session: Session, how: str) -> None:
    for _ in range(2):
        session.expunge_all()
        entity: Any = with_polymorphic(Animal, "*") if how == "with_polymorphic" else Animal
        statement = select(entity).where(entity.secret.is_not(None)).order_by(entity.kind)
        if how == "selectin_polymorphic":
            statement = statement.options(selectin_polymorphic(Animal, [Dog, Cat]))
        animals = session.scalars(statement).all()
        assert [(type(animal).__name__, animal.secret) for animal in animals] == ANIMALS
        assert (animals[1].mouse, animals[2].bone) == (["mouse"], ["bone"])
    assert session.scalars(select(Dog.bone)).all() == [["bone"]]
    assert session.scalars(select(Cat).where(Cat.mouse.is_(None))).all() == []
    assert session.scalars(select(Animal).where(Animal.secret.is_(None))).all() == []


def test_legacy_query_works(session: Session) -> None:
    query = session.query(Account)
    for _ in range(2):
        assert [account.s for account in query.order_by(Account.id)] == [N1, N2, N2]
        assert query.filter_by(o=None).count() == 2
        assert query.filter(Account.s.is_(None)).first() is None
        assert [tuple(row) for row in session.query(Account.id, Account.s).order_by("id")] == BOTH
        assert len(query.union(session.query(Account)).all()) == 3
        assert session.query(query.exists()).scalar()
        assert query.options(joinedload(Account.items)).order_by(Account.id).limit(1).one().contents == ["i1", None]
        assert query.filter(Account.id == 1).update({"renamed": ["new"]}) == 1
        assert session.query(Account.renamed).filter_by(id=1).scalar() == ["new"]


def test_writes_of_the_orm_work(session: Session) -> None:
    column, other = Account.s, Account.renamed
    account: Any = Account(id=10, s=["new"], renamed=1)
    session.add(account)
    session.flush()
    account.s, account.renamed = ["changed"], null()
    session.flush()
    session.refresh(account)
    assert (account.s, account.renamed) == (["changed"], None)
    for synchronize in ("auto", "evaluate", "fetch", False):
        options = {"synchronize_session": synchronize}
        made = {"by": str(synchronize)}
        for _ in range(2):
            statement: Any = update(Account).where(Account.id == 10, Account.renamed.is_(None)).values(s=made)
            session.execute(statement, execution_options=options)
            if not synchronize:
                session.expire(account)
            assert account.s == made
    session.execute(update(Account), [{"id": 10, "s": ["bulk"], "renamed": ["r"]}])
    session.expire_all()
    assert (account.s, account.renamed) == (["bulk"], ["r"])
    session.execute(update(Account).where(Account.id == 10).values({column: {"by": "key"}, other: null()}))
    assert session.scalars(select(Account.s).where(Account.id == 10)).one() == {"by": "key"}
    session.execute(update(Account).where(Account.id == 10).ordered_values((column, [1]), (other, [2])))
    assert session.execute(select(Account.s, Account.renamed).where(Account.id == 10)).one() == ([1], [2])
    assert session.merge(Account(id=10, s=["merged"])).s == ["merged"]
    session.flush()
    assert session.scalars(insert(Account).returning(column), [{"id": 11, "s": 1}, {"id": 12, "s": 2}]).all() == [1, 2]
    inserted = session.scalars(insert(Account).returning(Account), [{"id": 13, "renamed": [3], "t": "t"}]).one()
    assert (inserted.renamed, inserted.t) == ([3], "t")
    statement = insert(Account).values([{"id": 14, "renamed": 1}, {"id": 15, "renamed": None}]).returning(other)
    assert session.scalars(statement).all() == [1, None]
    assert session.scalars(update(Account).where(Account.id == 14).values(t="x").returning(Account.t)).all() == ["x"]
    assert session.scalars(delete(Account).where(Account.id == 10).returning(column)).all() == [["merged"]]
    session.execute(delete(Account).where(Account.s.is_(None), Account.id > 10))
    assert session.scalars(select(Account.id).order_by(Account.id)).all() == [1, 2, 3, 11, 12]


def test_writes_from_other_columns_of_the_same_name_work(session: Session) -> None:
    session.execute(update(Account).values(s=Account.s))
    session.execute(insert(Item).from_select(["id", "s"], select(Account.id + 10, Account.s)))
    assert session.scalars(select(Item.s).where(Item.id > 10).order_by(Item.id)).all() == [N1, N2, N2]
    assert session.scalars(select(Item.by_default).where(Item.id > 10)).all() == [["default"]] * 3
    session.execute(update(Item).where(Item.account_id == Account.id).values(moved=Account.o))
    assert session.scalars(select(Item.moved).order_by(Item.id).limit(3)).all() == [["o"], ["o"], None]
    mixed = case((Account.id == 1, literal(["typed"], Account.s.type)), else_=Account.s)
    session.execute(update(Account).values(s=mixed))
    assert session.scalars(select(Account.s).order_by(Account.id)).all() == [["typed"], N2, N2]
    inner = select(A.s).where(A.id == 1).scalar_subquery()
    session.execute(
        update(Account).values(s=func.coalesce(inner, Account.s)), execution_options={"synchronize_session": False}
    )
    assert session.scalars(select(Account.s)).all() == [["typed"]] * 3
    session.execute(update(Account).values(s=bindparam("v"), t=cast(null(), String)), {"v": ["bound"]})
    assert session.execute(select(Account.s, Account.t).distinct()).all()[0] == (["bound"], None)


def test_writes_of_ciphertext_itself_work(session: Session) -> None:
    frame = session.scalars(select(type_coerce(Account.s, LargeBinary())).where(Account.id == 1)).one()
    session.execute(update(Note).values(blob=type_coerce(Account.s, LargeBinary())).where(Account.id == Note.id))
    assert session.scalars(select(Note.blob).where(Note.id == 1)).one() == frame


def test_upserts_work(session: Session) -> None:
    made: Any = UPSERTS[session.get_bind().dialect.name]
    statement = made(Account).values(id=1, s=["excluded"], renamed=["r"])
    for changes, expected in (
        ({"s": statement.excluded.s}, ["excluded"]),
        ({"s": ["value"], "kind": "x"}, ["value"]),
        ({"s": statement.excluded.s, "in_database": statement.excluded.in_database}, ["excluded"]),
        ({ACCOUNT.c.s: ["column"]}, ["column"]),
        ({"s": func.coalesce(statement.excluded.s, Account.s)}, ["excluded"]),
        ({"s": bindparam("v", ["bound"])}, ["bound"]),
        ({"s": null()}, None),
    ):
        upsert = statement.on_conflict_do_update(index_elements=["id"], set_=changes, where=Account.kind.is_not(None))
        for _ in range(2):
            session.execute(upsert)
            assert session.connection().scalars(select(ACCOUNT.c.s).where(ACCOUNT.c.id == 1)).one() == expected
    rows = [{"id": 1, "s": [1]}, {"id": 2, "s": [2]}]
    many = made(Account)
    many = many.on_conflict_do_update(index_elements=["id"], set_={"s": many.excluded.s}).returning(Account.s)
    assert session.scalars(many, rows, execution_options={"populate_existing": True}).all() == [[1], [2]]
    session.execute(statement.on_conflict_do_nothing())


def test_ddl_and_text_are_no_statements_to_check(session: Session) -> None:
    table = Table("made", MetaData(), Column("id", Integer, primary_key=True), Column("s", EncryptedJSON()))
    connection = session.connection()
    connection.execute(CreateTable(table))
    connection.exec_driver_sql("INSERT INTO made (id) VALUES (1)")
    assert connection.execute(text("SELECT id FROM made ORDER BY s")).all() == [(1,)]
    connection.execute(DropTable(table))


# --- What is refused -------------------------------------------------------------------------------------------------


SUBQUERY = select(Account.id).order_by(Account.s).limit(1).subquery()

ORDERS: dict[str, Callable[[], Any]] = {
    "column": lambda: select(Account).order_by(Account.s),
    "among others": lambda: select(Account).order_by(Account.kind, Account.s),
    "Core": lambda: select(ACCOUNT).order_by(ACCOUNT.c.s),
    "desc": lambda: select(Account).order_by(desc(Account.s)),
    "nulls_last": lambda: select(Account).order_by(nulls_last(DESCENDING(Account.s))),
    "label": lambda: select(Account.s.label("x")).order_by(Account.s.label("x")),
    "name": lambda: select(Account.id, Account.s).order_by("s"),
    "name of an attribute's column": lambda: select(Account).order_by("s"),
    "name that is not selected": lambda: select(Account.id).order_by("s"),
    "name that is not selected, Core": lambda: select(ACCOUNT.c.id).order_by(desc("s")),
    "name with the table": lambda: select(ACCOUNT.c.s).order_by("account_s"),
    "name in a nested query": lambda: select(select(Account.id).order_by("s").limit(1).subquery()),
    "name of a label": lambda: select(Account.s.label("x")).order_by(desc("x")),
    "alias": lambda: select(A.id).order_by(A.s),
    "collate": lambda: select(Account.id).order_by(collate(Account.s, "C")),
    "coalesce": lambda: select(Account.id).order_by(func.coalesce(Account.s, Account.s)),
    "case": lambda: select(Account.id).order_by(case((Account.id == 1, Account.s), else_=None)),
    "scalar subquery": lambda: select(Account.id).order_by(select(A.s).where(A.id == Account.id).scalar_subquery()),
    "in a subquery": lambda: select(SUBQUERY.c.id),
    "in IN": lambda: select(Account.kind).where(Account.id.in_(select(A.id).order_by(A.s).limit(1))),
    "in EXISTS": lambda: select(Account.kind).where(exists(select(A.id).order_by(A.s))),
    "in a CTE": lambda: select(select(Account.id).order_by(Account.s).limit(1).cte().c.id),
    "in an unused CTE": lambda: select(Account.id).add_cte(select(A.id).order_by(A.s).cte("unused")),
    "in a lateral": lambda: select(select(Account.id).order_by(Account.s).lateral().c.id),
    "in a branch of a union": lambda: union_all(
        select(Account.id), select(select(A.id).order_by(A.s).limit(1).subquery().c.id)
    ),
    "of a subquery": lambda: using(select(Account).subquery(), lambda q: select(q).order_by(q.c.s)),
    "of a CTE": lambda: using(select(Account).cte(), lambda c: select(c).order_by(c.c.s)),
    "of a union": lambda: union_all(select(Account.s), select(A.s)).order_by("s"),
    "of a union's subquery": lambda: using(
        union_all(select(Account.s), select(A.s)).subquery(), lambda q: select(q).order_by(q.c.s)
    ),
    "subquery of an UPDATE": lambda: update(Account).where(Account.id == SUBQUERY.c.id).values(kind="x"),
    "subquery of a DELETE": lambda: delete(Account).where(Account.id.in_(select(SUBQUERY.c.id))),
    "window": lambda: select(func.row_number().over(order_by=Account.s)),
    "window among others": lambda: select(func.row_number().over(order_by=[Account.kind, DESCENDING(Account.s)])),
    "aggregate": lambda: select(func.percentile_disc(0.5).within_group(Account.s)),
    "aggregate of PostgreSQL": lambda: select(func.array_agg(postgresql.aggregate_order_by(Account.id, Account.s))),
    "aggregate of PostgreSQL by itself": lambda: select(
        func.array_agg(postgresql.aggregate_order_by(Account.s, Account.s.expression, DESCENDING(Account.id)))
    ),
    "lambda": lambda: lambda_stmt(lambda: select(Account).order_by(Account.s)),
    "relationship with joinedload": lambda: select(Account).options(joinedload(Account.sorted_items)),
    "limit with joinedload": lambda: select(Account).options(joinedload(Account.items)).order_by(Account.s).limit(1),
    "with_polymorphic": lambda: using(with_polymorphic(Animal, "*"), lambda p: select(p).order_by(p.Dog.bone)),
    "text storage": lambda: select(Account).order_by(Account.t),
    "TypeCoerce to an encrypted type": lambda: select(Account).order_by(type_coerce(Account.kind, Account.s.type)),
}

GROUPS: dict[str, Callable[[], Any]] = {
    "alone": lambda: select(Account.s, func.count()).group_by(Account.s),
    "with what is no key": lambda: select(Account.kind, Account.s).group_by(Account.kind, Account.s),
    "with the key of another table": lambda: select(Account.s, Item.id).join(Item).group_by(Account.s, Item.id),
    "name": lambda: select(Account.s, func.count()).group_by("s"),
    "label": lambda: select(Account.s.label("x"), func.count()).group_by("x"),
    "name that is not selected": lambda: select(func.count()).select_from(Account).group_by("s"),
    "in a subquery": lambda: select(select(Account.s).group_by(Account.s).subquery()),
    "subquery alone": lambda: using(select(Account.s).subquery(), lambda q: select(q.c.s).group_by(q.c.s)),
    "partition": lambda: select(func.count().over(partition_by=Account.s)),
    "partition among others": lambda: select(func.count().over(partition_by=[Account.kind, Account.s])),
    "count distinct": lambda: select(func.count(distinct(Account.s))),
    "distinct operator": lambda: select(distinct(Account.s)),
    "distinct on": lambda: select(Account.id).distinct(Account.s),
}

COMPUTATIONS: dict[str, Callable[[], Any]] = {
    "min": lambda: select(func.min(Account.s)),
    "max with a filter": lambda: select(func.max(Account.s).filter(Account.id == 1)),
    "max over a window": lambda: select(func.max(Account.s).over(order_by=Account.id)),
    "sum": lambda: select(func.sum(Account.s)),
    "lower": lambda: select(func.lower(Account.t)),
    "concat": lambda: select(func.concat(Account.kind, Account.t)),
    "substr": lambda: select(func.substr(Account.t, 1, 3)),
    "md5": lambda: select(func.md5(Account.t)),
    "greatest": lambda: select(func.greatest(Account.s, Account.s)),
    "nullif": lambda: select(func.nullif(Account.s, Account.s)),
    "JSON function": lambda: select(func.json_extract(Account.s, "$.n")),
    "JSON function as a table": lambda: select(func.json_each(Account.s).table_valued("key")),
    "another library's function": lambda: select(func.my.own.function(Account.s)),
    "nested": lambda: select(func.length(func.lower(Account.t))),
    "in WHERE": lambda: select(Account.id).where(func.lower(Account.t) == "x"),
    "in HAVING": lambda: select(Account.id).group_by(Account.id).having(func.length(func.max(Account.t)) > 1),
    "in ON": lambda: select(Account.id).join(Item, func.lower(Account.t) == Item.note),
    "in RETURNING": lambda: insert(Account).values(t="x").returning(func.lower(Account.t)),
    "in a relationship's criterion": lambda: select(Account.id).where(Account.items.any(func.lower(Item.s) == "x")),
    "in a scalar subquery": lambda: select(Account.id, select(func.max(Account.s)).scalar_subquery()),
    "in the WHERE of a DELETE": lambda: delete(Account).where(func.lower(Account.t) == "x"),
    "in the WHERE of an UPDATE": lambda: update(Account).where(func.lower(Account.t) == "x").values(kind="x"),
    "in a value": lambda: update(Account).values(kind=func.lower(Account.t)),
    "in one of several values": lambda: insert(Account).values(
        [{"kind": "x"}, {"kind": select(func.max(Account.t)).scalar_subquery()}]
    ),
    "nested in one of several values": lambda: insert(Account).values(
        [{"kind": "x"}, {"kind": select(func.length(func.lower(Account.t))).scalar_subquery()}]
    ),
    "column_property": lambda: select(LoweredView),
    "column_property in a subquery": lambda: select(select(LoweredView).subquery()),
    "loader criteria": lambda: select(Account).options(with_loader_criteria(Account, func.lower(Account.t) == "x")),
    "extract": lambda: select(extract("year", Account.t)),
    "CAST": lambda: select(cast(Account.t, String)),
    "CAST by the method": lambda: select(Account.id).where(Account.s.cast(Text).like("%x%")),
}

COMPARISONS: dict[str, Callable[[], Any]] = {
    "literal on the left": lambda: select(Account.id).where(literal(MARKER) == Account.t),
    "plain column on the left": lambda: select(Account.id).where(Account.kind == Account.t),
    "less than": lambda: select(Account.id).where(Account.kind < Account.t),
    "like": lambda: select(Account.id).where(Account.kind.like(Account.t)),
    "concatenation": lambda: select(Account.kind + Account.t),
    "chained concatenation": lambda: select(literal("a") + Account.kind + Account.t),
    "between": lambda: select(Account.id).where(Account.kind.between(Account.t, Account.t)),
    "tuple": lambda: select(Account.id).where(tuple_(Account.id, Account.t).in_([(1, MARKER)])),
    "tuple on the right": lambda: select(Account.id).where(
        tuple_(literal(1), literal("x")) == tuple_(Account.id, Account.t)
    ),
    "IN of a list": lambda: select(Account.id).where(Account.kind.in_([Account.t])),
    "IN of a subquery": lambda: select(Account.id).where(Account.kind.in_(select(Account.t))),
    "tuple IN of a subquery": lambda: select(Account.id).where(
        tuple_(Account.id, Account.kind).in_(select(Account.id, Account.t))
    ),
    "ANY": lambda: select(Account.id).where(Account.kind == any_(select(Account.t).scalar_subquery())),
    "CASE with a value": lambda: select(case({MARKER: 1}, value=Account.t)),
    "CASE with a condition": lambda: select(case((CONDITION, 1), else_=2)),
    "condition": lambda: select(Account.id).where(CONDITION),
    "condition of HAVING": lambda: select(Account.id).group_by(Account.id).having(CONDITION),
    "condition among others": lambda: select(Account.id).where(and_(Account.id == 1, CONDITION)),
    "condition of an UPDATE": lambda: update(Account).where(CONDITION).values(kind="x"),
    "condition of a DELETE": lambda: delete(ACCOUNT).where(ACCOUNT.c.t),
    "negated condition": lambda: select(Account.id).where(not_(CONDITION)),
    "IS with a plain column": lambda: select(Account.id).where(Account.kind.is_distinct_from(Account.t)),
    "text": lambda: select(Account.id).where(literal_column("kind") == Account.t),
}

MIXTURES: dict[str, Callable[[], Any]] = {
    "union": lambda: union(select(Account.s), select(Account.o)),
    "union_all": lambda: union_all(select(Account.id, Account.o), select(Account.id, Account.s)),
    "union with plaintext": lambda: union_all(select(Account.s), select(Account.kind)),
    "union with a literal": lambda: union_all(select(Account.s), select(literal(MARKER))),
    "union with text": lambda: union_all(select(Account.s), select(text("'x'"))),
    "union of two storages": lambda: union_all(
        select(Account.s), select(type_coerce(Account.kind, EncryptedJSON(associated_data="account.s", storage="text")))
    ),
    "union with an earlier name, the wrong way round": lambda: union_all(select(Account.o), select(Item.moved)),
    "union in a subquery": lambda: select(union_all(select(Account.s), select(Account.o)).subquery()),
    "union in a CTE": lambda: select(union_all(select(Account.s), select(Account.o)).cte()),
    "recursive union": lambda: using(
        select(Account.id, Account.s).cte(recursive=True),
        lambda c: select(c.union_all(select(A.id, A.o).join(c, c.c.id == A.id + 1))),
    ),
    "union of entities": lambda: union_all(select(Account.id, Account.s, Account.o), select(A.id, A.o, A.s)),
    "nested union": lambda: union_all(select(Account.s), union_all(select(Account.o), select(A.o)).subquery().select()),
    "except": lambda: except_(select(Account.s), select(Account.o)),
    "union that begins with NULL": lambda: union_all(select(null().label("s")), select(Account.s)),
    "coalesce": lambda: select(func.coalesce(Account.s, Account.o)),
    "coalesce with a literal": lambda: select(func.coalesce(Account.s, MARKER)),
    "ifnull without a type": lambda: select(func.ifnull(Account.s, Account.s)),
    "case": lambda: select(case((Account.kind == "a", Account.s), else_=Account.o)),
    "case with a literal": lambda: select(case((Account.kind == "a", Account.s), else_=MARKER)),
    "array": lambda: select(postgresql.array([Account.s, Account.o])),
}

ASSIGNMENTS: dict[str, Callable[[], Any]] = {
    "another column": lambda: update(Account).values(s=Account.o),
    "another column, Core": lambda: update(ACCOUNT).values(s=ACCOUNT.c.o),
    "another column by ordered_values": lambda: update(Account).ordered_values(
        (Account.kind, "x"), (Account.s, Account.o)
    ),
    "another column of another table": lambda: (
        update(Item).where(Item.account_id == Account.id).values(moved=Account.s)
    ),
    "another storage": lambda: update(Account).values(
        s=type_coerce(Account.kind, EncryptedString(associated_data="account.s", storage="text"))
    ),
    "a subquery": lambda: update(Account).values(s=select(A.o).where(A.id == 1).scalar_subquery()),
    "text": lambda: update(Account).values(s=text(f"'{MARKER}'")),
    "text by ordered_values": lambda: update(ACCOUNT).ordered_values((ACCOUNT.c.s, text(f"'{MARKER}'"))),
    "a function": lambda: update(Account).values(t=func.coalesce(None, MARKER)),
    "a literal of another type": lambda: update(Account).values(t=literal(MARKER)),
    "a literal column": lambda: update(Account).values(t=literal_column(f"'{MARKER}'")),
    "type_coerce to another type": lambda: update(Account).values(t=type_coerce(MARKER, String())),
    "a parameter of another type": lambda: update(Account).values(t=bindparam("v", MARKER, type_=String())),
    "arithmetic": lambda: update(Account).values(s=Account.id + 1),
    "case": lambda: update(Account).values(s=case((Account.id == 1, literal(MARKER)), else_=literal("x"))),
    "renamed attribute": lambda: update(Account).values(renamed=text("'x'")),
    "renamed attribute as a key": lambda: update(Account).values({Account.renamed: Account.s}),
    "bulk UPDATE": lambda: update(ACCOUNT).where(ACCOUNT.c.id == bindparam("b")).values(s=text("'x'")),
    "INSERT": lambda: insert(Account).values(s=text(f"'{MARKER}'")),
    "INSERT, Core": lambda: insert(ACCOUNT).values({"s": func.lower(MARKER)}),
    "INSERT of a renamed attribute": lambda: insert(Account).values(renamed=text("'x'")),
    "INSERT of a column's key": lambda: insert(ACCOUNT).values({ACCOUNT.c.in_database: text("'x'")}),
    "INSERT with RETURNING": lambda: insert(Account).values(s=text("'x'")).returning(Account.id),
    "INSERT of several": lambda: insert(Account).values([{"s": 1, "id": 20}, {"s": text(f"'{MARKER}'"), "id": 21}]),
    "INSERT of several, Core": lambda: insert(ACCOUNT).values([{ACCOUNT.c.s: text("'x'")}, {ACCOUNT.c.s: text("'y'")}]),
    "INSERT of several tuples": lambda: insert(Base.metadata.tables["dog"]).values([(1, null()), (3, text("'y'"))]),
    "from_select": lambda: insert(Item).from_select(["s"], select(Account.o)),
    "from_select of plaintext": lambda: insert(Item).from_select(["s"], select(Account.kind)),
    "from_select of a literal": lambda: insert(Item).from_select(["id", "s"], select(Account.id, literal(MARKER))),
    "from_select of a parameter": lambda: insert(ITEM).from_select(
        ["s"], select(bindparam("b")), include_defaults=False
    ),
    "from_select of text": lambda: insert(Item).from_select(["id", "s"], select(text("1"), text("'x'"))),
    "from_select of a union": lambda: insert(Item).from_select(
        ["s"], union_all(select(Account.o), select(A.o)), include_defaults=False
    ),
    "from_select of a subquery": lambda: insert(Item).from_select(["s"], select(select(Account.o).subquery().c.o)),
    "from_select with attributes": lambda: insert(Account).from_select([Account.renamed], select(Item.s)),
    "plain column": lambda: update(Account).values(kind=Account.t),
    "plain column by from_select": lambda: insert(Item).from_select(["note"], select(Account.t)),
}

REFUSED: dict[str, dict[str, Callable[[], Any]]] = {
    "order": ORDERS,
    "group": GROUPS,
    "computation": COMPUTATIONS,
    "comparison": COMPARISONS,
    "mixture": MIXTURES,
    "assignment": ASSIGNMENTS,
}
INSTEAD = {
    "order": "sort them in Python",
    "group": " in Python",
    "computation": "Load the value",
    "comparison": "compare or compute in Python",
    "mixture": "",
    "assignment": "ssign",
}
SQLITE_CANNOT = {
    *("aggregate", "aggregate of PostgreSQL", "aggregate of PostgreSQL by itself", "ANY", "array", "in a lateral"),
    "distinct on",
}

NAMES = [(table, name) for table in ("Account", "Item", "Dog") for name in ("s", "o", "t", "moved", "bone", "renamed")]
NAMES += [
    (table, name) for table in ("account", "item", "dog") for name in ("s", "o", "t", "moved", "bone", "in_database")
]


def see_refused(engine: Engine, statement: Callable[[], Any], instead: str, parameters: Any = None) -> None:
    """See that a statement is refused each time, that nothing of it reaches the database, and that work goes on."""
    executed: list[str] = []
    with Session(engine) as session:
        connection = session.connection()
        before = contents(connection)
        event.listen(connection, "after_cursor_execute", lambda *arguments: executed.append(arguments[2]))
        for _ in range(2):  # the second time from the cache of statements
            with pytest.raises(UnsupportedOperationError) as caught:
                session.execute(statement(), parameters)
            assert executed == []
            see_message(caught.value, instead)
        assert contents(connection) == before
        session.execute(insert(Account).values(id=99, s="usable"))
        assert session.get_one(Account, 99).s == "usable"


def see_message(error: UnsupportedOperationError, instead: str) -> None:
    message = str(error)
    assert any(f"{table}.{name} is " in message or f"{table}.{name} would" in message for table, name in NAMES) or any(
        f"{table}.{name}, " in message for table, name in NAMES
    ), message
    assert instead in message
    assert "anon" not in message
    assert leaked(error, MARKER) == []
    assert error.__context__ is None


@distinct_on
@pytest.mark.parametrize(
    ("group", "name"),
    [pytest.param(group, name, id=f"{group}: {name}") for group, names in REFUSED.items() for name in names],
)
def test_what_is_wrong_on_ciphertext_is_not_executed(engine: Engine, group: str, name: str) -> None:
    if engine.dialect.name == "sqlite" and name in SQLITE_CANNOT:
        with pytest.raises(UnsupportedOperationError) as caught:
            check_statement(REFUSED[group][name]())
        see_message(caught.value, INSTEAD[group])
        return
    parameters = {"b": 1} if name in {"bulk UPDATE", "from_select of a parameter"} else None
    see_refused(engine, REFUSED[group][name], INSTEAD[group], parameters)


CONFLICTS: dict[str, Callable[[Any], dict[Any, Any]]] = {
    "another column": lambda made: {"s": made.excluded.o},
    "another column of the row": lambda made: {"s": Account.o},
    "text": lambda made: {"s": text(f"'{MARKER}'")},
    "a function": lambda made: {"in_database": func.lower(MARKER)},
    "a literal of another type": lambda made: {"t": literal(MARKER)},
    "text for a column": lambda made: {ACCOUNT.c.s: text("'x'")},
    "one of several": lambda made: {"kind": "x", "s": made.excluded.s, "o": text("'x'")},
    "a plain column": lambda made: {"kind": made.excluded.t},
    "a computation": lambda made: {"kind": func.hex(made.excluded.t)},
    "a subquery": lambda made: {"kind": select(func.count()).where(func.hex(Account.t) == "x").scalar_subquery()},
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_would_be_wrong_on_conflict_is_not_executed(engine: Engine, name: str) -> None:
    made = UPSERTS[engine.dialect.name](Account).values(id=1, s=1)

    def statement() -> Any:
        return made.on_conflict_do_update(index_elements=["id"], set_=CONFLICTS[name](made))

    see_refused(engine, statement, "")


def test_conditions_of_on_conflict_are_checked(engine: Engine) -> None:
    made = UPSERTS[engine.dialect.name](Account).values(id=1, s=1)
    computed = func.lower(Account.t) == "x"
    for condition in (computed, made.excluded.kind == made.excluded.t):
        see_refused(
            engine,
            lambda c=condition: made.on_conflict_do_update(index_elements=["id"], set_={"kind": "x"}, where=c),  # type: ignore[misc]
            "Python",
        )
    see_refused(engine, lambda: made.on_conflict_do_nothing(index_elements=["id"], index_where=computed), "Python")


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_would_be_wrong_on_duplicate_key_is_refused(name: str) -> None:
    class Excluded:
        excluded = mysql.insert(ACCOUNT).inserted

    changes = CONFLICTS[name](Excluded)
    for given in (changes, list(changes.items())):
        with pytest.raises(UnsupportedOperationError) as caught:
            check_statement(mysql.insert(ACCOUNT).values(id=1).on_duplicate_key_update(given))
        see_message(caught.value, "")


def test_what_is_right_on_duplicate_key_is_not_refused() -> None:
    made = mysql.insert(ACCOUNT).values(id=1, s=1)
    right: list[dict[str, Any]] = [
        {"s": made.inserted.s, "kind": "x"},
        {"s": ["value"], "o": None},
        {"s": bindparam("b")},
        {"o": null()},
    ]
    for changes in right:
        check_statement(made.on_duplicate_key_update(changes))
        check_statement(made.on_duplicate_key_update(list(changes.items())))


def test_try_cast_is_refused() -> None:
    with pytest.raises(UnsupportedOperationError) as caught:
        check_statement(select(try_cast(Account.t, Numeric)))
    see_message(caught.value, "Load the value and convert it in Python")


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_extensions_of_sqlalchemy_2_1_are_checked(engine: Engine) -> None:
    on: Any = vars(postgresql).get("distinct_on")
    if on is None:
        assert sqlalchemy.__version__.startswith("2.0.")
        return
    see_refused(engine, lambda: select(Account.id).ext(on(Account.s)), "Python")  # type: ignore[attr-defined, unused-ignore]
    with Session(engine) as session:
        session.execute(select(Account.s).ext(on(Account.kind)))  # type: ignore[attr-defined, unused-ignore]
    ordered: Any = func.array_agg(Account.id)
    see_refused(engine, lambda: select(ordered.aggregate_order_by(Account.s)), "sort them in Python")


FLUSHES: dict[str, Any] = {
    "text": text(f"'{MARKER}'"),
    "function": func.coalesce(None, MARKER),
    "literal": literal(MARKER),
    "another column": ACCOUNT.c.o,
    "a subquery": select(ACCOUNT.c.o).limit(1).scalar_subquery(),
}


@pytest.mark.parametrize("name", FLUSHES)
@pytest.mark.parametrize("field", ["s", "renamed"])
def test_flush_of_a_sql_expression_is_refused(engine: Engine, name: str, field: str) -> None:
    with Session(engine) as session:
        before = contents(session.connection())
        for _ in range(2):
            session.get_one(Account, 1)
            setattr(session.get_one(Account, 1), field, FLUSHES[name])
            with pytest.raises(UnsupportedOperationError) as caught:
                session.flush()
            see_message(caught.value, "ssign")
            session.rollback()
            if name != "another column":
                session.add(Account(id=20, **{field: FLUSHES[name]}))
                with pytest.raises(UnsupportedOperationError) as caught:
                    session.commit()
                see_message(caught.value, "ssign")
                session.rollback()
        assert contents(session.connection()) == before
        session.get_one(Account, 1).s = ["usable"]
        session.flush()


def test_refused_statement_leaves_a_transaction_that_can_be_committed(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Note(id=50, title="before"))
        session.flush()
        with pytest.raises(UnsupportedOperationError):
            session.execute(update(Account).values(s=Account.o))
        session.add(Note(id=51, title="after"))
        session.commit()
        assert session.scalars(select(Note.title).where(Note.id >= 50).order_by(Note.id)).all() == ["before", "after"]
        session.execute(delete(Note).where(Note.id >= 50))
        session.commit()


def test_many_rows_with_an_expression_are_refused(engine: Engine) -> None:
    """As parameters of an INSERT of many rows, expressions would be values; as values, they are checked."""
    statement = insert(ACCOUNT).values(s=text(f"'{MARKER}'"))
    for parameters in ([{"id": 20}, {"id": 21}], {"id": 20}):
        see_refused(engine, lambda: statement, "Assign a Python value", parameters)
    see_refused(
        engine,
        lambda: update(ACCOUNT).where(ACCOUNT.c.id == bindparam("b")).values(s=ACCOUNT.c.o),
        "associated_data",
        [{"b": 1}, {"b": 2}],
    )
    with engine.connect() as connection:
        before = contents(connection)
        rows: list[dict[str, Any]] = [{"id": 20, "s": 1}, {"id": 21, "s": text("'x'")}]
        with pytest.raises(UnstorableValueError):
            connection.execute(insert(ACCOUNT), rows)
        assert contents(connection) == before


def test_bulk_methods_of_the_orm_refuse_expressions(engine: Engine) -> None:
    with Session(engine) as session:
        before = contents(session.connection())
        rows: list[dict[str, Any]] = [{"id": 20, "s": ACCOUNT.c.o}, {"id": 21, "s": text(f"'{MARKER}'")}]
        for write in (
            lambda: session.execute(insert(Account), rows),
            lambda: session.execute(update(Account), [{"id": 1, "s": text("'x'")}]),
            lambda: session.bulk_insert_mappings(Account.__mapper__, rows),
            lambda: session.bulk_save_objects([Account(id=20, s=ACCOUNT.c.o)]),
        ):
            with pytest.raises(UnstorableValueError) as caught:
                write()
            assert leaked(caught.value, MARKER) == []
            session.rollback()
        assert contents(session.connection()) == before


# --- What cannot be seen ---------------------------------------------------------------------------------------------


def test_equal_values_are_not_equal_for_distinct_and_union(session: Session) -> None:
    assert session.scalars(select(Account.s).where(Account.kind == "b").distinct()).all() == [N2, N2]
    twice = union(select(Account.s).where(Account.id == 2), select(A.s).where(A.id == 3))
    assert session.scalars(twice).all() == [N2, N2]
    assert (
        session.scalars(intersect(select(Account.s).where(Account.id == 2), select(A.s).where(A.id == 3))).all() == []
    )


def test_text_is_not_looked_into(session: Session) -> None:
    assert session.execute(text("SELECT count(DISTINCT s) FROM account")).scalar() == 3
    assert len(session.execute(select(Account.id).order_by(text("s"))).all()) == 3
    session.execute(text("UPDATE account SET t = 'plain' WHERE id = 1"))
    with pytest.raises(MalformedCiphertextError):
        session.scalars(select(Account.t)).all()


@pytest.mark.parametrize("function", [func.lag, func.last_value])
def test_function_without_a_type_is_refused_since_ciphertext_would_come_out(engine: Engine, function: Any) -> None:
    see_refused(engine, lambda: select(function(Account.s).over(order_by=Account.id)), "type_=column.type")


def test_ciphertext_comes_out_of_a_function_that_was_told_so(session: Session) -> None:
    lagging = func.lag(Account.s, type_=LargeBinary()).over(order_by=Account.id)
    found: Any = session.scalars(select(lagging).where(Account.id < 3)).all()
    assert found[0] is None
    assert bytes(found[1])[:2] == b"\xf9\x02"


UNUSUAL: dict[str, Callable[[], Any]] = {
    "name in a window": lambda: select(Account.s, func.row_number().over(order_by="kind")),
    "sequence": lambda: select(Account.s, Sequence("numbers").next_value()),
    "insert of a sequence": lambda: insert(Account).values(id=Sequence("numbers").next_value(), s=N1),
    "values of a function": lambda: select(Account.s, func.generate_series(1, 2).column_valued("x")),
    "table of a function": lambda: select(Account.s, func.json_each("[1]").table_valued("key", "value")),
    "sample": lambda: select(tablesample(Account, func.bernoulli(1))),
    "rollup": lambda: select(Account.kind, func.count(Account.s)).group_by(func.rollup(Account.kind)),
    "values": lambda: select(Account.s, values(column("a", Integer), name="v").data([(1,)])),
    "text with columns": lambda: select(Account).from_statement(text("SELECT * FROM account")),
    "text in a union": lambda: union_all(
        select(Account.id, Account.s), text("SELECT id, s FROM account").columns(Account.id, Account.s)
    ),
    "unions in a union": lambda: union_all(union_all(select(Account.s), select(A.s)), select(A.s)).order_by(text("1")),
    "number in order by": lambda: select(Account.id, Account.s).order_by(text("1")),
    "locked": lambda: select(Account).with_for_update(of=Account),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_parts_of_a_statement_are_no_trouble(name: str) -> None:
    statement = UNUSUAL[name]()
    check_statement(statement)
    dialect: Any = postgresql.dialect
    made = getattr(statement.compile(dialect=dialect()).compile_state, "statement", None)
    if made is not None:
        check_statement(made)


# --- Statements without encrypted columns ----------------------------------------------------------------------------


def ordinary(made: Any, dialect: str) -> dict[str, Any]:
    n, other = NOTE.c, aliased(Note)
    tree = select(Note.id).where(Note.id == 1).cte("tree", recursive=True)
    lower = select(func.lower(Note.title).label("low"), Note.kind).subquery()
    statements: dict[str, Any] = {
        "entity": select(Note).order_by(Note.title.desc().nulls_last(), "kind", Note.id),
        "joined": select(Note, Account)
        .outerjoin(Account, Account.id == Note.account_id)
        .order_by(Note.title, Account.id),
        "grouped": select(Note.kind, func.max(Note.title), func.count(distinct(Note.body))).group_by(Note.kind),
        "having": select(Note.kind)
        .group_by(Note.kind)
        .having(func.max(Note.title) > "a")
        .order_by(func.max(Note.title)),
        "grouped by name": select(Note.kind.label("k"), func.count().label("n")).group_by("k").order_by(desc("n"), "k"),
        "distinct": select(Note.kind, Note.title).distinct().order_by(Note.kind, Note.title),
        "union": union(select(Note.title), select(Note.body), select(Account.kind)).order_by("title"),
        "coalesce": select(
            func.coalesce(Note.title, Note.body, "x"), func.nullif(Note.title, "x"), func.coalesce(None, 1)
        ),
        "case": select(
            case((Note.kind == "a", Note.title), (Note.kind == "b", null()), else_="x"), case({"a": 1}, value=Note.kind)
        ),
        "cast": select(cast(Note.amount, String), cast(Note.title, Text), type_coerce(Note.body, String)),
        "window": select(
            func.rank().over(partition_by=[Note.kind, Note.title], order_by=[Note.body, DESCENDING(Note.id)])
        ),
        "filter": select(func.sum(Note.amount).filter(Note.kind == "a")),
        "tuple": select(Note.id).where(tuple_(Note.id, Note.title).in_([(1, "first")])),
        "tuple of a subquery": select(Note.id).where(tuple_(Note.id, Note.title).in_(select(other.id, other.title))),
        "operators": select(Note.title + Note.body + "x", Note.amount % 2, -Note.amount, Note.title.between("a", "z")),
        "conditions": select(Note.id).where(
            or_(Note.title.ilike("%f%"), not_(Note.kind.in_(["a"])), Note.blob == b"\x01"), Note.amount > 0
        ),
        "null tests": select(Note.id).where(Note.title.is_distinct_from("x"), Note.kind.is_not(None)),
        "JSON": select(Note.id).where(Note.data["k"][0].as_integer() == 1),
        "subquery": select(lower.c.low).where(lower.c.kind == "a").order_by(lower.c.low),
        "recursive": using(
            tree.union_all(select(Note.id).join(tree, Note.id == tree.c.id + 1)),
            lambda c: select(c.c.id).order_by(c.c.id),
        ),
        "lateral": select(
            Note.id, select(other.title).where(other.id == Note.id).order_by(other.title).limit(1).scalar_subquery()
        ),
        "extract and now": select(extract("year", func.current_date()), func.now()),
        "literal columns": select(literal_column("1"), text("2"), literal("x"), literal(None)).order_by(text("1")),
        "exists": select(exists().where(Note.title == "first")),
        "update": update(Note).values(title=func.upper(Note.title), body=Note.title, amount=Note.amount + 1),
        "update from a select": update(Note)
        .values(title=select(func.max(other.title)).scalar_subquery())
        .where(Note.id < 0),
        "update ordered": update(Note)
        .ordered_values((Note.title, Note.body), (Note.body, text("'x'")))
        .where(Note.id < 0),
        "update with text": update(NOTE).values(title=text("'x'"), data=null()).where(n.id < 0),
        "insert": insert(Note).values(id=30, title=func.lower("X"), data={"k": 1}).returning(func.lower(Note.title)),
        "insert many": insert(NOTE).values([{"id": 31, "title": func.lower("X")}, {"id": 32, "title": "y"}]),
        "insert tuples": insert(NOTE).values(
            [(33, "k", "t", "b", null(), b"", 1, None), (34, "k", "t", "b", null(), b"", 1, None)]
        ),
        "insert from a select": insert(NOTE).from_select(
            ["id", "title", "body"], select(n.id + 50, n.body, literal("x"))
        ),
        "upsert": using(
            made(NOTE).values(id=1, title="x"),
            lambda i: i.on_conflict_do_update(
                index_elements=["id"],
                set_={"title": i.excluded.body, "body": func.lower(i.excluded.title)},
                where=n.title > "a",
            ),
        ),
        "delete": delete(Note).where(Note.title == func.lower(Note.body)),
        "mixed with encrypted": select(Account.s, func.lower(Account.kind))
        .where(Account.kind.in_(["a", "b"]))
        .order_by(Account.kind, Account.id),
    }
    if dialect == "postgresql":
        statements |= {
            "aggregates": select(
                func.array_agg(postgresql.aggregate_order_by(Note.title, Note.body.desc())),
                func.string_agg(Note.title, postgresql.aggregate_order_by(literal_column("','"), Note.title)),
                func.percentile_cont(0.5).within_group(Note.amount),
            ),
            "arrays": select(
                postgresql.array([Note.title, Note.body]), Note.title == any_(postgresql.array(["a", "b"]))
            ),
            "table function": select(func.generate_series(1, 3).table_valued("value").render_derived().c.value),
            "distinct on": select(Note.title).distinct(Note.kind).order_by(Note.kind, Note.title),
            "values": select(values(Column("a", Integer), Column("b", String), name="v").data([(1, "x"), (2, "y")])),
            "grouping sets": select(Note.kind, func.count()).group_by(func.rollup(Note.kind)),
        }
    return statements


@distinct_on
def test_statements_without_encrypted_columns_are_not_hindered(engine: Engine) -> None:
    plain = create_engine(engine.url)
    for name, statement in ordinary(UPSERTS[engine.dialect.name], engine.dialect.name).items():
        found = []
        for one in (engine, plain):
            with Session(one) as session:
                result = session.execute(statement)
                rows = result.all() if getattr(result, "returns_rows", True) else []
                shown = [str([inspect(one).identity if isinstance(one, Base) else one for one in row]) for row in rows]
                found.append([] if name == "extract and now" else sorted(shown))
        assert found[0] == found[1], name
    plain.dispose()


# --- The guard -------------------------------------------------------------------------------------------------------


class Checks(list[Any]):
    """Statements that were checked."""


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    made = Checks()

    def check(statement: Any) -> None:
        made.append(statement)
        check_statement(statement)

    monkeypatch.setattr(guards, "check_statement", check)
    return made


def test_statement_is_checked_once(engine: Engine, checks: Checks) -> None:
    fresh = create_engine(engine.url)
    guards.install(fresh)
    guards.install(fresh)
    with Session(fresh) as session:
        for number in range(5):
            session.execute(select(Account).where(Account.id == number, Account.kind != "checked once"))
            assert len(checks) == 1
        for number in range(5):
            session.execute(insert(Account), [{"id": 100 + 10 * number + each, "s": 1} for each in range(3)])
        assert len(checks) == 2
        for _ in range(3):
            session.scalars(select(Account).options(selectinload(Account.items))).all()
        assert len(checks) == 4
        for count in range(1, 4):
            with pytest.raises(UnsupportedOperationError):
                session.execute(select(Account).order_by(Account.s))
            assert len(checks) == 4 + count
    with fresh.connect() as connection:
        connection.execute(text("SELECT 1"))
        connection.exec_driver_sql("SELECT 1")
        for _ in range(3):
            connection.execute(text("SELECT 1"))
    assert len(checks) == 8
    fresh.dispose()


def listeners_of(engine: Engine) -> int:
    """Return how many listen to its statements besides those who listen to every engine, as row binding does."""
    return len(engine.dispatch.before_cursor_execute) - len(create_engine("sqlite://").dispatch.before_cursor_execute)


def asking_for_binary(engine: Engine) -> int:
    return int(engine.dialect.driver == "psycopg")


def test_guards_are_installed_once(engine: Engine) -> None:
    fresh = create_engine(engine.url)

    def listeners() -> list[int]:
        return [listeners_of(fresh), len(fresh.dialect.dispatch.handle_error)]

    guards.install(fresh, check_statements=False, redact_errors=False, binary_results=False)
    assert listeners() == [0, 0]
    for _ in range(3):
        guards.install(fresh, binary_results=False)
        assert listeners() == [1, 1]
    guards.install(fresh, check_statements=False, binary_results=False)
    assert listeners() == [1, 1]
    for _ in range(3):
        guards.install(fresh)
        assert listeners() == [1 + asking_for_binary(fresh), 1]
    fresh.dispose()


def test_engine_with_options_is_guarded_with_its_engine(engine: Engine) -> None:
    with engine.execution_options(stream_results=True).connect() as connection:
        assert len(connection.execute(select(ACCOUNT)).all()) == 3
        with pytest.raises(UnsupportedOperationError):
            connection.execute(select(ACCOUNT).order_by(ACCOUNT.c.s))
        with pytest.raises(UnsupportedOperationError):
            connection.execution_options(compiled_cache=None).execute(select(ACCOUNT).order_by(ACCOUNT.c.s))


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_cursor_of_a_refused_statement_is_closed(engine: Engine) -> None:
    cursors: list[Any] = []
    with engine.connect() as connection:
        event.listen(connection, "before_cursor_execute", lambda *arguments: cursors.append(arguments[1]), insert=True)
        for stream in (False, True):
            with pytest.raises(UnsupportedOperationError):
                connection.execution_options(stream_results=stream).execute(select(ACCOUNT).order_by(ACCOUNT.c.s))
    assert [cursor.closed for cursor in cursors] == [True, True]


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database_url: str) -> str:
    """Give the URL of a database with the tables of keys and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KRAVN_SECRET", "of the test, with enough characters")
    made = create_engine(database_url)
    migrate(made)
    Base.metadata.create_all(made)
    made.dispose()
    return database_url


SORTED, KEPT = select(Account.id).order_by(Account.s), select(Account.id).order_by(Account.kind)


def test_configure_guards_each_engine(configured: str) -> None:
    engine, second, other = (create_engine(configured) for _ in range(3))
    configure(engine)
    configure(engine)
    configure(second)
    for each in (engine, second):
        # The guard of statements, the one of the fence, and what asks psycopg for binary.
        assert listeners_of(each) == 2 + asking_for_binary(each)
        with Session(each) as session:
            session.execute(KEPT)
            with pytest.raises(UnsupportedOperationError):
                session.execute(SORTED)
    with Session(other) as session:
        session.execute(SORTED)
    for each in (engine, second, other):
        each.dispose()


def test_check_of_statements_can_be_turned_off(configured: str) -> None:
    engine = create_engine(configured)
    configure(engine, check_statements=False)
    with Session(engine) as session:
        session.execute(SORTED)
    configure(engine)
    with Session(engine) as session, pytest.raises(UnsupportedOperationError):
        session.execute(SORTED)
    engine.dispose()


@pytest.mark.parametrize("checked", [True, False])
def test_configure_async_guards_its_engine(configured: str, *, checked: bool) -> None:
    async def main() -> None:
        engine = create_async_engine(asynchronous(configured))
        await configure_async(engine, check_statements=checked)
        async with AsyncSession(engine) as session:
            session.add(Account(id=1, s=["async"]))
            await session.commit()
            for _ in range(2):
                if checked:
                    with pytest.raises(UnsupportedOperationError):
                        await session.execute(SORTED)
                    with pytest.raises(UnsupportedOperationError):
                        await session.stream(SORTED)
                else:
                    await session.execute(SORTED)
            assert (await session.scalars(select(Account.s).order_by(Account.kind))).all() == [["async"]]
        async with engine.connect() as connection:
            if checked:
                with pytest.raises(UnsupportedOperationError):
                    await connection.execute(update(ACCOUNT).values(s=text("'x'")))
            assert await connection.scalar(select(func.count(ACCOUNT.c.s))) == 1
        await engine.dispose()

    asyncio.run(main())


def test_engine_at_the_address_of_an_earlier_one_is_guarded_too() -> None:
    for _ in range(200):
        made = create_engine("sqlite://")
        guards.install(made)
        # Let go of at once, so that its address is free for the next.
        with made.connect() as connection, pytest.raises(UnsupportedOperationError):
            connection.execute(select(ACCOUNT).order_by(ACCOUNT.c.s))
        made.dispose()
        del made, connection
