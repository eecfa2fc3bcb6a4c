"""Columns that are bound to their row: what is written for one row is not read in another."""

import asyncio
import gc
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import (
    CHAR,
    Column,
    Engine,
    Enum,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Uuid,
    bindparam,
    create_engine,
    delete,
    func,
    insert,
    literal_column,
    select,
    text,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, defer, mapped_column, undefer

from sqlalchemy_kravn_crypto import DataKey, EncryptedBytes, EncryptedJSON, EncryptedString, Keyring, use_keyring
from sqlalchemy_kravn_crypto.ciphertext import from_text
from sqlalchemy_kravn_crypto.exceptions import (
    AuthenticationError,
    ColumnError,
    ColumnUnreachableError,
    DecryptionError,
    KravnCryptoError,
    MalformedCiphertextError,
    UnsupportedDatabaseError,
    UnsupportedOperationError,
)
from sqlalchemy_kravn_crypto.known_columns import declared, located, record, recorded
from sqlalchemy_kravn_crypto.rekey import rekey
from sqlalchemy_kravn_crypto.row_identity import IdentityColumn, Kind
from sqlalchemy_kravn_crypto.schema import TABLES
from sqlalchemy_kravn_crypto.statements import check_statement
from tests import reference
from tests.fixtures_postgres import asynchronous
from tests.leaks import leaked

MARKER = "S3CR3T" + "-marker"
KEY = bytes(range(32))
A, B = uuid.UUID(int=0xA), uuid.UUID(int=0xB)


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant: Mapped[str] = mapped_column(
        String(50).with_variant(String(50, collation="utf8mb4_bin"), "mysql", "mariadb"), default="t1"
    )
    plain: Mapped[str | None] = mapped_column(String(50))
    record: Mapped[Any] = mapped_column(EncryptedJSON(bind_row="id"), nullable=True)
    note: Mapped[str | None] = mapped_column(EncryptedString(bind_row=("tenant", "id"), storage="text"))
    free: Mapped[str | None] = mapped_column(EncryptedString)


class Counted(Base):
    __tablename__ = "counted"

    id: Mapped[int] = mapped_column(primary_key=True)
    secret: Mapped[str | None] = mapped_column(EncryptedString(bind_row="id"))


PATIENTS: Any = Patient.__table__
COUNTED: Any = Counted.__table__


@pytest.fixture(autouse=True)
def _keyring() -> Iterator[None]:
    with use_keyring(Keyring(DataKey(KEY))):
        yield


@pytest.fixture
def engine(any_database_url: str) -> Iterator[Engine]:
    made = create_engine(any_database_url)
    Base.metadata.create_all(made)
    yield made
    made.dispose()


@pytest.fixture
def light() -> Iterator[Engine]:
    """Give an engine where the database does not matter."""
    made = create_engine("sqlite://")
    Base.metadata.create_all(made)
    yield made
    made.dispose()


def _two(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Patient(id=A, record={"of": "A"}, note="A"))
        session.add(Patient(id=B, record={"of": "B"}, note="B"))
        session.commit()


def _stored(column: Any) -> Any:
    return type_coerce(column, LargeBinary() if column.type.storage == "binary" else String())


def _raw(engine: Engine, column: Any, row: uuid.UUID) -> Any:
    with engine.connect() as connection:
        return connection.execute(select(_stored(column)).where(Patient.id == row)).scalar_one()


def _put(engine: Engine, column: Any, row: uuid.UUID, value: Any) -> None:
    """Write a stored value as whoever has the database does."""
    name = column.key
    with engine.begin() as connection:
        key = literal_column(f"patient.{name}", _stored(column).type)
        statement = text(f"UPDATE patient SET {name} = :value WHERE id = :id").bindparams(  # noqa: S608 - a fixed name
            bindparam("value", value, type_=key.type), bindparam("id", row, type_=Uuid())
        )
        assert connection.execute(statement).rowcount == 1


# --- It is read where it was written ---------------------------------------------------------------------------------


def test_the_orm_reads_what_it_wrote(engine: Engine) -> None:
    _two(engine)
    with Session(engine) as session:
        found = session.get_one(Patient, A)
        assert (found.record, found.note) == ({"of": "A"}, "A")
        found.record = {"of": "A", "changed": True}
        found.note = "changed"
        session.commit()
        assert (found.record, found.note) == ({"of": "A", "changed": True}, "changed")
        session.expire(found)
        session.refresh(found, ["note"])
        assert found.note == "changed"
        assert session.get_one(Patient, B).record == {"of": "B"}


def test_the_bytes_are_those_of_the_format(engine: Engine) -> None:
    _two(engine)
    key = reference.expand(KEY, "aead/02")
    for column, name, texts in (
        (Patient.record, "patient.record", [A.hex]),
        (Patient.note, "patient.note", ["t1", A.hex]),
    ):
        stored = _raw(engine, column, A)
        frame = bytes(stored) if isinstance(stored, (bytes, memoryview)) else from_text(stored)
        row = reference.lp(*(one.encode() for one in texts))
        associated_data = frame[:12] + reference.lp(name.encode(), row)
        payload = AESGCM(reference.xaes_subkey(key, frame[12:36])).decrypt(frame[24:36], frame[36:], associated_data)
        assert reference.lp(b"A") not in payload
        assert b"A" in payload


def test_core_reads_what_it_wrote(engine: Engine) -> None:
    table = PATIENTS
    with engine.begin() as connection:
        connection.execute(insert(table).values(id=A, record=[1], note="one"))
        connection.execute(insert(table), [{"id": B, "record": [2], "note": "two"}])
        connection.execute(insert(PATIENTS), [{"record": [3], "note": "three"}])
        connection.execute(
            insert(table).values([{"id": uuid.UUID(int=n), "record": [n], "note": str(n)} for n in (4, 5)])
        )
        connection.execute(update(table).where(table.c.id == B).values(record=[22]))
        connection.execute(
            update(table).where(table.c.id == bindparam("row")).values(record=bindparam("new")),
            [{"row": A, "new": [11]}, {"row": uuid.UUID(int=4), "new": [44]}],
        )
        connection.execute(update(table).where(table.c.tenant == "t1", table.c.id == A).values(note="uno"))
        found = sorted(connection.execute(select(table.c.record, table.c.note)).all())
        assert found == [([3], "three"), ([5], "5"), ([11], "uno"), ([22], "two"), ([44], "4")]
        record = connection.execute(select(table.c.record.label("x")).where(table.c.id == A)).scalar_one()
        assert record == [11]


@pytest.mark.parametrize("rows", [1, 3, 2500])
def test_bulk_inserts_with_and_without_returning(engine: Engine, rows: int) -> None:
    keys = [uuid.UUID(int=1000 + n) for n in range(rows)]
    with Session(engine) as session:
        session.execute(insert(Patient), [{"id": key, "record": [key.hex], "note": key.hex} for key in keys])
        session.add_all(Patient(record=["default"], note="default") for _ in range(rows))
        session.commit()
        inserted = session.scalars(
            insert(Counted).returning(Counted.secret, sort_by_parameter_order=True),
            [{"id": n + 1, "secret": str(n)} for n in range(rows)],
        ).all()
        assert inserted == [str(n) for n in range(rows)]
        session.commit()
        for found in session.scalars(select(Patient)):
            assert (found.record, found.note) in (([found.id.hex], found.id.hex), (["default"], "default"))


def test_bulk_update_by_primary_key(engine: Engine) -> None:
    _two(engine)
    with Session(engine) as session:
        session.execute(update(Patient), [{"id": A, "record": 1}, {"id": B, "record": 2}])
        session.commit()
        assert dict(session.execute(select(Patient.id, Patient.record)).all()) == {A: 1, B: 2}


@pytest.mark.parametrize("synchronize", ["auto", "evaluate", "fetch", False])
def test_orm_update_of_one_row(light: Engine, synchronize: Any) -> None:
    _two(light)
    with Session(light) as session:
        session.execute(
            update(Patient).where(Patient.id == A).values(record={"of": "A2"}),
            execution_options={"synchronize_session": synchronize},
        )
        session.commit()
        assert session.get_one(Patient, A).record == {"of": "A2"}


def test_null_is_bound_to_nothing(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Patient(id=A, record=None, note=None))
        session.commit()
        assert session.execute(select(Patient.record, Patient.note)).one() == (None, None)
        session.execute(update(Patient).values(record=None))


def test_aliases_subqueries_unions_and_joins(engine: Engine) -> None:
    _two(engine)
    other = aliased(Patient)
    inner = select(Patient.id, Patient.record).where(Patient.id == B).subquery()
    part = select(Patient).where(Patient.id == A).cte()
    both = union_all(select(Patient.id, Patient.record), select(other.id, other.record)).subquery()
    with Session(engine) as session:
        assert session.execute(select(other.record).where(other.id == A)).scalar_one() == {"of": "A"}
        assert session.execute(select(inner.c.record)).scalar_one() == {"of": "B"}
        assert session.execute(select(aliased(Patient, part).record)).scalar_one() == {"of": "A"}
        joined = select(Patient.record, other.record).join(other, other.id != Patient.id).where(Patient.id == A)
        assert session.execute(joined).one() == ({"of": "A"}, {"of": "B"})
        assert len(session.execute(select(both.c.record)).all()) == 4
        assert session.execute(union_all(select(Patient.record), select(other.record))).all().count(({"of": "B"},)) == 2
        deferred = session.scalars(select(Patient).options(defer(Patient.record)).where(Patient.id == A)).one()
        assert deferred.record == {"of": "A"}
        assert session.scalars(select(Patient).options(undefer(Patient.note)).where(Patient.note.is_(None))).all() == []


def test_values_of_every_length_of_key(engine: Engine) -> None:
    with Session(engine) as session:
        keys = [1, 10, 2**31 - 1]
        session.add_all(Counted(id=key, secret=str(key)) for key in keys)
        session.commit()
        assert sorted(session.execute(select(Counted.id, Counted.secret)).all()) == [(k, str(k)) for k in keys]


def test_keys_of_any_text(engine: Engine) -> None:
    tenants = ["t", "größe.x", "-", "%s :p ?", "a'b\\", "\N{GRINNING FACE}"]
    with Session(engine) as session:
        session.add_all(Patient(tenant=tenant, note=tenant) for tenant in tenants)
        session.commit()
        assert sorted(filter(None, session.scalars(select(Patient.note)))) == sorted(tenants)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "aiosqlite"])
def test_async_sessions(postgres_url: str, driver: str, tmp_path: Any) -> None:
    url = asynchronous(f"sqlite:///{tmp_path}/a.db") if driver == "aiosqlite" else asynchronous(postgres_url)
    if driver == "psycopg":
        url = url.replace("asyncpg", "psycopg")

    async def run() -> list[Any]:
        engine = create_async_engine(url)
        with use_keyring(Keyring(DataKey(KEY))):
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
            async with AsyncSession(engine) as session:
                session.add_all([Patient(id=A, record=1, note="x"), Patient(id=B, record=2, note="y")])
                await session.commit()
                stream = await session.stream(select(Patient.record, Patient.note).order_by(Patient.id))
                found = [tuple(row) async for row in stream]
        await engine.dispose()
        return found

    assert asyncio.run(run()) == [(1, "x"), (2, "y")]


# --- And nowhere else ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["record", "note"])
def test_a_value_that_is_copied_to_another_row_is_refused(engine: Engine, name: str) -> None:
    _two(engine)
    column = getattr(Patient, name)
    _put(engine, column, B, _raw(engine, column, A))
    with Session(engine) as session:
        assert session.execute(select(column).where(Patient.id == A)).scalar_one() in ({"of": "A"}, "A")
        with pytest.raises(AuthenticationError, match="another row"):
            session.get(Patient, B)
        with pytest.raises(AuthenticationError, match="another row"):
            session.execute(select(PATIENTS.c[name]).where(Patient.id == B)).all()


def test_a_value_of_a_row_whose_key_was_changed_is_refused(engine: Engine) -> None:
    _two(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE patient SET tenant = 't2'"))
        assert connection.execute(select(Patient.record).where(Patient.id == A)).scalar_one() == {"of": "A"}
        with pytest.raises(AuthenticationError, match="identifies its row"):
            connection.execute(select(Patient.note)).all()


def test_what_is_bound_and_what_is_not_are_not_taken_for_each_other(light: Engine) -> None:
    unbound = Table(
        "patient",
        MetaData(),
        Column("id", Uuid, primary_key=True),
        Column("tenant", String),
        Column("record", EncryptedJSON),
    )
    with light.begin() as connection:
        connection.execute(insert(unbound).values(id=A, tenant="t1", record=1))
        with pytest.raises(AuthenticationError):
            connection.execute(select(Patient.record)).all()
        connection.execute(update(PATIENTS).where(Patient.id == A).values(record=2))
        with pytest.raises(AuthenticationError):
            connection.execute(select(unbound.c.record)).all()


@pytest.mark.parametrize(
    "stored", ["", "x", "-.", "41.", "enc:v3:AAAA", "zz.enc:v3:", "41.41.enc:v3:" + "A" * 80, "."], ids=range(8)
)
def test_what_is_no_value_is_refused(engine: Engine, stored: str) -> None:
    _two(engine)
    _put(engine, Patient.note, A, stored)
    _put(engine, Patient.record, A, stored.encode())
    with engine.connect() as connection:
        for column in (Patient.note, Patient.record):
            with pytest.raises(DecryptionError):
                connection.execute(select(column).where(Patient.id == A)).all()


def test_a_row_without_its_key_is_refused(light: Engine) -> None:
    table = Table("loose", MetaData(), Column("id", Integer), Column("tenant", String))
    strict = Table(
        "loose",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("tenant", String, nullable=False),
        Column("secret", EncryptedString(bind_row="tenant")),
    )
    table.append_column(Column("secret", LargeBinary))
    with light.begin() as connection:
        table.create(connection)
        connection.execute(insert(strict).values(id=1, tenant="t", secret=MARKER))
        connection.execute(text("UPDATE loose SET tenant = NULL"))
        with pytest.raises(MalformedCiphertextError, match="NULL"):
            connection.execute(select(strict.c.secret)).all()


# --- What would be bound to no row, or to the wrong one --------------------------------------------------------------


def test_a_key_that_the_database_generates_is_refused(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Counted(secret=MARKER))
        with pytest.raises(UnsupportedOperationError, match=r"counted.*'id'.*default=uuid") as caught:
            session.flush()
    assert not leaked(caught.value, MARKER)
    with engine.begin() as connection:
        for values in (
            {"secret": MARKER},
            {"id": literal_column("7"), "secret": MARKER},
            {"id": "7", "secret": MARKER},
        ):
            with pytest.raises(UnsupportedOperationError, match="Python"):
                connection.execute(insert(Counted).values(values))
        assert connection.execute(select(func.count()).select_from(Counted)).scalar_one() == 0


@pytest.mark.parametrize("key", [True, 1.0, "1", b"1"], ids=["bool", "float", "str", "bytes"])
def test_a_key_of_another_type_is_refused(light: Engine, key: Any) -> None:
    with light.begin() as connection, pytest.raises(UnsupportedOperationError, match="of the column's type"):
        connection.execute(insert(Counted).values(id=key, secret=MARKER))


@pytest.mark.parametrize(
    "where",
    [
        (),
        (Patient.tenant == "t1",),
        (Patient.id.in_([A]),),
        (Patient.id != A,),
        ((Patient.id == A) | (Patient.id == B),),
        (Patient.id == Patient.id,),
    ],
    ids=["none", "tenant", "in", "not", "or", "itself"],
)
def test_an_update_that_does_not_name_its_row_is_refused(light: Engine, where: Any) -> None:
    _two(light)
    with light.begin() as connection:
        with pytest.raises(UnsupportedOperationError, match="WHERE"):
            connection.execute(update(PATIENTS).where(*where).values(record=MARKER))
        assert connection.execute(select(Patient.record).order_by(Patient.id)).scalars().all() == [
            {"of": "A"},
            {"of": "B"},
        ]


def test_an_update_of_the_key_must_write_the_value_again(engine: Engine) -> None:
    _two(engine)
    new = uuid.UUID(int=0xC)
    with Session(engine) as session:
        found = session.get_one(Patient, A, options=[defer(Patient.record), defer(Patient.note)])
        found.id = new
        session.commit()
        assert (found.record, found.note) == ({"of": "A"}, "A")
        found.tenant = "t3"
        session.commit()
        found.record = {"of": "C"}
        session.commit()
        session.expunge_all()
        found = session.get_one(Patient, new)
        assert (found.record, found.note, found.tenant) == ({"of": "C"}, "A", "t3")
        found.plain = "only this"
        session.flush()
    table = PATIENTS
    with engine.begin() as connection:
        for values in (
            {"tenant": "t2"},
            {"tenant": "t2", "record": 1},
            {"id": literal_column("id"), "record": 1, "note": "n"},
        ):
            with pytest.raises(UnsupportedOperationError):
                connection.execute(update(table).where(table.c.id == new).values(values))
        connection.execute(update(table).where(table.c.id == new).values(tenant="t2", note="moved"))
        found_note = connection.execute(select(table.c.note).where(table.c.id == new)).scalar_one()
        assert found_note == "moved"


def test_a_string_that_mariadb_finds_a_row_by_may_be_spelt_otherwise(mariadb_url: str) -> None:
    class Other(DeclarativeBase):
        pass

    class Named(Other):
        __tablename__ = "named"

        id: Mapped[str] = mapped_column(String(20), primary_key=True)
        secret: Mapped[str | None] = mapped_column(EncryptedString(bind_row="id"))

    engine = create_engine(mariadb_url)
    Other.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Named(id="a", secret="x"))
        session.commit()
        with pytest.raises(UnsupportedOperationError, match="binary collation"):
            session.execute(update(Named).where(Named.id == "A").values(secret=MARKER))
        session.execute(update(Named).where(Named.id == "A").values(id="A", secret="y"))
        assert session.execute(select(Named.secret)).scalar_one() == "y"
    engine.dispose()


def test_a_named_parameter_of_the_key_is_taken(light: Engine) -> None:
    table = COUNTED
    with light.begin() as connection:
        statement = insert(table).values(id=bindparam("key"), secret=bindparam("value"))
        connection.execute(statement, [{"key": 1, "value": "x"}, {"key": 2, "value": "y"}])
        connection.execute(update(table).where(bindparam("row") == table.c.id).values(secret="z"), {"row": 2})
        assert connection.execute(select(table.c.secret).order_by(table.c.id)).scalars().all() == ["x", "z"]


def test_a_key_that_changes_with_every_update_is_seen(light: Engine) -> None:
    versioned = Table(
        "versioned",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("version", Integer, nullable=False, default=1, onupdate=lambda: 2),
        Column("secret", EncryptedString(bind_row=("id", "version"))),
    )
    with light.begin() as connection:
        versioned.create(connection)
        connection.execute(insert(versioned).values([{"id": 1, "secret": "a"}, {"id": 2, "secret": "b"}]))
        assert connection.execute(select(versioned.c.secret)).scalars().all() == ["a", "b"]
        with pytest.raises(UnsupportedOperationError, match="changes"):
            connection.execute(update(versioned).where(versioned.c.id == 1).values(id=3))
        connection.execute(update(versioned).where(versioned.c.id == 1, versioned.c.version == 1).values(secret="c"))
        assert connection.execute(select(versioned.c.version, versioned.c.secret)).all() == [(2, "c"), (1, "b")]


def test_eager_loads_and_entities_of_subqueries(light: Engine) -> None:
    _two(light)
    limited = aliased(Patient, select(Patient).order_by(Patient.id).limit(1).subquery())
    with Session(light) as session:
        assert session.scalars(select(limited)).one().record == {"of": "A"}
        loaded = session.scalars(select(Patient).from_statement(select(Patient).order_by(Patient.id))).all()
        assert [one.note for one in loaded] == ["A", "B"]


@pytest.mark.parametrize("dialect", [postgresql, sqlite], ids=["postgresql", "sqlite"])
def test_upserts_are_about_the_row_or_refused(request: pytest.FixtureRequest, dialect: Any) -> None:
    name = "postgres_url" if dialect is postgresql else "sqlite_url"
    engine = create_engine(request.getfixturevalue(name))
    Base.metadata.create_all(engine)
    new = dialect.insert(COUNTED).values([{"id": 1, "secret": "one"}, {"id": 2, "secret": "two"}])
    again = dialect.insert(COUNTED).values(id=1, secret="uno")
    with engine.begin() as connection:
        connection.execute(new)
        connection.execute(again.on_conflict_do_update(index_elements=["id"], set_={"secret": again.excluded.secret}))
        connection.execute(again.on_conflict_do_nothing())
        assert connection.execute(select(Counted.secret).order_by(Counted.id)).scalars().all() == ["uno", "two"]
        connection.execute(again.on_conflict_do_update(index_elements=[COUNTED.c.id], set_={"secret": "ein"}))
        assert connection.execute(select(Counted.secret).order_by(Counted.id)).scalars().all() == ["ein", "two"]
        for target, changed in ((["secret"], {"secret": "x"}), (["id"], {"id": 7}), (["id"], {"id": 7, "secret": "x"})):
            with pytest.raises(UnsupportedOperationError, match="index_elements"):
                connection.execute(again.on_conflict_do_update(index_elements=target, set_=changed))
    engine.dispose()


def test_a_value_loaded_without_its_row_is_refused(light: Engine) -> None:
    _two(light)
    subquery = select(Patient.record).subquery()
    with light.connect() as connection:
        for statement in (
            select(subquery.c.record),
            select(func.coalesce(Patient.record, Patient.record, type_=Patient.record.type)),
            select(select(Patient.record).where(Patient.id == A).scalar_subquery()),
        ):
            with pytest.raises(UnsupportedOperationError, match="'id'"):
                connection.execute(statement).all()
        textual = text("SELECT record FROM patient").columns(Patient.record)
        with pytest.raises(UnsupportedOperationError, match="textual"):
            connection.execute(textual).all()


def test_a_statement_that_is_another_database_s_is_refused() -> None:
    from sqlalchemy.dialects import oracle

    with pytest.raises(UnsupportedDatabaseError, match="oracle"):
        select(Patient.record).compile(dialect=oracle.dialect())  # type: ignore[no-untyped-call] # SQLAlchemy's


def test_rows_are_deleted_and_counted_without_decryption(engine: Engine) -> None:
    _two(engine)
    with Session(engine) as session:
        assert session.execute(select(func.count(Patient.record))).scalar_one() == 2
        session.execute(delete(Patient).where(Patient.id == A))
        session.delete(session.get_one(Patient, B, options=[defer(Patient.record), defer(Patient.note)]))
        session.commit()
        assert session.execute(select(func.count()).select_from(Patient)).scalar_one() == 0


# --- The life of a key -----------------------------------------------------------------------------------------------


def test_rekey_takes_bound_values_to_the_new_key_and_leaves_what_was_moved(engine: Engine) -> None:
    _two(engine)
    TABLES.keys.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(Patient(tenant=f"t{n % 7}", record=n, note=str(n)) for n in range(60))
        session.commit()
    _put(engine, Patient.record, B, _raw(engine, Patient.record, A))
    columns = [one for one in declared(Base.metadata) if one.table == "patient"]
    with engine.begin() as connection:
        record(connection, columns)
        assert recorded(connection) == columns
    assert {one.column: [tuple(part) for part in one.row_identity] for one in columns} == {
        "record": [("id", "uuid")],
        "note": [("tenant", "text"), ("id", "uuid")],
        "free": [],
    }
    new = Keyring(DataKey(b"n" * 32), [DataKey(KEY)])
    result = rekey(engine, new, columns, batch_size=7)
    assert (result.counts.rekeyed, result.counts.unreadable) == (2 * 62 - 1, 1)
    with use_keyring(Keyring(DataKey(b"n" * 32))), Session(engine) as session:
        found = session.execute(select(Patient.record, Patient.note).where(Patient.id != B)).all()
        assert sorted(str(one) for one, _ in found if isinstance(one, int)) == sorted(str(n) for n in range(60))
        assert all(note in {str(one), "A"} for one, note in found)


def test_rekey_of_a_column_whose_identity_is_gone_is_an_error(light: Engine) -> None:
    (column,) = (one for one in declared(Base.metadata) if one.table == "counted")
    gone = replace(column, row_identity=(IdentityColumn("gone", Kind.INTEGER),))
    with light.connect() as connection, pytest.raises(ColumnUnreachableError, match="identifies its rows"):
        located(connection, gone)


@pytest.mark.parametrize("source", ["other", "alias", "select"])
def test_ciphertext_is_not_copied_in_sql(light: Engine, source: str) -> None:
    other = aliased(Patient)
    statement: Any = update(PATIENTS).values(record=PATIENTS.c.note)
    if source == "alias":
        statement = update(Patient).values(record=select(other.record).where(other.id == A).scalar_subquery())
    if source == "select":
        statement = insert(PATIENTS).from_select(["id", "record"], select(PATIENTS.c.id, PATIENTS.c.record))
    with pytest.raises(UnsupportedOperationError, match="bound to its row"):
        check_statement(statement)


@pytest.fixture
def no_trace() -> Iterator[None]:
    """See that nothing is left of what the test declares: no process could be configured with it."""
    yield
    gc.collect()
    declared()


@pytest.mark.usefixtures("no_trace")
def test_what_cannot_be_bound_is_refused_when_columns_are_listed() -> None:
    metadata = MetaData()
    Table(
        "bad", metadata, Column("id", Integer, primary_key=True), Column("secret", EncryptedBytes(bind_row="nothing"))
    )
    with pytest.raises(ColumnError, match="nothing"):
        declared(metadata)


# --- Declarations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identity", "named", "told"),
    [
        (lambda: Column("id", Integer, primary_key=True), "other", "no such column"),
        (lambda: Column("id", LargeBinary, nullable=False), "id", "none of Integer, String and Uuid"),
        (lambda: Column("id", Enum("a", "b"), nullable=False), "id", "none of Integer"),
        (lambda: Column("id", CHAR(3), nullable=False), "id", "none of Integer"),
        (lambda: Column("id", Integer), "id", "NULL"),
        (lambda: Column("id", String(20, collation="NOCASE"), nullable=False), "id", "collation"),
        (lambda: Column("id", ForeignKey("parent.id", onupdate="CASCADE"), nullable=False), "id", "ON UPDATE"),
    ],
    ids=["missing", "binary", "enum", "char", "nullable", "collation", "cascade"],
)
@pytest.mark.usefixtures("no_trace")
def test_what_cannot_identify_a_row_is_refused(identity: Callable[[], Column[Any]], named: str, told: str) -> None:
    metadata = MetaData()
    Table("parent", metadata, Column("id", Integer, primary_key=True))
    table = Table("t", metadata, identity(), Column("secret", EncryptedBytes(bind_row=named)))
    engine = create_engine("sqlite://")  # and no fixture, which would keep the table for as long as pytest keeps it
    with engine.connect() as connection, pytest.raises(ColumnError, match=told):
        connection.execute(insert(table).values(id=1, secret=b"x"))
    engine.dispose()


def test_a_copied_table_is_bound_by_its_own_columns(light: Engine) -> None:
    copy = COUNTED.to_metadata(MetaData(), name="copied")
    with light.begin() as connection:
        copy.create(connection)
        connection.execute(insert(copy).values(id=1, secret="x"))
        assert connection.execute(select(copy.c.secret)).scalar_one() == "x"


def test_types_bound_to_different_columns_do_not_share_a_cached_statement() -> None:
    one, other = EncryptedString(bind_row="id"), EncryptedString(bind_row=("id", "tenant"))
    assert one._static_cache_key != other._static_cache_key
    assert repr(one) == "EncryptedString(bind_row=('id',))"


# --- Nothing leaks ---------------------------------------------------------------------------------------------------


def test_a_value_that_awaits_its_row_shows_nothing() -> None:
    import copy
    import pickle

    process = PATIENTS.c.note.type.bind_processor(sqlite.dialect())
    assert process is not None
    waiting = process(MARKER)
    assert MARKER not in repr(waiting)
    assert not hasattr(waiting, "__dict__")
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError) as caught:
            copying(waiting)
        assert not leaked(caught.value, MARKER)


def test_a_driver_that_a_value_reaches_without_its_row_refuses_it(light: Engine) -> None:
    process = COUNTED.c.secret.type.bind_processor(light.dialect)
    assert process is not None
    with light.connect() as connection, pytest.raises(Exception, match="not supported") as caught:
        connection.exec_driver_sql("INSERT INTO counted (id, secret) VALUES (1, ?)", (process(MARKER),))
    assert not leaked(caught.value, MARKER)


def test_values_that_cannot_be_stored_are_refused_as_elsewhere(light: Engine) -> None:
    with light.begin() as connection, pytest.raises(KravnCryptoError, match=r"patient\.record") as caught:
        connection.execute(insert(Patient).values(id=A, record={"key": {MARKER}}))
    assert not leaked(caught.value, MARKER)
