"""Twelve processes start on an empty key table at once; one of them may be killed while it holds the lock."""

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, NullPool, create_engine

from sqlalchemy_kravn_crypto.keystore import KeyStore
from sqlalchemy_kravn_crypto.migrate import migrate
from tests.openbao import OpenBao
from tests.processes import wait_until
from tests.race import PATIENCE, SECRET, lock_holder, outcome, replicas, vault
from tests.race_worker import Base
from tests.tcp_proxy import TCPProxy


@pytest.fixture
def master_key(openbao: OpenBao) -> str:
    key = f"race-{uuid.uuid4().hex[:12]}"
    openbao.create_key(key)
    return key


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
            wait_until(lambda: proxy.connections > asked_before, PATIENCE)
            killed = lock_holder(engine)
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
