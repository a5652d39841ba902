"""Costs of links against raw gRPC, between two processes on this machine.

Run `python tests/bench/bench_links.py [--uvloop]` at the root of a checkout.
Ping-pong is measured in short turns of each kind, one after the other, so that
whatever else the machine does meets all kinds alike; the medians are of all
turns together. `--json` prints the figures for programs.

As a test it asserts only that all figures came out, since a shared machine
promises no ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from rpc.links import Links, PeerInfo

SECRET = b"a secret for measurements only.."
SMALL = b"x" * 300
BULK_BYTES = 50 * 1024 * 1024
TURNS = 12
ROUND_TRIPS = 150
BURST = 20_000


class Echo:
    """Sends back what begins with `e`; counts the rest and tells when told to."""

    def __init__(self) -> None:
        self.links: Links | None = None
        self.count = 0

    def link_up(self, peer: PeerInfo) -> None:
        pass

    def link_down(self, peer: PeerInfo, cause: str) -> None:
        pass

    def received(self, peer_id: str, data: bytes | bytearray | memoryview) -> None:
        assert self.links is not None
        if data[:1] == b"e":
            self.links.send(peer_id, data)
        elif data[:1] == b"l" or len(data) == BULK_BYTES:
            self.links.send(peer_id, b"done")

    def dial_failed(self, address: str, expected_id: str | None, error: Exception) -> None:
        raise error

    def accept_failed(self, address: str, error: Exception) -> None:
        raise error


class Caller(Echo):
    def __init__(self) -> None:
        super().__init__()
        self.waiter: asyncio.Future[None] | None = None

    def received(self, peer_id: str, data: bytes | bytearray | memoryview) -> None:
        if self.waiter is not None:
            self.waiter.set_result(None)


def add_raw(server: grpc.aio.Server) -> None:
    async def stream(_requests: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    async def unary(request: bytes, _context: Any) -> bytes:
        return request

    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "raw",
                {
                    "stream": grpc.stream_stream_rpc_method_handler(stream),
                    "unary": grpc.unary_unary_rpc_method_handler(unary),
                },
            ),
        )
    )


async def serve() -> None:
    echo = Echo()
    links = Links(PeerInfo("server", "server", "node", "", os.getpid()), SECRET, echo)
    echo.links = links
    print(await links.listen("127.0.0.1:0", [add_raw]), flush=True)
    # The parent closes our input when it is done.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await links.close()


async def measure(address: str) -> dict[str, float]:
    caller = Caller()
    links = Links(PeerInfo("caller", "caller", "client", "", os.getpid()), SECRET, caller)
    await links.connect(address, 10)
    loop = asyncio.get_running_loop()
    times: dict[str, list[float]] = {"links": [], "stream": [], "unary": []}
    figures: dict[str, float] = {}
    options = [("grpc.so_reuseport", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = channel.stream_stream("/raw/stream")()
        unary = channel.unary_unary("/raw/unary")

        async def by_links() -> None:
            caller.waiter = loop.create_future()
            links.send("server", b"e" + SMALL)
            await caller.waiter

        async def by_stream() -> None:
            await call.write(SMALL)
            await call.read()

        async def by_unary() -> None:
            await unary(SMALL)

        kinds = {"links": by_links, "stream": by_stream, "unary": by_unary}
        for turn in range(TURNS + 1):
            for name, once in kinds.items():
                for _ in range(ROUND_TRIPS):
                    began_s = time.perf_counter()
                    await once()
                    if turn:  # The first turn warms up.
                        times[name].append(time.perf_counter() - began_s)
        await call.done_writing()
        await call.read()
    for name, taken in times.items():
        cuts = statistics.quantiles(taken, n=100)
        figures[f"{name}_p50_us"] = cuts[49] * 1e6
        figures[f"{name}_p99_us"] = cuts[98] * 1e6
        figures[f"{name}_mean_us"] = statistics.fmean(taken) * 1e6
    figures["over_stream"] = figures["links_p50_us"] / figures["stream_p50_us"] - 1

    async def until_done(send: Any) -> float:
        caller.waiter = loop.create_future()
        began_s = time.perf_counter()
        send()
        await caller.waiter
        return time.perf_counter() - began_s

    def burst() -> None:
        for _ in range(BURST - 1):
            links.send("server", SMALL)
        links.send("server", b"l")

    bulk = bytes(BULK_BYTES)
    figures["small_per_s"] = BURST / min([await until_done(burst) for _ in range(5)])
    figures["bulk_mb_per_s"] = (
        BULK_BYTES
        / 1e6
        / min([await until_done(lambda: links.send("server", bulk, True)) for _ in range(5)])
    )
    caller.waiter = None
    await links.close()
    return figures


def run(work: Coroutine[Any, Any, Any], uvloop: bool) -> Any:
    if uvloop:
        import uvloop as fast

        return fast.run(work)
    return asyncio.run(work)


@contextlib.contextmanager
def server(uvloop: bool) -> Iterator[str]:
    command = [sys.executable, __file__, "--serve", *(["--uvloop"] if uvloop else [])]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.communicate(timeout=30)


@pytest.mark.bench
def test_every_figure_comes_out() -> None:
    with server(uvloop=False) as address:
        figures = asyncio.run(measure(address))
    assert all(value > 0 for name, value in figures.items() if name != "over_stream")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.serve:
        run(serve(), arguments.uvloop)
        return
    with server(arguments.uvloop) as address:
        figures = run(measure(address), arguments.uvloop)
    if arguments.json:
        print(json.dumps(figures))
        return
    for name in ("links", "stream", "unary"):
        print(
            f"ping-pong, {name:7} p50 {figures[f'{name}_p50_us']:6.0f} us"
            f"   p99 {figures[f'{name}_p99_us']:6.0f} us"
            f"   mean {figures[f'{name}_mean_us']:6.0f} us"
        )
    print(f"links over raw stream    {figures['over_stream']:+.0%}")
    print(f"300-byte messages        {figures['small_per_s']:,.0f} /s")
    print(f"50 MiB bulk              {figures['bulk_mb_per_s']:,.0f} MB/s")


if __name__ == "__main__":
    main()
