"""Keys under a master key: into the columns of a row, and out of them again, with every check on the way."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from cryptography.hazmat.primitives.constant_time import bytes_eq

from .derivation import KEY_SIZE, key_id_of, length_prefixed
from .exceptions import (
    CredentialExpiredError,
    MalformedRowError,
    ProviderDeniedError,
    ProviderResponseError,
    UnwrapRefusedError,
    WrongKeyError,
)
from .keyring import DataKey
from .providers.base import Deadline, KeyProvider, WrappedKey, run_within
from .rows import KeyRow
from .schema import State

T = TypeVar("T")

MAC_KEYRING: Final = "row-mac"
"""What takes the keyring's place in the binding of a wrapped MAC key."""

_WRAP_DOMAIN: Final = b"sqlalchemy-kravn-crypto/wrap/v1"


class Blocking(Protocol):
    """Runs a function that blocks, off the event loop where there is one."""

    def __call__(self, function: Callable[[], T], /) -> T:
        """Run it and return its result."""


def run_here(function: Callable[[], T], /) -> T:
    """Run a function right here: the :class:`Blocking` of a program without an event loop."""
    return function()


def binding(keyring: str, deployment_id: str, key_id: bytes) -> bytes:
    """Return what a wrapped key is bound to in the KMS."""
    return length_prefixed(_WRAP_DOMAIN, keyring.encode(), deployment_id.encode(), key_id)


def wrap(  # noqa: PLR0913 - what a wrapped key is bound to, and how long it may take
    provider: KeyProvider,
    key: bytes,
    *,
    keyring: str,
    deployment_id: str,
    timeout: float,
    blocking: Blocking = run_here,
) -> WrappedKey:
    """Wrap a key, and see that it unwraps to the same, and under another binding to nothing.

    :param timeout: bound on each of the KMS operations, in seconds.
    :raises ProviderError: if the KMS does not do all that.
    :raises WrongKeyError: if it unwraps to something else.
    """
    key_id = key_id_of(key)
    bound = binding(keyring, deployment_id, key_id)

    def within(operation: Callable[[Deadline], T]) -> T:
        deadline = Deadline(timeout)
        return blocking(lambda: run_within(deadline, provider.name, [lambda: operation(deadline)]))[0]

    wrapped = within(lambda deadline: provider.wrap(key, bound, deadline))
    if not bytes_eq(within(lambda deadline: _unwrapped(provider, wrapped, bound, deadline)), key):
        raise WrongKeyError(
            f"The {provider.name} KMS unwrapped the new key to something else. It was not stored; check that the "
            "address is really that of your KMS.",
            key_id=key_id.hex(),
        )
    if provider.binds:
        other = binding(keyring, str(uuid.uuid4()), key_id)
        if within(lambda deadline: _unwraps(provider, wrapped, other, deadline)):
            raise ProviderResponseError(
                f"The {provider.name} KMS unwraps a key under another binding than it wrapped it under. Use a master "
                "key of an authenticated type that takes associated data (Transit: aes256-gcm96).",
                provider=provider.name,
            )
    return wrapped


def usable_wrap(row: KeyRow, provider: KeyProvider) -> WrappedKey | None:
    """Return the wrapped key of a row that a provider can unwrap: the first, else the standby's, else ``None``.

    :raises MalformedRowError: if what the row says of it is not what this library writes.
    """
    for prefix in ("", "standby_"):
        if getattr(row, f"{prefix}provider") == provider.name:
            master_key = row.required(f"{prefix}master_key")
            if provider.recognises(master_key):
                return WrappedKey(master_key, row.decoded(f"{prefix}wrapped_key"))
    return None


def row_binding(row: KeyRow, deployment_id: str) -> bytes:
    """Return what the wrapped key of a row is bound to: a data key, or the MAC key of the control row."""
    if row.state is State.CONTROL:
        return binding(MAC_KEYRING, deployment_id, _key_id(row, "key_check"))
    return binding(row.required("keyring"), deployment_id, _key_id(row, "key_id"))


def unwrapping(provider: KeyProvider, row: KeyRow, deployment_id: str, deadline: Deadline) -> Callable[[], bytes]:
    """Return the call that unwraps the key of a row, after checking everything about the row that it rests on.

    :raises MalformedRowError: if the row holds no wrapped key of this provider.
    """
    wrapped = usable_wrap(row, provider)
    if wrapped is None:
        raise MalformedRowError(f"Row {row.id} of kms_keys holds no key that {provider.name!r} wrapped.")
    bound = row_binding(row, deployment_id)
    return lambda: _unwrapped(provider, wrapped, bound, deadline)


def _key_id(row: KeyRow, column: str) -> bytes:
    try:
        return bytes.fromhex(row.required(column))
    except ValueError:
        pass
    raise MalformedRowError(
        f"Row {row.id} of kms_keys has a {column} that is no key id. Restore the table from a backup."
    )


def checked_key(row: KeyRow, key: bytes) -> DataKey:
    """Return the data key of a row from what the KMS unwrapped.

    :raises WrongKeyError: if it is not the key that the row was made for.
    """
    data_key = DataKey(key) if len(key) == KEY_SIZE else None
    if data_key is None or data_key.key_id.hex() != row.key_id or not data_key.matches(row.decoded("key_check")):
        raise WrongKeyError(
            f"The {row.provider} KMS returned another key than the data key {row.key_id} that was wrapped. Was the "
            "master key deleted and made anew, or is this another KMS of the same address? Restore the master key.",
            key_id=row.key_id or "",
        )
    return data_key


def _unwrapped(provider: KeyProvider, wrapped: WrappedKey, bound: bytes, deadline: Deadline) -> bytes:
    key: object = provider.unwrap(wrapped, bound, deadline)
    if isinstance(key, bytes):
        return key
    raise ProviderResponseError(
        f"The {provider.name} provider returned what is no bytes. This is a defect of the provider; report it there.",
        provider=provider.name,
    )


def _unwraps(provider: KeyProvider, wrapped: WrappedKey, bound: bytes, deadline: Deadline) -> bool:
    try:
        provider.unwrap(wrapped, bound, deadline)
    except CredentialExpiredError:  # it was not looked at
        raise
    except (UnwrapRefusedError, ProviderDeniedError):  # a policy that pins the associated data denies all other
        return False
    return True
