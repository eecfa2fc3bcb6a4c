"""A key provider whose master keys are files of 32 random bytes, 1.key, 2.key, … in a directory. The newest wraps.

A file is no KMS. docs/writing-a-provider.md goes through this one, and says what it lacks.
"""

import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.providers.base import Deadline, KeyProvider, WrappedKey


class FileProvider(KeyProvider):
    name = "files"
    authenticates = True  # only who has the master key makes what unwraps,
    binds = True  # and only under the binding that it was made under

    def __init__(self, directory: str) -> None:
        if not Path(directory).is_absolute():
            raise errors.SettingsError("KRAVN_KMS_FILES_DIRECTORY must be a path from the root, such as /keys.")
        self._directory = Path(directory)

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        """Wrap 32 bytes under the newest master key."""
        versions = [int(path.stem) for path in self._directory.glob("*.key") if path.stem.isdecimal()]
        newest, nonce = f"{self.name}:v{max(versions, default=1)}", os.urandom(12)
        return WrappedKey(newest, nonce + self._cipher(newest, deadline).encrypt(nonce, data_key, binding))

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        """Unwrap them under the master key that wrapped them."""
        cipher, data_key = self._cipher(wrapped.master_key, deadline), b""
        try:
            data_key = cipher.decrypt(wrapped.blob[:12], wrapped.blob[12:], binding)
        except (InvalidTag, ValueError):
            data_key = b""
        if len(data_key) != 32:  # raised behind the except block, so that it carries no other error along
            raise errors.UnwrapRefusedError(
                f"{wrapped.master_key} did not wrap this, or not for here.", provider=self.name
            )
        return data_key

    def _cipher(self, master_key: str, deadline: Deadline) -> AESGCM:
        deadline.remaining(self.name)  # raises once it has passed
        name, _, version = master_key.partition(":v")
        if name != self.name or not version.isdecimal():
            raise errors.UnwrapRefusedError(f"{master_key} is no master key of {self._directory}.", provider=self.name)
        kind: type[errors.ProviderError]
        try:
            return AESGCM((self._directory / f"{version}.key").read_bytes())
        except FileNotFoundError:
            kind = errors.MasterKeyNotFoundError
        except (OSError, ValueError):
            kind = errors.ProviderUnavailableError
        raise kind(
            f"{self._directory}/{version}.key is not there, or cannot be used. Bring it back.", provider=self.name
        )
