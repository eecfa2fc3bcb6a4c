"""How a running process follows the key store: it looks, says that it lives, takes in new keys, and keeps its lease.

All that happens in events of the engine, on the connection that is about to be used: there is no thread to die, and
nothing to start again after ``fork``.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import Connection, Table, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql.compiler import Compiled, SQLCompiler

from .changes import changing_on
from .clock import Clock, process_clock
from .columns import is_registered
from .context import end_lease, extend_lease, publish, replace_keyring
from .drivers import blocking_for, is_autocommit, is_idle, waiting_briefly
from .exceptions import KravnCryptoError, LeaseExpiredError, UnsupportedOperationError
from .keyring import Keyring
from .keystore import NO_PROVIDER, KeyStore, Opened
from .known_columns import KnownColumn, declared, record
from .promotion import held_by_all, promote_pending, replicas_without
from .replicas import beat, forget_dead, leave, new_replica_id
from .rows import KEYRING, OWN_TABLES, select_rows
from .schema import CONTROL_ROW_ID, TABLES, State
from .secrecy import KeepsSecret
from .types import EncryptedType

logger = logging.getLogger(__name__)

_KEYS: Final = TABLES.keys

_EPOCH: Final = select(_KEYS.c.epoch).where(_KEYS.c.id == CONTROL_ROW_ID)
_TOUCH: Final = update(_KEYS).where(_KEYS.c.id == CONTROL_ROW_ID).values(epoch=_KEYS.c.epoch)
_SUCCESSOR: Final = select(_KEYS.c.key_id).where(_KEYS.c.state == State.PENDING, _KEYS.c.closing.is_not(None))
_LOCKED_PRIMARY: Final = select(_KEYS.c.key_id).where(_KEYS.c.primary_of == KEYRING).with_for_update(read=True)

_AFTER_UNKNOWN_KEY: Final = 1.0
"""How many seconds after a look a value under an unknown data key can bring about the next one."""

_RETRY: Final = 60.0
"""How many seconds after the KMS did not unwrap a pending key it is asked again."""

_BRIEFLY: Final = 200
"""How many milliseconds the beginning of a transaction waits for SQLite's lock to leave a heartbeat."""

_REMEMBERED: Final = timedelta(days=1)
"""How long the heartbeat of a process that ended without a word is kept."""

_ATTEMPTS: Final = 3
"""How often the primary is asked for, when it changes while its row is waited for."""

_FENCED: Final = "kravn_crypto_fenced"
"""In ``Connection.info``: that the transaction in progress holds the lock on the primary."""

_LOOKED: Final = "kravn_crypto_looked"
"""In ``Connection.info``: that another look within this transaction would see nothing new, or is in progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """How a process follows the key store.

    :ivar interval: how many seconds after a look the next one is due.
    :ivar lease: for how many seconds after a look the process encrypts.
    :ivar fence: whether every writing transaction locks the primary, so that none commits a value under a retired key.
    :ivar may_promote: whether the process may make an adopted KMS's key the primary.
    """

    interval: float = 15.0
    lease: float = 180.0
    fence: bool = False
    may_promote: bool = True


class Watch(KeepsSecret):
    """One process's view of the key store.

    :param store: how it is opened.
    :param opened: what it held when it was opened.
    :param opened_at: when that was, by the clock.
    """

    def __init__(
        self,
        store: KeyStore,
        opened: Opened,
        settings: WatchSettings,
        *,
        opened_at: float | None = None,
        clock: Clock = process_clock,
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._opened = opened
        self._keyring = opened.keyring
        self._epoch = opened.rows.epoch
        self._recorded: set[KnownColumn] = set()
        self._said: set[str] = set()
        self._retry_at = -math.inf
        self._is_orphaned = False  # whether the primary is not on record, after a backup of the key store was restored
        self._looked_at = clock() if opened_at is None else opened_at
        self._begin_anew()
        publish(
            self._keyring,
            writable_until=self._looked_at + settings.lease,
            clock=clock,
            unknown_key=self._unknown_key,
        )

    def _begin_anew(self) -> None:
        """Be a process of one's own, at first and after ``fork``."""
        self._looking = threading.Lock()
        self._publishing = threading.Lock()
        self.replica_id = new_replica_id()
        self.has_beaten = False
        self._is_to_beat = True
        self._due = self._due_between = -math.inf
        self._taken_for_dead_at = math.inf

    def after_fork(self) -> None:
        """Be another process than the one that was forked."""
        self._begin_anew()

    # --- When it looks -----------------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether it is time to look."""
        return self._clock() >= self._due

    def _unknown_key(self) -> None:
        # However many values name keys that do not exist, there is one look a second, and none of them asks the KMS.
        self._due = min(self._due, self._looked_at + _AFTER_UNKNOWN_KEY)

    def begun(self, connection: Connection) -> None:
        """Look, at the beginning of a transaction."""
        connection.info.pop(_FENCED, None)
        connection.info[_LOOKED] = True
        # Looks within long transactions leave no heartbeat, and may see old snapshots, so they do not count here.
        if self.is_due or self._is_to_beat or self._clock() >= self._due_between:
            idle = is_idle(connection)
            if idle:
                self._single_flight(lambda: self._look_between_transactions(connection))
            else:
                self._warn_once(
                    "begin",
                    "no heartbeat is left and no column recorded on connections of %s: %s",
                    connection.dialect.driver,
                    "it is not known how to ask this driver for its state"
                    if idle is None
                    else "something else has begun a transaction before the engine did",
                )
                # An error here is met again by the statement that the transaction begins with.
                self._single_flight(lambda: self._look_quietly(connection))
        connection.info.pop(_LOOKED, None)

    def executing(self, connection: Connection, statement: Any) -> None:
        """Look, before values are encrypted for a statement; and lock the primary where there is a fence."""
        if self.is_due:
            if connection.in_transaction():
                self._single_flight(lambda: self._look_within_transaction(connection))
            else:
                # Begins the transaction, as the statement is about to, and with it looks.
                connection.exec_driver_sql("SELECT 1", execution_options=OWN_TABLES)
        if self._settings.fence and _may_write_ciphertext(statement):
            self._fence(connection)

    def sending(self, connection: Connection, compiled: Any) -> None:
        """Refuse a statement that holds encrypted values and was not seen to write any, where there is a fence.

        :raises UnsupportedOperationError: such as text() with a parameter of an encrypted type.
        """
        if not self._settings.fence or connection.info.get(_FENCED) or not isinstance(compiled, SQLCompiler):
            return
        if any(isinstance(parameter.type, EncryptedType) for parameter in compiled.binds.values()):
            raise UnsupportedOperationError(
                "With KRAVN_FENCE=transaction, encrypted values are written by insert() and update() of their table "
                "only; not by text(), nor by a common table expression of a SELECT."
            )

    def executed(self, connection: Connection, context: Any) -> None:
        """Look, before the values that a statement returned are decrypted.

        For a process that was stopped in between, the key may be new although the transaction is old.
        """
        # The rows of a server-side cursor are still on their way, and some drivers can ask nothing else meanwhile.
        if context is None or context.compiled is None or context._is_server_side:  # noqa: SLF001 - there is no public name
            return
        if context.cursor.description is not None and self._is_taken_for_dead(connection):
            # Not in single flight: with the keys that are there, values may not be readable before the look is over.
            self._look_within_transaction(connection)
        elif self.is_due:
            self._single_flight(lambda: self._look_within_transaction(connection))

    def _is_taken_for_dead(self, connection: Connection) -> bool:
        """Tell whether a key may have become primary that this process was not waited for to hold.

        In a transaction that is longer than the lease, since no heartbeat is left meanwhile; or after it was stopped.
        """
        return self._clock() >= self._taken_for_dead_at and not connection.info.get(_LOOKED)

    def _single_flight(self, look: Callable[[], None]) -> None:
        # Who comes while another looks goes on with the keys that are there; our own statements come here, too.
        if self._looking.acquire(blocking=False):
            try:
                self._due = self._clock() + self._settings.interval
                look()
            finally:
                self._looking.release()

    # --- A look ------------------------------------------------------------------------------------------------------

    def _look_between_transactions(self, connection: Connection) -> None:
        """Look, and leave a heartbeat, in transactions of our own before the one that is beginning."""
        self._due_between = self._clock() + self._settings.interval
        looked = self._apart(connection, "look", lambda: self._look(connection, is_fresh=True))
        if not looked:
            self._taken_for_dead_at = math.inf  # nor is it looked with every statement, which would fail for it
            return
        if self._keyring is not self._opened.keyring:
            self._publish(self._opened.rows.epoch, self._opened.keyring)
        self._is_to_beat = False
        with waiting_briefly(connection, _BRIEFLY):
            started = self._clock()
            if self._apart(connection, "heartbeat", lambda: self._beat(connection)):
                self.has_beaten, self._taken_for_dead_at = True, started + self._settings.lease
            new = [column for column in declared(None) if column not in self._recorded]
            if new and self._apart(connection, "columns", lambda: record(connection, new)):
                self._recorded.update(new)
            if self._is_to_adopt():
                self._apart(connection, "adoption", lambda: self._adopt(connection))

    def _apart(self, connection: Connection, what: str, action: Callable[[], None]) -> bool:
        """Do something in a transaction of its own; what fails is logged, and the user's transaction goes on."""
        failure = None
        try:
            action()
            connection.dialect.do_commit(connection.connection)
        except KravnCryptoError as error:
            failure = str(error)
        except SQLAlchemyError as error:
            failure = type(getattr(error, "orig", None) or error).__name__
        if failure is None:
            self._said.discard(what)
            return True
        if not connection.invalidated:  # else the next statement connects anew
            connection.dialect.do_rollback(connection.connection)
        self._warn_once(what, "%s of the key store failed and is tried again: %s", what, failure)
        return False

    def _look_within_transaction(self, connection: Connection) -> None:
        """Look, and nothing else; an error of the database is the transaction's own."""
        is_fresh = _sees_commits(connection)
        connection.info[_LOOKED] = True  # after an error, too: the KMS is not asked with every statement
        try:
            self._look(connection, is_fresh=is_fresh, keeps=True)
            connection.info[_LOOKED] = not is_fresh
        except KravnCryptoError as error:
            self._warn_once("look", "%s of the key store failed and is tried again: %s", "look", str(error))

    def _look_quietly(self, connection: Connection) -> None:
        failure = None
        try:
            self._look_within_transaction(connection)
        except SQLAlchemyError as error:
            failure = type(getattr(error, "orig", None) or error).__name__
        if failure is not None:
            self._warn_once("look", "%s of the key store failed and is tried again: %s", "look", failure)

    def _look(self, connection: Connection, *, is_fresh: bool, keeps: bool = False) -> None:
        """See whether the epoch is still the one that is known, and take in what has changed.

        :param is_fresh: whether what is seen is the newest; an old snapshot confirms nothing.
        :param keeps: whether keys that nobody loads any more are kept until the next look between transactions: what
            a statement of this transaction has returned may be under them, for a process that was stopped meanwhile.
        """
        known, started = self._opened, self._clock()
        self._looked_at = started
        epoch = connection.execute(_EPOCH, execution_options=OWN_TABLES).scalar()
        is_to_retry = known.missing and started >= self._retry_at
        self._is_orphaned = self._is_orphaned and epoch != known.rows.epoch
        if epoch != known.rows.epoch or is_to_retry:
            # Within a transaction also on SQLite, whose snapshot may be older than what another thread has seen.
            if (keeps or not is_fresh) and (epoch is None or epoch < known.rows.epoch):
                return
            rows = select_rows(connection)
            if not keeps:  # within a transaction, what is seen may be old
                self._is_orphaned = rows.key(self._keyring.primary_key_id) is None
            if self._is_orphaned:
                end_lease()  # nobody else could ever read what is encrypted from now on
            self._take_in(self._store.reopen(rows, known, blocking=blocking_for(connection)), keeps=keeps)
        if is_fresh:
            extend_lease(started + self._settings.lease)

    def _take_in(self, opened: Opened, *, keeps: bool) -> None:
        if opened.missing:
            self._retry_at = self._clock() + _RETRY
        with self._publishing:
            if opened.rows.epoch >= self._opened.rows.epoch:
                self._opened = opened
        self._publish(opened.rows.epoch, opened.keyring.keeping(self._keyring) if keeps else opened.keyring)

    def _publish(self, epoch: int, keyring: Keyring) -> None:
        """Make a keyring the process's, unless it already has one of a later epoch."""
        # What was taken in within a transaction is said at the beginning of the next.
        self._is_to_beat = True
        with self._publishing:
            if epoch < self._epoch:
                return
            if keyring.primary_key_id != self._keyring.primary_key_id:
                logger.info("encrypting under data key %s from now on", keyring.primary_key_id)
            self._epoch, self._keyring = epoch, keyring
            replace_keyring(keyring)

    def _beat(self, connection: Connection) -> None:
        if not self.has_beaten:
            forget_dead(connection, _REMEMBERED)
        beat(
            connection,
            self.replica_id,
            epoch=self._opened.rows.epoch,
            primary_key_id=self._keyring.primary_key_id,
            key_ids=self._keyring.key_ids,
            mac_key_ids=self._opened.mac_key_ids,
            lease=self._settings.lease,
        )

    def _warn_once(self, what: str, message: str, *arguments: object) -> None:
        """Log a warning when something begins to fail; while it goes on failing, it is not repeated."""
        logger.log(logging.DEBUG if what in self._said else logging.WARNING, message, *arguments)
        self._said.add(what)

    # --- Adoption ----------------------------------------------------------------------------------------------------

    def _is_to_adopt(self) -> bool:
        """Tell whether a KMS's first key waits for the processes that run without one."""
        rows = self._opened.rows
        pending, primary = rows.in_state(State.PENDING), rows.in_state(State.PRIMARY)
        return (
            self._settings.may_promote
            and self._store.provider is not None
            and pending is not None
            and primary is not None
            and primary.provider == NO_PROVIDER != pending.provider
        )

    def _adopt(self, connection: Connection) -> None:
        pending = self._opened.rows.in_state(State.PENDING)
        if pending is None or replicas_without(connection, pending.required("key_id")):
            return
        promote_pending(
            lambda: changing_on(connection, self._store, self._opened, blocking=blocking_for(connection)), held_by_all
        )
        self._look(connection, is_fresh=True)

    # --- The fence ---------------------------------------------------------------------------------------------------

    def _fence(self, connection: Connection) -> None:
        """Keep the primary from being retired until the transaction ends, and encrypt under it.

        :raises LeaseExpiredError: if this process does not hold the primary.
        :raises UnsupportedOperationError: if each statement is a transaction of its own.
        """
        if connection.info.get(_FENCED):
            return
        if is_autocommit(connection):
            raise _in_autocommit()
        started = self._clock()
        epoch, key_id = self._writers_key(connection)
        if key_id != self._keyring.primary_key_id:
            # Only rows that were verified say which key is the primary; what was just read was not.
            self._look_within_transaction(connection)
        # Of a later epoch than was read, whatever is the primary will do: all hold it, and it is not retired yet.
        if key_id != self._keyring.primary_key_id and (epoch >= self._epoch or self._is_orphaned):
            raise LeaseExpiredError(
                f"Nothing is encrypted: data key {key_id} is the primary, and this process does not hold it. Look in "
                "the log for why it could not be taken in; if there is nothing, begin a new transaction."
            )
        extend_lease(started + self._settings.lease)
        connection.info[_FENCED] = True

    def _writers_key(self, connection: Connection) -> tuple[int, str]:
        """Return the epoch and the key id that new values are under, with a lock that lasts until the transaction ends.

        While a primary is closing, that is its successor, and no lock is taken: nobody retires a key that is pending.
        """
        if connection.dialect.name == "sqlite":
            # It has one lock, which the statement is about to take anyway.
            connection.execute(_TOUCH, execution_options=OWN_TABLES)
            if is_idle(connection):  # its driver tells so only after the first statement that writes
                raise _in_autocommit()
        for _ in range(_ATTEMPTS):
            epoch = connection.execute(_EPOCH, execution_options=OWN_TABLES).scalar()
            successor = connection.execute(_SUCCESSOR, execution_options=OWN_TABLES).scalar()
            key_id = successor or connection.execute(_LOCKED_PRIMARY, execution_options=OWN_TABLES).scalar()
            if successor and connection.dialect.name == "postgresql":
                # Without a lock it would have no transaction id yet, and not be waited for if the next primary should
                # be retired and disabled before it has written.
                connection.exec_driver_sql("SELECT pg_current_xact_id()", execution_options=OWN_TABLES)
            # Who waited for a promotion finds that the row that was waited for is no longer the primary's.
            if epoch is not None and key_id is not None:
                return epoch, key_id
        raise LeaseExpiredError("Nothing is encrypted: no data key in kms_keys is primary. See `kravn-crypto status`.")

    @staticmethod
    def rolled_back_to_savepoint(connection: Connection) -> None:
        """Forget the lock on the primary, which went with the savepoint if it was taken after it."""
        connection.info.pop(_FENCED, None)

    # --- The end -----------------------------------------------------------------------------------------------------

    def leave(self, connection: Connection) -> None:
        """Take the heartbeat away; the caller commits."""
        leave(connection, self.replica_id)
        self.has_beaten = False


def _in_autocommit() -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "With KRAVN_FENCE=transaction, encrypted values are not written in AUTOCOMMIT: the lock on the primary would "
        "be gone before the values are there. Use a transaction."
    )


def _sees_commits(connection: Connection) -> bool:
    """Tell whether a statement within a transaction sees what others have committed since it began.

    On SQLite it may not, but there nobody commits while this transaction holds the lock on writing.
    """
    return connection.dialect.name == "sqlite" or connection.get_isolation_level() == "READ COMMITTED"


def _may_write_ciphertext(statement: Any) -> bool:
    if isinstance(statement, Compiled):
        statement = statement.statement
    if not getattr(statement, "is_dml", False):
        return False
    table = getattr(statement, "table", None)
    return not isinstance(table, Table) or any(map(is_registered, table.columns))
