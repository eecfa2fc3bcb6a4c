"""Mapped objects with values that are bound to their row: what the UPDATE of one must say besides what was changed.

SQLAlchemy writes the attributes that were changed, and names the row by its primary key. A value that is bound to
another column needs that one as well; and where what identifies the row is changed, all that is bound to it is written
again.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import event, inspect
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import flag_modified
from sqlalchemy.orm.exc import UnmappedColumnError

from .row_binding import bound_columns


class _BoundAttribute(NamedTuple):
    """The names of attributes of a mapped class.

    :ivar identity: those of what identifies the row.
    :ivar unnamed: of these, what an UPDATE does not name by itself.
    """

    name: str
    identity: frozenset[str]
    unnamed: frozenset[str]


_attributes: Final[WeakKeyDictionary[Mapper[Any], list[_BoundAttribute]]] = WeakKeyDictionary()


def listen() -> None:
    """Have the UPDATEs of all mapped classes name what identifies a row. To call it again does nothing."""
    if not event.contains(Mapper, "before_update", _complete):
        event.listen(Mapper, "before_update", _complete)


def _complete(mapper: Mapper[Any], _connection: Any, target: Any) -> None:
    if mapper not in _attributes:
        _attributes[mapper] = _bound_attributes(mapper)
    bound = _attributes[mapper]
    if not bound:
        return
    state: Any = inspect(target)
    changed = {name for one in bound for name in (one.name, *one.identity) if state.attrs[name].history.has_changes()}
    written = set(changed)
    # Until nothing is added: what is named for one value is written, and so are all values that are bound to it.
    while added := _needed(bound, written) - written:
        written |= added
    for name in sorted(written - changed):
        getattr(target, name)  # what is not loaded cannot be written again
        flag_modified(target, name)


def _needed(bound: list[_BoundAttribute], written: set[str]) -> set[str]:
    """Return what an UPDATE must write that writes these attributes."""
    touched = (one for one in bound if one.name in written or one.identity & written)
    return {name for one in touched for name in (one.name, *one.unnamed)}


def _bound_attributes(mapper: Mapper[Any]) -> list[_BoundAttribute]:
    found = []
    for table in mapper.tables:
        for bound in bound_columns(table):
            attribute = _attribute(mapper, bound.column)
            identity = {column: _attribute(mapper, column) for column, _ in bound.identity}
            # What the class has no attribute for is not written by it, or refused when the statement is executed.
            if attribute is None or None in identity.values():
                continue
            unnamed = (name for column, name in identity.items() if not column.primary_key)
            found.append(_BoundAttribute(attribute, frozenset(identity.values()), frozenset(unnamed)))
    return found


def _attribute(mapper: Mapper[Any], column: Any) -> Any:
    """Return the name of the attribute that a column is mapped to, or ``None`` if it is mapped to none."""
    try:
        return mapper.get_property_by_column(column).key
    except UnmappedColumnError:
        return None
