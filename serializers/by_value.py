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
import ctypes
import enum
import functools
import gc
import importlib
import io
import logging
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import cloudpickle
from cloudpickle import cloudpickle as machinery

from .errors import LoadFailed, NotSerializable

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
    if found is None or is_made_up(found):
        return False
    for piece in name.split("."):
        found = getattr(found, piece, None)
        if found is None:
            return False
    return found is obj


def is_made_up(module: Any) -> bool:
    """Tell whether a module was made at run time, such as a notebook's: nobody can import it."""
    return (
        isinstance(module, types.ModuleType)
        and getattr(module, "__spec__", None) is None
        and not hasattr(module, "__file__")
        and not hasattr(module, "__path__")
    )


class Namespaces:
    """The global namespaces of the functions in one stream: one for each source namespace."""

    def __init__(self, *, methods_first: bool = True) -> None:
        self.methods_first = methods_first
        """Whether classes get their methods before their data; not if nothing is to be loaded."""
        self._modules: dict[str, ModuleGlobals] = {}
        self._by_source: dict[int, tuple[Any, dict[str, Any]]] = {}
        self.unfilled: list[types.FunctionType | types.CellType] | None = None
        """While a class's methods are begun: those functions and cells that are still empty."""

    def of(self, function: types.FunctionType) -> Any:
        """What stands for the function's globals, the same for all that share them."""
        source = function.__globals__
        name = source.get("__name__")
        module = sys.modules.get(name) if isinstance(name, str) else None
        if (
            isinstance(module, types.ModuleType)
            and vars(module) is source
            and not is_by_value_module(module.__name__)
            and not is_made_up(module)
        ):
            # The rest of the module is there by reference, so this has to see the same globals.
            known = self._modules.get(module.__name__)
            if known is None:
                known = self._modules[module.__name__] = ModuleGlobals(module)
            return known
        entry = self._by_source.get(id(source))
        if entry is None:
            stands: Any = None
            if module is None or vars(module) is not source:
                stands = _holder_of(source)
            if stands is None:
                keep = ("__name__", "__package__", "__path__", "__file__")
                stands = {key: source[key] for key in keep if key in source}
            # NB: the source is kept as well, lest its id be given to another dict.
            entry = self._by_source[id(source)] = (stands, source)
        return entry[0]


def _holder_of(source: dict[str, Any]) -> Any:
    """What stands for a namespace that a program was executed in, if more than functions hold it.

    As an interpreter holds what its programs define, or a module that was made at run time. They
    are to go on seeing the same variables, so all of it travels, rather than what functions use.
    """
    global _whole_count
    if _by_need.get() or type(source.get("__builtins__")) is not dict:
        return None  # `exec` puts a dict there; `_make_function` puts the module there.
    holders = gc.get_referrers(source)
    for holder in holders:
        if isinstance(holder, types.ModuleType) and vars(holder) is source:
            return _MadeUpGlobals(holder)
    passing = (types.FunctionType, types.FrameType, tuple)
    if any(holder is not holders and not isinstance(holder, passing) for holder in holders):
        _whole_count += 1
        return source
    return None


_by_need: ContextVar[bool] = ContextVar("serializers.by_need", default=False)
_whole_count = 0

Result = TypeVar("Result")


def wholly_or_by_need(write: Callable[[], Result]) -> Result:
    """Write with namespaces as a whole; if that cannot be, with what functions use of them.

    What holds a namespace may be no part of the state. If it is one, all that is in the namespace
    has to travel, and writing fails either way.
    """
    before = _whole_count
    try:
        return write()
    except NotSerializable:
        if before == _whole_count:
            raise
    token = _by_need.set(True)
    try:
        return write()
    finally:
        _by_need.reset(token)


class _MadeUpGlobals:
    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __reduce__(self) -> Reduced:
        return vars, (self._module,)


class ModuleGlobals:
    """Stands for the globals of a module that the other side can import."""

    def __init__(self, module: types.ModuleType) -> None:
        self._name = module.__name__

    def __reduce__(self) -> Reduced:
        return _module_globals, (self._name,)


@functools.lru_cache(maxsize=1000)
def _names_of(module_name: str) -> frozenset[str]:
    """The global names that a module's own code mentions, which importing it defines."""
    loader = getattr(sys.modules[module_name], "__loader__", None)
    try:
        code = loader.get_code(module_name)  # type: ignore[union-attr]
    except (AttributeError, ImportError, OSError, SyntaxError):
        code = None
    if code is None:
        return frozenset(vars(sys.modules[module_name]))
    return frozenset(code.co_names)


def _module_globals(name: str) -> dict[str, Any]:
    try:
        return vars(importlib.import_module(name))
    except ImportError:
        return {"__name__": name, _STANDS_IN: True}


_STANDS_IN = "__stands_in_for_module__"
_LIGHT = (int, str, float, bytes, bool, type(None), types.ModuleType)


def _is_light(value: Any) -> bool:
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return is_importable(value)
    return type(value) in _LIGHT


# --- functions -----------------------------------------------------------------------------------


def reduce_function(function: types.FunctionType, namespaces: Namespaces) -> Reduced:
    """Reduce a function that travels by value."""
    namespace = namespaces.of(function)
    args = (function.__code__, namespace, function.__name__, function.__closure__)
    if namespaces.unfilled is not None:
        namespaces.unfilled.append(function)
        return _make_function, args
    return _make_function, args, _function_state(function, namespace), None, None, _fill_function


def _function_state(function: types.FunctionType, namespace: Any) -> dict[str, Any]:
    code = function.__code__
    names = machinery._extract_code_globals(code)
    source = function.__globals__
    used = {name: source[name] for name in names if name in source}
    left: list[str] = []
    if isinstance(namespace, ModuleGlobals):
        # They are there when the module has been imported. What costs little goes all the same, for
        # a place where it cannot be.
        own = _names_of(function.__globals__["__name__"])
        left = [name for name, value in used.items() if name in own and not _is_light(value)]
        used = {name: value for name, value in used.items() if name not in left}
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
    if namespace is source:
        used = {}
    state: dict[str, Any] = {
        "globals": used,
        "slots": slots,
        "attributes": function.__dict__,
        "left": left,
        "submodules": machinery._find_imported_submodules(code, [*used.values(), *contents]),
    }
    if namespace is source:
        state["executed"] = source["__builtins__"].keys() >= {"__import__"}
    return state


def _make_function(
    code: types.CodeType,
    namespace: dict[str, Any],
    name: str,
    closure: tuple[types.CellType, ...] | None,
) -> types.FunctionType:
    namespace.setdefault("__builtins__", builtins)
    return types.FunctionType(code, namespace, name, None, closure)


def _fill_function(function: types.FunctionType, state: dict[str, Any]) -> None:
    module = sys.modules.get(function.__globals__.get("__name__", ""))
    if module is not None and vars(module) is function.__globals__:
        # A module that lives here keeps what it has; only what it lacks is added.
        for name, value in state["globals"].items():
            function.__globals__.setdefault(name, value)
    elif state.get("left") and _STANDS_IN in function.__globals__:
        name = function.__globals__["__name__"]
        raise LoadFailed(
            f"no module named {name!r} can be imported here, and a function needs its "
            f"{state['left'][0]!r}",
            "install it here, or serializers.register_by_value it where it was written",
            name,
        )
    else:
        function.__globals__.update(state["globals"])
        if state.get("executed"):
            # NB: it came as a whole, with a copy of them.
            function.__globals__["__builtins__"] = builtins.__dict__
    if state["attributes"]:
        function.__dict__ = state["attributes"]
    for name, value in state["slots"].items():
        setattr(function, name, value)


def _is_empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def reduce_cell(cell: types.CellType, namespaces: Namespaces) -> Reduced:
    """Reduce a variable that functions share, as an object of its own."""
    if _is_empty(cell):
        return _make_cell, ()
    if namespaces.unfilled is not None:
        namespaces.unfilled.append(cell)
        return _make_cell, ()
    return _make_cell, (), (cell.cell_contents,), None, None, _fill_cell


def _make_cell() -> types.CellType:
    return types.CellType()


def _fill_cell(cell: types.CellType, state: tuple[Any]) -> None:
    cell.cell_contents = state[0]


def _reduce_lru_cache(wrapper: Any) -> Reduced:
    if is_importable(wrapper):
        return wrapper.__reduce__()
    parameters = wrapper.cache_parameters()
    info = wrapper.cache_info()
    state = (_cached(wrapper), info.hits, info.misses, vars(wrapper))
    arguments = (_cached_function(wrapper), parameters["maxsize"], parameters["typed"])
    return _make_lru_cache, arguments, state, None, None, _fill_lru_cache


def _inside(wrapper: Any) -> tuple[list[Any], dict[Any, Any], Any, object]:
    """What a cache refers to, in the order in which it shows it to the collector.

    Returns:
        The entries of a bounded one, as key, result and the entry's type, the least recently used
        first; the table; the function; and what stands between arguments and keywords in a key.
        Source: `lru_cache_tp_traverse` in CPython's Modules/_functoolsmodule.c.
    """
    held = gc.get_referents(wrapper)
    start = 1 if held and held[0] is type(wrapper) else 0
    bounded = wrapper.cache_parameters()["maxsize"] is not None
    at = start + (3 * wrapper.cache_info().currsize if bounded else 0)
    table, function, mark = held[at : at + 3]
    return held[start:at], table, function, mark


def _cached_function(wrapper: Any) -> Any:
    """What a cache calls on a miss, whatever its `__wrapped__` says."""
    _, _, function, _ = _inside(wrapper)
    return function.function if isinstance(function, _Refill) else function


def _cached(wrapper: Any) -> list[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """Arguments and result of each cached call, the least recently used first."""
    parameters = wrapper.cache_parameters()
    entries, table, _, mark = _inside(wrapper)
    pairs = zip(entries[::3], entries[1::3], strict=True)
    if parameters["maxsize"] is None:
        pairs = zip(table.keys(), table.values(), strict=True)
    return [(*_arguments_of(key, parameters["typed"], mark), result) for key, result in pairs]


def _arguments_of(key: Any, typed: bool, mark: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if type(key) is not tuple:
        return (key,), {}
    items = list(key)
    if typed:
        # As many types follow as there are values: both are told apart by counting.
        count = next((i for i, item in enumerate(items) if item is mark), None)
        if count is None:
            items = items[: len(items) // 2]
        else:
            named = (len(items) - 2 * count - 1) // 3
            items = items[: count + 1 + 2 * named]
    for at, item in enumerate(items):
        if item is mark:
            rest = items[at + 1 :]
            return tuple(items[:at]), dict(zip(rest[::2], rest[1::2], strict=True))
    return tuple(items), {}


class _Refill:
    """What a rebuilt cache calls on a miss: the results that it had, and then the function."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.results: list[Any] = []

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self.results:
            return self.results.pop()
        return self.function(*args, **named)


def _make_lru_cache(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.update_wrapper(
        functools.lru_cache(maxsize=maxsize, typed=typed)(_Refill(function)), function
    )


_COUNTS_MAX = 100_000
"""Hits and misses beyond this are not counted up again: it would take longer than a second."""


def _fill_lru_cache(wrapper: Any, state: Any) -> None:
    entries, hits, misses, attributes = state
    refill = _inside(wrapper)[2]
    function = refill.function
    for args, named, result in entries:
        refill.results.append(result)
        wrapper(*args, **named)
    refill.function = _fail
    for _ in range(min(misses - len(entries), _COUNTS_MAX)):
        try:
            wrapper(_Refill)
        except LookupError:
            pass
    if entries:
        args, named, _ = entries[-1]
        for _ in range(min(hits, _COUNTS_MAX)):
            wrapper(*args, **named)
    refill.function = function
    vars(wrapper).update(attributes)


def _fail(*args: Any, **named: Any) -> None:
    raise LookupError


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


class _Sample(ctypes.Structure):
    _fields_ = (("field", ctypes.c_int),)


_CField: Any = type(_Sample.field)
_NOT_BEFORE_DATA = ("__new__", "__init_subclass__", "__class_getitem__")
"""Methods likely to use the class's data, and that rebuilding an instance can do without."""


class _Methods:
    """The plain methods of a class: set on it, still empty, before anything else is loaded.

    An instance may be among the class's own attributes, or be reached from a method's globals. To
    rebuild it may take methods: its hash, or what its `__reduce__` calls.
    """

    def __init__(self, cls: type, namespaces: Namespaces) -> None:
        self._cls = cls
        self._namespaces = namespaces

    def reduce(self) -> Reduced:
        methods = {
            name: value
            for name, value in vars(self._cls).items()
            if _is_method(value) and name not in _NOT_BEFORE_DATA
        }
        self._namespaces.unfilled = []
        return _set_methods, (self._cls, methods)


class _Fillings:
    """What fills the functions and cells that `_Methods` left empty."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    def reduce(self) -> Reduced:
        unfilled, self._namespaces.unfilled = self._namespaces.unfilled or [], None
        cells = [
            _Filling(_fill_cell, c, (c.cell_contents,))
            for c in unfilled
            if isinstance(c, types.CellType)
        ]
        functions = [
            _Filling(_fill_function, f, _function_state(f, self._namespaces.of(f)))
            for f in unfilled
            if isinstance(f, types.FunctionType)
        ]
        return list, ((*cells, *functions),)


class _Filling:
    def __init__(self, fill: Callable[[Any, Any], None], obj: Any, state: Any) -> None:
        self._step = (fill, (obj, state))

    def __reduce__(self) -> Reduced:
        return self._step


def _is_method(value: Any) -> bool:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    return type(value) is types.FunctionType and not is_importable(value)


def _set_methods(cls: type, methods: dict[str, Any]) -> None:
    with _fill_lock:
        if is_being_made(cls):
            for name, value in methods.items():
                _set_attribute(cls, name, value)


def reduce_helper(helper: Any) -> Reduced:
    """Reduce what stands for a part of a class; see `HELPERS`."""
    return helper.reduce()


HELPERS = (_Methods, _Fillings)


def reduce_class(cls: type, namespaces: Namespaces) -> Reduced:
    """Reduce a class that travels by value."""
    head: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    tracker_id = machinery._get_or_create_tracker_id(cls)
    own = dict(vars(cls))
    skip = set(_MADE_BY_TYPE)
    state: dict[str, Any] = {"tracker_id": tracker_id}
    if namespaces.methods_first and namespaces.unfilled is None and not issubclass(cls, type):
        state["methods"] = _Methods(cls, namespaces)
        state["fillings"] = _Fillings(namespaces)
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
    if issubclass(cls, ctypes.Structure | ctypes.Union):
        # Its fields are laid out when `_fields_` is set, by the rules that are set before.
        head.update(
            (name, own[name]) for name in ("_pack_", "_align_", "_anonymous_") if name in own
        )
        skip.update(name for name, value in own.items() if type(value) is _CField)
        skip.update(head)
    # What stands for an attribute that every class has must be there when the class is made: later,
    # to set it would be to change the class itself. So it is made empty, and filled later.
    stand_ins = {n: own[n] for n in ("__dict__", "__class__") if type(own.get(n)) is property}
    if stand_ins:
        head.update((name, _EmptyProperty()) for name in stand_ins)
        state["properties"] = {
            name: (found.fget, found.fset, found.fdel, found.__doc__)
            for name, found in stand_ins.items()
        }
        skip.update(stand_ins)
    state["attributes"] = {name: value for name, value in own.items() if name not in skip}
    # Generic classes are made from what they were written with, unless that makes another class,
    # as NamedTuple and TypedDict do.
    written = own.get("__orig_bases__", cls.__bases__)
    bases = written if types.resolve_bases(written) == cls.__bases__ else cls.__bases__
    args = (type(cls), cls.__name__, bases, head, tracker_id)
    return _begin_class, args, state, None, None, _fill_class


class _EmptyProperty:
    def __reduce__(self) -> Reduced:
        return property, ()


def is_being_made(cls: type) -> bool:
    """Tell whether a class by value has not yet got all its attributes, while it is loaded."""
    return any(unfilled is cls for unfilled in _unfilled.values())


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
            made = _new_class(metaclass, name, bases, head)
        return _track(made, tracker_id)


def _new_class(metaclass: Any, name: str, bases: tuple[Any, ...], head: dict[str, Any]) -> type:
    made: type
    try:
        made = types.new_class(name, bases, {"metaclass": metaclass}, lambda ns: ns.update(head))
    except Exception:
        pass
    else:
        if vars(made).get("__slots__") == head.get("__slots__"):
            return made
    # The keywords of its class statement are not kept, nor is its body, and some
    # `__init_subclass__`, or the metaclass, asks for them: it fails, or makes another class of it.
    # What these did is among the attributes.
    resolved = types.resolve_bases(bases)
    if resolved is not bases:
        head = {**head, "__orig_bases__": bases}
    stand_ins = tuple(_without_init_subclass(base) for base in resolved)
    made = type.__new__(metaclass, name, stand_ins, dict(head))
    if stand_ins != resolved:
        made.__bases__ = resolved
    return made


def _without_init_subclass(base: type) -> type:
    """A class laid out in memory as `base`, whose subclasses can be made without being noticed."""
    hooked = any("__init_subclass__" in vars(cls) for cls in base.__mro__[:-1])
    if not hooked:
        return base
    slots = vars(base).get("__slots__")
    head = {} if slots is None else {"__slots__": slots}
    above = tuple(_without_init_subclass(cls) for cls in base.__bases__)
    return type.__new__(type(base), base.__name__, above, head)


def _track(made: type, tracker_id: str) -> type:
    machinery._lookup_class_or_track(tracker_id, made)
    _unfilled[tracker_id] = made
    return made


def _set_attribute(cls: type, name: str, value: Any) -> None:
    """Set a class's attribute, whatever its metaclass says to that."""
    if issubclass(cls, ctypes.Structure | ctypes.Union):
        setattr(cls, name, value)  # Its metaclass lays out the fields.
    else:
        type.__setattr__(cls, name, value)


def _fill_class(cls: type, state: dict[str, Any]) -> None:
    """Set the attributes of a class that was just made; leave one that was here before alone."""
    with _fill_lock:
        # NB: of two threads that load one class, whichever comes first fills it for both; the
        # other must not use it before, hence the lock rather than a flag of one's own.
        if _unfilled.get(state["tracker_id"]) is not cls:
            return
        for name, value in state["attributes"].items():
            _set_attribute(cls, name, value)
        for name, parts in state.get("properties", {}).items():
            property.__init__(vars(cls)[name], *parts)
        if "__firstlineno__" in state["attributes"]:
            # Setting other attributes makes Python 3.13 and later drop it.
            _set_attribute(cls, "__firstlineno__", state["attributes"]["__firstlineno__"])
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
        for key, value in head.items():
            namespace[key] = value
        for key, value in members.items():
            # What is a descriptor would be taken for a method.
            namespace[key] = enum.member(value) if hasattr(type(value), "__get__") else value
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
    if place is not None and not (is_by_value_module(place[0].__name__) or is_made_up(place[0])):
        return obj.__reduce__()
    # Tracked as classes are, so that the same one comes back home.
    tracker_id = machinery._get_or_create_tracker_id(obj)
    return _make_type_parameter, (type(obj), obj.__name__, obj.__module__, tracker_id)


def _reduce_type_variable(obj: Any) -> Reduced:
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    if module is None or not is_made_up(module):
        return _type_variable_reducer(obj)
    return machinery._make_typevar, machinery._decompose_typevar(obj)


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
    if is_made_up(module) and sys.modules.get(module.__name__) is not module:
        content = {n: value for n, value in vars(module).items() if n != "__builtins__"}
        return types.ModuleType, (module.__name__,), content, None, None, _fill_module
    return machinery._module_reduce(module)


def _fill_module(module: types.ModuleType, content: dict[str, Any]) -> None:
    vars(module).update(content)
    vars(module)["__builtins__"] = builtins.__dict__


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
_type_variable_reducer: Any = TYPE_REDUCERS[typing.TypeVar]
TYPE_REDUCERS.update(
    {
        types.MethodType: _reduce_method,
        types.ModuleType: _reduce_module,
        functools._lru_cache_wrapper: _reduce_lru_cache,
        typing.NewType: _reduce_new_type,
        typing.ParamSpec: _reduce_type_parameter,
        typing.TypeVar: _reduce_type_variable,
        typing.TypeVarTuple: _reduce_type_parameter,
    }
)
