"""What a move can ask for. The shell performs them in order and returns every result."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias

from migrate.core.directory import Row
from migrate.core.ids import NodeId
from migrate.core.messages import MoveMessage


class Point(enum.Enum):
    """Steps of a move at which tests may kill either side; the names are the fail points."""

    PREPARE_SENT = "prepare_sent"
    PREPARE_RECEIVED = "prepare_received"
    PREPARED = "prepared"
    QUIESCED = "quiesced"
    FINAL_ENCODED = "final_encoded"
    FINAL_HALF_SENT = "final_half_sent"
    FINAL_SENT = "final_sent"
    FINAL_RECEIVED = "final_received"
    READY = "ready"
    READY_RECEIVED = "ready_received"
    SWAP_ASKED = "swap_asked"
    SWAP_DONE = "swap_done"  # in the directory, not yet known to the source's machine
    ACTIVATE_SENT = "activate_sent"
    ACTIVATED = "activated"
    ACTIVATED_RECEIVED = "activated_received"
    COPY_DROPPED = "copy_dropped"
    RELEASED = "released"
    FORWARDING_EXPIRED = "forwarding_expired"


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
class Quiesce:
    """Source: hand out no more messages; answer Quiesced when none is being handled."""


@dataclass(frozen=True, slots=True)
class EncodeState:
    """Source: freeze, and capture object, mailbox, sessions and timers for `version`."""

    version: int


@dataclass(frozen=True, slots=True)
class DecodeState:
    """Target: build the copy from the bytes; nothing of it acts yet."""

    state: bytes
    epoch: int


@dataclass(frozen=True, slots=True)
class SwapRow:
    """Compare-and-swap the server's row: `row` if the revision is still `rev`."""

    row: Row
    rev: int


@dataclass(frozen=True, slots=True)
class ReadRow:
    """Read the server's row."""


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
    | Quiesce
    | EncodeState
    | DecodeState
    | SwapRow
    | ReadRow
    | Resume
    | StartForwarding
    | DropCopy
    | GoLive
    | Release
    | Finish
)
