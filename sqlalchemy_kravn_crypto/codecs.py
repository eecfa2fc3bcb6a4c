"""Python value to payload bytes and back: the same value, or an error.

A payload starts with one byte that names its kind, so that a value of one kind never loads as another:

.. code-block:: text

    01  JSON
    02  JSON that needs Python's own decoder: integers beyond 64 bits
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from math import isfinite
from re import compile as compile_pattern
from typing import Any, Final, NoReturn, Protocol

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

# By the methods of the builtin types themselves, since a subclass may convert itself to something else.
_BUILTINS: Final[tuple[tuple[type[Any], Callable[[Any], Any]], ...]] = (
    (dict, dict),
    (list, list),
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)

_PLAIN_KEY: Final = compile_pattern(r"[A-Za-z_][A-Za-z0-9_]{0,63}").fullmatch


def _refuse_constant(_: str) -> NoReturn:
    """Refuse NaN and the infinities, which Python's decoder takes for JSON."""
    raise ValueError


_BIG_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)


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
        encoded, equal = b"", False
        try:
            encoded = orjson.dumps(value, _builtin, _ORJSON_OPTIONS)
            equal = orjson.loads(encoded) == value
        except Exception:  # noqa: BLE001 - a value's own class may raise anything, and SQLAlchemy would print the row
            equal = False
        return _JSON + encoded if equal else _BIG_JSON + _encode_big(value)

    def decode(self, payload: bytes) -> Any:
        """Return the value of a payload.

        :raises MalformedPayloadError: if this codec did not write it.
        """
        kind = payload[0] if payload else None
        try:
            if kind == _JSON_KIND:
                return orjson.loads(payload[1:])
            if kind == _BIG_JSON_KIND:
                return _BIG_DECODER.decode(payload[1:].decode())
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
        for builtin, converted in _BUILTINS:
            if isinstance(value, builtin):
                return converted(value)
    raise TypeError


def _encode_big(value: Any) -> bytes:
    """Encode what orjson did not, or say what in it cannot be stored, and where."""
    error, encoded, equal = None, "", False
    try:
        error = _first_unstorable(value)
        if error is None:
            encoded = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
            equal = json.loads(encoded) == value
    except Exception:  # noqa: BLE001 - as above; RecursionError among them, where the caller's stack is deep already
        equal = False
    if not equal:
        raise error or _unstorable("$", value, "would not come back equal")
    return encoded.encode()


def _first_unstorable(value: Any) -> UnstorableValueError | None:
    """Return the error for the first part of a value that JSON has no equal for; without recursion."""
    levels = [iter([("$", value, _why_unstorable(value))])]
    while levels:
        for path, part, reason in levels[-1]:
            if reason:
                return _unstorable(path, part, reason)
            if isinstance(part, (dict, list)):
                if len(levels) > MAX_DEPTH:
                    return UnstorableValueError(
                        f"The value is nested more than {MAX_DEPTH} levels deep, or contains itself; it is not stored.",
                        type_name=type(part).__name__,
                    )
                levels.append(_parts(path, part))
                break
        else:
            levels.pop()
    return None


def _parts(path: str, value: dict[Any, Any] | list[Any]) -> Iterator[tuple[str, Any, str]]:
    """Return where each part of a dict or list is, the part, and why it cannot be stored if it cannot."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item, _why_unstorable(item)
        return
    for key, item in value.items():
        if type(key) is not str:
            yield path, key, "is a key, and JSON's keys are text; convert it first"
        elif not _is_unicode(key):
            yield path, key, "is a key with a lone surrogate, which is no Unicode text"
        else:
            # A key that is not shaped like a name may be data itself, so it does not go into an error.
            yield f"{path}.{key}" if _PLAIN_KEY(key) else f'{path}["…"]', item, _why_unstorable(item)


def _why_unstorable(value: Any) -> str:
    """Say why JSON has no equal for a value, leaving out what is in a dict or list; empty if it has one."""
    reason = ""
    if value is JSON.NULL:
        reason = "stands for a whole column; use None inside of a value"
    elif isinstance(value, str):
        reason = "" if _is_unicode(value) else "holds a lone surrogate, which is no Unicode text"
    elif isinstance(value, int):
        reason = "" if value.bit_length() <= MAX_INTEGER_BITS else f"has more than {MAX_INTEGER_BITS:,} bits"
    elif isinstance(value, float):
        reason = "" if isfinite(value) else "is NaN or infinite, which JSON cannot express"
    elif value is not None and not isinstance(value, (dict, list)):
        reason = "would not come back equal from JSON; convert it first"
    return reason


def _unstorable(path: str, value: Any, reason: str) -> UnstorableValueError:
    name = type(value).__name__
    return UnstorableValueError(f"The value at {path}, of type {name}, {reason}.", path=path, type_name=name)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
