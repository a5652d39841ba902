"""Erlang's own `gen_server:call` between two nodes of this host, beside ours, in turns.

`python -m tests.bench.bench_erlang [--rounds N] [--json]` where `erl` is installed (Debian's
erlang-base). Its nodes, and the epmd that they find each other by, are started for this alone, with
a cookie and a port of their own, and ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import migrate
from migrate.tools import loops
from migrate.tools.bench import p, per_second, round_trips
from migrate.tools.bench_servers import Counter

CALLS = 3_000
PIPELINED = 40_000
WIDTH = 256

MODULE = """
-module(counter).
-behaviour(gen_server).
-export([init/1, handle_call/3, handle_cast/2, serve/0, measure/3]).
init(_) -> {ok, 0}.
handle_call({incr, By}, _From, N) -> {reply, N + By, N + By}.
handle_cast({incr, By}, N) -> {noreply, N + By}.
serve() ->
    {ok, _} = gen_server:start({local, counter}, ?MODULE, [], []),
    io:format("up~n").
one(Server) ->
    T = erlang:monotonic_time(nanosecond),
    _ = gen_server:call(Server, {incr, 1}, infinity),
    erlang:monotonic_time(nanosecond) - T.
caller(Server, Parent, 0) -> Parent ! {done, Server};
caller(Server, Parent, N) ->
    _ = gen_server:call(Server, {incr, 1}, infinity),
    caller(Server, Parent, N - 1).
measure(Node, Calls, Pipelined) ->
    Server = {counter, list_to_atom(Node)},
    _ = [one(Server) || _ <- lists:seq(1, 200)],
    Times = lists:sort([one(Server) || _ <- lists:seq(1, Calls)]),
    Each = Pipelined div 256,
    T = erlang:monotonic_time(nanosecond),
    Self = self(),
    _ = [spawn(fun() -> caller(Server, Self, Each) end) || _ <- lists:seq(1, 256)],
    _ = [receive {done, _} -> ok end || _ <- lists:seq(1, 256)],
    Took = erlang:monotonic_time(nanosecond) - T,
    io:format("~p ~p~n", [lists:nth(Calls div 2, Times), Each * 256 * 1000000000 div Took]).
"""


class Erlang:
    """Two nodes: one that serves, and one for each measurement."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cookie = secrets.token_hex(8)
        self.name = f"server{os.getpid()}"
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self.env = {**os.environ, "ERL_EPMD_PORT": str(port), "HOME": str(folder)}
        # Only on loopback, and of this run alone.
        self.env["ERL_EPMD_ADDRESS"] = "127.0.0.1"

    def command(self, name: str, code: str) -> list[str]:
        """A node that runs some code."""
        return [
            *("erl", "-noshell", "-name", f"{name}@127.0.0.1", "-setcookie", self.cookie),
            *("-start_epmd", "false", "-pa", str(self.folder), "-eval", code),
        ]

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """epmd and the node that serves."""
        (self.folder / "counter.erl").write_text(MODULE)
        subprocess.run(["erlc", "counter.erl"], cwd=self.folder, check=True)
        with contextlib.ExitStack() as stack:
            self._start(stack, ["epmd"], subprocess.DEVNULL)
            server = self._start(stack, self.command(self.name, "counter:serve()."), None)
            assert server.stdout is not None
            if "up" not in server.stdout.readline():
                raise SystemExit("Erlang's node did not come up; what it said is above")
            yield

    def _start(
        self, stack: contextlib.ExitStack, command: list[str], stdin: int | None
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if stdin is None else stdin,
            stdout=subprocess.PIPE,
            env=self.env,
            text=True,
        )

        def end() -> None:
            process.terminate()
            process.communicate()

        stack.callback(end)
        return process

    def measure(self) -> tuple[float, float]:
        """Microseconds of a call at the median, and calls a second with 256 in flight."""
        code = f'counter:measure("{self.name}@127.0.0.1", {CALLS}, {PIPELINED}), init:stop().'
        told = subprocess.run(
            self.command(f"client{secrets.token_hex(4)}", code),
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout.split()
        return int(told[0]) / 1e3, float(told[1])


async def ours(rounds: int, theirs: Any) -> dict[str, list[float]]:
    """Measure in turns with Erlang."""
    found: dict[str, list[float]] = {
        name: [] for name in ("call_us", "per_s", "erlang_call_us", "erlang_per_s")
    }
    async with (
        migrate.LocalCluster(nodes=1) as cluster,
        migrate.Node("bench", directory=cluster.directory, secret_file=cluster.secret_file) as node,
    ):
        on = migrate.SpawnOptions(on=cluster.nodes[0].name)
        ref = await node.spawn(Counter, options=on)
        await round_trips(lambda: ref.incr(1), 200)
        for _ in range(rounds):
            call_us, per_s = await asyncio.to_thread(theirs)
            found["erlang_call_us"].append(call_us)
            found["erlang_per_s"].append(per_s)
            times = await round_trips(lambda: ref.incr(1), CALLS)
            found["call_us"].append(p(times, 0.5) * 1e6)
            found["per_s"].append(await per_second(lambda: ref.incr(1), PIPELINED, WIDTH))
    return found


def main() -> None:
    """Print the medians of all rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if shutil.which("erl") is None or shutil.which("erlc") is None:
        raise SystemExit("erl is not installed; on Debian: apt install erlang-base")
    with tempfile.TemporaryDirectory() as folder:
        erlang = Erlang(Path(folder))
        with erlang.serving():
            found = loops.run(ours(options.rounds, erlang.measure))
    medians = {name: statistics.median(values) for name, values in found.items()}
    if options.json:
        print(json.dumps({"medians": medians, "rounds": found}))
        return
    print(f"{'':12} call, p50      256 in flight")
    print(f"livemigrate  {medians['call_us']:8.0f} us  {medians['per_s']:10,.0f}/s")
    print(f"gen_server   {medians['erlang_call_us']:8.0f} us  {medians['erlang_per_s']:10,.0f}/s")


if __name__ == "__main__":
    main()
