"""The time by which ids of sessions tell their age, shared by all nodes of a cluster.

Theory of operation. A session's id says when it was opened, so that a late repeat of its first
request is refused once its state may have been dropped (`delivery.may_open`). Whoever receives it
reads that time by its own clock, and the monotonic clocks of hosts begin at different instants. So
each node adds to its own clock what it lacks, to be no later than any clock it has heard of: clocks
are told when a link comes up and now and then, and every node follows the one that is furthest
ahead. The shared time never goes back. What differs is a message's delay and some drift, which is
nothing beside the minutes that ids may be wrong by.

A node whose clock is far ahead of the others makes them *jump*. Ids from before a jump are still on
their way then, so each jump is remembered: an id from before it lies far below it, and its age
leaves out what was jumped over.

All else (timers, leases, deadlines, silence) is measured by a node's own clock or travels as what
remains.

Source: the rule to follow the latest is that of Lamport, CACM 21 (1978); keeping it near to real
clocks, Kulkarni et al., "Logical Physical Clocks", OPODIS 2014.
"""

from __future__ import annotations

JUMP_MS = 1000
"""A smaller correction is no jump: it counts for nothing in the age of a session."""

JUMPS_MAX = 16
"""Jumps that are told apart; older ones are so long ago that ids from before are too old anyway,
unless nodes from sixteen hosts, each up for longer than the one before, join within minutes."""


class SharedClock:
    """See the module's text. `now_ms` is of this node's own clock, in all methods."""

    __slots__ = ("_jumps", "ahead_ms")

    def __init__(self) -> None:
        self.ahead_ms = 0
        # The shared time just before each jump, and its size; oldest first.
        self._jumps: list[tuple[int, int]] = []

    def now(self, now_ms: int) -> int:
        """The shared time."""
        return now_ms + self.ahead_ms

    def hear(self, told_ms: int, now_ms: int) -> bool:
        """Take note of another's shared time; whether that made a jump."""
        more_ms = told_ms - self.now(now_ms)
        if more_ms <= 0:
            return False
        jump = more_ms >= JUMP_MS
        if jump:
            self._jumps.append((self.now(now_ms), more_ms))
            del self._jumps[:-JUMPS_MAX]
        self.ahead_ms += more_ms
        return jump

    def follow(self, told_ms: int, now_ms: int) -> None:
        """Take another's time for the shared one, also if it is behind: of a client, which opens
        sessions and receives none, before it opens the first.
        """
        self.ahead_ms = told_ms - now_ms

    def age(self, born_ms: int, now_ms: int) -> int:
        """How long ago a session was opened that says when; below 0 if its clock was ahead."""
        time_ms = self.now(now_ms)
        for before_ms, size_ms in reversed(self._jumps):
            # NB: others jump a little later, and go on from before until they do.
            if born_ms >= before_ms + size_ms // 2:
                break
            time_ms -= size_ms
        return time_ms - born_ms
