"""The doctor on the command line: lines for pipes, colours for terminals, JSON for programs, and exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqlalchemy_kravn_crypto.providers.base import Level
from tests.fixtures_postgres import asynchronous
from tests.openbao import OpenBao

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
SECRET = "MARKER-of-the-secret-with-enough-characters"
Result = subprocess.CompletedProcess[str]
Run = Callable[..., Result]


@pytest.fixture
def environment(tmp_path: Path) -> Callable[..., dict[str, str]]:
    def make(**variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("KRAVN_", "DATABASE_URL"))}
        return kept | {f"KRAVN_{name}": value for name, value in {"SECRET": SECRET, **variables}.items()}

    return make


@pytest.fixture
def run(environment: Callable[..., dict[str, str]], tmp_path: Path) -> Run:
    """Run a command in an empty directory, with these KRAVN_* variables and no others."""

    def command(*arguments: str, url: str | None = None, **variables: str) -> Result:
        given = environment(**variables) | ({} if url is None else {"DATABASE_URL": url})
        command_line = [sys.executable, "-m", "sqlalchemy_kravn_crypto", *arguments]
        return subprocess.run(
            command_line, check=False, capture_output=True, text=True, env=given, cwd=tmp_path, timeout=120
        )

    return command


def vault(openbao: OpenBao, **other: str) -> dict[str, str]:
    return {
        "KMS_PROVIDER": "vault",
        "KMS_VAULT_ADDR": openbao.address,
        "KMS_VAULT_TOKEN": openbao.token,
        "KMS_VAULT_KEY": openbao.key,
        **other,
    }


def levels(result: Result) -> set[str]:
    return {line.split()[0] for line in result.stdout.splitlines()}


def test_in_a_pipe_each_finding_is_a_line_that_begins_with_its_level(run: Run, openbao: OpenBao) -> None:
    result = run("doctor", **vault(openbao))
    assert result.returncode == 0, result.stdout
    assert result.stderr == ""
    assert all(re.fullmatch(r"(good|warning|bad) +[a-z ._-]+: \S.*", line) for line in result.stdout.splitlines())
    assert any(
        line.startswith(f"good     wrap: A key was wrapped under transit/{openbao.key}:v1") for line in lines(result)
    )
    assert "\x1b" not in result.stdout
    assert openbao.token not in result.stdout


def lines(result: Result) -> list[str]:
    return result.stdout.splitlines()


def test_with_warnings_only_the_exit_code_is_0(run: Run) -> None:
    result = run("doctor", COLOUR="red")
    assert levels(result) == {"good", "warning"}
    assert result.returncode == 0


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"KMS_VAULT_ADDR": "http://127.0.0.1:1"}, "bad      reachability: 127.0.0.1:1"),
        ({"KMS_VAULT_KEY": "MARKER/of/a/key"}, "bad      provider: KRAVN_KMS_VAULT_KEY"),
        ({"KMS_VAULT_TOKEN": "MARKER"}, "bad      "),
        ({"KMS_VAULT_AUTH": "MARKER"}, "bad      settings: KRAVN_KMS_VAULT_AUTH"),
    ],
)
def test_with_anything_bad_the_exit_code_is_1(run: Run, openbao: OpenBao, variables: dict[str, str], word: str) -> None:
    result = run("doctor", **vault(openbao, **variables))
    assert result.returncode == 1
    assert word in result.stdout
    assert "Not checked: " in result.stdout
    assert result.stderr == ""
    assert "MARKER" not in result.stdout
    assert openbao.token not in result.stdout


# --- With the database -----------------------------------------------------------------------------------------------


def test_a_deployment_before_and_after_its_first_data_key(run: Run, database_url: str, openbao: OpenBao) -> None:
    variables = vault(openbao)
    empty = run("doctor", url=database_url, **variables)
    assert empty.returncode == 1
    assert "kravn-crypto migrate" in empty.stdout
    run("migrate", "--url", database_url)
    before = run("doctor", "--url", database_url, **variables)
    assert before.returncode == 0, before.stdout
    assert "warning  key store: There is no data key of this KMS yet." in before.stdout
    run("provision", "--new-database", url=database_url, **variables)
    after = run("doctor", "--url", asynchronous(database_url), **variables)
    assert after.returncode == 0, after.stdout
    assert "good     key store: A process can start: the key store is at epoch 1" in after.stdout
    assert f"good     master key: Every wrapped data key is under transit/{openbao.key}" in after.stdout


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("postgresql+psycopg://user:MARKER@127.0.0.1:1/none", "refused"),
        ("postgresql+asyncpg://user:MARKER@127.0.0.1:1/none", "database"),
        ("nosuchdatabase://user:MARKER@host/none", "nosuchdatabase"),
        ("MARKER", "URL"),
        ("postgresql+pg8000://user:MARKER@host/none", "pg8000"),
    ],
)
def test_a_database_that_is_not_to_be_had_keeps_nothing_else_from_being_checked(
    run: Run, openbao: OpenBao, url: str, word: str
) -> None:
    result = run("doctor", "--url", url, **vault(openbao))
    assert result.returncode == 1
    (line,) = [line for line in lines(result) if line.startswith("bad ")]
    assert line.startswith("bad      database: ")
    assert word in line
    assert "good     unwrap: " in result.stdout
    assert result.stderr == ""
    assert "MARKER" not in result.stdout


# --- For programs, and for people ------------------------------------------------------------------------------------


def documented() -> tuple[dict[str, Any], set[str]]:
    """Return the example of the page, and the subjects that it names."""
    section = PAGE.read_text(encoding="utf-8").partition("\n### doctor\n")[2].partition("\n### ")[0]
    (example,) = re.findall(r"^```json\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    (subjects,) = re.findall(r"^\| `findings\[\]\.subject` \| (.*?);", section, flags=re.MULTILINE)
    fields = set(re.findall(r"^\| `([a-z.\[\]]+)` \|", section, flags=re.MULTILINE))
    found = json.loads(example)
    assert fields == {*found, *(f"findings[].{name}" for name in found["findings"][0])}
    return found, set(re.findall(r"`([a-z. ]+)`", subjects))


@pytest.mark.parametrize("is_up", [True, False])
def test_json_is_as_it_is_documented(run: Run, openbao: OpenBao, sqlite_url: str, is_up: bool) -> None:  # noqa: FBT001
    example, subjects = documented()
    run("migrate", "--url", sqlite_url)
    other = {} if is_up else {"KMS_VAULT_ADDR": "http://127.0.0.1:1"}
    result = run("doctor", "--json", "--url", sqlite_url, **vault(openbao, **other))
    found = json.loads(result.stdout)
    assert found.keys() == example.keys()
    assert all(finding.keys() == example["findings"][0].keys() for finding in found["findings"])
    assert {finding["subject"] for finding in found["findings"]} <= subjects
    assert {type(value) for finding in found["findings"] for value in finding.values()} == {str}
    worst = max((Level(finding["level"]) for finding in found["findings"]), key=["good", "warning", "bad"].index)
    assert found["level"] == worst == ("warning" if is_up else "bad")
    assert result.returncode == (0 if is_up else 1)
    assert found_nothing_of(openbao.token, result)


def found_nothing_of(secret: str, result: Result) -> bool:
    return secret not in result.stdout + result.stderr and "MARKER" not in result.stdout + result.stderr


def test_on_a_terminal_the_levels_are_in_colour(
    environment: Callable[..., dict[str, str]], tmp_path: Path, openbao: OpenBao
) -> None:
    variables = {"[blink]COLOUR": "MARKER", **vault(openbao, KMS_VAULT_TOKEN="MARKER")}
    shown = on_terminal(environment(**variables), tmp_path)
    assert re.search(r"\x1b\[32mgood *\x1b\[0m +settings", shown)
    assert re.search(r"\x1b\[33mwarning *\x1b\[0m +settings", shown)
    assert re.search(r"\x1b\[1;31mbad *\x1b\[0m +credentials", shown)
    assert re.search(r"settings +KRAVN_\[blink\]COLOUR is no setting", shown)
    assert "MARKER" not in shown


def on_terminal(environment: dict[str, str], directory: Path) -> str:
    """Run the doctor with a terminal of 100 columns, and return what it prints there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sqlalchemy_kravn_crypto", "doctor"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"TERM": "xterm", "COLUMNS": "100"},
        cwd=directory,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not read:
            break
        shown += read
    os.close(ours)
    assert process.wait(timeout=60) == 1
    return shown.decode()
