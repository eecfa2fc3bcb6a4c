"""The migrations of the key tables, and what they leave alone."""

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, MetaData, create_engine, inspect, text

from sqlalchemy_kravn_crypto import kms_tables
from sqlalchemy_kravn_crypto.exceptions import ConfigurationError
from sqlalchemy_kravn_crypto.migrate import migrate, print_sql
from sqlalchemy_kravn_crypto.schema import TABLE_NAMES, TABLES, VERSION_TABLE

ALL = {*TABLE_NAMES, VERSION_TABLE}


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url)
    yield made
    made.dispose()


def test_it_creates_the_tables_and_can_be_run_twice(engine: Engine) -> None:
    migrate(engine)
    migrate(engine)
    assert set(inspect(engine).get_table_names()) == ALL
    with engine.connect() as connection:
        assert connection.scalars(text("SELECT version_num FROM kms_alembic_version")).all() == ["0003"]


def test_it_creates_what_the_schema_module_describes(engine: Engine) -> None:
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "compare_server_default": True}
        )
        assert compare_metadata(context, TABLES.keys.metadata) == []


def test_it_creates_the_same_checks_as_the_schema_module(engine: Engine, database_url: str) -> None:
    """Alembic compares no CHECK constraints."""

    def checks() -> dict[str, str]:
        found = inspect(engine).get_check_constraints("kms_keys")
        return {str(check["name"]): str(check["sqltext"]) for check in found}

    migrate(engine)
    migrated = checks()
    assert len(migrated) == 3
    TABLES.keys.metadata.drop_all(engine)
    TABLES.keys.metadata.create_all(engine)
    assert checks() == migrated


def test_the_users_own_version_table_is_left_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('theirs')"))
    migrate(engine)
    with engine.connect() as connection:
        assert connection.scalars(text("SELECT version_num FROM alembic_version")).all() == ["theirs"]


def test_it_can_be_taken_back(engine: Engine) -> None:
    from alembic import command

    from sqlalchemy_kravn_crypto.migrate import _config

    migrate(engine)
    config = _config()
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        connection.commit()
    assert set(inspect(engine).get_table_names()) == {VERSION_TABLE}


def test_machines_that_migrate_at_once_do_not_disturb_each_other(postgres_url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sqlalchemy_kravn_crypto", "migrate", "--url", postgres_url]
    started = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(4)]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in started] == [(b"", 0)] * 4


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql+psycopg://nobody@nowhere/none", "TIMESTAMP WITH TIME ZONE"),
        ("postgresql+asyncpg://nobody@nowhere/none", "TIMESTAMP WITH TIME ZONE"),
        ("sqlite://", "CREATE TABLE kms_keys"),
        ("mysql+pymysql://nobody@nowhere/none", "CREATE TABLE kms_keys"),
    ],
)
def test_it_prints_the_statements_without_connecting(url: str, expected: str) -> None:
    output = io.StringIO()
    print_sql(url, output)
    assert expected in output.getvalue()
    assert all(f"CREATE TABLE {name}" in output.getvalue() for name in ALL)


def test_printed_statements_run_as_they_are(postgres_url: str) -> None:
    output = io.StringIO()
    print_sql(postgres_url, output)
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(output.getvalue())
    assert set(inspect(engine).get_table_names()) == ALL
    engine.dispose()


def test_a_malformed_url_is_an_error_that_does_not_repeat_it() -> None:
    with pytest.raises(ConfigurationError) as caught:
        print_sql("MARKER")
    assert "MARKER" not in str(caught.value)
    assert caught.value.__context__ is None


def test_the_helper_adds_the_tables_to_the_users_own_metadata_once() -> None:
    metadata = MetaData(schema="theirs", naming_convention={"ck": "ck_%(table_name)s_%(constraint_name)s"})
    tables = kms_tables(metadata)
    assert set(metadata.tables) == set(TABLE_NAMES)
    assert kms_tables(metadata) == tables
    assert tables.keys.schema is None
