"""A fleet of processes serves through the whole life of data keys, while some are killed and frozen."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Final

import pytest
from sqlalchemy import Engine, LargeBinary, NullPool, create_engine, insert, select, type_coerce
from sqlalchemy.orm import Session

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.changes import Operator
from sqlalchemy_kravn_crypto.ciphertext import parse
from sqlalchemy_kravn_crypto.configuration import operator as operator_of
from sqlalchemy_kravn_crypto.context import use_keyring
from sqlalchemy_kravn_crypto.keyring import Keyring
from sqlalchemy_kravn_crypto.known_columns import recorded
from sqlalchemy_kravn_crypto.lifecycle import Targets, destroy, disable, enable, promote, rotate
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.rekey import rekey
from sqlalchemy_kravn_crypto.replicas import live_replicas, read_replicas
from sqlalchemy_kravn_crypto.settings import Settings
from tests.fleet import Fleet, Strikes, fleet, until
from tests.fleet_worker import ROWS, Base, Tally, check
from tests.openbao import OpenBao

pytestmark = pytest.mark.xdist_group("fleet")

SEED_VARIABLE: Final = "TEST_FLEET_SEED"
LEASE: Final = 1.0
STEPS: Final = ("rotate", "promote", "rekey", "disable", "destroy")
SECRET = "a whole fleet of processes shares this one secret"


@pytest.fixture
def seed() -> int:
    """Give what the random moments come from, and say it where the test fails."""
    given = int(os.environ.get(SEED_VARIABLE) or secrets.randbelow(1_000_000))
    print(f"{SEED_VARIABLE}={given}")  # noqa: T201 - pytest shows it with a failure
    return given


@pytest.fixture
def engine(postgres_url: str) -> Iterator[Engine]:
    made = create_engine(postgres_url, poolclass=NullPool)
    migrate(made)
    Base.metadata.create_all(made)
    yield made
    made.dispose()


def variables(openbao: OpenBao, master_key: str, fence: str) -> dict[str, str]:
    return {
        "LOOK_INTERVAL": "0.5",
        "LEASE": str(LEASE),
        "FENCE": fence,
        "DESTROY_AFTER_DAYS": "0",
        "KMS_PROVIDER": "vault",
        "KMS_VAULT_ADDR": openbao.address,
        "KMS_VAULT_TOKEN": openbao.issue_token(master_key),
        "KMS_VAULT_KEY": master_key,
    }


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


class Life:
    """The life of one data key after the other, while a fleet serves.

    :param engine: the operator's.
    :param given: the settings, by their names without the prefix.
    """

    def __init__(self, engine: Engine, given: dict[str, str], random: Random) -> None:
        self.engine = engine
        self.is_fenced = given["FENCE"] == "transaction"
        self._random = random
        # Bounds the wait for the lock, too, which a frozen process of a fenced fleet keeps.
        settings = Settings(**{name.lower(): value for name, value in given.items()}, kms_timeout=2)
        self.operator: Operator = operator_of(engine, settings)
        self.after_days = settings.destroy_after_days
        self.keyring = self.operator.store.open(engine).keyring
        self.brought_back = 0
        self.destroyed: list[str] = []

    def fill(self) -> None:
        """Write the rows that the fleet works on."""
        with use_keyring(self.keyring), self.engine.begin() as connection:
            rows = [{"id": row, "version": 0, "content": {"row": row, "by": {}}} for row in range(ROWS)]
            connection.execute(insert(Tally), rows)

    def load(self) -> Keyring:
        """Take in the keys as a process that starts now."""
        self.keyring = self.operator.store.open(self.engine).keyring
        return self.keyring

    def strikes(self, serving: Fleet, *, replaces: bool, for_long: bool, steps: tuple[str, ...] = STEPS) -> Strikes:
        made = Strikes(serving, self._random, steps, LEASE, replaces=replaces, for_long=for_long)
        print(made.plan)  # noqa: T201 - pytest shows it with a failure
        return made

    # --- The steps ---------------------------------------------------------------------------------------------------

    def promote_new(self, strikes: Strikes) -> str:
        """Make a new data key the primary, and return which one was it before."""
        before = self.keyring.primary_key_id
        strikes.begin("rotate")
        made = rotate(self.operator)
        assert made is not None
        held = self.load()
        primary = held.data_key(made.required("key_id"))
        assert primary is not None
        strikes.begin("promote")
        self._insist(lambda: promote(self.operator), strikes, errors.ReplicasBehindError, errors.KeyStoreLockedError)
        if self.is_fenced:
            self._fences(before)
        self.keyring = Keyring(primary, filter(None, map(held.data_key, held.key_ids)))
        return before

    def rekey(self, strikes: Strikes) -> None:
        """Move every value to the primary."""

        def is_complete() -> bool:
            with self.engine.connect() as connection:
                columns = recorded(connection)
            result = rekey(self.engine, self.keyring, columns, shards=4, batch_size=7)
            assert not result.unreadable
            if not result.is_complete:
                strikes.let_go()  # who is frozen may have rows locked
            return result.is_complete

        until(is_complete, "everything is rekeyed")

    def retire(self, key_id: str, strikes: Strikes, serving: Fleet) -> None:
        """Rekey what is under a data key, disable it, and destroy it when nothing is under it."""
        strikes.begin("rekey")
        self.rekey(strikes)
        strikes.begin("disable")
        self._disable(key_id, strikes)
        strikes.begin("destroy")
        if not self.is_fenced:
            strikes.join()
            serving.wait_for_everyone(1)  # whatever was in the middle of something has ended it
            self._bring_back(key_id, strikes)
        destroy(self.operator, key_id, reason="its time is over", backups_expired=True, after_days=self.after_days)
        self.destroyed.append(key_id)
        strikes.join()

    def _fences(self, key_id: str) -> None:
        """See that none writes under a retired data key, though not all processes know yet that it is retired."""
        values = self._frames_under(key_id)

        def do_all_know() -> bool:
            assert self._frames_under(key_id) <= values
            with self.engine.connect() as connection:
                return not any(replica.primary_key_id == key_id for replica in live_replicas(connection))

        until(do_all_know, "everyone encrypts under the primary")

    def _frames_under(self, key_id: str) -> set[bytes]:
        with self.engine.connect() as connection:
            frames = connection.scalars(select(type_coerce(Tally.content, LargeBinary))).all()
        return {frame for frame in frames if parse(frame).key_id.hex() == key_id}

    def _disable(self, key_id: str, strikes: Strikes) -> None:
        def rekey_and_disable() -> None:
            if self.is_fenced:
                assert self.values_under(key_id) == 0
            else:
                self.rekey(strikes)  # what was written until the leases were over
            disable(self.operator, key_id)

        self._insist(rekey_and_disable, strikes, errors.KeyInUseError, errors.ReplicasBehindError)

    def _bring_back(self, key_id: str, strikes: Strikes) -> None:
        """Move what came under a disabled data key after all, which cannot be excluded without a fence."""
        found = self.values_under(key_id)
        if found:
            self.brought_back += found
            enable(self.operator, key_id)
            self.load()
            self._disable(key_id, strikes)

    @staticmethod
    def _insist(action: Callable[[], object], strikes: Strikes, *refusals: type[Exception]) -> None:
        """Do something that may be refused while processes are behind or frozen."""

        def is_done() -> bool:
            try:
                action()
            except refusals as refusal:
                if not isinstance(refusal, errors.ReplicasBehindError):
                    print(f"{type(refusal).__name__}: {refusal}")  # noqa: T201 - as above
                    strikes.let_go()
                return False
            return True

        until(is_done, "it is not refused any more")

    def wait_for_holders(self, serving: Fleet) -> None:
        """Wait until every process holds the primary, also one that was taken for dead in a long transaction."""
        pids = {member.pid for member in serving.working}

        def do_all_hold_it() -> bool:
            with self.engine.connect() as connection:
                replicas = read_replicas(connection)
            return pids <= {
                replica.process_id for replica in replicas if self.keyring.primary_key_id in replica.key_ids
            }

        until(do_all_hold_it, "all hold the primary")

    # --- What is there -----------------------------------------------------------------------------------------------

    def values_under(self, key_id: str) -> int:
        """Count the values under a data key."""
        with self.engine.connect() as connection:
            return Targets(Base.metadata).count(connection).of_key(key_id)

    def verify(self, serving: Fleet) -> None:
        """See that every value is readable, under the primary, and holds what the processes say that they committed."""
        with use_keyring(self.keyring), Session(self.engine) as session:
            tallies = session.scalars(select(Tally).order_by(Tally.id)).all()
        assert [tally.id for tally in tallies] == list(range(ROWS))
        for tally in tallies:
            check(tally.id, tally.version, tally.content)
            said, found = serving.changes(tally.id), tally.content["by"]
            assert set(found) <= set(said)
            for number, (least, most) in said.items():
                assert least <= found.get(number, 0) <= most, f"row {tally.id}, worker {number}"
        assert [self.values_under(key_id) for key_id in self.destroyed] == [0] * len(self.destroyed)
        assert self.values_under(self.keyring.primary_key_id) == ROWS


def ended(serving: Fleet, life: Life) -> None:
    """End the fleet and see that nothing failed in it, nor was lost."""
    failed = serving.stop()
    assert failed == [], "\n".join(failed)
    life.verify(serving)
    lines = [member.line for member in serving.members]
    assert all(member.line.transactions for member in serving.working)
    assert life.brought_back or not any(line.under_disabled for line in lines)
    if life.is_fenced:
        assert life.brought_back == 0
    with life.engine.connect() as connection:
        left = {replica.process_id for replica in read_replicas(connection)}
    assert left <= {member.pid for member in serving.members if member.is_killed}


@pytest.fixture(params=["lease", "transaction"])
def fence(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def test_nothing_fails_and_nothing_is_lost_while_keys_come_and_go(
    engine: Engine, openbao: OpenBao, tmp_path: Path, seed: int, fence: str
) -> None:
    master_key = f"fleet-{uuid.uuid4().hex[:12]}"
    openbao.create_key(master_key)
    given = variables(openbao, master_key, fence)
    life = Life(engine, given, Random(seed))
    life.fill()
    with fleet(url_of(engine), given, tmp_path, seed) as serving:
        serving.wait_for_everyone(1)
        for for_long in (False, True):
            strikes = life.strikes(serving, replaces=True, for_long=for_long)
            life.retire(life.promote_new(strikes), strikes, serving)
        serving.wait_for_everyone(1)
        life.load()
        ended(serving, life)


def test_a_fleet_serves_and_keys_are_retired_while_the_kms_is_down_but_none_is_made(
    engine: Engine, tmp_path: Path, seed: int, fence: str
) -> None:
    openbao = OpenBao()
    try:
        # Else the key that authenticates the rows is wrapped, too, and no command does without the KMS.
        given = variables(openbao, openbao.key, fence) | {"SECRET": SECRET}
        life = Life(engine, given, Random(seed))
        life.fill()
        with fleet(url_of(engine), given, tmp_path, seed) as serving:
            serving.wait_for_everyone(1)
            strikes = life.strikes(serving, replaces=False, for_long=False, steps=("rekey", "disable", "destroy"))
            before = life.promote_new(strikes)
            life.wait_for_holders(serving)
            openbao.stop()
            with pytest.raises(errors.ProviderUnavailableError):
                rotate(life.operator)
            life.retire(before, strikes, serving)
            with pytest.raises(errors.ProviderUnavailableError):
                rotate(life.operator)
            serving.wait_for_everyone(1)
            ended(serving, life)
    finally:
        openbao.stop()
