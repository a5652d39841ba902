"""Measure what one etcd holds and does, and simulate a directory in partitions.

`python -m tests.bench.bench_growth etcd [--rows N]` starts an etcd, stores the rows of N servers as
`spawn` does, moves servers between two real nodes, and reports bytes for each server, revisions for
each move, and swaps a second.

`python -m tests.bench.bench_growth partitions [--servers N] [--nodes N]` simulates the directory
that GROWTH.md describes: every server is drawn, hashed and counted, in pieces; nothing is
extrapolated but what the output says.

`python -m tests.bench.bench_growth idle [--servers N]` spawns servers that do nothing on one node,
and tells what its process has grown by for each.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import migrate
from migrate.core.directory import Row, RowState, committed
from migrate.shell import wire
from migrate.shell.directories import Compare, EtcdDirectory, Put
from migrate.shell.directories import etcd as etcd_home
from migrate.shell.driver import NAME_KEY, SERVER_KEY
from migrate.tools.bench import per_second
from migrate.tools.bench_servers import Counter as IdleCounter
from rpc.v1 import etcd_pb2
from tests.cluster.etcd_servers import EtcdServer, etcd_server
from tests.migrate.servers import Counter

MIB = 1 << 20


def row(number: int, owner: str = "node-17@0123456789abcdef") -> Row:
    """A row as a server with a name and a few methods has it."""
    server = f"session-{hashlib.sha256(b'%d' % number).hexdigest()[:16]}"
    methods = ("join", "leave", "say", "history")
    transfer = f"{owner}/{number}"
    return Row(
        server, 1, owner, RowState.ACTIVE, transfer, f"session {number}", "chat:Session", 1, methods
    )


def tell(what: str, value: float, unit: str = "") -> None:
    print(f"  {what:<66}{value:>14,.1f} {unit}", flush=True)


# ------------------------------------------------------------------------------------ etcd


def size_of(server: EtcdServer) -> tuple[int, int]:
    """Bytes of etcd's database file, and of its memory."""
    file = server.folder / f"{server.name}.etcd" / "member" / "snap" / "db"
    assert server.process is not None
    return file.stat().st_size, psutil.Process(server.process.pid).memory_info().rss


async def compacted(directory: EtcdDirectory) -> float:
    _, rev = await directory.list("\U0010ffff")
    request = etcd_pb2.CompactionRequest(revision=rev + etcd_home._OFFSET, physical=True)
    method = etcd_home._Method("/etcdserverpb.KV/Compact", etcd_pb2.CompactionResponse)
    began_s = time.perf_counter()
    await directory._ask(method, request, etcd_home._Once.AGAIN)
    return time.perf_counter() - began_s


async def measure_rows(server: EtcdServer, rows: int) -> None:
    async with EtcdDirectory([server.address], call_timeout_s=60, patience_s=60) as directory:
        file_before, memory_before = size_of(server)
        key_bytes = value_bytes = 0
        began_s = time.perf_counter()
        stored: list[tuple[Row, int]] = []

        async def spawn(number: int) -> None:
            nonlocal key_bytes, value_bytes
            it = row(number)
            data = wire.encode_row(it)
            key_bytes += len(SERVER_KEY) + len(it.server) + len(NAME_KEY) + len(it.name)
            value_bytes += len(data) + len(it.server)
            key, name = SERVER_KEY + it.server, NAME_KEY + it.name
            puts = [Put(key, data), Put(name, it.server.encode())]
            done = await directory.txn([Compare(key, 0), Compare(name, 0)], puts, [])
            stored.append((it, done.rev))

        for start in range(0, rows, 1000):
            await asyncio.gather(*map(spawn, range(start, min(rows, start + 1000))))
        took_s = time.perf_counter() - began_s
        file, memory = size_of(server)
        tell("keys and values of a named server", (key_bytes + value_bytes) / rows, "bytes")
        tell("etcd's database file, for each", (file - file_before) / rows, "bytes")
        tell("etcd's memory, for each", (memory - memory_before) / rows, "bytes")
        tell("spawns a second, 128 at a time", rows / took_s)
        began_s = time.perf_counter()
        entries, _ = await directory.list(SERVER_KEY)
        assert len(entries) == rows
        tell("seconds to list all, as a burial does", time.perf_counter() - began_s, "s")

        # What each move writes: the source's swap.
        moves = min(rows, 20_000)
        began_s = time.perf_counter()

        async def swap(number: int) -> None:
            it, rev = stored[number]
            gone = committed(it, "node-18@0123456789abcdef", f"node-17/{number}", 1)
            key = SERVER_KEY + it.server
            done = await directory.txn([Compare(key, rev)], [Put(key, wire.encode_row(gone))], [])
            assert done.ok

        for start in range(0, moves, 1000):
            await asyncio.gather(*map(swap, range(start, min(moves, start + 1000))))
        took_s = time.perf_counter() - began_s
        after, _ = size_of(server)
        tell("compare-and-swaps a second, 128 at a time", moves / took_s)
        tell("database file for each swap, until it is compacted", (after - file) / moves, "bytes")
        tell("seconds to compact them all", await compacted(directory), "s")


async def measure_moves(server: EtcdServer, moves: int) -> None:
    url = f"etcd://{server.address}/moves"
    async with (
        EtcdDirectory([server.address], "moves") as directory,
        migrate.Node("a", directory=url) as a,
        migrate.Node("b", directory=url) as b,
    ):
        ref = await a.spawn(Counter)
        await a.migrate(ref, to="b")
        for what, idle in (("a move", False), ("a call", True)):
            _, before = await directory.list("")
            for turn in range(moves):
                if idle:
                    await a.call(ref, Counter.incr, 1)
                else:
                    await b.migrate(ref, to="ab"[turn % 2])
            _, after = await directory.list("")
            tell(f"revisions for {what}", (after - before) / moves)
        _, before = await directory.list("")
        await asyncio.sleep(10)
        _, after = await directory.list("")
        tell("revisions in 10 s of a node that is idle (leases write none)", after - before)


def measure_etcd(rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        quota = ["--quota-backend-bytes", str(8 << 30)]
        with etcd_server(Path(folder), heartbeat_ms=100, extra=quota) as server:
            print(f"one etcd, {rows:,} named servers", flush=True)
            asyncio.run(measure_rows(server, rows))
            asyncio.run(measure_moves(server, 100))


# -------------------------------------------------------------------------------- partitions

PIECE = 4_000_000


async def measure_idle(servers: int) -> None:
    """Spawn servers, a tenth at a time, and tell what each takes of the node's resident memory."""
    async with migrate.LocalCluster(nodes=1) as cluster:
        process = psutil.Process(cluster.nodes[0].pid)
        before = last = process.memory_info().rss
        begun = time.perf_counter()
        for tenth in range(1, 11):
            count = servers // 10
            await per_second(lambda: cluster.client.spawn(IdleCounter), count, 64)
            now = process.memory_info().rss
            tell(f"bytes for each of the last {count:,}", (now - last) / count)
            tell(f"bytes for each of {count * tenth:,}", (now - before) / (count * tenth))
            last = now
        tell("spawns a second", servers / (time.perf_counter() - begun))


def mixed(numbers: Any, salt: int) -> Any:
    """A hash of 64 bits for each number (splitmix64), as a server's id is one."""
    x = numbers.astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) % (1 << 64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bytes_of_rows(count: int = 10_000) -> tuple[float, float]:
    """Memory of a row in a partition's table, and look-ups a second in it: measured here."""
    process = psutil.Process()
    before = process.memory_info().rss
    tables = [{(it := row(n)).server: wire.encode_row(it) for n in range(count)} for _ in range(20)]
    each = (process.memory_info().rss - before) / (20 * count)
    table = tables[0]
    wanted = [*table] * 10
    began_s = time.perf_counter()
    for server in wanted:
        wire.decode_row(table[server])
    return each, len(wanted) / (time.perf_counter() - began_s)


def simulate(servers: int, nodes: int, partitions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    print(f"{servers:,} servers on {nodes:,} nodes, {partitions:,} partitions, seed {seed}")
    row_bytes, look_ups = bytes_of_rows()
    # Each node owns as many partitions as any other, and follows as many as a standby.
    owner = rng.permutation(np.arange(partitions) % nodes)
    standby = (owner + rng.integers(1, nodes, partitions)) % nodes
    dead = int(rng.integers(nodes))
    rows_of = np.zeros(partitions, np.int64)
    hosted = np.zeros(nodes, np.int64)
    orphans = np.zeros(partitions, np.int64)
    asked = np.zeros(partitions, np.int64)
    began_s = time.perf_counter()
    for start in range(0, servers, PIECE):
        numbers = np.arange(start, min(servers, start + PIECE))
        where = (mixed(numbers, 0) % np.uint64(partitions)).astype(np.int64)
        on = (mixed(numbers, 1) % np.uint64(nodes)).astype(np.int64)
        rows_of += np.bincount(where, minlength=partitions)
        hosted += np.bincount(on, minlength=nodes)
        orphans += np.bincount(where[on == dead], minlength=partitions)
        # A second of look-ups: of each server with a chance of 1 %, of the first million, which
        # are everybody's, ten times as often.
        share = np.where(numbers < 1_000_000, 0.1, 0.01)
        asked += np.bincount(where[rng.random(len(numbers)) < share], minlength=partitions)
    rows = np.bincount(owner, rows_of, nodes) + np.bincount(standby, rows_of, nodes)
    asks = np.bincount(owner, asked, nodes)
    print(f"  ({time.perf_counter() - began_s:.0f} s, every server drawn)")
    tell("memory of a row in a table, measured", row_bytes, "bytes")
    tell("rows at a node, owned and followed, mean", rows.mean())
    tell("rows at a node, owned and followed, largest", rows.max())
    tell("memory of tables, largest", rows.max() * row_bytes / MIB, "MiB")
    # By partition: owner, standby and epoch of each.
    tell("memory of the map of partitions, every node", partitions * 16 / MIB, "MiB")
    tell("etcd: rows", partitions + nodes)
    tell("etcd: bytes, at the 376 a row takes there", (partitions + nodes) * 376 / MIB, "MiB")
    tell("look-ups a second in a table, one core, measured", look_ups)
    tell("look-ups a second in all, as drawn", asked.sum())
    tell("look-ups a second at a node, mean", asks.mean())
    tell("look-ups a second at a node, largest", asks.max())
    print("  a node is lost:")
    lost = owner == dead
    followed = standby == dead
    tell("servers that it hosted", hosted[dead])
    tell("partitions that it owned: swaps at etcd, standbys take over", lost.sum())
    tell("partitions that it followed: swaps at etcd, new standbys", followed.sum())
    copies = rows_of[lost].sum() + rows_of[followed].sum()
    tell("rows copied to new standbys", copies)
    tell("bytes copied to new standbys", copies * row_bytes / MIB, "MiB")
    touched = owner[orphans > 0]
    tell("owners of partitions with rows of its servers", len(np.unique(touched)))
    burden = np.bincount(owner, orphans, nodes)
    tell("rows that one owner has to write, largest", burden.max())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_growth", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    etcd = verbs.add_parser("etcd")
    etcd.add_argument("--rows", type=int, default=100_000)
    parts = verbs.add_parser("partitions")
    parts.add_argument("--servers", type=int, default=100_000_000)
    parts.add_argument("--nodes", type=int, default=10_000)
    parts.add_argument("--partitions", type=int, default=65_536)
    parts.add_argument("--seed", type=int, default=1)
    idle = verbs.add_parser("idle")
    idle.add_argument("--servers", type=int, default=100_000)
    options = parser.parse_args()
    if options.verb == "etcd":
        measure_etcd(options.rows)
    elif options.verb == "idle":
        asyncio.run(measure_idle(options.servers))
    else:
        simulate(options.servers, options.nodes, options.partitions, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
