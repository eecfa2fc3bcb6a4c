"""Encrypted SQLAlchemy columns whose data key is wrapped by your own key manager."""

from typing import TYPE_CHECKING, Any

from . import exceptions
from .boot import configure, configure_async, reset
from .ciphertext_checks import add_ciphertext_checks
from .context import is_configured, use_keyring
from .exceptions import KravnCryptoError
from .keyring import DataKey, Keyring
from .schema import kms_tables
from .signing import SigningKey, signing_key
from .types import Encrypted, EncryptedBytes, EncryptedJSON, EncryptedString

if TYPE_CHECKING:
    from .mutable import MutableJSON

__version__ = "0.1.0"

__all__ = [
    "DataKey",
    "Encrypted",
    "EncryptedBytes",
    "EncryptedJSON",
    "EncryptedString",
    "Keyring",
    "KravnCryptoError",
    "MutableJSON",
    "SigningKey",
    "add_ciphertext_checks",
    "configure",
    "configure_async",
    "exceptions",
    "is_configured",
    "kms_tables",
    "reset",
    "signing_key",
    "use_keyring",
]


def __getattr__(name: str) -> Any:
    """Import what needs SQLAlchemy's ORM when it is asked for, since Core does without."""
    if name != "MutableJSON":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .mutable import MutableJSON  # noqa: PLC0415 - as above

    return MutableJSON
