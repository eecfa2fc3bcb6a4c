"""AWS for the tests, and what a process on it has around it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import botocore.credentials
import pytest

from tests.aws_server import Aws, Credentials


@pytest.fixture(scope="session")
def _aws_server() -> Iterator[Aws]:
    server = Aws()
    yield server
    server.stop()


@pytest.fixture
def aws(_aws_server: Aws) -> Aws:
    """AWS with no switch set."""
    _aws_server.reset()
    return _aws_server


@pytest.fixture
def aws_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without any configuration, and an environment without any credentials."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    # The SDK has looked for the home directory when it was imported.
    monkeypatch.setattr(botocore.credentials.SSOProvider, "_SSO_TOKEN_CACHE_DIR", str(tmp_path / "sso"))
    (tmp_path / ".aws").mkdir()
    return tmp_path


@pytest.fixture
def aws_credentials(aws_home: Path, monkeypatch: pytest.MonkeyPatch) -> Credentials:
    """Credentials in the environment, without a token."""
    made = Credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made.secret)
    return made
