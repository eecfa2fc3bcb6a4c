"""One replica of the race: configures on a signal, writes a row, and reads everybody's on another."""

import json
import os
import sys
from typing import Any

from sqlalchemy import create_engine, make_url, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, configure
from sqlalchemy_kravn_crypto.context import current_keyring


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(url: str) -> None:
    arguments: dict[str, Any] = {"application_name": f"replica-{os.getpid()}"}
    if make_url(url).get_backend_name() == "sqlite":
        arguments = {"timeout": 60}
    engine = create_engine(url, connect_args=arguments)
    say("ready")
    sys.stdin.readline()
    configure(engine)
    with Session(engine) as session:
        session.add(Note(id=os.getpid(), content={"from": os.getpid()}))
        session.commit()
    say(current_keyring().primary_key_id)
    sys.stdin.readline()
    with Session(engine) as session:
        notes = session.scalars(select(Note)).all()
        say(json.dumps(sorted(note.content["from"] for note in notes if note.content["from"] == note.id)))


if __name__ == "__main__":
    main(sys.argv[1])
