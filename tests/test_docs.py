"""What the documentation says is what the code does."""

import hashlib
import hmac
import inspect
import re
import tomllib
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import sqlalchemy_kravn_crypto
from sqlalchemy_kravn_crypto import exceptions
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, to_text
from sqlalchemy_kravn_crypto.codecs import JSONCodec
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from sqlalchemy_kravn_crypto.settings import known_variables

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def example() -> dict[str, str]:
    """Read the rows of docs/format.md whose second cell is one piece of code."""
    return dict(re.findall(r"^\| ([^|`]+|`[A-Z_]+`) \| `([^`]+)` \|$", page("docs/format.md"), flags=re.MULTILINE))


def lp(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def expand(key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(key, lp(b"sqlalchemy-kravn-crypto/v1", purpose) + b"\x01", "sha256")


def xaes(key: bytes, nonce: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
    """Encrypt as c2sp.org/XAES-256-GCM says, step by step."""

    def aes(block: bytes) -> bytes:
        return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)  # noqa: S305 - as specified

    left = int.from_bytes(aes(bytes(16)), "big") << 1
    k1 = (left ^ (0x87 | 1 << 128) if left >> 128 else left).to_bytes(16, "big")

    def half(counter: int) -> bytes:
        block = bytes([0, counter, ord("X"), 0]) + nonce[:12]
        return aes(bytes(a ^ b for a, b in zip(block, k1, strict=True)))

    return AESGCM(half(1) + half(2)).encrypt(nonce[12:], plaintext, associated_data)


def test_the_worked_example_can_be_recomputed_from_the_page_alone() -> None:
    given = example()
    key, nonce, name = bytes.fromhex(given["data key"]), bytes.fromhex(given["nonce"]), given["name"].encode()
    assert expand(key, b"key-id")[:8].hex() == given["key id"]
    assert expand(key, b"key-check").hex() == given["key check"]
    assert expand(key, b"aead/02").hex() == given["key of XAES-256-GCM"]
    assert hashlib.sha256(name).digest()[:2].hex() == given["name hint"]
    payload = b"\x01" + given["value"].encode()
    assert payload.hex() == given["payload"]
    header = bytes.fromhex("f902" + given["key id"] + given["name hint"])
    assert (header + lp(name)).hex() == given["associated data"]
    frame = header + nonce + xaes(expand(key, b"aead/02"), nonce, payload, header + lp(name))
    assert frame.hex() == given["frame"]
    assert "enc:v3:" + urlsafe_b64encode(frame).rstrip(b"=").decode() == given["as text"]


def test_the_package_computes_the_worked_example_too() -> None:
    given = example()
    key, name = DataKey(bytes.fromhex(given["data key"])), ColumnName(given["name"])
    frame = key.encrypt(bytes.fromhex(given["nonce"]), bytes.fromhex(given["payload"]), name)
    assert frame.hex() == given["frame"]
    assert to_text(frame) == given["as text"]
    assert JSONCodec().decode(Keyring(key).decrypt(frame, name)) == {"token": "s3cr3t"}


def test_the_bootstrap_key_can_be_recomputed_from_the_page_alone() -> None:
    given = example()
    secret = given["`KRAVN_SECRET`"]
    root = hashlib.pbkdf2_hmac("sha256", secret.encode(), b"sqlalchemy-kravn-crypto/bootstrap/v1", 600_000)
    bootstrap = BootstrapSecret.from_secret(secret)
    assert bootstrap.data_key.hex() == expand(root, b"bootstrap").hex() == given["bootstrap key"]
    assert bootstrap.mac_key.hex() == expand(root, b"row-mac").hex() == given["MAC key"]
    assert DataKey(bootstrap.data_key).key_id.hex() == given["key id of the bootstrap key"]


def test_every_setting_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"^\| `(KRAVN_\w+)`", page("docs/settings.md"), flags=re.MULTILINE))
    assert documented == {name for name in known_variables() if not name.endswith("_FILE")}
    secrets = set(re.findall(r"^\| `(KRAVN_\w+)` \*", page("docs/settings.md"), flags=re.MULTILINE))
    assert {f"{name}_FILE" for name in secrets} == {name for name in known_variables() if name.endswith("_FILE")}


def test_the_readme_names_no_setting_that_does_not_exist() -> None:
    for path in PAGES:
        mentioned = set(re.findall(r"\bKRAVN_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8")))
        assert mentioned - {"KRAVN_SERVICE_HOST", "KRAVN_PORT"} <= set(known_variables()), path


def test_every_error_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"^\| \*{0,2}`(\w+Error)`", page("docs/errors.md"), flags=re.MULTILINE))
    defined = {name for name, found in inspect.getmembers(exceptions, inspect.isclass) if name.endswith("Error")}
    assert documented == defined - {"KravnCryptoError"}


def test_every_error_is_one_of_ours() -> None:
    for name, found in inspect.getmembers(exceptions, inspect.isclass):
        if name.endswith("Error"):
            assert issubclass(found, exceptions.KravnCryptoError)
            assert isinstance(found("text").args, tuple)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link


def test_the_public_names_are_sorted_and_there() -> None:
    assert sqlalchemy_kravn_crypto.__all__ == sorted(sqlalchemy_kravn_crypto.__all__)
    assert all(hasattr(sqlalchemy_kravn_crypto, name) for name in sqlalchemy_kravn_crypto.__all__)


def test_the_changelog_speaks_of_this_version() -> None:
    project = tomllib.loads(page("pyproject.toml"))
    version = sqlalchemy_kravn_crypto.__version__
    assert f"## {version}" in page("CHANGELOG.md")
    assert "version" in project["project"]["dynamic"] or project["project"]["version"] == version
