"""The servers that `migrate bench` measures."""

from __future__ import annotations

import os

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
