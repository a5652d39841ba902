"""migrate bench: what calls and moves cost on this machine, beside raw gRPC in the same run.

Every figure is the median of rounds that alternate with rounds of raw `grpc.aio` unary calls
between the same two processes, so that the ratios hold when the machine's speed drifts. Nothing
here is asserted; the figures are for people.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias

import grpc.aio
import psutil
from rich.console import Console
from rich.table import Table

import migrate
from migrate.errors import UsageError
from migrate.tools import bench_moves, loops
from migrate.tools.bench_servers import Blob, Counter
from migrate.tools.echo import ECHO, Echo
from migrate.tools.hops import HopFigure, size_text
from migrate.tools.hops import run as run_hops
from migrate.tools.plots import draw

WIDTH: Final = 256
SIZES: Final = {"1 KiB": 1 << 10, "1 MiB": 1 << 20, "50 MiB": 50 << 20}


@dataclass(frozen=True)
class Figure:
    """One measured thing. `ratio` is to raw gRPC (or what `beside` says), taken pairwise."""

    name: str
    value: float
    unit: str
    p99: float | None = None
    beside: str = ""
    ratio: float | None = None


async def round_trips(make: Callable[[], Awaitable[Any]], calls: int) -> list[float]:
    """Seconds of each of `calls` calls made one after the other."""
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        await make()
        times.append(time.perf_counter() - begun)
    return times


async def per_second(make: Callable[[], Awaitable[Any]], calls: int, width: int = WIDTH) -> float:
    """Calls a second with `width` of them in flight."""
    left = calls

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await make()

    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(width)))
    return calls / (time.perf_counter() - begun)


async def bare_queue(calls: int) -> list[float]:
    """A call and reply over a bare asyncio queue: the floor for a call on one node."""
    queue: asyncio.Queue[tuple[asyncio.Future[int], int]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    async def worker() -> None:
        n = 0
        while True:
            future, by = await queue.get()
            n += by
            future.set_result(n)

    async def call() -> int:
        future: asyncio.Future[int] = loop.create_future()
        await queue.put((future, 1))
        return await future

    task = asyncio.create_task(worker())
    try:
        return await round_trips(call, calls)
    finally:
        task.cancel()


def p(times: Sequence[float], share: float) -> float:
    """A percentile of `times`."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Bench:
    """All measurements, on a cluster of this process and two node processes."""

    def __init__(self, scale: float, say: Callable[[str], None]) -> None:
        self.scale = scale
        self.say = say
        self.figures: list[Figure] = []
        self.node: migrate.Node
        self.cluster: migrate.LocalCluster
        self.unary: Callable[[], Awaitable[Any]]

    def count(self, n: int) -> int:
        """`n` scaled to the length that was asked for."""
        return max(20, int(n * self.scale))

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Keep a figure."""
        self.figures.append(Figure(*args, **kwargs))

    async def run(self) -> list[Figure]:
        """Measure everything."""
        async with (
            Echo() as echo,
            grpc.aio.insecure_channel(echo.address) as channel,
            migrate.LocalCluster(nodes=2) as self.cluster,
            migrate.Node(
                "bench",
                directory=self.cluster.directory,
                secret_file=self.cluster.secret_file,
            ) as self.node,
        ):
            call: Any = channel.unary_unary(ECHO)  # type: ignore[call-arg]
            self.unary = lambda: call(b"0123456789abcdef")
            await round_trips(self.unary, 200)
            for step in (self.calls, self.rates, self.spawns, self.moves, self.many):
                self.say(step.__doc__ or "")
                await step()
        return self.figures

    async def calls(self) -> None:
        """round trips"""
        here = await self.node.spawn(Counter)
        there = await self.node.spawn(Counter, options=migrate.SpawnOptions(on="n1"))
        n = self.count(1000)
        raw: list[list[float]] = []
        bare: list[list[float]] = []
        runs: dict[str, list[list[float]]] = {"def": [], "async": [], "other": []}
        for _ in range(5):
            raw.append(await round_trips(self.unary, n))
            runs["other"].append(await round_trips(lambda: there.incr(1), n))
            bare.append(await bare_queue(5 * n))
            runs["def"].append(await round_trips(lambda: here.incr(1), 5 * n))
            runs["async"].append(await round_trips(lambda: here.incr_async(1), 5 * n))
        self._pair("raw grpc.aio unary, round trip", raw, raw, "")
        self._pair("call to another node, round trip", runs["other"], raw, "unary")
        self._pair("bare asyncio queue, call and reply", bare, bare, "")
        self._pair("call on the same node, def handler", runs["def"], bare, "queue")
        self._pair("call on the same node, async handler", runs["async"], bare, "queue")

    def _pair(
        self, name: str, runs: list[list[float]], others: list[list[float]], beside: str
    ) -> None:
        pairs = zip(runs, others, strict=True)
        ratio = statistics.median(p(a, 0.5) / p(b, 0.5) for a, b in pairs)
        self.add(
            name,
            statistics.median(p(run, 0.5) for run in runs) * 1e6,
            "us",
            p99=statistics.median(p(run, 0.99) for run in runs) * 1e6,
            beside=beside,
            ratio=ratio if beside else None,
        )

    async def rates(self) -> None:
        """calls a second, 256 in flight"""
        there = await self.node.spawn(Counter, options=migrate.SpawnOptions(on="n1"))
        kinds: dict[str, tuple[Callable[[], Awaitable[Any]], int]] = {
            "calls to another node, 256 in flight": (lambda: there.incr(1), 40_000),
            "the same, async handler": (lambda: there.incr_async(1), 20_000),
            "casts to another node, 256 in flight": (lambda: there.incr.cast(1), 40_000),
        }
        raw: list[float] = []
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(5):
            raw.append(await per_second(self.unary, self.count(4000)))
            for name, (make, n) in kinds.items():
                rates[name].append(await per_second(make, self.count(n)))
        self.add("raw grpc.aio unary, 256 in flight", statistics.median(raw), "/s")
        for name, found in rates.items():
            ratio = statistics.median(a / b for a, b in zip(found, raw, strict=True))
            self.add(name, statistics.median(found), "/s", beside="unary", ratio=ratio)

    async def spawns(self) -> None:
        """spawns, and memory of an idle server"""
        n1 = psutil.Process(self.cluster.node("n1").pid)
        on = migrate.SpawnOptions(on="n1")
        raw: list[float] = []
        rates: list[float] = []
        spawned = 0
        before = n1.memory_info().rss
        for _ in range(5):
            raw.append(await per_second(self.unary, self.count(2000), 64))
            n = self.count(1000)
            rates.append(await per_second(lambda: self.node.spawn(Counter, options=on), n, 64))
            spawned += n
        ratio = statistics.median(a / b for a, b in zip(rates, raw, strict=True))
        self.add(
            "spawns on another node, 64 in flight",
            statistics.median(rates),
            "/s",
            beside="unary",
            ratio=ratio,
        )
        grown = n1.memory_info().rss - before
        self.add(f"memory of an idle server (over {spawned})", grown / spawned, "B")

    async def moves(self) -> None:
        """moves by size"""
        for name, size in SIZES.items():
            ref = await self.node.spawn(Blob, size, options=migrate.SpawnOptions(on="n1"))
            await ref.touch()
            rounds = 5 if size > 1 << 24 else self.count(100)
            down: list[float] = []
            total: list[float] = []
            raw: list[float] = []
            for i in range(rounds):
                report = await self.node.migrate(ref, to=("n2", "n1")[i % 2])
                down.append(report.downtime_s)
                total.append(report.total_s)
                raw += await round_trips(self.unary, 10)
            unary = p(raw, 0.5)
            self.add(
                f"move of {name}, downtime",
                p(down, 0.5) * 1e3,
                "ms",
                p99=p(down, 0.99) * 1e3,
                beside="unary",
                ratio=p(down, 0.5) / unary,
            )
            self.add(
                f"move of {name}, total",
                p(total, 0.5) * 1e3,
                "ms",
                p99=p(total, 0.99) * 1e3,
                beside="unary",
                ratio=p(total, 0.5) / unary,
            )
            await self.node.stop(ref)

    async def many(self) -> None:
        """1,000 servers moved at once"""
        on = migrate.SpawnOptions(on="n1")
        refs = [await self.node.spawn(Counter, options=on) for _ in range(self.count(1000))]
        raw: list[float] = []
        rates: list[float] = []
        for i in range(4):
            raw.append(await per_second(self.unary, self.count(2000), 64))
            to = ("n2", "n1")[i % 2]
            begun = time.perf_counter()
            await asyncio.gather(*(self.node.migrate(ref, to=to) for ref in refs))
            rates.append(len(refs) / (time.perf_counter() - begun))
        ratio = statistics.median(a / b for a, b in zip(rates, raw, strict=True))
        self.add(
            f"moves of {len(refs)} small servers at once",
            statistics.median(rates),
            "/s",
            beside="unary",
            ratio=ratio,
        )


def show(figures: Sequence[Figure], before: Mapping[str, float], console: Console) -> None:
    """Print the figures as a table, beside those of an earlier run."""
    table = Table(
        title=f"livemigrate {migrate.__version__}, Python {sys.version.split()[0]}, "
        f"{os.cpu_count()} cores"
    )
    _columns(table, "", "median:", "p99:", "", "beside:", *(["to before:"] if before else []))
    for f in figures:
        beside = f"{f.ratio:.2f} x {f.beside}" if f.ratio is not None else ""
        p99 = f"{f.p99:,.1f}" if f.p99 is not None else ""
        row = [f.name, f"{f.value:,.1f}", p99, f.unit, beside]
        table.add_row(*row, *([_ratio(f.value, before.get(f.name))] if before else []))
    console.print(table)


def show_hops(
    figures: Sequence[HopFigure], before: Mapping[tuple[str, int], float], console: Console
) -> None:
    """Print what each kind of hop costs by size, beside an earlier run's p50."""
    table = Table(title="one message there and its answer, by kind of hop and size")
    names = ("hop", "size:", "p50 us:", "p99 us:", "p99.9 us:", "messages/s:", "MB/s:", "CPU us:")
    _columns(table, *names, *(["p50 to before:"] if before else []))
    for f in figures:
        row = [f.hop, size_text(f.size)]
        values = (f.p50_us, f.p99_us, f.p999_us, f.per_s, f.mb_per_s, f.cpu_us)
        row += ["" if v is None else f"{v:,.1f}" if v < 100 else f"{v:,.0f}" for v in values]
        if before:
            row.append(_ratio(f.p50_us, before.get((f.hop, f.size))))
        table.add_row(*row, end_section=f.hop == figures[-1].hop)
    console.print(table)


def _wide() -> Console:
    """Standard output, as wide as the tables where nobody says how wide it is."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name.removesuffix(":"), justify="right" if name[-1:] == ":" else "left")


def _ratio(now: float, before: float | None) -> str:
    return "" if not before else f"{now / before:.2f}"


Earlier: TypeAlias = tuple[dict[str, float], dict[tuple[str, int], float]]


def earlier(path: str) -> Earlier:
    """What an earlier run wrote: its figures by name, and p50 of its hops by name and size.

    Raises:
        UsageError: The file is not there, or is something else.
    """
    try:
        told = json.loads(pathlib.Path(path).read_text())
        return (
            {figure["name"]: float(figure["value"]) for figure in told["figures"]},
            {(hop["hop"], int(hop["size"])): float(hop["p50_us"]) for hop in told["hops"]},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} holds no earlier run; make one by `migrate bench --out {path}`",
            cause=str(error),
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements; the exit status is 0 once they are done.

    Raises:
        MigrateError: A file cannot be read or written, or a peer not be reached.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["moves"]:
        return bench_moves.main(given[1:])
    parser = argparse.ArgumentParser(
        prog="migrate bench",
        description=__doc__,
        epilog="`migrate bench moves` measures moves by size and write rate; see its --help.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--scale", type=float, default=1.0, help="length of the runs (default 1)")
    parser.add_argument("--only", choices=("hops", "figures"), help="measure only these")
    parser.add_argument("--peer", metavar="HOST:PORT", help="a node to measure hops to as well")
    parser.add_argument("--secret-file", metavar="FILE", help="the secret of that node's cluster")
    parser.add_argument("--out", metavar="FILE", help="write the JSON object to a file too")
    parser.add_argument("--compare", metavar="FILE", help="show ratios to a run that --out wrote")
    parser.add_argument("--plot", metavar="FILE", help="draw the hops as .svg or .png")
    options = parser.parse_args(arguments)
    before: Earlier = ({}, {}) if options.compare is None else earlier(options.compare)
    if options.plot is not None:
        # Before the minutes that it takes to measure.
        draw([], options.plot)
    err = Console(stderr=True)

    def say(text: str) -> None:
        err.print(f"measuring {text} ...")

    figures: list[Figure] = []
    hops: list[HopFigure] = []
    if options.only != "hops":
        figures = loops.run(Bench(options.scale, say).run())
    if options.only != "figures":
        hops = loops.run(run_hops(options.scale, options.peer, options.secret_file, say))
    result = {
        "version": migrate.__version__,
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "loop": "asyncio" if loops.loop_factory() is None else "uvloop",
        "figures": [asdict(figure) for figure in figures],
        "hops": [asdict(hop) for hop in hops],
    }
    if options.out is not None:
        try:
            pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"{options.out} cannot be written", cause=str(error)) from error
    if options.plot is not None:
        draw(hops, options.plot)
    if options.json:
        print(json.dumps(result))
        return 0
    if figures:
        show(figures, before[0], _wide())
    if hops:
        show_hops(hops, before[1], _wide())
    return 0


if __name__ == "__main__":
    sys.exit(main())
