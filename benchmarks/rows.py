"""Whole rows, written and read through SQLAlchemy: ``EncryptedJSON`` beside SQLAlchemy's own ``JSON``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from .databases import Database, Store
from .documents import KINDS, Documents
from .figures import Effort, Figure, Section
from .measuring import Contestant, beside, race

SECTION: Final = Section(
    "rows",
    "Rows, against SQLAlchemy's JSON",
    "A table of a primary key and a document, written and read through SQLAlchemy: `EncryptedJSON` divided by "
    "SQLAlchemy's `JSON`, in two tables of the same shape. SQLite is in memory, PostgreSQL on the same machine with "
    "psycopg. A write ends with the commit; a read begins with a new session or connection and ends with all documents "
    "decoded. The process is configured as a program's is, guards included, so that ciphertext is read in PostgreSQL's "
    "binary format once a statement was executed before. The floor is a third table, of a type that makes those calls "
    "only that no scheme of this kind can do without (see the next section), read in binary too and divided by `JSON` "
    "as well: a target below it is out of reach of any code around those calls.",
)


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to write or read all rows."""

    name: str
    prepare: Callable[[Store, Documents], Any]
    run: Callable[[Store, Any], object]


def _rows_to_insert(store: Store, documents: Documents) -> list[dict[str, Any]]:
    store.clear()
    return [{"document": document} for document in documents.fresh()]


def _insert(store: Store, rows: list[dict[str, Any]]) -> None:
    with Session(store.engine) as session:
        session.execute(insert(store.model), rows)
        session.commit()


def _objects_to_add(store: Store, documents: Documents) -> list[Any]:
    store.clear()
    return [store.model(document=document) for document in documents.fresh()]


def _add_all(store: Store, objects: list[Any]) -> None:
    with Session(store.engine) as session:
        session.add_all(objects)
        session.commit()


def _nothing(_store: Store, _documents: Documents) -> None:
    """Prepare a read: the rows are there."""


def _load_objects(store: Store, _: None) -> Sequence[Any]:
    with Session(store.engine) as session:
        return session.scalars(select(store.model)).all()


def _load_rows(store: Store, _: None) -> Sequence[Any]:
    with store.engine.connect() as connection:
        return connection.execute(select(store.table)).all()


# The rows that the last way to write leaves are what is read then.
_WAYS: Final = (
    _Way("write, add_all", _objects_to_add, _add_all),
    _Way("write, bulk insert", _rows_to_insert, _insert),
    _Way("read, ORM", _nothing, _load_objects),
    _Way("read, Core", _nothing, _load_rows),
)
_TARGETS: Final = {
    ("SQLite", "190 B"): {"write, bulk insert": 1.25, "read, ORM": 0.90, "read, Core": 0.85},
    ("SQLite", "4 kB"): {"write, bulk insert": 0.55, "read, ORM": 0.85, "read, Core": 0.90},
    ("PostgreSQL", "190 B"): {"write, bulk insert": 1.10, "read, ORM": 1.05, "read, Core": 1.15},
    ("PostgreSQL", "4 kB"): {"write, bulk insert": 1.10, "read, ORM": 1.10, "read, Core": 1.10},
}


def measure(effort: Effort, databases: Sequence[Database]) -> Iterator[Figure]:
    """Write and read rows in every way, with every kind of document, in every database."""
    for database in databases:
        with database.stores() as stores:
            ours, theirs, floor = stores
            for kind, make in KINDS.items():
                documents = Documents(make, effort.rows)
                targets = _TARGETS[database.name, kind]
                for way in _WAYS:
                    best = race([_contestant(store, way, documents) for store in stores], effort.row_rounds)
                    label, plain = f"{database.name}, {kind}: {way.name}", best[theirs.name]
                    yield Figure(
                        label,
                        theirs.name,
                        best[ours.name] / plain,
                        targets.get(way.name),
                        beside(best[ours.name], plain, effort.rows),
                    )
                    yield Figure(
                        f"{label}, the floor",
                        theirs.name,
                        best[floor.name] / plain,
                        detail=beside(best[floor.name], plain, effort.rows),
                    )
                for store in stores:
                    _check(store, documents)


def _contestant(store: Store, way: _Way, documents: Documents) -> Contestant:
    return Contestant(
        store.name,
        lambda: way.prepare(store, documents),
        lambda prepared: way.run(store, prepared),
    )


def _check(store: Store, documents: Documents) -> None:
    """Raise if what is stored is not what was written."""
    with store.engine.connect() as connection:
        stored = connection.scalars(select(store.table.c.document).order_by(store.table.c.id)).all()
    if list(stored) != documents.fresh():
        msg = f"{store.name} did not return what was written, so its times mean nothing"
        raise AssertionError(msg)
