"""Data keys by key id: one primary encrypts, all decrypt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from cryptography.hazmat.primitives.constant_time import bytes_eq

from .aead import Xaes256Gcm
from .ciphertext import BODY, HEADER, MIN_FRAME_SIZE, NONCE, NONCE_SIZE, ColumnName, parse
from .derivation import KEY_SIZE, expand, key_id_of
from .exceptions import AuthenticationError, DestroyedKeyError, DisabledKeyError, UnknownKeyError, WrongColumnError
from .secrecy import KeepsSecret


class DataKey(KeepsSecret):
    """A data key, ready for use. It does not keep the key itself, and cannot be printed, pickled or copied.

    :param key: 32 uniformly random bytes.
    """

    __slots__ = ("_check", "_encrypt", "decrypt", "key_id", "signing_key")

    decrypt: Callable[[bytes, bytes, bytes], bytes | None]
    """Takes nonce, ciphertext with tag, and associated data. Returns the payload, or ``None`` if anything is not as it
    was written."""

    signing_key: Callable[[str], bytes]
    """Takes a purpose. Returns 32 bytes to sign with."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_SIZE:
            msg = f"a data key has {KEY_SIZE} bytes"
            raise ValueError(msg)
        self.key_id = key_id_of(key)
        self._check = expand(key, "key-check")
        aead = Xaes256Gcm(expand(key, "aead/02"))
        self._encrypt, self.decrypt = aead.encrypt, aead.decrypt
        # A function rather than an attribute, which whatever prints an object's attributes would show.
        self.signing_key = lambda purpose: expand(key, f"signing/{purpose}")

    @classmethod
    def generate(cls) -> DataKey:
        """Make a data key that exists in this process only; for tests."""
        return cls(os.urandom(KEY_SIZE))

    @property
    def check(self) -> bytes:
        """32 bytes that only this key gives: the key check of its row in the key store."""
        return self._check

    def matches(self, check: bytes) -> bool:
        """Tell in constant time whether this is the key that the key check was made from."""
        return bytes_eq(self._check, check)

    def encrypt(self, nonce: bytes, payload: bytes, name: ColumnName) -> bytes:
        """Return the frame of a payload. Deterministic; :meth:`Keyring.encrypt` draws the nonce."""
        last, key_id = name.last, self.key_id
        _, header, associated_data = last if last[0] is key_id else name.bound_to(key_id)
        return header + nonce + self._encrypt(nonce, payload, associated_data)

    def __repr__(self) -> str:
        return f"<DataKey {self.key_id.hex()}>"


class Keyring(KeepsSecret):
    """A process's data keys. Immutable, so that threads share it without a lock; cannot be pickled or copied.

    :param primary: the data key that encrypts.
    :param others: data keys that only decrypt, the newest first.
    :param disabled: key ids of data keys that exist, and that nobody loads.
    :param destroyed: key ids of data keys that exist no more.
    :param bootstrap: key ids of data keys that come from the deployment's own secrets and not from a KMS.
    """

    __slots__ = ("__weakref__", "_bootstrap", "_destroyed", "_disabled", "_keys", "_primary")

    def __init__(
        self,
        primary: DataKey,
        others: Iterable[DataKey] = (),
        *,
        disabled: Iterable[str] = (),
        destroyed: Iterable[str] = (),
        bootstrap: Iterable[str] = (),
    ) -> None:
        self._primary = primary
        self._keys = {key.key_id: key for key in (*others, primary)}
        self._disabled, self._destroyed = frozenset(disabled), frozenset(destroyed)
        self._bootstrap = frozenset(bootstrap)

    @property
    def primary_key_id(self) -> str:
        """The key id of the primary, 16 hexadecimal characters."""
        return self._primary.key_id.hex()

    @property
    def key_ids(self) -> frozenset[str]:
        """The key ids of all data keys, 16 hexadecimal characters each."""
        return frozenset(key_id.hex() for key_id in self._keys)

    def data_key(self, key_id: str) -> DataKey | None:
        """Return one of the data keys by its key id, 16 hexadecimal characters."""
        return next((key for key in self._keys.values() if key.key_id.hex() == key_id), None)

    def keeping(self, earlier: Keyring) -> Keyring:
        """Return a keyring that also decrypts what is under data keys of an earlier one that nobody loads any more."""
        gone = self._disabled | self._destroyed
        kept = [key for key_id, key in earlier._keys.items() if key_id.hex() in gone]
        if not kept:
            return self
        return Keyring(
            self._primary,
            [*kept, *self._keys.values()],
            disabled=self._disabled,
            destroyed=self._destroyed,
            bootstrap=self._bootstrap,
        )

    def verifying(self, *, accept_bootstrap: bool) -> tuple[DataKey, list[DataKey]]:
        """Return the primary, and the other data keys under which a signature may still be good, the newest first.

        :param accept_bootstrap: whether those of the deployment's own secrets are among them where the primary is a
            KMS's.
        """
        kept_out = self._disabled | self._destroyed
        if self.primary_key_id not in self._bootstrap and not accept_bootstrap:
            kept_out |= self._bootstrap
        others = [key for key in self._keys.values() if key is not self._primary and key.key_id.hex() not in kept_out]
        return self._primary, others

    def encrypt(self, payload: bytes, name: ColumnName) -> bytes:
        """Return the frame of a payload under the primary, with a fresh random nonce.

        The nonce comes from the operating system for every single value: a counter or a buffer would repeat after
        ``fork`` and after a virtual machine is restored from a snapshot.
        """
        return self._primary.encrypt(os.urandom(NONCE_SIZE), payload, name)

    def decrypt(self, frame: bytes, name: ColumnName, earlier: Iterable[ColumnName] = ()) -> bytes:
        """Return the payload of a frame.

        One key is chosen by key id and one name by hint; nothing is ever tried out.

        :param earlier: names that values may have been written for, besides the one that they are written for now.
        :raises MalformedCiphertextError: if it is not a frame.
        :raises UnsupportedAlgorithmError: if its algorithm is not known.
        :raises UnknownKeyError: if the keyring does not hold its data key.
        :raises WrongColumnError: if it was written for a column of another name.
        :raises AuthenticationError: if it is not what was written.
        """
        key = self._primary
        last = name.last
        _, expected, associated_data = last if last[0] is key.key_id else name.bound_to(key.key_id)
        if frame[HEADER] != expected or len(frame) < MIN_FRAME_SIZE:
            key, written_for = self._look_up(frame, name, earlier)
            associated_data = written_for.bound_to(key.key_id)[2]
        payload = key.decrypt(frame[NONCE], frame[BODY], associated_data)
        if payload is None:
            raise _not_what_was_written(name)
        return payload

    def reencryptor(self, name: ColumnName, earlier: Iterable[ColumnName] = ()) -> Callable[[bytes], bytes]:
        """Return a function that takes a frame to the primary, for the same name that it was written for.

        It raises what :meth:`decrypt` does, and handles payloads: no codec, no value. For one thread.
        """
        names, primary = tuple(earlier), self._primary
        ways: dict[bytes, tuple[Callable[[bytes, bytes, bytes], bytes | None], bytes, ColumnName]] = {}

        def reencrypt(frame: bytes) -> bytes:
            header = frame[HEADER]
            way = ways.get(header)
            if way is None or len(frame) < MIN_FRAME_SIZE:
                key, written_for = self._look_up(frame, name, names)
                way = ways[header] = key.decrypt, written_for.bound_to(key.key_id)[2], written_for
            decrypt, associated_data, written_for = way
            payload = decrypt(frame[NONCE], frame[BODY], associated_data)
            if payload is None:
                raise _not_what_was_written(name)
            return primary.encrypt(os.urandom(NONCE_SIZE), payload, written_for)

        return reencrypt

    def _look_up(self, frame: bytes, name: ColumnName, earlier: Iterable[ColumnName]) -> tuple[DataKey, ColumnName]:
        """Return the data key and the name of a frame, or say what is wrong with it."""
        _, key_id, hint, *_ = parse(frame)
        key = self._keys.get(key_id)
        if key is None:
            raise self._missing(key_id.hex(), name)
        for written_for in (name, *earlier):
            if written_for.hint == hint:
                return key, written_for
        raise WrongColumnError(
            f"A value of column {name.name!r} was written for a column of another name. If the column or its table was "
            "renamed, say so with earlier_names=('table.column',), or pin the earlier name with "
            "associated_data='table.column'; otherwise the value was moved."
        )

    def _missing(self, key_id: str, name: ColumnName) -> UnknownKeyError:
        under = f"A value of column {name.name!r} is encrypted under data key {key_id}, which"
        if key_id in self._destroyed:
            return DestroyedKeyError(
                f"{under} was destroyed: the value is lost. `kravn-crypto evidence {key_id}` says when and why.",
                key_id=key_id,
            )
        if key_id in self._disabled:
            return DisabledKeyError(
                f"{under} is disabled. Bring it back with `kravn-crypto enable {key_id}`, and move its values with "
                "`kravn-crypto rekey`.",
                key_id=key_id,
            )
        return UnknownKeyError(
            f"{under} this process does not hold. It looks for it at the beginning of the next transaction; "
            "`kravn-crypto status` lists the keys on record.",
            key_id=key_id,
        )

    def is_stale(self, frame: bytes) -> bool:
        """Tell whether a frame is under another data key than the primary. Needs no decryption."""
        return parse(frame).key_id != self._primary.key_id

    def __repr__(self) -> str:
        return f"<Keyring primary={self.primary_key_id} keys={len(self._keys)}>"


def _not_what_was_written(name: ColumnName) -> AuthenticationError:
    moved = "another column" if name.row is None else "another row or column, or what identifies its row was changed"
    return AuthenticationError(
        f"A value of column {name.name!r} is not what was written there: it was altered, or moved from {moved}."
    )
