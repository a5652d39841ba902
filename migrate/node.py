"""Node: one event loop's worth of servers. Wires everything; one method per verb."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from migrate.core.directory import Row, RowState
from migrate.core.events import SwapOutcome, SwapResult
from migrate.core.ids import NodeId, ServerId, node_name
from migrate.core.incarnation import Incarnation, Phase
from migrate.core.messages import ClockTold, Load
from migrate.core.placement import least_loaded
from migrate.errors import (
    Fenced,
    MigrateError,
    MoveError,
    NameTaken,
    NodeNotFound,
    Outcome,
    ServerNotFound,
    TargetRefused,
    UsageError,
)
from migrate.options import NodeOptions
from migrate.peer import Elsewhere, Peer
from migrate.ref import RefObject
from migrate.reports import LinkInfo, MoveReport, NodeInfo, ServerInfo
from migrate.server import ServerSpec, spec_of
from migrate.shell import classes, wire
from migrate.shell.bell import Posts
from migrate.shell.checkpoint_verbs import CheckpointVerbs
from migrate.shell.directories import open_directory
from migrate.shell.directories.base import (
    Compacted,
    Compare,
    Directory,
    DirectoryError,
    OutcomeUnknown,
    Put,
)
from migrate.shell.driver import NAME_KEY, SERVER_KEY, DirectoryRows
from migrate.shell.gateway import Gateway
from migrate.shell.host import Hosted, open_methods
from migrate.shell.journal import signing_key
from migrate.shell.journal_places import FolderPlace, Place, StorePlace, try_out
from migrate.shell.journals import NodeJournals
from migrate.shell.load import INTERVAL_S, Meter
from migrate.shell.membership import Membership, NodeRow, describe
from migrate.shell.standby_verbs import REENTRANT, StandbyVerbs, mode_name
from migrate.shell.stores import open_folder
from rpc.errors import RpcError
from rpc.grpc_channel import split_address
from rpc.handshake import PeerInfo

if TYPE_CHECKING:
    import grpc.aio

log: Final = logging.getLogger("migrate")

WATCH_S: Final = 20.0
"""How long an ask for changes waits before it is answered with none."""

RETRY_S: Final = 0.1

CLOCK_S: Final = 2.0
"""How long a node that has joined waits for a node of another host to tell the shared time. A link
takes some milliseconds; where none comes up there is nobody to be called either."""

CLOCK_TOLD_S: Final = 60.0
"""How often the shared time is told again, against drift."""


class Node(Peer):
    """One event loop's worth of servers; use it as an async context manager.

    Args:
        name: Unique among living nodes; None makes one up.
        listen: host:port for links; port 0 for any. Loopback only without TLS.
        directory: Who owns what: `etcd://host:port,.../prefix` shared by the nodes of many hosts,
            `sqlite:///path` by those of one, `memory://NAME` by those of a process; None: one of
            its own.
        options: Tunables and limits.
        secret_file: The cluster secret; None: the user's own, made if it is not there.
        spawnable: Classes that may be spawned from outside, through the public gRPC API: as
            such, or as "module:Class". Its own callers and other nodes may spawn any.
        token_file: The token of the public gRPC API; None: beside the cluster secret, made if
            it is not there.
        tls: Folder with certificates, as `migrate certs init` makes it; all connections over TCP
            then use them, in both directions, and new files there from the next handshake on.
            None: what LIVEMIGRATE_TLS_DIR names; or, when it listens beyond loopback, `tls`
            beside the cluster secret.
        advertise: host:port under which others reach it, where that is not the address it listens
            on; port 0 stands for the one it listens on.
        data: Where the journals of durable servers are kept. A path: a folder of this node's own,
            made if it is not there; what has a journal in it comes back when the node opens. A URL,
            such as `s3://bucket/folder`, `file:///folder` or `memory://NAME`: a store that all
            nodes share which are given it; what has a journal in it comes back at one of them, as
            soon as its owner is gone. None: it keeps none.

    Closing it stops the servers that it still owns (`on_stop` runs), but for those that have a
    standby, which go on there, and those that have a journal, which come back with it; drain it
    first to keep them all. Leaving the context waits for
    that.
    """

    def __init__(
        self,
        name: str | None = None,
        listen: str = "127.0.0.1:0",
        directory: str | os.PathLike[str] | Directory | None = None,
        *,
        options: NodeOptions | None = None,
        secret_file: str | os.PathLike[str] | None = None,
        spawnable: Sequence[str | type] = (),
        token_file: str | os.PathLike[str] | None = None,
        tls: str | os.PathLike[str] | None = None,
        advertise: str | None = None,
        data: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__("node", name, options, secret_file, tls)
        self._data = None if data is None else os.fspath(data)
        self._store = None
        if self._data is not None and "://" in self._data:
            self._store = open_folder(self._data)
        elif self._data is not None:
            self._data = os.path.abspath(self._data)
        self._gateway = Gateway(self, spawnable, token_file, self._secret_file)
        try:
            self._directory = open_directory(directory)
        except ValueError as error:
            raise UsageError(str(error), cause=str(error)) from error
        if advertise is not None:
            try:
                split_address(advertise)
            except ValueError as error:
                raise UsageError(f"advertise: {error}", cause=str(error)) from error
        self._own_directory = not isinstance(directory, Directory)
        self._listen = listen
        self._advertise = advertise or ""
        self._address = ""
        self._membership: Membership
        self._meter = Meter()
        self._cordoned = False
        self._draining = False
        self._fence: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()
        self._clock_heard = asyncio.Event()
        self._stops: dict[ServerId, asyncio.Future[None]] = {}
        self._checkpoints = CheckpointVerbs(self, Elsewhere)
        self._standbys = StandbyVerbs(self, Elsewhere)
        self._services: list[Callable[[grpc.aio.Server], None]] = [self._gateway.add_to]

    # ------------------------------------------------------------------ life

    @property
    def address(self) -> str:
        """host:port of its links, once it is open."""
        return self._address

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

    async def start(self) -> None:
        """Open the node and join the cluster.

        Raises:
            UsageError: A living node has the name, or the address cannot be listened on.
            AuthError: The cluster secret or the token of the public API cannot be read.
            MigrateError: The directory cannot be opened, or failed while the node joined.
        """
        self._check_new()
        self._gateway.load_token()
        if self._store is not None:
            await try_out(*self._store, str(self._data), self._name)
        try:
            await self._directory.start()
        except DirectoryError as error:
            raise MigrateError(
                f"the directory cannot be opened: {error}",
                node=self._name,
                cause=str(error),
                outcome=Outcome.NOT_DONE,
            ) from error
        me = PeerInfo(self._id, self._name, "node", "", os.getpid(), features=wire.FEATURES)
        links = self._open(DirectoryRows(self._directory), me, self._link_options(), self._listen)
        self._driver.on_stopped(self._finish_stop)
        self._driver.on_checkpoint_due(self._checkpoints.planned)
        self._driver.on_standbys_changed(self._standbys.changed)
        self._driver.on_arrived(self._standbys.complete_soon)
        try:
            self._address = await links.listen(self._listen, self._services, self._advertise)
            if split_address(self._address)[0] in ("0.0.0.0", "::"):
                raise UsageError(
                    f"a node that listens on {self._listen} must be told under which address "
                    "others reach it: give advertise (--advertise HOST:PORT)",
                    node=self._name,
                )
            row = describe(self._id, self._name, self._address)
            self._membership = Membership(
                self._directory,
                row,
                self,
                self._options.lease_s,
                self._driver.task,
                self._options.promote_patience_s,
            )
            await self._membership.join()
            await self._hear_clock()
            await self._open_journals()
        except BaseException as error:
            self._stop_journals()
            await self._close()
            if self._own_directory:
                await self._directory.close()
            if isinstance(error, RpcError):
                raise UsageError(str(error), node=self._name, cause=str(error)) from error
            if isinstance(error, DirectoryError):
                raise _unreadable(error) from error
            raise
        self._driver.host.open()
        self._driver.task(self._measure(), "load")
        self._gateway.open()

    async def _open_journals(self) -> None:
        """Bring back the servers whose journals are where this node keeps them."""
        if self._data is None:
            return
        driver = self._driver
        key = signing_key(self._secret)
        bytes_max = 4 * self._options.state_bytes_max + (1 << 30)
        place: Place
        if self._store is not None:
            place = StorePlace(
                *self._store, key, self._id, driver.rows, self._membership, bytes_max
            )
        else:
            folder = self._data
            posts = Posts(driver.loop, driver.context)
            leftover = driver.core.standbys.leftover
            try:
                place = await asyncio.to_thread(
                    FolderPlace, folder, key, posts, driver._soon, driver.rows, leftover, bytes_max
                )
            except OSError as error:
                posts.close()
                raise UsageError(
                    f"the folder {folder} for journals cannot be had: {error.strerror or error}",
                    node=self._name,
                    cause=str(error),
                ) from error
        journals = NodeJournals(driver, place, lambda: not (self._cordoned or self._draining))
        driver.streams.journals = journals
        await journals.open_all()

    def _look_for_journals(self) -> None:
        """An owner may be gone whose journal can be opened here."""
        journals = self._driver.streams.journals
        if journals is not None:
            journals.look()

    async def close(self) -> None:
        """Stop what is still here, leave the cluster, release everything. Repeatable."""
        if self._fence is not None:
            await self._fence
        if self._state != "open":
            return
        self._gateway.close()
        core = self._driver.core
        core.refuse_moves = f"node {self._name} is closing"
        self._draining = True
        core.withdraw_moves(f"node {self._name} is closing", self._driver.now_ms())
        self._flush()
        await self._leave_to_standbys()
        journals = self._driver.streams.journals
        if journals is not None:
            # What has a journal is not stopped: it comes back with the node.
            await journals.close()
        stops = [self._stop_here(inc.id) for inc in core.hosted.values() if not inc.row.journal]
        results = await asyncio.gather(*stops, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, MigrateError):
                log.error("a server could not be stopped", exc_info=result)
        await self._membership.leave()
        await self._release()

    async def _leave_to_standbys(self) -> None:
        """Servers that have standbys go on at one of them."""
        core = self._driver.core

        async def leave(inc: Incarnation) -> None:
            target = self._drain_standby(inc.id)
            if target is None:
                return
            try:
                await self._move_from_here(inc.id, target)
            except MigrateError as error:
                log.info("server %s does not go to its standby: %s", inc.id, error)

        replicated = [inc for inc in core.hosted.values() if inc.row.standbys]
        await asyncio.gather(*map(leave, replicated))

    def _stop_journals(self) -> None:
        journals = self._driver.streams.journals
        if journals is not None:
            journals.stop()

    async def _release(self) -> None:
        self._stop_journals()
        await self._close()
        if self._own_directory:
            await self._directory.close()
        self._closed.set()

    async def wait_closed(self) -> None:
        """Wait until it is closed; for programs that are nothing but a node.

        Raises:
            Fenced: It was said to be dead (`forget`), so it has ended itself.
        """
        await self._closed.wait()
        if self._fence is not None:
            raise Fenced(
                f"node {self._name} was said to be dead while it could not be heard of, so it has "
                "ended itself; start another one",
                node=self._name,
            )

    # ------------------------------------------------------------------ the cluster

    def joined(self, row: NodeRow) -> None:
        """See `Watcher`."""
        if self._links is not None and self._state == "open":
            self._links.dial(row.address, row.id)
            self._standbys.nodes_changed()

    def link_up(self, peer: PeerInfo) -> None:
        """See `LinkHandler`: the other side need not wait for the next round of figures."""
        self._tell_clock(peer.id)
        super().link_up(peer)
        if peer.kind == "node":
            core = self._driver.core
            load = self._meter.sample(core.hosted.values(), self._draining, self._cordoned)
            self._peers.send(peer.id, load)

    def gone(self, row: NodeRow, cause: str) -> None:
        """See `Watcher`."""
        self._meter.forget(row.id)
        self._peers.gone(row.id)
        if self._links is not None:
            self._links.hang_up(row.id)
        self._asks.dead(row.id)
        self._driver.core.node_dead(row.id, self._driver.now_ms())
        self._flush()
        self._look_for_journals()

    def suspected(self, node: NodeId) -> None:
        """See `Watcher`."""
        self._driver.core.standbys.node_suspected(node, self._driver.now_ms())
        self._flush()
        self._look_for_journals()

    def heard(self, node: NodeId) -> None:
        """See `Watcher`."""
        self._driver.core.standbys.node_heard(node, self._driver.now_ms())
        self._flush()
        self._standbys.nodes_changed()

    def forgotten(self) -> None:
        """See `Watcher`: no row is touched; what was here is lost, as others have been told."""
        log.error("node %s was said to be dead; it ends now", self._name)
        self._gateway.close()
        self._membership.look_away()
        # Not one of the driver's tasks, which it ends.
        self._fence = asyncio.get_running_loop().create_task(self._release())

    def burials(
        self, node: NodeId, rows: list[tuple[Row, int]]
    ) -> tuple[list[tuple[Row, int]], bool]:
        """See `Watcher`."""
        return self._driver.core.burials(node, rows, self._driver.now_ms())

    def _address_of(self, node: NodeId) -> str | None:
        row = self._membership.nodes.get(node)
        return row.address if row is not None else None

    async def _node_rows(self) -> list[NodeRow]:
        return list(self._membership.nodes.values())

    async def _node_named(self, name: str) -> NodeId:
        try:
            return await super()._node_named(name)
        except NodeNotFound:
            # It may have joined an instant ago.
            await self._membership._list()
            return await super()._node_named(name)

    def _home(self) -> NodeId:
        return self._id

    def _tell_clock(self, *peers: NodeId) -> None:
        told = ClockTold(self._driver.core.clock.now(self._driver.now_ms()))
        for peer in peers:
            self._peers.send(peer, told)

    def _tell_everybody_the_clock(self) -> None:
        if self._links is not None:
            self._tell_clock(*(peer.id for peer in self._links.peers()))

    def _clock_told(self, message: ClockTold) -> None:
        if self._driver.core.clock.hear(message.clock_ms, self._driver.now_ms()):
            # Whoever is not linked with the one that is ahead has to jump too.
            self._tell_everybody_the_clock()
        self._clock_heard.set()

    async def _hear_clock(self) -> None:
        """Wait for the time of another host before sessions are opened by it."""
        me = self._membership.me
        if any(row.boot != me.boot for row in self._membership.nodes.values()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOCK_S):
                    await self._clock_heard.wait()

    async def _measure(self) -> None:
        until_s = 0.0
        while True:
            if time.monotonic() > until_s:
                until_s = time.monotonic() + CLOCK_TOLD_S
                self._tell_everybody_the_clock()
            self._tell_load()
            await asyncio.sleep(INTERVAL_S)

    def _tell_load(self) -> None:
        core = self._driver.core
        load = self._meter.sample(core.hosted.values(), self._draining, self._cordoned)
        self._meter.hear(self._id, load)
        for node in self._membership.nodes:
            if node != self._id and self._links is not None and self._links.is_up(node):
                self._peers.send(node, load)

    def _heard(self, node: NodeId, load: Load) -> None:
        admitted, drained = self._meter.admits(node), self._meter.is_draining(node)
        self._meter.hear(node, load)
        if load.draining and not drained:
            self._standbys.node_leaves(node)
        elif self._meter.admits(node) and not admitted:
            self._standbys.nodes_changed()

    async def _least_loaded(self) -> NodeId:
        self._tell_load()
        candidates = [
            candidate
            for node in self._membership.nodes
            if (candidate := self._meter.candidate(node)) is not None
        ]
        chosen = least_loaded(candidates)
        if chosen is None:
            raise TargetRefused("every node is cordoned or draining; none takes a server")
        self._meter.spawned(chosen)
        return chosen

    async def _named(self, name: str) -> Row | None:
        try:
            entry = await self._directory.get(NAME_KEY + name)
            if entry is None:
                return None
            row, _ = await self._driver.rows.read(wire.decode_id(entry.value))
        except DirectoryError as error:
            raise _unreadable(error) from error
        return row

    async def _row_changes(self, server: ServerId, rev: int) -> tuple[list[Row | None], int]:
        key = SERVER_KEY + server
        try:
            if not rev:
                _, rev = await self._directory.list(key)
            async with asyncio.timeout(WATCH_S):
                async for changes in self._directory.watch(key, rev + 1):
                    rows = [
                        None if change.value is None else wire.decode_row(change.value)
                        for change in changes
                        if change.key == key
                    ]
                    return rows, changes[-1].rev
        except TimeoutError:
            pass
        except Compacted:
            row, _ = await self._driver.rows.read(server)
            _, rev = await self._directory.list(key)
            return [row], rev
        except DirectoryError as error:
            raise _unreadable(error) from error
        return [], rev

    # ------------------------------------------------------------------ asks of others

    async def _serve(self, node: NodeId, verb: str, args: tuple[Any, ...]) -> Any:
        match verb:
            case "spawn":
                return await self._spawn_here(*args)
            case "move":
                return await self._move_from_here(*args)
            case "stop":
                return await self._stop_here(*args)
            case "checkpoint":
                return await self._checkpoints.checkpoint(*args)
            case "planned":
                return await self._checkpoints.take_planned(*args)
            case "restore":
                return await self._checkpoints.restore(*args)
            case "replace":
                return await self._checkpoints.replace(*args)
            case "fork":
                return await self._checkpoints.fork(*args)
            case "adopt":
                return await self._checkpoints.adopt(*args)
            case "replicate":
                await self._standbys.replicate(*args)
                return self._server_info(self._owned(args[0]))
            case "standby_news":
                return self._standbys.news(*args)
            case "info":
                return self._server_info(self._owned(*args))
            case "servers":
                return [self._server_info(i) for i in self._driver.core.hosted.values()]
            case "open_methods":
                host: Hosted = self._owned(*args).host  # type: ignore[assignment]
                return host.spec.cls_name, open_methods(host.spec)
            case "node":
                return self._node_info()
            case "cordon":
                return self._cordon_here(*args)
            case "drain":
                return await self._drain_here()
            case "forget":
                return await self._forget(*args)
            case "row":
                return await self._driver.rows.read(*args)
            case "named":
                return await self._named(*args)
            case "least_loaded":
                return await self._least_loaded()
            case "nodes":
                return await self._nodes_after(*args)
            case "row_changes":
                return await self._row_changes(*args)
            case "rounds":
                server, *seen = args
                self._owned(server)
                return await self._driver.rounds(server, (seen[0], seen[1]), WATCH_S)
            case "failpoints":
                return self._set_failpoints(*args)
            case _:
                raise UsageError(
                    f"node {self._name} knows no verb {verb!r}; it is of another release",
                    node=self._name,
                )

    async def _nodes_after(
        self, seen: tuple[str, ...] | None, rev: int
    ) -> tuple[int, list[tuple[Any, ...]]]:
        """The nodes, as soon as they are others than those that were `seen`, and what is told here
        is not older than that; and the revision at which they are these.

        Whoever has seen none misses one that may have joined an instant ago: the directory knows.
        It knows as well whether anything has changed since a later revision than this node's.
        """
        membership = self._membership
        if seen is None or membership.rev < rev:
            # What is known here has to do while the directory is away.
            with contextlib.suppress(DirectoryError):
                await membership._list()
        try:
            async with asyncio.timeout(WATCH_S):
                while seen is not None and (
                    membership.rev < rev or set(seen) == set(membership.nodes)
                ):
                    await membership.changed.wait()
        except TimeoutError:
            pass
        rows = membership.nodes.values()
        return membership.rev, [
            (r.id, r.name, r.address, r.pid, r.started, r.boot, r.host) for r in rows
        ]

    def _set_failpoints(self, text: str) -> None:
        if self._driver.failpoints is None:
            raise UsageError("fail points are for tests; this node was not started for one")
        self._driver.failpoints.set(text)

    def _owned(self, server: ServerId) -> Incarnation:
        inc = self._driver.core.hosted.get(server)
        if inc is None or (inc.phase is Phase.FROZEN and inc.forwarding_to is not None):
            raise Elsewhere(f"node {self._name} does not own {server}", server=server)
        return inc

    def _server_info(self, inc: Incarnation) -> ServerInfo:
        row = inc.row
        return ServerInfo(
            id=row.server,
            name=row.name or None,
            cls=row.cls,
            node=self._name,
            epoch=row.epoch,
            version=row.version,
            mailbox=len(inc.mailbox),
            standbys=tuple(sorted(map(node_name, row.standbys))),
            mode=mode_name(row.mode) if row.standbys else None,
            durable=bool(row.journal),
            followers=self._standbys.infos(inc),
            moving=self._driver.progress(row.server),
        )

    def _node_info(self) -> NodeInfo:
        self._meter.hear(
            self._id,
            self._meter.sample(self._driver.core.hosted.values(), self._draining, self._cordoned),
        )
        return NodeInfo(
            name=self._name,
            address=self._address,
            pid=os.getpid(),
            host=self._membership.me.host,
            servers=len(self._driver.core.hosted),
            load=round(self._meter.cpu, 3),
            cordoned=self._cordoned or self._draining,
            draining=self._draining,
            links=self._link_infos(),
        )

    def _link_infos(self) -> tuple[LinkInfo, ...]:
        found = []
        for peer in self._links.peers() if self._links is not None else ():
            cost = self._links.cost(peer.id) if self._links is not None else None
            if cost is not None:
                found.append(LinkInfo(peer.name, **dataclasses.asdict(cost)))
        return tuple(found)

    def _cordon_here(self, on: bool) -> None:
        self._cordoned = on
        if not on:
            self._draining = False
            self._look_for_journals()
        self._driver.core.refuse_moves = f"node {self._name} is cordoned" if on else ""
        self._tell_load()

    async def _forget(self, name: str) -> None:
        try:
            await self._membership.forget(name)
        except DirectoryError as error:
            unknown = isinstance(error, OutcomeUnknown)
            raise MigrateError(
                f"whether node {name} is forgotten is not known: {error}"
                if unknown
                else f"the directory does not answer: {error}",
                node=name,
                cause=str(error),
                outcome=Outcome.UNKNOWN if unknown else Outcome.NOT_DONE,
            ) from error

    def _check_admits(self) -> None:
        refusal = self._driver.core.refuse_moves
        if not refusal and len(self._driver.core.hosted) >= self._options.servers_max:
            refusal = f"it holds its limit of {self._options.servers_max} servers"
        if refusal:
            raise TargetRefused(
                f"node {self._name} takes no servers: {refusal}", node=self._name, cause=refusal
            )

    # ------------------------------------------------------------------ spawn

    async def _spawn_here(
        self,
        request: str,
        cls: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None,
        standbys: tuple[tuple[str, ...], int, str] | None = None,
        durable: bool = False,
    ) -> Any:
        self._check_admits()
        spec = spec_of(cls)
        durable = durable or spec.durable
        self._check_has_journals(spec, durable)
        waits = durable or (standbys is not None and any(standbys[:2]) and standbys[2] == "sync")
        if waits and spec.reentrant:
            raise UsageError(f"{spec.cls_name} {REENTRANT}", node=self._name)
        if name is not None:
            await self._check_name_free(name)
        server = f"{classes.slug(spec.cls.__name__)}-{secrets.token_hex(8)}"
        obj = spec.cls(*args, **kwargs)
        row = Row(
            server=server,
            epoch=1,
            owner=self._id,
            state=RowState.ACTIVE,
            transfer=request,
            name=name or "",
            cls=spec.cls_name,
            version=spec.version,
            methods=tuple(spec.methods),
        )
        rev = await self._write_row(row)
        driver = self._driver
        ref = RefObject(server, spec.class_info, driver, self._id, 1)
        host = Hosted(obj, spec, ref, driver)
        host.by_value = classes.travels_by_value(spec.cls)
        timers = [(timer.name, max(1, int(timer.seconds * 1000))) for timer in spec.timers]
        inc = driver.core.host(
            row, rev, spec.mailbox, spec.reentrant, host, timers, driver.now_ms()
        )
        if "on_start" in spec.hooks:
            driver.core.background(inc, 1, driver.now_ms())
            try:
                await driver.host.hook(inc, "on_start", self._options.hook_timeout_s)
            except BaseException:
                await self._remove_for_sure(row)
                driver.core.removed(server, driver.now_ms())
                raise
            finally:
                driver.core.background(inc, -1, driver.now_ms())
        driver.core.started(server, driver.now_ms())
        self._flush()
        if standbys is not None or durable:
            try:
                if durable:
                    await self._standbys.make_durable(server)
                if standbys is not None:
                    await self._standbys.replicate(server, *standbys)
            except BaseException:
                await self._stop_here(server)
                raise
        return ref

    def _check_has_journals(self, spec: ServerSpec, durable: bool) -> None:
        if durable and self._driver.streams.journals is None:
            raise UsageError(
                f"{spec.cls_name} is to be durable, and node {self._name} has no folder for "
                "journals: give it one by Node(data=...) or --data DIR",
                node=self._name,
            )

    async def _check_name_free(self, name: str) -> None:
        taken = await self._named(name)
        if taken is not None and taken.state is not RowState.LOST:
            raise NameTaken(
                f"the name {name!r} belongs to server {taken.server} on "
                f"{node_name(taken.owner)}; take that one, or another name",
                server=name,
                ref=self._ref(taken),
            )

    async def _write_row(self, row: Row) -> int:
        """Write a new server's row, with its name if it has one; the revision."""
        key = SERVER_KEY + row.server
        compares = [Compare(key, 0)]
        puts = [Put(key, wire.encode_row(row))]
        if row.name:
            compares.append(Compare(NAME_KEY + row.name, 0))
            puts.append(Put(NAME_KEY + row.name, row.server.encode()))
        doubtful = False
        while True:
            try:
                txn = await self._directory.txn(compares, puts, [])
            except DirectoryError as error:
                doubtful = doubtful or isinstance(error, OutcomeUnknown)
                if not doubtful:
                    raise _unreadable(error) from error
                # The same again: at most one of the copies can take effect.
                await asyncio.sleep(RETRY_S)
                continue
            if txn.ok:
                return txn.rev
            entry = txn.entries.get(key)
            if entry is not None:
                return entry.rev
            await self._check_name_free(row.name)
            # The name was freed meanwhile.

    async def _remove_row(self, row: Row) -> SwapResult:
        """Try to remove a server's row and name; only its owner does that.

        The row as it is now, and no other: this may come through when this node is dead, and the
        server was restored elsewhere.
        """
        try:
            deletes = []
            compares = []
            key = SERVER_KEY + row.server
            found = await self._directory.get(key)
            if found is not None:
                now = wire.decode_row(found.value)
                if now.owner != self._id:
                    return SwapResult(SwapOutcome.REFUSED, now, found.rev, "another node has it")
                compares.append(Compare(key, found.rev))
                deletes.append(key)
            if row.name:
                entry = await self._directory.get(NAME_KEY + row.name)
                if entry is not None and entry.value == row.server.encode():
                    compares.append(Compare(NAME_KEY + row.name, entry.rev))
                    deletes.append(NAME_KEY + row.name)
            if not deletes:
                return SwapResult(SwapOutcome.DONE, None, 0)
            txn = await self._directory.txn(compares, [], deletes)
        except OutcomeUnknown as error:
            return SwapResult(SwapOutcome.UNKNOWN, None, 0, str(error))
        except DirectoryError as error:
            return SwapResult(SwapOutcome.NOT_DONE, None, 0, str(error))
        return SwapResult(SwapOutcome.DONE if txn.ok else SwapOutcome.REFUSED, None, txn.rev)

    async def _remove_for_sure(self, row: Row) -> None:
        """Remove the row of a server that never served: its name must not stay taken."""
        while True:
            result = await self._remove_row(row)
            if result.outcome is SwapOutcome.DONE:
                return
            await asyncio.sleep(RETRY_S)

    # ------------------------------------------------------------------ stop

    async def _stop_here(self, server: ServerId) -> None:
        self._owned(server)
        future = self._stops.get(server)
        if future is None:
            if server in self._driver.core.leaving:
                raise MoveError(
                    f"server {server} is moving; stop it when it has arrived",
                    server=server,
                    node=self._name,
                    outcome=Outcome.NOT_DONE,
                )
            future = self._stops[server] = asyncio.get_running_loop().create_future()
            if not self._driver.core.stop(server, self._driver.now_ms()):
                del self._stops[server]
                raise ServerNotFound(f"server {server} is stopping already", server=server)
        try:
            async with asyncio.timeout(self._options.quiesce_timeout_s):
                await asyncio.shield(future)
        except TimeoutError as error:
            if not self._driver.core.keep_serving(server, self._driver.now_ms()):
                raise MigrateError(
                    f"server {server} is being stopped, and that goes on: the directory has not "
                    f"said in {self._options.quiesce_timeout_s:g} s that its row is removed",
                    server=server,
                    node=self._name,
                    outcome=Outcome.UNKNOWN,
                ) from error
            self._stops.pop(server, None)
            future.cancel()
            raise MigrateError(
                f"server {server} handled one message for more than "
                f"{self._options.quiesce_timeout_s:g} s, so it was not stopped; it serves",
                server=server,
                node=self._name,
                outcome=Outcome.NOT_DONE,
            ) from error

    async def _finish_stop(self, inc: Incarnation) -> None:
        driver = self._driver
        future = self._stops.get(inc.id)
        try:
            await driver.host.hook(inc, "on_stop", self._options.hook_timeout_s)
        except Exception:
            log.exception("on_stop of server %s failed; it is stopped all the same", inc.id)
        while True:
            result = await self._remove_row(inc.row)
            gone = driver.core.removal_ended(inc.id, result.outcome, driver.now_ms())
            if gone is not None:
                break
            await asyncio.sleep(RETRY_S)
        self._flush()
        self._stops.pop(inc.id, None)
        if future is None or future.done():
            return
        if gone:
            future.set_result(None)
        else:
            future.set_exception(
                MigrateError(
                    f"server {inc.id} was not stopped, and serves on: the directory does not "
                    f"answer: {result.cause}",
                    server=inc.id,
                    node=self._name,
                    cause=result.cause,
                    outcome=Outcome.NOT_DONE,
                )
            )

    # ------------------------------------------------------------------ move and drain

    async def _move_from_here(self, server: ServerId, target: NodeId) -> MoveReport:
        inc = self._owned(server)
        core = self._driver.core
        host: Hosted = inc.host  # type: ignore[assignment]
        source = self._name
        if target == self._id:
            raise TargetRefused(
                f"server {server} is on node {source} already; nothing to move",
                server=server,
                node=source,
                source=source,
                target=source,
            )
        if not host.spec.movable:
            raise MoveError(
                f"{host.spec.cls_name} is declared @server(movable=False)",
                server=server,
                node=source,
                source=source,
                target=node_name(target),
                outcome=Outcome.NOT_DONE,
            )
        if server in core.leaving:
            raise MoveError(
                f"a move of server {server} is under way; wait for it to end",
                server=server,
                node=source,
                source=source,
                target=node_name(target),
                outcome=Outcome.NOT_DONE,
            )
        if inc.phase is Phase.STOPPING:
            raise ServerNotFound(f"server {server} is being stopped", server=server)
        if inc.phase is Phase.FROZEN or inc.holding:
            raise Elsewhere(f"server {server} has only just arrived", server=server)
        if target not in self._membership.nodes:
            await self._membership._list()
            if target not in self._membership.nodes:
                raise NodeNotFound(f"node {node_name(target)} is gone", node=node_name(target))
            self._check_unmoved(inc)
        if not self._directory.one_machine:
            # A commit that cannot be asked for would hold the server for as long, quiesced.
            try:
                await self._directory.get(SERVER_KEY + server)
            except DirectoryError as error:
                raise MoveError(
                    f"server {server} stays on node {source}: {error}",
                    server=server,
                    node=source,
                    cause=str(error),
                    source=source,
                    target=node_name(target),
                    outcome=Outcome.NOT_DONE,
                ) from error
            self._check_unmoved(inc)
        return await self._driver.move(server, target)

    def _check_unmoved(self, inc: Incarnation) -> None:
        """Raise Elsewhere if a server was moved, or a move of it began, while one waited."""
        core = self._driver.core
        if inc.id in core.leaving or core.hosted.get(inc.id) is not inc:
            raise Elsewhere(f"server {inc.id} has moved meanwhile", server=inc.id)

    async def _drain_here(self) -> list[MoveReport]:
        others = [row.id for row in self._membership.nodes.values() if row.id != self._id]
        open_others = [
            node for node in others if (c := self._meter.candidate(node)) is None or c.admits
        ]
        core = self._driver.core
        if not open_others and core.hosted:
            raise MoveError(
                f"node {self._name} cannot be drained: there is no other node that takes servers; "
                "nothing was moved",
                node=self._name,
                outcome=Outcome.NOT_DONE,
            )
        self._draining = True
        core.refuse_moves = f"node {self._name} is draining"
        self._tell_load()
        self._flush()
        reports: list[MoveReport] = []
        failures: list[MigrateError] = []
        for _ in range(3):
            failures = []
            results = await asyncio.gather(
                *(self._drain_one(server) for server in list(core.hosted)),
                return_exceptions=True,
            )
            for result in results:
                if isinstance(result, MoveReport):
                    reports.append(result)
                elif isinstance(result, MigrateError):
                    failures.append(result)
                elif isinstance(result, BaseException):
                    raise result
            if not core.hosted:
                return reports
        first = f"; the first: {failures[0]}" if failures else ""
        raise MoveError(
            f"{len(core.hosted)} servers of node {self._name} could not be moved{first}; they "
            "serve where they were, and the node stays cordoned",
            node=self._name,
            cause=str(failures[0]) if failures else None,
            outcome=Outcome.NOT_DONE,
        )

    async def _drain_one(self, server: ServerId) -> MoveReport | None:
        try:
            target = self._drain_standby(server) or await self._drain_target()
            return await self._move_from_here(server, target)
        except Elsewhere:
            return None

    def _drain_standby(self, server: ServerId) -> NodeId | None:
        """A node that has the server's state already, if it takes servers."""
        inc = self._driver.core.hosted.get(server)
        for node in inc.row.standbys if inc is not None else ():
            if node in self._membership.nodes and self._meter.admits(node):
                return node
        return None

    async def _drain_target(self) -> NodeId:
        others = [node for node in self._membership.nodes if node != self._id]
        heard = {node: self._meter.candidate(node) for node in others}
        chosen = least_loaded(candidate for candidate in heard.values() if candidate is not None)
        if chosen is None:
            # Better one that was not heard of lately than none: it can still refuse.
            chosen = next((node for node in others if heard[node] is None), None)
        if chosen is None:
            raise TargetRefused("no other node takes servers", node=self._name)
        self._meter.spawned(chosen)
        return chosen


def _unreadable(error: DirectoryError) -> MigrateError:
    return MigrateError(
        f"the directory does not answer: {error}", cause=str(error), outcome=Outcome.NOT_DONE
    )


__all__: Sequence[str] = ["Node"]
