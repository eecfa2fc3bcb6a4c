"""What the fuzzer is given: its seeds, what it has found, and inputs made from them; and every bit of a frame."""

import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, to_text
from sqlalchemy_kravn_crypto.columns import BINARY, TEXT, frame_of
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from tests.fuzz.target import KEY
from tests.fuzz.targets import TARGETS, check
from tests.fuzz.values import NAME

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
@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
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
