"""Changes in place, at every depth, on both databases."""

import asyncio
import copy
import gc
import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pydantic
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import JSON, Engine, ForeignKey, create_engine, event, insert, inspect, select, text, update
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, deferred, mapped_column

from sqlalchemy_kravn_crypto import DataKey, EncryptedJSON, Keyring, use_keyring
from sqlalchemy_kravn_crypto.exceptions import ColumnError, UnstorableValueError
from sqlalchemy_kravn_crypto.mutable import MutableJSON, TrackedDict, TrackedList, track
from tests.fixtures_postgres import asynchronous

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For tests that need a session, but concern no database."""

VALUE = {"a": {"b": [1, {"c": None}]}, "numbers": [3, 1, 2], "empty": {}}


class Base(DeclarativeBase):
    pass


class HasNotes:
    notes: Mapped[list[Any] | None] = mapped_column(MutableJSON.as_mutable(EncryptedJSON(storage="text")))


class Plugin(HasNotes, Base):
    __tablename__ = "plugin"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    x: Mapped[Any] = mapped_column(MutableJSON.as_mutable(EncryptedJSON), nullable=True)
    y: Mapped[Any] = mapped_column(MutableJSON.as_mutable(EncryptedJSON()), insert_default=lambda: {"list": []})


class Animal(Base):
    __tablename__ = "animal"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    x: Mapped[Any] = mapped_column(MutableJSON.as_mutable(EncryptedJSON))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012 - SQLAlchemy's


class Dog(Animal):
    __tablename__ = "dog"

    id: Mapped[int] = mapped_column(ForeignKey(Animal.id), primary_key=True)
    tricks: Mapped[Any] = mapped_column(MutableJSON.as_mutable(EncryptedJSON))
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012 - SQLAlchemy's


class Datum(MappedAsDataclass, Base):
    __tablename__ = "datum"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    x: Mapped[dict[str, Any]] = mapped_column(
        MutableJSON.as_mutable(EncryptedJSON), default_factory=lambda: {"a": []}, repr=False
    )


class Lazy(Base):
    __tablename__ = "lazy"

    id: Mapped[int] = mapped_column(primary_key=True)
    x: Mapped[Any] = deferred(mapped_column(MutableJSON.as_mutable(EncryptedJSON)))


@pytest.fixture(autouse=True)
def _keyring() -> Iterator[None]:
    with use_keyring(Keyring(DataKey.generate())):
        yield


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = create_engine(database_url)
    Base.metadata.create_all(made)
    yield made
    made.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as made:
        yield made


@pytest.fixture
def updates(engine: Engine) -> list[str]:
    """Collect the UPDATE statements that are sent."""
    found: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def _(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE"):
            found.append(statement)

    return found


def added(session: Session, x: Any = VALUE, **values: Any) -> Plugin:
    plugin = Plugin(x=copy.deepcopy(x), **values)
    session.add(plugin)
    session.commit()
    return plugin


def stored(session: Session) -> Any:
    """Return what the next process would load."""
    with Session(session.get_bind()) as other:
        return other.scalars(select(Plugin.x)).one()


# --- Every mutator ---------------------------------------------------------------------------------------------------


def _operator_or(value: Any) -> None:
    value["a"] |= {"new": [1]}


def _operator_or_pairs(value: Any) -> None:
    value["a"] |= [("new", [1])]


def _operator_add(value: Any) -> None:
    value["numbers"] += (4, [5])


def _operator_multiply(value: Any) -> None:
    value["a"]["b"] *= 2


def _set_slice(value: Any) -> None:
    value["numbers"][0:2] = ({"x": []} for _ in range(3))


def _set_step(value: Any) -> None:
    value["numbers"][::2] = [[], {}]


def _delete_slice(value: Any) -> None:
    del value["a"]["b"][:1]


def _delete_item(value: Any) -> None:
    del value["numbers"][-1]


def _delete_key(value: Any) -> None:
    del value["a"]["b"][1]["c"]


def _replace_then_change(value: Any) -> None:
    value["a"] = {"deep": [{}]}
    value["a"]["deep"][0]["x"] = 1


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "set": lambda value: value["a"]["b"][1].__setitem__("c", [{}]),
    "update": lambda value: value["a"].update({"new": {"x": []}}, more=1),
    "update with pairs": lambda value: value["a"].update([("new", 1)]),
    "setdefault": lambda value: value["a"].setdefault("new", []).append(1),
    "setdefault to None": lambda value: value["a"].setdefault("new"),
    "pop key": lambda value: value["a"].pop("b"),
    "popitem": lambda value: value["a"].popitem(),
    "clear dict": lambda value: value["a"].clear(),
    "append": lambda value: value["a"]["b"].append({"new": []}),
    "extend": lambda value: value["a"]["b"].extend(iter([[], {}])),
    "extend by itself": lambda value: value["numbers"].extend(value["numbers"]),
    "insert": lambda value: value["a"]["b"].insert(0, {}),
    "pop": lambda value: value["a"]["b"].pop(),
    "pop index": lambda value: value["a"]["b"].pop(0),
    "remove": lambda value: value["a"]["b"].remove({"c": None}),
    "clear list": lambda value: value["a"]["b"].clear(),
    "sort": lambda value: value["numbers"].sort(),
    "sort by key": lambda value: value["numbers"].sort(key=lambda number: -number, reverse=True),
    "reverse": lambda value: value["a"]["b"].reverse(),
    "set item": lambda value: value["a"]["b"].__setitem__(-1, {"x": []}),
    "|=": _operator_or,
    "|= with pairs": _operator_or_pairs,
    "+=": _operator_add,
    "*=": _operator_multiply,
    "set slice": _set_slice,
    "set with a step": _set_step,
    "delete slice": _delete_slice,
    "delete item": _delete_item,
    "delete key": _delete_key,
    "replace, then change": _replace_then_change,
}


@on_sqlite
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutator_is_written(session: Session, updates: list[str], mutation: str) -> None:
    plugin = added(session)
    expected = copy.deepcopy(VALUE)
    assert MUTATIONS[mutation](plugin.x) == MUTATIONS[mutation](expected)
    assert plugin in session.dirty
    session.commit()
    assert len(updates) == 1
    assert plugin.x == stored(session) == expected
    session.commit()
    assert len(updates) == 1


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_a_mutator_puts_in_is_tracked(mutation: str) -> None:
    value = track(VALUE)
    MUTATIONS[mutation](value)
    assert_tracked(value)


def assert_tracked(value: Any) -> None:
    if isinstance(value, dict | list):
        assert type(value) in {TrackedDict, TrackedList}
        for part in value.values() if isinstance(value, dict) else value:
            assert_tracked(part)


@on_sqlite
@pytest.mark.parametrize(
    "read",
    [
        repr,
        len,
        list,
        json.dumps,
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        lambda value: value == VALUE,
        lambda value: value["a"]["b"][1].get("c"),
        lambda value: [*value.items(), *value.keys(), *value.values()],
        lambda value: value["numbers"] + [1],
        lambda value: value["numbers"][:] * 2,
        lambda value: sorted(value["numbers"]),
        lambda value: value | {"more": 1},
        lambda value: value.copy(),
        lambda value: value["numbers"].copy().append(1),
        lambda value: value.setdefault("a", 1),
        lambda value: value.pop("not there", None),
        lambda value: value.update(),
        lambda value: value["empty"].clear(),
        lambda value: value["numbers"].extend([]),
    ],
)
def test_reading_changes_nothing(session: Session, updates: list[str], read: Callable[[Any], Any]) -> None:
    plugin = added(session)
    read(plugin.x)
    assert plugin not in session.dirty
    session.commit()
    assert updates == []


def test_what_fails_changes_nothing(session: Session) -> None:
    plugin = added(session)
    with pytest.raises(KeyError):
        plugin.x.pop("not there")
    with pytest.raises(KeyError):
        del plugin.x["not there"]
    with pytest.raises(KeyError):
        plugin.x["empty"].popitem()
    with pytest.raises(IndexError):
        plugin.x["numbers"][9] = []
    with pytest.raises(ValueError, match="x not in list"):
        plugin.x["numbers"].remove(9)
    with pytest.raises(ValueError, match="extended slice"):
        plugin.x["numbers"][::2] = [[]]
    with pytest.raises(TypeError):
        plugin.x.update(5)
    with pytest.raises(ZeroDivisionError):
        plugin.x["numbers"].extend(1 // 0 for _ in range(2))
    assert plugin.x == VALUE
    assert plugin not in session.dirty


def test_a_list_that_could_not_be_sorted_to_the_end_is_written_as_it_is(session: Session) -> None:
    plugin = added(session, [3, 2, 1, "x"])
    with pytest.raises(TypeError):
        plugin.x.sort()
    session.commit()
    assert plugin.x == stored(session)


# --- Assignment ------------------------------------------------------------------------------------------------------


def test_assigning_an_equal_value_writes_nothing(session: Session, updates: list[str]) -> None:
    plugin = added(session)
    assert plugin.x == VALUE
    for equal in (copy.deepcopy(VALUE), plugin.x, copy.deepcopy(plugin.x), OrderedDict(plugin.x)):
        plugin.x = equal
        assert not inspect(plugin).attrs.x.history.has_changes()
        session.commit()
        assert plugin.x == VALUE
    assert updates == []


@on_sqlite
@pytest.mark.parametrize(("before", "after"), [(1, True), (1, 1.0), ([0], [False]), ({"a": 1}, {"a": 1.0})])
def test_assigning_an_equal_value_of_another_type_is_written(session: Session, before: Any, after: Any) -> None:
    plugin = added(session, before)
    assert plugin.x == before
    plugin.x = after
    session.commit()
    assert repr(stored(session)) == repr(after)


@on_sqlite
@pytest.mark.parametrize("value", [None, JSON.NULL, "text", 0, 5, 1.5, True, False, 2**70, [], {}])
def test_any_json_value_is_stored_and_can_be_replaced(session: Session, value: Any) -> None:
    plugin = added(session)
    plugin.x = value
    session.commit()
    expected = None if value is JSON.NULL else value
    assert plugin.x == stored(session) == expected
    session.refresh(plugin)
    plugin.x = [value] if isinstance(value, dict | list) else []
    plugin.x.append(1)
    session.commit()
    assert plugin.x == stored(session)


def test_none_is_null_and_json_null_is_not(session: Session) -> None:
    added(session, None)
    added(session, JSON.NULL)
    assert session.scalars(text("SELECT x IS NULL FROM plugin ORDER BY id")).all() == [True, False]


def test_what_was_assigned_is_copied(session: Session) -> None:
    mine: dict[str, Any] = {"a": []}
    plugin = added(session, None)
    plugin.x = mine
    mine["a"].append(1)
    assert plugin.x == {"a": []}
    assert type(mine) is dict
    assert type(mine["a"]) is list


def test_subclasses_are_tracked_like_what_they_are_of(session: Session) -> None:
    plugin = added(session, OrderedDict(a=OrderedDict(b=[])))
    plugin.x = OrderedDict(a=OrderedDict(b=[]))
    assert_tracked(plugin.x)


def test_a_value_that_cannot_be_stored_fails_when_it_is_written(session: Session) -> None:
    endless: list[Any] = []
    endless.append({"again": endless})
    plugin = added(session)
    for value in ({1: 2}, [{1, 2}], object(), endless):
        plugin.x = value
        with pytest.raises(UnstorableValueError):
            session.commit()
        session.rollback()
    plugin.x["a"]["self"] = plugin.x
    plugin.x["a"]["b"].append(1)
    with pytest.raises(UnstorableValueError):
        session.commit()
    session.rollback()
    assert plugin.x == VALUE


@on_sqlite
@pytest.mark.parametrize("depth", [250, 254, 255, 100_000])
def test_depth_is_limited_by_the_codec_alone(session: Session, depth: int) -> None:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    plugin = added(session, None)
    plugin.x = value
    try:
        if depth > 254:
            with pytest.raises(UnstorableValueError, match="254 levels"):
                session.commit()
            return
        session.commit()
        innermost = plugin.x
        for _ in range(depth - 1):
            innermost = innermost[0]
        innermost.append("x")
        session.commit()
        assert repr(stored(session)).count("[") == depth
    finally:
        while value:
            value = value.pop()


# --- What belongs to whom --------------------------------------------------------------------------------------------


def test_a_part_of_two_values_changes_both(session: Session, updates: list[str]) -> None:
    one, other = added(session), Plugin(x={})
    session.add(other)
    session.flush()
    other.x["shared"] = one.x["a"]
    session.commit()
    one.x, other.x = {"a": {"b": []}}, {}
    other.x["shared"] = one.x["a"]
    session.flush()
    updates.clear()
    one.x["a"]["b"].append(1)
    assert {*session.dirty} == {one, other}
    session.commit()
    assert one.x == {"a": {"b": [1]}}
    assert other.x == {"shared": {"b": [1]}}


def test_a_value_of_two_attributes_changes_both(session: Session) -> None:
    plugin = added(session)
    plugin.y = plugin.x
    session.flush()
    plugin.x["a"]["b"].append("x")
    session.commit()
    assert plugin.x == plugin.y
    assert plugin.y["a"]["b"][-1] == "x"


def test_a_part_twice_in_a_value_stays_one(session: Session) -> None:
    twice: list[Any] = []
    plugin = added(session, None)
    plugin.x = [twice, {"x": twice}]
    plugin.x[0].append(1)
    assert plugin.x == [[1], {"x": [1]}]


def test_a_removed_part_is_nobodys(session: Session) -> None:
    plugin = added(session)
    removed = plugin.x.pop("a")
    session.commit()
    removed["b"].append(1)
    session.refresh(plugin)
    removed["b"].append(1)
    session.commit()
    assert stored(session) == {"numbers": [3, 1, 2], "empty": {}}


def test_a_replaced_value_is_nobodys(session: Session, updates: list[str]) -> None:
    plugin = added(session)
    old = plugin.x
    plugin.x = {"new": 1}
    old["a"]["b"].append(1)
    session.flush()
    old["a"]["b"].append(2)
    session.commit()
    old.clear()
    session.refresh(plugin)
    old["x"] = 1
    session.commit()
    assert len(updates) == 1
    assert stored(session) == {"new": 1}


def test_an_old_value_that_is_made_equal_to_the_new_one_does_not_hide_the_change(session: Session) -> None:
    plugin = added(session)
    old = plugin.x
    plugin.x = {**VALUE, "new": 1}
    old["new"] = 1
    session.commit()
    assert stored(session) == {**VALUE, "new": 1}


def test_a_value_that_was_put_back_is_tracked_again(session: Session) -> None:
    plugin = added(session)
    old = plugin.x
    plugin.x = {}
    plugin.x = old
    session.flush()
    old["a"]["b"].append(1)
    session.commit()
    assert stored(session)["a"]["b"] == [1, {"c": None}, 1]


def test_a_change_that_would_be_lost_is_refused(session: Session) -> None:
    plugin = added(session)
    for stale in (session.commit, session.rollback, lambda: session.expire(plugin), lambda: session.refresh(plugin)):
        value = plugin.x
        stale()
        for _ in ("not loaded", "loaded again"):
            with pytest.raises(InvalidRequestError, match=r"no longer the value of Plugin\.x") as caught:
                value["a"]["b"].append("MARKER")
            assert "MARKER" not in str(caught.value)
            assert plugin.x == VALUE
        assert plugin not in session.dirty


def test_a_value_outlives_its_object(session: Session) -> None:
    plugin = added(session)
    value = plugin.x
    del plugin
    session.close()
    gc.collect()
    value["a"]["b"].append(1)
    assert value["a"]["b"] == [1, {"c": None}, 1]


def test_a_value_of_a_detached_object_can_be_changed(session: Session) -> None:
    plugin = added(session)
    session.refresh(plugin)
    session.expunge(plugin)
    plugin.x["a"]["b"].append(1)
    session.add(plugin)
    session.commit()
    assert stored(session)["a"]["b"][-1] == 1


def test_moving_parts_about_does_not_pile_up_links() -> None:
    value = track([[], []])
    for _ in range(50):
        value.append(value.pop(0))
        TrackedList().append(value[0])
    assert len(value[0]._links) <= 2


def test_a_tracked_part_takes_a_few_bytes_more() -> None:
    assert sys.getsizeof(TrackedDict()) <= sys.getsizeof({}) + 32
    assert sys.getsizeof(TrackedList()) <= sys.getsizeof([]) + 32
    for value in (TrackedDict(), TrackedList()):
        assert not hasattr(value, "__dict__")
    parent = track([{"a": 1}, {"a": 2}])
    assert parent[0]._links is parent[1]._links


def test_no_value_keeps_its_object_alive(session: Session) -> None:
    plugin = added(session)
    value = plugin.x
    session.commit()
    gc.collect()
    gc.disable()
    try:
        state = inspect(plugin)
        assert value
        del plugin
        assert state.obj() is None
    finally:
        gc.enable()


# --- The session's ways ----------------------------------------------------------------------------------------------


def test_refreshed_values_are_tracked(session: Session) -> None:
    plugin = added(session)
    session.execute(update(Plugin).values(x={"a": {"b": []}}), execution_options={"synchronize_session": False})
    session.refresh(plugin, ["x"])
    plugin.x["a"]["b"].append(1)
    session.commit()
    assert stored(session) == {"a": {"b": [1]}}


def test_refreshing_another_attribute_keeps_the_value(session: Session) -> None:
    plugin = added(session, name="before")
    value = plugin.x
    session.refresh(plugin, ["name"])
    assert plugin.x is value


def test_rolled_back_changes_are_gone(session: Session, updates: list[str]) -> None:
    plugin = added(session)
    plugin.x["a"]["b"].append(1)
    session.rollback()
    assert plugin.x == VALUE
    plugin.x["a"]["b"].append(2)
    with session.begin_nested() as savepoint:
        plugin.x["a"]["b"].append(3)
        session.flush()
        savepoint.rollback()
    assert plugin.x["a"]["b"] == [1, {"c": None}, 2]
    session.commit()
    assert stored(session)["a"]["b"] == [1, {"c": None}, 2]


def test_a_pending_object_can_be_changed_before_and_after_it_is_rolled_back(session: Session) -> None:
    plugin = Plugin(x={"a": []})
    plugin.x["a"].append(1)
    session.add(plugin)
    session.flush()
    session.rollback()
    plugin.x["a"].append(2)
    session.add(plugin)
    session.commit()
    assert stored(session) == {"a": [1, 2]}


def test_values_from_defaults_are_tracked(session: Session) -> None:
    plugin = Plugin(x=None)
    session.add(plugin)
    session.flush()
    plugin.y["list"].append(1)
    session.commit()
    assert plugin.y == {"list": [1]}


def test_pickled_objects_are_tracked(session: Session) -> None:
    plugin = added(session, notes=[[]])
    assert plugin.x
    assert plugin.notes
    loaded = pickle.loads(pickle.dumps(plugin))  # noqa: S301 - made here
    session.close()
    session.add(loaded)
    loaded.x["a"]["b"].append(1)
    loaded.notes[0].append(1)
    session.commit()
    assert stored(session)["a"]["b"][-1] == 1
    assert loaded.notes == [[1]]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])  # noqa: S301
def test_values_can_be_pickled_and_copied(duplicate: Callable[[Any], Any]) -> None:
    twice: list[Any] = [1]
    value = track({**VALUE, "twice": [twice, twice]})
    value["self"] = value
    made = duplicate(value)
    assert made is not value
    assert made.pop("self") is made
    del value["self"]
    assert made == value
    assert_tracked(made)
    assert made["a"]["b"] is not value["a"]["b"]
    assert made["twice"][0] is made["twice"][1]


def test_a_shallow_copy_shares_its_parts(session: Session) -> None:
    plugin = added(session)
    copied = copy.copy(plugin.x)
    copied["new"] = 1
    assert plugin not in session.dirty
    copied["a"]["b"].append(1)
    assert plugin in session.dirty


@pytest.mark.parametrize("load", [True, False])
def test_merged_values_are_tracked(session: Session, *, load: bool) -> None:
    plugin = added(session)
    assert plugin.x == VALUE
    session.expunge(plugin)
    merged = session.merge(plugin, load=load)
    assert merged not in session.dirty or load
    merged.x["a"]["b"].append(1)
    del plugin
    session.commit()
    assert stored(session)["a"]["b"][-1] == 1


def test_merging_an_equal_value_writes_nothing(session: Session, updates: list[str]) -> None:
    plugin = added(session)
    session.merge(Plugin(id=plugin.id, x=copy.deepcopy(VALUE)))
    session.commit()
    assert updates == []


def test_statements_in_bulk(session: Session) -> None:
    session.execute(insert(Plugin), [{"x": track(VALUE)}, {"x": VALUE}])
    one, other = session.scalars(select(Plugin)).all()
    session.execute(update(Plugin).where(Plugin.id == one.id).values(x={"a": []}))
    one.x["a"].append(1)
    other.x["a"]["b"].append(1)
    session.commit()
    assert one.x == {"a": [1]}
    session.bulk_save_objects([Plugin(x={"bulk": [1]})])
    (third,) = session.scalars(select(Plugin).where(Plugin.id.not_in([one.id, other.id])))
    third.x["bulk"].append(2)
    session.execute(update(Plugin), [{"id": third.id, "x": third.x}])
    session.commit()
    assert third.x == {"bulk": [1, 2]}


def test_asynchronous_sessions(engine: Engine, database_url: str) -> None:
    async def main() -> Any:
        made = create_async_engine(asynchronous(database_url))
        async with AsyncSession(made, expire_on_commit=False) as session:
            plugin = Plugin(x=copy.deepcopy(VALUE))
            session.add(plugin)
            await session.commit()
            plugin.x["a"]["b"].append(1)
            await session.commit()
            await session.refresh(plugin)
            plugin.x["a"]["b"].append(2)
            await session.commit()
        async with AsyncSession(made) as session:
            found = (await session.scalars(select(Plugin.x))).one()
        await made.dispose()
        return found

    assert asyncio.run(main())["a"]["b"] == [1, {"c": None}, 1, 2]


# --- Declarations ----------------------------------------------------------------------------------------------------


def test_a_mixin_and_text_storage(session: Session) -> None:
    plugin = added(session, notes=[{"a": []}])
    assert plugin.notes is not None
    plugin.notes[0]["a"].append(1)
    session.commit()
    assert plugin.notes == [{"a": [1]}]


def test_joined_inheritance(session: Session) -> None:
    dog = Dog(x={"a": []}, tricks=[])
    session.add_all([dog, Animal(x=[])])
    session.commit()
    dog.x["a"].append(1)
    dog.tricks.append("sit")
    session.commit()
    assert (dog.x, dog.tricks) == ({"a": [1]}, ["sit"])
    animal = session.scalars(select(Animal).where(Animal.kind == "animal")).one()
    animal.x.append(1)
    session.commit()
    assert animal.x == [1]
    session.expunge_all()
    again = session.scalars(select(Animal).where(Animal.kind == "dog")).one()
    assert isinstance(again, Dog)
    again.tricks.append("roll")
    again.x["a"].append(2)
    session.commit()
    assert (again.x, again.tricks) == ({"a": [1, 2]}, ["sit", "roll"])


def test_dataclasses(session: Session) -> None:
    datum = Datum()
    session.add(datum)
    session.commit()
    datum.x["a"].append(1)
    session.commit()
    assert datum.x == {"a": [1]}
    made = asdict(datum)
    assert made == {"id": datum.id, "x": {"a": [1]}}
    made["x"]["a"].append(2)
    assert datum not in session.dirty


def test_deferred_columns(session: Session) -> None:
    session.add(Lazy(x={"a": []}))
    session.commit()
    session.expunge_all()
    lazy = session.scalars(select(Lazy)).one()
    assert "x" in inspect(lazy).unloaded
    lazy.x["a"].append(1)
    session.commit()
    assert lazy.x == {"a": [1]}


def test_a_type_with_objects_of_another_kind_is_refused() -> None:
    class Model(pydantic.BaseModel):
        token: str

    for python_type in (Model, list[Model]):
        with pytest.raises(ColumnError, match="dicts and lists, not"):
            MutableJSON.as_mutable(EncryptedJSON(python_type))
    for kind in (EncryptedJSON, EncryptedJSON(), EncryptedJSON(list), JSON, JSON()):
        MutableJSON.as_mutable(kind)


def test_a_plain_json_column_can_be_tracked_too(session: Session) -> None:
    class Local(DeclarativeBase):
        pass

    class Document(Local):
        __tablename__ = "document"
        id: Mapped[int] = mapped_column(primary_key=True)
        x: Mapped[Any] = mapped_column(MutableJSON.as_mutable(JSON))

    Local.metadata.create_all(session.get_bind())
    document = Document(x=[[]])
    session.add(document)
    session.commit()
    document.x[0].append(1)
    session.commit()
    assert document.x == [[1]]


def test_values_look_like_what_they_are_of() -> None:
    value = track(copy.deepcopy(VALUE))
    assert value == VALUE
    assert repr(value) == repr(VALUE)
    assert json.loads(json.dumps(value)) == VALUE
    assert isinstance(value, dict)
    assert isinstance(value["numbers"], list)
    assert TrackedDict.fromkeys("ab", []) == {"a": [], "b": []}
    assert not [name for name in {*dir(TrackedDict), *dir(TrackedList)} - {*dir(dict), *dir(list)} if name[0] != "_"]


# --- Anything at all -------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2)
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)
KEYS = st.sampled_from("abc")
INDEXES = st.integers(-3, 3)
SLICES = st.builds(slice, *[st.none() | INDEXES] * 2, st.sampled_from([None, 1, 2, -1]))
LISTS = st.lists(JSON_VALUES, max_size=3)
DICTS = st.dictionaries(KEYS, JSON_VALUES, max_size=2)

Step = tuple[str, tuple[Any, ...]]


def steps(*methods: tuple[str, *tuple[st.SearchStrategy[Any], ...]]) -> st.SearchStrategy[Step]:
    return st.one_of([st.tuples(st.just(name), st.tuples(*arguments)) for name, *arguments in methods])


DICT_STEPS = steps(
    ("__setitem__", KEYS, JSON_VALUES),
    ("__delitem__", KEYS),
    ("clear",),
    ("pop", KEYS),
    ("pop", KEYS, JSON_VALUES),
    ("popitem",),
    ("setdefault", KEYS),
    ("setdefault", KEYS, JSON_VALUES),
    ("update", DICTS),
    ("update", st.lists(st.tuples(KEYS, JSON_VALUES), max_size=2)),
    ("__ior__", DICTS),
)
LIST_STEPS = steps(
    ("__setitem__", INDEXES, JSON_VALUES),
    ("__setitem__", SLICES, LISTS),
    ("__delitem__", INDEXES),
    ("__delitem__", SLICES),
    ("append", JSON_VALUES),
    ("extend", LISTS),
    ("insert", INDEXES, JSON_VALUES),
    ("pop",),
    ("pop", INDEXES),
    ("remove", JSON_VALUES),
    ("clear",),
    ("sort",),
    ("reverse",),
    ("__iadd__", LISTS),
    ("__imul__", st.integers(-1, 2)),
)


def parts(value: Any) -> list[Any]:
    """Return the dicts and lists in a value, the same order for equal values."""
    found = [value]
    for part in found:
        found += [item for item in (part.values() if isinstance(part, dict) else part) if isinstance(item, dict | list)]
    return found


def outcome(value: Any, name: str, arguments: tuple[Any, ...]) -> Any:
    try:
        result = getattr(value, name)(*copy.deepcopy(arguments))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return type(error)
    return "itself" if result is value else result


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(value=DICTS | LISTS, data=st.data())
@example(value=[[]], data=None)
def test_any_changes_give_what_a_plain_value_would(session: Session, value: Any, data: st.DataObject | None) -> None:
    session.rollback()
    plugin = Plugin(x=value)
    session.add(plugin)
    session.commit()
    plain = copy.deepcopy(value)
    for _ in range(0 if data is None else data.draw(st.integers(1, 8), "steps")):
        assert data is not None
        ours, theirs = parts(plugin.x), parts(plain)
        index = data.draw(st.integers(0, min(len(ours) - 1, 8)), "part")
        if data.draw(st.integers(0, 9), "kind of step") == 0:
            moved = data.draw(st.integers(0, min(len(ours) - 1, 8)), "moved")
            if any(part is theirs[index] for part in parts(theirs[moved])) or isinstance(theirs[index], dict):
                continue  # it would contain itself
            ours[index].append(ours[moved])
            theirs[index].append(theirs[moved])
            continue
        name, arguments = data.draw(DICT_STEPS if isinstance(theirs[index], dict) else LIST_STEPS, "step")
        assert outcome(ours[index], name, arguments) == outcome(theirs[index], name, arguments)
        if data.draw(st.integers(0, 3), "commit") == 0:
            session.commit()
            plain = json.loads(json.dumps(plain))
    assert json.dumps(plugin.x) == json.dumps(plain)
    session.commit()
    with Session(session.get_bind()) as other:
        loaded = other.get_one(Plugin, plugin.id).x
    assert json.dumps(loaded) == json.dumps(plain)
