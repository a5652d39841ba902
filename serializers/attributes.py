"""An object attribute by attribute: what each of them takes, and the bare state for an upgrade.

The object comes first, made but without its state; then the shape of the state; then each
attribute's value. All are pickles of their own, written by one pickler and read by one unpickler,
which share what they have seen: what two attributes have in common is one object again, and what
refers back to the object itself finds it. The attribute that comes first bears what it shares.

An object that reduces itself in its own way, without a state that could be taken apart, is one
pickle as a whole; its state cannot be upgraded. Of what nests too deep for the C pickler everything
is one pickle, in the same order, and no attribute's size is known.
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from . import plain
from .auto import _AutoPickler, _DeepAutoPickler, notice_registrations
from .base import Snapshot, parse_head
from .by_value import wholly_or_by_need
from .errors import LoadFailed
from .explain import explain_load
from .sink import PROTOCOL, Sink

ATTRIBUTES_MAX = 1000
"""A state of more attributes is one pickle: it is a table rather than an object."""

WHOLE = "whole"  # the object reduces itself: no state follows
STATELESS = "stateless"
NAMED = "named"  # values follow, one for each name
OPAQUE = "opaque"  # one value follows: the state, which is no plain dict of names

_APART = "apart"
_TOGETHER = "together"

OTHERS = "(others)"
"""In sizes: the object itself and what is not one attribute's."""

Install = Callable[[Any, Any], None]


_DEFAULT = (copyreg.__newobj__, copyreg.__newobj_ex__)  # type: ignore[attr-defined]
"""What makes an object that does not say itself how."""


class Rooted:
    """Has one object, the root, reduced to itself without its state; for picklers."""

    root: object = None
    frame: Any = None

    def reducer_override(self, obj: Any) -> Any:
        if obj is self.root and self.frame is not None:
            return self.frame
        return super().reducer_override(obj)  # type: ignore[misc]


class RootedPickler(Protocol):
    """A pickler for `write`."""

    root: object
    frame: Any

    def dump(self, obj: Any, /) -> None: ...


class _RootPickler(Rooted, _AutoPickler):
    pass


class _DeepRootPickler(Rooted, _DeepAutoPickler):
    pass


def _taken_apart(root: object) -> tuple[Any, Any]:
    """How the root is made, and its state; (None, None) if it cannot be told apart."""
    reduced = _AutoPickler(Sink()).reducer_override(root)
    if reduced is NotImplemented:
        registered = copyreg.dispatch_table.get(type(root))
        reduced = registered(root) if registered is not None else root.__reduce_ex__(PROTOCOL)
    if not isinstance(reduced, tuple) or not 2 <= len(reduced) <= 5:
        return None, None
    make, args, state, items, pairs = [*reduced, None, None, None][:5]
    if state is None and make not in _DEFAULT:
        return None, None
    return (make, args, None, items, pairs), state


def _values(root: object, frame: Any, state: Any) -> list[tuple[str, Any]]:
    """What is written after the object, in order, and whose share of the bytes it is."""
    if frame is None:
        return [(OTHERS, (WHOLE, ()))]
    if state is None:
        return [(OTHERS, (STATELESS, ()))]
    named = type(state) is dict and len(state) <= ATTRIBUTES_MAX
    if named and all(type(name) is str for name in state):
        return [(OTHERS, (NAMED, list(state))), *state.items()]
    return [(OTHERS, (OPAQUE, ())), (OTHERS, state)]


def encode(root: object) -> tuple[Snapshot, dict[str, int]]:
    """Capture an object; see the module.

    Returns:
        The snapshot, only for `decode` of this module, and the bytes that each attribute takes.

    Raises:
        NotSerializable: Something cannot travel; names the path to it. `root` is as before.
    """
    notice_registrations()
    return wholly_or_by_need(lambda: _encode(root))


def _encode(root: object) -> tuple[Snapshot, dict[str, int]]:
    try:
        if plain.STACK_IS_BOUNDED or sys.getrecursionlimit() <= plain.RECURSION_LIMIT_MAX:
            with plain.collector_off():
                return _encode_apart(root)
    except MemoryError:
        raise
    except Exception as exc:
        if not plain._ran_out_of_stack(exc):
            raise plain._explained(root, exc, _AutoPickler) from exc
    try:
        with plain.collector_off():
            return _encode_together(root)
    except MemoryError:
        raise
    except Exception as exc:
        raise plain._explained(root, exc, _AutoPickler) from exc


def _encode_apart(root: object) -> tuple[Snapshot, dict[str, int]]:
    sink = Sink()
    pickler = _RootPickler(sink)
    sizes: dict[str, int] = {}
    for name, written in write(root, pickler, sink):
        sizes[name] = sizes.get(name, 0) + written
    return sink.snapshot(code_by_value=pickler.code_by_value), sizes


def write(root: object, pickler: RootedPickler, sink: Sink) -> Iterator[tuple[str, int]]:
    """Write an object attribute by attribute.

    Args:
        root: The object.
        pickler: What writes it.
        sink: Where to.

    Yields:
        Whose share was written, and how many bytes that took; names may come again.
    """
    frame, state = _taken_apart(root)
    pickler.root, pickler.frame = root, frame
    before = 0
    for name, value in [(OTHERS, _APART), (OTHERS, root), *_values(root, frame, state)]:
        pickler.dump(value)
        written = sink.settle()
        yield name, written - before
        before = written


def _encode_together(root: object) -> tuple[Snapshot, dict[str, int]]:
    sink = Sink()
    pickler = _DeepRootPickler(sink)
    frame, state = _taken_apart(root)
    pickler.root, pickler.frame = root, frame
    pickler.dump((_TOGETHER, root, *(value for _, value in _values(root, frame, state))))
    snapshot = sink.snapshot(code_by_value=pickler.code_by_value)
    return snapshot, {OTHERS: snapshot.size_bytes}


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
    head.check_body(snapshot.body)
    buffers = [
        plain._revive(view, kind) for view, kind in zip(snapshot.buffers, head.kinds, strict=True)
    ]
    return load(snapshot.body, buffers, install=install)


def load(
    body: bytes | memoryview,
    buffers: Sequence[object],
    resolve: plain.Resolve | None = None,
    *,
    install: Install | None = None,
) -> object:
    """Unpickle the body of what `encode` or `write` gave.

    Args:
        body: The pickles.
        buffers: What they ask for, in order.
        resolve: For a body that names objects which are elsewhere.
        install: See `decode`.

    Raises:
        LoadFailed: Something that is missing here.
        Exception: What `install` raises.
    """
    unpickler = _unpickler(body, buffers, resolve)
    try:
        with plain.collector_off():
            first = unpickler.load()
            take = iter(first[1:]).__next__ if type(first) is tuple else unpickler.load
            obj: Any = take()
            shape, names = take()
            state: Any = None
            if shape == NAMED:
                # As pickle does: attributes are found faster by names that are one object.
                state = {sys.intern(name): take() for name in names}
            elif shape == OPAQUE:
                state = take()
    except Exception as exc:
        raise explain_load(body, exc) from exc
    if shape != WHOLE:
        (install or set_state)(obj, state)
    return obj


def _unpickler(
    body: bytes | memoryview, buffers: Sequence[object], resolve: plain.Resolve | None
) -> pickle.Unpickler:
    if resolve is not None:
        return plain._ResolvingUnpickler(body, buffers, resolve)
    renamed = plain.former_names and plain._mentions_former_name(body)
    kind = plain._FormerNamesUnpickler if renamed else pickle.Unpickler
    return kind(plain._file(body), buffers=iter(buffers))


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


__all__ = ["OTHERS", "Rooted", "RootedPickler", "decode", "encode", "load", "set_state", "write"]
