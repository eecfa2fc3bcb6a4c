"""Keys to sign with, derived from the data keys: under the same custody, and rotated with them.

A signing key is ``Expand(data key, "signing/" + purpose)``: HKDF-Expand with SHA-256 (RFC 5869), as every other key
here (docs/format.md). Nobody can get from one to the data key, or to that of another purpose.
"""

from __future__ import annotations

from typing import Final

from .context import current_keyring
from .keyring import DataKey
from .secrecy import KeepsSecret

MAX_PURPOSE_LENGTH: Final = 128
"""Bound on the name of a purpose, in characters."""


class SigningKey(KeepsSecret):
    """A key to sign with, and those that verify what was signed before.

    Printing one shows no key, and it cannot be pickled.

    :ivar key: 32 bytes, for HMAC-SHA256 or anything else that takes a key of that length.
    :ivar key_id: which data key it is from, 16 hexadecimal characters; no secret, such as for the ``kid`` of a JWT.
    :ivar previous: the keys of the other data keys that this process holds, the newest first: those that were the
        primary, and one that is about to be.
    """

    __slots__ = ("key", "key_id", "previous")

    def __init__(self, data_key: DataKey, purpose: str, previous: tuple[SigningKey, ...] = ()) -> None:
        self.key = data_key.signing_key(purpose)
        self.key_id = data_key.key_id.hex()
        self.previous = previous

    @property
    def all(self) -> tuple[SigningKey, ...]:
        """This one and the previous ones."""
        return self, *self.previous

    def with_id(self, key_id: str) -> SigningKey | None:
        """Return the one of them that a signature names; ``None`` if there is none, and the signature is not valid."""
        return next((one for one in self.all if one.key_id == key_id), None)

    def __repr__(self) -> str:
        return f"<SigningKey {self.key_id} previous={len(self.previous)}>"


def signing_key(purpose: str, *, accept_bootstrap: bool = False) -> SigningKey:
    """Return the key to sign with for a purpose, as of now. Ask for it whenever something is signed or verified.

    A process in which the rotation of a data key has not arrived yet signs under the key before, and verifies what
    others sign under the new one, since it holds that before they do. Nothing verifies under a data key that was
    disabled or destroyed, even while this process still reads what is under it.

    :param purpose: what is signed, such as ``"sessions"``: 1 to 128 printable ASCII characters. Another purpose has
        another key.
    :param accept_bootstrap: after the adoption of a KMS, whether what was signed under the bootstrap key still
        verifies. Whoever knows ``KRAVN_SECRET`` can sign so, without the KMS.
    :raises NotConfiguredError: if the process is not configured.
    :raises ValueError: if the purpose is not of that form.
    """
    if not 0 < len(purpose) <= MAX_PURPOSE_LENGTH or not purpose.isascii() or not purpose.isprintable():
        msg = f"a purpose has 1 to {MAX_PURPOSE_LENGTH} printable ASCII characters"
        raise ValueError(msg)
    primary, others = current_keyring().verifying(accept_bootstrap=accept_bootstrap)
    return SigningKey(primary, purpose, tuple(SigningKey(other, purpose) for other in others))
