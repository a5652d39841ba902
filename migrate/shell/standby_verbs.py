"""What a node does for `replicate`: chooses who stands by, waits for them, completes the set.

The wish travels with the server (`Wanted`): how many standbys, or which nodes. Whoever owns the
server sees to it. When one is lost, or the owner was, another node takes its place; a node that was
named comes back into the set when it comes back itself. New ones join before others leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from migrate.core import placement
from migrate.core.directory import Mode
from migrate.core.ids import NodeId, ServerId, node_name
from migrate.core.incarnation import Incarnation, Phase
from migrate.core.placement import Candidate
from migrate.core.records import Wanted
from migrate.core.standby import JOURNAL, Changed, Standing
from migrate.errors import (
    MigrateError,
    Outcome,
    ServerNotFound,
    StandbyError,
)
from migrate.reports import StandbyInfo
from migrate.shell.directories.base import DirectoryError
from migrate.shell.host import Hosted

if TYPE_CHECKING:
    from migrate.node import Node

log: Final = logging.getLogger("migrate")

AGAIN_FIRST_S: Final = 0.1
AGAIN_MAX_S: Final = 30.0
"""Waits before a set that could not be completed is tried again; a node that joins ends them."""

COMPLETING_MAX: Final = 16
"""Sets completed at a time: the death of a node may leave thousands to be."""

NEWS_KEPT: Final = 16
"""Of each server; for whoever asks why a standby went."""

LOOK_S: Final = 0.02
"""How often it is looked whether something has come to be that nobody tells of."""
LOOK_LONG_S: Final = 0.25
"""The same, of what would be told as long as the server is here."""

WATCHES_MIN: Final = 1000
"""Servers of which something is remembered before those that are gone are looked for."""

REENTRANT: Final = (
    "is declared reentrant, and can have neither sync standbys nor a journal: what a nested call "
    "returns would wait for the state after the call around it, which waits for what it returns; "
    "use async standbys, or leave the option out"
)

MODES: Final[dict[str, Mode]] = {"sync": Mode.SYNC, "async": Mode.ASYNC}


def mode_name(mode: Mode) -> Literal["sync", "async"]:
    """A mode as people write it."""
    return "sync" if mode is Mode.SYNC else "async"


@dataclass(slots=True)
class Watch:
    """What is under way for one server.

    Attributes:
        asked: Whether somebody waits for a change of its standbys.
        working: The attempt to complete the set.
        again: Something happened during it.
        attempts: How many have failed in a row.
        later: When it is tried again.
        changed: Set whenever the core tells something.
        refused: When a node that failed to join may be asked again, by the monotonic clock.
        news: What happened last: node and why.
        fresh: The same, since the present attempt began.
    """

    asked: bool = False
    working: asyncio.Task[None] | None = None
    again: bool = False
    attempts: int = 0
    later: asyncio.TimerHandle | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    refused: dict[NodeId, float] = field(default_factory=dict)
    news: deque[tuple[NodeId, Changed, str]] = field(
        default_factory=lambda: deque(maxlen=NEWS_KEPT)
    )
    fresh: deque[tuple[NodeId, Changed, str]] = field(
        default_factory=lambda: deque(maxlen=NEWS_KEPT)
    )


class StandbyVerbs:
    """One node's part in who stands by for its servers; see the module."""

    def __init__(self, node: Node, elsewhere: type[MigrateError]) -> None:
        self._node = node
        self._elsewhere = elsewhere  # what tells `Peer._at_owner` to look again
        self._watches: dict[ServerId, Watch] = {}
        self._watches_max = WATCHES_MIN  # then those of servers that are gone are looked for
        self._waiting: dict[ServerId, None] = {}
        self._at_work = 0

    # ------------------------------------------------------------------ what the core tells

    def changed(self, server: ServerId, node: NodeId, what: Changed, cause: str) -> None:
        """Something happened to the standbys of a server that is, or was, here."""
        name, me = node_name(node), self._node.name
        journals = self._node._driver.streams.journals
        if journals is not None:
            journals.changed(server, node, what, cause)
        if node == JOURNAL:
            if what in (Changed.FAILED, Changed.LOST):
                log.error("server %s has no journal: %s", server, cause)
            if what in (Changed.JOINED, Changed.UNFIT):
                if what is Changed.JOINED:
                    self._watch(server).changed.set()
                return
        match what:
            case Changed.JOINED | Changed.LEFT:
                log.info("standby of server %s on node %s: %s", server, name, what.value)
            case Changed.PROMOTED:
                log.warning("server %s was taken over by node %s: %s", server, me, cause)
            case Changed.UNCAPTURED:
                log.error(
                    "server %s has no standbys any more, because its state cannot travel: %s",
                    server,
                    cause,
                )
            case Changed.UNFIT:
                log.error("node %s cannot take over server %s: %s", me, server, cause)
                return
            case _:
                log.warning(
                    "standby of server %s on node %s %s: %s", server, name, what.value, cause
                )
        watch = self._watch(server)
        watch.news.append((node, what, cause))
        watch.fresh.append((node, what, cause))
        watch.changed.set()
        if what is Changed.UNCAPTURED:
            self._later(server, watch, AGAIN_MAX_S)
        else:
            self.complete_soon(server)

    def _watch(self, server: ServerId) -> Watch:
        watch = self._watches.get(server)
        if watch is None:
            if len(self._watches) >= self._watches_max:
                for other in [s for s in self._watches if s not in self._node._driver.core.hosted]:
                    self._forget(other)
                self._watches_max = max(WATCHES_MIN, 2 * len(self._watches))
            watch = self._watches[server] = Watch()
        return watch

    def news(self, server: ServerId) -> list[tuple[str, str, str]]:
        """What happened last to the standbys of a server: node, what, why; the oldest first."""
        watch = self._watches.get(server)
        return [
            (node_name(node), what.value, cause)
            for node, what, cause in (watch.news if watch is not None else ())
        ]

    # ------------------------------------------------------------------ what there is

    def infos(self, inc: Incarnation) -> tuple[StandbyInfo, ...]:
        """The standbys of a server hosted here, and those that are about to be."""
        found = self._node._driver.core.standbys.standbys_of(inc.id)
        infos = [
            StandbyInfo(node_name(node), standing.value, lag)
            for node, standing, lag in found
            if node != JOURNAL
        ]
        return tuple(sorted(infos, key=lambda info: info.node))

    def _present(self, inc: Incarnation) -> dict[NodeId, Standing]:
        """Those that follow a server, and are not about to leave."""
        found = self._node._driver.core.standbys.standbys_of(inc.id)
        return {
            node: standing
            for node, standing, _ in found
            if node != JOURNAL and standing is not Standing.LEAVING
        }

    # ------------------------------------------------------------------ choosing

    def _candidates(self, avoid: set[NodeId]) -> list[Candidate]:
        node = self._node
        found = []
        for other in node._membership.nodes:
            if other == node._id or other in avoid or other in node._membership.suspected:
                continue
            candidate = node._meter.candidate(other)
            # One that nothing was heard of yet comes last; it can still refuse.
            found.append(candidate or Candidate(other, 1.0, 1.0, 0, 0, True))
        return found

    def _choose(self, inc: Incarnation, wanted: Wanted, *, settled: bool) -> list[NodeId]:
        """Which nodes are to stand by for a server, as things are."""
        node = self._node
        rows = node._membership.nodes
        me = node._membership.me
        watch = self._watch(inc.id)
        now_s = time.monotonic()
        avoid = {other for other, until_s in watch.refused.items() if until_s > now_s}
        leaving = {other for other in rows if node._meter.is_draining(other)}
        machine = me.boot.partition("/")[0]
        return placement.standbys(
            self._candidates(avoid),
            count=wanted.count or len(wanted.names),
            named=[row.id for row in rows.values() if row.name in wanted.names],
            present=list(self._present(inc)),
            near=[row.id for row in rows.values() if row.boot.partition("/")[0] == machine],
            leaving=leaving,
            settled=settled,
        )

    # ------------------------------------------------------------------ replicate

    async def replicate(
        self, server: ServerId, names: tuple[str, ...], count: int, mode: str
    ) -> None:
        """Change who stands by for a server hosted here, and wait until it is so.

        Raises:
            NodeNotFound: No node has one of the names.
            StandbyError: One could not join; the former ones stay.
        """
        node = self._node
        inc = await self._ready(server)
        watch = self._watch(server)
        if watch.asked:
            raise self._error(inc, "another change of its standbys is under way")
        watch.asked = True
        try:
            if watch.working is not None:
                # What it does is done here, by the new wish.
                watch.working.cancel()
                await asyncio.wait([watch.working])
            former = inc.wanted
            wanted = Wanted(count, names, MODES[mode], former.durable)
            if wanted.durable and (names or count) and wanted.mode is Mode.ASYNC:
                raise self._error(
                    inc, "it is durable, and an async standby would take it back behind its journal"
                )
            if inc.reentrant and (names or count) and wanted.mode is Mode.SYNC:
                raise self._error(inc, f"its class {REENTRANT}")
            targets = await self._targets(inc, wanted)
            before = self._present(inc)
            # First, so that whoever takes over from here on knows of it.
            self._wish(inc, wanted)
            try:
                await self._reach(inc, targets, wanted.mode)
            except BaseException:
                self._wish(inc, former)
                self._want(inc, [n for n in before if n in self._present(inc)], former.mode)
                raise
            self._said(inc)
        finally:
            watch.asked = False
            node._flush()
            self.complete_soon(server)

    async def make_durable(self, server: ServerId) -> None:
        """Give a server hosted here a journal, and wait until its row names it.

        Raises:
            StandbyError: It cannot have one.
        """
        node = self._node
        inc = node._owned(server)
        if node._driver.streams.journals is None:
            raise StandbyError(
                f"server {server} cannot have a journal: node {node.name} has no folder for them; "
                "give it one by Node(data=...) or `migrate node --data DIR`",
                server=server,
                node=node.name,
                outcome=Outcome.NOT_DONE,
            )
        watch = self._watch(server)
        watch.fresh.clear()
        self._wish(inc, msgspec.structs.replace(inc.wanted, durable=True))
        if not self._want(inc, list(self._present(inc)), inc.wanted.mode):
            raise self._elsewhere(f"server {server} has only just arrived", server=server)
        while not inc.row.journal:
            watch.changed.clear()
            for other, what, cause in watch.fresh:
                if what is Changed.UNCAPTURED or (other == JOURNAL and what is not Changed.LEFT):
                    raise StandbyError(
                        f"server {server} has no journal: {cause}",
                        server=server,
                        node=node.name,
                        cause=cause,
                        outcome=Outcome.NOT_DONE,
                    )
            await self._look_again(watch, LOOK_LONG_S)
            if node._driver.core.hosted.get(server) is not inc:
                raise self._elsewhere(f"server {server} is not here any more", server=server)

    async def back_again(self, server: ServerId) -> None:
        """Wait until what a server went back to in time is at its standbys, and in its journal.

        One that does not come back in time is given up, as after a failover.
        """
        watch = self._watch(server)
        while self._node._driver.core.standbys.is_waiting(server):
            watch.changed.clear()
            await self._look_again(watch, LOOK_S)

    @staticmethod
    async def _look_again(watch: Watch, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await watch.changed.wait()

    async def _ready(self, server: ServerId) -> Incarnation:
        """A server hosted here, when it neither moves nor has only just come."""
        node = self._node
        inc = node._owned(server)
        host: Hosted = inc.host  # type: ignore[assignment]
        if not host.spec.movable:
            raise self._error(inc, f"{host.spec.cls_name} is declared @server(movable=False)")
        if server in node._driver.core.leaving:
            await node._driver.move_ended(server)
            raise self._elsewhere(f"server {server} was about to move", server=server)
        if inc.phase is Phase.STOPPING:
            raise ServerNotFound(f"server {server} is being stopped", server=server)
        if inc.phase is Phase.FROZEN or inc.holding or inc.starting:
            raise self._elsewhere(f"server {server} has only just arrived", server=server)
        return inc

    async def _targets(self, inc: Incarnation, wanted: Wanted) -> list[NodeId]:
        """The nodes that a wish means now.

        Raises:
            NodeNotFound: One is not there.
            StandbyError: One cannot be; or there are not so many.
        """
        node = self._node
        if not wanted.names:
            with contextlib.suppress(DirectoryError):
                await node._membership._list()  # One may have joined an instant ago.
            chosen = self._choose(inc, wanted, settled=False)
            if len(chosen) < wanted.count:
                raise self._error(
                    inc,
                    f"{wanted.count} were asked for, and besides its owner {len(chosen)} nodes "
                    "take servers",
                )
            return chosen
        found = []
        for name in wanted.names:
            target = await node._node_named(name)
            if target == node._id:
                raise self._error(inc, f"node {name} owns it", name)
            candidate = node._meter.candidate(target)
            if candidate is not None and not candidate.admits and target not in self._present(inc):
                raise self._error(inc, f"node {name} is cordoned or draining", name)
            found.append(target)
        return found

    async def _reach(self, inc: Incarnation, targets: list[NodeId], mode: Mode) -> None:
        """Have these nodes stand by, and no others: first all join, then the others leave."""
        replica = inc.replica
        same_mode = replica is None or replica.mode is mode
        if same_mode:
            both = list(dict.fromkeys([*self._present(inc), *targets]))
            await self._until(inc, both, targets, mode)
        await self._until(inc, targets, targets, mode, exactly=True)

    def _wish(self, inc: Incarnation, wanted: Wanted) -> None:
        driver = self._node._driver
        inc.wanted = wanted
        driver.core.standbys.cut_soon(inc, driver.now_ms())

    def _want(self, inc: Incarnation, nodes: list[NodeId], mode: Mode) -> bool:
        driver = self._node._driver
        done = driver.core.standbys.replicate(
            inc.id,
            tuple(nodes),
            mode,
            driver.now_ms(),
            journal=inc.wanted.durable and driver.streams.journals is not None,
        )
        driver.flush()
        return done

    async def _until(
        self,
        inc: Incarnation,
        nodes: list[NodeId],
        needed: list[NodeId],
        mode: Mode,
        *,
        exactly: bool = False,
    ) -> None:
        """Ask for a set, and wait until those that are needed are in sync.

        Raises:
            StandbyError: One of them is not going to be.
        """
        node = self._node
        watch = self._watch(inc.id)
        watch.fresh.clear()
        if not self._want(inc, nodes, mode):
            raise self._elsewhere(f"server {inc.id} is not here any more", server=inc.id)
        limit_s = node._options.quiesce_timeout_s + node._options.move_step_timeout_s
        loop = asyncio.get_running_loop()
        until_s = loop.time() + limit_s
        while True:
            watch.changed.clear()
            if node._driver.core.hosted.get(inc.id) is not inc:
                raise self._elsewhere(f"server {inc.id} has moved meanwhile", server=inc.id)
            self._raise_failure(inc, watch, needed)
            present = self._present(inc)
            late = [n for n in needed if present.get(n) is not Standing.IN_SYNC]
            if not late and (not exactly or set(inc.row.standbys) == set(needed)):
                return
            # Nothing is told when one that was lost is out of the row, nor when one of the former
            # owner's has come up to this one.
            untold = not late or any(present.get(n) is Standing.RESYNCING for n in late)
            try:
                wait_s = LOOK_S if untold else LOOK_LONG_S
                async with asyncio.timeout_at(min(loop.time() + wait_s, until_s)):
                    await watch.changed.wait()
                until_s = loop.time() + limit_s
            except TimeoutError as error:
                if loop.time() < until_s:
                    continue
                names = ", ".join(map(node_name, late)) or "the directory"
                raise self._error(
                    inc, f"{names} was not ready within {limit_s:g} s", names
                ) from error

    def _raise_failure(self, inc: Incarnation, watch: Watch, needed: list[NodeId]) -> None:
        for other, what, cause in watch.fresh:
            if what is Changed.UNCAPTURED:
                raise self._error(inc, f"its state cannot travel: {cause}")
            if other in needed and what in (Changed.FAILED, Changed.LOST):
                name = node_name(other)
                raise self._error(inc, f"node {name} does not stand by: {cause}", name, cause)

    def _error(
        self, inc: Incarnation, why: str, node: str | None = None, cause: str | None = None
    ) -> StandbyError:
        now = ", ".join(sorted(map(node_name, inc.row.standbys))) or "none"
        return StandbyError(
            f"the standbys of server {inc.id} were not changed: {why}; it has: {now}",
            server=inc.id,
            node=node or self._node.name,
            cause=cause or why,
            outcome=Outcome.NOT_DONE,
        )

    def _said(self, inc: Incarnation) -> None:
        watch = self._watch(inc.id)
        watch.attempts = 0
        watch.refused.clear()

    # ------------------------------------------------------------------ completing

    def complete_soon(self, server: ServerId) -> None:
        """See to it that a server has the standbys that it is to have."""
        inc = self._node._driver.core.hosted.get(server)
        if inc is None:
            self._forget(server)
            return
        wanted = inc.wanted
        durable = wanted.durable and self._node._driver.streams.journals is not None
        if not (wanted.count or wanted.names or durable) or self._node._draining:
            return
        watch = self._watch(server)
        if watch.later is not None:
            watch.later.cancel()
            watch.later = None
        if watch.working is not None or watch.asked:
            watch.again = True
            watch.changed.set()  # What it waits for may have gone and come back.
            return
        self._waiting[server] = None
        self._work()

    def nodes_changed(self) -> None:
        """A node has joined, or takes servers again."""
        for server, watch in list(self._watches.items()):
            if watch.later is not None:
                watch.attempts = 0
                watch.refused.clear()
                self.complete_soon(server)

    def node_leaves(self, node: NodeId) -> None:
        """A node is being emptied: what stands by there is to stand by elsewhere."""
        for inc in list(self._node._driver.core.hosted.values()):
            if node in inc.row.standbys:
                self.complete_soon(inc.id)

    def _forget(self, server: ServerId) -> None:
        watch = self._watches.get(server)
        if watch is not None and not watch.asked and watch.working is None:
            if watch.later is not None:
                watch.later.cancel()
            del self._watches[server]

    def _work(self) -> None:
        while self._waiting and self._at_work < COMPLETING_MAX:
            server = next(iter(self._waiting))
            del self._waiting[server]
            watch = self._watch(server)
            if watch.working is None and not watch.asked:
                self._at_work += 1
                watch.again = False
                watch.working = self._node._driver.task(
                    self._complete(server, watch), f"standbys of {server}"
                )

    async def _complete(self, server: ServerId, watch: Watch) -> None:
        complete = True
        try:
            complete = await self._completed(server)
        except StandbyError as error:
            log.info("%s", error)
            complete = False
            for other, what, _ in watch.fresh:
                if what in (Changed.FAILED, Changed.LOST):
                    watch.refused[other] = time.monotonic() + self._again_s(watch) * 2
        except MigrateError as error:
            log.debug("the standbys of %s: %s", server, error)
        finally:
            self._at_work -= 1
            watch.working = None
            if complete:
                watch.attempts = 0
            else:
                watch.attempts += 1
                self._later(server, watch, self._again_s(watch))
            if watch.again:
                self.complete_soon(server)
            self._work()

    def _later(self, server: ServerId, watch: Watch, wait_s: float) -> None:
        if watch.later is not None:
            watch.later.cancel()
        driver = self._node._driver
        watch.later = driver.loop.call_later(
            wait_s, self.complete_soon, server, context=driver.context
        )

    @staticmethod
    def _again_s(watch: Watch) -> float:
        wait_s: float = AGAIN_FIRST_S * 2 ** min(watch.attempts, 16)
        return min(AGAIN_MAX_S, wait_s)

    async def _completed(self, server: ServerId) -> bool:
        """Bring the set nearer to the wish; whether it is complete."""
        inc = self._node._driver.core.hosted.get(server)
        core = self._node._driver.core
        if inc is None:
            return True
        if server in core.leaving or inc.holding or inc.phase is not Phase.RUNNING:
            return False
        wanted = inc.wanted
        chosen = self._choose(inc, wanted, settled=True)
        if set(inc.row.standbys) != set(chosen) or set(self._present(inc)) != set(chosen):
            await self._reach(inc, chosen, wanted.mode)
        if wanted.durable and self._node._driver.streams.journals is not None:
            found = {n: standing for n, standing, _ in core.standbys.standbys_of(server)}
            if found.get(JOURNAL) is Standing.LEAVING:
                return False  # When it is out of the row, another one can come.
            if not inc.row.journal:
                await self.make_durable(server)
        return len(chosen) >= (wanted.count or len(wanted.names)) and not self._is_one_away(
            wanted, chosen
        )

    def _is_one_away(self, wanted: Wanted, chosen: list[NodeId]) -> bool:
        """Whether another node stands in for one that was named."""
        names = {node_name(other) for other in chosen}
        return any(name not in names and name != self._node.name for name in wanted.names)
