"""What a key provider promises, as tests that whoever writes one runs on theirs. Needs pytest, and nothing else.

.. code-block:: python

    from sqlalchemy_kravn_crypto.conformance import ProviderConformance

    class TestAcme(ProviderConformance):
        @pytest.fixture
        def provider(self):
            return AcmeProvider(...)

A failure says which promise of ``docs/writing-a-provider.md`` is broken, and how.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import logging
import os
import pickle
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import pytest
from sqlalchemy import Engine, create_engine

from .changes import Operator
from .ciphertext import ColumnName
from .derivation import KEY_SIZE
from .exceptions import (
    KravnCryptoError,
    ProviderDeniedError,
    ProviderError,
    ProviderUnavailableError,
    UnwrapRefusedError,
)
from .keyring import Keyring
from .keystore import KeyStore
from .lifecycle.evidence import evidence
from .lifecycle.rewrapping import rewrap
from .lifecycle.rotation import promote, rotate
from .probes import StillRunningError, answer_of_child, caught, open_in_process, origin_of, outcome_of, shows, text_of
from .providers.base import MAX_MASTER_KEY_LENGTH, MAX_WRAPPED_KEY_SIZE, Deadline, KeyProvider, WrappedKey, run_within
from .providers.discovery import NAME
from .rows import KEYRING
from .schema import TABLES
from .wrapping import MAC_KEYRING, binding

T = TypeVar("T")

PATIENCE: Final = 30.0
"""How many seconds a call may take whose time is not what is tested."""

GRACE: Final = 0.5
"""How many seconds after its deadline a call may return."""

_UNANSWERED: Final = 1.0  # seconds that a KMS is given that does not answer
_THREADS: Final = 8
_SETTLING: Final = 5.0  # seconds in which what a call began must have ended
_COLUMN: Final = ColumnName("conformance.value")
_PAYLOAD: Final = b"\x03conformance"


class Promise(StrEnum):
    """What a provider promises, in the words and the order of ``docs/writing-a-provider.md``."""

    NAME = "Its name has 1 to 32 lower-case letters and digits and begins with a letter."
    ROUND_TRIP = "What it wrapped, it unwraps to the same 32 bytes, whatever else it has wrapped since."
    RECORD = "It returns a WrappedKey, which bounds both parts, and nothing of the data key shows in them."
    RECOGNISES = "It recognises what it records as its master key, and no other."
    REFUSES = "It refuses what is recorded under another master key, and what is no wrapped key."
    ALTERED = "An altered wrapped key is refused if `authenticates` is true, and never gives the same data key."
    BINDS = "`binds` is true if it refuses to unwrap under another binding than it wrapped under, and else false."
    ERRORS = "It raises nothing but a ProviderError, with its name and a text, and with no other error behind it."
    SILENCE = "Nothing of a data key or a credential is in what it prints, logs, warns of or raises, nor in its repr."
    PICKLE = "It cannot be pickled or copied."
    THREADS = "Several threads may use it at once."
    FORK = "It serves in a process that was forked after it had been used."
    LEAVINGS = "When a call has ended, it has left no connection, thread or child process behind."
    DEADLINE = "It raises ProviderUnavailableError at the deadline: when it comes, and at once when it has passed."
    LIFE = "A key store lives with it: it boots, boots again, rotates, promotes and rewraps."


class ProviderConformance:
    """The tests. Subclass it with a name that begins with ``Test``, and override the fixture ``provider``.

    Every test asks the KMS for keys of its own. About 300 calls are made in all.
    """

    @pytest.fixture
    def provider(self) -> KeyProvider:
        """Return the provider, ready to wrap and unwrap."""
        pytest.fail("Override the fixture `provider` so that it returns your provider.", pytrace=False)

    @pytest.fixture
    def unreachable(self) -> KeyProvider | None:
        """Return one of the same master key whose KMS does not answer. Without it, one test is skipped."""
        return None

    @pytest.fixture
    def credentials(self) -> Sequence[str]:
        """Return what the provider logs in with, to see that it shows it nowhere."""
        return ()

    # --- Wrapping and unwrapping ---

    def test_name(self, provider: KeyProvider) -> None:
        """See that a variable and a row of the key store can hold its name."""
        name = getattr(provider, "name", None)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            _broken(Promise.NAME, f"It is {name!r}.")

    def test_round_trip(self, provider: KeyProvider) -> None:
        """Wrap and unwrap, keys among them that text or number would not survive."""
        for data_key in (os.urandom(KEY_SIZE), bytes(KEY_SIZE), b"\xff" * KEY_SIZE, b" \r\n\0" * (KEY_SIZE // 4)):
            bound = _binding()
            _check_opens(provider, _wrap(provider, data_key, bound), bound, data_key)

    def test_every_wrapped_key_opens(self, provider: KeyProvider) -> None:
        """Unwrap several that were wrapped before the first is unwrapped, two of them of one data key."""
        bound, data_key = _binding(), os.urandom(KEY_SIZE)
        made = [(data_key, bound), (data_key, bound), (os.urandom(KEY_SIZE), bound), (data_key, _binding())]
        wrapped = [_wrap(provider, *each) for each in made]
        for (key, under), each in itertools.chain(zip(made, wrapped, strict=True), zip(made, wrapped, strict=True)):
            _check_opens(provider, each, under, key)

    def test_wrapped_key(self, provider: KeyProvider) -> None:
        """Look at what is stored."""
        data_key = os.urandom(KEY_SIZE)
        wrapped = _wrap(provider, data_key, _binding())
        if type(wrapped.blob) is not bytes:
            _broken(Promise.RECORD, f"The blob is of type {type(wrapped.blob).__name__} and not bytes.")
        if shows(f"{wrapped.master_key}\n{wrapped.blob.decode('latin-1')}", data_key, in_parts=True):
            _broken(Promise.RECORD, "The data key, or a part of it, can be read in it.")

    def test_recognises(self, provider: KeyProvider) -> None:
        """Show it its own record, and what only looks like it."""
        recorded = _wrap(provider, os.urandom(KEY_SIZE), _binding()).master_key
        asked = {recorded: True} | dict.fromkeys(_other_records(provider, recorded), False)
        for master_key, expected in asked.items():
            answer = _outcome(partial(provider.recognises, master_key))
            if answer is not expected:
                said = _described(answer) if isinstance(answer, BaseException) else repr(answer)
                _broken(
                    Promise.RECOGNISES, f"It records {recorded!r}. Of {master_key!r} it says {said}, not {expected}."
                )

    def test_refuses_another_record(self, provider: KeyProvider) -> None:
        """Give it a wrapped key of its own under the record of another master key."""
        data_key, bound = os.urandom(KEY_SIZE), _binding()
        wrapped = _wrap(provider, data_key, bound)
        for master_key in _other_records(provider, wrapped.master_key):
            found = _unwrapped(provider, WrappedKey(master_key, wrapped.blob), bound)
            _check_refused(Promise.REFUSES, f"A key of {wrapped.master_key!r} on record under {master_key!r}", found)

    def test_refuses_garbage(self, provider: KeyProvider) -> None:
        """Give it what is no wrapped key at all, under the record of its own master key."""
        recorded = _wrap(provider, os.urandom(KEY_SIZE), _binding()).master_key
        for what, blob in _GARBAGE.items():
            found = _unwrapped(provider, WrappedKey(recorded, blob), _binding())
            _check_refused(Promise.REFUSES, f"A wrapped key of {what}", found)

    def test_refuses_altered(self, provider: KeyProvider) -> None:
        """Alter a wrapped key bit by bit, region by region, and in its length."""
        data_key, bound = os.urandom(KEY_SIZE), _binding()
        wrapped = _wrap(provider, data_key, bound)
        _check_opens(provider, wrapped, bound, data_key)
        for what, blob in _alterations(wrapped.blob):
            found = _unwrapped(provider, WrappedKey(wrapped.master_key, blob), bound)
            if found == data_key:
                _broken(Promise.ALTERED, f"It opens to the same data key with {what}.")
            if provider.authenticates or isinstance(found, BaseException):
                _check_refused(Promise.ALTERED, f"With {what}, it", found)

    def test_binding(self, provider: KeyProvider) -> None:
        """Unwrap under bindings that differ in one part, as those of other keys, deployments and keyrings do."""
        data_key, deployment_id, key_id = os.urandom(KEY_SIZE), str(uuid.uuid4()), os.urandom(8)
        bound = binding(KEYRING, deployment_id, key_id)
        wrapped = _wrap(provider, data_key, bound)
        _check_opens(provider, wrapped, bound, data_key)
        others = {
            "another deployment": binding(KEYRING, str(uuid.uuid4()), key_id),
            "another data key": binding(KEYRING, deployment_id, os.urandom(8)),
            "another keyring": binding("another", deployment_id, key_id),
            "a keyring with a longer name": binding(KEYRING + "x" * (64 - len(KEYRING)), deployment_id, key_id),
            "the key of the row MACs": binding(MAC_KEYRING, deployment_id, key_id),
        }
        for what, other in others.items():
            found = _unwrapped(provider, wrapped, other)
            if provider.binds:
                _check_refused(Promise.BINDS, f"The binding of {what}", found, UnwrapRefusedError, ProviderDeniedError)
            elif found != data_key:
                _broken(Promise.BINDS, f"`binds` is false, but under the binding of {what} the key does not open.")

    # --- What it raises and shows ---

    def test_errors(self, provider: KeyProvider, unreachable: KeyProvider | None) -> None:
        """Provoke errors of all kinds."""
        for what, outcome in _provoked(provider, unreachable, os.urandom(KEY_SIZE)):
            if not isinstance(outcome, BaseException):
                continue
            if not isinstance(outcome, ProviderError):
                _broken(Promise.ERRORS, f"{what} raised {_described(outcome)}.")
            if outcome.provider != provider.name or not str(outcome).strip():
                _broken(Promise.ERRORS, f"{what} raised {_described(outcome)!r}, of the provider {outcome.provider!r}.")
            behind = outcome.__cause__ or outcome.__context__
            if behind is not None:
                _broken(
                    Promise.ERRORS,
                    f"{what} raised {_described(outcome)!r}, and behind it is a {type(behind).__name__}, whose frames "
                    "and text may hold a key. Raise it outside of the except block; `from None` only hides the other.",
                )

    def test_shows_nothing(
        self,
        provider: KeyProvider,
        unreachable: KeyProvider | None,
        credentials: Sequence[str],
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """Do all that can be done, with every log at DEBUG, and look for the data key in all that can be read."""
        data_key = os.urandom(KEY_SIZE)
        capfd.readouterr()
        with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            outcomes = _provoked(provider, unreachable, data_key)
        printed = capfd.readouterr()
        shown = {
            "on standard output": printed.out,
            "on standard error": printed.err,
            "in a log": caplog.text + "".join(repr(record.__dict__) for record in caplog.records),
            "in a warning": "".join(str(warning.message) for warning in warned),
            "in an error": "".join(text_of(error) for _, error in outcomes if isinstance(error, BaseException)),
            "in what examine() found": "".join(repr(found) for _, found in outcomes if isinstance(found, list)),
            "in its repr": f"{provider!r}\n{provider}\n{unreachable!r}",
        }
        for where, text in shown.items():
            if shows(text, data_key, in_parts=True):
                _broken(Promise.SILENCE, f"The data key, or a part of it, is {where}.")
            if any(shows(text, credential.encode()) for credential in credentials):
                _broken(Promise.SILENCE, f"A credential is {where}.")

    def test_cannot_be_pickled(self, provider: KeyProvider) -> None:
        """Try to take it out of the process."""
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            done = _outcome(partial(way, provider))
            if not isinstance(done, BaseException):
                _broken(Promise.PICKLE, f"{way.__name__}() did so. Do not override KeyProvider.__reduce__.")

    # --- Threads and processes ---

    def test_threads(self, provider: KeyProvider) -> None:
        """Let several threads wrap and unwrap at once, each its own keys."""
        together = threading.Barrier(_THREADS)

        def work() -> list[str]:
            together.wait(PATIENCE)
            return [_fault(provider) for _ in range(3)]

        deadline = Deadline(6 * PATIENCE)
        outcome = _outcome(lambda: run_within(deadline, provider.name, [work] * _THREADS), calls=6)
        if isinstance(outcome, BaseException):
            _broken(Promise.THREADS, f"In one of {_THREADS}, it raised {_described(outcome)}.")
        for fault in filter(None, itertools.chain.from_iterable(outcome)):
            _broken(Promise.THREADS, f"In one of {_THREADS}, {fault}.")

    if hasattr(os, "fork"):

        def test_fork(self, provider: KeyProvider) -> None:
            """Use it, fork, and use it in the child; one that hangs there is killed."""
            _check_serves(provider)
            after = answer_of_child(lambda: _fault(provider), 2 * PATIENCE + _SETTLING)
            if after:
                _broken(Promise.FORK, f"In the child, {after}.")

    def test_leaves_nothing_behind(self, provider: KeyProvider) -> None:
        """Compare what is open in the process before its first call and after its last, on systems that tell."""
        before = open_in_process()
        for _ in range(3):
            _check_serves(provider)
        end = time.monotonic() + _SETTLING
        while (left := open_in_process() - before) and time.monotonic() < end:
            time.sleep(0.02)
            gc.collect()
        if left:
            _broken(Promise.LEAVINGS, f"{_SETTLING:g} seconds later there still is {', '.join(sorted(left))}.")

    # --- Time ---

    def test_deadline_that_has_passed(self, provider: KeyProvider) -> None:
        """Give it no time at all."""
        bound = _binding()
        wrapped = _wrap(provider, os.urandom(KEY_SIZE), bound)
        _check_gives_up("wrap", lambda deadline: provider.wrap(os.urandom(KEY_SIZE), bound, deadline), _passed(), 0)
        _check_gives_up("unwrap", lambda deadline: provider.unwrap(wrapped, bound, deadline), _passed(), 0)

    def test_kms_that_does_not_answer(self, provider: KeyProvider, unreachable: KeyProvider | None) -> None:
        """Ask a KMS that does not answer."""
        if unreachable is None:
            pytest.skip("Override the fixture `unreachable` to test what it does when its KMS does not answer.")
        bound = _binding()
        wrapped = _wrap(provider, os.urandom(KEY_SIZE), bound)
        if unreachable.master_key != provider.master_key:
            pytest.fail("The fixture `unreachable` must return a provider of the same master key.", pytrace=False)
        for what, call in (
            ("wrap", lambda deadline: unreachable.wrap(os.urandom(KEY_SIZE), bound, deadline)),
            ("unwrap", lambda deadline: unreachable.unwrap(wrapped, bound, deadline)),
        ):
            _check_gives_up(what, call, Deadline(_UNANSWERED), _UNANSWERED)

    # --- The key store ---

    def test_life(self, provider: KeyProvider, tmp_path: Path) -> None:
        """Lead a data key's life on SQLite; a second time without a secret, if the provider authenticates."""
        directory = tmp_path / "conformance"
        directory.mkdir()
        secret_key = directory / "secret.key"
        secret_key.write_text(os.urandom(KEY_SIZE).hex())
        secret_key.chmod(0o600)
        with _key_store(provider, secret_key) as life:
            life.lead()
        if provider.authenticates:
            # Then the key of the row MACs is wrapped, too.
            with _key_store(provider, directory / "none.key") as life:
                life.lead()


# --- What is asked of it ----------------------------------------------------------------------------------------------


def _binding() -> bytes:
    """Return a binding as the key store makes them."""
    return binding(KEYRING, str(uuid.uuid4()), os.urandom(8))


def _passed() -> Deadline:
    """Return a deadline that has passed."""
    return Deadline(1.0, itertools.chain([0.0], itertools.repeat(2.0)).__next__)


def _outcome(call: Callable[[], T], *, calls: int = 1) -> T | BaseException:
    """Return what a function that calls the KMS so often returned or raised. One that hangs is left to itself."""
    outcome = outcome_of(call, calls * PATIENCE + _SETTLING)
    if isinstance(outcome, StillRunningError):
        _broken(Promise.DEADLINE, f"A call hangs: {outcome}.")
    return outcome


def _wrap(provider: KeyProvider, data_key: bytes, bound: bytes) -> WrappedKey:
    wrapped = _outcome(partial(provider.wrap, data_key, bound, Deadline(PATIENCE)))
    if isinstance(wrapped, BaseException):
        _broken(Promise.ROUND_TRIP, f"wrap() raised {_described(wrapped)}.")
    if type(wrapped) is not WrappedKey:
        _broken(Promise.RECORD, f"wrap() returned an object of type {type(wrapped).__name__}.")
    return wrapped


def _unwrapped(provider: KeyProvider, wrapped: WrappedKey, bound: bytes) -> bytes | BaseException:
    return _outcome(partial(provider.unwrap, wrapped, bound, Deadline(PATIENCE)))


def _fault(provider: KeyProvider) -> str:
    """Wrap and unwrap a key, and return what is wrong with that."""
    data_key, bound = os.urandom(KEY_SIZE), _binding()
    found = caught(
        lambda: provider.unwrap(provider.wrap(data_key, bound, Deadline(PATIENCE)), bound, Deadline(PATIENCE))
    )
    if isinstance(found, BaseException):
        return f"it raised {_described(found)}"
    return "" if found == data_key else "it unwrapped a key to something else"


def _other_records(provider: KeyProvider, recorded: str) -> list[str]:
    """Return what is on record for no version of the provider's master key."""
    own = provider.master_key
    long, longer = "\u00fc" * MAX_MASTER_KEY_LENGTH, f"x{recorded}"[:MAX_MASTER_KEY_LENGTH]
    others = ["another", "none", "1", ":v1", "/", long, longer]
    if recorded.startswith(own):
        others.append(f"{own}x{recorded.removeprefix(own)}"[:MAX_MASTER_KEY_LENGTH])
    return [other for other in others if other not in {recorded, own}]


_GARBAGE: Final = {
    "one byte": b"\0",
    "text": b"this is no wrapped key",
    "60 random bytes": os.urandom(60),
    "256 bytes, all ones": b"\xff" * 256,
    f"{MAX_WRAPPED_KEY_SIZE} zeros": bytes(MAX_WRAPPED_KEY_SIZE),
    f"{MAX_WRAPPED_KEY_SIZE} brackets": b"[" * MAX_WRAPPED_KEY_SIZE,
}


def _alterations(blob: bytes) -> Iterator[tuple[str, bytes]]:
    """Return a wrapped key in other forms: a bit of every byte, or of some 200, every eighth, its length."""
    size = len(blob)
    for position in range(0, size, 1 + size // 256):
        bit = position % 8
        altered = bytes([blob[position] ^ 1 << bit])
        yield f"bit {bit} of byte {position} of {size} flipped", blob[:position] + altered + blob[position + 1 :]
    for start, end in itertools.pairwise(size * eighth // 8 for eighth in range(9)):
        inverted = bytes(byte ^ 0xFF for byte in blob[start:end])
        if inverted:
            yield f"bytes {start} to {end} of {size} inverted", blob[:start] + inverted + blob[end:]
    lengths = {
        "its last byte cut off": blob[:-1],
        "its first byte cut off": blob[1:],
        "its second half cut off": blob[: size // 2],
        "a zero behind it": blob + b"\0",
        "a line feed behind it": blob + b"\n",
        "a zero before it": b"\0" + blob,
        "itself behind it": blob + blob,
    }
    yield from ((what, other) for what, other in lengths.items() if 0 < len(other) <= MAX_WRAPPED_KEY_SIZE)


def _provoked(provider: KeyProvider, unreachable: KeyProvider | None, data_key: bytes) -> list[tuple[str, object]]:
    """Do all that can be done with a data key, right and wrong, and return what each led to."""
    bound, made = _binding(), []

    def attempt(what: str, call: Callable[[], object]) -> object:
        made.append((what, _outcome(call)))
        return made[-1][1]

    wrapped = attempt("wrap()", lambda: provider.wrap(data_key, bound, Deadline(PATIENCE)))
    attempt("wrap() after its deadline", lambda: provider.wrap(data_key, bound, _passed()))
    attempt("examine()", lambda: list(provider.examine(Deadline(PATIENCE))))
    attempt("examine() after its deadline", lambda: list(provider.examine(_passed())))
    if unreachable is not None:
        attempt("wrap() without an answer", lambda: unreachable.wrap(data_key, bound, Deadline(_UNANSWERED)))
    if not isinstance(wrapped, WrappedKey):
        return made
    altered = WrappedKey(wrapped.master_key, wrapped.blob[:-1] + bytes([wrapped.blob[-1] ^ 1]))
    for what, given, under in (
        ("unwrap()", wrapped, bound),
        ("unwrap() under another binding", wrapped, _binding()),
        ("unwrap() of an altered wrapped key", altered, bound),
        ("unwrap() of another record", WrappedKey("another", wrapped.blob), bound),
        *((f"unwrap() of {what}", WrappedKey(wrapped.master_key, blob), bound) for what, blob in _GARBAGE.items()),
    ):
        attempt(what, partial(provider.unwrap, given, under, Deadline(PATIENCE)))
    attempt("unwrap() after its deadline", lambda: provider.unwrap(wrapped, bound, _passed()))
    if unreachable is not None:
        attempt("unwrap() without an answer", lambda: unreachable.unwrap(wrapped, bound, Deadline(_UNANSWERED)))
    return made


# --- What is expected of it -------------------------------------------------------------------------------------------


def _broken(promise: Promise, what: str) -> NoReturn:
    number = list(Promise).index(promise) + 1
    pytest.fail(f"Broken: promise {number} of docs/writing-a-provider.md. {promise}\n{what}", pytrace=False)


def _described(error: BaseException) -> str:
    """Return what an error is; the text of those that are not ours is left out, since it may hold a key."""
    return f"{type(error).__name__}: {error}" if isinstance(error, KravnCryptoError) else origin_of(error)


def _check_opens(provider: KeyProvider, wrapped: WrappedKey, bound: bytes, data_key: bytes) -> None:
    found: object = _unwrapped(provider, wrapped, bound)
    if isinstance(found, BaseException):
        _broken(Promise.ROUND_TRIP, f"unwrap() raised {_described(found)}.")
    if type(found) is not bytes or len(found) != KEY_SIZE:
        size = f" of {len(found)}" if isinstance(found, (bytes, bytearray, str)) else ""
        _broken(
            Promise.ROUND_TRIP, f"unwrap() returned {type(found).__name__}{size}, which must be bytes of {KEY_SIZE}."
        )
    if found != data_key:
        _broken(Promise.ROUND_TRIP, "unwrap() returned something else than was wrapped.")


def _check_serves(provider: KeyProvider) -> None:
    fault = _outcome(lambda: _fault(provider), calls=2)
    if fault:
        _broken(Promise.ROUND_TRIP, f"When it was asked to wrap and unwrap, {fault}.")


def _check_refused(promise: Promise, what: str, outcome: object, *kinds: type[ProviderError]) -> None:
    if not isinstance(outcome, BaseException):
        _broken(promise, f"{what} was not refused.")
    if not isinstance(outcome, ProviderError):
        _broken(Promise.ERRORS, f"{what} raised {_described(outcome)}.")
    if isinstance(outcome, ProviderUnavailableError):
        _broken(promise, f"{what} raised {_described(outcome)!r}. That is said of a KMS that does not answer.")
    if kinds and not isinstance(outcome, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        _broken(promise, f"{what} raised {_described(outcome)!r}, which must be an {names}.")


def _check_gives_up(what: str, call: Callable[[Deadline], object], deadline: Deadline, seconds: float) -> None:
    started = time.monotonic()
    outcome = _outcome(lambda: call(deadline))
    late = time.monotonic() - started - seconds
    if not isinstance(outcome, BaseException):
        _broken(Promise.DEADLINE, f"{what}() did not raise ProviderUnavailableError.")
    if not isinstance(outcome, ProviderUnavailableError):
        _broken(Promise.DEADLINE, f"{what}() raised {_described(outcome)!r} and no ProviderUnavailableError.")
    if late > GRACE:
        _broken(Promise.DEADLINE, f"{what}() raised ProviderUnavailableError {late:.1f} seconds after the deadline.")


# --- The key store ----------------------------------------------------------------------------------------------------


class _Life:
    """A key store on an empty database, and what is done with it, step by step."""

    def __init__(self, engine: Engine, provider: KeyProvider, secret_file: Path) -> None:
        TABLES.keys.metadata.create_all(engine)
        self._engine = engine
        self._store = KeyStore(provider=provider, secret=None, secret_file=secret_file, timeout=PATIENCE)
        self._operator = Operator(engine=engine, store=self._store)

    def lead(self) -> None:
        first = self._boot("first boot")
        frame = first.encrypt(_PAYLOAD, _COLUMN)
        self._read(frame, "second boot")
        self._step("rotate", partial(rotate, self._operator))
        self._step("promote", partial(promote, self._operator))
        promoted = self._read(frame, "boot after a rotation")
        self._step("rewrap", partial(rewrap, self._operator))
        self._read(frame, "boot after a rewrap")
        for key_id in (first.primary_key_id, promoted.primary_key_id):
            found = self._step("evidence", partial(evidence, self._operator, key_id))
            if found["provider"] != self._store.provider_name or not found["has_wrapped_key"]:
                _broken(Promise.LIFE, f"The evidence of data key {key_id} does not name the provider.")

    def _boot(self, what: str) -> Keyring:
        return self._step(what, lambda: self._store.open(self._engine)).keyring

    def _read(self, frame: bytes, what: str) -> Keyring:
        keyring = self._boot(what)
        if self._step(f"reading after the {what}", lambda: keyring.decrypt(frame, _COLUMN)) != _PAYLOAD:
            _broken(Promise.LIFE, f"After the {what}, a value does not read as it was written.")
        return keyring

    def _step(self, what: str, call: Callable[[], T]) -> T:
        found = caught(call)
        if isinstance(found, BaseException):
            _broken(Promise.LIFE, f"The {what} failed with {_described(found)}")
        return found


@contextlib.contextmanager
def _key_store(provider: KeyProvider, secret_file: Path) -> Iterator[_Life]:
    engine = create_engine("sqlite://")
    try:
        yield _Life(engine, provider, secret_file)
    finally:
        engine.dispose()
