"""Going back in time over many seeds; see `backups`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from msgspec import structs

from migrate.core.delivery import Entry, SendSession
from migrate.core.directory import Row
from migrate.core.incarnation import Incarnation
from migrate.core.messages import Envelope
from migrate.core.node import Core
from tests.sim.backups import KeepingNode, RollbackWorld
from tests.sim.world import Violation

SEEDS = 100
CHUNK = 10


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        seed = metafunc.config.getoption("--seed", default=None)
        many = int(metafunc.config.getoption("--seeds", default=None) or SEEDS)
        chunks = [range(start, min(start + CHUNK, many)) for start in range(0, many, CHUNK)]
        if seed is not None:
            chunks = [range(seed, seed + 1)]
        names = [f"{chunk.start}-{chunk.stop - 1}" for chunk in chunks]
        metafunc.parametrize("seeds", chunks, ids=names)


def test_who_lost_what_was_acknowledged_is_told_under_every_schedule(seeds: range) -> None:
    for seed in seeds:
        try:
            RollbackWorld(seed, keep=len(seeds) == 1).run()
        except Violation as violation:
            tail = "\n".join(violation.tail[-80:])
            pytest.fail(
                f"{tail}\n{violation}\nreplay: pytest tests/sim/test_backups.py --seed {seed}"
            )


def test_checkpoints_are_taken_and_restored_in_every_way() -> None:
    counts: Counter[str] = Counter()
    for seed in range(100_000, 100_040):
        counts.update(RollbackWorld(seed).run().counts)
    assert counts["checkpoints"] > 300 and counts["restored"] > 100
    assert counts["status rolled back"] > 300
    assert counts["lost"] > 0 and counts["restored by somebody else"] > 0
    assert counts["move moved"] > 300


# -- with a mechanism switched off the checkers must see it


class NobodyIsTold(Core):
    """Requests of former generations are taken like any other."""

    def _arrive(self, inc: Incarnation, env: Envelope, now_ms: int) -> None:
        env.generation = 1 << 40
        super()._arrive(inc, env, now_ms)

    @staticmethod
    def bind(session: SendSession, epoch: int) -> int:
        session.generation = 1 << 40
        return session.generation


class NothingIsRemembered(Core):
    """A sender forgets what it met when its session is over."""

    def _drop_sending(self, session: SendSession, status: int = 0, answer: bytes = b"") -> None:
        super()._drop_sending(session, status, answer)
        session.sender.met.clear()


class MessagesAreHandedOut(Core):
    """A quiescent point that is kept keeps nothing back."""

    def _keep_quiet(self, inc: Incarnation, entry: Entry) -> None:
        super()._keep_quiet(inc, entry)
        del inc.running[entry.run]
        self.port.pump_later(inc)


class TheSameGeneration(Core):
    """A restored server goes on as if it had not gone back."""

    def restored(self, row: Row, *args: Any, **more: Any) -> Incarnation:
        return super().restored(structs.replace(row, generation=0), *args, **more)


@pytest.mark.parametrize(
    ("core_class", "checker"),
    [
        (NobodyIsTold, "told"),
        (NothingIsRemembered, "told"),
        (MessagesAreHandedOut, "quiescent"),
        (TheSameGeneration, "told"),
    ],
)
def test_each_mechanism_is_needed(core_class: type[Core], checker: str) -> None:
    node_class = type("Node", (KeepingNode,), {"core_class": core_class})
    seen: Counter[str] = Counter()
    for seed in range(60):
        try:
            RollbackWorld(seed, node_class=node_class).run()
        except Violation as violation:
            seen[violation.checker] += 1
            if violation.checker == checker:
                return
    pytest.fail(f"without it nothing is noticed by {checker!r}: {seen}")
