"""The format a second time, written from its description and sharing no code with the package.

It is what the frozen vectors were made with, and what the package is compared with on random input. Slow, and without
a check that a writer does not need.
"""

import hashlib
import hmac
from base64 import b64encode

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB


def aes_block(key: bytes, block: bytes) -> bytes:
    encryptor = Cipher(AES(key), ECB()).encryptor()  # noqa: S305 - the building block of CMAC
    return encryptor.update(block) + encryptor.finalize()


def xor(left: bytes, right: bytes) -> bytes:
    return bytes(one ^ other for one, other in zip(left, right, strict=True))


def cmac_subkey(key: bytes) -> tuple[bytes, bytes]:
    """Return L and K1 of CMAC, the latter bit by bit."""
    block = aes_block(key, bytes(16))
    bits = [byte >> shift & 1 for byte in block for shift in range(7, -1, -1)]
    shifted = [*bits[1:], 0]
    doubled = bytearray(
        sum(bit << 7 - place for place, bit in enumerate(shifted[at : at + 8])) for at in range(0, 128, 8)
    )
    if bits[0]:
        doubled[-1] ^= 0x87
    return block, bytes(doubled)


def xaes_subkey(key: bytes, nonce: bytes) -> bytes:
    k1 = cmac_subkey(key)[1]
    halves = (bytes([0, counter, 0x58, 0]) + nonce[:12] for counter in (1, 2))
    return b"".join(aes_block(key, xor(half, k1)) for half in halves)


def xaes_encrypt(key: bytes, nonce: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
    return AESGCM(xaes_subkey(key, nonce)).encrypt(nonce[12:], plaintext, associated_data)


def lp(*parts: bytes) -> bytes:
    return b"".join(bytes([len(part) >> shift & 0xFF for shift in (24, 16, 8, 0)]) + part for part in parts)


def hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, section 2.3, with SHA-256."""
    output, block, counter = b"", b"", 1
    while len(output) < length:
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        output, counter = output + block, counter + 1
    return output[:length]


def expand(key: bytes, purpose: str) -> bytes:
    return hkdf_expand(key, lp(b"sqlalchemy-kravn-crypto/v1", purpose.encode()), 32)


def key_id(key: bytes) -> bytes:
    return expand(key, "key-id")[:8]


def hint(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:2]


def frame(key: bytes, name: str, nonce: bytes, payload: bytes) -> bytes:
    header = b"\xf9\x02" + key_id(key) + hint(name)
    return header + nonce + xaes_encrypt(expand(key, "aead/02"), nonce, payload, header + lp(name.encode()))


def text(value: bytes) -> str:
    return "enc:v3:" + b64encode(value).decode().rstrip("=").translate({ord("+"): "-", ord("/"): "_"})
