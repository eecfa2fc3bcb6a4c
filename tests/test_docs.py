"""What the documentation says is what the code does."""

import hashlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import sqlalchemy_kravn_crypto
from sqlalchemy_kravn_crypto import exceptions
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, to_text
from sqlalchemy_kravn_crypto.codecs.documents import JSONCodec
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from sqlalchemy_kravn_crypto.settings import known_variables
from tests import reference

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def example() -> dict[str, str]:
    """Read the rows of docs/format.md whose second cell is one piece of code."""
    return dict(re.findall(r"^\| ([^|`]+|`[A-Z_]+`) \| `([^`]+)` \|$", page("docs/format.md"), flags=re.MULTILINE))


def test_the_worked_example_can_be_recomputed_from_the_page_alone() -> None:
    given = example()
    key, nonce, name = bytes.fromhex(given["data key"]), bytes.fromhex(given["nonce"]), given["name"]
    assert reference.key_id(key).hex() == given["key id"]
    assert reference.expand(key, "key-check").hex() == given["key check"]
    assert reference.expand(key, "aead/02").hex() == given["key of XAES-256-GCM"]
    assert reference.hint(name).hex() == given["name hint"]
    payload = b"\x01" + given["value"].encode()
    assert payload.hex() == given["payload"]
    header = bytes.fromhex("f902" + given["key id"] + given["name hint"])
    assert (header + reference.lp(name.encode())).hex() == given["associated data"]
    frame = reference.frame(key, name, nonce, payload)
    assert frame.hex() == given["frame"]
    assert reference.text(frame) == given["as text"]


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
    assert bootstrap.data_key.hex() == reference.expand(root, "bootstrap").hex() == given["bootstrap key"]
    assert bootstrap.mac_key.hex() == reference.expand(root, "row-mac").hex() == given["MAC key"]
    assert DataKey(bootstrap.data_key).key_id.hex() == given["key id of the bootstrap key"]


def test_every_setting_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"^\| `(KRAVN_\w+)`", page("docs/settings.md"), flags=re.MULTILINE))
    # The standby's are those of the KMS behind another prefix, and are described as such.
    known = {name for name in known_variables() if not name.startswith("KRAVN_STANDBY_")}
    assert documented == {name for name in known if not name.endswith("_FILE")}
    secrets = set(re.findall(r"^\| `(KRAVN_\w+)` \*", page("docs/settings.md"), flags=re.MULTILINE))
    assert {f"{name}_FILE" for name in secrets} == {name for name in known if name.endswith("_FILE")}


def test_the_readme_names_no_setting_that_does_not_exist() -> None:
    for path in PAGES:
        mentioned = set(re.findall(r"\bKRAVN_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8")))
        # What Kubernetes sets, a beginning of names, and what the example of a provider has.
        others = {"KRAVN_SERVICE_HOST", "KRAVN_PORT", "KRAVN_STANDBY_KMS"}
        others |= {"KRAVN_KMS_FILES_DIRECTORY", "KRAVN_STANDBY_KMS_FILES_DIRECTORY"}
        assert mentioned - others <= set(known_variables()), path


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
