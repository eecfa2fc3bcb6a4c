"""What a configuration for Azure is worth: the real SDK against a local server, and answers that no Azure gives."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sqlalchemy_kravn_crypto.providers.azure import AzureProvider
from sqlalchemy_kravn_crypto.providers.base import Deadline, Finding, Level
from tests import hostile_server as hostile
from tests.azure_identities import ClientCertificate
from tests.azure_server import LOGIN_HOST, VAULT_HOST, Answer, AzureVault, login_refusal
from tests.certificates import Authority
from tests.hostile_server import HostileServer, Raw, answers
from tests.leaks import found_in

GOOD, WARNING, BAD = Level.GOOD, Level.WARNING, Level.BAD
MARK = "MARKER-of-what-the-server-says"


def examine(vault: AzureVault, seconds: float = 20, **settings: Any) -> list[Finding]:
    provider = AzureProvider(**vault.settings(sleep=lambda _: None, **settings))
    return list(provider.examine(Deadline(seconds)))


def of(findings: Iterable[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


def levels(findings: Iterable[Finding], subject: str) -> list[Level]:
    return [finding.level for finding in of(findings, subject)]


def said(findings: Iterable[Finding], subject: str) -> str:
    return "\n".join(f"{finding.message} {finding.advice}" for finding in of(findings, subject))


def refused(code: str) -> Answer:
    return Answer(403, {"error": {"code": "Forbidden", "message": MARK, "innererror": {"code": code}}})


def key(**attributes: Any) -> Answer:
    body = {"key": {"kid": f"https://{VAULT_HOST}/keys/kravn/{'0' * 32}", "kty": "RSA", "n": MARK, "e": "AQAB"}}
    return Answer(200, body | {"attributes": {"enabled": True, "created": 1, "updated": 1, **attributes}})


# --- The login, and the rights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["ForbiddenByRbac", "ForbiddenByPolicy", "AccessDenied"])
def test_a_login_that_may_not_read_the_key(azure_vault: AzureVault, code: str) -> None:
    azure_vault.vault_answers.append(refused(code))
    found = examine(azure_vault)
    assert levels(found, "reachability") == [GOOD, GOOD]
    assert levels(found, "tls") == [GOOD] * 4
    assert levels(found, "clock") == [GOOD, GOOD]
    assert levels(found, "rights") == [GOOD]
    assert [VAULT_HOST in said(found, "reachability"), LOGIN_HOST in said(found, "reachability")] == [True, True]
    # Nobody but Entra ID knows how long a client secret lasts.
    assert levels(found, "credentials") == [GOOD, WARNING]
    assert "each is good for 359" in said(found, "credentials")
    assert found_in(repr(found), azure_vault.client_secret, MARK, *azure_vault.tokens) == []


def test_nothing_is_asked_of_the_key_vault_but_to_read_the_key(azure_vault: AzureVault) -> None:
    azure_vault.vault_answers.append(refused("ForbiddenByRbac"))
    examine(azure_vault)
    asked = [one for one in azure_vault.requests if one.host == VAULT_HOST]
    assert {(one.method, one.path) for one in asked} == {("GET", "/keys/kravn")}
    assert [one.authorised for one in asked].count(True) == 1
    version = "0123456789abcdef0123456789abcdef"
    azure_vault.vault_answers.append(refused("ForbiddenByRbac"))
    examine(azure_vault, key=f"kravn/{version}")
    assert azure_vault.requests[-1].path == f"/keys/kravn/{version}"


def test_a_login_that_may_read_the_key(azure_vault: AzureVault) -> None:
    azure_vault.vault_answers.append(key())
    found = examine(azure_vault)
    assert levels(found, "rights") == [WARNING]
    assert "public part" in said(found, "rights")
    assert of(found, "master key") == []
    assert found_in(repr(found), MARK) == []


@pytest.mark.parametrize(
    ("attributes", "level"),
    [
        ({"exp": int(time.time()) + 30 * 86_400}, GOOD),
        ({"exp": int(time.time()) + 10 * 86_400}, WARNING),
        ({"exp": int(time.time()) - 10}, BAD),
        ({"exportable": True}, BAD),
    ],
)
def test_what_the_key_vault_says_of_the_key(azure_vault: AzureVault, attributes: dict[str, Any], level: Level) -> None:
    azure_vault.vault_answers.append(key(**attributes))
    assert levels(examine(azure_vault), "master key") == [level]


@pytest.mark.parametrize("attributes", [{"exp": MARK}, {"exp": 10**300}, {"exportable": MARK}, {"exp": -1}])
def test_what_no_key_vault_says_of_a_key_is_not_told(azure_vault: AzureVault, attributes: dict[str, Any]) -> None:
    azure_vault.vault_answers.append(key(**attributes))
    found = examine(azure_vault)
    assert of(found, "master key") == []
    assert found_in(repr(found), MARK) == []


@pytest.mark.parametrize("body", [b"", MARK.encode(), [MARK], {"attributes": MARK}, b"[" * 90_000])
def test_an_answer_of_the_wrong_shape_is_not_believed(azure_vault: AzureVault, body: Any) -> None:
    azure_vault.vault_answers.append(Answer(200, body))
    found = examine(azure_vault)
    assert levels(found, "master key") == [WARNING]
    assert found_in(repr(found), MARK) == []


@pytest.mark.parametrize("code", ["ForbiddenByFirewall", "ForbiddenByConnection"])
def test_a_firewall_is_not_taken_for_a_missing_right(azure_vault: AzureVault, code: str) -> None:
    azure_vault.vault_answers.append(refused(code))
    found = examine(azure_vault)
    assert levels(found, "rights") == [WARNING]
    assert "whoever logs in" in said(found, "rights")


def test_a_key_that_is_not_there(azure_vault: AzureVault) -> None:
    azure_vault.vault_answers.append(Answer(404, {"error": {"code": "KeyNotFound", "message": MARK}}))
    found = examine(azure_vault)
    assert levels(found, "rights") == [WARNING]
    assert levels(found, "credentials")[0] is GOOD


# --- What is logged in with ------------------------------------------------------------------------------------------


def test_a_login_that_is_over_before_an_operation_may_be(azure_vault: AzureVault) -> None:
    azure_vault.vault_answers.append(refused("ForbiddenByRbac"))
    found = examine(azure_vault, seconds=3700)
    assert levels(found, "credentials")[0] is WARNING
    assert "clock" in said(found, "credentials")


@pytest.mark.parametrize("expired", [True, False])
def test_a_client_secret_that_is_refused(azure_vault: AzureVault, *, expired: bool) -> None:
    secret = f"{azure_vault.client_secret}-old" if expired else "another~secret"
    found = examine(azure_vault, client_secret=secret)
    assert levels(found, "credentials") == [BAD]
    assert ("no longer valid" in said(found, "credentials")) is expired
    assert levels(found, "rights") == [WARNING]
    assert found_in(repr(found), secret) == []


@pytest.mark.parametrize(
    ("left", "level"), [(timedelta(days=30), GOOD), (timedelta(minutes=1), WARNING), (-timedelta(minutes=1), BAD)]
)
def test_until_when_a_client_certificate_is_valid(
    azure_vault: AzureVault, tmp_path: Path, left: timedelta, level: Level
) -> None:
    certificate = ClientCertificate(tmp_path / "client.pem", expires=left)
    azure_vault.application.certificates = [certificate.certificate]
    azure_vault.vault_answers.append(refused("ForbiddenByRbac"))
    found = examine(azure_vault, auth="certificate", client_secret=None, client_certificate=tmp_path / "client.pem")
    assert levels(found, "credentials")[-1] is level
    assert "KRAVN_KMS_AZURE_CLIENT_CERTIFICATE" in of(found, "credentials")[-1].message


@pytest.mark.parametrize(
    ("age", "left", "level"), [(0, 3600, GOOD), (3000, 600, WARNING), (3600, -1, BAD), (0, 30 * 86_400, GOOD)]
)
def test_until_when_the_token_of_a_workload_is_valid(
    azure_vault: AzureVault, age: float, left: float, level: Level
) -> None:
    now = time.time()
    issuer = azure_vault.application.issuer
    assert issuer is not None
    token = issuer.token(iat=int(now - age), nbf=int(now - age), exp=int(now + left))
    azure_vault.vault_answers.append(refused("ForbiddenByRbac"))
    found = examine(azure_vault, auth="workload", client_secret=None, federated_token=token)
    assert levels(found, "credentials")[-1] is level
    assert "KRAVN_KMS_AZURE_FEDERATED_TOKEN" in of(found, "credentials")[-1].message
    assert found_in(repr(found), token) == []


def test_a_managed_identity_has_no_end_to_watch_for(azure_vault: AzureVault) -> None:
    azure_vault.vault_answers.append(refused("ForbiddenByRbac"))
    found = examine(azure_vault, auth="managed", tenant_id=None, client_id=None, client_secret=None)
    assert levels(found, "reachability") == [GOOD]
    assert levels(found, "credentials") == [GOOD]
    assert "8639" in said(found, "credentials") or "86400" in said(found, "credentials")


# --- Servers that do not work, or are hostile ------------------------------------------------------------------------


def test_a_key_vault_that_is_not_there(azure_vault: AzureVault) -> None:
    found = examine(azure_vault, resolve=lambda *_: ("127.0.0.1", 1))
    assert levels(found, "reachability") == [BAD, BAD]
    assert {finding.subject for finding in found} == {"reachability"}
    assert azure_vault.requests == []


def test_a_certificate_that_is_about_to_end(azure_vault: AzureVault, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    end = datetime.now(UTC) + timedelta(days=3)
    server = HostileServer(authority.issue(VAULT_HOST, LOGIN_HOST, start=end - timedelta(days=90), end=end))
    server.raw = answers(404, MARK.encode())
    try:
        found = examine(azure_vault, resolve=lambda *_: ("127.0.0.1", server.port), ca_bundle=authority.ca_bundle)
    finally:
        server.close()
    assert levels(found, "tls") == [GOOD, WARNING, GOOD, WARNING]
    assert found_in(repr(found), MARK) == []


HOSTILE = {
    "hangs up": hostile.hangs_up,
    "redirects": answers(307, MARK.encode(), f"Location: https://{MARK}/"),
    "echoes": hostile.echoes(500),
    "echoes a refusal": hostile.echoes(400),
    "denies": hostile.echoes(401),
    "says no HTTP": hostile.sends(MARK.encode()),
    "compresses": hostile.GZIP_BOMB,
    "drips": hostile.DRIPS_BODY,
    "sends without end": hostile.ENDLESS_BODY,
    "is silent": hostile.is_silent,
}


@pytest.mark.parametrize("who", ["vault_raw", "login_raw"])
@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_answer_ends_within_the_deadline_and_shows_nothing(
    azure_vault: AzureVault, caplog: pytest.LogCaptureFixture, who: str, raw: Raw
) -> None:
    caplog.set_level("DEBUG")
    setattr(azure_vault, who, raw)
    started = time.monotonic()
    found = examine(azure_vault, seconds=2)
    assert time.monotonic() - started < hostile.ENOUGH / 2
    assert GOOD not in levels(found, "rights")
    assert WARNING in levels(found, "rights") or BAD in {finding.level for finding in found}
    assert found_in(repr(found) + caplog.text, MARK, azure_vault.client_secret, *azure_vault.tokens) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_key_vault_that_does_not_serve(azure_vault: AzureVault, status: int) -> None:
    azure_vault.vault_answers.extend([Answer(status, {"error": {"code": MARK}})] * 3)
    found = examine(azure_vault)
    assert levels(found, "reachability") == [GOOD, GOOD, BAD]
    assert f"HTTP {status}" in said(found, "reachability")


def test_a_login_service_that_knows_of_no_such_tenant(azure_vault: AzureVault) -> None:
    # The first is for the clock.
    azure_vault.login_answers.extend([login_refusal(90002)] * 2)
    found = examine(azure_vault)
    assert levels(found, "clock") == [GOOD, GOOD]
    assert levels(found, "credentials") == [BAD]
    assert "KRAVN_KMS_AZURE_TENANT_ID" in said(found, "credentials")
