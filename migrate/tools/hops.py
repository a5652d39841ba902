"""What a message costs by each kind of hop and by its size, beside what the machine allows.

A message is an argument of that many bytes, answered by its length: an array of numpy where it is
installed and the size is at least `ARRAY_BYTES_MIN`, else a string of bytes. The kinds of hop take
turns, so that whatever else the machine does meets them all alike.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio
import psutil

import migrate
from migrate.tools.bench_servers import Sink
from migrate.tools.echo import ECHO, Echo

SIZES: Final = (64, 1 << 10, 16 << 10, 256 << 10, 4 << 20, 64 << 20)
ARRAY_BYTES_MIN: Final = 64 << 10
ROUNDS: Final = 5
IN_FLIGHT_BYTES: Final = 32 << 20
"""Messages in flight: as many as fit in here, from 2 to `IN_FLIGHT_MAX`."""
IN_FLIGHT_MAX: Final = 256
ROUND_S: Final = 0.25
"""About how long one kind of hop is measured in one round, alone and then with many in flight."""
CALLS_MAX: Final = 2_000
CALLS_MIN: Final = 3

Send: TypeAlias = Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True)
class HopFigure:
    """One kind of hop at one size.

    Attributes:
        hop: Its name.
        size: Bytes of a message.
        p50_us: Median of the time until it is answered, one after the other, in microseconds.
        p99_us: 99th percentile of that.
        p999_us: 99.9th percentile of that; of a few messages it is the longest.
        per_s: Messages a second with many in flight; None where only one can be.
        mb_per_s: Megabytes (1e6) a second, of whichever way was the faster.
        cpu_us: Microseconds of processor time for each of many in flight, of both processes.
    """

    hop: str
    size: int
    p50_us: float
    p99_us: float
    p999_us: float
    per_s: float | None
    mb_per_s: float
    cpu_us: float | None


@dataclass
class Hop:
    """One way for a message, and which processes work for it."""

    name: str
    send: Send
    processes: Sequence[psutil.Process]
    one_at_a_time: bool = False


def payload(size: int) -> Any:
    """A message of that many bytes."""
    if size >= ARRAY_BYTES_MIN:
        try:
            numpy = importlib.import_module("numpy")
        except ImportError:
            return os.urandom(size)
        return numpy.frombuffer(os.urandom(size), dtype=numpy.uint8).copy()
    return os.urandom(size)


def percentile(times: Sequence[float], share: float) -> float:
    """A percentile of times that are sorted."""
    return times[min(len(times) - 1, int(share * len(times)))]


async def copies(message: Any) -> None:
    """A copy of the message's memory to fresh memory, as whoever receives one has to have."""
    message.copy() if hasattr(message, "copy") else bytearray(message)


class PingPong:
    """Bare blocking sockets: a message there, a byte back."""

    def __init__(self, name: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect("\0" + name)

    async def send(self, message: Any) -> None:
        """Send one and wait for its answer, with nothing between this and the kernel."""
        size = len(message)
        self._sock.sendall(size.to_bytes(8, "little"))
        self._sock.sendall(message)
        self._sock.recv(1)

    def close(self) -> None:
        """End the connection."""
        self._sock.close()


Round: TypeAlias = tuple[list[float], float | None, float]
"""Seconds of each message alone, messages a second of many, and their CPU seconds each."""


async def _measured(hop: Hop, message: Any, scale: float) -> Round:
    """One round of one kind of hop."""
    times: list[float] = []
    end = time.perf_counter() + ROUND_S * scale
    while len(times) < CALLS_MIN or (len(times) < CALLS_MAX and time.perf_counter() < end):
        begun = time.perf_counter()
        await hop.send(message)
        times.append(time.perf_counter() - begun)
    if hop.one_at_a_time:
        return times, None, 0.0
    width = max(2, min(IN_FLIGHT_MAX, IN_FLIGHT_BYTES // len(message)))
    done = 0
    end = time.perf_counter() + ROUND_S * scale

    async def caller() -> None:
        nonlocal done
        while done < width or time.perf_counter() < end:
            done += 1
            await hop.send(message)

    busy = _cpu_s(hop)
    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(width)))
    took = time.perf_counter() - begun
    return times, done / took, (_cpu_s(hop) - busy) / done


def _cpu_s(hop: Hop) -> float:
    total = 0.0
    for process in hop.processes:
        spent = process.cpu_times()
        total += spent.user + spent.system
    return total


async def measure(hops: Sequence[Hop], scale: float, say: Callable[[str], None]) -> list[HopFigure]:
    """Measure each kind of hop at each size.

    Args:
        hops: What there is.
        scale: Length of the rounds; 1 is usual.
        say: Told what is being measured.
    """
    figures = []
    for size in SIZES:
        say(f"messages of {size_text(size)}")
        message = payload(size)
        for hop in hops:
            for _ in range(2):
                await hop.send(message)
        rounds: dict[str, list[Round]] = {}
        for _ in range(ROUNDS):
            for hop in hops:
                rounds.setdefault(hop.name, []).append(await _measured(hop, message, scale))
        for hop in hops:
            found = rounds[hop.name]
            times = sorted(seconds for one, _, _ in found for seconds in one)
            rates = [rate for _, rate, _ in found if rate is not None]
            per_s = statistics.median(rates) if rates else None
            best = max(per_s or 0.0, 1 / percentile(times, 0.5))
            figures.append(
                HopFigure(
                    hop.name,
                    size,
                    percentile(times, 0.5) * 1e6,
                    percentile(times, 0.99) * 1e6,
                    percentile(times, 0.999) * 1e6,
                    per_s,
                    best * size / 1e6,
                    statistics.median(cpu for _, _, cpu in found) * 1e6 if rates else None,
                )
            )
    return figures


def size_text(size: int) -> str:
    """A size as people write it."""
    for unit, bytes_ in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= bytes_:
            return f"{size // bytes_} {unit}"
    return f"{size} B"


async def run(
    scale: float, peer: str | None, secret_file: str | None, say: Callable[[str], None]
) -> list[HopFigure]:
    """Measure the hops from this process to itself, to others of this host, and to a peer.

    Args:
        scale: Length of the rounds.
        peer: "host:port" of a node of some cluster that is to be measured too.
        secret_file: That cluster's secret, if it is not the user's own.
        say: Told what is being measured.
    """
    this = psutil.Process()
    async with (
        Echo() as echo,
        migrate.LocalCluster(nodes=1) as cluster,
        migrate.Node("bench", directory=cluster.directory, secret_file=cluster.secret_file) as node,
        migrate.Node(
            "bench-grpc",
            directory=cluster.directory,
            secret_file=cluster.secret_file,
            options=migrate.NodeOptions(same_host=False),
        ) as by_grpc,
        grpc.aio.insecure_channel(
            echo.address,
            options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
        ) as channel,
    ):
        n1 = psutil.Process(cluster.nodes[0].pid)
        echoing = psutil.Process(echo.pid)
        on = migrate.SpawnOptions(on=cluster.nodes[0].name)
        here = await node.spawn(Sink)
        there = await node.spawn(Sink, options=on)
        by_wire = await by_grpc.spawn(Sink, options=on)
        unary: Any = channel.unary_unary(ECHO)  # type: ignore[call-arg]
        ping = PingPong(echo.socket_name)
        hops = [
            Hop("same node", here.take, [this]),
            Hop("same host", there.take, [this, n1]),
            Hop("gRPC loopback", by_wire.take, [this, n1]),
            Hop("raw grpc.aio unary", lambda m: unary(bytes(m)), [this, echoing]),
            Hop("bare Unix socket", ping.send, [this, echoing], one_at_a_time=True),
            Hop("memory copy", copies, [this], one_at_a_time=True),
        ]
        try:
            if peer is None:
                return await measure(hops, scale, say)
            async with migrate.connect(peer, secret_file=secret_file) as client:
                far = await client.spawn(Sink)
                try:
                    hops.insert(3, Hop(f"peer {peer}", far.take, [this]))
                    return await measure(hops, scale, say)
                finally:
                    await client.stop(far)
        finally:
            ping.close()
