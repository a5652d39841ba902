"""The core with one mechanism of standbys taken away at a time. For the failing controls only."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from migrate.core.delivery import NEVER, Outgoing, Sender, SendSession
from migrate.core.directory import Row
from migrate.core.events import SwapResult
from migrate.core.ids import NodeId, ServerId, TransferId
from migrate.core.incarnation import Incarnation
from migrate.core.messages import Message, Receipt, Reply
from migrate.core.node import Core
from migrate.core.records import Wanted
from migrate.core.standby import (
    Backup,
    Claim,
    Follower,
    FollowerPhase,
    Logged,
    Replica,
    Standbys,
)
from tests.controls.switched_off import StaleSendersHeard
from tests.sim.standbys import StandbyNode


class RepliesNotHeld(Standbys):
    """Replies leave before any standby knows of them."""

    def hold(self, inc: Incarnation, node: NodeId, message: Message) -> None:
        if type(message) is Reply:
            self.core.send(node, message)
        else:
            super().hold(inc, node, message)


class CastsNotNoted(Standbys):
    """Casts are acknowledged before any standby knows of them."""

    def hold(self, inc: Incarnation, node: NodeId, message: Message) -> None:
        if type(message) is Receipt:
            self.core.send(node, message)
        else:
            super().hold(inc, node, message)


class StepsNotTold(Standbys):
    """What a handler asks for in mid-run leaves, and no standby knows of it before the next cut."""

    def step(self, session: SendSession, out: Outgoing, now_ms: int) -> None:
        inc = self.core.hosted.get(session.sender.id)
        if inc is not None and session.sender.gate is not None:
            session.sender.gate.changes.sending[session.id] = session
            self.cut_soon(inc, now_ms)


class NotRepeated(Standbys):
    """After a failover handlers do not go on with the numbers that they had used."""

    def _built(self, backup: Backup, claim: Claim, row: Row, rev: int, now_ms: int) -> Incarnation:
        backup.image.steps.clear()
        return super()._built(backup, claim, row, rev, now_ms)


class NoFence(Standbys):
    """A standby that takes over acknowledges what its former owner says meanwhile."""

    def _admit(self, message: Logged, node: NodeId, now_ms: int) -> Backup | None:
        fence = self.fences.pop(message.server, 0)
        backup = self.backups.get(message.server)
        claim = backup.claim if backup is not None else None
        if backup is not None:
            backup.claim = None
        admitted = super()._admit(message, node, now_ms)
        if backup is not None:
            backup.claim = claim
        self.fences[message.server] = fence
        return admitted


class FenceAfterSwap(NoFence):
    """A standby acknowledges what its former owner says until the swap is done."""

    def promoted(self, server: ServerId, row: Row, event: SwapResult, now_ms: int) -> None:
        self.done = getattr(self, "done", {})
        self.done[server] = None
        super().promoted(server, row, event, now_ms)

    def _admit(self, message: Logged, node: NodeId, now_ms: int) -> Backup | None:
        if message.server in getattr(self, "done", {}):
            return Standbys._admit(self, message, node, now_ms)
        return super()._admit(message, node, now_ms)


class GoesAlone(Standbys):
    """An owner waits no more for a standby that is silent, whatever the row says."""

    def _lose(self, inc: Incarnation, follower: Follower, cause: str, now_ms: int) -> None:
        follower.configured = False
        follower.gates = 0
        super()._lose(inc, follower, cause, now_ms)
        if inc.replica is not None:
            self._acknowledged(inc, inc.replica, now_ms)


class JoinsEarly(Standbys):
    """The swap that names a standby is asked for before that one has anything."""

    def _configure(self, inc: Incarnation, replica: Replica, now_ms: int) -> None:
        acked = {stream: it.acked for stream, it in replica.followers.items()}
        for follower in replica.followers.values():
            if follower.phase >= FollowerPhase.DUE:
                follower.gates = follower.gates or 1
                follower.acked = max(follower.acked, follower.gates)
        super()._configure(inc, replica, now_ms)
        for stream, number in acked.items():
            if stream in replica.followers:
                replica.followers[stream].acked = number


class AnyoneTakesOver(Standbys):
    """A standby takes over although the row does not name it (any more)."""

    def _claim(self, backup: Backup, claim: Claim, row: Row | None, rev: int, now_ms: int) -> None:
        if row is not None and self.core.node not in row.standbys and backup.valid:
            row = structs.replace(row, standbys=(*row.standbys, self.core.node))
        super()._claim(backup, claim, row, rev, now_ms)

    def _check(self, backup: Backup, row: Row | None, now_ms: int) -> None:
        pass

    def _drop(self, backup: Backup) -> None:
        if self.backups.get(backup.server) is not backup or not backup.valid:
            super()._drop(backup)


class NotRewound(Standbys):
    """A new owner does not wait for the other standbys to have what it has."""

    def take_on(self, inc: Incarnation, now_ms: int, opened: TransferId = "") -> None:
        super().take_on(inc, now_ms, opened)
        if inc.replica is not None:
            for follower in inc.replica.followers.values():
                follower.configured = False
            self._acknowledged(inc, inc.replica, now_ms)


class AloneAgain(Standbys):
    """A server that goes back in time answers before anybody stands by for it again."""

    def take_up(self, inc: Incarnation, awaited: list[NodeId], now_ms: int) -> None:
        pass


class WishesForgotten(Core):
    """A server that goes back in time forgets that it is to have standbys."""

    def restored(self, *args: Any, **more: Any) -> Incarnation:
        inc = super().restored(*args, **more)
        inc.wanted = Wanted()
        return inc


class ToldAtOnce(Core):
    """Receivers are told what a sender has settled as if no standby of it might ask again."""

    def open_session(self, sender: Sender, server: ServerId, now_ms: int) -> SendSession:
        session = super().open_session(sender, server, now_ms)
        session.safe_low = NEVER
        return session


class _ToldAtOnce(Standbys):
    def _gate(self, inc: Incarnation, replica: Replica, *, safe: bool = True) -> None:
        super()._gate(inc, replica, safe=safe)
        for session in [*inc.sender.sessions.values(), *inc.sender.chained.values()]:
            session.safe_low = NEVER


def node_with(
    mechanism: type[Standbys] | type[Core], node: type[StandbyNode] = StandbyNode
) -> type[StandbyNode]:
    """A node class of the simulator without a mechanism."""
    base: type[Core] = mechanism if issubclass(mechanism, Core) else Core
    standbys: type[Standbys] = _ToldAtOnce if mechanism is ToldAtOnce else Standbys
    if issubclass(mechanism, Standbys):
        standbys = mechanism

    class Without(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.standbys = standbys(self, self.port, self.options.standby)

    return type(f"Without{mechanism.__name__}", (node,), {"core_class": Without})


__all__ = [
    "AnyoneTakesOver",
    "CastsNotNoted",
    "FenceAfterSwap",
    "GoesAlone",
    "JoinsEarly",
    "NoFence",
    "NotRepeated",
    "NotRewound",
    "RepliesNotHeld",
    "StaleSendersHeard",
    "StepsNotTold",
    "ToldAtOnce",
    "node_with",
]
