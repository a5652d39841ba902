"""A core that says at which step of delivery it is, so that tests can end or stop a process there.

Theory of operation. The per-message path pays for nothing that only tests need: `Core` has no
marks on it. `MarkedCore` is the same core with a `Reach` before or after each step, and stands
between the core and its port to see what leaves and what runs. A node that was started with fail
points runs it, no other does. It decides nothing: what it adds are `Reach` actions, and every
method ends in that of `Core`.

A `..._RECEIVED` is reached before anything is done about the message, a `..._SENT` when it is
queued for its peer; whoever ends the process there lets what is queued leave first.
"""

from __future__ import annotations

from typing import Any, Final

from migrate.core.actions import Point, Reach
from migrate.core.delivery import Entry, ReceiveSession, SendSession
from migrate.core.directory import Row
from migrate.core.ids import NodeId, ServerId
from migrate.core.incarnation import Incarnation, Phase
from migrate.core.messages import Acked, Envelope, Message, Moved, NotHere, Receipt, Reply
from migrate.core.node import Core, CoreOptions, Port

_READY: Final[dict[type[Message], Point]] = {
    Reply: Point.REPLY_READY,
    Receipt: Point.RECEIPT_READY,
}
_SENT: Final[dict[type[Message], Point]] = {
    Envelope: Point.REQUEST_SENT,
    Reply: Point.REPLY_SENT,
    Receipt: Point.RECEIPT_SENT,
    Acked: Point.ACKED_SENT,
    Moved: Point.MOVED_SENT,
    NotHere: Point.NOT_HERE_SENT,
}


class _MarkedPort:
    """A port that reaches the points around what goes through it."""

    def __init__(self, port: Port) -> None:
        self._port = port

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)

    def reach(self, point: Point) -> None:
        self._port.perform("", False, Reach(point))

    def send(self, node: NodeId, message: Message) -> None:
        """See `Port.send`."""
        kind = type(message)
        if kind in _READY:
            self.reach(_READY[kind])
        self._port.send(node, message)
        if isinstance(message, Envelope) and message.hops:
            self.reach(Point.REQUEST_FORWARDED)
        elif kind in _SENT:
            self.reach(_SENT[kind])

    def run(self, inc: Incarnation, entry: Entry) -> tuple[int, bytes | None, object] | None:
        """See `Port.run`."""
        self.reach(Point.HANDLER_BEGUN)
        done = self._port.run(inc, entry)
        if done is not None:
            self.reach(Point.HANDLER_DONE)
        return done


class MarkedCore(Core):
    """`Core`, with a point at every step of delivery. See the module's text."""

    def __init__(self, node: NodeId, port: Port, options: CoreOptions, now_ms: int) -> None:
        marked = _MarkedPort(port)
        self._reach = marked.reach
        super().__init__(node, marked, options, now_ms)

    # -- the sender's steps

    def _repeat(self, session: SendSession, now_ms: int) -> None:
        if session.outstanding:
            self._reach(Point.REPEAT_DUE)
        super()._repeat(session, now_ms)

    def located(self, server: ServerId, known: bool, row: Row | None, now_ms: int) -> None:
        """See `Core.located`."""
        self._reach(Point.ROW_LOOKED_UP)
        super().located(server, known, row, now_ms)

    def _on_reply(self, reply: Reply, now_ms: int) -> None:
        self._reach(Point.REPLY_RECEIVED)
        super()._on_reply(reply, now_ms)
        self._reach(Point.REPLY_TAKEN)

    def _on_receipt(self, receipt: Receipt, node: NodeId, now_ms: int) -> None:
        self._reach(Point.RECEIPT_RECEIVED)
        super()._on_receipt(receipt, node, now_ms)

    def _on_moved(self, moved: Moved, now_ms: int) -> None:
        self._reach(Point.MOVED_RECEIVED)
        super()._on_moved(moved, now_ms)

    def _on_not_here(self, message: NotHere, node: NodeId, now_ms: int) -> None:
        self._reach(Point.NOT_HERE_RECEIVED)
        super()._on_not_here(message, node, now_ms)

    # -- the owner's steps, and those of who was it, or will be

    def _on_envelope(self, env: Envelope, now_ms: int) -> None:
        self._reach(Point.REQUEST_RECEIVED)
        super()._on_envelope(env, now_ms)
        inc = self.hosted.get(env.server)
        if inc is not None and inc.phase is Phase.FROZEN and inc.forwarding_to is None:
            self._reach(Point.REQUEST_HELD)
        elif inc is None and env.server in self._knocking:
            self._reach(Point.REQUEST_KNOCKED)

    def _run_now(self, inc: Incarnation, entry: Entry, now_ms: int) -> None:
        self._reach(Point.REQUEST_ADMITTED)
        super()._run_now(inc, entry, now_ms)

    def _pump(self, inc: Incarnation, now_ms: int) -> None:
        if inc.mailbox:
            self._reach(Point.REQUEST_ADMITTED)
        super()._pump(inc, now_ms)

    def finish(
        self,
        inc: Incarnation,
        entry: Entry,
        status: int,
        payload: bytes | None,
        value: object,
        now_ms: int,
    ) -> None:
        """See `Core.finish`."""
        self._reach(Point.HANDLER_DONE)
        super().finish(inc, entry, status, payload, value, now_ms)

    def _repeated(
        self, inc: Incarnation, session: ReceiveSession, seq: int, kind: int, method: str
    ) -> None:
        self._reach(Point.REPEAT_RECEIVED)
        super()._repeated(inc, session, seq, kind, method)

    def _on_acked(self, acked: Acked, now_ms: int) -> None:
        self._reach(Point.ACKED_RECEIVED)
        super()._on_acked(acked, now_ms)

    def _acknowledge(self, inc: Incarnation, session: ReceiveSession, below: int) -> None:
        records = inc.records
        super()._acknowledge(inc, session, below)
        if inc.records < records:
            self._reach(Point.RECORDS_FREED)
