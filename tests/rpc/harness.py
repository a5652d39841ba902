"""What the tests of links share: a handler that records, and a peer made by hand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from rpc import auth, frames, handshake, memory_channel, unix_channel
from rpc.channel import Channel, Transport
from rpc.errors import RpcError
from rpc.grpc_channel import GrpcTransport
from rpc.links import LinkOptions, Links, PeerInfo, ask
from rpc.memory_channel import MemoryTransport
from rpc.unix_channel import UnixTransport

T = TypeVar("T")

SECRET = b"the secret of the tests' cluster"
PATIENCE_S = 60.0
"""Bound of every wait; nothing that works takes nearly as long."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine; whatever reaches the loop's exception handler fails it."""
    reported: list[dict[str, Any]] = []

    async def main() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, c: reported.append(c))
        async with asyncio.timeout(PATIENCE_S):
            return await work

    result = asyncio.run(main())
    # grpc.aio hands events of all loops of a process to the one that runs. One
    # of an earlier test's loop, which is closed, is not this test's concern.
    reported = [
        context
        for context in reported
        if "PollerCompletionQueue._handle_events" not in context["message"]
        or str(context["exception"]) != "Event loop is closed"
    ]
    assert reported == [], [repr(context) for context in reported]
    return result


def peer(peer_id: str, **changes: Any) -> PeerInfo:
    fields: dict[str, Any] = {"name": peer_id, "kind": "node", "address": "", "pid": 1}
    return PeerInfo(**{"id": peer_id, **fields, **changes})


class Recorder:
    """A handler that keeps what it was told and lets a test wait for more."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.links: Links | None = None
        self.on_event: Callable[[tuple[Any, ...]], None] | None = None
        self._news = asyncio.Event()

    def _add(self, *event: Any) -> None:
        self.events.append(event)
        self._news.set()
        if self.on_event is not None:
            self.on_event(event)

    def link_up(self, peer: PeerInfo) -> None:
        self._add("up", peer.id, peer)

    def link_down(self, peer: PeerInfo, cause: str) -> None:
        self._add("down", peer.id, cause)

    def received(
        self, peer_id: str, data: bytes | bytearray | memoryview | frames.Gathered
    ) -> None:
        whole = data.joined() if isinstance(data, frames.Gathered) else bytes(data)
        self._add("received", peer_id, whole)

    def dial_failed(self, address: str, expected_id: str | None, error: RpcError) -> None:
        self._add("dial_failed", address, expected_id, error)

    def accept_failed(self, address: str, error: RpcError) -> None:
        self._add("accept_failed", address, error)

    def all(self, kind: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == kind]

    @property
    def data(self) -> list[bytes]:
        return [event[2] for event in self.all("received")]

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    async def count(self, kind: str, number: int = 1) -> list[tuple[Any, ...]]:
        """Wait until so many events of a kind have come; return all of the kind."""
        await self.until(lambda: len(self.all(kind)) >= number)
        return self.all(kind)

    def check(self) -> None:
        """Assert what holds for every handler: up, then messages, then down, in turns."""
        up: set[str] = set()
        for event in self.events:
            if event[0] == "up":
                assert event[1] not in up, self.kinds()
                up.add(event[1])
            elif event[0] == "down":
                assert event[1] in up, self.kinds()
                up.remove(event[1])
            elif event[0] == "received":
                assert event[1] in up, self.kinds()

    def kinds(self) -> list[tuple[Any, ...]]:
        return [event[:2] for event in self.events]


class End:
    """One `Links` with its recorder."""

    def __init__(
        self,
        peer_id: str,
        *,
        secret: bytes = SECRET,
        options: LinkOptions | None = None,
        same_host: bool = False,
        **changes: Any,
    ) -> None:
        self.recorder = Recorder()
        # An address says which channel a test means; gRPC's is host:port.
        options = replace(options or LinkOptions(), same_host=same_host)
        self.links = Links(peer(peer_id, **changes), secret, self.recorder, options)
        self.recorder.links = self.links

    async def __aenter__(self) -> End:
        return self

    async def __aexit__(self, *_failure: object) -> None:
        await self.links.close()
        self.recorder.check()
        assert len(self.recorder.all("up")) == len(self.recorder.all("down"))


@contextlib.asynccontextmanager
async def connected(
    address: str, options: LinkOptions | None = None
) -> AsyncIterator[tuple[End, End]]:
    """Two ends with a link, dialled by "a" and accepted by "b"."""
    async with End("b", options=options) as b, End("a", options=options) as a:
        where = await b.links.listen(address)
        await a.links.connect(where, PATIENCE_S)
        await b.recorder.count("up")
        yield a, b


def transport(address: str) -> Transport:
    if address.startswith(memory_channel.SCHEME):
        return MemoryTransport()
    if address.startswith(unix_channel.SCHEME):
        return UnixTransport(frame_bytes_max=frames.frame_bytes_max())
    return GrpcTransport(frame_bytes_max=frames.frame_bytes_max(), silence_max_s=20)


class HandMade:
    """A dialling peer whose every frame the test decides on."""

    def __init__(self, channel: Channel, peer_id: str = "z", secret: bytes = SECRET) -> None:
        self.channel = channel
        self.me = peer(peer_id)
        self.secret = secret
        self.outbox = frames.Outbox(b"unset")
        self.inbox = frames.Inbox(b"unset")

    async def hello(self) -> auth.Transcript:
        """Exchange HELLO and CHALLENGE."""
        nonce, info = auth.new_nonce(), self.me.to_bytes()
        frame = await ask(self.channel, [handshake.hello(nonce, info)])
        theirs, their_info, _peer, _proof = handshake.read_challenge(frame, "there")
        transcript = auth.Transcript(nonce, theirs, info, their_info)
        keys = auth.link_keys(self.secret, transcript)
        self.outbox = frames.Outbox(keys.from_dialler)
        self.inbox = frames.Inbox(keys.from_acceptor)
        return transcript

    async def prove(self, ended_link: bytes = b"") -> list[frames.Received]:
        """Do the whole handshake; returns what came with the answer."""
        transcript = await self.hello()
        proof = auth.dialler_proof(self.secret, transcript)
        self.outbox.push_control(frames.PROOF, handshake.proof(proof, ended_link))
        await self.flush()
        return await self.items()

    async def flush(self) -> bytes:
        """Send what is in the outbox; returns the last frame."""
        frame = b""
        while (parts := self.outbox.take()) is not None:
            frame = b"".join(parts)
            await self.channel.write([frame])
        return frame

    async def items(self) -> list[frames.Received]:
        frame = await self.channel.read()
        assert frame is not None
        return self.inbox.feed(frame)
