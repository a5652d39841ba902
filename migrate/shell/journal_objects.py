"""Journals in an object store: a sequence of objects, each put only where nothing is.

The objects of a server are `<prefix><server>/<number>`, numbered from 1 without a gap, whoever
writes. Each is a *segment*: a header and records, as a file has them, chained to the segment before
it. A segment that begins with a whole state is a *base*, and needs nothing before it. An append is
durable when the segment that it went with is there; what is appended while a segment is on its way
goes with the next one.

Numbers fence. A segment is put only under a name that nothing has, so whoever begins to write puts
a segment of its own, without records, under the next number: from then on every put of a former
writer, however late, finds its number taken, and it stops. What the former one wrote before is
complete by then. So: fence first, then read, then write a base, then swap the row; the row names
the journal that counts, and until it names the new one, the old one is all there. `prune` removes
what is before the base, when the row is known to name this journal.

While a base is on its way what follows waits for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import quote

import msgspec

from migrate.errors import Outcome
from migrate.shell import journal
from migrate.shell.journal import Appends, Done, JournalFailed, Phase
from migrate.shell.journal_format import (
    BadJournal,
    Buffer,
    Encoder,
    Facts,
    Found,
    Kind,
    check_header,
    read_segments,
)
from migrate.shell.stores import Exists, NotThere, Store, StoreError

GROUP_S: Final = 0.02
"""A segment takes what is appended within this time. Every put is paid for, and takes some 10 ms
and more; what is appended while one is on its way goes together anyhow."""
GROUP_BYTES: Final = 8 << 20
"""A segment with so many bytes waits no longer."""
SEGMENTS_MAX: Final = 256
"""A journal with so many segments after its base is full: each takes a request to read back."""
THREADS: Final = 8
"""Journals that put at the same time."""
WAITS_S: Final = (0.1, 0.4, 1.6, 6.4)
"""Before a put that failed is tried again; then the journal has failed."""
_DIGITS: Final = 16


class JournalFenced(JournalFailed):
    """Another writer has begun: nothing that this one appends counts any more."""


class _Append(msgspec.Struct, eq=False):
    kind: Kind
    number: int
    record: Buffer
    state: Sequence[Buffer]
    whole: bool
    size: int
    done: Done


def _name(prefix: str, server: str, segment: int) -> str:
    return f"{_folder(prefix, server)}{segment:0{_DIGITS}}"


def _folder(prefix: str, server: str) -> str:
    return f"{prefix}{quote(server, safe='')}/"


def segments(store: Store, prefix: str, server: str) -> list[int]:
    """Numbers of all segments of a server, in order.

    Raises:
        StoreError: They cannot be listed.
    """
    folder = _folder(prefix, server)
    names = (name[len(folder) :] for name in store.names(folder))
    return [int(name) for name in names if len(name) == _DIGITS and name.isdecimal()]


def fence(store: Store, prefix: str, facts: Facts, key: bytes) -> int:
    """Keep every former writer of a server from writing any more.

    Args:
        store: Where.
        prefix: What the names of all objects begin with.
        facts: Those of the journal that is to be written from now on.
        key: What signs it.

    Returns:
        The number of the next segment, which is for the new journal's base.

    Raises:
        StoreError: It cannot be done; whether it was may be unknown, and it may be asked again.
    """
    known = segments(store, prefix, facts.server)
    number = known[-1] + 1 if known else 1
    while True:
        told = msgspec.structs.replace(facts, segment=number, base=False)
        header = Encoder(told, key).header
        try:
            _put(store, _name(prefix, facts.server, number), [header])
        except Exists:
            number += 1  # a former writer, or another one who begins
        else:
            return number + 1


def load_objects(
    store: Store, prefix: str, server: str, journal: str, key: bytes, bytes_max: int
) -> Found:
    """Read and verify a journal; to be complete, its writer has to be fenced before.

    Args:
        store: Where.
        prefix: What the names of all objects begin with.
        server: Whose.
        journal: Its id, as the directory's row names it.
        key: What it must be signed with.
        bytes_max: No more is read.

    Raises:
        BadJournal: It cannot be used.
    """
    kept: list[tuple[int, bytes | bytearray]] = []
    try:
        for number in reversed(segments(store, prefix, server)):
            try:
                data = store.read(_name(prefix, server, number), bytes_max)
            except NotThere:
                break  # removed meanwhile, as what is before a base is
            # Verified, also of what is passed over: else a change there would hide a segment.
            facts = check_header(data, key)
            if facts.journal != journal:
                if kept:
                    break
                continue
            bytes_max -= len(data)
            kept.insert(0, (number, data))
            if facts.base:
                return read_segments(kept, key, journal)
    except StoreError as error:
        raise BadJournal("store", f"it cannot be read: {error.reason}") from error
    if kept:
        raise BadJournal("truncated", "its first whole cut is not there")
    raise BadJournal("missing", f"there is no segment of journal {journal}")


def _put(store: Store, name: str, pieces: Sequence[Buffer]) -> None:
    """Put an object where nothing is, and find out whether it was done.

    Raises:
        Exists: Something else is there.
        StoreError: It could not be done, or nobody knows.
    """
    waits = iter(WAITS_S)
    while True:
        try:
            store.write_new(name, pieces)
            return
        except Exists:
            # It may have come from this very call, when an answer was lost.
            mine = b"".join(pieces)
            try:
                if store.read(name, 1 << 62, len(mine) + 1) == mine:
                    return
            except NotThere:
                pass  # whoever wrote it has gone on and removed it
            except StoreError as error:
                raise StoreError(error.reason, Outcome.UNKNOWN) from error
            raise
        except StoreError:
            wait = next(waits, None)
            if wait is None:
                raise
            time.sleep(wait)


class ObjectJournal(Appends):
    """One journal in an object store as its owner has it, on the loop.

    Attributes:
        facts: What its headers tell, but for number and base.
        segment: Number of the next segment.
        phase: Where it stands.
        error: Why it takes nothing any more; None: it does.
        base_bytes: Size of its base.
        log_bytes: What was appended after that.
        backlog_bytes: What waits to be written.
    """

    def __init__(
        self,
        log: ObjectLog,
        facts: Facts,
        segment: int,
        on_full: Callable[[ObjectJournal], None] | None,
    ) -> None:
        super().__init__()
        self.facts = facts
        self.segment = segment
        self.phase = Phase.NEW
        self.error: JournalFailed | None = None
        self.base_bytes = 0
        self.log_bytes = 0
        self.backlog_bytes = 0
        self._log = log
        self._on_full = on_full
        self._asked = False
        self._base = 0  # number of the last base that is there
        self._tag = b""
        self._waiting: list[_Append] = []
        self._flying: list[_Append] = []
        self._timer: asyncio.TimerHandle | None = None
        self._mine = False

    def close(self, done: Done | None = None) -> None:
        """Append that this is the end; of one without a whole cut nothing is left."""
        told = done or journal._ignore
        if self.phase in (Phase.FAILED, Phase.CLOSED):
            told(self.error)
        elif self.number is None:
            self._fail(JournalFailed("the journal was closed before its first cut"))
            told(None)
        else:
            self._append(Kind.END, self.number, b"", (), False, told)
            self.phase = Phase.CLOSED
            self._log.forget(self)
            self._go()

    def prune(self) -> None:
        """Remove what is before the base, now and from now on: the row names this journal."""
        self._mine = True
        if self._base:
            self._log.run(self._remove_before, self._base)

    def _remove_before(self, base: int) -> None:
        log = self._log
        try:
            for number in segments(log.store, log.prefix, self.facts.server):
                if number >= base:
                    break
                log.store.remove(_name(log.prefix, self.facts.server, number))
        except StoreError:
            pass  # the next base tries again

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
        if self.phase is Phase.CLOSED:
            raise JournalFailed("the journal is closed", Outcome.NOT_DONE)
        size = self._size(record, state)
        if self.backlog_bytes and self.backlog_bytes + size > journal.BACKLOG_BYTES_MAX:
            raise JournalFailed(
                f"{self.backlog_bytes} bytes wait to be written to the journal", Outcome.NOT_DONE
            )
        self.backlog_bytes += size
        self._waiting.append(
            _Append(kind, number, record, state, whole, size, done or journal._ignore)
        )
        if self.number is None and not whole:
            return  # all up to the first whole cut is one base
        if self.backlog_bytes >= GROUP_BYTES:
            self._go()
        elif self._timer is None:
            self._timer = self._log.loop.call_later(GROUP_S, self._go)

    def _go(self) -> None:
        """Put the next segment, unless one is on its way."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._flying or not self._waiting or self.error is not None:
            return
        group: list[_Append] = []
        size = 0
        base = False
        for append in self._waiting:
            if append.whole and self._base and group:
                break  # a base begins a segment
            base = base or append.whole
            group.append(append)
            size += append.size
            if size >= GROUP_BYTES and (self._base or base):
                break
        del self._waiting[: len(group)]
        self._flying = group
        if base:
            self.base_bytes, self.log_bytes = size, 0
        else:
            self.log_bytes += size
        facts = msgspec.structs.replace(self.facts, segment=self.segment, base=base)
        future = self._log.run(self._put_group, facts, b"" if base else self._tag, group)
        future.add_done_callback(lambda future: self._arrived(base, size, future))

    def _put_group(self, facts: Facts, previous: bytes, group: list[_Append]) -> bytes:
        log = self._log
        encoder = Encoder(facts, log.key, previous)
        pieces: list[Buffer] = [encoder.header]
        for append in group:
            pieces += encoder.record(
                append.kind,
                append.number,
                append.record,
                append.state,
                whole=append.whole,
                synced=0,
            )
        try:
            _put(log.store, _name(log.prefix, facts.server, facts.segment), pieces)
        except Exists as error:
            raise JournalFenced(
                f"segment {facts.segment} of server {facts.server} is there already: another "
                "writer has begun",
                Outcome.NOT_DONE,
            ) from error
        except StoreError as error:
            raise JournalFailed(
                f"the journal cannot be written: {error.reason}", error.outcome
            ) from error
        return encoder.tag

    def _arrived(self, base: bool, size: int, future: asyncio.Future[bytes]) -> None:
        group, self._flying = self._flying, []
        if future.cancelled():
            self._flying = group
            self._fail(JournalFailed("the journal was left alone", Outcome.UNKNOWN))
            return
        error = future.exception()
        if error is not None:
            self._flying = group
            failed = error if isinstance(error, JournalFailed) else JournalFailed(str(error))
            self._fail(failed)
            return
        self._tag = future.result()
        self.backlog_bytes -= size
        if base:
            self._base = self.segment
            self._asked = False
            if self._mine:
                self.prune()
        self.segment += 1
        if self.phase is Phase.NEW:
            self.phase = Phase.OPEN
        for append in group:
            append.done(None)
        full = self.log_bytes > max(journal.LOG_BYTES_MIN, 2 * self.base_bytes)
        full = full or self.segment - self._base > SEGMENTS_MAX
        if full and not self._asked and self.phase is Phase.OPEN and self._on_full is not None:
            self._asked = True
            self._on_full(self)
        # What came meanwhile has waited long enough.
        self._go()

    def _fail(self, error: JournalFailed) -> None:
        if self.error is not None:
            return
        self.error = error
        self.phase = Phase.FAILED
        self._log.forget(self)
        untold = self._flying + self._waiting
        self._flying, self._waiting = [], []
        for append in untold:
            append.done(error)


class ObjectLog:
    """All journals of one node in one place of an object store; for one loop.

    Args:
        store: The store.
        prefix: What the names of all objects begin with; "" or a folder with its slash.
        key: What signs them.
        loop: The loop.
    """

    def __init__(
        self, store: Store, prefix: str, key: bytes, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.store = store
        self.prefix = prefix
        self.key = key
        self.loop = loop
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "journals in objects")
        self._journals: list[ObjectJournal] = []

    def run(self, function: Callable[..., bytes | None], *args: object) -> asyncio.Future[bytes]:
        """Run something that blocks."""
        return self.loop.run_in_executor(self._threads, function, *args)  # type: ignore[arg-type]

    def create(
        self,
        facts: Facts,
        segment: int,
        *,
        on_full: Callable[[ObjectJournal], None] | None = None,
    ) -> ObjectJournal:
        """Begin a journal.

        Args:
            facts: What its headers tell.
            segment: Number of its first segment, as `fence` has told it.
            on_full: Called when a whole cut is wanted, to be appended as any other.
        """
        made = ObjectJournal(self, facts, segment, on_full)
        self._journals.append(made)
        return made

    def forget(self, which: ObjectJournal) -> None:
        """A journal is closed, or has failed."""
        if which in self._journals:
            self._journals.remove(which)

    async def close(self) -> None:
        """Close all journals in order, and end the threads."""
        closed = []
        for which in list(self._journals):
            closed.append(self.loop.create_future())
            which.close(closed[-1].set_result)
        await asyncio.gather(*closed)
        await asyncio.to_thread(self._threads.shutdown)


__all__ = [
    "JournalFenced",
    "ObjectJournal",
    "ObjectLog",
    "fence",
    "load_objects",
    "segments",
]
