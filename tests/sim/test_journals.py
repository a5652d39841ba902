"""Servers with journals over many seeds; see `journals`."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.sim.campaign import Ran, one
from tests.sim.journals import JournalWorld
from tests.sim.world import Violation

SEEDS = "80"
CHUNK = 20


def wanted(config: pytest.Config) -> list[range]:
    """The seeds to run, in chunks that are one test each."""
    seed = config.getoption("--seed", default=None)
    if seed is not None:
        return [range(seed, seed + 1)]
    many = config.getoption("--seeds", default=None)
    seeds = int(many if many is not None else os.environ.get("LIVEMIGRATE_JOURNAL_SEEDS", SEEDS))
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
        run = functools.partial(one, world_class=JournalWorld)
        chunks = {chunk: pool.map_async(run, chunk, chunksize=5) for chunk in wanted(pytestconfig)}
        yield lambda chunk: chunks[chunk].get()


def test_nothing_that_was_acknowledged_is_lost_under_every_schedule(
    seeds: range, results: Callable[[range], list[Ran]]
) -> None:
    for ran in results(seeds):
        if ran.failure is not None:
            # Once more, here, for the transcript.
            try:
                JournalWorld(ran.seed, keep=len(seeds) == 1).run()
            except Violation as violation:
                tail = "\n".join(violation.tail[-80:])
                pytest.fail(
                    f"{tail}\n{violation}\nreplay: pytest tests/sim/test_journals.py "
                    f"--seed {ran.seed}"
                )
            pytest.fail(f"{ran.failure[1]}\nseed {ran.seed} does not repeat")


def test_journals_are_written_lost_in_part_and_opened_in_every_way() -> None:
    counts: Counter[str] = Counter()
    for seed in range(100_000, 100_020):
        counts.update(JournalWorld(seed).run().counts)
    few = {
        kind: counts[kind]
        for kind, most in {
            "blackout": 5,
            "all killed": 3,
            "power cut": 30,
            "torn tail": 10,
            "disk full": 10,
            "sync fails": 2,
            "journal fails": 10,
            "journal begun": 300,
            "journal begun anew": 50,
            "journal in use": 1,
            "reopened": 150,
            "not reopened": 3,
            "journal opened later": 1,
            "journal may be named yet": 1,
            "stale journal": 20,
            "taken over": 20,
            "standby step": 100,
            "standby note": 50,
            "move moved": 50,
        }.items()
        if counts[kind] < most
    }
    assert few == {}


def test_the_same_seed_gives_the_same_transcript() -> None:
    digests = {JournalWorld(7).run().digest for _ in range(2)}
    assert len(digests) == 1
