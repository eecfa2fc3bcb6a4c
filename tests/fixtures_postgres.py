"""Databases for the tests: each test has one of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import URL, make_url

from tests.postgres import fresh_database, postgres_serving
from tests.processes import UnavailableError

ASYNC_DRIVERS = {"postgresql": "asyncpg", "sqlite": "aiosqlite"}


def asynchronous(url: str) -> str:
    """Return the URL of the same database with an asynchronous driver."""
    parsed = make_url(url)
    backend = parsed.get_backend_name()
    return parsed.set(drivername=f"{backend}+{ASYNC_DRIVERS[backend]}").render_as_string(hide_password=False)


def pytest_report_header() -> str:
    try:
        return f"PostgreSQL: {postgres_serving().description}"
    except UnavailableError as error:
        return f"PostgreSQL: none. {error}"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[URL]:
    """Give a server that is this process's own, as its superuser."""
    with postgres_serving().serve() as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: URL) -> Iterator[str]:
    with fresh_database(postgres_server) as url:
        yield url.render_as_string(hide_password=False)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture(params=["postgresql", "sqlite"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Give the test one run on each database."""
    name = {"postgresql": "postgres_url", "sqlite": "sqlite_url"}[request.param]
    url: str = request.getfixturevalue(name)
    return url
