"""What a provider logs in with: given once, or in a file that is read anew for every operation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..exceptions import CredentialError, SettingsError
from ..secrecy import KeepsSecret

MAX_FILE_SIZE: Final = 65_536
"""Bound on a file that holds a secret, in bytes."""


class Credential(KeepsSecret):
    """A secret that a provider needs at every operation, which may be days apart.

    What an agent or Kubernetes renews in a file is so taken up without a restart. Printing one shows where it is from.

    :param setting: the variable that it is from, without ``_FILE``; for messages.
    :param value: the secret, if it is given once and for all.
    :param path: the file that holds it, otherwise.
    """

    __slots__ = ("_path", "_value", "setting")

    def __init__(self, setting: str, *, value: str | None = None, path: Path | None = None) -> None:
        if (value is None) is (path is None):
            msg = "a credential is either a value or in a file"
            raise ValueError(msg)
        self.setting = setting
        self._value = value
        self._path = path

    def reveal(self, provider: str) -> str:
        """Return the secret as it is now.

        :param provider: the provider's name, for the error.
        :raises CredentialError: if the file cannot be read, is empty, too large or no text.
        """
        if self._path is None:
            return self._value or ""
        value, reason = read_secret(self._path)
        if reason:
            raise CredentialError(
                f"{self.setting}_FILE names {self._path}, which cannot be used: {reason}. Check that what renews it is "
                "running.",
                provider=provider,
            )
        return value

    def __repr__(self) -> str:
        return f"<Credential {self.setting}{'' if self._path is None else '_FILE'}>"


@dataclass(frozen=True, slots=True)
class Form:
    """What a secret must look like to be sent at all.

    :param pattern: what it must match as a whole.
    :param meaning: the same in words, for messages.
    """

    pattern: re.Pattern[str]
    meaning: str


class FormedSecret(KeepsSecret):
    """A secret of a certain form.

    Its file may not be there yet when this is made: the first operation reads it again, and says so.

    :param provider: the provider's name, for the errors.
    :raises SettingsError: if it can be had, and has another form.
    """

    __slots__ = ("_credential", "_form", "_provider")

    def __init__(self, credential: Credential, form: Form, provider: str) -> None:
        self._credential = credential
        self._form = form
        self._provider = provider
        try:
            value = credential.reveal(provider)
        except CredentialError:
            return
        if not form.pattern.fullmatch(value):
            raise SettingsError(f"{self.setting} must be {form.meaning}.")

    @property
    def setting(self) -> str:
        """The variable that it is from."""
        return self._credential.setting

    def now(self) -> str:
        """Return it as it is now.

        :raises CredentialError: if its file cannot be read, or holds something of another form.
        """
        value = self._credential.reveal(self._provider)
        if not self._form.pattern.fullmatch(value):
            raise self.malformed()
        return value

    def malformed(self) -> CredentialError:
        """Return the error of one that has another form."""
        return CredentialError(
            f"{self.setting} must be {self._form.meaning}. Check what writes its file.", provider=self._provider
        )


def as_credential(secret: str | Credential, setting: str) -> Credential:
    """Return what a constructor was given as a credential.

    :param setting: the variable that stands for it.
    """
    return secret if isinstance(secret, Credential) else Credential(setting, value=secret)


def read_secret(path: Path) -> tuple[str, str]:
    """Return the text of a file without white space around it, and why it cannot be used, if so."""
    content = b""
    reason: str | None = None
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_SIZE + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    if reason is None and len(content) > MAX_FILE_SIZE:
        reason = f"it has more than {MAX_FILE_SIZE:,} bytes"
    if reason is not None:
        return "", reason
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        return "", "it is not UTF-8 text"
    return text, "" if text else "it is empty"
