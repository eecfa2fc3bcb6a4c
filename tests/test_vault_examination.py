"""What a configuration for Vault is worth: tokens of every kind on a real OpenBao, and answers that no Vault gives."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sqlalchemy_kravn_crypto.providers.base import Deadline, Finding, Level
from sqlalchemy_kravn_crypto.providers.proxy import Proxy
from sqlalchemy_kravn_crypto.providers.vault import VaultProvider
from tests import hostile_server as hostile
from tests.connect_proxy import ConnectProxy
from tests.hostile_server import Raw, answers
from tests.leaks import found_in
from tests.openbao import OpenBao
from tests.scripted_server import ScriptedServer, dated

GOOD, WARNING, BAD = Level.GOOD, Level.WARNING, Level.BAD
MARK = "MARKER-of-what-the-server-says"
TOKEN = "MARKER-of-a-token"

SERVES = {"encrypt/{key}": ["update"], "decrypt/{key}": ["update"]}
"""What a process needs, by path below the mount."""


@pytest.fixture
def key(openbao: OpenBao) -> str:
    name = f"key-{secrets.token_hex(4)}"
    openbao.create_key(name)
    return name


def policy(openbao: OpenBao, key: str, more: dict[str, list[str]] | None = None) -> str:
    """Write a policy of what a process needs, and of more, and return its name."""
    rules = {f"transit/{path}": capabilities for path, capabilities in SERVES.items()} | (more or {})
    text = "\n".join(
        f'path "{path.format(key=key)}" {{ capabilities = {json.dumps(capabilities)} }}'
        for path, capabilities in rules.items()
    )
    name = f"policy-{secrets.token_hex(4)}"
    openbao.write(f"sys/policies/acl/{name}", policy=text)
    return name


def issue(openbao: OpenBao, *policies: str, with_default: bool = True, **options: Any) -> str:
    body = {"policies": policies, "no_default_policy": not with_default, "no_parent": True, **options}
    return str(openbao.write("auth/token/create", **body)["auth"]["client_token"])


def examine(openbao: OpenBao, seconds: float = 20, **settings: Any) -> list[Finding]:
    provider = VaultProvider(**openbao.settings(sleep=lambda _: None, **settings))
    return list(provider.examine(Deadline(seconds)))


def of(findings: Iterable[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


def levels(findings: Iterable[Finding], subject: str) -> list[Level]:
    return [finding.level for finding in of(findings, subject)]


def said(findings: Iterable[Finding], subject: str) -> str:
    return "\n".join(f"{finding.message} {finding.advice}" for finding in of(findings, subject))


# --- Tokens ----------------------------------------------------------------------------------------------------------


def test_a_token_that_may_do_what_it_is_for_and_ask_about_itself(openbao: OpenBao, key: str) -> None:
    token = issue(openbao, policy(openbao, key), ttl="720h")
    mark = len(openbao.audit_entries())
    found = examine(openbao, key=key, token=token)
    assert {finding.level for finding in found} == {GOOD}
    assert [finding.subject for finding in found] == ["reachability", "clock", "credentials", "credentials", "rights"]
    assert "for 29 days" in said(found, "credentials")
    assert found_in(repr(found), token) == []
    # Nothing else is asked, and nothing with the key.
    assert openbao.paths_since(mark) == ["auth/token/lookup-self", "sys/capabilities-self"]


def test_without_the_policy_default_it_is_said_what_could_not_be_looked_at(openbao: OpenBao, key: str) -> None:
    token = issue(openbao, policy(openbao, key), with_default=False)
    found = examine(openbao, key=key, token=token)
    assert levels(found, "credentials") == [GOOD, WARNING]
    assert levels(found, "rights") == [WARNING]
    assert "read on auth/token/lookup-self" in said(found, "credentials")
    assert "update on sys/capabilities-self" in said(found, "rights")
    assert BAD not in {finding.level for finding in found}


@pytest.mark.parametrize(
    ("path", "capability", "subject"),
    [("auth/token/lookup-self", "read", "credentials"), ("sys/capabilities-self", "update", "rights")],
)
def test_one_rule_of_its_own_is_enough_to_look_at_the_one(
    openbao: OpenBao, key: str, path: str, capability: str, subject: str
) -> None:
    token = issue(openbao, policy(openbao, key, {path: [capability]}), with_default=False, ttl="720h")
    found = examine(openbao, key=key, token=token)
    (other,) = {"credentials", "rights"} - {subject}
    assert set(levels(found, subject)) == {GOOD}
    assert WARNING in levels(found, other)


def test_a_root_token(openbao: OpenBao, key: str) -> None:
    found = examine(openbao, key=key, token=openbao.root_token)
    assert levels(found, "credentials") == [GOOD, WARNING]
    assert "never expires" in said(found, "credentials")
    assert levels(found, "rights") == [BAD]
    assert "root token" in said(found, "rights")
    # It was asked about, and not made use of.
    assert openbao.read(f"transit/keys/{key}")["latest_version"] == 1
    assert openbao.read(f"transit/keys/{key}")["deletion_allowed"] is False


@pytest.mark.parametrize(
    ("path", "capability", "words"),
    [
        ("transit/keys/{key}", "delete", "delete the key"),
        ("transit/keys/{key}/config", "update", "allow that the key is deleted or exported"),
        ("transit/keys/{key}/trim", "update", "destroy versions of the key"),
        ("transit/export/encryption-key/{key}", "read", "export the key"),
        ("transit/backup/{key}", "read", "take the key along"),
        ("sys/policies/acl/*", "update", "write policies"),
    ],
)
def test_each_right_that_should_not_be_there_is_named_alone(
    openbao: OpenBao, key: str, path: str, capability: str, words: str
) -> None:
    token = issue(openbao, policy(openbao, key, {path: [capability]}))
    found = examine(openbao, key=key, token=token)
    (finding,) = of(found, "rights")
    assert finding.level is BAD
    assert finding.message.startswith(f"Your token may also {words}")
    assert ";" not in finding.message
    assert "docs/kms-vault.md" in finding.advice


@pytest.mark.parametrize(
    ("path", "capability"),
    [
        ("transit/keys/{key}", "read"),
        ("transit/keys/{key}/rotate", "update"),
        ("transit/export/encryption-key/other", "read"),
        ("sys/policies/acl/*", "read"),
    ],
)
def test_what_cannot_lose_or_show_the_key_is_not_complained_of(
    openbao: OpenBao, key: str, path: str, capability: str
) -> None:
    token = issue(openbao, policy(openbao, key, {path: [capability]}))
    assert levels(examine(openbao, key=key, token=token), "rights") == [GOOD]


def test_everything_on_the_mount_is_several_rights_in_one_line(openbao: OpenBao, key: str) -> None:
    everything = {"transit/*": ["create", "read", "update", "delete", "list"]}
    rules = {f"transit/encrypt/{key}": ["create", "update"], f"transit/decrypt/{key}": ["update"]} | everything
    found = examine(openbao, key=key, token=issue(openbao, policy(openbao, key, rules)))
    assert levels(found, "rights") == [BAD, WARNING]
    assert of(found, "rights")[0].message.count(";") == 4


def test_the_right_to_make_keys(openbao: OpenBao, key: str) -> None:
    token = issue(openbao, policy(openbao, key, {"transit/encrypt/{key}": ["create", "update"]}))
    found = examine(openbao, key=key, token=token)
    assert levels(found, "rights") == [WARNING]
    assert f"Leave out create on transit/encrypt/{key}" in said(found, "rights")


def test_in_a_namespace_it_is_the_rights_there_that_count(openbao: OpenBao) -> None:
    name = f"team-{secrets.token_hex(4)}"
    openbao.create_namespace(name)
    openbao.mount("transit", namespace=name)
    openbao.create_key(namespace=name)
    rules = f'path "transit/keys/{openbao.key}" {{ capabilities = ["delete"] }}'
    openbao.write("sys/policies/acl/deletes", namespace=name, policy=rules)
    created = openbao.write("auth/token/create", namespace=name, policies=["deletes"], no_parent=True)
    found = examine(openbao, namespace=name, token=created["auth"]["client_token"])
    assert levels(found, "rights") == [BAD]
    assert "delete the key" in said(found, "rights")


@pytest.mark.parametrize("with_default", [True, False])
def test_a_token_that_is_no_longer_valid(openbao: OpenBao, key: str, *, with_default: bool) -> None:
    token = issue(openbao, policy(openbao, key), with_default=with_default)
    openbao.revoke(token)
    found = examine(openbao, key=key, token=token)
    assert levels(found, "credentials") == [BAD]
    assert "expired, was revoked" in said(found, "credentials")
    assert levels(found, "rights") == [WARNING]
    assert levels(found, "reachability") == [GOOD]
    assert found_in(repr(found), token) == []


def test_a_token_with_a_number_of_uses(openbao: OpenBao, key: str) -> None:
    token = issue(openbao, policy(openbao, key), num_uses=10, ttl="720h")
    found = examine(openbao, key=key, token=token)
    assert levels(found, "credentials") == [GOOD, WARNING, GOOD]
    assert "more requests" in said(found, "credentials")


# --- Logins ----------------------------------------------------------------------------------------------------------


def role(openbao: OpenBao, key: str, **more: Any) -> dict[str, Any]:
    return {"token_policies": policy(openbao, key), "token_type": "batch", "token_ttl": "60s", **more}


@pytest.fixture
def approle(openbao: OpenBao, key: str) -> dict[str, Any]:
    mount = f"approle-{secrets.token_hex(4)}"
    openbao.enable_auth(mount, "approle")
    openbao.write(f"auth/{mount}/role/app", **role(openbao, key))
    return {
        "key": key,
        "auth": "approle",
        "auth_mount": mount,
        "token": None,
        "role_id": openbao.read(f"auth/{mount}/role/app/role-id")["role_id"],
        "secret_id": openbao.write(f"auth/{mount}/role/app/secret-id")["data"]["secret_id"],
    }


def test_a_login_for_each_operation(openbao: OpenBao, approle: dict[str, Any]) -> None:
    mark = len(openbao.audit_entries())
    found = examine(openbao, **approle)
    assert {finding.level for finding in found} == {GOOD}
    assert re.search(r"Each login is good for (59|60) seconds\.", said(found, "credentials"))
    login = f"auth/{approle['auth_mount']}/login"
    assert openbao.paths_since(mark) == [login, "auth/token/lookup-self", login, "sys/capabilities-self"]


def test_a_login_that_is_refused(openbao: OpenBao, approle: dict[str, Any]) -> None:
    secret_id = f"MARKER-{secrets.token_hex(8)}"
    found = examine(openbao, **approle | {"secret_id": secret_id})
    assert levels(found, "credentials") == [BAD]
    assert "KRAVN_KMS_VAULT_SECRET_ID" in said(found, "credentials")
    assert levels(found, "rights") == [WARNING]
    assert found_in(repr(found), secret_id, approle["secret_id"]) == []


def test_a_login_that_is_over_before_an_operation_may_be(openbao: OpenBao, approle: dict[str, Any]) -> None:
    found = examine(openbao, seconds=61, **approle)
    assert levels(found, "credentials") == [GOOD, WARNING]
    assert "KRAVN_KMS_TIMEOUT" in said(found, "credentials")


SIGNER = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def jwt_login(openbao: OpenBao, key: str) -> Callable[..., dict[str, Any]]:
    mount = f"jwt-{secrets.token_hex(4)}"
    openbao.enable_auth(mount, "jwt")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = SIGNER.public_key().public_bytes(serialization.Encoding.PEM, form).decode()
    openbao.write(f"auth/{mount}/config", jwt_validation_pubkeys=[public])
    bound = {"role_type": "jwt", "user_claim": "sub", "bound_subject": "app", "bound_audiences": "vault"}
    openbao.write(f"auth/{mount}/role/app", **role(openbao, key, **bound))

    def with_claims(**claims: Any) -> dict[str, Any]:
        given = {"sub": "app", "aud": "vault", "iat": int(time.time()), **claims}
        signed = jwt.encode(given, SIGNER, algorithm="ES256")
        return {"key": key, "auth": "jwt", "auth_mount": mount, "token": None, "role": "app", "jwt": signed}

    return with_claims


@pytest.mark.parametrize(
    ("age", "left", "level"),
    [
        (0, 3600, GOOD),
        (3000, 600, WARNING),
        (3600, -1, BAD),
        (0, 365 * 86_400, GOOD),
        (355 * 86_400, 10 * 86_400, WARNING),
    ],
)
def test_until_when_a_jwt_is_valid(
    openbao: OpenBao, jwt_login: Callable[..., dict[str, Any]], age: float, left: float, level: Level
) -> None:
    now = int(time.time())
    settings = jwt_login(iat=now - age, exp=now + left)
    found = examine(openbao, **settings)
    about = [finding for finding in of(found, "credentials") if "JWT" in finding.message]
    assert [finding.level for finding in about] == [level]
    assert found_in(repr(found), settings["jwt"]) == []


def test_a_jwt_that_does_not_say_when_it_began(openbao: OpenBao, jwt_login: Callable[..., dict[str, Any]]) -> None:
    found = examine(openbao, **jwt_login(iat=None, nbf=int(time.time()) - 5, exp=int(time.time()) + 3600))
    # Nothing says that it is a short-lived one.
    assert WARNING in levels(found, "credentials") or BAD in levels(found, "credentials")


def certificate(openbao: OpenBao, end: timedelta) -> dict[str, Any]:
    files = openbao.authority.issue_client(f"app-{secrets.token_hex(4)}", expires=datetime.now(UTC) + end)
    return {
        "address": openbao.tls_address,
        "ca_bundle": openbao.authority.ca_bundle,
        "client_cert": files.certificate,
        "client_key": files.key,
    }


@pytest.mark.parametrize(("end", "level"), [(timedelta(days=1), GOOD), (timedelta(minutes=30), WARNING)])
def test_until_when_a_client_certificate_is_valid(openbao: OpenBao, key: str, end: timedelta, level: Level) -> None:
    token = issue(openbao, policy(openbao, key), ttl="720h")
    found = examine(openbao, key=key, token=token, **certificate(openbao, end))
    about = [finding for finding in of(found, "credentials") if "KRAVN_KMS_VAULT_CLIENT_CERT" in finding.message]
    assert [finding.level for finding in about] == [level]
    assert set(levels(found, "tls")) == {GOOD}


def test_a_client_certificate_that_has_expired_does_not_keep_the_server_from_being_looked_at(
    openbao: OpenBao, key: str
) -> None:
    found = examine(openbao, key=key, **certificate(openbao, -timedelta(minutes=1)))
    assert levels(found, "reachability") == [GOOD]
    assert levels(found, "tls") == [GOOD, GOOD]
    assert levels(found, "credentials") == [BAD]
    assert "expired" in said(found, "credentials")


def test_a_client_certificate_that_is_missing(openbao: OpenBao, key: str) -> None:
    found = examine(openbao, key=key, address=openbao.tls_address, ca_bundle=openbao.authority.ca_bundle)
    # In TLS 1.3 the client is done with the handshake before the server says that it wants one.
    assert levels(found, "tls") == [GOOD, GOOD]
    assert levels(found, "credentials") == [BAD]
    assert "KRAVN_KMS_VAULT_CLIENT_CERT" in said(found, "credentials")


# --- Servers that are no Vault, or none that works -------------------------------------------------------------------


def every_path_denied(connection: Any, body: bytes) -> None:
    answers(200, {"data": {path: ["deny"] for path in json.loads(body)["paths"]}})(connection, body)


@pytest.fixture
def scripted() -> Iterator[Callable[..., list[Finding]]]:
    """Examine a server that answers as it is told, and everything else as a Vault would that likes the token."""
    started: list[ScriptedServer] = []

    def run(seconds: float = 20, **by_name: Raw) -> list[Finding]:
        usual = {
            "lookup": answers(200, {"data": {"ttl": 2_000_000, "creation_ttl": 2_000_000, "num_uses": 0}}),
            "capabilities": every_path_denied,
        }
        server = ScriptedServer(usual | by_name, dated(200, {"sealed": False}))
        started.append(server)
        provider = VaultProvider(address=server.url, token=TOKEN, key="kravn", sleep=lambda _: None)
        found = list(provider.examine(Deadline(seconds)))
        assert found_in(repr(found), MARK, TOKEN) == []
        return found

    yield run
    for server in started:
        server.close()


def lookup(**values: Any) -> Raw:
    return answers(200, {"data": {"ttl": 3600, "creation_ttl": 3600, "num_uses": 0, **values}})


def test_the_scripted_server_is_well(scripted: Callable[..., list[Finding]]) -> None:
    assert {finding.level for finding in scripted()} == {GOOD}


@pytest.mark.parametrize(
    ("values", "level"),
    [
        ({"ttl": 1300}, GOOD),
        ({"ttl": 1100}, WARNING),
        ({"ttl": 15 * 86_400, "creation_ttl": 90 * 86_400}, GOOD),
        ({"ttl": 13 * 86_400, "creation_ttl": 90 * 86_400}, WARNING),
        ({"ttl": 1300, "creation_ttl": 0}, GOOD),  # renewed for longer than it was given
        ({"ttl": 0}, WARNING),
    ],
)
def test_how_long_a_token_lasts(scripted: Callable[..., list[Finding]], values: dict[str, int], level: Level) -> None:
    assert levels(scripted(lookup=lookup(**values)), "credentials") == [GOOD, level]


NO_VAULT = {
    "not found": answers(404, {"errors": [MARK]}),
    "bad request": answers(400, {"errors": [MARK]}),
    "nothing": answers(204, b""),
    "no object": answers(200, [MARK]),
    "no data": answers(200, {"data": MARK}),
    "no JSON": answers(200, MARK.encode()),
    "brackets": answers(200, b"[" * 90_000),
    "a proxy's page": answers(403, f"<html>{MARK}</html>".encode()),
}
NO_LOOKUP = NO_VAULT | {
    "a number too large": lookup(ttl=10**30),
    "no number": lookup(ttl=MARK),
    "a truth": lookup(ttl=True),
    "below nothing": lookup(ttl=-1),
    "a fraction": lookup(num_uses=1.5),
    "too little": answers(200, {"data": {"ttl": 1}}),
}
NO_CAPABILITIES = NO_VAULT | {
    "other paths": answers(200, {"data": {MARK: ["root"]}}),
    "no lists": answers(200, {"data": dict.fromkeys(["transit/encrypt/kravn", "transit/keys/kravn"], MARK)}),
}


@pytest.mark.parametrize("raw", NO_LOOKUP.values(), ids=NO_LOOKUP.keys())
def test_what_no_vault_says_of_a_token_is_not_believed(scripted: Callable[..., list[Finding]], raw: Raw) -> None:
    found = scripted(lookup=raw)
    assert levels(found, "credentials")[-1] is WARNING
    assert of(found, "credentials")[-1].message.startswith("Not checked: ")
    assert levels(found, "rights") == [GOOD]


@pytest.mark.parametrize("raw", NO_CAPABILITIES.values(), ids=NO_CAPABILITIES.keys())
def test_what_no_vault_says_of_rights_is_not_believed(scripted: Callable[..., list[Finding]], raw: Raw) -> None:
    found = scripted(capabilities=raw)
    assert levels(found, "rights") == [WARNING]
    assert of(found, "rights")[0].message.startswith("Not checked: ")


HOSTILE = {
    "hangs up": hostile.hangs_up,
    "redirects": answers(307, MARK.encode(), f"Location: https://{MARK}/"),
    "echoes": hostile.echoes(500),
    "echoes a refusal": hostile.echoes(403),
    "says no HTTP": hostile.sends(MARK.encode()),
    "compresses": hostile.GZIP_BOMB,
    "drips": hostile.DRIPS_BODY,
    "sends without end": hostile.ENDLESS_BODY,
    "is silent": hostile.is_silent,
}


@pytest.mark.parametrize("name", ["lookup", "capabilities"])
@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_answer_ends_within_the_deadline_and_shows_nothing(
    scripted: Callable[..., list[Finding]], name: str, raw: Raw
) -> None:
    started = time.monotonic()
    found = scripted(seconds=1, **{name: raw})
    assert time.monotonic() - started < hostile.ENOUGH / 2
    if name == "lookup":
        assert GOOD not in levels(found, "credentials")
        assert BAD in {finding.level for finding in found} or levels(found, "credentials") == [WARNING]
    else:
        assert levels(found, "rights") == [WARNING]
        assert BAD not in {finding.level for finding in found}


@pytest.mark.parametrize(
    ("status", "errors"), [(503, ["Vault is sealed"]), (501, []), (503, [MARK]), (429, [MARK]), (500, [MARK])]
)
def test_a_vault_that_does_not_serve(scripted: Callable[..., list[Finding]], status: int, errors: list[str]) -> None:
    found = scripted(lookup=answers(status, {"errors": errors}))
    assert levels(found, "reachability") == [GOOD, BAD]
    assert ("sealed" in said(found, "reachability")) is (status == 501 or "Vault is sealed" in errors)
    assert levels(found, "rights") == [WARNING]


def test_a_server_that_is_not_there_is_asked_nothing_else() -> None:
    provider = VaultProvider(address="http://127.0.0.1:1", token=TOKEN, key="kravn")
    (finding,) = provider.examine(Deadline(10))
    assert (finding.subject, finding.level) == ("reachability", BAD)


def test_the_examination_goes_through_the_proxy(openbao: OpenBao, key: str) -> None:
    port = int(openbao.tls_address.rpartition(":")[2])
    proxy = ConnectProxy({f"localhost:{port}": port})
    through = Proxy("127.0.0.1", proxy.port)
    try:
        token = issue(openbao, policy(openbao, key), ttl="720h")
        found = examine(openbao, key=key, token=token, proxy=through, **certificate(openbao, timedelta(days=1)))
    finally:
        proxy.close()
    assert {finding.level for finding in found} == {GOOD}
    assert f"through the proxy 127.0.0.1:{through.port}" in said(found, "reachability")
    assert len(proxy.requests) == 4
