"""Servers of `bench_durable`, in a module of their own.

The class of a script travels by value, and then it is in every cut: some 270 us more for each call.
"""

from __future__ import annotations

import os

import migrate


@migrate.server
class Plain:
    """A KiB of state."""

    def __init__(self) -> None:
        self.n = 0
        self.rest = os.urandom(1024)

    def incr(self) -> int:
        """Count."""
        self.n += 1
        return self.n


@migrate.server(durable=True)
class Durable(Plain):
    """The same, with a journal."""


@migrate.server
class ByHand:
    """One whose handler holds its node's loop until 4 KiB are appended and synced.

    Args:
        path: Of a file.
        zeros: So many bytes of it are filled ahead.
    """

    def __init__(self, path: str, zeros: int = 0) -> None:
        self.path = path
        self.zeros = zeros
        self.n = 0
        self.handle = -1

    def incr(self) -> int:
        """Count."""
        if self.handle < 0:
            self.handle = os.open(self.path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.pwrite(self.handle, bytes(self.zeros), 0)
            os.fsync(self.handle)
        os.pwrite(self.handle, bytes(4096), 4096 * self.n)
        os.fdatasync(self.handle)
        self.n += 1
        return self.n
