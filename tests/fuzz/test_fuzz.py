"""Every parser of bytes from outside: valid inputs, inputs that once did harm, and changed ones."""

from __future__ import annotations

import faulthandler
import random
import tracemalloc
from collections.abc import Iterator

import pytest

from tests.fuzz.crashers import CRASHERS
from tests.fuzz.mutate import INTEGERS, Mutator
from tests.fuzz.parsers import TARGETS, close_loop

HANG_S = 600
"""Far beyond what the runs of one target take on a busy machine."""

PEAK_BYTES_MAX = 4 << 20
"""Of one small input, however large the sizes are that it announces."""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Where a parser hangs, say where, and end."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    close_loop()


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_are_accepted(name: str) -> None:
    target = TARGETS[name]
    assert [data for data in target.seeds() if not target.judge(data)] == []


@pytest.mark.parametrize("what", CRASHERS)
def test_what_once_did_harm_does_none(what: str) -> None:
    name, data = CRASHERS[what]
    TARGETS[name].judge(data)


@pytest.mark.parametrize("name", TARGETS)
def test_no_changed_input_does_harm(name: str, request: pytest.FixtureRequest) -> None:
    target = TARGETS[name]
    mutator = Mutator(target.seeds(), seed=0)
    accepted = 0
    for run in range(target.runs):
        data = mutator.next()
        try:
            accepted += target.judge(data)
        except BaseException as error:
            error.add_note(f"run {run} of seed 0: {data!r}")
            raise
    # The inputs reach beyond the first check, and are not what they were made from.
    assert 0 < accepted < target.runs


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "conversation"])
def test_announced_sizes_take_no_memory(name: str) -> None:
    target = TARGETS[name]
    rng = random.Random(0)
    seeds = target.seeds()
    for data in seeds:
        target.judge(data)  # what is made once, such as caches, is made here
    tracemalloc.start()
    try:
        for _ in range(400):
            data = bytearray(rng.choice(seeds))
            width = rng.choice((1, 2, 4, 8))
            at = rng.randrange(len(data))
            huge = rng.choice([n for n in INTEGERS if n > 1 << 15]) & ((1 << 8 * width) - 1)
            data[at : at + width] = huge.to_bytes(width, rng.choice(("little", "big")))
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            target.judge(bytes(data))
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < PEAK_BYTES_MAX, bytes(data)
    finally:
        tracemalloc.stop()


def test_the_same_seed_makes_the_same_inputs() -> None:
    seeds = TARGETS["conversation"].seeds()
    made = [[Mutator(seeds, seed).next() for _ in range(3)] for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
