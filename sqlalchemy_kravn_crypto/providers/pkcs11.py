"""Data keys wrapped by an HSM, through the PKCS#11 library of its vendor.

A library in C can hang, crash and be in no state to go on after a ``fork``, and nothing in PKCS#11 takes a deadline.
Hence each operation has a process of its own, in which the library is loaded, logged in to and asked, and which is
ended at the deadline.

A wrapped key:

.. code-block:: text

    aes-gcm    01 | initialisation vector, 12 bytes | ciphertext, 32 bytes | tag, 16 bytes
    aes-kwp    02 | what RFC 5649 makes of 32 bytes, 40 bytes

``aes-gcm`` is CKM_AES_GCM by ``C_Encrypt``, with the binding as additional authenticated data. The initialisation
vector is random, or the HSM's own; NIST SP 800-38D allows 2^32 wraps under one key then, and there is one for each
rotation. ``aes-kwp`` is CKM_AES_KEY_WRAP_KWP or CKM_AES_KEY_WRAP_PAD by ``C_WrapKey``, of an object that lives as long
as the session. It authenticates, since only the master key makes what unwraps, but has no place for a binding: a
wrapped key can be put in the place of another, which then fails the key check and the MAC of the row.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote_to_bytes

from ..base64_text import from_base64, to_base64
from ..derivation import KEY_SIZE
from ..exceptions import (
    CredentialError,
    ProviderDeniedError,
    ProviderError,
    ProviderResponseError,
    ProviderUnavailableError,
    SettingsError,
    UnwrapRefusedError,
)
from .base import Deadline, Finding, KeyProvider, WrappedKey
from .bounded_process import MAX_ANSWER_SIZE, Outcome, exchange
from .credentials import Credential, as_credential
from .extras import import_extra
from .pkcs11_meanings import NAME, failure, findings, refusal, refused_the_pin

import_extra("pkcs11", "pkcs11")  # for the subprocess; here it only shows that it is there

_WORKER: Final = Path(__file__).with_name("pkcs11_worker.py")

_VERSIONS: Final = {"aes-gcm": b"\x01", "aes-kwp": b"\x02"}
_SIZES: Final = {"aes-gcm": 12 + KEY_SIZE + 16, "aes-kwp": 8 + KEY_SIZE}

_MAX_TOKEN_LABEL: Final = 32  # bytes, as PKCS#11 has it
_MAX_KEY_LABEL: Final = 128  # bytes
_KEY_ID: Final = re.compile(r"(?:[0-9a-f]{2}){1,64}")
_RECORDED_ID: Final = re.compile(r"(?:%[0-9A-F]{2}){1,64}")
_PIN: Final = re.compile(r"[^\x00-\x1f\x7f]{1,255}")


class Pkcs11Provider(KeyProvider):
    """Wraps data keys under an AES key in a token of an HSM, found by its label.

    The key must be made beforehand, with a ``CKA_ID``. The keys of one label are versions of one master key: each data
    key is recorded with the id of the one that wrapped it, as in the URI of RFC 7512.

    :param module: the vendor's library, from the root of the file system.
    :param token: the label of the token.
    :param pin: the PIN of its user.
    :param key: the label of the master key.
    :param key_id: the ``CKA_ID`` of the key that wraps, in hexadecimal digits; needed where several have the label.
    :param mechanism: ``aes-gcm`` or ``aes-kwp``.
    :param command: what runs ``pkcs11_worker.py``, in place of this process's own Python.
    :raises SettingsError: if one of them is not what it must be, or this program is not run by a Python interpreter
        and no command is given.
    """

    name = NAME
    authenticates = True

    def __init__(  # noqa: PLR0913 - one for each setting
        self,
        *,
        module: Path | str,
        token: str,
        pin: str | Credential | None,
        key: str,
        key_id: str | None = None,
        mechanism: str = "aes-gcm",
        command: Sequence[str] | None = None,
    ) -> None:
        self._module = _checked_module(module)
        self._token = _checked_label(token, "KRAVN_KMS_PKCS11_TOKEN", _MAX_TOKEN_LABEL)
        self._key = _checked_label(key, "KRAVN_KMS_PKCS11_KEY", _MAX_KEY_LABEL)
        self._key_id = None if key_id is None else _checked_id(key_id)
        if mechanism not in _VERSIONS:
            raise SettingsError(f"KRAVN_KMS_PKCS11_MECHANISM must be one of {', '.join(_VERSIONS)}.")
        self._mechanism = mechanism
        self.binds = mechanism == "aes-gcm"
        if pin is None:
            raise SettingsError("KRAVN_KMS_PKCS11_PIN is missing: the PIN of the user that the master key is for.")
        self._pin = as_credential(pin, "KRAVN_KMS_PKCS11_PIN")
        self._master_key = (
            f"pkcs11:token={quote(self._token, safe='')};object={quote(self._key, safe='')};type=secret-key"
        )
        self._command = _own_command() if command is None else tuple(command)
        self._turns = _Turns()

    def __repr__(self) -> str:
        return f"<Pkcs11Provider {self._master_key} through {self._module}>"

    @property
    def master_key(self) -> str:
        """``pkcs11:token=…;object=…;type=secret-key``, as in RFC 7512."""
        return self._master_key

    def recognises(self, master_key: str) -> bool:
        """Tell whether ``master_key`` is that of the configured label, with the id of a key."""
        return self._recorded_id(master_key) is not None

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        """Wrap a data key under the master key that has the configured label, and id if one is configured."""
        answer = self._ask("wrap", self._key_id, deadline, data_key, binding)
        key_id, value = answer.get("key_id"), from_base64(answer.get("value"))
        if value is None or len(value) != _SIZES[self._mechanism]:
            raise self._malformed()
        if not isinstance(key_id, str) or not _KEY_ID.fullmatch(key_id):
            raise self._malformed()
        return WrappedKey(self._recorded(key_id), _VERSIONS[self._mechanism] + value)

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        """Unwrap a data key under the master key whose id is recorded with it."""
        key_id = self._recorded_id(wrapped.master_key)
        if key_id is None:
            raise UnwrapRefusedError(
                f"The data key is recorded as wrapped under the master key {wrapped.master_key}, which is none of "
                f"{self._master_key}. Check KRAVN_KMS_PKCS11_TOKEN and KRAVN_KMS_PKCS11_KEY.",
                provider=self.name,
            )
        version, value = wrapped.blob[:1], wrapped.blob[1:]
        if version != _VERSIONS[self._mechanism] or len(value) != _SIZES[self._mechanism]:
            raise UnwrapRefusedError(
                f"The wrapped key is not one that {self._mechanism} makes. Check KRAVN_KMS_PKCS11_MECHANISM: a master "
                "key is used with one mechanism only.",
                provider=self.name,
            )
        data_key = from_base64(self._ask("unwrap", key_id, deadline, value, binding).get("value"))
        if data_key is None or len(data_key) != KEY_SIZE:
            raise self._malformed()
        return data_key

    def examine(self, deadline: Deadline) -> Iterable[Finding]:
        """Find out what the attributes of the master key allow, and what the token says of its PIN."""
        try:
            answer = self._ask("examine", self._key_id, deadline)
            if not isinstance(answer.get("attributes"), dict) or not isinstance(answer.get("flags"), list):
                raise self._malformed()
            return tuple(findings(answer, self._mechanism))
        except ProviderError as error:
            return tuple(failure(error))

    def _ask(
        self, operation: str, key_id: str | None, deadline: Deadline, value: bytes = b"", binding: bytes = b""
    ) -> dict[str, Any]:
        """Have the worker do something, and return what it answers."""
        pin = self._revealed_pin()
        with self._turns.turn(pin, deadline):
            request = {
                "path": [entry for entry in map(str, sys.path) if Path(entry).is_absolute()],
                "seconds": deadline.remaining(self.name),
                "module": str(self._module),
                "token": self._token,
                "pin": pin,
                "key": self._key,
                "key_id": key_id,
                "mechanism": self._mechanism,
                "operation": operation,
                "value": to_base64(value),
                "binding": to_base64(binding),
            }
            line = json.dumps(request).encode() + b"\n"
            answer = self._answer(exchange(self._command, line, deadline, self.name, _environment()))
            if refused_the_pin(answer):
                self._turns.refuse(pin)
        if "stage" in answer:
            raise refusal(answer, operation, self._words(key_id))
        return answer

    def _answer(self, outcome: Outcome) -> dict[str, Any]:
        if outcome.too_large:
            raise self._malformed(f": it has more than {MAX_ANSWER_SIZE:,} bytes")
        if outcome.answer is None:
            what = f"crashed ({outcome.signal_name})" if outcome.signal_name else "ended without an answer"
            raise ProviderUnavailableError(
                f"The process that talks to the HSM {what}, most likely in the library {self._module}. Check that it "
                "is for this system and up to date; its vendor's log may say more.",
                provider=self.name,
            )
        try:
            answer = json.loads(outcome.answer)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._malformed()
        return answer

    def _revealed_pin(self) -> str:
        pin = self._pin.reveal(self.name)
        if not _PIN.fullmatch(pin):
            raise CredentialError(
                f"{self._pin.setting} must have 1 to 255 characters and no control characters, such as a line break.",
                provider=self.name,
            )
        return pin

    def _recorded(self, key_id: str) -> str:
        return f"{self._master_key};id=" + "".join(f"%{byte:02X}" for byte in bytes.fromhex(key_id))

    def _recorded_id(self, master_key: str) -> str | None:
        """Return the id, in hexadecimal digits, with which one of our master keys is recorded."""
        uri, _, recorded = master_key.partition(";id=")
        if uri != self._master_key or not _RECORDED_ID.fullmatch(recorded):
            return None
        return unquote_to_bytes(recorded).hex()

    def _words(self, key_id: str | None) -> dict[str, str]:
        return {
            "module": str(self._module),
            "token": repr(self._token),
            "master_key": self._master_key,
            "recorded": self._master_key if key_id is None else self._recorded(key_id),
            "wanted": f"labelled {self._key!r}" + ("" if key_id is None else f" with the id {key_id}"),
            "mechanism": self._mechanism,
            "pin": self._pin.setting,
        }

    def _malformed(self, detail: str = "") -> ProviderResponseError:
        return ProviderResponseError(
            f"The process that talks to the HSM did not answer as it should{detail}. Check that the library "
            f"{self._module} is for this system and up to date.",
            provider=self.name,
        )


class _Turns:
    """Lets one operation at a time be done, and none with a PIN that was refused.

    A boot unwraps all its data keys at once, and each operation logs in: a wrong PIN would be tried as often as that,
    and lock the token. Processes and sessions are not to be had without end either.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._refused = ""

    @contextmanager
    def turn(self, pin: str, deadline: Deadline) -> Iterator[None]:
        """Wait until it is the caller's turn.

        :raises ProviderDeniedError: if this PIN has been refused.
        :raises ProviderUnavailableError: if the deadline passes meanwhile.
        """
        lock = self._lock_of_this_process()
        while not lock.acquire(timeout=deadline.remaining(NAME)):
            pass
        try:
            if pin == self._refused:
                raise ProviderDeniedError(
                    "The token has refused this PIN before, so it was not tried again: a token locks itself after a "
                    "few wrong ones. Correct KRAVN_KMS_PKCS11_PIN, or start the program again if it was the PIN of "
                    "the token that had to be corrected.",
                    provider=NAME,
                )
            yield
        finally:
            lock.release()

    def refuse(self, pin: str) -> None:
        """Let this PIN not be tried again."""
        self._refused = pin

    def _lock_of_this_process(self) -> threading.Lock:
        # After a fork, nobody is left to release what another thread of the parent held.
        if self._process != os.getpid():
            self._process, self._lock = os.getpid(), threading.Lock()
        return self._lock


def _own_command() -> tuple[str, ...]:
    if not hasattr(os, "killpg"):
        raise SettingsError("The provider pkcs11 needs a POSIX system, such as Linux or macOS.")
    python = sys.executable or ""
    if getattr(sys, "frozen", False) or not Path(python).name.startswith("python"):
        raise SettingsError(
            "The provider pkcs11 runs a subprocess with the Python interpreter of the program, and this program is "
            "frozen, or embeds Python as an application server may. Construct Pkcs11Provider with "
            f"command=[PYTHON, '-I', '-S', {str(_WORKER)!r}] and give it to configure()."
        )
    # Isolated, and without what site-packages would run at the start: it gets the path of this process by itself.
    return (python, "-I", "-S", str(_WORKER))


def _environment() -> dict[str, str]:
    """Return the environment for the library, which has settings of its own there; ours are none of its business."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("KRAVN_")}


def _checked_module(module: Path | str) -> Path:
    path = Path(module)
    if not path.is_absolute() or path.is_dir() or not path.exists():
        raise SettingsError(
            "KRAVN_KMS_PKCS11_MODULE must be the path of a PKCS#11 library that is there, from the root of the file "
            "system, such as /usr/lib/softhsm/libsofthsm2.so."
        )
    return path


def _checked_label(label: str, setting: str, bound: int) -> str:
    if not label.isprintable() or label != label.strip() or not 0 < len(label.encode(errors="replace")) <= bound:
        raise SettingsError(
            f"{setting} must be a label of 1 to {bound} bytes in UTF-8, of printable characters and without spaces "
            "around it."
        )
    return label


def _checked_id(key_id: str) -> str:
    if not _KEY_ID.fullmatch(key_id.lower()):
        raise SettingsError("KRAVN_KMS_PKCS11_KEY_ID must be a CKA_ID in hexadecimal digits, two for each byte.")
    return key_id.lower()
