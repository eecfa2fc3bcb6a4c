"""What no KMS that a program may meet does, but the key store must withstand."""

from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey
from sqlalchemy_kravn_crypto.testing import FakeKMS


class MisbehavingKMS(FakeKMS):
    def __init__(self, *, name: str = "vault", authenticates: bool = True, binds: bool = True) -> None:
        super().__init__(name)
        self.authenticates = authenticates
        self.binds = binds
        self.ignores_binding = False
        self.returns: bytes | None = None
        self.raises: Exception | None = None

    @property
    def master_key(self) -> str:
        return "transit/kravn"

    def wrap(self, data_key: bytes, binding: bytes, deadline: Deadline) -> WrappedKey:
        return super().wrap(data_key, b"" if self.ignores_binding else binding, deadline)

    def unwrap(self, wrapped: WrappedKey, binding: bytes, deadline: Deadline) -> bytes:
        unwrapped = super().unwrap(wrapped, b"" if self.ignores_binding else binding, deadline)
        return unwrapped if self.returns is None else self.returns

    def _answer(self, operation: str) -> None:
        super()._answer(operation)
        if self.raises is not None:
            raise self.raises
