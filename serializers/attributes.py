"""An object attribute by attribute: what each of them takes, and the bare state for an upgrade.

The object comes first, made but without its state; then the shape of the state; then each
attribute's value in a pickle of its own. All are written by one pickler and read by one unpickler,
which share what they have seen: what two attributes have in common is one object again, and what
refers back to the object itself finds it. The attribute that comes first bears what it shares.

An object that reduces itself in its own way, without a state that could be taken apart, is one
pickle as a whole. Its state cannot be upgraded.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

from . import plain
from .auto import _AutoPickler
from .base import BufferKind, Snapshot, pack_head, parse_head
from .errors import LoadFailed
from .explain import explain_dump, explain_load

ATTRIBUTES_MAX = 1000
"""A state of more attributes is one pickle: it is a table rather than an object."""

WHOLE = "whole"  # the object reduces itself: no state follows
STATELESS = "stateless"
NAMED = "named"  # values follow, one for each name
OPAQUE = "opaque"  # one value follows: the state, which is no plain dict of names

OTHERS = "(others)"
"""In sizes: the object itself and what is not one attribute's."""

Install = Callable[[Any, Any], None]


class _RootPickler(_AutoPickler):
    """Writes one object, the root, without its state."""

    def __init__(self, sink: plain.Sink, root: object, frame: Any) -> None:
        super().__init__(sink)
        self._root = root
        self._frame = frame

    def reducer_override(self, obj: Any) -> Any:
        if obj is self._root and self._frame is not None:
            return self._frame
        return super().reducer_override(obj)


def _taken_apart(root: object) -> tuple[Any, Any]:
    """How the root is made, and its state; (None, None) if it cannot be told apart."""
    reduced = _AutoPickler(plain.Sink()).reducer_override(root)
    if reduced is NotImplemented:
        registered = copyreg.dispatch_table.get(type(root))
        reduced = registered(root) if registered is not None else root.__reduce_ex__(plain.PROTOCOL)
    if not isinstance(reduced, tuple) or not 2 <= len(reduced) <= 5:
        return None, None
    make, args, state, items, pairs = [*reduced, None, None, None][:5]
    return (make, args, None, items, pairs), state


def encode(root: object) -> tuple[Snapshot, dict[str, int]]:
    """Capture an object; see the module.

    Returns:
        The snapshot, only for `decode` of this module, and the bytes that each attribute takes.

    Raises:
        NotSerializable: Something cannot travel; names the path to it. `root` is as before.
    """
    sink = plain.Sink()
    names: list[str] = []
    body: list[bytes] = []
    found: list[tuple[memoryview, BufferKind]] = []
    sizes: dict[str, int] = {}
    pickler: _RootPickler | None = None

    def write(value: object, name: str) -> None:
        """One more pickle of the same stream; its chunks are put together on their own."""
        assert pickler is not None
        pickler.dump(value)
        piece, buffers = plain.assemble(sink.chunks, sink.buffers)
        sink.chunks.clear()
        sink.buffers.clear()
        body.append(piece)
        found.extend(buffers)
        took = len(piece) + sum(view.nbytes for view, _ in buffers)
        sizes[name] = sizes.get(name, 0) + took

    try:
        frame, state = _taken_apart(root)
        pickler = _RootPickler(sink, root, frame)
        write(root, OTHERS)
        if frame is None:
            write((WHOLE, ()), OTHERS)
        elif state is None:
            write((STATELESS, ()), OTHERS)
        elif (
            type(state) is dict
            and len(state) <= ATTRIBUTES_MAX
            and all(type(name) is str for name in state)
        ):
            names = list(state)
            write((NAMED, names), OTHERS)
            for name in names:
                write(state[name], name)
        else:
            write((OPAQUE, ()), OTHERS)
            write(state, OTHERS)
    except MemoryError:
        raise
    except Exception as exc:
        raise explain_dump(root, exc, _AutoPickler(plain.Sink()).reducer_override) from exc
    whole = b"".join(body)
    head = pack_head(
        code_by_value=pickler.code_by_value,
        body_size_bytes=len(whole),
        buffer_sizes_bytes=[view.nbytes for view, _ in found],
        kinds=bytes(kind for _, kind in found),
    )
    return Snapshot(head, whole, tuple(view for view, _ in found)), sizes


def decode(snapshot: Snapshot, install: Install | None = None) -> object:
    """Rebuild what `encode` captured, as a new object.

    Args:
        snapshot: As for `plain.decode`, of which the rules about memory hold too.
        install: Gives the object (first argument) its state (second; None: it has none). Not
            called for an object that reduces itself. None: as pickle does it.

    Raises:
        LoadFailed: Damaged, code of another Python, or something that is missing here.
        Exception: What `install` raises.
    """
    head = parse_head(snapshot.head)
    head.check_loadable()
    sizes = (head.body_size_bytes, *head.buffer_sizes_bytes)
    if sizes != (len(snapshot.body), *(b.nbytes for b in snapshot.buffers)):
        raise LoadFailed("damaged: the sizes of its parts are not those in its head")
    buffers = [
        plain._revive(view, kind) for view, kind in zip(snapshot.buffers, head.kinds, strict=True)
    ]
    unpickler = pickle.Unpickler(io.BytesIO(snapshot.body), buffers=iter(buffers))
    try:
        with plain.collector_off():
            obj: Any = unpickler.load()
            shape, names = unpickler.load()
            state: Any = None
            if shape == NAMED:
                # As pickle does: attributes are found faster by names that are one object.
                state = {sys.intern(name): unpickler.load() for name in names}
            elif shape == OPAQUE:
                state = unpickler.load()
    except Exception as exc:
        raise explain_load(snapshot.body, exc) from exc
    if shape != WHOLE:
        (install or set_state)(obj, state)
    return obj


def set_state(obj: Any, state: Any) -> None:
    """Give an object its state, as pickle does."""
    if state is None:
        return
    setstate = getattr(obj, "__setstate__", None)
    if setstate is not None:
        setstate(state)
        return
    slots = None
    if isinstance(state, tuple) and len(state) == 2:
        state, slots = state
    if state:
        obj.__dict__.update(state)
    for name, value in (slots or {}).items():
        setattr(obj, name, value)


__all__ = ["OTHERS", "decode", "encode", "set_state"]
