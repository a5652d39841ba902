"""Reducers for what pickle refuses: recreated at the destination, or refused with a remedy.

The rule: a resource is carried if the copy behaves as the original would have, at a quiescent
point; otherwise it is refused. A reducer never changes its object, apart from flushing files.
Add one with `register`. The names of the functions called `_make_...` are part of the format.
"""

from __future__ import annotations

import asyncio
import bz2
import collections
import concurrent.futures
import contextvars
import ctypes
import gc
import hashlib
import importlib
import logging
import lzma
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import multiprocessing.shared_memory
import os
import queue
import random
import re
import selectors
import socket
import ssl
import struct
import subprocess
import sys
import threading
import types
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import thread as thread_pool
from typing import Any, NoReturn

from .base import lossy
from .errors import LoadFailed, NotSerializable
from .memory import address_of

Reduced = Any
Reducer = Callable[[Any], Reduced]

REDUCERS: dict[type, Reducer] = {}
on_register: list[Callable[[], None]] = []
"""Called after each registration."""


def register(kind: type, reduce_function: Callable[[Any], Any]) -> None:
    """Say how instances of a type, and of its subclasses, are captured.

    Subclasses that define `__reduce__`, `__reduce_ex__` or `__getstate__` go their own way.

    Args:
        kind: The type. An earlier registration is replaced.
        reduce_function: Takes an instance and returns what `__reduce__` may return, or
            NotImplemented for pickle's own way; it calls `refuse` if this one cannot travel.
    """
    REDUCERS[kind] = reduce_function
    for forget in on_register:
        forget()


def type_name(kind: type) -> str:
    """Name of a type as it appears in errors: without a module for built-in ones."""
    module = getattr(kind, "__module__", "builtins")
    name = getattr(kind, "__qualname__", kind.__name__)
    return name if module == "builtins" else f"{module}.{name}"


def refuse(obj: object, reason: str, remedy: str) -> NoReturn:
    """Refuse to capture `obj`; the path to it is added by whoever is capturing.

    Raises:
        NotSerializable: Always.
    """
    raise NotSerializable("", type_name(type(obj)), reason, remedy)


REOPEN = "drop it in on_depart or __getstate__, and open it again in on_arrive or __setstate__"


def refuses(reason: str, remedy: str = REOPEN) -> Reducer:
    """A reducer that always refuses."""

    def reduce(obj: object) -> NoReturn:
        refuse(obj, reason, remedy)

    return reduce


def new_instance(cls: Any) -> Any:
    """An instance whose `__init__` was not run."""
    return cls.__new__(cls)


def set_state(obj: Any, state: dict[str, Any]) -> None:
    """Set attributes, whatever the class's accessors do."""
    vars(obj).update(state)


def module_attribute(module: str, name: str) -> Any:
    """Find an attribute of a module, importing the module if need be."""
    found: Any = importlib.import_module(module)
    for piece in name.split("."):
        found = getattr(found, piece)
    return found


# --- sentinels -----------------------------------------------------------------------------------


def _by_value(module: str) -> bool:
    from .by_value import is_by_value_module

    return is_by_value_module(module)


def _modules_by_reference() -> list[tuple[str, types.ModuleType]]:
    """The modules that the other end imports for itself."""
    from .by_value import is_made_up

    modules: dict[str, Any] = dict(sys.modules)
    return [
        (name, module)
        for name, module in modules.items()
        if isinstance(module, types.ModuleType) and not _by_value(name) and not is_made_up(module)
    ]


class Places:
    """Where importable modules keep things that are known by being the same: one per stream."""

    kinds = (object, contextvars.ContextVar)

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[str, str]] | None = None

    def find(self, obj: object) -> tuple[str, str] | None:
        """(module, name) of a variable that holds `obj`, an instance of one of `kinds`.

        It is a global one, or one of a class that is there.
        """
        if self._by_id is None:
            self._by_id = {}
            classes: dict[int, tuple[str, type]] = {}
            for module_name, module in _modules_by_reference():
                for name, value in list(vars(module).items()):
                    if type(value) in self.kinds:
                        self._by_id.setdefault(id(value), (module_name, name))
                    elif isinstance(value, type) and value.__module__ == module_name:
                        classes[id(value)] = (module_name, value)
            for module_name, cls in classes.values():
                for name, value in list(vars(cls).items()):
                    if type(value) in self.kinds:
                        place = (module_name, f"{cls.__qualname__}.{name}")
                        self._by_id.setdefault(id(value), place)
        found = self._by_id.get(id(obj))
        # The map may be older than the object, so look once more.
        return found if found and _at(found) is obj else None


def _at(place: tuple[str, str]) -> Any:
    found: Any = sys.modules.get(place[0])
    for piece in place[1].split("."):
        found = getattr(found, piece, None)
    return found


def reduce_by_place(obj: Any, places: Places) -> Reduced:
    """Reduce an `object()`, good for nothing but being compared with `is`, or a ContextVar."""
    place = places.find(obj)
    if place is not None:
        return module_attribute, place
    return NotImplemented if type(obj) is object else _reduce_context_variable(obj)


def singleton_reducer(kind: type, fallback: Reducer | None) -> Reducer | None:
    """A reducer for a class with instances that its module keeps, if `kind` is one, else None.

    Such constants are compared with `is`, so each has to remain the one that its module holds. One
    that has changed since, or whose state is more than plain values, goes the way of `fallback`,
    or of pickle.
    """
    from .by_value import is_made_up

    module = sys.modules.get(kind.__module__)
    ways = ("__reduce_ex__", "__reduce__", "__getstate__")
    if (
        module is None
        or _by_value(kind.__module__)
        or is_made_up(module)
        or any(getattr(kind, way) is not getattr(object, way) for way in ways)
        or kind.__itemsize__
        or any(vars(base).get("__slots__") for base in kind.__mro__)
        or not any(type(value) is kind for value in list(vars(module).values()))
    ):
        return None

    def reduce(obj: object) -> Reduced:
        state = getattr(obj, "__dict__", None) or {}
        if all(type(value) in _CONSTANTS for value in state.values()):
            for name, value in list(vars(module).items()):
                if value is obj:
                    if not state:
                        return module_attribute, (kind.__module__, name)
                    return _constant, (kind, kind.__module__, name, state)
        return NotImplemented if fallback is None else fallback(obj)

    return reduce


_CONSTANTS = frozenset((str, int, float, bool, bytes, type(None)))


def _constant(kind: Any, module: str, name: str, state: dict[str, Any]) -> Any:
    """The constant of a module, if it is here what it was there; else another one like it."""
    found = getattr(importlib.import_module(module), name, None)
    if type(found) is kind and vars(found) == state:
        return found
    made = kind.__new__(kind)
    vars(made).update(state)
    return made


# --- threads -------------------------------------------------------------------------------------

_Lock: Any = type(threading.Lock())
_RLock: Any = type(threading.RLock())
_RLOCK_STATE = re.compile(r"owner=(\d+) count=(\d+)")


def _reduce_lock(lock: Any) -> Reduced:
    if lock.locked():
        lossy("it is locked, and so will the copy be: whoever is to release it must travel too")
    return _make_lock, (lock.locked(),)


def _make_lock(locked: bool) -> Any:
    lock = threading.Lock()
    if locked:
        lock.acquire()
    return lock


def _reduce_rlock(lock: Any) -> Reduced:
    # Its owner and count are shown nowhere but in its repr on every Python that we support.
    shown = _RLOCK_STATE.search(repr(lock))
    owner, count = (int(shown[1]), int(shown[2])) if shown else (0, 0)
    if count and owner != threading.get_ident():
        refuse(lock, "another thread holds it", "release it before the state is captured")
    return _make_rlock, (count,)


def _make_rlock(count: int) -> Any:
    lock = threading.RLock()
    for _ in range(count):
        lock.acquire()
    return lock


def _reduce_condition(condition: threading.Condition) -> Reduced:
    waiters = len(vars(condition)["_waiters"])
    if waiters:
        refuse(
            condition,
            f"{waiters} threads wait in it, and threads cannot travel",
            "let them finish before the state is captured",
        )
    return NotImplemented


def _reduce_local(local: Any) -> Reduced:
    # Values of other threads are theirs, and cannot be seen from here.
    lossy("only the values of the capturing thread are carried")
    held = gc.get_referents(local)
    args = next((r for r in held if type(r) is tuple), ())
    # Beside the keywords it holds what each thread has, by objects that stand for threads.
    named = next((r for r in held if type(r) is dict and all(type(k) is str for k in r)), {})
    return _make_local, (type(local), args, named), dict(vars(local)), None, None, set_state


def _make_local(cls: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    # NB: with the arguments by which each other thread will initialize its own part.
    return cls.__new__(cls, *args, **named)


_THREAD_BASE = frozenset(vars(threading.Thread()))


def _reduce_thread(thread: threading.Thread) -> Reduced:
    if thread.is_alive():
        refuse(
            thread,
            f"thread {thread.name!r} is running, and a running thread cannot travel",
            "stop it in on_depart and start it in on_arrive, or use @migrate.every",
        )
    extra = {name: value for name, value in vars(thread).items() if name not in _THREAD_BASE}
    if isinstance(thread, threading.Timer) or thread.ident is None:
        call = tuple(getattr(thread, f"_{name}", None) for name in ("target", "args", "kwargs"))
    else:
        call = (None, (), {})
    state = (thread.name, thread.daemon, call, thread.ident is not None, extra)
    return new_instance, (type(thread),), state, None, None, _fill_thread


def _fill_thread(thread: threading.Thread, state: Any) -> None:
    name, daemon, (target, args, kwargs), finished, extra = state
    threading.Thread.__init__(thread, None, target, name, args or (), kwargs, daemon=daemon)
    vars(thread).update(extra)
    if finished:
        # Only a thread that ran is finished. This one runs nothing, whatever its class does.
        thread.run = lambda: None  # type: ignore[method-assign]
        thread.start()
        thread.join()
        del thread.run


def _reduce_queue(waiting: queue.Queue[Any]) -> Reduced:
    return new_instance, (type(waiting),), dict(vars(waiting)), None, None, _fill_queue


def _fill_queue(waiting: queue.Queue[Any], state: dict[str, Any]) -> None:
    # What a later Python has besides, such as whether it was shut down, is as in a new one.
    vars(waiting).update({**vars(queue.Queue()), **state})


def _reduce_simple_queue(simple: queue.SimpleQueue[Any]) -> Reduced:
    items = []
    while True:
        try:
            items.append(simple.get_nowait())
        except queue.Empty:
            break
    for item in items:
        simple.put(item)
    return queue.SimpleQueue, (), (items,), None, None, _fill_simple_queue


def _fill_simple_queue(simple: queue.SimpleQueue[Any], state: tuple[list[Any]]) -> None:
    for item in state[0]:
        simple.put(item)


def _reduce_concurrent_future(future: concurrent.futures.Future[Any]) -> Reduced:
    if future.running():
        refuse(
            future,
            "what it stands for is running in another thread or process",
            "wait for it before the state is captured",
        )
    return NotImplemented


# --- executors -----------------------------------------------------------------------------------


def _reduce_thread_pool(executor: Any) -> Reduced:
    queued = executor._work_queue.qsize()
    if executor._shutdown:
        # The last item then is the sign to stop, which nobody executes.
        queued = max(0, queued - 1)
    running = sum(1 for thread in executor._threads if _works(thread))
    _refuse_work(executor, queued, running)
    initializer, initargs = _initializer_of(executor)
    lossy("it is made anew with the same size: what its threads hold is left behind")
    args = (
        type(executor),
        executor._max_workers,
        executor._thread_name_prefix,
        initializer,
        initargs,
        executor._shutdown,
    )
    return _make_thread_pool, args, _own_attributes(executor, _THREAD_POOL), None, None, set_state


_THREAD_POOL = frozenset(vars(concurrent.futures.ThreadPoolExecutor(1)))
_PROCESS_POOL = frozenset(vars(concurrent.futures.ProcessPoolExecutor(1)))


def _own_attributes(obj: Any, known: frozenset[str]) -> dict[str, Any] | None:
    """The attributes that a subclass has added to those of its base."""
    return {name: value for name, value in vars(obj).items() if name not in known} or None


def _works(thread: threading.Thread) -> bool:
    """Tell whether a pool's thread has work that is not done.

    The pool itself does not know: its count of idle threads drifts after every overload. The
    thread's loop does, in the local variable that holds the current work.
    """
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code is not thread_pool._worker.__code__:
        frame = frame.f_back
    if frame is None:
        return False
    item = frame.f_locals.get("work_item")
    return item is not None and not item.future.done()


def _refuse_work(executor: Any, queued: int, running: int) -> None:
    if queued or running:
        refuse(
            executor,
            f"it has work: {running} running, {queued} queued",
            "wait for its futures before the state is captured",
        )


def _initializer_of(executor: Any) -> tuple[Any, Any]:
    if hasattr(executor, "_initializer"):
        return executor._initializer, executor._initargs
    # Python 3.14 keeps them in the context that it makes for each worker.
    cells = dict(
        zip(
            executor._create_worker_context.__code__.co_freevars,
            (c.cell_contents for c in executor._create_worker_context.__closure__ or ()),
            strict=True,
        )
    )
    return cells.get("initializer"), cells.get("initargs", ())


def _make_thread_pool(
    cls: Any, max_workers: int, prefix: str, initializer: Any, initargs: Any, shut_down: bool
) -> Any:
    # NB: not by calling the class, which a subclass may want done in another way.
    executor = cls.__new__(cls)
    base = concurrent.futures.ThreadPoolExecutor
    base.__init__(executor, max_workers, prefix, initializer, initargs)
    if shut_down:
        executor.shutdown(wait=False)
    return executor


def _reduce_process_pool(executor: Any) -> Reduced:
    _refuse_work(executor, len(executor._pending_work_items or ()), 0)
    lossy("it is made anew with the same size: what its processes hold is left behind")
    args = (
        type(executor),
        executor._max_workers,
        executor._mp_context.get_start_method(),
        executor._initializer,
        executor._initargs,
        executor._max_tasks_per_child,
        executor._shutdown_thread,
    )
    return _make_process_pool, args, _own_attributes(executor, _PROCESS_POOL), None, None, set_state


def _make_process_pool(
    cls: Any,
    max_workers: int,
    start_method: str,
    initializer: Any,
    initargs: Any,
    max_tasks_per_child: int | None,
    shut_down: bool,
) -> Any:
    executor = cls.__new__(cls)
    concurrent.futures.ProcessPoolExecutor.__init__(
        executor,
        max_workers,
        multiprocessing.get_context(start_method),
        initializer,
        initargs,
        max_tasks_per_child=max_tasks_per_child,
    )
    if shut_down:
        executor.shutdown(wait=False)
    return executor


# --- asyncio -------------------------------------------------------------------------------------

_WAITING = ("_waiters", "_getters", "_putters")


def _reduce_asyncio(primitive: Any) -> Reduced:
    state = dict(vars(primitive))
    waiting = sum(not f.done() for name in _WAITING for f in state.get(name) or ())
    if waiting:
        refuse(
            primitive,
            f"{waiting} tasks wait in it, and a suspended task cannot travel",
            "capture it at a point where nobody waits",
        )
    for name in _WAITING:
        if state.get(name) is not None:
            state[name] = collections.deque()
    # It is bound to a loop when somebody first waits in it: at the destination, to the one there.
    state.pop("_loop", None)
    return new_instance, (type(primitive),), state, None, None, set_state


# --- suspended code ------------------------------------------------------------------------------


def position_of(code_object: Any) -> str:
    """Where suspended code stands, for a message."""
    for prefix in ("gi", "cr", "ag"):
        frame = getattr(code_object, f"{prefix}_frame", None)
        code = getattr(code_object, f"{prefix}_code", None)
        if code is not None:
            where = f"{code.co_filename}, line {frame.f_lineno}" if frame else "its end"
            return f" in {code.co_qualname} at {where}"
    return ""


STANDARD_STREAMS = ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")


# --- logging -------------------------------------------------------------------------------------


def _reduce_logger(logger: logging.Logger) -> Reduced:
    if logger is logging.root:
        return logging.getLogger, ()
    # NB: not getLogger(), which would create one of that name here.
    if logging.root.manager.loggerDict.get(logger.name) is logger:
        lossy("it is found by its name: level, handlers and filters are those of the other end")
        return logging.getLogger, (logger.name,)
    left = (
        _LOGGER_PLACE if getattr(logger, "manager", None) is logging.root.manager else ("_cache",)
    )
    state = {name: value for name, value in vars(logger).items() if name not in left}
    return new_instance, (type(logger),), state, None, None, _fill_logger


_LOGGER_PLACE = ("parent", "manager", "_cache")


def _fill_logger(logger: logging.Logger, state: dict[str, Any]) -> None:
    logging.Logger.__init__(logger, state["name"])
    vars(logger).update(state)


# --- references and views ------------------------------------------------------------------------


def _reduce_weakref(ref: Any) -> Reduced:
    # Only what something else in the stream holds as well outlives the loading of it.
    referent = ref()
    callback = ref.__callback__
    if referent is None:
        return _make_dead_reference, (type(ref),)
    lossy("it will be dead unless something else in the state holds what it refers to")
    if type(ref) is not weakref.ref:
        return _make_own_reference, (type(ref), referent, callback), _attributes_of(ref)
    return weakref.ref, (referent,) if callback is None else (referent, callback)


def _attributes_of(ref: Any) -> Any:
    slots = {
        name: member.__get__(ref)
        for base in type(ref).__mro__
        if base.__flags__ & (1 << 9)
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType) and hasattr(ref, name)
    }
    attributes = getattr(ref, "__dict__", None) or None
    return (attributes, slots) if slots else attributes


def _make_own_reference(cls: Any, referent: Any, callback: Any) -> Any:
    return weakref.ref.__new__(cls, referent, callback)


class _Vanishing:
    """What a dead weak reference referred to."""

    def method(self) -> None:
        """Exists for weak references to methods."""


def _make_dead_reference(cls: Any) -> Any:
    vanishing = _Vanishing()
    return cls(vanishing.method if issubclass(cls, weakref.WeakMethod) else vanishing)


def _reduce_weak_method(ref: weakref.WeakMethod[Any]) -> Reduced:
    method = ref()
    if method is None:
        return _make_dead_reference, (type(ref),)
    return type(ref), (method,)


def _reduce_weak_proxy(proxy: Any) -> Reduced:
    try:
        # A proxy forwards all but its type, so what it stands for is bound to its methods.
        referent = proxy.__repr__.__self__
    except ReferenceError:
        return _make_dead_proxy, ()
    return weakref.proxy, (referent,)


def _make_dead_proxy() -> Any:
    return weakref.proxy(_Vanishing())


def _reduce_weak_mapping(mapping: Any) -> Reduced:
    base = _weak_base(type(mapping))
    own = _own_attributes(mapping, frozenset(vars(base())))
    state = (list(base.items(mapping)), own)
    return _new_weak, (type(mapping),), state, None, None, _fill_weak_mapping


def _weak_base(cls: Any) -> Any:
    return next(base for base in cls.__mro__ if base.__module__ in ("weakref", "_weakrefset"))


def _new_weak(cls: Any) -> Any:
    made = cls.__new__(cls)
    _weak_base(cls).__init__(made)
    return made


def _fill_weak_mapping(mapping: Any, state: tuple[list[tuple[Any, Any]], Any]) -> None:
    items, own = state
    vars(mapping).update(own or {})
    base = _weak_base(type(mapping))
    for key, value in items:
        base.__setitem__(mapping, key, value)


def _reduce_weak_set(weak: weakref.WeakSet[Any]) -> Reduced:
    own = _own_attributes(weak, frozenset(vars(weakref.WeakSet())))
    state = (list(weakref.WeakSet.__iter__(weak)), own)
    return _new_weak, (type(weak),), state, None, None, _fill_weak_set


def _fill_weak_set(weak: weakref.WeakSet[Any], state: tuple[list[Any], Any]) -> None:
    items, own = state
    vars(weak).update(own or {})
    for item in items:
        weakref.WeakSet.add(weak, item)


def _underlying(view: Any) -> Any:
    """The mapping of a dict view or mappingproxy: the only thing that it refers to."""
    return gc.get_referents(view)[0]


def _reduce_mapping_proxy(proxy: Any) -> Reduced:
    mapping = _underlying(proxy)
    marker = mapping.get("__dict__") if type(mapping) is dict else None
    owner = getattr(marker, "__objclass__", None)
    if isinstance(owner, type) and isinstance(marker, types.GetSetDescriptorType):
        return vars, (owner,)
    return types.MappingProxyType, (mapping,)


def _reduce_dict_view(kind: str) -> Reducer:
    def reduce(view: Any) -> Reduced:
        return _make_dict_view, (_underlying(view), kind)

    return reduce


def _make_dict_view(mapping: Any, kind: str) -> Any:
    return getattr(mapping, kind)()


def _reduce_memoryview(view: memoryview) -> Reduced:
    try:
        owner: Any = view.obj
    except ValueError:
        refuse(view, "it was released", "drop it")
    if owner is None or type(owner).__name__ == "_BytesIOBuffer":
        refuse(view, "it looks into memory that no object owns", "keep a copy of the bytes")
    if view.ndim != 1 and not view.c_contiguous:
        refuse(view, "it is a strided view of several dimensions", "view contiguous memory")
    shape: tuple[int, ...] | None = tuple(view.shape or ())
    step = 1
    low = 0
    count = view.nbytes // view.itemsize if view.itemsize else 0
    if view.ndim == 1 and not view.c_contiguous:
        stride = (view.strides or (0,))[0]
        if stride % view.itemsize:
            refuse(view, "its stride is not a multiple of its items", "view contiguous memory")
        step = stride // view.itemsize
        low = min(0, (count - 1) * stride)
    if not _can_be_cast(view.format):
        whole = memoryview(owner)
        if (whole.format, whole.nbytes) != (view.format, view.nbytes):
            refuse(view, f"it is a part of items of the form {view.format!r}", "view bytes instead")
        return _make_whole_view, (owner, view.readonly)
    offset = (address_of(view) + low - address_of(owner)) if view.nbytes else 0
    if view.ndim == 1:
        shape = None
    return _make_memoryview, (owner, offset, count, step, view.format, shape, view.readonly)


def _can_be_cast(form: str) -> bool:
    try:
        memoryview(b"").cast(form)  # type: ignore[call-overload]
    except ValueError:
        return False
    return True


def _make_whole_view(owner: Any, read_only: bool) -> memoryview:
    view = memoryview(owner)
    return view.toreadonly() if read_only else view


def _make_memoryview(
    owner: Any,
    offset: int,
    count: int,
    step: int,
    form: str,
    shape: tuple[int, ...] | None,
    read_only: bool,
) -> memoryview:
    size = struct.calcsize(form)
    whole = memoryview(owner)
    if not whole.c_contiguous:
        raise LoadFailed("a memoryview's owner came back with its memory out of order")
    span = ((count - 1) * abs(step) + 1) * size if count else 0
    view: Any = whole.cast("B")[offset : offset + span]
    view = view.cast(form, shape) if shape is not None else view.cast(form)
    if step != 1:
        view = view[::step]
    made: memoryview = view.toreadonly() if read_only else view
    return made


# --- context variables ---------------------------------------------------------------------------


def _reduce_context_variable(variable: contextvars.ContextVar[Any]) -> Reduced:
    try:
        default = (contextvars.Context().run(variable.get),)
    except LookupError:
        return contextvars.ContextVar, (variable.name,)
    return _make_context_variable, (variable.name, default)


def _make_context_variable(name: str, default: tuple[Any]) -> contextvars.ContextVar[Any]:
    return contextvars.ContextVar(name, default=default[0])


def _reduce_context(context: contextvars.Context) -> Reduced:
    return contextvars.Context, (), (list(context.items()),), None, None, _fill_context


def _fill_context(context: contextvars.Context, state: tuple[list[Any]]) -> None:
    def set_all(items: Iterable[tuple[contextvars.ContextVar[Any], Any]]) -> None:
        for variable, value in items:
            variable.set(value)

    context.run(set_all, state[0])


# --- exceptions ----------------------------------------------------------------------------------


def _reduce_exception(exc: BaseException) -> Reduced:
    """Rebuild exceptions without their `__init__`, which may want arguments that are not kept."""
    cls = type(exc)
    solid = next(base for base in cls.__mro__ if not base.__flags__ & (1 << 9))
    links = (exc.__cause__, exc.__context__, exc.__suppress_context__, exc.__traceback__)
    state = (vars(exc), *links, _fields_of(exc))
    if issubclass(solid, BaseExceptionGroup):
        parts = (exc.message, list(exc.exceptions))  # type: ignore[attr-defined]
        return _make_group, (cls, *parts), state, None, None, _fill_raised
    return _make_raised, (cls, solid, exc.args), state, None, None, _fill_raised


_NOT_CARRIED = frozenset(("args", "obj", "print_file_and_line", "characters_written"))
"""Fields that are carried otherwise; or, `obj`, hold what the error was about, whatever that is."""


def _fields_of(exc: BaseException) -> dict[str, Any]:
    """What an exception keeps in C, such as the number and the file name of an OSError."""
    fields: dict[str, Any] = {}
    for base in type(exc).__mro__:
        if base is not BaseException and issubclass(base, BaseException):
            for name, member in vars(base).items():
                if isinstance(member, types.MemberDescriptorType) and name not in _NOT_CARRIED:
                    value = getattr(exc, name, None)
                    if value is not None:
                        fields[name] = value
    return fields


def _make_raised(cls: Any, solid: Any, args: tuple[Any, ...]) -> BaseException:
    made: BaseException = solid.__new__(cls)
    made.args = args
    return made


def _make_group(cls: Any, message: str, exceptions: list[BaseException]) -> BaseException:
    made: BaseException = BaseExceptionGroup.__new__(cls, message, exceptions)
    return made


def _fill_raised(exc: BaseException, state: Any) -> None:
    attributes, cause, context, suppress, traceback, fields = state
    exc.__cause__, exc.__context__ = cause, context
    exc.__suppress_context__ = suppress
    exc.__traceback__ = traceback
    for name, value in fields.items():
        try:
            setattr(exc, name, value)
        except AttributeError:
            pass  # Read-only, so its constructor has set it.
    vars(exc).update(attributes)


def _reduce_traceback(traceback: types.TracebackType) -> Reduced:
    places = []
    step: types.TracebackType | None = traceback
    while step is not None:
        code = step.tb_frame.f_code
        places.append((code.co_filename, code.co_name, code.co_qualname, step.tb_lineno))
        step = step.tb_next
    return _make_traceback, (places,)


def _make_traceback(places: list[tuple[str, str, str, int]]) -> types.TracebackType | None:
    """A traceback that reads like the original one; its frames hold no variables."""
    made: types.TracebackType | None = None
    for filename, name, qualname, line in reversed(places):
        code = _standing.__code__.replace(
            co_filename=filename,
            co_name=name,
            co_qualname=qualname,
            co_firstlineno=line,
            co_linetable=_one_line(len(_standing.__code__.co_code) // 2),
        )
        namespace: dict[str, Any] = {"__name__": "traceback", "__file__": filename}
        # A generator's frame has no caller, so nothing of whoever loads this is kept with it.
        frame = types.FunctionType(code, namespace)().gi_frame
        made = types.TracebackType(made, frame, frame.f_lasti, line)
    return made


def _standing() -> Iterator[None]:
    """Gives its frame to tracebacks; it is never run."""
    yield


def _one_line(units: int) -> bytes:
    """A table that gives all of a code's units its first line, and no columns.

    Source: CPython's Objects/locations.md; kind 13 is an entry of up to 8 units without columns.
    """
    steps = [min(8, units - at) for at in range(0, units, 8)]
    return b"".join(bytes((0x80 | 13 << 3 | step - 1, 0)) for step in steps)


def _make_exception(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    made = BaseException.__new__(cls)
    made.args = args
    return made


def _fill_exception(exc: BaseException, state: Any) -> None:
    attributes, exc.__cause__, exc.__context__, exc.__suppress_context__ = state
    vars(exc).update(attributes)


# --- other ---------------------------------------------------------------------------------------


_SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.SOL_SOCKET, socket.SO_BROADCAST),
)


def _reduce_socket(sock: socket.socket) -> Reduced:
    kind = (type(sock), sock.family, sock.type, sock.proto)
    if sock.fileno() == -1:
        return _make_socket, (*kind, None, (), False, None)
    try:
        peer = f"connected to {sock.getpeername() or 'a socket without a name'}"
    except OSError:
        peer = ""
    internet = sock.family in (socket.AF_INET, socket.AF_INET6)
    if not peer and internet and sock.getsockname()[1] == 0:
        options = [(*option, sock.getsockopt(*option)) for option in _SOCKET_OPTIONS]
        return _make_socket, (*kind, sock.gettimeout(), options, True, None)
    peer = peer or f"bound to {sock.getsockname()!r}"
    refuse(sock, f"a socket belongs to its process; it is {peer}", REOPEN)


def _make_socket(
    cls: Any,
    family: int,
    kind: int,
    protocol: int,
    timeout: float | None,
    options: Any,
    is_open: bool,
    address: Any,
) -> Any:
    sock = cls.__new__(cls)
    socket.socket.__init__(sock, family, kind, protocol)
    if not is_open:
        sock.close()
        return sock
    sock.settimeout(timeout)
    for level, name, value in options:
        sock.setsockopt(level, name, value)
    return sock


def _reduce_popen(process: subprocess.Popen[Any]) -> Reduced:
    code = process.poll()
    if code is None:
        refuse(
            process,
            f"process {process.pid} runs {process.args!r:.80} and is a child of this process",
            "end it in on_depart and start it again in on_arrive",
        )
    # It is over: only its number, arguments and return code are left, and closed pipes.
    return new_instance, (type(process),), dict(vars(process)), None, None, set_state


def _reduce_selector(selector: Any) -> Reduced:
    registered = len(selector.get_map() or ())
    if registered:
        refuse(selector, f"{registered} files are registered with it", REOPEN)
    return type(selector), ()


def _reduce_hash(digest: Any) -> Reduced:
    # Its inner state cannot be had. But one that is still empty shows that by its digest.
    name = digest.name
    shake = name.startswith("shake")
    try:
        named = {"digest_size": digest.digest_size} if name.startswith("blake") else {}
        empty: Any = hashlib.new(name, **named)
        same = digest.digest(32) == empty.digest(32) if shake else digest.digest() == empty.digest()
    except (ValueError, TypeError):
        same = False
    if not same:
        refuse(
            digest,
            f"{name} does not give away what it has taken in",
            "keep the data, or the digests of finished parts, instead",
        )
    return (_make_hash, (name, named)) if named else (hashlib.new, (name,))


def _make_hash(name: str, named: dict[str, Any]) -> Any:
    return hashlib.new(name, **named)


def _reduce_environment(environment: Any) -> Reduced:
    for name in ("environ", "environb"):
        if environment is getattr(os, name, None):
            lossy("it is the environment of the process at the other end")
            return getattr, (os, name)
    return NotImplemented


def _reduce_process(process: Any) -> Reduced:
    if process._popen is not None:
        code = process._popen.poll()
        refuse(
            process,
            "it is a child of this process"
            if code is None
            else f"it was a child of this process, and ended with {code}",
            "start another one in on_arrive" if code is None else "keep its exit code",
        )
    state = {k: v for k, v in vars(process).items() if k not in _PROCESS_PLACE}
    state["_config"] = {k: v for k, v in process._config.items() if k != "authkey"}
    return new_instance, (type(process),), state, None, None, _fill_process


_PROCESS_PLACE = ("_identity", "_parent_pid", "_parent_name", "_popen", "_closed")


def _fill_process(process: Any, state: dict[str, Any]) -> None:
    multiprocessing.process.BaseProcess.__init__(process)
    config = {**process._config, **state["_config"]}
    vars(process).update(state)
    process._config = config


def _reduce_handler(handler: logging.Handler) -> Reduced:
    state = {name: value for name, value in vars(handler).items() if name != "lock"}
    return new_instance, (type(handler),), state, None, None, _fill_handler


def _fill_handler(handler: logging.Handler, state: dict[str, Any]) -> None:
    vars(handler).update(state)
    handler.createLock()
    # So that it is flushed and closed when the process ends.
    logging._addHandlerRef(handler)  # type: ignore[attr-defined]


def _reduce_finalizer(finalizer: Any) -> Reduced:
    found = finalizer.peek()
    if found is None:
        return _make_finalizer, (type(finalizer), None, None)
    referent, function, args, named = found
    return _make_finalizer, (type(finalizer), referent, (function, args, named, finalizer.atexit))


def _make_finalizer(cls: Any, referent: Any, call: Any) -> Any:
    if call is None:
        made = cls(_Vanishing(), int)
        made.detach()
        return made
    function, args, named, at_exit = call
    made = cls(referent, function, *args, **named)
    made.atexit = at_exit
    return made


def _reduce_struct(form: struct.Struct) -> Reduced:
    return struct.Struct, (form.format,)


def _reduce_random(source: random.Random) -> Reduced:
    if type(source) is random.Random:
        return NotImplemented
    # Its own way calls the class, and forgets the attributes that a subclass adds.
    state = (dict(vars(source)), source.getstate())
    return _make_random, (type(source),), state, None, None, _fill_random


def _make_random(cls: Any) -> Any:
    solid = next(base for base in cls.__mro__ if base.__module__ == "_random")
    return solid.__new__(cls)


def _fill_random(source: Any, state: tuple[dict[str, Any], Any]) -> None:
    attributes, position = state
    vars(source).update(attributes)
    source.setstate(position)


def _reduce_system_random(source: Any) -> Reduced:
    # It has no state of its own: each system's is as good as another's.
    return new_instance, (type(source),), dict(vars(source)), None, None, set_state


def reduce_ctypes_class(cls: Any) -> Reduced | None:
    """Reduce a class that ctypes makes from another one; None if it is none of these."""
    if (
        issubclass(cls, ctypes.Array)
        and cls.__name__ == f"{cls._type_.__name__}_Array_{cls._length_}"
    ):
        return _make_array_class, (cls._type_, cls._length_)
    if issubclass(cls, ctypes._Pointer) and cls.__name__ == f"LP_{cls._type_.__name__}":
        return ctypes.POINTER, (cls._type_,)
    return None


def _make_array_class(item: Any, length: int) -> Any:
    return item * length


def _reduce_ctypes(value: Any) -> Reduced:
    """Reduce an instance of ctypes: one that lies inside of other memory is left there."""
    if isinstance(value, ctypes._Pointer):
        return NotImplemented
    owner = value._b_base_
    if owner is not None:
        while owner._b_base_ is not None:
            owner = owner._b_base_
        return _make_overlay, (
            type(value),
            owner,
            ctypes.addressof(value) - ctypes.addressof(owner),
        )
    held = value._objects
    views = list(held.values()) if isinstance(held, dict) else [held]
    if value._b_needsfree_ or len(views) != 1 or not isinstance(views[0], memoryview):
        return NotImplemented
    owner = views[0].obj
    return _make_overlay, (type(value), owner, ctypes.addressof(value) - address_of(owner))


def _make_overlay(kind: Any, owner: Any, offset: int) -> Any:
    return kind.from_buffer(owner, offset)


def _reduce_super(obj: Any) -> Reduced:
    # NB: its attributes are those of what it stands for, so ask the type.
    get = super.__getattribute__
    return super, (get(obj, "__thisclass__"), get(obj, "__self__"))


_NO_EXPORT = "it does not give its inner state away"
_KEEP_DATA = "finish the stream before the state is captured, or keep its data"


def _hash_kinds() -> set[type]:
    return {type(hashlib.new(name)) for name in hashlib.algorithms_guaranteed}


def _compressor_kinds() -> set[type]:
    return {
        type(zlib.compressobj()),
        type(zlib.decompressobj()),
        bz2.BZ2Compressor,
        bz2.BZ2Decompressor,
        lzma.LZMACompressor,
        lzma.LZMADecompressor,
    }


def _register_all() -> None:
    pairs: tuple[tuple[Any, Any], ...] = (
        (_Lock, _reduce_lock),
        (_RLock, _reduce_rlock),
        (threading.Condition, _reduce_condition),
        (threading.local, _reduce_local),
        (threading.Thread, _reduce_thread),
        (queue.Queue, _reduce_queue),
        (queue.SimpleQueue, _reduce_simple_queue),
        (concurrent.futures.Future, _reduce_concurrent_future),
        (concurrent.futures.ThreadPoolExecutor, _reduce_thread_pool),
        (concurrent.futures.ProcessPoolExecutor, _reduce_process_pool),
        (asyncio.Lock, _reduce_asyncio),
        (asyncio.Event, _reduce_asyncio),
        (asyncio.Condition, _reduce_asyncio),
        (asyncio.Semaphore, _reduce_asyncio),
        (asyncio.Queue, _reduce_asyncio),
        (types.FrameType, refuses("a frame of execution cannot travel", "do not keep it")),
        (types.TracebackType, _reduce_traceback),
        (logging.Logger, _reduce_logger),
        (logging.RootLogger, _reduce_logger),
        (weakref.ref, _reduce_weakref),
        (weakref.WeakMethod, _reduce_weak_method),
        (weakref.ProxyType, _reduce_weak_proxy),
        (weakref.CallableProxyType, _reduce_weak_proxy),
        (weakref.WeakValueDictionary, _reduce_weak_mapping),
        (weakref.WeakKeyDictionary, _reduce_weak_mapping),
        (weakref.WeakSet, _reduce_weak_set),
        (types.MappingProxyType, _reduce_mapping_proxy),
        (type({}.keys()), _reduce_dict_view("keys")),
        (type({}.values()), _reduce_dict_view("values")),
        (type({}.items()), _reduce_dict_view("items")),
        (type(collections.OrderedDict().keys()), _reduce_dict_view("keys")),
        (type(collections.OrderedDict().values()), _reduce_dict_view("values")),
        (type(collections.OrderedDict().items()), _reduce_dict_view("items")),
        (memoryview, _reduce_memoryview),
        (contextvars.Context, _reduce_context),
        (
            contextvars.Token,
            refuses("it resets a variable in the context where it was made", "do not keep it"),
        ),
        (BaseException, _reduce_exception),
        (socket.socket, _reduce_socket),
        (ssl.SSLSocket, refuses("a socket belongs to its process; it speaks TLS", REOPEN)),
        (ssl.SSLObject, refuses("a TLS session belongs to its process", REOPEN)),
        (selectors.BaseSelector, _reduce_selector),
        (logging.Handler, _reduce_handler),
        (weakref.finalize, _reduce_finalizer),
        *((kind, _reduce_hash) for kind in _hash_kinds()),
        *((kind, refuses(_NO_EXPORT, _KEEP_DATA)) for kind in _compressor_kinds()),
        (subprocess.Popen, _reduce_popen),
        (multiprocessing.process.BaseProcess, _reduce_process),
        (
            multiprocessing.shared_memory.SharedMemory,
            refuses(
                "it is memory that other processes of this host may share, and whoever is the "
                "first to end removes it for all",
                "keep a copy of the bytes",
            ),
        ),
        (
            multiprocessing.connection._ConnectionBase,
            refuses("it is one end of a pipe or socket, which belongs to its process", REOPEN),
        ),
        (
            multiprocessing.connection.Listener,
            refuses("it listens on a pipe or socket, which belongs to its process", REOPEN),
        ),
        (type(os.environ), _reduce_environment),
        (struct.Struct, _reduce_struct),
        (random.Random, _reduce_random),
        (random.SystemRandom, _reduce_system_random),
        (super, _reduce_super),
        (ctypes.c_int.__mro__[2], _reduce_ctypes),
    )
    REDUCERS.update(pairs)


_register_all()

_FORMER_NAMES = {
    "_new": "resources.new_instance",
    "_set_state": "resources.set_state",
    "_make_ndarray_view": "arrays.make_ndarray_view",
    "_make_file": "files._make_file",
    "_make_closed_file": "files._make_closed_file",
}
"""What earlier streams call by names of this module, and where it is now."""


def __getattr__(name: str) -> Any:
    place = _FORMER_NAMES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, name = place.partition(".")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)
