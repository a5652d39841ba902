"""The directory as every other part of the shell sees it: one interface, whatever the home.

A directory is a small ordered map from `str` keys to `bytes` values with three additions: a
*transaction* compares the revisions of some keys and changes others, all or nothing; a *watch*
delivers every change in order and can be resumed from any revision still in the log; a *lease*
makes keys vanish when its holder has been silent for too long.

The **revision** is one counter for the whole store. It rises by exactly one for each committed
transaction that changed something, so two entries with the same revision were written together.
A transaction that changes nothing (its compares failed, it only read, it deleted absent keys)
leaves the revision alone.

NB: a watcher may hear of a transaction before the caller that made it does, and a lease that has
run out may keep its keys a little longer. It never loses them early.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self, TypeAlias

KEY_BYTES_MAX = 2048
"""Longest key, in bytes of UTF-8."""

VALUE_BYTES_MAX = 1 << 20
"""Longest value. Rows are small; a value of megabytes belongs in a checkpoint."""

TXN_OPERATIONS_MAX = 128
"""Most compares, puts, deletes and reads in one transaction, together.

Source: etcd's default `--max-txn-ops`, so that what works in one home works in all of them.
"""

TXN_BYTES_MAX = 1_250_000
"""Most key and value bytes in one transaction.

Source: etcd's default `--max-request-bytes` is 1.5 MiB; the rest is room for its framing, and for
the keys that are compared or read, which travel twice: for the case that the compares hold, and
for the other.
"""

REVISION_MAX = (1 << 43) - 1
"""Highest revision: enough for 10,000 transactions a second during 27 years."""

LEASE_TTL_S_MAX = 86_400.0
"""Longest lease: a day. A longer one is a row that nobody cleans up."""


class DirectoryError(Exception):
    """Something the directory could not do.

    Attributes:
        url: The directory concerned, or "" when none is known.
        outcome: "not done" or "unknown": what became of the request.
    """

    outcome: ClassVar[str] = "not done"

    def __init__(self, message: str, *, url: str = "") -> None:
        super().__init__(message)
        self.url = url


class DirectoryUnavailable(DirectoryError):
    """The directory cannot serve now; the request surely did not take effect.

    Attributes:
        holder_pid: Process that holds the writers' lock, where that is known, else None.
    """

    def __init__(self, message: str, *, url: str = "", holder_pid: int | None = None) -> None:
        super().__init__(message, url=url)
        self.holder_pid = holder_pid


class OutcomeUnknown(DirectoryError):
    """The transaction may or may not have taken effect, now or later.

    Send the same transaction again: its compares let at most one of the copies win. If it is
    refused, read, and look for the nonce that was written.
    """

    outcome: ClassVar[str] = "unknown"


class LeaseGone(DirectoryError):
    """A put names a lease that has run out, was revoked or never existed; nothing was changed.

    Attributes:
        lease: The lease's number.
    """

    def __init__(self, lease: int, *, url: str = "") -> None:
        super().__init__(
            f"lease {lease} has run out, was revoked or never existed, so nothing was written; "
            "take a new lease and put the key again",
            url=url,
        )
        self.lease = lease

    def __reduce__(self) -> tuple[type[LeaseGone], tuple[int], dict[str, object]]:
        return (type(self), (self.lease,), self.__dict__)


class Compacted(DirectoryError):
    """A watch asked for revisions that the log no longer has.

    List the prefix again and watch from that list's revision + 1.

    Attributes:
        rev: The newest revision that is gone; what follows it can still be watched.
    """

    def __init__(self, rev: int, *, url: str = "") -> None:
        super().__init__(
            f"the log no longer has revisions up to {rev}; list the prefix again and watch from "
            "the list's revision + 1",
            url=url,
        )
        self.rev = rev

    def __reduce__(self) -> tuple[type[Compacted], tuple[int], dict[str, object]]:
        return (type(self), (self.rev,), self.__dict__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One key as it is stored.

    Attributes:
        key: The key.
        value: Its value.
        rev: Revision of the transaction that last wrote it; always at least 1.
        lease: The lease it vanishes with, or None.
    """

    key: str
    value: bytes
    rev: int
    lease: int | None = None


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction: `key` was last written at `rev`; 0 means it is absent."""

    key: str
    rev: int


@dataclass(frozen=True, slots=True)
class Put:
    """A write of a transaction. Without `lease` the key belongs to no lease from then on."""

    key: str
    value: bytes
    lease: int | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to one key at one revision; `value` is None when it was deleted."""

    key: str
    value: bytes | None
    rev: int


@dataclass(frozen=True, slots=True)
class Txn:
    """The answer to a transaction.

    Attributes:
        ok: Whether every compare held, and the changes were made.
        rev: If changes were made, their revision; else the store's.
        entries: The keys to be read, as they are right after the transaction; if it was
            refused, the compared keys as well. None stands for an absent key.
    """

    ok: bool
    rev: int
    entries: dict[str, Entry | None]


Changes: TypeAlias = list[Change]
"""What a watch hands over at a time: all of one revision's changes under its prefix."""


class Directory(ABC):
    """Who owns what, at which epoch: the authority all nodes agree on.

    Attributes:
        one_machine: Whether all who share it are certainly of one machine.

    One object belongs to one event loop. `start` before use, `close` after it, or use
    it as an async context manager.

    Errors common to all verbs: `DirectoryUnavailable` when the request surely did not take
    effect (also when the directory is not started or is closed), `ValueError` or `TypeError` for
    arguments outside the documented bounds. None of them leaves anything half done.
    """

    one_machine: ClassVar[bool] = True

    @property
    @abstractmethod
    def url(self) -> str:
        """Where this directory lives, in the form that `open_directory` takes."""

    @abstractmethod
    async def start(self) -> None:
        """Open the directory. Starting one that is open does nothing.

        Raises:
            DirectoryUnavailable: It cannot be reached or created now; `start` can be repeated.
            DirectoryError: What is there is not a directory, or this object was closed.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release everything. Pending watches end with `DirectoryUnavailable`. Repeatable."""

    @abstractmethod
    async def get(self, key: str) -> Entry | None:
        """Read one key; None when it is absent."""

    @abstractmethod
    async def list(self, prefix: str) -> tuple[list[Entry], int]:
        """Read all keys that begin with `prefix` ("" for all) at one instant.

        Returns:
            The entries sorted by key, and the store's revision at that instant. Watching from
            that revision + 1 misses nothing and repeats nothing.
        """

    @abstractmethod
    async def txn(
        self,
        compares: Sequence[Compare],
        puts: Sequence[Put],
        deletes: Sequence[str],
        reads: Sequence[str] = (),
        *,
        durable: bool = True,
    ) -> Txn:
        """Change several keys at once, if others are as expected.

        Args:
            compares: All must hold; none means always.
            puts: Keys to write. A key may be changed only once.
            deletes: Keys to delete; an absent one is not an error.
            reads: Keys to return.
            durable: False: it need not survive a power cut, which ends whatever the rows are
                about; it survives the death of any process all the same. A home may ignore it.

        Returns:
            Whether it was done, at which revision, and what was read. When it returns, the
            changes are as durable as the home makes them.

        Raises:
            OutcomeUnknown: It may or may not have taken effect.
            LeaseGone: A put names a lease that is not there; nothing was changed.
        """

    @abstractmethod
    def watch(self, prefix: str, from_rev: int) -> AsyncIterator[Changes]:
        """Follow the changes of all keys that begin with `prefix`.

        Args:
            prefix: "" for all keys.
            from_rev: First revision wanted, at least 1; it may lie in the future.

        Returns:
            An endless iterator. Each item holds all changes of one revision under `prefix`,
            never empty; revisions come in order, each exactly once. To resume elsewhere, watch
            from the last item's revision + 1. Cancelling a wait for the next item loses nothing.

        Raises:
            Compacted: From the iterator: revisions between `from_rev` and now were dropped from
                the log. The iterator raises it again if asked again.
            DirectoryUnavailable: From the iterator: as for every verb. Asking again resumes.
        """

    @abstractmethod
    async def lease(self, ttl_s: float) -> int:
        """Take a lease.

        Args:
            ttl_s: Seconds without `keepalive` after which it runs out, counted from when the
                directory handles the request; above 0, at most `LEASE_TTL_S_MAX`. A home may
                have a coarser clock and round it up.

        Returns:
            Its number, never used before in this directory.
        """

    @abstractmethod
    async def keepalive(self, lease: int) -> bool:
        """Start the lease's time again. False when it is gone; then its keys are too.

        NB: the holder may count on the lease only until the instant BEFORE the call + ttl.
        """

    @abstractmethod
    async def revoke(self, lease: int) -> None:
        """End a lease now and delete its keys, in one revision. One that is gone is no error.

        Raises:
            OutcomeUnknown: It may have ended, or may yet.
        """

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def prefix_end(prefix: str) -> str | None:
    """Return the smallest string above all strings that begin with `prefix`.

    Returns:
        That string in code point order, or None when there is none (as for "").
    """
    while prefix:
        last = ord(prefix[-1])
        if last == 0x10FFFF:
            prefix = prefix[:-1]
            continue
        # NB: surrogates are not characters and cannot be stored.
        following = 0xE000 if last == 0xD7FF else last + 1
        return prefix[:-1] + chr(following)
    return None


def check_prefix(prefix: str) -> None:
    """Raise TypeError or ValueError unless `prefix` may begin a key ("" may)."""
    if not isinstance(prefix, str):
        raise TypeError(f"a key prefix is a str, not {type(prefix).__name__}")
    if prefix:
        check_key(prefix)


def check_key(key: str) -> int:
    """Raise TypeError or ValueError unless `key` can be stored; return its size in bytes."""
    if not isinstance(key, str):
        raise TypeError(f"a key is a str, not {type(key).__name__}")
    try:
        size_bytes = len(key.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"key {key!r} holds a lone surrogate, which UTF-8 cannot") from error
    if not 0 < size_bytes <= KEY_BYTES_MAX:
        raise ValueError(f"a key has 1 to {KEY_BYTES_MAX} bytes of UTF-8, this one {size_bytes}")
    if "\0" in key:
        raise ValueError(f"key {key!r} holds a NUL character")
    return size_bytes


def check_txn(
    compares: Sequence[Compare], puts: Sequence[Put], deletes: Sequence[str], reads: Sequence[str]
) -> None:
    """Raise TypeError or ValueError unless the transaction is within the bounds of this module."""
    operations = len(compares) + len(puts) + len(deletes) + len(reads)
    if operations > TXN_OPERATIONS_MAX:
        raise ValueError(
            f"a transaction has at most {TXN_OPERATIONS_MAX} operations, this one {operations}; "
            "split it"
        )
    size_bytes = 0
    for compare in compares:
        size_bytes += check_key(compare.key)
        if compare.rev < 0:
            raise ValueError(f"key {compare.key!r} is compared with revision {compare.rev} below 0")
    for put in puts:
        size_bytes += check_key(put.key) + len(put.value)
        if type(put.value) is not bytes:
            raise TypeError(f"the value of {put.key!r} is bytes, not {type(put.value).__name__}")
        if len(put.value) > VALUE_BYTES_MAX:
            raise ValueError(
                f"a value has at most {VALUE_BYTES_MAX} bytes, that of {put.key!r} {len(put.value)}"
            )
    for put in puts:
        if put.lease is not None:
            check_lease(put.lease)
    for key in (*deletes, *reads):
        size_bytes += check_key(key)
    if size_bytes > TXN_BYTES_MAX:
        raise ValueError(
            f"a transaction has at most {TXN_BYTES_MAX} bytes, this one {size_bytes}; split it"
        )
    changed = {put.key for put in puts} | set(deletes)
    if len(changed) != len(puts) + len(deletes):
        raise ValueError("a transaction changes each key at most once, this one some key twice")


def check_lease(lease: int) -> None:
    """Raise ValueError unless `lease` can be the number of a lease."""
    if not 0 < lease < 1 << 63:
        raise ValueError(f"{lease} cannot be the number of a lease")


def check_ttl(ttl_s: float) -> None:
    """Raise ValueError unless `ttl_s` is a lease's possible time to live."""
    if not (math.isfinite(ttl_s) and 0 < ttl_s <= LEASE_TTL_S_MAX):
        raise ValueError(
            f"a lease lives above 0 and at most {LEASE_TTL_S_MAX:g} seconds, not {ttl_s}"
        )


@dataclass(frozen=True, slots=True)
class Fetched:
    """Part of the log: the matching changes, one list for each revision, and where to go on."""

    revisions: list[list[Change]]
    next_rev: int


class LogWatch(AsyncIterator[Changes]):
    """A watch over any home that can be asked for "the next part of the log, when there is one".

    It pulls, so what waits for a slow reader is at most one part; the rest stays in the log.
    """

    def __init__(self, fetch: Callable[[int], Awaitable[Fetched]], from_rev: int) -> None:
        """Make a watch.

        Args:
            fetch: Takes the first revision wanted; returns once the log has matching changes,
                or has been searched up to a later revision.
            from_rev: First revision wanted.
        """
        if not 1 <= from_rev <= REVISION_MAX:
            raise ValueError(f"revisions run from 1 to {REVISION_MAX}; {from_rev} is none")
        self._fetch = fetch
        self._next_rev = from_rev
        self._ready: deque[list[Change]] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Change]:
        while not self._ready:
            start_rev = self._next_rev
            fetched = await self._fetch(start_rev)
            # Nothing is awaited from here to the return, so a cancellation comes before the
            # position moves, and the part is read again, or not at all. If two tasks wait on
            # one watch, what the second one read is no longer next, and is dropped.
            if self._next_rev == start_rev:
                self._ready.extend(fetched.revisions)
                self._next_rev = fetched.next_rev
        return self._ready.popleft()
