"""`python -m tests.cluster.soak [--calls N] [--minutes M]`: many calls, with moves going on.

Two node processes, and callers in this one that call servers which are moved all the time: small
calls, and now and then an array that goes by shared memory. Every call is counted by its server, so
that a lost or repeated one shows. Meanwhile memory, descriptors, tasks, threads and mappings of all
three processes are sampled; in the end they must be what they were after the first tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import psutil

import migrate
from tests.cluster.soak_servers import Meter, Worn

SERVERS = 16
CALLERS = 64
ARRAY_BYTES = 2 << 20
ARRAY_EVERY = 500
"""One call in so many takes an array."""
SAMPLES = 40
GROWTH_MAX = 1.10
"""Of resident memory, from the second tenth to the last: noise of the allocator."""


def named() -> set[str]:
    """Shared memory with a name, as Python's own or as ours would have; others have theirs."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("livemigrate", "psm_"))}


@dataclass
class Sample:
    """What one process held at one time."""

    calls: int
    rss: int
    descriptors: int
    threads: int
    tasks: int
    mapped: int


@dataclass
class Report:
    """What a soak found; `flaws` is empty if all is well."""

    calls: int = 0
    moves: int = 0
    seconds: float = 0.0
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    flaws: list[str] = field(default_factory=list)


def held(pid: int, calls: int, tasks: int) -> Sample:
    """Sample a process."""
    process = psutil.Process(pid)
    maps = pathlib.Path(f"/proc/{pid}/maps").read_text()
    return Sample(
        calls,
        process.memory_info().rss,
        process.num_fds(),
        process.num_threads(),
        tasks,
        maps.count("memfd:livemigrate"),
    )


class Soak:
    """One run."""

    def __init__(self, calls: int, minutes: float, say: Callable[[str], None]) -> None:
        self.calls = calls
        self.end = time.monotonic() + 60 * minutes
        self.say = say
        self.done = 0
        self.report = Report()
        self.refs: list[migrate.Ref[Worn]] = []
        self.meters: dict[str, migrate.Ref[Meter]] = {}
        self.counted: dict[int, int] = {}
        self.client: migrate.Client

    def over(self) -> bool:
        """Whether enough calls were made, or the time is up."""
        return self.done >= self.calls or time.monotonic() > self.end

    async def run(self) -> Report:
        """Call, move and sample until it is over; then look at what is left."""
        before = named()
        begun = time.monotonic()
        async with migrate.LocalCluster(nodes=2) as cluster:
            self.client = cluster.client
            for node in cluster.nodes:
                on = migrate.SpawnOptions(on=node.name)
                self.meters[node.name] = await self.client.spawn(Meter, options=on)
            self.refs = [await self.client.spawn(Worn) for _ in range(SERVERS)]
            self.counted = dict.fromkeys(range(SERVERS), 0)
            moving = asyncio.create_task(self.move())
            sampling = asyncio.create_task(self.sample())
            try:
                await asyncio.gather(*(self.call(n) for n in range(CALLERS)))
            finally:
                moving.cancel()
                sampling.cancel()
                await asyncio.gather(moving, sampling, return_exceptions=True)
            for task in (moving, sampling):
                if not task.cancelled() and task.exception() is not None:
                    self.report.flaws.append(f"{task.exception()!r}")
            for number, ref in enumerate(self.refs):
                found = await ref.count()
                if found != self.counted[number]:
                    self.report.flaws.append(
                        f"server {number} counted {found} of {self.counted[number]} calls"
                    )
                await ref.drop()
            gc.collect()
            for meter in self.meters.values():
                await meter.collect()
            # Acknowledgements of the last results, and what they let go of, take a moment.
            await self.settled()
        self.report.calls = self.done
        self.report.seconds = time.monotonic() - begun
        left = named() - before
        if left:
            self.report.flaws.append(f"left under /dev/shm: {sorted(left)}")
        self.judge()
        return self.report

    async def call(self, caller: int) -> None:
        """One caller: calls one server after the other."""
        number = caller % SERVERS
        turn = 0
        while not self.over():
            turn += 1
            self.done += 1
            number = (number + 1) % SERVERS
            ref = self.refs[number]
            self.counted[number] += 1
            if self.done % ARRAY_EVERY == 0:
                former = await ref.keep(np.zeros(ARRAY_BYTES, dtype=np.uint8))
                if former is not None and former[0] >= 100:
                    self.report.flaws.append("an array came back changed")
            elif turn % 4:
                await ref.incr()
            else:
                await ref.incr_later()

    async def move(self) -> None:
        """Move one server after the other to the other node."""
        names = list(self.meters)
        while True:
            for ref in self.refs:
                here = (await self.client.info(ref)).node
                await self.client.migrate(ref, to=next(name for name in names if name != here))
                self.report.moves += 1

    async def sample(self) -> None:
        """Sample all processes, evenly over the calls or the time."""
        begun, end = time.monotonic(), self.end
        taken = 0
        while True:
            share = max(self.done / self.calls, (time.monotonic() - begun) / max(end - begun, 1e-9))
            if share * SAMPLES > taken:
                taken += 1
                await self.take()
                self.say(f"{self.done:,} calls, {self.report.moves:,} moves")
            await asyncio.sleep(0.05)

    async def take(self) -> dict[str, Sample]:
        """One sample of each process."""
        found = {"callers": held(os.getpid(), self.done, len(asyncio.all_tasks()))}
        for name, meter in self.meters.items():
            pid, tasks = await meter.read()
            found[name] = held(pid, self.done, tasks)
        for name, sample in found.items():
            self.report.samples.setdefault(name, []).append(sample)
        return found

    async def settled(self) -> None:
        """Wait, for a bounded time, until no mapping is left; then take the last sample."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            last = await self.take()
            if not any(sample.mapped for sample in last.values()):
                return
            await asyncio.sleep(0.2)
        self.report.flaws.append("mappings of shared memory are left after all arrays were dropped")

    def judge(self) -> None:
        """Compare the end of each process with its beginning."""
        for name, samples in self.report.samples.items():
            tenth = max(1, len(samples) // 10)
            early, late = samples[tenth : 3 * tenth + 1], samples[-2 * tenth - 1 :]
            if len(samples) < 5 or not early:
                continue
            grown = statistics.median(s.rss for s in late) / statistics.median(s.rss for s in early)
            if grown > GROWTH_MAX and self.done >= 100_000:
                self.report.flaws.append(f"memory of {name} grew {grown:.2f} times")
            for what in ("descriptors", "threads", "tasks"):
                most = max(getattr(s, what) for s in early)
                now = getattr(samples[-1], what)
                # Arrays that were kept while sampled had descriptors of their own.
                if now > most + 2:
                    self.report.flaws.append(f"{what} of {name}: {now}, and {most} at first")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a soak; the exit status is 1 if something grew, leaked, or was counted wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000_000)
    parser.add_argument("--minutes", type=float, default=600.0, help="end after so long anyway")
    parser.add_argument("--json", action="store_true", help="print the samples too")
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    report = asyncio.run(Soak(options.calls, options.minutes, say).run())
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        print(
            f"{report.calls:,} calls and {report.moves:,} moves in {report.seconds:.0f} s: "
            + ("; ".join(report.flaws) or "all counted once, nothing grew, nothing is left")
        )
        for name, samples in report.samples.items():
            for at, sample in (("first", samples[min(2, len(samples) - 1)]), ("last", samples[-1])):
                print(f"  {name:8} {at:5} {_told(sample)}")
    return 1 if report.flaws else 0


def _told(sample: Any) -> str:
    return (
        f"{sample.rss / 1e6:6.1f} MB, {sample.descriptors} descriptors, {sample.threads} threads, "
        f"{sample.tasks} tasks, {sample.mapped} mappings"
    )


if __name__ == "__main__":
    sys.exit(main())
