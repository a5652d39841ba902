"""Journals on this node's disk: a server's state stream in a file, committed in groups.

One file for each journal; a few threads that commit for all of them. `Journal.append` only puts
what it is given into a queue, uncopied. A thread takes everything that waits for one file, writes
it with one call, and syncs the file once; then it tells all who waited. So the longer a sync takes,
the more go with the next one. Files are synced side by side, and none waits for another: the disk
flushes its cache once for syncs that meet. Nor are writes direct and asynchronous. Source:
measured, with O_DIRECT and RWF_DSYNC by libaio, which tells the loop without a thread: the
submission alone takes 35 to 55 us, and it is over no sooner than with the thread.

A lone append the loop writes and syncs itself, if the disk has been quick for a while, as a handler
may hold the loop too: no thread has to wake, and nobody has to wake the loop. Source: measured, a
call of a durable server with nothing else in flight takes 450 us instead of 900, where one without
a journal takes 140 and a handler that does nothing but such a sync 350. The loop is held at most
two thirds of the time; never for what two files have got, which are synced side by side; and not at
all once a sync has taken long, the longer the less soon again. So by a disk that begins to hang it
is held for one sync.

A file is written under a temporary name until its first whole cut (with what goes ahead of it) is
safe: this first part may be large, so it is written by a second thread. Then it gets its name,
which replaces the file of that name in one step, also through a power cut. A journal that has grown
calls `on_full`; its owner begins another one that `replaces` it, and gives each append to both
until the new one has its name.

A name says the journal's id, which says owner, epoch and a number, and is given once. So an owner
that was replaced, and names its file late in a folder that it shares with its successor, takes no
other's place: the file is one that no row names (any more), is opened by nobody, and goes when a
node next looks for what is left over.

Room for the records to come is filled with zeros ahead, so that a sync changes no metadata. Source:
measured here, the median of a 4 KiB append with fdatasync falls from 207 to 119 us; room that is
only reserved (fallocate) saves a tenth. What was synced is not written again, but the page that it
ends in is, with the same bytes: a disk that tears a write inside of a sector of 512 bytes could
take it along, as with every log that does not pad to sectors (SQLite: "powersafe overwrite").

A write or sync that fails poisons its journal, for good: after a failed sync the system may throw
away what it could not write, and the next sync would succeed. Source: Rebello and others, Can
Applications Recover from fsync Failures?, USENIX ATC 2020.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import enum
import fcntl
import functools
import hmac
import os
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias
from urllib.parse import quote

from migrate.errors import Outcome
from migrate.shell.bell import Bell
from migrate.shell.journal_format import (
    HEAD_BYTES,
    NUMBER_MAX,
    RECORD_BYTES_MAX,
    STATE_BYTES_MAX,
    BadJournal,
    Buffer,
    Encoder,
    Facts,
    Found,
    Kind,
    read,
)
from migrate.shell.stores import WRITE_BYTES, Disk

SUFFIX: Final = ".journal"
STALE: Final = ".stale"
_TEMPORARY: Final = ".part"

LOG_BYTES_MIN: Final = 4 << 20
"""A journal is not full before its log has so many bytes, nor before twice its first part."""
ROOM_BYTES_MIN: Final = 64 << 10
ROOM_BYTES_MAX: Final = 1 << 20
"""How far zeros are written ahead: as much as was logged, between these."""
BACKLOG_BYTES_MAX: Final = 256 << 20
"""What may wait in one journal to be written; a single larger append is taken if nothing waits."""
GROUP_BYTES_MAX: Final = 8 << 20
"""A group is closed when it has so many bytes, so that the first in it does not wait for all."""
THREADS_MAX: Final = 8
"""Files synced side by side: the disk flushes its cache once for those that meet. Source: measured
here, 16 files of 4 KiB: one after the other 4.4 ms, by two 2.0, by four 1.4, by eight 1.2 ms."""
PIECES_MAX: Final = 1024
"""Pieces that the system writes with one call (IOV_MAX)."""
HOLD_S: Final = 0.001
"""What a write and sync may take for the loop to do the next one itself: as long as a handler."""
HOLD_AFTER: Final = 16
"""So many in a row, and one more for each `HOLD_S` of the last one that took longer."""

JOINED_BYTES_MAX: Final = 64 << 10
"""A group up to this size is copied into one piece, which costs less than handling many."""

_ZEROS: Final = memoryview(bytes(ROOM_BYTES_MAX))


class JournalFailed(Exception):
    """Something could not be made durable; the journal takes nothing any more.

    Attributes:
        reason: Why, in words.
        outcome: NOT_DONE: what was to be appended is not there. UNKNOWN: it may be.
    """

    def __init__(self, reason: str, outcome: Outcome = Outcome.UNKNOWN) -> None:
        super().__init__(reason, outcome)
        self.reason = reason
        self.outcome = outcome

    def __str__(self) -> str:
        return self.reason


Done: TypeAlias = Callable[[JournalFailed | None], None]
Post: TypeAlias = Callable[[Callable[[], None]], object]


class LogDisk(Disk):
    """The system calls that a journal is made of; tests give one that loses power."""

    def write_at(self, handle: int, pieces: Sequence[memoryview], offset: int) -> None:
        """Write all of the pieces, one after the other, from an offset on."""
        if len(pieces) == 1 and pieces[0].nbytes <= WRITE_BYTES:
            wrote = os.pwritev(handle, pieces, offset)
            if wrote == pieces[0].nbytes:
                return
            pieces = [pieces[0][wrote:]]
            offset += wrote
        todo = [piece for piece in pieces if piece.nbytes]
        todo.reverse()
        while todo:
            group: list[memoryview] = []
            size = 0
            while todo and len(group) < PIECES_MAX and size < WRITE_BYTES:
                piece = todo.pop()
                if piece.nbytes > WRITE_BYTES:
                    todo.append(piece[WRITE_BYTES:])
                    piece = piece[:WRITE_BYTES]
                group.append(piece)
                size += piece.nbytes
            wrote = os.pwritev(handle, group, offset)
            offset += wrote
            for piece in reversed(group):
                # What is left of the group, if the system took less, goes again.
                size -= piece.nbytes
                if wrote < size + piece.nbytes:
                    todo.append(piece[max(0, wrote - size) :])

    def make_folder(self, folder: str) -> None:
        """Make a folder that only its user can read, unless it is there, and make it safe."""
        if not os.path.isdir(folder):
            os.makedirs(folder, 0o700)
            self.sync_folder(os.path.dirname(folder))

    def sync_data(self, handle: int) -> None:
        """Wait until what was written cannot be lost, as far as it can be read again."""
        os.fdatasync(handle)


class Phase(enum.Enum):
    """Where a journal stands; known to the loop alone."""

    NEW = enum.auto()  # it has no name yet; its first whole cut is not safe
    SETTLING = enum.auto()  # that is safe; the name is being given
    OPEN = enum.auto()
    FAILED = enum.auto()
    CLOSED = enum.auto()


class _Op(enum.Enum):
    """What a thread does with a file besides appending."""

    SETTLE = enum.auto()  # give it its name
    CLOSE = enum.auto()


class _Work:
    """One append, or a step in a file's life, on its way through a thread."""

    __slots__ = ("done", "file", "kind", "number", "record", "size", "state", "whole")

    def __init__(
        self,
        file: _File,
        kind: Kind | _Op,
        done: Done,
        number: int = 0,
        record: Buffer = b"",
        state: Sequence[Buffer] = (),
        whole: bool = False,
        size: int = 0,
    ) -> None:
        self.file = file
        self.kind = kind
        self.done = done
        self.number = number
        self.record = record
        self.state = state
        self.whole = whole
        self.size = size


class _File:
    """The side of a journal that belongs to the thread that has it at the time."""

    def __init__(self, disk: LogDisk, path: str, facts: Facts, key: bytes) -> None:
        self._disk = disk
        self._path = path
        folder, name = os.path.split(path)
        self._folder = folder
        self._temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}{_TEMPORARY}")
        self._encoder = Encoder(facts, key)
        self._handle: int | None = None
        self._named = False
        self._base = 0  # where the log begins
        self._size = 0
        self._synced = 0
        self.error: JournalFailed | None = None

    def has_room(self, size: int) -> bool:
        """Whether so many bytes go over zeros, so that a sync changes no metadata."""
        return size <= self._size - self._encoder.offset

    def write(self, works: Sequence[_Work]) -> bool:
        """Write a group's records; `error` tells whether it could be done.

        Returns:
            Whether the file has grown, so that a sync changes metadata.
        """
        if self.error is not None:
            return False
        encoder = self._encoder
        pieces: list[Buffer] = []
        grows = False
        try:
            if self._handle is None:
                self._handle = self._disk.create(self._temporary)
                pieces.append(encoder.header)
                start = 0
            else:
                start = encoder.offset
            for work in works:
                if type(work.kind) is Kind:
                    pieces += encoder.record(
                        work.kind,
                        work.number,
                        work.record,
                        work.state,
                        whole=work.whole,
                        synced=self._synced,
                    )
            if not pieces:
                return False
            end = encoder.offset
            if end - start <= JOINED_BYTES_MAX:
                pieces = [b"".join(pieces)]
            views = [memoryview(piece).cast("B") for piece in pieces]
            grows = end > self._size
            if grows:
                room = 0
                if self._named or any(work.whole for work in works):
                    self._base = self._base or end
                    room = min(max(ROOM_BYTES_MIN, end - self._base), ROOM_BYTES_MAX)
                    views.append(_ZEROS[:room])
                self._size = end + room
            self._disk.write_at(self._handle, views, start)
        except Exception as error:
            # Whatever it is (memory that was released too early, say), nobody may wait for ever.
            self._fail(f"the journal cannot be written: {_text(error)}")
        return grows

    def sync(self) -> None:
        """Wait until all that was written is safe; `error` tells whether it is."""
        if self.error is not None or self._handle is None:
            return
        end = self._encoder.offset
        if end == self._synced:
            return
        try:
            self._disk.sync_data(self._handle)
        except OSError as error:
            self._fail(f"the journal cannot be synced: {_text(error)}")
        else:
            self._synced = end

    def settle(self) -> None:
        """Give the file its name, in place of the one that has it; `error` tells."""
        if self.error is not None or self._handle is None:
            return
        try:
            self._disk.sync(self._handle)
            self._disk.rename(self._temporary, self._path)
        except OSError as error:
            why = f"the journal cannot be given its name: {_text(error)}"
            self._fail(why, Outcome.NOT_DONE)
            return
        self._named = True
        try:
            self._disk.sync_folder(self._folder)
        except OSError as error:
            self._fail(
                "the journal has its name, but whether it would keep it through a power cut is "
                f"not known: {_text(error)}"
            )

    def close(self) -> None:
        """Close the file; one without a name goes."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):  # it is synced, or it failed already
                self._disk.close(handle)
            if not self._named:
                with contextlib.suppress(OSError):
                    self._disk.remove(self._temporary)
        if self.error is None:
            self.error = JournalFailed("the journal is closed", Outcome.NOT_DONE)

    def _fail(self, reason: str, outcome: Outcome = Outcome.UNKNOWN) -> None:
        # NB: never sync this handle again; a later success would mean nothing.
        self.error = JournalFailed(reason, outcome)
        self.close()


class _Committer:
    """Threads that write and sync what is put into their queue, group by group.

    A group is what waits for one file, and a file is in one thread at a time; so all that comes
    while a file is being synced goes together with its next sync, and no file waits for others.
    What comes alone the loop may commit itself; see the module.

    Args:
        name: What the threads are called.
        post: Runs a function on the loop soon; called from any thread.
        threads_max: How many there may be.
        soon: Runs a function on the loop when what the loop has got is handled; None: the loop
            commits nothing.
    """

    def __init__(
        self, name: str, post: Post, threads_max: int = 1, soon: Post | None = None
    ) -> None:
        self._name = name
        self._post = post
        self._threads_max = threads_max
        self._soon = soon
        self._alone: _Work | None = None  # what the loop commits, unless more comes before that
        self._held_until_s = 0.0
        self._held_s = 0.0  # and for how long, the last time
        self._quick = 0  # so many commits in a row were; below 0: so many do not count yet
        self._lock = threading.Lock()
        # Of files that a thread has, or is to have: what waits. And which ones are to be had.
        self._waiting: dict[_File, deque[_Work]] = {}
        self._ready: deque[_File] = deque()
        self._threads: list[tuple[threading.Thread, Bell]] = []
        self._idle: list[Bell] = []
        self._stopping = False

    def put(self, work: _Work) -> None:
        """Queue it; its `done` is called on the loop."""
        alone, self._alone = self._alone, None
        if alone is not None:
            self._hand_over(alone)
        elif self._soon is not None and self._may_hold(work):
            self._alone = work
            self._soon(self._commit_alone)
            return
        self._hand_over(work)

    def _may_hold(self, work: _Work) -> bool:
        """Whether the loop may wait for the disk."""
        return (
            self._quick >= HOLD_AFTER
            and not self._waiting  # no thread has a file, nor does one get any but from here
            and type(work.kind) is Kind
            and work.kind is not Kind.END
            and work.size <= JOINED_BYTES_MAX
            and work.file.has_room(work.size)
            and 2 * (time.perf_counter() - self._held_until_s) >= self._held_s
        )

    def _commit_alone(self) -> None:
        work, self._alone = self._alone, None
        if work is None:
            return  # it was not alone
        self._held_s = self._commit(work.file, [work])
        self._held_until_s = time.perf_counter()
        work.done(work.file.error)

    def _commit(self, file: _File, group: list[_Work]) -> float:
        """Write and sync; in any thread. How long it took, in seconds."""
        begin_s = time.perf_counter()
        is_room_new = file.write(group)
        file.sync()
        took_s = time.perf_counter() - begin_s
        if not is_room_new:
            # NB: of two that meet one may be lost, and that is all.
            self._quick = self._quick + 1 if took_s < HOLD_S else -int(took_s / HOLD_S)
        return took_s

    def _hand_over(self, work: _Work) -> None:
        """Give it to a thread."""
        file = work.file
        with self._lock:
            waiting = self._waiting.get(file)
            if waiting is not None:
                waiting.append(work)
                return
            self._waiting[file] = deque([work])
            self._ready.append(file)
            # The one that became idle last: its caches are the warmest.
            bell = self._idle.pop() if self._idle else None
        if bell is not None:
            bell.ring()
        elif len(self._threads) < self._threads_max:
            self._begin()

    def _begin(self) -> None:
        bell = Bell()
        name = f"{self._name} {len(self._threads)}"
        thread = threading.Thread(target=self._run, args=[bell], name=name, daemon=True)
        self._threads.append((thread, bell))
        thread.start()

    def stop(self) -> None:
        """End when all that was queued is done; blocks."""
        with self._lock:
            self._stopping = True
            idle, self._idle = self._idle, []
        for bell in idle:
            bell.ring()
        for thread, bell in self._threads:
            thread.join()
            bell.close()
        self._threads.clear()

    def _run(self, bell: Bell) -> None:
        while True:
            with self._lock:
                file = self._ready.popleft() if self._ready else None
                if file is None:
                    if self._stopping:
                        return
                    self._idle.append(bell)
                else:
                    group = _group(self._waiting[file])
            if file is None:
                bell.wait()
                continue
            self._commit(file, group)
            self._end(file, group)
            with self._lock:
                if self._waiting[file]:
                    self._ready.append(file)
                else:
                    del self._waiting[file]

    def _end(self, file: _File, group: list[_Work]) -> None:
        ends = False
        for work in group:
            if work.kind is _Op.SETTLE:
                file.settle()
            elif work.kind is Kind.END or work.kind is _Op.CLOSE:
                ends = True
        error = file.error
        if ends:
            file.close()

        def tell() -> None:
            for work in group:
                work.done(error)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._post(tell)


def _group(waiting: deque[_Work]) -> list[_Work]:
    """Take what is written at once."""
    group: list[_Work] = []
    size = 0
    while waiting and size < GROUP_BYTES_MAX:
        work = waiting.popleft()
        group.append(work)
        size += work.size
    return group


class Appends(abc.ABC):
    """What the owner of a journal appends, wherever the journal is kept.

    Each append takes a `done`, which is called once, on the loop: with None when it and everything
    before it is durable, or with the reason why it is not. Until then nothing that was given may
    change; nothing is copied.

    Attributes:
        facts: What its header tells.
        phase: Where it stands.
        error: Why it takes nothing any more; None: it does.
        number: Number of the last CUT or STEP appended; None: none yet.
    """

    facts: Facts
    phase: Phase
    error: JournalFailed | None

    def __init__(self) -> None:
        self.number: int | None = None
        self._chunks = 0

    @abc.abstractmethod
    def close(self, done: Done | None = None) -> None:
        """Append that this is the end; of one without a whole cut nothing is left.

        `done` is called when it is closed, at once if it is.
        """

    def chunk(self, state: Sequence[Buffer], done: Done | None = None) -> None:
        """Append a part of the state that goes ahead of the first cut; raises as `cut` does."""
        if self.number is not None:
            raise ValueError("chunks go ahead of the first cut")
        self._append(Kind.CHUNK, self._chunks, b"", state, False, done)
        self._chunks += 1

    def cut(
        self,
        number: int,
        record: Buffer,
        state: Sequence[Buffer],
        *,
        whole: bool,
        done: Done | None = None,
    ) -> None:
        """Append what a server is at a quiescent point.

        Args:
            number: The next number of the owner's log; the first may be any.
            record: The core's part.
            state: The object's part, in pieces.
            whole: Nothing but this (and the chunks before it, if it is the first cut) is needed.
            done: Told of the result.

        Raises:
            ValueError: The number is not the next one, the first cut is not whole, or a size is
                beyond its bound.
            JournalFailed: The journal takes nothing any more, or too much waits in it; nothing
                was appended.
        """
        if self.number is None and not whole:
            raise ValueError("the first cut has to be whole")
        self._numbered(Kind.CUT, number, record, state, whole, done)

    def step(self, number: int, record: Buffer, done: Done | None = None) -> None:
        """Append the record of an outgoing request; raises as `cut` does."""
        if self.number is None:
            raise ValueError("the first record has to be a whole cut")
        self._numbered(Kind.STEP, number, record, (), False, done)

    def epoch(self, row: Buffer, done: Done | None = None) -> None:
        """Append the directory's row as it is from here on; raises as `cut` does."""
        self._append(Kind.EPOCH, self.number or 0, row, (), False, done)

    def _numbered(
        self,
        kind: Kind,
        number: int,
        record: Buffer,
        state: Sequence[Buffer],
        whole: bool,
        done: Done | None,
    ) -> None:
        if not 0 < number < NUMBER_MAX or (self.number is not None and number != self.number + 1):
            raise ValueError(f"number {number} cannot follow {self.number}")
        self._append(kind, number, record, state, whole, done)
        self.number = number

    @abc.abstractmethod
    def _append(
        self,
        kind: Kind,
        number: int,
        record: Buffer,
        state: Sequence[Buffer],
        whole: bool,
        done: Done | None,
    ) -> None: ...

    @staticmethod
    def _size(record: Buffer, state: Sequence[Buffer]) -> int:
        record_bytes = _bytes_of(record)
        state_bytes = sum(map(_bytes_of, state))
        if record_bytes > RECORD_BYTES_MAX or state_bytes > STATE_BYTES_MAX:
            raise ValueError(f"a record of {record_bytes} and a state of {state_bytes} bytes")
        return HEAD_BYTES + record_bytes + state_bytes


def _bytes_of(piece: Buffer) -> int:
    return len(piece) if type(piece) is bytes else memoryview(piece).nbytes


class Journal(Appends):
    """One journal in a file as its owner has it, on the loop.

    When another journal has replaced this one, a `done` that was not called yet is never called,
    if it belongs to an append that the other one got too: that one's counts. What the first cut of
    the other one covers is told as ever.

    Attributes:
        facts: What its header tells.
        path: Where it is, once it has its name.
        phase: Where it stands.
        error: Why it takes nothing any more; None: it does.
        base_bytes: Size of its first part: the first whole cut and what goes ahead.
        log_bytes: What was appended after that.
        backlog_bytes: What waits to be written.
    """

    def __init__(
        self,
        log: JournalLog,
        facts: Facts,
        path: str,
        replaces: Journal | None,
        on_full: Callable[[Journal], None] | None,
    ) -> None:
        super().__init__()
        self.facts = facts
        self.path = path
        self.phase = Phase.NEW
        self.error: JournalFailed | None = None
        self.base_bytes = 0
        self.log_bytes = 0
        self.backlog_bytes = 0
        self._log = log
        self._file = _File(log.disk, path, facts, log.key)
        self._replaces = replaces
        self._on_full = on_full
        self._full_from = LOG_BYTES_MIN
        # Done, but not to be told before a name is given: its own, or that of its replacement.
        self._untold: list[tuple[int, Done, JournalFailed | None]] = []
        self._suspended = False
        self._superseded = False
        self._appends = 0
        self._covered = 0  # by the first cut of its replacement: so many of its first appends
        # The thread of first parts has so many appends of this journal; while it has any after the
        # name was given, later ones wait here, so that all are written in order.
        self._slow = 0
        self._named = False
        self._quick = False
        self._waiting: list[_Work] = []
        self._closing: Done | None = None

    # -- what its owner does

    def close(self, done: Done | None = None) -> None:
        """See `Appends.close`; the file is closed too."""
        told = done or _ignore
        if self.phase in (Phase.FAILED, Phase.CLOSED):
            told(self.error)
        elif self.phase is Phase.OPEN or self.number is None:
            slow = not self._quick and not self._waits

            def ended(error: JournalFailed | None) -> None:
                if slow:
                    self._slow -= 1
                self._go_quick()
                if not self._named:
                    self._tell_untold(JournalFailed("the journal was closed before its first cut"))
                told(error)

            self._queue(_Work(self._file, Kind.END, ended, self.number or 0))
            self.phase = Phase.CLOSED
            self._log.forget(self)
        else:
            self._closing = told  # when it has its name

    # -- the way of an append

    def _append(
        self,
        kind: Kind,
        number: int,
        record: Buffer,
        state: Sequence[Buffer],
        whole: bool,
        done: Done | None,
    ) -> None:
        if self.error is not None:
            raise self.error
        if self.phase is Phase.CLOSED or self._closing is not None:
            raise JournalFailed("the journal is closed", Outcome.NOT_DONE)
        size = self._size(record, state)
        if self.backlog_bytes and self.backlog_bytes + size > BACKLOG_BYTES_MAX:
            raise JournalFailed(
                f"{self.backlog_bytes} bytes wait to be written to the journal", Outcome.NOT_DONE
            )
        self.backlog_bytes += size
        if self.number is None:
            self.base_bytes += size
        else:
            self.log_bytes += size
        first = whole and self.number is None
        if first and self._replaces is not None:
            self._replaces._covered = self._replaces._appends
        self._appends += 1
        place = self._appends
        slow = not self._quick and not self._waits
        appended = functools.partial(self._appended, place, size, first, slow, done or _ignore)
        self._queue(_Work(self._file, kind, appended, number, record, state, whole, size))

    @property
    def _waits(self) -> bool:
        """The name was given, and the thread of first parts still has appends."""
        return self._named and not self._quick

    def _queue(self, work: _Work) -> None:
        if self._quick:
            self._log.commits.put(work)
        elif self._waits:
            self._waiting.append(work)
        else:
            self._slow += 1
            self._log.bases.put(work)

    def _appended(
        self,
        place: int,
        size: int,
        first: bool,
        slow: bool,
        done: Done,
        error: JournalFailed | None,
    ) -> None:
        self.backlog_bytes -= size
        if slow:
            self._slow -= 1
        if self._superseded:
            self._go_quick()
            if place <= self._covered:
                done(None)
            return
        if error is not None:
            if self._suspended:
                self._untold.append((place, done, error))
                self._fail(error)
            else:
                self._fail(error)
                done(error)
            return
        if self.phase in (Phase.NEW, Phase.SETTLING) or self._suspended:
            self._untold.append((place, done, None))
        else:
            done(None)
        if first and self.phase is Phase.NEW:
            self.phase = Phase.SETTLING
            if self._replaces is not None:
                # From here on the word of the former one counts no more: what is appended now may
                # be safe there and not yet here when this file takes its name.
                self._replaces._suspended = True
            self._log.bases.put(_Work(self._file, _Op.SETTLE, self._settled))
        self._go_quick()
        if self.phase is Phase.OPEN and not self._suspended:
            full_bytes = max(self._full_from, 2 * self.base_bytes)
            if self.log_bytes > full_bytes and self._on_full is not None:
                # Asked again if the one that is to replace this one comes to nothing.
                self._full_from = self.log_bytes + full_bytes
                self._on_full(self)

    def _settled(self, error: JournalFailed | None) -> None:
        former, self._replaces = self._replaces, None
        if error is not None:
            if former is not None:
                if error.outcome is Outcome.NOT_DONE:
                    former._go_on()
                else:
                    former._give_up(error)
            self._fail(error)
            return
        self.phase = Phase.OPEN
        self._named = True
        if former is not None:
            former._replaced()
        self._tell_untold()
        self._go_quick()
        if self._closing is not None:
            done, self._closing = self._closing, None
            self.close(done)

    def _go_quick(self) -> None:
        if not self._waits or self._slow:
            return
        self._quick = True
        waiting, self._waiting = self._waiting, []
        for work in waiting:
            self._log.commits.put(work)

    def _tell_untold(self, failed: JournalFailed | None = None) -> None:
        untold, self._untold = self._untold, []
        for _, done, error in untold:
            done(failed or error)

    def _fail(self, error: JournalFailed) -> None:
        if self.error is not None:
            return
        former, self._replaces = self._replaces, None
        if former is not None:
            former._go_on()
        self.error = error
        self.phase = Phase.FAILED
        self._log.forget(self)
        if not self._suspended:
            self._tell_untold(error)
        waiting, self._waiting = self._waiting, []
        for work in waiting:
            work.done(error)
        if self._closing is not None:
            self._closing(error)

    # -- being replaced

    def _go_on(self) -> None:
        """What was to replace this one came to nothing."""
        self._suspended = False
        self._tell_untold(self.error)

    def _replaced(self) -> None:
        self._superseded = True
        untold, self._untold = self._untold, []
        for place, done, _ in untold:
            if place <= self._covered:
                done(None)
        if self.phase is Phase.OPEN:
            self._queue(_Work(self._file, _Op.CLOSE, _ignore))
            self.phase = Phase.CLOSED
            self._log.forget(self)

    def _give_up(self, error: JournalFailed) -> None:
        """Nobody knows which of the two files a power cut would leave; neither is good any more."""
        self._suspended = False
        if self.phase is Phase.OPEN:
            # What it still has is not written in order any more, and nobody is told that it is.
            (self._log.commits if self._quick else self._log.bases).put(
                _Work(self._file, _Op.CLOSE, _ignore)
            )
            self._fail(error)
        else:
            self._tell_untold(error)


def _text(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _ignore(error: JournalFailed | None) -> None:
    pass


def _resolve(future: asyncio.Future[None], error: JournalFailed | None) -> None:
    if not future.done():
        future.set_result(None)


class JournalLog:
    """All journals of one node in one folder; for one loop.

    Args:
        folder: Where they are; made if it is not there.
        key: What signs them.
        post: Runs a function on the loop soon; called from any thread.
        disk: The system calls.
        soon: Runs a function on the loop when what the loop has got is handled; only called there.
            None: every sync is a thread's.

    Raises:
        OSError: There is no such folder, and none can be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        key: bytes,
        post: Post,
        disk: LogDisk | None = None,
        *,
        soon: Post | None = None,
    ) -> None:
        self.folder = os.path.abspath(folder)
        self.key = key
        self.disk = disk or LogDisk()
        self.disk.make_folder(self.folder)
        self.commits = _Committer("journals", post, THREADS_MAX, soon)
        self.bases = _Committer("first parts of journals", post)
        self._journals: list[Journal] = []

    def create(
        self,
        facts: Facts,
        *,
        replaces: Journal | None = None,
        on_full: Callable[[Journal], None] | None = None,
    ) -> Journal:
        """Begin a journal; it has its name once its first whole cut is safe.

        Args:
            facts: What its header tells.
            replaces: The one that has the same id and server; from the first cut of the new one
                on, everything is appended to both. It goes on if the new one fails.
            on_full: Called on the loop when one that `replaces` it is wanted.
        """
        path = os.path.join(self.folder, file_name(facts))
        if replaces is not None and (replaces.path != path or replaces.phase is not Phase.OPEN):
            raise ValueError("only an open journal of the same id and server is replaced")
        journal = Journal(self, facts, path, replaces, on_full)
        self._journals.append(journal)
        return journal

    def forget(self, journal: Journal) -> None:
        """A journal is closed, or has failed."""
        if journal in self._journals:
            self._journals.remove(journal)

    async def close(self) -> None:
        """Close all journals in order, and end the threads."""
        loop = asyncio.get_running_loop()
        closed: list[asyncio.Future[None]] = []
        for journal in list(self._journals):
            closed.append(loop.create_future())
            journal.close(functools.partial(_resolve, closed[-1]))
        await asyncio.gather(*closed)
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """End the threads when all that was appended is done; blocks, closes no journal."""
        self.bases.stop()
        self.commits.stop()


# ------------------------------------------------------------------------ finding


def signing_key(secret: bytes) -> bytes:
    """The key that signs the journals of a cluster."""
    return hmac.digest(secret, b"livemigrate journal key 1", "sha256")


def file_name(facts: Facts) -> str:
    """What a journal's file is called."""
    return f"{quote(facts.server, safe='')}~{quote(facts.journal, safe='')}{SUFFIX}"


def find(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of all journals in a folder, sorted; none if there is no such folder.

    Raises:
        BadJournal: The folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadJournal("store", f"{folder} cannot be read: {error.strerror or error}") from error
    return [os.path.join(folder, name) for name in sorted(names) if name.endswith(SUFFIX)]


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what writers that were killed left without a name."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(".") and name.endswith(f"{_TEMPORARY}") and SUFFIX in name:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError, BadJournal), held(path):
                    os.unlink(path)


def load(path: str, key: bytes, bytes_max: int, *, is_held: bool = False) -> Found:
    """Read and verify a journal; see `journal_format.read`.

    Args:
        path: Where it is.
        key: What it must be signed with.
        bytes_max: Nothing larger is read.
        is_held: The caller holds it.

    Raises:
        BadJournal: It cannot be used.
    """
    try:
        with held(path, lock=not is_held) as handle:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise BadJournal("foreign", "it is no regular file")
            if status.st_size > bytes_max:
                raise BadJournal(
                    "store", f"it has {status.st_size} bytes; up to {bytes_max} are read"
                )
            data = bytearray(status.st_size)
            view = memoryview(data)
            done = 0
            while done < len(data):
                got = os.preadv(handle, [view[done : done + WRITE_BYTES]], done)
                if not got:
                    raise BadJournal("store", "it became shorter while it was read")
                done += got
    except FileNotFoundError as error:
        raise BadJournal("missing", "there is no such file") from error
    except OSError as error:
        raise BadJournal("store", f"it cannot be read: {error.strerror or error}") from error
    return read(data, key)


def set_aside(path: str, disk: LogDisk | None = None) -> str:
    """Rename a journal that is of no use any more, so that it is not found again.

    Returns:
        Where it is now.

    Raises:
        OSError: It cannot be renamed.
    """
    disk = disk or LogDisk()
    to = path + STALE
    disk.rename(path, to)
    disk.sync_folder(os.path.dirname(path))
    return to


@contextlib.contextmanager
def held(path: str, *, exclusive: bool = False, lock: bool = True) -> Iterator[int]:
    """A descriptor of a file that nobody writes to, and nobody else opens if it is exclusive.

    Raises:
        BadJournal: Somebody does.
        OSError: It cannot be opened.
    """
    # A named pipe in its place would wait for a writer for ever.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        try:
            if lock:
                kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadJournal("in use", "a process writes to it") from error
        except OSError:
            pass  # a file system without locks
        if lock and not os.path.samestat(os.fstat(handle), os.stat(path)):
            # Between the two steps another process has put its own in its place.
            raise BadJournal("in use", "a process has just begun to write to it")
        yield handle
    finally:
        os.close(handle)


__all__ = [
    "Journal",
    "JournalFailed",
    "JournalLog",
    "LogDisk",
    "Phase",
    "file_name",
    "find",
    "held",
    "load",
    "set_aside",
    "signing_key",
    "sweep",
]
