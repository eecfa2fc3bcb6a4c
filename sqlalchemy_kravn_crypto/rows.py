"""The rows of ``kms_keys``: reading and writing them, what authenticates them, and the lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Any, Final

from cryptography.hazmat.primitives.constant_time import bytes_eq
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from sqlalchemy import Connection, Engine, Select, insert, inspect, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from .base64_text import from_base64, to_base64
from .clock import database_now
from .derivation import KEY_ID_SIZE, key_id_of, length_prefixed
from .exceptions import (
    KeyStoreError,
    KeyStoreLockedError,
    MalformedRowError,
    RowAuthenticationError,
    TableMissingError,
    UnsupportedDatabaseError,
)
from .schema import CONTROL_ROW_ID, TABLES, State
from .secrecy import KeepsSecret

KEYRING: Final = "default"
"""The name of the one keyring of a process."""

_KEYS: Final = TABLES.keys
_NULL: Final = b"\xff\xff\xff\xff"  # no length that LP can write, so NULL is not mistaken for an empty string

# How each driver says that a lock was not to be had in time: SQLSTATE 55P03, SQLITE_BUSY, ER_LOCK_WAIT_TIMEOUT.
_POSTGRESQL_LOCK_NOT_AVAILABLE: Final = "55P03"
_SQLITE_BUSY: Final = 5
_MYSQL_LOCK_WAIT_TIMEOUT: Final = 1205

_NOT_UTF8: Final = "Could not decode to UTF-8"
"""How Python's driver for SQLite says it, with the text behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRow:
    """One row of ``kms_keys``; the fields are its columns, in their order."""

    id: int
    keyring: str | None = None
    key_id: str | None = None
    state: State
    primary_of: str | None = None
    epoch: int | None = None
    deployment_id: str | None = None
    provider: str | None = None
    master_key: str | None = None
    wrapped_key: str | None = field(default=None, repr=False)
    standby_provider: str | None = None
    standby_master_key: str | None = None
    standby_wrapped_key: str | None = field(default=None, repr=False)
    key_check: str | None = field(default=None, repr=False)
    closing: str | None = None
    row_mac: str | None = field(default=None, repr=False)
    created_at: datetime | None = None
    updated_at: datetime | None = None
    events_hash: str | None = None

    def in_state(self, state: State) -> KeyRow:
        """Return this key's row in another state."""
        return replace(self, state=state, primary_of=self.keyring if state is State.PRIMARY else None)

    def required(self, column: str) -> str:
        """Return the text of a column that must not be NULL in this row.

        :raises MalformedRowError: if it is.
        """
        value = getattr(self, column)
        if not isinstance(value, str) or not value:
            raise MalformedRowError(f"Row {self.id} of kms_keys has no {column}. Restore the table from a backup.")
        return value

    def decoded(self, column: str) -> bytes:
        """Return the bytes of a base64 column that must not be NULL in this row.

        :raises MalformedRowError: if it is, or is not canonical base64.
        """
        decoded = from_base64(self.required(column))
        if not decoded:
            raise MalformedRowError(
                f"Row {self.id} of kms_keys has a {column} that is not canonical base64. Restore the table from a "
                "backup."
            )
        return decoded


# The row MAC covers these with every row. What came after the first migration is covered where it is not NULL.
_ADDED: Final = ("events_hash",)
_AUTHENTICATED: Final = tuple(
    row_field.name
    for row_field in fields(KeyRow)
    if row_field.name not in {"row_mac", "created_at", "updated_at", *_ADDED}
)


@dataclass(frozen=True, slots=True)
class StoredRows:
    """What ``kms_keys`` holds."""

    control: KeyRow | None
    keys: tuple[KeyRow, ...]

    def in_control(self) -> KeyRow:
        """Return the control row.

        :raises MalformedRowError: if there is none.
        """
        if self.control is None:
            raise MalformedRowError("kms_keys has no control row. Restore the table from a backup.")
        return self.control

    @property
    def epoch(self) -> int:
        """How often the key store was changed; 0 while it is empty."""
        return 0 if self.control is None else self.control.epoch or 0

    def key(self, key_id: str) -> KeyRow | None:
        """Return the row of a data key."""
        return next((row for row in self.keys if row.key_id == key_id), None)

    def in_state(self, state: State) -> KeyRow | None:
        """Return the first key in a state; at most one is primary, and at most one pending."""
        return next((row for row in self.keys if row.state is state), None)

    def with_key(self, changed: KeyRow) -> StoredRows:
        """Return the rows with one of them replaced, or added."""
        kept = tuple(changed if row.id == changed.id else row for row in self.keys)
        return replace(self, keys=kept if changed in kept else (*kept, changed))

    def next_id(self) -> int:
        """Return the id of the next row to add."""
        return max((row.id for row in self.keys), default=CONTROL_ROW_ID) + 1


# --- What authenticates them ----------------------------------------------------------------------------------------


class MacKey(KeepsSecret):
    """The key of the row MACs; cannot be printed.

    A row's MAC is ``MAC-key id || HMAC-SHA256`` over the LP of every column but itself and the timestamps; NULL is four
    bytes 0xFF. Of a column that a later migration added, the LP of its name and of its value are appended where it is
    not NULL. The control row's also covers the MACs of all other rows, so that none can be left out or put back.
    """

    __slots__ = ("_key", "key_id")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.key_id = key_id_of(key)

    def sign(self, rows: StoredRows) -> StoredRows:
        """Return the rows with their MACs."""
        keys = tuple(replace(row, row_mac=self._mac(row)) for row in rows.keys)
        control = None if rows.control is None else replace(rows.control, row_mac=self._mac(rows.control, keys))
        return StoredRows(control, keys)

    def signed(self, row: KeyRow) -> bool:
        """Tell whether a row's MAC claims to be made with this key."""
        return row.row_mac is not None and row.decoded("row_mac")[:KEY_ID_SIZE] == self.key_id

    def verify(self, rows: StoredRows) -> None:
        """Check every row.

        :raises RowAuthenticationError: if one was not written with this key, or one is missing or too many.
        """
        signed = self.sign(rows)
        for row, expected in zip((*rows.keys, rows.control), (*signed.keys, signed.control), strict=True):
            if row is None or expected is None:
                continue
            if not bytes_eq((row.row_mac or "").encode(), (expected.row_mac or "").encode()):
                raise self._refused(row)

    def _refused(self, row: KeyRow) -> RowAuthenticationError:
        if not self.signed(row):
            return RowAuthenticationError(
                f"Row {row.id} of kms_keys is not authenticated with the key that this process has. Set the "
                "KRAVN_SECRET (or bring the secret.key) that the key store was made with, or that `kravn-crypto "
                "rotate-secret` brought in."
            )
        return RowAuthenticationError(
            f"Row {row.id} of kms_keys was altered, or rows were removed or added, by somebody who does not hold the "
            "MAC key. Find out who writes to the table, and restore it from a backup."
        )

    def _mac(self, row: KeyRow, covered: Sequence[KeyRow] = ()) -> str:
        hmac = HMAC(self._key, SHA256())
        for name in _AUTHENTICATED:
            hmac.update(_lp(getattr(row, name)))
        for name in _ADDED:
            if getattr(row, name) is not None:
                hmac.update(_lp(name) + _lp(getattr(row, name)))
        for other in covered:
            hmac.update(_lp(other.row_mac))
        return to_base64(self.key_id + hmac.finalize())

    def __repr__(self) -> str:
        return f"<MacKey {self.key_id.hex()}>"


def _lp(value: object) -> bytes:
    return _NULL if value is None else length_prefixed(str(value).encode())


# --- Reading and writing them ---------------------------------------------------------------------------------------


OWN_TABLES: Final = {"schema_translate_map": None, "stream_results": False, "yield_per": None}
"""Execution options of our own statements, whatever the user's connection is set to: no ``schema_translate_map`` moves
their tables, and they go through no cursor of the server, which PostgreSQL declares for queries only."""


@contextmanager
def connect(engine: Engine) -> Iterator[Connection]:
    """Connect for statements on our own tables, which no ``schema_translate_map`` moves."""
    with engine.connect() as connection:
        yield connection.execution_options(**OWN_TABLES)


def fetch_all(connection: Connection, statement: Select[Any], malformed: Callable[[], KeyStoreError]) -> list[Any]:
    """Return all rows of a statement about our own tables.

    :param malformed: returns what to raise if SQLite has text there that is no UTF-8, which its driver gives to nobody.
    """
    try:
        return list(connection.execute(statement, execution_options=OWN_TABLES))
    except OperationalError as error:
        if _NOT_UTF8 not in str(error.orig):
            raise
    raise malformed()


def read_rows(connection: Connection) -> StoredRows:
    """Read all rows, in one query.

    :raises TableMissingError: if there is no ``kms_keys``.
    :raises MalformedRowError: if a row is not one that this library writes.
    """
    outdated = False
    try:
        return select_rows(connection)
    except DBAPIError:
        connection.rollback()
        found = inspect(connection)
        if found.has_table(_KEYS.name):
            present = {column["name"] for column in found.get_columns(_KEYS.name)}
            outdated = not present.issuperset(_KEYS.columns.keys())
            if not outdated:
                raise
    if outdated:
        raise TableMissingError(
            "The table kms_keys is that of an earlier release. Bring it up to date with `kravn-crypto migrate --url "
            "URL`, or with your own migrations where kms_tables(metadata) has it."
        )
    raise TableMissingError(
        "The database has no table kms_keys. Create it with `kravn-crypto migrate --url URL`, or call "
        "kms_tables(metadata) where your models are and migrate as usual."
    )


def select_rows(connection: Connection) -> StoredRows:
    """Read all rows within whatever transaction there is; a database error is left as it is.

    :raises MalformedRowError: if a row is not one that this library writes.
    """
    try:
        found = fetch_all(connection, select(_KEYS).order_by(_KEYS.c.id), _no_text)
    except (TypeError, ValueError):  # on SQLite a time may be anything
        found = None
    if found is None:
        raise MalformedRowError("A time in kms_keys is none. Restore the table from a backup.")
    rows = tuple(_key_row(row._asdict()) for row in found)
    controls = [row for row in rows if row.id == CONTROL_ROW_ID]
    keys = tuple(row for row in rows if row.id != CONTROL_ROW_ID)
    if keys and not controls:
        raise MalformedRowError("kms_keys has keys but no control row. Restore the table from a backup.")
    # No MAC is needed to see this, and where key ids are pinned instead there is none.
    if len(controls) > 1 or sum(row.state is State.PRIMARY for row in keys) > 1:
        raise MalformedRowError(
            "kms_keys has two control rows or two primaries, which its constraints do not allow: somebody has dropped "
            "them. Find out who changes the table, and restore it from a backup."
        )
    return StoredRows(controls[0] if controls else None, keys)


def _no_text() -> MalformedRowError:
    return MalformedRowError("A text in kms_keys is none. Restore the table from a backup.")


def _key_row(values: dict[str, Any]) -> KeyRow:
    if not isinstance(values["id"], int):  # SQLite keeps any value in any column
        raise MalformedRowError("A row of kms_keys has an id that is no number. Restore the table from a backup.")
    if values["state"] not in tuple(State):
        raise MalformedRowError(
            f"Row {values['id']} of kms_keys is in a state that this release does not know. Upgrade to the release "
            "that wrote it, or restore the table from a backup."
        )
    if not isinstance(values["epoch"], int | None):  # the same
        raise MalformedRowError(
            f"Row {values['id']} of kms_keys has an epoch that is no number. Restore the table from a backup."
        )
    if not isinstance(values["row_mac"], str | None):  # the same
        raise MalformedRowError(
            f"Row {values['id']} of kms_keys has a row_mac that is no text. Restore the table from a backup."
        )
    return KeyRow(**(values | {"state": State(values["state"])}))


def write_rows(connection: Connection, before: StoredRows, after: StoredRows) -> None:
    """Bring the table from one set of rows to another; the caller holds the lock.

    Rows that leave the state ``primary`` are written first, since at most one row may be in it.
    """
    known = {row.id: row for row in (before.control, *before.keys) if row is not None}
    changed = [row for row in (after.control, *after.keys) if row is not None and row != known.get(row.id)]
    for row in sorted(changed, key=lambda row: (row.state is State.PRIMARY, row.id)):
        values: dict[str, Any] = {name: getattr(row, name) for name in (*_AUTHENTICATED, "row_mac", *_ADDED)}
        values["updated_at"] = database_now()
        if row.id in known:
            statement: Any = update(_KEYS).where(_KEYS.c.id == row.id).values(values)
        else:
            statement = insert(_KEYS).values(values | {"created_at": database_now()})
        connection.execute(statement, execution_options=OWN_TABLES)


# --- The lock -------------------------------------------------------------------------------------------------------


@contextmanager
def locked(engine: Engine, deployment_id: str, wait: float) -> Iterator[Connection]:
    """Hold the lock on the key store for one transaction, which the caller commits.

    The lock is the control row. Who finds the table empty inserts it; of several who do, the others wait for the first.

    :param deployment_id: what a new control row records.
    :param wait: bound on the wait for the lock, in seconds.
    :raises KeyStoreLockedError: if the wait is over.
    :raises TableMissingError: if there is no ``kms_keys``.
    :raises UnsupportedDatabaseError: if it is not known how this database locks a row.
    """
    with connect(engine) as connection:
        read_rows(connection)
        connection.rollback()
        take_lock(connection, deployment_id, wait)
        yield connection


def take_lock(connection: Connection, deployment_id: str, wait: float, *, keep_isolation: bool = False) -> None:
    """Take the lock for the transaction of a connection that begins here; see :func:`locked`.

    :param keep_isolation: leave the isolation level as it is. In a stricter one than READ COMMITTED, whoever waited for
        the lock cannot see what its holder wrote, or fails.
    """
    dialect = connection.dialect.name
    take = _LOCKS.get(dialect)
    if take is None:
        raise UnsupportedDatabaseError(
            f"The key store cannot live on {dialect}: this release knows how to lock a row on "
            f"{', '.join(sorted(_LOCKS))}."
        )
    if not keep_isolation and dialect != "sqlite":
        connection.execution_options(isolation_level="READ COMMITTED")
    within_lock_timeout(
        lambda: take(connection, deployment_id, wait),
        f"Another process has held the lock on kms_keys for more than {wait:g} seconds. It may be waiting for its KMS; "
        "try again once it is done.",
    )


def within_lock_timeout(action: Callable[[], None], message: str) -> None:
    """Do what waits for a row, for as long as the lock was waited for at most.

    :raises KeyStoreLockedError: with the message, if the wait is over.
    """
    try:
        return action()
    except DBAPIError as error:
        if not _is_lock_timeout(error):
            raise
    raise KeyStoreLockedError(message)


_MAKE_DURABLE: Final = (
    "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'"
)


def _lock_postgresql(connection: Connection, deployment_id: str, wait: float) -> None:
    connection.execute(text("SELECT set_config('lock_timeout', :wait, true)"), {"wait": f"{int(wait * 1000)}ms"})
    # Whoever has a key goes on to encrypt under it, so no crash of the database may take its row away again.
    connection.execute(text(_MAKE_DURABLE))
    _lock_control_row(connection, deployment_id)


def _lock_mysql(connection: Connection, deployment_id: str, wait: float) -> None:
    before = connection.execute(text("SELECT @@SESSION.innodb_lock_wait_timeout")).scalar_one()
    connection.execute(text("SET SESSION innodb_lock_wait_timeout = :wait"), {"wait": max(1, int(wait))})
    try:
        _lock_control_row(connection, deployment_id)
    finally:
        if not connection.invalidated:  # by an interrupt, which must not become another error
            connection.execute(text("SET SESSION innodb_lock_wait_timeout = :wait"), {"wait": before})


def _lock_control_row(connection: Connection, deployment_id: str) -> None:
    lock = select(_KEYS.c.id).where(_KEYS.c.id == CONTROL_ROW_ID).with_for_update()
    if connection.execute(lock).first() is None:
        try:
            with connection.begin_nested():
                _insert_control_row(connection, deployment_id)
        except IntegrityError:
            connection.execute(lock).one()


def _lock_sqlite(connection: Connection, deployment_id: str, wait: float) -> None:
    before = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
    connection.rollback()
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(wait * 1000)}")
    try:
        driver_connection = connection.connection.driver_connection
        if driver_connection is not None and driver_connection.in_transaction:
            # A listener of the application has begun one: a write as its first statement takes the same lock.
            connection.exec_driver_sql("UPDATE kms_keys SET epoch = epoch WHERE id = 1")
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        if not connection.invalidated:  # by an interrupt, which must not become another error
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {before}")
    if connection.execute(select(_KEYS.c.id).where(_KEYS.c.id == CONTROL_ROW_ID)).first() is None:
        _insert_control_row(connection, deployment_id)


def _insert_control_row(connection: Connection, deployment_id: str) -> None:
    row = {"id": CONTROL_ROW_ID, "state": State.CONTROL.value, "epoch": 0, "deployment_id": deployment_id}
    connection.execute(insert(_KEYS).values(row))


_LOCKS: Final = {
    "postgresql": _lock_postgresql,
    "sqlite": _lock_sqlite,
    "mysql": _lock_mysql,
    "mariadb": _lock_mysql,
}


def _is_lock_timeout(error: DBAPIError) -> bool:
    orig: Any = error.orig
    state = getattr(orig, "sqlstate", None) or getattr(orig, "pgcode", None)
    sqlite_code = getattr(orig, "sqlite_errorcode", None)
    mysql_code = next(iter(getattr(orig, "args", ())), None)
    return (
        state == _POSTGRESQL_LOCK_NOT_AVAILABLE
        # The low byte is the primary code; the rest tells kinds of it apart.
        or (isinstance(sqlite_code, int) and sqlite_code & 0xFF == _SQLITE_BUSY)
        or mysql_code == _MYSQL_LOCK_WAIT_TIMEOUT
    )
