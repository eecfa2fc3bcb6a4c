"""Twelve processes start on an empty key table at once; one of them may be killed while it holds the lock."""

import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, NullPool, create_engine, text

from sqlalchemy_kravn_crypto.keystore import KeyStore
from sqlalchemy_kravn_crypto.migrate import migrate
from tests.openbao import OpenBao
from tests.race_worker import Base
from tests.tcp_proxy import TCPProxy

REPLICAS = 12
WORKER = Path(__file__).with_name("race_worker.py")
SECRET = "twelve replicas share this one secret"


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
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KRAVN_")}
    environment |= {f"KRAVN_{name}": value for name, value in variables.items()}
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(REPLICAS)]
        theirs = [stack.enter_context(pair[1]) for pair in pairs]
        ours = [stack.enter_context(pair[0]) for pair in pairs]
        descriptors = [channel.fileno() for channel in theirs]
        program = subprocess.Popen(
            [sys.executable, str(WORKER), url, *map(str, descriptors)],
            pass_fds=descriptors,
            env=environment,
            cwd=directory,
            start_new_session=True,
        )
        stack.callback(program.wait)
        stack.callback(os.killpg, program.pid, signal.SIGKILL)
        for channel in theirs:
            channel.close()
        started = [Replica(channel) for channel in ours]
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


def lock_holder(engine: Engine, proxy: TCPProxy, after: int) -> int:
    """Wait until a process holds the lock while the KMS keeps it waiting, and return its process id."""
    holders = text(
        "SELECT application_name FROM pg_stat_activity "
        "WHERE state = 'idle in transaction' AND application_name LIKE 'replica-%'"
    )
    for _ in range(6000):
        with engine.connect() as connection:
            found = connection.scalars(holders).all()
        if found and proxy.connections > after:
            return int(str(found[0]).partition("-")[2])
    raise TimeoutError


@pytest.fixture
def master_key(openbao: OpenBao) -> str:
    key = f"race-{uuid.uuid4().hex[:12]}"
    openbao.create_key(key)
    return key


def vault(openbao: OpenBao, address: str, master_key: str) -> dict[str, str]:
    return {
        "SECRET": SECRET,
        "KMS_PROVIDER": "vault",
        "KMS_VAULT_ADDR": address,
        "KMS_VAULT_TOKEN": openbao.issue_token(master_key),
        "KMS_VAULT_KEY": master_key,
        "KMS_TIMEOUT": "60",
    }


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url, poolclass=NullPool)
    migrate(made)
    Base.metadata.create_all(made)
    yield made
    made.dispose()


def test_twelve_processes_wrap_one_key_once(engine: Engine, openbao: OpenBao, master_key: str, tmp_path: Path) -> None:
    url = engine.url.render_as_string(hide_password=False)
    with replicas(url, vault(openbao, openbao.address, master_key), tmp_path) as started:
        for replica in started:
            replica.go()
        outcome(started, engine)
    assert openbao.count(f"transit/encrypt/{master_key}") == 1


def test_twelve_processes_adopt_a_kms_with_one_wrap(
    engine: Engine, openbao: OpenBao, master_key: str, tmp_path: Path
) -> None:
    """Here the control row is there already, so that not even inserting it keeps them apart."""
    KeyStore(provider=None, secret=SECRET, secret_file=tmp_path / "secret.key").open(engine)
    url = engine.url.render_as_string(hide_password=False)
    with replicas(url, vault(openbao, openbao.address, master_key), tmp_path) as started:
        for replica in started:
            replica.go()
        outcome(started, engine)
    assert openbao.count(f"transit/encrypt/{master_key}") == 1


# The KMS is asked three times under the lock: wrap, unwrap, and unwrap under a wrong binding.
@pytest.mark.parametrize("asked_before", [0, 1, 2])
def test_killing_the_holder_of_the_lock_costs_one_more_wrap_at_most(
    postgres_url: str, openbao: OpenBao, master_key: str, tmp_path: Path, asked_before: int
) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    migrate(engine)
    Base.metadata.create_all(engine)
    proxy = TCPProxy(openbao.address, hold_from=asked_before)
    try:
        with replicas(postgres_url, vault(openbao, proxy.address, master_key), tmp_path) as started:
            for replica in started:
                replica.go()
            killed = lock_holder(engine, proxy, asked_before)
            os.kill(killed, signal.SIGKILL)
            proxy.release()
            outcome([replica for replica in started if replica.pid != killed], engine)
    finally:
        proxy.close()
    assert 1 <= openbao.count(f"transit/encrypt/{master_key}") <= 2


def test_twelve_processes_without_a_secret_make_one_file_and_one_key(engine: Engine, tmp_path: Path) -> None:
    url = engine.url.render_as_string(hide_password=False)
    with replicas(url, {}, tmp_path) as started:
        for replica in started:
            replica.go()
        outcome(started, engine)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["secret.key"]
