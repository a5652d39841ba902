"""The journals of one node: what its servers' owners log, on this node's disk, and back.

A journal is one more follower of its server (`core/standby.py`): what is let out waits until it has
what that depends on. Its id is the stream's, which the row names. It goes on under that id when a
node opens it again, so there is no moment at which the row names a journal that lacks anything; a
move or a failover ends it. That its writer is gone is known by the lock on the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from migrate.core.directory import RowState
from migrate.core.ids import NodeId, ServerId, TransferId
from migrate.core.incarnation import Incarnation
from migrate.core.messages import Cut, Follow, Note, Step
from migrate.core.records import CutRecord, SessionRecord, StepRecord
from migrate.core.standby import JOURNAL, Changed, Leftover, Logged, server_of
from migrate.errors import MigrateError, StaleJournal
from migrate.shell import journal, wire
from migrate.shell.directories.base import DirectoryError
from migrate.shell.host import Hosted
from migrate.shell.journal import Journal, JournalFailed, JournalLog
from migrate.shell.journal_format import BadJournal, Facts, Found, Kind, Record
from rpc.frames import Gathered

if TYPE_CHECKING:
    from migrate.shell.driver import Driver

log: Final = logging.getLogger("migrate")

OPENED_AT_ONCE: Final = 2
"""Journals that are read at the same time when a node opens."""

IN_USE_S: Final = 5.0
"""How long a journal is waited for whose writer was killed and has not quite ended."""
IN_USE_LOOK_S: Final = 0.1

AGAIN_FIRST_S: Final = 0.2
AGAIN_MAX_S: Final = 5.0
"""Waits before it is looked again whether a journal is of use to anybody. The server of one that
its writer has to open again is away for as long."""

_NOTE: Final = b"N"
_STEP: Final = b"S"
_encode: Final = msgspec.msgpack.Encoder().encode
_cut: Final = msgspec.msgpack.Decoder(CutRecord)
_step: Final = msgspec.msgpack.Decoder(StepRecord)
_note: Final = msgspec.msgpack.Decoder(list[SessionRecord])


@dataclass(frozen=True)
class _Opening:
    """A journal that was read, and is held until there is a newer one under its name."""

    stack: contextlib.ExitStack
    path: str
    facts: Facts


class NodeJournals:
    """The journals of one node, written and opened.

    Args:
        driver: The node's.
        folder: Where they are; made if it is not there.
        secret: The cluster's secret, from which their key is made.

    Raises:
        OSError: The folder cannot be had.
    """

    def __init__(self, driver: Driver, folder: str, secret: bytes) -> None:
        self._driver = driver
        self._key = journal.signing_key(secret)
        post = functools.partial(driver.loop.call_soon_threadsafe, context=driver.context)
        self._log = JournalLog(folder, self._key, post)
        self._written: dict[TransferId, Journal] = {}
        # Journals that are being opened, and who waits for that.
        self._opening: dict[ServerId, _Opening] = {}
        self._opened: dict[ServerId, asyncio.Future[None]] = {}
        self._closing = False

    # ------------------------------------------------------------------ writing

    def append(self, inc: Incarnation, message: Logged) -> None:
        """See `Port.journal`."""
        if self._closing:
            return  # Nothing is acknowledged any more, so nothing is let out.
        written = self._written.get(message.stream)
        try:
            if type(message) is Cut and message.whole:
                written = self._begin(inc, message, written)
            if written is None:
                raise JournalFailed("it was not begun")
            done = functools.partial(self._done, inc.id, message.stream, message.number)
            if type(message) is Cut:
                state = message.state
                # Its parts may change as soon as the server goes on.
                # (The core passes it on as bytes, whatever it is.)
                data: Any = state
                if isinstance(data, Gathered):
                    data = bytes(data.joined())
                written.cut(
                    message.number, _encode(message.record), [data], whole=message.whole, done=done
                )
            elif type(message) is Step:
                written.step(message.number, _STEP + _encode(message.step), done)
            elif type(message) is Note:
                written.step(message.number, _NOTE + _encode(message.sessions), done)
        except (JournalFailed, ValueError) as error:
            failed = error if isinstance(error, JournalFailed) else JournalFailed(str(error))
            number = message.number
            self._driver._soon(lambda: self._done(inc.id, message.stream, number, failed))

    def _begin(self, inc: Incarnation, message: Cut, former: Journal | None) -> Journal:
        row, host = inc.row, inc.host
        assert isinstance(host, Hosted)
        facts = Facts(
            journal=message.stream,
            server=inc.id,
            cls=row.cls,
            version=row.version,
            by_value=host.by_value,
            name=row.name,
            node=self._driver.node,
            epoch=message.epoch,
        )
        replaces = former if former is not None and former.phase is journal.Phase.OPEN else None
        server = inc.id
        written = self._written[message.stream] = self._log.create(
            facts, replaces=replaces, on_full=lambda _: self._full(server, message.stream)
        )
        written.epoch(wire.encode_row(row))
        return written

    def _done(
        self, server: ServerId, stream: TransferId, number: int, error: JournalFailed | None
    ) -> None:
        if self._closing or (stream not in self._written and error is None):
            return
        if server in self._opening:
            self._release(server)  # It holds a whole cut of this owner.
        reason = error.reason if error is not None else ""
        if reason:
            log.error("the journal of server %s failed: %s", server, reason)
        self._driver.core.standbys.journaled(server, number, reason, self._driver.now_ms())
        self._driver.flush()

    def _full(self, server: ServerId, stream: TransferId) -> None:
        if stream in self._written and not self._closing:
            self._driver.streams.begin_anew(stream)
            self._driver.core.standbys.journal_anew(server, self._driver.now_ms())
            self._driver.flush()

    def end(self, stream: TransferId) -> None:
        """A server's journal is of no use any more, or is soon to be: it ends."""
        written = self._written.pop(stream, None)
        if self._closing:
            return
        opening = self._opening.get(server_of(stream))
        if opening is None or opening.facts.server in self._opened:
            opening = None  # or there is no decision yet
        elif opening.facts.journal == stream:
            # The server was taken away again before this holds a whole cut of this owner.
            self._release(opening.facts.server)
            if written is None:
                self._look_later(opening.path, opening.facts)
        if written is not None:
            written.close(lambda _: self._look_later(written.path, written.facts))

    def _look_later(self, path: str, facts: Facts) -> None:
        self._driver.task(self._look_after(path, facts), f"a journal of {facts.server}")

    async def _look_after(self, path: str, facts: Facts) -> None:
        """Remove a file when no row can name it any more; open it if nobody else will."""
        wait_s = AGAIN_FIRST_S
        left, _ = await self._leftover(facts, first=False)
        while left is Leftover.WAIT:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, AGAIN_MAX_S)
            left, _ = await self._leftover(facts, first=False)
        if left is Leftover.OPEN:
            await self._try(path)
            return
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._log.disk.remove, path)

    async def _leftover(self, facts: Facts, *, first: bool) -> tuple[Leftover, str]:
        """What to do with a journal by the row of its server, and what that says, for people."""
        try:
            row, _ = await self._driver.rows.read(facts.server)
        except (DirectoryError, MigrateError) as error:
            log.warning("the row of server %s cannot be read: %s", facts.server, error)
            return Leftover.WAIT, ""
        standbys = self._driver.core.standbys
        left = standbys.leftover(row, facts.journal, facts.node, first=first)
        if row is None or row.state is RowState.LOST:
            return left, "there is no such server any more"
        return left, f"its row, at epoch {row.epoch}, names {row.journal or 'no journal'}"

    async def close(self) -> None:
        """Close all journals in order; what was not acknowledged by now never is."""
        self._closing = True
        await self._log.close()
        for server in list(self._opening):
            self._release(server)

    # ------------------------------------------------------------------ opening

    async def open_all(self) -> None:
        """Take over every server whose journal is here, and wait until each has a decision."""
        paths = await asyncio.to_thread(self._find)
        limit = asyncio.Semaphore(OPENED_AT_ONCE)

        async def opened(path: str) -> None:
            async with limit:
                await self._try(path)

        await asyncio.gather(*map(opened, paths))

    async def _try(self, path: str) -> None:
        until_s = self._driver.loop.time() + IN_USE_S
        while True:
            try:
                await self._open(path)
            except BadJournal as error:
                if error.flaw == "in use" and self._driver.loop.time() < until_s:
                    await asyncio.sleep(IN_USE_LOOK_S)
                    continue
                log.error("the journal %s cannot be opened: %s", path, error.reason)
            return

    def _find(self) -> list[str]:
        journal.sweep(self._log.folder)
        return journal.find(self._log.folder)

    async def _open(self, path: str) -> None:
        driver = self._driver
        stack = contextlib.ExitStack()
        try:
            found = await asyncio.to_thread(self._load, stack, path)
            facts = found.facts
            # A folder may hold several of one server: what moves left behind just before a kill.
            left, why = await self._leftover(facts, first=True)
            if left is not Leftover.OPEN:
                stack.close()
                if left is Leftover.WAIT:
                    self._look_later(path, facts)
                else:
                    await self._set_aside(path, facts, why)
                return
            follow = Follow(
                facts.journal,
                facts.server,
                facts.epoch,
                facts.cls,
                facts.version,
                facts.by_value,
                wire.PYTHON,
                facts.name,
            )
            logged = [self._message(follow, record) for record in found.records]
            states = [bytes(r.state) for r in found.records if r.kind is Kind.CUT]
            reason = await driver.streams.keep_journal(follow, states)
            if reason:
                raise BadJournal("damaged", f"its state cannot be had: {reason}")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            stack.close()
            raise BadJournal(
                "damaged", f"its records are not those of a server: {error}"
            ) from error
        except BaseException:
            stack.close()
            raise
        if found.torn_bytes:
            log.warning(
                "the journal %s ends in %d bytes that were never acknowledged; they are cut off",
                path,
                found.torn_bytes,
            )
        server = facts.server
        self._opening[server] = _Opening(stack, path, facts)
        future = self._opened[server] = driver.loop.create_future()
        now_s = driver.streams.wall_s()
        why = driver.core.standbys.reopen(follow, logged, now_s, driver.now_ms())
        driver.flush()
        if why:
            driver.streams.end_stream(facts.journal)
            self.changed(server, JOURNAL, Changed.UNFIT, why)
        await future

    async def _set_aside(self, path: str, facts: Facts, why: str) -> None:
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

    def _load(self, stack: contextlib.ExitStack, path: str) -> Found:
        limit = 4 * self._driver.options.state_bytes_max + (1 << 30)
        try:
            stack.enter_context(journal.held(path, exclusive=True))
        except FileNotFoundError as error:
            raise BadJournal("missing", "there is no such file") from error
        except OSError as error:
            raise BadJournal("store", f"it cannot be read: {error.strerror or error}") from error
        return journal.load(path, self._key, limit, is_held=True)

    @staticmethod
    def _message(follow: Follow, record: Record) -> Logged:
        stream, server, epoch = follow.stream, follow.server, follow.epoch
        if record.kind is Kind.CUT:
            told = _cut.decode(record.record)
            return Cut(stream, server, epoch, record.number, record.whole, told, b"")
        body = record.record[1:]
        if bytes(record.record[:1]) == _STEP:
            return Step(stream, server, epoch, record.number, _step.decode(body))
        return Note(stream, server, epoch, record.number, _note.decode(body))

    def changed(self, server: ServerId, node: NodeId, what: Changed, cause: str) -> None:
        """What the core tells of servers, see `Port.standbys_changed`."""
        future = self._opened.get(server)
        if future is None:
            return
        if what is Changed.PROMOTED:
            # The file stays held until there is a newer one under its name.
            log.warning("server %s is back, from its journal", server)
        elif what is Changed.UNFIT and node == JOURNAL:
            log.error("server %s does not come back from its journal: %s", server, cause)
            opening = self._opening[server]
            self._release(server)
            if not self._closing:
                self._look_later(opening.path, opening.facts)
        else:
            return
        del self._opened[server]
        if not future.done():
            future.set_result(None)

    def _release(self, server: ServerId) -> None:
        self._opening.pop(server).stack.close()


__all__ = ["NodeJournals"]
