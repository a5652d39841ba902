"""One copy of a server, and what of it travels besides the user's object.

The record that travels is made of plain values; the object itself, and arguments that are
still live objects, are turned into bytes by the shell.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable

from msgspec import Struct

from migrate.core.delivery import (
    QUIESCE,
    Entry,
    Outgoing,
    ReceiveSession,
    Record,
    Route,
    Sender,
    SendSession,
)
from migrate.core.directory import Row
from migrate.core.ids import NodeId, ServerId, SessionId, session_sender
from migrate.core.messages import CALL, CAST, Envelope, Message
from migrate.errors import PeerError

_WINDOW_MAX = 1 << 16
"""What `NodeOptions.window` may be at most."""

_NUMBER_MAX = 1 << 62
"""What is counted stays below this, so that adding to it never leaves the wire's 64 bits."""


class Phase(enum.IntEnum):
    """What a copy does at the moment."""

    STARTING = 0  # spawned, or arrived: its hook runs before the first message
    RUNNING = 1
    QUIESCING = 2  # admits, but hands out nothing
    FROZEN = 3  # admits, acknowledges and fires nothing
    STOPPING = 4  # ends at the next quiescent point


class Removal(enum.Enum):
    """Whether the row of a server that stops was asked to be removed."""

    NONE = enum.auto()
    ASKED = enum.auto()  # for the first time; the result has not come
    IN_DOUBT = enum.auto()  # an attempt had an unknown outcome


class TimerState:
    """A timer of a server: `queued` while its message is in the mailbox (ticks are merged)."""

    __slots__ = ("due_ms", "method", "period_ms", "queued")

    def __init__(self, method: str, period_ms: int, due_ms: int) -> None:
        self.method = method
        self.period_ms = period_ms
        self.due_ms = due_ms
        self.queued = False


class Plan:
    """A checkpoint that is to be taken again and again, to names that begin with `url`."""

    __slots__ = ("due_ms", "every_ms", "keep", "url")

    def __init__(self, url: str, every_ms: int, keep: int, due_ms: int) -> None:
        self.url = url
        self.every_ms = every_ms
        self.keep = keep
        self.due_ms = due_ms


class Incarnation:
    """A hosted copy: (id, epoch), its mailbox, sessions, timers and its own sending half.

    `host` is the shell's handle (the user's object and how to run it).
    """

    __slots__ = (
        "background",
        "early",
        "forwarding_to",
        "held",
        "holding",
        "host",
        "id",
        "late",
        "limit",
        "mailbox",
        "phase",
        "plans",
        "pump_due",
        "record_bytes",
        "records",
        "reentrant",
        "removal",
        "rev",
        "row",
        "run_no",
        "running",
        "sender",
        "sessions",
        "starting",
        "starved",
        "timers",
    )

    def __init__(self, row: Row, rev: int, limit: int, reentrant: bool, host: object) -> None:
        self.row = row
        self.rev = rev
        self.id = row.server
        self.limit = limit
        self.reentrant = reentrant
        self.host = host
        self.phase = Phase.STARTING
        self.starting = True  # the hook before the first message is not over
        self.mailbox: deque[Entry] = deque()
        self.sessions: dict[SessionId, ReceiveSession] = {}
        self.sender = Sender(row.server, row.epoch)
        self.timers: dict[str, TimerState] = {}
        self.plans: dict[str, Plan] = {}  # by url
        self.running: dict[int, Entry] = {}  # by run number; more than one only if re-entrant
        self.run_no = 0
        self.early = 0
        self.records = 0
        self.record_bytes = 0
        self.background = 0  # tasks that handlers started and that still run
        self.removal = Removal.NONE
        self.starved: dict[SessionId, ReceiveSession] = {}
        self.pump_due = False
        # Target before its release: what would be seen waits here.
        self.holding = False
        self.held: list[tuple[NodeId, Message]] = []
        # Source from the freeze to the commit (or roll-back): what arrived meanwhile.
        self.late: list[Envelope] = []
        self.forwarding_to: tuple[NodeId, int] | None = None

    def quiet(self) -> bool:
        """A quiescent point: no hook, no handler and no task that one started is running."""
        return not self.running and self.background == 0 and not self.starting


class EntryRecord(Struct, array_like=True):
    """An `Entry` as it travels; `left_ms` is the time it has left (-1: no limit)."""

    session: SessionId
    seq: int
    kind: int
    method: str
    payload: bytes
    chain: tuple[str, ...]
    left_ms: int
    trace: str


class SessionRecord(Struct, array_like=True):
    """A `ReceiveSession` as it travels."""

    id: SessionId
    reply_to: NodeId
    expected: int
    acked_below: int
    silent_ms: int
    sender_epoch: int
    records: dict[int, tuple[int, bytes]]
    early: list[EntryRecord]
    ended: bool = False


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
    """Everything of a server that travels, but for the user's object."""

    limit: int
    reentrant: bool
    run_no: int
    mailbox: list[EntryRecord]
    sessions: list[SessionRecord]
    sending: list[SendRecord]
    timers: list[TimerRecord]
    plans: list[PlanRecord] = []
    met: dict[str, int] = {}


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


def _left(deadline_ms: int, now_ms: int) -> int:
    return -1 if deadline_ms == 0 else max(0, deadline_ms - now_ms)


def _deadline(left_ms: int, now_ms: int) -> int:
    return 0 if left_ms < 0 else now_ms + left_ms


def _entry_record(entry: Entry, pack: Callable[[object], bytes], now_ms: int) -> EntryRecord:
    payload = entry.payload if entry.payload is not None else pack(entry.args)
    return EntryRecord(
        entry.session.id if entry.session is not None else "",
        entry.seq,
        entry.kind,
        entry.method,
        payload,
        entry.chain,
        _left(entry.deadline_ms, now_ms),
        entry.trace,
    )


def _timer_records(inc: Incarnation, now_ms: int) -> list[TimerRecord]:
    return [
        TimerRecord(t.method, t.period_ms, max(0, t.due_ms - now_ms), t.queued)
        for t in inc.timers.values()
    ]


def _plan_records(inc: Incarnation, now_ms: int) -> list[PlanRecord]:
    return [
        PlanRecord(p.url, p.every_ms, p.keep, max(0, p.due_ms - now_ms)) for p in inc.plans.values()
    ]


def _take_timers(inc: Incarnation, records: list[TimerRecord], now_ms: int) -> None:
    for t in records:
        timer = TimerState(t.method, t.period_ms, now_ms + t.left_ms)
        timer.queued = t.queued
        inc.timers[t.method] = timer


def _take_plans(inc: Incarnation, records: list[PlanRecord], now_ms: int) -> None:
    for p in records:
        inc.plans[p.url] = Plan(p.url, p.every_ms, p.keep, now_ms + p.left_ms)


def export(inc: Incarnation, pack: Callable[[object], bytes], now_ms: int) -> StateRecord:
    """Take down everything that travels with the server.

    Args:
        inc: Frozen, at a quiescent point. Not changed.
        pack: Turns live arguments into bytes; may raise what it likes, nothing is lost.
        now_ms: Remaining times count from here.
    """

    def outgoing_record(out: Outgoing) -> OutgoingRecord:
        payload = out.payload if out.payload is not None else pack(out.args)
        left = _left(out.deadline_ms, now_ms)
        return OutgoingRecord(out.seq, out.kind, out.method, payload, out.chain, left)

    return StateRecord(
        limit=inc.limit,
        reentrant=inc.reentrant,
        run_no=inc.run_no,
        mailbox=[
            _entry_record(entry, pack, now_ms) for entry in inc.mailbox if entry.kind != QUIESCE
        ],
        sessions=[
            SessionRecord(
                session.id,
                session.reply_to,
                session.expected,
                session.acked_below,
                now_ms - session.heard_ms,
                session.sender_epoch,
                {seq: (record.status, record.payload) for seq, record in session.records.items()},
                [_entry_record(entry, pack, now_ms) for entry in session.early.values()],
                session.ended,
            )
            for session in inc.sessions.values()
        ],
        sending=[
            SendRecord(
                session.id,
                session.server,
                session.next_seq,
                session.route.node or "",
                session.route.epoch,
                [outgoing_record(out) for out in session.outstanding.values()]
                + [outgoing_record(out) for out in session.waiting],
                session.generation,
            )
            for session in [*inc.sender.sessions.values(), *inc.sender.chained.values()]
        ],
        timers=_timer_records(inc, now_ms),
        plans=_plan_records(inc, now_ms),
        met=dict(inc.sender.met),
    )


def _entry(inc: Incarnation, item: EntryRecord, now_ms: int) -> Entry:
    session = None  # a timer of its own
    if item.session:
        # A cast may outlive its session; it must not be taken for a timer.
        session = inc.sessions.get(item.session) or ReceiveSession(item.session, "", now_ms)
    return Entry(
        session,
        item.seq,
        item.kind,
        item.method,
        item.payload,
        None,
        item.chain,
        _deadline(item.left_ms, now_ms),
        item.trace,
    )


def contradiction(record: StateRecord, server: ServerId) -> str:
    """What in a record no node writes; "" if it could be one that `export` made.

    A copy keeps counters of what the record holds, and adds to its numbers. This is what they
    rest on; whatever else a peer makes up concerns only the server that it gives away.
    """
    if not (0 < record.limit < _NUMBER_MAX and 0 <= record.run_no < _NUMBER_MAX):
        return "its limit or number of runs is out of range"
    sessions: dict[SessionId, SessionRecord] = {}
    for s in record.sessions:
        early = [item.seq for item in s.early]
        if s.id in sessions or not 1 <= s.acked_below <= s.expected < _NUMBER_MAX:
            return f"session {s.id!r} is there twice, or its numbers cannot be"
        if not all(s.acked_below <= seq < s.expected for seq in s.records):
            return f"session {s.id!r} has results of requests that it has not taken, or has freed"
        if len(set(early)) != len(early) or not all(
            s.expected < item.seq < _NUMBER_MAX and item.session == s.id for item in s.early
        ):
            return f"session {s.id!r} has early requests that are not"
        sessions[s.id] = s
    seen: set[tuple[SessionId, int]] = set()
    for item in record.mailbox:
        place = (item.session, item.seq)
        session = sessions.get(item.session)
        # A cast may outlive its session; timers have none.
        if session is None:
            wrong = bool(item.session) and item.kind != CAST
        else:
            wrong = place in seen or item.seq >= session.expected or item.seq in session.records
        if wrong:
            return f"request {item.seq} of session {item.session!r} is not one that waits"
        seen.add(place)
    sending: set[SessionId] = set()
    for r in record.sending:
        numbers = [out.seq for out in r.outgoing if out.seq]
        if r.id in sending or session_sender(r.id) != server:
            return f"session {r.id!r} is there twice, or is not the server's own"
        if not 1 <= r.next_seq < _NUMBER_MAX or not all(0 < n < r.next_seq for n in numbers):
            return f"session {r.id!r} has requests whose numbers were never given"
        if len(set(numbers)) != len(numbers):
            return f"session {r.id!r} has two requests of one number"
        if numbers and r.next_seq - min(numbers) > _WINDOW_MAX:
            return f"session {r.id!r} has more numbers under way than any window allows"
        sending.add(r.id)
        if not 0 <= r.generation < _NUMBER_MAX:
            return f"session {r.id!r} is of a generation that cannot be"
    for t in record.timers:
        if not (0 < t.period_ms < _NUMBER_MAX and 0 <= t.left_ms < _NUMBER_MAX):
            return f"timer {t.method!r} is never due"
    for p in record.plans:
        if not (0 < p.every_ms < _NUMBER_MAX and 0 <= p.left_ms < _NUMBER_MAX and p.keep > 0):
            return f"the checkpoints to {p.url!r} are never due"
    if not all(0 <= generation < _NUMBER_MAX for generation in record.met.values()):
        return "it has met a generation that cannot be"
    return ""


def restore(
    record: StateRecord,
    row: Row,
    rev: int,
    host: object,
    route_of: Callable[[str, NodeId, int], Route],
    window: int,
    now_ms: int,
) -> Incarnation:
    """Build the copy that `record` describes; it is FROZEN and holds back what it would send.

    Args:
        record: From `export`, possibly from a peer that lies: nothing in it is trusted
            beyond its types.
        row: The row this copy will have if the move commits.
        rev: Its revision, 0 while unknown.
        host: The shell's handle.
        route_of: Gives the core's shared route to a server, created with the hint.
        window: This node's sending window.
        now_ms: Remaining times count from here.

    Raises:
        PeerError: The record contradicts itself.
    """
    wrong = contradiction(record, row.server)
    if wrong:
        raise PeerError(f"the state contradicts itself: {wrong}", server=row.server)
    inc = Incarnation(row, rev, record.limit, record.reentrant, host)
    inc.phase = Phase.FROZEN
    inc.holding = True
    inc.sender.muted = True
    inc.run_no = record.run_no

    def entry(item: EntryRecord) -> Entry:
        return _entry(inc, item, now_ms)

    for s in record.sessions:
        session = ReceiveSession(s.id, s.reply_to, now_ms - s.silent_ms)
        session.expected, session.acked_below = s.expected, s.acked_below
        session.sender_epoch, session.ended = s.sender_epoch, s.ended
        inc.sessions[s.id] = session
        for seq, (status, payload) in s.records.items():
            session.records[seq] = Record(status, payload)
            inc.records += 1
            inc.record_bytes += len(payload)
        for item in s.early:
            session.early[item.seq] = entry(item)
            inc.early += 1
    for item in record.mailbox:
        admitted = entry(item)
        inc.mailbox.append(admitted)
        if admitted.session is not None and admitted.kind == CALL:
            admitted.session.pending += 1
    _take_timers(inc, record.timers, now_ms)
    _take_plans(inc, record.plans, now_ms)
    inc.sender.met = dict(record.met)
    for r in record.sending:
        route = route_of(r.server, r.node, r.epoch)
        sending = SendSession(r.id, r.server, inc.sender, route, window, now_ms)
        sending.next_seq = r.next_seq
        sending.generation = r.generation
        for o in r.outgoing:
            deadline = _deadline(o.left_ms, now_ms)
            out = Outgoing(o.kind, o.method, o.payload, None, o.chain, deadline, None, "")
            out.seq = o.seq
            if o.seq:
                sending.outstanding[o.seq] = out
            else:
                sending.waiting.append(out)
        sending.low = min(sending.outstanding, default=sending.next_seq)
        # Only the ordinary sessions go on; those of a chain end with their chain.
        if r.server not in inc.sender.sessions:
            inc.sender.sessions[r.server] = sending
        else:
            sending.chained = True
            inc.sender.chained[r.id] = sending
    return inc


def checkpoint(inc: Incarnation, pack: Callable[[object], bytes], now_ms: int) -> CheckpointRecord:
    """Take down what a checkpoint holds of a server at a quiescent point; it is not changed.

    Args:
        inc: Its copy.
        pack: Turns live arguments into bytes; may raise what it likes, nothing is lost.
        now_ms: Remaining times count from here.
    """
    return CheckpointRecord(
        run_no=inc.run_no,
        mailbox=[_entry_record(entry, pack, now_ms) for entry in inc.mailbox if entry.kind == CAST],
        timers=_timer_records(inc, now_ms),
        plans=_plan_records(inc, now_ms),
        met=_generations(inc.sender),
        dropped=[
            DroppedRecord(session.server, out.kind, out.method)
            for session in [*inc.sender.sessions.values(), *inc.sender.chained.values()]
            for out in [*session.outstanding.values(), *session.waiting]
        ],
    )


def _generations(sender: Sender) -> dict[str, int]:
    """Which generation of each server a sender knows, by open sessions or closed ones."""
    met = dict(sender.met)
    for session in [*sender.sessions.values(), *sender.chained.values()]:
        if session.generation and session.next_seq > 1:
            met[session.server] = max(met.get(session.server, 0), session.generation)
    return met


def revive(
    record: CheckpointRecord,
    row: Row,
    rev: int,
    limit: int,
    reentrant: bool,
    host: object,
    *,
    fork: bool,
    now_ms: int,
) -> Incarnation:
    """Build the server that a checkpoint describes; it hands out messages once it is started.

    Args:
        record: From `checkpoint`.
        row: Its row as written in the directory.
        rev: The row's revision.
        limit: Messages its mailbox holds.
        reentrant: Whether a call of its own chain runs at once.
        host: The shell's handle.
        fork: It is another server: of the mailbox only its timers go along, it has met
            nobody, and it is not checkpointed where the original is.
        now_ms: Remaining times count from here.
    """
    inc = Incarnation(row, rev, limit, reentrant, host)
    inc.run_no = record.run_no
    _take_timers(inc, record.timers, now_ms)
    for item in record.mailbox:
        if not fork or not item.session:
            inc.mailbox.append(_entry(inc, item, now_ms))
    if not fork:
        _take_plans(inc, record.plans, now_ms)
        inc.sender.met = dict(record.met)
    return inc
