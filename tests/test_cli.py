"""The command line, as an operator uses it: processes, exit codes, lines."""

import json
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from sqlalchemy import NullPool, create_engine, text

from sqlalchemy_kravn_crypto.cli import app
from sqlalchemy_kravn_crypto.commands.setup import print_provisioned
from sqlalchemy_kravn_crypto.keystore import KeyStore
from sqlalchemy_kravn_crypto.migrate import migrate
from tests.fixtures_postgres import asynchronous
from tests.misbehaving_kms import MisbehavingKMS
from tests.openbao import OpenBao
from tests.processes import environment_with

DOCS = Path(__file__).parents[1] / "docs"
SECRET = "MARKER-of-the-secret-with-enough-characters"
MODELS = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy_kravn_crypto import EncryptedJSON

class Base(DeclarativeBase):
    pass

class Plugin(Base):
    __tablename__ = "plugin"
    id: Mapped[int] = mapped_column(primary_key=True)
    credentials: Mapped[dict | None] = mapped_column(EncryptedJSON)
"""

Result = subprocess.CompletedProcess[str]
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a command in an empty directory, with these KRAVN_* variables and no others."""

    def command(*arguments: str, url: str | None = None, **variables: str) -> Result:
        environment = environment_with(variables)
        if url is not None:
            environment["DATABASE_URL"] = url
        command_line = [sys.executable, "-m", "sqlalchemy_kravn_crypto", *arguments]
        return subprocess.run(
            command_line, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
        )

    return command


def lines(result: Result) -> list[str]:
    return result.stdout.splitlines()


def fails(result: Result, *words: str) -> None:
    """See that a command ended with one line and exit code 1."""
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Error: ")
    assert all(word in result.stderr for word in words)
    assert "MARKER" not in result.stderr


def test_from_nothing_to_a_status_that_is_well(run: Run, database_url: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert run("migrate", "--url", database_url).returncode == 0
    made = run("provision", "--new-database", url=database_url, SECRET=SECRET)
    assert made.returncode == 0, made.stderr
    key_id, state, provider = lines(made)[0].split()
    assert (len(key_id), state, provider) == (16, "primary", "none")
    assert lines(run("provision", "--new-database", url=database_url, SECRET=SECRET)) == lines(made)
    status = run("status", url=database_url, SECRET=SECRET)
    assert status.returncode == 0
    assert any(line.startswith(f"data key:      {key_id} primary none secret 20") for line in lines(status))
    assert f"secret.key:    {tmp_path / 'data' / 'secret.key'}" in lines(status)
    assert "MARKER" not in status.stdout


def test_status_as_json(run: Run, sqlite_url: str) -> None:
    run("migrate", "--url", sqlite_url)
    before = run("status", "--json", url=sqlite_url, SECRET=SECRET)
    assert before.returncode == 1
    assert [problem["error"] for problem in json.loads(before.stdout)["problems"]] == ["NotProvisionedError"]
    run("provision", "--new-database", url=sqlite_url, SECRET=SECRET)
    found = json.loads(run("status", "--json", url=sqlite_url, SECRET=SECRET).stdout)
    assert str(uuid.UUID(found["deployment_id"])) == found["deployment_id"]
    assert (found["provider"], found["epoch"], found["problems"]) == ("none", 1, [])
    assert [(key["state"], key["provider"]) for key in found["keys"]] == [("primary", "none")]


def test_an_asynchronous_driver_in_the_url_does_as_well(run: Run, database_url: str) -> None:
    url = asynchronous(database_url)
    assert run("migrate", url=url).returncode == 0
    assert run("provision", "--new-database", url=url, SECRET=SECRET).returncode == 0
    assert run("status", url=url, SECRET=SECRET).returncode == 0


def test_migrate_prints_sql_without_a_database(run: Run) -> None:
    printed = run("migrate", "--sql", "--url", "postgresql://nobody@nowhere/none")
    assert printed.returncode == 0
    assert "CREATE TABLE kms_keys" in printed.stdout
    assert printed.stderr == ""


def test_provision_looks_for_old_data_in_the_models_that_it_is_told_of(
    run: Run, sqlite_url: str, tmp_path: Path
) -> None:
    (tmp_path / "app_models.py").write_text(MODELS)
    run("migrate", "--url", sqlite_url)
    engine = create_engine(sqlite_url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE plugin (id INTEGER PRIMARY KEY, credentials BLOB)"))
        connection.execute(text("INSERT INTO plugin VALUES (1, x'4d41524b4552')"))
    arguments = ("provision", "--metadata", "app_models:Base")
    fails(run(*arguments, url=sqlite_url, SECRET=SECRET), "plugin.credentials", "not encrypted")
    fails(run("provision", url=sqlite_url, SECRET=SECRET), "--metadata", "--new-database")
    fails(run("provision", "--metadata", "app_models:Nope", url=sqlite_url, SECRET=SECRET), "app_models:Nope")
    fails(run("provision", "--metadata", "nowhere:Base", url=sqlite_url, SECRET=SECRET), "nowhere")
    fails(run("provision", "--metadata", "app_models:Plugin.id", url=sqlite_url, SECRET=SECRET), "Plugin.id")
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM plugin"))
    assert run(*arguments, url=sqlite_url, SECRET=SECRET).returncode == 0


def test_with_a_kms_that_authenticates_nothing_provision_says_what_to_pin(
    sqlite_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = create_engine(sqlite_url)
    migrate(engine)
    oaep = MisbehavingKMS(name="azure", authenticates=False, binds=False)
    store = KeyStore(provider=oaep, secret=None, secret_file=tmp_path / "secret.key")
    rows, _ = store.provision(engine, pin_later=True)
    print_provisioned(rows)
    (key,) = rows.keys
    assert f"KRAVN_KMS_PINNED_KEYS={key.key_id}" in capsys.readouterr().out
    engine.dispose()


def test_vault_from_the_environment(run: Run, sqlite_url: str, openbao: OpenBao) -> None:
    variables = {
        "SECRET": SECRET,
        "KMS_PROVIDER": "vault",
        "KMS_VAULT_ADDR": openbao.address,
        "KMS_VAULT_TOKEN": openbao.token,
        "KMS_VAULT_KEY": openbao.key,
    }
    run("migrate", "--url", sqlite_url)
    assert run("provision", "--new-database", url=sqlite_url, **variables).returncode == 0
    status = run("status", url=sqlite_url, **variables)
    assert status.returncode == 0
    assert f"primary vault transit/{openbao.key}:v1" in status.stdout
    down = run("status", url=sqlite_url, **(variables | {"KMS_VAULT_ADDR": "http://127.0.0.1:1"}))
    assert down.returncode == 1
    assert "primary vault" in down.stdout
    assert "problem:       ProviderUnavailableError" in down.stdout
    for shown in (status, down):
        assert openbao.token not in shown.stdout + shown.stderr
        assert "MARKER" not in shown.stdout + shown.stderr


def test_status_says_what_is_wrong_with_the_settings(run: Run, sqlite_url: str) -> None:
    run("migrate", "--url", sqlite_url)
    result = run("status", url=sqlite_url, KMS_VAULT_KEYS="MARKER")
    assert result.returncode == 1
    assert "KRAVN_KMS_VAULT_KEYS" in result.stdout
    assert "KRAVN_KMS_VAULT_KEY." not in result.stdout.replace("KRAVN_KMS_VAULT_KEY?", "")
    assert "MARKER" not in result.stdout


def test_errors_are_one_line_and_debug_gives_the_traceback(run: Run, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'none.db'}"
    fails(run("provision", "--new-database", url=url, SECRET=SECRET), "kravn-crypto migrate")
    debugged = run("provision", "--new-database", "--debug", url=url, SECRET=SECRET)
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr
    assert "TableMissingError" in debugged.stderr
    assert "MARKER" not in debugged.stderr


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("postgresql+psycopg://user:MARKER@127.0.0.1:1/none", "refused"),
        ("nosuchdatabase://user:MARKER@host/none", "nosuchdatabase"),
        ("MARKER", "URL"),
        ("postgresql+pg8000://user:MARKER@host/none", "pg8000"),
    ],
)
def test_a_database_that_is_not_to_be_had_is_one_line_too(run: Run, url: str, word: str) -> None:
    fails(run("migrate", "--url", url), word)


def test_without_a_url_the_command_says_where_it_comes_from(run: Run) -> None:
    result = run("status")
    assert result.returncode == 2
    assert "--url" in result.stderr
    assert "DATABASE_URL" in result.stderr


def test_the_demo_shows_the_main_job_and_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    # Not even the settings of a deployment get in its way.
    result = run("demo", KMS_PROVIDER="vault", SECRET=SECRET)
    assert result.returncode == 0, result.stderr
    shown = result.stdout
    assert "credentials f902" in shown
    assert "{'user': 'reporting', 'token': 's3cr3t-t0k3n', 'scopes': ['read', 'export']}" in shown
    assert "AuthenticationError" in shown
    assert "WrongColumnError" in shown
    assert list(tmp_path.iterdir()) == []
    assert result.stderr == ""


# --- What is documented ----------------------------------------------------------------------------------------------


def commands() -> dict[str, set[str]]:
    """Return every command with its options."""
    found: dict[str, set[str]] = {}

    def add(command: Any, *names: str) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            add(inner, *names, name)
        if not hasattr(command, "commands"):
            options = [option for option in command.params if option.param_type_name == "option"]
            found[" ".join(names)] = {name for option in options for name in (*option.opts, *option.secondary_opts)}

    add(typer.main.get_command(app))
    return found


def test_help_names_every_command(run: Run) -> None:
    shown = run("--help").stdout
    assert len(commands()) == 19
    assert all(command.split()[0] in shown for command in commands())


def test_every_command_is_documented_with_its_options_and_an_example() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^### ([a-z -]+)\n(.*?)(?=^##|\Z)", page, flags=re.MULTILINE | re.DOTALL))
    assert documented.keys() == commands().keys()
    for command, options in commands().items():
        listed = documented[command].rpartition("Options:")[2]
        assert set(re.findall(r"`(--[a-z-]+)`", listed)) == options, command
        assert re.search(rf"^    .*kravn-crypto {command}\b", documented[command], flags=re.MULTILINE), command


def test_no_page_tells_of_a_command_or_an_option_that_is_not_there() -> None:
    names = sorted(commands(), key=len, reverse=True)
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    found = 0
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for said in re.findall(r"(?<![\w/\"-])kravn-crypto ([a-z][^`\n|;&]*)", text):
            command = next((name for name in names if re.match(rf"{name}(?![\w-])", said)), None)
            assert command is not None or said.startswith("standby"), f"{page.name}: kravn-crypto {said}"
            options = set(re.findall(r"(?<!\S)--[a-z-]+", said)) - {"--help"}
            assert options <= commands().get(command or "", set()), f"{page.name}: kravn-crypto {said}"
            found += 1
    assert found > 40
