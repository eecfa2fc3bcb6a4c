"""MariaDB for the tests, and each kind of database in turn."""

from collections.abc import Iterator

import pytest
from sqlalchemy.engine import URL

from tests.mariadb import fresh_mariadb_database, mariadb_description, serve_mariadb
from tests.processes import UnavailableError


def pytest_report_header() -> str:
    try:
        return f"MariaDB: {mariadb_description()}"
    except UnavailableError as error:
        return f"MariaDB: none. {error}"


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[URL]:
    """Give a server that is this process's own, as its superuser."""
    with serve_mariadb() as url:
        yield url


@pytest.fixture
def mariadb_url(mariadb_server: URL) -> Iterator[str]:
    with fresh_mariadb_database(mariadb_server) as url:
        yield url.render_as_string(hide_password=False)


@pytest.fixture(params=["postgresql", "sqlite", "mariadb"])
def any_database_url(request: pytest.FixtureRequest) -> str:
    """Give the test one run on each database."""
    name = {"postgresql": "postgres_url", "sqlite": "sqlite_url", "mariadb": "mariadb_url"}[request.param]
    url: str = request.getfixturevalue(name)
    return url
