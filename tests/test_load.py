"""The load in small: that it runs, finds nothing wrong with what is right, and sees each thing that it looks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, create_engine, insert, text

from sqlalchemy_kravn_crypto import DataKey, Keyring, use_keyring
from tests.openbao import OpenBao

if TYPE_CHECKING:
    from benchmarks.load import checks, worker

pytestmark = pytest.mark.xdist_group("load")

ROOT = Path(__file__).parents[1]
KEYRING = Keyring(DataKey(b"l" * 32))


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the benchmarks importable, which are beside the tests and in no wheel."""
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def filled(postgres_url: str) -> Iterator[Engine]:
    """Give the tables with one account that was never changed, and two rows that the first of two threads added."""
    from benchmarks.load import tables

    engine = create_engine(postgres_url)
    tables.create(engine)

    with use_keyring(KEYRING), engine.begin() as connection:
        connection.execute(insert(tables.Account), [{"id": 0, "version": 0, **tables.values_of(0, 0, Random(0))}])
        connection.execute(
            insert(tables.Entry), [{"id": row, **tables.values_of(row, 0, Random(row))} for row in (0, 1)]
        )
    yield engine
    engine.dispose()


def done(**others: Any) -> worker.Done:
    from benchmarks.load import tables
    from benchmarks.load.worker import Done

    what: dict[str, Any] = {
        "written": 3,
        "read": 3,
        "transactions": 1,
        "conflicts": 0,
        "changes": [0] * tables.ACCOUNTS,
        "entries": [2, 0],
        "warm": 2**27,
        "end": 2**27,
        "errors": [],
    }
    return Done(**(what | others))


def wrong(findings: Iterator[checks.Finding]) -> list[str]:
    return [finding.what for finding in findings if not finding.is_right]


def stored(engine: Engine, *work: worker.Done) -> list[str]:
    from benchmarks.load import checks

    return wrong(checks.stored(engine, work or [done()], KEYRING))


def recorded(engine: Engine, written: int) -> list[str]:
    from benchmarks.load import checks

    with engine.connect() as connection:
        return wrong(checks.nonces(connection, written))


def change(engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement))


def test_a_short_run_with_a_rotation_finds_nothing_wrong(postgres_url: str, openbao: OpenBao) -> None:
    from benchmarks.load.running import Load, run

    load = Load(values=5_000, processes=2, threads=4, rotations=1, lease=4.0, seconds=120.0)
    kms = {
        "KRAVN_KMS_PROVIDER": "vault",
        "KRAVN_KMS_VAULT_ADDR": openbao.address,
        "KRAVN_KMS_VAULT_TOKEN": openbao.token,
        "KRAVN_KMS_VAULT_KEY": openbao.key,
    }
    outcome = run(load, postgres_url, kms)
    assert outcome.errors == []
    assert wrong(iter(outcome.findings)) == []
    assert outcome.is_right


def test_what_is_right_is_found_right(filled: Engine) -> None:
    assert stored(filled) == []
    assert recorded(filled, written=5) == []


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE load_entry SET remark = NULL WHERE id = 0", "rows that do not hold what was written"),
        (
            "UPDATE load_entry SET document = (SELECT document FROM load_entry WHERE id = 1) WHERE id = 0",
            "rows that do not hold what was written",
        ),
        ("UPDATE load_account SET version = 1", "changes that were lost"),
        ("DELETE FROM load_entry WHERE id = 1", "rows that were added"),
    ],
    ids=["remark lost", "value of another row", "version changed", "row lost"],
)
def test_what_is_wrong_in_a_row_is_found(filled: Engine, statement: str, found: str) -> None:
    change(filled, statement)
    assert found in stored(filled)


def test_a_change_that_was_committed_and_is_not_there_is_found(filled: Engine) -> None:
    changes = done().changes
    assert stored(filled, done(changes=[1, *changes[1:]])) == ["changes that were lost"]


def test_a_nonce_that_comes_twice_is_found(filled: Engine) -> None:
    change(filled, "INSERT INTO load_entry SELECT 2, document FROM load_entry WHERE id = 1")
    assert recorded(filled, written=6) == ["different nonces of them"]


def test_a_nonce_that_comes_twice_is_found_when_its_value_is_no_longer_there(filled: Engine) -> None:
    change(filled, "INSERT INTO load_entry SELECT 2, document FROM load_entry WHERE id = 1")
    change(filled, "DELETE FROM load_entry")
    assert recorded(filled, written=6) == ["different nonces of them"]


def test_a_value_that_nobody_says_to_have_written_is_found(filled: Engine) -> None:
    assert recorded(filled, written=4) == ["values that came into the database"]


def test_a_value_that_is_not_encrypted_is_found(filled: Engine) -> None:
    change(filled, "UPDATE load_entry SET document = 'plaintext, long enough to have a nonce' WHERE id = 1")
    assert recorded(filled, written=6) == ["of them not encrypted"]


def test_what_the_processes_say_is_checked() -> None:
    from benchmarks.load import checks

    assert wrong(checks.at_work([done()], 3)) == []
    assert wrong(checks.at_work([done(errors=["it failed"])], 3)) == ["errors in a thread, and warnings"]
    assert wrong(checks.at_work([done(read=2)], 3)) == ["values read by the threads"]
    grown = replace(done(), end=done().warm + checks.GROWTH + 1)
    assert wrong(checks.at_work([done(), grown], 3)) == ["most that a process grew"]
