"""Waking a thread, or a loop, from another thread without a quarrel over the interpreter.

What the standard library wakes threads with (queues, locks, conditions) does so while the waking
thread holds the interpreter lock. The woken one finds that taken and sleeps again, until the first
comes to a system call, and then once more for the lock of the lock: three switches for one, if
both are on one processor. A system call is made with the interpreter free, so whoever wakes by it
can be taken over from at once. Source: `perf record -e sched:sched_switch` of a node whose loop
hands a write to a thread: from `queue.SimpleQueue.put` to the first line of the thread took 40 us.

`loop.call_soon_threadsafe` does wake by a system call, but through a pair of sockets, which the
loop then reads until it fails.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections import deque
from collections.abc import Callable


class Bell:
    """Rung by any thread; one thread waits for it, or one loop.

    What there is to do is put where the woken one looks *before* ringing. A ring is kept until it
    was heard; several before that may be heard as one.
    """

    def __init__(self) -> None:
        self._heard, self._rope = os.pipe()
        self._rung = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def ring(self) -> None:
        """Wake whoever waits, now or next time. Never blocks."""
        if not self._rung:
            # Two may ring at once, which is as good as one; but never are there many bytes.
            self._rung = True
            os.write(self._rope, b"\0")

    def wait(self) -> None:
        """Block until it was rung since the last time."""
        os.read(self._heard, 64)
        self._rung = False  # from here on another ring is heard: now look what there is

    def hang(
        self,
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context,
        do: Callable[[], None],
    ) -> None:
        """Have a loop do something when it is rung; called on the loop."""
        self._loop = loop

        def heard() -> None:
            self.wait()
            do()

        context.run(loop.add_reader, self._heard, heard)

    def close(self) -> None:
        """Nobody rings or waits any more; if it hangs at a loop, called there."""
        if self._loop is not None:
            self._loop.remove_reader(self._heard)
        os.close(self._heard)
        os.close(self._rope)


class Posts:
    """Functions that any threads want to be run on a loop; made on the loop.

    Args:
        loop: Where they run, in the order in which they were posted.
        context: In which context.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, context: contextvars.Context) -> None:
        self._todo: deque[Callable[[], None]] = deque()
        self._bell = Bell()
        self._bell.hang(loop, context, self._run)

    def post(self, do: Callable[[], None]) -> None:
        """Run a function on the loop soon; from any thread."""
        self._todo.append(do)
        self._bell.ring()

    def _run(self) -> None:
        todo = self._todo
        try:
            while todo:
                todo.popleft()()
        finally:
            if todo:
                self._bell.ring()  # one has failed; the others have their turn

    def close(self) -> None:
        """Run what was posted; nobody posts any more. On the loop."""
        self._run()
        self._bell.close()


__all__ = ["Bell", "Posts"]
