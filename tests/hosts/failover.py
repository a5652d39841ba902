"""`python -m tests.hosts.failover [--kills N]`: how long callers wait when an owner's host is dead.

Three hosts with a node each, three etcd members, a client on a fourth; a server with one standby.
Its owner is killed with -9 under calls, again and again; each time the node comes back, and the set
is complete again before the next. Nobody on the other hosts can see a process end: they learn of it
by the lease. Printed are the gaps that the caller saw, beside lease + patience + 0.8 s.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from typing import Any, Final

import migrate
from tests.cluster.workloads import Counter
from tests.hosts.cluster import HostsCluster, hosts_cluster
from tests.hosts.network import missing

PLACES: Final = {"a": 0, "b": 1, "c": 2}
LEASE_S: Final = 2.0
ALLOWANCE_S: Final = 0.8
"""For detection by the directory, promotion, and the caller's way to the new owner."""

OPTIONS: Final = migrate.NodeOptions(lease_s=LEASE_S, call_timeout_s=60.0)
BOUND_S: Final = OPTIONS.lease_s + OPTIONS.promote_patience_s + ALLOWANCE_S


class Caller:
    """Counts with a server all the time, and notes when each answer came."""

    def __init__(self, ref: Any) -> None:
        self.answers = 0
        self.last_s = time.monotonic()
        self.ended = False
        self._ref = ref
        self._task = asyncio.create_task(self._call())

    async def _call(self) -> None:
        while not self.ended:
            value = (await self._ref.increment(f"call {self.answers}"))[0]
            self.answers += 1
            # Nothing that was answered is lost, and nothing is counted twice.
            assert value == self.answers
            self.last_s = time.monotonic()
            await asyncio.sleep(0.002)

    async def more(self, count: int) -> None:
        """Wait for some more answers."""
        until = self.answers + count
        while self.answers < until and not self._task.done():  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.001)
        if self._task.done():
            await self._task

    async def end(self) -> None:
        self.ended = True
        await self._task


async def complete(cluster: HostsCluster, ref: Any) -> migrate.ServerInfo:
    """Wait until the server has its standby."""
    while True:
        try:
            info = await cluster.client.info(ref)
            if info.standbys and all(it.state == "in sync" for it in info.followers):
                return info
        except migrate.MigrateError:
            pass  # Whoever is asked may be about to find out that it is the owner.
        await asyncio.sleep(0.05)


async def gaps(kills: int) -> list[float]:
    """Seconds from each kill to the next answer."""
    found = []
    async with hosts_cluster(OPTIONS, PLACES) as cluster:
        options = migrate.SpawnOptions(on="b", standbys=1)
        ref: Any = await cluster.client.spawn(Counter, options=options)
        caller = Caller(ref)
        for _ in range(kills):
            info = await complete(cluster, ref)
            await caller.more(20)
            (owner,) = [it for it in cluster.nodes if it.name == info.node]
            before = caller.answers
            owner.kill()
            killed_s = time.monotonic()
            await caller.more(2)  # One may have been on its way.
            assert caller.answers > before
            found.append(time.monotonic() - killed_s)
            await owner.wait()
            cluster.nodes.remove(owner)
            await cluster.add_node(owner.name)
        await caller.end()
    return found


def main() -> int:
    """Run and print; 1 if a gap at p99 was longer than it may be."""
    parser = argparse.ArgumentParser(prog="python -m tests.hosts.failover", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    if why := missing():
        print(why, file=sys.stderr)
        return 1
    logging.disable(logging.ERROR)  # Nodes die on purpose here.
    found = sorted(asyncio.run(gaps(options.kills)))
    p99 = found[min(len(found) - 1, len(found) * 99 // 100)]
    print(
        f"{len(found)} kills: median {found[len(found) // 2]:.2f} s, p99 {p99:.2f} s, longest "
        f"{found[-1]:.2f} s; lease + patience + {ALLOWANCE_S} s are {BOUND_S:.2f} s"
    )
    return 0 if p99 <= BOUND_S else 1


if __name__ == "__main__":
    sys.exit(main())
