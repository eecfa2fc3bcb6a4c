"""Which codec serves for a SQLAlchemy type."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import types
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from ..exceptions import ColumnError, MalformedPayloadError, UnstorableValueError
from .base import Codec, unstorable
from .documents import JSONCodec
from .scalars import (
    BooleanCodec,
    BytesCodec,
    DateCodec,
    DateTimeCodec,
    DecimalCodec,
    EnumCodec,
    FloatCodec,
    IntegerCodec,
    IntervalCodec,
    TextCodec,
    TimeCodec,
    UuidCodec,
)

# The payload is the same on every database, so what depends on one is asked of none of them.
_DIALECT: Final = DefaultDialect()

_OVERRIDES: Final = ("bind_processor", "result_processor", "bind_expression", "column_expression")


def codec_for(type_: TypeEngine[Any] | type[TypeEngine[Any]]) -> Codec:
    """Return the codec for the values of a SQLAlchemy type.

    Sizes that the type declares, as in ``String(50)`` and ``Numeric(10, 2)``, are not enforced: all is stored whole.

    :param type_: the class or an instance: of SQLAlchemy's own types, those of its dialects, or a ``TypeDecorator``.
    :raises ColumnError: if there is none; it says what to use instead.
    """
    instance = _instance(type_)
    reason = _why_refused(instance)
    if reason:
        raise ColumnError(f"{_name(instance)} cannot be the type of encrypted values: {reason}.")
    if isinstance(instance, TypeDecorator) and not isinstance(instance, types.Interval):
        return DecoratedCodec(instance)
    for classes, make in _CODECS:
        if isinstance(instance, classes):
            return make(instance)
    # Types of a dialect that have no base in common with SQLAlchemy's own: PostgreSQL's INTERVAL, MySQL's LONGBLOB.
    python_type = _python_type(instance)
    if python_type is timedelta:
        return IntervalCodec()
    if python_type is bytes:
        return BytesCodec()
    raise ColumnError(
        f"{_name(instance)} cannot be the type of encrypted values: it is not known what its values are. Use one of "
        "SQLAlchemy's generic types, such as String, JSON or LargeBinary, or a TypeDecorator around one."
    )


class DecoratedCodec:
    """The values of a ``TypeDecorator``: converted by its own methods, around the codec of the type that it decorates.

    What its methods convert to something else loads as that, as it does without encryption.

    :raises ColumnError: if there is no codec for the type that it decorates.
    """

    def __init__(self, decorator: TypeDecorator[Any]) -> None:
        overridden = type(decorator)
        self._decorator = decorator
        self._binds = overridden.process_bind_param is not TypeDecorator.process_bind_param
        self._converts = overridden.process_result_value is not TypeDecorator.process_result_value
        self._name = _name(decorator)
        self._codec = codec_for(_decorated(decorator))

    def encode(self, value: Any) -> bytes:
        """Return the payload of a value.

        :raises UnstorableValueError: if the decorator refuses it, or what it makes of it would not come back equal.
        """
        return self._codec.encode(self._bound(value))

    def decode(self, payload: bytes) -> Any:
        """Return the value of a payload.

        :raises MalformedPayloadError: if this codec did not write it, or the decorator refuses it.
        """
        value = self._codec.decode(payload)
        if not self._converts:
            return value
        try:
            return self._decorator.process_result_value(value, _DIALECT)
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything, with the value in it
            failure = type(error).__name__
        raise MalformedPayloadError(
            f"The value decrypts, but {self._name}.process_result_value does not take it: it raises {failure}."
        )

    def same(self, one: Any, other: Any) -> bool:
        """Tell whether two values are stored alike; what cannot be stored is only like itself."""
        if one is other:
            return True
        try:
            return self._codec.same(self._bound(one), self._bound(other))
        except UnstorableValueError:
            return False

    def _bound(self, value: Any) -> Any:
        if not self._binds:
            return value
        try:
            bound = self._decorator.process_bind_param(value, _DIALECT)
            reason = "becomes None" if bound is None else ""
        except Exception as error:  # noqa: BLE001 - as above
            bound, reason = None, f"makes it raise {type(error).__name__}"
        if reason:
            raise unstorable("$", value, f"is not stored, since {self._name}.process_bind_param {reason}")
        return bound


def _enum_codec(type_: types.Enum) -> Codec:
    if not type_.enums:
        raise ColumnError("An encrypted Enum needs its members: Enum(Colour), or Enum('red', 'green').")
    untyped: Any = type_
    load = untyped.result_processor(_DIALECT, None)
    return EnumCodec({text: load(text) for text in type_.enums})


def _time_codec(type_: types.Time) -> Codec:
    if type_.timezone:
        raise ColumnError(
            "Time(timezone=True) cannot be the type of encrypted values: the offset from UTC of a time without its "
            "date is seldom known. Use Time, or DateTime(timezone=True)."
        )
    return TimeCodec()


def _number_codec(type_: types.Numeric[Any] | types.Float[Any]) -> Codec:
    return DecimalCodec() if type_.asdecimal else FloatCodec()


# The first that fits: an Enum is a String, too.
_CODECS: Final[tuple[tuple[type[Any] | tuple[type[Any], ...], Callable[[Any], Codec]], ...]] = (
    (types.Enum, _enum_codec),
    (types.Interval, lambda _: IntervalCodec()),
    (types.Boolean, lambda _: BooleanCodec()),
    ((types.Float, types.Numeric), _number_codec),
    (types.Integer, lambda _: IntegerCodec()),
    (types.DateTime, lambda type_: DateTimeCodec(aware=bool(type_.timezone))),
    (types.Date, lambda _: DateCodec()),
    (types.Time, _time_codec),
    (types.Uuid, lambda type_: UuidCodec(as_text=not type_.as_uuid)),
    (types.LargeBinary, lambda _: BytesCodec()),
    (types.String, lambda _: TextCodec()),
    (types.JSON, lambda _: JSONCodec()),
)


def _instance(type_: Any) -> TypeEngine[Any]:
    """Return a type, or an instance of a class of types."""
    try:
        instance = type_() if isinstance(type_, type) and issubclass(type_, TypeEngine) else type_
    except Exception:  # noqa: BLE001 - the constructor of a user's class
        instance = None
    if isinstance(instance, TypeEngine):
        return instance
    if isinstance(type_, type) and issubclass(type_, TypeEngine):
        raise ColumnError(f"{type_.__name__} cannot be made without arguments; give an instance of it.")
    raise ColumnError("The type of encrypted values must be a SQLAlchemy type, such as String or Numeric(10, 2).")


def _decorated(decorator: TypeDecorator[Any]) -> TypeEngine[Any]:
    """Return what a decorator decorates where no database has a say."""
    try:
        return decorator.load_dialect_impl(_DIALECT)
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        failure = type(error).__name__
    raise ColumnError(
        f"{_name(decorator)} cannot be the type of encrypted values: its load_dialect_impl raises {failure} for a "
        "dialect that it does not know."
    )


def _why_refused(type_: TypeEngine[Any]) -> str:
    """Say what is wrong with a type whose values a codec might otherwise be found for; empty if nothing is."""
    override = next((name for name in _OVERRIDES if not _is_sqlalchemys(type_, name)), None)
    reason = ""
    if hasattr(type_, "column_name") and hasattr(type_, "storage"):
        reason = "it is an encrypted type already. Declare the column with it, or give the type of the plain values"
    elif getattr(type_, "_variant_mapping", None):
        reason = "it has variants, and the payload is the same on every database. Give it without with_variant"
    elif isinstance(type_, types.PickleType):
        reason = (
            "loading a pickle runs what is in it. Use JSON, or the type of the objects where it is a dataclass or a "
            "pydantic model"
        )
    elif isinstance(type_, types.ARRAY):
        reason = "use JSON, which holds lists"
    elif isinstance(type_, types.NullType):
        reason = "it says nothing about the values. Give their type"
    elif override:
        reason = (
            f"its {override} would not be called, so values would not be converted. Use a TypeDecorator with "
            "process_bind_param and process_result_value"
        )
    elif {types.Integer, types.Numeric} <= set(type(type_).__mro__):
        reason = "its values are integers or decimals, depending on the database. Use Integer or Numeric"
    return reason


def _is_sqlalchemys(type_: TypeEngine[Any], method: str) -> bool:
    """Tell whether a type has a method from SQLAlchemy; for a string type not from a dialect, as MySQL's SET has."""
    module = next((found.__module__ for found in type(type_).__mro__ if method in vars(found)), "sqlalchemy.sql.")
    return module.startswith("sqlalchemy.sql." if isinstance(type_, types.String) else "sqlalchemy.")


def _python_type(type_: TypeEngine[Any]) -> type[Any] | None:
    try:
        return type_.python_type
    except Exception:  # noqa: BLE001 - most have none, and a user's class may raise anything
        return None


def _name(type_: TypeEngine[Any]) -> str:
    return type(type_).__name__
