"""A configuration examined before it is rolled out: what is well, what is not, and what to do about it.

Whatever can be found out is, whatever else fails; what rests on something that failed is said not to have been checked.
Nothing is changed, in the KMS or in the database, and no finding holds a secret or the text of an answer.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from cryptography.hazmat.primitives.constant_time import bytes_eq
from sqlalchemy import Engine

from .bootstrap import BootstrapSecret
from .configuration import provider_of, settings_from_environment
from .database_checks import check_database
from .derivation import KEY_SIZE, key_id_of
from .exceptions import (
    CredentialExpiredError,
    KravnCryptoError,
    ProviderDeniedError,
    ProviderError,
    UnwrapRefusedError,
)
from .keystore import NO_PROVIDER
from .providers.base import Deadline, Finding, KeyProvider, Level, WrappedKey, run_within
from .providers.findings import CREDENTIALS, REACHABILITY, TLS, bad, good, unchecked, warning
from .rows import KEYRING
from .wrapping import binding

if TYPE_CHECKING:
    from .settings import Settings

T = TypeVar("T")

SETTINGS: Final = "settings"
SECRET_FILE: Final = "secret.key"  # noqa: S105 - a name
PROVIDER: Final = "provider"
WRAP: Final = "wrap"
UNWRAP: Final = "unwrap"
BINDING: Final = "binding"
DEADLINE: Final = "deadline"

_NEEDED: Final = frozenset({REACHABILITY, TLS, CREDENTIALS})
"""Where one of these is bad, there is no use in asking for a wrap."""

_LEAST_ROOM: Final = 2
"""So many times what an operation took should fit into ``KRAVN_KMS_TIMEOUT``: it takes longer on a bad day."""

_ORDER: Final = (Level.GOOD, Level.WARNING, Level.BAD)


def examine(
    engine: Engine | None = None,
    settings: Settings | None = None,
    *,
    provider: KeyProvider | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Finding]:
    """Examine a configuration. Nothing is changed by it.

    A throw-away key is wrapped and unwrapped. With a database, everything that a boot does is tried as well.

    :param engine: of the database that holds, or will hold, the key store; without one, that is left out.
    :param settings: instead of those from the environment.
    :param provider: the KMS, in place of the one that the settings name.
    :param clock: the seconds by which the operations of the KMS are measured.
    """
    found: list[Finding] = []
    settings = settings or _attempted(found, SETTINGS, settings_from_environment)
    found += _unknown_settings(found)
    if settings is None:
        found += [unchecked(subject, "the settings are wrong.") for subject in (PROVIDER, WRAP)]
    else:
        found += _settings(settings)
        has_secret = settings.secret is not None or _has_secret_file(found, settings)
        provider = _provider(found, settings, provider)
        if provider is not None and not has_secret:
            found.append(_custody(settings, provider))
        if provider is not None:
            found += _kms(_Kms(provider, settings.kms_timeout, clock), settings)
    if engine is not None:
        found += check_database(engine, settings, provider)
    return found


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level among findings; good, if there are none."""
    return max((finding.level for finding in findings), key=_ORDER.index, default=Level.GOOD)


def _attempted(found: list[Finding], subject: str, function: Callable[[], T]) -> T | None:
    try:
        return function()
    except KravnCryptoError as error:
        found.append(bad(subject, str(error)))
    return None


# --- The settings ----------------------------------------------------------------------------------------------------


def _unknown_settings(found: list[Finding]) -> Iterator[Finding]:
    from .settings import unknown_variables  # noqa: PLC0415 - pydantic is slow to import

    for name in unknown_variables(os.environ):
        # One that almost is a setting has been refused already.
        if not any(name in finding.message.split() for finding in found):
            yield warning(SETTINGS, f"{name} is no setting, and is ignored.", "Correct or unset it.")


def _settings(settings: Settings) -> Iterator[Finding]:
    yield good(SETTINGS, f"Read, and valid: KRAVN_KMS_PROVIDER={settings.kms_provider}.")
    for weakness in settings.weaknesses():
        yield warning(SETTINGS, weakness)


def _has_secret_file(found: list[Finding], settings: Settings) -> bool:
    """Look at ``secret.key``, which is in the place of ``KRAVN_SECRET``."""
    path = settings.secret_file
    before = len(found)
    secret = _attempted(found, SECRET_FILE, lambda: BootstrapSecret.from_file(path))
    if secret is not None:
        found.append(good(SECRET_FILE, f"{path} can be read, and not by every user."))
    elif len(found) == before and settings.kms_provider == NO_PROVIDER:
        found.append(_to_be_made(path))
    return secret is not None


def _to_be_made(path: Path) -> Finding:
    directory = next(parent for parent in path.parents if parent.exists())
    if os.access(directory, os.W_OK | os.X_OK):
        return warning(
            SECRET_FILE,
            f"There is no {path}. The first boot makes it, and whatever is encrypted is lost with it.",
            "Set KRAVN_SECRET, or let KRAVN_DATA_DIR be a directory that outlives this machine.",
        )
    return bad(
        SECRET_FILE,
        f"There is no {path}, and this process may not make it.",
        "Set KRAVN_SECRET, or let KRAVN_DATA_DIR be a directory that it can write.",
    )


def _provider(found: list[Finding], settings: Settings, given: KeyProvider | None) -> KeyProvider | None:
    """Return the KMS, if there is one and it can be made of the settings."""
    before = len(found)
    made = given or _attempted(found, PROVIDER, lambda: provider_of(settings))
    if made is not None:
        found.append(good(PROVIDER, f"The provider {made.name} can be made of the settings."))
    elif len(found) == before:
        found.append(good(PROVIDER, "None: the data key comes from KRAVN_SECRET or secret.key."))
    else:
        found.append(unchecked(WRAP, "there is no provider."))
    return made


def _custody(settings: Settings, provider: KeyProvider) -> Finding:
    """Find out what tells whether the rows of the key table are genuine, where there is no secret."""
    if provider.authenticates:
        return good(SETTINGS, f"Without KRAVN_SECRET, what authenticates the key table is wrapped by {provider.name}.")
    if settings.kms_pinned_keys:
        return good(SETTINGS, "Without KRAVN_SECRET, only the data keys in KRAVN_KMS_PINNED_KEYS are loaded.")
    return bad(
        SETTINGS,
        f"Nothing would tell whether the rows of kms_keys are genuine: there is no KRAVN_SECRET, and {provider.name} "
        "does not authenticate who wrapped a key.",
        "Set KRAVN_SECRET, or name the key ids in KRAVN_KMS_PINNED_KEYS.",
    )


# --- The KMS ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """What came of an operation: a result, or why there is none."""

    result: T | None
    error: ProviderError | None
    seconds: float


@dataclass(frozen=True, slots=True)
class _Kms:
    """A KMS that is asked with patience for one operation at a time."""

    provider: KeyProvider
    timeout: float
    clock: Callable[[], float]

    def ask(self, operation: Callable[[Deadline], T], expected: type[T]) -> _Outcome[T]:
        """Do one operation.

        :param expected: what it returns; a provider may be anybody's.
        """
        deadline = Deadline(self.timeout)

        def checked() -> T:
            result = operation(deadline)
            if not isinstance(result, expected):
                raise TypeError
            return result

        started = self.clock()
        try:
            (result,) = run_within(deadline, self.provider.name, [checked])
        except ProviderError as error:
            return _Outcome(None, error, self.clock() - started)
        return _Outcome(result, None, self.clock() - started)


def _kms(kms: _Kms, settings: Settings) -> Iterator[Finding]:
    examined = _examined(kms)
    yield from examined
    failed = sorted({finding.subject for finding in examined if finding.level is Level.BAD} & _NEEDED)
    if failed:
        yield unchecked(WRAP, f"see {' and '.join(failed)}.")
    else:
        yield from _round_trip(kms, may_lack_wrap=settings.kms_provision.value == "never")


def _examined(kms: _Kms) -> list[Finding]:
    """Let the provider examine itself; what it found before it failed counts."""
    found: list[Finding] = []

    def collect(deadline: Deadline) -> bool:
        for finding in kms.provider.examine(deadline):
            if not isinstance(finding, Finding):
                raise TypeError
            found.append(finding)
        return True

    error = kms.ask(collect, bool).error
    # A copy, since one that is late goes on in its thread.
    return found if error is None else [*found, unchecked(kms.provider.name, str(error))]


def _round_trip(kms: _Kms, *, may_lack_wrap: bool) -> Iterator[Finding]:
    """Wrap a key that is thrown away, and unwrap it, under its binding and under another.

    :param may_lack_wrap: whether the process does without the right to wrap.
    """
    provider, key, deployment_id = kms.provider, os.urandom(KEY_SIZE), str(uuid.uuid4())
    bound = binding(KEYRING, deployment_id, key_id_of(key))
    wrap = kms.ask(lambda deadline: provider.wrap(key, bound, deadline), WrappedKey)
    yield _wrap_finding(kms, wrap, may_lack_wrap=may_lack_wrap)
    wrapped = wrap.result
    if wrapped is None:
        yield unchecked(UNWRAP, "there is nothing to unwrap.", "With --url, what is in the database is unwrapped.")
        return
    unwrap = kms.ask(lambda deadline: provider.unwrap(wrapped, bound, deadline), bytes)
    yield _unwrap_finding(unwrap, key)
    yield _binding_finding(kms, wrapped, binding(KEYRING, str(uuid.uuid4()), key_id_of(key)))
    yield _deadline_finding(kms.timeout, wrap.seconds, None if unwrap.error else unwrap.seconds)


def _wrap_finding(kms: _Kms, wrap: _Outcome[WrappedKey], *, may_lack_wrap: bool) -> Finding:
    error, wrapped = wrap.error, wrap.result
    if wrapped is None:
        is_meant = isinstance(error, ProviderDeniedError) and not isinstance(error, CredentialExpiredError)
        if may_lack_wrap and is_meant:
            return warning(
                WRAP,
                f"Refused, which is as it should be where KRAVN_KMS_PROVISION=never, if it is for want of the right to "
                f"wrap alone: {error}",
            )
        return bad(WRAP, str(error))
    if not kms.ask(lambda _: kms.provider.recognises(wrapped.master_key), bool).result:
        return bad(
            WRAP,
            f"{kms.provider.name} does not recognise the master key that it has just wrapped under.",
            "This is a defect of the provider; report it there.",
        )
    return good(WRAP, f"A key was wrapped under {wrapped.master_key}.")


def _unwrap_finding(unwrap: _Outcome[bytes], key: bytes) -> Finding:
    if unwrap.result is None:
        return bad(UNWRAP, str(unwrap.error))
    if not bytes_eq(unwrap.result, key):
        return bad(UNWRAP, "What was unwrapped is another key.", "Check that the address is really that of your KMS.")
    return good(UNWRAP, "It was unwrapped to the same.")


def _binding_finding(kms: _Kms, wrapped: WrappedKey, other: bytes) -> Finding:
    if not kms.provider.binds:
        return good(BINDING, "This KMS binds a wrapped key to nothing; the key table has its own protection for that.")
    error = kms.ask(lambda deadline: kms.provider.unwrap(wrapped, other, deadline), bytes).error
    if error is None:
        return bad(
            BINDING,
            "It was unwrapped under another binding, too.",
            "Use a master key of an authenticated type that takes associated data (Transit: aes256-gcm96).",
        )
    is_refused = isinstance(error, UnwrapRefusedError | ProviderDeniedError)
    if is_refused and not isinstance(error, CredentialExpiredError):
        return good(BINDING, "Under another binding it was refused, as it must be.")
    return unchecked(BINDING, str(error))


def _deadline_finding(timeout: float, wrap: float, unwrap: float | None) -> Finding:
    took = f"wrap took {wrap:.3f} s" + ("" if unwrap is None else f", unwrap {unwrap:.3f} s")
    message = f"Of the {timeout:g} s of KRAVN_KMS_TIMEOUT, {took}."
    if _LEAST_ROOM * max(wrap, unwrap or 0.0) > timeout:
        return warning(
            DEADLINE, message, "Allow for more, or find out why the KMS is slow: it does not always answer so soon."
        )
    return good(DEADLINE, message)
