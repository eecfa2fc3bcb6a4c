"""Create kms_keys, kms_replicas, kms_columns and kms_events.

Revision: 0001
Follows: nothing
Date: 2026-11-23

This file is frozen: the tables as the first release made them, whatever the schema module says later.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "kms_keys",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("keyring", sa.String(64), nullable=True),
        sa.Column("key_id", sa.String(16), nullable=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("primary_of", sa.String(64), nullable=True),
        sa.Column("epoch", sa.BigInteger(), nullable=True),
        sa.Column("deployment_id", sa.String(36), nullable=True),
        sa.Column("provider", sa.String(32), nullable=True),
        sa.Column("master_key", sa.String(1024), nullable=True),
        sa.Column("wrapped_key", sa.Text(), nullable=True),
        sa.Column("standby_provider", sa.String(32), nullable=True),
        sa.Column("standby_master_key", sa.String(1024), nullable=True),
        sa.Column("standby_wrapped_key", sa.Text(), nullable=True),
        sa.Column("key_check", sa.String(44), nullable=True),
        sa.Column("closing", sa.String(64), nullable=True),
        sa.Column("row_mac", sa.String(56), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_kms_keys"),
        sa.UniqueConstraint("key_id", name="uq_kms_keys_key_id"),
        sa.UniqueConstraint("primary_of", name="uq_kms_keys_primary_of"),
        sa.CheckConstraint(
            "state IN ('control', 'pending', 'primary', 'retired', 'disabled', 'destroyed')", name="ck_kms_keys_state"
        ),
        sa.CheckConstraint(
            "(state = 'primary' AND primary_of IS NOT NULL AND primary_of = keyring) "
            "OR (state <> 'primary' AND primary_of IS NULL)",
            name="ck_kms_keys_primary_of",
        ),
        sa.CheckConstraint(
            "(id = 1 AND state = 'control') OR (id > 1 AND state <> 'control')", name="ck_kms_keys_control"
        ),
    )
    op.create_table(
        "kms_replicas",
        sa.Column("replica_id", sa.String(36), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("process_id", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("key_ids", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("replica_id", name="pk_kms_replicas"),
    )
    op.create_table(
        "kms_columns",
        sa.Column("schema_name", sa.String(128), nullable=False),
        sa.Column("table_name", sa.String(128), nullable=False),
        sa.Column("column_name", sa.String(128), nullable=False),
        sa.Column("storage", sa.String(16), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("schema_name", "table_name", "column_name", name="pk_kms_columns"),
    )
    op.create_table(
        "kms_events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("occurred_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("key_id", sa.String(16), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("details", sa.Text(), nullable=True),
        sa.Column("previous_hash", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_kms_events"),
        sa.UniqueConstraint("previous_hash", name="uq_kms_events_previous_hash"),
    )


def downgrade() -> None:
    """Drop the tables, and with them every data key: the values under them are lost."""
    for table in ("kms_events", "kms_columns", "kms_replicas", "kms_keys"):
        op.drop_table(table)
