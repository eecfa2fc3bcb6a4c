"""What the package depends on, what it is built into, and whether that can be built again."""

import json
import os
import re
import shutil
import subprocess
import tarfile
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from zipfile import ZipFile

import pytest
from uv import find_uv_bin

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOWEST = ROOT / "tests" / "lowest.txt"

# One worker builds all that these tests look at.
pytestmark = pytest.mark.xdist_group("supply")


def requirements() -> set[str]:
    """Return what the package and its extras depend on, as pyproject.toml has it."""
    project = PROJECT["project"]
    return {*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())}


def bounds() -> dict[str, str]:
    """Return the lower bound of each direct dependency by its name."""
    found: dict[str, str] = {}
    for requirement in requirements():
        matched = re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+)(,<[0-9.]+)?", requirement)
        assert matched, requirement
        assert found.setdefault(matched[1], matched[2]) == matched[2], f"two bounds of {matched[1]}"
    return found


def pins() -> dict[str, str]:
    lines = LOWEST.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def release(version: str) -> tuple[int, ...]:
    """Return a version so that 44 and 44.0.0 are equal."""
    parts = [int(part) for part in version.split(".")]
    return (*parts, *[0] * (4 - len(parts)))


def test_the_lowest_versions_that_are_tried_are_the_lower_bounds() -> None:
    assert {name: release(version) for name, version in pins().items()} == {
        name: release(version) for name, version in bounds().items()
    }


def test_the_environment_of_the_lowest_versions_has_them() -> None:
    if os.environ.get("TOX_ENV_NAME", "").endswith("-lowest"):
        assert {name: release(version(name)) for name in pins()} == {
            name: release(pinned) for name, pinned in pins().items()
        }


def built(checkout: Path, output: Path, umask: int) -> dict[str, bytes]:
    """Build wheel and source distribution of a checkout, and return their bytes by file name."""
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    done = subprocess.run(
        [find_uv_bin(), "build", "--quiet", "--out-dir", output, checkout],
        check=False,
        cwd=output.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        umask=umask,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return {path.name: path.read_bytes() for path in output.iterdir() if path.suffix in {".whl", ".gz"}}


def checkout(target: Path, *, mode: int, time: int) -> Path:
    """Copy what a build reads, with access rights and times as another machine may have them."""
    included = [name.strip("/") for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]]
    target.mkdir(parents=True)
    for name in [*included, "pyproject.toml", "README.md", ".gitignore"]:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target / name)
    for path in target.rglob("*"):
        if path.is_file():
            path.chmod((path.stat().st_mode & 0o100) | mode)
        os.utime(path, (time, time))
    return target


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, bytes], Path]:
    place = tmp_path_factory.mktemp("builds")
    first = checkout(place / "here", mode=0o644, time=1_000_000_000)
    second = checkout(place / "another" / "with a longer name", mode=0o600, time=1_700_000_000)
    return built(first, place / "1", 0o022), built(second, place / "2", 0o077), place / "1"


def test_wheel_and_source_distribution_are_the_same_bytes_wherever_they_are_built(
    builds: tuple[dict[str, bytes], dict[str, bytes], Path],
) -> None:
    first, second, _ = builds
    assert len(first) == 2
    assert first == second


def test_the_wheel_has_its_bill_of_materials(builds: tuple[dict[str, bytes], dict[str, bytes], Path]) -> None:
    (wheel,) = builds[2].glob("*.whl")
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if ".dist-info/sboms/" in name)
        content = archive.read(name)
    assert name.endswith(".dist-info/sboms/sbom.cdx.json")
    assert content == (ROOT / "sbom.cdx.json").read_bytes()


def test_the_bill_names_each_direct_dependency_and_no_version_below_its_bound() -> None:
    bill = json.loads((ROOT / "sbom.cdx.json").read_text(encoding="utf-8"))
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == PROJECT["project"]["name"]
    versions = {component["name"]: component["version"] for component in bill["components"]}
    for name, lowest in bounds().items():
        numbers = re.match(r"[0-9.]+[0-9]", versions[name])
        assert numbers, name
        assert release(numbers[0]) >= release(lowest), name


def test_the_source_distribution_has_what_its_tests_read(
    builds: tuple[dict[str, bytes], dict[str, bytes], Path],
) -> None:
    (sdist,) = builds[2].glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"SECURITY.md", "sbom.cdx.json", "tests/lowest.txt", "docs/threat-model.md", "docs/fips.md"}
