"""The default serializer: plain pickle, code by value, and resources, composed in one pass.

One C pickler does the work. It asks `reducer_override` about everything that is not a built-in
value, which decides by type, once per type:

1. functions and classes: by reference if they can be imported, else by value (`by_value`);
2. types with a reducer of ours or one registered by the user, and their subclasses (`resources`);
3. pieces of code that cloudpickle reduces, and the few types that only dill can;
4. all else: as pickle does it.

Small values made of built-in types alone skip all of that.
"""

from __future__ import annotations

import copyreg
import ctypes
import functools
import pickle
import sys
import types
from collections.abc import Callable, Mapping, Set
from typing import Any

import dill

from . import asynchronous, databases, files, iterators, plain, secure  # noqa: F401 - For their reducers.
from .base import HEAD_SIZE_BYTES, Snapshot, is_plain, plain_head
from .by_value import (
    HELPERS,
    TYPE_REDUCERS,
    Namespaces,
    Reduced,
    is_by_value_module,
    is_importable,
    reduce_cell,
    reduce_class,
    reduce_function,
    reduce_helper,
    wholly_or_by_need,
)
from .deep import DeepPickler
from .errors import CheckReport
from .objects import (
    attributes_alone,
    beside_reducer,
    forget_tables,
    is_ordinary,
    is_still_ordinary,
    object_reducer,
    ordinary_reducer,
)
from .resources import (
    REDUCERS,
    Places,
    Reducer,
    module_attribute,
    on_register,
    reduce_by_place,
    reduce_ctypes_class,
    singleton_reducer,
)
from .sink import IN_BAND_BYTES_MAX, PROTOCOL, Sink
from .third_party import third_party_reducer

_Action = Callable[[Any, "_Decider"], Reduced]

_DECISIONS_MAX = 10_000
"""Types whose treatment is remembered; beyond that all are decided anew."""
_plain_types: set[type] = set()
_actions: dict[type, _Action] = {}
_copyreg_size = len(copyreg.dispatch_table)

_DILL_ONLY = (types.ClassMethodDescriptorType,)
"""Types that neither pickle nor cloudpickle takes and dill does. Source: tried, with dill 0.4.1 and
cloudpickle 3.1.2; the other ones, such as `super` objects and caches, are reduced here, since a
pickle within a pickle would cut what they share with the rest of the state."""


class _Decider:
    """What one stream's pickler knows; see the module.

    What most streams do not need is made when first used: a small stream takes microseconds.
    """

    code_by_value = False
    # By type, for types that cannot be imported, as `_plain_types` and `_actions` for all others.
    plain_types: Set[type] = frozenset()
    actions: Mapping[type, _Action] = types.MappingProxyType({})
    quick: Mapping[type, Reducer] = types.MappingProxyType({})
    """Reducers of classes that pickle does nothing special with, as this stream has found. The next
    one may find such a class changed."""

    def remember_plain(self, kind: type) -> None:
        """Leave instances of `kind` to pickle in this stream."""
        if not isinstance(self.plain_types, set):
            self.plain_types = set()
        self.plain_types.add(kind)

    def remember_action(self, kind: type, action: _Action) -> None:
        """Reduce instances of `kind` by `action` in this stream."""
        if not isinstance(self.actions, dict):
            self.actions = {}
        self.actions[kind] = action

    @functools.cached_property
    def namespaces(self) -> Namespaces:
        return Namespaces()

    @functools.cached_property
    def places(self) -> Places:
        return Places()

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        reducer = self.quick.get(kind)
        if reducer is not None:
            return reducer(obj)
        if kind in _plain_types or kind in self.plain_types:
            return NotImplemented
        action = _actions.get(kind) or self.actions.get(kind) or _decide(kind, self)
        return action(obj, self)

    def remember_quick(self, kind: type, reducer: Reducer) -> None:
        """Reduce instances of `kind` by `reducer`, asked before anything else, in this stream."""
        if not isinstance(self.quick, dict):
            self.quick = {}
        self.quick[kind] = reducer


class _AutoPickler(_Decider, pickle.Pickler):
    def __init__(self, sink: Sink) -> None:
        super().__init__(sink, PROTOCOL, buffer_callback=sink.take_buffer)


class _Looker(_Decider):
    """For walks that load nothing: it asks only what there is."""

    @functools.cached_property
    def namespaces(self) -> Namespaces:
        return Namespaces(methods_first=False)


class _DeepAutoPickler(_Decider, DeepPickler):
    """For what nests too deep for the C pickler."""


def _decide(kind: type, pickler: _Decider) -> _Action:
    """Choose how instances of `kind` are reduced, and remember it.

    For ever if the class can be imported, else for this stream: it might be a temporary one.
    """
    action = _choose(kind)
    if not is_importable(kind):
        if action is _as_pickle_does:
            pickler.remember_plain(kind)
        else:
            pickler.remember_action(kind, action)
    else:
        if len(_actions) + len(_plain_types) >= _DECISIONS_MAX:
            forget_decisions()
        if action is _as_pickle_does:
            _plain_types.add(kind)
        else:
            _actions[kind] = action
    return action


def forget_decisions() -> None:
    """Decide all types anew: something was registered."""
    _plain_types.clear()
    _actions.clear()


on_register.append(forget_decisions)


def _choose(kind: type) -> _Action:
    if kind is types.FunctionType:
        return _function_action
    if issubclass(kind, type):
        return _class_action
    if kind is types.CellType:
        return lambda obj, pickler: reduce_cell(obj, pickler.namespaces)
    if kind in HELPERS:
        return _without_pickler(reduce_helper)
    if kind in copyreg.dispatch_table:
        # What a program told pickle itself about exactly this type is its last word.
        return _as_pickle_does
    foreign = third_party_reducer(kind)
    if foreign is not None:
        return _without_pickler(foreign)
    for base in kind.__mro__:
        reducer = REDUCERS.get(base)
        if reducer is not None:
            return _without_pickler(reducer)
        if base is not object and _reduces_itself(base):
            break
    reducer = TYPE_REDUCERS.get(kind)
    if reducer is not None:
        return _code_action if kind in _CARRIES_CODE else _without_pickler(reducer)
    if kind in _DILL_ONLY:
        return _dill_action
    if kind in Places.kinds:
        return lambda obj, pickler: reduce_by_place(obj, pickler.places)
    own = object_reducer(kind)
    reducer = beside_reducer(kind, singleton_reducer(kind, own) or own)
    if is_ordinary(kind):
        return _Ordinary(reducer or ordinary_reducer(kind), is_pickles_own=reducer is None)
    return _as_pickle_does if reducer is None else _without_pickler(reducer)


def leaves_to_pickle(kind: type) -> bool:
    """Tell whether instances of a class that can be imported are left to pickle as it is."""
    notice_registrations()
    action = _choose(kind)
    left = action is _as_pickle_does or (type(action) is _Ordinary and action.is_pickles_own)
    return is_importable(kind) and left


def runs_code(kind: type) -> bool:
    """Tell whether capturing instances of `kind` may run what a program defines, hence anything."""
    reducers = [copyreg.dispatch_table.get(kind), *map(REDUCERS.get, kind.__mro__)]
    if any(_is_programs(reducer) for reducer in reducers if reducer is not None):
        return True
    return not is_ordinary(kind) and _is_programs(kind)


def _is_programs(code: Any) -> bool:
    """Tell whether a class or function is neither of Python, nor of numpy, nor of ours."""
    package = str(getattr(code, "__module__", None) or "builtins").partition(".")[0]
    is_ours = getattr(sys.modules.get(package), "__livemigrate__", False)
    return not is_ours and package not in _RUN_NOTHING


_RUN_NOTHING = {*sys.stdlib_module_names, "numpy"} - {"__main__"}


def _without_pickler(reducer: Callable[[Any], Reduced]) -> _Action:
    return lambda obj, pickler: reducer(obj)


def _reduces_itself(base: type) -> bool:
    """Tell whether a class says how it is pickled, which then holds for it and its subclasses."""
    own = vars(base)
    return bool(base.__flags__ & _HEAP_TYPE) and any(
        name in own for name in ("__reduce__", "__reduce_ex__", "__getstate__")
    )


_HEAP_TYPE = 1 << 9
"""`Py_TPFLAGS_HEAPTYPE`. Source: CPython's Include/object.h."""
_CARRIES_CODE = (types.CodeType,)


def _as_pickle_does(obj: Any, pickler: _Decider) -> Reduced:
    return NotImplemented


class _Ordinary:
    """Reduces instances of an ordinary class.

    Attributes:
        is_pickles_own: As pickle itself does it, only sooner.
    """

    def __init__(self, reducer: Reducer, *, is_pickles_own: bool) -> None:
        self._reducer = reducer
        self.is_pickles_own = is_pickles_own

    def __call__(self, obj: Any, pickler: _Decider) -> Reduced:
        kind = type(obj)
        if not is_still_ordinary(kind):
            return _choose(kind)(obj, pickler)
        pickler.remember_quick(kind, self._reducer)
        return self._reducer(obj)


def _function_action(obj: Any, pickler: _Decider) -> Reduced:
    if is_importable(obj):
        return NotImplemented
    pickler.code_by_value = True
    return reduce_function(obj, pickler.namespaces)


def _class_action(obj: Any, pickler: _Decider) -> Reduced:
    if is_importable(obj):
        return NotImplemented
    special = _SPECIAL_CLASSES.get(obj)
    if special is not None:
        return special
    if _CTYPES_METACLASSES.intersection(type(obj).__mro__):
        made = reduce_ctypes_class(obj)
        if made is not None:
            return made
    if obj.__module__ == "builtins" or not obj.__flags__ & _HEAP_TYPE:
        name = _TYPES_NAMES.get(obj)
        return NotImplemented if name is None else (module_attribute, ("types", name))
    pickler.code_by_value = True
    return reduce_class(obj, pickler.namespaces)


_CTYPES_METACLASSES = {type(ctypes.c_int * 1), type(ctypes.POINTER(ctypes.c_int))}
_SPECIAL_CLASSES: dict[Any, Any] = {
    type(None): (type, (None,)),
    type(...): (type, (...,)),
    type(NotImplemented): (type, (NotImplemented,)),
    # The metaclasses of ctypes have no place of their own either.
    **{type(kind): (type, (kind,)) for kind in (ctypes.Structure, ctypes.Union)},
}
_TYPES_NAMES: dict[Any, str] = {
    value: name for name, value in vars(types).items() if isinstance(value, type)
}


def _code_action(obj: Any, pickler: _Decider) -> Reduced:
    pickler.code_by_value = True
    return TYPE_REDUCERS[type(obj)](obj)


def _dill_action(obj: Any, pickler: _Decider) -> Reduced:
    return dill.loads, (dill.dumps(obj, protocol=PROTOCOL),)


def notice_registrations() -> None:
    """Decide anew if something was registered with `copyreg`; before each stream."""
    global _copyreg_size
    forget_tables()
    if len(copyreg.dispatch_table) != _copyreg_size:
        forget_decisions()
        _copyreg_size = len(copyreg.dispatch_table)


def _write(obj: object) -> tuple[Sink, bool]:
    """Pickle `obj` into a sink; also tell whether code went along by value."""
    notice_registrations()
    sink, pickler = wholly_or_by_need(lambda: plain.write(obj, _AutoPickler, _DeepAutoPickler))
    return sink, pickler.code_by_value


class AutoSerializer:
    """The default; stateless, and safe to use from several threads."""

    def encode(self, obj: object) -> Snapshot:
        """Capture `obj` and all that it refers to; see `Serializer.encode`."""
        sink, code_by_value = _write(obj)
        return sink.snapshot(code_by_value=code_by_value)

    def decode(self, snapshot: Snapshot) -> object:
        """Rebuild what `encode` captured; see `Serializer.decode`."""
        return plain.decode(snapshot)


_auto = AutoSerializer()


def encode(obj: object) -> Snapshot:
    """Capture `obj` and all that it refers to in parts that can be sent without copying.

    Buffers of the snapshot are views of the live objects' memory; see `Snapshot`.

    Raises:
        NotSerializable: Something cannot travel; names the path to it. `obj` is as before.
    """
    return _auto.encode(obj)


def decode(snapshot: Snapshot) -> object:
    """Rebuild what `encode` captured, as new objects.

    Buffers in writable memory are taken over uncopied and must not be used otherwise afterwards.

    Raises:
        LoadFailed: Damaged, code of another Python, or something that is missing here.
    """
    return plain.decode(snapshot)


def check(obj: object) -> CheckReport:
    """Tell ahead of time whether `obj` can travel, with all that it refers to.

    Each object is asked for its reduction, as a dump would; nothing is changed, written or
    unpickled. Of a class, what travels by value is looked at, and what its annotations declare.
    """
    from .explain import report

    notice_registrations()
    return report(obj, _Looker().reducer_override)


def digest(obj: object) -> str:
    """A canonical digest of `obj` and all that it refers to, computed anew each time.

    Equal in two processes that hold the same state, whatever their hash seeds, also if one has
    loaded it from a dump of the other. The order of sets, and whether equal immutable values are
    one object, do not count; the order of dicts, and which mutable objects are one, do. What only
    weak references lead to counts while it is alive. With code by value in it, both processes must
    run one minor version of Python.

    Returns:
        40 hexadecimal digits.

    Raises:
        NotSerializable: Something cannot be digested; names the path to it. `obj` is as before.
    """
    from .digests import digest_of

    notice_registrations()
    return digest_of(obj, _Looker().reducer_override)


_ATOMS = frozenset((int, str, float, bool, type(None)))
_SMALL_NODES_MAX = 32
"""Built-in values that the quick path looks at. Source: measured, about where the look costs what
setting up a pickler of our own does."""


def _is_small_and_plain(obj: Any) -> bool:
    pending = [obj]
    for value in pending:
        kind = type(value)
        if kind in _ATOMS:
            continue
        if kind is bytes:
            if len(value) > IN_BAND_BYTES_MAX:
                return False
        elif kind is not tuple and kind is not list and kind is not dict:
            return False
        # Asked first: a large container must not be copied for the look alone.
        elif len(pending) + len(value) > _SMALL_NODES_MAX:
            return False
        elif kind is dict:
            pending += value
            pending += value.values()
        else:
            pending += value
    return True


def _ordinary_body(obj: object) -> bytes | None:
    """What pickle writes by itself of an object of an ordinary class that has few attributes, all
    built-in values: the same as if our pickler were set up, and asked about class and object.
    """
    kind = type(obj)
    action = _actions.get(kind)
    if (
        type(action) is not _Ordinary
        or not action.is_pickles_own
        or not is_still_ordinary(kind)
        or is_by_value_module(kind.__module__)
    ):
        return None
    attributes = attributes_alone(obj)
    if attributes is None or not _is_small_and_plain(attributes):
        return None
    try:
        return pickle.dumps(obj, PROTOCOL)
    except Exception:
        return None  # Its class is not the one of that name any more: our pickler takes it.


def dumps(obj: object) -> bytes:
    """Serialize `obj`, and all that it refers to, into one self-contained byte string.

    Raises:
        NotSerializable: Something cannot travel; names the path to it. `obj` is as before.
    """
    if _is_small_and_plain(obj):
        body: bytes | None = pickle.dumps(obj, PROTOCOL)
    else:
        notice_registrations()
        body = _ordinary_body(obj)
    if body is not None:
        return plain_head(body) + body
    sink, code_by_value = _write(obj)
    if code_by_value or sink.found:
        return sink.snapshot(code_by_value=code_by_value).to_bytes()
    return sink.plain_string()


def loads(data: bytes | bytearray | memoryview) -> object:
    """Rebuild what `dumps` serialized, as new objects.

    Damage by accident is refused before anything of the data is executed. Malice is not: unpickling
    runs what the data says, so bytes that somebody else may have made need a MAC (see `hmac`)
    that was verified before; nodes and checkpoints do that by themselves.

    Args:
        data: The string. If its memory is writable, arrays in the result use it in place, and it
            must not be used otherwise afterwards.

    Raises:
        LoadFailed: Garbage, cut short, a newer format, code of another Python minor version, or
            something that is missing here. No object is returned.
    """
    if type(data) is bytes and is_plain(data):
        if len(data) < IN_BAND_BYTES_MAX:
            # Copying this little costs less than making a view of it.
            return plain.load(data[HEAD_SIZE_BYTES:], ())
        return plain.load(memoryview(data)[HEAD_SIZE_BYTES:], ())
    return plain.decode(Snapshot.from_bytes(data))


__all__ = [
    "AutoSerializer",
    "check",
    "decode",
    "digest",
    "dumps",
    "encode",
    "forget_decisions",
    "loads",
    "runs_code",
]
