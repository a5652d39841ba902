"""Many seeds at once: what came of each, and sums over all of them."""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import pathlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.sim.faults import KINDS, SETTINGS
from tests.sim.phases import Hits
from tests.sim.world import Violation, World


@dataclass
class Ran:
    """What came of one seed."""

    seed: int
    events: int
    counts: Counter[str]
    hits: Hits
    failure: tuple[str, str] | None = None  # checker, text


def one(seed: int, world_class: type[World] = World) -> Ran:
    """Run one seed."""
    gc.collect()  # the world before it; in between no collection is worth its time
    gc.disable()
    world = world_class(seed)
    ran = Ran(seed, 0, world.counts, world.hits)
    try:
        world.run()
    except Violation as violation:
        ran.failure = (violation.checker, str(violation))
    ran.events = world.events
    for kind in world.plan.kinds:
        ran.counts[f"seeds with {kind}"] += 1
    return ran


@dataclass
class Campaign:
    """Sums over many seeds."""

    began_s: float = field(default_factory=time.monotonic)
    took_s: float = 0.0
    events: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    hits: Hits = field(default_factory=Counter)
    failed: list[tuple[int, str, str]] = field(default_factory=list)

    def add(self, ran: Ran) -> None:
        """Take in one seed."""
        self.took_s = time.monotonic() - self.began_s
        self.events.append(ran.events)
        self.counts.update(ran.counts)
        self.hits.update(ran.hits)
        if ran.failure is not None:
            self.failed.append((ran.seed, *ran.failure))

    def text(self) -> str:
        """Rates and faults by kind."""
        n, total, took = len(self.events), sum(self.events), self.took_s
        median = sorted(self.events)[n // 2]
        lines = [
            f"{n} schedules in {took:.1f} s ({n / took:.1f}/s), "
            f"{total} events ({total / took:.0f}/s), median {median}",
            f"{'faults by kind':<40}{'seeds':>10}{'times':>10}",
        ]
        for kind in KINDS:
            times = "" if kind in SETTINGS else self.counts[kind]
            lines.append(f"  {kind:<38}{self.counts[f'seeds with {kind}']:>10}{times:>10}")
        lines.append("what else was counted")
        for kind in sorted(self.counts):
            if kind not in KINDS and not kind.startswith("seeds with"):
                lines.append(f"  {kind:<48}{self.counts[kind]:>10}")
        return "\n".join(lines)

    def save(self, file: pathlib.Path) -> Hits:
        """Add this to the campaigns before it; the hits of all together."""
        known = json.loads(file.read_text()) if file.exists() else {"campaigns": [], "hits": []}
        known["campaigns"].append(
            {
                "schedules": len(self.events),
                "events": sum(self.events),
                "median": sorted(self.events)[len(self.events) // 2],
                "took_s": round(self.took_s, 1),
                "failed": [f"{seed} [{checker}]" for seed, checker, _ in self.failed],
            }
        )
        hits: Hits = Counter({(phase, fault): n for phase, fault, n in known["hits"]})
        hits.update(self.hits)
        known["hits"] = [[phase, fault, n] for (phase, fault), n in sorted(hits.items())]
        file.write_text(json.dumps(known))
        return hits


def together(file: pathlib.Path) -> str:
    """One line on all campaigns that were saved in a file."""
    done = json.loads(file.read_text())["campaigns"]
    return (
        f"{len(done)} campaigns together: {sum(c['schedules'] for c in done)} schedules, "
        f"{sum(c['events'] for c in done)} events, {sum(c['took_s'] for c in done):.0f} s, "
        f"{sum(len(c['failed']) for c in done)} failed"
    )


def run_all(seeds: range, workers: int, world_class: type[World] = World) -> Iterator[Ran]:
    """Run seeds in processes of their own; yields what came of each, in the seeds' order."""
    # NB: spawned, not forked: whoever runs this may have threads.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        run = functools.partial(one, world_class=world_class)
        yield from pool.imap(run, seeds, chunksize=8)
