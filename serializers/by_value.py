"""Code that must travel: classes and functions that the other process cannot import.

Those of `__main__`, of notebooks, of function bodies, and of modules named to `register_by_value`.
cloudpickle says what a code object needs and keeps its class tracker, the table that makes a class
which comes home the very same class again. What is rebuilt here, and not there, is what would
otherwise be lost or overwritten:

- loading never changes a class that this process has already, so class attributes set at the
  class's home in the meantime stay (cloudpickle resets them);
- closure cells are objects of their own, so two functions that share a variable go on sharing it;
- functions of one module share one namespace per stream;
- `__slots__`, `__qualname__`, and the members of enums with an `__init__` arrive complete.

The names of the functions called `_make_...`, `_begin_...` and `_fill_...` are part of the format.
"""

from __future__ import annotations

import abc
import builtins
import enum
import functools
import io
import logging
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable
from typing import Any

import cloudpickle
from cloudpickle import cloudpickle as machinery

from .base import lossy

Reduced = Any
"""What `__reduce__` may return: a name, or a tuple of 2 to 6 items; or NotImplemented."""

_by_value_modules: set[str] = set()


def register_by_value(module: types.ModuleType) -> None:
    """Let classes and functions of a module, and of its submodules, travel by value.

    For modules that other nodes cannot import. It holds for this process, and may be repeated.

    Raises:
        TypeError: Not a module.
        ValueError: Not an imported module.
    """
    if not isinstance(module, types.ModuleType):
        raise TypeError(f"register_by_value takes a module, not {type(module).__name__}")
    cloudpickle.register_pickle_by_value(module)
    _by_value_modules.add(module.__name__)


def unregister_by_value(module: types.ModuleType) -> None:
    """Take `register_by_value` back; nothing happens if the module is not registered."""
    if module.__name__ in _by_value_modules:
        _by_value_modules.discard(module.__name__)
        cloudpickle.unregister_pickle_by_value(module)


def is_by_value_module(name: str) -> bool:
    """Tell whether what is defined in the module called `name` travels by value."""
    if name in ("__main__", "__mp_main__"):
        return True
    registered = machinery._PICKLE_BY_VALUE_MODULES
    if not registered:
        return False
    return name in registered or any(name.startswith(f"{parent}.") for parent in registered)


def is_importable(obj: Any) -> bool:
    """Tell whether a class or function is found under its own name in a module by reference."""
    name = getattr(obj, "__qualname__", None)
    module_name = getattr(obj, "__module__", None)
    if not isinstance(name, str) or not isinstance(module_name, str):
        return bool(machinery._should_pickle_by_reference(obj))
    if is_by_value_module(module_name):
        return False
    found: Any = sys.modules.get(module_name)
    if found is None:
        return False
    for piece in name.split("."):
        found = getattr(found, piece, None)
        if found is None:
            return False
    return found is obj


class Namespaces:
    """The global namespaces of the functions in one stream: one for each source namespace."""

    def __init__(self) -> None:
        self._by_source: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    def of(self, function: types.FunctionType) -> dict[str, Any]:
        """The dict that stands for the function's globals, the same for all that share them."""
        source = function.__globals__
        entry = self._by_source.get(id(source))
        if entry is None:
            keep = ("__name__", "__package__", "__path__", "__file__")
            seed = {key: source[key] for key in keep if key in source}
            # NB: the source is kept as well, lest its id be given to another dict.
            entry = self._by_source[id(source)] = (seed, source)
        return entry[0]


# --- functions -----------------------------------------------------------------------------------


def reduce_function(function: types.FunctionType, namespaces: Namespaces) -> Reduced:
    """Reduce a function that travels by value."""
    code = function.__code__
    names = machinery._extract_code_globals(code)
    source = function.__globals__
    used = {name: source[name] for name in names if name in source}
    contents = [c.cell_contents for c in function.__closure__ or () if not _is_empty(c)]
    slots: dict[str, Any] = {
        "__qualname__": function.__qualname__,
        "__module__": function.__module__,
        "__doc__": function.__doc__,
        "__defaults__": function.__defaults__,
        "__kwdefaults__": function.__kwdefaults__,
    }
    try:
        slots["__annotations__"] = function.__annotations__
    except NameError:
        # From 3.14 on they may not be computable yet; then the function that would do so goes.
        slots["__annotate__"] = getattr(function, "__annotate__", None)
    type_params = getattr(function, "__type_params__", ())
    if type_params:
        slots["__type_params__"] = type_params
    state = {
        "globals": used,
        "slots": slots,
        "attributes": function.__dict__,
        "submodules": machinery._find_imported_submodules(code, [*used.values(), *contents]),
    }
    args = (code, namespaces.of(function), function.__name__, function.__closure__)
    return _make_function, args, state, None, None, _fill_function


def _make_function(
    code: types.CodeType,
    namespace: dict[str, Any],
    name: str,
    closure: tuple[types.CellType, ...] | None,
) -> types.FunctionType:
    namespace.setdefault("__builtins__", builtins.__dict__)
    return types.FunctionType(code, namespace, name, None, closure)


def _fill_function(function: types.FunctionType, state: dict[str, Any]) -> None:
    function.__globals__.update(state["globals"])
    function.__dict__.update(state["attributes"])
    for name, value in state["slots"].items():
        setattr(function, name, value)


def _is_empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _reduce_cell(cell: types.CellType) -> Reduced:
    if _is_empty(cell):
        return _make_cell, ()
    return _make_cell, (), (cell.cell_contents,), None, None, _fill_cell


def _make_cell() -> types.CellType:
    return types.CellType()


def _fill_cell(cell: types.CellType, state: tuple[Any]) -> None:
    cell.cell_contents = state[0]


def _reduce_lru_cache(wrapper: Any) -> Reduced:
    if is_importable(wrapper):
        return wrapper.__reduce__()
    # What it has cached is left behind: the function can compute it again.
    lossy("its cached results are left behind")
    parameters = wrapper.cache_parameters()
    return _make_lru_cache, (wrapper.__wrapped__, parameters["maxsize"], parameters["typed"])


def _make_lru_cache(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize=maxsize, typed=typed)(function)


# --- classes -------------------------------------------------------------------------------------

_unfilled: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
_fill_lock = threading.RLock()

_MADE_BY_TYPE = frozenset(
    ("__dict__", "__weakref__", "__module__", "__qualname__", "__slots__", "__annotate_func__")
)
_MADE_BY_ABC = frozenset(
    "_abc_impl _abc_cache _abc_registry _abc_negative_cache _abc_negative_cache_version".split()
)
_MADE_BY_ENUM = frozenset(
    """
    _member_names_ _member_map_ _value2member_map_ _member_type_ _value_repr_ _use_args_
    _unhashable_values_ _hashable_values_ _unhashable_values_map_ _flag_mask_ _singles_mask_
    _all_bits_ _boundary_ _inverted_ _order_ _ignore_ _new_member_ __new__ __new_member__
    """.split()
)
_MADE_BY_MEMBER = frozenset(("_value_", "_name_", "__objclass__", "_sort_order_"))


def reduce_class(cls: type) -> Reduced:
    """Reduce a class that travels by value."""
    head: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    tracker_id = machinery._get_or_create_tracker_id(cls)
    own = dict(vars(cls))
    skip = set(_MADE_BY_TYPE)
    state: dict[str, Any] = {"tracker_id": tracker_id}
    if isinstance(cls, abc.ABCMeta):
        skip |= _MADE_BY_ABC
        state["registry"] = [found for ref in abc._get_dump(cls)[0] if (found := ref())]  # type: ignore[attr-defined]
    if isinstance(cls, enum.EnumMeta):
        return _reduce_enum(cls, head, own, skip, state)
    slots = own.get("__slots__")
    if slots is not None:
        head["__slots__"] = slots if isinstance(slots, str | dict) else tuple(slots)
        skip.update(
            name for name, value in own.items() if isinstance(value, types.MemberDescriptorType)
        )
    custom_dict = own.get("__dict__")
    if isinstance(custom_dict, property):
        head["__dict__"] = custom_dict
    state["attributes"] = {name: value for name, value in own.items() if name not in skip}
    # Generic classes are made from what they were written with, unless that makes another class,
    # as NamedTuple and TypedDict do.
    written = own.get("__orig_bases__", cls.__bases__)
    bases = written if types.resolve_bases(written) == cls.__bases__ else cls.__bases__
    args = (type(cls), cls.__name__, bases, head, tracker_id)
    return _begin_class, args, state, None, None, _fill_class


def _begin_class(
    metaclass: type, name: str, bases: tuple[Any, ...], head: dict[str, Any], tracker_id: str
) -> type:
    """Find the class that this process has under `tracker_id`, or make an empty one."""
    with _fill_lock:
        known = machinery._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
        if known is not None:
            return typing.cast(type, known)
        if metaclass.__name__ == "_TypedDictMeta":
            # It takes no bases but other TypedDicts, though what it makes has dict for a base.
            made: type = type.__new__(metaclass, name, bases, dict(head))
        else:
            made = types.new_class(
                name, bases, {"metaclass": metaclass}, lambda ns: ns.update(head)
            )
        return _track(made, tracker_id)


def _track(made: type, tracker_id: str) -> type:
    machinery._lookup_class_or_track(tracker_id, made)
    _unfilled[tracker_id] = made
    return made


def _fill_class(cls: type, state: dict[str, Any]) -> None:
    """Set the attributes of a class that was just made; leave one that was here before alone."""
    with _fill_lock:
        # NB: of two threads that load one class, whichever comes first fills it for both; the
        # other must not use it before, hence the lock rather than a flag of one's own.
        if _unfilled.get(state["tracker_id"]) is not cls:
            return
        for name, value in state["attributes"].items():
            type.__setattr__(cls, name, value)
        if "__firstlineno__" in state["attributes"]:
            # Setting other attributes makes Python 3.13 and later drop it.
            type.__setattr__(cls, "__firstlineno__", state["attributes"]["__firstlineno__"])
        for subclass in state.get("registry", ()):
            cls.register(subclass)  # type: ignore[attr-defined]
        for name, extra in state.get("members", {}).items():
            vars(cls.__members__[name]).update(extra)  # type: ignore[attr-defined]
        del _unfilled[state["tracker_id"]]


def _reduce_enum(
    cls: enum.EnumMeta,
    head: dict[str, Any],
    own: dict[str, Any],
    skip: set[str],
    state: dict[str, Any],
) -> Reduced:
    members: dict[str, Any] = {}
    extras: dict[str, dict[str, Any]] = {}
    by_name: dict[str, Any] = dict(cls.__members__)
    for name, member in by_name.items():
        members[name] = member.value
        extra = {k: v for k, v in vars(member).items() if k not in _MADE_BY_MEMBER}
        if extra:
            extras[name] = extra
    skip |= _MADE_BY_ENUM | members.keys()
    state["attributes"] = {name: value for name, value in own.items() if name not in skip}
    state["members"] = extras
    boundary = getattr(cls, "_boundary_", None)
    args = (
        type(cls),
        cls.__name__,
        cls.__bases__,
        head,
        members,
        None if boundary is None else boundary.name,
        state["tracker_id"],
    )
    return _begin_enum, args, state, None, None, _fill_class


def _begin_enum(
    metaclass: Any,
    name: str,
    bases: tuple[type, ...],
    head: dict[str, str],
    members: dict[str, Any],
    boundary: str | None,
    tracker_id: str,
) -> type:
    """As `_begin_class`; members get their values, without any `__init__` of theirs being run."""
    with _fill_lock:
        known = machinery._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
        if known is not None:
            return typing.cast(type, known)
        namespace = metaclass.__prepare__(name, bases)
        for key, value in (*head.items(), *members.items()):
            namespace[key] = value
        options = {} if boundary is None else {"boundary": enum.FlagBoundary[boundary]}
        return _track(metaclass.__new__(metaclass, name, bases, namespace, **options), tracker_id)


# --- the small change of classes and modules -----------------------------------------------------


def _reduce_new_type(obj: Any) -> Reduced:
    if is_importable(obj):
        return obj.__reduce__()
    return _make_new_type, (obj.__name__, obj.__supertype__, obj.__module__, obj.__qualname__)


def _make_new_type(name: str, supertype: Any, module: str, qualname: str) -> Any:
    # NB: under another name, for type checkers take a call of NewType for a declaration.
    make: Any = typing.NewType
    made = make(name, supertype)
    made.__module__, made.__qualname__ = module, qualname
    return made


def _reduce_type_parameter(obj: Any) -> Reduced:
    place = machinery._lookup_module_and_qualname(obj, name=obj.__name__)
    if place is not None and not is_by_value_module(place[0].__name__):
        return obj.__reduce__()
    # Tracked as classes are, so that the same one comes back home.
    tracker_id = machinery._get_or_create_tracker_id(obj)
    return _make_type_parameter, (type(obj), obj.__name__, obj.__module__, tracker_id)


def _make_type_parameter(kind: Any, name: str, module: str, tracker_id: str) -> Any:
    made = kind(name)
    try:
        made.__module__ = module
    except AttributeError:
        pass  # From Python 3.12 on it is read-only, and says where the object was made.
    return machinery._lookup_class_or_track(tracker_id, made)


def _reduce_module(module: types.ModuleType) -> Reduced:
    if is_by_value_module(module.__name__) and sys.modules.get(module.__name__) is module:
        return _reduce_main_like(module)
    return machinery._module_reduce(module)


def _reduce_main_like(module: types.ModuleType) -> Reduced:
    from .resources import refuse

    if module.__name__ in ("__main__", "__mp_main__"):
        refuse(
            module,
            "the main module is another one in every process",
            "refer to what is needed of it, not to the module",
        )
    return machinery._module_reduce(module)


def _reduce_method(method: types.MethodType) -> Reduced:
    function, owner = method.__func__, method.__self__
    if isinstance(function, types.FunctionType) and not is_importable(function):
        # Class methods, and decorated ones, are found by name in their class, if in anything.
        name = function.__name__
        cls = owner if isinstance(owner, type) else type(owner)
        known = getattr(cls, name, None)
        if is_importable(cls) and (known == method if cls is owner else known is function):
            return getattr, (owner, name)
    return types.MethodType, (function, owner)


TYPE_REDUCERS: dict[type, Callable[[Any], Reduced]] = {
    kind: reducer
    for kind, reducer in machinery.Pickler._dispatch_table.items()
    if kind not in (io.TextIOWrapper, logging.Logger, logging.RootLogger, memoryview)
}
"""Reducers by exact type for pieces of code: cloudpickle's, and ours where it loses something."""
TYPE_REDUCERS.update(
    {
        types.CellType: _reduce_cell,
        types.MethodType: _reduce_method,
        types.ModuleType: _reduce_module,
        functools._lru_cache_wrapper: _reduce_lru_cache,
        typing.NewType: _reduce_new_type,
        typing.ParamSpec: _reduce_type_parameter,
        typing.TypeVarTuple: _reduce_type_parameter,
    }
)
