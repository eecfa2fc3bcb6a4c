"""The wheel: what is in it, and that the commands work where nothing else is installed."""

import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest
from uv import find_uv_bin

import sqlalchemy_kravn_crypto

ROOT = Path(__file__).parents[1]
PACKAGE = "sqlalchemy_kravn_crypto"
TABLES = {"kms_keys", "kms_replicas", "kms_columns", "kms_events", "kms_alembic_version"}

# One worker builds and installs the wheel for all the tests.
pytestmark = pytest.mark.xdist_group("wheel")


class Built(NamedTuple):
    wheel: Path
    """Built from the source distribution."""
    sdist: Path
    direct_wheel: Path
    """Built from the checkout."""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, as in a shell of its own, and return what it prints."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    done = subprocess.run(
        command, check=False, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    output = tmp_path_factory.mktemp("dist")
    run(find_uv_bin(), "build", "--quiet", "--out-dir", output, ROOT, cwd=output)
    run(find_uv_bin(), "build", "--quiet", "--wheel", "--out-dir", output / "direct", ROOT, cwd=output)
    (wheel,) = output.glob("*.whl")
    (sdist,) = output.glob("*.tar.gz")
    (direct_wheel,) = (output / "direct").glob("*.whl")
    return Built(wheel, sdist, direct_wheel)


@pytest.fixture(scope="module")
def scripts(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel, and only that, into a virtual environment; return the directory of its commands."""
    environment = tmp_path_factory.mktemp("clean") / "venv"
    run(find_uv_bin(), "venv", "--quiet", "--python", sys.executable, environment, cwd=environment.parent)
    run(find_uv_bin(), "pip", "install", "--quiet", "--python", environment, built.wheel, cwd=environment.parent)
    return environment / ("Scripts" if sys.platform == "win32" else "bin")


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel by name."""
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> Message:
    """Return the metadata of a wheel."""
    (content,) = (content for name, content in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    return message_from_string(content.decode())


def test_tests_run_against_the_installed_wheel_under_tox() -> None:
    environment = os.environ.get("TOX_ENV_DIR")
    assert environment is None or Path(sqlalchemy_kravn_crypto.__file__).is_relative_to(environment)


def test_has_one_top_level_name(built: Built) -> None:
    names = {name.partition("/")[0] for name in contents(built.wheel)}
    assert names == {PACKAGE, f"{PACKAGE}-{sqlalchemy_kravn_crypto.__version__}.dist-info"}


def test_has_the_migrations_and_the_marker_of_types(built: Built) -> None:
    names = {name.removeprefix(f"{PACKAGE}/") for name in contents(built.wheel)}
    migrations = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("migrations/**/*.*") if path.suffix != ".pyc"}
    assert "migrations/env.py" in migrations
    assert names >= {*migrations, "py.typed", "cli.py", "providers/vault.py"}


def test_has_nothing_that_only_the_checkout_needs(built: Built) -> None:
    names = set(contents(built.wheel)) - {f"{PACKAGE}/testing.py"}  # for the tests of others
    assert [name for name in names if "test" in name or name.endswith((".pyc", "secret.key"))] == []


def test_source_distribution_builds_the_same_wheel(built: Built) -> None:
    assert contents(built.wheel) == contents(built.direct_wheel)


def test_source_distribution_has_the_tests_and_no_leftovers(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = archive.getnames()
    parts = {part for name in names for part in name.split("/")}
    assert parts >= {"tests", "tox.ini", "docs", "README.md"}
    assert parts.isdisjoint({".git", ".tox", ".venv", "build", "dist", "data", "secret.key", "__pycache__"})


def test_metadata(built: Built) -> None:
    found = metadata(built.wheel)
    assert found["Name"] == "sqlalchemy-kravn-crypto"
    assert found["Version"] == sqlalchemy_kravn_crypto.__version__
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.11"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_all("Provides-Extra") == ["aws", "azure", "gcp", "pkcs11", "vault"]
    required = [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in required if line.startswith(("azure", "hvac", "requests"))]


def test_entry_points(built: Built) -> None:
    (content,) = (content for name, content in contents(built.wheel).items() if name.endswith("/entry_points.txt"))
    assert content.decode().split("\n") == [
        "[console_scripts]",
        "kravn-crypto = sqlalchemy_kravn_crypto.cli:main",
        "",
        "[alembic.plugins]",
        "alembic.autogenerate.sqlalchemy_kravn_crypto = sqlalchemy_kravn_crypto.alembic_plugin",
        "",
    ]


def test_installs_no_client_of_a_kms(scripts: Path, tmp_path: Path) -> None:
    listing = run(find_uv_bin(), "pip", "list", "--format=json", "--python", scripts.parent, cwd=tmp_path)
    installed = {package["name"] for package in json.loads(listing)}
    assert installed >= {"sqlalchemy-kravn-crypto", "sqlalchemy", "alembic"}
    assert [name for name in installed if name.startswith(("azure", "hvac", "requests", "psycopg"))] == []


def test_migrates_twice(scripts: Path, tmp_path: Path) -> None:
    for _ in range(2):
        run(scripts / "kravn-crypto", "migrate", "--url", "sqlite:///x.db", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.db"]
    connection = sqlite3.connect(tmp_path / "x.db")
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    finally:
        connection.close()
    assert tables >= TABLES


def test_demo_shows_the_main_job_and_leaves_nothing(scripts: Path, tmp_path: Path) -> None:
    output = run(scripts / "kravn-crypto", "demo", cwd=tmp_path)
    assert "The database holds:" in output
    assert "The program loads:" in output
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_commands(scripts: Path, tmp_path: Path) -> None:
    output = run(scripts / "kravn-crypto", "--help", cwd=tmp_path)
    for command in ("migrate", "provision", "status", "demo"):
        assert command in output


def test_runs_as_a_module(scripts: Path, tmp_path: Path) -> None:
    assert "migrate" in run(scripts / "python", "-m", PACKAGE, "--help", cwd=tmp_path)
