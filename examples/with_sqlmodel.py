"""SQLModel.

pip install sqlmodel
KRAVN_SECRET=$(openssl rand -hex 32) python examples/with_sqlmodel.py
"""

import os
from typing import Any

from sqlalchemy import text
from sqlmodel import Field, Session, SQLModel, create_engine

from sqlalchemy_kravn_crypto import EncryptedJSON, configure, kms_tables


class Plugin(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str
    # Without repr=False, printing a Plugin shows the plaintext; without exclude=True, so do model_dump() and whatever
    # is built on it, such as a FastAPI response. Ask for the attribute where it is meant to be shown.
    credentials: dict[str, Any] = Field(sa_type=EncryptedJSON, repr=False, exclude=True)


kms_tables(SQLModel.metadata)


def main() -> None:
    engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///example.db"))
    SQLModel.metadata.create_all(engine)  # or migrations; `kravn-crypto migrate` makes the key tables
    configure(engine)
    with Session(engine) as session:
        plugin = Plugin(name="weather", credentials={"token": "s3cr3t"})
        session.add(plugin)
        session.commit()
        print("The program loads:", plugin.credentials)
        print("Its repr:", plugin)
        print("Its dump:", plugin.model_dump())
        print("The database holds:", session.scalar(text("SELECT credentials FROM plugin")))
    engine.dispose()


if __name__ == "__main__":
    main()
