"""Which transactions were open at a moment and still are: what they wrote is not visible yet."""

from __future__ import annotations

from sqlalchemy import Connection, text

# An id of our own, which is beyond all others; the end of a snapshot is not, where the newest are still open.
_POSTGRESQL_MARK = "SELECT CAST(pg_current_xact_id() AS text)"
_POSTGRESQL_ENDED = (
    "SELECT CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text)::numeric >= CAST(CAST(:mark AS text) AS numeric)"
)
# Its transaction ids there are the last 32 bits, and one is older than another if it is less than half of them behind.
_POSTGRESQL_OPEN = (
    "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND mod(CAST(CAST(backend_xid AS text) AS bigint) "
    "- mod(CAST(CAST(:mark AS text) AS bigint), 4294967296) + 6442450944, 4294967296) < 2147483648 ORDER BY xact_start"
)
_MYSQL_MARK = "SELECT CAST(UNIX_TIMESTAMP(NOW(6)) AS CHAR)"
_MYSQL_OPEN = (
    "SELECT trx_mysql_thread_id FROM information_schema.innodb_trx "
    "WHERE UNIX_TIMESTAMP(trx_started) <= :mark AND trx_mysql_thread_id <> CONNECTION_ID()"
)


def mark(connection: Connection) -> str:
    """Return a mark of this moment, for :func:`open_since`; the caller's transaction may be rolled back."""
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
            found = [f"backend {pid}" for pid in connection.execute(text(_POSTGRESQL_OPEN), {"mark": moment}).scalars()]
            return found or ["a prepared transaction"]
        case "mysql" | "mariadb":
            return [f"thread {thread}" for thread in connection.execute(text(_MYSQL_OPEN), {"mark": moment}).scalars()]
        case _:
            return []
