"""Key management servers for the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.azure_server import AzureVault
from tests.openbao import OpenBao


@pytest.fixture(scope="session")
def openbao() -> Iterator[OpenBao]:
    """An OpenBao server for the whole session; who changes more than a key of their own puts it back."""
    server = OpenBao()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _azure_server() -> Iterator[AzureVault]:
    server = AzureVault()
    yield server
    server.stop()


@pytest.fixture
def azure_vault(_azure_server: AzureVault) -> AzureVault:
    """An Azure key vault with one fresh master key and no switch set."""
    _azure_server.reset()
    return _azure_server
