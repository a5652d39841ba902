"""One simulated cluster: virtual time, one event queue, one source of chance.

Everything that happens is an entry of one heap, so a seed decides all of it. Time is counted
in whole microseconds and stands still while an event is handled. Nothing here iterates a set
or looks at the identity of an object; that is what makes a transcript repeat byte for byte.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import Any, NoReturn

from migrate.core.ids import NodeId
from tests.sim.clients import Client, Mover
from tests.sim.directory import Directory
from tests.sim.faults import Crashed, Faults, Plan
from tests.sim.host import SimNode
from tests.sim.invariants import Invariants
from tests.sim.network import Network
from tests.sim.phases import Hits

EPOCH_MS = 1_000_000_000
"""What the clock of every node shows at the start; sessions older than the cluster are refused."""

TAIL = 400
"""Lines of the transcript that are kept when nobody asked for all of it."""

LIVENESS_US = 700_000_000
"""Everything must have ended this long after the last fault: above every wait of the core, of
which the longest is the expiry of sessions whose sender has died, and the sweep after it."""

CALM_US = 10_000_000
"""What is still going on so long after the last fault is no storm any more."""

LOOK_US, LOOK_MAX_US = 50_000, 2_000_000
"""How often it is looked whether all has ended: less and less often."""

EVENTS_MAX = 400_000
"""No schedule needs nearly as many; one in which messages go round for ever does. Long after the
last fault it is no storm but something that waits, be it for the expiry of a dead sender."""


class Violation(AssertionError):
    """A guarantee is broken.

    Attributes:
        checker: Name of the checker that found it.
        seed: Seed of the schedule.
        tail: Last lines of the transcript.
    """

    def __init__(self, checker: str, text: str, seed: int, at_us: int, tail: list[str]) -> None:
        super().__init__(f"[{checker}] seed {seed} at {at_us} us: {text}")
        self.checker = checker
        self.seed = seed
        self.tail = tail


class World:
    """The cluster of one seed; `run` carries it to its end.

    Args:
        seed: Decides everything.
        keep: Whether all of the transcript is kept, not only its tail.
        plan: Overrides what the seed would draw.
        node_class: Class of the nodes; controls give one with a mechanism switched off.
        directory_class: Likewise.
    """

    invariants_class: type[Invariants] = Invariants

    def __init__(
        self,
        seed: int,
        *,
        keep: bool = False,
        plan: Plan | None = None,
        node_class: type[SimNode] = SimNode,
        directory_class: type[Directory] = Directory,
    ) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.now_us = 0
        self.events = 0
        self.digest = 0
        self.lines: deque[str] = deque(maxlen=None if keep else TAIL)
        self.counts: Counter[str] = Counter()
        self.hits: Hits = Counter()
        self.over = False
        self._heap: list[tuple[int, int, Callable[..., object], tuple[Any, ...]]] = []
        self._n = 0
        self.plan = plan if plan is not None else Plan.draw(self.rng)
        self.node_class = node_class
        self.network = Network(self)
        self.directory = directory_class(self)
        self.invariants = self.invariants_class(self)
        self.faults = Faults(self)
        self.by_id: dict[NodeId, SimNode] = {}
        self.dead: dict[NodeId, None] = {}
        self.places: list[str] = []
        self.clients: list[Client] = []
        self.servers: list[str] = []  # all there ever were
        self.targets: list[str] = []  # those that requests go to; without the lost ones
        self.mover = Mover(self)
        self.calm_us = -1  # when the faults stopped
        self._build()

    # -- time and chance

    def at(self, delay_us: int, what: Callable[..., object], *args: Any) -> None:
        """Let `what(*args)` happen in `delay_us` (0: next, after what is due already)."""
        self._n += 1
        heapq.heappush(self._heap, (self.now_us + delay_us, self._n, what, args))

    def chance(self, probability: float) -> bool:
        """Draw; False without using up chance where the probability is 0."""
        return probability > 0 and self.rng.random() < probability

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included; faster than `randint`."""
        return low + int(self.rng.random() * (high - low + 1))

    # -- what is written down

    def note(self, line: str) -> None:
        """Add a line to the transcript."""
        line = f"{self.now_us} {line}"
        self.digest = zlib.crc32(line.encode(), self.digest)
        self.lines.append(line)

    def fail(self, checker: str, text: str) -> NoReturn:
        """End the run: `checker` saw a guarantee broken.

        Raises:
            Violation: Always.
        """
        raise Violation(checker, text, self.seed, self.now_us, list(self.lines))

    # -- the run

    def _build(self) -> None:
        plan = self.plan
        for i in range(plan.nodes):
            self.places.append(f"n{i}")
            self.start_node(f"n{i}", 1)
        for i in range(plan.clients):
            node = self.start_node(f"c{i}", 1)
            self.clients.append(Client(self, node, i))
        for _ in range(plan.servers):
            self.targets.append(self._spawn())
        for client in self.clients:
            client.start()
        self.mover.start()
        self.faults.start()
        self.at(plan.busy_us, self._calm)

    def _spawn(self) -> str:
        nodes = self.alive_nodes()
        server = f"s{len(self.servers)}"
        self.servers.append(server)
        nodes[self.between(0, len(nodes) - 1)].spawn(server)
        return server

    def lost(self, server: str) -> None:
        """A server was marked lost: another one takes over its requests, up to a number."""
        if server in self.targets and len(self.servers) < 3 * self.plan.servers:
            self.targets[self.targets.index(server)] = self._spawn()

    def incarnation_of(self, name: str) -> int:
        """Which incarnation lives at an address; 0 if none does."""
        for node in self.by_id.values():
            if node.name == name:
                return node.incarnation
        return 0

    def start_node(self, name: str, incarnation: int) -> SimNode:
        """Start a node process; it is told of every death so far."""
        node = self.node_class(self, name, incarnation, hosts=name.startswith("n"))
        self.by_id[node.id] = node
        self.note(f"{node.id} starts")
        for dead in self.dead:
            node.input(node.saw_death, dead)
        return node

    def alive_nodes(self) -> list[SimNode]:
        """Nodes that can host, in order of start."""
        return [node for node in self.by_id.values() if node.hosts]

    def node_died(self, node: SimNode) -> None:
        """A node process has ended; the others see it a little later."""
        del self.by_id[node.id]
        if node.hosts:
            self.dead[node.id] = None
        self.note(f"{node.id} dies")
        self.network.node_gone(node.id)
        if not node.hosts:
            return  # nobody watches the processes of clients
        for other in self.by_id.values():
            other.later(self.between(200, self.plan.death_seen_us), other.saw_death, node.id)

    def _calm(self) -> None:
        """The faults stop. From here on everything must come to its end."""
        self.note("calm")
        self.calm_us = self.now_us
        self.faults.stop()
        self.at(LOOK_US, self._look_for_the_end, 0, LOOK_US)

    def _look_for_the_end(self, stage: int, wait_us: int) -> None:
        self.events -= 1  # looking is none
        pending = self.invariants.pending(stage)
        if pending:
            if self.now_us - self.calm_us > LIVENESS_US:
                self.fail("liveness", f"still pending in stage {stage}: {pending}")
            wait_us = min(LOOK_MAX_US, wait_us * 3 // 2)
            self.at(wait_us, self._look_for_the_end, stage, wait_us)
        elif stage < 2:
            if stage == 0:
                # All is answered. Every server that is not lost must answer once more, and tick.
                self.invariants.note_ticks()
                for server in self.servers:
                    self.clients[0].audit(server)
            self.at(LOOK_US, self._look_for_the_end, stage + 1, LOOK_US)
        else:
            self.over = True

    def run(self) -> World:
        """Carry the schedule to its end.

        Returns:
            Itself.

        Raises:
            Violation: A checker saw a guarantee broken.
        """
        self.advance()
        self.invariants.final()
        return self

    def advance(self, until: Callable[[], bool] | None = None) -> None:
        """Let things happen until something holds, asked after each event, or the run is over.

        Raises:
            Violation: A checker saw a guarantee broken.
        """
        heap = self._heap
        pop = heapq.heappop
        try:
            while not self.over and (until is None or not until()):
                if not heap:
                    self.fail("liveness", "nothing is left to happen, and the run is not over")
                self.now_us, _, what, args = pop(heap)
                self.events += 1
                if self.events > EVENTS_MAX and not 0 <= self.calm_us < self.now_us - CALM_US:
                    self.fail("storm", f"{EVENTS_MAX} events, and no end")
                what(*args)
        except Violation:
            raise
        except (Exception, Crashed) as error:
            error.add_note(f"seed {self.seed} at {self.now_us} us")
            self.note(f"raised {error!r}")
            raise Violation(
                "no exception", repr(error), self.seed, self.now_us, list(self.lines)
            ) from error
