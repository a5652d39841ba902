"""Prints the table: `python -m tests.serializers.corpus [--help]`."""

from __future__ import annotations

import argparse
import sys

from .runner import HOPS, TOOLS, VARIANTS, failures, run, select, table


def main() -> int:
    """Run what the command line asks for; 1 if ours did not do as each case asks."""
    parser = argparse.ArgumentParser(prog="python -m tests.serializers.corpus", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="only cases with this in their name")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: all")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: all")
    parser.add_argument("--hops", action="append", type=int, choices=HOPS, help="default: all")
    parser.add_argument("-v", "--verbose", action="store_true", help="list what failed, and why")
    options = parser.parse_args()
    outcomes = run(
        select(options.pattern),
        options.tool or TOOLS,
        options.variant or VARIANTS,
        options.hops or HOPS,
    )
    if options.verbose:
        print(failures(outcomes))
    print(table(outcomes))
    return int(any(o.tool == "ours" and not o.good for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
