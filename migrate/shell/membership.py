"""Which nodes there are, and which of them have died.

Every node has a row `node/<id>` that hangs on no lease (address, process), a row
`nodename/<name>` that keeps names unique, and a key `alive/<id>` under its lease. On one host a
process's death is seen at once by its pidfd; whoever sees it marks the servers of the dead
node as lost, where the core's rules allow it, and removes its rows. An expired lease alone means
unreachable, never dead; but somebody who knows may say that such a node is dead (`forget`). It is
believed, and if the node lives all the same, it ends itself as soon as it learns of it.

A process can be looked at only where its number means the same: on the same machine, since the
same boot, in the same container. Neither a host's name nor its machine id says so, since both are
often the same on many machines. Of a process that ran on another boot nothing is known either,
unless the directory itself is of one machine.

A node whose key `alive/<id>` has gone, or never came, is *suspected* once a reading of the
directory finds it absent after the patience of this node: whoever holds a standby of its servers
may then ask for their rows, and nothing else follows from it. Its key coming back takes that back.
While the directory cannot be read nobody is suspected.

Clocks of hosts differ; none is compared with another one. Leases end by the directory's clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any, Final, Protocol, TypeVar

import msgspec
import psutil

from migrate.core import directory as rules
from migrate.core.directory import Row
from migrate.core.ids import NodeId
from migrate.core.node import LAST_WORD_MS
from migrate.errors import NodeNotFound, PeerError, UsageError
from migrate.shell import wire
from migrate.shell.directories.base import (
    Compacted,
    Compare,
    Directory,
    DirectoryError,
    OutcomeUnknown,
    Put,
)
from migrate.shell.machine import processes_id

T = TypeVar("T")

log: Final = logging.getLogger("migrate")

NODE_KEY: Final = "node/"
NODE_NAME_KEY: Final = "nodename/"
ALIVE_KEY: Final = "alive/"
SERVER_KEY: Final = "server/"
NAME_KEY: Final = "name/"

RETRY_S: Final = 0.2
RELIST_S: Final = 60.0
"""How often what is known is compared with a fresh list. The watch alone should do; but watches of
past releases of etcd have lost events."""

POLL_S: Final = 0.5
"""How often a process is looked at where the system has no pidfd."""


class NodeRow(msgspec.Struct, frozen=True, array_like=True):
    """A node's registration. `started` tells a process from a later one of its pid; `boot` says
    where the pid means anything (`processes_id`), and `host` is for people.
    """

    id: NodeId
    name: str
    address: str
    pid: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    started: float
    boot: str
    host: str


_node_row: Final = msgspec.msgpack.Decoder(NodeRow)

encode_node: Final = msgspec.msgpack.encode


def decode_node(data: bytes) -> NodeRow:
    """A node's row.

    Raises:
        PeerError: The directory holds something else under a node's key.
    """
    try:
        return _node_row.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PeerError(f"the directory holds a malformed row of a node: {error}") from error


def _readable(decode: Callable[[bytes], T], key: str, data: bytes) -> T | None:
    """One row of many; a malformed one is reported, and keeps nobody from the others."""
    try:
        return decode(data)
    except PeerError as error:
        log.error("%s: %s", key, error)
        return None


def process_started(pid: int) -> float:
    """When a process was started, by the system's clock; 0.0 if there is none."""
    try:
        return psutil.Process(pid).create_time()
    except (psutil.Error, OSError):
        return 0.0


def describe(node: NodeId, name: str, address: str) -> NodeRow:
    """The row of a node in this process."""
    pid = os.getpid()
    here = processes_id()
    return NodeRow(node, name, address, pid, process_started(pid), here, socket.gethostname())


def seen_dead(row: NodeRow, one_machine: bool) -> bool:
    """Whether the process of a node certainly does not exist any more.

    Args:
        row: The node's.
        one_machine: Whether it can only have been a process of this machine.

    Returns:
        True only where this can be known; see the module's text.
    """
    if row.boot != processes_id():
        return one_machine and row.boot.partition("/")[0] != processes_id().partition("/")[0]
    try:
        process = psutil.Process(row.pid)
        # NB: create_time is rounded differently by different versions of the kernel's clock.
        return abs(process.create_time() - row.started) > 2.0 or (
            process.status() == psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


class Watcher(Protocol):
    """Who is told of changes."""

    def joined(self, row: NodeRow) -> None:
        """A node has registered (or was there already)."""

    def gone(self, row: NodeRow, cause: str) -> None:
        """A node was seen dead, or has left in order."""

    def burials(
        self, node: NodeId, rows: list[tuple[Row, int]]
    ) -> tuple[list[tuple[Row, int]], bool]:
        """See `Core.burials`."""

    def suspected(self, node: NodeId) -> None:
        """A node has been silent for longer than its lease and the patience."""

    def heard(self, node: NodeId) -> None:
        """A node that was suspected renews its lease again."""

    def forgotten(self) -> None:
        """This node was said to be dead, and others act upon it: it must stop at once."""


class Membership:
    """This node's part in the cluster; see the module's text."""

    def __init__(
        self,
        directory: Directory,
        me: NodeRow,
        watcher: Watcher,
        lease_s: float,
        run: Callable[[Coroutine[Any, Any, Any], str], asyncio.Task[Any]],
        patience_s: float = 1.0,
    ) -> None:
        self.directory = directory
        self.me = me
        self.nodes: dict[NodeId, NodeRow] = {}
        self.changed = asyncio.Event()
        self.rev = 0
        self._watcher = watcher
        self._lease_s = lease_s
        self._patience_s = patience_s
        self._lease = 0
        self._alive: set[NodeId] = set()
        self._silent: dict[NodeId, asyncio.Task[Any]] = {}
        self.suspected: set[NodeId] = set()
        self._row_rev = 0
        self._leaving = False
        self._run = run
        self._pidfds: dict[NodeId, int] = {}
        self._polled: dict[NodeId, NodeRow] = {}
        self._loop = asyncio.get_running_loop()

    # -- joining and leaving

    async def join(self) -> None:
        """Register this node, then follow the others.

        Raises:
            UsageError: A living node has the name.
            PeerError: The row of the node that has the name is malformed.
            DirectoryError: The directory cannot be reached.
        """
        me = self.me
        name_key = NODE_NAME_KEY + me.name
        row = msgspec.msgpack.encode(me)
        self._lease = await self.directory.lease(self._lease_s)
        rev = 0
        while True:
            try:
                txn = await self.directory.txn(
                    [Compare(name_key, rev), Compare(NODE_KEY + me.id, 0)],
                    [
                        Put(name_key, me.id.encode()),
                        Put(NODE_KEY + me.id, row),
                        Put(ALIVE_KEY + me.id, b"", self._lease),
                    ],
                    [],
                )
            except OutcomeUnknown:
                await asyncio.sleep(RETRY_S)
                continue
            if txn.ok:
                self._row_rev = txn.rev
                break
            if (mine := txn.entries.get(NODE_KEY + me.id)) is not None:
                self._row_rev = mine.rev
                break  # an attempt whose outcome was unknown had succeeded
            taken = txn.entries.get(name_key)
            rev = 0 if taken is None else taken.rev
            if taken is not None:
                await self._take_over_name(wire.decode_id(taken.value))
        await self._list()
        self._run(self._follow(), "membership")
        self._run(self._compare(), "nodes")
        self._run(self._listen(), "leases")
        self._run(self._stay_alive(), "lease")

    async def _take_over_name(self, holder: NodeId) -> None:
        entry = await self.directory.get(NODE_KEY + holder)
        if entry is None:
            return
        row = decode_node(entry.value)
        if not self._seen_dead(row):
            if row.boot != self.me.boot and await self.directory.get(ALIVE_KEY + holder) is None:
                # Nobody here can see what became of it. It may be unreachable, and keeps what it
                # owns; but its name is for who answers to it.
                log.warning(
                    "node %s at %s has not been heard of for longer than its lease; its name goes "
                    "to another one",
                    row.name,
                    row.address,
                )
                return
            raise UsageError(
                f"a node named {row.name!r} is alive at {row.address} (pid {row.pid}); choose "
                "another name",
                node=row.name,
            )

    def _seen_dead(self, row: NodeRow) -> bool:
        return seen_dead(row, self.directory.one_machine)

    async def is_gone(self, node: NodeId) -> bool:
        """Whether a node is gone for good: it has no row any more, or its process has ended.

        Raises:
            DirectoryError: The directory cannot be reached.
            PeerError: Its row cannot be read.
        """
        entry = await self.directory.get(NODE_KEY + node)
        return entry is None or self._seen_dead(decode_node(entry.value))

    async def is_silent(self, node: NodeId) -> bool:
        """Whether a node is gone, or is suspected and still has no lease; raises as `is_gone`."""
        if await self.is_gone(node):
            return True
        return node in self.suspected and await self.directory.get(ALIVE_KEY + node) is None

    async def server_rows(self) -> list[Row]:
        """The rows of all servers; one that cannot be read is reported, and left out.

        Raises:
            DirectoryError: The directory cannot be reached.
        """
        entries, _ = await self.directory.list(SERVER_KEY)
        rows = [_readable(wire.decode_row, entry.key, entry.value) for entry in entries]
        return [row for row in rows if row is not None]

    async def leave(self) -> None:
        """Unregister; the others treat this node as gone for good."""
        self._leaving = True
        self.look_away()
        try:
            await self._remove(self.me)
            await self.directory.revoke(self._lease)
        except DirectoryError as error:
            log.warning("node %s could not unregister: %s", self.me.name, error)

    def look_away(self) -> None:
        """Watch the processes of the others no more."""
        for fd in self._pidfds.values():
            self._loop.remove_reader(fd)
            os.close(fd)
        self._pidfds.clear()
        self._polled.clear()

    async def forget(self, name: str) -> None:
        """Take somebody's word that a node is dead for good.

        Raises:
            NodeNotFound: No node has that name.
            UsageError: It renews its lease.
            DirectoryError: The directory cannot be reached, or it is not known what it did.
        """
        entries, _ = await self.directory.list(NODE_KEY)
        found = False
        for entry in entries:
            row = _readable(decode_node, entry.key, entry.value)
            if row is None or row.name != name:
                continue
            found = True
            # Its name may be another one's by now, who took it over.
            named = await self.directory.get(NODE_NAME_KEY + name)
            compares = [Compare(entry.key, entry.rev), Compare(ALIVE_KEY + row.id, 0)]
            deletes = [entry.key]
            if named is not None and named.value == row.id.encode():
                compares.append(Compare(named.key, named.rev))
                deletes.append(named.key)
            if (await self.directory.txn(compares, [], deletes)).ok:
                return
        if not found:
            raise NodeNotFound(f"no node is named {name!r}", node=name)
        raise UsageError(
            f"node {name} renews its lease, so it is not dead; end its process, and try again when "
            "its lease has run out",
            node=name,
        )

    async def _remove(self, row: NodeRow) -> None:
        """Remove a node's rows; its name only if it is still its own."""
        name_key = NODE_NAME_KEY + row.name
        entry = await self.directory.get(name_key)
        deletes = [NODE_KEY + row.id, ALIVE_KEY + row.id]
        if entry is None or entry.value != row.id.encode():
            await self.directory.txn([], [], deletes)
        else:
            await self.directory.txn([Compare(name_key, entry.rev)], [], [*deletes, name_key])

    async def _stay_alive(self) -> None:
        wait_s = self._lease_s / 3
        while True:
            await asyncio.sleep(wait_s)
            try:
                if not await self.directory.keepalive(self._lease):
                    # We were paused for longer than the lease, or the directory was away: others
                    # thought us unreachable.
                    lease = await self.directory.lease(self._lease_s)
                    # Whoever was forgotten meanwhile stays dead.
                    mine = Compare(NODE_KEY + self.me.id, self._row_rev)
                    put = Put(ALIVE_KEY + self.me.id, b"", lease)
                    if not (await self.directory.txn([mine], [put], [])).ok:
                        self._forgotten()
                        return
                    self._lease = lease
                wait_s = self._lease_s / 3
            except DirectoryError as error:
                log.debug("lease of node %s: %s", self.me.name, error)
                # There may be just time for another one.
                wait_s = min(RETRY_S, self._lease_s / 3)

    # -- following the others

    async def _list(self) -> None:
        while True:
            entries, rev = await self.directory.list(NODE_KEY)
            if rev >= self.rev:
                break  # Else the watch has come further meanwhile.
        present = {}
        for entry in entries:
            row = _readable(decode_node, entry.key, entry.value)
            if row is not None:
                present[row.id] = row
        for gone in [n for n in self.nodes if n not in present]:
            self._left(gone)
        for row in present.values():
            self._joined(row)
        self.rev = rev
        self._notify()

    async def _follow(self) -> None:
        while True:
            try:
                async for changes in self.directory.watch(NODE_KEY, self.rev + 1):
                    if changes[-1].rev <= self.rev:
                        continue  # A list has told of it.
                    self.rev = changes[-1].rev
                    for change in changes:
                        if change.value is None:
                            self._left(change.key.removeprefix(NODE_KEY))
                        elif row := _readable(decode_node, change.key, change.value):
                            self._joined(row)
                    self._notify()
            except Compacted:
                pass
            except DirectoryError as error:
                log.debug("watching the nodes: %s", error)
                await asyncio.sleep(RETRY_S)
            with contextlib.suppress(DirectoryError):
                await self._list()

    async def _compare(self) -> None:
        while True:
            await asyncio.sleep(RELIST_S)
            with contextlib.suppress(DirectoryError):
                await self._list()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def _joined(self, row: NodeRow) -> None:
        if row.id in self.nodes:
            return
        self.nodes[row.id] = row
        if row.id == self.me.id:
            return
        if self._seen_dead(row):
            self._dead(row)
            return
        if row.boot == self.me.boot and row.pid != self.me.pid:
            self._watch_process(row)
        self._watcher.joined(row)
        self._listen_to(row.id)

    def _forgotten(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._watcher.forgotten()

    def _left(self, node: NodeId) -> None:
        if node == self.me.id:
            self._forgotten()
            return
        row = self.nodes.pop(node, None)
        if row is None:
            return
        self._unwatch(node)
        cause = "its process died" if self._seen_dead(row) else "it has left"
        self._watcher.gone(row, f"node {row.name} is gone: {cause}")
        self._run(self._bury(row), f"burial of {row.name}")

    # -- silences

    async def _listen(self) -> None:
        while True:
            try:
                entries, rev = await self.directory.list(ALIVE_KEY)
                self._alive = {entry.key.removeprefix(ALIVE_KEY) for entry in entries}
                for node in self.nodes:
                    self._listen_to(node)
                async for changes in self.directory.watch(ALIVE_KEY, rev + 1):
                    for change in changes:
                        node = change.key.removeprefix(ALIVE_KEY)
                        if change.value is None:
                            self._alive.discard(node)
                        else:
                            self._alive.add(node)
                        self._listen_to(node)
            except Compacted:
                pass
            except DirectoryError as error:
                log.debug("watching the leases: %s", error)
                await asyncio.sleep(RETRY_S)

    def _listen_to(self, node: NodeId) -> None:
        """Begin or end to be patient with a node, by what is known of its lease."""
        if node in self._alive:
            self._hear(node)
            if node in self.suspected:
                self.suspected.discard(node)
                self._watcher.heard(node)
        elif (
            node in self.nodes
            and node != self.me.id
            and node not in self._silent
            and node not in self.suspected
        ):
            self._silent[node] = self._run(self._wait_for(node), f"silence of {node}")

    def _hear(self, node: NodeId) -> None:
        waiting = self._silent.pop(node, None)
        if waiting is not None:
            waiting.cancel()

    async def _wait_for(self, node: NodeId) -> None:
        """Suspect a node that stays silent."""
        await asyncio.sleep(self._patience_s)
        while True:
            # What this node knows may be old: it may have been paused itself, or cut off.
            try:
                absent = await self.directory.get(ALIVE_KEY + node) is None
                break
            except DirectoryError as error:
                log.debug("the lease of %s: %s", node, error)
            # When the directory is back each node needs a moment for its lease.
            await asyncio.sleep(max(RETRY_S, self._patience_s))
        self._silent.pop(node, None)
        if absent and node in self.nodes:
            self.suspected.add(node)
            log.warning("node %s has not been heard of for longer than its lease", node)
            self._watcher.suspected(node)

    # -- deaths

    def _watch_process(self, row: NodeRow) -> None:
        try:
            fd = os.pidfd_open(row.pid)
        except (AttributeError, OSError):
            if self._seen_dead(row):
                self._dead(row)
            else:
                if not self._polled:
                    self._run(self._poll(), "processes")
                self._polled[row.id] = row
            return
        if self._seen_dead(row):
            # The pid belonged to somebody else by the time it was opened.
            os.close(fd)
            self._dead(row)
            return
        self._pidfds[row.id] = fd
        self._loop.add_reader(fd, self._process_ended, row)

    def _process_ended(self, row: NodeRow) -> None:
        self._dead(row)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            for row in [r for r in self._polled.values() if self._seen_dead(r)]:
                self._dead(row)

    def _unwatch(self, node: NodeId) -> None:
        self._hear(node)
        self.suspected.discard(node)
        fd = self._pidfds.pop(node, None)
        if fd is not None:
            self._loop.remove_reader(fd)
            os.close(fd)
        self._polled.pop(node, None)

    def _dead(self, row: NodeRow) -> None:
        self._unwatch(row.id)
        if self.nodes.pop(row.id, None) is None:
            return
        log.info("node %s (pid %d) died", row.name, row.pid)
        self._watcher.gone(row, f"node {row.name} died (pid {row.pid})")
        self._notify()
        self._run(self._bury(row), f"burial of {row.name}")

    async def _bury(self, node: NodeRow) -> None:
        """Mark what the dead node owned as lost, then remove its rows; and look once more later."""
        until_s = time.monotonic() + LAST_WORD_MS / 1000
        await self._settle(node)
        await self._until_done(functools.partial(self._remove, node), node)
        await asyncio.sleep(until_s - time.monotonic())
        await self._settle(node)

    async def _settle(self, node: NodeRow) -> None:
        cause = f"its node {node.name} died (pid {node.pid}), and nothing could take over"
        again = True

        async def look() -> None:
            nonlocal again
            entries, _ = await self.directory.list(SERVER_KEY)
            rows = [
                (row, entry.rev)
                for entry in entries
                if (row := _readable(wire.decode_row, entry.key, entry.value)) is not None
            ]
            doomed, again = self._watcher.burials(node.id, rows)
            await asyncio.gather(*(self._bury_server(row, rev, cause) for row, rev in doomed))
            if again and not doomed:
                await asyncio.sleep(RETRY_S)

        while again:
            await self._until_done(look, node)

    async def _until_done(self, work: Callable[[], Awaitable[None]], node: NodeRow) -> None:
        """Do something of a burial; again as long as the directory does not answer."""
        while True:
            try:
                return await work()
            except DirectoryError as error:
                log.debug("burial of %s: %s", node.name, error)
                await asyncio.sleep(RETRY_S)

    async def _bury_server(self, row: Row, rev: int, cause: str) -> None:
        key = SERVER_KEY + row.server
        compares = [Compare(key, rev)]
        deletes = []
        if row.name:
            name_key = NAME_KEY + row.name
            entry = await self.directory.get(name_key)
            if entry is not None and entry.value == row.server.encode():
                compares.append(Compare(name_key, entry.rev))
                deletes.append(name_key)
        lost = wire.encode_row(rules.buried(row, cause))
        # Refused: somebody else was quicker, or the row has another owner by now.
        await self.directory.txn(compares, [Put(key, lost)], deletes)
