"""The channel interface inside one process and one event loop.

For nodes that share a process, and for tests. Addresses are `memory:NAME`.
Frames are copied once, as on a wire, so neither end sees later changes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence

from rpc.channel import Accept, Buffer, Channel, Listener, Transport
from rpc.errors import ChannelBroken, ListenFailed, Unreachable

SCHEME = "memory:"

FRAMES_MAX = 4
"""Frames under way in one direction before a write waits."""


class _Pipe:
    """One direction of a connection."""

    __slots__ = ("broken", "finished", "frames", "reader", "writer")

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.finished = False
        self.broken = False
        self.reader: asyncio.Future[None] | None = None
        self.writer: asyncio.Future[None] | None = None

    def wake_reader(self) -> None:
        if self.reader is not None and not self.reader.done():
            self.reader.set_result(None)

    def wake_writer(self) -> None:
        if self.writer is not None and not self.writer.done():
            self.writer.set_result(None)


class MemoryChannel(Channel):
    """One end of a pair made by `pair`."""

    kind = "memory"

    def __init__(self, address: str, outgoing: _Pipe, incoming: _Pipe) -> None:
        """Use `pair` instead."""
        self.address = address
        self._outgoing = outgoing
        self._incoming = incoming

    def _broken(self) -> ChannelBroken:
        return ChannelBroken(f"the connection to {self.address} was ended", address=self.address)

    async def write(self, parts: Sequence[Buffer]) -> None:
        """See `Channel.write`."""
        pipe = self._outgoing
        if pipe.broken or pipe.finished:
            raise self._broken()
        pipe.frames.append(b"".join(parts))
        pipe.wake_reader()
        while len(pipe.frames) >= FRAMES_MAX:
            pipe.writer = asyncio.get_running_loop().create_future()
            try:
                await pipe.writer
            finally:
                pipe.writer = None
            if pipe.broken:
                raise self._broken()

    async def read(self) -> bytes | None:
        """See `Channel.read`."""
        pipe = self._incoming
        while True:
            if pipe.broken:
                raise self._broken()
            if pipe.frames:
                frame = pipe.frames.popleft()
                pipe.wake_writer()
                return frame
            if pipe.finished:
                return None
            pipe.reader = asyncio.get_running_loop().create_future()
            try:
                await pipe.reader
            finally:
                pipe.reader = None

    async def finish(self) -> None:
        """See `Channel.finish`."""
        self._outgoing.finished = True
        self._outgoing.wake_reader()

    def abort(self) -> None:
        """See `Channel.abort`."""
        for pipe in (self._outgoing, self._incoming):
            pipe.broken = True
            pipe.frames.clear()
            pipe.wake_reader()
            pipe.wake_writer()

    async def close(self) -> None:
        """See `Channel.close`."""
        # A finished direction keeps what the other end has still to read.
        if self._outgoing.finished:
            self._incoming.broken = True
            self._incoming.frames.clear()
            self._incoming.wake_writer()
            self._incoming.wake_reader()
        else:
            self.abort()


def pair(
    dialled: str = "memory:acceptor", dialling: str = "memory:dialler"
) -> tuple[MemoryChannel, MemoryChannel]:
    """Make a connection.

    Args:
        dialled: What the dialling end calls the other.
        dialling: What the accepting end calls the other.

    Returns:
        The dialling end and the accepting end.
    """
    there, back = _Pipe(), _Pipe()
    return MemoryChannel(dialled, there, back), MemoryChannel(dialling, back, there)


_listeners: dict[str, _MemoryListener] = {}
_numbers = itertools.count(1)


class _MemoryListener(Listener):
    def __init__(self, address: str, accept: Accept) -> None:
        self.address = address
        self._accept = accept
        self._tasks: set[asyncio.Task[None]] = set()

    def connect(self) -> MemoryChannel:
        ours, theirs = pair(self.address, f"{SCHEME}dialler-{next(_numbers)}")
        task = asyncio.get_running_loop().create_task(self._serve(theirs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return ours

    async def _serve(self, channel: MemoryChannel) -> None:
        try:
            await self._accept(channel)
            await channel.finish()
        finally:
            await channel.close()

    async def close(self, grace_s: float) -> None:
        if _listeners.get(self.address) is self:
            del _listeners[self.address]
        tasks = set(self._tasks)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=grace_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)


class MemoryTransport(Transport):
    """Listeners and channels of this process."""

    async def listen(self, address: str, accept: Accept) -> Listener:
        """See `Transport.listen`. `memory:` alone chooses a free name."""
        if address == SCHEME:
            address = f"{SCHEME}{next(_numbers)}"
        if address in _listeners:
            raise ListenFailed(
                f"{address} is taken in this process; close its listener or choose another name",
                address=address,
            )
        listener = _listeners[address] = _MemoryListener(address, accept)
        return listener

    async def dial(self, address: str) -> Channel:
        """See `Transport.dial`."""
        listener = _listeners.get(address)
        if listener is None:
            raise Unreachable(f"nothing listens at {address} in this process", address=address)
        return listener.connect()
