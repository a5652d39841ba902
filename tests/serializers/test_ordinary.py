"""Small objects of ordinary classes are written by pickle alone: the same bytes, in less time."""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import serializers
from serializers import auto, by_value
from serializers.errors import NotSerializable


class Box:
    """An ordinary class."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Objects that pickle has written by itself."""
    seen: list[object] = []
    real = auto._ordinary_body

    def body(obj: object) -> bytes | None:
        found = real(obj)
        if found is not None:
            seen.append(obj)
        return found

    serializers.dumps(Box(known=True))  # its class is decided
    monkeypatch.setattr(auto, "_ordinary_body", body)
    yield seen


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.binary(max_size=99),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text("abc", min_size=1), VALUES, max_size=5))
def test_the_bytes_are_those_that_our_pickler_writes(attributes: dict[str, Any]) -> None:
    box = Box(**attributes)
    serializers.dumps(Box(known=True))
    data = serializers.dumps(box)
    sink, _ = auto._write(box)
    assert data == sink.plain_string()
    assert serializers.loads(data) == box


def test_an_object_with_few_built_in_attributes_takes_the_short_way(alone: list[object]) -> None:
    box = Box(count=1, rest=b"x" * 1000, names=["a", "b"])
    assert serializers.loads(serializers.dumps(box)) == box
    assert alone == [box]


def test_what_shares_its_attributes_with_something_else_does_not(alone: list[object]) -> None:
    shared: dict[str, Any] = {"count": 1}
    one, two = Box(), Box()
    one.__dict__ = shared
    two.__dict__ = shared
    serializers.dumps(one)
    assert not alone
    copies: Any = serializers.loads(serializers.dumps([one, two]))
    copies[0].count = 2
    assert copies[1].count == 2


def test_an_object_that_says_itself_how_it_is_pickled_does_not(alone: list[object]) -> None:
    for name in ("__getstate__", "__reduce_ex__"):
        with pytest.raises(NotSerializable):
            serializers.dumps(Box(**{name: None}))
    assert not alone


def test_large_parts_leave_the_body_as_ever(alone: list[object]) -> None:
    box = Box(large=bytes(1 << 20))
    assert serializers.loads(serializers.dumps(box)) == box
    assert not alone


def test_what_is_registered_later_counts(alone: list[object]) -> None:
    assert serializers.loads(serializers.dumps(Box(count=1))) == Box(count=1)
    assert len(alone) == 1
    copyreg.pickle(Box, lambda box: (Box, (), {"count": box.count + 1}))
    try:
        assert serializers.loads(serializers.dumps(Box(count=1))) == Box(count=2)
    finally:
        copyreg.dispatch_table.pop(Box)
    assert len(alone) == 1


def test_a_class_that_is_to_travel_by_value_does(alone: list[object]) -> None:
    by_value.register_by_value(sys.modules[__name__])
    try:
        data = serializers.dumps(Box(count=1))
    finally:
        by_value.unregister_by_value(sys.modules[__name__])
    assert not alone
    assert b"__init__" in data  # the class itself


def test_a_class_that_another_one_has_replaced_travels_as_our_pickler_says(
    alone: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(count=1)
    monkeypatch.setattr(sys.modules[__name__], "Box", type("Box", (), {}))
    copy: Any = serializers.loads(serializers.dumps(box))
    assert copy.count == 1 and not alone
