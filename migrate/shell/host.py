"""Runs handlers and hooks of the servers on this node, one message at a time each.

A plain `def` handler runs at once, on the stack of whoever delivered the message. An `async def`
handler gets a task of its own. A `@blocking` one runs in a worker thread, or in a worker process
without the object. Tasks that a handler starts are counted, because a server with one of them
running is at no quiescent point.
"""

from __future__ import annotations

import asyncio
import contextlib
import dis
import inspect
import logging
import sys
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from migrate.core.delivery import Entry
from migrate.core.ids import node_name
from migrate.core.incarnation import Incarnation
from migrate.core.messages import ERROR, OK
from migrate.errors import AuthError
from migrate.ref import current_runtime
from migrate.shell import wire
from migrate.shell.scope import Scope, current_scope
from migrate.shell.wire import PLAIN
from migrate.shell.workers import Job, Result, Workers

if TYPE_CHECKING:
    from migrate.options import NodeOptions
    from migrate.ref import RefObject
    from migrate.server import ServerSpec
    from migrate.shell.driver import Driver
    from migrate.shell.inputs import InputLog

log: Final = logging.getLogger("migrate")

PLAIN_DEF: Final = 0
ASYNC: Final = 1
BLOCKING: Final = 2
PROCESS: Final = 4
NEVER_WAITS: Final = 3
"""An `async def` without an `await` in it: over in its first step, so it needs no task."""

WARN_AGAIN_S: Final = 60.0
"""A method that holds the loop again and again is named once in this time."""

NO_ARGS: Final[tuple[tuple[Any, ...], dict[str, Any]]] = ((), {})

OUTSIDE: Final = "outside:"
"""Stands before the method's name in requests from the public API. It is part of the request, so
it is with it in mailboxes, on forwards and on moves, and whoever runs the request asks the
server's own class, then and there, whether the method answers calls from outside. A release that
does not know it finds no method of that name and refuses."""


class NotOpen(AuthError):
    """A method that does not answer calls from outside was called from there; it was not run."""


EAGERLY: Final[dict[str, Any]] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
"""How a handler's task begins: on the stack of whoever delivered the message, as a plain
handler does, where Python can do it. A handler that never waits is then over at once."""


NO_TASKS: Final[Any] = frozenset()
"""Stands for an empty set, of which a server that is idle would have two of 216 bytes each."""


def added(tasks: set[Any], task: Any) -> set[Any]:
    """The set with one task more."""
    if tasks is NO_TASKS:
        return {task}
    tasks.add(task)
    return tasks


def without(tasks: set[Any], task: Any) -> set[Any]:
    """The set with one task less."""
    if len(tasks) <= 1:
        return NO_TASKS if task in tasks else tasks
    tasks.discard(task)
    return tasks


class Run:
    """One run of an `async def` or `@migrate.blocking` handler."""

    __slots__ = ("entry", "result", "scope", "starting", "task", "work")

    def __init__(self, scope: Scope, entry: Entry, work: Any) -> None:
        self.scope = scope
        self.entry = entry
        self.work = work
        self.task: asyncio.Task[None] | None = None
        self.starting = True  # whoever starts it takes the result
        self.result: tuple[int, bytes | None, object] | None = None


class Hosted:
    """A server's live object on this node, and how to run it."""

    __slots__ = (
        "by_value",
        "departed",
        "diverged",
        "driver",
        "handlers",
        "hook_task",
        "inputs",
        "obj",
        "ref",
        "running",
        "spec",
        "state_bytes",
        "tasks",
    )

    def __init__(self, obj: Any, spec: ServerSpec, ref: RefObject, driver: Driver) -> None:
        self.obj = obj
        self.spec = spec
        self.ref = ref
        self.driver = driver
        self.handlers: dict[str, tuple[int, Callable[..., Any]]] = {}
        self.departed = False  # on_depart has run; on_stay is due if the move is rolled back
        self.hook_task: asyncio.Task[None] | None = None
        # Of its handlers, and those that its handlers started.
        self.running: set[asyncio.Task[Any] | None] = NO_TASKS
        self.tasks: set[asyncio.Task[Any]] = NO_TASKS
        self.state_bytes = -1  # size of the last capture; -1: not known
        self.by_value = False
        # Of a deterministic server, while a standby runs what it runs.
        self.inputs: InputLog | None = None
        self.diverged = False  # it was found out not to be deterministic

    def handler(self, name: str) -> tuple[int, Callable[..., Any]]:
        """(kind, bound method) of a method that can be called.

        Raises:
            AttributeError: The class has no such method, or it cannot be called.
            NotOpen: The name has the mark of requests from outside, and the class does not
                open the method to them.
        """
        if name.startswith(OUTSIDE):
            inner = name.removeprefix(OUTSIDE)
            check_open(self.spec.cls_name, open_methods(self.spec), inner, self.ref._server_id)
            found = self.handlers[name] = self.handler(inner)
            return found
        method = self.spec.methods.get(name) or next(
            (timer.method for timer in self.spec.timers if timer.name == name), None
        )
        if method is None:
            known = ", ".join(sorted(self.spec.methods))
            raise AttributeError(
                f"{self.spec.cls_name} has no method {name!r} that can be called; it has: {known}"
            )
        function = getattr(self.obj, name)
        if method.in_process:
            kind = PROCESS
        else:
            kind = BLOCKING if method.is_blocking else ASYNC if method.is_async else PLAIN_DEF
        if kind == ASYNC and not EAGERLY and _never_waits(function):
            kind = NEVER_WAITS
        found = self.handlers[name] = (kind, function)
        return found


class Host:
    """All hosted servers of one node."""

    def __init__(self, driver: Driver, options: NodeOptions) -> None:
        self.driver = driver
        self._warn_s = options.hold_warn_ms / 1000
        # When each method was last named, and how often it held the loop unnamed since.
        self._warned: dict[tuple[str, str], tuple[float, int]] = {}
        self.turn_until_s = inf  # when the loop needs a turn, while frames or mailboxes are emptied
        self.loop = driver.loop
        self.threads = ThreadPoolExecutor(
            options.blocking_threads_max, thread_name_prefix="migrate-blocking"
        )
        self.workers = Workers(options.blocking_processes_max)
        # In which handlers are run that never wait; None during one, and after one that failed.
        self._steps: Generator[tuple[Any], Any, None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # hooks
        self._factory: Any = None

    # -- tasks of handlers

    def open(self) -> None:
        """Count the tasks that handlers start, from now on."""
        previous = self.loop.get_task_factory()

        def factory(
            loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any
        ) -> asyncio.Task[Any]:
            if previous is None:
                task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **kwargs)
            else:
                task = previous(loop, coro, **kwargs)  # type: ignore[assignment]
            scope = current_scope()
            if scope is not None and scope.driver is self.driver:
                self._count(scope, task)
            return task

        self._factory = factory
        self._previous = previous
        self.loop.set_task_factory(factory)  # type: ignore[arg-type]

    def _count(self, scope: Scope, task: asyncio.Task[Any]) -> None:
        inc, host = scope.inc, scope.host
        if task.done():
            return
        host.tasks = added(host.tasks, task)
        self.driver.core.background(inc, 1, self.driver.now_ms())

        def ended(task: asyncio.Task[Any]) -> None:
            host.tasks = without(host.tasks, task)
            self.driver.core.background(inc, -1, self.driver.now_ms())
            self.driver.flush()

        task.add_done_callback(ended, context=self.driver.context)

    async def close(self) -> None:
        """Cancel what still runs, and wait until it has ended."""
        if self._factory is not None and self.loop.get_task_factory() is self._factory:
            self.loop.set_task_factory(self._previous)
        running = [*self._tasks]
        for inc in self.driver.core.hosted.values():
            host: Hosted = inc.host  # type: ignore[assignment]
            running += [task for task in (*host.running, *host.tasks) if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self.workers.close()
        self.threads.shutdown(wait=False, cancel_futures=True)

    # -- handlers

    def run(self, inc: Incarnation, entry: Entry) -> tuple[int, bytes | None, object] | None:
        """See `Port.run`."""
        host: Hosted = inc.host  # type: ignore[assignment]
        scope = Scope(self.driver, host, inc, entry)
        work: Awaitable[Any]
        args: Any = None
        token = current_runtime.set(scope)
        try:
            kind, function = host.handlers.get(entry.method) or host.handler(entry.method)
            args = entry.args
            if args is None and kind != PROCESS:
                args = wire.unpack(entry.payload, self.driver) if entry.payload else NO_ARGS
            if kind == PLAIN_DEF or kind == NEVER_WAITS:
                begun = monotonic()
                value = function(*args[0], **args[1])
                if kind == NEVER_WAITS:
                    steps, self._steps = self._steps, None
                    if steps is None:
                        steps = _steps()
                    (value,) = steps.send(value)
                    self._steps = steps
                elif host.inputs is not None:
                    host.inputs.add(entry, args, True, value)
                ended = monotonic()
                if ended - begun > self._warn_s:
                    self._warn(inc, entry, ended - begun)
                if ended > self.turn_until_s:
                    self.driver.crowd()
                if type(value) in PLAIN or kind == NEVER_WAITS or not isinstance(value, Awaitable):
                    return OK, None, value
                # A plain handler that returns a call to somebody else: await it for the caller.
                work = _forward(value)
            elif kind == ASYNC:
                work = function(*args[0], **args[1])
            elif kind == BLOCKING:
                work = self._in_thread(scope, function, args)
            else:
                work = self._in_process(scope, entry)
        except Exception as error:
            if host.inputs is not None:
                host.inputs.add(entry, args if args is not None else NO_ARGS, False, error)
            return self._failed(entry, error)
        except (SystemExit, asyncio.CancelledError) as error:
            return self._failed(entry, error)
        finally:
            current_runtime.reset(token)
        return self._start(scope, entry, work)

    def _warn(self, inc: Incarnation, entry: Entry, took_s: float) -> None:
        method = entry.method.removeprefix(OUTSIDE)
        key = (inc.row.cls, method)
        now = monotonic()
        named, unnamed = self._warned.get(key, (-inf, 0))
        if now - named < WARN_AGAIN_S:
            self._warned[key] = (named, unnamed + 1)
            return
        self._warned[key] = (now, 0)
        log.warning(
            "%s.%s held the loop of node %s for %.0f ms%s; everything on it waited. Let it await "
            "in between (`async def`), or make it `@migrate.blocking`",
            inc.row.cls,
            method,
            node_name(self.driver.node),
            took_s * 1000,
            f", and {unnamed} times more since this was last said" if unnamed else "",
        )

    def _failed(self, entry: Entry, error: BaseException) -> tuple[int, bytes | None, object]:
        if entry.session is None or entry.kind != 0:
            # Nobody waits for it: the log is all that hears of it.
            log.error("handler %s failed", entry.method, exc_info=error)
        return ERROR, None, error

    def _start(
        self, scope: Scope, entry: Entry, work: Any
    ) -> tuple[int, bytes | None, object] | None:
        """Run a handler as a task; returns its result if it ended without ever waiting."""
        context = self.driver.context.copy()
        context.run(current_runtime.set, scope)
        run = Run(scope, entry, work)
        # NB: not by the loop's factory: the handler's own task is not one it has started.
        task = run.task = asyncio.Task(
            self._finish(run), loop=self.loop, context=context, **EAGERLY
        )
        run.starting = False
        if run.result is None:
            scope.host.running = added(scope.host.running, task)
        return run.result

    def cancel(self, copy: Hosted) -> None:
        """End the handlers of a copy that is not the server (any more)."""
        for task in [*copy.running, *copy.tasks]:
            if task is not None:
                task.cancel()

    async def _finish(self, run: Run) -> None:
        entry = run.entry
        status, payload, value = OK, None, None
        try:
            value = await run.work
            if type(value) is Result:
                status, payload = value.status, value.payload
        except Exception as error:
            status, _, value = self._failed(entry, error)
        except (SystemExit, asyncio.CancelledError) as error:
            status, _, value = self._failed(entry, error)
        if run.starting:
            run.result = (status, payload, value)
            return
        driver, scope = self.driver, run.scope
        # NB: not by a callback of the task, which would cost a turn of the loop for each call.
        scope.host.running = without(scope.host.running, run.task)
        peers = driver.peers
        peers.gathering = True
        driver.core.finish(scope.inc, entry, status, payload, value, driver.now_ms())
        peers.gathering = False

    def _in_thread(
        self, scope: Scope, function: Callable[..., Any], args: Any
    ) -> asyncio.Future[Any]:
        context = self.driver.context.copy()
        context.run(current_runtime.set, scope)
        future = self.threads.submit(context.run, function, *args[0], **args[1])
        return asyncio.wrap_future(future, loop=self.loop)

    async def _in_process(self, scope: Scope, entry: Entry) -> Result:
        host = scope.host
        job = Job(
            cls=host.spec.cls,
            method=entry.method.removeprefix(OUTSIDE),
            state=list(getattr(host.obj, "__dict__", ())),
            payload=entry.payload if entry.args is None else None,
            args=entry.args,
            current=scope.current(),
            server=host.ref._server_id,
            result_bytes_max=self.driver.options.message_bytes_max,
        )
        return await self.workers.run(job)

    # -- hooks

    async def hook(self, inc: Incarnation, name: str, timeout_s: float, *args: Any) -> None:
        """Run a hook of the server, if its class defines it, as part of its life.

        Raises:
            TimeoutError: It took longer than `timeout_s`; it was cancelled.
            Exception: Whatever it raises.
        """
        host: Hosted = inc.host  # type: ignore[assignment]
        if name not in host.spec.hooks:
            return
        context = self.driver.context.copy()
        context.run(current_runtime.set, Scope(self.driver, host, inc, None))
        function = getattr(host.obj, name)
        task = asyncio.Task(_call(function, args), loop=self.loop, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard, context=self.driver.context)
        async with asyncio.timeout(timeout_s):
            try:
                await task
            finally:
                if not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError, Exception):
                        await task

    # -- results

    def pack_result(self, status: int, value: object) -> tuple[int, bytes]:
        """See `Port.pack_result`."""
        return wire.pack_result(status, value, self.driver.options.message_bytes_max)


def open_methods(spec: ServerSpec) -> tuple[str, ...]:
    """Names of the methods of a class that answer calls from outside, sorted; timers never do."""
    timers = {timer.name for timer in spec.timers}
    return tuple(
        sorted(name for name, m in spec.methods.items() if m.is_public and name not in timers)
    )


def check_open(cls_name: str, names: tuple[str, ...], name: str, server: str) -> None:
    """Refuse a method that does not answer calls from outside.

    The text is the same for a method that there is not, so that it tells nothing.

    Raises:
        NotOpen: It is not among the `names` that do.
    """
    if name not in names:
        raise NotOpen(
            f"{cls_name} has no method {name[:100]!r} that answers calls from outside; it has: "
            f"{', '.join(names) or 'none'}",
            server=server,
        )


def _never_waits(function: Callable[..., Any]) -> bool:
    """Whether a coroutine function has no `await`, `async for` or `async with` in it.

    Source: CPython 3.11 compiles each of the three to a SEND, and nothing else suspends one.
    """
    code = getattr(function, "__code__", None)
    return (
        code is not None
        and bool(code.co_flags & inspect.CO_COROUTINE)
        and all(step.opname != "SEND" for step in dis.get_instructions(code))
    )


def _steps() -> Generator[tuple[Any], Any, None]:
    """Something to which coroutines are sent that never wait, and that yields what each returns.

    To step one by hand costs twice as much: its result would come in an exception.
    """
    steps = _stepping()
    next(steps)
    return steps


@types.coroutine
def _stepping() -> Generator[Any, Any, None]:
    ended: Any = None
    while True:
        coroutine = yield ended
        ended = ((yield from coroutine),)


async def _forward(value: Awaitable[Any]) -> Any:
    return await value


async def _call(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    value = function(*args)
    if inspect.isawaitable(value):
        await value
