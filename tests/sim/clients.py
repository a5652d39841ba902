"""Who makes requests and asks for moves in a simulated cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import structs

from migrate.core.delivery import Outgoing, SendSession
from migrate.core.messages import CALL, CAST, CLOSED, OK
from tests.sim.host import Op, Settled, pack, unpack_result

if TYPE_CHECKING:
    from tests.sim.host import SimNode
    from tests.sim.world import World


class Request:
    """One request of a client, from its making to its result."""

    __slots__ = ("deadline", "kind", "out", "place", "server", "session", "status", "uid", "value")

    def __init__(self, server: str, uid: str, kind: int, deadline: bool) -> None:
        self.server = server
        self.uid = uid
        self.kind = kind
        self.deadline = deadline
        self.out: Outgoing | None = None
        self.session: SendSession | None = None
        self.status = -1  # not answered yet
        self.place = 0  # in the server's history, once a call was answered
        self.value: Any = None


class Client:
    """A process that only calls. It keeps several requests under way at a time."""

    def __init__(self, world: World, node: SimNode, index: int) -> None:
        self.world = world
        self.index = index
        self.open: dict[str, Request] = {}
        self.numbers: dict[str, int] = {}
        self.left = world.plan.requests // world.plan.clients
        self._live_in(node)

    def _live_in(self, node: SimNode) -> None:
        self.node = node
        # A new incarnation is another sender.
        self.name = f"c{self.index}.{node.incarnation}"
        node.resolved = self._resolved

    def start(self) -> None:
        """Begin; some of the refs it holds know where their server is."""
        for server, (row, _) in self.world.directory.rows.items():
            if self.world.chance(0.5):
                self.node.core.route_hint(server, row.owner, row.epoch)
        self._next()

    def die(self) -> None:
        """The process ends; nobody will hear what became of its requests."""
        self.open.clear()
        self.numbers.clear()
        self.node.die()

    def revive(self) -> None:
        """Start again as a new process under the same address."""
        self._live_in(self.world.start_node(self.node.name, self.node.incarnation + 1))
        self.start()

    def _next(self) -> None:
        plan = self.world.plan
        mean = plan.busy_us * 0.8 / max(1, plan.requests // plan.clients)
        self.node.later(int(self.world.rng.expovariate(1 / mean)), self._make)

    def _make(self) -> None:
        if self.left <= 0:
            return
        world = self.world
        # Requests come alone or in bursts to the same server.
        server = world.targets[int(world.rng.random() ** 2 * len(world.targets))]
        for _ in range(world.between(1, 6) if world.chance(0.2) else 1):
            if self.left > 0:
                self.left -= 1
                self._request(server)
        self._next()

    def _request(self, server: str) -> None:
        world = self.world
        kind = CAST if world.chance(0.2) else CALL
        timeout_ms = world.between(5, 400) if world.chance(world.plan.deadlines) else 0
        request = self.ask(server, self.node.draw_op(server), kind, timeout_ms)
        if world.faults.on and world.chance(world.plan.cancel):
            self.node.later(world.between(0, 50_000), self._cancel, request)

    def ask(
        self, server: str, op: Op | None = None, kind: int = CALL, timeout_ms: int = 0
    ) -> Request:
        """Make a request, now; `op` None: only to be noted down."""
        node = self.node
        number = self.numbers[server] = self.numbers.get(server, 0) + 1
        uid = f"{self.name}#{number}"
        op = structs.replace(op or Op("", "add", 0, "", 0), uid=uid)
        request = Request(server, uid, kind, timeout_ms > 0)
        deadline = node.now_ms() + timeout_ms if timeout_ms else 0
        self.world.counts["deadlines"] += timeout_ms > 0
        out = Outgoing(kind, "op", pack(op), None, (), deadline, request, "")
        request.out = out
        self.open[f"{server} {uid}"] = request
        self.world.invariants.made(server, uid)
        request.session = node.core.request(node.core.own, server, out, node.now_ms())
        return request

    def _cancel(self, request: Request) -> None:
        if f"{request.server} {request.uid}" in self.open and request.session is not None:
            assert request.out is not None
            del self.open[f"{request.server} {request.uid}"]
            self.world.counts["cancel"] += 1
            request.out.token = None
            self.node.core.cancel(request.session, request.out, self.node.now_ms())

    def audit(self, server: str) -> None:
        """Call once more, without a limit: the server must answer."""
        self.node.input(self.ask, server)

    def _resolved(self, token: Any, status: int, payload: bytes | None, value: Any) -> None:
        request: Request = token
        key = f"{request.server} {request.uid}"
        if self.open.pop(key, None) is None:
            self.world.fail("answered once", f"{key} was answered twice or after its cancelling")
        self.world.note(f"{self.name} {key} status={status}")
        if status == CLOSED:
            self.world.fail("statuses", f"{key} was closed, and nobody closed it")
        result: Settled | None = None
        if status == OK and request.kind == CALL:
            result = value if payload is None else unpack_result(payload)
            request.place = result.place
        request.status, request.value = status, value
        self.world.invariants.answered(
            request.server, request.uid, request.kind, status, value, result, request.deadline
        )


class Mover:
    """Asks for moves and stops all over the cluster."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.left = world.plan.moves
        self.n = 0
        self.stopped: dict[str, None] = {}

    def start(self) -> None:
        """Begin."""
        self._next()

    def _next(self) -> None:
        mean = self.world.plan.busy_us * 0.9 / max(1, self.world.plan.moves)
        self.world.at(int(self.world.rng.expovariate(1 / mean)), self._move)

    def _move(self) -> None:
        world = self.world
        if self.left <= 0 or world.calm_us >= 0:
            return
        self.left -= 1
        self._next()
        nodes = world.alive_nodes()
        if not nodes:
            return  # all are down at once
        server = world.targets[int(world.rng.random() ** 2 * len(world.targets))]
        target = nodes[world.between(0, len(nodes) - 1)]
        known = world.directory.rows.get(server)
        source = world.by_id.get(known[0].owner) if known is not None else None
        if source is None or source is target:
            return
        if "stop" in world.plan.kinds and world.chance(0.05):
            self.stopped[server] = None
            source.input(source.stop, server)
            return
        if world.faults.on and world.chance(world.plan.withdraw):
            # A node that is about to close gives up what it can; this one changes its mind.
            source.input(source.withdraw)
            return
        self.n += 1
        source.input(source.move, server, target.id, f"t{self.n}")
        if world.chance(0.2):
            # Asked for twice, or somewhere else at the same time (scenario 39).
            self.n += 1
            other = nodes[world.between(0, len(nodes) - 1)]
            if other is not source:
                source.input(source.move, server, other.id, f"t{self.n}")
