"""Servers whose every acknowledged call is to come back after every process was killed."""

from __future__ import annotations

import migrate


@migrate.server(durable=True)
class Ledger:
    """Keeps what it was told, in order."""

    def __init__(self) -> None:
        self.lines: list[int] = []
        self.ticks = 0

    def add(self, line: int) -> int:
        """Note a line; how many there are."""
        self.lines.append(line)
        return len(self.lines)

    def all(self) -> list[int]:
        """Every line."""
        return list(self.lines)

    def count(self) -> int:
        """How many lines there are."""
        return len(self.lines)

    @migrate.every(seconds=0.05)
    def tick(self) -> None:
        """Show that timers go on."""
        self.ticks += 1

    def ticked(self) -> int:
        """How often."""
        return self.ticks


@migrate.server(durable=True)
class Teller:
    """Passes on what it is told, in the middle of a run."""

    def __init__(self, ledger: migrate.Ref[Ledger]) -> None:
        self.ledger = ledger
        self.told = 0

    async def tell(self, line: int) -> int:
        """Add a line to the ledger."""
        count = await self.ledger.add(line)
        self.told += 1
        return count
