"""What every test has: the servers' fixtures, and a process that was never configured."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says more of the machine than of the code.
settings.register_profile("without a clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("without a clock")

pytest_plugins = [
    "tests.fixtures_postgres",
    "tests.fixtures_mariadb",
    "tests.fixtures_kms",
    "tests.fixtures_aws",
    "tests.fixtures_gcp",
    "tests.fixtures_softhsm",
    "tests.fixtures_deployment",
]


@pytest.fixture(autouse=True)
def _unconfigured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("KRAVN_") or name == "DATABASE_URL":
            monkeypatch.delenv(name)
    yield
    from sqlalchemy_kravn_crypto import reset

    reset()
