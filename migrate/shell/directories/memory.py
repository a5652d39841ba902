"""The directory in memory: for tests, for one process, for the simulator's world.

Everything happens in the event loop of its callers, without threads. It keeps the promises of
the other homes except durability, so what holds here holds there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

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
    Put,
    Txn,
    check_key,
    check_lease,
    check_prefix,
    check_ttl,
    check_txn,
)

LOG_REVISIONS_MAX = 100_000
"""Revisions kept for watches: five times the 20,000 that a resumed watch must survive."""

LOG_BYTES_MAX = 64 << 20
"""Key and value bytes kept for watches."""

FETCH_REVISIONS_MAX = 1000
"""Revisions a watch takes from the log at a time, so that one reader cannot hold up the loop."""


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    deadline_s: float
    keys: set[str] = field(default_factory=set)


class _Store:
    """What all `MemoryDirectory` objects of one name share. Used by one event loop only."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.loop = asyncio.get_running_loop()
        self.users = 0
        self.rev = 0
        self.entries: dict[str, Entry] = {}
        self.leases: dict[int, _Lease] = {}
        self.leases_made = 0
        self.log: dict[int, list[Change]] = {}
        self.log_first_rev = 1
        self.log_bytes = 0
        self.log_revisions_max = LOG_REVISIONS_MAX
        self.log_bytes_max = LOG_BYTES_MAX
        self.waiting: set[asyncio.Future[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    def now_s(self) -> float:
        """The store's time, which never goes back."""
        return time.monotonic()

    def commit(self, puts: Sequence[Put], deletes: Sequence[str]) -> int:
        """Apply the changes as one revision, if there is any; return the store's revision."""
        present = [key for key in deletes if key in self.entries]
        if not puts and not present:
            return self.rev
        self.rev += 1
        changes: list[Change] = []
        for put in puts:
            self._detach(put.key)
            self.entries[put.key] = Entry(put.key, put.value, self.rev, put.lease)
            if put.lease is not None:
                self.leases[put.lease].keys.add(put.key)
            changes.append(Change(put.key, put.value, self.rev))
        for key in present:
            self._detach(key)
            del self.entries[key]
            changes.append(Change(key, None, self.rev))
        self.log[self.rev] = changes
        self.log_bytes += _size_bytes(changes)
        while self.rev > self.log_first_rev and (
            len(self.log) > self.log_revisions_max or self.log_bytes > self.log_bytes_max
        ):
            self.log_bytes -= _size_bytes(self.log.pop(self.log_first_rev))
            self.log_first_rev += 1
        self.wake()
        return self.rev

    def wake(self) -> None:
        """Let every waiting watch look again."""
        for future in self.waiting:
            if not future.done():
                future.set_result(None)
        self.waiting.clear()

    def end_lease(self, lease: int) -> None:
        ended = self.leases.get(lease)
        if ended is not None:
            self.commit((), sorted(ended.keys))
            del self.leases[lease]

    def expire(self) -> None:
        """End the leases that have run out, and see to it that the next one is ended in time."""
        if not self.leases:
            return
        now_s = self.now_s()
        for lease in [number for number, it in self.leases.items() if it.deadline_s <= now_s]:
            self.end_lease(lease)
        if not self.leases:
            return
        next_s = min(it.deadline_s for it in self.leases.values())
        if self._timer is not None:
            if self._timer_s <= next_s:
                return
            self._timer.cancel()
        self._timer_s = next_s
        # The loop may run a timer one tick of its clock early; a lease must never end early.
        self._timer = self.loop.call_later(next_s - now_s + 0.001, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self.expire()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _detach(self, key: str) -> None:
        before = self.entries.get(key)
        if before is not None and before.lease is not None:
            self.leases[before.lease].keys.discard(key)


_shared: dict[str, _Store] = {}


class MemoryDirectory(Directory):
    """A directory that lives and dies with its process.

    With a name it is shared by all open objects of that name in this process, in one event
    loop; the content is gone when the last of them is closed.
    """

    def __init__(
        self,
        name: str = "",
        *,
        log_revisions_max: int = LOG_REVISIONS_MAX,
        log_bytes_max: int = LOG_BYTES_MAX,
    ) -> None:
        """Make a directory; nothing exists before `start`.

        Args:
            name: "" for a private one.
            log_revisions_max: Revisions kept for watches, at least 1. Of objects that share a
                store, the one that opened it first decides.
            log_bytes_max: Key and value bytes kept for watches; the last revision always is.
        """
        if log_revisions_max < 1:
            raise ValueError(f"the log keeps at least 1 revision, not {log_revisions_max}")
        self._name = name
        self._log_revisions_max = log_revisions_max
        self._log_bytes_max = log_bytes_max
        self._store: _Store | None = None
        self._closed = False

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    async def start(self) -> None:
        if self._closed:
            raise DirectoryError(f"{self.url} was closed; open a new one", url=self.url)
        loop = asyncio.get_running_loop()
        if self._store is not None:
            self._check_loop(self._store)
            return
        store = _shared.get(self._name) if self._name else None
        if store is None or store.loop.is_closed():
            # A store whose loop is gone was abandoned without `close`; nobody can use it again.
            store = _Store(self.url)
            store.log_revisions_max = self._log_revisions_max
            store.log_bytes_max = self._log_bytes_max
            if self._name:
                _shared[self._name] = store
        self._check_loop(store)
        assert store.loop is loop
        store.users += 1
        self._store = store

    async def close(self) -> None:
        self._closed = True
        store, self._store = self._store, None
        if store is None:
            return
        store.wake()
        store.users -= 1
        if store.users == 0:
            store.stop()
            if _shared.get(self._name) is store:
                del _shared[self._name]

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        store = await self._turn()
        return store.entries.get(key)

    async def list(self, prefix: str) -> tuple[list[Entry], int]:
        check_prefix(prefix)
        store = await self._turn()
        keys = sorted(key for key in store.entries if key.startswith(prefix))
        return [store.entries[key] for key in keys], store.rev

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
        store = await self._turn()
        entries = store.entries
        for compare in compares:
            there = entries.get(compare.key)
            if (0 if there is None else there.rev) != compare.rev:
                keys = (*(it.key for it in compares), *reads)
                return Txn(False, store.rev, {key: entries.get(key) for key in keys})
        for put in puts:
            if put.lease is not None and put.lease not in store.leases:
                raise LeaseGone(put.lease, url=self.url)
        rev = store.commit(puts, deletes)
        return Txn(True, rev, {key: entries.get(key) for key in reads})

    def watch(self, prefix: str, from_rev: int) -> AsyncIterator[Changes]:
        check_prefix(prefix)

        async def fetch(next_rev: int) -> Fetched:
            while True:
                store = self._open_store()
                store.expire()
                if next_rev <= store.rev:
                    return _fetch(store, prefix, next_rev)
                future: asyncio.Future[None] = store.loop.create_future()
                store.waiting.add(future)
                try:
                    await future
                finally:
                    store.waiting.discard(future)

        return LogWatch(fetch, from_rev)

    async def lease(self, ttl_s: float) -> int:
        check_ttl(ttl_s)
        store = await self._turn()
        store.leases_made += 1
        store.leases[store.leases_made] = _Lease(ttl_s, store.now_s() + ttl_s)
        store.expire()
        return store.leases_made

    async def keepalive(self, lease: int) -> bool:
        check_lease(lease)
        store = await self._turn()
        kept = store.leases.get(lease)
        if kept is None:
            return False
        kept.deadline_s = store.now_s() + kept.ttl_s
        return True

    async def revoke(self, lease: int) -> None:
        check_lease(lease)
        store = await self._turn()
        store.end_lease(lease)

    async def _turn(self) -> _Store:
        self._open_store()
        # The other homes always suspend their caller here. So does this one, or a caller that
        # wrongly counts on not being interrupted would pass its tests.
        await asyncio.sleep(0)
        store = self._open_store()
        store.expire()
        return store

    def _open_store(self) -> _Store:
        if self._store is None:
            state = "is closed" if self._closed else "has not been started"
            raise DirectoryUnavailable(f"{self.url} {state}; nothing was done", url=self.url)
        self._check_loop(self._store)
        return self._store

    def _check_loop(self, store: _Store) -> None:
        if store.loop is not asyncio.get_running_loop():
            raise DirectoryError(
                f"{self.url} is used by another event loop of this process; a directory in "
                "memory serves one loop: give each loop a name of its own, or use sqlite://",
                url=self.url,
            )


def _fetch(store: _Store, prefix: str, next_rev: int) -> Fetched:
    if next_rev < store.log_first_rev:
        raise Compacted(store.log_first_rev - 1, url=store.url)
    end = min(store.rev + 1, next_rev + FETCH_REVISIONS_MAX)
    found: list[list[Change]] = []
    for rev in range(next_rev, end):
        changes = [change for change in store.log[rev] if change.key.startswith(prefix)]
        if changes:
            found.append(changes)
    return Fetched(found, end)


def _size_bytes(changes: list[Change]) -> int:
    return sum(len(it.key) + (0 if it.value is None else len(it.value)) for it in changes)
