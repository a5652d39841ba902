"""Servers of the tests on several hosts."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any, Final


class Timed:
    """Tells when it last left and arrived. Hosts of namespaces share the machine's clock."""

    def __init__(self) -> None:
        self.left_s = 0.0
        self.arrived_s = 0.0

    def on_depart(self) -> None:
        self.left_s = time.monotonic()

    def on_arrive(self) -> None:
        self.arrived_s = time.monotonic()

    def times(self) -> tuple[float, float]:
        return self.left_s, self.arrived_s


class Large:
    """Carries a state of a given kind and size."""

    KINDS: Final = {
        "bytes": os.urandom,
        "bytearray": lambda size: bytearray(os.urandom(size)),
        "records": lambda size: {number: [str(number), number] for number in range(size // 100)},
    }

    def __init__(self, kind: str, size: int) -> None:
        self.data = self.KINDS[kind](size)


class Prober:
    """Calls a counter at a steady pace, however long its answers take."""

    EACH_S: Final = 0.005

    def __init__(self, ref: Any) -> None:
        self._ref = ref
        self._calls = 0

    async def probe(self, seconds: float) -> list[float]:
        """Seconds that each call took, from when it was due."""
        took: list[float] = []

        async def call(due_s: float, number: int) -> None:
            value = await self._ref.incr()
            took.append(time.perf_counter() - due_s)
            if value != number:
                raise AssertionError(f"call {number} was counted as {value}")

        begun_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for turn in range(int(seconds / self.EACH_S)):
                due_s = begun_s + turn * self.EACH_S
                await asyncio.sleep(due_s - time.perf_counter())
                self._calls += 1
                group.create_task(call(due_s, self._calls))
        return took
