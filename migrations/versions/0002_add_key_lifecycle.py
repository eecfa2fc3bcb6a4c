"""Add what rotating keys needs: the ledger kms_rekeys, and columns of kms_keys, kms_replicas and kms_columns.

Revision: 0002
Follows: 0001
Date: 2026-11-24

This file is frozen: the tables as the first release made them, whatever the schema module says later.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the ledger and the columns."""
    op.add_column("kms_keys", sa.Column("events_hash", sa.String(64), nullable=True))
    op.add_column("kms_replicas", sa.Column("primary_key_id", sa.String(16), nullable=True))
    op.add_column("kms_replicas", sa.Column("mac_key_ids", sa.Text(), nullable=True))
    op.add_column("kms_replicas", sa.Column("lease", sa.Integer(), nullable=True))
    op.add_column("kms_columns", sa.Column("earlier_names", sa.Text(), nullable=True))
    op.create_table(
        "kms_rekeys",
        sa.Column("schema_name", sa.String(128), nullable=False),
        sa.Column("table_name", sa.String(128), nullable=False),
        sa.Column("column_name", sa.String(128), nullable=False),
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("key_id", sa.String(16), nullable=False),
        sa.Column("lower_bound", sa.Text(), nullable=True),
        sa.Column("upper_bound", sa.Text(), nullable=True),
        sa.Column("position", sa.Text(), nullable=True),
        sa.Column("rows_total", sa.BigInteger(), nullable=False),
        sa.Column("rows_seen", sa.BigInteger(), nullable=False),
        sa.Column("rekeyed", sa.BigInteger(), nullable=False),
        sa.Column("conflicts", sa.BigInteger(), nullable=False),
        sa.Column("unreadable", sa.BigInteger(), nullable=False),
        sa.Column("worker", sa.String(36), nullable=True),
        sa.Column("leased_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("schema_name", "table_name", "column_name", "shard", name="pk_kms_rekeys"),
    )


def downgrade() -> None:
    """Take them away again. No data key is lost; row MACs that cover an events_hash no longer verify."""
    op.drop_table("kms_rekeys")
    op.drop_column("kms_columns", "earlier_names")
    for name in ("primary_key_id", "mac_key_ids", "lease"):
        op.drop_column("kms_replicas", name)
    op.drop_column("kms_keys", "events_hash")
