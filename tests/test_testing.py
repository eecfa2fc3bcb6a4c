"""The pytest plugin, as the tests of a program that uses this library meet it."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import sqlalchemy.dialects.sqlite
import sqlalchemy.ext.asyncio
import sqlalchemy.orm

from sqlalchemy_kravn_crypto import DataKey, Keyring, is_configured
from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.context import current_keyring, publish
from sqlalchemy_kravn_crypto.providers.base import Deadline, WrappedKey
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.testing import FakeKMS

pytest_plugins = ["pytester"]

# What pytester imports in this process it forgets again, and SQLAlchemy's ORM cannot be imported twice.
IMPORTED_BEFORE = (sqlalchemy.dialects.sqlite, sqlalchemy.ext.asyncio, sqlalchemy.orm, Settings)

MODELS = """
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import StaticPool
from sqlalchemy_kravn_crypto import EncryptedJSON, kms_tables


class Base(DeclarativeBase):
    pass


class Plugin(Base):
    __tablename__ = "plugin"
    id: Mapped[int] = mapped_column(primary_key=True)
    credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


kms_tables(Base.metadata)


engines = []


def new_engine():
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    engines.append(engine)
    Base.metadata.create_all(engine)
    return engine


def roundtrip(engine):
    with Session(engine) as session:
        session.add(Plugin(credentials={"token": "t"}))
        session.commit()
        return session.query(Plugin).all()[-1].credentials
"""


CONFTEST = """
import pytest

pytest_plugins = ["sqlalchemy_kravn_crypto.testing"]


@pytest.fixture(autouse=True)
def _dispose():
    from models import engines

    yield
    while engines:
        engines.pop().dispose()
"""


@pytest.fixture
def users(pytester: pytest.Pytester) -> pytest.Pytester:
    """Give a directory with a program that has an encrypted column, and a conftest that opts in."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(models=MODELS)
    return pytester


def test_a_keyring_for_everything_that_a_test_starts(users: pytest.Pytester) -> None:
    users.makepyfile(
        """
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        import pytest
        from models import new_engine, roundtrip
        from sqlalchemy_kravn_crypto import is_configured
        from sqlalchemy_kravn_crypto.context import current_keyring
        from sqlalchemy_kravn_crypto.exceptions import NotConfiguredError

        seen = []

        def test_here(kravn_keyring):
            assert roundtrip(new_engine()) == {"token": "t"}
            seen.append(kravn_keyring.primary_key_id)

        def test_thread(kravn_keyring):
            with ThreadPoolExecutor(1) as threads:
                assert threads.submit(roundtrip, new_engine()).result() == {"token": "t"}
                assert threads.submit(current_keyring).result() is kravn_keyring
            seen.append(kravn_keyring.primary_key_id)

        def test_task(kravn_keyring):
            async def task():
                return current_keyring(), await asyncio.to_thread(current_keyring)

            async def main():
                return await asyncio.create_task(task())

            assert asyncio.run(main()) == (kravn_keyring, kravn_keyring)

        def test_a_fresh_key_every_time():
            assert len(set(seen)) == 2

        def test_without():
            assert not is_configured()
            with pytest.raises(NotConfiguredError):
                roundtrip(new_engine())
        """
    )
    users.runpytest_inprocess().assert_outcomes(passed=5)
    assert not is_configured()


def test_what_was_configured_before_is_there_again(users: pytest.Pytester) -> None:
    keyring = Keyring(DataKey.generate())
    publish(keyring)
    users.makepyfile(
        """
        from models import new_engine, roundtrip
        from sqlalchemy_kravn_crypto import configure
        from sqlalchemy_kravn_crypto.context import current_keyring

        def test_keyring(kravn_keyring):
            assert current_keyring() is kravn_keyring

        def test_kms(kravn_kms):
            engine = new_engine()
            configure(engine, provider=kravn_kms)
            assert roundtrip(engine) == {"token": "t"}

        def test_kms_again(kravn_kms):
            configure(new_engine(), provider=kravn_kms)

        def test_keyring_after_a_program_configured_itself(kravn_keyring, kravn_kms):
            configure(new_engine(), provider=kravn_kms)

        def test_failing(kravn_keyring, kravn_kms):
            configure(new_engine(), provider=kravn_kms)
            raise RuntimeError
        """
    )
    users.runpytest_inprocess().assert_outcomes(passed=4, failed=1)
    assert current_keyring() is keyring


def test_a_kms_with_switches(users: pytest.Pytester) -> None:
    users.makepyfile(
        """
        import asyncio
        import threading

        import pytest
        from models import new_engine, roundtrip
        from sqlalchemy_kravn_crypto import configure, exceptions, is_configured, reset
        from sqlalchemy_kravn_crypto.settings import Settings

        @pytest.mark.parametrize(
            ("switch", "error"),
            [
                ("down", exceptions.ProviderUnavailableError),
                ("sealed", exceptions.ProviderSealedError),
                ("denies", exceptions.ProviderDeniedError),
                ("returns_another_key", exceptions.WrongKeyError),
            ],
        )
        def test_start_up_fails_closed(kravn_kms, switch, error):
            engine = new_engine()
            configure(engine, provider=kravn_kms)
            reset()
            setattr(kravn_kms, switch, True)
            with pytest.raises(error):
                configure(engine, provider=kravn_kms)
            assert not is_configured()
            setattr(kravn_kms, switch, False)
            configure(engine, provider=kravn_kms)

        @pytest.mark.parametrize("slow", [threading.Event(), 30])
        def test_slow(kravn_kms, slow):
            kravn_kms.slow = slow
            with pytest.raises(exceptions.ProviderUnavailableError, match="within 0.1 seconds"):
                configure(new_engine(), Settings(kms_timeout=0.1), provider=kravn_kms)

        def test_running_processes_need_no_kms(kravn_kms):
            engine = new_engine()
            configure(engine, provider=kravn_kms)
            kravn_kms.calls.clear()
            kravn_kms.down = True
            assert roundtrip(engine) == {"token": "t"}
            assert kravn_kms.calls == {}
        """
    )
    users.runpytest_inprocess().assert_outcomes(passed=7)


def test_nothing_secret_is_printed_when_a_test_fails(users: pytest.Pytester) -> None:
    users.makepyfile(
        """
        def test_failing(kravn_keyring, kravn_kms):
            assert kravn_keyring is kravn_kms
        """
    )
    result = users.runpytest_inprocess("--showlocals")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["kravn_keyring = <Keyring primary=* keys=1>", "kravn_kms *= <FakeKMS 'fake' calls={}>"]
    )


def test_the_plugin_is_only_there_where_it_is_wanted(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(kravn_keyring): pass")
    pytester.runpytest_inprocess().assert_outcomes(errors=1)
    pytester.runpytest_subprocess("-p", "sqlalchemy_kravn_crypto.testing").assert_outcomes(passed=1)


def test_a_program_does_without_pytest() -> None:
    program = (
        "import sys; sys.modules['pytest'] = None; import sqlalchemy_kravn_crypto.cli, sqlalchemy_kravn_crypto.demo"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- The fake KMS by itself ------------------------------------------------------------------------------------------


def test_wrapping_is_bound() -> None:
    kms, deadline = FakeKMS(), Deadline(10)
    wrapped = kms.wrap(b"k" * 32, b"binding", deadline)
    assert b"kkkk" not in wrapped.blob
    assert kms.recognises(wrapped.master_key)
    assert kms.unwrap(wrapped, b"binding", deadline) == b"k" * 32
    altered = WrappedKey(wrapped.master_key, bytes([wrapped.blob[0] ^ 1]) + wrapped.blob[1:])
    for refused, binding in ((wrapped, b"another"), (altered, b"binding")):
        with pytest.raises(errors.UnwrapRefusedError) as caught:
            kms.unwrap(refused, binding, deadline)
        assert caught.value.__context__ is None
    with pytest.raises(errors.UnwrapRefusedError):
        FakeKMS().unwrap(wrapped, b"binding", deadline)
    assert not FakeKMS("another").recognises(wrapped.master_key)


def test_calls_of_many_threads_are_counted() -> None:
    kms = FakeKMS()
    threads = [
        threading.Thread(target=lambda: [kms.wrap(b"k" * 32, b"", Deadline(10)) for _ in range(200)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kms.calls == {"wrap": 1600}


@pytest.mark.parametrize("operation", [pickle.dumps, copy.copy, copy.deepcopy])
def test_its_master_key_stays_in_the_process(operation: object) -> None:
    assert callable(operation)
    with pytest.raises(TypeError, match="holds a secret"):
        operation(FakeKMS())
