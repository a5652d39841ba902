"""Calls, casts, spawns, moves and memory beside raw gRPC: the same as `migrate bench`."""

import sys

from migrate.tools.bench import main

if __name__ == "__main__":
    sys.exit(main())
