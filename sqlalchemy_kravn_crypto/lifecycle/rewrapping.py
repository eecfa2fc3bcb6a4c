"""Data keys from one master key to another; the values under them stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from cryptography.hazmat.primitives.constant_time import bytes_eq

from ..base64_text import to_base64
from ..changes import Operator, changing
from ..derivation import key_id_of
from ..exceptions import ChangedMeanwhileError, StandbyError, WrongKeyError, WrongStateError
from ..providers.base import Deadline, KeyProvider, WrappedKey, run_within
from ..rows import KEYRING, KeyRow, StoredRows
from ..schema import State
from ..wrapping import MAC_KEYRING, checked_key, unwrapping, usable_wrap, wrap

FIRST: Final = ""
STANDBY: Final = "standby_"


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """What became of one wrapped key.

    :ivar key_id: the key id of the data key; of the MAC key of the key store, ``row-mac``.
    :ivar before: the master key, with its version, that wrapped it.
    :ivar after: the one that wraps it now; the same where it already was the newest.
    """

    key_id: str
    before: str | None
    after: str


def rewrap(operator: Operator, *, reason: str | None = None, dry_run: bool = False) -> list[Rewrapped]:
    """Wrap every data key anew, under the newest version of its master key.

    Each is unwrapped, checked, wrapped, unwrapped again, and replaced if the row is still the one that was read.

    :param dry_run: only see under which versions they are.
    :raises ChangedMeanwhileError: if somebody else changed a row meanwhile.
    :raises ProviderError: if the KMS does not do all that; what was done before stays done.
    """
    provider = _provider(operator)
    done = []
    for row in _wrapped_rows(operator):
        wrapped = usable_wrap(row, provider)
        if wrapped is None:
            raise _not_ours(row, provider)
        if dry_run:
            done.append(Rewrapped(_label(row), wrapped.master_key, wrapped.master_key))
            continue
        prefix = FIRST if row.provider == provider.name and row.master_key == wrapped.master_key else STANDBY
        anew = _wrap_again(operator, row, provider, provider)
        if anew.master_key != wrapped.master_key:
            _replace(operator, row, _with_wrap(row, prefix, provider, anew), "rewrap", reason)
        done.append(Rewrapped(_label(row), wrapped.master_key, anew.master_key))
    return done


def add_standby(operator: Operator, *, reason: str | None = None, dry_run: bool = False) -> list[Rewrapped]:
    """Wrap every data key by the standby KMS, too. Safe to repeat after a failure.

    :param dry_run: only see whether both answer, with the keys that are there.
    :raises StandbyError: if there is another standby already, or this one cannot be one.
    :raises ProviderError: if one of the two does not answer as it should.
    """
    provider, standby = _provider(operator), _standby(operator)
    done = []
    for row in _wrapped_rows(operator):
        if _is_first_of(row, standby):
            raise StandbyError(
                f"{_label(row)} is wrapped by {standby.name!r} under {standby.master_key!r} in the first place: the "
                "standby is the KMS itself. Name another in the settings KRAVN_STANDBY_KMS_…."
            )
        if row.standby_provider is not None:
            if not _is_standby_of(row, standby):
                raise StandbyError(
                    f"{_label(row)} has another standby already: {row.standby_provider!r} under "
                    f"{row.standby_master_key!r}. Remove it first with `kravn-crypto standby remove`."
                )
            done.append(Rewrapped(_label(row), row.standby_master_key, row.required("standby_master_key")))
            continue
        if row.state is State.CONTROL and not standby.authenticates:
            raise StandbyError(
                f"{standby.name!r} does not tell who wrapped a key, and the key that authenticates kms_keys is "
                "wrapped. Take a standby that does, such as Vault."
            )
        if usable_wrap(row, provider) is None:
            raise _not_ours(row, provider)
        wrapped = _wrap_again(operator, row, provider, standby)
        if not dry_run:
            _replace(operator, row, _with_wrap(row, STANDBY, standby, wrapped), "standby-add", reason)
        done.append(Rewrapped(_label(row), None, wrapped.master_key))
    return done


def switch_to_standby(
    operator: Operator, *, lost: bool = False, reason: str | None = None, dry_run: bool = False
) -> StoredRows:
    """Make the standby the first, and the first the standby; the settings must name the standby as the KMS by now.

    :param lost: the first is gone for good: do not ask it, and keep nothing that it wrapped.
    :raises StandbyError: if a data key has no standby, or the settings still name the first.
    :raises ProviderError: if one of the two does not answer as it should.
    """
    provider = _provider(operator)
    rows = _read(operator)
    swapped = rows
    for row in _wrapped(rows):
        if _is_first_of(row, provider):
            raise StandbyError(
                f"{_label(row)} is wrapped by {provider.name!r} under {provider.master_key!r} in the first place "
                "already. If the other is to be the first, deploy its settings as KRAVN_KMS_… first, with these as "
                "KRAVN_STANDBY_KMS_…; else all is done."
            )
        if row.standby_provider is None or not _is_standby_of(row, provider):
            raise StandbyError(
                f"{_label(row)} has no wrap by {provider.name!r} under {provider.master_key!r} as its standby. Deploy "
                "the settings of the standby as KRAVN_KMS_… first, with those of the first as KRAVN_STANDBY_KMS_…."
            )
        key = _unwrapped(operator, row, provider)
        if not lost and not bytes_eq(_unwrapped(operator, row, _standby(operator)), key):
            raise WrongKeyError(f"The two KMS unwrap {_label(row)} to different keys. Nothing was changed.")
        swapped = _with_row(swapped, _swapped(row, lost=lost))
    if dry_run or swapped == rows:
        return rows
    return _change_all(operator, rows, swapped, "standby-switch", reason=reason, details={"lost": lost})


def remove_standby(operator: Operator, *, reason: str | None = None, dry_run: bool = False) -> StoredRows:
    """Give up what the standby KMS wrapped.

    :raises StandbyError: if there is none, or it is the one that the settings name as the KMS.
    """
    rows = _read(operator)
    kept = [row for row in _wrapped(rows) if row.standby_provider is not None]
    provider = _provider(operator)
    if not kept:
        raise StandbyError("No data key has a standby.")
    if any(_is_standby_of(row, provider) for row in kept):
        raise StandbyError(
            f"The standby is {provider.name!r} under {provider.master_key!r}, which the settings name as the KMS. Make "
            "it the first with `kravn-crypto standby switch`."
        )
    cleared = rows
    for row in kept:
        cleared = _with_row(cleared, _with_wrap(row, STANDBY, None, None))
    if dry_run:
        return rows
    details = {"standby": kept[0].standby_master_key}
    return _change_all(operator, rows, cleared, "standby-remove", reason=reason, details=details)


# --- Rows with wrapped keys ------------------------------------------------------------------------------------------


def _read(operator: Operator) -> StoredRows:
    with changing(operator) as change:
        return change.rows


def _wrapped(rows: StoredRows) -> list[KeyRow]:
    return [row for row in (rows.in_control(), *rows.keys) if row.wrapped_key is not None]


def _wrapped_rows(operator: Operator) -> list[KeyRow]:
    return _wrapped(_read(operator))


def _label(row: KeyRow) -> str:
    return MAC_KEYRING if row.state is State.CONTROL else row.required("key_id")


def _with_wrap(row: KeyRow, prefix: str, provider: KeyProvider | None, wrapped: WrappedKey | None) -> KeyRow:
    columns: dict[str, Any] = {
        f"{prefix}provider": None if provider is None else provider.name,
        f"{prefix}master_key": None if wrapped is None else wrapped.master_key,
        f"{prefix}wrapped_key": None if wrapped is None else to_base64(wrapped.blob),
    }
    return replace(row, **columns)


def _swapped(row: KeyRow, *, lost: bool) -> KeyRow:
    return replace(
        row,
        provider=row.standby_provider,
        master_key=row.standby_master_key,
        wrapped_key=row.standby_wrapped_key,
        standby_provider=None if lost else row.provider,
        standby_master_key=None if lost else row.master_key,
        standby_wrapped_key=None if lost else row.wrapped_key,
    )


def _is_first_of(row: KeyRow, provider: KeyProvider) -> bool:
    return row.provider == provider.name and provider.recognises(row.required("master_key"))


def _is_standby_of(row: KeyRow, provider: KeyProvider) -> bool:
    return row.standby_provider == provider.name and provider.recognises(row.required("standby_master_key"))


def _with_row(rows: StoredRows, row: KeyRow) -> StoredRows:
    return replace(rows, control=row) if row.state is State.CONTROL else rows.with_key(row)


# --- The KMS ---------------------------------------------------------------------------------------------------------


def _provider(operator: Operator) -> KeyProvider:
    if operator.store.provider is None:
        raise WrongStateError("In mode none, no KMS wraps anything. Set KRAVN_KMS_PROVIDER.")
    return operator.store.provider


def _standby(operator: Operator) -> KeyProvider:
    if operator.standby is None:
        raise StandbyError("There is no second KMS: set KRAVN_STANDBY_KMS_PROVIDER and the settings that go with it.")
    return operator.standby


def _unwrapped(operator: Operator, row: KeyRow, provider: KeyProvider) -> bytes:
    """Return the key of a row, checked against what the row says of it."""
    deployment_id = _deployment_id(operator)
    deadline = Deadline(operator.store.timeout)
    key = run_within(deadline, provider.name, [unwrapping(provider, row, deployment_id, deadline)])[0]
    if row.state is State.CONTROL:
        if key_id_of(key).hex() != row.key_check:
            raise WrongKeyError(f"The {provider.name} KMS returned another MAC key than was wrapped.")
    else:
        checked_key(row, key)
    return key


def _wrap_again(operator: Operator, row: KeyRow, source: KeyProvider, target: KeyProvider) -> WrappedKey:
    return wrap(
        target,
        _unwrapped(operator, row, source),
        keyring=MAC_KEYRING if row.state is State.CONTROL else KEYRING,
        deployment_id=_deployment_id(operator),
        timeout=operator.store.timeout,
    )


def _deployment_id(operator: Operator) -> str:
    return _read(operator).in_control().required("deployment_id")


def _not_ours(row: KeyRow, provider: KeyProvider) -> StandbyError:
    return StandbyError(f"{_label(row)} has no wrap by {provider.name!r} under {provider.master_key!r}.")


# --- Compare and swap ------------------------------------------------------------------------------------------------


def _replace(operator: Operator, read: KeyRow, row: KeyRow, action: str, reason: str | None) -> None:
    with changing(operator) as change:
        present = change.rows.in_control() if read.state is State.CONTROL else change.rows.key(read.required("key_id"))
        if present is None or _essence(present) != _essence(read):
            raise _changed(_label(read))
        details = {"before": read.master_key, "after": row.master_key, "standby": row.standby_master_key}
        row = replace(row, epoch=present.epoch, events_hash=present.events_hash)
        change.save(_with_row(change.rows, row), action, key_id=read.key_id, reason=reason, details=details)


def _change_all(  # noqa: PLR0913 - what is changed, why, and what is said of it
    operator: Operator,
    read: StoredRows,
    after: StoredRows,
    action: str,
    *,
    reason: str | None,
    details: Mapping[str, Any],
) -> StoredRows:
    with changing(operator) as change:
        if change.rows.epoch != read.epoch:
            raise _changed("the key store")
        control = replace(after.in_control(), events_hash=change.rows.in_control().events_hash)
        change.save(replace(after, control=control), action, reason=reason, details=details)
        return change.rows


def _essence(row: KeyRow) -> KeyRow:
    """Return a row without what every change of the key store touches."""
    return replace(row, row_mac=None, epoch=None, events_hash=None, updated_at=None)


def _changed(what: str) -> ChangedMeanwhileError:
    return ChangedMeanwhileError(f"Somebody else changed {what} meanwhile. Nothing of it was written; run this again.")
