"""Frames in, messages out of them; messages in, frames out of them.

What is sent in the same turn of the loop to the same peer leaves in one frame. Large messages go
as bulk, which the link cuts into chunks and lets small ones pass. What is sent to a node without
a link waits, bounded, while the link is being dialled; losing it is harmless, because requests
are repeated end to end.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from msgspec import structs

from migrate.core import messages
from migrate.core.ids import NodeId, TransferId, node_name
from migrate.core.messages import Chunk, Cut, Envelope, Message, Note, Reply, Step
from migrate.core.messages import Final as FinalMessage
from migrate.shell import wire
from rpc import shared_memory
from rpc.errors import MessageTooLarge
from rpc.frames import Gathered

if TYPE_CHECKING:
    from rpc.links import Links

log: Final = logging.getLogger("migrate")

BULK_BYTES: Final = 64 << 10
"""A message with a payload this large goes as bulk: about a quarter of a chunk, so that small
messages behind it never wait for more than a chunk."""

_ORDINARY: Final = (Envelope, Reply)
"""Most messages. NB: no `Envelope | Reply`, which would be made anew each time it is asked for: the
three of them took 5 us of a call."""

WAITING_MAX: Final = 10_000
"""Messages kept for a peer that is being dialled; more are dropped and repeated later."""

FRAME_MESSAGES_MAX: Final = 1_000

ENOUGH: Final = 80
"""Messages that leave at once as a frame of their own: while the peer handles them, more are made.
With 256 calls in flight, frames of 64 to 128 carried 70 to 98 thousand calls a second, whole
windows 52 to 63, and frames cut by chance 52 to 67."""

PACE: Final = 6.0
"""Average size of the last frames from which on small ones are worth a wait for more."""

IDLE_TURNS_MAX: Final = 1
"""Turns of the loop that may add nothing before what was gathered leaves."""

LINGER_TURNS_MAX: Final = 24
"""Turns of the loop that results wait for more of them; some 20 us each while there is work."""


URGENT: Final = frozenset(
    {
        *(messages.Prepare, messages.Prepared, messages.PrepareRefused, messages.ChunkTaken),
        *(messages.Ready, messages.FinalFailed, messages.Activate, messages.Activated),
        *(messages.ActivateRefused, messages.Dropped, messages.Released, messages.Abort),
        *(messages.WaitProbe, messages.Load),
        *(messages.Follow, messages.Following, messages.FollowRefused, messages.Unfollow),
        *(messages.Kept, messages.KeepRefused),
    }
)
"""What overtakes requests and states that wait for the link: a move must not last longer because
its source is busy, nor a node count as silent. The core takes messages in any order."""


class Peers:
    """Outgoing side of all links of one node or client.

    `dial` is asked for a link when there is something to send and none is up.
    """

    def __init__(
        self,
        links: Links,
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context,
        dial: Callable[[NodeId], None],
    ) -> None:
        self.links = links
        self._loop = loop
        self._context = context
        self._dial = dial
        self._boxes: dict[NodeId, list[Message]] = {}
        self._dirty: list[NodeId] = []
        self.final_half_sent: Callable[[], None] | None = None
        """For tests: told when half of a state that is being moved has left."""
        self._waiting: dict[NodeId, list[Message]] = {}
        # Streams of standbys with a large part under way to that node, which small ones would pass.
        self._bulky: dict[NodeId, set[TransferId]] = {}
        self._scheduled = False
        self._lingering = False
        self._pace = 0.0  # moving average of the size of frames
        # While set, what is sent waits as long as every turn of the loop adds something. For
        # results of tasks: a server that is handed message after message finishes one in each
        # turn, and a frame for each would cost more than the handler.
        self.gathering = False

    def send(self, node: NodeId, message: Message) -> None:
        """Queue a message; it leaves at the end of this turn of the loop."""
        box = self._boxes.get(node)
        if box is None:
            box = self._boxes[node] = []
        if not box:
            self._dirty.append(node)
            if not self._scheduled:
                self._scheduled = True
                if self.gathering or self._pace > PACE:
                    self._linger()
                else:
                    self._loop.call_soon(self.flush, context=self._context)
        box.append(message)
        if len(box) >= ENOUGH and self.links.is_up(node):
            self._boxes[node] = []
            self._dirty.remove(node)
            self._send_now(node, box)

    def flush_comes(self) -> None:
        """What is sent from here on needs no turn of the loop: `flush` is about to be called."""
        self._scheduled = True

    def _linger(self) -> None:
        self._scheduled = self._lingering = True
        self._loop.call_soon(self._lingered, 0, LINGER_TURNS_MAX, 0, context=self._context)

    def _lingered(self, before: int, turns: int, idle: int) -> None:
        queued = 0
        for node in self._dirty:
            queued += len(self._boxes[node])
        if queued == before:
            idle += 1
        if not turns or idle > IDLE_TURNS_MAX:
            self.flush()
        else:
            args = (queued, turns - 1, idle)
            self._loop.call_soon(self._lingered, *args, context=self._context)

    def flush_soon(self) -> None:
        """Send what is queued now, unless more is being gathered: then with it."""
        if self._lingering:
            return
        if self._pace > PACE and self._dirty:
            if not self._scheduled:
                self._linger()
            else:
                self._lingering = True
            return
        self.flush()

    def flush(self) -> None:
        """Send what is queued now."""
        self._scheduled = self._lingering = False
        if not self._dirty:
            return
        dirty, self._dirty = self._dirty, []
        for node in dirty:
            box = self._boxes[node]
            self._boxes[node] = []
            if not self.links.is_up(node):
                waiting = self._waiting.setdefault(node, [])
                waiting.extend(box[: WAITING_MAX - len(waiting)])
                self._dial(node)
            else:
                self._send_now(node, box)

    def push(self) -> None:
        """Send what is queued, and wait for no turn of the loop (see `Links.push`)."""
        self.flush()
        self.links.push()

    def _send_now(self, node: NodeId, box: list[Message]) -> None:
        self._pace += (len(box) - self._pace) / 4
        for message in box:
            if not isinstance(message, _ORDINARY) or len(message.payload) > BULK_BYTES:
                box = self._send_apart(node, box)
                break
        self._put_small(node, box)

    def _send_apart(self, node: NodeId, box: list[Message]) -> list[Message]:
        """Send what does not go with the small ones behind it; returns those that are left."""
        small: list[Message] = []
        something_waits = self.links.queued_bytes(node) > 0
        for message in box:
            if something_waits and type(message) in URGENT:
                self.links.send_urgent(node, wire.encode_messages([message]))
            elif isinstance(message, FinalMessage | Chunk) and len(message.state) > BULK_BYTES:
                data = self._with_state(node, message)
                self._put(node, data, bulk=True)
                if self.final_half_sent is not None and isinstance(message, FinalMessage):
                    self._watch_half(node, len(data) // 2, self.final_half_sent)
            elif isinstance(message, _ORDINARY) and len(message.payload) > BULK_BYTES:
                peer = self.links.peer(node)
                if peer is not None and wire.PAYLOAD_AFTER in peer.features:
                    self._put(node, wire.encode_with_payload(message), bulk=True)
                else:
                    self._put(node, wire.encode_messages([message]), bulk=True)
            elif type(message) is Cut and len(message.state) > BULK_BYTES:
                # After what comes before it in its stream, and what comes behind it after it.
                self._put_small(node, small)
                small = []
                self._put(node, self._with_state(node, message), bulk=True)
                self._bulky.setdefault(node, set()).add(message.stream)
            elif (
                self._bulky
                and isinstance(message, Cut | Step | Note)
                and self._is_behind(node, message)
            ):
                self._put(node, wire.encode_messages([message]), bulk=True)
            else:
                small.append(message)
        return small

    def _put_small(self, node: NodeId, small: list[Message]) -> None:
        if len(small) > FRAME_MESSAGES_MAX:
            for start in range(0, len(small), FRAME_MESSAGES_MAX):
                part = small[start : start + FRAME_MESSAGES_MAX]
                self._put(node, wire.encode_messages(part))
        elif small:
            self._put(node, wire.encode_messages(small))

    def _is_behind(self, node: NodeId, message: Cut | Step | Note) -> bool:
        """Whether a large part of the same stream may still be on its way."""
        bulky = self._bulky.get(node)
        if bulky is None or message.stream not in bulky:
            return False
        if self.links.queued_bytes(node):
            return True
        del self._bulky[node]
        return False

    def ready(self, node: NodeId, state: Gathered) -> Gathered:
        """A state that is going to leave, in memory that need not be copied again; in any thread.

        Where the link shares memory, what is not in such memory yet is copied there.
        """
        return shared_memory.settled(state) if self.links.shares(node) else state

    def _with_state(self, node: NodeId, message: FinalMessage | Chunk | Cut) -> bytes | Gathered:
        state: object = message.state
        if not isinstance(state, Gathered):
            return wire.encode_messages([message])
        peer = self.links.peer(node)
        if peer is not None and wire.STATE_AFTER in peer.features:
            return wire.encode_final(message, state)
        # A release that wants the state within its message.
        return wire.encode_messages([structs.replace(message, state=state.joined())])

    def _put(self, node: NodeId, data: bytes | Gathered, bulk: bool = False) -> None:
        try:
            self.links.send(node, data, bulk)
        except MessageTooLarge as error:
            # What users make is bounded before; whatever this is, the others must still leave.
            log.error("a message to %s cannot be sent: %s", node_name(node), error)

    def _watch_half(self, node: NodeId, left_max: int, tell: Callable[[], None]) -> None:
        """Look at every turn of the loop, in tests only, how much is still queued."""
        if not self.links.is_up(node):
            return
        if self.links.queued_bytes(node) <= left_max:
            tell()
            return
        self._loop.call_soon(self._watch_half, node, left_max, tell, context=self._context)

    def up(self, node: NodeId) -> None:
        """A link came up: send what waited for it."""
        waiting = self._waiting.pop(node, None)
        if waiting:
            self._send_now(node, waiting)

    def gone(self, node: NodeId) -> None:
        """The node will not come (back): drop what waits for it."""
        self._waiting.pop(node, None)
        self._bulky.pop(node, None)
        if not self._boxes.get(node):
            self._boxes.pop(node, None)
