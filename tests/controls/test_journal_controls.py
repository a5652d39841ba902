"""Failing controls of journals: with a mechanism switched off, the simulator must fail.

As in `test_standby_controls`: each is caught by the checker of the guarantee that it is there for,
within a bounded number of the campaign's seeds.
"""

from __future__ import annotations

import pytest

from tests.controls import journals_off as off
from tests.controls.test_standby_controls import SEEDS_MAX, caught
from tests.sim.journals import JournalNode, JournalWorld

NOTHING_LOST = ("nothing lost", "linear", "one history")


@pytest.mark.parametrize(
    ("node", "checkers"),
    [
        # Output commit: an answer that is not on the disk is contradicted by the next owner.
        (off.NotSynced, NOTHING_LOST),
        # What a power cut leaves: neither more nor less is cut off than was not acknowledged.
        (off.TailNotCut, ("journals",)),
        (off.CutTooFar, NOTHING_LOST),
        # There is no moment at which nothing is safe under the name that the row has.
        (off.NamedTooSoon, ("journals",)),
        # Opened by a swap alone, and only what the row names.
        (off.OpenedWithoutSwap, ("one owner", *NOTHING_LOST)),
        (off.StaleOpened, ("one owner", *NOTHING_LOST)),
        # A new owner lets nothing out before what the row names has it.
        (off.NotNamed, NOTHING_LOST),
        (off.NotCutAnew, NOTHING_LOST),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_journals_without(node: type[JournalNode], checkers: tuple[str, ...]) -> None:
    assert caught(checkers, node, JournalWorld) <= SEEDS_MAX
