"""What the package adds to the start of a process: its import, and ``configure``."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from sqlalchemy import create_engine

from sqlalchemy_kravn_crypto.migrate import migrate

from .figures import Effort, Figure, Section
from .processes import least, output_of

SECTION: Final = Section(
    "start",
    "The start of a process",
    "New processes, in turns. Without the package, a process imports `sqlalchemy`, `sqlalchemy.orm` and those modules "
    "of `cryptography` that the package needs; the ratio is that and what the package adds, divided by that alone. "
    "`configure(engine)` is the first call of a process, on a provisioned SQLite file that the engine has connected to "
    "already; a program that does not use pydantic itself imports it then. Stretching `KRAVN_SECRET` takes the "
    "time that it takes on purpose, and is left out.",
)

_IMPORT_TARGET: Final = 0.040  # seconds
_CONFIGURE_TARGET: Final = 0.030
_BASELINE: Final = "SQLAlchemy and cryptography"


def measure(effort: Effort) -> Iterator[Figure]:
    """Start processes that import, and processes that configure."""
    modules = tuple(output_of("importing", "list").split())
    baseline, added = least({"import": ("importing", *modules)}, effort.start_rounds)["import"]
    yield _figure("import", baseline, added, _IMPORT_TARGET)
    with TemporaryDirectory() as directory:
        for label, environment in (
            ("configure, secret.key", {"KRAVN_DATA_DIR": directory}),
            ("configure, KRAVN_SECRET", {"KRAVN_SECRET": secrets.token_hex(32)}),
        ):
            url = f"sqlite:///{Path(directory, label)}.db"
            engine = create_engine(url)
            migrate(engine)
            engine.dispose()
            output_of("configuring", url, environment=environment)  # provisions
            best = least({label: ("configuring", url)}, effort.start_rounds, environment)[label]
            stretching, pydantic, configuring = best
            configuring -= stretching
            yield _figure(label, baseline, configuring, _CONFIGURE_TARGET)
            yield _figure(f"{label}, and import pydantic", baseline, configuring + pydantic, _CONFIGURE_TARGET)


def _figure(label: str, baseline: float, added: float, target: float) -> Figure:
    return Figure(
        label,
        _BASELINE,
        (baseline + added) / baseline,
        (baseline + target) / baseline,
        f"{added * 1e3:+.0f} ms of {target * 1e3:.0f} ms",
    )
