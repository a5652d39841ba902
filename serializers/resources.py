"""Reducers for what pickle refuses: recreated at the destination, or refused with a remedy.

The rule: a resource is carried if the copy behaves as the original would have, at a quiescent
point; otherwise it is refused. A reducer never changes its object, apart from flushing files.
Add one with `register`. The names of the functions called `_make_...` are part of the format.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextvars
import ctypes
import gc
import importlib
import io
import logging
import mmap
import multiprocessing
import multiprocessing.process
import os
import queue
import re
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import thread as thread_pool
from typing import Any, NoReturn

from .base import is_checking, lossy
from .errors import LoadFailed, NotSerializable

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


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _set_state(obj: Any, state: dict[str, Any]) -> None:
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


class Places:
    """Where importable modules keep things that are known by being the same: one per stream."""

    kinds = (object, contextvars.ContextVar)

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[str, str]] | None = None

    def find(self, obj: object) -> tuple[str, str] | None:
        """(module, name) of a global variable that holds `obj`, an instance of one of `kinds`."""
        if self._by_id is None:
            self._by_id = {}
            modules: dict[str, Any] = dict(sys.modules)
            for module_name, module in modules.items():
                if isinstance(module, types.ModuleType) and not _by_value(module_name):
                    for name, value in list(vars(module).items()):
                        if type(value) in self.kinds:
                            self._by_id.setdefault(id(value), (module_name, name))
        place = self._by_id.get(id(obj))
        # The map may be older than the object, so look once more.
        return (
            place if place and getattr(sys.modules.get(place[0]), place[1], None) is obj else None
        )


def reduce_by_place(obj: Any, places: Places) -> Reduced:
    """Reduce an `object()`, good for nothing but being compared with `is`, or a ContextVar."""
    place = places.find(obj)
    if place is not None:
        return module_attribute, place
    return NotImplemented if type(obj) is object else _reduce_context_variable(obj)


def singleton_reducer(kind: type) -> Reducer | None:
    """A reducer for a class of stateless module-level instances, if `kind` is one, else None.

    Such instances are compared with `is`, so each has to remain the one that its module holds.
    """
    module = sys.modules.get(kind.__module__)
    ways = ("__reduce_ex__", "__reduce__", "__getstate__")
    if (
        module is None
        or _by_value(kind.__module__)
        or any(getattr(kind, way) is not getattr(object, way) for way in ways)
        or kind.__itemsize__
        or any(vars(base).get("__slots__") for base in kind.__mro__)
        or not any(type(value) is kind for value in list(vars(module).values()))
    ):
        return None

    def reduce(obj: object) -> Reduced:
        if not getattr(obj, "__dict__", None):
            for name, value in list(vars(module).items()):
                if value is obj:
                    return module_attribute, (kind.__module__, name)
        return NotImplemented

    return reduce


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
    return _new, (type(local),), dict(vars(local)), None, None, _set_state


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
    return _new, (type(thread),), state, None, None, _fill_thread


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
    return _new, (type(waiting),), dict(vars(waiting)), None, None, _fill_queue


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
    return _make_thread_pool, (
        type(executor),
        executor._max_workers,
        executor._thread_name_prefix,
        initializer,
        initargs,
        executor._shutdown,
    )


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
    executor = cls(max_workers, prefix, initializer, initargs)
    if shut_down:
        executor.shutdown(wait=False)
    return executor


def _reduce_process_pool(executor: Any) -> Reduced:
    _refuse_work(executor, len(executor._pending_work_items or ()), 0)
    lossy("it is made anew with the same size: what its processes hold is left behind")
    return _make_process_pool, (
        type(executor),
        executor._max_workers,
        executor._mp_context.get_start_method(),
        executor._initializer,
        executor._initargs,
        executor._max_tasks_per_child,
        executor._shutdown_thread,
    )


def _make_process_pool(
    cls: Any,
    max_workers: int,
    start_method: str,
    initializer: Any,
    initargs: Any,
    max_tasks_per_child: int | None,
    shut_down: bool,
) -> Any:
    executor = cls(
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
    return _new, (type(primitive),), state, None, None, _set_state


def _reduce_future(future: asyncio.Future[Any]) -> Reduced:
    if isinstance(future, asyncio.Task) and not future.done():
        coroutine = future.get_coro()
        refuse(
            future,
            f"task {future.get_name()!r} is suspended{_position(coroutine)}",
            "cancel or await it in on_depart, start it again in on_arrive, or use @migrate.every",
        )
    if not future.done():
        waiting = len(getattr(future, "_callbacks", None) or ())
        refuse(
            future,
            f"it is pending with {waiting} waiting for it; it belongs to an event loop here",
            "capture it when nobody waits, and make a new future in on_arrive",
        )
    refuse(future, "it belongs to an event loop here", "keep its result instead of the future")


# --- suspended code ------------------------------------------------------------------------------


def _position(code_object: Any) -> str:
    for prefix in ("gi", "cr", "ag"):
        frame = getattr(code_object, f"{prefix}_frame", None)
        code = getattr(code_object, f"{prefix}_code", None)
        if code is not None:
            where = f"{code.co_filename}, line {frame.f_lineno}" if frame else "its end"
            return f" in {code.co_qualname} at {where}"
    return ""


def _reduce_suspended(obj: Any) -> Reduced:
    refuse(
        obj,
        f"execution is suspended{_position(obj)}, and a frame cannot travel",
        "keep what it iterates over and the position in it, or write it as a class with state",
    )


# --- files ---------------------------------------------------------------------------------------

_STANDARD_STREAMS = ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")


def _reduce_file(file: Any) -> Reduced:
    for name in _STANDARD_STREAMS:
        if file is getattr(sys, name, None):
            return getattr, (sys, name)
    text = isinstance(file, io.TextIOWrapper)
    try:
        raw = file.buffer if text else file
        raw = getattr(raw, "raw", raw)
    except ValueError:
        refuse(file, "its buffer was detached", REOPEN)
    if type(raw) is not io.FileIO:
        refuse(file, f"it wraps a {type_name(type(raw))}, not a file of the system", REOPEN)
    mode = file.mode if text else raw.mode
    if not text and raw.mode == "rb+" and getattr(file, "mode", "").startswith("w"):
        mode = file.mode
    style = (file.encoding, file.errors, file.line_buffering, file.write_through) if text else None
    buffered = not isinstance(file, io.FileIO)
    if file.closed:
        return _make_closed_file, (mode, raw.name, style, buffered)
    try:
        # NB: telling a text file's position writes what it buffers.
        position = 0 if is_checking() and file.writable() else file.tell()
    except OSError as exc:
        if text and file.seekable():
            refuse(
                file,
                "it is being iterated over, so its position cannot be told",
                "read it by readline(), or capture it after the loop",
            )
        refuse(file, f"it has no position ({exc.strerror or exc})", REOPEN)
    if file.writable() and not is_checking():
        file.flush()
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        refuse(file, "it is a pipe, a terminal or a device, not a regular file", REOPEN)
    if not status.st_nlink:
        refuse(file, "its file was deleted, so no path leads to it", "keep its content instead")
    lossy("it is opened again by its path: the same file must be there at the other end")
    return _make_file, (_path_of(file, raw), mode, position, style, buffered)


def _path_of(file: Any, raw: io.FileIO) -> str:
    """Absolute path of an open file, whatever the current folder was when it was opened."""
    link = f"/proc/self/fd/{raw.fileno()}"
    if os.path.islink(link):
        return os.readlink(link)
    if not isinstance(raw.name, str | bytes):
        refuse(file, "it was opened by descriptor, so its path is unknown", REOPEN)
    return os.path.abspath(os.fsdecode(raw.name))


def _open_untouched(path: str, flags: int) -> int:
    # Neither created nor emptied, whatever its mode says: it is as the original left it.
    return os.open(path, flags & ~(os.O_TRUNC | os.O_CREAT | os.O_EXCL))


def _binary(mode: str) -> str:
    return mode if "b" in mode else f"{mode}b"


def _open_as(path: str, mode: str, style: Any, buffered: bool, opener: Any) -> Any:
    if style is None:
        mode = _binary(mode)
        return open(path, mode, buffering=-1 if buffered else 0, opener=opener)
    encoding, errors, line_buffering, write_through = style
    file: Any = open(path, mode.replace("b", ""), encoding=encoding, errors=errors, opener=opener)
    if line_buffering or write_through:
        file.reconfigure(line_buffering=line_buffering, write_through=write_through)
    return file


def _make_file(path: str, mode: str, position: int, style: Any, buffered: bool) -> Any:
    try:
        file = _open_as(path, mode, style, buffered, _open_untouched)
    except OSError as exc:
        raise LoadFailed(
            f"cannot reopen file {path!r} (mode {mode!r}): {exc.strerror}",
            "make the file available here under the same path",
        ) from exc
    size = os.fstat(file.fileno()).st_size
    # NB: a text position is opaque, but its low 64 bits are the byte position.
    if position & (2**64 - 1) > size and "r" in mode and "+" not in mode:
        file.close()
        raise LoadFailed(
            f"file {path!r} has {size} bytes here, fewer than were read of it",
            "make the same file available here",
        )
    file.seek(position)
    return file


def _make_closed_file(mode: str, name: Any, style: Any, buffered: bool) -> Any:
    # Never opened itself: it may be gone, and need not be touched to be closed.
    file = _open_as(os.devnull, mode.replace("x", "w"), style, buffered, None)
    raw = file.buffer if style is not None else file
    raw = getattr(raw, "raw", raw)
    raw.name = name
    if style is not None:
        file.mode = mode
    file.close()
    return file


# --- logging -------------------------------------------------------------------------------------


def _reduce_logger(logger: logging.Logger) -> Reduced:
    if isinstance(logger, logging.RootLogger):
        return logging.getLogger, ()
    # NB: not getLogger(), which would create one of that name here.
    if logging.root.manager.loggerDict.get(logger.name) is logger:
        lossy("it is found by its name: level, handlers and filters are those of the other end")
        return logging.getLogger, (logger.name,)
    state = {name: value for name, value in vars(logger).items() if name not in _LOGGER_PLACE}
    return _new, (type(logger),), state, None, None, _fill_logger


_LOGGER_PLACE = ("parent", "manager", "_cache")


def _fill_logger(logger: logging.Logger, state: dict[str, Any]) -> None:
    logger.__init__(state["name"])  # type: ignore[misc]
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
        refuse(ref, "it is a weak reference of a class of its own", "hold a weakref.ref instead")
    return weakref.ref, (referent,) if callback is None else (referent, callback)


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
    return type(mapping), (), None, None, iter(list(mapping.items()))


def _reduce_weak_set(weak: weakref.WeakSet[Any]) -> Reduced:
    return _new_weak_set, (type(weak),), (list(weak),), None, None, _fill_weak_set


def _new_weak_set(cls: Any) -> Any:
    return cls()


def _fill_weak_set(weak: weakref.WeakSet[Any], state: tuple[list[Any]]) -> None:
    for item in state[0]:
        weak.add(item)


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


class _PyBuffer(ctypes.Structure):
    """`Py_buffer`. Source: CPython's Include/pybuffer.h."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_PY_BUF_FULL_RO = 0x11C


def _address(obj: Any) -> int:
    """Address of the first element of an exporter's memory."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(
        ctypes.py_object(obj), ctypes.byref(buffer), ctypes.c_int(_PY_BUF_FULL_RO)
    )
    address = buffer.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


def _reduce_memoryview(view: memoryview) -> Reduced:
    try:
        owner = view.obj
    except ValueError:
        refuse(view, "it was released", "drop it")
    if owner is None:
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
    offset = (_address(view) + low - _address(owner)) if view.nbytes else 0
    if view.ndim == 1:
        shape = None
    return _make_memoryview, (owner, offset, count, step, view.format, shape, view.readonly)


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


def reduce_ndarray(array: Any) -> Reduced:
    """Carry a view of an array as a view, so that writes through either go on being seen."""
    base = array.base
    while type(getattr(base, "base", None)) is type(array):
        base = base.base
    if type(base) is not type(array) or array.dtype.hasobject:
        return NotImplemented
    if not (base.flags.c_contiguous or base.flags.f_contiguous) or base.dtype.hasobject:
        return NotImplemented
    offset = array.ctypes.data - base.ctypes.data if array.size else 0
    return _make_ndarray_view, (
        base,
        offset,
        array.shape,
        array.strides,
        array.dtype,
        array.flags.writeable,
    )


def _make_ndarray_view(
    base: Any, offset: int, shape: Any, strides: Any, dtype: Any, writeable: bool
) -> Any:
    flat = base.reshape(-1, order="F" if base.flags.f_contiguous else "C")
    view = flat.__class__(shape, dtype, buffer=flat.view("u1"), offset=offset, strides=strides)
    if not writeable:
        view.flags.writeable = False
    return view


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
    if solid.__basicsize__ != BaseException.__basicsize__:
        # It has fields of its own in C, which its own __reduce__ knows.
        return NotImplemented
    state = (vars(exc), exc.__cause__, exc.__context__, exc.__suppress_context__)
    return _make_exception, (cls, exc.args), state, None, None, _fill_exception


def _make_exception(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    made = BaseException.__new__(cls)
    made.args = args
    return made


def _fill_exception(exc: BaseException, state: Any) -> None:
    attributes, exc.__cause__, exc.__context__, exc.__suppress_context__ = state
    vars(exc).update(attributes)


# --- other ---------------------------------------------------------------------------------------


def _reduce_socket(sock: socket.socket) -> Reduced:
    try:
        peer = f"connected to {sock.getpeername()}"
    except OSError:
        peer = "closed" if sock.fileno() == -1 else "open, but not connected"
    refuse(sock, f"a socket belongs to its process; it is {peer}", REOPEN)


def _reduce_popen(process: subprocess.Popen[Any]) -> Reduced:
    code = process.poll()
    if code is None:
        refuse(
            process,
            f"process {process.pid} runs {process.args!r:.80} and is a child of this process",
            "end it in on_depart and start it again in on_arrive",
        )
    refuse(
        process,
        f"a process that ended with {code} cannot be waited for elsewhere",
        "keep its return code and output instead",
    )


def _reduce_sqlite(connection: sqlite3.Connection) -> Reduced:
    try:
        rows = connection.execute("PRAGMA database_list").fetchall()
        where = next((row[2] for row in rows if row[1] == "main"), "") or "a database in memory"
    except sqlite3.Error as exc:
        where = f"a database ({exc})"
    refuse(connection, f"a connection to {where} belongs to its process", REOPEN)


def _reduce_struct(form: struct.Struct) -> Reduced:
    return struct.Struct, (form.format,)


def _reduce_super(obj: Any) -> Reduced:
    # NB: its attributes are those of what it stands for, so ask the type.
    get = super.__getattribute__
    return super, (get(obj, "__thisclass__"), get(obj, "__self__"))


def _register_all() -> None:
    for kind, reducer in (
        (_Lock, _reduce_lock),
        (_RLock, _reduce_rlock),
        (threading.Condition, _reduce_condition),
        (threading.local, _reduce_local),
        (threading.Thread, _reduce_thread),
        (queue.Queue, _reduce_queue),
        (queue.SimpleQueue, _reduce_simple_queue),
        (concurrent.futures.ThreadPoolExecutor, _reduce_thread_pool),
        (concurrent.futures.ProcessPoolExecutor, _reduce_process_pool),
        (asyncio.Lock, _reduce_asyncio),
        (asyncio.Event, _reduce_asyncio),
        (asyncio.Condition, _reduce_asyncio),
        (asyncio.Semaphore, _reduce_asyncio),
        (asyncio.Queue, _reduce_asyncio),
        (asyncio.Future, _reduce_future),
        (asyncio.Task, _reduce_future),
        (asyncio.AbstractEventLoop, refuses("an event loop belongs to its thread", REOPEN)),
        (asyncio.Handle, refuses("it is scheduled on an event loop here", "use @migrate.every")),
        (types.GeneratorType, _reduce_suspended),
        (types.CoroutineType, _reduce_suspended),
        (types.AsyncGeneratorType, _reduce_suspended),
        (types.FrameType, refuses("a frame of execution cannot travel", "do not keep it")),
        (types.TracebackType, refuses("it holds frames of execution", "keep it as text")),
        (io.TextIOWrapper, _reduce_file),
        (io.BufferedReader, _reduce_file),
        (io.BufferedWriter, _reduce_file),
        (io.BufferedRandom, _reduce_file),
        (io.FileIO, _reduce_file),
        (
            tempfile._TemporaryFileWrapper,
            refuses("its file is deleted with the original", "keep its content instead"),
        ),
        (logging.Logger, _reduce_logger),
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
        (ssl.SSLContext, refuses("its keys cannot be read back", REOPEN)),
        (subprocess.Popen, _reduce_popen),
        (
            multiprocessing.process.BaseProcess,
            refuses("it is a child of this process", "start another one in on_arrive"),
        ),
        (sqlite3.Connection, _reduce_sqlite),
        (sqlite3.Cursor, refuses("a cursor belongs to its connection", REOPEN)),
        (mmap.mmap, refuses("mapped memory belongs to its process", REOPEN)),
        (struct.Struct, _reduce_struct),
        (super, _reduce_super),
    ):
        REDUCERS[kind] = reducer


_register_all()
