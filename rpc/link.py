"""One link that is up: its reader, its writer, its keepalive, its end.

The reader takes a frame and calls the handler for each message in it, with no
task or queue between. The writer takes everything that waits as one frame, so
while one write is under way the next frame fills up: an idle link sends at
once, a busy one coalesces, with no timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from time import perf_counter as _now
from typing import Any, Final, Protocol

from rpc import compression, frames, pacing, shared_memory
from rpc.channel import Buffer, Channel
from rpc.errors import ChannelBroken, FrameError, RpcError
from rpc.handshake import PeerInfo


@dataclass(frozen=True)
class LinkOptions:
    """Every tunable and limit of links.

    Attributes:
        message_bytes_max: Larger messages are refused on both sides; bounds
            the memory in which a message is put together.
        lane_bytes_max: Bytes of each lane (ordinary, bulk) in one frame; bounds
            how long bulk can delay an ordinary message.
        queue_bytes_max: A link with more than this waiting takes no more.
        ping_interval_s: Seconds of silence after which a side asks.
        silence_max_s: Seconds of silence after which a link is given up.
            Generous, because a peer that is paused is not dead.
        handshake_timeout_s: Seconds for a connection to become a link.
        close_timeout_s: Seconds for what is queued to leave at an orderly end.
        redial_first_s: First wait in seconds before dialling again.
        redial_max_s: Longest wait in seconds before dialling again.
        handshakes_max: Connections that may be unproven at one time.
        links_max: Links at one time.
        compress: Whether bulk is compressed on links to other hosts that are
            slower than the compression.
        share_memory: Whether large messages go by shared memory on such a socket.
        same_host: Whether processes of one host and user use a Unix-domain
            socket where they find one; otherwise gRPC, as between hosts.
    """

    message_bytes_max: int = frames.MESSAGE_BYTES_MAX
    lane_bytes_max: int = frames.LANE_BYTES_MAX
    queue_bytes_max: int = 4 * 1024**3
    ping_interval_s: float = 4.0
    silence_max_s: float = 20.0
    handshake_timeout_s: float = 10.0
    close_timeout_s: float = 5.0
    redial_first_s: float = 0.05
    redial_max_s: float = 2.0
    handshakes_max: int = 128
    links_max: int = 4096
    compress: bool = True
    share_memory: bool = True
    same_host: bool = True


@dataclass(frozen=True)
class LinkCost:
    """What a link costs, as seen in its real traffic so far.

    Attributes:
        kind: "grpc", "unix" or "memory".
        rtt_s: Moving average of the seconds from a question to its answer, with what waits before
            both in the same sockets; None before the first.
        bytes_per_s: Moving average of the rate while more waited than could leave; None while
            nothing ever had to wait.
        bytes_sent: Bytes of messages that left.
        bytes_received: Bytes of messages that came.
    """

    kind: str
    rtt_s: float | None
    bytes_per_s: float | None
    bytes_sent: int
    bytes_received: int


_WEIGHT: Final = 0.25
"""Of a new sample in a moving average: the last four make up two thirds of it."""

_RATE_BYTES_MIN: Final = 64 << 10
"""Smaller frames tell more of turns of the loop than of the link."""


def _average(before: float | None, sample: float) -> float:
    return sample if before is None else before + (sample - before) * _WEIGHT


class LinkHandler(Protocol):
    """What `Links` tells the layer above: plain functions, called in the event loop.

    An exception from one of them is reported to the loop's exception handler
    and changes nothing else. All of them may call any method of `Links`.
    """

    def link_up(self, peer: PeerInfo) -> None:
        """A link has come up; comes before any `received` of it."""

    def link_down(self, peer: PeerInfo, cause: str) -> None:
        """The link has ended; exactly once for each `link_up`, and nothing after it."""

    def received(
        self, peer_id: str, data: bytes | bytearray | memoryview | frames.Gathered
    ) -> None:
        """A whole message has arrived; `data` is the receiver's to keep.

        It is in the parts that the sender gave if those came by shared memory.
        """

    def dial_failed(self, address: str, expected_id: str | None, error: RpcError) -> None:
        """Dialling has stopped for a reason that trying again does not mend."""

    def accept_failed(self, address: str, error: RpcError) -> None:
        """A connection that came in did not become a link.

        Not told of connections that just ended, and of second ones that the
        rule against two links refused: both are in the course of things.
        """


CLOSING: Final = b"\x01"
HANG_UP: Final = b"\x02"
"""What a goodbye says: closed altogether, or ended this link only."""


class Owner(Protocol):
    """What a link needs of the `Links` it belongs to."""

    handler: LinkHandler
    options: LinkOptions

    def went_down(self, link: Link, cause: str) -> None:
        """Called once, when the link goes down."""

    def report(self, error: BaseException, where: str) -> None:
        """Called with an error that is nobody's."""


class _Returns:
    """What is to be said of memory that the other side lent; kept by all that uses such memory."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, tell: Callable[[Sequence[int]], None]
    ) -> None:
        self._loop = loop
        self._tell: Callable[[Sequence[int]], None] | None = tell
        self._numbers: deque[int] = deque(maxlen=frames.RETURNED_BYTES_MAX // 8)
        self._told_soon = False

    def add(self, number: int) -> None:
        """See `shared_memory.Loan`; in any thread, at any moment."""
        self._numbers.append(number)
        if not self._told_soon and self._tell is not None:
            self._told_soon = True
            with contextlib.suppress(RuntimeError):  # The loop is closed.
                self._loop.call_soon_threadsafe(self._tell_now)

    def _tell_now(self) -> None:
        # First, so that what is added meanwhile is told, now or next time.
        self._told_soon = False
        numbers: list[int] = []
        while self._numbers:
            numbers.append(self._numbers.popleft())
        if numbers and self._tell is not None:
            self._tell(numbers)

    def end(self) -> None:
        """The link is down: nobody is left to be told."""
        self._tell = None


class Link:
    """One link that is up, or was."""

    __slots__ = (
        "_asked_s",
        "_broken",
        "_channel",
        "_compressor",
        "_finishing",
        "_heard",
        "_inbox",
        "_lends",
        "_lent",
        "_lent_before",
        "_links",
        "_loop",
        "_options",
        "_outbox",
        "_pacer",
        "_pumping",
        "_rate",
        "_returns",
        "_rtt_s",
        "_shared_bytes",
        "_silent_ticks",
        "_taken_bytes",
        "_timer",
        "_tokens",
        "_untaken_bytes",
        "_waiting_bytes",
        "_waiting_s",
        "_write",
        "_write_waits_for",
        "_written",
        "dialled_here",
        "down",
        "ended",
        "goodbye",
        "link_id",
        "peer",
    )

    def __init__(
        self,
        links: Owner,
        peer: PeerInfo,
        channel: Channel,
        link_id: bytes,
        outbox: frames.Outbox,
        inbox: frames.Inbox,
        dialled_here: bool,
    ) -> None:
        self.peer = peer
        self.link_id = link_id
        self.dialled_here = dialled_here
        self.down = False
        # What the peer gave as its reason, once it has said goodbye.
        self.goodbye = b""
        self._links = links
        self._options = links.options
        self._channel = channel
        self._outbox = outbox
        self._inbox = inbox
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._finishing = False
        # Whether `_pump` is going to be called anyway, so nobody else needs to.
        self._pumping = False
        # The write under way, and what it waits for.
        self._write: Coroutine[Any, Any, None] | None = None
        self._write_waits_for: Any = None
        # No more writes, because of an error or the end of the link.
        self._broken = False
        self._written: asyncio.Future[None] = self._loop.create_future()
        self._heard = True
        self._silent_ticks = 0
        self._timer: asyncio.TimerHandle | None = None
        self._tokens = 0
        # When the question was sent that is not yet answered, and what is known of the cost.
        self._asked_s: float | None = None
        self._rtt_s: float | None = None
        self._rate: float | None = None
        # Of the frame that has to wait: its bytes, and since when.
        self._waiting_bytes = 0
        self._waiting_s = 0.0
        self._compressor = compression.Compressor()
        if (
            self._options.compress
            and channel.kind == "grpc"
            and compression.FEATURE in peer.features
        ):
            outbox.compress = self._compressor
        # Bulk to one peer of another host yields to what is small. Within a host the buffer of the
        # socket is small, and what is large goes by shared memory.
        self._pacer: pacing.Pacer | None = None
        if channel.kind != "unix" and pacing.FEATURE in peer.features:
            self._pacer = pacing.Pacer(self._options.lane_bytes_max)
            outbox.bulk_limit = self._pacer.limit_bytes
        # Of messages in shared memory: sent; sent and not yet taken there; taken here.
        self._shared_bytes = 0
        self._untaken_bytes = 0
        self._taken_bytes = 0
        # Memory that the other side will say it has ceased to use; what is to be said to it.
        self._lends = self.shares and shared_memory.FEATURE in peer.features
        self._lent: dict[int, shared_memory.Sealed] = {}
        # The numbers of what was lent at the last tick.
        self._lent_before: set[int] = set()
        self._returns = _Returns(self._loop, self._tell_returned)

    def start(self) -> None:
        if self._lends:
            shared_memory.begin_lending()
        self._pumping = True
        self._loop.call_soon(self._pump)
        self._timer = self._loop.call_later(self._options.ping_interval_s, self._tick)
        # After that, as the welcome of an accepted link has to come before all else.
        self._loop.call_soon(self._ask)

    @property
    def cost(self) -> LinkCost:
        """See `LinkCost`."""
        return LinkCost(
            self._channel.kind,
            self._rtt_s,
            self._rate,
            self._outbox.pushed_bytes - self._outbox.queued_bytes + self._shared_bytes,
            self._inbox.fed_bytes + self._taken_bytes,
        )

    def _ask(self) -> None:
        if self.down:
            return
        if self._asked_s is None:
            self._asked_s = _now()
        self._control(frames.PING)

    def send_urgent(self, data: bytes) -> bool:
        if self._finishing:
            return False
        self._outbox.push_urgent(data)
        if not self._pumping and self._write is None:
            self._pump()
        return True

    def send(self, data: frames.Data | frames.Gathered, bulk: bool) -> bool:
        outbox = self._outbox
        if (
            self._finishing
            or outbox.queued_bytes + self._untaken_bytes > self._options.queue_bytes_max
        ):
            return False
        if len(data) < shared_memory.SHARED_BYTES_MIN or not self._share(data, bulk):
            outbox.push(data, bulk)
        if not self._pumping and self._write is None:
            # An idle link sends at once; what follows in the same turn goes
            # together in the next frame, since this write ends in a later one.
            self._pump()
        return True

    @property
    def shares(self) -> bool:
        """Whether large messages go by shared memory."""
        return self._options.share_memory and self._channel.shares

    def _share(self, data: frames.Data | frames.Gathered, bulk: bool) -> bool:
        """Send a large message by shared memory; returns whether it went that way."""
        if not self.shares or len(data) > self._options.message_bytes_max:
            return False
        parts = data.parts if isinstance(data, frames.Gathered) else [memoryview(data).cast("B")]
        self._tokens += 1
        try:
            room = shared_memory.LENT_MAX - len(self._lent) if self._lends else None
            table = shared_memory.lay_out(parts, self._tokens, room)
        except OSError:
            return False
        if (
            table is None
            or not table.sealed
            or len(table.data) > self._outbox.shared_bytes_max
            or not self._channel.give(self._tokens, [each.descriptor for each in table.sealed])
        ):
            return False
        for index, memory in enumerate(table.sealed):
            if memory.is_lent:
                self._lent[shared_memory.loan_number(self._tokens, index)] = memory
        self._outbox.push_shared(table.data, bulk)
        self._shared_bytes += len(data)
        self._untaken_bytes += len(data)
        return True

    def push(self) -> None:
        """Write what waits, also in the middle of handling a frame."""
        if self._write is None:
            self._pump()

    @property
    def queued_bytes(self) -> int:
        return self._outbox.queued_bytes + self._untaken_bytes

    def _control(self, kind: int, payload: bytes = b"") -> None:
        self._outbox.push_control(kind, payload)
        if not self._pumping and self._write is None:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self, _event: object = None) -> None:
        """Write what waits, frame by frame, until a write has to be waited for."""
        self._pumping = False
        if self._write is not None:
            return  # Its end comes back here.
        outbox = self._outbox
        pacer = self._pacer
        while not self._broken:
            parts = outbox.take()
            if parts is None:
                break
            if pacer is not None and outbox.bulk_bytes != pacer.sent_bytes:
                pacer.sent(outbox.bulk_bytes, _now())
                outbox.bulk_limit = pacer.limit_bytes
            self._write = self._channel.write(parts)
            if not self._step():
                self._waiting_bytes = sum(map(len, parts))
                self._waiting_s = _now()
                return
        if (self._broken or (self._finishing and not outbox)) and not self._written.done():
            self._written.set_result(None)

    def _step(self) -> bool:
        """Go on with the write under way; returns whether it is over.

        The coroutine is stepped by hand, as a task would step it, because a
        task starts one turn of the loop later, and wakes another turn later.
        """
        write = self._write
        if write is None:
            return True
        try:
            waits_for = write.send(None)
        except StopIteration:
            self._write = None
            return True
        except (RpcError, asyncio.CancelledError) as error:
            self._write = None
            self._broken = True
            # Later, as this may be within a `send` of the handler's.
            self._loop.call_soon(self.drop, str(error) or "ended here")
            return True
        if waits_for is None:
            self._loop.call_soon(self._resume)
        else:
            # What a task does on being handed a future, to say that it took it.
            waits_for._asyncio_future_blocking = False
            waits_for.add_done_callback(self._resume)
        self._write_waits_for = waits_for
        return False

    def _resume(self, _future: object = None) -> None:
        self._write_waits_for = None
        if self._step():
            took_s = _now() - self._waiting_s
            if self._pacer is None and self._waiting_bytes >= _RATE_BYTES_MIN and took_s > 0:
                self._rate = _average(self._rate, self._waiting_bytes / took_s)
                self._compressor.link_rate = self._rate
            self._pump()

    @property
    def channel_kind(self) -> str:
        return self._channel.kind

    async def _stop_writing(self) -> None:
        self._broken = True
        if self._write_waits_for is not None and self.goodbye:
            # The other side reads on to the end. Of a write that is cancelled instead gRPC may
            # keep the stream open, and then that end does not come.
            await asyncio.wait([self._written], timeout=self._options.close_timeout_s)
        if self._write_waits_for is not None:
            self._write_waits_for.cancel()
        elif self._write is None:
            self._pump()
        await asyncio.wait([self._written])

    async def run(self, first: Sequence[frames.Received] = ()) -> None:
        """Read until the link ends; leaves nothing of it behind."""
        channel = self._channel
        cause = "the connection was lost"
        try:
            self._handle(first)
            if self._goes_on() and not await channel.receive(self._frame):
                cause = f"{self.peer.name or self.peer.id} ended the connection"
        except RpcError as error:
            cause = str(error)
        finally:
            self.go_down("closed here" if self._finishing else cause)
            await self._clean_up()

    def _goes_on(self) -> bool:
        return not self.goodbye and (self._finishing or not self.down)

    def _frame(self, frame: Buffer) -> bool:
        self._heard = True
        self._handle(self._inbox.feed(frame))
        return self._goes_on()

    def _handle(self, items: Sequence[frames.Received]) -> None:
        received = self._links.handler.received
        peer_id = self.peer.id
        # What the handler sends in answer to this frame leaves together, and
        # before the next read is begun, which would cost an answer some 20 us.
        self._pumping = True
        for kind, data in items:
            if kind == frames.DATA or kind == frames.SHARED:
                if self.down:
                    continue
                message = data if kind == frames.DATA else self._collect(data)
                try:
                    received(peer_id, message)
                except Exception as error:
                    self._links.report(error, "received")
            elif kind == frames.PING:
                self._control(frames.PONG)
            elif kind == frames.PONG:
                if self._asked_s is not None:
                    self._rtt_s = _average(self._rtt_s, _now() - self._asked_s)
                    self._asked_s = None
            elif kind == frames.MARK:
                self._control(frames.ECHO, bytes(data))
            elif kind == frames.ECHO:
                self._heard_echo(data)
            elif kind == frames.TAKEN:
                self._take_note(data)
            elif kind == frames.RETURNED:
                self._take_back(data)
            elif kind == frames.GOODBYE:
                self.goodbye = bytes(data) or CLOSING
                reason = "hung up" if self.goodbye == HANG_UP else "closed"
                self.go_down(f"{self.peer.name or self.peer.id} {reason}")
            else:
                raise FrameError(f"a handshake message of kind {kind} on a link that is up")
        self._pump()

    def _collect(self, table: frames.Data) -> frames.Data | frames.Gathered:
        try:
            parts = shared_memory.collect(
                table,
                self._channel.take,
                self._options.message_bytes_max,
                self._returns.add,
            )
        except OSError as error:
            # The sender repeats what matters, and by then there may be room.
            raise ChannelBroken(
                f"no room for a message in shared memory: {error.strerror}",
                address=self._channel.address,
            ) from error
        self._taken_bytes += sum(map(len, parts))
        self._control(frames.TAKEN, self._taken_bytes.to_bytes(8, "little"))
        return parts[0] if len(parts) == 1 else frames.Gathered(parts)

    def _take_note(self, data: frames.Data) -> None:
        """The other side took messages out of shared memory: all of them, up to a number of bytes.

        What it says counts from the link's beginning, so that of two the later is enough.
        """
        self._untaken_bytes = max(0, self._shared_bytes - int.from_bytes(data, "little"))

    def _heard_echo(self, data: frames.Data) -> None:
        """The other side has read bulk of ours, so that there may be room for more."""
        pacer = self._pacer
        if pacer is None:
            return  # Marks are not set any more.
        try:
            if len(data) != 8:
                raise ValueError(f"{len(data)} bytes are no number of a mark")
            number = int.from_bytes(data, "little")
            pacer.seen(number, _now(), self._outbox.has_bulk)
        except ValueError as error:
            raise FrameError(f"an echo of nothing: {error}") from error
        self._outbox.bulk_limit = pacer.limit_bytes
        self._rate = self._compressor.link_rate = pacer.rate

    def _tell_returned(self, numbers: Sequence[int]) -> None:
        if not self.down:
            self._control(frames.RETURNED, struct.pack(f"<{len(numbers)}Q", *numbers))

    def _take_back(self, data: frames.Data) -> None:
        """The other side has ceased to use lent memory, or used it so that it never will."""
        if len(data) % 8:
            raise FrameError("numbers of lent memory that are cut off")
        for (number,) in struct.iter_unpack("<Q", data):
            # What was given away meanwhile is not there any more.
            memory = self._lent.pop(number >> 1, None)
            if memory is not None and number & 1:
                memory.fix()

    def _tick(self) -> None:
        if self._lends:
            shared_memory.trim()
            # What is used for so long is given away for good: it is somebody's state by now.
            for number in self._lent_before.intersection(self._lent):
                self._lent.pop(number).fix()
            self._lent_before = set(self._lent)
        # Ticks are counted rather than seconds: a pause of this very process
        # costs one tick, and then what arrived meanwhile is read first.
        interval_s = self._options.ping_interval_s
        if self._heard:
            self._heard = False
            self._silent_ticks = 0
        else:
            self._silent_ticks += 1
            if self._silent_ticks * interval_s >= self._options.silence_max_s:
                self.go_down(
                    f"nothing was heard from {self.peer.name or self.peer.id} for "
                    f"{self._options.silence_max_s:g} s"
                )
                self._channel.abort()
                return
        self._ask()
        self._timer = self._loop.call_later(interval_s, self._tick)

    def go_down(self, cause: str) -> None:
        """Tell the handler, once; from now on nothing is received or taken."""
        if self.down:
            return
        self.down = True
        self._returns.end()
        lent, self._lent = self._lent, {}
        for memory in lent.values():
            memory.fix()
        if self._lends and self._timer is not None:
            shared_memory.end_lending()
        self._lends = False
        if self._timer is not None:
            self._timer.cancel()
        self._links.went_down(self, cause)

    def drop(self, cause: str) -> None:
        """End at once."""
        self.go_down(cause)
        self._channel.abort()

    def finish(self, reason: bytes) -> None:
        """Take no more messages; send what is queued, then a goodbye."""
        if not self._finishing:
            self._finishing = True
            self._control(frames.GOODBYE, reason)

    async def end(self, reason: bytes) -> None:
        """Finish within `close_timeout_s`; then end whatever is left."""
        self.finish(reason)
        await asyncio.wait([self.ended], timeout=self._options.close_timeout_s)
        if not self.ended.done():
            self._channel.abort()
            # The reader ends by the abort; this bounds what a channel may take over it.
            await asyncio.wait([self.ended], timeout=self._options.close_timeout_s)
        self.go_down("closed here")

    async def _clean_up(self) -> None:
        try:
            if self._finishing and self.goodbye:
                # Both sides are closing; ours still has its say, and hears no echo of it.
                self._pacer = self._outbox.bulk_limit = None
                self.push()
                await asyncio.wait([self._written], timeout=self._options.close_timeout_s)
            await self._stop_writing()
            if self.goodbye and self.dialled_here:
                await drain(self._channel, self._options.close_timeout_s)
            if self.dialled_here:
                await self._channel.close()
        finally:
            if not self.ended.done():
                self.ended.set_result(None)


async def drain(channel: Channel, timeout_s: float) -> None:
    """Send no more and read until the other side has ended too, so that it got everything."""
    try:
        async with asyncio.timeout(timeout_s):
            await channel.finish()
            while await channel.read() is not None:
                pass
    except (RpcError, TimeoutError):
        return  # It ended otherwise, which is an end as well.
