"""A large load in a thread lets other threads have their turn."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

import serializers
from serializers import plain
from serializers.errors import LoadFailed

T = TypeVar("T")
STATE: dict[str, Any] = {
    "records": [{"i": i, "text": "x" * (i % 50)} for i in range(20_000)],
    "bytes": b"z" * 70_000,
    "text": "y" * 100_000,
    "number": 10**3000,
}


def in_thread(work: Callable[[], T]) -> T:
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_loads_in_a_thread(protocol: int) -> None:
    body = pickle.dumps(STATE, protocol)
    assert len(body) > plain.YIELDING_BYTES_MIN
    assert in_thread(lambda: plain.load(body, ())) == STATE


@pytest.mark.parametrize("cut", [1, 1000, 100_000])
def test_a_body_that_is_cut_short_is_refused_in_a_thread_too(cut: int) -> None:
    body = pickle.dumps(STATE, 5)[:-cut]
    with pytest.raises(LoadFailed, match="cut short"):
        in_thread(lambda: plain.load(body, ()))


def test_another_thread_runs_while_a_large_body_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = serializers.dumps(STATE)
    turns = 0
    over = threading.Event()

    def spin() -> None:
        nonlocal turns
        while not over.is_set():
            turns += 1

    seen: list[int] = []
    read = plain._Frames.read

    def read_turn(self: plain._Frames, size: int = -1) -> bytes:
        seen.append(turns)
        return read(self, size)

    monkeypatch.setattr(plain._Frames, "read", read_turn)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    other = threading.Thread(target=spin)
    other.start()
    try:
        # The lock is given up when another thread asks; whether it does is the machine's affair.
        for _ in range(100):
            seen.clear()
            in_thread(lambda: serializers.loads(data))
            if len(set(seen)) > 1:
                break
    finally:
        over.set()
        other.join()
        sys.setswitchinterval(interval)
    assert len(set(seen)) > 1, "nobody else ran between two reads"


def test_a_load_in_the_main_thread_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_turn(self: plain._Frames, size: int = -1) -> bytes:
        raise AssertionError("read piece by piece")

    monkeypatch.setattr(plain._Frames, "read", read_turn)
    assert serializers.loads(serializers.dumps(STATE)) == STATE
