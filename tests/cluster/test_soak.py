"""A short soak: nothing is lost, and nothing is left."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from tests.cluster import soak
from tests.cluster.soak import Soak

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster_secret")]


def report_of(run: Soak) -> soak.Report:
    async def bounded() -> soak.Report:
        async with asyncio.timeout(120):
            return await run.run()

    return asyncio.run(bounded())


def test_calls_during_moves_are_counted_once_and_leave_nothing():
    report = report_of(Soak(4_000, 1.0, lambda text: None))
    assert report.flaws == []
    assert report.calls >= 4_000 and report.moves > 0
    assert set(report.samples) == {"callers", "n1", "n2"}


def test_a_soak_notices_what_is_not_counted_and_what_grows():
    class Flawed(Soak):
        async def call(self, caller: int) -> None:
            await super().call(caller)
            self.counted[0] += 1

    run = Flawed(400, 1.0, lambda text: None)
    report = report_of(run)
    assert [flaw for flaw in report.flaws if "server 0 counted" in flaw] == report.flaws

    first = run.report.samples["n1"][0]
    leaky = [
        dataclasses.replace(
            first, rss=first.rss * (1 + n), descriptors=20 + n, tasks=20 + n, threads=n
        )
        for n in range(20)
    ]
    run.report.samples, run.report.flaws, run.done = {"n1": leaky}, [], 200_000
    run.judge()
    assert [flaw.split()[0] for flaw in run.report.flaws] == [
        *("memory", "descriptors", "threads", "tasks")
    ]
