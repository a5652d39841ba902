"""Memory of large objects: what is made, what is written into it, and who may run meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serializers import memory
from serializers.base import BufferKind

KINDS = list(BufferKind)
SIZES = [0, 1, 2, 4095, 4096, 4097, memory.LARGE_BYTES - 1, memory.LARGE_BYTES, 3 << 20]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [*KINDS, 77])
def test_what_is_made_is_all_zeros_and_takes_what_is_written(kind: int, size: int) -> None:
    made = memory.blank(size, kind)
    assert len(made) == size and bytes(made) == bytes(size)
    data = bytes(range(1, 256)) * (size // 255 + 1)
    memory.write(made, 0, memoryview(data)[:size])
    assert bytes(made) == data[:size]


@pytest.mark.parametrize("size", SIZES)
def test_what_the_interpreter_shares_is_never_written(size: int) -> None:
    """Of the shortest strings it has one each; all others here are nobody else's."""
    made = memory.blank(size, BufferKind.BYTES)
    memory.write(made, 0, memoryview(b"\xff" * size))
    # By number: what was overwritten would be equal to itself.
    assert [bytes([n])[0] for n in range(256)] == list(range(256)) and len(b"") == 0
    assert sum(memory.blank(size, BufferKind.BYTES)) == 0


@pytest.mark.parametrize("size", [4096, 1 << 20])
def test_kinds_are_what_an_object_has_to_hold(size: int) -> None:
    assert type(memory.blank(size, BufferKind.BYTES)) is bytes
    assert type(memory.blank(size, BufferKind.READ_ONLY)) is bytes
    array = memory.blank(size, BufferKind.BYTEARRAY)
    assert type(array) is bytearray
    array += b"more"  # It can be resized, as any other.
    assert len(array) == size + 4
    view = memory.blank(size, BufferKind.WRITABLE)
    assert type(view) is memoryview and not view.readonly and type(view.obj) is memory.Pages


@pytest.mark.parametrize(("offset", "length"), [(-1, 4), (0, 5001), (5000, 1), (4999, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_beyond_the_end(kind: int, offset: int, length: int) -> None:
    made = memory.blank(5000, kind)
    with pytest.raises(ValueError, match="of 5000"):
        memory.write(made, offset, memoryview(b"x" * length))
    assert bytes(made) == bytes(5000)


def test_what_cannot_be_had_is_a_memory_error() -> None:
    for kind in KINDS:
        with pytest.raises((MemoryError, OverflowError)):
            memory.blank(1 << 62, kind)


@given(
    st.sampled_from(KINDS),
    st.integers(0, 600_000),
    st.lists(st.tuples(st.integers(0, 600_000), st.integers(0, 300_000), st.integers(1, 255))),
)
@settings(max_examples=60, deadline=None)
def test_writes_are_those_to_a_bytearray(
    kind: int, size: int, writes: list[tuple[int, int, int]]
) -> None:
    made = memory.blank(size, kind)
    expected = bytearray(size)
    for offset, length, value in writes:
        length = min(length, size - offset)
        if length < 0:
            continue
        memory.write(made, offset, memoryview(bytes([value]) * length))
        expected[offset : offset + length] = bytes([value]) * length
    assert bytes(made) == expected
    copy = memory.copied(made, kind)
    assert bytes(copy) == expected and (copy is not made or not size)
    assert memory.copied_bytes(memoryview(made)) == expected


@contextmanager
def nobody_is_switched_to() -> Iterator[None]:
    """Other threads run only while the interpreter's lock is released."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def ran_meanwhile(work: Callable[[], Any]) -> bool:
    """Whether another thread was able to run while some work was done."""
    go, ran, may_end = threading.Event(), [], threading.Event()

    def other() -> None:
        go.wait()
        ran.append(True)
        may_end.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with nobody_is_switched_to():
        go.set()
        work()
        found = bool(ran)
    may_end.set()
    thread.join()
    return found


LARGE = bytes(64 << 20)


@pytest.mark.parametrize(
    "work",
    [
        lambda: memory.copied_bytes(memoryview(LARGE)),
        lambda: memory.copied(LARGE, BufferKind.BYTEARRAY),
        lambda: memory.copied(LARGE, BufferKind.WRITABLE),
    ],
)
def test_others_run_while_much_is_copied(work: Callable[[], Any]) -> None:
    # Once is enough: whether the other thread gets a core in time is the kernel's affair.
    assert any(ran_meanwhile(work) for _ in range(100))


@pytest.mark.parametrize("work", [lambda: bytearray(LARGE), lambda: bytes(memoryview(LARGE))])
def test_control_nobody_runs_while_python_copies(work: Callable[[], Any]) -> None:
    assert not any(ran_meanwhile(work) for _ in range(10))
