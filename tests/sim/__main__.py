"""`python -m tests.sim --seeds N --workers 2 [--start S]`: a campaign of seeded schedules."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter

from tests.sim.faults import KINDS
from tests.sim.world import Violation, World


def one(seed: int) -> tuple[int, int, dict[str, int], tuple[str, str] | None]:
    """Run one seed: (seed, events, counts, None or (checker, text))."""
    world = World(seed)
    try:
        world.run()
    except Violation as violation:
        return seed, world.events, dict(world.counts), (violation.checker, str(violation))
    counts = dict(world.counts)
    for kind in world.plan.kinds:
        counts[f"seeds with {kind}"] = 1
    return seed, world.events, counts, None


def replay(seed: int, lines: int) -> str:
    """The end of a failing seed's transcript, and what failed."""
    world = World(seed)
    try:
        world.run()
    except Violation as violation:
        return "\n".join([*violation.tail[-lines:], "", str(violation)])
    return f"seed {seed} does not fail here"


def show(seed: int) -> int:
    """Print the whole transcript of one seed."""
    world = World(seed, keep=True)
    failure = ""
    try:
        world.run()
    except Violation as violation:
        failure = str(violation)
    print("\n".join([*world.lines, f"digest {world.digest:08x}, {world.events} events", failure]))
    return 1 if failure else 0


def main() -> int:
    """Run the campaign; 1 if a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--tail", type=int, default=60, help="transcript lines of a failure")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    parser.add_argument("--transcript", type=int, metavar="SEED", help="print one, and end")
    options = parser.parse_args()
    if options.transcript is not None:
        return show(options.transcript)
    began = time.monotonic()
    events: list[int] = []
    counts: Counter[str] = Counter()
    failed: list[tuple[int, str, str]] = []
    seeds = range(options.start, options.start + options.seeds)
    bars = sys.stderr.isatty()
    with multiprocessing.get_context("fork").Pool(options.workers) as pool:
        for done, (seed, n, more, failure) in enumerate(
            pool.imap_unordered(one, seeds, chunksize=8), 1
        ):
            events.append(n)
            counts.update(more)
            if failure is not None:
                failed.append((seed, *failure))
                if not options.keep_going:
                    pool.terminate()
                    break
            if bars and done % 20 == 0:
                rate = done / (time.monotonic() - began)
                bar = "#" * (40 * done // options.seeds)
                sys.stderr.write(f"\r[{bar:<40}] {done}/{options.seeds} {rate:.0f}/s ")
    took = time.monotonic() - began
    events.sort()
    print(
        f"\n{len(events)} schedules in {took:.1f} s ({len(events) / took:.1f}/s), "
        f"{sum(events)} events ({sum(events) / took:.0f}/s), median {events[len(events) // 2]}"
    )
    for kind in KINDS:
        print(f"  {kind:<24}{counts[f'seeds with {kind}']:>9} seeds{counts[kind]:>10}")
    for kind in sorted(k for k in counts if k not in KINDS and not k.startswith("seeds with")):
        print(f"  {kind:<40}{counts[kind]:>10}")
    for checker, n in Counter(checker for _, checker, _ in failed).most_common():
        print(f"FAILED {n:>5} by {checker}")
    for seed, _, text in sorted(failed)[:20]:
        print(f"  {seed}: {text[:300]}")
    if failed:
        print(replay(min(failed)[0], options.tail))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
