"""Every way the library can fail, under one base.

No message, argument or attribute of these errors holds plaintext, ciphertext, a key, a token or the text of a
KMS's answer. They are raised outside of ``except`` blocks, so that neither ``__cause__`` nor ``__context__`` leads to
an error of a codec or an SDK that does hold them.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy.exc import DontWrapMixin

MALFORMED_URL: Final = "The database URL is malformed. It looks like postgresql+psycopg://user:password@host/name."
"""Said in place of SQLAlchemy's own words, which may repeat the URL with its password."""


class KravnCryptoError(DontWrapMixin, Exception):
    """Base of every error of this library; never raised itself.

    SQLAlchemy wraps what a type raises while it binds parameters into a ``StatementError`` that prints the whole row in
    plaintext. ``DontWrapMixin`` keeps it from doing so.
    """


# --- Something to put right in the program or its environment -------------------------------------------------------


class ConfigurationError(KravnCryptoError):
    """The program or its environment is set up wrongly."""


class SettingsError(ConfigurationError):
    """A setting is missing, misspelt, malformed or too weak."""


class MissingExtraError(ConfigurationError):
    """The configured provider needs packages that an extra of this distribution brings."""


class ColumnError(ConfigurationError):
    """An encrypted column is declared in a way that would store plaintext or unreadable values."""


class UnsupportedOperationError(ConfigurationError):
    """A statement asks of an encrypted column what cannot be answered on ciphertext, or would store what is none."""


class ResultTypesChangedError(ConfigurationError):
    """A column that a statement selects has another type in the database than when it was executed before."""


class NotConfiguredError(ConfigurationError):
    """An encrypted column was used before ``configure(engine)``."""


class AlreadyConfiguredError(ConfigurationError):
    """``configure`` was called with another key store or other settings than the process already uses."""


class SecretFileError(ConfigurationError):
    """``secret.key`` is missing, malformed or open to other users."""


# --- A value ---------------------------------------------------------------------------------------------------------


class EncryptionError(KravnCryptoError):
    """A value cannot be encrypted."""


class UnstorableValueError(EncryptionError):
    """A value would not come back equal, so it is not stored.

    :ivar path: where in the value the trouble is, such as ``$.a[3].b``.
    :ivar type_name: the name of the Python type found there.
    """

    def __init__(self, message: str = "", *, path: str = "$", type_name: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.type_name = type_name

    def for_column(self, name: str) -> UnstorableValueError:
        """Return the same error with the name of the column that the value was for."""
        return UnstorableValueError(f"{name}: {self}", path=self.path, type_name=self.type_name)


class LeaseExpiredError(EncryptionError):
    """This process has not been able to see for too long which data key is primary, so it encrypts nothing."""


class DecryptionError(KravnCryptoError):
    """A stored value cannot be decrypted."""


class MalformedCiphertextError(DecryptionError):
    """The stored value is not a frame: plaintext, truncated, or of another program."""


class UnsupportedAlgorithmError(DecryptionError):
    """The frame names an algorithm that this release does not know."""


class UnknownKeyError(DecryptionError):
    """The frame names a data key that the keyring does not hold.

    :ivar key_id: the key id in the frame, 16 lower-case hexadecimal characters.
    """

    def __init__(self, message: str = "", *, key_id: str = "") -> None:
        super().__init__(message)
        self.key_id = key_id


class WrongColumnError(DecryptionError):
    """The value was written for a column of another name."""


class DisabledKeyError(UnknownKeyError):
    """The value's data key is disabled: it is kept, and loaded by nobody until it is enabled again."""


class DestroyedKeyError(UnknownKeyError):
    """The value's data key was destroyed, so the value is lost for good."""


class AuthenticationError(DecryptionError):
    """The value is not what was written: altered, or moved from where it was written."""


class MalformedPayloadError(DecryptionError):
    """The value decrypts, but its payload is of another kind than the column's type writes."""


# --- The KMS ---------------------------------------------------------------------------------------------------------


class ProviderError(KravnCryptoError):
    """The KMS did not do what was asked.

    :ivar provider: the provider's name, such as ``vault``.
    """

    def __init__(self, message: str = "", *, provider: str = "") -> None:
        super().__init__(message)
        self.provider = provider


class ProviderUnavailableError(ProviderError):
    """The KMS could not be reached, did not answer in time, or answered that it cannot serve now."""


class ProviderSealedError(ProviderUnavailableError):
    """The KMS answers, but is sealed or not initialised."""


class ProviderDeniedError(ProviderError):
    """The KMS refused the credentials, or they lack the right that was needed."""


class CredentialExpiredError(ProviderDeniedError):
    """What was to be logged in with, or the login itself, is no longer valid: it has expired or was revoked."""


class CredentialError(ProviderError):
    """What is to be logged in with cannot be had: its file cannot be read, or it is malformed."""


class MasterKeyNotFoundError(ProviderError):
    """The KMS has no such master key, or no such mount, namespace or vault."""


class MasterKeyUnusableError(ProviderError):
    """The master key, or the version of it that wrapped the data key, may no longer be used."""


class UnwrapRefusedError(ProviderError):
    """The KMS refused to unwrap: the wrapped key is not under this master key, or was bound to something else."""


class ProviderResponseError(ProviderError):
    """The KMS answered with what its protocol does not allow: a redirect, too much, or the wrong shape."""


# --- The key store ---------------------------------------------------------------------------------------------------


class KeyStoreError(KravnCryptoError):
    """The rows of ``kms_keys`` do not allow the process to start."""


class TableMissingError(KeyStoreError):
    """The database has no ``kms_keys`` table."""


class UnsupportedDatabaseError(KeyStoreError):
    """The database is one whose row locks this release does not know."""


class KeyStoreLockedError(KeyStoreError):
    """Another process has held the lock on the key store for longer than the bound on the wait."""


class NotProvisionedError(KeyStoreError):
    """The key store holds no data key yet, and this process may not or cannot make one."""


class ExistingDataError(KeyStoreError):
    """The key store is empty, but an encrypted column already holds values under a key that is not there."""


class MalformedRowError(KeyStoreError):
    """A row of a table of this library, which the message names, is not one that this library writes."""


class RowAuthenticationError(KeyStoreError):
    """A row of ``kms_keys`` was written by somebody who does not hold the MAC key."""


class UnpinnedKeyError(KeyStoreError):
    """``KRAVN_KMS_PINNED_KEYS`` does not name a data key that the key store holds.

    :ivar key_id: the key id that is not pinned.
    """

    def __init__(self, message: str = "", *, key_id: str = "") -> None:
        super().__init__(message)
        self.key_id = key_id


class WrongKeyError(KeyStoreError):
    """The KMS returned 32 bytes that are not the data key that was wrapped.

    :ivar key_id: the key id of the data key that was expected.
    """

    def __init__(self, message: str = "", *, key_id: str = "") -> None:
        super().__init__(message)
        self.key_id = key_id


class BootstrapKeyError(KeyStoreError):
    """The bootstrap key is another than the one on record, or is missing."""


class ProviderMismatchError(KeyStoreError):
    """The data keys are wrapped by another provider or master key than the settings name."""


class DeploymentMismatchError(KeyStoreError):
    """The key store belongs to another deployment than the settings name."""


class KeyStoreRolledBackError(KeyStoreError):
    """The key store is older than this process has seen it: it was restored from a backup, or tampered with."""


class AuditTrailError(KeyStoreError):
    """The audit trail is broken: an event was altered, left out or added."""


# --- The life of a key -----------------------------------------------------------------------------------------------


class LifecycleError(KravnCryptoError):
    """A command on the key store refuses; nothing was changed."""


class WrongStateError(LifecycleError):
    """The data key is not in a state in which this can be done, or there is no such data key."""


class ReplicasBehindError(LifecycleError):
    """A live process does not yet, or still, hold the data key.

    :ivar replicas: the processes, each as host and process id.
    """

    def __init__(self, message: str = "", *, replicas: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.replicas = replicas


class KeyInUseError(LifecycleError):
    """There are values under the data key, or it is not certain that there are none."""


class TooEarlyError(LifecycleError):
    """A time that must have passed has not.

    :ivar seconds: how long it is still to wait, in seconds.
    """

    def __init__(self, message: str = "", *, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class ChangedMeanwhileError(LifecycleError):
    """Another process changed the key store between what was read and what was to be written."""


class NotConfirmedError(LifecycleError):
    """What cannot be undone was not confirmed, or no reason was given for it."""


class StandbyError(LifecycleError):
    """There is a standby KMS where none may be, or none where one is needed."""


# --- The stored values ----------------------------------------------------------------------------------------------


class RekeyError(KravnCryptoError):
    """Stored values cannot be counted or re-encrypted."""


class ColumnUnreachableError(RekeyError):
    """A column that holds encrypted values, or did, is not there, may not be read, or cannot be walked through."""


class OutdatedKeyringError(RekeyError):
    """The primary of the keyring is not the data key that the values are to be under."""
