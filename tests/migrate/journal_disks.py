"""A journal's threads and disk for tests: run by hand, and losing power at any step."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from migrate.shell import journal as journal_module
from migrate.shell.journal import JournalFailed, JournalLog, LogDisk
from migrate.shell.journal_format import Facts, Found, Kind

KEY = b"k" * 32
FOLDER = "/sim"


def facts(**changes: object) -> Facts:
    """A journal's of one server."""
    told: dict[str, object] = {
        "journal": "j1",
        "server": "srv/1",
        "cls": "tests:Counter",
        "version": 1,
        "node": "n1@1",
        "epoch": 3,
        **changes,
    }
    return Facts(**told)  # type: ignore[arg-type]


class Inline(journal_module._Committer):
    """A committer without a thread: a group is committed when the test says so."""

    def __init__(self, post: journal_module.Post, soon: journal_module.Post | None = None) -> None:
        super().__init__("inline", post, soon=soon)
        self.works: list[journal_module._Work] = []

    def _hand_over(self, work: journal_module._Work) -> None:
        self.works.append(work)
        self._waiting.setdefault(work.file, deque())

    def run(self, works_max: int | None = None) -> bool:
        """Commit what waits as one group; tell whether there was anything."""
        group, self.works = self.works[:works_max], self.works[works_max or len(self.works) :]
        files: dict[journal_module._File, list[journal_module._Work]] = {}
        for work in group:
            files.setdefault(work.file, []).append(work)
        # Side by side, as threads may do it.
        for file, works in files.items():
            file.write(works)
        for file in files:
            file.sync()
        for file, works in files.items():
            self._end(file, works)
            if not any(work.file is file for work in self.works):
                del self._waiting[file]
        return bool(group)

    def stop(self) -> None:
        pass


class ByHand:
    """A log whose groups are committed, and whose results are told, step by step.

    Args:
        folder: Where.
        disk: On what.
        holds: The loop commits what is alone in a turn of its, from the first append on.
    """

    def __init__(
        self, folder: str | os.PathLike[str], disk: LogDisk, *, holds: bool = False
    ) -> None:
        self.posted: list[Callable[[], None]] = []
        self.todo: list[Callable[[], None]] = []
        self.log = JournalLog(folder, KEY, self.posted.append, disk)
        self.commits = Inline(self.posted.append, self.todo.append if holds else None)
        self.commits._quick = journal_module.HOLD_AFTER
        self.bases = Inline(self.posted.append)
        self.log.commits, self.log.bases = self.commits, self.bases

    def turn(self) -> None:
        """The loop has handled what it has got: what is left to do in this turn."""
        while self.todo:
            self.todo.pop(0)()

    def tell(self) -> None:
        """What threads have posted."""
        posted, self.posted[:] = list(self.posted), []
        for function in posted:
            function()

    def settle(self) -> None:
        """Until nothing is left to do."""
        while True:
            self.turn()
            done = self.commits.run()
            self.tell()
            done |= self.bases.run()
            self.tell()
            if not done and not self.posted and not self.todo:
                return


class Told:
    """What an owner was told, for each append."""

    def __init__(self) -> None:
        self.safe: set[int] = set()
        self.failed: dict[int, JournalFailed] = {}

    def of(self, number: int) -> Callable[[JournalFailed | None], None]:
        """The `done` of that number."""

        def done(error: JournalFailed | None) -> None:
            if error is None:
                self.safe.add(number)
            else:
                self.failed[number] = error

        return done


Logged = tuple[Kind, int, bytes, bytes]


def logged(found: Found) -> list[Logged]:
    """What was found, chunks first."""
    return [
        (record.kind, record.number, bytes(record.record), bytes(record.state))
        for record in [*found.chunks, *found.records]
    ]


# ------------------------------------------------------------------------ power


class PowerCut(BaseException):
    """Nothing after this happens."""


@dataclass
class SimFile:
    """Contents as the system shows them, as they are on the platters, and writes in between."""

    shown: bytearray = field(default_factory=bytearray)
    kept: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        if len(self.shown) < offset:
            self.shown += bytes(offset - len(self.shown))
        self.shown[offset : offset + len(data)] = data
        self.writes.append((offset, data))

    def sync(self) -> None:
        self.kept = bytes(self.shown)
        self.writes.clear()

    def after_the_cut(self, rng: Random, ghost: bytes, every: bool) -> Iterator[bytes]:
        """Contents that the platters may have now.

        Args:
            rng: Chance.
            ghost: What a part of the disk that was never written may hold: an older file.
            every: Cut off at each byte of what was written, else at some.
        """
        yield self.kept
        if not self.writes:
            return
        yield bytes(self.shown)
        todo = b"".join(data for _, data in self.writes)
        # Zeros at the end are as good as the same not written.
        length = len(todo.rstrip(b"\0")) + 1
        places = range(length) if every else sorted(rng.sample(range(length), min(40, length)))
        for place in places:
            yield self._with(lambda at, place=place: at < place)
        for _ in range(12):
            # Sectors arrive in any order, or not at all; so may the size.
            kept = {n for n in range(len(todo) // SECTOR_BYTES + 1) if rng.random() < 0.6}
            contents = self._with(lambda at, kept=kept: at // SECTOR_BYTES in kept)
            yield contents
            yield contents[: rng.randrange(len(self.kept), len(contents) + 1)]
            # A file system that gives out blocks before they are written shows what was there.
            blank = self._with(lambda at, kept=kept: at // SECTOR_BYTES in kept, ghost)
            yield blank

    def _with(self, arrived: Callable[[int], bool], ghost: bytes = b"") -> bytes:
        out = bytearray(self.kept)
        if len(out) < len(self.shown):
            fill = ghost[len(out) : len(self.shown)]
            out += fill + bytes(len(self.shown) - len(out) - len(fill))
        at = 0
        for offset, data in self.writes:
            for n in range(len(data)):
                if arrived(at + n):
                    out[offset + n] = data[n]
            at += len(data)
        return bytes(out)


SECTOR_BYTES = 32
"""Small, so that a record has several."""


@dataclass
class SimDisk(LogDisk):
    """A disk that loses at a power cut whatever was not synced, in any order.

    Changes of names that were not synced may or may not be there.
    """

    cut_at: int = -1
    steps: int = 0
    names: dict[str, SimFile] = field(default_factory=dict)
    kept_names: dict[str, SimFile] = field(default_factory=dict)
    changes: list[tuple[str, str, SimFile | None]] = field(default_factory=list)
    files: list[SimFile] = field(default_factory=list)

    def _step(self) -> None:
        self.steps += 1
        if self.steps == self.cut_at:
            raise PowerCut

    def make_folder(self, folder: str) -> None:
        pass

    def create(self, path: str) -> int:
        self._step()
        file = SimFile()
        self.names[path] = file
        self.changes.append(("set", path, file))
        self.files.append(file)
        return len(self.files) - 1

    def write(self, handle: int, piece: memoryview) -> None:
        raise AssertionError("a journal writes at an offset")

    def write_at(self, handle: int, pieces: Sequence[memoryview], offset: int) -> None:
        self._step()
        self.files[handle].write(offset, b"".join(pieces))
        self._step()

    def sync(self, handle: int) -> None:
        self._step()
        self.files[handle].sync()
        self._step()

    def sync_data(self, handle: int) -> None:
        self._step()
        self.files[handle].sync()
        self._step()

    def close(self, handle: int) -> None:
        pass

    def rename(self, path: str, to: str) -> None:
        self._step()
        file = self.names.pop(path)
        self.names[to] = file
        self.changes.append(("move", f"{path}\0{to}", file))
        self._step()

    def sync_folder(self, folder: str) -> None:
        self._step()
        self.kept_names = dict(self.names)
        self.changes.clear()
        self._step()

    def remove(self, path: str) -> None:
        self._step()
        self.names.pop(path, None)
        self.changes.append(("remove", path, None))

    def after_the_cut(
        self, path: str, rng: Random, ghost: bytes = b"", every: bool = False
    ) -> Iterator[bytes | None]:
        """Everything that may be under a name; None: there is no such name."""
        for happened in range(1 << len(self.changes)):
            names = dict(self.kept_names)
            for n, (what, name, file) in enumerate(self.changes):
                if not happened >> n & 1:
                    continue
                if what == "set" and file is not None:
                    names[name] = file
                elif what == "move" and file is not None:
                    source, to = name.split("\0")
                    names.pop(source, None)
                    names[to] = file
                else:
                    names.pop(name, None)
            if path in names:
                yield from names[path].after_the_cut(rng, ghost, every)
            else:
                yield None


class Failing(LogDisk):
    """A disk on which the n-th call of one kind fails, once, and takes what was not synced along.

    So does Linux after a failed sync: the pages count as clean, and the next sync succeeds.
    """

    def __init__(self, failing: str, at: int, code: int = errno.EIO) -> None:
        self.failing = failing
        self.at = at
        self.code = code
        self.calls = 0
        self.failed: list[int] = []
        self.after: list[str] = []

    def _call(self, name: str, handle: int) -> None:
        if handle in self.failed:
            self.after.append(name)
        if name == self.failing:
            self.calls += 1
            if self.calls == self.at:
                self.failed.append(handle)
                raise OSError(self.code, os.strerror(self.code))

    def write_at(self, handle: int, pieces: Sequence[memoryview], offset: int) -> None:
        self._call("write_at", handle)
        super().write_at(handle, pieces, offset)

    def sync_data(self, handle: int) -> None:
        self._call("sync_data", handle)
        super().sync_data(handle)

    def sync(self, handle: int) -> None:
        self._call("sync", handle)
        super().sync(handle)

    def rename(self, path: str, to: str) -> None:
        self._call("rename", -1)
        super().rename(path, to)

    def sync_folder(self, folder: str) -> None:
        self._call("sync_folder", -1)
        super().sync_folder(folder)
