"""A KMS with switches: real AES-GCM under a master key of its own, and whatever can go wrong on demand.

For what the key store makes of a KMS's behaviour. How a KMS behaves is for the tests against real ones.
"""

import os
import threading
from collections import Counter

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sqlalchemy_kravn_crypto.exceptions import ProviderUnavailableError, UnwrapRefusedError
from sqlalchemy_kravn_crypto.providers.base import Deadline, KeyProvider, WrappedKey


class SwitchKMS(KeyProvider):
    name = "vault"
    authenticates = True
    binds = True

    def __init__(self, *, name: str = "vault", authenticates: bool = True, binds: bool = True) -> None:
        self.name = name  # type: ignore[misc] # a test has several in one process
        self.authenticates = authenticates  # type: ignore[misc] # the same
        self.binds = binds  # type: ignore[misc] # the same
        self.calls: Counter[str] = Counter()
        self.down = False
        self.ignores_binding = False
        self.returns: bytes | None = None
        self.hangs = threading.Event()
        self.hangs.set()
        self.raises: Exception | None = None
        self._aead = AESGCM(os.urandom(32))

    @property
    def master_key(self) -> str:
        return "transit/kravn"

    def recognises(self, master_key: str) -> bool:
        return master_key.rpartition(":v")[0] == self.master_key

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        self._serve("wrap")
        nonce = os.urandom(12)
        return WrappedKey(f"{self.master_key}:v1", nonce + self._aead.encrypt(nonce, data_key, self._bound(binding)))

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        self._serve("unwrap")
        if self.returns is not None:
            return self.returns
        try:
            return self._aead.decrypt(wrapped.blob[:12], wrapped.blob[12:], self._bound(binding))
        except InvalidTag:
            pass
        raise UnwrapRefusedError("refused", provider=self.name)

    def _bound(self, binding: bytes) -> bytes:
        return b"" if self.ignores_binding else binding

    def _serve(self, operation: str) -> None:
        self.calls[operation] += 1
        self.hangs.wait()
        if self.raises is not None:
            raise self.raises
        if self.down:
            raise ProviderUnavailableError("down", provider=self.name)
