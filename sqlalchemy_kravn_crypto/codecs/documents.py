"""JSON values to payload bytes and back, unchanged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from math import isfinite
from re import compile as compile_pattern
from typing import Any, Final, NoReturn

import orjson
import ormsgpack
from sqlalchemy import JSON

from ..exceptions import UnstorableValueError
from .base import MAX_INTEGER_BITS, PLAIN_KEY, Kind, unreadable, unstorable

MAX_DEPTH: Final = 254
"""How many lists and dicts may be nested in each other. What orjson writes, and well within what every reader takes."""

_JSON: Final = bytes([Kind.JSON])
_BIG_JSON: Final = bytes([Kind.BIG_JSON])
_JSON_KIND: Final = int(Kind.JSON)

# Looked up once and not for each value.
_dumps: Final = orjson.dumps
_loads: Final = orjson.loads
_packb: Final = ormsgpack.packb

# Nothing is converted on the quiet: what is no JSON value goes to `_builtin`, which knows subclasses of JSON's own
# types.
_ORJSON_OPTIONS: Final = (
    orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
)

# What orjson has no option for; it is asked first, so whatever it refuses does not get here.
_ORMSGPACK_OPTIONS: Final = (
    ormsgpack.OPT_PASSTHROUGH_ENUM | ormsgpack.OPT_PASSTHROUGH_TUPLE | ormsgpack.OPT_PASSTHROUGH_UUID
)

# A float of MessagePack is CB and 8 bytes of IEEE 754, big-endian; NaN and the infinities are those whose exponent, the
# 11 bits after the sign, is all ones. What else looks like that (it happens in integers) is decoded and compared.
_FLOAT: Final = 0xCB
_NOT_FINITE: Final = compile_pattern(rb"\xcb[\x7f\xff][\xf0-\xff]").search

# By the methods of the builtin types themselves, since a subclass may convert itself to something else.
_BUILTINS: Final[tuple[tuple[type[Any], Callable[[Any], Any]], ...]] = (
    (dict, dict),
    (list, list),
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)


def _refuse_constant(_: str) -> NoReturn:
    """Refuse NaN and the infinities, which Python's decoder takes for JSON."""
    raise ValueError


def _finite(text: str) -> float:
    """Return a number, unless Python makes an infinity of it, which orjson refuses."""
    number = float(text)
    if math.isinf(number):
        raise ValueError
    return number


_BIG_DECODER: Final = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant)


class JSONCodec:
    """Any JSON value, in and out unchanged.

    ``sqlalchemy.JSON.NULL`` is the JSON ``null`` at the top level; it comes back as ``None``.
    """

    def encode(self, value: Any) -> bytes:
        """Return the payload of a value.

        Equality is Python's, but for NaN: a tuple is not a list, and a member of a ``StrEnum`` is its text.

        :raises UnstorableValueError: if it would not come back equal.
        """
        try:
            encoded = _dumps(value, None, _ORJSON_OPTIONS)
            # What orjson writes as something else on the quiet, ormsgpack refuses (a tuple, a UUID, a member of an
            # Enum) or writes as it is (NaN, which orjson makes null). That costs a third of decoding and comparing.
            packed = _packb(value, None, _ORMSGPACK_OPTIONS)
            if _FLOAT not in packed or _NOT_FINITE(packed) is None:
                return _JSON + encoded
        except Exception:  # noqa: BLE001, S110 - whatever it is, what comes next tells what of it can be stored
            pass
        return _encode_checked(value)

    def decode(self, payload: bytes) -> Any:
        """Return the value of a payload.

        :raises MalformedPayloadError: if this codec did not write it.
        """
        try:
            kind = payload[0]
            if kind == _JSON_KIND:
                return _loads(payload[1:])
            if kind == Kind.BIG_JSON:
                value = _BIG_DECODER.decode(payload[1:].decode())
                # As orjson does, refuse half of a surrogate pair: it cannot be written again.
                json.dumps(value, ensure_ascii=False).encode()
                return value
        except (IndexError, ValueError, RecursionError):
            pass
        raise unreadable(payload, (Kind.JSON, Kind.BIG_JSON), "JSON")

    def same(self, one: Any, other: Any) -> bool:
        """Tell whether two values are stored alike, but for the order of keys.

        What cannot be stored is only like itself. 1, 1.0 and ``True`` are not the same.
        """
        if one is other:
            return True
        try:
            # Either alone is not enough: 1 == True, and NaN is written as None is.
            return bool(one == other) and _canonical(one) == _canonical(other)
        except Exception:  # noqa: BLE001 - a value's own class may raise anything, and is refused when it is written
            return False


def _canonical(value: Any) -> bytes | str:
    """Return the one text of a JSON value; may raise anything for what is none."""
    try:
        return orjson.dumps(value, _builtin, _ORJSON_OPTIONS | orjson.OPT_SORT_KEYS)
    except Exception:  # noqa: BLE001, S110 - integers beyond 64 bits, or nothing that can be stored
        pass
    # For JSON.NULL the text of a number, which is no bytes, and so not the same as that number.
    return json.dumps(value, sort_keys=True)


def _encode_checked(value: Any) -> bytes:
    """Encode what may not come back equal: decode it again and compare."""
    if value is JSON.NULL:
        return _JSON + b"null"
    encoded = b""
    try:
        encoded = orjson.dumps(value, _builtin, _ORJSON_OPTIONS)
        equal = orjson.loads(encoded) == value
    except Exception:  # noqa: BLE001 - a value's own class may raise anything, and SQLAlchemy would print the row
        equal = False
    return _JSON + encoded if equal else _BIG_JSON + _encode_big(value)


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
        raise error or unstorable("$", value, "would not come back equal")
    return encoded.encode()


def _first_unstorable(value: Any) -> UnstorableValueError | None:
    """Return the error for the first part of a value that JSON has no equal for; without recursion."""
    levels = [iter([("$", value, _why_unstorable(value))])]
    while levels:
        for path, part, reason in levels[-1]:
            if reason:
                return unstorable(path, part, reason)
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
            yield f"{path}.{key}" if PLAIN_KEY(key) else f'{path}["…"]', item, _why_unstorable(item)


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


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
