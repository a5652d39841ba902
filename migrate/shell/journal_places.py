"""Where a node keeps journals: a folder of its own, or an object store that nodes share.

A *folder* belongs to one node. What is in it was written there, and a lock on the file tells
whether its writer still lives; so the node opens all that it finds, once, when it starts.

A *store* belongs to all nodes that are given its URL. It knows no locks, and whoever can read it
can open what is there. So any of them opens the journal of a server whose owner is gone, by the
directory: dead, or silent for longer than its lease and this node's patience. It does so when it
starts and whenever an owner has gone, which makes a journal in a store a standby that needs no
node. A server that has standbys is left to them. That an owner is thought to be gone that is not
costs it some work, and nothing else: it is kept from writing first, and of its next swap and the
opener's one is refused (`journal_objects.py`).
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from migrate.core.directory import Row, RowState
from migrate.core.ids import NodeId, TransferId
from migrate.core.standby import Leftover
from migrate.errors import MigrateError, Outcome, StaleJournal
from migrate.shell import journal, stores
from migrate.shell.bell import Posts
from migrate.shell.directories.base import DirectoryError
from migrate.shell.journal import Appends, Journal, JournalLog, Phase, Post
from migrate.shell.journal_format import BadJournal, Facts, Found
from migrate.shell.journal_objects import (
    THREADS,
    ObjectJournal,
    ObjectLog,
    fence,
    header_of,
    load_objects,
    segments,
)
from migrate.shell.stores import Store, StoreError

if TYPE_CHECKING:
    from migrate.shell.driver import Rows

log: Final = logging.getLogger("migrate")

IN_USE_S: Final = 5.0
"""How long a journal is waited for whose writer was killed and has not quite ended."""
IN_USE_LOOK_S: Final = 0.1

TRY_S: Final = 20.0
"""How long a store is tried out, before a node says that it cannot be reached."""

FOLDER: Final = "servers/"
"""What is below the URL of a store."""

Tell = Callable[[], None]


@dataclass(slots=True)
class Opened:
    """A journal that was read, and that nobody else writes to.

    Attributes:
        found: What it holds.
        where: Its path or name, for people.
        held: What keeps others away, until there is a newer one in its place.
        seen: The row and its revision as they were before its writer was kept from writing; None:
            the writer has ended for certain.
    """

    found: Found
    where: str
    held: contextlib.ExitStack
    seen: tuple[Row, int] | None = None


class Owners(Protocol):
    """What the directory says of nodes and servers.

    Every method raises DirectoryError where it cannot be known.
    """

    async def is_gone(self, node: NodeId) -> bool:
        """Whether a node is gone for good."""

    async def is_silent(self, node: NodeId) -> bool:
        """Whether a node is gone, or has been silent for so long that others may take over."""

    async def server_rows(self) -> list[Row]:
        """The rows of all servers."""


class AskLeftover(Protocol):
    """See `Standbys.leftover`."""

    def __call__(
        self, row: Row | None, journal: TransferId, writer: NodeId, *, first: bool
    ) -> Leftover: ...


class Place(abc.ABC):
    """Where the journals of a node are.

    Attributes:
        is_shared: Other nodes may open what this one writes.
        at_once: So many journals are opened at the same time.
    """

    is_shared: bool
    at_once: int

    @abc.abstractmethod
    def create(
        self, facts: Facts, former: Appends | None, on_full: Tell, on_fenced: Tell
    ) -> Appends:
        """What the next whole cut of a server is to be appended to.

        Args:
            facts: What a header tells.
            former: The journal of that id so far.
            on_full: Called when a whole cut is wanted.
            on_fenced: Called when another node has begun to open it; nothing is written any more
                before `go_on`.
        """

    @abc.abstractmethod
    def go_on(self, written: Appends) -> None:
        """A journal that was fenced is its owner's still."""

    @abc.abstractmethod
    def is_named(self, written: Appends) -> None:
        """The row names a journal that was begun here."""

    @abc.abstractmethod
    def key(self, written: Appends) -> str:
        """What a journal that was begun here is opened by."""

    @abc.abstractmethod
    async def leave(self, key: str, facts: Facts, written: Appends | None) -> Leftover:
        """What to do with a journal that this node does not write to, or not any more.

        Args:
            key: What it is opened by.
            facts: What its header tells.
            written: If it was begun here.

        Returns:
            USELESS: nothing is left of it, or what is left is somebody else's.

        Raises:
            DirectoryError: The row cannot be read.
            StoreError: Something is left that should not be.
        """

    @abc.abstractmethod
    async def find(self) -> tuple[list[str], bool]:
        """What may be opened here now, and whether to look again soon.

        Raises:
            BadJournal: The place cannot be read.
            DirectoryError: Nothing is known.
        """

    @abc.abstractmethod
    async def open(self, key: str) -> Opened | Facts | None:
        """Keep everybody else from writing a journal, and read it.

        Args:
            key: One of those that were found.

        Returns:
            None: it is not for this node. Facts: it is not known yet, and `leave` tells.

        Raises:
            BadJournal: It cannot be used.
            DirectoryError: The row cannot be read.
        """

    @abc.abstractmethod
    def forget(self, stream: TransferId) -> None:
        """A journal that was opened is not gone on with here."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Close all journals in order."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End at once; nothing happens if it is closed."""


class FolderPlace(Place):
    """Files in a folder of one node.

    Args:
        folder: Made if it is not there.
        key: What signs them.
        posts: Run functions of its threads on the loop; closed with it.
        soon: Runs a function when what the loop has got is handled.
        rows: Of servers.
        leftover: What the core says, see `Standbys.leftover`.
        bytes_max: No larger file is read.

    Raises:
        OSError: The folder cannot be had.
    """

    is_shared = False
    at_once = 2

    def __init__(
        self,
        folder: str,
        key: bytes,
        posts: Posts,
        soon: Post,
        rows: Rows,
        leftover: AskLeftover,
        bytes_max: int,
    ) -> None:
        self.log = JournalLog(folder, key, posts.post, soon=soon)
        self._posts = posts
        self._key = key
        self._rows = rows
        self._leftover = leftover
        self._bytes_max = bytes_max

    def create(
        self, facts: Facts, former: Appends | None, on_full: Tell, on_fenced: Tell
    ) -> Appends:
        """See `Place.create`."""
        replaces = former if isinstance(former, Journal) and former.phase is Phase.OPEN else None
        return self.log.create(facts, replaces=replaces, on_full=lambda _: on_full())

    def go_on(self, written: Appends) -> None:
        """See `Place.go_on`: nobody else can write to a file of this node's."""

    def is_named(self, written: Appends) -> None:
        """See `Place.is_named`."""

    def key(self, written: Appends) -> str:
        """See `Place.key`."""
        assert isinstance(written, Journal)
        return written.path

    async def leave(self, key: str, facts: Facts, written: Appends | None) -> Leftover:
        """See `Place.leave`: a new owner's takes its place."""
        row, _ = await self._rows.read(facts.server)
        left = self._leftover(row, facts.journal, facts.node, first=False)
        if left is Leftover.USELESS:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self.log.disk.remove, key)
        return left

    async def find(self) -> tuple[list[str], bool]:
        """See `Place.find`."""

        def find() -> list[str]:
            journal.sweep(self.log.folder)
            return journal.find(self.log.folder)

        return await asyncio.to_thread(find), False

    async def open(self, key: str) -> Opened | Facts | None:
        """See `Place.open`; one whose writer has not quite ended is waited for.

        A folder may hold several of one server: what moves left behind just before a kill.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + IN_USE_S
        while True:
            with contextlib.ExitStack() as stack:
                try:
                    found = await asyncio.to_thread(self._load, stack, key)
                except BadJournal as error:
                    if error.flaw != "in use" or loop.time() >= until_s:
                        raise
                    await asyncio.sleep(IN_USE_LOOK_S)
                    continue
                facts = found.facts
                try:
                    row, _ = await self._rows.read(facts.server)
                except (DirectoryError, MigrateError) as error:
                    log.warning("the row of server %s cannot be read: %s", facts.server, error)
                    return facts
                match self._leftover(row, facts.journal, facts.node, first=True):
                    case Leftover.OPEN:
                        return Opened(found, key, stack.pop_all())
                    case Leftover.WAIT:
                        return facts
                await self._set_aside(key, facts, row)
                return None

    def _load(self, stack: contextlib.ExitStack, path: str) -> Found:
        try:
            stack.enter_context(journal.held(path, exclusive=True))
        except FileNotFoundError as error:
            raise BadJournal("missing", "there is no such file") from error
        except OSError as error:
            raise BadJournal("store", f"it cannot be read: {error.strerror or error}") from error
        return journal.load(path, self._key, self._bytes_max, is_held=True)

    async def _set_aside(self, path: str, facts: Facts, row: Row | None) -> None:
        if row is None or row.state is RowState.LOST:
            why = "there is no such server any more"
        else:
            why = f"its row, at epoch {row.epoch}, names {row.journal or 'no journal'}"
        to = path
        try:
            to = await asyncio.to_thread(journal.set_aside, path)
        except OSError as error:
            log.error("the journal %s cannot be renamed: %s", path, error)
        stale = StaleJournal(
            f"the journal of server {facts.server} is of no use: {why}; it is kept aside",
            path=to,
            server=facts.server,
            cause=why,
        )
        log.error("%s", stale)

    def forget(self, stream: TransferId) -> None:
        """See `Place.forget`."""

    async def close(self) -> None:
        """See `Place.close`."""
        await self.log.close()
        self._posts.close()

    def stop(self) -> None:
        """See `Place.stop`: its threads end with the process."""


class StorePlace(Place):
    """Objects in a store that several nodes share, below `<prefix>servers/`.

    Args:
        store: The store.
        prefix: What all names begin with; "" or a folder with its slash.
        key: What signs them.
        node: This node.
        rows: Of servers.
        owners: Of nodes.
        bytes_max: No larger journal is read.
    """

    is_shared = True
    at_once = THREADS  # most of the time goes by while requests are under way

    def __init__(
        self,
        store: Store,
        prefix: str,
        key: bytes,
        node: NodeId,
        rows: Rows,
        owners: Owners,
        bytes_max: int,
    ) -> None:
        self._node = node
        self._rows = rows
        self._owners = owners
        self._bytes_max = bytes_max
        self._next: dict[TransferId, int] = {}  # of what was opened: where its base belongs
        self.log = ObjectLog(
            store, f"{prefix}{FOLDER}", key, asyncio.get_running_loop(), self._is_gone
        )

    async def _is_gone(self, node: NodeId) -> bool:
        try:
            return await self._owners.is_gone(node)
        except (DirectoryError, MigrateError):
            return False

    def create(
        self, facts: Facts, former: Appends | None, on_full: Tell, on_fenced: Tell
    ) -> Appends:
        """See `Place.create`."""
        return self.log.create(
            facts,
            former=former if isinstance(former, ObjectJournal) else None,
            segment=self._next.pop(facts.journal, 0),
            on_full=lambda _: on_full(),
            on_fenced=lambda _: on_fenced(),
        )

    def go_on(self, written: Appends) -> None:
        """See `Place.go_on`."""
        assert isinstance(written, ObjectJournal)
        written.go_on()

    def is_named(self, written: Appends) -> None:
        """See `Place.is_named`."""
        assert isinstance(written, ObjectJournal)
        written.prune()

    def key(self, written: Appends) -> str:
        """See `Place.key`."""
        return written.facts.server

    async def leave(self, key: str, facts: Facts, written: Appends | None) -> Leftover:
        """See `Place.leave`. Whoever finds one without an owner opens it, this node or another."""
        if not isinstance(written, ObjectJournal):
            return Leftover.USELESS
        row, _ = await self._rows.read(key)
        is_named = row is not None and row.journal == facts.journal
        if is_named and row is not None and row.owner == self._node:
            return Leftover.WAIT
        is_done = await written.remove(is_named=is_named)
        return Leftover.USELESS if is_done else Leftover.WAIT

    async def find(self) -> tuple[list[str], bool]:
        """See `Place.find`."""
        silent: dict[NodeId, bool] = {}

        async def is_silent(node: NodeId) -> bool:
            if node not in silent:
                silent[node] = await self._owners.is_silent(node)
            return silent[node]

        found, again = [], False
        for row in await self._owners.server_rows():
            if not row.journal or row.state is RowState.LOST or row.owner == self._node:
                continue
            if not await is_silent(row.owner):
                continue  # it is told when that changes
            if await self._is_for_others(row):
                again = True
            else:
                found.append(row.server)
        # Several nodes may look at the same time.
        random.shuffle(found)
        return found, again

    async def _is_for_others(self, row: Row) -> bool:
        """Whether a standby, or the source of a move, may go on with what has lost its owner."""
        others = [*row.standbys]
        if row.state is RowState.COMMITTED and row.previous:
            others.append(row.previous)
        for other in others:
            if not await self._owners.is_silent(other):
                return True
        return False

    async def open(self, key: str) -> Opened | None:
        """See `Place.open`."""
        row, rev = await self._rows.read(key)
        if row is None or row.state is RowState.LOST or not row.journal:
            return None
        if row.owner == self._node or not await self._owners.is_silent(row.owner):
            return None
        if await self._is_for_others(row):
            return None
        facts = Facts(
            journal="",
            server=key,
            cls=row.cls,
            version=row.version,
            name=row.name,
            node=self._node,
            epoch=row.epoch,
        )
        try:
            got = await self.log.run(self._fence_and_read, facts, row.journal)
        except StoreError as error:
            raise BadJournal("store", f"it cannot be fenced: {error.reason}") from error
        if got is None:
            return None
        self._next[row.journal], found = got
        return Opened(found, f"{self.log.prefix}{key}", contextlib.ExitStack(), (row, rev))

    def _fence_and_read(self, facts: Facts, stream: TransferId) -> tuple[int, Found] | None:
        where = self.log
        numbers = segments(where.store, where.prefix, facts.server)
        if not numbers:
            return None  # it is kept elsewhere
        # What is another cluster's is not fenced: nobody could read on behind it.
        header_of(where.store, where.prefix, facts.server, numbers[-1], where.key)
        number = fence(where.store, where.prefix, facts, where.key)
        return number, load_objects(
            where.store, where.prefix, facts.server, stream, where.key, self._bytes_max
        )

    def forget(self, stream: TransferId) -> None:
        """See `Place.forget`."""
        self._next.pop(stream, None)

    async def close(self) -> None:
        """See `Place.close`."""
        await self.log.close()

    def stop(self) -> None:
        """See `Place.stop`."""
        self.log.stop()


async def try_out(store: Store, prefix: str, url: str, node: str = "") -> None:
    """See whether journals can be kept in a store, before anything is.

    Raises:
        MigrateError: They cannot.
    """
    try:
        async with asyncio.timeout(TRY_S):
            await asyncio.to_thread(stores.try_out, store, prefix)
    except (StoreError, TimeoutError) as error:
        why = error.reason if isinstance(error, StoreError) else f"no answer within {TRY_S:g} s"
        raise MigrateError(
            f"journals cannot be kept in {url}: {why}",
            node=node,
            cause=why,
            outcome=Outcome.NOT_DONE,
        ) from error


__all__ = ["FOLDER", "FolderPlace", "Opened", "Owners", "Place", "StorePlace", "try_out"]
