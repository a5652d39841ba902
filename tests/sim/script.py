"""Worlds in which nothing happens but what a test says; virtual time, seeded delays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from migrate.core.messages import Message
from migrate.core.move import SourcePhase, TargetPhase
from migrate.core.node import Core
from tests.sim.clients import Client, Request
from tests.sim.faults import Plan
from tests.sim.host import Op, SimNode
from tests.sim.world import World


class Script(World):
    """A cluster of a few nodes and clients, and one server `s0` on the node n0.

    All guarantees are checked as in any other world; `run` ends it and looks at all histories.
    """

    def __init__(
        self,
        seed: int,
        *,
        nodes: int = 3,
        clients: int = 2,
        servers: int = 1,
        core: type[Core] = Core,
        period_ms: int = 0,
        reentrant: bool = False,
        watches: bool = False,
        **plan: Any,
    ) -> None:
        self._period_ms = period_ms
        self._reentrant = reentrant
        super().__init__(
            seed,
            plan=Plan(
                nodes=nodes,
                clients=clients,
                servers=servers,
                requests=0,
                moves=0,
                busy_us=60_000_000,
                delay_high_us=plan.pop("delay_high_us", 1_000),
                **plan,
            ),
            node_class=type("ScriptNode", (SimNode,), {"core_class": core}),
        )
        if not watches:
            # So that moves take every step.
            self.directory.watch = lambda *what: None  # type: ignore[method-assign]
        # Let the servers start.
        self.wait_us(5_000)

    def _spawn(self) -> str:
        server = f"s{len(self.servers)}"
        self.servers.append(server)
        node = self.node(len(self.servers) - 1)
        node.spawn(server, reentrant=self._reentrant, period_ms=self._period_ms)
        return server

    # -- who and where

    def node(self, i: int) -> SimNode:
        """The node that lives at the i-th address."""
        nodes = self.alive_nodes()
        return nodes[i % len(nodes)]

    def owner(self, server: str = "s0") -> SimNode:
        """The node in the server's row."""
        return self.by_id[self.directory.rows[server][0].owner]

    def items(self, server: str = "s0") -> list[str]:
        """What the owner's copy has applied."""
        host: Any = self.owner(server).core.hosted[server].host
        return list(host.items)

    # -- what happens

    def wait_us(self, us: int) -> None:
        """Let time pass."""
        due = self.now_us + us
        self.at(us, self.note, "waited")
        self.advance(lambda: self.now_us >= due)

    def answer(self, request: Request) -> int:
        """Let things happen until a request has its result; its status."""
        self.advance(lambda: request.status >= 0)
        return request.status

    def call(self, client: int = 0, server: str = "s0", op: Op | None = None) -> Request:
        """A call, and its result."""
        request = self.ask(client, server, op)
        self.answer(request)
        return request

    def ask(
        self, client: int = 0, server: str = "s0", op: Op | None = None, **more: Any
    ) -> Request:
        """Make a request, and do not wait."""
        who: Client = self.clients[client]
        return who.ask(server, op, **more)

    def begin(self, target: int, transfer: str = "t1", server: str = "s0") -> SimNode:
        """Begin a move of the server to the i-th node; its source."""
        source = self.owner(server)
        source.input(source.move, server, self.node(target).id, transfer)
        return source

    def move(self, target: int, transfer: str = "t1", server: str = "s0") -> int:
        """Move, and wait for the end; how long it took, in microseconds."""
        began = self.now_us
        source = self.begin(target, transfer, server)
        self.end(source, transfer)
        return self.now_us - began

    def end(self, source: SimNode, transfer: str = "t1") -> None:
        """Wait for the end of a move at its source."""
        self.advance(lambda: transfer not in source.asked)

    def moved(self) -> int:
        """How many moves have ended well."""
        return self.counts["move moved"]

    def reach(self, phase: SourcePhase | TargetPhase, transfer: str = "t1") -> None:
        """Wait until a move is in a phase, at whichever side has it."""

        def there() -> bool:
            for node in self.alive_nodes():
                out, into = node.core.moves_out.get(transfer), node.core.moves_in.get(transfer)
                move: Any = out if isinstance(phase, SourcePhase) else into
                if move is not None and move.phase is phase:
                    return True
            return False

        self.advance(there)
        assert not self.over, f"{transfer} was never in {phase!r}"

    # -- the network

    def tamper(self, spoil: Callable[[str, str, Message], bool]) -> None:
        """Lose every message for which `spoil(source, target, message)` says so."""
        send = self.network.send

        def tampered(source: str, target: str, message: Message) -> None:
            if spoil(source, target, message):
                self.note(f"lost: {source}>{target} {type(message).__name__}")
            else:
                send(source, target, message)

        self.network.send = tampered  # type: ignore[method-assign]

    def lose_first(self, *kinds: type[Message], break_link: bool = False) -> list[Message]:
        """Lose the first message of each kind, with its link if told so; those lost so far."""
        left = list(kinds)
        lost: list[Message] = []

        def spoil(source: str, target: str, message: Message) -> bool:
            if type(message) not in left:
                return False
            left.remove(type(message))
            lost.append(message)
            if break_link:
                self.network.break_link(source, target)
            return True

        self.tamper(spoil)
        return lost
