"""The simulated network between node processes.

Messages between two nodes are delayed, and, as the seed's plan says, reordered, repeated and
lost. A broken link loses what is under way in both directions and comes up again; a partition
keeps it down for a while, in one direction or in both. Links come up with `Core.peer_up`.

A node that is started again has the address of the former one and another incarnation. What
was meant for that one is not given to it: links are opened for an incarnation, and refused by
any other (`rpc/handshake.py`), so no message of the core needs to say which one it is for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrate.core.ids import NodeId, node_name
from migrate.core.messages import (
    Acked,
    Cut,
    Envelope,
    KeepRefused,
    Kept,
    Message,
    Moved,
    Note,
    NotHere,
    Receipt,
    Reply,
    Step,
    WaitProbe,
)

if TYPE_CHECKING:
    from tests.sim.world import World

KINDS = ("call", "cast", "empty", "probe")


def describe(message: Message) -> str:
    """One line that tells a message's ids and numbers, without its payload."""
    match message:
        case Envelope():
            kind = KINDS[message.kind] if message.kind < len(KINDS) else str(message.kind)
            return (
                f"{kind} {message.session}:{message.seq}->{message.server} "
                f"low={message.acked_below} se={message.sender_epoch} hops={message.hops}"
            )
        case Reply():
            return f"reply {message.session}:{message.seq} status={message.status}"
        case Receipt():
            return f"receipt {message.session} below={message.admitted_below} w={message.window}"
        case Acked():
            return f"acked {message.session} below={message.acked_below} final={message.final}"
        case Moved() | NotHere() | WaitProbe():
            return repr(message)
        case Cut() | Step() | Note() | Kept():
            kind = type(message).__name__.lower()
            return f"{kind} {message.stream} e={message.epoch} n={message.number}"
        case KeepRefused():
            return repr(message)
        case _:
            name = getattr(message, "transfer", "") or getattr(message, "stream", "")
            return f"{type(message).__name__} {name}"


class Network:
    """All links of one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.blocked: dict[tuple[str, str], None] = {}
        self.slow: dict[str, int] = {}  # factor on the delays of one node, by name
        # What happens to the next message from or to a node: loss, duplicate or spike.
        self.doomed: dict[NodeId, str] = {}
        self._links: dict[tuple[NodeId, NodeId], int] = {}  # generation; up by one when broken
        self._last_us: dict[tuple[NodeId, NodeId], int] = {}

    @staticmethod
    def _pair(a: NodeId, b: NodeId) -> tuple[NodeId, NodeId]:
        return (a, b) if a < b else (b, a)

    def _is_blocked(self, source: NodeId, target: NodeId) -> bool:
        return (node_name(source), node_name(target)) in self.blocked

    def send(self, source: NodeId, target: NodeId, message: Message) -> None:
        """Take a message; it arrives once, later, twice or never."""
        world = self.world
        plan = world.plan
        world.note(f"{source}>{target} {describe(message)}")
        if target not in world.by_id:
            if world.incarnation_of(node_name(target)):
                world.counts["meant for a former incarnation"] += 1
            return
        if self.blocked and self._is_blocked(source, target):
            world.faults.hit_message("blocked", source, target)
            return
        faulty = world.faults.on
        doom = ""
        if faulty and self.doomed:
            doom = self.doomed.pop(source, "") or self.doomed.pop(target, "")
        if doom == "loss" or (faulty and world.chance(plan.loss)):
            world.faults.hit_message("loss", source, target)
            return
        key = (source, target)
        link = self._links.setdefault(self._pair(source, target), 0)
        copies = 1
        if doom == "duplicate" or (faulty and world.chance(plan.duplicate)):
            world.faults.hit_message("duplicate", source, target)
            copies = 2
        while copies:
            copies -= 1
            delay = world.between(plan.delay_low_us, plan.delay_high_us)
            if doom == "spike" or (faulty and world.chance(plan.spike)):
                world.faults.hit_message("spike", source, target)
                delay += world.between(1_000, plan.spike_us)
            if self.slow:
                slow = self.slow
                delay *= max(slow.get(node_name(source), 1), slow.get(node_name(target), 1))
            due = world.now_us + delay
            last = self._last_us.get(key, 0)
            if due >= last:
                self._last_us[key] = due
            elif plan.reorder:
                world.faults.hit_message("reorder", source, target)
            else:
                delay = last - world.now_us
            # A copy for each arrival: nodes share no memory.
            world.at(delay, self._arrive, source, target, link, message.__copy__())

    def _arrive(self, source: NodeId, target: NodeId, link: int, message: Message) -> None:
        world = self.world
        node = world.by_id.get(target)
        if node is None:
            return
        if self._links[self._pair(source, target)] != link or (
            self.blocked and self._is_blocked(source, target)
        ):
            world.counts["lost in flight"] += 1
            return
        node.input(node.deliver, source, message)

    def node_gone(self, node: NodeId) -> None:
        """A process died: what it sent may still arrive, or be lost with its buffers."""
        if self.world.chance(0.5):
            for pair in self._links:
                if node in pair:
                    self._links[pair] += 1

    def break_link(self, a: NodeId, b: NodeId) -> None:
        """Lose what is under way between two nodes; the link comes up again soon."""
        self._links[self._pair(a, b)] = self._links.get(self._pair(a, b), 0) + 1
        self.world.note(f"link {a} {b} breaks")
        self.world.at(self.world.between(500, 20_000), self._up, a, b)

    def _up(self, a: NodeId, b: NodeId) -> None:
        if self._is_blocked(a, b) or self._is_blocked(b, a):
            return
        self.world.note(f"link {a} {b} is up")
        for here, there in ((a, b), (b, a)):
            node = self.world.by_id.get(here)
            if node is not None and there in self.world.by_id:
                node.later(self.world.between(0, 500), node.peer_up, there)

    def block(self, source: str, target: str) -> None:
        """Let nothing through from one place to another; what is under way is lost."""
        self.blocked[source, target] = None
        self.world.note(f"cut {source}>{target}")

    def unblock(self, source: str, target: str) -> None:
        """Heal one direction; the link comes up when both are."""
        if self.blocked.pop((source, target), 0) == 0:
            return
        self.world.note(f"heal {source}>{target}")
        for a in [n for n in self.world.by_id if node_name(n) == source]:
            for b in [n for n in self.world.by_id if node_name(n) == target]:
                self._up(a, b)
