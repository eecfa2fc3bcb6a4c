"""Objects that pydantic knows to payload bytes and back: models, dataclasses, typed dicts, and what is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from ..exceptions import ColumnError, MalformedPayloadError, MissingExtraError
from .base import PLAIN_KEY, unstorable
from .documents import JSONCodec

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_JSON = JSONCodec()


class ObjectCodec:
    """The values of a Python type, as the JSON that pydantic makes of them.

    They load as objects again. What is not equal to what would load is refused: a secret that is dumped as asterisks, a
    field that is left out, an object of a subclass or without ``__eq__``.

    :param python_type: a pydantic model, a dataclass, a ``TypedDict``, or any type expression with a schema of
        pydantic's, such as ``list[Profile]``.
    """

    def __init__(self, python_type: Any) -> None:
        self._python_type = python_type
        self._name = python_type.__name__ if isinstance(python_type, type) else repr(python_type)
        self._cached: TypeAdapter[Any] | None = None

    def encode(self, value: Any) -> bytes:
        """Return the payload of a value.

        :raises UnstorableValueError: if it would not come back equal.
        :raises ColumnError: if the type has no schema.
        """
        dumped, failure = self._dumped(value)
        if failure:
            raise unstorable("$", value, f"cannot be dumped as {self._name}: {failure}")
        payload = _JSON.encode(dumped)
        loaded, failure = self._loaded(payload)
        if not failure:
            equal, failure = _are_equal(loaded, value)
            failure = failure or ("" if equal else "what loads is not equal to it")
        if failure:
            raise unstorable("$", value, f"would not come back equal as {self._name}: {failure}")
        return payload

    def decode(self, payload: bytes) -> Any:
        """Return the value of a payload.

        :raises MalformedPayloadError: if this codec did not write it, or it does not fit the type any more.
        :raises ColumnError: if the type has no schema.
        """
        # Stricter than pydantic, which takes NaN for JSON.
        _JSON.decode(payload)
        value, failure = self._loaded(payload)
        if failure:
            raise MalformedPayloadError(f"The value decrypts, but does not fit {self._name}: {failure}.")
        return value

    def same(self, one: Any, other: Any) -> bool:
        """Tell whether two values are equal and stored alike; what cannot be dumped is only like itself."""
        if one is other:
            return True
        if not _are_equal(one, other)[0]:
            return False
        (dumped, failure), (other_dumped, other_failure) = self._dumped(one), self._dumped(other)
        if failure or other_failure:
            return False
        # Equal sets may be dumped in different orders.
        return _JSON.same(dumped, other_dumped) or _JSON.same(
            self._in_order(one, dumped), self._in_order(other, other_dumped)
        )

    def _in_order(self, value: Any, dumped: Any) -> Any:
        """Return the JSON values of a value with those of its sets sorted."""
        plain, failure = self._dumped(value, mode="python")
        return dumped if failure else _sets_sorted(plain, dumped)

    def _dumped(self, value: Any, *, mode: Literal["json", "python"] = "json") -> tuple[Any, str]:
        """Return a value as JSON values, or why it cannot be; in the other mode, as Python's."""
        adapter = self._adapter()
        try:
            # For reading it again: without computed fields, and JSON in a field stays text.
            return adapter.dump_python(value, mode=mode, by_alias=True, round_trip=True, warnings="error"), ""
        except Exception as error:  # noqa: BLE001 - serializers are the user's code, and pydantic's errors hold the value
            return None, f"pydantic raises {type(error).__name__}"

    def _loaded(self, payload: bytes) -> tuple[Any, str]:
        """Return the value of a payload of JSON, or why it has none."""
        adapter = self._adapter()
        try:
            return adapter.validate_json(payload[1:]), ""
        except Exception as error:  # noqa: BLE001 - validators are the user's code, and pydantic's errors hold the value
            return None, _summary(error)

    def _adapter(self) -> TypeAdapter[Any]:
        """Return pydantic's adapter, made at the first use: types may refer to some that are declared after the column.

        :raises ColumnError: if pydantic has no schema for the type.
        :raises MissingExtraError: if pydantic is not installed.
        """
        if self._cached is not None:
            return self._cached
        adapter = _adapter_class()
        try:
            self._cached = adapter(self._python_type)
        except Exception as error:  # noqa: BLE001 - pydantic's, or that of the user's __get_pydantic_core_schema__
            failure = type(error).__name__
        else:
            return self._cached
        raise ColumnError(
            f"{self._name} cannot be the type of encrypted values: pydantic raises {failure} for it. Give a pydantic "
            "model, a dataclass, a TypedDict (of typing_extensions before Python 3.12), or a type made of them."
        )


def _adapter_class() -> type[TypeAdapter[Any]]:
    try:
        from pydantic import TypeAdapter  # noqa: PLC0415 - slow, and few columns need it
    except ImportError:
        pass
    else:
        return TypeAdapter
    raise MissingExtraError("Columns of objects need pydantic, which is not installed. Run: pip install pydantic")


def _are_equal(one: Any, other: Any) -> tuple[bool, str]:
    """Tell whether two values are equal, and what comparing them raises."""
    try:
        return bool(one == other), ""
    except Exception as error:  # noqa: BLE001 - the user's __eq__
        return False, f"comparing them raises {type(error).__name__}"


def _sets_sorted(plain: Any, dumped: Any) -> Any:
    """Return JSON values with the elements of sets in one order, whatever order those had.

    :param plain: the same value as Python's own types, which tells where there are sets.
    """
    if isinstance(plain, set | frozenset) and isinstance(dumped, list):
        return sorted(dumped, key=repr)
    if isinstance(plain, dict) and isinstance(dumped, dict) and len(plain) == len(dumped):
        return {key: _sets_sorted(of, part) for of, (key, part) in zip(plain.values(), dumped.items(), strict=True)}
    if isinstance(plain, list | tuple) and isinstance(dumped, list) and len(plain) == len(dumped):
        return [_sets_sorted(of, part) for of, part in zip(plain, dumped, strict=True)]
    return dumped


def _summary(error: Exception) -> str:
    """Say what pydantic or a validator raised, without the value, which is in pydantic's messages."""
    from pydantic_core import ValidationError, core_schema  # noqa: PLC0415 - as above

    if not isinstance(error, ValidationError):
        return f"a validator raises {type(error).__name__}"
    count = error.error_count()
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = "".join(map(_step, first["loc"]))
    # A validator may make up types of errors, of the value perhaps.
    kind = first["type"] if first["type"] in get_args(core_schema.ErrorType) else "of a validator's own"
    return f"{count} error{'s' if count > 1 else ''}, the first at ${place} ({kind})"


def _step(key: int | str) -> str:
    if isinstance(key, int):
        return f"[{key}]"
    return f".{key}" if PLAIN_KEY(key) else '["…"]'
