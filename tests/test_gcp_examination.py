"""What a configuration for Google Cloud KMS is worth: its REST interface, played by a server of our own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from sqlalchemy_kravn_crypto.providers.base import Deadline, Finding, Level
from sqlalchemy_kravn_crypto.providers.gcp import GcpProvider
from tests import hostile_server as hostile
from tests.certificates import Authority
from tests.hostile_server import HostileServer, Raw, answers
from tests.leaks import found_in
from tests.scripted_server import ScriptedServer, dated

GOOD, WARNING, BAD = Level.GOOD, Level.WARNING, Level.BAD
HOST = "cloudkms.googleapis.com"
KEY = "projects/kravn-test/locations/europe-west3/keyRings/app/cryptoKeys/kravn"
MARK = "MARKER-of-what-the-server-says"

PRIVATE = rsa.generate_private_key(65537, 2048)
PEM = PRIVATE.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
).decode()
SERVICE_ACCOUNT = {
    "type": "service_account",
    "project_id": "kravn-test",
    "private_key_id": "1",
    "private_key": PEM,
    "client_email": "app@kravn-test.iam.gserviceaccount.com",
    "token_uri": "https://oauth2.googleapis.com/token",
}


class Google:
    """Answers at the host of Cloud KMS and, for the machine's credentials, as the metadata server."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        end = datetime.now(UTC) + timedelta(days=60)
        certificate = self.authority.issue(HOST, start=end - timedelta(days=90), end=end)
        self._secure = ScriptedServer({}, dated(404, MARK.encode()), certificate)
        self._plain = HostileServer()
        self._plain.raw = answers(200, {"access_token": "MARKER-of-a-token"}, "Metadata-Flavor: Google")
        self.permissions(answers(200, {}))

    def permissions(self, raw: Raw) -> None:
        """Answer so when permissions are asked for."""
        self._secure.by_name[":testIamPermissions"] = raw

    @property
    def asked(self) -> list[tuple[str, bytes]]:
        """The requests for permissions, each as its head and its body."""
        parts = [request.partition(b"\r\n\r\n") for request in self._secure.requests]
        return [(head.decode(), body) for head, _, body in parts if b":testIamPermissions " in head]

    def resolve(self, host: str, _port: int) -> tuple[str, int]:
        return "127.0.0.1", self._secure.port if host == HOST else self._plain.port

    def examine(self, seconds: float = 20, **settings: Any) -> list[Finding]:
        usual: dict[str, Any] = {
            "key": KEY,
            "credentials": json.dumps(SERVICE_ACCOUNT),
            "ca_bundle": self.authority.ca_bundle,
            "resolve": self.resolve,
            "sleep": lambda _: None,
        }
        found = list(GcpProvider(**usual | settings).examine(Deadline(seconds)))
        assert found_in(repr(found), MARK, PEM, "MARKER-of-a-token") == []
        return found

    def close(self) -> None:
        self._secure.close()
        self._plain.close()


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Google]:
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    server = Google(tmp_path)
    yield server
    server.close()


def levels(findings: Iterable[Finding], subject: str) -> list[Level]:
    return [finding.level for finding in findings if finding.subject == subject]


def said(findings: Iterable[Finding], subject: str) -> str:
    return "\n".join(f"{finding.message} {finding.advice}" for finding in findings if finding.subject == subject)


def test_a_login_that_may_do_nothing_else(google: Google) -> None:
    found = google.examine()
    assert levels(found, "reachability") == [GOOD]
    assert levels(found, "tls") == [GOOD, GOOD]
    assert levels(found, "clock") == [GOOD]
    assert levels(found, "rights") == [GOOD]
    # The key of a service account does not expire by itself.
    assert levels(found, "credentials") == [GOOD, WARNING]


def test_it_is_asked_as_whoever_logs_in_and_about_the_one_key(google: Google) -> None:
    google.examine()
    [(head, body)] = google.asked
    assert head.splitlines()[0] == f"POST /v1/{KEY}:testIamPermissions HTTP/1.1"
    sent = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    token = sent["authorization"].removeprefix("Bearer ")
    assert jwt.decode(token, PRIVATE.public_key(), algorithms=["RS256"])["iss"] == SERVICE_ACCOUNT["client_email"]
    asked = json.loads(body)["permissions"]
    assert len(asked) == 4
    assert all(permission.startswith("cloudkms.cryptoKey") for permission in asked)


def test_the_credentials_of_the_machine(google: Google) -> None:
    found = google.examine(credentials=None)
    assert levels(found, "credentials") == [GOOD]
    assert levels(found, "rights") == [GOOD]


@pytest.mark.parametrize(
    ("permission", "words"),
    [
        ("cloudkms.cryptoKeyVersions.destroy", "destroy versions of the key"),
        ("cloudkms.cryptoKeyVersions.update", "disable versions of the key"),
        ("cloudkms.cryptoKeys.update", "change which version is primary"),
        ("cloudkms.cryptoKeys.setIamPolicy", "give anybody any permission"),
    ],
)
def test_each_permission_that_should_not_be_there_is_named_alone(google: Google, permission: str, words: str) -> None:
    google.permissions(answers(200, {"permissions": [permission]}))
    found = google.examine()
    assert levels(found, "rights") == [BAD]
    assert said(found, "rights").startswith(f"Your login may also {words}")
    assert ";" not in said(found, "rights")


def test_several_permissions_are_one_line(google: Google) -> None:
    google.permissions(lambda connection, body: answers(200, json.loads(body))(connection, body))
    found = google.examine()
    assert levels(found, "rights") == [BAD]
    assert said(found, "rights").count(";") == 3


def test_a_login_that_google_does_not_accept(google: Google) -> None:
    google.permissions(answers(401, {"error": {"status": "UNAUTHENTICATED", "message": MARK}}))
    found = google.examine()
    assert levels(found, "credentials") == [BAD, WARNING]
    assert levels(found, "rights") == [WARNING]


def test_credentials_that_cannot_be_had(google: Google, tmp_path: Path) -> None:
    found = google.examine(credentials=json.dumps({"type": MARK}))
    assert levels(found, "credentials") == [BAD]
    assert levels(found, "rights") == [WARNING]
    assert google.asked == []


NO_GOOGLE = {
    "refuses": answers(403, {"error": {"status": "PERMISSION_DENIED", "message": MARK}}),
    "not found": answers(404, MARK.encode()),
    "no list": answers(200, {"permissions": MARK}),
    "redirects": answers(307, MARK.encode(), f"Location: https://{MARK}/"),
    "hangs up": hostile.hangs_up,
    "echoes": hostile.echoes(500),
    "says no HTTP": hostile.sends(MARK.encode()),
    "compresses": hostile.GZIP_BOMB,
    "drips": hostile.DRIPS_BODY,
    "sends without end": hostile.ENDLESS_BODY,
    "is silent": hostile.is_silent,
}


@pytest.mark.parametrize("raw", NO_GOOGLE.values(), ids=NO_GOOGLE.keys())
def test_what_does_not_answer_as_google_does_shows_nothing(
    google: Google, caplog: pytest.LogCaptureFixture, raw: Raw
) -> None:
    caplog.set_level("DEBUG")
    google.permissions(raw)
    started = time.monotonic()
    found = google.examine(seconds=2)
    assert time.monotonic() - started < hostile.ENOUGH / 2
    assert levels(found, "rights") == [WARNING]
    assert BAD not in {finding.level for finding in found}
    assert found_in(caplog.text, MARK, PEM) == []


@pytest.mark.parametrize("body", [[], {"permissions": []}, {"permissions": [MARK, 1, None, ["x"]]}])
def test_what_was_not_asked_is_not_told(google: Google, body: Any) -> None:
    google.permissions(answers(200, body))
    assert levels(google.examine(), "rights") == [GOOD]


def test_a_host_that_is_not_there(google: Google) -> None:
    found = google.examine(resolve=lambda *_: ("127.0.0.1", 1))
    assert {(finding.subject, finding.level) for finding in found} == {("reachability", BAD)}
    assert "KRAVN_KMS_GCP_ENDPOINT" in said(found, "reachability")


def test_an_endpoint_of_its_own(google: Google, tmp_path: Path) -> None:
    server = google.examine(endpoint=f"{HOST}:8443")
    assert f"{HOST}:8443 takes connections." in said(server, "reachability")
