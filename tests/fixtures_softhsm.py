"""An HSM for the tests: SoftHSM."""

from pathlib import Path

import pytest

from tests.processes import UnavailableError
from tests.softhsm import SoftHSM, Spy, Token, softhsm_description


def pytest_report_header() -> str:
    try:
        return f"SoftHSM: {softhsm_description()}"
    except UnavailableError as error:
        return f"SoftHSM: none. {error}"


@pytest.fixture
def softhsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SoftHSM:
    """Give an HSM without tokens, which the environment of this process leads to."""
    home = tmp_path / "softhsm"
    home.mkdir()
    hsm = SoftHSM(home)
    for name, value in hsm.environment.items():
        monkeypatch.setenv(name, value)
    return hsm


@pytest.fixture
def hsm_token(softhsm: SoftHSM) -> Token:
    """Give a token with a master key for ``aes-gcm``, labelled ``kravn``, with the id 01."""
    token = softhsm.new_token()
    token.create_key()
    return token


@pytest.fixture
def hsm_spy(softhsm: SoftHSM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Give a library in front of the HSM's that tells which of its functions were called."""
    spy = Spy(softhsm, tmp_path / "calls")
    for name, value in spy.environment.items():
        monkeypatch.setenv(name, value)
    return spy
