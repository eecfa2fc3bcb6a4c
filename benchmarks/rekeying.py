"""Run in a process of its own: re-encrypt all that is stale for each line of input, and print how that went.

That is how many values were replaced, and how many bytes of memory the process has had at its peak.
"""

import sys

from sqlalchemy import create_engine

from sqlalchemy_kravn_crypto import configure
from sqlalchemy_kravn_crypto.known_columns import declared
from sqlalchemy_kravn_crypto.rekey import rekey

from .databases import OURS, store_of
from .processes import peak


def main(url: str, rows_per_second: float | None) -> None:
    """Configure the process, and do as it is told."""
    engine = create_engine(url)
    configure(engine)
    columns = declared(store_of(OURS, engine).table.metadata)
    print(flush=True)  # noqa: T201 - to who started this process
    for _ in sys.stdin:
        result = rekey(engine, None, columns, max_rows_per_second=rows_per_second)
        if not result.is_complete:
            msg = f"values are left: {result.left}"
            raise AssertionError(msg)
        print(result.counts.rekeyed, peak(), flush=True)  # noqa: T201 - as above


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else None)
