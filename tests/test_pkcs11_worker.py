"""The worker's side: what it does with HSMs that SoftHSM is not like, and with requests that are none."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pkcs11 import ArgumentsBad, GCMParams, MechanismParamInvalid, PKCS11Error

from sqlalchemy_kravn_crypto.providers import pkcs11_worker
from sqlalchemy_kravn_crypto.providers.pkcs11_worker import Conversation, Refused
from tests.softhsm import Token

BINDING = b"what the data key belongs to"
DATA_KEY = os.urandom(32)
MASTER_KEY = os.urandom(32)
WORKER = [sys.executable, "-I", "-S", str(pkcs11_worker.__file__)]


class Key:
    """A key in an HSM that has a way of its own with initialisation vectors."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def encrypt(self, data: bytes, *, mechanism: object, mechanism_param: GCMParams) -> bytes:
        # A copy, since what was given may be written to.
        self.asked.append(bytes(bytearray(mechanism_param.nonce)))
        iv = self.own(mechanism_param.nonce)
        return AESGCM(MASTER_KEY).encrypt(iv, data, mechanism_param.aad) + self.appended(iv)

    def own(self, iv: bytes) -> bytes:
        return iv

    def appended(self, iv: bytes) -> bytes:
        return b""


class Overwriting(Key):
    """It writes one of its own over the one that it is given."""

    def own(self, iv: bytes) -> bytes:
        own = os.urandom(12)
        ctypes.memmove(ctypes.c_char_p(iv), own, 12)
        return own


class InsistingOnZeros(Overwriting):
    """It also takes none but zeros, to write over."""

    def __init__(self, refuses_with: type[Exception]) -> None:
        super().__init__()
        self.refuses_with = refuses_with

    def own(self, iv: bytes) -> bytes:
        if any(iv):
            raise self.refuses_with
        return super().own(iv)


class Appending(Key):
    """It ignores the one that it is given, and puts its own behind the ciphertext."""

    def own(self, iv: bytes) -> bytes:
        return os.urandom(12)

    def appended(self, iv: bytes) -> bytes:
        return iv


class Picky(Key):
    """It does not take the parameters that it is asked with first, for some other reason."""

    def own(self, iv: bytes) -> bytes:
        if len(self.asked) == 1:
            raise ArgumentsBad
        return iv


def conversation(**request: Any) -> Conversation:
    return Conversation({"mechanism": "aes-gcm", "binding": base64.b64encode(BINDING).decode(), **request})


@pytest.mark.parametrize(
    "key", [Key(), Overwriting(), InsistingOnZeros(MechanismParamInvalid), InsistingOnZeros(ArgumentsBad)]
)
def test_the_initialisation_vector_that_was_used_is_the_one_that_is_kept(key: Key) -> None:
    value = conversation()._wrapped(None, key, DATA_KEY)
    assert len(value) == 12 + 32 + 16
    assert any(value[:12])
    assert AESGCM(MASTER_KEY).decrypt(value[:12], value[12:], BINDING) == DATA_KEY


def test_each_is_asked_with_a_random_one_first() -> None:
    keys = [Key(), Overwriting(), InsistingOnZeros(ArgumentsBad), Appending(), Picky()]
    for key in keys:
        with_refusals(key)
    first = [key.asked[0] for key in keys]
    assert len(set(first)) == len(keys)
    assert all(map(any, first))


def with_refusals(key: Key) -> str:
    try:
        conversation()._wrapped(None, key, DATA_KEY)
    except Refused as refused:
        return str(refused)
    return ""


def test_what_was_encrypted_under_zeros_does_not_leave_the_process() -> None:
    key = Picky()
    assert with_refusals(key) == "OwnIV"
    assert key.asked[1] == bytes(12)


def test_an_hsm_that_appends_its_own_is_refused() -> None:
    assert with_refusals(Appending()) == "OwnIV"


class Holding:
    """A session with an HSM whose padding is another, or has the newer name."""

    def __init__(self, *mechanisms: pkcs11.Mechanism) -> None:
        self.token = self.slot = self
        self.mechanisms = mechanisms

    def get_mechanisms(self) -> set[pkcs11.Mechanism]:
        return set(self.mechanisms)

    def create_object(self, attributes: dict[pkcs11.Attribute, Any]) -> dict[pkcs11.Attribute, Any]:
        assert attributes[pkcs11.Attribute.TOKEN] is False
        assert attributes[pkcs11.Attribute.SENSITIVE] is True
        return attributes


class Wrapping:
    def __init__(self, size: int) -> None:
        self.size = size
        self.asked: list[pkcs11.Mechanism] = []

    def wrap_key(self, held: object, *, mechanism: pkcs11.Mechanism) -> bytes:
        self.asked.append(mechanism)
        return bytes(self.size)


def test_the_newer_name_of_rfc_5649_is_used_where_there_is_one() -> None:
    newer, older = pkcs11.Mechanism.AES_KEY_WRAP_KWP, pkcs11.Mechanism.AES_KEY_WRAP_PAD
    for mechanisms, expected in (((newer, older), newer), ((newer,), newer), ((older,), older), ((), older)):
        key = Wrapping(40)
        conversation(mechanism="aes-kwp")._wrapped(Holding(*mechanisms), key, DATA_KEY)
        assert key.asked == [expected]


def test_another_padding_is_refused() -> None:
    with pytest.raises(Refused, match="NotKWP"):
        conversation(mechanism="aes-kwp")._wrapped(Holding(), Wrapping(48), DATA_KEY)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ArgumentsBad(), "ArgumentsBad"),
        (PKCS11Error("Unmapped error code 0x80000001"), "0x80000001"),
        (PKCS11Error("Buffer was too small. Should never see this."), "PKCS11Error"),
        (ValueError("0x42"), "ValueError"),
    ],
)
def test_the_code_of_an_error(error: Exception, code: str) -> None:
    assert pkcs11_worker._code_of(error) == code


def run(request: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(WORKER, input=request, capture_output=True, check=False, timeout=60)


@pytest.mark.parametrize("request_", [b"", b"\n", b"no JSON\n", b"[1]\n", b"{}\n", b'{"seconds": 1'])
def test_what_is_no_request_gets_no_answer(request_: bytes) -> None:
    done = run(request_)
    assert done.returncode != 0
    assert done.stdout == b""


def request_to(token: Token, **other: Any) -> dict[str, Any]:
    return {
        "path": sys.path,
        "seconds": 30.0,
        "module": str(token.hsm.module),
        "token": token.label,
        "pin": token.pin,
        "key": "kravn",
        "key_id": None,
        "mechanism": "aes-gcm",
        "operation": "wrap",
        "value": base64.b64encode(DATA_KEY).decode(),
        "binding": "",
        **other,
    }


def test_an_answer_is_one_line(hsm_token: Token) -> None:
    done = run(json.dumps(request_to(hsm_token)).encode() + b"\n")
    assert done.returncode == 0
    assert done.stdout.endswith(b"\n")
    assert done.stdout.count(b"\n") == 1
    assert json.loads(done.stdout)["key_id"] == "01"


def test_an_answer_that_is_an_error_names_the_stage_and_nothing_of_the_request(hsm_token: Token) -> None:
    done = run(json.dumps(request_to(hsm_token, pin="wrong", binding="!")).encode() + b"\n")
    assert json.loads(done.stdout) == {"stage": "login", "code": "PinIncorrect"}
    done = run(json.dumps(request_to(hsm_token, value="!")).encode() + b"\n")
    assert json.loads(done.stdout)["stage"] == "use"
    assert hsm_token.pin.encode() not in done.stdout


def test_it_ends_by_itself_though_nobody_ends_it(hsm_token: Token, tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    os.mkfifo(library)
    done = run(json.dumps(request_to(hsm_token, module=str(library), seconds=0.2)).encode() + b"\n")
    assert -done.returncode == signal.SIGALRM
    assert done.stdout == b""


def test_it_imports_nothing_of_the_package() -> None:
    program = f"import sys; sys.path.insert(0, {str(Path(pkcs11_worker.__file__).parent)!r}); import pkcs11_worker; "
    program += "print([name for name in sys.modules if 'kravn' in name or 'sqlalchemy' in name])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
