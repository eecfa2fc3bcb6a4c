"""JSON values whose changes in place are noticed at every depth."""

# A tracked dict has no public names but those of a dict, so this module uses private ones across its classes.
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Self, SupportsIndex, TypeVar
from weakref import ref

from sqlalchemy import event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.mutable import Mutable
from sqlalchemy.orm.attributes import InstrumentedAttribute, flag_modified
from sqlalchemy.orm.state import InstanceState
from sqlalchemy.types import TypeEngine, to_instance

from .exceptions import ColumnError

T = TypeVar("T")

_PICKLED = "sqlalchemy_kravn_crypto.mutable"


class MutableJSON(Mutable):
    """Makes the changes in place of a JSON column's values be written.

    .. code-block:: python

        credentials: Mapped[dict[str, Any]] = mapped_column(MutableJSON.as_mutable(EncryptedJSON))

        plugin.credentials["servers"][0]["token"] = "…"  # the next flush writes it

    The dicts and lists of a loaded or assigned value, at every depth, are then :class:`TrackedDict` and
    :class:`TrackedList`. Assigning copies: the dict that was assigned is not watched, the one that the attribute
    returns is. A scalar is stored like without tracking.

    Changes belong to an object of the session. They are noticed as long as there is that object: keep it, and not only
    its value.
    """

    @classmethod
    def as_mutable(cls, sqltype: type[TypeEngine[T]] | TypeEngine[T]) -> TypeEngine[T]:
        """Return the type, for one column whose values are tracked.

        :raises ColumnError: if its values are neither dicts nor lists; changes inside of a model cannot be noticed.
        """
        instance = to_instance(sqltype)
        python_type: Any = object
        with suppress(NotImplementedError):
            python_type = instance.python_type
        if python_type not in {dict, list, object}:
            raise ColumnError(
                f"MutableJSON tracks dicts and lists, not {getattr(python_type, '__name__', python_type)}. Leave it "
                "out, and assign a changed copy of the value instead of changing it in place."
            )
        return super().as_mutable(instance)

    @classmethod
    def associate_with_attribute(cls, attribute: InstrumentedAttribute[Any]) -> None:
        """Track the values of one mapped attribute."""
        listener = _Listener(attribute.key)
        for name, hear in (
            ("load", listener.load),
            # What SQLAlchemy's own mutable types hear of merge(load=False); it has no public name.
            ("_sa_event_merge_wo_load", listener.load),
            ("refresh", listener.refresh),
            ("refresh_flush", listener.refresh),
            ("pickle", listener.pickle),
            ("unpickle", listener.unpickle),
        ):
            event.listen(attribute.class_, name, hear, raw=True, propagate=True)
        event.listen(attribute, "set", listener.replace, raw=True, propagate=True, retval=True)


class _Listener:
    """Tracks what becomes the value of an attribute, and no longer what was."""

    __slots__ = ("key",)

    def __init__(self, key: str) -> None:
        self.key = key

    def load(self, state: InstanceState[Any], *_: Any) -> None:
        value = track(state.dict.get(self.key))
        if isinstance(value, _Tracked):
            state.dict[self.key] = value
            value._give_to(state, self.key)

    def refresh(self, state: InstanceState[Any], _: Any, attributes: Iterable[str] | None) -> None:
        if not attributes or self.key in attributes:
            self.load(state)

    def replace(self, state: InstanceState[Any], value: Any, old: Any, _: Any) -> Any:
        if value is old:
            return value
        if isinstance(old, _Tracked):
            old._take_from(state, self.key)
        tracked = track(value)
        if isinstance(tracked, _Tracked):
            tracked._give_to(state, self.key)
        return tracked

    def pickle(self, state: InstanceState[Any], pickled: dict[str, Any]) -> None:
        value = state.dict.get(self.key)
        if isinstance(value, _Tracked):
            pickled.setdefault(_PICKLED, {})[self.key] = value

    def unpickle(self, state: InstanceState[Any], pickled: dict[str, Any]) -> None:
        # The object has no attributes yet, hence the value beside its state.
        value = pickled.get(_PICKLED, {}).get(self.key)
        if value is not None:
            value._give_to(state, self.key)


class _Attribute:
    """The attribute of one object whose value a dict or list is, or was. It does not keep the object alive."""

    __slots__ = ("key", "replaced", "state")

    def __init__(self, state: InstanceState[Any], key: str) -> None:
        self.state = ref(state)
        self.key = key
        self.replaced = False

    def __call__(self) -> InstanceState[Any] | None:
        return self.state()

    def flag(self, root: _Tracked) -> bool:
        """Mark the attribute as changed; tell whether that is all right, and not the loss of a change.

        :param root: the value of which something changed.
        """
        state = self()
        owner = None if state is None else state.obj()
        if state is None or owner is None:
            return True
        current = state.dict.get(self.key)
        # A value that was replaced and not flushed yet is what the new one will be compared with.
        if current is root or (current is not None and state.committed_state.get(self.key) is root):
            flag_modified(owner, self.key)
            return True
        return self.replaced

    def __str__(self) -> str:
        state = self()
        return self.key if state is None else f"{state.class_.__name__}.{self.key}"


class _Tracked:
    """What tracked dicts and lists have in common: they know what they are in, weakly."""

    __slots__ = ()

    _links: tuple[Callable[[], Any], ...]
    """Lead to the dicts and lists that this one was put into, and to the attributes that it was given to."""

    def _changed(self) -> None:
        """Flag every attribute that this is part of the value of.

        :raises InvalidRequestError: if it is part of one's former value, so that the change would be lost.
        """
        reached: list[_Tracked] = [self]
        seen = {id(self)}
        lost = []
        for part in reached:
            for link in part._links:
                if isinstance(link, _Attribute):
                    if not link.flag(part) and _is_in(part, self):
                        lost.append(link)
                    continue
                holder = link()
                if holder is not None and id(holder) not in seen:
                    seen.add(id(holder))
                    reached.append(holder)
        if lost:
            raise InvalidRequestError(
                f"What was changed is no longer the value of {lost[0]}: it was loaded before a commit, rollback, "
                "refresh or expire, so the change would be lost. Read the attribute again, and change what it gives."
            )

    def _own(self, value: Any) -> Any:
        """Return a value as it goes into this dict or list."""
        value = track(value)
        if isinstance(value, _Tracked):
            value._link_to(self)
        return value

    def _link_to(self, holder: _Tracked) -> None:
        if all(link() is not holder for link in self._links):
            self._add(ref(holder))

    def _give_to(self, state: InstanceState[Any], key: str) -> None:
        for link in self._attributes(state, key):
            link.replaced = False
            return
        self._add(_Attribute(state, key))

    def _take_from(self, state: InstanceState[Any], key: str) -> None:
        for link in self._attributes(state, key):
            link.replaced = True

    def _attributes(self, state: InstanceState[Any], key: str) -> Iterator[_Attribute]:
        for link in self._links:
            if isinstance(link, _Attribute) and link.key == key and link() is state:
                yield link

    def _add(self, added: Callable[[], Any]) -> None:
        alive = [link for link in self._links if link() is not None]
        self._links = (*alive, added)  # type: ignore[misc] # a slot of the subclasses


class TrackedDict(_Tracked, dict[Any, Any]):
    """A dict whose changes are written. Printed like a dict, with what is in it."""

    __slots__ = ("__weakref__", "_links")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self._links = ()
        self.update(*args, **kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, self._own(value))
        self._changed()

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        self._changed()

    def __ior__(self, other: Any) -> Self:  # type: ignore[misc] # a dict's `|` takes less, and gives a plain dict
        self.update(other)
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Do as a dict does."""
        added = dict(*args, **kwargs)
        if added:
            super().update({key: self._own(value) for key, value in added.items()})
            self._changed()

    def setdefault(self, key: Any, default: Any = None, /) -> Any:
        """Do as a dict does."""
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, /, *default: Any) -> Any:
        """Do as a dict does."""
        was_there = key in self
        value = super().pop(key, *default)
        if was_there:
            self._changed()
        return value

    def popitem(self) -> tuple[Any, Any]:
        """Do as a dict does."""
        item = super().popitem()
        self._changed()
        return item

    def clear(self) -> None:
        """Do as a dict does."""
        if self:
            super().clear()
            self._changed()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return type(self), (), None, None, iter(self.items())


class TrackedList(_Tracked, list[Any]):
    """A list whose changes are written. Printed like a list, with what is in it."""

    __slots__ = ("__weakref__", "_links")

    def __init__(self, items: Iterable[Any] = (), /) -> None:
        super().__init__()
        self._links = ()
        self.extend(items)

    def __setitem__(self, index: Any, value: Any) -> None:
        owned = [self._own(item) for item in value] if isinstance(index, slice) else self._own(value)
        super().__setitem__(index, owned)
        self._changed()

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        super().__delitem__(index)
        self._changed()

    def __iadd__(self, items: Iterable[Any]) -> Self:  # type: ignore[misc] # as with dicts
        self.extend(items)
        return self

    def __imul__(self, count: SupportsIndex) -> Self:
        super().__imul__(count)
        self._changed()
        return self

    def append(self, item: Any, /) -> None:
        """Do as a list does."""
        super().append(self._own(item))
        self._changed()

    def extend(self, items: Iterable[Any], /) -> None:
        """Do as a list does."""
        owned = [self._own(item) for item in items]
        if owned:
            super().extend(owned)
            self._changed()

    def insert(self, index: SupportsIndex, item: Any, /) -> None:
        """Do as a list does."""
        super().insert(index, self._own(item))
        self._changed()

    def pop(self, index: SupportsIndex = -1, /) -> Any:
        """Do as a list does."""
        item = super().pop(index)
        self._changed()
        return item

    def remove(self, item: Any, /) -> None:
        """Do as a list does."""
        super().remove(item)
        self._changed()

    def clear(self) -> None:
        """Do as a list does."""
        if self:
            super().clear()
            self._changed()

    def sort(self, *, key: Any = None, reverse: bool = False) -> None:
        """Do as a list does."""
        try:
            super().sort(key=key, reverse=reverse)
        finally:
            # Items that cannot be compared leave the list half sorted.
            self._changed()

    def reverse(self) -> None:
        """Do as a list does."""
        super().reverse()
        self._changed()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return type(self), (), None, iter(self)


def track(value: Any) -> Any:
    """Return a copy of a dict or list that is tracked, with all that is in it; anything else as it is.

    What is tracked already stays the same object, so that what holds it twice sees its changes twice.
    """
    if isinstance(value, _Tracked) or not isinstance(value, (dict, list)):
        return value
    root = _empty(value)
    twins: dict[int, _Tracked] = {id(value): root}
    # Without recursion, and each part once: a value may be nested deeply or contain itself until a codec refuses it.
    copied: list[tuple[Any, _Tracked]] = [(value, root)]
    for part, twin in copied:
        link = (ref(twin),)

        def adopted(item: Any, twin: _Tracked = twin, link: Any = link) -> Any:
            if not isinstance(item, (dict, list)):
                return item
            child = item if isinstance(item, _Tracked) else twins.get(id(item))
            if child is None:
                child = twins[id(item)] = _empty(item)
                child._links = link
                copied.append((item, child))
            else:
                child._link_to(twin)
            return child

        if isinstance(twin, dict):
            dict.update(twin, {key: adopted(item) for key, item in part.items()})
        else:
            list.extend(twin, [adopted(item) for item in part])  # type: ignore[arg-type] # the other kind
    return root


def _empty(value: dict[Any, Any] | list[Any]) -> TrackedDict | TrackedList:
    return TrackedDict() if isinstance(value, dict) else TrackedList()


def _is_in(root: _Tracked, sought: _Tracked) -> bool:
    """Tell whether a dict or list is a part of another, and not only was."""
    parts: list[Any] = [root]
    seen = {id(root)}
    for part in parts:
        if part is sought:
            return True
        for item in part.values() if isinstance(part, dict) else part:
            if isinstance(item, _Tracked) and id(item) not in seen:
                seen.add(id(item))
                parts.append(item)
    return False
