"""A proxy for TCP that delays, swallows or cuts what goes through it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Proxy:
    """Stands between clients and one server. All of it can be changed while it runs.

    Attributes:
        address: host:port to connect to.
        delay_s: Each piece of data arrives this much later, in either direction.
        passes_requests: False: what clients send is dropped, and nobody is told.
        passes_answers: False: what the server sends is dropped, and nobody is told.
        swallowed: Set once an answer was dropped.
    """

    def __init__(self, target: str) -> None:
        self.address = ""
        self.delay_s = 0.0
        self.passes_requests = True
        self.passes_answers = True
        self.swallowed = asyncio.Event()
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        """End all connections at once."""
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, thence = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, thence}
        for forth, source, sink in ((True, reader, thence), (False, there, writer)):
            queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
            for work in (self._take(forth, source, queue), self._give(queue, sink)):
                task = asyncio.get_running_loop().create_task(work)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _take(
        self, forth: bool, source: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        loop = asyncio.get_running_loop()
        data = b"-"
        while data:
            try:
                data = await source.read(1 << 16)
            except OSError:
                data = b""
            if data and not (self.passes_requests if forth else self.passes_answers):
                if not forth:
                    self.swallowed.set()
                continue
            queue.put_nowait((loop.time() + self.delay_s, data))

    async def _give(
        self, queue: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            at_s, data = await queue.get()
            await asyncio.sleep(at_s - loop.time())
            if not data:
                sink.close()
                self._writers.discard(sink)
                return
            with contextlib.suppress(OSError):
                sink.write(data)
                await sink.drain()

    async def close(self) -> None:
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def proxy_to(target: str) -> AsyncIterator[Proxy]:
    """A proxy to host:port on a free port of loopback."""
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    proxy.address = f"{host}:{port}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
        await server.wait_closed()
