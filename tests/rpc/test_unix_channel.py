"""The Unix-domain channel: what is its own beyond what all channels promise."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from rpc import polling, unix_channel
from rpc.channel import Buffer, Channel
from rpc.errors import ChannelBroken, FrameError, ListenFailed, Unreachable
from rpc.unix_channel import UnixChannel, UnixTransport
from tests.rpc.harness import PATIENCE_S, End, run

pytestmark = pytest.mark.skipif(
    not unix_channel.AVAILABLE, reason="this system has no abstract sockets"
)

FRAME_BYTES_MAX = 1 << 20


@contextlib.asynccontextmanager
async def raw_pair() -> AsyncIterator[tuple[UnixChannel, socket.socket]]:
    """A channel, and a bare socket at the other end."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    channel = UnixChannel(ours, "unix:test", FRAME_BYTES_MAX)
    try:
        yield channel, theirs
    finally:
        await channel.close()
        theirs.close()


def framed(*frames: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)


def test_frames_cut_anywhere_arrive_whole() -> None:
    sent = [b"a", b"bc" * 100, bytes(range(256)) * 20]
    stream = framed(*sent)

    async def scenario() -> None:
        for step in (1, 2, 3, 5, 7, 64, 1000, len(stream)):
            async with raw_pair() as (channel, there):
                got = []
                for at in range(0, len(stream), step):
                    there.sendall(stream[at : at + step])
                    # Each piece is read before the next one is there.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                    while channel._frames:
                        frame = await channel.read()
                        assert frame is not None
                        got.append(bytes(frame))
                while len(got) < len(sent):
                    frame = await channel.read()
                    assert frame is not None
                    got.append(bytes(frame))
                assert got == sent

    run(scenario())


def test_an_end_in_the_middle_of_a_frame_or_a_length_breaks_the_channel() -> None:
    async def scenario() -> None:
        for cut in (b"", b"\x05\0", framed(b"whole") + b"\x05", framed(b"hello")[:-1]):
            async with raw_pair() as (channel, there):
                there.sendall(cut)
                there.close()
                if cut.startswith(framed(b"whole")):
                    assert await channel.read() == b"whole"
                with pytest.raises(ChannelBroken, match="gone"):
                    await channel.read()
                with pytest.raises(ChannelBroken):
                    await channel.write([b"x"])

    run(scenario())


def test_a_frame_over_the_limit_is_refused_before_its_memory_is_taken() -> None:
    async def scenario() -> None:
        async with raw_pair() as (channel, there):
            there.sendall(struct.pack("<I", FRAME_BYTES_MAX + 1) + b"x")
            with pytest.raises(FrameError, match="limit"):
                await channel.read()
            assert channel._partial is None

    run(scenario())


def test_what_follows_the_end_is_refused() -> None:
    async def scenario() -> None:
        async with raw_pair() as (channel, there):
            there.sendall(framed(b"one", b"", b"two"))
            assert await channel.read() == b"one"
            with pytest.raises(FrameError, match="after it had finished"):
                await channel.read()

    run(scenario())


def test_a_reader_that_does_not_come_stops_the_writer_and_nothing_is_lost() -> None:
    async def scenario() -> None:
        async with raw_pair() as (channel, there):
            frames = [os.urandom(100_000) for _ in range(40)]
            other = UnixChannel(there.dup(), "unix:test", FRAME_BYTES_MAX)
            written = 0

            async def write() -> None:
                nonlocal written
                for frame in frames:
                    await channel.write([frame[:10], frame[10:]])
                    written += 1
                await channel.finish()

            task = asyncio.create_task(write())
            seen = -1
            while seen != written:
                seen = written
                for _ in range(100):
                    await asyncio.sleep(0)
            assert written < len(frames)
            got = []
            while (frame := await other.read()) is not None:
                got.append(bytes(frame))
            assert got == frames
            await task
            await other.close()

    run(scenario())


def test_an_abort_ends_a_write_that_waits() -> None:
    async def scenario() -> None:
        async with raw_pair() as (channel, _there):
            task = asyncio.create_task(channel.write([bytes(FRAME_BYTES_MAX)]))
            await asyncio.sleep(0)
            assert not task.done()
            channel.abort()
            with pytest.raises(ChannelBroken):
                await task

    run(scenario())


def test_receive_hands_over_until_told_to_stop_and_keeps_the_rest() -> None:
    async def scenario() -> None:
        async with raw_pair() as (channel, there):
            got: list[bytes] = []

            def two(frame: Buffer) -> bool:
                got.append(bytes(frame))
                return len(got) < 2

            there.sendall(framed(b"1", b"2", b"3"))
            assert await channel.receive(two) is True
            assert got == [b"1", b"2"]
            assert await channel.read() == b"3"

            def bad(_frame: Buffer) -> bool:
                raise KeyError("handler")

            there.sendall(framed(b"4", b"5"))
            with pytest.raises(KeyError):
                await channel.receive(bad)
            assert await channel.read() == b"5"

            there.sendall(framed(b""))
            assert await channel.receive(bad) is False

    run(scenario())


def test_connections_of_other_users_are_refused_at_both_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        accepted = []

        async def accept(channel: Channel) -> None:
            accepted.append(channel)

        transport = UnixTransport(frame_bytes_max=FRAME_BYTES_MAX)
        listener = await transport.listen("unix:", accept)
        strangers = {True}
        peer = unix_channel._peer

        def pretend(sock: socket.socket) -> tuple[int, int]:
            pid, uid = peer(sock)
            return pid, uid + len(strangers)

        monkeypatch.setattr(unix_channel, "_peer", pretend)
        with pytest.raises(Unreachable, match="taken by user"):
            await transport.dial(listener.address)
        strangers.clear()
        channel = await transport.dial(listener.address)
        strangers.add(True)  # before the acceptor looks
        with pytest.raises(ChannelBroken):
            await channel.read()
        assert not accepted
        await channel.close()
        await listener.close(1)

    run(scenario())


def test_a_listener_without_descriptors_takes_connections_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        accepted = loop.create_future()
        tries = []

        async def accept(channel: Channel) -> None:
            accepted.set_result(None)

        class Exhausted:
            """The listening socket of a process with no descriptors left, at first."""

            def __init__(self, sock: socket.socket) -> None:
                self.sock = sock

            def fileno(self) -> int:
                return self.sock.fileno()

            def close(self) -> None:
                self.sock.close()

            def accept(self) -> object:
                tries.append(loop.time())
                if len(tries) == 1:
                    raise OSError(errno.EMFILE, "Too many open files")
                return self.sock.accept()

        monkeypatch.setattr(unix_channel, "_ACCEPT_AGAIN_S", 0.01)
        transport = UnixTransport(frame_bytes_max=FRAME_BYTES_MAX)
        listener = await transport.listen("unix:", accept)
        monkeypatch.setattr(listener, "_sock", Exhausted(listener._sock))  # type: ignore[attr-defined]
        channel = await transport.dial(listener.address)
        await asyncio.wait_for(accepted, PATIENCE_S)
        # Once refused; then taken, and once more to find that there are no others.
        assert 2 <= len(tries) <= 3
        await channel.close()
        await listener.close(1)

    run(scenario())


def test_links_of_one_host_use_it_by_themselves() -> None:
    async def scenario() -> None:
        async with End("b", same_host=True) as b, End("a", same_host=True) as a:
            where = await b.links.listen("127.0.0.1:0")
            await a.links.connect(where, PATIENCE_S)
            await b.recorder.count("up")
            assert a.links.channel_kind("b") == b.links.channel_kind("a") == "unix"
            assert a.links.channel_kind("nobody") is None
            a.links.send("b", b"hello")
            await b.recorder.count("received")

    run(scenario())


@pytest.mark.parametrize("who", ["dialler", "listener"])
def test_links_told_not_to_use_it_use_grpc(who: str) -> None:
    async def scenario() -> None:
        async with (
            End("b", same_host=who != "listener") as b,
            End("a", same_host=who != "dialler") as a,
        ):
            where = await b.links.listen("127.0.0.1:0")
            await a.links.connect(where, PATIENCE_S)
            assert a.links.channel_kind("b") == "grpc"

    run(scenario())


def test_a_name_that_is_taken_leaves_the_port_to_grpc() -> None:
    async def scenario() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        async def accept(channel: Channel) -> None:
            raise AssertionError("nobody should come here")

        # Somebody of this user holds the name, and lets nobody in.
        transport = UnixTransport(frame_bytes_max=FRAME_BYTES_MAX)
        squatter = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        squatter.bind(unix_channel._name(f"unix:127.0.0.1:{port}"))
        with squatter:
            with pytest.raises(ListenFailed, match="choose another name"):
                await transport.listen(f"unix:127.0.0.1:{port}", accept)
            async with End("b", same_host=True) as b, End("a", same_host=True) as a:
                where = await b.links.listen(f"127.0.0.1:{port}")
                await a.links.connect(where, PATIENCE_S)
                assert a.links.channel_kind("b") == "grpc"

    run(scenario())


def test_the_name_is_free_again_after_the_listener_closed() -> None:
    async def scenario() -> None:
        async def accept(channel: Channel) -> None:
            await channel.read()

        transport = UnixTransport(frame_bytes_max=FRAME_BYTES_MAX)
        for _ in range(3):
            listener = await transport.listen("unix:again", accept)
            await listener.close(0)
        with pytest.raises(Unreachable):
            await transport.dial("unix:again")

    run(scenario())


class Clock:
    """The time, and the processor time of the loop's thread, as a test tells them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.busy_s = 0.0
        monkeypatch.setattr(polling, "_now", lambda: self.now_s)
        monkeypatch.setattr(polling, "_busy_s", lambda: self.busy_s)


@contextlib.asynccontextmanager
async def polled_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[UnixChannel, socket.socket, list[bytes], Clock]]:
    """A channel that hands over what it gets; nothing wakes its loop but polling."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", lambda *_: None)
    monkeypatch.setattr(asyncio.get_running_loop(), "remove_reader", lambda *_: None)
    got: list[bytes] = []

    def handle(frame: Buffer) -> bool:
        got.append(bytes(frame))
        return True

    async with raw_pair() as (channel, there):
        receiving = asyncio.create_task(channel.receive(handle))
        await asyncio.sleep(0)
        try:
            yield channel, there, got, clock
        finally:
            channel.abort()
            with contextlib.suppress(ChannelBroken):
                await receiving


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_what_comes_soon_after_a_frame_was_sent_is_polled_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with polled_channel(monkeypatch) as (channel, there, got, clock):
            there.sendall(framed(b"not asked for"))
            await turns()
            assert got == []
            await channel.write([b"call"])
            await turns()
            assert got == [b"not asked for"] and channel._polling.until is None
            await channel.write([b"call"])
            await turns(20)
            assert channel._polling.until is not None
            clock.now_s += 0.9 * polling.POLL_S
            there.sendall(framed(b"reply")[:-1])  # in two pieces
            await turns()
            assert channel._polling.until is None
            there.sendall(framed(b"reply")[-1:])
            await channel.write([b"call"])
            # A frame that has begun is left to the loop.
            await turns()
            assert len(got) == 1 and channel._polling.until is None

    run(scenario())


def test_polling_in_vain_becomes_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with polled_channel(monkeypatch) as (channel, there, got, clock):

            async def writes_until_polled() -> int:
                count = 0
                while channel._polling.until is None:
                    await channel.write([b"cast"])
                    assert there.recv(100)
                    count += 1
                return count

            async def in_vain() -> None:
                clock.now_s += 1.1 * polling.POLL_S
                await turns()
                assert channel._polling.until is None

            counts = []
            for _ in range(12):
                counts.append(await writes_until_polled())
                await in_vain()
            rare = polling.LEFT_OUT_MAX + 1
            assert counts == [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, rare, rare]
            assert await writes_until_polled() == rare
            there.sendall(framed(b"reply"))
            await turns()
            assert got == [b"reply"]
            assert await writes_until_polled() == 1
            await in_vain()

    run(scenario())


@pytest.mark.parametrize("who", ["another process", "the loop"])
def test_nothing_is_polled_for_a_while_when_others_want_the_processor(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with polled_channel(monkeypatch) as (channel, _, _, clock):
            await channel.write([b"call"])
            clock.now_s += 40 * polling.POLL_S
            if who == "the loop":
                clock.busy_s += 40 * polling.POLL_S
            await turns()
            assert channel._polling.until is None
            await channel.write([b"call"])
            if who == "another process":
                assert channel._polling.until is None
                clock.now_s += polling.NO_POLL_S
                await channel.write([b"call"])
            assert channel._polling.until is not None

    run(scenario())


def test_the_processor_is_offered_to_others_at_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = 0

    def offer() -> None:
        nonlocal offered
        offered += 1

    async def scenario() -> None:
        monkeypatch.setattr(polling, "_offer_processor", offer)
        async with polled_channel(monkeypatch) as (channel, there, got, _):
            await channel.write([b"call"])
            await turns()
            assert offered >= 2 and channel._polling.until is not None
            there.sendall(framed(b"reply"))
            await turns()
            assert got == [b"reply"] and channel._polling.until is None

    run(scenario())


def test_a_rare_loss_of_the_processor_costs_little_polling_and_frequent_ones_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with polled_channel(monkeypatch) as (channel, there, _, clock):

            async def left_out_s() -> float:
                """Another process gets the processor; tell for how long nothing is polled."""
                await channel.write([b"call"])
                assert there.recv(100)
                assert channel._polling.until is not None
                clock.now_s += 40 * polling.POLL_S
                await turns()
                begun = clock.now_s
                while channel._polling.until is None:
                    clock.now_s += polling.NO_POLL_S / 16
                    await channel.write([b"call"])
                    assert there.recv(100)
                clock.now_s += 0.1 * polling.POLL_S
                return clock.now_s - begun

            least, most = polling.NO_POLL_S, polling.NO_POLL_S_MAX
            often = [await left_out_s() for _ in range(9)]
            expected = [min(least * 2**n, most) for n in range(9)]
            assert often == pytest.approx(expected, abs=least / 8)
            clock.now_s += 1.1 * polling.NO_POLL_TIMES * most
            assert await left_out_s() == pytest.approx(least, abs=least / 8)

    run(scenario())


@pytest.mark.parametrize("how", ["aborted here", "ended there"])
def test_the_end_of_a_channel_ends_polling(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with polled_channel(monkeypatch) as (channel, there, got, _):
            await channel.write([b"call"])
            if how == "aborted here":
                channel.abort()
            else:
                there.close()
            await turns()
            assert channel._polling.until is None and got == []
            with pytest.raises(ChannelBroken):
                await channel.write([b"call"])

    run(scenario())
