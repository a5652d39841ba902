"""Servers that go back in time: checkpoints taken and restored all over a simulated cluster.

A world of its own, so that the schedules of the other seeds stay what they are. Chance is drawn
from a second source for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from msgspec import msgpack

from migrate.core import directory
from migrate.core.actions import Finish
from migrate.core.delivery import Entry
from migrate.core.directory import Row, RowState
from migrate.core.events import SwapOutcome, SwapResult
from migrate.core.ids import ServerId
from migrate.core.incarnation import (
    Incarnation,
    Phase,
)
from migrate.core.messages import CALL, LOST, OK, ROLLED_BACK
from migrate.core.records import CheckpointRecord
from tests.sim.host import Copy, Settled, SimNode
from tests.sim.invariants import Invariants
from tests.sim.world import World

if TYPE_CHECKING:
    from migrate.core.ids import NodeId, TransferId

_record = msgpack.Decoder(CheckpointRecord)


class Backup:
    """What a checkpoint holds, as bytes where it would be bytes."""

    def __init__(self, inc: Incarnation, copy: Copy, record: CheckpointRecord, at_us: int) -> None:
        self.server = inc.id
        self.row = inc.row
        self.born_us = copy.born_us
        self.items = list(copy.items)
        self.told = list(copy.told)
        self.ticks = copy.ticks
        self.record = msgpack.encode(record)
        self.at_us = at_us

    def copy(self, epoch: int) -> Copy:
        """The object that comes of it, with a name for its requests that no other copy has."""
        copy = Copy(self.server, self.born_us)
        copy.items, copy.told = list(self.items), list(self.told)
        # Nobody else's: one that was taken over, and does not know it, may ask too if its standbys
        # are asynchronous (seed 25480 of the standbys' schedules).
        copy.alias = f"{self.server}*r{epoch}"
        copy.ticks = self.ticks
        return copy


class Wish:
    """Why a server is kept at a quiescent point."""

    def __init__(self, backup: Backup | None, transfer: str) -> None:
        self.backup = backup  # None: one is to be taken
        self.transfer = transfer


class KeepingNode(SimNode):
    """A node that takes checkpoints, restores what is lost and replaces what lives."""

    world: RollbackWorld
    is_sole = True  # nobody else changes the rows of its servers

    def move(self, server: ServerId, target: NodeId, transfer: TransferId) -> None:
        """See `SimNode.move`; as the shell, it does not move what it is about to replace."""
        inc = self.core.hosted.get(server)
        if inc is not None and inc.phase is not Phase.FROZEN:
            super().move(server, target, transfer)

    # -- the port

    def quiesced(self, inc: Incarnation, entry: Entry) -> None:
        """`Port.quiesced`."""
        self._step()
        copy = inc.host
        assert isinstance(copy, Copy) and isinstance(entry.args, Wish)
        if copy.runs or copy.tasks:
            self.world.fail("quiescent", f"{inc.id} is said to be quiet, and a handler runs")
        ran = len(copy.items), copy.ticks
        wait = self.world.keeper.between(0, 4_000)
        self.later(wait, self._at_rest, inc, entry, ran)

    def not_quiesced(self, token: object) -> None:
        """`Port.not_quiesced`."""
        self.world.counts["wishes that came to nothing"] += 1

    def _at_rest(self, inc: Incarnation, entry: Entry, ran: tuple[int, int]) -> None:
        copy, wish = inc.host, entry.args
        assert isinstance(copy, Copy) and isinstance(wish, Wish)
        if (len(copy.items), copy.ticks) != ran:
            self.world.fail("quiescent", f"{inc.id} was handed messages while it was captured")
        if self.core.hosted.get(inc.id) is not inc:
            # Deposed meanwhile, which empties its mailbox (seed 20571 of the standbys' schedules).
            self.world.counts["wishes that came to nothing"] += 1
            self._go_on(inc, entry)
            return
        if wish.backup is None:
            record = self.core.checkpoint(inc, self.now_ms())
            self.world.keeper.keep(Backup(inc, copy, record, self.world.now_us))
            self.later(self.world.keeper.between(0, 4_000), self._pickled, inc, entry, ran)
            return
        self.world.note(f"{self.id} replaces {inc.id} {wish.transfer}")
        new = self.world.keeper.row(wish.backup, self.id, inc.row, wish.transfer)
        phase = self.core.begin_replacing(inc, self.now_ms())
        self._swap_own(inc, entry, phase, new, inc.rev, False)

    def _pickled(self, inc: Incarnation, entry: Entry, ran: tuple[int, int]) -> None:
        copy = inc.host
        assert isinstance(copy, Copy)
        if (len(copy.items), copy.ticks) != ran:
            self.world.fail("quiescent", f"{inc.id} was handed messages while it was pickled")
        self.world.counts["checkpoints"] += 1
        self._go_on(inc, entry)

    def _go_on(self, inc: Incarnation, entry: Entry) -> None:
        self.core.finish(inc, entry, OK, None, None, self.now_ms())

    # -- replacing

    def _swap_own(
        self, inc: Incarnation, entry: Entry, phase: Phase, new: Row, rev: int, doubtful: bool
    ) -> None:
        def done(result: SwapResult) -> None:
            now, wish = result.row, entry.args
            if result.outcome is SwapOutcome.DONE or (
                result.outcome is SwapOutcome.REFUSED
                and now is not None
                and now.transfer == new.transfer
            ):
                self._take_in(wish.backup, new, result.rev)
                self._go_on(inc, entry)
            elif (
                result.outcome is SwapOutcome.REFUSED
                and now is not None
                and now.owner == self.id
                and self.core.hosted.get(inc.id) is inc
            ):
                # A swap of its own came first, perhaps one for standbys: then at another epoch.
                self.world.counts["replaced upon its own swap"] += 1
                again = self.world.keeper.row(wish.backup, self.id, now, wish.transfer)
                self._swap_own(inc, entry, phase, again, result.rev, False)
            elif result.outcome is SwapOutcome.REFUSED or (
                result.outcome is SwapOutcome.NOT_DONE and not doubtful
            ):
                if result.outcome is SwapOutcome.REFUSED and self.is_sole:
                    self.world.fail("one owner", f"{inc.id} was taken from {self.id}: {now}")
                self.core.end_replacing(inc, phase, self.now_ms())
                self._go_on(inc, entry)
            else:
                self.later(10_000, self._swap_own, inc, entry, phase, new, rev, True)

        self._later_out(self.world.directory.swap, self, inc.id, new, rev, done)

    def is_durable(self, server: ServerId) -> bool:
        """Whether a server has a journal here by its class."""
        return False

    def _take_in(self, backup: Backup, new: Row, rev: int) -> None:
        former = self.core.hosted.get(backup.server)
        if former is not None:
            assert isinstance(former.host, Copy)
            former.host.alive = False
            self.world.invariants.left(backup.server, former.host.items)
        record = _record.decode(backup.record)
        plan = self.world.plan
        self.core.restored(
            new,
            rev,
            plan.mailbox,
            False,
            backup.copy(new.epoch),
            record,
            self.now_ms(),
            durable=self.is_durable(backup.server),
        )
        self.world.counts["restored"] += 1
        self.world.note(f"{self.id} restored {backup.server} e={new.epoch} of {backup.at_us}")
        self.later(self.world.keeper.between(0, 2_000), self._started, backup.server)

    # -- restoring what is lost

    def restore(self, backup: Backup, transfer: str) -> None:
        """Read the row; if it says LOST, take it over."""

        def read(known: bool, row: Row | None, rev: int) -> None:
            if known and row is not None and row.state is RowState.LOST:
                wait = self.world.keeper.between(100, 3_000)
                new = self.world.keeper.row(backup, self.id, row, transfer)
                self.later(wait, self._take_row, backup, new, rev)

        self._later_out(self.world.directory.read, self, backup.server, read)

    def _take_row(self, backup: Backup, new: Row, rev: int) -> None:
        def done(result: SwapResult) -> None:
            now = result.row
            if result.outcome is SwapOutcome.DONE or (
                result.outcome is SwapOutcome.REFUSED
                and now is not None
                and now.transfer == new.transfer
            ):
                self._take_in(backup, new, result.rev)
            elif result.outcome is SwapOutcome.REFUSED:
                self.world.counts["restored by somebody else"] += 1
            else:
                # The same again, until it is known: an earlier copy may have taken effect.
                self.later(10_000, self._take_row, backup, new, rev)

        self._later_out(self.world.directory.swap, self, backup.server, new, rev, done)


class Keeper:
    """Asks for checkpoints, restores and replacements."""

    def __init__(self, world: RollbackWorld, seed: int) -> None:
        self.world = world
        self.rng = Random(f"backups {seed}")
        self.backups: dict[ServerId, list[Backup]] = {}
        self.n = 0

    def between(self, low: int, high: int) -> int:
        """See `World.between`."""
        return self.rng.randint(low, high)

    def start(self) -> None:
        """Begin."""
        self._next(self._take, 30)
        self._next(self._back, 12)

    def _next(self, what: Callable[[], None], times: int) -> None:
        mean = self.world.plan.busy_us * 0.9 / times
        self.world.at(int(self.rng.expovariate(1 / mean)), what)

    def keep(self, backup: Backup) -> None:
        """A checkpoint was taken."""
        self.backups.setdefault(backup.server, []).append(backup)

    def row(self, backup: Backup, owner: NodeId, known: Row, transfer: str) -> Row:
        """The row of a new generation."""
        return directory.restored(
            known=known,
            rev_max=0,
            checkpoint=backup.row,
            owner=owner,
            transfer=transfer,
            name="",
            version=1,
            methods=(),
            then_s=backup.at_us / 1e6,
            now_s=self.world.now_us / 1e6,
            cause="restored",
        )

    def _owner(self, server: ServerId) -> KeepingNode | None:
        known = self.world.directory.rows.get(server)
        owner = self.world.by_id.get(known[0].owner) if known is not None else None
        return owner if isinstance(owner, KeepingNode) else None

    def _wish(self, node: KeepingNode, server: ServerId, wish: Wish) -> None:
        if node.core.quiesce(server, wish, node.now_ms()) and self.rng.random() < 0.1:
            # Whoever asked gives up waiting.
            node.later(self.between(0, 20_000), node.core.do_not_quiesce, server, wish)

    def _take(self) -> None:
        world = self.world
        if world.calm_us >= 0:
            return
        self._next(self._take, 30)
        if not world.alive_nodes():
            return  # all are down at once
        server = self.rng.choice(world.servers)
        node = self._owner(server)
        if node is not None:
            node.input(self._wish, node, server, Wish(None, ""))

    def _back(self) -> None:
        world = self.world
        if world.calm_us >= 0:
            return
        self._next(self._back, 12)
        if not world.alive_nodes():
            return
        rows = world.directory.rows
        kept = [server for server in world.servers if server in self.backups and server in rows]
        lost = [s for s in kept if rows[s][0].state is RowState.LOST]
        if not kept:
            return
        server = self.rng.choice(lost if lost and self.rng.random() < 0.7 else kept)
        backup = self.rng.choice(self.backups[server])
        self.n += 1
        if server in lost:
            for _ in range(2 if self.rng.random() < 0.3 else 1):
                # Sometimes two at once, of whom one wins.
                node = self.rng.choice(world.alive_nodes())
                assert isinstance(node, KeepingNode)
                self.n += 1
                node.input(node.restore, backup, f"restored {self.n}")
            return
        owner = self._owner(server)
        if owner is not None:
            wish = Wish(backup, f"replaced {self.n}")
            owner.input(self._wish, owner, server, wish)


class RollbackInvariants(Invariants):
    """The same guarantees, and those of going back in time.

    Of requests made one after the other, a history that was cut off has the first ones and not
    the last. So if a history has what a sender asked for after it had been acknowledged
    something that the history has not, that something was undone, and the sender went on. Between
    the two it must have been told.
    """

    world: RollbackWorld

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.made_at: dict[tuple[ServerId, str], int] = {}
        self.acks: dict[ServerId, list[tuple[int, str]]] = {}
        self.news: dict[tuple[ServerId, str], list[int]] = {}
        self.back: dict[ServerId, int] = {}  # how often it came back
        self.makers: dict[tuple[ServerId, str], str] = {}
        # Who is told of what becomes of a request: whatever a server asks for, it is one sender.
        self.askers: dict[tuple[ServerId, str], str] = {}
        self.n = 0

    def made(self, server: ServerId, uid: str) -> None:
        """See `Invariants.made`."""
        super().made(server, uid)
        self.n += 1
        self.made_at[server, uid] = self.n
        base = uid.partition("#")[0].rstrip("~")
        # One that went back in time itself does not know what it was told before.
        self.makers[server, uid] = f"{base}@{self.back.get(base, 0)}"
        asker = base.partition("*")[0]
        self.askers[server, uid] = f"{asker}@{self.back.get(asker, 0)}"

    def swapped(self, before: Row | None, row: Row) -> None:
        """See `Invariants.swapped`."""
        super().swapped(before, row)
        if before is not None and row.generation != before.generation:
            self.back[row.server] = self.back.get(row.server, 0) + 1
            if row.generation != row.epoch or row.epoch <= before.epoch:
                self.world.fail("generations", f"{before} was followed by {row}")

    def answered(
        self,
        server: ServerId,
        uid: str,
        kind: int,
        status: int,
        value: object,
        result: Settled | None,
        deadline: bool,
        former: bool = False,
    ) -> None:
        """See `Invariants.answered`."""
        world = self.world
        self.n += 1
        if status == ROLLED_BACK:
            world.counts["status rolled back"] += 1
            if server not in self.back:
                world.fail("statuses", f"{uid}: {server} never went back in time")
            self.news.setdefault((server, self.askers[server, uid]), []).append(self.n)
            if value is False:
                self.refused.setdefault(server, {})[uid] = status
            return
        if status == OK:
            if kind == CALL and (result is None or result.uid != uid):
                world.fail("own answer", f"{uid} of {server} was answered with {result}")
            if not former:
                self.acks.setdefault(server, []).append((self.n, uid))
            if server in self.back:
                return  # places are given again
        elif status == LOST:
            return  # it may be back by now
        super().answered(server, uid, kind, status, value, result, deadline, former)

    def move_ended(self, node: SimNode, transfer: TransferId, action: Finish) -> None:
        """See `Invariants.move_ended`; not of one that is coming back to where it left."""
        known = self.world.directory.rows.get(node.asked.get(transfer, ""))
        if known is not None and known[0].transfer.startswith("restored"):
            del node.asked[transfer]
        else:
            super().move_ended(node, transfer, action)

    def left(self, server: ServerId, items: list[str]) -> None:
        """A copy makes way for a former state of itself: its history ends."""
        self._once_and_in_order(server, items)
        self._told(server, items)

    def pending(self, stage: int) -> str:
        """See `Invariants.pending`; also what was swapped and is not yet hosted."""
        for server, (row, _) in self.world.directory.rows.items():
            owner = self.world.by_id.get(row.owner)
            if row.state is RowState.ACTIVE and owner and server not in owner.core.hosted:
                return f"{server} is not yet at {row.owner}, which restored it"
        return super().pending(stage)

    def _look_ups(self) -> None:
        """Who was told that a server is lost looks it up again: it may be back."""

    def final(self) -> None:
        """See `Invariants.final`."""
        for node in self.world.by_id.values():
            for inc in node.core.hosted.values():
                copy = inc.host
                assert isinstance(copy, Copy)
                # A cast is dropped when whoever made it, or whom it was made to, went back.
                dropped = inc.id in self.back
                copy.told = [
                    (target, uid)
                    for target, uid in copy.told
                    if not dropped and target not in self.back
                ]
        super().final()

    def _history(self, server: ServerId, items: list[str]) -> None:
        if server not in self.back:
            super()._history(server, items)
            return
        self._once_and_in_order(server, items)
        self._told(server, items)
        seen = dict.fromkeys(items)
        for uid, status in self.refused.get(server, {}).items():
            if uid in seen:
                self.world.fail("outcome", f"{server} applied {uid}, not done ({status})")

    def _maker(self, server: ServerId, uid: str) -> str:
        """See `Invariants._maker`; what one asked for before it went back may be late by any time.

        So it may be by one that never went back itself (seed 10913 of the journals' schedules).
        """
        return self.makers[server, uid]

    def _told(self, server: ServerId, items: list[str]) -> None:
        seen = dict.fromkeys(items)
        undone: dict[str, list[tuple[int, str]]] = {}
        # A handler that is run again after a failover is answered again.
        last = {uid: at for at, uid in self.acks.get(server, ())}
        for at, uid in self.acks.get(server, ()):
            if last[uid] != at:
                continue
            sender = self.makers[server, uid]
            if uid not in seen:
                undone.setdefault(sender, []).append((at, uid))
                continue
            news = self.news.get((server, self.askers[server, uid]), [])
            for lost_at, lost in undone.get(sender, ()):
                made_at = self.made_at[server, uid]
                if made_at > lost_at and not any(lost_at < n < at for n in news):
                    self.world.fail(
                        "told",
                        f"{server} has {uid}, made after {lost} was acknowledged, and has not "
                        f"{lost}; {sender} was never told",
                    )


class RollbackWorld(World):
    """A world in which servers go back in time."""

    invariants: RollbackInvariants
    invariants_class = RollbackInvariants

    def __init__(self, seed: int, **more: Any) -> None:
        more.setdefault("node_class", KeepingNode)
        self.keeper = Keeper(self, seed)
        super().__init__(seed, **more)

    def _build(self) -> None:
        super()._build()
        self.keeper.start()

    def lost(self, server: str) -> None:
        """See `World.lost`; here it may come back, so requests go on going to it."""
