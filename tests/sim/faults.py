"""What goes wrong, and when: drawn per seed, so that some schedules have few kinds, some all.

Faults come at times of their own, at the named steps of a move, between any two effects of one
step of a node, and aimed: when a move enters a phase, at one of its two nodes, the link between
them, or somebody who has no part in it. What struck which move in which phase is counted
(`tests/sim/phases.py`). No state of this release lies on a disk of ours, so no disk fails here:
the only file is the SQLite directory's, see `tests/sim/directory.py`.

Source: swarm testing, Groce et al., ISSTA 2012: a random subset of the features per run finds
more than all of them always, since features hide each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, NoReturn

from migrate.core.actions import Point
from migrate.core.ids import node_name
from tests.sim.phases import AIM, PHASES, Move, phase_of

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
    "split",
    "crash",
    "crash at point",
    "crash in step",
    "client crash",
    "pause",
    "pause at point",
    "slow node",
    "directory slow",
    "directory away",
    "directory cut",
    "directory answer lost",
    "encode fails",
    "decode fails",
    "class refused",
    "copy fails",
    "take fails",
    "withdraw",
    "cancel",
    "deadlines",
    "short expiry",
    "small window",
    "small mailbox",
    "few records",
    "few late",
    "skew",
    "stop",
    "few bytes",
)

AIMED = {
    "loss": 1,
    "duplicate": 1,
    "spike": 1,
    "break": 3,
    "partition": 3,
    "one way": 3,
    "split": 1,
    "crash": 8,
    "pause": 2,
    "slow node": 2,
    "directory slow": 1,
    "directory away": 1,
    "directory cut": 2,
    "directory answer lost": 2,
    "withdraw": 10,
}
"""Kinds that can be aimed at a move in a certain phase; how often, compared with each other."""

RAREST = "source RECLAIMING"
SELDOM = (
    *[RAREST] * 8,
    *["source RELEASING"] * 2,
    *["target DECODING"] * 2,
    "target CHECKING",
)
"""Phases that are aimed at more often than others, because they are rare or short."""

FOCUS = 0.6
"""Share of the times a phase is entered at which a fault is aimed at it, if it is `Plan.focus`."""

SETTINGS = (
    *("short expiry", "small window", "small mailbox", "few bytes", "few records", "few late"),
    "skew",
)
"""Kinds that hold for all of a schedule; there is nothing to count but the seeds."""


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
    copy_fails: float = 0.0
    take_fails: float = 0.0
    cancel: float = 0.0
    deadlines: float = 0.0
    withdraw: float = 0.0
    aim: float = 0.0
    focus: str = ""  # a phase of moves that most aimed faults go to
    skew_us: int = 0
    window: int = 256
    mailbox: int = 256
    mailbox_bytes_max: int = 64 << 20
    records_max: int = 100_000
    late_max: int = 100_000
    session_expiry_ms: int = 300_000
    watch_ms: int = 5
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
        kinds = {kind: None for kind in KINDS[:-1] if rng.random() < share}
        plan = cls(
            nodes=rng.choice((3, 3, 4, 5, 6, 7)),
            clients=rng.choice((2, 2, 3, 4)),
            servers=rng.randint(24, 60) if rng.random() < 0.2 else rng.randint(5, 20),
            requests=rng.randint(200, 420),
            moves=rng.randint(20, 80),
            busy_us=rng.choice((600_000, 1_200_000, 2_500_000)),
            kinds=kinds,
            reorder="reorder" in kinds,
            delay_high_us=rng.choice((300, 1_500, 8_000)),
            death_seen_us=rng.choice((1_000, 30_000, 200_000)),
            async_share=rng.choice((0.0, 0.3, 0.7)),
            relay_share=rng.choice((0.0, 0.2, 0.4)),
            gap_us=rng.choice((20_000, 60_000, 150_000)),
            aim=rng.choice((0.0, 0.2, 1.0)),
            focus=rng.choice((*PHASES, *SELDOM)) if rng.random() < 0.75 else "",
            watch_ms=rng.choice((0, 1, 5)),
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
        if on("copy fails"):
            plan.copy_fails = 0.1
        if on("take fails"):
            plan.take_fails = 0.1
        if on("withdraw"):
            plan.withdraw = 0.03
        if on("cancel"):
            plan.cancel = 0.1
        if on("deadlines"):
            plan.deadlines = rng.choice((0.2, 0.6))
        if on("client crash"):
            kinds["short expiry"] = None  # what a dead client leaves behind ends in time
        if on("short expiry"):
            plan.session_expiry_ms = rng.choice((1_500, 4_000))
        if on("small window"):
            plan.window = rng.choice((1, 2, 8))
        if on("small mailbox"):
            plan.mailbox = rng.choice((1, 3, 10))
        if on("few records"):
            plan.records_max = rng.choice((2, 6, 20))
        if on("few late"):
            plan.late_max = rng.choice((0, 1, 5))
        if on("skew"):
            plan.skew_us = rng.choice((2_000, 30_000))
        if on("crash") or on("crash at point") or on("crash in step"):
            plan.crashes_max = rng.randint(1, 8)
        if plan.focus == RAREST:
            # The pairs that are hardest to come by: all crashes are kept for them.
            kinds["crash"] = None
            plan.nodes = max(plan.nodes, 5)
            plan.moves, plan.crashes_max = 90, 12
        # By a generator of its own, so that the other seeds' schedules are what they were.
        own = Random(f"few bytes {plan.requests}")
        if own.random() < share / 2:
            kinds["few bytes"] = None
            plan.mailbox_bytes_max = own.choice((1, 60, 200))
        return plan


class Crashed(BaseException):
    """The node process ends in the middle of a step; nothing of the step after it happens."""


class Faults:
    """Injects what the plan says until `stop`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.on = True
        self.crashes = 0
        self._aimed = [
            kind for kind, n in AIMED.items() if kind in world.plan.kinds for _ in range(n)
        ]

    def start(self) -> None:
        """Begin; each fault that has a time of its own draws the next one."""
        for kind in ("break", "partition", "one way", "split", "crash", "crash in step"):
            self._again(kind)
        for kind in ("client crash", "pause", "slow node"):
            self._again(kind)
        for kind in ("directory slow", "directory away", "directory cut"):
            self._again(kind)

    def stop(self) -> None:
        """No more faults: links heal, nodes wake, the directory answers."""
        world = self.world
        self.on = False
        world.directory.away = False
        world.directory.slow = False
        world.directory.cut.clear()
        world.network.slow.clear()
        for source, target in list(world.network.blocked):
            world.network.unblock(source, target)
        for node in list(world.by_id.values()):
            node.steps_left = -1
            node.wake()

    # -- what is counted

    def hit(self, kind: str, move: Move) -> None:
        """Count that `kind` struck a move in the phase it is in."""
        self.world.hits[phase_of(move), kind] += 1

    def hit_move(self, kind: str, move: Move | None) -> None:
        """Count a fault in the directory's service: of the question, and of the move that asked."""
        self.world.counts[kind] += 1
        if move is not None:
            self.hit(kind, move)

    def hit_message(self, kind: str, source: str, target: str) -> None:
        """Count what happened to a message: for the moves of the nodes at either end."""
        self.world.counts[kind] += 1
        for id in (source, target):
            node = self.world.by_id.get(id)
            if node is not None:
                for move in node.moves():
                    self.hit(kind, move)

    def hit_link(self, kind: str, *nodes: str) -> None:
        """Count a broken or blocked link, by name of the nodes: for the moves that go over it."""
        for node in self.world.alive_nodes():
            if node.name in nodes:
                for move in node.moves():
                    if node_name(node.peer_of(move)) in nodes:
                        self.hit(kind, move)

    def hit_node(self, kind: str, struck: SimNode) -> None:
        """Count what struck a node: for its moves, their other ends, and those not concerned."""
        for node in self.world.alive_nodes():
            for move in node.moves():
                if node is struck:
                    self.hit(kind, move)
                elif node.peer_of(move) == struck.id:
                    self.hit(f"{kind} of the other", move)
                else:
                    self.hit(f"{kind} of a third", move)

    # -- faults that have a time of their own

    def _again(self, kind: str) -> None:
        plan = self.world.plan
        if kind in plan.kinds and not (plan.focus == RAREST and kind.startswith("crash")):
            mean = plan.gap_us * (4 if "crash" in kind else 1)
            self.world.at(int(self.world.rng.expovariate(1 / mean)), self._inject, kind)

    def _inject(self, kind: str) -> None:
        world = self.world
        if not self.on:
            return
        self._again(kind)
        nodes = list(world.by_id.values())
        if not nodes:
            return  # all are down at once
        node = nodes[world.between(0, len(nodes) - 1)]
        other = nodes[world.between(0, len(nodes) - 1)]
        self.strike(kind, node, other)

    def strike(self, kind: str, node: SimNode, other: SimNode) -> None:
        """Let a fault happen now to a node, or to the link between two."""
        world = self.world
        network = world.network
        lasts = world.between(1_000, 200_000)
        match kind:
            case "loss" | "duplicate" | "spike":
                network.doomed[node.id] = kind
            case "break" if node is not other:
                world.counts[kind] += 1
                self.hit_link(kind, node.name, other.name)
                network.break_link(node.id, other.id)
            case "partition" if node is not other:
                world.counts[kind] += 1
                self.hit_link(kind, node.name, other.name)
                self._block(((node.name, other.name), (other.name, node.name)), lasts)
            case "one way" if node is not other:
                world.counts[kind] += 1
                self.hit_link(kind, node.name, other.name)
                self._block(((node.name, other.name),), lasts)
            case "split" if node is not other:
                self._split(node, other, lasts)
            case "crash" if node.hosts:
                self.crash(node)
            case "client crash" if not node.hosts:
                self._crash_client(node)
            case "crash in step" if node.hosts:
                # Somewhere in the middle of one of its next steps, between two actions.
                node.steps_left = world.between(0, 30)
            case "pause":
                self.pause(node, 300_000)
            case "slow node":
                world.counts[kind] += 1
                self.hit_node(kind, node)
                network.slow[node.name] = world.between(2, 20)
                world.at(lasts, network.slow.pop, node.name, None)
            case "directory slow":
                world.directory.slow = True
                world.at(lasts, self._directory_fast)
            case "directory away":
                world.directory.away = True
                world.at(world.between(1_000, 150_000), self._directory_back)
            case "directory cut":
                world.directory.cut[node.name] = None
                world.at(lasts, world.directory.cut.pop, node.name, None)
            case "directory answer lost":
                world.directory.lose_answers[node.name] = None
            case "withdraw" if node.hosts:
                node.input(node.withdraw)

    def _block(self, pairs: tuple[tuple[str, str], ...], lasts_us: int) -> None:
        network = self.world.network
        for source, target in pairs:
            network.block(source, target)
            self.world.at(lasts_us, network.unblock, source, target)

    def _split(self, node: SimNode, other: SimNode, lasts_us: int) -> None:
        """Cut the cluster in two, with the two nodes on different sides."""
        world = self.world
        here, there = [node.name], [other.name]
        for name in dict.fromkeys(n.name for n in world.by_id.values()):
            if name not in (node.name, other.name):
                (here if world.chance(0.5) else there).append(name)
        world.counts["split"] += 1
        for a in here:
            for b in there:
                self.hit_link("split", a, b)
                self._block(((a, b), (b, a)), lasts_us)

    def _directory_fast(self) -> None:
        self.world.directory.slow = False

    def _directory_back(self) -> None:
        self.world.directory.away = False

    # -- crashes and pauses

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
            self.world.counts["crash"] += 1
            self.hit_node("crash", node)
            node.die()
            restart = self.world.between(1_000, 150_000)
            self.world.at(restart, self.world.start_node, node.name, node.incarnation + 1)

    def _crash_client(self, node: SimNode) -> None:
        """End a client with all it waits for; a new one goes on under the same address."""
        for client in self.world.clients:
            if client.node is node:
                self.world.counts["client crash"] += 1
                client.die()
                self.world.at(self.world.between(1_000, 150_000), client.revive)

    def pause(self, node: SimNode, most_us: int) -> None:
        """Stop a node as by SIGSTOP; it wakes after a while, at most `most_us`."""
        if node.alive and not node.paused:
            self.world.counts["pause"] += 1
            self.hit_node("pause", node)
            node.pause()
        self.world.at(self.world.between(1_000, most_us), node.wake)

    def crash_inside(self, node: SimNode) -> NoReturn:
        """As `crash`, from within one of the node's own steps.

        Raises:
            Crashed: Always; the node's input ends there.
        """
        self.crash(node)
        raise Crashed

    # -- faults at steps and phases of a move

    def reached(self, node: SimNode, point: Point) -> None:
        """A move reached a step: the node may die or stop right there."""
        world = self.world
        if not self.on:
            return
        kinds = world.plan.kinds
        if "crash at point" in kinds and world.chance(0.03) and self.may_crash():
            world.counts["crash at point"] += 1
            world.counts[f"crash at {point.value}"] += 1
            self.crash_inside(node)
        if "pause at point" in kinds and world.chance(0.05):
            world.counts["pause at point"] += 1
            world.counts[f"pause at {point.value}"] += 1
            self.pause(node, 400_000)

    def entered(self, node: SimNode, move: Move) -> None:
        """A move has entered a phase: perhaps a fault is aimed at it."""
        world = self.world
        plan = world.plan
        if not self._aimed or not self.on:
            return
        phase = phase_of(move)
        if phase == "source COMMITTED" and plan.focus == RAREST:
            self._make_reclaim(node, move)
        share = FOCUS if phase == plan.focus else plan.aim * AIM.get(phase, 0.0)
        if not world.chance(share):
            return
        kind = self._aimed[world.between(0, len(self._aimed) - 1)]
        if plan.focus == RAREST == phase and world.chance(0.6):
            kind = "crash"
        # Mostly at once: phases are short. Sometimes later, perhaps in the next one.
        delay = 0 if world.chance(0.7) else world.between(0, 2_000)
        world.at(delay, self._strike_move, kind, node, move)

    def _make_reclaim(self, node: SimNode, move: Move) -> None:
        """The rarest phase comes about when the target is silent for long after the commit."""
        world = self.world
        other = world.by_id.get(node.peer_of(move))
        if other is not None and world.chance(0.5):
            # Long enough to be taken for silent, and woken while the source is at it.
            other.pause()
            world.counts["pause"] += 1
            self.hit_node("pause", other)
            world.at(world.between(150_000, 260_000), other.wake)
            if "directory answer lost" in world.plan.kinds and world.chance(0.5):
                world.directory.lose_answers[node.name] = None

    def _strike_move(self, kind: str, node: SimNode, move: Move) -> None:
        world = self.world
        if not self.on or not node.alive:
            return
        nodes = [n for n in world.alive_nodes() if n is not node]
        if not nodes:
            return
        other = world.by_id.get(node.peer_of(move)) or nodes[world.between(0, len(nodes) - 1)]
        chance = world.between(0, 9)
        if chance < 3 and kind in ("crash", "pause", "slow node"):
            thirds = [n for n in world.alive_nodes() if n is not node and n is not other]
            if thirds:
                node = thirds[world.between(0, len(thirds) - 1)]
        elif chance < 6:
            node, other = other, node
        self.strike(kind, node, other)
