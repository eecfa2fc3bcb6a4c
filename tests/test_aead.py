"""XAES-256-GCM against its published vectors, and what it must refuse."""

import copy
import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sqlalchemy_kravn_crypto.aead import Xaes256Gcm
from tests import reference

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "xaes_256_gcm.json").read_text("utf-8"))
ACCUMULATED_ITERATIONS = 10_000
MAX_ITERATION_SIZE = 32 + 24 + 1 + 255 + 1 + 255

KEY = bytes(range(32))
NONCE = bytes(range(24))
PLAINTEXT = b"thirteen byte"
ASSOCIATED_DATA = b"associated"


@pytest.fixture(params=PUBLISHED["vectors"], ids=lambda vector: vector["comment"])
def vector(request: pytest.FixtureRequest) -> dict[str, bytes]:
    return {name: bytes.fromhex(value) for name, value in request.param.items() if name != "comment"}


def test_both_branches_of_the_doubling_are_among_the_vectors() -> None:
    assert [int(vector["L"][0], 16) >> 3 for vector in PUBLISHED["vectors"]] == [0, 1]


def test_encrypts_the_published_vector(vector: dict[str, bytes]) -> None:
    aead = Xaes256Gcm(vector["key"])
    assert aead.encrypt(vector["nonce"], vector["plaintext"], vector["associated_data"]) == vector["ciphertext"]


def test_decrypts_the_published_vector(vector: dict[str, bytes]) -> None:
    aead = Xaes256Gcm(vector["key"])
    assert aead.decrypt(vector["nonce"], vector["ciphertext"], vector["associated_data"]) == vector["plaintext"]


def test_reference_has_the_published_intermediate_values(vector: dict[str, bytes]) -> None:
    assert reference.cmac_subkey(vector["key"]) == (vector["L"], vector["K1"])
    assert reference.xaes_subkey(vector["key"], vector["nonce"]) == vector["subkey"]
    encrypted = reference.xaes_encrypt(vector["key"], vector["nonce"], vector["plaintext"], vector["associated_data"])
    assert encrypted == vector["ciphertext"]


def test_accumulates_the_published_result() -> None:
    published = PUBLISHED["accumulated"]
    stream = hashlib.shake_128().digest(ACCUMULATED_ITERATIONS * MAX_ITERATION_SIZE)
    assert stream.hex().startswith(published["stream_begins"])
    position = 0

    def read(size: int) -> bytes:
        nonlocal position
        position += size
        return stream[position - size : position]

    result = hashlib.shake_128()
    for _ in range(ACCUMULATED_ITERATIONS):
        key, nonce = read(32), read(24)
        plaintext = read(read(1)[0])
        associated_data = read(read(1)[0])
        aead = Xaes256Gcm(key)
        ciphertext = aead.encrypt(nonce, plaintext, associated_data)
        assert aead.decrypt(nonce, ciphertext, associated_data) == plaintext
        result.update(ciphertext)
    assert result.hexdigest(32) == published["results"][str(ACCUMULATED_ITERATIONS)]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4096, 1_000_000])
def test_agrees_with_the_reference_at_every_length(size: int) -> None:
    random = Random(size)
    key, nonce, plaintext = random.randbytes(32), random.randbytes(24), random.randbytes(size)
    encrypted = Xaes256Gcm(key).encrypt(nonce, plaintext, ASSOCIATED_DATA)
    assert encrypted == reference.xaes_encrypt(key, nonce, plaintext, ASSOCIATED_DATA)
    assert Xaes256Gcm(key).decrypt(nonce, encrypted, ASSOCIATED_DATA) == plaintext


def flipped(value: bytes, bit: int) -> bytes:
    return (int.from_bytes(value, "big") ^ 1 << bit).to_bytes(len(value), "big")


@pytest.mark.parametrize("part", ["nonce", "ciphertext", "associated_data"])
def test_refuses_every_flipped_bit(part: str) -> None:
    aead = Xaes256Gcm(KEY)
    original = {
        "nonce": NONCE,
        "ciphertext": aead.encrypt(NONCE, PLAINTEXT, ASSOCIATED_DATA),
        "associated_data": ASSOCIATED_DATA,
    }
    assert aead.decrypt(**original) == PLAINTEXT
    for bit in range(8 * len(original[part])):
        assert aead.decrypt(**original | {part: flipped(original[part], bit)}) is None, f"bit {bit}"


def test_refuses_another_key() -> None:
    ciphertext = Xaes256Gcm(KEY).encrypt(NONCE, PLAINTEXT, ASSOCIATED_DATA)
    for bit in range(256):
        assert Xaes256Gcm(flipped(KEY, bit)).decrypt(NONCE, ciphertext, ASSOCIATED_DATA) is None


def test_refuses_every_truncation_and_an_extra_byte() -> None:
    aead = Xaes256Gcm(KEY)
    ciphertext = aead.encrypt(NONCE, PLAINTEXT, ASSOCIATED_DATA)
    for size in range(len(ciphertext)):
        assert aead.decrypt(NONCE, ciphertext[:size], ASSOCIATED_DATA) is None, f"{size} bytes"
    assert aead.decrypt(NONCE, ciphertext + b"\0", ASSOCIATED_DATA) is None


@pytest.mark.parametrize("size", [0, 1, 16, 24, 31, 33, 64])
def test_refuses_a_key_of_another_size(size: int) -> None:
    with pytest.raises(ValueError, match=r"an XAES-256-GCM key has 32 bytes"):
        Xaes256Gcm(bytes(size))


@pytest.mark.parametrize("operation", [pickle.dumps, copy.copy, copy.deepcopy])
def test_cannot_be_pickled_or_copied(operation: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="holds a secret and cannot be pickled or copied"):
        operation(Xaes256Gcm(KEY))


def test_shows_no_key() -> None:
    aead = Xaes256Gcm(KEY)
    with pytest.raises(TypeError):
        vars(aead)
    assert KEY.hex() not in repr(aead)
    assert repr(KEY) not in repr(aead)


def test_one_instance_serves_several_threads() -> None:
    aead = Xaes256Gcm(KEY)

    def work(number: int) -> bool:
        random = Random(number)
        for _ in range(2_000):
            nonce, plaintext = random.randbytes(24), random.randbytes(random.randrange(200))
            ciphertext = aead.encrypt(nonce, plaintext, ASSOCIATED_DATA)
            if aead.decrypt(nonce, ciphertext, ASSOCIATED_DATA) != plaintext:
                return False
        return ciphertext == reference.xaes_encrypt(KEY, nonce, plaintext, ASSOCIATED_DATA)

    # So short that threads meet within a call, which releases of cryptography before 50 refuse.
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(work, range(8))) == [True] * 8
    finally:
        sys.setswitchinterval(before)
