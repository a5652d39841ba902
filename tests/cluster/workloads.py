"""Servers whose histories are checked; node processes import them from here.

Every method answers with its result, and with the node and the epoch it ran at: whatever a
former owner has answered shows by these. `pad` and `ballast` only make requests and states large.
"""

from __future__ import annotations

import asyncio
from typing import Any

import migrate


def told(result: Any) -> tuple[Any, str, int]:
    """A result, and where and when in the server's life it was made."""
    current = migrate.current()
    return result, current.node, current.epoch


class Register:
    """See `linearizable.Register`."""

    def __init__(self, ballast_bytes: int = 0) -> None:
        self.value = 0
        self.ballast = bytes(ballast_bytes)

    def read(self, pad: bytes = b"") -> Any:
        return told(self.value)

    def write(self, value: int, pad: bytes = b"") -> Any:
        self.value = value
        return told(None)

    def cas(self, old: int, new: int, pad: bytes = b"") -> Any:
        if self.value != old:
            return told(False)
        self.value = new
        return told(True)


class Counter:
    """See `linearizable.Counter`."""

    def __init__(self, ballast_bytes: int = 0) -> None:
        self.value = 0
        self.nonces: list[str] = []
        self.ballast = bytes(ballast_bytes)

    def increment(self, nonce: str, pad: bytes = b"") -> Any:
        self.value += 1
        self.nonces.append(nonce)
        return told(self.value)

    async def increment_slowly(self, nonce: str) -> Any:
        """So slowly that its sender repeats it."""
        await asyncio.sleep(0.6)
        return self.increment(nonce)

    def read(self, pad: bytes = b"") -> Any:
        return told(self.value)

    def taken(self) -> Any:
        return told(self.nonces)


class AppendList:
    """See `linearizable.AppendList`."""

    def __init__(self, ballast_bytes: int = 0) -> None:
        self.elements: list[str] = []
        self.ballast = bytes(ballast_bytes)

    def append(self, element: str, pad: bytes = b"") -> Any:
        self.elements.append(element)
        return told(len(self.elements))

    def read(self, pad: bytes = b"") -> Any:
        return told(tuple(self.elements))

    def taken(self) -> Any:
        return told(self.elements)


class GrowingSet:
    """See `linearizable.GrowingSet`; keeps a list, in which an element could be twice."""

    def __init__(self, ballast_bytes: int = 0) -> None:
        self.elements: list[str] = []
        self.ballast = bytes(ballast_bytes)

    async def add(self, element: str, pad: bytes = b"") -> Any:
        self.elements.append(element)
        return told(None)

    async def read(self, pad: bytes = b"") -> Any:
        return told(frozenset(self.elements))

    def taken(self) -> Any:
        return told(self.elements)


class Relay:
    """Asks others in its own name: a sender that moves."""

    async def ask(self, ref: Any, method: str, *args: Any, pad: bytes = b"") -> Any:
        return await getattr(ref, method)(*args)

    async def tell(self, ref: Any, method: str, *args: Any, pad: bytes = b"") -> None:
        await getattr(ref, method).cast(*args)
