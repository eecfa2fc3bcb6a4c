"""Start-up as an application does it: settings from the environment, real databases, OpenBao, Azure's protocol."""

import asyncio
import copy
import gc
import logging
import os
import pickle
import threading
import traceback
import uuid
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON, Engine, create_engine, insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import (
    DataKey,
    EncryptedJSON,
    Keyring,
    configure,
    configure_async,
    is_configured,
    reset,
    use_keyring,
)
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.boot import provision, set_aside
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.keystore import KeyStore
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.providers.azure import AzureProvider
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.status import status
from sqlalchemy_kravn_crypto.testing import FakeKMS
from tests.azure_server import AzureVault
from tests.fixtures_postgres import asynchronous
from tests.openbao import OpenBao

SECRET = "MARKER-of-the-secret-with-enough-characters"
CREDENTIALS = {"token": "MARKER-of-the-value", "scopes": ["read", {"until": None}]}
ENCRYPT, DECRYPT = "transit/encrypt/{}", "transit/decrypt/{}"

Environment = Callable[..., None]


class Base(DeclarativeBase):
    pass


class Plugin(Base):
    __tablename__ = "plugin"

    id: Mapped[int] = mapped_column(primary_key=True)
    credentials: Mapped[dict[str, Any] | None] = mapped_column(EncryptedJSON)
    extra: Mapped[dict[str, Any] | None] = mapped_column(EncryptedJSON(storage="text"))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url)
    migrate(made)
    Base.metadata.create_all(made)
    yield made
    made.dispose()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Environment:
    """Set KRAVN_* variables, and only those given."""
    monkeypatch.chdir(tmp_path)

    def set_all(**variables: str) -> None:
        for name in [name for name in os.environ if name.startswith("KRAVN_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(f"KRAVN_{name}", value)

    return set_all


@pytest.fixture
def vault(openbao: OpenBao) -> dict[str, str]:
    """Give the environment of a process with a master key of its own in OpenBao."""
    key = f"kravn-{uuid.uuid4().hex[:12]}"
    openbao.create_key(key)
    return {
        "SECRET": SECRET,
        "KMS_PROVIDER": "vault",
        "KMS_VAULT_ADDR": openbao.address,
        "KMS_VAULT_TOKEN": openbao.issue_token(key),
        "KMS_VAULT_KEY": key,
    }


def write(engine: Engine, **values: Any) -> None:
    with Session(engine) as session:
        session.add(Plugin(**values))
        session.commit()


def read(engine: Engine, plugin_id: int = 1) -> Any:
    with Session(engine) as session:
        return session.get_one(Plugin, plugin_id).credentials


def stored(engine: Engine, plugin_id: int = 1) -> bytes:
    with engine.connect() as connection:
        found = connection.scalar(text("SELECT credentials FROM plugin WHERE id = :id"), {"id": plugin_id})
    return bytes(found)


def fails(engine: Engine, error: type[errors.KravnCryptoError], match: str, *secrets: str) -> None:
    """See that a boot fails with this error, that it shows no secret, and that ``status`` reports the same."""
    with pytest.raises(error, match=match) as caught:
        configure(engine)
    assert not is_configured()
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.args)
    assert not any(secret in shown for secret in (SECRET, *secrets))
    assert caught.value.__context__ is None
    problems = status(engine).problems
    assert (type(caught.value).__name__, str(caught.value)) in {(each.error, each.message) for each in problems}


# --- The main job ---------------------------------------------------------------------------------------------------


def test_a_column_is_ciphertext_in_the_database_and_plain_python_in_the_program(
    engine: Engine, environment: Environment, vault: dict[str, str]
) -> None:
    environment(**vault)
    configure(engine)
    write(engine, id=1, credentials=CREDENTIALS, extra=CREDENTIALS)
    assert stored(engine)[:2] == b"\xf9\x02"
    assert stored(engine)[2:10].hex() == current_keyring().primary_key_id
    with engine.connect() as connection:
        row = connection.execute(text("SELECT credentials, extra FROM plugin")).one()
    assert b"MARKER" not in bytes(row[0])
    assert row[1].startswith("enc:v3:")
    reset()
    configure(engine)
    assert read(engine) == CREDENTIALS


def test_one_kms_call_at_a_later_boot_and_none_per_value(
    engine: Engine, environment: Environment, vault: dict[str, str], openbao: OpenBao
) -> None:
    environment(**vault)
    encrypt, decrypt = ENCRYPT.format(vault["KMS_VAULT_KEY"]), DECRYPT.format(vault["KMS_VAULT_KEY"])
    configure(engine)
    assert openbao.count(encrypt) == 1
    before = openbao.count(decrypt)
    reset()
    configure(engine)
    for number in range(1, 101):
        write(engine, id=number, credentials={"number": number})
        assert read(engine, number) == {"number": number}
    assert openbao.count(encrypt) == 1
    assert openbao.count(decrypt) == before + 1


def test_null_is_null_and_json_null_is_an_encrypted_null(engine: Engine, environment: Environment) -> None:
    environment(SECRET=SECRET)
    configure(engine)
    write(engine, id=1, credentials=None)
    with engine.begin() as connection:
        connection.execute(insert(Plugin).values(id=2, credentials=JSON.NULL))
        nulls = connection.scalars(text("SELECT id FROM plugin WHERE credentials IS NULL")).all()
    assert nulls == [1]
    assert read(engine, 1) is None
    assert read(engine, 2) is None


@pytest.mark.parametrize("source", ["secret", "file"])
def test_adopting_a_kms_needs_no_downtime_and_no_re_encryption(
    engine: Engine, environment: Environment, vault: dict[str, str], source: str
) -> None:
    bootstrap = {"SECRET": SECRET} if source == "secret" else {}
    environment(**bootstrap)
    configure(engine)
    write(engine, id=1, credentials={"old": True})
    write(engine, id=2, credentials={"old": True})
    old = stored(engine, 1)
    reset()

    environment(**(vault | {"SECRET": ""} | bootstrap))
    configure(engine)
    assert read(engine, 1) == {"old": True}
    assert stored(engine, 1) == old
    with Session(engine) as session:
        session.get_one(Plugin, 2).credentials = {"new": True}
        session.commit()
    assert stored(engine, 2)[2:10].hex() == current_keyring().primary_key_id
    assert stored(engine, 1)[2:10] != stored(engine, 2)[2:10]
    reset()
    configure(engine)
    assert (read(engine, 1), read(engine, 2)) == ({"old": True}, {"new": True})


def test_azures_protocol_and_sdk_serve_the_same_job(engine: Engine, azure_vault: AzureVault, tmp_path: Path) -> None:
    store = KeyStore(
        provider=AzureProvider(**azure_vault.settings()), secret=SECRET, secret_file=tmp_path / "secret.key"
    )
    with use_keyring(store.open(engine).keyring):
        write(engine, id=1, credentials=CREDENTIALS)
    assert azure_vault.count("wrapkey") == 1
    azure_vault.rotate()  # a new version of the master key must not keep what the old one wrapped from opening
    before = azure_vault.count("unwrapkey")
    with use_keyring(store.open(engine).keyring):
        assert read(engine) == CREDENTIALS
    assert azure_vault.count("unwrapkey") == before + 1
    (row,) = [key for key in status(engine, Settings(secret=SECRET)).keys if key.provider == "azure"]
    assert row.master_key.startswith("https://kravn.vault.azure.net/keys/kravn/")


def test_the_settings_of_azure_reach_the_provider(engine: Engine, environment: Environment) -> None:
    environment(
        SECRET=SECRET,
        KMS_PROVIDER="azure",
        KMS_AZURE_VAULT_URL="https://kravn.vault.azure.net",
        KMS_AZURE_KEY="kravn/not-a-version",
        KMS_AZURE_TENANT_ID="t",
        KMS_AZURE_CLIENT_ID="c",
        KMS_AZURE_CLIENT_SECRET="MARKER",
    )
    fails(engine, errors.SettingsError, "KRAVN_KMS_AZURE_KEY", "MARKER")


# --- Once a process -------------------------------------------------------------------------------------------------


def test_before_it_is_configured_an_encrypted_column_says_so(engine: Engine) -> None:
    assert not is_configured()
    with pytest.raises(errors.NotConfiguredError, match=r"configure\(engine\)"):
        write(engine, id=1, credentials=CREDENTIALS)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO plugin (id, credentials) VALUES (1, :frame)"), {"frame": b"\xf9"})
    with pytest.raises(errors.NotConfiguredError):
        read(engine)


def test_configuring_again_is_a_no_op_and_another_store_is_refused(
    engine: Engine, environment: Environment, vault: dict[str, str], openbao: OpenBao, tmp_path: Path
) -> None:
    environment(**vault)
    configure(engine)
    keyring = current_keyring()
    decrypts = openbao.count(DECRYPT.format(vault["KMS_VAULT_KEY"]))
    configure(engine)
    same_database = create_engine(engine.url)
    configure(same_database)
    same_database.dispose()
    assert current_keyring() is keyring
    assert openbao.count(DECRYPT.format(vault["KMS_VAULT_KEY"])) == decrypts

    environment(SECRET=SECRET)
    with pytest.raises(errors.AlreadyConfiguredError, match="other settings"):
        configure(engine)
    environment(**vault)
    other = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    migrate(other)
    with pytest.raises(errors.AlreadyConfiguredError, match="another database"):
        configure(other)
    reset()
    assert not is_configured()
    configure(other)
    other.dispose()


def test_threads_that_configure_at_once_make_one_boot(
    engine: Engine, environment: Environment, vault: dict[str, str], openbao: OpenBao
) -> None:
    environment(**vault)
    configure(engine)
    reset()
    decrypts = openbao.count(DECRYPT.format(vault["KMS_VAULT_KEY"]))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: configure(engine), range(8)))
    assert openbao.count(DECRYPT.format(vault["KMS_VAULT_KEY"])) == decrypts + 1


def test_a_failed_boot_leaves_the_process_unconfigured_and_the_next_try_succeeds(
    engine: Engine, environment: Environment, vault: dict[str, str]
) -> None:
    environment(**vault | {"KMS_VAULT_TOKEN": "MARKER"})
    with pytest.raises(errors.ProviderDeniedError):
        configure(engine)
    assert not is_configured()
    environment(**vault)
    configure(engine)
    assert is_configured()


def test_a_forked_child_reads_and_writes_and_can_configure(engine: Engine, environment: Environment) -> None:
    environment(SECRET=SECRET)
    configure(engine)
    write(engine, id=1, credentials=CREDENTIALS)
    engine.dispose()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        code = 1
        try:
            own = create_engine(engine.url)
            configure(engine)
            write(own, id=2, credentials=read(own))
            reset()
            configure(own)
            code = 0 if read(own, 2) == CREDENTIALS else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(engine, 2) == CREDENTIALS


def test_a_child_forked_while_another_thread_starts_up_is_not_stuck(
    environment: Environment, vault: dict[str, str], tmp_path: Path
) -> None:
    """The lock of start-up would stay held in the child for ever: the thread that holds it is not there."""
    environment(**vault)
    engine = create_engine(f"sqlite:///{tmp_path / 'fork.db'}")
    migrate(engine)
    held, release = threading.Event(), threading.Event()

    class Slow(Settings):
        def weaknesses(self) -> list[str]:
            held.set()
            release.wait(30)
            return []

    starting = threading.Thread(target=lambda: configure(engine, Slow()))
    starting.start()
    held.wait(30)
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        code = 1
        try:
            own = create_engine(engine.url)
            configure(own)
            code = 0
        finally:
            os._exit(code)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    release.set()
    starting.join()
    engine.dispose()
    assert exit_code == 0


# --- An asynchronous engine -----------------------------------------------------------------------------------------


def test_an_asynchronous_engine_has_a_twin_that_does_not_block_the_loop(
    engine: Engine, environment: Environment, vault: dict[str, str]
) -> None:
    environment(**vault)

    async def main() -> Any:
        async_engine = create_async_engine(asynchronous(engine.url.render_as_string(hide_password=False)))
        turns = 0

        async def tick() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        await configure_async(async_engine)
        ticking.cancel()
        async with AsyncSession(async_engine) as session:
            session.add(Plugin(id=1, credentials=CREDENTIALS))
            await session.commit()
            loaded = (await session.execute(select(Plugin.credentials))).scalar_one()
        async with async_engine.connect() as connection:
            core = (await connection.execute(select(Plugin.credentials))).scalar_one()
        await async_engine.dispose()
        return turns, loaded, core

    turns, loaded, core = asyncio.run(main())
    # Stretching the secret alone takes several of its turns; a blocked loop would have had one or two.
    assert turns > 5
    assert loaded == core == CREDENTIALS


def test_each_twin_refuses_the_other_kind_of_engine(sqlite_url: str) -> None:
    async_engine = create_async_engine(asynchronous(sqlite_url))
    for engine in (async_engine, async_engine.sync_engine):
        with pytest.raises(errors.ConfigurationError, match="configure_async"):
            configure(engine)  # type: ignore[arg-type] # what is tested
    with pytest.raises(errors.ConfigurationError, match=r"configure\(engine\)"):
        asyncio.run(configure_async(create_engine(sqlite_url)))  # type: ignore[arg-type] # what is tested


# --- Fail closed ----------------------------------------------------------------------------------------------------


def test_kms_down(engine: Engine, environment: Environment, vault: dict[str, str]) -> None:
    environment(**vault | {"KMS_VAULT_ADDR": "http://127.0.0.1:1"})
    fails(engine, errors.ProviderUnavailableError, "reach", vault["KMS_VAULT_TOKEN"])


def test_kms_sealed(engine: Engine, environment: Environment, vault: dict[str, str]) -> None:
    own = OpenBao()
    try:
        own.seal()
        environment(**vault | {"KMS_VAULT_ADDR": own.address})
        fails(engine, errors.ProviderSealedError, "sealed", vault["KMS_VAULT_TOKEN"])
    finally:
        own.stop()


@pytest.mark.parametrize("provisioned", [False, True])
def test_forbidden(
    engine: Engine, environment: Environment, vault: dict[str, str], openbao: OpenBao, *, provisioned: bool
) -> None:
    environment(**vault)
    if provisioned:
        configure(engine)
        reset()
    openbao.revoke(vault["KMS_VAULT_TOKEN"])
    fails(engine, errors.ProviderDeniedError, "KRAVN_KMS_VAULT_TOKEN", vault["KMS_VAULT_TOKEN"])


def test_master_key_missing(engine: Engine, environment: Environment, vault: dict[str, str], openbao: OpenBao) -> None:
    environment(**vault)
    configure(engine)
    reset()
    openbao.delete_key(vault["KMS_VAULT_KEY"])
    fails(engine, errors.MasterKeyNotFoundError, vault["KMS_VAULT_KEY"], vault["KMS_VAULT_TOKEN"])


def test_master_key_made_anew(
    engine: Engine, environment: Environment, vault: dict[str, str], openbao: OpenBao
) -> None:
    environment(**vault)
    configure(engine)
    reset()
    openbao.recreate_key(vault["KMS_VAULT_KEY"])
    fails(engine, errors.UnwrapRefusedError, vault["KMS_VAULT_KEY"], vault["KMS_VAULT_TOKEN"])


def test_wrong_key_returned(engine: Engine, azure_vault: AzureVault, tmp_path: Path) -> None:
    store = KeyStore(
        provider=AzureProvider(**azure_vault.settings()), secret=SECRET, secret_file=tmp_path / "secret.key"
    )
    store.open(engine)
    azure_vault.unwrapped = bytes(32)
    with pytest.raises(errors.WrongKeyError):
        store.open(engine)


def test_mode_none_after_a_kms(engine: Engine, environment: Environment, vault: dict[str, str]) -> None:
    environment(**vault)
    configure(engine)
    reset()
    environment(SECRET=SECRET)
    fails(engine, errors.ProviderMismatchError, "KRAVN_KMS_PROVIDER=vault")


def test_another_provider(engine: Engine, environment: Environment, vault: dict[str, str]) -> None:
    environment(**vault)
    configure(engine)
    reset()
    azure = {"VAULT_URL": "https://x.vault.azure.net", "KEY": "k", "TENANT_ID": str(uuid.uuid4())}
    azure |= {"CLIENT_ID": str(uuid.uuid4()), "CLIENT_SECRET": "MARKER"}
    environment(SECRET=SECRET, KMS_PROVIDER="azure", **{f"KMS_AZURE_{name}": value for name, value in azure.items()})
    fails(engine, errors.ProviderMismatchError, "'vault'.*'azure'", "MARKER-of")


def test_table_missing(database_url: str, environment: Environment) -> None:
    environment(SECRET=SECRET)
    engine = create_engine(database_url)
    fails(engine, errors.TableMissingError, "kravn-crypto migrate")
    engine.dispose()


def test_a_row_mac_wrong(engine: Engine, environment: Environment, vault: dict[str, str]) -> None:
    environment(**vault)
    configure(engine)
    reset()
    with engine.begin() as connection:
        connection.execute(text("UPDATE kms_keys SET closing = 'x' WHERE id = 3"))
    fails(engine, errors.RowAuthenticationError, "Row 3", vault["KMS_VAULT_TOKEN"])


def test_old_data_and_an_empty_store(engine: Engine, environment: Environment, vault: dict[str, str]) -> None:
    environment(**vault)
    configure(engine)
    write(engine, id=1, credentials=CREDENTIALS)
    lost = current_keyring().primary_key_id
    reset()
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM kms_keys"))
    with pytest.raises(errors.ExistingDataError, match=rf"plugin\.credentials.*{lost}"):
        configure(engine)
    with pytest.raises(errors.ExistingDataError):
        provision(engine)
    provision(engine, new_database=True)
    configure(engine)
    with pytest.raises(errors.UnknownKeyError) as caught:
        read(engine)
    assert caught.value.key_id == lost


def test_another_bootstrap_key(engine: Engine, environment: Environment) -> None:
    environment(SECRET=SECRET)
    configure(engine)
    reset()
    environment(SECRET="another secret of thirty-two characters")
    fails(engine, errors.BootstrapKeyError, "another than the one on record")


def test_a_foreign_deployment_id(engine: Engine, environment: Environment) -> None:
    environment(SECRET=SECRET)
    configure(engine)
    reset()
    environment(SECRET=SECRET, DEPLOYMENT_ID=str(uuid.uuid4()))
    fails(engine, errors.DeploymentMismatchError, "KRAVN_DEPLOYMENT_ID")


def test_a_secret_too_short(engine: Engine, environment: Environment) -> None:
    environment(SECRET="MARKER")
    fails(engine, errors.SettingsError, "KRAVN_SECRET is too short", "MARKER")


def test_a_setting_missing(engine: Engine, environment: Environment, vault: dict[str, str]) -> None:
    del vault["KMS_VAULT_KEY"]
    environment(**vault)
    fails(engine, errors.SettingsError, "KRAVN_KMS_VAULT_KEY", vault["KMS_VAULT_TOKEN"])


def test_a_setting_misspelt(engine: Engine, environment: Environment, vault: dict[str, str]) -> None:
    environment(**vault, KMS_VAULT_KEYS="MARKER")
    fails(engine, errors.SettingsError, "KRAVN_KMS_VAULT_KEYS.*KRAVN_KMS_VAULT_KEY", "MARKER")


def test_provisioning_left_to_the_command(engine: Engine, environment: Environment, vault: dict[str, str]) -> None:
    environment(**vault, KMS_PROVISION="never")
    fails(engine, errors.NotProvisionedError, "kravn-crypto provision", vault["KMS_VAULT_TOKEN"])
    provision(engine)
    configure(engine)


def test_provisioning_again_makes_nothing_and_looks_whether_all_is_well(
    engine: Engine, environment: Environment, vault: dict[str, str], openbao: OpenBao
) -> None:
    environment(**vault)
    made, found = provision(engine), provision(engine)
    assert [row.row_mac for row in found.keys] == [row.row_mac for row in made.keys]
    assert openbao.count(ENCRYPT.format(vault["KMS_VAULT_KEY"])) == 1
    with engine.begin() as connection:
        connection.execute(text("UPDATE kms_keys SET row_mac = NULL"))
    with pytest.raises(errors.RowAuthenticationError):
        provision(engine)


def test_a_replica_that_may_not_provision_needs_the_right_to_unwrap_only(
    engine: Engine, environment: Environment, vault: dict[str, str], openbao: OpenBao
) -> None:
    environment(**vault)
    provision(engine)
    unwrap_only = openbao.issue_token(vault["KMS_VAULT_KEY"], rights=("decrypt",))
    environment(**vault | {"KMS_VAULT_TOKEN": unwrap_only}, KMS_PROVISION="never")
    configure(engine)
    assert is_configured()


# --- What can be seen of it -----------------------------------------------------------------------------------------


def test_status_tells_provider_keys_states_and_since_when(
    engine: Engine, environment: Environment, vault: dict[str, str]
) -> None:
    environment(**vault, LOG_LEVEL="debug")
    configure(engine)
    found = status(engine)
    assert found.provider == "vault"
    assert found.problems == ()
    assert found.unknown_settings == ("KRAVN_LOG_LEVEL",)
    assert found.epoch == 1
    assert str(uuid.UUID(found.deployment_id)) == found.deployment_id
    assert [(key.provider, key.state) for key in found.keys] == [("none", "retired"), ("vault", "primary")]
    assert found.keys[1].master_key == f"transit/{vault['KMS_VAULT_KEY']}:v1"
    assert all(key.since is not None and key.since.tzinfo is not None for key in found.keys)


def test_status_changes_nothing(engine: Engine, environment: Environment, vault: dict[str, str]) -> None:
    environment(**vault)
    (problem,) = status(engine).problems
    assert problem.error == "NotProvisionedError"
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM kms_keys")) == 0
    environment()
    status(engine)
    assert not Path("data").exists()


def test_status_reports_a_database_that_cannot_be_reached(environment: Environment) -> None:
    environment(SECRET=SECRET)
    engine = create_engine("postgresql+psycopg://nobody:MARKER@127.0.0.1:1/none")
    (problem,) = status(engine).problems
    assert problem.error == "OperationalError"
    assert "MARKER" not in problem.message
    engine.dispose()


def test_a_short_secret_is_warned_of(
    sqlite_url: str, environment: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    environment(SECRET="20 characters of it.")
    engine = create_engine(sqlite_url)
    migrate(engine)
    with caplog.at_level(logging.WARNING):
        configure(engine)
    assert "fewer than 32 characters" in caplog.text
    assert status(engine).warnings
    engine.dispose()


def test_nothing_of_the_key_context_can_be_pickled_copied_or_printed(sqlite_url: str, environment: Environment) -> None:
    environment(SECRET=SECRET)
    engine = create_engine(sqlite_url)
    migrate(engine)
    configure(engine)
    keyring = current_keyring()
    for operation in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be"):
            operation(keyring)
    assert repr(keyring) == f"<Keyring primary={keyring.primary_key_id} keys=1>"
    engine.dispose()


def test_no_secret_is_logged_at_any_level(
    engine: Engine, environment: Environment, vault: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    environment(**vault)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("sqlalchemy").setLevel(logging.INFO)
        configure(engine)
        write(engine, id=1, credentials=CREDENTIALS)
    logging.getLogger("sqlalchemy").setLevel(logging.NOTSET)
    assert "configured with <Keyring" in caplog.text
    assert SECRET not in caplog.text
    assert "MARKER-of-the-value" not in caplog.text
    assert vault["KMS_VAULT_TOKEN"] not in caplog.text


def test_reset_leaves_no_keyring_behind(sqlite_url: str, environment: Environment) -> None:
    environment(SECRET=SECRET)
    engine = create_engine(sqlite_url)
    migrate(engine)
    configure(engine)
    keyring = weakref.ref(current_keyring())
    reset()
    gc.collect()
    assert not is_configured()
    assert keyring() is None
    engine.dispose()


# --- A provider that the settings do not name -----------------------------------------------------------------------


def test_a_provider_of_the_programs_own(engine: Engine, environment: Environment) -> None:
    environment(SECRET=SECRET)
    kms = FakeKMS("own")
    configure(engine, provider=kms)
    write(engine, id=1, credentials=CREDENTIALS)
    assert read(engine) == CREDENTIALS
    assert b"MARKER" not in stored(engine)
    assert [(key.provider, key.state) for key in status(engine).keys] == [("none", "retired"), ("own", "primary")]
    reset()
    kms.calls.clear()
    configure(engine, provider=kms)
    assert read(engine) == CREDENTIALS
    assert kms.calls == {"unwrap": 1}


def test_a_provider_of_the_programs_own_for_an_asynchronous_engine(
    engine: Engine, database_url: str, environment: Environment
) -> None:
    environment()
    kms = FakeKMS()

    async def main() -> None:
        waiting = create_async_engine(asynchronous(database_url))
        await configure_async(waiting, provider=kms)
        async with AsyncSession(waiting) as session:
            session.add(Plugin(id=1, credentials=CREDENTIALS))
            await session.commit()
        await waiting.dispose()

    asyncio.run(main())
    assert read(engine) == CREDENTIALS


def test_another_provider_than_before_is_refused(engine: Engine, environment: Environment) -> None:
    environment(SECRET=SECRET)
    kms, other = FakeKMS(), FakeKMS()
    configure(engine, provider=kms)
    keyring = current_keyring()
    configure(engine, provider=kms)
    for provider in (other, None):
        with pytest.raises(errors.AlreadyConfiguredError, match="another provider"):
            configure(engine, provider=provider)
    assert other.calls == {}
    assert current_keyring() is keyring


def test_a_provider_beside_the_one_of_the_settings_is_refused(
    engine: Engine, environment: Environment, vault: dict[str, str]
) -> None:
    environment(**vault)
    with pytest.raises(errors.ConfigurationError, match=r"'fake'.*'vault'"):
        configure(engine, provider=FakeKMS())
    environment(SECRET=SECRET)
    for name in ("none", ""):
        with pytest.raises(errors.ConfigurationError, match="a name other than"):
            configure(engine, provider=FakeKMS(name))
    assert not is_configured()


def test_what_was_configured_can_be_set_aside(engine: Engine, environment: Environment) -> None:
    environment(SECRET=SECRET)
    configure(engine)
    keyring = current_keyring()
    with use_keyring(Keyring(DataKey.generate())), set_aside():
        reset()
        with use_keyring(keyring):
            assert current_keyring() is keyring
        configure(engine, provider=FakeKMS())
    assert current_keyring() is keyring
    configure(engine)
