"""Where the time of a message goes, line by line: what `PATH.md` tells.

`python -m tests.bench.bench_path {here,here_async,host,grpc} [--seconds N] [--lines]`. Calls of a
method that only counts are made for so long: on this node one after the other, to another process
256 at a time, over the Unix socket or over gRPC on loopback. Meanwhile `py-spy` (to be installed
for this) looks 100 times a second at which line each process is; the time of what is written in C
belongs to the line that calls it. Printed are the share of each step and the microseconds that it
is of a call as it was measured before, unwatched.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections import Counter as Tally
from pathlib import Path
from typing import Any

import migrate
from migrate.tools import loops
from migrate.tools.bench import WIDTH
from migrate.tools.bench_servers import Counter

RATE_HZ = 100
"""Each look stops the process for about a millisecond."""

STEPS: dict[str, tuple[str, ...]] = {
    "the caller's own loop": ("bench_path.py:",),
    "the handler": ("bench_servers.py:",),
    "ref: `ref.incr(1)` to the runtime": ("migrate/ref.py:",),
    "awaitable, time, sender, isolation of arguments": (
        *("driver.py:_request", "scope.py:", "isolation.py:", "pending.py:", "driver.py:crowd"),
        *("wire.py:pack_args", "wire.py:_is_small_and_plain"),
    ),
    "number, window, deadline (sender's half)": (
        *(
            "core/node.py:request",
            "core/node.py:dispatch",
            "core/node.py:_wait_for",
            "core/node.py:_transmit",
        ),
        *("delivery.py:number", "delivery.py:told_low", "delivery.py:has_room"),
        *("core/node.py:bind", "core/node.py:_arm_repeat", "core/node.py:set_timer", "timers.py:"),
    ),
    "order, repeats, room, mailbox (owner's half)": (
        *(
            "core/node.py:_arrive_local",
            "core/node.py:_arrive",
            "core/node.py:_admit",
            "core/node.py:_entry",
        ),
        *(
            "core/node.py:_no_room",
            "core/node.py:_on_envelope",
            "core/node.py:receive",
            "core/node.py:_size",
        ),
        *("incarnation.py:put", "core/node.py:_acknowledge", "delivery.py:acknowledge"),
        *("listcomp", "core/node.py:flush"),
        *(
            "driver.py:now_ms",
            "peer.py:",
            "core/node.py:_on_message",
            "driver.py:received",
            "core/node.py:_on_receipt",
            "core/node.py:_receipt",
        ),
    ),
    "handing out, one at a time": (
        *(
            "core/node.py:_run_now",
            "core/node.py:_pump",
            "core/node.py:pump",
            "core/node.py:_hand_out",
        ),
        *("core/node.py:_start", "driver.py:_pump", "driver.py:pump_later"),
    ),
    "running the handler: scope, look-up, hold warning": ("host.py:",),
    "record and release of the result": (
        "core/node.py:_answer",
        "wire.py:pack_",
        "pack_result",
        "core/node.py:_tell",
    ),
    "settling at the sender, its awaitable": (
        *(
            "core/node.py:_on_reply",
            "delivery.py:settle",
            "core/node.py:_resolve",
            "driver.py:resolve",
        ),
        *("core/node.py:settled", "wire.py:unpack", "core/node.py:_refill"),
    ),
    "frames: encoding and decoding": ("wire.py:", "peers.py:", "frames.py:"),
    "link: writing, reading, the socket": (
        *("rpc/", "grpc/", "bell.py:", "migrate/node.py:", "membership.py:", "asks.py:"),
    ),
    "the loop: turns, tasks, waiting for events": (
        *("asyncio/", "uvloop", "loops.py:", "runners.py:", "selectors.py:"),
    ),
}


def step_of(frame: str) -> str:
    """The step that a frame, "function (path:line)", belongs to."""
    function, _, rest = frame.rpartition(" (")
    path = rest.partition(":")[0]
    place = f"{path}:{function.rpartition('.')[2]}"
    for step, places in STEPS.items():
        if any(part in place for part in places):
            return step
    return "everything else"


async def watch(pid: int, seconds: float) -> dict[str, int]:
    """Samples of a process by its innermost Python frame."""
    tool = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        raise SystemExit("py-spy is needed: pip install py-spy")
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/raw"
        command = (
            "record",
            "-r",
            str(RATE_HZ),
            "-d",
            str(int(seconds)),
            "-t",
            "-f",
            "raw",
            "-o",
            out,
        )
        spy = await asyncio.create_subprocess_exec(
            *(tool, *command, "-p", str(pid)),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await spy.communicate()
        if spy.returncode:
            raise SystemExit(f"py-spy failed: {said.decode()}")
        text = await asyncio.to_thread(Path(out).read_text)
    frames: Tally[str] = Tally()
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        if "MainThread" in stack:
            frames[stack.rpartition(";")[2]] += int(count)
    return frames


async def load(incr: Any, width: int, until_s: float) -> float:
    """Calls made until then, in one process; how many a second."""
    made = 0
    begun = time.monotonic()

    async def caller() -> None:
        nonlocal made
        while time.monotonic() < until_s:
            for _ in range(20):
                await incr(1)
            made += 20

    await asyncio.gather(*(caller() for _ in range(width)))
    return made / (time.monotonic() - begun)


async def measure(kind: str, seconds: float) -> tuple[float, dict[str, dict[str, int]]]:
    """Calls a second, and the samples of each process by name."""
    options = migrate.NodeOptions(same_host=kind != "grpc")
    pids = {"caller": os.getpid()}
    if kind.startswith("here"):
        async with migrate.Node("here") as node:
            ref: Any = await node.spawn(Counter)
            incr = ref.incr_async if kind == "here_async" else ref.incr
            return await _measured(incr, 1, pids, seconds)
    async with (
        migrate.LocalCluster(["far"], options=options) as cluster,
        migrate.Node("here", directory=cluster.directory, options=options) as node,
    ):
        ref = await node.spawn(Counter, options=migrate.SpawnOptions(on="far"))
        pids["owner"] = cluster.nodes[0].pid
        return await _measured(ref.incr, WIDTH, pids, seconds)


async def _measured(
    incr: Any, width: int, pids: dict[str, int], seconds: float
) -> tuple[float, dict[str, dict[str, int]]]:
    await load(incr, width, time.monotonic() + 1)
    rate = await load(incr, width, time.monotonic() + 3)
    # The watchers end before the calls do.
    watching = [asyncio.create_task(watch(pid, seconds)) for pid in pids.values()]
    await load(incr, width, time.monotonic() + seconds + 2)
    return rate, dict(zip(pids, await asyncio.gather(*watching), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("here", "here_async", "host", "grpc"))
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--lines", action="store_true", help="the lines of each step too")
    args = parser.parse_args()
    rate, seen = loops.run(measure(args.kind, args.seconds))
    print(f"{args.kind}: {rate:,.0f} calls/s, {1e6 / rate:.2f} us each")
    for process, frames in seen.items():
        total = sum(frames.values())
        busy = total / (RATE_HZ * int(args.seconds))
        print(f"{process}: busy {busy:.0%} of the time")
        steps: Tally[str] = Tally()
        lines: dict[str, Tally[str]] = {}
        for frame, count in frames.items():
            step = step_of(frame)
            steps[step] += count
            lines.setdefault(step, Tally())[frame] += count
        for step, count in steps.most_common():
            share = count / total
            print(f"  {1e6 / rate * busy * share:6.2f} us {share:5.1%}  {step}")
            if args.lines:
                for frame, times in lines[step].most_common(12):
                    print(f"            {times / total:5.1%}  {frame}")


if __name__ == "__main__":
    main()
