"""Providers that each break a promise, and which tests of the conformance suite must see it: exactly those.

Not collected with the other tests: ``test_conformance.py`` runs pytest on this file, and nearly all of it fails.
"""

from __future__ import annotations

import base64
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, Final, NoReturn, TypeVar

import pytest

from sqlalchemy_kravn_crypto import conformance
from sqlalchemy_kravn_crypto.conformance import ProviderConformance
from sqlalchemy_kravn_crypto.exceptions import (
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
    UnwrapRefusedError,
)
from sqlalchemy_kravn_crypto.providers.base import Deadline, Finding, KeyProvider, Level, WrappedKey
from sqlalchemy_kravn_crypto.testing import FakeKMS

K = TypeVar("K", bound=type[FakeKMS])

CREDENTIAL: Final = "a-token-that-nobody-may-see"
PATIENCE: Final = 2.0  # seconds after which what hangs is taken to hang
UNANSWERED: Final = 0.3  # seconds that are given to a KMS that does not answer

ALL: Final = frozenset(name for name in dir(ProviderConformance) if name.startswith("test_"))
EXPECTED: Final[dict[str, frozenset[str]]] = {}
"""By the names of the test classes: which tests must fail."""

logger = logging.getLogger(__name__)


class Suite(ProviderConformance):
    kms: ClassVar[type[FakeKMS]]

    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(conformance, "PATIENCE", PATIENCE)
        monkeypatch.setattr(conformance, "_SETTLING", 1.0)
        monkeypatch.setattr(conformance, "_UNANSWERED", UNANSWERED)

    @pytest.fixture
    def provider(self) -> KeyProvider:
        return self.kms()

    @pytest.fixture
    def unreachable(self) -> KeyProvider:
        kms = self.kms()
        kms.down = True
        return kms

    @pytest.fixture
    def credentials(self) -> list[str]:
        return [CREDENTIAL]


def fails(*tests: str) -> Callable[[K], K]:
    """Let a mutant be tested, and say which tests must fail."""

    def register(kms: K) -> K:
        name = f"Test{kms.__name__}"
        EXPECTED[name] = frozenset(f"test_{test}" for test in tests)
        assert EXPECTED[name] <= ALL
        globals()[name] = type(name, (Suite,), {"kms": kms, "__module__": __name__})
        return kms

    return register


def raised_by(call: Callable[[], object]) -> ProviderError | None:
    try:
        call()
    except ProviderError as error:
        return error
    return None


@fails()
class Sound(FakeKMS):
    """What the others are made from keeps all promises."""


# --- The binding ------------------------------------------------------------------------------------------------------


@fails("binding", "life")
class IgnoresTheBinding(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        return super().wrap(data_key, b"", deadline)

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        return super().unwrap(wrapped, b"", deadline)


@fails("binding")
class IgnoresTheEndOfTheBinding(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        return super().wrap(data_key, binding[:-8], deadline)

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        return super().unwrap(wrapped, binding[:-8], deadline)


@fails("binding")
class BindsAndDoesNotSayIt(FakeKMS):
    binds = False


# --- What comes back --------------------------------------------------------------------------------------------------


@fails(
    "round_trip",
    "every_wrapped_key_opens",
    "refuses_altered",
    "binding",
    "threads",
    "fork",
    "leaves_nothing_behind",
    "life",
)
class ReturnsOneByteLess(FakeKMS):
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        return super().unwrap(wrapped, binding, deadline)[:-1]


@fails("round_trip")
class TakesTheKeyForText(FakeKMS):
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        data_key = super().unwrap(wrapped, binding, deadline)
        return data_key.strip() if data_key.isascii() else data_key


@fails("round_trip", "every_wrapped_key_opens", "refuses_altered", "binding", "life")
class ReturnsAByteArray(FakeKMS):
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> Any:
        return bytearray(super().unwrap(wrapped, binding, deadline))


@fails("every_wrapped_key_opens", "threads", "life")
class KeepsOneKeyOnly(FakeKMS):
    newest = b""

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        wrapped = super().wrap(data_key, binding, deadline)
        self.newest = wrapped.blob
        time.sleep(0.005)  # so that the others come in between
        return wrapped

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        if self.newest and wrapped.blob != self.newest:
            raise UnwrapRefusedError("This is no longer there.", provider=self.name)
        return super().unwrap(wrapped, binding, deadline)


@fails(*(name.removeprefix("test_") for name in ALL - {"test_name", "test_cannot_be_pickled"}))
class FailsAlways(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> NoReturn:
        raise KeyError(data_key)


# --- What is stored ---------------------------------------------------------------------------------------------------


@fails("wrapped_key")
class RecordsAPartOfTheKey(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        part = base64.b64encode(b"x" + data_key[:10]).decode()
        return WrappedKey(f"{self.master_key}:v{part}", super().wrap(data_key, binding, deadline).blob)


@fails("wrapped_key")
class ReturnsABlobOfAnotherType(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        wrapped = super().wrap(data_key, binding, deadline)
        blob: Any = bytearray(wrapped.blob)
        return WrappedKey(wrapped.master_key, blob)


class Unbounded(WrappedKey):
    def __post_init__(self) -> None:
        pass


NEEDING_A_WRAPPED_KEY: Final = (
    "every_wrapped_key_opens",
    "round_trip",
    "wrapped_key",
    "recognises",
    "refuses_another_record",
    "refuses_garbage",
    "refuses_altered",
    "binding",
    "deadline_that_has_passed",
    "kms_that_does_not_answer",
)


@fails(*NEEDING_A_WRAPPED_KEY)
class ReturnsWhatIsNotBounded(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        wrapped = super().wrap(data_key, binding, deadline)
        return Unbounded(wrapped.master_key, wrapped.blob)


@fails("recognises", "refuses_another_record")
class RecognisesByTheBeginning(FakeKMS):
    def recognises(self, master_key: str) -> bool:
        return master_key.startswith(self.master_key)


@fails("recognises")
class RecognisesVersionsThatAreNumbers(FakeKMS):
    def recognises(self, master_key: str) -> bool:
        path, _, version = master_key.rpartition(":v")
        return int(version) > 0 and path == self.master_key


@fails("recognises", "life")
class DoesNotRecogniseItsOwn(FakeKMS):
    def recognises(self, master_key: str) -> bool:
        return master_key == self.master_key

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        recorded, _, _ = wrapped.master_key.rpartition(":v")
        return super().unwrap(WrappedKey(recorded or "another", wrapped.blob), binding, deadline)


@fails("refuses_another_record")
class OpensWhateverIsOnRecord(FakeKMS):
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        return super().unwrap(WrappedKey(f"{self.master_key}:v1", wrapped.blob), binding, deadline)


# --- What is altered --------------------------------------------------------------------------------------------------


@fails("refuses_altered")
class IgnoresWhatIsBehind(FakeKMS):
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        return super().unwrap(WrappedKey(wrapped.master_key, wrapped.blob[:60]), binding, deadline)


@fails("refuses_altered")
class IgnoresAByteBefore(FakeKMS):
    authenticates = False

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        wrapped = super().wrap(data_key, binding, deadline)
        return WrappedKey(wrapped.master_key, b"\1" + wrapped.blob)

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        return super().unwrap(WrappedKey(wrapped.master_key, wrapped.blob[1:] or b"\0"), binding, deadline)


class Pad(FakeKMS):
    """Adds a fixed pad, so that an altered wrapped key opens to another key; binds nothing."""

    authenticates = binds = False
    pad = os.urandom(32)

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        return WrappedKey(super().wrap(data_key, binding, deadline).master_key, self._padded(data_key))

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        deadline.remaining(self.name)
        self._answer("unwrap")
        if len(wrapped.blob) != 32 or not self.recognises(wrapped.master_key):
            raise UnwrapRefusedError("This is no wrapped key.", provider=self.name)
        return self._padded(wrapped.blob)

    def _padded(self, given: bytes) -> bytes:
        return bytes(a ^ b for a, b in zip(given, self.pad, strict=True))


@fails()
class AuthenticatesNothingAndSaysSo(Pad):
    pass


@fails("refuses_altered")
class AuthenticatesNothing(Pad):
    authenticates = True


@fails("refuses_garbage", "refuses_altered")
class TakesWhateverIsLongEnough(Pad):
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        return super().unwrap(WrappedKey(wrapped.master_key, wrapped.blob[:32]), binding, deadline)


# --- What it raises ---------------------------------------------------------------------------------------------------


class RefusesInItsOwnWay(FakeKMS):
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        if isinstance(raised_by(partial(super().unwrap, wrapped, binding, deadline)), UnwrapRefusedError):
            raise self.refusal()
        return super().unwrap(wrapped, binding, deadline)

    def refusal(self) -> Exception:
        raise NotImplementedError


@fails("refuses_another_record", "refuses_garbage", "refuses_altered", "binding", "errors", "life")
class RaisesWhatItsLibraryRaises(RefusesInItsOwnWay):
    def refusal(self) -> Exception:
        return ValueError("The tag does not match.")


@fails("refuses_another_record", "refuses_garbage", "refuses_altered", "binding", "life")
class SaysThatItIsDown(RefusesInItsOwnWay):
    def refusal(self) -> Exception:
        return ProviderUnavailableError("Something is wrong.", provider=self.name)


@fails("binding", "life")
class RefusesWithAnErrorOfAnotherMeaning(RefusesInItsOwnWay):
    def refusal(self) -> Exception:
        return MasterKeyUnusableError("This cannot be unwrapped.", provider=self.name)


@fails("errors")
class DoesNotSayWhoItIs(RefusesInItsOwnWay):
    def refusal(self) -> Exception:
        return UnwrapRefusedError("This is not to be unwrapped here.")


@fails("errors")
class SaysNothing(RefusesInItsOwnWay):
    def refusal(self) -> Exception:
        return UnwrapRefusedError(provider=self.name)


@fails("errors")
class HidesAnotherErrorBehindItsOwn(FakeKMS):
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        try:
            return super().unwrap(wrapped, binding, deadline)
        except UnwrapRefusedError:
            raise UnwrapRefusedError("This is not to be unwrapped here.", provider=self.name) from None


@fails("errors")
class FailsToExamine(FakeKMS):
    def examine(self, deadline: Deadline) -> NoReturn:
        raise KeyError


# --- What it shows ----------------------------------------------------------------------------------------------------


@fails("shows_nothing")
class ShowsTheKeyInAnError(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        error = raised_by(partial(super().wrap, data_key, binding, deadline))
        if error is not None:
            text = f"The request {{'plaintext': '{base64.b64encode(data_key).decode()}'}} failed."
            raise ProviderUnavailableError(text, provider=self.name)
        return super().wrap(data_key, binding, deadline)


@fails("shows_nothing")
class ShowsTheKeyInAnAttributeOfAnError(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        error = raised_by(partial(super().wrap, data_key, binding, deadline))
        if error is not None:
            error = ProviderUnavailableError("It does not answer.", provider=self.name)
            error.request = {"plaintext": list(data_key)}  # type: ignore[attr-defined] # as SDKs do
            raise error
        return super().wrap(data_key, binding, deadline)


@fails("shows_nothing")
class ShowsTheKeyInALog(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        logger.debug("wrapping a key that begins with %s", data_key[:8].hex())
        return super().wrap(data_key, binding, deadline)


@fails("shows_nothing")
class LogsWhatItUnwrapped(FakeKMS):
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        data_key = super().unwrap(wrapped, binding, deadline)
        logger.debug("answer: %s", base64.urlsafe_b64encode(b'{"plaintext": "' + data_key + b'"}').decode())
        return data_key


@fails("shows_nothing")
class WarnsOfTheKey(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        warnings.warn(f"the key is {data_key!r}", stacklevel=2)
        return super().wrap(data_key, binding, deadline)


@fails("shows_nothing")
class PrintsTheKey(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        print(int.from_bytes(data_key, "big"))  # noqa: T201 - that is what is wrong with it
        return super().wrap(data_key, binding, deadline)


@fails("shows_nothing")
class PrintsTheKeyInAChildProcess(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        if self.calls["wrap"] == 0:
            subprocess.run(["/bin/sh", "-c", f"echo {data_key.hex(':').upper()} >&2"], check=True)
        return super().wrap(data_key, binding, deadline)


@fails("shows_nothing")
class ShowsTheKeyInItsRepr(FakeKMS):
    newest = b""

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        self.newest = data_key
        return super().wrap(data_key, binding, deadline)

    def __repr__(self) -> str:
        return f"<{self.name} newest={self.newest!r}>"


@fails("shows_nothing")
class ShowsItsCredentialInItsRepr(FakeKMS):
    def __repr__(self) -> str:
        return f"<{self.name} token={CREDENTIAL}>"


@fails("shows_nothing")
class ShowsItsCredentialInALog(FakeKMS):
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        logger.debug("Authorization: Basic %s", base64.b64encode(f"user:{CREDENTIAL}".encode()).decode())
        return super().unwrap(wrapped, binding, deadline)


@fails("shows_nothing")
class ShowsItsCredentialWhenItIsExamined(FakeKMS):
    def examine(self, deadline: Deadline) -> Iterable[Finding]:
        return [Finding("credentials", Level.GOOD, f"{CREDENTIAL} is valid")]


@fails("cannot_be_pickled")
class CanBePickled(FakeKMS):
    def __reduce__(self) -> Any:
        return type(self), (self.name,)


@fails("cannot_be_pickled")
class CanBeCopied(FakeKMS):
    def __copy__(self) -> FakeKMS:
        return FakeKMS(self.name)


# --- Threads and processes --------------------------------------------------------------------------------------------


@fails("threads")
class IsForOneThread(FakeKMS):
    current = b""

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        self.current = data_key
        time.sleep(0.005)  # while it waits for an answer, say
        return super().wrap(self.current, binding, deadline)


class OfOneProcess(FakeKMS):
    def __init__(self) -> None:
        super().__init__()
        self.process_id = os.getpid()

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        if os.getpid() != self.process_id:
            self.elsewhere()
        return super().unwrap(wrapped, binding, deadline)

    def elsewhere(self) -> None:
        raise RuntimeError


@fails("fork")
class RefusesAfterAFork(OfOneProcess):
    pass


@fails("fork")
class HangsAfterAFork(OfOneProcess):
    def elsewhere(self) -> None:
        threading.Event().wait()


@fails("fork")
class CrashesAfterAFork(OfOneProcess):
    def elsewhere(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@fails("leaves_nothing_behind")
class LeavesAThread(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        if not self.calls:
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        return super().wrap(data_key, binding, deadline)


@fails("leaves_nothing_behind")
class LeavesAConnection(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        if not self.calls:
            self.connected = socket.socketpair()
        return super().wrap(data_key, binding, deadline)


@fails("leaves_nothing_behind")
class LeavesAChild(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        if not self.calls:
            # It ends with this process, whose end of the pipe is then closed.
            self.child = subprocess.Popen(
                [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        return super().wrap(data_key, binding, deadline)


# --- Time -------------------------------------------------------------------------------------------------------------


@fails("deadline_that_has_passed")
class DoesNotLookAtTheDeadline(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        return super().wrap(data_key, binding, Deadline(60))


@fails("deadline_that_has_passed")
class LooksAtTheDeadlineAfterwards(FakeKMS):
    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        if raised_by(lambda: deadline.remaining(self.name)):
            time.sleep(2 * conformance.GRACE)  # while the KMS is asked
        return super().unwrap(wrapped, binding, deadline)


class WithoutAnAnswer(FakeKMS):
    def _answer(self, operation: str) -> None:
        if self.down:
            self.wait()
        super()._answer(operation)

    def wait(self) -> None:
        raise NotImplementedError


@fails("kms_that_does_not_answer")
class HasATimeoutOfItsOwn(WithoutAnAnswer):
    def wait(self) -> None:
        time.sleep(UNANSWERED + 2 * conformance.GRACE)


@fails("kms_that_does_not_answer", "errors", "shows_nothing")
class WaitsForEver(WithoutAnAnswer):
    def wait(self) -> None:
        threading.Event().wait()


@fails("kms_that_does_not_answer")
class TakesNoAnswerForADenial(WithoutAnAnswer):
    def wait(self) -> None:
        raise ProviderDeniedError("You shall not pass.", provider=self.name)


@fails("name")
class HasANameThatNoVariableHolds(FakeKMS):
    def __init__(self) -> None:
        super().__init__("Acme KMS")


@fails("life")
class CannotRewrap(FakeKMS):
    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        wrapped = super().wrap(data_key, binding, deadline)
        if b"row-mac" in binding:
            raise ProviderResponseError("It knows no such keyring.", provider=self.name)
        return wrapped
