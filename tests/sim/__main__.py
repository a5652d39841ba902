"""`python -m tests.sim --seeds N --workers 2 [--start S]`: a campaign of seeded schedules.

Prints rates, faults by kind, the pairs of phase and fault, and the first failing seed with the
end of its transcript. `--world` says what there is: servers that move, checkpoints to go back to,
hot standbys, or journals on disks (and standbys). `--totals FILE` adds the campaign to those before
it, and prints the pairs of all of them; `--transcript SEED` prints one schedule.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections import Counter

from tests.sim.backups import RollbackWorld
from tests.sim.campaign import Campaign, run_all, together
from tests.sim.journals import JournalWorld
from tests.sim.phases import rarest, table
from tests.sim.standbys import StandbyWorld
from tests.sim.world import Violation, World

WORLDS: dict[str, type[World]] = {
    "moves": World,
    "checkpoints": RollbackWorld,
    "standbys": StandbyWorld,
    "journals": JournalWorld,
}


def replay(seed: int, lines: int, world_class: type[World]) -> str:
    """The end of a failing seed's transcript, and what failed."""
    world = world_class(seed)
    try:
        world.run()
    except Violation as violation:
        return "\n".join([*violation.tail[-lines:], "", str(violation)])
    return f"seed {seed} does not fail here"


def show(seed: int, world_class: type[World]) -> int:
    """Print the whole transcript of one seed."""
    world = world_class(seed, keep=True)
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
    parser.add_argument("--world", choices=WORLDS, default="moves", help="what there is")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--tail", type=int, default=60, help="transcript lines of a failure")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    parser.add_argument("--totals", type=pathlib.Path, metavar="FILE", help="add up campaigns")
    parser.add_argument("--transcript", type=int, metavar="SEED", help="print one, and end")
    options = parser.parse_args()
    world_class = WORLDS[options.world]
    if options.transcript is not None:
        return show(options.transcript, world_class)
    campaign = Campaign()
    bars = sys.stderr.isatty()
    seeds = range(options.start, options.start + options.seeds)
    for ran in run_all(seeds, options.workers, world_class):
        campaign.add(ran)
        done = len(campaign.events)
        if bars and done % 20 == 0:
            bar = "#" * (40 * done // options.seeds)
            rate = done / campaign.took_s
            sys.stderr.write(f"\r[{bar:<40}] {done}/{options.seeds} {rate:.0f}/s ")
        if ran.failure is not None and not options.keep_going:
            break
    print(campaign.text())
    hits = campaign.hits
    if options.totals is not None:
        hits = campaign.save(options.totals)
        print(together(options.totals))
    print(table(hits))
    times, pair = rarest(hits)
    print(f"least often: {pair}, {times} times")
    failed = campaign.failed
    for checker, n in Counter(checker for _, checker, _ in failed).most_common():
        print(f"FAILED {n:>5} by {checker}")
    for seed, _, text in sorted(failed)[:20]:
        print(f"  {seed}: {text[:300]}")
    if failed:
        print(replay(min(failed)[0], options.tail, world_class))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
