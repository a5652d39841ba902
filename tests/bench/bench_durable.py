"""Calls of a durable server beside the same calls without a journal; alternating, medians.

python -m tests.bench.bench_durable

Where the time of a single call goes in the node (time stamps at each step, 1 KiB of state, two
processors, each call alone; microseconds, medians; one without a journal takes 41 in all):

====  =======================================================================================
  28  received, handled, the reply held
  24  the state captured (4 in a loop of the same)
  28  the cut: what it tells of sessions and results, encoded, appended
  26  the turn's end; encoded, tagged, written
 161  synced by the loop: two waits for the disk (115 in a loop of the same)
  30  the core told, the reply let out
====  =======================================================================================

While the disk is waited for, caches and processors cool down at both ends, which costs some 50 more
whatever the node does. So a call whose handler does nothing but such an append and sync is measured
too: `by hand`, and over zeros that were filled in before, as a journal has them: that one is the
least that a durable call can take in the same process on the same disk. And the bare append is
measured twice: in a loop of its own, and between calls.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import migrate
from tests.bench.bench_journal import PAYLOAD, bare
from tests.bench.durable_servers import ByHand, Durable, Plain

CALLS = 60
MANY = 3000
FLYING = 32
SERVERS = 8
ROUNDS = 15


async def one(ref: migrate.Ref[Plain] | migrate.Ref[ByHand]) -> float:
    """Microseconds of a call, one at a time; the median."""
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        await ref.incr()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


async def bare_between(ref: migrate.Ref[Plain], folder: Path) -> float:
    """Microseconds of a bare append and sync in the caller's process, a call before each.

    In a loop of nothing else caches and processors stay awake as they do not between calls.
    """
    handle = os.open(folder / "between", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.fsync(handle)
    times = []
    for number in range(CALLS):
        await ref.incr()
        begin = time.perf_counter()
        os.pwrite(handle, PAYLOAD, len(PAYLOAD) * number)
        os.fdatasync(handle)
        times.append(time.perf_counter() - begin)
    os.close(handle)
    return statistics.median(times) * 1e6


async def many(refs: Sequence[migrate.Ref[Plain]]) -> float:
    """Calls a second with `FLYING` in flight, spread over the servers."""
    left = MANY

    async def caller(ref: migrate.Ref[Plain]) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await ref.incr()

    begin = time.perf_counter()
    await asyncio.gather(*(caller(refs[n % len(refs)]) for n in range(FLYING)))
    return MANY / (time.perf_counter() - begin)


def told(name: str, values: list[float], unit: str = "") -> None:
    """Print the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    digits = 2 if middle < 10 else 0
    print(f"{name:44} {low:9,.{digits}f} {middle:9,.{digits}f} {high:9,.{digits}f} {unit}")


async def main() -> None:
    """Print a table."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as text:
        folder = Path(text)
        env = {"LIVEMIGRATE_SECRET_FILE": str(folder / "secret")}
        async with migrate.LocalCluster(1, data=folder, env=env) as cluster:
            spawn = cluster.client.spawn
            plain = [await spawn(Plain) for _ in range(SERVERS)]
            durable = [await spawn(Durable) for _ in range(SERVERS)]
            by_hand = await spawn(ByHand, str(folder / "by-hand"))
            zeros = await spawn(ByHand, str(folder / "zeros"), 4096 * CALLS * (ROUNDS + 1))
            await zeros.incr()
            for number in range(ROUNDS):
                steps = [
                    ("plain", one(plain[0])),
                    ("durable", one(durable[0])),
                    ("by hand", one(by_hand)),
                    ("zeros", one(zeros)),
                    ("between", bare_between(plain[0], folder)),
                    ("plain many", many(plain[:1])),
                    ("durable many", many(durable[:1])),
                    ("plain spread", many(plain)),
                    ("durable spread", many(durable)),
                ]
                for name, step in steps if number % 2 else steps[::-1]:
                    found.setdefault(name, []).append(await step)
                    if step is steps[0][1]:
                        found.setdefault("bare", []).append(bare(folder, False))
            for ref in [*plain, *durable, by_hand, zeros]:
                await cluster.client.stop(ref)
    print(f"{'':44} {'quarter':>9} {'half':>9} {'quarter':>9}")
    told("one call, plain", found["plain"], "us")
    told("one call, durable", found["durable"], "us")
    told("one call, append and sync by hand", found["by hand"], "us")
    told("the same over zeros that were there before", found["zeros"], "us")
    told("bare append and fdatasync, in a loop", found["bare"], "us")
    told("the same between calls", found["between"], "us")
    told(f"{FLYING} in flight, plain", found["plain many"], "calls/s")
    told(f"{FLYING} in flight, durable", found["durable many"], "calls/s")
    told(f"{FLYING} in flight on {SERVERS} servers, plain", found["plain spread"], "calls/s")
    told(f"{FLYING} in flight on {SERVERS} servers, durable", found["durable spread"], "calls/s")
    print("of each round:")
    for name, what in (
        ("durable", "durable"),
        ("by hand", "by hand"),
        ("zeros", "by hand over zeros"),
    ):
        for beside, where in (("bare", "in a loop"), ("between", "between calls")):
            by_round = zip(found[name], found["plain"], found[beside], strict=True)
            told(f"({what} - plain) / bare {where}", [(d - p) / b for d, p, b in by_round])
    for kind in ("many", "spread"):
        pairs = zip(found[f"durable {kind}"], found[f"plain {kind}"], strict=True)
        told(f"durable / plain, {FLYING} in flight, {kind}", [a / b for a, b in pairs])


if __name__ == "__main__":
    asyncio.run(main())
