"""`migrate demo`: index the standard library with servers that move all the time.

Callers take one file after the other, have it tokenised in a worker process, and send what is in
it to the shards of the index, half by calls and half by casts, many under way at a time. Movers
take one server after the other and move it to the next node, for as long as there is input. Every
sender numbers its requests and every receiver keeps account of the numbers (see `demo_servers`);
a plain run in a process of its own builds the same index without servers. What is printed at the
end is what the accounts and the two indexes say.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import click

from migrate.client import Client
from migrate.cluster import LocalCluster
from migrate.errors import MigrateError, Outcome
from migrate.options import NodeOptions, SpawnOptions
from migrate.reports import MoveReport, ServerInfo
from migrate.tools import demo_text, loops, output
from migrate.tools.demo_servers import Account, Catalogue, Ledger, Shard
from migrate.tools.demo_show import Show, shown_on

BATCH_NAMES: Final = 4
"""Names in one request: few, because many small requests are what a move has to get right."""

MOVERS: Final = 2
"""Moves under way at a time."""

CALL_TIMEOUT_S: Final = 120.0
"""Longer than usual, so that a slow machine is no failure."""

LINE_BYTES_MAX: Final = 64 << 20
"""Longest answer of a worker process: the names of one file."""

ERRORS_KEPT: Final = 5

KILLS_MIN: Final = 3
KILL_WITHIN_S: Final = 0.5
"""A node is killed within this time from when all servers have their standbys."""

COMPLETE_S: Final = 60.0
"""Servers that have not got their standbys by then never will."""

REST_S: Final = 0.02


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the demo is to do.

    Attributes:
        nodes: Node processes, at least 2.
        shards: Parts of the index; each is a server, and there are two more.
        callers: Concurrent callers.
        files_max: Index at most so many files; None: all.
        seconds: After this time servers are not moved any more, but for those that were not yet.
        kill: Whether each server has a standby, and node processes are killed all the time.
    """

    nodes: int
    shards: int
    callers: int
    files_max: int | None
    seconds: float
    kill: bool = False


@dataclasses.dataclass(slots=True)
class Server:
    """A server of the demo, and where it is."""

    name: str
    ref: Any
    at: int
    moves: int = 0


@dataclasses.dataclass(slots=True)
class Run:
    """What happened so far, by the senders' own count."""

    calls: int = 0
    casts: int = 0
    files: int = 0
    failed_calls: int = 0
    failed_moves: int = 0
    kills: int = 0
    broken_off: int = 0  # moves, by a kill
    resting: bool = False  # nothing is moved
    reports: list[MoveReport] = dataclasses.field(default_factory=list)
    moving_s: float = 0.0
    errors: list[str] = dataclasses.field(default_factory=list)
    # sent[server][sender] is the highest number that was used.
    sent: dict[str, collections.Counter[str]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )

    def failed(self, what: str, error: BaseException) -> None:
        """Keep the first errors, for people."""
        if len(self.errors) < ERRORS_KEPT:
            self.errors.append(f"{what}: {error}")


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What the comparison says.

    Attributes:
        summary: The object that `--json` prints.
        digests: For each shard its name, the servers' digest and the plain run's.
        listing: The object that `--out` writes.
        errors: The first failures, in words.
    """

    summary: dict[str, Any]
    digests: list[tuple[str, str, str]]
    listing: dict[str, Any]
    errors: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing failed, nothing was lost, repeated or reordered, and all is identical."""
        counted = ("failed_calls", "failed_moves", "lost", "duplicated", "out_of_order")
        return self.summary["identical"] is True and not any(self.summary[key] for key in counted)


def main(plan: Plan, out: str | None, as_json: bool, quiet: bool) -> int:
    """Run the demo and print its result.

    Args:
        plan: What to do.
        out: File for what the servers counted; None: not written.
        as_json: Print the summary as one JSON object; progress then goes to stderr.
        quiet: Show no progress.

    Returns:
        The exit status.

    Raises:
        MigrateError: The cluster could not be started, or a process of it died.
    """
    with shown_on(sys.stderr if as_json else sys.stdout, quiet) as show:
        verdict = loops.run(run(plan, show))
    if out is not None:
        Path(out).write_text(json.dumps(verdict.listing, ensure_ascii=False) + "\n", "utf-8")
    if as_json:
        output.emit_json(verdict.summary)
    else:
        _print(verdict)
    for error in verdict.errors:
        click.echo(f"migrate: {error}", err=True)
    return output.OK if verdict.ok else output.FAILED


async def run(plan: Plan, show: Show) -> Verdict:
    """Index, move, and compare.

    Raises:
        MigrateError: The cluster could not be started, or a process of it died.
    """
    try:
        return await _run(plan, show)
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup) -> BaseException:
    """Of what ended a group of tasks the first; the rest ended with it and says nothing more."""
    error: BaseException = group.subgroup(MigrateError) or group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _run(plan: Plan, show: Show) -> Verdict:
    root = demo_text.stdlib()
    paths = demo_text.files(root, plan.files_max)
    options = NodeOptions(call_timeout_s=CALL_TIMEOUT_S)
    # Who was killed, and who took over, is shown; the nodes need not say it too.
    env = {"LIVEMIGRATE_LOG_LEVEL": "error"} if plan.kill else {}
    workers = min(plan.callers, max(1, os.cpu_count() or 1))
    done = Run()
    async with (
        _plain_run(plan) as plain,
        _tokenisers(workers) as tokenisers,
        LocalCluster(plan.nodes, options=options, env=env) as cluster,
        _killed_on_failure(cluster),
    ):
        client = cluster.client
        nodes = [node.name for node in cluster.nodes]
        servers = await _spawn(client, plan, nodes)
        show.begun(len(paths), nodes, [server.name for server in servers])
        fed = asyncio.Event()
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for first in range(MOVERS):
                mine = servers[first::MOVERS]
                until = started + plan.seconds
                group.create_task(_move(client, mine, nodes, fed, until, plan, done, show))
            if plan.kill:
                group.create_task(_kill(cluster, servers, nodes, fed, done, show))
            await _feed(plan.callers, paths, servers, tokenisers, done, show)
            fed.set()
        for server in servers:
            if not server.moves and not plan.kill:
                await _move_once(client, server, nodes, plan, done, show)
        done.moving_s = time.monotonic() - started
        show.comparing()
        collected = await _collect(servers)
        compared = await plain.result()
    return _judge(plan, paths, done, collected, compared)


@contextlib.asynccontextmanager
async def _killed_on_failure(cluster: LocalCluster) -> AsyncIterator[None]:
    """End the nodes at once if the block fails: there is nothing to stop in order for."""
    try:
        yield
    except BaseException:
        for node in cluster.nodes:
            node.kill()
        raise


# ------------------------------------------------------------------ feeding


async def _spawn(client: Client, plan: Plan, nodes: Sequence[str]) -> list[Server]:
    """Spawn the shards, then the ledger and the catalogue, spread over the nodes."""
    places = itertools.cycle(range(len(nodes)))

    async def spawn(name: str, cls: Any, *args: Any) -> Server:
        at = next(places)
        options = SpawnOptions(name=name, on=nodes[at], standbys=int(plan.kill))
        ref = await client.spawn(cls, *args, options=options)
        return Server(name, ref, at)

    ledger = await spawn("ledger", Ledger)
    names = [f"shard-{number:02}" for number in range(1, plan.shards + 1)]
    parts = [await spawn(name, Shard, name, ledger.ref) for name in names]
    return [*parts, ledger, await spawn("catalogue", Catalogue)]


async def _feed(
    callers: int,
    paths: Sequence[str],
    servers: Sequence[Server],
    tokenisers: Tokenisers,
    done: Run,
    show: Show,
) -> None:
    """Let the callers send what is in the files, until all are done."""
    todo = iter(enumerate(paths))
    async with asyncio.TaskGroup() as group:
        for number in range(callers):
            caller = f"caller-{number + 1}"
            group.create_task(_caller(caller, todo, servers, tokenisers, done, show))


async def _caller(
    me: str,
    todo: Iterator[tuple[int, str]],
    servers: Sequence[Server],
    tokenisers: Tokenisers,
    done: Run,
    show: Show,
) -> None:
    *shards, _, catalogue = servers
    for file, path in todo:
        names = await tokenisers.count(path)
        parts: list[dict[str, int]] = [{} for _ in shards]
        for name, count in (names or {}).items():
            parts[demo_text.shard_of(name, len(shards))][name] = count
        # Everything of one file is under way before the first answer is awaited.
        requests: list[tuple[Any, int | None]] = []
        for shard, part in zip(shards, parts, strict=True):
            items = list(part.items())
            for start in range(0, len(items), BATCH_NAMES):
                batch = dict(items[start : start + BATCH_NAMES])
                done.sent[shard.name][me] += 1
                number = done.sent[shard.name][me]
                if number % 2:
                    done.calls += 1
                    requests.append((shard.ref.add(me, number, file, batch), number))
                else:
                    done.casts += 1
                    requests.append((shard.ref.add.cast(me, number, file, batch), None))
        done.sent[catalogue.name][me] += 1
        number = done.sent[catalogue.name][me]
        done.calls += 1
        total = None if names is None else sum(names.values())
        requests.append((catalogue.ref.enter(me, number, path, total), number))
        await _answers(me, path, requests, done)
        done.files += 1
        show.progress(done.files, done.calls, done.casts)


async def _answers(
    me: str, path: str, requests: Sequence[tuple[Any, int | None]], done: Run
) -> None:
    """Await the answers to requests under way, and see that each is the one expected."""
    try:
        for request, expected in requests:
            try:
                reply = await request
            except Exception as error:
                done.failed_calls += 1
                done.failed(f"{me}, {path}", error)
                continue
            if reply != expected:
                done.failed_calls += 1
                done.failed(f"{me}, {path}", ValueError(f"request {expected} got reply {reply!r}"))
    finally:
        # Changes only those whose answers nobody will await, as after an interruption.
        for request, _ in requests:
            request.cancel()


class Tokenisers:
    """Worker processes that tokenise one file at a time each."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process]) -> None:
        self._idle: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()
        for process in processes:
            self._idle.put_nowait(process)

    async def count(self, path: str) -> dict[str, int] | None:
        """Count the NAME tokens of a file; None if it does not tokenise.

        Raises:
            MigrateError: The worker process died.
        """
        process = await self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        line = b""
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(path).encode() + b"\n")
            line = await process.stdout.readline()
        if not line:
            # Not idle again: the next caller would wait for nothing.
            raise MigrateError(
                f"the process that tokenised {path} died; what it said is on stderr",
                outcome=Outcome.NOT_DONE,
            )
        self._idle.put_nowait(process)
        names: dict[str, int] | None = json.loads(line)
        return names


@contextlib.asynccontextmanager
async def _program(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `demo_text` in a process that does not outlive the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "migrate.tools.demo_text", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES_MAX,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def _tokenisers(count: int) -> AsyncIterator[Tokenisers]:
    async with contextlib.AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(_program("worker")) for _ in range(count)]
        yield Tokenisers(processes)


class PlainRun:
    """The run without servers, which goes on meanwhile."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def result(self) -> dict[str, Any]:
        """Wait for its end; what `demo_text.plain` returns.

        Raises:
            MigrateError: It died.
        """
        text, _ = await self._process.communicate()
        if self._process.returncode:
            raise MigrateError(
                f"the plain run ended with status {self._process.returncode}; what it said is on "
                "stderr",
                outcome=Outcome.NOT_DONE,
            )
        result: dict[str, Any] = json.loads(text)
        return result


@contextlib.asynccontextmanager
async def _plain_run(plan: Plan) -> AsyncIterator[PlainRun]:
    async with _program("plain", str(plan.files_max or 0), str(plan.shards)) as process:
        yield PlainRun(process)


# ------------------------------------------------------------------ moving


async def _move(
    client: Client,
    mine: Sequence[Server],
    nodes: Sequence[str],
    fed: asyncio.Event,
    until: float,
    plan: Plan,
    done: Run,
    show: Show,
) -> None:
    """Move servers one after the other, round and round, while there is input."""
    for server in itertools.cycle(mine):
        while done.resting and not fed.is_set():  # noqa: ASYNC110 - a look now and then will do
            await asyncio.sleep(REST_S)
        if fed.is_set() or time.monotonic() > until:
            return
        await _move_once(client, server, nodes, plan, done, show)


async def _move_once(
    client: Client, server: Server, nodes: Sequence[str], plan: Plan, done: Run, show: Show
) -> None:
    target = (server.at + 1) % len(nodes)
    try:
        if plan.kill:
            # Not to its standby: until there is another one, one death would be too many.
            info = await client.info(server.ref)
            others = [n for n in nodes if n not in (info.node, *info.standbys)]
            if not info.standbys or not others:
                return
            target = nodes.index(others[0])
        report = await client.migrate(server.ref, to=nodes[target])
    except MigrateError as error:
        if plan.kill:
            done.broken_off += 1
        else:
            done.failed_moves += 1
            done.failed(f"move of {server.name}", error)
        until = time.monotonic() + (COMPLETE_S if plan.kill else 0.0)
        server.at = nodes.index(await _where(client, server, until))
        return
    server.at = target
    server.moves += 1
    done.reports.append(report)
    show.moved(server.name, report)


async def _where(client: Client, server: Server, until: float) -> str:
    """The node of a server; waits while a standby takes over.

    Raises:
        MigrateError: It cannot be told by that time.
    """
    while True:
        try:
            return (await client.info(server.ref)).node
        except MigrateError:
            if time.monotonic() > until:
                raise
        await asyncio.sleep(REST_S)


# ------------------------------------------------------------------ killing


async def _kill(
    cluster: LocalCluster,
    servers: Sequence[Server],
    nodes: Sequence[str],
    fed: asyncio.Event,
    done: Run,
    show: Show,
) -> None:
    """Kill one node process after the other and start it again, for as long as there is input.

    Each time all servers have their standbys again, since one standby is for one death.
    """
    dice = random.Random()
    while not fed.is_set() or done.kills < KILLS_MIN:
        await _complete(cluster.client, servers)
        done.resting = False
        # At any moment: in the middle of moves too.
        await asyncio.sleep(dice.uniform(0, KILL_WITHIN_S))
        done.resting = True
        victim = cluster.node(dice.choice(nodes))
        victim.kill()
        await victim.wait()
        done.kills += 1
        show.killed(victim.name, done.kills)
        await cluster.add_node(victim.name)


async def _complete(client: Client, servers: Sequence[Server]) -> None:
    """Wait until every server has a standby that could take over.

    Raises:
        MigrateError: It took too long.
    """
    until = time.monotonic() + COMPLETE_S
    while True:
        # All of them in one look, and what their owners say: a former one may know less.
        infos: dict[str, ServerInfo] = {}
        for info in await client.servers():
            if info.id not in infos or infos[info.id].epoch < info.epoch:
                infos[info.id] = info
        waiting = [
            server.name for server in servers if not _has_standby(infos.get(server.ref._server_id))
        ]
        if not waiting:
            return
        if time.monotonic() > until:
            raise MigrateError(
                f"these have not got their standbys again in {COMPLETE_S:g} s: "
                f"{', '.join(waiting)}",
                outcome=Outcome.NOT_DONE,
            )
        await asyncio.sleep(REST_S)


def _has_standby(info: ServerInfo | None) -> bool:
    return (
        info is not None
        and bool(info.standbys)
        and all(follower.state == "in sync" for follower in info.followers)
    )


# ------------------------------------------------------------------ comparing


async def _collect(servers: Sequence[Server]) -> dict[str, dict[str, Any]]:
    """What the servers know: accounts, digests, counts; by the server's name."""
    *shards, ledger, catalogue = servers
    collected: dict[str, dict[str, Any]] = {}
    for shard in shards:
        # First all that was sent is handled: a request comes after those of the same sender.
        collected[shard.name] = await shard.ref.close_account()
        collected[shard.name] |= await shard.ref.result()
    collected["ledger"] = await ledger.ref.books()
    collected["catalogue"] = await catalogue.ref.result()
    return collected


def _judge(
    plan: Plan,
    paths: Sequence[str],
    done: Run,
    collected: dict[str, dict[str, Any]],
    compared: dict[str, Any],
) -> Verdict:
    """Compare what the servers know with what was sent to them and with the plain run."""
    books = collected.pop("ledger")
    catalogue = collected.pop("catalogue")
    reported = {name: facts["reported"] for name, facts in collected.items()}
    accounts: list[tuple[Account, dict[str, int]]] = [
        *((facts["account"], done.sent[name]) for name, facts in collected.items()),
        (books["account"], reported),
        (catalogue["account"], done.sent["catalogue"]),
    ]
    names: dict[str, int] = {}
    for facts in collected.values():
        names.update(facts["names"])
    digests = [
        (name, facts["digest"], digest)
        for (name, facts), digest in zip(collected.items(), compared["digests"], strict=True)
    ]
    skipped = sorted(path for path, count in catalogue["names_in"].items() if count is None)
    taken_in = {name: sum(facts["names"].values()) for name, facts in collected.items()}
    identical = (
        all(ours == plain for _, ours, plain in digests)
        and names == compared["names"]
        and sorted(catalogue["names_in"]) == list(paths)
        and skipped == compared["skipped"]
        and sum(filter(None, catalogue["names_in"].values())) == sum(names.values())
        and {name: books["taken_in"].get(name, 0) for name in taken_in} == taken_in
    )
    downtimes_s = sorted(report.downtime_s for report in done.reports)
    totals_s = sorted(report.total_s for report in done.reports)
    summary = {
        "nodes": plan.nodes,
        "servers": plan.shards + 2,
        "files": len(catalogue["names_in"]),
        # The shards' casts to the ledger, and the call that closes each one's account.
        "calls": done.calls + len(reported),
        "casts": done.casts + sum(reported.values()) - len(reported),
        "moves": len(done.reports),
        "moves_per_s": round(len(done.reports) / done.moving_s, 1),
        **({"kills": done.kills, "moves_broken_off": done.broken_off} if plan.kill else {}),
        "failed_calls": done.failed_calls,
        "failed_moves": done.failed_moves,
        "lost": sum(account.lost(dict(sent)) for account, sent in accounts),
        "duplicated": sum(account.duplicated for account, _ in accounts),
        "out_of_order": sum(account.out_of_order for account, _ in accounts),
        "identical": identical,
        "downtime_ms": {
            "p50": _percentile_ms(downtimes_s, 50),
            "p99": _percentile_ms(downtimes_s, 99),
            "max": _percentile_ms(downtimes_s, 100),
        },
        "move_ms": {"p50": _percentile_ms(totals_s, 50), "p99": _percentile_ms(totals_s, 99)},
        "seconds": round(done.moving_s, 2),
    }
    listing = {"files": list(paths), "skipped": skipped, "names": dict(sorted(names.items()))}
    return Verdict(summary, digests, listing, done.errors)


def _percentile_ms(sorted_s: Sequence[float], percent: int) -> float | None:
    """The smallest value that `percent` of 100 do not exceed, in ms (nearest rank)."""
    if not sorted_s:
        return None
    rank = max(1, math.ceil(len(sorted_s) * percent / 100))
    return round(sorted_s[rank - 1] * 1000, 3)


def _print(verdict: Verdict) -> None:
    """Tell people the result."""
    s = verdict.summary
    down, move = s["downtime_ms"], s["move_ms"]
    rows = [
        (name, ours[:16], plain[:16], "same" if ours == plain else "DIFFERENT")
        for name, ours, plain in verdict.digests
    ]
    output.table(["PART OF THE INDEX", "BY THE SERVERS", "BY A PLAIN RUN", ""], rows)
    click.echo("")
    output.facts(
        [
            ("files", f"{s['files']}, by {s['servers']} servers on {s['nodes']} nodes"),
            ("calls, casts", f"{s['calls']:,}, {s['casts']:,}; {s['failed_calls']} failed"),
            (
                "moves",
                f"{s['moves']:,} in {s['seconds']} s ({s['moves_per_s']} a second); "
                f"{s['failed_moves']} failed",
            ),
            *(
                [
                    (
                        "killed",
                        f"{s['kills']} node processes; {s['moves_broken_off']} moves broken off",
                    )
                ]
                if "kills" in s
                else []
            ),
            ("downtime", f"p50 {down['p50']} ms, p99 {down['p99']} ms, max {down['max']} ms"),
            ("whole move", f"p50 {move['p50']} ms, p99 {move['p99']} ms"),
            ("lost", s["lost"]),
            ("duplicated", s["duplicated"]),
            ("out of order", s["out_of_order"]),
            ("identical", "yes" if s["identical"] else "NO"),
        ]
    )
