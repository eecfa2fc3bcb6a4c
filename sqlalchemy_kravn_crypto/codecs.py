"""Python value to payload bytes and back: the same value, or an error.

A payload starts with one byte that names its kind, so that a value of one kind never loads as another:

.. code-block:: text

    01  JSON
    02  JSON that needs Python's own decoder: integers beyond 64 bits
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from re import compile as compile_pattern
from typing import Any, Final, Protocol

import orjson
from sqlalchemy import JSON

from .exceptions import MalformedPayloadError, UnstorableValueError

MAX_DEPTH: Final = 254
"""How many lists and dicts may be nested in each other. What orjson writes, and well within what every reader takes."""

MAX_INTEGER_BITS: Final = 14_000
"""Bound on an integer, in bits. Python reads at most 4,300 decimal digits from text unless told otherwise, which is
14,284 bits."""

_JSON: Final = b"\x01"
_BIG_JSON: Final = b"\x02"
_JSON_KIND: Final = _JSON[0]
_BIG_JSON_KIND: Final = _BIG_JSON[0]

# Nothing is converted on the quiet: what is no JSON value goes to `_builtin`, which knows subclasses of JSON's own
# types.
_ORJSON_OPTIONS: Final = (
    orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
)

_BUILTINS: Final[tuple[type[Any], ...]] = (dict, list, str, int, float)

_PLAIN_KEY: Final = compile_pattern(r"[A-Za-z_][A-Za-z0-9_]{0,63}").fullmatch


class Codec(Protocol):
    """Turns values into payloads and back."""

    def encode(self, value: Any) -> bytes:
        """Return the payload of a value.

        :raises UnstorableValueError: if it would not come back equal.
        """

    def decode(self, payload: bytes) -> Any:
        """Return the value of a payload.

        :raises MalformedPayloadError: if this codec did not write it.
        """


class JSONCodec:
    """Any JSON value, in and out unchanged.

    ``sqlalchemy.JSON.NULL`` is the JSON ``null`` at the top level; it comes back as ``None``.
    """

    def encode(self, value: Any) -> bytes:
        """Return the payload of a value.

        The value is encoded, decoded again and compared, so that whatever an encoder converts on the quiet (NaN to
        null, a UUID to text, an integer key to a text key) is refused. Equality is Python's: a tuple is not a list, and
        a member of a ``StrEnum`` is its text.

        :raises UnstorableValueError: if it would not come back equal.
        """
        if value is JSON.NULL:
            return _JSON + b"null"
        encoded = None
        try:
            encoded = orjson.dumps(value, _builtin, _ORJSON_OPTIONS)
        except TypeError:
            encoded = None
        if encoded is not None and orjson.loads(encoded) == value:
            return _JSON + encoded
        return _BIG_JSON + _encode_big(value)

    def decode(self, payload: bytes) -> Any:
        """Return the value of a payload.

        :raises MalformedPayloadError: if this codec did not write it.
        """
        kind = payload[0] if payload else None
        try:
            if kind == _JSON_KIND:
                return orjson.loads(payload[1:])
            if kind == _BIG_JSON_KIND:
                return json.loads(payload[1:])
        except (ValueError, RecursionError):
            kind = None
        if kind is None:
            raise MalformedPayloadError("The value decrypts, but is not JSON. Another program wrote it.")
        raise MalformedPayloadError(
            f"The value decrypts, but is of kind {kind:#04x}, which a JSON column does not hold. It was written "
            "through a column of another type with the same name."
        )


def _builtin(value: Any) -> Any:
    """Return a subclass of one of JSON's types as that type, for orjson; refuse everything else."""
    if value is not JSON.NULL:
        for builtin in _BUILTINS:
            if isinstance(value, builtin):
                return builtin(value)
    raise TypeError


def _encode_big(value: Any) -> bytes:
    """Encode what orjson did not, or say what in it cannot be stored, and where."""
    _refuse_unstorable(value, "$", 0)
    encoded = None
    try:
        encoded = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        if json.loads(encoded) != value:
            encoded = None
    except (TypeError, ValueError, RecursionError):
        encoded = None
    if encoded is None:
        raise _unstorable("$", value, "would not come back equal")
    return encoded.encode()


def _refuse_unstorable(value: Any, path: str, depth: int) -> None:
    """Raise for the first part of a value that JSON has no equal for."""
    if isinstance(value, (dict, list)) and depth == MAX_DEPTH:
        raise UnstorableValueError(
            f"The value is nested more than {MAX_DEPTH} levels deep, or contains itself; it is not stored.",
            type_name=type(value).__name__,
        )
    if isinstance(value, dict):
        _refuse_unstorable_items(value, path, depth)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unstorable(item, f"{path}[{index}]", depth + 1)
    else:
        reason = _why_unstorable(value)
        if reason:
            raise _unstorable(path, value, reason)


def _why_unstorable(value: Any) -> str:
    """Say why JSON has no equal for a value that is neither dict nor list; empty if it has one."""
    reason = ""
    if value is JSON.NULL:
        reason = "stands for a whole column; use None inside of a value"
    elif isinstance(value, str):
        reason = "" if _is_unicode(value) else "holds a lone surrogate, which is no Unicode text"
    elif isinstance(value, int):
        reason = "" if value.bit_length() <= MAX_INTEGER_BITS else f"has more than {MAX_INTEGER_BITS:,} bits"
    elif isinstance(value, float):
        reason = "" if isfinite(value) else "is NaN or infinite, which JSON cannot express"
    elif value is not None:
        reason = "would not come back equal from JSON; convert it first"
    return reason


def _refuse_unstorable_items(value: Mapping[Any, Any], path: str, depth: int) -> None:
    for key, item in value.items():
        if type(key) is not str:
            raise _unstorable(path, key, "is a key, and JSON's keys are text; convert it first")
        if not _is_unicode(key):
            raise _unstorable(path, key, "is a key with a lone surrogate, which is no Unicode text")
        # A key that is not shaped like a name may be data itself, so it does not go into an error.
        _refuse_unstorable(item, f"{path}.{key}" if _PLAIN_KEY(key) else f'{path}["…"]', depth + 1)


def _unstorable(path: str, value: Any, reason: str) -> UnstorableValueError:
    name = type(value).__name__
    return UnstorableValueError(f"The value at {path}, of type {name}, {reason}.", path=path, type_name=name)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
