"""Ranges of the primary keys of a table: their bounds as text that gives the exact values back, and as SQL."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from operator import ge, gt, le, lt
from typing import Any, Final

from sqlalchemy import BindParameter, ColumnClause, ColumnElement, and_, bindparam, literal, or_, tuple_
from sqlalchemy.types import Enum

from .codecs.selection import codec_for
from .exceptions import ColumnError, ColumnUnreachableError, MalformedPayloadError, MalformedRowError

Key = tuple[Any, ...]
"""The values of the columns of a primary key, in its order."""

_MYSQL: Final = frozenset({"mysql", "mariadb"})


class KeyColumns:
    """The primary key of one table.

    :param columns: its columns, with their types.
    :param label: of what is in the table, for messages.
    :raises ColumnUnreachableError: if there is none, or if its values could not be written down.
    """

    def __init__(self, columns: Sequence[ColumnClause[Any]], label: str, dialect: str) -> None:
        if not columns:
            raise ColumnUnreachableError(
                f"{label} cannot be re-encrypted: its table has no primary key to walk along. Add one."
            )
        unfit = [column for column in columns if not _has_codec(column) or _sorts_otherwise(column, dialect)]
        if unfit:
            raise ColumnUnreachableError(
                f"{label} cannot be re-encrypted: column {unfit[0].name} of the primary key is of a type that it is "
                "not known how to walk along. Load and store the values with your own program instead."
            )
        self.columns = tuple(columns)
        self._label = label
        self._codecs = tuple(codec_for(column.type) for column in columns)
        # MySQL reads a comparison of rows only in the long form as a range of an index, PostgreSQL only in the short.
        self._in_long_form = dialect in _MYSQL

    def to_text(self, key: Key) -> str:
        """Return a key as text."""
        payloads = (codec.encode(value) for codec, value in zip(self._codecs, key, strict=True))
        return json.dumps([b64encode(payload).decode("ascii") for payload in payloads])

    def from_text(self, text: str) -> Key:
        """Return the key that text was made of, its values of the same types.

        :raises MalformedRowError: if the text is no key of this table.
        """
        try:
            found = json.loads(text)
            if isinstance(found, list):
                payloads = [b64decode(payload, validate=True) for payload in found]
                return tuple(codec.decode(payload) for codec, payload in zip(self._codecs, payloads, strict=True))
        except (MalformedPayloadError, RecursionError, TypeError, ValueError):
            pass
        raise MalformedRowError(
            f"The plan for {self._label} in kms_rekeys names what is no primary key of its table. If nobody has "
            "changed the type of the key, find out who writes to kms_rekeys. Empty that table; then run "
            "`kravn-crypto rekey` again, which plans anew."
        )

    def parameters(self, name: str) -> Key:
        """Return parameters in the place of a key, for a statement that is made once; :meth:`named` gives them."""
        return tuple(bindparam(f"{name}_{place}", type_=one.type) for place, one in enumerate(self.columns))

    def named(self, name: str, key: Key) -> dict[str, Any]:
        """Return the values of :meth:`parameters`."""
        return {f"{name}_{place}": value for place, value in enumerate(key)}

    def after(self, key: Key, *, or_at: bool = False) -> ColumnElement[bool]:
        """Return the condition that a row comes after a key, or at it."""
        return self._compared(key, is_after=True, or_at=or_at)

    def before(self, key: Key, *, or_at: bool = False) -> ColumnElement[bool]:
        """Return the condition that a row comes before a key, or at it."""
        return self._compared(key, is_after=False, or_at=or_at)

    def _compared(self, key: Key, *, is_after: bool, or_at: bool) -> ColumnElement[bool]:
        values = [_literal(value, column) for value, column in zip(key, self.columns, strict=True)]
        if len(values) == 1 or not self._in_long_form:
            mine: Any = self.columns[0] if len(values) == 1 else tuple_(*self.columns)
            theirs: Any = values[0] if len(values) == 1 else tuple_(*values)
            return _order(mine, theirs, is_after=is_after, or_at=or_at)
        alternatives = [
            and_(
                *(column == value for column, value in zip(self.columns[:place], values[:place], strict=True)),
                _order(self.columns[place], values[place], is_after=is_after, or_at=or_at and place == len(values) - 1),
            )
            for place in range(len(values))
        ]
        # The first condition follows from the others; it is what the index is searched with.
        return and_(_order(self.columns[0], values[0], is_after=is_after, or_at=True), or_(*alternatives))


def _literal(value: Any, column: ColumnClause[Any]) -> ColumnElement[Any]:
    return value if isinstance(value, BindParameter) else literal(value, column.type)


def _order(mine: Any, theirs: Any, *, is_after: bool, or_at: bool) -> ColumnElement[bool]:
    compare = (ge if or_at else gt) if is_after else (le if or_at else lt)
    compared: ColumnElement[bool] = compare(mine, theirs)
    return compared


def _has_codec(column: ColumnClause[Any]) -> bool:
    try:
        codec_for(column.type)
    except ColumnError:
        return False
    return True


def _sorts_otherwise(column: ColumnClause[Any], dialect: str) -> bool:
    """Tell whether the database sorts by something else than it compares by, as MySQL does with an ENUM."""
    return dialect in _MYSQL and isinstance(column.type, Enum)
