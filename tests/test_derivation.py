"""``LP`` and ``Expand``, recomputed with nothing but HMAC."""

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlalchemy_kravn_crypto.derivation import (
    KEY_ID_SIZE,
    KEY_SIZE,
    expand,
    key_id_of,
    length_prefixed,
    split_length_prefixed,
)
from tests import reference

KEYS = st.binary(min_size=32, max_size=32)


def unprefixed(joined: bytes) -> list[bytes]:
    """Take apart what ``length_prefixed`` joined; that it can be is what makes it injective."""
    parts = []
    while joined:
        size = int.from_bytes(joined[:4], "big")
        parts.append(joined[4 : 4 + size])
        assert len(parts[-1]) == size
        joined = joined[4 + size :]
    return parts


def test_length_prefixed_has_four_big_endian_bytes_before_each_part() -> None:
    assert length_prefixed() == b""
    assert length_prefixed(b"") == b"\0\0\0\0"
    assert length_prefixed(b"ab", b"", b"c") == b"\0\0\0\2ab\0\0\0\0\0\0\0\1c"
    assert length_prefixed(bytes(0x01_02_03)) == b"\x00\x01\x02\x03" + bytes(0x01_02_03)


@given(st.lists(st.binary(max_size=300)))
def test_length_prefixed_can_be_taken_apart(parts: list[bytes]) -> None:
    joined = length_prefixed(*parts)
    assert joined == reference.lp(*parts)
    assert unprefixed(joined) == split_length_prefixed(joined) == parts


@given(st.binary(max_size=40) | st.lists(st.binary(max_size=9)).map(lambda parts: length_prefixed(*parts)[:-1]))
def test_nothing_else_can_be_taken_apart(joined: bytes) -> None:
    try:
        parts = split_length_prefixed(joined)
    except ValueError:
        return
    assert length_prefixed(*parts) == joined


@pytest.mark.parametrize(
    "joined", ["00", "000000", "00000001", "0000000261", "0000000000", "00000000000000", "ffffffff61"]
)
def test_what_is_cut_off_or_too_long_is_refused(joined: str) -> None:
    with pytest.raises(ValueError, match="length-prefixed"):
        split_length_prefixed(bytes.fromhex(joined))


@given(st.lists(st.binary(max_size=5), max_size=4), st.lists(st.binary(max_size=5), max_size=4))
def test_length_prefixed_is_injective(some: list[bytes], others: list[bytes]) -> None:
    assert (length_prefixed(*some) == length_prefixed(*others)) is (some == others)


# RFC 5869, appendix A: the expand step of test cases 1 to 3.
@pytest.mark.parametrize(
    ("key", "info", "output"),
    [
        pytest.param(
            "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
            "f0f1f2f3f4f5f6f7f8f9",
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
            id="A.1",
        ),
        pytest.param(
            "06a6b88c5853361a06104c9ceb35b45cef760014904671014a193f40c15fc244",
            "".join(f"{byte:02x}" for byte in range(0xB0, 0x100)),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
            "59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
            "cc30c58179ec3e87c14c01d5c1f3434f1d87",
            id="A.2",
        ),
        pytest.param(
            "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04",
            "",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
            id="A.3",
        ),
    ],
)
def test_reference_has_the_published_values(key: str, info: str, output: str) -> None:
    expected = bytes.fromhex(output)
    assert reference.hkdf_expand(bytes.fromhex(key), bytes.fromhex(info), len(expected)) == expected


@given(KEYS, st.text(max_size=100))
def test_expand_is_one_block_of_hkdf(key: bytes, purpose: str) -> None:
    domain, encoded = b"sqlalchemy-kravn-crypto/v1", purpose.encode()
    info = len(domain).to_bytes(4, "big") + domain + len(encoded).to_bytes(4, "big") + encoded
    assert expand(key, purpose) == hmac.digest(key, info + b"\x01", "sha256") == reference.expand(key, purpose)


def test_expand_gives_32_bytes_that_differ_by_purpose_and_key() -> None:
    keys = [bytes([number]) * KEY_SIZE for number in range(4)]
    purposes = ["aead/02", "key-id", "key-check", "bootstrap", "row-mac", ""]
    derived = {expand(key, purpose) for key in keys for purpose in purposes}
    assert len(derived) == len(keys) * len(purposes)
    assert {len(one) for one in derived} == {KEY_SIZE} == {32}


@given(KEYS)
def test_key_id_is_the_first_8_bytes_of_its_purpose(key: bytes) -> None:
    assert key_id_of(key) == reference.expand(key, "key-id")[:KEY_ID_SIZE]
    assert len(key_id_of(key)) == KEY_ID_SIZE == 8
