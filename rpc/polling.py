"""How long a loop is kept awake after something was sent, and when that is not worth it.

Whoever has just sent often gets something back before it could go to sleep and be woken, which
takes about 30 us on either side of a call and its reply. So the loop is kept awake for a moment. It
does all else it has to do meanwhile; what costs is the processor's time, so where nothing comes in
time polling soon becomes rare. Others may need that time for what is waited for: the other end, a
thread of gRPC's, a standby. So the processor is offered to them at each turn. Source: measured on
two cores, a call by gRPC takes 0.89 of a raw unary call without the offer and 0.5 with it; one of a
server with a standby, three processes, 450 us with an offer from 0.1 ms on and 280 with one from
the beginning; one by a Unix socket beside a busy process 310 and 130.
"""

from __future__ import annotations

import os
import time
from asyncio import AbstractEventLoop
from typing import Final
from weakref import WeakKeyDictionary

LEFT_OUT_MAX: Final = 256
"""Frames that are sent without polling after it was in vain again and again."""

NO_POLL_S: Final = 0.002
"""How long nothing is polled after another process was run meanwhile: then the processor's time is
what there is too little of, and its cores are awake anyway. Doubled up to `NO_POLL_S_MAX` each time
that it happens again before `NO_POLL_TIMES` as long has gone by. Source: measured, on a quiet
machine it happens a few times a second, on a busy one after every few milliseconds."""

NO_POLL_S_MAX: Final = 0.128

NO_POLL_TIMES: Final = 20

POLL_S: Final = 500e-6
"""How long the loop is kept awake after a frame was sent. Source: measured, an answer by a Unix
socket has come after 40 to 120 us, by gRPC on loopback after 250 to 300 if both ends are awake and
450 to 500 if none is, one that a synced journal holds back after 330 to 400. Those of other hosts
may take longer, and then polling soon becomes rare."""

CHANNELS_MAX: Final = 4
"""Channels of one loop that are polled at the same time. A look takes about a microsecond, so with
very many peers looking would be all that a loop does; and one that is awake for some channels finds
at once what comes by the others."""

_now: Final = time.perf_counter
_busy_s: Final = time.thread_time
_offer_processor: Final = getattr(os, "sched_yield", None)

_places: Final[WeakKeyDictionary[AbstractEventLoop, list[float]]] = WeakKeyDictionary()
# Of each loop: until when its places are taken.


class Polling:
    """Decides about the polling of one channel. Nothing here looks at a socket.

    Attributes:
        until: The time, as `time.perf_counter` tells it, when polling ends; None: it is not going
            on.
    """

    __slots__ = (
        "_busy_s",
        "_from",
        "_leave_out",
        "_left_out",
        "_no_poll_s",
        "_place",
        "_places",
        "until",
    )

    def __init__(self, loop: AbstractEventLoop) -> None:
        """Make one that is not going on.

        Args:
            loop: The one that is to be kept awake.
        """
        self.until: float | None = None
        self._places = _places.setdefault(loop, [0.0] * CHANNELS_MAX)
        self._place = 0
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
        elif self.until is None and _offer_processor is not None:
            now = _now()
            if now >= self._from:
                places = self._places
                for place, taken_until in enumerate(places):
                    if taken_until <= now:
                        self.until = places[place] = now + POLL_S
                        self._place = place
                        self._busy_s = _busy_s()
                        return True
        return False

    def came(self) -> None:
        """Something came; if polling is going on, in time."""
        if self.until is not None:
            self.stop()
            self._leave_out = 0

    def stop(self) -> None:
        """End it."""
        if self._places[self._place] == self.until:
            self._places[self._place] = 0.0
        self.until = None

    def lost(self) -> bool:
        """Before a look: tell whether so much time went by since the last one that it is over."""
        until = self.until
        if until is None:
            return True
        now = _now()
        if now <= until + POLL_S:
            return False
        self.stop()
        if now - until > _busy_s() - self._busy_s:
            # It was not the loop that was busy; somebody else was given the processor.
            again = now < self._from + NO_POLL_TIMES * self._no_poll_s
            self._no_poll_s = min(2 * self._no_poll_s, NO_POLL_S_MAX) if again else NO_POLL_S
            self._from = now + self._no_poll_s
        return True

    def goes_on(self) -> bool:
        """After a look that found nothing: tell whether there is to be another."""
        until = self.until
        if until is not None and _offer_processor is not None and _now() < until:
            _offer_processor()
            return not self.lost()
        self.stop()
        self._left_out = self._leave_out
        self._leave_out = min(2 * self._leave_out + 1, LEFT_OUT_MAX)
        return False
