"""What the fuzzer is given: its seeds, what it has found, and inputs made from them; and every bit of a frame.

Besides, what is larger than the fuzzer makes it. What a KMS says at length is in ``tests/hostile/test_kms.py``.
"""

import logging
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, to_text
from sqlalchemy_kravn_crypto.columns import BINARY, TEXT, frame_of
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from tests.fuzz.mutators import LONG, Edit
from tests.fuzz.rows import SIGNED
from tests.fuzz.target import KEY
from tests.fuzz.targets import TARGETS, check
from tests.fuzz.values import ENCRYPTED, NAME, RAW

REGRESSIONS = Path(__file__).parent / "fuzz" / "regressions"
FRAME = DataKey(KEY).encrypt(bytes(24), b"\x03" + bytes(range(128)) * 2, ColumnName(NAME))
STORED: dict[str, bytes | str] = {BINARY: FRAME, TEXT: to_text(FRAME)}


@pytest.fixture(autouse=True)
def _unlogged() -> Iterator[None]:
    """Keep what is made up out of the log, which a worker that runs tests hands on as UTF-8."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_seeds_are_handled_and_one_of_them_is_valid(name: str) -> None:
    refused = [check(TARGETS[name], data) for data in TARGETS[name].seeds()]
    assert not all(refused)


@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*--*")), ids=lambda path: path.name)
def test_what_was_found_is_handled(path: Path) -> None:
    check(TARGETS[path.name.partition("--")[0]], path.read_bytes())


@pytest.mark.parametrize("name", sorted(TARGETS))
@settings(max_examples=50, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(drawn=st.data())
def test_changed_seeds_are_handled(name: str, drawn: st.DataObject) -> None:
    seed = drawn.draw(st.sampled_from(TARGETS[name].seeds()))
    at = drawn.draw(st.integers(0, len(seed)))
    put, dropped = drawn.draw(st.binary(max_size=8)), drawn.draw(st.integers(0, 8))
    check(TARGETS[name], seed[:at] + put + seed[at + dropped :])


@pytest.mark.parametrize("name", sorted(name for name, target in TARGETS.items() if target.mutator is not None))
def test_changes_by_structure_are_handled(name: str) -> None:
    target, random = TARGETS[name], Random(1)
    assert target.mutator is not None
    seeds = target.seeds()
    mutate = target.mutator(seeds)
    changed = {data for data in (mutate(random.choice(seeds), random) for _ in range(60)) if data is not None}
    assert len(changed) > 10
    for data in sorted(changed):
        check(target, data)


# --- What is large ---------------------------------------------------------------------------------------------------


class Large(NamedTuple):
    """A large input.

    :ivar size: of what is large in it, in bytes.
    :ivar times: how many times that may be in memory at once.
    :ivar read: whether it is taken, and not refused.
    """

    target: str
    make: Callable[[], bytes]
    size: int
    times: int
    read: bool = False


MB = 1_000_000
JSON = bytes([ENCRYPTED, 1])


def edit(column: int, text: bytes, *, behind: bytes = b"", row: int = 1) -> Callable[[], bytes]:
    """Return what makes an edit of one value, a text that is doubled 16 times."""
    return lambda: behind + Edit(row, column, LONG, b"\x10" + text).written()


def keys() -> bytes:
    return b"{" + b",".join(b'"%d":1' % number for number in range(MB)) + b"}"


SIGN = bytes([SIGNED])
LONG_TEXT, LONG_SIZE = b"A" * 250, 250 << 16
BRACKETS, BRACKETS_SIZE = b"[" * 250, 250 << 16

LARGE = {
    "a frame that is none": Large("binary-frames", lambda: bytes([RAW]) + bytes(16 * MB), 16 * MB, 2),
    # Most of it is what the parser of JSON takes for a moment.
    "JSON of one text": Large("binary-frames", lambda: JSON + b'"' + b"a" * 16 * MB + b'"', 16 * MB, 17, read=True),
    "JSON that is nested": Large("binary-frames", lambda: JSON + b"[" * 90_000 + b"]" * 90_000, 180_000, 17),
    "JSON without an end": Large("binary-frames", lambda: JSON + b"[" * 16 * MB, 16 * MB, 17),
    "JSON of one number": Large("binary-frames", lambda: JSON + b"9" * MB, MB, 17),
    "JSON of a million names": Large("binary-frames", lambda: JSON + keys(), 10_888_890, 30, read=True),
    "text of a frame that is none": Large("text-frames", lambda: bytes([RAW]) + b"A" * 16 * MB, 16 * MB, 3),
    "text of a frame": Large("text-frames", lambda: bytes([ENCRYPTED, 3]) + b"A" * 16 * MB, 16 * MB, 7, read=True),
    "an integer": Large("payload-decoders", lambda: b"\x10" + b"1" * MB, MB, 4, read=True),
    "an object that is nested": Large("object-payloads", lambda: b"\x01" + b'{"name":' * 90_000, 720_000, 17),
    "a wrapped key": Large("key-rows", edit(9, LONG_TEXT, behind=b"\x00"), LONG_SIZE, 4),
    "a wrapped key that is signed": Large("key-rows", edit(9, LONG_TEXT, behind=SIGN, row=2), LONG_SIZE, 4),
    "the name of a provider": Large("key-rows", edit(7, LONG_TEXT, behind=SIGN), LONG_SIZE, 9),
    "details of an event": Large("event-chain", edit(7, BRACKETS, behind=SIGN), BRACKETS_SIZE, 5),
    "the key ids of a process": Large("replica-rows", edit(5, LONG_TEXT), LONG_SIZE, 3, read=True),
    "the name of a table": Large("column-rows", edit(1, LONG_TEXT), LONG_SIZE, 15),
    "earlier names": Large("column-rows", edit(6, BRACKETS), BRACKETS_SIZE, 3),
    "a bound": Large("rekey-rows", edit(5, BRACKETS), BRACKETS_SIZE, 3),
    "a bound of one text": Large("key-range-texts", lambda: b'\x01["' + b"A" * 16 * MB + b'"]', 16 * MB, 5),
    "a setting": Large("settings", lambda: b"KMS_VAULT_ADDR=" + b"a" * 16 * MB, 16 * MB, 6, read=True),
    "pinned keys": Large("settings", lambda: b"KMS_PINNED_KEYS=" + b"0123456789abcdef," * MB, 17 * MB, 10, read=True),
    "secret.key": Large("secret-key", lambda: b"0" * 16 * MB, 16 * MB, 0),
    "an answer of a proxy": Large("proxy-answers", lambda: b"A" * 16 * MB, 16 * MB, 0),
    # The target itself has it three times: as it is given, cut, and with headers.
    "an answer of a KMS": Large("vault-answers", lambda: b"\x00\x00" + keys(), 10_888_891, 4),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_takes_a_multiple_of_its_size(name: str) -> None:
    large = LARGE[name]
    target, data = TARGETS[large.target], large.make()
    check(target, target.seeds()[0])  # what is made once
    tracemalloc.start()
    try:
        assert check(target, data) is not large.read
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= large.times * large.size + MB


# --- Every bit -------------------------------------------------------------------------------------------------------


def refused(stored: bytes | str, storage: str) -> None:
    with pytest.raises(errors.DecryptionError):
        Keyring(DataKey(KEY)).decrypt(frame_of(stored, storage, NAME), ColumnName(NAME))


def test_every_flipped_bit_is_refused() -> None:
    for bit in range(8 * len(FRAME)):
        changed = bytearray(FRAME)
        changed[bit // 8] ^= 1 << bit % 8
        refused(bytes(changed), BINARY)
        refused(to_text(bytes(changed)), TEXT)


def test_every_flipped_bit_of_the_text_is_refused() -> None:
    text = to_text(FRAME)
    for place, character in enumerate(text):
        for bit in range(8):
            refused(text[:place] + chr(ord(character) ^ 1 << bit) + text[place + 1 :], TEXT)


@pytest.mark.parametrize("storage", [BINARY, TEXT])
def test_every_other_length_is_refused(storage: str) -> None:
    stored = STORED[storage]
    for length in range(len(stored)):
        refused(stored[:length], storage)
    refused(stored + b"\x00" if isinstance(stored, bytes) else stored + "A", storage)
