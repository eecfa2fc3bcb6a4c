"""The format a second time, written from its description and sharing no code with the package.

It is what the frozen vectors were made with, and what the package is compared with on random input. Slow, and without
a check that a writer does not need.
"""

import hashlib
import hmac
import math
from base64 import b64encode
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from uuid import UUID

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


def frame(key: bytes, name: str, nonce: bytes, payload: bytes, row: Sequence[str] | None = None) -> bytes:
    header = b"\xf9\x02" + key_id(key) + hint(name)
    associated_data = header + lp(name.encode())
    if row is not None:
        associated_data += lp(lp(*(text.encode() for text in row)))
    return header + nonce + xaes_encrypt(expand(key, "aead/02"), nonce, payload, associated_data)


def text(value: bytes) -> str:
    return "enc:v3:" + b64encode(value).decode().rstrip("=").translate({ord("+"): "-", ord("/"): "_"})


# --- Payloads --------------------------------------------------------------------------------------------------------


def padded(content: bytes) -> bytes:
    content += b"\x80"
    while len(content) % 48:
        content += b"\x00"
    return content


def sixteen_bytes(number: int) -> bytes:
    return bytes(number >> shift & 0xFF for shift in range(120, -1, -8))


def text_payload(value: str) -> bytes:
    return b"\x03" + value.encode("utf-8")


def bytes_payload(value: bytes) -> bytes:
    return b"\x04" + value


def integer_payload(value: int) -> bytes:
    if -(1 << 127) <= value < 1 << 127:
        return b"\x10" + sixteen_bytes(value)
    digits, rest = "", abs(value)
    while rest:
        rest, digit = divmod(rest, 10)
        digits += "0123456789"[digit]
    return b"\x11" + ("-" * (value < 0) + digits[::-1]).encode("ascii")


def decimal_payload(value: Decimal) -> bytes:
    """By the algorithm of the General Decimal Arithmetic Specification, to-scientific-string."""
    sign, coefficient, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    digits = "".join(map(str, coefficient))
    adjusted = exponent + len(digits) - 1
    if exponent > 0 or adjusted < -6:
        text = digits[0] + (f".{digits[1:]}" if digits[1:] else "") + f"E{adjusted:+d}"
    elif exponent == 0:
        text = digits
    else:
        digits = digits.rjust(1 - exponent, "0")
        text = f"{digits[:exponent]}.{digits[exponent:]}"
    return b"\x92" + padded(("-" * sign + text).encode("ascii"))


def boolean_payload(value: bool) -> bytes:  # noqa: FBT001 - the value
    return b"\x13\x01" if value else b"\x13\x00"


def date_payload(value: date) -> bytes:
    return f"\x14{value.year:04}-{value.month:02}-{value.day:02}".encode("ascii")


def time_payload(value: time) -> bytes:
    return f"\x15{value.hour:02}:{value.minute:02}:{value.second:02}.{value.microsecond:06}".encode("ascii")


def datetime_payload(value: datetime) -> bytes:
    local = date_payload(value.date())[1:] + b"T" + time_payload(value.time())[1:]
    offset = value.utcoffset()
    if offset is None:
        return b"\x16" + local
    seconds = abs(offset) // timedelta(seconds=1)
    sign = "-" if offset < timedelta() else "+"
    return b"\x17" + local + f"{sign}{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}".encode("ascii")


def uuid_payload(value: UUID) -> bytes:
    return b"\x18" + bytes.fromhex(str(value).replace("-", ""))


def interval_payload(value: timedelta) -> bytes:
    return b"\x19" + sixteen_bytes(value // timedelta(microseconds=1))


def enum_payload(name: str) -> bytes:
    return b"\x9a" + padded(name.encode("utf-8"))


def float_payload(value: float) -> bytes:
    """By the definition of binary64: sign, exponent and fraction."""
    sign = int(math.copysign(1, value) < 0)
    mantissa, exponent = math.frexp(abs(value))
    biased = exponent + 1022
    if mantissa == 0:
        biased = fraction = 0
    elif biased < 1:
        biased, fraction = 0, int(math.ldexp(mantissa, biased + 52))
    else:
        fraction = int(math.ldexp(mantissa, 53)) - (1 << 52)
    bits = sign << 63 | biased << 52 | fraction
    return b"\x1b" + bytes(bits >> shift & 0xFF for shift in range(56, -1, -8))
