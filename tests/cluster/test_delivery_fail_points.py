"""Any process dies, or sleeps, at every step of delivery: requests run once and in order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest

import migrate
from migrate.cluster import NodeProcess
from migrate.core.actions import Point
from migrate.ref import RefObject
from tests.cluster.histories import (
    Plan,
    Run,
    Subject,
    arm,
    came_to,
    ended_or_stopped,
    options_of,
    wrong_with,
)
from tests.cluster.linearizable import End
from tests.migrate.clusters import eventually, run

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster_secret")]

ROLES = ("by", "sender", "source", "target")

# Who comes to each point, and what has to happen for that.
CALLS, SLOW, MOVE, WRONG_PLACE, KNOCK = "calls", "slow", "move", "wrong place", "knock"
POINTS = {
    Point.REQUEST_SENT: ("sender", CALLS),
    Point.REPEAT_DUE: ("sender", SLOW),
    Point.ROW_LOOKED_UP: ("sender", WRONG_PLACE),
    Point.MOVED_RECEIVED: ("sender", MOVE),
    Point.NOT_HERE_RECEIVED: ("sender", WRONG_PLACE),
    Point.REPLY_RECEIVED: ("sender", CALLS),
    Point.REPLY_TAKEN: ("sender", CALLS),
    Point.RECEIPT_RECEIVED: ("sender", CALLS),
    Point.ACKED_SENT: ("sender", CALLS),
    Point.REQUEST_RECEIVED: ("source", CALLS),
    Point.REQUEST_ADMITTED: ("source", CALLS),
    Point.HANDLER_BEGUN: ("source", CALLS),
    Point.HANDLER_DONE: ("source", CALLS),
    Point.REPLY_READY: ("source", CALLS),
    Point.REPLY_SENT: ("source", CALLS),
    Point.RECEIPT_READY: ("source", CALLS),
    Point.RECEIPT_SENT: ("source", CALLS),
    Point.REPEAT_RECEIVED: ("source", SLOW),
    Point.ACKED_RECEIVED: ("source", CALLS),
    Point.RECORDS_FREED: ("source", CALLS),
    Point.REQUEST_HELD: ("source", MOVE),
    Point.REQUEST_FORWARDED: ("source", MOVE),
    Point.MOVED_SENT: ("source", MOVE),
    Point.REQUEST_KNOCKED: ("target", KNOCK),
    Point.NOT_HERE_SENT: ("target", WRONG_PLACE),
}
REACHED_S = 120.0
"""How long a step is waited for that takes milliseconds: a machine may stand still for a while."""


class Stage:
    """Four processes with a role each: where a relay is, where its server is and may go to."""

    def __init__(self, cluster: migrate.LocalCluster, plan: Plan) -> None:
        self.run = Run(plan, cluster)
        self.cluster = cluster
        self.client: Any = cluster.client
        self.nodes: dict[str, NodeProcess] = dict(zip(ROLES, cluster.nodes, strict=True))
        self.relay: Subject | None = None
        self.calls = 0
        self.spares: set[asyncio.Task[NodeProcess]] = set()
        self.arming: list[asyncio.Task[None]] = []

    async def spawn(self, cls: str, role: str, large: bool = False) -> Subject:
        from tests.cluster import workloads

        args = (4_000_000,) if large else ()
        on = migrate.SpawnOptions(on=self.nodes[role].name)
        ref = await self.client.spawn(getattr(workloads, cls), *args, options=on)
        return Subject("counter" if cls == "Counter" else "relay", ref, large)

    async def call(self, subject: Subject, ended: asyncio.Event) -> None:
        """Calls and casts without end, by the client itself."""
        while not ended.is_set():
            await self.batch(subject, None)

    async def relay_calls(
        self, subject: Subject, begin: asyncio.Event, ended: asyncio.Event
    ) -> None:
        """The same through the relay, once that may begin."""
        await begin.wait()
        while not ended.is_set():
            await self.batch(subject, self.relay)

    async def batch(self, subject: Subject, relay: Subject | None) -> None:
        begun = []
        for n in range(3):
            self.calls += 1
            call = ("increment", f"c#{self.calls}")
            made = self.run.make(self.client, "c", subject, call, relay=relay, cast=n == 1)
            begun.append(made)
        await asyncio.wait(begun)
        # Long enough for the acknowledgement of an idle sender, now and then.
        await asyncio.sleep(0.12 if self.calls % 4 == 0 else 0.002)

    def waiting(self, subject: Subject) -> str:
        """What has no answer yet, and what the client believes of where its server is."""
        open_ = [made for made in subject.made if made.end is None]
        route = self.client._driver.core.routes.get(subject.ref._server_id)
        believed = {name: getattr(route, name, None) for name in getattr(route, "__slots__", ())}
        alive = {role: (node.name, node.alive) for role, node in self.nodes.items()}
        return f"no answer to {open_}; {believed}; {alive}"

    async def move_about(self, subject: Subject, ended: asyncio.Event) -> None:
        """Moves without end, to the target and back to the source."""
        for role in itertools.cycle(("target", "source")):
            if ended.is_set():
                return
            try:
                await self.client.migrate(subject.ref, to=self.nodes[role].name)
            except migrate.MigrateError:
                await asyncio.sleep(0.01)  # It is there already, or cannot go there any more.


@contextlib.asynccontextmanager
async def stage(*, same_host: bool) -> AsyncIterator[Stage]:
    plan = Plan(0, same_host=same_host)
    async with migrate.LocalCluster(
        [f"{role}0" for role in ROLES],
        options=options_of(plan),
        env={"LIVEMIGRATE_FAILPOINTS": ""},
    ) as cluster:
        s = Stage(cluster, plan)
        try:
            yield s
        finally:
            for spare in s.spares:
                spare.cancel()
            await asyncio.gather(*s.spares, return_exceptions=True)


async def at(s: Stage, point: Point, action: str, victim: str) -> None:
    """Kill or stop a process when another one, or itself, comes to a step; judge what was seen."""
    role, how = POINTS[point]
    spare: asyncio.Task[NodeProcess] | None = None
    if action == "kill":
        # Its place is taken at once, while the rest of the case goes on.
        s.calls += 1
        spare = asyncio.create_task(s.cluster.add_node(f"{victim}{s.calls}"))
        s.spares.add(spare)
        spare.add_done_callback(s.spares.discard)
    if s.relay is None or s.relay.lost_ns:
        s.relay = await s.spawn("Relay", "sender")
    subject = await s.spawn("Counter", "source", large=how in (MOVE, KNOCK))
    ended, relayed = asyncio.Event(), asyncio.Event()
    callers = [
        asyncio.create_task(s.call(subject, ended)),
        asyncio.create_task(s.relay_calls(subject, relayed, ended)),
    ]
    moving: asyncio.Task[Any] | None = None
    try:
        if how in (WRONG_PLACE, KNOCK):
            wrong = await s.client._node_named(s.nodes["target"].name)
            direct = subject.ref
            subject.ref = RefObject(direct._server_id, direct._info, None, wrong, 1)
        else:
            relayed.set()
        assert await came_to(lambda: len(subject.made) > 12, REACHED_S), s.waiting(subject)
        if how == KNOCK:
            # The source sleeps when its server is ready at the target; whoever asks there knocks.
            await arm(s.client, s.nodes["source"].name, f"{Point.READY_RECEIVED.value}=stop")
            moving = asyncio.create_task(s.client.migrate(direct, to=s.nodes["target"].name))
            assert await came_to(lambda: ended_or_stopped(s.nodes["source"]), REACHED_S)
        text = f"{point.value}={action}:{s.nodes[victim].pid}"
        # Who comes to the point before it has answered does not answer.
        arming = asyncio.create_task(arm(s.client, s.nodes[role].name, text))
        s.arming.append(arming)
        await came_to(lambda: arming.done() or ended_or_stopped(s.nodes[victim]), REACHED_S)
        relayed.set()
        if how == MOVE:
            moving = asyncio.create_task(s.move_about(subject, ended))
        elif how == SLOW:
            call = ("increment", f"slow#{s.calls}")
            s.run.make(s.client, "slow", subject, call, relay=s.relay, method="increment_slowly")
        expected = "ended" if action == "kill" else "stopped"
        assert await came_to(lambda: ended_or_stopped(s.nodes[victim]) == expected, REACHED_S), (
            f"{point} was not reached at {role}"
        )
        if action == "stop":
            await asyncio.sleep(0.3)  # longer than the first wait before a repeat
            s.nodes[victim].wake()
        if how == KNOCK and not (action == "kill" and victim == "source"):
            s.nodes["source"].wake()
        before = len(subject.made)
        goes_on = await came_to(
            lambda: subject.lost_ns or len(subject.made) > before + 12, REACHED_S
        )
        assert goes_on, s.waiting(subject)
    finally:
        ended.set()
        relayed.set()
        for node in s.nodes.values():
            if node.alive:
                node.wake()
        await asyncio.wait([*callers, *s.arming])
        while s.arming:
            s.arming.pop().exception()  # It ended, however it did.
        if moving is not None:
            await asyncio.wait([moving])
            moving.exception()
    if not subject.lost_ns:
        await asyncio.wait([asyncio.ensure_future(s.run.take_final(subject))])
        assert subject.lost_ns or subject.final is not None
    if spare is not None:
        await s.nodes[victim].wait()
        s.nodes[victim] = await spare
        await eventually(lambda: knows(s.client, s.nodes[victim].name))
    await arm(s.client, s.nodes[role].name, "")
    where = f"{action} of {victim} at {point.value}"
    assert list(wrong_with(subject, kills=action == "kill")) == [], where
    check_loss(subject, action, victim, how, where)


async def knows(client: Any, name: str) -> bool:
    """Whether a client has heard of a node."""
    try:
        await client._node_named(name)
    except migrate.NodeNotFound:
        return False
    return True


def check_loss(subject: Subject, action: str, victim: str, how: str, where: str) -> None:
    """A server is lost with the process that has it alone, and with no other."""
    lost = bool(subject.lost_ns)
    if action == "stop" or victim in ("by", "sender"):
        assert not lost, where
    elif how not in (MOVE, KNOCK):
        assert lost == (victim == "source"), where
    if action == "stop":
        assert all(made.end is End.RETURNED for made in subject.made), where


def test_every_step_of_delivery_is_in_the_list():
    moves = list(Point)[: list(Point).index(Point.FORWARDING_EXPIRED) + 1]

    assert sorted(p.value for p in [*moves, *POINTS]) == sorted(p.value for p in Point)


def cases(campaign: bool) -> list[tuple[Point, str, str]]:
    """Every point with a kill of who comes to it, and a stop of somebody; in a campaign, all."""
    if campaign:
        return [(p, action, who) for p in POINTS for action in ("kill", "stop") for who in ROLES]
    kills = [(point, "kill", role) for point, (role, _) in POINTS.items()]
    stops = [(point, "stop", ROLES[n % len(ROLES)]) for n, point in enumerate(POINTS)]
    return kills + stops


@pytest.mark.parametrize("same_host", [True, False], ids=["unix", "grpc"])
@pytest.mark.parametrize("part", range(2))
def test_a_process_dies_or_sleeps_at_each_step_of_delivery(
    part: int, same_host: bool, campaign: bool
):
    """Kills over the same-host channel, pauses over gRPC; in a campaign, both over both."""
    kinds = ("kill", "stop") if campaign else ("kill",) if same_host else ("stop",)
    todo = [case for case in cases(campaign) if case[1] in kinds][part::2]

    async def body() -> None:
        async with stage(same_host=same_host) as s:
            for point, action, victim in todo:
                await at(s, point, action, victim)

    run(body(), bound_s=1800.0)
