"""What is made of the answers that SoftHSM does not give: every code is an error that says what to do."""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from pkcs11 import exceptions as of_pkcs11

from sqlalchemy_kravn_crypto.exceptions import (
    CredentialError,
    CredentialExpiredError,
    MasterKeyNotFoundError,
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderError,
    ProviderUnavailableError,
    UnwrapRefusedError,
)
from sqlalchemy_kravn_crypto.providers import pkcs11_meanings
from sqlalchemy_kravn_crypto.providers.base import Deadline, Level, WrappedKey
from sqlalchemy_kravn_crypto.providers.pkcs11 import Pkcs11Provider
from sqlalchemy_kravn_crypto.providers.pkcs11_meanings import failure, findings, refusal, refused_the_pin

PATIENCE = 30.0
WORDS = {
    "module": "/usr/lib/hsm.so",
    "token": "'bank'",
    "master_key": "pkcs11:token=bank;object=kravn;type=secret-key",
    "recorded": "pkcs11:token=bank;object=kravn;type=secret-key;id=%01",
    "wanted": "labelled 'kravn'",
    "mechanism": "aes-gcm",
    "pin": "KRAVN_KMS_PKCS11_PIN",
}

LOGIN = [
    ("PinIncorrect", ProviderDeniedError, "KRAVN_KMS_PKCS11_PIN"),
    ("PinInvalid", ProviderDeniedError, "KRAVN_KMS_PKCS11_PIN"),
    ("PinLenRange", ProviderDeniedError, "KRAVN_KMS_PKCS11_PIN"),
    ("PinLocked", CredentialExpiredError, "security officer"),
    ("PinExpired", CredentialExpiredError, "Change it"),
    ("UserPinNotInitialized", ProviderDeniedError, "--init-pin"),
    ("UserAlreadyLoggedIn", ProviderUnavailableError, "Log them out"),
    ("AnotherUserAlreadyLoggedIn", ProviderUnavailableError, "Log them out"),
    ("UserTooManyTypes", ProviderUnavailableError, "Log them out"),
    ("SessionCount", ProviderUnavailableError, "Raise its limit"),
    ("DeviceRemoved", ProviderUnavailableError, "taken out"),
    ("TokenNotPresent", ProviderUnavailableError, "taken out"),
    ("DeviceError", ProviderUnavailableError, "health"),
    ("HostMemory", ProviderUnavailableError, "health"),
    ("GeneralError", ProviderUnavailableError, "health"),
    ("0x80000001", ProviderError, "0x80000001"),
    ("SomethingNew", ProviderError, "SomethingNew"),
]

USE = [
    ("MechanismInvalid", MasterKeyUnusableError, "KRAVN_KMS_PKCS11_MECHANISM"),
    ("FunctionNotSupported", MasterKeyUnusableError, "KRAVN_KMS_PKCS11_MECHANISM"),
    ("KeyTypeInconsistent", MasterKeyUnusableError, "KRAVN_KMS_PKCS11_MECHANISM"),
    ("MechanismParamInvalid", MasterKeyUnusableError, "aes-kwp"),
    ("ArgumentsBad", MasterKeyUnusableError, "aes-kwp"),
    ("OwnIV", MasterKeyUnusableError, "aes-kwp"),
    ("NotKWP", MasterKeyUnusableError, "aes-gcm"),
    ("NotPermitted", MasterKeyUnusableError, "CKA_ENCRYPT"),
    ("0x68", MasterKeyUnusableError, "CKA_ENCRYPT"),
    ("TemplateInconsistent", MasterKeyUnusableError, "object of the session"),
    ("KeyUnextractable", MasterKeyUnusableError, "object of the session"),
    ("UserNotLoggedIn", ProviderDeniedError, "whose key"),
    ("DeviceError", ProviderUnavailableError, "health"),
    ("DeviceRemoved", ProviderUnavailableError, "taken out"),
    ("SessionClosed", ProviderUnavailableError, "connection"),
]

AMBIGUOUS = ["GeneralError", "FunctionFailed"]
NOT_AUTHENTIC = [
    *AMBIGUOUS,
    "DataInvalid",
    "DataLenRange",
    "EncryptedDataInvalid",
    "EncryptedDataLenRange",
    "WrappedKeyInvalid",
    "WrappedKeyLenRange",
    "0x42",
]


def answers(stage: str, code: str) -> list[str]:
    """Return the command of a worker that answers this, whatever it is asked."""
    answer = json.dumps({"stage": stage, "code": code})
    return [sys.executable, "-I", "-S", "-c", f"input(); print({answer!r})"]


def provider(tmp_path: Path, stage: str, code: str) -> Pkcs11Provider:
    module = tmp_path / "hsm.so"
    module.touch()
    command = answers(stage, code)
    return Pkcs11Provider(module=module, token="bank", pin="1234", key="kravn", command=command)


@pytest.mark.parametrize(("code", "expected", "advice"), LOGIN)
def test_a_login_that_fails(tmp_path: Path, code: str, expected: type[ProviderError], advice: str) -> None:
    with pytest.raises(ProviderError, match=advice) as caught:
        provider(tmp_path, "login", code).wrap(os.urandom(32), b"", Deadline(PATIENCE))
    assert caught.type is expected
    assert caught.value.provider == "pkcs11"
    assert "1234" not in str(caught.value)


@pytest.mark.parametrize(("code", "expected", "advice"), USE)
@pytest.mark.parametrize("operation", ["wrap", "unwrap"])
def test_a_use_that_fails(code: str, expected: type[ProviderError], advice: str, operation: str) -> None:
    error = refusal({"stage": "use", "code": code}, operation, WORDS)
    assert type(error) is expected
    assert advice in str(error)


@pytest.mark.parametrize("code", NOT_AUTHENTIC)
def test_a_wrapped_key_that_is_not_authentic(tmp_path: Path, code: str) -> None:
    refuses = provider(tmp_path, "use", code)
    wrapped = WrappedKey(refuses.master_key + ";id=%01", b"\x01" + bytes(60))
    with pytest.raises(UnwrapRefusedError, match="altered"):
        refuses.unwrap(wrapped, b"", Deadline(PATIENCE))


@pytest.mark.parametrize("code", AMBIGUOUS)
@pytest.mark.parametrize(("stage", "operation"), [("use", "wrap"), ("key", "unwrap"), ("close", "unwrap")])
def test_a_general_error_elsewhere_is_not_taken_for_that(code: str, stage: str, operation: str) -> None:
    error = refusal({"stage": stage, "code": code}, operation, WORDS)
    assert type(error) is ProviderUnavailableError


@pytest.mark.parametrize("code", ["GeneralError", "DeviceError", "ArgumentsBad", "PKCS11Error", "0x80000001"])
def test_a_library_that_does_not_start(code: str) -> None:
    error = refusal({"stage": "library", "code": code}, "wrap", WORDS)
    assert type(error) is ProviderUnavailableError
    assert "its own configuration" in str(error)


def test_no_key_is_told_apart_from_no_token() -> None:
    for code, expected in (("NoKey", MasterKeyNotFoundError), ("NoSuchToken", MasterKeyNotFoundError)):
        assert type(refusal({"stage": "key", "code": code}, "wrap", WORDS)) is expected
    assert type(refusal({"stage": "token", "code": "NoToken"}, "wrap", WORDS)) is ProviderUnavailableError


def test_every_name_that_has_a_meaning_is_one_of_python_pkcs11_or_the_worker() -> None:
    names = {name for name, _ in inspect.getmembers(of_pkcs11, inspect.isclass)}
    worker = Path(inspect.getfile(pkcs11_meanings)).with_name("pkcs11_worker.py").read_text(encoding="utf-8")
    for code in pkcs11_meanings._BY_CODE:
        assert code in names or f'"{code}"' in worker or code.startswith("0x"), code


def test_what_a_worker_says_is_shown_only_if_it_is_a_name() -> None:
    shown = str(refusal({"stage": "a b", "code": "a\nb", "detail": ["x"], "ids": "x"}, "wrap", WORDS))
    assert "a\nb" not in shown
    assert "a b" not in shown


def test_what_the_loader_says_is_printable_and_short() -> None:
    answer = {"stage": "library", "code": "NotLoaded", "detail": "a\x1b[31m\n" + "b" * 10_000}
    shown = str(refusal(answer, "wrap", WORDS))
    assert shown.isprintable()
    assert len(shown) < 1_000


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ({"stage": "login", "code": "PinIncorrect"}, True),
        ({"stage": "login", "code": "PinInvalid"}, True),
        ({"stage": "login", "code": "PinLenRange"}, True),
        ({"stage": "login", "code": "DeviceError"}, False),
        ({"stage": "login", "code": "PinLocked"}, False),
        ({"stage": "token", "code": "PinIncorrect"}, False),
        ({"stage": "key", "code": "NoKey"}, False),
        ({"value": "", "key_id": "01"}, False),
        ({"stage": ["login"], "code": ["PinIncorrect"]}, False),
        ({}, False),
    ],
)
def test_which_answers_tell_that_the_pin_was_wrong(answer: dict[str, Any], refused: bool) -> None:  # noqa: FBT001 - what is expected
    assert refused_the_pin(answer) is refused


GOOD = {
    "SENSITIVE": True,
    "EXTRACTABLE": False,
    "ALWAYS_SENSITIVE": True,
    "NEVER_EXTRACTABLE": True,
    "ENCRYPT": True,
    "DECRYPT": True,
    "WRAP": False,
    "UNWRAP": False,
    "MODIFIABLE": False,
    "DESTROYABLE": False,
    "VALUE_LEN": 32,
}


def found(attributes: dict[str, Any], *flags: str, model: str = "An HSM") -> list[tuple[str, Level]]:
    answer = {"attributes": attributes, "flags": list(flags), "model": model, "key_id": "01"}
    return [(finding.subject, finding.level) for finding in findings(answer, "aes-gcm")]


def of(subject: str, told: list[tuple[str, Level]]) -> list[Level]:
    return [level for about, level in told if about == subject]


def test_nothing_is_wrong() -> None:
    assert found(GOOD) == [(subject, Level.GOOD) for subject in ("reachability", "credentials", "rights")]


def test_what_the_hsm_does_not_tell_is_not_taken_for_good() -> None:
    assert of("rights", found(dict.fromkeys(GOOD))) == [Level.WARNING]
    assert of("rights", found({})) == [Level.WARNING]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], []),
        (["USER_PIN_COUNT_LOW"], [Level.WARNING]),
        (["USER_PIN_COUNT_LOW", "USER_PIN_FINAL_TRY"], [Level.WARNING]),
        (["USER_PIN_TO_BE_CHANGED"], [Level.WARNING]),
        (["USER_PIN_FINAL_TRY", "USER_PIN_TO_BE_CHANGED"], [Level.WARNING, Level.WARNING]),
        (["SOMETHING_ELSE"], []),
    ],
)
def test_what_the_token_tells_of_its_pin(flags: list[str], expected: list[Level]) -> None:
    assert of("credentials", found(GOOD, *flags)) == [Level.GOOD, *expected]


def test_softhsm_is_no_hsm() -> None:
    assert of("provider", found(GOOD, model="SoftHSM v2")) == [Level.WARNING]


def test_every_finding_that_is_not_good_says_what_to_do() -> None:
    wrong = {name: not value if isinstance(value, bool) else [16] for name, value in GOOD.items()}
    flags = ["USER_PIN_COUNT_LOW", "USER_PIN_FINAL_TRY", "USER_PIN_TO_BE_CHANGED"]
    for mechanism in ("aes-gcm", "aes-kwp"):
        answer = {"attributes": {**wrong, "ENCRYPT": True, "DECRYPT": True}, "flags": flags, "model": "SoftHSM v2"}
        told = [one for one in findings(answer, mechanism) if one.level is not Level.GOOD]
        assert len(told) >= 7
        assert all(one.advice for one in told)


@pytest.mark.parametrize(
    ("error", "subject"),
    [
        (ProviderDeniedError("text"), "credentials"),
        (CredentialExpiredError("text"), "credentials"),
        (CredentialError("text"), "credentials"),
        (MasterKeyNotFoundError("text"), "rights"),
        (MasterKeyUnusableError("text"), "rights"),
        (ProviderUnavailableError("text"), "reachability"),
        (ProviderError("text"), "reachability"),
    ],
)
def test_an_examination_that_fails(error: ProviderError, subject: str) -> None:
    assert [(one.subject, one.level, one.message) for one in failure(error)] == [(subject, Level.BAD, "text")]
