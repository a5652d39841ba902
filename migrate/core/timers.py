"""Due times, in one heap, for everything a node waits for.

The core asks the shell for one wake-up at a time: the earliest. Cancelling is lazy: an entry
whose due time is no longer the one on record is skipped when it comes up.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable


class Timers:
    """A set of keys with due times in milliseconds.

    Popping yields keys in order of due time, then in the order they were set, so that a
    simulation repeats exactly.
    """

    __slots__ = ("_due", "_heap", "_n")

    def __init__(self) -> None:
        self._due: dict[Hashable, tuple[int, int]] = {}
        self._heap: list[tuple[int, int, Hashable]] = []
        self._n = 0

    def set(self, key: Hashable, due_ms: int) -> None:
        """Set or replace the due time of `key`."""
        self._n += 1
        self._due[key] = (due_ms, self._n)
        heapq.heappush(self._heap, (due_ms, self._n, key))
        if len(self._heap) > 64 and len(self._heap) > 4 * len(self._due):
            self._heap = [(due, n, k) for k, (due, n) in self._due.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: Hashable) -> None:
        """Forget `key`; nothing happens if it is not set."""
        self._due.pop(key, None)

    def due_ms(self, key: Hashable) -> int | None:
        """When `key` is due, or None if it is not set."""
        entry = self._due.get(key)
        return entry[0] if entry is not None else None

    def next_ms(self) -> int | None:
        """The earliest due time, or None if nothing is set."""
        heap = self._heap
        while heap:
            due, n, key = heap[0]
            if self._due.get(key) == (due, n):
                return due
            heapq.heappop(heap)
        return None

    def pop_due(self, now_ms: int) -> Hashable | None:
        """Take out and return the first key due at `now_ms` or before; None if there is none."""
        due = self.next_ms()
        if due is None or due > now_ms:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._due[key]
        return key

    def __len__(self) -> int:
        return len(self._due)
