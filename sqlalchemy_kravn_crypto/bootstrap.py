"""The keys that need no KMS: the bootstrap key and the MAC key of the key store, from one secret of this deployment.

The secret is ``KRAVN_SECRET`` or, without one, the file ``secret.key`` in the data directory.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from .derivation import KEY_SIZE, expand
from .exceptions import SecretFileError
from .secrecy import KeepsSecret

logger = logging.getLogger(__name__)

MIN_SECRET_LENGTH: Final = 16
"""A shorter ``KRAVN_SECRET``, in characters, is refused."""

STRONG_SECRET_LENGTH: Final = 32
"""A shorter ``KRAVN_SECRET``, in characters, is warned of."""

PBKDF2_ITERATIONS: Final = 600_000
"""OWASP's figure for PBKDF2-HMAC-SHA256. The key id and key check in the table let whoever reads it test guesses
offline."""

SECRET_FILE_NAME: Final = "secret.key"  # noqa: S105 - a name

_SALT: Final = b"sqlalchemy-kravn-crypto/bootstrap/v1"
_SECRET_FILE_SIZE: Final = 2 * KEY_SIZE
_MAX_FILE_SIZE: Final = 4096  # bytes that are looked at: more than the content, so that what follows it shows


@dataclass(frozen=True, slots=True)
class BootstrapSecret(KeepsSecret):
    """What a deployment's own secret gives.

    :ivar source: ``secret`` or ``file``, as it is recorded in the key store.
    :ivar data_key: the bootstrap key, 32 bytes.
    :ivar mac_key: the key of the row MACs, 32 bytes.
    """

    source: str
    data_key: bytes = field(repr=False)
    mac_key: bytes = field(repr=False)

    @classmethod
    def _from_root(cls, source: str, root: bytes) -> BootstrapSecret:
        return cls(source, expand(root, "bootstrap"), expand(root, "row-mac"))

    @classmethod
    def from_secret(cls, secret: str) -> BootstrapSecret:
        """Stretch ``KRAVN_SECRET``; takes about 0.2 s on purpose."""
        kdf = PBKDF2HMAC(algorithm=SHA256(), length=KEY_SIZE, salt=_SALT, iterations=PBKDF2_ITERATIONS)
        return cls._from_root("secret", kdf.derive(secret.encode()))

    @classmethod
    def from_file(cls, path: Path) -> BootstrapSecret | None:
        """Read ``secret.key``, or return ``None`` where there is none.

        :raises SecretFileError: if it cannot be read, other users can, or it is not 64 hexadecimal characters.
        """
        root = _read(path)
        return None if root is None else cls._from_root("file", root)

    @classmethod
    def create_file(cls, path: Path) -> BootstrapSecret:
        """Create ``secret.key`` unless another process does at the same moment, and read it.

        :raises SecretFileError: if it cannot be created or read.
        """
        _create(path)
        created = cls.from_file(path)
        if created is None:
            raise SecretFileError(f"{path} vanished right after it was created. Put it back and start again.")
        return created


@dataclass(slots=True)
class BootstrapSecrets(KeepsSecret):
    """All secrets of a deployment that a process has, and what they give.

    :ivar current: ``KRAVN_SECRET`` or ``secret.key``; verifies rows of the key store and decrypts.
    :ivar next: ``KRAVN_SECRET_NEXT``, during a change of the secret; verifies and decrypts, too.
    :ivar retired: ``KRAVN_SECRET_RETIRED``, and ``secret.key`` where it is no longer the current one; decrypt only.
    """

    current: BootstrapSecret | None
    next: BootstrapSecret | None = None
    retired: tuple[BootstrapSecret, ...] = ()

    @classmethod
    def gather(
        cls,
        secret: str | None,
        path: Path,
        *,
        next_secret: str | None = None,
        retired: Sequence[str] = (),
        with_file: bool = False,
    ) -> BootstrapSecrets:
        """Stretch what is set, 0.2 s each, and read ``secret.key`` where it is needed.

        :param with_file: whether ``secret.key`` is needed although there is a secret.
        :raises SecretFileError: if it is there and cannot be used.
        """
        file = BootstrapSecret.from_file(path) if secret is None or with_file else None
        stretched = tuple(map(BootstrapSecret.from_secret, retired))
        return cls(
            current=file if secret is None else BootstrapSecret.from_secret(secret),
            next=None if next_secret is None else BootstrapSecret.from_secret(next_secret),
            retired=stretched if secret is None or file is None else (*stretched, file),
        )

    @property
    def verifying(self) -> tuple[BootstrapSecret, ...]:
        """The secrets whose MAC keys may have authenticated a row."""
        return tuple(secret for secret in (self.current, self.next) if secret is not None)

    @property
    def all(self) -> tuple[BootstrapSecret, ...]:
        """The secrets whose bootstrap keys decrypt."""
        return (*self.verifying, *self.retired)


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_FILE_SIZE).strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror
    else:
        reason = None
    if reason is not None:
        raise SecretFileError(
            f"{path} cannot be read: {reason}. The process needs it; give its user the right to read it."
        )
    # Windows has no such permission bits; there the directory's access list is what protects the file.
    if os.name == "posix" and stat.S_IMODE(mode) & 0o007:
        raise SecretFileError(f"{path} is open to every user of this machine. Run: chmod 600 {path}")
    root = _from_hex(content)
    if root is None:
        raise SecretFileError(
            f"{path} must hold {_SECRET_FILE_SIZE} hexadecimal characters and nothing else. Restore it from a backup; "
            "a new one cannot open what the old one encrypted."
        )
    return root


def _from_hex(content: bytes) -> bytes | None:
    try:
        root = bytes.fromhex(content.decode("ascii"))
    except ValueError:
        return None
    return root if len(root) == KEY_SIZE and len(content) == _SECRET_FILE_SIZE else None


def _create(path: Path) -> None:
    """Write the file under another name and link it: of the processes that race for it, one wins, with all of it."""
    temporary = path.with_name(f".{SECRET_FILE_NAME}.{os.getpid()}.{secrets.token_hex(4)}")
    reason = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_hex(KEY_SIZE).encode("ascii") + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
            _sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError:
        return
    except OSError as error:
        reason = error.strerror
    else:
        logger.warning("created %s; back it up: without it, what is encrypted under it is lost", path)
    if reason is not None:
        raise SecretFileError(
            f"{path} cannot be created: {reason}. Set KRAVN_SECRET, or let KRAVN_DATA_DIR be a directory that this "
            "process can write and that outlives it."
        )


def _sync_directory(directory: Path) -> None:
    """Make a new name in a directory outlast a power failure; Windows cannot open a directory, and needs not."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
