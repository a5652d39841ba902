"""The core of a node or client: delivery, hosting, forwarding and moves, composed.

Theory of operation. A `Core` is everything that one process decides. It is fed by the shell
(or by the simulator) through its public methods, each with the time, and acts only through
its `Port`. Nothing here blocks, waits, or looks at a clock. A client is a core that hosts
nothing.

Three roles share it:

* sending: `request` numbers and sends, `_on_reply` and `_on_receipt` settle; routes say where a
  server is believed to be, and are corrected by Moved, NotHere and the directory;
* hosting: `_arrive` admits envelopes in order, `_pump` hands them to the shell one at a time,
  `finish` records and answers;
* moving: `move.py` decides, this module applies its actions to the hosted copy;
* going back in time: `quiesce` keeps a server at a quiescent point, in front of what waits in
  its mailbox, while the shell takes its state or gets ready to replace it; `restored` hosts a
  new generation. A session belongs to one generation, that of the epoch its sender knew when it
  first sent (`_bind`); the owner of a later one answers ROLLED_BACK, which ends the session.

Local calls take the same path with the same numbers, but no bytes: a server may leave in the
middle of them, and then the numbers are what makes them exactly-once.

Messages to this very node (a local sender of a copy that answers by message) go through
`_loopback` and are handled before a public method returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from migrate.core import directory
from migrate.core.actions import (
    Action,
    DecodeState,
    DropCopy,
    EncodeState,
    Finish,
    GoLive,
    Point,
    Quiesce,
    Reach,
    Release,
    Result,
    Resume,
    SetTimer,
    StartForwarding,
    Tell,
)
from migrate.core.clock import SharedClock
from migrate.core.delivery import (
    NEVER,
    QUIESCE,
    Entry,
    Outgoing,
    ReceiveSession,
    Record,
    Route,
    Sender,
    SendSession,
    may_open,
)
from migrate.core.directory import Row, RowState
from migrate.core.events import (
    DecodeFailed,
    NodeDead,
    PeerUp,
    Quiesced,
    SwapOutcome,
    TimerFired,
    Withdraw,
)
from migrate.core.forwarding import HOPS_MAX, Forwarding
from migrate.core.ids import (
    EPOCH_SHIFT,
    NodeId,
    ServerId,
    SessionId,
    TransferId,
    number,
    session_epoch,
    session_id,
    session_sender,
)
from migrate.core.incarnation import (
    Incarnation,
    Late,
    Phase,
    Plan,
    Removal,
    TimerState,
    checkpoint,
    export,
    restore,
    revive,
)
from migrate.core.messages import (
    CALL,
    CAST,
    CLOSED,
    CYCLE,
    DIVERGED,
    EMPTY,
    ERROR,
    EXPIRED,
    FORGOTTEN,
    FULL,
    LOST,
    NOT_FOUND,
    OK,
    PROBE,
    REFUSED,
    ROLLED_BACK,
    STOPPED,
    TIMED_OUT,
    WITHDRAWN,
    Acked,
    Chunk,
    ChunkTaken,
    Cut,
    Envelope,
    Follow,
    Following,
    FollowRefused,
    KeepRefused,
    Kept,
    Message,
    Moved,
    MoveMessage,
    Note,
    NotHere,
    Prepare,
    Receipt,
    Reply,
    Step,
    Unfollow,
    WaitProbe,
)
from migrate.core.move import (
    Happening,
    MoveTimes,
    SourceMove,
    SourcePhase,
    TargetMove,
    TargetPhase,
    answer_unknown,
)
from migrate.core.records import CheckpointRecord, StateRecord, StepRecord, Wanted
from migrate.core.standby import JOURNAL, Replica, StandbyPort, Standbys, StandbyTimes
from migrate.core.timers import Timers

PUMP_MAX = 512
"""Messages handed out in one go before others get their turn on the loop, if the shell does not
say sooner, by `crowded`, that it needs one."""

GRACE_MS = 1_000
"""How long a withdrawn request waits for the owner's word that it was not done."""

HURRIED_MAX = 3
"""How often one request is sent again at once, between two repeats in its turn, because its server
does not have it though it was said to."""

LAST_WORD_MS = 10_000
"""How long after a process was seen dead what it asked of the directory may still come through. It
waits for a directory that is busy or away, and so do those who read the rows after it."""

LOOK_UP_FIRST_MS = 5
LOOK_UP_MAX_MS = 500
DEAD_MAX = 10_000
"""Dead nodes that are remembered; ids are never reused, so forgetting costs a look-up."""

PATH_MAX = 64
"""Longest chain of waits that a probe follows."""


@dataclass(frozen=True, slots=True)
class CoreOptions:
    """Limits and waits of a core; milliseconds where the name says so."""

    window: int = 1024
    repeat_first_ms: int = 1_000
    repeat_max_ms: int = 5_000
    ack_idle_ms: int = 500
    session_expiry_ms: int = 300_000
    sessions_max: int = 10_000
    records_max: int = 100_000
    record_bytes_max: int = 64 << 20
    mailbox_bytes_max: int = 64 << 20
    tombstone_ms: int = 300_000
    tombstones_max: int = 10_000
    forwarding_expiry_ms: int = 300_000
    forwarding_max: int = 100_000
    late_max: int = 100_000
    probe_ms: int = 100
    moves_max: int = 64
    moves_in_max: int = 256
    move: MoveTimes = field(default_factory=MoveTimes)
    standby: StandbyTimes = field(default_factory=StandbyTimes)


class Port(StandbyPort, Protocol):
    """What a core acts through. Every method returns at once; none calls the core back."""

    def send(self, node: NodeId, message: Message) -> None:
        """Send; may lose it."""

    def run(self, inc: Incarnation, entry: Entry) -> tuple[int, bytes | None, object] | None:
        """Run a handler: its (status, payload, value) if it is over, None: `finish` follows."""

    def resolve(self, token: object, status: int, payload: bytes | None, value: object) -> None:
        """Give the result to whoever made the request."""

    def pack(self, args: object) -> bytes:
        """Live arguments as bytes; they were shown to be packable when the call was made."""

    def size(self, inc: Incarnation, args: object) -> int:
        """About how many bytes live arguments take in memory, while they wait for a server."""

    def pack_result(self, status: int, value: object) -> tuple[int, bytes]:
        """A live result as bytes; a result that cannot travel becomes an error."""

    def look_up(self, server: ServerId) -> None:
        """Read the server's row; `located` follows."""

    def look_up_senders(self, servers: list[ServerId]) -> None:
        """Find out which of these servers have no row any more, or one that says LOST, or that
        they went back in time; `senders_gone` follows.
        """

    def wake_at(self, due_ms: int) -> None:
        """Call `tick` at that time (earlier is harmless); replaces a later wish only."""

    def pump_later(self, inc: Incarnation) -> None:
        """Call `pump` in the next turn."""

    def perform(self, transfer: TransferId, incoming: bool, action: Action) -> None:
        """A move's action that is not the core's own to apply."""

    def stopped(self, inc: Incarnation) -> None:
        """A server that was asked to stop is at its last quiescent point: remove its row.

        `removal_ended` follows each attempt.
        """

    def quiesced(self, inc: Incarnation, entry: Entry) -> None:
        """A server that `quiesce` was asked for stays at a quiescent point until `finish`.

        `entry.args` is what was given to `quiesce`.
        """

    def not_quiesced(self, token: object) -> None:
        """It will not be: the server is gone from here."""

    def checkpoint_due(self, inc: Incarnation, plan: Plan) -> None:
        """One of the checkpoints that are taken again and again is due."""


@dataclass(slots=True)
class Tombstone:
    """What answers late repeats after a stop: the records, until `until_ms`."""

    sessions: dict[SessionId, ReceiveSession]
    until_ms: int
    epoch: int


def _no_hurry() -> None:
    """What is sent leaves when the core's public method has returned."""


class Core:
    """See the module's text. All public methods take `now_ms`, which never goes back."""

    def __init__(self, node: NodeId, port: Port, options: CoreOptions, now_ms: int) -> None:
        self.node = node
        self.port = port
        self.options = options
        self._reopen_ms = options.session_expiry_ms // 4
        self.own = Sender(node)
        self.clock = SharedClock()
        self.hosted: dict[ServerId, Incarnation] = {}
        self.sending: dict[SessionId, SendSession] = {}
        self.routes: dict[ServerId, Route] = {}
        self.forwarding = Forwarding(options.forwarding_expiry_ms, options.forwarding_max)
        self.tombstones: dict[ServerId, Tombstone] = {}
        self.dead: dict[NodeId, None] = {}
        self.moves_out: dict[TransferId, SourceMove] = {}
        self.moves_in: dict[TransferId, TargetMove] = {}
        self.leaving: dict[ServerId, TransferId] = {}
        self.arriving: dict[ServerId, TransferId] = {}
        self.copies: dict[TransferId, Incarnation] = {}
        self.refuse_moves = ""  # why this node takes no servers in; empty: it does
        self.timers = Timers()
        self.waits: dict[str, dict[Outgoing, SendSession]] = {}
        self._queue: deque[SourceMove] = deque()
        self.delayed: dict[ServerId, SourceMove] = {}  # until the row names its standbys
        self._knocking: dict[ServerId, Late] = {}
        self._idle: dict[SessionId, SendSession] = {}
        self._receipts: dict[SessionId, tuple[Incarnation, ReceiveSession]] = {}
        self._loopback: deque[Message] = deque()
        self._session_n = 0
        self._depth = 0  # above 0 inside a handler or a loop that hands out messages
        self._pumping: Incarnation | None = None
        # Called after each message of a move: a server stands still until it has arrived.
        self.hurry: Callable[[], None] = _no_hurry
        self.standbys = Standbys(self, port, options.standby)
        self.marks = True  # whether `Port.perform` wants to hear of each step of a move
        self.crowded = False  # the loop needs a turn: hand out nothing on this stack
        self._wake_ms = NEVER
        self.set_timer(("sweep",), now_ms + self._sweep_ms())

    # ------------------------------------------------------------------ time

    def _sweep_ms(self) -> int:
        return max(1_000, self.options.session_expiry_ms // 10)

    def set_timer(self, key: tuple[str, ...], due_ms: int) -> None:
        """Have `_fire` called with a key at that time; it replaces what the key was set to."""
        self.timers.set(key, due_ms)
        if due_ms < self._wake_ms:
            self._wake_ms = due_ms
            self.port.wake_at(due_ms)

    def cancel_timer(self, key: tuple[str, ...]) -> None:
        """Forget a timer; nothing happens if it is not set."""
        self.timers.cancel(key)

    def tick(self, now_ms: int) -> None:
        """Do what is due."""
        self._wake_ms = NEVER
        while True:
            key = self.timers.pop_due(now_ms)
            if key is None:
                break
            self._fire(key, now_ms)  # type: ignore[arg-type]
        self.flush(now_ms)
        due = self.timers.next_ms()
        if due is not None and due < self._wake_ms:
            self._wake_ms = due
            self.port.wake_at(due)

    def _fire(self, key: tuple[str, ...], now_ms: int) -> None:
        match key:
            case ("repeat", session):
                sending = self.sending.get(session)
                if sending is not None:
                    self._repeat(sending, now_ms)
            case ("deadline", session):
                sending = self.sending.get(session)
                if sending is not None:
                    self._expire(sending, now_ms)
            case ("acks",):
                self._tell_acks()
            case ("tick", server, method):
                self._tick_server(server, method, now_ms)
            case ("plan", server, url):
                self._plan_due(server, url, now_ms)
            case ("look", server):
                route = self.routes.get(server)
                if route is not None and route.node is None and route.looking:
                    self.port.look_up(server)
            case ("probe", run):
                self._probe(run, now_ms)
            case ("delayed", server):
                self._delayed_too_long(server)
            case ("out", transfer):
                source = self.moves_out.get(transfer)
                if source is not None:
                    self._apply_source(source, source.handle(TimerFired(), now_ms), now_ms)
            case ("in", transfer):
                target = self.moves_in.get(transfer)
                if target is not None:
                    self._apply_target(target, target.handle(TimerFired(), now_ms), now_ms)
            case ("standby", server):
                self.standbys.owner_timer(server, now_ms)
            case ("cut", server):
                self.standbys.cut_due(server, now_ms)
            case ("claim", server):
                self.standbys.claim_timer(server, now_ms)
            case ("oust", stream):
                self.standbys.oust_timer(stream, now_ms)
            case ("sweep",):
                self._sweep(now_ms)
                self.set_timer(("sweep",), now_ms + self._sweep_ms())

    def _sweep(self, now_ms: int) -> None:
        if self.forwarding.expire(now_ms):
            self.port.perform("", False, Reach(Point.FORWARDING_EXPIRED))
        while self.tombstones:
            server = next(iter(self.tombstones))
            if self.tombstones[server].until_ms > now_ms:
                break
            del self.tombstones[server]
        self.standbys.sweep(now_ms)
        servers: dict[ServerId, None] = {}
        for inc in self.hosted.values():
            if inc.starved and not inc.mailbox and inc.phase is not Phase.FROZEN:
                # They may be sending smaller ones by now, or nothing.
                for session in inc.starved.values():
                    session.refused_bytes = 0
                self._grant(inc)
            for session in self._silent_sessions(inc, now_ms):
                sender = session_sender(session.id)
                if "@" in sender or session.ended:
                    self._end_session(inc, session)
                else:
                    servers[sender] = None
                    # Its last word may have been lost; a sender that has closed the session
                    # says it again when it hears of it.
                    where = self._present_place(sender, session.reply_to)
                    self._tell(inc, where, self._receipt(inc, session))
        if servers:
            # A server's session ends with its row, not with its silence.
            self.port.look_up_senders(list(servers))
        for route in [r for r in self.routes.values() if not r.sessions]:
            del self.routes[route.server]
        for sending in [s for s in self.sending.values() if s.idle() and not s.sender.muted]:
            if sending.low > 1 and sending.route.node not in (None, self.node):
                # Said again: the last time may have been lost with a link.
                sending.acked_told = 0
                self.settled(sending, now_ms)
            if now_ms - sending.last_used_ms > self.options.session_expiry_ms // 4:
                self._close_session(sending)

    def _present_place(self, sender: ServerId, last: NodeId) -> NodeId:
        """Where a server that sent from a node is now, if that node is dead and this is known."""
        if sender in self.hosted:
            return self.node
        route = self.routes.get(sender)
        if last in self.dead and route is not None and route.node is not None:
            return route.node
        return last

    def _silent_sessions(self, inc: Incarnation, now_ms: int) -> list[ReceiveSession]:
        if inc.phase is Phase.FROZEN:
            return []
        expiry = self.options.session_expiry_ms
        return [
            session
            for session in inc.sessions.values()
            if not session.pending
            and (
                now_ms - session.heard_ms > expiry
                or (session.ended and not may_open(session.id, self.clock, now_ms, expiry))
            )
        ]

    def senders_gone(self, senders: dict[ServerId, int], now_ms: int) -> None:
        """The answer to `Port.look_up_senders`.

        Args:
            senders: The generation of those that have one, and thus sessions of older ones that
                nobody will go on with; NEVER for those that have no row any more, or are lost.
            now_ms: The time.
        """
        for inc in self.hosted.values():
            for session in self._silent_sessions(inc, now_ms):
                generation = senders.get(session_sender(session.id), 0)
                if session_epoch(session.id) < generation:
                    self._end_session(inc, session)

    # ------------------------------------------------------------------ sending

    def _route(self, server: ServerId) -> Route:
        """The one route to a server that all sessions here share."""
        route = self.routes.get(server)
        if route is None:
            route = self.routes[server] = Route(server)
        return route

    def route_hint(self, server: ServerId, node: NodeId, epoch: int) -> Route:
        """The shared route to a server, improved by what a ref or a record says."""
        route = self._route(server)
        if node and epoch > route.epoch and node not in self.dead:
            route.epoch = epoch
            if not route.looking:
                route.node = node
        return route

    def open_session(self, sender: Sender, server: ServerId, now_ms: int) -> SendSession:
        """A new session of `sender` to `server`."""
        self._session_n += 1
        route = self._route(server)
        # The epoch keeps apart what two nodes open for one server in the same millisecond.
        born_ms = self.clock.now(now_ms)
        sid = session_id(sender.id, born_ms, (sender.epoch << EPOCH_SHIFT) + self._session_n)
        session = SendSession(sid, server, sender, route, self.options.window, now_ms)
        self.sending[sid] = session
        route.sessions[sid] = session
        return session

    def _close_session(self, session: SendSession) -> None:
        """Forget an idle session, and tell the owner that it may too."""
        node = self._told_at(session)
        if session.next_seq > 1 and node is not None:
            self.send(node, Acked(session.id, session.server, session.next_seq, True))
        self._drop_sending(session)

    def _told_at(self, session: SendSession) -> NodeId | None:
        """Where the owner of a session's records is told that they are not awaited any more."""
        here = self.hosted.get(session.server)
        if here is None:
            return session.route.node
        # NB: what is answered here is not recorded, unless somebody may ask for it again.
        return self.node if here.replica is not None or session.sender.gate is not None else None

    def _drop_sending(self, session: SendSession, status: int = 0, answer: bytes = b"") -> None:
        """End a session; `status` and `answer`: what became of all that was asked for in it."""
        if session.sender.replays is not None and status:
            session.sender.over[session.id] = status, answer
        if session.sender.gate is not None:
            changes = session.sender.gate.changes
            changes.sending.pop(session.id, None)
            changes.sending_ended[session.id] = None
        if session.generation and session.next_seq > 1:
            session.sender.remember(session.server, session.generation)
        self.sending.pop(session.id, None)
        self._idle.pop(session.id, None)
        session.route.sessions.pop(session.id, None)
        if session.sender.sessions.get(session.server) is session:
            del session.sender.sessions[session.server]
        session.sender.chained.pop(session.id, None)
        self.timers.cancel(("repeat", session.id))
        self.timers.cancel(("deadline", session.id))

    def request(
        self,
        sender: Sender,
        server: ServerId,
        out: Outgoing,
        now_ms: int,
        *,
        wait: bool = True,
    ) -> SendSession | None:
        """Make a request.

        Args:
            sender: Who makes it.
            server: Whom it is for.
            out: The request, not yet numbered.
            now_ms: The time.
            wait: Whether it may wait un-numbered for room in the window.

        Returns:
            Its session, or None if there is no room and `wait` is False: then nothing was
            done. The result comes by `Port.resolve`, perhaps before this returns.
        """
        session = sender.sessions.get(server)
        if sender.replays and out.run and self._replay(sender, server, out, now_ms):
            return sender.sessions.get(server) or self.open_session(sender, server, now_ms)
        if out.chain and out.kind == CALL and self._in_chain(server, out.chain):
            session = self._chained(sender, server, now_ms)
        elif session is None:
            session = sender.sessions[server] = self.open_session(sender, server, now_ms)
        elif (
            now_ms - session.last_used_ms > self._reopen_ms
            and session.idle()
            and session.told_low() == session.next_seq
        ):
            # The owner may forget an idle session; a fresh one cannot be mistaken for it.
            self._close_session(session)
            session = sender.sessions[server] = self.open_session(sender, server, now_ms)
        session.last_used_ms = now_ms
        if not wait:
            out.wait = False
        if session.waiting or (session.outstanding and not session.has_room()):
            if not wait:
                return None
            session.waiting.append(out)
            if sender.gate is not None:
                sender.gate.changes.sending[session.id] = session
                self.standbys.unnumbered(session, out, now_ms)
        else:
            # As `number` does.
            seq = out.seq = session.next_seq
            session.next_seq = seq + 1
            session.outstanding[seq] = out
            gate = sender.gate
            if gate is not None:
                self.standbys.step(session, out, now_ms)
            inc = self.hosted.get(server)
            if inc is None or inc.phase is Phase.FROZEN or gate is not None or sender.muted:
                self.dispatch(session, out, now_ms)
            else:
                # As `dispatch` does.
                out.sent_ms = now_ms
                self._arrive_local(inc, session, out, now_ms)
        if out.token is not None:
            self._wait_for(session, out, now_ms)
        if self._loopback or self._receipts or self.standbys.due:
            self.flush(now_ms)
        return session

    def _wait_for(self, session: SendSession, out: Outgoing, now_ms: int) -> None:
        """Mind the deadline of a request, and probe along the wait of the handler that makes it."""
        deadline = out.deadline_ms
        if deadline and deadline < session.deadline_ms:
            session.deadline_ms = deadline
            self.set_timer(("deadline", session.id), deadline)
        if out.run and out.kind == CALL and (out.seq == 0 or out.seq in session.outstanding):
            waits = self.waits.get(out.run)
            if waits is None:
                self.waits[out.run] = {out: session}
                self.set_timer(("probe", out.run), now_ms + self.options.probe_ms)
            else:
                waits[out] = session

    def _replay(self, sender: Sender, server: ServerId, out: Outgoing, now_ms: int) -> bool:
        """A handler that a failover broke off makes a request again: under the number it had.

        Returns:
            False if it had not come as far, so that the request is a new one.
        """
        inc = self.hosted.get(sender.id)
        entry = inc.running.get(self.run_number(out.run)) if inc is not None else None
        if entry is None or sender.replays is None:
            return False
        steps = sender.replays.get(entry.key())
        if steps is None or (not steps and not entry.diverged):
            return False
        if out.payload is None:
            out.payload = self.port.pack(out.args)
        step = None if entry.diverged else self._made_before(steps, server, out)
        if step is None:
            entry.diverged = True
            self._resolve(out, DIVERGED, b"", None)
            return True
        if not step.seq:
            if step.status and step.status != CLOSED:
                self._resolve(out, step.status, step.answer, False)
            # One that its handler has given up is given up again.
            return step.status != 0
        # It may have been withdrawn, when its time was over, before the failover.
        out.withdrawn = EXPIRED
        session = self._repeated_number(step, out)
        if session is None:
            # Its server was lost, or went back in time, and may have done it: it is never asked
            # anew, however well that would go with what is there now.
            status, answer = sender.over.get(step.session, (FORGOTTEN, b""))
            self._resolve(out, status, answer, True)
            return True
        out.wait = True
        if sender.gate is not None:
            self.standbys.step(session, out, now_ms)
        self.dispatch(session, out, now_ms)
        if out.token is not None:
            self._wait_for(session, out, now_ms)
        return True

    def _made_before(
        self, steps: deque[StepRecord], server: ServerId, out: Outgoing
    ) -> StepRecord | None:
        """Take what is known of a request out of what its handler had made before a failover.

        They come in the order in which they were made. One that had to wait for its number is told
        of when it is made, and once more when it gets it, or ends without it. One whose session is
        over, because its server was lost, was made anew by an earlier failover: that one counts.

        Returns:
            The record with its number, or with how it ended; without both if it was waiting still;
            None if the handler makes another request than before.
        """

        def counts(step: StepRecord) -> bool:
            return bool(step.status or (step.seq and step.session in self.sending))

        for made in steps:
            if self._is_same(made, server, out):
                break
            if counts(made):
                return None
        else:
            return None
        steps.remove(made)
        if not counts(made):
            for became in steps:
                if counts(became) and self._is_same(became, server, out):
                    steps.remove(became)
                    return became
        return made

    def _is_same(self, step: StepRecord, server: ServerId, out: Outgoing) -> bool:
        payload = out.payload or b""
        return (
            step.server == server
            and step.kind == out.kind
            and step.method == out.method
            and (not step.digest or step.digest == self.port.digest(payload))
        )

    def _repeated_number(self, step: StepRecord, out: Outgoing) -> SendSession | None:
        session = self.sending.get(step.session)
        if session is None:
            return None  # its server has gone back in time since, or is gone
        session.generation = session.generation or step.generation
        out.seq = step.seq
        session.outstanding[step.seq] = out
        session.next_seq = max(session.next_seq, step.seq + 1)
        return session

    def _replayed(self, inc: Incarnation, entry: Entry, status: int, now_ms: int) -> int:
        """A handler has ended; had it made requests before a failover that it did not make again?

        Their numbers were used, so they go as empty ones.
        """
        assert inc.sender.replays is not None
        left = inc.sender.replays.pop(entry.key(), None)
        if not inc.sender.replays:
            inc.sender.replays = None
            inc.sender.over.clear()
        for step in left or ():
            method = "call" if step.kind == CALL else "cast"
            out = Outgoing(EMPTY, method, b"", None, (), 0, None, "")
            out.withdrawn = CLOSED
            session = self._repeated_number(step, out) if step.seq else None
            if session is not None:
                entry.diverged = True
                if inc.sender.gate is not None:
                    self.standbys.step(session, out, now_ms)
                self.dispatch(session, out, now_ms)
        return DIVERGED if entry.diverged else status

    @staticmethod
    def run_number(run: str) -> int:
        """The number in the name of a run; 0 if it is malformed."""
        return number(run.rpartition("/")[2]) or 0

    def _chained(self, sender: Sender, server: ServerId, now_ms: int) -> SendSession:
        """A session for a re-entrant call: one of its own that nothing is outstanding in.

        They are used again, so that there are no more of them than such calls at a time.
        """
        oldest = now_ms - self.options.session_expiry_ms // 4
        for session in sender.chained.values():
            if session.server == server and session.idle() and session.last_used_ms >= oldest:
                return session
        session = self.open_session(sender, server, now_ms)
        session.chained = True
        sender.chained[session.id] = session
        return session

    @staticmethod
    def _in_chain(server: ServerId, chain: tuple[str, ...]) -> bool:
        prefix = server + "/"
        return any(run.startswith(prefix) for run in chain)

    def dispatch(self, session: SendSession, out: Outgoing, now_ms: int) -> None:
        """Send a numbered request to where its server is believed to be."""
        sender = session.sender
        if sender.muted or (sender.gate is not None and out.leaves > sender.gate.acked):
            return
        inc = self.hosted.get(session.server)
        if inc is not None:
            if inc.phase is not Phase.FROZEN:
                if sender.gate is not None and not session.generation:
                    self._bind_gated(session, out, inc.row.epoch, now_ms)
                    return
                out.sent_ms = now_ms
                self._arrive_local(inc, session, out, now_ms)
                return
            if inc.forwarding_to is None:
                # It goes out (or in) when the move has ended.
                self._arm_repeat(session, now_ms)
                return
        route = session.route
        if route.node is None:
            if route.looking:
                return
            gone = self.forwarding.get(session.server, now_ms)
            if gone is None or gone[1] <= route.epoch:
                self._look(route, now_ms)
                return
            route.node, route.epoch = gone
        if sender.gate is not None and not session.generation and route.node != self.node:
            self._bind_gated(session, out, route.epoch, now_ms)
            return
        self._transmit(session, out, route.node, now_ms)

    def _bind_gated(self, session: SendSession, out: Outgoing, epoch: int, now_ms: int) -> None:
        """Nothing of a session leaves before the sender's standbys know what it is bound to: else
        one that takes over might ask a later generation for what an earlier one has done.
        """
        self.bind(session, epoch)
        self.standbys.bound(session, out, now_ms)

    def _transmit(self, session: SendSession, out: Outgoing, node: NodeId, now_ms: int) -> None:
        if node == self.node or node in self.dead:
            # Believed to be here, and is not, or where nobody is: only the directory can tell.
            self._look(session.route, now_ms)
            return
        payload = out.payload
        if payload is None:
            payload = out.payload = self.port.pack(out.args)
        out.sent_ms = now_ms
        out.sent_epoch = session.route.epoch
        low = session.told_low()
        session.acked_told = low
        deadline = out.deadline_ms
        self.port.send(
            node,
            Envelope(
                session.server,
                session.id,
                out.seq,
                low,
                PROBE if out.admitted and out.kind == CALL else out.kind,
                out.method,
                b"" if out.admitted and out.kind == CALL else payload,
                max(1, deadline - now_ms) if deadline else 0,
                self.node,
                session.route.epoch,
                session.sender.epoch,
                session.generation or self.bind(session, session.route.epoch),
                0,
                out.chain,
            ),
        )
        if not session.repeat_armed:
            self._arm_repeat(session, now_ms)

    @staticmethod
    def bind(session: SendSession, epoch: int) -> int:
        """Decide which generation a session is meant for: the one its sender has met, if it has.

        Otherwise that of the epoch at which the server is believed to be where this goes.
        """
        session.generation = session.sender.met.get(session.server, 0) or epoch
        return session.generation

    def _arm_repeat(self, session: SendSession, now_ms: int) -> None:
        if not session.repeat_armed:
            session.repeat_armed = True
            session.repeats = 0
            self.set_timer(("repeat", session.id), now_ms + self.options.repeat_first_ms)

    def _repeat(self, session: SendSession, now_ms: int) -> None:
        """Send again what has been without an answer for long."""
        session.repeat_armed = False
        if not session.outstanding:
            return
        session.lift()
        first, most = self.options.repeat_first_ms, self.options.repeat_max_ms
        wait = min(most, first << min(session.repeats, 8))
        again = [
            out
            for out in session.outstanding.values()
            if now_ms - out.sent_ms >= wait and (out.seq < session.grant or out.seq == session.low)
        ]
        session.repeat_armed = True
        session.repeats = session.repeats + 1 if again else 0
        wait = min(most, first << min(session.repeats, 8))
        self.set_timer(("repeat", session.id), now_ms + wait)
        for out in again:
            out.hurried = 0
            if out.seq in session.outstanding:
                self.dispatch(session, out, now_ms)
        route = session.route
        if session.repeats > 1 and route.node is not None and not route.looking:
            # Silence: the node may be paused, and the server long elsewhere. It is still asked
            # meanwhile, so that a directory that is away does no harm.
            route.looking = True
            self.port.look_up(route.server)

    def _expire(self, session: SendSession, now_ms: int) -> None:
        """Settle what is past its deadline, as far as the waiting side is concerned."""
        session.deadline_ms = NEVER
        nearest = NEVER
        for out in [*session.outstanding.values(), *session.waiting]:
            deadline = out.deadline_ms
            if not deadline or out.token is None:
                continue
            if deadline > now_ms:
                nearest = min(nearest, deadline)
                continue
            if out.seq == 0:
                session.waiting.remove(out)
                self.standbys.unnumbered(session, out, now_ms, FULL)
                self._resolve(out, FULL, b"", None)
            elif out.kind != EMPTY and (out.seq >= session.grant or out.sent_ms < 0):
                # Refused so far, or never sent: the number goes as an empty one, and the
                # owner's word that it took it so proves that nothing was done.
                self._withdraw(session, out, FULL if out.seq >= session.grant else EXPIRED)
                out.deadline_ms = now_ms + GRACE_MS
                nearest = min(nearest, out.deadline_ms)
                self.dispatch(session, out, now_ms)
            else:
                self._resolve(out, TIMED_OUT, b"", out.sent_ms >= 0)
        if nearest < session.deadline_ms:
            session.deadline_ms = nearest
            self.set_timer(("deadline", session.id), nearest)

    @staticmethod
    def _withdraw(session: SendSession, out: Outgoing, status: int) -> None:
        out.method = "call" if out.kind == CALL else "cast"
        out.kind = EMPTY
        out.payload = b""
        out.args = None
        out.withdrawn = status
        out.admitted = False

    def _resolve(self, out: Outgoing, status: int, payload: bytes | None, value: object) -> None:
        token = out.token
        if out.run:
            waits = self.waits.get(out.run)
            if waits is not None and waits.pop(out, None) is not None and not waits:
                del self.waits[out.run]
                self.timers.cancel(("probe", out.run))
        if token is not None:
            out.token = None
            self.port.resolve(token, status, payload, value)

    def cancel(self, session: SendSession, out: Outgoing, now_ms: int) -> None:
        """Nobody waits for `out` any more. Its number, if it has one, is used up."""
        out.token = None
        self._resolve(out, CLOSED, b"", None)
        if out.seq == 0:
            if out in session.waiting:
                session.waiting.remove(out)
                self.standbys.unnumbered(session, out, now_ms, CLOSED)
        elif out.seq in session.outstanding and out.sent_ms < 0 and out.kind != EMPTY:
            self._withdraw(session, out, CLOSED)

    def _refill(self, session: SendSession, now_ms: int) -> None:
        waiting = session.waiting
        session.lift()
        while waiting and session.has_room():
            out = waiting.popleft()
            session.number(out)
            if session.sender.gate is not None:
                self.standbys.step(session, out, now_ms)
            self.dispatch(session, out, now_ms)

    def settled(self, session: SendSession, now_ms: int) -> None:
        """Something was settled: use the room, or note that the session became idle."""
        if session.sender.gate is not None:
            session.sender.gate.changes.sending[session.id] = session
        if session.waiting:
            self._refill(session, now_ms)
        if not session.outstanding:
            if session.told_low() != session.acked_told and session.id not in self._idle:
                if not self._idle:
                    self.set_timer(("acks",), now_ms + self.options.ack_idle_ms)
                self._idle[session.id] = session

    def _tell_acks(self) -> None:
        for session in self._idle.values():
            node = self._told_at(session)
            low = session.told_low()
            if low != session.acked_told and node is not None:
                session.acked_told = low
                self.send(node, Acked(session.id, session.server, low))
        self._idle.clear()

    # -- where servers are

    def _look(self, route: Route, now_ms: int) -> None:
        route.node = None
        if not route.looking:
            route.looking = True
            self.port.look_up(route.server)

    def _look_again(self, route: Route, now_ms: int) -> None:
        wait = min(LOOK_UP_MAX_MS, LOOK_UP_FIRST_MS << min(route.attempts, 10))
        route.attempts += 1
        route.node = None
        route.looking = True
        self.set_timer(("look", route.server), now_ms + wait)

    def located(self, server: ServerId, known: bool, row: Row | None, now_ms: int) -> None:
        """The answer to `Port.look_up`.

        Args:
            server: Whom it was about.
            known: False if the directory could not be read.
            row: The row, None if there is none.
            now_ms: The time.
        """
        route = self.routes.get(server)
        if route is None or not route.looking:
            return
        if route.node is not None and (
            not known
            or (row is not None and row.state is not RowState.LOST and row.epoch <= route.epoch)
        ):
            # It was asked for on suspicion, and knows nothing newer.
            route.looking = False
        elif not known:
            self._look_again(route, now_ms)
        elif server in self.hosted:
            route.looking = False
            self._retransmit(route, now_ms)
        elif row is None:
            self._fail(route, NOT_FOUND, b"", now_ms)
        elif row.state is RowState.LOST:
            self._fail(route, LOST, row.cause.encode(), now_ms)
        elif (
            row.owner in self.dead
            or row.owner == self.node
            or row.epoch < route.epoch
            or (row.owner == route.refused and row.epoch <= route.epoch)
        ):
            # The row is about to change: a death, a commit or an arrival is under way. A node
            # that refused is asked again next time: it may have been about to host the server.
            route.refused = None
            self._look_again(route, now_ms)
        else:
            route.looking = False
            route.node, route.epoch = row.owner, row.epoch
            self._retransmit(route, now_ms)
        self.flush(now_ms)

    def _fail(self, route: Route, status: int, payload: bytes, now_ms: int) -> None:
        """Nobody will ever answer: settle everything outstanding to the server."""
        route.looking = False
        route.node = None
        route.attempts = 0
        for session in list(route.sessions.values()):
            for out in list(session.outstanding.values()):
                session.settle(out.seq)
                # The value tells whether a copy may have been executed.
                self._resolve(out, status, payload, out.sent_ms >= 0)
            while session.waiting:
                out = session.waiting.popleft()
                self.standbys.unnumbered(session, out, now_ms, status, payload)
                self._resolve(out, status, payload, False)
            self._drop_sending(session, status, payload)

    def _retransmit(self, route: Route, now_ms: int) -> None:
        for session in list(route.sessions.values()):
            session.lift()
            for out in list(session.outstanding.values()):
                if out.seq in session.outstanding and (
                    out.seq < session.grant or out.seq == session.low
                ):
                    self.dispatch(session, out, now_ms)
            if session.waiting:
                self._refill(session, now_ms)

    # -- what comes back

    def _on_reply(self, reply: Reply, now_ms: int) -> None:
        session = self.sending.get(reply.session)
        if session is None:
            # The sender has moved: its reply follows it.
            self._pass_on(reply, self.forwarding.get(session_sender(reply.session), now_ms))
            return
        if session.sender.id in self.leaving:
            inc = self.hosted.get(session.sender.id)
            if inc is not None and inc.phase is Phase.FROZEN:
                return  # its state is on the way; the new place asks again
        status = reply.status
        if status == ROLLED_BACK:
            self._rolled_back(session, reply.payload, now_ms)
            return
        out = session.settle(reply.seq)
        if out is None:
            return
        if session.sender.gate is not None:
            session.sender.gate.changes.sending[session.id] = session
        if out.withdrawn and status == WITHDRAWN:
            status = out.withdrawn
        session.route.attempts = 0
        self._resolve(out, status, reply.payload, None)
        if status == STOPPED and not session.route.looking:
            # It may come back from a checkpoint, anywhere: the next request asks the directory.
            session.route.node = None
        if status == FORGOTTEN:
            self._forgotten(session, now_ms)
        if session.waiting or not session.outstanding:
            self.settled(session, now_ms)

    def _rolled_back(self, session: SendSession, payload: bytes, now_ms: int) -> None:
        """The server went back in time: whoever made requests of it before is told, once.

        Also what was not numbered yet was made in the belief that the server is what it was.
        The next request begins a session with the new generation.
        """
        sender, server = session.sender, session.server
        generation = directory.decode_news(payload).generation
        told = False
        for other in [*sender.sessions.values(), *sender.chained.values()]:
            if other.server != server or (other.generation >= generation and other is not session):
                continue
            for out in list(other.outstanding.values()):
                other.settle(out.seq)
                told = told or out.token is not None
                # The value tells whether a copy may have been executed.
                self._resolve(out, ROLLED_BACK, payload, out.sent_ms >= 0)
            while other.waiting:
                out = other.waiting.popleft()
                told = told or out.token is not None
                self.standbys.unnumbered(session, out, now_ms, ROLLED_BACK, payload)
                self._resolve(out, ROLLED_BACK, payload, False)
            self._drop_sending(other, ROLLED_BACK, payload)
        if told:
            # Otherwise nobody waits any more for what was asked, and the next request is told.
            sender.remember(server, generation)

    def _forgotten(self, session: SendSession, now_ms: int) -> None:
        """The owner does not know the session (any more): nothing in it can go on."""
        for out in list(session.outstanding.values()):
            session.settle(out.seq)
            self._resolve(out, FORGOTTEN, b"", None)
        waiting = list(session.waiting)
        session.waiting.clear()
        self._drop_sending(session, FORGOTTEN)
        if waiting:
            # Never numbered, thus never sent: they go on under a new session, in order.
            sender = session.sender
            fresh = sender.sessions[session.server] = self.open_session(
                sender, session.server, now_ms
            )
            fresh.waiting.extend(waiting)
            fresh.deadline_ms = min((o.deadline_ms or NEVER for o in waiting), default=NEVER)
            if fresh.deadline_ms < NEVER:
                self.set_timer(("deadline", fresh.id), fresh.deadline_ms)
            self._refill(fresh, now_ms)

    def _on_receipt(self, receipt: Receipt, node: NodeId, now_ms: int) -> None:
        session = self.sending.get(receipt.session)
        if session is None:
            sender = session_sender(receipt.session)
            inc = self.hosted.get(sender)
            if sender == self.node or (inc is not None and not inc.sender.muted):
                # Closed here, and its owner does not know.
                below = receipt.admitted_below
                self.send(node, Acked(receipt.session, receipt.server, below, True))
                return
            self._pass_on(receipt, self.forwarding.get(session_sender(receipt.session), now_ms))
            return
        inc = self.hosted.get(session.sender.id)
        if inc is not None and inc.phase is Phase.FROZEN:
            return
        if session.sender.gate is not None:
            session.sender.gate.changes.sending[session.id] = session
        granted = session.grant
        route = session.route
        settled = session.receipt(
            receipt.admitted_below,
            receipt.window,
            may_be_former=route.node is not None and route.node != node,
        )
        for out in settled:
            self._resolve(out, OK, None, None)
        for out in list(session.outstanding.values()):
            if out.seq < receipt.admitted_below:
                continue
            if out.admitted:
                # Somebody had it, and whoever says this has not. Or this was said before that:
                # receipts of former places may come late, in any order, and many at a time.
                out.admitted = False
                out.hurried += 1
                if out.hurried <= HURRIED_MAX:
                    self.dispatch(session, out, now_ms)
            elif granted <= out.seq < session.grant:
                # It was refused. What was granted before is on its way, and is not sent again with
                # each receipt.
                self.dispatch(session, out, now_ms)
        route.attempts = 0
        if receipt.window == 0:
            self._withdraw_refused(session, now_ms)
        if session.waiting or not session.outstanding:
            self.settled(session, now_ms)

    def _withdraw_refused(self, session: SendSession, now_ms: int) -> None:
        """The mailbox is full: what may not wait for room is taken back.

        It was numbered on trust. The number goes as an empty one, and the owner's answer says
        whether the request got in after all.
        """
        for out in list(session.outstanding.values()):
            refused = out.kind == CAST and out.seq >= session.grant
            # Without a token nobody could be told: such a cast goes on being repeated.
            if refused and not out.wait and out.token is not None:
                self._withdraw(session, out, FULL)
                self.dispatch(session, out, now_ms)

    def _on_moved(self, moved: Moved, now_ms: int) -> None:
        tombstone = self.tombstones.get(moved.server)
        if tombstone is not None and moved.epoch > tombstone.epoch and moved.node not in self.dead:
            # It came back from a checkpoint: what comes here late is for its new place.
            del self.tombstones[moved.server]
            self.forwarding.learn(moved.server, moved.node, moved.epoch, now_ms)
        inc = self.hosted.get(moved.server)
        if inc is not None and moved.failover and moved.epoch > inc.row.epoch:
            # An owner that nobody calls would not learn it in another way.
            self.port.read_standby_row(moved.server)
        route = self.routes.get(moved.server)
        if route is None or moved.epoch <= route.epoch:
            return
        if moved.node in self.dead:
            # It went where nobody is any more; the directory knows what became of it.
            if route.node is not None:
                self._look_or_wait(route, now_ms)
            return
        # After a failover nobody passes on what was sent to the former owner.
        waiting = route.node is None or moved.failover
        route.node, route.epoch = moved.node, moved.epoch
        route.looking = False
        if waiting:
            self._retransmit(route, now_ms)

    def _on_not_here(self, message: NotHere, node: NodeId, now_ms: int) -> None:
        route = self.routes.get(message.server)
        if route is None:
            return
        if route.node != node:
            # It was passed on to a node that we did not send it to.
            session = self.sending.get(message.session)
            out = session.outstanding.get(message.seq) if session is not None else None
            if session is None or out is None or out.admitted:
                return
            if out.sent_epoch < route.epoch:
                # We know better by now: it goes there, and at once.
                self.dispatch(session, out, now_ms)
            elif route.node is not None:
                # NB: there it was sent already. Sent again at once it would go round until the
                # one who passes it on learns better, which may take as long as the directory
                # is away. The directory is asked, and asked again less and less often.
                self._look_or_wait(route, now_ms)
            return
        route.refused = node
        self._look_or_wait(route, now_ms)

    def _look_or_wait(self, route: Route, now_ms: int) -> None:
        route.node = None
        if any(not session.idle() for session in route.sessions.values()):
            if route.attempts:
                self._look_again(route, now_ms)
            else:
                route.attempts = 1
                self._look(route, now_ms)

    # ------------------------------------------------------------------ hosting

    def host(
        self,
        row: Row,
        rev: int,
        limit: int,
        reentrant: bool,
        host: object,
        timers: list[tuple[str, int]],
        now_ms: int,
    ) -> Incarnation:
        """Take in a spawned server; it hands out messages from `started` on.

        Args:
            row: Its row as written in the directory.
            rev: The row's revision.
            limit: Messages its mailbox holds.
            reentrant: Whether a call of its own chain runs at once.
            host: The shell's handle.
            timers: (method, period in ms) of each timer; first due after one period.
            now_ms: The time.
        """
        inc = Incarnation(row, rev, limit, reentrant, host)
        self.hosted[row.server] = inc
        self.forwarding.forget(row.server)
        for method, period in timers:
            inc.timers[method] = TimerState(method, period, now_ms + period)
            self.set_timer(("tick", row.server, method), now_ms + period)
        return inc

    def started(self, server: ServerId, now_ms: int) -> None:
        """The hook before the first message is over: serve."""
        inc = self.hosted.get(server)
        if inc is None or not inc.starting:
            return
        inc.starting = False
        if inc.phase is Phase.STARTING:
            inc.phase = Phase.RUNNING
        self._arm_ticks(inc, now_ms)
        if inc.replica is not None:
            self.standbys.cut_soon(inc, now_ms)
        self.rest(inc, now_ms)
        self.flush(now_ms)

    def _arm_ticks(self, inc: Incarnation, now_ms: int) -> None:
        for timer in inc.timers.values():
            if not timer.queued:
                self.set_timer(("tick", inc.id, timer.method), max(now_ms, timer.due_ms))
        for plan in inc.plans.values():
            self.set_timer(("plan", inc.id, plan.url), max(now_ms, plan.due_ms))

    def plan(self, server: ServerId, url: str, every_ms: int, keep: int, now_ms: int) -> bool:
        """Take a checkpoint every so often from now on; 0 ends it. False: not here (any more)."""
        inc = self.hosted.get(server)
        if inc is None or inc.phase is Phase.FROZEN or inc.holding:
            return False
        inc.plans.pop(url, None)
        self.timers.cancel(("plan", server, url))
        if every_ms:
            plan = inc.plans[url] = Plan(url, every_ms, keep, now_ms + every_ms)
            self.set_timer(("plan", server, url), plan.due_ms)
        return True

    def _plan_due(self, server: ServerId, url: str, now_ms: int) -> None:
        inc = self.hosted.get(server)
        plan = inc.plans.get(url) if inc is not None else None
        if inc is None or plan is None or inc.phase in (Phase.FROZEN, Phase.STOPPING):
            return  # it is due where the server goes on
        missed = (now_ms - plan.due_ms) // plan.every_ms
        plan.due_ms += (missed + 1) * plan.every_ms
        self.set_timer(("plan", server, url), plan.due_ms)
        self.port.checkpoint_due(inc, plan)

    def _tick_server(self, server: ServerId, method: str, now_ms: int) -> None:
        inc = self.hosted.get(server)
        timer = inc.timers.get(method) if inc is not None else None
        if inc is None or timer is None or timer.queued:
            return
        if inc.phase is Phase.FROZEN or inc.phase is Phase.STOPPING:
            return  # what is due travels as it is; missed ticks become one
        timer.queued = True
        missed = (now_ms - timer.due_ms) // timer.period_ms
        timer.due_ms += (missed + 1) * timer.period_ms
        inc.put(Entry(None, 0, CAST, method, b"", None, (), 0))
        self._pump(inc, now_ms)

    def receive(self, node: NodeId, messages: list[Message], now_ms: int) -> list[Message]:
        """Take what came from one peer, in order.

        Returns:
            Messages that are not the core's (Load, Ask, Answer), for the shell.
        """
        rest: list[Message] = []
        for message in messages:
            kind = type(message)
            if kind is Envelope:
                self._on_envelope(message, now_ms)  # type: ignore[arg-type]
            elif kind is Reply:
                self._on_reply(message, now_ms)  # type: ignore[arg-type]
            elif not self._on_message(message, node, now_ms):
                rest.append(message)
        if self._loopback or self._receipts or self.standbys.is_due():
            self.flush(now_ms)
        return rest

    def _on_message(self, message: Message, node: NodeId, now_ms: int) -> bool:
        match message:
            case Envelope():
                self._on_envelope(message, now_ms)
            case Reply():
                self._on_reply(message, now_ms)
            case Receipt():
                self._on_receipt(message, node, now_ms)
            case Acked():
                self._on_acked(message, now_ms)
            case Moved():
                self._on_moved(message, now_ms)
            case NotHere():
                self._on_not_here(message, node, now_ms)
            case WaitProbe():
                self._on_wait_probe(message, now_ms)
            case Prepare():
                self._on_prepare(message, node, now_ms)
            case Cut() | Step() | Note() | Kept() | Follow() | Following() | FollowRefused():
                self.standbys.on_message(message, node, now_ms)
            case KeepRefused() | Unfollow():
                self.standbys.on_message(message, node, now_ms)
            case Chunk() | ChunkTaken() if self.standbys.takes(message.transfer):
                self.standbys.on_chunk(message, node, now_ms)
            case _ if hasattr(message, "transfer"):
                self._on_move_message(message, node, now_ms)  # type: ignore[arg-type]
            case _:
                return False
        return True

    def flush(self, now_ms: int) -> None:
        """Handle what is addressed to this very node, and send the receipts that are due."""
        while self._loopback or self._receipts or self.standbys.is_due():
            receipts, self._receipts = self._receipts, {}
            for inc, session in receipts.values():
                self._tell(inc, session.reply_to, self._receipt(inc, session))
            while self._loopback:
                self._on_message(self._loopback.popleft(), self.node, now_ms)
            if not self._receipts and self.standbys.is_due():
                # After what was let out so far, so that it is waited for as little as possible.
                self.standbys.flush(now_ms)

    def send(self, node: NodeId, message: Message) -> None:
        if node == self.node:
            self._loopback.append(message)
        else:
            self.port.send(node, message)

    def _tell(self, inc: Incarnation, node: NodeId, message: Message) -> None:
        """Send in the name of a hosted server: held back while its copy is not released, and until
        its standbys know what it says.
        """
        if inc.holding:
            inc.held.append((node, message))
        elif inc.gated:
            self.standbys.hold(inc, node, message)
        else:
            self.send(node, message)

    def _receipt(self, inc: Incarnation, session: ReceiveSession) -> Receipt:
        window = max(0, session.granted - session.expected) if session.starved else -1
        return Receipt(session.id, inc.id, session.expected, window)

    # -- arrival

    def _on_envelope(self, env: Envelope, now_ms: int) -> None:
        inc = self.hosted.get(env.server)
        if inc is None:
            self._not_hosted(env, now_ms)
        elif inc.phase is not Phase.FROZEN:
            self._arrive(inc, env, now_ms)
        elif inc.forwarding_to is not None:
            self._forward(env, *inc.forwarding_to)
        else:
            stands = inc.mailbox_bytes + inc.early_bytes
            inc.late.take(env, self.options.late_max, self.options.mailbox_bytes_max - stands)

    def _not_hosted(self, env: Envelope, now_ms: int) -> None:
        server = env.server
        arriving = self.moves_in.get(self.arriving.get(server, ""))
        if arriving is not None and arriving.phase >= TargetPhase.DECODING:
            # Its state is here: the source admits nothing any more, so it waits for the end
            # of the move. Before that the source serves, and late envelopes go there.
            knocking = self._knocking.setdefault(server, Late())
            knocking.take(env, self.options.late_max, self.options.mailbox_bytes_max)
            return
        tombstone = self.tombstones.get(server)
        if tombstone is not None:
            self._answer_late(tombstone, env)
            return
        to = self.forwarding.get(server, now_ms)
        if to is not None and env.hops < HOPS_MAX:
            self._forward(env, *to)
        else:
            self.send(env.reply_to, NotHere(server, env.session, env.seq))

    def _forward(self, env: Envelope, node: NodeId, epoch: int) -> None:
        if env.hops >= HOPS_MAX:
            self.send(env.reply_to, NotHere(env.server, env.session, env.seq))
            return
        env.hops += 1
        self.send(node, env)
        if env.epoch < epoch:
            self.send(env.reply_to, Moved(env.server, node, epoch))

    def _pass_on(
        self, message: Acked | Reply | Receipt | WaitProbe, to: tuple[NodeId, int] | None
    ) -> None:
        """Forward what is said again if it gets lost; not for ever.

        NB: entries point to higher epochs, and still two nodes may point to each other: one has
        given up its copy, and its older entry names the other, which does not know that yet.
        """
        if to is not None and message.hops < HOPS_MAX:
            message.hops += 1
            self.send(to[0], message)

    def _answer_late(self, tombstone: Tombstone, env: Envelope) -> None:
        session = tombstone.sessions.get(env.session)
        record = session.records.get(env.seq) if session is not None else None
        if record is not None:
            self.send(env.reply_to, Reply(env.session, env.seq, record.status, record.payload))
        elif session is not None and env.seq < session.expected and env.kind == CAST:
            self.send(env.reply_to, Receipt(env.session, env.server, session.expected))
        else:
            done = session is not None and env.seq < session.expected
            status = FORGOTTEN if done else STOPPED
            self.send(env.reply_to, Reply(env.session, env.seq, status, b""))

    def _session(
        self,
        inc: Incarnation,
        sid: SessionId,
        seq: int,
        acked_below: int,
        node: NodeId,
        now_ms: int,
    ) -> ReceiveSession | int:
        """The receiving half of an unknown session, opened if that is allowed; else a status."""
        if (seq != 1 and acked_below != 1) or not may_open(
            sid, self.clock, now_ms, self.options.session_expiry_ms
        ):
            return FORGOTTEN
        if len(inc.sessions) >= self.options.sessions_max:
            return REFUSED
        session = inc.sessions[sid] = ReceiveSession(sid, node, now_ms)
        if inc.replica is not None:
            self.standbys.cut_soon(inc, now_ms)
        return session

    def _arrive(self, inc: Incarnation, env: Envelope, now_ms: int) -> None:
        sid = env.session
        session = inc.sessions.get(sid)
        seq = env.seq
        if env.generation < inc.row.generation:
            news = directory.encode_news(directory.news_of(inc.row, env.generation))
            self._tell(inc, env.reply_to, Reply(sid, seq, ROLLED_BACK, news))
            return
        if session is None:
            opened = self._session(inc, sid, seq, env.acked_below, env.reply_to, now_ms)
            if isinstance(opened, int):
                reason = b"the server has its limit of sessions" if opened == REFUSED else b""
                self._tell(inc, env.reply_to, Reply(sid, seq, opened, reason))
                return
            session = opened
        if env.sender_epoch != session.sender_epoch:
            if env.sender_epoch < session.sender_epoch:
                return  # from a former place of the sender; the present one repeats it
            session.sender_epoch = env.sender_epoch
        session.heard_ms = now_ms
        session.reply_to = env.reply_to
        if inc.replica is not None and inc.replica.tracks:
            inc.replica.changes.sessions[sid] = session
        if env.acked_below > session.acked_below:
            self._acknowledge(inc, session, env.acked_below)
        expected = session.expected
        if seq != expected:
            # (After a failover, a result may be there of one that comes after what is missing.)
            if seq < expected or seq in session.records:
                self._repeated(inc, session, seq, env.kind, env.method)
                return
            if seq in session.early or env.kind == PROBE:
                return
            if self._no_room(inc) or seq - expected > 2 * self.options.window:
                self._refuse(inc, session, len(env.payload))
                return
            inc.hold_early(session, self._entry(session, env, now_ms))
            return
        kind = env.kind
        if kind == PROBE:
            self._receipts[sid] = (inc, session)
            return
        if (
            kind != EMPTY
            and self._no_room(inc)
            and not self._make_room(inc, session)
            and not self._nested(inc, env.chain)
        ):
            self._refuse(inc, session, len(env.payload))
            return
        self._admit(inc, session, self._entry(session, env, now_ms), now_ms)
        if session.early or session.expected in session.records:
            self._admit_early(inc, session, now_ms)

    @staticmethod
    def _entry(session: ReceiveSession, env: Envelope, now_ms: int) -> Entry:
        timeout = env.timeout_ms
        entry = Entry(
            session,
            env.seq,
            env.kind,
            env.method,
            env.payload,
            None,
            env.chain,
            now_ms + timeout if timeout else 0,
            env.trace,
        )
        entry.size = len(env.payload)
        return entry

    def _arrive_local(
        self, inc: Incarnation, sending: SendSession, out: Outgoing, now_ms: int
    ) -> None:
        """The same as `_arrive`, for a sender on this node: live arguments, no envelope."""
        sid = sending.id
        session = inc.sessions.get(sid)
        seq = out.seq
        sender = sending.sender
        low = sending.low if sender.gate is None else sending.told_low()
        if session is None:
            generation = sending.generation or self.bind(sending, inc.row.epoch)
            if generation < inc.row.generation:
                news = directory.encode_news(directory.news_of(inc.row, generation))
                self._rolled_back(sending, news, now_ms)
                return
            opened = self._session(inc, sid, seq, low, self.node, now_ms)
            if isinstance(opened, int):
                sending.settle(seq)
                self._resolve(out, opened, b"the server has its limit of sessions", None)
                if opened == FORGOTTEN:
                    self._forgotten(sending, now_ms)
                return
            session = opened
        if sender.epoch < session.sender_epoch:
            return  # It was replaced, and does not know yet; the present one is heard already.
        session.sender_epoch = sender.epoch
        session.heard_ms = now_ms
        session.reply_to = self.node
        if inc.replica is not None and inc.replica.tracks:
            inc.replica.changes.sessions[sid] = session
        if low > session.acked_below:
            self._acknowledge(inc, session, low)
        sending.acked_told = low
        expected = session.expected
        if seq < expected or (session.records and seq in session.records):
            self._repeated(inc, session, seq, out.kind, out.method)
            return
        # An empty one has room: not worth the asking.
        if (
            (inc.mailbox or inc.early or inc.records)
            and self._no_room(inc)
            and (
                seq > expected
                or (
                    out.kind != EMPTY
                    and not self._make_room(inc, session)
                    and not self._nested(inc, out.chain)
                )
            )
        ):
            self._arm_repeat(sending, now_ms)
            self._refuse(inc, session, self._size(inc, out.payload, out.args))
            return
        entry = Entry(
            session,
            seq,
            out.kind,
            out.method,
            out.payload,
            out.args,
            out.chain,
            out.deadline_ms,
        )
        if seq > expected:
            if seq not in session.early:
                entry.size = self._size(inc, out.payload, out.args)
                inc.hold_early(session, entry)
            # It may have to give way, as one from elsewhere may.
            self._arm_repeat(sending, now_ms)
            return
        self._admit(inc, session, entry, now_ms)
        if session.early or (session.records and session.expected in session.records):
            self._admit_early(inc, session, now_ms)

    def _no_room(self, inc: Incarnation) -> bool:
        options = self.options
        return (
            len(inc.mailbox) + inc.early >= inc.limit
            or inc.mailbox_bytes + inc.early_bytes >= options.mailbox_bytes_max
            or inc.records >= options.records_max
            or inc.record_bytes >= options.record_bytes_max
        )

    def _size(self, inc: Incarnation, payload: bytes | None, args: object) -> int:
        return self.port.size(inc, args) if payload is None else len(payload)

    def _make_room(self, inc: Incarnation, session: ReceiveSession) -> bool:
        """Give up early messages, if that makes room for one whose turn it is.

        Early messages were not acknowledged, so they come again; but for those that were, by an
        owner before a failover. If they were kept, the one they all wait for might be refused for
        ever.
        """
        options = self.options
        if (
            not inc.early
            or len(inc.mailbox) >= inc.limit
            or inc.mailbox_bytes >= options.mailbox_bytes_max
            or inc.records >= options.records_max
            or inc.record_bytes >= options.record_bytes_max
        ):
            return False
        for other in (session, *inc.sessions.values()):
            for seq in sorted(other.early, reverse=True):
                if not other.early[seq].kept:
                    inc.take_early(other, seq)
                    if not self._no_room(inc):
                        return True
        # Those that were acknowledged do not take the room of what they wait for.
        return any(entry.kept for entry in session.early.values())

    def _refuse(self, inc: Incarnation, session: ReceiveSession, size: int) -> None:
        if inc.mailbox_bytes + inc.early_bytes >= self.options.mailbox_bytes_max:
            session.refused_bytes = max(session.refused_bytes, size)
        session.starved = True
        session.granted = 0
        inc.starved[session.id] = session
        self._receipts[session.id] = (inc, session)

    def _grant(self, inc: Incarnation) -> None:
        """The mailbox has room again: share it among those who were refused."""
        n = max(1, len(inc.starved))
        share = max(1, (inc.limit - len(inc.mailbox)) // n)
        share_bytes = (self.options.mailbox_bytes_max - inc.mailbox_bytes) // n
        for session in list(inc.starved.values()):
            window = share if inc.mailbox else -1
            if session.refused_bytes:
                window = max(1, min(share, share_bytes // session.refused_bytes))
            if window < 0:
                session.starved = False
                session.granted = 0
                del inc.starved[session.id]
            elif session.expected + window > session.granted:
                session.granted = session.expected + window
            else:
                continue  # It has not used up what it was told.
            receipt = Receipt(session.id, inc.id, session.expected, window)
            self._tell(inc, session.reply_to, receipt)

    def _repeated(
        self, inc: Incarnation, session: ReceiveSession, seq: int, kind: int, method: str
    ) -> None:
        """A request below `expected`: done, pending or forgotten; never executed again."""
        record = session.records.get(seq)
        if record is not None:
            if inc.gated and inc.replica is not None:
                if (session.id, seq) in inc.replica.changes.records:
                    return  # The first one waits for the next cut.
            reply = Reply(session.id, seq, record.status, record.payload)
            self._tell(inc, session.reply_to, reply)
        elif seq < session.acked_below:
            self._tell(inc, session.reply_to, Reply(session.id, seq, FORGOTTEN, b""))
        elif kind == EMPTY and method == "cast":
            # The cast was admitted before it was withdrawn.
            self._tell(inc, session.reply_to, Reply(session.id, seq, OK, b""))
        else:
            self._receipts[session.id] = (inc, session)

    def _acknowledge(self, inc: Incarnation, session: ReceiveSession, below: int) -> None:
        below = min(below, session.expected)
        if session.records:
            before = len(session.records)
            inc.record_bytes -= session.acknowledge(below)
            inc.records -= before - len(session.records)
            if inc.starved:
                self._maybe_grant(inc)
        elif below > session.acked_below:
            session.acked_below = below

    def _admit_early(self, inc: Incarnation, session: ReceiveSession, now_ms: int) -> None:
        early = session.early
        while True:
            if session.expected in early:
                self._admit(inc, session, inc.take_early(session, session.expected), now_ms)
            elif session.expected in session.records:
                session.expected += 1  # answered before a failover, ahead of what came before it
            else:
                break

    def _nested(self, inc: Incarnation, chain: tuple[str, ...]) -> bool:
        """Whether a call comes from below a handler of this very server that still runs."""
        if not chain or not inc.running:
            return False
        prefix = inc.id + "/"
        for run in chain:
            if run.startswith(prefix) and number(run[len(prefix) :]) in inc.running:
                return True
        return False

    def _admit(self, inc: Incarnation, session: ReceiveSession, entry: Entry, now_ms: int) -> None:
        """The next number of its session: it will be handled, or is consumed right here."""
        session.expected = entry.seq + 1
        kind = entry.kind
        if kind == CALL:
            session.pending += 1
            if entry.chain and inc.running and self._nested(inc, entry.chain):
                if inc.reentrant:
                    self._start(inc, entry, now_ms)
                else:
                    chain = "\n".join([*entry.chain, inc.id]).encode()
                    self._answer(inc, entry, CYCLE, chain, None, now_ms)
                return
        elif kind == CAST:
            self._receipts[session.id] = (inc, session)
            if inc.replica is not None and inc.replica.tracks:
                # NB: a cut may have come between, before the message ahead of this one.
                inc.replica.changes.sessions[session.id] = session
                inc.replica.changes.casts.append(entry)
        elif kind == EMPTY:
            session.pending += 1
            self._answer(inc, entry, WITHDRAWN, b"", None, now_ms)
            return
        else:
            # NB: a kind nobody knows; the number is used, the sender is told.
            session.pending += 1
            self._answer(inc, entry, REFUSED, b"unknown kind of envelope", None, now_ms)
            return
        if (
            not inc.running
            and not inc.mailbox
            and inc.phase is Phase.RUNNING
            and not (self._depth or self.crowded or inc.pump_due or inc.gated or inc.holding)
            and inc.replica is None
            and not inc.sender.replays
            and (not entry.deadline_ms or entry.deadline_ms > now_ms)
        ):
            self._run_now(inc, entry, now_ms)
            return
        if not entry.size:
            entry.size = self._size(inc, entry.payload, entry.args)
        inc.put(entry)
        self._pump(inc, now_ms)

    # -- running

    def pump_soon(self, inc: Incarnation) -> None:
        """Go on handing out messages, but not on this stack."""
        idle = inc.mailbox and not inc.running and inc.phase is Phase.RUNNING
        if idle and not inc.pump_due and inc is not self._pumping:
            inc.pump_due = True
            self.port.pump_later(inc)

    def pump(self, inc: Incarnation, now_ms: int) -> None:
        """Go on handing out messages (asked for by `Port.pump_later`)."""
        inc.pump_due = False
        if self.hosted.get(inc.id) is inc:
            self._pump(inc, now_ms)
            self.flush(now_ms)

    def _pump(self, inc: Incarnation, now_ms: int) -> None:
        if inc.running or inc.phase is not Phase.RUNNING:
            return
        mailbox = inc.mailbox
        if self._depth or inc.pump_due or self.crowded:
            # Inside another handler, or in line behind others: not on this stack. The loop
            # that is handing out this server's messages comes to the new ones by itself.
            if mailbox and not inc.pump_due and inc is not self._pumping:
                inc.pump_due = True
                self.port.pump_later(inc)
            return
        self._depth += 1
        self._pumping = inc
        try:
            self._hand_out(inc, now_ms)
        finally:
            self._depth -= 1
            self._pumping = None
        if inc.starved:
            self._maybe_grant(inc)

    def _run_now(self, inc: Incarnation, entry: Entry, now_ms: int) -> None:
        """What `_pump`, `_hand_out` and `_start` would do with a message that is alone.

        Nothing is before it, nothing keeps it from being run on this stack, and no standby wants
        to hear of it: it need not be put into the mailbox and taken out again.
        """
        run = entry.run = inc.run_no = inc.run_no + 1
        inc.running[run] = entry
        self._depth = 1
        self._pumping = inc
        try:
            done = self.port.run(inc, entry)
            if done is not None:
                del inc.running[run]
                if entry.kind == CALL:
                    self._answer(inc, entry, done[0], done[1], done[2], now_ms)
        finally:
            self._depth = 0
            self._pumping = None
        if inc.mailbox:
            self._pump(inc, now_ms)
        elif inc.starved:
            self._maybe_grant(inc)

    def _hand_out(self, inc: Incarnation, now_ms: int) -> None:
        mailbox = inc.mailbox
        left = PUMP_MAX
        while mailbox and not inc.running and inc.phase is Phase.RUNNING:
            if not left or self.crowded:
                inc.pump_due = True
                self.port.pump_later(inc)
                break
            left -= 1
            entry = mailbox[0]
            held = inc.gated or inc.holding
            if held and entry.kind != QUIESCE and not self.standbys.may_begin(inc, entry, now_ms):
                break
            mailbox.popleft()
            inc.mailbox_bytes -= entry.size
            if entry.session is None:
                if entry.kind == QUIESCE:
                    if inc.background:
                        mailbox.appendleft(entry)
                    else:
                        self._keep_quiet(inc, entry)
                    break
                timer = inc.timers.get(entry.method)
                if timer is not None:
                    timer.queued = False
                    self.set_timer(("tick", inc.id, entry.method), timer.due_ms)
            elif (
                entry.kind == CALL
                and entry.deadline_ms
                and entry.deadline_ms <= now_ms
                and entry.key() not in (inc.sender.replays or ())
            ):
                # NB: calls only. A cast in the mailbox is acknowledged, so it is carried out. So is
                # what was begun before a failover: it cannot be said that it was not done.
                self._answer(inc, entry, EXPIRED, b"", None, now_ms)
                continue
            self._start(inc, entry, now_ms)

    def _maybe_grant(self, inc: Incarnation) -> None:
        if (
            len(inc.mailbox) <= inc.limit // 2
            and inc.mailbox_bytes <= self.options.mailbox_bytes_max // 2
            and not self._no_room(inc)
        ):
            self._grant(inc)

    def _start(self, inc: Incarnation, entry: Entry, now_ms: int) -> None:
        inc.run_no += 1
        entry.run = inc.run_no
        inc.running[entry.run] = entry
        if inc.replica is not None:
            self._begin_replicated(inc, entry, now_ms)
        self._depth += 1
        try:
            done = self.port.run(inc, entry)
        finally:
            self._depth -= 1
        if done is not None:
            status, payload, value = done
            del inc.running[entry.run]
            if inc.sender.replays:
                status = self._replayed(inc, entry, status, now_ms)
            if entry.kind == CALL:
                self._answer(inc, entry, status, payload, value, now_ms)
            if inc.replica is not None and inc.replica.due:
                # NB: what it asked for may have been flushed while it ran: no cut was to be had.
                self.standbys.cut_again(inc, inc.replica)

    def _begin_replicated(self, inc: Incarnation, entry: Entry, now_ms: int) -> None:
        replica = inc.replica
        assert replica is not None
        session = entry.session
        if session is not None and replica.tracks:
            if inc.sessions.get(session.id) is not session:
                # A cast that has outlived its session.
                session.expected = max(session.expected, entry.seq + 1)
            replica.changes.sessions[session.id] = session
        entry.waits = inc.gated and self.port.may_wait(inc, entry)
        self.standbys.cut_soon(inc, now_ms)

    def finish(
        self,
        inc: Incarnation,
        entry: Entry,
        status: int,
        payload: bytes | None,
        value: object,
        now_ms: int,
    ) -> None:
        """A handler that went on after `Port.run` has ended.

        Args:
            inc: Its server.
            entry: What it handled.
            status: OK or ERROR.
            payload: The result as bytes, or None if only `value` is given.
            value: The live result (or exception).
            now_ms: The time.
        """
        if inc.running.pop(entry.run, None) is None:
            return
        if inc.sender.replays:
            status = self._replayed(inc, entry, status, now_ms)
        if entry.session is not None and entry.kind == CALL:
            self._answer(inc, entry, status, payload, value, now_ms)
        if inc.mailbox or inc.starved or inc.phase is not Phase.RUNNING or inc.replica is not None:
            self.rest(inc, now_ms)
        if self._loopback or self._receipts or self.standbys.is_due():
            self.flush(now_ms)

    def background(self, inc: Incarnation, change: int, now_ms: int) -> None:
        """A task that a handler started has begun (+1) or ended (-1)."""
        inc.background += change
        if change < 0:
            self.rest(inc, now_ms)
            self.flush(now_ms)

    def rest(self, inc: Incarnation, now_ms: int) -> None:
        """A handler or task ended: hand out the next, or say that the server is quiet."""
        replica = inc.replica
        if replica is not None:
            self.standbys.rested(inc, replica, now_ms)
        if inc.phase is Phase.RUNNING:
            self._pump(inc, now_ms)
        elif inc.quiet() and self.hosted.get(inc.id) is inc:
            if inc.phase is not Phase.FROZEN and inc.mailbox and inc.mailbox[0].kind == QUIESCE:
                # It was asked for before the move, or the stop, that waits for the same.
                self._keep_quiet(inc, inc.mailbox.popleft())
            elif inc.phase is Phase.QUIESCING:
                if not inc.holding and (replica is None or self._may_leave(inc, replica, now_ms)):
                    self._quiesced(inc, now_ms)
            elif inc.phase is Phase.STOPPING:
                self._stop_now(inc)

    def _may_leave(self, inc: Incarnation, replica: Replica, now_ms: int) -> bool:
        """Whether its standbys have what a server that moves is about to take along.

        What is admitted from here on changes nothing of the object, and is asked for again where
        the server goes; if it were waited for, a busy server would never leave.
        """
        source = self.moves_out.get(self.leaving.get(inc.id, ""))
        if source is None:
            return True
        if source.cut_number < 0:
            self.standbys.cut(inc, now_ms)
            source.cut_number = replica.number
        return replica.acked >= source.cut_number or not replica.gating()

    def _answer(
        self,
        inc: Incarnation,
        entry: Entry,
        status: int,
        payload: bytes | None,
        value: object,
        now_ms: int,
    ) -> None:
        """Record a result and let it out; a local sender gets the live value."""
        session = entry.session
        if session is None:
            return
        session.pending -= 1
        seq = entry.seq
        if session.reply_to == self.node and not inc.holding and not inc.gated:
            sending = self.sending.get(session.id)
            # A muted sender is a copy that may still be dropped: its result needs a record. So does
            # that of one whose standby may ask again.
            if sending is not None and not sending.sender.muted and sending.sender.gate is None:
                out = sending.settle(seq)
                low = sending.acked_told = sending.low
                if session.records:
                    self._acknowledge(inc, session, low)
                else:
                    # NB: not `low` by itself: a peer may have settled what was never admitted.
                    session.acked_below = low if low < session.expected else session.expected
                if out is not None:
                    if out.withdrawn and status == WITHDRAWN:
                        status = out.withdrawn
                    if out.run:
                        self._resolve(out, status, payload, value)
                    elif out.token is not None:
                        token, out.token = out.token, None
                        self.port.resolve(token, status, payload, value)
                if sending.waiting:
                    self.settled(sending, now_ms)
                return
        if payload is None:
            status, payload = self.port.pack_result(status, value)
        if seq >= session.acked_below:
            session.records[seq] = Record(status, payload)
            inc.records += 1
            inc.record_bytes += len(payload)
        if inc.replica is not None and inc.replica.tracks:
            inc.replica.changes.sessions[session.id] = session
            inc.replica.changes.records[session.id, seq] = session
            if status > ERROR and status != DIVERGED:
                inc.replica.changes.answers[session.id, seq] = session
        reply = Reply(session.id, seq, status, payload)
        if inc.holding or inc.gated or session.reply_to == self.node:
            self._tell(inc, session.reply_to, reply)
        else:
            self.port.send(session.reply_to, reply)

    def _on_acked(self, acked: Acked, now_ms: int) -> None:
        inc = self.hosted.get(acked.server)
        if inc is None:
            self._pass_on(acked, self.forwarding.get(acked.server, now_ms))
            return
        if inc.phase is Phase.FROZEN:
            self._pass_on(acked, inc.forwarding_to)
            return
        session = inc.sessions.get(acked.session)
        if session is None:
            return
        session.heard_ms = now_ms
        if inc.replica is not None and inc.replica.tracks:
            inc.replica.changes.sessions[session.id] = session
        if acked.acked_below > session.acked_below:
            self._acknowledge(inc, session, acked.acked_below)
        if acked.final:
            # NB: not forgotten yet. A copy of its number 1 that is still under way would open
            # it again and be executed twice; the sweep ends it when its id is too old for that.
            session.ended = True

    def _end_session(self, inc: Incarnation, session: ReceiveSession) -> None:
        for seq, entry in sorted(session.early.items()):
            if entry.kept:
                # It was acknowledged; what it waited for went with the sender, after a failover.
                inc.put(inc.take_early(session, seq))
                self.pump_soon(inc)
        inc.sessions.pop(session.id, None)
        inc.starved.pop(session.id, None)
        if inc.replica is not None and inc.replica.tracks:
            inc.replica.changes.sessions.pop(session.id, None)
            inc.replica.changes.ended[session.id] = None
        inc.records -= len(session.records)
        inc.record_bytes -= sum(len(r.payload) for r in session.records.values())
        inc.early -= len(session.early)
        inc.early_bytes -= sum(entry.size for entry in session.early.values())
        if inc.starved:
            self._maybe_grant(inc)

    # -- knots of waits

    def _probe(self, run: str, now_ms: int) -> None:
        waits = self.waits.get(run)
        if not waits:
            return
        for out, session in waits.items():
            self._send_probe(session, out, (run,))
        self.set_timer(("probe", run), now_ms + 10 * self.options.probe_ms)

    def _send_probe(self, session: SendSession, out: Outgoing, path: tuple[str, ...]) -> None:
        if session.sender.muted:
            return  # nothing has left: it waits for the release of its copy, not for a handler
        node = self.node if session.server in self.hosted else session.route.node
        if node is not None:
            # Un-numbered yet (0), it matches no run there and thus waits behind all of them.
            self.send(node, WaitProbe(session.server, session.id, out.seq, path))

    def _on_wait_probe(self, probe: WaitProbe, now_ms: int) -> None:
        inc = self.hosted.get(probe.server)
        if not probe.path or len(probe.path) > PATH_MAX:
            return
        if inc is None:
            self._pass_on(probe, self.forwarding.get(probe.server, now_ms))
            return
        session = inc.sessions.get(probe.session)
        if session is not None and probe.seq in session.records:
            return  # It is answered; the answer may be held back for the server's standbys.
        served = [
            entry
            for entry in inc.running.values()
            if entry.session is not None
            and entry.session.id == probe.session
            and entry.seq == probe.seq
        ]
        # Served now: the wait goes on where that run waits. Not yet: behind all that run.
        for entry in served or list(inc.running.values()):
            run = f"{inc.id}/{entry.run}"
            if run == probe.path[0]:
                # Every handler of the knot probes; the one with the greatest id gives way.
                if run == max(probe.path):
                    self._break_knot(run, probe.path, now_ms)
            elif run not in probe.path:
                for out, sending in list(self.waits.get(run, {}).items()):
                    self._send_probe(sending, out, (*probe.path, run))

    def _break_knot(self, run: str, path: tuple[str, ...], now_ms: int) -> None:
        waits = self.waits.get(run, {})
        nearest = path[1].rpartition("/")[0] if len(path) > 1 else run.rpartition("/")[0]
        for out, session in list(waits.items()):
            if session.server == nearest:
                chain = "\n".join([*path, run.rpartition("/")[0]]).encode()
                self._resolve(out, CYCLE, chain, None)
                # What has not left does not leave any more; the rest is executed in its turn.
                self.cancel(session, out, now_ms)

    # ------------------------------------------------------------------ stopping

    def stop(self, server: ServerId, now_ms: int) -> bool:
        """End a server at its next quiescent point; `Port.stopped` follows.

        Returns:
            False if it is not here, is leaving, or stops already.
        """
        inc = self.hosted.get(server)
        if inc is None or inc.phase not in (Phase.RUNNING, Phase.STARTING):
            return False
        if server in self.leaving or inc.holding:
            return False
        inc.phase = Phase.STOPPING
        if inc.quiet():
            self._stop_now(inc)
        return True

    def _stop_now(self, inc: Incarnation) -> None:
        if inc.removal is Removal.NONE:
            inc.removal = Removal.ASKED
            self.port.stopped(inc)

    def keep_serving(self, server: ServerId, now_ms: int) -> bool:
        """Give up a stop that waits for a handler, and serve on.

        Returns:
            False if that is not possible any more: the row may be gone.
        """
        inc = self.hosted.get(server)
        if inc is None or inc.phase is not Phase.STOPPING or inc.removal is not Removal.NONE:
            return False
        self._serve_on(inc, now_ms)
        return True

    def _serve_on(self, inc: Incarnation, now_ms: int) -> None:
        inc.removal = Removal.NONE
        inc.phase = Phase.STARTING if inc.starting else Phase.RUNNING
        self._arm_ticks(inc, now_ms)
        self._pump(inc, now_ms)
        self.flush(now_ms)

    def removal_ended(self, server: ServerId, outcome: SwapOutcome, now_ms: int) -> bool | None:
        """The result of an attempt to remove the row of a server that stops.

        Returns:
            True: the server is gone. False: the row is as it was, and the server serves on.
            None: that is not known, or the row changed otherwise; the removal has to be asked
            for again, and nothing is served meanwhile.
        """
        inc = self.hosted.get(server)
        if inc is None or inc.removal is Removal.NONE:
            return True
        if outcome is SwapOutcome.DONE:
            self.removed(server, now_ms)
            return True
        if outcome is SwapOutcome.NOT_DONE and inc.removal is not Removal.IN_DOUBT:
            self._serve_on(inc, now_ms)
            return False
        if outcome is not SwapOutcome.REFUSED:
            # An earlier attempt may have taken effect, or may yet.
            inc.removal = Removal.IN_DOUBT
        return None

    def removed(self, server: ServerId, now_ms: int, status: int = STOPPED) -> None:
        """The row is gone (or never came): answer what is unhandled, keep a tombstone."""
        inc = self.hosted.pop(server, None)
        if inc is None:
            return
        self.standbys.end(inc, now_ms, stays=False)
        delayed = self._undelay(server)
        if delayed is not None:
            self._finish_source(delayed, Finish(Result.ROLLED_BACK, "the server has stopped"))
        self._drop_timers(inc)
        while inc.mailbox:
            entry = inc.mailbox.popleft()
            if entry.kind == QUIESCE:
                self.port.not_quiesced(entry.args)
            elif entry.session is not None and entry.kind == CALL:
                self._answer(inc, entry, status, b"", None, now_ms)
        until_ms = now_ms + self.options.tombstone_ms
        self.tombstones[server] = Tombstone(inc.sessions, until_ms, inc.row.epoch)
        if len(self.tombstones) > self.options.tombstones_max:
            del self.tombstones[next(iter(self.tombstones))]
        self._end_sender(inc.sender)
        route = self.routes.get(server)
        if route is not None:
            self._look_or_wait(route, now_ms)
        self.flush(now_ms)

    def _end_sender(self, sender: Sender) -> None:
        for session in [*sender.sessions.values(), *sender.chained.values()]:
            for out in list(session.outstanding.values()):
                self._resolve(out, CLOSED, b"", None)
            for out in list(session.waiting):
                self._resolve(out, CLOSED, b"", None)
            self._close_session(session)

    def _drop_timers(self, inc: Incarnation) -> None:
        for method in inc.timers:
            self.timers.cancel(("tick", inc.id, method))
        for url in inc.plans:
            self.timers.cancel(("plan", inc.id, url))

    def close(self, now_ms: int) -> None:
        """This core ends: everybody who still waits on it is told so."""
        for session in list(self.sending.values()):
            for out in [*session.outstanding.values(), *session.waiting]:
                self._resolve(out, CLOSED, b"", None)
            session.outstanding.clear()
            session.waiting.clear()
            self._close_session(session)
        for inc in self.hosted.values():
            inc.phase = Phase.FROZEN  # Ending a handler must not begin the next.
        self._loopback.clear()

    # ------------------------------------------------------------------ back in time

    def quiesce(
        self, server: ServerId, token: object, now_ms: int, *, moving: TransferId = ""
    ) -> bool:
        """Keep a server at its next quiescent point, after the message that it handles now.

        `Port.quiesced` follows, or `Port.not_quiesced`. It goes on admitting meanwhile.

        Args:
            server: Which.
            token: Given back with what follows.
            now_ms: The shell's clock.
            moving: The move that asks, which is sending the state ahead.

        Returns:
            False if it is not here, or is leaving (otherwise) or stopping: nothing will follow.
        """
        inc = self.hosted.get(server)
        if inc is None or inc.holding or self.leaving.get(server, moving) != moving:
            return False
        if inc.phase not in (Phase.RUNNING, Phase.STARTING):
            return False
        inc.mailbox.appendleft(Entry(None, 0, QUIESCE, "", None, token, (), 0))
        self._pump(inc, now_ms)
        self.flush(now_ms)
        return True

    def _keep_quiet(self, inc: Incarnation, entry: Entry) -> None:
        # A run of its own: nothing is handed out, moved or stopped before it is finished.
        inc.run_no += 1
        entry.run = inc.run_no
        inc.running[entry.run] = entry
        self.port.quiesced(inc, entry)

    def do_not_quiesce(self, server: ServerId, token: object) -> bool:
        """Take a `quiesce` back; False if the server is at the quiescent point, or gone."""
        inc = self.hosted.get(server)
        for entry in inc.mailbox if inc is not None else ():
            if entry.kind == QUIESCE and entry.args is token:
                assert inc is not None
                inc.mailbox.remove(entry)
                return True
        return False

    def begin_replacing(self, inc: Incarnation, now_ms: int) -> Phase:
        """From here on a server at a quiescent point admits and sends nothing.

        Its row is about to be swapped: until that is known it might not be the owner any more.
        `restored` or `end_replacing` follows. A move that waits for it is given up.

        Returns:
            What it was doing, for `end_replacing`.
        """
        transfer = self.leaving.get(inc.id)
        source = self.moves_out.get(transfer) if transfer is not None else None
        reason = "the server is being replaced by what a checkpoint holds"
        if source is not None:
            self._apply_source(source, source.handle(Withdraw(reason), now_ms), now_ms)
        for queued in [source for source in self._queue if source.server == inc.id]:
            self._queue.remove(queued)
            self._finish_source(queued, Finish(Result.ROLLED_BACK, reason))
        delayed = self._undelay(inc.id)
        if delayed is not None:
            self._finish_source(delayed, Finish(Result.ROLLED_BACK, reason))
        phase = inc.phase
        inc.phase = Phase.FROZEN
        inc.sender.muted = True
        self.flush(now_ms)
        return phase

    def end_replacing(self, inc: Incarnation, phase: Phase, now_ms: int) -> None:
        """It was not replaced: admit and send again; `finish` follows."""
        if self.hosted.get(inc.id) is not inc:
            return  # Somebody else has taken it over meanwhile.
        inc.phase = Phase.RUNNING if phase is Phase.STARTING and not inc.starting else phase
        inc.sender.muted = False
        self._arm_ticks(inc, now_ms)
        late, inc.late = inc.late, Late()
        for env in late:
            self._arrive(inc, env, now_ms)
        self._come_home(inc, now_ms)
        self.flush(now_ms)

    def checkpoint(self, inc: Incarnation, now_ms: int) -> CheckpointRecord:
        """What a checkpoint holds of a server at a quiescent point, besides its object."""
        return checkpoint(inc, self.port.pack, now_ms)

    def restored(
        self,
        row: Row,
        rev: int,
        limit: int,
        reentrant: bool,
        host: object,
        record: CheckpointRecord,
        now_ms: int,
        *,
        fork: bool = False,
        durable: bool = False,
    ) -> Incarnation:
        """Take in a server from a checkpoint; it hands out messages from `started` on.

        Its row is written. A copy that is here already, at a quiescent point, was the former
        generation's: it is dropped, and who waits for it is told. What stood by for it is to stand
        by again (`Standbys.take_up`).

        Args:
            row: See `host`; so are the next four.
            rev: The row's revision.
            limit: Messages its mailbox holds.
            reentrant: Whether a call of its own chain runs at once.
            host: The shell's handle.
            record: What the checkpoint holds.
            now_ms: The time.
            fork: See `incarnation.revive`.
            durable: It is to have a journal, unless it takes the place of one that had what it
                had; nothing is let out before its row names it.
        """
        source = self.moves_out.get(self.leaving.get(row.server, ""))
        if source is not None:
            # It left from here, was lost where it went, and is back before that was known here.
            self._finish_source(source, Finish(Result.FENCED, "it was restored here"))
        former = self.hosted.pop(row.server, None)
        inc = revive(record, row, rev, limit, reentrant, host, fork=fork, now_ms=now_ms)
        self.hosted[row.server] = inc
        self.forwarding.forget(row.server)
        self.tombstones.pop(row.server, None)
        if former is not None:
            awaited = self.standbys.awaited(former)
            self._supersede(former, row, now_ms)
            inc.wanted = former.wanted
            self.standbys.take_up(inc, awaited, now_ms)
            for env in former.late:
                self._arrive(inc, env, now_ms)
        elif durable:
            inc.wanted = Wanted(durable=True)
            self.standbys.take_up(inc, [JOURNAL], now_ms)
        self._come_home(inc, now_ms)
        self.flush(now_ms)
        return inc

    def _supersede(self, former: Incarnation, row: Row, now_ms: int) -> None:
        """Drop a copy whose server went back in time right here."""
        former.phase = Phase.FROZEN
        self.standbys.end(former, now_ms, stays=False)
        self._drop_timers(former)
        news = directory.encode_news(directory.news_of(row, former.row.epoch))
        mailbox, former.mailbox = former.mailbox, deque()
        for entry in mailbox:
            if entry.kind == QUIESCE:
                self.port.not_quiesced(entry.args)
            elif entry.session is not None and entry.kind == CALL:
                session = entry.session
                self.send(session.reply_to, Reply(session.id, entry.seq, ROLLED_BACK, news))
        self._end_sender(former.sender)

    # ------------------------------------------------------------------ peers

    def peer_up(self, node: NodeId, now_ms: int) -> None:
        """A link came up again after it was down: what was under way may be lost."""
        for route in list(self.routes.values()):
            if route.node == node:
                self._retransmit(route, now_ms)
        for source in list(self.moves_out.values()):
            self._apply_source(source, source.handle(PeerUp(node), now_ms), now_ms)
        for target in list(self.moves_in.values()):
            self._apply_target(target, target.handle(PeerUp(node), now_ms), now_ms)
        self.standbys.peer_up(node, now_ms)
        self.flush(now_ms)

    def node_dead(self, node: NodeId, now_ms: int) -> None:
        """A node's process was seen dead. (Its servers' rows are the shell's to bury.)"""
        if node in self.dead or node == self.node:
            return
        self.dead[node] = None
        if len(self.dead) > DEAD_MAX:
            del self.dead[next(iter(self.dead))]
        self.forwarding.forget_node(node)
        for source in list(self.moves_out.values()):
            self._apply_source(source, source.handle(NodeDead(node), now_ms), now_ms)
        for target in list(self.moves_in.values()):
            self._apply_target(target, target.handle(NodeDead(node), now_ms), now_ms)
        self.standbys.node_dead(node, now_ms)
        for route in list(self.routes.values()):
            if route.node == node:
                self._look_or_wait(route, now_ms)
        self.flush(now_ms)

    def may_bury(self, row: Row) -> bool:
        """Whether a row whose owner was seen dead may be marked lost by this node.

        A COMMITTED row still has a frozen copy at its source: only the source buries it, and
        only when it has no such copy any more, or any node when the source is dead too.
        """
        if row.state is RowState.LOST or row.journal:
            return False  # whoever has the journal opens it
        if any(standby not in self.dead for standby in row.standbys):
            return False  # one of them takes over, or says that it cannot
        if row.owner == self.node:
            return self._has_nothing(row)
        if row.owner not in self.dead:
            return False
        if row.state is RowState.ACTIVE or row.previous in self.dead or not row.previous:
            return True
        return row.previous == self.node and row.server not in self.leaving

    def _has_nothing(self, row: Row) -> bool:
        """Whether the commit of a move to here came through after its source had died and after
        the copy here had been given up: neither has anything of the server any more.
        """
        return (
            row.state is RowState.COMMITTED
            and row.owner == self.node
            and row.previous in self.dead
            and row.server not in self.hosted
            and row.server not in self.arriving
        )

    def burials(
        self, node: NodeId, rows: Iterable[tuple[Row, int]], now_ms: int
    ) -> tuple[list[tuple[Row, int]], bool]:
        """What this node does about the rows that a dead node leaves behind.

        Args:
            node: Seen dead, and told to this core.
            rows: All rows with their revisions, as just read.
            now_ms: The time.

        Returns:
            The rows to mark lost now, each by a swap at its revision; and whether all rows have
            to be read again after that. They have if any was to be marked: the swap may be
            refused because the dead node's own last commit came through before it, to a node
            that has nothing of the server any more. They have also while this node is one end
            of a move whose other end is dead: its copy may be given up yet, or be taken back.
            Once they are settled they are to be read once more, `LAST_WORD_MS` after the death:
            what the dead node itself had asked for may come through until then. It may have
            written a row of its own, or have taken out of one the journal for whose sake the row
            was left alone.
        """
        concerned = [
            item
            for item in rows
            if node in (item[0].owner, item[0].previous) or node in item[0].standbys
        ]
        mine = [row for row, _ in concerned if self.node in row.standbys]
        mine = [
            row
            for row in mine
            if row.owner in self.dead
            or (row.state is RowState.COMMITTED and row.previous in self.dead)
        ]
        for row in mine:
            self.standbys.consider(row.server, now_ms)
        for row, rev in concerned:
            if self._has_nothing(row) and not self.may_bury(row):
                self.standbys.give_back(row, rev)
        doomed = [item for item in concerned if self.may_bury(item[0])]
        kept = any(
            row.state is RowState.COMMITTED and self.node in (row.owner, row.previous)
            for row, _ in concerned
        )
        return doomed, bool(doomed or mine) or kept

    # ------------------------------------------------------------------ moves

    def move(
        self,
        server: ServerId,
        target: NodeId,
        transfer: TransferId,
        by_value: bool,
        python: str,
        now_ms: int,
    ) -> None:
        """Begin (or queue) a move of a hosted server. `Finish` comes by `Port.perform`.

        The caller has checked that the server is here, is not leaving already, and that
        `target` is another, known node.
        """
        inc = self.hosted[server]
        source = SourceMove(
            node=self.node,
            target=target,
            row=inc.row,
            rev=inc.rev,
            transfer=transfer,
            by_value=by_value,
            python=python,
            times=self.options.move,
        )
        self.leaving[server] = transfer
        if len(self.moves_out) >= self.options.moves_max:
            self._queue.append(source)
            return
        self._begin(source, now_ms)
        self.flush(now_ms)

    def _begin(self, source: SourceMove, now_ms: int) -> None:
        inc = self.hosted.get(source.server)
        if inc is not None and self.standbys.is_changing(inc):
            self.delayed[source.server] = source
            # NB: a disk may hang for ever.
            self.set_timer(("delayed", source.server), now_ms + self.options.move.quiesce_ms)
            return
        self.moves_out[source.transfer] = source
        if inc is None or inc.phase not in (Phase.RUNNING, Phase.STARTING):
            # It stopped while the move was waiting for its turn.
            self._finish_source(source, Finish(Result.ROLLED_BACK, "the server has stopped"))
            return
        source.row, source.rev = inc.row, inc.rev
        source.stream = self.standbys.stream_to(inc, source.target)
        self._apply_source(source, source.start(now_ms), now_ms)
        if source.target in self.dead:
            self._apply_source(source, source.handle(NodeDead(source.target), now_ms), now_ms)

    def _undelay(self, server: ServerId) -> SourceMove | None:
        self.timers.cancel(("delayed", server))
        return self.delayed.pop(server, None)

    def _delayed_too_long(self, server: ServerId) -> None:
        source = self._undelay(server)
        if source is not None:
            reason = "its standbys or its journal have been changing for too long"
            self._finish_source(source, Finish(Result.ROLLED_BACK, reason))

    def move_event(
        self, transfer: TransferId, incoming: bool, event: Happening, now_ms: int
    ) -> None:
        """The result of an action that `Port.perform` was given."""
        if incoming:
            target = self.moves_in.get(transfer)
            if target is not None:
                self._apply_target(target, target.handle(event, now_ms), now_ms)
        else:
            source = self.moves_out.get(transfer)
            if source is not None:
                self._apply_source(source, source.handle(event, now_ms), now_ms)
        self.flush(now_ms)

    def withdraw_moves(self, reason: str, now_ms: int) -> None:
        """Give up every move that can still be given up; this node is closing."""
        delayed = [self._undelay(server) for server in list(self.delayed)]
        for source in [*self._queue, *filter(None, delayed)]:
            self._finish_source(source, Finish(Result.ROLLED_BACK, reason))
        self._queue.clear()
        for source in list(self.moves_out.values()):
            self._apply_source(source, source.handle(Withdraw(reason), now_ms), now_ms)
        for target in list(self.moves_in.values()):
            self._apply_target(target, target.handle(Withdraw(reason), now_ms), now_ms)
        self.flush(now_ms)

    def freeze(self, transfer: TransferId, now_ms: int) -> Incarnation | None:
        """From here on the server admits, acknowledges and fires nothing.

        Called by the shell between the last hook and the capture; None if the move is over.
        """
        source = self.moves_out.get(transfer)
        inc = self.hosted.get(source.server) if source is not None else None
        if (
            inc is None
            or inc.phase is not Phase.QUIESCING
            or not inc.quiet()
            or source is None
            or source.phase is not SourcePhase.ENCODING
        ):
            return None
        inc.phase = Phase.FROZEN
        inc.sender.muted = True
        return inc

    def export(self, inc: Incarnation, now_ms: int) -> StateRecord:
        """What travels with a frozen server besides its object."""
        return export(inc, self.port.pack, now_ms)

    def install(
        self, transfer: TransferId, record: StateRecord, host: object, now_ms: int
    ) -> Incarnation | None:
        """Build the copy of an incoming move; None if the move is over.

        Raises:
            PeerError: The record contradicts itself; nothing of it is kept.
        """
        target = self.moves_in.get(transfer)
        if target is None or target.phase is not TargetPhase.DECODING:
            # Over; or begun anew by a late Prepare, which will get its own state or end.
            return None
        placeholder = Row(target.server, 0, self.node, RowState.COMMITTED, transfer, "", "", 0)
        inc = restore(record, placeholder, 0, host, self.route_hint, self.options.window, now_ms)
        self.copies[transfer] = inc
        self.standbys.installed(transfer, inc)
        return inc

    def _on_prepare(self, prepare: Prepare, node: NodeId, now_ms: int) -> None:
        known = self.moves_in.get(prepare.transfer)
        if known is not None:
            self._apply_target(known, known.handle(prepare, now_ms), now_ms)
            return
        target = TargetMove(node=self.node, source=node, prepare=prepare, times=self.options.move)
        refusal = self.refuse_moves
        if len(self.moves_in) >= self.options.moves_in_max:
            refusal = f"it is taking in {len(self.moves_in)} servers at the moment"
        elif prepare.server in self.hosted:
            refusal = "it already holds this server"
        elif prepare.server in self.arriving:
            other = self.moves_in[self.arriving[prepare.server]]
            if other.source == node or other.prepare.epoch < prepare.epoch:
                # A newer move of the same server: the former one is over at its source.
                self._apply_target(other, other.handle(Withdraw("superseded"), now_ms), now_ms)
            if prepare.server in self.arriving:
                refusal = "another move of this server to it is under way"
        if refusal:
            for action in target.refuse(refusal):
                if isinstance(action, Tell):
                    self.send(action.node, action.message)
            return
        target.follows = self.standbys.can_go_on(prepare.server, prepare.stream)
        self.moves_in[prepare.transfer] = target
        self.arriving[prepare.server] = prepare.transfer
        self._apply_target(target, target.start(now_ms), now_ms)

    def _on_move_message(self, message: MoveMessage, node: NodeId, now_ms: int) -> None:
        transfer = message.transfer
        source = self.moves_out.get(transfer)
        if source is not None and node == source.target:
            self._apply_source(source, source.handle(message, now_ms), now_ms)
            return
        target = self.moves_in.get(transfer)
        if target is not None and node == target.source:
            self._apply_target(target, target.handle(message, now_ms), now_ms)
            return
        if source is None and target is None:
            answer = answer_unknown(message)
            if answer is not None:
                self.send(node, answer)

    def _quiesced(self, inc: Incarnation, now_ms: int) -> None:
        transfer = self.leaving.get(inc.id)
        source = self.moves_out.get(transfer) if transfer is not None else None
        if source is not None:
            self._apply_source(source, source.handle(Quiesced(), now_ms), now_ms)

    def _apply_source(self, source: SourceMove, actions: list[Action], now_ms: int) -> None:
        transfer = source.transfer
        for action in actions:
            match action:
                case Tell():
                    self.send(action.node, action.message)
                    self.hurry()
                case SetTimer():
                    self.set_timer(("out", transfer), now_ms + action.delay_ms)
                case Reach() if not self.marks:
                    pass
                case Quiesce():
                    inc = self.hosted[source.server]
                    inc.phase = Phase.QUIESCING
                    # One that still holds back leaves only when it is sure to be the owner, and
                    # when its standbys have all that it is about to take along.
                    if inc.quiet() and not inc.holding:
                        self.rest(inc, now_ms)
                case StartForwarding():
                    self._start_forwarding(source, action, now_ms)
                case DropCopy():
                    self._drop_source(source, now_ms)
                    self.port.perform(transfer, False, action)
                case Resume():
                    self._resume(source, action, now_ms)
                    self.port.perform(transfer, False, action)
                case EncodeState() if action.stream:
                    self.port.adopt_stream(transfer, action.stream, False)
                    self.port.perform(transfer, False, action)
                case Finish():
                    self._finish_source(source, action)
                    self.next_move(now_ms)
                case _:
                    self.port.perform(transfer, False, action)

    def _finish_source(self, source: SourceMove, action: Finish) -> None:
        self.moves_out.pop(source.transfer, None)
        if self.leaving.get(source.server) == source.transfer:
            del self.leaving[source.server]
        self.timers.cancel(("out", source.transfer))
        self.port.perform(source.transfer, False, action)

    def next_move(self, now_ms: int) -> None:
        while self._queue and len(self.moves_out) < self.options.moves_max:
            self._begin(self._queue.popleft(), now_ms)

    def _start_forwarding(self, source: SourceMove, action: StartForwarding, now_ms: int) -> None:
        inc = self.hosted.get(source.server)
        if inc is None:
            return
        inc.forwarding_to = (action.node, action.epoch)
        if action.node not in self.dead:
            self.forwarding.learn(source.server, action.node, action.epoch, now_ms)
        late, inc.late = inc.late, Late()
        for env in late:
            self._forward(env, action.node, action.epoch)
        self._relocate(source.server, action.node, action.epoch, now_ms)

    def _relocate(self, server: ServerId, node: NodeId, epoch: int, now_ms: int) -> None:
        """Local senders learn at once where a server went."""
        route = self.routes.get(server)
        if route is not None and epoch > route.epoch:
            route.node, route.epoch = node, epoch
            route.looking = False
            self._retransmit(route, now_ms)

    def _drop_source(self, source: SourceMove, now_ms: int) -> None:
        inc = self.hosted.get(source.server)
        if inc is None:
            return
        del self.hosted[source.server]
        self.standbys.end(inc, now_ms, stays=True)
        self._drop_timers(inc)
        self._forget_sender(inc)
        for env in inc.late:  # fenced: nobody told us where it went
            self.send(env.reply_to, NotHere(env.server, env.session, env.seq))
        inc.late = Late()
        route = self.routes.get(source.server)
        if route is not None and (route.node is None or route.node == self.node):
            self._look_or_wait(route, now_ms)

    def _forget_sender(self, inc: Incarnation) -> None:
        """The copy here sends no more; its sessions go on elsewhere, so nobody is told."""
        for session in [*inc.sender.sessions.values(), *inc.sender.chained.values()]:
            for out in [*session.outstanding.values(), *session.waiting]:
                out.token = None
                self._resolve(out, CLOSED, b"", None)  # ends its waits; nobody is told
            self._drop_sending(session)

    def _resume(self, source: SourceMove, action: Resume, now_ms: int) -> None:
        """Serve again here; the shell calls `started` when the hook is over."""
        inc = self.hosted.get(source.server)
        if inc is None:
            return
        was_frozen = inc.phase is Phase.FROZEN
        inc.row, inc.rev = action.row, action.rev
        inc.sender.epoch = action.row.epoch
        inc.phase = Phase.STARTING
        inc.starting = True
        inc.forwarding_to = None
        self.forwarding.forget(inc.id)
        inc.sender.muted = inc.holding
        late, inc.late = inc.late, Late()
        for env in late:
            self._arrive(inc, env, now_ms)
        if was_frozen:
            self._come_home(inc, now_ms)
        if inc.replica is not None:
            if source.stream and was_frozen:
                self.standbys.move_failed(inc, source.target, now_ms)
            self.standbys.go_on(inc, now_ms)

    def _come_home(self, inc: Incarnation, now_ms: int) -> None:
        """Local senders find the server here; its own requests go on from here."""
        route = self.routes.get(inc.id)
        if route is not None:
            route.looking = False
            route.node = self.node
            route.epoch = max(route.epoch, inc.row.epoch)
            self._retransmit(route, now_ms)
        if not inc.holding:
            self._send_outstanding(inc, now_ms)

    def _send_outstanding(self, inc: Incarnation, now_ms: int) -> None:
        for session in [*inc.sender.sessions.values(), *inc.sender.chained.values()]:
            for out in list(session.outstanding.values()):
                if out.seq in session.outstanding:
                    self.dispatch(session, out, now_ms)
            self.settled(session, now_ms)
            self._arm_repeat(session, now_ms)

    def _apply_target(self, target: TargetMove, actions: list[Action], now_ms: int) -> None:
        transfer = target.transfer
        for action in actions:
            match action:
                case Tell():
                    self.send(action.node, action.message)
                    self.hurry()
                case SetTimer():
                    self.set_timer(("in", transfer), now_ms + action.delay_ms)
                case Reach() if not self.marks:
                    pass
                case GoLive():
                    self._go_live(target, action, now_ms)
                    self.port.perform(transfer, True, action)
                case Release():
                    self._release(target, action, now_ms)
                    self.port.perform(transfer, True, action)
                case DropCopy():
                    self._drop_target(target, now_ms)
                    self.port.perform(transfer, True, action)
                case DecodeState() if action.stream:
                    if self.standbys.use_up(target.server, action.stream, transfer):
                        self.port.perform(transfer, True, action)
                    else:
                        failed = DecodeFailed("it does not stand by any more")
                        self._apply_target(target, target.handle(failed, now_ms), now_ms)
                case Finish():
                    self.moves_in.pop(transfer, None)
                    self.timers.cancel(("in", transfer))
                    if self.arriving.get(target.server) == transfer:
                        del self.arriving[target.server]
                    self._turn_away(target.server)
                    self.port.perform(transfer, True, action)
                case _:
                    self.port.perform(transfer, True, action)

    def _turn_away(self, server: ServerId) -> None:
        for env in self._knocking.pop(server, ()):
            self.send(env.reply_to, NotHere(server, env.session, env.seq))

    def _go_live(self, target: TargetMove, action: GoLive, now_ms: int) -> None:
        inc = self.copies.pop(target.transfer)
        inc.row, inc.rev = action.row, action.rev
        self.standbys.forget_server(inc.id)
        self.arriving.pop(inc.id, None)
        self._settle_in(inc)
        self._come_home(inc, now_ms)
        for env in self._knocking.pop(inc.id, ()):
            self._arrive(inc, env, now_ms)

    def _settle_in(self, inc: Incarnation) -> None:
        """A copy that was built from a record becomes the server."""
        inc.sender.epoch = inc.row.epoch
        inc.phase = Phase.STARTING
        self.hosted[inc.id] = inc
        self.forwarding.forget(inc.id)
        self.tombstones.pop(inc.id, None)
        for session in [*inc.sender.sessions.values(), *inc.sender.chained.values()]:
            # The sweep may have dropped a route that only a copy not yet live knew.
            known = session.route
            route = session.route = self.route_hint(session.server, known.node or "", known.epoch)
            self.sending[session.id] = session
            route.sessions[session.id] = session

    def end_arrival(self, transfer: TransferId) -> None:
        """The copy of a move to here takes over: the move is over."""
        self.copies.pop(transfer, None)
        target = self.moves_in.pop(transfer, None)
        self.timers.cancel(("in", transfer))
        if target is not None:
            if self.arriving.get(target.server) == transfer:
                del self.arriving[target.server]
            self._turn_away(target.server)
            self.port.perform(transfer, True, Finish(Result.FENCED, "it took the server over"))

    def take_over(self, inc: Incarnation, now_ms: int, journal: TransferId = "") -> None:
        """A standby has become the owner; `started` follows when its hook is over.

        Args:
            inc: Its copy.
            now_ms: The time.
            journal: Id of the journal that it was read from; empty: it stood by.
        """
        inc.holding = False
        inc.sender.muted = False
        self._settle_in(inc)
        self.standbys.take_on(inc, now_ms, journal)
        # Whoever has asked the former owner asks again here, at once.
        for node in {session.reply_to: None for session in inc.sessions.values()}:
            if node != self.node and node not in self.dead:
                self.send(node, Moved(inc.id, self.node, inc.row.epoch, True))
        self._come_home(inc, now_ms)

    def row_changed(self, inc: Incarnation, now_ms: int) -> None:
        """The owner's swap has changed who stands by; a move may begin that waited for it."""
        route = self.routes.get(inc.id)
        if route is not None:
            route.epoch = max(route.epoch, inc.row.epoch)
        source = self._undelay(inc.id)
        if source is not None:
            self._queue.appendleft(source)
            self.next_move(now_ms)

    def withdraw_move(self, transfer: TransferId, why: Withdraw, now_ms: int) -> None:
        """Give a move up, if that is still possible."""
        source = self.moves_out.get(transfer)
        if source is not None:
            self._apply_source(source, source.handle(why, now_ms), now_ms)

    def drop_deposed(self, inc: Incarnation, now_ms: int) -> None:
        """Another node owns the server: this copy ends, and nothing that it holds back gets out."""
        # Its handlers may run on; nobody hears what they end in.
        inc.holding = True
        inc.sender.muted = True
        source = self._undelay(inc.id)
        if source is not None:
            self._finish_source(source, Finish(Result.FENCED, "another node has taken it over"))
        self._drop_live(inc, now_ms)

    def _release(self, target: TargetMove, action: Release, now_ms: int) -> None:
        inc = self.hosted.get(target.server)
        if inc is None or not inc.holding:
            return
        if action.rev:
            inc.rev = action.rev
            inc.row = target.row if target.row is not None else inc.row
        inc.holding = False
        inc.sender.muted = False
        self.standbys.take_on(inc, now_ms)
        held, inc.held = inc.held, []
        for node, message in held:
            self._tell(inc, node, message)
        self._send_outstanding(inc, now_ms)
        self.pump_soon(inc)
        if inc.phase is Phase.QUIESCING:
            self.rest(inc, now_ms)

    def _drop_target(self, target: TargetMove, now_ms: int) -> None:
        inc = self.copies.pop(target.transfer, None)
        if inc is not None:
            return  # never live: nobody knew it
        inc = self.hosted.get(target.server)
        if inc is None or not inc.holding:
            return
        self._drop_live(inc, now_ms)

    def _drop_live(self, inc: Incarnation, now_ms: int) -> None:
        del self.hosted[inc.id]
        # Its handlers may still be running in the shell; nothing they do counts any more.
        inc.phase = Phase.FROZEN
        for entry in inc.mailbox:
            if entry.kind == QUIESCE:
                self.port.not_quiesced(entry.args)
        inc.mailbox.clear()
        inc.mailbox_bytes = 0
        self._drop_timers(inc)
        inc.held = []
        self._forget_sender(inc)
        source = self.moves_out.get(self.leaving.get(inc.id, ""))
        if source is not None:
            gone = Withdraw("the server was taken back by the node it came from")
            self._apply_source(source, source.handle(gone, now_ms), now_ms)
        route = self.routes.get(inc.id)
        if route is not None:
            route.node = None
            self._look_or_wait(route, now_ms)
