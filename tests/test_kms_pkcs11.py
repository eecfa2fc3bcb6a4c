"""The commands of docs/kms-pkcs11.md, in their order, in one shell, with SoftHSM."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from sqlalchemy_kravn_crypto.rows import connect, read_rows
from tests.softhsm import ensure_softhsm, library

PAGE = Path(__file__).parents[1] / "docs" / "kms-pkcs11.md"
MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PIN_FILE = "/run/secrets/hsm-pin"


def section(title: str) -> str:
    """Return what stands under a heading of the second level."""
    found = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, title
    return found


def block(title: str, language: str) -> str:
    [found] = re.findall(rf"^```{language}\n(.*?)^```$", section(title), flags=re.MULTILINE | re.DOTALL)
    return str(found)


class Shell:
    """A shell in a directory of its own, that each command leaves as the next one finds it."""

    def __init__(self, directory: Path) -> None:
        ensure_softhsm()
        self.directory = directory
        self.pin = secrets.token_hex(8)
        (directory / "pin").write_text(self.pin + "\n")
        programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join(programs),
            "PIN": self.pin,
            "SO_PIN": secrets.token_hex(8),
            "DATABASE_URL": f"sqlite:///{directory / 'database'}",
            # The machine may be busy with other tests.
            "KRAVN_KMS_TIMEOUT": "60",
        }

    def run(self, script: str) -> str:
        script = script.replace(MODULE, str(library("libsofthsm2.so"))).replace(PIN_FILE, str(self.directory / "pin"))
        done = subprocess.run(
            ["/bin/sh", "-euc", f"{script}\nenv -0 >.environment"],
            cwd=self.directory,
            env=self.environment,
            input=self.pin + "\n",
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            # Without a terminal, which a PIN would be asked for on.
            start_new_session=True,
        )
        assert done.returncode == 0, (script, done.stdout, done.stderr)
        lines = (self.directory / ".environment").read_text().split("\0")
        self.environment = dict(line.split("=", 1) for line in lines if line)
        return done.stdout

    def master_keys(self) -> set[str | None]:
        engine = create_engine(self.environment["DATABASE_URL"])
        with connect(engine) as connection:
            rows = read_rows(connection)
        engine.dispose()
        return {row.master_key for row in (rows.in_control(), *rows.keys) if row.wrapped_key is not None}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Give a shell in which the token is made, and the program of the page at hand."""
    opened = Shell(tmp_path)
    opened.run("kravn-crypto migrate")
    opened.run(block("A token to try it with", "sh"))
    (tmp_path / "make_master_key.py").write_text(block("The master key", "python"))
    return opened


def test_the_commands_of_the_page(shell: Shell) -> None:
    shown = shell.run(block("The master key", "sh"))
    assert set(block("The master key", "text").splitlines()) <= set(shown.splitlines())

    told = shell.run(block("The settings", "sh"))
    assert "bad" not in told.split()
    assert "the master key cannot leave the hsm" in " ".join(told.split()).lower()

    shell.run("kravn-crypto provision --new-database")
    uri = re.search(r"`(pkcs11:[^`]+)`", section("The master key"))
    assert uri is not None
    assert shell.master_keys() == {uri[1]}

    shell.run(block("A new master key", "sh"))
    assert shell.master_keys() == {uri[1].replace("%01", "%02")}


def test_a_master_key_for_the_other_mechanism(shell: Shell) -> None:
    shown = shell.run(block("The master key", "sh").replace("aes-gcm", "aes-kwp"))
    assert "Usage:      wrap, unwrap\n" in shown
    settings = block("The settings", "sh")
    told = shell.run("export KRAVN_KMS_PKCS11_MECHANISM=aes-kwp\n" + settings)
    assert "bad" not in told.split()


def test_a_second_key_of_the_same_label_and_id_is_not_made(shell: Shell) -> None:
    make = block("The master key", "sh").splitlines()[0]
    shell.run(make)
    shell.run(f"if {make}; then exit 1; fi")


def test_what_the_page_says_of_pkcs11_tool(shell: Shell) -> None:
    tool = f"pkcs11-tool --module {MODULE} --token-label bank --login --pin env:PIN"
    shell.run(f"{tool} --keygen --key-type AES:32 --label kravn --id 01 --sensitive --private --usage-decrypt")
    told = " ".join(shell.run(block("The settings", "sh")).split())
    assert "Whoever has the PIN can change what the master key may be used for." in told
