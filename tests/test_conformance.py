"""The conformance suite: that it sees each broken promise, and that our own providers keep all of them."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree as ET

import pytest

from sqlalchemy_kravn_crypto.conformance import Promise, ProviderConformance
from sqlalchemy_kravn_crypto.providers.aws import AwsProvider
from sqlalchemy_kravn_crypto.providers.azure import AzureProvider
from sqlalchemy_kravn_crypto.providers.base import KeyProvider
from sqlalchemy_kravn_crypto.providers.gcp import GcpProvider
from sqlalchemy_kravn_crypto.providers.pkcs11 import Pkcs11Provider
from sqlalchemy_kravn_crypto.providers.vault import VaultProvider
from sqlalchemy_kravn_crypto.testing import FakeKMS
from tests import hostile_server as hostile
from tests import mutant_providers
from tests.aws_server import Aws, Credentials
from tests.azure_server import AzureVault
from tests.gcp_server import CloudKms
from tests.hostile_server import HostileServer
from tests.mutant_providers import ALL, EXPECTED
from tests.openbao import OpenBao
from tests.softhsm import SoftHSM

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "writing-a-provider.md"

Verdicts = Mapping[str, Mapping[str, str]]
"""By class and test: what was said of a test that failed or was skipped."""


def verdicts_on(file: Path, directory: Path) -> Verdicts:
    """Run pytest on a file, as in a project that knows nothing of this one."""
    report = directory / "report.xml"
    options = ["-p", "no:cacheprovider", "--noconftest", "-c", "/dev/null", f"--rootdir={file.parent}", "--tb=no"]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--import-mode=importlib", f"--junitxml={report}", str(file)],
        check=False,
        cwd=ROOT,
        capture_output=True,
    )
    found: dict[str, dict[str, str]] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - pytest has just written it
        of_class = found.setdefault(case.get("classname", "").rpartition(".")[2], {})
        for verdict in case:
            of_class[case.get("name", "")] = verdict.get("message", "")
    return found


# --- The suite sees what is broken ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    return verdicts_on(Path(mutant_providers.__file__), tmp_path_factory.mktemp("mutants"))


@pytest.mark.xdist_group("mutants")
@pytest.mark.parametrize("mutant", EXPECTED)
def test_a_mutant_fails_the_tests_that_it_must_and_no_others(verdicts: Verdicts, mutant: str) -> None:
    assert verdicts[mutant].keys() == EXPECTED[mutant], verdicts[mutant]
    for said in verdicts[mutant].values():
        number, promise = re.findall(
            r"^Failed: Broken: promise (\d+) of docs/writing-a-provider\.md\. (.+)$", said, re.MULTILINE
        )[0]
        assert list(Promise)[int(number) - 1] == promise
        assert said.partition("\n")[2].strip()


def test_every_test_of_the_suite_can_fail() -> None:
    assert frozenset().union(*EXPECTED.values()) == ALL


@pytest.mark.xdist_group("mutants")
def test_every_promise_can_be_broken(verdicts: Verdicts) -> None:
    said = "\n".join(text for verdict in verdicts.values() for text in verdict.values())
    assert [promise for promise in Promise if promise not in said] == []


def test_the_page_has_the_promises_in_the_same_words() -> None:
    promises = re.findall(r"^(\d+)\. \*\*(.+?)\*\*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert promises == [(str(number), promise) for number, promise in enumerate(Promise, start=1)]


WITHOUT = """
import pytest
from sqlalchemy_kravn_crypto.conformance import ProviderConformance
from sqlalchemy_kravn_crypto.testing import FakeKMS

class TestNothing(ProviderConformance):
    pass

class TestProviderOnly(ProviderConformance):
    @pytest.fixture
    def provider(self):
        return FakeKMS()

class TestOfAnotherMasterKey(ProviderConformance):
    @pytest.fixture
    def provider(self):
        return FakeKMS()

    @pytest.fixture
    def unreachable(self):
        return FakeKMS("another")
"""


def test_it_says_which_fixtures_are_missing_or_wrong(tmp_path: Path) -> None:
    file = tmp_path / "test_without.py"
    file.write_text(WITHOUT)
    found = verdicts_on(file, tmp_path)
    assert found["TestNothing"].keys() == ALL
    assert all("Override the fixture `provider`" in said for said in found["TestNothing"].values())
    assert found["TestProviderOnly"].keys() == {"test_kms_that_does_not_answer"}
    assert "Override the fixture `unreachable`" in found["TestProviderOnly"]["test_kms_that_does_not_answer"]
    assert "of the same master key" in found["TestOfAnotherMasterKey"]["test_kms_that_does_not_answer"]


# --- Our own providers keep their promises ---------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[HostileServer]:
    """Give a server that accepts connections and answers nothing."""
    server = HostileServer()
    server.raw = hostile.is_silent
    yield server
    server.close()


class TestFakeKMS(ProviderConformance):
    @pytest.fixture
    def provider(self) -> KeyProvider:
        return FakeKMS()

    @pytest.fixture
    def unreachable(self) -> KeyProvider:
        kms = FakeKMS()
        kms.down = True
        return kms


class TestVault(ProviderConformance):
    @pytest.fixture
    def settings(self, openbao: OpenBao) -> dict[str, Any]:
        key = f"key-{secrets.token_hex(4)}"
        openbao.create_key(key)
        return openbao.settings(key=key, token=openbao.issue_token(key))

    @pytest.fixture
    def provider(self, settings: dict[str, Any]) -> KeyProvider:
        return VaultProvider(**settings)

    @pytest.fixture
    def unreachable(self, settings: dict[str, Any], silent: HostileServer) -> KeyProvider:
        return VaultProvider(**settings | {"address": silent.url})

    @pytest.fixture
    def credentials(self, settings: dict[str, Any]) -> list[str]:
        return [settings["token"]]


class TestAzure(ProviderConformance):
    @pytest.fixture
    def provider(self, azure_vault: AzureVault) -> KeyProvider:
        return AzureProvider(**azure_vault.settings())

    @pytest.fixture
    def unreachable(self, azure_vault: AzureVault, silent: HostileServer) -> KeyProvider:
        return AzureProvider(**azure_vault.settings(resolve=lambda _host, _port: ("127.0.0.1", silent.port)))

    @pytest.fixture
    def credentials(self, azure_vault: AzureVault) -> list[str]:
        return [azure_vault.client_secret]


@pytest.fixture(scope="module")
def aws_server() -> Iterator[Aws]:
    server = Aws()
    yield server
    server.stop()


class TestAws(ProviderConformance):
    @pytest.fixture
    def owner(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Credentials:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                monkeypatch.delenv(name)
        made = Credentials()
        given = {"AWS_ACCESS_KEY_ID": made.access_key, "AWS_SECRET_ACCESS_KEY": made.secret, "HOME": str(tmp_path)}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        return made

    @pytest.fixture
    def settings(self, aws_server: Aws, owner: Credentials) -> dict[str, Any]:
        return aws_server.settings(aws_server.create_key())

    @pytest.fixture
    def provider(self, settings: dict[str, Any]) -> KeyProvider:
        return AwsProvider(**settings)

    @pytest.fixture
    def unreachable(self, settings: dict[str, Any], silent: HostileServer) -> KeyProvider:
        return AwsProvider(**settings | {"resolve": lambda _host, _port: ("127.0.0.1", silent.port)})

    @pytest.fixture
    def credentials(self, owner: Credentials) -> list[str]:
        return [owner.secret]


@pytest.fixture(scope="module")
def gcp_server() -> Iterator[CloudKms]:
    server = CloudKms()
    yield server
    server.stop()


class TestGcp(ProviderConformance):
    @pytest.fixture
    def provider(self, gcp_server: CloudKms) -> KeyProvider:
        return GcpProvider(**gcp_server.settings())

    @pytest.fixture
    def unreachable(self, gcp_server: CloudKms, silent: HostileServer) -> KeyProvider:
        return GcpProvider(**gcp_server.settings(resolve=lambda _host, _port: ("127.0.0.1", silent.port)))

    @pytest.fixture
    def credentials(self, gcp_server: CloudKms) -> list[str]:
        return gcp_server.service_account.private_key.splitlines()[1:-1]


class TestPkcs11(ProviderConformance):
    rights: ClassVar[dict[str, Any]] = {"ENCRYPT": True, "DECRYPT": True, "WRAP": False, "UNWRAP": False}
    mechanism: ClassVar = "aes-gcm"

    @pytest.fixture
    def settings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        home = tmp_path / "softhsm"
        home.mkdir()
        hsm = SoftHSM(home)
        for name, value in hsm.environment.items():
            monkeypatch.setenv(name, value)
        token = hsm.new_token()
        token.create_key(**self.rights)
        return token.settings(mechanism=self.mechanism)

    @pytest.fixture
    def provider(self, settings: dict[str, Any]) -> KeyProvider:
        return Pkcs11Provider(**settings)

    @pytest.fixture
    def unreachable(self, settings: dict[str, Any], tmp_path: Path) -> KeyProvider:
        # To load it is to wait for somebody who writes to it.
        os.mkfifo(tmp_path / "hangs.so")
        return Pkcs11Provider(**settings | {"module": tmp_path / "hangs.so"})

    @pytest.fixture
    def credentials(self, settings: dict[str, Any]) -> list[str]:
        return [settings["pin"]]


class TestPkcs11WithoutAssociatedData(TestPkcs11):
    rights: ClassVar[dict[str, Any]] = {"ENCRYPT": False, "DECRYPT": False, "WRAP": True, "UNWRAP": True}
    mechanism: ClassVar = "aes-kwp"
