"""A gRPC channel keeps its loop awake for what comes back, and stops where that is in vain."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from rpc import polling
from rpc.channel import Channel
from rpc.grpc_channel import GrpcTransport
from rpc.polling import POLL_S, Polling
from tests.rpc.harness import run


class Clock:
    """The time, the loop's processor time, and how often the processor was offered to others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.busy_s = 0.0
        self.offered = 0
        self.taken_s = 0.0
        monkeypatch.setattr(polling, "_now", lambda: self.now_s)
        monkeypatch.setattr(polling, "_busy_s", lambda: self.busy_s)
        monkeypatch.setattr(polling, "_offer_processor", self.offer)

    def offer(self) -> None:
        self.offered += 1
        self.now_s += self.taken_s


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[Channel, Channel]]:
    """Both ends of a connection, over which a frame has gone in either direction."""
    accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def accept(channel: Channel) -> None:
        accepted.set_result(channel)
        await over.wait()

    transport = GrpcTransport(frame_bytes_max=1 << 20, silence_max_s=60)
    listener = await transport.listen("127.0.0.1:0", accept)
    dialled = await transport.dial(listener.address)
    try:
        await dialled.write([b"first"])
        there = await accepted
        assert await there.read() == b"first"
        await there.write([b"first"])
        assert await dialled.read() == b"first"
        yield dialled, there
    finally:
        over.set()
        await dialled.close()
        await listener.close(0)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until_over(channel: Channel) -> None:
    """Until no turn of polling is left; that of a test's end must not outlast its clock."""
    while channel._poll_due:  # type: ignore[attr-defined]
        await turns(1)


def on(channel: Channel) -> bool:
    return channel._polling.until is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize("end", ["dialled", "accepted"])
def test_the_loop_is_kept_awake_until_something_comes(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        clock = Clock(monkeypatch)
        async with pair() as ends:
            here, there = ends if end == "dialled" else ends[::-1]
            clock.now_s += 1.1 * POLL_S
            await until_over(here)
            await until_over(there)
            assert not on(here) and not on(there)
            await here.write([b"call"])
            assert on(here) and not on(there)
            offered = clock.offered
            await turns()
            assert clock.offered >= offered + 4
            assert await there.read() == b"call"
            await there.write([b"reply"])
            assert on(here) and on(there)
            assert await here.read() == b"reply"
            assert not on(here) and on(there)
            clock.now_s += 1.1 * POLL_S
            await until_over(here)
            await until_over(there)
            offered = clock.offered
            await turns()
            assert clock.offered == offered

    run(scenario())


def test_polling_in_vain_becomes_rare_and_frequent_again_when_something_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        clock = Clock(monkeypatch)
        async with pair() as (here, there):
            await until_over(here)
            await there.write([b"before"])
            assert await here.read() == b"before"

            async def writes_until_polled() -> int:
                count = 0
                while not on(here):
                    await here.write([b"cast"])
                    count += 1
                clock.now_s += 1.1 * POLL_S
                await until_over(here)
                return count

            assert [await writes_until_polled() for _ in range(6)] == [1, 1, 2, 4, 8, 16]
            while not on(here):
                await here.write([b"cast"])
            await there.write([b"reply"])
            assert await here.read() == b"reply"
            assert await writes_until_polled() == 1

    run(scenario())


def test_a_processor_that_was_offered_and_taken_is_not_offered_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        clock = Clock(monkeypatch)
        async with pair() as (here, _):
            await until_over(here)
            clock.taken_s = 3 * POLL_S
            await here.write([b"call"])
            await until_over(here)
            clock.taken_s = 0.0
            for _ in range(5):
                assert not on(here)
                await here.write([b"call"])
            assert not on(here)
            clock.now_s += polling.NO_POLL_S
            await here.write([b"call"])
            assert on(here)
            clock.now_s += 1.1 * POLL_S
            await until_over(here)

    run(scenario())


def test_a_loop_polls_few_channels_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        clock = Clock(monkeypatch)
        loop = asyncio.get_running_loop()
        several = [Polling(loop) for _ in range(polling.CHANNELS_MAX + 2)]
        assert [it.begin() for it in several].count(True) == polling.CHANNELS_MAX
        assert not several[-1].begin()
        several[0].came()
        assert several[-1].begin() and not several[0].begin()
        # Those whose channels were forgotten take no place for ever.
        del several[1:]
        clock.now_s += POLL_S
        assert [Polling(loop).begin() for _ in range(9)].count(True) == polling.CHANNELS_MAX

    run(scenario())


def test_where_a_processor_cannot_be_offered_nothing_is_polled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(polling, "_offer_processor", None)
        async with pair() as (here, there):
            assert not on(here) and not on(there)

    run(scenario())
