"""Durable servers: journals on simulated disks, killed processes, power cuts, journals opened.

A world of its own, on top of that of standbys. Every host has a disk (see `disk`) that outlives its
processes; a process opens the journals that it finds there, as the shell does. Files have the real
format, so that what a power cut leaves is read, and cut off, by the production code.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from msgspec import msgpack

from migrate.core.directory import Row, RowState
from migrate.core.ids import NodeId, ServerId, TransferId
from migrate.core.incarnation import Incarnation
from migrate.core.messages import Cut, Follow, Note, Step
from migrate.core.records import CutRecord, SessionRecord, StepRecord, Wanted
from migrate.core.standby import JOURNAL, Changed, Follower, Leftover, Logged
from migrate.shell import journal_format
from migrate.shell.journal_format import BadJournal, Encoder, Facts, Found, Kind, Record
from tests.sim.disk import Disk, File, Writer
from tests.sim.host import Copy, SimNode, pack
from tests.sim.standbys import StandbyInvariants, StandbyNode, StandbyWorld
from tests.sim.world import World

KEY = b"k" * 32

IN_USE_US, IN_USE_LOOKS = 5_000, 20
"""How often, and how many times, a file is looked at that another process holds."""

AGAIN_US = 20_000

_NOTE, _STEP = b"N", b"S"
_cut = msgpack.Decoder(CutRecord)
_step = msgpack.Decoder(StepRecord)
_note = msgpack.Decoder(list[SessionRecord])


@dataclass
class Settings:
    """What one schedule has of journals."""

    durable: float  # share of the servers
    power: float  # of the crashes, those that are power cuts of the host
    blackouts: int  # ends of all processes at once, over the whole schedule
    shared: bool  # two nodes have one folder
    bare: float  # of the nodes, those that have no folder
    full_bytes: int  # a journal that has grown by so much begins anew
    faults: int  # of disks, over the whole schedule
    back: bool  # servers go back to checkpoints, too

    @classmethod
    def draw(cls, rng: Random) -> Settings:
        """Those of one seed."""
        return cls(
            durable=rng.choice((0.4, 0.8, 1.0)),
            power=rng.choice((0.0, 0.5, 1.0)),
            blackouts=rng.choice((0, 0, 1, 2, 4)),
            shared=rng.random() < 0.25,
            bare=rng.choice((0.0, 0.0, 0.0, 0.3)),
            full_bytes=rng.choice((1_500, 6_000, 1 << 40)),
            faults=rng.choice((0, 0, 3, 12)),
            back=rng.random() < 0.25,
        )


class Log:
    """One file of a journal, as the process has it that writes it."""

    def __init__(self, node: JournalNode, disk: Disk, facts: Facts) -> None:
        self.node = node
        self.disk = disk
        self.facts = facts
        self.name = facts.journal
        self.file = File()
        self.bytes = 0  # since its first cut
        self.full_from = node.world.journals.full_bytes
        self.named = False
        self.error = ""
        self.waiting: list[Callable[[], None]] | None = None  # of one that is fenced
        self._writer = Writer(node, disk, self.file)
        self._encoder = Encoder(facts, KEY)
        self._head = self._encoder.header
        self._untold: list[Callable[[str], None]] = []
        self._naming = False
        self._closing: Callable[[], None] | None = None

    def append(
        self,
        kind: Kind,
        number: int,
        record: bytes,
        state: bytes,
        whole: bool,
        told: Callable[[str], None],
    ) -> None:
        """Append one record; `told` as of `Writer.append`, and not before the file has its name."""
        if self.waiting is not None:
            again = (kind, number, record, state, whole, told)
            self.waiting.append(functools.partial(self.append, *again))
            return
        if self.error:
            self.node.later(0, told, self.error)
            return
        synced = self.file.kept
        pieces = self._encoder.record(kind, number, record, [state], whole=whole, synced=synced)
        data, self._head = b"".join([self._head, *pieces]), b""
        self.bytes += 0 if whole else len(data)
        self._writer.append(data, functools.partial(self._done, told))

    def close(self, done: Callable[[], None]) -> None:
        """End it in order, when it has its name."""
        self.waiting = None
        if not self.error and not self.named:
            self._closing = done
            return
        if not self.error:
            self.append(Kind.END, 0, b"", b"", False, lambda _: None)
        self._writer.closed = True
        if self.disk.held.get(self.name) is self.node:
            del self.disk.held[self.name]
        done()

    def _done(self, told: Callable[[str], None], reason: str) -> None:
        if reason:
            self._fail(reason)
            told(reason)
        elif self.named:
            told("")
        else:
            self._untold.append(told)
            if not self._naming:
                self._naming = True
                self.node.later(self.node.world.between(10, 300), self._rename)

    def _rename(self) -> None:
        if self.error:
            return
        self.disk.rename(self.name, self.file)
        self.disk.held[self.name] = self.node
        world = self.node.world
        took = world.between(100, 4_000) * self.disk.slow
        world.at(took, self._names_synced, self.disk.life)

    def _names_synced(self, life: int) -> None:
        if life != self.disk.life:
            return
        if not self.disk.failing:
            self.disk.sync_names()
        self.node.input(self._settled, self.disk.failing)

    def _settled(self, failed: bool) -> None:
        if failed or self.error:
            self._fail("whether the file keeps its name is not known")
            return
        self.named = True
        untold, self._untold = self._untold, []
        for told in untold:
            told("")
        if self._closing is not None:
            self.close(self._closing)

    def _fail(self, reason: str) -> None:
        if self.error:
            return
        self.error = reason
        self.node.world.counts["journal fails"] += 1
        untold, self._untold = self._untold, []
        for told in untold:
            told(reason)
        if self._closing is not None:
            self.close(self._closing)


class Opening:
    """A journal that this process has read, and holds."""

    def __init__(self, name: str, writer: NodeId) -> None:
        self.name = name
        self.writer = writer
        self.is_open = False  # the server goes on here


class JournalNode(StandbyNode):
    """A node that keeps journals, and opens those that it finds."""

    world: JournalWorld
    log_class = Log

    def __init__(self, world: World, name: str, incarnation: int, *, hosts: bool) -> None:
        assert isinstance(world, JournalWorld)
        self.disk = world.disks.get(name)
        self.logs: dict[TransferId, Log] = {}
        self.opening: dict[ServerId, Opening] = {}
        super().__init__(world, name, incarnation, hosts=hosts)

    def die(self) -> None:
        """See `SimNode.die`; the host may lose its power with it."""
        world = self.world
        disk = self.disk
        super().die()
        if disk is not None:
            alone = not any(
                isinstance(it, JournalNode) and it.disk is disk for it in world.by_id.values()
            )
            power = world.power or world.chance(world.journals.power)
            disk.ended(self, power=power and alone)

    def keeps_journal(self, inc: Incarnation) -> bool:
        """See `StandbyNode.keeps_journal`."""
        return inc.wanted.durable and self.disk is not None

    # -- writing

    def is_durable(self, server: ServerId) -> bool:
        """See `KeepingNode.is_durable`; so are half of the classes."""
        return self.disk is not None and zlib.crc32(server.encode()) % 2 == 0

    def journal(self, inc: Incarnation, message: Logged) -> None:
        """`Port.journal`."""
        self._point("journal", inc.id)
        stream = message.stream
        log = self.logs.get(stream)
        if self.disk is not None and isinstance(message, Cut) and message.whole:
            self.world.counts["journal begun anew" if log is not None else "journal begun"] += 1
            facts = Facts(
                journal=stream,
                server=inc.id,
                cls=inc.row.cls,
                version=inc.row.version,
                node=self.id,
                epoch=message.epoch,
            )
            log = self.logs[stream] = self.log_class(self, self.disk, facts)
        done = functools.partial(self._journaled, inc.id, stream, message.number)
        if log is None or log.error:
            self.later(0, done, log.error if log is not None else "it was not begun")
            return
        told = functools.partial(self._appended, log, done)
        number = message.number
        if isinstance(message, Cut):
            record = pack(message.record)
            log.append(Kind.CUT, number, record, message.state, message.whole, told)
        elif isinstance(message, Step):
            log.append(Kind.STEP, number, _STEP + pack(message.step), b"", False, told)
        else:
            log.append(Kind.STEP, number, _NOTE + pack(message.sessions), b"", False, told)

    def _appended(self, log: Log, done: Callable[[str], None], reason: str) -> None:
        done(reason)
        stream = log.facts.journal
        if self.logs.get(stream) is log and log.named and not log.error:
            if log.bytes > log.full_from:
                # Asked again if the one that is to replace this one comes to nothing.
                log.full_from += log.bytes
                self.world.counts["journal full"] += 1
                self.sent_parts.pop(stream, None)
                self.core.standbys.journal_anew(log.facts.server, self.now_ms())

    def _journaled(self, server: ServerId, stream: TransferId, number: int, reason: str) -> None:
        if stream not in self.logs and not reason:
            return
        opening = self.opening.get(server)
        if opening is not None and opening.is_open and opening.name == stream:
            del self.opening[server]  # It holds a whole cut of this owner.
        self._point("journaled", server)
        if reason:
            self.world.note(f"{self.id}: the journal {stream} failed: {reason}")
        self.core.standbys.journaled(server, number, reason, self.now_ms(), stream=stream)

    def fenced(self, log: Log) -> None:
        """Nothing more is written to a journal here, until it is known whose it is."""
        stream = log.facts.journal
        if self.logs.get(stream) is log and not log.error and log.waiting is None:
            log.waiting = []
            self.core.standbys.journal_fenced(log.facts.server, stream, self.now_ms())

    def journal_goes_on(self, stream: TransferId) -> None:
        """`Port.journal_goes_on`."""
        log = self.logs.get(stream)
        if log is not None and log.waiting is not None:
            self.world.counts["journal goes on"] += 1
            waiting, log.waiting = log.waiting, None
            for write in waiting:
                write()

    def end_stream(self, stream: TransferId) -> None:
        """`Port.end_stream`; the file of a journal goes when the row names it no more."""
        super().end_stream(stream)
        server = stream.partition("/")[0]
        look_after = functools.partial(self._look_after, stream, server, self.id)
        opening = self.opening.get(server)
        is_open = opening is not None and opening.is_open and opening.name == stream
        if is_open:
            # It was taken away again before it had a cut of this owner.
            assert self.disk is not None
            del self.opening[server]
            self.disk.held.pop(stream, None)
        log = self.logs.pop(stream, None)
        if log is not None:
            log.close(look_after)
        elif is_open:
            look_after()

    def _look_after(self, name: str, server: ServerId, writer: NodeId) -> None:
        """Remove a file when no row can name it any more, or open it if nobody else will."""

        def read(known: bool, row: Row | None, rev: int) -> None:
            left = Leftover.WAIT
            standbys = self.core.standbys
            if known:
                left = standbys.leftover(row, name, writer, first=False)
            if left is Leftover.WAIT:
                self.later(AGAIN_US, self._look_after, name, server, writer)
            elif left is Leftover.OPEN:
                self.world.counts["journal opened later"] += 1
                self.open(name, 0)
            else:
                assert self.disk is not None
                self.disk.remove(name)

        self._later_out(self.world.directory.read, self, server, read)

    # -- opening

    def open_all(self) -> None:
        """Take over every server whose journal is here."""
        if self.disk is not None:
            for name in sorted(self.disk.names):
                self.later(self._work(0, 1_000), self.open, name, 0)

    def open(self, name: str, looks: int) -> None:
        """Read a journal if nobody holds it, and take its server over if the row names it."""
        disk = self.disk
        assert disk is not None
        if name not in disk.names:
            return
        if name in disk.held:
            if looks < IN_USE_LOOKS:
                self.later(IN_USE_US, self.open, name, looks + 1)
            else:
                self.world.counts["journal in use"] += 1
            return
        disk.held[name] = self
        self.later(self._work(50, 2_000), self._read_file, name, disk.names[name])

    def _read_file(self, name: str, file: File) -> None:
        self._point("open", name.partition("/")[0])
        try:
            found = self.found(bytes(file.shown))
        except BadJournal as error:
            self.world.fail("journals", f"{name} cannot be read: {error}")
        if found.torn_bytes:
            self.world.counts["torn tail"] += 1
        self._look(name, found)

    def found(self, data: bytes) -> Found:
        """What a file holds."""
        return journal_format.read(data, KEY)

    def _look(self, name: str, found: Found) -> None:
        """See to it that a journal that is of no use is set aside before it is opened."""
        facts = found.facts

        def read(known: bool, row: Row | None, rev: int) -> None:
            if not known:
                self.later(AGAIN_US, self._look, name, found)
                return
            left = self.core.standbys.leftover(row, name, facts.node, first=True)
            if left is Leftover.OPEN:
                self._reopen(name, found)
                return
            assert self.disk is not None
            del self.disk.held[name]
            if left is Leftover.WAIT:
                self.world.counts["journal may be named yet"] += 1
                self._look_after(name, facts.server, facts.node)
            else:
                self.world.counts["stale journal"] += 1
                self.world.note(f"{self.id} sets {name} aside")
                self.disk.remove(name)

        self._later_out(self.world.directory.read, self, facts.server, read)

    def _reopen(self, name: str, found: Found) -> None:
        world = self.world
        facts = found.facts
        server = facts.server
        copy = Copy(server, 0)
        follow = Follow(name, server, facts.epoch, facts.cls, facts.version, False, "", "")
        logged = [_message(follow, record) for record in found.records]
        for record in found.records:
            if record.kind is Kind.CUT:
                self.take_part(copy, name, bytes(record.state))
        world.note(f"{self.id} opens {name}: {len(logged)} records, {len(copy.items)} items")
        world.counts["opened"] += 1
        self.opening[server] = Opening(name, facts.node)
        self.kept[name] = copy
        now_s = world.now_us / 1e6
        why = self.core.standbys.reopen(follow, logged, now_s, self.now_ms())
        if why:
            self.kept.pop(name, None)
            self.standbys_changed(server, JOURNAL, Changed.UNFIT, why)

    def standbys_changed(self, server: ServerId, node: NodeId, what: Changed, cause: str) -> None:
        """`Port.standbys_changed`."""
        super().standbys_changed(server, node, what, cause)
        opening = self.opening.get(server)
        if opening is None or opening.is_open:
            return
        if what is Changed.PROMOTED:
            # The file stays held until there is a newer one under its name.
            opening.is_open = True
            self.world.counts["reopened"] += 1
        elif what is Changed.UNFIT and node == JOURNAL:
            assert self.disk is not None
            del self.opening[server]
            del self.disk.held[opening.name]
            self.world.counts["not reopened"] += 1
            # If a module is missing, somebody brings it.
            again = self._look_after, opening.name, server, opening.writer
            self.later(3 * AGAIN_US, *again)


def _message(follow: Follow, record: Record) -> Logged:
    stream, server, epoch = follow.stream, follow.server, follow.epoch
    if record.kind is Kind.CUT:
        told = _cut.decode(record.record)
        return Cut(stream, server, epoch, record.number, record.whole, told, b"")
    body = record.record[1:]
    if bytes(record.record[:1]) == _STEP:
        return Step(stream, server, epoch, record.number, _step.decode(body))
    return Note(stream, server, epoch, record.number, _note.decode(body))


class JournalInvariants(StandbyInvariants):
    """The same guarantees, and that a server whose journal survives is not lost for good."""

    world: JournalWorld

    def swapped(self, before: Row | None, row: Row) -> None:
        """See `Invariants.swapped`; also what a row may name."""
        super().swapped(before, row)
        if before is None:
            return
        if row.state is RowState.LOST and before.journal:
            self.world.fail("journals", f"{row.server} was buried, and has a journal: {before}")
        if row.journal not in ("", before.journal) and not self._is_safe(row.journal):
            self.world.fail("journals", f"the row names a journal that is not safe: {row}")

    def _is_safe(self, name: str) -> bool:
        for disk in self.world.all_disks:
            file = disk.kept_names.get(name)
            if file is not None:
                found = journal_format.read(bytes(file.shown[: file.kept]), KEY)
                return bool(found.records)
        return False

    def pending(self, stage: int) -> str:
        """See `Invariants.pending`; also whether all journals have come to an end."""
        text = super().pending(stage)
        if text:
            return text
        for node in self.world.alive_nodes():
            assert isinstance(node, JournalNode)
            for opening in node.opening.values():
                return f"{node.id} holds {opening.name}, open: {opening.is_open}"
            streams = [stream for stream in node.logs if stream not in node.core.standbys.streams]
            if streams:
                return f"{node.id} writes {streams}"
        rows = self.world.directory.rows
        for disk in self.world.all_disks:
            for name in disk.names:
                known = rows.get(name.partition("/")[0])
                if known is None or known[0].journal != name:
                    return f"{disk.name} keeps {name}; the row is {known}"
        return ""

    def _incomplete(self, node: StandbyNode) -> str:
        for inc in node.core.hosted.values():
            if bool(inc.row.journal) is not node.keeps_journal(inc):
                return f"{inc.id} has the journal {inc.row.journal!r}, wants {inc.wanted}"
        return super()._incomplete(node)

    def _kept_by(self, node: SimNode, inc: Incarnation, follower: Follower) -> tuple[int, Copy]:
        if follower.node != JOURNAL:
            return super()._kept_by(node, inc, follower)
        assert isinstance(node, JournalNode) and node.disk is not None
        file = node.disk.kept_names[follower.stream]
        found = journal_format.read(bytes(file.shown[: file.kept]), KEY)
        copy = Copy(inc.id, 0)
        for record in found.records:
            if record.kind is Kind.CUT:
                node.take_part(copy, follower.stream, bytes(record.state))
        return found.records[-1].number, copy


class JournalWorld(StandbyWorld):
    """A world in which servers have journals."""

    invariants: JournalInvariants
    invariants_class = JournalInvariants

    def __init__(self, seed: int, *, journals: Settings | None = None, **more: Any) -> None:
        self.journals = journals or Settings.draw(Random(f"journals {seed}"))
        self.disks: dict[str, Disk] = {}  # by name of the host; some have none
        self.all_disks: list[Disk] = []
        self.power = False  # all of it fails right now
        self.dark = 0
        more.setdefault("node_class", JournalNode)
        super().__init__(seed, **more)

    def _build(self) -> None:
        shared: Disk | None = None
        for i in range(self.plan.nodes):
            if self.chance(self.journals.bare):
                continue
            disk = Disk(self, f"d{i}")
            if self.journals.shared and i < 2 and shared is not None:
                disk = shared
            else:
                self.all_disks.append(disk)
            shared = shared or disk
            self.disks[f"n{i}"] = disk
        super()._build()
        if self.journals.back and not self.settings.back:
            self.keeper.start()
        self._again(self._blackout, self.journals.blackouts)
        self._again(self._disk_fault, self.journals.faults)

    def start_node(self, name: str, incarnation: int) -> SimNode:
        """See `World.start_node`; it opens the journals that it finds."""
        node = super().start_node(name, incarnation)
        if isinstance(node, JournalNode) and node.hosts:
            node.input(node.open_all)
        return node

    def lost(self, server: str) -> None:
        """See `World.lost`; somebody has to be there."""
        if self.alive_nodes():
            super().lost(server)
        else:
            self.at(50_000, self.lost, server)

    def _wanted(self) -> Wanted:
        wanted = super()._wanted()
        if not self.chance(self.journals.durable):
            return wanted
        # Async standbys would take it back behind its journal.
        return Wanted(wanted.count, (), durable=True)

    def _slander(self) -> None:
        if self.alive_nodes():
            super()._slander()
        else:
            self._again(self._slander, self.settings.slander)

    def _blackout(self) -> None:
        """All processes end at once, by kill -9 or with the power of all hosts."""
        if self.calm_us >= 0:
            return
        self._again(self._blackout, self.journals.blackouts)
        self.power = self.chance(0.6)
        self.counts["blackout" if self.power else "all killed"] += 1
        self.note("blackout" if self.power else "all killed")
        for node in self.alive_nodes():
            node.die()
            self.at(self.between(1_000, 150_000), self.start_node, node.name, node.incarnation + 1)
        self.power = False

    def _disk_fault(self) -> None:
        """A disk is full, fails, or is slow for a while."""
        if self.calm_us >= 0 or not self.all_disks:
            return
        self._again(self._disk_fault, self.journals.faults)
        disk = self.all_disks[self.between(0, len(self.all_disks) - 1)]
        kind = ("full", "failing", "slow", "fenced")[self.between(0, 3)]
        self.note(f"{disk.name} {kind}")
        if kind == "fenced":
            self._fence(disk)
        elif kind == "slow":
            disk.slow = self.between(5, 100)
        else:
            setattr(disk, kind, True)
        self.at(self.between(1_000, 100_000), self._disk_well, disk)

    def _fence(self, disk: Disk) -> None:
        """Somebody else has begun to write where the journals of a disk are, in an object store."""
        for node in self.alive_nodes():
            assert isinstance(node, JournalNode)
            for log in list(node.logs.values()):
                if log.disk is disk and log.named and not log.error and self.chance(0.3):
                    self.counts["journal fenced"] += 1
                    node.input(node.fenced, log)

    def _disk_well(self, disk: Disk) -> None:
        disk.full = disk.failing = False
        disk.slow = 1

    def _calm(self) -> None:
        for disk in self.all_disks:
            self._disk_well(disk)
        super()._calm()


__all__ = ["JournalInvariants", "JournalNode", "JournalWorld", "Log", "Settings"]
