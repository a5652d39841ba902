"""How long a loop is kept awake after something was sent, and when that is not worth it.

Whoever has just sent often gets something back before it could go to sleep and be woken, which
takes about 30 us on either side of a call and its reply. So the loop is kept awake for a moment. It
does all else it has to do meanwhile; what costs is the processor's time, so where nothing comes in
time polling soon becomes rare.
"""

from __future__ import annotations

import time
from typing import Final

LEFT_OUT_MAX: Final = 256
"""Frames that are sent without polling after it was in vain again and again."""

NO_POLL_S: Final = 0.002
"""How long nothing is polled after another process was run meanwhile: then the processor's time is
what there is too little of, and its cores are awake anyway. Doubled up to `NO_POLL_S_MAX` each time
that it happens again before `NO_POLL_TIMES` as long has gone by. Source: measured, on a quiet
machine it happens a few times a second, on a busy one after every few milliseconds."""

NO_POLL_S_MAX: Final = 0.128

NO_POLL_TIMES: Final = 20

_now: Final = time.perf_counter
_busy_s: Final = time.thread_time


class Polling:
    """Decides about the polling of one channel. Nothing here looks at a socket.

    Attributes:
        until: The time, as `time.perf_counter` tells it, when polling ends; None: it is not going
            on.
    """

    __slots__ = ("_busy_s", "_from", "_leave_out", "_left_out", "_no_poll_s", "_poll_s", "until")

    def __init__(self, poll_s: float) -> None:
        """Make one that is not going on.

        Args:
            poll_s: How long is polled for what may come, in seconds.
        """
        self.until: float | None = None
        self._poll_s = poll_s
        # What processor time the loop's thread had when polling began; when it may begin again, and
        # how long it was left out then; for how many frames it is left out; and for how many after
        # the next time that it is in vain.
        self._busy_s = 0.0
        self._from = 0.0
        self._no_poll_s = NO_POLL_S
        self._left_out = 0
        self._leave_out = 0

    def begin(self) -> bool:
        """A frame was sent: tell whether polling begins now."""
        if self._left_out:
            self._left_out -= 1
        elif self.until is None:
            now = _now()
            if now >= self._from:
                self.until = now + self._poll_s
                self._busy_s = _busy_s()
                return True
        return False

    def came(self) -> None:
        """Something came in time."""
        self.until, self._leave_out = None, 0

    def stop(self) -> None:
        """What is to be looked at is not there any more."""
        self.until = None

    def lost(self) -> bool:
        """Before a look: tell whether so much time went by since the last one that it is over."""
        until = self.until
        if until is None:
            return True
        now = _now()
        if now <= until + self._poll_s:
            return False
        self.until = None
        if now - until > _busy_s() - self._busy_s:
            # It was not the loop that was busy; somebody else was given the processor.
            again = now < self._from + NO_POLL_TIMES * self._no_poll_s
            self._no_poll_s = min(2 * self._no_poll_s, NO_POLL_S_MAX) if again else NO_POLL_S
            self._from = now + self._no_poll_s
        return True

    def goes_on(self) -> bool:
        """After a look that found nothing: tell whether there is to be another."""
        until = self.until
        if until is not None and _now() < until:
            return True
        self.until = None
        self._left_out = self._leave_out
        self._leave_out = min(2 * self._leave_out + 1, LEFT_OUT_MAX)
        return False
