"""The database of a configuration examined: by whoever, at every stage, with nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, func, inspect, select, text

from sqlalchemy_kravn_crypto.database_checks import check_database
from sqlalchemy_kravn_crypto.doctor import worst
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, record
from sqlalchemy_kravn_crypto.lifecycle import add_standby, promote, rotate, switch_to_standby
from sqlalchemy_kravn_crypto.providers.base import Finding, KeyProvider, Level
from sqlalchemy_kravn_crypto.schema import TABLE_NAMES, TABLES, State
from sqlalchemy_kravn_crypto.settings import Settings
from tests.database_clock import BEGINNING, DatabaseClock
from tests.fixtures_deployment import Deployment, VersionedKMS
from tests.leaks import found_in
from tests.test_grants import Server

GOOD, WARNING, BAD = Level.GOOD, Level.WARNING, Level.BAD
NOTE = KnownColumn("", "note", "content", "binary", "note.content")
EVERY_SUBJECT = ("database", "clock", "isolation", "tables", "grants", "key store", "master key")


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    def make(**values: Any) -> Settings:
        return Settings(**{"data_dir": tmp_path, "kms_timeout": 5, **values})

    return make


def of(findings: Iterable[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


def levels(findings: Iterable[Finding]) -> dict[str, Level]:
    """Return the worst level of each subject."""
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.subject, []).append(finding)
    return {subject: worst(of_subject) for subject, of_subject in found.items()}


def check(engine: Engine, settings: Settings | None, provider: KeyProvider | None = None) -> list[Finding]:
    return list(check_database(engine, settings, provider))


def said(findings: Iterable[Finding], subject: str) -> str:
    return "\n".join(f"{finding.message} {finding.advice}" for finding in of(findings, subject))


# --- A key store that is well ----------------------------------------------------------------------------------------


def test_all_is_well_and_nothing_is_changed(running: Deployment, settings: Callable[..., Settings]) -> None:
    before = running.everything()
    running.kms.calls.clear()
    found = check(running.engine, settings(), running.kms)
    assert levels(found) == dict.fromkeys(EVERY_SUBJECT, GOOD)
    assert running.everything() == before
    assert running.kms.calls == {"unwrap": 1}
    with running.engine.connect() as connection:
        for table in (TABLES.replicas, TABLES.columns, TABLES.rekeys):
            assert connection.execute(select(func.count()).select_from(table)).scalar_one() == 0
    assert "with 2 data keys" in said(found, "key store")
    assert "transit/kravn" in said(found, "master key")


def test_what_is_in_the_tables_is_not_touched(deployment: Deployment, settings: Callable[..., Settings]) -> None:
    # With the bootstrap key alone, the first data key of the KMS is still to come: every right is tried.
    deployment.open(provider=None)
    deployment.heartbeat(holds=["0" * 16], under="0" * 16)
    with deployment.engine.begin() as connection:
        record(connection, [NOTE])
    changed: list[tuple[str, int]] = []

    @event.listens_for(deployment.engine, "after_cursor_execute")
    def _after(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        if statement.split(maxsplit=1)[0] in {"INSERT", "UPDATE", "DELETE"}:
            changed.append((statement, cursor.rowcount))

    check(deployment.engine, settings(fence="transaction"), deployment.kms)
    tried = sorted(
        (statement.split()[0], next(name for name in TABLE_NAMES if name in statement)) for statement, _ in changed
    )
    serving = [("DELETE", "kms_replicas"), ("INSERT", "kms_replicas"), ("UPDATE", "kms_replicas")]
    serving += [("INSERT", "kms_columns"), ("UPDATE", "kms_columns")]
    beginning = [("INSERT", "kms_keys"), ("UPDATE", "kms_keys"), ("INSERT", "kms_events")]
    fence = [("UPDATE", "kms_keys")] if deployment.engine.dialect.name == "postgresql" else []
    assert tried == sorted([*serving, *beginning, *fence])
    assert {count for _, count in changed} == {0}


def test_without_a_kms(deployment: Deployment, settings: Callable[..., Settings]) -> None:
    deployment.open(provider=None)
    assert levels(check(deployment.engine, settings())) == dict.fromkeys(EVERY_SUBJECT[:-1], GOOD)


# --- A key store that is not there yet -------------------------------------------------------------------------------


def test_a_database_that_is_not_to_be_had(settings: Callable[..., Settings]) -> None:
    engine = create_engine("postgresql+psycopg://user:MARKER@127.0.0.1:1/none")
    found = check(engine, settings())
    assert levels(found) == {
        "database": BAD,
        "clock": WARNING,
        "tables": WARNING,
        "grants": WARNING,
        "key store": WARNING,
    }
    assert all(finding.message.startswith("Not checked: ") for finding in found[1:])
    assert found_in(repr(found), "MARKER") == []


def test_an_empty_database(any_database_url: str, settings: Callable[..., Settings]) -> None:
    engine = create_engine(any_database_url)
    found = check(engine, settings())
    assert levels(found)["tables"] == BAD
    assert "kms_keys, kms_replicas, kms_columns" in said(found, "tables")
    assert "kravn-crypto migrate" in said(found, "tables")
    for subject in ("grants", "key store"):
        assert said(found, subject).startswith("Not checked: ")
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def execute(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


@pytest.mark.parametrize("table", ["kms_keys", "kms_replicas", "kms_columns", "kms_events", "kms_rekeys"])
def test_a_table_that_is_missing_is_named(running: Deployment, settings: Callable[..., Settings], table: str) -> None:
    execute(running.engine, f"DROP TABLE {table}")
    found = check(running.engine, settings(), running.kms)
    # MariaDB tells nobody whether a table is missing on which they have no right.
    is_hidden = running.engine.dialect.name in {"mysql", "mariadb"} and table in {"kms_events", "kms_rekeys"}
    assert levels(found)["tables"] == (WARNING if is_hidden else BAD)
    assert said(found, "tables").count("kms_") == said(found, "tables").count(table) + 1  # kms_tables(metadata)
    assert ("Not checked" in said(found, "grants")) is not is_hidden


def test_tables_of_an_earlier_release(running: Deployment, settings: Callable[..., Settings]) -> None:
    execute(running.engine, "ALTER TABLE kms_keys DROP COLUMN events_hash")
    found = check(running.engine, settings(), running.kms)
    assert levels(found)["tables"] == BAD
    assert "earlier release: kms_keys." in said(found, "tables")


def test_tables_of_a_newer_release(running: Deployment, settings: Callable[..., Settings]) -> None:
    execute(running.engine, "ALTER TABLE kms_replicas ADD COLUMN mood INTEGER")
    found = check(running.engine, settings(), running.kms)
    assert levels(found) == dict.fromkeys(EVERY_SUBJECT, GOOD) | {"tables": WARNING}
    assert "newer release" in said(found, "tables")
    assert "kms_replicas" in said(found, "tables")


def test_the_first_boot_is_still_to_come(deployment: Deployment, settings: Callable[..., Settings]) -> None:
    found = check(deployment.engine, settings(), deployment.kms)
    assert levels(found)["key store"] == WARNING
    assert "first process" in said(found, "key store")
    # As `status` does, it asks of the KMS what a first boot will.
    assert deployment.kms.calls == {"wrap": 1, "unwrap": 2}
    assert deployment.rows().control is None


def test_the_first_data_key_is_to_be_made_by_hand(deployment: Deployment, settings: Callable[..., Settings]) -> None:
    found = check(deployment.engine, settings(kms_provision="never"), deployment.kms)
    assert levels(found)["key store"] == BAD
    assert "kravn-crypto provision" in said(found, "key store")


# --- A key store that is not well ------------------------------------------------------------------------------------


def test_another_secret(running: Deployment, settings: Callable[..., Settings], tmp_path: Path) -> None:
    found = check(running.engine, settings(secret="MARKER of another secret, that is long enough"), running.kms)
    assert levels(found)["key store"] == BAD
    assert "RowAuthenticationError: " in said(found, "key store")
    assert found_in(repr(found), "MARKER") == []


def test_a_row_that_was_tampered_with(running: Deployment, settings: Callable[..., Settings]) -> None:
    running.tamper(2, closing="MARKER")
    found = check(running.engine, settings(), running.kms)
    assert levels(found)["key store"] == BAD
    assert "RowAuthenticationError: " in said(found, "key store")


def test_a_trail_that_was_tampered_with(running: Deployment, settings: Callable[..., Settings]) -> None:
    running.rewrite_events(lambda stored: [values | {"actor": "somebody else"} for values in stored])
    found = check(running.engine, settings(), running.kms)
    assert "AuditTrailError: " in said(found, "key store")
    assert levels(found)["master key"] == GOOD


def test_a_kms_that_does_not_answer_keeps_the_trail_from_nothing(
    running: Deployment, settings: Callable[..., Settings]
) -> None:
    running.kms.down = True
    found = check(running.engine, settings(), running.kms)
    assert "ProviderUnavailableError: " in said(found, "key store")
    assert "audit trail is whole (events: 1)" in said(found, "key store")
    assert "can start" not in said(found, "key store")


@pytest.mark.parametrize(
    "environment", [{"KRAVN_KMS_TIMEOUTS": "MARKER"}, {"KRAVN_KMS_PROVIDER": "vault"}], ids=["misspelt", "incomplete"]
)
def test_with_wrong_settings_only_the_boot_is_left_out(
    running: Deployment, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = check(running.engine, None)
    assert levels(found)["key store"] == WARNING
    assert "Not checked: whether a process can start" in said(found, "key store")
    assert "audit trail is whole (events: 1)" in said(found, "key store")
    assert levels(found)["grants"] == GOOD


# --- The master key --------------------------------------------------------------------------------------------------


def test_another_kms_or_master_key(running: Deployment, settings: Callable[..., Settings]) -> None:
    key_id = running.key_id(State.PRIMARY)
    for other in (VersionedKMS("azure"), VersionedKMS(mount="elsewhere")):
        found = check(running.engine, settings(), other)
        assert levels(found)["master key"] == BAD
        assert key_id in said(found, "master key")
        assert "ProviderMismatchError: " in said(found, "key store")


def test_one_key_under_another_master_key(running: Deployment, settings: Callable[..., Settings]) -> None:
    rotate(running.operator())
    pending = running.rows().in_state(State.PENDING)
    assert pending is not None
    running.tamper(pending.id, master_key="elsewhere/kravn:v1")
    (finding,) = of(check(running.engine, settings(), running.kms), "master key")
    assert finding.level is BAD
    assert pending.key_id is not None
    assert pending.key_id in finding.message
    assert running.key_id(State.PRIMARY) not in finding.message


def test_the_standby_as_the_kms(running: Deployment, settings: Callable[..., Settings]) -> None:
    standby = VersionedKMS("azure", mount="elsewhere")
    add_standby(running.operator(standby=standby))
    assert levels(check(running.engine, settings(), running.kms))["master key"] == GOOD
    found = check(running.engine, settings(), standby)
    assert levels(found)["key store"] == GOOD
    assert levels(found)["master key"] == WARNING
    assert "kravn-crypto standby switch" in said(found, "master key")
    switch_to_standby(running.operator(store=running.store(provider=standby), standby=running.kms))
    assert levels(check(running.engine, settings(), standby))["master key"] == GOOD


def test_a_standby_for_some_of_the_keys(running: Deployment, settings: Callable[..., Settings]) -> None:
    standby = VersionedKMS("azure", mount="elsewhere")
    add_standby(running.operator(standby=standby))
    rotate(running.operator(standby=standby))
    promote(running.operator(), force=True)
    primary = running.rows().in_state(State.PRIMARY)
    assert primary is not None
    running.tamper(primary.id, standby_provider=None, standby_master_key=None, standby_wrapped_key=None)
    found = check(running.engine, settings(), running.kms)
    assert levels(found)["master key"] == WARNING
    (finding,) = [finding for finding in of(found, "master key") if finding.level is WARNING]
    assert running.key_id(State.PRIMARY) in finding.message
    assert "kravn-crypto standby add" in finding.advice


# --- The rights ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    name = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}[request.param]
    with ExitStack() as stack:
        yield Server(request.getfixturevalue(name), stack)


@pytest.fixture
def served(server: Server, tmp_path: Path) -> Deployment:
    """Give a deployment in a database with the roles of the documentation."""
    made = Deployment(server.owner, tmp_path)
    made.open()
    return made


def test_a_process_that_serves_has_the_rights_that_it_needs(
    server: Server, served: Deployment, settings: Callable[..., Settings]
) -> None:
    found = check(server.user("kravn_application"), settings(), served.kms)
    # What only the commands read is not for it to read, and so not to be found out.
    assert levels(found)["grants"] == GOOD
    assert "can start" in said(found, "key store")
    assert BAD not in levels(found).values()
    assert levels(check(server.user("kravn_application", "kravn_reader"), settings(), served.kms)) == dict.fromkeys(
        EVERY_SUBJECT, GOOD
    )


def test_who_only_reads_leaves_no_record(server: Server, served: Deployment, settings: Callable[..., Settings]) -> None:
    found = check(server.user("kravn_reader"), settings(), served.kms)
    assert levels(found) == dict.fromkeys(EVERY_SUBJECT, GOOD) | {"grants": WARNING}
    assert "INSERT, UPDATE, DELETE on kms_replicas" in said(found, "grants")
    assert "INSERT, UPDATE on kms_columns" in said(found, "grants")


def test_who_may_not_read_the_keys_cannot_start(
    server: Server, served: Deployment, settings: Callable[..., Settings]
) -> None:
    found = check(server.user("kravn_heartbeat"), settings(), served.kms)
    assert [levels(found)[subject] for subject in ("grants", "key store")] == [BAD, WARNING]
    assert said(found, "key store").startswith("Not checked: ")


@pytest.mark.parametrize("provision", ["auto", "never"])
def test_a_first_boot_needs_more(
    server: Server, tmp_path: Path, settings: Callable[..., Settings], provision: str
) -> None:
    kms = VersionedKMS()
    Deployment(server.owner, tmp_path)
    found = check(server.user("kravn_application"), settings(kms_provision=provision), kms)
    assert levels(found)["grants"] == (BAD if provision == "auto" else GOOD)
    if provision == "auto":
        assert "INSERT, UPDATE on kms_keys" in said(found, "grants")
        assert "SELECT, INSERT on kms_events" in said(found, "grants")
    both = server.user("kravn_application", "kravn_first_boot")
    assert levels(check(both, settings(kms_provision=provision), kms))["grants"] == GOOD


def test_the_fence_takes_the_right_to_lock(
    server: Server, served: Deployment, settings: Callable[..., Settings]
) -> None:
    reader = server.user("kravn_reader")
    found = check(reader, settings(fence="transaction"), served.kms)
    assert (BAD in [finding.level for finding in of(found, "grants")]) is server.is_postgresql
    application = server.user("kravn_application")
    assert levels(check(application, settings(fence="transaction"), served.kms))["grants"] == GOOD


def test_a_file_that_may_only_be_read(
    sqlite_deployment: Deployment, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    reader = create_engine(f"sqlite:///file:{tmp_path / 'test.db'}?mode=ro&uri=true")
    found = check(reader, settings(), sqlite_deployment.kms)
    assert levels(found) == dict.fromkeys(EVERY_SUBJECT, GOOD) | {"grants": WARNING}
    assert "readonly" in said(found, "grants")
    reader.dispose()


# --- The clock, and the isolation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead", "level", "word"),
    [(0, GOOD, "less than"), (50, GOOD, "less than"), (120, WARNING, "behind"), (-120, WARNING, "ahead"),
     (600, BAD, "10 minutes behind"), (-7200, BAD, "2 hours ahead")],
)  # fmt: skip
def test_the_clock_of_the_database(
    database_url: str, settings: Callable[..., Settings], ahead: float, level: Level, word: str
) -> None:
    clock = DatabaseClock(database_url)
    clock.pass_((datetime.now(UTC) + timedelta(seconds=ahead + (1 if ahead > 0 else -1)) - BEGINNING).total_seconds())
    engine = clock.connected()
    (finding,) = of(check(engine, settings()), "clock")
    assert finding.level is level
    assert word in finding.message
    engine.dispose()
    clock.dispose()


def test_the_isolation_by_default(postgres_url: str, settings: Callable[..., Settings]) -> None:
    for level, is_stale in {"READ COMMITTED": False, "REPEATABLE READ": True}.items():
        option = f"-c default_transaction_isolation={level.lower().replace(' ', chr(92) + ' ')}"
        engine = create_engine(postgres_url, connect_args={"options": option})
        found = said(check(engine, settings()), "isolation")
        assert level in found
        assert ("KRAVN_LEASE" in found) is is_stale
        engine.dispose()
