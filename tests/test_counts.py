"""What one value costs, in counts that are the same on every machine; ``benchmarks`` has the times, as ratios."""

import builtins
import gc
import os
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Dialect, Engine, create_engine, insert, make_url, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, Keyring, aead, use_keyring

DOCUMENT = {"user": "reporting", "scopes": ["read", "export"], "until": None, "ratio": 0.25, "place": "Zürich"}
ROWS = 50
VALUES = 10_000

# All that one value takes of random bytes, JSON and AES. CipherContext.update is the AES call that gives its subkey.
WRITE = {"urandom": 1, "dumps": 1, "packb": 1, "CipherContext.update": 1, "AESGCM.encrypt": 1}
READ = {"CipherContext.update": 1, "AESGCM.decrypt": 1, "loads": 1}
FRAMES = 7
"""How many functions in Python one value may go through."""

CHEAP = {"ContextVar.get", "Pattern.search", "setprofile"}


class Base(DeclarativeBase):
    pass


class Plugin(Base):
    __tablename__ = "plugin"

    id: Mapped[int] = mapped_column(primary_key=True)
    credentials: Mapped[Any | None] = mapped_column(EncryptedJSON)


@pytest.fixture(autouse=True)
def _key() -> Iterator[None]:
    with use_keyring(Keyring(DataKey.generate())):
        yield


@pytest.fixture(params=["sqlite://", "postgresql+psycopg://"])
def processors(request: pytest.FixtureRequest) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    dialect: Dialect = make_url(request.param).get_dialect()()
    type_ = EncryptedJSON(associated_data="plugin.credentials").dialect_impl(dialect)
    bind, result = type_.bind_processor(dialect), type_.result_processor(dialect, None)
    assert bind is not None
    assert result is not None
    return bind, result


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = create_engine("sqlite://")
    Base.metadata.create_all(made)
    yield made
    made.dispose()


def counted(function: Callable[..., object], *arguments: Any) -> tuple[Counter[str], int]:
    """Return the calls of what is not written in Python, without Python's own types; and the number of other calls."""
    below, frames = Counter[str](), 0

    def count(_frame: FrameType, event: str, called: Any) -> None:
        nonlocal frames
        frames += event == "call"
        if event == "c_call":
            name: str = called.__qualname__
            if name not in CHEAP and not hasattr(builtins, name.partition(".")[0]):
                below[name] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return below, frames


def crypto_of(function: Callable[..., object], *arguments: Any) -> tuple[int, int]:
    """Return how many values a function has encrypted and decrypted."""
    below, _ = counted(function, *arguments)
    assert below["urandom"] == below["AESGCM.encrypt"]
    return below["AESGCM.encrypt"], below["AESGCM.decrypt"]


# One value


def test_a_value_is_written_with_one_call_of_each_kind(
    processors: tuple[Callable[[Any], Any], Callable[[Any], Any]],
) -> None:
    bind, _ = processors
    below, frames = counted(bind, DOCUMENT)
    assert below == WRITE
    assert frames <= FRAMES


def test_a_value_is_read_with_one_call_of_each_kind(
    processors: tuple[Callable[[Any], Any], Callable[[Any], Any]],
) -> None:
    bind, result = processors
    below, frames = counted(result, bind(DOCUMENT))
    assert below == READ
    assert frames <= FRAMES


def test_null_costs_nothing(processors: tuple[Callable[[Any], Any], Callable[[Any], Any]]) -> None:
    for processor in processors:
        assert counted(processor, None) == ({}, 1)


def test_every_value_has_24_random_bytes_and_a_cipher_of_its_own(
    processors: tuple[Callable[[Any], Any], Callable[[Any], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    subkeys: list[bytes] = []
    urandom = os.urandom

    def draw(size: int) -> bytes:
        drawn.append(size)
        return urandom(size)

    def cipher(key: bytes) -> AESGCM:
        subkeys.append(key)
        return AESGCM(key)

    monkeypatch.setattr(os, "urandom", draw)
    monkeypatch.setattr(aead, "AESGCM", cipher)
    bind, result = processors
    stored = [bind(DOCUMENT) for _ in range(ROWS)]
    assert drawn == [24] * ROWS
    assert len(subkeys) == len(set(subkeys)) == ROWS
    assert [result(frame) for frame in stored] == [DOCUMENT] * ROWS
    assert drawn == [24] * ROWS
    assert subkeys[ROWS:] == subkeys[:ROWS]


def test_nothing_outlives_a_value(processors: tuple[Callable[[Any], Any], Callable[[Any], Any]]) -> None:
    bind, result = processors

    def work(values: int) -> None:
        for _ in range(values):
            result(bind(DOCUMENT))

    work(100)  # what is made once is made
    gc.collect()
    tracemalloc.start()
    try:
        work(100)
        before, _ = tracemalloc.get_traced_memory()
        work(VALUES)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    # Without a collection in between: nothing waits for one either. A byte for each value would be ten times as much.
    assert grown < VALUES // 10


# Statements


def test_a_statement_processes_every_value_once(engine: Engine) -> None:
    rows = [{"credentials": DOCUMENT} for _ in range(ROWS)] + [{"credentials": None}]
    with Session(engine) as session:
        assert crypto_of(session.execute, insert(Plugin), rows) == (ROWS, 0)
        assert crypto_of(lambda: session.scalars(select(Plugin)).all()) == (0, ROWS)
        assert crypto_of(lambda: session.execute(select(Plugin.__table__)).all()) == (0, ROWS)


def test_what_is_not_selected_is_not_decrypted(engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(insert(Plugin), [{"credentials": DOCUMENT}])
        assert crypto_of(lambda: session.scalars(select(Plugin.id)).all()) == (0, 0)
        assert crypto_of(lambda: session.scalars(select(Plugin.id).where(Plugin.credentials.is_not(None))).all()) == (
            0,
            0,
        )


def test_a_flush_encrypts_what_changed_and_nothing_else(engine: Engine) -> None:
    with Session(engine) as session:
        session.add_all(Plugin(id=number, credentials=DOCUMENT) for number in range(ROWS))
        assert crypto_of(session.flush) == (ROWS, 0)
        plugins = session.scalars(select(Plugin).order_by(Plugin.id)).all()
        assert crypto_of(session.flush) == (0, 0)
        plugins[0].credentials = dict(DOCUMENT)
        plugins[1].credentials = {**DOCUMENT, "user": "another"}
        assert crypto_of(session.flush) == (1, 0)
