"""Targets: the rows of the key tables, as a database returns them that somebody else can write to."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Final

from sqlalchemy_kravn_crypto import exceptions as errors

from .mutators import COPY, DELETE, KINDS, LONG, NOT_UTF8, Edit, edits, edits_behind, json_behind
from .target import KEY, MARKER, Run, target


class _NotUtf8(bytes):
    """Bytes that are put into the database as text."""

    __slots__ = ()


def _as_database_value(edit: Edit) -> Any:
    """Return the value as a type that SQLite knows, which keeps any of them in any column."""
    if edit.kind % KINDS == NOT_UTF8:
        return _NotUtf8(edit.value + b"\xff")
    text = edit.value.decode(errors="replace")
    number = int.from_bytes(edit.value[:8], "big", signed=True)
    if edit.kind % KINDS == LONG:
        return edit.value[1:].decode(errors="replace") * 2 ** (edit.value[0] % 17 if edit.value else 0)
    return (text, edit.value, number, None, number / 7)[edit.kind % KINDS]


SIGNED: Final = 1


def _rows_seeds() -> list[bytes]:
    by_value = [
        Edit(2, column, 0, value)
        for column, value in enumerate(
            (b"5", b"default", b"00" * 8, b"retired", b"default", b"3", b"x", b"vault", b"transit/kravn:v1", b"AAAA")
        )
    ]
    standby = [Edit(2, 10, 0, b"vault"), Edit(2, 11, 0, b"transit/kravn:v2"), Edit(2, 12, 0, b"AAAA")]
    return [
        bytes([SIGNED]),
        *(bytes([signed]) + edit.written() for edit in by_value for signed in (0, SIGNED)),
        bytes([SIGNED]) + b"".join(edit.written() for edit in standby),
        bytes([SIGNED]) + Edit(1, 13, 3, b"").written() + Edit(1, 15, 0, MARKER.encode()).written(),
        bytes([SIGNED]) + Edit(0, 5, 2, bytes(8)).written() + Edit(0, 16, 0, b"2024-01-01 00:00:00").written(),
        bytes([0]) + Edit(1, DELETE, 0, b"").written(),
    ]


def _untyped(connection: Any, table: Any) -> None:
    """Create a table without types and constraints, for whoever can write to the database can drop those."""
    columns = ", ".join(f'"{column.name}"' for column in table.columns)
    connection.exec_driver_sql(f"CREATE TABLE {table.name} ({columns})")


def _insert(connection: Any, table: Any, rows: list[dict[str, Any]], verb: str = "INSERT") -> None:
    connection.exec_driver_sql(f"DELETE FROM {table.name}")  # noqa: S608 - a constant
    for row in rows:
        values = tuple(row[column.name] for column in table.columns)
        places = ", ".join("CAST(? AS TEXT)" if isinstance(value, _NotUtf8) else "?" for value in values)
        connection.exec_driver_sql(f"{verb} INTO {table.name} VALUES ({places})", values)


def _copied(rows: list[dict[str, Any]], names: list[str], edit: Edit) -> Any:
    """Return what is at another place, whose row and column are the value."""
    row, column = edit.value[:2].ljust(2, b"\0")
    return rows[row % len(rows)][names[column % len(names)]]


def _changed(rows: list[dict[str, Any]], data: bytes) -> list[dict[str, Any]]:
    changed = [dict(row) for row in rows]
    for edit in edits(data):
        if not changed:
            break
        at = edit.row % len(changed)
        if edit.column == DELETE:
            del changed[at]
        else:
            names = list(changed[at])
            name = names[edit.column % len(names)]
            changed[at][name] = _copied(changed, names, edit) if edit.kind % KINDS == COPY else _as_database_value(edit)
    return changed


_STORED: Final = "SELECT * FROM {} ORDER BY id"


@cache
def _deployment() -> Any:
    """Make a key store with a key of every state, and a trail of events."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import StaticPool

    from sqlalchemy_kravn_crypto.lifecycle import promote, rotate
    from tests.fixtures_deployment import Deployment

    # In memory, and for as long as the process: nothing is left behind.
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    with tempfile.TemporaryDirectory() as directory:
        made = Deployment(engine, Path(directory))
        made.open()
        operator = made.operator()
        rotate(operator)
        promote(operator, reason=MARKER)
        rotate(operator)
        opened = made.open()
    with engine.connect() as connection:
        stored = {
            name: [dict(row) for row in connection.exec_driver_sql(_STORED.format(name)).mappings()]
            for name in ("kms_keys", "kms_events")
        }
    return made, opened, stored


@target(allowed=(errors.KravnCryptoError,), seeds=_rows_seeds, mutator=edits_behind(1, 19), secrets=(KEY,), share=2)
def key_rows() -> Run:
    """Rows as a database returns them, with their MACs made anew or not, opened with the MAC key and the KMS."""
    from sqlalchemy import create_engine

    from sqlalchemy_kravn_crypto.rows import select_rows
    from sqlalchemy_kravn_crypto.schema import TABLES
    from sqlalchemy_kravn_crypto.wrapping import run_here

    made, opened, stored = _deployment()
    store, secrets, mac_key = made.store(), opened.secrets, opened.mac_key
    connection = create_engine("sqlite://").connect()
    _untyped(connection, TABLES.keys)

    def run(data: bytes) -> object:
        _insert(connection, TABLES.keys, _changed(stored["kms_keys"], data[1:]))
        rows = select_rows(connection)
        if data[:1] and data[0] & SIGNED:
            rows = mac_key.sign(rows)
        store._provisioned(rows)
        if data[:1] and data[0] & 2:
            return store.reopen(rows, opened)
        return store._load(rows, secrets, None, run_here)

    return run


def _events_seeds() -> list[bytes]:
    edits = [Edit(1, column, 0, b"2024-01-01") for column in range(10)]
    return [
        bytes([SIGNED]),
        *(bytes([mode]) + edit.written() for edit in edits for mode in range(4)),
        bytes([2]) + Edit(4, 0, 2, b"\x7f" + b"\xff" * 7).written(),
        bytes([SIGNED]) + Edit(0, 7, 0, b'{"state": "primary", "a": [1]}').written(),
        bytes([SIGNED]) + Edit(0, 1, 2, bytes(8)).written(),
    ]


def _chained(rows: list[dict[str, Any]], hash_of: Callable[[Any], str]) -> str:
    """Give every event the hashes that make a chain of them, for those have no key."""
    from datetime import UTC, datetime

    newest = str(rows[0]["previous_hash"]) if rows else ""
    for row in rows:
        row["previous_hash"] = newest
        try:
            moment: Any = datetime.fromisoformat(row["occurred_at"]).replace(tzinfo=UTC)
        except (TypeError, ValueError):
            moment = row["occurred_at"]
        newest = row["hash"] = hash_of(row | {"occurred_at": moment})
    return newest


@target(allowed=(errors.KeyStoreError,), seeds=_events_seeds, mutator=edits_behind(1, 10), share=1)
def event_chain() -> Run:
    """The audit trail, with its hashes made anew or not, and with another event behind it or not."""
    from sqlalchemy import create_engine

    from sqlalchemy_kravn_crypto.events import append, hash_of, read_events
    from sqlalchemy_kravn_crypto.schema import TABLES

    _, _, stored = _deployment()
    connection = create_engine("sqlite://").connect()
    _untyped(connection, TABLES.events)

    def run(data: bytes) -> None:
        rows = _changed(stored["kms_events"], data[1:])
        newest = str(rows[-1]["hash"]) if rows else None
        if data[:1] and data[0] & SIGNED:
            newest = _chained(rows, hash_of)
        _insert(connection, TABLES.events, rows)
        if data[:1] and data[0] & 2:
            newest = append(connection, "rotate", newest_hash=newest, details={"state": "primary"})
        for found in read_events(connection, newest):
            json.dumps(found.as_dict())

    return run


# --- The tables without a MAC ----------------------------------------------------------------------------------------


def _told(made: object, **kinds: Any) -> None:
    """See that what was made of a row has the types that whoever reads it relies on."""
    for name, kind in kinds.items():
        value = getattr(made, name)
        assert isinstance(value, kind), f"{name} is a {type(value).__name__}"
        assert not (isinstance(value, bool) and kind is int), f"{name} is a bool"


def _table_seeds(columns: int, *values: bytes) -> list[bytes]:
    texts = [Edit(1, column, 0, value) for column in range(columns) for value in (b"2024-01-01", *values)]
    others = [Edit(0, column, kind, bytes(8)) for column in range(columns) for kind in range(1, KINDS)]
    return [b"", *(edit.written() for edit in (*texts, *others)), Edit(0, DELETE, 0, b"").written()]


def _stored_by(fill: Callable[[Any], None], name: str) -> list[dict[str, Any]]:
    """Return the rows that this library itself leaves in a table."""
    from sqlalchemy import create_engine

    from sqlalchemy_kravn_crypto.schema import TABLES

    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        TABLES.keys.metadata.create_all(connection)
        fill(connection)
        stored = connection.exec_driver_sql(f"SELECT * FROM {name}").mappings()  # noqa: S608 - a constant
        rows = [dict(row) for row in stored]
    engine.dispose()
    return rows


@target(allowed=(errors.MalformedRowError,), seeds=lambda: _table_seeds(11, b"60"), mutator=edits_behind(0, 11))
def replica_rows() -> Run:
    """The heartbeats."""
    from datetime import datetime, timedelta

    from sqlalchemy import create_engine

    from sqlalchemy_kravn_crypto.replicas import beat, forget_dead, read_replicas
    from sqlalchemy_kravn_crypto.schema import TABLES

    ids: dict[str, Any] = {"primary_key_id": "0" * 16, "key_ids": ["0" * 16, "1" * 16], "mac_key_ids": ["2" * 16]}

    def fill(connection: Any) -> None:
        for name in ("a", "b"):
            beat(connection, name, epoch=3, lease=60, **ids)

    stored = _stored_by(fill, "kms_replicas")
    connection = create_engine("sqlite://").connect()
    _untyped(connection, TABLES.replicas)

    def run(data: bytes) -> None:
        _insert(connection, TABLES.replicas, _changed(stored, data))
        for replica in read_replicas(connection):
            _told(replica, replica_id=str, host=str, process_id=int, version=str, epoch=int, primary_key_id=str)
            _told(replica, key_ids=frozenset, mac_key_ids=frozenset, lease=int, seen_at=datetime, is_alive=bool)
            assert replica.label
        forget_dead(connection, timedelta(seconds=1))

    return run


_RECORDED: Final = (b'["old.name"]', b'[["id", "integer"]]', b'[["id", "text"], ["n", "uuid"]]', b"text", b"binary")


@target(
    allowed=(errors.KeyStoreError, errors.ColumnUnreachableError),
    seeds=lambda: _table_seeds(8, *_RECORDED),
    mutator=edits_behind(0, 8, _RECORDED),
)
def column_rows() -> Run:
    """The columns on record, and where they are; a process that starts puts its own on record whatever is there."""
    from sqlalchemy import create_engine

    from sqlalchemy_kravn_crypto.known_columns import KnownColumn, known, located, record, recorded
    from sqlalchemy_kravn_crypto.schema import TABLES

    mine = KnownColumn("", "note", "content", "binary", "note.content")
    columns = [mine, KnownColumn("", "note", "title", "text", "note.title", ("old",))]
    stored = _stored_by(lambda connection: record(connection, columns), "kms_columns")
    connection = create_engine("sqlite://").connect()
    TABLES.columns.create(connection)
    connection.exec_driver_sql("CREATE TABLE note (id INTEGER PRIMARY KEY, content BLOB, title TEXT)")

    def run(data: bytes) -> None:
        # Into a table as it is, except what its constraints refuse.
        _insert(connection, TABLES.columns, _changed(stored, data), "INSERT OR IGNORE")
        record(connection, [mine])
        assert connection.exec_driver_sql(
            "SELECT storage, name FROM kms_columns "
            "WHERE schema_name = '' AND table_name = 'note' AND column_name = 'content'"
        ).all() == [("binary", "note.content")]
        found = recorded(connection)
        assert mine in found
        for one in found:
            _told(one, **{name.name: str for name in fields(KnownColumn)[:5]}, earlier_names=tuple, row_identity=tuple)
            assert all(isinstance(name, str) for name in one.earlier_names)
        for one in known(connection):
            located(connection, one)

    return run


_BOUNDS: Final = (b'["EDE="]', b'["EC0x"]', b'["EDE=", "A2E="]', b"[]")
"""The keys 1 and -1; 1 and a; and none at all."""


@target(
    allowed=(errors.KeyStoreError,),
    seeds=lambda: _table_seeds(18, *_BOUNDS),
    mutator=edits_behind(0, 18, _BOUNDS),
    share=0.2,
)
def rekey_rows() -> Run:
    """The ledger, as it is planned by, worked through and told of."""
    from sqlalchemy import Integer, column, create_engine

    from sqlalchemy_kravn_crypto import ledger
    from sqlalchemy_kravn_crypto.key_ranges import KeyColumns
    from sqlalchemy_kravn_crypto.known_columns import KnownColumn
    from sqlalchemy_kravn_crypto.schema import TABLES

    planned, key_id = KnownColumn("", "note", "content", "binary", "note.content"), "0" * 16
    keys = KeyColumns([column("id", Integer)], planned.label, "sqlite")
    bounds = [keys.to_text((number,)) for number in (10, 20)]
    stored = _stored_by(lambda found: ledger.write_plan(found, planned, key_id, bounds, 5), "kms_rekeys")
    connection = create_engine("sqlite://").connect()
    _untyped(connection, TABLES.rekeys)

    def run(data: bytes) -> None:
        _insert(connection, TABLES.rekeys, _changed(stored, data))
        connection.commit()
        for one in ledger.progress(connection):
            _told(one, label=str, key_id=str, rows_total=int, rows_seen=int, rekeyed=int, shards=int, unfinished=int)
        shards = ledger.planned_shards(connection, [planned], key_id)
        ledger.unfinished_shards(connection, [planned], key_id)
        for _ in stored:
            claimed = ledger.claim(connection, "worker", shards)
            if claimed is None:
                return
            for bound in (claimed.shard.lower, claimed.shard.upper, claimed.position):
                if bound is not None:
                    keys.from_text(bound)
            ledger.advance(connection, claimed, bounds[0], ledger.Counts(rekeyed=1))
            ledger.finish(connection, claimed)
        # As many as there were to begin with, and each can be had but once.
        assert ledger.claim(connection, "worker", shards) is None

    return run


def _range_keys() -> list[tuple[Any, tuple[Any, ...]]]:
    """Return primary keys of several types, each with a value."""
    from datetime import UTC, date, datetime
    from decimal import Decimal
    from uuid import UUID

    from sqlalchemy import Boolean, Date, DateTime, Integer, LargeBinary, Numeric, String, Uuid, column

    from sqlalchemy_kravn_crypto.key_ranges import KeyColumns

    kinds: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = [
        ((Integer(),), (-17,)),
        ((Integer(), String()), (2**80, "é")),
        ((DateTime(), Uuid()), (datetime(2024, 2, 29, 1, 2, 3, 4), UUID(int=7))),  # noqa: DTZ001 - of a column without a zone
        ((DateTime(timezone=True),), (datetime(2024, 2, 29, tzinfo=UTC),)),
        ((Date(), Boolean()), (date(2024, 2, 29), True)),
        ((Numeric(9, 2), LargeBinary()), (Decimal("-1.50"), b"\0")),
    ]
    made = []
    for types, key in kinds:
        columns: list[Any] = [column(f"c{number}", type_) for number, type_ in enumerate(types)]
        made.append((KeyColumns(columns, "note", "sqlite"), key))
    return made


def _range_seeds() -> list[bytes]:
    return [bytes([number]) + keys.to_text(key).encode() for number, (keys, key) in enumerate(_range_keys())]


@target(allowed=(errors.MalformedRowError,), seeds=_range_seeds, mutator=json_behind(1), share=2)
def key_range_texts() -> Run:
    """A bound of a shard, which gives the same key again."""
    made = [keys for keys, _ in _range_keys()]

    def run(data: bytes) -> None:
        one = made[data[0] % len(made)] if data else made[0]
        key = one.from_text(data[1:].decode(errors="replace"))
        assert one.from_text(one.to_text(key)) == key

    return run
