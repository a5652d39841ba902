"""Servers with journals over many seeds; see `journals`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.sim.journals import JournalWorld
from tests.sim.seeds import Results, Seeds

SEEDS = Seeds(
    JournalWorld, 80, 20, "LIVEMIGRATE_JOURNAL_SEEDS", "pytest tests/sim/test_journals.py"
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
