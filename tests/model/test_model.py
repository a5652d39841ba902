"""The Promela models of move and standby, checked exhaustively with spin; see README.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

MOVE = Path(__file__).with_name("move.pml")
STANDBY = Path(__file__).with_name("standby.pml")
UNSAFE = ("NO_SWAP", "DROP_EARLY", "NO_HOLD", "NO_RECORDS", "GUESS", "ANY_ROW")
STUCK = ("NO_ROW", "NO_RECLAIM", "NO_TIMEOUT", "NO_REPEAT", "NO_LOOKUP", "NO_BURIAL")

FAILOVERS = "EPOCHS=4 STREAMS=3 READS=1"
"""Both nodes fail over, one of them after it has joined again."""
UNFENCED = {
    "NO_FENCE": FAILOVERS,
    "FENCE_LATE": FAILOVERS,
    "ASYNC": FAILOVERS,
    "SOLO_NO_CAS": FAILOVERS,
    "JOIN_OPEN": FAILOVERS,
    "JOIN_SOON": FAILOVERS,
    "NO_EPOCH": FAILOVERS,
    "OLD_WORD": FAILOVERS,
    "EMPTY": FAILOVERS,
    "NO_REWIND": FAILOVERS,
    "READ_LOCAL": FAILOVERS,
    "READ_EARLY": "EPOCHS=2 STREAMS=1 READS=2",
    "STEP_LATE": FAILOVERS,
    "NO_REPLAY": FAILOVERS,
}

AT_ONCE = "-O0"
"""An error is found in less time than a better compilation takes."""

pytestmark = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None,
    reason="the model needs spin and gcc (Debian packages of these names)",
)


def verify(
    folder: Path, defines: str, compile_with: str, run_with: str, model: Path = MOVE
) -> Found:
    """(errors, states, what pan said) of an exhaustive search."""

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=3600, check=True
        )
        return done.stdout

    shutil.copy(model, folder)
    run("spin", *(f"-D{name}" for name in defines.split()), "-a", model.name)
    run("gcc", "-O2", "-DCOLLAPSE", "-DMEMLIM=4000", *compile_with.split(), "-o", "pan", "pan.c")
    said = run("./pan", "-m1000000", *run_with.split())
    assert "max search depth too small" not in said, said
    errors = re.search(r"errors: (\d+)", said)
    states = re.search(r"(\d+) states, stored", said)
    assert errors is not None and states is not None, said
    # It ends early with the first error only.
    assert int(errors[1]) or "Search not completed" not in said, said
    return int(errors[1]), int(states[1]), said


SEARCHES = {
    "test_after_the_last_fault_every_run_ends": ("PROGRESS", "-DNP", "-l", MOVE),
    "test_no_interleaving_loses_repeats_or_doubles_anything": (
        "REQUESTS=1",
        "-DSAFETY",
        "-w26 -E",
        MOVE,
    ),
    "test_no_interleaving_of_failovers_loses_repeats_or_goes_back": (
        FAILOVERS,
        "-DSAFETY",
        "-w26",
        STANDBY,
    ),
    "test_no_interleaving_of_one_failover_answers_a_read_from_the_past": (
        "EPOCHS=3 STREAMS=2 READS=2",
        "-DSAFETY",
        "-w24",
        STANDBY,
    ),
    "test_after_the_last_fault_every_run_that_ends_ends_well": ("PROGRESS", "-DSAFETY", "", MOVE),
}
"""What takes long, by test, the longest first."""

Found = tuple[int, int, str]


@pytest.fixture(scope="module")
def searches(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Found]]:
    """The long searches that are wanted, two of them at a time: one takes one core, and 1 GiB."""
    wanted = {item.name for item in request.session.items}
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        running = {
            name: pool.submit(verify, tmp_path_factory.mktemp("search"), *search)
            for name, search in SEARCHES.items()
            if name in wanted
        }
        yield lambda name: running[name].result()


@pytest.fixture
def search(request: pytest.FixtureRequest, searches: Callable[[str], Found]) -> Found:
    """What the search of this test has found."""
    return searches(request.node.name)


@pytest.mark.slow
def test_no_interleaving_loses_repeats_or_doubles_anything(search: Found):
    errors, states, said = search

    assert errors == 0, said
    # The search has covered something: both moves, the crash, all losses.
    assert states > 10_000_000


def test_after_the_last_fault_every_run_that_ends_ends_well(search: Found):
    errors, states, said = search

    assert errors == 0, said
    assert "invalid end states\t+" in said
    assert states > 1_000_000


@pytest.mark.slow
def test_after_the_last_fault_every_run_ends(search: Found):
    errors, states, said = search

    assert errors == 0, said
    assert "non-progress cycles \t+" in said
    assert states > 2_000_000


@pytest.mark.parametrize("mutant", UNSAFE)
def test_a_mechanism_removed_is_caught(mutant: str, tmp_path: Path):
    errors, _, said = verify(tmp_path, f"REQUESTS=1 {mutant}", f"-DSAFETY {AT_ONCE}", "-E")

    assert errors > 0
    assert "assertion violated" in said


@pytest.mark.parametrize("mutant", STUCK)
def test_a_wait_that_nothing_ends_is_caught(mutant: str, tmp_path: Path):
    errors, _, said = verify(tmp_path, f"PROGRESS REQUESTS=1 {mutant}", f"-DSAFETY {AT_ONCE}", "")

    assert errors > 0
    assert "invalid end state" in said


def test_a_repeat_without_end_is_caught(tmp_path: Path):
    errors, _, said = verify(tmp_path, "PROGRESS REQUESTS=1 RESTLESS", f"-DNP {AT_ONCE}", "-l")

    assert errors > 0
    assert "non-progress cycle" in said


# -- standbys


@pytest.mark.slow
def test_no_interleaving_of_failovers_loses_repeats_or_goes_back(search: Found):
    errors, states, said = search

    assert errors == 0, said
    assert states > 7_000_000
    # No branch of the model is vacuous: what is not reached is the end of a process, and a read
    # at a standby that is deposed, which has none.
    unreached = re.search(
        r"unreached in proctype Node\n.*?\((\d+) of \d+ states\)", said, re.DOTALL
    )
    assert unreached is not None and int(unreached[1]) <= 4, said


@pytest.mark.slow
def test_no_interleaving_of_one_failover_answers_a_read_from_the_past(search: Found):
    errors, states, said = search

    assert errors == 0, said
    assert states > 2_000_000


@pytest.mark.parametrize("mutant", UNFENCED)
def test_a_mechanism_of_standbys_removed_is_caught(mutant: str, tmp_path: Path):
    errors, _, said = verify(
        tmp_path, f"{UNFENCED[mutant]} {mutant}", f"-DSAFETY {AT_ONCE}", "-w24", STANDBY
    )

    assert errors > 0
    assert "assertion violated" in said
