"""A digest tells whether two processes hold the same state, and nothing else."""

from __future__ import annotations

import collections
import copy
import json
import os
import pathlib
import random
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import serializers
from serializers import NotSerializable, digest

SCRIPT = pathlib.Path(__file__).with_name("digest_states.py")


class Node:
    def __init__(self, value: Any = None, next: Any = None) -> None:
        self.value = value
        self.next = next


class Point(tuple[int, ...]):
    pass


def in_a_process(seed: int, *arguments: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_processes_with_other_hash_seeds_agree_also_after_a_dump(tmp_path: pathlib.Path) -> None:
    made = in_a_process(1, "make", str(tmp_path / "states"))
    built = in_a_process(2, "build")
    loaded = in_a_process(3, "load", str(tmp_path / "states"))

    assert len(made) > 20 and len(set(made.values())) == len(made)
    assert made == built
    assert made == loaded


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ("a", b"a"),
        ((1, 2), [1, 2]),
        ([1, 2], [2, 1]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1}, {2}),
        ({1}, frozenset({1})),
        (set(), {}),
        ([[], []], [[]] * 2),
        (["ab", "c"], ["a", "bc"]),
        ([["a"], "b"], [["a", "b"]]),
        ((("a",), "b"), (("a", "b"),)),
        (Node(1), Node(2)),
        (Node(1), {"value": 1, "next": None}),
        ((1, 2), Point((1, 2))),
        (collections.OrderedDict(a=1), {"a": 1}),
        (bytearray(b"a"), b"a"),
        (np.zeros(3), np.zeros(3, dtype="f4")),
        (np.zeros(3), np.zeros((3, 1))),
        (np.arange(4), np.arange(4)[::-1]),
        (threading.Lock(), threading.RLock()),
        (2**64, 2**64 + 1),
        ("x" * 100, "x" * 101),
        (int, float),
        ([None], [...]),
    ],
)
def test_states_that_differ_have_other_digests(one: Any, other: Any) -> None:
    assert digest(one) != digest(other)


def test_aliasing_of_mutable_objects_counts_and_of_values_does_not() -> None:
    shared: list[Any] = [1]
    assert digest([shared, shared]) != digest([[1], [1]])
    assert digest(Node(shared, shared)) != digest(Node([1], [1]))
    text = "some text of length"
    assert digest([text, text]) == digest([text, "".join(text)])
    once = (1, ("a", 2.5), frozenset({3}))
    assert digest([once, once]) == digest([once, copy.deepcopy((*once[:2], frozenset({3})))])
    inner = (shared,)
    assert digest([inner, inner]) == digest([(shared,), (shared,)])
    assert digest([inner, inner]) != digest([([1],), ([1],)])


def test_which_object_a_ring_leads_back_to_counts() -> None:
    one, two = Node(0), Node(0)
    one.next, two.next = two, one
    alone = Node(0)
    alone.next = Node(0, alone.next)
    short = Node(0)
    short.next = short
    assert len({digest(one), digest(alone), digest(short), digest(Node(0, short))}) == 4


def test_views_of_one_array_differ_from_copies() -> None:
    array = np.arange(100)
    assert digest([array, array[5:]]) != digest([array, array[5:].copy()])
    assert digest([array, array[5:]]) != digest([array, array[6:]])
    frozen = array.copy()
    frozen.flags.writeable = False
    assert digest(frozen) != digest(array)


def test_members_of_sets_are_told_apart_by_what_they_hold() -> None:
    def state(order: list[int]) -> Any:
        nodes = [Node(number, [number]) for number in range(5)]
        return [{nodes[index] for index in order}, nodes[3], nodes[4].next]

    assert digest(state([0, 1, 2, 3, 4])) == digest(state([4, 3, 2, 1, 0]))
    assert digest(state([0, 1, 2, 3])) != digest(state([0, 1, 2, 4]))


def test_members_that_look_the_same_are_fine_unless_something_else_leads_to_one() -> None:
    assert digest({Node(1), Node(1)}) == digest({Node(1), Node(1)})
    assert digest({Node(1), Node(1)}) != digest({Node(1)})
    twins = [Node([1]), Node([1])]

    with pytest.raises(NotSerializable, match="cannot be told apart") as caught:
        digest({"set": set(twins), "favourite": twins[0].value})
    assert caught.value.path.startswith("dict['set']")
    # In the other order they can: one has been met before.
    before = digest({"favourite": twins[0], "set": set(twins)})
    assert before == digest({"favourite": twins[1], "set": set(twins)})


def test_what_cannot_be_digested_is_refused_by_path() -> None:
    begun = (n for n in range(2))
    next(begun)
    with pytest.raises(NotSerializable) as caught:
        digest(Node({"k": [0, begun]}))

    assert caught.value.path == "Node.value['k'][1]"


def test_deep_and_shared_states_take_no_stack_and_no_exponential_time() -> None:
    chain: Any = None
    for number in range(100_000):
        chain = Node(number, chain)
    assert digest(chain) != digest(chain.next)

    values: Any = ("leaf",)
    impure: Any = ([],)
    frozen: Any = frozenset({1})
    for _ in range(200):
        values, impure, frozen = (values, values), (impure, impure), frozenset({frozen, "x"})
    assert len({digest(values), digest(impure), digest(frozen)}) == 3


def test_looking_changes_nothing_and_classes_by_value_keep_their_digest() -> None:
    class Local:
        counts: dict[str, int] = {}  # noqa: RUF012

        def method(self) -> Any:
            return Local.counts

    obj = Local()
    first = digest(obj)
    serializers.dumps(obj)
    assert digest(obj) == first
    Local.counts["a"] = 1
    assert digest(obj) != first


atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.decimals()
)
values = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=5),
        st.sets(st.one_of(st.text(), st.integers(), st.tuples(st.text())), max_size=5),
        st.frozensets(st.text(), max_size=5),
        st.builds(Node, inner, inner),
        st.lists(inner, max_size=3).map(collections.deque),
        st.lists(inner, max_size=3).map(lambda items: [items, items, tuple(items)]),
    ),
    max_leaves=30,
)


def rebuilt(value: Any, chance: random.Random) -> Any:
    """The same state made otherwise: sets in other orders, equal values as other objects."""
    if type(value) is set or type(value) is frozenset:
        items = [rebuilt(item, chance) for item in value]
        chance.shuffle(items)
        return type(value)(items)
    if type(value) is str:
        return "".join(list(value))
    if type(value) is tuple:
        return tuple(rebuilt(item, chance) for item in value)
    return value


@settings(deadline=None)
@given(values, st.integers(0, 1000))
def test_a_copy_has_the_same_digest(value: Any, seed: int) -> None:
    expected = digest(value)

    assert digest(serializers.loads(serializers.dumps(value))) == expected
    assert digest(rebuilt(value, random.Random(seed))) == expected
    assert len(expected) == 40 and digest(value) == expected


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=4), st.data())
def test_any_change_changes_the_digest(items: list[Any], data: st.DataObject) -> None:
    before = digest(items)
    index = data.draw(st.integers(0, len(items) - 1))
    changed = list(items)
    changed[index] = data.draw(atoms)
    same = repr(changed[index]) == repr(items[index]) and type(changed[index]) is type(items[index])

    assert (digest(changed) == before) == same
    assert digest([*items, None]) != before


class Keyed:
    def __init__(self) -> None:
        self.rest = ["a"]

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return self is other


class Forwarding:
    def __init__(self) -> None:
        self.rest = ["a"]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Mixed:
    __slots__ = ("__dict__", "left")

    def __init__(self) -> None:
        self.left, self.right = 1, ["a"]


class Table(dict[str, int]):
    def __init__(self) -> None:
        self.rest = ["a"]

    def __setitem__(self, key: str, value: int) -> None:
        super().__setitem__(key, value)


@pytest.mark.parametrize("kind", [Node, Keyed, Forwarding, Mixed, Table])
def test_what_holds_an_objects_attributes_elsewhere_is_no_part_of_its_state(kind: Any) -> None:
    obj = kind()
    alone = digest(obj)
    held = vars(obj)

    assert digest(obj) == alone == digest(serializers.loads(serializers.dumps(obj)))
    assert held is vars(obj)


def test_who_shares_an_objects_attributes_counts() -> None:
    one, other = Node([1]), Node([1])
    apart = digest([one, other])
    other.__dict__ = one.__dict__

    assert digest([one, other]) != apart
    assert digest(serializers.loads(serializers.dumps([one, other]))) == digest([one, other])
