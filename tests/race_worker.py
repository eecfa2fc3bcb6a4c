"""The replicas of the race: processes that configure on a signal, write a row, and read everybody's on another.

Run as a program with the database's URL and the descriptors of one socket for each replica. It imports once and forks,
so that what takes time is the race.
"""

import json
import os
import signal
import socket
import sys
from typing import Any

from sqlalchemy import create_engine, make_url, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, configure
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.providers import vault
from sqlalchemy_kravn_crypto.settings import Settings

IMPORTED_BEFORE_THE_FORK = (vault, Settings)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


def race(url: str, channel: Any) -> None:
    """Be one replica; a line on the channel is a signal, a line back is what was found."""
    arguments: dict[str, Any] = {"application_name": f"replica-{os.getpid()}"}
    if make_url(url).get_backend_name() == "sqlite":
        arguments = {"timeout": 60}
    engine = create_engine(url, connect_args=arguments)

    def say(line: str) -> None:
        channel.write(f"{line}\n")
        channel.flush()

    say(str(os.getpid()))
    channel.readline()
    configure(engine)
    with Session(engine) as session:
        session.add(Note(id=os.getpid(), content={"from": os.getpid()}))
        session.commit()
    say(current_keyring().primary_key_id)
    channel.readline()
    with Session(engine) as session:
        notes = session.scalars(select(Note)).all()
        say(json.dumps(sorted(note.content["from"] for note in notes if note.content["from"] == note.id)))


def main(url: str, descriptors: list[int]) -> None:
    """Fork one replica for each socket and wait for all."""
    for number, descriptor in enumerate(descriptors):
        if os.fork() == 0:
            for others in descriptors[number + 1 :]:
                os.close(others)  # or a replica that ends would not be seen to
            with socket.socket(fileno=descriptor) as connection, connection.makefile("rw") as channel:
                race(url, channel)
            sys.exit()
        os.close(descriptor)
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], [int(argument) for argument in sys.argv[2:]])
