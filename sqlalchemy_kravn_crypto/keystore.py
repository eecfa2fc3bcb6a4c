"""The key store: the rows of ``kms_keys`` into a keyring, and the first rows into ``kms_keys``."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine

from .base64_text import to_base64
from .bootstrap import BootstrapSecret, BootstrapSecrets
from .ciphertext import parse
from .columns import EncryptedColumn
from .derivation import KEY_SIZE, key_id_of
from .events import append, hash_of_newest
from .exceptions import (
    BootstrapKeyError,
    DecryptionError,
    DeploymentMismatchError,
    ExistingDataError,
    KeyStoreRolledBackError,
    MalformedRowError,
    NotProvisionedError,
    ProviderError,
    ProviderMismatchError,
    RowAuthenticationError,
    UnpinnedKeyError,
    WrongKeyError,
)
from .keyring import DataKey, Keyring
from .providers.base import Deadline, KeyProvider, WrappedKey, run_within
from .replicas import live_replicas
from .rows import KEYRING, KeyRow, MacKey, StoredRows, connect, locked, read_rows, write_rows
from .schema import CONTROL_ROW_ID, State
from .secrecy import KeepsSecret
from .wrapping import MAC_KEYRING, Blocking, checked_key, run_here, unwrapping, usable_wrap, wrap

logger = logging.getLogger(__name__)

NO_PROVIDER: Final = "none"
"""The provider of the bootstrap key."""

_LIVE: Final = (State.PENDING, State.PRIMARY, State.RETIRED)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyStore(KeepsSecret):
    """How one process opens the key store of its deployment.

    :param provider: the configured KMS; ``None`` is mode ``none``.
    :param secret: ``KRAVN_SECRET``.
    :param secret_file: where ``secret.key`` is, or would be.
    :param deployment_id: what the control row must say, where the operator pins it.
    :param pinned: the key ids that may be loaded, where the operator pins them.
    :param timeout: bound on one whole KMS operation, in seconds.
    :param may_provision: whether this process may write to the key store.
    :param next_secret: ``KRAVN_SECRET_NEXT``: verifies and decrypts as well, while the secret is being changed.
    :param retired_secrets: ``KRAVN_SECRET_RETIRED``: decrypt what is still under them, and verify nothing.
    """

    provider: KeyProvider | None
    secret: str | None = field(repr=False)
    secret_file: Path
    next_secret: str | None = field(default=None, repr=False)
    retired_secrets: tuple[str, ...] = field(default=(), repr=False)
    deployment_id: str | None = None
    pinned: frozenset[str] = frozenset()
    timeout: float = 10.0
    may_provision: bool = True

    @property
    def provider_name(self) -> str:
        """The configured provider's name."""
        return self.provider.name if self.provider else NO_PROVIDER

    def open(self, engine: Engine, columns: Iterable[EncryptedColumn] = (), *, blocking: Blocking = run_here) -> Opened:
        """Return the keyring, after provisioning the key store where that is still to be done.

        Where everything is provisioned it only reads: one query, no lock, and one KMS call for each live data key.

        :param columns: the encrypted columns to look at before an empty key store is filled.
        :param blocking: what runs the KMS calls and the stretching of the secret.
        :raises KeyStoreError: if the rows do not allow the process to start.
        :raises ProviderError: if the KMS does not.
        """
        with connect(engine) as connection:
            rows = read_rows(connection)
        # Only after the rows: a secret.key that they speak of was there before they were.
        secrets = self.secrets(rows, blocking)
        if not self._provisioned(rows):
            if not self.may_provision:
                raise NotProvisionedError(
                    f"The key store holds no data key of provider {self.provider_name!r} yet. The first process to "
                    "start makes it; where KRAVN_KMS_PROVISION=never, `kravn-crypto provision` does."
                )
            rows, _ = self.provision(engine, columns, secrets=secrets, blocking=blocking)
            if secrets.current is None:
                secrets = self.secrets(rows, blocking)
        return self._load(rows, secrets, None, blocking)

    def reopen(self, rows: StoredRows, before: Opened, *, blocking: Blocking = run_here) -> Opened:
        """Return the keyring of rows that changed since the key store was opened.

        Only keys that are new are unwrapped. A pending one that the KMS does not unwrap now is left out and named in
        :attr:`Opened.missing`, since nothing is under it yet.

        :raises KeyStoreRolledBackError: if the rows are older than those that were opened before.
        :raises KeyStoreError: if the rows are not genuine, or name another KMS than the settings.
        :raises ProviderError: if the KMS does not unwrap a key that values are under.
        """
        if rows.epoch < before.rows.epoch:
            raise KeyStoreRolledBackError(
                f"The key store went back from epoch {before.rows.epoch} to {rows.epoch}: kms_keys was restored from a "
                "backup, or tampered with. This process encrypts nothing more; bring back the newest kms_keys, then "
                "start the processes again."
            )
        return self._load(rows, before.secrets, before, blocking)

    def secrets(self, rows: StoredRows, blocking: Blocking = run_here) -> BootstrapSecrets:
        """Return the secrets of this process, stretched.

        :raises SecretFileError: if ``secret.key`` is needed and cannot be used.
        """
        with_file = any(row.provider == NO_PROVIDER and row.master_key == "file" for row in live_keys(rows))
        return blocking(
            lambda: BootstrapSecrets.gather(
                self.secret,
                self.secret_file,
                next_secret=self.next_secret,
                retired=self.retired_secrets,
                with_file=with_file,
            )
        )

    def provision(  # noqa: PLR0913 - the last three are for the first boot and for the command line
        self,
        engine: Engine,
        columns: Iterable[EncryptedColumn] = (),
        *,
        secrets: BootstrapSecrets | None = None,
        blocking: Blocking = run_here,
        look_for_data: bool = True,
        pin_later: bool = False,
    ) -> tuple[StoredRows, bool]:
        """Make the first data key of the configured provider, unless another process has done so.

        The lock is held meanwhile, so that however many processes start at once, one of them wraps. Where
        processes are alive that run without a KMS, the key comes in as pending, since they could not read what is under
        it; else it is the primary at once.

        :param look_for_data: whether an encrypted column that already holds values stops it.
        :param pin_later: whether a key may be made that no process loads before the operator has pinned it.
        :return: all rows, and whether they were made here; if not, nothing is known yet of whether they are genuine.
        """
        with locked(engine, self.deployment_id or str(uuid.uuid4()), self.lock_wait) as connection:
            before = read_rows(connection)
            if self._provisioned(before):
                return before, False
            secrets = secrets or self.secrets(before, blocking)
            if before.keys:
                # What a boot would refuse is not built upon: signing such rows again would make them genuine.
                self.checked(before, secrets, None, blocking)
            elif look_for_data:
                _refuse_existing_data(connection, list(columns), secrets.current)
            is_alone = not before.keys or not live_replicas(connection)
            made = self._with_first_key(before, secrets, blocking, pin_later=pin_later, as_primary=is_alone)
            new = made.keys[-1]
            events_hash = append(
                connection,
                "adopt" if before.keys else "provision",
                # An emptied key store names no event, and the trail goes on.
                newest_hash=made.in_control().events_hash if before.keys else hash_of_newest(connection),
                key_id=new.key_id,
                details={
                    "state": new.state.value,
                    "provider": new.provider,
                    "master_key": new.master_key,
                    "retired": _newly_retired(before, made),
                },
            )
            after = self._signed(made, events_hash, secrets, blocking)
            write_rows(connection, before, after)
            connection.commit()
        for row in after.keys:
            if row not in before.keys:
                logger.info("data key %s of provider %s is now %s", row.key_id, row.provider, row.state.value)
        return after, True

    def rehearse(self, blocking: Blocking = run_here) -> None:
        """Ask of the KMS what a first boot will, with a key that is thrown away.

        :raises ProviderError: if it does not do so.
        """
        if self.provider is not None:
            nowhere = KeyRow(id=CONTROL_ROW_ID, state=State.CONTROL, deployment_id=str(uuid.uuid4()))
            self._wrap(self.provider, os.urandom(KEY_SIZE), KEYRING, nowhere, blocking)

    # --- What is there -----------------------------------------------------------------------------------------------

    @property
    def lock_wait(self) -> float:
        """Bound on the wait for the lock, in seconds.

        Whoever waits outlasts one holder whose KMS does not answer: wrap, unwrap, and unwrap under a wrong binding.
        """
        return 4 * self.timeout

    def _provisioned(self, rows: StoredRows) -> bool:
        """Tell whether there is nothing to make: in mode ``none`` any key at all serves, else one of a KMS."""
        return any(self.provider is None or row.provider != NO_PROVIDER for row in rows.keys)

    def _load(self, rows: StoredRows, secrets: BootstrapSecrets, before: Opened | None, blocking: Blocking) -> Opened:
        mac_key, live = self.checked(rows, secrets, before, blocking)
        keys, missing = self._data_keys(rows, live, secrets, before, blocking)
        primary = next((row for row in live if row.state is State.PRIMARY), None)
        if primary is None:
            raise MalformedRowError("No data key in kms_keys is primary. Restore the table from a backup.")
        # While a primary is closing, everybody already encrypts under its successor.
        primary = next((row for row in live if row.closing is not None), primary)
        keyring = Keyring(
            keys[primary.id],
            [key for row_id, key in sorted(keys.items(), reverse=True) if row_id != primary.id],
            disabled=_key_ids(rows, State.DISABLED),
            destroyed=_key_ids(rows, State.DESTROYED),
            bootstrap=[row.required("key_id") for row in live if row.provider == NO_PROVIDER],
        )
        return Opened(keyring, rows.in_control().required("deployment_id"), rows, secrets, mac_key, missing)

    def _data_keys(
        self,
        rows: StoredRows,
        live: Sequence[KeyRow],
        secrets: BootstrapSecrets,
        before: Opened | None,
        blocking: Blocking,
    ) -> tuple[dict[int, DataKey], frozenset[str]]:
        """Return the data keys by the ids of their rows, and the key ids of those that are to be had later."""
        keys: dict[int, DataKey] = {}
        for row in live:
            key = self._bootstrap_key(row, secrets) if row.provider == NO_PROVIDER else _known_key(row, before)
            if key is not None:
                keys[row.id] = key
        wrapped = [row for row in live if row.id not in keys]
        if not wrapped:
            return keys, frozenset()
        needed = [row for row in wrapped if before is None or row.state is not State.PENDING or row.closing]
        keys |= self._unwrapped(rows, needed, blocking)
        missing = set()
        for row in wrapped:
            if row not in needed:
                try:
                    keys |= self._unwrapped(rows, [row], blocking)
                except (ProviderError, WrongKeyError) as error:
                    missing.add(row.required("key_id"))
                    logger.warning("pending data key %s cannot be loaded yet: %s", row.key_id, error)
        return keys, frozenset(missing)

    def _unwrapped(self, rows: StoredRows, wrapped: Sequence[KeyRow], blocking: Blocking) -> dict[int, DataKey]:
        provider = self.provider
        if provider is None or not wrapped:
            return {}
        deployment_id = rows.in_control().required("deployment_id")
        deadline = Deadline(self.timeout)
        calls = [unwrapping(provider, row, deployment_id, deadline) for row in wrapped]
        unwrapped = blocking(lambda: run_within(deadline, provider.name, calls))
        return {row.id: checked_key(row, key) for row, key in zip(wrapped, unwrapped, strict=True)}

    def checked(
        self, rows: StoredRows, secrets: BootstrapSecrets, before: Opened | None = None, blocking: Blocking = run_here
    ) -> tuple[MacKey | None, list[KeyRow]]:
        """Make every check on the rows that can be made before keys are unwrapped.

        :param before: what was opened before; its MAC key need not be unwrapped again.
        :return: the key that authenticates the rows, and the rows of the data keys to load.
        :raises KeyStoreError: if they do not pass one.
        """
        self._check_deployment(rows.in_control())
        live = live_keys(rows)
        if self.provider is None:
            # Until the first data key of a KMS is promoted, mode `none` still boots, without that key.
            live = [row for row in live if not (row.state is State.PENDING and row.provider != NO_PROVIDER)]
        self._check_providers(live)
        for row in live:
            if row.provider == NO_PROVIDER:
                self._bootstrap_key(row, secrets)
        mac_key = self._authenticate(rows, secrets, before, blocking)
        return mac_key, self._pinned_only(live)

    def _check_deployment(self, control: KeyRow) -> None:
        recorded = control.required("deployment_id")
        if self.deployment_id is not None and self.deployment_id != recorded:
            raise DeploymentMismatchError(
                f"The key store belongs to deployment {recorded}, but KRAVN_DEPLOYMENT_ID is {self.deployment_id}. If "
                "this database is a clone, give it a key store of its own; otherwise correct the setting."
            )

    def _check_providers(self, live: Sequence[KeyRow]) -> None:
        for row in live:
            if row.provider == NO_PROVIDER:
                continue
            if self.provider is None:
                raise ProviderMismatchError(
                    f"The data keys are wrapped by {row.provider!r}, but KRAVN_KMS_PROVIDER is 'none'. There is no way "
                    f"back to mode none by a setting: set KRAVN_KMS_PROVIDER={row.provider} again."
                )
            if usable_wrap(row, self.provider) is None:
                raise ProviderMismatchError(
                    f"Data key {row.key_id} is wrapped by {row.provider!r} under master key {row.master_key!r}, but "
                    f"the settings name {self.provider.name!r} and {self.provider.master_key!r}. Moving to another KMS "
                    "or master key is a deliberate act, not a setting: set the recorded one again, or see `kravn-"
                    "crypto standby`."
                )

    def _bootstrap_key(self, row: KeyRow, secrets: BootstrapSecrets) -> DataKey:
        for secret in secrets.all:
            key = DataKey(secret.data_key)
            if key.key_id.hex() == row.key_id and key.matches(row.decoded("key_check")):
                return key
        recorded = "secret.key" if row.master_key == "file" else "KRAVN_SECRET"
        if not secrets.all:
            raise BootstrapKeyError(
                f"The bootstrap key is missing: it came from {recorded}, but KRAVN_SECRET is not set and there is no "
                f"{self.secret_file}. Values written before a KMS was adopted need it; bring it back."
            )
        present = "KRAVN_SECRET" if secrets.all[0].source == "secret" else str(self.secret_file)
        raise BootstrapKeyError(
            f"The bootstrap key is another than the one on record: that one came from {recorded}, this process has "
            f"one from {present}. All processes need the same; with it set, nothing is lost. If the secret was "
            "changed, values are still under the earlier one: name it in KRAVN_SECRET_RETIRED until they are rekeyed."
        )

    def _authenticate(
        self, rows: StoredRows, secrets: BootstrapSecrets, before: Opened | None, blocking: Blocking
    ) -> MacKey | None:
        control = rows.in_control()
        mac_key = self._mac_key(control, secrets, before, blocking)
        if mac_key is not None:
            mac_key.verify(rows)
        elif not self.pinned:
            raise RowAuthenticationError(
                "Nothing tells whether the rows of kms_keys are genuine: this process has no KRAVN_SECRET, and its KMS "
                "does not authenticate who wrapped a key. Set KRAVN_SECRET, or name the key ids in "
                "KRAVN_KMS_PINNED_KEYS."
            )
        return mac_key

    def _mac_key(
        self, control: KeyRow, secrets: BootstrapSecrets, before: Opened | None, blocking: Blocking
    ) -> MacKey | None:
        if control.wrapped_key is None:
            # Of two secrets, the one that the control row names: `rotate-secret` signs all rows at once.
            candidates = [MacKey(secret.mac_key) for secret in secrets.verifying]
            named = [candidate for candidate in candidates if candidate.signed(control)]
            return next(iter(named or candidates), None)
        known = None if before is None else before.mac_key
        if known is not None and known.key_id.hex() == control.key_check:
            return known
        provider = self.provider
        # A wrapped MAC key from a KMS that authenticates nothing may be anybody's.
        if provider is None or not provider.authenticates or usable_wrap(control, provider) is None:
            raise ProviderMismatchError(
                f"The key that authenticates kms_keys is wrapped by {control.provider!r} under {control.master_key!r}, "
                f"but the settings name {self.provider_name!r}. Set the recorded KMS again."
            )
        deadline = Deadline(self.timeout)
        unwrap = unwrapping(provider, control, control.required("deployment_id"), deadline)
        key = blocking(lambda: run_within(deadline, provider.name, [unwrap]))[0]
        if len(key) != KEY_SIZE or key_id_of(key).hex() != control.key_check:
            raise WrongKeyError(
                f"The {provider.name} KMS returned another MAC key than was wrapped. Was the master key deleted and "
                "made anew?"
            )
        return MacKey(key)

    def _pinned_only(self, live: Sequence[KeyRow]) -> list[KeyRow]:
        if not self.pinned:
            return list(live)
        loaded = []
        for row in live:
            # The bootstrap key comes from this process's own secret, so nobody can plant it. But whoever has the secret
            # and writes to kms_keys could make it primary again, and read what is written from then on.
            is_for_reading = row.provider == NO_PROVIDER and (row.state is not State.PRIMARY or self.provider is None)
            if is_for_reading or row.key_id in self.pinned:
                loaded.append(row)
            elif row.state is State.PENDING:
                logger.warning("pending data key %s is not in KRAVN_KMS_PINNED_KEYS and was left out", row.key_id)
            else:
                raise UnpinnedKeyError(
                    f"Data key {row.key_id} is {row.state.value}, but KRAVN_KMS_PINNED_KEYS does not name it. If you "
                    "made it, or it is the bootstrap key before a KMS is adopted, add it there; if not, find out who "
                    "writes to kms_keys.",
                    key_id=row.key_id or "",
                )
        return loaded

    # --- What is made ------------------------------------------------------------------------------------------------

    def _with_first_key(
        self, rows: StoredRows, secrets: BootstrapSecrets, blocking: Blocking, *, pin_later: bool, as_primary: bool
    ) -> StoredRows:
        control = rows.in_control()
        self._check_deployment(control)
        if self.provider is not None and self.pinned and not pin_later:
            raise NotProvisionedError(
                "A new data key is to be made, but KRAVN_KMS_PINNED_KEYS keeps every process from loading one that it "
                "does not name. Run `kravn-crypto provision`, and add the key id that it prints."
            )
        secret = secrets.current
        keys = list(rows.keys)
        if self.provider is None:
            # Only now is it certain that no other machine has made one, since its row would be here.
            secret = secret or BootstrapSecret.create_file(self.secret_file)
        else:
            control = self._with_mac_key(control, secret, blocking, pin_later=pin_later)
        # Nothing but the bootstrap key can be here: with a key of a KMS there would be nothing to make.
        if secret is not None and not keys:
            keys.append(bootstrap_row(_next_id(keys), secret))
        if self.provider is not None:
            keys.append(self.new_key_row(self.provider, _next_id(keys), control, blocking))
        if as_primary:
            keys = [row.in_state(State.RETIRED) if row.state is State.PRIMARY else row for row in keys]
            keys[-1] = keys[-1].in_state(State.PRIMARY)
        return StoredRows(replace(control, epoch=rows.epoch + 1), tuple(keys))

    def _signed(self, rows: StoredRows, events_hash: str, secrets: BootstrapSecrets, blocking: Blocking) -> StoredRows:
        rows = replace(rows, control=replace(rows.in_control(), events_hash=events_hash))
        if secrets.current is None and self.provider is None:
            secrets = self.secrets(rows, blocking)  # secret.key has just been made
        mac_key = self._mac_key(rows.in_control(), secrets, None, blocking)
        return rows if mac_key is None else mac_key.sign(rows)

    def _with_mac_key(
        self, control: KeyRow, secret: BootstrapSecret | None, blocking: Blocking, *, pin_later: bool
    ) -> KeyRow:
        """Return the control row with a MAC key that the KMS wraps, where there is no secret to derive one from."""
        provider = self.provider
        if provider is None or secret is not None or control.wrapped_key is not None:
            return control
        if provider.authenticates:
            key = os.urandom(KEY_SIZE)
            wrapped = self._wrap(provider, key, MAC_KEYRING, control, blocking)
            return replace(
                control,
                provider=provider.name,
                master_key=wrapped.master_key,
                wrapped_key=to_base64(wrapped.blob),
                key_check=key_id_of(key).hex(),
            )
        if pin_later:
            return control
        raise NotProvisionedError(
            f"The {provider.name} KMS does not authenticate who wrapped a key, so without more, whoever can write "
            "kms_keys could plant one of their own. Set KRAVN_SECRET; or run `kravn-crypto provision` and name the key "
            "id that it prints in KRAVN_KMS_PINNED_KEYS."
        )

    def new_key_row(
        self,
        provider: KeyProvider,
        row_id: int,
        control: KeyRow,
        blocking: Blocking = run_here,
        *,
        standby: KeyProvider | None = None,
    ) -> KeyRow:
        """Make a data key, wrap it, and return its row, pending.

        :param standby: a second KMS that is to be able to unwrap it.
        :raises ProviderError: if a KMS does not wrap and unwrap it.
        """
        key = os.urandom(KEY_SIZE)
        data_key = DataKey(key)
        wrapped = self._wrap(provider, key, KEYRING, control, blocking)
        second = None if standby is None else self._wrap(standby, key, KEYRING, control, blocking)
        return KeyRow(
            id=row_id,
            keyring=KEYRING,
            key_id=data_key.key_id.hex(),
            state=State.PENDING,
            provider=provider.name,
            master_key=wrapped.master_key,
            wrapped_key=to_base64(wrapped.blob),
            standby_provider=None if standby is None else standby.name,
            standby_master_key=None if second is None else second.master_key,
            standby_wrapped_key=None if second is None else to_base64(second.blob),
            key_check=to_base64(data_key.check),
        )

    def _wrap(self, provider: KeyProvider, key: bytes, keyring: str, control: KeyRow, blocking: Blocking) -> WrappedKey:
        deployment_id = control.required("deployment_id")
        return wrap(
            provider, key, keyring=keyring, deployment_id=deployment_id, timeout=self.timeout, blocking=blocking
        )


@dataclass(frozen=True, slots=True)
class Opened(KeepsSecret):
    """What opening the key store gives.

    :ivar rows: what the key store held.
    :ivar secrets: the secrets of this process, stretched.
    :ivar mac_key: what authenticates the rows; ``None`` where the operator pins key ids instead.
    :ivar missing: the key ids of pending data keys that the KMS did not unwrap.
    """

    keyring: Keyring
    deployment_id: str
    rows: StoredRows = field(repr=False)
    secrets: BootstrapSecrets = field(repr=False)
    mac_key: MacKey | None
    missing: frozenset[str] = frozenset()

    @property
    def mac_key_ids(self) -> frozenset[str]:
        """The ids of the keys with which this process can verify rows."""
        known = {MacKey(secret.mac_key).key_id.hex() for secret in self.secrets.verifying}
        return frozenset(known if self.mac_key is None else known | {self.mac_key.key_id.hex()})


def live_keys(rows: StoredRows) -> list[KeyRow]:
    """Return the rows of the data keys that every process loads."""
    return [row for row in rows.keys if row.state in _LIVE]


def _newly_retired(before: StoredRows, after: StoredRows) -> str | None:
    """Return the key that is retired from now on: the primary of before, or a bootstrap key that never was one."""
    retired = (row.required("key_id") for row in after.keys if row.state is State.RETIRED and row not in before.keys)
    return next(retired, None)


def _key_ids(rows: StoredRows, state: State) -> list[str]:
    return [row.required("key_id") for row in rows.keys if row.state is state]


def _known_key(row: KeyRow, before: Opened | None) -> DataKey | None:
    key = None if before is None else before.keyring.data_key(row.required("key_id"))
    return key if key is not None and key.matches(row.decoded("key_check")) else None


def _next_id(keys: Sequence[KeyRow]) -> int:
    return max((row.id for row in keys), default=CONTROL_ROW_ID) + 1


def bootstrap_row(row_id: int, secret: BootstrapSecret) -> KeyRow:
    """Return the row of a bootstrap key, retired."""
    key = DataKey(secret.data_key)
    return KeyRow(
        id=row_id,
        keyring=KEYRING,
        key_id=key.key_id.hex(),
        state=State.RETIRED,
        provider=NO_PROVIDER,
        master_key=secret.source,
        key_check=to_base64(key.check),
    )


def _refuse_existing_data(
    connection: Connection, columns: Sequence[EncryptedColumn], secret: BootstrapSecret | None
) -> None:
    """Refuse to fill an empty key store over values under a key that is lost: a fresh key would hide the loss."""
    if not columns:
        logger.warning(
            "the key store is empty, and no encrypted column is declared yet that could hold values under a lost key; "
            "import the models before configure()"
        )
    bootstrap_key_id = None if secret is None else DataKey(secret.data_key).key_id
    for column in columns:
        key_id = None
        try:
            frame = column.first_frame(connection)
            if frame is None:
                continue
            key_id = parse(frame).key_id
        except DecryptionError:
            key_id = None
        if key_id is None or key_id != bootstrap_key_id:
            under = f"under data key {key_id.hex()}" if key_id else "that are not encrypted by this library"
            raise ExistingDataError(
                f"The key store is empty, but {column.label} holds values {under}. Restore kms_keys from the backup "
                "that belongs to the data (and KRAVN_SECRET with it). Only if those values may be lost: empty the "
                "column, or run `kravn-crypto provision --new-database`."
            )
