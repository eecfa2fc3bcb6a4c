"""Which transactions were open at a moment and still are: what they wrote is not visible yet."""

from __future__ import annotations

from sqlalchemy import Connection, text

_POSTGRESQL_MARK = "SELECT CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text)"
_POSTGRESQL_ENDED = (
    "SELECT CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text)::numeric >= CAST(CAST(:mark AS text) AS numeric)"
)
_POSTGRESQL_OPEN = (
    "SELECT pid FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() ORDER BY xact_start"
)
_MYSQL_MARK = "SELECT CAST(UNIX_TIMESTAMP(NOW(6)) AS CHAR)"
_MYSQL_OPEN = (
    "SELECT trx_mysql_thread_id FROM information_schema.innodb_trx "
    "WHERE UNIX_TIMESTAMP(trx_started) <= :mark AND trx_mysql_thread_id <> CONNECTION_ID()"
)


def mark(connection: Connection) -> str:
    """Return a mark of this moment, for :func:`open_since`."""
    statement = {"postgresql": _POSTGRESQL_MARK, "mysql": _MYSQL_MARK, "mariadb": _MYSQL_MARK}.get(
        connection.dialect.name
    )
    return "" if statement is None else str(connection.execute(text(statement)).scalar_one())


def open_since(connection: Connection, moment: str) -> list[str]:
    """Return the transactions that were open at a mark and still are, by the database's own names for them.

    On PostgreSQL that includes prepared ones; on MariaDB it takes the PROCESS privilege. On SQLite there are none for
    somebody who holds its lock on writing.

    :param moment: what :func:`mark` returned.
    """
    match connection.dialect.name:
        case "postgresql":
            if connection.execute(text(_POSTGRESQL_ENDED), {"mark": moment}).scalar_one():
                return []
            found = [f"backend {pid}" for pid in connection.execute(text(_POSTGRESQL_OPEN)).scalars()]
            return found or ["a prepared transaction"]
        case "mysql" | "mariadb":
            return [f"thread {thread}" for thread in connection.execute(text(_MYSQL_OPEN), {"mark": moment}).scalars()]
        case _:
            return []
