"""Run in a process of its own: the seconds of what ``configure`` takes, in three parts.

These are stretching ``KRAVN_SECRET``, if there is one; importing pydantic; and ``configure`` itself after that. The
package is imported, a model declared, and the database has been connected to: what a program does
anyway.
"""

import os
import sys
from importlib import import_module
from time import perf_counter
from typing import Final

from sqlalchemy import Column, Integer, MetaData, Table, create_engine, text

from sqlalchemy_kravn_crypto import EncryptedJSON, configure
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret

_PYDANTIC: Final = (("pydantic", ("Field", "SecretStr", "field_validator")), ("pydantic_settings", ("BaseSettings",)))


def main(url: str) -> None:
    """Do all of it and print how long each took."""
    metadata = MetaData()
    Table("plugin", metadata, Column("id", Integer, primary_key=True), Column("credentials", EncryptedJSON))
    engine = create_engine(url)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    secret = os.environ.get("KRAVN_SECRET")
    began = perf_counter()
    if secret is not None:
        BootstrapSecret.from_secret(secret)
    stretched = perf_counter()
    # These names are looked up when they are asked for, and their modules imported then.
    for module, names in _PYDANTIC:
        for name in names:
            getattr(import_module(module), name)
    imported = perf_counter()
    configure(engine)
    sys.stdout.write(f"{stretched - began} {imported - stretched} {perf_counter() - imported}\n")


if __name__ == "__main__":
    main(sys.argv[1])
