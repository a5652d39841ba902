"""Bulk that yields to what is small: what a pacer decides, and what comes of it on a told wire."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpc import frames, pacing
from rpc.frames import Inbox, Outbox
from rpc.link import LinkOptions
from rpc.pacing import Pacer
from tests.rpc.harness import PATIENCE_S, End, run

KEY = b"k" * 32
MB = 1_000_000


class ToldWire:
    """One direction of a link on a wire of a given rate and delay, in told time.

    Frames stand in one queue, however long, and leave one after the other, as they do in sockets
    and routers. The receiver echoes marks at once.

    Args:
        rate: Bytes a second.
        delay_s: From end to end.
        pacer: None: bulk leaves as soon as it can.
        busy_s: What the receiver does with each frame that has bulk.
    """

    def __init__(
        self, rate: float, delay_s: float, pacer: Pacer | None, busy_s: float = 0.0
    ) -> None:
        self.rate = rate
        self.delay_s = delay_s
        self.busy_s = busy_s
        self.now_s = 0.0
        self.pacer = pacer
        self.outbox = Outbox(KEY)
        if pacer is not None:
            self.outbox.bulk_limit = pacer.limit_bytes
        self.inbox = Inbox(KEY)
        self.latencies: list[float] = []
        self.bulk_arrived = 0
        self.most_on_its_way = 0
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._free_s = 0.0
        self._read_s = 0.0
        self._arrives_s = 0.0
        self._echoes_s = 0.0
        self._arrived: deque[bytes] = deque()

    def at(self, when_s: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when_s, next(self._numbers), work))

    def run(self, until_s: float) -> None:
        while self._due and self._due[0][0] <= until_s:
            self.now_s, _, work = heapq.heappop(self._due)
            work()
            self.pump()
        self.now_s = until_s

    def pump(self) -> None:
        while True:
            # What a socket holds is bounded, too.
            if self.pacer is None and self._free_s - self.now_s > 4 * MB / self.rate:
                self.at(self._free_s - 3 * MB / self.rate, lambda: None)
                return
            parts = self.outbox.take()
            if parts is None:
                return
            if self.pacer is not None and self.outbox.bulk_bytes != self.pacer.sent_bytes:
                self.pacer.sent(self.outbox.bulk_bytes, self.now_s)
                self.outbox.bulk_limit = self.pacer.limit_bytes
                on_its_way = self.pacer.sent_bytes - self.pacer._seen
                self.most_on_its_way = max(self.most_on_its_way, on_its_way)
                assert on_its_way <= self.pacer.window_bytes or len(self.pacer._marks) == 1
            frame = b"".join(parts)
            self._free_s = max(self._free_s, self.now_s) + len(frame) / self.rate
            self._arrives_s = max(self._arrives_s, self._free_s + self.delay_s)
            self.at(self._arrives_s, partial(self.arrive, frame))

    def arrive(self, frame: bytes) -> None:
        self._arrived.append(frame)
        self.read()

    def read(self) -> None:
        if not self._arrived or self._read_s > self.now_s:
            return  # It is busy, and comes back.
        for kind, data in self.inbox.feed(self._arrived.popleft()):
            if kind == frames.MARK:
                self._read_s = self.now_s + self.busy_s
                self._echoes_s = max(self._echoes_s, self._read_s + self.delay_s)
                self.at(self._echoes_s, partial(self.echo, bytes(data)))
            elif kind == frames.DATA and len(data) == 8:
                (sent_s,) = struct.unpack("<d", data)
                self.latencies.append(self.now_s + self.delay_s - sent_s)
            elif kind == frames.DATA:
                self.bulk_arrived += len(data)
        self.at(max(self._read_s, self.now_s), self.read)

    def echo(self, number: bytes) -> None:
        assert self.pacer is not None
        has_bulk = self.outbox.has_bulk
        self.pacer.seen(int.from_bytes(number, "little"), self.now_s, has_bulk)
        self.outbox.bulk_limit = self.pacer.limit_bytes

    def call(self, every_s: float, until_s: float) -> None:
        """Send something small again and again."""

        def send() -> None:
            self.outbox.push(struct.pack("<d", self.now_s))
            if self.now_s + every_s < until_s:
                self.at(self.now_s + every_s, send)

        self.at(self.now_s, send)

    def move(self, until_s: float, size: int = 1 << 20) -> None:
        """Send bulk all the time."""

        def send() -> None:
            while self.outbox.queued_bytes < 4 * size:
                self.outbox.push(bytes(size), bulk=True)
            if self.now_s + 0.001 < until_s:
                self.at(self.now_s + 0.001, send)

        self.at(self.now_s, send)


def p99(values: list[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]


def measured(wire: ToldWire, seconds: float = 6.0) -> tuple[float, float]:
    """By how much bulk raises the p99 of what is small, and what share of the wire it uses."""
    wire.call(0.003, 1.0)
    wire.run(2.0)
    quiet = p99(wire.latencies)
    until_s = 2.0 + seconds
    wire.move(until_s)
    wire.run(4.0)  # To learn what the wire is like.
    wire.latencies.clear()
    before = wire.bulk_arrived
    wire.call(0.003, until_s)
    wire.run(until_s)
    share = (wire.bulk_arrived - before) / wire.rate / (until_s - 4.0)
    return p99(wire.latencies) / quiet, share


WIRES = [
    pytest.param(rate * MB, delay_s, id=f"{rate} MB/s, {delay_s * 1e3:g} ms")
    for rate, delay_s in [(10, 0.02), (20, 0.005), (50, 0.02), (200, 0.002), (50, 0.05)]
]


@pytest.mark.parametrize(("rate", "delay_s"), WIRES)
def test_bulk_fills_the_wire_and_what_is_small_hardly_waits(rate: float, delay_s: float) -> None:
    ratio, share = measured(ToldWire(rate, delay_s, Pacer(frames.LANE_BYTES_MAX)))

    assert ratio < 2.0
    assert share > 0.85


@pytest.mark.parametrize(("rate", "delay_s"), WIRES[:2])
def test_control_without_a_pacer_what_is_small_waits(rate: float, delay_s: float) -> None:
    ratio, share = measured(ToldWire(rate, delay_s, None))

    assert ratio > 3.0
    assert share > 0.85


def test_on_a_short_wire_waiting_of_a_millisecond_is_allowed() -> None:
    wire = ToldWire(200 * MB, 0.0001, Pacer(frames.LANE_BYTES_MAX), busy_s=0.0001)
    _, share = measured(wire, 4.0)

    assert p99(wire.latencies) < 0.004
    assert share > 0.4


def test_a_wire_that_became_longer_is_used_again_and_one_that_became_shorter_too() -> None:
    wire = ToldWire(20 * MB, 0.001, Pacer(frames.LANE_BYTES_MAX))
    wire.move(60.0)
    for delay_s in (0.03, 0.001, 0.03):
        wire.run(wire.now_s + 4.0)
        wire.delay_s = delay_s
        # What stands on the wire looks like the wire until the window has shrunk again and again.
        wire.run(wire.now_s + 12.0)
        before, begun_s = wire.bulk_arrived, wire.now_s
        wire.latencies.clear()
        wire.call(0.003, begun_s + 4.0)
        wire.run(begun_s + 4.0)
        assert wire.bulk_arrived - before > 0.7 * 4.0 * wire.rate
        assert p99(wire.latencies) < 2 * (2 * delay_s) + 0.005


def test_a_single_late_frame_is_no_waiting() -> None:
    pacer = Pacer(frames.LANE_BYTES_MAX)
    now_s, sent = 0.0, 0
    window = pacer.window_bytes
    for late_s in itertools.islice(itertools.cycle((0.0, 0.2, 0.0, 0.0)), 16):
        while pacer.limit_bytes:
            sent += pacer.limit_bytes
            pacer.sent(sent, now_s)
        for place, (number, _) in enumerate(list(pacer._marks)):
            pacer.seen(number, now_s + 0.01 + (late_s if place == 3 else 0.0), True)
        now_s += 0.02 + late_s
        assert pacer.window_bytes >= window
        window = pacer.window_bytes


def test_a_round_that_is_late_once_is_a_lost_packet_and_twice_it_is_waiting() -> None:
    pacer = Pacer(frames.LANE_BYTES_MAX)
    now_s, sent = 0.0, 0

    def a_round(takes_s: float) -> None:
        nonlocal now_s, sent
        while pacer.limit_bytes:
            sent += pacer.limit_bytes
            pacer.sent(sent, now_s)
        now_s += takes_s
        for number, _ in list(pacer._marks):
            pacer.seen(number, now_s, True)

    # It begins with doubling, until there was waiting once.
    for takes_s in (0.01, 0.01, 0.05):
        a_round(takes_s)
    for takes_s, less in ((0.01, False), (0.05, False), (0.01, False), (0.05, False), (0.05, True)):
        window = pacer.window_bytes
        a_round(takes_s)
        assert (pacer.window_bytes < window) == less


def test_what_was_not_held_back_changes_nothing() -> None:
    pacer = Pacer(frames.LANE_BYTES_MAX)
    for turn in range(100):
        pacer.sent((turn + 1) * 1000, turn * 1.0)
        pacer.seen((turn + 1) * 1000, turn * 1.0 + 0.1, False)
    assert pacer.window_bytes == pacing.WINDOW_BYTES_FIRST
    assert pacer.rate is None


def test_the_window_does_not_grow_while_something_else_is_the_limit() -> None:
    pacer = Pacer(frames.LANE_BYTES_MAX)
    now_s, sent = 0.0, 0
    for _ in range(100):
        # The socket takes no more, though there would be room and more to send.
        while sent - pacer._seen < pacing.WINDOW_BYTES_FIRST // 2:
            sent += pacing.WINDOW_BYTES_FIRST // 8
            pacer.sent(sent, now_s)
        now_s += 0.01
        pacer.seen(sent, now_s, True)
    assert pacer.window_bytes == pacing.WINDOW_BYTES_FIRST
    assert pacer.rate is not None


@pytest.mark.parametrize("number", [0, 1, 999, 1001, 5000, 1 << 63])
def test_an_echo_of_no_mark_is_refused(number: int) -> None:
    pacer = Pacer(frames.LANE_BYTES_MAX)
    pacer.sent(1000, 0.0)
    pacer.sent(2000, 0.0)
    with pytest.raises(ValueError, match="no mark"):
        pacer.seen(number, 1.0, True)


def test_an_echo_that_comes_twice_is_refused() -> None:
    pacer = Pacer(frames.LANE_BYTES_MAX)
    pacer.sent(1000, 0.0)
    pacer.seen(1000, 1.0, True)
    with pytest.raises(ValueError, match="no mark 1000"):
        pacer.seen(1000, 1.0, True)


@st.composite
def histories(draw: st.DrawFn) -> Iterator[tuple[str, int, float]]:
    steps = st.tuples(
        st.sampled_from(["send", "send", "echo", "echo all"]),
        st.integers(1, 1 << 20),
        st.floats(0.0, 0.3),
    )
    return iter(draw(st.lists(steps, max_size=200)))


@given(histories())
@settings(max_examples=200, deadline=None)
def test_there_is_never_more_on_its_way_than_the_window_and_always_a_way_on(
    steps: Iterator[tuple[str, int, float]],
) -> None:
    pacer = Pacer(frames.LANE_BYTES_MAX)
    now_s, sent = 0.0, 0
    for what, size, passes_s in steps:
        now_s += passes_s
        if what == "send" and pacer.limit_bytes:
            limit = pacer.limit_bytes
            assert limit >= pacing.WINDOW_BYTES_MIN // pacing.FRAMES
            sent += min(size, limit)
            assert sent - pacer._seen <= pacer.window_bytes
            pacer.sent(sent, now_s)
        elif what != "send" and pacer._marks:
            place = 0 if what == "echo" else -1
            pacer.seen(pacer._marks[place][0], now_s, size % 2 == 0)
        low, high = pacing.WINDOW_BYTES_MIN, pacing.WINDOW_BYTES_MAX
        assert low <= pacer.window_bytes <= high
        if not pacer._marks:
            assert pacer.limit_bytes, "nothing is on its way, and nothing may leave"


# -- frames


def received(outbox: Outbox, inbox: Inbox) -> list[tuple[int, bytes]]:
    found = []
    while (parts := outbox.take()) is not None:
        found += [(kind, bytes(data)) for kind, data in inbox.feed(b"".join(parts))]
    return found


def test_a_frame_has_of_bulk_what_the_limit_says_and_a_mark() -> None:
    outbox, inbox = Outbox(KEY), Inbox(KEY)
    outbox.bulk_limit = 20_000
    message = bytes(range(256)) * 400
    outbox.push(message, bulk=True)
    outbox.push(b"small")
    numbers = []
    whole = []
    while (parts := outbox.take()) is not None:
        assert sum(map(len, parts)) < 20_000 + 1000
        for kind, data in inbox.feed(b"".join(parts)):
            if kind == frames.MARK:
                numbers.append(int.from_bytes(data, "little"))
            else:
                whole.append(bytes(data))
    assert whole == [b"small", message]
    assert numbers == sorted(set(numbers)) and len(numbers) == 6
    assert numbers[-1] == outbox.bulk_bytes > len(message)


def test_without_room_bulk_waits_and_all_else_passes() -> None:
    outbox, inbox = Outbox(KEY), Inbox(KEY)
    outbox.bulk_limit = 0
    outbox.push(b"b" * 100_000, bulk=True)
    assert outbox.take() is None and outbox and outbox.has_bulk
    outbox.push(b"small")
    outbox.push_urgent(b"urgent")
    outbox.push_control(frames.PING)
    assert received(outbox, inbox) == [
        (frames.PING, b""),
        (frames.DATA, b"urgent"),
        (frames.DATA, b"small"),
    ]
    # The goodbye is the last word, after what waits; till then there is no frame of nothing.
    outbox.push_control(frames.GOODBYE, b"\x01")
    assert outbox.take() is None
    outbox.push_control(frames.PONG)
    assert received(outbox, inbox) == [(frames.PONG, b"")]
    outbox.bulk_limit = 1 << 20
    kinds = [kind for kind, _ in received(outbox, inbox)]
    assert kinds == [frames.MARK, frames.DATA, frames.GOODBYE] or kinds == [
        frames.DATA,
        frames.MARK,
        frames.GOODBYE,
    ]
    assert not outbox


def test_without_a_limit_there_are_no_marks() -> None:
    outbox, inbox = Outbox(KEY), Inbox(KEY)
    outbox.push(b"b" * 600_000, bulk=True)
    assert [kind for kind, _ in received(outbox, inbox)] == [frames.DATA]


@given(
    st.lists(st.tuples(st.integers(0, 90_000), st.booleans()), max_size=12),
    st.lists(st.integers(0, 80_000).map(lambda n: n if n >= 64 else 0), min_size=1, max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_whatever_the_limits_are_each_lane_arrives_whole_and_in_order(
    messages: list[tuple[int, bool]], limits: list[int]
) -> None:
    outbox, inbox = Outbox(KEY, lane_bytes_max=40_000), Inbox(KEY)
    pushed: dict[bool, list[bytes]] = {True: [], False: []}
    for number, (size, bulk) in enumerate(messages):
        data = bytes([bulk]) + number.to_bytes(2, "little") + bytes(size)
        pushed[bulk].append(data)
        outbox.push(data, bulk)
    arrived: dict[bool, list[bytes]] = {True: [], False: []}
    for limit in itertools.chain(limits, itertools.repeat(16_384)):
        if not outbox:
            break
        outbox.bulk_limit = limit
        before = outbox.bulk_bytes
        parts = outbox.take()
        assert outbox.bulk_bytes - before <= limit
        for kind, data in inbox.feed(b"".join(parts or [])) if parts else []:
            if kind == frames.DATA:
                arrived[bool(data[0])].append(bytes(data))
    assert arrived == pushed


# -- links

PACED = {"features": (pacing.FEATURE,)}
KINDS = [pytest.param("127.0.0.1:0", id="grpc"), pytest.param("memory:", id="memory")]


@asynccontextmanager
async def two_ends(
    address: str, first: dict[str, Any] = PACED, second: dict[str, Any] = PACED
) -> AsyncIterator[tuple[End, End]]:
    async with End("b", **second) as b, End("a", **first) as a:
        await a.links.connect(await b.links.listen(address), PATIENCE_S)
        await b.recorder.count("up")
        yield a, b


@pytest.mark.parametrize("address", KINDS)
def test_bulk_both_ways_arrives_whole_and_in_order_and_all_is_seen(address: str) -> None:
    async def scenario() -> None:
        async with two_ends(address) as (a, b):
            sent = [bytes([n]) * (n * 300_000 + 1) for n in range(12)]
            for data in sent:
                a.links.send("b", data, bulk=True)
                b.links.send("a", data, bulk=True)
                a.links.send("b", b"small")
            await b.recorder.count("received", 24)
            await a.recorder.count("received", 12)
            assert [data for data in b.recorder.data if data != b"small"] == sent
            assert a.recorder.data == sent
            for one, other in ((a, "b"), (b, "a")):
                pacer = one.links._up[other]._pacer
                assert pacer is not None
                while pacer._marks:  # noqa: ASYNC110 - there is no event to wait for
                    await asyncio.sleep(0)
                assert pacer._seen == pacer.sent_bytes > sum(map(len, sent))

    run(scenario())


@pytest.mark.parametrize("address", KINDS)
def test_what_is_small_passes_bulk_that_has_no_room(address: str) -> None:
    async def scenario() -> None:
        async with two_ends(address) as (a, b):
            link = a.links._up["b"]
            assert link._pacer is not None
            link._pacer.window_bytes = pacing.WINDOW_BYTES_MIN
            link._outbox.bulk_limit = link._pacer.limit_bytes
            a.links.send("b", bytes(8 << 20), bulk=True)
            left = link._outbox.bulk_bytes
            assert left <= pacing.WINDOW_BYTES_MIN
            a.links.send("b", b"small")
            await b.recorder.count("received", 2)
            assert [len(data) for data in b.recorder.data] == [5, 8 << 20]

    run(scenario())


@pytest.mark.parametrize(("first", "second"), [(PACED, {}), ({}, PACED), ({}, {})])
def test_a_peer_that_knows_nothing_of_marks_gets_none_and_all_of_the_bulk(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    async def scenario() -> None:
        async with two_ends("127.0.0.1:0", first, second) as (a, b):
            data = bytes(5 << 20)
            assert a.links.send("b", data, bulk=True) and b.links.send("a", data, bulk=True)
            await a.recorder.count("received")
            await b.recorder.count("received")
            for one, other, knows in ((a, "b", second), (b, "a", first)):
                assert (one.links._up[other]._pacer is not None) == (knows == PACED)

    run(scenario())


@pytest.mark.parametrize("closer", ["a", "b", "both"])
def test_bulk_that_waits_for_room_still_leaves_when_a_link_is_closed(closer: str) -> None:
    async def scenario() -> None:
        # Longer than the test may take: nobody waits for a bound.
        patient = {
            **PACED,
            "options": LinkOptions(close_timeout_s=2 * PATIENCE_S, silence_max_s=2 * PATIENCE_S),
        }
        async with two_ends("127.0.0.1:0", patient, patient) as (a, b):
            data, more = bytes(6 << 20), bytes(30 << 20)
            a.links.send("b", data, bulk=True)
            assert a.links._up["b"]._outbox.has_bulk
            ends = {"a": [a], "b": [b], "both": [a, b]}[closer]
            if closer == "both":
                b.links.send("a", more, bulk=True)
            await asyncio.gather(*(end.links.close() for end in ends))
            await a.recorder.count("down")
            await b.recorder.count("down")
            if closer != "b":
                assert b.recorder.data == [data]
            if closer == "both":
                assert a.recorder.data == [more]

    run(scenario())


@pytest.mark.parametrize("payload", [b"", b"\x01", bytes(8), b"\xff" * 8])
def test_an_echo_of_nothing_ends_the_link_and_says_so(payload: bytes) -> None:
    async def scenario() -> None:
        async with two_ends("127.0.0.1:0") as (a, b):
            b.links._up["a"]._control(frames.ECHO, payload)
            ((_, _, cause),) = await a.recorder.count("down")
            assert "an echo of nothing" in cause

    run(scenario())


def test_the_rate_of_a_paced_link_is_what_arrived() -> None:
    async def scenario() -> None:
        async with two_ends("127.0.0.1:0") as (a, b):
            for _ in range(8):
                a.links.send("b", bytes(8 << 20), bulk=True)
            await b.recorder.count("received", 8)
            link = a.links._up["b"]
            cost = a.links.cost("b")
            assert link._pacer is not None and cost is not None
            assert cost.bytes_per_s == link._pacer.rate == link._compressor.link_rate
            assert cost.bytes_per_s is not None and cost.bytes_per_s > 0

    run(scenario())
