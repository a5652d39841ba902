"""Objects attribute by attribute: the same as pickled whole, and what it adds."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serializers import LoadFailed, NotSerializable, Snapshot, attributes


class Thing:
    """Has whatever a test gives it."""

    def method(self) -> int:
        return 7


class Slotted:
    __slots__ = ("a", "b")


class Both(Slotted):
    pass


class Words(list[str]):
    pass


class Stated:
    def __getstate__(self) -> int:
        return 5

    def __setstate__(self, state: int) -> None:
        self.given = state


class Reduced:
    def __init__(self, n: int = 0) -> None:
        self.n = n

    def __reduce__(self) -> Any:
        return Reduced, (self.n,)


def again(obj: object, install: Any = None) -> Any:
    """The object that comes out, by way of separate parts."""
    snapshot, _ = attributes.encode(obj)
    parts = [bytes(part) for part in snapshot.parts()]
    return attributes.decode(Snapshot.from_parts(parts), install)


def thing(**state: Any) -> Thing:
    made = Thing()
    made.__dict__.update(state)
    return made


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


NAMES = st.text(min_size=1).filter(lambda name: not name.startswith("__"))


@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_every_state_comes_out_as_it_went_in_and_the_sizes_add_up(state: dict[str, Any]) -> None:
    obj = thing(**state)
    snapshot, sizes = attributes.encode(obj)
    assert again(obj).__dict__ == state
    assert set(sizes) == {*state, attributes.OTHERS}
    told = sum(sizes.values())
    assert told == len(snapshot.body) + sum(view.nbytes for view in snapshot.buffers)


def test_what_attributes_share_and_the_object_itself_stay_one() -> None:
    shared = {"a": 1}
    obj = thing(first=shared, second=[shared])
    obj.__dict__.update(me=[obj], callback=obj.method)
    out = again(obj)
    assert out.second[0] is out.first
    assert out.me[0] is out and out.callback.__self__ is out


def test_buffers_of_each_attribute_reach_it() -> None:
    array = np.arange(20_000)
    obj = thing(
        array=array,
        view_of_it=array,
        large=bytes(range(256)) * 400,
        two=[b"x" * 70_000, b"y" * 70_000],
        grows=bytearray(100_000),
        small=np.arange(3),
    )
    _, sizes = attributes.encode(obj)
    assert sizes["array"] > array.nbytes and sizes["view_of_it"] < 100
    out = again(obj)
    assert (out.array == array).all() and out.view_of_it is out.array
    assert (out.large, out.two, out.grows) == (obj.large, obj.two, obj.grows)
    assert type(out.grows) is bytearray and list(out.small) == [0, 1, 2]
    out.array[0] = 5


def test_slots_items_and_states_of_any_kind_come_back() -> None:
    slotted = Slotted()
    slotted.a = 1
    assert again(slotted).a == 1 and not hasattr(again(slotted), "b")
    both = Both()
    both.a, both.c = 1, 2  # type: ignore[attr-defined]
    assert (again(both).a, again(both).c) == (1, 2)
    words = Words(["a", "b"])
    words.me = words  # type: ignore[attr-defined]
    out = again(words)
    assert out == ["a", "b"] and out.me is out
    assert again(Stated()).given == 5
    assert again(Reduced(3)).n == 3
    assert again(Thing()).__dict__ == {}


def test_a_class_that_cannot_be_imported_travels() -> None:
    class Local:
        def __init__(self) -> None:
            self.n = 3

    out = again(Local())
    assert out.n == 3 and type(out).__name__ == "Local"


def test_a_table_of_many_names_is_one_pickle() -> None:
    state = {f"k{n}": n for n in range(attributes.ATTRIBUTES_MAX + 1)}
    _, sizes = attributes.encode(thing(**state))
    assert list(sizes) == [attributes.OTHERS]
    assert again(thing(**state)).__dict__ == state


def test_what_nests_too_deep_for_the_c_pickler_comes_back() -> None:
    nested: list[Any] = []
    for _ in range(60_000):
        nested = [nested]
    obj = thing(deep=nested, n=4)
    obj.__dict__["me"] = obj
    out = again(obj)
    assert out.me is out and out.n == 4
    depth, level = 0, out.deep
    while level:
        depth, level = depth + 1, level[0]
    assert depth == 60_000
    # Taken down from the inside of a loop: a deep list that is let go at once overflows too.
    for deep in (nested, out.deep):
        while deep:
            deep.append(deep.pop())
            deep = deep.pop()


def test_the_bare_state_is_given_to_whoever_installs_it() -> None:
    seen: list[Any] = []

    def install(obj: Any, state: Any) -> None:
        seen.append(state)
        attributes.set_state(obj, {**state, "n": state["n"] + 1})

    out = again(thing(n=1, callback=None), install)
    assert seen == [{"n": 1, "callback": None}]
    assert out.n == 2
    # One that says itself how it is made has no state to give.
    seen.clear()
    assert again(Reduced(3), install).n == 3 and seen == []


def test_the_path_to_what_cannot_travel_begins_at_the_object() -> None:
    begun = (n for n in range(3))
    next(begun)
    obj = thing(fine=1, deep={"files": [1, io.StringIO, begun]})
    with pytest.raises(NotSerializable) as caught:
        attributes.encode(obj)
    assert caught.value.path == "Thing.deep['files'][2]"
    assert obj.fine == 1


def test_a_state_that_was_cut_or_has_other_sizes_is_refused() -> None:
    snapshot, _ = attributes.encode(thing(n=1, text="x" * 100))
    with pytest.raises(LoadFailed):
        attributes.decode(Snapshot(snapshot.head, snapshot.body[:-3], snapshot.buffers))
    body = bytes(snapshot.body)
    half = body[: body.index(b"x" * 100)]
    with pytest.raises(LoadFailed):
        attributes.decode(Snapshot(snapshot.head, half + bytes(len(body) - len(half)), ()))


def test_what_installing_raises_is_raised_as_it_is() -> None:
    def install(obj: Any, state: Any) -> None:
        raise KeyError("old")

    with pytest.raises(KeyError, match="old"):
        again(thing(n=1), install)
