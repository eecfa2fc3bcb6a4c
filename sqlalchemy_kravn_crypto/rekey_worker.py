"""One worker of a rekey: it takes shards by lease, re-encrypts their stale values in batches, and keeps the pace."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from .ciphertext import ColumnName, to_text
from .clock import Clock
from .columns import BINARY, TEXT, frame_of
from .context import keyring_to_write
from .exceptions import DecryptionError, OutdatedKeyringError
from .key_ranges import Key
from .keyring import Keyring
from .known_columns import KnownColumn, located
from .ledger import Claim, Counts, Shard, advance, are_unfinished, claim, finish, release
from .row_identity import identity_of
from .stale_values import StaleValues

MOST_UNREADABLE: Final = 1000
"""How many values that do not decrypt are named; all are counted."""

_POLL: Final = 0.1  # seconds between looks at what other workers have finished
_PASSES: Final = 3  # through a shard, while rows are locked or change; what is left then is counted by the caller

OnProgress = Callable[[Shard, Counts], None]
"""Called after every batch with what became of it."""


@dataclass(frozen=True, slots=True)
class UnreadableValue:
    """A value that does not decrypt.

    :ivar key: the values of the primary key of its row.
    :ivar error: the name of the type of the error.
    """

    column: str
    key: tuple[Any, ...]
    error: str

    def as_dict(self) -> dict[str, Any]:
        """Return the same for JSON."""
        return {"column": self.column, "key": [str(value) for value in self.key], "error": self.error}


class Done(NamedTuple):
    """What became of values."""

    counts: Counts
    unreadable: tuple[UnreadableValue, ...]


class Pace:
    """How fast a worker goes, and in which steps.

    :param max_rows_per_second: at least 1; ``None`` for as fast as it can.
    :raises ValueError: if one of the numbers is less than 1.
    """

    def __init__(
        self, batch_size: int, max_rows_per_second: float | None, clock: Clock, sleep: Callable[[float], None]
    ) -> None:
        if batch_size < 1 or (max_rows_per_second is not None and max_rows_per_second < 1):
            raise ValueError("batch_size and max_rows_per_second are at least 1")
        self._rate = max_rows_per_second
        # At most a second's worth, so that a lease is extended long before it is over.
        self.batch_size = batch_size if self._rate is None else min(batch_size, math.ceil(self._rate))
        self.sleep = sleep
        self._clock = clock
        self._due = clock()

    def keep(self, rows: int) -> None:
        """Wait until the next batch may begin, after one of so many rows."""
        if self._rate is None:
            return
        now = self._clock()
        # What went slowly before is not made up for.
        self._due = max(self._due + rows / self._rate, now)
        if self._due > now:
            self.sleep(self._due - now)


class Worker:
    """What does shards, over one connection.

    :param keyring: ``None`` for that of the process, whichever it is with every batch.
    """

    def __init__(
        self, connection: Connection, keyring: Keyring | None, pace: Pace, on_progress: OnProgress | None
    ) -> None:
        self.connection = connection
        self._given = keyring
        self._pace = pace
        self._on_progress = on_progress
        self._id = str(uuid.uuid4())
        self._last: tuple[Keyring, KnownColumn, Callable[[bytes], bytes]] | None = None

    def keyring(self) -> Keyring:
        """Return the keyring.

        :raises LeaseExpiredError: if that of the process may not encrypt now.
        """
        return self._given or keyring_to_write()

    def values_of(self, shard: Shard) -> StaleValues:
        """Return the stale values of a shard."""
        found = located(self.connection, shard.column)
        return StaleValues(found, shard.key_id, self.connection.dialect.name, lower=shard.lower, upper=shard.upper)

    def work(self, shards: Sequence[Shard]) -> Done:
        """Do all shards that are to be had, and wait for those that others are at, or take them over."""
        counts, unreadable = Counts(), list[UnreadableValue]()
        while True:
            claimed = claim(self.connection, self._id, shards)
            if claimed is not None:
                done = self._do(claimed)
                counts += done.counts
                unreadable = [*unreadable, *done.unreadable][:MOST_UNREADABLE]
                continue
            others_are_at_it = are_unfinished(self.connection, shards)
            self.connection.rollback()
            if not others_are_at_it:
                return Done(counts, tuple(unreadable))
            self._pace.sleep(_POLL)

    # --- A shard -----------------------------------------------------------------------------------------------------

    def _do(self, claimed: Claim) -> Done:
        """Do one shard, for as long as this worker has it."""
        try:
            return self._do_while_claimed(claimed)
        except BaseException:
            self.connection.rollback()
            release(self.connection, claimed)
            raise

    def _do_while_claimed(self, claimed: Claim) -> Done:
        values = self.values_of(claimed.shard)
        position = claimed.position
        counts = Counts()
        for passes_left in reversed(range(_PASSES)):
            done, has_it = self._pass(claimed, values, None if position is None else values.keys.from_text(position))
            # What does not decrypt was counted by the pass before, too.
            counts = Counts(counts.rekeyed, counts.conflicts) + done.counts
            if not has_it:
                break
            if not (passes_left and done.counts.conflicts and done.counts.rekeyed):
                finish(self.connection, claimed)
                break
            # Who was faster or had a row locked may be done by now, so from the beginning.
            position = None
            advance(self.connection, claimed, position, Counts())
            self.connection.commit()
        return Done(counts, done.unreadable)

    def _pass(self, claimed: Claim, values: StaleValues, after: Key | None) -> tuple[Done, bool]:
        """Go through what is left of the shard once; tell what became of it, and whether this worker still has it."""
        counts, unreadable = Counts(), list[UnreadableValue]()
        while True:
            batch = self._batch(claimed, values, after)
            if batch is None:
                return Done(counts, tuple(unreadable)), True
            if not batch.is_entered:
                return Done(counts, tuple(unreadable)), False
            after = batch.last
            counts += batch.counts
            unreadable += batch.unreadable[: MOST_UNREADABLE - len(unreadable)]
            if self._on_progress is not None:
                self._on_progress(claimed.shard, batch.counts)
            self._pace.keep(batch.counts.seen)

    # --- A batch -----------------------------------------------------------------------------------------------------

    def _batch(self, claimed: Claim, values: StaleValues, after: Key | None) -> _Batch | None:
        """Read a batch, and replace its values in a transaction that also enters it in the ledger.

        No transaction is open, and no row locked, while values are encrypted: a worker that is stopped then is in
        nobody's way.
        """
        rows = values.read(self.connection, after, self._pace.batch_size)
        self.connection.rollback()
        if not rows:
            return None
        width = len(values.keys.columns)
        fields = list(zip(*rows, strict=True))
        keys: list[Key] = list(zip(*fields[:width], strict=True))
        last = keys[-1]
        before, new, errors = self._reencrypted(
            claimed.shard, fields[width], list(zip(*fields[width + 1 :], strict=True))
        )
        label = claimed.shard.column.label
        unreadable = [UnreadableValue(label, keys[place], error) for place, error in errors.items()]
        if errors:
            keys = [key for place, key in enumerate(keys) if place not in errors]
        replaced = values.replace(self.connection, keys, before, new)
        counts = Counts(replaced, len(keys) - replaced, len(unreadable))
        is_entered = advance(self.connection, claimed, values.keys.to_text(last), counts)
        if is_entered:
            self.connection.commit()
        else:
            self.connection.rollback()
        return _Batch(last, counts, unreadable, is_entered)

    def _reencrypted(
        self, shard: Shard, stored: Sequence[Any], identities: Sequence[tuple[str, ...]]
    ) -> tuple[Sequence[Any], list[Any], dict[int, str]]:
        """Return the values that decrypt, their new values, and by their places the errors of those that do not.

        :param identities: what identifies the row of each, if they are bound to their rows.
        """
        keyring, reencrypt = self._reencryptor(shard)
        column, storage, label = shard.column, shard.column.storage, shard.column.label

        def of_row(texts: tuple[str, ...]) -> Callable[[bytes], bytes]:
            row = identity_of(texts)
            return keyring.reencryptor(
                ColumnName(column.name, row), [ColumnName(name, row) for name in column.earlier_names]
            )

        def renewed(place: int) -> Any:
            frame = frame_of(stored[place], storage, label)
            new = of_row(identities[place])(frame) if identities else reencrypt(frame)
            return to_text(new) if storage == TEXT else new

        try:
            # Nearly always all are frames already: the way of a value is then no longer than it must be.
            if storage == BINARY and not identities and set(map(type, stored)) == {bytes}:
                return stored, [reencrypt(one) for one in stored], {}
            return stored, [renewed(place) for place in range(len(stored))], {}
        except DecryptionError:
            pass
        before, after, errors = list[Any](), list[Any](), dict[int, str]()
        for place, one in enumerate(stored):
            try:
                after.append(renewed(place))
            except DecryptionError as error:
                errors[place] = type(error).__name__
            else:
                before.append(one)
        return before, after, errors

    def _reencryptor(self, shard: Shard) -> tuple[Keyring, Callable[[bytes], bytes]]:
        keyring = self.keyring()
        if keyring.primary_key_id != shard.key_id:
            raise OutdatedKeyringError(
                f"The values of {shard.column.label} are to be moved to data key {shard.key_id}, but the primary of "
                f"this process is {keyring.primary_key_id}. Another key was promoted, or this process does not know "
                "yet; plan again in a process that holds the newest."
            )
        if self._last is None or self._last[:2] != (keyring, shard.column):
            earlier = map(ColumnName, shard.column.earlier_names)
            self._last = keyring, shard.column, keyring.reencryptor(ColumnName(shard.column.name), earlier)
        return keyring, self._last[2]


class _Batch(NamedTuple):
    """What became of a batch.

    :ivar last: the primary key of its last row.
    :ivar is_entered: whether the worker still had the shard; if not, nothing was changed.
    """

    last: Key
    counts: Counts
    unreadable: list[UnreadableValue]
    is_entered: bool
