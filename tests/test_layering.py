"""The parts import downwards only, and importing the package brings in nothing that a process may not need."""

import ast
import re
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "sqlalchemy_kravn_crypto"
PACKAGE = "sqlalchemy_kravn_crypto"

RUNGS = {
    "base64_text.py": 0,
    "compiled_statements.py": 0,
    "derivation.py": 0,
    "probes.py": 0,
    "providers/fork_gate.py": 0,
    "providers/pkcs11_worker.py": 0,
    "exceptions.py": 0,
    "secrecy.py": 0,
    "aead.py": 1,
    "bootstrap.py": 1,
    "ciphertext.py": 1,
    "clock.py": 1,
    "codecs/base.py": 1,
    "comparator.py": 1,
    "mutable.py": 1,
    "provider_settings.py": 1,
    "providers/base.py": 1,
    "providers/credentials.py": 1,
    "providers/extras.py": 1,
    "providers/proxy.py": 1,
    "row_identity.py": 1,
    "schema.py": 1,
    "transactions.py": 1,
    "codecs/documents.py": 2,
    "codecs/scalars.py": 2,
    "columns.py": 2,
    "keyring.py": 2,
    "providers/bounded_process.py": 2,
    "providers/discovery.py": 2,
    "providers/findings.py": 2,
    "providers/transport.py": 2,
    "row_binding.py": 2,
    "rows.py": 2,
    "codecs/objects.py": 3,
    "codecs/selection.py": 3,
    "bound_objects.py": 3,
    "context.py": 3,
    "declarations.py": 3,
    "events.py": 3,
    "providers/inspection.py": 3,
    "providers/jwt.py": 3,
    "providers/pkcs11_meanings.py": 3,
    "replicas.py": 3,
    "wrapping.py": 3,
    "drivers.py": 4,
    "keystore.py": 4,
    "providers/aws_login.py": 4,
    "providers/azure_login.py": 4,
    "providers/gcp_login.py": 4,
    "providers/pkcs11.py": 4,
    "providers/vault_login.py": 4,
    "signing.py": 4,
    "types.py": 4,
    "key_ranges.py": 4,
    "binary_results.py": 5,
    "bulk_update.py": 5,
    "changes.py": 5,
    "ciphertext_checks.py": 5,
    "known_columns.py": 5,
    "providers/aws_examination.py": 5,
    "providers/azure_examination.py": 5,
    "providers/gcp_examination.py": 5,
    "providers/vault_examination.py": 5,
    "migrate.py": 5,
    "settings.py": 5,
    "statements.py": 5,
    "alembic_plugin.py": 6,
    "census.py": 6,
    "guards.py": 6,
    "ledger.py": 6,
    "stale_values.py": 6,
    "promotion.py": 6,
    "providers/aws.py": 6,
    "providers/azure.py": 6,
    "providers/gcp.py": 6,
    "providers/vault.py": 6,
    "lifecycle/rewrapping.py": 7,
    "lifecycle/rotation.py": 7,
    "rekey_worker.py": 7,
    "rekey.py": 8,
    "watch.py": 7,
    "configuration.py": 8,
    "following.py": 8,
    "lifecycle/retirement.py": 8,
    "lifecycle/evidence.py": 9,
    "lifecycle/rekeying.py": 9,
    "boot.py": 10,
    "conformance.py": 10,
    "status.py": 10,
    "commands/output.py": 10,
    "commands/options.py": 11,
    "commands/progress.py": 11,
    "commands/running.py": 11,
    "database_checks.py": 11,
    "demo.py": 11,
    "testing.py": 11,
    "commands/keys.py": 12,
    "commands/reports.py": 12,
    "commands/setup.py": 12,
    "commands/standby.py": 13,
    "commands/values.py": 12,
    "doctor.py": 12,
    "commands/doctor.py": 13,
    "cli.py": 14,
}
FACADES = {
    "__init__.py",
    "__main__.py",
    "codecs/__init__.py",
    "commands/__init__.py",
    "lifecycle/__init__.py",
    "providers/__init__.py",
}
"""What only passes on names of others. They may import any module, and no module imports them."""

NEVER_AT_IMPORT = {
    "alembic",
    "azure",
    "botocore",
    "google",
    "grpc",
    "hvac",
    "pkcs11",
    "pydantic",
    "pydantic_settings",
    "pytest",
    "requests",
    "rich",
    "typer",
}


def module_name(file: str) -> str:
    """Return the dotted name of a file of the package."""
    return f"{PACKAGE}.{file.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")


FILES = {module_name(file): file for file in {*RUNGS, *FACADES}}


def own_imports(file: str) -> set[str]:
    """Return the files of the package that a file imports, inside of functions and for the type checker, too."""
    imported: set[str] = set()
    parent = module_name(f"{file.rpartition('/')[0]}/__init__.py".lstrip("/"))
    for node in ast.walk(ast.parse((SOURCE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), parent)
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            imported.update(submodules & FILES.keys())
            if not submodules <= FILES.keys():
                imported.add(module)
    return {FILES.get(name, name) for name in imported if name.split(".")[0] == PACKAGE}


def test_every_module_has_a_rung() -> None:
    assert {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")} == {*RUNGS, *FACADES}


@pytest.mark.parametrize("file", RUNGS)
def test_imports_only_from_lower_rungs(file: str) -> None:
    assert {name for name in own_imports(file) if name not in RUNGS or RUNGS[name] >= RUNGS[file]} == set()


def test_sees_every_way_to_import() -> None:
    assert own_imports("__init__.py") >= {"boot.py", "exceptions.py"}
    assert own_imports("cli.py") >= {"commands/keys.py", "commands/running.py"}
    assert own_imports("commands/setup.py") >= {"boot.py", "demo.py", "exceptions.py"}
    assert own_imports("providers/vault.py") >= {"exceptions.py", "providers/base.py"}


def test_architecture_page_has_the_same_rungs() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    documented: dict[str, int] = {}
    for rung, files in re.findall(r"^\| *(\d+) *\|([^|]*)\|", page, flags=re.MULTILINE):
        for file in re.findall(r"`([\w/]+\.py)`", files):
            assert file not in documented, f"{file} has two rungs"
            documented[file] = int(rung)
    assert documented == RUNGS


def modules_after(statement: str) -> list[str]:
    """Return the modules that a new process has loaded once it has executed a statement."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()


def test_importing_the_package_imports_no_more_than_it_needs() -> None:
    imported = {name.partition(".")[0] for name in modules_after(f"import {PACKAGE}")}
    assert PACKAGE in imported
    assert NEVER_AT_IMPORT.isdisjoint(imported)


def test_importing_the_package_imports_the_dialect_of_no_database() -> None:
    modules = modules_after(f"import sqlalchemy.orm, {PACKAGE}")
    assert f"{PACKAGE}.known_columns" in modules
    assert not [name for name in modules if name.startswith("sqlalchemy.dialects.")]
