"""Servers with hot standbys, and everything that may happen to owners and standbys meanwhile.

A world of its own, so that the schedules of the other seeds stay what they are. Nodes have leases
in a membership that is as good as clocks that drift make it: it suspects the dead, the paused, the
cut off, and now and then somebody who is well. Only a crash makes a node seen dead.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from random import Random
from typing import Any, TypeAlias

from msgspec import Struct, msgpack

from migrate.core.actions import Action, DropCopy
from migrate.core.delivery import Entry, Outgoing
from migrate.core.directory import Mode, Row, RowState
from migrate.core.events import Copied, RowRead, SwapResult
from migrate.core.ids import NodeId, ServerId, TransferId
from migrate.core.incarnation import Incarnation
from migrate.core.messages import CALL, DIVERGED, OK, Cut, Follow, Message, Note, Step
from migrate.core.node import CoreOptions
from migrate.core.records import Wanted
from migrate.core.standby import (
    JOURNAL,
    CaptureFailed,
    Changed,
    Follower,
    FollowerPhase,
    Logged,
    StandbyTimes,
)
from migrate.core.standby import Backup as Kept
from tests.sim.backups import Backup, KeepingNode, RollbackInvariants, RollbackWorld
from tests.sim.host import Copy, Op, Run, Settled, SimNode, Sub, pack
from tests.sim.host import Step as Steps
from tests.sim.world import World


@dataclass
class Settings:
    """What one schedule has of standbys. Probabilities are per occasion."""

    share: float  # of the servers that have standbys
    two: float  # of those, with two
    asynchronous: float  # of those, in mode ASYNC
    changes: int  # of the wanted set, over the whole schedule
    reads: float  # of the requests
    fickle: float  # of the requests: their handlers do other things when they are run again
    lease_us: int
    drift: float  # clocks of leases go at most so much too fast or too slow
    slander: int  # suspicions of somebody who is well, over the whole schedule
    aim: float  # faults at the steps of joining, feeding and taking over
    refuses: float = 0.0
    capture_fails: float = 0.0
    keep_fails: float = 0.0
    load_fails: float = 0.0
    patience_ms: int = 100
    cuts_max: int = 2
    back: bool = False  # servers go back to checkpoints

    @classmethod
    def draw(cls, rng: Random) -> Settings:
        """Those of one seed."""

        def now_and_then(most: float) -> float:
            return most * rng.random() if rng.random() < 0.3 else 0.0

        return cls(
            share=rng.choice((0.3, 0.7, 1.0)),
            two=rng.choice((0.0, 0.3, 0.7)),
            asynchronous=rng.choice((0.0, 0.0, 0.0, 0.3, 1.0)),
            changes=rng.choice((0, 5, 30)),
            reads=rng.choice((0.0, 0.2, 0.5)),
            fickle=rng.choice((0.0, 0.0, 0.05, 0.2)),
            lease_us=rng.choice((60_000, 120_000, 250_000)),
            drift=rng.choice((0.0, 0.1, 0.4)),
            slander=rng.choice((0, 0, 2, 8)),
            aim=rng.choice((0.0, 0.01, 0.05)),
            refuses=now_and_then(0.3),
            capture_fails=now_and_then(0.02),
            keep_fails=now_and_then(0.02),
            load_fails=now_and_then(0.3),
            patience_ms=rng.choice((60, 120, 300)),
            cuts_max=rng.choice((1, 2, 4)),
            back=rng.choice((False, True)),
        )


class Part(Struct, array_like=True):
    """What a cut says of the object: what came after what this stream has had."""

    had: int
    items: list[str]
    had_told: int
    told: list[tuple[str, str]]
    numbers: dict[str, int]
    ticks: int
    born_us: int
    alias: str


class Sent:
    """What a stream has had of an object."""

    def __init__(self) -> None:
        self.items = 0
        self.told = 0


class Alone:
    """A server that was replaced by what a checkpoint holds, and has nobody again yet."""

    def __init__(self, awaited: list[NodeId], items: list[str]) -> None:
        self.awaited = awaited  # who stood by before, the journal among them
        self.items = items  # of the checkpoint


_part = msgpack.Decoder(Part)
_items = msgpack.Decoder(list[str])
_op = msgpack.Decoder(Op)
_logged: dict[type[Logged], msgpack.Decoder[Logged]] = {
    kind: msgpack.Decoder(kind) for kind in (Cut, Step, Note)
}

Strike: TypeAlias = Callable[[], None]


class StandbyNode(KeepingNode):
    """A node that has standbys and is one."""

    world: StandbyWorld
    is_sole = False

    def __init__(self, world: World, name: str, incarnation: int, *, hosts: bool) -> None:
        self.sent_parts: dict[TransferId, Sent] = {}
        self.kept: dict[TransferId, Copy] = {}
        self.unfit: dict[ServerId, None] = {}  # servers it could not load
        self.whole: dict[tuple[ServerId, NodeId], None] = {}  # what it had all of, from an owner
        super().__init__(world, name, incarnation, hosts=hosts)
        if hosts:
            drift = self.world.settings.drift
            self.rate = 1.0 + drift * (2 * world.rng.random() - 1)  # of its clock, for leases
            self.world.beats[self.id] = world.now_us
            self.later(0, self._beat)
            self.later(world.between(0, 20_000), self._watch)
            self.later(world.between(0, 30_000), self._complete)

    def options(self) -> CoreOptions:
        """See `SimNode.options`."""
        settings = self.world.settings
        times = StandbyTimes(
            repeat_ms=15,
            join_ms=300,
            patience_ms=settings.patience_ms,
            cuts_max=settings.cuts_max,
            async_cut_ms=4,
            async_lag_ms=60,
            async_lag_bytes=2_000,
            copy_bytes=60,
            rounds_max=3,
        )
        return dataclasses.replace(super().options(), standby=times)

    # -- membership

    def _beat(self) -> None:
        """Say that it lives, three times per lease by its own clock."""
        world = self.world
        if not world.directory.unreachable(self):
            world.beats[self.id] = world.now_us
        self.later(int(world.settings.lease_us / 3 / self.rate), self._beat)

    def _watch(self) -> None:
        """Look whose lease has run out, by its own clock."""
        world = self.world
        standbys = self.core.standbys
        for node, beat_us in list(world.beats.items()):
            if node == self.id or node in self.core.dead:
                continue
            late = (world.now_us - beat_us) * self.rate > world.settings.lease_us
            if late and node not in standbys.suspected:
                world.counts["suspected"] += 1
                world.note(f"{self.id} suspects {node}")
                standbys.node_suspected(node, self.now_ms())
            elif not late and node in standbys.suspected:
                world.note(f"{self.id} hears {node}")
                standbys.node_heard(node, self.now_ms())
        self.later(world.between(5_000, 20_000), self._watch)

    def _complete(self) -> None:
        """See to it that each server here has the standbys that it is to have."""
        world = self.world
        for inc in list(self.core.hosted.values()):
            self._complete_one(inc)
        self.later(world.between(20_000, 60_000), self._complete)

    def keeps_journal(self, inc: Incarnation) -> bool:
        """Whether a server here is to have a journal."""
        return False

    def _complete_one(self, inc: Incarnation) -> None:
        world = self.world
        wanted, replica = inc.wanted, inc.replica
        journal = self.keeps_journal(inc)
        have: tuple[NodeId, ...] = ()
        if replica is not None:
            have = tuple(
                node
                for node in replica.wanted
                if node not in self.core.dead and node not in replica.failed
            )
            logs = replica.wanted_journal is journal and JOURNAL not in replica.failed
            if len(have) == wanted.count and replica.wanted_mode is wanted.mode and logs:
                return
        elif not wanted.count and not journal:
            return
        nodes = list(have[: wanted.count])
        others = [
            node.id
            for node in world.alive_nodes()
            if node.id not in (self.id, *nodes) and node.id not in self.core.dead
        ]
        while others and len(nodes) < wanted.count:
            nodes.append(others.pop(world.between(0, len(others) - 1)))
        if (
            replica is None
            or (tuple(nodes), wanted.mode) != (replica.wanted, replica.wanted_mode)
            or replica.wanted_journal is not journal
            or replica.failed
            or not nodes
        ):
            world.counts["replicate"] += 1
            standbys = self.core.standbys
            standbys.replicate(inc.id, tuple(nodes), wanted.mode, self.now_ms(), journal=journal)

    def want(self, server: ServerId, wanted: Wanted) -> None:
        """Another set of standbys, or another mode, from now on."""
        inc = self.core.hosted.get(server)
        if inc is not None and not inc.holding:
            if inc.reentrant:
                wanted = Wanted(wanted.count, (), Mode.ASYNC)  # and no journal
            self.world.note(f"{self.id} wants {server} {wanted.count} {wanted.mode.name}")
            inc.wanted = wanted
            self.world.invariants.alone.pop(server, None)
            self._complete_one(inc)

    def perform(self, transfer: TransferId, incoming: bool, action: Action) -> None:
        """See `SimNode.perform`; a copy may be all that is left of what it had as a standby."""
        copy = self.moving.get(transfer)
        super().perform(transfer, incoming, action)
        if incoming and isinstance(action, DropCopy) and copy is not None:
            backup = self.core.standbys.backups.get(copy.id)
            if backup is not None and backup.copy is not None and backup.copy.host is copy:
                copy.alive = True

    def _take_in(self, backup: Backup, new: Row, rev: int) -> None:
        """See `KeepingNode._take_in`; a server that is replaced is to have what it had."""
        former = self.core.hosted.get(backup.server)
        if former is not None and former.row.mode is Mode.SYNC:
            row, wants = former.row, former.wanted
            names = [*row.standbys, *([JOURNAL] if row.journal else [])]
            if former.replica is not None:
                # Of those that are lost it was told before.
                gone = [it.node for it in former.replica.followers.values() if it.leaving]
                names = [name for name in names if name not in gone]
            as_wanted = wants.count >= len(row.standbys) and wants.mode is Mode.SYNC
            if names and as_wanted and (wants.durable or not row.journal):
                self.world.counts["went back with standbys"] += 1
                self.world.invariants.alone[backup.server] = Alone(names, list(backup.items))
        super()._take_in(backup, new, rev)
        wanted = self.core.hosted[backup.server].wanted
        if former is not None and wanted != former.wanted:
            text = f"{backup.server} had {former.wanted}, and went back to {wanted}"
            self.world.fail("standbys kept", text)

    # -- what goes out

    def send(self, node: NodeId, message: Message) -> None:
        """`Port.send`; what is kept at the other side shares nothing with what is here."""
        decoder = _logged.get(type(message))  # type: ignore[arg-type]
        if decoder is not None:
            message = decoder.decode(msgpack.encode(message))
            if isinstance(message, Step | Note):
                self._point(type(message).__name__.lower(), message.server)
        super().send(node, message)

    def _point(self, name: str, server: ServerId) -> None:
        """A step of joining, feeding or taking over: perhaps a fault strikes right there."""
        world = self.world
        world.counts[f"standby {name}"] += 1
        self._step()
        faults = world.faults
        if not faults.on or not world.chance(world.settings.aim):
            return
        known = world.directory.rows.get(server)
        row = known[0] if known is not None else None
        concerned = [self.id, *((row.owner, *row.standbys) if row is not None else ())]
        struck = world.by_id.get(concerned[world.between(0, len(concerned) - 1)])
        other = world.by_id.get(concerned[world.between(0, len(concerned) - 1)])
        if struck is None or other is None:
            return
        kinds = ("crash", "crash", "pause", "pause", "partition", "directory cut")
        kind = kinds[world.between(0, len(kinds) - 1)]
        world.counts[f"struck at {name}"] += 1
        if kind == "crash" and struck is self:
            if faults.may_crash():
                faults.crash_inside(self)
        else:
            world.at(0, self._strike, kind, struck, other)

    def _strike(self, kind: str, node: SimNode, other: SimNode) -> None:
        if self.world.faults.on and node.alive:
            self.world.faults.strike(kind, node, other)

    def _happens(self, probability: float) -> bool:
        return self.world.faults.on and self.world.chance(probability)

    # -- the port: the owner

    def capture(self, inc: Incarnation, stream: TransferId, number: int) -> bytes:
        """`Port.capture`."""
        copy = inc.host
        assert isinstance(copy, Copy)
        if copy.runs or copy.tasks:
            self.world.fail("quiescent", f"a cut of {inc.id} was made while a handler was running")
        self._point("capture", inc.id)
        if self._happens(self.world.settings.capture_fails):
            self.world.counts["capture fails"] += 1
            raise CaptureFailed("it has a socket")
        sent = self.sent_parts.setdefault(stream, Sent())
        part = Part(
            sent.items,
            copy.items[sent.items :],
            sent.told,
            copy.told[sent.told :],
            copy.numbers,
            copy.ticks,
            copy.born_us,
            copy.alias,
        )
        sent.items, sent.told = len(copy.items), len(copy.told)
        return pack(part)

    def may_wait(self, inc: Incarnation, entry: Entry) -> bool:
        """`Port.may_wait`: some that may never do."""
        if entry.session is None:
            return False
        op = _op.decode(entry.payload) if entry.payload is not None else entry.args
        assert isinstance(op, Op)
        waits = op.sleep_us > 0 or op.what in ("relay", "relays", "fickle")
        return waits or zlib.crc32(op.uid.encode()) % 8 == 0

    def code_of(self, inc: Incarnation) -> tuple[bool, str]:
        """`Port.code_of`."""
        return False, ""

    def digest(self, payload: bytes) -> int:
        """`Port.digest`."""
        return zlib.crc32(payload)

    def copy_for(self, inc: Incarnation, stream: TransferId) -> None:
        """`Port.copy_for`."""
        self._point("copy", inc.id)
        self.later(self._work(0, 1_000), self._copy_for, inc, stream)

    def _copy_for(self, inc: Incarnation, stream: TransferId) -> None:
        if stream not in self.core.standbys.streams:
            return
        world = self.world
        copy = inc.host
        assert isinstance(copy, Copy)
        if self._happens(world.settings.capture_fails * 5):
            event = Copied(b"", True, failed=True)
        else:
            sent = self.sent_parts.setdefault(stream, Sent())
            more = copy.items[sent.items : sent.items + world.between(0, 4)]
            sent.items += len(more)
            event = Copied(pack(more) if more else b"", world.chance(0.6) or not more)
        self.core.standbys.copied_for(stream, event, self.now_ms())

    def end_stream(self, stream: TransferId) -> None:
        """`Port.end_stream`."""
        self.sent_parts.pop(stream, None)
        self.kept.pop(stream, None)

    def has_stream(self, stream: TransferId) -> bool:
        """`Port.has_stream`: of three servers, two are large."""
        return zlib.crc32(stream.partition("/")[0].encode()) % 3 > 0

    def adopt_stream(self, transfer: TransferId, stream: TransferId, incoming: bool) -> None:
        """`Port.adopt_stream`."""
        self.world.counts["moved to a standby"] += incoming
        if incoming:
            self.taken[transfer] = list(self.kept[stream].items)
        else:
            self.ahead[transfer] = self.sent_parts[stream].items

    def journal_goes_on(self, stream: TransferId) -> None:
        """See `StandbyPort`; nothing here is fenced."""

    def journal(self, inc: Incarnation, message: Logged) -> None:
        """`Port.journal`."""
        raise AssertionError("nobody has a journal here")

    def configure(self, server: ServerId, row: Row, rev: int) -> None:
        """`Port.configure`."""
        self._point("configure", server)
        self.world.note(f"{self.id} configures {server} e={row.epoch} {list(row.standbys)}")

        def done(result: SwapResult) -> None:
            self._point("configured", server)
            self.core.standbys.configured(server, row, result, self.now_ms())

        self._later_out(self.world.directory.swap, self, server, row, rev, done)

    # -- the port: the standby

    def check_follow(self, follow: Follow) -> None:
        """`Port.check_follow`."""
        self._point("follow", follow.server)
        refusal = "no such class" if self._happens(self.world.settings.refuses) else ""
        self.later(self._work(10, 500), self._followed, follow.stream, refusal)

    def _followed(self, stream: TransferId, refusal: str) -> None:
        self.core.standbys.follow_checked(stream, 1, refusal, self.now_ms())

    def keep_chunk(self, stream: TransferId, number: int, state: bytes) -> None:
        """`Port.keep_chunk`."""
        self.later(self._work(0, 1_000), self._keep_chunk, stream, number, state)

    def _keep_chunk(self, stream: TransferId, number: int, state: bytes) -> None:
        if stream not in self.core.standbys.coming:
            return
        if self._happens(self.world.settings.keep_fails * 5):
            self.core.standbys.chunk_kept(stream, "cannot be installed", self.now_ms())
            return
        self._kept_copy(stream).items += _items.decode(state)
        self.core.standbys.chunk_kept(stream, "", self.now_ms())

    def _kept_copy(self, stream: TransferId) -> Copy:
        copy = self.kept.get(stream)
        if copy is None:
            copy = self.kept[stream] = Copy(stream.partition("/")[0], 0)
        return copy

    def keep_delta(
        self, stream: TransferId, number: int, first: bool, state: bytes
    ) -> bool | str | None:
        """`Port.keep_delta`."""
        world = self.world
        server = stream.partition("/")[0]
        self._point("keep first" if first else "keep", server)
        if self._happens(world.settings.keep_fails):
            world.counts["keep fails"] += 1
            return "cannot be kept"
        self.take_part(self._kept_copy(stream), stream, state)
        if first:
            self.whole[server, self.core.standbys.coming[stream].owner] = None
        if not first or world.chance(0.5):
            return True
        reason = "cannot be loaded" if self._happens(world.settings.refuses) else ""
        self.later(self._work(100, 3_000), self._tried, stream, number, reason)
        return None

    def take_part(self, copy: Copy, stream: TransferId, state: bytes) -> None:
        """Add what a cut says of the object."""
        part = _part.decode(state)
        if (part.had, part.had_told) != (len(copy.items), len(copy.told)):
            text = f"{stream} has {len(copy.items)} items, a cut goes on at {part.had}"
            self.world.fail("cuts", text)
        copy.items += part.items
        copy.told += part.told
        copy.numbers, copy.ticks, copy.born_us = part.numbers, part.ticks, part.born_us
        copy.alias = part.alias

    def _tried(self, stream: TransferId, number: int, reason: str) -> None:
        self.core.standbys.delta_kept(stream, number, reason, self.now_ms())

    def load_backup(self, backup: Kept) -> None:
        """`Port.load_backup`."""
        server = backup.server
        self._point("load", server)
        kept = self.kept[backup.stream]
        copy: Copy | None = Copy(server, kept.born_us)
        assert copy is not None
        copy.items, copy.told = list(kept.items), list(kept.told)
        copy.numbers, copy.ticks, copy.alias = dict(kept.numbers), kept.ticks, kept.alias
        reason = ""
        if self._happens(self.world.settings.load_fails):
            self.world.counts["load fails"] += 1
            self.unfit[server] = None
            copy, reason = None, "a module is missing"
        self.later(self._work(100, 3_000), self._loaded, backup, copy, reason)

    def _loaded(self, backup: Kept, copy: Copy | None, reason: str) -> None:
        self._point("loaded", backup.server)
        self.core.standbys.backup_loaded(backup, copy, reason, self.now_ms())

    def promote(self, server: ServerId, row: Row, rev: int) -> None:
        """`Port.promote`."""
        self._point("promote", server)
        self.world.note(f"{self.id} promotes {server} e={row.epoch} to {row.owner}")

        def done(result: SwapResult) -> None:
            self._point("promoted", server)
            self.core.standbys.promoted(server, row, result, self.now_ms())

        self._later_out(self.world.directory.swap, self, server, row, rev, done)

    def read_standby_row(self, server: ServerId) -> None:
        """`Port.read_standby_row`."""

        def read(known: bool, row: Row | None, rev: int) -> None:
            event = RowRead(known, row, rev)
            self.core.standbys.standby_row(server, event, self.now_ms())

        self._later_out(self.world.directory.read, self, server, read)

    def wall_s(self) -> float:
        """`Port.wall_s`."""
        return self.world.now_us / 1e6

    def begin(self, inc: Incarnation, hook: str) -> None:
        """`Port.begin`."""
        copy = inc.host
        assert isinstance(copy, Copy)
        if inc.row.generation == inc.row.epoch:
            copy.alias, copy.numbers = f"{inc.id}/{inc.row.epoch}", {}
        self.world.note(f"{self.id} is {inc.id} now e={inc.row.epoch}, {len(copy.items)} items")
        self.later(self._work(0, 3_000), self._started, inc.id)

    def deposed(self, inc: Incarnation, cause: str) -> None:
        """`Port.deposed`."""
        copy = inc.host
        assert isinstance(copy, Copy)
        self.world.counts["deposed"] += 1
        self.world.note(f"{self.id} is not {inc.id} any more: {cause}")
        copy.alive = False
        copy.runs.clear()

    def standbys_changed(self, server: ServerId, node: NodeId, what: Changed, cause: str) -> None:
        """`Port.standbys_changed`."""
        self.world.counts[f"standby {what.value}"] += 1
        self.world.invariants.changed(server, node, what)
        self.world.note(f"{self.id}: {server} {node} {what.value} {cause}")

    # -- handlers

    def draw_op(self, server: str) -> Op:
        """See `SimNode.draw_op`."""
        settings = self.world.settings
        op = super().draw_op(server)
        what = op.what
        if self.world.chance(settings.reads):
            return Op("", "read", op.sleep_us if op.sleep_us % 3 == 0 else 0, "", 0)
        if what == "relay" and self.world.chance(0.4):
            what = "relays"
        elif what == "add" and self.world.chance(settings.fickle):
            what = "fickle"
        return Op("", what, op.sleep_us, op.target, op.timeout_ms)

    def _resume(self, sub: Sub, status: int, payload: bytes | None, value: object) -> None:
        known = self.world.directory.rows.get(sub.run.copy.id)
        if status != OK and (known is None or known[0].owner != self.id):
            # A copy that was replaced may be told anything: nobody hears of it.
            if sub.run.waiting is sub:
                sub.run.waiting = None
                self._advance(sub.run, status)
            return
        super()._resume(sub, status, payload, value)

    def _handler(self, run: Run, op: Op) -> Steps:
        copy = run.copy
        if op.what == "read" and run.entry.kind == CALL:
            self.world.reads[copy.id, op.uid] = None
            if op.sleep_us:
                yield op.sleep_us
            place = len(copy.items)
            return Settled(op.uid, place, copy.items[-1] if place else "")
        if op.what == "fickle":
            yield from self._fickle(run, op)
        elif op.what == "relays":
            # Two requests, one after the other.
            for _ in range(2):
                yield from self._relay(run, op)
        return (yield from super()._handler(run, op))

    def _fickle(self, run: Run, op: Op) -> Generator[None, Any, None]:
        """A request that is another one when the handler is run again."""
        world = self.world
        world.fickle[run.copy.id, op.uid] = None
        target = world.targets[world.between(0, len(world.targets) - 1)]
        world.fickle_n += 1
        uid = f"{run.copy.id}*{world.fickle_n}#1"
        world.fickle[target, uid] = None
        world.invariants.made(target, uid)
        waiting = run.waiting = Sub(run, target, uid, CALL)
        out = Outgoing(
            CALL,
            "op",
            None,
            Op(uid, "add", 0, "", 0),
            self._chain(run),
            0,
            waiting,
            f"{run.copy.id}/{run.entry.run}",
        )
        self.core.request(run.inc.sender, target, out, self.now_ms())
        yield None


class StandbyInvariants(RollbackInvariants):
    """The same guarantees, and those of standbys.

    Answers are linear: a server's history is a list that only grows, so an answer that was asked
    for after another one came must be of a later place in it; of a read, of no earlier one.
    """

    world: StandbyWorld
    windows = 2  # what was outstanding at the last cut, and what was asked for in mid-run since

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.top: dict[ServerId, int] = {}  # the last place that anybody has seen
        self.floor: dict[tuple[ServerId, str], int] = {}  # that when a request was made
        self.seen: dict[ServerId, dict[int, str]] = {}  # by reads: place, and what was there
        self.alone: dict[ServerId, Alone] = {}

    def changed(self, server: ServerId, node: NodeId, what: Changed) -> None:
        """A standby has joined, failed or left."""
        alone = self.alone.get(server)
        if alone is not None and what is Changed.JOINED and node in alone.awaited:
            alone.awaited.remove(node)
        if alone is not None and (what is not Changed.JOINED or not alone.awaited):
            del self.alone[server]

    def _alone(self, server: ServerId, uid: str) -> None:
        alone = self.alone.get(server)
        known = self.world.directory.rows.get(server)
        owner = self.world.by_id.get(known[0].owner) if known is not None else None
        inc = owner.core.hosted.get(server) if owner is not None else None
        if alone is None or inc is None:
            return
        assert isinstance(inc.host, Copy)
        if uid in inc.host.items and uid not in alone.items:
            text = f"{server} went back, and answered {uid} before {alone.awaited} had it again"
            self.world.fail("alone", text)

    def made(self, server: ServerId, uid: str) -> None:
        """See `Invariants.made`."""
        super().made(server, uid)
        # NB: after a failover a handler makes the same request again.
        self.floor.setdefault((server, uid), self.top.get(server, 0))

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
        if status == DIVERGED:
            world.counts["status diverged"] += 1
            if (server, uid) not in world.fickle:
                world.fail("statuses", f"{uid} of {server} diverged, and nothing else was done")
            return
        if status == OK and kind == CALL and result is not None:
            reads = (server, uid) in world.reads
            self._alone(server, uid)
            if server not in self.back:
                floor, place = self.floor[server, uid], result.place
                if place < floor or (place == floor and not reads):
                    world.fail(
                        "linear",
                        f"{uid} of {server} is at {place}, and when it was asked for somebody had "
                        f"been answered from {floor}",
                    )
                self.top[server] = max(self.top.get(server, 0), place)
            if reads:
                if result.uid != uid:
                    world.fail("own answer", f"{uid} of {server} was answered with {result}")
                if server not in self.back and result.place:
                    self.seen.setdefault(server, {})[result.place] = result.seen
                return
        super().answered(server, uid, kind, status, value, result, deadline, former)

    def swapped(self, before: Row | None, row: Row) -> None:
        """See `Invariants.swapped`; also who may be lost, and taken out of a row."""
        super().swapped(before, row)
        world = self.world
        if before is None:
            return
        if row.state is RowState.LOST:
            for node in before.standbys:
                if self._could_take_over(node, row.server):
                    world.fail("lost", f"{row.server} was buried; {node} stands by: {before}")
        for node in row.standbys:
            joined = world.by_id.get(node)
            assert joined is None or isinstance(joined, StandbyNode)
            new = node not in before.standbys and joined is not None
            if new and (row.server, row.owner) not in joined.whole:
                world.fail("caught up", f"{node} is named and never had all: {row}")
        if row.owner != before.owner:
            self.alone.pop(row.server, None)
        if row.owner != before.owner and row.state is RowState.ACTIVE:
            what = "taken over" if before.mode is Mode.SYNC else "taken over, going back"
            world.counts[what if row.owner in before.standbys else "owner changed"] += 1
        for node in before.standbys:
            if row.owner == before.owner and row.transfer.startswith(node + "/"):
                if self._could_take_over(node, row.server):
                    world.fail("lost", f"{node} gave up {row.server}, which it could take over")
                if row.owner in world.by_id:
                    world.fail("lost", f"{node} changed the row of {row.owner}, which lives: {row}")

    def _could_take_over(self, id: NodeId, server: ServerId) -> bool:
        node = self.world.by_id.get(id)
        assert node is None or isinstance(node, StandbyNode)
        if node is None or server in node.unfit:
            return False
        backup = node.core.standbys.backups.get(server)
        return backup is not None and backup.valid

    def _owns(self, node: SimNode, inc: Incarnation, what: str) -> None:
        replica, row = inc.replica, inc.row
        known = self.world.directory.rows.get(inc.id)
        if known is not None and known[0].epoch != row.epoch:
            # What a gated one lets out was acknowledged by all who might have taken over. One in
            # mode ASYNC lets out things that are lost. One that changes its own row is its owner.
            lags = replica is not None and replica.mode is Mode.ASYNC
            if inc.gated or lags or row.mode is Mode.ASYNC or known[0].mode is Mode.ASYNC:
                self._one_at_an_epoch(node, inc)
                return
            if replica is not None and known[0] == replica.swap:
                self._one_at_an_epoch(node, inc)
                return
        super()._owns(node, inc, what)

    def _one_at_an_epoch(self, node: SimNode, inc: Incarnation) -> None:
        owner = self.owners.setdefault((inc.id, inc.row.epoch), node.id)
        if owner != node.id:
            self.world.fail("one owner", f"{owner} and {node.id} are seen at one epoch of {inc.id}")

    def bounded(self, node: SimNode) -> None:
        """See `Invariants.bounded`; also what a node refuses is about somebody."""
        super().bounded(node)
        standbys = node.core.standbys
        concerned = {stream.partition("/")[0] for stream in standbys.ousted}
        for server, fence in standbys.fences.items():
            backup = standbys.backups.get(server)
            claims = backup is not None and backup.claim is not None
            if fence and not claims and server not in concerned:
                self.world.fail("bounded", f"{node.id} has a fence of {server} for nobody: {fence}")

    # -- the end

    def pending(self, stage: int) -> str:
        """See `Invariants.pending`; also whether all have their standbys again."""
        text = super().pending(stage)
        if text:
            return text
        for node in self.world.alive_nodes():
            assert isinstance(node, StandbyNode)
            text = self._incomplete(node) or self._left_over(node)
            if text:
                return f"{node.id}: {text}"
        return ""

    def _incomplete(self, node: StandbyNode) -> str:
        world = self.world
        now_ms = node.now_ms()
        for inc in node.core.hosted.values():
            wanted, row, replica = inc.wanted, inc.row, inc.replica
            count = min(wanted.count, len(world.alive_nodes()) - 1)
            if len(row.standbys) != count or (count and row.mode is not wanted.mode):
                return f"{inc.id} has {row.standbys} {row.mode.name}, wants {wanted}"
            if any(standby not in world.by_id for standby in row.standbys):
                return f"{inc.id} has a dead one among {row.standbys}"
            if replica is None:
                if count:
                    return f"{inc.id} has no replica"
                if inc.gated:
                    return f"{inc.id} is gated by nobody"
                continue
            if replica.swap is not None:
                return f"{inc.id} waits for a swap"
            if row.mode is Mode.SYNC and (count or row.journal) and not inc.gated:
                return f"{inc.id} is not gated"
            outputs = replica.uncut or replica.unnoted or replica.held
            if outputs or replica.uncut_outs or replica.outs:
                return f"{inc.id} holds something back"
            for follower in replica.followers.values():
                if follower.phase is not FollowerPhase.FED or not follower.configured:
                    return f"{inc.id} has {follower.node} in {follower.phase.name}"
                if follower.leaving:
                    return f"{inc.id} has {follower.node} leaving"
                if follower.unacked and now_ms - follower.progress_ms > 200:
                    return f"{inc.id} has {follower.node} behind"
                if follower.node == JOURNAL:
                    continue
                other = world.by_id[follower.node]
                backup = other.core.standbys.backups.get(inc.id)
                if backup is None or backup.stream != follower.stream:
                    return f"{inc.id} has {follower.node}, which has nothing"
        return ""

    def _left_over(self, node: StandbyNode) -> str:
        standbys = node.core.standbys
        rows = self.world.directory.rows
        if standbys.suspected:
            return f"suspects {list(standbys.suspected)}"
        if standbys.coming or standbys.due:
            return f"coming {list(standbys.coming)}, due {list(standbys.due)}"
        if standbys.fences or standbys.ousted:
            return f"fences {standbys.fences}, ousted {standbys.ousted}"
        for server, backup in standbys.backups.items():
            known = rows.get(server)
            if known is None or node.id not in known[0].standbys or backup.claim is not None:
                return f"keeps a backup of {server}; its row is {known}"
            if backup.owner != known[0].owner:
                return f"follows {backup.owner} for {server}; its row is {known}"
        streams = {backup.stream for backup in standbys.backups.values()}
        if streams != set(node.kept):
            return f"keeps {list(node.kept)}, follows {sorted(streams)}"
        if set(standbys.streams) != set(node.sent_parts):
            return f"feeds {list(node.sent_parts)}, has {list(standbys.streams)}"
        return ""

    def final(self) -> None:
        """See `Invariants.final`; also what the standbys have."""
        self._same()
        super().final()

    def _same(self) -> None:
        world = self.world
        for node in world.alive_nodes():
            for inc in node.core.hosted.values():
                if inc.replica is None or not inc.quiet():
                    continue
                copy = inc.host
                assert isinstance(copy, Copy)
                for follower in inc.replica.followers.values():
                    number, kept = self._kept_by(node, inc, follower)
                    if number != inc.replica.number or inc.replica.due:
                        continue
                    theirs = (kept.items, kept.told, kept.numbers, kept.ticks, kept.alias)
                    ours = (copy.items, copy.told, copy.numbers, copy.ticks, copy.alias)
                    if theirs != ours:
                        world.fail(
                            "cuts",
                            f"{follower.node} has another {inc.id} than {node.id}: "
                            f"{theirs}, {ours}",
                        )

    def _kept_by(self, node: SimNode, inc: Incarnation, follower: Follower) -> tuple[int, Copy]:
        """How far a follower of a server at `node` has come, and what it has."""
        other = self.world.by_id[follower.node]
        assert isinstance(other, StandbyNode)
        backup = other.core.standbys.backups.get(inc.id)
        if backup is None:
            self.world.fail("cuts", f"{other.id} has nothing of {inc.id}: {inc.row}")
        return backup.number, other.kept[backup.stream]

    def _history(self, server: ServerId, items: list[str]) -> None:
        super()._history(server, items)
        if server in self.back:
            return
        for place, uid in self.seen.get(server, {}).items():
            if place > len(items) or items[place - 1] != uid:
                self.world.fail("nothing lost", f"{server} has not {uid} at {place}; it was read")


class StandbyWorld(RollbackWorld):
    """A world in which servers have standbys."""

    invariants: StandbyInvariants
    invariants_class = StandbyInvariants

    def __init__(self, seed: int, *, settings: Settings | None = None, **more: Any) -> None:
        self.settings = settings or Settings.draw(Random(f"standbys {seed}"))
        self.beats: dict[NodeId, int] = {}
        self.fickle: dict[tuple[ServerId, str], None] = {}
        self.fickle_n = 0
        self.reads: dict[tuple[ServerId, str], None] = {}
        more.setdefault("node_class", StandbyNode)
        super().__init__(seed, **more)

    def _build(self) -> None:
        plan = self.plan
        if self.rng.random() < 0.7:
            plan.kinds["crash"] = None
            plan.crashes_max = max(plan.crashes_max, self.rng.randint(1, 8))
        # What waits for a sweep does not wait long; and what ticks is told to standbys for as long.
        plan.session_expiry_ms = min(plan.session_expiry_ms, 60_000)
        plan.timer_share = min(plan.timer_share, 0.15)
        # What handlers in mid-run have had answers to is kept for a failover: that needs room.
        plan.records_max = max(plan.records_max, 150)
        World._build(self)
        self._again(self._change, self.settings.changes)
        self._again(self._slander, self.settings.slander)
        if self.settings.back:
            self.keeper.start()

    def _again(self, what: Strike, times: int) -> None:
        if times and self.calm_us < 0:
            mean = self.plan.busy_us * 0.9 / times
            self.at(int(self.rng.expovariate(1 / mean)), what)

    def lost(self, server: str) -> None:
        """See `World.lost`."""
        World.lost(self, server)

    def _calm(self) -> None:
        # What a log of many messages says comes in order, or is sent again.
        self.plan.reorder = False
        super()._calm()

    def _wanted(self) -> Wanted:
        settings = self.settings
        if not self.chance(settings.share):
            return Wanted()
        mode = Mode.ASYNC if self.chance(settings.asynchronous) else Mode.SYNC
        return Wanted(2 if self.chance(settings.two) else 1, (), mode)

    def _spawn(self) -> str:
        server = super()._spawn()
        owner = self.by_id[self.directory.rows[server][0].owner]
        assert isinstance(owner, StandbyNode)
        owner.later(self.between(0, 20_000), owner.want, server, self._wanted())
        return server

    def _change(self) -> None:
        """Somebody wants other standbys for a server."""
        if self.calm_us >= 0:
            return
        self._again(self._change, self.settings.changes)
        server = self.targets[self.between(0, len(self.targets) - 1)]
        known = self.directory.rows.get(server)
        owner = self.by_id.get(known[0].owner) if known is not None else None
        if owner is not None:
            assert isinstance(owner, StandbyNode)
            owner.input(owner.want, server, self._wanted())

    def _slander(self) -> None:
        """Somebody suspects somebody who may be quite well."""
        if self.calm_us >= 0:
            return
        self._again(self._slander, self.settings.slander)
        nodes = self.alive_nodes()
        one, other = (nodes[self.between(0, len(nodes) - 1)] for _ in range(2))
        if one is not other:
            self.note(f"{one.id} slanders {other.id}")
            self.counts["slander"] += 1
            one.input(self._suspect, one, other.id)

    @staticmethod
    def _suspect(node: SimNode, other: NodeId) -> None:
        node.core.standbys.node_suspected(other, node.now_ms())
