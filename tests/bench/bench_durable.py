"""Calls of a durable server beside the same calls without a journal; alternating, medians.

python -m tests.bench.bench_durable
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

import migrate
from tests.bench.bench_journal import bare

CALLS = 150
MANY = 3000
FLYING = 32
ROUNDS = 7


@migrate.server
class Plain:
    """A KiB of state."""

    def __init__(self) -> None:
        self.n = 0
        self.rest = os.urandom(1024)

    def incr(self) -> int:
        """Count."""
        self.n += 1
        return self.n


@migrate.server(durable=True)
class Durable(Plain):
    """The same, with a journal."""


async def one(ref: migrate.Ref[Plain]) -> float:
    """Microseconds of a call, one at a time; the median."""
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        await ref.incr()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


async def many(ref: migrate.Ref[Plain]) -> float:
    """Calls a second with `FLYING` in flight."""
    left = MANY

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await ref.incr()

    begin = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(FLYING)))
    return MANY / (time.perf_counter() - begin)


async def main() -> None:
    """Print a table."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as text:
        folder = Path(text)
        env = {"LIVEMIGRATE_SECRET_FILE": str(folder / "secret")}
        async with migrate.LocalCluster(1, data=folder, env=env) as cluster:
            refs = {
                "plain": await cluster.client.spawn(Plain),
                "durable": await cluster.client.spawn(Durable),
            }
            for number in range(ROUNDS):
                order = list(refs) if number % 2 else list(refs)[::-1]
                for name in order:
                    found.setdefault(f"{name}, one call, us", []).append(await one(refs[name]))
                found.setdefault("bare append and fdatasync, us", []).append(bare(folder, False))
                for name in order:
                    rate = await many(refs[name])
                    found.setdefault(f"{name}, {FLYING} in flight, calls/s", []).append(rate)
            for ref in refs.values():
                await cluster.client.stop(ref)
    middle = {name: statistics.median(values) for name, values in found.items()}
    for name, value in middle.items():
        print(f"{name:36} {value:9,.0f}")
    plain, durable = middle["plain, one call, us"], middle["durable, one call, us"]
    bare_us = middle["bare append and fdatasync, us"]
    print(f"(durable - plain) / bare = {(durable - plain) / bare_us:.2f}")
    rates = [middle[f"{name}, {FLYING} in flight, calls/s"] for name in ("durable", "plain")]
    print(f"durable / plain at {FLYING} = {rates[0] / rates[1]:.2f}")


if __name__ == "__main__":
    asyncio.run(main())
