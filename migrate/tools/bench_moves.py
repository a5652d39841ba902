"""What a move costs by the size of a state and how fast it is written, with and without pre-copy.

Two pairs of node processes run side by side: one sends large states ahead, the other sends them in
one piece at the quiescent point. The same server is moved to and fro in each of them in turn, while
a timer of its own writes to its state; so the two are compared under the same load of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import psutil
from rich.console import Console
from rich.table import Table

import migrate
from migrate.tools import plots
from migrate.tools.bench_servers import Written

MIB: Final = 1 << 20
KINDS: Final = ("arrays", "records", "mixed")
SIZES_MIB: Final = (1, 10, 50, 200)
RATES: Final = (0.0, 0.01, 1.0)
"""Shares of the state that are written in a second."""
RECORDS_MIB_MAX: Final = 50
"""Larger states of records alone take minutes to make, and show nothing new."""
SAMPLE_S: Final = 0.005
ONE_PIECE: Final = 1 << 62


@dataclass(frozen=True)
class Cost:
    """Moves of one kind of state: medians.

    Attributes:
        kind: arrays, records or mixed.
        size_bytes: What the state takes when it is captured, roughly.
        rate: Share of it that is written in a second.
        precopy: Whether it was sent ahead.
        downtime_s: Median.
        downtime_max_s: Longest.
        total_s: Median.
        sent_bytes: Median of all that crossed, rounds together.
        rounds: Median.
        extra_bytes: Median of the most memory that both nodes took above what they had before.
        moves: How many.
    """

    kind: str
    size_bytes: int
    rate: float
    precopy: bool
    downtime_s: float
    downtime_max_s: float
    total_s: float
    sent_bytes: float
    rounds: float
    extra_bytes: float
    moves: int


class _Peak:
    """The most memory that some processes took together, sampled."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self.before = self._now()
        self.most = self.before

    def _now(self) -> int:
        return sum(process.memory_info().rss for process in self._processes)

    async def watch(self) -> None:
        while True:
            self.most = max(self.most, self._now())
            await asyncio.sleep(SAMPLE_S)


@contextlib.asynccontextmanager
async def _pairs() -> AsyncIterator[dict[bool, migrate.LocalCluster]]:
    one_piece = migrate.NodeOptions(precopy_bytes_min=ONE_PIECE)
    async with (
        migrate.LocalCluster(nodes=2) as ahead,
        migrate.LocalCluster(nodes=2, options=one_piece) as whole,
    ):
        yield {True: ahead, False: whole}


async def _measure(
    pairs: dict[bool, migrate.LocalCluster], kind: str, size: int, rate: float, moves: int
) -> list[Cost]:
    refs: dict[bool, Any] = {}
    for precopy, cluster in pairs.items():
        on = migrate.SpawnOptions(on="n1")
        refs[precopy] = await cluster.client.spawn(Written, kind, size, rate, options=on)
        # Once to and fro: modules are imported, and the size becomes known.
        await cluster.client.migrate(refs[precopy], to="n2")
        await cluster.client.migrate(refs[precopy], to="n1")
    reports: dict[bool, list[migrate.MoveReport]] = {True: [], False: []}
    extras: dict[bool, list[int]] = {True: [], False: []}
    for move in range(moves):
        # In both orders: who comes second meets what the first one leaves to be cleaned up.
        for precopy, cluster in list(pairs.items())[:: -1 if move // 2 % 2 else 1]:
            await refs[precopy].touch()
            peak = _Peak([node.pid for node in cluster.nodes])
            watching = asyncio.create_task(peak.watch())
            try:
                report = await cluster.client.migrate(refs[precopy], to=("n2", "n1")[move % 2])
            finally:
                watching.cancel()
            reports[precopy].append(report)
            extras[precopy].append(peak.most - peak.before)
    for precopy, cluster in pairs.items():
        await cluster.client.stop(refs[precopy])
    size_bytes = int(statistics.median(report.bytes_sent for report in reports[False]))
    return [
        Cost(
            kind=kind,
            size_bytes=size_bytes,
            rate=rate,
            precopy=precopy,
            downtime_s=statistics.median(report.downtime_s for report in found),
            downtime_max_s=max(report.downtime_s for report in found),
            total_s=statistics.median(report.total_s for report in found),
            sent_bytes=statistics.median(report.bytes_sent for report in found),
            rounds=statistics.median(report.rounds for report in found),
            extra_bytes=statistics.median(extras[precopy]),
            moves=len(found),
        )
        for precopy, found in reports.items()
    ]


async def measure(
    kinds: Sequence[str],
    sizes: Sequence[int],
    rates: Sequence[float],
    moves: int,
    say: Callable[[str], None],
) -> list[Cost]:
    """Measure moves of states of each kind, size and rate.

    Args:
        kinds: Of `KINDS`.
        sizes: Bytes of the states, roughly.
        rates: Shares that are written in a second.
        moves: Moves of each.
        say: Told what is being measured.
    """
    costs: list[Cost] = []
    async with _pairs() as pairs:
        for kind in kinds:
            for size in sizes:
                if kind == "records" and size > RECORDS_MIB_MAX * MIB:
                    continue
                for rate in rates:
                    say(f"{kind}, {size / MIB:g} MiB, {rate:.0%} written a second")
                    costs += await _measure(pairs, kind, size, rate, moves)
    return costs


def show(costs: Sequence[Cost], console: Console) -> None:
    """Print the costs as a table."""
    table = Table(title="moves: pre-copy against one piece, in turn")
    for column in (
        *("state", "MiB", "written/s", "pre-copy", "downtime ms", "max", "of one piece"),
        *("total ms", "rounds", "sent MiB", "extra MiB"),
    ):
        table.add_column(column, justify="left" if column == "state" else "right")
    whole = {(cost.kind, cost.size_bytes, cost.rate): cost for cost in costs if not cost.precopy}
    for cost in costs:
        beside = whole[cost.kind, cost.size_bytes, cost.rate]
        table.add_row(
            cost.kind,
            f"{cost.size_bytes / MIB:.1f}",
            f"{cost.rate:.0%}",
            "yes" if cost.precopy else "no",
            f"{cost.downtime_s * 1e3:.1f}",
            f"{cost.downtime_max_s * 1e3:.1f}",
            f"{cost.downtime_s / beside.downtime_s:.2f}",
            f"{cost.total_s * 1e3:.0f}",
            f"{cost.rounds:g}",
            f"{cost.sent_bytes / MIB:.1f}",
            f"{cost.extra_bytes / MIB:.1f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit status is 0 once that is done."""
    parser = argparse.ArgumentParser(prog="migrate bench moves", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--kind", action="append", choices=KINDS, help="repeatable; all by default")
    parser.add_argument(
        "--mib", action="append", type=float, help=f"sizes, repeatable (default {SIZES_MIB})"
    )
    parser.add_argument(
        "--rate",
        action="append",
        type=float,
        help=f"share of the state written in a second, repeatable (default {RATES})",
    )
    parser.add_argument("--moves", type=int, default=9, help="moves of each (default 9)")
    parser.add_argument("--plot", metavar="FILE", help="draw downtimes as .svg or .png")
    options = parser.parse_args(arguments)
    if options.moves < 1 or any(mib <= 0 for mib in options.mib or ()):
        parser.error("--moves and --mib take positive numbers")
    if options.plot is not None:
        # Before the minutes that it takes to measure.
        plots.draw_moves([], options.plot)
    err = Console(stderr=True)
    costs = asyncio.run(
        measure(
            options.kind or KINDS,
            [int(mib * MIB) for mib in options.mib or SIZES_MIB],
            options.rate if options.rate is not None else RATES,
            options.moves,
            lambda text: err.print(f"measuring {text} ..."),
        )
    )
    if options.json:
        print(json.dumps({"moves": [asdict(cost) for cost in costs]}))
    else:
        show(costs, Console())
    if options.plot is not None:
        plots.draw_moves(costs, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
