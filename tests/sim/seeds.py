"""A world over many seeds, as tests: in chunks that are one test each, run by several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator

import pytest

from tests.sim.campaign import Ran, one
from tests.sim.world import Violation, World

Results = Callable[[range], list[Ran]]
"""What the seeds of a chunk gave."""


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Which seeds of a world a test file runs.

    Attributes:
        world: What runs them.
        default: How many, unless the command line or `variable` says otherwise.
        chunk: How many of them are one test.
        variable: Of the environment, which reaches a run of the whole suite too.
        replay: The command, but for the seed, that runs one of them again.
    """

    world: type[World]
    default: int
    chunk: int
    variable: str
    replay: str

    def wanted(self, config: pytest.Config) -> list[range]:
        """The seeds to run, in chunks."""
        seed = config.getoption("--seed", default=None)
        if seed is not None:
            return [range(seed, seed + 1)]
        many = config.getoption("--seeds", default=None)
        seeds = int(many if many is not None else os.environ.get(self.variable, self.default))
        starts = range(0, seeds, self.chunk)
        return [range(start, min(start + self.chunk, seeds)) for start in starts]

    def parametrize(self, metafunc: pytest.Metafunc) -> None:
        """Give a test that takes `seeds` a chunk of them."""
        if "seeds" in metafunc.fixturenames:
            chunks = self.wanted(metafunc.config)
            names = [f"{chunk.start}-{chunk.stop - 1}" for chunk in chunks]
            metafunc.parametrize("seeds", chunks, ids=names)

    @contextlib.contextmanager
    def running(self, config: pytest.Config) -> Iterator[Results]:
        """Run all chunks, in as many processes as there are cores, up to 2."""
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(2, os.cpu_count() or 1)) as pool:
            run = functools.partial(one, world_class=self.world)
            chunks = {
                chunk: pool.map_async(run, chunk, chunksize=5) for chunk in self.wanted(config)
            }
            yield lambda chunk: chunks[chunk].get()

    def check(self, seeds: range, results: Results) -> None:
        """Fail the test if any seed of a chunk did, with the transcript's end."""
        for ran in results(seeds):
            if ran.failure is not None:
                # Once more, here, for the transcript.
                try:
                    self.world(ran.seed, keep=len(seeds) == 1).run()
                except Violation as violation:
                    tail = "\n".join(violation.tail[-80:])
                    pytest.fail(f"{tail}\n{violation}\nreplay: {self.replay} --seed {ran.seed}")
                pytest.fail(f"{ran.failure[1]}\nseed {ran.seed} does not repeat")
