"""Replicas that are killed, frozen and late, while keys are made, replaced and taken away.

16. Twelve processes provision at once, and whoever holds the lock is killed while it asks the KMS, one after the other:
    one key, which all that are left agree on, and a wrap for each that was killed at most.
"""

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Final

import pytest
from sqlalchemy import Engine, NullPool, create_engine

from sqlalchemy_kravn_crypto.events import read_events
from sqlalchemy_kravn_crypto.keystore import KeyStore
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.rows import connect, read_rows
from tests.hostile.gate import PLACES, Gate
from tests.openbao import OpenBao
from tests.race import PATIENCE, SECRET, lock_holder, outcome, replicas, vault
from tests.race_worker import Base as RaceBase

ASKED_UNDER_THE_LOCK: Final = 3
"""How often the KMS is asked by who makes the key: to wrap, to unwrap, and to unwrap under a wrong binding."""


# --- 16 --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(openbao: OpenBao) -> Iterator[Gate]:
    made = Gate(openbao.address)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(20), ids=lambda seed: f"seed-{seed}")
def test_16_whoever_holds_the_lock_is_killed_while_it_asks_the_kms_and_the_rest_agree_on_one_key(
    postgres_url: str, openbao: OpenBao, gate: Gate, tmp_path: Path, seed: int
) -> None:
    random = Random(seed)
    is_adopted = random.random() < 0.5
    kills = [(random.randrange(ASKED_UNDER_THE_LOCK), random.choice(PLACES)) for _ in range(random.randint(1, 6))]
    print(f"adopted: {is_adopted}, kills: {kills}")  # noqa: T201 - pytest shows it with a failure
    key = f"race-{uuid.uuid4().hex[:12]}"
    openbao.create_key(key)
    engine: Engine = create_engine(postgres_url, poolclass=NullPool)
    migrate(engine)
    RaceBase.metadata.create_all(engine)
    if is_adopted:  # then the row that is the lock is there already
        KeyStore(provider=None, secret=SECRET, secret_file=tmp_path / "secret.key").open(engine)
    killed = set[int]()
    with replicas(postgres_url, vault(openbao, gate.address, key), tmp_path) as started:
        for number, kill in enumerate(kills):
            gate.hold(*kill)
            if number == 0:
                for replica in started:
                    replica.go()
            else:
                os.kill(holder, signal.SIGKILL)  # noqa: F821
            assert gate.is_holding.wait(PATIENCE)
            holder = lock_holder(engine)
            assert holder not in killed
            killed.add(holder)
        os.kill(holder, signal.SIGKILL)
        outcome([replica for replica in started if replica.pid not in killed], engine)
    assert len(killed) == len(kills)
    unheard = kills.count((0, "asked"))
    assert openbao.count(f"transit/encrypt/{key}") == 1 + len(kills) - unheard
    with connect(engine) as connection:
        rows = read_rows(connection)
        assert [(row.provider, row.state.value) for row in rows.keys] == [("none", "retired"), ("vault", "primary")]
        trail = read_events(connection, rows.in_control().events_hash)
    assert [event.action for event in trail] == (["provision", "adopt"] if is_adopted else ["provision"])
    engine.dispose()
