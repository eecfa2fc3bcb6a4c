"""The process-wide key context: one keyring, swapped as a whole, overridable in a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from .exceptions import NotConfiguredError
from .keyring import Keyring


class _KeyContext:
    """Holder of the process's keyring. Reading and replacing one attribute is atomic, so neither takes a lock."""

    __slots__ = ("keyring",)

    def __init__(self) -> None:
        self.keyring: Keyring | None = None


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


def is_configured() -> bool:
    """Tell whether there is a keyring here and now."""
    return (_override.get() or _process.keyring) is not None


def publish(keyring: Keyring | None) -> None:
    """Make a keyring the one of the whole process, or take it away."""
    _process.keyring = keyring


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
