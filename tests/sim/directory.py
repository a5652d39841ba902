"""The simulated directory: rows with revisions, and everything that can go wrong with asking.

It is right at all times; only questions and answers get lost, late, or stay out. A swap ends
in one of four ways, as the core is promised: DONE, REFUSED with the row, NOT_DONE (surely had
no effect) or UNKNOWN, after which it may still take effect. Its disk is not simulated: what
SQLite does when a disk is full or a writer is killed is tested with real files and processes
in `tests/cluster/test_sqlite_directory.py`, and ends in one of the same four ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from migrate.core.directory import Row, RowState
from migrate.core.events import SwapOutcome, SwapResult
from migrate.core.ids import ServerId, TransferId
from tests.sim.phases import Move

if TYPE_CHECKING:
    from tests.sim.host import SimNode
    from tests.sim.world import World

LIMIT_US = 300_000
"""How long a node waits for an answer before it calls the outcome unknown."""

LATE_US = 5_000
"""An answer that takes longer counts as one of a slow directory."""

Answered: TypeAlias = Callable[[SwapResult], None]
ReadDone: TypeAlias = Callable[[bool, "Row | None", int], None]
Shown: TypeAlias = Callable[[Row, int], None]


class Directory:
    """Rows of all servers; `away` while nobody reaches it, `cut` for some nodes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[ServerId, tuple[Row, int]] = {}
        self.away = False
        self.slow = False
        self.cut: dict[str, None] = {}  # by name of the node
        self.lose_answers: dict[str, None] = {}  # the next question of these nodes
        self.watches: dict[TransferId, tuple[SimNode, ServerId, Shown]] = {}
        self._rev = 0

    def create(self, row: Row) -> int:
        """Write the row of a spawned server; its revision."""
        self._rev += 1
        self.rows[row.server] = (row, self._rev)
        return self._rev

    def unreachable(self, node: SimNode) -> bool:
        """Whether the node's questions fail at the moment."""
        return self.away or node.name in self.cut

    def _unreachable(self, node: SimNode, move: Move | None) -> bool:
        if self.away:
            self.world.faults.hit_move("directory away", move)
            return True
        if node.name in self.cut:
            self.world.faults.hit_move("directory cut", move)
            return True
        return False

    def _loses_answer(self, node: SimNode, probability: float, move: Move | None) -> bool:
        world = self.world
        if not world.faults.on:
            return False
        if self.lose_answers.pop(node.name, 0) == 0 and not world.chance(probability):
            return False
        world.counts["directory answer lost"] += 1
        world.faults.hit_move("directory answer lost", move)
        return True

    def _delay(self, move: Move | None) -> int:
        if not (self.slow and self.world.faults.on):
            return self.world.between(100, 1_000)
        delay = self.world.between(LATE_US, self.world.plan.directory_slow_us)
        self.world.faults.hit_move("directory slow", move)
        return delay

    def swap(
        self,
        node: SimNode,
        server: ServerId,
        row: Row | None,
        rev: int,
        done: Answered,
        move: Move | None = None,
    ) -> None:
        """Ask for a compare-and-swap.

        Args:
            node: Who asks.
            server: Whose row.
            row: The new row; None removes.
            rev: The revision it must have.
            done: Called once, at `node`.
            move: For whose sake, if a move's.
        """
        world = self.world
        plan = world.plan
        if self._unreachable(node, move):
            # Seen at once, or only after a while; never applied either way.
            wait = world.between(200, 20_000)
            node.later(wait, done, SwapResult(SwapOutcome.NOT_DONE, None, 0, "unreachable"))
            return
        if self._loses_answer(node, plan.directory_answer_lost, move):
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
        there, back = self._delay(move), self._delay(move)
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
        for transfer, watch in list(self.watches.items()):
            if watch[1] == server:
                self._show(transfer, row, self._rev)
        return SwapResult(SwapOutcome.DONE, row, self._rev)

    def read(
        self, node: SimNode, server: ServerId, done: ReadDone, move: Move | None = None
    ) -> None:
        """Read a row; `done(known, row, rev)` is called once, at `node`."""
        world = self.world
        if self._unreachable(node, move) or self._loses_answer(
            node, world.plan.directory_answer_lost / 2, move
        ):
            node.later(world.between(200, 50_000), done, False, None, 0)
            return
        world.at(self._delay(move), self._read, node, server, done)

    def _read(self, node: SimNode, server: ServerId, done: ReadDone) -> None:
        known = self.rows.get(server)
        row, rev = known if known is not None else (None, 0)
        node.later(self._delay(None), done, True, row, rev)

    def watch(
        self, node: SimNode, server: ServerId, transfer: TransferId, shown: Shown, move: Move | None
    ) -> None:
        """Show a node the row as it is and each change of it, for the sake of a move to it.

        In any order, which is worse than real watches, and no more after the first question that
        gets lost.
        """
        if not self._unreachable(node, move) and not self._loses_answer(
            node, self.world.plan.directory_answer_lost / 2, move
        ):
            self.world.at(self._delay(move), self._begin_watch, node, server, transfer, shown)

    def _begin_watch(
        self, node: SimNode, server: ServerId, transfer: TransferId, shown: Shown
    ) -> None:
        if transfer in node.core.moves_in:
            self.watches[transfer] = (node, server, shown)
            if server in self.rows:
                self._show(transfer, *self.rows[server])

    def _show(self, transfer: TransferId, row: Row, rev: int) -> None:
        node, _, shown = self.watches[transfer]
        if not node.alive or self.unreachable(node):
            self.unwatch(transfer)
        else:
            node.later(self._delay(None), shown, row, rev)

    def unwatch(self, transfer: TransferId) -> None:
        """Show nothing more; what is under way may still come."""
        self.watches.pop(transfer, None)
