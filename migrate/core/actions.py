"""What a move can ask for. The shell performs them in order and returns every result."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias

from migrate.core.directory import Row
from migrate.core.ids import NodeId, TransferId
from migrate.core.messages import MoveMessage


class Point(enum.Enum):
    """Steps at which tests may kill any process; the names are the fail points."""

    # Of a move.
    PREPARE_SENT = "prepare_sent"
    PREPARE_RECEIVED = "prepare_received"
    PREPARED = "prepared"
    CHUNK_SENT = "chunk_sent"
    CHUNK_RECEIVED = "chunk_received"
    CHUNK_TAKEN = "chunk_taken"  # at the source
    QUIESCED = "quiesced"
    FINAL_ENCODED = "final_encoded"
    FINAL_HALF_SENT = "final_half_sent"
    FINAL_SENT = "final_sent"
    FINAL_RECEIVED = "final_received"
    READY = "ready"
    READY_RECEIVED = "ready_received"
    SWAP_ASKED = "swap_asked"
    SWAP_DONE = "swap_done"  # in the directory, not yet known to the source's machine
    COMMIT_SEEN = "commit_seen"  # by the target in the row, before the source told it
    ACTIVATE_SENT = "activate_sent"
    ACTIVATED = "activated"
    ACTIVATED_RECEIVED = "activated_received"
    COPY_DROPPED = "copy_dropped"
    RELEASED = "released"
    FORWARDING_EXPIRED = "forwarding_expired"

    # Of delivery; reached by a `MarkedCore` only. At the sender:
    REQUEST_SENT = "request_sent"
    REPEAT_DUE = "repeat_due"
    ROW_LOOKED_UP = "row_looked_up"
    MOVED_RECEIVED = "moved_received"
    NOT_HERE_RECEIVED = "not_here_received"
    REPLY_RECEIVED = "reply_received"
    REPLY_TAKEN = "reply_taken"
    RECEIPT_RECEIVED = "receipt_received"
    ACKED_SENT = "acked_sent"
    # At the owner:
    REQUEST_RECEIVED = "request_received"
    REQUEST_ADMITTED = "request_admitted"  # in the mailbox, where it waits for its turn
    HANDLER_BEGUN = "handler_begun"
    HANDLER_DONE = "handler_done"  # its result is not recorded yet
    REPLY_READY = "reply_ready"  # recorded, and about to leave
    REPLY_SENT = "reply_sent"
    RECEIPT_READY = "receipt_ready"
    RECEIPT_SENT = "receipt_sent"
    REPEAT_RECEIVED = "repeat_received"
    ACKED_RECEIVED = "acked_received"
    RECORDS_FREED = "records_freed"
    # While the server moves, at its source or target:
    REQUEST_HELD = "request_held"  # at the source, from the freeze to the commit
    REQUEST_KNOCKED = "request_knocked"  # at the target, before it is live there
    REQUEST_FORWARDED = "request_forwarded"
    MOVED_SENT = "moved_sent"
    NOT_HERE_SENT = "not_here_sent"


class Result(enum.Enum):
    """How a move ended for the one who asked."""

    MOVED = "moved"
    REFUSED = "refused"
    NOT_PICKLABLE = "not_picklable"
    ROLLED_BACK = "rolled_back"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message of the move to a node; it may be lost."""

    node: NodeId
    message: MoveMessage


@dataclass(frozen=True, slots=True)
class SetTimer:
    """(Re)set the move's one timer."""

    delay_ms: int


@dataclass(frozen=True, slots=True)
class Reach:
    """A step was reached: a fail point in tests, a progress event otherwise."""

    point: Point


@dataclass(frozen=True, slots=True)
class CheckClass:
    """Target: can this class be had here, and in which version?"""

    cls: str
    by_value: bool
    python: str


@dataclass(frozen=True, slots=True)
class CopyAhead:
    """Source: capture some more of the state while the server serves; answer Copied."""


@dataclass(frozen=True, slots=True)
class TakeChunk:
    """Target: install a chunk of the state; answer Taken, or DecodeFailed."""

    number: int
    state: bytes


@dataclass(frozen=True, slots=True)
class Quiesce:
    """Source: hand out no more messages; answer Quiesced when none is being handled."""


@dataclass(frozen=True, slots=True)
class EncodeState:
    """Source: freeze, and capture object, mailbox, sessions and timers for `version`.

    `ahead`: of the object, only what the chunks that were sent ahead do not have; or what the
    target does not have as a standby, by the stream of that name.
    """

    version: int
    ahead: bool = False
    stream: TransferId = ""


@dataclass(frozen=True, slots=True)
class DecodeState:
    """Target: build the copy from the bytes; nothing of it acts yet.

    `ahead`: they are what the chunks that came ahead do not have; or what this node, as a standby,
    does not have of the stream of that name.
    """

    state: bytes
    epoch: int
    ahead: bool = False
    stream: TransferId = ""


@dataclass(frozen=True, slots=True)
class SwapRow:
    """Compare-and-swap the server's row: `row` if the revision is still `rev`."""

    row: Row
    rev: int


@dataclass(frozen=True, slots=True)
class ReadRow:
    """Read the server's row."""


@dataclass(frozen=True, slots=True)
class WatchRow:
    """Target: tell by RowSeen what the server's row is, and each change of it, until GoLive or
    Finish. For speed only: the shell may begin late, or leave it, or give it up at any time.
    """


@dataclass(frozen=True, slots=True)
class Resume:
    """Source: thaw and serve (again) under this row."""

    row: Row
    rev: int


@dataclass(frozen=True, slots=True)
class StartForwarding:
    """Source: what was held and what still comes goes to `node`."""

    node: NodeId
    epoch: int


@dataclass(frozen=True, slots=True)
class DropCopy:
    """Either side: the copy here is not, or no longer, the server."""


@dataclass(frozen=True, slots=True)
class GoLive:
    """Target: execute, but let nothing out."""

    row: Row
    rev: int


@dataclass(frozen=True, slots=True)
class Release:
    """Target: let out what was held back, hold back no more."""

    rev: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The move has ended; at the source the one who asked is answered."""

    result: Result
    reason: str = ""


Action: TypeAlias = (
    Tell
    | SetTimer
    | Reach
    | CheckClass
    | CopyAhead
    | TakeChunk
    | Quiesce
    | EncodeState
    | DecodeState
    | SwapRow
    | ReadRow
    | WatchRow
    | Resume
    | StartForwarding
    | DropCopy
    | GoLive
    | Release
    | Finish
)
