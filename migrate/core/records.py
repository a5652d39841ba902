"""What of a server travels besides the user's object: plain values, in the order of their fields.

The object itself, and arguments that are still live objects, are turned into bytes by the shell.
"""

from __future__ import annotations

from msgspec import Struct

from migrate.core.directory import Mode
from migrate.core.ids import NodeId, SessionId


class Wanted(Struct, array_like=True, frozen=True):
    """The standbys that a server is to have; whoever owns it sees to that.

    Attributes:
        count: How many, anywhere; 0: those of `names`.
        names: Names of nodes, or none.
        mode: See `Mode`.
        durable: Whether it has a journal.
    """

    count: int = 0
    names: tuple[str, ...] = ()
    mode: Mode = Mode.SYNC
    durable: bool = False


class EntryRecord(Struct, array_like=True):
    """An `Entry` as it travels; `left_ms` is the time it has left (-1: no limit). One that came
    early and is `kept` was acknowledged.
    """

    session: SessionId
    seq: int
    kind: int
    method: str
    payload: bytes
    chain: tuple[str, ...]
    left_ms: int
    trace: str
    kept: bool = False


class SessionRecord(Struct, array_like=True):
    """A `ReceiveSession` as it travels.

    One that is `gone` is none any more: there are casts of it that no handler has taken.
    """

    id: SessionId
    reply_to: NodeId
    expected: int
    acked_below: int
    silent_ms: int
    sender_epoch: int
    records: dict[int, tuple[int, bytes]]
    early: list[EntryRecord]
    ended: bool = False
    gone: bool = False


class OutgoingRecord(Struct, array_like=True):
    """An unsettled `Outgoing` of the server's own; `seq` 0: not yet numbered."""

    seq: int
    kind: int
    method: str
    payload: bytes
    chain: tuple[str, ...]
    left_ms: int


class SendRecord(Struct, array_like=True):
    """A `SendSession` as it travels."""

    id: SessionId
    server: str
    next_seq: int
    node: NodeId
    epoch: int
    outgoing: list[OutgoingRecord]
    generation: int = 0
    chained: bool = False


class TimerRecord(Struct, array_like=True):
    """A `TimerState` as it travels: the remaining time."""

    method: str
    period_ms: int
    left_ms: int
    queued: bool


class PlanRecord(Struct, array_like=True):
    """A `Plan` as it travels: the remaining time."""

    url: str
    every_ms: int
    keep: int
    left_ms: int


class StateRecord(Struct, array_like=True):
    """Everything of a server that travels, but for the user's object.

    `replays`: requests made before a failover that its handlers have yet to make again.
    """

    limit: int
    reentrant: bool
    run_no: int
    mailbox: list[EntryRecord]
    sessions: list[SessionRecord]
    sending: list[SendRecord]
    timers: list[TimerRecord]
    plans: list[PlanRecord] = []
    met: dict[str, int] = {}
    wanted: Wanted | None = None
    replays: list[StepRecord] = []


class DroppedRecord(Struct, array_like=True):
    """A request of the server's own that nobody had acknowledged when a checkpoint was taken."""

    server: str
    kind: int
    method: str


class CheckpointRecord(Struct, array_like=True):
    """What a checkpoint holds of a server, but for the user's object.

    Sessions and completion records belong to a generation that is over when the checkpoint is
    read, so they are not in it. Of the mailbox there are the casts, because each was
    acknowledged, and the server's own timers. The calls are not: none of them was answered, and
    whoever was answered later is told of the roll-back. So a sender has one rule: what was
    acknowledged before the checkpoint holds, what was acknowledged after it does not.
    """

    run_no: int
    mailbox: list[EntryRecord]
    timers: list[TimerRecord]
    plans: list[PlanRecord]
    met: dict[str, int]
    dropped: list[DroppedRecord]


class CutRecord(Struct, array_like=True):
    """What a cut holds, but for the user's object: all, or what changed since the last cut.

    Of the mailbox there are the casts, as early requests of their sessions, because each is
    acknowledged once a standby has it. Calls are repeated by their senders. So `expected` of a
    session here is the first number that no handler has taken. One that `replaces` what was said of
    sessions before is for a new generation. `steps`: see `StateRecord.replays`.
    """

    limit: int
    reentrant: bool
    run_no: int
    sessions: list[SessionRecord]
    sending: list[SendRecord]
    timers: list[TimerRecord]
    plans: list[PlanRecord]
    met: dict[str, int]
    wanted: Wanted | None = None
    ended: list[SessionId] = []
    sending_ended: list[SessionId] = []
    replaces: bool = False
    steps: list[StepRecord] = []


class StepRecord(Struct, array_like=True):
    """A request that a handler makes in the middle of its run, and what is being handled.

    `entry.session` empty and `entry.seq` 0: a timer's message; `method` of the entry empty: it is
    made by no handler, so nobody will make it again. `seq` 0: the request waits for a number; or,
    with a `status` and its `answer`, has come to its end without one.
    """

    entry: EntryRecord
    session: SessionId
    server: str
    seq: int
    kind: int
    method: str
    digest: int
    chained: bool
    generation: int
    node: NodeId
    epoch: int
    status: int = 0
    answer: bytes = b""
