"""Values come back equal, with the same identities, and pickle's own way agrees."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import pickle
import random
import re
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import serializers


@dataclasses.dataclass
class Record:
    number: int
    text: str
    rest: Any = None


class Slotted:
    __slots__ = ("left", "right")

    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right


class Colour(enum.Enum):
    RED = "r"


SENTINEL = object()

atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.complex_numbers(allow_nan=False),
    st.just(Colour.RED),
    st.dates(),
    st.decimals(allow_nan=False),
    st.fractions(),
    st.uuids(),
)
values = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=5),
        st.frozensets(st.integers(), max_size=5),
        st.sets(st.text(), max_size=5),
        st.builds(Record, st.integers(), st.text(), inner),
        st.lists(inner, max_size=3).map(collections.deque),
    ),
    max_leaves=40,
)


@given(values)
def test_values_come_back_equal(value: Any) -> None:
    copy = serializers.loads(serializers.dumps(value))

    assert copy == value
    assert repr(copy) == repr(pickle.loads(pickle.dumps(value, 5)))


@given(values)
def test_parts_and_the_one_string_carry_the_same(value: Any) -> None:
    snapshot = serializers.encode(value)
    through_parts = serializers.decode(
        serializers.Snapshot.from_parts([bytearray(part) for part in snapshot.parts()])
    )

    assert through_parts == serializers.loads(snapshot.to_bytes()) == value


@given(values)
def test_the_plain_serializer_agrees_with_the_default(value: Any) -> None:
    snapshot = serializers.PlainSerializer().encode(value)

    assert serializers.PlainSerializer().decode(snapshot) == value
    assert bytes(snapshot.body) == bytes(serializers.encode(value).body)


@given(st.integers(1, 30), st.data())
def test_any_graph_keeps_who_refers_to_whom(size: int, data: st.DataObject) -> None:
    makers = (lambda: [], lambda: {}, lambda: Slotted(None, None), lambda: Record(0, "", None))
    nodes: list[Any] = [data.draw(st.sampled_from(makers))() for _ in range(size)]
    edges = data.draw(st.lists(st.tuples(*[st.integers(0, size - 1)] * 2), max_size=60))
    for number, (start, end) in enumerate(edges):
        node = nodes[start]
        if isinstance(node, list):
            node.append(nodes[end])
        elif isinstance(node, dict):
            node[number] = nodes[end]
        elif isinstance(node, Slotted):
            node.left, node.right = node.right, nodes[end]
        else:
            node.rest = nodes[end]

    copies = serializers.loads(serializers.dumps(nodes))

    assert _shape(copies) == _shape(nodes)
    assert not {id(node) for node in copies} & {id(node) for node in nodes}  # type: ignore[attr-defined]


def _shape(nodes: Any) -> list[Any]:
    number = {id(node): index for index, node in enumerate(nodes)}
    shape: list[Any] = []
    for node in nodes:
        if isinstance(node, list):
            children: Any = [number[id(child)] for child in node]
        elif isinstance(node, dict):
            children = [(key, number[id(child)]) for key, child in node.items()]
        elif isinstance(node, Slotted):
            children = [number.get(id(child)) for child in (node.left, node.right)]
        else:
            children = [number.get(id(node.rest))]
        shape.append((type(node).__name__, children))
    return shape


@pytest.mark.parametrize(
    "value",
    [
        datetime.datetime(2026, 7, 1, tzinfo=datetime.UTC),
        decimal.Decimal("1.10"),
        fractions.Fraction(1, 3),
        pathlib.PurePosixPath("/a/b"),
        uuid.UUID(int=5),
        re.compile("a(b)", re.IGNORECASE),
        collections.Counter("hello"),
        collections.OrderedDict(a=1),
        range(3, 9, 2),
        slice(1, 2),
        list[int],
        int | None,
        NotImplemented,
        type(None),
        type(...),
        type(NotImplemented),
        type(lambda: 0),
        dict.fromkeys,
        str.join,
        len,
        [].append.__class__,
        collections.deque.appendleft,
    ],
    ids=repr,
)
def test_values_of_the_standard_library_come_back(value: object) -> None:
    assert serializers.loads(serializers.dumps(value)) == value


def test_generators_of_random_numbers_go_on_where_they_were() -> None:
    source = random.Random(7)
    source.random()
    copy: Any = serializers.loads(serializers.dumps(source))

    assert [copy.random() for _ in range(5)] == [source.random() for _ in range(5)]


def test_a_module_level_sentinel_stays_the_one_that_is_compared_with() -> None:
    assert serializers.loads(serializers.dumps([SENTINEL]))[0] is SENTINEL  # type: ignore[index]
    assert serializers.loads(serializers.dumps([object()])) != [SENTINEL]
    missing = dataclasses.MISSING
    assert serializers.loads(serializers.dumps([missing]))[0] is missing  # type: ignore[index]


def test_descriptors_that_only_dill_knows_come_back() -> None:
    descriptor = dict.__dict__["fromkeys"]

    assert serializers.loads(serializers.dumps([descriptor])) == [descriptor]


def test_several_threads_may_dump_and_load_at_once() -> None:
    import concurrent.futures

    value = [Record(n, str(n), {"x": [n]}) for n in range(2000)]

    def trip(_: int) -> object:
        return serializers.loads(serializers.dumps(value))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(copy == value for copy in pool.map(trip, range(12)))


@dataclasses.dataclass(frozen=True)
class Fill:
    number: int
    text: str


class Base:
    shared = 1

    def __init__(self) -> None:
        self.one = self.two = ["x"]


class Derived(Base):
    def __eq__(self, other: object) -> bool:
        return type(other) is Derived and vars(self) == vars(other)


def test_what_is_said_in_pickles_stead_is_what_pickle_says() -> None:
    states: list[Any] = [Record(1, "a", Record(2, "b")), Fill(1, "a"), Base(), Derived(), Empty()]
    states.append([states[:], Base(), Empty()])
    for state in states:
        body = bytes(serializers.encode(state).body)
        assert body == pickle.dumps(state, 5)


class Empty:
    pass


def test_a_class_that_is_given_a_way_of_its_own_goes_it_from_then_on() -> None:
    reduced = (Changing, (), {"way": "state"})
    for name, way in (
        ("__getstate__", lambda self: {"way": "state"}),
        ("__reduce__", lambda self: reduced),
        ("__reduce_ex__", lambda self, protocol: reduced),
    ):
        assert vars(there_and_back(Changing())) == {"way": "own"}
        setattr(Changing, name, way)
        try:
            assert vars(there_and_back(Changing())) == {"way": "state"}, name
        finally:
            delattr(Changing, name)
    assert vars(there_and_back(Changing())) == {"way": "own"}


class Changing:
    def __init__(self) -> None:
        self.way = "own"


def test_an_instance_may_have_its_own_way() -> None:
    odd = Empty()
    vars(odd)["__reduce_ex__"] = lambda protocol: (str, ("a string",))

    assert there_and_back(odd) == "a string"


def there_and_back(obj: Any) -> Any:
    return serializers.loads(serializers.dumps(obj))
