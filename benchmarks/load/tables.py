"""The tables that are written and read, and the database's own record of every value that was ever put into them."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from random import Random
from typing import Any, Final

import orjson
from sqlalchemy import Engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, EncryptedString
from sqlalchemy_kravn_crypto.ciphertext import FRAME_START as START
from sqlalchemy_kravn_crypto.ciphertext import KEY_PREFIX_SIZE, NONCE

from ..documents import Document, credentials

ACCOUNTS: Final = 1_000
"""How many rows all threads change, again and again."""

ENTRIES_OF_THREAD: Final = 1_000_000
"""How many ids each thread has for rows that it adds."""


class Base(DeclarativeBase):
    """What has the tables."""


class Account(Base):
    """A row that every thread changes: how often, is in its document, and in the clear beside it."""

    __tablename__ = "load_account"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int]
    document: Mapped[Document] = mapped_column(EncryptedJSON)
    remark: Mapped[str | None] = mapped_column(EncryptedString)


class Entry(Base):
    """A row that one thread adds, and that only a rekey changes."""

    __tablename__ = "load_entry"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    document: Mapped[Document] = mapped_column(EncryptedJSON)
    remark: Mapped[str | None] = mapped_column(EncryptedString)


class WrongValueError(Exception):
    """What was read is not what was written."""


def values_of(row: int, version: int, random: Random) -> dict[str, Any]:
    """Return what is written into a row: a document of about 190 bytes, and every fourth time a remark.

    The document says which row and which version it is of, and its token is a hash over all the rest of it. The remark
    follows from the document, so that one that belongs to another version is seen.
    """
    document = credentials(random)
    document["limits"] |= {"rows": row, "burst": version}
    document["token"] = _hash(document)
    return {"document": document, "remark": _remark(document) if row % 4 == 0 else None}


def check(row: int, version: int, document: Document, remark: str | None) -> int:
    """See that what was read of a row is what was written into it, and return how many values that is.

    :raises WrongValueError: if it is not.
    """
    expected = _remark(document) if row % 4 == 0 else None
    found = document["limits"]["rows"], document["limits"]["burst"], document["token"], remark
    if found != (row, version, _hash(document), expected):
        raise WrongValueError(f"row {row} of version {version} holds what was not written into it")
    return count(row)


def count(row: int) -> int:
    """Return how many values there are in a row."""
    return 2 if row % 4 == 0 else 1


def _hash(document: Document) -> str:
    rest = orjson.dumps({**document, "token": ""}, option=orjson.OPT_SORT_KEYS)
    return blake2b(rest, digest_size=20).hexdigest()


def _remark(document: Document) -> str:
    return f"{document['user']} in {document['city']}: {document['token']}"


# --- The record ------------------------------------------------------------------------------------------------------


def create(engine: Engine) -> None:
    """Create the tables, and have the database record key id and nonce of each value that comes into them.

    It is the database that does so, since it cannot miss one: whoever writes, and whatever the programs remember.
    """
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for statement in _record():
            connection.execute(text(statement))


def _record() -> Iterator[str]:
    yield "CREATE UNLOGGED TABLE load_written (start bytea NOT NULL, nonce bytea NOT NULL)"
    # Slices of the frame, which SQL counts from 1: up to the end of the key id, and the nonce.
    take = (
        f"INSERT INTO load_written VALUES (substr({{0}}, 1, {KEY_PREFIX_SIZE}), "  # noqa: S608 - constants of the format
        f"substr({{0}}, {NONCE.start + 1}, {NONCE.stop - NONCE.start}));"
    )
    changes = "".join(
        f"IF NEW.{column} IS NOT NULL AND (TG_OP = 'INSERT' OR NEW.{column} IS DISTINCT FROM OLD.{column}) "
        f"THEN {take.format(f'NEW.{column}')} END IF; "
        for column in ("document", "remark")
    )
    yield f"CREATE FUNCTION load_record() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {changes} RETURN NULL; END $$"
    for table in Base.metadata.sorted_tables:
        yield (
            f"CREATE TRIGGER load_record AFTER INSERT OR UPDATE ON {table.name} "
            "FOR EACH ROW EXECUTE FUNCTION load_record()"
        )


RECORDED: Final = text(
    "SELECT count(*) AS written, count(DISTINCT nonce) AS nonces, "
    "count(*) FILTER (WHERE substr(start, 1, :size) <> :start) AS others FROM load_written"
).bindparams(start=START, size=len(START))
"""How many values were ever written, how many nonces these have, and how many are no frames."""
