"""One copy of a server, and how what travels of it besides the user's object (`records`) is taken
down and built again.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, TypeAlias

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
from migrate.core.messages import CALL, CAST, EMPTY, Envelope, Message
from migrate.core.records import (
    CheckpointRecord,
    CutRecord,
    DroppedRecord,
    EntryRecord,
    OutgoingRecord,
    PlanRecord,
    SendRecord,
    SessionRecord,
    StateRecord,
    StepRecord,
    TimerRecord,
    Wanted,
)
from migrate.errors import PeerError

if TYPE_CHECKING:
    from migrate.core.standby import Replica

Replays: TypeAlias = "dict[tuple[SessionId, int], deque[StepRecord]]"

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


class Late(list[Envelope]):
    """Envelopes that came while nothing is admitted, in order; `size` is what they take in bytes.

    What is not taken is lost, and comes again.
    """

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 0

    def take(self, env: Envelope, count_max: int, bytes_max: int) -> None:
        """Keep an envelope while there are fewer than the bounds."""
        if len(self) < count_max and self.size < bytes_max:
            self.append(env)
            self.size += len(env.payload)


class Incarnation:
    """A hosted copy: (id, epoch), its mailbox, sessions, timers and its own sending half.

    `host` is the shell's handle (the user's object and how to run it).
    """

    __slots__ = (
        "background",
        "early",
        "early_bytes",
        "forwarding_to",
        "gated",
        "held",
        "holding",
        "host",
        "id",
        "late",
        "limit",
        "mailbox",
        "mailbox_bytes",
        "phase",
        "plans",
        "pump_due",
        "record_bytes",
        "records",
        "reentrant",
        "removal",
        "replica",
        "rev",
        "row",
        "run_no",
        "running",
        "sender",
        "sessions",
        "starting",
        "starved",
        "timers",
        "wanted",
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
        self.mailbox_bytes = 0  # what the arguments in it take
        self.sessions: dict[SessionId, ReceiveSession] = {}
        self.sender = Sender(row.server, row.epoch)
        self.timers: dict[str, TimerState] = {}
        self.plans: dict[str, Plan] = {}  # by url
        self.running: dict[int, Entry] = {}  # by run number; more than one only if re-entrant
        self.run_no = 0
        self.early = 0
        self.early_bytes = 0
        self.records = 0
        self.record_bytes = 0
        self.background = 0  # tasks that handlers started and that still run
        self.removal = Removal.NONE
        self.starved: dict[SessionId, ReceiveSession] = {}
        self.pump_due = False
        self.wanted = Wanted()
        # Its standbys; while `gated`, what would be seen waits for them.
        self.replica: Replica | None = None
        self.gated = False
        # Target before its release: what would be seen waits here.
        self.holding = False
        self.held: list[tuple[NodeId, Message]] = []
        # Source from the freeze to the commit (or roll-back): what arrived meanwhile.
        self.late = Late()
        self.forwarding_to: tuple[NodeId, int] | None = None

    def put(self, entry: Entry) -> None:
        """Put a message last into the mailbox."""
        self.mailbox.append(entry)
        self.mailbox_bytes += entry.size

    def hold_early(self, session: ReceiveSession, entry: Entry) -> None:
        """Keep a message until those before it are there."""
        session.early[entry.seq] = entry
        self.early += 1
        self.early_bytes += entry.size

    def take_early(self, session: ReceiveSession, seq: int) -> Entry:
        """Take an early message out."""
        entry = session.early.pop(seq)
        self.early -= 1
        self.early_bytes -= entry.size
        return entry

    def quiet(self) -> bool:
        """A quiescent point: no hook, no handler and no task that one started is running."""
        return not self.running and self.background == 0 and not self.starting


def _left(deadline_ms: int, now_ms: int) -> int:
    return -1 if deadline_ms == 0 else max(0, deadline_ms - now_ms)


def _deadline(left_ms: int, now_ms: int) -> int:
    return 0 if left_ms < 0 else now_ms + left_ms


def entry_record(entry: Entry, pack: Callable[[object], bytes], now_ms: int) -> EntryRecord:
    """A message of a mailbox as it travels."""
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
        entry.kept,
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


def _session_record(
    session: ReceiveSession,
    expected: int,
    records: dict[int, Record],
    early: Collection[Entry],
    pack: Callable[[object], bytes],
    now_ms: int,
    gone: bool = False,
) -> SessionRecord:
    return SessionRecord(
        session.id,
        session.reply_to,
        expected,
        session.acked_below,
        now_ms - session.heard_ms,
        session.sender_epoch,
        {seq: (record.status, record.payload) for seq, record in records.items()},
        [entry_record(entry, pack, now_ms) for entry in early] if early else [],
        session.ended,
        gone,
    )


def _send_record(session: SendSession, pack: Callable[[object], bytes], now_ms: int) -> SendRecord:
    return SendRecord(
        session.id,
        session.server,
        session.next_seq,
        session.route.node or "",
        session.route.epoch,
        [
            OutgoingRecord(
                out.seq,
                out.kind,
                out.method,
                out.payload if out.payload is not None else pack(out.args),
                out.chain,
                _left(out.deadline_ms, now_ms),
            )
            for out in [*session.outstanding.values(), *session.waiting]
        ],
        session.generation,
        session.chained,
    )


def export(inc: Incarnation, pack: Callable[[object], bytes], now_ms: int) -> StateRecord:
    """Take down everything that travels with the server.

    Args:
        inc: Frozen, at a quiescent point. Not changed.
        pack: Turns live arguments into bytes; may raise what it likes, nothing is lost.
        now_ms: Remaining times count from here.
    """
    return StateRecord(
        limit=inc.limit,
        reentrant=inc.reentrant,
        run_no=inc.run_no,
        mailbox=[
            entry_record(entry, pack, now_ms) for entry in inc.mailbox if entry.kind != QUIESCE
        ],
        sessions=[
            _session_record(it, it.expected, it.records, it.early.values(), pack, now_ms)
            for it in inc.sessions.values()
        ],
        sending=[
            _send_record(session, pack, now_ms)
            for session in [*inc.sender.sessions.values(), *inc.sender.chained.values()]
        ],
        timers=_timer_records(inc, now_ms),
        plans=_plan_records(inc, now_ms),
        met=dict(inc.sender.met),
        wanted=inc.wanted,
        replays=_replays_left(inc),
    )


def _replays_left(inc: Incarnation) -> list[StepRecord]:
    return [step for steps in (inc.sender.replays or {}).values() for step in steps]


class Changes:
    """What of a server changed since the last cut, besides its object."""

    __slots__ = ("answers", "casts", "ended", "records", "sending", "sending_ended", "sessions")

    def __init__(self) -> None:
        self.sessions: dict[SessionId, ReceiveSession] = {}
        self.ended: dict[SessionId, None] = {}
        self.records: dict[tuple[SessionId, int], ReceiveSession] = {}  # results that are new
        self.answers: dict[tuple[SessionId, int], ReceiveSession] = {}  # those of no handler
        self.casts: list[Entry] = []  # admitted
        self.sending: dict[SessionId, SendSession] = {}
        self.sending_ended: dict[SessionId, None] = {}

    def is_empty(self) -> bool:
        """Whether a cut would say nothing new of the server but for its object."""
        return not (self.sessions or self.ended or self.sending or self.sending_ended)


def cut(
    inc: Incarnation, changes: Changes | None, pack: Callable[[object], bytes], now_ms: int
) -> CutRecord:
    """Take down what a standby needs of a server at a quiescent point; it is not changed.

    Args:
        inc: Its copy.
        changes: Since the last cut; None: everything.
        pack: Turns live arguments into bytes.
        now_ms: Remaining times count from here.
    """
    untaken: dict[SessionId, int] = {}
    casts: dict[SessionId, list[Entry]] = {}
    gone: dict[SessionId, ReceiveSession] = {}
    for entry in inc.mailbox:
        session = entry.session
        if session is None:
            continue
        untaken.setdefault(session.id, entry.seq)
        if entry.kind == CAST:
            if inc.sessions.get(session.id) is not session:
                gone[session.id] = session
            if changes is None:
                casts.setdefault(session.id, []).append(entry)
    records: dict[SessionId, dict[int, Record]] = {}
    if changes is None:
        for entry in _kept_early(inc):
            assert entry.session is not None
            casts.setdefault(entry.session.id, []).append(entry)
        sessions = {**inc.sessions, **gone} if gone else inc.sessions
        sending = {**{it.id: it for it in inc.sender.sessions.values()}, **inc.sender.chained}
    else:
        sessions, sending = changes.sessions, changes.sending
        for entry in changes.casts:
            session = entry.session
            assert session is not None
            if entry.seq >= untaken.get(session.id, session.expected):
                casts.setdefault(session.id, []).append(entry)
        for sid in gone.keys() & changes.ended.keys():
            # What was said of its casts goes with the session.
            sessions = {**sessions, sid: gone[sid]}
            casts[sid] = [
                it
                for it in inc.mailbox
                if it.session is not None and it.session.id == sid and it.kind == CAST
            ]
        for (_, seq), session in changes.records.items():
            record = session.records.get(seq)
            if record is not None:
                records.setdefault(session.id, {})[seq] = record
    # On the way of each call: what is not there, as mostly, is not looked for.
    return CutRecord(
        limit=inc.limit,
        reentrant=inc.reentrant,
        run_no=inc.run_no,
        sessions=[
            _session_record(
                session,
                untaken.get(session.id, session.expected),
                session.records if changes is None else records.get(session.id, {}),
                casts.get(session.id, ()),
                pack,
                now_ms,
                inc.sessions.get(session.id) is not session,
            )
            for session in sessions.values()
        ],
        sending=[_send_record(it, pack, now_ms) for it in sending.values()] if sending else [],
        timers=_timer_records(inc, now_ms) if inc.timers else [],
        plans=_plan_records(inc, now_ms) if inc.plans else [],
        met=dict(inc.sender.met),
        wanted=inc.wanted,
        ended=[] if changes is None else list(changes.ended),
        sending_ended=[] if changes is None else list(changes.sending_ended),
        steps=_replays_left(inc) if inc.sender.replays else [],
    )


def cut_for_rollback(inc: Incarnation, pack: Callable[[object], bytes], now_ms: int) -> CutRecord:
    """Take down what a new generation needs: as a checkpoint does, see `CheckpointRecord`."""
    casts: dict[SessionId, tuple[ReceiveSession, list[Entry]]] = {}
    for entry in inc.mailbox:
        if entry.kind == CAST and entry.session is not None:
            casts.setdefault(entry.session.id, (entry.session, []))[1].append(entry)
    for entry in _kept_early(inc):
        assert entry.session is not None
        casts.setdefault(entry.session.id, (entry.session, []))[1].append(entry)
    return CutRecord(
        limit=inc.limit,
        reentrant=inc.reentrant,
        run_no=inc.run_no,
        sessions=[
            _session_record(session, entries[0].seq, {}, entries, pack, now_ms, gone=True)
            for session, entries in casts.values()
        ],
        sending=[],
        timers=_timer_records(inc, now_ms),
        plans=_plan_records(inc, now_ms),
        met=_generations(inc.sender),
        wanted=inc.wanted,
        replaces=True,
    )


def note(changes: Changes, pack: Callable[[object], bytes], now_ms: int) -> list[SessionRecord]:
    """Take out of `changes` what may be told while a handler is running; see `Note`."""
    found: dict[SessionId, tuple[ReceiveSession, dict[int, Record], list[Entry]]] = {}
    for entry in changes.casts:
        session = entry.session
        assert session is not None
        found.setdefault(session.id, (session, {}, []))[2].append(entry)
    for (sid, seq), session in changes.answers.items():
        record = session.records.get(seq)
        if record is not None:
            found.setdefault(sid, (session, {}, []))[1][seq] = record
    changes.casts = []
    changes.answers = {}
    return [
        _session_record(session, 1, records, casts, pack, now_ms)
        for session, records, casts in found.values()
    ]


class Image:
    """What a standby knows of a server besides its object: the cuts and steps so far."""

    __slots__ = ("kept_ms", "last", "sending", "sessions", "steps")

    def __init__(self) -> None:
        self.last: CutRecord | None = None
        self.kept_ms = 0
        self.sessions: dict[SessionId, SessionRecord] = {}
        self.sending: dict[SessionId, SendRecord] = {}
        self.steps: list[StepRecord] = []

    def take(self, record: CutRecord, whole: bool, now_ms: int) -> None:
        """Go on to the next cut."""
        if whole or record.replaces:
            self.sessions.clear()
            self.sending.clear()
        for sid in record.ended:
            self.sessions.pop(sid, None)
        for session in record.sessions:
            known = self.sessions.get(session.id)
            if known is not None:
                session.records = {
                    seq: result
                    for seq, result in {**known.records, **session.records}.items()
                    if seq >= session.acked_below
                }
                session.early = [
                    item for item in known.early if item.seq >= session.expected
                ] + session.early
            self.sessions[session.id] = session
            if session.gone and not session.early:
                del self.sessions[session.id]
        for sid in record.sending_ended:
            self.sending.pop(sid, None)
        for sending in record.sending:
            self.sending[sending.id] = sending
        self.last = record
        self.kept_ms = now_ms
        self.steps = list(record.steps)

    def note(self, sessions: list[SessionRecord]) -> None:
        """Add what was admitted or answered since the last cut."""
        for session in sessions:
            known = self.sessions.get(session.id)
            if known is None:
                # NB: `acked_below` may be past what a failover will find undone.
                self.sessions[session.id] = session
                session.acked_below = 1
                continue
            known.records.update(session.records)
            known.early += [item for item in session.early if item.seq >= known.expected]

    def state(self, server: ServerId, now_ms: int) -> tuple[StateRecord, Replays]:
        """What `restore` builds the server from, and what its handlers have to repeat.

        What was being handled in the middle of a run comes first in the mailbox.
        """
        last = self.last
        assert last is not None
        gone_ms = max(0, now_ms - self.kept_ms)
        replays: Replays = {}
        first: list[EntryRecord] = []
        sending = dict(self.sending)
        # Of what was to be made again when the last cut was taken: what has no number yet.
        waits = [step for step in last.steps if not step.seq and not step.status]
        for place, step in enumerate(self.steps):
            if place < len(last.steps) or not self._is_made_again(step, waits):
                self._take_step(step, sending, replays, first)
        begun = {(item.session, item.seq) for item in first}
        mailbox = list(first)
        sessions: list[SessionRecord] = []
        for session in self.sessions.values():
            early = {item.seq: item for item in session.early}
            if session.gone:
                mailbox += [early[seq] for seq in sorted(early) if (session.id, seq) not in begun]
                continue
            expected = session.expected
            while True:
                if (session.id, expected) in begun:
                    early.pop(expected, None)
                elif expected in early:
                    mailbox.append(early.pop(expected))
                elif expected not in session.records and expected >= session.acked_below:
                    break  # Else it was answered, and nobody asks for it again.
                expected += 1
            sessions.append(
                SessionRecord(
                    session.id,
                    session.reply_to,
                    expected,
                    session.acked_below,
                    session.silent_ms + gone_ms,
                    session.sender_epoch,
                    session.records,
                    list(early.values()),
                    session.ended,
                )
            )
            for item in early.values():
                item.kept = True
        for item in mailbox:
            item.kept = True
        timers = [
            TimerRecord(
                t.method, t.period_ms, 0 if t.queued else max(0, t.left_ms - gone_ms), False
            )
            for t in last.timers
        ]
        plans = [
            PlanRecord(p.url, p.every_ms, p.keep, max(0, p.left_ms - gone_ms)) for p in last.plans
        ]
        record = StateRecord(
            limit=last.limit,
            reentrant=last.reentrant,
            run_no=last.run_no,
            mailbox=mailbox,
            sessions=sessions,
            sending=list(sending.values()),
            timers=timers,
            plans=plans,
            met=last.met,
            wanted=last.wanted,
        )
        return record, replays

    @staticmethod
    def _is_made_again(step: StepRecord, waits: list[StepRecord]) -> bool:
        """Whether a step tells of a request that waits for a number again, and did so before."""
        if step.seq or step.status:
            return False
        for made in waits:
            if (
                (made.entry.session, made.entry.seq) == (step.entry.session, step.entry.seq)
                and (made.server, made.kind, made.method) == (step.server, step.kind, step.method)
                and made.digest == step.digest
            ):
                # The next one like it is another request.
                waits.remove(made)
                made.generation = made.generation or step.generation
                return True
        return False

    @staticmethod
    def _take_step(
        step: StepRecord,
        sending: dict[SessionId, SendRecord],
        replays: Replays,
        first: list[EntryRecord],
    ) -> None:
        item = step.entry
        key = (item.session, item.seq)
        if item.method and key not in replays:
            replays[key] = deque()
            first.append(item)
        if not step.seq:
            replays[key].append(step)
            return
        known = sending.get(step.session)
        if known is None:
            known = SendRecord(
                step.session,
                step.server,
                step.seq,
                step.node,
                step.epoch,
                [],
                step.generation,
                step.chained,
            )
        known.generation = known.generation or step.generation
        if not item.method:
            for steps in replays.values():
                for made in steps:
                    if (made.session, made.seq) == (step.session, step.seq):
                        # Told again when its handler had ended. That one is run again all the same.
                        made.generation = made.generation or step.generation
                        sending[step.session] = known
                        return
            # Nobody makes it again: its number goes as an empty one.
            method = "call" if step.kind == CALL else "cast"
            if any(out.seq == step.seq for out in known.outgoing):
                return
            out = OutgoingRecord(step.seq, EMPTY, method, b"", (), -1)
            known = SendRecord(
                known.id,
                known.server,
                max(known.next_seq, step.seq + 1),
                known.node,
                known.epoch,
                [*known.outgoing, out],
                known.generation,
                known.chained,
            )
        else:
            for made in replays[key]:
                if (made.session, made.seq) == (step.session, step.seq):
                    made.generation = made.generation or step.generation
                    break  # It is made again already, or was told again.
            else:
                replays[key].append(step)
        sending[step.session] = known


def _entry(inc: Incarnation, item: EntryRecord, now_ms: int) -> Entry:
    session = None  # a timer of its own
    if item.session:
        # A cast may outlive its session; it must not be taken for a timer.
        session = inc.sessions.get(item.session) or ReceiveSession(item.session, "", now_ms)
    entry = Entry(
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
    entry.size = len(item.payload)
    entry.kept = item.kept
    return entry


def contradiction(record: StateRecord, server: ServerId) -> str:
    """What in a record no node writes; "" if it could be one that `export` made, or an `Image`.

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
        # NB: after a failover also of requests that come after one that no handler has taken.
        if not all(s.acked_below <= seq < _NUMBER_MAX for seq in s.records):
            return f"session {s.id!r} has results of requests that it has freed"
        if s.expected in s.records or not s.records.keys().isdisjoint(early):
            return f"session {s.id!r} has results of requests that are still to come"
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
            beyond its types. What is in its mailbox is taken, whatever this node's bounds are.
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
            inc.hold_early(session, entry(item))
    for item in record.mailbox:
        admitted = entry(item)
        inc.put(admitted)
        if admitted.session is not None and admitted.kind == CALL:
            admitted.session.pending += 1
    _take_timers(inc, record.timers, now_ms)
    _take_plans(inc, record.plans, now_ms)
    inc.sender.met = dict(record.met)
    inc.wanted = record.wanted or Wanted()
    replays: Replays = {}
    for step in record.replays:
        replays.setdefault((step.entry.session, step.entry.seq), deque()).append(step)
    inc.sender.replays = replays or None
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
        # NB: a record that was put together from cuts may have one of a chain before the ordinary
        # one, whose order what follows has to keep. (Older releases do not say which is which.)
        if not r.chained and r.server not in inc.sender.sessions:
            inc.sender.sessions[r.server] = sending
        else:
            sending.chained = True
            inc.sender.chained[r.id] = sending
    return inc


def _kept_early(inc: Incarnation) -> list[Entry]:
    return [
        entry for session in inc.sessions.values() for entry in session.early.values() if entry.kept
    ]


def checkpoint(inc: Incarnation, pack: Callable[[object], bytes], now_ms: int) -> CheckpointRecord:
    """Take down what a checkpoint holds of a server at a quiescent point; it is not changed.

    Args:
        inc: Its copy.
        pack: Turns live arguments into bytes; may raise what it likes, nothing is lost.
        now_ms: Remaining times count from here.
    """
    return CheckpointRecord(
        run_no=inc.run_no,
        mailbox=[
            entry_record(entry, pack, now_ms)
            for entry in [*inc.mailbox, *_kept_early(inc)]
            if entry.kind == CAST
        ],
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
            inc.put(_entry(inc, item, now_ms))
    if not fork:
        _take_plans(inc, record.plans, now_ms)
        inc.sender.met = dict(record.met)
    return inc
