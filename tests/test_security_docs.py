"""SECURITY.md, docs/threat-model.md, docs/fips.md: what they name exists. What nothing stops by them is done here."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Table, delete, insert, select, text

from sqlalchemy_kravn_crypto import exceptions
from sqlalchemy_kravn_crypto.bootstrap import PBKDF2_ITERATIONS
from sqlalchemy_kravn_crypto.keyring import DataKey
from sqlalchemy_kravn_crypto.known_columns import declared, record
from sqlalchemy_kravn_crypto.lifecycle import disable, promote, rotate
from sqlalchemy_kravn_crypto.lifecycle.retirement import Targets
from sqlalchemy_kravn_crypto.rows import MacKey, StoredRows, write_rows
from sqlalchemy_kravn_crypto.schema import TABLES, State
from sqlalchemy_kravn_crypto.settings import known_variables
from tests.fixtures_deployment import BOOTSTRAP, LEASE, METADATA, NAME, Deployment

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sqlalchemy_kravn_crypto"
PAGES = [ROOT / "SECURITY.md", ROOT / "docs" / "threat-model.md", ROOT / "docs" / "fips.md"]
FIPS = PAGES[2]
CRYPTOGRAPHY = {"cryptography", "hashlib", "hmac"}

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# --- What is named exists --------------------------------------------------------------------------------------------


def names_of_tests(module: str) -> set[str]:
    tree = ast.parse(read(ROOT / "tests" / module))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", "".join(map(read, PAGES))))
    assert len({module for module, _ in named}) > 10
    found = {module: names_of_tests(module) for module, _ in named}
    assert [(module, name) for module, name in sorted(named) if name not in found[module]] == []


@each_page
def test_a_test_is_named_with_its_module(path: Path) -> None:
    """Else the test above would pass it over."""
    mentioned = re.findall(r"(?<!\w)(?:test_\w+\.py::)?test_\w+(?!\w|\.py)", read(path))
    assert [name for name in mentioned if "::" not in name] == []


@each_page
def test_every_module_that_is_named_exists(path: Path) -> None:
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", read(path)):
        assert any((place / name).is_file() for place in (ROOT, PACKAGE, ROOT / "tests")), name


@each_page
def test_every_error_and_setting_that_is_named_exists(path: Path) -> None:
    assert all(hasattr(exceptions, name) for name in re.findall(r"`(\w+Error)`", read(path)))
    named = re.findall(r"\bKRAVN_[A-Z_]*[A-Z]\b", read(path))
    assert set(named) <= set(known_variables())


def anchors(path: Path) -> set[str]:
    """Return the names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.*)$", read(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_to_a_page_and_a_heading_of_it(path: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", read(path))
    assert links
    for file, heading in links:
        target = path.parent / file if file else path
        assert target.exists(), file
        assert not heading or heading in anchors(target), heading


# --- Primitives ------------------------------------------------------------------------------------------------------


def primitives(path: Path) -> set[str]:
    """Return what a module takes from libraries of cryptography."""
    found = set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in CRYPTOGRAPHY:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & {*CRYPTOGRAPHY, "random"}
    return found


def test_the_package_uses_the_primitives_of_the_page_and_no_others() -> None:
    used: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        # Without errors, and what takes an algorithm and a mode.
        for name in primitives(path) - {"InvalidTag", "UnsupportedAlgorithm", "Cipher"}:
            used.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", read(FIPS), flags=re.MULTILINE)
    assert used == {name: set(re.findall(r"`([\w/]+\.py)`", where)) for name, where in rows}


def test_the_parameters_on_the_page_are_those_of_the_code() -> None:
    assert f"{PBKDF2_ITERATIONS:,} iterations" in read(FIPS)


# --- What nothing stops ----------------------------------------------------------------------------------------------


def content(deployment: Deployment, number: int) -> bytes:
    statement = text("SELECT content FROM deployed_note WHERE id = :id")
    with deployment.engine.connect() as connection:
        return bytes(connection.execute(statement, {"id": number}).scalar_one())


def snapshot(deployment: Deployment, *tables: Table) -> dict[Table, list[dict[str, Any]]]:
    with deployment.engine.connect() as connection:
        return {table: [dict(row) for row in connection.execute(select(table)).mappings()] for table in tables}


def put_back(deployment: Deployment, before: dict[Table, list[dict[str, Any]]]) -> None:
    with deployment.engine.begin() as connection:
        for table, rows in before.items():
            connection.execute(delete(table))
            connection.execute(insert(table), rows)


def rotated(deployment: Deployment) -> str:
    """Rotate, and return the key id of the new primary."""
    rotate(deployment.operator())
    promote(deployment.operator(), force=True)
    return deployment.key_id(State.PRIMARY)


def test_an_old_value_that_is_put_back_into_its_row_is_read(sqlite_deployment: Deployment) -> None:
    keyring = sqlite_deployment.open().keyring
    sqlite_deployment.put(1, keyring)
    old = content(sqlite_deployment, 1)
    statement = text("UPDATE deployed_note SET content = :content WHERE id = 1")
    for frame in (keyring.encrypt(b'\x01{"number":2}', NAME), old):
        with sqlite_deployment.engine.begin() as connection:
            connection.execute(statement, {"content": frame})
    assert keyring.decrypt(content(sqlite_deployment, 1), NAME) == b'\x01{"number":1}'


def test_key_tables_that_are_put_back_as_a_whole_are_opened_by_a_new_process(sqlite_deployment: Deployment) -> None:
    old_primary = sqlite_deployment.key_id(State.PRIMARY)
    before = snapshot(sqlite_deployment, TABLES.keys, TABLES.events)
    new_primary = rotated(sqlite_deployment)
    assert sqlite_deployment.open().keyring.primary_key_id == new_primary
    put_back(sqlite_deployment, before)
    assert sqlite_deployment.open().keyring.primary_key_id == old_primary
    assert sqlite_deployment.actions() == ["provision"]  # and its trail is whole


def signed_by_somebody_with_the_secret(deployment: Deployment) -> tuple[StoredRows, StoredRows]:
    before = deployment.rows()
    after = before
    for row in before.keys:
        state = State.PRIMARY if row.provider == "none" else State.RETIRED
        after = after.with_key(row.in_state(state))
    return before, MacKey(BOOTSTRAP.mac_key).sign(after)


def test_who_has_the_secret_and_writes_the_database_makes_the_bootstrap_key_the_primary(
    sqlite_deployment: Deployment,
) -> None:
    before, after = signed_by_somebody_with_the_secret(sqlite_deployment)
    with sqlite_deployment.engine.begin() as connection:
        write_rows(connection, before, after)
    pins = frozenset(row.required("key_id") for row in before.keys if row.provider != "none")
    opened = sqlite_deployment.open()
    assert opened.keyring.primary_key_id == DataKey(BOOTSTRAP.data_key).key_id.hex()
    with pytest.raises(exceptions.UnpinnedKeyError, match="primary"):
        sqlite_deployment.open(pinned=pins)


def test_a_secret_that_is_set_beside_a_wrapped_mac_key_signs_if_that_is_taken_away(
    sqlite_deployment: Deployment,
) -> None:
    """Which takes the secret, write access, and processes that have the secret without a need."""
    root = sqlite_deployment.secret_file.read_text()
    sqlite_deployment.secret_file.unlink()
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(delete(TABLES.keys))
        connection.execute(delete(TABLES.events))
    sqlite_deployment.open()
    before = sqlite_deployment.rows()
    bare = replace(before.in_control(), provider=None, master_key=None, wrapped_key=None, key_check=None)
    with sqlite_deployment.engine.begin() as connection:
        write_rows(connection, before, MacKey(BOOTSTRAP.mac_key).sign(replace(before, control=bare)))
    with pytest.raises(exceptions.RowAuthenticationError):
        sqlite_deployment.open()
    sqlite_deployment.secret_file.write_text(root)
    sqlite_deployment.secret_file.chmod(0o600)
    sqlite_deployment.open()


def test_pins_alone_authenticate_key_ids_and_nothing_else(sqlite_deployment: Deployment) -> None:
    sqlite_deployment.secret_file.unlink()
    sqlite_deployment.kms.authenticates = False
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(delete(TABLES.keys))
    store = sqlite_deployment.store()
    (key,) = store.provision(sqlite_deployment.engine, pin_later=True)[0].keys
    sqlite_deployment.tamper(1, epoch=77)
    opened = sqlite_deployment.open(pinned=frozenset({key.required("key_id")}))
    assert opened.rows.epoch == 77


def test_a_column_that_is_taken_off_the_record_is_counted_only_if_the_models_name_it(
    sqlite_deployment: Deployment,
) -> None:
    old = sqlite_deployment.key_id(State.PRIMARY)
    rotated(sqlite_deployment)
    sqlite_deployment.put_under(1, old)
    with sqlite_deployment.engine.begin() as connection:
        record(connection, declared(METADATA))
        connection.execute(delete(TABLES.columns))
    operator = sqlite_deployment.operator()
    sqlite_deployment.let_pass(LEASE + 2)
    with pytest.raises(exceptions.KeyInUseError):
        disable(operator, old, targets=Targets(METADATA), sleep=lambda _: None)
    with pytest.raises(exceptions.TooEarlyError, match="a second count"):  # the first has found nothing
        disable(operator, old, wait=False)


def test_the_heartbeat_of_somebody_else_is_believed(sqlite_deployment: Deployment) -> None:
    old = sqlite_deployment.key_id(State.PRIMARY)
    rotate(sqlite_deployment.operator())
    sqlite_deployment.heartbeat(holds=[old], under=old)
    with pytest.raises(exceptions.ReplicasBehindError):
        promote(sqlite_deployment.operator())
    with sqlite_deployment.engine.begin() as connection:
        connection.execute(delete(TABLES.replicas))
    promote(sqlite_deployment.operator())
    assert sqlite_deployment.key_id(State.PRIMARY) != old
