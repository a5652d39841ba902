"""LocalCluster: node processes that start, die, come back, and end with their parent."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import psutil
import pytest

import migrate
from tests.migrate.clusters import QUICK, eventually, failure_of, run
from tests.migrate.servers import Busy, Counter, Where

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster_secret")]


def test_a_cluster_has_its_nodes_and_a_client_and_leaves_nothing_behind():
    async def body() -> tuple[list[int], str]:
        async with migrate.LocalCluster(nodes=2) as cluster:
            assert [n.name for n in cluster.nodes] == ["n1", "n2"]
            assert [n.name for n in await cluster.client.nodes()] == ["n1", "n2"]
            pids = [n.pid for n in cluster.nodes]
            where = await cluster.client.spawn(Where, options=migrate.SpawnOptions(on="n2"))
            assert await where.pid() == pids[1] != os.getpid()
            return pids, cluster.directory

    pids, directory = run(body())

    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not pathlib.Path(directory.removeprefix("sqlite:///")).parent.exists()


def test_whoever_shares_the_users_secret_finds_the_nodes_by_their_address_alone():
    async def body() -> None:
        async with migrate.LocalCluster(nodes=2) as cluster:
            await cluster.client.spawn(Counter, options=migrate.SpawnOptions(name="hits"))
            async with migrate.connect(cluster.nodes[1].address) as client:
                assert await (await client.whereis("hits")).incr() == 1
            # A notebook has a loop of its own, which runs in the thread that calls.
            with migrate.connect_sync(cluster.nodes[0].address) as blocking:
                assert blocking.whereis("hits").incr() == 2

    run(body())


def test_a_class_of_a_function_travels_by_value_and_moves():
    class Local:
        """No other process can import this."""

        scale = 3

        def __init__(self) -> None:
            self.n = 0

        def incr(self) -> int:
            self.n += self.scale
            return self.n

    async def body() -> None:
        async with migrate.LocalCluster(nodes=2) as cluster:
            ref = await cluster.client.spawn(Local)
            assert await ref.incr() == 3
            for to in ("n2", "n1", "n2"):
                assert (await cluster.client.migrate(ref, to=to)).target == to
            assert await ref.incr() == 6

    run(body())


def test_callers_of_a_server_whose_node_is_killed_hear_of_it_soon_and_its_name_is_free():
    async def body() -> None:
        # A long time-out: hearing of the death must not depend on it.
        async with migrate.LocalCluster(
            nodes=["a", "b"], options=QUICK.replace(call_timeout_s=80.0)
        ) as cluster:
            client = cluster.client
            named = migrate.SpawnOptions(name="hits", on="b")
            ref = await client.spawn(Busy, options=named)
            waiting = [ref.work(3600) for _ in range(5)]
            assert not waiting[0].done()
            bystander = await client.spawn(Counter, options=migrate.SpawnOptions(on="a"))
            await bystander.incr()
            cluster.node("b").kill()
            for call in waiting:
                error = await failure_of(asyncio.wait_for(call, 40), migrate.ServerLost)
                assert "b died" in error.cause
                assert error.server == ref._server_id
            assert error.outcome is migrate.Outcome.UNKNOWN
            await failure_of(ref.quick(), migrate.ServerLost)
            await failure_of(client.info(ref), migrate.ServerLost)
            await failure_of(client.migrate(ref, to="a"), migrate.ServerLost)
            await failure_of(client.whereis("hits"), migrate.ServerNotFound)
            again = await client.spawn(Counter, options=migrate.SpawnOptions(name="hits"))
            assert await again.incr() == 1
            assert await bystander.incr() == 2
            assert [n.name for n in await client.nodes()] == ["a"]

    run(body())


def test_s26_a_node_of_the_same_name_is_another_node():
    async def body() -> None:
        async with migrate.LocalCluster(nodes=["a", "b"]) as cluster:
            client = cluster.client
            on_b = migrate.SpawnOptions(on="b")
            old = await client.spawn(Counter, options=on_b)
            assert await old.incr() == 1
            first = cluster.node("b")
            first.kill()
            assert await first.wait() == -signal.SIGKILL
            second = await cluster.add_node("b")
            assert second.pid != first.pid and cluster.node("b") is second

            async def spawned() -> bool:
                try:
                    ref = await client.spawn(Counter, 10, options=on_b)
                except migrate.MigrateError:
                    return False  # The client has not heard of the new one yet.
                return bool(await ref.incr() == 11)

            await eventually(spawned)
            await failure_of(old.incr(), migrate.ServerLost)
            mover = await client.spawn(Counter, options=migrate.SpawnOptions(on="a"))
            assert (await client.migrate(mover, to="b")).target == "b"

    run(body())


def test_a_name_that_is_alive_is_refused_and_the_cluster_goes_on():
    async def body() -> None:
        async with migrate.LocalCluster(nodes=["a"]) as cluster:
            ref = await cluster.client.spawn(Counter)
            error = await failure_of(cluster.add_node("a"))
            assert error.node == "a" and "before it was up" in str(error)
            assert await ref.incr() == 1

    run(body())


@pytest.mark.parametrize("nodes", [0, -1, [], ["a", "a"]])
def test_a_cluster_that_cannot_be_is_a_usage_error(nodes: Any):
    with pytest.raises(migrate.UsageError):
        migrate.LocalCluster(nodes=nodes)


def test_a_node_that_is_paused_is_not_dead():
    async def body() -> None:
        async with migrate.LocalCluster(nodes=["a", "b"], options=QUICK) as cluster:
            ref = await cluster.client.spawn(Counter, options=migrate.SpawnOptions(on="b"))
            assert await ref.incr() == 1
            node = cluster.node("b")
            node.pause()
            call = asyncio.create_task(ref.incr())
            await asyncio.wait([call], timeout=1.0)
            assert not call.done()
            node.wake()
            assert await call == 2
            assert [n.name for n in await cluster.client.nodes()] == ["a", "b"]

    run(body())


def test_a_monitor_tells_of_a_loss_with_its_cause():
    async def body() -> None:
        async with migrate.LocalCluster(nodes=["a", "b", "c"]) as cluster:
            client = cluster.client
            ref = await client.spawn(Counter, options=migrate.SpawnOptions(on="b"))
            events: list[migrate.Event] = []

            async def watch() -> None:
                async for event in client.monitor(ref):
                    events.append(event)

            task = asyncio.create_task(watch())
            while not events:  # The watch begins when it begins.
                to = "c" if (await client.info(ref)).node == "b" else "b"
                await client.migrate(ref, to=to)
            cluster.node((await client.info(ref)).node).kill()
            await asyncio.wait_for(task, 40)
            assert {e.kind for e in events[:-1]} == {"moved"}
            assert events[-1].kind == "lost" and "died" in events[-1].cause

    run(body())


def test_s31_a_call_pending_when_its_server_moves_is_answered_from_the_new_place():
    async def body() -> None:
        async with migrate.LocalCluster(nodes=["a", "b"]) as cluster:
            ref = await cluster.client.spawn(Busy)
            calls = [ref.work(0.02) for _ in range(20)]
            report = await cluster.client.migrate(ref, to="b")
            assert report.source == "a"
            assert await asyncio.gather(*calls) == ["done"] * 20

    run(body())


def test_draining_a_process_while_it_is_called_and_ending_it_loses_nothing():
    async def body() -> None:
        async with migrate.LocalCluster(nodes=["a", "b"]) as cluster:
            client = cluster.client
            on_b = migrate.SpawnOptions(on="b")
            refs = [await client.spawn(Counter, options=on_b) for _ in range(10)]
            ended = asyncio.Event()

            async def keep(ref: Any) -> int:
                n = 0
                while not ended.is_set():
                    n += 1
                    assert await ref.incr() == n
                return n

            tasks = [asyncio.create_task(keep(ref)) for ref in refs]
            reports = await client.drain("b")
            assert len(reports) == 10
            assert await cluster.node("b").stop() == 0
            ended.set()
            counts = await asyncio.gather(*tasks)
            assert [await ref.get() for ref in refs] == counts
            assert [n.name for n in await client.nodes()] == ["a"]

    run(body())


SCRIPT = """
    import asyncio, os, sys
    import migrate

    class Counter:
        n = 0
        def incr(self):
            self.n += 1
            return self.n

    async def main():
        async with migrate.LocalCluster(nodes=2) as cluster:
            ref = await cluster.client.spawn(Counter)
            assert await ref.incr() == 1
            await cluster.client.migrate(ref, to="n2")
            assert await ref.incr() == 2
            print(*[node.pid for node in cluster.nodes], flush=True)
            if "hang" in sys.argv:
                await asyncio.Event().wait()

    asyncio.run(main())
"""


def script(*args: str) -> subprocess.Popen[str]:
    """A script without a main guard, as a user would write it."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *args],
        stdout=subprocess.PIPE,
        text=True,
        cwd=os.getcwd(),
    )


def test_a_script_needs_no_main_guard_and_its_classes_travel():
    with script() as process:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert len(out.split()) == 2


def test_the_nodes_end_when_the_process_that_started_them_is_killed():
    with script("hang") as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
        process.kill()
    until_s = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and not _is_zombie(pid) for pid in pids):
        assert time.monotonic() < until_s, "node processes outlived their parent"
        time.sleep(0.02)


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
