"""Sessions: numbers, repeats, windows and completion records.

Theory of operation (DESIGN section 5; RIFL, Lee et al., SOSP 2015). A sender numbers its
requests to one server 1, 2, 3, ... under a session id of its own. The owner takes them in that
order whatever order they arrive in, and keeps each result until the sender says that it no
longer waits for it (`acked_below`). So a request may be repeated at will: by a time-out, by a
reconnect, by a forwarder, by the sender's own move; it runs once.

The per-message path: plain methods of slotted objects, no event objects. What is made anew for each
message is a Struct, because that is made in C (80 ns against 185).

Sender: an `Outgoing` waits un-numbered until the window has room, is numbered, sent, repeated,
and settled by a Reply (call) or a Receipt (cast). `low` is the lowest number not yet settled;
it is what `acked_below` says. Receiver: `expected` is the next number to admit; below it a
request is done (it has a record, or it is forgotten) or still pending in the mailbox.

Flow control: the window is the sender's own limit. An owner whose mailbox is full refuses with
a Receipt that says how many more it takes; the sender keeps the refused numbers and gives no
new ones beyond, so that what comes later waits un-numbered, where it can still be withdrawn.
A sender with nothing outstanding may always send one, whatever it was granted: that request is
repeated until it is answered, so a grant that got lost, or came out of order, stalls nobody
(TCP's zero-window probe, RFC 9293 section 3.8.6.1).

A mailbox is full by the number of its messages or by the bytes that their arguments take. Each is
taken while there is less than the bound, whatever it takes itself: so the bound is passed by one
message at the most, none is too large ever to be taken, and a large one is refused no longer than
small ones are. To a sender that was refused for bytes the owner grants as many more as would fit if
they all took what the refused one does, until the next sweep that finds the mailbox empty; else it
would send a whole window of them, again and again, for the few that there is room for.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from msgspec import Struct

from migrate.core.clock import SharedClock
from migrate.core.ids import Epoch, NodeId, ServerId, SessionId, session_born_ms, session_sender
from migrate.core.messages import CALL, EMPTY

if TYPE_CHECKING:
    from migrate.core.records import StepRecord
    from migrate.core.standby import Replica

NEVER = 1 << 62
"""A time or a number that is never reached."""

MET_MAX = 10_000
"""Servers whose generation one sender remembers after its session with them is over. One that is
forgotten costs a sender the news of a roll-back, if it then asks for the server by name."""

QUIESCE = -1
"""Kind of the entry that keeps a server at a quiescent point; it never comes from elsewhere."""


class Outgoing(Struct, eq=False):
    """One request at its sender, from the making of the call to its settlement.

    `token` is the shell's (who waits for the result); None once nobody does. `args` are live
    objects as long as they need no bytes; `payload` are those bytes.
    """

    kind: int
    method: str
    payload: bytes | None
    args: object
    chain: tuple[str, ...]
    deadline_ms: int
    token: object
    run: str
    seq: int = 0
    sent_ms: int = -1  # never sent
    sent_epoch: Epoch = 0  # of the server's owner, as it was believed then
    admitted: bool = False
    hurried: int = 0  # times it was sent again out of turn
    withdrawn: int = 0  # the status it then ends in
    leaves: int = 0  # once the sender's standbys have acknowledged this number
    wait: bool = True  # for room in the mailbox


class Route:
    """Where a server is believed to be; shared by all sessions of one core to that server."""

    __slots__ = ("attempts", "epoch", "looking", "node", "refused", "server", "sessions")

    def __init__(self, server: ServerId) -> None:
        self.server = server
        self.node: NodeId | None = None
        self.epoch: Epoch = 0
        self.looking = False
        self.attempts = 0
        self.refused: NodeId | None = None  # the node that last said NotHere
        self.sessions: dict[SessionId, SendSession] = {}


class SendSession:
    """The sender's half of one session."""

    __slots__ = (
        "acked_told",
        "chained",
        "deadline_ms",
        "generation",
        "grant",
        "grant_epoch",
        "id",
        "last_used_ms",
        "low",
        "next_seq",
        "outstanding",
        "repeat_armed",
        "repeats",
        "route",
        "safe_low",
        "sender",
        "server",
        "waiting",
        "window",
    )

    def __init__(
        self,
        id: SessionId,
        server: ServerId,
        sender: Sender,
        route: Route,
        window: int,
        now_ms: int,
    ) -> None:
        self.id = id
        self.server = server
        self.sender = sender
        self.route = route
        self.window = window
        self.next_seq = 1
        self.low = 1
        self.outstanding: dict[int, Outgoing] = {}
        self.waiting: deque[Outgoing] = deque()
        self.grant = NEVER
        self.grant_epoch: Epoch = 0  # of the owner that is believed to have given it
        self.last_used_ms = now_ms
        self.acked_told = 1
        self.repeat_armed = False
        self.repeats = 0
        self.deadline_ms = NEVER
        self.chained = False
        # An epoch of the generation that its requests are meant for; 0: not yet bound to one.
        self.generation: Epoch = 0
        # Below it nothing is asked for again, whichever standby of the sender takes over.
        self.safe_low = 1

    def told_low(self) -> int:
        """What `acked_below` may say: results that a failover may need again stay awaited."""
        return self.low if self.sender.gate is None else min(self.low, self.safe_low)

    def has_room(self) -> bool:
        """Whether the next number may be given."""
        next_seq = self.next_seq
        return next_seq - self.low < self.window and (next_seq < self.grant or not self.outstanding)

    def number(self, out: Outgoing) -> int:
        """Give `out` the next number."""
        seq = out.seq = self.next_seq
        self.next_seq = seq + 1
        self.outstanding[seq] = out
        return seq

    def settle(self, seq: int) -> Outgoing | None:
        """Take out what `seq` was about, or None if that is settled already."""
        outstanding = self.outstanding
        out = outstanding.pop(seq, None)
        if not outstanding:
            self.low = self.next_seq
        elif out is not None and seq == self.low:
            low = seq + 1
            next_seq = self.next_seq
            while low < next_seq and low not in outstanding:
                low += 1
            self.low = low
        return out

    def receipt(
        self, admitted_below: int, window: int, *, may_be_former: bool = False
    ) -> list[Outgoing]:
        """Take a receipt: everything below `admitted_below` was admitted.

        Args:
            admitted_below: See `Receipt`.
            window: See `Receipt`.
            may_be_former: It came from where the server is believed not to be (any more): what it
                grants may be used, and nothing that another one granted is taken back.

        Returns:
            Casts (and withdrawn numbers) that are settled by it, in order.
        """
        settled = []
        top = min(admitted_below, self.next_seq)
        for seq in [s for s in self.outstanding if s < top]:
            out = self.outstanding[seq]
            out.admitted = True
            if out.kind != CALL and out.kind != EMPTY:
                self.settle(seq)
                settled.append(out)
        grant = NEVER if window < 0 else max(admitted_below, 1) + window
        self.lift()
        if not may_be_former or grant > self.grant:
            self.grant = grant
            self.grant_epoch = self.route.epoch
        return settled

    def lift(self) -> None:
        """Forget what another owner granted: the present one knows nothing of it, and adds none."""
        if self.grant < NEVER and self.route.epoch > self.grant_epoch:
            self.grant = NEVER

    def idle(self) -> bool:
        """Nothing outstanding, nothing waiting."""
        return not self.outstanding and not self.waiting


class Sender:
    """One who sends: a node or client on its own account, or a hosted server.

    A `muted` one sends nothing: its copy is frozen, or live and not yet released. What one with a
    `gate` sends waits for its standbys.
    """

    __slots__ = ("chained", "epoch", "gate", "id", "met", "muted", "over", "replays", "sessions")

    def __init__(self, id: str, epoch: Epoch = 0) -> None:
        self.id = id
        self.epoch = epoch
        self.muted = False
        self.gate: Replica | None = None
        # After a failover: requests that were made before it in the middle of a run, by the message
        # (session, number) that was handled. Its handler has to make them again.
        self.replays: dict[tuple[SessionId, int], deque[StepRecord]] | None = None
        # What became of sessions that ended while it had `replays`: status and answer.
        self.over: dict[SessionId, tuple[int, bytes]] = {}
        # Servers it had a session with that is over: an epoch of the generation it met. If the
        # server has gone back in time since, this sender has yet to be told.
        self.met: dict[ServerId, Epoch] = {}
        self.sessions: dict[ServerId, SendSession] = {}
        # Re-entrant calls travel in sessions of their own, one per chain, so that the order
        # of the ordinary session does not block them.
        self.chained: dict[SessionId, SendSession] = {}

    def remember(self, server: ServerId, generation: Epoch) -> None:
        """Keep which generation of a server this sender knows, now that a session is over."""
        known = self.met.pop(server, 0)
        self.met[server] = max(known, generation)
        if len(self.met) > MET_MAX:
            del self.met[next(iter(self.met))]


class Record:
    """A stored result: what a repeat of the request is answered with."""

    __slots__ = ("payload", "status")

    def __init__(self, status: int, payload: bytes) -> None:
        self.status = status
        self.payload = payload


class Entry(Struct, eq=False):
    """One message in a mailbox: a request, or (session None) a timer of the server itself."""

    session: ReceiveSession | None
    seq: int
    kind: int
    method: str
    payload: bytes | None
    args: object
    chain: tuple[str, ...]
    deadline_ms: int
    trace: str = ""
    size: int = 0  # bytes that its arguments take, of one that has to wait
    run: int = 0  # the number of its run, once it has begun
    diverged: bool = False  # after a failover it did not make the requests that it had made
    kept: bool = False  # taken in before a failover: here whether there is room or not
    waits: bool = False  # its handler may make requests and wait for them; of a gated server

    def key(self) -> tuple[SessionId, int]:
        """What tells the message from others, also after a failover."""
        return (self.session.id, self.seq) if self.session is not None else ("", self.seq)


class ReceiveSession:
    """The owner's half of one session; part of the server's state."""

    __slots__ = (
        "acked_below",
        "early",
        "ended",
        "expected",
        "granted",
        "heard_ms",
        "id",
        "pending",
        "records",
        "refused_bytes",
        "reply_to",
        "sender_epoch",
        "starved",
    )

    def __init__(self, id: SessionId, reply_to: NodeId, now_ms: int) -> None:
        self.id = id
        self.reply_to = reply_to
        self.expected = 1
        self.acked_below = 1
        self.early: dict[int, Entry] = {}
        self.records: dict[int, Record] = {}
        self.heard_ms = now_ms
        self.sender_epoch: Epoch = 0
        self.starved = False
        self.granted = 0  # while starved: numbers below it may be sent, as it was told
        # What its largest refused message takes, since they were refused for their bytes.
        self.refused_bytes = 0
        self.ended = False  # the sender has closed it; kept until its id is too old to open one
        self.pending = 0  # admitted calls that have no result yet

    def acknowledge(self, below: int) -> int:
        """Free the records below `below`; returns how many bytes that freed."""
        freed = 0
        records = self.records
        if records:
            # NB: results come in order but for re-entrant runs, so look at them all.
            for seq in [s for s in records if s < below]:
                freed += len(records.pop(seq).payload)
        self.acked_below = below
        return freed


def may_open(session: SessionId, clock: SharedClock, now_ms: int, expiry_ms: int) -> bool:
    """Whether an unknown session may be opened by its number 1.

    A session whose state was dropped had been silent for `expiry_ms`, so its id is at least
    that old; ids older than half of it are refused, which leaves the other half for clocks
    that differ and messages that were late.
    """
    return clock.age(session_born_ms(session), now_ms) < expiry_ms // 2


__all__ = [
    "NEVER",
    "QUIESCE",
    "Entry",
    "Outgoing",
    "ReceiveSession",
    "Record",
    "Route",
    "SendSession",
    "Sender",
    "may_open",
    "session_sender",
]
