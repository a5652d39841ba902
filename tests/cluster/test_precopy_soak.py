"""A state of 20 MiB goes to and fro a hundred times: nothing of it stays behind."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Any

import numpy as np
import psutil
import pytest

from rpc import shared_memory
from serializers import dirty
from tests.migrate.clusters import QUICK, nodes, run

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster_secret")]

STATE_BYTES = 20 << 20


class Heavy:
    """16 MiB of array, a bytearray, and 2 MiB of records."""

    def __init__(self) -> None:
        self.n = 0
        self.array = np.zeros(2 << 20)
        self.text = bytearray(2 << 20)
        self.rows: dict[int, Any] = {n: {"id": n, "tags": [n, "x"]} for n in range(30_000)}

    def write(self) -> int:
        self.n += 1
        self.array[self.n * 7919 % len(self.array)] = self.n
        self.text[self.n % len(self.text)] = 1
        self.rows[self.n % len(self.rows)] = {"id": self.n, "tags": []}
        return self.n

    def told(self) -> tuple[int, float, int]:
        return self.n, float(self.array.sum()), sum(map(len, self.rows.values()))


def measured() -> tuple[int, int, int]:
    """Descriptors, resident bytes, and tasks of this process."""
    gc.collect()
    process = psutil.Process()
    return process.num_fds(), process.memory_info().rss, len(asyncio.all_tasks())


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors by /proc")
@pytest.mark.parametrize("same_host", [True, False], ids=["shared memory", "grpc"])
def test_many_moves_of_a_large_state_leave_nothing_behind(same_host: bool, campaign: bool):
    # NB: what the allocator keeps is level after some 30 moves only (measured over gRPC).
    moves = 200 if campaign else 16

    async def body() -> None:
        options = QUICK.replace(same_host=same_host)
        async with nodes("a", "b", options=options) as (a, _):
            ref = await a.spawn(Heavy)
            ended = False
            wrote = 0

            async def go_on() -> None:
                nonlocal wrote
                while not ended:
                    wrote += 1
                    assert await ref.write() == wrote
                    await asyncio.sleep(0.01)  # A caller's pace, so that moves are not its own.

            task = asyncio.create_task(go_on())
            seen = []
            for n in range(moves):
                report = await a.migrate(ref, to="ba"[n % 2])
                assert report.rounds > 1
                seen.append(measured())
            ended = True
            await task
            early, late = seen[moves // 4 : moves // 2], seen[-moves // 4 :]
            ranges = [[(min(c), max(c)) for c in zip(*part, strict=True)] for part in (early, late)]
            print(f"{moves} moves: descriptors, bytes, tasks {ranges[0]}, then {ranges[1]}")
            for what, slack in ((0, 4), (1, 2 * STATE_BYTES), (2, 2)):
                # What a move takes for its time comes and goes; what stays is in the least of them.
                assert ranges[1][what][0] <= ranges[0][what][1] + slack
            assert shared_memory.kept() <= 8
            assert not dirty._pages.regions
            told = await ref.told()
            cells = {n * 7919 % (2 << 20): n for n in range(1, wrote + 1)}
            assert told[:2] == (wrote, sum(cells.values()))

    run(body(), bound_s=900.0)
