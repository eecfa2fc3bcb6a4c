"""The database of a configuration, examined: the tables, the rights, the key store in them. It is only read.

What is asked here is what the processes that serve need. Who gives the commands needs more; see docs/key-lifecycle.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from sqlalchemy import Engine, Table, delete, false, insert, inspect, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql import Executable

from . import exceptions
from .clock import read_database_time
from .exceptions import KravnCryptoError, MissingExtraError, NotProvisionedError, SettingsError
from .keystore import NO_PROVIDER, live_keys
from .providers.base import Finding, KeyProvider, Level
from .providers.findings import CLOCK, bad, clocks_apart, good, unchecked, utc_now, warning
from .rows import OWN_TABLES, KeyRow, StoredRows, connect, read_rows
from .schema import TABLES
from .status import Status, database_error, status

if TYPE_CHECKING:
    from .settings import Settings

DATABASE: Final = "database"
TABLES_SUBJECT: Final = "tables"
GRANTS: Final = "grants"
ISOLATION: Final = "isolation"
KEY_STORE: Final = "key store"
MASTER_KEY: Final = "master key"

_AFTER_CONNECTING: Final = (CLOCK, TABLES_SUBJECT, GRANTS, KEY_STORE)
_OF_PROCESSES: Final = (TABLES.keys, TABLES.replicas, TABLES.columns)
"""The tables of processes that serve; the others are of those who give the commands, and of a first boot."""

_AS_IT_IS: Final = "as it is"
_MISSING: Final = "missing"
_HIDDEN: Final = "hidden"
_OUTDATED: Final = "outdated"
_NEWER: Final = "newer"
_MIGRATE: Final = "Run kravn-crypto migrate, or your own migrations where kms_tables(metadata) has the tables."

_SAID_OF_SETTINGS: Final = (SettingsError.__name__, MissingExtraError.__name__)
_STATUS_NEEDS_MORE: Final = "Processes that serve do without; kravn-crypto status does not."

_HIDES_TABLES: Final = ("mysql", "mariadb")
"""The databases that tell nobody of a table on which they have no right."""


def check_database(engine: Engine, settings: Settings | None, provider: KeyProvider | None) -> Iterator[Finding]:
    """Examine the database that holds, or will hold, the key store. Nothing in it is changed.

    :param settings: those of the processes; ``None`` if they are wrong.
    :param provider: the KMS, if there is one and it could be made.
    """
    failure = _failure(lambda: _connected(engine))
    if failure is not None:
        yield bad(DATABASE, failure, "Check the URL, and that the database can be reached from here.")
        yield from (unchecked(subject, "there is no connection.") for subject in _AFTER_CONNECTING)
        return
    yield good(DATABASE, f"{engine.dialect.name} takes connections.")
    yield from _found(CLOCK, lambda: _clock(engine))
    yield from _found(ISOLATION, lambda: _isolation(engine))
    tables = _found(TABLES_SUBJECT, lambda: _tables(engine))
    yield from tables
    if any(finding.level is Level.BAD for finding in tables):
        yield from (unchecked(subject, "that needs the tables.") for subject in (GRANTS, KEY_STORE))
        return
    unread = _missing(engine, TABLES.keys, ("SELECT",))
    if unread:
        yield bad(GRANTS, f"kms_keys cannot be read. {_one(unread)}", "Grant SELECT on it to this user.")
        yield unchecked(KEY_STORE, "that needs to be read.")
        return
    yield from _found(GRANTS, lambda: _grants(engine, settings, provider))
    yield from _found(KEY_STORE, lambda: _key_store(engine, settings, provider))
    if provider is not None:
        yield from _found(MASTER_KEY, lambda: _master_keys(_read(engine), provider))


def _found(subject: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return what a check finds, and that it could not go on, if it could not."""
    found: list[Finding] = []
    failure = _failure(lambda: found.extend(check()))
    return found if failure is None else [*found, unchecked(subject, failure)]


def _failure(action: Callable[[], object]) -> str | None:
    """Return why something fails, without statement and parameters; ``None`` if it does not."""
    try:
        action()
    except SQLAlchemyError as error:
        return database_error(error)
    except KravnCryptoError as error:
        return str(error)
    except OSError as error:  # some asynchronous drivers raise the network's own
        return f"The database: {error.strerror or type(error).__name__}"
    return None


def _connected(engine: Engine) -> None:
    with connect(engine) as connection:
        connection.execute(select(1))


# --- The connection --------------------------------------------------------------------------------------------------


def _clock(engine: Engine) -> Iterator[Finding]:
    """Compare this machine's clock with the database's, by which leases and the trail go; nothing else ever does."""
    with connect(engine) as connection:
        before = utc_now()
        there = read_database_time(connection)
        yield clocks_apart(there, "the database", before=before, after=utc_now())


def _isolation(engine: Engine) -> Iterator[Finding]:
    with connect(engine) as connection:
        level = connection.get_isolation_level()
    goes_stale = level != "READ COMMITTED" and engine.dialect.name != "sqlite"
    what_of_it = ": one that lasts longer than KRAVN_LEASE encrypts nothing more." if goes_stale else "."
    yield good(ISOLATION, f"Transactions are {level} by default{what_of_it}")


# --- The tables ------------------------------------------------------------------------------------------------------


def _tables(engine: Engine) -> Iterator[Finding]:
    """Find out whether the tables are those of this release, in each its columns."""
    found: dict[str, list[str]] = {}
    for table in TABLES:
        found.setdefault(_table(engine, table), []).append(table.name)
    if found.keys() == {_AS_IT_IS}:
        yield good(TABLES_SUBJECT, "They are those of this release.")
    if hidden := found.get(_HIDDEN):
        yield unchecked(
            TABLES_SUBJECT, f"{', '.join(hidden)}, on which this user has no right, or not there.", _MIGRATE
        )
    if missing := found.get(_MISSING):
        yield bad(TABLES_SUBJECT, f"There is no {', '.join(missing)}.", _MIGRATE)
    if outdated := found.get(_OUTDATED):
        yield bad(TABLES_SUBJECT, f"Of an earlier release: {', '.join(outdated)}.", _MIGRATE)
    if newer := found.get(_NEWER):
        yield warning(
            TABLES_SUBJECT,
            f"Of a newer release, with columns that this one does not know: {', '.join(newer)}.",
            "Use the release that the tables are of.",
        )


def _table(engine: Engine, table: Table) -> str:
    present = _columns(engine, table)
    known = set(table.columns.keys())
    if not present:
        return _HIDDEN if engine.dialect.name in _HIDES_TABLES and table not in _OF_PROCESSES else _MISSING
    if not present >= known:
        return _OUTDATED
    return _AS_IT_IS if present == known else _NEWER


def _columns(engine: Engine, table: Table) -> set[str]:
    with connect(engine) as connection:
        inspector = inspect(connection)
        if not inspector.has_table(table.name):
            return set()
        return {column["name"] for column in inspector.get_columns(table.name)}


# --- The rights ------------------------------------------------------------------------------------------------------


def _nothing_read(table: Table) -> Executable:
    return select(table).where(false())


def _nothing_inserted(table: Table) -> Executable:
    columns = list(table.columns)
    return insert(table).from_select(columns, select(*columns).where(false()))


def _nothing_updated(table: Table) -> Executable:
    return update(table).where(false()).values({column: column for column in table.columns})


def _nothing_touched(table: Table) -> Executable:
    column = table.columns["updated_at"]
    return update(table).where(false()).values({column: column})


def _nothing_deleted(table: Table) -> Executable:
    return delete(table).where(false())


_RIGHTS: Final = {
    "SELECT": _nothing_read,
    "INSERT": _nothing_inserted,
    "UPDATE": _nothing_updated,
    "UPDATE (updated_at)": _nothing_touched,
    "DELETE": _nothing_deleted,
}
"""Statements that need a right and, whatever is in the table, do nothing."""


def _grants(engine: Engine, settings: Settings | None, provider: KeyProvider | None) -> Iterator[Finding]:
    found = [
        *_grants_to_serve(engine),
        *_grants_to_fence(engine, settings),
        *_grants_to_begin(engine, settings, provider),
    ]
    yield from found or [good(GRANTS, "This user may do what a process does that serves.")]


def _grants_to_serve(engine: Engine) -> Iterator[Finding]:
    needed = {TABLES.replicas: ("SELECT", "INSERT", "UPDATE", "DELETE"), TABLES.columns: ("SELECT", "INSERT", "UPDATE")}
    for table, rights in needed.items():
        missing = _missing(engine, table, rights)
        if missing:
            yield warning(
                GRANTS,
                f"{', '.join(missing)} on {table.name}: {_one(missing)} The process serves without it, and what it "
                "holds and uses is on no record.",
                "Grant it, as in docs/key-lifecycle.md.",
            )


def _grants_to_fence(engine: Engine, settings: Settings | None) -> Iterator[Finding]:
    is_fenced = settings is not None and settings.fence.value == "transaction"
    if not is_fenced or engine.dialect.name != "postgresql":
        return
    missing = _missing(engine, TABLES.keys, ("UPDATE (updated_at)",))
    if missing:
        yield bad(
            GRANTS,
            f"KRAVN_FENCE=transaction takes the right to lock rows of kms_keys. {_one(missing)}",
            "Grant UPDATE (updated_at) on it to this user.",
        )


def _grants_to_begin(engine: Engine, settings: Settings | None, provider: KeyProvider | None) -> Iterator[Finding]:
    """Find out whether a first boot could write what it makes, where one is to come."""
    if settings is None or settings.kms_provision.value == "never" or not _is_to_begin(engine, provider):
        return
    for table, rights in {TABLES.keys: ("INSERT", "UPDATE"), TABLES.events: ("SELECT", "INSERT")}.items():
        missing = _missing(engine, table, rights)
        if missing:
            yield bad(
                GRANTS,
                f"The first data key is still to be made, which takes {', '.join(missing)} on {table.name}. "
                f"{_one(missing)}",
                "Grant it for the first boot; or set KRAVN_KMS_PROVISION=never and run kravn-crypto provision.",
            )


def _is_to_begin(engine: Engine, provider: KeyProvider | None) -> bool:
    """Tell whether there is no data key yet of the KMS that is configured, or of any where none is."""
    return not [row for row in _read(engine).keys if provider is None or row.provider != NO_PROVIDER]


def _missing(engine: Engine, table: Table, rights: Sequence[str]) -> dict[str, str]:
    """Return the rights that this user lacks, and what the database says of each."""
    said = {right: _failure(partial(_tried, engine, _RIGHTS[right](table))) for right in rights}
    return {right: failure for right, failure in said.items() if failure is not None}


def _tried(engine: Engine, statement: Executable) -> None:
    with connect(engine) as connection:
        connection.execute(statement, execution_options=OWN_TABLES)
        connection.rollback()


def _one(missing: dict[str, str]) -> str:
    said = next(iter(missing.values()))
    return said if said.endswith(".") else f"{said}."


# --- The key store ---------------------------------------------------------------------------------------------------


def _read(engine: Engine) -> StoredRows:
    with connect(engine) as connection:
        return read_rows(connection)


def _key_store(engine: Engine, settings: Settings | None, provider: KeyProvider | None) -> Iterator[Finding]:
    """Try what a boot does, and verify the audit trail."""
    # One that the settings name is made of them again.
    given = provider if settings is not None and settings.kms_provider == NO_PROVIDER else None
    found = status(engine, settings, provider=given)
    refusals = [problem for problem in found.problems if hasattr(exceptions, problem.error)]
    new = [problem for problem in refusals if problem.error not in _SAID_OF_SETTINGS]
    for problem in new:
        if problem.error == NotProvisionedError.__name__:
            yield _unprovisioned(settings, problem.message)
        else:
            yield bad(KEY_STORE, f"{problem.error}: {problem.message}")
    if len(new) < len(refusals):
        yield unchecked(KEY_STORE, "whether a process can start, which needs settings that are right.")
    elif not refusals:
        yield good(KEY_STORE, f"A process can start: the key store is at epoch {found.epoch}, with {_keys(found)}.")
    if found.trail is not None:
        yield good(KEY_STORE, f"The audit trail is whole (events: {found.trail.events}).")
    for problem in found.problems:
        if problem not in refusals:
            yield unchecked(KEY_STORE, problem.message, _STATUS_NEEDS_MORE)


def _keys(found: Status) -> str:
    return f"{len(found.keys)} data key{'' if len(found.keys) == 1 else 's'}"


def _unprovisioned(settings: Settings | None, message: str) -> Finding:
    if settings is not None and settings.kms_provision.value == "never":
        return bad(KEY_STORE, message, "Run kravn-crypto provision.")
    return warning(KEY_STORE, "There is no data key of this KMS yet. The first process to start makes it.")


def _master_keys(rows: StoredRows, provider: KeyProvider) -> Iterator[Finding]:
    """Find out which of the wrapped keys the configured KMS is for, and whether by the first or the standby."""
    wrapped = [row for row in live_keys(rows) if row.provider != NO_PROVIDER]
    first = [row for row in wrapped if _is_of(provider, row.provider, row.master_key)]
    others = [row for row in wrapped if row not in first]
    second = [row for row in others if _is_of(provider, row.standby_provider, row.standby_master_key)]
    if first and not others:
        yield good(MASTER_KEY, f"Every wrapped data key is under {provider.master_key}, as it is configured.")
    if second:
        yield warning(
            MASTER_KEY,
            f"The settings name the standby of {_named(second)}, not the KMS of record.",
            "If that is what is to be: kravn-crypto standby switch.",
        )
    if len(others) > len(second):
        yield bad(
            MASTER_KEY,
            f"{provider.master_key} is not what {_named([row for row in others if row not in second])} is wrapped "
            "under.",
            "Set the KMS and the master key of record; kravn-crypto status shows them.",
        )
    if len({row.standby_master_key is None for row in wrapped}) > 1:
        alone = [row for row in wrapped if row.standby_master_key is None]
        yield warning(MASTER_KEY, f"There is a standby, and not for {_named(alone)}.", "Run kravn-crypto standby add.")


def _is_of(provider: KeyProvider, name: str | None, master_key: str | None) -> bool:
    return name == provider.name and master_key is not None and provider.recognises(master_key)


def _named(rows: Sequence[KeyRow]) -> str:
    return f"data key {', '.join(row.key_id or '' for row in rows)}"
