"""Measure the directory as its callers see it: `python tests/bench/bench_directory.py`.

For each home: the time of an uncontended compare-and-swap, of a read, of 200 compare-and-swaps
asked for at once, and from before a swap until a watcher on another directory object has it. For
SQLite also until a watcher in another process has it; a swap while three other processes write;
and the bare commit of the same rows without any of this project's code, which is what the disk
allows. etcd is one server on loopback, where there is one. Times are milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from migrate.shell.directories import (  # noqa: E402 - the path comes first.
    Compare,
    Directory,
    EtcdDirectory,
    MemoryDirectory,
    Put,
    SqliteDirectory,
)
from tests.cluster import etcd_servers  # noqa: E402

VALUE = b"x" * 120
"""About the size of a server's row."""


def report(home: str, what: str, times_s: list[float]) -> None:
    times_s.sort()
    p50, p99 = (times_s[int(len(times_s) * share)] * 1000 for share in (0.5, 0.99))
    print(f"{home:8} {what:44} {p50:9.3f} {p99:9.3f} {times_s[-1] * 1000:9.3f}", flush=True)


async def swap(directory: Directory, key: str, rev: int) -> int:
    done = await directory.txn([Compare(key, rev)], [Put(key, VALUE)], [])
    assert done.ok
    return done.rev


async def measure_swaps(directory: Directory, key: str, count: int) -> list[float]:
    times_s: list[float] = []
    entry = await directory.get(key)
    rev = 0 if entry is None else entry.rev
    for _ in range(count):
        before_s = time.perf_counter()
        rev = await swap(directory, key, rev)
        times_s.append(time.perf_counter() - before_s)
    return times_s


async def measure_reads(directory: Directory, key: str, count: int) -> list[float]:
    times_s: list[float] = []
    for _ in range(count):
        before_s = time.perf_counter()
        await directory.get(key)
        times_s.append(time.perf_counter() - before_s)
    return times_s


async def measure_bursts(directory: Directory, size: int, count: int) -> list[float]:
    times_s: list[float] = []
    revs = [0] * size
    for _ in range(count):
        before_s = time.perf_counter()
        swaps = (swap(directory, f"burst/{i}", rev) for i, rev in enumerate(revs))
        revs = await asyncio.gather(*swaps)
        times_s.append(time.perf_counter() - before_s)
    return times_s


async def measure_watch(writer: Directory, reader: Directory, count: int) -> list[float]:
    times_s: list[float] = []
    _, rev = await reader.list("watched")
    watch = reader.watch("watched", rev + 1)
    rev = 0
    for _ in range(count):
        waiting = asyncio.ensure_future(anext(watch))
        # The watcher is waiting when the swap begins, as a node's is.
        await reader.get("watched")
        before_s = time.perf_counter()
        swapping = asyncio.ensure_future(swap(writer, "watched", rev))
        await waiting
        times_s.append(time.perf_counter() - before_s)
        rev = await swapping
    return times_s


async def measure(home: str, make: Callable[[], Directory], count: int) -> None:
    async with make() as directory:
        report(home, "compare-and-swap", await measure_swaps(directory, "k", count))
        report(home, "get", await measure_reads(directory, "k", count))
        report(home, "200 swaps at once, all", await measure_bursts(directory, 200, count // 50))
        async with make() as reader:
            times_s = await measure_watch(directory, reader, count)
            report(home, "swap seen by a watcher of another object", times_s)


async def load(path: str, key: str) -> None:
    """Swap once every 10 ms until killed, as a busy node does; the value is the time before."""
    async with SqliteDirectory(path) as directory:
        rev = 0
        say_ready()
        while True:
            value = b"%d" % time.perf_counter_ns()
            done = await directory.txn([Compare(key, rev)], [Put(key, value)], [])
            rev = done.rev
            await asyncio.sleep(0.01)


def say_ready() -> None:
    print("ready", flush=True)


@contextlib.asynccontextmanager
async def loads(path: str, processes: int) -> AsyncIterator[None]:
    """Run that many processes that write, for the time of the block."""
    with contextlib.ExitStack() as children:
        for number in range(processes):
            child = await asyncio.to_thread(
                subprocess.Popen,
                [sys.executable, __file__, "--load", path, f"load/{number}"],
                stdout=subprocess.PIPE,
            )
            children.enter_context(child)
            children.callback(child.kill)
            assert child.stdout is not None
            await asyncio.to_thread(child.stdout.readline)
        yield


async def measure_loaded(path: str, count: int) -> None:
    async with loads(path, 3), SqliteDirectory(path) as directory:
        times_s = await measure_swaps(directory, "loaded", count)
        report("sqlite", "compare-and-swap, 3 other processes writing", times_s)


async def measure_watch_across(path: str, count: int) -> None:
    times_s: list[float] = []
    async with loads(path, 1), SqliteDirectory(path) as directory:
        _, rev = await directory.list("")
        async for [change] in directory.watch("load/", rev + 1):
            # The performance counter is the host's monotonic clock, one for all processes.
            times_s.append((time.perf_counter_ns() - int(change.value or b"")) / 1e9)
            if len(times_s) == count:
                break
    report("sqlite", "swap seen by a watcher of another process", times_s)


def measure_bare(path: str, count: int) -> None:
    times_s: list[float] = []
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE entry(key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID")
        connection.execute("CREATE TABLE log(id INTEGER PRIMARY KEY, value BLOB)")
        for _ in range(count):
            before_s = time.perf_counter()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT OR REPLACE INTO entry VALUES('k', ?)", (VALUE,))
            connection.execute("INSERT INTO log(value) VALUES(?)", (VALUE,))
            connection.execute("COMMIT")
            times_s.append(time.perf_counter() - before_s)
    report("(bare)", "commit of the same rows, no thread, no loop", times_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=1000, help="operations of each kind")
    parser.add_argument("--folder", help="where the databases are made; default: a temporary one")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        asyncio.run(load(*arguments.load))
        return
    print(f"{'home':8} {'what':44} {'p50 ms':>9} {'p99 ms':>9} {'max ms':>9}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        count = arguments.count
        asyncio.run(measure("memory", lambda: MemoryDirectory("bench"), count))
        asyncio.run(measure("sqlite", lambda: SqliteDirectory(f"{folder}/a.db"), count))
        asyncio.run(measure_watch_across(f"{folder}/b.db", count))
        asyncio.run(measure_loaded(f"{folder}/c.db", count))
        measure_bare(f"{folder}/d.db", count)
        if etcd_servers.BINARY is not None:
            with etcd_servers.etcd_server(Path(folder), heartbeat_ms=100) as server:
                asyncio.run(measure("etcd", lambda: EtcdDirectory([server.address]), count))


if __name__ == "__main__":
    main()
