"""The commands of a key's life, as an operator gives them: what they print, where to, and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from sqlalchemy import Engine, create_engine, select, text
from typer.testing import CliRunner, Result

from sqlalchemy_kravn_crypto.ciphertext import ColumnName
from sqlalchemy_kravn_crypto.cli import app
from sqlalchemy_kravn_crypto.commands.running import reporting
from sqlalchemy_kravn_crypto.configuration import operator
from sqlalchemy_kravn_crypto.events import Event, read_events
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from sqlalchemy_kravn_crypto.known_columns import KnownColumn, record
from sqlalchemy_kravn_crypto.replicas import beat, new_replica_id
from sqlalchemy_kravn_crypto.rows import StoredRows, connect, read_rows
from sqlalchemy_kravn_crypto.schema import TABLES
from tests.fixtures_postgres import asynchronous
from tests.openbao import OpenBao

SECRET = "MARKER-of-the-secret-with-enough-characters"
NEXT_SECRET = "MARKER-of-the-next-secret-with-enough-characters"
MODELS = """
from sqlalchemy import Column, Integer, MetaData, Table
from sqlalchemy_kravn_crypto import EncryptedJSON

metadata = MetaData()
Table("cli_note", metadata, Column("id", Integer, primary_key=True), Column("content", EncryptedJSON))
"""
METADATA = ("--metadata", "models_of_the_command_line:metadata")
LABEL = "cli_note.content"


class CommandLine:
    """A deployment whose settings are in the environment, and the commands on it, in this process."""

    def __init__(self, url: str, environment: pytest.MonkeyPatch) -> None:
        self.engine = create_engine(url)
        self._environment = environment
        self._secrets = {SECRET, NEXT_SECRET}
        environment.setenv("DATABASE_URL", url)
        self.set(SECRET=SECRET, LEASE="0.2", LOOK_INTERVAL="0.1")

    def set(self, **variables: str) -> None:
        for name, value in variables.items():
            self._environment.setenv(f"KRAVN_{name}", value)
            if name.endswith("_TOKEN"):
                self._secrets.add(value)

    def set_vault(self, openbao: OpenBao, *, prefix: str = "", **other: str) -> None:
        settings = openbao.settings() | other
        named = {f"KMS_VAULT_{'ADDR' if name == 'address' else name.upper()}": settings[name] for name in settings}
        self.set(**{prefix + name: value for name, value in (named | {"KMS_PROVIDER": "vault"}).items()})

    def unset(self, *names: str) -> None:
        for name in names:
            self._environment.delenv(f"KRAVN_{name}")

    # --- Commands ---

    def run(self, *arguments: str) -> Result:
        result = CliRunner().invoke(app, arguments)
        shown = result.stdout + result.stderr
        assert not [secret for secret in self._secrets if secret in shown]
        assert "MARKER" not in shown
        with connect(self.engine) as connection:
            for row in read_rows(connection).keys:
                hidden = (row.wrapped_key, row.standby_wrapped_key, row.key_check, row.row_mac)
                assert not [value for value in hidden if value is not None and value in shown]
        return result

    def do(self, *arguments: str) -> str:
        """Run a command that must succeed, and return what it prints."""
        result = self.run(*arguments)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.do(*arguments, "--json"))

    def refused(self, *arguments: str) -> str:
        """Run a command that must refuse: one line, exit code 1, and nothing changed."""
        before = self.everything()
        result = self.run(*arguments)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert isinstance(result.exception, SystemExit)
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ")
        assert self.everything() == before
        return line

    def could(self, *arguments: str) -> Any:
        """Run a command with ``--dry-run``: it succeeds, and nothing has changed."""
        before = self.everything()
        found = self.json(*arguments, "--dry-run")
        assert self.everything() == before
        assert found["dry_run"] is True
        return found

    # --- What is there ---

    def rows(self) -> StoredRows:
        with connect(self.engine) as connection:
            return read_rows(connection)

    def events(self) -> list[Event]:
        with connect(self.engine) as connection:
            rows = read_rows(connection)
            return read_events(connection, rows.in_control().events_hash)

    def everything(self) -> tuple[StoredRows, list[Event], list[Any], dict[str, int]]:
        with self.engine.connect() as connection:
            columns = [tuple(row) for row in connection.execute(select(TABLES.columns))]
        return self.rows(), self.events(), columns, self.values()

    def key_id(self, state: str) -> str:
        """Return the key in a state; of several, the last that was made."""
        return [row.required("key_id") for row in self.rows().keys if row.state.value == state][-1]

    def put(self, *numbers: int, under: Keyring | None = None) -> None:
        keyring = under or operator(self.engine).store.open(self.engine).keyring
        name = ColumnName(LABEL)
        with self.engine.begin() as connection:
            for number in numbers:
                values = {"id": number, "content": keyring.encrypt(f'\x01{{"n":{number}}}'.encode(), name)}
                connection.execute(text("INSERT INTO cli_note VALUES (:id, :content)"), values)

    def values(self) -> dict[str, int]:
        """Count the values by their key ids."""
        counts: dict[str, int] = {}
        with self.engine.connect() as connection:
            for frame in connection.scalars(text("SELECT content FROM cli_note")):
                key_id = bytes(frame)[2:10].hex()
                counts[key_id] = counts.get(key_id, 0) + 1
        return counts

    def recorded_besides(self, column: KnownColumn) -> None:
        with self.engine.begin() as connection:
            record(connection, [column])

    def heartbeat(self, *key_ids: str) -> None:
        with self.engine.begin() as connection:
            beat(
                connection,
                new_replica_id(),
                epoch=1,
                primary_key_id=key_ids[0],
                key_ids=key_ids,
                mac_key_ids=[],
                lease=3600,
            )


def with_tables(engine: Engine) -> None:
    kind = "BYTEA" if engine.dialect.name == "postgresql" else "BLOB"
    TABLES.keys.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE cli_note (id INTEGER PRIMARY KEY, content {kind})"))


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], CommandLine]]:
    """Give a command line on a database, in mode ``none``."""
    made: list[CommandLine] = []
    (tmp_path / "models_of_the_command_line.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def connect_to(url: str) -> CommandLine:
        made.append(CommandLine(url, monkeypatch))
        with_tables(made[-1].engine)
        return made[-1]

    yield connect_to
    for command_line in made:
        command_line.engine.dispose()


@pytest.fixture
def bare(connected: Callable[[str], CommandLine], database_url: str) -> CommandLine:
    """Give a deployment without a KMS, on each database."""
    command_line = connected(database_url)
    command_line.do("provision", "--new-database")
    return command_line


@pytest.fixture
def cli(connected: Callable[[str], CommandLine], database_url: str, openbao: OpenBao) -> CommandLine:
    """Give a deployment with a key in OpenBao, on each database."""
    command_line = connected(database_url)
    command_line.set_vault(openbao)
    command_line.do("provision", "--new-database")
    return command_line


@pytest.fixture
def lite(connected: Callable[[str], CommandLine], sqlite_url: str, openbao: OpenBao) -> CommandLine:
    """Give the same where the database makes no difference."""
    command_line = connected(sqlite_url)
    command_line.set_vault(openbao)
    command_line.do("provision", "--new-database")
    return command_line


# --- From the first key to the destruction of it ---------------------------------------------------------------------


def test_the_whole_life_of_a_key(cli: CommandLine) -> None:
    old = cli.key_id("primary")
    cli.put(*range(1, 26))
    assert cli.could("rotate")["key"] is None
    made = cli.json("rotate", "--reason", "the yearly rotation", "--actor", "alice")["key"]
    new = cli.key_id("pending")
    assert (made["key_id"], made["state"], made["provider"]) == (new, "pending", "vault")
    assert "pending already" in cli.refused("rotate")

    cli.could("promote")
    assert f"Data key {new} is primary" in cli.do("promote")
    assert (cli.key_id("primary"), cli.key_id("retired")) == (new, old)

    assert cli.could("rekey", *METADATA)["left"] == {LABEL: 25}
    assert "25 values are under" not in cli.refused("disable", new, *METADATA)
    assert f"25 values were moved to data key {new}." in cli.do("rekey", *METADATA, "--batch-size", "10")
    assert cli.values() == {new: 25}

    # The column is on record by now.
    assert f"values:        {LABEL} {new} primary 25" in cli.do("census").splitlines()
    cli.could("census")
    disabled = cli.run("disable", old)
    assert (disabled.exit_code, disabled.stdout) == (0, f"Data key {old} is disabled.\n")
    assert "a second count must find nothing either" in disabled.stderr
    cli.could("enable", old)
    assert cli.json("enable", old)["key"]["state"] == "retired"
    assert cli.json("disable", old)["key"]["state"] == "disabled"

    assert "--reason" in cli.refused("destroy", old, "--backups-expired")
    assert "--backups-expired" in cli.refused("destroy", old, "--reason", "no value is left")
    arguments = ("destroy", old, "--reason", "no value is left", "--backups-expired")
    assert "7 days" in cli.refused(*arguments)
    cli.set(DESTROY_AFTER_DAYS="0")
    cli.could(*arguments)
    assert cli.do(*arguments) == f"Data key {old} is destroyed.\n"
    row = cli.rows().key(old)
    assert row is not None
    assert row.wrapped_key is None

    evidence = json.loads(cli.do("evidence", old))
    assert (evidence["key_id"], evidence["state"], evidence["has_wrapped_key"]) == (old, "destroyed", False)
    assert [event["action"] for event in evidence["events"]][-1] == "destroy"
    assert evidence["events"][-1]["reason"] == "no value is left"
    rotated = json.loads(cli.do("evidence", new))["events"][0]
    assert (rotated["action"], rotated["actor"], rotated["reason"]) == ("rotate", "alice", "the yearly rotation")


def test_a_value_can_be_shredded_at_once(lite: CommandLine) -> None:
    old = lite.key_id("primary")
    lite.put(1)
    lite.do("rotate")
    lite.do("promote")
    lite.do("census", *METADATA)
    lite.could("destroy", old, "--now", "--reason", "the customer left")
    lite.do("destroy", old, "--now", "--reason", "the customer left")
    assert lite.events()[-1].details["now"] is True
    assert lite.values() == {old: 1}
    assert f"values:        {LABEL} {old} destroyed 1" in lite.do("census").splitlines()


# --- promote ---------------------------------------------------------------------------------------------------------


def test_promote_names_who_does_not_hold_the_key(lite: CommandLine) -> None:
    lite.do("rotate")
    lite.heartbeat(lite.key_id("primary"))
    assert f"process {os.getpid()} on " in lite.refused("promote")
    assert f"process {os.getpid()} on " in lite.refused("promote", "--dry-run")
    assert "waits for process" in lite.do("status")
    assert "seconds" in lite.refused("promote", "--after", "3600")
    lite.could("promote", "--after", "0")
    assert "contradict" in lite.refused("promote", "--after", "0", "--force")
    new = lite.key_id("pending")
    keys = {key["key_id"]: key["state"] for key in lite.json("promote", "--force")["keys"]}
    assert keys[new] == "primary"
    assert "No data key is pending" in lite.refused("promote")


# --- rekey -----------------------------------------------------------------------------------------------------------


def rotated(cli: CommandLine) -> None:
    cli.do("rotate")
    cli.do("promote")


def test_rekey_fails_while_anything_is_left_and_says_what(cli: CommandLine) -> None:
    cli.put(1, 2)
    cli.put(3, under=Keyring(DataKey(b"?" * 32)))
    rotated(cli)
    result = cli.run("rekey", *METADATA)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"2 values were moved to data key {cli.key_id('primary')}.",
        f'unreadable:    {LABEL} ["3"] UnknownKeyError',
        f"left:          {LABEL} 1",
    ]
    again = cli.run("rekey", "--json")
    assert again.exit_code == 1
    found = json.loads(again.stdout)
    assert (found["is_complete"], found["rekeyed"], found["left"]) == (False, 0, {LABEL: 1})
    assert found["unreadable"] == [{"column": LABEL, "key": ["3"], "error": "UnknownKeyError"}]


def test_rekey_refuses_until_a_column_that_is_gone_is_forgotten(cli: CommandLine) -> None:
    cli.put(1)
    rotated(cli)
    cli.recorded_besides(KnownColumn("", "gone", "secret", "binary", "gone.secret"))
    assert "gone.secret" in cli.refused("rekey", *METADATA)
    counted = cli.run("census", "--dry-run", *METADATA)
    assert counted.exit_code == 1
    assert "unreachable:   gone.secret" in counted.stdout
    assert "not on record" in cli.refused("forget-column", "gone.nothing")
    cli.could("forget-column", "gone.secret")
    assert cli.do("forget-column", "gone.secret") == "gone.secret is off the record.\n"
    assert cli.events()[-1].details == {"schema": "", "table": "gone", "column": "secret"}
    assert cli.json("rekey", *METADATA)["is_complete"] is True


@pytest.mark.parametrize(
    "column",
    [
        KnownColumn("tenant", "gone", "secret", "binary", "gone.secret"),
        KnownColumn("", "with.dots", "se.cret", "binary", "x.y"),
    ],
)
def test_a_column_is_forgotten_by_what_status_calls_it(lite: CommandLine, column: KnownColumn) -> None:
    lite.recorded_besides(column)
    (shown,) = [line for line in lite.do("status").splitlines() if line.startswith("column:")]
    forgotten = lite.json("forget-column", shown.removeprefix("column:").strip())
    assert (forgotten["schema"], forgotten["table"], forgotten["column"]) == column.place


def test_a_label_of_two_columns_is_neither(lite: CommandLine) -> None:
    for schema, table in (("a", "b"), ("", "a.b")):
        lite.recorded_besides(KnownColumn(schema, table, "c", "binary", "c"))
    assert "more than one column" in lite.refused("forget-column", "a.b.c")


def test_rekey_in_shares(cli: CommandLine) -> None:
    cli.put(*range(1, 9))
    rotated(cli)
    assert [cli.json("rekey", *METADATA, "--shard", f"{number}/3")["is_complete"] for number in (1, 2, 3)] == [True] * 3
    assert cli.values() == {cli.key_id("primary"): 8}
    for wrong in ("0/3", "4/3", "3", "a/b", "-1/3", "1/3/4"):
        assert f"--shard {wrong} is not" in cli.refused("rekey", f"--shard={wrong}")


def test_rekey_goes_no_faster_than_it_is_told(lite: CommandLine) -> None:
    assert lite.run("rekey", "--max-rows-per-second", "0").exit_code == 2
    assert lite.run("rekey", "--batch-size", "0").exit_code == 2
    lite.put(*range(1, 5))
    rotated(lite)
    lite.do("rekey", *METADATA, "--max-rows-per-second", "1000")


def test_progress_is_on_standard_error_and_the_result_alone_on_standard_output(lite: CommandLine) -> None:
    lite.put(1, 2, 3)
    rotated(lite)
    result = lite.run("rekey", *METADATA, "--json", "--batch-size", "2")
    assert json.loads(result.stdout)["rekeyed"] == 3
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("rekey: 1 of 3 values")
    assert last.startswith("rekey: 3 of 3 values")


def test_tenants_in_schemas_of_their_own(
    connected: Callable[[str], CommandLine], postgres_url: str, openbao: OpenBao
) -> None:
    cli = connected(postgres_url)
    cli.set_vault(openbao)
    cli.do("provision", "--new-database")
    cli.put(1, 2)
    with cli.engine.begin() as connection:
        for schema in ("one", "two"):
            connection.execute(text(f"CREATE SCHEMA {schema}"))
            connection.execute(text(f"CREATE TABLE {schema}.cli_note AS TABLE public.cli_note"))
            connection.execute(text(f"ALTER TABLE {schema}.cli_note ADD PRIMARY KEY (id)"))
    rotated(cli)
    assert "three" in cli.refused("rekey", *METADATA, "--schemas", "one,three")
    assert cli.json("rekey", *METADATA, "--schemas", "one, two")["rekeyed"] == 6
    # From now on they are on record.
    assert [column["column"] for column in cli.json("census")["columns"]] == [LABEL, f"one.{LABEL}", f"two.{LABEL}"]


def test_an_asynchronous_driver_does_as_well(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.put(1, 2)
    url = cli.engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("DATABASE_URL", asynchronous(url))
    rotated(cli)
    assert cli.json("rekey", *METADATA)["rekeyed"] == 2
    assert cli.json("status")["problems"] == []


# --- Master keys and secrets -----------------------------------------------------------------------------------------


def test_rewrap_brings_the_keys_under_the_newest_version(lite: CommandLine, openbao: OpenBao) -> None:
    key = f"cli-{uuid.uuid4().hex}"
    openbao.create_key(key)
    with lite.engine.begin() as connection:
        for table in (TABLES.keys, TABLES.events):
            connection.execute(table.delete())
    lite.set_vault(openbao, key=key, token=openbao.issue_token(key))
    lite.do("provision", "--new-database")
    openbao.rotate(key)
    primary = lite.key_id("primary")
    assert lite.could("rewrap")["keys"] == [
        {"key_id": primary, "before": f"transit/{key}:v1", "after": f"transit/{key}:v1"}
    ]
    assert lite.do("rewrap").split() == ["data", "key:", primary, f"transit/{key}:v1", f"transit/{key}:v2"]
    openbao.set_min_decryption_version(2, key)
    assert lite.json("status")["problems"] == []


def second_site(openbao: OpenBao) -> dict[str, str]:
    """Make another mount with a master key of its own, and return how a provider gets at it."""
    key, mount = f"cli-{uuid.uuid4().hex}", f"second-{uuid.uuid4().hex}"
    openbao.mount(mount)
    openbao.create_key(key, mount=mount)
    return {"key": key, "mount": mount, "token": openbao.issue_token(key, mount=mount)}


def test_a_standby_from_its_addition_to_the_switch_and_the_removal_of_the_first(
    lite: CommandLine, openbao: OpenBao
) -> None:
    second = second_site(openbao)
    first = {"mount": "transit", "key": openbao.key, "token": openbao.token}
    version = f"{second['mount']}/{second['key']}:v1"
    assert "KRAVN_STANDBY_KMS_PROVIDER" in lite.refused("standby", "add")
    lite.set_vault(openbao, prefix="STANDBY_", **second)
    lite.could("standby", "add")
    added = lite.json("standby", "add", "--reason", "a second site")["keys"]
    assert [key["after"] for key in added] == [version]
    assert f"vault {version}" in lite.do("status")

    # A new key gets a wrap by both, and would not without the settings of the second.
    lite.set(STANDBY_KMS_PROVIDER="none")
    assert "standby" in lite.refused("rotate")
    lite.set(STANDBY_KMS_PROVIDER="vault")
    assert lite.json("rotate")["key"]["standby_master_key"] == version

    assert "deploy its settings" in lite.refused("standby", "switch")
    lite.set_vault(openbao, **second)
    lite.set_vault(openbao, prefix="STANDBY_", **first)
    lite.could("standby", "switch")
    switched = lite.json("standby", "switch")["keys"]
    assert {key["master_key"] for key in switched if key["state"] != "retired"} == {version}
    lite.could("standby", "remove")
    lite.do("standby", "remove")
    assert {key["standby_master_key"] for key in lite.json("status")["keys"]} == {None}
    assert [event.action for event in lite.events()][-2:] == ["standby-switch", "standby-remove"]


def test_a_lost_kms_is_not_asked(lite: CommandLine, openbao: OpenBao) -> None:
    second = second_site(openbao)
    lite.set_vault(openbao, prefix="STANDBY_", **second)
    lite.do("standby", "add")
    lite.set_vault(openbao, **second)
    lite.set_vault(openbao, prefix="STANDBY_", mount="transit", address="http://127.0.0.1:1")
    assert "could not be reached" in lite.refused("standby", "switch")
    lite.unset("STANDBY_KMS_PROVIDER")
    switched = lite.json("standby", "switch", "--lost", "--reason", "the site burnt down")["keys"]
    assert {key["standby_master_key"] for key in switched} == {None}
    assert lite.json("status")["problems"] == []


def test_a_new_secret_without_a_kms(bare: CommandLine) -> None:
    bare.put(1, 2, 3)
    assert "rotate-secret" in bare.refused("rotate")
    assert "KRAVN_SECRET_NEXT" in bare.refused("rotate-secret")
    bare.set(SECRET_NEXT=NEXT_SECRET)
    bare.could("rotate-secret")
    bare.heartbeat(bare.key_id("primary"))
    assert "not yet set for process" in bare.refused("rotate-secret")
    shown = bare.do("rotate-secret", "--force")
    assert f"Data key {bare.key_id('pending')} is pending." in shown
    bare.do("promote", "--force")
    bare.set(SECRET=NEXT_SECRET, SECRET_RETIRED=SECRET)
    bare.unset("SECRET_NEXT")
    assert bare.json("rekey", *METADATA)["is_complete"] is True
    assert bare.values() == {bare.key_id("primary"): 3}
    bare.unset("SECRET_RETIRED")
    assert "BootstrapKeyError" in bare.run("status").stdout


# --- status ----------------------------------------------------------------------------------------------------------


def test_status_shows_all_of_it_at_a_glance(cli: CommandLine) -> None:
    old = cli.key_id("primary")
    cli.put(1, 2)
    rotated(cli)
    cli.do("rekey", *METADATA)
    cli.do("disable", old)
    cli.do("rotate")
    new, pending = cli.key_id("primary"), cli.key_id("pending")
    cli.heartbeat(new, pending)
    found = cli.json("status")
    keys = {key["key_id"]: key for key in found["keys"]}
    assert keys[old]["destroyable_at"] > keys[old]["since"]
    assert keys[new]["destroyable_at"] is None
    assert found["pending"] == {"key_id": pending, "is_successor": False, "behind": []}
    (replica,) = found["replicas"]
    assert (replica["is_alive"], replica["process_id"], replica["key_ids"]) == (
        True,
        os.getpid(),
        sorted([new, pending]),
    )
    (rekey,) = found["rekeys"]
    assert (rekey["label"], rekey["key_id"], rekey["rekeyed"], rekey["unfinished"]) == (LABEL, new, 2, 0)
    assert found["columns"] == [LABEL]
    assert found["trail"]["events"] == len(cli.events())
    lines = cli.do("status").splitlines()
    assert any(line.startswith(f"data key:      {old} disabled vault transit/") for line in lines)
    assert f"pending:       {pending} held by every live process" in lines
    assert any(line.startswith(f"rekey:         {LABEL} {new} finished 2 ") for line in lines)
    assert any(line.startswith("process:       ") and f"/{os.getpid()} alive 1 {new} " in line for line in lines)
    assert any(line.startswith(f"audit trail:   verified, {len(cli.events())} events") for line in lines)


def test_a_broken_trail_is_a_problem_of_status_and_keeps_evidence_back(cli: CommandLine) -> None:
    with cli.engine.begin() as connection:
        connection.execute(text("UPDATE kms_events SET actor = 'mallory'"))
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 1
    assert "problem:       AuditTrailError" in result.stdout
    assert json.loads(CliRunner().invoke(app, ["status", "--json"]).stdout)["trail"] is None
    evidence = CliRunner().invoke(app, ["evidence", cli.key_id("primary")])
    assert (evidence.exit_code, evidence.stdout) == (1, "")
    assert "kms_events is broken" in evidence.stderr


def test_what_others_wrote_gives_the_terminal_no_commands(lite: CommandLine) -> None:
    lite.recorded_besides(KnownColumn("", "evil\x1b[2J\ntable", "c", "binary", "c"))
    shown = lite.do("status")
    assert "\x1b" not in shown
    assert "column:        evil\\x1b[2J\\ntable.c" in shown.splitlines()


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_with_the_kms_down_nothing_is_rotated(lite: CommandLine) -> None:
    lite.set(KMS_VAULT_ADDR="http://127.0.0.1:1")
    assert "could not be reached" in lite.refused("rotate")


def test_a_key_that_is_not_there(lite: CommandLine) -> None:
    for command in ("disable", "enable", "evidence"):
        assert "There is no data key 0123456789abcdef" in lite.refused(command, "0123456789abcdef")


def test_debug_leaves_the_error_as_it_is(lite: CommandLine) -> None:
    result = lite.run("enable", "0123456789abcdef", "--debug")
    assert type(result.exception).__name__ == "WrongStateError"


@pytest.mark.parametrize(
    ("models", "words"),
    [("raise RuntimeError('no such tenant')", "RuntimeError: no such tenant"), ("def broken(:", "SyntaxError")],
)
def test_models_that_cannot_be_imported(lite: CommandLine, tmp_path: Path, models: str, words: str) -> None:
    name = f"models_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(models)
    assert words in lite.refused("rekey", "--metadata", f"{name}:Base")


def test_what_nobody_expected_is_one_line_without_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    def command(*, debug: bool) -> int:
        raise ValueError("MARKER")

    with pytest.raises(typer.Exit) as caught:
        reporting(command)(debug=False)
    assert caught.value.exit_code == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "Error: ValueError. Run it again with --debug for what happened and where.\n")
    with pytest.raises(ValueError, match="MARKER"):
        reporting(command)(debug=True)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_database_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, driver: str) -> None:
    monkeypatch.setenv("KRAVN_SECRET", SECRET)
    result = CliRunner().invoke(app, ["rotate", "--url", f"postgresql+{driver}://user:MARKER@127.0.0.1:1/none"])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "MARKER" not in line


# --- On a terminal ---------------------------------------------------------------------------------------------------


def on_terminal(*arguments: str) -> tuple[int, str]:
    """Run a command as a process of its own on a terminal, and return its exit code and what the terminal was sent."""
    leader, follower = os.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
    command = [sys.executable, "-m", "sqlalchemy_kravn_crypto", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=follower, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        sent = b""
        try:
            while chunk := os.read(leader, 65536):
                sent += chunk
        except OSError:  # how Linux says that the other side is closed
            pass
        os.close(leader)
        return process.wait(60), sent.decode()


def test_a_terminal_gets_tables_and_a_bar(bare: CommandLine) -> None:
    bare.put(*range(1, 4))
    bare.set(SECRET_NEXT=NEXT_SECRET)
    bare.do("rotate-secret")
    bare.do("promote")
    code, shown = on_terminal("rekey", *METADATA, "--batch-size", "2")
    assert code == 0, shown
    assert "━" in shown
    assert "3 of 3 values" in shown
    assert f"3 values were moved to data key {bare.key_id('primary')}." in shown
    code, shown = on_terminal("status")
    assert code == 0, shown
    assert "┏" in shown
    assert "may be destroyed" in shown
    assert bare.key_id("retired") in shown
    assert "MARKER" not in shown


def test_a_pipe_gets_lines_from_a_process_of_its_own(bare: CommandLine) -> None:
    bare.put(1)
    command = [sys.executable, "-m", "sqlalchemy_kravn_crypto", "census", *METADATA, "--dry-run"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"values:        {LABEL} {bare.key_id('primary')} primary 1\n"
