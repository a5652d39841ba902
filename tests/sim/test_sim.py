"""The simulator over many seeds, and what makes its results worth something."""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import sys
from collections import Counter

import pytest

from tests.sim.faults import KINDS
from tests.sim.world import Violation, World

ROOT = pathlib.Path(__file__).parents[2]
CHUNK = 25


def wanted(config: pytest.Config) -> list[range]:
    """The seeds to run, in chunks that are one test each."""
    seed = config.getoption("--seed", default=None)
    if seed is not None:
        return [range(seed, seed + 1)]
    # The environment reaches a run of the whole suite too, which does not know the option.
    many = config.getoption("--seeds", default=None)
    seeds = int(many if many is not None else os.environ.get("LIVEMIGRATE_SIM_SEEDS", "300"))
    return [range(start, min(start + CHUNK, seeds)) for start in range(0, seeds, CHUNK)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        chunks = wanted(metafunc.config)
        names = [f"{chunk.start}-{chunk.stop - 1}" for chunk in chunks]
        metafunc.parametrize("seeds", chunks, ids=names)


def test_every_guarantee_holds_under_every_schedule(seeds: range) -> None:
    for seed in seeds:
        world = World(seed, keep=len(seeds) == 1)
        try:
            world.run()
        except Violation as violation:
            tail = "\n".join(violation.tail[-80:])
            pytest.fail(f"{tail}\n{violation}\nreplay: pytest tests/sim --seed {seed}")


def test_schedules_are_long_and_every_fault_happens() -> None:
    events = []
    counts: Counter[str] = Counter()
    for seed in range(100_000, 100_060):
        world = World(seed).run()
        events.append(world.events)
        counts.update(world.counts)
        counts.update(f"plan {kind}" for kind in world.plan.kinds)
    assert statistics.median(events) >= 2_000
    assert [kind for kind in KINDS if not counts[f"plan {kind}"]] == []
    for fault in ("loss", "duplicate", "spike", "break", "blocked", "pause", "crash", "moves"):
        assert counts[fault] > 10, fault
    assert counts["move moved"] > 10 * counts["move fenced"]
    assert counts["move rolled_back"] > 0


@pytest.mark.parametrize("seed", [3, 17, 29])
def test_a_seed_gives_the_same_transcript_in_processes_that_hash_differently(seed: int) -> None:
    transcripts = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--transcript", str(seed)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        )
        transcripts.append(done.stdout)
    assert transcripts[0] == transcripts[1]
    assert len(transcripts[0].splitlines()) > 500


def test_different_seeds_give_different_schedules() -> None:
    assert len({World(seed).run().digest for seed in range(5)}) == 5


def test_a_violation_tells_the_checker_the_seed_and_what_came_before() -> None:
    world = World(1)
    world.note("something")
    with pytest.raises(Violation, match=r"\[order\] seed 1 at 0 us: wrong") as caught:
        world.fail("order", "wrong")
    assert caught.value.tail[-1] == "0 something"
