"""XAES-256-GCM: AES-256-GCM under a subkey that is derived from every value's own 24-byte nonce.

Specified at https://c2sp.org/XAES-256-GCM as a derivation of NIST SP 800-108r1 (KDF in counter mode with CMAC) and
AES-256-GCM of NIST SP 800-38D. Random nonces may be used for 2^80 values under one key at a collision risk of 2^-32,
where plain AES-256-GCM is used up after 2^32 (SP 800-38D, section 8.3).
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from .derivation import KEY_SIZE
from .secrecy import KeepsSecret

_BLOCK_SIZE: Final = 16
_R128: Final = 0x87  # the constant of CMAC's subkey generation for 128-bit blocks, NIST SP 800-38B, section 5.3
_COUNTERS: Final = b"\x00\x01X\x00" + bytes(12) + b"\x00\x02X\x00" + bytes(12)
_TWICE: Final = (1 << 128) + 1  # times this, a number of up to 128 bits stands in both blocks
_HALF: Final = 12  # bytes of the nonce that give the subkey; the others are GCM's own nonce
_integer: Final = int.from_bytes


class Xaes256Gcm(KeepsSecret):
    """XAES-256-GCM under one key.

    Deterministic: the nonce is the caller's. Safe to use from several threads and after ``fork``, as long as the nonces
    are fresh. Cannot be pickled or copied.

    :param key: 32 uniformly random bytes.
    """

    __slots__ = ("_encrypt_blocks", "_mask")

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_SIZE:
            msg = f"an XAES-256-GCM key has {KEY_SIZE} bytes"
            raise ValueError(msg)
        # ECB over whole blocks carries no state from one call to the next, so one context serves every value.
        self._encrypt_blocks = Cipher(AES(key), ECB()).encryptor().update  # noqa: S305 - a PRF on two blocks
        k1 = _doubled(self._encrypt_blocks(bytes(_BLOCK_SIZE)))
        # The subkey is the CMAC of two messages: a counter, "X", a zero and half of the nonce, which is one block each.
        # That of one block is the encryption of the block XOR K1; all of it but the nonce is here.
        self._mask = int.from_bytes(k1 + k1, "big") ^ int.from_bytes(_COUNTERS, "big")

    def encrypt(self, nonce: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
        """Return ciphertext and tag.

        :param nonce: 24 bytes, never used before with this key.
        """
        # The same two lines as in decrypt(): they run for every value, and so would a call.
        blocks = _integer(nonce[:_HALF], "big") * _TWICE ^ self._mask
        subkey = self._encrypt_blocks(blocks.to_bytes(KEY_SIZE, "big"))
        return AESGCM(subkey).encrypt(nonce[_HALF:], plaintext, associated_data)

    def decrypt(self, nonce: bytes, ciphertext: bytes, associated_data: bytes) -> bytes | None:
        """Return the plaintext, or ``None`` if any of key, nonce, ciphertext or associated data is not the original.

        ``None`` and not an exception, so that the caller raises its own outside of an ``except`` block.
        """
        blocks = _integer(nonce[:_HALF], "big") * _TWICE ^ self._mask
        subkey = self._encrypt_blocks(blocks.to_bytes(KEY_SIZE, "big"))
        try:
            return AESGCM(subkey).decrypt(nonce[_HALF:], ciphertext, associated_data)
        except InvalidTag:
            return None


def _doubled(block: bytes) -> bytes:
    """Multiply by x in GF(2^128), as CMAC's subkey generation does (NIST SP 800-38B, section 6.1)."""
    doubled = int.from_bytes(block, "big") << 1
    if doubled >> 128:
        doubled ^= (1 << 128) | _R128
    return doubled.to_bytes(_BLOCK_SIZE, "big")
