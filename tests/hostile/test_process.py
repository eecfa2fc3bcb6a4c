"""What becomes of keys in a process that forks, has threads, interpreters or bad randomness, or pickles what it has."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import Engine, LargeBinary, NullPool, create_engine, select, type_coerce
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import EncryptedJSON, configure, exceptions, is_configured, reset, signing_key
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, parse
from sqlalchemy_kravn_crypto.configuration import key_store
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.status import status
from sqlalchemy_kravn_crypto.testing import FakeKMS
from tests.leaks import found_in, pickled
from tests.processes import wait_until

SECRET: Final = "MARKER of the secret of a process"
NAME: Final = ColumnName("process_note.content")
WORKERS: Final = 8
EACH: Final = 20_000
ROOT: Final = Path(__file__).parents[2]


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "process_note"

    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)


@pytest.fixture
def engine(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("KRAVN_SECRET", SECRET)
    made = create_engine(sqlite_url, poolclass=NullPool, connect_args={"timeout": 60})
    migrate(made)
    Base.metadata.create_all(made)
    yield made
    made.dispose()


def nonces(count: int) -> bytes:
    keyring = current_keyring()
    return b"".join(parse(keyring.encrypt(b"\x01{}", NAME)).nonce for _ in range(count))


def forked(workers: int, work: Callable[[], bytes]) -> list[bytes]:
    """Fork, and return what each child had to say."""
    pipes = []
    for _ in range(workers):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover - another process
            code = 1
            try:
                os.close(reading)
                with os.fdopen(writing, "wb") as pipe:
                    pipe.write(work())
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        pipes.append((child, reading))
    said = []
    for child, reading in pipes:
        with os.fdopen(reading, "rb") as pipe:
            said.append(pipe.read())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return said


def distinct(said: list[bytes]) -> int:
    return len({one[start : start + 24] for one in said for start in range(0, len(one), 24)})


# --- fork ------------------------------------------------------------------------------------------------------------


def test_processes_forked_after_start_up_draw_no_nonce_twice(engine: Engine) -> None:
    configure(engine)
    own: list[bytes] = []
    said = forked(WORKERS, lambda: nonces(EACH))
    own.append(nonces(EACH))
    assert distinct(said + own) == (WORKERS + 1) * EACH


def test_processes_forked_before_start_up_agree_on_one_key_and_draw_no_nonce_twice(engine: Engine) -> None:
    """As a server that loads the program and then forks its workers, each of which starts up."""
    url = engine.url

    def work() -> bytes:
        own = create_engine(url, poolclass=NullPool, connect_args={"timeout": 60})
        configure(own)
        with Session(own) as session:
            session.add(Note(content={"from": os.getpid()}))
            session.commit()
        return nonces(1000)

    said = forked(WORKERS, work)
    configure(engine)
    assert distinct(said) == WORKERS * 1000
    with Session(engine) as session:
        assert len({note.content["from"] for note in session.scalars(select(Note))}) == WORKERS
        frames = session.scalars(select(type_coerce(Note.content, LargeBinary))).all()
    assert {parse(frame).key_id.hex() for frame in frames} == {current_keyring().primary_key_id}


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_is_not_a_fork_has_no_key_until_it_starts_up(
    engine: Engine, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package may be installed, but these tests never are.
    monkeypatch.syspath_prepend(str(ROOT))
    configure(engine)
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    worker = context.Process(target=starts_up, args=(engine.url.render_as_string(), answers))
    worker.start()
    found = answers.get(timeout=120)
    worker.join(60)
    assert worker.exitcode == 0
    assert found == (False, current_keyring().primary_key_id)


def starts_up(url: str, answers: Any) -> None:
    before = is_configured()
    own = create_engine(url, poolclass=NullPool)
    configure(own)
    answers.put((before, current_keyring().primary_key_id))


# --- Randomness ------------------------------------------------------------------------------------------------------


def test_randomness_that_repeats_is_not_masked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter or a hash mixed in would hide it from whoever looks, and save nobody whose data keys repeat as well."""
    configure(engine)
    monkeypatch.setattr(os, "urandom", bytes)
    first, second = (current_keyring().encrypt(b"\x01{}", NAME) for _ in range(2))
    assert first == second
    assert parse(first).nonce == bytes(24)


# --- Threads ---------------------------------------------------------------------------------------------------------


def test_threads_that_start_up_at_once_make_one_key(engine: Engine) -> None:
    kms, together = FakeKMS(), threading.Barrier(32)

    def start(_: int) -> str:
        together.wait(60)
        configure(engine, provider=kms)
        return current_keyring().primary_key_id

    with ThreadPoolExecutor(32) as pool:
        assert len(set(pool.map(start, range(32)))) == 1
    assert kms.calls["wrap"] == 1


def test_writers_raced_by_reset_write_what_can_be_read_or_are_refused(engine: Engine) -> None:
    kms, ended = FakeKMS(), threading.Event()
    settings = Settings()
    configure(engine, settings, provider=kms)
    frames: list[bytes] = []
    refused: list[BaseException] = []
    unexpected: list[BaseException] = []

    def writer() -> None:
        kind = Note.__table__.c.content.type
        bind = kind.bind_processor(engine.dialect)
        assert bind is not None
        while not ended.is_set():
            try:
                frames.append(bytes(bind({"is": "written"})))
            except exceptions.NotConfiguredError as error:
                refused.append(error)
            except BaseException as error:  # noqa: BLE001 - it fails the test below
                unexpected.append(error)
                return

    writers = [threading.Thread(target=writer) for _ in range(4)]
    for thread in writers:
        thread.start()
    for _ in range(2):
        reset()
        wait_until(partial(grown, refused, len(refused), unexpected))
        configure(engine, settings, provider=kms)
        wait_until(partial(grown, frames, len(frames), unexpected))
    ended.set()
    for thread in writers:
        thread.join(60)
    assert unexpected == []
    keyring = current_keyring()
    assert {keyring.decrypt(frame, NAME)[0] for frame in frames} == {1}


def grown(found: list[Any], before: int, unexpected: list[BaseException]) -> bool:
    return len(found) > before or bool(unexpected)


# --- Interpreters ----------------------------------------------------------------------------------------------------

IN_ANOTHER_INTERPRETER: Final = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

code = '''
import sys
sys.path[:] = {path!r}
try:
    import sqlalchemy_kravn_crypto
except ImportError as error:
    print("refused:", error, flush=True)
else:
    print("configured:", sqlalchemy_kravn_crypto.is_configured(), flush=True)
'''.format(path=sys.path)
import sqlalchemy_kravn_crypto
number = interpreters.create()
failed = interpreters.run_string(number, code)
print("failed:", failed)
"""


def test_another_interpreter_of_the_process_is_refused_or_starts_without_a_key() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_INTERPRETER],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer = done.stdout.splitlines()[0]
    assert answer == "configured: False" or "interpreter" in answer, done.stdout


# --- What is pickled, copied and printed -----------------------------------------------------------------------------


def test_no_public_object_of_a_running_process_gives_a_key_away(engine: Engine) -> None:
    kms = FakeKMS()
    configure(engine, provider=kms)
    note = Note(content={"token": "MARKER of a value"})
    keyring = current_keyring()
    primary = keyring.data_key(keyring.primary_key_id)
    assert primary is not None
    secrets: list[bytes | str] = [SECRET, primary.check, primary.signing_key("cookies")]
    secretive: list[Any] = [keyring, primary, signing_key("cookies"), key_store(Settings()), Settings()]
    for one in secretive:
        with pytest.raises(TypeError, match="holds a secret and cannot be pickled"):
            pickle.dumps(one)
        assert found_in(shown(one), *secrets) == []
    for one in secretive[:-1]:
        for copied in (copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="holds a secret"):
                copied(one)
    harmless: list[Any] = [note, Note.__table__, Note.content, engine, status(engine), kms]
    for one in harmless:
        assert found_in(shown(one) + pickled(one), *secrets) == []


def shown(one: Any) -> str:
    """Return all that printing shows: the object, its variables and its fields."""
    parts = [repr(one), str(one), f"{one}"]
    if hasattr(one, "__dict__"):
        parts.append(repr(vars(one)))
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        parts += [repr(getattr(one, field.name)) for field in dataclasses.fields(one) if field.repr]
    return "\n".join(parts)
