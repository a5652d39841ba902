"""Standbys of real processes: owners and standbys are killed and stopped, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

import migrate
from migrate.client import Client
from tests.cluster import workloads
from tests.cluster.histories import Plan, Report, Run, Subject, options_of, recorded, wrong_with
from tests.migrate.clusters import eventually, failure_of, run
from tests.migrate.servers import Counter

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster_secret")]

LEASE_S = 1.0
KILLS = 4
CALLERS = 16


@contextlib.asynccontextmanager
async def cluster_of(*names: str, **changed: Any) -> AsyncIterator[migrate.LocalCluster]:
    """Node processes with short leases, and a client of them."""
    plan = Plan(0, lease_s=LEASE_S)
    options = options_of(plan).replace(promote_patience_s=0.2, **changed)
    async with migrate.LocalCluster(list(names), options=options) as cluster:
        yield cluster


async def another_client(cluster: migrate.LocalCluster, node: str, name: str) -> Client:
    return migrate.connect(
        cluster.node(node).address,
        options=cluster._options,
        secret_file=cluster.secret_file,
        name=name,
    )


async def has(client: Any, ref: Any, node: str, *standbys: str) -> bool:
    """Whether a server has this owner, and these standbys in sync."""
    try:
        info = await client.info(ref)
    except migrate.MigrateError:
        return False
    in_sync = all(follower.state == "in sync" for follower in info.followers)
    return (info.node, info.standbys) == (node, standbys) and in_sync


async def owner_is(client: Any, ref: Any, node: str) -> bool:
    """Whether the directory names a node as a server's owner."""
    return bool((await client._read(ref._server_id)).owner.startswith(f"{node}@"))


def test_owners_are_killed_under_load_and_every_call_has_happened_once(
    campaign: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = 500 if campaign else KILLS
    gaps_s: list[float] = []

    async def body() -> None:
        async with cluster_of("n1", "n2", "n3") as cluster:
            client = cluster.client
            options = migrate.SpawnOptions(on="n1", standbys=1)
            # What was acknowledged and lost gives a number twice, what was repeated leaves one out.
            ref: Any = await client.spawn(Counter, options=options)
            taken: list[int] = []
            ended = False
            longest_s = 0.0

            async def call() -> None:
                nonlocal longest_s
                while not ended:
                    begun = time.monotonic()
                    taken.append(await ref.incr())
                    longest_s = max(longest_s, time.monotonic() - begun)

            callers = [asyncio.create_task(call()) for _ in range(CALLERS)]
            for _ in range(kills):
                await eventually(lambda: complete(client, ref))
                before = len(taken)
                await eventually(lambda seen=before: more_than(taken, seen + 50))  # type: ignore[misc]
                victim = cluster.node((await client.info(ref)).node)
                longest_s = 0.0
                victim.kill()
                killed = len(taken)
                await victim.wait()
                await eventually(lambda seen=killed: more_than(taken, seen + CALLERS))  # type: ignore[misc]
                gaps_s.append(longest_s)
                await cluster.add_node(victim.name)
            ended = True
            await asyncio.gather(*callers)
            assert sorted(taken) == list(range(1, len(taken) + 1))
            assert await ref.incr(0) == len(taken)

    run(body(), bound_s=3600.0 if campaign else 120.0)
    gaps_ms = sorted(gap * 1000 for gap in gaps_s)
    with capsys.disabled():
        print(
            f"\n{kills} owners killed: longest call p50 {statistics.median(gaps_ms):.1f} ms, "
            f"p99 {gaps_ms[int(0.99 * (len(gaps_ms) - 1))]:.1f} ms, max {gaps_ms[-1]:.1f} ms"
        )


async def complete(client: Any, ref: Any) -> bool:
    try:
        info = await client.info(ref)
    except migrate.MigrateError:
        return False
    return len(info.standbys) == 1 and [f.state for f in info.followers] == ["in sync"]


async def more_than(things: list[Any], count: int) -> bool:
    return len(things) > count


class Scene:
    """A register on n1 with a standby on n2, and a client that hears of no failover for a while."""

    def __init__(self, cluster: migrate.LocalCluster) -> None:
        self.run = Run(Plan(48), cluster)
        self.client: Any = cluster.client
        self.cluster = cluster
        self.subject: Subject

    async def begin(self) -> None:
        options = migrate.SpawnOptions(on="n1", standbys=["n2"])
        ref = await self.client.spawn(workloads.Register, options=options)
        self.subject = Subject("register", ref, False)
        await self.run.make(self.client, "first", self.subject, ("write", 1))

    async def switch_off(self, what: str) -> None:
        for name in ("n1", "n2"):
            on = migrate.SpawnOptions(on=name)
            await self.client.spawn(workloads.SwitchedOff, what, options=on)


@pytest.mark.parametrize("switched_off", ["", "gate", "fence"])
def test_s48_an_owner_that_slept_through_its_replacement_lets_nothing_out_not_even_a_read(
    switched_off: str,
) -> None:
    """Its requests wait in its socket when it wakes; without a mechanism it answers them."""

    async def body() -> list[str]:
        async with cluster_of("n1", "n2", "n3") as cluster:
            scene = Scene(cluster)
            await scene.begin()
            if switched_off:
                await scene.switch_off(switched_off)
            subject = scene.subject
            async with await another_client(cluster, "n1", "late") as late:
                await scene.run.make(late, "late", subject, ("read",))
                core = late._driver.core
                # It hears of no other owner until the first one answers, or does not.
                hears, core._on_moved = core._on_moved, lambda *_: None  # type: ignore[method-assign]
                owner = cluster.node("n1")
                owner.pause()
                await eventually(lambda: owner_is(scene.client, subject.ref, "n2"))
                await scene.run.make(scene.client, "other", subject, ("write", 2))
                calls = [
                    scene.run.make(late, "late", subject, call)
                    for call in (("read",), ("write", 3), ("read",))
                ]
                await scene.run.make(scene.client, "other", subject, ("read",))
                assert not any(call.done() for call in calls)
                core._on_moved = hears  # type: ignore[method-assign]
                owner.wake()
                await asyncio.wait(calls, timeout=30.0)
            if not switched_off:
                await eventually(lambda: has(scene.client, subject.ref, "n2", "n3"))
            return list(wrong_with(subject, 0))

    if not switched_off:
        assert run(body(), bound_s=120.0) == []
    else:
        # On a busy machine what would be wrong may come too late to be seen.
        assert any(run(body(), bound_s=120.0) for _ in range(4))


def test_s28_a_copy_that_goes_on_computing_after_it_was_replaced_changes_nothing() -> None:
    async def body() -> None:
        async with cluster_of("n1", "n2", "n3") as cluster:
            client: Any = cluster.client
            counter = await client.spawn(workloads.Counter, options=on("n3"))
            options = migrate.SpawnOptions(on="n1", standbys=["n2"])
            late: Any = await client.spawn(workloads.Late, options=options)
            first = asyncio.ensure_future(late.work(counter, "a", 0.0))
            await first
            # It thinks while it is replaced, and goes on when it wakes.
            thinking = asyncio.ensure_future(late.work(counter, "b", 1.0))
            await asyncio.sleep(0.2)
            cluster.node("n1").pause()
            await eventually(lambda: owner_is(client, late, "n2"))
            value, node, _ = await thinking
            assert (value, node) == (2, "n2")
            cluster.node("n1").wake()
            await eventually(lambda: has(client, late, "n2", "n3"))
            assert (await late.work(counter, "c", 0.0))[0] == 3
            # What the former owner may have said by now would have been heard.
            nonces, _, _ = await counter.taken()
            assert nonces == ["a", "b", "c"]

    run(body(), bound_s=120.0)


def on(node: str) -> migrate.SpawnOptions:
    return migrate.SpawnOptions(on=node)


def test_s29_a_standby_that_slept_when_the_owner_died_takes_over_when_it_wakes() -> None:
    async def body() -> None:
        async with cluster_of("n1", "n2", "n3") as cluster:
            async with await another_client(cluster, "n3", "c") as client:
                options = migrate.SpawnOptions(on="n1", standbys=["n2"])
                ref: Any = await client.spawn(workloads.Counter, options=options)
                assert (await ref.increment("a"))[0] == 1
                standby = cluster.node("n2")
                standby.pause()
                cluster.node("n1").kill()
                await cluster.node("n1").wait()
                waiting = asyncio.ensure_future(ref.increment("b"))
                await eventually(lambda: has_left(client, "n1"))
                # Nobody may bury what somebody may take over.
                row = await client._read(ref._server_id)
                assert row.owner.startswith("n1@")
                assert not waiting.done()
                standby.wake()
                value, node, _ = await waiting
                assert (value, node) == (2, "n2")
                await eventually(lambda: has(client, ref, "n2", "n3"))

    run(body(), bound_s=120.0)


async def has_left(client: Any, name: str) -> bool:
    return name not in [row.name for row in await client._node_rows()]


@pytest.mark.parametrize("caught_up", [False, True])
def test_s51_a_standby_that_was_restarted_takes_over_only_if_it_has_caught_up(
    caught_up: bool,
) -> None:
    async def body() -> None:
        async with cluster_of("n1", "n2", "n3") as cluster:
            async with await another_client(cluster, "n3", "c") as client:
                options = migrate.SpawnOptions(on="n1", standbys=["n2"])
                ref: Any = await client.spawn(workloads.Bulk, 2000, 4 << 20, options=options)
                await client.cordon("n3")
                assert (await ref.put(1))[0] == 1
                await restart(cluster, "n2")
                fresh = cluster.node("n2")
                if caught_up:
                    await eventually(lambda: has(client, ref, "n1", "n2"))
                else:
                    fresh.pause()
                    await eventually(lambda: is_alone(client, ref))
                assert (await ref.put(2))[0] == 2
                cluster.node("n1").kill()
                await cluster.node("n1").wait()
                if caught_up:
                    value, node, _ = await ref.total()
                    assert (value, node) == (2, "n2")
                else:
                    fresh.wake()
                    await failure_of(ref.total(), migrate.ServerLost)
                    assert (await client.servers()) == []

    run(body(), bound_s=120.0)


async def restart(cluster: migrate.LocalCluster, name: str) -> None:
    node = cluster.node(name)
    node.kill()
    await node.wait()
    await cluster.add_node(name)


async def is_alone(client: Any, ref: Any) -> bool:
    """Whether the directory names no standby."""
    return not (await client._read(ref._server_id)).standbys


@pytest.mark.parametrize("first", ["owner", "standby"])
def test_owner_and_standby_are_stopped_together_and_whoever_wakes_first_serves(
    first: str,
) -> None:
    async def body() -> None:
        async with cluster_of("n1", "n2", "n3") as cluster:
            async with await another_client(cluster, "n3", "c") as client:
                options = migrate.SpawnOptions(on="n1", standbys=["n2"])
                ref: Any = await client.spawn(workloads.Counter, options=options)
                assert (await ref.increment("a"))[0] == 1
                pair = {"owner": cluster.node("n1"), "standby": cluster.node("n2")}
                for node in pair.values():
                    node.pause()
                waiting = asyncio.ensure_future(ref.increment("b"))
                await eventually(lambda: both_suspected(client, cluster))
                assert not waiting.done()
                pair.pop(first).wake()
                value, node_name, _ = await waiting
                assert (value, node_name) == (2, "n1" if first == "owner" else "n2")
                [other] = pair.values()
                other.wake()
                await eventually(lambda: settled(client, ref))
                assert (await ref.increment("c"))[0] == 3
                nonces, _, _ = await ref.taken()
                assert nonces == ["a", "b", "c"]

    run(body(), bound_s=120.0)


async def both_suspected(client: Any, cluster: migrate.LocalCluster) -> bool:
    """Whether the leases of n1 and n2 have run out."""
    from migrate.shell.directories import open_directory

    async with open_directory(cluster.directory) as directory:
        entries, _ = await directory.list("alive/")
    return not any(entry.key.startswith(("alive/n1@", "alive/n2@")) for entry in entries)


async def settled(client: Any, ref: Any) -> bool:
    try:
        info = await client.info(ref)
    except migrate.MigrateError:
        return False
    return len(info.standbys) == 1 and {f.state for f in info.followers} == {"in sync"}


def test_a_standby_that_hangs_is_taken_out_and_comes_back() -> None:
    async def body() -> None:
        async with cluster_of("n1", "n2", standby_patience_s=0.3) as cluster:
            client: Any = cluster.client
            options = migrate.SpawnOptions(on="n1", standbys=["n2"])
            ref: Any = await client.spawn(workloads.Counter, options=options)
            events: list[migrate.Event] = []

            async def watch() -> None:
                async for event in client.monitor(ref):
                    events.append(event)

            watching = asyncio.ensure_future(watch())
            await asyncio.sleep(0.2)
            standby = cluster.node("n2")
            standby.pause()
            assert (await ref.increment("a"))[0] == 1  # Once it was taken out.
            assert await is_alone(client, ref)
            standby.wake()
            await eventually(lambda: has(client, ref, "n1", "n2"))
            await eventually(lambda: more_than(events, 1))
            watching.cancel()
            await asyncio.wait([watching])
            lost, joined = events[:2]
            assert (lost.kind, joined.kind) == ("standby_lost", "standby_joined")
            assert lost.cause.startswith("n2: it has not answered for ")

    run(body(), bound_s=120.0)


# ------------------------------------------------------------------ histories


def go(plan: Plan) -> Report:
    return run(recorded(plan), bound_s=300.0)


@pytest.mark.parametrize("kind", ["unix", "grpc"])
def test_histories_with_standbys_are_linearizable_and_no_server_is_lost(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(
        17,
        seconds=4.0,
        same_host=kind == "unix",
        points=False,
        lease_s=1.0,
        movers=2,
        subjects=4,
        faults=("kill", "stop", "cut", "pair"),
        standbys=1,
    )

    report = go(plan)

    with capsys.disabled():
        print(f"\n{report.line()}")
    assert report.violations == [], "\n".join(report.history())
    for what in ("operations", "moves", "kills", "pauses", "cuts"):
        assert report.counts[what], f"no {what}"


@pytest.mark.parametrize("switched_off", ["", "gate"])
def test_control_an_owner_that_does_not_wait_for_its_standby_loses_what_it_acknowledged(
    switched_off: str,
) -> None:
    """It is killed when it has answered for a while and told its standby nothing."""

    async def body() -> list[str]:
        async with cluster_of("n1", "n2", "n3") as cluster:
            async with await another_client(cluster, "n3", "c") as client:
                scene = Run(Plan(0), cluster)
                options = migrate.SpawnOptions(on="n1", standbys=["n2"])
                ref: Any = await client.spawn(workloads.Counter, options=options)
                if switched_off:
                    for name in ("n1", "n2"):
                        await client.spawn(workloads.SwitchedOff, switched_off, options=on(name))
                subject = Subject("counter", ref, False)
                while len(subject.made) < 20 or not workloads.is_late(late_ms=40):
                    call = ("increment", f"c#{len(subject.made)}")
                    await scene.make(client, "c", subject, call)
                cluster.node("n1").kill()
                # NB: another sender asks; what comes after what is lost waits for that.
                async with await another_client(cluster, "n3", "d") as other:
                    subject.final, _, _ = await ref._bound_to(other._driver).taken()
                return list(wrong_with(subject, 0))

    violations = run(body(), bound_s=120.0)
    if switched_off:
        assert any("acknowledged and lost" in text for text in violations)
    else:
        assert violations == []
