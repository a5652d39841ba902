"""What can happen to a move: messages that arrived, results of actions, time.

Messages of `messages.py` are events as they are. The per-message path (envelopes, replies)
has no event objects; it calls plain methods of `node.py`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from migrate.core.directory import Row
from migrate.core.ids import NodeId


class SwapOutcome(enum.IntEnum):
    """What is known of a compare-and-swap that was asked for."""

    DONE = 0
    REFUSED = 1  # the row is another one; it comes with the event
    NOT_DONE = 2  # it surely did not take effect (the directory could not be reached)
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class SwapResult:
    """Result of a SwapRow. `row` and `rev` are the row as it is now, where known."""

    outcome: SwapOutcome
    row: Row | None
    rev: int
    cause: str = ""


@dataclass(frozen=True, slots=True)
class RowRead:
    """Result of a ReadRow; `known` False: the directory could not be read."""

    known: bool
    row: Row | None
    rev: int


@dataclass(frozen=True, slots=True)
class RowSeen:
    """What a WatchRow showed: the row as it was at one instant, perhaps some time ago."""

    row: Row
    rev: int


@dataclass(frozen=True, slots=True)
class Copied:
    """What a CopyAhead gave.

    Attributes:
        state: The next chunk, opaque here; empty if there was nothing to send.
        round_ended: All of the state has been looked at once more.
        failed: Nothing can be sent ahead (any more); what was is of no use.
    """

    state: bytes
    round_ended: bool
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Taken:
    """A chunk is installed at the target."""


@dataclass(frozen=True, slots=True)
class Quiesced:
    """No handler of the server runs, and none will be started."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The frozen state is ready to be sent: `state` is opaque here."""

    state: bytes


@dataclass(frozen=True, slots=True)
class EncodeFailed:
    """The state could not be captured; `token` lets the shell find the exception again."""

    reason: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """The target can (`refusal` empty) or cannot take the class; its own version of it."""

    version: int
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Decoded:
    """The copy is whole and alive in memory at the target."""


@dataclass(frozen=True, slots=True)
class DecodeFailed:
    """The state could not be loaded at the target."""

    reason: str


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A link to the node came up again; what was sent before may be lost."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class NodeDead:
    """The node's process was seen dead."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The move's one timer is due."""


@dataclass(frozen=True, slots=True)
class Withdraw:
    """This node gives the move up if it still can (it is closing)."""

    reason: str
