"""Choosing nodes: the least loaded of those that admit servers.

Theory of operation. CPU decides, then waiting messages, then memory: each is brought to a
scale on which 1.0 means "full", and they are added with weights. Differences below STEP are
noise, and the number of servers breaks ties, so that a burst of spawns between two samples is
spread instead of piled on one node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from migrate.core.ids import NodeId

DEPTH_FULL = 1_000
"""Waiting messages that weigh as much as a core that is always busy (some 5 ms of work)."""

PLACED = 0.05
"""What a server that was just placed is expected to add: a burst of spawns between two samples
is spread, even from a node that looked idle for a moment."""

STEP = 0.1
"""Scores are compared in steps of this size; a sample of one second is no finer."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node and its figures: CPU in cores, memory as a share, messages waiting, servers.

    `placed` servers were put there since the figures were taken, and do not show in them yet.
    """

    node: NodeId
    cpu: float
    memory: float
    mailbox: int
    servers: int
    admits: bool
    placed: int = 0


def score(candidate: Candidate) -> float:
    """How loaded a node is: 0.0 idle; above 1.0 something is full."""
    figures = candidate.cpu + 0.5 * candidate.memory + candidate.mailbox / DEPTH_FULL
    return figures + PLACED * candidate.placed


def least_loaded(candidates: Iterable[Candidate]) -> NodeId | None:
    """The least loaded node that admits servers; None if none does.

    Of equals the one with the fewest servers, then the first by id, so that equal figures
    give equal answers.
    """
    open_ones = [c for c in candidates if c.admits]
    if not open_ones:
        return None
    return min(open_ones, key=_rank).node


def _rank(candidate: Candidate) -> tuple[int, int, NodeId]:
    return (
        int(score(candidate) / STEP),
        candidate.servers + candidate.placed,
        candidate.node,
    )


def standbys(
    candidates: Iterable[Candidate],
    *,
    count: int,
    named: Sequence[NodeId] = (),
    present: Collection[NodeId] = (),
    near: Collection[NodeId] = (),
    leaving: Collection[NodeId] = (),
    settled: bool = False,
) -> list[NodeId]:
    """Choose the nodes where a server has its standbys.

    One failure is to take as little with it as possible: so those that were named come first, then
    those of other hosts, then those that stand by already (another one costs a copy of the
    state), then the less loaded.

    Args:
        candidates: The nodes there are, but for the owner.
        count: How many are wanted.
        named: Those that somebody asked for.
        present: Those that stand by already. Only they may be cordoned.
        near: Those on the owner's host.
        leaving: Those that are being emptied: they stay only until there is another one.
        settled: Nobody asked for another choice: who stands by already is not replaced by a node
            of another host, only by one that was named.

    Returns:
        Up to `count` of them, the best first; fewer if there are not so many.
    """
    able = [c for c in candidates if c.admits or c.node in present]

    def rank(c: Candidate) -> tuple[object, ...]:
        new, close = c.node not in present, c.node in near
        return (
            c.node in leaving,
            c.node not in named,
            *((new, close) if settled else (close, new)),
            _rank(c),
        )

    able.sort(key=rank)
    return [candidate.node for candidate in able[: max(0, count)]]
