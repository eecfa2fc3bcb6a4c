"""The bootstrap key and the MAC key, from ``KRAVN_SECRET`` or from ``secret.key``."""

import copy
import hashlib
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret, BootstrapSecrets
from sqlalchemy_kravn_crypto.exceptions import SecretFileError
from tests import reference
from tests.leaks import leaked, spellings

SECRET = "correct horse battery staple, and more"
ROOT = bytes(range(32))
RACERS = 8

RACE = """
import sys
from pathlib import Path
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret

print("ready", flush=True)
sys.stdin.readline()
created = BootstrapSecret.create_file(Path(sys.argv[1]))
print(created.data_key.hex(), created.mac_key.hex())
"""

# The superuser may read everything, so this is tried as somebody else where the tests run as the superuser.
AS_NOBODY = """
import os, sys
from pathlib import Path
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret
from sqlalchemy_kravn_crypto.exceptions import SecretFileError

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for path in sys.argv[1:]:
    for operation in (BootstrapSecret.from_file, BootstrapSecret.create_file):
        try:
            operation(Path(path))
        except SecretFileError as error:
            print(error)
        else:
            print("no error")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "secret.key"


def written(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


# --- KRAVN_SECRET ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [SECRET, "schlüssel 鍵 🔑 with more characters"], ids=["ASCII", "beyond ASCII"])
def test_keys_of_a_secret_are_stretched_and_expanded(secret: str) -> None:
    root = hashlib.pbkdf2_hmac("sha256", secret.encode(), b"sqlalchemy-kravn-crypto/bootstrap/v1", 600_000, 32)
    made = BootstrapSecret.from_secret(secret)
    assert made.source == "secret"
    assert made.data_key == reference.expand(root, "bootstrap")
    assert made.mac_key == reference.expand(root, "row-mac")


# --- secret.key ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n", b" \t\n\n"], ids=repr)
@pytest.mark.parametrize("content", [ROOT.hex(), ROOT.hex().upper()], ids=["lower case", "upper case"])
def test_keys_of_a_file_are_expanded(path: Path, content: str, ending: bytes) -> None:
    read = BootstrapSecret.from_file(written(path, content.encode() + ending))
    assert read is not None
    assert read.source == "file"
    assert read.data_key == reference.expand(ROOT, "bootstrap")
    assert read.mac_key == reference.expand(ROOT, "row-mac")


def test_missing_file_is_none(path: Path) -> None:
    assert BootstrapSecret.from_file(path) is None
    assert BootstrapSecret.from_file(path.parent / "no such directory" / path.name) is None
    assert list(path.parent.iterdir()) == []


def test_created_file_is_private_and_has_64_hexadecimal_characters(path: Path) -> None:
    previous = os.umask(0)
    try:
        created = BootstrapSecret.create_file(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_text("ascii")
    assert len(content.strip()) == 64
    assert created.data_key == reference.expand(bytes.fromhex(content), "bootstrap")
    assert created == BootstrapSecret.from_file(path)
    assert list(path.parent.iterdir()) == [path]


def test_created_directory_is_private(path: Path) -> None:
    directory = path.parent / "data" / "deeper"
    previous = os.umask(0)
    try:
        BootstrapSecret.create_file(directory / path.name)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_creating_leaves_a_file_that_is_there(path: Path) -> None:
    written(path, ROOT.hex().encode())
    assert BootstrapSecret.create_file(path) == BootstrapSecret.from_file(path)
    assert path.read_text("ascii") == ROOT.hex()
    assert list(path.parent.iterdir()) == [path]


def test_two_created_files_differ(path: Path) -> None:
    one, other = (BootstrapSecret.create_file(path.with_name(name)) for name in ("one", "other"))
    assert len({one.data_key, one.mac_key, other.data_key, other.mac_key}) == 4


def test_processes_that_race_create_one_key(path: Path) -> None:
    target = path.parent / "data" / path.name
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(target)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(RACERS)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    outputs = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * RACERS
    root = bytes.fromhex(target.read_text("ascii"))
    expected = f"{reference.expand(root, 'bootstrap').hex()} {reference.expand(root, 'row-mac').hex()}\n"
    assert outputs == [expected] * RACERS
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o666, 0o602, 0o601, 0o777], ids=oct)
def test_refuses_a_file_that_is_open_to_every_user(path: Path, mode: int) -> None:
    written(path, ROOT.hex().encode(), mode)
    with pytest.raises(SecretFileError, match=rf"chmod 600 {path}") as caught:
        BootstrapSecret.from_file(path)
    assert leaked(caught.value, ROOT, ROOT.hex()) == []


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640, 0o660], ids=oct)
def test_reads_a_file_that_is_not(path: Path, mode: int) -> None:
    assert BootstrapSecret.from_file(written(path, ROOT.hex().encode(), mode)) is not None


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\n", id="blank"),
        pytest.param(ROOT.hex().encode()[:-1], id="one character short"),
        pytest.param(ROOT.hex().encode()[:-2], id="one byte short"),
        pytest.param(ROOT.hex().encode() + b"0", id="one character long"),
        pytest.param(ROOT.hex().encode() + b"00", id="one byte long"),
        pytest.param(ROOT.hex().encode() * 2, id="twice"),
        pytest.param(ROOT.hex().encode()[:-1] + b"g", id="not hexadecimal"),
        pytest.param(b"0x" + ROOT.hex().encode()[:-2], id="with 0x"),
        pytest.param(ROOT.hex(" ").encode(), id="with spaces"),
        pytest.param(ROOT.hex().encode()[:31] + b" " + ROOT.hex().encode()[31:-1], id="one space"),
        pytest.param(ROOT.hex().encode() + b"\n" + ROOT.hex().encode() + b"\n", id="two lines"),
        pytest.param(ROOT.hex().encode() + b"\r\n" + ROOT.hex().encode() + b"\r\n", id="two lines of DOS"),
        pytest.param(ROOT.hex().encode() + b"\n\n# comment\n", id="a comment"),
        pytest.param(ROOT.hex().encode() + b"\n" * 70 + b"x", id="more far behind"),
        pytest.param(ROOT, id="raw bytes"),
        pytest.param(b"\xff" * 64, id="not ASCII"),
        pytest.param("\N{ARABIC-INDIC DIGIT ONE}".encode() * 64, id="digits beyond ASCII"),
        pytest.param(ROOT.hex().encode("utf-16"), id="UTF-16"),
    ],
)
def test_refuses_a_malformed_file(path: Path, content: bytes) -> None:
    written(path, content)
    for operation in (BootstrapSecret.from_file, BootstrapSecret.create_file):
        with pytest.raises(SecretFileError, match="64 hexadecimal characters and nothing else") as caught:
            operation(path)
        assert str(path) in str(caught.value)
        assert leaked(caught.value, ROOT, ROOT.hex()[:32]) == []
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
    assert path.read_bytes() == content


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Give a directory that other users may enter; those of ``tmp_path`` they may not."""
    with TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_refuses_a_file_or_directory_that_it_may_not_read(open_directory: Path) -> None:
    closed = open_directory / "closed"
    closed.mkdir()
    in_closed = written(closed / "secret.key", ROOT.hex().encode())
    closed.chmod(0o000)
    unreadable = written(open_directory / "unreadable.key", ROOT.hex().encode(), 0o000)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(unreadable), str(in_closed)],
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    closed.chmod(0o700)
    messages = done.stdout.splitlines()
    assert len(messages) == 4
    for message, path in zip(messages, [unreadable, unreadable, in_closed, in_closed], strict=True):
        assert str(path) in message
        assert "cannot be" in message
        assert "Permission denied" in message
    assert ROOT.hex() not in done.stdout


def test_refuses_a_directory_in_its_place(path: Path) -> None:
    path.mkdir()
    for operation in (BootstrapSecret.from_file, BootstrapSecret.create_file):
        with pytest.raises(SecretFileError, match=r"cannot be read: Is a directory"):
            operation(path)


def test_refuses_a_data_directory_that_is_a_file(path: Path) -> None:
    path.write_text("no directory")
    for operation in (BootstrapSecret.from_file, BootstrapSecret.create_file):
        with pytest.raises(SecretFileError, match=r"Not a directory") as caught:
            operation(path / "secret.key")
        assert caught.value.__context__ is None
    assert path.read_text() == "no directory"


def test_leaves_nothing_behind_where_it_cannot_create(tmp_path: Path) -> None:
    name = "x" * 300
    with pytest.raises(SecretFileError, match="cannot be created") as caught:
        BootstrapSecret.create_file(tmp_path / "data" / name)
    assert "KRAVN_SECRET" in str(caught.value)
    assert "KRAVN_DATA_DIR" in str(caught.value)
    assert caught.value.__context__ is None
    assert list((tmp_path / "data").iterdir()) == []


# --- Nothing is given away -------------------------------------------------------------------------------------------


def test_repr_shows_the_source_only(path: Path) -> None:
    read = BootstrapSecret.from_file(written(path, ROOT.hex().encode()))
    assert read is not None
    for shown in (repr(read), str(read), f"{read}", repr([read])):
        assert "file" in shown
        found = [s for secret in (ROOT, read.data_key, read.mac_key) for s in spellings(secret) if s in shown]
        assert found == []
    with pytest.raises(TypeError):
        vars(read)


@pytest.mark.parametrize("operation", [pickle.dumps, copy.copy, copy.deepcopy])
def test_cannot_be_pickled_or_copied(path: Path, operation: Callable[[Any], Any]) -> None:
    read = BootstrapSecret.from_file(written(path, ROOT.hex().encode()))
    with pytest.raises(TypeError, match="holds a secret and cannot be pickled or copied"):
        operation(read)


# --- All secrets of a process -----------------------------------------------------------------------------------------


def test_without_a_secret_the_file_is_the_current_one(path: Path) -> None:
    assert BootstrapSecrets.gather(None, path) == BootstrapSecrets(None)
    file = BootstrapSecret.from_file(written(path, ROOT.hex().encode()))
    assert BootstrapSecrets.gather(None, path) == BootstrapSecrets(file)
    assert BootstrapSecrets.gather(None, path, with_file=True) == BootstrapSecrets(file)


def test_beside_a_secret_the_file_is_read_where_it_is_needed_and_only_decrypts(path: Path) -> None:
    file = BootstrapSecret.from_file(written(path, ROOT.hex().encode()))
    assert file is not None
    current = BootstrapSecret.from_secret(SECRET)
    assert BootstrapSecrets.gather(SECRET, path) == BootstrapSecrets(current)
    gathered = BootstrapSecrets.gather(SECRET, path, with_file=True)
    assert gathered == BootstrapSecrets(current, retired=(file,))
    assert gathered.verifying == (current,)
    assert gathered.all == (current, file)
    path.unlink()
    assert BootstrapSecrets.gather(SECRET, path, with_file=True) == BootstrapSecrets(current)


def test_a_file_that_is_not_needed_is_not_looked_at(path: Path) -> None:
    written(path, b"no key", mode=0o644)
    assert BootstrapSecrets.gather(SECRET, path).retired == ()
    with pytest.raises(SecretFileError):
        BootstrapSecrets.gather(SECRET, path, with_file=True)


def test_the_next_verifies_and_the_retired_do_not(path: Path) -> None:
    current, following, *retired = (BootstrapSecret.from_secret(SECRET + end) for end in ("", "n", "1", "2"))
    gathered = BootstrapSecrets.gather(SECRET, path, next_secret=SECRET + "n", retired=(SECRET + "1", SECRET + "2"))
    assert gathered == BootstrapSecrets(current, following, tuple(retired))
    assert gathered.verifying == (current, following)
    assert gathered.all == (current, following, *retired)


@pytest.mark.parametrize("operation", [pickle.dumps, copy.copy, copy.deepcopy])
def test_all_of_them_are_kept_in_this_process(path: Path, operation: Callable[[Any], Any]) -> None:
    one = BootstrapSecret._from_root("file", ROOT)
    gathered = BootstrapSecrets(one, one, (one,))
    with pytest.raises(TypeError, match="holds a secret and cannot be pickled or copied"):
        operation(gathered)
    for shown in (repr(gathered), str(gathered)):
        assert [s for secret in (ROOT, one.data_key, one.mac_key) for s in spellings(secret) if s in shown] == []
