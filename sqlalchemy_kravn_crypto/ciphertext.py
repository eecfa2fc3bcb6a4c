"""The frame: one encrypted value as it lies in the database. The only file that knows byte offsets.

.. code-block:: text

    offset length
    0      1       0xF9   magic and version; a byte that UTF-8 never contains, so no text parses as a frame
    1      1       alg    0x02 XAES-256-GCM; every other value is refused
    2      8       key id
    10     2       name hint: the first 2 bytes of SHA-256(name)
    12     24      nonce
    36     n       ciphertext
    36+n   16      tag

The associated data of a value are ``frame[0:12] || LP(name)``, and then ``LP(row identity)`` where the column is bound
to its row.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from contextlib import suppress
from hashlib import sha256
from typing import Final, NamedTuple

from .derivation import KEY_ID_SIZE, length_prefixed
from .exceptions import MalformedCiphertextError, UnsupportedAlgorithmError

MAGIC: Final = 0xF9
ALGORITHM: Final = 0x02
HINT_SIZE: Final = 2
NONCE_SIZE: Final = 24
TAG_SIZE: Final = 16

_KEY_ID: Final = slice(2, 2 + KEY_ID_SIZE)
_HINT: Final = slice(_KEY_ID.stop, _KEY_ID.stop + HINT_SIZE)
HEADER: Final = slice(0, _HINT.stop)
NONCE: Final = slice(HEADER.stop, HEADER.stop + NONCE_SIZE)
BODY: Final = slice(NONCE.stop, None)
FRAME_START: Final = bytes([MAGIC, ALGORITHM])
"""What every frame begins with."""

MIN_FRAME_SIZE: Final = BODY.start + TAG_SIZE
"""Length in bytes of the frame of an empty payload."""

TEXT_PREFIX: Final = "enc:v3:"
"""What every value in text storage begins with."""

TEXT_FRAME_START: Final = TEXT_PREFIX + urlsafe_b64encode(FRAME_START).decode("ascii")[:2]
"""What a value in text storage begins with in whole characters: of the 16 bits of a frame's start, 12."""

KEY_PREFIX_SIZE: Final = _KEY_ID.stop
"""Length in bytes of what all frames under one key begin with, and no others."""

TEXT_KEY_PREFIX_SIZE: Final = len(TEXT_PREFIX) + KEY_PREFIX_SIZE * 8 // 6
"""Length in characters of the same in text storage. A character is 6 bits, so the last 2 of the key id are left out."""

TEXT_HEADER_SIZE: Final = len(TEXT_PREFIX) + HEADER.stop * 8 // 6
"""Length in characters of the prefix and the header in text storage."""

LEGACY_PREFIXES: Final = tuple(f"enc:v{version}:" for version in range(10))
"""What text begins with that an earlier format, or another storage of this one, has left in a column."""


class ColumnName:
    """The name that a column's values are bound to, and their row if they are bound to it as well.

    :param name: ``Table.name + "." + Column.name`` as declared, or what the user pinned.
    :ivar last: what :meth:`bound_to` returned last.
    :ivar row: the identity of the row, or ``None``.
    """

    __slots__ = ("_suffix", "hint", "last", "name", "row")

    def __init__(self, name: str, row: bytes | None = None) -> None:
        encoded = name.encode()
        self.name = name
        self.row = row
        self.hint = sha256(encoded).digest()[:HINT_SIZE]
        self._suffix = length_prefixed(encoded) if row is None else length_prefixed(encoded, row)
        self.last = (b"", b"", b"")

    def of_row(self, row: bytes) -> ColumnName:
        """Return the same name for the value of one row, by the identity of the row."""
        return ColumnName(self.name, row)

    def bound_to(self, key_id: bytes) -> tuple[bytes, bytes, bytes]:
        """Return the key id, the header of every frame under it for this name, and the associated data of its values.

        The last answer is kept, since nearly all values of a column are under one key. It is replaced as a whole, so
        threads with several keys cost each other time and nothing else.
        """
        header = FRAME_START + key_id + self.hint
        self.last = found = key_id, header, header + self._suffix
        return found

    def __reduce__(self) -> tuple[type[ColumnName], tuple[str, bytes | None]]:
        return ColumnName, (self.name, self.row)

    def __repr__(self) -> str:
        return f"ColumnName({self.name!r})"


class Frame(NamedTuple):
    """The parts of a parsed frame."""

    header: bytes
    key_id: bytes
    hint: bytes
    nonce: bytes
    body: bytes
    """Ciphertext and tag."""


def parse(frame: bytes) -> Frame:
    """Take a frame apart, with every check that needs no key.

    :raises MalformedCiphertextError: if it is not a frame.
    :raises UnsupportedAlgorithmError: if it is one of an algorithm that this release does not know.
    """
    if frame[:2] != FRAME_START:
        if frame[:1] != FRAME_START[:1]:
            raise MalformedCiphertextError(
                "The stored value is not encrypted by this library: it does not begin as a frame does. It may be "
                "plaintext, or have been written by another program."
            )
        if len(frame) > 1:
            raise UnsupportedAlgorithmError(
                f"The stored value is encrypted with algorithm {frame[1]:#04x}, which this release does not know. "
                "Upgrade to the release that wrote it."
            )
    if len(frame) < MIN_FRAME_SIZE:
        raise MalformedCiphertextError(
            f"The stored value is truncated: {len(frame)} bytes, where a frame has at least {MIN_FRAME_SIZE}."
        )
    return Frame(frame[HEADER], frame[_KEY_ID], frame[_HINT], frame[NONCE], frame[BODY])


def key_prefix(key_id: str) -> bytes:
    """Return what every frame under a key begins with.

    :param key_id: 16 hexadecimal characters.
    """
    return FRAME_START + bytes.fromhex(key_id)


def text_key_prefix(key_id: str) -> str:
    """Return what every value under a key begins with in text storage.

    :param key_id: 16 hexadecimal characters.
    """
    return to_text(key_prefix(key_id) + bytes(HINT_SIZE))[:TEXT_KEY_PREFIX_SIZE]


def key_id_of_start(start: bytes) -> str | None:
    """Return the key id of the first ``KEY_PREFIX_SIZE`` bytes of a value, or ``None`` if it is no frame."""
    if len(start) != KEY_PREFIX_SIZE or not start.startswith(FRAME_START):
        return None
    return start[_KEY_ID].hex()


def key_id_of_text_start(start: str) -> str | None:
    """Return the key id of the first ``TEXT_HEADER_SIZE`` characters of a value, or ``None`` if it is no frame."""
    header = b""
    if len(start) == TEXT_HEADER_SIZE:
        with suppress(MalformedCiphertextError):
            header = from_text(start)
    return key_id_of_start(header[:KEY_PREFIX_SIZE])


def to_text(frame: bytes) -> str:
    """Return a frame as it is kept in text storage: a prefix and unpadded base64url.

    The 12 bytes of the header are exactly 16 characters, so that a database can select by key id with a prefix.
    """
    return TEXT_PREFIX + urlsafe_b64encode(frame).rstrip(b"=").decode("ascii")


def from_text(text: str) -> bytes:
    """Return the frame of a value in text storage.

    Python's decoder skips foreign characters and accepts several spellings of one value. Only the spelling that
    :func:`to_text` gives is accepted here, so that no value has two.

    :raises MalformedCiphertextError: if the text is anything else.
    """
    frame = b""
    if text.startswith(TEXT_PREFIX):
        encoded = text[len(TEXT_PREFIX) :]
        try:
            frame = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        except (Base64Error, ValueError):
            frame = b""
    if not frame or to_text(frame) != text:
        raise MalformedCiphertextError(
            "The stored value is not encrypted by this library: it is not "
            f"{TEXT_PREFIX!r} and canonical unpadded base64url. It may be plaintext, or have been altered."
        )
    return frame
