"""A process that re-encrypts the column of tests/rekeying.py, says so after every batch, and waits to be told to go on.

Run as a program with the database's URL and the size of a batch; it says the number of values that it has replaced.
"""

import sys

from sqlalchemy import create_engine

from sqlalchemy_kravn_crypto.ledger import Counts, Shard
from sqlalchemy_kravn_crypto.rekey import rekey
from tests.rekeying import NEW, known_column


def main(url: str, batch_size: int) -> None:
    """Re-encrypt."""
    replaced = 0

    def say(_shard: Shard, counts: Counts) -> None:
        nonlocal replaced
        replaced += counts.rekeyed
        print(replaced, flush=True)  # noqa: T201 - to the test
        sys.stdin.readline()

    rekey(create_engine(url), NEW, [known_column()], shards=3, batch_size=batch_size, on_progress=say)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
