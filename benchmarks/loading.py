"""Run in a process of its own: load all rows of a table, and print by how many bytes the process grew at its peak."""

import sys
from collections.abc import Sequence
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from sqlalchemy_kravn_crypto import configure

from .databases import store_of
from .processes import peak


def main(name: str, way: str, url: str) -> None:
    """Load one row, so that everything is imported and compiled, and then all of them."""
    engine = create_engine(url)
    configure(engine)
    store = store_of(name, engine)

    def load(count: int | None) -> Sequence[Any]:
        if way == "Core":
            with engine.connect() as connection:
                return connection.execute(select(store.table).limit(count)).all()
        with Session(engine) as session:
            return session.scalars(select(store.model).limit(count)).all()

    load(1)
    before = peak()
    loaded = load(None)
    sys.stdout.write(f"{peak() - before}\n")
    del loaded


if __name__ == "__main__":
    main(*sys.argv[1:])
