"""What an auditor asks for: the trail of one key, and counts on record."""

from __future__ import annotations

from typing import Any

from ..census import Census
from ..changes import Operator, changing
from ..events import Event, read_rows_and_events
from ..exceptions import WrongStateError
from ..known_columns import forget, record
from ..rows import connect
from .retirement import Targets


def evidence(operator: Operator, key_id: str) -> dict[str, Any]:
    """Return everything on record about a data key, as JSON can hold it. Rows and trail are verified first.

    It only reads, so it takes no right to write.

    :raises WrongStateError: if there is no such data key.
    :raises AuditTrailError: if an event was altered, left out or added.
    :raises KeyStoreError: if the key store is not genuine.
    """
    with connect(operator.engine) as connection:
        rows, events = read_rows_and_events(connection)
    operator.store.checked(rows, operator.store.secrets(rows))
    row, control = rows.key(key_id), rows.in_control()
    if row is None:
        raise WrongStateError(f"There is no data key {key_id}. `kravn-crypto status` lists them.")
    return {
        "key_id": key_id,
        "state": row.state.value,
        "provider": row.provider,
        "master_key": row.master_key,
        "standby_master_key": row.standby_master_key,
        "has_wrapped_key": row.wrapped_key is not None,
        "deployment_id": control.deployment_id,
        "epoch": control.epoch,
        "events": [event.as_dict() for event in events if _is_about(event, key_id)],
        "trail": {"events": len(events), "newest_hash": control.events_hash},
    }


def _is_about(event: Event, key_id: str) -> bool:
    return event.key_id in {key_id, None} or key_id in event.details.values()


def record_census(operator: Operator, targets: Targets, *, reason: str | None = None, dry_run: bool = False) -> Census:
    """Count the values of every known column by their data keys, and put the count and the columns on record.

    :param dry_run: do not put it on record; then it takes no right to write.
    :raises ColumnUnreachableError: if the database has no schema of a name that was given.
    """
    with connect(operator.engine) as connection:
        counted = targets.count(connection)
    if not dry_run:
        with changing(operator) as change:
            # So that those of a schema that was named here are not forgotten where it is not.
            record(change.connection, [column.column for column in counted.columns])
            change.save(change.rows, "census", reason=reason, details={"census": counted.as_dict()})
    return counted


def forget_column(  # noqa: PLR0913 - a column is three names
    operator: Operator, schema: str, table: str, column: str, *, reason: str | None = None, dry_run: bool = False
) -> None:
    """Take a column off the record of columns that hold encrypted values, or did.

    Its values are no longer counted, and no longer keep a data key from being destroyed.

    :param schema: empty for the default schema.
    :raises WrongStateError: if it is not on record.
    """
    with changing(operator) as change:
        if not forget(change.connection, schema, table, column):
            raise WrongStateError(f"{'.'.join(filter(None, (schema, table, column)))} is not on record.")
        if not dry_run:
            details = {"schema": schema, "table": table, "column": column}
            change.save(change.rows, "forget-column", reason=reason, details=details)
