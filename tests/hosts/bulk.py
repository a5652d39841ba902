"""`python -m tests.hosts.bulk`: what small calls wait for while large states go the same way.

Two hosts with a node each, and one link between them. A server on the one calls a server on the
other every few milliseconds, and notes how long each call took; meanwhile another server moves to
and fro without a pause. Printed are the calls' p50 and p99, alone and beside the moves, over a good
wire and over one that is slow and loses packets.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import migrate
from migrate.tools.bench_servers import Counter
from tests.hosts.cluster import HostsCluster, hosts_cluster
from tests.hosts.network import GOOD, Wire, missing
from tests.hosts.servers import Large, Prober

PLACES: Final = {"a": 0, "b": 1}
FAR: Final = Wire(delay_s=0.02)
LOSSY: Final = Wire(delay_s=0.02, loss=0.01)
"""Of each direction."""
OPTIONS: Final = migrate.NodeOptions(lease_s=10.0, move_step_timeout_s=60.0)
WIRES: Final = {"near": GOOD, "far": FAR, "lossy": LOSSY}
LIMIT: Final = 3.0
"""Moves may raise the calls' p99 by so much."""


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds that calls took.

    Attributes:
        quiet: Alone.
        busy: Beside moves.
        moves: That the moves took.
    """

    quiet: Sequence[float]
    busy: Sequence[float]
    moves: Sequence[float]

    @property
    def ratio(self) -> float:
        """By how much the moves raised the p99."""
        return percentile(self.busy, 0.99) / percentile(self.quiet, 0.99)

    def line(self) -> str:
        """For people."""
        shown = (
            f"{1e3 * percentile(them, 0.5):.1f} ms, p99 {1e3 * percentile(them, 0.99):.1f} ms"
            for them in (self.quiet, self.busy)
        )
        alone, beside = shown
        moves = f"{len(self.moves)} moves of {statistics.median(self.moves):.2f} s"
        return f"alone p50 {alone}; beside {moves} p50 {beside}; {self.ratio:.2f} times"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def links(cluster: HostsCluster) -> dict[tuple[str, str], str]:
    """The kind of each link that nodes have with nodes."""
    found = {}
    for row in await cluster.client.nodes():
        for link in row.links:
            if link.peer in cluster.places:
                found[row.name, link.peer] = link.kind
    return found


async def measured(
    wire: Wire, *, kind: str, mib: int, rounds: int, seconds: float
) -> tuple[list[Round], dict[tuple[str, str], str]]:
    """Rounds of calls, alone and beside moves, and the kinds of the links at the end."""
    found: list[Round] = []
    async with hosts_cluster(OPTIONS, PLACES, ("h1", "h2"), (0,)) as cluster:
        client, hosts = cluster.client, cluster.net.hosts
        spawn = migrate.SpawnOptions
        counter: Any = await client.spawn(Counter, options=spawn(on="b"))
        prober: Any = await client.spawn(Prober, counter, options=spawn(on="a"))
        large: Any = await client.spawn(Large, kind, mib << 20, options=spawn(on="a"))
        await client.migrate(large, to="b")
        cluster.net.both_ways(hosts, hosts, wire)
        turn = 0
        try:
            for _ in range(rounds):
                quiet = await prober.probe(seconds)
                begun = asyncio.create_task(prober.probe(seconds))
                moves: list[float] = []
                while not begun.done():
                    report = await client.migrate(large, to="ab"[turn % 2])
                    turn += 1
                    moves.append(report.total_s)
                found.append(Round(quiet, await begun, moves))
        finally:
            cluster.net.both_ways(hosts, hosts, GOOD)
        kinds = await links(cluster)
    return found, kinds


def main() -> int:
    """Run and print; 1 if moves raised the p99 by too much."""
    parser = argparse.ArgumentParser(prog="python -m tests.hosts.bulk", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of calls, each time")
    parser.add_argument("--mib", type=int, default=50, help="of the state that moves")
    parser.add_argument("--kind", choices=sorted(Large.KINDS), action="append")
    parser.add_argument("--wire", choices=sorted(WIRES), action="append")
    options = parser.parse_args()
    if why := missing():
        print(why, file=sys.stderr)
        return 1
    logging.disable(logging.ERROR)
    worst = 0.0
    for kind in options.kind or sorted(Large.KINDS):
        for name in options.wire or WIRES:
            begun = time.monotonic()
            found, kinds = asyncio.run(
                measured(
                    WIRES[name],
                    kind=kind,
                    mib=options.mib,
                    rounds=options.rounds,
                    seconds=options.seconds,
                )
            )
            ratio = statistics.median(it.ratio for it in found)
            worst = max(worst, ratio)
            print(f"{kind}, {options.mib} MiB, {name} wire, links {sorted(set(kinds.values()))}")
            for it in found:
                print(f"  {it.line()}")
            print(f"  median {ratio:.2f} times; {time.monotonic() - begun:.0f} s", flush=True)
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
