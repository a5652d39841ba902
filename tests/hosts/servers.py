"""Servers of the tests on several hosts."""

from __future__ import annotations

import time


class Timed:
    """Tells when it last left and arrived. Hosts of namespaces share the machine's clock."""

    def __init__(self) -> None:
        self.left_s = 0.0
        self.arrived_s = 0.0

    def on_depart(self) -> None:
        self.left_s = time.monotonic()

    def on_arrive(self) -> None:
        self.arrived_s = time.monotonic()

    def times(self) -> tuple[float, float]:
        return self.left_s, self.arrived_s
