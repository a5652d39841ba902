"""`python -m tests.cluster --runs N [--seed S] [--workers W]`: recorded runs of real processes.

Each run starts node processes, calls and moves servers on them, kills, stops and cuts them, and
judges what the clients saw (see `histories`). One line a run, totals at the end; the history of
a run that breaks a promise is kept in a file. Exit status 1 if one did.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import pathlib
import statistics
import sys
import time
from collections import Counter as Tally

from tests.cluster.histories import carry_out


def main() -> int:
    """Run the campaign; 1 if a run broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seconds", type=float, default=5.0, help="of faults, in each run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--keep", type=pathlib.Path, default=pathlib.Path(), help="folder of failing histories"
    )
    options = parser.parse_args()
    begun = time.monotonic()
    counts: Tally[str] = Tally()
    took: list[float] = []
    failed: list[int] = []
    jobs = [(seed, options.seconds) for seed in range(options.seed, options.seed + options.runs)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        results = pool.imap_unordered(carry_out, jobs)
        # Interrupted, it still says what it has got.
        with contextlib.suppress(KeyboardInterrupt):
            for seed, line, more, violations, history, took_s in results:
                counts.update(more)
                counts["violations"] += len(violations)
                both = more.get("kills") and more.get("pauses")
                counts["runs with a kill and a pause"] += bool(both)
                took.append(took_s)
                elapsed_s = time.monotonic() - begun
                print(f"[{len(took)}/{options.runs}, {elapsed_s:.0f} s] {line}", flush=True)
                if violations:
                    failed.append(seed)
                    options.keep.mkdir(parents=True, exist_ok=True)
                    path = options.keep / f"history-{seed}.txt"
                    path.write_text(history)
                    print("\n".join(f"  {text}" for text in violations[:5]))
                    print(f"  all of it in {path}", flush=True)
    if not took:
        return 1
    print(
        f"\n{len(took)} runs in {time.monotonic() - begun:.0f} s, median of one "
        f"{statistics.median(took):.1f} s; failing seeds: {failed or 'none'}"
    )
    for name in sorted(counts, key=lambda name: (":" in name, name)):
        print(f"  {name:<40}{counts[name]:>9}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
