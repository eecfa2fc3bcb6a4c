"""A pytest plugin for the tests of programs with encrypted columns. Nothing in here protects anything.

Opt in where the fixtures are wanted, in the top-level ``conftest.py``:

.. code-block:: python

    pytest_plugins = ["sqlalchemy_kravn_crypto.testing"]
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .boot import set_aside
from .context import publish
from .exceptions import ProviderDeniedError, ProviderSealedError, ProviderUnavailableError, UnwrapRefusedError
from .keyring import DataKey, Keyring
from .providers.base import Deadline, KeyProvider, WrappedKey

_NONCE_SIZE = 12


class FakeKMS(KeyProvider):
    """What looks like a KMS to :func:`~sqlalchemy_kravn_crypto.configure`, with switches for what can go wrong.

    It is not a KMS: the master key is in this process's memory and is gone with it. Wrapping is real otherwise,
    AES-256-GCM with the binding as associated data. The switches can be set at any time, from any thread.

    :param name: the name of the provider to record.
    """

    name = "fake"
    authenticates = True
    binds = True

    def __init__(self, name: str = "fake") -> None:
        self.name = name
        self.calls: Counter[str] = Counter()
        """How often it was asked to ``wrap`` and to ``unwrap``."""
        self.slow: float | threading.Event = 0.0
        """How many seconds every answer takes; or an event that is waited for."""
        self.down = False
        """Whether it cannot be reached."""
        self.sealed = False
        """Whether it answers that it is sealed."""
        self.denies = False
        """Whether it refuses the credentials."""
        self.returns_another_key = False
        """Whether it unwraps to something else than was wrapped."""
        self._lock = threading.Lock()
        self._aead = AESGCM(os.urandom(32))

    @property
    def master_key(self) -> str:
        """Where the master key is said to be."""
        return f"{self.name}/master-key"

    def recognises(self, master_key: str) -> bool:
        """Tell whether a recorded master key is a version of this one."""
        return master_key.rpartition(":v")[0] == self.master_key

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        """Wrap a data key, unless a switch says otherwise."""
        deadline.remaining(self.name)
        self._answer("wrap")
        nonce = os.urandom(_NONCE_SIZE)
        return WrappedKey(f"{self.master_key}:v1", nonce + self._aead.encrypt(nonce, data_key, binding))

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        """Unwrap a data key, unless a switch says otherwise."""
        deadline.remaining(self.name)
        self._answer("unwrap")
        key = b""
        try:
            if self.recognises(wrapped.master_key):
                key = self._aead.decrypt(wrapped.blob[:_NONCE_SIZE], wrapped.blob[_NONCE_SIZE:], binding)
        except (InvalidTag, ValueError):  # a nonce that is too short is a ValueError
            key = b""
        if not key:
            raise UnwrapRefusedError("The fake KMS did not wrap this, or under another binding.", provider=self.name)
        return os.urandom(len(key)) if self.returns_another_key else key

    def _answer(self, operation: str) -> None:
        with self._lock:
            self.calls[operation] += 1
        if isinstance(self.slow, threading.Event):
            self.slow.wait()
        else:
            time.sleep(self.slow)
        if self.down:
            raise ProviderUnavailableError("The fake KMS is switched to be down.", provider=self.name)
        if self.sealed:
            raise ProviderSealedError("The fake KMS is switched to be sealed.", provider=self.name)
        if self.denies:
            raise ProviderDeniedError("The fake KMS is switched to deny.", provider=self.name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} calls={dict(self.calls)}>"


@pytest.fixture
def kravn_keyring() -> Iterator[Keyring]:
    """Let encrypted columns be used in this test, in all of its threads and tasks, under a data key of its own.

    Nothing is read and nothing is written: no settings, no KMS, no ``kms_keys``. Afterwards all is as before.
    """
    with set_aside():
        keyring = Keyring(DataKey.generate())
        publish(keyring)
        yield keyring


@pytest.fixture
def kravn_kms() -> Iterator[FakeKMS]:
    """Give a KMS for ``configure(engine, provider=kravn_kms)``, to a process that is not configured yet.

    Afterwards the process is configured as before, if it was.
    """
    with set_aside():
        yield FakeKMS()
