"""How much bulk may be on its way, so that what is small does not wait behind it.

What has left for a socket cannot be overtaken any more: a small message waits for all that stands
in the buffers of both kernels and of every router between. So bulk is held back here, where small
messages pass it, and only so much of it leaves as keeps the wire busy.

How much that is shows in the time from a mark to its echo. As long as nothing stands anywhere it is
that of the wire alone, the least that was seen; what is more is waiting. A *round* is half a window
that was sent after the last decision, and seen. After it the window grows, the less the more
waiting there was, or shrinks if there was too much of it twice in turn. A round's measure is its
least time: one frame may be late because a process was busy, and all that come for the time of one
round trip because a packet was lost, but where bulk stands, all are late and remain so.

The idea is that of LEDBAT (RFC 6817): yield to others by the delay that one causes. Waiting is
judged by the least of a time as in CoDel (RFC 8289), and the window shrinks by a factor, so that it
falls below what the wire holds and the time of the wire alone is seen again, as LEDBAT++ does.

`Pacer` is pure: it is told the time, and does no I/O.
"""

from __future__ import annotations

from collections import deque
from typing import Final

FEATURE: Final = "paced-bulk"
"""What a peer says that echoes marks."""

WINDOW_BYTES_FIRST: Final = 512 << 10
"""Source: measured, gRPC on loopback carries 400 MB/s with a round trip of a millisecond."""
WINDOW_BYTES_MIN: Final = 64 << 10
WINDOW_BYTES_MAX: Final = 64 << 20
FRAMES: Final = 4
"""A window is cut into at least so many frames, of which each has a mark. Source: measured, with 2
of them 64 MiB on loopback take 0.26 s instead of 0.30 (0.24 without pacing), but on a told wire of
20 MB/s and 10 ms what is small takes 3.9 times as long instead of 1.8."""

SLACK_S: Final = 0.00125
"""Waiting that is allowed on the shortest wire, where turns of two loops take as long. Source:
measured between two hosts of namespaces, 50 MiB of bytes moving to and fro. Without pacing moves
take 0.26 s and raise the p99 of small calls 5.3 times; with 1 ms it is 0.50 s and 2.4 times, with
1.25 ms 0.40 s and 2.6 times, with 1.5 ms 0.36 s and 2.9 times."""
SLACK_SHARE: Final = 0.25
"""Waiting that is allowed besides, as a share of the time that the wire takes. Source: on a told
wire (tests/rpc/test_pacing.py), from 5 to 100 ms and 10 to 50 MB/s, a quarter uses 0.94 to 0.99 of
the wire and raises the time of what is small 1.4 to 1.8 times; a half 0.98 to 1, 1.6 to 2.2."""
GROWTH: Final = 0.125
"""By which the window grows in a round without waiting; at first, until there was too much waiting
once, it is doubled."""
SHRINK: Final = 0.7
"""What is left of the window after too much waiting: below what the wire holds, if the window was
1.25 times as much."""

MEMORY_S: Final = 20.0
"""For how long, and up to twice as long, the least time that was seen counts: the wire may have
become another one since."""


class Pacer:
    """Decides about the bulk of one direction of one link.

    Attributes:
        sent_bytes: How much has left since the beginning.
        window_bytes: How much may be on its way.
        rate: Bytes a second that arrived while more would have been sent; None: never yet.
    """

    __slots__ = (
        "_base_s",
        "_begins",
        "_frame_bytes_max",
        "_held_back",
        "_least_s",
        "_marks",
        "_next_base_s",
        "_round_began_s",
        "_round_from",
        "_seen",
        "_seen_before",
        "_until_s",
        "_waited",
        "_waited_before",
        "rate",
        "sent_bytes",
        "window_bytes",
    )

    def __init__(self, frame_bytes_max: int) -> None:
        """Begin with nothing known.

        Args:
            frame_bytes_max: No frame has more bulk, however wide the window is.
        """
        self._frame_bytes_max = frame_bytes_max
        self.window_bytes = WINDOW_BYTES_FIRST
        self.rate: float | None = None
        self.sent_bytes = 0
        # Bytes that are known to have arrived.
        self._seen = 0
        self._marks: deque[tuple[int, float]] = deque()
        # The least time of the wire of this period, and of the one before.
        self._base_s = float("inf")
        self._next_base_s = float("inf")
        self._until_s = 0.0
        # Of this round: what had been sent and seen when it began, when that was, the least time.
        self._round_from = 0
        self._seen_before = 0
        self._round_began_s = 0.0
        self._least_s = float("inf")
        # Whether there was more to send, and no room for it.
        self._waited = False
        self._held_back = False
        # Whether there was too much waiting in the round before.
        self._waited_before = False
        self._begins = True

    @property
    def limit_bytes(self) -> int:
        """How much the next frame may have: the window's share of a frame, or nothing."""
        on_its_way = self.sent_bytes - self._seen
        share = min(self.window_bytes // FRAMES, self._frame_bytes_max)
        return share if on_its_way + share <= self.window_bytes else 0

    def sent(self, total_bytes: int, now_s: float) -> None:
        """A frame has left.

        Args:
            total_bytes: What has left since the beginning, with this one: the number of its mark.
            now_s: The time.
        """
        if self._seen == self.sent_bytes:
            # Nothing was on its way, so this is the first frame of a round.
            self._begin_round(now_s)
        self.sent_bytes = total_bytes
        self._marks.append((total_bytes, now_s))

    def seen(self, number: int, now_s: float, more_waits: bool) -> None:
        """The echo of a mark has come, and with it that of all before.

        Args:
            number: The mark's.
            now_s: The time.
            more_waits: Whether there is bulk that has not left.

        Raises:
            ValueError: There was no such mark.
        """
        self._waited |= more_waits
        self._held_back |= more_waits and not self.limit_bytes
        marks = self._marks
        sent_s = None
        while marks and marks[0][0] <= number:
            at, sent_s = marks.popleft()
            self._seen = at
        if sent_s is None or self._seen != number:
            raise ValueError(f"no mark {number} is on its way")
        took_s = now_s - sent_s
        if now_s >= self._until_s:
            self._base_s, self._next_base_s = self._next_base_s, float("inf")
            self._until_s = now_s + MEMORY_S
        self._next_base_s = min(self._next_base_s, took_s)
        self._base_s = min(self._base_s, took_s)
        if number <= self._round_from:
            return  # It left under the window of the round before.
        self._least_s = min(self._least_s, took_s)
        if number - self._round_from >= self.window_bytes // 2:
            self._end_round(now_s)
            self._begin_round(now_s)

    def _begin_round(self, now_s: float) -> None:
        self._round_from = self.sent_bytes
        self._round_began_s = now_s
        self._seen_before = self._seen
        self._least_s = float("inf")
        self._waited = self._held_back = False

    def _end_round(self, now_s: float) -> None:
        took_s = now_s - self._round_began_s
        if self._waited and took_s > 0:
            rate = (self._seen - self._seen_before) / took_s
            self.rate = rate if self.rate is None else self.rate + (rate - self.rate) / 4
        waiting_s = self._least_s - self._base_s
        allowed_s = SLACK_S + SLACK_SHARE * self._base_s
        before, self._waited_before = self._waited_before, waiting_s > allowed_s
        if self._waited_before:
            if not (before or self._begins):
                return  # A lost packet holds up what comes in the time of one round.
            self._begins = False
            if self.window_bytes == WINDOW_BYTES_MIN:
                # So little does not wait for itself: this is what the wire takes by now.
                self._base_s = self._next_base_s = self._least_s
            factor = SHRINK
        elif not self._held_back:
            return  # Something else was the limit, so that more room would tell nothing.
        elif self._begins:
            factor = 2.0
        else:
            factor = 1 + GROWTH * (1 - waiting_s / allowed_s)
        window = int(self.window_bytes * factor)
        self.window_bytes = min(max(window, WINDOW_BYTES_MIN), WINDOW_BYTES_MAX)
