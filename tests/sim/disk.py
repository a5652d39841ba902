"""The disks of a simulated cluster: files that grow, syncs that take a while, and power that fails.

A disk belongs to a host and outlives its processes. What a process has written survives the end of
the process, because the system has it; what was not yet written does not, and of a write that is
being made there may be the first part. A power cut takes all that was not synced, or leaves some of
it: a prefix that may end in the middle of a record, zeros in place of what did not arrive, or
sectors here and there. A name that was given and not synced is there, or the former one is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from tests.sim.host import SimNode
    from tests.sim.world import World

SECTOR_BYTES = 64
"""Small, so that a record has several."""

Told: TypeAlias = Callable[[str], None]
"""Called with why it failed; empty: it is done."""


class File:
    """What a file holds, as the system shows it, and how much of that no power cut takes."""

    def __init__(self) -> None:
        self.shown = bytearray()
        self.kept = 0

    def lose_power(self, world: World) -> None:
        """Take back some of what was not synced, or all."""
        lost = bytes(self.shown[self.kept :])
        del self.shown[self.kept :]
        if not lost:
            return
        shape = world.between(0, 2)
        if shape == 2:
            for at in range(0, len(lost), SECTOR_BYTES):
                sector = lost[at : at + SECTOR_BYTES]
                self.shown += sector if world.chance(0.6) else bytes(len(sector))
        else:
            arrived = world.between(0, len(lost))
            self.shown += lost[:arrived]
            self.shown += bytes(len(lost) - arrived) if shape else b""
        self.kept = len(self.shown)


class Disk:
    """One disk, and what is wrong with it at the moment."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.names: dict[str, File] = {}
        self.kept_names: dict[str, File] = {}
        self.held: dict[str, SimNode] = {}  # names that a process has locked
        self.writers: list[Writer] = []
        self.full = False
        self.failing = False
        self.slow = 1
        self.life = 0  # power cuts so far

    def ended(self, node: SimNode, *, power: bool) -> None:
        """A process has ended, or its host has lost power."""
        world = self.world
        for writer in [it for it in self.writers if it.node is node]:
            self.writers.remove(writer)
            if writer.writing:
                writer.file.shown += writer.writing[: world.between(0, len(writer.writing))]
        for name in [name for name, holder in self.held.items() if holder is node]:
            del self.held[name]
        if not power:
            return
        world.counts["power cut"] += 1
        self.life += 1
        for name in dict.fromkeys([*self.names, *self.kept_names]):
            shown, kept = self.names.get(name), self.kept_names.get(name)
            if shown is not kept and world.chance(0.5):
                # The change of the name did not arrive.
                self.names.pop(name, None)
                if kept is not None:
                    self.names[name] = kept
        self.kept_names = dict(self.names)
        for file in self.names.values():
            file.lose_power(world)

    def rename(self, name: str, file: File) -> None:
        """Give a file its name, in place of the one that has it."""
        self.names[name] = file

    def sync_names(self) -> None:
        """From here on the names are safe."""
        self.kept_names = dict(self.names)

    def remove(self, name: str) -> None:
        """Remove a file; that is not safe before somebody syncs the names."""
        self.names.pop(name, None)


class Writer:
    """A process's side of one file: all that waits is written and synced together."""

    def __init__(self, node: SimNode, disk: Disk, file: File) -> None:
        self.node = node
        self.disk = disk
        self.file = file
        self.error = ""
        self.closed = False  # nothing more is appended
        self.writing = b""
        self._queue: list[tuple[bytes, Told]] = []
        self._busy = False
        disk.writers.append(self)

    def append(self, data: bytes, told: Told) -> None:
        """Append; `told` is called when it is safe, or with the reason why it may not be."""
        self._queue.append((data, told))
        self._go_on()

    def _took(self, low_us: int, high_us: int) -> int:
        return self.disk.world.between(low_us, high_us) * self.disk.slow

    def _go_on(self) -> None:
        if self._busy or not self._queue:
            return
        self._busy = True
        group, self._queue = self._queue, []
        self.writing = b"".join(data for data, _ in group)
        self.node.later(self._took(10, 300), self._write, group)

    def _write(self, group: list[tuple[bytes, Told]]) -> None:
        world = self.disk.world
        data, self.writing = self.writing, b""
        if not self.error and self.disk.full:
            world.counts["disk full"] += 1
            self.file.shown += data[: world.between(0, len(data))]
            self.error = "the disk is full"
        if self.error:
            self._tell(group)
            return
        self.file.shown += data
        took = self._took(100, 4_000)
        # The system goes on with it whether the process is stopped meanwhile or not.
        world.at(took, self._synced, group, len(self.file.shown), self.disk.life)

    def _synced(self, group: list[tuple[bytes, Told]], size: int, life: int) -> None:
        world = self.disk.world
        if life != self.disk.life:
            return
        world.counts["sync"] += 1
        world.counts["appends synced"] += len(group)
        if self.disk.failing:
            world.counts["sync fails"] += 1
            self.error = self.error or "the disk fails"
        else:
            self.file.kept = max(self.file.kept, size)
        self.node.input(self._tell, group)

    def _tell(self, group: list[tuple[bytes, Told]]) -> None:
        self._busy = False
        for _, told in group:
            told(self.error)
        self._go_on()
        if not self._busy and self.closed:
            self.disk.writers.remove(self)


__all__ = ["Disk", "File", "Writer"]
