"""Hot standbys: what an owner tells them, what waits for them, and how one of them takes over.

Theory of operation (DESIGN section 7; primary-backup with the configuration kept outside, as in
PacificA, Lin and others 2008). The row names owner, epoch and standbys. The owner's state leaves it
as a log of *cuts* (the state at a quiescent point: whole at first, then what changed), *steps* (a
request that a handler makes in the middle of its run) and *notes* (what is admitted, or answered
without a handler, during such a run). All are numbered; a standby keeps them in order and says how
far it has come.

Outputs. What a handler of a gated server returns, reads included, waits for the cut that follows,
until every standby has acknowledged that one; other answers and receipts wait for a cut or note. So
whatever anybody has seen is at every standby, and every standby was asked after the request came. A
request that a handler makes waits for its step; one that a plain handler makes, which cannot wait
for the answer, waits for the cut after it. Handlers go on meanwhile.

Joining. A standby is asked (Follow), gets what is large ahead in chunks, then a whole cut, which it
loads for a trial. From the next cut on it is waited for; once it has acknowledged that one, the
owner asks for the swap that puts it into the row. So when the row names it, it has all that was
ever let out.

Leaving. A standby that is dead, silent for too long, or not wanted, is taken out of the row by a
swap too. Until that has taken effect, what waits for it goes on waiting.

Taking over. A standby that the row names and whose owner is dead, or suspected, loads what it has,
refuses from then on whatever is of the row's epoch or below (fence first), and asks for the swap
that makes it the owner (then swap). Its former owner gets no acknowledgement any more, so it lets
nothing out, whatever it believes; it steps down when it hears of it. Clocks decide only when
somebody suspects.

Going back in time. A server that is replaced by what a checkpoint holds has the same standbys and
the same journal again, but nothing of what they have: the row of the new generation names none, so
nobody takes over with what was before. Nothing is let out before they are named again, or failed.

New owners. After a failover or a move the row names standbys that may be ahead of the new owner, or
behind. They are asked to follow anew, and nothing is let out before they have acknowledged a whole
cut, or are out of the row. Until then each keeps what it had: it was enough for all that was let
out.

In doubt. A swap whose outcome is unknown is asked for again, the same row at the same revision,
until it is known. One swap at a time.

Repeating. After a failover a handler that had made requests in the middle of its run is run first,
and has to make the same again, under the same numbers; the receivers answer from their records.
What differs ends in DIVERGED. For that nothing a failover may need is ever acknowledged to
receivers (`SendSession.safe_low`).

Mode ASYNC: nothing waits, within bounds of time and bytes. A standby that takes over then has the
server as it was: a new generation begins, as with a checkpoint.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from migrate.core import directory
from migrate.core.delivery import NEVER, Entry, Outgoing, SendSession
from migrate.core.directory import Mode, Row, RowState
from migrate.core.events import Copied, RowRead, SwapOutcome, SwapResult, Withdraw
from migrate.core.ids import NodeId, ServerId, TransferId, node_name
from migrate.core.incarnation import (
    Changes,
    Image,
    Incarnation,
    Phase,
    contradiction,
    cut,
    cut_for_rollback,
    entry_record,
    note,
    restore,
)
from migrate.core.messages import (
    Chunk,
    ChunkTaken,
    Cut,
    Follow,
    Following,
    FollowRefused,
    KeepRefused,
    Kept,
    Message,
    Note,
    Receipt,
    Reply,
    StandbyMessage,
    Step,
    Unfollow,
)
from migrate.core.records import EntryRecord, StateRecord, StepRecord

if TYPE_CHECKING:
    from migrate.core.node import Core

LOAD_BYTES_PER_MS = 2_000
"""Slowest standby that is still waited for. Small records are loaded at 20,000 to 60,000 bytes in a
millisecond by a core that has nothing else to do."""

OVER_MAX = 1_000
"""Streams that are over and known to be; what is sent in one comes late by seconds at most."""

Logged: TypeAlias = Cut | Step | Note
"""What is in a server's log, in the order of its numbers."""

JOURNAL: NodeId = "journal"
"""The follower that is a journal on this node; no node has such an id."""


@dataclass(frozen=True, slots=True)
class StandbyTimes:
    """Waits and bounds of standbys; milliseconds where the name says so.

    Attributes:
        repeat_ms: What has no answer is sent again after this; well above a round trip.
        join_ms: A standby that cannot be asked, or not be fed, for this long does not join.
        patience_ms: A standby that acknowledges nothing for this long, though there is something,
            is taken out of the row: what waits for it waits no longer than that and a swap.
        cuts_max: Cuts on the way at a time; what is made meanwhile goes with the next one.
        async_cut_ms: In mode ASYNC, time between two cuts.
        async_lag_ms: In mode ASYNC, the oldest thing let out that no standby has yet may be so old;
            then what comes after it waits.
        async_lag_bytes: And so much may be on the way.
        copy_bytes: A round of what is sent ahead of the first cut that is not larger is the last.
        rounds_max: Rounds of what is sent ahead.
    """

    repeat_ms: int = 250
    join_ms: int = 10_000
    patience_ms: int = 2_000
    cuts_max: int = 2
    async_cut_ms: int = 10
    async_lag_ms: int = 1_000
    async_lag_bytes: int = 64 << 20
    copy_bytes: int = 256 << 10
    rounds_max: int = 5


class CaptureFailed(Exception):
    """The object cannot be captured for its standbys; the text says why."""


class Changed(enum.Enum):
    """What the shell is told of a server's standbys."""

    JOINED = "joined"  # in the row
    LEFT = "left"  # out of it, as wanted
    LOST = "lost"  # out of it, or about to be: dead, silent, or without its copy
    FAILED = "failed"  # did not join
    UNCAPTURED = "uncaptured"  # the state cannot travel: the server goes on alone
    PROMOTED = "promoted"  # this node has taken over
    UNFIT = "unfit"  # this node could not take over


class Standing(enum.Enum):
    """How far a follower is."""

    JOINING = "joining"  # not in the row
    IN_SYNC = "in sync"
    RESYNCING = "resyncing"  # in the row, with what the former owner gave it
    LEAVING = "leaving"


class Leftover(enum.Enum):
    """What is to be done with a journal that nobody writes to."""

    OPEN = "open"
    WAIT = "wait"  # read the row again later
    USELESS = "useless"  # no row can ever name it again


class StandbyPort(Protocol):
    """What standbys need of the shell. Every method returns at once; none calls the core back."""

    def capture(self, inc: Incarnation, stream: TransferId, number: int) -> bytes:
        """The object's part of a cut, against what this stream has had; at a quiescent point.

        Raises:
            CaptureFailed: Nothing of the stream is lost by it.
        """

    def may_wait(self, inc: Incarnation, entry: Entry) -> bool:
        """Whether the handler of a message may wait in the middle of its run."""

    def code_of(self, inc: Incarnation) -> tuple[bool, str]:
        """Whether its class travels by value, and this Python."""

    def digest(self, payload: bytes) -> int:
        """What tells the arguments of one request from others; 0 if nothing does reliably."""

    def copy_for(self, inc: Incarnation, stream: TransferId) -> None:
        """Capture some more of what goes ahead; `copied_for` follows."""

    def end_stream(self, stream: TransferId) -> None:
        """Forget what there is of a stream, at either side."""

    def check_follow(self, follow: Follow) -> None:
        """Can the class be had here? `follow_checked` follows."""

    def keep_chunk(self, stream: TransferId, number: int, state: bytes) -> None:
        """Install what came ahead; `chunk_kept` follows."""

    def keep_delta(
        self, stream: TransferId, number: int, first: bool, state: bytes
    ) -> bool | str | None:
        """Keep the object's part of a cut. True: done; a reason: impossible; None: `delta_kept`."""

    def journal(self, inc: Incarnation, message: Logged) -> None:
        """Append to the journal; `journaled` follows."""

    def journal_goes_on(self, stream: TransferId) -> None:
        """The row has been swapped since `journal_fenced`: the journal is this owner's still."""

    def has_stream(self, stream: TransferId) -> bool:
        """Whether a move there should go on with what was told by it: the object is large."""

    def adopt_stream(self, transfer: TransferId, stream: TransferId, incoming: bool) -> None:
        """A move to a standby goes on with its stream, as if its state had gone ahead."""

    def configure(self, server: ServerId, row: Row, rev: int) -> None:
        """Swap; `configured` follows."""

    def load_backup(self, backup: Backup) -> None:
        """Build the object from what was kept; `backup_loaded` follows."""

    def promote(self, server: ServerId, row: Row, rev: int) -> None:
        """Swap; `promoted` follows."""

    def read_standby_row(self, server: ServerId) -> None:
        """Read the row; `standby_row` follows."""

    def wall_s(self) -> float:
        """Seconds since 1970, to be told to people."""

    def begin(self, inc: Incarnation, hook: str) -> None:
        """Run a hook, then `Core.started`."""

    def deposed(self, inc: Incarnation, cause: str) -> None:
        """This copy is not the server any more."""

    def standbys_changed(self, server: ServerId, node: NodeId, what: Changed, cause: str) -> None:
        """For people, and for whoever completes the set."""


class FollowerPhase(enum.IntEnum):
    """How far a standby has come, as its owner sees it."""

    ASKED = 0
    COPYING = 1
    DUE = 2  # for its whole cut
    FED = 3


class Follower:
    """One standby, as its owner sees it."""

    __slots__ = (
        "acked",
        "anew",
        "asserts",
        "bytes",
        "cause",
        "checks",
        "chunk",
        "chunks",
        "configured",
        "fenced",
        "first",
        "gates",
        "leaving",
        "node",
        "phase",
        "progress_ms",
        "round_bytes",
        "rounds",
        "sent_bytes",
        "sent_ms",
        "stream",
        "unacked",
        "unnamed",
    )

    def __init__(self, node: NodeId, stream: TransferId, configured: bool, now_ms: int) -> None:
        self.node = node
        self.stream = stream
        self.configured = configured  # the row names it, or a swap was asked for that does
        self.phase = FollowerPhase.ASKED
        self.acked = 0
        self.first = 0  # number of its whole cut
        self.gates = 0  # number of the cut from which on it is waited for, so as to be in the row
        self.unacked: deque[Logged] = deque()
        self.bytes = 0  # of what is unacked
        self.sent_bytes = 0
        self.sent_ms = now_ms
        self.progress_ms = now_ms  # since when it owes an answer, or its last one
        self.checks = 0  # since then: whether it still has what it had
        self.leaving = False
        self.anew = False  # a journal whose next cut is to be whole
        # It is waited for before the row names it: a journal of a new owner, while the row names
        # the former owner's; or whoever had the generation before this one (see `take_up`).
        self.unnamed = False
        self.fenced = False  # a journal that another writer has begun to open
        self.asserts = False  # and the swap that is under way shows whose it is
        self.cause = ""
        self.chunks = 0
        self.chunk = b""
        self.rounds = 0
        self.round_bytes = 0


class Replica:
    """A server's log for its standbys, at its owner."""

    __slots__ = (
        "acked",
        "asked",
        "changes",
        "cuts",
        "due",
        "failed",
        "followers",
        "held",
        "lag_since_ms",
        "lows",
        "mode",
        "number",
        "outs",
        "retry_ms",
        "swap",
        "swap_rev",
        "tracks",
        "uncut",
        "uncut_outs",
        "unnoted",
        "wanted",
        "wanted_journal",
        "wanted_mode",
    )

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.tracks = mode is Mode.SYNC  # what changes of sessions; a new generation needs none
        self.number = 0
        self.acked = 0
        self.followers: dict[TransferId, Follower] = {}
        self.changes = Changes()
        self.due = False
        self.cuts: deque[int] = deque()  # on the way
        # What is let out: before the next cut, and by the number of the cut that it waits for.
        self.uncut: list[tuple[NodeId, Message]] = []
        self.unnoted: list[tuple[NodeId, Message]] = []
        self.held: deque[tuple[int, list[tuple[NodeId, Message]]]] = deque()
        self.uncut_outs: list[tuple[SendSession, Outgoing]] = []
        self.outs: deque[tuple[int, SendSession, Outgoing]] = deque()
        self.lows: deque[tuple[int, list[tuple[SendSession, int]]]] = deque()
        self.swap: Row | None = None
        self.swap_rev = 0
        self.asked = False  # for the swap, and the result has not come
        self.retry_ms = 0
        self.wanted: tuple[NodeId, ...] = ()
        self.wanted_mode = mode
        self.wanted_journal = False
        self.failed: dict[NodeId, str] = {}
        self.lag_since_ms = 0  # ASYNC: since when something let out is not at the standbys

    def gating(self) -> list[Follower]:
        """Those whose acknowledgement is waited for; of an asynchronous server, for its bounds: one
        that has to have its whole cut first may have to wait for a handler, and the server does not
        wait for that.
        """
        return [
            it
            for it in self.followers.values()
            if (it.configured or it.gates)
            and (self.mode is Mode.SYNC or it.phase is FollowerPhase.FED)
        ]

    def is_awaited(self) -> bool:
        """Somebody has to have a whole cut before anything is acknowledged by all."""
        return any(it.phase is FollowerPhase.DUE for it in self.followers.values())

    def unfed(self) -> bool:
        """Whether one that is waited for has not been sent a whole cut by this owner."""
        return any(
            it.configured and not it.leaving and it.phase is not FollowerPhase.FED
            for it in self.followers.values()
        )

    def settled(self) -> bool:
        """Nothing waits to be let out, and all standbys have what they were sent."""
        waiting = self.uncut or self.unnoted or self.held or self.uncut_outs or self.outs
        return not waiting and not any(it.unacked for it in self.gating())


class Claim:
    """An attempt of a standby to take over."""

    __slots__ = ("asked", "doubtful", "host", "loading", "rev", "row", "swap", "unfit")

    def __init__(self) -> None:
        self.row: Row | None = None
        self.rev = 0
        self.loading = False
        self.host: object = None
        self.swap: Row | None = None
        self.asked = False
        self.doubtful = False
        self.unfit = ""


class Backup:
    """What a standby has of one server."""

    __slots__ = (
        "checked",
        "checks",
        "chunks",
        "claim",
        "copy",
        "epoch",
        "follow",
        "heard_ms",
        "image",
        "installing",
        "journal",
        "keeping",
        "kept_s",
        "number",
        "owner",
        "server",
        "stream",
        "used_by",
        "valid",
        "version",
        "waits_ms",
    )

    def __init__(self, follow: Follow, owner: NodeId, now_ms: int) -> None:
        self.follow = follow
        self.server = follow.server
        self.stream = follow.stream
        self.owner = owner
        self.epoch = follow.epoch
        self.version = follow.version
        self.checked = False
        self.chunks = 0
        self.installing = False
        self.keeping: Cut | None = None
        self.number = 0
        self.journal = False  # it was read from the journal whose id is the stream
        self.valid = False  # it has a whole cut
        self.image = Image()
        self.kept_s = 0.0
        self.claim: Claim | None = None
        # A move to here has used it up, and (once it could be loaded) made this copy of it, which
        # is what takes over if the move comes to nothing.
        self.used_by: TransferId = ""
        self.copy: Incarnation | None = None
        # Since when its first cut waits for the end of the claim of what was there before it.
        self.waits_ms = -1
        self.heard_ms = now_ms
        self.checks = 0  # since then: whether it is wanted still


class Standbys:
    """The standbys of servers that this node owns, and what it has of servers of others."""

    def __init__(self, core: Core, port: StandbyPort, times: StandbyTimes) -> None:
        self.core = core
        self.port = port
        self.times = times
        self.backups: dict[ServerId, Backup] = {}
        self.coming: dict[TransferId, Backup] = {}
        self.streams: dict[TransferId, ServerId] = {}  # of followers here
        # Of which this node had a copy, and has it no more: they never begin again.
        self.over: dict[TransferId, None] = {}
        self.suspected: dict[NodeId, None] = {}
        # What owners below these epochs say is refused: while this node tries to take over, and
        # after it did, until the owner that it took over from is sure to know it (see `_unfence`).
        self.fences: dict[ServerId, int] = {}
        # Former owners that may not know it: the node, the epoch they lost to, and how often told.
        self.ousted: dict[TransferId, tuple[NodeId, int, int]] = {}
        self.due: dict[ServerId, Incarnation] = {}  # for a cut
        self._kept: dict[TransferId, Backup] = {}
        self._n = 0

    # ------------------------------------------------------------------ the owner: who stands by

    def replicate(
        self,
        server: ServerId,
        nodes: tuple[NodeId, ...],
        mode: Mode,
        now_ms: int,
        *,
        journal: bool = False,
    ) -> bool:
        """From now on a server is to have these standbys. `Port.standbys_changed` tells of each.

        Args:
            server: Hosted here.
            nodes: Other nodes.
            mode: See `Mode`. To change it, all standbys leave and join again.
            now_ms: The time.
            journal: Whether it has a journal.

        Returns:
            False if the server is not here, leaves, or ends.
        """
        inc = self.core.hosted.get(server)
        if inc is None or inc.holding or inc.phase in (Phase.FROZEN, Phase.STOPPING):
            return False
        replica = inc.replica
        if replica is None:
            if not nodes and not journal:
                return True
            replica = inc.replica = Replica(mode)
        replica.wanted = tuple(node for node in nodes if node != self.core.node)
        replica.wanted_mode = mode
        replica.wanted_journal = journal
        replica.failed.clear()
        self._arrange(inc, replica, now_ms)
        if inc.replica is replica:
            self._acknowledged(inc, replica, now_ms)  # by whoever is left to be waited for
        self.core.flush(now_ms)
        return True

    def standbys_of(self, server: ServerId) -> list[tuple[NodeId, Standing, int]]:
        """Who follows a server hosted here, how far it is, and how many changes it lacks."""
        inc = self.core.hosted.get(server)
        replica = inc.replica if inc is not None else None
        if inc is None or replica is None:
            return []
        found = []
        for follower in replica.followers.values():
            is_fed = follower.phase is FollowerPhase.FED and follower.acked >= follower.first
            if follower.leaving:
                standing = Standing.LEAVING
            elif follower.node in inc.row.standbys or follower.stream == inc.row.journal:
                standing = Standing.IN_SYNC if is_fed else Standing.RESYNCING
            else:
                standing = Standing.JOINING
            found.append((follower.node, standing, max(0, replica.number - follower.acked)))
        return found

    def take_on(self, inc: Incarnation, now_ms: int, opened: TransferId = "") -> None:
        """A new owner, after a move or a failover, asks the standbys in its row to follow anew.

        A journal that was `opened` goes on, under its id: nothing is let out before it holds a
        whole cut of this owner. One of a former owner has all that was let out until then, so it
        stays in the row, and nothing is let out before a journal of this owner's takes its place.
        """
        row = inc.row
        if not row.standbys and not row.journal:
            return
        replica = inc.replica = Replica(row.mode)
        replica.wanted = row.standbys
        if row.journal:
            replica.wanted_journal = True
            self._ask(inc, replica, JOURNAL, now_ms, configured=True, stream=opened)
            for follower in replica.followers.values():
                follower.unnamed = not opened
        for node in row.standbys:
            self._ask(inc, replica, node, now_ms, configured=True)
        if row.mode is Mode.SYNC:
            # NB: what results it has is not what another standby of the former owner has, which may
            # take over next and ask for them again. What may be forgotten is known once all have a
            # cut of this owner's.
            self._gate(inc, replica, safe=False)
            for session in [*inc.sender.sessions.values(), *inc.sender.chained.values()]:
                for out in session.outstanding.values():
                    out.leaves = NEVER
                    replica.uncut_outs.append((session, out))
        self._lose_dead(inc, replica, now_ms)

    def awaited(self, inc: Incarnation) -> list[NodeId]:
        """Who is waited for before a server hosted here answers: sync standbys, and its journal.

        They may not be in its row yet, or not again: see `take_up`.
        """
        replica = inc.replica
        if replica is None or replica.mode is not Mode.SYNC:
            return []
        return [it.node for it in replica.followers.values() if it.configured and not it.leaving]

    def take_up(self, inc: Incarnation, awaited: list[NodeId], now_ms: int) -> None:
        """A server went back in time where it is: it has its standbys, and its journal, anew.

        What they have is of the generation before, so the row names none of them. As its owner
        never answers alone while it has standbys, nothing is let out before the row names each of
        them again, by what is of this generation, or it has failed. In mode ASYNC they join like
        any others.

        Args:
            inc: Its copy, of the new generation.
            awaited: Who was waited for until then.
            now_ms: The time.
        """
        if not awaited:
            return
        replica = inc.replica = Replica(Mode.SYNC)
        replica.wanted = tuple(node for node in awaited if node != JOURNAL)
        replica.wanted_journal = JOURNAL in awaited
        for node in awaited:
            self._ask(inc, replica, node, now_ms, configured=True)
        for follower in replica.followers.values():
            follower.unnamed = True
        self._gate(inc, replica)
        self._lose_dead(inc, replica, now_ms)

    def _lose_dead(self, inc: Incarnation, replica: Replica, now_ms: int) -> None:
        for follower in list(replica.followers.values()):
            if follower.node in self.core.dead:
                self._lose(inc, follower, "its node died", now_ms)
        if inc.replica is not None:
            self._wake(inc, now_ms)

    def _gate(self, inc: Incarnation, replica: Replica, *, safe: bool = True) -> None:
        """From here on nothing is let out that who is waited for does not have.

        Args:
            inc: The server's copy.
            replica: What stands by for it.
            safe: Whoever could take over knows what results it has until now.
        """
        inc.gated = True
        inc.sender.gate = replica
        for session in [*inc.sender.sessions.values(), *inc.sender.chained.values()]:
            session.safe_low = session.low if safe else 1

    def _arrange(self, inc: Incarnation, replica: Replica, now_ms: int) -> None:
        """Bring who follows nearer to who is wanted."""
        wanted = set(replica.wanted)
        if replica.wanted_journal:
            wanted.add(JOURNAL)
        other_mode = replica.mode is not replica.wanted_mode
        for follower in list(replica.followers.values()):
            if (other_mode or follower.node not in wanted) and not follower.leaving:
                follower.leaving = True
            swap = replica.swap
            asked = swap is not None and (
                follower.node in swap.standbys or follower.stream == swap.journal
            )
            if follower.leaving and not asked and not self._is_named(inc, follower):
                self._forget(inc, replica, follower)
        if other_mode and not replica.followers:
            replica.mode = replica.wanted_mode
            replica.tracks = replica.mode is Mode.SYNC
            other_mode = False
        if not other_mode:
            present = {follower.node for follower in replica.followers.values()}
            for node in sorted(wanted - present - replica.failed.keys()):
                if node in self.core.dead:
                    replica.failed[node] = "it is dead"
                    self.port.standbys_changed(inc.id, node, Changed.FAILED, "it is dead")
                else:
                    self._ask(inc, replica, node, now_ms, configured=False)
        self._configure(inc, replica, now_ms)
        if not replica.followers and replica.swap is None:
            if replica.wanted_mode is replica.mode and not wanted - replica.failed.keys():
                self._open(inc, replica, now_ms)
                inc.replica = None
        if inc.replica is not None:
            self._wake(inc, now_ms)
        if inc.gated and not replica.unfed():
            self._resume(inc)

    def _ask(
        self,
        inc: Incarnation,
        replica: Replica,
        node: NodeId,
        now_ms: int,
        *,
        configured: bool,
        stream: TransferId = "",
    ) -> None:
        self._n += 1
        stream = stream or f"{inc.id}/{self.core.node}/{inc.row.epoch}/{self._n}"
        follower = Follower(node, stream, configured, now_ms)
        replica.followers[stream] = follower
        self.streams[stream] = inc.id
        if node == JOURNAL:
            follower.phase = FollowerPhase.DUE
            self.cut_soon(inc, now_ms)
        else:
            self._send_follow(inc, follower, now_ms)

    def _send_follow(self, inc: Incarnation, follower: Follower, now_ms: int) -> None:
        row = inc.row
        follower.sent_ms = now_ms
        by_value, python = self.port.code_of(inc)
        self.core.send(
            follower.node,
            Follow(
                follower.stream,
                inc.id,
                row.epoch,
                row.cls,
                row.version,
                by_value,
                python,
                row.name,
            ),
        )

    def _forget(self, inc: Incarnation, replica: Replica, follower: Follower) -> None:
        """It follows no more."""
        del replica.followers[follower.stream]
        self.streams.pop(follower.stream, None)
        self.port.end_stream(follower.stream)
        if follower.node != JOURNAL and follower.node not in self.core.dead:
            self.core.send(follower.node, Unfollow(follower.stream, inc.id))

    def _lose(self, inc: Incarnation, follower: Follower, cause: str, now_ms: int) -> None:
        """A standby is dead, silent, or without its copy."""
        replica = inc.replica
        if replica is None or follower.leaving:
            return
        follower.leaving = True
        follower.cause = cause
        what = Changed.LOST if follower.configured else Changed.FAILED
        replica.failed[follower.node] = cause
        self.port.standbys_changed(inc.id, follower.node, what, cause)
        self._arrange(inc, replica, now_ms)
        self._acknowledged(inc, replica, now_ms)

    @staticmethod
    def _is_named(inc: Incarnation, follower: Follower) -> bool:
        row = inc.row
        if follower.node == JOURNAL:
            # In the place of a former owner's, while the row still names that one.
            return follower.stream == row.journal or (follower.unnamed and row.journal != "")
        return follower.node in row.standbys

    def _configure(self, inc: Incarnation, replica: Replica, now_ms: int) -> None:
        """Ask for the swap that makes the row say who stands by, if it does not."""
        if replica.swap is not None or inc.holding or inc.phase is Phase.FROZEN:
            return
        row = inc.row
        named = list(row.standbys)
        journal = row.journal
        for follower in replica.followers.values():
            gates = follower.first if follower.unnamed else follower.gates
            joins = 0 < gates <= follower.acked and not follower.leaving
            if follower.node == JOURNAL:
                if joins:
                    journal = follower.stream
                elif follower.leaving:
                    journal = ""
            elif follower.leaving and follower.node in named:
                named.remove(follower.node)
            elif joins and follower.node not in named:
                named.append(follower.node)
        mode = replica.mode if named else Mode.SYNC
        is_fenced = any(it.fenced for it in replica.followers.values())
        as_it_is = (tuple(named), mode, journal) == (row.standbys, row.mode, row.journal)
        if as_it_is and not is_fenced:
            return
        if not self._may_change_row(inc, replica, now_ms):
            return
        for follower in replica.followers.values():
            # NB: no swap that was asked for before the fence was seen will do.
            follower.asserts, follower.fenced = follower.fenced, False
            if follower.node in named or follower.stream == journal:
                follower.configured = True
        transfer = f"{self.core.node}/{row.epoch}"
        replica.swap = directory.configured(row, tuple(named), mode, journal, transfer)
        replica.swap_rev = inc.rev
        self._ask_swap(inc, replica, now_ms)

    def is_changing(self, inc: Incarnation) -> bool:
        """Whether the row is about to be changed, and a move had better not begin before."""
        replica = inc.replica
        return replica is not None and (
            replica.swap is not None
            or any(
                (it.unnamed or it.fenced) and not it.leaving for it in replica.followers.values()
            )
        )

    def is_waiting(self, server: ServerId) -> bool:
        """Whether a server hosted here waits for the row to name who stands by (see `take_up`)."""
        inc = self.core.hosted.get(server)
        replica = inc.replica if inc is not None else None
        return replica is not None and any(
            it.unnamed and not it.leaving for it in replica.followers.values()
        )

    def _may_change_row(self, inc: Incarnation, replica: Replica, now_ms: int) -> bool:
        """A move compares the row as it was when it began. Who joins waits for its end; if somebody
        has to leave, or to take somebody's place, it is given up, if it still can be.
        """
        core = self.core
        transfer = core.leaving.get(inc.id)
        if transfer is None or inc.id in core.delayed:
            return True
        # NB: what a journal holds back that has no name, or is fenced, holds back the move as well.
        changing = (it.leaving or it.unnamed or it.fenced for it in replica.followers.values())
        if not any(changing):
            return False
        core.withdraw_move(transfer, Withdraw("a standby of the server has to change"), now_ms)
        return inc.id not in core.leaving

    def _ask_swap(self, inc: Incarnation, replica: Replica, now_ms: int) -> None:
        assert replica.swap is not None
        replica.asked = True
        self.port.configure(inc.id, replica.swap, replica.swap_rev)
        self._wake(inc, now_ms)

    def configured(self, server: ServerId, row: Row, event: SwapResult, now_ms: int) -> None:
        """The result of `Port.configure` with that row."""
        inc = self.core.hosted.get(server)
        replica = inc.replica if inc is not None else None
        if inc is None or replica is None or not replica.asked:
            return
        if replica.swap is None or replica.swap != row:
            return  # It was asked by a copy that is gone: the server has come back since.
        replica.asked = False
        outcome, now = event.outcome, event.row
        if outcome is SwapOutcome.REFUSED and now == row:
            outcome = SwapOutcome.DONE
        if outcome is SwapOutcome.DONE:
            self._row_changed(inc, replica, row, event.rev, now_ms)
        elif outcome is SwapOutcome.REFUSED:
            if now is not None and now.owner == self.core.node and now.epoch == inc.row.epoch:
                # Our own confirmation of a move came through late: ask again from there.
                inc.row, inc.rev = now, event.rev
                replica.swap = None
                for follower in replica.followers.values():
                    follower.configured = follower.unnamed or self._is_named(inc, follower)
                    follower.fenced = follower.fenced or follower.asserts
                    follower.asserts = False
                self._arrange(inc, replica, now_ms)
            elif (
                now is not None
                and now.owner == self.core.node
                and now.generation > inc.row.generation
                and inc.phase is Phase.FROZEN
            ):
                # It goes back in time where it is, and the word of that swap has yet to come: who
                # stands by is to stand by what takes its place (`Core.restored`).
                replica.swap = None
            else:
                self.depose(inc, f"the row is now {now}", now_ms)
        # Else it is asked again, the same: an earlier copy of it may yet come through.
        self.core.flush(now_ms)

    def _row_changed(
        self, inc: Incarnation, replica: Replica, row: Row, rev: int, now_ms: int
    ) -> None:
        before = inc.row.standbys
        inc.row, inc.rev = row, rev
        inc.sender.epoch = row.epoch
        replica.swap = None
        for follower in replica.followers.values():
            if follower.stream == row.journal or follower.node in row.standbys:
                follower.unnamed = False
            if follower.asserts:
                follower.asserts = False
                self.port.journal_goes_on(follower.stream)
        self.core.row_changed(inc, now_ms)
        for follower in list(replica.followers.values()):
            named = self._is_named(inc, follower)
            if follower.leaving and not named:
                self._forget(inc, replica, follower)
                if not follower.cause:
                    self.port.standbys_changed(inc.id, follower.node, Changed.LEFT, "")
            elif named and follower.node not in before:
                self.port.standbys_changed(inc.id, follower.node, Changed.JOINED, "")
        self._arrange(inc, replica, now_ms)
        self._acknowledged(inc, replica, now_ms)
        self.core.next_move(now_ms)

    # ------------------------------------------------------------------ the owner: the log

    def hold(self, inc: Incarnation, node: NodeId, message: Message) -> None:
        """Something that a gated server lets out: the result of a handler waits for the next cut.

        Everything else does not depend on the object. If there is no cut to be had, because a
        handler is running, it waits for a note; else whoever that handler waits for might wait.
        """
        replica = inc.replica
        assert replica is not None
        if type(message) is Reply:
            key = (message.session, message.seq)
            if key in replica.changes.records and key not in replica.changes.answers:
                replica.uncut.append((node, message))
                replica.due = True
                self.due[inc.id] = inc
                return
        if self._is_told(inc, replica, message):
            if replica.acked >= replica.number:
                self.core.send(node, message)
            else:
                replica.held.append((replica.number, [(node, message)]))
            return
        replica.unnoted.append((node, message))
        self.due[inc.id] = inc

    def _is_told(self, inc: Incarnation, replica: Replica, message: Message) -> bool:
        """Whether what a message says is in the log already: what is said again costs no note."""
        if (
            inc.phase is Phase.FROZEN
            or not replica.tracks
            or any(it.phase is not FollowerPhase.FED for it in replica.gating())
        ):
            return False
        if type(message) is Reply:
            key = (message.session, message.seq)
            session = inc.sessions.get(message.session)
            told = session is not None and message.seq in session.records
            return told and key not in replica.changes.answers
        return type(message) is Receipt and not replica.changes.casts

    def may_begin(self, inc: Incarnation, entry: Entry, now_ms: int) -> bool:
        """Whether a message may be handed out to a handler now.

        What was done so far must not wait for a run that may take long; nor may a failover repeat
        that run upon an older state. So there is a cut before it. If none can be had, because a
        task of a handler is running or a standby has to have its whole cut first, the message
        waits: what its handler asked for could not leave, and there would be no cut until it ends.
        """
        replica = inc.replica
        if replica is None:
            # About to be released: then its standbys and its journal have to be fed first.
            row = inc.row
            free = row.mode is not Mode.SYNC or not (row.standbys or row.journal)
        else:
            free = replica.mode is not Mode.SYNC or not inc.gated
        if free or not self.port.may_wait(inc, entry):
            return True
        if replica is None:
            return False
        if replica.due and not self.cut(inc, now_ms):
            return False
        return all(it.phase is FollowerPhase.FED for it in replica.gating())

    def cut_soon(self, inc: Incarnation, now_ms: int) -> None:
        """Something changed that standbys have to know."""
        replica = inc.replica
        if replica is None:
            return
        if replica.mode is Mode.ASYNC and not inc.gated:
            replica.due = True
            if not replica.lag_since_ms:
                replica.lag_since_ms = now_ms
            if self.core.timers.due_ms(("cut", inc.id)) is None:
                self.core.set_timer(("cut", inc.id), now_ms + self.times.async_cut_ms)
            return
        replica.due = True
        self.due[inc.id] = inc

    def cut_again(self, inc: Incarnation, replica: Replica) -> None:
        """There may be room now for a cut that could not be made, or for the next one."""
        if replica.due and not inc.running and self._has_come(inc, replica):
            self.due[inc.id] = inc

    def rested(self, inc: Incarnation, replica: Replica, now_ms: int) -> None:
        """A handler or task ended, and nothing else has begun yet."""
        if not replica.due or not self._has_come(inc, replica):
            return
        self.due[inc.id] = inc
        if replica.mode is Mode.ASYNC and not inc.gated:
            # Nothing is held back, so the next handler begins at once, and if it waits, and so on,
            # there is no other quiescent point.
            self._cut_with_room(inc, replica, now_ms)

    def _has_come(self, inc: Incarnation, replica: Replica) -> bool:
        """Whether a cut is made as soon as it can be; in mode ASYNC there is a time for each."""
        return (
            replica.mode is not Mode.ASYNC
            or inc.gated
            or self.core.timers.due_ms(("cut", inc.id)) is None
            or any(it.phase is FollowerPhase.DUE for it in replica.followers.values())
        )

    def is_due(self) -> bool:
        """Whether `flush` has anything to do."""
        return bool(self.due or self._kept)

    def flush(self, now_ms: int) -> None:
        """Make the cuts that are due, and say how far this node has come with those of others."""
        if self.due:
            due, self.due = self.due, {}
            for inc in due.values():
                replica = inc.replica
                if replica is None:
                    continue
                if replica.unnoted:
                    replica.due = True
                self._cut_with_room(inc, replica, now_ms)
                if replica.unnoted and not inc.quiet():
                    self._note(inc, replica, now_ms)
        if self._kept:
            kept, self._kept = self._kept, {}
            for backup in kept.values():
                self.core.send(backup.owner, Kept(backup.stream, backup.epoch, backup.number))

    def _cut_with_room(self, inc: Incarnation, replica: Replica, now_ms: int) -> None:
        if len(replica.cuts) < self.times.cuts_max or replica.is_awaited():
            self.cut(inc, now_ms)

    def cut(self, inc: Incarnation, now_ms: int) -> bool:
        """Make a cut now, if the server is at a quiescent point; False: not now."""
        replica = inc.replica
        if replica is None or not replica.due or not inc.quiet() or inc.phase is Phase.FROZEN:
            return False
        if self.core.hosted.get(inc.id) is not inc or inc.holding:
            return False
        fed = [
            it
            for it in replica.followers.values()
            if it.phase >= FollowerPhase.DUE and not it.leaving
        ]
        if not fed:
            return False
        number = replica.number + 1
        try:
            states = [self.port.capture(inc, it.stream, number) for it in fed]
        except CaptureFailed as error:
            self._uncaptured(inc, replica, str(error), now_ms)
            return True
        replica.number = number
        replica.due = False
        changes, replica.changes = replica.changes, Changes()
        is_async = replica.mode is Mode.ASYNC
        for follower in fed:
            due = follower.phase is FollowerPhase.DUE or follower.anew
            if not due and follower.acked >= follower.first and not follower.gates:
                follower.gates = number
        # What its requests to others were until now is known from now on only.
        begins = replica.mode is Mode.SYNC and not inc.gated and bool(replica.gating())
        delta = whole = None
        for follower, state in zip(fed, states, strict=True):
            is_first = follower.phase is FollowerPhase.DUE or follower.anew
            if is_first and not follower.anew:
                follower.phase = FollowerPhase.FED
                follower.first = number
                self.core.pump_soon(inc)
            elif follower.anew:
                follower.anew = False
            if is_async:
                record = delta = delta or cut_for_rollback(inc, self.core.port.pack, now_ms)
            elif is_first or begins:
                record = whole = whole or cut(inc, None, self.core.port.pack, now_ms)
                record.replaces = True
            else:
                record = delta = delta or cut(inc, changes, self.core.port.pack, now_ms)
            message = Cut(
                follower.stream,
                inc.id,
                inc.row.epoch,
                number,
                is_first,
                record,
                state,
                follower.chunks if is_first else 0,
            )
            self._feed(inc, follower, message, len(state), now_ms)
        if replica.mode is Mode.SYNC and not inc.gated and replica.gating():  # also by a first one
            # All that was let out so far is in this cut.
            self._gate(inc, replica)
        replica.cuts.append(number)
        if replica.uncut or replica.unnoted:
            replica.held.append((number, replica.uncut + replica.unnoted))
            replica.uncut, replica.unnoted = [], []
        for session, out in replica.uncut_outs:
            out.leaves = number
            replica.outs.append((number, session, out))
        replica.uncut_outs.clear()
        if whole is not None:
            sessions = [*inc.sender.sessions.values(), *inc.sender.chained.values()]
        else:
            sessions = list(changes.sending.values())
        if sessions:
            replica.lows.append((number, [(it, it.low) for it in sessions]))
        self._wake(inc, now_ms)
        if whole is not None:
            self._resume(inc)
        return True

    def _resume(self, inc: Incarnation) -> None:
        """Hand out what waited for a standby to be fed (see `Core._hand_out`)."""
        if inc.mailbox and not inc.running and not inc.pump_due and inc.phase is Phase.RUNNING:
            inc.pump_due = True
            self.core.port.pump_later(inc)

    def _note(self, inc: Incarnation, replica: Replica, now_ms: int) -> None:
        """Tell the standbys what they can be told while a handler is running."""
        fed = [
            it
            for it in replica.followers.values()
            if it.phase is FollowerPhase.FED and not it.leaving
        ]
        if not fed or inc.phase is Phase.FROZEN or inc.holding:
            return
        number = replica.number = replica.number + 1
        sessions = note(replica.changes, self.core.port.pack, now_ms)
        for follower in fed:
            told = Note(follower.stream, inc.id, inc.row.epoch, number, sessions)
            self._feed(inc, follower, told, 0, now_ms)
        replica.held.append((number, replica.unnoted))
        replica.unnoted = []
        self._wake(inc, now_ms)

    def _feed(
        self, inc: Incarnation, follower: Follower, message: Logged, size: int, now_ms: int
    ) -> None:
        if not follower.unacked:
            follower.progress_ms = follower.sent_ms = now_ms
        follower.unacked.append(message)
        follower.bytes += size
        follower.sent_bytes += size
        if follower.node == JOURNAL:
            self.port.journal(inc, message)
        else:
            self.core.send(follower.node, message)

    def _uncaptured(self, inc: Incarnation, replica: Replica, reason: str, now_ms: int) -> None:
        """The state cannot travel: the server goes on alone, as soon as its row says so."""
        self.port.standbys_changed(inc.id, "", Changed.UNCAPTURED, reason)
        for follower in list(replica.followers.values()):
            replica.failed[follower.node] = reason
            follower.leaving = True
            follower.cause = reason
        self._arrange(inc, replica, now_ms)

    def step(self, session: SendSession, out: Outgoing, now_ms: int) -> None:
        """A gated server has numbered a request of its own: when may it leave?"""
        core = self.core
        inc = core.hosted.get(session.sender.id)
        replica = session.sender.gate
        if inc is None or replica is None:
            return
        replica.changes.sending[session.id] = session
        entry = inc.running.get(core.run_number(out.run)) if out.run else None
        is_fed = any(
            it.phase is FollowerPhase.FED and not it.leaving for it in replica.followers.values()
        )
        if (entry is not None and not entry.waits) or not is_fed or (entry is None and inc.quiet()):
            # It cannot be waited for before the next quiescent point, or nobody is to be told.
            out.leaves = NEVER
            replica.uncut_outs.append((session, out))
            self.cut_soon(inc, now_ms)
            return
        route = session.route
        there = core.hosted.get(session.server)
        if not session.generation and (there is not None or route.node is not None):
            core.bind(session, there.row.epoch if there is not None else route.epoch)
        out.leaves = self._tell_step(inc, replica, session, out, entry, now_ms)
        replica.outs.append((out.leaves, session, out))

    def unnumbered(
        self, session: SendSession, out: Outgoing, now_ms: int, status: int = 0, answer: bytes = b""
    ) -> None:
        """A handler in mid-run has made a request that waits for a number; or, with a status, that
        has come to its end without one. Whoever runs it again is to find the same.
        """
        inc = self.core.hosted.get(session.sender.id)
        replica = session.sender.gate
        if inc is None or replica is None or not out.run:
            return
        entry = inc.running.get(self.core.run_number(out.run))
        if entry is not None and entry.waits:
            self._tell_step(inc, replica, session, out, entry, now_ms, status, answer)

    def _tell_step(
        self,
        inc: Incarnation,
        replica: Replica,
        session: SendSession,
        out: Outgoing,
        entry: Entry | None,
        now_ms: int,
        status: int = 0,
        answer: bytes = b"",
    ) -> int:
        """Tell the standbys of a request; its number in the log."""
        core = self.core
        if out.payload is None:
            out.payload = core.port.pack(out.args)
        if replica.changes.answers or replica.changes.casts:
            # A failover finds this handler's request begun, so it has to know of those before it
            # that no handler has taken.
            self._note(inc, replica, now_ms)
        route = session.route
        number = replica.number = replica.number + 1
        made_by = (
            entry_record(entry, core.port.pack, now_ms)
            if entry is not None
            else EntryRecord("", 0, 0, "", b"", (), -1, "")
        )
        record = StepRecord(
            made_by,
            session.id,
            session.server,
            out.seq,
            out.kind,
            out.method,
            self.port.digest(out.payload),
            session.chained,
            session.generation,
            route.node or "",
            route.epoch,
            status,
            answer,
        )
        for follower in replica.followers.values():
            if follower.phase is FollowerPhase.FED and not follower.leaving:
                message = Step(follower.stream, inc.id, inc.row.epoch, number, record)
                self._feed(inc, follower, message, 0, now_ms)
        self._wake(inc, now_ms)
        return number

    def bound(self, session: SendSession, out: Outgoing, now_ms: int) -> None:
        """A session is now bound to a generation; what is under way in it waits until that is known
        to the standbys.
        """
        self.step(session, out, now_ms)
        replica = session.sender.gate
        assert replica is not None
        for other in session.outstanding.values():
            if other is not out and other.leaves < out.leaves:
                other.leaves = out.leaves
                if out.leaves == NEVER:
                    replica.uncut_outs.append((session, other))
                else:
                    replica.outs.append((out.leaves, session, other))

    def journal_anew(self, server: ServerId, now_ms: int) -> None:
        """The journal has grown: its next cut is to be whole, and nothing before it is needed."""
        inc = self.core.hosted.get(server)
        replica = inc.replica if inc is not None else None
        if inc is None or replica is None:
            return
        for follower in replica.followers.values():
            if follower.node == JOURNAL and follower.phase is FollowerPhase.FED:
                follower.anew = True
                self.cut_soon(inc, now_ms)
        self.core.flush(now_ms)

    def journaled(
        self, server: ServerId, number: int, reason: str, now_ms: int, *, stream: TransferId = ""
    ) -> None:
        """All up to `number` is in the journal; or, with a reason, it failed and takes no more.

        Args:
            server: Hosted here.
            number: Of what was appended.
            reason: Why it failed.
            now_ms: The time.
            stream: The journal's id; of another one than the present one nothing is heard. Empty:
                it is the present one.
        """
        inc = self.core.hosted.get(server)
        replica = inc.replica if inc is not None else None
        if inc is None or replica is None:
            return
        for follower in list(replica.followers.values()):
            if follower.node == JOURNAL and stream in ("", follower.stream):
                if reason:
                    self._lose(inc, follower, reason, now_ms)
                else:
                    self._kept_by(inc, replica, follower, number, now_ms)
        self.core.flush(now_ms)

    def journal_fenced(self, server: ServerId, stream: TransferId, now_ms: int) -> None:
        """Another writer has begun where a journal is, because it takes its owner for gone.

        It has read, or is about to read, all that was let out, and then swaps the row as it was
        before. So this owner swaps the row too, before it writes on: one of the two is refused. If
        it is this one, somebody else has the server; else nobody can have it who has not read
        what is written from now on. Nothing else changes, and what was appended stays appended.
        """
        inc = self.core.hosted.get(server)
        replica = inc.replica if inc is not None else None
        follower = replica.followers.get(stream) if replica is not None else None
        if inc is None or replica is None or follower is None:
            return
        follower.fenced = True
        self._configure(inc, replica, now_ms)
        self._wake(inc, now_ms)
        self.core.flush(now_ms)

    def _kept_by(
        self, inc: Incarnation, replica: Replica, follower: Follower, number: int, now_ms: int
    ) -> None:
        unacked = follower.unacked
        if number > replica.number or follower.phase is not FollowerPhase.FED:
            return
        while unacked and unacked[0].number <= number:
            message = unacked.popleft()
            if type(message) is Cut:
                follower.bytes -= len(message.state)
        follower.sent_ms = now_ms
        if number <= follower.acked:
            return
        follower.progress_ms = now_ms
        follower.checks = 0
        if follower.acked < follower.first and unacked and follower.node != JOURNAL:
            # What came while it was taking in the whole was of no use to it.
            self._repeat(inc, follower, now_ms)
        follower.acked = number
        if not follower.configured and not follower.gates:
            # It has loaded the whole: the next cut is the one that it joins with.
            self.cut_soon(inc, now_ms)
        elif not follower.configured:
            self._configure(inc, replica, now_ms)
        self._acknowledged(inc, replica, now_ms)

    def _acknowledged(self, inc: Incarnation, replica: Replica, now_ms: int) -> None:
        """Let out what waited for what is now acknowledged by all."""
        gating = replica.gating()
        if not gating:
            self._open(inc, replica, now_ms)
            self.cut_again(inc, replica)
            return
        acked = gating[0].acked
        for follower in gating:
            if follower.unnamed:
                self._configure(inc, replica, now_ms)
                return
            acked = min(acked, follower.acked)
        replica.acked = acked
        cuts = replica.cuts
        while cuts and cuts[0] <= acked:
            cuts.popleft()
        if replica.mode is Mode.ASYNC:
            self._catch_up(inc, replica, now_ms)
        if inc.phase is not Phase.FROZEN:
            self._let_out(inc, replica, acked, now_ms)
        self.cut_again(inc, replica)
        self.core.pump_soon(inc)
        if inc.phase is Phase.QUIESCING:
            self.core.rest(inc, now_ms)

    def _let_out(self, inc: Incarnation, replica: Replica, acked: int, now_ms: int) -> None:
        core = self.core
        held = replica.held
        while held and held[0][0] <= acked:
            for node, message in held.popleft()[1]:
                core.send(node, message)
        lows = replica.lows
        while lows and lows[0][0] <= acked:
            for session, low in lows.popleft()[1]:
                if low > session.safe_low:
                    session.safe_low = low
                    if session.idle():
                        core.settled(session, now_ms)
        outs = replica.outs
        while outs and outs[0][0] <= acked:
            _, session, out = outs.popleft()
            if out.leaves <= acked:
                out.leaves = 0  # Numbers begin again with the next standbys.
            if session.outstanding.get(out.seq) is out:
                core.dispatch(session, out, now_ms)

    def _open(self, inc: Incarnation, replica: Replica, now_ms: int) -> None:
        """Nobody is waited for any more."""
        inc.gated = False
        inc.sender.gate = None
        replica.cuts.clear()
        replica.acked = replica.number
        if inc.phase is Phase.FROZEN:
            return
        for _, _, out in replica.outs:
            out.leaves = 0
        for session, out in replica.uncut_outs:
            out.leaves = 0
            replica.outs.append((0, session, out))
        replica.uncut_outs.clear()
        if replica.uncut or replica.unnoted:
            replica.held.append((0, replica.uncut + replica.unnoted))
            replica.uncut, replica.unnoted = [], []
        replica.lows.clear()
        self._let_out(inc, replica, NEVER, now_ms)
        self.core.pump_soon(inc)
        if inc.phase is Phase.QUIESCING:
            self.core.rest(inc, now_ms)

    def _catch_up(self, inc: Incarnation, replica: Replica, now_ms: int) -> None:
        """ASYNC: hold back while the standbys lag too far behind."""
        if inc.phase is Phase.FROZEN:
            return
        if not replica.cuts and not replica.due:
            replica.lag_since_ms = 0
        size = max((it.bytes for it in replica.gating()), default=0)
        since = replica.lag_since_ms
        lags = (since and now_ms - since > self.times.async_lag_ms) or (
            size > self.times.async_lag_bytes
        )
        if lags and not inc.gated:
            inc.gated = True
        elif inc.gated and not lags and not replica.cuts:
            inc.gated = False
            if replica.uncut or replica.unnoted:
                replica.held.append((0, replica.uncut + replica.unnoted))
                replica.uncut, replica.unnoted = [], []
            self._let_out(inc, replica, replica.acked, now_ms)
        if not replica.cuts and replica.due:
            replica.lag_since_ms = now_ms

    def go_on(self, inc: Incarnation, now_ms: int) -> None:
        """A move was given up or taken back: the server and its standbys go on here."""
        replica = inc.replica
        if replica is not None:
            self.cut_soon(inc, now_ms)
            self._arrange(inc, replica, now_ms)
            self._acknowledged(inc, replica, now_ms)

    def end(self, inc: Incarnation, now_ms: int, *, stays: bool) -> None:
        """The server is not here any more.

        Args:
            inc: What was its copy.
            now_ms: The time.
            stays: Its standbys go on standing by, for whoever owns it now.
        """
        replica, inc.replica = inc.replica, None
        if replica is None:
            return
        for follower in list(replica.followers.values()):
            if stays:
                self.streams.pop(follower.stream, None)
                self.port.end_stream(follower.stream)
            else:
                self._forget(inc, replica, follower)
        if not stays:
            self._open(inc, replica, now_ms)
        inc.gated = False
        inc.sender.gate = None
        self.due.pop(inc.id, None)
        self.core.cancel_timer(("standby", inc.id))
        self.core.cancel_timer(("cut", inc.id))

    def depose(self, inc: Incarnation, cause: str, now_ms: int) -> None:
        """Somebody else owns the server: nothing that this copy held back is ever let out."""
        if self.core.hosted.get(inc.id) is not inc:
            return
        self.end(inc, now_ms, stays=True)
        self.core.drop_deposed(inc, now_ms)
        self.port.deposed(inc, cause)

    # ------------------------------------------------------------------ time, nodes

    def _wake(self, inc: Incarnation, now_ms: int) -> None:
        key = ("standby", inc.id)
        if self.core.timers.due_ms(key) is None:
            self.core.set_timer(key, now_ms + self.times.repeat_ms)

    def cut_due(self, server: ServerId, now_ms: int) -> None:
        """Mode ASYNC: time for the next cut."""
        inc = self.core.hosted.get(server)
        replica = inc.replica if inc is not None else None
        if inc is not None and replica is not None and replica.due:
            self._catch_up(inc, replica, now_ms)
            self.due[server] = inc

    def owner_timer(self, server: ServerId, now_ms: int) -> None:
        """Repeat what has no answer; give up whoever is silent for too long."""
        inc = self.core.hosted.get(server)
        replica = inc.replica if inc is not None else None
        if inc is None or replica is None:
            return
        times = self.times
        if replica.swap is not None and not replica.asked:
            self._ask_swap(inc, replica, now_ms)
        for follower in list(replica.followers.values()):
            if follower.leaving or follower.stream not in replica.followers:
                continue
            if follower.node == JOURNAL:
                continue  # A disk says so when it fails; one that is slow is waited for.
            waits = follower.phase < FollowerPhase.DUE or follower.unacked
            if not waits:
                continue
            silent_ms = now_ms - follower.progress_ms
            # One that is being fed for the first time holds nobody up, unless it is in the row.
            joining = not follower.configured and not follower.gates
            limit = times.join_ms if joining else times.patience_ms
            # What it was sent has to be taken, and all before it has the whole to be loaded.
            begins = joining or follower.unnamed
            limit += (follower.sent_bytes if begins else follower.bytes) // LOAD_BYTES_PER_MS
            if silent_ms >= limit:
                cause = f"it has not answered for {silent_ms / 1000:g} s"
                self._lose(inc, follower, cause, now_ms)
            elif now_ms - follower.sent_ms >= times.repeat_ms:
                self._repeat(inc, follower, now_ms)
        if inc.replica is replica:
            if replica.mode is Mode.ASYNC:
                self._catch_up(inc, replica, now_ms)
            self._arrange(inc, replica, now_ms)
        if inc.replica is replica:
            self._acknowledged(inc, replica, now_ms)
        if inc.replica is replica and (
            replica.swap is not None
            or any(
                it.phase < FollowerPhase.DUE
                or (it.unacked and it.node != JOURNAL)
                or it.leaving
                or it.fenced
                for it in replica.followers.values()
            )
        ):
            self._wake(inc, now_ms)

    def _repeat(self, inc: Incarnation, follower: Follower, now_ms: int) -> None:
        follower.sent_ms = now_ms
        if follower.phase is FollowerPhase.ASKED:
            self._send_follow(inc, follower, now_ms)
        elif follower.phase is FollowerPhase.COPYING:
            if follower.chunk:
                self.core.send(follower.node, self._chunk(follower))
        elif follower.node != JOURNAL:
            for message in follower.unacked:
                # The owner may have changed the row since; it is still the one who asks.
                message.epoch = inc.row.epoch
                self.core.send(follower.node, message)

    def peer_up(self, node: NodeId, now_ms: int) -> None:
        """What was sent before may be lost."""
        for inc in self._owned():
            assert inc.replica is not None
            for follower in list(inc.replica.followers.values()):
                if follower.node == node and not follower.leaving:
                    self._repeat(inc, follower, now_ms)

    def _owned(self) -> list[Incarnation]:
        servers = dict.fromkeys(self.streams.values())
        found = [self.core.hosted.get(server) for server in servers]
        return [inc for inc in found if inc is not None and inc.replica is not None]

    def node_dead(self, node: NodeId, now_ms: int) -> None:
        """A node's process was seen dead."""
        self.suspected.pop(node, None)
        for stream in [it for it, ousted in self.ousted.items() if ousted[0] == node]:
            self._stepped_down(stream, node)
        for inc in self._owned():
            assert inc.replica is not None
            for follower in list(inc.replica.followers.values()):
                if follower.node == node:
                    self._lose(inc, follower, "its node died", now_ms)
        for backup in [it for it in self.coming.values() if it.owner == node]:
            self._drop(backup)
        for backup in list(self.backups.values()):
            if backup.owner == node:
                self.consider(backup.server, now_ms)

    def node_suspected(self, node: NodeId, now_ms: int) -> None:
        """A node's lease has run out: it may be dead, or only silent."""
        if node in self.core.dead or node == self.core.node:
            return
        self.suspected[node] = None
        for backup in list(self.backups.values()):
            if backup.owner == node:
                self.consider(backup.server, now_ms)
        self.core.flush(now_ms)

    def node_heard(self, node: NodeId, now_ms: int) -> None:
        """It was not dead."""
        self.suspected.pop(node, None)

    # ------------------------------------------------------------------ messages

    def on_message(self, message: StandbyMessage, node: NodeId, now_ms: int) -> None:
        """Take what an owner or a standby says."""
        match message:
            case Cut():
                self._on_cut(message, node, now_ms)
            case Step() | Note():
                self._on_step(message, node, now_ms)
            case Kept():
                self._on_kept(message, node, now_ms)
            case Follow():
                self._on_follow(message, node, now_ms)
            case Following():
                found = self._follower(message.stream, node)
                if found is not None and found[2].phase is FollowerPhase.ASKED:
                    self._copy(*found, now_ms)
            case FollowRefused():
                found = self._follower(message.stream, node)
                if found is not None and found[2].phase is FollowerPhase.ASKED:
                    self._lose(found[0], found[2], message.reason, now_ms)
            case KeepRefused():
                self._on_keep_refused(message, node, now_ms)
            case Unfollow():
                self._on_unfollow(message, node)

    def _on_kept(self, message: Kept, node: NodeId, now_ms: int) -> None:
        found = self._follower(message.stream, node)
        if found is not None:
            inc, replica, follower = found
            self._kept_by(inc, replica, follower, message.number, now_ms)
            return
        inc_here = self.core.hosted.get(server_of(message.stream))
        if inc_here is not None and not inc_here.holding and message.stream not in self.streams:
            # It asks whether it is wanted still: its owner has forgotten it.
            self.core.send(node, Unfollow(message.stream, inc_here.id))

    def _follower(
        self, stream: TransferId, node: NodeId
    ) -> tuple[Incarnation, Replica, Follower] | None:
        inc = self.core.hosted.get(self.streams.get(stream, ""))
        replica = inc.replica if inc is not None else None
        follower = replica.followers.get(stream) if replica is not None else None
        if inc is None or replica is None or follower is None or follower.node != node:
            return None
        return inc, replica, follower

    # -- what goes ahead

    def _copy(self, inc: Incarnation, replica: Replica, follower: Follower, now_ms: int) -> None:
        follower.phase = FollowerPhase.COPYING
        follower.progress_ms = follower.sent_ms = now_ms
        self.port.copy_for(inc, follower.stream)

    def copied_for(self, stream: TransferId, event: Copied, now_ms: int) -> None:
        """What `Port.copy_for` gave."""
        inc = self.core.hosted.get(self.streams.get(stream, ""))
        replica = inc.replica if inc is not None else None
        follower = replica.followers.get(stream) if replica is not None else None
        if inc is None or replica is None or follower is None or follower.leaving:
            return
        if follower.phase is not FollowerPhase.COPYING or follower.chunk:
            return
        follower.progress_ms = follower.sent_ms = now_ms
        if event.failed:
            self._lose(inc, follower, "the state cannot be sent ahead", now_ms)
            return
        size = len(event.state)
        follower.round_bytes += size
        ended = event.round_ended
        if ended:
            follower.rounds += 1
            small = follower.round_bytes <= self.times.copy_bytes
            follower.round_bytes = 0
            ended = small or follower.rounds >= self.times.rounds_max
        if size:
            follower.chunk = event.state
            follower.sent_bytes += size
            follower.chunks += 1
            follower.rounds += 1 << 16 if ended else 0
            self.core.send(follower.node, self._chunk(follower))
        elif ended:
            self._copy_ended(inc, follower, now_ms)
        else:
            self.port.copy_for(inc, follower.stream)
        self.core.flush(now_ms)

    @staticmethod
    def _chunk(follower: Follower) -> Chunk:
        return Chunk(follower.stream, follower.chunks - 1, follower.chunk)

    def _copy_ended(self, inc: Incarnation, follower: Follower, now_ms: int) -> None:
        follower.phase = FollowerPhase.DUE
        self.cut_soon(inc, now_ms)
        if inc.replica is not None and inc.replica.mode is Mode.ASYNC:
            self.due[inc.id] = inc

    def takes(self, transfer: TransferId) -> bool:
        """Whether a Chunk, or the answer to one, is of a stream and not of a move."""
        return transfer in self.streams or transfer in self.coming

    def on_chunk(self, message: Chunk | ChunkTaken, node: NodeId, now_ms: int) -> None:
        """What goes ahead of a first cut, or the answer to it."""
        if type(message) is ChunkTaken:
            found = self._follower(message.transfer, node)
            if found is None:
                return
            inc, _, follower = found
            if not follower.chunk or message.number != follower.chunks - 1:
                return
            follower.chunk = b""
            follower.progress_ms = follower.sent_ms = now_ms
            if follower.rounds >> 16:
                self._copy_ended(inc, follower, now_ms)
            else:
                self.port.copy_for(inc, follower.stream)
            return
        assert type(message) is Chunk
        backup = self.coming.get(message.transfer)
        if backup is None or backup.owner != node or not backup.checked:
            # NB: an owner may know of a former time that it was followed, which came to nothing.
            return
        backup.heard_ms = now_ms
        if message.number < backup.chunks:
            self.core.send(node, ChunkTaken(backup.stream, message.number))
        elif message.number == backup.chunks and not backup.installing:
            backup.installing = True
            self.port.keep_chunk(backup.stream, message.number, message.state)

    def chunk_kept(self, stream: TransferId, reason: str, now_ms: int) -> None:
        """A chunk is installed, or (with a reason) cannot be."""
        backup = self.coming.get(stream)
        if backup is None or not backup.installing:
            return
        backup.installing = False
        if reason:
            self._refuse(backup, reason)
        else:
            backup.chunks += 1
            self.core.send(backup.owner, ChunkTaken(stream, backup.chunks - 1))
        self.core.flush(now_ms)

    # ------------------------------------------------------------------ the standby

    def _on_follow(self, follow: Follow, node: NodeId, now_ms: int) -> None:
        core = self.core
        known = self.coming.get(follow.stream) or self._valid(follow.stream)
        if known is not None:
            known.heard_ms = now_ms
            if known.checked:
                core.send(node, Following(follow.stream))
            return
        server = follow.server
        fence = self.fences.get(server, 0)
        refusal = core.refuse_moves
        if follow.epoch < fence:
            core.send(node, KeepRefused(follow.stream, fence, "another owner is about to be"))
            return
        if node in core.dead or follow.stream in self.over:
            return  # It was sent before, and came late; nobody waits for the answer.
        if server in core.hosted:
            refusal = "it holds the server itself"
            if follow.epoch > core.hosted[server].row.epoch:
                self.port.read_standby_row(server)
        elif server in core.arriving:
            refusal = "the server is about to move to it"
        if refusal:
            core.send(node, FollowRefused(follow.stream, refusal))
            return
        valid = self.backups.get(server)
        if valid is not None and valid.epoch > follow.epoch:
            core.send(node, FollowRefused(follow.stream, "it follows a newer owner"))
            return
        for other in [it for it in self.coming.values() if it.server == server]:
            if other.epoch > follow.epoch:
                core.send(node, FollowRefused(follow.stream, "it follows a newer owner"))
                return
            self._drop(other)
        self.coming[follow.stream] = Backup(follow, node, now_ms)
        self.port.check_follow(follow)

    def follow_checked(self, stream: TransferId, version: int, refusal: str, now_ms: int) -> None:
        """The answer to `Port.check_follow`."""
        backup = self.coming.get(stream)
        if backup is None:
            return
        follow = backup.follow
        if not refusal and version < follow.version:
            refusal = (
                f"{follow.cls} has version {version} there, older than the server's version "
                f"{follow.version}; update that node first"
            )
        if refusal:
            del self.coming[stream]
            self.core.send(backup.owner, FollowRefused(stream, refusal))
        else:
            backup.checked = True
            backup.version = version
            self.core.send(backup.owner, Following(stream))
        self.core.flush(now_ms)

    def _valid(self, stream: TransferId) -> Backup | None:
        for backup in self.backups.values():
            if backup.stream == stream:
                return backup
        return None

    def _admit(self, message: Logged, node: NodeId, now_ms: int) -> Backup | None:
        """The backup that a cut or step is for, if it is to be taken."""
        server = message.server
        backup = self.backups.get(server)
        if backup is None or backup.stream != message.stream:
            backup = self.coming.get(message.stream)
        if backup is None or backup.owner != node or backup.server != server:
            self.core.send(node, KeepRefused(message.stream, 0, "it has nothing of this stream"))
            return None
        fence = self.fences.get(server, 0)
        if message.epoch < fence:
            self.core.send(node, KeepRefused(message.stream, fence, "fenced"))
            return None
        if backup.used_by:
            # By a move that was given up: its owner has to begin anew. Until then it stays.
            self.core.send(node, KeepRefused(message.stream, 0, "a move has used it up"))
            return None
        claim = backup.claim
        if claim is not None and (claim.loading or claim.asked or claim.host is not None):
            # Somebody else was quicker; what this node had is used up, which shows soon.
            return None
        if message.epoch > backup.epoch:
            backup.epoch = message.epoch
        backup.heard_ms = now_ms
        backup.checks = 0
        return backup

    def _on_cut(self, message: Cut, node: NodeId, now_ms: int) -> None:
        backup = self._admit(message, node, now_ms)
        if backup is None:
            return
        if not backup.valid:
            if not message.whole or not backup.checked or backup.keeping is not None:
                return
            if message.chunks != backup.chunks:
                self._refuse(backup, "some of what went ahead of the state is missing")
                return
            backup.keeping = message
            kept = self.port.keep_delta(backup.stream, message.number, True, message.state)
            if kept is not None:
                reason = "" if kept is True else str(kept)
                self.delta_kept(backup.stream, message.number, reason, now_ms)
            return
        if message.number <= backup.number:
            self._kept[backup.stream] = backup
        elif message.number == backup.number + 1:
            kept = self.port.keep_delta(backup.stream, message.number, False, message.state)
            if kept is not True:
                self._refuse(backup, str(kept))
                return
            self._take(backup, message, now_ms)
        # Else what comes before it is lost, and comes again.

    def delta_kept(self, stream: TransferId, number: int, reason: str, now_ms: int) -> None:
        """The first cut of a stream is kept and was loaded for a trial, or cannot be."""
        backup = self.coming.get(stream)
        message = backup.keeping if backup is not None else None
        if backup is None or message is None or message.number != number:
            return
        backup.keeping = None
        former = self.backups.get(backup.server)
        claim = former.claim if former is not None else None
        if former is not None and former.epoch > backup.epoch:
            # Whoever sends this was replaced, and does not know yet.
            reason = reason or "it follows a newer owner"
        if not reason and claim is not None and (claim.loading or claim.swap is not None):
            # What it had may be what the server goes on with: that has to be known first.
            backup.keeping, backup.waits_ms = message, now_ms
            return
        if reason:
            self._refuse(backup, reason)
        else:
            if former is not None:
                self._drop(former)
            del self.coming[stream]
            self.backups[backup.server] = backup
            backup.valid = True
            self._take(backup, message, now_ms)
            if backup.owner in self.core.dead or backup.owner in self.suspected:
                self.consider(backup.server, now_ms)
        self.core.flush(now_ms)

    def _take(self, backup: Backup, message: Cut, now_ms: int) -> None:
        backup.image.take(message.record, message.whole, now_ms)
        backup.number = message.number
        backup.kept_s = self.port.wall_s()
        self._kept[backup.stream] = backup

    def _on_step(self, message: Step | Note, node: NodeId, now_ms: int) -> None:
        backup = self._admit(message, node, now_ms)
        if backup is None or not backup.valid:
            return
        if message.number == backup.number + 1:
            backup.number = message.number
            if type(message) is Step:
                backup.image.steps.append(message.step)
            elif type(message) is Note:
                backup.image.note(message.sessions)
        if message.number <= backup.number:
            self._kept[backup.stream] = backup

    def _refuse(self, backup: Backup, reason: str) -> None:
        """It has nothing of this stream any more."""
        if backup.owner and backup.owner not in self.core.dead:
            self.core.send(backup.owner, KeepRefused(backup.stream, 0, reason))
        self._drop(backup)

    def _drop(self, backup: Backup, why: str = "this node has got it otherwise") -> None:
        self.coming.pop(backup.stream, None)
        self._kept.pop(backup.stream, None)
        self.core.cancel_timer(("claim", backup.server))
        self.port.end_stream(backup.stream)
        if self.backups.get(backup.server) is backup:
            del self.backups[backup.server]
            if backup.valid:
                self.over[backup.stream] = None
                if len(self.over) > OVER_MAX:
                    del self.over[next(iter(self.over))]
            self._unfence(backup.server)
            self._claim_over(backup.server)
            if backup.journal:
                # Whoever has read it holds it until this is known.
                self.port.standbys_changed(backup.server, JOURNAL, Changed.UNFIT, why)

    def _on_unfollow(self, message: Unfollow, node: NodeId) -> None:
        self._stepped_down(message.stream, node)
        backup = self.coming.get(message.stream) or self._valid(message.stream)
        if backup is not None and backup.owner == node:
            # NB: also while it claims the server: the row says that it may not, if it may not.
            if backup.claim is None or (backup.claim.swap is None and not backup.claim.loading):
                self._drop(backup)

    def _on_keep_refused(self, message: KeepRefused, node: NodeId, now_ms: int) -> None:
        inc = self.core.hosted.get(server_of(message.stream))
        if inc is not None and message.epoch > inc.row.epoch:
            # It is about to take over, or did; the row tells. It may yet fail to.
            self.port.read_standby_row(inc.id)
            return
        found = self._follower(message.stream, node)
        if message.epoch:
            self.core.send(node, Unfollow(message.stream, server_of(message.stream)))
        elif found is not None:
            self._lose(found[0], found[2], message.reason, now_ms)

    # -- what nobody says

    def sweep(self, now_ms: int) -> None:
        """A backup that its owner is silent about may not be wanted any more, and one that nothing
        is sent to may be gone. The longer all is well the less often it is asked about.
        """
        silent_ms = 2 * self.times.join_ms
        for inc in self._owned():
            replica = inc.replica
            assert replica is not None
            for follower in replica.followers.values():
                idle = follower.phase is FollowerPhase.FED and not follower.unacked
                if idle and now_ms - follower.progress_ms > silent_ms << min(follower.checks, 8):
                    follower.checks += 1
                    if follower.node != JOURNAL:
                        again = Note(follower.stream, inc.id, inc.row.epoch, follower.acked, [])
                        self.core.send(follower.node, again)
        for backup in [it for it in self.coming.values() if now_ms - it.heard_ms > silent_ms]:
            if backup.keeping is None and not backup.installing:
                self._drop(backup)
        for backup in self.backups.values():
            if now_ms - backup.heard_ms > silent_ms << min(backup.checks, 8):
                backup.checks += 1
                self.port.read_standby_row(backup.server)

    def _check(self, backup: Backup, row: Row | None, now_ms: int) -> None:
        """Look whether a backup is wanted, by its row."""
        if row is None or row.state is RowState.LOST:
            self._drop(backup)
        elif self.core.node in row.standbys:
            if self._is_gone(row.owner):
                self.consider(backup.server, now_ms)
        elif row.owner != backup.owner:
            self._drop(backup)
        else:
            # It may be about to be named there. Only the owner knows.
            self.core.send(backup.owner, Kept(backup.stream, backup.epoch, backup.number))

    def oust_timer(self, stream: TransferId, now_ms: int) -> None:
        """Tell a former owner again that it is none."""
        ousted = self.ousted.get(stream)
        if ousted is not None:
            node, epoch, times = ousted
            self.ousted[stream] = (node, epoch, times + 1)
            self.core.send(node, KeepRefused(stream, epoch, "another owner has taken over"))
            wait_ms = self.times.repeat_ms << min(times, 8)
            self.core.set_timer(("oust", stream), now_ms + wait_ms)

    def _stepped_down(self, stream: TransferId, node: NodeId) -> None:
        ousted = self.ousted.get(stream)
        if ousted is not None and ousted[0] == node:
            del self.ousted[stream]
            self.core.cancel_timer(("oust", stream))
            self._unfence(server_of(stream))

    # -- taking over

    def _unfence(self, server: ServerId) -> None:
        """Forget a fence that nobody can run into any more.

        What an owner that was replaced still waits for is the word of all its standbys, so it is
        the one of them which took over that has to refuse it: nobody else's word is enough. It
        waits no more once it is dead, or knows. An attempt that came to nothing has changed
        nothing: `Claim` ends only when that is certain.
        """
        backup = self.backups.get(server)
        if backup is not None and backup.claim is not None:
            return
        epochs = [
            epoch for stream, (_, epoch, _) in self.ousted.items() if server_of(stream) == server
        ]
        if epochs:
            self.fences[server] = max(epochs)
        else:
            self.fences.pop(server, None)

    def _is_gone(self, node: NodeId) -> bool:
        return node in self.core.dead or node in self.suspected

    def give_back(self, row: Row, rev: int) -> None:
        """A move named this node owner; it has nothing of the server, and the source is dead.

        It is for the standbys to take over from the source. If this swap fails it is tried again,
        as long as the row is like this.
        """
        transfer = f"{self.core.node}/{row.epoch}/back"
        self.port.promote(row.server, directory.given_back(row, transfer), rev)

    def consider(self, server: ServerId, now_ms: int) -> None:
        """The owner of a server that this node has a copy of may be gone."""
        backup = self.backups.get(server)
        if backup is None:
            if server in self.core.hosted or server in self.core.arriving:
                return
            # The row may name this node, which has lost its copy: nobody should wait for it.
            husk = Follow("", server, 0, "", 0, False, "")
            backup = self.backups[server] = Backup(husk, "", now_ms)
        if backup.claim is None:
            backup.claim = Claim()
            if not backup.valid:
                backup.claim.unfit = "it has no copy"
            self.port.read_standby_row(server)

    def standby_row(self, server: ServerId, event: RowRead, now_ms: int) -> None:
        """The answer to `Port.read_standby_row`."""
        row = event.row
        inc = self.core.hosted.get(server)
        if inc is not None and event.known and not inc.holding and inc.phase is not Phase.FROZEN:
            if row is None or (row.owner != self.core.node and row.epoch > inc.row.epoch):
                self.depose(inc, f"the row is now {row}", now_ms)
        backup = self.backups.get(server)
        claim = backup.claim if backup is not None else None
        known = event.known
        if row is not None and backup is not None and not backup.journal:
            # One that was read before what is here was sent says nothing of it.
            known = known and row.epoch >= backup.epoch
        if backup is not None and claim is not None and not claim.loading and not claim.asked:
            if not known:
                self._claim_later(server, now_ms)
            else:
                self._claim(backup, claim, row, event.rev, now_ms)
        elif backup is not None and claim is None and known:
            self._check(backup, row, now_ms)
        self.core.flush(now_ms)

    def _claim_later(self, server: ServerId, now_ms: int) -> None:
        self.core.set_timer(("claim", server), now_ms + self.times.repeat_ms)

    def claim_timer(self, server: ServerId, now_ms: int) -> None:
        """Go on with taking over."""
        backup = self.backups.get(server)
        claim = backup.claim if backup is not None else None
        if backup is None or claim is None or claim.asked or claim.loading:
            return
        if claim.swap is not None and claim.doubtful:
            self._ask_promotion(backup, claim)
        else:
            self.port.read_standby_row(server)

    def _claim(self, backup: Backup, claim: Claim, row: Row | None, rev: int, now_ms: int) -> None:
        core = self.core
        if row is not None and claim.swap is not None and row == claim.swap:
            self._live(backup, claim, row, rev, now_ms)
            return
        if claim.swap is not None and claim.doubtful and rev == claim.rev:
            # The swap may come through yet, and what is here is what the row would name. (This
            # row was read for another reason; the swap is asked for again.)
            self._claim_later(backup.server, now_ms)
            return
        if backup.journal:
            self._claim_journal(backup, claim, row, rev)
            return
        if row is None or row.state is RowState.LOST or row.server != backup.server:
            self._drop(backup)
            return
        if not self._is_gone(row.owner) or core.node not in row.standbys:
            self._stand_by(backup, claim, row)
            return
        if claim.unfit and row.owner not in core.dead:
            # A living owner will find out, and is the only one who changes its row.
            self._stand_by(backup, claim, row)
            return
        # NB: also a row that is COMMITTED, whose source may be about to take it back: what the
        # source has is here too, and one of the two swaps wins.
        claim.row, claim.rev = row, rev
        # Fence first: from here on nothing of this epoch is acknowledged.
        self.fences[backup.server] = max(self.fences.get(backup.server, 0), row.epoch + 1)
        if claim.host is None and not claim.unfit and backup.copy is None:
            if backup.used_by in core.moves_in:
                self._claim_later(backup.server, now_ms)  # It is being loaded.
                return
            claim.loading = True
            self.port.load_backup(backup)
            return
        self._swap(backup, claim)

    def reopen(
        self,
        follow: Follow,
        logged: list[Logged],
        kept_s: float,
        now_ms: int,
        seen: tuple[Row, int] | None = None,
    ) -> str:
        """A journal was read whose writer is gone; it is to go on here, by a swap on its row.

        Args:
            follow: What it tells of the server; its stream is the journal's id.
            logged: Its last whole cut, and what follows.
            kept_s: The time, in seconds since 1970: nothing of what was let out is missing.
            now_ms: The time.
            seen: The row and its revision as they were before the writer was kept from writing any
                more, if nothing but that makes sure that it is gone: then the row must be the same
                still. A later one may be of somebody who has opened the journal meanwhile, and has
                let out more than was read here. None: the writer's file was not held by anybody.

        Returns:
            Why it cannot be; empty: `Port.load_backup` or `Port.standbys_changed` follows.
        """
        server = follow.server
        if server in self.core.hosted or server in self.core.arriving or server in self.backups:
            return "this node has the server, or a copy of it, already"
        backup = Backup(follow, "", now_ms)
        backup.journal = backup.checked = backup.valid = True
        backup.kept_s = kept_s
        for message in logged:
            backup.number = message.number
            if type(message) is Cut:
                backup.image.take(message.record, message.whole, now_ms)
            elif type(message) is Step:
                backup.image.steps.append(message.step)
            elif type(message) is Note:
                backup.image.note(message.sessions)
        self.backups[server] = backup
        claim = backup.claim = Claim()
        if seen is not None:
            claim.row, claim.rev = seen
        self.port.read_standby_row(server)
        return ""

    def leftover(
        self, row: Row | None, journal: TransferId, writer: NodeId, *, first: bool
    ) -> Leftover:
        """What to do with a journal here that nobody writes to.

        Args:
            row: Of its server, as just read.
            journal: Its id.
            writer: The node that began its file.
            first: It was found when this node began. Else this node ended it, or could not open it.
        """
        if row is None or row.state is RowState.LOST:
            return Leftover.USELESS
        if row.journal == journal:
            # An owner that lives puts another one in its place. When it dies before that, nobody
            # but this node has the server.
            return Leftover.OPEN if first or self._is_gone(row.owner) else Leftover.WAIT
        if row.owner == writer != self.core.node:
            # A last swap of a dead writer's, which names it, may yet come through.
            return Leftover.WAIT
        return Leftover.USELESS

    def _claim_journal(self, backup: Backup, claim: Claim, row: Row | None, rev: int) -> None:
        """Go on with opening a journal, whose writer writes no more (see `reopen`)."""
        why = ""
        if row is None or row.state is RowState.LOST:
            why = "the server is gone" if row is None else f"the server is lost: {row.cause}"
        elif row.journal != backup.stream:
            why = f"the row of the server names {row.journal or 'no journal'}, at epoch {row.epoch}"
        elif claim.row is not None and rev != claim.rev:
            # What was read since may be older than what somebody else made of it.
            why = f"somebody else has changed the row meanwhile, to epoch {row.epoch}"
        elif claim.unfit:
            why = claim.unfit
        if why or row is None:
            self._drop(backup, why)
            return
        claim.row, claim.rev = row, rev
        if claim.host is None:
            claim.loading = True
            self.port.load_backup(backup)
            return
        self._swap(backup, claim)

    def _stand_by(self, backup: Backup, claim: Claim, row: Row) -> None:
        """There is nothing to take over (any more)."""
        backup.claim = None
        self._unfence(backup.server)
        if claim.host is not None or self.core.node not in row.standbys or not backup.valid:
            # Used up, or not one of this configuration; a living owner feeds it anew.
            self._refuse(backup, "what it had is used up")
        else:
            self._claim_over(backup.server)

    def _claim_over(self, server: ServerId) -> None:
        """What a new owner has sent meanwhile takes the place of what was there."""
        for other in [it for it in self.coming.values() if it.server == server]:
            if other.waits_ms >= 0 and other.keeping is not None:
                waited_ms, other.waits_ms = other.waits_ms, -1
                self.delta_kept(other.stream, other.keeping.number, "", waited_ms)

    def backup_loaded(self, backup: Backup, host: object, reason: str, now_ms: int) -> None:
        """The answer to `Port.load_backup`: a host, or why there is none."""
        server, claim = backup.server, backup.claim
        if self.backups.get(server) is not backup or claim is None or not claim.loading:
            return  # It was dropped meanwhile; what is here now may be newer.
        claim.loading = False
        if host is not None:
            record, _ = backup.image.state(server, now_ms)
            reason = contradiction(record, server)
        if host is None or reason:
            claim.unfit = reason or "it cannot be loaded"
            if backup.journal:
                self._drop(backup, claim.unfit)
                self.core.flush(now_ms)
                return
            me = self.core.node
            self.port.standbys_changed(server, me, Changed.UNFIT, claim.unfit)
            if claim.row is not None and claim.row.owner not in self.core.dead:
                # A living owner is the only one who changes its row; it is told.
                self._refuse(backup, claim.unfit)
                self.core.flush(now_ms)
                return
        else:
            claim.host = host
        self._swap(backup, claim)
        self.core.flush(now_ms)

    def _swap(self, backup: Backup, claim: Claim) -> None:
        row = claim.row
        assert row is not None
        me = self.core.node
        transfer = f"{me}/{row.epoch}/{backup.stream}"
        if backup.journal:
            version = max(backup.version, row.version)
            claim.swap = directory.reopened(row, me, transfer, version)
        elif claim.unfit:
            claim.swap = directory.without_standby(row, me, transfer)
        else:
            then_s, now_s = backup.kept_s, self.port.wall_s()
            version = max(backup.version, row.version)
            claim.swap = directory.promoted(row, me, transfer, version, then_s, now_s)
        claim.doubtful = False
        self._ask_promotion(backup, claim)

    def _ask_promotion(self, backup: Backup, claim: Claim) -> None:
        assert claim.swap is not None
        claim.asked = True
        self.port.promote(backup.server, claim.swap, claim.rev)

    def promoted(self, server: ServerId, row: Row, event: SwapResult, now_ms: int) -> None:
        """The result of `Port.promote` with that row."""
        backup = self.backups.get(server)
        claim = backup.claim if backup is not None else None
        if backup is None or claim is None or not claim.asked:
            return
        if claim.swap is None or claim.swap != row:
            return  # It was asked by an earlier attempt, or to give the server back.
        claim.asked = False
        outcome = event.outcome
        if outcome is SwapOutcome.REFUSED and event.row == claim.swap:
            outcome = SwapOutcome.DONE
        if outcome is SwapOutcome.DONE:
            if claim.unfit:
                self._drop(backup)
            else:
                self._live(backup, claim, claim.swap, event.rev, now_ms)
        elif outcome is SwapOutcome.REFUSED:
            claim.swap = None
            self._claim(backup, claim, event.row, event.rev, now_ms)
        else:
            claim.doubtful = claim.doubtful or outcome is SwapOutcome.UNKNOWN
            self._claim_later(server, now_ms)
        self.core.flush(now_ms)

    def _live(self, backup: Backup, claim: Claim, row: Row, rev: int, now_ms: int) -> None:
        core = self.core
        if backup.copy is not None:
            inc = backup.copy
            inc.row, inc.rev = row, rev
            core.end_arrival(backup.used_by)
        else:
            inc = self._built(backup, claim, row, rev, now_ms)
        self.fences[backup.server] = max(self.fences.get(backup.server, 0), row.epoch)
        self.backups.pop(backup.server, None)
        self._kept.pop(backup.stream, None)
        self.core.cancel_timer(("claim", backup.server))
        self.port.end_stream(backup.stream)
        for other in [it for it in self.coming.values() if it.server == backup.server]:
            self._refuse(other, "it has taken over")
        former = claim.row.owner if claim.row is not None else backup.owner
        cause = f"its owner {node_name(former)} is gone"
        if backup.journal:
            cause = "its journal was opened"
        # Whoever could still write to the file of a journal would hold it.
        if former in self.suspected or (not backup.journal and former not in core.dead):
            self.ousted[backup.stream] = (former, row.epoch, 0)
            self.oust_timer(backup.stream, now_ms)
        self._unfence(backup.server)
        core.take_over(inc, now_ms, backup.stream if backup.journal else "")
        self.port.begin(inc, "on_promote")
        self.port.standbys_changed(inc.id, core.node, Changed.PROMOTED, cause)

    def _built(self, backup: Backup, claim: Claim, row: Row, rev: int, now_ms: int) -> Incarnation:
        core = self.core
        record, replays = backup.image.state(backup.server, now_ms)
        if row.mode is Mode.ASYNC:
            record, replays = _rolled_back(record), {}
        inc = restore(
            record,
            row,
            rev,
            claim.host,
            core.route_hint,
            core.options.window,
            now_ms,
        )
        inc.sender.replays = replays or None
        return inc

    # -- moves to a standby

    def stream_to(self, inc: Incarnation, node: NodeId) -> TransferId:
        """The stream by which a node stands by, if a move there may go on with it; else empty."""
        replica = inc.replica
        if replica is None or replica.mode is not Mode.SYNC:
            return ""
        for follower in replica.followers.values():
            if follower.node == node and not follower.leaving and node in inc.row.standbys:
                fed = follower.phase is FollowerPhase.FED
                return follower.stream if fed and self.port.has_stream(follower.stream) else ""
        return ""

    def can_go_on(self, server: ServerId, stream: TransferId) -> bool:
        """Whether this node has what it was told by a stream."""
        backup = self.backups.get(server)
        return (
            backup is not None
            and backup.stream == stream
            and backup.claim is None
            and not backup.used_by
        )

    def use_up(self, server: ServerId, stream: TransferId, transfer: TransferId) -> bool:
        """A move goes on with what this node has as a standby; False: it has nothing any more."""
        if not self.can_go_on(server, stream):
            return False
        self.backups[server].used_by = transfer
        self.port.adopt_stream(transfer, stream, True)
        return True

    def installed(self, transfer: TransferId, inc: Incarnation) -> None:
        """The copy of a move is complete; it may be all that this node has of the server."""
        backup = self.backups.get(inc.id)
        if backup is not None and backup.used_by == transfer:
            backup.copy = inc

    def move_failed(self, inc: Incarnation, node: NodeId, now_ms: int) -> None:
        """A move to a standby was given up after its last part was made: its stream is over."""
        replica = inc.replica
        for follower in list(replica.followers.values()) if replica is not None else ():
            if follower.node == node:
                self._lose(inc, follower, "a move to it was given up", now_ms)

    def forget_server(self, server: ServerId) -> None:
        """The server has come here by a move: what this node had of it as a standby is over."""
        for other in [it for it in self.coming.values() if it.server == server]:
            self._drop(other)
        backup = self.backups.get(server)
        if backup is not None:
            self._drop(backup)


def server_of(stream: TransferId) -> ServerId:
    """Whose stream it is."""
    return stream.rsplit("/", 3)[0]


def _rolled_back(record: StateRecord) -> StateRecord:
    """What goes into a new generation: as from a checkpoint, see `CheckpointRecord`."""
    casts = [item for s in record.sessions for item in sorted(s.early, key=lambda it: it.seq)]
    met = dict(record.met)
    for sending in record.sending:
        if sending.generation and sending.next_seq > 1:
            met[sending.server] = max(met.get(sending.server, 0), sending.generation)
    return StateRecord(
        limit=record.limit,
        reentrant=record.reentrant,
        run_no=record.run_no,
        mailbox=record.mailbox + casts,
        sessions=[],
        sending=[],
        timers=record.timers,
        plans=record.plans,
        met=met,
        wanted=record.wanted,
    )


__all__ = [
    "JOURNAL",
    "Backup",
    "CaptureFailed",
    "Changed",
    "Claim",
    "Follower",
    "FollowerPhase",
    "Leftover",
    "Replica",
    "StandbyPort",
    "StandbyTimes",
    "Standbys",
    "Standing",
]
