"""Pickle protocol 5 with buffers out of band: the fast path, and what all of it shares."""

from __future__ import annotations

import gc
import io
import pickle
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from . import memory
from .base import BufferKind, Snapshot, parse_head
from .deep import DeepPickler
from .errors import LoadFailed, NotSerializable
from .sink import PROTOCOL, Sink

COLLECTOR_OFF_BYTES_MIN = 64 * 1024
"""Bodies from this size on are loaded with the collector off. Source: measured, the young
generation is scanned about once per 700 containers, which is felt from some thousands on."""

_collector_lock = threading.Lock()
_collector_users = 0
_collector_was_on = False


@contextmanager
def collector_off() -> Iterator[None]:
    """Keep the cyclic collector off; the last of several users restores what the first found."""
    global _collector_users, _collector_was_on
    with _collector_lock:
        if _collector_users == 0:
            _collector_was_on = gc.isenabled()
            gc.disable()
        _collector_users += 1
    try:
        yield
    finally:
        with _collector_lock:
            _collector_users -= 1
            if _collector_users == 0 and _collector_was_on:
                gc.enable()


former_names: list[Mapping[tuple[str, str], object]] = []
"""Tables of classes by the (module, qualified name) that they had before they were moved or
renamed. A load looks there for what it does not find under the name that was written."""


def _mentions_former_name(body: bytes | memoryview) -> bool:
    """Whether a body may refer to something by a former name: a search for its text."""
    for table in former_names:
        for _, name in table:
            if re.search(re.escape(name.encode()), body):
                return True
    return False


def find_former(module: str, name: str) -> object | None:
    """What once had this name, as far as was declared; None if nothing had."""
    for table in former_names:
        if (module, name) in table:
            return table[module, name]
    return None


class _FormerNamesUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return super().find_class(module_name, global_name)
        except (ImportError, AttributeError):
            found = find_former(module_name, global_name)
            if found is None:
                raise
            return found


class _Frames:
    """A file of a body, for a load in a thread: other threads get their turn at each read.

    The C unpickler reads frame by frame, 64 KiB each, and lets nobody else run in between, unless
    it has to run Python to read. Source: measured, a load of 6 MiB then stops an event loop for as
    long as any thread does that computes, and not for all its 100 ms; it takes some 5 % longer.
    """

    def __init__(self, body: bytes | memoryview) -> None:
        self._body = memoryview(body)
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        end = len(self._body) if size < 0 else self._at + size
        found = bytes(self._body[self._at : end])
        self._at += len(found)
        return found

    def readinto(self, buffer: memoryview) -> int:
        found = self._body[self._at : self._at + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def readline(self) -> bytes:
        found = b""
        while not found.endswith(b"\n"):
            more = bytes(self._body[self._at : self._at + 256])
            if not more:
                break
            line = more[: more.find(b"\n") + 1] or more
            self._at += len(line)
            found += line
        return found


YIELDING_BYTES_MIN = 256 * 1024
"""Bodies from this size on let other threads run meanwhile: some milliseconds of loading."""


def _file(body: bytes | memoryview) -> Any:
    if len(body) < YIELDING_BYTES_MIN or threading.current_thread() is threading.main_thread():
        return io.BytesIO(body)
    return _Frames(body)


class _ResolvingUnpickler(_FormerNamesUnpickler):
    def __init__(self, body: bytes | memoryview, buffers: Sequence[object], resolve: Resolve):
        super().__init__(_file(body), buffers=buffers)
        self._resolve = resolve

    def persistent_load(self, pid: Any, /) -> Any:
        return self._resolve(pid)


Resolve = Callable[[Any], object]
"""Gives the object that a name in a body stands for."""


def _unpickle(
    body: bytes | memoryview, buffers: Sequence[object], resolve: Resolve | None
) -> object:
    if resolve is not None:
        return _ResolvingUnpickler(body, buffers, resolve).load()
    if former_names and _mentions_former_name(body):
        return _FormerNamesUnpickler(_file(body), buffers=buffers).load()
    file = _file(body)
    if type(file) is _Frames:
        return pickle.Unpickler(file, buffers=buffers).load()
    return pickle.loads(body, buffers=buffers)


def load(
    body: bytes | memoryview, buffers: Sequence[object], resolve: Resolve | None = None
) -> object:
    """Unpickle a body, naming what is missing if it fails.

    Args:
        body: The pickle.
        buffers: What it asks for, in order.
        resolve: For a body that names objects which are elsewhere.

    Raises:
        LoadFailed: Anything in the body, or run by it, failed.
    """
    try:
        if len(body) < COLLECTOR_OFF_BYTES_MIN:
            return _unpickle(body, buffers, resolve)
        with collector_off():
            return _unpickle(body, buffers, resolve)
    except Exception as exc:
        # Imported when first needed, here and below: `python -m serializers.explain` wants it so.
        from .explain import explain_load

        raise explain_load(body, exc) from exc


def decode(snapshot: Snapshot) -> object:
    """Rebuild the objects of a snapshot made by any serializer of this package.

    Memory that was writable comes back writable: a buffer in writable memory is taken over
    uncopied, so it must not be used otherwise afterwards; one in read-only memory is copied.

    Raises:
        LoadFailed: Damaged, code of another Python, or something that is missing here.
    """
    head = parse_head(snapshot.head)
    head.check_loadable()
    sizes = (head.body_size_bytes, *head.buffer_sizes_bytes)
    if sizes != (len(snapshot.body), *(b.nbytes for b in snapshot.buffers)):
        raise LoadFailed("damaged: the sizes of its parts are not those in its head")
    head.check_body(snapshot.body)
    buffers = [_revive(view, kind) for view, kind in zip(snapshot.buffers, head.kinds, strict=True)]
    return load(snapshot.body, buffers)


def _revive(view: memoryview, kind: int) -> object:
    if kind == BufferKind.WRITABLE:
        return memory.copied(view, kind) if view.readonly else view
    if kind == BufferKind.BYTEARRAY:
        return memory.copied(view, kind)
    owner = view.obj
    if kind == BufferKind.BYTES:
        is_all = type(owner) is bytes and len(owner) == view.nbytes
        return owner if is_all else memory.copied_bytes(view)
    if not view.readonly:
        return view.toreadonly()
    # Read-only to us is not the same as never written to: only bytes are safe to share.
    return view if type(owner) is bytes else memoryview(memory.copied_bytes(view))


class Pickler(Protocol):
    """A pickler as `write` uses it."""

    def dump(self, obj: Any, /) -> None: ...
    def reducer_override(self, obj: Any, /) -> Any: ...
    def clear_memo(self) -> None: ...


Quick = TypeVar("Quick", bound=Pickler)
Deep = TypeVar("Deep", bound=DeepPickler)


def write(
    obj: object, quick: Callable[[Sink], Quick], deep: Callable[[Sink], Deep]
) -> tuple[Sink, Quick | Deep]:
    """Pickle `obj` into a sink, by the C pickler unless it nests too deep for that.

    Returns:
        The sink, and the pickler that was used.

    Raises:
        NotSerializable: Something cannot travel; names the path to it.
    """
    sink = Sink()
    pickler: Quick | Deep = quick(sink)
    try:
        if stack_is_safe():
            # What a dump allocates is no garbage before it ends, so looking for some is in vain.
            with collector_off():
                pickler.dump(obj)
            return sink, pickler
    except MemoryError:
        raise
    except Exception as exc:
        let_go(sink, pickler)
        if not _ran_out_of_stack(exc):
            raise _explained(obj, exc, quick) from exc
    sink = Sink()
    pickler = deep(sink)
    try:
        with collector_off():
            pickler.dump(obj)
    except MemoryError:
        raise
    except Exception as exc:
        let_go(sink, pickler)
        raise _explained(obj, exc, quick) from exc
    return sink, pickler


def let_go(sink: Sink, pickler: Pickler) -> None:
    """Hold nothing of the live objects any more, though a traceback refers to these two."""
    sink.abandon()
    pickler.clear_memo()


def _explained(
    obj: object, cause: BaseException, quick: Callable[[Sink], Pickler]
) -> NotSerializable:
    from .explain import explain_dump

    return explain_dump(obj, cause, quick(Sink()).reducer_override)


STACK_IS_BOUNDED = sys.version_info >= (3, 12)
"""Whether Python bounds the recursion of C code whatever `sys.setrecursionlimit` says."""
RECURSION_LIMIT_MAX = 20_000
"""A much higher limit than this, where it is the only bound, would let the C pickler overflow a
stack of 8 MiB. Source: measured on 3.11, which overflows at 47,000 nested lists or 19,000 nested
objects, each of which counts twice."""


def stack_is_safe() -> bool:
    """Whether what nests too deep for the C pickler ends in RecursionError, not in a crash."""
    return STACK_IS_BOUNDED or sys.getrecursionlimit() <= RECURSION_LIMIT_MAX


def _ran_out_of_stack(exc: BaseException | None) -> bool:
    # A reducer may have wrapped it. Bounded, for the chain might be a ring.
    for _ in range(64):
        if exc is None:
            return False
        if isinstance(exc, RecursionError):
            return True
        exc = exc.__cause__ or exc.__context__
    return False


class PlainSerializer:
    """Nothing but pickle: refuses classes and functions that are not importable.

    It never refers to `__main__`, because that is another module in another process.
    """

    def encode(self, obj: object) -> Snapshot:
        """Capture `obj`; see `Serializer.encode`."""
        sink, _ = write(obj, _PlainPickler, _DeepPlainPickler)
        return sink.snapshot(code_by_value=False)

    def decode(self, snapshot: Snapshot) -> object:
        """Rebuild it; see `decode`."""
        return decode(snapshot)


class _NothingOfMain:
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | types.FunctionType) and obj.__module__ == "__main__":
            raise NotSerializable(
                "",
                f"__main__.{obj.__qualname__}",
                "it is defined in __main__, which is another module elsewhere",
                "use the auto serializer, or move it into a module",
            )
        return NotImplemented


class _PlainPickler(_NothingOfMain, pickle.Pickler):
    def __init__(self, sink: Sink) -> None:
        super().__init__(sink, PROTOCOL, buffer_callback=sink.take_buffer)


class _DeepPlainPickler(_NothingOfMain, DeepPickler):
    pass
