"""The directory in one SQLite file, shared by all node processes of one host.

**Where the truth is.** Entries, leases and a log of all changes are tables of one file in WAL
mode with `synchronous=FULL`: what was acknowledged survives a power cut. (NORMAL does not sync at
commit, so an epoch that was already used could be issued twice. Only a transaction whose caller
says that a power cut ends what its rows are about is committed with NORMAL.) Watches read the log
from the last revision they saw. Everything else only says when to look: the thread's own commits,
a datagram from other processes (`hints`), and `PRAGMA data_version` every 100 ms.

**Who does what.** All SQLite calls are made by one thread with one connection, the engine. The
event loop puts requests into its inbox; the engine takes all that wait there, answers the reads
from one snapshot, does the writes in one transaction, and hands all results to the loop in one
call. So a burst of writes pays for one `fsync`. Each request of such a group is decided in turn
and gets a revision of its own. If the group fails, it is rolled back and each request is tried
alone, so that one that cannot be done takes no other down.

**Waiting.** Writers queue at an advisory lock (`writers_queue`) before they begin. While one
waits, its engine goes on serving reads. A write that waits longer than the patience fails as
`DirectoryUnavailable`, naming the holder. No transaction is ever left open between two requests.

**What a failure means.** Before `COMMIT`: rolled back, not done. `COMMIT` refused for lack of
space: no commit record was written, not done. `COMMIT` failed otherwise: a complete record may be
in the WAL and be found by the next recovery, so the outcome is unknown.

**Time.** Leases end at a wall-clock time. A step of the wall clock must neither end nor prolong
them, so the file holds the offset between wall clock and monotonic clock as the first process
since boot saw it, and every process adds that offset to its own monotonic clock.

NB: local file systems only. Nothing else in the process may open the database file: closing any
descriptor of it drops the locks that SQLite holds (POSIX). Renaming or replacing it while in use
is detected and refused.

Source: the SQLite documents on WAL and atomic commit; the latencies in this package were measured
on ext4, two cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import os
import queue
import sqlite3
import threading
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any, TypeVar

from migrate.shell.directories.base import (
    Change,
    Changes,
    Compacted,
    Compare,
    Directory,
    DirectoryError,
    DirectoryUnavailable,
    Entry,
    Fetched,
    LeaseGone,
    LogWatch,
    OutcomeUnknown,
    Put,
    Txn,
    check_key,
    check_lease,
    check_prefix,
    check_ttl,
    check_txn,
    prefix_end,
)
from migrate.shell.directories.hints import Hints
from migrate.shell.directories.writers_queue import (
    QueueState,
    WritersQueue,
    describe_process,
)

PATIENCE_S = 2.0
"""Longest wait for the writers' lock. Holders need well under a millisecond each; a node renews
its lease of 10 s every 3.3 s, so even one failed attempt leaves time for two more."""

POLL_S = 0.1
"""Time between two looks for what no hint told. Source: measured, 0.11 % of a core."""

LOG_REVISIONS_MAX = 100_000
"""Revisions kept for watches: five times the 20,000 that a resumed watch must survive."""

LOG_AGE_S_MAX = 3600.0
"""Time revisions are kept for watches; who was away longer lists again."""

LOG_BYTES_MAX = 64 << 20
"""Key and value bytes kept for watches."""

REQUESTS_MAX = 10_000
"""Requests of one directory that may wait at once; more are refused."""

_GROUP_REQUESTS_MAX = 512
"""Writes in one transaction, so that others get their turn after some milliseconds."""

_GROUP_BYTES_MAX = 8 << 20
"""Value bytes in one transaction, which bounds what it adds to the WAL."""

_FETCH_REVISIONS_MAX = 1000
_FETCH_BYTES_MAX = 4 << 20
"""Limits of the part of the log that a watch is handed at a time."""

_COMPACT_EVERY = 256
"""Revisions between two compactions; each removes up to four times as many, so it keeps up."""

_IDLE_POLL_S = 0.5
"""Time between two looks when nobody watches: enough to end leases that have run out."""

_BUSY_MS = 100
"""How long SQLite itself waits for a lock, as in recovery after a crash."""

_BUSY_RETRY_S = 0.005
"""Pause before trying a database again that a program outside the queue has locked."""

_SEQ_BITS = 20
"""Bits of a log row's number below the revision: its place among the revision's changes."""

_APPLICATION_ID = 0x6C6D6467
"""Marks the file as ours ("lmdg") for SQLite's header and for `file(1)`."""

_FORMAT = 1

_SCHEMA = (
    """CREATE TABLE entry(
        key TEXT PRIMARY KEY, value BLOB NOT NULL, rev INTEGER NOT NULL, lease INTEGER
    ) WITHOUT ROWID""",
    "CREATE INDEX entry_lease ON entry(lease) WHERE lease IS NOT NULL",
    # The number is revision and place in one, so that a log row costs one page, not two.
    # `bytes_sum` counts all bytes ever logged: two rows tell the size of what lies between.
    """CREATE TABLE log(
        id INTEGER PRIMARY KEY, key TEXT NOT NULL, value BLOB, at_s REAL NOT NULL,
        bytes_sum INTEGER NOT NULL
    )""",
    """CREATE TABLE lease(
        id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_s REAL NOT NULL, deadline_s REAL NOT NULL
    )""",
    "CREATE INDEX lease_deadline ON lease(deadline_s)",
    "CREATE TABLE clock(id TEXT NOT NULL, offset_s REAL NOT NULL)",
)

_STATE_SQL = """SELECT clock.id, clock.offset_s, (SELECT min(deadline_s) FROM lease),
    coalesce(last.id, 0), coalesce(last.bytes_sum, 0)
    FROM clock LEFT JOIN (SELECT id, bytes_sum FROM log ORDER BY id DESC LIMIT 1) AS last"""

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Options:
    patience_s: float
    poll_s: float
    hints: bool
    log_revisions_max: int
    log_age_s_max: float
    log_bytes_max: int


@dataclass(slots=True, eq=False)
class _Request:
    """What the loop asks of the engine. The future belongs to the loop."""

    future: asyncio.Future[Any]
    deadline_s: float = field(init=False, default=0.0)


@dataclass(slots=True, eq=False)
class _Get(_Request):
    key: str


@dataclass(slots=True, eq=False)
class _List(_Request):
    prefix: str


@dataclass(slots=True, eq=False)
class _Txn(_Request):
    compares: Sequence[Compare]
    puts: Sequence[Put]
    deletes: Sequence[str]
    reads: Sequence[str]
    durable: bool


@dataclass(slots=True, eq=False)
class _Lease(_Request):
    ttl_s: float


@dataclass(slots=True, eq=False)
class _Keepalive(_Request):
    lease: int


@dataclass(slots=True, eq=False)
class _Revoke(_Request):
    lease: int


@dataclass(slots=True, eq=False)
class _Watch(_Request):
    prefix: str
    end: str | None
    from_rev: int
    next_rev: int


class _Signal(Enum):
    LOOK = auto()
    GRANTED = auto()
    STOP = auto()


_Read = _Get | _List | _Txn
_Write = _Txn | _Lease | _Keepalive | _Revoke


@dataclass(slots=True)
class _State:
    """The store's counters as a transaction goes on."""

    rev: int
    bytes_sum: int
    now_s: float
    lease_next_s: float | None
    leases_changed: bool = False


class _Engine:
    """The thread that owns the connection, and its inbox.

    Methods of the first section run in the event loop, all others in the
    thread.
    """

    def __init__(self, path: str, url: str, options: _Options) -> None:
        self.url = url
        self.loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = self.loop.create_future()
        self.stopped: asyncio.Future[None] = self.loop.create_future()
        self.inbox: queue.SimpleQueue[_Request | _Signal] = queue.SimpleQueue()
        self.hints: Hints | None = None
        self._path = path
        self._options = options
        self._thread = threading.Thread(target=self._run, name="directory-sqlite", daemon=True)
        self._waiting = 0
        self._look_sent = False
        self._ended = False
        self._failure: BaseException | None = None

        # From here on the thread's own.
        self._connection: sqlite3.Connection | None = None
        self._queue: WritersQueue | None = None
        self._file: tuple[int, int] = (0, 0)
        self._reads: list[_Read] = []
        self._writes: deque[_Write] = deque()
        self._synced = True
        self._in_hand: list[_Write] = []
        self._watches: list[_Watch] = []
        self._answers: list[tuple[asyncio.Future[Any], object, BaseException | None]] = []
        self._stopping = False
        self._look = False
        self._hint_due = False
        self._stand_back = False
        self._queue_error: OSError | None = None
        self._leases_stuck = False
        self._poll_at_s = 0.0
        self._rev = 0
        self._data_version = -1
        self._lease_next_s: float | None = None
        self._clock_id = _clock_id()
        self._clock: tuple[str, float] = ("", 0.0)

    # ---------------------------------------------------------------- in the event loop

    def start(self) -> None:
        self._thread.start()

    async def ask(self, request: _Request) -> Any:
        """Hand a request to the thread and wait for the answer."""
        if self._ended:
            raise self._refusal()
        if self._waiting >= REQUESTS_MAX:
            raise DirectoryUnavailable(
                f"{self._waiting} requests wait for {self.url} already; nothing was done; "
                "retry later",
                url=self.url,
            )
        request.deadline_s = time.monotonic() + self._options.patience_s
        self._waiting += 1
        self.inbox.put(request)
        try:
            return await request.future
        finally:
            self._waiting -= 1

    def in_loop_hinted(self) -> None:
        if self.hints is not None:
            self.hints.drain()
        if not self._look_sent:
            self._look_sent = True
            self.inbox.put(_Signal.LOOK)

    def in_loop_exited(self, error: BaseException | None) -> None:
        self._ended = True
        # Telling the loop was the last thing the thread did.
        self._thread.join()
        if self.hints is not None:
            self.loop.remove_reader(self.hints.socket)
            self.hints.close()
        while True:
            try:
                item = self.inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, _Request) and not item.future.done():
                item.future.set_exception(self._refusal())
        if not self.started.done():
            self.started.set_exception(error or self._refusal())
        if not self.stopped.done():
            self.stopped.set_result(None)

    def _refusal(self) -> DirectoryUnavailable:
        why = "was closed" if self._failure is None else f"failed: {self._failure}"
        refusal = DirectoryUnavailable(
            f"{self.url} {why}; nothing was done; open another", url=self.url
        )
        refusal.__cause__ = self._failure
        return refusal

    def _in_loop_settle(
        self, answers: Iterable[tuple[asyncio.Future[Any], object, BaseException | None]]
    ) -> None:
        for future, value, error in answers:
            if future.done():
                continue
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

    # ------------------------------------------------------------------ life of the thread

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._open()
            self._answer(self.started, None)
            self._flush()
            while not self._stopping:
                self._turn()
        except DirectoryError as error:
            failure = error
        except BaseException as error:
            _log.exception("the thread of %s failed", self.url)
            failure = DirectoryError(f"its thread ended with {error!r}; see the log", url=self.url)
            failure.__cause__ = error
        finally:
            self._shut(failure)

    def _shut(self, failure: BaseException | None) -> None:
        if self._queue is not None:
            # Releasing is safe: no transaction is open, or closing the connection ends it.
            self._close_connection()
            self._queue.close()
        self._failure = failure
        closed = self._refusal()
        unknown = OutcomeUnknown(
            f"{self.url} failed in a transaction, which may or may not have taken effect: "
            f"{failure}; open another and send it again, or read",
            url=self.url,
        )
        for watch_or_read in (*self._watches, *self._reads):
            self._fail(watch_or_read, closed)
        for write in self._writes:
            self._fail(write, closed)
        for write in self._in_hand:
            self._fail(write, unknown)
        self._flush()
        try:
            self.loop.call_soon_threadsafe(self.in_loop_exited, failure)
        except RuntimeError:
            # The loop was closed before the directory; nobody is left to be told.
            if self.hints is not None:
                self.hints.close()

    def _turn(self) -> None:
        self._receive()
        if self._look:
            self._look = False
            self._look_for_changes(told=True)
        self._serve_reads()
        self._serve_watches()
        # Reads are answered before the writes that came with them wait for the disk.
        self._flush()
        self._serve_writes()
        self._flush()
        self._serve_watches()
        self._flush()
        if time.monotonic() >= self._poll_at_s:
            self._look_for_changes()
            self._end_leases_if_due()
            self._serve_watches()
            self._flush()
            self._poll_at_s = time.monotonic() + self._poll_interval_s()
        if self._hint_due:
            self._hint_due = False
            if self.hints is not None:
                self.hints.send()

    def _receive(self) -> None:
        """Take everything that waits in the inbox; wait for something if there is no work."""
        timeout_s = self._idle_s()
        try:
            item = self.inbox.get(timeout=timeout_s) if timeout_s > 0 else self.inbox.get_nowait()
            while True:
                match item:
                    case _Signal.STOP:
                        self._stopping = True
                    case _Signal.LOOK:
                        # Before the look, so that a hint during it brings another.
                        self._look_sent = False
                        self._look = True
                    case _Signal.GRANTED:
                        pass
                    case _Watch():
                        self._watches.append(item)
                        self._look = True
                        until_s = time.monotonic() + self._options.poll_s
                        self._poll_at_s = min(self._poll_at_s, until_s)
                    case _Get() | _List():
                        self._reads.append(item)
                    case _Txn() if not item.puts and not item.deletes:
                        self._reads.append(item)
                    case _Txn() | _Lease() | _Keepalive() | _Revoke():
                        self._writes.append(item)
                item = self.inbox.get_nowait()
        except queue.Empty:
            return

    def _idle_s(self) -> float:
        now_s = time.monotonic()
        until_s = self._poll_at_s
        if self._lease_next_s is not None:
            # A lease already due could not be ended at once; the next poll tries again.
            due_s = now_s + self._lease_next_s - self._now_s()
            if due_s > now_s:
                until_s = self._poll_at_s = min(until_s, due_s)
        if self._writes:
            assert self._queue is not None
            if self._queue.state is QueueState.HELD:
                until_s = min(until_s, now_s + _BUSY_RETRY_S)
            elif self._queue.state is QueueState.OUT:
                until_s = now_s
            until_s = min(until_s, self._writes[0].deadline_s)
        return max(0.0, until_s - now_s)

    def _poll_interval_s(self) -> float:
        return self._options.poll_s if self._watches else max(self._options.poll_s, _IDLE_POLL_S)

    # ------------------------------------------------------------------------- opening

    def _open(self) -> None:
        deadline_s = time.monotonic() + self._options.patience_s
        try:
            self._make_file()
            self._queue = WritersQueue(self._path + ".queue", self._granted)
            self._connect(deadline_s)
            self._prepare(deadline_s)
            found = os.stat(self._path)
        except OSError as error:
            raise DirectoryUnavailable(
                f"{self.url} cannot be opened: {error}", url=self.url
            ) from error
        except sqlite3.Error as error:
            raise self._not_opened(error) from error
        self._file = (found.st_dev, found.st_ino)
        try:
            self._patiently(self._read_state, deadline_s)
        except sqlite3.Error as error:
            raise self._not_opened(error) from error
        if self._options.hints:
            try:
                self.hints = Hints(self._path)
            except OSError as error:
                _log.warning(
                    "%s: changes by other processes are seen after up to %g s instead of at "
                    "once, because there can be no socket for hints: %s",
                    self.url,
                    self._options.poll_s,
                    error,
                )

    def _make_file(self) -> None:
        if sqlite3.sqlite_version_info < (3, 35):
            raise DirectoryError(
                f"SQLite {sqlite3.sqlite_version} is too old for {self.url}; it needs 3.35 or "
                "newer",
                url=self.url,
            )
        folder = os.path.dirname(self._path)
        if not os.path.isdir(folder):
            os.makedirs(folder, 0o700, exist_ok=True)
        # NB: with O_EXCL the file is new, so closing it drops nobody's locks.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))

    def _connect(self, deadline_s: float) -> None:
        self._connection = sqlite3.connect(
            self._path, timeout=_BUSY_MS / 1000, isolation_level=None
        )
        for pragma in (
            "synchronous=FULL",
            # A WAL that once grew, behind a stopped reader, is cut back to this.
            f"journal_size_limit={16 << 20}",
            "temp_store=MEMORY",
            "trusted_schema=OFF",
        ):
            # NB: some of them read the file, which may be locked for readers too while another
            # process creates it.
            self._patiently(partial(self._sql, f"PRAGMA {pragma}"), deadline_s)

    def _prepare(self, deadline_s: float) -> None:
        """Create the tables if the file is new; refuse a file that is not ours."""
        # Several nodes may start at once; the first one creates, the others wait and look again.
        while not self._patiently(self._is_prepared, deadline_s):
            if self._created(deadline_s):
                return
            if time.monotonic() >= deadline_s:
                raise self._lock_refused()
            time.sleep(_BUSY_RETRY_S)

    def _created(self, deadline_s: float) -> bool:
        """Create the tables if it is this process's turn and nobody else has; whether it was."""
        assert self._queue is not None
        if not self._queue.try_acquire():
            return False
        try:
            if not self._patiently(self._is_prepared, deadline_s):
                self._patiently(self._create, deadline_s)
        finally:
            self._queue.release()
        return True

    @staticmethod
    def _patiently(do: Callable[[], T], deadline_s: float) -> T:
        """Do what another process may forbid for a while, by creating or recovering the file."""
        while True:
            try:
                return do()
            except sqlite3.OperationalError as error:
                busy = _is_code(error, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
                if not busy or time.monotonic() >= deadline_s:
                    raise
            time.sleep(_BUSY_RETRY_S)

    def _is_prepared(self) -> bool:
        # One snapshot: another process may be creating it between two of these.
        self._sql("BEGIN")
        try:
            [(application_id,)] = self._sql("PRAGMA application_id")
            [(file_format,)] = self._sql("PRAGMA user_version")
            [(tables,)] = self._sql("SELECT count(*) FROM sqlite_schema")
        finally:
            self._sql("ROLLBACK")
        if application_id == 0 and file_format == 0 and tables == 0:
            return False
        if application_id != _APPLICATION_ID:
            raise DirectoryError(
                f"{self.url} is an SQLite database of another program; it was left alone; name "
                "another file",
                url=self.url,
            )
        if file_format != _FORMAT:
            raise DirectoryError(
                f"{self.url} has format {file_format}, this release knows {_FORMAT}; it was left "
                "alone; use the release that made it",
                url=self.url,
            )
        return True

    def _create(self) -> None:
        [(mode,)] = self._sql("PRAGMA journal_mode=WAL")
        if mode != "wal":
            raise DirectoryError(
                f"{self.url} is on a file system without shared memory files (journal mode "
                f"{mode!r} instead of wal); put it on a local disk",
                url=self.url,
            )
        self._sql("BEGIN IMMEDIATE")
        try:
            for statement in _SCHEMA:
                self._sql(statement)
            self._sql(
                "INSERT INTO clock VALUES(?, ?)", self._clock_id, time.time() - time.monotonic()
            )
            self._sql(f"PRAGMA application_id={_APPLICATION_ID}")
            self._sql(f"PRAGMA user_version={_FORMAT}")
            self._sql("COMMIT")
        except sqlite3.Error:
            self._roll_back()
            raise

    def _not_opened(self, error: sqlite3.Error) -> DirectoryError:
        if _is_code(error, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return DirectoryError(
                f"{self.url} is not a directory's database, or is damaged ({error}); it was left "
                "alone; move it away or name another file",
                url=self.url,
            )
        return DirectoryUnavailable(f"{self.url} cannot be opened: {error}", url=self.url)

    # ------------------------------------------------------------------------- reading

    def _serve_reads(self) -> None:
        if not self._reads:
            return
        reads = self._reads
        answers: list[tuple[_Read, object]] = []
        deadline_s = time.monotonic() + self._options.patience_s
        while True:
            answers.clear()
            try:
                self._check_file()
                self._sql("BEGIN")
                try:
                    answers.extend((read, self._read(read)) for read in reads)
                finally:
                    self._sql("COMMIT")
            except sqlite3.Error as error:
                self._roll_back()
                # Readers wait for nobody but a recovery or the closing of the last connection.
                if _is_code(error, sqlite3.SQLITE_BUSY) and time.monotonic() < deadline_s:
                    continue
                for read in reads:
                    self._fail(read, self._unavailable("the read failed", error))
            except DirectoryError as error:
                for read in reads:
                    self._fail(read, error)
            else:
                for read, value in answers:
                    self._answer(read.future, value)
            self._reads = []
            return

    def _read(self, read: _Read) -> object:
        match read:
            case _Get():
                return self._entry(read.key)
            case _List():
                return self._list(read.prefix), self._last_rev()
            case _Txn():
                ok, entries = self._compare(read)
                return Txn(ok, self._last_rev(), entries)

    def _entry(self, key: str) -> Entry | None:
        for value, rev, lease in self._sql(
            "SELECT value, rev, lease FROM entry WHERE key = ?", key
        ):
            return Entry(key, value, rev, lease)
        return None

    def _list(self, prefix: str) -> list[Entry]:
        end = prefix_end(prefix)
        if end is None:
            rows = self._sql(
                "SELECT key, value, rev, lease FROM entry WHERE key >= ? ORDER BY key", prefix
            )
        else:
            rows = self._sql(
                "SELECT key, value, rev, lease FROM entry WHERE key >= ? AND key < ? ORDER BY key",
                prefix,
                end,
            )
        return [Entry(*row) for row in rows if row[0].startswith(prefix)]

    def _compare(self, txn: _Txn) -> tuple[bool, dict[str, Entry | None]]:
        """Return whether the compares hold, and the entries to answer if nothing changes."""
        compared: dict[str, Entry | None] = {}
        ok = True
        for compare in txn.compares:
            there = self._entry(compare.key)
            compared[compare.key] = there
            ok = ok and (0 if there is None else there.rev) == compare.rev
        entries = {} if ok else compared
        for key in txn.reads:
            entries[key] = compared[key] if key in compared else self._entry(key)
        return ok, entries

    def _last_rev(self) -> int:
        [(last,)] = self._sql("SELECT coalesce(max(id), 0) FROM log")
        return int(last) >> _SEQ_BITS

    def _read_state(self) -> None:
        [(clock_id, offset_s, self._lease_next_s, last, _)] = self._sql(_STATE_SQL)
        self._clock = (clock_id, offset_s)
        self._rev = last >> _SEQ_BITS

    def _look_for_changes(self, told: bool = False) -> None:
        """Learn what others have committed; `told` when there is reason to expect something."""
        try:
            if told:
                # Straight to the answer: somebody waits for it.
                self._read_state()
                return
            self._check_file()
            [(data_version,)] = self._sql("PRAGMA data_version")
            if data_version != self._data_version:
                # Only now, and the version of before: if the state cannot be read, or changes in
                # between, the next poll reads it again.
                self._read_state()
                self._data_version = data_version
        except (sqlite3.Error, DirectoryError) as error:
            if isinstance(error, sqlite3.Error) and _is_code(error, sqlite3.SQLITE_BUSY):
                # Another process recovers or closes the database; the next poll looks again.
                return
            failure = error if isinstance(error, DirectoryError) else None
            # What cannot be read now may be readable at the next poll, but who watches must
            # not wait in silence for changes that this process cannot see.
            for watch in self._watches:
                self._fail(watch, failure or self._unavailable("looking for changes failed", error))
            self._watches.clear()

    def _end_leases_if_due(self) -> None:
        if self._lease_next_s is None or self._lease_next_s > self._now_s():
            return
        assert self._queue is not None
        try:
            # Nobody waits here: whoever holds the lock ends the leases in its own transaction.
            if self._queue.state is QueueState.OUT and self._queue.try_acquire():
                try:
                    self._transact([])
                finally:
                    self._queue.release()
        except OSError as error:
            self._tell_leases_stuck(error)

    def _tell_leases_stuck(self, error: BaseException) -> None:
        # Once: it is tried again several times a second.
        if not self._leases_stuck:
            self._leases_stuck = True
            _log.warning("%s: leases that have run out cannot be ended: %s", self.url, error)

    def _serve_watches(self) -> None:
        if not any(watch.next_rev <= self._rev for watch in self._watches):
            return
        waiting: list[_Watch] = []
        for watch in self._watches:
            if watch.future.done():
                continue
            if watch.next_rev > self._rev:
                waiting.append(watch)
                continue
            try:
                fetched = self._fetch(watch)
            except sqlite3.Error as error:
                self._roll_back()
                if _is_code(error, sqlite3.SQLITE_BUSY):
                    waiting.append(watch)
                else:
                    self._fail(watch, self._unavailable("reading the log failed", error))
            except Compacted as error:
                self._fail(watch, error)
            else:
                # A search that found nothing goes on here, without waking the loop. Now and
                # then it answers all the same, so that a watch that is cancelled and asked
                # again does not begin at a revision that has left the log meanwhile.
                watch.next_rev = fetched.next_rev
                away = fetched.next_rev - watch.from_rev
                if fetched.revisions or away > self._options.log_revisions_max // 4:
                    self._answer(watch.future, fetched)
                else:
                    waiting.append(watch)
        self._watches = waiting

    def _fetch(self, watch: _Watch) -> Fetched:
        revisions: list[list[Change]] = []
        size_bytes = 0
        next_rev = watch.next_rev
        self._sql("BEGIN")
        cursor = self._conn.cursor()
        try:
            [(first, last)] = self._sql("SELECT min(id), max(id) FROM log")
            first_rev, last_rev = (first or 0) >> _SEQ_BITS, (last or 0) >> _SEQ_BITS
            if next_rev < first_rev:
                raise Compacted(first_rev - 1, url=self.url)
            cursor.execute(
                "SELECT id, key, value FROM log WHERE id >= ? AND key >= ? AND key < ? ORDER BY id"
                if watch.end is not None
                else "SELECT id, key, value FROM log WHERE id >= ? AND key >= ? ORDER BY id",
                (next_rev << _SEQ_BITS, watch.prefix)
                if watch.end is None
                else (next_rev << _SEQ_BITS, watch.prefix, watch.end),
            )
            for row_id, key, value in cursor:
                rev = row_id >> _SEQ_BITS
                if not revisions or revisions[-1][0].rev != rev:
                    if len(revisions) >= _FETCH_REVISIONS_MAX or size_bytes >= _FETCH_BYTES_MAX:
                        return Fetched(revisions, rev)
                    revisions.append([])
                revisions[-1].append(Change(key, value, rev))
                size_bytes += len(key) + (0 if value is None else len(value))
            return Fetched(revisions, max(last_rev + 1, next_rev))
        finally:
            # NB: a statement that was not read to its end would keep the snapshot open, and
            # with it the WAL from being cut back.
            cursor.close()
            self._sql("COMMIT")

    # ------------------------------------------------------------------------- writing

    def _serve_writes(self) -> None:
        assert self._queue is not None
        if self._queue_error is not None:
            error, self._queue_error = self._queue_error, None
            self._fail_all_writes(error)
        if not self._writes:
            # A place in the queue that its write had no patience to wait for.
            self._queue.release()
            return
        if self._stand_back and not self._stopping:
            # The previous group left more behind. Getting in line gives a process that waits
            # the time to wake up and take its turn.
            self._queue.request()
        self._stand_back = False
        try:
            if not self._queue.try_acquire():
                self._queue.request()
            else:
                self._serve_group()
                # Nobody comes after a close: what waits is done now, or never.
                while self._stopping and self._writes and self._queue.try_acquire():
                    if self._serve_group():
                        break
        except OSError as error:
            self._fail_all_writes(error)
        now_s = time.monotonic()
        if self._writes and self._writes[0].deadline_s <= now_s:
            busy = self._queue.state is QueueState.HELD
            refused = self._database_locked() if busy else self._lock_refused()
            while self._writes and self._writes[0].deadline_s <= now_s:
                self._fail(self._writes.popleft(), refused)
            self._queue.release()

    def _fail_all_writes(self, error: OSError) -> None:
        while self._writes:
            self._fail(self._writes.popleft(), self._unavailable("locking failed", error))

    def _serve_group(self) -> bool:
        """Do as many of the waiting writes as fit in one transaction. The lock is held.

        Returns:
            Whether another program has the database locked, so that they wait as before.
        """
        assert self._queue is not None
        group: list[_Write] = []
        size_bytes = 0
        while self._writes and len(group) < _GROUP_REQUESTS_MAX and size_bytes < _GROUP_BYTES_MAX:
            write = self._writes.popleft()
            if write.future.cancelled():
                continue
            group.append(write)
            if isinstance(write, _Txn):
                size_bytes += sum(len(put.value) for put in write.puts)
        self._in_hand = group
        left = self._transact(group) if group else []
        self._in_hand = []
        if left:
            # A program outside the queue has the database locked: keep the turn, try again.
            self._writes.extendleft(reversed(left))
            return True
        self._queue.release()
        self._stand_back = bool(self._writes)
        return False

    def _transact(self, group: list[_Write]) -> list[_Write]:
        """Do the writes in one transaction; if that fails, each in one of its own.

        Returns:
            The writes that found the database locked and are to be tried again.
        """
        answers: list[tuple[_Write, object, BaseException | None]] = []
        committing = False
        try:
            self._check_file()
            self._sync(any(not isinstance(write, _Txn) or write.durable for write in group))
            self._sql("BEGIN IMMEDIATE")
            state = self._begin_state()
            before_rev = state.rev
            self._end_leases_due(state)
            for write in group:
                try:
                    answers.append((write, self._write(state, write), None))
                except LeaseGone as error:
                    # It is raised before anything was written.
                    answers.append((write, None, error))
            if state.rev // _COMPACT_EVERY != before_rev // _COMPACT_EVERY:
                self._compact(state)
            if state.leases_changed:
                [(state.lease_next_s,)] = self._sql("SELECT min(deadline_s) FROM lease")
            committing = True
            self._commit()
        except sqlite3.Error as error:
            self._roll_back()
            if not committing and _is_code(error, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                return group
            if committing and not _is_code(error, sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY):
                unknown = OutcomeUnknown(
                    f"{self.url}: the disk failed in the middle of a commit ({error}), which may "
                    "or may not have taken effect; send the same transaction again, or read",
                    url=self.url,
                )
                unknown.__cause__ = error
                for write in group:
                    self._fail(write, unknown)
                return []
            if len(group) > 1:
                return [left for write in group for left in self._transact([write])]
            if not group:
                self._tell_leases_stuck(error)
            for write in group:
                self._fail(write, self._unavailable("the transaction was rolled back", error))
            return []
        except DirectoryError as error:
            for write in group:
                self._fail(write, error)
            return []
        self._leases_stuck = False
        self._rev = state.rev
        self._lease_next_s = state.lease_next_s
        self._hint_due = self._hint_due or state.rev != before_rev
        for write, value, refused in answers:
            self._answers.append((write.future, value, refused))
        return []

    def _begin_state(self) -> _State:
        [(clock_id, offset_s, lease_next_s, last, bytes_sum)] = self._sql(_STATE_SQL)
        if clock_id != self._clock_id:
            # The first transaction since the host was booted (or in another time namespace).
            clock_id, offset_s = self._clock_id, time.time() - time.monotonic()
            self._sql("UPDATE clock SET id = ?, offset_s = ?", clock_id, offset_s)
        self._clock = (clock_id, offset_s)
        return _State(last >> _SEQ_BITS, bytes_sum, self._now_s(), lease_next_s)

    def _sync(self, durable: bool) -> None:
        """Choose whether the next commit waits for the disk; NORMAL leaves that to a later one.

        What is not synced is still in the file for every other process, and what follows it in
        the log is never durable without it.
        """
        if durable is not self._synced:
            self._sql(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._synced = durable

    def _commit(self) -> None:
        self._sql("COMMIT")

    def _write(self, state: _State, write: _Write) -> object:
        match write:
            case _Txn():
                return self._write_txn(state, write)
            case _Lease():
                state.leases_changed = True
                [(number,)] = self._sql(
                    "INSERT INTO lease(ttl_s, deadline_s) VALUES(?, ?) RETURNING id",
                    write.ttl_s,
                    state.now_s + write.ttl_s,
                )
                return number
            case _Keepalive():
                state.leases_changed = True
                return bool(
                    self._sql(
                        "UPDATE lease SET deadline_s = ? + ttl_s WHERE id = ? RETURNING id",
                        state.now_s,
                        write.lease,
                    )
                )
            case _Revoke():
                self._end_lease(state, write.lease)
                return None

    def _write_txn(self, state: _State, txn: _Txn) -> Txn:
        ok, entries = self._compare(txn)
        if not ok:
            return Txn(False, state.rev, entries)
        for lease in {put.lease for put in txn.puts if put.lease is not None}:
            if not self._sql("SELECT id FROM lease WHERE id = ?", lease):
                raise LeaseGone(lease, url=self.url)
        deleted = [key for key in txn.deletes if self._sql("SELECT 1 FROM entry WHERE key=?", key)]
        self._record(state, txn.puts, deleted)
        # What was read before is out of date if the same transaction changed it.
        for key in entries.keys() & ({put.key for put in txn.puts} | set(deleted)):
            entries[key] = self._entry(key)
        return Txn(True, state.rev, entries)

    def _record(self, state: _State, puts: Sequence[Put], deletes: Sequence[str]) -> None:
        """Write one revision: entries and log. Does nothing if there are no changes."""
        if not puts and not deletes:
            return
        state.rev += 1
        rows: list[tuple[int, str, bytes | None, float, int]] = []
        row_id = state.rev << _SEQ_BITS
        for put in puts:
            self._sql(
                "INSERT OR REPLACE INTO entry VALUES(?, ?, ?, ?)",
                put.key,
                put.value,
                state.rev,
                put.lease,
            )
            state.bytes_sum += len(put.key) + len(put.value)
            rows.append((row_id + len(rows), put.key, put.value, state.now_s, state.bytes_sum))
        for key in deletes:
            self._sql("DELETE FROM entry WHERE key = ?", key)
            state.bytes_sum += len(key)
            rows.append((row_id + len(rows), key, None, state.now_s, state.bytes_sum))
        for row in rows:
            self._sql("INSERT INTO log VALUES(?, ?, ?, ?, ?)", *row)

    def _end_leases_due(self, state: _State) -> None:
        if state.lease_next_s is None or state.lease_next_s > state.now_s:
            return
        for (lease,) in self._sql(
            "SELECT id FROM lease WHERE deadline_s <= ? ORDER BY id", state.now_s
        ):
            self._end_lease(state, lease)

    def _end_lease(self, state: _State, lease: int) -> None:
        state.leases_changed = True
        keys = [
            key for (key,) in self._sql("SELECT key FROM entry WHERE lease=? ORDER BY key", lease)
        ]
        # A revision holds only so many changes; nobody has so many keys on one lease.
        for start in range(0, len(keys), 1 << _SEQ_BITS):
            self._record(state, (), keys[start : start + (1 << _SEQ_BITS)])
        self._sql("DELETE FROM lease WHERE id = ?", lease)

    def _compact(self, state: _State) -> None:
        """Drop from the log what exceeds its limits, never the last revision, a part at a time."""
        options = self._options
        [(first,)] = self._sql("SELECT min(id) FROM log")
        end_rev = min(state.rev, (first >> _SEQ_BITS) + 4 * _COMPACT_EVERY)
        [(cut,)] = self._sql(
            """SELECT max(id) FROM log WHERE id < ? AND (id < ? OR at_s < ? OR bytes_sum < ?)""",
            end_rev << _SEQ_BITS,
            (state.rev + 1 - options.log_revisions_max) << _SEQ_BITS,
            state.now_s - options.log_age_s_max,
            state.bytes_sum - options.log_bytes_max,
        )
        if cut is not None:
            # Whole revisions only: a part of one must not look like all of it.
            self._sql("DELETE FROM log WHERE id < ?", (cut >> _SEQ_BITS) + 1 << _SEQ_BITS)

    # ---------------------------------------------------------------------------- help

    @property
    def _conn(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def _sql(self, statement: str, *values: object) -> list[Any]:
        # All rows at once: a statement read half-way would keep its snapshot open.
        return self._conn.execute(statement, values).fetchall()

    def _roll_back(self) -> None:
        """Leave no transaction open, whatever state the connection is in."""
        try:
            if self._conn.in_transaction:
                self._sql("ROLLBACK")
        except sqlite3.Error as error:
            _log.warning("%s: roll-back failed (%s); opening it again", self.url, error)
            self._close_connection()
            self._connect(time.monotonic() + self._options.patience_s)

    def _close_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _check_file(self) -> None:
        try:
            found = os.stat(self._path)
        except OSError as error:
            raise self._unavailable("its file is gone; restart all its nodes", error) from error
        if (found.st_dev, found.st_ino) != self._file:
            raise DirectoryUnavailable(
                f"{self.url}: its file was replaced while in use; nothing was done; restart all "
                "its nodes",
                url=self.url,
            )

    def _now_s(self) -> float:
        """The store's time: the wall clock as it was set when the host's first node opened it."""
        clock_id, offset_s = self._clock
        if clock_id == self._clock_id:
            return time.monotonic() + offset_s
        return time.time()

    def _granted(self, error: OSError | None) -> None:
        self._queue_error = error
        self.inbox.put(_Signal.GRANTED)

    def _answer(self, future: asyncio.Future[Any], value: object) -> None:
        self._answers.append((future, value, None))

    def _fail(self, request: _Request, error: BaseException) -> None:
        # Several may fail for one reason, and each raises, so each needs an exception object.
        own = copy.copy(error)
        own.__cause__ = error.__cause__
        self._answers.append((request.future, None, own))

    def _flush(self) -> None:
        if not self._answers:
            return
        answers, self._answers = self._answers, []
        try:
            self.loop.call_soon_threadsafe(self._in_loop_settle, answers)
        except RuntimeError:
            # The loop was closed without closing the directory.
            self._stopping = True

    def _unavailable(self, what: str, error: BaseException) -> DirectoryUnavailable:
        unavailable = DirectoryUnavailable(
            f"{self.url}: {what}: {error}; nothing was done", url=self.url
        )
        unavailable.__cause__ = error
        return unavailable

    def _lock_refused(self) -> DirectoryUnavailable:
        assert self._queue is not None
        pid = self._queue.holder_pid()
        return DirectoryUnavailable(
            f"{self.url}: the writers' lock was not to be had within {self._options.patience_s:g} "
            f"s; {describe_process(pid)} holds it; nothing was done; retry, or end that process",
            url=self.url,
            holder_pid=pid,
        )

    def _database_locked(self) -> DirectoryUnavailable:
        return DirectoryUnavailable(
            f"{self.url}: a program that is no node has locked the database for more than "
            f"{self._options.patience_s:g} s (an open sqlite3 shell, perhaps); nothing was done; "
            "end it and retry",
            url=self.url,
        )


class SqliteDirectory(Directory):
    """A directory in an SQLite file, for all processes of one host and user.

    Beside the file lie its WAL (`-wal`, `-shm`), the writers' lock (`.queue`) and the sockets
    for hints (`.hints`). All of it may be deleted when no process has the directory open.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        patience_s: float = PATIENCE_S,
        poll_s: float = POLL_S,
        hints: bool = True,
        log_revisions_max: int = LOG_REVISIONS_MAX,
        log_age_s_max: float = LOG_AGE_S_MAX,
        log_bytes_max: int = LOG_BYTES_MAX,
    ) -> None:
        """Name the file; nothing is touched before `start`.

        Args:
            path: The file; it and its folder are created for this user alone if missing.
            patience_s: Longest wait for the writers' lock.
            poll_s: Longest time until changes by other processes are seen without a hint.
            hints: Whether to send and receive hints.
            log_revisions_max: Revisions kept for watches, at least 1. This and the two limits
                below are those of whoever writes, and are exceeded by some hundred revisions
                before they are enforced.
            log_age_s_max: Seconds they are kept.
            log_bytes_max: Key and value bytes kept.
        """
        if patience_s < 0 or poll_s <= 0:
            raise ValueError(f"patience_s {patience_s} is below 0, or poll_s {poll_s} not above 0")
        if log_revisions_max < 1:
            raise ValueError(f"the log keeps at least 1 revision, not {log_revisions_max}")
        # Links are followed, so that all processes find the same files beside the database.
        self._path = os.path.realpath(os.fspath(path))
        self._options = _Options(
            patience_s, poll_s, hints, log_revisions_max, log_age_s_max, log_bytes_max
        )
        self._engine: _Engine | None = None
        self._closed = False
        self._pid = os.getpid()

    @property
    def url(self) -> str:
        return f"sqlite:///{self._path}"

    async def start(self) -> None:
        if self._closed:
            raise DirectoryError(f"{self.url} was closed; open a new one", url=self.url)
        if self._engine is not None:
            self._running()
            return
        engine = _Engine(self._path, self.url, self._options)
        self._pid = os.getpid()
        self._engine = engine
        engine.start()
        try:
            await engine.started
        except BaseException:
            self._engine = None
            engine.inbox.put(_Signal.STOP)
            raise
        if engine.hints is not None and not engine.stopped.done():
            engine.loop.add_reader(engine.hints.socket, engine.in_loop_hinted)

    async def close(self) -> None:
        self._closed = True
        engine, self._engine = self._engine, None
        if engine is None or self._pid != os.getpid():
            return
        engine.inbox.put(_Signal.STOP)
        await asyncio.shield(engine.stopped)

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        engine = self._running()
        entry: Entry | None = await engine.ask(_Get(engine.loop.create_future(), key))
        return entry

    async def list(self, prefix: str) -> tuple[list[Entry], int]:
        check_prefix(prefix)
        engine = self._running()
        found: tuple[list[Entry], int] = await engine.ask(
            _List(engine.loop.create_future(), prefix)
        )
        return found

    async def txn(
        self,
        compares: Sequence[Compare],
        puts: Sequence[Put],
        deletes: Sequence[str],
        reads: Sequence[str] = (),
        *,
        durable: bool = True,
    ) -> Txn:
        check_txn(compares, puts, deletes, reads)
        engine = self._running()
        done: Txn = await engine.ask(
            # Copies, because the caller may change its lists while the thread reads them.
            _Txn(
                engine.loop.create_future(),
                tuple(compares),
                tuple(puts),
                tuple(deletes),
                tuple(reads),
                durable,
            )
        )
        return done

    def watch(self, prefix: str, from_rev: int) -> AsyncIterator[Changes]:
        check_prefix(prefix)
        end = prefix_end(prefix)

        async def fetch(next_rev: int) -> Fetched:
            engine = self._running()
            fetched: Fetched = await engine.ask(
                _Watch(engine.loop.create_future(), prefix, end, next_rev, next_rev)
            )
            return fetched

        return LogWatch(fetch, from_rev)

    async def lease(self, ttl_s: float) -> int:
        check_ttl(ttl_s)
        engine = self._running()
        number: int = await engine.ask(_Lease(engine.loop.create_future(), ttl_s))
        return number

    async def keepalive(self, lease: int) -> bool:
        check_lease(lease)
        engine = self._running()
        kept: bool = await engine.ask(_Keepalive(engine.loop.create_future(), lease))
        return kept

    async def revoke(self, lease: int) -> None:
        check_lease(lease)
        engine = self._running()
        await engine.ask(_Revoke(engine.loop.create_future(), lease))

    def _running(self) -> _Engine:
        engine = self._engine
        if engine is None:
            state = "is closed" if self._closed else "has not been started"
            raise DirectoryUnavailable(f"{self.url} {state}; nothing was done", url=self.url)
        if self._pid != os.getpid():
            raise DirectoryUnavailable(
                f"{self.url} was opened before this process was forked off; open another",
                url=self.url,
            )
        if engine.loop is not asyncio.get_running_loop():
            raise DirectoryError(
                f"{self.url} was started in another event loop; open one directory for each loop",
                url=self.url,
            )
        return engine

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None and self._pid == os.getpid():
            engine.inbox.put(_Signal.STOP)
            warnings.warn(f"{self.url} was not closed", ResourceWarning, source=self, stacklevel=2)


def _is_code(error: sqlite3.Error, *codes: int) -> bool:
    # The low byte is the code proper, the rest its variety.
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in codes


def _clock_id() -> str:
    """Name the monotonic clock of this process: those of one name show the same time.

    Returns:
        The host's boot and the process's time namespace, or, where there are no such names, one
        for this process alone, which makes it use the wall clock of the moment it wrote.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return f"{boot.read().strip()} {os.readlink('/proc/self/ns/time')}"
    except OSError:
        return f"process {os.getpid()} {time.time_ns()}"
