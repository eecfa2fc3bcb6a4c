"""What following the key store adds to a small transaction."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from pydantic import SecretStr
from sqlalchemy import Engine, create_engine, insert, select, update
from sqlalchemy.pool import StaticPool

from sqlalchemy_kravn_crypto import configure, kms_tables, reset
from sqlalchemy_kravn_crypto.settings import Fence, Provider, Settings

from .databases import OURS, Database, Store, store_of
from .documents import KINDS, Document, Documents
from .figures import Effort, Figure, Section
from .measuring import Contestant, beside, race

SECTION: Final = Section(
    "following",
    "Following the key store",
    "A transaction of one statement, which reads or updates one encrypted document of 190 bytes by its primary key: on "
    "an engine that `configure` was called with, divided by the same on an engine of the same database that nobody "
    "knows of. Without its checks, such an engine does nothing more than to follow the key store, which is looked at "
    "every 15 seconds. With `KRAVN_FENCE=transaction`, each transaction that writes encrypted values also asks which "
    "key is the primary, and locks it: three statements more.",
)

_CONFIGURED: Final = "configured"
_UNKNOWN: Final = "not configured"


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to configure an engine, and what it does then."""

    label: str
    fence: Fence
    with_checks: bool
    transact: Callable[[Engine, Store, int, Document], None]


def _read(engine: Engine, store: Store, number: int, _: Document) -> None:
    columns = store.table.c
    with engine.begin() as connection:
        connection.execute(select(columns.document).where(columns.id == number)).scalar_one()


def _write(engine: Engine, store: Store, number: int, document: Document) -> None:
    with engine.begin() as connection:
        connection.execute(update(store.table).where(store.table.c.id == number).values(document=document))


_WAYS: Final = (
    _Way("read, following alone", Fence.LEASE, with_checks=False, transact=_read),
    _Way("read", Fence.LEASE, with_checks=True, transact=_read),
    _Way("write, following alone", Fence.LEASE, with_checks=False, transact=_write),
    _Way("write", Fence.LEASE, with_checks=True, transact=_write),
    _Way("write, with the fence", Fence.TRANSACTION, with_checks=True, transact=_write),
)


def measure(effort: Effort, databases: Sequence[Database]) -> Iterator[Figure]:
    """Make transactions on engines that are configured, and on engines that are not."""
    documents = Documents(KINDS["190 B"], effort.transactions)
    for database in databases:
        for way in _WAYS:
            with ExitStack() as stack:
                configured, unknown, store = _engines(stack, database, way, documents.fresh())
                best = race(
                    [
                        _contestant(_CONFIGURED, configured, store, way, documents),
                        _contestant(_UNKNOWN, unknown, store, way, documents),
                    ],
                    effort.transaction_rounds,
                )
            yield Figure(
                f"{database.name}: {way.label}",
                _UNKNOWN,
                best[_CONFIGURED] / best[_UNKNOWN],
                None,
                beside(best[_CONFIGURED], best[_UNKNOWN], effort.transactions),
            )


def _engines(
    stack: ExitStack, database: Database, way: _Way, documents: list[Document]
) -> tuple[Engine, Engine, Store]:
    """Return an engine that is configured in that way, one that is not, and a table that is filled."""
    url = stack.enter_context(database.serve())
    configured = create_engine(url, poolclass=StaticPool)
    stack.callback(configured.dispose)
    # On the same connection, which in memory is the database.
    unknown = create_engine(url, pool=configured.pool)
    stack.callback(reset)
    store = store_of(OURS, configured)
    kms_tables(store.table.metadata)
    store.table.metadata.create_all(configured)
    settings = Settings(kms_provider=Provider.NONE, secret=SecretStr(secrets.token_hex(32)), fence=way.fence)
    configure(configured, settings, check_statements=way.with_checks, redact_errors=way.with_checks)
    with configured.begin() as connection:
        connection.execute(
            insert(store.table), [{"id": number, "document": one} for number, one in enumerate(documents, 1)]
        )
    return configured, unknown, store


def _contestant(name: str, engine: Engine, store: Store, way: _Way, documents: Documents) -> Contestant:
    def run(fresh: list[Document]) -> Any:
        for number, document in enumerate(fresh, 1):
            way.transact(engine, store, number, document)

    return Contestant(name, documents.fresh, run)
