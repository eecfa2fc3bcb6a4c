"""Providers of other distributions: found by their entry points, made from the environment, used like our own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

from sqlalchemy_kravn_crypto import configure
from sqlalchemy_kravn_crypto.configuration import provider_of, standby_from_environment
from sqlalchemy_kravn_crypto.exceptions import ConfigurationError, CredentialError, KravnCryptoError, SettingsError
from sqlalchemy_kravn_crypto.providers.credentials import Credential
from sqlalchemy_kravn_crypto.providers.discovery import GROUP, RESERVED, installed, parameters, provider_from
from sqlalchemy_kravn_crypto.settings import Provider, Settings, StandbySettings, known_variables
from tests.leaks import leaked
from tests.processes import environment_with

EXAMPLE = Path(__file__).parents[1] / "examples" / "file_provider.py"
SECRET = "MARKER-of-a-secret-that-no-error-shows"
PREFIX = "KRAVN_KMS_ACME_"

HEAD = """
from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.providers.base import KeyProvider, WrappedKey

if TYPE_CHECKING:
    from sqlalchemy_kravn_crypto.providers.credentials import Credential


class Base(KeyProvider):
    name = "acme"

    def wrap(self, data_key, binding, deadline):
        raise errors.ProviderUnavailableError("This one does nothing.", provider="acme")

    def unwrap(self, wrapped, binding, deadline):
        raise errors.ProviderUnavailableError("This one does nothing.", provider="acme")
"""

ACME = """
class Acme(Base):
    def __init__(self, key, token: str, region=None, *, token_path="", port="443"):
        self.given = {"key": key, "token": token, "region": region, "token_path": token_path, "port": port}
"""

Install = Callable[..., Path]


def write_distribution(site: Path, source: str, points: Mapping[str, str], name: str = "acme-kms") -> None:
    """Write into a directory what installing a distribution of one module leaves there."""
    module = name.replace("-", "_")
    metadata = site / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{GROUP}]", *(f"{point} = {target}" for point, target in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (site / f"{module}.py").write_text(source)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution of one module for this test."""
    modules: set[str] = set()

    def add(source: str = ACME, name: str = "acme-kms", **points: str) -> Path:
        site = tmp_path / f"site-{len(modules)}"
        module = name.replace("-", "_")
        modules.add(module)
        write_distribution(site, HEAD + source, points or {"acme": f"{module}:Acme"}, name)
        monkeypatch.syspath_prepend(site)
        installed.cache_clear()
        return site

    installed.cache_clear()
    yield add
    for module in modules:
        sys.modules.pop(module, None)
    monkeypatch.undo()
    installed.cache_clear()


def made(environment: Mapping[str, str], prefix: str = PREFIX) -> Any:
    return provider_from("acme", {prefix + name: value for name, value in environment.items()}, prefix)


def refused(*words: str, **environment: str) -> SettingsError:
    """See that no provider can be made, and that the error says why without a value."""
    with pytest.raises(SettingsError) as caught:
        made(environment)
    assert [word for word in words if word not in str(caught.value)] == []
    assert leaked(caught.value, SECRET) == []
    assert caught.value.__context__ is None
    return caught.value


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_the_parameters_of_the_constructor_are_its_settings(install: Install) -> None:
    install()
    found = parameters("acme", PREFIX)
    assert {name: (one.variable, one.is_required) for name, one in found.items()} == {
        "key": ("KRAVN_KMS_ACME_KEY", True),
        "token": ("KRAVN_KMS_ACME_TOKEN", True),
        "region": ("KRAVN_KMS_ACME_REGION", False),
        "token_path": ("KRAVN_KMS_ACME_TOKEN_PATH", False),
        "port": ("KRAVN_KMS_ACME_PORT", False),
    }


def test_it_is_made_of_what_is_set(install: Install) -> None:
    install()
    provider = made({"KEY": " kravn ", "TOKEN": SECRET, "TOKEN_PATH": "/run/token"})
    assert provider.given == {
        "key": "kravn",
        "token": SECRET,
        "region": None,
        "token_path": "/run/token",
        "port": "443",
    }


def test_a_variable_may_be_in_small_letters_and_an_empty_one_is_as_good_as_none(install: Install) -> None:
    install()
    environment = {"kravn_kms_acme_key": "k", "KRAVN_KMS_ACME_TOKEN": "t", "KRAVN_KMS_ACME_REGION": " "}
    provider: Any = provider_from("acme", environment, PREFIX)
    assert (provider.given["key"], provider.given["region"]) == ("k", None)
    refused("also needs KRAVN_KMS_ACME_TOKEN", KEY="k", TOKEN="")


def test_what_is_of_others_is_none_of_its_settings(install: Install) -> None:
    install()
    others = {"KRAVN_KMS_ACME2_TOKEN": "x", "KRAVN_STANDBY_KMS_ACME_KEY": "x", "KRAVN_KMS_TIMEOUT": "3", "PATH": "/"}
    environment = others | {"KRAVN_KMS_ACME_KEY": "k", "KRAVN_KMS_ACME_TOKEN": "t"}
    provider: Any = provider_from("acme", environment, PREFIX)
    assert (provider.given["key"], provider.given["token"]) == ("k", "t")


def test_a_missing_setting_is_named(install: Install) -> None:
    install()
    refused("The provider acme also needs KRAVN_KMS_ACME_KEY, KRAVN_KMS_ACME_TOKEN.")
    refused("The provider acme also needs KRAVN_KMS_ACME_KEY.", TOKEN=SECRET)


@pytest.mark.parametrize("name", ["KEYS", "TOKN", "TOKEN_", "FILE", "", "TOKEN_FILE_FILE"])
def test_a_misspelt_setting_is_refused_with_the_list_of_those_that_exist(install: Install, name: str) -> None:
    install()
    known = "KRAVN_KMS_ACME_KEY, KRAVN_KMS_ACME_TOKEN, KRAVN_KMS_ACME_REGION, KRAVN_KMS_ACME_TOKEN_PATH"
    refused(
        f"{PREFIX}{name} is no setting of the provider acme. It has {known}",
        **{"KEY": "k", "TOKEN": "t", name: SECRET},
    )


def test_where_there_are_no_settings_none_is_accepted(install: Install) -> None:
    install("class Acme(Base): pass")
    assert made({}).name == "acme"
    refused("It has none.", KEY=SECRET)


def test_what_kubernetes_sets_for_a_service_of_its_name_is_ignored(install: Install) -> None:
    install()
    service = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT_HTTPS": "443",
        "PORT_443_TCP_ADDR": "10.0.0.1",
    }
    assert made(service | {"KEY": "k", "TOKEN": "t"}).given["port"] == "443"
    # Nobody can tell whose this one is.
    assert made({"KEY": "k", "TOKEN": "t", "PORT": "8443"}).given["port"] == "8443"


@pytest.mark.parametrize("parameter", ["key, /", "Key", "keyName", "_key", "*, schlüssel"])
def test_a_parameter_that_no_variable_can_stand_for(install: Install, parameter: str) -> None:
    install(f"class Acme(Base):\n    def __init__(self, {parameter}): pass")
    refused("cannot be made from the environment", "in lower case and passed by name", KEY=SECRET)


def test_such_a_parameter_is_left_alone_where_it_has_a_default(install: Install) -> None:
    source = "class Acme(Base):\n    def __init__(self, a=1, /, _sleep=None, *rest, key, **others): self.key = key"
    install(source)
    assert parameters("acme", PREFIX).keys() == {"key"}
    assert made({"KEY": "k"}).key == "k"


# --- Settings in files -----------------------------------------------------------------------------------------------


def test_each_setting_may_be_in_a_file(install: Install, tmp_path: Path) -> None:
    install()
    path = tmp_path / "token"
    path.write_text(f"{SECRET}\n")
    provider = made({"KEY": "k", "TOKEN_FILE": str(path)})
    assert provider.given["token"] == SECRET


def test_not_both(install: Install, tmp_path: Path) -> None:
    install()
    path = tmp_path / "token"
    path.write_text(SECRET)
    refused("KRAVN_KMS_ACME_TOKEN is set twice, or beside", KEY="k", TOKEN=SECRET, TOKEN_FILE=str(path))


def test_nor_twice(install: Install) -> None:
    install()
    environment = {f"{PREFIX}KEY": "k", f"{PREFIX}TOKEN": "t", f"{PREFIX.lower()}token": SECRET}
    with pytest.raises(SettingsError, match="KRAVN_KMS_ACME_TOKEN is set twice") as caught:
        provider_from("acme", environment, PREFIX)
    assert leaked(caught.value, SECRET) == []


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff" + SECRET.encode(), SECRET.encode() * 3000])
def test_a_file_that_cannot_be_used(install: Install, tmp_path: Path, content: bytes | None) -> None:
    install()
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    refused(f"KRAVN_KMS_ACME_TOKEN_FILE names {path}, which cannot be used: ", KEY="k", TOKEN_FILE=str(path))


def test_a_parameter_whose_name_ends_in_file_is_given_the_path(install: Install) -> None:
    install("class Acme(Base):\n    def __init__(self, token_file): self.given = token_file")
    assert made({"TOKEN_FILE": "/run/token"}).given == "/run/token"


@pytest.mark.parametrize("annotation", ["Credential", "str | Credential", "Credential | None", "'Credential'"])
def test_a_credential_is_read_anew_for_every_operation(install: Install, tmp_path: Path, annotation: str) -> None:
    install(f"class Acme(Base):\n    def __init__(self, token: {annotation}): self.token = token")
    path = tmp_path / "token"
    path.write_text("first\n")
    token = made({"TOKEN_FILE": str(path)}).token
    assert isinstance(token, Credential)
    assert token.reveal("acme") == "first"
    path.write_text("second\n")
    assert token.reveal("acme") == "second"
    path.unlink()
    with pytest.raises(CredentialError, match="KRAVN_KMS_ACME_TOKEN_FILE names"):
        token.reveal("acme")
    refused("KRAVN_KMS_ACME_TOKEN_FILE names", "which cannot be used", TOKEN_FILE=str(path))


def test_a_credential_may_be_a_value(install: Install) -> None:
    install("class Acme(Base):\n    def __init__(self, token: Credential): self.token = token")
    token = made({"TOKEN": SECRET}).token
    assert isinstance(token, Credential)
    assert (token.reveal("acme"), repr(token)) == (SECRET, "<Credential KRAVN_KMS_ACME_TOKEN>")


@pytest.mark.parametrize("annotation", ["Credentials", "TokenCredential", "str", "unknown.Thing[int]"])
def test_what_is_annotated_otherwise_is_a_string(install: Install, annotation: str) -> None:
    install(f"class Acme(Base):\n    def __init__(self, token: {annotation}): self.token = token")
    assert made({"TOKEN": SECRET}).token == SECRET


# --- Names ------------------------------------------------------------------------------------------------------------


def test_it_is_one_of_the_providers_that_can_be_configured(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    for name, value in {"PROVIDER": "acme", "ACME_KEY": "k", "ACME_TOKEN": SECRET}.items():
        monkeypatch.setenv(f"KRAVN_KMS_{name}", value)
    provider: Any = provider_of(Settings.from_environment())
    assert provider.given["token"] == SECRET
    with pytest.raises(SettingsError, match=r"KRAVN_KMS_PROVIDER: must be one of .*vault.*acme"):
        Settings(kms_provider="acne")


def test_what_is_not_configured_is_not_imported(install: Install) -> None:
    install("raise RuntimeError")
    assert installed().keys() == {"acme"}
    assert provider_of(Settings()) is None
    assert "acme_kms" not in sys.modules


def test_the_standby_has_settings_of_its_own(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    for name, value in {"PROVIDER": "acme", "ACME_KEY": "second", "ACME_TOKEN": SECRET}.items():
        monkeypatch.setenv(f"KRAVN_STANDBY_KMS_{name}", value)
    monkeypatch.setenv("KRAVN_KMS_ACME_KEY", "first")
    standby: Any = standby_from_environment()
    assert standby.given["key"] == "second"
    monkeypatch.delenv("KRAVN_STANDBY_KMS_ACME_TOKEN")
    with pytest.raises(SettingsError, match=r"also needs KRAVN_STANDBY_KMS_ACME_TOKEN\."):
        provider_of(StandbySettings.from_environment())


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_no_entry_point_takes_over_what_has_a_meaning_already(
    install: Install, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    install(**{name: "acme_kms:Acme", "acme": "acme_kms:Acme"})
    assert installed().keys() == {"acme"}
    assert f"the provider {name!r} (acme_kms:Acme) is left out" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_every_word_that_has_a_meaning_already_is_reserved() -> None:
    used = {name.removeprefix("KRAVN_KMS_").split("_")[0].lower() for name in known_variables() if "_KMS_" in name}
    assert {*(word for word in used if word != "kravn"), *map(str, Provider)} == RESERVED


def test_a_misspelt_setting_of_our_own_is_refused_even_then(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(vault="acme_kms:Acme")
    monkeypatch.setenv("KRAVN_KMS_VAULT_ADR", "https://vault.example")
    with pytest.raises(SettingsError, match="Did you mean KRAVN_KMS_VAULT_ADDR"):
        Settings.from_environment()


@pytest.mark.parametrize("name", ["Acme", "acme-kms", "acme_kms", "1acme", "a" * 33, "äcme", "acme.kms"])
def test_a_name_that_no_variable_could_stand_for(install: Install, caplog: pytest.LogCaptureFixture, name: str) -> None:
    install(**{name: "acme_kms:Acme"})
    assert installed() == {}
    assert f"the provider {name!r} (acme_kms:Acme) is left out" in caplog.text


def test_two_packages_that_bring_the_same_name(install: Install) -> None:
    install()
    install(name="acme-again")
    error = refused("Several packages bring a provider acme: ", "Uninstall all but one", KEY="k", TOKEN=SECRET)
    assert all(name in str(error) for name in ("acme-kms", "acme-again"))


# --- What is wrong with it --------------------------------------------------------------------------------------------

BROKEN = {
    "no such module": ("", "nowhere:Acme", "nowhere) cannot be imported"),
    "no such class": ("", "acme_kms:Nothing", "cannot be imported: AttributeError"),
    "a module that raises": (f"raise ValueError('{SECRET}')", "acme_kms:Acme", "cannot be imported: ValueError"),
    "a module that is no Python": ("class", "acme_kms:Acme", "cannot be imported: SyntaxError"),
    "a module and no class": ("", "acme_kms", "is no subclass of KeyProvider"),
    "a function": ("def Acme(): pass", "acme_kms:Acme", "is no subclass of KeyProvider"),
    "another class": ("class Acme: pass", "acme_kms:Acme", "is no subclass of KeyProvider"),
    "a class without the methods": (
        "class Acme(KeyProvider): name = 'acme'",
        "acme_kms:Acme",
        "with a wrap and an unwrap",
    ),
}


@pytest.mark.parametrize(("source", "target", "words"), BROKEN.values(), ids=BROKEN)
def test_an_entry_point_that_leads_nowhere(install: Install, source: str, target: str, words: str) -> None:
    install(source, acme=target)
    error = refused("The entry point acme (", KEY="k", TOKEN=SECRET)
    assert words.replace("nowhere) ", "nowhere:Acme) ") in str(error)


def test_a_module_that_cannot_be_imported_can_be_tried(install: Install) -> None:
    site = install("import no_such_sdk")
    command = str(refused("Try: ", KEY="k", TOKEN="t")).partition("Try: python ")[2]
    assert command == "-c 'import acme_kms'"
    environment = os.environ | {"PYTHONPATH": str(site)}
    tried = subprocess.run(
        [sys.executable, "-c", "import acme_kms"], check=False, env=environment, capture_output=True, text=True
    )
    assert "No module named 'no_such_sdk'" in tried.stderr


RAISING = """
class Acme(Base):
    def __init__(self, token):
        try:
            raise ValueError(token)
        except ValueError as error:
            raise {what} from error
"""


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("errors.SettingsError('KRAVN_KMS_ACME_TOKEN must be a number.')", SettingsError),
        ("errors.CredentialError('KRAVN_KMS_ACME_TOKEN must be a number.', provider='acme')", CredentialError),
    ],
)
def test_what_it_says_of_its_settings_is_said_and_nothing_else(
    install: Install, what: str, kind: type[KravnCryptoError]
) -> None:
    install(RAISING.format(what=what))
    with pytest.raises(kind, match=r"^KRAVN_KMS_ACME_TOKEN must be a number\.$") as caught:
        made({"TOKEN": SECRET})
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert leaked(caught.value, SECRET) == []
    assert "acme_kms.py" not in {Path(str(entry.path)).name for entry in caught.traceback}


@pytest.mark.parametrize("what", ["ValueError(token)", "TypeError(token)", "KeyError(token)", "RecursionError(token)"])
def test_what_else_it_raises_is_named_and_not_quoted(install: Install, what: str) -> None:
    install(RAISING.format(what=what))
    refused(f"The provider acme failed with {what.partition('(')[0]} when it was made", TOKEN=SECRET)


@pytest.mark.parametrize("name", ["name = 'another'", "name = None", "del Base.name"])
def test_its_name_must_be_that_of_the_entry_point(install: Install, name: str) -> None:
    install(f"class Acme(Base):\n    {name}")
    refused("leads to a provider whose name is another")


def test_configure_says_all_that(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setenv("KRAVN_KMS_PROVIDER", "acme")
    monkeypatch.setenv("KRAVN_KMS_ACME_TOKN", SECRET)
    with pytest.raises(ConfigurationError, match="KRAVN_KMS_ACME_TOKN is no setting of the provider acme") as caught:
        configure(create_engine("sqlite://"))
    assert leaked(caught.value, SECRET) == []


# --- A distribution that is installed, in processes of its own --------------------------------------------------------

PROGRAM = """
import sys
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, configure


class Base(DeclarativeBase):
    pass


class Plugin(Base):
    __tablename__ = "plugin"
    id: Mapped[int] = mapped_column(primary_key=True)
    credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


engine = create_engine("sqlite:///x.db")
Base.metadata.create_all(engine)
configure(engine)
with Session(engine) as session:
    session.add(Plugin(credentials={"number": len(session.scalars(select(Plugin)).all())}))
    session.commit()
    print([plugin.credentials["number"] for plugin in session.scalars(select(Plugin))])
engine.dispose()
"""

SECOND = """

class AcmeProvider(FileProvider):
    name = "acme"

    def __init__(self, directory: str, token: str) -> None:
        super().__init__(directory)
        if len(token) < 8:
            raise errors.SettingsError("KRAVN_KMS_ACME_TOKEN is too short.")
"""


class Machine:
    """A directory with a database, on a machine on which two providers are installed: ``files`` and ``acme``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.site = directory / "site"
        points = {"files": "acme_kms:FileProvider", "acme": "acme_kms:AcmeProvider"}
        write_distribution(self.site, EXAMPLE.read_text(encoding="utf-8") + SECOND, points)
        for name in ("first", "second"):
            (directory / name).mkdir()
            (directory / name / "1.key").write_bytes(os.urandom(32))
        self.environment = {"KMS_PROVIDER": "files", "KMS_FILES_DIRECTORY": str(directory / "first")}
        self.of_acme = {
            "KMS_PROVIDER": "acme",
            "KMS_ACME_DIRECTORY": str(directory / "second"),
            "KMS_ACME_TOKEN": SECRET,
        }

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = {"PYTHONPATH": str(self.site), "DATABASE_URL": "sqlite:///x.db"}
        return subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            check=False,
            cwd=self.directory,
            env=environment_with(self.environment | environment) | paths,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def succeeds(self, *arguments: str, **environment: str) -> str:
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
        return done.stdout

    def fails(self, *words: str, **environment: str) -> None:
        """See that each way to configure a process says the same."""
        done = self.run("program.py", **environment)
        assert done.returncode == 1
        assert [word for word in words if word not in done.stderr] == []
        assert SECRET not in done.stderr
        for command in (["status"], ["provision", "--new-database"]):
            said = self.command(*command, **environment)
            assert said.returncode == 1
            assert [word for word in words if word not in said.stdout + said.stderr] == []
            assert SECRET not in said.stdout + said.stderr
            assert "Traceback" not in said.stderr

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "sqlalchemy_kravn_crypto", *arguments, **environment)

    def status(self, **environment: str) -> Any:
        done = self.command("status", "--json", **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    assert made.command("migrate").returncode == 0
    return made


def test_a_program_is_configured_with_it(machine: Machine) -> None:
    assert machine.succeeds("program.py") == "[0]\n"
    assert machine.succeeds("program.py") == "[0, 1]\n"
    stored = (machine.directory / "x.db").read_bytes()
    assert b"number" not in stored
    found = machine.status()
    assert (found["provider"], found["problems"]) == ("files", [])
    assert [(key["state"], key["provider"], key["master_key"]) for key in found["keys"]] == [
        ("primary", "files", "files:v1")
    ]


def test_the_commands_are_configured_with_it(machine: Machine) -> None:
    before = json.loads(machine.command("status", "--json").stdout)
    assert [problem["error"] for problem in before["problems"]] == ["NotProvisionedError"]
    printed = machine.command("provision", "--new-database").stdout
    assert printed.split()[1:] == ["primary", "files"]
    assert machine.succeeds("program.py", KMS_PROVISION="never") == "[0]\n"
    # A new master key, under which the data key is then wrapped.
    (machine.directory / "first" / "2.key").write_bytes(os.urandom(32))
    assert machine.command("rewrap").returncode == 0
    (machine.directory / "first" / "1.key").unlink()
    assert [key["master_key"] for key in machine.status()["keys"]] == ["files:v2"]
    assert machine.succeeds("program.py") == "[0, 1]\n"


def test_it_can_be_the_standby_and_then_the_first(machine: Machine) -> None:
    machine.succeeds("program.py")
    standby = {f"STANDBY_{name}": value for name, value in machine.of_acme.items()}
    done = machine.command("standby", "add", **standby)
    assert done.returncode == 0, done.stderr
    assert [key["standby_master_key"] for key in machine.status()["keys"]] == ["acme:v1"]
    assert machine.command("rotate", **standby).returncode == 0
    assert machine.command("promote").returncode == 0
    assert machine.succeeds("program.py", **machine.of_acme) == "[0, 1]\n"
    swapped = machine.of_acme | {f"STANDBY_{name}": value for name, value in machine.environment.items()}
    assert machine.command("standby", "switch", **swapped).returncode == 0
    keys = machine.status(**machine.of_acme)["keys"]
    assert {(key["provider"], key["standby_provider"]) for key in keys} == {("acme", "files")}
    missing = machine.command("standby", "add", **standby | {"STANDBY_KMS_ACME_TOKEN": ""})
    assert missing.returncode == 1
    assert "also needs KRAVN_STANDBY_KMS_ACME_TOKEN" in missing.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"KMS_FILES_DIRECTORY": ""}, ["The provider files also needs KRAVN_KMS_FILES_DIRECTORY."]),
        (
            {"KMS_FILES_DIRECTRY": SECRET},
            ["KRAVN_KMS_FILES_DIRECTRY is no setting of the provider files. It has KRAVN_KMS_FILES_DIRECTORY."],
        ),
        ({"KMS_FILES_DIRECTORY": SECRET}, ["KRAVN_KMS_FILES_DIRECTORY must be a path from the root"]),
        ({"KMS_PROVIDER": "fils"}, ["KRAVN_KMS_PROVIDER: must be one of", "files"]),
    ],
    ids=["missing", "misspelt", "malformed", "no provider"],
)
def test_what_is_wrong_with_the_settings_is_said(
    machine: Machine, environment: dict[str, str], words: list[str]
) -> None:
    machine.fails(*words, **environment)


def test_a_broken_package_is_said(machine: Machine) -> None:
    (machine.site / "acme_kms.py").write_text(f"raise ValueError('{SECRET}')")
    machine.fails("The entry point files (acme_kms:FileProvider) cannot be imported: ValueError. Try: python -c")


def test_what_it_raises_is_said(machine: Machine) -> None:
    machine.succeeds("program.py")
    machine.fails("/nowhere/1.key is not there", KMS_FILES_DIRECTORY="/nowhere")
    machine.fails("files:v1 did not wrap this", KMS_FILES_DIRECTORY=str(machine.directory / "second"))
