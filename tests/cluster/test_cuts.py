"""Connections cut in the middle of a frame, between real processes: nothing is lost or repeated."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest

import migrate
from migrate.core.actions import Point
from tests.cluster.cuts import Connection, connections
from tests.cluster.fire import keep_calling
from tests.cluster.histories import arm, came_to, ended_or_stopped
from tests.cluster.workloads import Counter
from tests.migrate.clusters import eventually, run, until
from tests.migrate.servers import Large

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster_secret")]

BOTH = pytest.mark.parametrize("kind", ["unix", "grpc"])
WAIT_S = 60.0


def options(kind: str) -> migrate.NodeOptions:
    return migrate.NodeOptions(
        same_host=kind == "unix",
        share_memory=False,
        repeat_first_s=0.2,
        repeat_max_s=0.5,
        move_step_timeout_s=5.0,
        precopy_bytes_min=1 << 60,  # so that the state leaves in one piece
    )


def ports(cluster: migrate.LocalCluster) -> frozenset[int]:
    return frozenset(int(node.address.rpartition(":")[2]) for node in cluster.nodes)


async def filled(pid: int, where: frozenset[int]) -> list[Connection]:
    """Wait until a sleeping process has got bytes, and no more come."""
    seen: list[int] = []

    def settled() -> bool:
        seen.append(sum(c.unread_bytes for c in connections(pid, where)))
        # Ten looks, with the loop's turns and waits in between.
        return seen[-1] > 10_000 and len(set(seen[-10:])) == 1 and len(seen) > 10

    await until(settled, WAIT_S)
    return connections(pid, where)


@BOTH
def test_a_request_of_which_a_part_had_arrived_runs_once(kind: str):
    async def body() -> None:
        async with migrate.LocalCluster(["a", "b"], options=options(kind)) as cluster:
            client: Any = cluster.client
            ref = await client.spawn(Counter, options=migrate.SpawnOptions(on="b"))
            assert (await ref.increment("first"))[0] == 1
            b = cluster.node("b")
            link = client._links._up[await client._node_named("b")]
            assert link.channel_kind == kind
            b.pause()
            call = ref.increment("second", pad=bytes(8_000_000))
            before = await filled(b.pid, ports(cluster))
            # The other side has got a part; the rest is being written, or waits for room.
            assert link._write is not None or link._outbox.has_bulk
            assert 0 < sum(c.unread_bytes for c in before if c.kind == kind) < 8_000_000
            cut = connections(b.pid, ports(cluster), cut=True)
            b.wake()

            assert (await call)[0] == 2
            assert [c.kind for c in cut].count(kind) >= 1
            assert link.down, "the connection was not cut"
            assert (await ref.increment("third"))[0] == 3
            assert (await ref.taken())[0] == ["first", "second", "third"]

    run(body())


@BOTH
def test_a_state_of_which_half_had_arrived_ends_at_one_place_and_no_call_is_lost(kind: str):
    async def body() -> None:
        env = {"LIVEMIGRATE_FAILPOINTS": ""}
        names = ["by", "source", "target"]
        async with migrate.LocalCluster(names, options=options(kind), env=env) as cluster:
            client: Any = cluster.client
            on_source = migrate.SpawnOptions(on="source")
            ref = await client.spawn(Large, 24 << 20, options=on_source)
            target = cluster.node("target")
            ended = asyncio.Event()
            calling = asyncio.create_task(keep_calling(ref, 4, ended))
            text = f"{Point.FINAL_HALF_SENT.value}=stop:{target.pid}"
            await arm(client, "source", text)
            moving = asyncio.create_task(client.migrate(ref, to="target"))
            assert await came_to(lambda: ended_or_stopped(target) == "stopped", WAIT_S)
            await filled(target.pid, ports(cluster))
            cut = connections(target.pid, ports(cluster), cut=True)
            target.wake()
            assert kind in [c.kind for c in cut if c.unread_bytes]

            # The source sends it again by the next connection, or rolls the move back.
            await asyncio.wait([moving])
            where = "target" if moving.exception() is None else "source"
            assert (await client.info(ref)).node == where
            ended.set()
            calls = await calling
            assert calls.failures == []
            assert calls.values == list(range(1, len(calls.values) + 1))
            assert await ref.incr() == len(calls.values) + 1
            # And nothing stands in the way of the next move.
            await eventually(lambda: moves(client, ref, "by"))

    run(body())


async def moves(client: Any, ref: Any, to: str) -> bool:
    try:
        await client.migrate(ref, to=to)
    except migrate.MoveError:
        return False
    return True


def test_only_links_are_cut():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert connections(os.getpid(), frozenset({1}), cut=True) == []
        ours.send(b"x")
        assert theirs.recv(1) == b"x"
