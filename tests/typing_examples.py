"""What type checkers make of encrypted columns. Nobody runs this: mypy and pyright check it, and must agree."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, TypedDict, assert_type
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import (
    Boolean,
    Column,
    Date,
    DateTime,
    Dialect,
    Engine,
    Float,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    TypeDecorator,
    Uuid,
    create_engine,
    select,
)
from sqlalchemy import Enum as EnumType
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column
from sqlalchemy.types import TypeEngine

from sqlalchemy_kravn_crypto import (
    DataKey,
    Encrypted,
    EncryptedBytes,
    EncryptedJSON,
    EncryptedString,
    Keyring,
    MutableJSON,
    configure,
    configure_async,
    use_keyring,
)
from sqlalchemy_kravn_crypto.providers.base import KeyProvider
from sqlalchemy_kravn_crypto.settings import Settings


class Profile(BaseModel):
    name: str


class Address(TypedDict):
    street: str


@dataclass
class Card:
    number: str


class Colour(Enum):
    RED = 1


class Stripped(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.strip()


# --- What Mapped says is what the attribute is -----------------------------------------------------------------------

Secret = Annotated[str, mapped_column(EncryptedString)]


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: EncryptedJSON, Profile: EncryptedJSON(Profile), bytes: EncryptedBytes}  # noqa: RUF012 - as SQLAlchemy declares it


class User(Base):
    __tablename__ = "user"

    id: Mapped[int] = mapped_column(primary_key=True)
    by_class: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)
    by_instance: Mapped[dict[str, Any] | None] = mapped_column(EncryptedJSON(storage="text"))
    anything: Mapped[list[dict[str, Any]]] = mapped_column(EncryptedJSON(associated_data="user.anything"))
    model: Mapped[Profile] = mapped_column(EncryptedJSON(Profile))
    models: Mapped[list[Profile]] = mapped_column(EncryptedJSON(list[Profile]))
    typed: Mapped[Address] = mapped_column(EncryptedJSON(Address))
    card: Mapped[Card | None] = mapped_column(EncryptedJSON(Card))
    string: Mapped[str | None] = mapped_column(EncryptedString)
    binary: Mapped[bytes] = mapped_column(EncryptedBytes(earlier_names=("user.data",)))
    born: Mapped[date] = mapped_column(Encrypted(Date))
    seen: Mapped[datetime] = mapped_column(Encrypted(DateTime(timezone=True)))
    salary: Mapped[Decimal] = mapped_column(Encrypted(Numeric(10, 2)))
    number: Mapped[UUID] = mapped_column(Encrypted(Uuid()))
    colour: Mapped[Colour] = mapped_column(Encrypted(EnumType(Colour)))
    wait: Mapped[timedelta | None] = mapped_column(Encrypted(Interval, storage="text"))
    stripped: Mapped[str] = mapped_column(Encrypted(Stripped))
    tracked: Mapped[dict[str, Any]] = mapped_column(MutableJSON.as_mutable(EncryptedJSON))
    tracked_instance: Mapped[list[Any]] = mapped_column(MutableJSON.as_mutable(EncryptedJSON()))
    by_map: Mapped[dict[str, Any]]
    optional_by_map: Mapped[Profile | None]
    annotated: Mapped[Secret]


class Point(MappedAsDataclass, Base):
    __tablename__ = "point"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    token: Mapped[str] = mapped_column(EncryptedString, repr=False)
    extra: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON, default_factory=dict[str, Any], repr=False)


def attributes(user: User, point: Point) -> None:
    assert_type(user.by_class, dict[str, Any])
    assert_type(user.by_instance, dict[str, Any] | None)
    assert_type(user.model, Profile)
    assert_type(user.models, list[Profile])
    assert_type(user.typed, Address)
    assert_type(user.card, Card | None)
    assert_type(user.string, str | None)
    assert_type(user.binary, bytes)
    assert_type(user.born, date)
    assert_type(user.salary, Decimal)
    assert_type(user.number, UUID)
    assert_type(user.colour, Colour)
    assert_type(user.wait, timedelta | None)
    assert_type(user.tracked, dict[str, Any])
    assert_type(user.optional_by_map, Profile | None)
    assert_type(user.annotated, str)
    assert_type(point.token, str)
    user.by_class["token"] = 1
    user.born = datetime.now().date()  # noqa: DTZ005 - any date
    user.born = "2024-01-01"  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]
    user.binary = "text"  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]
    user.string.upper()  # type: ignore[union-attr] # pyright: ignore[reportOptionalMemberAccess]
    user.model = {"name": "x"}  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]


def constructors() -> None:
    Point(token="x", extra={"a": 1})
    Point(token=b"x")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    Point()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    EncryptedJSON("user.profile", "text")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    EncryptedString(earlier_names=1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    EncryptedString(key=b"x")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    Encrypted()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    Encrypted(date)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    EncryptedString(associated_data=None, storage=b"text")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


# --- What is selected ------------------------------------------------------------------------------------------------


def selections(session: Session) -> None:
    assert_type(session.scalars(select(User.model)).one(), Profile)
    assert_type(session.scalars(select(User.string)).all()[0], str | None)
    assert_type(session.scalars(select(User.born)).first(), date | None)
    for number, salary in session.execute(select(User.number, User.salary)).tuples():
        assert_type(number, UUID)
        assert_type(salary, Decimal)
    assert_type(session.get_one(User, 1).card, Card | None)
    select(User).where(User.string.is_(None), User.born != None)  # noqa: E711 - what SQLAlchemy's operator is for


# --- Types by themselves ---------------------------------------------------------------------------------------------


def types() -> None:
    assert_type(Encrypted(Integer), Encrypted[int])
    assert_type(Encrypted(Integer()), Encrypted[int])
    assert_type(Encrypted(Boolean), Encrypted[bool])
    assert_type(Encrypted(Date), Encrypted[date])
    assert_type(Encrypted(DateTime(timezone=True)), Encrypted[datetime])
    assert_type(Encrypted(Interval), Encrypted[timedelta])
    assert_type(Encrypted(String(50)), Encrypted[str])
    assert_type(Encrypted(LargeBinary), Encrypted[bytes])
    assert_type(Encrypted(Stripped), Encrypted[str])
    assert_type(Encrypted(Numeric(10, 2)), Encrypted[Decimal])
    assert_type(Encrypted(Float()), Encrypted[float])
    assert_type(Encrypted(Uuid()), Encrypted[UUID])
    assert_type(Encrypted(Integer).column_name, str | None)
    assert_type(MutableJSON.as_mutable(EncryptedJSON), TypeEngine[Any])
    assert_type(EncryptedString().storage, str)


def core(metadata: MetaData) -> Table:
    # Without the annotation, mypy knows the type of no TypeDecorator's column.
    number: Column[int] = Column("number", Encrypted(Integer()))
    assert_type(number.type, TypeEngine[int])
    return Table("t", metadata, Column("token", EncryptedString), Column("extra", EncryptedJSON(Profile)))


# --- Keys and start-up -----------------------------------------------------------------------------------------------


def keys(key: bytes) -> None:
    keyring = Keyring(DataKey(key), [DataKey.generate()])
    assert_type(use_keyring(keyring).__enter__(), Keyring)
    with use_keyring(keyring) as used:
        assert_type(used, Keyring)
    assert_type(keyring.key_ids, frozenset[str])
    manager: AbstractContextManager[Keyring] = use_keyring(keyring)
    with manager:
        pass
    Keyring(key)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    use_keyring(DataKey(key))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    DataKey("text")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


def fixture(key: bytes) -> Iterator[Keyring]:
    with use_keyring(Keyring(DataKey(key))) as keyring:
        yield keyring


async def start(engine: Engine, asynchronous: AsyncEngine, settings: Settings, provider: KeyProvider) -> None:
    configure(engine)
    configure(engine, settings, provider=provider, check_statements=False, redact_errors=False, binary_results=False)
    await configure_async(asynchronous, settings=None, redact_errors=True)
    configure(create_async_engine("sqlite+aiosqlite://"))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await configure_async(create_engine("sqlite://"))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    configure(engine, "vault")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    configure(engine, settings, provider)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
