"""The examples of re-encrypting where one machine is not enough, run against a database whose key was rotated."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr
from sqlalchemy import MetaData, bindparam, create_engine, insert, select, text
from sqlalchemy.schema import Column, Table
from sqlalchemy.types import Integer, LargeBinary

from sqlalchemy_kravn_crypto import EncryptedString, configure, reset
from sqlalchemy_kravn_crypto.census import census
from sqlalchemy_kravn_crypto.configuration import operator
from sqlalchemy_kravn_crypto.context import current_keyring
from sqlalchemy_kravn_crypto.known_columns import declared, forget, recorded
from sqlalchemy_kravn_crypto.lifecycle import promote, rotate_secret
from sqlalchemy_kravn_crypto.migrate import migrate
from sqlalchemy_kravn_crypto.schema import TABLES
from sqlalchemy_kravn_crypto.settings import Provider, Settings

EXAMPLES = Path(__file__).parents[1] / "examples"
OLD, NEW = (f"{word}-secret-of-the-test-and-long-enough-for-it" for word in ("old", "new"))
ROWS = 320
WORKERS = 3

# In a process of its own, since a cluster leaves threads and sockets that pytest would complain about.
ON_A_CLUSTER = """
import subprocess, sys
from dask.distributed import LocalCluster
from sqlalchemy import create_engine, text

if __name__ == "__main__":
    cluster = LocalCluster(n_workers=int(sys.argv[3]), processes=True, threads_per_worker=1, dashboard_address=None)
    with cluster:
        done = subprocess.run([sys.executable, sys.argv[1], cluster.scheduler_address])
        with create_engine(sys.argv[2]).connect() as connection:
            alive = connection.execute(text("SELECT count(*) FROM kms_replicas")).scalar()
    print("processes that have the keys:", alive)
    sys.exit(done.returncode)
"""


class Rotated:
    """A database with values under a retired key. This process is configured to read them."""

    def __init__(self, url: str) -> None:
        self.url, self.engine, self.metadata = url, create_engine(url), MetaData()
        self.notes = Table(
            "note", self.metadata, Column("id", Integer, primary_key=True), Column("content", EncryptedString)
        )
        migrate(self.engine)
        self.metadata.create_all(self.engine)

    def write_and_rotate(self) -> None:
        settings = Settings(kms_provider=Provider.NONE, secret=SecretStr(OLD), secret_next=SecretStr(NEW))
        configure(self.engine, settings)
        with self.engine.begin() as connection:
            connection.execute(insert(self.notes), [{"id": i, "content": f"note {i}"} for i in range(1, ROWS + 1)])
        reset()
        rotate_secret(operator(self.engine, settings))
        promote(operator(self.engine, settings))
        self.configure()

    def configure(self) -> None:
        settings = Settings(kms_provider=Provider.NONE, secret=SecretStr(NEW), secret_retired=SecretStr(OLD))
        configure(self.engine, settings)

    def leave(self) -> None:
        """Be as if this process had not been there: it has tables of other tests, that are not in this database."""
        reset()
        with self.engine.begin() as connection:
            for column in set(recorded(connection)) - set(declared(self.metadata)):
                forget(connection, *column.place)

    def environment(self) -> dict[str, str]:
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        secrets = {"KRAVN_SECRET": NEW, "KRAVN_SECRET_RETIRED": OLD}
        return os.environ | secrets | {"DATABASE_URL": self.url, "PATH": programs}

    def stale(self) -> int:
        with self.engine.connect() as connection:
            return census(connection, declared(self.metadata)).stale(current_keyring().primary_key_id)

    def assert_nothing_was_lost(self) -> None:
        with self.engine.begin() as connection:
            read = connection.execute(select(self.notes).order_by(self.notes.c.id)).all()
        assert [tuple(row) for row in read] == [(number, f"note {number}") for number in range(1, ROWS + 1)]


@pytest.fixture
def rotated(postgres_url: str) -> Iterator[Rotated]:
    prepared = Rotated(postgres_url)
    try:
        prepared.write_and_rotate()
        assert prepared.stale() == ROWS
        prepared.leave()
        yield prepared
    finally:
        reset()
        prepared.engine.dispose()


def on_a_cluster(rotated: Rotated, directory: Path) -> subprocess.CompletedProcess[str]:
    program = directory / "cluster.py"
    program.write_text(ON_A_CLUSTER, encoding="utf-8")
    return subprocess.run(
        [sys.executable, program, EXAMPLES / "rekey_with_dask.py", rotated.url, str(WORKERS)],
        check=False,
        cwd=directory,
        env=rotated.environment(),
        capture_output=True,
        encoding="utf-8",
    )


def test_with_dask_every_value_is_moved_by_several_processes(rotated: Rotated, tmp_path: Path) -> None:
    done = on_a_cluster(rotated, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"processes that have the keys: {WORKERS}" in done.stdout
    moved = [int(line.split()[2]) for line in done.stdout.splitlines() if line.endswith("values moved")]
    assert (len(moved), sum(moved)) == (64, ROWS)
    assert "left: nothing" in done.stdout
    rotated.configure()
    assert rotated.stale() == 0
    rotated.assert_nothing_was_lost()


def test_with_dask_a_value_that_does_not_decrypt_is_named_and_fails_the_program(
    rotated: Rotated, tmp_path: Path
) -> None:
    with rotated.engine.begin() as connection:
        frame: bytes = connection.execute(text("SELECT content FROM note WHERE id = 7")).scalar_one()
        altered = text("UPDATE note SET content = :altered WHERE id = 7").bindparams(
            bindparam("altered", frame[:-1] + bytes([frame[-1] ^ 1]), LargeBinary)
        )
        connection.execute(altered)
    done = on_a_cluster(rotated, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "note.content (7,): AuthenticationError" in done.stdout
    assert "left: {'note.content': 1}" in done.stdout
    rotated.configure()
    assert rotated.stale() == 1


# --- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((EXAMPLES / "rekey_job.yaml").read_text(encoding="utf-8"))
    return loaded


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def test_the_job_has_one_pod_for_each_share(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    words = shlex.split(" ".join(container_of(job)["args"]))
    assert words[words.index("--shard") + 3] == f"1))/{job['spec']['completions']}"


def test_the_job_tries_each_share_again(job: dict[str, Any]) -> None:
    assert job["spec"]["backoffLimitPerIndex"] > 0
    # Nothing else is valid with it.
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    # Else a few shares that fail end those that others are at.
    assert job["spec"]["maxFailedIndexes"] == job["spec"]["completions"]


def test_the_job_has_its_secrets_from_a_secret(job: dict[str, Any]) -> None:
    container = container_of(job)
    assert [list(source) for source in container["envFrom"]] == [["secretRef"]]
    assert "env" not in container


def test_the_pods_of_the_job_do_their_shares(rotated: Rotated, job: dict[str, Any]) -> None:
    container, shares = container_of(job), job["spec"]["completions"]
    for count, index in enumerate((0, 6, shares - 1), 1):
        done = subprocess.run(
            [*container["command"], *container["args"]],
            check=False,
            env=rotated.environment() | {"JOB_COMPLETION_INDEX": str(index)},
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        ledger = TABLES.rekeys.c
        with rotated.engine.connect() as connection:
            finished = connection.scalars(select(ledger.shard).where(ledger.finished_at.is_not(None))).all()
        assert sorted(finished) == [0, 6, shares - 1][:count]
    rotated.configure()
    assert rotated.stale() == ROWS - 3 * ROWS // shares
    rotated.assert_nothing_was_lost()
