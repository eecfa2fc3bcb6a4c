"""One value on its way to the driver and back, without a database: what the column type itself takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import Format
from sqlalchemy import JSON, Dialect, make_url
from sqlalchemy.types import TypeEngine

from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, Keyring, use_keyring

from .documents import KINDS, Document, Documents
from .figures import Effort, Figure, Section
from .floor import FLOOR, write_and_read
from .measuring import Contestant, beside, race

SECTION: Final = Section(
    "values",
    "One value, without a database",
    "The processors that SQLAlchemy gets from the type, alone. The floor is the calls that no scheme of this kind can "
    "do without: `orjson`, `os.urandom(24)`, one AES call on 32 bytes that makes the value's own key, and AES-GCM, "
    "with nothing between them. On psycopg, `JSON` is encoded and decoded by the driver, so the driver's part "
    "is included there, for both.",
)

FLOOR_TARGET: Final = 1.3
OURS: Final = "ours"
SQLITE: Final = "sqlite://"
PSYCOPG: Final = "postgresql+psycopg://"


def _unchanged(value: Any) -> Any:
    return value


def _loaded(written: Any) -> Any:
    """Return what the database gives back: sqlite3 takes a bytearray and returns bytes."""
    return bytes(written) if isinstance(written, bytearray) else written


@dataclass(frozen=True, slots=True)
class Processors:
    """What encodes and decodes one value."""

    name: str
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]
    stored: Callable[[Any], Any] = _loaded
    """What the database makes of what was written; not timed."""


def dialect_of(url: str) -> Dialect:
    """Return a dialect as an engine has it."""
    return make_url(url).get_dialect()()


def processors(name: str, type_: TypeEngine[Any], dialect: Dialect) -> Processors:
    """Return the processors of a type as SQLAlchemy has them for a dialect."""
    implementation = type_.dialect_impl(dialect)
    return Processors(
        name,
        implementation.bind_processor(dialect) or _unchanged,
        implementation.result_processor(dialect, None) or _unchanged,
    )


def race_processors(
    contestants: Sequence[Processors], documents: Documents, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the best times of writing and of reading all documents, for each contestant."""
    for contestant in contestants:
        check(contestant, documents)
    write = race([_writing(contestant, documents) for contestant in contestants], rounds)
    read = race([_reading(contestant, documents) for contestant in contestants], rounds)
    return write, read


def check(contestant: Processors, documents: Documents) -> None:
    """Raise if what is read is not what was written."""
    for written, document in zip(map(contestant.write, documents.fresh()), documents.fresh(), strict=True):
        if dict(contestant.read(contestant.stored(written))) != document:
            msg = f"{contestant.name} did not return what was written, so its times mean nothing"
            raise AssertionError(msg)


def measure(effort: Effort) -> Iterator[Figure]:
    """Race the processors against the floor and against those of ``JSON``, for every dialect and kind of document."""
    with use_keyring(Keyring(DataKey.generate())):
        for kind, make in KINDS.items():
            documents = Documents(make, effort.values)
            for url, with_driver in ((SQLITE, False), (PSYCOPG, True)):
                dialect = dialect_of(url)
                ours = processors(OURS, EncryptedJSON(associated_data="plugin.credentials"), dialect)
                floor = Processors(FLOOR, *write_and_read())
                plain = processors("JSON", JSON(), dialect)
                against = [(ours, floor), (ours, plain)]
                if with_driver:
                    against[1] = (_through_psycopg(ours), _through_psycopg(plain))
                for (own, other), target in zip(against, (FLOOR_TARGET, None), strict=True):
                    for way, best in zip(
                        ("write", "read"),
                        race_processors((own, other), documents, effort.value_rounds),
                        strict=True,
                    ):
                        yield Figure(
                            f"{dialect.driver}, {kind}: {way}",
                            other.name,
                            best[own.name] / best[other.name],
                            target,
                            beside(best[own.name], best[other.name], len(documents)),
                        )


def _writing(contestant: Processors, documents: Documents) -> Contestant:
    return Contestant(contestant.name, documents.fresh, lambda values: _exhaust(map(contestant.write, values)))


def _reading(contestant: Processors, documents: Documents) -> Contestant:
    return Contestant(
        contestant.name,
        lambda: [contestant.stored(contestant.write(value)) for value in documents.fresh()],
        lambda stored: _exhaust(map(contestant.read, stored)),
    )


def _exhaust(results: Iterator[Any]) -> None:
    """Let an iterator run to its end; the loop itself takes next to nothing."""
    deque(results, maxlen=0)


def _through_psycopg(inner: Processors) -> Processors:
    """Add what psycopg does with a parameter and with a column of a result."""
    transformer = Transformer()
    sample = inner.write({})
    encode, decode, get_dumper = inner.write, inner.read, transformer.get_dumper
    load = transformer.get_loader(get_dumper(sample, PyFormat.AUTO).oid, Format.TEXT).load

    def write(value: Document) -> Any:
        encoded = encode(value)
        return get_dumper(encoded, PyFormat.AUTO).dump(encoded)

    # PostgreSQL returns binary data in hexadecimal, and JSON as it was given.
    stored = _in_hexadecimal if isinstance(sample, bytes) else _unchanged
    return Processors(inner.name, write, lambda received: decode(load(received)), stored)


def _in_hexadecimal(binary: bytes) -> bytes:
    return b"\\x" + binary.hex().encode()
