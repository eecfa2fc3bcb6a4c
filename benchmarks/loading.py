"""Run in a process of its own: load all rows of a table, and print by how many bytes the process grew at its peak."""

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from sqlalchemy_kravn_crypto import configure

from .databases import store_of

_STATUS: Final = Path("/proc/self/status")


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
    before = _peak()
    loaded = load(None)
    sys.stdout.write(f"{_peak() - before}\n")
    del loaded


def _peak() -> int:
    """Return the largest resident set that this process has had, in bytes."""
    # On Linux, what getrusage() tells begins with the peak of the process that started this one.
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
