"""What nests too deep for the C pickler travels all the same, with its identities and cycles."""

from __future__ import annotations

import collections
import copyreg
import dataclasses
import gc
import pickle
import pickletools
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import serializers
from serializers import NotSerializable, auto, plain
from serializers.deep import DeepPickler
from serializers.sink import Sink

DEEP = 100_000


@dataclasses.dataclass(eq=False, repr=False)
class Node:
    value: Any = None
    next: Any = None


class Slotted:
    __slots__ = ("next",)

    def __init__(self, following: Any) -> None:
        self.next = following


class ByArguments:
    def __init__(self, following: Any) -> None:
        self.next = following

    def __reduce__(self) -> Any:
        return ByArguments, (self.next,)


class BySetter:
    next: Any = None

    def __reduce__(self) -> Any:
        return BySetter, (), self.next, None, None, set_next


def set_next(obj: Any, following: Any) -> None:
    obj.next = following


class Keyworded:
    def __new__(cls, *, following: Any) -> Any:
        made = super().__new__(cls)
        made.next = following  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> Any:
        return (), {"following": self.next}  # type: ignore[attr-defined]

    def __getstate__(self) -> None:
        return None


class Listed(list[Any]):
    pass


def chain(link: Callable[[Any], Any], length: int) -> Any:
    head: Any = "end"
    for _ in range(length):
        head = link(head)
    return head


def by_setter(following: Any) -> Any:
    made = BySetter()
    made.next = following
    return made


def of_main(following: Any) -> Any:
    """An object whose class travels by value."""
    made = Local()
    made.next = following
    return made


def _local_class() -> Any:
    class Local:
        next: Any = None

    return Local


Local = _local_class()

LINKS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "list": (lambda x: [x], lambda x: x[0]),
    "tuple": (lambda x: (x,), lambda x: x[0]),
    "tuple of four": (lambda x: (1, 2, 3, x), lambda x: x[3]),
    "dict": (lambda x: {"k": x}, lambda x: x["k"]),
    "deque": (lambda x: collections.deque([x]), lambda x: x[0]),
    "defaultdict": (lambda x: collections.defaultdict(list, k=x), lambda x: x["k"]),
    "list's subclass": (lambda x: Listed([x]), lambda x: x[0]),
    "object": (lambda x: Node(0, x), lambda x: x.next),
    "slots": (Slotted, lambda x: x.next),
    "arguments": (ByArguments, lambda x: x.next),
    "state setter": (by_setter, lambda x: x.next),
    "keywords": (lambda x: Keyworded(following=x), lambda x: x.next),
    "class by value": (of_main, lambda x: x.next),
    "frozenset": (lambda x: frozenset([x]), lambda x: next(iter(x))),
    "bound method": (lambda x: Node(0, x).__eq__, lambda x: x.__self__.next),
}


@pytest.mark.parametrize("name", LINKS)
def test_a_chain_of_any_kind_comes_back_whole(name: str) -> None:
    link, follow = LINKS[name]
    copy = serializers.loads(serializers.dumps(chain(link, 20_000)))

    for _ in range(20_000):
        copy = follow(copy)
    assert copy == "end"


def test_a_linked_list_of_100_000_comes_back_with_its_values_and_the_original_is_unharmed() -> None:
    head: Any = None
    for number in range(DEEP):
        head = Node(number, head)

    for end in (head, serializers.loads(serializers.dumps(head))):
        number = DEEP
        while end is not None:
            number -= 1
            assert end.value == number
            end = end.next
        assert number == 0


def test_a_ring_of_100_000_closes_again() -> None:
    first = last = Node(0)
    for number in range(1, DEEP):
        last.next = Node(number)
        last = last.next
    last.next = first

    copy: Any = serializers.loads(serializers.dumps([first, last]))

    node = copy[0]
    for _ in range(DEEP - 1):
        node = node.next
    assert node is copy[1] and node.next is copy[0]


def test_a_deep_tree_with_links_back_to_parents_comes_back() -> None:
    root: Any = {"parent": None, "left": None, "right": [1]}
    node = root
    for number in range(DEEP // 2):
        child: Any = {"parent": node, "left": None, "right": [number]}
        node["left"] = child
        node = child

    node = serializers.loads(serializers.dumps(root))
    for number in range(DEEP // 2):
        child = node["left"]
        assert child["parent"] is node and child["right"] == [number]
        node = child


def test_the_plain_serializer_goes_as_deep() -> None:
    snapshot = serializers.PlainSerializer().encode(chain(lambda x: Node(0, x), DEEP))

    copy: Any = serializers.PlainSerializer().decode(snapshot)
    for _ in range(DEEP):
        copy = copy.next
    assert copy == "end"


def test_shared_state_closures_and_buffers_below_the_quick_limit_stay_shared() -> None:
    shared: list[Any] = []
    array = np.arange(50_000)
    large = b"x" * 100_000
    changing = bytearray(200_000)

    def note(value: Any) -> None:
        shared.append(value)

    bottom = [shared, note, array, array[10:], large, large, changing, changing, array]
    copy: Any = serializers.loads(serializers.dumps(_on_top_of(bottom)))
    for _ in range(10_000):
        copy = copy[0]

    copy[1](7)
    assert copy[0] == [7]
    copy[2][10] = -1
    assert copy[3][0] == -1 and copy[8] is copy[2]
    assert copy[4] is copy[5] and copy[4] == large
    assert copy[6] is copy[7] and copy[6] == changing and type(copy[6]) is bytearray


def _on_top_of(bottom: Any) -> Any:
    top = bottom
    for _ in range(10_000):
        top = [top]
    return top


def test_what_cannot_travel_is_found_at_any_depth_with_both_ends_of_its_path() -> None:
    begun = (n for n in range(3))
    next(begun)
    top = _on_top_of({"here": begun})
    for _ in range(40_000):
        top = Node(0, top)

    with pytest.raises(NotSerializable) as caught:
        serializers.dumps(top)

    assert caught.value.type_name == "generator"
    assert caught.value.path.startswith("Node.next.next")
    assert caught.value.path.endswith("[0][0]['here']")
    assert len(str(caught.value)) < 1000


def test_beyond_the_last_level_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serializers.deep.LEVELS_MAX", 5_000)

    with pytest.raises(NotSerializable, match="more than 5000 levels deep") as caught:
        serializers.dumps(chain(lambda x: [x], 20_000))
    assert caught.value.path.startswith("list[0][0]")


def test_a_reducer_that_recurses_for_ever_is_refused_by_path() -> None:
    class Endless:
        def __reduce__(self) -> Any:
            return self.__reduce__()

    with pytest.raises(NotSerializable) as caught:
        serializers.dumps([1, {"k": Endless()}])

    assert caught.value.path == "list[1]['k']" and "RecursionError" in caught.value.reason


def test_the_limit_of_recursion_is_never_touched() -> None:
    before = sys.getrecursionlimit()
    seen = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(sys.getrecursionlimit())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        serializers.loads(serializers.dumps(chain(lambda x: Node(0, x), 20_000)))
    finally:
        stop.set()
        thread.join()
    assert seen == {before}


def test_the_quick_pickler_does_shallow_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sink: Sink) -> Any:
        raise AssertionError("the slow pickler was made")

    monkeypatch.setattr(auto, "_DeepAutoPickler", fail)

    serializers.dumps(chain(lambda x: [x], 100))
    with pytest.raises(AssertionError):
        serializers.dumps(chain(lambda x: [x], 20_000))


@pytest.mark.skipif(plain.STACK_IS_BOUNDED, reason="Python bounds the C stack itself")
def test_a_raised_limit_of_recursion_overflows_no_stack() -> None:
    script = """
        import sys, serializers
        sys.setrecursionlimit(10_000_000)
        top = []
        for _ in range(300_000):
            top = [top]
        copy = serializers.loads(serializers.dumps(top))
        depth = 0
        while copy:
            copy, depth = copy[0], depth + 1
        assert depth == 300_000
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_it_works_in_a_thread_with_a_stack_of_its_own_size() -> None:
    found: list[Any] = []

    def work() -> None:
        found.append(serializers.loads(serializers.dumps(chain(lambda x: {"k": x}, 50_000))))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "k" in found[0]["k"]


def _opcodes(body: bytes) -> list[tuple[str, Any]]:
    """What a pickle does, without how it is cut into frames and batches."""
    return [
        (opcode.name, argument)
        for opcode, argument, _ in pickletools.genops(body)
        if opcode.name not in ("FRAME", "MARK", "APPENDS", "APPEND", "SETITEMS", "SETITEM")
    ]


class _DeepOnly(auto._Decider, DeepPickler):
    pass


atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.binary().map(bytearray),
    st.decimals(allow_nan=False),
    st.sampled_from([int, Node, len, Slotted, type(None), type(...), copyreg.pickle, Ellipsis]),
    st.just(re.compile("a.*")),
    st.integers(0, 5000).map(np.arange),
    st.sampled_from([0, 70_000, 200_000]).map(bytes),
    st.sampled_from([0, 70_000]).map(bytearray),
)
values = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=5),
        st.frozensets(st.integers(), max_size=3),
        st.sets(st.integers(), max_size=3),
        st.builds(Node, inner, inner),
        st.builds(Slotted, inner),
        st.builds(ByArguments, inner),
        st.lists(inner, max_size=3).map(collections.deque),
        st.lists(inner, max_size=3).map(lambda items: [items, items, Listed(items)]),
    ),
    max_leaves=30,
)


@settings(deadline=None)
@given(values)
def test_it_writes_what_the_c_pickler_writes(value: Any) -> None:
    slow = _slowly(value)
    quick = serializers.encode(value)

    assert _opcodes(bytes(slow.body)) == _opcodes(bytes(quick.body))
    assert [bytes(b) for b in slow.buffers] == [bytes(b) for b in quick.buffers]
    kinds = [serializers.base.parse_head(snapshot.head).kinds for snapshot in (slow, quick)]
    assert kinds[0] == kinds[1]


def _slowly(value: Any) -> serializers.Snapshot:
    sink = Sink()
    _DeepOnly(sink).dump(value)
    return sink.snapshot(code_by_value=False)


def test_it_writes_recursive_tuples_and_reductions_as_the_c_pickler_does() -> None:
    loop: list[Any] = []
    short, long, frozen = (loop,), (1, 2, 3, loop), ByArguments(loop)
    loop += [short, long, frozen]
    node = Node()
    node.next = frozenset([node])
    for value in (loop, short, long, frozen, [short, loop, frozen], node.next, node):
        slow = bytes(_slowly(value).body)
        assert _opcodes(slow) == _opcodes(bytes(serializers.encode(value).body))
        pickle.loads(slow)


def test_more_than_a_batch_of_items_comes_back() -> None:
    value = [list(range(2500)), dict.fromkeys(range(2500)), set(range(2500)), Listed(range(2001))]
    assert pickle.loads(_slowly(value).body) == value


def test_what_is_left_of_a_deep_dump_is_freed_without_the_collector() -> None:
    gc.collect()
    before = len(gc.get_objects())
    serializers.dumps(chain(lambda x: [x], 20_000))
    assert len(gc.get_objects()) - before < 1000
