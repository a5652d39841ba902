"""Calls of a durable server beside the same calls without a journal; alternating, medians.

python -m tests.bench.bench_durable

Where the time of a single call goes that the journal costs (time stamps in the node at each step,
1 KiB of state, two processors, each call alone; microseconds, medians; `cold` tells how much more
it is than in a loop of the same, since caches and processors cool down in each wait):

====  ==========================================================================================
  22  the state is captured (4 in a loop)
  20  the cut: what it tells of sessions and results
  12  appended to the journal, encoded, queued
 5+5  the bell rung, the thread awake (it was 40 when a queue woke it)
  18  grouped, tagged, joined
   6  written
 150  synced: two waits for the disk (110 in a loop, which is what `bare` measures)
   7  told by the thread
  15  the loop awake
  22  the core told, the reply let out
====  ==========================================================================================

What cools down while the disk is waited for costs the caller as well: so a call whose handler does
nothing but such an append and sync (`by hand`) is measured too, the least that a durable call can
take in the same process on the same disk.
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
from tests.bench.bench_journal import bare

CALLS = 60
MANY = 3000
FLYING = 32
SERVERS = 8
ROUNDS = 15


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


@migrate.server
class ByHand:
    """One whose handler holds its node's loop until 4 KiB are appended and synced."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.n = 0
        self.handle = -1

    def incr(self) -> int:
        """Count."""
        if self.handle < 0:
            self.handle = os.open(self.path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.fsync(self.handle)
        os.pwrite(self.handle, bytes(4096), 4096 * self.n)
        os.fdatasync(self.handle)
        self.n += 1
        return self.n


async def one(ref: migrate.Ref[Plain] | migrate.Ref[ByHand]) -> float:
    """Microseconds of a call, one at a time; the median."""
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        await ref.incr()
        times.append(time.perf_counter() - begin)
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
            for number in range(ROUNDS):
                steps = [
                    ("plain", one(plain[0])),
                    ("durable", one(durable[0])),
                    ("by hand", one(by_hand)),
                    ("plain many", many(plain[:1])),
                    ("durable many", many(durable[:1])),
                    ("plain spread", many(plain)),
                    ("durable spread", many(durable)),
                ]
                for name, step in steps if number % 2 else steps[::-1]:
                    found.setdefault(name, []).append(await step)
                    if step is steps[0][1]:
                        found.setdefault("bare", []).append(bare(folder, False))
            for ref in [*plain, *durable, by_hand]:
                await cluster.client.stop(ref)
    print(f"{'':44} {'quarter':>9} {'half':>9} {'quarter':>9}")
    told("one call, plain", found["plain"], "us")
    told("one call, durable", found["durable"], "us")
    told("one call, append and sync by hand", found["by hand"], "us")
    told("bare append and fdatasync", found["bare"], "us")
    told(f"{FLYING} in flight, plain", found["plain many"], "calls/s")
    told(f"{FLYING} in flight, durable", found["durable many"], "calls/s")
    told(f"{FLYING} in flight on {SERVERS} servers, plain", found["plain spread"], "calls/s")
    told(f"{FLYING} in flight on {SERVERS} servers, durable", found["durable spread"], "calls/s")
    print("of each round:")
    by_round = zip(found["durable"], found["plain"], found["bare"], strict=True)
    told("(durable - plain) / bare", [(d - p) / b for d, p, b in by_round])
    for name, other in (("durable", "by hand"), ("by hand", "plain")):
        pairs = zip(found[name], found[other], strict=True)
        told(f"{name} / {other}", [a / b for a, b in pairs])
    for kind in ("many", "spread"):
        pairs = zip(found[f"durable {kind}"], found[f"plain {kind}"], strict=True)
        told(f"durable / plain, {FLYING} in flight, {kind}", [a / b for a, b in pairs])


if __name__ == "__main__":
    asyncio.run(main())
