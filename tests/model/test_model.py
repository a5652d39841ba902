"""The Promela model of the move, checked exhaustively with spin; see README.md."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("move.pml")
MUTANTS = ("NO_SWAP", "DROP_EARLY", "NO_HOLD", "NO_RECORDS")

pytestmark = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None,
    reason="the model needs spin and gcc (Debian packages of these names)",
)


def verify(folder: Path, *defines: str) -> tuple[int, int]:
    """(errors, states) of an exhaustive search."""

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=900, check=True
        )
        return done.stdout

    shutil.copy(MODEL, folder)
    run("spin", *(f"-D{name}" for name in defines), "-a", MODEL.name)
    run("gcc", "-O2", "-DNOCLAIM", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=6000", "-o", "pan", "pan.c")
    said = run("./pan", "-m100000", "-E")
    assert "Search not completed" not in said or defines, said
    assert "max search depth too small" not in said, said
    errors = re.search(r"errors: (\d+)", said)
    states = re.search(r"(\d+) states, stored", said)
    assert errors is not None and states is not None, said
    return int(errors[1]), int(states[1])


def test_no_interleaving_loses_repeats_or_doubles_anything(tmp_path: Path):
    errors, states = verify(tmp_path)

    assert errors == 0
    # The search has covered something: both moves, the crash, all losses.
    assert states > 10_000_000


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mechanism_removed_is_caught(mutant: str, tmp_path: Path):
    errors, _ = verify(tmp_path, mutant)

    assert errors > 0
