"""What the soak calls and moves; importable in node processes."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Any

import migrate


@migrate.server
class Worn:
    """Counts what it is asked, and keeps one array of those that it gets."""

    def __init__(self) -> None:
        self.n = 0
        self.kept: Any = None

    @migrate.call
    def incr(self) -> int:
        self.n += 1
        return self.n

    @migrate.call
    async def incr_later(self) -> int:
        await asyncio.sleep(0)
        self.n += 1
        return self.n

    @migrate.call
    def keep(self, array: Any) -> Any:
        """Keep an array, changed; gives the former one back."""
        self.n += 1
        array[0] = self.n % 100
        former, self.kept = self.kept, array
        return former

    @migrate.call
    def count(self) -> int:
        return self.n

    @migrate.call
    def drop(self) -> None:
        self.kept = None


@migrate.server(movable=False)
class Meter:
    """Tells what its node process holds."""

    @migrate.call
    def read(self) -> tuple[int, int]:
        return os.getpid(), len(asyncio.all_tasks())

    @migrate.call
    def collect(self) -> None:
        """Collect what is held by cycles alone, such as those of a traceback."""
        gc.collect()
