"""Random programs by the ten thousand: `python -m tests.serializers.stream_campaign --runs N`.

Each is run with the engine and the memory that its seed chooses, as a stream that ends or as
several that go on, and with records of all kinds or with flat ones, so that all sixteen kinds come
up alike. Exit status 1 if a reader ever had another object; the seed is told, and `--first SEED
--runs 1` runs it again.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
import traceback
from typing import Any

from tests.serializers import stream_programs

KINDS: tuple[tuple[Any, bool], ...] = (
    ("pages", False),
    ("hash", False),
    ("pages", True),
    ("hash", True),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--go-on", action="store_true", help="tell of all failures, not the first")
    chosen = parser.parse_args()
    began = time.monotonic()
    count: collections.Counter[str] = collections.Counter()
    failed = 0
    with stream_programs.small_thresholds():
        for seed in range(chosen.first, chosen.first + chosen.runs):
            engine, memory = KINDS[seed % len(KINDS)]
            goes_on = seed // len(KINDS) % 2 == 1
            run = stream_programs.run_followed if goes_on else stream_programs.run
            is_flat = seed // len(KINDS) // 2 % 2 == 1
            kind = stream_programs.FlatProgram if is_flat else stream_programs.Program
            try:
                count.update(run(seed, engine, memory, kind))
            except Exception:
                failed += 1
                print(
                    f"seed {seed} ({engine}, memory {memory}, goes on: {goes_on}, flat: {is_flat}):"
                )
                traceback.print_exc(limit=-4, file=sys.stdout)
                if not chosen.go_on:
                    break
            done = seed + 1 - chosen.first
            if done % 1000 == 0:
                print(f"{done} programs, {failed} failed", flush=True)
    took = time.monotonic() - began
    print(f"{chosen.runs} programs in {took:.0f} s, {failed} failed; {dict(count)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
