"""A node process of the simulation: the production core behind a port of virtual time.

What the asyncio shell does with tasks, threads and sockets is done here with events: a handler
is a generator that sleeps and calls, a capture takes a while, a hook ends later. The decisions
are all the core's own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from msgspec import Struct

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
    Reach,
    ReadRow,
    Release,
    Resume,
    SwapRow,
    TakeChunk,
    WatchRow,
)
from migrate.core.delivery import NEVER, Entry, Outgoing
from migrate.core.directory import Row, RowState
from migrate.core.events import (
    Checked,
    Copied,
    Decoded,
    DecodeFailed,
    Encoded,
    EncodeFailed,
    RowRead,
    RowSeen,
    SwapOutcome,
    SwapResult,
    Taken,
)
from migrate.core.ids import NodeId, ServerId, TransferId
from migrate.core.incarnation import (
    Incarnation,
    Phase,
    Plan,
)
from migrate.core.messages import CALL, CAST, OK, Message
from migrate.core.move import MoveTimes, SourceMove, TargetMove
from migrate.core.node import LAST_WORD_MS, Core, CoreOptions
from migrate.core.records import StateRecord
from tests.sim.faults import Crashed
from tests.sim.phases import Move

if TYPE_CHECKING:
    from tests.sim.world import World


class Op(Struct, frozen=True, array_like=True):
    """What a request asks for: sleep, and call or tell another server on the way."""

    uid: str
    what: str  # add, relay, tell
    sleep_us: int
    target: str
    timeout_ms: int


class Settled(Struct, frozen=True, array_like=True):
    """What a call returns: whose request took which place in the server's history.

    Of a read: how long the history was, and what its last place is `seen` to hold.
    """

    uid: str
    place: int
    seen: str = ""


class Frozen(Struct, array_like=True):
    """A server's state as it travels in the simulation.

    `items` lacks the first `ahead` ones, which went ahead in chunks. `alias`: see `Copy`.
    """

    ahead: int
    items: list[str]
    told: list[tuple[str, str]]
    numbers: dict[str, int]
    ticks: int
    born_us: int
    record: StateRecord
    alias: str = ""


_encoder = msgspec.msgpack.Encoder()
_op = msgspec.msgpack.Decoder(Op)
_result = msgspec.msgpack.Decoder(Settled)
_frozen = msgspec.msgpack.Decoder(Frozen)
_items = msgspec.msgpack.Decoder(list[str])


def pack(value: object) -> bytes:
    """Anything of this module as bytes."""
    return _encoder.encode(value)


def unpack_result(payload: bytes) -> Settled:
    """What a call returned, from its bytes."""
    return _result.decode(payload)


class Copy:
    """The user's object of one copy of a server: what was applied, in order.

    `alias` is what it calls itself in the names of its requests: another one after it has gone back
    to what one of its standbys had, for its former self may go on making some for a while.
    """

    __slots__ = (
        "alias",
        "alive",
        "born_us",
        "id",
        "items",
        "numbers",
        "runs",
        "sender_epochs",
        "tasks",
        "ticks",
        "told",
    )

    def __init__(self, server: ServerId, born_us: int) -> None:
        self.id = server
        self.alias = server
        self.born_us = born_us
        self.items: list[str] = []
        self.told: list[tuple[str, str]] = []  # casts made without waiting: (server, uid)
        self.numbers: dict[str, int] = {}
        self.ticks = 0
        self.tasks = 0
        self.alive = True
        self.runs: dict[int, Run] = {}
        self.sender_epochs: dict[str, int] = {}  # by session: highest seen by a checker


Step: TypeAlias = Generator[int | None, Any, Settled]


class Run:
    """One handler that is being run. Yields microseconds to sleep, or None for a result."""

    __slots__ = ("copy", "entry", "inc", "steps", "waiting")

    def __init__(self, inc: Incarnation, entry: Entry, copy: Copy) -> None:
        self.inc = inc
        self.entry = entry
        self.copy = copy
        self.steps: Step | None = None
        self.waiting: Sub | None = None


class Sub:
    """A request that a handler made and waits for."""

    __slots__ = ("kind", "run", "server", "uid")

    def __init__(self, run: Run, server: str, uid: str, kind: int) -> None:
        self.run = run
        self.server = server
        self.uid = uid
        self.kind = kind


class SimNode:
    """One incarnation of one node (or client); dead for good once it has died.

    `core_class` is what is under test; controls give one with a mechanism switched off.
    """

    core_class: type[Core] = Core

    def __init__(self, world: World, name: str, incarnation: int, *, hosts: bool) -> None:
        self.world = world
        self.name = name
        self.incarnation = incarnation
        self.id: NodeId = f"{name}@{incarnation}"
        self.hosts = hosts
        self.alive = True
        self.paused = False
        self.steps_left = -1  # port calls until it dies; -1: it does not
        self.resolved: Callable[[Any, int, bytes | None, Any], None] | None = None
        self.moving: dict[TransferId, Copy] = {}
        self.ahead: dict[TransferId, int] = {}  # items that were sent ahead
        self.taken: dict[TransferId, list[str]] = {}  # items that came ahead
        self.asked: dict[TransferId, ServerId] = {}  # moves out that have not ended
        self._phases: dict[TransferId, IntEnum] = {}
        self._backlog: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._deferred: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._inputs = 0
        self._wake_us = -1
        plan = world.plan
        self.skew_us = world.between(-plan.skew_us, plan.skew_us) if plan.skew_us else 0
        self.core = self.core_class(self.id, self, self.options(), self.now_ms())

    def options(self) -> CoreOptions:
        """Waits short enough that all of them pass within a schedule."""
        plan = self.world.plan
        return CoreOptions(
            window=plan.window,
            repeat_first_ms=25,
            repeat_max_ms=150,
            ack_idle_ms=20,
            session_expiry_ms=plan.session_expiry_ms,
            records_max=plan.records_max,
            late_max=plan.late_max,
            mailbox_bytes_max=plan.mailbox_bytes_max,
            forwarding_max=50,
            probe_ms=20,
            moves_max=3,
            move=MoveTimes(
                repeat_ms=15,
                step_ms=250,
                quiesce_ms=200,
                reclaim_ms=200,
                confirm_ms=40,
                reserve_ms=1_500,
            ),
        )

    # -- what comes in

    def now_ms(self) -> int:
        """The clock of this node."""
        return 1_000_000_000 + (self.world.now_us + self.skew_us) // 1000

    def input(self, what: Callable[..., Any], *args: Any) -> None:
        """Let something happen here: not at all if it died, later if it is paused."""
        if not self.alive:
            return
        if self.paused:
            self._backlog.append((what, args))
            return
        self._inputs += 1
        # The loop of a real node asks for a turn now and then.
        self.core.crowded = self._inputs % 13 == 0
        try:
            what(*args)
        except Crashed:
            return
        self.core.crowded = False
        core = self.core
        if core.moves_out or core.moves_in:
            self._look_at_phases()
        if self._inputs & 15 == 0:
            self.world.invariants.bounded(self)

    def moves(self) -> list[Move]:
        """The moves under way out of and into this node."""
        core = self.core
        return [*core.moves_out.values(), *core.moves_in.values()]

    def peer_of(self, move: Move) -> NodeId:
        """The node at the other end of one of its moves."""
        return move.target if type(move) is SourceMove else move.source  # type: ignore[union-attr]

    def _look_at_phases(self) -> None:
        for move in self.moves():
            if self._phases.get(move.transfer) is not move.phase:
                self._phases[move.transfer] = move.phase
                self.world.faults.entered(self, move)

    def _work(self, low_us: int, high_us: int) -> int:
        """How long a piece of its own work takes; longer on a slow node."""
        slow = self.world.network.slow
        took = self.world.between(low_us, high_us)
        return took * slow.get(self.name, 1) if slow else took

    def later(self, delay_us: int, what: Callable[..., Any], *args: Any) -> None:
        """The same after a while."""
        self.world.at(delay_us, self.input, what, *args)

    def die(self) -> None:
        """The process ends here and now."""
        self.alive = False
        self._backlog.clear()
        self._deferred.clear()
        self.world.node_died(self)

    def pause(self) -> None:
        """SIGSTOP: nothing comes in or gets out until `wake`."""
        if self.alive and not self.paused:
            self.paused = True
            self.world.note(f"{self.id} pauses")

    def wake(self) -> None:
        """SIGCONT: what was about to leave leaves, what came meanwhile is handled."""
        if not self.alive or not self.paused:
            return
        self.paused = False
        self.world.note(f"{self.id} wakes")
        deferred, self._deferred = self._deferred, []
        for what, args in deferred:
            what(*args)
        backlog, self._backlog = self._backlog, []
        for call, args in backlog:
            self.input(call, *args)

    def deliver(self, source: NodeId, message: Message) -> None:
        """A message arrived."""
        self.core.receive(source, [message], self.now_ms())

    def peer_up(self, node: NodeId) -> None:
        """A link came up."""
        self.core.peer_up(node, self.now_ms())

    def saw_death(self, node: NodeId) -> None:
        """Another process was seen dead."""
        self.core.node_dead(node, self.now_ms())
        if self.hosts:
            self.later(self.world.between(100, 20_000), self._bury, node)
            self.later(LAST_WORD_MS * 1000, self._bury, node)

    def _bury(self, node: NodeId) -> None:
        """Mark lost what has died with its owner; again until the core says it is settled."""
        directory_ = self.world.directory
        if directory_.unreachable(self):
            self.later(self.world.between(20_000, 80_000), self._bury, node)
            return
        doomed, again = self.core.burials(node, directory_.rows.values(), self.now_ms())
        for row, rev in doomed:
            buried = directory.buried(row, "its node died")
            self._later_out(directory_.swap, self, row.server, buried, rev, self._buried)
        if again:
            self.later(self.world.between(20_000, 80_000), self._bury, node)

    def _buried(self, result: SwapResult) -> None:
        """Nothing to do: the rows are read again."""

    # -- servers

    def spawn(
        self, server: ServerId, *, reentrant: bool | None = None, period_ms: int = -1
    ) -> None:
        """Host a new server; its row is written. What is not said is drawn."""
        world = self.world
        plan = world.plan
        row = Row(server, 1, self.id, RowState.ACTIVE, f"spawn {server}", "", "Log", 1)
        rev = world.directory.create(row)
        if period_ms < 0:
            period_ms = world.between(20, 80) if world.chance(plan.timer_share) else 0
        timers = [("tick", period_ms)] if period_ms else []
        copy = Copy(server, world.now_us)
        if reentrant is None:
            reentrant = world.chance(plan.reentrant_share)
        self.core.host(row, rev, plan.mailbox, reentrant, copy, timers, self.now_ms())
        self.later(world.between(0, 2_000), self._started, server)

    def _started(self, server: ServerId) -> None:
        self.core.started(server, self.now_ms())

    def move(self, server: ServerId, target: NodeId, transfer: TransferId) -> None:
        """Begin a move, if the shell's preconditions hold."""
        core = self.core
        if server in core.hosted and server not in core.leaving and target in self.world.by_id:
            self.world.counts["moves"] += 1
            self.world.note(f"{self.id} moves {server} to {target} {transfer}")
            self.asked[transfer] = server
            core.move(server, target, transfer, False, "", self.now_ms())

    def withdraw(self) -> None:
        """Give up every move that can still be given up."""
        self.world.counts["withdraw"] += 1
        for move in self.moves():
            self.world.faults.hit("withdraw", move)
        self.core.withdraw_moves("the node is closing", self.now_ms())

    def stop(self, server: ServerId) -> None:
        """Stop a server."""
        if self.core.stop(server, self.now_ms()):
            self.world.counts["stop"] += 1
            self.world.note(f"{self.id} stops {server}")

    def draw_op(self, server: str) -> Op:
        """What a request to `server` shall do."""
        world = self.world
        plan = world.plan
        sleep = 0
        if world.chance(plan.async_share):
            sleep = world.between(10, 5_000 if world.chance(0.9) else 300_000)
        what, target = "add", ""
        if world.chance(plan.relay_share):
            what = "relay" if world.chance(0.6) else "tell"
            target = world.targets[world.between(0, len(world.targets) - 1)]
        timeout = world.between(20, 300) if world.chance(plan.deadlines) else 0
        return Op("", what, sleep, target, timeout)

    # -- the port

    def _step(self) -> None:
        """One more effect of this node: perhaps its last."""
        if self.steps_left >= 0:
            self.steps_left -= 1
            if self.steps_left < 0 and self.world.faults.may_crash():
                self.world.counts["crash in step"] += 1
                self.world.faults.crash_inside(self)

    def _later_out(self, what: Callable[..., None], *args: Any) -> None:
        """Let an effect out, or keep it while paused."""
        self._step()
        if self.paused:
            self._deferred.append((what, args))
        else:
            what(*args)

    def send(self, node: NodeId, message: Message) -> None:
        """`Port.send`."""
        self.world.invariants.sent(self, message)
        self._later_out(self.world.network.send, self.id, node, message)

    def resolve(self, token: object, status: int, payload: bytes | None, value: object) -> None:
        """`Port.resolve`."""
        self._step()
        if isinstance(token, Sub):
            # The waiting handler goes on in a step of its own, never on the core's stack.
            self.later(0, self._resume, token, status, payload, value)
        else:
            assert self.resolved is not None
            self.resolved(token, status, payload, value)

    def pack(self, args: object) -> bytes:
        """`Port.pack`."""
        return pack(args)

    def size(self, inc: Incarnation, args: object) -> int:
        """`Port.size`."""
        return len(pack(args))

    def pack_result(self, status: int, value: object) -> tuple[int, bytes]:
        """`Port.pack_result`."""
        return status, pack(value)

    def look_up(self, server: ServerId) -> None:
        """`Port.look_up`."""
        self.world.invariants.looked_up(self, server)
        self._later_out(self.world.directory.read, self, server, self._located(server))

    def _located(self, server: ServerId) -> Callable[[bool, Row | None, int], None]:
        def located(known: bool, row: Row | None, rev: int) -> None:
            self.core.located(server, known, row, self.now_ms())

        return located

    def look_up_senders(self, servers: list[ServerId]) -> None:
        """`Port.look_up_senders`: one after the other; what cannot be read is left out."""
        self._next_sender(servers, 0, {})

    def _next_sender(self, servers: list[ServerId], i: int, gone: dict[ServerId, int]) -> None:
        if i == len(servers):
            self.core.senders_gone(gone, self.now_ms())
            return

        def read(known: bool, row: Row | None, rev: int) -> None:
            if known:
                lost = row is None or row.state is RowState.LOST
                gone[servers[i]] = NEVER if lost or row is None else row.generation
            self._next_sender(servers, i + 1, gone)

        self._later_out(self.world.directory.read, self, servers[i], read)

    def wake_at(self, due_ms: int) -> None:
        """`Port.wake_at`."""
        due_us = (due_ms - 1_000_000_000) * 1000 - self.skew_us
        now_us = self.world.now_us
        if now_us < self._wake_us <= due_us:
            return
        self._wake_us = max(due_us, now_us + 1)
        self.later(self._wake_us - now_us, self._tick, self._wake_us)

    def _tick(self, wish_us: int) -> None:
        if wish_us == self._wake_us:
            self._wake_us = -1
            self.core.tick(self.now_ms())

    def pump_later(self, inc: Incarnation) -> None:
        """`Port.pump_later`."""
        self.later(self.world.between(0, 50), self._pump, inc)

    def _pump(self, inc: Incarnation) -> None:
        self.core.pump(inc, self.now_ms())

    def quiesced(self, inc: Incarnation, entry: Entry) -> None:
        """`Port.quiesced`."""
        raise AssertionError("nobody asked for it")

    def not_quiesced(self, token: object) -> None:
        """`Port.not_quiesced`."""

    def checkpoint_due(self, inc: Incarnation, plan: Plan) -> None:
        """`Port.checkpoint_due`."""

    def stopped(self, inc: Incarnation) -> None:
        """`Port.stopped`: the row goes first, then the server."""
        self.later(self.world.between(0, 1_000), self._remove_row, inc)

    def _remove_row(self, inc: Incarnation) -> None:
        """Remove the row as it is, and no other, as `Node._remove_row` does."""

        def ended(outcome: SwapOutcome) -> None:
            if self.core.removal_ended(inc.id, outcome, self.now_ms()) is None:
                self.later(10_000, self._remove_row, inc)

        def read(known: bool, row: Row | None, rev: int) -> None:
            if not known:
                ended(SwapOutcome.NOT_DONE)
            elif row is None:
                ended(SwapOutcome.DONE)
            elif row.owner != self.id:
                ended(SwapOutcome.REFUSED)
            else:
                swap = self.world.directory.swap
                self._later_out(swap, self, inc.id, None, rev, lambda got: ended(got.outcome))

        self._later_out(self.world.directory.read, self, inc.id, read)

    # -- handlers

    def run(self, inc: Incarnation, entry: Entry) -> tuple[int, bytes | None, object] | None:
        """`Port.run`: go as far as the handler's first wait."""
        copy = inc.host
        assert isinstance(copy, Copy)
        self._step()
        self.world.invariants.ran(self, inc)
        if not copy.alive:
            self.world.fail("one owner", f"a dropped copy of {inc.id} was run at {self.id}")
        if inc.phase is Phase.FROZEN:
            self.world.fail("frozen", f"a handler of {inc.id} was begun after the freeze")
        if len(inc.running) > 1 and not inc.reentrant:
            self.world.fail("one at a time", f"{inc.id} runs {len(inc.running)} handlers at once")
        if entry.session is None:
            copy.ticks += 1
            return OK, b"", None
        op = _op.decode(entry.payload) if entry.payload is not None else entry.args
        assert isinstance(op, Op)
        run = Run(inc, entry, copy)
        run.steps = self._handler(run, op)
        try:
            wait = next(run.steps)
        except StopIteration as end:
            return OK, None, end.value
        copy.runs[entry.run] = run
        if wait is not None:
            self.later(wait, self._advance, run, None)
        return None

    def _advance(self, run: Run, result: object) -> None:
        """Let a handler go on with what it waited for."""
        if not run.copy.alive or run.copy.runs.get(run.entry.run) is not run:
            return
        assert run.steps is not None
        try:
            wait = run.steps.send(result)
        except StopIteration as end:
            del run.copy.runs[run.entry.run]
            self.core.finish(run.inc, run.entry, OK, None, end.value, self.now_ms())
            return
        if wait is not None:
            self.later(wait, self._advance, run, None)

    def _resume(self, sub: Sub, status: int, payload: bytes | None, value: object) -> None:
        run = sub.run
        self.world.note(f"{run.copy.id}/{run.entry.run} {sub.server} {sub.uid} status={status}")
        result: Settled | None = None
        if status == OK and sub.kind == CALL:
            result = unpack_result(payload) if payload is not None else value  # type: ignore[assignment]
        row, _ = self.world.directory.rows.get(run.copy.id, (None, 0))
        former = not run.copy.alive or (
            row is not None and row.owner != self.id and row.epoch > run.inc.row.epoch
        )
        self.world.invariants.answered(
            sub.server, sub.uid, sub.kind, status, value, result, deadline=True, former=former
        )
        if run.waiting is sub:
            run.waiting = None
            self._advance(run, status)

    def _handler(self, run: Run, op: Op) -> Step:
        """The user's code: applies the request before or after what it waits for."""
        copy = run.copy
        early = op.sleep_us % 2 == 0
        if op.sleep_us:
            if not early:
                copy.items.append(op.uid)
                place = len(copy.items)
            yield op.sleep_us
        if early or not op.sleep_us:
            copy.items.append(op.uid)
            place = len(copy.items)
        if op.sleep_us % 7 == 1:
            # A task that the handler leaves behind; until it ends the server is not quiet.
            copy.tasks += 1
            self.core.background(run.inc, 1, self.now_ms())
            self.later(op.sleep_us, self._task_ended, run)
        if op.what == "tell":
            self._tell(run, op)
        elif op.what == "relay":
            yield from self._relay(run, op)
        return Settled(op.uid, place)

    def _task_ended(self, run: Run) -> None:
        run.copy.tasks -= 1
        self.core.background(run.inc, -1, self.now_ms())

    def _chain(self, run: Run) -> tuple[str, ...]:
        return (*run.entry.chain, f"{run.copy.id}/{run.entry.run}")

    def _next_uid(self, run: Run, target: str) -> str:
        """The next request of this server to `target`; those of a chain have no order."""
        chain = self._chain(run)
        mark = "~" if any(link.startswith(target + "/") for link in chain) else ""
        key = target + mark
        number = run.copy.numbers[key] = run.copy.numbers.get(key, 0) + 1
        return f"{run.copy.alias}{mark}#{number}"

    def _tell(self, run: Run, op: Op) -> None:
        """A cast that nobody waits for: it is part of the state until it is acknowledged."""
        key = op.target
        number = run.copy.numbers.get(key, 0) + 1
        uid = f"{run.copy.alias}#{number}"
        self.world.invariants.made(op.target, uid)
        sub = Op(uid, "add", 0, "", 0)
        out = Outgoing(CAST, "op", None, sub, (), 0, None, f"{run.copy.id}/{run.entry.run}")
        now = self.now_ms()
        if self.core.request(run.inc.sender, op.target, out, now, wait=False) is not None:
            run.copy.numbers[key] = number
            run.copy.told.append((op.target, uid))

    def _relay(self, run: Run, op: Op) -> Generator[None, Any, None]:
        uid = self._next_uid(run, op.target)
        self.world.invariants.made(op.target, uid)
        sub = Op(uid, "add", 1_001 if op.sleep_us % 3 == 1 else 0, "", 0)
        now = self.now_ms()
        deadline = now + op.timeout_ms if op.timeout_ms else 0
        waiting = run.waiting = Sub(run, op.target, uid, CALL)
        out = Outgoing(
            CALL,
            "op",
            None,
            sub,
            self._chain(run),
            deadline,
            waiting,
            f"{run.copy.id}/{run.entry.run}",
        )
        self.core.request(run.inc.sender, op.target, out, now)
        yield None

    # -- moves

    def perform(self, transfer: TransferId, incoming: bool, action: Action) -> None:
        """`Port.perform`."""
        world = self.world
        self._step()
        match action:
            case Reach():
                world.counts[f"reached {action.point.value}"] += 1
                world.note(f"{self.id} {transfer} {action.point.value}")
                world.faults.reached(self, action.point)
            case CheckClass():
                move = self.core.moves_in[transfer]
                fails = self._fails("class refused", world.plan.class_refused, move)
                refusal = "no such class" if fails else ""
                self._event(self._work(10, 500), transfer, incoming, Checked(1, refusal))
            case CopyAhead():
                self.later(self._work(0, 1_000), self._copy_ahead, transfer)
            case TakeChunk():
                target = self.core.moves_in[transfer]
                self.later(self._work(0, 1_000), self._take_chunk, target, action)
            case EncodeState():
                self.later(self._work(0, 3_000), self._freeze, transfer, action)
            case DecodeState():
                self.later(self._work(100, 3_000), self._decode, transfer, action)
            case SwapRow():
                server = action.row.server
                self._later_out(
                    world.directory.swap,
                    self,
                    server,
                    action.row,
                    action.rev,
                    lambda result: self._told(transfer, incoming, result),
                    self._move(transfer, incoming),
                )
            case ReadRow():
                server = self.core.moves_in[transfer].server
                self._later_out(
                    world.directory.read,
                    self,
                    server,
                    lambda known, row, rev: self._told(
                        transfer, incoming, RowRead(known, row, rev)
                    ),
                    self._move(transfer, incoming),
                )
            case WatchRow():
                self.later(world.plan.watch_ms * 1_000, self._watch_row, transfer)
            case GoLive() | Resume():
                world.directory.unwatch(transfer)
                world.note(f"{self.id} {transfer} {type(action).__name__} e={action.row.epoch}")
                self.later(self._work(0, 3_000), self._started, action.row.server)
            case Release():
                world.note(f"{self.id} {transfer} releases")
            case DropCopy():
                world.note(f"{self.id} {transfer} drops")
                copy = self.moving.get(transfer)
                if copy is not None:
                    copy.alive = False
            case Finish():
                world.note(f"{self.id} {transfer} {action.result.name} {action.reason}")
                self.moving.pop(transfer, None)
                self.ahead.pop(transfer, None)
                self.taken.pop(transfer, None)
                self._phases.pop(transfer, None)
                if incoming:
                    world.directory.unwatch(transfer)
                else:
                    world.counts[f"move {action.result.value}"] += 1
                    world.invariants.move_ended(self, transfer, action)
            case _:
                raise AssertionError(f"the core should apply {action} itself")

    def _watch_row(self, transfer: TransferId) -> None:
        target = self.core.moves_in.get(transfer)
        if target is not None:
            self._later_out(
                self.world.directory.watch,
                self,
                target.server,
                transfer,
                lambda row, rev: self._told(transfer, True, RowSeen(row, rev)),
                target,
            )

    def _move(self, transfer: TransferId, incoming: bool) -> Move | None:
        core = self.core
        return core.moves_in.get(transfer) if incoming else core.moves_out.get(transfer)

    def _fails(self, kind: str, probability: float, move: Move | None) -> bool:
        faults = self.world.faults
        fails = faults.on and self.world.chance(probability)
        if fails:
            faults.hit_move(kind, move)
        return fails

    def _event(self, delay_us: int, transfer: TransferId, incoming: bool, event: Any) -> None:
        self.later(delay_us, self._told, transfer, incoming, event)

    def _told(self, transfer: TransferId, incoming: bool, event: Any) -> None:
        self.core.move_event(transfer, incoming, event, self.now_ms())

    def _copy_ahead(self, transfer: TransferId) -> None:
        """Send some of the items that were not sent yet; a round ends when all were."""
        move = self.core.moves_out.get(transfer)
        inc = self.core.hosted.get(move.server) if move is not None else None
        if move is None or inc is None:
            return
        if self._fails("copy fails", self.world.plan.copy_fails, move):
            self.ahead.pop(transfer, None)
            self._told(transfer, False, Copied(b"", True, failed=True))
            return
        copy = inc.host
        assert isinstance(copy, Copy)
        sent = self.ahead.get(transfer, 0)
        # How much of it is large enough to go ahead differs from server to server.
        more = copy.items[sent : sent + self.world.rng.choice((0, 1, 2, 8))]
        self.ahead[transfer] = sent + len(more)
        # NB: padded, because rounds go on only while they shrink and are worth it.
        state = pack(more) + bytes(1_000 >> min(9, move.rounds * 2)) if more else b""
        self._told(transfer, False, Copied(state, self.world.chance(0.6) or not more))

    def _take_chunk(self, target: TargetMove, action: TakeChunk) -> None:
        transfer = target.transfer
        if self.core.moves_in.get(transfer) is not target:
            return  # Over; it may have begun anew since, by a Prepare that came late.
        if self._fails("take fails", self.world.plan.take_fails, target):
            self._told(transfer, True, DecodeFailed("cannot be installed"))
            return
        if action.number == 0:
            self.taken[transfer] = []
        self.taken[transfer] += _items.decode(action.state.rstrip(b"\0"))
        self._told(transfer, True, Taken())

    def _freeze(self, transfer: TransferId, action: EncodeState) -> None:
        move = self.core.moves_out.get(transfer)
        if self._fails("encode fails", self.world.plan.encode_fails, move):
            path = "Log.conn" if self.world.chance(0.5) else ""
            self._told(transfer, False, EncodeFailed("cannot be pickled", path))
            return
        inc = self.core.freeze(transfer, self.now_ms())
        if inc is None:
            self._told(transfer, False, EncodeFailed("the server is not quiet"))
            return
        copy = inc.host
        assert isinstance(copy, Copy)
        if copy.runs or copy.tasks:
            self.world.fail("quiescent", f"{inc.id} was frozen while a handler was running")
        self.moving[transfer] = copy
        record = self.core.export(inc, self.now_ms())
        ahead = self.ahead.get(transfer, 0) if action.ahead else 0
        items = copy.items[ahead:]
        state = pack(
            Frozen(
                ahead,
                items,
                copy.told,
                copy.numbers,
                copy.ticks,
                copy.born_us,
                record,
                copy.alias,
            )
        )
        self._event(self._work(50, 2_000), transfer, False, Encoded(state))

    def _decode(self, transfer: TransferId, action: DecodeState) -> None:
        target = self.core.moves_in.get(transfer)
        if self._fails("decode fails", self.world.plan.decode_fails, target):
            self._told(transfer, True, DecodeFailed("cannot be unpickled"))
            return
        if target is None:
            return
        frozen = _frozen.decode(action.state)
        copy = Copy(target.server, frozen.born_us)
        ahead = self.taken.get(transfer, []) if action.ahead else []
        if len(ahead) != frozen.ahead:
            self.world.fail("pre-copy", f"{len(ahead)} items came ahead, {frozen.ahead} were sent")
        copy.items, copy.told = [*ahead, *frozen.items], frozen.told
        copy.numbers, copy.ticks = frozen.numbers, frozen.ticks
        copy.alias = frozen.alias
        if self.core.install(transfer, frozen.record, copy, self.now_ms()) is None:
            return
        self.moving[transfer] = copy
        self._event(self._work(0, 500), transfer, True, Decoded())
