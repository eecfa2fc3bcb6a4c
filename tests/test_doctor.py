"""A configuration examined before it is rolled out, with a KMS that has switches for what can be wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sqlalchemy_kravn_crypto.doctor import examine, worst
from sqlalchemy_kravn_crypto.exceptions import CredentialExpiredError, ProviderDeniedError, ProviderUnavailableError
from sqlalchemy_kravn_crypto.providers.base import Deadline, Finding, KeyProvider, Level, WrappedKey
from sqlalchemy_kravn_crypto.providers.findings import bad, good, warning
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.testing import FakeKMS
from tests.leaks import found_in
from tests.misbehaving_kms import MisbehavingKMS

MARK = "MARKER-of-the-secret-with-enough-characters-to-be-strong"
PINNED = "0123456789abcdef"


class Examined(MisbehavingKMS):
    """A KMS that has something to say of itself."""

    def __init__(self, examine: Callable[[Deadline], Iterable[Any]]) -> None:
        super().__init__()
        self._examine = examine

    def examine(self, deadline: Deadline) -> Iterable[Finding]:
        return self._examine(deadline)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    def make(**values: Any) -> Settings:
        return Settings(**{"data_dir": tmp_path / "data", "secret": MARK, **values})

    return make


def of(findings: Iterable[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


def the(findings: Iterable[Finding], subject: str) -> Finding:
    (finding,) = of(findings, subject)
    return finding


def levels(findings: Iterable[Finding]) -> dict[str, Level]:
    """Return the worst level of each subject."""
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.subject, []).append(finding)
    return {subject: worst(of_subject) for subject, of_subject in found.items()}


# --- What is well ----------------------------------------------------------------------------------------------------


def test_all_is_well(settings: Callable[..., Settings]) -> None:
    kms = FakeKMS()
    found = examine(settings=settings(), provider=kms)
    assert levels(found) == dict.fromkeys(["settings", "provider", "wrap", "unwrap", "binding", "deadline"], Level.GOOD)
    assert kms.calls == {"wrap": 1, "unwrap": 2}
    assert "fake/master-key:v1" in the(found, "wrap").message
    assert all(finding.advice == "" for finding in found)


def test_without_a_kms_there_is_nothing_to_ask(settings: Callable[..., Settings]) -> None:
    found = examine(settings=settings())
    assert levels(found) == {"settings": Level.GOOD, "provider": Level.GOOD}
    assert "KRAVN_SECRET" in the(found, "provider").message


def test_a_kms_that_binds_nothing_is_not_asked_under_another_binding(settings: Callable[..., Settings]) -> None:
    kms = MisbehavingKMS(authenticates=False, binds=False)
    found = examine(settings=settings(), provider=kms)
    assert worst(found) is Level.GOOD
    assert kms.calls == {"wrap": 1, "unwrap": 1}
    assert "nothing" in the(found, "binding").message


def test_how_long_the_operations_took_of_how_long_they_may(settings: Callable[..., Settings]) -> None:
    moments = iter([0.0, 1.0, 10.0, 12.5, 20.0, 21.0, 30.0, 34.0, 40.0, 41.0])
    found = examine(settings=settings(kms_timeout=10), provider=FakeKMS(), clock=lambda: next(moments))
    finding = the(found, "deadline")
    assert finding.level is Level.GOOD
    assert [word in finding.message for word in ("10 s", "wrap took 2.500 s", "unwrap 4.000 s")] == [True] * 3


@pytest.mark.parametrize("slow", ["wrap", "unwrap"])
def test_little_room_in_the_deadline_is_a_warning(settings: Callable[..., Settings], slow: str) -> None:
    took = {"wrap": 1.0, "unwrap": 1.0} | {slow: 5.001}
    steps = [0.0, 0.0, 0.0, took["wrap"], 0.0, 0.0, 0.0, took["unwrap"], 0.0, 0.0]
    moments = iter(steps)
    found = examine(settings=settings(kms_timeout=10), provider=FakeKMS(), clock=lambda: next(moments))
    finding = the(found, "deadline")
    assert finding.level is Level.WARNING
    assert "5.001 s" in finding.message
    assert worst(found) is Level.WARNING


# --- The settings ----------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    def set_(**variables: str) -> None:
        given = {"SECRET": MARK, "DATA_DIR": str(tmp_path / "data")} | variables
        for name, value in given.items():
            monkeypatch.setenv(f"KRAVN_{name}", value)

    return set_


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"KMS_PROVIDER": "vault"}, "KRAVN_KMS_VAULT_ADDR"),
        ({"KMS_TIMEOUT": "MARKER"}, "KRAVN_KMS_TIMEOUT"),
        ({"KMS_TIMEOUTS": "MARKER"}, "Did you mean KRAVN_KMS_TIMEOUT?"),
        ({"SECRET": "MARKER"}, "too short"),
    ],
)
def test_settings_that_are_wrong_leave_the_rest_unchecked(
    environment: Callable[..., None], variables: dict[str, str], word: str
) -> None:
    environment(**variables)
    found = examine()
    assert the(found, "settings").level is Level.BAD
    assert word in the(found, "settings").message
    for subject in ("provider", "wrap"):
        assert the(found, subject).level is Level.WARNING
        assert the(found, subject).message.startswith("Not checked: ")
    assert len(found) == 3
    assert found_in(repr(found), "MARKER") == []


def test_a_name_that_is_no_setting_and_a_secret_that_is_weak_are_warned_of(environment: Callable[..., None]) -> None:
    environment(SECRET=MARK[:20], COLOUR="MARKER-red")
    found = examine()
    assert [finding.level for finding in of(found, "settings")].count(Level.WARNING) == 2
    assert worst(found) is Level.WARNING
    said = repr(found)
    assert "KRAVN_COLOUR" in said
    assert "fewer than 32 characters" in said
    assert found_in(said, "MARKER") == []


def test_a_setting_of_the_kms_that_is_malformed_is_told_of_the_provider(environment: Callable[..., None]) -> None:
    variables = {"KMS_PROVIDER": "vault", "KMS_VAULT_ADDR": "MARKER", "KMS_VAULT_TOKEN": "t", "KMS_VAULT_KEY": "k"}
    environment(**variables)
    found = examine()
    assert levels(found) == {"settings": Level.GOOD, "provider": Level.BAD, "wrap": Level.WARNING}
    assert "KRAVN_KMS_VAULT_ADDR" in the(found, "provider").message
    assert found_in(repr(found), "MARKER") == []


def test_an_extra_that_is_not_installed_is_told_of_the_provider(environment: Callable[..., None]) -> None:
    environment(KMS_PROVIDER="vault", KMS_VAULT_ADDR="https://v", KMS_VAULT_TOKEN="t", KMS_VAULT_KEY="k")
    program = (
        "import sys; sys.modules['hvac'] = None\n"
        "from sqlalchemy_kravn_crypto.doctor import examine\n"
        "print(*[finding.message for finding in examine() if finding.level == 'bad'], sep='\\n')"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert "sqlalchemy-kravn-crypto[vault]" in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("authenticates", "pinned", "level", "word"),
    [
        (True, frozenset(), Level.GOOD, "wrapped by vault"),
        (False, frozenset({PINNED}), Level.GOOD, "KRAVN_KMS_PINNED_KEYS"),
        (False, frozenset(), Level.BAD, "KRAVN_SECRET"),
    ],
)
def test_without_a_secret_something_else_must_tell_what_is_genuine(
    settings: Callable[..., Settings], *, authenticates: bool, pinned: frozenset[str], level: Level, word: str
) -> None:
    kms = MisbehavingKMS(authenticates=authenticates)
    found = examine(settings=settings(secret=None, kms_pinned_keys=pinned), provider=kms)
    assert levels(found)["settings"] is level
    assert word in of(found, "settings")[-1].message


def test_a_secret_in_a_file_does_as_well(settings: Callable[..., Settings], secret_file: Path) -> None:
    kms = MisbehavingKMS(authenticates=False)
    found = examine(settings=settings(secret=None), provider=kms)
    assert worst(found) is Level.GOOD
    assert str(secret_file) in the(found, "secret.key").message


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "secret.key"
    path.parent.mkdir()
    path.write_text("ab" * 32)
    path.chmod(0o600)
    return path


def test_a_secret_file_that_every_user_can_read(settings: Callable[..., Settings], secret_file: Path) -> None:
    secret_file.chmod(0o604)
    finding = the(examine(settings=settings(secret=None)), "secret.key")
    assert finding.level is Level.BAD
    assert f"chmod 600 {secret_file}" in finding.message


def test_a_secret_file_that_holds_something_else(settings: Callable[..., Settings], secret_file: Path) -> None:
    secret_file.write_text("MARKER")
    found = examine(settings=settings(secret=None))
    assert the(found, "secret.key").level is Level.BAD
    assert found_in(repr(found), "MARKER") == []


def test_a_secret_file_that_a_first_boot_is_to_make(settings: Callable[..., Settings], tmp_path: Path) -> None:
    finding = the(examine(settings=settings(secret=None)), "secret.key")
    assert finding.level is Level.WARNING
    assert str(tmp_path / "data" / "secret.key") in finding.message
    assert not (tmp_path / "data").exists()


def test_a_secret_file_that_a_first_boot_cannot_make(settings: Callable[..., Settings], tmp_path: Path) -> None:
    # Root may write everywhere but here.
    directory = Path("/proc/sys") if os.geteuid() == 0 else tmp_path
    tmp_path.chmod(0o500)
    found = examine(settings=settings(secret=None, data_dir=directory / "data"))
    tmp_path.chmod(0o700)
    assert the(found, "secret.key").level is Level.BAD
    assert "may not make it" in the(found, "secret.key").message


def test_a_data_directory_that_is_none(settings: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "data").write_text("MARKER")
    assert the(examine(settings=settings(secret=None)), "secret.key").level is Level.BAD


def test_with_a_kms_no_secret_file_is_looked_for(environment: Callable[..., None]) -> None:
    environment(
        SECRET="", KMS_PROVIDER="vault", KMS_VAULT_ADDR="http://127.0.0.1:1", KMS_VAULT_TOKEN="t", KMS_VAULT_KEY="k"
    )
    assert of(examine(), "secret.key") == []


# --- The KMS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["down", "sealed", "denies"])
def test_a_kms_that_does_not_wrap(settings: Callable[..., Settings], switch: str) -> None:
    kms = FakeKMS()
    setattr(kms, switch, True)
    found = examine(settings=settings(), provider=kms)
    assert the(found, "wrap").level is Level.BAD
    assert "switched" in the(found, "wrap").message
    assert the(found, "unwrap").level is Level.WARNING
    assert the(found, "unwrap").message.startswith("Not checked: ")
    assert kms.calls == {"wrap": 1}


def test_a_kms_that_does_not_answer_is_left_at_the_deadline(settings: Callable[..., Settings]) -> None:
    kms = FakeKMS()
    answer = threading.Event()
    kms.slow = answer
    found = examine(settings=settings(kms_timeout=0.05), provider=kms)
    answer.set()
    assert the(found, "wrap").level is Level.BAD
    assert "within 0.05 seconds" in the(found, "wrap").message


class OnUnwrap(MisbehavingKMS):
    """A KMS that fails when it is asked to unwrap, from a given time on."""

    def __init__(self, error: Exception, after: int = 0) -> None:
        super().__init__()
        self._error = error
        self._after = after

    def _answer(self, operation: str) -> None:
        super()._answer(operation)
        if operation == "unwrap" and self.calls["unwrap"] > self._after:
            raise self._error


def test_a_kms_that_does_not_unwrap(settings: Callable[..., Settings]) -> None:
    found = examine(settings=settings(), provider=OnUnwrap(ProviderDeniedError("No right to unwrap.")))
    assert the(found, "wrap").level is Level.GOOD
    assert the(found, "unwrap") == bad("unwrap", "No right to unwrap.")
    # That a policy allows this binding alone cannot be told from its allowing none.
    assert the(found, "deadline").level is Level.GOOD


def test_a_kms_that_unwraps_to_something_else(settings: Callable[..., Settings]) -> None:
    kms = FakeKMS()
    kms.returns_another_key = True
    found = examine(settings=settings(), provider=kms)
    assert the(found, "unwrap").level is Level.BAD
    assert "another key" in the(found, "unwrap").message


def test_a_kms_that_ignores_the_binding(settings: Callable[..., Settings]) -> None:
    kms = MisbehavingKMS()
    kms.ignores_binding = True
    found = examine(settings=settings(), provider=kms)
    assert the(found, "unwrap").level is Level.GOOD
    assert the(found, "binding").level is Level.BAD


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (ProviderDeniedError("The policy pins the binding."), Level.GOOD),
        (ProviderUnavailableError("It is down by now."), Level.WARNING),
        (CredentialExpiredError("The token has expired by now."), Level.WARNING),
    ],
)
def test_only_a_refusal_shows_that_the_binding_is_enforced(
    settings: Callable[..., Settings], error: Exception, level: Level
) -> None:
    found = examine(settings=settings(), provider=OnUnwrap(error, after=1))
    assert the(found, "unwrap").level is Level.GOOD
    assert the(found, "binding").level is level


@pytest.mark.parametrize(
    ("provision", "error", "level"),
    [
        ("never", ProviderDeniedError("No right to wrap."), Level.WARNING),
        ("auto", ProviderDeniedError("No right to wrap."), Level.BAD),
        ("never", CredentialExpiredError("The token has expired."), Level.BAD),
        ("never", ProviderUnavailableError("It is down."), Level.BAD),
    ],
)
def test_who_makes_no_data_keys_needs_no_right_to_wrap(
    settings: Callable[..., Settings], provision: str, error: Exception, level: Level
) -> None:
    kms = MisbehavingKMS()
    kms.raises = error
    finding = the(examine(settings=settings(kms_provision=provision), provider=kms), "wrap")
    assert finding.level is level
    assert str(error) in finding.message


# --- The KMS of somebody else ----------------------------------------------------------------------------------------


class Foreign(KeyProvider):
    """A provider that keeps to no contract."""

    name = "acme"

    def __init__(self, *, wrapped: Any = None, unwrapped: Any = None, recognises: Any = True) -> None:
        self._wrapped = wrapped
        self._unwrapped = unwrapped
        self._recognises = recognises

    def recognises(self, master_key: str) -> bool:
        if isinstance(self._recognises, Exception):
            raise self._recognises
        return bool(self._recognises)

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> Any:
        return _given(self._wrapped)

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> Any:
        return _given(self._unwrapped)


def _given(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


WRAPPED = WrappedKey("acme", b"blob")


@pytest.mark.parametrize(
    ("foreign", "subject"),
    [
        (Foreign(wrapped=None), "wrap"),
        (Foreign(wrapped=b"MARKER"), "wrap"),
        (Foreign(wrapped=KeyError("MARKER")), "wrap"),
        (Foreign(wrapped=WRAPPED, unwrapped="MARKER"), "unwrap"),
        (Foreign(wrapped=WRAPPED, unwrapped=None), "unwrap"),
        (Foreign(wrapped=WRAPPED, unwrapped=ValueError("MARKER")), "unwrap"),
        (Foreign(wrapped=WRAPPED, unwrapped=b"", recognises=False), "wrap"),
        (Foreign(wrapped=WRAPPED, unwrapped=b"", recognises=ValueError("MARKER")), "wrap"),
    ],
)
def test_a_provider_that_breaks_its_contract_is_told_of(
    settings: Callable[..., Settings], foreign: Foreign, subject: str
) -> None:
    found = examine(settings=settings(), provider=foreign)
    assert the(found, subject).level is Level.BAD
    assert "defect of the provider" in the(found, subject).message + the(found, subject).advice
    assert found_in(repr(found), "MARKER") == []


def test_what_a_provider_finds_is_told_and_keeps_the_wrap_from_being_tried(settings: Callable[..., Settings]) -> None:
    said = [bad("reachability", "No way there."), warning("credentials", "Soon over."), good("clock", "Right.")]
    kms = Examined(lambda _: said)
    found = examine(settings=settings(), provider=kms)
    assert [finding for finding in found if finding in said] == said
    assert "reachability" in the(found, "wrap").message
    assert the(found, "wrap").level is Level.WARNING
    assert not kms.calls


@pytest.mark.parametrize("finding", [warning("reachability", "Slow."), bad("rights", "May also delete the key.")])
def test_what_a_wrap_does_not_need_does_not_keep_it_from_being_tried(
    settings: Callable[..., Settings], finding: Finding
) -> None:
    kms = Examined(lambda _: [finding])
    found = examine(settings=settings(), provider=kms)
    assert finding in found
    assert the(found, "wrap").level is Level.GOOD


def test_what_was_found_before_it_failed_counts(settings: Callable[..., Settings]) -> None:
    def fails(_: Deadline) -> Iterator[Finding]:
        yield good("clock", "Right.")
        raise ProviderUnavailableError("Gone.")

    found = examine(settings=settings(), provider=Examined(fails))
    assert the(found, "clock").level is Level.GOOD
    assert the(found, "vault") == warning("vault", "Not checked: Gone.")
    assert the(found, "wrap").level is Level.GOOD


def test_what_was_found_within_the_deadline_counts(settings: Callable[..., Settings]) -> None:
    goes_on = threading.Event()

    def hangs(_: Deadline) -> Iterator[Finding]:
        yield good("clock", "Right.")
        goes_on.wait()
        yield bad("credentials", "Too late to be told.")

    found = examine(settings=settings(kms_timeout=0.2), provider=Examined(hangs))
    goes_on.set()
    assert the(found, "clock").level is Level.GOOD
    assert "within 0.2 seconds" in the(found, "vault").message
    assert of(found, "credentials") == []


@pytest.mark.parametrize("findings", [["MARKER"], [good("clock", "Right."), None], None])
def test_what_is_no_finding_is_a_defect(settings: Callable[..., Settings], findings: Any) -> None:
    found = examine(settings=settings(), provider=Examined(lambda _: findings))
    assert "defect of the provider" in the(found, "vault").message
    assert found_in(repr(found), "MARKER") == []


def test_no_secret_is_in_what_is_found(settings: Callable[..., Settings]) -> None:
    keys: list[bytes] = []

    class Remembers(FakeKMS):
        def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
            keys.append(data_key)
            wrapped = super().wrap(data_key, binding, deadline)
            keys.append(wrapped.blob)
            return wrapped

    found = examine(settings=settings(secret_next=MARK[::-1]), provider=Remembers())
    assert len(keys) == 2
    assert found_in(repr(found), MARK, MARK[::-1], *keys) == []


def test_the_worst_of_the_levels() -> None:
    assert worst([]) is Level.GOOD
    assert worst([good("a", "a"), warning("b", "b")]) is Level.WARNING
    assert worst([bad("a", "a"), good("b", "b"), warning("c", "c")]) is Level.BAD
