"""Servers for the tests of checkpoints; node processes import them from here."""

from __future__ import annotations

import asyncio
import os
from typing import Any, ClassVar

import numpy as np

import migrate


class Bank:
    """Tells another server, and remembers what it was told and where."""

    def __init__(self, other: Any = None) -> None:
        self.n = 0
        self.other = other
        self.log: list[str] = []
        self.hooks: list[str] = []
        self.shared = self.log
        self.callback = self.pay

    def pay(self, what: str) -> int:
        self.log.append(what)
        self.n += 1
        return self.n

    async def relay(self, what: str) -> Any:
        self.pay(what)
        return await self.other.pay(what)

    async def tell(self, what: str) -> None:
        await self.other.pay.cast(what)

    def read(self) -> list[str]:
        return self.log

    def is_one(self) -> bool:
        return self.shared is self.log and self.callback.__self__ is self

    def told(self) -> list[str]:
        return self.hooks

    def on_start(self) -> None:
        self.hooks.append("start")

    def on_depart(self) -> None:
        self.hooks.append("depart")

    def on_stay(self) -> None:
        self.hooks.append("stay")

    def on_arrive(self) -> None:
        self.hooks.append("arrive")

    def on_stop(self) -> None:
        self.hooks.append("stop")


class Slow:
    """Takes long to pickle, and can be made to wait in a handler."""

    gates: ClassVar[dict[str, asyncio.Event]] = {}

    def __init__(self, key: str = "") -> None:
        self.key = key
        self.n = 0

    def incr(self) -> int:
        self.n += 1
        return self.n

    async def wait(self) -> int:
        await self.gates[self.key].wait()
        return self.incr()

    async def background(self) -> None:
        self.task = asyncio.create_task(self.wait())

    def __getstate__(self) -> dict[str, Any]:
        gate = PICKLING.get(self.key)
        if gate is not None:
            gate.begun.set()
            gate.go_on.wait()
        return {"key": self.key, "n": self.n}


class Gate:
    """Holds a pickling thread until a test lets it go on."""

    def __init__(self) -> None:
        import threading

        self.begun = threading.Event()
        self.go_on = threading.Event()


PICKLING: dict[str, Gate] = {}


class Arrays:
    """A large state, most of it arrays."""

    def __init__(self, size: int) -> None:
        self.data = np.arange(size, dtype=np.int64)
        self.noise = np.frombuffer(os.urandom(200_000), np.uint8).copy()
        self.n = 0

    def incr(self) -> int:
        self.n += 1
        self.data[0] = self.n
        return self.n

    def sums(self) -> tuple[int, int, int]:
        return self.n, int(self.data.sum()), int(self.noise.sum())


class Large:
    """A state that is written ahead, of which each call changes a little."""

    def __init__(self) -> None:
        self.n = 0
        self.data = np.zeros(200_000, dtype=np.int64)
        self.rows = {n: {"id": 0, "tags": [n]} for n in range(5_000)}
        self.other: Any = None

    def write(self) -> int:
        self.n += 1
        self.data[self.n * 7_919 % len(self.data)] = self.n
        row = self.rows[self.n * 37 % len(self.rows)]
        row["id"] = self.n
        if self.n % 3 == 0:
            row["tags"].append(self.n)
        return self.n

    async def linger(self) -> None:
        await asyncio.sleep(0.05)

    def is_whole(self) -> bool:
        """Whether it is what so many calls make of it, and nothing in between."""
        twin = Large()
        for _ in range(self.n):
            twin.write()
        return bool((twin.data == self.data).all()) and twin.rows == self.rows


class Tick:
    """Counts its own ticks."""

    def __init__(self) -> None:
        self.ticks = 0

    @migrate.every(seconds=0.2)
    def tick(self) -> None:
        self.ticks += 1

    def seen(self) -> int:
        return self.ticks
