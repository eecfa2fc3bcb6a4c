"""Runs the migrations of this package's own tables; see ``sqlalchemy_kravn_crypto.migrate``.

The version table is apart from the one of the user's migrations, so that neither disturbs the other.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

from sqlalchemy_kravn_crypto.schema import TABLES

config = context.config
attributes = config.attributes
ADVISORY_LOCK = 0x6B72_6176_6E01  # any number that nobody else is likely to use: "kravn", then 1


def run_offline() -> None:
    """Print the statements."""
    context.configure(dialect_name=attributes["dialect"], version_table=attributes["version_table"], literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Run the statements on the connection that was handed in."""
    connection = attributes["connection"]
    context.configure(
        connection=connection, target_metadata=TABLES.keys.metadata, version_table=attributes["version_table"]
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            # Replicas that are deployed together migrate together: the others wait here, and then find it done.
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
