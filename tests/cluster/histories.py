"""Recorded histories of real runs: clients, moves, kills, pauses and cuts, and their judgement.

A run is drawn from a seed: what its processes are, which faults come in which order, which
calls are made. What happens then is up to the machine, so a seed repeats the plan of a run and
not the run; a history that is bad is kept with it.

What is promised, and judged here from outside:

* the history of each server is linearizable, with the calls of each sender in their order;
* what was put in once and acknowledged is there once at the end, nothing else is, in order;
* one node answers for an epoch, and epochs never fall in real time;
* a server is lost only where a process was killed; who calls it is told so soon, and nothing is
  ever heard of it again;
* calls with time enough fail for no other reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import random
import time
import traceback
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import psutil

import migrate
from migrate.cluster import NodeProcess
from migrate.core.actions import Point
from tests.cluster import linearizable, workloads
from tests.cluster.cuts import Connection, connections
from tests.cluster.linearizable import End, Model, Operation, Undecided, account, check

SOON_S: Final = 40.0
"""A call that takes longer hangs: pauses last 3 s, and a step of a move is given up after 1."""

PAUSE_MAX_S: Final = 3.0
COMPLETE_S: Final = 20.0
"""A set of standbys that is not complete by then never will be."""

POINT_WAIT_S: Final = 1.0
"""How long a fail point is waited for; many runs never reach some of them."""

RUN_S_MAX: Final = 300.0
"""A run that takes longer hangs."""

KINDS: Final[dict[str, tuple[Any, Model]]] = {
    "register": (workloads.Register, linearizable.Register()),
    "counter": (workloads.Counter, linearizable.Counter()),
    "list": (workloads.AppendList, linearizable.AppendList()),
    "set": (workloads.GrowingSet, linearizable.GrowingSet()),
}

FAULTS: Final = ("kill", "stop", "cut", "cut frame", "pair")


@dataclass(frozen=True)
class Plan:
    """What a run is made of.

    Attributes:
        seed: It was drawn from this.
        seconds: How long faults go on.
        same_host: Whether links go over Unix sockets; otherwise over gRPC.
        points: Whether nodes have fail points, and thus the core with marks.
        lease_s: Of the nodes; may be shorter than a pause.
        nodes: How many.
        clients: How many.
        movers: Moves that are asked for at a time.
        subjects: Servers that are called at a time.
        calls_max: Calls after which a server gives way to a fresh one.
        faults: The kinds that come.
        standbys: Of each server, in mode sync. Then no server may be lost: each fault comes when
            all sets are complete again, and takes only one node away.
        switched_off: A mechanism that is taken away in every node; see `workloads.SwitchedOff`.
    """

    seed: int
    seconds: float = 5.0
    same_host: bool = True
    points: bool = True
    lease_s: float = 10.0
    nodes: int = 3
    clients: int = 5
    movers: int = 3
    subjects: int = 10
    calls_max: int = 200
    faults: tuple[str, ...] = FAULTS
    standbys: int = 0
    switched_off: str = ""

    @staticmethod
    def draw(seed: int, **fixed: Any) -> Plan:
        """The plan of a seed; `fixed` replaces parts of it."""
        rng = random.Random(f"plan {seed}")
        # Swarm: some runs have few kinds of faults and thus many of each, some have all; a kill
        # and a pause are in each.
        few = rng.sample(FAULTS, rng.randint(1, len(FAULTS)))
        faults = {"kill": None, "stop": None, **dict.fromkeys(few)}
        plan = Plan(
            seed,
            same_host=seed % 2 == 0,
            points=rng.random() < 0.7,
            lease_s=rng.choice([1.0, 10.0]),
            nodes=rng.choice([3, 4]),
            clients=rng.choice([4, 8]),
            movers=rng.choice([2, 4]),
            subjects=rng.choice([6, 12]),
            calls_max=rng.choice([60, 200]),
            faults=tuple(faults),
        )
        return dataclasses.replace(plan, **fixed)

    def __str__(self) -> str:
        return (
            f"{'unix' if self.same_host else 'grpc'}{' with points' if self.points else ''}, "
            f"{self.nodes} nodes, lease {self.lease_s:g} s, {self.clients} clients, "
            f"{self.movers} movers, {self.standbys} standbys, faults: {', '.join(self.faults)}"
        )


@dataclass(slots=True)
class Made:
    """A call that was made, and what became of it."""

    lane: str
    call: tuple[Any, ...]
    begun_ns: int
    hurried: bool  # with a time-out that may pass
    relay: Subject | None
    cast: bool = False
    ended_ns: int = 0
    end: End | None = None
    result: Any = None
    origin: tuple[str, int] = ("", 0)  # node and epoch
    error: BaseException | None = None

    def ended(self, pending: asyncio.Future[Any]) -> None:
        """Take down how it ended."""
        self.ended_ns = time.monotonic_ns()
        error = None if pending.cancelled() else pending.exception()
        self.error = error
        if pending.cancelled():
            self.end = End.UNKNOWN
        elif error is None and self.cast:
            self.end, self.result = End.RETURNED, linearizable.UNSEEN
        elif error is None:
            self.end = End.RETURNED
            self.result, *origin = pending.result()
            self.origin = (origin[0], origin[1])
        elif not isinstance(error, migrate.MigrateError):
            self.end = End.UNKNOWN
        elif error.outcome is migrate.Outcome.DONE:
            self.end, self.result = End.RETURNED, linearizable.UNSEEN
        elif error.outcome is migrate.Outcome.NOT_DONE:
            self.end = End.NOT_DONE
        else:
            self.end = End.UNKNOWN

    def operation(self) -> Operation:
        """As it looked to who made it. A cast that returned is in the mailbox, to be done."""
        end = self.end or End.UNKNOWN  # It has not ended.
        return Operation(self.lane, self.call, self.begun_ns, self.ended_ns, end, self.result)

    def effect(self) -> Operation:
        """When it can have taken effect: a cast, at any time from its beginning on."""
        seen = self.operation()
        if self.cast and seen.end is End.RETURNED:
            return dataclasses.replace(seen, end=End.UNKNOWN)
        return seen


@dataclass(slots=True, eq=False)
class Subject:
    """A server whose history is taken down; a relay has none of its own."""

    kind: str
    ref: Any
    large: bool
    made: list[Made] = field(default_factory=list)
    lost_ns: int = 0
    final: list[str] | None = None  # all it took in, if it tells that


@dataclass
class Report:
    """What a run did, and what contradicts the promises."""

    plan: Plan
    counts: Tally[str]
    violations: list[str]
    took_s: float
    checked_s: float
    bad: list[Subject] = field(default_factory=list)

    def line(self) -> str:
        """One line for people."""
        c = self.counts
        return (
            f"seed {self.plan.seed}: {c['operations']} operations, {c['moves']} moves, "
            f"{c['kills']} kills, {c['pauses']} pauses, {c['cuts']} cuts "
            f"({c['cuts in a frame']} in a frame), {c['unknown']} unknown, "
            f"{c['servers lost']} of {c['servers']} servers lost, "
            f"{len(self.violations)} violations; {self.took_s:.1f} s"
        )

    def history(self) -> Iterator[str]:
        """What is kept of a failing run."""
        yield f"seed {self.plan.seed}: {self.plan}"
        yield from self.violations
        for subject in self.bad:
            yield f"\n{subject.kind} {subject.ref!r}"
            for made in subject.made:
                where = f"{made.origin[0]} at {made.origin[1]}" if made.origin[1] else made.error
                yield f"{made.operation()}  {where}"


class Run:
    """One run; see the module's text."""

    def __init__(self, plan: Plan, cluster: migrate.LocalCluster) -> None:
        self.plan = plan
        self.cluster = cluster
        self.client: Any = cluster.client
        self.alive: dict[str, NodeProcess] = {node.name: node for node in cluster.nodes}
        self.open: list[Subject] = []
        self.closed: list[Subject] = []
        self.relays: list[Subject] = []
        self.counts: Tally[str] = Tally()
        self.trouble: list[str] = []
        self.ended = False
        self.resting = False  # nothing is moved
        self._numbers = itertools.count(1)
        self._places = random.Random(f"places {plan.seed}")

    @property
    def subjects(self) -> list[Subject]:
        return [*self.closed, *self.open]

    # ------------------------------------------------------------------ servers

    async def spawn(self, kind: str, large: bool = False) -> Subject | None:
        """A fresh server somewhere; None if the node that was to have it has died."""
        cls = workloads.Relay if kind == "relay" else KINDS[kind][0]
        args = (1_500_000 if large else 0,) if kind != "relay" else ()
        on = self._places.choice(list(self.alive))
        options = migrate.SpawnOptions(on=on, standbys=self.plan.standbys)
        try:
            ref = await self.client.spawn(cls, *args, options=options)
        except migrate.MigrateError:
            self.counts["spawns failed"] += 1
            return None
        self.counts["servers"] += kind != "relay"
        return Subject(kind, ref, large)

    async def switch_off(self, node: str) -> None:
        """Take the mechanism away that the plan says."""
        if self.plan.switched_off:
            on = migrate.SpawnOptions(on=node)
            await self.client.spawn(workloads.SwitchedOff, self.plan.switched_off, options=on)

    async def populate(self) -> None:
        """Keep the number of servers up, until the end."""
        kinds = itertools.cycle(KINDS)
        while not self.ended:
            for group, wanted in ((self.open, self.plan.subjects), (self.relays, 2)):
                for subject in [s for s in group if s.lost_ns]:
                    group.remove(subject)
                    if subject.kind != "relay":
                        self.closed.append(subject)
                for subject in [s for s in self.open if len(s.made) >= self.plan.calls_max]:
                    self.open.remove(subject)
                    self.closed.append(subject)
                while len(group) < wanted and not self.ended:
                    kind = "relay" if group is self.relays else next(kinds)
                    large = sum(s.large for s in self.open) < 2 and kind != "relay"
                    fresh = await self.spawn(kind, large)
                    if fresh is None:
                        break
                    group.append(fresh)
            await asyncio.sleep(0.02)

    # ------------------------------------------------------------------ calls

    def draw(self, rng: random.Random, kind: str, lane: str) -> tuple[Any, ...]:
        """A call of a server of that kind."""
        if rng.random() < 0.3:
            return ("read",)
        if kind == "register":
            if rng.random() < 0.5:
                return ("write", rng.randrange(5))
            return ("cas", rng.randrange(5), rng.randrange(5))
        verb = {"counter": "increment", "list": "append", "set": "add"}[kind]
        return (verb, f"{lane}#{next(self._numbers)}")

    def make(
        self,
        client: Any,
        lane: str,
        subject: Subject,
        call: tuple[Any, ...],
        *,
        relay: Subject | None = None,
        cast: bool = False,
        timeout_s: float | None = None,
        pad: bytes = b"",
        method: str = "",
    ) -> asyncio.Future[None]:
        """Make a call (or cast) and see that its end is taken down.

        Args:
            client: Who makes it.
            lane: The client's name.
            subject: The server it is for.
            call: The call, as the model knows it.
            relay: The server through which it is made.
            cast: Whether it is made as a cast.
            timeout_s: A time-out that it may not meet.
            pad: Makes it large.
            method: Which method does it; the model's own word if empty.

        Returns:
            Done when the call has ended, however it did.
        """
        ref = subject.ref._bound_to(client._driver)
        name, args = method or call[0], call[1:]
        target = ref
        if relay is not None:
            target = relay.ref._bound_to(client._driver)
            name, args = "tell" if cast else "ask", (ref, name, *args)
            lane = f"{lane}>{relay.ref._server_id}"
        bound = getattr(target, name)
        if timeout_s is not None:
            bound = bound.with_options(timeout=timeout_s)
        if cast and relay is None:
            bound = bound.cast
        made = Made(lane, call, time.monotonic_ns(), timeout_s is not None, relay, cast)
        subject.made.append(made)
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def ended(pending: asyncio.Future[Any]) -> None:
            made.ended(pending)
            self.note(made, subject)
            if not over.done():
                over.set_result(None)

        pending: asyncio.Future[Any] = bound(*args, pad=pad) if pad else bound(*args)
        pending.add_done_callback(ended)
        return over

    def note(self, made: Made, subject: Subject) -> None:
        """See what the end of a call says about its server."""
        error = made.error
        if isinstance(error, migrate.ServerLost):
            for who in (subject, made.relay):
                if who is not None and who.ref._server_id == error.server and not who.lost_ns:
                    who.lost_ns = made.ended_ns

    async def send(self, client: Any, lane: str, rng: random.Random) -> None:
        """Call servers, a few calls at a time, until the end."""
        while not self.ended:
            if not self.open:
                await asyncio.sleep(0.01)
                continue
            subject = rng.choice(self.open)
            via = rng.choice(self.relays) if self.relays and rng.random() < 0.15 else None
            pending = []
            for n in range(rng.choice([1, 1, 2, 4])):
                if n:
                    # The former may be under way to another place than the next will be.
                    await asyncio.sleep(rng.choice([0, 0, 0.001, 0.003]))
                timeout_s = rng.choice([0.02, 0.2, 1.0]) if rng.random() < 0.1 else None
                pad = bytes(300_000) if rng.random() < 0.02 else b""  # bulk, which is slower
                call = self.draw(rng, subject.kind, lane)
                cast = call[0] in ("increment", "append", "add") and rng.random() < 0.15
                options: dict[str, Any] = {"relay": via, "cast": cast, "pad": pad}
                if not cast:
                    options["timeout_s"] = timeout_s
                pending.append(self.make(client, lane, subject, call, **options))
            await asyncio.wait(pending)
            await asyncio.sleep(rng.choice([0, 0.001, 0.004]))

    # ------------------------------------------------------------------ moves

    async def move(self, rng: random.Random) -> None:
        """Move servers about, until the end."""
        while not self.ended:
            there = [*self.open, *self.relays, *self.closed[-3:]]
            if not there or self.resting:
                await asyncio.sleep(0.01)
                continue
            subject = rng.choice(there)
            to = rng.choice(list(self.alive))
            try:
                # Not to a standby: until it has another one, one death would be too many.
                if self.plan.standbys and to in (await self.client.info(subject.ref)).standbys:
                    await asyncio.sleep(0.001)
                    continue
                await self.client.migrate(subject.ref, to=to)
            except migrate.MigrateError as error:
                self.counts[f"moves: {type(error).__name__}"] += 1
                await asyncio.sleep(0.005)
            else:
                self.counts["moves"] += 1

    # ------------------------------------------------------------------ faults

    async def torment(self, rng: random.Random, until_s: float) -> None:
        """Faults one after the other, each with its repair: each kind, and on until it is time."""
        order = deque(rng.sample(self.plan.faults, len(self.plan.faults)))
        while order or time.monotonic() < until_s:
            await asyncio.sleep(rng.uniform(0.05, 0.3))
            if self.plan.standbys:
                self.resting = True
                await self.complete()
                self.resting = False
            await self.fault(order.popleft() if order else rng.choice(self.plan.faults), rng)

    async def complete(self) -> None:
        """Wait until all servers have their standbys."""
        for subject in [*self.open, *self.relays, *self.closed]:
            until_s = time.monotonic() + COMPLETE_S
            while not subject.lost_ns and not await self.has_standbys(subject):
                if time.monotonic() > until_s:
                    self.trouble.append(f"{subject.ref!r} has not got its standbys again")
                    break
                await asyncio.sleep(0.02)

    async def has_standbys(self, subject: Subject) -> bool:
        try:
            info = await self.client.info(subject.ref)
        except (migrate.ServerLost, migrate.ServerNotFound):
            return True
        except migrate.MigrateError:
            return False
        states = [follower.state for follower in info.followers]
        return len(info.standbys) == self.plan.standbys and set(states) == {"in sync"}

    async def fault(self, kind: str, rng: random.Random) -> None:
        """One fault and its repair."""
        victim = rng.choice(list(self.alive.values()))
        match kind:
            case "kill" | "stop" if self.plan.points and rng.random() < 0.7:
                await self.at_point(kind, victim, rng)
            case "kill":
                victim.kill()
                await self.buried(victim)
            case "stop":
                await self.pause(victim, rng)
            case "cut":
                self.cut(victim)
            case "cut frame":
                await self.cut_frame(victim, rng)
            case "pair":
                other = rng.choice([n for n in self.alive.values() if n is not victim])
                victim.pause()
                self.counts["pauses"] += 1
                await asyncio.sleep(rng.uniform(0.1, 0.8))
                if rng.random() < 0.5:
                    other.kill()
                    await asyncio.sleep(rng.uniform(0.1, 1.5))
                    victim.wake()
                    await self.buried(other)
                else:
                    self.cut(other)
                    await asyncio.sleep(rng.uniform(0.1, 1.5))
                    victim.wake()
        self.counts[f"fault: {kind}"] += 1

    async def buried(self, victim: NodeProcess) -> None:
        """Wait for the end of a process that was killed, and put another one in its place."""
        await victim.wait()
        self.counts["kills"] += 1
        self.alive.pop(victim.name)
        self.alive[victim.name] = await self.cluster.add_node(victim.name)
        await self.switch_off(victim.name)

    async def pause(self, victim: NodeProcess, rng: random.Random) -> None:
        """Stop a process and wake it."""
        victim.pause()
        self.counts["pauses"] += 1
        await asyncio.sleep(rng.choice([0.2, 0.5, 1.0, PAUSE_MAX_S]))
        victim.wake()

    async def at_point(self, action: str, victim: NodeProcess, rng: random.Random) -> None:
        """Kill or stop a process when some node comes to some step."""
        point = rng.choice([p for p in Point if p is not Point.FORWARDING_EXPIRED])
        # Half of the time the one that comes to the step is the victim itself.
        at = victim if rng.random() < 0.5 else rng.choice(list(self.alive.values()))
        with contextlib.suppress(migrate.MigrateError):
            await arm(self.client, at.name, f"{point.value}={action}:{victim.pid}")
        happened = await came_to(lambda: ended_or_stopped(victim), POINT_WAIT_S)
        if happened:
            self.counts[f"point: {action} at {point.value}"] += 1
        elif at is not victim:
            # Nobody may come to the point later, when the process is another one.
            with contextlib.suppress(migrate.MigrateError):
                await arm(self.client, at.name, "")
        if action == "kill":
            victim.kill()  # if the point was not reached
            await self.buried(victim)
        else:
            await self.pause(victim, rng)
            with contextlib.suppress(migrate.MigrateError):
                await arm(self.client, at.name, "")

    @property
    def ports(self) -> frozenset[int]:
        """Those that nodes listen on, or did."""
        return frozenset(int(n.address.rpartition(":")[2]) for n in self.cluster.nodes)

    def cut(self, victim: NodeProcess) -> list[Connection]:
        """Cut all connections of a process."""
        done = connections(victim.pid, self.ports, cut=True)
        self.counts["cuts"] += len(done)
        return done

    async def cut_frame(self, victim: NodeProcess, rng: random.Random) -> None:
        """Cut connections of a process while it has got a part of a frame.

        It sleeps meanwhile, and what is sent to it is more than the sockets hold.
        """
        victim.pause()
        self.counts["pauses"] += 1
        lane = f"pad{next(self._numbers)}"
        calls = [
            self.make(self.client, lane, s, self.draw(rng, s.kind, lane), pad=bytes(2_000_000))
            for s in self.open
        ]
        await came_to(
            lambda: any(c.unread_bytes > 50_000 for c in connections(victim.pid, self.ports)), 1.0
        )
        await asyncio.sleep(0.05)  # until the buffers are full
        done = self.cut(victim)
        self.counts["cuts in a frame"] += sum(c.unread_bytes > 50_000 for c in done)
        victim.wake()
        if calls:
            await asyncio.wait(calls, timeout=SOON_S)

    # ------------------------------------------------------------------ the whole

    async def go(self) -> None:
        """Everything at once for as long as planned; then what there is, is read."""
        plan = self.plan
        rng = random.Random(f"run {plan.seed}")
        for name in self.alive:
            await self.switch_off(name)
        until_s = time.monotonic() + plan.seconds
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for n in range(plan.clients):
                node = self.cluster.nodes[n % len(self.cluster.nodes)]
                connection = migrate.connect(
                    node.address,
                    options=options_of(plan),
                    secret_file=self.cluster.secret_file,
                    name=f"c{n}",
                )
                clients.append(await stack.enter_async_context(connection))
            async with asyncio.TaskGroup() as group:
                work = [group.create_task(self.populate())]
                for n, client in enumerate(clients):
                    sender = self.send(client, f"c{n}", random.Random(f"{n} {plan.seed}"))
                    work.append(group.create_task(sender))
                for n in range(plan.movers):
                    mover = self.move(random.Random(f"mover {n} {plan.seed}"))
                    work.append(group.create_task(mover))
                try:
                    await self.torment(rng, until_s)
                    await asyncio.sleep(max(0.0, until_s - time.monotonic()))
                finally:
                    self.ended = True
                # Now everything has to come to its end.
                _, hanging = await asyncio.wait(work, timeout=SOON_S)
                for task in hanging:
                    self.trouble.append(f"did not come to its end: {task.get_coro()!r}")
                    task.cancel()
            await self.read_all()

    async def read_all(self) -> None:
        """What each server has at the end, those that are lost apart."""
        calls: list[asyncio.Future[None]] = []
        for subject in self.subjects:
            calls.append(self.make(self.client, "final", subject, ("read",)))
            if subject.kind != "register":
                calls.append(asyncio.ensure_future(self.take_final(subject)))
        if calls:
            _, hanging = await asyncio.wait(calls, timeout=SOON_S)
            for late in hanging:
                self.trouble.append("a read at the end hangs")
                late.cancel()

    async def take_final(self, subject: Subject) -> None:
        with contextlib.suppress(migrate.ServerLost, migrate.ServerNotFound):
            taken, _, _ = await subject.ref.taken()
            subject.final = taken


async def arm(client: Any, node: str, text: str) -> None:
    """Set the fail points of a node."""
    where = await client._node_named(node)
    await client._asks.ask(where, "failpoints", text, timeout_s=10.0)


def ended_or_stopped(node: NodeProcess) -> str:
    """Whether a process has ended or sleeps; "" if neither."""
    if not node.alive:
        return "ended"
    try:
        status = psutil.Process(node.pid).status()
    except psutil.NoSuchProcess:
        return "ended"
    if status == psutil.STATUS_ZOMBIE:
        return "ended"
    return "stopped" if status == psutil.STATUS_STOPPED else ""


async def came_to(holds: Callable[[], object], bound_s: float) -> bool:
    """Wait until something holds, for a while; whether it came to."""
    until = time.monotonic() + bound_s
    while not holds():
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.005)
    return True


def options_of(plan: Plan) -> migrate.NodeOptions:
    """Of every node and client: waits that are over soon."""
    return migrate.NodeOptions(
        call_timeout_s=60.0,
        repeat_first_s=0.2,
        repeat_max_s=1.0,
        ack_idle_s=0.1,
        move_step_timeout_s=1.0,
        lease_s=plan.lease_s,
        same_host=plan.same_host,
    )


async def recorded(plan: Plan) -> Report:
    """Carry out a run and judge it."""
    begun = time.monotonic()
    names = [f"n{n}" for n in range(plan.nodes)]
    env = {"LIVEMIGRATE_FAILPOINTS": ""} if plan.points else {}
    async with migrate.LocalCluster(names, options=options_of(plan), env=env) as cluster:
        run = Run(plan, cluster)
        await run.go()
    took_s = time.monotonic() - begun
    begun = time.process_time()
    violations, bad = judge(run)
    return Report(plan, run.counts, violations, took_s, time.process_time() - begun, bad)


def carry_out(job: tuple[int, float]) -> tuple[int, str, dict[str, int], list[str], str, float]:
    """Carry out one run of a campaign, in a process of its own.

    Args:
        job: The seed, and the seconds for which faults go on.

    Returns:
        The seed, the run's line, its counts and violations, the history if there are any, and
        how many seconds it took.
    """
    seed, seconds = job
    logging.disable(logging.ERROR)  # Nodes die on purpose here.
    begun = time.monotonic()
    plan = Plan.draw(seed, seconds=seconds)

    async def bounded() -> Report:
        async with asyncio.timeout(RUN_S_MAX):
            return await recorded(plan)

    try:
        report = asyncio.run(bounded())
    except Exception as error:
        what = f"the run ended in {error!r}"
        text = f"{plan}\n{''.join(traceback.format_exception(error))}"
        return seed, f"seed {seed}: {what}", {}, [what], text, time.monotonic() - begun
    history = "\n".join(report.history()) if report.violations else ""
    took_s = time.monotonic() - begun
    return seed, report.line(), dict(report.counts), report.violations, history, took_s


# ---------------------------------------------------------------------- judgement


def judge(run: Run) -> tuple[list[str], list[Subject]]:
    """What of a run contradicts the promises, and the servers it is about."""
    violations = list(run.trouble)
    bad = []
    for subject in run.subjects:
        found = list(wrong_with(subject, 0 if run.plan.standbys else run.counts["kills"]))
        if found:
            bad.append(subject)
            violations += [f"{subject.kind} {subject.ref._server_id}: {text}" for text in found]
        run.counts["servers lost"] += bool(subject.lost_ns)
        for made in subject.made:
            run.counts["operations"] += 1
            if made.end is End.UNKNOWN:
                run.counts["unknown"] += 1
            elif made.end is End.NOT_DONE:
                run.counts["not done"] += 1
            if made.error is not None:
                run.counts[f"error: {type(made.error).__name__}"] += 1
    return violations, bad


def wrong_with(subject: Subject, kills: int) -> Iterator[str]:
    """What contradicts the promises in the history of one server."""
    try:
        verdict = check(KINDS[subject.kind][1], [made.effect() for made in subject.made])
    except Undecided as error:
        yield f"not decided whether it is linearizable: {error}"
    else:
        if not verdict:
            yield f"not linearizable: {verdict.story}"
    if subject.final is not None:
        yield from account([made.operation() for made in subject.made], subject.final)
    yield from epochs(subject)
    if subject.lost_ns and not kills:
        yield "lost, and no process was killed (or it had standbys)"
    for made in subject.made:
        yield from wrong_end(made, subject)


def wrong_end(made: Made, subject: Subject) -> Iterator[str]:
    """What is wrong with how one call ended."""
    what = made.operation()
    if made.end is None:
        yield f"never ended: {what}"
        return
    error = made.error
    if error is not None and not isinstance(error, migrate.MigrateError):
        yield f"ended in {error!r}: {what}"
    if subject.lost_ns and made.end is End.RETURNED and made.begun_ns > subject.lost_ns:
        yield f"answered after it was lost: {what}"
    gone = subject.lost_ns or (made.relay is not None and made.relay.lost_ns)
    if error is not None and not gone and not made.hurried:
        yield f"failed without a reason: {what}: {error!r}"
    if (made.ended_ns - made.begun_ns) / 1e9 > SOON_S:
        yield f"took {(made.ended_ns - made.begun_ns) / 1e9:.1f} s: {what}"


def epochs(subject: Subject) -> Iterator[str]:
    """Whether two nodes answered for one epoch, or an epoch came after a later one."""
    answered = [made for made in subject.made if made.origin[1]]
    nodes: dict[int, str] = {}
    for made in answered:
        node, epoch = made.origin
        if nodes.setdefault(epoch, node) != node:
            yield f"{node} and {nodes[epoch]} answered at epoch {epoch}: {made.operation()}"
    ended = deque(sorted(answered, key=lambda made: made.ended_ns))
    highest = 0
    for made in sorted(answered, key=lambda made: made.begun_ns):
        while ended and ended[0].ended_ns < made.begun_ns:
            highest = max(highest, ended.popleft().origin[1])
        if made.origin[1] < highest:
            yield f"answered at epoch {made.origin[1]} after {highest}: {made.operation()}"
