"""What a node and a client have in common: the links, the driver, and the verbs.

A verb finds whose word is needed (the owner of a server, a node of some name), asks there, and
follows the server if it has moved meanwhile. Subclasses say where rows are read and which nodes
there are.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from migrate.core.actions import Point
from migrate.core.directory import Row, RowState
from migrate.core.ids import NodeId, ServerId, node_name
from migrate.core.messages import ClockTold, Load
from migrate.errors import (
    AuthError,
    MigrateError,
    NodeNotFound,
    Outcome,
    PeerError,
    ServerLost,
    ServerNotFound,
    UsageError,
)
from migrate.options import (
    LEAST_LOADED,
    NodeChoice,
    NodeOptions,
    Placement,
    SpawnOptions,
    checked_standbys,
)
from migrate.ref import Ref, RefObject, class_info, runtime_closed, runtime_opened
from migrate.reports import CheckpointInfo, Event, MoveReport, NodeInfo, ServerInfo
from migrate.shell import checkpoints, stores, wire
from migrate.shell.asks import CHANGES, Asks
from migrate.shell.directories.base import DirectoryError
from migrate.shell.driver import Driver, FailPoints, Rows
from migrate.shell.membership import NodeRow
from migrate.shell.peers import Peers
from migrate.shell.pending import Pending
from migrate.verbs import Verbs, implements
from rpc import auth
from rpc.errors import RpcError
from rpc.frames import Gathered
from rpc.grpc_channel import is_loopback, split_address
from rpc.handshake import PeerInfo
from rpc.links import LinkOptions, Links
from rpc.tls import FOLDER_VARIABLE, TlsFolder, default_tls_folder
from serializers.errors import SerializerError

T = TypeVar("T")

log: Final = logging.getLogger("migrate")

ROUNDS_AGAIN_S: Final = 1.0
"""Wait before an owner that could not tell of a move's rounds is asked again."""

FIND_S: Final = 15.0
"""How long a verb follows a server that is never where the directory says."""

EVERY_MIN_S: Final = 0.1
EVERY_MAX_S: Final = 366 * 86400.0
"""Bounds of the time between checkpoints that are taken again and again."""

SILENT_S: Final = 2.0
"""How long an owner is silent before the directory is asked whether it still is the owner."""

NAME_CHARS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


class Elsewhere(MigrateError):
    """Internal: the asked node does not own the server (any more)."""

    default_outcome = Outcome.NOT_DONE


def checked_name(name: str | None, default: str) -> str:
    """A node's or client's name, made up if there is none.

    Raises:
        UsageError: It is empty, too long, or has characters beyond letters, digits, `-_.`.
    """
    if name is None:
        return f"{default}-{secrets.token_hex(3)}"
    if not 1 <= len(name) <= 64 or not NAME_CHARS.issuperset(name):
        raise UsageError(
            f"{name!r} cannot name a node: 1 to 64 letters, digits and the signs - _ . are allowed"
        )
    return name


class Peer(abc.ABC):
    """Base of `Node` and `Client`."""

    def __init__(
        self,
        kind: Literal["node", "client"],
        name: str | None,
        options: NodeOptions | None,
        secret_file: str | os.PathLike[str] | None,
        tls: str | os.PathLike[str] | None = None,
    ) -> None:
        self._kind: Literal["node", "client"] = kind
        self._name = checked_name(name, kind)
        self._id: NodeId = f"{self._name}@{secrets.token_hex(8)}"
        self._options = options or NodeOptions()
        self._secret_file = Path(secret_file) if secret_file else auth.default_secret_path()
        self._tls_folder = tls
        self._state: Literal["new", "open", "closed"] = "new"
        self._links: Links | None = None
        self._peers: Peers
        self._asks: Asks
        self._driver: Driver
        self._was_up: set[NodeId] = set()
        self._secret = b""

    # ------------------------------------------------------------------ facts

    @property
    def name(self) -> str:
        """Its name; unique among living nodes."""
        return self._name

    @property
    def id(self) -> str:
        """Names this incarnation; never reused."""
        return self._id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name} ({self._state})>"

    # ------------------------------------------------------------------ opening

    def _open(
        self, rows: Rows, links_me: PeerInfo, link_options: LinkOptions, address: str
    ) -> Links:
        """Make links and driver for a peer that listens at, or first dials, an address; nothing is
        connected yet.
        """
        self._check_new()
        try:
            tls = self._tls_for(address)
            secret = self._secret = auth.load_or_create_secret(self._secret_file)
        except RpcError as error:
            raise AuthError(str(error), cause=str(error)) from error
        links = self._links = Links(links_me, secret, self, link_options, tls=tls)
        loop = asyncio.get_running_loop()
        self._driver = Driver(
            node=self._id,
            options=self._options,
            rows=rows,
            failpoints=FailPoints.from_environment() if self._kind == "node" else None,
        )
        self._peers = Peers(links, loop, self._driver.context, self._dial)
        if self._driver.failpoints is not None:
            self._peers.final_half_sent = lambda: self._driver.reach(Point.FINAL_HALF_SENT)
        self._driver.attach(self._peers)
        self._asks = Asks(
            self._id,
            self._driver,
            self._peers.send,
            self._serve,
            lambda node: links.is_up(node) or self._address_of(node) is not None,
            loop,
            self._driver.context,
        )
        self._state = "open"
        runtime_opened(self._driver)
        return links

    def _tls_for(self, address: str) -> TlsFolder | None:
        """The certificates to use: those that were asked for, or else, where an address leads
        beyond this machine, those in the usual place, if they are there.
        """
        folder = self._tls_folder or os.environ.get(FOLDER_VARIABLE)
        if not folder:
            try:
                host, _ = split_address(address)
            except ValueError:
                return None  # Another kind of address, or none; whoever uses it says so.
            usual = default_tls_folder(self._secret_file)
            if is_loopback(host) or not usual.exists():
                return None
            folder = usual
        return TlsFolder(folder, self._kind)

    def _flush(self) -> None:
        self._peers.flush()

    async def _close(self) -> None:
        if self._state != "open":
            return
        self._state = "closed"
        runtime_closed(self._driver)
        await self._asks.close()
        await self._driver.close()
        self._peers.flush()
        if self._links is not None:
            await self._links.close()

    def _link_options(self) -> LinkOptions:
        return LinkOptions(
            same_host=self._options.same_host, share_memory=self._options.share_memory
        )

    def _check_new(self) -> None:
        if self._state != "new":
            raise UsageError(f"{self!r} cannot be opened twice; make a new one")

    def _check_open(self) -> None:
        if self._state != "open":
            what = "is not open yet: use `async with`" if self._state == "new" else "is closed"
            raise UsageError(f"{self!r} {what}")

    # ------------------------------------------------------------------ links

    @abc.abstractmethod
    def _address_of(self, node: NodeId) -> str | None:
        """Where a node can be dialled; None if it is not known (any more)."""

    def _dial(self, node: NodeId) -> None:
        address = self._address_of(node)
        if address is None:
            self._peers.gone(node)
            return
        if self._links is not None and self._state == "open":
            self._links.dial(address, node)

    def link_up(self, peer: PeerInfo) -> None:
        """See `LinkHandler`."""
        node = peer.id
        again = node in self._was_up
        self._was_up.add(node)
        self._peers.up(node)
        if again:
            # What was under way when the former link broke may be lost.
            self._driver.core.peer_up(node, self._driver.now_ms())
            self._asks.up(node)
            self._flush()

    def link_down(self, peer: PeerInfo, cause: str) -> None:
        """See `LinkHandler`."""
        log.debug("%s: link with %s down: %s", self._name, peer.name, cause)

    def received(self, peer_id: str, data: bytes | bytearray | memoryview | Gathered) -> None:
        """See `LinkHandler`."""
        try:
            messages = wire.decode_messages(data)
        except PeerError as error:
            log.error("%s hangs up on %s: %s", self._name, node_name(peer_id), error)
            if self._links is not None:
                self._links.hang_up(peer_id)
            return
        if messages and type(messages[0]) is ClockTold:
            # Before what comes with it, whose age is told by it.
            self._clock_told(messages[0])
        for message in self._driver.received(peer_id, messages):
            if isinstance(message, ClockTold):
                self._clock_told(message)
            elif not self._asks.take(peer_id, message) and isinstance(message, Load):
                self._heard(peer_id, message)

    def dial_failed(self, address: str, expected_id: str | None, error: RpcError) -> None:
        """See `LinkHandler`."""
        log.debug("%s: dialling %s failed: %s", self._name, address, error)
        if expected_id is not None:
            self._peers.gone(expected_id)

    def accept_failed(self, address: str, error: RpcError) -> None:
        """See `LinkHandler`."""
        log.warning("%s refused a connection from %s: %s", self._name, address, error)

    def _clock_told(self, message: ClockTold) -> None:
        """A node told the shared time."""
        self._driver.core.clock.hear(message.clock_ms, self._driver.now_ms())

    def _heard(self, node: NodeId, load: Load) -> None:
        """A node told its load figures; a client has no use for them."""
        log.debug("%s: load of %s: %s", self._name, node, load)

    @abc.abstractmethod
    async def _serve(self, node: NodeId, verb: str, args: tuple[Any, ...]) -> Any:
        """Answer an ask of another node."""

    # ------------------------------------------------------------------ who and where

    @abc.abstractmethod
    async def _node_rows(self) -> list[NodeRow]:
        """The nodes there are, in no order."""

    @abc.abstractmethod
    def _home(self) -> NodeId:
        """The node that does what no node was named for."""

    async def _node_named(self, name: str) -> NodeId:
        rows = await self._node_rows()
        for row in rows:
            if row.name == name or row.id == name:
                return row.id
        known = ", ".join(sorted(row.name for row in rows)) or "none"
        raise NodeNotFound(f"there is no node named {name!r}; known are: {known}", node=str(name))

    async def _read(self, server: ServerId) -> Row:
        """A server's row.

        Raises:
            ServerNotFound, ServerLost: It is not there (any more).
            MigrateError: The directory cannot be read now.
        """
        try:
            row, _ = await self._driver.rows.read(server)
        except DirectoryError as error:
            raise MigrateError(
                f"the directory cannot be read: {error}",
                server=server,
                cause=str(error),
                outcome=Outcome.NOT_DONE,
            ) from error
        if row is None:
            raise ServerNotFound(
                f"there is no server {server}; it was stopped, or never was", server=server
            )
        if row.state is RowState.LOST:
            raise ServerLost(
                f"server {server} is lost: {row.cause}",
                server=server,
                cause=row.cause,
                outcome=Outcome.NOT_DONE,
            )
        return row

    async def _at_owner(self, ref: Any, verb: str, *args: Any) -> Any:
        """Ask whoever owns the server, wherever it is by then."""
        self._check_open()
        server = _server_id(ref)
        until = time.monotonic() + FIND_S
        wait_s = 0.002
        while True:
            row = await self._read(server)
            try:
                return await self._ask_owner(row, verb, args)
            except (Elsewhere, NodeNotFound) as error:
                if isinstance(error, NodeNotFound) and error.node != node_name(row.owner):
                    raise
                if time.monotonic() > until:
                    raise MigrateError(
                        f"server {server} was never where the directory said for {FIND_S:g} s; "
                        f"last: {node_name(row.owner)} at epoch {row.epoch}",
                        server=server,
                        node=node_name(row.owner),
                        outcome=Outcome.NOT_DONE,
                    ) from error
            await asyncio.sleep(wait_s)
            wait_s = min(0.2, wait_s * 2)

    async def _ask_owner(self, row: Row, verb: str, args: tuple[Any, ...]) -> Any:
        """Ask the owner in a row, for as long as it is the owner.

        Raises:
            Elsewhere: It is not, and never answered.
        """
        asking = asyncio.ensure_future(self._asks.ask(row.owner, verb, row.server, *args))
        try:
            while not (await asyncio.wait([asking], timeout=SILENT_S))[0]:
                # It may be busy; or silent, and a standby has taken over.
                now = row
                with contextlib.suppress(DirectoryError, MigrateError):
                    now = await self._read(row.server)
                if now.owner != row.owner and verb not in CHANGES:
                    raise Elsewhere(f"server {row.server} has another owner", server=row.server)
            return asking.result()
        finally:
            asking.cancel()

    def _ref(self, row: Row) -> Any:
        info = class_info(row.cls, row.methods)
        return RefObject(row.server, info, self._driver, row.owner, row.epoch)

    # ------------------------------------------------------------------ verbs

    @implements(Verbs.spawn)
    async def spawn(
        self,
        cls: Callable[..., Any],
        /,
        *args: Any,
        options: SpawnOptions | None = None,
        **kwargs: Any,
    ) -> Any:
        self._check_open()
        options = options or SpawnOptions()
        if not isinstance(options, SpawnOptions):
            raise UsageError(f"options= takes a migrate.SpawnOptions, not {options!r}")
        if options.near is not None:
            target = (await self._read(_server_id(options.near))).owner
        elif options.on is None:
            target = self._home()
        else:
            target = await self._choose(options.on)
        request = f"spawn/{secrets.token_hex(12)}"
        try:
            return await self._asks.ask(
                target, "spawn", request, cls, args, kwargs, options.name, *_standbys_of(options)
            )
        except SerializerError as error:
            raise wire.unpackable(
                "the class or a constructor's argument", error, Outcome.NOT_DONE
            ) from error

    @implements(Verbs.spawn_lb)
    async def spawn_lb(
        self,
        cls: Callable[..., Any],
        /,
        *args: Any,
        options: SpawnOptions | None = None,
        **kwargs: Any,
    ) -> Any:
        options = options or SpawnOptions()
        if options.on not in (None, LEAST_LOADED) or options.near is not None:
            raise UsageError("spawn_lb chooses the node itself; use spawn with on= or near=")
        chosen = dataclasses.replace(options, on=LEAST_LOADED)
        spawn: Any = self.spawn
        return await spawn(cls, *args, options=chosen, **kwargs)

    async def _choose(self, choice: NodeChoice) -> NodeId:
        if isinstance(choice, Placement):
            return await self._least_loaded()
        return await self._node_named(choice)

    @abc.abstractmethod
    async def _least_loaded(self) -> NodeId:
        """The least loaded node."""

    @implements(Verbs.call)
    def call(self, ref: Any, method: Any, /, *args: Any, **kwargs: Any) -> Pending:
        self._check_open()
        name = method if isinstance(method, str) else getattr(method, "__name__", None)
        if name is None:
            name = getattr(method, "_name", None)
        if not isinstance(name, str):
            raise UsageError(
                f"{method!r} is no method: give Class.method as found on the class, or its name"
            )
        if not isinstance(ref, RefObject):
            raise UsageError(f"a ref is needed, not {type(ref).__name__}")
        timeout_s = getattr(method, "_timeout_s", None)
        return self._driver.call(ref, name, args, kwargs, timeout_s)

    async def migrate(self, ref: Ref[Any], *, to: NodeChoice) -> MoveReport:
        """See `Verbs.migrate`."""
        self._check_open()
        target = await self._choose(to)
        report: MoveReport = await self._at_owner(ref, "move", target)
        return report

    async def stop(self, ref: Ref[Any]) -> None:
        """See `Verbs.stop`."""
        await self._at_owner(ref, "stop")

    async def info(self, ref: Ref[Any]) -> ServerInfo:
        """See `Verbs.info`."""
        info: ServerInfo = await self._at_owner(ref, "info")
        return info

    async def whereis(self, name: str) -> Ref[Any]:
        """See `Verbs.whereis`."""
        self._check_open()
        row = await self._named(name)
        if row is None or row.state is RowState.LOST:
            raise ServerNotFound(f"no server has the name {name!r}", server=name)
        ref: Ref[Any] = self._ref(row)
        return ref

    @abc.abstractmethod
    async def _named(self, name: str) -> Row | None:
        """The row of the server that has a name."""

    async def _ask_all(self, verb: str, *args: Any) -> list[Any]:
        """Ask every node; those that are gone by then are left out."""
        self._check_open()
        rows = await self._node_rows()
        answers = await asyncio.gather(
            *(self._asks.ask(row.id, verb, *args, timeout_s=10.0) for row in rows),
            return_exceptions=True,
        )
        found = []
        for row, answer in zip(rows, answers, strict=True):
            if isinstance(answer, MigrateError):
                log.debug("%s of node %s: %s", verb, row.name, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append(answer)
        return found

    async def servers(self) -> list[ServerInfo]:
        """See `Verbs.servers`."""
        infos: list[ServerInfo] = [i for part in await self._ask_all("servers") for i in part]
        return sorted(infos, key=lambda info: info.id)

    async def nodes(self) -> list[NodeInfo]:
        """See `Verbs.nodes`."""
        infos: list[NodeInfo] = await self._ask_all("node")
        return sorted(infos, key=lambda info: info.name)

    async def cordon(self, node: str, on: bool = True) -> None:
        """Let a node take in no servers (or, with `on` False, take them in again).

        Raises:
            NodeNotFound: No node has that name.
        """
        self._check_open()
        await self._asks.ask(await self._node_named(node), "cordon", bool(on), timeout_s=10.0)

    async def forget(self, node: str) -> None:
        """Say that a node is dead for good, where no other node can see it.

        Its servers are lost then, and their names free. Say so only when its process has certainly
        ended: it is believed. A node that lives all the same ends itself as soon as it reaches the
        directory; what it answers until then is undone.

        Raises:
            NodeNotFound: No node has that name.
            UsageError: It renews its lease, so it lives.
        """
        self._check_open()
        await self._asks.ask(self._home(), "forget", node, timeout_s=20.0)

    async def drain(self, node: str) -> list[MoveReport]:
        """See `Verbs.drain`."""
        self._check_open()
        target = await self._node_named(node)
        reports: list[MoveReport] = await self._asks.ask(target, "drain")
        return reports

    async def monitor(self, ref: Ref[Any]) -> AsyncIterator[Event]:
        """See `Verbs.monitor`."""
        self._check_open()
        server = _server_id(ref)
        row = await self._read(server)
        rev = 0
        seen = ("", 0)
        rounds: asyncio.Future[Any] | None = None
        rows: asyncio.Future[Any] = asyncio.ensure_future(self._row_changes(server, rev))
        try:
            while True:
                if rounds is None:
                    rounds = asyncio.ensure_future(self._rounds(ref, seen))
                await asyncio.wait((rows, rounds), return_when=asyncio.FIRST_COMPLETED)
                if rounds.done():
                    told, rounds = rounds.result(), None
                    if told is not None:
                        move, target, before, sizes = told
                        seen = move, before + len(sizes)
                        for number, size in enumerate(sizes, before + 1):
                            cause = f"round {number} sent {size} bytes ahead to {target}"
                            yield Event("copying", server, node_name(row.owner), row.epoch, cause)
                if not rows.done():
                    continue
                changes, rev = rows.result()
                rows = asyncio.ensure_future(self._row_changes(server, rev))
                for now in changes:
                    if now is None:
                        yield Event("stopped", server, node_name(row.owner), row.epoch, "")
                        return
                    if now.state is RowState.LOST:
                        yield Event("lost", server, node_name(now.owner), now.epoch, now.cause)
                        return
                    for event in await self._standby_events(ref, row, now):
                        yield event
                    if now.generation != row.generation and now.owner not in row.standbys:
                        node = node_name(now.owner)
                        yield Event("restored", server, node, now.epoch, now.cause)
                    elif now.owner != row.owner and now.epoch > row.epoch:
                        yield _new_owner(row, now)
                    if now.owner != row.owner and rounds is not None:
                        rounds.cancel()  # It waits where the server was.
                        rounds = None
                    row = now
        finally:
            for waiting in (rows, rounds):
                if waiting is not None and not waiting.cancel() and not waiting.cancelled():
                    waiting.exception()  # Nobody asks for it any more.

    async def _standby_events(self, ref: Any, row: Row, now: Row) -> list[Event]:
        """What a change of a row says of standbys; why one went, its owner is asked."""
        joined = [n for n in now.standbys if n not in row.standbys and n != row.owner]
        lost = [n for n in row.standbys if n not in now.standbys and n != now.owner]
        if now.owner != row.owner or not (joined or lost):
            return []
        causes: dict[str, str] = {}
        if lost:
            try:
                news = await self._asks.ask(now.owner, "standby_news", row.server, timeout_s=1.0)
                causes = {node: cause for node, what, cause in news if what != "joined"}
            except MigrateError as error:
                log.debug("why a standby went is not told: %s", error)
        node, epoch = node_name(now.owner), now.epoch
        told = [Event("standby_joined", row.server, node, epoch, node_name(n)) for n in joined]
        for name in map(node_name, lost):
            cause = causes.get(name, "")
            text = f"{name}: {cause}" if cause else name
            told.append(Event("standby_lost", row.server, node, epoch, text))
        return told

    async def _rounds(self, ref: Any, seen: tuple[str, int]) -> Any:
        """Wait for rounds of a move of a server; None after a while without any."""
        try:
            return await self._at_owner(ref, "rounds", *seen)
        except MigrateError as error:
            # What became of the server its row tells.
            log.debug("rounds of a move are not told: %s", error)
            await asyncio.sleep(ROUNDS_AGAIN_S)
            return None

    @abc.abstractmethod
    async def _row_changes(self, server: ServerId, rev: int) -> tuple[list[Row | None], int]:
        """Wait for changes of a row after `rev` (0: from now on); may be empty after a while."""

    async def replicate(
        self,
        ref: Ref[Any],
        nodes: int | Sequence[str],
        *,
        mode: Literal["sync", "async"] = "sync",
    ) -> ServerInfo:
        """See `Verbs.replicate`."""
        names, count = checked_standbys(nodes, mode)
        info: ServerInfo = await self._at_owner(ref, "replicate", names, count, mode)
        return info

    async def checkpoint(
        self,
        ref: Ref[Any],
        url: str | os.PathLike[str],
        *,
        every: float | None = None,
        keep: int = 3,
        key: bytes | None = None,
    ) -> CheckpointInfo:
        """See `Verbs.checkpoint`."""
        place = stores.url_of(url)
        if every is not None and key is not None:
            raise UsageError("key= and every= exclude each other: a key does not stay at a node")
        every_s = _checked_every_s(every)
        _check_keep(keep)
        _check_key(key)
        info: CheckpointInfo = await self._at_owner(ref, "checkpoint", place, every_s, keep, key)
        return info

    async def restore(
        self,
        url: str | os.PathLike[str],
        *,
        on: NodeChoice | None = None,
        name: str | None = None,
        replace: bool = False,
        fork: bool = False,
        key: bytes | None = None,
    ) -> Ref[Any]:
        """See `Verbs.restore`."""
        self._check_open()
        place = stores.url_of(url)
        if replace and (fork or name is not None):
            raise UsageError(
                "replace= excludes fork= and name=: the server keeps its identity and its name"
            )
        SpawnOptions(name=name)  # the same rules
        _check_key(key)
        target = self._home() if on is None else await self._choose(on)
        request = f"restore/{secrets.token_hex(12)}"
        ref: Ref[Any] = await self._asks.ask(
            target, "restore", request, place, on is not None, name, replace, fork, key
        )
        return ref

    async def fork(self, ref: Ref[T], *, on: NodeChoice | None = None) -> Ref[T]:
        """See `Verbs.fork`."""
        self._check_open()
        target = None if on is None else await self._choose(on)
        request = f"fork/{secrets.token_hex(12)}"
        twin: Ref[T] = await self._at_owner(ref, "fork", request, target)
        return twin

    async def rebalance(self) -> list[MoveReport]:
        """See `Verbs.rebalance`; not in this release."""
        raise _later("rebalance")


def _new_owner(row: Row, now: Row) -> Event:
    """A change of owner, as users are told of it."""
    node = node_name(now.owner)
    if now.previous or now.owner not in row.standbys:
        return Event("moved", row.server, node, now.epoch, "")
    cause = f"node {node_name(row.owner)} is gone"
    if now.generation != row.generation:
        then = datetime.fromtimestamp(now.rollbacks[-1].then_s, UTC)
        cause += f"; the server is as it was at {then.isoformat(timespec='milliseconds')}"
    return Event("promoted", row.server, node, now.epoch, cause)


def _standbys_of(options: SpawnOptions) -> tuple[Any, ...]:
    """What a spawn says of standbys: nothing without any, as nodes of older releases know it."""
    names, count = checked_standbys(options.standbys, options.standby_mode)
    told = (names, count, options.standby_mode)
    if options.durable:
        return told if names or count else None, True
    return (told,) if names or count else ()


def _later(verb: str) -> UsageError:
    return UsageError(f"{verb} is not supported in this release; nothing was done")


def _checked_every_s(every: object) -> float | None:
    if every is None:
        return None
    if (
        isinstance(every, bool)
        or not isinstance(every, int | float)
        or not (every == 0 or EVERY_MIN_S <= every <= EVERY_MAX_S)
    ):
        raise UsageError(
            f"every={every!r} must be seconds from {EVERY_MIN_S} to {EVERY_MAX_S:.0f}, or 0 to end "
            "what was begun"
        )
    return float(every)


def _check_keep(keep: object) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise UsageError(f"keep={keep!r} must be a whole number of at least 1")


def _check_key(key: object) -> None:
    # Here too, so that a wrong one fails where the mistake is, and before anything happens.
    checkpoints.signing_key(b"", key)


def _server_id(ref: Any) -> ServerId:
    if not isinstance(ref, RefObject):
        raise UsageError(
            f"a ref is needed (what spawn or whereis returned), not {type(ref).__name__}"
        )
    return ref._server_id
