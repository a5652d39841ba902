"""What a node does for `checkpoint`, `restore` and `fork`.

The owner takes a checkpoint, at a quiescent point of its own server. A server whose row is gone or
LOST is restored by any node: it makes the object, and then takes the row by a swap, so that of two
who try one wins and the other's object is forgotten. One that lives is replaced by its owner alone,
which makes the object first, then waits for a quiescent point, and swaps its own row; so there
is no instant at which two copies act, and a failure before the swap leaves the original serving.

Whatever may fail (reading, verifying, importing, unpickling) comes before the swap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

from migrate.core import directory as rules
from migrate.core.delivery import Entry
from migrate.core.directory import Row, RowState
from migrate.core.events import SwapOutcome
from migrate.core.ids import NodeId, ServerId, node_name
from migrate.core.incarnation import Incarnation, Phase, Plan
from migrate.core.messages import Moved
from migrate.core.records import CheckpointRecord
from migrate.errors import (
    CallTimeout,
    CheckpointError,
    MigrateError,
    NodeNotFound,
    Outcome,
    ServerNotFound,
)
from migrate.ref import RefObject
from migrate.reports import CheckpointInfo
from migrate.server import ServerSpec
from migrate.shell import checkpoints, classes, wire
from migrate.shell.checkpoints import Captured, Facts, Loaded
from migrate.shell.directories.base import Compare, DirectoryError, OutcomeUnknown, Put
from migrate.shell.driver import NAME_KEY, SERVER_KEY
from migrate.shell.host import Hosted
from migrate.shell.precopy import STEP_S
from serializers.stream import Piece, StreamWriter, is_small

if TYPE_CHECKING:
    from migrate.node import Node

log: Final = logging.getLogger("migrate")

RETRY_S: Final = 0.1

BURIAL_S: Final = 10.0
"""How long a server is waited for whose owner is gone, until its row says so."""

SILENT_S: Final = 3.0
"""How long an owner is asked whether it serves, before its silence counts as yes."""

SMALL_CAPTURE_BYTES: Final = 64 << 10
"""States known to be smaller are captured on the loop: that takes less than handing them to a
thread and back costs. Source: pickling runs at about 67 MiB/s here."""

LONG_STEP_S: Final = 0.02
"""How long a step may hold the loop at most, of a server that takes as long to come to rest."""

ROUNDS: Final = 2
"""Times that a large state is gone through before the last piece of its capture."""

WHOLE_ITEMS_MAX: Final = 2_000
"""Items of large containers that are pickled as a whole, twice if something else of the state can
be written ahead; of more only the second time. Source: measured, about a microsecond for each."""

FORK_BYTES_MAX: Final = 1 << 30
"""A clone for another node leaves in one message, of which the link takes 2 GiB."""


class CheckpointVerbs:
    """One node's part in checkpoints, restores and forks; see the module."""

    def __init__(self, node: Node, elsewhere: type[MigrateError]) -> None:
        self._node = node
        self._elsewhere = elsewhere  # what tells `Peer._at_owner` to look again
        self._taking: set[tuple[ServerId, str]] = set()

    # ------------------------------------------------------------------ taking

    async def checkpoint(
        self,
        server: ServerId,
        url: str,
        every_s: float | None,
        keep: int,
        key: bytes | None,
    ) -> CheckpointInfo:
        """Take a checkpoint of a server hosted here; begin or end taking them again and again."""
        node = self._node
        core = node._driver.core
        signing = checkpoints.signing_key(node._secret, key)
        captured = await self._capture(server)
        versions = keep if every_s else None
        info = await asyncio.to_thread(checkpoints.save, url, captured, signing, versions)
        if every_s is not None:
            every_ms = max(1, int(every_s * 1000)) if every_s else 0
            if not core.plan(server, url, every_ms, keep, node._driver.now_ms()):
                raise self._elsewhere(f"server {server} has moved", server=server)
        return info

    async def planned(self, inc: Incarnation, plan: Plan) -> None:
        """Take one of the checkpoints that are taken again and again; the log tells of failures."""
        this = (inc.id, plan.url)
        if this in self._taking:
            log.warning("a checkpoint of %s takes longer than it is asked for", inc.id)
            return
        self._taking.add(this)
        node = self._node
        try:
            await node._at_owner(_ref(node, inc), "planned", plan.url, plan.keep)
        except ServerNotFound as error:
            log.debug("no further checkpoint of server %s: %s", inc.id, error)
        except MigrateError as error:
            log.error("the checkpoint of server %s to %s failed: %s", inc.id, plan.url, error)
        finally:
            self._taking.discard(this)

    async def take_planned(self, server: ServerId, url: str, keep: int) -> CheckpointInfo:
        """See `planned`; at the owner."""
        signing = checkpoints.signing_key(self._node._secret, None)
        captured = await self._capture(server)
        return await asyncio.to_thread(checkpoints.save, url, captured, signing, keep)

    async def _capture(self, server: ServerId) -> Captured:
        driver = self._node._driver
        inc = self._node._owned(server)
        host: Hosted = inc.host  # type: ignore[assignment]
        least = driver.options.precopy_bytes_min
        if 0 <= host.state_bytes < least or is_small(host.obj):
            return await self._capture_at_once(server)
        writer = StreamWriter(host.obj, apart=True)
        try:
            ahead = await self._write_ahead(server, host, writer)
            if not ahead:
                return await self._capture_at_once(server)
            async with self._quiet(server) as (inc, _):
                if inc.host is not host:
                    raise self._elsewhere(f"server {server} has been replaced", server=server)
                facts, record = self._facts(inc)
                work = asyncio.to_thread(checkpoints.capture_rest, writer, ahead, facts, record)
                captured: Captured = await _to_its_end(work)
                host.state_bytes = captured.state_bytes
                return captured
        finally:
            # In a thread: what it has noted of a large state takes a while to be let go of.
            await _to_its_end(asyncio.to_thread(writer.close))

    async def _write_ahead(
        self, server: ServerId, host: Hosted, writer: StreamWriter
    ) -> list[list[Piece]]:
        """Write a large state in slices while its server serves.

        Returns:
            Its chunks; none if nothing of it can be written ahead.
        """
        driver = self._node._driver
        chunk_bytes = driver.options.chunk_bytes
        async with self._quiet(server):
            look = asyncio.to_thread(writer.look, WHOLE_ITEMS_MAX)
            chunks: list[list[Piece]] = [await _to_its_end(look)]
        if not writer.is_worth_it:
            return []
        # The second round, short as it is, leaves the less to be written at the end.
        while writer.rounds < ROUNDS:
            inc = self._node._owned(server)
            if inc.phase is Phase.RUNNING and inc.quiet() and inc.host is host:
                pieces, _ = writer.step(STEP_S, chunk_bytes)
            else:
                since = driver.loop.time()
                async with self._quiet(server) as (inc, _):
                    if inc.host is not host:
                        raise self._elsewhere(f"server {server} has been replaced", server=server)
                    # Where handlers take long there are few such points, so each is used for more.
                    waited_s = driver.loop.time() - since
                    step_s = min(max(STEP_S, waited_s), LONG_STEP_S)
                    pieces, _ = writer.step(step_s, chunk_bytes)
            if sum(map(len, chunks[-1])) > chunk_bytes:
                chunks.append([])
            chunks[-1] += pieces
            await asyncio.sleep(0)
        return chunks

    async def _capture_at_once(self, server: ServerId) -> Captured:
        async with self._quiet(server) as (inc, _):
            host: Hosted = inc.host  # type: ignore[assignment]
            facts, record = self._facts(inc)
            if 0 <= host.state_bytes < SMALL_CAPTURE_BYTES:
                captured = checkpoints.capture(host.obj, facts, record)
            else:
                work = asyncio.to_thread(checkpoints.capture, host.obj, facts, record)
                captured = await _to_its_end(work)
            host.state_bytes = captured.state_bytes
        return captured

    def _facts(self, inc: Incarnation) -> tuple[Facts, CheckpointRecord]:
        """What is known of a server at a quiescent point besides its object."""
        driver = self._node._driver
        host: Hosted = inc.host  # type: ignore[assignment]
        record = driver.core.checkpoint(inc, driver.now_ms())
        return checkpoints.facts_of(inc.row, self._node._name, host.by_value, record), record

    @contextlib.asynccontextmanager
    async def _quiet(self, server: ServerId) -> AsyncIterator[tuple[Incarnation, Entry]]:
        """Keep a server at a quiescent point."""
        node = self._node
        driver = node._driver
        core = driver.core
        inc = node._owned(server)
        if server in core.leaving:
            await driver.move_ended(server)
            raise self._elsewhere(f"server {server} has moved", server=server)
        if inc.phase is Phase.STOPPING:
            raise ServerNotFound(f"server {server} is being stopped", server=server)
        waiting = driver.loop.create_future()
        if not core.quiesce(server, waiting, driver.now_ms()):
            raise self._elsewhere(f"server {server} has only just arrived", server=server)
        driver.flush()
        limit_s = node._options.quiesce_timeout_s
        try:
            await asyncio.wait([waiting], timeout=limit_s)
        except BaseException:
            if waiting.done() and waiting.result() is not None:
                driver.go_on(*waiting.result())
            raise
        finally:
            if not waiting.done():
                core.do_not_quiesce(server, waiting)
                waiting.cancel()
                driver.go_on_handing_out(server)
        if waiting.cancelled():
            raise CheckpointError(
                f"server {server} handled one message, or a task that one had started, for more "
                f"than {limit_s:g} s; it serves on, and nothing was done",
                flaw="busy",
                server=server,
                node=node._name,
            )
        found = waiting.result()
        if found is None:
            raise self._elsewhere(f"server {server} is not here any more", server=server)
        inc, entry = found
        try:
            if core.hosted.get(server) is not inc:
                # Another node has taken it over since: its mailbox is emptied already.
                raise self._elsewhere(f"server {server} is not here any more", server=server)
            yield inc, entry
        finally:
            driver.go_on(inc, entry)

    # ------------------------------------------------------------------ forking

    async def fork(self, server: ServerId, request: str, target: NodeId | None) -> Any:
        """Clone a server hosted here, on this node or another."""
        node = self._node
        if target in (None, node._id):
            node._check_admits()
        captured = await self._capture(server)
        key = checkpoints.signing_key(node._secret, None)

        def sealed() -> bytearray:
            return bytearray(b"".join(checkpoints.seal(captured, key)))

        data = await asyncio.to_thread(sealed)
        if target in (None, node._id):
            return await self.adopt(request, data)
        if len(data) > FORK_BYTES_MAX:
            raise CheckpointError(
                f"the clone of server {server} would take {len(data)} bytes; up to "
                f"{FORK_BYTES_MAX} can be sent to another node: fork it here, then migrate it",
                flaw="too large",
                server=server,
            )
        assert target is not None
        return await node._asks.ask(target, "adopt", request, bytes(data))

    async def adopt(self, request: str, data: bytes | bytearray) -> Any:
        """Take in a clone."""
        node = self._node
        node._check_admits()
        key = checkpoints.signing_key(node._secret, None)
        loaded = await asyncio.to_thread(checkpoints.opened, "(fork)", bytearray(data), key)
        return await self._clone(request, loaded, None)

    async def _clone(self, request: str, loaded: Loaded, name: str | None) -> Any:
        """Host a checkpoint's state under a new identity."""
        node = self._node
        if name is not None:
            await node._check_name_free(name)
        obj, spec = await self._built(loaded)
        node._check_admits()
        node._check_has_journals(spec, spec.durable)
        row = Row(
            server=f"{classes.slug(spec.cls.__name__)}-{secrets.token_hex(8)}",
            epoch=1,
            owner=node._id,
            state=RowState.ACTIVE,
            transfer=request,
            name=name or "",
            cls=spec.cls_name,
            version=spec.version,
            methods=tuple(spec.methods),
        )
        rev = await node._write_row(row)
        ref = self._host(loaded, obj, spec, row, rev, fork=True)
        await node._standbys.back_again(row.server)
        return ref

    # ------------------------------------------------------------------ restoring

    async def restore(
        self,
        request: str,
        url: str,
        chosen: bool,
        name: str | None,
        replace: bool,
        fork: bool,
        key: bytes | None,
    ) -> Any:
        """Restore a checkpoint here; `chosen`: the user named this node."""
        node = self._node
        signing = checkpoints.signing_key(node._secret, key)
        loaded = await asyncio.to_thread(
            checkpoints.load, url, signing, node._options.state_bytes_max
        )
        if fork:
            node._check_admits()
            return await self._clone(request, loaded, name)
        server = loaded.facts.server
        row, rev, rev_max = await self._row(server)
        if row is not None and row.state is not RowState.LOST:
            if not replace:
                raise CheckpointError(
                    f"server {server} lives, on node {node_name(row.owner)}: to give it the "
                    "checkpoint's state use replace=True, to have another server beside it "
                    "fork=True; nothing was restored",
                    url=loaded.url,
                    flaw="alive",
                    server=server,
                    node=node_name(row.owner),
                )
            ref = node._ref(row)
            replaced = await node._at_owner(ref, "replace", request, loaded.url, key)
            if chosen and (await node._read(server)).owner != node._id:
                await node._at_owner(ref, "move", node._id)
            return replaced
        node._check_admits()
        obj, spec = await self._built(loaded)
        # Again: a drain may have begun meanwhile.
        node._check_admits()
        node._check_has_journals(spec, spec.durable)
        new = rules.restored(
            known=row,
            rev_max=rev_max,
            checkpoint=loaded.facts.row(spec.cls_name),
            owner=node._id,
            transfer=request,
            name=loaded.facts.name if name is None else name,
            version=spec.version,
            methods=tuple(spec.methods),
            then_s=loaded.facts.taken_s,
            now_s=time.time(),
            cause=checkpoints.cause_of(loaded),
        )
        rev = await self._take_row(new, rev, loaded)
        ref = self._host(loaded, obj, spec, new, rev)
        await node._standbys.back_again(server)
        return ref

    async def _row(self, server: ServerId) -> tuple[Row | None, int, int]:
        """A server's row, its revision, and that of the directory; after a burial that is due."""
        node = self._node
        until = time.monotonic() + BURIAL_S
        while True:
            try:
                entries, rev_max = await node._directory.list(SERVER_KEY + server)
            except DirectoryError as error:
                raise _unreadable(error) from error
            entry = next((e for e in entries if e.key == SERVER_KEY + server), None)
            if entry is None:
                return None, 0, rev_max
            row = wire.decode_row(entry.value)
            if row.state is RowState.LOST or time.monotonic() > until:
                return row, entry.rev, rev_max
            if await self._is_served(row):
                return row, entry.rev, rev_max
            # Its owner died an instant ago, or gave it away.
            await asyncio.sleep(RETRY_S / 4)

    async def _is_served(self, row: Row) -> bool:
        """Whether the owner in a row says so, or says nothing; not if it is dead or denies it."""
        node = self._node
        if row.owner == node._id:
            return row.server in node._driver.core.hosted
        if row.owner not in node._membership.nodes:
            return False
        try:
            await node._asks.ask(row.owner, "info", row.server, timeout_s=SILENT_S)
        except CallTimeout:
            return True  # silent, perhaps paused: that is not dead
        except (self._elsewhere, NodeNotFound):
            return False
        return True

    async def _take_row(self, row: Row, rev: int, loaded: Loaded) -> int:
        """Write the row of a restored server over one that is LOST or gone; its revision."""
        node = self._node
        key = SERVER_KEY + row.server
        compares = [Compare(key, rev)]
        puts = [Put(key, wire.encode_row(row))]
        if row.name:
            compares.append(Compare(NAME_KEY + row.name, 0))
            puts.append(Put(NAME_KEY + row.name, row.server.encode()))
        doubtful = False
        while True:
            try:
                txn = await node._directory.txn(compares, puts, [])
            except OutcomeUnknown:
                # The same again: at most one of the copies can take effect.
                doubtful = True
            except DirectoryError as error:
                if not doubtful:
                    raise _unreadable(error) from error
            else:
                if txn.ok:
                    return txn.rev
                entry = txn.entries.get(key)
                if entry is not None and wire.decode_row(entry.value).transfer == row.transfer:
                    return entry.rev
                if (entry.rev if entry is not None else 0) != rev:
                    raise CheckpointError(
                        f"server {row.server} was restored by somebody else meanwhile, or its row "
                        "was changed; nothing was done here",
                        url=loaded.url,
                        flaw="taken",
                        server=row.server,
                    )
                await node._check_name_free(row.name)
                # The name was freed meanwhile.
            await asyncio.sleep(RETRY_S)

    async def replace(self, server: ServerId, request: str, url: str, key: bytes | None) -> Any:
        """Give a server hosted here, and living, the state of a checkpoint."""
        node = self._node
        node._owned(server)
        signing = checkpoints.signing_key(node._secret, key)
        loaded = await asyncio.to_thread(
            checkpoints.load, url, signing, node._options.state_bytes_max
        )
        if loaded.facts.server != server:
            raise CheckpointError(
                f"{url} is a checkpoint of {loaded.facts.server} by now, not of {server}",
                url=url,
                flaw="taken",
                server=server,
            )
        obj, spec = await self._built(loaded)
        async with self._quiet(server) as (inc, _):

            def instead(row: Row) -> Row:
                return rules.restored(
                    known=row,
                    rev_max=0,
                    checkpoint=loaded.facts.row(spec.cls_name),
                    owner=node._id,
                    transfer=request,
                    name=row.name,
                    version=spec.version,
                    methods=tuple(spec.methods),
                    then_s=loaded.facts.taken_s,
                    now_s=time.time(),
                    cause=checkpoints.cause_of(loaded),
                )

            replacing = self._replace_now(inc, instead, url, loaded, obj, spec)
            ref = await _to_its_end(replacing)
        # Whoever is told that it was restored is told what a death of this node does not undo.
        await node._standbys.back_again(server)
        return ref

    async def _replace_now(
        self,
        inc: Incarnation,
        instead: Callable[[Row], Row],
        url: str,
        loaded: Loaded,
        obj: Any,
        spec: ServerSpec,
    ) -> RefObject:
        """Swap the row of a server that stands still, and host the other in its place."""
        node = self._node
        driver = node._driver
        core = driver.core
        phase = core.begin_replacing(inc, driver.now_ms())
        driver.flush()
        try:
            new, rev = await self._swap_own(inc, instead, url)
        except BaseException:
            core.end_replacing(inc, phase, driver.now_ms())
            raise
        ref = self._host(loaded, obj, spec, new, rev)
        # Its standbys come back by themselves; others may have to take the place of some.
        node._standbys.complete_soon(inc.id)
        if inc.id in node._stops:
            # It was asked to stop meanwhile, and is to.
            core.stop(inc.id, driver.now_ms())
        return ref

    async def _swap_own(
        self, inc: Incarnation, instead: Callable[[Row], Row], url: str
    ) -> tuple[Row, int]:
        """Swap this node's own row; returns only when it is known what became of it.

        Returns:
            The row and its revision.
        """
        driver = self._node._driver
        rev, new = inc.rev, instead(inc.row)
        doubtful = False
        while True:
            result = await driver.rows.swap(new, rev)
            now = result.row
            if result.outcome is SwapOutcome.DONE:
                return new, result.rev
            if result.outcome is SwapOutcome.REFUSED:
                if now is not None and now.transfer == new.transfer:
                    return now, result.rev
                is_here = driver.core.hosted.get(inc.id) is inc
                if is_here and now is not None and now.owner == inc.row.owner:
                    # A swap of this owner's own came first: the confirmation of the move that
                    # brought it here, or one for its standbys. NB: that may have raised the epoch.
                    rev, new, doubtful = result.rev, instead(now), False
                    continue
                raise CheckpointError(
                    f"server {inc.id} has another owner by now; nothing was restored",
                    url=url,
                    flaw="taken",
                    server=inc.id,
                )
            if result.outcome is SwapOutcome.NOT_DONE and not doubtful:
                raise MigrateError(
                    f"the directory does not answer: {result.cause}; nothing was restored",
                    server=inc.id,
                    cause=result.cause,
                    outcome=Outcome.NOT_DONE,
                )
            doubtful = doubtful or result.outcome is SwapOutcome.UNKNOWN
            await asyncio.sleep(RETRY_S)

    async def _built(self, loaded: Loaded) -> tuple[Any, ServerSpec]:
        return await asyncio.to_thread(checkpoints.build, loaded, self._node._driver)

    def _host(
        self,
        loaded: Loaded,
        obj: Any,
        spec: ServerSpec,
        row: Row,
        rev: int,
        *,
        fork: bool = False,
    ) -> RefObject:
        """Let a server begin to serve whose row is written."""
        node = self._node
        driver = node._driver
        ref = RefObject(row.server, spec.class_info, driver, node._id, row.epoch)
        host = Hosted(obj, spec, ref, driver)
        host.by_value = loaded.facts.by_value
        host.state_bytes = loaded.state_bytes
        inc = driver.core.restored(
            row,
            rev,
            spec.mailbox,
            spec.reentrant,
            host,
            loaded.record,
            driver.now_ms(),
            fork=fork,
            durable=spec.durable,
        )
        driver.begin_serving(inc, "on_arrive")
        if not fork:
            log.warning("server %s was %s, on node %s", row.server, row.cause, node._name)
            for other in node._membership.nodes:
                # Those that remember it as stopped, or elsewhere, pass on what comes late.
                if other != node._id:
                    node._peers.send(other, Moved(row.server, node._id, row.epoch))
        node._flush()
        return ref


async def _to_its_end(work: Any) -> Any:
    """Await what must not be left half done: a cancellation is taken after it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _ref(node: Node, inc: Incarnation) -> Any:
    return node._ref(inc.row)


def _unreadable(error: DirectoryError) -> MigrateError:
    return MigrateError(
        f"the directory does not answer: {error}", cause=str(error), outcome=Outcome.NOT_DONE
    )


__all__ = ["CheckpointVerbs"]
