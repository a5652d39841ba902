"""The guarantees of DESIGN section 4, each with a checker outside the system.

A request has a name: who makes it, to which server, and its number. A server's state is the
list of the names it applied, and a call returns the place its name took in that list. So an
acknowledged call can be checked for ever after: its name stands at that place, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrate.core.actions import Finish, Result
from migrate.core.delivery import QUIESCE
from migrate.core.directory import Row, RowState
from migrate.core.forwarding import HOPS_MAX
from migrate.core.ids import ServerId, TransferId, session_sender
from migrate.core.incarnation import Incarnation, Phase
from migrate.core.messages import (
    CALL,
    CAST,
    CLOSED,
    CYCLE,
    EXPIRED,
    FORGOTTEN,
    FULL,
    LOST,
    NOT_FOUND,
    OK,
    STOPPED,
    TIMED_OUT,
    Acked,
    Envelope,
    Message,
    Receipt,
    Reply,
    WaitProbe,
)
from tests.sim.host import Copy, Settled

if TYPE_CHECKING:
    from tests.sim.host import SimNode
    from tests.sim.world import World

NOT_DONE = (EXPIRED, FULL, STOPPED)
"""Statuses that promise that nothing was executed."""


GUARANTEES = {
    0: (
        "no exception",
        "liveness",
        "frozen",
        "one at a time",
        "quiescent",
        "counters",
        "hops",
        "generations",
        "told",
        "cuts",
        "standbys kept",
    ),
    1: (
        "own answer",
        "answered once",
        "one history",
        "linear",
        "exactly once",
        "at most once",
        "nothing lost",
        "alone",
        "casts",
        "outcome",
        "statuses",
    ),
    2: ("order",),
    3: ("caught up", "one owner", "epochs rise", "held back", "stale senders"),
    4: ("source serves", "moves end", "lost", "journals", "pre-copy"),
    5: ("timers",),
    6: ("bounded", "storm", "look-ups"),
}
"""Names of the checkers, by guarantee of DESIGN section 4; 0: what all of them rest on, and the
rules of going back in time (`backups.py`) and of standbys (`standbys.py`).

Of guarantee 5, calls that are pending are followed by `liveness` and those of guarantee 1, refs
by both, and monitors are nothing but the row's changes, which `epochs rise` looks at.
"""


WINDOW_US = 100_000
SENT_MAX = 150
"""How often a sender may send one request in so short a time: when a link comes up, when the
server is found, when a repeat is due, and at each late word of an owner that had admitted less
then (a window of refused requests that come back out of order: seed 1021066 sent one 60 times);
never in step with the network's round trips."""


class Invariants:
    """All checkers of one world; each violation ends the run with the checker's name."""

    windows = 1  # that one session may have outstanding

    def __init__(self, world: World) -> None:
        self.world = world
        self.places: dict[ServerId, dict[int, str]] = {}  # acknowledged: place -> name
        self.acked: dict[ServerId, dict[str, int]] = {}  # name -> place, 0 for a cast
        self.refused: dict[ServerId, dict[str, int]] = {}  # promised not to be executed
        self.owners: dict[tuple[ServerId, int], str] = {}
        self.servers_of: dict[str, ServerId] = {}  # session -> server
        self.ticks: dict[ServerId, int] = {}  # when all was answered
        self.sends: dict[tuple[str, int], list[int]] = {}  # request: window, times in it
        self.looked: dict[str, None] = {}  # node and server
        self.looked_again = 0
        self.made_n = 0

    # -- requests

    def made(self, server: ServerId, uid: str) -> None:
        """A request is about to be made."""
        self.made_n += 1

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
        """The maker of a request got its result.

        `former`: it is a copy of a server that another one has taken the place of, maybe without
        its knowing. What it does with the result nobody will hear (seed 23695 of the journals'
        schedules); it may also be closed (seed 25605 of the standbys').
        """
        world = self.world
        world.counts[f"status {status}"] += 1
        if status == OK:
            if kind == CAST:
                self.acked.setdefault(server, {}).setdefault(uid, 0)
                return
            if result is None or result.uid != uid:
                world.fail("own answer", f"{uid} of {server} was answered with {result}")
            places = self.places.setdefault(server, {})
            before = places.setdefault(result.place, uid)
            if before != uid:
                world.fail(
                    "one history",
                    f"place {result.place} of {server} was acknowledged to {before} and to {uid}",
                )
            acked = self.acked.setdefault(server, {})
            if acked.setdefault(uid, result.place) != result.place:
                world.fail("exactly once", f"{uid} of {server} took two places")
        elif status == TIMED_OUT:
            if not deadline:
                world.fail("statuses", f"{uid} of {server} timed out without a deadline")
        elif status == LOST:
            self._lost(server, uid)
        elif status in (NOT_FOUND, STOPPED):
            if server not in world.mover.stopped:
                world.fail("statuses", f"{uid} of {server} got {status}; nobody stopped it")
            if status == STOPPED:
                self.refused.setdefault(server, {})[uid] = status
        elif status == FORGOTTEN:
            # A record may be forgotten only where sessions expire, or with a stopped server.
            if "short expiry" not in world.plan.kinds and server not in world.mover.stopped:
                world.fail("statuses", f"{uid} of {server} is forgotten; nothing expires here")
        elif status == CYCLE:
            # Refused by its chain it was not done; a knot is broken while the call may run.
            if "~" in uid:
                self.refused.setdefault(server, {})[uid] = status
        elif status in NOT_DONE:
            self.refused.setdefault(server, {})[uid] = status
        elif status != CLOSED or not former:
            world.fail("statuses", f"{uid} of {server} ended with status {status}")

    def _lost(self, server: ServerId, uid: str) -> None:
        world = self.world
        known = world.directory.rows.get(server)
        if known is None and server in world.mover.stopped:
            return  # its node died while it stopped; the removal came through after the burial
        if known is None or known[0].state is not RowState.LOST:
            world.fail("lost", f"{uid} was told that {server} is lost; its row is {known}")

    # -- owners

    def swapped(self, before: Row | None, row: Row) -> None:
        """A row changes. A server is lost only with its owner; epochs only rise."""
        world = self.world
        if before is None:
            return
        if row.epoch < before.epoch or (row.epoch == before.epoch and row.owner != before.owner):
            world.fail("epochs rise", f"{before} was followed by {row}")
        if row.state is RowState.LOST:
            owner = world.by_id.get(before.owner)
            if owner is not None and (
                before.state is not RowState.COMMITTED
                or before.previous in world.by_id
                or row.server in owner.core.hosted
                or row.server in owner.core.arriving
            ):
                world.fail("lost", f"{row.server} was buried while its owner lives: {before}")
            if before.state is RowState.COMMITTED:
                source = world.by_id.get(before.previous)
                inc = source.core.hosted.get(row.server) if source is not None else None
                if inc is not None:
                    world.fail("lost", f"{row.server} was buried; {before.previous} has a copy")
            world.counts["lost"] += 1
            world.at(0, world.lost, row.server)

    def _owns(self, node: SimNode, inc: Incarnation, what: str) -> None:
        """A copy makes itself seen: it must be the owner, released, and not frozen."""
        world = self.world
        known = world.directory.rows.get(inc.id)
        if known is None:
            if inc.id not in world.mover.stopped:
                world.fail("one owner", f"{node.id} let out {what} of {inc.id}, which has no row")
            return
        row = known[0]
        if row.owner != node.id or row.epoch != inc.row.epoch:
            world.fail(
                "one owner",
                f"{node.id} let out {what} of {inc.id} at epoch {inc.row.epoch}; the row is {row}",
            )
        if inc.holding:
            world.fail("held back", f"{node.id} let out {what} of {inc.id} before its release")
        if inc.phase is Phase.FROZEN:
            world.fail("frozen", f"{node.id} let out {what} of {inc.id} after the freeze")
        owner = self.owners.setdefault((inc.id, inc.row.epoch), node.id)
        if owner != node.id:
            world.fail("one owner", f"{owner} and {node.id} are seen at one epoch of {inc.id}")

    def sent(self, node: SimNode, message: Message) -> None:
        """A node lets a message out."""
        kind = type(message)
        if kind is Envelope:
            assert isinstance(message, Envelope)
            self.servers_of[message.session] = message.server
            self._hops(node, message.hops)
            if message.hops == 0:
                self._storm(message)
                inc = node.core.hosted.get(session_sender(message.session))
                if inc is not None:
                    self._owns(node, inc, f"request {message.seq}")
        elif kind is Reply or kind is Receipt:
            assert isinstance(message, Reply | Receipt)
            self._hops(node, message.hops)
            if message.hops == 0:
                server = self.servers_of.get(message.session, "")
                inc = node.core.hosted.get(server)
                if inc is not None:
                    self._owns(node, inc, "an answer")
        elif kind is Acked or kind is WaitProbe:
            assert isinstance(message, Acked | WaitProbe)
            self._hops(node, message.hops)

    def _storm(self, env: Envelope) -> None:
        window = self.world.now_us // WINDOW_US
        sends = self.sends.setdefault((env.session, env.seq), [window, 0])
        if sends[0] != window:
            sends[:] = [window, 0]
        sends[1] += 1
        if sends[1] > SENT_MAX:
            self.world.fail("storm", f"{env.session}:{env.seq} is sent again and again")

    def _hops(self, node: SimNode, hops: int) -> None:
        if hops > HOPS_MAX:
            self.world.fail("hops", f"{node.id} passed a message on for the {hops}th time")

    def ran(self, node: SimNode, inc: Incarnation) -> None:
        """A handler is about to be run; one that holds nothing back must be the owner's."""
        if not inc.holding:
            self._owns(node, inc, "a handler")

    def move_ended(self, node: SimNode, transfer: TransferId, action: Finish) -> None:
        """A move ended for its source, once: after a roll-back it serves, and says why."""
        world = self.world
        server = node.asked.pop(transfer, "")
        if not server:
            world.fail("moves end", f"{transfer} ended twice at {node.id}")
        if action.result is not Result.MOVED and not action.reason:
            world.fail("moves end", f"{transfer} ended in {action.result} without a reason")
        inc = node.core.hosted.get(server)
        known = world.directory.rows.get(server)
        owns = known is not None and known[0].owner == node.id
        if action.result in (Result.ROLLED_BACK, Result.REFUSED, Result.NOT_PICKLABLE):
            if owns and (inc is None or inc.phase is Phase.FROZEN):
                world.fail("source serves", f"{server} does not serve at {node.id}: {transfer}")
        elif (
            owns
            and inc is None
            and server not in node.core.arriving
            and server not in node.core.standbys.backups
        ):
            # After FENCED, or after MOVED, the row must name somebody else, unless the server
            # is on its way back already, by a move or because its new owner is gone.
            world.fail("source serves", f"{node.id} dropped {server}, which it owns: {transfer}")

    # -- bounds

    def _sender_epochs(self, node: SimNode, inc: Incarnation) -> None:
        """A copy that has heard a sender at one place listens to no former place of it."""
        copy = inc.host
        assert isinstance(copy, Copy)
        known = copy.sender_epochs
        for session in inc.sessions.values():
            epoch = session.sender_epoch
            if epoch:
                if epoch < known.get(session.id, 0):
                    self.world.fail(
                        "stale senders",
                        f"{inc.id} at {node.id} took a request of {session.id} from epoch {epoch} "
                        f"of its sender after one from {known[session.id]}",
                    )
                known[session.id] = epoch

    def _bytes(self, node: SimNode, inc: Incarnation) -> None:
        """What waits for a server is below its bound of bytes but for one message.

        What was acknowledged before a failover is there whether there is room or not.
        """
        sizes = [entry.size for entry in inc.mailbox if not entry.kept]
        for session in inc.sessions.values():
            sizes += [entry.size for entry in session.early.values() if not entry.kept]
        late = [len(env.payload) for env in inc.late]
        limit = node.core.options.mailbox_bytes_max
        for waiting in (sizes, late):
            # Whichever of them came last, all others take no more than this.
            if waiting and sum(waiting) - max(waiting) >= limit:
                self.world.fail("bounded", f"{inc.id} at {node.id} holds bytes: {waiting}")

    def bounded(self, node: SimNode) -> None:
        """What a node keeps is within its limits, and its counters are right."""
        world = self.world
        core = node.core
        options = core.options
        for inc in core.hosted.values():
            self._sender_epochs(node, inc)
            early = early_bytes = records = size = 0
            pending: dict[str, int] = {}
            for session in inc.sessions.values():
                early += len(session.early)
                early_bytes += sum(entry.size for entry in session.early.values())
                records += len(session.records)
                for record in session.records.values():
                    size += len(record.payload)
            if (early, records, size) != (inc.early, inc.records, inc.record_bytes):
                world.fail(
                    "counters",
                    f"{inc.id} at {node.id}: early, records, bytes are {early}, {records}, {size}; "
                    f"counted are {inc.early}, {inc.records}, {inc.record_bytes}",
                )
            stands = sum(entry.size for entry in inc.mailbox)
            if (stands, early_bytes) != (inc.mailbox_bytes, inc.early_bytes):
                world.fail(
                    "counters",
                    f"{inc.id} at {node.id}: {stands} bytes in mailbox, {early_bytes} early; "
                    f"counted are {inc.mailbox_bytes} and {inc.early_bytes}",
                )
            self._bytes(node, inc)
            for entry in [*inc.mailbox, *inc.running.values()]:
                if entry.session is not None and entry.kind == CALL:
                    pending[entry.session.id] = pending.get(entry.session.id, 0) + 1
            for session in inc.sessions.values():
                if session.pending != pending.get(session.id, 0):
                    world.fail(
                        "counters",
                        f"{inc.id} at {node.id}: {session.id} has {session.pending} pending, "
                        f"not {pending.get(session.id, 0)}",
                    )
            if len(inc.late) > options.late_max:
                world.fail("bounded", f"{inc.id} at {node.id} keeps {len(inc.late)} late envelopes")
            wishes = sum(1 for entry in inc.mailbox if entry.kind == QUIESCE)
            # What was acknowledged before a failover is here, whether there is room or not.
            kept = sum(entry.kept for entry in inc.mailbox) + sum(
                entry.kept for session in inc.sessions.values() for entry in session.early.values()
            )
            if len(inc.mailbox) + early > inc.limit + len(inc.timers) + wishes + kept:
                world.fail("bounded", f"{inc.id} holds {len(inc.mailbox)} and {early} early")
            # Each message admitted below the limit may still leave a record.
            if records > options.records_max + inc.limit + 8:
                world.fail("bounded", f"{inc.id} keeps {records} completion records")
        if len(core.forwarding) > options.forwarding_max:
            world.fail("bounded", f"{node.id} keeps {len(core.forwarding)} forwarding entries")
        for server, knocking in core._knocking.items():
            if len(knocking) > options.late_max:
                world.fail("bounded", f"{node.id} keeps {len(knocking)} envelopes for {server}")
            sizes = [len(env.payload) for env in knocking]
            if sum(sizes[:-1]) >= options.mailbox_bytes_max:
                world.fail("bounded", f"{node.id} keeps {sum(sizes)} bytes for {server}")
        for sending in core.sending.values():
            if len(sending.outstanding) > options.window * self.windows:
                world.fail("bounded", f"{sending.id} has {len(sending.outstanding)} outstanding")
        if len(core.moves_in) > options.moves_in_max:
            world.fail("bounded", f"{node.id} has {len(core.moves_in)} moves in")
        if len(core.moves_out) > options.moves_max:
            world.fail("bounded", f"{node.id} has {len(core.moves_out)} moves out")

    # -- timers

    @staticmethod
    def _ticks(inc: Incarnation) -> int:
        assert isinstance(inc.host, Copy)
        return inc.host.ticks

    def note_ticks(self) -> None:
        """Remember how often the timers have fired; from now on each must fire again."""
        for node in self.world.by_id.values():
            for inc in node.core.hosted.values():
                self.ticks[inc.id] = self._ticks(inc)

    def _timer_phase(self, inc: Incarnation) -> None:
        """A timer never fires more often than its period allows, however often it moved."""
        world = self.world
        copy = inc.host
        assert isinstance(copy, Copy)
        for timer in inc.timers.values():
            # Remaining times are whole milliseconds, so each move may shorten one a little.
            lived_ms = (world.now_us - copy.born_us) / 1000 + 2 * inc.row.epoch
            if copy.ticks > lived_ms / timer.period_ms + 1:
                world.fail("timers", f"{inc.id} ticked {copy.ticks} times in {lived_ms} ms")

    # -- the end

    def pending(self, stage: int) -> str:
        """What has not come to its end; empty if nothing is left.

        Args:
            stage: 0 and 1: requests and moves; 2: also what only a sweep or an idle
                acknowledgement ends.
        """
        world = self.world
        for client in world.clients:
            if client.open:
                return f"{client.name} waits for {next(iter(client.open))}"
        for node in world.by_id.values():
            text = self._busy(node, stage)
            if text:
                return f"{node.id}: {text}"
        for server, (row, _) in world.directory.rows.items():
            if row.state is not RowState.LOST and row.owner not in world.by_id:
                return f"{server} is not buried; its row is {row}"
        return ""

    def _busy(self, node: SimNode, stage: int) -> str:
        core = node.core
        for source in core.moves_out.values():
            return f"{source.transfer} in {source.phase.name}"
        if core._queue:
            return f"{len(core._queue)} moves wait for their turn"
        if node.asked:
            return f"moves {list(node.asked)} were asked for and did not end"
        for inc in core.hosted.values():
            if inc.running or inc.held or inc.late or inc.early or inc.holding:
                return (
                    f"{inc.id} running={len(inc.running)} held={len(inc.held)} "
                    f"late={len(inc.late)} early={inc.early} holding={inc.holding}"
                )
            if inc.phase is not Phase.RUNNING:
                return f"{inc.id} in {inc.phase.name}"
            if any(entry.session is not None for entry in inc.mailbox):
                return f"{inc.id} has {len(inc.mailbox)} in its mailbox"
            if stage and inc.timers and self._ticks(inc) <= self.ticks.get(inc.id, 0):
                return f"{inc.id} does not tick"
        for session in core.sending.values():
            if session.outstanding or session.waiting:
                return (
                    f"{session.id} to {session.server}: outstanding "
                    f"{list(session.outstanding)[:3]}, waiting {len(session.waiting)}"
                )
        if core.leaving:
            return f"leaving {core.leaving}"
        if stage == 2:
            if core.moves_in or core.arriving or core.copies or core._knocking:
                return (
                    f"moves in {list(core.moves_in)}, arriving {list(core.arriving)}, "
                    f"copies {list(core.copies)}, knocking {list(core._knocking)}"
                )
            if core.waits or core._receipts or core._loopback:
                return f"waits {list(core.waits)}"
        return ""

    def final(self) -> None:
        """The histories of all servers that live, against everything that was promised."""
        world = self.world
        copies: dict[ServerId, Copy] = {}
        for server in world.servers:
            known = world.directory.rows.get(server)
            if known is None:
                if server not in world.mover.stopped:
                    world.fail("lost", f"{server} has no row")
                continue
            row = known[0]
            if row.state is RowState.LOST:
                continue
            inc = world.by_id[row.owner].core.hosted.get(server)
            if inc is None:
                world.fail("liveness", f"{row.owner} owns {server} and has no copy of it")
            assert isinstance(inc.host, Copy)
            copies[server] = inc.host
        for node in world.by_id.values():
            self.bounded(node)
            for server, inc in node.core.hosted.items():
                if inc.host is not copies.get(server):
                    world.fail("one owner", f"{node.id} has a second copy of {server}")
            for inc in node.core.hosted.values():
                self._timer_phase(inc)
        for server, copy in copies.items():
            self._history(server, copy.items)
        if "short expiry" not in world.plan.kinds:
            for server, copy in copies.items():
                for target, uid in copy.told:
                    if target in copies and uid not in copies[target].items:
                        world.fail("casts", f"{uid}, a cast of {server} to {target}, is lost")
        self._records(copies)
        self._look_ups()

    def _maker(self, server: ServerId, uid: str) -> str:
        """Whose requests of a server are in order with this one."""
        return uid.partition("#")[0]

    def _once_and_in_order(self, server: ServerId, items: list[str]) -> None:
        last: dict[str, int] = {}
        seen: dict[str, None] = {}
        for uid in items:
            if uid in seen:
                self.world.fail("at most once", f"{server} applied {uid} twice")
            seen[uid] = None
            if "~" not in uid:
                maker = self._maker(server, uid)
                number = int(uid.partition("#")[2])
                if number < last.get(maker, 0):
                    self.world.fail("order", f"{server} applied {uid} after #{last[maker]}")
                last[maker] = number

    def _history(self, server: ServerId, items: list[str]) -> None:
        world = self.world
        self._once_and_in_order(server, items)
        seen = dict.fromkeys(items)
        for uid, place in self.acked.get(server, {}).items():
            if place:
                if place > len(items) or items[place - 1] != uid:
                    world.fail("nothing lost", f"{server} has not {uid} at place {place}")
            elif uid not in seen:
                world.fail("nothing lost", f"{server} never applied the cast {uid}")
        for uid, status in self.refused.get(server, {}).items():
            if uid in seen:
                world.fail("outcome", f"{server} applied {uid}, reported as not done ({status})")

    def looked_up(self, node: SimNode, server: ServerId) -> None:
        """A node asks the directory where a server is."""
        self.world.counts["look-ups"] += 1
        if node.id + server in self.looked:
            self.looked_again += 1
        self.looked[node.id + server] = None

    def _look_ups(self) -> None:
        """Who has found a server once is told where it goes.

        Where nothing gets lost, and nothing takes so long that silence is suspect. One who was
        silent during three moves of a server has to ask again.
        """
        plan = self.world.plan
        quick = not plan.async_share + plan.relay_share and plan.delay_high_us <= 1_500
        most = 2 + self.world.counts["move moved"] // 4
        if quick and not plan.kinds and self.looked_again > most:
            self.world.fail("look-ups", f"{self.looked_again} look-ups of servers found before")

    def _records(self, copies: dict[ServerId, Copy]) -> None:
        """Completion records are bounded by what is outstanding, not by history."""
        world = self.world
        if world.plan.loss or world.plan.kinds.keys() & {"break", "partition", "one way", "split"}:
            return  # the last acknowledgement of an idle sender may have been lost
        if world.plan.crashes_max or "client crash" in world.plan.kinds:
            return
        left = sum(
            inc.records for node in world.by_id.values() for inc in node.core.hosted.values()
        )
        if left > 4 * len(world.servers) + 20:
            world.fail("bounded", f"{left} completion records are left when all is answered")
