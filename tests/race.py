"""Twelve processes that start at once, as a test sees them: told to go, listened to, found by what they hold."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, text

from tests.openbao import OpenBao
from tests.processes import forked, wait_until

REPLICAS: Final = 12
PATIENCE: Final = 120.0
"""Seconds that twelve starts may take on a machine that does other things as well."""

SECRET: Final = "twelve replicas share this one secret"

_WORKER: Final = Path(__file__).with_name("race_worker.py")

# Who waits for the lock is active. Who has only read, or said how long it will wait, has no transaction id.
_HOLDERS: Final = text(
    "SELECT application_name FROM pg_stat_activity WHERE datname = current_database() "
    "AND application_name LIKE 'replica-%' AND state = 'idle in transaction' AND backend_xid IS NOT NULL"
)


class Replica:
    """One process of the race."""

    def __init__(self, connection: socket.socket) -> None:
        self._channel = connection.makefile("rw")
        self.pid = int(self.answer())

    def go(self) -> None:
        self._channel.write("go\n")
        self._channel.flush()

    def answer(self) -> str:
        return self._channel.readline().strip()

    def close(self) -> None:
        self._channel.close()


@contextmanager
def replicas(url: str, variables: dict[str, str], directory: Path) -> Iterator[list[Replica]]:
    """Start the processes, and end them all."""
    with ExitStack() as stack:
        channels = stack.enter_context(forked(_WORKER, [url], REPLICAS, variables, directory))
        started = [Replica(channel) for channel in channels]
        for replica in started:
            stack.callback(replica.close)
        yield started


def outcome(survivors: list[Replica], engine: Engine) -> None:
    """See that all agree on one key and read what all of them wrote."""
    key_ids = {replica.answer() for replica in survivors}
    assert len(key_ids) == 1
    assert "" not in key_ids
    pids = sorted(replica.pid for replica in survivors)
    for replica in survivors:
        replica.go()
    assert [json.loads(replica.answer()) for replica in survivors] == [pids] * len(pids)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM kms_keys WHERE state = 'primary'")) == 1


def vault(openbao: OpenBao, address: str, master_key: str) -> dict[str, str]:
    """Return the settings, by their names without the prefix, for a KMS at an address."""
    return {
        "SECRET": SECRET,
        "KMS_PROVIDER": "vault",
        "KMS_VAULT_ADDR": address,
        "KMS_VAULT_TOKEN": openbao.issue_token(master_key),
        "KMS_VAULT_KEY": master_key,
        "KMS_TIMEOUT": "60",
    }


def lock_holder(engine: Engine) -> int:
    """Return the process id of who holds the lock on PostgreSQL, while nothing is provisioned yet and it does nothing.

    It is sure to be found only while something keeps it waiting, such as its KMS.
    """
    found: list[str] = []

    def is_there() -> bool:
        with engine.connect() as connection:
            found[:] = connection.scalars(_HOLDERS).all()
        return bool(found)

    wait_until(is_there, PATIENCE)
    (name,) = found
    return int(name.partition("-")[2])
