"""The provider of examples/file_provider.py, by its page: from an empty directory to a database that it is used for."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from uv import find_uv_bin

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "file_provider.py"
PAGE = (ROOT / "docs" / "writing-a-provider.md").read_text(encoding="utf-8")

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PROVIDER, TEST = (code for language, code in BLOCKS if language == "python")
(PROJECT,) = (code for language, code in BLOCKS if language == "toml")
COMMANDS = [code for language, code in BLOCKS if language == "sh"]

# The page installs from an index. Here the wheel of this checkout is what there is to install, and uv is quicker.
SHELL = """
python3() { [ "$*" = "-m venv .venv" ] && "$UV" venv --quiet --python "$PYTHON" .venv; }
pip() { [ "$1" = install ] && "$UV" pip "$@" --quiet --find-links "$WHEELS"; }
"""


def shell(directory: Path, script: str, **environment: str) -> str:
    """Run a script that must succeed, in a shell to which nothing of this process's environment matters."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    inherited = {name: value for name, value in os.environ.items() if name not in foreign}
    done = subprocess.run(
        ["/bin/sh", "-euxc", script],
        check=False,
        cwd=directory,
        env=inherited | {"UV": find_uv_bin(), "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_shows_the_example() -> None:
    assert EXAMPLE.read_text(encoding="utf-8") == PROVIDER
    assert PROVIDER.count("\n") < 100


@pytest.mark.xdist_group("wheel")
def test_whoever_does_what_the_page_says_has_a_provider_that_passes(tmp_path: Path) -> None:
    wheels, directory = tmp_path / "wheels", tmp_path / "provider"
    directory.mkdir()
    shell(tmp_path, f'"$UV" build --quiet --wheel --out-dir wheels {shlex.quote(str(ROOT))}')
    for name, content in {
        "file_provider.py": PROVIDER,
        "pyproject.toml": PROJECT,
        "test_file_provider.py": TEST,
    }.items():
        assert f"`{name}`:\n" in PAGE
        (directory / name).write_text(content, encoding="utf-8")
    said = shell(directory, SHELL + "".join(COMMANDS), WHEELS=str(wheels))
    assert "18 passed" in said
    assert re.search(r"^[0-9a-f]{16} primary files$", said, re.MULTILINE)
    assert re.findall(r"^data key: +[0-9a-f]{16} primary files (files:v\d)", said, re.MULTILINE) == [
        "files:v1",
        "files:v2",
    ]
    # And after the rewrap, nothing in the database is under the first.
    (directory / "keys" / "1.key").unlink()
    environment = {"KRAVN_KMS_PROVIDER": "files", "KRAVN_KMS_FILES_DIRECTORY": str(directory / "keys")}
    status = shell(directory, ".venv/bin/kravn-crypto status", DATABASE_URL="sqlite:///app.db", **environment)
    assert "files:v2" in status
