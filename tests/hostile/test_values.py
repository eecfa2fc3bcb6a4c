"""Values that were altered, moved, cut or planted in the database, and what the ORM makes of them.

1. Each bit of a value flipped: a documented error, and never a value.
2. Each length cut, and one byte more: a documented error. No bytes at all are not NULL.
3. Values swapped between columns are refused; between rows, where the column is bound to its row.
4. Plaintext that looks like ciphertext is data like any other, and is not in what is stored.
5. Plaintext, and ciphertext of an earlier format, put into the column by hand: refused, and not passed on.
6. Other spellings of a value in text storage: refused.
"""

import string
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, LargeBinary, Text, create_engine, select, text, type_coerce, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import DataKey, EncryptedBytes, EncryptedJSON, EncryptedString, Keyring, use_keyring
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.ciphertext import from_text
from tests.leaks import leaked

MARKER = "S3CR3T" + "-marker"
ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
DOCUMENT = {"token": MARKER, "filling": "x" * 200}


class Base(DeclarativeBase):
    pass


class Person(Base):
    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True)
    document: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)
    ssn: Mapped[str | None] = mapped_column(EncryptedString)
    phone: Mapped[str | None] = mapped_column(EncryptedString)
    scan: Mapped[bytes | None] = mapped_column(EncryptedBytes)
    note: Mapped[str | None] = mapped_column(EncryptedString(storage="text"))
    memo: Mapped[str | None] = mapped_column(EncryptedString(storage="text"))
    bound: Mapped[str | None] = mapped_column(EncryptedString(bind_row="id"))


@pytest.fixture(autouse=True)
def _keyring() -> Iterator[None]:
    with use_keyring(Keyring(DataKey(b"k" * 32))):
        yield


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url)
    Base.metadata.create_all(made)
    with Session(made) as session:
        for number in (1, 2):
            session.add(
                Person(
                    id=number,
                    document=DOCUMENT,
                    ssn=f"ssn {number} {MARKER}",
                    phone=f"phone {number}",
                    scan=MARKER.encode(),
                    note=f"note {number} {MARKER}",
                    memo=f"memo {number}",
                    bound=f"bound {number}",
                )
            )
        session.commit()
    yield made
    made.dispose()


@pytest.fixture
def light() -> Iterator[Engine]:
    """Give an engine in memory, for what is done thousands of times and is no matter of the database."""
    made = create_engine("sqlite://")
    Base.metadata.create_all(made)
    with Session(made) as session:
        session.add(Person(id=1, document=DOCUMENT, note=MARKER))
        session.commit()
    yield made
    made.dispose()


def _plain(name: str) -> Any:
    """Return the type of what is stored in a column."""
    type_: Any = Person.__table__.c[name].type
    return Text() if type_.storage == "text" else LargeBinary()


def stored(engine: Engine, name: str, row: int = 1) -> Any:
    with engine.connect() as connection:
        column = type_coerce(Person.__table__.c[name], _plain(name))
        return connection.execute(select(column).where(Person.id == row)).scalar_one()


def put(connection: Any, name: str, value: Any, row: int = 1) -> None:
    """Write to the database as whoever has it does."""
    statement = text(f"UPDATE person SET {name} = :value WHERE id = :row")  # noqa: S608 - a name of this file
    connection.execute(statement, {"value": value, "row": row})


def refused(engine: Engine, name: str, value: Any, row: int = 1) -> errors.DecryptionError:
    """Put a value into a column, and return the error with which the ORM refuses to load it."""
    with engine.connect() as connection:
        put(connection, name, value, row)
        with Session(connection) as session, pytest.raises(errors.DecryptionError) as caught:
            session.execute(select(getattr(Person, name)).where(Person.id == row)).all()
        connection.rollback()
    assert not leaked(caught.value, MARKER)
    return caught.value


# --- 1 and 2 ---------------------------------------------------------------------------------------------------------


def test_1_each_flipped_bit_of_a_frame_is_refused(light: Engine) -> None:
    frame = bytes(stored(light, "document"))
    assert len(frame) > 250
    kinds = set()
    for place in range(len(frame)):
        for bit in range(8):
            changed = bytearray(frame)
            changed[place] ^= 1 << bit
            kinds.add(type(refused(light, "document", bytes(changed))))
    assert kinds == {
        errors.MalformedCiphertextError,
        errors.UnsupportedAlgorithmError,
        errors.UnknownKeyError,
        errors.WrongColumnError,
        errors.AuthenticationError,
    }


def test_1_each_flipped_bit_of_a_text_is_refused(light: Engine) -> None:
    value = stored(light, "note")
    for place in range(len(value)):
        for bit in range(7):
            changed = chr(ord(value[place]) ^ 1 << bit)
            refused(light, "note", value[:place] + changed + value[place + 1 :])


def test_2_each_length_is_refused_and_no_bytes_are_not_null(light: Engine) -> None:
    frame, value = bytes(stored(light, "document")), stored(light, "note")
    for length in range(len(frame)):
        error = refused(light, "document", frame[:length])
        assert type(error) in {errors.MalformedCiphertextError, errors.AuthenticationError}
    for length in range(len(value)):
        refused(light, "note", value[:length])
    for more in (b"\0", frame):
        assert type(refused(light, "document", frame + more)) is errors.AuthenticationError


# --- 3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [("ssn", "phone"), ("phone", "ssn"), ("note", "memo"), ("ssn", "scan")])
def test_3_a_value_of_another_column_is_refused(engine: Engine, one: str, other: str) -> None:
    assert type(refused(engine, other, stored(engine, one))) is errors.WrongColumnError


def test_3_a_value_of_another_row_is_read_unless_the_column_is_bound_to_its_row(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "ssn", stored(engine, "ssn", 2))
    with Session(engine) as session:
        assert session.execute(select(Person.ssn).where(Person.id == 1)).scalar_one() == f"ssn 2 {MARKER}"
    assert type(refused(engine, "bound", stored(engine, "bound", 2))) is errors.AuthenticationError


def test_3_one_refused_value_leaves_the_row_to_be_deleted_and_written_anew(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "ssn", b"garbage")
    with Session(engine) as session:
        session.execute(update(Person).where(Person.id == 1).values(ssn="anew"))
        session.commit()
        assert session.get_one(Person, 1).ssn == "anew"


# --- 4 ---------------------------------------------------------------------------------------------------------------

LOOKS_LIKE_CIPHERTEXT = (
    "enc:v1:AAAA",
    "enc:v3:-QJZ4a4M1IXQSw",
    "",
    " ",
    "\ufeff",
    "\N{LATIN SMALL LETTER U WITH GRAVE}\x02",
    "null",
    '{"a":1}',
)


@pytest.mark.parametrize("value", LOOKS_LIKE_CIPHERTEXT, ids=range(len(LOOKS_LIKE_CIPHERTEXT)))
def test_4_what_looks_like_ciphertext_is_data(engine: Engine, value: str) -> None:
    data = b"\xf9\x02" + value.encode() + bytes(60)
    nul = f"\x00{value}\x00"
    with Session(engine) as session:
        session.add(Person(id=9, document={value: [value, nul]}, ssn=nul, scan=data, note=value, bound=value))
        session.commit()
        session.expunge_all()
        found = session.get_one(Person, 9)
        assert (found.document, found.ssn, found.scan) == ({value: [value, nul]}, nul, data)
        assert (found.note, found.bound) == (value, value)
    if len(value) > 2:
        for name in ("document", "ssn", "scan", "bound"):
            assert value.encode() not in bytes(stored(engine, name, 9))
        assert value not in stored(engine, "note", 9)[len("enc:v3:") :]


def test_4_a_value_that_is_itself_a_stored_value_comes_back_as_it_is(engine: Engine) -> None:
    frame, value = bytes(stored(engine, "scan")), stored(engine, "note")
    with Session(engine) as session:
        session.add(Person(id=9, scan=frame, note=value))
        session.commit()
        session.expunge_all()
        found = session.get_one(Person, 9)
        assert (found.scan, found.note) == (frame, value)


# --- 5 and 6 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["hello", "enc:v1:aGVsbG8", "enc:v2:aGVsbG8", "", "null", '{"a":1}', "\x00"], ids=range(7)
)
def test_5_plaintext_and_earlier_formats_are_refused(engine: Engine, value: str) -> None:
    assert type(refused(engine, "document", value.encode())) is errors.MalformedCiphertextError
    if "\x00" not in value:  # which PostgreSQL keeps in no text
        assert type(refused(engine, "note", value)) is errors.MalformedCiphertextError


@pytest.mark.parametrize(
    "respelt",
    [
        lambda value: value + " ",
        lambda value: " " + value,
        lambda value: value + "\n",
        lambda value: value[:60] + "\n" + value[60:],
        lambda value: value[:60] + "!" + value[60:],
        lambda value: value[:60] + "+" + value[61:],
        lambda value: value[:60] + "/" + value[61:],
        lambda value: value + "=",
        lambda value: value.upper(),
        lambda value: "ENC:V3:" + value[7:],
        lambda value: "enc:v4:" + value[7:],
        lambda value: value[7:],
    ],
    ids=["space", "before", "newline", "break", "foreign", "plus", "slash", "padding", "upper", "prefix", "v4", "bare"],
)
def test_6_another_spelling_of_a_text_is_refused(engine: Engine, respelt: Any) -> None:
    assert type(refused(engine, "note", respelt(stored(engine, "note")))) is errors.MalformedCiphertextError


def test_6_a_last_character_that_is_not_canonical_is_refused(engine: Engine) -> None:
    # Where the number of bytes is no multiple of 3, bits of the last character are unused, and are to be 0.
    for note, unused in (("x", 0), ("xx", 4), ("xxx", 2)):
        with Session(engine) as session:
            session.execute(update(Person).where(Person.id == 1).values(note=note))
            session.commit()
        value = stored(engine, "note")
        assert -len(from_text(value)) * 8 % 6 == unused
        last = ALPHABET.index(value[-1])
        for number in range(1, 1 << unused):
            respelt = value[:-1] + ALPHABET[last ^ number]
            assert type(refused(engine, "note", respelt)) is errors.MalformedCiphertextError
