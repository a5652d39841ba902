"""Checkpoints of node processes that are killed and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
import time
from typing import Any

import pytest

import migrate
from migrate.errors import CheckpointError, RolledBack
from tests.migrate.checkpoint_servers import Arrays
from tests.migrate.clusters import eventually, failure_of, run
from tests.migrate.servers import Counter

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster_secret")]


def on(node: str, **more: Any) -> migrate.SpawnOptions:
    return migrate.SpawnOptions(on=node, **more)


def newest(folder: pathlib.Path) -> float:
    """When the latest checkpoint was written, by the clock of the system."""
    written = [0.0]
    for path in folder.glob("hits.ckpt.*Z-e1"):
        with contextlib.suppress(FileNotFoundError):  # Only so many are kept.
            written.append(path.stat().st_mtime)
    return max(written)


async def pid_of(client: Any, name: str) -> int:
    return next(node.pid for node in await client.nodes() if node.name == name)


def test_killed_its_servers_come_back_and_each_caller_is_told_once(tmp_path: pathlib.Path) -> None:
    async def body() -> None:
        async with migrate.LocalCluster(nodes=3) as cluster:
            client = cluster.client
            refs = [await client.spawn(Counter, options=on("n2", name=f"c{n}")) for n in range(20)]
            async with migrate.connect(cluster.nodes[0].address) as second:
                for n, ref in enumerate(refs):
                    await ref.incr(n)
                    assert await second.call(ref, "incr", 1) == n + 1
                places = [tmp_path / f"{n}.ckpt" for n in range(len(refs))]
                await asyncio.gather(
                    *(
                        client.checkpoint(ref, place)
                        for ref, place in zip(refs, places, strict=True)
                    )
                )
                for ref in refs:
                    await ref.incr(100)
                os.kill(await pid_of(client, "n2"), signal.SIGKILL)
                # At once: the burial of the servers may not be over.
                back = await asyncio.gather(
                    *(
                        client.restore(place, on="n1" if n % 2 else "n3")
                        for n, place in enumerate(places)
                    )
                )
                assert back == refs
                for n, ref in enumerate(refs):
                    for caller in (client, second):
                        told = await failure_of(caller.call(ref, "get"), RolledBack)
                        assert told.then < told.now
                        assert await caller.call(ref, "get") == n + 1
                    assert await client.whereis(f"c{n}") == ref

    run(body())


def test_killed_in_the_middle_of_a_checkpoint_the_previous_one_is_whole(
    tmp_path: pathlib.Path,
) -> None:
    async def body() -> None:
        async with migrate.LocalCluster(nodes=2) as cluster:
            client = cluster.client
            ref = await client.spawn(Arrays, 4_000_000, options=on("n2"))
            place = tmp_path / "x.ckpt"
            await client.checkpoint(ref, place)
            before = place.stat().st_ino
            sums = await ref.sums()
            await ref.incr()
            pid = await pid_of(client, "n2")
            taking = asyncio.ensure_future(client.checkpoint(ref, place))

            def half_written() -> bool:
                # Sought by the folder: nothing tells when a file is half written.
                names = os.listdir(tmp_path)
                return any(name.endswith(".part") for name in names)

            async with asyncio.timeout(20):
                while not half_written() and not taking.done():  # noqa: ASYNC110
                    await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)
            result = (await asyncio.gather(taking, return_exceptions=True))[0]
            if not isinstance(result, migrate.CheckpointInfo):
                assert isinstance(result, migrate.MigrateError)
                assert result.outcome is not migrate.Outcome.DONE
            after = place.stat().st_ino
            back = await client.restore(place)
            await failure_of(back.sums(), RolledBack)
            n = (await back.sums())[0]
            # The old or the new one, each whole: the sums are of one and the same state.
            assert n == (0 if after == before else 1)
            if n == 0:
                assert await back.sums() == sums

    run(body())


def test_an_owner_that_is_only_paused_is_not_taken_for_dead(tmp_path: pathlib.Path) -> None:
    async def body() -> None:
        async with migrate.LocalCluster(nodes=2) as cluster:
            client = cluster.client
            ref = await client.spawn(Counter, 3, options=on("n2"))
            place = tmp_path / "x.ckpt"
            await client.checkpoint(ref, place)
            pid = await pid_of(client, "n2")
            os.kill(pid, signal.SIGSTOP)
            try:
                error = await failure_of(client.restore(place, on="n1"), CheckpointError)
                assert error.flaw == "alive"
            finally:
                os.kill(pid, signal.SIGCONT)
            assert await ref.incr() == 4

    run(body())


def test_the_node_that_restores_is_killed_and_another_restores_again(
    tmp_path: pathlib.Path,
) -> None:
    async def body() -> None:
        async with migrate.LocalCluster(nodes=3) as cluster:
            client = cluster.client
            ref = await client.spawn(Counter, 3, options=on("n2"))
            await ref.incr()
            place = tmp_path / "x.ckpt"
            await client.checkpoint(ref, place)
            times = []
            for victim, successor in (("n2", "n3"), ("n3", "n1")):
                await ref.incr()
                os.kill(await pid_of(client, victim), signal.SIGKILL)
                await client.restore(place, on=successor)
                times.append((await failure_of(ref.get(), RolledBack)).now)
                assert await ref.get() == 4
            assert times == sorted(times)

    run(body())


def test_taken_again_and_again_until_it_was_killed_the_latest_comes_back(
    tmp_path: pathlib.Path,
) -> None:
    async def body() -> None:
        async with migrate.LocalCluster(nodes=2) as cluster:
            client = cluster.client
            ref = await client.spawn(Counter, options=on("n2", name="hits"))
            place = tmp_path / "hits.ckpt"
            await client.checkpoint(ref, place, every=0.1, keep=2)
            counted = await ref.incr()
            known = time.time()

            async def taken_since() -> bool:
                return newest(tmp_path) > known + 0.2

            await eventually(taken_since)
            os.kill(await pid_of(client, "n2"), signal.SIGKILL)
            back = await client.restore(place)
            await failure_of(back.get(), RolledBack)
            assert await back.get() == counted
            # And it goes on being taken, by its new owner.
            epoch = (await client.info(back)).epoch
            await eventually(lambda: exists(tmp_path, f"-e{epoch}"))
            whole = [name for name in os.listdir(tmp_path) if name.startswith("hits.ckpt.")]
            assert len(whole) <= 3

    async def exists(folder: pathlib.Path, ending: str) -> bool:
        return any(name.endswith(ending) for name in os.listdir(folder))

    run(body())
