"""Reducers for asyncio: futures and tasks that are done, loops, and futures that nobody waits for.

They belong to an event loop, and the one at the other end may not run yet when they are loaded, or
run in another thread. Then they get a stand-in for a loop, which is whatever loop runs when it is
used; so they can be awaited, waited for and given callbacks there.
"""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

from .resources import REDUCERS, REOPEN, Reduced, position_of, refuse, refuses

_REMEDY = "cancel or await it in on_depart, start it again in on_arrive, or use @migrate.every"


class _AnyLoop:
    """The loop of a future that is loaded where none runs: the one that runs when it is used."""

    def get_debug(self) -> bool:
        return False

    def is_closed(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(asyncio.get_running_loop(), name)
        except RuntimeError as exc:
            raise AttributeError(f"no event loop runs here, so it has no {name!r}") from exc

    def __reduce__(self) -> Any:
        return _any_loop, ()


_the_any_loop: Any = _AnyLoop()


def _any_loop() -> Any:
    return _the_any_loop


def _running_or_any_loop() -> Any:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return _the_any_loop


class _AnyLoopFuture(asyncio.Future[Any]):
    """A future at home in whichever loop asks."""

    def get_loop(self) -> Any:
        return _running_or_any_loop()


class _AnyLoopTask(asyncio.Task[Any]):
    """A task that is done, at home in whichever loop asks."""

    def get_loop(self) -> Any:
        return _running_or_any_loop()


def _outcome_of(future: asyncio.Future[Any]) -> tuple[str, Any]:
    if not future.done():
        return "pending", None
    if future.cancelled():
        return "cancelled", getattr(future, "_cancel_message", None)
    # Asking by these names does not count as having seen the exception.
    exception = getattr(future, "_exception", None)
    return (
        ("result", getattr(future, "_result", None))
        if exception is None
        else (
            "exception",
            exception,
        )
    )


def _kind_of(future: Any, own: type, plain: type) -> type:
    return plain if type(future) is own else type(future)


def _reduce_future(future: asyncio.Future[Any]) -> Reduced:
    callbacks = list(getattr(future, "_callbacks", None) or ())
    waiting = [entry[0] for entry in callbacks if _is_tasks(entry[0])]
    if waiting:
        refuse(
            future,
            f"it is pending, and {len(waiting)} tasks wait for it; a suspended task cannot travel",
            "capture it at a point where nobody waits",
        )
    kind = _kind_of(future, _AnyLoopFuture, asyncio.Future)
    state = (*_outcome_of(future), [entry[0] for entry in callbacks], _attributes_of(future))
    return _make_future, (kind,), state, None, None, _fill_future


def _attributes_of(future: Any) -> dict[str, Any]:
    return dict(getattr(future, "__dict__", None) or {})


def _is_tasks(callback: Any) -> bool:
    owner = getattr(callback, "__self__", None)
    return isinstance(owner, asyncio.Task) or type(callback).__name__ == "TaskWakeupMethWrapper"


def _make_future(kind: Any) -> Any:
    loop = _running_or_any_loop()
    if loop is _the_any_loop and kind is asyncio.Future:
        kind = _AnyLoopFuture
    future = kind.__new__(kind)
    asyncio.Future.__init__(future, loop=loop)
    return future


def _fill_future(future: Any, state: tuple[str, Any, list[Any], dict[str, Any]]) -> None:
    outcome, value, callbacks, attributes = state
    if attributes:
        future.__dict__.update(attributes)
    for callback in callbacks:
        future.add_done_callback(callback)
    if outcome == "result":
        future.set_result(value)
    elif outcome == "exception":
        future.set_exception(value)
        # Whether anybody looked at it is told at home; do not complain here.
        future._log_traceback = False
    elif outcome == "cancelled":
        future.cancel(value)


def _reduce_task(task: asyncio.Task[Any]) -> Reduced:
    if not task.done():
        refuse(
            task,
            f"task {task.get_name()!r} is suspended{position_of(task.get_coro())}",
            _REMEDY,
        )
    kind = _kind_of(task, _AnyLoopTask, asyncio.Task)
    return _make_task, (kind, task.get_name(), *_outcome_of(task))


async def _end(outcome: str, value: Any) -> Any:
    if outcome == "exception":
        raise value
    if outcome == "cancelled":
        raise asyncio.CancelledError(*(() if value is None else (value,)))
    return value


def _make_task(kind: Any, name: str, outcome: str, value: Any) -> Any:
    if kind is asyncio.Task:
        kind = _AnyLoopTask
    # Its only step is taken here; whatever is asked of its loop later is asked of the one there.
    loop: Any = _AnyLoop()
    steps: list[Any] = []
    loop.call_soon = lambda callback, *args, context=None: steps.append((callback, args))
    events: Any = asyncio.events
    running = events._get_running_loop()
    current = None
    tasks: Any = asyncio.tasks
    if running is not None:
        current = asyncio.current_task()
        if current is not None:
            tasks._leave_task(running, current)
    events._set_running_loop(loop)
    try:
        task = kind(_end(outcome, value), loop=loop, name=name, context=contextvars.Context())
        callback, args = steps[0]
        callback(*args)
        del loop.call_soon
    finally:
        events._set_running_loop(running)
        if current is not None:
            tasks._enter_task(running, current)
    if outcome == "exception":
        task._log_traceback = False
    return task


def _reduce_loop(loop: Any) -> Reduced:
    if loop.is_running():
        refuse(loop, "an event loop that runs belongs to its thread", REOPEN)
    if loop.is_closed():
        return _make_closed_loop, (type(loop),)
    ready = getattr(loop, "_ready", None)
    selector = getattr(loop, "_selector", None)
    waiting = len(selector.get_map()) - 1 if selector is not None else 1
    if ready is None or ready or getattr(loop, "_scheduled", None) or waiting > 0:
        refuse(loop, "callbacks or files are registered with it", REOPEN)
    return _make_loop, (type(loop), loop.get_debug())


def _make_loop(kind: Any, debug: bool) -> Any:
    loop = kind()
    loop.set_debug(debug)
    return loop


def _make_closed_loop(kind: Any) -> Any:
    loop = kind()
    loop.close()
    return loop


REDUCERS.update(
    {
        asyncio.Future: _reduce_future,
        asyncio.Task: _reduce_task,
        asyncio.BaseEventLoop: _reduce_loop,
        asyncio.AbstractEventLoop: refuses("an event loop belongs to its thread", REOPEN),
        asyncio.Handle: refuses("it is scheduled on an event loop here", "use @migrate.every"),
    }
)
