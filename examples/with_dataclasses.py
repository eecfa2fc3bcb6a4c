"""Models that are dataclasses.

KRAVN_SECRET=$(openssl rand -hex 32) python examples/with_dataclasses.py
"""

import os
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, MutableJSON, configure, kms_tables


class Base(MappedAsDataclass, DeclarativeBase):
    pass


class Plugin(Base):
    __tablename__ = "plugin"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    name: Mapped[str]
    # A dataclass prints its fields, and with it logs and error trackers do: repr=False leaves the plaintext out.
    credentials: Mapped[dict[str, Any]] = mapped_column(
        MutableJSON.as_mutable(EncryptedJSON), repr=False, default_factory=dict
    )


kms_tables(Base.metadata)


def main() -> None:
    engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///example.db"))
    Base.metadata.create_all(engine)  # or migrations; `kravn-crypto migrate` makes the key tables
    configure(engine)
    with Session(engine) as session:
        plugin = Plugin(name="weather", credentials={"token": "s3cr3t"})
        session.add(plugin)
        session.commit()
        plugin.credentials["scopes"] = ["read"]  # in place; MutableJSON notices
        session.commit()
        print("The program loads:", plugin.credentials)
        print("Its repr:", plugin)
        print("The database holds:", session.scalar(text("SELECT credentials FROM plugin")))
    engine.dispose()


if __name__ == "__main__":
    main()
