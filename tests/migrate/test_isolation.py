"""Arguments and results on one node are each one's own, as if they had travelled."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import decimal
import enum
import pathlib
import pickle
import re
import threading
import uuid
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import migrate
import serializers
from migrate.shell import isolation, wire
from migrate.shell.isolation import isolate, isolate_arguments, size_of
from tests.migrate.clusters import failure_of, nodes, run
from tests.migrate.servers import Counter

pytestmark = pytest.mark.usefixtures("cluster_secret")

NOBODY: Any = None


def isolated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments as a handler gets them."""
    made = isolate_arguments(args, kwargs, NOBODY)
    return wire.unpack(made, NOBODY) if isinstance(made, bytes) else made


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Point:
    x: Any
    y: Any = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Any


@dataclasses.dataclass(frozen=True)
class Counted(Point):
    """A frozen class with a parent, which might be anything."""


@dataclasses.dataclass(frozen=True)
class TellsItself:
    x: int

    def __getstate__(self) -> dict[str, int]:
        return {"x": self.x + 1}


class Pair(NamedTuple):
    a: Any
    b: Any


class Text(str):
    """A string that may have attributes."""


class Plain:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


def named() -> int:
    return 1


# ------------------------------------------------------------------ values

leaves = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from([Colour.RED, named, Plain, 1.5, 2j, decimal.Decimal("1.10"), range(4)]),
    st.datetimes(timezones=st.sampled_from([None, datetime.UTC])),
    st.builds(bytearray, st.binary(max_size=5)),
    st.builds(lambda n: np.arange(n, dtype=np.int16), st.integers(0, 5)),
    st.builds(Point, st.integers()),
    st.builds(Text, st.text(max_size=3)),
)
hashable = st.one_of(st.integers(), st.text(max_size=3), st.tuples(st.integers(), st.none()))
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(st.integers(), min_size=17, max_size=20),
        st.lists(inner, min_size=17, max_size=18),
        st.tuples(inner, inner),
        st.dictionaries(hashable, inner, max_size=4),
        st.sets(hashable, max_size=4),
        st.frozensets(hashable, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(Slotted, inner),
        st.builds(Pair, inner, inner),
        st.builds(Plain, inner),
        st.lists(inner, min_size=1, max_size=2).map(lambda items: [items, (items,), items]),
    ),
    max_leaves=20,
)
MUTABLE = (list, dict, set, bytearray, np.ndarray, Plain, Text)


def inside(value: Any) -> list[Any]:
    """What a value is made of, one level down."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return [*value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [value.inner] if isinstance(value, Plain) else []


def walk(value: Any) -> dict[int, Any]:
    """Every object of a value, by id."""
    found: dict[int, Any] = {}
    todo = [value]
    while todo:
        item = todo.pop()
        if id(item) not in found:
            found[id(item)] = item
            todo += inside(item)
    return found


def shape(value: Any) -> Any:
    """A value as text, with the order in which its mutable objects are met first."""
    seen: dict[int, int] = {}

    def tell(item: Any) -> str:
        if isinstance(item, MUTABLE):
            if id(item) in seen:
                return f"#{seen[id(item)]}"
            seen[id(item)] = len(seen)
        name = type(item).__qualname__
        if isinstance(item, np.ndarray):
            return f"{name}{item.tolist()}{item.dtype}{item.flags.writeable}"
        parts = inside(item)
        if isinstance(item, set | frozenset):
            parts = sorted(parts, key=repr)
        return f"{name}({', '.join(map(tell, parts))})" if parts else f"{name} {item!r}"[:200]

    # Without the addresses of plain objects.
    return re.sub(r"0x[0-9a-f]+", "", tell(value))


@settings(max_examples=400, deadline=None)
@given(values)
def test_a_private_copy_is_what_would_have_arrived(value: Any):
    there = wire.unpack(serializers.dumps(value), NOBODY)
    here = isolate(value, NOBODY)
    (argument,), kwargs = isolated((value,), {"key": value})
    wanted = shape(there)
    assert shape(here) == shape(argument) == shape(kwargs["key"]) == wanted
    mine = walk(value)
    for copy in (here, argument):
        shared = [item for at, item in walk(copy).items() if at in mine]
        assert not [item for item in shared if isinstance(item, MUTABLE)]


def test_immutable_values_pass_as_they_are():
    values = [
        *(1, "x", b"y", None, 1.5, 2j, True, range(3), ..., decimal.Decimal(1), uuid.uuid4()),
        *(pathlib.PurePosixPath("a"), datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1)),
        *((1, ("a", frozenset({2}))), Colour.RED, Point(1, (2, 3)), named, Plain),
        *(np.float32(1), np.bool_(True)),
    ]
    for value in values:
        assert isolate(value, NOBODY) is value
        assert isolate([value], NOBODY)[0] is value
        assert isolated((value,), {"k": value})[0][0] is value


def test_what_only_looks_immutable_is_copied():
    text = Text("x")
    text.more = [1]  # type: ignore[attr-defined]
    for value in (Point([1]), Slotted([1]), Pair([1], 2), text, TellsItself(1), Counted(1)):
        copy = isolate(value, NOBODY)
        assert copy is not value and type(copy) is type(value)
    assert isolate(TellsItself(1), NOBODY).x == 2, "it says itself what travels"
    assert isolate(Pair([1], 2), NOBODY) == ([1], 2)
    dressed = Point(1)
    object.__setattr__(dressed, "cache", [1])
    assert isolate(dressed, NOBODY) is not dressed


def test_rings_and_what_is_shared_stay_as_they_are():
    ring: list[Any] = [1]
    ring += [(ring, 2), {"ring": ring}]
    copy = isolate(ring, NOBODY)
    assert copy is not ring and copy[1][0] is copy and copy[2]["ring"] is copy
    knot: tuple[list[Any], ...] = ([],)
    knot[0].append(knot)
    tied = isolate(knot, NOBODY)
    assert tied is not knot and tied[0][0] is tied
    shared = bytearray(b"x")
    one, other = isolated((shared,), {"key": [shared]})
    assert one[0] is other["key"][0] is not shared
    deep: list[Any] = []
    for _ in range(50_000):
        deep = [deep]
    depth, level = 0, isolate(deep, NOBODY)
    while level:
        depth, level = depth + 1, level[0]
    assert depth == 50_000


def test_arrays_keep_order_flags_and_say_no_to_objects():
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    copy = isolate(array, NOBODY)
    assert (copy == array).all() and copy.flags.f_contiguous and not np.shares_memory(copy, array)
    array.flags.writeable = False
    assert not isolate(array, NOBODY).flags.writeable
    inner = [1]
    objects = np.empty(1, dtype=object)
    objects[0] = inner
    assert isolate(objects, NOBODY)[0] == [1] and isolate(objects, NOBODY)[0] is not inner


def test_what_cannot_travel_is_refused_on_a_node_too():
    for value in (threading.current_thread(), [1, {"x": threading.current_thread()}]):
        with pytest.raises(serializers.NotSerializable):
            isolate(value, NOBODY)


def test_a_class_that_is_no_more_leaves_nothing_behind():
    before = len(isolation._copiers)
    for _ in range(5):
        local = dataclasses.make_dataclass("Local", ["x"], frozen=True)
        isolate([local(1)], NOBODY)
    assert len(isolation._copiers) == before


# ------------------------------------------------------------------ calls


class Keeps:
    def __init__(self) -> None:
        self.items: list[Any] = []

    def keep(self, *items: Any, **more: Any) -> Any:
        self.items = [*items, *more.values()]
        for item in self.items:
            item.append("handler")
        return self.items

    async def keep_later(self, item: Any) -> Any:
        await asyncio.sleep(0)
        item.append("handler")
        self.items = [item]
        return item

    def kept(self) -> list[Any]:
        return self.items

    def is_it(self, key: int) -> bool:
        return any(id(item) == key for item in self.items)


@migrate.server(shared_references=True)
class Shares(Keeps):
    pass


def test_caller_and_handler_do_not_see_each_others_changes():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Keeps)
            for keep in (ref.keep, ref.keep_later):
                mine = ["caller"]
                got = await keep(mine)
                assert mine == ["caller"]
                got.append("caller later")
                mine.append("caller later")
                assert await ref.kept() == [["caller", "handler"]]
            mine = ["cast"]
            await ref.keep.cast(mine, key=mine)
            mine.append("caller later")
            assert await ref.kept() == [["cast", "handler", "handler"]] * 2

    run(body())


def test_refs_in_arguments_are_bound_to_the_node():
    async def body() -> None:
        async with nodes("a") as (a,):
            counter = await a.spawn(Counter)
            unbound = pickle.loads(pickle.dumps(counter))
            ref = await a.spawn(Keeps)
            (kept,) = (await ref.keep([unbound]))[0][:1]
            assert kept == counter and await kept.incr() == 1

    run(body())


def test_a_server_may_declare_that_it_takes_references():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Shares)
            mine: list[Any] = ["caller"]
            assert await ref.keep_later(mine) is mine
            assert mine == ["caller", "handler"] and await ref.is_it(id(mine))
            # Even what could not travel.
            thread = threading.current_thread()
            assert (await ref.keep([thread]))[0][0] is thread
            await ref.keep_later(mine)
            await a.migrate(ref, to="b")
            got = await ref.kept()
            got[0].append("caller later")
            assert await ref.kept() == [["caller", "handler", "handler"]]
            error = await failure_of(ref.keep([thread]), migrate.UsageError)
            assert error.outcome is migrate.Outcome.NOT_DONE

    run(body())


def test_the_size_of_arguments_counts_what_they_hold_once() -> None:
    data = bytes(1_000_000)
    assert 1_000_000 < size_of((data,), {}) < 1_001_000
    assert 2_000_000 < size_of(([data], {"key": (1, {"inner": data})}), {}) < 2_002_000
    array = np.zeros(1_000_000, np.uint8)
    assert 1_000_000 <= size_of((), {"array": array, "again": [array]}) < 1_001_000
    assert 500_000 <= size_of((array[:500_000],), {}) < 501_000
    ring: list[Any] = [data]
    ring.append(ring)
    assert 1_000_000 < size_of((ring,), {}) < 1_001_000
    assert 0 < size_of((Point(1), None, datetime.datetime.now()), {}) < 1_000
