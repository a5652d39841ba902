"""Server classes for the type checkers; never run."""

from collections.abc import AsyncIterator
from typing import Generic, TypeVar

import migrate

T = TypeVar("T")


@migrate.server
class Counter:
    def __init__(self, start: int = 0) -> None:
        self.n = start

    @migrate.call
    def incr(self, by: int = 1) -> int:
        self.n += by
        return self.n

    @migrate.call
    async def peek(self, *, scale: float = 1.0) -> float:
        # Inside the server a handler is the plain method that it was.
        one: int = self.incr(1)
        return one * scale

    def undecorated(self, text: str) -> bytes:
        return text.encode()

    async def undecorated_async(self, text: str) -> bytes:
        return text.encode()

    @migrate.blocking
    def crunch(self, path: str) -> int:
        return len(path)

    @migrate.call
    @migrate.blocking()
    def crunch_for_all(self, path: str) -> int:
        return self.crunch(path)

    @migrate.every(seconds=1.0)
    def tick(self) -> None:
        self.incr()

    @migrate.call
    @migrate.every(seconds=60)
    async def tick_async(self, times: int = 1) -> int:
        return times


@migrate.server(
    version=2, mailbox=100, reentrant=True, movable=False, former_names=("old.rooms:Hall",)
)
class Room(Counter):
    """Inherits handlers and overrides one."""

    def __init__(self, owner: str, size: int, *, open: bool = True) -> None:
        super().__init__()
        self.owner = owner

    @migrate.call
    def incr(self, by: int = 1) -> int:
        return super().incr(by) * 2

    @migrate.call
    def join(self, who: migrate.Ref[Counter]) -> list[migrate.Ref[Counter]]:
        return [who]


class Box(Generic[T]):
    def __init__(self, content: T) -> None:
        self.content = content

    @migrate.call
    def size(self) -> int:
        return 1


class Feed:
    @migrate.call
    async def follow(self) -> AsyncIterator[int]:
        yield 1
