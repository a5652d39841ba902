"""Pickles what nests too deep for the C pickler: the same stream, made with a stack of its own.

The C pickler calls itself for each level. Python stops it with RecursionError after some thousand
levels; that limit cannot be lifted for one thread alone, and from Python 3.12 on not at all. So a
dump that ends in RecursionError is done again here, where a level costs a generator on a list and
not a frame on the stack. It runs in the caller's own thread, because reducers ask whose thread it
is. It takes about twenty times as long per object, and only what is too deep pays for that: the
quick way is the same as without this module, apart from its failing first.

Objects are taken in the order of the C pickler and by its rules, so reducers, identity and cycles
come out the same. Loading needs nothing: the unpickler is a machine with a stack of values.
Source: `save` and `save_reduce` in CPython's Modules/_pickle.c; PEP 3154, PEP 574.
"""

from __future__ import annotations

import copyreg
import pickle
import types
from collections.abc import Iterable, Iterator
from typing import Any

from .base import BufferKind
from .errors import NotSerializable
from .sink import IN_BAND_BYTES_MAX, LARGE_BYTES_MIN, PROTOCOL, Sink

LEVELS_MAX = 10_000_000
"""Levels of one dump; what is deeper is refused. Source: measured, some 500 bytes a level while it
is being written, so this bounds a dump to 5 GB beyond its own size."""

_BATCH = 1000
_Children = Iterator[Any]


_PythonPickler: Any = pickle._Pickler


class _Copying:
    """A file for Python's framer, which gives views of a buffer that they must not outlive."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, data: bytes | memoryview) -> None:
        """Take a frame, or its head."""
        self._sink.write(bytes(data))


class DeepPickler(_PythonPickler):  # type: ignore[misc]
    """One stream; subclasses add `reducer_override`."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        super().__init__(_Copying(sink), PROTOCOL)

    def dump(self, obj: Any) -> None:
        """Write `obj`, and all that it refers to.

        Raises:
            NotSerializable: It nests deeper than `LEVELS_MAX`; or as a reducer says.
            Exception: As pickle's own pickler.
        """
        self.write(pickle.PROTO + bytes((PROTOCOL,)))
        self.framer.start_framing()
        self.save(obj)
        self.write(pickle.STOP)
        self.framer.end_framing()

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Write one object and what it refers to; the stack is this call's own."""
        pending: list[_Children] = []
        children = self._begin(obj)
        while True:
            if children is not None:
                pending.append(children)
                if len(pending) > LEVELS_MAX:
                    raise NotSerializable(
                        "", "object", f"it nests more than {LEVELS_MAX} levels deep", ""
                    )
            # What is small is written at once by `_begin`; only the rest is pushed.
            while pending:
                child = next(pending[-1], _END)
                if child is not _END:
                    children = self._begin(child)
                    if children is None:
                        continue
                    break
                pending.pop()
            else:
                return

    def _begin(self, obj: Any) -> _Children | None:
        """Write all of a small object; for others return what writes the rest.

        That one yields each object to be written at that place of the stream.
        """
        self.framer.commit_frame()
        kind = type(obj)
        known = self.memo.get(id(obj))
        if known is not None:
            self.write(self.get(known[0]))
            return None
        leaf = _LEAVES.get(kind)
        if leaf is not None:
            leaf(self, obj)
            return None
        if kind is bytes or kind is bytearray:
            self._save_byte_string(obj, kind)
            return None
        container = _CONTAINERS.get(kind)
        if container is not None:
            children: _Children | None = container(self, obj)
            return children
        if kind is pickle.PickleBuffer:
            self._save_buffer(obj)
            return None
        reduced = self._reduce(obj, kind)
        if reduced is None:
            if kind is type:
                self.save_type(obj)
            else:
                self.save_global(obj)
            return None
        if isinstance(reduced, str):
            self.save_global(obj, reduced)
            return None
        if not isinstance(reduced, tuple) or not 2 <= len(reduced) <= 6:
            raise pickle.PicklingError("__reduce__ must return a string or 2 to 6 items")
        return self._reduced(obj, *reduced)

    def reducer_override(self, obj: Any) -> Any:
        """As of `pickle.Pickler`."""
        return NotImplemented

    def _reduce(self, obj: Any, kind: Any) -> Any:
        """What stands for an object; None if its name does."""
        reduced = self.reducer_override(obj)
        if reduced is not NotImplemented:
            return reduced
        if kind is type or kind is types.FunctionType:
            return None
        special = copyreg.dispatch_table.get(kind)
        if special is not None:
            return special(obj)
        if issubclass(kind, type):
            return None
        return obj.__reduce_ex__(PROTOCOL)

    # --- byte strings ----------------------------------------------------------------------------

    def _save_byte_string(self, obj: bytes | bytearray, kind: type) -> None:
        if len(obj) < LARGE_BYTES_MIN or not self._sink.has_room:
            (self.save_bytes if kind is bytes else self.save_bytearray)(obj)
            return
        buffer_kind = BufferKind.BYTES if kind is bytes else BufferKind.BYTEARRAY
        # NB: a view of a live bytearray would forbid its owner to resize it.
        self._sink.found.append((memoryview(bytes(obj)), buffer_kind))
        self.write(pickle.NEXT_BUFFER)
        self.memoize(obj)

    def _save_buffer(self, obj: pickle.PickleBuffer) -> None:
        raw = obj.raw()
        if raw.nbytes > IN_BAND_BYTES_MAX and self._sink.has_room:
            kind = BufferKind.READ_ONLY if raw.readonly else BufferKind.WRITABLE
            self._sink.found.append((raw.toreadonly(), kind))
            self.write(pickle.NEXT_BUFFER)
            if raw.readonly:
                self.write(pickle.READONLY_BUFFER)
            return
        size = raw.nbytes
        if not raw.readonly:
            head = pickle.BYTEARRAY8 + size.to_bytes(8, "little")
        elif size < 256:
            head = pickle.SHORT_BINBYTES + size.to_bytes(1, "little")
        elif size <= 0xFFFFFFFF:
            head = pickle.BINBYTES + size.to_bytes(4, "little")
        else:
            head = pickle.BINBYTES8 + size.to_bytes(8, "little")
        self.write(head + raw.tobytes())
        self.memoize(obj)

    # --- containers ------------------------------------------------------------------------------

    def _begin_tuple(self, obj: tuple[Any, ...]) -> _Children | None:
        if not obj:
            self.write(pickle.EMPTY_TUPLE)
            return None
        return self._tuple(obj)

    def _tuple(self, obj: tuple[Any, ...]) -> _Children:
        size = len(obj)
        if size > 3:
            self.write(pickle.MARK)
        yield from obj
        known = self.memo.get(id(obj))
        if known is not None:
            # It refers to itself, and was written while its items were.
            self.write((pickle.POP_MARK if size > 3 else pickle.POP * size) + self.get(known[0]))
            return
        self.write(pickle.TUPLE if size > 3 else _TUPLES[size])
        self.memoize(obj)

    def _frozen_set(self, obj: frozenset[Any]) -> _Children:
        self.write(pickle.MARK)
        yield from obj
        known = self.memo.get(id(obj))
        if known is not None:
            self.write(pickle.POP_MARK + self.get(known[0]))
            return
        self.write(pickle.FROZENSET)
        self.memoize(obj)

    def _set(self, obj: set[Any]) -> _Children:
        self.write(pickle.EMPTY_SET)
        self.memoize(obj)
        return self._batches(list(obj), pickle.ADDITEMS)

    def _list(self, obj: list[Any]) -> _Children:
        self.write(pickle.EMPTY_LIST)
        self.memoize(obj)
        return self._batches(obj, pickle.APPENDS)

    def _dict(self, obj: dict[Any, Any]) -> _Children:
        self.write(pickle.EMPTY_DICT)
        self.memoize(obj)
        return self._pairs(obj.items())

    def _batches(self, items: Iterable[Any], opcode: bytes) -> _Children:
        count = 0
        for item in items:
            if not count:
                self.write(pickle.MARK)
            yield item
            count += 1
            if count == _BATCH:
                self.write(opcode)
                count = 0
        if count:
            self.write(opcode)

    def _pairs(self, pairs: Iterable[tuple[Any, Any]]) -> _Children:
        count = 0
        for key, value in pairs:
            if not count:
                self.write(pickle.MARK)
            yield key
            yield value
            count += 1
            if count == _BATCH:
                self.write(pickle.SETITEMS)
                count = 0
        if count:
            self.write(pickle.SETITEMS)

    # --- everything else -------------------------------------------------------------------------

    def _reduced(
        self,
        obj: Any,
        function: Any,
        args: Any,
        state: Any = None,
        items: Any = None,
        pairs: Any = None,
        setter: Any = None,
    ) -> _Children:
        if not isinstance(args, tuple):
            raise pickle.PicklingError("the second item of its __reduce__ must be a tuple")
        if not callable(function):
            raise pickle.PicklingError("the first item of its __reduce__ must be callable")
        name = getattr(function, "__name__", "")
        if name == "__newobj_ex__" and len(args) == 3:
            self._check_class(obj, args[0])
            yield from args
            self.write(pickle.NEWOBJ_EX)
        elif name == "__newobj__" and args:
            self._check_class(obj, args[0])
            yield args[0]
            yield args[1:]
            self.write(pickle.NEWOBJ)
        else:
            yield function
            yield args
            self.write(pickle.REDUCE)
        known = self.memo.get(id(obj))
        if known is not None:
            # Its arguments refer to it, and it was written while they were.
            self.write(pickle.POP + self.get(known[0]))
            return
        self.memoize(obj)
        if items is not None:
            yield from self._batches(items, pickle.APPENDS)
        if pairs is not None:
            yield from self._pairs(pairs)
        if state is None:
            return
        if setter is None:
            yield state
            self.write(pickle.BUILD)
        else:
            yield setter
            yield obj
            yield state
            self.write(pickle.TUPLE2 + pickle.REDUCE + pickle.POP)

    def _check_class(self, obj: Any, cls: Any) -> None:
        if not hasattr(cls, "__new__"):
            raise pickle.PicklingError("the class that its __reduce__ names has no __new__")
        if obj.__class__ is not cls:
            raise pickle.PicklingError("its __reduce__ names another class than its own")


_END = object()
# NB: not the pickler's own table `dispatch`, into which dill writes.
_LEAVES: dict[type, Any] = {
    type(None): _PythonPickler.save_none,
    bool: _PythonPickler.save_bool,
    int: _PythonPickler.save_long,
    float: _PythonPickler.save_float,
    str: _PythonPickler.save_str,
}
_TUPLES = {1: pickle.TUPLE1, 2: pickle.TUPLE2, 3: pickle.TUPLE3}
_CONTAINERS: dict[type, Any] = {
    tuple: DeepPickler._begin_tuple,
    list: DeepPickler._list,
    dict: DeepPickler._dict,
    set: DeepPickler._set,
    frozenset: DeepPickler._frozen_set,
}
