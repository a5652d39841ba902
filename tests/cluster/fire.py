"""Callers that never let up while their server is moved, and the judgement of what they saw."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import migrate


@dataclass
class Calls:
    """What one caller saw: the results in the order of its calls."""

    values: list[int] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    gap_s: float = 0.0


@dataclass
class Fire:
    """What a run saw as a whole."""

    calls: list[Calls]
    reports: list[migrate.MoveReport]
    final: int | None
    took_s: float

    @property
    def count(self) -> int:
        """Calls that returned a value."""
        return sum(len(c.values) for c in self.calls)

    @property
    def failed_calls(self) -> int:
        """Calls that ended in an error."""
        return sum(len(c.failures) for c in self.calls)

    def violations(self) -> list[str]:
        """What contradicts the promises; empty if they were kept."""
        found = []
        for n, calls in enumerate(self.calls):
            if calls.failures:
                found.append(f"caller {n}: {len(calls.failures)} failed: {calls.failures[0]!r}")
            if any(a >= b for a, b in zip(calls.values, calls.values[1:], strict=False)):
                found.append(f"caller {n}: its calls were not handled in order")
        tally = Tally(value for calls in self.calls for value in calls.values)
        repeated = [value for value, times in tally.items() if times > 1]
        if repeated:
            found.append(f"{len(repeated)} values came twice, as {repeated[0]}")
        missing = set(range(1, self.count + 1)) - set(tally)
        if missing:
            found.append(f"{len(missing)} of 1..{self.count} never came, as {min(missing)}")
        if self.final is not None and self.final != self.count + self.failed_calls:
            found.append(
                f"{self.count} calls returned, {self.failed_calls} failed, "
                f"and {self.final} were executed"
            )
        return found

    def figures(self) -> str:
        """One line for people."""
        down = sorted(r.downtime_s for r in self.reports) or [0.0]
        gap = max((c.gap_s for c in self.calls), default=0.0)
        return (
            f"{len(self.reports)} moves, {self.count} calls in {self.took_s:.1f} s, "
            f"failed_calls {self.failed_calls}; downtime_s median {down[len(down) // 2]:.4f} "
            f"p99 {down[int(len(down) * 0.99)]:.4f} max {down[-1]:.4f}; "
            f"longest gap a client saw {gap:.4f} s"
        )


async def keep_calling(ref: Any, in_flight: int, ended: asyncio.Event) -> Calls:
    """Call `incr` with so many calls in flight until told, then wait for what is under way.

    A failure ends the run for everybody, since it is what the test is about.
    """
    calls = Calls()
    waiting: deque[Any] = deque()
    last = time.monotonic()
    while True:
        while len(waiting) < in_flight and not ended.is_set():
            waiting.append(ref.incr())
        if not waiting:
            return calls
        try:
            calls.values.append(await waiting.popleft())
        except migrate.MigrateError as error:
            calls.failures.append(error)
            ended.set()
        now = time.monotonic()
        calls.gap_s = max(calls.gap_s, now - last)
        last = now


async def under_fire(
    refs: list[Any],
    move: Callable[[], Any],
    *,
    moves: int,
    in_flight: int = 32,
    call_between: bool = False,
    disturb: Callable[[int], None] = lambda n: None,
) -> Fire:
    """Move a counter again and again while callers call it.

    Args:
        refs: The counter's ref, as each of the callers has it.
        move: Moves it once and returns the report.
        moves: How often.
        in_flight: Calls that each caller has under way.
        call_between: Whether a call has to return after each move.
        disturb: Told the number of the move just done.

    Returns:
        What was seen; the counter started at 0.
    """
    ended = asyncio.Event()
    begun = time.monotonic()
    reports: list[migrate.MoveReport] = []
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(keep_calling(ref, in_flight, ended)) for ref in refs]
        for n in range(moves):
            if ended.is_set():
                break
            reports.append(await move())
            disturb(n)
            if call_between:
                with contextlib.suppress(migrate.MigrateError):
                    # A failure shows in the calls of the callers too.
                    await refs[0].get()
        ended.set()
    took_s = time.monotonic() - begun
    try:
        final: int | None = await refs[0].get.with_options(timeout=5.0)()
    except migrate.MigrateError:
        final = None  # The failures of the callers say it already.
    return Fire([task.result() for task in tasks], reports, final, took_s)
