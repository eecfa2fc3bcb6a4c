"""Processes that re-encrypt, each of which is killed right after one of its statements.

Run as a program with the database's URL; the key store is that of the environment. It imports once, and forks a process
for each line: the number of the statement after which that one kills itself. It answers with ``killed``, or with what
the process did if it came to its end before.

Every process is in the way of others: when it is about to replace the first value that it has read, and the second,
somebody else changes all that :data:`CHANGED` names for that, under the key that is given there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, Final

from sqlalchemy import Engine, LargeBinary, NullPool, create_engine, event, select, type_coerce, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_kravn_crypto import EncryptedBytes, Keyring
from sqlalchemy_kravn_crypto.ciphertext import ColumnName
from sqlalchemy_kravn_crypto.configuration import operator as operator_of
from sqlalchemy_kravn_crypto.lifecycle import Targets, rekey_values
from sqlalchemy_kravn_crypto.providers import vault
from sqlalchemy_kravn_crypto.settings import Settings

IMPORTED_BEFORE_THE_FORK = (vault,)

NAME: Final = ColumnName("mortal_note.content")
CHANGED: Final = {1: (1, "retired"), 2: (2, "primary")}


class Base(DeclarativeBase):
    pass


class Note(Base):
    """What is encrypted is beside it in the clear, and both are changed in one statement."""

    __tablename__ = "mortal_note"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    clear: Mapped[bytes | None]
    content: Mapped[bytes | None] = mapped_column(EncryptedBytes)
