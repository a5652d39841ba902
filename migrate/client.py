"""connect and its blocking twin: a client hosts nothing, and has the same verbs."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Final, Self

from migrate.core.directory import Row
from migrate.core.events import SwapOutcome, SwapResult
from migrate.core.ids import NodeId, ServerId
from migrate.core.messages import ClockTold
from migrate.errors import (
    AuthError,
    CallTimeout,
    InternalError,
    MigrateError,
    NameTaken,
    NodeNotFound,
    Outcome,
    UsageError,
)
from migrate.options import NodeOptions
from migrate.peer import Peer
from migrate.ref import RefObject, runtime_closed, runtime_opened
from migrate.reports import Event
from migrate.shell import wire
from migrate.shell.membership import NodeRow
from migrate.verbs import SyncVerbs, implements
from rpc.errors import AuthFailed, RpcError
from rpc.handshake import PeerInfo

CONNECT_S: Final = 10.0
LOOK_UP_S: Final = 5.0

SILENT_S: Final = 1.0
"""How long a node is waited for that only tells what others know too, before another is asked."""


class _AskedRows:
    """Rows as a node of the cluster reads them (see `driver.Rows`)."""

    one_machine = True  # a client takes no servers in, so it watches none

    def __init__(self, client: Client) -> None:
        self._client = client

    async def read(self, server: ServerId) -> tuple[Row | None, int]:
        found: tuple[Row | None, int] = await self._client._ask_any(
            "row", server, timeout_s=LOOK_UP_S
        )
        return found

    async def swap(self, row: Row, rev: int) -> SwapResult:
        return SwapResult(SwapOutcome.NOT_DONE, None, 0, "a client owns nothing")

    def watch(self, server: ServerId) -> AsyncIterator[tuple[Row, int]]:
        raise InternalError("a client takes no servers in")


class Client(Peer):
    """A member of the cluster that hosts nothing; made by `connect`."""

    def __init__(
        self,
        address: str,
        *,
        name: str | None = None,
        options: NodeOptions | None = None,
        secret_file: str | os.PathLike[str] | None = None,
        tls: str | os.PathLike[str] | None = None,
        timeout_s: float = CONNECT_S,
    ) -> None:
        super().__init__("client", name, options, secret_file, tls)
        self._entry_address = address
        self._timeout_s = timeout_s
        self._nodes: dict[NodeId, NodeRow] = {}
        self._nodes_rev = 0  # of the directory, when they were these
        self._entry: NodeId = ""
        self._has_clock = False

    async def __aenter__(self) -> Self:
        me = PeerInfo(self._id, self._name, "client", "", os.getpid(), features=wire.FEATURES)
        links = self._open(_AskedRows(self), me, self._link_options(), self._entry_address)
        try:
            peer = await links.connect(self._entry_address, self._timeout_s)
            self._entry = peer.id
            await self._learn_nodes(None)
        except BaseException as error:
            await self._close()
            if isinstance(error, AuthFailed):
                raise AuthError(str(error), cause=str(error)) from error
            if isinstance(error, RpcError | ValueError):
                raise MigrateError(
                    f"no node could be reached at {self._entry_address}: {error}",
                    cause=str(error),
                    outcome=Outcome.NOT_DONE,
                ) from error
            raise
        self._driver.task(self._follow_nodes(), "nodes")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def close(self) -> None:
        """Leave the cluster; whoever waits for a reply is told. Repeatable."""
        await self._close()

    # ------------------------------------------------------------------ the cluster

    async def _learn_nodes(self, seen: tuple[str, ...] | None) -> None:
        timeout_s = None if seen is not None else self._timeout_s
        rev, told = await self._ask_any("nodes", seen, self._nodes_rev, timeout_s=timeout_s)
        if rev < self._nodes_rev:
            # NB: whom an older view lacks has not left, but come since. It would be dead for good.
            return
        self._nodes_rev = rev
        rows = [NodeRow(*row) for row in told]
        present = {row.id: row for row in rows}
        for node in [n for n in self._nodes if n not in present]:
            self._forget(node)
        self._nodes = present
        if self._links is not None:
            for row in rows:
                # Every node at once: a call never waits for a handshake.
                self._links.dial(row.address, row.id)

    def _forget(self, node: NodeId) -> None:
        self._nodes.pop(node, None)
        self._peers.gone(node)
        if self._links is not None:
            self._links.hang_up(node)
        self._asks.dead(node)
        self._driver.core.node_dead(node, self._driver.now_ms())
        self._flush()

    async def _follow_nodes(self) -> None:
        while True:
            try:
                await self._learn_nodes(tuple(self._nodes))
            except MigrateError:
                await asyncio.sleep(0.2)

    def _clock_told(self, message: ClockTold) -> None:
        """The first node says it before it says anything else."""
        if self._has_clock:
            super()._clock_told(message)
        else:
            self._has_clock = True
            self._driver.core.clock.follow(message.clock_ms, self._driver.now_ms())

    def link_down(self, peer: PeerInfo, cause: str) -> None:
        """See `LinkHandler`: asks that wait at this node go to another one."""
        super().link_down(peer, cause)
        if self._state == "open":
            self._asks.link_down(peer.id)

    async def _ask_any(self, verb: str, *args: Any, timeout_s: float | None) -> Any:
        """Ask a node that is there, best the one first connected to; reads only."""
        last: MigrateError | None = None
        candidates = [self._entry, *(n for n in self._nodes if n != self._entry)]
        up = [n for n in candidates if self._links is not None and self._links.is_up(n)]
        nodes = up or candidates[:1]
        for number, node in enumerate(nodes, 1):
            limit_s = timeout_s
            if number < len(nodes) and timeout_s == LOOK_UP_S:
                limit_s = SILENT_S  # It may be paused, and the others know the same.
            try:
                return await self._asks.ask_once(node, verb, *args, timeout_s=limit_s)
            except (NodeNotFound, CallTimeout) as error:
                if isinstance(error, CallTimeout) and number == len(nodes):
                    raise
                last = error
                if node == self._entry:
                    self._entry = next((n for n in up if n != node), node)
        raise last or MigrateError("no node can be reached", outcome=Outcome.NOT_DONE)

    def _address_of(self, node: NodeId) -> str | None:
        row = self._nodes.get(node)
        return row.address if row is not None else None

    async def _node_rows(self) -> list[NodeRow]:
        return list(self._nodes.values())

    async def _node_named(self, name: str) -> NodeId:
        try:
            return await super()._node_named(name)
        except NodeNotFound:
            await self._learn_nodes(None)
            return await super()._node_named(name)

    def _home(self) -> NodeId:
        if self._entry in self._nodes:
            return self._entry
        return next(iter(self._nodes), self._entry)

    async def _least_loaded(self) -> NodeId:
        node: NodeId = await self._ask_any("least_loaded", timeout_s=LOOK_UP_S)
        return node

    async def _named(self, name: str) -> Row | None:
        row: Row | None = await self._ask_any("named", name, timeout_s=LOOK_UP_S)
        return row

    async def _row_changes(self, server: ServerId, rev: int) -> tuple[list[Row | None], int]:
        changes: tuple[list[Row | None], int] = await self._ask_any(
            "row_changes", server, rev, timeout_s=60.0
        )
        return changes

    async def _serve(self, node: NodeId, verb: str, args: tuple[Any, ...]) -> Any:
        raise UsageError(f"{self._name} is a client; it serves nothing", node=self._name)


def connect(
    address: str,
    *,
    name: str | None = None,
    options: NodeOptions | None = None,
    secret_file: str | os.PathLike[str] | None = None,
    tls: str | os.PathLike[str] | None = None,
    timeout_s: float = CONNECT_S,
) -> Client:
    """Make a client of the cluster that a node belongs to; use it with `async with`.

    Args:
        address: host:port of any node.
        name: For people; None makes one up.
        options: Tunables; only those about calls matter to a client.
        secret_file: The cluster secret; None: the user's own.
        tls: Folder with certificates; None: what LIVEMIGRATE_TLS_DIR names; or, for an address
            beyond loopback, `tls` beside the cluster secret.
        timeout_s: Seconds until the first link must be up.

    Raises:
        AuthError: On entering: the secret is another one, or cannot be read.
        MigrateError: On entering: no node answered there.
    """
    return Client(
        address, name=name, options=options, secret_file=secret_file, tls=tls, timeout_s=timeout_s
    )


async def _awaited(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Called in the loop's thread, where requests must be made.
    return await make(*args, **kwargs)


class _SyncRuntime:
    """What the refs of a `SyncClient` call through (see `migrate.ref.Runtime`)."""

    def __init__(self, client: SyncClient) -> None:
        self._client = client

    def call(
        self,
        ref: RefObject,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> Any:
        return self._client._request("call", ref, method, args, kwargs, timeout_s)

    def cast(
        self,
        ref: RefObject,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> Any:
        return self._client._request("cast", ref, method, args, kwargs, timeout_s)


class SyncClient:
    """The blocking twin of `Client`, for scripts and notebooks; made by `connect_sync`.

    It runs a client in a thread of its own. The verbs have the same names and arguments, and
    return what the others return once awaited; refs that come from it block too: `ref.incr(3)`
    returns the reply. Usable from several threads at once.
    """

    def __init__(self, make: Callable[[], Client]) -> None:
        self._make = make
        self._client: Client | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._runtime = _SyncRuntime(self)

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise UsageError("this client was opened before; make a new one")
        loop = self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="migrate", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(self._open())
        except BaseException:
            self._end()
            raise
        runtime_closed(self._client._driver)
        runtime_opened(self._runtime)
        return self

    async def _open(self) -> Client:
        client = self._make()
        await client.__aenter__()
        client._driver.runtime = self._runtime
        return client

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster and end the thread. Repeatable."""
        client, self._client = self._client, None
        runtime_closed(self._runtime)
        if client is not None:
            self._run(client.close())
            self._end()

    def _end(self) -> None:
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            raise InternalError("a client ended before it was opened")
        # In the loop's own thread: this one may have a loop that runs, as notebooks do.
        asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        loop = self._loop
        if loop is None or loop.is_closed():
            work.close()
            raise UsageError("the client is not open: use `with migrate.connect_sync(...)`")
        if threading.current_thread() is self._thread:
            work.close()
            raise UsageError("a blocking call from the client's own thread would wait for ever")
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return self._bound(future.result())
        except NameTaken as error:
            error.ref = self._bound(error.ref)
            raise
        except BaseException:
            future.cancel()
            raise

    def _bound(self, value: Any) -> Any:
        """Refs that are handed out call through this client."""
        if isinstance(value, RefObject):
            return value._bound_to(self._runtime)
        return value

    def _opened(self) -> Client:
        if self._client is None:
            raise UsageError("the client is not open: use `with migrate.connect_sync(...)`")
        return self._client

    def _request(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        driver = self._opened()._driver
        return self._run(_awaited(getattr(driver, kind), *args, **kwargs))

    # -- verbs

    @implements(SyncVerbs.spawn)
    def spawn(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(_awaited(self._opened().spawn, *args, **kwargs))

    @implements(SyncVerbs.spawn_lb)
    def spawn_lb(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(_awaited(self._opened().spawn_lb, *args, **kwargs))

    @implements(SyncVerbs.call)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(_awaited(self._opened().call, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        verb = getattr(Client, name, None)
        if name.startswith("_") or not callable(verb) or name == "monitor":
            raise AttributeError(f"a client has no verb {name!r}")

        def blocking(*args: Any, **kwargs: Any) -> Any:
            return self._run(getattr(self._opened(), name)(*args, **kwargs))

        blocking.__name__ = name
        blocking.__doc__ = verb.__doc__
        return blocking

    def monitor(self, ref: Any) -> Iterator[Event]:
        """See `Verbs.monitor`; a blocking iterator."""
        events = self._opened().monitor(ref)

        async def step() -> Event | None:
            return await anext(events, None)

        while True:
            event = self._run(step())
            if event is None:
                return
            yield event


def connect_sync(
    address: str,
    *,
    name: str | None = None,
    options: NodeOptions | None = None,
    secret_file: str | os.PathLike[str] | None = None,
    tls: str | os.PathLike[str] | None = None,
    timeout_s: float = CONNECT_S,
) -> SyncClient:
    """The blocking twin of `connect`; use it with `with`. See `connect` for the arguments."""
    return SyncClient(
        lambda: connect(
            address,
            name=name,
            options=options,
            secret_file=secret_file,
            tls=tls,
            timeout_s=timeout_s,
        )
    )


__all__ = ["Client", "SyncClient", "connect", "connect_sync"]
