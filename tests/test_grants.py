"""The roles of docs/key-lifecycle.md, made with the SQL that stands there: each can do its part, and no more."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, func, make_url, select, text
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from sqlalchemy_kravn_crypto.changes import Operator
from sqlalchemy_kravn_crypto.cli import app
from sqlalchemy_kravn_crypto.configuration import operator
from sqlalchemy_kravn_crypto.exceptions import ReplicasBehindError
from sqlalchemy_kravn_crypto.known_columns import known
from sqlalchemy_kravn_crypto.lifecycle import (
    Targets,
    destroy,
    disable,
    enable,
    evidence,
    forget_column,
    promote,
    record_census,
    rotate,
)
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.rekey import rekey
from sqlalchemy_kravn_crypto.replicas import live_replicas
from sqlalchemy_kravn_crypto.rows import connect, read_rows
from sqlalchemy_kravn_crypto.schema import TABLES, State
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.transactions import mark, open_since
from tests.openbao import OpenBao
from tests.program import Base, Program, RefusedError

PAGE = Path(__file__).parents[1] / "docs" / "key-lifecycle.md"
SECRET = "correct horse battery staple, and forty more characters"
PASSWORD = "only for this test"
PATIENCE = 60.0  # seconds that something may take which is certain to come
DENIED = "denied"
GROUPS = ("kravn_application", "kravn_first_boot", "kravn_operator", "kravn_reader", "kravn_heartbeat")


def statements(database: str) -> list[str]:
    """Return the SQL of the page for one kind of database."""
    grants = PAGE.read_text(encoding="utf-8").partition("\n## Grants\n")[2]
    section = grants.partition(f"\n### {database}\n")[2].partition("\n##")[0]
    blocks = re.findall(r"^```sql\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    code = re.sub(r"^--.*\n", "", "".join(blocks), flags=re.MULTILINE)
    return [statement.strip() for statement in code.split(";") if statement.strip()]


class Server:
    """A database with the tables and the roles, and users of them."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self._stack = stack
        self._users: list[str] = []
        self.owner = self._engine(url)
        self.is_postgresql = self.owner.dialect.name == "postgresql"
        migrate(self.owner)
        Base.metadata.create_all(self.owner)
        stack.callback(self._drop_roles)
        self.execute(*statements("PostgreSQL" if self.is_postgresql else "MariaDB"))

    def _engine(self, url: Any) -> Engine:
        engine = create_engine(url)
        self._stack.callback(engine.dispose)
        return engine

    def execute(self, *code: str) -> None:
        with self.owner.begin() as connection:
            for statement in code:
                connection.exec_driver_sql(statement)

    def user(self, *groups: str) -> Engine:
        """Make a user who is in groups, and return their engine."""
        name = f"kravn_user_{len(self._users)}"
        self._users.append(name)
        if self.is_postgresql:
            self.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
            self.execute(*(f"GRANT {group} TO {name}" for group in groups))
        else:
            # One role alone can be set at a time, so a role of the user's own has them all.
            self.execute(f"CREATE ROLE {name}_roles", *(f"GRANT {group} TO {name}_roles" for group in groups))
            self.execute(
                f"CREATE USER {name}@localhost IDENTIFIED BY '{PASSWORD}'",
                f"GRANT {name}_roles TO {name}@localhost",
                f"SET DEFAULT ROLE {name}_roles FOR {name}@localhost",
            )
        return self._engine(make_url(self.owner.url).set(username=name, password=PASSWORD))

    def take_away(self, group: str, engine: Engine) -> None:
        name = engine.url.username
        self.execute(f"REVOKE {group} FROM {name}{'' if self.is_postgresql else '_roles'}")
        engine.dispose()

    def _drop_roles(self) -> None:
        with self.owner.begin() as connection:
            for name in (*self._users, *GROUPS):
                self._drop(connection, name)

    def _drop(self, connection: Connection, name: str) -> None:
        if self.is_postgresql:
            exists = select(func.count()).select_from(text("pg_roles")).where(text("rolname = :name"))
            if connection.execute(exists, {"name": name}).scalar_one():
                connection.exec_driver_sql(f"DROP OWNED BY {name}")
                connection.exec_driver_sql(f"DROP ROLE {name}")
        elif name in GROUPS:
            connection.exec_driver_sql(f"DROP ROLE IF EXISTS {name}")
        else:
            connection.exec_driver_sql(f"DROP USER IF EXISTS {name}@localhost")
            connection.exec_driver_sql(f"DROP ROLE IF EXISTS {name}_roles")


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    name = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}[request.param]
    with ExitStack() as stack:
        yield Server(request.getfixturevalue(name), stack)


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Server]:
    with ExitStack() as stack:
        yield Server(postgres_url, stack)


@pytest.fixture
def settings(openbao: OpenBao, monkeypatch: pytest.MonkeyPatch) -> Settings:
    environment = {
        "KRAVN_SECRET": SECRET,
        "KRAVN_KMS_PROVIDER": "vault",
        "KRAVN_KMS_VAULT_ADDR": openbao.address,
        "KRAVN_KMS_VAULT_TOKEN": openbao.token,
        "KRAVN_KMS_VAULT_KEY": openbao.key,
        "KRAVN_LOOK_INTERVAL": "0.05",
        "KRAVN_LEASE": "2",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings()


def states(engine: Engine) -> dict[str, State]:
    with connect(engine) as connection:
        return {row.required("key_id"): row.state for row in read_rows(connection).keys}


def heartbeats(engine: Engine) -> int:
    with connect(engine) as connection:
        return len(live_replicas(connection))


def until(condition: Callable[[], bool], *, every: float = 0.02) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(every)


def is_promoted(program: Program, by: Operator) -> bool:
    """Let the program look, and promote what is pending."""
    program.look()
    try:
        promote(by)
    except ReplicasBehindError:
        return False
    return True


@pytest.fixture
def serving(settings: Settings) -> Iterator[Callable[..., Program]]:
    """Start processes that end with the test."""
    with ExitStack() as stack:

        def start(engine: Engine, **environment: str) -> Program:
            given = {name: value for name, value in os.environ.items() if name.startswith("KRAVN_")}
            program = Program(engine.url.render_as_string(hide_password=False), given | environment)
            stack.callback(program.stop)
            return program

        yield start


@pytest.fixture
def served(server: Server, serving: Callable[..., Program]) -> Server:
    """Give a server whose first process has made the first data key, stored a value, and ended."""
    program = serving(server.user("kravn_application", "kravn_first_boot"))
    program.put(1)
    program.stop()
    return server


# --- What each can do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fence", ["lease", "transaction"])
def test_a_key_lives_and_dies_under_the_grants(server: Server, settings: Settings, serving: Any, fence: str) -> None:
    user = server.user("kravn_application", "kravn_first_boot")
    program = serving(user, KRAVN_FENCE=fence)
    program.put(1)
    program.stop()
    server.take_away("kravn_first_boot", user)
    program = serving(user, KRAVN_FENCE=fence)
    program.put(2)
    program.change(2)
    assert program.numbers() == [-2, 1]
    assert heartbeats(server.owner) == 1
    first = program.primary()

    operating = server.user("kravn_operator")
    commands = operator(operating, settings)
    rotate(commands, reason="yearly")
    until(lambda: is_promoted(program, commands))
    until(lambda: program.primary() != first)
    program.put(3)

    targets = Targets(Base.metadata)
    with connect(operating) as connection:
        columns = known(connection, Base.metadata)
    moved = rekey(operating, commands.store.open(operating).keyring, columns)
    assert (moved.counts.rekeyed, moved.is_complete) == (2, True)
    assert record_census(commands, targets).of_key(first) == 0

    disable(commands, first, targets=targets)
    enable(commands, first)
    disable(commands, first, targets=targets)
    until(lambda: first not in program.held())
    destroy(commands, first, reason="tested", backups_expired=True, after_days=0, targets=targets)
    assert states(operating)[first] is State.DESTROYED
    assert evidence(commands, first)["has_wrapped_key"] is False
    program.put(4)
    assert program.numbers() == [-2, 1, 3, 4]
    assert "failed" not in program.log()


def test_a_column_is_forgotten_by_the_operator(served: Server, settings: Settings) -> None:
    commands = operator(served.user("kravn_operator"), settings)
    forget_column(commands, "", "plugin", "credentials", reason="its table is to be dropped")
    with connect(served.owner) as connection:
        assert list(connection.scalars(select(TABLES.columns.c.table_name))) == []


def test_a_reader_sees_the_status_and_counts(served: Server, settings: Settings) -> None:
    reading = served.user("kravn_reader")
    url = reading.url.render_as_string(hide_password=False)
    result = CliRunner().invoke(app, ["status", "--url", url])
    assert result.exit_code == 0, result.output
    counted = record_census(operator(reading, settings), Targets(Base.metadata), dry_run=True)
    primary = next(key_id for key_id, state in states(reading).items() if state is State.PRIMARY)
    assert primary in result.stdout
    assert counted.of_key(primary) == 1
    assert evidence(operator(reading, settings), primary)["state"] == "primary"


def test_a_reader_that_may_not_leave_a_heartbeat_reads(served: Server, serving: Any) -> None:
    program = serving(served.user("kravn_reader"))
    assert program.numbers() == [1]
    until(lambda: "heartbeat" in program.log())
    program.look()
    assert program.numbers() == [1]
    assert heartbeats(served.owner) == 0
    assert program.log().count("heartbeat") == 1


def test_a_reader_leaves_a_heartbeat_where_it_may(served: Server, serving: Any) -> None:
    program = serving(served.user("kravn_reader", "kravn_heartbeat"))
    assert program.numbers() == [1]
    assert heartbeats(served.owner) == 1
    assert program.log() == ""
    program.stop()
    assert heartbeats(served.owner) == 0


# --- What each cannot -----------------------------------------------------------------------------------------------


def test_the_application_gives_no_commands(served: Server, settings: Settings) -> None:
    before = states(served.owner)
    commands = operator(served.user("kravn_application"), settings)
    with pytest.raises(DBAPIError, match=DENIED):
        rotate(commands)
    assert states(served.owner) == before
    rotate(operator(served.user("kravn_operator"), settings))
    pending = states(served.owner)
    with pytest.raises(DBAPIError, match=DENIED):
        promote(commands, force=True)
    assert states(served.owner) == pending


OF_THE_KEYS = [
    "UPDATE kms_keys SET state = 'retired'",
    "UPDATE kms_keys SET wrapped_key = NULL",
    "UPDATE kms_keys SET epoch = 1",
    "DELETE FROM kms_keys",
    "INSERT INTO kms_keys (id, state) VALUES (99, 'pending')",
]
OF_THE_TRAIL = [
    "INSERT INTO kms_events (id, actor, host, action, previous_hash, hash) VALUES (99, 'a', 'h', 'a', 'p', 'h')",
    "UPDATE kms_events SET reason = NULL",
    "DELETE FROM kms_events",
]
OF_THE_RECORDS = ["DELETE FROM kms_columns", "DELETE FROM kms_rekeys", "UPDATE kms_rekeys SET position = NULL"]
OF_THE_HEARTBEATS = ["DELETE FROM kms_replicas", "UPDATE kms_replicas SET epoch = 0"]
OF_THE_VALUES = ["DELETE FROM plugin", "UPDATE plugin SET credentials = NULL"]

DENIALS = {
    "kravn_application": [*OF_THE_KEYS, *OF_THE_TRAIL, *OF_THE_RECORDS],
    "kravn_operator": [
        "DELETE FROM kms_keys",
        "UPDATE kms_events SET reason = NULL",
        "DELETE FROM kms_events",
        *OF_THE_HEARTBEATS,
        "DELETE FROM plugin",
        "UPDATE plugin SET id = 2",
    ],
    "kravn_reader": [
        *OF_THE_KEYS,
        *OF_THE_TRAIL,
        *OF_THE_RECORDS,
        *OF_THE_HEARTBEATS,
        *OF_THE_VALUES,
        "UPDATE kms_keys SET updated_at = NULL",
    ],
    "kravn_heartbeat": ["SELECT * FROM kms_keys", "SELECT * FROM plugin", *OF_THE_KEYS, *OF_THE_TRAIL, *OF_THE_VALUES],
}


@pytest.mark.parametrize("group", DENIALS)
def test_nobody_can_do_more(server: Server, group: str) -> None:
    engine = server.user(group)
    for statement in DENIALS[group]:
        with engine.connect() as connection, pytest.raises(DBAPIError, match=DENIED):
            connection.exec_driver_sql(statement)


def test_a_reader_writes_no_value(served: Server, serving: Any) -> None:
    program = serving(served.user("kravn_reader", "kravn_heartbeat"))
    with pytest.raises(RefusedError, match=DENIED):
        program.put(2)
    with pytest.raises(RefusedError, match=DENIED):
        program.change(1)


# --- What each grant is there for -----------------------------------------------------------------------------------


def test_the_first_data_key_is_not_made_without_the_right_to(server: Server, serving: Any) -> None:
    with pytest.raises(RefusedError, match=DENIED):
        serving(server.user("kravn_application"))


def test_the_fence_takes_the_right_to_lock_the_primary(postgres: Server, serving: Any) -> None:
    program = serving(postgres.user("kravn_application", "kravn_first_boot"), KRAVN_FENCE="transaction")
    program.put(1)
    postgres.execute("REVOKE UPDATE (updated_at) ON kms_keys FROM kravn_application")
    postgres.execute("REVOKE UPDATE ON kms_keys FROM kravn_first_boot")
    with pytest.raises(RefusedError, match=DENIED):
        program.put(2)
    assert program.numbers() == [1]


def test_the_operator_is_told_whose_transaction_is_waited_for(server: Server) -> None:
    writing, operating = server.user("kravn_application"), server.user("kravn_operator")
    with writing.connect() as writer, connect(operating) as connection:
        own = "pg_backend_pid()" if server.is_postgresql else "CONNECTION_ID()"
        number = writer.exec_driver_sql(f"SELECT {own}").scalar_one()
        writer.exec_driver_sql("INSERT INTO plugin (id, credentials) VALUES (1, '')")
        moment = mark(connection)
        connection.rollback()
        found = open_since(connection, moment)
        assert found == [f"{'backend' if server.is_postgresql else 'thread'} {number}"]
        writer.rollback()
        connection.rollback()
        # MariaDB gives what it gave before, unless nobody has asked for a tenth of a second.
        until(lambda: open_since(connection, moment) == [], every=0.2)
