"""Every runbook of docs/key-lifecycle.md, walked with the commands that stand there, in their order, to their end.

The processes are real ones, on PostgreSQL, and the KMS is OpenBao.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, select, text
from sqlalchemy.engine import URL
from typer.testing import CliRunner, Result

from sqlalchemy_kravn_crypto.cli import app
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.rows import connect, read_rows
from sqlalchemy_kravn_crypto.schema import TABLES, State
from tests.openbao import OpenBao
from tests.postgres import fresh_database
from tests.program import Base, Program, RefusedError, key_ids

PAGE = Path(__file__).parents[1] / "docs" / "key-lifecycle.md"
SECRET = "correct horse battery staple, and forty more characters"
NEXT_SECRET = "incorrect donkey battery staple, and forty more characters"
PATIENCE = 60.0  # seconds that something may take which is certain to come
MODELS = "tests.program:Base"
FAST = {"KRAVN_LOOK_INTERVAL": "0.05", "KRAVN_LEASE": "60"}
IMPATIENT = {"KRAVN_LEASE": "2"}
"""Where a lease is waited for; elsewhere, nobody is to be taken for dead on a slow machine."""


def section(title: str) -> str:
    """Return what stands under a heading of the second level."""
    found = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, title
    return found


def blocks(title: str, language: str) -> str:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", section(title), flags=re.MULTILINE | re.DOTALL)
    return "".join(found)


class Deployment:
    """One database, what its processes are configured with, and the operator's shell, which has the same."""

    def __init__(self, url: str, stack: ExitStack, environment: dict[str, str]) -> None:
        self.url = url
        self.environment = FAST | environment
        self._stack = stack
        self.engine: Engine = create_engine(url)
        stack.callback(self.engine.dispose)
        migrate(self.engine)
        Base.metadata.create_all(self.engine)

    def start(self, **changes: str) -> Program:
        program = Program(self.url, self.environment | changes)
        self._stack.callback(program.stop)
        return program

    def refuses_to_start(self, error: str, **changes: str) -> None:
        with pytest.raises(RefusedError) as caught:
            self.start(**changes)
        assert caught.value.error == error, caught.value

    def run(self, *words: str, refused: str = "", **changes: str) -> Result:
        """Give a command in the operator's shell.

        :param refused: what it must say that it refuses with; else it must be done.
        """
        shell: dict[str, str | None] = {name: None for name in os.environ if name.startswith("KRAVN_")}
        shell |= self.environment | changes | {"DATABASE_URL": self.url}
        result = CliRunner().invoke(app, list(words), env=shell)
        assert result.exit_code == (1 if refused else 0), (words, result.output, result.exception)
        assert refused in result.output, (words, result.output)
        return result

    def states(self) -> dict[str, State]:
        with connect(self.engine) as connection:
            return {row.required("key_id"): row.state for row in read_rows(connection).keys}

    def in_state(self, state: State) -> str:
        return next(key_id for key_id, found in self.states().items() if found is state)

    def bootstrap_key(self) -> str:
        with connect(self.engine) as connection:
            return next(row.required("key_id") for row in read_rows(connection).keys if row.provider == "none")

    def master_keys(self) -> set[str | None]:
        """Return the master keys of the live data keys that a KMS wraps."""
        with connect(self.engine) as connection:
            rows = read_rows(connection).keys
        return {row.master_key for row in rows if row.wrapped_key is not None}

    def standbys(self) -> set[str | None]:
        with connect(self.engine) as connection:
            return {row.standby_master_key for row in read_rows(connection).keys if row.wrapped_key is not None}

    def keys_of_values(self) -> set[str]:
        return set(key_ids(self.url).values())

    def execute(self, *statements: str) -> None:
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))


class Walk:
    """The commands of a runbook, one after the other; at the end all must have been given."""

    def __init__(self, deployment: Deployment, title: str) -> None:
        self._deployment = deployment
        lines = [line.strip() for line in blocks(title, "sh").splitlines()]
        self._left = [line.removeprefix("kravn-crypto ") for line in lines if line.startswith("kravn-crypto ")]
        self.key_id = ""
        """What KEY_ID stands for."""

    def _next(self, command: str) -> list[str]:
        line = self._left[0]
        assert line.startswith(command), line
        words = shlex.split(line, comments=True)
        words = words[: words.index(">")] if ">" in words else words
        places = {"KEY_ID": self.key_id, "yourapp.models:Base": MODELS}
        return [places.get(word, word) for word in words]

    def run(self, command: str, **options: Any) -> Result:
        """Give the next command, which must be this one; if it is refused, it is still the next."""
        result = self._deployment.run(*self._next(command), **options)
        if not options.get("refused"):
            self._left.pop(0)
        return result

    def run_until(self, command: str, done: Callable[[Result], bool], between: Callable[[], object]) -> None:
        """Give the next command until what it prints is as it must be."""
        words = self._next(command)

        def is_done() -> bool:
            between()
            return done(self._deployment.run(*words))

        until(is_done)
        self._left.pop(0)

    def leave_out(self, command: str) -> None:
        """Pass over the next command, which must be this one: the runbook says that it is for others."""
        self._next(command)
        self._left.pop(0)

    def end(self) -> None:
        assert self._left == []


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_refused(action: Callable[[], Any], error: str) -> bool:
    try:
        action()
    except RefusedError as refusal:
        return refusal.error == error
    return False


class KMS:
    """A master key of the test's own on an OpenBao server, and a token for it."""

    def __init__(self, server: OpenBao, *, mount: str = "transit") -> None:
        self.server = server
        self.mount = mount
        self.key = f"kravn-{secrets.token_hex(4)}"
        server.create_key(self.key, mount=mount)
        self.token = server.issue_token(self.key, mount=mount)

    def settings(self, prefix: str = "KRAVN_") -> dict[str, str]:
        return {
            f"{prefix}KMS_PROVIDER": "vault",
            f"{prefix}KMS_VAULT_ADDR": self.server.address,
            f"{prefix}KMS_VAULT_TOKEN": self.token,
            f"{prefix}KMS_VAULT_KEY": self.key,
            f"{prefix}KMS_VAULT_MOUNT": self.mount,
        }

    def master_key(self, version: int = 1) -> str:
        return f"{self.mount}/{self.key}:v{version}"


STANDBY = "KRAVN_STANDBY_"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def kms(openbao: OpenBao) -> KMS:
    return KMS(openbao)


@pytest.fixture
def deployment(postgres_url: str, kms: KMS, stack: ExitStack) -> Deployment:
    """Give a deployment that has a KMS, and has served."""
    made = Deployment(postgres_url, stack, {"KRAVN_SECRET": SECRET} | kms.settings())
    with_values(made)
    return made


@pytest.fixture
def without_kms(postgres_url: str, stack: ExitStack) -> Deployment:
    """Give a deployment in mode none, that has served."""
    made = Deployment(postgres_url, stack, {"KRAVN_SECRET": SECRET})
    with_values(made)
    return made


def with_values(deployment: Deployment) -> None:
    program = deployment.start()
    program.put(1)
    program.put(2)
    program.stop()


def content(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """Return what a backup holds."""
    tables = [*TABLES, *Base.metadata.tables.values()]
    with engine.connect() as connection:
        return {
            one.name: [dict(row) for row in connection.execute(text(f"SELECT * FROM {one.name}")).mappings()]  # noqa: S608
            for one in tables
        }


def restore(engine: Engine, backup: dict[str, list[dict[str, Any]]]) -> None:
    """Bring tables back to what they held."""
    with engine.begin() as connection:
        for name, rows in backup.items():
            connection.execute(text(f"DELETE FROM {name}"))  # noqa: S608
            for row in rows:
                places = ", ".join(f":{column}" for column in row)
                connection.execute(text(f"INSERT INTO {name} ({', '.join(row)}) VALUES ({places})"), row)  # noqa: S608


# --- The planned rotation -------------------------------------------------------------------------------------------


def test_the_planned_rotation(deployment: Deployment) -> None:
    deployment.environment |= IMPATIENT
    one, two = deployment.start(), deployment.start()
    one.look()
    two.look()
    walk = Walk(deployment, "Runbook: the planned rotation")
    walk.key_id = deployment.in_state(State.PRIMARY)
    assert "problem" not in walk.run("status").output
    assert "is pending" in walk.run("rotate").output

    def looks() -> None:
        one.look()
        two.look()

    walk.run_until("status", lambda shown: "held by every live process" in shown.output, looks)
    new = deployment.in_state(State.PENDING)
    assert f"Data key {new} is primary" in walk.run("promote").output
    until(lambda: one.primary() == two.primary() == new)
    one.put(3)
    assert "2 values were moved" in walk.run("rekey").output
    counted = walk.run("census").output
    assert new in counted
    assert walk.key_id not in counted
    walk.run("disable")
    shown = deployment.run("status", "--json")
    [disabled] = [key for key in json.loads(shown.stdout)["keys"] if key["key_id"] == walk.key_id]
    assert disabled["state"] == "disabled"
    assert disabled["destroyable_at"]
    walk.run("destroy", refused="may be destroyed from")
    walk.run("destroy", KRAVN_DESTROY_AFTER_DAYS="0")
    found = json.loads(walk.run("evidence").stdout)
    assert (found["state"], found["has_wrapped_key"]) == ("destroyed", False)
    walk.end()
    two.change(1)
    assert one.numbers() == two.numbers() == [-1, 2, 3]
    until(lambda: walk.key_id not in one.held())


def test_the_planned_rotation_waits_for_the_living_alone(deployment: Deployment) -> None:
    killed, other = deployment.start(), deployment.start()
    killed.look()
    other.look()
    deployment.run("rotate")
    until(lambda: deployment.in_state(State.PENDING) in other.held())
    refusal = deployment.run("promote", refused="is not yet held by").output
    assert f"process {killed.process_id} " in refusal
    assert f"process {other.process_id} " not in refusal
    killed.kill()
    deployment.run("promote", refused="is not yet held by")
    deployment.execute("UPDATE kms_replicas SET seen_at = seen_at - interval '1 hour'")
    other.look()
    assert "held by every live process" in deployment.run("status").output
    deployment.run("promote")


def test_promotion_by_time_where_no_heartbeat_can_be_left(deployment: Deployment) -> None:
    reader = deployment.start(READ_ONLY="1")
    assert reader.numbers() == [1, 2]
    deployment.run("rotate")
    walk = Walk(deployment, "How the fleet follows")
    walk.run("promote", refused="has been pending for")
    deployment.execute("UPDATE kms_keys SET created_at = created_at - interval '11 minutes'")
    walk.run("promote")
    walk.end()
    writer = deployment.start()
    writer.put(3)
    assert key_ids(deployment.url)[3] == deployment.in_state(State.PRIMARY)
    assert reader.numbers() == [1, 2, 3]
    with connect(deployment.engine) as connection:
        beating = connection.scalars(select(TABLES.replicas.c.process_id)).all()
    assert beating == [writer.process_id]


# --- What has leaked ------------------------------------------------------------------------------------------------


def test_the_leaked_data_key(deployment: Deployment) -> None:
    deployment.environment |= IMPATIENT
    program = deployment.start()
    program.look()
    walk = Walk(deployment, "Runbook: the leaked data key")
    walk.key_id = deployment.in_state(State.PRIMARY)
    walk.run("rotate")
    until(lambda: deployment.in_state(State.PENDING) in program.held())
    walk.run("promote")
    until(lambda: program.primary() != walk.key_id)
    walk.run("rekey")
    assert walk.key_id not in deployment.keys_of_values()
    walk.run("disable")
    walk.run("destroy")
    walk.end()
    assert "destroyed" in next(line for line in deployment.run("status").output.splitlines() if walk.key_id in line)
    assert program.numbers() == [1, 2]


def test_the_leaked_kms_token(deployment: Deployment, kms: KMS, openbao: OpenBao) -> None:
    program = deployment.start()
    leaked = kms.token
    openbao.revoke(leaked)
    program.put(3)
    assert program.numbers() == [1, 2, 3]
    deployment.refuses_to_start("CredentialExpiredError")
    deployment.run("rotate", refused="Error: ")
    kms.token = openbao.issue_token(kms.key)
    deployment.environment |= kms.settings()
    assert deployment.start().numbers() == [1, 2, 3]

    walk = Walk(deployment, "Runbook: the leaked KMS token")
    openbao.rotate(kms.key)
    output = walk.run("rewrap").output
    assert kms.master_key(1) in output
    assert kms.master_key(2) in output
    openbao.set_min_decryption_version(2, kms.key)
    walk.end()
    shown = deployment.run("status").output
    assert kms.master_key(2) in shown
    assert kms.master_key(1) not in shown
    assert deployment.master_keys() == {kms.master_key(2)}
    assert deployment.start().numbers() == [1, 2, 3]
    until(lambda: program.primary() == deployment.in_state(State.PRIMARY))
    program.put(4)
    assert "problem" not in program.log()


def test_the_leaked_secret_with_a_kms(deployment: Deployment) -> None:
    program = deployment.start()
    program.look()
    walk = Walk(deployment, "Runbook: the leaked KRAVN_SECRET")
    walk.key_id = deployment.bootstrap_key()
    both = {"KRAVN_SECRET_NEXT": NEXT_SECRET}
    walk.run("rotate-secret", refused="is not yet set for", **both)
    deployment.environment |= IMPATIENT
    replaced = deployment.start(**both)
    program.stop()
    replaced.look()
    walk.run("rotate-secret", **both)
    walk.run("promote", refused="No data key is pending", **both)
    walk.leave_out("promote")
    after(walk, deployment, both, replaced, without="RowAuthenticationError")


def test_the_leaked_secret_without_a_kms(without_kms: Deployment) -> None:
    without_kms.environment |= IMPATIENT
    walk = Walk(without_kms, "Runbook: the leaked KRAVN_SECRET")
    walk.key_id = without_kms.bootstrap_key()
    both = {"KRAVN_SECRET_NEXT": NEXT_SECRET}
    program = without_kms.start(**both)
    program.look()
    walk.run("rotate-secret", **both)
    until(lambda: without_kms.in_state(State.PENDING) in program.held())
    walk.run("promote", **both)
    until(lambda: program.primary() != walk.key_id)
    program.put(3)
    program.change(3)
    after(walk, without_kms, both, program, without="BootstrapKeyError")


def after(walk: Walk, deployment: Deployment, both: dict[str, str], program: Program, *, without: str) -> None:
    """Take away what is under a leaked secret."""
    deployment.refuses_to_start(without)
    deployment.refuses_to_start("BootstrapKeyError", KRAVN_SECRET=NEXT_SECRET)
    values = program.numbers()
    assert deployment.start(KRAVN_SECRET=NEXT_SECRET, KRAVN_SECRET_RETIRED=SECRET).numbers() == values
    walk.run("rekey", **both)
    assert walk.key_id not in deployment.keys_of_values()
    walk.run("disable", **both)
    walk.run("destroy", **both)
    walk.end()
    deployment.environment["KRAVN_SECRET"] = NEXT_SECRET
    assert "problem" not in deployment.run("status").output
    assert deployment.states()[walk.key_id] is State.DESTROYED
    new = deployment.start()
    new.put(9)
    assert program.numbers() == [*values, 9]


# --- The KMS --------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_server(stack: ExitStack) -> OpenBao:
    server = OpenBao()
    stack.callback(server.stop)
    return server


def test_the_lost_kms_with_a_standby(postgres_url: str, stack: ExitStack, other_server: OpenBao, kms: KMS) -> None:
    deployment = Deployment(postgres_url, stack, {"KRAVN_SECRET": SECRET} | KMS(other_server).settings())
    with_values(deployment)
    deployment.run("standby", "add", **kms.settings(STANDBY))
    program = deployment.start()
    program.look()
    other_server.stop()
    program.put(3)
    assert program.numbers() == [1, 2, 3]
    deployment.refuses_to_start("ProviderUnavailableError")
    deployment.run("rotate", refused="Error: ", **kms.settings(STANDBY))
    walk = Walk(deployment, "Runbook: the lost KMS")
    walk.run("standby switch --lost", refused="in the first place already")
    deployment.environment |= kms.settings()
    replaced = deployment.start()
    assert replaced.numbers() == program.numbers() == [1, 2, 3]
    walk.run("standby switch --lost")
    assert (deployment.master_keys(), deployment.standbys()) == ({kms.master_key()}, {None})
    program.stop()
    walk.end()
    deployment.run("rotate")
    until(lambda: deployment.in_state(State.PENDING) in replaced.held())
    deployment.run("promote")
    replaced.put(4)
    assert deployment.start().numbers() == [1, 2, 3, 4]
    assert "problem" not in deployment.run("status").output


def test_the_lost_kms_without_a_standby_keeps_what_runs_serving(
    postgres_url: str, stack: ExitStack, other_server: OpenBao
) -> None:
    deployment = Deployment(postgres_url, stack, {"KRAVN_SECRET": SECRET} | KMS(other_server).settings())
    with_values(deployment)
    program = deployment.start(**IMPATIENT)
    other_server.seal()
    deployment.refuses_to_start("ProviderSealedError")
    deployment.run("rotate", refused="Error: ")
    deployment.run("rewrap", refused="Error: ")
    started = time.monotonic()
    until(lambda: program.numbers() == [1, 2] and time.monotonic() > started + float(IMPATIENT["KRAVN_LEASE"]))
    program.put(3)
    assert program.numbers() == [1, 2, 3]
    other_server.unseal()
    assert deployment.start().numbers() == [1, 2, 3]
    deployment.run("rotate")


def test_the_move_to_another_kms(deployment: Deployment, kms: KMS, openbao: OpenBao) -> None:
    mount = f"transit-{secrets.token_hex(4)}"
    openbao.mount(mount)
    target = KMS(openbao, mount=mount)
    old = deployment.start(**IMPATIENT)
    walk = Walk(deployment, "Runbook: the move to another KMS")
    deployment.refuses_to_start("ProviderMismatchError", **target.settings())
    walk.run("standby add", **target.settings(STANDBY))
    assert deployment.standbys() == {target.master_key()}
    deployment.run("rotate", refused="would have none")
    walk.run("standby switch", refused="in the first place already", **target.settings(STANDBY))
    deployment.run("standby", "remove", "--dry-run")

    new = deployment.start(**target.settings())
    new.put(3)
    assert old.numbers() == new.numbers() == [1, 2, 3]
    assert deployment.start().numbers() == [1, 2, 3], "the rollback"

    before = dict(deployment.environment)
    deployment.environment |= target.settings()
    deployment.run("standby", "remove", refused="which the settings name as the KMS")
    walk.run("standby switch", **kms.settings(STANDBY))
    assert (deployment.master_keys(), deployment.standbys()) == ({target.master_key()}, {kms.master_key()})
    back = deployment.start(**kms.settings())
    assert back.numbers() == [1, 2, 3], "the rollback after the switch"
    old.put(4)
    new.change(4)
    back.stop()

    walk.run("standby remove")
    walk.end()
    assert (deployment.master_keys(), deployment.standbys()) == ({target.master_key()}, {None})
    late = itertools.count(100)  # what it still writes until its lease is over
    until(lambda: is_refused(lambda: old.put(next(late)), "LeaseExpiredError"))
    assert old.numbers()[:4] == [-4, 1, 2, 3]
    assert "Data key" in old.log()
    deployment.refuses_to_start("ProviderMismatchError", **before)
    new.change(1)
    assert deployment.start().numbers()[:4] == [-4, -1, 2, 3]
    openbao.revoke(kms.token)
    assert "problem" not in deployment.run("status").output


# --- The database ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fence", ["lease", "transaction"])
def test_the_restored_backup_of_the_whole_database(deployment: Deployment, fence: str) -> None:
    deployment.environment["KRAVN_FENCE"] = fence
    first = deployment.in_state(State.PRIMARY)
    backup = content(deployment.engine)
    program = deployment.start()
    program.look()
    rotated(deployment, program)
    program.put(3)
    deployment.run("rekey", "--metadata", MODELS)
    before = deployment.in_state(State.PRIMARY)

    restore(deployment.engine, backup)
    assert deployment.in_state(State.PRIMARY) == first
    until(lambda: program.numbers() == [1, 2] and "went back from epoch" in program.log())
    with pytest.raises(RefusedError) as caught:
        program.put(4)
    assert caught.value.error == "LeaseExpiredError"
    assert before not in deployment.keys_of_values()
    program.stop()

    restarted = deployment.start()
    restarted.put(3)
    assert restarted.numbers() == [1, 2, 3]
    assert "problem" not in deployment.run("status").output
    rotated(deployment, restarted)
    restarted.put(4)
    assert restarted.numbers() == [1, 2, 3, 4]


def rotated(deployment: Deployment, program: Program) -> None:
    """Bring in a new data key, and have the program encrypt under it."""
    deployment.run("rotate")
    new = deployment.in_state(State.PENDING)
    until(lambda: new in program.held())
    deployment.run("promote")
    until(lambda: program.primary() == new)


def test_the_restored_backup_from_before_a_new_secret(without_kms: Deployment) -> None:
    backup = content(without_kms.engine)
    both = {"KRAVN_SECRET_NEXT": NEXT_SECRET}
    without_kms.run("rotate-secret", **both)
    without_kms.run("promote", **both)
    without_kms.run("rekey", "--metadata", MODELS, **both)
    restore(without_kms.engine, backup)
    without_kms.refuses_to_start("BootstrapKeyError", KRAVN_SECRET=NEXT_SECRET)
    assert without_kms.start(**both).numbers() == [1, 2]
    without_kms.run("rotate-secret", **both)
    assert without_kms.start(KRAVN_SECRET=NEXT_SECRET, KRAVN_SECRET_RETIRED=SECRET).numbers() == [1, 2]


def test_the_restored_backup_from_before_a_rewrap(deployment: Deployment, kms: KMS, openbao: OpenBao) -> None:
    backup = content(deployment.engine)
    openbao.rotate(kms.key)
    deployment.run("rewrap")
    openbao.set_min_decryption_version(2, kms.key)
    restore(deployment.engine, backup)
    deployment.refuses_to_start("MasterKeyUnusableError")
    openbao.set_min_decryption_version(1, kms.key)
    deployment.run("rewrap")
    openbao.set_min_decryption_version(2, kms.key)
    assert deployment.start().numbers() == [1, 2]


def test_the_restored_backup_of_one_table(deployment: Deployment) -> None:
    deployment.environment |= IMPATIENT
    backup = content(deployment.engine)
    program = deployment.start()
    program.look()
    walk = Walk(deployment, "Runbook: the restored backup")
    walk.key_id = deployment.in_state(State.PRIMARY)
    rotated(deployment, program)
    deployment.run("rekey", "--metadata", MODELS)
    deployment.run("disable", walk.key_id, "--metadata", MODELS)
    until(lambda: walk.key_id not in program.held())

    restore(deployment.engine, {"plugin": backup["plugin"]})
    with pytest.raises(RefusedError) as caught:
        program.numbers()
    assert caught.value.error == "DisabledKeyError"
    line = next(line for line in walk.run("census").output.splitlines() if walk.key_id in line)
    assert "disabled" in line
    walk.run("enable")
    until(lambda: walk.key_id in program.held())
    assert program.numbers() == [1, 2]
    assert "2 values were moved" in walk.run("rekey").output
    walk.run("disable")
    walk.end()
    until(lambda: walk.key_id not in program.held())
    assert program.numbers() == [1, 2]


def test_the_lost_key_tables(deployment: Deployment) -> None:
    backup = content(deployment.engine)
    deployment.execute("DELETE FROM kms_keys", "DELETE FROM kms_events")
    deployment.refuses_to_start("ExistingDataError")
    restore(deployment.engine, {name: backup[name] for name in ("kms_keys", "kms_events")})
    assert deployment.start().numbers() == [1, 2]


@pytest.fixture
def clone(deployment: Deployment, postgres_server: URL, stack: ExitStack) -> Deployment:
    """Give a copy of the deployment's database, and the same settings."""
    url = stack.enter_context(fresh_database(postgres_server)).render_as_string(hide_password=False)
    made = Deployment(url, stack, deployment.environment)
    restore(made.engine, content(deployment.engine))
    return made


def deployment_id(deployment: Deployment) -> str:
    found: str = json.loads(deployment.run("status", "--json").stdout)["deployment_id"]
    return found


def test_the_cloned_database_is_refused_where_the_deployment_has_an_id(
    deployment: Deployment, clone: Deployment
) -> None:
    deployment.environment["KRAVN_DEPLOYMENT_ID"] = deployment_id(deployment)
    assert deployment.start().numbers() == [1, 2]
    clone.refuses_to_start("DeploymentMismatchError", KRAVN_DEPLOYMENT_ID=str(uuid.uuid4()))


def test_the_cloned_database_gets_a_life_of_its_own(
    deployment: Deployment, clone: Deployment, openbao: OpenBao
) -> None:
    clone.environment |= {"KRAVN_SECRET": NEXT_SECRET, "KRAVN_DEPLOYMENT_ID": str(uuid.uuid4())}
    clone.environment |= KMS(openbao).settings()
    values, *keys = clearing()
    clone.execute(*keys)
    clone.refuses_to_start("ExistingDataError")
    clone.execute(values)
    program = clone.start()
    program.put(5)
    assert program.numbers() == [5]
    assert "problem" not in clone.run("status").output
    assert deployment_id(clone) == clone.environment["KRAVN_DEPLOYMENT_ID"] != deployment_id(deployment)
    assert set(clone.states()).isdisjoint(deployment.states())
    assert deployment.start().numbers() == [1, 2]


def clearing() -> list[str]:
    """Return the SQL of the page that takes the values and the keys away."""
    code = re.sub(r"--.*", "", blocks("Runbook: the cloned database", "sql"))
    return [statement.strip() for statement in code.split(";") if statement.strip()]


def test_the_cloned_database_that_reads_the_values(deployment: Deployment, clone: Deployment) -> None:
    first = deployment.in_state(State.PRIMARY)
    copied, original = clone.start(), deployment.start()
    copied.look()
    rotated(clone, copied)
    clone.run("rekey", "--metadata", MODELS)
    clone.run("destroy", first, "--now", "--reason", "a drill")
    assert copied.numbers() == original.numbers() == [1, 2]
    assert deployment.in_state(State.PRIMARY) == first


# --- Deploys --------------------------------------------------------------------------------------------------------


def test_a_rolling_deploy_and_its_rollback_in_the_middle_of_a_rotation(deployment: Deployment) -> None:
    old = [deployment.start(), deployment.start()]
    for program in old:
        program.look()
    deployment.run("rotate")
    new = deployment.start(KRAVN_FENCE="transaction")
    new.put(3)
    deployment.run("promote", refused="is not yet held by")
    old.pop().stop()
    pending = deployment.in_state(State.PENDING)
    until(lambda: pending in old[0].held())
    deployment.run("promote")
    new.put(4)
    assert old[0].numbers() == [1, 2, 3, 4]
    new.stop()
    again = deployment.start()
    again.put(5)
    assert again.numbers() == old[0].numbers() == [1, 2, 3, 4, 5]
    assert key_ids(deployment.url)[5] == pending


def test_a_rolling_deploy_of_the_next_secret_and_its_rollback(deployment: Deployment) -> None:
    both = {"KRAVN_SECRET_NEXT": NEXT_SECRET}
    old = deployment.start()
    new = deployment.start(**both)
    new.put(3)
    assert old.numbers() == [1, 2, 3]
    new.stop()
    rolled_back = deployment.start()
    assert rolled_back.numbers() == [1, 2, 3]
    for program in (old, rolled_back):
        program.stop()
    new = deployment.start(**both)
    new.look()
    deployment.run("rotate-secret", **both)
    deployment.refuses_to_start("RowAuthenticationError")
    alone = deployment.start(KRAVN_SECRET=NEXT_SECRET, KRAVN_SECRET_RETIRED=SECRET)
    alone.put(4)
    alone.stop()
    assert deployment.start(**both).numbers() == [1, 2, 3, 4]


def test_a_rolling_deploy_of_a_kms_and_its_rollback(without_kms: Deployment, kms: KMS) -> None:
    old = [without_kms.start(), without_kms.start()]
    for program in old:
        program.look()
    new = without_kms.start(**kms.settings())
    new.put(3)
    old.pop().stop()
    pending = without_kms.in_state(State.PENDING)
    shown = without_kms.run("status", **kms.settings()).output
    assert f"{pending} waits for" in shown
    new.look()
    assert old[0].numbers() == [1, 2, 3]

    new.stop()
    rolled_back = without_kms.start()
    rolled_back.put(4)
    assert old[0].numbers() == rolled_back.numbers() == [1, 2, 3, 4]
    assert without_kms.states()[pending] is State.PENDING

    new = without_kms.start(**kms.settings())
    new.look()
    assert without_kms.states()[pending] is State.PENDING
    for program in (*old, rolled_back):
        program.stop()
    until(lambda: new.primary() == pending)
    new.put(5)
    assert new.numbers() == [1, 2, 3, 4, 5]
    without_kms.refuses_to_start("ProviderMismatchError")


def test_a_rolling_deploy_of_a_kms_where_boots_make_no_key(without_kms: Deployment, kms: KMS) -> None:
    never = kms.settings() | {"KRAVN_KMS_PROVISION": "never"}
    old = without_kms.start()
    old.look()
    without_kms.refuses_to_start("NotProvisionedError", **never)
    without_kms.run("provision", "--metadata", MODELS, **never)
    pending = without_kms.in_state(State.PENDING)
    new = without_kms.start(**never)
    new.look()
    old.stop()
    new.look()
    assert without_kms.states()[pending] is State.PENDING
    without_kms.run("promote", **never)
    until(lambda: new.primary() == pending)


# --- Adopting a KMS -------------------------------------------------------------------------------------------------


def test_adopting_a_kms(without_kms: Deployment, kms: KMS) -> None:
    old = without_kms.start()
    old.look()
    bootstrap = without_kms.bootstrap_key()
    new = without_kms.start(**kms.settings(), **IMPATIENT)
    new.put(3)
    old.put(4)
    assert old.numbers() == new.numbers() == [1, 2, 3, 4]
    assert without_kms.keys_of_values() == {bootstrap}
    old.stop()
    pending = without_kms.in_state(State.PENDING)
    until(lambda: new.primary() == pending)
    new.put(5)
    assert key_ids(without_kms.url)[5] == pending

    without_kms.environment |= kms.settings() | IMPATIENT
    without_kms.refuses_to_start("BootstrapKeyError", KRAVN_SECRET=NEXT_SECRET)
    walk = Walk(without_kms, "Runbook: adopting a KMS")
    walk.key_id = bootstrap
    assert "primary" in next(line for line in walk.run("status").output.splitlines() if pending in line)
    assert "4 values were moved" in walk.run("rekey").output
    walk.run("disable")
    walk.end()
    assert without_kms.keys_of_values() == {pending}
    until(lambda: bootstrap not in new.held())
    restarted = without_kms.start()
    assert restarted.numbers() == new.numbers() == [1, 2, 3, 4, 5]


def test_adopting_a_kms_from_a_secret_file(postgres_url: str, stack: ExitStack, kms: KMS, tmp_path: Path) -> None:
    deployment = Deployment(postgres_url, stack, IMPATIENT | {"KRAVN_DATA_DIR": str(tmp_path)})
    with_values(deployment)
    deployment.environment |= kms.settings()
    program = deployment.start()
    program.look()
    bootstrap = deployment.bootstrap_key()
    until(lambda: program.primary() != bootstrap)
    deployment.run("rekey", "--metadata", MODELS)
    deployment.run("disable", bootstrap, "--metadata", MODELS)
    assert deployment.start().numbers() == [1, 2]
    (tmp_path / "secret.key").unlink()
    deployment.refuses_to_start("RowAuthenticationError")
