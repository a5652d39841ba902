"""The one loop between the core and the world.

Everything that happens (a frame, a result, a due time, a death) is turned into a call of the core
with the time; everything the core asks for is performed here, and its result goes back in. No
decision about the protocol is taken here.

All work of a node runs in the context it was opened in, never in that of a handler that happened
to cause it: otherwise a handler's context would leak into timers and tasks of the node.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import os
import signal
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf
from threading import get_ident
from time import monotonic_ns
from typing import Any, Final, Literal, Protocol, cast

import serializers
from migrate.core import records
from migrate.core.actions import (
    Action,
    CheckClass,
    CopyAhead,
    DecodeState,
    DropCopy,
    EncodeState,
    Finish,
    GoLive,
    Point,
    Reach,
    ReadRow,
    Release,
    Result,
    Resume,
    SwapRow,
    TakeChunk,
    WatchRow,
)
from migrate.core.delivery import NEVER, Entry, Outgoing, SendSession
from migrate.core.directory import Row, RowState, decode_news
from migrate.core.events import (
    Checked,
    Decoded,
    DecodeFailed,
    Encoded,
    EncodeFailed,
    RowRead,
    RowSeen,
    SwapOutcome,
    SwapResult,
)
from migrate.core.ids import NodeId, ServerId, TransferId, node_name, number
from migrate.core.incarnation import Incarnation, Plan
from migrate.core.marks import MarkedCore
from migrate.core.messages import (
    CALL,
    CAST,
    CLOSED,
    CYCLE,
    DIVERGED,
    ERROR,
    EXPIRED,
    FORGOTTEN,
    FULL,
    LOST,
    NOT_FOUND,
    OK,
    REFUSED,
    ROLLED_BACK,
    STOPPED,
    TIMED_OUT,
    Message,
    ReleasedAt,
)
from migrate.core.move import MoveTimes, SourcePhase
from migrate.core.node import Core, CoreOptions
from migrate.core.standby import Changed, StandbyTimes
from migrate.errors import (
    CallCycle,
    CallError,
    CallTimeout,
    Fenced,
    MailboxFull,
    MigrateError,
    MoveRolledBack,
    NotPicklable,
    Outcome,
    PeerError,
    ReplayDiverged,
    ResultForgotten,
    RolledBack,
    ServerLost,
    ServerNotFound,
    TargetRefused,
    UsageError,
)
from migrate.options import NodeOptions
from migrate.ref import RefObject, Runtime, current_runtime
from migrate.reports import MoveProgress, MoveReport
from migrate.server import ServerSpec, spec_of
from migrate.shell import classes, inputs, wire
from migrate.shell.directories.base import (
    Compare,
    Directory,
    DirectoryError,
    OutcomeUnknown,
    Put,
)
from migrate.shell.host import Host, Hosted
from migrate.shell.isolation import isolate, isolate_arguments, size_of
from migrate.shell.machine import clock_id
from migrate.shell.peers import BULK_BYTES, Peers
from migrate.shell.pending import Pending
from migrate.shell.precopy import Precopy, merged
from migrate.shell.scope import Scope
from migrate.shell.standbys import StandbyStreams
from migrate.shell.wire import PLAIN
from rpc.frames import MESSAGE_BYTES_MAX, Gathered
from serializers import attributes
from serializers.base import parse_head
from serializers.errors import NotSerializable, SerializerError

log: Final = logging.getLogger("migrate")

SMALL_STATE_BYTES: Final = 64 << 10
"""States known to be smaller are captured on the loop (well under a millisecond); a larger or
unknown one in a thread. Source: pickling runs at about 67 MiB/s here."""

BURST_MAX: Final = 128
"""Requests that may be answered on the caller's own stack before the loop gets a turn: under a
millisecond of handlers that only count."""

STATE_BYTES_MAX: Final = MESSAGE_BYTES_MAX - (1 << 20)
"""A state leaves in one message of the link; the rest is room for what is around it."""

TURN_S: Final = 0.002
"""How long plain handlers are run one after the other before the loop gets a turn: what a call to
another server of the node may have to wait for those of one."""

WATCH_AFTER_S: Final = 0.005
"""How long a target waits before it watches the row of a server that is coming. Between nodes that
are close to each other the move is over by then; between others it begins, all the same, before the
server has to stand still."""

SERVER_KEY: Final = "server/"
NAME_KEY: Final = "name/"


class Rows(Protocol):
    """Reading a server's row: from the directory, or for a client through a node.

    Attributes:
        one_machine: Whether all who swap rows are certainly of one machine.
    """

    one_machine: bool

    async def read(self, server: ServerId) -> tuple[Row | None, int]:
        """The row and its revision; raises DirectoryError where it cannot be known."""

    async def swap(self, row: Row, rev: int) -> SwapResult:
        """Compare-and-swap; never raises but for cancellation."""

    def watch(self, server: ServerId) -> AsyncIterator[tuple[Row, int]]:
        """The row and its revision as it is, and after each change; raises as `read`."""


class DirectoryRows:
    """Rows in a directory of this process."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.one_machine = directory.one_machine

    async def read(self, server: ServerId) -> tuple[Row | None, int]:
        """See `Rows`."""
        entry = await self.directory.get(SERVER_KEY + server)
        if entry is None:
            return None, 0
        return wire.decode_row(entry.value), entry.rev

    async def swap(self, row: Row, rev: int) -> SwapResult:
        """See `Rows`."""
        key = SERVER_KEY + row.server
        try:
            put = Put(key, wire.encode_row(row))
            # A power cut ends every server of this host with its row: nothing to be durable for,
            # but for a journal, which is there after it, and of no use if the row does not name it.
            txn = await self.directory.txn(
                [Compare(key, rev)], [put], [], durable=bool(row.journal)
            )
        except OutcomeUnknown as error:
            return SwapResult(SwapOutcome.UNKNOWN, None, 0, str(error))
        except DirectoryError as error:
            # Whatever else it is, it says that nothing was done.
            return SwapResult(SwapOutcome.NOT_DONE, None, 0, str(error))
        if txn.ok:
            return SwapResult(SwapOutcome.DONE, row, txn.rev)
        entry = txn.entries.get(key)
        if entry is None:
            return SwapResult(SwapOutcome.REFUSED, None, 0)
        return SwapResult(SwapOutcome.REFUSED, wire.decode_row(entry.value), entry.rev)

    async def watch(self, server: ServerId) -> AsyncIterator[tuple[Row, int]]:
        """See `Rows`."""
        key = SERVER_KEY + server
        # NB: from the store's revision, for that of an old row may have left the log.
        entries, rev = await self.directory.list(key)
        for entry in entries:
            if entry.key == key:
                yield wire.decode_row(entry.value), entry.rev
        async for changes in self.directory.watch(key, rev + 1):
            for change in changes:
                if change.key == key and change.value is not None:
                    yield wire.decode_row(change.value), change.rev


@dataclass(slots=True)
class MoveWatch:
    """What the shell keeps of an outgoing move: who waits, and the measured times."""

    future: asyncio.Future[MoveReport]
    server: ServerId
    target: NodeId
    started_s: float
    quiesced_s: float = 0.0
    released_s: float = 0.0
    bytes_sent: int = 0
    rounds: int = 1
    round_bytes: list[int] = field(default_factory=list)
    error: BaseException | None = None
    copy: Incarnation | None = None
    state: Gathered | None = None


class Driver:
    """Runs one core. See the module's text; `Port` for the methods the core calls."""

    def __init__(
        self,
        *,
        node: NodeId,
        options: NodeOptions,
        rows: Rows,
        failpoints: FailPoints | None = None,
    ) -> None:
        self.node = node
        self.options = options
        self.loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self.context = contextvars.copy_context()
        self.context.run(current_runtime.set, None)
        self.rows = rows
        self.failpoints = failpoints
        self.closed = False
        self.runtime: Runtime = self  # what refs in results are bound to
        self._tasks: set[asyncio.Task[Any]] = set()
        self._todo: deque[Callable[[], None]] = deque()
        self._todo_scheduled = False
        self._doing = False
        self._wake: asyncio.TimerHandle | None = None
        self._moves: dict[TransferId, MoveWatch] = {}
        self._copies: dict[TransferId, Hosted] = {}  # arrived, and not yet released
        self._row_watches: dict[TransferId, asyncio.Task[None]] = {}
        self._on_stopped: Callable[[Incarnation], Coroutine[Any, Any, None]] | None = None
        self._on_standbys: Callable[[ServerId, NodeId, Changed, str], None] | None = None
        self._on_arrived: Callable[[ServerId], None] | None = None
        self._on_due: Callable[[Incarnation, Plan], Coroutine[Any, Any, None]] | None = None
        self._burst = BURST_MAX
        self._default_ms = (
            0 if options.call_timeout_s is None else int(options.call_timeout_s * 1000)
        )
        self.host = Host(self, options)
        self.precopy = Precopy(self)
        self._bind_standbys(StandbyStreams(self))
        self._round_waiters: list[asyncio.Future[None]] = []
        # `Port.run`, bound once: it is on the per-message path.
        self.run = self.host.run
        # Only where fail points may be set does a message pay for the steps it passes.
        core: type[Core] = Core if failpoints is None else MarkedCore
        self.core = core(node, self, core_options(options), self.now_ms())
        self.core.marks = failpoints is not None

    def attach(self, peers: Peers) -> None:
        """Set where messages go; before anything happens."""
        # Bound once: these are on the per-message path.
        self.send = peers.send
        self.flush = peers.flush
        self.flush_soon = peers.flush_soon
        self.peers = peers
        if self.failpoints is None:
            # With fail points, what was sent leaves when the next one is reached (`reach`).
            self.core.hurry = peers.flush

    def _bind_standbys(self, streams: StandbyStreams) -> None:
        # See `StandbyPort`; bound once, as some are on the per-message path.
        self.streams = streams
        self.capture = streams.capture
        self.may_wait = streams.may_wait
        self.digest = streams.digest
        self.wall_s = streams.wall_s
        self.code_of = streams.code_of
        self.journal = streams.journal
        self.journal_goes_on = streams.journal_goes_on
        self.copy_for = streams.copy_for
        self.has_stream = streams.has_stream
        self.adopt_stream = streams.adopt_stream
        self.end_stream = streams.end_stream
        self.check_follow = streams.check_follow
        self.keep_chunk = streams.keep_chunk
        self.keep_delta = streams.keep_delta
        self.configure = streams.configure
        self.load_backup = streams.load_backup
        self.promote = streams.promote
        self.read_standby_row = streams.read_standby_row
        self.begin = streams.begin
        self.deposed = streams.deposed

    # ------------------------------------------------------------------ time and tasks

    @staticmethod
    def now_ms() -> int:
        """Milliseconds of the machine's monotonic clock, which its processes share."""
        return time.monotonic_ns() // 1_000_000

    def task(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run a piece of the node's own work until the driver closes."""
        task = asyncio.Task(work, loop=self.loop, context=self.context.copy(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended, context=self.context)
        return task

    def _task_now(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """As `task`, but its first step is taken here, not in the next turn of the loop."""
        try:
            waits_for = work.send(None)
        except StopIteration:
            return
        self.task(_go_on(work, waits_for), name)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s failed; please report this", task.get_name(), exc_info=task.exception())

    def _soon(self, do: Callable[[], None]) -> None:
        """Do something after the core's present call has returned."""
        self._todo.append(do)
        if not self._todo_scheduled:
            self._schedule_todo()

    def _schedule_todo(self) -> None:
        self._todo_scheduled = True
        self.loop.call_soon(self._do_all, context=self.context)

    def _do_all(self) -> None:
        self._todo_scheduled = False
        self._do_now()
        self.flush()

    def _do_now(self) -> None:
        """Do at once, in order, what would otherwise wait for the next turn of the loop."""
        if self._doing:
            return
        self._doing = True
        try:
            while self._todo:
                self._todo.popleft()()
        finally:
            self._doing = False
            if self._todo and not self._todo_scheduled:
                self._schedule_todo()  # one has failed; the others have their turn

    async def close(self) -> None:
        """Stop everything; whoever waits on this node is told."""
        self.closed = True
        if self._wake is not None:
            self._wake.cancel()
        self.core.close(self.now_ms())
        for watch in self._moves.values():
            if not watch.future.done():
                watch.future.cancel()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.host.close()

    # ------------------------------------------------------------------ calls

    def cast(
        self,
        ref: RefObject,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> Pending:
        """See `migrate.ref.Runtime`."""
        return self._request(ref, method, args, kwargs, timeout_s, CAST)

    def _request(
        self,
        ref: RefObject,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
        kind: int = CALL,
    ) -> Pending:
        self._burst -= 1
        if self._burst < 0:
            # A caller that is answered on its own stack never lets the loop turn by itself.
            self._burst = BURST_MAX
            self.crowd()
        pending = Pending(loop=self.loop)
        pending.driver = self
        pending.session = pending.out = None
        server = pending.server = ref._server_id
        pending.method = method
        if get_ident() != self._thread:
            raise UsageError(
                f"{method!r} of server {server} was called in another thread than that of the "
                "node's or client's loop: make the handler `async def`, or use "
                "`migrate.connect_sync` in threads",
                server=server,
            )
        pending.timeout_s = timeout_s
        core = self.core
        now_ms = monotonic_ns() // 1_000_000
        if timeout_s is None:
            deadline = now_ms + self._default_ms if self._default_ms else 0
        elif timeout_s == inf:
            deadline = 0
        else:
            deadline = now_ms + max(1, int(timeout_s * 1000))
        scope = current_runtime.get()
        wait = True
        chain: tuple[str, ...] = ()
        run = ""
        sender = core.own
        if scope is None:
            pass
        elif type(scope) is Scope and scope.driver is self:
            sender = scope.inc.sender
            # Also of a cast: if a failover breaks the run off, it has to be made again as it was.
            run = scope.run_id()
            if kind == CALL:
                chain = scope.chain()
            else:
                # A handler that waited for room in a mailbox could wait for itself.
                wait = False
        elif type(scope) is inputs.Shadow:
            return pending  # Its owner has made this request.
        payload: bytes | None = None
        live: Any = None
        try:
            hosted = core.hosted.get(server)
            if hosted is not None:
                live = (args, kwargs)
                # What `wire.pack_args` asks first, without a call more for each message.
                for value in (*args, *kwargs.values()) if kwargs else args:
                    if type(value) not in PLAIN:
                        if not _shares(hosted):
                            live = isolate_arguments(args, kwargs, self)
                            if type(live) is bytes:
                                payload, live = live, None
                        break
            else:
                payload = wire.pack_args(args, kwargs)
                if len(payload) > self.options.message_bytes_max:
                    pending.set_exception(_too_large(len(payload), self.options, server, method))
                    return pending
                if server not in core.routes and ref._node_hint and "@" in ref._node_hint:
                    core.route_hint(server, ref._node_hint, ref._epoch_hint)
        except SerializerError as error:
            what = f"an argument of {method!r}"
            pending.set_exception(wire.unpackable(what, error, Outcome.NOT_DONE))
            return pending
        if self.closed:
            pending.set_exception(self._error(CLOSED, b"", False, pending))
            return pending
        out = pending.out = Outgoing(kind, method, payload, live, chain, deadline, pending, run)
        session = pending.session = core.request(sender, server, out, now_ms, wait=wait)
        if session is None:
            pending.set_exception(self._error(FULL, b"", False, pending))
        return pending

    # See `migrate.ref.Runtime`; by its own name, for it is on the per-message path.
    call = _request

    def crowd(self) -> None:
        """Let the loop turn before more messages are handed out."""
        self.host.turn_until_s = math.inf
        if not self.core.crowded:
            self.core.crowded = True
            self.loop.call_soon(self._turned, context=self.context)

    def _turned(self) -> None:
        self.core.crowded = False

    def cancelled(self, session: SendSession, out: Outgoing) -> None:
        """Nobody waits for a request any more."""
        self.core.cancel(session, out, self.now_ms())

    # ------------------------------------------------------------------ Port

    def resolve(self, token: object, status: int, payload: bytes | None, value: object) -> None:
        """See `Port.resolve`."""
        pending: Pending = token  # type: ignore[assignment]
        if pending.done():
            return
        pending.out = None  # Its arguments may be large, and whoever waits may keep the future.
        if status == OK:
            try:
                if payload is not None:
                    value = wire.unpack(payload, self.runtime) if payload else None
                elif type(value) not in PLAIN and not _shares(self.core.hosted.get(pending.server)):
                    value = isolate(value, self)
            except SerializerError as error:
                what = f"the result of {pending.method!r}"
                pending.set_exception(wire.unpackable(what, error, Outcome.DONE))
            except Exception as error:
                failed = CallError(
                    f"the result of {pending.method!r} cannot be rebuilt here: {error}",
                    server=pending.server,
                    cause=str(error),
                    outcome=Outcome.DONE,
                )
                failed.__cause__ = error
                pending.set_exception(failed)
            else:
                pending.set_result(value)
        elif status == ERROR and payload is None:
            _raise_in(pending, value)  # type: ignore[arg-type]
        else:
            _raise_in(pending, self._error(status, payload or b"", value, pending))

    def _error(self, status: int, payload: bytes, sent: object, pending: Pending) -> BaseException:
        """The exception for a reply's status. `sent`: whether it ever left this sender."""
        server, method = pending.server, pending.method
        if status == ERROR:
            return wire.unpack_error(payload, self.runtime, server)
        text = payload.decode("utf-8", "replace")
        what = f"{method!r} of server {server}"
        unsure = Outcome.UNKNOWN if sent else Outcome.NOT_DONE
        match status:
            case _ if status == TIMED_OUT:
                timeout_s = pending.timeout_s or self.options.call_timeout_s
                return CallTimeout(
                    f"no reply to {what} within {timeout_s:g} s; it may have run, or may yet",
                    server=server,
                    timeout_s=timeout_s,
                    outcome=unsure,
                )
            case _ if status == EXPIRED:
                return CallTimeout(
                    f"{what} was not begun when its time was over, and was not run",
                    server=server,
                    timeout_s=pending.timeout_s or self.options.call_timeout_s,
                    outcome=Outcome.NOT_DONE,
                )
            case _ if status == FULL:
                return MailboxFull(
                    f"the mailbox has no room for {what}; nothing was done, try again later",
                    server=server,
                )
            case _ if status == CYCLE:
                chain = tuple(run.rpartition("/")[0] or run for run in text.split("\n"))
                return CallCycle(
                    f"{what} would wait for itself: {' -> '.join(chain)}; make one of the calls a "
                    "cast, or the class @server(reentrant=True)",
                    server=server,
                    chain=chain,
                )
            case _ if status == NOT_FOUND or status == STOPPED:
                return ServerNotFound(
                    f"{what}: there is no such server; it was stopped, or never was",
                    server=server,
                    outcome=unsure if status == NOT_FOUND else Outcome.NOT_DONE,
                )
            case _ if status == LOST:
                return ServerLost(
                    f"{what}: the server is lost: {text}",
                    server=server,
                    cause=text,
                    outcome=unsure,
                )
            case _ if status == FORGOTTEN:
                return ResultForgotten(
                    f"{what}: its completion record is no longer kept, so its result cannot be "
                    "told",
                    server=server,
                )
            case _ if status == ROLLED_BACK:
                news = decode_news(payload)
                done = "it may have run before that" if sent else "it was not run"
                return RolledBack(
                    f"{what}: the server went back in time, to {_utc(news.then_s)}, at "
                    f"{_utc(news.now_s)}; what it acknowledged in between is undone, and {done}; "
                    "further requests reach it as it is now",
                    server=server,
                    then=news.then_s,
                    now=news.now_s,
                    outcome=unsure,
                )
            case _ if status == DIVERGED:
                return ReplayDiverged(
                    f"{what}: its owner died in the middle of it, and when it was run again it "
                    "made other calls than before; what the first run has done stays",
                    server=server,
                )
            case _ if status == REFUSED:
                return CallError(
                    f"{what} was refused: {text}",
                    server=server,
                    cause=text,
                    outcome=Outcome.NOT_DONE,
                )
            case _ if status == CLOSED:
                return CallError(
                    f"{what}: node or client {node_name(self.node)} was closed before a reply came",
                    server=server,
                    node=node_name(self.node),
                    cause="closed",
                    outcome=Outcome.UNKNOWN if sent is not False else Outcome.NOT_DONE,
                )
        return PeerError(f"{what}: a peer answered with the unknown status {status}", server=server)

    def pack(self, args: object) -> bytes:
        """See `Port.pack`."""
        live: Any = args
        return wire.pack_args(live[0], live[1])

    def size(self, inc: Incarnation, args: object) -> int:
        """See `Port.size`. References to what is somebody else's too count as nothing."""
        live: Any = args
        return 0 if _shares(inc) else size_of(live[0], live[1])

    def pack_result(self, status: int, value: object) -> tuple[int, bytes]:
        """See `Port.pack_result`."""
        return self.host.pack_result(status, value)

    def look_up(self, server: ServerId) -> None:
        """See `Port.look_up`."""
        self.task(self._look_up(server), f"look-up of {server}")

    async def _look_up(self, server: ServerId) -> None:
        row: Row | None = None
        known = True
        try:
            row, _ = await self.rows.read(server)
        except (DirectoryError, MigrateError) as error:
            log.debug("look-up of %s failed: %s", server, error)
            known = False
        except Exception:
            # NB: whatever it is, requests wait for the word that comes now.
            log.exception("look-up of %s failed; please report this", server)
            known = False
        self.core.located(server, known, row, self.now_ms())
        self.flush()

    def look_up_senders(self, servers: list[ServerId]) -> None:
        """See `Port.look_up_senders`."""
        self.task(self._look_up_senders(servers), "look-up of senders")

    async def _look_up_senders(self, servers: list[ServerId]) -> None:
        gone = {}
        for server in servers:
            try:
                row, _ = await self.rows.read(server)
            except (DirectoryError, MigrateError):
                continue
            ended = row is None or row.state is RowState.LOST
            gone[server] = NEVER if row is None or ended else row.generation
        self.core.senders_gone(gone, self.now_ms())

    def wake_at(self, due_ms: int) -> None:
        """See `Port.wake_at`."""
        if self.closed:
            return
        if self._wake is not None:
            self._wake.cancel()
        # NB: half a millisecond late rather than early, or it would fire twice.
        self._wake = self.loop.call_at(due_ms / 1000 + 0.0005, self._tick, context=self.context)

    def _tick(self) -> None:
        self._wake = None
        self.core.tick(self.now_ms())
        self.flush()

    def pump_later(self, inc: Incarnation) -> None:
        """See `Port.pump_later`."""
        self.loop.call_soon(self._pump, inc, context=self.context)

    def _pump(self, inc: Incarnation) -> None:
        self.host.turn_until_s = time.monotonic() + TURN_S
        self.core.pump(inc, self.now_ms())
        self.host.turn_until_s = math.inf
        self.flush_soon()

    def received(self, node: NodeId, messages: list[Message]) -> list[Message]:
        """Take the messages of one frame; returns those that are not the core's."""
        self.host.turn_until_s = time.monotonic() + TURN_S
        # What comes up is done below, in this turn of the loop.
        scheduled, self._todo_scheduled = self._todo_scheduled, True
        try:
            rest = self.core.receive(node, messages, self.now_ms())
        except BaseException:
            self._schedule_todo()
            raise
        self._todo_scheduled = scheduled
        self.host.turn_until_s = math.inf
        if rest and self._moves:
            rest = [message for message in rest if not self._take_release(message)]
        if self._todo:
            # What is ready to leave does not wait for what is still to be done.
            self.flush()
            self._do_now()
        self.flush_soon()
        return rest

    def stopped(self, inc: Incarnation) -> None:
        """See `Port.stopped`."""
        if self._on_stopped is not None:
            self.task(self._on_stopped(inc), f"stop of {inc.id}")

    def on_stopped(self, do: Callable[[Incarnation], Coroutine[Any, Any, None]]) -> None:
        """Set what is done when a server that was asked to stop is quiet."""
        self._on_stopped = do

    def quiesced(self, inc: Incarnation, entry: Entry) -> None:
        """See `Port.quiesced`."""
        waiting: Any = entry.args
        if waiting.done():
            # Whoever asked has been cancelled.
            self._soon(lambda: self.go_on(inc, entry))
        else:
            waiting.set_result((inc, entry))

    def not_quiesced(self, token: object) -> None:
        """See `Port.not_quiesced`."""
        waiting: Any = token
        if not waiting.done():
            waiting.set_result(None)

    def go_on(self, inc: Incarnation, entry: Entry) -> None:
        """End what `quiesced` began."""
        self.core.finish(inc, entry, OK, None, None, self.now_ms())
        # It holds the future whose result holds it and the server: a ring, which would keep a copy
        # that has moved away, and its arrays, until the collector comes by.
        entry.args = None
        self.flush()

    def go_on_handing_out(self, server: ServerId) -> None:
        """A wait for a quiescent point was given up: what waited behind it goes on."""
        inc = self.core.hosted.get(server)
        if inc is not None:
            self.core.pump(inc, self.now_ms())
            self.flush()

    def checkpoint_due(self, inc: Incarnation, plan: Plan) -> None:
        """See `Port.checkpoint_due`."""
        if self._on_due is not None:
            self.task(self._on_due(inc, plan), f"checkpoint of {inc.id}")

    def on_checkpoint_due(
        self, do: Callable[[Incarnation, Plan], Coroutine[Any, Any, None]]
    ) -> None:
        """Set how a checkpoint is taken that is taken again and again."""
        self._on_due = do

    def standbys_changed(self, server: ServerId, node: NodeId, what: Changed, cause: str) -> None:
        """See `StandbyPort.standbys_changed`."""
        if cause.startswith(inputs.DIVERGED):
            self.streams.diverged(server, cause)
        if self._on_standbys is not None:
            tell = self._on_standbys
            self._soon(lambda: tell(server, node, what, cause))

    def on_arrived(self, do: Callable[[ServerId], None]) -> None:
        """Set who is told of servers that have moved here."""
        self._on_arrived = do

    def on_standbys_changed(self, do: Callable[[ServerId, NodeId, Changed, str], None]) -> None:
        """Set who is told of what happens to the standbys of servers here."""
        self._on_standbys = do

    async def move_ended(self, server: ServerId) -> None:
        """Wait until no move of a server away from here is under way."""
        waiting = [watch.future for watch in self._moves.values() if watch.server == server]
        if waiting:
            await asyncio.wait(waiting)

    # ------------------------------------------------------------------ moves

    async def move(self, server: ServerId, target: NodeId) -> MoveReport:
        """Move a server hosted here, and wait for the outcome.

        The caller has checked the request (see `Core.move`). Cancelling the wait does not
        cancel the move.
        """
        inc = self.core.hosted[server]
        host: Hosted = inc.host  # type: ignore[assignment]
        transfer = f"{server}/{uuid.uuid4().hex[:16]}"
        watch = self._moves[transfer] = MoveWatch(
            self.loop.create_future(), server, target, time.monotonic(), copy=inc
        )
        try:
            self._refuse_code(host, target)
        except BaseException:
            del self._moves[transfer]
            raise
        self.core.move(server, target, transfer, host.by_value, wire.PYTHON, self.now_ms())
        self.flush()
        return await asyncio.shield(watch.future)

    def _refuse_code(self, host: Hosted, target: NodeId) -> None:
        """Refuse, before anything stops, code by value for a node of another Python.

        The target refuses a class by value itself. This is for functions and classes that the
        state of an importable class holds: it is captured on trial, which is worth it only if the
        versions differ.
        """
        peer = self.peers.links.peer(target)
        python = (
            next(
                (f[len(wire.PYTHON_IS) :] for f in peer.features if f.startswith(wire.PYTHON_IS)),
                "",
            )
            if peer is not None
            else ""
        )
        if python in ("", wire.PYTHON) or host.by_value:
            return
        try:
            snapshot = serializers.encode(host.obj)
        except Exception as error:
            # In the middle of a message it need not be ready to travel; the move will see.
            log.debug("a trial capture failed", exc_info=error)
            return
        if not parse_head(snapshot.head).code_by_value:
            return
        source = node_name(self.node)
        raise TargetRefused(
            f"node {node_name(target)} runs {python}, and the state holds code by value, which "
            f"only {wire.PYTHON} can load; put the functions and classes that it refers to into a "
            f"module that both can import. The server goes on serving at {source}",
            server=host.ref._server_id,
            node=source,
            source=source,
            target=node_name(target),
            cause="code by value for another Python",
        )

    def perform(self, transfer: TransferId, incoming: bool, action: Action) -> None:
        """See `Port.perform`."""
        match action:
            case Reach():
                self.reach(action.point)
            case EncodeState():
                watch = self._moves.get(transfer)
                if watch is not None:
                    watch.quiesced_s = time.monotonic()
                self._soon(lambda: self._encode(transfer, action))
            case DecodeState():
                self._soon(lambda: self._decode(transfer, action))
            case CopyAhead():
                self._soon(lambda: self.precopy.copy(transfer))
            case TakeChunk():
                self.precopy.take(transfer, action)
            case SwapRow():
                self._task_now(self._swap(transfer, incoming, action), f"swap of {transfer}")
            case ReadRow():
                self.task(self._read_row(transfer, incoming), f"row of {transfer}")
            case WatchRow() if self.rows.one_machine:
                pass  # Word of a swap comes as soon as a watch shows it.
            case WatchRow():
                watching = self.task(self._watch_row(transfer), f"watch of the row of {transfer}")
                self._row_watches[transfer] = watching
            case CheckClass():
                self._soon(lambda: self._check_class(transfer, action))
            case GoLive():
                self._end_row_watch(transfer)
                target = self.core.moves_in[transfer]
                self.begin_serving(self.core.hosted[target.server], "on_arrive")
            case Resume():
                watch = self._moves.get(transfer)
                if watch is not None and watch.state is not None:
                    # The object is going to change, and what is on its way shares its memory.
                    watch.state.settle()
                    watch.state = None
                inc = self.core.hosted.get(watch.server) if watch is not None else None
                if inc is not None:
                    host: Hosted = inc.host  # type: ignore[assignment]
                    self.begin_serving(inc, "on_stay" if host.departed else "")
                    host.departed = False
            case DropCopy() if incoming:
                # Its handlers may have begun; what they do is seen by nobody any more.
                copy = self._copies.pop(transfer, None)
                if copy is not None:
                    self.host.cancel(copy)
            case Finish() if incoming:
                self._end_row_watch(transfer)
                self._copies.pop(transfer, None)
                self.precopy.ended(transfer, incoming=True)
            case Finish():
                self.precopy.ended(transfer, incoming=False)
                # After what else came in the same frame: the time of the release.
                self._soon(lambda: self._finished(transfer, action))
            case Release():
                target = self.core.moves_in[transfer]
                at = ReleasedAt(transfer, clock_id(), time.monotonic_ns())
                self.send(target.source, at)
                if self._on_arrived is not None:
                    arrived, server = self._on_arrived, target.server
                    self._soon(lambda: arrived(server))
            case _:
                pass  # DropCopy: the object goes with its last reference

    def round_ended(self, transfer: TransferId, size_bytes: int) -> None:
        """A round of pre-copy has ended: tell whoever waits for that."""
        watch = self._moves.get(transfer)
        if watch is None:
            return
        watch.round_bytes.append(size_bytes)
        waiting, self._round_waiters = self._round_waiters, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def rounds(
        self, server: ServerId, seen: tuple[TransferId, int], timeout_s: float
    ) -> tuple[TransferId, str, int, list[int]] | None:
        """Wait for rounds of a move from here that have not been seen.

        Args:
            server: Hosted here.
            seen: The move of which rounds were seen, and how many of them.
            timeout_s: How long to wait.

        Returns:
            The move, its target's name, how many rounds ended before, and bytes of each since;
            None if none ended in that time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    transfer = self.core.leaving.get(server, "")
                    watch = self._moves.get(transfer)
                    before = seen[1] if transfer == seen[0] else 0
                    if watch is not None and len(watch.round_bytes) > before:
                        since = watch.round_bytes[before:]
                        return transfer, node_name(watch.target), before, since
                    future = self.loop.create_future()
                    self._round_waiters.append(future)
                    try:
                        await future
                    finally:
                        with contextlib.suppress(ValueError):
                            self._round_waiters.remove(future)
        except TimeoutError:
            return None

    def progress(self, server: ServerId) -> MoveProgress | None:
        """How far a server hosted here is on its way to another node; None if it stays."""
        transfer = self.core.leaving.get(server)
        watch = self._moves.get(transfer) if transfer is not None else None
        if watch is None:
            return None
        source = self.core.moves_out.get(cast(str, transfer))
        return MoveProgress(
            target=node_name(watch.target),
            step="waiting" if source is None else _STEPS.get(source.phase, "moving"),
            rounds=0 if source is None else source.rounds,
            bytes_sent=0 if source is None else source.copied_bytes,
            seconds=time.monotonic() - watch.started_s,
        )

    def _take_release(self, message: Message) -> bool:
        """Note when a target let out what it held back, if it shares this machine's clock."""
        if not isinstance(message, ReleasedAt):
            return False
        watch = self._moves.get(message.move)
        if watch is not None and message.boot == clock_id():
            watch.released_s = message.at_ns / 1e9
        return True

    def move_event(self, transfer: TransferId, incoming: bool, event: Any) -> None:
        """The core is told the result of an action of a move."""
        self.core.move_event(transfer, incoming, event, self.now_ms())
        if self._todo:
            self.flush()
            self._do_now()
        self.flush()

    def begin_serving(self, inc: Incarnation, hook: str) -> None:
        """Run the hook that comes before the first message, then serve."""
        host: Hosted = inc.host  # type: ignore[assignment]
        if hook and hook in host.spec.hooks:
            self.task(self._hook_then_serve(inc, hook), f"{hook} of {inc.id}")
        else:
            self._soon(lambda: self.core.started(inc.id, self.now_ms()))

    async def _hook_then_serve(self, inc: Incarnation, hook: str) -> None:
        try:
            await self.host.hook(inc, hook, self.options.hook_timeout_s)
        except Exception:
            log.exception("%s of server %s failed; the server serves", hook, inc.id)
        self.streams.hook_ran(inc)
        self.core.started(inc.id, self.now_ms())
        self.flush()

    # -- source

    def _encode(self, transfer: TransferId, action: EncodeState) -> None:
        source = self.core.moves_out.get(transfer)
        inc = self.core.hosted.get(source.server) if source is not None else None
        if inc is None:
            return
        host: Hosted = inc.host  # type: ignore[assignment]
        small = not action.ahead and 0 <= host.state_bytes < SMALL_STATE_BYTES
        if "on_depart" in host.spec.hooks or not small:
            self.task(self._encode_slowly(transfer, inc, action), f"capture of {inc.id}")
            return
        self.move_event(transfer, False, self._captured(transfer, self._capture, action))

    async def _encode_slowly(
        self, transfer: TransferId, inc: Incarnation, action: EncodeState
    ) -> None:
        host: Hosted = inc.host  # type: ignore[assignment]
        if "on_depart" in host.spec.hooks:
            host.departed = True
            try:
                await self.host.hook(inc, "on_depart", self.options.hook_timeout_s)
            except Exception as error:
                self._keep_error(transfer, error)
                failed = EncodeFailed(f"on_depart failed: {wire.exception_name(error)}: {error}")
                self.move_event(transfer, False, failed)
                return
        event = self._captured(transfer, self._freeze)
        if isinstance(event, tuple):
            obj, record = event
            event = await asyncio.to_thread(
                self._captured, transfer, self._encode_object, host, obj, record, action
            )
        self.move_event(transfer, False, event)

    def _captured(self, transfer: TransferId, capture: Callable[..., Any], *args: Any) -> Any:
        """Run a step of the capture; a failure becomes the event that says so."""
        try:
            return capture(transfer, *args)
        except NotSerializable as error:
            self._keep_error(transfer, error)
            return EncodeFailed(str(error), error.path or "?")
        except Exception as error:
            self._keep_error(transfer, error)
            return EncodeFailed(f"{wire.exception_name(error)}: {error}", "?")

    def _keep_error(self, transfer: TransferId, error: BaseException) -> None:
        watch = self._moves.get(transfer)
        if watch is not None:
            watch.error = error

    def _freeze(self, transfer: TransferId) -> Any:
        inc = self.core.freeze(transfer, self.now_ms())
        if inc is None:
            return EncodeFailed("the move ended before the server was frozen")
        host: Hosted = inc.host  # type: ignore[assignment]
        return host.obj, self.core.export(inc, self.now_ms())

    def _capture(self, transfer: TransferId, action: EncodeState) -> Any:
        frozen = self._freeze(transfer)
        if isinstance(frozen, EncodeFailed):
            return frozen
        obj, record = frozen
        host: Any = self.core.hosted[self.core.moves_out[transfer].server].host
        return self._encode_object(transfer, host, obj, record, action)

    def _encode_object(
        self,
        transfer: TransferId,
        host: Hosted,
        obj: Any,
        record: records.StateRecord,
        action: EncodeState,
    ) -> Encoded:
        if action.ahead:
            pieces = merged(self.precopy.last(transfer))
        else:
            if action.version != host.spec.version:
                # The target has a newer class: it gets the state apart, for its `upgrade`.
                obj = classes.Apart(attributes.encode(obj)[0].to_bytes())
            # Else alone, so that the path in an error begins at the server.
            pieces = serializers.encode(obj).pieces()
        head = wire.encode_state(record)
        watch = self._moves.get(transfer)
        source = self.core.moves_out.get(transfer)
        state: bytes | Gathered
        if sum(map(len, pieces)) <= BULK_BYTES:
            state = classes.join(head, b"".join(pieces))
        else:
            state = classes.gather(head, pieces)
            if watch is not None:
                # In this thread, as it may be large.
                watch.state = state = self.peers.ready(watch.target, state)
        if len(state) > STATE_BYTES_MAX:
            raise UsageError(
                f"the state has {len(state)} bytes; up to {STATE_BYTES_MAX} can be moved"
            )
        ahead = source.copied_bytes if source is not None else 0
        if not action.stream:
            host.state_bytes = ahead + len(state)
        if watch is not None:
            watch.bytes_sent = ahead + len(state)
            watch.rounds = 1 + (source.rounds if source is not None else 0)
        # The core moves what stands for the bytes, and asks for nothing but their number.
        return Encoded(cast(bytes, state))

    def _finished(self, transfer: TransferId, action: Finish) -> None:
        watch = self._moves.pop(transfer, None)
        if watch is None or watch.future.done():
            return
        source, target = node_name(self.node), node_name(watch.target)
        where: dict[str, Any] = {
            "server": watch.server,
            "node": source,
            "source": source,
            "target": target,
            "cause": action.reason or None,
        }
        error: MigrateError
        match action.result:
            case Result.MOVED:
                now = time.monotonic()
                # What the target's clock says where it is ours too; else when we heard of it,
                # which is up to half a round trip later.
                released = watch.released_s
                if not watch.quiesced_s <= released <= now:
                    released = now
                copy = watch.copy
                to = copy.forwarding_to if copy is not None else None
                watch.future.set_result(
                    MoveReport(
                        source=source,
                        target=target,
                        epoch=to[1] if to is not None else 0,
                        downtime_s=released - watch.quiesced_s,
                        total_s=now - watch.started_s,
                        bytes_sent=watch.bytes_sent,
                        rounds=watch.rounds,
                    )
                )
                return
            case Result.REFUSED:
                error = TargetRefused(
                    f"node {target} does not take the server: {action.reason}; it goes on serving "
                    f"at {source}",
                    **where,
                )
            case Result.NOT_PICKLABLE:
                path = getattr(watch.error, "path", "") or ""
                problems = tuple(map(str, getattr(watch.error, "problems", ())))
                error = NotPicklable(
                    f"the state cannot travel: {action.reason}; the server goes on serving at "
                    f"{source}",
                    path=path,
                    problems=problems,
                    **where,
                )
            case Result.FENCED:
                error = Fenced(
                    f"another owner or a newer epoch stands in the directory: {action.reason}",
                    server=watch.server,
                    node=source,
                    cause=action.reason,
                )
            case _:
                error = MoveRolledBack(
                    f"the move to {target} was rolled back: {action.reason}; the server serves at "
                    f"{source}",
                    **where,
                )
        error.__cause__ = watch.error
        watch.future.set_exception(error)
        # Whoever asked may be gone; the failure was told to the log then.
        watch.future.exception()

    # -- target

    def _check_class(self, transfer: TransferId, action: CheckClass) -> None:
        if action.by_value:
            refusal = ""
            if action.python != wire.PYTHON:
                refusal = (
                    f"the class travels by value from {action.python}, and this node runs "
                    f"{wire.PYTHON}; put the class into a module that both can import"
                )
            version = self.core.moves_in[transfer].prepare.version
            self.move_event(transfer, True, Checked(version, refusal))
            return
        spec = classes.known(action.cls)
        if spec is not None:
            self.move_event(transfer, True, self._checked(action.cls, spec))
            return
        self.task(self._import_class(transfer, action.cls), f"import of {action.cls}")

    async def _import_class(self, transfer: TransferId, name: str) -> None:
        try:
            spec = await asyncio.to_thread(classes.find, name)
        except Exception as error:
            reason = f"class {name} cannot be had there: {wire.exception_name(error)}: {error}"
            self.move_event(transfer, True, Checked(0, reason))
            return
        self.move_event(transfer, True, self._checked(name, spec))

    def _checked(self, name: str, spec: ServerSpec) -> Checked:
        if len(self.core.hosted) >= self.options.servers_max:
            return Checked(0, f"it holds its limit of {self.options.servers_max} servers")
        return Checked(spec.version)

    def _decode(self, transfer: TransferId, action: DecodeState) -> None:
        if len(action.state) < SMALL_STATE_BYTES and not action.ahead:
            loaded = self._load_caught(transfer, action)
            self.move_event(transfer, True, self._install(transfer, loaded))
        else:
            self.task(self._decode_slowly(transfer, action), f"load of {transfer}")

    async def _decode_slowly(self, transfer: TransferId, action: DecodeState) -> None:
        loaded = await asyncio.to_thread(self._load_caught, transfer, action)
        self.move_event(transfer, True, self._install(transfer, loaded))

    def _load_caught(self, transfer: TransferId, action: DecodeState) -> Any:
        try:
            return self._load(transfer, action)
        except Exception as error:
            log.debug("load of %s failed", transfer, exc_info=error)
            return DecodeFailed(f"{wire.exception_name(error)}: {error}")

    def _load(self, transfer: TransferId, action: DecodeState) -> Any:
        state = action.state
        limit = self.options.state_bytes_max
        if len(state) > limit:
            raise UsageError(f"the state has {len(state)} bytes; state_bytes_max there is {limit}")
        if action.ahead:
            head, chunk = classes.split_last(state)
            obj, size = self.precopy.load(transfer, chunk)
            return obj, wire.decode_state(head), size
        head, body = classes.split(state)
        record = wire.decode_state(head)
        obj = wire.unpack_state(body, self)
        if isinstance(obj, classes.Apart | classes.Bare):
            target = self.core.moves_in.get(transfer)
            from_version = target.prepare.version if target is not None else 0
            if isinstance(obj, classes.Apart):
                obj = classes.put_together(obj, from_version, self)
            else:
                obj = classes.upgraded(obj.cls, obj.state, from_version)
        return obj, record, len(state)

    def _install(self, transfer: TransferId, loaded: Any) -> Any:
        if isinstance(loaded, DecodeFailed):
            return loaded
        obj, record, size = loaded
        target = self.core.moves_in.get(transfer)
        if target is None:
            return DecodeFailed("the move ended while its state was loaded")
        spec = spec_of(type(obj))
        ref = RefObject(target.server, spec.class_info, self)
        host = Hosted(obj, spec, ref, self)
        host.by_value = target.prepare.by_value
        host.state_bytes = size
        try:
            if self.core.install(transfer, record, host, self.now_ms()) is None:
                return DecodeFailed("the move ended while its state was loaded")
        except PeerError as error:
            return DecodeFailed(str(error))
        self._copies[transfer] = host
        return Decoded()

    # -- rows

    async def _swap(self, transfer: TransferId, incoming: bool, action: SwapRow) -> None:
        try:
            result = await self.rows.swap(action.row, action.rev)
        except Exception as error:  # the move waits for exactly one result
            log.exception("swap of %s failed", action.row.server)
            result = SwapResult(SwapOutcome.UNKNOWN, None, 0, str(error))
        if result.outcome is SwapOutcome.DONE and not incoming:
            self.reach(Point.SWAP_DONE)
        self.move_event(transfer, incoming, result)

    async def _read_row(self, transfer: TransferId, incoming: bool) -> None:
        moves: Any = self.core.moves_in if incoming else self.core.moves_out
        move = moves.get(transfer)
        if move is None:
            return
        try:
            row, rev = await self.rows.read(move.server)
        except (DirectoryError, MigrateError) as error:
            log.debug("reading the row of %s failed: %s", move.server, error)
            self.move_event(transfer, incoming, RowRead(False, None, 0))
            return
        self.move_event(transfer, incoming, RowRead(True, row, rev))

    async def _watch_row(self, transfer: TransferId) -> None:
        await asyncio.sleep(WATCH_AFTER_S)
        try:
            async for row, rev in self.rows.watch(self.core.moves_in[transfer].server):
                self.move_event(transfer, True, RowSeen(row, rev))
        except (DirectoryError, MigrateError) as error:
            # The source says it, or a reading shows it.
            log.debug("the row of %s is watched no more: %s", transfer, error)

    def _end_row_watch(self, transfer: TransferId) -> None:
        watching = self._row_watches.pop(transfer, None)
        if watching is not None:
            watching.cancel()

    # ------------------------------------------------------------------ fail points

    def reach(self, point: Point) -> None:
        """A step of a move or of delivery was reached; tests may end or stop a process here."""
        if self.failpoints is not None:
            self.failpoints.reach(point.value, self.peers.push)


_STEPS: Final[dict[SourcePhase, Literal["preparing", "copying", "quiescing"]]] = {
    SourcePhase.PREPARING: "preparing",
    SourcePhase.COPYING: "copying",
    SourcePhase.QUIESCING: "quiescing",
}


class FailPoints:
    """Named steps at which a test ends or stops a process; read from the environment.

    `LIVEMIGRATE_FAILPOINTS="ready=kill,swap_done=stop:4711"`: at the first time the point is
    reached this process, or the one whose id is given, gets SIGKILL or SIGSTOP. Only nodes that
    tests start have it set.
    """

    VARIABLE: Final = "LIVEMIGRATE_FAILPOINTS"
    SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}

    def __init__(self, text: str) -> None:
        self.actions: dict[str, tuple[signal.Signals, int]] = {}
        self.set(text)

    def set(self, text: str) -> None:
        """Replace what is set; "" clears.

        Raises:
            UsageError: An unknown point or action.
        """
        actions = {}
        for part in filter(None, text.split(",")):
            point, _, action = part.partition("=")
            what, _, pid = action.partition(":")
            known = point in {p.value for p in Point} and what in self.SIGNALS
            # NB: to the system 0 and negative numbers are groups of processes.
            process = os.getpid() if action == what else number(pid)
            if not known or process is None or not 0 < process < 1 << 31:
                raise UsageError(
                    f"{part!r} is no fail point; write POINT=kill, POINT=stop or POINT=kill:PID"
                )
            actions[point] = (self.SIGNALS[what], process)
        self.actions = actions

    @classmethod
    def from_environment(cls) -> FailPoints | None:
        """The fail points of this process, or None: then there are none and cannot be any."""
        text = os.environ.get(cls.VARIABLE)
        return None if text is None else cls(text)

    def reach(self, point: str, push: Callable[[], None]) -> None:
        """Do what is set for `point`, once.

        Before this process ends itself, what it has sent so far leaves by `push`. Another one is
        ended before: otherwise it could still take and answer what this step sends to it.
        """
        number, pid = self.actions.pop(point, (None, 0))
        if number is None:
            return
        if pid == os.getpid():
            push()
        with contextlib.suppress(ProcessLookupError):  # It has ended without our help.
            os.kill(pid, number)


def _shares(inc: Incarnation | None) -> bool:
    """Whether a server takes and gives references on its node."""
    if inc is None:
        return False
    host: Hosted = inc.host  # type: ignore[assignment]
    return host.spec.shared_references


def _too_large(size: int, options: NodeOptions, server: ServerId, method: str) -> UsageError:
    return UsageError(
        f"the arguments of {method!r} take {size} bytes; message_bytes_max is "
        f"{options.message_bytes_max}: pass less, or raise it",
        server=server,
    )


class _Rest:
    """The rest of a coroutine whose first step was taken, and gave `waits_for`."""

    def __init__(self, work: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self.work = work
        self.waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        work, waits_for = self.work, self.waits_for
        while True:
            failure: BaseException | None = None
            try:
                given = yield waits_for
            except BaseException as error:
                # A cancelling, above all: it is the coroutine's to see.
                failure = error
            try:
                waits_for = work.send(given) if failure is None else work.throw(failure)
            except StopIteration:
                return
            finally:
                # Its traceback refers to this very frame.
                failure = None


async def _go_on(work: Coroutine[Any, Any, None], waits_for: Any) -> None:
    await _Rest(work, waits_for)


def _raise_in(pending: Pending, error: BaseException) -> None:
    if isinstance(error, StopIteration):
        # A future refuses it; so does a coroutine.
        wrapped = RuntimeError("the handler raised StopIteration")
        wrapped.__cause__ = error
        error = wrapped
    if isinstance(error, asyncio.CancelledError):
        error = CallError("the handler was cancelled", server=pending.server, outcome=Outcome.DONE)
    pending.set_exception(error)


def core_options(options: NodeOptions) -> CoreOptions:
    """The core's share of a node's options, in milliseconds."""
    step_ms = int(options.move_step_timeout_s * 1000)
    return CoreOptions(
        window=options.window,
        repeat_first_ms=int(options.repeat_first_s * 1000),
        repeat_max_ms=int(options.repeat_max_s * 1000),
        ack_idle_ms=int(options.ack_idle_s * 1000),
        session_expiry_ms=int(options.session_expiry_s * 1000),
        sessions_max=options.sessions_max,
        records_max=options.records_max,
        record_bytes_max=options.record_bytes_max,
        mailbox_bytes_max=options.mailbox_bytes_max,
        tombstone_ms=int(options.tombstone_s * 1000),
        forwarding_expiry_ms=int(options.forwarding_expiry_s * 1000),
        forwarding_max=options.forwarding_max,
        probe_ms=options.deadlock_probe_ms,
        moves_max=options.moves_max,
        move=MoveTimes(
            step_ms=step_ms,
            quiesce_ms=int(options.quiesce_timeout_s * 1000),
            reclaim_ms=step_ms,
        ),
        standby=StandbyTimes(
            patience_ms=int(options.standby_patience_s * 1000),
            async_lag_ms=int(options.async_lag_s * 1000),
            async_lag_bytes=options.async_lag_bytes,
        ),
    )


def _utc(seconds: float) -> str:
    """A time as people read it; "an unknown time" where a peer told none."""
    try:
        at = datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return "an unknown time"
    return at.isoformat(timespec="milliseconds") if seconds else "an unknown time"
