"""What goes wrong, and when: drawn per seed, so that some schedules have few kinds, some all.

Source: swarm testing, Groce et al., ISSTA 2012: a random subset of the features per run finds
more than all of them always, since features hide each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, NoReturn

from migrate.core.actions import Point

if TYPE_CHECKING:
    from tests.sim.host import SimNode
    from tests.sim.world import World

KINDS = (
    "reorder",
    "duplicate",
    "loss",
    "spike",
    "break",
    "partition",
    "one way",
    "crash",
    "crash at point",
    "crash in step",
    "pause",
    "pause at point",
    "slow node",
    "directory slow",
    "directory away",
    "directory answer lost",
    "encode fails",
    "decode fails",
    "class refused",
    "cancel",
    "deadlines",
    "short expiry",
    "small window",
    "small mailbox",
    "few records",
    "skew",
    "stop",
)


@dataclass
class Plan:
    """Sizes and faults of one schedule. Probabilities are per message or per step."""

    nodes: int = 3
    clients: int = 2
    servers: int = 8
    requests: int = 300
    moves: int = 40
    busy_us: int = 1_500_000
    kinds: dict[str, None] = field(default_factory=dict)
    delay_low_us: int = 50
    delay_high_us: int = 1_500
    reorder: bool = False
    duplicate: float = 0.0
    loss: float = 0.0
    spike: float = 0.0
    spike_us: int = 60_000
    death_seen_us: int = 30_000
    directory_slow_us: int = 150_000
    directory_answer_lost: float = 0.0
    encode_fails: float = 0.0
    decode_fails: float = 0.0
    class_refused: float = 0.0
    cancel: float = 0.0
    deadlines: float = 0.0
    skew_us: int = 0
    window: int = 256
    mailbox: int = 256
    records_max: int = 100_000
    session_expiry_ms: int = 300_000
    async_share: float = 0.4
    relay_share: float = 0.25
    reentrant_share: float = 0.2
    timer_share: float = 0.3
    crashes_max: int = 0
    gap_us: int = 60_000  # mean time between two faults that have a time

    @classmethod
    def draw(cls, rng: Random) -> Plan:
        """The plan of one seed."""
        share = rng.choice((0.0, 0.1, 0.3, 0.6, 0.9))
        kinds = {kind: None for kind in KINDS if rng.random() < share}
        plan = cls(
            nodes=rng.choice((3, 3, 4, 5)),
            clients=rng.choice((1, 2, 3)),
            servers=rng.randint(5, 20),
            requests=rng.randint(200, 420),
            moves=rng.randint(15, 60),
            busy_us=rng.choice((600_000, 1_200_000, 2_500_000)),
            kinds=kinds,
            reorder="reorder" in kinds,
            delay_high_us=rng.choice((300, 1_500, 8_000)),
            death_seen_us=rng.choice((1_000, 30_000, 200_000)),
            async_share=rng.choice((0.0, 0.3, 0.7)),
            relay_share=rng.choice((0.0, 0.2, 0.4)),
            gap_us=rng.choice((20_000, 60_000, 150_000)),
        )
        on = kinds.__contains__
        if on("duplicate"):
            plan.duplicate = rng.choice((0.01, 0.05, 0.2))
        if on("loss"):
            plan.loss = rng.choice((0.005, 0.03, 0.1))
        if on("spike"):
            plan.spike = rng.choice((0.01, 0.05))
            plan.spike_us = rng.choice((10_000, 60_000, 400_000))
        if on("directory slow"):
            plan.directory_slow_us = rng.choice((30_000, 150_000, 500_000))
        if on("directory answer lost"):
            plan.directory_answer_lost = rng.choice((0.05, 0.3))
        if on("encode fails"):
            plan.encode_fails = 0.2
        if on("decode fails"):
            plan.decode_fails = 0.2
        if on("class refused"):
            plan.class_refused = 0.2
        if on("cancel"):
            plan.cancel = 0.1
        if on("deadlines"):
            plan.deadlines = rng.choice((0.2, 0.6))
        if on("short expiry"):
            plan.session_expiry_ms = rng.choice((1_500, 4_000))
        if on("small window"):
            plan.window = rng.choice((1, 2, 8))
        if on("small mailbox"):
            plan.mailbox = rng.choice((1, 3, 10))
        if on("few records"):
            plan.records_max = rng.choice((2, 6, 20))
        if on("skew"):
            plan.skew_us = rng.choice((2_000, 30_000))
        if on("crash") or on("crash at point") or on("crash in step"):
            plan.crashes_max = rng.randint(1, 4)
        return plan


class Crashed(BaseException):
    """The node process ends in the middle of a step; nothing of the step after it happens."""


class Faults:
    """Injects what the plan says until `stop`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.on = True
        self.crashes = 0

    def start(self) -> None:
        """Begin; each fault that has a time of its own draws the next one."""
        for kind in ("break", "partition", "one way", "crash", "crash in step", "pause"):
            self._again(kind)
        for kind in ("slow node", "directory slow", "directory away"):
            self._again(kind)

    def stop(self) -> None:
        """No more faults: links heal, nodes wake, the directory answers."""
        world = self.world
        self.on = False
        world.directory.away = False
        world.directory.slow = False
        world.network.slow.clear()
        for source, target in list(world.network.blocked):
            world.network.unblock(source, target)
        for node in list(world.by_id.values()):
            node.steps_left = -1
            node.wake()

    def _again(self, kind: str) -> None:
        if kind in self.world.plan.kinds:
            mean = self.world.plan.gap_us * (4 if kind.startswith("crash") else 1)
            self.world.at(int(self.world.rng.expovariate(1 / mean)), self._inject, kind)

    def _inject(self, kind: str) -> None:
        world = self.world
        if not self.on:
            return
        self._again(kind)
        nodes = list(world.by_id.values())
        node = nodes[world.between(0, len(nodes) - 1)]
        other = nodes[world.between(0, len(nodes) - 1)]
        hosting = [n for n in nodes if n.hosts]
        world.counts[kind] += 1
        match kind:
            case "break" if node is not other:
                world.network.break_link(node.id, other.id)
            case "partition" if node is not other:
                lasts = world.between(1_000, 200_000)
                for a, b in ((node.name, other.name), (other.name, node.name)):
                    world.network.block(a, b)
                    world.at(lasts, world.network.unblock, a, b)
            case "one way" if node is not other:
                world.network.block(node.name, other.name)
                lasts = world.between(1_000, 200_000)
                world.at(lasts, world.network.unblock, node.name, other.name)
            case "crash" if len(hosting) > 1:
                self.crash(hosting[world.between(0, len(hosting) - 1)])
            case "crash in step" if len(hosting) > 1:
                # Somewhere in the middle of one of its next steps, between two actions.
                hosting[world.between(0, len(hosting) - 1)].steps_left = world.between(0, 30)
            case "pause":
                node.pause()
                world.at(world.between(1_000, 300_000), node.wake)
            case "slow node":
                world.network.slow[node.name] = world.between(2, 20)
                world.at(world.between(10_000, 200_000), self._fast, node.name)
            case "directory slow":
                world.directory.slow = True
                world.at(world.between(10_000, 300_000), self._directory_fast)
            case "directory away":
                world.directory.away = True
                world.at(world.between(1_000, 150_000), self._directory_back)
            case _:
                world.counts[kind] -= 1

    def _fast(self, name: str) -> None:
        self.world.network.slow.pop(name, None)

    def _directory_fast(self) -> None:
        self.world.directory.slow = False

    def _directory_back(self) -> None:
        self.world.directory.away = False

    def may_crash(self) -> bool:
        """Whether the plan has a crash left, and somebody would survive it."""
        return (
            self.on
            and self.crashes < self.world.plan.crashes_max
            and len(self.world.alive_nodes()) > 1
        )

    def crash(self, node: SimNode) -> None:
        """End a node process now, and start a new one in its place after a while."""
        if node.alive and self.may_crash():
            self.crashes += 1
            node.die()
            restart = self.world.between(1_000, 150_000)
            self.world.at(restart, self._restart, node.name, node.incarnation + 1)

    def _restart(self, name: str, incarnation: int) -> None:
        self.world.start_node(name, incarnation)

    def crash_inside(self, node: SimNode) -> NoReturn:
        """The same from within one of the node's own steps.

        Raises:
            Crashed: Always; the node's input ends there.
        """
        self.crash(node)
        raise Crashed

    def reached(self, node: SimNode, point: Point) -> None:
        """A move reached a step: the node may die or stop right there."""
        world = self.world
        phase = f"at {point.value}"
        if not self.on:
            return
        kinds = world.plan.kinds
        if "crash at point" in kinds and world.chance(0.03) and self.may_crash():
            world.counts["crash at point"] += 1
            world.counts[f"crash {phase}"] += 1
            self.crash_inside(node)
        if "pause at point" in kinds and world.chance(0.05):
            world.counts["pause at point"] += 1
            world.counts[f"pause {phase}"] += 1
            node.pause()
            world.at(world.between(1_000, 400_000), node.wake)
