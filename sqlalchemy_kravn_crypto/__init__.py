"""Encrypted SQLAlchemy columns whose data key is wrapped by your own key manager."""

from . import exceptions
from .boot import configure, configure_async, reset
from .context import is_configured, use_keyring
from .exceptions import KravnCryptoError
from .keyring import DataKey, Keyring
from .schema import kms_tables
from .types import Encrypted, EncryptedBytes, EncryptedJSON, EncryptedString

__version__ = "0.1.0"

__all__ = [
    "DataKey",
    "Encrypted",
    "EncryptedBytes",
    "EncryptedJSON",
    "EncryptedString",
    "Keyring",
    "KravnCryptoError",
    "configure",
    "configure_async",
    "exceptions",
    "is_configured",
    "kms_tables",
    "reset",
    "use_keyring",
]
