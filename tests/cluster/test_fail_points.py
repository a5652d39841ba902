"""Either process dies, or sleeps, at every step of a move: a move never makes things worse."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import migrate
from migrate.cluster import NodeProcess
from migrate.core.actions import Point
from tests.cluster.etcd_servers import etcd_server, needs_etcd
from tests.cluster.fire import Calls, keep_calling
from tests.migrate.clusters import eventually, failure_of, run, until
from tests.migrate.servers import Counter, Large

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster_secret")]

OPTIONS = migrate.NodeOptions(
    call_timeout_s=30.0,
    repeat_first_s=0.2,
    repeat_max_s=0.5,
    move_step_timeout_s=1.0,
)
"""Steps of a move that are over soon, so that a process that sleeps is given up soon."""

# Where each point is reached. Before the commit the source can still roll back.
BEFORE_AT_SOURCE = (
    Point.PREPARE_SENT,
    Point.PREPARED,
    Point.CHUNK_SENT,
    Point.CHUNK_TAKEN,
    Point.QUIESCED,
    Point.FINAL_ENCODED,
    Point.FINAL_SENT,
    Point.FINAL_HALF_SENT,
    Point.READY_RECEIVED,
)
BEFORE_AT_TARGET = (
    Point.PREPARE_RECEIVED,
    Point.CHUNK_RECEIVED,
    Point.FINAL_RECEIVED,
    Point.READY,
)
BEFORE = BEFORE_AT_SOURCE + BEFORE_AT_TARGET
COMMITTED_AT_SOURCE = (Point.SWAP_DONE, Point.ACTIVATE_SENT)
COMMITTED = (*COMMITTED_AT_SOURCE, Point.ACTIVATED)
DROPPED_AT_SOURCE = (Point.ACTIVATED_RECEIVED, Point.COPY_DROPPED)
DROPPED = (*DROPPED_AT_SOURCE, Point.RELEASED)
AHEAD = (Point.CHUNK_SENT, Point.CHUNK_RECEIVED, Point.CHUNK_TAKEN)
"""Reached only if something goes ahead; what is large then does, and no more in the final state."""
AT_SOURCE = (*BEFORE_AT_SOURCE, Point.SWAP_ASKED, *COMMITTED_AT_SOURCE, *DROPPED_AT_SOURCE)


def test_every_fail_point_of_a_move_is_in_one_of_the_lists():
    listed = [*BEFORE, Point.SWAP_ASKED, *COMMITTED, *DROPPED, Point.FORWARDING_EXPIRED]
    listed.append(Point.COMMIT_SEEN)  # reached with a directory of many machines only

    # Those of delivery have a test of their own.
    of_delivery = list(Point)[list(Point).index(Point.REQUEST_SENT) :]
    assert sorted(p.value for p in [*listed, *of_delivery]) == sorted(p.value for p in Point)


class Scene:
    """Two processes, "source" and "target", a counter at the first, and callers."""

    def __init__(self, cluster: migrate.LocalCluster, ref: Any) -> None:
        self.cluster = cluster
        self.client = cluster.client
        self.ref = ref
        self.source = cluster.node("source")
        self.target = cluster.node("target")

    async def arm(self, point: Point, action: str, victim: NodeProcess) -> None:
        """Let `victim` be killed or stopped when the move reaches `point`."""
        at = self.source if point in (*AT_SOURCE, Point.FORWARDING_EXPIRED) else self.target
        node = await self.client._node_named(at.name)
        text = f"{point.value}={action}:{victim.pid}"
        await self.client._asks.ask(node, "failpoints", text, timeout_s=10.0)

    async def where(self) -> migrate.ServerInfo:
        info: migrate.ServerInfo = await self.client.info(self.ref)
        return info


@contextlib.asynccontextmanager
async def scene(
    state_bytes: int = 0,
    *,
    same_host: bool = True,
    ahead: bool = True,
    directory: str | None = None,
) -> AsyncIterator[Scene]:
    """Three nodes; those of whom one is going to sleep have links over gRPC.

    So both kinds of channel are tested, and the slower one where nothing tells of an end.
    """
    options = OPTIONS.replace(same_host=same_host, chunk_bytes=1 << 20)
    if not ahead:
        options = options.replace(precopy_bytes_min=options.state_bytes_max + 1)
    env = {"LIVEMIGRATE_FAILPOINTS": ""}
    # The client's own node is a third one: it sees neither of the two die of itself.
    async with migrate.LocalCluster(
        nodes=["by", "source", "target"], options=options, env=env, directory=directory
    ) as cluster:
        options = migrate.SpawnOptions(name="hits", on="source")
        if state_bytes:
            ref = await cluster.client.spawn(Large, state_bytes, options=options)
        else:
            ref = await cluster.client.spawn(Counter, options=options)
        yield Scene(cluster, ref)


@contextlib.asynccontextmanager
async def called(scene: Scene) -> AsyncIterator[list[Calls]]:
    """A caller at work meanwhile; afterwards the list has what it saw."""
    ended = asyncio.Event()
    found: list[Calls] = []
    task = asyncio.create_task(keep_calling(scene.ref, 8, ended))
    try:
        yield found
    finally:
        ended.set()
        found.append(await task)


def check_nothing_was_lost(calls: Calls) -> None:
    assert calls.failures == []
    assert calls.values == list(range(1, len(calls.values) + 1))
    assert calls.values, "the caller never got through"


def state_of(point: Point, size: int = 24 << 20) -> dict[str, Any]:
    """What `scene` needs for a point to be reached: half of the state has to be something."""
    if point is Point.FINAL_HALF_SENT:
        return {"state_bytes": size, "ahead": False}
    return {"state_bytes": size if point in AHEAD else 0}


@pytest.mark.parametrize("point", BEFORE, ids=lambda p: p.value)
def test_s03_the_target_is_killed_before_the_commit_and_the_source_serves_on(point: Point):
    async def body() -> None:
        async with scene(**state_of(point)) as s:
            async with called(s) as saw:
                await s.arm(point, "kill", s.target)
                error = await failure_of(s.client.migrate(s.ref, to="target"))
                assert await s.target.wait() == -9
            check_nothing_was_lost(saw[0])
            assert isinstance(error, migrate.MoveRolledBack | migrate.TargetRefused)
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert (error.source, error.target) == ("source", "target")
            assert await s.ref.incr() == len(saw[0].values) + 1
            info = await s.where()
            # Once the swap was asked for, only another swap can undo it.
            epoch = 3 if point is Point.READY_RECEIVED else 1
            assert (info.node, info.epoch) == ("source", epoch)
            # Nothing of the failed move stands in the way of the next.
            assert (await s.client.migrate(s.ref, to="by")).target == "by"
            assert await s.ref.incr() == len(saw[0].values) + 2

    run(body())


@pytest.mark.parametrize("point", BEFORE, ids=lambda p: p.value)
def test_the_source_is_killed_before_the_commit_and_the_server_is_lost_with_it(point: Point):
    async def body() -> None:
        async with scene(**state_of(point)) as s:
            await s.ref.incr()
            await s.arm(point, "kill", s.source)
            error = await failure_of(s.client.migrate(s.ref, to="target"))
            assert error.outcome is migrate.Outcome.UNKNOWN
            assert await s.source.wait() == -9
            lost = await failure_of(s.ref.incr(), migrate.ServerLost)
            assert "source" in lost.cause
            # Nobody serves half of a state; the name is free.
            await name_is_free(s)
            assert [i.id for i in await s.client.servers()] == []
            again = await s.client.spawn(Counter, 7, options=migrate.SpawnOptions(name="hits"))
            assert await again.incr() == 8

    run(body())


@pytest.mark.parametrize("point", COMMITTED + DROPPED, ids=lambda p: p.value)
def test_s04_the_source_is_killed_after_the_commit_and_the_target_serves(point: Point):
    async def body() -> None:
        async with scene() as s:
            async with called(s) as saw:
                await s.arm(point, "kill", s.source)
                with contextlib.suppress(migrate.ServerLost):  # the one who was to answer died
                    await s.client.migrate(s.ref, to="target")
                assert await s.source.wait() == -9
                await served_by(s, "target")
            check_nothing_was_lost(saw[0])
            assert await s.ref.incr() == len(saw[0].values) + 1
            info = await s.where()
            assert (info.node, info.epoch) == ("target", 2)

    run(body())


@pytest.mark.parametrize("point", COMMITTED, ids=lambda p: p.value)
def test_s04_the_target_is_killed_after_the_commit_and_the_source_takes_the_server_back(
    point: Point,
):
    async def body() -> None:
        async with scene() as s:
            async with called(s) as saw:
                await s.arm(point, "kill", s.target)
                error = await failure_of(s.client.migrate(s.ref, to="target"))
                assert await s.target.wait() == -9
            check_nothing_was_lost(saw[0])
            assert isinstance(error, migrate.MoveRolledBack)
            assert "took the server back" in str(error)
            assert await s.ref.incr() == len(saw[0].values) + 1
            info = await s.where()
            assert (info.node, info.epoch) == ("source", 3)

    run(body())


@pytest.mark.parametrize("point", DROPPED, ids=lambda p: p.value)
def test_the_target_is_killed_when_it_alone_has_the_server_which_is_lost_and_said_to_be(
    point: Point,
):
    async def body() -> None:
        async with scene() as s:
            await s.ref.incr()
            await s.arm(point, "kill", s.target)
            with contextlib.suppress(migrate.ServerLost):
                await s.client.migrate(s.ref, to="target")
            assert await s.target.wait() == -9
            lost = await failure_of(s.ref.incr(), migrate.ServerLost)
            assert "target" in lost.cause
            await name_is_free(s)

    run(body())


@needs_etcd
@pytest.mark.parametrize("victim", ["source", "target"])
def test_s04_a_process_is_killed_when_the_target_sees_the_commit_that_nobody_told_it(
    victim: str, tmp_path: Path
):
    async def body(directory: str) -> None:
        async with scene(same_host=False, directory=directory) as s:
            async with called(s) as saw:
                # The source falls asleep with the directory's answer in its hands.
                await s.arm(Point.SWAP_DONE, "stop", s.source)
                await s.arm(Point.COMMIT_SEEN, "kill", s.cluster.node(victim))
                moving = asyncio.ensure_future(failure_of(s.client.migrate(s.ref, to="target")))
                assert await s.cluster.node(victim).wait() == -9
                if victim == "target":
                    s.source.wake()
                error = await moving
                await served_by(s, "target" if victim == "source" else "source")
            check_nothing_was_lost(saw[0])
            if victim == "target":
                assert isinstance(error, migrate.MoveRolledBack)
                assert "took the server back" in str(error)
            assert await s.ref.incr() == len(saw[0].values) + 1
            assert (await s.where()).epoch == (2 if victim == "source" else 3)

    with etcd_server(tmp_path) as server:
        run(body(f"etcd://{server.address}/moves"))


@needs_etcd
def test_a_target_that_sleeps_when_it_sees_the_commit_loses_the_server_to_the_source_again(
    tmp_path: Path,
):
    async def body(directory: str) -> None:
        async with scene(same_host=False, directory=directory) as s:
            async with called(s) as saw:
                await s.arm(Point.SWAP_DONE, "stop", s.source)
                await s.arm(Point.COMMIT_SEEN, "stop", s.target)
                moving = asyncio.ensure_future(failure_of(s.client.migrate(s.ref, to="target")))
                await asleep(s.source)
                await asleep(s.target)
                s.source.wake()
                error = await moving
                assert await s.ref.incr() > 0
                s.target.wake()
                await hosts_nothing(s, "target")
            assert saw[0].failures == []
            assert isinstance(error, migrate.MoveRolledBack)
            assert await s.ref.incr() == len(saw[0].values) + 2
            info = await s.where()
            assert (info.node, info.epoch) == ("source", 3)

    with etcd_server(tmp_path) as server:
        run(body(f"etcd://{server.address}/moves"))


@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_process_killed_while_the_commit_is_on_its_way_leaves_one_owner_or_a_lost_server(
    victim: str,
):
    async def body() -> None:
        async with scene() as s:
            async with called(s) as saw:
                await s.arm(Point.SWAP_ASKED, "kill", s.cluster.node(victim))
                error = await failure_of(s.client.migrate(s.ref, to="target"))
                assert await s.cluster.node(victim).wait() == -9
                if victim == "source":
                    await settled(s)
            if victim == "target":
                check_nothing_was_lost(saw[0])
                assert isinstance(error, migrate.MoveRolledBack)
                assert await s.ref.incr() == len(saw[0].values) + 1
                assert (await s.where()).node == "source"
                return
            try:
                assert await s.ref.incr() == len(saw[0].values) + 1
            except migrate.ServerLost:
                # The swap had not been done: what was lost is what a crash loses.
                assert all(isinstance(e, migrate.ServerLost) for e in saw[0].failures)
            else:
                check_nothing_was_lost(saw[0])
                assert (await s.where()).node == "target"

    run(body())


@pytest.mark.parametrize("point", BEFORE, ids=lambda p: p.value)
def test_a_target_that_sleeps_before_the_commit_is_given_up_and_refused_when_it_wakes(
    point: Point,
):
    async def body() -> None:
        # A slow wire would need seconds for more, and is waited for.
        async with scene(**state_of(point, 4 << 20), same_host=False) as s:
            async with called(s) as saw:
                await s.arm(point, "stop", s.target)
                moving = asyncio.ensure_future(s.client.migrate(s.ref, to="target"))
                await asleep(s.target)
                # At these points its answer is on the way already, and the move goes on.
                error = await failure_of(moving)
                before = await s.where()
                s.target.wake()
                assert await s.ref.incr() > 0
            assert saw[0].failures == []
            assert len(set(saw[0].values)) == len(saw[0].values)
            assert isinstance(error, migrate.MoveRolledBack | migrate.TargetRefused)
            assert before.node == "source"
            # The next move to it works: what the failed one left there is gone.
            await moved_again(s, "target")
            assert await s.ref.incr() == len(saw[0].values) + 2

    run(body())


@pytest.mark.parametrize("point", COMMITTED, ids=lambda p: p.value)
def test_a_target_that_sleeps_after_the_commit_loses_the_server_to_the_source_again(point: Point):
    async def body() -> None:
        async with scene(same_host=False) as s:
            async with called(s) as saw:
                await s.arm(point, "stop", s.target)
                moving = asyncio.ensure_future(s.client.migrate(s.ref, to="target"))
                await asleep(s.target)
                error = await failure_of(moving)
                info = await s.where()
                assert (info.node, info.epoch) == ("source", 3)
                assert await s.ref.incr() > 0
                s.target.wake()
                # What it executed unseen is void, and it learns so.
                await hosts_nothing(s, "target")
                assert await s.ref.incr() > 0
            assert saw[0].failures == []
            assert isinstance(error, migrate.MoveRolledBack)
            assert await s.ref.incr() == len(saw[0].values) + 3

    run(body())


@pytest.mark.parametrize("point", COMMITTED + DROPPED, ids=lambda p: p.value)
def test_a_source_that_sleeps_after_the_commit_is_not_waited_for(point: Point):
    async def body() -> None:
        async with scene(same_host=False) as s:
            await s.ref.incr()
            await s.arm(point, "stop", s.source)
            moving = asyncio.ensure_future(s.client.migrate(s.ref, to="target"))
            await asleep(s.source)
            await served_by(s, "target")
            # One who has not heard of the server before asks the directory.
            assert await (await s.client.whereis("hits")).incr.with_options(timeout=10.0)() == 2
            s.source.wake()
            report = await moving
            assert (report.target, report.epoch) == ("target", 2)
            assert await s.ref.incr() == 3

    run(body())


@pytest.mark.parametrize("point", [*BEFORE, Point.SWAP_ASKED], ids=lambda p: p.value)
def test_a_source_that_sleeps_before_the_commit_goes_on_when_it_wakes(point: Point):
    async def body() -> None:
        async with scene(**state_of(point), same_host=False) as s:
            async with called(s) as saw:
                await s.arm(point, "stop", s.source)
                moving = asyncio.ensure_future(s.client.migrate(s.ref, to="target"))
                await asleep(s.source)
                # Longer than a step may take; whoever waits for it must not decide alone.
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(moving), 1.5)
                s.source.wake()
                with contextlib.suppress(migrate.MoveRolledBack):
                    await moving
                assert await s.ref.incr() > 0
            assert saw[0].failures == []
            assert await s.ref.incr() == len(saw[0].values) + 2
            assert len(await s.client.servers()) == 1

    run(body())


@pytest.mark.parametrize("action", ["kill", "stop"])
@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "at once"])
def test_a_bystander_that_dies_or_sleeps_at_any_step_of_a_move_changes_nothing(
    ahead: bool, action: str, campaign: bool
):
    others = AHEAD if not ahead else (Point.FINAL_HALF_SENT,)
    every = [*BEFORE, Point.SWAP_ASKED, *COMMITTED, *DROPPED]
    points = [point for point in every if point not in others]
    if not ahead and not campaign:
        points = [Point.FINAL_HALF_SENT]
    elif action == "kill" and not campaign:
        points = points[::3]  # Each takes a new process.

    async def body() -> None:
        same_host = action == "kill"
        async with scene(4 << 20, same_host=same_host, ahead=ahead) as s, called(s) as saw:
            by = s.cluster.node("by")
            for n, point in enumerate(points):
                await s.arm(point, action, by)
                async with asyncio.TaskGroup() as group:
                    moving = group.create_task(s.client.migrate(s.ref, to=s.target.name))
                    if action == "stop":
                        await asleep(by)
                        by.wake()
                    else:
                        # The next bystander comes while this one is still waited for.
                        another = group.create_task(s.cluster.add_node(f"by{n}"))
                        assert await by.wait() == -9
                        by = await another
                report = moving.result()
                assert (report.target, report.epoch) == (s.target.name, n + 2), point
                s.source, s.target = s.target, s.source
        check_nothing_was_lost(saw[0])

    run(body(), bound_s=300.0)


def test_s18_a_source_killed_when_its_forwarding_address_has_expired_is_not_missed():
    async def body() -> None:
        options = OPTIONS.replace(forwarding_expiry_s=1.0, session_expiry_s=10.0)
        async with migrate.LocalCluster(
            nodes=["by", "source", "target"],
            options=options,
            env={"LIVEMIGRATE_FAILPOINTS": ""},
        ) as cluster:
            on_source = migrate.SpawnOptions(name="hits", on="source")
            s = Scene(cluster, await cluster.client.spawn(Counter, options=on_source))
            sleepy = migrate.connect(cluster.node("by").address, secret_file=cluster.secret_file)
            async with sleepy:
                late = s.ref._bound_to(sleepy._driver)
                assert await late.incr() == 1
                await s.arm(Point.FORWARDING_EXPIRED, "kill", s.source)
                await s.client.migrate(s.ref, to="target")
                assert await s.source.wait() == -9
                assert await late.incr() == 2

    run(body())


@pytest.mark.parametrize(
    "text", ["nowhere=kill", "ready=maim", "ready", "ready=kill:", "ready=kill:x"]
)
def test_a_fail_point_that_does_not_exist_is_refused(text: str):
    from migrate.shell.driver import FailPoints

    with pytest.raises(migrate.UsageError, match="no fail point"):
        FailPoints(text)


# Waits for what gives no event of its own.


async def asleep(node: NodeProcess) -> None:
    await until(lambda: psutil.Process(node.pid).status() == psutil.STATUS_STOPPED)


async def served_by(s: Scene, name: str) -> None:
    async def holds() -> bool:
        try:
            return (await s.where()).node == name
        except migrate.MigrateError:
            return False  # Between the death of one node and the other's activation.

    await eventually(holds)


async def settled(s: Scene) -> None:
    """Wait until the server is served or lost."""

    async def holds() -> bool:
        try:
            await s.where()
        except (migrate.ServerLost, migrate.ServerNotFound):
            return True
        except migrate.MigrateError:
            return False
        return True

    await eventually(holds)


async def name_is_free(s: Scene) -> None:
    async def holds() -> bool:
        try:
            await s.client.whereis("hits")
        except migrate.ServerNotFound:
            return True
        return False

    await eventually(holds)


async def hosts_nothing(s: Scene, name: str) -> None:
    node = await s.client._node_named(name)

    async def holds() -> bool:
        return not await s.client._asks.ask(node, "servers", timeout_s=10.0)

    await eventually(holds)


async def moved_again(s: Scene, to: str) -> None:
    """Move the server to a node that may still be busy with forgetting the former move."""

    async def holds() -> bool:
        try:
            await s.client.migrate(s.ref, to=to)
        except (migrate.TargetRefused, migrate.MoveRolledBack):
            return False
        return True

    await eventually(holds)
