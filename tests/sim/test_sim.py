"""The simulator over many seeds, and what makes its results worth something."""

from __future__ import annotations

import os
import pathlib
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.sim.faults import KINDS, SETTINGS
from tests.sim.invariants import GUARANTEES
from tests.sim.phases import FAULTS, PHASES, possible
from tests.sim.seeds import Results, Seeds
from tests.sim.world import Violation, World

ROOT = pathlib.Path(__file__).parents[2]
SEEDS = Seeds(World, 2000, 50, "LIVEMIGRATE_SIM_SEEDS", "pytest tests/sim")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    SEEDS.parametrize(metafunc)


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Iterator[Results]:
    with SEEDS.running(pytestconfig) as found:
        yield found


def test_every_guarantee_holds_under_every_schedule(seeds: range, results: Results) -> None:
    SEEDS.check(seeds, results)


def test_schedules_are_long_and_every_fault_happens() -> None:
    events = []
    counts: Counter[str] = Counter()
    hits: Counter[tuple[str, str]] = Counter()
    sizes: Counter[str] = Counter()
    for seed in range(100_000, 100_060):
        world = World(seed).run()
        events.append(world.events)
        counts.update(world.counts)
        hits.update(world.hits)
        plan = world.plan
        sizes.update([f"{plan.nodes} nodes", f"{plan.clients} clients"])
        sizes["dozens of servers"] += plan.servers >= 24
        counts.update(f"plan {kind}" for kind in plan.kinds)
    assert statistics.median(events) >= 2_000
    assert [f"{n} nodes" for n in range(3, 8) if not sizes[f"{n} nodes"]] == []
    assert sizes["1 clients"] == 0 and sizes["dozens of servers"] > 3
    assert [kind for kind in KINDS if not counts[f"plan {kind}"]] == []
    few = [kind for kind in KINDS if kind not in SETTINGS and counts[kind] < 5]
    assert few == []
    assert counts["meant for a former incarnation"] > 10
    assert counts["move moved"] > 10 * counts["move fenced"]
    assert counts["move rolled_back"] > 0
    # A campaign wants many of each; most must have happened in these few seeds already.
    pairs = [(phase, fault) for phase in PHASES for fault in FAULTS if possible(phase, fault)]
    assert sum(hits[pair] > 0 for pair in pairs) > 0.8 * len(pairs)
    assert {pair for pair in hits if not possible(*pair)} == set()


def test_every_checker_belongs_to_a_guarantee_and_every_guarantee_has_one() -> None:
    used = {"no exception"}  # what `World.advance` makes of one
    for file in (ROOT / "tests" / "sim").glob("[!t]*.py"):
        used.update(re.findall(r'\.fail\(\s*"([^"]+)"', file.read_text()))
    known = [checker for checkers in GUARANTEES.values() for checker in checkers]
    assert used == set(known)
    assert len(known) == len(set(known))
    assert list(GUARANTEES) == [0, 1, 2, 3, 4, 5, 6]
    assert all(GUARANTEES.values())


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
