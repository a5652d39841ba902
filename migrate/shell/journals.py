"""The journals of one node: what its servers' owners log, in one place, and back.

A journal is one more follower of its server (`core/standby.py`): what is let out waits until it has
what that depends on. Its id is the stream's, which the row names. It goes on under that id when a
node opens it again, so there is no moment at which the row names a journal that lacks anything; a
move or a failover ends it. Where journals are, and how it is known that a writer is gone, is the
matter of a place (`journal_places.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from migrate.core.ids import NodeId, ServerId, TransferId
from migrate.core.incarnation import Incarnation
from migrate.core.messages import Cut, Follow, Note, Step
from migrate.core.records import CutRecord, SessionRecord, StepRecord
from migrate.core.standby import JOURNAL, Changed, Leftover, Logged, server_of
from migrate.errors import MigrateError
from migrate.shell import wire
from migrate.shell.directories.base import DirectoryError
from migrate.shell.host import Hosted
from migrate.shell.journal import Appends, JournalFailed
from migrate.shell.journal_format import BadJournal, Facts, Kind, Record
from migrate.shell.journal_objects import JournalFenced
from migrate.shell.journal_places import Opened, Place
from migrate.shell.stores import StoreError
from rpc.frames import Gathered

if TYPE_CHECKING:
    from migrate.shell.driver import Driver

log: Final = logging.getLogger("migrate")

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
    """A journal that was read, and is held until there is a newer one in its place."""

    held: contextlib.ExitStack
    key: str
    facts: Facts


class NodeJournals:
    """The journals of one node, written and opened.

    Args:
        driver: The node's.
        place: Where they are.
        admits: Whether this node takes over servers of others now.
    """

    def __init__(self, driver: Driver, place: Place, admits: Callable[[], bool]) -> None:
        self._driver = driver
        self.place = place
        self._admits = admits
        self._written: dict[TransferId, Appends] = {}
        # Journals that are being opened, and who waits for that.
        self._opening: dict[ServerId, _Opening] = {}
        self._opened: dict[ServerId, asyncio.Future[bool]] = {}
        self._unusable: dict[ServerId, int] = {}  # at which revision of its row
        self._look = asyncio.Event()
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

    def _begin(self, inc: Incarnation, message: Cut, former: Appends | None) -> Appends:
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
        server = inc.id
        written = self._written[message.stream] = self.place.create(
            facts,
            former,
            lambda: self._full(server, message.stream),
            lambda: self._fenced(server, message.stream),
        )
        written.epoch(wire.encode_row(row))
        return written

    def _done(
        self, server: ServerId, stream: TransferId, number: int, error: JournalFailed | None
    ) -> None:
        ended = stream not in self._written and (error is None or isinstance(error, JournalFenced))
        if self._closing or ended:
            return
        if server in self._opening and error is None:
            self._release(server)  # It holds a whole cut of this owner.
        reason = error.reason if error is not None else ""
        if reason:
            log.error("the journal of server %s failed: %s", server, reason)
        driver = self._driver
        driver.peers.flush_comes()
        try:
            driver.core.standbys.journaled(server, number, reason, driver.now_ms(), stream=stream)
        finally:
            driver.flush()

    def _fenced(self, server: ServerId, stream: TransferId) -> None:
        """Another writer has begun: it is for the row to say whose the journal is."""
        if stream in self._written and not self._closing:
            log.warning("the journal of server %s was fenced by another node", server)
            self._driver.core.standbys.journal_fenced(server, stream, self._driver.now_ms())
            self._driver.flush()

    def go_on(self, stream: TransferId) -> None:
        """See `Port.journal_goes_on`."""
        written = self._written.get(stream)
        if written is not None:
            self.place.go_on(written)

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
                self._look_later(opening.key, opening.facts)
        if written is not None:
            key = self.place.key(written)
            written.close(lambda _: self._look_later(key, written.facts, written))

    def _look_later(self, key: str, facts: Facts, written: Appends | None = None) -> None:
        self._driver.task(self._look_after(key, facts, written), f"a journal of {facts.server}")

    async def _look_after(self, key: str, facts: Facts, written: Appends | None) -> None:
        """Remove what no row can name any more; open it if nobody else will."""
        wait_s = AGAIN_FIRST_S
        while not self._closing:
            left = Leftover.WAIT
            try:
                left = await self.place.leave(key, facts, written)
            except (DirectoryError, MigrateError) as error:
                log.warning("the row of server %s cannot be read: %s", facts.server, error)
            except StoreError as error:
                log.debug("the end of a journal of %s: %s", facts.server, error.reason)
            if left is Leftover.OPEN:
                await self._try_to_open(key)
            if left is not Leftover.WAIT:
                return
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, AGAIN_MAX_S)

    async def close(self) -> None:
        """Close all journals in order; what was not acknowledged by now never is."""
        self._closing = True
        await self.place.close()
        for server in list(self._opening):
            self._release(server)

    def stop(self) -> None:
        """End at once, as a node does that was said to be dead, or that could not start."""
        self._closing = True
        self.place.stop()

    # ------------------------------------------------------------------ opening

    async def open_all(self) -> None:
        """Take over every server that may be opened here, and wait until each has a decision."""
        again = await self._open_found()
        if self.place.is_shared:
            self._driver.task(self._watch(again), "journals without owners")

    def look(self) -> None:
        """An owner may be gone, or this node admits servers again."""
        self._look.set()

    async def _watch(self, again: bool) -> None:
        """Open what may be opened whenever owners are gone, and again what could not be."""
        wait_s = AGAIN_FIRST_S
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                # Nodes that look at the same time do not do so a second time.
                between_s = wait_s * random.uniform(0.5, 1.0)
                async with asyncio.timeout(between_s if again else None):
                    await self._look.wait()
                    wait_s = AGAIN_FIRST_S
            self._look.clear()
            again = await self._open_found()
            wait_s = min(2 * wait_s, AGAIN_MAX_S)

    async def _open_found(self) -> bool:
        """Open what there is to be opened; whether to look again soon."""
        if not self._admits():
            return False
        try:
            keys, again = await self.place.find()
        except (DirectoryError, MigrateError) as error:
            log.error("it cannot be found out which journals have no owner: %s", error)
            return True
        limit = asyncio.Semaphore(self.place.at_once)

        async def opened(key: str) -> bool:
            async with limit:
                return await self._try_to_open(key)

        return not all(await asyncio.gather(*map(opened, keys))) or again

    @property
    def is_closing(self) -> bool:
        """Whether nothing is written or opened any more."""
        return self._closing

    async def _try_to_open(self, key: str) -> bool:
        """Open a journal; whether there is a decision."""
        if self._closing or (self.place.is_shared and key in self._driver.core.hosted):
            return True
        rev = 0
        try:
            if self.place.is_shared:
                # What this node could not open before it does not fence again, as things are.
                _, rev = await self._driver.rows.read(key)
                if self._unusable.get(key) == rev:
                    return True
            return await self._open(key)
        except BadJournal as error:
            if self.is_closing:
                return True
            if self.place.is_shared and await self._is_changed(key, rev):
                log.warning("the journal %s is somebody else's meanwhile: %s", key, error.reason)
                return False
            log.error("the journal %s cannot be opened: %s", key, error.reason)
            if error.flaw == "store":
                return False
            self._unusable[key] = rev
            return True
        except (DirectoryError, MigrateError) as error:
            log.error(
                "the journal %s cannot be opened: the row of its server cannot be read: %s",
                key,
                error,
            )
            return False

    async def _is_changed(self, server: ServerId, rev: int) -> bool:
        """Whether a row is another one than it was, as far as anybody can tell."""
        try:
            _, now = await self._driver.rows.read(server)
        except (DirectoryError, MigrateError):
            return False
        return now != rev

    async def _open(self, key: str) -> bool:
        driver = self._driver
        opened = await self.place.open(key)
        if isinstance(opened, Facts):
            self._look_later(key, opened)
        if not isinstance(opened, Opened):
            return True
        found, stack = opened.found, opened.held
        facts = found.facts
        try:
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
            self._let_go(facts.journal, stack)
            raise BadJournal(
                "damaged", f"its records are not those of a server: {error}"
            ) from error
        except BaseException:
            self._let_go(facts.journal, stack)
            raise
        if found.torn_bytes:
            log.warning(
                "the journal %s ends in %d bytes that were never acknowledged; they are cut off",
                opened.where,
                found.torn_bytes,
            )
        server = facts.server
        self._opening[server] = _Opening(stack, key, facts)
        future = self._opened[server] = driver.loop.create_future()
        now_s = driver.streams.wall_s()
        why = driver.core.standbys.reopen(follow, logged, now_s, driver.now_ms(), opened.seen)
        driver.flush()
        if why:
            driver.streams.end_stream(facts.journal)
            self.changed(server, JOURNAL, Changed.UNFIT, why)
        is_back = await future
        if not is_back:
            self.place.forget(facts.journal)
        # Of one that is shared, somebody else may have it; if nobody has, it is tried again.
        return is_back or not self.place.is_shared

    def _let_go(self, stream: TransferId, stack: contextlib.ExitStack) -> None:
        stack.close()
        self.place.forget(stream)

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
        if what is Changed.JOINED and node == JOURNAL:
            inc = self._driver.core.hosted.get(server)
            written = self._written.get(inc.row.journal) if inc is not None else None
            if written is not None:
                self.place.is_named(written)
        future = self._opened.get(server)
        if future is None:
            return
        if what is Changed.PROMOTED:
            # It stays held until there is a newer one in its place.
            log.warning("server %s is back, from its journal", server)
        elif what is Changed.UNFIT and node == JOURNAL:
            log.error("server %s does not come back from its journal: %s", server, cause)
            opening = self._opening[server]
            self._release(server)
            if not self._closing and not self.place.is_shared:
                self._look_later(opening.key, opening.facts)
        else:
            return
        del self._opened[server]
        if not future.done():
            future.set_result(what is Changed.PROMOTED)

    def _release(self, server: ServerId) -> None:
        self._opening.pop(server).held.close()


__all__ = ["NodeJournals"]
