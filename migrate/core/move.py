"""Source and target sides of one move.

Theory of operation (DESIGN section 6). One move has one transfer id. The source leads:

    source                              target
    PREPARING   -- Prepare -->          CHECKING: class, version, room
                <-- Prepared --         RESERVED
    COPYING     -- Chunk -->            (installs it)
                <-- ChunkTaken --       (again and again, while it helps)
    QUIESCING   (waits for the handler)
    ENCODING    (frozen from here on)
    SHIPPING    -- Final -->            DECODING
                <-- Ready --            READY
    COMMITTING  swap (e, source) -> (e+1, target, COMMITTED)
    COMMITTED   -- Activate -->         LIVE: executes, releases nothing
                <-- Activated --
    RELEASING   drops its frozen copy
                -- Dropped -->          releases
                <-- Released --         ENDED
    ENDED

Invariants. (1) From ENCODING until the end the source admits, acknowledges and fires nothing.
(2) Only the source asks for the commit. (3) Until the source has said Dropped, or the target's
own swap has marked the row ACTIVE, the target lets nothing out; so whatever the source takes
back cannot contradict anything that was seen. (4) The source drops its frozen copy only
after the target said Activated, or the row shows that the target is the confirmed owner. So a
target that dies before it lives costs nothing, whatever it promised before.
(5) Both a reclaim and a confirmation compare the revision of the COMMITTED row; one wins.

In doubt. A swap whose outcome is unknown is asked for again, the same row at the same
revision: at most one of the copies can win, and a refusal comes with the row, whose transfer
id says whether an earlier copy did. The source serves nothing meanwhile. It asks for one swap
at a time, so that every result is that of the swap asked last; a row refused that still names
the source at its own epoch was changed by the source's own late confirmation, and the swap is
asked again at the new revision. A READY target that hears nothing reads the row; it may throw its
copy away at any time before LIVE, because the source keeps the frozen one until it hears
Activated, and takes the server back otherwise.

Far directories. From RESERVED on the target watches the row, and once it is READY it goes live by
the commit it sees there. Where the directory is near the target and a round trip away from the
source, it lives, and has said so, by the time that the source hears of its own swap; and its
Activated proves the commit to a source that has not heard of it. So a server stands still for two
and a half round trips, whichever of the two has the directory near: state and Ready, commit and
Activated, Dropped. A watch decides nothing else, as what it shows may be old, and nothing needs it:
Activate is sent all the same.

Pre-copy. While it serves, the source sends its state ahead in rounds of chunks: all that is large
first, then what changed since, and each chunk waits for the former one's ChunkTaken. Rounds go on
while each is well smaller than the one before and still takes time worth saving; what a writer
changes faster than it can be sent is left for Final. The chunks are worth nothing by themselves:
only Final, made at the quiescent point, makes a state of them, and it says how many there were.
Source: Clark and others, Live Migration of Virtual Machines, NSDI 2005.

A move to a standby ships only what the standby has not been told: its stream takes the place of the
chunks.

Every message is repeated until the next one answers it, so each may be lost or come twice;
messages that do not fit the phase are dropped.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias

from msgspec import structs

from migrate.core import directory
from migrate.core.actions import (
    Action,
    CheckClass,
    CopyAhead,
    DecodeState,
    DropCopy,
    EncodeState,
    Finish,
    GoLive,
    Point,
    Quiesce,
    Reach,
    ReadRow,
    Release,
    Result,
    Resume,
    SetTimer,
    StartForwarding,
    SwapRow,
    TakeChunk,
    Tell,
    WatchRow,
)
from migrate.core.directory import Row, RowState
from migrate.core.events import (
    Checked,
    Copied,
    Decoded,
    DecodeFailed,
    Encoded,
    EncodeFailed,
    NodeDead,
    PeerUp,
    Quiesced,
    RowRead,
    RowSeen,
    SwapOutcome,
    SwapResult,
    Taken,
    TimerFired,
    Withdraw,
)
from migrate.core.ids import NodeId, TransferId, node_name
from migrate.core.machine import Story, check
from migrate.core.messages import (
    Abort,
    Activate,
    Activated,
    ActivateRefused,
    Chunk,
    ChunkTaken,
    Dropped,
    Final,
    FinalFailed,
    MoveMessage,
    Prepare,
    Prepared,
    PrepareRefused,
    Ready,
    Released,
)


@dataclass(frozen=True, slots=True)
class MoveTimes:
    """Waits of a move, all in milliseconds.

    Attributes:
        repeat_ms: A message without answer is sent again after this; well above a round trip.
        step_ms: A step before the commit that takes longer rolls the move back.
        quiesce_ms: How long a running handler is waited for.
        reclaim_ms: How long the source waits for a silent target after the commit before it
            takes the server back.
        confirm_ms: How long a live target waits for the source's Dropped before it confirms
            its ownership in the directory.
        reserve_ms: How long a target keeps what a silent source left with it.
        ship_bytes_per_ms: Slowest transfer that is still waited for.
        copy_ms: A round of pre-copy whose bytes take less than this is the last one: the final
            delta will be about as quick, and another round would cost what it saves.
        rounds_max: Most rounds of pre-copy. Source: beyond some 5 to 10, real pre-copies of
            machines and processes did not get smaller any more (Clark and others, as above).
        shrink_percent: A round that is not smaller than this share of the one before is the last.
    """

    repeat_ms: int = 250
    step_ms: int = 10_000
    quiesce_ms: int = 30_000
    reclaim_ms: int = 10_000
    confirm_ms: int = 1_000
    reserve_ms: int = 60_000
    ship_bytes_per_ms: int = 20_000
    copy_ms: int = 2
    rounds_max: int = 8
    shrink_percent: int = 70


Happening: TypeAlias = (
    MoveMessage
    | SwapResult
    | RowRead
    | RowSeen
    | Quiesced
    | Copied
    | Taken
    | Encoded
    | EncodeFailed
    | Checked
    | Decoded
    | DecodeFailed
    | PeerUp
    | NodeDead
    | TimerFired
    | Withdraw
)


class SourcePhase(enum.IntEnum):
    """Phases of the source, in order; before COMMITTING it may roll back by itself."""

    PREPARING = 0
    COPYING = 1
    QUIESCING = 2
    ENCODING = 3
    SHIPPING = 4
    COMMITTING = 5
    COMMITTED = 6
    RECLAIMING = 7
    RELEASING = 8
    ENDED = 9


class SourceMove:
    """The leading side. Feed it events with `handle`; perform what it returns, in order."""

    __slots__ = (
        "_asking",
        "_chunk",
        "_copying_ms",
        "_deadline_ms",
        "_doubtful",
        "_round_bytes",
        "_round_ended",
        "_state",
        "_target_is_dead",
        "_times",
        "_version_here",
        "by_value",
        "chunks",
        "copied_bytes",
        "cut_number",
        "ended_ms",
        "frozen_ms",
        "node",
        "phase",
        "python",
        "reclaim_transfer",
        "rev",
        "rounds",
        "row",
        "server",
        "started_ms",
        "state_bytes",
        "story",
        "stream",
        "target",
        "transfer",
        "version",
    )

    def __init__(
        self,
        *,
        node: NodeId,
        target: NodeId,
        row: Row,
        rev: int,
        transfer: TransferId,
        by_value: bool,
        python: str,
        times: MoveTimes,
    ) -> None:
        self.node = node
        self.target = target
        self.row = row
        self.rev = rev
        self.server = row.server
        self.transfer = transfer
        self.reclaim_transfer = transfer + "/back"
        self.by_value = by_value
        self.python = python
        self.version = row.version
        self._version_here = row.version
        self.phase = SourcePhase.PREPARING
        self.story = Story()
        self.started_ms = 0
        self.frozen_ms = 0
        self.ended_ms = 0
        self.state_bytes = 0
        self.rounds = 0  # of pre-copy
        self.chunks = 0  # sent ahead
        self.copied_bytes = 0
        self.cut_number = -1  # of the cut that the standbys have to acknowledge before it leaves
        self.stream = ""  # of the target, if it is a standby of the server
        self._chunk = b""  # sent, and not taken yet
        self._copying_ms = 0
        self._round_bytes = [0, 0]  # of the former round, and of this one
        self._round_ended = False
        self._state = b""
        self._times = times
        self._deadline_ms = 0
        self._asking = False  # a swap has been asked for, and its result has not come
        self._doubtful = False
        self._target_is_dead = False

    # -- small steps ------------------------------------------------------------------

    def _enter(self, phase: SourcePhase, now_ms: int, limit_ms: int) -> None:
        self.phase = phase
        self._deadline_ms = now_ms + limit_ms

    def start(self, now_ms: int) -> list[Action]:
        """Begin; the first actions."""
        self.started_ms = now_ms
        self._enter(SourcePhase.PREPARING, now_ms, self._times.step_ms)
        return [
            Tell(self.target, self._prepare()),
            Reach(Point.PREPARE_SENT),
            SetTimer(self._times.repeat_ms),
        ]

    def _prepare(self) -> Prepare:
        row = self.row
        return Prepare(
            transfer=self.transfer,
            server=row.server,
            epoch=row.epoch,
            cls=row.cls,
            version=row.version,
            by_value=self.by_value,
            python=self.python,
            name=row.name,
            stream=self.stream,
        )

    def _final(self) -> Final:
        epoch = self.row.epoch
        return Final(self.transfer, self.server, epoch, self._state, self.chunks, self.stream)

    def _sent_ahead(self) -> Chunk:
        return Chunk(self.transfer, self.chunks - 1, self._chunk)

    def _activate(self) -> Activate:
        return Activate(self.transfer, self.row, self.rev)

    def _end(self, now_ms: int, result: Result, reason: str = "") -> list[Action]:
        self.phase = SourcePhase.ENDED
        self.ended_ms = now_ms
        self._state = self._chunk = b""
        return [Finish(result, reason)]

    def _roll_back(self, now_ms: int, result: Result, reason: str) -> list[Action]:
        check(self.phase < SourcePhase.COMMITTING, "roll-back after the swap was asked", self.story)
        actions: list[Action] = [Tell(self.target, Abort(self.transfer))]
        if self.phase >= SourcePhase.QUIESCING:
            actions.append(Resume(self.row, self.rev))
        return actions + self._end(now_ms, result, reason)

    def _commit_row(self) -> Row:
        row = directory.committed(self.row, self.target, self.transfer, self.version)
        return structs.replace(row, previous=self.node)

    def _is_confirmed(self, row: Row) -> bool:
        """Whether this very move has ended at the target, which lives as far as is known."""
        return (
            row.owner == self.target
            and row.transfer == self.transfer
            and row.state is RowState.ACTIVE
        )

    def _commit_swap(self) -> SwapRow:
        self._asking = True
        return SwapRow(self._commit_row(), self.rev)

    def _reclaim(self, now_ms: int) -> list[Action]:
        self._enter(SourcePhase.RECLAIMING, now_ms, 0)
        self._doubtful = False
        return [self._reclaim_swap(), SetTimer(self._times.repeat_ms)]

    def _reclaim_swap(self) -> SwapRow:
        # `row` and `rev` are the committed row here.
        back = directory.reclaimed(self.row, self.node, self.reclaim_transfer, self._version_here)
        self._asking = True
        return SwapRow(back, self.rev)

    def _target_owns(self, now_ms: int, *, tell: bool) -> list[Action]:
        """The target is live (and says so, or the row does): nothing of the server stays."""
        self._enter(SourcePhase.RELEASING, now_ms, self._times.step_ms)
        self._asking = False  # whatever is still under way can change nothing
        self._state = b""
        actions: list[Action] = [DropCopy(), Reach(Point.COPY_DROPPED)]
        if tell:
            actions += [Tell(self.target, Dropped(self.transfer))]
            actions += [SetTimer(self._times.repeat_ms)]
            return actions
        return actions + self._end(now_ms, Result.MOVED)

    # -- the machine ------------------------------------------------------------------

    def handle(self, event: Happening, now_ms: int) -> list[Action]:
        """Take one event.

        Args:
            event: A message of this transfer, the result of an action, or time.
            now_ms: The shell's clock.

        Returns:
            Actions to perform in order; empty where the event is late or repeated.
        """
        opaque = isinstance(event, Encoded | Copied)
        self.story.note(now_ms, type(event).__name__ if opaque else event)
        phase = self.phase
        match event:
            case TimerFired():
                return self._timer(now_ms)
            case Prepared() if phase is SourcePhase.PREPARING:
                self.version = max(event.version, self.row.version)
                if event.follows and self.stream and self.version == self._version_here:
                    return [Reach(Point.PREPARED), *self._quiesce(now_ms)]
                self.stream = ""
                if not event.takes_chunks or self.version != self._version_here:
                    return [Reach(Point.PREPARED), *self._quiesce(now_ms)]
                self._copying_ms = now_ms
                return [Reach(Point.PREPARED), *self._copy(now_ms)]
            case PrepareRefused() if phase is SourcePhase.PREPARING:
                return self._end(now_ms, Result.REFUSED, event.reason)
            case Copied() if phase is SourcePhase.COPYING and not self._chunk:
                return self._copied(event, now_ms)
            case ChunkTaken() if phase is SourcePhase.COPYING:
                if not self._chunk or event.number != self.chunks - 1:
                    return []
                self._chunk = b""
                return [Reach(Point.CHUNK_TAKEN), *self._go_on_copying(now_ms)]
            case Quiesced() if phase is SourcePhase.QUIESCING:
                self._enter(SourcePhase.ENCODING, now_ms, self._times.quiesce_ms)
                self.frozen_ms = now_ms
                return [Reach(Point.QUIESCED), self._encode()]
            case Encoded() if phase is SourcePhase.ENCODING:
                self._state = event.state
                self.state_bytes = len(event.state)
                limit = self._times.step_ms + self.state_bytes // self._times.ship_bytes_per_ms
                self._enter(SourcePhase.SHIPPING, now_ms, limit)
                return [
                    Reach(Point.FINAL_ENCODED),
                    Tell(self.target, self._final()),
                    Reach(Point.FINAL_SENT),
                    SetTimer(self._times.step_ms),
                ]
            case EncodeFailed() if phase is SourcePhase.ENCODING:
                result = Result.NOT_PICKLABLE if event.path else Result.ROLLED_BACK
                return self._roll_back(now_ms, result, event.reason)
            case FinalFailed() if phase in (SourcePhase.COPYING, SourcePhase.SHIPPING):
                reason = f"{node_name(self.target)} could not load the state: {event.reason}"
                return self._roll_back(now_ms, Result.ROLLED_BACK, reason)
            case Ready() if phase is SourcePhase.SHIPPING:
                # Last point where rolling back is ours to decide.
                self._enter(SourcePhase.COMMITTING, now_ms, 0)
                return [
                    Reach(Point.READY_RECEIVED),
                    self._commit_swap(),
                    Reach(Point.SWAP_ASKED),
                ]
            case SwapResult() if phase is SourcePhase.COMMITTING:
                self._asking = False
                return self._commit_result(event, now_ms)
            case SwapResult() if phase is SourcePhase.RECLAIMING:
                self._asking = False
                return self._reclaim_result(event, now_ms)
            case Activated() if phase is SourcePhase.COMMITTING and not self._target_is_dead:
                # It has seen the row, so the swap took effect, whatever we hear of it ourselves.
                self.row = self._commit_row()
                return [
                    Reach(Point.ACTIVATED_RECEIVED),
                    StartForwarding(self.target, self.row.epoch),
                    *self._target_owns(now_ms, tell=True),
                ]
            case Activated() if phase is SourcePhase.COMMITTED:
                return [Reach(Point.ACTIVATED_RECEIVED), *self._target_owns(now_ms, tell=True)]
            case Activated() if phase is SourcePhase.RELEASING:
                return [Tell(self.target, Dropped(self.transfer))]
            case ActivateRefused() if phase is SourcePhase.COMMITTED:
                return self._reclaim(now_ms)
            case Released() if phase is SourcePhase.RELEASING:
                return self._end(now_ms, Result.MOVED)
            case PeerUp(node=self.target):
                return self._repeat()
            case NodeDead(node=self.target):
                return self._target_dead(now_ms)
            case Withdraw() if phase < SourcePhase.COMMITTING:
                return self._roll_back(now_ms, Result.ROLLED_BACK, event.reason)
            case _:
                # Late, repeated, or meant for a phase that is over.
                return []

    def _encode(self) -> EncodeState:
        return EncodeState(self.version, self.chunks > 0 or bool(self.stream), self.stream)

    # -- pre-copy

    def _quiesce(self, now_ms: int) -> list[Action]:
        self._enter(SourcePhase.QUIESCING, now_ms, self._times.quiesce_ms)
        return [Quiesce(), SetTimer(self._times.quiesce_ms)]

    def _copy(self, now_ms: int) -> list[Action]:
        # The shell waits for a moment between two messages, as the final capture will.
        self._enter(SourcePhase.COPYING, now_ms, self._times.quiesce_ms)
        return [CopyAhead(), SetTimer(self._times.quiesce_ms)]

    def _copied(self, event: Copied, now_ms: int) -> list[Action]:
        if event.failed:
            self.chunks = 0
            return self._quiesce(now_ms)
        self._round_ended = event.round_ended
        size = len(event.state)
        if not size:
            return self._go_on_copying(now_ms)
        self._chunk = event.state
        self.chunks += 1
        self.copied_bytes += size
        self._round_bytes[1] += size
        limit = self._times.step_ms + size // self._times.ship_bytes_per_ms
        self._enter(SourcePhase.COPYING, now_ms, limit)
        return [
            Tell(self.target, self._sent_ahead()),
            Reach(Point.CHUNK_SENT),
            SetTimer(limit),
        ]

    def _go_on_copying(self, now_ms: int) -> list[Action]:
        if not self._round_ended:
            return self._copy(now_ms)
        if not self.chunks:
            return self._quiesce(now_ms)  # There was nothing that could be sent ahead.
        self.rounds += 1
        self._round_ended = False
        times = self._times
        former, this = self._round_bytes
        self._round_bytes = [this, 0]
        # Bytes that go ahead in a millisecond, all told: captured, sent, installed.
        rate = self.copied_bytes // max(1, now_ms - self._copying_ms)
        is_worth_it = this > rate * times.copy_ms
        shrinks = self.rounds == 1 or this * 100 <= former * times.shrink_percent
        if is_worth_it and shrinks and self.rounds < times.rounds_max:
            return self._copy(now_ms)
        return self._quiesce(now_ms)

    def _commit_result(self, event: SwapResult, now_ms: int) -> list[Action]:
        wanted = self._commit_row()
        outcome = event.outcome
        if outcome is SwapOutcome.REFUSED and event.row == wanted:
            outcome = SwapOutcome.DONE
        if outcome is SwapOutcome.DONE:
            self.row, self.rev = wanted, event.rev
            self._enter(SourcePhase.COMMITTED, now_ms, self._times.reclaim_ms)
            if self._target_is_dead:
                return self._reclaim(now_ms)
            return [
                Tell(self.target, self._activate()),
                Reach(Point.ACTIVATE_SENT),
                StartForwarding(self.target, self.row.epoch),
                SetTimer(self._times.repeat_ms),
            ]
        if outcome is SwapOutcome.REFUSED:
            row = event.row
            if row is not None and self._is_confirmed(row):
                # It took effect, and the target has confirmed already.
                self.row, self.rev = row, event.rev
                return [
                    StartForwarding(self.target, row.epoch),
                    *self._target_owns(now_ms, tell=True),
                ]
            if row is not None and row.owner == self.node and row.epoch == self.row.epoch:
                # Our own confirmation of an earlier move came through late. Nobody else may
                # change the row, and what was asked at the old revision can win no more.
                self.row, self.rev = row, event.rev
                self._doubtful = False
                return [self._commit_swap(), SetTimer(self._times.repeat_ms)]
            # Somebody else changed the row: a newer epoch exists, so stop.
            reason = f"the directory refused the swap; the row is now {row}"
            return [
                Tell(self.target, Abort(self.transfer)),
                DropCopy(),
                *self._end(now_ms, Result.FENCED, reason),
            ]
        if outcome is SwapOutcome.NOT_DONE and not self._doubtful:
            self.phase = SourcePhase.SHIPPING
            return self._roll_back(
                now_ms, Result.ROLLED_BACK, f"the directory could not be reached: {event.cause}"
            )
        # Unknown: ask again, the same, until it is known. Nothing is served meanwhile.
        self._doubtful = True
        return [SetTimer(self._times.repeat_ms)]

    def _reclaim_result(self, event: SwapResult, now_ms: int) -> list[Action]:
        wanted = directory.reclaimed(self.row, self.node, self.reclaim_transfer, self._version_here)
        outcome = event.outcome
        if outcome is SwapOutcome.REFUSED and event.row == wanted:
            outcome = SwapOutcome.DONE
        if outcome is SwapOutcome.DONE:
            self.row, self.rev = wanted, event.rev
            reason = (
                f"{node_name(self.target)} did not come alive after the commit; "
                f"{node_name(self.node)} took the server back at epoch {wanted.epoch}"
            )
            return [
                Tell(self.target, Abort(self.transfer)),
                Resume(wanted, event.rev),
                *self._end(now_ms, Result.ROLLED_BACK, reason),
            ]
        if outcome is SwapOutcome.REFUSED:
            row = event.row
            if row is not None and self._is_confirmed(row):
                return self._target_owns(now_ms, tell=False)
            reason = f"the row changed while the server was taken back; it is now {row}"
            return [DropCopy(), *self._end(now_ms, Result.FENCED, reason)]
        return [SetTimer(self._times.repeat_ms)]

    def _timer(self, now_ms: int) -> list[Action]:
        phase = self.phase
        if phase is SourcePhase.ENDED:
            return []
        if self._asking:
            return [SetTimer(self._times.repeat_ms)]
        if phase is SourcePhase.COMMITTING:
            return [self._commit_swap(), SetTimer(self._times.repeat_ms)]
        if phase is SourcePhase.RECLAIMING:
            return [self._reclaim_swap(), SetTimer(self._times.repeat_ms)]
        late = now_ms >= self._deadline_ms
        if late and phase is SourcePhase.COMMITTED:
            return self._reclaim(now_ms)
        if late and phase is SourcePhase.RELEASING:
            # The target confirms by itself; nobody waits for us.
            return self._end(now_ms, Result.MOVED)
        if late and phase is not SourcePhase.ENCODING:
            return self._roll_back(now_ms, Result.ROLLED_BACK, self._late_reason())
        return [*self._repeat(), SetTimer(max(1, self._next_wait(now_ms)))]

    def _next_wait(self, now_ms: int) -> int:
        left = self._deadline_ms - now_ms
        if self.phase in (SourcePhase.COPYING, SourcePhase.QUIESCING, SourcePhase.SHIPPING):
            return left
        return min(left, self._times.repeat_ms) if left > 0 else self._times.repeat_ms

    def _late_reason(self) -> str:
        target = node_name(self.target)
        if self.phase is SourcePhase.QUIESCING or (
            self.phase is SourcePhase.COPYING and not self._chunk
        ):
            return (
                f"a handler (or a task it started) ran on for more than the quiesce time-out "
                f"of {self._times.quiesce_ms / 1000:g} s"
            )
        preparing = self.phase is SourcePhase.PREPARING
        what = "the request to move" if preparing else "what was sent of the state"
        return f"{target} did not answer {what} in time"

    def _repeat(self) -> list[Action]:
        """Send again what waits for an answer."""
        match self.phase:
            case SourcePhase.PREPARING:
                return [Tell(self.target, self._prepare())]
            case SourcePhase.COPYING if self._chunk:
                return [Tell(self.target, self._sent_ahead())]
            case SourcePhase.SHIPPING:
                return [Tell(self.target, self._final())]
            case SourcePhase.COMMITTED:
                return [Tell(self.target, self._activate())]
            case SourcePhase.RELEASING:
                return [Tell(self.target, Dropped(self.transfer))]
            case _:
                return []

    def _target_dead(self, now_ms: int) -> list[Action]:
        phase = self.phase
        if phase < SourcePhase.COMMITTING:
            reason = f"node {node_name(self.target)} died before the commit"
            return self._roll_back(now_ms, Result.ROLLED_BACK, reason)
        if phase is SourcePhase.COMMITTED:
            return self._reclaim(now_ms)
        if phase is SourcePhase.RELEASING:
            return self._end(now_ms, Result.MOVED)
        # COMMITTING and RECLAIMING resolve their swap first.
        self._target_is_dead = True
        return []


class TargetPhase(enum.IntEnum):
    """Phases of the target, in order; before LIVE it may throw its copy away."""

    CHECKING = 0
    RESERVED = 1
    DECODING = 2
    READY = 3
    LIVE = 4
    ENDED = 5


class TargetMove:
    """The following side. Made when a Prepare arrives; `start` gives the first actions."""

    __slots__ = (
        "_deadline_ms",
        "_epoch",
        "_installing",
        "_source_dead",
        "_times",
        "_version",
        "chunks",
        "follows",
        "node",
        "phase",
        "prepare",
        "rev",
        "row",
        "server",
        "source",
        "story",
        "transfer",
    )

    def __init__(self, *, node: NodeId, source: NodeId, prepare: Prepare, times: MoveTimes) -> None:
        self.node = node
        self.source = source
        self.prepare = prepare
        self.server = prepare.server
        self.transfer = prepare.transfer
        self.phase = TargetPhase.CHECKING
        self.story = Story()
        self.row: Row | None = None
        self.rev = 0
        self._epoch = prepare.epoch + 1
        self._times = times
        self._version = 0
        self._deadline_ms = 0
        self._source_dead = False
        self.chunks = 0  # taken
        self.follows = False  # it has the server as a standby
        self._installing = False

    def start(self, now_ms: int) -> list[Action]:
        """Begin; the first actions."""
        prepare = self.prepare
        self._deadline_ms = now_ms + self._times.reserve_ms
        return [
            Reach(Point.PREPARE_RECEIVED),
            CheckClass(prepare.cls, prepare.by_value, prepare.python),
        ]

    def _end(self) -> list[Action]:
        self.phase = TargetPhase.ENDED
        return [Finish(Result.MOVED if self.row is not None else Result.ROLLED_BACK)]

    def _discard(self) -> list[Action]:
        drop: list[Action] = [DropCopy()] if self.phase >= TargetPhase.DECODING else []
        self.phase = TargetPhase.ENDED
        return [*drop, Finish(Result.ROLLED_BACK)]

    def refuse(self, reason: str) -> list[Action]:
        """Turn the move down (no room, draining, the id is taken); ends it."""
        self.phase = TargetPhase.ENDED
        return [
            Tell(self.source, PrepareRefused(self.transfer, reason)),
            Finish(Result.REFUSED, reason),
        ]

    def handle(self, event: Happening, now_ms: int) -> list[Action]:
        """Take one event; see `SourceMove.handle`."""
        opaque = isinstance(event, Final | Chunk)
        self.story.note(now_ms, type(event).__name__ if opaque else event)
        phase = self.phase
        if phase is TargetPhase.ENDED:
            return []
        match event:
            case TimerFired():
                return self._timer(now_ms)
            case Checked() if phase is TargetPhase.CHECKING:
                if event.refusal:
                    return self.refuse(event.refusal)
                if event.version < self.prepare.version:
                    return self.refuse(
                        f"{self.prepare.cls} has version {event.version} there, older than the "
                        f"server's version {self.prepare.version}; update that node first"
                    )
                self._version = event.version
                self.phase = TargetPhase.RESERVED
                return [
                    Tell(self.source, self._prepared()),
                    WatchRow(),
                    SetTimer(self._times.reserve_ms),
                ]
            case Prepare() if phase is TargetPhase.RESERVED:
                return [Tell(self.source, self._prepared())]
            case Chunk() if phase is TargetPhase.RESERVED:
                return self._chunk(event, now_ms)
            case Taken() if phase is TargetPhase.RESERVED and self._installing:
                self._installing = False
                self.chunks += 1
                return [Tell(self.source, ChunkTaken(self.transfer, self.chunks - 1))]
            case Final() if phase is TargetPhase.RESERVED:
                if event.chunks and (event.chunks != self.chunks or self._installing):
                    lacks = f"it has {self.chunks} of the {event.chunks} chunks sent ahead"
                    return self._fail(lacks)
                if event.stream and not self.follows:
                    return self._fail("it does not stand by (any more)")
                self.phase = TargetPhase.DECODING
                ahead = event.chunks > 0 or bool(event.stream)
                state = DecodeState(event.state, self._epoch, ahead, event.stream)
                return [Reach(Point.FINAL_RECEIVED), state]
            case Final() if phase is TargetPhase.READY:
                return [Tell(self.source, Ready(self.transfer))]
            case Decoded() if phase is TargetPhase.DECODING:
                self.phase = TargetPhase.READY
                self._deadline_ms = now_ms + self._times.reserve_ms
                return [
                    Reach(Point.READY),
                    Tell(self.source, Ready(self.transfer)),
                    SetTimer(self._times.confirm_ms),
                ]
            case DecodeFailed() if phase is TargetPhase.DECODING or (
                phase is TargetPhase.RESERVED and self._installing
            ):
                return self._fail(event.reason)
            case Activate() if phase is TargetPhase.READY:
                given = event.row
                mine = given.owner == self.node and given.transfer == self.transfer
                if not mine or given.server != self.server or given.epoch != self._epoch:
                    return []  # a peer that contradicts itself; the row will tell
                return self._go_live(given, event.rev, now_ms)
            case Activate() if phase is TargetPhase.LIVE:
                return [Tell(self.source, Activated(self.transfer))]
            case Dropped() if phase is TargetPhase.LIVE:
                return self._release(0)
            case Abort() if phase < TargetPhase.LIVE:
                return self._discard()
            case Abort() if phase is TargetPhase.LIVE:
                # Perhaps the source won the row back; only the row can tell.
                return [ReadRow()]
            case RowRead():
                return self._row_read(event, now_ms)
            case RowSeen() if phase is TargetPhase.READY:
                return self._row_seen(event, now_ms)
            case SwapResult() if phase is TargetPhase.LIVE:
                return self._confirm_result(event)
            case PeerUp(node=self.source):
                return self._repeat()
            case NodeDead(node=self.source):
                self._source_dead = True
                if phase < TargetPhase.READY:
                    return self._discard()
                return [ReadRow()]
            case Withdraw() if phase < TargetPhase.LIVE and not self._source_dead:
                # With the source dead this may be the only copy; the row will tell.
                return self._discard()
            case _:
                return []

    def _prepared(self) -> Prepared:
        return Prepared(self.transfer, self._version, True, self.follows)

    def _chunk(self, event: Chunk, now_ms: int) -> list[Action]:
        if event.number < self.chunks:
            return [Tell(self.source, ChunkTaken(self.transfer, event.number))]
        if self._installing or event.number != self.chunks:
            return []
        self._installing = True
        self._deadline_ms = now_ms + self._times.reserve_ms
        return [Reach(Point.CHUNK_RECEIVED), TakeChunk(event.number, event.state)]

    def _fail(self, reason: str) -> list[Action]:
        """Throw away what there is of the copy: the source serves on."""
        drop: list[Action] = [DropCopy()] if self.phase >= TargetPhase.DECODING else []
        self.phase = TargetPhase.ENDED
        return [
            *drop,
            Tell(self.source, FinalFailed(self.transfer, reason)),
            Finish(Result.ROLLED_BACK, reason),
        ]

    def _go_live(self, row: Row, rev: int, now_ms: int) -> list[Action]:
        self.row, self.rev = row, rev
        self.phase = TargetPhase.LIVE
        self._deadline_ms = now_ms + self._times.confirm_ms
        return [
            GoLive(row, rev),
            Reach(Point.ACTIVATED),
            Tell(self.source, Activated(self.transfer)),
            SetTimer(min(self._times.repeat_ms, self._times.confirm_ms)),
        ]

    def _release(self, rev: int) -> list[Action]:
        return [
            Release(rev),
            Tell(self.source, Released(self.transfer)),
            Reach(Point.RELEASED),
            # A repeated Dropped is answered without the machine (`answer_unknown`).
            *self._end(),
        ]

    def _confirm_result(self, event: SwapResult) -> list[Action]:
        row = event.row
        mine = self._is_mine(row)
        if event.outcome is SwapOutcome.DONE and self.row is not None:
            self.row = directory.confirmed(self.row)
            return self._release(event.rev)
        if event.outcome is SwapOutcome.REFUSED:
            if mine and row is not None and row.state is RowState.ACTIVE:
                self.row = row
                return self._release(event.rev)
            if mine and row is not None:
                # The row changed in something else than its owner: ask again from there.
                self.row, self.rev = row, event.rev
                return [SetTimer(1)]
            return self._discard()
        return [SetTimer(self._times.repeat_ms)]

    def _is_mine(self, row: Row | None) -> bool:
        return row is not None and row.transfer == self.transfer and row.owner == self.node

    def _row_seen(self, event: RowSeen, now_ms: int) -> list[Action]:
        if not self._is_mine(event.row):
            return []  # as it was before the commit, or what a reading will show
        return [Reach(Point.COMMIT_SEEN), *self._go_live(event.row, event.rev, now_ms)]

    def _row_read(self, event: RowRead, now_ms: int) -> list[Action]:
        if not event.known:
            return [SetTimer(self._times.repeat_ms)]
        row = event.row
        mine = self._is_mine(row)
        if self.phase is TargetPhase.READY:
            if mine and row is not None:
                return self._go_live(row, event.rev, now_ms)
            if row is None or row.epoch > self.prepare.epoch or row.state is RowState.LOST:
                return self._discard()
            if now_ms >= self._deadline_ms:
                return self._discard()
            return [SetTimer(self._times.confirm_ms)]
        if self.phase is TargetPhase.LIVE:
            if row is not None and row.epoch < self._epoch:
                # Read before the commit, answered after the Activate: it says nothing.
                return [SetTimer(self._times.repeat_ms)]
            if not mine or row is None:
                return self._discard()
            if row.state is RowState.ACTIVE:
                self.row = row
                return self._release(event.rev)
            self.row, self.rev = row, event.rev
            return [
                SwapRow(directory.confirmed(row), event.rev),
                SetTimer(self._times.repeat_ms),
            ]
        return []

    def _timer(self, now_ms: int) -> list[Action]:
        phase = self.phase
        if phase is TargetPhase.RESERVED or phase is TargetPhase.CHECKING:
            left = self._deadline_ms - now_ms
            return [SetTimer(left)] if left > 0 else self._discard()
        if phase is TargetPhase.READY:
            return [
                Tell(self.source, Ready(self.transfer)),
                ReadRow(),
                SetTimer(self._times.confirm_ms),
            ]
        if phase is TargetPhase.LIVE:
            if now_ms >= self._deadline_ms or self._source_dead:
                return [ReadRow(), SetTimer(self._times.repeat_ms)]
            return [
                Tell(self.source, Activated(self.transfer)),
                SetTimer(self._times.repeat_ms),
            ]
        return []

    def _repeat(self) -> list[Action]:
        match self.phase:
            case TargetPhase.RESERVED if self.chunks:
                return [Tell(self.source, ChunkTaken(self.transfer, self.chunks - 1))]
            case TargetPhase.RESERVED:
                return [Tell(self.source, self._prepared())]
            case TargetPhase.READY:
                return [Tell(self.source, Ready(self.transfer))]
            case TargetPhase.LIVE:
                return [Tell(self.source, Activated(self.transfer))]
            case _:
                return []


def answer_unknown(message: MoveMessage) -> MoveMessage | None:
    """What a node says to a move message whose transfer it does not (or no longer) know.

    Returns:
        The answer that lets the other side end, or None where silence is right: the sender
        then finds out from the directory.
    """
    match message:
        case Final() | Chunk():
            return FinalFailed(message.transfer, "it knows nothing of this move (any more)")
        case Activate():
            return ActivateRefused(message.transfer)
        case Dropped():
            return Released(message.transfer)
        case Prepared() | ChunkTaken():
            return Abort(message.transfer)
        case _:
            # NB: a late Ready must not be answered with Abort: the move may have succeeded and
            # been forgotten here. The target reads the row.
            return None
