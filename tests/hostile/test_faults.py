"""What a network, a machine and a disk may do to a boot: at every point of it, each time with one of two outcomes.

Either the process is configured, or it is not and says why; and the key store is either empty or whole. Whoever boots
next, undisturbed, agrees on one key.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest
from sqlalchemy import Engine, NullPool, create_engine, delete, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, configure, configure_async, is_configured, reset
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.boot import provision
from sqlalchemy_kravn_crypto.changes import Operator
from sqlalchemy_kravn_crypto.configuration import key_store
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.events import read_events
from sqlalchemy_kravn_crypto.lifecycle import rotate
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.rows import StoredRows, connect, read_rows
from sqlalchemy_kravn_crypto.schema import TABLES, State
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.testing import FakeKMS
from tests.fixtures_postgres import asynchronous
from tests.hostile import fault_proxy
from tests.hostile.fault_proxy import FaultProxy
from tests.hostile.mortal_postgres import MortalPostgres
from tests.leaks import leaked
from tests.openbao import OpenBao
from tests.processes import wait_until
from tests.tcp_proxy import TCPProxy

WATCHDOG: Final = 30.0
"""Seconds after which a boot that should have ended is one that waits for ever."""

ROOT: Final = Path(__file__).parents[2]
SECRET: Final = "MARKER of the secret of a deployment"
POINTS: Final = 200
"""A bound on the points of a boot; it has fewer."""


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "fault_note"

    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


def attempted(boot: Callable[[], None], proxy: FaultProxy) -> tuple[bool, BaseException | None]:
    """Boot; return whether the proxy did harm, and what the boot fails with. One that does not end fails the test."""
    failed: list[BaseException] = []

    def attempt() -> None:
        try:
            boot()
        except BaseException as error:  # noqa: BLE001 - it is looked at by whoever asked
            failed.append(error)

    booting = threading.Thread(target=attempt, daemon=True)
    booting.start()
    booting.join(WATCHDOG)
    hangs, struck = booting.is_alive(), proxy.has_struck.is_set()
    proxy.heal()
    booting.join(WATCHDOG)
    assert not hangs
    return struck, failed[0] if failed else None


def in_order(engine: Engine) -> StoredRows:
    """See that the key store is empty or whole, its audit trail included, and return it."""
    with connect(engine) as connection:
        rows = read_rows(connection)
        trail = read_events(connection, None if rows.control is None else rows.control.events_hash)
    if not rows.keys:
        assert trail == []
        return rows
    assert [row.state for row in rows.keys].count(State.PRIMARY) == 1
    assert all(row.row_mac for row in (rows.control, *rows.keys) if row is not None)
    assert "provision" in [event.action for event in trail]
    return rows


def write(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Note(content={"is": "written"}))
        session.commit()


def serves_nothing(engine: Engine) -> None:
    """See that a process whose boot failed has nothing to encrypt with."""
    assert not is_configured()
    with pytest.raises(errors.NotConfiguredError):
        write(engine)


class Target:
    """A deployment whose boots go through a proxy, and which is seen on a way around it."""

    def __init__(self, url: str, settings: Settings, provider: FakeKMS | None) -> None:
        self.url, self.settings, self.provider = url, settings, provider
        self.secrets: tuple[str, ...] = ()
        self.around = create_engine(url, poolclass=NullPool)
        migrate(self.around)
        Base.metadata.create_all(self.around)

    def empty(self) -> None:
        reset()
        with self.around.begin() as connection:
            connection.execute(delete(Note))
            for table in TABLES:
                connection.execute(delete(table))

    def boot_undisturbed(self) -> str:
        reset()
        configure(self.around, self.settings, provider=self.provider)
        write(self.around)
        return current_keyring().primary_key_id

    def survives(self, proxy: FaultProxy, boot: Callable[[], None], expected: tuple[type[BaseException], ...]) -> bool:
        """Boot with what the proxy does, and see that the outcome is one of the two. Return whether it did harm."""
        before = in_order(self.around)
        struck, failure = attempted(boot, proxy)
        after = in_order(self.around)
        if failure is None:
            assert is_configured()
            assert current_keyring().primary_key_id in {row.key_id for row in after.keys}
        else:
            assert struck, repr(failure)
            assert isinstance(failure, expected), repr(failure)
            assert leaked(failure, *self.secrets) == []
            serves_nothing(self.around)
        if before.keys:
            assert after == before
        agreed = self.boot_undisturbed()
        final = in_order(self.around)
        assert [row.key_id for row in final.keys if row.state is State.PRIMARY] == [agreed]
        if after.keys:
            assert final == after
        reset()
        return struck

    def survives_everywhere(
        self,
        proxy: FaultProxy,
        harm: Callable[[int], None],
        boot: Callable[[], None],
        expected: tuple[type[BaseException], ...],
        *,
        first: bool,
    ) -> int:
        """Disturb a boot at one point after the other, until it has no such point. Return how many it has."""
        self.empty()
        if not first:
            self.boot_undisturbed()
        for point in range(1, POINTS):
            if first:
                self.empty()
            reset()
            harm(point)
            if not self.survives(proxy, boot, expected):
                return point - 1
        raise AssertionError


@pytest.fixture
def database(postgres_url: str) -> Iterator[tuple[Target, FaultProxy]]:
    """Give a deployment whose KMS is in this process, and the way to its database."""
    url = make_url(postgres_url)
    proxy = FaultProxy((str(url.host), int(url.port or 0)))
    target = Target(postgres_url, Settings(), FakeKMS())
    target.secrets = (str(url.password),)
    yield target, proxy
    proxy.close()
    target.around.dispose()


def through(proxy: FaultProxy, target: Target) -> Callable[[], None]:
    """Return a boot through the proxy, as a process does it that has never connected before."""
    url = make_url(target.url).set(host="127.0.0.1", port=proxy.port)

    def boot() -> None:
        engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 2})
        try:
            configure(engine, target.settings, provider=target.provider)
        finally:
            engine.dispose()

    return boot


def through_asyncpg(proxy: FaultProxy, target: Target) -> Callable[[], None]:
    url = make_url(asynchronous(target.url)).set(host="127.0.0.1", port=proxy.port)

    async def boot() -> None:
        bounds = {"timeout": 0.5, "command_timeout": 0.5}
        engine = create_async_engine(url, poolclass=NullPool, connect_args=bounds)
        try:
            await configure_async(engine, target.settings, provider=target.provider)
        finally:
            await engine.dispose()

    return lambda: asyncio.run(boot())


BOOTS = pytest.mark.parametrize("first", [True, False], ids=["first boot", "later boot"])
HARM: Final[dict[str, dict[str, Any]]] = {
    "the question is lost": {"asks": fault_proxy.lose},
    "the answer is lost": {"answers": fault_proxy.nothing},
    "half of the answer is lost": {"answers": fault_proxy.half},
    "the answer is garbled": {"answers": fault_proxy.garbled},
    "one bit of the answer is off": {"answers": fault_proxy.one_bit_off},
}


# --- The way to the database -----------------------------------------------------------------------------------------


@BOOTS
@pytest.mark.parametrize("harm", HARM)
def test_a_boot_survives_what_happens_to_each_exchange_with_the_database(
    database: tuple[Target, FaultProxy], harm: str, *, first: bool
) -> None:
    target, proxy = database
    points = target.survives_everywhere(
        proxy,
        lambda point: proxy.harm(point, **HARM[harm]),
        through(proxy, target),
        (errors.KravnCryptoError, DBAPIError),
        first=first,
    )
    assert points > (20 if first else 5)


@BOOTS
def test_a_boot_survives_the_end_of_a_connection_after_any_number_of_bytes(
    database: tuple[Target, FaultProxy], *, first: bool
) -> None:
    target, proxy = database
    stride = 211 if first else 97
    points = target.survives_everywhere(
        proxy,
        lambda point: proxy.cut_after(stride * (point - 1)),
        through(proxy, target),
        (errors.KravnCryptoError, DBAPIError),
        first=first,
    )
    assert points > 20


# Releases of SQLAlchemy and asyncpg leave such a connection open, and Python says so when it finds it.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@BOOTS
def test_where_the_database_falls_silent_the_bounds_of_the_driver_end_a_boot(
    database: tuple[Target, FaultProxy], *, first: bool
) -> None:
    # What asyncpg raises when its own bounds are over is a TimeoutError, which SQLAlchemy does not wrap. For the end of
    # each such connection SQLAlchemy waits for two seconds, so not every point is tried.
    target, proxy = database
    stride = 6 if first else 3
    points = target.survives_everywhere(
        proxy,
        lambda point: proxy.harm(1 + stride * (point - 1), asks=fault_proxy.swallow),
        through_asyncpg(proxy, target),
        (errors.KravnCryptoError, DBAPIError, TimeoutError),
        first=first,
    )
    assert points >= (4 if first else 2)
    gc.collect()  # here, and not within another test


def test_a_database_that_is_silent_from_the_start_is_given_up_after_connect_timeout(
    database: tuple[Target, FaultProxy],
) -> None:
    target, proxy = database
    proxy.harm(1, asks=fault_proxy.swallow)
    assert target.survives(proxy, through(proxy, target), (DBAPIError,))


@BOOTS
def test_a_process_that_waits_for_a_silent_database_serves_nothing_and_fails_when_the_system_gives_up(
    database: tuple[Target, FaultProxy], *, first: bool
) -> None:
    """libpq has no bound on an answer; keepalives and tcp_user_timeout are the system's, and end it like a cut does."""
    target, proxy = database
    target.empty()
    if not first:
        target.boot_undisturbed()
        reset()
    proxy.harm(8 if first else 5, asks=fault_proxy.swallow)
    failed: list[BaseException] = []

    def boot() -> None:
        try:
            through(proxy, target)()
        except DBAPIError as error:
            failed.append(error)

    booting = threading.Thread(target=boot, daemon=True)
    booting.start()
    wait_until(proxy.has_struck.is_set)
    serves_nothing(target.around)
    assert booting.is_alive()
    proxy.heal()
    booting.join(WATCHDOG)
    assert [leaked(error, *target.secrets) for error in failed] == [[]]
    serves_nothing(target.around)
    target.boot_undisturbed()
    assert in_order(target.around).keys


def test_who_falls_silent_under_the_lock_keeps_others_out_for_a_bounded_time(
    database: tuple[Target, FaultProxy],
) -> None:
    target, proxy = database
    assert target.provider is not None
    target.provider.slow = asked = threading.Event()
    url = make_url(target.url).set(host="127.0.0.1", port=proxy.port)
    engine = create_engine(url, poolclass=NullPool)
    silent = threading.Thread(target=lambda: provision_quietly(engine, target), daemon=True)
    silent.start()
    wait_until(lambda: target.provider is not None and target.provider.calls["wrap"])
    other = Settings(kms_timeout=0.2)
    with pytest.raises(errors.KeyStoreLockedError, match=r"more than 0\.8 seconds"):
        configure(target.around, other, provider=target.provider)
    serves_nothing(target.around)
    proxy.heal()
    asked.set()
    silent.join(WATCHDOG)
    target.provider.slow = 0.0
    engine.dispose()
    assert in_order(target.around).keys == ()
    target.boot_undisturbed()


def provision_quietly(engine: Engine, target: Target) -> None:
    with pytest.raises((errors.KravnCryptoError, DBAPIError)):
        key_store(target.settings, target.provider).provision(engine)


# --- The way to the KMS ----------------------------------------------------------------------------------------------


@BOOTS
@pytest.mark.parametrize("harm", [*HARM, "silence"])
def test_a_boot_survives_what_happens_to_each_exchange_with_the_kms(
    postgres_url: str, openbao: OpenBao, harm: str, *, first: bool
) -> None:
    key = f"faults-{uuid.uuid4().hex[:12]}"
    openbao.create_key(key)
    parsed = make_url(openbao.address)
    proxy = FaultProxy((str(parsed.host), int(parsed.port or 0)))
    token = openbao.issue_token(key)

    def settings(address: str, timeout: float) -> Settings:
        return Settings(
            kms_provider="vault",
            kms_vault_addr=address,
            kms_vault_token=token,
            kms_vault_key=key,
            kms_timeout=timeout,
        )

    target = Target(postgres_url, settings(openbao.address, 30), None)
    target.secrets = (token,)
    disturbed = settings(f"http://127.0.0.1:{proxy.port}", 0.5 if harm == "silence" else 30)
    done = {"asks": fault_proxy.swallow} if harm == "silence" else HARM[harm]
    try:
        points = target.survives_everywhere(
            proxy,
            lambda point: proxy.harm(point, **done),
            lambda: configure(target.around, disturbed),
            (errors.ProviderError, errors.WrongKeyError),
            first=first,
        )
    finally:
        proxy.close()
        target.around.dispose()
    # For the data key and for the key that authenticates the rows.
    assert points >= (6 if first else 2)


# --- Power -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal() -> Iterator[MortalPostgres]:
    server = MortalPostgres()
    yield server
    server.close()


@pytest.fixture
def perishable(mortal: MortalPostgres, openbao: OpenBao) -> Iterator[tuple[Target, Settings, TCPProxy]]:
    """Give a deployment on a server that may lose its power, and settings whose KMS is kept waiting on demand."""
    key = f"power-{uuid.uuid4().hex[:12]}"
    openbao.create_key(key)
    proxy = TCPProxy(openbao.address)
    common = {"kms_provider": "vault", "kms_vault_token": openbao.issue_token(key), "kms_vault_key": key}
    target = Target(
        mortal.url.render_as_string(hide_password=False), Settings(kms_vault_addr=openbao.address, **common), None
    )
    target.empty()
    yield target, Settings(kms_vault_addr=proxy.address, kms_timeout=60, **common), proxy
    proxy.close()
    target.around.dispose()


def loses_power_meanwhile(
    mortal: MortalPostgres, proxy: TCPProxy, asked_before: int, act: Callable[[], object]
) -> None:
    """Do something while the database loses its power, and have the database again."""
    proxy.hold_from(proxy.connections + asked_before)
    failed: list[BaseException] = []

    def attempt() -> None:
        try:
            act()
        except DBAPIError as error:
            failed.append(error)

    waits_for = proxy.connections + asked_before
    acting = threading.Thread(target=attempt, daemon=True)
    acting.start()
    wait_until(lambda: proxy.connections > waits_for)
    mortal.lose_power()
    proxy.release()
    acting.join(WATCHDOG)
    mortal.start()
    assert len(failed) == 1


@pytest.mark.parametrize("asked_before", range(6))
def test_the_database_loses_its_power_while_the_first_key_is_made(
    mortal: MortalPostgres, perishable: tuple[Target, Settings, TCPProxy], asked_before: int
) -> None:
    target, settings, proxy = perishable
    loses_power_meanwhile(mortal, proxy, asked_before, lambda: configure(target.around, settings))
    serves_nothing(target.around)
    assert in_order(target.around).keys == ()
    target.boot_undisturbed()
    assert len(in_order(target.around).keys) == 1


@pytest.mark.parametrize("asked_before", range(4))
def test_the_database_loses_its_power_while_a_key_is_rotated(
    mortal: MortalPostgres, perishable: tuple[Target, Settings, TCPProxy], asked_before: int
) -> None:
    target, settings, proxy = perishable
    primary = target.boot_undisturbed()
    before = in_order(target.around)
    operator = Operator(engine=target.around, store=key_store(settings))
    loses_power_meanwhile(mortal, proxy, asked_before, lambda: rotate(operator))
    assert in_order(target.around) == before
    assert target.boot_undisturbed() == primary
    assert rotate(operator) is not None
    assert [row.state for row in in_order(target.around).keys] == [State.PRIMARY, State.PENDING]


@pytest.mark.parametrize("durable", ["on", "off"])
def test_a_key_that_a_process_has_outlasts_the_power_whatever_the_database_does_for_others(durable: str) -> None:
    """Or it would go on, for a while, to encrypt under a key that is nowhere."""
    server = MortalPostgres(synchronous_commit=durable, wal_writer_delay="10s")
    try:
        target = Target(server.url.render_as_string(hide_password=False), Settings(), FakeKMS())
        with target.around.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("CHECKPOINT"))
        configure(target.around, target.settings, provider=target.provider)
        key_id = current_keyring().primary_key_id
        server.lose_power()
        server.start()
        assert [row.key_id for row in in_order(target.around).keys] == [key_id]
        reset()
        assert target.boot_undisturbed() == key_id
        target.around.dispose()
    finally:
        server.close()


# --- The disk of secret.key ------------------------------------------------------------------------------------------

BOOT_OF_A_MACHINE: Final = """
import os, resource, signal, sys
from sqlalchemy import create_engine
from sqlalchemy_kravn_crypto import configure, is_configured
from sqlalchemy_kravn_crypto.exceptions import SecretFileError
from sqlalchemy_kravn_crypto.settings import Settings

settings = Settings()
engine = create_engine(sys.argv[1])
engine.connect().close()  # what that imports is not for every user to read
match sys.argv[2]:
    case "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
    case "nobody" if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    case "dies before":
        os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    case "dies after":
        link = os.link
        os.link = lambda *names: (link(*names), os.kill(os.getpid(), signal.SIGKILL))
try:
    configure(engine, settings)
except SecretFileError as error:
    print("refused:", error)
print("configured" if is_configured() else "unconfigured")
"""


@pytest.fixture
def machine(postgres_url: str) -> Iterator[tuple[Target, Path]]:
    """Give a deployment in mode none, and the data directory; other users may enter what is above it."""
    with TemporaryDirectory() as above:
        Path(above).chmod(0o755)
        target = Target(postgres_url, Settings(data_dir=Path(above, "data")), None)
        yield target, Path(above, "data")
        target.around.dispose()


def booted(target: Target, directory: Path, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BOOT_OF_A_MACHINE, target.url, how],
        cwd=ROOT,
        env=os.environ | {"KRAVN_DATA_DIR": str(directory)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_on_a_full_disk_there_is_no_part_of_a_key_and_no_row(machine: tuple[Target, Path]) -> None:
    target, directory = machine
    done = booted(target, directory, "full")
    assert "secret.key cannot be created: File too large" in done.stdout
    assert done.stdout.endswith("unconfigured\n")
    assert list(directory.iterdir()) == []
    assert in_order(target.around).keys == ()
    target.boot_undisturbed()


def test_where_a_directory_may_not_be_written_there_is_no_key_and_no_row(machine: tuple[Target, Path]) -> None:
    target, directory = machine
    directory.mkdir(mode=0o555)
    done = booted(target, directory, "nobody")
    assert "secret.key cannot be created: Permission denied" in done.stdout
    assert done.stdout.endswith("unconfigured\n")
    assert in_order(target.around).keys == ()
    directory.chmod(0o700)
    target.boot_undisturbed()


@pytest.mark.parametrize("moment", ["dies before", "dies after"])
def test_a_process_that_dies_when_it_makes_the_file_leaves_none_or_a_whole_one(
    machine: tuple[Target, Path], moment: str
) -> None:
    target, directory = machine
    assert booted(target, directory, moment).returncode == -9
    assert in_order(target.around).keys == ()
    found = {path.name for path in directory.iterdir()}
    assert ("secret.key" in found) is (moment == "dies after")
    content = (directory / "secret.key").read_bytes() if moment == "dies after" else None
    target.boot_undisturbed()
    assert content in (None, (directory / "secret.key").read_bytes())


def test_no_part_of_the_file_is_taken_for_a_key(machine: tuple[Target, Path]) -> None:
    target, directory = machine
    target.boot_undisturbed()
    whole = (directory / "secret.key").read_bytes()
    rows = in_order(target.around)
    for length in range(len(whole.strip())):
        (directory / "secret.key").write_bytes(whole[:length])
        reset()
        with pytest.raises(errors.SecretFileError, match="64 hexadecimal characters") as caught:
            configure(target.around, target.settings)
        assert leaked(caught.value, *([whole[:length]] if length > 3 else [])) == []
        serves_nothing(target.around)
    (directory / "secret.key").unlink()
    with pytest.raises(errors.BootstrapKeyError, match="bring it back"):
        configure(target.around, target.settings)
    assert list(directory.iterdir()) == []
    (directory / "secret.key").write_bytes(whole)
    (directory / "secret.key").chmod(0o600)
    target.boot_undisturbed()
    assert in_order(target.around) == rows


def test_no_part_of_the_file_is_taken_for_a_key_on_an_empty_key_store(machine: tuple[Target, Path]) -> None:
    target, directory = machine
    directory.mkdir(mode=0o700)
    (directory / "secret.key").write_bytes(b"0123456789")
    (directory / "secret.key").chmod(0o600)
    with pytest.raises(errors.SecretFileError, match="64 hexadecimal characters"):
        provision(target.around, target.settings)
    assert in_order(target.around).keys == ()
