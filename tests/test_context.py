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
from sqlalchemy_kravn_crypto.context import current_keyring, publish
from sqlalchemy_kravn_crypto.exceptions import ConfigurationError, NotConfiguredError

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
