"""`python -m tests.hosts [--seconds S] [--seed N]`: a campaign of faults on three hosts, as root.

Each run is a cluster of its own: three hosts, three etcd members, five nodes. Wires are cut (also
one way), slowed down and made lossy, nodes and members killed and stopped, while clients call
servers that move; then the histories are judged. One line a run, totals at the end; exit status 1
if a promise was broken, with the history in a file.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import pathlib
import sys
import time
from collections import Counter as Tally

from tests.hosts.cluster import plan_of, recorded_on_hosts
from tests.hosts.network import missing


def main() -> int:
    """Run the campaign; 1 if a run broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.hosts", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="how long in all")
    parser.add_argument("--each", type=float, default=60.0, help="seconds of faults in a run")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument(
        "--keep", type=pathlib.Path, default=pathlib.Path(), help="folder of failing histories"
    )
    options = parser.parse_args()
    if why := missing():
        print(why, file=sys.stderr)
        return 1
    logging.disable(logging.ERROR)  # Nodes die on purpose here.
    begun = time.monotonic()
    counts: Tally[str] = Tally()
    failed: list[int] = []
    seed = options.seed
    while time.monotonic() - begun < options.seconds:
        report = asyncio.run(recorded_on_hosts(plan_of(seed, options.each)))
        counts.update(report.counts)
        counts["runs"] += 1
        counts["violations"] += len(report.violations)
        print(f"[{time.monotonic() - begun:.0f} s] {report.line()}", flush=True)
        if report.violations:
            failed.append(seed)
            options.keep.mkdir(parents=True, exist_ok=True)
            path = options.keep / f"hosts-{seed}.txt"
            path.write_text("\n".join(report.history()))
            print("\n".join(f"  {text}" for text in report.violations[:5]))
            print(f"  all of it in {path}", flush=True)
        seed += 1
    print(f"\n{counts['runs']} runs; failing seeds: {failed or 'none'}")
    for name in sorted(counts, key=lambda name: (":" in name, name)):
        print(f"  {name:<40}{counts[name]:>9}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
