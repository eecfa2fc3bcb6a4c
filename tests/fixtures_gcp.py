"""Google Cloud KMS for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gcp_server import CloudKms


@pytest.fixture(scope="session")
def _gcp_server() -> Iterator[CloudKms]:
    server = CloudKms()
    yield server
    server.stop()


@pytest.fixture
def gcp_kms(_gcp_server: CloudKms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CloudKms:
    """Google Cloud KMS with one fresh version of the master key and no switch set, and no credentials in files."""
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    _gcp_server.reset()
    return _gcp_server
