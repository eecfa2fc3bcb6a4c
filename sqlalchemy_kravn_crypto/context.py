"""The process-wide key context: one keyring, swapped as a whole, overridable in a ``with`` block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from .clock import Clock, process_clock
from .exceptions import LeaseExpiredError, NotConfiguredError
from .keyring import Keyring


class _KeyContext:
    """Holder of the process's keyring. Reading and replacing one attribute is atomic, so neither takes a lock.

    :ivar keyring: the keyring.
    :ivar writable_until: until when it may encrypt, by the process's clock.
    :ivar clock: the process's clock.
    :ivar unknown_key: told of a data key that a value needed and the keyring does not hold.
    """

    __slots__ = ("clock", "keyring", "unknown_key", "writable_until")

    def __init__(self) -> None:
        self.keyring: Keyring | None = None
        self.writable_until = math.inf
        self.clock: Clock = process_clock
        self.unknown_key: Callable[[], None] | None = None


_process: Final = _KeyContext()
_override: Final[ContextVar[Keyring | None]] = ContextVar("sqlalchemy_kravn_crypto_keyring", default=None)


def current_keyring() -> Keyring:
    """Return the keyring that encrypts and decrypts here and now.

    :raises NotConfiguredError: if there is none yet.
    """
    keyring = _override.get() or _process.keyring
    if keyring is None:
        raise NotConfiguredError(
            "Encrypted columns cannot be used yet: call sqlalchemy_kravn_crypto.configure(engine) once at start-up "
            "(await configure_async(engine) for an AsyncEngine)."
        )
    return keyring


def keyring_to_write() -> Keyring:
    """Return the keyring that encrypts here and now.

    :raises NotConfiguredError: if there is none yet.
    :raises LeaseExpiredError: if it is no longer certain that its primary is the primary of all.
    """
    overriding = _override.get()
    if overriding is not None:
        return overriding
    if _process.clock() > _process.writable_until:
        raise LeaseExpiredError(
            "Nothing is encrypted: this process has not been able to confirm for too long which data key is primary. "
            "Look in the log for why the key store could not be read or its keys not be unwrapped. An engine that "
            "writes encrypted values must be one that configure() was called with; in a transaction that is open for "
            "longer than KRAVN_LEASE, begin a new one."
        )
    return _process.keyring or current_keyring()


def report_unknown_key() -> None:
    """Say that a value could not be read for want of its data key; the next transaction looks for it."""
    if _override.get() is None and _process.unknown_key is not None:
        _process.unknown_key()


def is_configured() -> bool:
    """Tell whether there is a keyring here and now."""
    return (_override.get() or _process.keyring) is not None


def publish(
    keyring: Keyring | None,
    *,
    writable_until: float = math.inf,
    clock: Clock = process_clock,
    unknown_key: Callable[[], None] | None = None,
) -> None:
    """Make a keyring the one of the whole process, or take it away.

    :param writable_until: until when it may encrypt, by the clock; without one for ever.
    :param clock: the process's clock.
    :param unknown_key: what to call when a value needs a data key that it does not hold.
    """
    # The lease first: for a moment the old keyring may have the new one's lease, which is never too long for it, since
    # who publishes has just seen that both may be used.
    _process.writable_until, _process.clock = writable_until, clock
    _process.unknown_key = unknown_key
    _process.keyring = keyring


@contextmanager
def put_aside() -> Iterator[None]:
    """Within a ``with`` block, have nothing published; afterwards, what was before. For tests."""
    before = {name: getattr(_process, name) for name in _KeyContext.__slots__}
    publish(None)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(_process, name, value)


def replace_keyring(keyring: Keyring) -> None:
    """Swap the keyring of the whole process; the lease stays."""
    _process.keyring = keyring


def extend_lease(until: float) -> None:
    """Let the keyring encrypt until a later moment of the process's clock."""
    _process.writable_until = max(_process.writable_until, until)


def end_lease() -> None:
    """Let the keyring of the whole process encrypt nothing more, until its lease is extended."""
    _process.writable_until = -math.inf


@contextmanager
def use_keyring(keyring: Keyring) -> Iterator[Keyring]:
    """Use another keyring within a ``with`` block, in this thread or asynchronous task only; for tests.

    .. code-block:: python

        with use_keyring(Keyring(DataKey.generate())):
            session.add(Plugin(credentials={"token": "…"}))
            session.commit()
    """
    token = _override.set(keyring)
    try:
        yield keyring
    finally:
        _override.reset(token)
