"""SoftHSM for the tests, from Debian's packages: a PKCS#11 library whose tokens are files, so there is no server.

OpenSC comes with it: its ``pkcs11-tool``, and a library that passes every call on to another one and writes down which
those are.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from glob import glob
from pathlib import Path
from typing import Any, Final

from tests.debian import ensure, program, to_be_installed
from tests.processes import UnavailableError, run

_PACKAGES: Final = ("softhsm2", "opensc", "opensc-pkcs11")
_PROGRAMS: Final = ("softhsm2-util", "pkcs11-tool")
_LIBRARIES: Final = {
    "libsofthsm2.so": (
        "/usr/lib/softhsm/libsofthsm2.so",
        "/usr/lib/*/softhsm/libsofthsm2.so",
        "/usr/lib64/softhsm/libsofthsm2.so",
        "/usr/lib64/pkcs11/libsofthsm2.so",
        "/usr/local/lib/softhsm/libsofthsm2.so",
        "/opt/homebrew/lib/softhsm/libsofthsm2.so",
    ),
    "pkcs11-spy.so": (
        "/usr/lib/*/pkcs11-spy.so",
        "/usr/lib/pkcs11-spy.so",
        "/usr/lib64/pkcs11-spy.so",
        "/usr/local/lib/pkcs11-spy.so",
        "/opt/homebrew/lib/pkcs11-spy.so",
    ),
}
_TIMEOUT: Final = 60.0
_ADMINISTRATOR: Final = Path(__file__).with_name("softhsm_administrator.py")


class Token:
    """A token of its own, and what its security officer and its user do with their tools."""

    def __init__(self, hsm: SoftHSM, label: str) -> None:
        self.hsm = hsm
        self.label = label
        self.pin = secrets.token_hex(8)
        self.so_pin = secrets.token_hex(8)

    def settings(self, **other: Any) -> dict[str, Any]:
        """Return what the provider is constructed with."""
        return {"module": self.hsm.module, "token": self.label, "pin": self.pin, "key": "kravn", **other}

    def create_key(self, key: str = "kravn", key_id: str = "01", **attributes: Any) -> None:
        """Make an AES-256 key that can encrypt and decrypt alone and cannot leave the token, but for what is given."""
        self.administer("create_key", key=key, key_id=key_id, attributes=attributes)

    def import_key(self, value: bytes, key: str = "kravn", key_id: str = "01", **attributes: Any) -> None:
        """Bring in an AES key that the test knows."""
        self.administer("import_key", value=value.hex(), key=key, key_id=key_id, attributes=attributes)

    def destroy_key(self, key: str = "kravn", key_id: str = "01") -> None:
        self.administer("destroy_key", key=key, key_id=key_id)

    def secret_keys(self) -> list[dict[str, Any]]:
        """Return the attributes of all secret keys in the token."""
        found: list[dict[str, Any]] = self.administer("keys")
        return found

    def administer(self, action: str, **what: Any) -> Any:
        """Do something in a process of its own: the library stays out of that of the tests."""
        request = {"module": str(self.hsm.module), "token": self.label, "pin": self.pin, "action": action, **what}
        return json.loads(_run([sys.executable, str(_ADMINISTRATOR)], self.hsm.environment, json.dumps(request)))


class SoftHSM:
    """A directory for tokens, and the file by which the library finds it.

    :ivar environment: variables that the library needs.
    """

    def __init__(self, home: Path) -> None:
        ensure_softhsm()
        self.module = library("libsofthsm2.so")
        self.tokens = home / "tokens"
        self.tokens.mkdir()
        self.configuration = home / "softhsm2.conf"
        self.configuration.write_text(f"directories.tokendir = {self.tokens}\nobjectstore.backend = file\n")
        self.environment = {"SOFTHSM2_CONF": str(self.configuration)}

    def new_token(self, label: str = "bank") -> Token:
        """Initialise a token; it may have the label of another."""
        token = Token(self, label)
        pins = ["--pin", token.pin, "--so-pin", token.so_pin]
        _run([program("softhsm2-util"), "--init-token", "--free", "--label", label, *pins], self.environment)
        return token

    def new_token_without_pin(self, label: str = "bank") -> Token:
        """Initialise a token whose user has no PIN yet."""
        token = Token(self, label)
        command = [program("pkcs11-tool"), "--module", str(self.module), "--slot-index", "0", "--init-token"]
        _run([*command, "--label", label, "--so-pin", token.so_pin], self.environment)
        return token


class Spy:
    """A library that passes every call on to SoftHSM and writes it down.

    :ivar environment: variables that the two libraries need.
    """

    def __init__(self, hsm: SoftHSM, log: Path) -> None:
        self.module = library("pkcs11-spy.so")
        self.log = log
        self.environment = {**hsm.environment, "PKCS11SPY": str(hsm.module), "PKCS11SPY_OUTPUT": str(log)}

    def calls(self) -> list[str]:
        """Return the functions that were called, in their order."""
        return re.findall(r"^\d+: (C_\w+)$", self.text(), flags=re.MULTILINE)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def softhsm_description() -> str:
    """Return what the tests will run.

    :raises UnavailableError: if they cannot run any.
    """
    if missing := _missing():
        return to_be_installed(missing, _PACKAGES)
    return f"{_run([program('softhsm2-util'), '--version'], {}).strip()}, {library('libsofthsm2.so')}"


def ensure_softhsm() -> None:
    """Install what is missing.

    :raises UnavailableError: if that cannot be done.
    """
    ensure(_missing, _PACKAGES)


def library(name: str) -> Path:
    """Return where a library is.

    :raises UnavailableError: if it is nowhere.
    """
    found = [path for pattern in _LIBRARIES[name] for path in sorted(glob(pattern))]  # noqa: PTH207 - from the root
    if not found:
        raise UnavailableError(f"There is no {name} in any of {', '.join(_LIBRARIES[name])}.")
    return Path(found[0])


def _missing() -> str:
    libraries = [name for name, patterns in _LIBRARIES.items() if not any(map(glob, patterns))]
    return ", ".join([*(name for name in _PROGRAMS if not program(name)), *libraries])


def _run(command: list[str], environment: dict[str, str], given: str = "") -> str:
    return run(command, timeout=_TIMEOUT, environment=environment, given=given)
