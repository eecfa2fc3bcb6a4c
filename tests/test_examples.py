"""The examples, run as their readers would: each in a process and a directory of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

SIGNING = ["sign_with_itsdangerous", "sign_with_pyjwt"]
SECRET = "of-the-test-and-long-enough-to-be-accepted"

FLASK = """
import os
from pathlib import Path

# Else Flask-SQLAlchemy puts the file beside the example.
os.environ["DATABASE_URL"] = f"sqlite:///{Path.cwd()}/example.db"

from with_flask import create_app

client = create_app().test_client()
assert client.post("/plugins/weather", json={"token": "s3cr3t"}).status_code == 201
print(client.get("/plugins/weather").get_data(as_text=True))
assert client.get("/plugins/nothing").status_code == 404
"""

FASTAPI = """
import asyncio

from httpx import ASGITransport, AsyncClient
from with_fastapi import app

async def main():
    served = AsyncClient(transport=ASGITransport(app), base_url="http://test")
    async with app.router.lifespan_context(app), served as client:
        assert (await client.post("/plugins/weather", json={"token": "s3cr3t"})).status_code == 201
        print((await client.get("/plugins/weather")).text)
        assert (await client.get("/plugins/nothing")).status_code == 404

asyncio.run(main())
"""


def run(directory: Path, *arguments: object) -> str:
    """Run Python in a directory, with every warning an error."""
    environment = os.environ | {"KRAVN_SECRET": SECRET, "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        check=False,
        cwd=directory,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_encrypted(directory: Path) -> None:
    stored = (directory / "example.db").read_bytes()
    assert b"weather" in stored
    assert b"\xf9\x02" in stored
    assert b"token" not in stored
    assert b"s3cr3t" not in stored
    assert b"scopes" not in stored


@pytest.mark.parametrize("name", ["with_dataclasses", "with_sqlmodel"])
def test_a_script(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        printed = dict(line.split(": ", 1) for line in run(tmp_path, EXAMPLES / f"{name}.py").splitlines())
        assert "s3cr3t" in printed.pop("The program loads")
        assert "\\xf9\\x02" in printed["The database holds"]
        assert "weather" in printed["Its repr"]
        assert "s3cr3t" not in str(printed)
    assert_encrypted(tmp_path)


@pytest.mark.parametrize("program", [FLASK, FASTAPI], ids=["with_flask", "with_fastapi"])
def test_a_service(tmp_path: Path, program: str) -> None:
    printed = run(tmp_path, "-c", program)
    assert "weather" in printed
    assert "token" in printed
    assert "s3cr3t" not in printed
    assert_encrypted(tmp_path)


@pytest.mark.parametrize("name", SIGNING)
def test_what_is_signed_verifies(tmp_path: Path, name: str) -> None:
    assert run(tmp_path, EXAMPLES / f"{name}.py") == "ada\n"


SIGNED = """
import sign_with_itsdangerous, sign_with_pyjwt
from sqlalchemy_kravn_crypto import DataKey, Keyring, use_keyring

old, new, other = DataKey(bytes(32)), DataKey(bytes([1]) * 32), DataKey(bytes([2]) * 32)

def refused(verify, *arguments):
    try:
        verify(*arguments)
    except Exception as error:
        return type(error).__name__

with use_keyring(Keyring(old)):
    token, link = sign_with_pyjwt.sign("ada"), sign_with_itsdangerous.serializer().dumps("ada")
with use_keyring(Keyring(new, [old])):
    print(sign_with_pyjwt.verify(token)["sub"], sign_with_itsdangerous.serializer().loads(link, max_age=60))
    print(sign_with_pyjwt.jwt.get_unverified_header(sign_with_pyjwt.sign("ada"))["kid"] == new.key_id.hex())
with use_keyring(Keyring(new, [other])):
    print(refused(sign_with_pyjwt.verify, token), refused(sign_with_itsdangerous.serializer().loads, link))
"""


def test_what_was_signed_before_a_rotation_verifies_until_the_data_key_is_gone(tmp_path: Path) -> None:
    assert run(tmp_path, "-c", SIGNED) == "ada ada\nTrue\nInvalidKeyError BadTimeSignature\n"


def test_every_example_is_run_and_fits_on_a_screen() -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    here = {"with_dataclasses", "with_sqlmodel", "with_flask", "with_fastapi", *SIGNING}
    assert set(files) == here | {"rekey_with_dask", "file_provider"}  # which have tests of their own
    assert {name: text.count("\n") for name, text in files.items() if text.count("\n") > 60} == {}
