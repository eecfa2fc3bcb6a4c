"""The tables: ``kms_keys`` and those beside it, as the first migration creates them.

Everything is text, so that the tables are alike on every database: key ids as 16 lower-case hexadecimal characters,
wrapped keys, key checks and MACs as base64.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

from sqlalchemy import (
    BLANK_SCHEMA,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
)

VERSION_TABLE: Final = "kms_alembic_version"
"""The version table of the migrations of this package, apart from the user's own."""

CONTROL_ROW_ID: Final = 1
"""The id of the control row of ``kms_keys``, which is the lock and never holds a data key."""


class State(StrEnum):
    """The state of a row of ``kms_keys``."""

    CONTROL = "control"
    PENDING = "pending"
    PRIMARY = "primary"
    RETIRED = "retired"
    DISABLED = "disabled"
    DESTROYED = "destroyed"


class Tables(NamedTuple):
    """The tables of this package in one ``MetaData``."""

    keys: Table
    replicas: Table
    columns: Table
    events: Table
    rekeys: Table


def kms_tables(metadata: MetaData) -> Tables:
    """Add the tables to a ``MetaData``, for a team that wants them in its own migration history.

    Call it where the models are defined; ``alembic revision --autogenerate`` and ``create_all`` then see to the tables,
    and ``kravn-crypto migrate`` is not needed. They are always in the database's default schema, whatever the schema of
    the ``MetaData``. Calling it again returns the same tables.
    """
    if "kms_keys" in metadata.tables:
        return Tables(*(metadata.tables[name] for name in TABLE_NAMES))
    return Tables(_keys(metadata), _replicas(metadata), _columns(metadata), _events(metadata), _rekeys(metadata))


def _keys(metadata: MetaData) -> Table:
    states = ", ".join(f"'{state}'" for state in State)
    return Table(
        "kms_keys",
        metadata,
        Column("id", Integer, autoincrement=False, nullable=False),
        Column("keyring", String(64)),
        Column("key_id", String(16)),
        Column("state", String(16), nullable=False),
        Column("primary_of", String(64)),
        Column("epoch", BigInteger),
        Column("deployment_id", String(36)),
        Column("provider", String(32)),
        Column("master_key", String(1024)),
        Column("wrapped_key", Text),
        Column("standby_provider", String(32)),
        Column("standby_master_key", String(1024)),
        Column("standby_wrapped_key", Text),
        Column("key_check", String(44)),
        Column("closing", String(64)),
        Column("row_mac", String(56)),
        Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column("events_hash", String(64)),
        PrimaryKeyConstraint("id", name="pk_kms_keys"),
        UniqueConstraint("key_id", name="uq_kms_keys_key_id"),
        UniqueConstraint("primary_of", name="uq_kms_keys_primary_of"),
        CheckConstraint(f"state IN ({states})", name="ck_kms_keys_state"),
        CheckConstraint(
            "(state = 'primary' AND primary_of IS NOT NULL AND primary_of = keyring) "
            "OR (state <> 'primary' AND primary_of IS NULL)",
            name="ck_kms_keys_primary_of",
        ),
        CheckConstraint(
            f"(id = {CONTROL_ROW_ID} AND state = 'control') OR (id > {CONTROL_ROW_ID} AND state <> 'control')",
            name="ck_kms_keys_control",
        ),
        schema=BLANK_SCHEMA,
    )


def _replicas(metadata: MetaData) -> Table:
    return Table(
        "kms_replicas",
        metadata,
        Column("replica_id", String(36), nullable=False),
        Column("host", String(255), nullable=False),
        Column("process_id", BigInteger, nullable=False),
        Column("version", String(32), nullable=False),
        Column("epoch", BigInteger, nullable=False),
        Column("key_ids", Text, nullable=False),
        Column("started_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column("seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column("primary_key_id", String(16)),
        Column("mac_key_ids", Text),
        Column("lease", Integer),
        PrimaryKeyConstraint("replica_id", name="pk_kms_replicas"),
        schema=BLANK_SCHEMA,
    )


def _columns(metadata: MetaData) -> Table:
    return Table(
        "kms_columns",
        metadata,
        # '' and not NULL for the default schema: a primary key has no NULLs. The lengths fit one InnoDB index.
        Column("schema_name", String(128), nullable=False),
        Column("table_name", String(128), nullable=False),
        Column("column_name", String(128), nullable=False),
        Column("storage", String(16), nullable=False),
        Column("name", Text, nullable=False),
        Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column("earlier_names", Text),
        Column("row_identity", Text),
        PrimaryKeyConstraint("schema_name", "table_name", "column_name", name="pk_kms_columns"),
        schema=BLANK_SCHEMA,
    )


def _events(metadata: MetaData) -> Table:
    return Table(
        "kms_events",
        metadata,
        Column("id", BigInteger().with_variant(Integer(), "sqlite"), autoincrement=False, nullable=False),
        Column("occurred_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column("actor", String(255), nullable=False),
        Column("host", String(255), nullable=False),
        Column("action", String(32), nullable=False),
        Column("key_id", String(16)),
        Column("reason", Text),
        Column("details", Text),
        Column("previous_hash", String(64), nullable=False),
        Column("hash", String(64), nullable=False),
        PrimaryKeyConstraint("id", name="pk_kms_events"),
        UniqueConstraint("previous_hash", name="uq_kms_events_previous_hash"),
        schema=BLANK_SCHEMA,
    )


def _rekeys(metadata: MetaData) -> Table:
    return Table(
        "kms_rekeys",
        metadata,
        Column("schema_name", String(128), nullable=False),
        Column("table_name", String(128), nullable=False),
        Column("column_name", String(128), nullable=False),
        Column("shard", Integer, autoincrement=False, nullable=False),
        Column("key_id", String(16), nullable=False),
        Column("lower_bound", Text),
        Column("upper_bound", Text),
        Column("position", Text),
        Column("rows_total", BigInteger, nullable=False),
        Column("rows_seen", BigInteger, nullable=False),
        Column("rekeyed", BigInteger, nullable=False),
        Column("conflicts", BigInteger, nullable=False),
        Column("unreadable", BigInteger, nullable=False),
        Column("worker", String(36)),
        Column("leased_until", DateTime(timezone=True)),
        Column("finished_at", DateTime(timezone=True)),
        Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
        PrimaryKeyConstraint("schema_name", "table_name", "column_name", "shard", name="pk_kms_rekeys"),
        schema=BLANK_SCHEMA,
    )


TABLE_NAMES: Final = ("kms_keys", "kms_replicas", "kms_columns", "kms_events", "kms_rekeys")

TABLES: Final = kms_tables(MetaData())
"""The tables as this package's own statements use them."""
