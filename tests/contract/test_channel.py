"""What every kind of channel promises, by itself and under links."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rpc import frames
from rpc.channel import Channel
from rpc.errors import (
    AuthFailed,
    ChannelBroken,
    FrameError,
    LinksClosed,
    LinkTimeout,
    ListenFailed,
    MessageTooLarge,
    PeerClosed,
    PeerRefused,
    RpcError,
    Unreachable,
)
from rpc.links import LinkOptions
from tests.rpc.harness import PATIENCE_S, End, HandMade, connected, run, transport

pytestmark = pytest.mark.parametrize("address", ["memory:", "unix:", "127.0.0.1:0"])

INLINE = LinkOptions(share_memory=False)
"""For what is about messages that are cut, which those in shared memory are not."""

QUICK = LinkOptions(redial_first_s=0.001, redial_max_s=0.01)


# ---- channels


@asynccontextmanager
async def channel_pair(address: str) -> AsyncIterator[tuple[Channel, Channel]]:
    """A dialled channel and the accepted one, which lives until the test is over."""
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[Channel] = loop.create_future()
    over = asyncio.Event()

    async def accept(channel: Channel) -> None:
        accepted.set_result(channel)
        await over.wait()

    listener = await transport(address).listen(address, accept)
    dialled = await transport(address).dial(listener.address)
    await dialled.write([b"first"])
    other = await accepted
    assert await other.read() == b"first"
    yield dialled, other
    over.set()
    await dialled.close()
    await listener.close(1)


def test_aborting_at_the_dialling_end_ends_both_ends(address: str) -> None:
    async def scenario() -> None:
        broken = asyncio.Event()

        async def accept(channel: Channel) -> None:
            try:
                while await channel.read() is not None:
                    pass
            except ChannelBroken:
                pass  # On some channels an abort is seen as an error, on others as a cancelling.
            finally:
                broken.set()

        listener = await transport(address).listen(address, accept)
        channel = await transport(address).dial(listener.address)
        await channel.write([b"x"])
        channel.abort()
        channel.abort()
        with pytest.raises(ChannelBroken):
            await channel.read()
        with pytest.raises(ChannelBroken):
            await channel.write([b"y"])
        await broken.wait()
        await channel.close()
        await listener.close(1)

    run(scenario())


def test_aborting_at_the_accepting_end_ends_both_ends(address: str) -> None:
    async def scenario() -> None:
        outcomes: list[object] = []
        over = asyncio.Event()

        async def accept(channel: Channel) -> None:
            asyncio.get_running_loop().call_soon(channel.abort)
            try:
                outcomes.append(await channel.read())
            except ChannelBroken as error:
                outcomes.append(error)
            over.set()

        listener = await transport(address).listen(address, accept)
        channel = await transport(address).dial(listener.address)
        try:
            assert await channel.read() is None
        except ChannelBroken as error:
            assert error.address == listener.address
        await over.wait()
        assert isinstance(outcomes[0], ChannelBroken)
        await channel.close()
        await listener.close(1)

    run(scenario())


def test_dialling_where_nobody_listens_is_unreachable(address: str) -> None:
    async def scenario() -> None:
        async def accept(_channel: Channel) -> None:
            raise AssertionError("nobody dials while it listens")

        listener = await transport(address).listen(address, accept)
        await listener.close(0)
        with pytest.raises(Unreachable, match="nothing"):
            channel = await transport(address).dial(listener.address)
            try:
                await channel.read()
            finally:
                await channel.close()

    run(scenario())


def test_an_address_that_is_taken_is_refused(address: str) -> None:
    async def scenario() -> None:
        async def accept(_channel: Channel) -> None:
            pass

        listener = await transport(address).listen(address, accept)
        with pytest.raises(ListenFailed) as caught:
            await transport(address).listen(listener.address, accept)
        assert caught.value.address == listener.address
        await listener.close(0)

    run(scenario())


def test_frames_arrive_whole_and_in_order_in_both_directions(address: str) -> None:
    async def scenario() -> None:
        sizes = [1, 2, 126, 127, 128, 129, 16383, 16384, 300_000, 1]

        async def write(channel: Channel) -> None:
            for size in sizes:
                await channel.write([bytes([size % 251]), memoryview(bytes(size - 1))])

        async def read(channel: Channel) -> None:
            for size in sizes:
                frame = await channel.read()
                assert frame is not None
                assert (len(frame), frame[0]) == (size, size % 251)

        async with channel_pair(address) as (one, other):
            await asyncio.gather(write(one), read(one), write(other), read(other))

    run(scenario())


def test_a_writer_whose_frames_nobody_reads_has_to_wait(address: str) -> None:
    async def scenario() -> None:
        async with channel_pair(address) as (one, other):
            written = 0

            async def write() -> None:
                nonlocal written
                while written < 1000:
                    await one.write([bytes(200_000)])
                    written += 1

            writer = asyncio.create_task(write())
            # 200 MB do not fit anywhere, so it comes to a halt; then reading
            # lets it go on to the end.
            before = -1
            while before != written:
                before = written
                done, _ = await asyncio.wait([writer], timeout=0.5)
                assert not done
            assert written < 1000
            for _ in range(1000):
                assert len(await other.read() or b"") == 200_000
            await writer

    run(scenario())


def test_finishing_lets_the_other_end_read_everything_then_none(address: str) -> None:
    async def scenario() -> None:
        async with channel_pair(address) as (one, other):
            for number in range(3):
                await one.write([bytes([number])])
            await one.finish()
            got = [await other.read() for _ in range(4)]
            assert [None if frame is None else bytes(frame) for frame in got] == [
                b"\0",
                b"\1",
                b"\2",
                None,
            ]

    run(scenario())


# ---- links: failures first


def test_another_secret_fails_on_both_sides_with_the_remedy(address: str) -> None:
    async def scenario() -> None:
        async with End("a", secret=b"w" * 32) as a, End("b") as b:
            where = await b.links.listen(address)
            with pytest.raises(AuthFailed, match="LIVEMIGRATE_SECRET_FILE") as caught:
                await a.links.connect(where, PATIENCE_S)
            assert caught.value.address == where
            ((_, there, error),) = await b.recorder.count("accept_failed")
            assert isinstance(error, AuthFailed)
            assert "LIVEMIGRATE_SECRET_FILE" in str(error) and there in str(error)
            assert not a.recorder.all("up") and not b.recorder.all("up")

    run(scenario())


def test_a_dial_with_another_secret_stops_and_says_so(address: str) -> None:
    async def scenario() -> None:
        async with End("a", secret=b"w" * 32) as a, End("b") as b:
            where = await b.links.listen(address)
            a.links.dial(where, "b")
            ((_, there, expected, error),) = await a.recorder.count("dial_failed")
            assert (there, expected, type(error)) == (where, "b", AuthFailed)

    run(scenario())


def test_another_incarnation_than_expected_is_reported_and_dialled_no_more(address: str) -> None:
    async def scenario() -> None:
        async with End("a") as a, End("b2") as b:
            where = await b.links.listen(address)
            a.links.dial(where, "b1")
            ((_, there, expected, error),) = await a.recorder.count("dial_failed")
            assert (there, expected) == (where, "b1")
            assert isinstance(error, PeerRefused)
            assert (error.reason, error.peer_id) == ("incarnation", "b2")
            assert a.links._dials == {}
            await b.recorder.count("accept_failed")
            assert not b.recorder.all("up")

    run(scenario())


def test_a_node_that_dials_itself_is_told(address: str) -> None:
    async def scenario() -> None:
        async with End("a") as a:
            where = await a.links.listen(address)
            with pytest.raises(PeerRefused, match="own id"):
                await a.links.connect(where, PATIENCE_S)

    run(scenario())


def test_peers_without_a_common_version_refuse_each_other_by_name(address: str) -> None:
    async def scenario() -> None:
        async with End("a", versions=(7, 9)) as a, End("b") as b:
            where = await b.links.listen(address)
            with pytest.raises(PeerRefused, match="7 to 9") as caught:
                await a.links.connect(where, PATIENCE_S)
            assert caught.value.reason == "version"
            ((_, _, error),) = await b.recorder.count("accept_failed")
            assert (error.reason, error.peer_id) == ("version", "a")

    run(scenario())


def test_connecting_where_nobody_is_ends_in_time_with_the_cause(address: str) -> None:
    async def scenario() -> None:
        async with End("a", options=QUICK) as a, End("b") as b:
            where = await b.links.listen(address)
            await b.links.close()
            with pytest.raises(LinkTimeout, match="nothing") as caught:
                await a.links.connect(where, 0.3)
            assert (caught.value.address, caught.value.timeout_s) == (where, 0.3)
            assert a.links._dials == {}

    run(scenario())


def test_a_full_node_refuses_and_a_later_try_succeeds(address: str) -> None:
    async def scenario() -> None:
        async with (
            End("b", options=LinkOptions(links_max=1)) as b,
            End("a", options=QUICK) as a,
            End("c", options=QUICK) as c,
        ):
            where = await b.links.listen(address)
            await a.links.connect(where, PATIENCE_S)
            c.links.dial(where, "b")
            ((_, _, error), *_) = await b.recorder.count("accept_failed")
            assert error.reason == "limit"
            await a.links.close()
            await c.recorder.count("up")

    run(scenario())


def test_a_peer_that_falls_silent_in_the_handshake_is_given_up(address: str) -> None:
    async def scenario() -> None:
        async with End("b", options=LinkOptions(handshake_timeout_s=0.1)) as b:
            where = await b.links.listen(address)
            channel = await transport(where).dial(where)
            mute = HandMade(channel)
            await mute.hello()
            ((_, _, error),) = await b.recorder.count("accept_failed")
            assert isinstance(error, LinkTimeout)
            await channel.close()

    run(scenario())


def test_unproven_connections_are_limited(address: str) -> None:
    async def scenario() -> None:
        async with End("b", options=LinkOptions(handshakes_max=2)) as b:
            where = await b.links.listen(address)
            channels = []
            for _ in range(2):
                channels.append(await transport(where).dial(where))
                await HandMade(channels[-1]).hello()
            channels.append(await transport(where).dial(where))
            with pytest.raises(PeerRefused, match="no room") as caught:
                await HandMade(channels[-1]).hello()
            assert caught.value.reason == "limit"
            for channel in channels:
                await channel.close()

    run(scenario())


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"x", id="short"),
        pytest.param(bytes(200), id="zeros"),
        pytest.param(b"\xff" * 5000, id="ones"),
        pytest.param(frames.plain(frames.HELLO, b"\xff" * 50), id="no protobuf"),
        pytest.param(frames.plain(frames.HELLO, b""), id="empty hello"),
        pytest.param(frames.plain(frames.CHALLENGE, b""), id="out of turn"),
        pytest.param(frames.plain(frames.REFUSAL, b"\xff" * 9), id="garbled refusal"),
    ],
)
def test_garbage_instead_of_a_handshake_is_refused_and_harms_nobody(
    address: str, frame: bytes
) -> None:
    async def scenario() -> None:
        async with connected(address) as (a, b):
            where = b.links.me.address
            channel = await transport(where).dial(where)
            await channel.write([frame])
            ((_, _, error),) = await b.recorder.count("accept_failed")
            assert isinstance(error, FrameError | PeerRefused)
            await channel.close()
            a.links.send("b", b"still here")
            assert await b.recorder.count("received") == [("received", "a", b"still here")]

    run(scenario())


def test_a_replayed_frame_ends_the_link_and_is_not_delivered_again(address: str) -> None:
    async def scenario() -> None:
        async with End("b") as b:
            where = await b.links.listen(address)
            attacker = HandMade(await transport(where).dial(where))
            await attacker.prove()
            attacker.outbox.push(b"pay 10")
            frame = await attacker.flush()
            await attacker.channel.write([frame])
            ((_, _, cause),) = await b.recorder.count("down")
            assert "repeated" in cause
            assert b.recorder.data == [b"pay 10"]
            await attacker.channel.close()

    run(scenario())


def test_a_conversation_replayed_on_another_connection_is_refused(address: str) -> None:
    async def scenario() -> None:
        async with End("b") as b:
            where = await b.links.listen(address)
            honest = HandMade(await transport(where).dial(where))
            sent: list[bytes] = []
            write = honest.channel.write

            async def record(parts: list[bytes]) -> None:
                sent.append(b"".join(parts))
                await write(parts)

            honest.channel.write = record  # type: ignore[method-assign,assignment]
            await honest.prove()
            honest.outbox.push(b"pay 10")
            await honest.flush()
            await b.recorder.count("received")
            attacker = await transport(where).dial(where)
            await attacker.write([sent[0]])
            assert await attacker.read() is not None
            await attacker.write([sent[1]])
            ((_, _, error),) = await b.recorder.count("accept_failed")
            assert isinstance(error, AuthFailed)
            assert b.recorder.data == [b"pay 10"]
            await attacker.close()
            await honest.channel.close()

    run(scenario())


def test_a_tampered_frame_ends_the_link_undelivered(address: str) -> None:
    async def scenario() -> None:
        async with End("b") as b:
            where = await b.links.listen(address)
            attacker = HandMade(await transport(where).dial(where))
            await attacker.prove()
            attacker.outbox.push(b"pay 10")
            parts = attacker.outbox.take()
            assert parts is not None
            await attacker.channel.write([b"".join(parts)[:-1] + b"9"])
            ((_, _, cause),) = await b.recorder.count("down")
            assert "MAC" in cause
            assert b.recorder.data == []
            await attacker.channel.close()

    run(scenario())


def test_a_message_over_the_receivers_limit_ends_the_link(address: str) -> None:
    async def scenario() -> None:
        tight = LinkOptions(message_bytes_max=1000)
        async with End("b", options=tight) as b, End("a") as a:
            where = await b.links.listen(address)
            await a.links.connect(where, PATIENCE_S)
            assert a.links.send("b", bytes(1001))
            ((_, _, cause),) = await b.recorder.count("down")
            assert "message_bytes_max" in cause
            await a.recorder.count("down")
            assert b.recorder.data == []

    run(scenario())


def test_a_message_over_the_senders_limit_is_not_taken(address: str) -> None:
    async def scenario() -> None:
        async with connected(address, LinkOptions(message_bytes_max=1000)) as (a, b):
            with pytest.raises(MessageTooLarge):
                a.links.send("b", bytes(1001))
            a.links.send("b", b"next")
            await b.recorder.count("received")
            assert b.recorder.data == [b"next"]

    run(scenario())


def test_a_silent_peer_is_asked_and_then_given_up(address: str) -> None:
    async def scenario() -> None:
        options = LinkOptions(ping_interval_s=0.02, silence_max_s=0.06)
        async with End("b", options=options) as b:
            where = await b.links.listen(address)
            there = HandMade(await transport(where).dial(where))
            await there.prove()
            # As long as it answers, the link outlives many times the bound.
            for _ in range(10):
                items = await there.items()
                assert [item.kind for item in items] == [frames.PING]
                there.outbox.push_control(frames.PONG)
                await there.flush()
            assert b.links.is_up("z")
            ((_, _, cause),) = await b.recorder.count("down")
            assert "nothing was heard" in cause
            await there.channel.close()

    run(scenario())


def test_an_exception_of_the_handler_is_reported_and_harms_no_link(address: str) -> None:
    async def scenario() -> None:
        reported: list[BaseException] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: reported.append(context["exception"])
        )
        async with connected(address) as (a, b):

            def fail(event: tuple[object, ...]) -> None:
                raise RuntimeError(f"cannot take {event[0]}")

            b.recorder.on_event = fail
            a.links.send("b", b"one")
            a.links.send("b", b"two")
            await b.recorder.count("received", 2)
        assert [str(error) for error in reported] == [
            "cannot take received",
            "cannot take received",
            "cannot take down",
        ]

    run(scenario())


def test_sending_without_a_link_is_refused_without_an_error(address: str) -> None:
    async def scenario() -> None:
        async with End("a") as a:
            assert not a.links.send("nobody", b"x")
            assert a.links.queued_bytes("nobody") == 0
            assert not a.links.is_up("nobody")
            a.links.hang_up("nobody")

    run(scenario())


def test_closed_links_refuse_every_verb(address: str) -> None:
    async def scenario() -> None:
        async with connected(address) as (a, b):
            where = b.links.me.address
            await a.links.close()
            await a.links.close()
            assert not a.links.send("b", b"x")
            with pytest.raises(LinksClosed):
                a.links.dial(where, "b")
            with pytest.raises(LinksClosed):
                await a.links.connect(where, 1)
            with pytest.raises(LinksClosed):
                await a.links.listen(address)

    run(scenario())


# ---- links: order, bulk, back-pressure


def test_each_side_learns_who_the_other_is(address: str) -> None:
    async def scenario() -> None:
        async with End("b", features=("x", "y")) as b, End("a", kind="client", pid=77) as a:
            where = await b.links.listen(address)
            found = await a.links.connect(where, PATIENCE_S)
            assert (found.id, found.address, found.features) == ("b", where, ("x", "y"))
            ((_, _, seen),) = await b.recorder.count("up")
            assert (seen.kind, seen.pid, seen.address) == ("client", 77, "")
            assert a.links.peers() == [found] and b.links.peers() == [seen]
            assert await a.links.connect(where, PATIENCE_S) == found

    run(scenario())


def test_messages_of_all_sizes_arrive_in_order_in_both_directions(address: str) -> None:
    async def scenario() -> None:
        sizes = [0, 1, 300, 4096, 4097, 262_138, 262_139, 262_140, 3_000_000, 5, 0]
        sent = [bytes([number]) * size for number, size in enumerate(sizes)]
        async with connected(address) as (a, b):
            for data in sent:
                assert a.links.send("b", data)
                assert b.links.send("a", data)
            await a.recorder.count("received", len(sent))
            await b.recorder.count("received", len(sent))
            assert a.recorder.data == sent
            assert b.recorder.data == sent

    run(scenario())


def test_what_is_sent_on_link_up_is_received_after_link_up(address: str) -> None:
    async def scenario() -> None:
        async with End("a") as a, End("b") as b:
            for end, other in ((a, "b"), (b, "a")):

                def greet(event: tuple[object, ...], end: End = end, other: str = other) -> None:
                    if event[0] == "up":
                        assert end.links.send(other, b"hello from " + end.links.me.id.encode())

                end.recorder.on_event = greet
            a.links.dial(await b.links.listen(address), "b")
            await a.recorder.count("received")
            await b.recorder.count("received")
            assert a.recorder.kinds() == [("up", "b"), ("received", "b")]
            assert b.recorder.kinds() == [("up", "a"), ("received", "a")]

    run(scenario())


BULK = 50 * 1024 * 1024


async def round_trips_during(a: End, b: End, bulk: bool) -> int:
    """Count the small round trips that are over before a large message has arrived."""

    def answer(event: tuple[object, ...]) -> None:
        if event[0] == "received" and event[2] != b"" and len(str(event[2])) < 20:
            b.links.send("a", b"reply")

    b.recorder.on_event = answer
    assert a.links.send("b", bytes(BULK), bulk=bulk)
    number = 0
    while not any(len(data) == BULK for data in b.recorder.data):
        assert a.links.send("b", b"small")
        number += 1
        await a.recorder.count("received", number)
    return number


def test_small_messages_keep_flowing_while_bulk_is_under_way(address: str) -> None:
    async def scenario() -> None:
        async with connected(address, INLINE) as (a, b):
            assert await round_trips_during(a, b, bulk=True) >= 5

    run(scenario())


def test_without_the_bulk_lane_small_messages_would_have_to_wait(address: str) -> None:
    async def scenario() -> None:
        async with connected(address, INLINE) as (a, b):
            assert await round_trips_during(a, b, bulk=False) == 1

    run(scenario())


def test_queued_bytes_rise_with_what_waits_and_fall_to_nothing(address: str) -> None:
    async def scenario() -> None:
        async with connected(address) as (a, b):
            for _ in range(3):
                a.links.send("b", bytes(2_000_000), bulk=True)
            assert a.links.queued_bytes("b") > 4_000_000
            await b.recorder.count("received", 3)
            # What went by shared memory counts until the peer has said that it took it.
            while a.links.queued_bytes("b"):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0)

    run(scenario())


def test_a_link_tells_what_it_costs(address: str) -> None:
    async def scenario() -> None:
        async with connected(address, INLINE) as (a, b):
            assert a.links.cost("nobody") is None
            for _ in range(3):
                a.links.send("b", bytes(3_000_000), bulk=True)
            await b.recorder.count("received", 3)
            cost = a.links.cost("b")
            while cost is not None and cost.rtt_s is None:
                await asyncio.sleep(0)
                cost = a.links.cost("b")
            there = b.links.cost("a")
            assert cost is not None and there is not None
            assert cost.kind == a.links.channel_kind("b") and 0 < cost.rtt_s < PATIENCE_S
            assert cost.bytes_sent == 9_000_000 <= there.bytes_received
            assert cost.bytes_per_s is not None and cost.bytes_per_s > 0
            assert there.bytes_per_s is None, "nothing had to wait there"

    run(scenario())


def test_a_full_queue_takes_no_more_until_it_has_emptied(address: str) -> None:
    async def scenario() -> None:
        async with connected(address, LinkOptions(queue_bytes_max=1_000_000)) as (a, b):
            assert a.links.send("b", bytes(3_000_000), bulk=True)
            assert not a.links.send("b", b"too much")
            await b.recorder.count("received")
            while a.links.queued_bytes("b"):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0)
            assert a.links.send("b", b"room again")
            await b.recorder.count("received", 2)

    run(scenario())


# ---- links: simultaneous dials, reconnection, endings


@pytest.mark.parametrize("first_id", ["a", "c"])
def test_simultaneous_dials_end_in_one_link_that_loses_nothing(address: str, first_id: str) -> None:
    async def scenario() -> None:
        for round_number in range(10):
            async with End(first_id, options=QUICK) as a, End("b", options=QUICK) as b:
                for end in (a, b):

                    def count(event: tuple[object, ...], end: End = end) -> None:
                        if event[0] == "up":
                            for number in range(5):
                                assert end.links.send(str(event[1]), bytes([number]))

                    end.recorder.on_event = count
                at_a = await a.links.listen(address)
                at_b = await b.links.listen(address)
                # Every other round neither knows whom it will find.
                known = round_number % 2 == 0
                a.links.dial(at_b, "b" if known else None)
                b.links.dial(at_a, first_id if known else None)
                await a.recorder.count("received", 5)
                await b.recorder.count("received", 5)
                for end in (a, b):
                    # Attempts that were refused have ended too, and changed nothing.
                    assert end.recorder.data == [bytes([number]) for number in range(5)]
                    assert len(end.recorder.all("up")) == 1
                    assert not end.recorder.all("down")
                    assert not end.recorder.all("dial_failed")

    run(scenario())


def test_a_new_connection_of_the_same_peer_replaces_the_old_one(address: str) -> None:
    async def scenario() -> None:
        async with End("b") as b:
            where = await b.links.listen(address)
            old = HandMade(await transport(where).dial(where))
            await old.prove()
            new = HandMade(await transport(where).dial(where))
            await new.prove()
            assert b.recorder.kinds() == [("up", "z"), ("down", "z"), ("up", "z")]
            assert "replaced" in b.recorder.events[1][2]
            new.outbox.push(b"from the new one")
            await new.flush()
            await b.recorder.count("received")
            for end in (old, new):
                await end.channel.close()

    run(scenario())


@pytest.mark.parametrize("breaks", ["a", "b"])
def test_a_link_that_breaks_comes_up_again_by_itself(address: str, breaks: str) -> None:
    async def scenario() -> None:
        async with End("b") as b, End("a", options=QUICK) as a:
            a.links.dial(await b.links.listen(address), "b")
            for times in range(1, 4):
                await a.recorder.count("up", times)
                await b.recorder.count("up", times)
                assert a.links.send("b", b"%d" % times)
                await b.recorder.count("received", times)
                end, other = (a, "b") if breaks == "a" else (b, "a")
                end.links._up[other].drop("cut by the test")
                await a.recorder.count("down", times)
                await b.recorder.count("down", times)
            await a.recorder.count("up", 4)
            await b.recorder.count("up", 4)

    run(scenario())


def test_close_sends_what_is_queued_and_says_goodbye(address: str) -> None:
    async def scenario() -> None:
        async with connected(address) as (a, b):
            sent = [bytes([number]) * 1_000_000 for number in range(5)]
            for data in sent:
                assert a.links.send("b", data)
            assert a.links.send("b", bytes(3_000_000), bulk=True)
            await a.links.close()
            ((_, _, cause),) = await b.recorder.count("down")
            assert cause == "a closed"
            assert [data for data in b.recorder.data if len(data) == 1_000_000] == sent
            assert len(b.recorder.data) == 6
            assert a.recorder.all("down")[0][2] == "closed here"

    run(scenario())


def test_the_accepting_side_too_sends_what_is_queued_before_it_closes(address: str) -> None:
    async def scenario() -> None:
        async with connected(address) as (a, b):
            for number in range(5):
                assert b.links.send("a", bytes([number]) * 1_000_000)
            await b.links.close()
            ((_, _, cause),) = await a.recorder.count("down")
            assert cause == "b closed"
            assert [data[0] for data in a.recorder.data] == [0, 1, 2, 3, 4]

    run(scenario())


def test_both_sides_may_close_at_once(address: str) -> None:
    async def scenario() -> None:
        async with connected(address) as (a, b):
            a.links.send("b", b"last words")
            b.links.send("a", b"last words")
            await asyncio.gather(a.links.close(), b.links.close())

    run(scenario())


def test_a_peer_that_said_goodbye_is_dialled_no_more(address: str) -> None:
    async def scenario() -> None:
        async with End("b") as b, End("a", options=QUICK) as a:
            a.links.dial(await b.links.listen(address), "b")
            await a.recorder.count("up")
            await b.links.close()
            ((_, _, expected, error),) = await a.recorder.count("dial_failed")
            assert (expected, type(error), error.peer_id) == ("b", PeerClosed, "b")
            assert a.recorder.kinds()[1] == ("down", "b")
            assert a.links._dials == {}

    run(scenario())


def test_hanging_up_ends_the_link_for_good_on_both_sides(address: str) -> None:
    async def scenario() -> None:
        async with connected(address, QUICK) as (a, b):
            a.links.send("b", b"last words")
            b.links.hang_up("a")
            assert b.recorder.kinds()[-1] == ("down", "a")
            assert not b.links.send("a", b"x")
            ((_, _, cause),) = await a.recorder.count("down")
            assert cause == "b hung up"
            ((_, _, _, error),) = await a.recorder.count("dial_failed")
            assert isinstance(error, PeerClosed)
            # Asking anew is allowed.
            await a.links.connect(b.links.me.address, PATIENCE_S)
            await b.recorder.count("up", 2)

    run(scenario())


def test_hanging_up_from_within_received_stops_what_came_in_the_same_frame(address: str) -> None:
    async def scenario() -> None:
        async with connected(address) as (a, b):
            b.recorder.on_event = lambda event: (
                b.links.hang_up("a") if event[0] == "received" else None
            )
            a.links.send("b", b"0")
            for number in range(20):
                a.links.send("b", bytes([number]))
            await a.recorder.count("down")
            assert len(b.recorder.data) == 1

    run(scenario())


def test_an_address_dialled_for_anyone_is_dialled_again_after_a_restart(address: str) -> None:
    async def scenario() -> None:
        async with End("a", options=QUICK) as a:
            async with End("b1") as b:
                where = await b.links.listen(address)
                a.links.dial(where)
                await a.recorder.count("up")
            async with End("b2") as b:
                await b.links.listen(where)
                await a.recorder.count("up", 2)
                assert [event[1] for event in a.recorder.all("up")] == ["b1", "b2"]
            assert not a.recorder.all("dial_failed")

    run(scenario())


def test_every_error_of_dialling_is_one_of_ours(address: str) -> None:
    async def scenario() -> None:
        async with End("a", options=QUICK) as a:
            for wrong in ("nonsense", "host:port", "127.0.0.1:99999", "memory:nobody", "[::1"):
                with pytest.raises(RpcError):
                    await a.links.connect(wrong, 0.05)

    run(scenario())
