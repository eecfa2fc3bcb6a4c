"""What loading many rows takes of memory: ``EncryptedJSON`` beside SQLAlchemy's own ``JSON``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from sqlalchemy import insert, make_url
from sqlalchemy.orm import Session

from sqlalchemy_kravn_crypto.settings import Provider, Settings

from .databases import OURS, PLAIN, open_stores
from .documents import KINDS, Documents
from .figures import Effort, Figure, Section
from .processes import least

SECTION: Final = Section(
    "memory",
    "Memory",
    "By how much a process's resident set grows, at its peak, while it loads all rows of a table of documents of 190 "
    "bytes from an SQLite file and keeps them. Each run is a process of its own.",
)

_TARGET: Final = 1.0
_KIND: Final = "190 B"


def measure(effort: Effort) -> Iterator[Figure]:
    """Fill a file, and load it in new processes."""
    with TemporaryDirectory() as directory:
        url = f"sqlite:///{Path(directory, 'rows.db')}"
        _fill(url, directory, effort.memory_rows)
        for way in ("ORM", "Core"):
            peaks = least(
                {name: ("loading", name, way, url) for name in (OURS, PLAIN)},
                effort.memory_rounds,
                {"KRAVN_DATA_DIR": directory},
            )
            (ours,), (theirs,) = peaks[OURS], peaks[PLAIN]
            yield Figure(
                f"read {effort.memory_rows:,} rows, {way}",
                PLAIN,
                ours / theirs,
                _TARGET,
                f"{ours / 2**20:.0f} : {theirs / 2**20:.0f} MiB",
            )


def _fill(url: str, directory: str, rows: int) -> None:
    documents = Documents(KINDS[_KIND], rows)
    settings = Settings(kms_provider=Provider.NONE, data_dir=Path(directory))
    with open_stores(make_url(url), settings, PLAIN) as stores:
        for store in stores:
            with Session(store.engine) as session:
                session.execute(insert(store.model), [{"document": document} for document in documents.fresh()])
                session.commit()
