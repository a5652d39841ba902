"""The servers that `migrate bench` measures."""

from __future__ import annotations

import os
import random
from typing import Any, Final

import migrate


@migrate.server
class Counter:
    """Answers at once."""

    def __init__(self) -> None:
        self.n = 0

    @migrate.call
    def incr(self, by: int = 1) -> int:
        self.n += by
        return self.n

    @migrate.call
    async def incr_async(self, by: int = 1) -> int:
        self.n += by
        return self.n


@migrate.server
class Blob:
    """Carries a state of a given size."""

    def __init__(self, size: int) -> None:
        self.data = os.urandom(size)
        self.n = 0

    @migrate.call
    def touch(self) -> int:
        self.n += 1
        return self.n


@migrate.server
class Sink:
    """Takes whatever it gets, and tells its size."""

    @migrate.call
    def take(self, message: Any) -> int:
        return len(message)


TICK_S: Final = 0.01


@migrate.server
class Written:
    """Has a state of a given kind and size, a share of which it writes in every second.

    Args:
        kind: "arrays" (buffers, by NumPy if it is there), "records" (small dicts in a dict), or
            "mixed" (half of each).
        size: Bytes of its pickle, roughly.
        rate: Share that is written in a second, in places chosen at random.
    """

    def __init__(self, kind: str, size: int, rate: float) -> None:
        self.rate = rate
        self.due = 0.0
        self.buffer: Any = bytearray(0)
        self.records: dict[int, dict[str, Any]] = {}
        if kind != "records":
            self.buffer = _buffer(size if kind == "arrays" else size // 2)
        if kind != "arrays":
            count = max(1, (size if kind == "records" else size // 2) // RECORD_BYTES)
            self.records = {
                number: {"id": number, "name": f"item {number}", "score": 0.5, "open": True}
                for number in range(count)
            }

    @migrate.every(seconds=TICK_S)
    def write(self) -> None:
        share = self.rate * TICK_S
        count = int(len(self.buffer) * share)
        if count:
            at = random.randrange(len(self.buffer) - count + 1)
            _fill(self.buffer, at, count, random.randrange(256))
        self.due += len(self.records) * share
        for _ in range(int(self.due)):
            self.records[random.randrange(len(self.records))]["score"] = random.random()
        self.due -= int(self.due)

    @migrate.call
    def touch(self) -> int:
        return len(self.buffer) + len(self.records)


RECORD_BYTES: Final = 46
"""What one of its records takes in a pickle, as measured."""


def _fill(buffer: Any, at: int, count: int, value: int) -> None:
    # NumPy takes a number for a whole slice, a bytearray does not.
    buffer[at : at + count] = bytes([value]) * count if type(buffer) is bytearray else value


def _buffer(size: int) -> Any:
    try:
        import numpy
    except ImportError:
        return bytearray(os.urandom(size))
    return numpy.frombuffer(bytearray(os.urandom(size)), dtype=numpy.uint8).copy()
