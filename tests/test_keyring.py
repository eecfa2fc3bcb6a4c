"""One key encrypts, all decrypt, nothing is tried out, and nothing is given away."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlalchemy_kravn_crypto import DataKey, Keyring
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, from_text, parse
from sqlalchemy_kravn_crypto.codecs.documents import JSONCodec
from sqlalchemy_kravn_crypto.derivation import expand
from tests import make_frames, reference
from tests.leaks import leaked, spellings

FROZEN: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "frames.json").read_text("utf-8"))
FRAMES: list[dict[str, str]] = FROZEN["frames"]
MUST_FAIL: list[dict[str, str]] = FROZEN["must_fail"]

KEY = bytes.fromhex(FRAMES[0]["key"])
NAME = ColumnName(FRAMES[0]["name"])
OTHER_KEY = bytes(range(100, 132))
PAYLOAD = b"\x01" + b'{"payload":"' + b"marker " * 6 + b'"}'


def entries(found: list[dict[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", found, ids=[one["comment"] for one in found])


@pytest.fixture
def keyring() -> Keyring:
    return Keyring(DataKey(KEY))


# --- Frozen values ---------------------------------------------------------------------------------------------------


@entries(FRAMES)
def test_decrypts_the_frozen_frame(entry: dict[str, str]) -> None:
    keyring = Keyring(DataKey(bytes.fromhex(entry["key"])))
    for frame in (bytes.fromhex(entry["frame"]), from_text(entry["text"])):
        assert keyring.decrypt(frame, ColumnName(entry["name"])).hex() == entry["payload"]


@entries(FRAMES)
def test_encrypts_to_the_frozen_frame_under_its_nonce(entry: dict[str, str]) -> None:
    key, nonce, payload = (bytes.fromhex(entry[part]) for part in ("key", "nonce", "payload"))
    assert DataKey(key).encrypt(nonce, payload, ColumnName(entry["name"])).hex() == entry["frame"]


def read(entry: dict[str, str]) -> Any:
    keyring = Keyring(DataKey(bytes.fromhex(entry["key"])))
    frame = from_text(entry["text"]) if "text" in entry else bytes.fromhex(entry["stored"])
    return JSONCodec().decode(keyring.decrypt(frame, ColumnName(entry["name"])))


@entries(MUST_FAIL)
def test_refuses_the_frozen_bad_value(entry: dict[str, str]) -> None:
    with pytest.raises(errors.DecryptionError) as caught:
        read(entry)
    assert type(caught.value) is getattr(errors, entry["error"])


def test_frozen_file_is_what_its_script_writes() -> None:
    frames = make_frames.good_frames()
    first = bytes.fromhex(frames[0]["frame"])
    assert frames == FRAMES
    assert [*make_frames.bad_frames(first), *make_frames.bad_texts()] == MUST_FAIL


def test_every_way_in_which_a_value_can_be_bad_is_frozen() -> None:
    # A subclass that none of the entries has is one that other programs are not told about.
    assert {entry["error"] for entry in MUST_FAIL} == {
        error.__name__ for error in errors.DecryptionError.__subclasses__()
    }


# --- The reference ---------------------------------------------------------------------------------------------------


@given(
    key=st.binary(min_size=32, max_size=32),
    nonce=st.binary(min_size=24, max_size=24),
    name=st.text(min_size=1, max_size=80),
    payload=st.binary(max_size=300),
)
def test_agrees_with_the_reference(key: bytes, nonce: bytes, name: str, payload: bytes) -> None:
    data_key = DataKey(key)
    frame = data_key.encrypt(nonce, payload, ColumnName(name))
    assert frame == reference.frame(key, name, nonce, payload)
    assert Keyring(data_key).decrypt(frame, ColumnName(name)) == payload


def test_data_key_has_the_derived_key_id_and_check() -> None:
    data_key = DataKey(KEY)
    assert data_key.key_id == reference.key_id(KEY)
    assert data_key.check == reference.expand(KEY, "key-check")
    assert data_key.matches(data_key.check)
    assert not DataKey(OTHER_KEY).matches(data_key.check)
    assert not data_key.matches(data_key.check[:-1])
    assert not data_key.matches(b"")


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_data_key_has_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match=r"a data key has 32 bytes"):
        DataKey(bytes(size))


# --- Which key, which name -------------------------------------------------------------------------------------------


def test_encrypts_under_the_primary_and_decrypts_under_all() -> None:
    old, new = DataKey(KEY), DataKey(OTHER_KEY)
    written_before = Keyring(old).encrypt(PAYLOAD, NAME)
    keyring = Keyring(new, [old])
    written_after = keyring.encrypt(PAYLOAD, NAME)
    assert parse(written_before).key_id == reference.key_id(KEY)
    assert parse(written_after).key_id == reference.key_id(OTHER_KEY)
    assert keyring.decrypt(written_before, NAME) == keyring.decrypt(written_after, NAME) == PAYLOAD
    assert keyring.primary_key_id == reference.key_id(OTHER_KEY).hex()
    assert keyring.key_ids == {reference.key_id(KEY).hex(), reference.key_id(OTHER_KEY).hex()}


def test_value_under_another_key_than_the_primary_is_stale() -> None:
    old, new = DataKey(KEY), DataKey(OTHER_KEY)
    keyring = Keyring(new, [old])
    assert keyring.is_stale(Keyring(old).encrypt(PAYLOAD, NAME))
    assert not keyring.is_stale(keyring.encrypt(PAYLOAD, NAME))
    assert Keyring(old, [new]).is_stale(keyring.encrypt(PAYLOAD, NAME))
    # Under a key that is not at hand it is stale, too; that needs no decryption.
    assert keyring.is_stale(Keyring(DataKey.generate()).encrypt(PAYLOAD, NAME))
    with pytest.raises(errors.MalformedCiphertextError):
        keyring.is_stale(b"hello")


@pytest.mark.parametrize("others", [0, 1, 5])
def test_unknown_key_id_never_reaches_the_aead(others: int) -> None:
    keyring = Keyring(DataKey(KEY), [DataKey.generate() for _ in range(others)])
    unknown = reference.frame(OTHER_KEY, NAME.name, bytes(24), PAYLOAD)
    # With a key id of its own a value under a known key is not decrypted, either.
    known = bytearray(reference.frame(KEY, NAME.name, bytes(24), PAYLOAD))
    known[2:10] = reference.key_id(OTHER_KEY)
    for frame in (unknown, bytes(known), unknown[:36] + bytes(16)):
        with pytest.raises(errors.UnknownKeyError) as caught:
            keyring.decrypt(frame, NAME)
        assert caught.value.key_id == reference.key_id(OTHER_KEY).hex()
        assert caught.value.key_id in str(caught.value)


@pytest.mark.parametrize(
    ("state", "error", "command"),
    [
        ("disabled", errors.DisabledKeyError, "kravn-crypto enable"),
        ("destroyed", errors.DestroyedKeyError, "kravn-crypto evidence"),
        ("unheard-of", errors.UnknownKeyError, "kravn-crypto status"),
    ],
)
def test_value_under_a_key_that_is_not_loaded_says_why(state: str, error: type[Exception], command: str) -> None:
    gone = DataKey.generate()
    frame, key_id = Keyring(gone).encrypt(PAYLOAD, NAME), gone.key_id.hex()
    other = {"disabled": "destroyed", "destroyed": "disabled"}.get(state, "disabled")
    named: dict[str, Any] = {other: ["00" * 8]} | ({} if state == "unheard-of" else {state: [key_id]})
    keyring = Keyring(DataKey.generate(), **named)
    with pytest.raises(errors.UnknownKeyError, match=command) as caught:
        keyring.decrypt(frame, NAME)
    assert type(caught.value) is error
    assert caught.value.key_id == key_id
    assert key_id in str(caught.value)
    with pytest.raises(error, match=command):
        keyring.reencryptor(NAME)(frame)


def test_key_id_of_one_key_is_not_decrypted_with_another() -> None:
    # The ciphertext is the primary's, the key id the other one's: trying all keys would open it.
    aead_key = reference.expand(KEY, "aead/02")
    header = b"\xf9\x02" + reference.key_id(OTHER_KEY) + NAME.hint
    body = reference.xaes_encrypt(aead_key, bytes(24), PAYLOAD, NAME.bound_to(reference.key_id(OTHER_KEY))[2])
    with pytest.raises(errors.AuthenticationError):
        Keyring(DataKey(KEY), [DataKey(OTHER_KEY)]).decrypt(header + bytes(24) + body, NAME)


def test_name_hint_is_checked_before_the_ciphertext() -> None:
    frame = bytearray(reference.frame(KEY, "other.column", bytes(24), PAYLOAD))
    frame[-1] ^= 1
    with pytest.raises(errors.WrongColumnError, match=NAME.name):
        Keyring(DataKey(KEY)).decrypt(bytes(frame), NAME)


# --- Altered values --------------------------------------------------------------------------------------------------


def expected_error(bit: int) -> type[Exception]:
    byte = bit // 8
    if byte < 1:
        return errors.MalformedCiphertextError
    if byte < 2:
        return errors.UnsupportedAlgorithmError
    if byte < 10:
        return errors.UnknownKeyError
    return errors.WrongColumnError if byte < 12 else errors.AuthenticationError


def test_every_flipped_bit_has_the_error_of_its_field(keyring: Keyring) -> None:
    frame = keyring.encrypt(b"\x01" + bytes(247), NAME)
    assert len(frame) == 300
    for bit in range(8 * len(frame)):
        altered = bytearray(frame)
        altered[bit // 8] ^= 0x80 >> bit % 8
        with pytest.raises(errors.DecryptionError) as caught:
            keyring.decrypt(bytes(altered), NAME)
        assert type(caught.value) is expected_error(bit), f"bit {bit}"


def test_every_truncation_and_an_extra_byte_are_refused(keyring: Keyring) -> None:
    frame = keyring.encrypt(PAYLOAD, NAME)
    for size in range(len(frame)):
        with pytest.raises(errors.DecryptionError) as caught:
            keyring.decrypt(frame[:size], NAME)
        expected = errors.MalformedCiphertextError if size < 52 else errors.AuthenticationError
        assert type(caught.value) is expected, f"{size} bytes"
    for extra in (b"\0", b"\xf9", frame):
        with pytest.raises(errors.AuthenticationError):
            keyring.decrypt(frame + extra, NAME)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\xf9\x02", b"\xf9\x02" + reference.key_id(KEY) + NAME.hint]))
def test_arbitrary_bytes_never_decrypt(tail: bytes, head: bytes) -> None:
    with pytest.raises(errors.DecryptionError):
        Keyring(DataKey(KEY)).decrypt(head + tail, NAME)


# --- Nonces ----------------------------------------------------------------------------------------------------------

NONCES_AFTER_FORK = """
import os, sys
from sqlalchemy_kravn_crypto import DataKey, Keyring
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, parse

keyring, name = Keyring(DataKey(bytes(32))), ColumnName("t.c")

def write(sink):
    sink.write("".join(parse(keyring.encrypt(b"x", name)).nonce.hex() + "\\n" for _ in range(10_000)))
    sink.flush()

keyring.encrypt(b"x", name)
children = []
for _ in range(2):
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        os.close(readable)
        write(os.fdopen(writable, "w"))
        os._exit(0)
    os.close(writable)
    children.append((child, os.fdopen(readable)))
write(sys.stdout)
for child, source in children:
    sys.stdout.write(source.read())
    assert os.waitpid(child, 0)[1] == 0
"""


def test_nonces_differ_within_a_process(keyring: Keyring) -> None:
    nonces = {parse(keyring.encrypt(b"", NAME)).nonce for _ in range(20_000)}
    assert len(nonces) == 20_000
    assert {len(nonce) for nonce in nonces} == {24}
    # A counter in either half would leave its leading bytes alone.
    for position in range(24):
        assert len({nonce[position] for nonce in nonces}) == 256, position


def test_nonces_differ_between_forked_processes() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", NONCES_AFTER_FORK], check=True, capture_output=True, text=True, cwd=root, timeout=120
    )
    nonces = done.stdout.split()
    assert len(nonces) == len(set(nonces)) == 30_000


def test_nonces_differ_between_threads(keyring: Keyring) -> None:
    def work(_: int) -> list[bytes]:
        return [parse(keyring.encrypt(b"x", NAME)).nonce for _ in range(2_000)]

    with ThreadPoolExecutor(8) as threads:
        nonces = [nonce for found in threads.map(work, range(8)) for nonce in found]
    assert len(set(nonces)) == len(nonces) == 16_000


# --- Nothing is given away -------------------------------------------------------------------------------------------

SECRETS = (KEY, expand(KEY, "aead/02"))
HOLDERS = [pytest.param(DataKey(KEY), id="data key"), pytest.param(Keyring(DataKey(KEY)), id="keyring")]


@pytest.mark.parametrize("operation", [pickle.dumps, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("holder", HOLDERS)
def test_cannot_be_pickled_or_copied(holder: Any, operation: Callable[[Any], Any]) -> None:
    for container in (holder, [holder], {"key": holder}):
        if operation is copy.copy and container is not holder:
            continue  # a shallow copy of a list does not touch what is in it
        with pytest.raises(TypeError, match="holds a secret and cannot be pickled or copied") as caught:
            operation(container)
        assert leaked(caught.value, *SECRETS) == []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("holder", HOLDERS)
def test_no_protocol_pickles_it(holder: Any, protocol: int) -> None:
    with pytest.raises(TypeError, match="holds a secret"):
        pickle.dumps(holder, protocol)


@pytest.mark.parametrize("holder", HOLDERS)
def test_repr_has_key_ids_and_nothing_else(holder: Any) -> None:
    for shown in (repr(holder), str(holder), f"{holder}", repr([holder])):
        assert reference.key_id(KEY).hex() in shown
        assert [spelling for secret in SECRETS for spelling in spellings(secret) if spelling in shown] == []


@pytest.mark.parametrize("holder", HOLDERS)
def test_has_no_dict(holder: Any) -> None:
    with pytest.raises(TypeError):
        vars(holder)


def test_attributes_hold_no_key() -> None:
    """The key itself is gone; what derives from it is inside of the cipher's own objects."""
    seen: list[object] = []
    waiting: list[object] = [Keyring(DataKey(KEY))]
    while waiting:
        found = waiting.pop()
        seen.append(found)
        slots = [
            slot for base in type(found).__mro__ for slot in getattr(base, "__slots__", ()) if slot != "__weakref__"
        ]
        waiting += [getattr(found, slot) for slot in slots]
        if isinstance(found, dict):
            waiting += [*found, *found.values()]
    assert len(seen) > 5
    assert [spelling for secret in SECRETS for spelling in spellings(secret) if spelling in repr(seen)] == []
    assert not {*SECRETS}.intersection(one for one in seen if isinstance(one, bytes))


def mutate(frame: bytes, offset: int) -> bytes:
    return frame[:offset] + bytes([frame[offset] ^ 1]) + frame[offset + 1 :]


@pytest.mark.parametrize("offset", [0, 1, 2, 10, 12, 40, -17])
def test_error_shows_no_key_plaintext_or_ciphertext(keyring: Keyring, offset: int) -> None:
    frame = keyring.encrypt(PAYLOAD, NAME)
    with pytest.raises(errors.DecryptionError) as caught:
        keyring.decrypt(mutate(frame, offset % len(frame)), NAME)
    parsed = parse(frame)
    assert leaked(caught.value, *SECRETS, PAYLOAD, "marker", parsed.nonce, parsed.body, parsed.body[20:]) == []
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_errors_of_values_are_passed_through_by_sqlalchemy() -> None:
    from sqlalchemy.exc import DontWrapMixin

    assert issubclass(errors.KravnCryptoError, DontWrapMixin)
    for error in (errors.DecryptionError, errors.EncryptionError, errors.ConfigurationError):
        assert issubclass(error, errors.KravnCryptoError)


# --- Re-encryption ---------------------------------------------------------------------------------------------------


def test_a_frame_is_taken_to_the_primary_under_its_own_name() -> None:
    old, new = DataKey.generate(), DataKey.generate()
    now, then = ColumnName("table.now"), ColumnName("table.then")
    written = [Keyring(old).encrypt(b"payload", name) for name in (now, then, now)]
    reencrypt = Keyring(new, [old]).reencryptor(now, [then])
    renewed = [reencrypt(frame) for frame in written]
    only_new = Keyring(new)
    assert [only_new.decrypt(frame, name) for frame, name in zip(renewed, (now, then, now), strict=True)] == [
        b"payload"
    ] * 3
    with pytest.raises(errors.WrongColumnError):
        only_new.decrypt(renewed[1], now)
    assert {parse(frame).key_id for frame in renewed} == {new.key_id}
    assert len({parse(frame).nonce for frame in (*written, *renewed)}) == 6


def test_frames_of_several_keys_are_taken_in_any_order() -> None:
    keys = [DataKey.generate() for _ in range(3)]
    reencrypt = Keyring(keys[0], keys[1:]).reencryptor(NAME)
    for number in range(12):
        payload = bytes([number])
        frame = reencrypt(Keyring(keys[number % 3]).encrypt(payload, NAME))
        assert Keyring(keys[0]).decrypt(frame, NAME) == payload


@pytest.mark.parametrize("known_before", [False, True])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]), errors.AuthenticationError),
        (lambda frame: frame[:20] + bytes([frame[20] ^ 1]) + frame[21:], errors.AuthenticationError),
        (lambda frame: frame[:51], errors.MalformedCiphertextError),
        (lambda frame: frame[:12], errors.MalformedCiphertextError),
        (lambda frame: frame[:5], errors.MalformedCiphertextError),
        (lambda _: b"", errors.MalformedCiphertextError),
        (lambda _: b"plaintext", errors.MalformedCiphertextError),
        (lambda frame: b"\xf9\x03" + frame[2:], errors.UnsupportedAlgorithmError),
        (lambda frame: frame[:2] + bytes(8) + frame[10:], errors.UnknownKeyError),
        (lambda frame: frame[:10] + bytes([frame[10] ^ 1]) + frame[11:], errors.WrongColumnError),
    ],
)
def test_what_does_not_decrypt_is_not_taken_along(
    spoil: Callable[[bytes], bytes],
    error: type[Exception],
    known_before: bool,  # noqa: FBT001 - of the test
) -> None:
    old, new = DataKey.generate(), DataKey.generate()
    frame = Keyring(old).encrypt(b"", NAME)
    reencrypt = Keyring(new, [old]).reencryptor(NAME)
    if known_before:
        reencrypt(frame)
    with pytest.raises(error) as caught:
        reencrypt(spoil(frame))
    assert caught.value.__context__ is None


def test_what_nobody_loads_any_more_can_be_kept_for_what_was_read_before() -> None:
    old, gone, forgotten, new = (DataKey.generate() for _ in range(4))
    before = Keyring(old, [gone, forgotten])
    frames = [Keyring(key).encrypt(b"payload", ColumnName("table.column")) for key in (old, gone, forgotten)]
    after = Keyring(new, disabled=[old.key_id.hex()], destroyed=[gone.key_id.hex()])
    kept = after.keeping(before)
    assert kept.primary_key_id == new.key_id.hex()
    assert [kept.decrypt(frame, ColumnName("table.column")) for frame in frames[:2]] == [b"payload"] * 2
    with pytest.raises(errors.UnknownKeyError):
        kept.decrypt(frames[2], ColumnName("table.column"))
    assert after.keeping(Keyring(new)) is after


def test_what_is_kept_changes_nothing_else() -> None:
    gone, bootstrap, new = (DataKey.generate() for _ in range(3))
    never_held = {"disabled": DataKey.generate(), "destroyed": DataKey.generate()}
    after = Keyring(
        new,
        [bootstrap],
        disabled=[never_held["disabled"].key_id.hex()],
        destroyed=[gone.key_id.hex(), never_held["destroyed"].key_id.hex()],
        bootstrap=[bootstrap.key_id.hex()],
    )
    kept = after.keeping(Keyring(gone))
    assert kept.key_ids == {key.key_id.hex() for key in (gone, bootstrap, new)}
    for keyring in (after, kept):
        assert keyring.verifying(accept_bootstrap=True) == (new, [bootstrap])
        assert keyring.verifying(accept_bootstrap=False) == (new, [])
        with pytest.raises(errors.DisabledKeyError):
            keyring.decrypt(Keyring(never_held["disabled"]).encrypt(PAYLOAD, NAME), NAME)
        with pytest.raises(errors.DestroyedKeyError):
            keyring.decrypt(Keyring(never_held["destroyed"]).encrypt(PAYLOAD, NAME), NAME)


# --- Signatures ------------------------------------------------------------------------------------------------------


def test_signatures_are_good_under_what_is_loaded_and_neither_disabled_nor_destroyed() -> None:
    primary, retired, bootstrap, disabled, destroyed = (DataKey.generate() for _ in range(5))
    keyring = Keyring(
        primary,
        [retired, disabled, bootstrap, destroyed],
        disabled=[disabled.key_id.hex()],
        destroyed=[destroyed.key_id.hex()],
        bootstrap=[bootstrap.key_id.hex()],
    )
    assert keyring.verifying(accept_bootstrap=False) == (primary, [retired])
    assert keyring.verifying(accept_bootstrap=True) == (primary, [retired, bootstrap])


def test_where_the_primary_is_a_bootstrap_key_those_before_it_are_good_too() -> None:
    new, old = DataKey.generate(), DataKey.generate()
    keyring = Keyring(new, [old], bootstrap=[new.key_id.hex(), old.key_id.hex()])
    assert keyring.verifying(accept_bootstrap=False) == (new, [old])


def test_a_data_key_is_found_by_its_key_id() -> None:
    primary, other = DataKey.generate(), DataKey.generate()
    keyring = Keyring(primary, [other])
    assert [keyring.data_key(key.key_id.hex()) for key in (primary, other)] == [primary, other]
    assert keyring.data_key(DataKey.generate().key_id.hex()) is None


def test_the_error_speaks_of_the_row_where_the_value_is_bound_to_one(keyring: Keyring) -> None:
    frame = bytearray(keyring.encrypt(PAYLOAD, NAME))
    frame[-1] ^= 1
    with pytest.raises(errors.AuthenticationError, match="moved from another column"):
        keyring.decrypt(bytes(frame), NAME)
    with pytest.raises(errors.AuthenticationError, match="moved from another row or column"):
        keyring.decrypt(bytes(frame), NAME.of_row(b"row"))
