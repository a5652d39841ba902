"""Servers for the tests of nodes and moves; node processes import them from here."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import migrate


class Counter:
    """Undecorated, the smallest there is."""

    def __init__(self, n: int = 0) -> None:
        self.n = n

    def incr(self, by: int = 1) -> int:
        self.n += by
        return self.n

    def get(self) -> int:
        return self.n


class Where:
    """Tells where it runs."""

    def node(self) -> str:
        return migrate.current().node

    def pid(self) -> int:
        return os.getpid()


class Large:
    """A state of a chosen size, with a counter to see that nothing is lost."""

    def __init__(self, size: int) -> None:
        self.n = 0
        self.data = bytes(size)

    def incr(self, by: int = 1) -> int:
        self.n += by
        return self.n

    def size(self) -> int:
        return len(self.data)


class Gate:
    """A handler that runs until it is told to end; the telling goes around the mailbox."""

    events: dict[str, asyncio.Event] = {}  # noqa: RUF012 - shared by the test and the server

    def __init__(self, key: str) -> None:
        self.key = key
        self.passed = 0

    async def pass_through(self) -> int:
        await self.events[self.key].wait()
        self.passed += 1
        return self.passed

    def count(self) -> int:
        return self.passed


class Held:
    """Takes large arguments, none before a gate on another node is open."""

    def __init__(self, gate: Any) -> None:
        self.gate = gate
        self.open = False
        self.sizes: list[int] = []

    async def take(self, data: Any) -> None:
        if not self.open:
            await self.gate.pass_through()
            self.open = True
        self.sizes.append(len(data))

    def taken(self) -> list[int]:
        return self.sizes


class Busy:
    """A handler that takes as long as it is told."""

    async def work(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    def quick(self) -> str:
        return "quick"


class Unpicklable:
    """Carries what cannot travel, two attributes deep."""

    def __init__(self) -> None:
        self.n = 0
        self.deep: dict[str, Any] = {"frames": [1, (i for i in range(3) if i)]}
        next(self.deep["frames"][1])

    def incr(self) -> int:
        self.n += 1
        return self.n

    def mend(self) -> None:
        self.deep = {}


class Ticker:
    """Ticks, and remembers when by the machine's clock, which its processes share."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.nodes: list[str] = []

    @migrate.every(seconds=0.25)
    def tick(self) -> None:
        self.at.append(time.monotonic())
        self.nodes.append(migrate.current().node)

    def seen(self) -> list[tuple[float, str]]:
        return list(zip(self.at, self.nodes, strict=True))
