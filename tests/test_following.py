"""What is installed on engines: whatever a program does with its transactions, they are its own."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, insert, select, text, update
from sqlalchemy.ext.asyncio import create_async_engine

from sqlalchemy_kravn_crypto import configure, configure_async, is_configured, reset
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.following import current, follow, resume, start, stop
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, declared, record
from sqlalchemy_kravn_crypto.lifecycle import promote, rotate
from sqlalchemy_kravn_crypto.replicas import Replica, read_replicas
from sqlalchemy_kravn_crypto.schema import TABLES, State
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.watch import Watch, WatchSettings
from tests.fixtures_deployment import METADATA, NOTES, Deployment
from tests.fixtures_postgres import asynchronous

INTERVAL, LEASE = 15.0, 180.0
ONE = [{"id": 1, "content": {"number": 1}}]


class Clock:
    """The process's clock, that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def connected() -> Iterator[Callable[..., Engine]]:
    """Make engines that are disposed of."""
    made: list[Engine] = []

    def connect(url: Any, **options: Any) -> Engine:
        made.append(create_engine(url, **options))
        return made[-1]

    yield connect
    reset()
    for engine in made:
        engine.dispose()


@pytest.fixture
def postgres(postgres_url: str, tmp_path: Path, connected: Callable[..., Engine]) -> Deployment:
    deployment = Deployment(connected(postgres_url), tmp_path)
    deployment.open()
    return deployment


def serve(deployment: Deployment, engine: Engine, clock: Clock, **settings: Any) -> Watch:
    """Be a process that has just started, on an engine of its own."""
    store = deployment.store()
    watch = Watch(
        store,
        store.open(deployment.engine),
        WatchSettings(interval=INTERVAL, lease=LEASE, **settings),
        clock=clock,
    )
    start(watch, engine)
    follow(engine)
    return watch


def beats(deployment: Deployment) -> list[Replica]:
    with deployment.engine.connect() as connection:
        return read_replicas(connection)


def last_beats(deployment: Deployment) -> list[tuple[str, Any]]:
    return [(replica.replica_id, replica.seen_at) for replica in beats(deployment)]


def numbers(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return [row.content["number"] for row in connection.execute(select(NOTES).order_by(NOTES.c.id))]


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- Processes --------------------------------------------------------------------------------------------------------

_SYNCHRONOUS = """
import os, sys
from sqlalchemy import create_engine, text
from sqlalchemy_kravn_crypto import configure

engine = create_engine(sys.argv[1])
configure(engine)


def transact():
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))


def report():
    print(os.getpid(), flush=True)
    sys.stdin.readline()

"""

_LIVES = """
transact()
report()
"""

_FORKS = """
transact()
engine.dispose(close=False)
child = os.fork()
transact()
if child == 0:
    print(os.getpid(), flush=True)
    os.read(int(sys.argv[2]), 1)
    sys.exit()
print(os.getpid(), flush=True)
os.waitpid(child, 0)
print("the child has ended", flush=True)
sys.stdin.readline()
"""

_ASYNCHRONOUS = """
import asyncio, os, sys
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy_kravn_crypto import configure_async


async def main():
    engine = create_async_engine(sys.argv[1])
    await configure_async(engine)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
    print(os.getpid(), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    if "dispose" in sys.argv:
        await engine.dispose()


asyncio.run(main())
"""


@contextmanager
def process(deployment: Deployment, script: str, url: str, *arguments: str, **options: Any) -> Iterator[Any]:
    """Run another process of the deployment in mode ``none``, until its input ends."""
    environment = os.environ | {
        "KRAVN_DATA_DIR": str(deployment.secret_file.parent),
        "KRAVN_LEASE": "600",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    with subprocess.Popen(
        [sys.executable, "-c", script, url, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def url_of(deployment: Deployment) -> str:
    return deployment.engine.url.render_as_string(hide_password=False)


def test_the_heartbeat_of_a_process_is_gone_after_it_has_ended(deployment: Deployment) -> None:
    with process(deployment, _SYNCHRONOUS + _LIVES, url_of(deployment)) as running:
        assert int(running.stdout.readline()) == running.pid
        (replica,) = beats(deployment)
        assert (replica.process_id, replica.lease, replica.is_alive) == (running.pid, 600, True)
        _, stderr = running.communicate("\n", timeout=60)
        assert running.returncode == 0
        assert "Traceback" not in stderr
    assert beats(deployment) == []


@pytest.mark.parametrize("how", ["dispose", "leave open"])
def test_the_heartbeat_of_an_asynchronous_process_is_gone_after_it_has_ended(
    database_url: str, tmp_path: Path, how: str
) -> None:
    engine = create_engine(database_url)
    deployment = Deployment(engine, tmp_path)
    # A name and not an address, which has to be looked up when the process ends.
    url = asynchronous(database_url).replace("@127.0.0.1:", "@localhost:")
    with process(deployment, _ASYNCHRONOUS, url, how) as running:
        assert int(running.stdout.readline()) == running.pid
        assert [replica.process_id for replica in beats(deployment)] == [running.pid]
        _, stderr = running.communicate("\n", timeout=60)
        assert running.returncode == 0
        assert "Traceback" not in stderr
    # aiosqlite has a thread for each connection, and these two releases of Python let none begin when they end.
    stays = engine.dialect.name == "sqlite" and sys.version_info[:3] in {(3, 12, 0), (3, 12, 1)}
    assert len(beats(deployment)) == stays
    engine.dispose()


def test_the_heartbeat_of_a_process_that_was_killed_is_there_until_its_lease_is_over(deployment: Deployment) -> None:
    with process(deployment, _SYNCHRONOUS + _LIVES, url_of(deployment)) as running:
        pid = int(running.stdout.readline())
        running.send_signal(signal.SIGKILL)
        running.wait(60)
    deployment.open()
    pending = deployment.key_id(State.PENDING)  # since the process might live
    with pytest.raises(errors.ReplicasBehindError, match=f"process {pid} on "):
        promote(deployment.operator())
    with deployment.engine.begin() as connection:
        seen_at = connection.execute(select(TABLES.replicas.c.seen_at)).scalar_one()
        connection.execute(update(TABLES.replicas).values(seen_at=seen_at - timedelta(seconds=601)))
    promote(deployment.operator())
    assert deployment.states()[pending] is State.PRIMARY


def test_a_forked_child_has_a_heartbeat_of_its_own(deployment: Deployment) -> None:
    ends, told = os.pipe()
    with process(deployment, _SYNCHRONOUS + _FORKS, url_of(deployment), str(ends), pass_fds=[ends]) as running:
        pids = {int(running.stdout.readline()) for _ in range(2)}
        assert {replica.process_id for replica in beats(deployment)} == pids
        assert len({replica.replica_id for replica in beats(deployment)}) == 2
        os.write(told, b".")
        assert running.stdout.readline() == "the child has ended\n"
        assert [replica.process_id for replica in beats(deployment)] == [running.pid]
        running.communicate("\n", timeout=60)
    os.close(ends)
    os.close(told)
    assert beats(deployment) == []


def test_reset_in_an_event_loop_takes_the_heartbeat_away(database_url: str, tmp_path: Path) -> None:
    engine = create_engine(database_url)
    deployment = Deployment(engine, tmp_path)

    async def run() -> None:
        asynchronous_engine = create_async_engine(asynchronous(database_url))
        await configure_async(asynchronous_engine, Settings(data_dir=tmp_path))
        async with asynchronous_engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        assert len(await asyncio.to_thread(beats, deployment)) == 1
        reset()
        await asynchronous_engine.dispose()

    asyncio.run(run())
    assert beats(deployment) == []
    engine.dispose()


def test_when_the_database_is_gone_at_the_end_nothing_is_raised(
    sqlite_deployment: Deployment, clock: Clock, caplog: pytest.LogCaptureFixture, connected: Callable[..., Engine]
) -> None:
    engine = connected(sqlite_deployment.engine.url)
    serve(sqlite_deployment, engine, clock)
    assert numbers(engine) == []
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(text("DROP TABLE kms_replicas"))
    opened: list[object] = []
    closed: list[object] = []
    event.listen(engine, "connect", lambda one, _: opened.append(one))
    event.listen(engine, "close", lambda one, _: closed.append(one))
    with caplog.at_level(logging.DEBUG, "sqlalchemy_kravn_crypto"):
        stop()
    assert "the heartbeat stays until its lease is over: OperationalError" in caplog.text
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
    assert len(opened) == 1
    assert closed == opened
    stop()
    assert current() == (None, None)


def test_who_never_left_a_heartbeat_takes_none_away(
    sqlite_deployment: Deployment, clock: Clock, connected: Callable[..., Engine]
) -> None:
    engine = connected("sqlite:////nowhere/at all.db")
    watch = serve(sqlite_deployment, engine, clock)
    assert current() == (watch, engine)
    stop()  # connects to nothing
    resume(watch, engine)
    assert current() == (watch, engine)
    stop()


# --- Transactions of the program's own --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after", "of the pool"])
def test_what_a_listener_sets_for_a_transaction_lasts(
    postgres: Deployment, connected: Callable[..., Engine], clock: Clock, order: str
) -> None:
    engine = connected(postgres.engine.url)

    def tenant(connection: Any) -> None:
        connection.exec_driver_sql("SET LOCAL kravn.tenant = 'mine'")

    if order == "before":
        event.listen(engine, "begin", tenant)
    serve(postgres, engine, clock)
    if order == "after":
        event.listen(engine, "begin", tenant)
    elif order == "of the pool":
        event.listen(engine, "checkout", lambda driver, *_: driver.execute("SET LOCAL kravn.tenant = 'mine'"))
    rotate(postgres.operator())
    for _ in range(3):
        with engine.begin() as connection:
            assert connection.execute(text("SELECT current_setting('kravn.tenant')")).scalar_one() == "mine"
            connection.execute(insert(NOTES), [{"content": {"number": 1}}])
            connection.rollback()
        clock.now += INTERVAL
    assert current_keyring().key_ids == postgres.states().keys()
    assert numbers(engine) == []
    # There is no room for a heartbeat where a transaction has begun before the engine knows of it.
    assert len(beats(postgres)) == (0 if order == "of the pool" else 1)


def test_that_no_heartbeat_can_be_left_is_said_once(
    postgres: Deployment, connected: Callable[..., Engine], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    engine = connected(postgres.engine.url)
    serve(postgres, engine, clock)
    event.listen(engine, "checkout", lambda driver, *_: driver.execute("SELECT 1"))
    for _ in range(3):
        assert numbers(engine) == []
        clock.now += INTERVAL
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    expected = (
        "no heartbeat is left and no column recorded on connections of psycopg: something else has begun a transaction "
        "before the engine did"
    )
    assert [line for line in said if "no heartbeat is left" in line] == [expected]


@pytest.mark.parametrize("fence", [False, True])
@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN IMMEDIATE"])
def test_the_recipe_for_transactions_on_sqlite(
    sqlite_deployment: Deployment,
    connected: Callable[..., Engine],
    clock: Clock,
    begin: str,
    fence: bool,  # noqa: FBT001 - a parameter
) -> None:
    engine = connected(sqlite_deployment.engine.url)
    event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    serve(sqlite_deployment, engine, clock, fence=fence)
    pending = rotate(sqlite_deployment.operator())
    assert pending is not None
    with engine.connect() as connection:
        connection.execute(insert(NOTES), ONE)
        connection.rollback()
    assert numbers(engine) == []
    clock.now += INTERVAL
    with engine.begin() as connection:
        connection.execute(insert(NOTES), ONE)
    assert numbers(engine) == [1]
    (replica,) = beats(sqlite_deployment)
    assert pending.key_id in replica.key_ids
    promote(sqlite_deployment.operator())
    clock.now += INTERVAL
    assert numbers(engine) == [1]
    assert current_keyring().primary_key_id == pending.key_id


def test_with_autocommit_it_is_followed_too(
    running: Deployment, connected: Callable[..., Engine], clock: Clock
) -> None:
    engine = connected(running.engine.url, isolation_level="AUTOCOMMIT")
    serve(running, engine, clock)
    pending = rotate(running.operator())
    assert pending is not None
    with engine.connect() as connection:
        connection.execute(insert(NOTES), ONE)
        clock.now += INTERVAL
        assert [row.content for row in connection.execute(select(NOTES))] == [{"number": 1}]
    clock.now += INTERVAL
    assert numbers(engine) == [1]
    (replica,) = beats(running)
    assert pending.key_id in replica.key_ids


def test_with_autocommit_a_fence_is_refused_on_every_database(
    running: Deployment, connected: Callable[..., Engine], clock: Clock
) -> None:
    engine = connected(running.engine.url)
    serve(running, engine, clock, fence=True)
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    with autocommit.connect() as connection, pytest.raises(errors.UnsupportedOperationError, match="Use a transaction"):
        connection.execute(insert(NOTES), ONE)
    assert numbers(engine) == []
    with engine.begin() as connection:
        connection.execute(insert(NOTES), ONE)
    assert numbers(engine) == [1]


def test_two_phase_transactions_are_followed(
    mariadb_url: str, tmp_path: Path, connected: Callable[..., Engine], clock: Clock
) -> None:
    engine = connected(mariadb_url)
    deployment = Deployment(connected(mariadb_url), tmp_path)
    deployment.open()
    serve(deployment, engine, clock)
    pending = rotate(deployment.operator())
    assert pending is not None
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(insert(NOTES), ONE)
        transaction.prepare()
        transaction.commit()
    assert numbers(engine) == [1]
    (replica,) = beats(deployment)
    assert pending.key_id in replica.key_ids
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(insert(NOTES), [{"id": 2, "content": {"number": 2}}])
        clock.now += INTERVAL
        connection.execute(select(NOTES))  # looks within it
        transaction.rollback()
    assert numbers(engine) == [1]


def test_an_engine_with_options_is_followed_like_its_own(
    running: Deployment, connected: Callable[..., Engine], clock: Clock
) -> None:
    engine = connected(running.engine.url)
    serve(running, engine, clock)
    optional = engine.execution_options(schema_translate_map={"tenant": None}).execution_options(echo_pool=False)
    assert numbers(optional) == []
    before = last_beats(running)
    assert len(before) == 1
    pending = rotate(running.operator())
    assert pending is not None
    clock.now += INTERVAL
    assert numbers(optional) == []
    assert pending.key_id in current_keyring().key_ids
    assert [replica_id for replica_id, _ in last_beats(running)] == [before[0][0]]


def test_no_schema_translate_map_moves_what_is_looked_at(
    postgres: Deployment, connected: Callable[..., Engine], clock: Clock
) -> None:
    engine = connected(postgres.engine.url)
    with postgres.engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
        connection.execute(text("CREATE TABLE tenant.deployed_note (LIKE deployed_note)"))
    serve(postgres, engine, clock, fence=True)
    tenant = engine.execution_options(schema_translate_map={None: "tenant"})
    with tenant.begin() as connection:
        connection.execute(insert(NOTES), ONE)
    assert numbers(tenant) == [1]
    assert numbers(engine) == []
    assert len(beats(postgres)) == 1


# --- More than one engine ---------------------------------------------------------------------------------------------


def test_a_fence_takes_the_key_store_in_the_same_database(
    database_url: str, tmp_path: Path, connected: Callable[..., Engine]
) -> None:
    key_store, values = connected(database_url), connected(f"sqlite:///{tmp_path / 'values.db'}")
    with pytest.raises(errors.ConfigurationError, match="KRAVN_FENCE=lease"):
        configure(values, Settings(data_dir=tmp_path, fence="transaction"), key_store_engine=key_store)
    assert not is_configured()


@pytest.mark.parametrize("first", ["key store", "values"])
def test_values_in_another_database_than_the_key_store(
    database_url: str, tmp_path: Path, connected: Callable[..., Engine], first: str
) -> None:
    deployment = Deployment(connected(database_url), tmp_path)
    key_store, values = connected(database_url), connected(f"sqlite:///{tmp_path / 'values.db'}")
    METADATA.create_all(values)
    settings = Settings(data_dir=tmp_path, look_interval=0.05)
    if first == "key store":
        configure(key_store, settings, provider=deployment.kms)
    configure(values, settings, provider=deployment.kms, key_store_engine=key_store)
    with values.begin() as connection:
        connection.execute(insert(NOTES), ONE)
    assert len(beats(deployment)) == 1
    pending = rotate(deployment.operator())
    assert pending is not None

    def is_held() -> bool:
        assert numbers(values) == [1]
        return pending.key_id in beats(deployment)[0].key_ids

    eventually(is_held)
    promote(deployment.operator())

    def is_primary() -> bool:
        assert numbers(values) == [1]
        return current_keyring().primary_key_id == pending.key_id

    eventually(is_primary)
    reset()
    assert beats(deployment) == []


def test_an_engine_that_is_followed_again_is_followed_once(
    sqlite_deployment: Deployment, connected: Callable[..., Engine], clock: Clock
) -> None:
    engine = connected(sqlite_deployment.engine.url)
    serve(sqlite_deployment, engine, clock)
    follow(engine)
    sent: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _k, statement, *_: sent.append(statement))
    assert numbers(engine) == []
    assert len([statement for statement in sent if "epoch" in statement and statement.startswith("SELECT")]) == 1


def test_an_engine_that_is_followed_without_a_watch_is_left_alone(
    sqlite_deployment: Deployment, connected: Callable[..., Engine], clock: Clock
) -> None:
    engine = connected(sqlite_deployment.engine.url)
    serve(sqlite_deployment, engine, clock)
    stop()
    sent: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _k, statement, *_: sent.append(statement))
    assert numbers(engine) == []
    assert not [statement for statement in sent if "kms_" in statement]


# --- What somebody does to the tables meanwhile ---------------------------------------------------------------------

GARBAGE = {
    "an epoch that is text": "UPDATE kms_keys SET epoch = 'MARKER' WHERE id = 1",
    "an epoch that is bytes": "UPDATE kms_keys SET epoch = x'00' WHERE id = 1",
    "no epoch": "UPDATE kms_keys SET epoch = NULL WHERE id = 1",
    "an earlier epoch": "UPDATE kms_keys SET epoch = 0 WHERE id = 1",
    "a later epoch": "UPDATE kms_keys SET epoch = 99 WHERE id = 1",
    "a huge epoch": "UPDATE kms_keys SET epoch = 9223372036854775807 WHERE id = 1",
    "a time that is none": "UPDATE kms_keys SET created_at = 'MARKER', epoch = 99",
    "a time that is a number": "UPDATE kms_keys SET updated_at = 17, epoch = 99",
    "a key id that is bytes": "UPDATE kms_keys SET epoch = 99, key_id = CASE id WHEN 1 THEN NULL ELSE x'00' || id END",
    "a MAC that is none": "UPDATE kms_keys SET row_mac = 'ÄÖ', epoch = 99 WHERE id = 1",
    "a text that is no UTF-8": "UPDATE kms_keys SET master_key = CAST(x'ff' AS TEXT), epoch = 99",
    "no control row": "DELETE FROM kms_keys WHERE id = 1",
    "no rows": "DELETE FROM kms_keys",
    "an unknown deployment": "UPDATE kms_keys SET deployment_id = 'MARKER', epoch = 99 WHERE id = 1",
    "a heartbeat that is garbage": "INSERT INTO kms_replicas SELECT 'x', host, process_id, version, epoch, key_ids, "
    "'MARKER', 'MARKER', primary_key_id, mac_key_ids, lease FROM kms_replicas",
}


@pytest.mark.parametrize("statement", GARBAGE.values(), ids=GARBAGE)
def test_whatever_is_in_the_tables_a_running_process_goes_on_reading(
    sqlite_deployment: Deployment,
    connected: Callable[..., Engine],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    statement: str,
) -> None:
    """SQLite keeps any value in any column."""
    engine = connected(sqlite_deployment.engine.url)
    serve(sqlite_deployment, engine, clock)
    with engine.begin() as connection:
        connection.execute(insert(NOTES), ONE)
    held = current_keyring().key_ids
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(text(statement))
    for _ in range(int(LEASE / INTERVAL) + 2):
        clock.now += INTERVAL
        assert numbers(engine) == [1]
    assert current_keyring().key_ids == held
    assert "MARKER" not in caplog.text
    if "kms_replicas" in statement:  # which says nothing of the keys
        return
    with pytest.raises(errors.LeaseExpiredError), engine.begin() as connection:
        connection.execute(insert(NOTES), [{"id": 2, "content": {"number": 2}}])
    assert "look of the key store failed and is tried again" in caplog.text


def test_a_process_that_starts_beside_a_garbage_heartbeat_serves(
    sqlite_deployment: Deployment, connected: Callable[..., Engine], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    sqlite_deployment.heartbeat(holds=set(), under="00" * 8)
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(text("UPDATE kms_replicas SET seen_at = 'MARKER'"))
    engine = connected(sqlite_deployment.engine.url)
    serve(sqlite_deployment, engine, clock)
    with engine.begin() as connection:
        connection.execute(insert(NOTES), ONE)
    assert numbers(engine) == [1]
    assert "heartbeat of the key store failed and is tried again: A row of kms_replicas" in caplog.text
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(text("DELETE FROM kms_replicas"))
    clock.now += INTERVAL
    assert numbers(engine) == [1]
    assert len(beats(sqlite_deployment)) == 1


@pytest.mark.parametrize("name", ["earlier_names", "row_identity", "storage", "name"])
def test_a_process_that_starts_beside_garbage_in_the_record_of_columns_serves_and_puts_its_own_right(
    deployment: Deployment, connected: Callable[..., Engine], clock: Clock, name: str
) -> None:
    """And leaves that of others alone, for an operator to look at."""
    with deployment.engine.begin() as connection:
        record(connection, [*declared(METADATA), KnownColumn("", "elsewhere", "x", "binary", "elsewhere.x")])
        connection.execute(update(TABLES.columns).values({name: "{MARKER"}))
    engine = connected(deployment.engine.url)
    serve(deployment, engine, clock)
    with engine.begin() as connection:
        connection.execute(insert(NOTES), ONE)
    assert numbers(engine) == [1]
    assert len(beats(deployment)) == 1
    with deployment.engine.connect() as connection:
        garbage = select(TABLES.columns.c.table_name).where(TABLES.columns.c[name] == "{MARKER")
        assert list(connection.scalars(garbage)) == ["elsewhere"]


def test_an_engine_with_options_can_be_what_is_configured(
    database_url: str, tmp_path: Path, connected: Callable[..., Engine]
) -> None:
    deployment = Deployment(connected(database_url), tmp_path)
    engine = connected(database_url)
    optional = engine.execution_options(schema_translate_map={"tenant": None})
    configure(optional, Settings(data_dir=tmp_path), provider=deployment.kms)
    assert numbers(optional) == numbers(engine) == []
    assert len(beats(deployment)) == 1
    reset()
    assert beats(deployment) == []
