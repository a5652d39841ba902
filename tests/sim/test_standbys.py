"""Servers with standbys over many seeds; see `standbys`."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.sim.campaign import Ran, one
from tests.sim.standbys import StandbyWorld
from tests.sim.world import Violation

SEEDS = "500"
CHUNK = 25


def wanted(config: pytest.Config) -> list[range]:
    """The seeds to run, in chunks that are one test each."""
    seed = config.getoption("--seed", default=None)
    if seed is not None:
        return [range(seed, seed + 1)]
    many = config.getoption("--seeds", default=None)
    seeds = int(many if many is not None else os.environ.get("LIVEMIGRATE_STANDBY_SEEDS", SEEDS))
    return [range(start, min(start + CHUNK, seeds)) for start in range(0, seeds, CHUNK)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        chunks = wanted(metafunc.config)
        names = [f"{chunk.start}-{chunk.stop - 1}" for chunk in chunks]
        metafunc.parametrize("seeds", chunks, ids=names)


@pytest.fixture(scope="module")
def results(pytestconfig: pytest.Config) -> Iterator[Callable[[range], list[Ran]]]:
    """All chunks of seeds, run by as many processes as there are cores, up to 2."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(2, os.cpu_count() or 1)) as pool:
        run = functools.partial(one, world_class=StandbyWorld)
        chunks = {chunk: pool.map_async(run, chunk, chunksize=5) for chunk in wanted(pytestconfig)}
        yield lambda chunk: chunks[chunk].get()


def test_nothing_that_was_acknowledged_is_lost_under_every_schedule(
    seeds: range, results: Callable[[range], list[Ran]]
) -> None:
    for ran in results(seeds):
        if ran.failure is not None:
            # Once more, here, for the transcript.
            try:
                StandbyWorld(ran.seed, keep=len(seeds) == 1).run()
            except Violation as violation:
                tail = "\n".join(violation.tail[-80:])
                pytest.fail(
                    f"{tail}\n{violation}\nreplay: pytest tests/sim/test_standbys.py "
                    f"--seed {ran.seed}"
                )
            pytest.fail(f"{ran.failure[1]}\nseed {ran.seed} does not repeat")


def test_standbys_join_are_lost_and_take_over_in_every_way() -> None:
    counts: Counter[str] = Counter()
    for seed in range(100_000, 100_030):
        counts.update(StandbyWorld(seed).run().counts)
    few = {
        kind: counts[kind]
        for kind, most in {
            "taken over": 60,
            "taken over, going back": 10,
            "deposed": 30,
            "suspected": 100,
            "slander": 20,
            "standby joined": 200,
            "standby lost": 100,
            "standby left": 5,
            "standby unfit": 1,
            "standby uncaptured": 1,
            "standby step": 100,
            "standby note": 50,
            "moved to a standby": 3,
            "move moved": 100,
            "status diverged": 1,
            "keep fails": 1,
            "load fails": 1,
            "crash": 50,
            "lost": 20,
        }.items()
        if counts[kind] < most
    }
    assert few == {}
