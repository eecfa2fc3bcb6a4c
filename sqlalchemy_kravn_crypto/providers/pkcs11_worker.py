"""The program of the subprocess that talks to an HSM: the only process that the vendor's library is loaded in.

It serves one request and ends. It is run by its path, isolated from the environment's Python settings, and imports
nothing of this package. Both the request and the answer are one line of JSON, with bytes in base64:

.. code-block:: text

    {"path": […], "seconds": 9.8, "module": …, "token": …, "pin": …, "key": …, "key_id": hexadecimal or null,
     "mechanism": "aes-gcm" or "aes-kwp", "operation": "wrap", "unwrap" or "examine", "value": …, "binding": …}

    {"value": …, "key_id": hexadecimal}         the initialisation vector and the ciphertext, or the data key
    {"attributes": {…}, "flags": […], …}        what was found out of the master key and the token
    {"stage": …, "code": …, …}                  how far it came, and what stood in the way
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import signal
import sys
from typing import Any, BinaryIO, Final, NoReturn

IV_SIZE: Final = 12
CIPHERTEXT_SIZE: Final = 48
"""32 bytes and the tag, in bytes."""

KWP_SIZE: Final = 40
"""32 bytes and the integrity check of RFC 5649, in bytes."""

_MAX_REQUEST_SIZE: Final = 1_000_000
_GRACE: Final = 1.0  # seconds for which the one that asked may be late to end this process

_ATTRIBUTES: Final = (
    "SENSITIVE",
    "EXTRACTABLE",
    "ALWAYS_SENSITIVE",
    "NEVER_EXTRACTABLE",
    "ENCRYPT",
    "DECRYPT",
    "WRAP",
    "UNWRAP",
    "MODIFIABLE",
    "DESTROYABLE",
    "VALUE_LEN",
)
_FLAGS: Final = ("USER_PIN_COUNT_LOW", "USER_PIN_FINAL_TRY", "USER_PIN_TO_BE_CHANGED")


class Refused(Exception):  # noqa: N818 - it is an answer
    """The HSM can be talked to, but not for this.

    :ivar answer: what goes into the answer beside the stage.
    """

    def __init__(self, code: str, **details: object) -> None:
        super().__init__(code)
        self.answer = {"code": code, **details}


class Conversation:
    """What is said to the library for one request, in stages.

    :ivar stage: how far it came: ``library``, ``token``, ``login``, ``key``, ``use`` or ``close``.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self.stage = "library"
        self._request = request
        # Untyped on purpose: what keys can do is found out at run time, by python-pkcs11 too.
        self._p11: Any = importlib.import_module("pkcs11")

    def answer(self) -> dict[str, object]:
        """Do what is asked for, and return the answer."""
        try:
            return self._result()
        except Refused as refused:
            return {"stage": self.stage, **refused.answer}
        except Exception as error:  # noqa: BLE001 - of the binding, of Python: the one that asked is told of each
            return {"stage": self.stage, "code": _code_of(error)}

    def _result(self) -> dict[str, object]:
        library = self._library()
        self.stage = "token"
        token = self._token(library)
        # Before the login, which resets them.
        flags = [name for name in _FLAGS if token.flags & self._p11.TokenFlag[name]]
        self.stage = "login"
        session = token.open(user_pin=self._request["pin"])
        self.stage = "key"
        key, key_id = self._key(session)
        self.stage = "use"
        value = base64.b64decode(self._request["value"])
        match self._request["operation"]:
            case "wrap":
                result: dict[str, object] = {"value": _base64(self._wrapped(session, key, value)), "key_id": key_id}
            case "unwrap":
                result = {"value": _base64(self._unwrapped(session, key, value)), "key_id": key_id}
            case _:
                found = {name: self._attribute(key, name) for name in _ATTRIBUTES}
                result = {"attributes": found, "flags": flags, "key_id": key_id, "model": token.model}
        self.stage = "close"
        session.close()
        return result

    def _library(self) -> Any:
        path = self._request["module"]
        try:
            return self._p11.lib(path)
        except self._p11.PKCS11Error as error:
            # From the loader of the operating system, which says what is missing; the library has not been asked yet.
            reason = str(error).removeprefix(f"OS exception while loading {path}: ")
            if type(error) is not self._p11.PKCS11Error or reason == str(error):
                raise
        raise Refused("NotLoaded", detail=reason)

    def _token(self, library: Any) -> Any:
        found, others = [], False
        for slot in library.get_slots(token_present=True):
            try:
                token = slot.get_token()
            except (self._p11.TokenNotPresent, self._p11.TokenNotRecognised):
                continue  # taken out since, or in a slot that is not ours
            if token.label == self._request["token"]:
                found.append(token)
            elif token.flags & self._p11.TokenFlag.TOKEN_INITIALIZED:
                others = True
        if not found:
            raise Refused("NoSuchToken" if others else "NoToken")
        if len(found) > 1:
            raise Refused("SeveralTokens")
        return found[0]

    def _key(self, session: Any) -> tuple[Any, str]:
        attribute = self._p11.Attribute
        wanted = {
            attribute.CLASS: self._p11.ObjectClass.SECRET_KEY,
            attribute.KEY_TYPE: self._p11.KeyType.AES,
            attribute.TOKEN: True,
            attribute.LABEL: self._request["key"],
        }
        if self._request["key_id"] is not None:
            wanted[attribute.ID] = bytes.fromhex(self._request["key_id"])
        found = [(key, bytes(key[attribute.ID]).hex()) for key in session.get_objects(wanted)]
        if not found:
            raise Refused("NoKey")
        if len(found) > 1:
            raise Refused("SeveralKeys", ids=sorted(key_id for _, key_id in found))
        if not found[0][1]:
            raise Refused("NoId")
        return found[0]

    def _wrapped(self, session: Any, key: Any, data_key: bytes) -> bytes:
        if self._request["mechanism"] == "aes-gcm":
            return self._encrypted(key, data_key)
        attribute = self._p11.Attribute
        held = session.create_object(
            {
                attribute.CLASS: self._p11.ObjectClass.SECRET_KEY,
                attribute.KEY_TYPE: self._p11.KeyType.AES,
                attribute.TOKEN: False,
                attribute.PRIVATE: True,
                attribute.SENSITIVE: True,  # not to be read, only to be wrapped
                attribute.EXTRACTABLE: True,
                attribute.VALUE: data_key,
            }
        )
        wrapped: bytes = _method(key, "wrap_key")(held, mechanism=self._kwp(session))
        if len(wrapped) != KWP_SIZE:
            raise Refused("NotKWP")
        return wrapped

    def _unwrapped(self, session: Any, key: Any, wrapped: bytes) -> bytes:
        if self._request["mechanism"] == "aes-gcm":
            return self._decrypted(key, wrapped[:IV_SIZE], wrapped[IV_SIZE:])
        attribute = self._p11.Attribute
        held = _method(key, "unwrap_key")(
            self._p11.ObjectClass.SECRET_KEY,
            self._p11.KeyType.AES,
            wrapped,
            mechanism=self._kwp(session),
            store=False,
            capabilities=self._p11.MechanismFlag(0),
            # It is there to be read once, and goes with the session.
            template={attribute.PRIVATE: True, attribute.SENSITIVE: False, attribute.EXTRACTABLE: True},
        )
        return bytes(held[attribute.VALUE])

    def _encrypted(self, key: Any, data_key: bytes) -> bytes:
        iv = os.urandom(IV_SIZE)
        try:
            ciphertext = self._encrypted_with(iv, key, data_key)
        except (self._p11.MechanismParamInvalid, self._p11.ArgumentsBad):
            # There are HSMs that take none, but write one of their own over twelve zero bytes.
            iv = bytes(IV_SIZE)
            ciphertext = self._encrypted_with(iv, key, data_key)
        # The library was given the memory of `iv` itself, so what it wrote there is in it now. If that is nothing, or
        # it has put its own behind the ciphertext, then nothing of all this leaves this process.
        if not any(iv) or len(ciphertext) != CIPHERTEXT_SIZE:
            raise Refused("OwnIV")
        return iv + ciphertext

    def _encrypted_with(self, iv: bytes, key: Any, data_key: bytes) -> bytes:
        encrypt = _method(key, "encrypt")
        ciphertext: bytes = encrypt(data_key, mechanism=self._p11.Mechanism.AES_GCM, mechanism_param=self._gcm(iv))
        return ciphertext

    def _decrypted(self, key: Any, iv: bytes, ciphertext: bytes) -> bytes:
        decrypt = _method(key, "decrypt")
        data_key: bytes = decrypt(ciphertext, mechanism=self._p11.Mechanism.AES_GCM, mechanism_param=self._gcm(iv))
        return data_key

    def _gcm(self, iv: bytes) -> Any:
        return self._p11.GCMParams(iv, base64.b64decode(self._request["binding"]), 128)

    def _kwp(self, session: Any) -> Any:
        """Return what this HSM calls RFC 5649: where it has the newer name, the older one can mean another padding."""
        newer = self._p11.Mechanism.AES_KEY_WRAP_KWP
        return newer if newer in session.token.slot.get_mechanisms() else self._p11.Mechanism.AES_KEY_WRAP_PAD

    def _attribute(self, key: Any, name: str) -> object:
        try:
            return key[self._p11.Attribute[name]]
        except self._p11.PKCS11Error:
            return None  # not every HSM knows every attribute


def _method(key: Any, name: str) -> Any:
    """Return a method of a key, which it has if the attribute of the key allows it."""
    method = getattr(key, name, None)
    if method is None:
        raise Refused("NotPermitted")
    return method


def _code_of(error: Exception) -> str:
    """Return the name of an error; of one that python-pkcs11 has no name for, its number."""
    number = re.search(r"0x[0-9a-f]{1,16}$", str(error)) if type(error).__name__ == "PKCS11Error" else None
    return number[0] if number else type(error).__name__


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _take_stdout() -> BinaryIO:
    """Return the way back to the one that asked, and leave the library none to write on."""
    taken = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return taken


def _leave_no_core() -> None:
    """Have a crash leave no memory on the disk: the PIN and the data key are in it."""
    import resource  # noqa: PLC0415 - not every system that can import this module has it

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    # One byte rather than none: a limit of none does not keep Linux from handing the memory to a program that collects
    # such, and one of 1 does.
    bound = 0 if hard == 0 else 1
    resource.setrlimit(resource.RLIMIT_CORE, (bound, bound))


def _end_in(seconds: float) -> None:
    """Have the operating system end this process, whatever the library does and whoever has gone meanwhile."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> NoReturn:
    """Serve the request on standard input."""
    _leave_no_core()
    way_back = _take_stdout()
    request = json.loads(sys.stdin.buffer.readline(_MAX_REQUEST_SIZE))
    _end_in(request["seconds"] + _GRACE)
    sys.path[:] = request["path"]
    with way_back:
        way_back.write(json.dumps(Conversation(request).answer()).encode() + b"\n")
    # Without a farewell to the library, in which some crash: the session is closed by now, or goes with the process.
    os._exit(0)


if __name__ == "__main__":
    main()
