"""The PKCS#11 provider with a real library, SoftHSM, and with workers that misbehave in its place."""

from __future__ import annotations

import base64
import json
import logging
import os
import secrets
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding
from sqlalchemy import create_engine, select

from sqlalchemy_kravn_crypto import configure
from sqlalchemy_kravn_crypto.changes import Operator
from sqlalchemy_kravn_crypto.exceptions import (
    CredentialError,
    MasterKeyNotFoundError,
    MasterKeyUnusableError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
    SettingsError,
    UnwrapRefusedError,
)
from sqlalchemy_kravn_crypto.keystore import KeyStore
from sqlalchemy_kravn_crypto.lifecycle import add_standby, remove_standby, rewrap, rotate, switch_to_standby
from sqlalchemy_kravn_crypto.providers import pkcs11_worker
from sqlalchemy_kravn_crypto.providers.base import Deadline, Level, WrappedKey
from sqlalchemy_kravn_crypto.providers.bounded_process import MAX_ANSWER_SIZE
from sqlalchemy_kravn_crypto.providers.credentials import Credential
from sqlalchemy_kravn_crypto.providers.pkcs11 import Pkcs11Provider
from sqlalchemy_kravn_crypto.rows import connect, read_rows
from sqlalchemy_kravn_crypto.schema import TABLES
from sqlalchemy_kravn_crypto.wrapping import unwrapping
from tests.debian import program
from tests.processes import PATIENCE, children, is_running, wait_until
from tests.softhsm import SoftHSM, Spy, Token
from tests.test_transport import assert_leaks_nothing

BINDING = b"what the data key belongs to"
NOWHERE = ("/nowhere/python",)
"""In place of the worker, where nothing may be sent to it: it cannot be started, which is another error."""

GCM, KWP = "aes-gcm", "aes-kwp"


class Client:
    """A provider and a data key, and what the token's user does meanwhile."""

    def __init__(self, token: Token, mechanism: str = GCM) -> None:
        self.token = token
        self.mechanism = mechanism
        self.data_key = os.urandom(32)

    def provider(self, **other: Any) -> Pkcs11Provider:
        return Pkcs11Provider(**self.token.settings(mechanism=self.mechanism, **other))

    def wrap(self, **other: Any) -> WrappedKey:
        return self.provider(**other).wrap(self.data_key, BINDING, Deadline(PATIENCE))

    def unwrap(self, wrapped: WrappedKey, binding: bytes = BINDING, **other: Any) -> bytes:
        return self.provider(**other).unwrap(wrapped, binding, Deadline(PATIENCE))

    def create_key(self, key: str = "kravn", key_id: str = "01", **attributes: Any) -> None:
        self.token.create_key(key, key_id, **{**rights(self.mechanism), **attributes})

    def import_key(self, value: bytes) -> None:
        self.token.import_key(value, **rights(self.mechanism))


def rights(mechanism: str) -> dict[str, Any]:
    gcm = mechanism == GCM
    return {"ENCRYPT": gcm, "DECRYPT": gcm, "WRAP": not gcm, "UNWRAP": not gcm}


@pytest.fixture(params=[GCM, KWP])
def client(request: pytest.FixtureRequest, softhsm: SoftHSM) -> Client:
    """Give a client of each mechanism, whose token has no key yet."""
    return Client(softhsm.new_token(), request.param)


@pytest.fixture
def gcm(hsm_token: Token) -> Client:
    return Client(hsm_token)


@pytest.fixture
def kwp(softhsm: SoftHSM) -> Client:
    client = Client(softhsm.new_token(), KWP)
    client.create_key()
    return client


# --- Wrapping and unwrapping -----------------------------------------------------------------------------------------


def test_a_data_key_comes_back(client: Client) -> None:
    client.create_key()
    wrapped = client.wrap()
    assert wrapped.master_key == "pkcs11:token=bank;object=kravn;type=secret-key;id=%01"
    assert client.unwrap(wrapped) == client.data_key


def test_what_aes_gcm_makes_is_aes_gcm(softhsm: SoftHSM) -> None:
    client, master_key = Client(softhsm.new_token()), os.urandom(32)
    client.import_key(master_key)
    blob = client.wrap().blob
    assert (blob[:1], len(blob)) == (b"\x01", 1 + 12 + 32 + 16)
    assert AESGCM(master_key).decrypt(blob[1:13], blob[13:], BINDING) == client.data_key


def test_what_aes_kwp_makes_is_rfc_5649(softhsm: SoftHSM) -> None:
    client, master_key = Client(softhsm.new_token(), KWP), os.urandom(32)
    client.import_key(master_key)
    assert client.wrap().blob == b"\x02" + aes_key_wrap_with_padding(master_key, client.data_key)


def test_what_others_make_can_be_unwrapped(client: Client) -> None:
    master_key, iv = os.urandom(32), os.urandom(12)
    client.import_key(master_key)
    blobs = {
        GCM: b"\x01" + iv + AESGCM(master_key).encrypt(iv, client.data_key, BINDING),
        KWP: b"\x02" + aes_key_wrap_with_padding(master_key, client.data_key),
    }
    recorded = "pkcs11:token=bank;object=kravn;type=secret-key;id=%01"
    assert client.unwrap(WrappedKey(recorded, blobs[client.mechanism])) == client.data_key


def test_every_wrap_by_gcm_has_an_initialisation_vector_of_its_own(gcm: Client) -> None:
    assert len({gcm.wrap().blob[1:13] for _ in range(8)}) == 8


def test_the_master_key_cannot_be_extracted(client: Client) -> None:
    client.create_key()
    client.wrap()
    [key] = client.token.secret_keys()
    assert (key["SENSITIVE"], key["EXTRACTABLE"], key["NEVER_EXTRACTABLE"]) == (True, False, True)


@pytest.mark.parametrize("binding", [b"", b"another", BINDING + b"\0", BINDING[:-1]])
def test_gcm_refuses_another_binding(gcm: Client, binding: bytes) -> None:
    assert gcm.provider().binds
    wrapped = gcm.wrap()
    with pytest.raises(UnwrapRefusedError) as caught:
        gcm.unwrap(wrapped, binding)
    assert caught.value.provider == "pkcs11"
    assert caught.value.__context__ is None


def test_kwp_says_that_it_does_not_bind(kwp: Client) -> None:
    assert not kwp.provider().binds
    assert kwp.provider().authenticates
    assert kwp.unwrap(kwp.wrap(), b"another") == kwp.data_key


def test_an_altered_wrapped_key_is_refused(client: Client) -> None:
    client.create_key()
    wrapped = client.wrap()
    for position in range(1, len(wrapped.blob), 7):
        altered = bytearray(wrapped.blob)
        altered[position] ^= 0x80
        with pytest.raises(UnwrapRefusedError):
            client.unwrap(WrappedKey(wrapped.master_key, bytes(altered)))


def test_a_wrapped_key_of_another_master_key_is_refused(client: Client) -> None:
    client.create_key()
    client.create_key(key_id="02")
    wrapped = client.wrap(key_id="01")
    moved = WrappedKey(wrapped.master_key.replace("%01", "%02"), wrapped.blob)
    with pytest.raises(UnwrapRefusedError):
        client.unwrap(moved)


@pytest.mark.parametrize("blob", [b"x", b"\x01", b"\x01" + bytes(59), b"\x01" + bytes(61), b"\x02" + bytes(60)])
def test_what_gcm_does_not_make_is_not_sent(hsm_token: Token, blob: bytes) -> None:
    provider = Pkcs11Provider(**hsm_token.settings(command=NOWHERE))
    with pytest.raises(UnwrapRefusedError, match="KRAVN_KMS_PKCS11_MECHANISM"):
        provider.unwrap(WrappedKey(provider.master_key + ";id=%01", blob), BINDING, Deadline(PATIENCE))


@pytest.mark.parametrize("blob", [b"\x02", b"\x02" + bytes(39), b"\x02" + bytes(41), b"\x01" + bytes(40)])
def test_what_kwp_does_not_make_is_not_sent(hsm_token: Token, blob: bytes) -> None:
    provider = Pkcs11Provider(**hsm_token.settings(command=NOWHERE, mechanism=KWP))
    with pytest.raises(UnwrapRefusedError, match="KRAVN_KMS_PKCS11_MECHANISM"):
        provider.unwrap(WrappedKey(provider.master_key + ";id=%01", blob), BINDING, Deadline(PATIENCE))


def test_a_record_of_another_master_key_is_not_sent(gcm: Client) -> None:
    wrapped = gcm.wrap()
    others: list[dict[str, Any]] = [{"key": "another"}, {"token": "another"}]
    for other in others:
        with pytest.raises(UnwrapRefusedError, match="KRAVN_KMS_PKCS11_KEY"):
            gcm.unwrap(wrapped, command=NOWHERE, **other)


def test_threads_may_share_a_provider(client: Client) -> None:
    client.create_key()
    provider = client.provider()
    data_keys = [os.urandom(32) for _ in range(16)]

    def there_and_back(data_key: bytes) -> bytes:
        return provider.unwrap(provider.wrap(data_key, data_key, Deadline(60)), data_key, Deadline(60))

    before = children()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, data_keys)) == data_keys
    assert children() == before


def test_a_library_is_not_loaded_into_this_process(client: Client) -> None:
    client.create_key()
    client.unwrap(client.wrap())
    assert "softhsm" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("label", ["of;id=%01/reserved?&characters", "Schl\u00fcssel", "a" * 32])
def test_labels_are_recorded_so_that_they_can_be_told_apart(softhsm: SoftHSM, label: str) -> None:
    token = softhsm.new_token(label)
    token.create_key(label)
    client = Client(token)
    wrapped = client.wrap(key=label)
    assert wrapped.master_key.isascii()
    assert wrapped.master_key.count(";") == 3
    assert client.provider(key=label).recognises(wrapped.master_key)
    assert client.unwrap(wrapped, key=label) == client.data_key


# --- What is done in the HSM -----------------------------------------------------------------------------------------


def test_gcm_makes_no_object_in_the_hsm(gcm: Client, hsm_spy: Spy) -> None:
    gcm.unwrap(gcm.wrap(module=hsm_spy.module), module=hsm_spy.module)
    calls = hsm_spy.calls()
    assert {"C_Encrypt", "C_Decrypt"} <= set(calls)
    assert {"C_CreateObject", "C_WrapKey", "C_UnwrapKey", "C_CopyObject", "C_GenerateKey"}.isdisjoint(calls)


def test_kwp_leaves_no_object_in_the_hsm(kwp: Client, hsm_spy: Spy) -> None:
    kwp.unwrap(kwp.wrap(module=hsm_spy.module), module=hsm_spy.module)
    assert {"C_CreateObject", "C_WrapKey", "C_UnwrapKey"} <= set(hsm_spy.calls())
    assert {"C_Encrypt", "C_Decrypt"}.isdisjoint(hsm_spy.calls())
    assert [key["LABEL"] for key in kwp.token.secret_keys()] == ["kravn"]


def test_each_takes_one_login_and_ends_its_session(client: Client, hsm_spy: Spy) -> None:
    client.create_key()
    client.wrap(module=hsm_spy.module)
    calls = hsm_spy.calls()
    assert (calls.count("C_OpenSession"), calls.count("C_Login")) == (1, 1)
    assert calls[-2:] == ["C_Logout", "C_CloseSession"]


def test_what_a_library_prints_is_not_taken_for_the_answer(
    gcm: Client, hsm_spy: Spy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for output in ("/dev/stdout", "/dev/stderr"):
        monkeypatch.setenv("PKCS11SPY_OUTPUT", output)
        assert gcm.unwrap(gcm.wrap(module=hsm_spy.module), module=hsm_spy.module) == gcm.data_key
    assert capfd.readouterr() == ("", "")


# --- The master key --------------------------------------------------------------------------------------------------


def test_a_later_master_key_of_the_same_label(client: Client) -> None:
    client.create_key()
    old = client.wrap()
    client.create_key(key_id="0a0b")
    new = client.wrap(key_id="0A0B")
    assert (old.master_key[-6:], new.master_key[-6:]) == (";id=%01"[-6:], "%0A%0B")
    provider = client.provider(key_id="0a0b")
    assert provider.recognises(old.master_key)
    assert provider.recognises(new.master_key)
    assert [client.unwrap(wrapped, key_id="0a0b") for wrapped in (old, new)] == [client.data_key] * 2


def test_several_master_keys_and_no_word_on_which(client: Client) -> None:
    client.create_key()
    old = client.wrap()
    client.create_key(key_id="0a0b")
    with pytest.raises(MasterKeyUnusableError, match=r"01, 0a0b.*KRAVN_KMS_PKCS11_KEY_ID"):
        client.wrap()
    assert client.unwrap(old) == client.data_key


def test_two_master_keys_that_cannot_be_told_apart(gcm: Client) -> None:
    wrapped = gcm.wrap()
    gcm.create_key()
    with pytest.raises(MasterKeyUnusableError, match="01, 01"):
        gcm.wrap(key_id="01")
    with pytest.raises(MasterKeyUnusableError, match="01, 01"):
        gcm.unwrap(wrapped)


def test_a_master_key_that_is_missing(client: Client) -> None:
    with pytest.raises(MasterKeyNotFoundError, match=r"'kravn'.*KRAVN_KMS_PKCS11_KEY"):
        client.wrap()
    client.create_key()
    with pytest.raises(MasterKeyNotFoundError, match="with the id 02"):
        client.wrap(key_id="02")
    with pytest.raises(MasterKeyNotFoundError, match="'another'"):
        client.wrap(key="another")


def test_a_master_key_that_was_destroyed(gcm: Client) -> None:
    wrapped = gcm.wrap()
    gcm.token.destroy_key()
    gcm.create_key(key_id="02")
    with pytest.raises(MasterKeyNotFoundError, match="with the id 01"):
        gcm.unwrap(wrapped)


def test_a_master_key_made_anew_with_the_same_label_and_id(client: Client) -> None:
    client.create_key()
    wrapped = client.wrap()
    client.token.destroy_key()
    client.create_key()
    with pytest.raises(UnwrapRefusedError, match="made anew"):
        client.unwrap(wrapped)


def test_a_master_key_without_an_id(client: Client) -> None:
    client.create_key(key_id="")
    with pytest.raises(MasterKeyUnusableError, match="CKA_ID"):
        client.wrap()


def test_only_an_aes_key_is_a_master_key(gcm: Client) -> None:
    request = {"key": "kravn", "key_id": "02", "attributes": {"ENCRYPT": False, "DECRYPT": False}}
    gcm.token.administer("create_generic_secret", **request)
    assert gcm.unwrap(gcm.wrap()) == gcm.data_key


@pytest.mark.parametrize("lacking", ["ENCRYPT", "DECRYPT"])
def test_a_master_key_that_may_not_do_it(softhsm: SoftHSM, lacking: str) -> None:
    client = Client(softhsm.new_token())
    client.create_key("kravn", "01", **{lacking: False})
    with pytest.raises(MasterKeyUnusableError, match=f"CKA_{lacking}"):
        client.unwrap(client.wrap())


@pytest.mark.parametrize("lacking", ["WRAP", "UNWRAP"])
def test_a_master_key_that_may_not_wrap(softhsm: SoftHSM, lacking: str) -> None:
    client = Client(softhsm.new_token(), KWP)
    client.create_key("kravn", "01", **{lacking: False})
    with pytest.raises(MasterKeyUnusableError, match=f"CKA_{lacking}"):
        client.unwrap(client.wrap())


def test_what_is_recorded_is_recognised_and_nothing_else(hsm_token: Token) -> None:
    provider = Pkcs11Provider(**hsm_token.settings())
    uri = "pkcs11:token=bank;object=kravn;type=secret-key"
    assert provider.master_key == uri
    assert provider.recognises(uri + ";id=%00%FF")
    for other in (uri, uri + ";id=", uri + ";id=%0", uri + ";id=%ff", uri + ";id=01", uri + ";id=%01;id=%02", "%01"):
        assert not provider.recognises(other)
    assert not provider.recognises(uri.replace("bank", "Bank") + ";id=%01")
    assert not provider.recognises(uri.replace("kravn", "kravn2") + ";id=%01")


# --- The token and the PIN -------------------------------------------------------------------------------------------


def test_a_token_that_is_missing(gcm: Client) -> None:
    with pytest.raises(MasterKeyNotFoundError, match=r"'another'.*KRAVN_KMS_PKCS11_TOKEN"):
        gcm.wrap(token="another")


def test_no_token_at_all(gcm: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    configuration = tmp_path / "empty.conf"
    configuration.write_text(f"directories.tokendir = {tmp_path / 'empty'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(configuration))
    with pytest.raises(ProviderUnavailableError, match="no token"):
        gcm.wrap()


def test_two_tokens_of_one_label(gcm: Client) -> None:
    gcm.token.hsm.new_token("bank")
    with pytest.raises(MasterKeyUnusableError, match="several tokens"):
        gcm.wrap()


def test_a_wrong_pin_is_tried_once(gcm: Client, hsm_spy: Spy, caplog: pytest.LogCaptureFixture) -> None:
    wrapped, wrong = gcm.wrap(), "wrong-" + secrets.token_hex(8)
    provider = gcm.provider(pin=wrong, module=hsm_spy.module)
    for _ in range(3):
        with pytest.raises(ProviderDeniedError, match="KRAVN_KMS_PKCS11_PIN") as caught:
            provider.unwrap(wrapped, BINDING, Deadline(PATIENCE))
        assert caught.type is ProviderDeniedError
        assert_leaks_nothing(caught.value, caplog, wrong.encode())
    assert hsm_spy.calls().count("C_Login") == 1


def test_a_wrong_pin_is_tried_once_by_a_boot_with_many_data_keys(gcm: Client, hsm_spy: Spy) -> None:
    wrapped = gcm.wrap()
    provider = gcm.provider(pin="wrong", module=hsm_spy.module)
    deadline = Deadline(PATIENCE)
    with ThreadPoolExecutor(8) as pool:
        attempts = [pool.submit(provider.unwrap, wrapped, BINDING, deadline) for _ in range(8)]
    assert [type(attempt.exception()) for attempt in attempts] == [ProviderDeniedError] * 8
    assert hsm_spy.calls().count("C_Login") == 1


def test_a_pin_that_was_right_and_is_not_any_more_is_tried_once(gcm: Client, hsm_spy: Spy) -> None:
    provider = gcm.provider(module=hsm_spy.module)
    wrapped = provider.wrap(gcm.data_key, BINDING, Deadline(PATIENCE))
    change = [
        program("pkcs11-tool"),
        "--module",
        str(gcm.token.hsm.module),
        "--login",
        "--change-pin",
        "--pin",
        gcm.token.pin,
    ]
    subprocess.run([*change, "--new-pin", "another"], check=True, capture_output=True)
    before = hsm_spy.calls().count("C_Login")
    with ThreadPoolExecutor(8) as pool:
        attempts = [pool.submit(provider.unwrap, wrapped, BINDING, Deadline(PATIENCE)) for _ in range(8)]
    assert [type(attempt.exception()) for attempt in attempts] == [ProviderDeniedError] * 8
    assert hsm_spy.calls().count("C_Login") == before + 1


def test_a_pin_that_is_put_right_in_its_file_is_taken_up(gcm: Client, tmp_path: Path) -> None:
    file = tmp_path / "pin"
    file.write_text("wrong\n")
    provider = gcm.provider(pin=Credential("KRAVN_KMS_PKCS11_PIN", path=file))
    with pytest.raises(ProviderDeniedError):
        provider.wrap(gcm.data_key, BINDING, Deadline(PATIENCE))
    file.write_text(gcm.token.pin + "\n")
    wrapped = provider.wrap(gcm.data_key, BINDING, Deadline(PATIENCE))
    assert provider.unwrap(wrapped, BINDING, Deadline(PATIENCE)) == gcm.data_key


def test_one_that_waits_for_another_to_log_in_waits_no_longer_than_it_may(hsm_token: Token) -> None:
    sleeps = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
    provider = Pkcs11Provider(**hsm_token.settings(command=sleeps))
    before = children()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(provider.wrap, bytes(32), BINDING, Deadline(2))
        wait_until(lambda: children() - before)
        with pytest.raises(ProviderUnavailableError, match=r"0\.2 seconds"):
            provider.wrap(bytes(32), BINDING, Deadline(0.2))
        assert isinstance(first.exception(), ProviderUnavailableError)
    assert children() == before


def test_a_user_without_a_pin(softhsm: SoftHSM) -> None:
    client = Client(softhsm.new_token_without_pin())
    with pytest.raises(ProviderDeniedError, match="no user PIN"):
        client.wrap()


@pytest.mark.parametrize("pin", ["", "1234\n5678", "a" * 256, "\x00"])
def test_a_pin_that_cannot_be_one_is_not_tried(hsm_token: Token, pin: str) -> None:
    provider = Pkcs11Provider(**hsm_token.settings(pin=pin, command=NOWHERE))
    with pytest.raises(CredentialError, match="KRAVN_KMS_PKCS11_PIN") as caught:
        provider.wrap(bytes(32), BINDING, Deadline(PATIENCE))
    assert not pin or pin not in str(caught.value)


def test_a_file_with_the_pin_that_is_missing(hsm_token: Token, tmp_path: Path) -> None:
    pin = Credential("KRAVN_STANDBY_KMS_PKCS11_PIN", path=tmp_path / "missing")
    provider = Pkcs11Provider(**hsm_token.settings(pin=pin, command=NOWHERE))
    with pytest.raises(CredentialError, match="KRAVN_STANDBY_KMS_PKCS11_PIN_FILE"):
        provider.wrap(bytes(32), BINDING, Deadline(PATIENCE))


# --- The library -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(softhsm: SoftHSM, tmp_path: Path) -> Path:
    """Give a copy of the library, to be damaged."""
    path = tmp_path / "library.so"
    path.write_bytes(softhsm.module.read_bytes())
    return path


def test_a_library_that_was_removed(gcm: Client, copy: Path) -> None:
    provider = gcm.provider(module=copy)
    copy.unlink()
    with pytest.raises(ProviderUnavailableError, match=r"No such file.*KRAVN_KMS_PKCS11_MODULE"):
        provider.wrap(gcm.data_key, BINDING, Deadline(PATIENCE))


def test_what_is_no_library(gcm: Client, copy: Path) -> None:
    copy.write_text("not a library at all, however long it may be\n" * 100)
    with pytest.raises(ProviderUnavailableError, match="invalid ELF header"):
        gcm.wrap(module=copy)


def test_a_library_without_pkcs11(gcm: Client) -> None:
    [found] = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line}
    with pytest.raises(ProviderUnavailableError, match="undefined symbol: C_GetFunctionList"):
        gcm.wrap(module=found)


def test_a_library_for_another_architecture(gcm: Client, copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    content[4] ^= 3  # 32 bits instead of 64, or the other way round
    copy.write_bytes(content)
    with pytest.raises(ProviderUnavailableError, match=r"wrong ELF class.*architecture"):
        gcm.wrap(module=copy)


def test_a_library_that_crashes(gcm: Client, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Its pages are not there when the loader turns to them, which the system answers with a signal.
    os.truncate(copy, copy.stat().st_size // 2)
    before = children()
    with pytest.raises(ProviderUnavailableError, match=r"crashed \(SIG") as caught:
        gcm.wrap(module=copy)
    assert_leaks_nothing(caught.value, caplog, gcm.data_key, gcm.token.pin.encode())
    assert children() == before


def test_a_library_without_its_configuration(gcm: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTHSM2_CONF", "/nowhere/softhsm2.conf")
    with pytest.raises(ProviderUnavailableError, match="could not be initialised"):
        gcm.wrap()


# --- A library that hangs --------------------------------------------------------------------------------------------


@pytest.fixture
def hanging(tmp_path: Path) -> Path:
    """Give a library that hangs while it is loaded: a pipe that nobody writes to."""
    path = tmp_path / "library.so"
    os.mkfifo(path)
    return path


def other_end(library: Path) -> int | None:
    """Open the pipe that a library is loaded from, once somebody has come to read there."""
    with suppress(OSError):
        return os.open(library, os.O_WRONLY | os.O_NONBLOCK)
    return None


@contextmanager
def hung(client: Client, library: Path) -> Iterator[int]:
    """Have a wrap hang with the PIN and the data key in the memory of its process, and give the number of that."""
    before = children()
    ends: list[int] = []

    def has_come() -> bool:
        end = other_end(library)
        ends.extend([] if end is None else [end])
        return bool(ends)

    with ThreadPoolExecutor(1) as pool:
        provider = client.provider(module=library)
        hanging = pool.submit(provider.wrap, client.data_key, BINDING, Deadline(2 * PATIENCE))
        try:
            wait_until(has_come)
            [number] = children() - before
            yield number
        finally:
            for end in ends:
                os.close(end)
            assert isinstance(hanging.exception(), ProviderUnavailableError)
    assert children() == before


def test_a_library_that_hangs_is_ended_at_the_deadline(
    gcm: Client, hanging: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = children()
    with pytest.raises(ProviderUnavailableError, match=r"0\.7 seconds") as caught:
        gcm.provider(module=hanging).wrap(gcm.data_key, BINDING, Deadline(0.7))
    assert_leaks_nothing(caught.value, caplog, gcm.data_key, gcm.token.pin.encode())
    assert children() == before


def test_nobody_on_the_machine_sees_the_pin_or_the_data_key(
    gcm: Client, hanging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KRAVN_KMS_PKCS11_PIN", gcm.token.pin)
    monkeypatch.setenv("kravn_secret", "a secret of the deployment")
    with hung(gcm, hanging) as number:
        # What ps prints, of every process.
        listed = b""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has just ended
                listed += path.read_bytes()
        environment = Path(f"/proc/{number}/environ").read_bytes()
        assert b"pkcs11_worker.py" in listed
        assert f"SOFTHSM2_CONF={gcm.token.hsm.configuration}".encode() in environment
        assert not [one for one in environment.upper().split(b"\0") if one.startswith(b"KRAVN_")]
        for secret in (gcm.token.pin, gcm.data_key.hex(), base64.b64encode(gcm.data_key).decode(), BINDING.decode()):
            assert secret.encode() not in listed + environment


def test_a_crash_would_leave_no_memory_on_the_disk(gcm: Client, hanging: Path) -> None:
    with hung(gcm, hanging) as number:
        limits = Path(f"/proc/{number}/limits").read_text()
        [line] = [line for line in limits.splitlines() if line.startswith("Max core file size")]
        assert {int(bound) for bound in line.split()[4:6]} <= {0, 1}


GIVES_UP = """
    import sys
    from sqlalchemy_kravn_crypto.providers.base import Deadline
    from sqlalchemy_kravn_crypto.providers.pkcs11 import Pkcs11Provider

    provider = Pkcs11Provider(module=sys.argv[1], token="bank", pin="1234", key="kravn")
    provider.wrap(bytes(32), b"", Deadline(float(sys.argv[2])))
"""


def test_a_process_whose_program_was_killed_ends_at_the_deadline(hanging: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(GIVES_UP), str(hanging), "6"]
    with subprocess.Popen(command) as program:
        ends: list[int | None] = []

        def has_come() -> bool:
            ends.append(other_end(hanging))
            return ends[-1] is not None

        try:
            wait_until(has_come)
            [number] = children(program.pid)
        finally:
            program.kill()
    assert is_running(number)
    wait_until(lambda: not is_running(number))
    os.close(ends[-1] or 0)


def test_a_deadline_that_has_passed_starts_nothing(gcm: Client) -> None:
    now = [0.0]
    deadline = Deadline(1, clock=lambda: now[0])
    now[0] = 2.0
    with pytest.raises(ProviderUnavailableError, match="1 seconds"):
        gcm.provider(command=NOWHERE).wrap(gcm.data_key, BINDING, deadline)


# --- Workers that misbehave ------------------------------------------------------------------------------------------

IS_CALLED = """
    import base64, json, os, sys, time
    request = json.loads(sys.stdin.readline())
    def answer(**what):
        print(json.dumps(what), flush=True)
    def coded(value):
        return base64.b64encode(value).decode()
"""


def worker(program: str) -> list[str]:
    """Return the command of a worker that does something else with a request."""
    return [sys.executable, "-I", "-S", "-c", textwrap.dedent(IS_CALLED) + textwrap.dedent(program)]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("", ProviderUnavailableError),
        ("sys.exit(3)", ProviderUnavailableError),
        ("os.kill(os.getpid(), 11)", ProviderUnavailableError),
        ("os.kill(os.getpid(), 9)", ProviderUnavailableError),
        ("sys.stdout.write('{')", ProviderUnavailableError),
        ("raise ValueError(request)", ProviderUnavailableError),
        ("os.close(1); time.sleep(600)", ProviderUnavailableError),
        ("print()", ProviderResponseError),
        ("print('no JSON')", ProviderResponseError),
        ("print('[' * 10_000)", ProviderResponseError),
        ("print('[1]')", ProviderResponseError),
        ("print('null')", ProviderResponseError),
        ("sys.stdout.buffer.write(bytes(range(11, 256)) + bytes([10]))", ProviderResponseError),
        (f"print('a' * {MAX_ANSWER_SIZE + 1})", ProviderResponseError),
        ("while True: sys.stdout.write('a' * 1000)", ProviderResponseError),
        ("answer()", ProviderResponseError),
        ("answer(value=1, key_id='01')", ProviderResponseError),
        ("answer(value='not base64', key_id='01')", ProviderResponseError),
        ("answer(value=coded(bytes(59)), key_id='01')", ProviderResponseError),
        ("answer(value=coded(bytes(61)), key_id='01')", ProviderResponseError),
        ("answer(value=coded(bytes(60)))", ProviderResponseError),
        ("answer(value=coded(bytes(60)), key_id=1)", ProviderResponseError),
        ("answer(value=coded(bytes(60)), key_id='')", ProviderResponseError),
        ("answer(value=coded(bytes(60)), key_id='0')", ProviderResponseError),
        ("answer(value=coded(bytes(60)), key_id='01;id=02')", ProviderResponseError),
        ("answer(stage=[1], code={})", ProviderError),
        ("answer(stage='use', code='NeverHeardOf')", ProviderError),
        ("answer(**request, stage='use', code=request['pin'])", ProviderError),
    ],
)
def test_a_worker_that_misbehaves(
    hsm_token: Token, caplog: pytest.LogCaptureFixture, program: str, expected: type[ProviderError]
) -> None:
    caplog.set_level(logging.DEBUG)
    data_key = os.urandom(32)
    provider = Pkcs11Provider(**hsm_token.settings(command=worker(program)))
    before = children()
    with pytest.raises(ProviderError) as caught:
        provider.wrap(data_key, BINDING, Deadline(PATIENCE))
    assert caught.type is expected
    assert caught.value.provider == "pkcs11"
    assert_leaks_nothing(caught.value, caplog, data_key, hsm_token.pin.encode())
    assert children() == before


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_a_data_key_of_another_size_is_refused(hsm_token: Token, size: int) -> None:
    provider = Pkcs11Provider(**hsm_token.settings(command=worker(f"answer(value=coded(bytes({size})))")))
    wrapped = WrappedKey(provider.master_key + ";id=%01", b"\x01" + bytes(60))
    with pytest.raises(ProviderResponseError):
        provider.unwrap(wrapped, BINDING, Deadline(PATIENCE))


def test_an_answer_counts_though_the_library_hangs_in_its_farewell(hsm_token: Token) -> None:
    hangs = worker("answer(value=coded(bytes(60)), key_id='01'); time.sleep(600)")
    provider = Pkcs11Provider(**hsm_token.settings(command=hangs))
    before = children()
    assert provider.wrap(bytes(32), BINDING, Deadline(PATIENCE)).blob == b"\x01" + bytes(60)
    assert children() == before


# --- The process that it is called from ------------------------------------------------------------------------------

FORKS = """
    import json, os, sys, threading
    from sqlalchemy_kravn_crypto.exceptions import ProviderUnavailableError
    from sqlalchemy_kravn_crypto.providers.base import Deadline
    from sqlalchemy_kravn_crypto.providers.pkcs11 import Pkcs11Provider

    settings, library = json.loads(sys.argv[1]), sys.argv[2]
    provider = Pkcs11Provider(**{**settings, "module": library})

    def wrap():
        try:
            provider.wrap(bytes(32), b"binding", Deadline(30))
        except ProviderUnavailableError:
            print("could not be loaded", flush=True)

    thread = threading.Thread(target=wrap)
    thread.start()
    end = os.open(library, os.O_WRONLY)
    child = os.fork()
    if child == 0:
        # Here is no thread that could ever come to the end of what it does.
        os.unlink(library)
        os.symlink(settings["module"], library)
        wrapped = provider.wrap(bytes(32), b"binding", Deadline(30))
        assert provider.unwrap(wrapped, b"binding", Deadline(30)) == bytes(32)
        os._exit(42)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    os.close(end)
    thread.join()
    wrapped = provider.wrap(bytes(32), b"binding", Deadline(30))
    assert provider.unwrap(wrapped, b"binding", Deadline(30)) == bytes(32)
    print("both did")
"""


def test_a_fork_while_another_thread_logs_in(gcm: Client, hanging: Path) -> None:
    settings = json.dumps({**gcm.token.settings(), "module": str(gcm.token.hsm.module)})
    command = [sys.executable, "-c", textwrap.dedent(FORKS), settings, str(hanging)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.stdout == "could not be loaded\nboth did\n", done.stderr


def test_the_python_settings_of_the_environment_do_not_reach_the_worker(
    gcm: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "base64", "pkcs11", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONINSPECT", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert gcm.unwrap(gcm.wrap()) == gcm.data_key


@pytest.mark.parametrize("executable", ["", "/usr/bin/uwsgi", "/opt/program/program"])
def test_a_program_that_is_not_run_by_an_interpreter(
    hsm_token: Token, monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    command = [sys.executable, "-I", "-S", str(pkcs11_worker.__file__)]
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(SettingsError, match="frozen") as caught:
        Pkcs11Provider(**hsm_token.settings())
    assert f"'-I', '-S', {str(pkcs11_worker.__file__)!r}" in str(caught.value)
    provider = Pkcs11Provider(**hsm_token.settings(command=command))
    wrapped = provider.wrap(bytes(32), BINDING, Deadline(PATIENCE))
    assert provider.unwrap(wrapped, BINDING, Deadline(PATIENCE)) == bytes(32)


def test_a_frozen_program(hsm_token: Token, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(SettingsError, match="frozen"):
        Pkcs11Provider(**hsm_token.settings())


def test_a_system_without_process_groups(hsm_token: Token, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = hsm_token.settings()
    monkeypatch.delattr(os, "killpg")
    with pytest.raises(SettingsError, match="POSIX"):
        Pkcs11Provider(**settings)


MISSES_PYTHON_PKCS11 = """
    import sys
    sys.modules["pkcs11"] = None
    from sqlalchemy_kravn_crypto.exceptions import MissingExtraError

    try:
        import sqlalchemy_kravn_crypto.providers.pkcs11
    except MissingExtraError as error:
        assert error.__context__ is None
        print(error)
"""


def test_a_missing_package_names_the_extra() -> None:
    command = [sys.executable, "-c", textwrap.dedent(MISSES_PYTHON_PKCS11)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "pip install 'sqlalchemy-kravn-crypto[pkcs11]'" in done.stdout


def test_a_path_of_a_kind_that_python_takes_too(gcm: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [tmp_path, *sys.path])
    assert gcm.unwrap(gcm.wrap()) == gcm.data_key


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["", "libsofthsm2.so", "./libsofthsm2.so", "/nowhere/library.so", "/", "/usr/lib"])
def test_a_module_that_is_no_file(hsm_token: Token, module: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_PKCS11_MODULE"):
        Pkcs11Provider(**hsm_token.settings(module=module))


NO_LABELS = ["", " a", "a ", "a\n", "a\0", "\ud800", "a\u200b", "\u00e4" * 65]


@pytest.mark.parametrize("label", [*NO_LABELS, "a" * 33, "\u00e4" * 17])
def test_a_token_that_is_no_label(hsm_token: Token, label: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_PKCS11_TOKEN"):
        Pkcs11Provider(**hsm_token.settings(token=label))


@pytest.mark.parametrize("label", [*NO_LABELS, "a" * 129])
def test_a_key_that_is_no_label(hsm_token: Token, label: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_PKCS11_KEY must"):
        Pkcs11Provider(**hsm_token.settings(key=label))


@pytest.mark.parametrize("key_id", ["", "0", "0x01", "01 02", "\uff10\uff11", "0g", "00" * 65])
def test_a_key_id_that_is_none(hsm_token: Token, key_id: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_PKCS11_KEY_ID"):
        Pkcs11Provider(**hsm_token.settings(key_id=key_id))


@pytest.mark.parametrize("mechanism", ["", "AES-GCM", "aes-kw", "rsa-oaep"])
def test_a_mechanism_that_is_none(hsm_token: Token, mechanism: str) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_PKCS11_MECHANISM"):
        Pkcs11Provider(**hsm_token.settings(mechanism=mechanism))


def test_no_pin(hsm_token: Token) -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_PKCS11_PIN"):
        Pkcs11Provider(**hsm_token.settings(pin=None))


def test_the_longest_names_can_be_recorded(hsm_token: Token) -> None:
    provider = Pkcs11Provider(**hsm_token.settings(token="\u00e4" * 16, key="\u00e4" * 64))
    recorded = WrappedKey(provider.master_key + ";id=" + "%FF" * 64, b"blob")
    assert provider.recognises(recorded.master_key)


def test_printing_a_provider_shows_no_pin(hsm_token: Token) -> None:
    provider = Pkcs11Provider(**hsm_token.settings())
    assert hsm_token.pin not in repr(provider)
    assert provider.master_key in repr(provider)


# --- What there is to find -------------------------------------------------------------------------------------------


RIGHTS, CREDENTIALS, REACHABILITY = "rights", "credentials", "reachability"


def found(client: Client, **other: Any) -> dict[str, list[Level]]:
    """Return what is found out, less what is said of SoftHSM whatever its key is."""
    levels: dict[str, list[Level]] = {}
    for finding in client.provider(**other).examine(Deadline(PATIENCE)):
        assert client.token.pin not in repr(finding)
        levels.setdefault(finding.subject, []).append(finding.level)
    assert levels.pop("provider", [Level.WARNING]) == [Level.WARNING]
    return levels


def test_nothing_is_found_about_a_master_key_made_by_the_template(client: Client) -> None:
    client.create_key(DESTROYABLE=False)
    assert found(client) == {subject: [Level.GOOD] for subject in (REACHABILITY, CREDENTIALS, RIGHTS)}


@pytest.mark.parametrize("attributes", [{"EXTRACTABLE": True}, {"SENSITIVE": False}])
def test_a_master_key_that_can_be_taken_out(client: Client, attributes: dict[str, Any]) -> None:
    client.create_key(DESTROYABLE=False, **attributes)
    assert found(client)[RIGHTS] == [Level.BAD]


@pytest.mark.parametrize("attributes", [{"MODIFIABLE": True}, {"DESTROYABLE": True}])
def test_a_master_key_that_can_be_changed_or_destroyed(client: Client, attributes: dict[str, Any]) -> None:
    client.create_key(**{"DESTROYABLE": False, **attributes})
    assert found(client)[RIGHTS] == [Level.WARNING]


def test_a_master_key_that_does_both(client: Client) -> None:
    client.create_key(DESTROYABLE=False, ENCRYPT=True, DECRYPT=True, WRAP=True, UNWRAP=True)
    assert found(client)[RIGHTS] == [Level.WARNING]


def test_a_master_key_that_was_brought_in_and_is_short(softhsm: SoftHSM) -> None:
    client = Client(softhsm.new_token())
    client.token.import_key(bytes(16), DESTROYABLE=False)
    assert found(client)[RIGHTS] == [Level.WARNING, Level.WARNING]


def test_wrong_pins_of_others_are_told(gcm: Client) -> None:
    assert found(gcm)[CREDENTIALS] == [Level.GOOD]
    with pytest.raises(ProviderDeniedError):
        gcm.wrap(pin="wrong")
    assert found(gcm)[CREDENTIALS] == [Level.GOOD, Level.WARNING]
    assert found(gcm)[CREDENTIALS] == [Level.GOOD]  # the login has reset it


def test_what_is_in_the_way_of_an_examination(gcm: Client, tmp_path: Path) -> None:
    assert found(gcm, pin="wrong") == {CREDENTIALS: [Level.BAD]}
    missing = Credential("KRAVN_KMS_PKCS11_PIN", path=tmp_path / "missing")
    assert found(gcm, pin=missing) == {CREDENTIALS: [Level.BAD]}
    assert found(gcm, command=NOWHERE) == {REACHABILITY: [Level.BAD]}
    assert found(gcm, command=worker("answer(attributes=1, flags=[])")) == {REACHABILITY: [Level.BAD]}
    assert found(gcm, command=worker("answer(attributes={}, flags=1)")) == {REACHABILITY: [Level.BAD]}
    assert found(gcm, key="another") == {RIGHTS: [Level.BAD]}


def test_examining_changes_nothing(gcm: Client, hsm_spy: Spy) -> None:
    found(gcm, module=hsm_spy.module)
    calls = set(hsm_spy.calls())
    assert "C_GetAttributeValue" in calls
    assert {"C_EncryptInit", "C_CreateObject", "C_SetAttributeValue", "C_DestroyObject"}.isdisjoint(calls)


# --- A deployment ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pin_file(client: Client, tmp_path: Path) -> Path:
    path = tmp_path / "pin"
    path.write_text(client.token.pin + "\n")
    return path


def test_a_key_store_with_an_hsm(
    client: Client, pin_file: Path, sqlite_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client.create_key()
    secret_file = tmp_path / "secret.key"
    secret_file.write_text(bytes(range(32)).hex())
    secret_file.chmod(0o600)
    engine = create_engine(sqlite_url)
    TABLES.keys.metadata.create_all(engine)

    def store(**other: Any) -> KeyStore:
        provider = client.provider(pin=Credential("KRAVN_KMS_PKCS11_PIN", path=pin_file), **other)
        return KeyStore(provider=provider, secret=None, secret_file=secret_file, timeout=PATIENCE)

    first = store().open(engine).keyring.primary_key_id
    assert store().open(engine).keyring.primary_key_id == first

    client.create_key(key_id="02")
    operator = Operator(engine=engine, store=store(key_id="02"), lease=180.0)
    rewrapped = rewrap(operator)
    assert {one.after[-7:] for one in rewrapped} == {";id=%02"}
    client.token.destroy_key(key_id="01")
    rotate(operator)
    keyring = store(key_id="02").open(engine).keyring
    assert first in keyring.key_ids

    pin_file.write_text("wrong")
    with pytest.raises(ProviderDeniedError) as caught:
        store(key_id="02").open(engine)
    with connect(engine) as connection:
        rows = read_rows(connection)
    [row] = [row for row in rows.keys if row.key_id == first]
    provider, deployment_id = client.provider(key_id="02"), rows.in_control().required("deployment_id")
    data_key = unwrapping(provider, row, deployment_id, Deadline(PATIENCE))()
    assert_leaks_nothing(caught.value, caplog, client.token.pin.encode(), data_key)
    engine.dispose()


def test_from_one_mechanism_to_the_other(kwp: Client, sqlite_url: str, tmp_path: Path) -> None:
    secret_file = tmp_path / "secret.key"
    secret_file.write_text(bytes(range(32)).hex())
    secret_file.chmod(0o600)
    engine = create_engine(sqlite_url)
    TABLES.keys.metadata.create_all(engine)
    kwp.token.create_key("bound", "01")
    first, second = kwp.provider(), Client(kwp.token).provider(key="bound")

    def operator(provider: Pkcs11Provider, standby: Pkcs11Provider) -> Operator:
        store = KeyStore(provider=provider, secret=None, secret_file=secret_file, timeout=PATIENCE)
        return Operator(engine=engine, store=store, standby=standby, lease=180.0)

    before = operator(first, second)
    key_ids = before.store.open(engine).keyring.key_ids
    add_standby(before)
    after = operator(second, first)
    switch_to_standby(after)
    remove_standby(after)
    assert after.store.open(engine).keyring.key_ids == key_ids
    with connect(engine) as connection:
        rows = read_rows(connection)
    assert {row.master_key for row in rows.keys if row.wrapped_key} == {second.master_key + ";id=%01"}
    engine.dispose()


def test_a_program_that_is_configured_from_the_environment(
    client: Client, pin_file: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.create_key()
    environment = {
        "KRAVN_SECRET": "correct horse battery staple, and forty more characters",
        "KRAVN_KMS_PROVIDER": "pkcs11",
        "KRAVN_KMS_PKCS11_MODULE": str(client.token.hsm.module),
        "KRAVN_KMS_PKCS11_TOKEN": "bank",
        "KRAVN_KMS_PKCS11_PIN_FILE": str(pin_file),
        "KRAVN_KMS_PKCS11_KEY": "kravn",
        "KRAVN_KMS_PKCS11_MECHANISM": client.mechanism,
        "KRAVN_KMS_TIMEOUT": str(PATIENCE),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    engine = create_engine(sqlite_url)
    TABLES.keys.metadata.create_all(engine)
    configure(engine)
    with engine.connect() as connection:
        rows = connection.execute(select(TABLES.keys).where(TABLES.keys.c.state == "primary")).mappings().all()
    [primary] = rows
    assert primary["provider"] == "pkcs11"
    assert primary["master_key"] == "pkcs11:token=bank;object=kravn;type=secret-key;id=%01"
    engine.dispose()
