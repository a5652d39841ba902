"""Instances that pickle's own way would break: of classes with awkward constructors and accessors.

pickle makes an instance by calling its class, or `__new__`, with arguments that a subclass may not
take; it fills one through `append`, `__setitem__`, `__setattr__` and `__getattr__`, which may need
the state that is not there yet; and it forgets the attributes of subclasses of some C types. Here
an instance is made by the C type below its classes, and filled below all that they override. A
class that says itself how it is pickled is left alone, and so is one without such a hazard.
"""

from __future__ import annotations

import array
import collections
import copyreg
import datetime
import decimal
import enum
import fractions
import inspect
import operator
import struct
import types
import weakref
from collections.abc import Callable
from sys import getrefcount
from typing import Any

from .base import is_comparing
from .by_value import is_being_made, is_importable
from .resources import Reduced, Reducer
from .sink import PROTOCOL

_HEAP_TYPE = 1 << 9
"""`Py_TPFLAGS_HEAPTYPE`. Source: CPython's Include/object.h."""

_SAYS_HOW = (
    "__reduce__",
    "__reduce_ex__",
    "__getnewargs__",
    "__getnewargs_ex__",
    "__getstate__",
    "__setstate__",
    "__getinitargs__",
)
_SAYS_STATE = ("__getstate__", "__setstate__")


def _datetime_arguments(obj: Any) -> tuple[Any, ...]:
    return tuple(obj.__reduce_ex__(5)[1])


_Split = Callable[[Any], tuple[tuple[Any, ...], Any]]

# For each base: from an instance, the arguments of the base's `__new__`, and what fills it then.
_BASES: dict[type, _Split] = {
    int: lambda obj: ((int(obj),), None),
    float: lambda obj: ((float.__float__(obj),), None),
    complex: lambda obj: ((complex.__complex__(obj),), None),
    str: lambda obj: ((str.__str__(obj),), None),
    bytes: lambda obj: ((bytes.__getitem__(obj, slice(None)),), None),
    tuple: lambda obj: ((tuple.__getitem__(obj, slice(None)),), None),
    frozenset: lambda obj: ((list(frozenset.__iter__(obj)),), None),
    decimal.Decimal: lambda obj: ((decimal.Decimal(obj),), None),
    fractions.Fraction: lambda obj: ((obj.numerator, obj.denominator), None),
    datetime.datetime: lambda obj: (_datetime_arguments(obj), None),
    datetime.date: lambda obj: (_datetime_arguments(obj), None),
    datetime.time: lambda obj: (_datetime_arguments(obj), None),
    datetime.timedelta: lambda obj: (_datetime_arguments(obj), None),
    datetime.tzinfo: lambda obj: ((), None),
    set: lambda obj: ((), list(set.__iter__(obj))),
    list: lambda obj: ((), list(list.__iter__(obj))),
    collections.Counter: lambda obj: ((), list(dict.items(obj))),
    collections.OrderedDict: lambda obj: ((), list(collections.OrderedDict.items(obj))),
    collections.defaultdict: lambda obj: ((), (obj.default_factory, list(dict.items(obj)))),
    dict: lambda obj: ((), list(dict.items(obj))),
    collections.deque: lambda obj: ((), (list(collections.deque.__iter__(obj)), obj.maxlen)),
    bytearray: lambda obj: ((), bytes(obj)),
    array.array: lambda obj: ((obj.typecode, obj.tobytes()), None),
}


def _fill_ordered(obj: Any, items: list[tuple[Any, Any]]) -> None:
    for key, value in items:
        collections.OrderedDict.__setitem__(obj, key, value)


def _fill_defaults(obj: Any, content: tuple[Any, list[tuple[Any, Any]]]) -> None:
    collections.defaultdict.__init__(obj, content[0])
    dict.update(obj, content[1])


_FILLS: dict[type, Callable[[Any, Any], None]] = {
    set: set.update,
    list: list.extend,
    dict: dict.update,
    collections.Counter: dict.update,
    collections.OrderedDict: _fill_ordered,
    collections.defaultdict: _fill_defaults,
    collections.deque: lambda obj, content: collections.deque.__init__(obj, *content),
    bytearray: lambda obj, content: bytearray.__init__(obj, content),
}

_FILLED_BY_PICKLE: dict[type, tuple[str, ...]] = {
    list: ("append", "extend", "__new__"),
    dict: ("__setitem__", "__new__"),
}
"""Methods that pickle uses on subclasses of these; if none is overridden, its way is right."""


def object_reducer(kind: type) -> Reducer | None:
    """A reducer for instances of `kind` if pickle's own way is hazardous, else None."""
    if not kind.__flags__ & _HEAP_TYPE or issubclass(kind, BaseException | type):
        return None
    if isinstance(kind, enum.EnumMeta):
        own: Any = kind.__reduce_ex__
        return _reduce_member if own is enum.Enum.__reduce_ex__ else None
    base = next((known for known in kind.__mro__ if known in _BASES), None)
    if base is kind:
        return None
    above = kind.__mro__ if base is None else kind.__mro__[: kind.__mro__.index(base)]
    above = tuple(cls for cls in above if cls is not object)
    if base is not None:
        return _base_reducer(kind, base, above)
    if any(
        getattr(kind, name) is not getattr(object, name) for name in _SAYS_HOW[:2]
    ) or _has_fields_in_c(kind):
        return None
    solid = next(cls for cls in kind.__mro__ if not cls.__flags__ & _HEAP_TYPE)
    if solid is not object:
        return None
    if hasattr(kind, "__getnewargs__") or hasattr(kind, "__getnewargs_ex__"):
        return None if is_importable(kind) else _reduce_by_new
    own_state = any(name in vars(cls) for cls in above for name in _SAYS_STATE)
    if not own_state and any(_class_dicts(cls) for cls in above):
        hazard = _hazard_of(kind, above, own_state)
        return lambda obj: _reduce_sharing(obj, hazard)
    return _hazard_of(kind, above, own_state)


def is_ordinary(kind: type) -> bool:
    """Tell whether pickle reduces instances of a class to their class and their `__dict__` alone.

    Then that can be said sooner than pickle finds out. It is so while `is_still_ordinary`.
    """
    return (
        kind.__flags__ & _HEAP_TYPE != 0
        and is_still_ordinary(kind)
        and not issubclass(kind, type | list | dict)
        and kind.__dictoffset__ != 0
        and not copyreg._slotnames(kind)  # type: ignore[attr-defined]
        and not _has_fields_in_c(kind)
        and all(
            isinstance(vars(cls)["__dict__"], types.GetSetDescriptorType)
            for cls in kind.__mro__
            if "__dict__" in vars(cls)
        )
    )


_ways_of: Callable[[type], tuple[Any, ...]] = operator.attrgetter(
    "__reduce_ex__", "__reduce__", "__getstate__", "__getattribute__"
)
_WAYS_OF_OBJECT = _ways_of(object)


def is_still_ordinary(kind: type) -> bool:
    """Tell whether a class that was ordinary has been given no way of its own since."""
    return (
        _ways_of(kind) == _WAYS_OF_OBJECT
        and not hasattr(kind, "__getattr__")
        and not hasattr(kind, "__getnewargs__")
        and not hasattr(kind, "__getnewargs_ex__")
    )


def ordinary_reducer(kind: type) -> Reducer:
    """A reducer for instances of an ordinary class, which says what pickle would find out.

    Source: `reduce_newobj` in CPython's Objects/typeobject.c. Measured: it takes half the time.
    """
    arguments = (kind,)

    def reduce(obj: Any) -> Reduced:
        attributes = obj.__dict__
        if (getrefcount(attributes) > _ALONE and not is_comparing()) or (
            type(attributes) is not dict
        ):
            return _new_object, arguments, attributes, None, None, _set_dict
        if "__reduce_ex__" in attributes or "__getstate__" in attributes:
            return NotImplemented  # Pickle would take these from the instance itself.
        return _new_object, arguments, attributes or None

    return reduce


_new_object: Any = copyreg.__newobj__  # type: ignore[attr-defined]


def _references(obj: Any) -> int:
    attributes = obj.__dict__
    return getrefcount(attributes)


class _Alone:
    pass


def attributes_alone(obj: Any) -> dict[str, Any] | None:
    """The attributes of an object of an ordinary class, unless something else sees them too."""
    attributes = obj.__dict__
    if getrefcount(attributes) > _ALONE or type(attributes) is not dict:
        return None
    return attributes


_ALONE = _references(_Alone())
"""References that a `__dict__` shows, to functions like that one, if its instance alone holds it.
With more than that something else holds it too, and must go on seeing it: a closure over
`vars(self)`, another instance. Or it does so for the moment, and then nothing is lost."""


def _set_dict(obj: Any, attributes: dict[str, Any]) -> None:
    object.__setattr__(obj, "__dict__", attributes)


def _hazard_of(kind: type, above: tuple[type, ...], own_state: bool) -> Reducer | None:
    """What a subclass of object overrides that pickle would stumble over."""
    if _overrides(above, "__new__") and not _takes_nothing(kind):
        return _reduce_with_own_state if own_state else _reduce_raw
    if own_state:
        return None
    if _overrides(above, "__getattr__", "__getattribute__"):
        return _reduce_raw if _takes_nothing(kind) else None
    if _overrides(above, "__setattr__") and any(vars(cls).get("__slots__") for cls in above):
        return _reduce_raw
    hashed = next(cls for cls in kind.__mro__ if "__hash__" in vars(cls))
    if hashed.__flags__ & _HEAP_TYPE and isinstance(kind.__hash__, types.FunctionType):
        return _hashed_reducer(kind) if is_ordinary(kind) else _reduce_hashed
    if kind.__dictoffset__ and any(vars(cls).get("__slots__") for cls in above):
        return _reduce_mixed
    return None


def _class_dicts(cls: type) -> list[tuple[str, dict[str, Any]]]:
    """The dicts that a class keeps, and that its instances may have made their own attributes.

    NB: not its annotations and fields, which every dataclass has.
    """
    return [
        (name, value)
        for name, value in vars(cls).items()
        if type(value) is dict and not (name.startswith("__") and name.endswith("__"))
    ]


def _overrides(above: tuple[type, ...], *names: str) -> bool:
    """Tell whether one of the classes defines one of the names in Python."""
    return any(
        name in vars(cls) and not isinstance(vars(cls)[name], _MADE_IN_C)
        for cls in above
        for name in names
    )


_MADE_IN_C = (types.WrapperDescriptorType, types.MethodDescriptorType, types.BuiltinFunctionType)
_MANAGED_DICT = 1 << 4
_MANAGED_WEAKREF = 1 << 3
"""Flags of types. Source: CPython's Include/object.h."""


def _has_fields_in_c(kind: type) -> bool:
    """Tell whether instances hold more than a dict, weak references and slots.

    Classes made in C look like others here, and what they hold must not be left behind unseen.
    Source: `object_getstate_default` in CPython's Objects/typeobject.c.
    """
    words = len(copyreg._slotnames(kind))  # type: ignore[attr-defined]
    words += bool(kind.__dictoffset__ and not kind.__flags__ & _MANAGED_DICT)
    words += bool(kind.__weakrefoffset__ and not kind.__flags__ & _MANAGED_WEAKREF)
    word = struct.calcsize("P")
    return bool(kind.__itemsize__) or kind.__basicsize__ > object.__basicsize__ + word * words


def _takes_nothing(kind: type) -> bool:
    """Tell whether `__new__` can be called with the class alone, as pickle does."""
    function = kind.__new__
    if not isinstance(function, types.FunctionType):
        return True
    try:
        inspect.signature(function).bind(kind)
    except TypeError:
        return False
    return True


# --- subclasses of built-in types ----------------------------------------------------------------


def _base_reducer(kind: type, base: type, above: tuple[type, ...]) -> Reducer | None:
    says = [cls for cls in above if any(name in vars(cls) for name in _SAYS_HOW)]
    makes = [cls for cls in above if "__new__" in vars(cls)]
    if says:
        # A named tuple says how it is made, but its subclass may be made otherwise.
        named = base is tuple and hasattr(kind, "_fields")
        if not named or not makes or kind.__mro__.index(makes[0]) >= kind.__mro__.index(says[0]):
            return None
        if any(name in vars(cls) for cls in says[:-1] for name in _SAYS_HOW):
            return None
    used = _FILLED_BY_PICKLE.get(base)
    by_pickle = used is not None and not _overrides(above, *used)
    if by_pickle and not kind.__dictoffset__:
        return None
    if issubclass(base, dict):
        return lambda obj: _reduce_mapping(obj, base, by_pickle)
    if by_pickle:
        return None

    def reduce(obj: Any) -> Reduced:
        arguments, content = _BASES[base](obj)
        return _make_raw, (kind, base, arguments), (content, _state_of(obj)), None, None, _fill_base

    return reduce


def _reduce_mapping(obj: Any, base: type, by_pickle: bool) -> Reduced:
    kind = type(obj)
    if getattr(obj, "__dict__", None) is obj:
        # Its items are its attributes, and the other way round.
        return _make_raw, (kind, base, ()), _BASES[base](obj)[1], None, None, _fill_own_dict
    if by_pickle:
        return NotImplemented
    arguments, content = _BASES[base](obj)
    return _make_raw, (kind, base, arguments), (content, _state_of(obj)), None, None, _fill_base


def _fill_own_dict(obj: Any, content: Any) -> None:
    object.__setattr__(obj, "__dict__", obj)
    _fill_base(obj, (content, None))


def _fill_base(obj: Any, state: tuple[Any, Any]) -> None:
    content, own = state
    if own is not None:
        _fill_raw(obj, own)
    if content is not None:
        base = next(known for known in type(obj).__mro__ if known in _BASES)
        _FILLS[base](obj, content)


# --- subclasses of object ------------------------------------------------------------------------


def _state_of(obj: Any) -> Any:
    """(attributes, slots) as they are, whatever the class's accessors say; None if there are none.

    Slots are told apart by their class, since a private name may exist in several. A third item,
    True, says that something else holds the very dict of the attributes too.
    """
    held = False
    try:
        attributes = object.__getattribute__(obj, "__dict__")
        held = getrefcount(attributes) > _ALONE and not is_comparing()
        held = held or type(attributes) is not dict
    except AttributeError:
        attributes = None
    slots = []
    for base in type(obj).__mro__:
        if base.__flags__ & _HEAP_TYPE and vars(base).get("__slots__"):
            for name, descriptor in vars(base).items():
                if isinstance(descriptor, types.MemberDescriptorType):
                    try:
                        slots.append((base, name, descriptor.__get__(obj)))
                    except AttributeError:
                        continue  # Never set.
    if held:
        return attributes, slots or None, True
    if not attributes and not slots:
        return None
    return attributes or None, slots or None


def _make_raw(kind: type, base: type, arguments: tuple[Any, ...]) -> Any:
    return base.__new__(kind, *arguments)


def _fill_raw(obj: Any, state: tuple[Any, ...]) -> None:
    attributes, slots, *held = state
    if held:
        _set_dict(obj, attributes)
    elif attributes:
        object.__getattribute__(obj, "__dict__").update(attributes)
    for base, name, value in slots or ():
        vars(base)[name].__set__(obj, value)


def _reduce_raw(obj: Any) -> Reduced:
    return _make_raw, (type(obj), object, ()), _state_of(obj), None, None, _fill_raw


def _reduce_mixed(obj: Any) -> Reduced:
    """Reduce an instance with slots and a `__dict__`, which something else may hold too."""
    state = _state_of(obj)
    return _reduce_raw(obj) if state is not None and len(state) == 3 else NotImplemented


def _reduce_with_own_state(obj: Any) -> Reduced:
    kind: Any = type(obj)
    state = kind.__getstate__(obj)
    return _make_raw, (type(obj), object, ()), state, None, None, _set_own_state


def _reduce_by_new(obj: Any) -> Reduced:
    """Make an instance of a class by value by its `__new__`, as pickle does; with one exception.

    If the class itself holds the instance, as a cache of its instances does, neither can be first.
    """
    reduced = obj.__reduce_ex__(PROTOCOL)
    if reduced[0] is _new_object:
        return _make_by_new, (reduced[1][0], reduced[1][1:], {}), *reduced[2:]
    if reduced[0] is copyreg.__newobj_ex__:  # type: ignore[attr-defined]
        return _make_by_new, reduced[1], *reduced[2:]
    return reduced


def _make_by_new(cls: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return object.__new__(cls) if is_being_made(cls) else cls.__new__(cls, *args, **named)


def _set_own_state(obj: Any, state: Any) -> None:
    setter = getattr(type(obj), "__setstate__", None)
    if setter is not None:
        setter(obj, state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if attributes:
        object.__getattribute__(obj, "__dict__").update(attributes)
    for name, value in (slots or {}).items():
        object.__setattr__(obj, name, value)


# --- what a class keeps beside its instances -----------------------------------------------------

_Table = tuple[type, str, str]


def _tables_of(kind: type) -> list[_Table]:
    """Weak tables and sets of importable classes in which these keep something of each instance.

    Such as descriptors do: (class, its attribute, what holds the table in that, or nothing).
    """
    found: list[_Table] = []
    for cls in kind.__mro__:
        if not cls.__flags__ & _HEAP_TYPE or not is_importable(cls):
            continue  # A class by value brings its attributes along.
        for name, value in list(vars(cls).items()):
            if type(value) in _WEAK:
                found.append((cls, name, ""))
            elif type(type(value)) is type and type(value).__flags__ & _HEAP_TYPE:
                inside = _dict_of(value)
                found += [(cls, name, k) for k, v in inside.items() if type(v) in _WEAK]
    return found


_WEAK = (weakref.WeakKeyDictionary, weakref.WeakSet, weakref.WeakValueDictionary)


def _dict_of(obj: object) -> dict[str, Any]:
    try:
        found: dict[str, Any] = object.__getattribute__(obj, "__dict__")
    except AttributeError:
        return {}
    return found


def _table_at(place: _Table) -> Any:
    cls, name, inner = place
    held = vars(cls).get(name)
    return _dict_of(held).get(inner) if inner else held


_NOTHING = object()
_keys_in: dict[int, tuple[Any, dict[int, list[Any]]]] = {}
"""For tables of this stream: the keys of each value, by its id."""


def forget_tables() -> None:
    """Look at tables beside objects anew; before each stream."""
    if _keys_in:
        _keys_in.clear()


def _entry_of(obj: Any, table: Any) -> Any:
    """What a table has of an instance: its value, the keys that it is kept under, or None."""
    try:
        if isinstance(table, weakref.WeakValueDictionary):
            known = _keys_in.get(id(table))
            if known is None or known[0] is not table:
                known = _keys_in[id(table)] = (table, {})
                for key, value in list(table.items()):
                    known[1].setdefault(id(value), []).append(key)
            keys = [key for key in known[1].get(id(obj), ()) if table.get(key) is obj]
            return keys or _NOTHING
        if not isinstance(table, _WEAK) or obj not in table:
            return _NOTHING
        return table[obj] if isinstance(table, weakref.WeakKeyDictionary) else None
    except TypeError:
        return _NOTHING  # It has no hash.


def beside_reducer(kind: type, reducer: Reducer | None) -> Reducer | None:
    """`reducer`, and what the class keeps of an instance elsewhere; just that if it does not."""
    tables = _tables_of(kind)
    if not tables:
        return reducer

    def reduce(obj: Any) -> Reduced:
        entries = [
            (place, entry)
            for place in tables
            if (entry := _entry_of(obj, _table_at(place))) is not _NOTHING
        ]
        reduced = NotImplemented if reducer is None else reducer(obj)
        if not entries:
            return reduced
        if reduced is NotImplemented:
            reduced = obj.__reduce_ex__(PROTOCOL)
        if isinstance(reduced, str):
            return reduced
        function, args, state, items, pairs, setter = (*reduced, *(None,) * 4)[:6]
        return function, args, (state, setter, entries), items, pairs, _fill_with_beside

    return reduce


def _fill_with_beside(obj: Any, whole: tuple[Any, Any, list[tuple[_Table, Any]]]) -> None:
    state, setter, entries = whole
    if setter is not None:
        setter(obj, state)
    elif state is not None:
        _set_own_state(obj, state)
    for place, value in entries:
        table = _table_at(place)
        if isinstance(table, weakref.WeakSet):
            table.add(obj)
        elif isinstance(table, weakref.WeakKeyDictionary):
            table[obj] = value
        elif isinstance(table, weakref.WeakValueDictionary):
            for key in value:
                table.setdefault(key, obj)


# --- instances that share their attributes -------------------------------------------------------


def _reduce_sharing(obj: Any, otherwise: Reducer | None) -> Reduced:
    """Keep attributes that are a dict of the class itself, and so those of all its instances."""
    kind = type(obj)
    try:
        attributes = object.__getattribute__(obj, "__dict__")
    except AttributeError:
        attributes = None
    for cls in kind.__mro__:
        for name, value in _class_dicts(cls):
            if value is attributes:
                return _make_raw, (kind, object, ()), (cls, name, value), None, None, _share
    del attributes  # Lest it seem to be held by something else.
    return NotImplemented if otherwise is None else otherwise(obj)


def _share(obj: Any, state: tuple[type, str, dict[str, Any]]) -> None:
    cls, name, content = state
    shared = vars(cls)[name]
    if shared is not content:
        shared.update(content)
    object.__setattr__(obj, "__dict__", shared)


# --- objects with a hash of their own ------------------------------------------------------------

_LEAVES = frozenset(
    (
        int, str, float, bool, complex, bytes, type(None), type(...), datetime.datetime,
        datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction,
    )
)  # fmt: skip
_DEPTH_MAX = 5
"""How deep values are looked into for whether they are plain."""


def _is_leaf(value: Any, depth: int = 0) -> bool:
    """Tell whether a value refers to nothing that could refer back to who holds it."""
    kind = type(value)
    if kind in _LEAVES or isinstance(value, enum.Enum | type):
        return True
    if depth >= _DEPTH_MAX:
        return False
    if kind is tuple or kind is frozenset:
        return all(_is_leaf(item, depth + 1) for item in value)
    hashed = kind.__hash__
    if not isinstance(hashed, types.FunctionType):
        return False
    attributes, slots, *_ = _state_of(value) or (None, None)
    return all(_is_leaf(item, depth + 1) for item in (attributes or {}).values()) and all(
        _is_leaf(item, depth + 1) for _, _, item in slots or ()
    )


def _hashed_reducer(kind: type) -> Reducer:
    """The same for an ordinary class; most instances hold nothing but plain values."""
    arguments = (kind,)

    def reduce(obj: Any) -> Reduced:
        # NB: this is `ordinary_reducer` over again, since one more call is felt.
        attributes = obj.__dict__
        if (getrefcount(attributes) > _ALONE and not is_comparing()) or (
            type(attributes) is not dict
        ):
            return _reduce_raw(obj)
        for value in attributes.values():
            if type(value) not in _LEAVES:
                break
        else:
            if "__reduce_ex__" in attributes or "__getstate__" in attributes:
                return NotImplemented
            return _new_object, arguments, attributes or None
        del attributes  # Lest it seem to be held by something else.
        return _reduce_hashed(obj)

    return reduce


def _reduce_hashed(obj: Any) -> Reduced:
    """What may be hashed before it is complete, in a cycle, gets its plain values when it is made.

    Source: CPython's issues 124937 and 125004 describe the cycle.
    """
    state = _state_of(obj)
    if state is None:
        return NotImplemented
    attributes, slots, *held = state
    if held:
        return _reduce_raw(obj)
    attributes = attributes or {}
    slots = slots or []
    early = {name: value for name, value in attributes.items() if _is_leaf(value)}
    early_slots = [entry for entry in slots if _is_leaf(entry[2])]
    if len(early) == len(attributes) and len(early_slots) == len(slots):
        return NotImplemented  # It is not part of any cycle.
    late = {name: value for name, value in attributes.items() if name not in early}
    late_slots = [entry for entry in slots if not _is_leaf(entry[2])]
    arguments = (type(obj), (early, early_slots))
    return _make_hashed, arguments, (late, late_slots, list(attributes)), None, None, _fill_hashed


def _make_hashed(kind: Any, state: Any) -> Any:
    made = kind.__new__(kind)
    _fill_raw(made, state)
    return made


def _fill_hashed(obj: Any, state: tuple[dict[str, Any], Any, list[str]]) -> None:
    late, slots, order = state
    if late:
        attributes = object.__getattribute__(obj, "__dict__")
        attributes.update(late)
        for name in order:
            attributes[name] = attributes.pop(name)
    _fill_raw(obj, (None, slots))


# --- members of enums ----------------------------------------------------------------------------


def _reduce_member(member: enum.Enum) -> Reduced:
    # By its name: a value that arrives as a copy may not be equal to the member's.
    if _is_leaf(member._value_):
        return NotImplemented
    cls = type(member)
    named: Any = cls.__members__.get(member._name_ or "")
    return (_make_member, (cls, member._name_)) if named is member else NotImplemented


def _make_member(cls: Any, name: str) -> enum.Enum:
    found: enum.Enum = cls[name]
    return found


__all__ = [
    "beside_reducer",
    "forget_tables",
    "is_ordinary",
    "is_still_ordinary",
    "object_reducer",
    "ordinary_reducer",
]
