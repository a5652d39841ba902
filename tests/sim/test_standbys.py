"""Servers with standbys over many seeds; see `standbys`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.sim.seeds import Results, Seeds
from tests.sim.standbys import StandbyWorld

SEEDS = Seeds(
    StandbyWorld, 500, 25, "LIVEMIGRATE_STANDBY_SEEDS", "pytest tests/sim/test_standbys.py"
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    SEEDS.parametrize(metafunc)


@pytest.fixture(scope="module")
def results(pytestconfig: pytest.Config) -> Iterator[Results]:
    with SEEDS.running(pytestconfig) as found:
        yield found


def test_nothing_that_was_acknowledged_is_lost_under_every_schedule(
    seeds: range, results: Results
) -> None:
    SEEDS.check(seeds, results)


def test_standbys_join_are_lost_and_take_over_in_every_way() -> None:
    counts: Counter[str] = Counter()
    for seed in range(100_030, 100_065):
        counts.update(StandbyWorld(seed).run().counts)
    few = {
        kind: counts[kind]
        for kind, most in {
            "taken over": 60,
            "taken over, going back": 10,
            "went back with standbys": 10,
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
