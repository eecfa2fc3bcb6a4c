"""The settings: every one is read, none is guessed, and no value of one is ever shown."""

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr

from sqlalchemy_kravn_crypto.exceptions import SettingsError
from sqlalchemy_kravn_crypto.providers.credentials import Credential
from sqlalchemy_kravn_crypto.settings import (
    AzureAuth,
    Fence,
    Mechanism,
    Provider,
    Provision,
    Settings,
    VaultAuth,
    known_variables,
    unknown_variables,
)
from tests.leaks import leaked

MARKER = "S3CR3T" + "-marker-that-is-long-enough"
SECRET = "correct horse battery staple, and more"
DEPLOYMENT_ID = "5f0c6f0e-58f7-4a6b-9d6c-1f0a0f0a0f0a"

VAULT = {
    "KRAVN_KMS_PROVIDER": "vault",
    "KRAVN_KMS_VAULT_ADDR": "https://vault.example:8200",
    "KRAVN_KMS_VAULT_TOKEN": MARKER,
    "KRAVN_KMS_VAULT_KEY": "kravn",
}
AZURE = {
    "KRAVN_KMS_PROVIDER": "azure",
    "KRAVN_KMS_AZURE_VAULT_URL": "https://example.vault.azure.net",
    "KRAVN_KMS_AZURE_KEY": "kravn/0123",
    "KRAVN_KMS_AZURE_TENANT_ID": "tenant",
    "KRAVN_KMS_AZURE_CLIENT_ID": "client",
    "KRAVN_KMS_AZURE_CLIENT_SECRET": MARKER,
}
AWS = {"KRAVN_KMS_PROVIDER": "aws", "KRAVN_KMS_AWS_KEY": "arn:aws:kms:eu-central-1:111122223333:key/kravn"}
GCP = {"KRAVN_KMS_PROVIDER": "gcp", "KRAVN_KMS_GCP_KEY": "projects/p/locations/l/keyRings/r/cryptoKeys/k"}
PKCS11 = {
    "KRAVN_KMS_PROVIDER": "pkcs11",
    "KRAVN_KMS_PKCS11_MODULE": "/usr/lib/hsm.so",
    "KRAVN_KMS_PKCS11_TOKEN": "bank",
    "KRAVN_KMS_PKCS11_PIN": MARKER,
    "KRAVN_KMS_PKCS11_KEY": "kravn",
}
# What else logs in, each with all that its provider needs.
APPROLE = {
    **{name: value for name, value in VAULT.items() if not name.endswith("TOKEN")},
    "KRAVN_KMS_VAULT_AUTH": "approle",
    "KRAVN_KMS_VAULT_ROLE_ID": "role",
    "KRAVN_KMS_VAULT_SECRET_ID": MARKER,
}
KUBERNETES = {
    **{name: value for name, value in VAULT.items() if not name.endswith("TOKEN")},
    "KRAVN_KMS_VAULT_AUTH": "kubernetes",
    "KRAVN_KMS_VAULT_ROLE": "role",
}
JWT = {**KUBERNETES, "KRAVN_KMS_VAULT_AUTH": "jwt", "KRAVN_KMS_VAULT_JWT": MARKER}
CERT = {
    **{name: value for name, value in VAULT.items() if not name.endswith("TOKEN")},
    "KRAVN_KMS_VAULT_AUTH": "cert",
    "KRAVN_KMS_VAULT_CLIENT_CERT": "cert.pem",
    "KRAVN_KMS_VAULT_CLIENT_KEY": "key.pem",
}
CERTIFICATE = {
    **{name: value for name, value in AZURE.items() if not name.endswith("CLIENT_SECRET")},
    "KRAVN_KMS_AZURE_AUTH": "certificate",
    "KRAVN_KMS_AZURE_CLIENT_CERTIFICATE": "cert.pem",
}
WORKLOAD = {
    **{name: value for name, value in AZURE.items() if not name.endswith("CLIENT_SECRET")},
    "KRAVN_KMS_AZURE_AUTH": "workload",
    "KRAVN_KMS_AZURE_FEDERATED_TOKEN": MARKER,
}
MANAGED = {
    "KRAVN_KMS_PROVIDER": "azure",
    "KRAVN_KMS_AZURE_VAULT_URL": "https://example.vault.azure.net",
    "KRAVN_KMS_AZURE_KEY": "kravn",
    "KRAVN_KMS_AZURE_AUTH": "managed",
}
PROVIDERS = {
    "vault": VAULT,
    "azure": AZURE,
    "aws": AWS,
    "gcp": GCP,
    "pkcs11": PKCS11,
    "vault-approle": APPROLE,
    "vault-kubernetes": KUBERNETES,
    "vault-jwt": JWT,
    "vault-cert": CERT,
    "azure-certificate": CERTIFICATE,
    "azure-workload": WORKLOAD,
    "azure-managed": MANAGED,
}
SECRET_VARIABLES = [
    "KRAVN_SECRET",
    "KRAVN_KMS_PROXY_PASSWORD",
    "KRAVN_KMS_VAULT_TOKEN",
    "KRAVN_KMS_VAULT_SECRET_ID",
    "KRAVN_KMS_VAULT_JWT",
    "KRAVN_KMS_AZURE_CLIENT_SECRET",
    "KRAVN_KMS_AZURE_CLIENT_CERTIFICATE_PASSWORD",
    "KRAVN_KMS_AZURE_FEDERATED_TOKEN",
    "KRAVN_KMS_GCP_CREDENTIALS",
    "KRAVN_KMS_PKCS11_PIN",
]
CHOICES = {"KRAVN_KMS_PROVIDER", "KRAVN_KMS_VAULT_AUTH", "KRAVN_KMS_AZURE_AUTH"}
"""What says which settings are needed."""

Environment = Callable[..., None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def plain(value: Any) -> Any:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


# --- What is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "written", "expected"),
    [
        ("KRAVN_SECRET", SECRET, SECRET),
        ("KRAVN_SECRET_NEXT", SECRET, SECRET),
        ("KRAVN_SECRET_RETIRED", f"{SECRET}\n{SECRET}!", f"{SECRET}\n{SECRET}!"),
        ("KRAVN_LOOK_INTERVAL", "5", 5.0),
        ("KRAVN_LEASE", "60", 60.0),
        ("KRAVN_FENCE", "transaction", Fence.TRANSACTION),
        ("KRAVN_DESTROY_AFTER_DAYS", "30", 30.0),
        ("KRAVN_DATA_DIR", "/srv/kravn", Path("/srv/kravn")),
        ("KRAVN_DEPLOYMENT_ID", DEPLOYMENT_ID, UUID(DEPLOYMENT_ID)),
        ("KRAVN_KMS_PROVIDER", "none", Provider.NONE),
        ("KRAVN_KMS_PROVISION", "never", Provision.NEVER),
        ("KRAVN_KMS_PROVISION", "auto", Provision.AUTO),
        ("KRAVN_KMS_TIMEOUT", "2.5", 2.5),
        ("KRAVN_KMS_TIMEOUT", "120", 120.0),
        ("KRAVN_KMS_PINNED_KEYS", "0123456789abcdef", {"0123456789abcdef"}),
        ("KRAVN_KMS_PINNED_KEYS", "0123456789abcdef,ff" + "0" * 14, {"0123456789abcdef", "ff00000000000000"}),
        ("KRAVN_KMS_PINNED_KEYS", " 0123456789abcdef ,\tff" + "0" * 14, {"0123456789abcdef", "ff00000000000000"}),
        ("KRAVN_KMS_VAULT_ADDR", "https://vault:8200", "https://vault:8200"),
        ("KRAVN_KMS_VAULT_TOKEN", "token", "token"),
        ("KRAVN_KMS_VAULT_KEY", "key", "key"),
        ("KRAVN_KMS_VAULT_NAMESPACE", "team/a", "team/a"),
        ("KRAVN_KMS_VAULT_MOUNT", "keys", "keys"),
        ("KRAVN_KMS_VAULT_CA_BUNDLE", "/etc/ca.pem", Path("/etc/ca.pem")),
        ("KRAVN_KMS_AZURE_VAULT_URL", "https://v.vault.azure.net", "https://v.vault.azure.net"),
        ("KRAVN_KMS_AZURE_KEY", "name/version", "name/version"),
        ("KRAVN_KMS_AZURE_TENANT_ID", "tenant", "tenant"),
        ("KRAVN_KMS_AZURE_CLIENT_ID", "client", "client"),
        ("KRAVN_KMS_AZURE_CLIENT_SECRET", "client secret", "client secret"),
        ("KRAVN_KMS_AZURE_CA_BUNDLE", "ca.pem", Path("ca.pem")),
        ("KRAVN_KMS_PROXY", "http://proxy:3128", "http://proxy:3128"),
        ("KRAVN_KMS_PROXY_USER", "user", "user"),
        ("KRAVN_KMS_PROXY_PASSWORD", "password", "password"),
        ("KRAVN_KMS_VAULT_AUTH", "approle", VaultAuth.APPROLE),
        ("KRAVN_KMS_VAULT_AUTH_MOUNT", "kube/a", "kube/a"),
        ("KRAVN_KMS_VAULT_ROLE_ID", "role id", "role id"),
        ("KRAVN_KMS_VAULT_SECRET_ID", "secret id", "secret id"),
        ("KRAVN_KMS_VAULT_ROLE", "role", "role"),
        ("KRAVN_KMS_VAULT_JWT", "jwt", "jwt"),
        ("KRAVN_KMS_VAULT_CLIENT_CERT", "cert.pem", Path("cert.pem")),
        ("KRAVN_KMS_VAULT_CLIENT_KEY", "key.pem", Path("key.pem")),
        ("KRAVN_KMS_AZURE_AUTH", "managed", AzureAuth.MANAGED),
        ("KRAVN_KMS_AZURE_AUTHORITY", "https://login.example", "https://login.example"),
        ("KRAVN_KMS_AZURE_CLIENT_CERTIFICATE", "cert.pem", Path("cert.pem")),
        ("KRAVN_KMS_AZURE_CLIENT_CERTIFICATE_PASSWORD", "password", "password"),
        ("KRAVN_KMS_AZURE_FEDERATED_TOKEN", "token", "token"),
        ("KRAVN_KMS_AWS_KEY", "arn", "arn"),
        ("KRAVN_KMS_AWS_ENDPOINT", "https://kms.example", "https://kms.example"),
        ("KRAVN_KMS_AWS_CA_BUNDLE", "ca.pem", Path("ca.pem")),
        ("KRAVN_KMS_AWS_PROFILE", "bank", "bank"),
        ("KRAVN_KMS_AWS_ROLE", "arn", "arn"),
        ("KRAVN_KMS_AWS_EXTERNAL_ID", "id", "id"),
        ("KRAVN_KMS_GCP_KEY", "key", "key"),
        ("KRAVN_KMS_GCP_ENDPOINT", "kms.example", "kms.example"),
        ("KRAVN_KMS_GCP_CA_BUNDLE", "ca.pem", Path("ca.pem")),
        ("KRAVN_KMS_GCP_CREDENTIALS", "{}", "{}"),
        ("KRAVN_KMS_PKCS11_MODULE", "/usr/lib/hsm.so", Path("/usr/lib/hsm.so")),
        ("KRAVN_KMS_PKCS11_TOKEN", "bank", "bank"),
        ("KRAVN_KMS_PKCS11_PIN", "1234", "1234"),
        ("KRAVN_KMS_PKCS11_KEY", "key", "key"),
        ("KRAVN_KMS_PKCS11_KEY_ID", "0a", "0a"),
        ("KRAVN_KMS_PKCS11_MECHANISM", "aes-kwp", Mechanism.KWP),
    ],
)
def test_each_variable_is_read(environment: Environment, variable: str, written: str, expected: Any) -> None:
    environment({variable: written})
    settings = Settings.from_environment()
    assert plain(getattr(settings, variable.removeprefix("KRAVN_").lower())) == expected
    assert variable in known_variables()
    # What is not set is what it is without an environment.
    others = settings.model_dump(exclude={variable.removeprefix("KRAVN_").lower()})
    assert others == {name: DEFAULTS[name] for name in others}


DEFAULTS: dict[str, Any] = {
    "secret_next": None,
    "secret_retired": None,
    "look_interval": 15.0,
    "lease": 180.0,
    "fence": Fence.LEASE,
    "destroy_after_days": 7.0,
    "secret": None,
    "data_dir": Path("data"),
    "deployment_id": None,
    "kms_provider": Provider.NONE,
    "kms_provision": Provision.AUTO,
    "kms_timeout": 10.0,
    "kms_pinned_keys": frozenset(),
    "kms_vault_addr": None,
    "kms_vault_token": None,
    "kms_vault_key": None,
    "kms_vault_namespace": None,
    "kms_vault_mount": "transit",
    "kms_vault_ca_bundle": None,
    "kms_azure_vault_url": None,
    "kms_azure_key": None,
    "kms_azure_tenant_id": None,
    "kms_azure_client_id": None,
    "kms_azure_client_secret": None,
    "kms_azure_ca_bundle": None,
    "kms_proxy": None,
    "kms_proxy_user": None,
    "kms_proxy_password": None,
    "kms_vault_auth": VaultAuth.TOKEN,
    "kms_vault_auth_mount": None,
    "kms_vault_role_id": None,
    "kms_vault_secret_id": None,
    "kms_vault_role": None,
    "kms_vault_jwt": None,
    "kms_vault_client_cert": None,
    "kms_vault_client_key": None,
    "kms_azure_auth": AzureAuth.SECRET,
    "kms_azure_authority": None,
    "kms_azure_client_certificate": None,
    "kms_azure_client_certificate_password": None,
    "kms_azure_federated_token": None,
    "kms_aws_key": None,
    "kms_aws_endpoint": None,
    "kms_aws_ca_bundle": None,
    "kms_aws_profile": None,
    "kms_aws_role": None,
    "kms_aws_external_id": None,
    "kms_gcp_key": None,
    "kms_gcp_endpoint": None,
    "kms_gcp_ca_bundle": None,
    "kms_gcp_credentials": None,
    "kms_pkcs11_module": None,
    "kms_pkcs11_token": None,
    "kms_pkcs11_pin": None,
    "kms_pkcs11_key": None,
    "kms_pkcs11_key_id": None,
    "kms_pkcs11_mechanism": Mechanism.GCM,
}


def test_defaults_are_those_of_an_empty_environment() -> None:
    assert Settings.from_environment().model_dump() == DEFAULTS
    assert Settings.from_environment().weaknesses() == []


def test_empty_variable_is_one_that_is_not_set(environment: Environment) -> None:
    environment(dict.fromkeys(known_variables(), ""))
    assert Settings.from_environment().model_dump() == DEFAULTS


@pytest.mark.parametrize("variables", PROVIDERS.values(), ids=PROVIDERS)
def test_provider_with_all_that_it_needs_is_accepted(environment: Environment, variables: dict[str, str]) -> None:
    environment(variables)
    settings = Settings.from_environment()
    for name, value in variables.items():
        found = plain(getattr(settings, name.removeprefix("KRAVN_").lower()))
        assert (str(found) if isinstance(found, Path) else found) == value


def test_white_space_around_a_value_is_not_part_of_it(environment: Environment) -> None:
    environment({"KRAVN_SECRET": f" {SECRET}\n", "KRAVN_KMS_VAULT_ADDR": " https://vault "})
    settings = Settings.from_environment()
    assert plain(settings.secret) == SECRET
    assert settings.kms_vault_addr == "https://vault"


def test_secret_file_is_in_the_data_directory_from_the_root(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.from_environment().secret_file == tmp_path / "data" / "secret.key"
    environment({"KRAVN_DATA_DIR": "elsewhere"})
    assert Settings.from_environment().secret_file == tmp_path / "elsewhere" / "secret.key"
    environment({"KRAVN_DATA_DIR": "/srv"})
    assert Settings.from_environment().secret_file == Path("/srv/secret.key")


# --- Given in code ---------------------------------------------------------------------------------------------------


def test_given_in_code_comes_before_the_environment(environment: Environment) -> None:
    environment({"KRAVN_KMS_TIMEOUT": "3", "KRAVN_KMS_VAULT_MOUNT": "keys", "KRAVN_SECRET": "environment" + SECRET})
    settings = Settings(kms_timeout=4, secret=SECRET)
    assert settings.kms_timeout == 4
    assert settings.kms_vault_mount == "keys"
    assert plain(settings.secret) == SECRET


def test_given_in_code_with_types_of_their_own() -> None:
    settings = Settings(
        secret=SecretStr(SECRET),
        data_dir=Path("/srv"),
        deployment_id=UUID(DEPLOYMENT_ID),
        kms_provider=Provider.NONE,
        kms_provision=Provision.NEVER,
        kms_pinned_keys={"0123456789abcdef"},
    )
    assert plain(settings.secret) == SECRET
    assert settings.kms_pinned_keys == {"0123456789abcdef"}
    assert settings.deployment_id == UUID(DEPLOYMENT_ID)


def test_unknown_name_in_code_is_refused() -> None:
    with pytest.raises(SettingsError, match="KRAVN_KMS_VALUT_ADDR is no setting") as caught:
        Settings(kms_valut_addr=MARKER)
    assert leaked(caught.value, MARKER) == []


def test_settings_cannot_be_changed() -> None:
    settings = Settings(secret=SECRET)
    with pytest.raises(ValueError, match="frozen"):
        settings.kms_timeout = 3
    assert settings.kms_timeout == 10


# --- Files -----------------------------------------------------------------------------------------------------------


def set_up(variable: str) -> dict[str, str]:
    """Return what else must be set so that one secret is all that is missing."""
    return {
        name: value
        for variables in (VAULT, AZURE, APPROLE, JWT, WORKLOAD, PKCS11)
        if variable in variables
        for name, value in variables.items()
        if name != variable
    }


@pytest.mark.parametrize("spell", [str.upper, str.lower], ids=["capitals", "small letters"])
@pytest.mark.parametrize("variable", SECRET_VARIABLES)
def test_secret_is_read_from_a_file(
    environment: Environment, tmp_path: Path, variable: str, spell: Callable[[str], str]
) -> None:
    file = tmp_path / "secret"
    file.write_text(f"  grün {MARKER}\n\n", encoding="utf-8")
    environment({**set_up(variable), spell(f"{variable}_FILE"): str(file)})
    settings = Settings.from_environment()
    assert plain(getattr(settings, variable.removeprefix("KRAVN_").lower())) == f"grün {MARKER}"


@pytest.mark.parametrize("spell", [str.upper, str.lower], ids=["capitals", "small letters"])
@pytest.mark.parametrize("variable", SECRET_VARIABLES)
def test_both_forms_of_a_secret_are_refused(
    environment: Environment, tmp_path: Path, variable: str, spell: Callable[[str], str]
) -> None:
    file = tmp_path / "secret"
    file.write_text(MARKER)
    environment({**set_up(variable), f"{variable}_FILE": str(file), spell(variable): MARKER})
    with pytest.raises(SettingsError, match=rf"{variable} and {variable}_FILE are both set") as caught:
        Settings.from_environment()
    assert leaked(caught.value, MARKER) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(None, "No such file or directory", id="missing"),
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(b" \r\n\t ", "it is empty", id="blank"),
        pytest.param(MARKER.encode() + b"\xff\xfe", "it is not UTF-8 text", id="not UTF-8"),
        pytest.param(MARKER.encode("utf-16"), "it is not UTF-8 text", id="UTF-16"),
    ],
)
@pytest.mark.parametrize("variable", SECRET_VARIABLES)
def test_file_that_cannot_be_used_is_refused(
    environment: Environment, tmp_path: Path, variable: str, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    environment({**set_up(variable), f"{variable}_FILE": str(file)})
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment()
    for part in (f"{variable}_FILE", str(file), reason):
        assert part in str(caught.value)
    assert leaked(caught.value, MARKER) == []
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_directory_is_no_file_of_a_secret(environment: Environment, tmp_path: Path) -> None:
    environment({"KRAVN_SECRET_FILE": str(tmp_path)})
    with pytest.raises(SettingsError, match="Is a directory"):
        Settings.from_environment()


def test_a_secret_in_a_file_is_read_anew_whenever_a_provider_needs_it(environment: Environment, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first")
    environment({**set_up("KRAVN_KMS_VAULT_TOKEN"), "KRAVN_KMS_VAULT_TOKEN_FILE": str(file)})
    credential = Settings.from_environment().credential("kms_vault_token")
    assert credential is not None
    assert credential.reveal("vault") == "first"
    file.write_text("second\n")
    assert credential.reveal("vault") == "second"


def test_a_secret_that_is_given_is_not_looked_for_in_the_file(environment: Environment, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("in the file")
    environment({**set_up("KRAVN_KMS_VAULT_TOKEN"), "KRAVN_KMS_VAULT_TOKEN_FILE": str(file)})
    credential = Settings(kms_vault_token="given").credential("kms_vault_token")
    assert isinstance(credential, Credential)
    assert credential.reveal("vault") == "given"


def test_a_secret_that_is_not_set_is_none() -> None:
    assert Settings().credential("kms_vault_token") is None


# --- Strength --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["a", "x" * 15, "ü" * 15, " " + "x" * 15 + " "], ids=len)
def test_short_secret_is_refused(environment: Environment, secret: str) -> None:
    environment({"KRAVN_SECRET": secret})
    for made in (Settings.from_environment, lambda: Settings(secret=secret)):
        with pytest.raises(SettingsError, match=r"KRAVN_SECRET is too short.*16 characters"):
            made()


@pytest.mark.parametrize("length", [16, 31])
def test_weak_secret_is_accepted_with_a_warning_of_its_own(length: int) -> None:
    (weakness,) = Settings(secret="x" * length).weaknesses()
    assert "KRAVN_SECRET has fewer than 32 characters" in weakness
    assert "xx" not in weakness


def test_strong_secret_has_no_weakness() -> None:
    assert Settings(secret="x" * 32).weaknesses() == []


# --- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("KRAVN_SECRT", "KRAVN_SECRET"),
        ("KRAVN_SECRETS", "KRAVN_SECRET"),
        ("KRAVN_SECRET_FIL", "KRAVN_SECRET_FILE"),
        ("KRAVN_SECRETFILE", "KRAVN_SECRET_FILE"),
        ("KRAVN_DATADIR", "KRAVN_DATA_DIR"),
        ("KRAVN_DEPLOYMENTID", "KRAVN_DEPLOYMENT_ID"),
        ("KRAVN_KMS_PROVIDERS", "KRAVN_KMS_PROVIDER"),
        ("KRAVN_KMS_PROVDER", "KRAVN_KMS_PROVIDER"),
        ("KRAVN_KMSPROVIDER", "KRAVN_KMS_PROVIDER"),
        ("KRAVN_KMS_VALUT_ADDR", "KRAVN_KMS_VAULT_ADDR"),
        ("KRAVN_KMS_VAULT_ADDRESS", "KRAVN_KMS_VAULT_ADDR"),
        ("KRAVN_KMS_VAULT_TOKN", "KRAVN_KMS_VAULT_TOKEN"),
        ("KRAVN_KMS_AZURE_TENANT", "KRAVN_KMS_AZURE_TENANT_ID"),
        ("kravn_kms_azure_client_secrt", "KRAVN_KMS_AZURE_CLIENT_SECRET"),
    ],
)
def test_misspelt_name_is_refused_and_both_are_named(environment: Environment, written: str, meant: str) -> None:
    environment({written: MARKER})
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment()
    assert f"{written} is no setting. Did you mean {meant}?" in str(caught.value)
    assert leaked(caught.value, MARKER) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("KRAVN_\udcff", "KRAVN_\\udcff"),
        ("KRAVN_X\nERROR forged", "KRAVN_X\\nERROR forged"),
        ("KRAVN_Ä", "KRAVN_\\xc4"),
    ],
    ids=["no UTF-8", "a line break", "no ASCII"],
)
def test_unknown_name_that_cannot_be_printed_is_escaped(
    environment: Environment, caplog: pytest.LogCaptureFixture, name: str, shown: str
) -> None:
    environment({name: MARKER})
    Settings.from_environment()
    assert [record.getMessage() for record in caplog.records] == [
        f"{shown} is no setting of this library and is ignored"
    ]


@pytest.mark.parametrize("name", ["KRAVN_COLOUR", "KRAVN_LOG_LEVEL", "KRAVN_", "KRAVN_SERVICE", "kravn_something_else"])
def test_unknown_name_is_warned_of(environment: Environment, caplog: pytest.LogCaptureFixture, name: str) -> None:
    environment({name: MARKER})
    with caplog.at_level(logging.WARNING, "sqlalchemy_kravn_crypto"):
        Settings.from_environment()
    (record,) = caplog.records
    assert name in record.getMessage()
    assert MARKER not in record.getMessage()
    assert unknown_variables({name: MARKER}) == [name]


@pytest.mark.parametrize(
    "name",
    [
        "KRAVN_SERVICE_HOST",
        "KRAVN_SERVICE_PORT",
        "KRAVN_SERVICE_PORT_HTTP",
        "KRAVN_PORT",
        "KRAVN_PORT_8200_TCP",
        "KRAVN_PORT_8200_TCP_PROTO",
        "KRAVN_PORT_8200_TCP_PORT",
        "KRAVN_PORT_8200_TCP_ADDR",
        "KRAVN_DB_SERVICE_HOST",
        "KRAVN_DB_SERVICE_PORT_POSTGRES",
        "KRAVN_DB_PORT",
        "KRAVN_DB_PORT_5432_TCP_ADDR",
    ],
)
def test_what_kubernetes_sets_for_a_service_is_ignored(
    environment: Environment, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    environment({name: "tcp://10.0.0.1:8200"})
    with caplog.at_level(logging.DEBUG, "sqlalchemy_kravn_crypto"):
        assert Settings.from_environment().model_dump() == DEFAULTS
    assert caplog.records == []
    assert unknown_variables({name: ""}) == []


def test_no_known_name_is_unknown_and_all_of_the_others_are_listed() -> None:
    known = dict.fromkeys(known_variables(), "")
    assert unknown_variables(known) == []
    assert {f"{name}_FILE" for name in SECRET_VARIABLES} <= known.keys()
    names = {name.removeprefix("KRAVN_").lower() for name in known if not name.endswith("_FILE")}
    standby = {name for name in names if name.startswith("standby_")}
    assert names - standby == DEFAULTS.keys()
    assert standby == {f"standby_{name}" for name in DEFAULTS if name.startswith("kms_")}
    assert unknown_variables({**known, "KRAVN_B": "", "KRAVN_A": "", "PATH": "", "XKRAVN_A": ""}) == [
        "KRAVN_A",
        "KRAVN_B",
    ]


# --- What is missing or wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", PROVIDERS.values(), ids=PROVIDERS)
def test_all_that_a_provider_misses_is_named(environment: Environment, variables: dict[str, str]) -> None:
    required = [name for name in variables if name not in CHOICES]
    environment({name: value for name, value in variables.items() if name in CHOICES})
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment()
    assert [name for name in required if name not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("variables", "missing"),
    [(variables, name) for variables in PROVIDERS.values() for name in variables if name not in CHOICES],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_what_a_provider_misses_is_named(
    environment: Environment, variables: dict[str, str], missing: str
) -> None:
    environment({name: value for name, value in variables.items() if name != missing})
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment()
    assert str(caught.value) == f"KRAVN_KMS_PROVIDER={variables['KRAVN_KMS_PROVIDER']} also needs {missing}."
    assert leaked(caught.value, MARKER) == []


@pytest.mark.parametrize("blank", ["", "  "], ids=["empty", "blank"])
def test_blank_value_is_missing(environment: Environment, blank: str) -> None:
    environment({**VAULT, "KRAVN_KMS_VAULT_TOKEN": blank})
    with pytest.raises(SettingsError, match=r"also needs KRAVN_KMS_VAULT_TOKEN\."):
        Settings.from_environment()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KRAVN_DEPLOYMENT_ID", MARKER),
        ("KRAVN_DEPLOYMENT_ID", f"{{{MARKER}}}"),
        ("KRAVN_KMS_PROVIDER", MARKER),
        ("KRAVN_KMS_PROVIDER", f"vault {MARKER}"),
        ("KRAVN_KMS_PROVISION", MARKER),
        ("KRAVN_KMS_TIMEOUT", MARKER),
        ("KRAVN_KMS_TIMEOUT", f"10 {MARKER}"),
        ("KRAVN_KMS_PINNED_KEYS", MARKER),
        ("KRAVN_KMS_PINNED_KEYS", f"0123456789abcdef,{MARKER}"),
        ("KRAVN_SECRET", MARKER[:10]),
    ],
)
@pytest.mark.parametrize("in_code", [False, True], ids=["environment", "code"])
def test_bad_value_is_refused_by_name_and_never_quoted(
    environment: Environment, variable: str, value: str, *, in_code: bool
) -> None:
    # A neighbour's secret is not quoted, either.
    environment({"KRAVN_KMS_VAULT_TOKEN": MARKER + "-neighbour"})
    given: dict[str, Any] = {}
    if in_code:
        given = {variable.removeprefix("KRAVN_").lower(): value}
    else:
        environment({variable: value})
    with pytest.raises(SettingsError, match=variable) as caught:
        Settings(**given)
    assert leaked(caught.value, MARKER[:8]) == []
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("number", ["0", "-1", "120.1", "nan", "inf", "-inf", "1e9"])
def test_timeout_is_bounded(environment: Environment, number: str) -> None:
    environment({"KRAVN_KMS_TIMEOUT": number})
    with pytest.raises(SettingsError, match="KRAVN_KMS_TIMEOUT"):
        Settings.from_environment()


@pytest.mark.parametrize("key_id", ["0123456789ABCDEF", "0123456789abcde", "0123456789abcdef0", "0123456789abcdeg"])
def test_pinned_keys_are_key_ids(environment: Environment, key_id: str) -> None:
    environment({"KRAVN_KMS_PINNED_KEYS": key_id})
    with pytest.raises(SettingsError, match="KRAVN_KMS_PINNED_KEYS: must be key ids of 16 lower-case") as caught:
        Settings.from_environment()
    assert leaked(caught.value, key_id) == []


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name != "kms_pinned_keys"])
def test_value_of_a_wrong_type_is_refused_by_name_and_never_quoted(name: str) -> None:
    with pytest.raises(SettingsError, match=f"KRAVN_{name.upper()}") as caught:
        Settings(**{name: {"nested": [MARKER]}})
    assert leaked(caught.value, MARKER) == []
    assert caught.value.__context__ is None


def test_all_that_is_wrong_is_said_at_once(environment: Environment) -> None:
    environment({"KRAVN_KMS_TIMEOUT": MARKER, "KRAVN_DEPLOYMENT_ID": MARKER, "KRAVN_KMS_PROVIDER": MARKER})
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment()
    for name in ("KRAVN_KMS_TIMEOUT", "KRAVN_DEPLOYMENT_ID", "KRAVN_KMS_PROVIDER"):
        assert name in str(caught.value)
    assert leaked(caught.value, MARKER) == []


# --- Nothing is shown ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["environment", "file", "code"])
def test_settings_show_no_secret(environment: Environment, tmp_path: Path, source: str) -> None:
    secrets = {name: f"{MARKER} of {name}" for name in SECRET_VARIABLES}
    given: dict[str, Any] = {}
    if source == "environment":
        environment(secrets)
    elif source == "file":
        for name, value in secrets.items():
            (tmp_path / name).write_text(value)
            environment({f"{name}_FILE": str(tmp_path / name)})
    else:
        given = {name.removeprefix("KRAVN_").lower(): value for name, value in secrets.items()}
    settings = Settings(**given)
    for name, value in secrets.items():
        assert plain(getattr(settings, name.removeprefix("KRAVN_").lower())) == value
    shown = [
        repr(settings),
        str(settings),
        f"{settings}",
        settings.model_dump_json(),
        repr(settings.model_dump()),
        repr(settings.model_dump(mode="json")),
        repr(vars(settings)),
        repr(dict(settings)),
    ]
    assert [text for text in shown if MARKER in text] == []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_settings_cannot_be_pickled(protocol: int) -> None:
    with pytest.raises(TypeError, match="holds a secret"):
        pickle.dumps(Settings(secret=SECRET), protocol)
