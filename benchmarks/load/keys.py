"""What an operator does to the data keys while others write and read."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import Engine

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.changes import Operator
from sqlalchemy_kravn_crypto.configuration import operator
from sqlalchemy_kravn_crypto.lifecycle import disable, promote, rekey_values, rotate
from sqlalchemy_kravn_crypto.replicas import live_replicas
from sqlalchemy_kravn_crypto.settings import Settings

_POLL = 0.2  # seconds between looks at what others do


class Keys:
    """The data keys, one after the other.

    :param seconds: for how long to wait for others at most.
    :ivar primary: the key id of the primary.
    :ivar retired: the key ids of those that were the primary, oldest first.
    :ivar rekeyed: how many values were re-encrypted.
    :ivar repeated: how often a rekey had to be run again, since a value came under a retired key after it.
    """

    def __init__(self, engine: Engine, settings: Settings, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._engine = engine
        self.operator: Operator = operator(engine, settings)
        self.keyring = self.operator.store.open(engine).keyring
        self.primary = self.keyring.primary_key_id
        self.retired: list[str] = []
        self.rekeyed = self.repeated = 0

    def replace(self) -> None:
        """Make another data key the primary, and move every value to it."""
        made = rotate(self.operator)
        assert made is not None  # noqa: S101 - it is none in a dry run only
        self._wait("every process holds the new data key", self._promote)
        self.retired.append(self.primary)
        self.primary = made.required("key_id")
        self._wait("every process encrypts under the new data key", lambda: not self._is_behind())
        self._rekey()

    def disable_retired(self) -> None:
        """Disable every data key that was the primary, and wait until no process holds one of them."""
        left = list(self.retired)
        while left:
            left = [key_id for key_id in left if not self._disable(key_id)]
            time.sleep(_POLL)
            self._check_time("the retired data keys are disabled")
        self._wait("no process holds a disabled data key", lambda: not self._is_holding())

    def _promote(self) -> bool:
        try:
            promote(self.operator)
        except (errors.ReplicasBehindError, errors.KeyStoreLockedError):
            return False
        return True

    def _is_behind(self) -> bool:
        with self._engine.connect() as connection:
            return any(replica.primary_key_id != self.primary for replica in live_replicas(connection))

    def _is_holding(self) -> bool:
        with self._engine.connect() as connection:
            return any(replica.key_ids.intersection(self.retired) for replica in live_replicas(connection))

    def _rekey(self) -> None:
        self._wait("no value is left under another data key", self._is_rekeyed)

    def _is_rekeyed(self) -> bool:
        result = rekey_values(self.operator)
        if result.unreadable:
            raise errors.DecryptionError(f"{len(result.unreadable)} values cannot be read")
        self.rekeyed += result.counts.rekeyed
        return result.is_complete

    def _disable(self, key_id: str) -> bool:
        """Disable a data key if that can be done by now; the first of the two counts is made as soon as it may be."""
        try:
            disable(self.operator, key_id, wait=False)
        except (errors.TooEarlyError, errors.ReplicasBehindError):
            return False
        except errors.KeyInUseError:
            self.repeated += 1
            self._rekey()
            return False
        return True

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        while not condition():
            self._check_time(what)
            time.sleep(_POLL)

    def _check_time(self, what: str) -> None:
        if time.monotonic() > self._until:
            raise TimeoutError(f"not in time: {what}")
