"""No value of an encrypted column is shown by anything that fails, is logged, printed or pickled."""

import asyncio
import contextvars
import copy
import logging
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, StrEnum
from functools import partial
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy import (
    CheckConstraint,
    Column,
    Engine,
    ForeignKey,
    bindparam,
    delete,
    event,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, PendingRollbackError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    load_only,
    make_transient_to_detached,
    mapped_column,
    relationship,
)
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.schema import CreateTable
from sqlalchemy.util import greenlet_spawn

from sqlalchemy_kravn_crypto import (
    DataKey,
    Encrypted,
    EncryptedBytes,
    EncryptedJSON,
    EncryptedString,
    Keyring,
    MutableJSON,
    configuration,
    configure,
    configure_async,
    guards,
    reset,
    use_keyring,
)
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, parse, to_text
from sqlalchemy_kravn_crypto.codecs.documents import JSONCodec
from sqlalchemy_kravn_crypto.codecs.scalars import BytesCodec, EnumCodec, TextCodec
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.derivation import expand
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.status import status
from tests.leaks import found_in, leaked, pickled, shown_by
from tests.misbehaving_kms import MisbehavingKMS
from tests.postgres import fresh_database

MARKER = "S3CR3T" + "-marker"
"""A value of an encrypted column, or a part of one."""

NEIGHBOUR = "N3IGHBOUR" + "-marker"
"""The value of a plain column in the same row."""

LONE = "\udc80"
KEYRING = Keyring(DataKey(bytes(range(32))))

# --- What is written -------------------------------------------------------------------------------------------------


class Profile(BaseModel):
    name: str
    age: int


class Colour(Enum):
    RED = 1


class Other(StrEnum):
    MEMBER = MARKER


class Refusing(sa.TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        if value is not None and MARKER in value:
            raise ValueError(value)
        return value


class Base(DeclarativeBase):
    pass


class Record(Base):
    __tablename__ = "record"
    __table_args__ = (CheckConstraint("number <> 13", name="not_thirteen"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None]
    number: Mapped[int | None] = mapped_column(unique=True)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("record.id"))
    document: Mapped[Any] = mapped_column(EncryptedJSON, nullable=False)
    as_text: Mapped[Any] = mapped_column(EncryptedJSON(storage="text"), nullable=True)
    profile: Mapped[Profile | None] = mapped_column(EncryptedJSON(Profile))
    string: Mapped[str | None] = mapped_column(EncryptedString)
    binary: Mapped[bytes | None] = mapped_column(EncryptedBytes)
    integer: Mapped[int | None] = mapped_column(Encrypted(sa.Integer))
    decimal: Mapped[Decimal | None] = mapped_column(Encrypted(sa.Numeric))
    float_: Mapped[float | None] = mapped_column(Encrypted(sa.Float))
    boolean: Mapped[bool | None] = mapped_column(Encrypted(sa.Boolean))
    date_: Mapped[date | None] = mapped_column(Encrypted(sa.Date))
    time_: Mapped[time | None] = mapped_column(Encrypted(sa.Time))
    naive: Mapped[datetime | None] = mapped_column(Encrypted(sa.DateTime))
    aware: Mapped[datetime | None] = mapped_column(Encrypted(sa.DateTime(timezone=True)))
    uuid: Mapped[UUID | None] = mapped_column(Encrypted(sa.Uuid))
    uuid_text: Mapped[str | None] = mapped_column(Encrypted(sa.Uuid(as_uuid=False)))
    interval: Mapped[timedelta | None] = mapped_column(Encrypted(sa.Interval))
    enum: Mapped[Colour | None] = mapped_column(Encrypted(sa.Enum(Colour)))
    decorated: Mapped[str | None] = mapped_column(Encrypted(Refusing))
    tracked: Mapped[Any] = mapped_column(MutableJSON.as_mutable(EncryptedJSON), nullable=True)
    children: Mapped[list["Record"]] = relationship()


class Missing(Base):
    """Nobody creates its table."""

    __tablename__ = "missing"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None]
    document: Mapped[Any] = mapped_column(EncryptedJSON)


RECORD = Base.metadata.tables["record"]
DOCUMENT = RECORD.c.document
UNSTORABLE = {"token": MARKER, "bad": (1, MARKER)}
FINE: dict[str, Any] = {
    "note": NEIGHBOUR,
    "document": {"token": MARKER},
    "as_text": [MARKER],
    "string": MARKER,
    "binary": MARKER.encode(),
    "profile": Profile(name=MARKER, age=1),
}


# --- Ways to fail ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Something that fails.

    :ivar unguarded: without the guards, SQLAlchemy itself shows the encrypted column's value; hence the guards.
    :ivar logged: SQLAlchemy logs the parameters as it got them, since no encrypted type is involved.
    :ivar repeated: the database repeats the plain column's value in its own message; PostgreSQL only.
    """

    act: Callable[[Session], Any]
    raises: type[Exception] | tuple[type[Exception], ...]
    unguarded: bool = False
    logged: bool = False
    repeated: bool = False
    configured: bool = True


@dataclass(frozen=True)
class Failure:
    """Rows of which the last cannot be written, however one tries; the rest as in :class:`Case`."""

    rows: list[dict[str, Any]]
    raises: type[Exception] | tuple[type[Exception], ...]
    repeated: bool = False
    configured: bool = True


Write = Callable[[Session, list[dict[str, Any]]], Any]


def added(session: Session, rows: list[dict[str, Any]]) -> None:
    session.add_all(Record(**row) for row in rows)


def prepared(session: Session, rows: list[dict[str, Any]]) -> list[Record]:
    """Add as many rows that are fine, for the given ones to be written over them."""
    found = [Record(**{**FINE, "id": number, "number": row.get("number")}) for number, row in enumerate(rows[:-1], 1)]
    session.add_all([*found, last := Record(**FINE, id=len(rows))])
    session.flush()
    return [*found, last]


def by_flush(session: Session, rows: list[dict[str, Any]]) -> None:
    added(session, rows)
    session.flush()


def by_flush_of_an_update(session: Session, rows: list[dict[str, Any]]) -> None:
    last = prepared(session, rows)[-1]
    for key, value in rows[-1].items():
        setattr(last, key, value)
    session.flush()


def by_autoflush(session: Session, rows: list[dict[str, Any]]) -> None:
    added(session, rows)
    session.scalars(select(Record.id)).all()


def by_autoflush_of_a_lazy_load(session: Session, rows: list[dict[str, Any]]) -> None:
    session.add(parent := Record(id=1, document=[]))
    session.flush()
    session.expire(parent, ["children"])
    added(session, rows)
    assert parent.children == []


def by_merge(session: Session, rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows, 1):
        session.merge(Record(**row, id=number))
    session.flush()


def by_bulk_update(session: Session, rows: list[dict[str, Any]]) -> None:
    prepared(session, rows)
    session.execute(update(Record), [{**row, "id": number} for number, row in enumerate(rows, 1)])


def by_core(session: Session, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        session.connection().execute(insert(RECORD), row)


def by_values(session: Session, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        session.connection().execute(insert(RECORD).values(row))


def by_update_with_values(session: Session, rows: list[dict[str, Any]]) -> None:
    last = prepared(session, rows)[-1]
    session.connection().execute(update(RECORD).where(RECORD.c.id == last.id).values(rows[-1]))


def by_upsert(session: Session, rows: list[dict[str, Any]]) -> None:
    from sqlalchemy.dialects import postgresql, sqlite

    dialect: Any = {"postgresql": postgresql, "sqlite": sqlite}[session.get_bind().dialect.name]
    for row in rows:
        session.execute(dialect.insert(RECORD).values(row).on_conflict_do_update(index_elements=["id"], set_=row))


WRITES: dict[str, Write] = {
    "flush": by_flush,
    "flush of an update": by_flush_of_an_update,
    "autoflush": by_autoflush,
    "autoflush of a lazy load": by_autoflush_of_a_lazy_load,
    "merge": by_merge,
    "bulk save": lambda session, rows: session.bulk_save_objects([Record(**row) for row in rows]),
    "ORM insert": lambda session, rows: session.execute(insert(Record), rows),
    "ORM insert, RETURNING": lambda session, rows: session.scalars(insert(Record).returning(Record.id), rows).all(),
    "ORM update": by_bulk_update,
    "Core": by_core,
    "executemany": lambda session, rows: session.connection().execute(insert(RECORD), rows),
    "executemany, RETURNING": lambda session, rows: session.connection().execute(
        insert(RECORD).returning(RECORD.c.id, sort_by_parameter_order=True), rows
    ),
    "values()": by_values,
    "values() of several rows": lambda session, rows: session.connection().execute(insert(RECORD).values(rows)),
    "update with values()": by_update_with_values,
    "upsert": by_upsert,
}

FAILURES = {
    "unstorable value": Failure([FINE, {**FINE, "document": UNSTORABLE}], errors.UnstorableValueError),
    "not configured": Failure([FINE], errors.NotConfiguredError, configured=False),
    "NOT NULL": Failure([FINE, {**FINE, "document": None}], IntegrityError, repeated=True),
    "CHECK": Failure([{**FINE, "number": 1}, {**FINE, "number": 13}], IntegrityError, repeated=True),
    "UNIQUE": Failure([{**FINE, "number": 1}, {**FINE, "number": 1}], IntegrityError),
    "FOREIGN KEY": Failure([{**FINE, "parent_id": 999}], IntegrityError),
    # sqlite3 raises an error that is none of the DBAPI's.
    "too large": Failure([{**FINE, "number": 10**30}], (DBAPIError, OverflowError)),
}


def written(write: Write, rows: list[dict[str, Any]]) -> Callable[[Session], Any]:
    return lambda session: write(session, rows)


def writing() -> dict[str, Case]:
    return {
        f"{failure}, {name}": Case(
            written(write, made.rows), made.raises, repeated=made.repeated, configured=made.configured
        )
        for failure, made in FAILURES.items()
        for name, write in WRITES.items()
    }


WRONG: dict[str, list[Any]] = {
    "document": [{MARKER: (1,)}, {MARKER + LONE: 1}, [MARKER + LONE], {MARKER}, object, MARKER.encode(), {"a": Colour}],
    "as_text": [{MARKER: {1: MARKER}}, [MARKER + LONE]],
    "profile": [
        {"name": MARKER, "age": MARKER},
        Profile.model_construct(name=MARKER, age=MARKER),
        Profile.model_construct(name={MARKER}, age=1),
        MARKER,
    ],
    "string": [MARKER.encode(), [MARKER], MARKER + LONE],
    "binary": [MARKER, [MARKER]],
    "integer": [MARKER, [MARKER]],
    "decimal": [MARKER],
    "float_": [MARKER],
    "boolean": [MARKER],
    "date_": [MARKER],
    "time_": [MARKER],
    "naive": [MARKER],
    "aware": [MARKER],
    "uuid": [MARKER],
    "uuid_text": [MARKER],
    "interval": [MARKER],
    "enum": [MARKER, Other.MEMBER],
    "decorated": [MARKER, [MARKER]],
    "tracked": [{MARKER: (1,)}, [[MARKER + LONE]]],
}


def wrong_values() -> dict[str, Case]:
    return {
        f"{field}, wrong value {number}": Case(written(by_flush, [{**FINE, field: value}]), errors.UnstorableValueError)
        for field, wrong in WRONG.items()
        for number, value in enumerate(wrong, 1)
    }


def executing(statement: Any, parameters: Any = None) -> Callable[[Session], Any]:
    """Return what executes a statement, or what a function without arguments makes of one."""

    def act(session: Session) -> None:
        made = statement() if callable(statement) else statement
        session.connection().execute(made, parameters).all()

    return act


def compiling(statement: Any) -> Callable[[Session], Any]:
    return lambda session: statement.compile(session.get_bind(), compile_kwargs={"literal_binds": True})


def declaring(**options: Any) -> Callable[[Session], Any]:
    return lambda _: sa.Table("declared", sa.MetaData(), Column("x", EncryptedJSON(), **options))


def after_failing(session: Session) -> None:
    with pytest.raises(IntegrityError):
        by_flush(session, [{**FINE, "document": None}])
    session.execute(select(1))


def stale(session: Session) -> None:
    record = prepared(session, [FINE])[0]
    session.connection().execute(delete(RECORD))
    record.document = [MARKER, MARKER]
    session.flush()


def changed(value: Any, *, expire: bool) -> Callable[[Session], Any]:
    """Return what changes a value in place."""

    def act(session: Session) -> None:
        session.add(record := Record(**FINE, tracked={"token": MARKER}))
        session.flush()
        tracked = record.tracked
        if expire:
            session.expire(record)
        tracked[MARKER] = value
        session.flush()

    return act


PLAIN_TEXT = text("INSERT INTO record (note, document) VALUES (:note, :document)")
TYPED_TEXT = PLAIN_TEXT.bindparams(bindparam("document", type_=DOCUMENT.type))
PINNED = EncryptedJSON(associated_data="record.document")
LITERAL = literal({"token": MARKER}, PINNED)
VALUES = sa.values(Column("x", PINNED), name="v", literal_binds=True).data([({"token": MARKER},)])
NO_NOTE = {key: value for key, value in FINE.items() if key != "note"}


def statements() -> dict[str, Case]:
    literal_execute = select(bindparam("v", {"token": MARKER}, type_=DOCUMENT.type, literal_execute=True))
    return {
        "missing parameter, executemany": Case(
            executing(insert(RECORD), [FINE, NO_NOTE]), StatementError, unguarded=True
        ),
        "missing parameter, text": Case(executing(TYPED_TEXT, NO_NOTE), StatementError, unguarded=True),
        "missing parameter, where": Case(
            executing(update(RECORD).where(RECORD.c.id == bindparam("which")), FINE), StatementError, unguarded=True
        ),
        "untyped text, dict": Case(executing(PLAIN_TEXT, FINE), StatementError, unguarded=True, logged=True),
        "untyped text, no table": Case(
            executing(text("INSERT INTO nowhere (note, document) VALUES (:note, :string)"), FINE),
            DBAPIError,
            unguarded=True,
            logged=True,
        ),
        "untyped text, no table, many": Case(
            executing(text("INSERT INTO nowhere (note, document) VALUES (:note, :string)"), [FINE, FINE]),
            DBAPIError,
            unguarded=True,
            logged=True,
        ),
        "typed text": Case(executing(TYPED_TEXT, {**FINE, "document": UNSTORABLE}), errors.UnstorableValueError),
        "bind parameter": Case(
            executing(select(bindparam("v", type_=DOCUMENT.type)), {"v": UNSTORABLE}), errors.UnstorableValueError
        ),
        "no table, flush": Case(
            lambda session: session.bulk_save_objects([Missing(note=NEIGHBOUR, document=MARKER)]), DBAPIError
        ),
        "no table, values()": Case(executing(insert(Missing).values(note=NEIGHBOUR, document=[MARKER])), DBAPIError),
        "type of no column": Case(executing(select(literal({"token": MARKER}, EncryptedJSON()))), errors.ColumnError),
        "literal_binds, insert": Case(compiling(insert(RECORD).values(FINE)), errors.ColumnError),
        "literal_binds, text": Case(compiling(insert(RECORD).values(as_text=[MARKER])), errors.ColumnError),
        "literal_binds, string": Case(compiling(update(RECORD).values(string=MARKER)), errors.ColumnError),
        "literal_binds, select": Case(compiling(select(LITERAL)), errors.ColumnError),
        "literal_binds, values": Case(executing(select(VALUES)), errors.ColumnError),
        "literal_execute": Case(executing(literal_execute), errors.ColumnError),
        "server_default": Case(declaring(server_default=MARKER), errors.ColumnError),
        "server_default, literal": Case(declaring(server_default=LITERAL), errors.ColumnError),
        "server_onupdate": Case(declaring(server_onupdate=LITERAL), errors.ColumnError),
        "SQL default": Case(declaring(default=LITERAL), errors.ColumnError),
        "SQL onupdate": Case(declaring(onupdate=sa.func.lower(MARKER)), errors.ColumnError),
        "after a failed flush": Case(after_failing, PendingRollbackError, repeated=True),
        "changed in place": Case(changed((MARKER,), expire=False), errors.UnstorableValueError),
        "changed too late": Case(changed(MARKER, expire=True), InvalidRequestError),
        "stale row": Case(stale, StaleDataError),
    }


OPERATORS: dict[str, Callable[[Any], Any]] = {
    "==": lambda column: column == MARKER,
    "!=": lambda column: column != MARKER,
    "<": lambda column: column < MARKER,
    ">=": lambda column: column >= MARKER,
    "in": lambda column: column.in_([MARKER]),
    "not in": lambda column: column.not_in([MARKER]),
    "like": lambda column: column.like(MARKER),
    "ilike": lambda column: column.ilike(MARKER),
    "contains": lambda column: column.contains(MARKER),
    "startswith": lambda column: column.startswith(MARKER),
    "match": lambda column: column.match(MARKER),
    "regexp_match": lambda column: column.regexp_match(MARKER),
    "between": lambda column: column.between(MARKER, MARKER),
    "is distinct from": lambda column: column.is_distinct_from(MARKER),
    "is": lambda column: column.is_(MARKER),
    "op": lambda column: column.op("@>")(MARKER),
    "+": lambda column: column + MARKER,
    "reverse +": lambda column: MARKER + column,
    "concat": lambda column: column.concat(MARKER),
    "[]": lambda column: column[MARKER],
    "a constraint": lambda column: CheckConstraint(column == MARKER),
}

REFUSED: dict[str, Callable[[], Any]] = {
    "reverse ==": lambda: select(literal(MARKER) == DOCUMENT),
    "reverse == of a parameter": lambda: select(bindparam("v", MARKER, type_=sa.String) == DOCUMENT),
    "function": lambda: select(sa.func.concat(DOCUMENT, MARKER)),
    "coalesce": lambda: select(sa.func.coalesce(DOCUMENT, MARKER)),
    "case": lambda: select(sa.case((RECORD.c.id == 1, DOCUMENT), else_=MARKER)),
    "union": lambda: select(DOCUMENT).union_all(select(literal(MARKER, sa.String))),
    "tuple": lambda: select(RECORD.c.id).where(sa.tuple_(RECORD.c.id, DOCUMENT).in_([(1, MARKER)])),
    "insert of a literal": lambda: insert(RECORD).values(document=literal(MARKER)),
    "insert of text": lambda: insert(RECORD).values(document=text(f"'{MARKER}'")),
    "update to a function": lambda: update(RECORD).values(document=sa.func.lower(MARKER)),
    "insert from select": lambda: insert(RECORD).from_select(["document"], select(literal(MARKER))),
}


def refused() -> dict[str, Case]:
    def selecting(operator: Callable[[Any], Any], column: Any) -> Callable[[Session], Any]:
        return lambda session: session.execute(select(1).where(operator(column)))

    acts = {
        "filter_by": lambda session: session.query(Record).filter_by(document=MARKER).all(),
        **{name: executing(make) for name, make in REFUSED.items()},
        **{f"{name} of an attribute": selecting(made, Record.document) for name, made in OPERATORS.items()},
        **{f"{name} of a column": selecting(made, RECORD.c.string) for name, made in OPERATORS.items()},
    }
    return {name: Case(act, errors.UnsupportedOperationError) for name, act in acts.items()}


# --- Values that cannot be read --------------------------------------------------------------------------------------


@contextmanager
def unlogged() -> Iterator[None]:
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def frame(field: str, payload: bytes, keyring: Keyring = KEYRING) -> bytes:
    return keyring.encrypt(payload, ColumnName(f"record.{field}"))


def store(session: Session, field: str, stored: bytes) -> None:
    """Put bytes into a column as they are, past SQLAlchemy's types."""
    on_postgresql = session.get_bind().dialect.name == "postgresql"
    value = f"'\\x{stored.hex()}'::bytea" if on_postgresql else f"X'{stored.hex()}'"
    if field == "as_text":
        value = f"convert_from({value}, 'UTF8')" if on_postgresql else f"CAST({value} AS TEXT)"
    with unlogged():
        session.execute(insert(RECORD).values(id=1, note=NEIGHBOUR, document=[]))
        session.execute(text(f'UPDATE record SET "{field}" = {value}'.replace("::", "\\:\\:")))  # noqa: S608 - hexadecimal


def load(session: Session) -> None:
    session.scalars(select(Record)).all()


def load_by_core(session: Session) -> None:
    session.connection().execute(select(RECORD)).all()


def load_parts(session: Session) -> None:
    with session.execute(select(Record).execution_options(yield_per=1)) as parts:
        for _ in parts:
            pass


def persistent(session: Session) -> Record:
    """Return an object of which nothing but the id is loaded."""
    record = Record(id=1)
    make_transient_to_detached(record)
    session.add(record)
    return record


def load_again(session: Session) -> None:
    session.refresh(persistent(session))


def load_late(session: Session) -> None:
    record = session.scalars(select(Record).options(load_only(Record.id))).one()
    for field in ("document", "as_text", "string"):
        getattr(record, field)


def load_children(session: Session) -> None:
    session.execute(update(RECORD).values(parent_id=1))
    session.add(parent := Record(id=2, document=[MARKER]))
    session.flush()
    session.execute(update(RECORD).where(RECORD.c.id == 1).values(parent_id=2))
    session.expire(parent, ["children"])
    assert parent.children


def load_in_a_flush(session: Session) -> None:
    record = persistent(session)
    event.listen(session, "before_flush", lambda *_: record.document)
    event.listen(session, "after_flush", lambda *_: session.refresh(record))
    session.add(Record(document=[MARKER], note=NEIGHBOUR))
    session.flush()


def load_by_returning(session: Session) -> None:
    session.execute(update(Record).values(note=NEIGHBOUR).returning(Record)).all()


LOADS: dict[str, Callable[[Session], Any]] = {
    "load": load,
    "Core": load_by_core,
    "yield_per": load_parts,
    "refresh": load_again,
    "deferred": load_late,
    "lazy load": load_children,
    "load in a flush": load_in_a_flush,
    "RETURNING": load_by_returning,
}


def read(session: Session, *, field: str, stored: bytes, load: Callable[[Session], Any]) -> None:
    store(session, field, stored)
    load(session)


def altered(stored: bytes) -> bytes:
    return stored[:-1] + bytes([stored[-1] ^ 1])


def reading() -> dict[str, Case]:
    document = JSONCodec().encode({"token": MARKER, "x": [MARKER]})
    good = {field: frame(field, document) for field in ("document", "as_text")}
    broken: dict[str, tuple[str, bytes, type[Exception]]] = {
        "altered": ("document", altered(good["document"]), errors.AuthenticationError),
        "moved": ("string", good["document"], errors.WrongColumnError),
        "unknown key": ("document", frame("document", document, Keyring(DataKey(bytes(32)))), errors.UnknownKeyError),
        "truncated": ("document", good["document"][:20], errors.MalformedCiphertextError),
        "another algorithm": ("document", b"\xf9\x7f" + good["document"][2:], errors.UnsupportedAlgorithmError),
        "plaintext": ("document", MARKER.encode(), errors.MalformedCiphertextError),
        "altered text": ("as_text", to_text(altered(good["as_text"])).encode(), errors.AuthenticationError),
        "plaintext in text": ("as_text", MARKER.encode(), errors.MalformedCiphertextError),
        "prefixed plaintext": ("as_text", f"enc:v3:{MARKER}".encode(), errors.MalformedCiphertextError),
    }
    cases = {
        f"{name}, {load}": Case(partial(read, field=field, stored=stored, load=LOADS[load]), raises)
        for name, (field, stored, raises) in broken.items()
        for load in (LOADS.keys() if name in {"altered", "altered text", "plaintext"} else {"load"})
    }
    for field in WRONG:
        for number, payload in enumerate(unreadable_payloads(field), 1):
            stored = frame(field, payload)
            stored = to_text(stored).encode() if field == "as_text" else stored
            cases[f"payload {number} in {field}"] = Case(
                partial(read, field=field, stored=stored, load=load), errors.MalformedPayloadError
            )
    return cases


def unreadable_payloads(field: str) -> list[bytes]:
    """Return payloads of other types of columns, and those of the right kind that are no value of the type."""
    own = kind_of(field)
    payloads = [JSONCodec().encode(MARKER), TextCodec().encode(MARKER), BytesCodec().encode(MARKER.encode())]
    payloads = [payload for payload in payloads if payload[:1] != own]
    if field not in {"string", "binary", "decorated"}:
        payloads.append(own + MARKER.encode())
    if field == "profile":
        payloads.append(JSONCodec().encode({"name": MARKER, "age": MARKER}))
    if field == "enum":
        payloads.append(EnumCodec({MARKER: Colour.RED}).encode(Colour.RED))
    return payloads


def kind_of(field: str) -> bytes:
    good: dict[str, Any] = {
        **FINE,
        "integer": 1,
        "decimal": Decimal(1),
        "float_": 1.0,
        "boolean": True,
        "date_": date(2024, 1, 1),
        "time_": time(),
        "naive": datetime(2024, 1, 1),  # noqa: DTZ001 - a column of such
        "aware": datetime(2024, 1, 1, tzinfo=UTC),
        "uuid": UUID(int=1),
        "uuid_text": str(UUID(int=1)),
        "interval": timedelta(1),
        "enum": Colour.RED,
        "decorated": "x",
        "tracked": {},
    }
    encode: Any = RECORD.c[field].type
    return bytes(encode._codec.encode(good[field])[:1])


CASES = {**writing(), **wrong_values(), **statements(), **refused(), **reading()}


# --- Where it fails --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One way to set an engine up.

    :ivar hidden: SQLAlchemy's ``hide_parameters``.
    :ivar guarded: whether errors are redacted.
    """

    driver: str
    hidden: bool = False
    guarded: bool = True

    def __str__(self) -> str:
        parameters = "parameters hidden" if self.hidden else "parameters shown"
        return f"{self.driver}, {parameters}, {'guarded' if self.guarded else 'unguarded'}"


SETTINGS = [
    *(Setting(driver, hidden) for driver in ("sqlite", "postgresql+psycopg") for hidden in (False, True)),
    *(Setting(driver, guarded=False) for driver in ("sqlite", "postgresql+psycopg")),
    *(Setting(driver) for driver in ("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg_async")),
]


class Database:
    """A database with the tables, and one engine."""

    def __init__(self, url: URL, setting: Setting, runner: asyncio.Runner) -> None:
        self.setting = setting
        self._runner = runner
        self._asynchronous: AsyncEngine | None = None
        url = url.set(drivername=setting.driver)
        if setting.driver in {"sqlite", "postgresql+psycopg"}:
            self.engine = sa.create_engine(url, hide_parameters=setting.hidden)
        else:
            self._asynchronous = create_async_engine(url, hide_parameters=setting.hidden)
            self.engine = self._asynchronous.sync_engine
        guards.install(self.engine, redact_errors=setting.guarded)
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", self._enforce_foreign_keys)

    @staticmethod
    def _enforce_foreign_keys(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    def run(self, act: Callable[[Session], Any], *, commit: bool = False) -> None:
        """Do something in a session."""
        if self._asynchronous is None:
            with Session(self.engine) as session:
                act(session)
                if commit:
                    session.commit()
            return
        engine = self._asynchronous

        async def run() -> None:
            async with AsyncSession(engine) as session:
                await session.run_sync(act)
                if commit:
                    await session.commit()

        self._runner.run(run(), context=contextvars.copy_context())

    def close(self) -> None:
        if self._asynchronous is None:
            self.engine.dispose()
        else:
            self._runner.run(self._asynchronous.dispose())


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def database(
    request: pytest.FixtureRequest, postgres_server: URL, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    setting: Setting = request.param
    with ExitStack() as stack:
        if setting.driver.startswith("sqlite"):
            url = sa.make_url(f"sqlite:///{tmp_path_factory.mktemp('leaks') / 'test.db'}")
        else:
            url = stack.enter_context(fresh_database(postgres_server))
        made = Database(url, setting, stack.enter_context(asyncio.Runner()))
        stack.callback(made.close)
        made.run(lambda session: Base.metadata.create_all(session.connection(), [RECORD]), commit=True)
        yield made


@pytest.mark.parametrize("name", CASES)
def test_nothing_that_fails_shows_a_value(database: Database, caplog: pytest.LogCaptureFixture, name: str) -> None:
    case, setting = CASES[name], database.setting
    with ExitStack() as stack:
        warned = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.enter_context(caplog.at_level(logging.DEBUG))
        stack.enter_context(caplog.at_level(logging.INFO, "sqlalchemy"))
        stack.enter_context(use_keyring(KEYRING) if case.configured else nullcontext())
        with pytest.raises(case.raises) as caught:
            database.run(case.act)
    if issubclass(caught.type, errors.KravnCryptoError):
        assert caught.type is case.raises
    shown = shown_by(caught.value)
    assert bool(found_in(shown, MARKER)) is (case.unguarded and not setting.guarded)
    if setting.guarded and not (case.repeated and database.engine.dialect.name == "postgresql"):
        assert found_in(shown, NEIGHBOUR) == []
    assert bool(found_in(caplog.text, MARKER)) is (case.logged and not setting.hidden)
    assert found_in("".join(str(warning.message) for warning in warned), MARKER) == []


def test_an_error_that_sqlalchemy_raises_from_itself_can_be_printed(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = sa.create_engine(sqlite_url)
    with use_keyring(KEYRING), engine.connect() as connection, pytest.raises(errors.UnstorableValueError) as caught:
        connection.execute(insert(RECORD), {**FINE, "document": UNSTORABLE})
    assert caught.value.__cause__ is caught.value
    logging.getLogger(__name__).error("what follows", exc_info=caught.value)
    engine.dispose()
    assert ": The value at $.bad, of type tuple" in caplog.text
    assert found_in(caplog.text, MARKER, NEIGHBOUR) == []


# --- Plain columns in the same row -----------------------------------------------------------------------------------

SECRET = "the-secret-of-a-deployment-" + "0123456789abcdef"


SYNCHRONOUS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}


@pytest.fixture(params=["sqlite", "postgresql+psycopg", "sqlite+aiosqlite", "postgresql+asyncpg"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> URL:
    """Give the URL of a database with all tables, and the settings of a process that may use it."""
    monkeypatch.setenv("KRAVN_SECRET", SECRET)
    backend = request.param.partition("+")[0]
    found = sa.make_url(request.getfixturevalue("sqlite_url" if backend == "sqlite" else "postgres_url"))
    engine = sa.create_engine(found.set(drivername=SYNCHRONOUS[backend]))
    migrate(engine)
    Base.metadata.create_all(engine, [RECORD])
    engine.dispose()
    return found.set(drivername=request.param)


def failed(engine: Engine) -> list[StatementError]:
    """Return the errors of statements that fail before and after the parameters are bound."""
    found = []
    for statement, parameters in (
        (insert(RECORD), [FINE, NO_NOTE]),
        (insert(RECORD), {**FINE, "number": 13}),
        (insert(RECORD), [{**FINE, "number": 1}, {**FINE, "number": 13}]),
        (text("INSERT INTO nowhere (note) VALUES (:note)"), {"note": NEIGHBOUR}),
    ):
        with engine.connect() as connection, pytest.raises(StatementError) as caught:
            connection.execute(statement, parameters)
        found.append(caught.value)
    return found


def failed_when_configured(url: URL, *, redact_errors: bool = True) -> list[StatementError]:
    if url.drivername in SYNCHRONOUS.values():
        engine = sa.create_engine(url)
        configure(engine, redact_errors=redact_errors)
        found = failed(engine)
        engine.dispose()
        return found

    async def main() -> list[StatementError]:
        engine = create_async_engine(url)
        await configure_async(engine, redact_errors=redact_errors)
        found = await greenlet_spawn(failed, engine.sync_engine)
        await engine.dispose()
        return found

    return asyncio.run(main())


def test_configured_engine_names_the_types_of_parameters_and_no_value(url: URL) -> None:
    missing, check, many, table = failed_when_configured(url)
    assert isinstance(missing.params, list)
    assert missing.params[0]["note"] == "<str>"
    assert missing.params[0]["document"] == "<dict>"
    assert set(missing.params[1]) == set(NO_NOTE)
    for error in (missing, check, many, table):
        assert error.params
        assert "[parameters: " in str(error)
        assert error.statement
        # PostgreSQL itself says what is in a row that a constraint refuses.
        of_the_database = url.get_backend_name() == "postgresql" and isinstance(error, IntegrityError)
        assert bool(found_in(shown_by(error), NEIGHBOUR)) is of_the_database
        assert found_in(shown_by(error), MARKER) == []
        assert found_in(repr(error.params), NEIGHBOUR) == []
    assert pickled(missing)
    assert "<str>" in repr(table.params)


@pytest.mark.parametrize("redacted", [True, False])
def test_guards_can_be_installed_alone(database_url: str, *, redacted: bool) -> None:
    engine = sa.create_engine(database_url)
    Base.metadata.create_all(engine, [RECORD])
    guards.install(engine, redact_errors=redacted)
    with use_keyring(KEYRING):
        shown = [bool(found_in(repr(error.params), NEIGHBOUR)) for error in failed(engine)]
    engine.dispose()
    assert shown == [not redacted] * 4


def test_without_redaction_sqlalchemy_shows_the_row(url: URL) -> None:
    missing, *others = failed_when_configured(url, redact_errors=False)
    assert found_in(str(missing), MARKER)
    assert found_in(str(missing), NEIGHBOUR)
    for error in others:
        assert found_in(str(error), NEIGHBOUR)
        assert found_in(str(error), MARKER) == []


def test_parameter_that_asyncpg_cannot_send_is_not_repeated(postgres_url: str) -> None:
    url = sa.make_url(postgres_url).set(drivername="postgresql+asyncpg")

    async def main() -> list[str]:
        found = []
        for redacted in (True, False):
            engine = create_async_engine(url, hide_parameters=True)
            guards.install(engine.sync_engine, redact_errors=redacted)
            async with engine.connect() as connection:
                with pytest.raises(DBAPIError, match=r"invalid input for query argument \$1") as caught:
                    await connection.execute(select(bindparam("v", type_=sa.Date)), {"v": NEIGHBOUR})
            found.append(shown_by(caught.value))
            await engine.dispose()
        return found

    redacted, shown = asyncio.run(main())
    assert found_in(redacted, NEIGHBOUR) == []
    assert found_in(shown, NEIGHBOUR)


# --- Logs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [False, True], ids=["parameters shown", "parameters hidden"])
@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG], ids=["INFO", "DEBUG"])
def test_log_of_sqlalchemy_shows_values_at_debug_only(
    database_url: str, caplog: pytest.LogCaptureFixture, level: int, *, hidden: bool
) -> None:
    engine = sa.create_engine(database_url, hide_parameters=hidden)
    guards.install(engine)
    Base.metadata.create_all(engine, [RECORD])
    caplog.set_level(logging.DEBUG)
    caplog.set_level(level, "sqlalchemy.engine")
    with use_keyring(KEYRING), Session(engine) as session:
        session.add(record := Record(**FINE))
        session.commit()
        assert record.document == {"token": MARKER}
    engine.dispose()
    assert "INSERT INTO record" in caplog.text
    # The rows that it fetched, hide_parameters or not: a leak that the documentation warns of.
    assert bool(found_in(caplog.text, MARKER)) is (level == logging.DEBUG)


# --- Starting up -----------------------------------------------------------------------------------------------------

TOKEN = "hvs." + "T0KEN-marker"
CLIENT_SECRET = "CL1ENT" + "-secret-marker"
NOWHERE = "https://127.0.0.1:9"
VAULT = {"kms_provider": "vault", "kms_vault_addr": NOWHERE, "kms_vault_token": TOKEN, "kms_vault_key": "kravn"}
AZURE = {
    "kms_provider": "azure",
    "kms_azure_vault_url": "https://kravn.vault.azure.net",
    "kms_azure_key": "kravn",
    "kms_azure_tenant_id": str(UUID(int=1)),
    "kms_azure_client_id": str(UUID(int=2)),
    "kms_azure_client_secret": CLIENT_SECRET,
}


class RememberingKMS(MisbehavingKMS):
    def __init__(self) -> None:
        super().__init__()
        self.data_keys: list[bytes] = []

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        self.data_keys.append(data_key)
        return super().wrap(data_key, binding, deadline)


def starting_up() -> dict[str, tuple[Callable[[RememberingKMS], Any], type[Exception]]]:
    return {
        "down": (lambda kms: setattr(kms, "down", True), errors.ProviderUnavailableError),
        "another key": (lambda kms: setattr(kms, "returns", bytes(range(50, 82))), errors.WrongKeyError),
        "another size": (
            lambda kms: setattr(kms, "returns", b"%b-the-wrong-size" % kms.data_keys[0]),
            errors.WrongKeyError,
        ),
        "denied": (
            lambda kms: setattr(kms, "raises", errors.ProviderDeniedError("denied", provider="vault")),
            errors.ProviderDeniedError,
        ),
    }


@pytest.mark.parametrize("name", starting_up())
def test_failed_start_shows_no_key_and_no_secret(sqlite_url: str, caplog: pytest.LogCaptureFixture, name: str) -> None:
    fail, raises = starting_up()[name]
    kms = RememberingKMS()
    engine = sa.create_engine(sqlite_url)
    migrate(engine)
    settings = Settings(secret=SECRET)
    with caplog.at_level(logging.DEBUG):
        configure(engine, settings, provider=kms)
        keyring = current_keyring()
        reset()
        fail(kms)
        with pytest.raises(raises) as caught:
            configure(engine, settings, provider=kms)
        found = status(engine, settings)
    engine.dispose()
    assert kms.data_keys
    secrets: list[str | bytes] = [SECRET, *kms.data_keys, bytes(range(50, 82))]
    assert keyring.primary_key_id in repr(found)
    assert keyring.primary_key_id in caplog.text
    assert leaked(caught.value, *secrets) == []
    assert found_in(caplog.text + repr(found) + pickled(found), *secrets) == []


@pytest.mark.parametrize("settings", [VAULT, AZURE], ids=["vault", "azure"])
def test_unreachable_kms_shows_no_secret(
    sqlite_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    # No address is resolved either.
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    engine = sa.create_engine(sqlite_url)
    migrate(engine)
    with caplog.at_level(logging.DEBUG), pytest.raises(errors.ProviderError) as caught:
        configure(engine, Settings(secret=SECRET, kms_timeout=1, **settings))
    engine.dispose()
    assert leaked(caught.value, SECRET, TOKEN, CLIENT_SECRET) == []
    assert found_in(caplog.text, SECRET, TOKEN, CLIENT_SECRET) == []


def unresolved(*_: Any, **__: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "no such host")


# --- Objects ---------------------------------------------------------------------------------------------------------

KEY = os.urandom(32)
PASSWORD = "PASSW0RD" + "-marker"
HIDDEN = (MARKER, SECRET, TOKEN, CLIENT_SECRET, PASSWORD, KEY, DataKey(KEY).check, expand(KEY, "aead/02"))


URL_WITH_PASSWORD = f"postgresql+psycopg://user:{PASSWORD}@localhost/db"
WITH_DEFAULT = sa.Table("d", sa.MetaData(), Column("x", EncryptedJSON(), default={"token": MARKER}))

OBJECTS: dict[str, Callable[[], list[Any]]] = {
    "types": lambda: [column.type for column in RECORD.c],
    "types of no column": lambda: [EncryptedJSON(Profile), EncryptedString(), EncryptedBytes(), Encrypted(sa.Date)],
    "column": lambda: [DOCUMENT, RECORD.c.string],
    "attribute": lambda: [Record.document, Record.string],
    "table": lambda: [RECORD],
    "metadata": lambda: [Base.metadata],
    "mapper": lambda: [sa.inspect(Record)],
    "object": lambda: [Record(**FINE), sa.inspect(Record(**FINE))],
    "statement": lambda: [insert(RECORD).values(FINE), insert(RECORD).values(FINE).compile(), select(LITERAL)],
    "DDL": lambda: [CreateTable(RECORD), CreateTable(WITH_DEFAULT)],
    "engine": lambda: [sa.create_engine(URL_WITH_PASSWORD), create_async_engine(URL_WITH_PASSWORD)],
    "data key": lambda: [DataKey(KEY)],
    "keyring": lambda: [Keyring(DataKey(KEY), [DataKey(bytes(32))])],
    "settings": lambda: [Settings(secret=SECRET, **VAULT), Settings(secret=SECRET, **AZURE)],
    "settings as JSON": lambda: [settings.model_dump_json() for settings in OBJECTS["settings"]()],
    "settings as a dict": lambda: [settings.model_dump() for settings in OBJECTS["settings"]()],
    "provider": lambda: [configuration.provider_of(settings) for settings in OBJECTS["settings"]()],
    "key store": lambda: [configuration.key_store(settings) for settings in OBJECTS["settings"]()],
    "bootstrap secret": lambda: [BootstrapSecret.from_secret(SECRET)],
    "frame": lambda: [parse(DataKey(KEY).encrypt(bytes(24), MARKER.encode(), ColumnName("a.b")))],
}

PICKLED_WITH_VALUES = {"object", "statement", "DDL", "settings as a dict"}
"""What is pickled to be the same elsewhere, values included; constants of the program, and pydantic's ``SecretStr``."""

NEVER_PICKLED = ["data key", "keyring", "settings", "provider", "key store", "bootstrap secret"]


@pytest.mark.parametrize("name", OBJECTS)
def test_object_shows_no_secret(name: str) -> None:
    for found in OBJECTS[name]():
        shown = f"{found!r}{found}" + ("" if name in PICKLED_WITH_VALUES else pickled(found))
        assert found_in(shown, *HIDDEN) == []


@pytest.mark.parametrize("name", NEVER_PICKLED)
def test_object_with_a_secret_is_not_pickled(name: str) -> None:
    for found in OBJECTS[name]():
        # Settings are pydantic's to copy; they stay in this process.
        for copied in (pickle.dumps,) if name == "settings" else (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="holds a secret and cannot be pickled or copied"):
                copied(found)


def test_tables_and_types_are_pickled_without_a_key() -> None:
    engine = sa.create_engine("sqlite://")
    with use_keyring(Keyring(DataKey(KEY))), engine.connect() as connection:
        RECORD.create(connection)
        # What was used may remember what it was used with.
        connection.execute(insert(RECORD), FINE)
        assert connection.scalar(select(DOCUMENT)) == {"token": MARKER}
        for part in (RECORD, DOCUMENT.type, Base.metadata):
            assert "record" in pickled(part)
            assert found_in(pickled(part), *HIDDEN) == []
    engine.dispose()
