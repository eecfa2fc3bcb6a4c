"""The main job in one screen: an encrypted column on an embedded SQLite, with no KMS."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Connection, Engine, create_engine, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from .boot import configure, reset
from .exceptions import DecryptionError
from .migrate import migrate
from .settings import Provider, Settings
from .status import status
from .types import EncryptedJSON

_CREDENTIALS = {"user": "reporting", "token": "s3cr3t-t0k3n", "scopes": ["read", "export"]}


class _Base(DeclarativeBase):
    pass


class _Plugin(_Base):
    __tablename__ = "plugin"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)
    settings: Mapped[dict[str, Any] | None] = mapped_column(EncryptedJSON)


def run(say: Callable[[str], None]) -> None:
    """Run the demonstration in a temporary directory and leave nothing behind.

    :param say: takes each line to show.
    :raises AlreadyConfiguredError: if the process is already configured.
    """
    with TemporaryDirectory() as directory:
        secret = SecretStr(secrets.token_hex(32))
        settings = Settings(kms_provider=Provider.NONE, secret=secret, data_dir=Path(directory), deployment_id=None)
        engine = create_engine(f"sqlite:///{directory}/demo.db")
        try:
            migrate(engine)
            configure(engine, settings)
            _show(engine, settings, say)
        finally:
            reset()
            engine.dispose()


def _show(engine: Engine, settings: Settings, say: Callable[[str], None]) -> None:
    _Base.metadata.create_all(engine)
    (key,) = status(engine, settings).keys
    say(f"The key store holds data key {key.key_id}, {key.state}, of provider {key.provider}.")

    with Session(engine) as session:
        session.add(_Plugin(id=1, name="reports", credentials=_CREDENTIALS))
        session.commit()
    say("")
    say("A program wrote a row. The database holds:")
    with engine.connect() as connection:
        name, stored = connection.execute(text("SELECT name, credentials FROM plugin")).one()
    say(f"  name        {name}")
    say(f"  credentials {stored.hex()}")
    say("The program loads:")
    with Session(engine) as session:
        say(f"  credentials {session.scalars(select(_Plugin.credentials)).one()}")

    say("")
    tampered = bytes([*stored[:-1], stored[-1] ^ 1])
    _tamper(engine, lambda connection: _update(connection, "UPDATE plugin SET credentials = :value", tampered))
    say("One bit of the value is flipped in the database:")
    say(f"  {_failure(engine, _Plugin.credentials)}")
    _tamper(engine, lambda connection: _update(connection, "UPDATE plugin SET settings = :value", stored))
    say("The value is copied into another column:")
    say(f"  {_failure(engine, _Plugin.settings)}")


def _tamper(engine: Engine, change: Callable[[Connection], None]) -> None:
    with engine.begin() as connection:
        change(connection)


def _update(connection: Connection, statement: str, value: bytes) -> None:
    connection.execute(text(statement), {"value": value})


def _failure(engine: Engine, column: Any) -> str:
    message = ""
    with Session(engine) as session:
        try:
            session.scalars(select(column)).one()
        except DecryptionError as error:
            message = f"{type(error).__name__}: {error}"
    if not message:
        msg = "the database was tampered with, and the value loaded all the same"
        raise AssertionError(msg)
    return message
