"""The key store on both databases, with a KMS that misbehaves on demand."""

import asyncio
import copy
import hashlib
import hmac
import logging
import os
import pickle
import threading
import traceback
import uuid
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import greenlet_spawn

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.base64_text import to_base64
from sqlalchemy_kravn_crypto.bootstrap import BootstrapSecret, BootstrapSecrets
from sqlalchemy_kravn_crypto.changes import changing
from sqlalchemy_kravn_crypto.ciphertext import ColumnName
from sqlalchemy_kravn_crypto.columns import BINARY, TEXT, EncryptedColumn
from sqlalchemy_kravn_crypto.derivation import key_id_of
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from sqlalchemy_kravn_crypto.keystore import KeyStore
from sqlalchemy_kravn_crypto.lifecycle import add_standby, enable, promote, rotate
from sqlalchemy_kravn_crypto.providers.base import Deadline
from sqlalchemy_kravn_crypto.rows import KeyRow, MacKey, StoredRows
from sqlalchemy_kravn_crypto.schema import TABLES, State
from sqlalchemy_kravn_crypto.settings import Settings
from sqlalchemy_kravn_crypto.types import EncryptedJSON
from sqlalchemy_kravn_crypto.wrapping import MAC_KEYRING, binding
from tests import reference
from tests.fixtures_deployment import Deployment, VersionedKMS
from tests.fixtures_postgres import asynchronous
from tests.misbehaving_kms import MisbehavingKMS

SECRET = "correct horse battery staple, and forty more characters"
ROOT = bytes(range(32))  # what secret.key holds, for all tests but those of KRAVN_SECRET: stretching that takes long
BOOTSTRAP = BootstrapSecret._from_root("file", ROOT)
NAME = ColumnName("plugin.credentials")
KEYS = TABLES.keys


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url)
    TABLES.keys.metadata.create_all(made)
    yield made
    made.dispose()


@pytest.fixture
def kms() -> MisbehavingKMS:
    return MisbehavingKMS()


@pytest.fixture
def secret_key(tmp_path: Path) -> Path:
    path = tmp_path / "secret.key"
    path.write_text(ROOT.hex())
    path.chmod(0o600)
    return path


@pytest.fixture
def store(secret_key: Path) -> Callable[..., KeyStore]:
    """Make key stores as processes with different settings would."""

    def make(provider: MisbehavingKMS | None = None, *, secret: str | None = None, **settings: Any) -> KeyStore:
        return KeyStore(provider=provider, secret=secret, secret_file=secret_key, **settings)

    return make


def stored(engine: Engine) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(select(KEYS).order_by(KEYS.c.id)).mappings()]


def states(engine: Engine) -> list[tuple[str, str]]:
    return [(row["provider"], row["state"]) for row in stored(engine)[1:]]


def tamper(engine: Engine, row_id: int, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(update(KEYS).where(KEYS.c.id == row_id).values(values))


class Blocked:
    """Runs what blocks right here, and counts it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function: Callable[[], Any], /) -> Any:
        self.calls += 1
        return function()


# --- Mode none ------------------------------------------------------------------------------------------------------


def test_the_first_boot_in_mode_none_records_the_bootstrap_key_as_primary(engine: Engine, store: Any) -> None:
    opened = store(secret=SECRET).open(engine)
    control, row = stored(engine)
    assert (control["id"], control["state"], control["epoch"]) == (1, "control", 1)
    assert uuid.UUID(control["deployment_id"]).version == 4
    recorded = (row["provider"], row["master_key"], row["state"], row["primary_of"])
    assert recorded == ("none", "secret", "primary", "default")
    assert row["wrapped_key"] is None
    assert row["key_id"] == opened.keyring.primary_key_id
    assert b64decode(row["key_check"]) == DataKey(BootstrapSecret.from_secret(SECRET).data_key).check


def test_without_a_secret_the_bootstrap_key_comes_from_a_file_that_is_made_once(
    engine: Engine, store: Any, secret_key: Path
) -> None:
    secret_key.unlink()
    first = store().open(engine)
    assert len(secret_key.read_text().strip()) == 64
    assert stored(engine)[1]["master_key"] == "file"
    assert store().open(engine).keyring.primary_key_id == first.keyring.primary_key_id


def test_no_file_is_made_once_a_key_is_on_record(engine: Engine, store: Any, secret_key: Path) -> None:
    store().open(engine)
    secret_key.unlink()
    with pytest.raises(errors.BootstrapKeyError, match="missing"):
        store().open(engine)
    assert not secret_key.exists()


def test_another_secret_than_the_recorded_one_stops_the_boot(engine: Engine, store: Any) -> None:
    store(secret=SECRET).open(engine)
    with pytest.raises(errors.BootstrapKeyError, match="another than the one on record"):
        store(secret="another secret of sufficient length").open(engine)


def test_a_secret_where_a_file_is_on_record_stops_the_boot(engine: Engine, store: Any) -> None:
    store().open(engine)
    with pytest.raises(errors.RowAuthenticationError, match=r"bring the secret\.key"):
        store(secret=SECRET).open(engine)


def test_errors_about_the_bootstrap_key_say_where_it_came_from_and_where_this_one_does(
    engine: Engine, store: Any, secret_key: Path
) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises(errors.BootstrapKeyError) as caught:
            store(**settings).open(engine)
        return str(caught.value)

    store(secret=SECRET).open(engine)
    assert "came from KRAVN_SECRET, this process has one from KRAVN_SECRET" in refused(secret=NEXT)
    assert f"came from KRAVN_SECRET, this process has one from {secret_key}" in refused()
    assert f"came from KRAVN_SECRET, this process has one from {secret_key}" in refused(next_secret=NEXT)
    secret_key.unlink()
    assert "it came from KRAVN_SECRET, but" in refused()
    with engine.begin() as connection:
        connection.execute(delete(KEYS))
    store().open(engine, ())
    secret_key.write_text(ROOT.hex())
    assert f"came from secret.key, this process has one from {secret_key}" in refused()
    secret_key.unlink()
    assert "came from secret.key, this process has one from KRAVN_SECRET" in refused(secret=SECRET)
    assert "it came from secret.key, but" in refused()


@pytest.mark.parametrize(
    "altered",
    [{"key_id": "00" * 8}, {"key_id": "ff" * 8}, {"key_check": to_base64(DataKey(bytes(32)).check)}],
    ids=["lower id", "higher id", "check"],
)
def test_a_bootstrap_key_that_only_half_agrees_with_its_row_is_another(
    engine: Engine, store: Any, altered: dict[str, str]
) -> None:
    store().open(engine)
    control, row = stored(engine)
    _write_signed(engine, BOOTSTRAP.mac_key, [control, row | altered])
    with pytest.raises(errors.BootstrapKeyError, match="another than the one on record"):
        store().open(engine)


def test_a_secret_is_stretched_once_by_a_boot(engine: Engine, store: Any) -> None:
    for _ in ("first", "later"):
        blocked = Blocked()
        store().open(engine, blocking=blocked)
        assert blocked.calls == 1


# --- A KMS ----------------------------------------------------------------------------------------------------------


def test_the_first_boot_with_a_kms_wraps_once_and_checks_what_it_stores(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    opened = store(kms).open(engine)
    # Wrapped; unwrapped to compare; refused under another binding; unwrapped to be used.
    assert kms.calls == {"wrap": 1, "unwrap": 3}
    assert states(engine) == [("none", "retired"), ("vault", "primary")]
    _, bootstrap, row = stored(engine)
    assert opened.keyring.key_ids == {bootstrap["key_id"], row["key_id"]}
    assert opened.keyring.primary_key_id == row["key_id"]
    assert row["master_key"] == "transit/kravn:v1"


def test_a_later_boot_only_reads_with_one_query_and_one_kms_call(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    store(kms).open(engine)
    kms.calls.clear()
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    store(kms).open(engine)
    assert kms.calls == {"unwrap": 1}
    assert len(statements) == 1
    assert statements[0].startswith("SELECT")
    assert "FOR UPDATE" not in statements[0]


def test_what_one_process_writes_every_other_reads(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    frame = store(kms).open(engine).keyring.encrypt(b"payload", NAME)
    assert store(kms).open(engine).keyring.decrypt(frame, NAME) == b"payload"


def test_the_wrapped_key_is_bound_to_keyring_deployment_and_key_id(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    store(kms).open(engine)
    control, _, row = stored(engine)

    key_id = bytes.fromhex(row["key_id"])
    bound = reference.lp(b"sqlalchemy-kravn-crypto/wrap/v1", b"default", control["deployment_id"].encode(), key_id)
    assert binding("default", control["deployment_id"], bytes.fromhex(row["key_id"])) == bound
    blob = b64decode(row["wrapped_key"])
    key = kms._aead.decrypt(blob[:12], blob[12:], bound)
    assert DataKey(key).key_id.hex() == row["key_id"]


def test_without_a_secret_the_kms_also_wraps_the_key_of_the_row_macs(
    engine: Engine, store: Any, kms: MisbehavingKMS, secret_key: Path
) -> None:
    secret_key.unlink()
    store(kms).open(engine)
    assert kms.calls["wrap"] == 2
    control = stored(engine)[0]
    assert control["provider"] == "vault"
    assert control["wrapped_key"]
    assert not secret_key.exists()
    kms.calls.clear()
    store(kms).open(engine)
    assert kms.calls == {"unwrap": 2}
    tamper(engine, 2, closing="now")
    with pytest.raises(errors.RowAuthenticationError, match="altered"):
        store(kms).open(engine)


def test_a_boot_that_may_not_provision_says_what_to_run(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    with pytest.raises(errors.NotProvisionedError, match=r"provider 'vault'.*kravn-crypto provision"):
        store(kms, may_provision=False).open(engine)
    with pytest.raises(errors.NotProvisionedError, match="provider 'none'"):
        store(may_provision=False).open(engine)
    assert stored(engine) == []
    assert kms.calls == {}


def test_a_failed_first_boot_leaves_nothing_behind(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    kms.down = True
    with pytest.raises(errors.ProviderUnavailableError):
        store(kms).open(engine)
    assert stored(engine) == []
    kms.down = False
    store(kms).open(engine)
    assert kms.calls["wrap"] == 2


def test_a_kms_that_unwraps_to_something_else_is_refused_before_anything_is_stored(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    kms.returns = os.urandom(32)
    with pytest.raises(errors.WrongKeyError):
        store(kms).open(engine)
    assert stored(engine) == []


def test_a_kms_that_ignores_the_binding_is_refused_before_anything_is_stored(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    kms.ignores_binding = True
    with pytest.raises(errors.ProviderResponseError, match="another binding"):
        store(kms).open(engine)
    assert stored(engine) == []


def test_a_credential_that_expires_before_the_binding_is_tried_does_not_count_as_a_refusal(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    class Expiring(MisbehavingKMS):
        def _answer(self, operation: str) -> None:
            super()._answer(operation)
            if self.calls["unwrap"] == 2:
                raise errors.CredentialExpiredError("expired", provider=self.name)

    expiring = Expiring()
    expiring.ignores_binding = True
    with pytest.raises(errors.CredentialExpiredError):
        store(expiring).open(engine)
    assert stored(engine) == []
    assert expiring.calls["unwrap"] == 2


@pytest.mark.parametrize("returned", [bytearray(32), "x" * 32, 32])
def test_a_provider_that_returns_no_bytes_is_refused(engine: Engine, store: Any, returned: Any) -> None:
    kms = MisbehavingKMS()
    kms.returns = returned
    with pytest.raises(errors.ProviderResponseError, match="no bytes"):
        store(kms).open(engine)
    assert stored(engine) == []
    kms.returns = None
    store(kms).open(engine)
    kms.returns = returned
    with pytest.raises(errors.ProviderResponseError, match="no bytes"):
        store(kms).open(engine)


@pytest.mark.parametrize("returned", [b"", b"x" * 31, b"x" * 32, b"x" * 33])
def test_another_key_than_was_wrapped_stops_the_boot(
    engine: Engine, store: Any, kms: MisbehavingKMS, returned: bytes
) -> None:
    store(kms).open(engine)
    kms.returns = returned
    with pytest.raises(errors.WrongKeyError) as caught:
        store(kms).open(engine)
    assert caught.value.key_id == stored(engine)[2]["key_id"]


def test_a_kms_that_hangs_is_given_up_at_the_deadline(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    store(kms).open(engine)
    kms.slow = answers = threading.Event()
    with pytest.raises(errors.ProviderUnavailableError, match=r"within 0\.2 seconds"):
        store(kms, timeout=0.2).open(engine)
    answers.set()


def test_an_error_that_no_provider_should_raise_does_not_carry_its_text_on(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    store(kms).open(engine)
    kms.raises = RuntimeError("MARKER")
    with pytest.raises(errors.ProviderError, match="RuntimeError") as caught:
        store(kms).open(engine)
    assert "MARKER" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


# --- Adoption -------------------------------------------------------------------------------------------------------


def test_adopting_a_kms_keeps_old_values_readable_and_writes_new_ones_under_its_key(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    before = store().open(engine).keyring
    old = before.encrypt(b"old", NAME)
    after = store(kms).open(engine).keyring
    assert after.decrypt(old, NAME) == b"old"
    assert after.is_stale(old)
    new = after.encrypt(b"new", NAME)
    assert not after.is_stale(new)
    assert states(engine) == [("none", "retired"), ("vault", "primary")]
    assert stored(engine)[0]["epoch"] == 2
    with pytest.raises(errors.UnknownKeyError):
        before.decrypt(new, NAME)


@pytest.mark.parametrize("name", ["azure", "vault"])
def test_mode_none_is_refused_after_a_kms(engine: Engine, store: Any, name: str) -> None:
    store(MisbehavingKMS(name=name)).open(engine)
    with pytest.raises(errors.ProviderMismatchError, match=f"KRAVN_KMS_PROVIDER={name}"):
        store().open(engine)


@pytest.mark.parametrize("name", ["azure", "vault"])
def test_only_the_bootstrap_key_counts_as_one(engine: Engine, store: Any, name: str) -> None:
    """Signatures under it are not good any more where the primary is a KMS's, unless they are accepted."""
    kms = MisbehavingKMS(name=name)
    store(kms).open(engine)
    keyring = store(kms).open(engine).keyring  # of what is in the database, now
    assert keyring.verifying(accept_bootstrap=False)[1] == []
    assert [key.key_id for key in keyring.verifying(accept_bootstrap=True)[1]] == [DataKey(BOOTSTRAP.data_key).key_id]


def test_what_became_of_the_keys_is_logged(
    engine: Engine, store: Any, kms: MisbehavingKMS, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        store().open(engine)
        (bootstrap,) = stored(engine)[1:]
        assert f"data key {bootstrap['key_id']} of provider none is now primary" in caplog.text
        caplog.clear()
        store(kms).open(engine)
    assert f"data key {bootstrap['key_id']} of provider none is now retired" in caplog.text
    assert f"data key {stored(engine)[2]['key_id']} of provider vault is now primary" in caplog.text


def test_an_adopted_key_beside_a_live_process_is_the_only_one_logged(
    sqlite_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine(sqlite_url)
    deployment = Deployment(engine, tmp_path)
    bootstrap = deployment.open(provider=None).keyring.primary_key_id
    deployment.heartbeat(holds={bootstrap}, under=bootstrap)
    with caplog.at_level(logging.INFO):
        deployment.open()
    assert deployment.row(bootstrap).state is State.PRIMARY
    assert "is now pending" in caplog.text
    assert bootstrap not in caplog.text
    engine.dispose()


def test_a_second_provision_makes_nothing_and_says_so(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    rows, made = store(kms).provision(engine)
    assert made
    kms.calls.clear()
    again, made = store(kms).provision(engine)
    assert not made
    assert [row.key_id for row in again.keys] == [row.key_id for row in rows.keys]
    assert kms.calls == {}


def test_adoption_does_not_build_on_an_audit_trail_that_was_altered(sqlite_url: str, tmp_path: Path) -> None:
    engine = create_engine(sqlite_url)
    deployment = Deployment(engine, tmp_path)
    deployment.open(provider=None)
    before = deployment.rows()
    deployment.rewrite_events(lambda rows: [row | {"hash": "ab" * 32} for row in rows])
    with pytest.raises(errors.AuditTrailError):
        deployment.open()
    assert deployment.rows() == before
    engine.dispose()


def test_the_audit_trail_of_a_key_store_that_was_emptied_goes_on(sqlite_deployment: Deployment) -> None:
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(delete(KEYS))
    sqlite_deployment.open()
    assert sqlite_deployment.actions() == ["provision", "provision"]


def test_a_rehearsal_asks_the_kms_for_all_that_a_first_boot_does_and_stores_nothing(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    store(kms).rehearse()
    assert kms.calls == {"wrap": 1, "unwrap": 2}
    kms.ignores_binding = True
    with pytest.raises(errors.ProviderResponseError, match="another binding"):
        store(kms).rehearse()
    store().rehearse()
    assert stored(engine) == []


def test_another_provider_is_refused_with_both_named(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    store(kms).open(engine)
    other = MisbehavingKMS(name="azure")
    with pytest.raises(errors.ProviderMismatchError, match=r"'vault'.*'azure'"):
        store(other).open(engine)
    assert other.calls == {}


def test_another_master_key_of_the_same_provider_is_refused(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    store(kms).open(engine)
    tamper(engine, 3, master_key="transit/other:v1")
    kms.calls.clear()
    with pytest.raises(errors.ProviderMismatchError, match="transit/other:v1"):
        store(kms).open(engine)
    assert kms.calls == {}


def test_the_bootstrap_secret_is_still_needed_after_adoption(
    engine: Engine, store: Any, kms: MisbehavingKMS, secret_key: Path
) -> None:
    store().open(engine)
    store(kms).open(engine)
    secret_key.unlink()
    with pytest.raises(errors.BootstrapKeyError, match="missing"):
        store(kms).open(engine)


def test_adoption_does_not_bring_back_a_bootstrap_key_that_was_disabled(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    store().open(engine)
    control, row = stored(engine)
    disabled = row | {"id": 3, "key_id": "00" * 8, "state": "disabled", "primary_of": None}
    _write_signed(engine, BOOTSTRAP.mac_key, [control, row, disabled])
    store(kms).open(engine)
    assert states(engine) == [("none", "retired"), ("none", "disabled"), ("vault", "primary")]


def test_adoption_does_not_build_on_rows_that_were_altered(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    store().open(engine)
    tamper(engine, 2, closing="now")
    before = stored(engine)
    with pytest.raises(errors.RowAuthenticationError):
        store(kms).open(engine)
    assert stored(engine) == before
    assert kms.calls == {}


@pytest.mark.parametrize("name", ["azure", "vault"])
def test_mode_none_still_boots_while_the_first_key_of_a_kms_is_pending(engine: Engine, store: Any, name: str) -> None:
    bootstrap = store().open(engine).keyring.primary_key_id
    control, row = stored(engine)
    pending = row | {"id": 3, "key_id": "00" * 8, "state": "pending", "primary_of": None, "provider": name}
    _write_signed(engine, BOOTSTRAP.mac_key, [control, row, pending])
    assert store().open(engine).keyring.key_ids == {bootstrap}


# --- What authenticates the rows ------------------------------------------------------------------------------------

NOT_IN_EVERY_MAC = {"row_mac", "created_at", "updated_at", "events_hash"}
AUTHENTICATED = [column.name for column in KEYS.columns if column.name not in NOT_IN_EVERY_MAC]


def _mac(key: bytes, row: dict[str, Any], covered: list[str]) -> str:
    """Compute a row's MAC from the description of the format alone."""

    def lp(value: Any) -> bytes:
        return b"\xff\xff\xff\xff" if value is None else reference.lp(str(value).encode())

    added = lp("events_hash") + lp(row["events_hash"]) if row["events_hash"] is not None else b""
    message = b"".join(lp(row[name]) for name in AUTHENTICATED) + added + b"".join(map(lp, covered))
    return b64encode(reference.key_id(key) + hmac.digest(key, message, hashlib.sha256)).decode()


def _write_signed(engine: Engine, mac_key: bytes, rows: list[dict[str, Any]]) -> None:
    control, *keys = rows
    keys = [row | {"row_mac": _mac(mac_key, row, [])} for row in keys]
    control |= {"row_mac": _mac(mac_key, control, [row["row_mac"] for row in keys])}
    with engine.begin() as connection:
        connection.execute(delete(KEYS))
        connection.execute(insert(KEYS), [control, *keys])


def test_the_macs_are_the_ones_that_the_format_describes(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    store(kms).open(engine)
    control, *keys = stored(engine)
    mac_key = BOOTSTRAP.mac_key
    assert [row["row_mac"] for row in keys] == [_mac(mac_key, row, []) for row in keys]
    assert control["row_mac"] == _mac(mac_key, control, [row["row_mac"] for row in keys])


@pytest.mark.parametrize(
    ("row_id", "column", "value"),
    [
        (1, "epoch", 7),
        (1, "closing", "x"),
        (1, "events_hash", "x"),
        (1, "events_hash", None),
        (2, "events_hash", "x"),
        (2, "closing", "x"),
        (2, "standby_provider", "x"),
        (3, "wrapped_key", "QUFBQQ=="),
        (3, "key_check", "QUFBQQ=="),
        (3, "master_key", "transit/kravn:v2"),
        (3, "keyring", None),
        (3, "closing", ""),
        (3, "standby_wrapped_key", "x"),
        (3, "row_mac", None),
        (3, "row_mac", "QUFBQQ=="),
        (3, "row_mac", "not base64"),
    ],
)
def test_an_altered_row_stops_the_boot_before_the_kms_is_asked(
    engine: Engine, store: Any, kms: MisbehavingKMS, row_id: int, column: str, value: Any
) -> None:
    store(kms).open(engine)
    kms.calls.clear()
    # As somebody who owns the database would: they can drop constraints too.
    values = {column: value} | ({"state": "retired", "primary_of": None} if column == "keyring" else {})
    tamper(engine, row_id, **values)
    with pytest.raises((errors.RowAuthenticationError, errors.MalformedRowError)):
        store(kms).open(engine)
    assert kms.calls == {}


def test_a_row_that_was_removed_added_or_put_back_stops_the_boot(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    store().open(engine)
    old_control, old_row = stored(engine)
    store(kms).open(engine)
    genuine = stored(engine)

    def refused(rows: list[dict[str, Any]]) -> None:
        with engine.begin() as connection:
            connection.execute(delete(KEYS))
            connection.execute(insert(KEYS), rows)
        with pytest.raises(errors.RowAuthenticationError):
            store(kms).open(engine)

    refused([genuine[0], genuine[2]])
    added = genuine[1] | {"id": 4, "key_id": "00" * 8, "state": "disabled"}
    refused([genuine[0], genuine[1] | {"state": "retired"}, genuine[2], added])
    refused([genuine[0], old_row])
    refused([old_control | {"epoch": 9}, genuine[1], genuine[2]])
    with engine.begin() as connection:
        connection.execute(delete(KEYS))
        connection.execute(insert(KEYS), genuine)
    store(kms).open(engine)


def test_rows_under_another_secret_say_so(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    store(kms).open(engine)
    _write_signed(engine, os.urandom(32), stored(engine))
    with pytest.raises(errors.RowAuthenticationError, match="KRAVN_SECRET"):
        store(kms).open(engine)


def test_a_planted_key_is_refused_even_if_the_kms_would_unwrap_it(engine: Engine, store: Any) -> None:
    """What RSA-OAEP allows to whoever has the public key: a data key that they know, properly wrapped."""
    kms = MisbehavingKMS(name="azure", authenticates=False, binds=False)
    store(kms).open(engine)
    control, _, row = stored(engine)
    planted = DataKey(b"known to the attacker, 32 bytes!")
    bound = binding("default", control["deployment_id"], planted.key_id)
    nonce = bytes(12)
    blob = nonce + kms._aead.encrypt(nonce, b"known to the attacker, 32 bytes!", bound)
    values = {"key_id": planted.key_id.hex(), "wrapped_key": b64encode(blob).decode()}
    tamper(engine, row["id"], **values, key_check=b64encode(planted.check).decode())
    with pytest.raises(errors.RowAuthenticationError):
        store(kms).open(engine)


def _wrapped_mac_key(control: KeyRow, kms: MisbehavingKMS, key: bytes) -> KeyRow:
    """Return a control row that names this MAC key, wrapped as the library would wrap it."""
    bound = binding(MAC_KEYRING, control.required("deployment_id"), key_id_of(key))
    wrapped = kms.wrap(key, bound, Deadline(10))
    return replace(
        control,
        provider=kms.name,
        master_key=wrapped.master_key,
        wrapped_key=to_base64(wrapped.blob),
        key_check=key_id_of(key).hex(),
    )


def _lower_and_higher(key_id: bytes) -> tuple[bytes, bytes]:
    """Return two keys, one whose id comes before another in the alphabet, and one whose id comes after it."""
    lower = (key for number in count() if key_id_of(key := number.to_bytes(32, "big")) < key_id)
    higher = (key for number in count() if key_id_of(key := number.to_bytes(32, "big")) > key_id)
    return next(lower), next(higher)


def test_a_new_mac_key_of_the_kms_is_unwrapped_where_an_older_one_is_known(sqlite_url: str, tmp_path: Path) -> None:
    engine = create_engine(sqlite_url)
    deployment = Deployment(engine, tmp_path)
    deployment.secret_file.unlink()
    opened = deployment.open()
    assert opened.mac_key is not None
    for key in _lower_and_higher(opened.mac_key.key_id):
        rows = deployment.rows()
        rows = MacKey(key).sign(replace(rows, control=_wrapped_mac_key(rows.in_control(), deployment.kms, key)))
        again = deployment.store().reopen(rows, opened)
        assert again.mac_key is not None
        assert again.mac_key.key_id == key_id_of(key)
    engine.dispose()


def test_another_mac_key_than_was_wrapped_stops_the_boot(
    engine: Engine, store: Any, kms: MisbehavingKMS, secret_key: Path
) -> None:
    secret_key.unlink()
    store(kms).open(engine)
    recorded = bytes.fromhex(stored(engine)[0]["key_check"])
    for returned in (b"", b"x" * 31, b"x" * 33, *_lower_and_higher(recorded)):
        kms.returns = returned
        with pytest.raises(errors.WrongKeyError, match="another MAC key than was wrapped"):
            store(kms).open(engine)


@pytest.mark.parametrize("size", [31, 33])
def test_a_mac_key_of_another_length_is_refused_even_if_it_is_the_one_on_record(
    engine: Engine, store: Any, kms: MisbehavingKMS, secret_key: Path, size: int
) -> None:
    secret_key.unlink()
    opened = store(kms).open(engine)
    key = bytes(size)
    rows = MacKey(key).sign(replace(opened.rows, control=_wrapped_mac_key(opened.rows.in_control(), kms, key)))
    with pytest.raises(errors.WrongKeyError, match="another MAC key than was wrapped"):
        store(kms).checked(rows, BootstrapSecrets(None))


def test_a_mac_key_that_a_kms_wraps_for_anybody_authenticates_nothing(
    engine: Engine, store: Any, secret_key: Path
) -> None:
    """Whoever has the public key could wrap one that they know, and sign all rows with it."""
    secret_key.unlink()
    kms = MisbehavingKMS(name="azure", authenticates=False, binds=False)
    rows, _ = store(kms).provision(engine, pin_later=True)
    known = b"known to the attacker, 32 bytes!"
    planted = MacKey(known).sign(replace(rows, control=_wrapped_mac_key(rows.in_control(), kms, known)))
    with pytest.raises(errors.ProviderMismatchError, match="The key that authenticates kms_keys"):
        store(kms).checked(planted, BootstrapSecrets(None))


def test_a_mac_key_of_another_kms_or_master_key_is_refused(
    engine: Engine, store: Any, kms: MisbehavingKMS, secret_key: Path
) -> None:
    secret_key.unlink()
    rows = store(kms).open(engine).rows
    control = replace(rows.in_control(), master_key="transit/other:v1")
    kms.calls.clear()
    with pytest.raises(errors.ProviderMismatchError, match=r"under 'transit/other:v1', but the settings name 'vault'"):
        store(kms).checked(replace(rows, control=control), BootstrapSecrets(None))
    with pytest.raises(errors.ProviderMismatchError, match=r"wrapped by 'vault'.*, but the settings name 'none'"):
        store().checked(StoredRows(rows.in_control(), ()), BootstrapSecrets(None))
    assert kms.calls == {}


def test_a_process_tells_with_which_keys_it_verifies_rows(
    engine: Engine, store: Any, kms: MisbehavingKMS, secret_key: Path
) -> None:
    mine, following = MacKey(BOOTSTRAP.mac_key), MacKey(BootstrapSecret.from_secret(NEXT).mac_key)
    assert store().open(engine).mac_key_ids == {mine.key_id.hex()}
    assert store(next_secret=NEXT).open(engine).mac_key_ids == {mine.key_id.hex(), following.key_id.hex()}
    with engine.begin() as connection:
        connection.execute(delete(KEYS))
    secret_key.unlink()
    opened = store(kms).open(engine)
    wrapped = stored(engine)[0]["key_check"]
    assert opened.mac_key_ids == {wrapped}
    assert store(kms, secret=NEXT).open(engine).mac_key_ids == {wrapped, following.key_id.hex()}


# --- With neither: pinned key ids -----------------------------------------------------------------------------------


@pytest.fixture
def oaep(secret_key: Path) -> MisbehavingKMS:
    """Give a KMS that authenticates nothing, to a deployment without a secret."""
    secret_key.unlink()
    return MisbehavingKMS(name="azure", authenticates=False, binds=False)


def test_a_boot_does_not_provision_what_nothing_would_authenticate(
    engine: Engine, store: Any, oaep: MisbehavingKMS
) -> None:
    with pytest.raises(errors.NotProvisionedError, match="KRAVN_KMS_PINNED_KEYS"):
        store(oaep).open(engine)
    assert stored(engine) == []


def test_provisioned_by_hand_and_pinned_it_boots_and_without_the_pin_it_does_not(
    engine: Engine, store: Any, oaep: MisbehavingKMS
) -> None:
    rows, made = store(oaep).provision(engine, pin_later=True)
    assert made
    (key,) = rows.keys
    assert [row["row_mac"] for row in stored(engine)] == [None, None]
    assert store(oaep, pinned=frozenset({key.key_id})).open(engine).keyring.primary_key_id == key.key_id
    with pytest.raises(errors.RowAuthenticationError, match="KRAVN_KMS_PINNED_KEYS"):
        store(oaep).open(engine)
    with pytest.raises(errors.UnpinnedKeyError) as caught:
        store(oaep, pinned=frozenset({"00" * 8})).open(engine)
    assert caught.value.key_id == key.key_id


def test_a_pending_key_that_is_not_pinned_is_left_out_with_a_warning(
    engine: Engine, store: Any, oaep: MisbehavingKMS, caplog: pytest.LogCaptureFixture
) -> None:
    (key,) = store(oaep).provision(engine, pin_later=True)[0].keys
    _, row = stored(engine)
    with engine.begin() as connection:
        planted = row | {"id": 3, "key_id": "ab" * 8, "state": "pending", "primary_of": None}
        connection.execute(insert(KEYS).values(planted))
    with caplog.at_level(logging.WARNING):
        opened = store(oaep, pinned=frozenset({key.key_id})).open(engine)
    assert opened.keyring.key_ids == {key.key_id}
    assert "ab" * 8 in caplog.text


def test_a_boot_makes_no_key_that_the_pins_keep_everybody_from_loading(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    store().open(engine)
    before = stored(engine)
    (bootstrap,) = [one["key_id"] for one in before if one["provider"] == "none"]
    with pytest.raises(errors.NotProvisionedError, match="add the key id that it prints"):
        store(kms, pinned=frozenset({bootstrap})).open(engine)
    assert stored(engine) == before
    assert kms.calls == {}
    (key,) = [key for key in store(kms).provision(engine, pin_later=True)[0].keys if key.provider == "vault"]
    opened = store(kms, pinned=frozenset({key.key_id})).open(engine)
    assert opened.keyring.primary_key_id == key.key_id
    assert bootstrap in opened.keyring.key_ids


def test_pins_hold_beside_the_macs_too(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    store(kms).open(engine)
    with pytest.raises(errors.UnpinnedKeyError):
        store(kms, pinned=frozenset({"00" * 8})).open(engine)


def test_mode_none_needs_no_pin_for_the_bootstrap_key(engine: Engine, store: Any) -> None:
    primary = store().open(engine).keyring.primary_key_id
    assert store(pinned=frozenset({"00" * 8})).open(engine).keyring.primary_key_id == primary


def test_with_a_kms_a_bootstrap_key_that_became_primary_again_must_be_pinned(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    """Whoever has the secret could make it that, sign the rows, and read what is written from then on."""
    rows = store(kms).open(engine).rows
    bootstrap, wrapped = rows.keys
    changed = (bootstrap.in_state(State.PRIMARY), wrapped.in_state(State.RETIRED))
    rows = MacKey(BOOTSTRAP.mac_key).sign(replace(rows, keys=changed))
    pinned = frozenset({wrapped.required("key_id")})
    with pytest.raises(errors.UnpinnedKeyError) as caught:
        store(kms, pinned=pinned).checked(rows, BootstrapSecrets(BOOTSTRAP))
    assert caught.value.key_id == bootstrap.key_id
    pinned |= {bootstrap.required("key_id")}
    assert store(kms, pinned=pinned).checked(rows, BootstrapSecrets(BOOTSTRAP))[1] == list(rows.keys)


# --- Deployments and old data ---------------------------------------------------------------------------------------


def test_the_deployment_id_is_recorded_and_another_is_refused(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    mine = str(uuid.uuid4())
    assert store(kms, deployment_id=mine).open(engine).deployment_id == mine
    assert store(kms).open(engine).deployment_id == mine
    # One that comes before it in the alphabet, and one that comes after it.
    for other in ("00000000-0000-4000-8000-000000000000", "ffffffff-ffff-4fff-bfff-ffffffffffff"):
        with pytest.raises(errors.DeploymentMismatchError, match=other):
            store(kms, deployment_id=other).open(engine)


def _table_with(engine: Engine, frame: bytes | str | None, storage: str) -> list[EncryptedColumn]:
    table = Table("plugin", MetaData(), Column("id", Integer, primary_key=True))
    table.append_column(Column("credentials", EncryptedJSON(storage=storage)))
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO plugin (id, credentials) VALUES (1, NULL)"))
        if frame is not None:
            connection.execute(text("INSERT INTO plugin (id, credentials) VALUES (2, :frame)"), {"frame": frame})
    return [EncryptedColumn(table.c.credentials, storage)]


@pytest.mark.parametrize("which", [0, 1], ids=["lower id", "higher id"])
def test_no_fresh_key_is_made_over_values_under_a_lost_one(
    engine: Engine, store: Any, kms: MisbehavingKMS, which: int
) -> None:
    lost = Keyring(DataKey(_lower_and_higher(DataKey(BOOTSTRAP.data_key).key_id)[which]))
    columns = _table_with(engine, lost.encrypt(b"\x01{}", NAME), BINARY)
    with pytest.raises(errors.ExistingDataError, match=rf"plugin\.credentials.*{lost.primary_key_id}"):
        store(kms).open(engine, columns)
    assert stored(engine) == []
    assert kms.calls == {}
    store(kms).provision(engine, columns, look_for_data=False)
    assert states(engine)[-1] == ("vault", "primary")


def test_a_column_without_values_keeps_nobody_from_looking_into_the_next(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    lost = Keyring(DataKey.generate())
    columns = _table_with(engine, lost.encrypt(b"\x01{}", NAME), BINARY)
    empty = Table("empty", MetaData(), Column("id", Integer, primary_key=True), Column("secret", EncryptedJSON))
    empty.create(engine)
    with pytest.raises(errors.ExistingDataError, match=rf"plugin\.credentials.*{lost.primary_key_id}"):
        store(kms).open(engine, [EncryptedColumn(empty.c.secret, BINARY), *columns])
    assert stored(engine) == []


def test_no_fresh_key_is_made_over_plaintext(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    columns = _table_with(engine, '{"token": "MARKER"}', TEXT)
    with pytest.raises(errors.ExistingDataError, match="not encrypted") as caught:
        store(kms).open(engine, columns)
    assert "MARKER" not in "".join(traceback.format_exception(caught.value))


def test_a_first_boot_that_knows_of_no_encrypted_column_says_so(
    engine: Engine, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store().open(engine)
    assert "import the models before" in caplog.text
    caplog.clear()
    store().open(engine)
    assert caplog.text == ""


def test_values_under_the_bootstrap_key_and_empty_columns_do_not_stop_it(
    engine: Engine, store: Any, kms: MisbehavingKMS
) -> None:
    key = DataKey(BOOTSTRAP.data_key)
    frame = Keyring(key).encrypt(b"\x01{}", NAME)
    columns = _table_with(engine, frame, BINARY)
    missing_table = Table("nowhere", MetaData(), Column("x", EncryptedJSON))
    missing_column = Table("plugin", MetaData(), Column("added_later", EncryptedJSON))
    columns += [EncryptedColumn(table.c[0], BINARY) for table in (missing_table, missing_column)]
    assert store(kms).open(engine, columns).keyring.decrypt(frame, NAME) == b"\x01{}"


# --- The database ---------------------------------------------------------------------------------------------------


def test_a_missing_table_says_what_to_run(database_url: str, store: Any) -> None:
    engine = create_engine(database_url)
    with pytest.raises(errors.TableMissingError, match="kravn-crypto migrate") as caught:
        store().open(engine)
    assert caught.value.__context__ is None
    engine.dispose()


@pytest.mark.parametrize("driver", ["synchronous", "asynchronous"])
def test_the_lock_is_waited_for_with_a_bound(engine: Engine, store: Any, kms: MisbehavingKMS, driver: str) -> None:
    def boot(waiting: Engine) -> None:
        store(MisbehavingKMS(), timeout=0.2).open(waiting)

    async def boot_asynchronously() -> None:
        waiting = create_async_engine(asynchronous(engine.url.render_as_string(hide_password=False)))
        try:
            await greenlet_spawn(boot, waiting.sync_engine)
        finally:
            await waiting.dispose()

    kms.slow = answers = threading.Event()
    first = threading.Thread(target=lambda: store(kms).open(engine))
    first.start()
    while not kms.calls["wrap"]:
        first.join(0.01)
    with pytest.raises(errors.KeyStoreLockedError, match=r"more than 0\.8 seconds"):
        boot(engine) if driver == "synchronous" else asyncio.run(boot_asynchronously())
    answers.set()
    first.join()
    assert states(engine)[-1] == ("vault", "primary")


def boot_at_once(key_store: KeyStore, engine: Engine, count: int) -> list[str]:
    """Open the key store in several threads and return the key id that each found."""
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(key_store.open(engine).keyring.primary_key_id))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_that_start_at_once_wrap_once(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    found = boot_at_once(store(kms), engine, 6)
    assert len(found) == 6
    assert len(set(found)) == 1
    assert kms.calls["wrap"] == 1


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE"])
def test_the_engines_isolation_level_does_not_matter(database_url: str, store: Any, level: str) -> None:
    engine = create_engine(database_url, isolation_level=level)
    TABLES.keys.metadata.create_all(engine)
    kms = MisbehavingKMS()
    found = boot_at_once(store(kms), engine, 4)
    assert len(found) == 4
    assert kms.calls["wrap"] == 1
    kms.down = True
    with pytest.raises(errors.ProviderUnavailableError):
        store(kms).open(engine)
    engine.dispose()


def test_a_failed_boot_writes_nothing_even_where_the_engine_commits_by_itself(database_url: str, store: Any) -> None:
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT")
    TABLES.keys.metadata.create_all(engine)
    kms = MisbehavingKMS()
    kms.down = True
    with pytest.raises(errors.ProviderUnavailableError):
        store(kms).open(engine)
    assert stored(engine) == []
    engine.dispose()


def test_a_listener_that_begins_transactions_itself_is_no_obstacle(sqlite_url: str, store: Any) -> None:
    """What SQLAlchemy's documentation recommends for SQLite's transactional DDL."""
    engine = create_engine(sqlite_url)
    event.listen(engine, "connect", lambda connection, _record: setattr(connection, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    TABLES.keys.metadata.create_all(engine)
    kms = MisbehavingKMS()
    store(kms).open(engine)
    store(kms).open(engine)
    assert kms.calls["wrap"] == 1
    engine.dispose()


def test_a_schema_translate_map_moves_none_of_our_tables(database_url: str, store: Any) -> None:
    engine = create_engine(database_url)
    TABLES.keys.metadata.create_all(engine)
    tenant = engine.execution_options(schema_translate_map={None: "tenant_1"})
    first = store().open(tenant).keyring.primary_key_id
    assert store().open(engine).keyring.primary_key_id == first
    engine.dispose()


def test_a_read_only_database_serves(postgres_url: str, store: Any, kms: MisbehavingKMS) -> None:
    engine = create_engine(postgres_url)
    TABLES.keys.metadata.create_all(engine)
    store(kms).open(engine)
    read_only = create_engine(postgres_url, connect_args={"options": "-c default_transaction_read_only=on"})
    assert store(kms).open(read_only).keyring.primary_key_id == stored(engine)[2]["key_id"]
    engine.dispose()
    read_only.dispose()


def test_a_table_of_keys_without_control_row_is_refused(engine: Engine, store: Any) -> None:
    store().open(engine)
    with engine.begin() as connection:
        connection.execute(delete(KEYS).where(KEYS.c.id == 1))
    with pytest.raises(errors.MalformedRowError, match="control row"):
        store().open(engine)


def test_a_state_that_this_release_does_not_know_is_refused(sqlite_url: str, store: Any) -> None:
    engine = create_engine(sqlite_url)
    TABLES.keys.metadata.create_all(engine)
    store().open(engine)
    with engine.begin() as connection:
        connection.execute(text("PRAGMA ignore_check_constraints = ON"))
        connection.execute(text("UPDATE kms_keys SET state = 'frozen', primary_of = NULL WHERE id = 2"))
    with pytest.raises(errors.MalformedRowError, match="Upgrade"):
        store().open(engine)
    engine.dispose()


def test_text_that_is_no_utf8_is_refused(sqlite_url: str, store: Any) -> None:
    """SQLite keeps it, and its driver does not return it."""
    engine = create_engine(sqlite_url)
    TABLES.keys.metadata.create_all(engine)
    store().open(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE kms_keys SET master_key = CAST(x'ff' AS TEXT) WHERE id = 2"))
    with pytest.raises(errors.MalformedRowError, match="text in kms_keys") as caught:
        store().open(engine)
    assert caught.value.__context__ is None
    engine.dispose()


def test_a_database_whose_locks_are_not_known_is_refused(engine: Engine, store: Any) -> None:
    engine.dialect.name = "somedb"
    with pytest.raises(errors.UnsupportedDatabaseError, match="somedb"):
        store().open(engine)


def test_at_most_one_key_is_primary_on_every_database(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    store(kms).open(engine)
    with pytest.raises(Exception, match=r"(?i)unique"):
        tamper(engine, 2, state="primary", primary_of="default")
    with pytest.raises(Exception, match=r"(?i)check"):
        tamper(engine, 2, state="primary", primary_of=None)
    with engine.connect() as connection:
        assert connection.scalar(select(func.count()).where(KEYS.c.primary_of.is_not(None))) == 1
    assert inspect(engine).has_table("kms_keys")


# --- What is never shown --------------------------------------------------------------------------------------------


def test_neither_representation_nor_log_shows_a_secret(
    engine: Engine, store: Any, kms: MisbehavingKMS, caplog: pytest.LogCaptureFixture
) -> None:
    key_store = store(kms, secret=SECRET, next_secret=NEXT, retired_secrets=(RETIRED,))
    with caplog.at_level(logging.DEBUG):
        opened = key_store.open(engine)
    secret = BootstrapSecret.from_secret(SECRET)
    shown = caplog.text + repr(key_store) + repr(opened) + str(opened)
    assert "rows=" not in shown
    assert "secrets=" not in shown
    for hidden in (SECRET, NEXT, RETIRED, secret.data_key, secret.mac_key):
        raw = hidden.encode() if isinstance(hidden, str) else hidden
        for form in (str(hidden), repr(hidden), raw.hex(), b64encode(raw).decode()):
            assert form not in shown


def test_nothing_that_holds_a_secret_can_be_pickled_or_copied(engine: Engine, store: Any, kms: MisbehavingKMS) -> None:
    key_store = store(kms)
    for held in (key_store, key_store.open(engine).keyring, BOOTSTRAP, MacKey(BOOTSTRAP.mac_key), kms):
        for operation in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled or copied"):
                operation(held)


def test_what_a_process_was_started_with_cannot_be_changed_or_listed(engine: Engine, store: Any) -> None:
    key_store = store()
    for held in (key_store, key_store.open(engine)):
        with pytest.raises(FrozenInstanceError):
            held.deployment_id = None
        with pytest.raises(TypeError, match="vars"):
            vars(held)
    positional: Any = KeyStore
    with pytest.raises(TypeError, match="positional"):
        positional(None, SECRET, key_store.secret_file)


def test_a_kms_operation_is_bounded_as_the_settings_say_by_default(store: Any) -> None:
    assert store().timeout == Settings.model_fields["kms_timeout"].default


# --- Opening it again -----------------------------------------------------------------------------------------------

NEXT = "the next secret, with as many characters as it takes"
RETIRED = "the secret of last year, which decrypts what is old"
NEXT_KEY_ID = DataKey(BootstrapSecret.from_secret(NEXT).data_key).key_id.hex()


def test_only_what_is_new_is_unwrapped_when_it_is_opened_again(running: Deployment) -> None:
    opened = running.open()
    made = rotate(running.operator())
    assert made is not None
    calls, blocked = running.kms.calls.copy(), Blocked()
    again = running.store().reopen(running.rows(), opened, blocking=blocked)
    assert running.kms.calls - calls == {"unwrap": 1}
    assert blocked.calls == 1
    assert again.keyring.key_ids == opened.keyring.key_ids | {made.key_id}
    assert again.keyring.primary_key_id == opened.keyring.primary_key_id
    assert (again.missing, again.rows, again.secrets) == (frozenset(), running.rows(), opened.secrets)
    promote(running.operator())
    calls = running.kms.calls.copy()
    assert running.store().reopen(running.rows(), again).keyring.primary_key_id == made.key_id
    assert running.kms.calls == calls


def test_a_wrapped_mac_key_is_not_unwrapped_again(deployment: Deployment) -> None:
    deployment.secret_file.unlink()
    opened = deployment.open()
    rotate(deployment.operator())
    calls = deployment.kms.calls.copy()
    deployment.store().reopen(deployment.rows(), opened)
    assert deployment.kms.calls - calls == {"unwrap": 1}


@pytest.mark.parametrize("switch", ["down", "sealed", "denies", "returns_another_key"])
def test_a_pending_key_that_is_not_to_be_had_now_is_missing(
    running: Deployment, caplog: pytest.LogCaptureFixture, switch: str
) -> None:
    opened = running.open()
    made = rotate(running.operator())
    assert made is not None
    setattr(running.kms, switch, True)
    again = running.store().reopen(running.rows(), opened)
    assert again.missing == {made.key_id}
    assert again.keyring.key_ids == opened.keyring.key_ids
    assert f"pending data key {made.key_id} cannot be loaded yet" in caplog.text
    # A process that starts now needs it: it will be asked for it as soon as the key is promoted.
    with pytest.raises((errors.ProviderError, errors.WrongKeyError)):
        running.open()
    setattr(running.kms, switch, False)
    assert running.store().reopen(running.rows(), again).keyring.key_ids == running.states().keys()


def test_a_closing_primarys_successor_is_needed_like_the_primary(running: Deployment) -> None:
    opened = running.open()
    made = rotate(running.operator())
    assert made is not None
    with changing(running.operator()) as change:
        change.save(change.rows.with_key(replace(made, closing=opened.keyring.primary_key_id)), "test")
    running.kms.down = True
    with pytest.raises(errors.ProviderUnavailableError):
        running.store().reopen(running.rows(), opened)
    running.kms.down = False
    assert running.store().reopen(running.rows(), opened).keyring.primary_key_id == made.key_id


def test_a_retired_key_that_came_back_is_needed(running: Deployment) -> None:
    first = running.key_id(State.PRIMARY)
    rotate(running.operator())
    promote(running.operator())
    with changing(running.operator()) as change:
        change.save(change.rows.with_key(running.row(first).in_state(State.DISABLED)), "test")
    opened = running.open()
    assert first not in opened.keyring.key_ids
    enable(running.operator(), first)
    running.kms.down = True
    with pytest.raises(errors.ProviderUnavailableError):
        running.store().reopen(running.rows(), opened)


def test_a_pending_key_is_not_taken_for_a_primary_that_is_missing(running: Deployment) -> None:
    opened = running.open()
    rotate(running.operator())
    rows = running.rows()
    keys = [row.in_state(State.RETIRED) if row.state is State.PRIMARY else row for row in rows.keys]
    rows = MacKey(BOOTSTRAP.mac_key).sign(replace(rows, keys=tuple(keys)))
    with pytest.raises(errors.MalformedRowError, match="No data key in kms_keys is primary"):
        running.store().reopen(rows, opened)


def test_each_state_of_a_key_means_what_it_says(running: Deployment) -> None:
    made = [running.key_id(State.PRIMARY)]
    for _ in range(3):
        rotate(running.operator())
        promote(running.operator())
        made.append(running.key_id(State.PRIMARY))
    frames = [Keyring(key).encrypt(b"\x01{}", NAME) for one in made if (key := running.open().keyring.data_key(one))]
    with changing(running.operator()) as change:
        rows = change.rows.with_key(running.row(made[0]).in_state(State.DESTROYED))
        change.save(rows.with_key(running.row(made[1]).in_state(State.DISABLED)), "test")
    keyring = running.open().keyring
    with pytest.raises(errors.DestroyedKeyError):
        keyring.decrypt(frames[0], NAME)
    with pytest.raises(errors.DisabledKeyError):
        keyring.decrypt(frames[1], NAME)
    assert [keyring.decrypt(frame, NAME) for frame in frames[2:]] == [b"\x01{}", b"\x01{}"]
    primary, others = keyring.verifying(accept_bootstrap=True)
    assert primary.key_id.hex() == made[3]
    # The newest first.
    assert [key.key_id.hex() for key in others] == [made[2], DataKey(BOOTSTRAP.data_key).key_id.hex()]


def test_a_key_store_that_went_back_is_refused(running: Deployment) -> None:
    old = running.rows()
    rotate(running.operator())
    opened = running.open()
    with pytest.raises(errors.KeyStoreRolledBackError, match=rf"from epoch {old.epoch + 1} to {old.epoch}") as caught:
        running.store().reopen(old, opened)
    assert "bring back the newest kms_keys" in str(caught.value)
    assert running.store().reopen(running.rows(), opened).keyring.key_ids == opened.keyring.key_ids


def test_rows_that_somebody_else_wrote_are_not_opened_again(running: Deployment) -> None:
    opened = running.open()
    planted = replace(running.rows().keys[-1], id=9, key_id="ab" * 8, state=State.PENDING, primary_of=None)
    rows = running.rows().with_key(planted)
    calls = running.kms.calls.copy()
    with pytest.raises(errors.RowAuthenticationError):
        running.store().reopen(rows, opened)
    with pytest.raises(errors.RowAuthenticationError):
        running.store().reopen(replace(rows, control=replace(rows.in_control(), epoch=99)), opened)
    assert running.kms.calls == calls


def test_another_deployment_or_kms_is_refused_when_it_is_opened_again(running: Deployment) -> None:
    opened = running.open()
    with pytest.raises(errors.DeploymentMismatchError):
        running.store(deployment_id=str(uuid.uuid4())).reopen(running.rows(), opened)
    with pytest.raises(errors.ProviderMismatchError):
        running.store(provider=MisbehavingKMS(name="azure")).reopen(running.rows(), opened)


def test_an_unpinned_pending_key_is_not_held(running: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    opened = running.open()
    made = rotate(running.operator())
    assert made is not None
    pinned = running.store(pinned=frozenset({running.key_id(State.PRIMARY)}))
    assert made.key_id not in pinned.reopen(running.rows(), opened).keyring.key_ids
    assert f"pending data key {made.key_id} is not in KRAVN_KMS_PINNED_KEYS" in caplog.text


# --- Adoption beside processes that live ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_alive", [True, False])
def test_beside_a_live_process_an_adopted_key_is_pending(deployment: Deployment, is_alive: bool) -> None:  # noqa: FBT001 - a parameter
    bootstrap = deployment.open(provider=None).keyring.primary_key_id
    deployment.heartbeat(holds={bootstrap}, under=bootstrap, lease=60, age=0 if is_alive else 100)
    opened = deployment.open()
    adopted = next(one for one in deployment.states() if one != bootstrap)
    assert deployment.states() == (
        {bootstrap: State.PRIMARY, adopted: State.PENDING}
        if is_alive
        else {bootstrap: State.RETIRED, adopted: State.PRIMARY}
    )
    assert opened.keyring.key_ids == {bootstrap, adopted}
    assert opened.keyring.primary_key_id == (bootstrap if is_alive else adopted)
    event = deployment.events()[-1]
    assert (event.action, event.key_id) == ("adopt", adopted)
    assert event.details["retired"] == (None if is_alive else bootstrap)
    deployment.open()  # a second process with the KMS makes none of its own
    assert len(deployment.states()) == 2


# --- More than one secret ---------------------------------------------------------------------------------------------


def test_the_next_secret_verifies_and_a_retired_one_only_decrypts(sqlite_deployment: Deployment) -> None:
    deployment = sqlite_deployment
    secrets = deployment.store(next_secret=NEXT).secrets(deployment.rows())
    following = BootstrapSecret.from_secret(NEXT)
    assert secrets.current == BOOTSTRAP
    assert secrets.next == following
    assert (secrets.verifying, secrets.all) == ((BOOTSTRAP, following), (BOOTSTRAP, following))
    secrets = deployment.store(retired_secrets=(NEXT,)).secrets(deployment.rows())
    assert (secrets.verifying, secrets.all) == ((BOOTSTRAP,), (BOOTSTRAP, following))
    # The file is read beside a secret as long as a row says that a key came from it.
    secrets = deployment.store(secret=NEXT).secrets(deployment.rows())
    assert (secrets.current, secrets.retired) == (following, (BOOTSTRAP,))


def test_the_file_is_not_read_beside_a_secret_unless_a_key_came_from_it(engine: Engine, store: Any) -> None:
    current = BootstrapSecrets(BootstrapSecret.from_secret(SECRET))
    opened = store(secret=SECRET).open(engine)
    assert store(secret=SECRET).secrets(opened.rows) == current
    # What a KMS calls a master key is its own affair.
    for name in ("azure", "vault"):
        (row,) = opened.rows.keys
        rows = replace(opened.rows, keys=(replace(row, provider=name, master_key="file"),))
        assert store(secret=SECRET).secrets(rows) == current


# --- A standby --------------------------------------------------------------------------------------------------------


def test_a_boot_uses_the_wrap_that_matches_its_settings(running: Deployment) -> None:
    standby = VersionedKMS("azure", mount="elsewhere")
    add_standby(running.operator(standby=standby))
    held, calls = running.open().keyring.key_ids, running.kms.calls.copy()
    asked = standby.calls["unwrap"]
    assert running.open(provider=standby).keyring.key_ids == held
    assert standby.calls["unwrap"] == asked + 1
    assert running.kms.calls == calls
    with pytest.raises(errors.ProviderMismatchError, match=r"'vault' under master key 'transit/kravn:v1'"):
        running.open(provider=VersionedKMS("azure", mount="third"))
    standby.returns = b"x" * 32
    with pytest.raises(errors.WrongKeyError):
        running.open(provider=standby)
