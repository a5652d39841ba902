"""The core with one mechanism taken away at a time. For the failing controls only."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from migrate.core import directory
from migrate.core.actions import GoLive, StartForwarding
from migrate.core.delivery import Entry, ReceiveSession, SendSession
from migrate.core.events import RowRead, RowSeen
from migrate.core.ids import NodeId, ServerId
from migrate.core.incarnation import Incarnation
from migrate.core.messages import ChunkTaken, Envelope, Final, NotHere
from migrate.core.move import (
    Happening,
    MoveMessage,
    SourceMove,
    SourcePhase,
    TargetMove,
    TargetPhase,
)
from migrate.core.node import Core
from migrate.core.records import StateRecord
from tests.sim.directory import Directory
from tests.sim.host import SimNode


class NoRecords(Core):
    """Results are not kept: a repeat of a completed request finds nothing."""

    def _answer(
        self,
        inc: Incarnation,
        entry: Entry,
        status: int,
        payload: bytes | None,
        value: object,
        now_ms: int,
    ) -> None:
        super()._answer(inc, entry, status, payload, value, now_ms)
        session = entry.session
        record = session.records.pop(entry.seq, None) if session is not None else None
        if session is not None and record is not None:
            inc.records -= 1
            inc.record_bytes -= len(record.payload)
            session.acked_below = max(session.acked_below, entry.seq + 1)


class NothingHeldBack(Core):
    """The target releases as soon as it is live, before the source has dropped its copy."""

    def _go_live(self, target: TargetMove, action: GoLive, now_ms: int) -> None:
        super()._go_live(target, action, now_ms)
        inc = self.hosted[target.server]
        inc.holding = False
        inc.sender.muted = False
        held, inc.held = inc.held, []
        for node, message in held:
            self.send(node, message)
        self._send_outstanding(inc, now_ms)

    def _drop_target(self, target: TargetMove, now_ms: int) -> None:
        inc = self.hosted.get(target.server)
        if inc is not None:
            inc.holding = True
        super()._drop_target(target, now_ms)


class PlainWrite(Directory):
    """The directory writes whatever the revision is."""

    def _matches(self, server: ServerId, rev: int) -> bool:
        return server in self.rows


class CopyDroppedAtCommit(Core):
    """The source gives its frozen copy up when the swap is done, not when the target lives."""

    def _start_forwarding(self, source: SourceMove, action: StartForwarding, now_ms: int) -> None:
        super()._start_forwarding(source, action, now_ms)
        self._drop_source(source, now_ms)


class MailboxStays(Core):
    """What is unhandled does not travel."""

    def export(self, inc: Incarnation, now_ms: int) -> StateRecord:
        record = super().export(inc, now_ms)
        record.mailbox = []
        return record


class NoOrder(Core):
    """Each message is admitted as it arrives; numbers only stop repetitions."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: dict[str, dict[int, None]] = {}

    def _arrive(self, inc: Incarnation, env: Envelope, now_ms: int) -> None:
        session = inc.sessions.get(env.session)
        if session is None or env.seq <= session.expected or env.kind > 1:
            super()._arrive(inc, env, now_ms)
            self._skip(session)
            return
        seen = self.seen.setdefault(session.id, {})
        if env.seq in seen or self._no_room(inc):
            return
        seen[env.seq] = None
        expected = session.expected
        self._admit(inc, session, self._entry(session, env, now_ms), now_ms)
        session.expected = expected

    def _skip(self, session: ReceiveSession | None) -> None:
        seen = self.seen.get(session.id, {}) if session is not None else {}
        while session is not None and session.expected in seen:
            session.expected += 1


class NoForwarding(Core):
    """Late envelopes are dropped in silence, and senders do not repeat."""

    def _forward(self, env: Envelope, node: NodeId, epoch: int) -> None:
        pass

    def _turn_away(self, server: ServerId) -> None:
        self._knocking.pop(server, None)

    def _repeat(self, session: SendSession, now_ms: int) -> None:
        session.repeat_armed = False


class NotHereInstead(Core):
    """Late envelopes are not passed on; their senders have to ask the directory."""

    def _forward(self, env: Envelope, node: NodeId, epoch: int) -> None:
        self.send(env.reply_to, NotHere(env.server, env.session, env.seq))


class NoRepeats(Core):
    """Senders do not repeat; what `NoForwarding` is compared with."""

    def _repeat(self, session: SendSession, now_ms: int) -> None:
        session.repeat_armed = False


class StaleRowsBelieved(Core):
    """The epoch of a row is not looked at: one read before the commit passes for the present."""

    def move_event(self, transfer: str, incoming: bool, event: Happening, now_ms: int) -> None:
        target = self.moves_in.get(transfer) if incoming else None
        if (
            target is not None
            and isinstance(event, RowRead)
            and target.phase is TargetPhase.LIVE
            and event.row is not None
            and event.row.owner != self.node
        ):
            self._apply_target(target, target._discard(), now_ms)
            return
        super().move_event(transfer, incoming, event, now_ms)


class AnyRowBelieved(Core):
    """A watch that shows the row as it was before the commit is taken for word of the commit."""

    def move_event(self, transfer: str, incoming: bool, event: Happening, now_ms: int) -> None:
        target = self.moves_in.get(transfer) if incoming else None
        if target is not None and isinstance(event, RowSeen):
            commit = directory.committed(event.row, self.node, transfer, event.row.version)
            event = RowSeen(commit, event.rev)
        super().move_event(transfer, incoming, event, now_ms)


class StaleSendersHeard(Core):
    """The receiver takes a request whatever epoch of its sender it comes from."""

    def _arrive(self, inc: Incarnation, env: Envelope, now_ms: int) -> None:
        session = inc.sessions.get(env.session)
        if session is not None:
            session.sender_epoch = env.sender_epoch
        super()._arrive(inc, env, now_ms)


class SentAgainAtOnce(Core):
    """What was passed on in vain goes the same way again at once."""

    def _on_not_here(self, message: NotHere, node: NodeId, now_ms: int) -> None:
        session = self.sending.get(message.session)
        out = session.outstanding.get(message.seq) if session is not None else None
        if session is not None and out is not None and session.route.node not in (None, node):
            self.dispatch(session, out, now_ms)
        else:
            super()._on_not_here(message, node, now_ms)


class NoHopRule(Core):
    """Envelopes are passed on however often they were already."""

    def _not_hosted(self, env: Envelope, now_ms: int) -> None:
        to = self.forwarding.get(env.server, now_ms)
        if to is not None and env.server not in self.arriving:
            self._forward(env, *to)
        else:
            super()._not_hosted(env, now_ms)

    def _forward(self, env: Envelope, node: NodeId, epoch: int) -> None:
        env.hops += 1
        self.send(node, env)


class RecordsUnbounded(Core):
    """Requests are admitted whatever number of completion records is kept."""

    def _no_room(self, inc: Incarnation) -> bool:
        stands = inc.mailbox_bytes + inc.early_bytes
        return len(inc.mailbox) + inc.early >= inc.limit or stands >= self.options.mailbox_bytes_max


class BytesUncounted(Core):
    """Requests are admitted whatever the arguments take that wait already."""

    def _no_room(self, inc: Incarnation) -> bool:
        options = self.options
        return (
            len(inc.mailbox) + inc.early >= inc.limit
            or inc.records >= options.records_max
            or inc.record_bytes >= options.record_bytes_max
        )


class ChunksUncounted(Core):
    """The source waits for no ChunkTaken, and the target takes a final state whatever it lacks.

    Each of the two is enough to keep a state whole, so both go.
    """

    def move_event(self, transfer: str, incoming: bool, event: Happening, now_ms: int) -> None:
        super().move_event(transfer, incoming, event, now_ms)
        source = self.moves_out.get(transfer)
        if source is not None and source.phase is SourcePhase.COPYING and source._chunk:
            taken = ChunkTaken(transfer, source.chunks - 1)
            super().move_event(transfer, False, taken, now_ms)

    def _on_move_message(self, message: MoveMessage, node: NodeId, now_ms: int) -> None:
        target = self.moves_in.get(message.transfer)
        if isinstance(message, Final) and message.chunks and target is not None:
            target._installing = False
            message = structs.replace(message, chunks=target.chunks)
        super()._on_move_message(message, node, now_ms)


def node_with(core: type[Core]) -> type[SimNode]:
    """A node class of the simulator that runs `core`."""
    return type(f"NodeWith{core.__name__}", (SimNode,), {"core_class": core})
