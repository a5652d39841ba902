"""How busy this node is, and how busy the others say they are."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import psutil

from migrate.core.ids import NodeId
from migrate.core.incarnation import Incarnation
from migrate.core.messages import Load
from migrate.core.placement import Candidate

INTERVAL_S: Final = 1.0
"""Between two rounds in which nodes tell each other their figures."""

CPU_S: Final = 0.1
"""psutil's CPU figure means little over a shorter time; a sample before that repeats the last."""

FRESH_S: Final = 5.0
"""Older figures are no longer trusted: five samples were missed."""


@dataclass(slots=True)
class _Heard:
    load: Load
    at_s: float


class Meter:
    """Samples this process, and keeps what was heard from the others."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent(None)
        self._cpu_at_s = time.monotonic()
        self._heard: dict[NodeId, _Heard] = {}
        self._placed: dict[NodeId, deque[float]] = {}
        self.cpu = 0.0
        self.memory = 0.0

    def sample(self, servers: Iterable[Incarnation], draining: bool, cordoned: bool) -> Load:
        """Measure now; CPU is since the last sample, in cores."""
        now = time.monotonic()
        if now - self._cpu_at_s >= CPU_S:
            self._cpu_at_s = now
            self.cpu = self._process.cpu_percent(None) / 100
        self.memory = self._process.memory_percent() / 100
        count = depth = 0
        for inc in servers:
            count += 1
            depth += len(inc.mailbox)
        return Load(count, self.cpu, self.memory, depth, draining, cordoned)

    def hear(self, node: NodeId, load: Load) -> None:
        """Keep what a node says of itself."""
        self._heard[node] = _Heard(load, time.monotonic())

    def spawned(self, node: NodeId) -> None:
        """A server was placed on `node`; its figures do not show it yet."""
        self._placed.setdefault(node, deque()).append(time.monotonic())

    def _placed_lately(self, node: NodeId) -> int:
        """How many were placed there since figures of now can have been taken."""
        placed = self._placed.get(node)
        if placed is None:
            return 0
        while placed and time.monotonic() - placed[0] > 1.5 * INTERVAL_S:
            placed.popleft()
        return len(placed)

    def forget(self, node: NodeId) -> None:
        """The node is gone."""
        self._heard.pop(node, None)
        self._placed.pop(node, None)

    def is_draining(self, node: NodeId) -> bool:
        """Whether the node is being emptied, as far as was heard of it."""
        heard = self._heard.get(node)
        return heard is not None and heard.load.draining

    def admits(self, node: NodeId) -> bool:
        """Whether the node takes servers, as far as was heard of it."""
        heard = self._heard.get(node)
        return heard is None or not (heard.load.draining or heard.load.cordoned)

    def candidate(self, node: NodeId) -> Candidate | None:
        """What the placement may know of a node; None if nothing fresh was heard."""
        heard = self._heard.get(node)
        if heard is None or time.monotonic() - heard.at_s > FRESH_S:
            return None
        load = heard.load
        return Candidate(
            node,
            load.cpu,
            load.memory,
            load.mailbox,
            load.servers,
            not (load.draining or load.cordoned),
            self._placed_lately(node),
        )
