"""Servers whose standbys are measured by `bench_standbys`."""

from __future__ import annotations

import random

import numpy as np

import migrate


@migrate.server
class Small:
    """About a kibibyte."""

    def __init__(self) -> None:
        self.n = 0
        self.padding = bytes(1000)

    def write(self) -> int:
        self.n += 1
        return self.n


@migrate.server
class Arrays:
    """Memory of which a call writes one page in a thousand."""

    def __init__(self, mebibytes: int) -> None:
        self.data = np.ones(mebibytes << 20, dtype="u1")
        self.n = 0

    def write(self) -> int:
        self.n += 1
        pages = len(self.data) // 4096
        some = max(1, pages // 1000)
        at = random.randrange(pages - some) * 4096
        self.data[at : at + some * 4096] += 1
        return self.n


@migrate.server
class Records:
    """Small records in a dict, one of them changed by a call."""

    def __init__(self, count: int) -> None:
        self.records = {
            i: {"id": i, "name": f"n{i}", "tags": [i, i + 1], "value": i * 0.5}
            for i in range(count)
        }
        self.n = 0

    def write(self) -> int:
        self.n += 1
        self.records[self.n * 7919 % len(self.records)]["value"] += 1
        return self.n


@migrate.server(deterministic=True)
class Deterministic(Records):
    """The same, whose standbys run what it runs."""
