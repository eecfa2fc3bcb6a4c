"""Re-encrypting on a Dask cluster: one task for each shard of the plan.

pip install distributed; python examples/rekey_with_dask.py tcp://scheduler:8786

This process and the workers have the application's settings: DATABASE_URL, KRAVN_SECRET, KRAVN_KMS_PROVIDER and so on.
A worker that dies leaves its shard where it was; the task goes on from there somewhere else, a minute later.
"""

import os
import sys
from typing import Any

from dask.distributed import Client, WorkerPlugin, get_worker
from sqlalchemy import Engine, create_engine

from sqlalchemy_kravn_crypto import configure
from sqlalchemy_kravn_crypto.known_columns import known
from sqlalchemy_kravn_crypto.ledger import Shard
from sqlalchemy_kravn_crypto.rekey import ShardResult, plan, rekey, rekey_shard


def configured_engine() -> Engine:
    engine = create_engine(os.environ["DATABASE_URL"])
    configure(engine)
    return engine


class Configured(WorkerPlugin):
    """Gives each worker process its keys, straight from the KMS: no task carries any."""

    name = "kravn-crypto"

    def setup(self, worker: Any) -> None:  # noqa: ARG002, D102
        self.engine = configured_engine()


def move(shard: Shard) -> ShardResult:
    worker: Any = get_worker()
    return rekey_shard(worker.plugins["kravn-crypto"].engine, None, shard)


def main(address: str | None = None) -> int:
    engine = configured_engine()
    with engine.connect() as connection:
        columns = known(connection)
    client: Any = Client(address)  # type: ignore[no-untyped-call] # without an address, a cluster of this machine's own
    with client:
        client.register_plugin(Configured())
        shards = plan(engine, columns, shards=64)
        for done in client.gather(client.map(move, shards, pure=False, retries=2)):
            print(f"{done.shard.column.label} {done.shard.number}: {done.counts.rekeyed} values moved")
    result = rekey(engine, None, columns)  # what others wrote meanwhile, and the count of all values
    for value in result.unreadable:
        print(f"{value.column} {value.key}: {value.error}")
    print(f"left: {result.left or 'nothing'}")
    return 0 if result.is_complete else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
