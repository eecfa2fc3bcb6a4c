"""Which keyring is used here and now: the process's, or the one of a ``with`` block."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sqlalchemy_kravn_crypto import DataKey, Keyring, is_configured, use_keyring
from sqlalchemy_kravn_crypto.context import (
    current_keyring,
    end_lease,
    extend_lease,
    keyring_to_write,
    publish,
    put_aside,
    replace_keyring,
    report_unknown_key,
)
from sqlalchemy_kravn_crypto.exceptions import ConfigurationError, LeaseExpiredError, NotConfiguredError

FORKED = """
import os
from sqlalchemy_kravn_crypto import DataKey, Keyring, use_keyring
from sqlalchemy_kravn_crypto.context import current_keyring, publish

process, override = Keyring(DataKey(bytes(32))), Keyring(DataKey(bytes([1]) * 32))
publish(process)

def in_child(expected):
    child = os.fork()
    if not child:
        os._exit(0 if current_keyring() is expected else 1)
    assert os.waitpid(child, 0)[1] == 0

in_child(process)
with use_keyring(override):
    in_child(override)
in_child(process)
child = os.fork()
if not child:
    publish(None)
    os._exit(0)
os.waitpid(child, 0)
assert current_keyring() is process
print("done")
"""


@pytest.fixture
def keyrings() -> Iterator[list[Keyring]]:
    yield [Keyring(DataKey.generate()) for _ in range(3)]
    publish(None)


def test_error_of_a_process_that_is_not_configured_says_what_to_call() -> None:
    assert not is_configured()
    with pytest.raises(NotConfiguredError) as caught:
        current_keyring()
    assert isinstance(caught.value, ConfigurationError)
    for expected in ("configure(engine)", "configure_async(engine)", "AsyncEngine", "start-up"):
        assert expected in str(caught.value)


def test_published_keyring_is_the_one_of_all_threads(keyrings: list[Keyring]) -> None:
    publish(keyrings[0])
    assert is_configured()
    assert current_keyring() is keyrings[0]
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: current_keyring(), range(8))) == {keyrings[0]}
    publish(keyrings[1])
    assert current_keyring() is keyrings[1]
    publish(None)
    assert not is_configured()


def test_override_nests_and_ends_with_its_block(keyrings: list[Keyring]) -> None:
    first, second, process = keyrings
    with use_keyring(first) as given:
        assert given is first
        assert is_configured()
        with use_keyring(second):
            assert current_keyring() is second
            with use_keyring(first):
                assert current_keyring() is first
            assert current_keyring() is second
        assert current_keyring() is first
        publish(process)
        assert current_keyring() is first
    assert current_keyring() is process


def test_override_ends_when_its_block_fails(keyrings: list[Keyring]) -> None:
    with pytest.raises(ZeroDivisionError), use_keyring(keyrings[0]):
        _ = 1 / 0
    assert not is_configured()


def test_override_is_of_one_thread_only(keyrings: list[Keyring]) -> None:
    publish(keyrings[2])
    both = threading.Barrier(2, timeout=30)

    def work(keyring: Keyring) -> list[Keyring]:
        seen = [current_keyring()]
        with use_keyring(keyring):
            both.wait()
            seen.append(current_keyring())
            both.wait()
        return [*seen, current_keyring()]

    with use_keyring(keyrings[0]), ThreadPoolExecutor(2) as threads:
        found = list(threads.map(work, keyrings[:2]))
    assert found == [[keyrings[2], keyring, keyrings[2]] for keyring in keyrings[:2]]


def test_override_is_of_one_asynchronous_task_only(keyrings: list[Keyring]) -> None:
    async def work(keyring: Keyring, both: asyncio.Barrier) -> list[Keyring]:
        seen = [current_keyring()]
        with use_keyring(keyring):
            await both.wait()
            seen.append(current_keyring())
            seen.append(await asyncio.create_task(inherits()))
            await both.wait()
        return [*seen, current_keyring()]

    async def inherits() -> Keyring:
        return current_keyring()

    async def main() -> list[list[Keyring]]:
        both = asyncio.Barrier(2)
        return await asyncio.gather(*(work(keyring, both) for keyring in keyrings[:2]))

    publish(keyrings[2])
    assert asyncio.run(main()) == [[keyrings[2], keyring, keyring, keyrings[2]] for keyring in keyrings[:2]]


def test_both_last_after_fork() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", FORKED], check=True, capture_output=True, text=True, cwd=root, timeout=60
    )
    assert done.stdout == "done\n"


# --- The lease ------------------------------------------------------------------------------------------------------


class Clock:
    """The process's clock, that goes when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_until_its_lease_is_over_a_keyring_encrypts_and_after_that_it_decrypts(keyrings: list[Keyring]) -> None:
    clock = Clock()
    publish(keyrings[0], writable_until=110.0, clock=clock)
    clock.now = 110.0
    assert keyring_to_write() is keyrings[0]
    clock.now = 110.1
    with pytest.raises(LeaseExpiredError, match="Look in the log for why") as caught:
        keyring_to_write()
    assert "KRAVN_LEASE" in str(caught.value)
    assert current_keyring() is keyrings[0]
    extend_lease(120.0)
    assert keyring_to_write() is keyrings[0]


def test_a_lease_is_never_made_shorter_by_a_look_that_began_earlier(keyrings: list[Keyring]) -> None:
    clock = Clock()
    publish(keyrings[0], writable_until=110.0, clock=clock)
    extend_lease(105.0)
    clock.now = 109.0
    assert keyring_to_write() is keyrings[0]
    end_lease()
    with pytest.raises(LeaseExpiredError):
        keyring_to_write()
    extend_lease(109.0)
    assert keyring_to_write() is keyrings[0]


def test_another_keyring_has_the_lease_of_the_one_before(keyrings: list[Keyring]) -> None:
    clock = Clock()
    publish(keyrings[0], writable_until=110.0, clock=clock)
    replace_keyring(keyrings[1])
    assert keyring_to_write() is keyrings[1]
    clock.now = 111.0
    with pytest.raises(LeaseExpiredError):
        keyring_to_write()


def test_without_a_watch_there_is_no_lease(keyrings: list[Keyring]) -> None:
    publish(keyrings[0], writable_until=0.0, clock=Clock())
    publish(keyrings[1])
    assert keyring_to_write() is keyrings[1]


def test_a_keyring_of_a_block_has_no_lease(keyrings: list[Keyring]) -> None:
    publish(keyrings[0], writable_until=0.0, clock=Clock())
    with use_keyring(keyrings[1]):
        assert keyring_to_write() is keyrings[1]
    with pytest.raises(LeaseExpiredError):
        keyring_to_write()


def test_without_a_keyring_it_is_not_the_lease_that_is_over() -> None:
    publish(None)
    with pytest.raises(NotConfiguredError, match="configure"):
        keyring_to_write()


def test_who_watches_is_told_of_an_unknown_key_and_not_by_a_block(keyrings: list[Keyring]) -> None:
    told: list[bool] = []
    publish(keyrings[0], unknown_key=lambda: told.append(True))
    report_unknown_key()
    with use_keyring(keyrings[1]):
        report_unknown_key()
    assert told == [True]
    publish(keyrings[0])
    report_unknown_key()
    assert told == [True]


def test_what_is_put_aside_comes_back_with_its_lease(keyrings: list[Keyring]) -> None:
    clock = Clock()
    publish(keyrings[0], writable_until=110.0, clock=clock)
    with put_aside():
        assert not is_configured()
        publish(keyrings[1])
    assert keyring_to_write() is keyrings[0]
    clock.now = 111.0
    with pytest.raises(LeaseExpiredError):
        keyring_to_write()
