"""What a key provider is: something that wraps and unwraps 32 bytes under a master key that never leaves it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Final, TypeVar, cast

from ..exceptions import KravnCryptoError, ProviderError, ProviderResponseError, ProviderUnavailableError
from ..secrecy import KeepsSecret

T = TypeVar("T")
E = TypeVar("E", bound=KravnCryptoError)

MAX_WRAPPED_KEY_SIZE: Final = 4096
"""Bound on a wrapped key, in bytes. RSA-4096 wraps to 512 bytes, Vault Transit to about 90, AWS KMS to about 190."""

MAX_MASTER_KEY_LENGTH: Final = 1024
"""Bound on the identifier of a master key, in characters."""


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A data key under a master key.

    Constructing one validates it, so that what is written to the key store and what is read from it pass the same
    check.

    :param master_key: where the master key is and which version of it wrapped, in the provider's own notation.
    :param blob: the wrapped key as the KMS returned it.
    :raises ProviderResponseError: if either is empty or beyond its bound.
    """

    master_key: str
    blob: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not 0 < len(self.master_key) <= MAX_MASTER_KEY_LENGTH or not self.master_key.isprintable():
            raise ProviderResponseError(
                f"The identifier of the master key must be 1 to {MAX_MASTER_KEY_LENGTH} printable characters."
            )
        if not 0 < len(self.blob) <= MAX_WRAPPED_KEY_SIZE:
            raise ProviderResponseError(f"A wrapped key must be 1 to {MAX_WRAPPED_KEY_SIZE} bytes long.")


class Level(StrEnum):
    """How much what was found about a configuration matters."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found out about a configuration.

    :ivar subject: what it is about, in a word or two, such as ``credentials``.
    :ivar message: what was found. No secret is in it.
    :ivar advice: what to do, if anything.
    """

    subject: str
    level: Level
    message: str
    advice: str = ""


class Deadline:
    """A moment on the monotonic clock that one whole KMS operation must not pass.

    :param seconds: how long the operation may take, in seconds.
    :param clock: the source of monotonic seconds.
    """

    __slots__ = ("_clock", "_end", "seconds")

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def remaining(self, provider: str) -> float:
        """Return the seconds that are left.

        :param provider: the provider's name, for the error.
        :raises ProviderUnavailableError: if none are.
        """
        left = self._end - self._clock()
        if left <= 0:
            raise ProviderUnavailableError(
                f"The {provider} KMS did not answer within {self.seconds:g} seconds. Check that it can be reached from "
                "here; KRAVN_KMS_TIMEOUT sets the bound.",
                provider=provider,
            )
        return left


class KeyProvider(KeepsSecret, ABC):
    """Wraps and unwraps data keys under one master key of one KMS.

    A subclass has a name, and the two methods. It keeps no connection between calls and is safe to call from several
    threads at once. It raises only subclasses of :class:`~sqlalchemy_kravn_crypto.exceptions.ProviderError`.
    """

    name: str
    """The provider's name, as in ``KRAVN_KMS_PROVIDER``: up to 32 characters, recorded with every key."""

    authenticates: bool = False
    """Whether only somebody with rights in the KMS can have made a wrapped key that unwraps."""

    binds: bool = False
    """Whether the KMS refuses to unwrap under another binding than it wrapped under."""

    @property
    def master_key(self) -> str:
        """Where the configured master key is, without its version. By default the provider has one only."""
        return self.name

    def recognises(self, master_key: str) -> bool:
        """Tell whether the recorded ``WrappedKey.master_key`` is the configured one, or a version of it.

        By default a version is what follows ``:v``.
        """
        return master_key == self.master_key or master_key.rpartition(":v")[0] == self.master_key

    @abstractmethod
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        """Wrap 32 bytes under the newest version of the master key.

        :param binding: what the wrapped key belongs to; given to the KMS as additional authenticated data where
            it takes such.
        :param deadline: when the whole operation must have ended.
        """

    def examine(self, deadline: Deadline) -> Iterable[Finding]:  # noqa: ARG002 - for those that have something to say
        """Find out what a wrap and an unwrap do not show: how long credentials last, and rights that should not be.

        Nothing is changed by it. ``kravn-crypto doctor`` prints what it finds.

        :raises ProviderError: if the KMS does not say.
        """
        return ()

    @abstractmethod
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        """Unwrap what :meth:`wrap` returned, under the version of the master key that wrapped it."""


def detached(error: E) -> E:
    """Return the error without the exceptions and stack frames it came from: those can hold secrets.

    Raise it outside of ``except`` blocks, or it gets a context again.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def run_within(deadline: Deadline, provider: str, calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run calls to a KMS concurrently and return their results in order, or raise the first error.

    Each call runs in a daemon thread, because looking up a host name blocks without a bound: at the deadline the caller
    goes on, and neither it nor the end of the process waits for a thread that hangs.

    :raises ProviderError: what a call raised, or that the deadline passed.
    """
    outcomes: SimpleQueue[tuple[int, T | None, ProviderError | None]] = SimpleQueue()
    for index, call in enumerate(calls):
        Thread(target=_put_outcome, args=(outcomes, index, call, provider), daemon=True).start()
    results: dict[int, T] = {}
    while len(results) < len(calls):
        outcome = None
        left = deadline.remaining(provider)
        try:
            outcome = outcomes.get(timeout=left)
        except Empty:
            continue
        index, result, error = outcome
        if error is not None:
            # Without the frames of the thread: their local variables hold data keys, and error trackers record those.
            raise error.with_traceback(None)
        results[index] = cast("T", result)
    return [results[index] for index in range(len(calls))]


def _put_outcome(
    outcomes: SimpleQueue[tuple[int, T | None, ProviderError | None]], index: int, call: Callable[[], T], provider: str
) -> None:
    failure = ""
    try:
        outcomes.put((index, call(), None))
    except ProviderError as error:
        outcomes.put((index, None, error))
    except Exception as error:  # noqa: BLE001 - a provider may be anybody's, and its errors may hold a data key
        failure = type(error).__name__
    if failure:
        message = f"The {provider} provider failed with {failure}. This is a defect of the provider; report it there."
        outcomes.put((index, None, ProviderError(message, provider=provider)))
