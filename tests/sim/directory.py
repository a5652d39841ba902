"""The simulated directory: rows with revisions, and everything that can go wrong with asking.

It is right at all times; only questions and answers get lost, late, or stay out. A swap ends
in one of four ways, as the core is promised: DONE, REFUSED with the row, NOT_DONE (surely had
no effect) or UNKNOWN, after which it may still take effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from migrate.core.directory import Row, RowState
from migrate.core.events import SwapOutcome, SwapResult
from migrate.core.ids import ServerId

if TYPE_CHECKING:
    from tests.sim.host import SimNode
    from tests.sim.world import World

LIMIT_US = 300_000
"""How long a node waits for an answer before it calls the outcome unknown."""

Answered: TypeAlias = Callable[[SwapResult], None]
ReadDone: TypeAlias = Callable[[bool, "Row | None", int], None]


class Directory:
    """Rows of all servers; `away` while nobody reaches it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[ServerId, tuple[Row, int]] = {}
        self.away = False
        self.slow = False
        self._rev = 0

    def create(self, row: Row) -> int:
        """Write the row of a spawned server; its revision."""
        self._rev += 1
        self.rows[row.server] = (row, self._rev)
        return self._rev

    def _delay(self) -> int:
        if self.slow and self.world.faults.on:
            return self.world.between(5_000, self.world.plan.directory_slow_us)
        return self.world.between(100, 1_000)

    def swap(
        self, node: SimNode, server: ServerId, row: Row | None, rev: int, done: Answered
    ) -> None:
        """Ask for a compare-and-swap; `row` None removes. `done` is called once, at `node`."""
        world = self.world
        plan = world.plan
        if self.away:
            world.counts["directory away"] += 1
            # Seen at once, or only after a while; never applied either way.
            wait = world.between(200, 20_000)
            node.later(wait, done, SwapResult(SwapOutcome.NOT_DONE, None, 0, "unreachable"))
            return
        if world.faults.on and world.chance(plan.directory_answer_lost):
            world.counts["directory answer lost"] += 1
            # The node gives up; the swap takes effect before, after, or never.
            node.later(
                world.between(1_000, LIMIT_US),
                done,
                SwapResult(SwapOutcome.UNKNOWN, None, 0, "no answer"),
            )
            if world.chance(0.8):
                late = world.between(100, 2 * LIMIT_US if world.chance(0.5) else 5_000)
                world.at(late, self._apply, server, row, rev)
            return
        there, back = self._delay(), self._delay()
        if there + back > LIMIT_US:
            world.counts["directory too slow"] += 1
            node.later(LIMIT_US, done, SwapResult(SwapOutcome.UNKNOWN, None, 0, "too slow"))
            world.at(there, self._apply, server, row, rev)
            return
        world.at(there, self._answer, node, server, row, rev, back, done)

    def _answer(
        self,
        node: SimNode,
        server: ServerId,
        row: Row | None,
        rev: int,
        back_us: int,
        done: Answered,
    ) -> None:
        node.later(back_us, done, self._apply(server, row, rev))

    def _matches(self, server: ServerId, rev: int) -> bool:
        known = self.rows.get(server)
        return known is not None and known[1] == rev

    def _apply(self, server: ServerId, row: Row | None, rev: int) -> SwapResult:
        known = self.rows.get(server)
        if not self._matches(server, rev):
            self.world.note(f"directory refuses {server} rev={rev}")
            if known is None:
                return SwapResult(SwapOutcome.REFUSED, None, 0)
            return SwapResult(SwapOutcome.REFUSED, known[0], known[1])
        if row is None:
            self.world.note(f"directory {server} removed")
            del self.rows[server]
            return SwapResult(SwapOutcome.DONE, None, 0)
        self._rev += 1
        self.world.invariants.swapped(known[0] if known is not None else None, row)
        self.rows[server] = (row, self._rev)
        self.world.note(
            f"directory {server} e={row.epoch} {row.owner} {RowState(row.state).name} "
            f"t={row.transfer} rev={self._rev}"
        )
        return SwapResult(SwapOutcome.DONE, row, self._rev)

    def read(self, node: SimNode, server: ServerId, done: ReadDone) -> None:
        """Read a row; `done(known, row, rev)` is called once, at `node`."""
        world = self.world
        if self.away or (world.faults.on and world.chance(world.plan.directory_answer_lost / 2)):
            node.later(world.between(200, 50_000), done, False, None, 0)
            return
        world.at(self._delay(), self._read, node, server, done)

    def _read(self, node: SimNode, server: ServerId, done: ReadDone) -> None:
        known = self.rows.get(server)
        row, rev = known if known is not None else (None, 0)
        node.later(self._delay(), done, True, row, rev)
