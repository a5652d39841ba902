"""Scenarios that broke other systems (SCENARIOS.md), where real processes and time matter."""

from __future__ import annotations

import asyncio
import time

import pytest

import migrate
from tests.migrate.clusters import QUICK, eventually, run
from tests.migrate.servers import Counter

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster_secret")]

LEASE_S = 0.5


class Sleeper:
    """Holds its node's loop, as a handler that computes for long does."""

    def __init__(self) -> None:
        self.handled = 0

    def hold(self, seconds: float) -> int:
        time.sleep(seconds)
        self.handled += 1
        return self.handled


def test_s40_a_node_whose_handler_holds_it_for_many_leases_is_not_taken_for_dead():
    async def body() -> None:
        options = QUICK.replace(lease_s=LEASE_S)
        async with migrate.LocalCluster(nodes=2, options=options) as cluster:
            client = cluster.client
            busy = await client.spawn(Sleeper, options=migrate.SpawnOptions(on="n2"))
            beside = await client.spawn(Counter, options=migrate.SpawnOptions(on="n2"))
            assert await beside.incr() == 1
            events: list[migrate.Event] = []

            async def watch() -> None:
                async for event in client.monitor(busy):
                    events.append(event)

            watching = asyncio.create_task(watch())
            began = time.monotonic()
            holding = asyncio.ensure_future(busy.hold(6 * LEASE_S))
            waiting = asyncio.ensure_future(beside.incr())

            async def lease_is_over() -> bool:
                return time.monotonic() - began > 3 * LEASE_S

            await eventually(lease_is_over)
            # Its lease is long over; the other node neither buries nor forgets it.
            assert not holding.done()
            rows = await client._node_rows()
            assert sorted(row.name for row in rows) == ["n1", "n2"]
            assert await holding == 1
            assert await waiting == 2
            assert await busy.hold(0.0) == 2
            assert [event.kind for event in events] == []
            report = await client.migrate(busy, to="n1")
            assert report.target == "n1"
            watching.cancel()

    run(body())
