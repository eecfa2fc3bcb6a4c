"""What a configuration for AWS KMS is worth: credentials of every sort, found by the SDK's own chain."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sqlalchemy_kravn_crypto.providers.aws import AwsProvider
from sqlalchemy_kravn_crypto.providers.base import Deadline, Finding, Level
from tests import hostile_server as hostile
from tests.aws_server import Credentials
from tests.certificates import Authority
from tests.hostile_server import HostileServer, Raw, answers
from tests.leaks import found_in
from tests.scripted_server import ScriptedServer, dated

GOOD, WARNING, BAD = Level.GOOD, Level.WARNING, Level.BAD
KMS, STS, INSTANCE = "kms.eu-central-1.amazonaws.com", "sts.eu-central-1.amazonaws.com", "169.254.169.254"
KEY = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
ROLE = "arn:aws:iam::111122223333:role/kravn"
MARK = "MARKER-of-what-the-server-says"


class Cloud:
    """The endpoints of AWS, each answering as it is told."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        end = datetime.now(UTC) + timedelta(days=60)
        start = end - timedelta(days=90)
        self.kms = HostileServer(self.authority.issue(KMS, start=start, end=end))
        self.kms.raw = dated(404, {"message": MARK})
        self.sts = HostileServer(self.authority.issue(STS, start=start, end=end))
        self.instance = ScriptedServer({}, answers(404, MARK.encode()))

    def resolve(self, host: str, _port: int) -> tuple[str, int]:
        known = {KMS: self.kms, STS: self.sts, INSTANCE: self.instance}
        if host not in known:
            raise OSError
        return "127.0.0.1", known[host].port

    def be_an_instance(self, credentials: Credentials) -> None:
        roles = "/latest/meta-data/iam/security-credentials/"
        self.instance.by_name = {
            "/latest/api/token": answers(200, b"token"),
            f"{roles}app": answers(200, credentials.offered()),
            roles: answers(200, b"app"),
        }

    def examine(self, seconds: float = 20, **settings: Any) -> list[Finding]:
        usual: dict[str, Any] = {
            "key": KEY,
            "ca_bundle": self.authority.ca_bundle,
            "resolve": self.resolve,
            "sleep": lambda _: None,
        }
        found = list(AwsProvider(**usual | settings).examine(Deadline(seconds)))
        assert found_in(repr(found), MARK) == []
        return found

    def close(self) -> None:
        for server in (self.kms, self.sts, self.instance):
            server.close()


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_other_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> Credentials:
    made = Credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made.secret)
    return made


def levels(findings: Iterable[Finding], subject: str) -> list[Level]:
    return [finding.level for finding in findings if finding.subject == subject]


def said(findings: Iterable[Finding], subject: str) -> str:
    return "\n".join(f"{finding.message} {finding.advice}" for finding in findings if finding.subject == subject)


def test_an_access_key_that_never_ends(cloud: Cloud, credentials: Credentials) -> None:
    found = cloud.examine()
    assert levels(found, "reachability") == [GOOD]
    assert levels(found, "tls") == [GOOD, GOOD]
    assert levels(found, "clock") == [GOOD]
    assert levels(found, "credentials") == [WARNING]
    assert "an access key that never ends (found by: env)" in said(found, "credentials")
    assert levels(found, "rights") == [WARNING]
    assert "rights in IAM" in said(found, "rights")
    assert found_in(repr(found), *credentials.everything(), credentials.access_key) == []
    # Nothing is asked of KMS with the credentials.
    assert not [request for request in cloud.kms.requests if b"Authorization" in request or b"POST" in request]


def test_a_session_token_that_somebody_set(
    cloud: Cloud, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", credentials.token)
    found = cloud.examine()
    assert levels(found, "credentials") == [WARNING]
    assert said(found, "credentials").startswith("Not checked: until when the session token is valid")
    assert found_in(repr(found), *credentials.everything()) == []


def test_the_role_of_an_instance(cloud: Cloud) -> None:
    made = Credentials()
    cloud.be_an_instance(made)
    found = cloud.examine()
    assert levels(found, "credentials") == [GOOD]
    assert "(found by: iam-role)" in said(found, "credentials")
    ends = datetime.now(UTC) + timedelta(hours=6)
    assert f"until {ends:%Y-%m-%d}" in said(found, "credentials") or ends.hour < 1
    assert found_in(repr(found), *made.everything()) == []


def test_a_role_that_is_assumed(cloud: Cloud, credentials: Credentials) -> None:
    granted = Credentials()
    answer = granted.granted()
    cloud.sts.raw = answers(answer.status, answer.body, "Content-Type: text/xml")
    found = cloud.examine(role=ROLE)
    assert levels(found, "credentials") == [WARNING, GOOD]
    assert f"{ROLE} can be assumed" in said(found, "credentials")
    assert len(cloud.sts.requests) == 1
    assert found_in(repr(found), *granted.everything(), *credentials.everything()) == []


def test_a_role_that_cannot_be_assumed(cloud: Cloud, credentials: Credentials) -> None:
    body = f"<ErrorResponse><Error><Code>AccessDenied</Code><Message>{MARK}</Message></Error></ErrorResponse>"
    cloud.sts.raw = answers(403, body.encode(), "Content-Type: text/xml")
    found = cloud.examine(role=ROLE)
    assert levels(found, "credentials") == [BAD]
    assert "KRAVN_KMS_AWS_ROLE" in said(found, "credentials")
    assert levels(found, "rights") == []


def test_no_credentials(cloud: Cloud) -> None:
    found = cloud.examine()
    assert levels(found, "credentials") == [BAD]
    assert "No AWS credentials were found" in said(found, "credentials")
    assert levels(found, "reachability") == [GOOD]


def test_an_endpoint_that_is_not_there_keeps_the_credentials_from_nothing(
    cloud: Cloud, credentials: Credentials
) -> None:
    found = cloud.examine(resolve=lambda *_: ("127.0.0.1", 1))
    assert levels(found, "reachability") == [BAD]
    assert "KRAVN_KMS_AWS_ENDPOINT" in said(found, "reachability")
    assert levels(found, "credentials") == [WARNING]


HOSTILE = {
    "hangs up": hostile.hangs_up,
    "redirects": answers(307, MARK.encode(), f"Location: https://{MARK}/"),
    "echoes": hostile.echoes(500),
    "says no HTTP": hostile.sends(MARK.encode()),
    "compresses": hostile.GZIP_BOMB,
    "drips": hostile.DRIPS_BODY,
    "sends without end": hostile.ENDLESS_BODY,
    "is silent": hostile.is_silent,
    "brackets": answers(200, b"<a>" * 30_000, "Content-Type: text/xml"),
}


@pytest.mark.parametrize("who", ["kms", "sts"])
@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_answer_ends_within_the_deadline_and_shows_nothing(
    cloud: Cloud, credentials: Credentials, caplog: pytest.LogCaptureFixture, who: str, raw: Raw
) -> None:
    caplog.set_level("DEBUG")
    getattr(cloud, who).raw = raw
    started = time.monotonic()
    found = cloud.examine(seconds=2, role=ROLE)
    assert time.monotonic() - started < hostile.ENOUGH / 2
    assert {finding.level for finding in found} - {GOOD}
    assert found_in(repr(found) + caplog.text, MARK, *credentials.everything()) == []
