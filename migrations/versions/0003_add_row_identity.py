"""Add to kms_columns which columns identify the row that the values of a column are bound to.

Revision: 0003
Follows: 0002
Date: 2026-11-24

This file is frozen: the table as the first release made it, whatever the schema module says later.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("kms_columns", sa.Column("row_identity", sa.Text(), nullable=True))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("kms_columns", "row_identity")
