"""What standbys cost, beside raw gRPC and beside the same server without any. Run by hand:

    python -m tests.bench.bench_standbys

Rounds of every kind take turns, so that the ratios hold when the machine's speed drifts; figures
are medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

import migrate
from migrate.tools.echo import ECHO, Echo
from tests.bench.standby_servers import Arrays, Deterministic, Records, Small

Call = Callable[[], Awaitable[Any]]


async def round_trip_us(call: Call, calls: int) -> float:
    """The median of calls one after the other."""
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        await call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


async def per_second(call: Call, calls: int, width: int = 32) -> float:
    """Calls a second with `width` in flight."""
    left = calls

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await call()

    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(width)))
    return calls / (time.perf_counter() - begun)


class Bench:
    """A cluster of three nodes, a client, and raw gRPC between two processes."""

    def __init__(self, cluster: migrate.LocalCluster, unary: Call, rounds: int) -> None:
        self.cluster = cluster
        self.client = cluster.client
        self.unary = unary
        self.rounds = rounds

    async def server(self, cls: type, *args: Any, mode: str = "") -> Any:
        ref = await self.client.spawn(cls, *args, options=migrate.SpawnOptions(on="n1"))
        if mode:
            begun = time.perf_counter()
            await self.client.replicate(ref, ["n2"], mode=mode)
            print(f"  {cls.__name__}: joined in {(time.perf_counter() - begun) * 1e3:.0f} ms")
        return ref

    async def calls(self, servers: dict[str, Any], calls: int) -> None:
        """Latency and rate of each, in turns; the first is what the others are compared with."""
        latency: dict[str, list[float]] = {name: [] for name in servers}
        rate: dict[str, list[float]] = {name: [] for name in servers}
        unary = []
        for _ in range(self.rounds):
            unary.append(await round_trip_us(self.unary, 300))
            for name, ref in servers.items():
                latency[name].append(await round_trip_us(ref.write, calls))
                rate[name].append(await per_second(ref.write, calls * 4))
        of_unary = statistics.median(unary)
        print(f"  raw unary {of_unary:.0f} us")
        alone = next(iter(servers))
        for name in servers:
            us, second = statistics.median(latency[name]), statistics.median(rate[name])
            added = us - statistics.median(latency[alone])
            print(
                f"  {name}: {us:.0f} us (+{added:.0f}, {added / of_unary:.2f} of unary), 32 in "
                f"flight {second:.0f}/s ({second / statistics.median(rate[alone]):.2f} of alone)"
            )

    async def moves(self, cls: type, *args: Any) -> None:
        """To a node that has nothing of the server, and to its standby."""
        cold, warm = [], []
        for _ in range(self.rounds):
            ref = await self.server(cls, *args)
            report = await self.client.migrate(ref, to="n3")
            cold.append(report.total_s)
            await self.client.stop(ref)
            ref = await self.server(cls, *args, mode="sync")
            await ref.write()
            report = await self.client.migrate(ref, to="n2")
            warm.append(report.total_s)
            await self.client.stop(ref)
        to_cold, to_warm = statistics.median(cold) * 1e3, statistics.median(warm) * 1e3
        print(
            f"  {cls.__name__}: cold {to_cold:.1f} ms, to its standby {to_warm:.1f} ms "
            f"({to_warm / to_cold:.3f})"
        )


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_standbys")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["small", "records", "arrays", "moves"])
    options = parser.parse_args()
    async with (
        Echo() as echo,
        grpc.aio.insecure_channel(echo.address) as channel,
        migrate.LocalCluster(nodes=3) as cluster,
    ):
        unary: Any = channel.unary_unary(ECHO)  # type: ignore[call-arg]
        bench = Bench(cluster, lambda: unary(b"0123456789abcdef"), options.rounds)
        if options.only in (None, "small"):
            print("1 KiB of state")
            await bench.calls(
                {
                    "alone": await bench.server(Small),
                    "sync": await bench.server(Small, mode="sync"),
                    "async": await bench.server(Small, mode="async"),
                },
                1_000,
            )
        if options.only in (None, "records"):
            print("50 MiB of small records")
            await bench.calls(
                {
                    "alone": await bench.server(Records, 1_000_000),
                    "sync, deterministic": await bench.server(
                        Deterministic, 1_000_000, mode="sync"
                    ),
                },
                500,
            )
        if options.only in (None, "arrays"):
            print("200 MiB of arrays, 0.1 % of the pages written by a call")
            await bench.calls(
                {
                    "alone": await bench.server(Arrays, 200),
                    "sync": await bench.server(Arrays, 200, mode="sync"),
                },
                50,
            )
        if options.only in (None, "moves"):
            print("moves")
            await bench.moves(Arrays, 200)
            await bench.moves(Records, 200_000)
            await bench.moves(Deterministic, 200_000)


if __name__ == "__main__":
    asyncio.run(main())
