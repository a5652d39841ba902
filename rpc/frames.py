"""One frame layout for all channels; every size in it is bounded.

A frame, little-endian:

    mac        16 bytes   blake2b, keyed, over all that follows
    version     1 byte    of this layout
    sequence    8 bytes   0, 1, 2, ... per connection and direction
    records               kind (1 byte), length (4 bytes), payload; repeated

A record carries one whole message, one chunk of a message, or a control word.
So a frame takes along everything that waits, and a large message leaves in
chunks, with small ones between.

There are two lanes, for ordinary and for bulk messages. Within a lane messages
stay in order; a frame takes up to one budget of bytes from each, and bulk
therefore delays an ordinary message by no more than one chunk. Small messages
that are urgent overtake both. Where bulk is paced (`rpc.pacing`), a frame with
some of it has a mark, which the receiver echoes.

A chunk may be compressed, each by itself, where `Outbox.compress` says so.

The key belongs to one connection and one direction and the MAC covers the
sequence number, so a frame that is repeated, reordered, sent back or taken
from another connection is refused before anything in it is interpreted. Only
the messages of the handshake, which come before there is a key, have a MAC of
zeros.

`Outbox` and `Inbox` are pure: they do no I/O and read no clock.
"""

from __future__ import annotations

import hmac
import struct
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import Final, NamedTuple, TypeAlias

from rpc import compression
from rpc.errors import FrameError, MessageTooLarge

Data: TypeAlias = bytes | bytearray | memoryview
Parts: TypeAlias = list[bytes | memoryview]

VERSION: Final = 1
MAC_BYTES: Final = 16
KEY_BYTES_MAX: Final = 64

LANE_BYTES_MAX: Final = 256 * 1024
"""Default budget of one lane in one frame.

Source: measured, 50 MiB over gRPC on 2 cores: 64 KiB gave four fifths of the
throughput of 256 KiB; 1 MiB gave no more, and four times the delay for what
waits behind a chunk.
"""

MESSAGE_BYTES_MAX: Final = 2 * 1024**3
"""Default limit of one message."""

_HEADER: Final = struct.Struct("<BQ")
_RECORD: Final = struct.Struct("<BI")
_SINGLE: Final = struct.Struct("<BQBI")
_FIRST: Final = struct.Struct("<BQQ")
_NEXT: Final = struct.Struct("<BQ")
_BODY_AT: Final = MAC_BYTES + _HEADER.size
_SINGLE_AT: Final = MAC_BYTES + _SINGLE.size
_NO_MAC: Final = bytes(MAC_BYTES)

HANDSHAKE_BYTES_MAX: Final = 16 * 1024
"""Limit of a frame from a peer that has not proved itself."""

# Kinds of records. Zero is no kind, so that zeroed memory is no frame.
DATA: Final = 1
"""A whole message."""
CHUNK_FIRST: Final = 2
"""Lane, message id, size of the message, first bytes."""
CHUNK_NEXT: Final = 3
"""Lane, message id, further bytes; the last one completes the size."""
PING: Final = 4
PONG: Final = 5
GOODBYE: Final = 6
"""The sender sends nothing more; one byte says why."""
HELLO: Final = 7
CHALLENGE: Final = 8
PROOF: Final = 9
WELCOME: Final = 10
REFUSAL: Final = 11
SHARED: Final = 12
"""A whole message, the large parts of which are in shared memory: see `rpc.shared_memory`."""

TAKEN: Final = 13
"""How many bytes of messages in shared memory the sender of this has taken so far (8 bytes)."""

CHUNK_FIRST_ZSTD: Final = 14
CHUNK_NEXT_ZSTD: Final = 15
"""As CHUNK_FIRST and CHUNK_NEXT, with bytes that are compressed. Only for peers that say so."""

RETURNED: Final = 16
"""Which lent memory the sender of this has ceased to use: 8 bytes each, see `rpc.shared_memory`."""

MARK: Final = 17
"""The sender wants to know when this frame was read; a number (8 bytes). Only for peers that echo
it: see `rpc.pacing`."""
ECHO: Final = 18
"""The last mark that the sender of this has read; it stands for all before."""

RETURNED_BYTES_MAX: Final = 1024
"""Limit of such a record. What is left out stays lent, and nothing worse."""

URGENT_BYTES_MAX: Final = 4096
"""A larger message is an ordinary one, however urgent."""

SHARED_BYTES_MAX: Final = 128 * 1024
"""Limit of what describes a message in shared memory."""

_PAYLOAD_BYTES_MAX: Final = {
    PING: 0,
    PONG: 0,
    GOODBYE: 1,
    WELCOME: 0,
    PROOF: 1024,
    SHARED: SHARED_BYTES_MAX,
    TAKEN: 8,
    RETURNED: RETURNED_BYTES_MAX,
    MARK: 8,
    ECHO: 8,
}
_LAST: Final = {GOODBYE}
_HANDSHAKE: Final = frozenset({HELLO, CHALLENGE, REFUSAL})


def frame_bytes_max(lane_bytes_max: int = LANE_BYTES_MAX) -> int:
    """Tell the size of the largest frame.

    Args:
        lane_bytes_max: Budget of one lane, record heads included.

    Returns:
        Bytes: both lanes full, plus heads and control words.
    """
    return 2 * lane_bytes_max + 4096


def plain(kind: int, payload: bytes) -> bytes:
    """Build a handshake frame, which nothing protects.

    Args:
        kind: HELLO, CHALLENGE or REFUSAL.
        payload: Its message.

    Returns:
        The frame.

    Raises:
        ValueError: Another kind, or more than `HANDSHAKE_BYTES_MAX`.
    """
    frame = _NO_MAC + _SINGLE.pack(VERSION, 0, kind, len(payload)) + payload
    if kind not in _HANDSHAKE or len(frame) > HANDSHAKE_BYTES_MAX:
        raise ValueError(f"kind {kind} with {len(payload)} bytes is no handshake frame")
    return frame


def is_plain(frame: Data) -> bool:
    """Tell whether a frame claims to be of the handshake (its MAC is all zeros)."""
    return bytes(frame[:MAC_BYTES]) == _NO_MAC


def open_plain(frame: Data) -> tuple[int, bytes]:
    """Read a handshake frame.

    Args:
        frame: What a peer sent; anything.

    Returns:
        The kind (HELLO, CHALLENGE or REFUSAL) and the message, not yet parsed.

    Raises:
        FrameError: It is not exactly one handshake record.
    """
    view = memoryview(frame)
    size = len(view)
    if not MAC_BYTES + _SINGLE.size <= size <= HANDSHAKE_BYTES_MAX:
        raise FrameError(f"a handshake frame cannot have {size} bytes")
    version, sequence, kind, length = _SINGLE.unpack_from(view, MAC_BYTES)
    if version != VERSION:
        raise FrameError(
            f"frame layout version {version}, but this side speaks {VERSION}; run releases of "
            "livemigrate that fit together"
        )
    at = MAC_BYTES + _SINGLE.size
    if not is_plain(view) or sequence != 0 or kind not in _HANDSHAKE or at + length != size:
        raise FrameError("not a handshake frame; the other side speaks another protocol")
    return kind, bytes(view[at:])


class Gathered:
    """One large message in parts, which are sent one after the other without being joined.

    Parts may be views of memory that changes later: until it has left, either it must not, or
    `settle` is called before it does.
    """

    __slots__ = ("__weakref__", "_copies", "_ends", "parts")

    def __init__(self, parts: Sequence[Data]) -> None:
        self.parts: list[memoryview] = [memoryview(part).cast("B") for part in parts]
        """Its bytes, in order."""
        self._ends = list(accumulate(map(len, self.parts)))
        self._copies: list[weakref.ref[Gathered]] = []

    def __len__(self) -> int:
        """Bytes of all parts."""
        return self._ends[-1] if self._ends else 0

    def after(self, head: bytes) -> Gathered:
        """The message that begins with `head` and goes on with this one; uncopied."""
        made = Gathered([head, *self.parts])
        self._copies.append(weakref.ref(made))
        return made

    def slices(self, start: int, end: int) -> list[memoryview]:
        """The bytes from `start` to `end`, in pieces of the parts."""
        found = []
        index = bisect_right(self._ends, start)
        while start < end:
            begin = self._ends[index] - len(self.parts[index])
            piece = self.parts[index][start - begin : end - begin]
            if piece:
                found.append(piece)
            start = self._ends[index]
            index += 1
        return found

    def joined(self) -> bytes:
        """All bytes in one string."""
        return b"".join(self.parts)

    def settle(self) -> None:
        """Let go of the memory: what has not left yet, here and in `after`, goes on as copies."""
        for reference in self._copies:
            made = reference()
            if made is not None:
                made.settle()
        self.parts[:] = [memoryview(bytes(part)) for part in self.parts]


class _Shared(bytes):
    """In a lane: what describes a message in shared memory."""

    __slots__ = ()


class Received(NamedTuple):
    """One thing that a frame brought.

    Attributes:
        kind: DATA or SHARED for a whole message, else the control word's kind.
        data: The message, what describes it, or the control word's payload.
    """

    kind: int
    data: bytes | bytearray


class _Lane:
    __slots__ = ("message_id", "number", "offset", "queue")

    def __init__(self, number: int) -> None:
        self.number = number
        self.queue: deque[bytes | memoryview | Gathered] = deque()
        # How much of the first message in the queue has left.
        self.offset = 0
        self.message_id = 0


class Outbox:
    """What waits to be sent on one connection; builds its frames."""

    __slots__ = (
        "_bulk",
        "_control",
        "_key",
        "_lane_bytes_max",
        "_message_bytes_max",
        "_ordinary",
        "_sequence",
        "_urgent",
        "bulk_bytes",
        "bulk_limit",
        "compress",
        "pushed_bytes",
        "queued_bytes",
    )

    def __init__(
        self,
        key: bytes,
        *,
        lane_bytes_max: int = LANE_BYTES_MAX,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
    ) -> None:
        """Make an empty outbox.

        Args:
            key: MAC key of this direction, 1 to 64 bytes.
            lane_bytes_max: Budget of each lane in one frame, at least 64.
            message_bytes_max: Larger messages are refused.

        Raises:
            ValueError: An argument is out of its range.
        """
        if not 1 <= len(key) <= KEY_BYTES_MAX:
            raise ValueError(f"a key has 1 to {KEY_BYTES_MAX} bytes, not {len(key)}")
        if lane_bytes_max < 64:
            raise ValueError(f"lane_bytes_max must be at least 64, not {lane_bytes_max}")
        self._key = key
        self._lane_bytes_max = lane_bytes_max
        self._message_bytes_max = message_bytes_max
        self._sequence = 0
        self._ordinary = _Lane(0)
        self._bulk = _Lane(1)
        self._urgent: deque[bytes] = deque()
        self._control: dict[int, bytes] = {}
        self.compress: Callable[[Data], bytes | None] | None = None
        """Makes a chunk smaller, or returns None to leave it as it is; None: none is tried."""
        self.bulk_limit: int | None = None
        """How much of the bulk lane the next frame may have, and that it is marked; None: as much
        as of the other lane, without marks."""
        self.bulk_bytes = 0
        """How much of the bulk lane has left, heads included: the number of the last mark."""
        self.queued_bytes = 0
        """Bytes of messages that have not left in a frame."""
        self.pushed_bytes = 0
        """Bytes of messages since the beginning."""

    def __bool__(self) -> bool:
        """Tell whether anything waits."""
        return bool(self._ordinary.queue or self._control or self._bulk.queue or self._urgent)

    @property
    def has_bulk(self) -> bool:
        """Whether bulk waits."""
        return bool(self._bulk.queue)

    def push(self, data: Data | Gathered, bulk: bool = False) -> None:
        """Queue one message.

        Args:
            data: Its bytes. Up to 64 KiB are copied if they can change; larger
                ones are not, and must not change until they have left (but see
                `Gathered.settle`).
            bulk: Whether it goes in the bulk lane.

        Raises:
            MessageTooLarge: It is over the limit; nothing was queued.
        """
        if type(data) is bytes:
            item: bytes | memoryview | Gathered = data
            size = len(data)
        elif isinstance(data, Gathered):
            size = len(data)
            item = data if size > 65536 else data.joined()
        else:
            view = memoryview(data).cast("B")
            size = len(view)
            item = view if size > 65536 else view.tobytes()
        if size > self._message_bytes_max:
            raise MessageTooLarge(
                f"a message of {size} bytes is over the limit of {self._message_bytes_max}; "
                "send it in parts, or raise message_bytes_max on both sides",
                size_bytes=size,
                limit_bytes=self._message_bytes_max,
            )
        (self._bulk if bulk else self._ordinary).queue.append(item)
        self.queued_bytes += size
        self.pushed_bytes += size

    def push_urgent(self, data: bytes) -> None:
        """Queue a message that overtakes all that are not; a large one does not."""
        if len(data) > min(URGENT_BYTES_MAX, self._lane_bytes_max // 2):
            self.push(data)
            return
        self._urgent.append(data)
        self.queued_bytes += len(data)
        self.pushed_bytes += len(data)

    @property
    def shared_bytes_max(self) -> int:
        """Limit of what describes a message in shared memory: it is never cut."""
        return min(SHARED_BYTES_MAX, self._lane_bytes_max - _RECORD.size)

    def push_shared(self, data: bytes, bulk: bool) -> None:
        """Queue what describes a message in shared memory, at most `shared_bytes_max`."""
        (self._bulk if bulk else self._ordinary).queue.append(_Shared(data))
        self.queued_bytes += len(data)
        self.pushed_bytes += len(data)

    def push_control(self, kind: int, payload: bytes = b"") -> None:
        """Queue a control word; it leaves in the next frame, once, before messages.

        GOODBYE alone waits until all messages have left. Of two of a kind that have not left the
        later is enough; RETURNED goes with what was to be told before, as far as there is room.
        """
        if kind == RETURNED:
            payload = (self._control.get(kind, b"") + payload)[-RETURNED_BYTES_MAX:]
        self._control[kind] = payload

    def take(self) -> Parts | None:
        """Build the next frame out of what waits.

        Returns:
            The frame in parts, to be sent one after the other as one frame; or
            None if nothing waits, or nothing but bulk for which there is no
            room. Each frame taken must be sent, in order.
        """
        ordinary = self._ordinary
        queue = ordinary.queue
        bulk = self._bulk.queue
        sequence = self._sequence
        urgent = self._urgent
        if (
            len(queue) == 1
            and not self._control
            and not bulk
            and not ordinary.offset
            and not urgent
        ):
            # The commonest frame, one small message, takes the shortest way.
            data = queue[0]
            size = len(data)
            if size <= 4096 and type(data) is bytes:
                queue.popleft()
                self.queued_bytes -= size
                self._sequence = sequence + 1
                body = _SINGLE.pack(VERSION, sequence, DATA, size) + data
                return [blake2b(body, digest_size=MAC_BYTES, key=self._key).digest(), body]
        bulk_limit = self._lane_bytes_max if self.bulk_limit is None else self.bulk_limit
        if not (queue or urgent or (bulk and bulk_limit)) and (
            not self._control or (bulk and self._control.keys() == _LAST)
        ):
            return None
        parts: Parts = [_HEADER.pack(VERSION, sequence)]
        for kind in sorted(self._control):
            if kind != GOODBYE:
                payload = self._control.pop(kind)
                parts.append(_RECORD.pack(kind, len(payload)) + payload)
        budget = self._lane_bytes_max
        while urgent and budget >= self._lane_bytes_max // 2:
            # Out of the budget of the ordinary ones, so that the frame stays within its limit.
            size = len(urgent[0])
            parts.append(_RECORD.pack(DATA, size) + urgent.popleft())
            self.queued_bytes -= size
            budget -= size + _RECORD.size
        if queue:
            self._fill(ordinary, parts, budget, self._lane_bytes_max)
        if bulk and bulk_limit:
            bulk_limit = min(bulk_limit, self._lane_bytes_max)
            self.bulk_bytes += bulk_limit - self._fill(self._bulk, parts, bulk_limit, bulk_limit)
            if self.bulk_limit is not None:
                parts.append(_RECORD.pack(MARK, 8) + self.bulk_bytes.to_bytes(8, "little"))
        if not queue and not bulk and not urgent and GOODBYE in self._control:
            payload = self._control.pop(GOODBYE)
            parts.append(_RECORD.pack(GOODBYE, len(payload)) + payload)
        self._sequence = sequence + 1
        mac = blake2b(digest_size=MAC_BYTES, key=self._key)
        if len(parts) > 4:
            # One pass over joined bytes is cheaper than a call for each small part.
            parts = [b"".join(parts)]
        for part in parts:
            mac.update(part)
        parts.insert(0, mac.digest())
        return parts

    def _fill(self, lane: _Lane, parts: Parts, budget: int, next_budget: int) -> int:
        """Add records of a lane to a frame.

        Args:
            lane: Of what waits.
            parts: The frame's.
            budget: How much they may take.
            next_budget: How much they may take in the next frame.

        Returns:
            What is left of the budget.
        """
        queue = lane.queue
        while queue:
            data = queue[0]
            size = len(data)
            offset = lane.offset
            if not offset and size + _RECORD.size <= budget:
                parts.append(_RECORD.pack(SHARED if type(data) is _Shared else DATA, size))
                if isinstance(data, Gathered):
                    parts += data.slices(0, size)
                else:
                    parts.append(data)
                queue.popleft()
                budget -= size + _RECORD.size
                self.queued_bytes -= size
                continue
            if not offset and size + _RECORD.size <= next_budget:
                return budget  # It fits whole in the next frame, so it is not cut.
            head = _NEXT.size if offset else _FIRST.size
            room = budget - _RECORD.size - head
            if room <= 0:
                return budget
            end = min(size, offset + room)
            length = head + end - offset
            chunk = (
                data.slices(offset, end)
                if isinstance(data, Gathered)
                else [memoryview(data)[offset:end]]
            )
            packed = self._packed(chunk) if self.compress is not None else None
            kinds = (CHUNK_FIRST, CHUNK_NEXT)
            if packed is not None:
                chunk = [memoryview(packed)]
                length = head + len(packed)
                kinds = (CHUNK_FIRST_ZSTD, CHUNK_NEXT_ZSTD)
            if offset:
                parts.append(
                    _RECORD.pack(kinds[1], length) + _NEXT.pack(lane.number, lane.message_id)
                )
            else:
                lane.message_id += 1
                parts.append(
                    _RECORD.pack(kinds[0], length) + _FIRST.pack(lane.number, lane.message_id, size)
                )
            parts += chunk
            budget -= _RECORD.size + length
            self.queued_bytes -= end - offset
            if end < size:
                lane.offset = end
                return budget
            lane.offset = 0
            queue.popleft()
        return budget

    def _packed(self, chunk: list[memoryview]) -> bytes | None:
        if self.compress is None:
            return None
        return self.compress(chunk[0] if len(chunk) == 1 else b"".join(chunk))


class Memory(bytearray):
    """Memory of a message that arrived; whoever keeps a part of it keeps nothing else by that."""

    __slots__ = ()

    __received__ = True
    """Tells `serializers` that it is no object of the program's."""


class _Assembly:
    __slots__ = ("data", "message_id", "size")

    def __init__(self, message_id: int, size: int) -> None:
        self.message_id = message_id
        self.size = size
        # It grows with what arrives; the announced size reserves nothing.
        self.data = Memory()


class Inbox:
    """Checks and opens the frames of one connection and puts messages together.

    At most one message per lane is being put together, so memory is bounded by
    twice `message_bytes_max`, and at any time by what was in fact received.
    After a FrameError the inbox is of no further use: the connection must end.
    """

    __slots__ = (
        "_assemblies",
        "_frame_bytes_max",
        "_key",
        "_message_bytes_max",
        "_sequence",
        "fed_bytes",
    )

    def __init__(
        self,
        key: bytes,
        *,
        frame_bytes_max: int = frame_bytes_max(),
        message_bytes_max: int = MESSAGE_BYTES_MAX,
    ) -> None:
        """Make an inbox for a connection's first frame.

        Args:
            key: MAC key of this direction.
            frame_bytes_max: Larger frames are refused.
            message_bytes_max: Larger messages are refused.
        """
        self._key = key
        self._frame_bytes_max = frame_bytes_max
        self._message_bytes_max = message_bytes_max
        self._sequence = 0
        self._assemblies: list[_Assembly | None] = [None, None]
        self.fed_bytes = 0
        """Bytes of frames since the beginning."""

    def feed(self, frame: Data) -> list[Received]:
        """Open one frame.

        Args:
            frame: What the peer sent; anything. It is not kept.

        Returns:
            Whole messages and control words, in the order sent; maybe none.

        Raises:
            FrameError: The MAC, the sequence number, a size or a kind is wrong;
                nothing of the frame is delivered.
        """
        view = memoryview(frame)
        size = len(view)
        if not _BODY_AT <= size <= self._frame_bytes_max:
            raise FrameError(
                f"a frame of {size} bytes; allowed are {_BODY_AT} to {self._frame_bytes_max}"
            )
        mac = blake2b(view[MAC_BYTES:], digest_size=MAC_BYTES, key=self._key).digest()
        if not hmac.compare_digest(mac, view[:MAC_BYTES]):
            raise FrameError("a frame whose MAC is wrong: altered, or not from this link's peer")
        version, sequence = _HEADER.unpack_from(view, MAC_BYTES)
        if version != VERSION:
            raise FrameError(f"frame layout version {version}, but this side speaks {VERSION}")
        if sequence != self._sequence:
            raise FrameError(
                f"frame {sequence} where {self._sequence} was due: repeated, reordered or lost"
            )
        self._sequence = sequence + 1
        self.fed_bytes += size
        at = _BODY_AT
        if size >= _SINGLE_AT and view[at] == DATA:
            # The commonest frame, one message, takes the shortest way.
            length = _SINGLE.unpack_from(view, MAC_BYTES)[3]
            if _SINGLE_AT + length == size and length <= self._message_bytes_max:
                return [Received(DATA, view[_SINGLE_AT:].tobytes())]
        received: list[Received] = []
        while at < size:
            if size - at < _RECORD.size:
                raise FrameError(f"{size - at} bytes after the last record")
            kind, length = _RECORD.unpack_from(view, at)
            at += _RECORD.size
            end = at + length
            if end > size:
                raise FrameError(f"a record of {length} bytes with {size - at} left in its frame")
            if kind == DATA:
                if length > self._message_bytes_max:
                    raise FrameError(f"a message of {length} bytes; see message_bytes_max")
                received.append(Received(DATA, view[at:end].tobytes()))
            elif kind == CHUNK_FIRST or kind == CHUNK_NEXT:
                message = self._chunk(kind, view[at:end])
                if message is not None:
                    received.append(Received(DATA, message))
            elif kind == CHUNK_FIRST_ZSTD or kind == CHUNK_NEXT_ZSTD:
                plain_kind = CHUNK_FIRST if kind == CHUNK_FIRST_ZSTD else CHUNK_NEXT
                message = self._chunk(plain_kind, view[at:end], packed=True)
                if message is not None:
                    received.append(Received(DATA, message))
            else:
                limit = _PAYLOAD_BYTES_MAX.get(kind)
                if limit is None or length > limit:
                    raise FrameError(f"a record of kind {kind} with {length} bytes")
                received.append(Received(kind, view[at:end].tobytes()))
            at = end
        return received

    def _chunk(self, kind: int, record: memoryview, packed: bool = False) -> bytearray | None:
        head = _FIRST if kind == CHUNK_FIRST else _NEXT
        if len(record) <= head.size:
            raise FrameError("a chunk without bytes")
        lane, message_id = _NEXT.unpack_from(record)
        if lane >= len(self._assemblies):
            raise FrameError(f"a chunk in lane {lane}, which does not exist")
        assembly = self._assemblies[int(lane)]
        chunk: Data = record[head.size :]
        if packed:
            # No chunk is larger than the largest frame, so that none can fill the memory.
            chunk = compression.unpack(chunk, self._frame_bytes_max)
        if kind == CHUNK_FIRST:
            total = int(_FIRST.unpack_from(record)[2])
            if assembly is not None:
                raise FrameError("a message that begins before the one ahead of it is complete")
            if total > self._message_bytes_max:
                raise FrameError(
                    f"a message of {total} bytes, but {self._message_bytes_max} are allowed; "
                    "raise message_bytes_max on this side"
                )
            assembly = self._assemblies[lane] = _Assembly(message_id, total)
        elif assembly is None or assembly.message_id != message_id:
            raise FrameError(f"a chunk of message {message_id}, which has not begun")
        if len(assembly.data) + len(chunk) > assembly.size:
            raise FrameError(f"more than the {assembly.size} bytes announced for a message")
        assembly.data += chunk
        if len(assembly.data) < assembly.size:
            return None
        self._assemblies[lane] = None
        return assembly.data
