"""Journals in an object store: a sequence of objects, each put only where nothing is.

The objects of a server are `<prefix><server>/<number>`, numbered from 1 without a gap, whoever
writes. Each is a *segment*: a header and records, as a file has them, chained to the segment before
it. A segment that begins with a whole state is a *base*, and needs nothing before it. An append is
durable when the segment that it went with is there; what is appended while a segment is on its way
goes with the next one.

Numbers fence. A segment is put only under a name that nothing has, so whoever begins to write puts
a *fence*, which has no records, under the next number, and looks that nothing is behind it: from
then on every put of a former writer, however late, finds its number taken, and it stops. What the
former one wrote before is complete by then. The base comes under the number after the fence, and
nowhere else: whoever has put a fence of his own there since has stopped this writer.

    a new journal     fence, base, swap the row so that it names this journal
    opened again      read the row, fence, read the journal, swap the row as it was read, base

    an owner fenced   look for the last number, swap the row as it is, the next segment behind it

Whatever is let out lies behind a swap after the fence, and of two who do this at once one swap is
refused, because it compares the row as it was before that one's fence. So an owner that lives and
was taken for gone is either replaced, or goes on past the fences of those whose swaps are refused:
whoever comes later takes its number again. Until the row names a new journal, the old one is all
there; one that was opened goes on under its id.

Two who open the same journal do not push each other on for ever. Each fence is followed by one swap
of a row that was read before it, so of all who read the same row one swap is done, whoever fences
whom; an owner that finds a number taken asks for a swap as well, and goes on behind it. Whoever is
refused fences again only if the directory takes the row's new owner for gone too, and after a wait
that differs from node to node. So as long as anybody is served at all, it takes a false suspicion
for every step back, and what waits meanwhile is not lost: it is not told to be durable before the
swap.

Nobody removes what somebody else may still need. What is before the base goes when the row is known
to name the journal (`prune`), but for fences: one stays as long as the node that it keeps from
writing may yet try to, which is until that node is gone, or has ended its journal itself
(`remove`).

While a base is on its way what follows waits for it. While the store cannot be reached everything
waits: nothing is given up, and nothing is told to be durable.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Final, TypeVar
from urllib.parse import quote

import msgspec

from migrate.errors import Outcome
from migrate.shell import journal
from migrate.shell.journal import Appends, Done, JournalFailed, Phase
from migrate.shell.journal_format import (
    HEADER_BYTES_MAX,
    LINE_BYTES,
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

T = TypeVar("T")

log: Final = logging.getLogger("migrate")

GROUP_S: Final = 0.02
"""A segment takes what is appended within this time. Every put is paid for, and takes some 10 ms
and more; what is appended while one is on its way goes together anyhow."""
GROUP_BYTES: Final = 8 << 20
"""A segment with so many bytes waits no longer."""
SEGMENTS_MAX: Final = 256
"""A journal with so many segments after its base is full: each takes a request to read back."""
THREADS: Final = 8
"""Journals that put at the same time."""
READS: Final = 8
"""Segments that are read at the same time. A request takes some 20 ms however small it is, and a
server is away for as long."""
WAITS_S: Final = (0.1, 0.4)
"""Before a put that failed is tried again at once."""
AGAIN_FIRST_S: Final = 0.5
AGAIN_MAX_S: Final = 5.0
"""Waits before a put is tried again while the store cannot be reached, for as long as it takes."""
CLOSE_S: Final = 5.0
"""A store that cannot be reached is not waited for any longer when a node closes."""
_DIGITS: Final = 16


class JournalFenced(JournalFailed):
    """Another writer has begun: nothing that this one appends counts any more."""


class _Fenced(Exception):
    """A number is taken."""


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
        facts: Of the server and of the node that is to write from now on.
        key: What signs it.

    Returns:
        The number of the next segment, which is for the base.

    Raises:
        StoreError: It cannot be done; whether it was may be unknown, and it may be asked again.
    """
    server = facts.server
    number = 0
    while True:
        known = segments(store, prefix, server)
        last = known[-1] if known else 0
        if 0 < number >= last:
            # NB: looked after it was put. A writer that was behind this number by then would have
            # its base there, and its fence had been removed before it was found to be free.
            return number + 1
        number = last + 1
        try:
            stops = header_of(store, prefix, server, last, key).node if last else ""
        except NotThere:
            number = 0  # removed meanwhile, because there is a base behind it
            continue
        except BadJournal:
            stops = ""
        told = msgspec.structs.replace(facts, journal="", segment=number, base=False, stops=stops)
        try:
            _put(store, _name(prefix, server, number), [Encoder(told, key).header])
        except Exists:
            number = 0  # a former writer, or another one who begins


def header_of(store: Store, prefix: str, server: str, number: int, key: bytes) -> Facts:
    """What the header of a segment, or fence, tells.

    Raises:
        BadJournal: It is not as it was written.
        StoreError: It cannot be read.
    """
    first = LINE_BYTES + HEADER_BYTES_MAX
    return check_header(store.read(_name(prefix, server, number), 1 << 62, first), key)


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
    readers = concurrent.futures.ThreadPoolExecutor(READS)
    try:
        numbers = segments(store, prefix, server)[::-1]
        reads = [
            readers.submit(store.read, _name(prefix, server, number), bytes_max)
            for number in numbers
        ]
        for number, read in zip(numbers, reads, strict=True):
            try:
                data = read.result()
            except NotThere:
                break  # removed meanwhile, as what is before a base is
            # Verified, also of what is passed over: else a change there would hide a segment.
            facts = check_header(data, key)
            if facts.server != server:
                raise BadJournal("damaged", f"segment {number} is of server {facts.server}")
            if not facts.journal:
                continue  # a fence, of whoever opens it now, or did not get it
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
    finally:
        readers.shutdown(wait=False, cancel_futures=True)
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


class _Flight:
    """A segment on its way, which is the same bytes however often it is put."""

    __slots__ = ("base", "group", "pieces", "previous", "size", "tag", "waits")

    def __init__(self, group: list[_Append], size: int, base: bool, previous: bytes) -> None:
        self.group = group
        self.size = size
        self.base = base
        self.previous = previous
        self.pieces: list[Buffer] = []
        self.tag = b""
        self.waits = 0  # how often it was tried in vain


class ObjectJournal(Appends):
    """One journal in an object store as its owner has it, on the loop.

    Attributes:
        facts: What its headers tell, but for number and base.
        first: Number of its first segment; 0: there is none yet.
        segment: Number of the next segment; it belongs to the one on its way while there is one.
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
        on_fenced: Callable[[ObjectJournal], None] | None,
    ) -> None:
        super().__init__()
        self.facts = facts
        self.first = self.segment = segment
        self.phase = Phase.NEW
        self.error: JournalFailed | None = None
        self.base_bytes = 0
        self.log_bytes = 0
        self.backlog_bytes = 0
        self._log = log
        self._on_full = on_full
        self._on_fenced = on_fenced
        self._asked = False
        self._base = 0  # number of the last base that is there
        self._tag = b""
        self._waiting: list[_Append] = []
        self._flight: _Flight | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._again: asyncio.TimerHandle | None = None
        self._named = segment != 0  # what was opened goes on under its id
        self._fenced = False  # and nothing is put until it is known whose it is
        self._last = segment - 1  # number that it has put last
        self._passed: set[int] = set()  # numbers that others had put first
        self._others: dict[int, str] = {}  # what others have put: whom it stops

    def close(self, done: Done | None = None) -> None:
        """See `Appends.close`."""
        told = done or journal._ignore
        if self.phase in (Phase.FAILED, Phase.CLOSED):
            told(self.error)
        elif self.number is None:
            self._fail(JournalFailed("the journal was closed before its first cut"))
            told(None)
        elif self._fenced:
            self._fail(self._fenced_error())
            told(self.error)
        else:
            self._append(Kind.END, self.number, b"", (), False, told)
            self.phase = Phase.CLOSED
            self._log.forget(self)
            self._go()

    def prune(self) -> None:
        """Remove what is before the base, now and from now on: the row names this journal."""
        self._named = True
        if self._base:
            self._log.clear(self._clear(self._base))

    async def remove(self, *, is_named: bool) -> bool:
        """Remove what is left of it, when it has ended for whatever reason.

        Args:
            is_named: The row names it still, and another owner.

        Returns:
            Whether nothing is left for it to do. While it is named, that is so if another writer
            has begun here: what there is is his.

        Raises:
            StoreError: Something is left.
        """
        if not is_named:
            await self._clear(self._last + 1)
        # By whoever stopped this one, if anybody did. It tries to write no more.
        number = max(self._last, self.first - 1) + 1
        is_stopped = await self._log.run(self._stops, number) == self.facts.node
        if is_stopped:
            await self._log.run(self._remove, [number])
        return is_stopped or not is_named

    async def _clear(self, before: int) -> None:
        """Remove what nobody needs any more of what is before a number.

        What others have put is somebody else's, unless the row has named this one.
        """
        found: list[int] = await self._log.run(self._segments)
        numbers = []
        for number in [it for it in found if it < before]:
            is_mine = self.first <= number <= self._last and number not in self._passed
            if is_mine:
                numbers.append(number)
            elif self._named:
                numbers.append(number)
                if number not in self._others:
                    self._others[number] = await self._log.run(self._stops, number)
        stopped = {node for number in numbers if (node := self._others.get(number))}
        # This node has come past what stopped it before, or has ended what it stopped.
        stopped.discard(self.facts.node)
        writing = {node for node in sorted(stopped) if not await self._log.is_gone(node)}
        doomed = [it for it in numbers if self._others.get(it) not in writing]
        await self._log.run(self._remove, doomed)
        for number in doomed:
            self._others.pop(number, None)
            self._passed.discard(number)

    def _segments(self) -> list[int]:
        return segments(self._log.store, self._log.prefix, self.facts.server)

    def _stops(self, number: int) -> str:
        """Which node the fence of that number keeps from writing; "": it is none."""
        log = self._log
        try:
            return header_of(log.store, log.prefix, self.facts.server, number, log.key).stops
        except (NotThere, BadJournal):
            return ""

    def _remove(self, numbers: list[int]) -> None:
        for number in numbers:
            self._log.store.remove(_name(self._log.prefix, self.facts.server, number))

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
        # No bound: the core has few cuts under way, and what it goes on without would be lost.
        size = self._size(record, state)
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
        if self._flight is not None or not self._waiting or self.error is not None:
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
        if base:
            self.base_bytes, self.log_bytes = size, 0
        else:
            self.log_bytes += size
        self._flight = _Flight(group, size, base, b"" if base else self._tag)
        self._fly()

    def _fly(self) -> None:
        self._again = None
        flight = self._flight
        if flight is not None and self.error is None:
            future = self._log.run(self._put_group, flight)
            future.add_done_callback(lambda future: self._arrived(flight, future))

    def _put_group(self, flight: _Flight) -> None:
        log = self._log
        if not self.segment:
            self.first = self.segment = fence(log.store, log.prefix, self.facts, log.key)
            self._last = self.first - 1
        if not flight.pieces:
            facts = msgspec.structs.replace(self.facts, segment=self.segment, base=flight.base)
            encoder = Encoder(facts, log.key, flight.previous)
            pieces: list[Buffer] = [encoder.header]
            for append in flight.group:
                pieces += encoder.record(
                    append.kind,
                    append.number,
                    append.record,
                    append.state,
                    whole=append.whole,
                    synced=0,
                )
            flight.pieces, flight.tag = pieces, encoder.tag
        try:
            _put(log.store, _name(log.prefix, self.facts.server, self.segment), flight.pieces)
        except Exists as error:
            # Whoever opens it was seen before the swap that is to show whose it is. One who comes
            # later is not; he takes the number that comes next here.
            known = segments(log.store, log.prefix, self.facts.server)
            number = max([self.segment, *known[-1:]]) + 1
            self._passed.update(range(self.segment, number))
            self.segment = number
            flight.pieces = []
            raise _Fenced from error

    def go_on(self) -> None:
        """The row was swapped since the journal was fenced, and it is this owner's still."""
        if self._fenced:
            self._fenced = False
            self._fly()

    def _fenced_error(self) -> JournalFenced:
        return JournalFenced(
            f"what follows segment {self._last} of server {self.facts.server} is there already: "
            "another writer has begun",
            Outcome.NOT_DONE,
        )

    def _arrived(self, flight: _Flight, future: asyncio.Future[None]) -> None:
        if self.error is not None:
            return
        if future.cancelled():
            self._fail(JournalFailed("the journal was left alone", Outcome.UNKNOWN))
            return
        match future.exception():
            case None:
                self._is_there(flight)
            case _Fenced():
                if self._on_fenced is None or self.phase is Phase.CLOSED:
                    self._fail(self._fenced_error())
                else:
                    self._fenced = True
                    self._on_fenced(self)
            case StoreError() as error:
                self._wait(flight, error)
            case error:
                # Whatever it is, nobody may wait for ever.
                self._fail(JournalFailed(f"the journal cannot be written: {error}"))

    def _wait(self, flight: _Flight, error: StoreError) -> None:
        """The store cannot be had; whether the segment is there may not be known."""
        if self._log.closing:
            self._fail(
                JournalFailed(f"the journal cannot be written: {error.reason}", error.outcome)
            )
            return
        if not flight.waits:
            log.error(
                "the journal of server %s cannot be written; what waits for it waits until it can "
                "be: %s",
                self.facts.server,
                error.reason,
            )
        wait_s = min(AGAIN_FIRST_S * 2 ** min(flight.waits, 16), AGAIN_MAX_S)
        flight.waits += 1
        self._again = self._log.loop.call_later(wait_s, self._fly)

    def _is_there(self, flight: _Flight) -> None:
        if flight.waits:
            log.warning("the journal of server %s is written again", self.facts.server)
        self._flight = None
        self._last = self.segment
        self._tag = flight.tag
        self.backlog_bytes -= flight.size
        if flight.base:
            self._base = self.segment
            self._asked = False
            if self._named:
                self.prune()
        self.segment += 1
        if self.phase is Phase.NEW:
            self.phase = Phase.OPEN
        for append in flight.group:
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
        if self._again is not None:
            self._again.cancel()
        flight, self._flight = self._flight, None
        untold = (flight.group if flight is not None else []) + self._waiting
        self._waiting = []
        for append in untold:
            append.done(error)


class ObjectLog:
    """All journals of one node in one place of an object store; for one loop.

    Args:
        store: The store.
        prefix: What the names of all objects begin with; "" or a folder with its slash.
        key: What signs them.
        loop: The loop.
        is_gone: Whether a node is gone for good, so that it can write nothing any more; None: none
            ever is.

    Attributes:
        closing: A store that cannot be reached is not waited for.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        key: bytes,
        loop: asyncio.AbstractEventLoop,
        is_gone: Callable[[str], Awaitable[bool]] | None = None,
    ) -> None:
        self.store = store
        self.prefix = prefix
        self.key = key
        self.loop = loop
        self.closing = False
        self._is_gone = is_gone
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "journals in objects")
        self._journals: list[ObjectJournal] = []
        self._clearing: set[asyncio.Task[None]] = set()

    def run(self, function: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Run something that blocks.

        Raises:
            StoreError: The log is closed.
        """
        if self.closing:
            raise StoreError("the node closes")
        return self.loop.run_in_executor(self._threads, function, *args)

    async def is_gone(self, node: str) -> bool:
        """Whether a node can write nothing any more."""
        return self._is_gone is not None and await self._is_gone(node)

    def clear(self, work: Coroutine[None, None, None]) -> None:
        """Remove something on the side; what cannot be is left to the next time."""

        async def clear() -> None:
            try:
                await work
            except StoreError as error:
                log.debug("what is not needed any more of a journal is left: %s", error.reason)

        task = self.loop.create_task(clear())
        self._clearing.add(task)
        task.add_done_callback(self._clearing.discard)

    def create(
        self,
        facts: Facts,
        *,
        former: ObjectJournal | None = None,
        segment: int = 0,
        on_full: Callable[[ObjectJournal], None] | None = None,
        on_fenced: Callable[[ObjectJournal], None] | None = None,
    ) -> ObjectJournal:
        """Begin a journal.

        Args:
            facts: What its headers tell.
            former: The one of the same id and server, if there is one; as long as it takes
                anything it goes on, and its next whole cut begins it anew.
            segment: Number of its first segment, as `fence` has told it, of one that is opened: the
                row names it, and has been swapped since. 0: it puts a fence of its own first.
            on_full: Called when a whole cut is wanted, to be appended as any other.
            on_fenced: Called when somebody else has put a fence; nothing is put before `go_on`.
                None: the journal fails.
        """
        if former is not None and former.error is None:
            return former
        made = ObjectJournal(self, facts, segment, on_full, on_fenced)
        self._journals.append(made)
        return made

    def forget(self, which: ObjectJournal) -> None:
        """A journal is closed, or has failed."""
        if which in self._journals:
            self._journals.remove(which)

    async def close(self) -> None:
        """Close all journals in order, and end the threads."""
        left = list(self._journals)
        closed = [self.loop.create_future() for _ in left]
        for which, future in zip(left, closed, strict=True):
            which.close(functools.partial(_resolve, future))
        waits = [*closed, *self._clearing]
        if waits:
            await asyncio.wait(waits, timeout=CLOSE_S)
        for which in left:
            which._fail(JournalFailed("the store could not be reached before the node closed"))
        self.stop()

    def stop(self) -> None:
        """End at once; whatever is not there yet is not told to be."""
        self.closing = True
        for which in list(self._journals):
            which._fail(JournalFailed("the node has ended"))
        for task in self._clearing:
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _resolve(future: asyncio.Future[None], error: JournalFailed | None) -> None:
    if not future.done():
        future.set_result(None)


__all__ = [
    "JournalFenced",
    "ObjectJournal",
    "ObjectLog",
    "fence",
    "header_of",
    "load_objects",
    "segments",
]
