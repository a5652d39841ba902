"""Failing controls of standbys: with a mechanism switched off, the simulator must fail.

As in `test_controls`: each is caught by the checker of the guarantee that it is there for, within a
bounded number of the campaign's seeds.
"""

from __future__ import annotations

from collections import Counter

import pytest

from migrate.core.node import Core
from migrate.core.standby import Standbys
from tests.controls import standbys_off as off
from tests.sim.standbys import StandbyNode, StandbyWorld
from tests.sim.world import Violation

SEEDS_MAX = 300
CALM_US = 20_000_000
"""Schedules end so long after their last fault: these look for what is wrong, not what is late."""


def caught(
    checkers: tuple[str, ...],
    node: type[StandbyNode],
    world_class: type[StandbyWorld] = StandbyWorld,
) -> int:
    """How many seeds it takes until one of `checkers` sees the absence of a mechanism.

    Raises:
        AssertionError: None does within SEEDS_MAX.
    """
    others: Counter[str] = Counter()
    for seed in range(SEEDS_MAX):
        world = world_class(seed, node_class=node)
        try:
            world.advance(
                lambda world=world: 0 <= world.calm_us < world.now_us - CALM_US  # type: ignore[misc]
            )
            if world.over:
                world.invariants.final()
        except Violation as violation:
            if violation.checker in checkers:
                print(
                    f"caught by [{violation.checker}] after {seed + 1} seeds; before that "
                    f"{sum(others.values())} were caught by others: {dict(others)}\n{violation}"
                )
                return seed + 1
            others[violation.checker] += 1
    raise AssertionError(f"{checkers} saw nothing in {SEEDS_MAX} seeds; others: {dict(others)}")


NOTHING_LOST = ("nothing lost", "linear", "one history")


@pytest.mark.parametrize(
    ("mechanism", "checkers"),
    [
        # Output commit: an answer that no standby knows of is contradicted by the next owner.
        (off.RepliesNotHeld, NOTHING_LOST),
        (off.CastsNotNoted, NOTHING_LOST),
        # Records of outgoing calls: what was asked for in mid-run is asked for anew.
        (off.StepsNotTold, ("exactly once", "at most once", "own answer")),
        (off.NotRepeated, ("exactly once", "at most once", "own answer")),
        # Fencing: the former owner goes on answering.
        (off.NoFence, NOTHING_LOST),
        (off.FenceAfterSwap, NOTHING_LOST),
        (off.GoesAlone, ("one owner", *NOTHING_LOST)),
        # The former owner's messages come late.
        (off.StaleSendersHeard, ("stale senders",)),
        # Only those that have all may be named, and only those that are named take over.
        (off.JoinsEarly, ("caught up",)),
        (off.AnyoneTakesOver, ("one owner", *NOTHING_LOST)),
        # The other standbys of a failover have less than the new owner, or more.
        (off.NotRewound, ("one owner", *NOTHING_LOST)),
        # Who goes back in time has its standbys again, and answers no more alone than before.
        (off.AloneAgain, ("alone",)),
        (off.WishesForgotten, ("standbys kept",)),
        # What was freed is asked for again.
        (off.ToldAtOnce, ("statuses",)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_standbys_without(
    mechanism: type[Standbys] | type[Core], checkers: tuple[str, ...]
) -> None:
    assert caught(checkers, off.node_with(mechanism)) <= SEEDS_MAX


@pytest.mark.parametrize("seed", range(3))
def test_the_same_harness_with_everything_on_is_clean(seed: int) -> None:
    StandbyWorld(seed, node_class=off.node_with(Core)).run()
