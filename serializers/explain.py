"""Says where and why: the attribute path of what cannot travel, and what a load is missing.

pickle's own errors name a C type at best. So after a failed dump the graph is walked once more, in
the pickler's order but in Python: each object is asked for its reduction, as the pickler would, and
the path to it is kept. Each object that cannot even be reduced is an obstacle; what lies behind it
is not looked at, and the walk goes on beside it. The walk keeps its own stack, so no depth of
nesting can exhaust the interpreter's.

`check` does the same ahead of time, and gathers what reducers say about losses (`lossy`). On the
command line:

    python -m serializers.explain MODULE:OBJECT [--json]

OBJECT is an instance, a class or a function that the module holds, dots allowed. Importing the
module runs it; beyond that nothing is changed, called or unpickled. Exit status: 0 it can travel,
maybe with losses; 1 something in it cannot; 2 the command line is wrong, or there is no such
object.
"""

from __future__ import annotations

import asyncio
import collections
import collections.abc
import copyreg
import dataclasses
import importlib
import json
import multiprocessing.process
import pickle
import pickletools
import reprlib
import socket
import sqlite3
import subprocess
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from .base import gathering
from .errors import CheckReport, Finding, LoadFailed, NotSerializable, SerializerError
from .plain import find_former
from .resources import REOPEN, type_name

_OBJECTS_MAX = 2_000_000
"""Objects walked in search of the culprit; then the error names the root only."""
_PATH_STEPS_MAX = 24
"""Steps of a path shown; of longer ones the beginning and the end."""
_OPCODES_MAX = 5_000_000
"""Opcodes of a body looked at for missing modules."""

_ATOMS = frozenset((int, str, float, bool, complex, bytes, bytearray, type(None), type(...)))
_PROBLEMS_MAX = 100
"""Findings of one kind in one report; then the walk ends."""
_REMEDY = "leave it out in __getstate__ and rebuild it in __setstate__, or serializers.register it"

_KEY_REPR = reprlib.Repr()
_KEY_REPR.maxstring = 40
_KEY_REPR.maxother = 40
_KEY_TYPES = (str, bytes, int, float, bool, type(None), tuple)

_Child = tuple[str, object]
_Reduce = Callable[[Any], Any]


def explain_dump(root: object, cause: BaseException, reduce: _Reduce) -> NotSerializable:
    """Find what made a dump fail.

    Args:
        root: What was to be dumped.
        cause: What the pickler raised.
        reduce: The pickler's `reducer_override`.

    Returns:
        An error to raise from `cause`, its path never empty; it names all obstacles.
    """
    walk = _Walk(root, reduce)
    walk.run()
    if walk.problems:
        first, *others = walk.problems
    elif isinstance(cause, NotSerializable):
        where = walk.deepest_path if walk.deepest_path else type_name(type(root))
        first, others = Finding(where, cause.type_name, cause.reason, cause.remedy), []
    else:
        name = type_name(type(root))
        first, others = Finding(_root_name(root), name, _reason_of(cause), _REMEDY), []
    return NotSerializable(first.path, first.type_name, first.reason, first.remedy, tuple(others))


def path_to(root: object, wanted: object, reduce: _Reduce) -> str:
    """The path by which the walk first meets `wanted`; if it does not, the root's name."""
    walk = _Walk(root, reduce)
    walk.wanted = wanted
    walk.run()
    return walk.wanted_path or _root_name(root)


def report(root: object, reduce: _Reduce) -> CheckReport:
    """Walk `root` as a pickler would whose `reducer_override` is `reduce`; see `auto.check`."""
    walk = _Walk(root, reduce)
    with gathering() as notes:
        walk.notes = notes
        walk.run()
    if issubclass(type(root), type):
        walk.look_at_declarations(root)
    return CheckReport(
        subject=_root_name(root),
        problems=tuple(walk.problems),
        lossy=tuple(walk.lossy),
        by_value=tuple(walk.by_value),
        objects=len(walk.seen),
        complete=walk.complete,
    )


_LIVE: tuple[tuple[type, str], ...] = (
    (threading.Thread, "it is refused while it runs"),
    (multiprocessing.process.BaseProcess, "it is refused: it is a child of its process"),
    (subprocess.Popen, "it is refused: it is a child of its process"),
    (socket.socket, "it is refused while it is connected"),
    (sqlite3.Connection, "it is refused unless its database can be made again"),
    (asyncio.Future, "it is refused while it is pending"),
    (asyncio.AbstractEventLoop, "it is refused: it belongs to its thread"),
    (types.GeneratorType, "it is refused while it is suspended"),
    (types.CoroutineType, "it is refused while it is suspended"),
    (types.AsyncGeneratorType, "it is refused while it is suspended"),
    (collections.abc.Generator, "it is refused while it is suspended"),
    (collections.abc.Coroutine, "it is refused while it is suspended"),
    (collections.abc.AsyncGenerator, "it is refused while it is suspended"),
)
"""Types of which an attribute, declared as such, is likely to be in the way of a move."""


def _declared(cls: type) -> Iterator[tuple[str, type]]:
    """Attributes that annotations declare, with each class that is named in their types."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception:
        # Names that only type checkers can see, say; then nothing is known.
        return
    for name, hint in hints.items():
        pending: list[Any] = [hint]
        for part in pending:
            pending += typing.get_args(part)
            origin = typing.get_origin(part) or part
            if isinstance(origin, type):
                yield name, origin


# NB: types are asked of `type`, here and below: an object may lie about its class, or hang.
def _root_name(root: Any) -> str:
    if issubclass(type(root), type | types.FunctionType):
        return str(root.__qualname__)
    return type(root).__qualname__


def _name_of(obj: Any) -> str:
    if issubclass(type(obj), type | types.FunctionType | types.BuiltinFunctionType):
        return f"{type_name(type(obj))} {obj.__qualname__}"
    return type_name(type(obj))


def _reason_of(exc: BaseException) -> str:
    text = str(exc)
    if isinstance(exc, TypeError) and text.startswith("cannot pickle "):
        return "its type has no way to give its state away"
    if isinstance(exc, pickle.PicklingError | SerializerError):
        return text or type(exc).__name__
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


class _Walk:
    """One search, depth first, in the order of the pickler."""

    def __init__(self, root: object, reduce: _Reduce) -> None:
        self._root = root
        self._reduce = reduce
        # Objects by id, kept alive: an id of a temporary one may be given out again.
        self.seen: dict[int, object] = {}
        self.problems: list[Finding] = []
        self.lossy: list[Finding] = []
        # By name; a dict, to keep the order.
        self.by_value: dict[str, None] = {}
        self.complete = True
        self.notes: list[str] = []
        self.deepest_path = ""
        self.wanted: object = None
        self.wanted_path = ""
        self._deepest = 0

    def run(self) -> None:
        """Look at all that the root refers to, until there are too many findings or objects."""
        steps = [_root_name(self._root)]
        stack: list[Iterator[_Child]] = [iter([("", self._root)])]
        holders = [self._root]
        while stack:
            try:
                child = next(stack[-1], None)
            except MemoryError:
                raise
            except Exception as exc:
                # What a reduction gave cannot be gone through.
                self._failed(steps, holders[-1], exc)
                child = None
            if child is None:
                stack.pop()
                steps.pop()
                holders.pop()
                continue
            step, obj = child
            if type(obj) in _ATOMS or id(obj) in self.seen:
                continue
            if len(self.seen) >= _OBJECTS_MAX or len(self.problems) >= _PROBLEMS_MAX:
                self.complete = False
                return
            if step:
                steps.append(step)
            if obj is self.wanted:
                self.wanted_path = _join(steps)
                return
            try:
                children = self._enter(obj)
            except MemoryError:
                raise
            except Exception as exc:
                self._failed(steps, obj, exc)
                children = iter(())
            if self.notes:
                self._lost(steps, obj)
            if not step:
                stack[-1] = children
            else:
                stack.append(children)
                holders.append(obj)
                if len(stack) > self._deepest + 100:
                    self._deepest = len(stack)
                    self.deepest_path = _join(steps)

    def look_at_declarations(self, cls: Any) -> None:
        """Note what a class declares that is likely to be refused in its objects."""
        for name, kind in _declared(cls):
            for live, reason in _LIVE:
                if issubclass(kind, live):
                    path = f"{cls.__qualname__}.{name}"
                    self.lossy.append(Finding(path, type_name(kind), reason, REOPEN))
                    break

    def _failed(self, steps: list[str], obj: object, exc: BaseException) -> None:
        path = _join(steps)
        if isinstance(exc, NotSerializable):
            finding = Finding(path, exc.type_name, exc.reason, exc.remedy)
        else:
            finding = Finding(path, _name_of(obj), _reason_of(exc), _REMEDY)
        self.problems.append(finding)

    def _lost(self, steps: list[str], obj: object) -> None:
        if len(self.lossy) < _PROBLEMS_MAX:
            path, name = _join(steps), _name_of(obj)
            self.lossy += [Finding(path, name, reason) for reason in self.notes]
        self.notes.clear()

    def _enter(self, obj: Any) -> Iterator[_Child]:
        """What the pickler would save next because of `obj`; raises what the reduction raises."""
        self.seen[id(obj)] = obj
        kind = type(obj)
        if kind is dict:
            return _dict_children(obj)
        if kind is list or kind is tuple:
            return ((f"[{index}]", item) for index, item in enumerate(list(obj)))
        if kind is set or kind is frozenset:
            return ((f"{{{_key(item)}}}", item) for item in list(obj))
        if kind is pickle.PickleBuffer:
            return iter(())
        reduced = self._reduce(obj)
        if reduced is NotImplemented:
            if kind is types.FunctionType or issubclass(kind, type):
                # Only names are saved, so nothing else comes along.
                pickle.dumps(obj, 5)
                return iter(())
            special = copyreg.dispatch_table.get(kind)
            reduced = special(obj) if special is not None else obj.__reduce_ex__(5)
        elif kind is types.FunctionType or (issubclass(kind, type) and len(reduced) > 2):
            self.by_value.setdefault(f"{obj.__module__}.{obj.__qualname__}")
        if isinstance(reduced, str):
            pickle.dumps(obj, 5)
            return iter(())
        if not isinstance(reduced, tuple) or not 2 <= len(reduced) <= 6:
            raise pickle.PicklingError("its __reduce__ must return a string or 2 to 6 items")
        # NB: iterators in it are used up here, and belong to this reduction alone.
        self.seen[id(reduced)] = reduced
        return _reduced_children(obj, reduced)


def _dict_children(mapping: dict[Any, Any]) -> Iterator[_Child]:
    for key, value in list(mapping.items()):
        if type(key) not in _ATOMS:
            yield f"<key {_key(key)}>", key
        yield f"[{_key(key)}]", value


def _key(key: object) -> str:
    # Only types whose repr cannot run foreign code, nor fail.
    if type(key) in _KEY_TYPES and not (
        isinstance(key, tuple) and any(type(item) not in _ATOMS for item in key)
    ):
        return _KEY_REPR.repr(key)
    return f"<{type(key).__qualname__}>"


def _reduced_children(obj: Any, reduced: tuple[Any, ...]) -> Iterator[_Child]:
    padding: tuple[Any, ...] = (None,) * (6 - len(reduced))
    function, args, state, items, pairs, setter = reduced + padding
    if type(obj) is types.FunctionType:
        yield from _function_children(obj, args, state)
        return
    if type(obj) is types.MethodType:
        yield ".__func__", obj.__func__
        yield ".__self__", obj.__self__
        return
    yield ".__reduce__()[0]", function
    yield from _argument_children(obj, function, args)
    yield from _state_children(obj, state, setter)
    for index, item in enumerate(items or ()):
        yield f"[{index}]", item
    for key, value in pairs or ():
        if type(key) not in _ATOMS:
            yield f"<key {_key(key)}>", key
        yield f"[{_key(key)}]", value


def _function_children(
    function: types.FunctionType, args: tuple[Any, ...], state: Any
) -> Iterator[_Child]:
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield f".__closure__[{name!r}]", cell.cell_contents
        except ValueError:
            continue
    for arg in args[:3]:
        yield ".__code__", arg
    if not isinstance(state, dict):
        yield ".__dict__", state
        return
    for name, value in state["globals"].items():
        yield f".__globals__[{name!r}]", value
    for name, value in state["slots"].items():
        yield f".{name}", value
    for name, value in function.__dict__.items():
        yield f".{name}", value


def _argument_children(obj: Any, function: Any, args: Any) -> Iterator[_Child]:
    if not isinstance(args, tuple):
        raise pickle.PicklingError("the second item of its __reduce__ must be a tuple")
    own = {id(value): name for name, value in _attributes(obj)}
    if issubclass(type(obj), tuple):
        names = getattr(type(obj), "_fields", ())
        for position, item in enumerate(tuple.__iter__(obj)):
            yield (f".{names[position]}" if position < len(names) else f"[{position}]"), item
    for index, arg in enumerate(args):
        # An argument that the object also has as an attribute is better known by that name.
        name = own.get(id(arg))
        by_name = name is not None and type(arg) not in _ATOMS
        yield (f".{name}" if by_name else f".__reduce__()[1][{index}]"), arg


def _attributes(obj: Any) -> Iterator[tuple[str, object]]:
    """Attributes kept in the object itself, found without running any code of its class."""
    try:
        yield from list(object.__getattribute__(obj, "__dict__").items())
    except AttributeError:
        pass  # It has none: slots and C fields remain.
    for base in type(obj).__mro__:
        for name, descriptor in list(vars(base).items()):
            if isinstance(descriptor, types.MemberDescriptorType):
                try:
                    yield name, descriptor.__get__(obj)
                except AttributeError:
                    continue  # A slot that was never set.


def _state_children(obj: Any, state: Any, setter: Any) -> Iterator[_Child]:
    if state is None:
        return
    if setter is not None:
        yield ".__reduce__()[5]", setter
    if issubclass(type(obj), type) and isinstance(state, dict):
        for name, value in state.get("attributes", {}).items():
            yield f".{name}", value
        return
    if type(obj) is types.CellType and isinstance(state, tuple):
        yield ".cell_contents", state[0]
        return
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        # What object.__reduce_ex__ gives for classes with __slots__.
        if state[0] is None or isinstance(state[0], dict):
            for part in state:
                for name, value in (part or {}).items():
                    yield f".{name}", value
            return
    own = {id(value): name for name, value in _attributes(obj)}
    if isinstance(state, tuple):
        yield from _parts_children(obj, state, own, ".__getstate__()")
        return
    if isinstance(state, list) and issubclass(type(obj), dict):
        yield from _parts_children(obj, (state,), own, ".__getstate__()")
        return
    custom = getattr(type(obj), "__getstate__", None) is not getattr(object, "__getstate__", None)
    if not isinstance(state, dict):
        if isinstance(state, list):
            for index, value in enumerate(state):
                named = type(value) not in _ATOMS and id(value) in own
                yield (f".{own[id(value)]}" if named else f".__getstate__()[{index}]"), value
        else:
            yield ".__getstate__()", state
        return
    for key, value in list(state.items()):
        if isinstance(key, str) and key.isidentifier() and (not custom or id(value) in own):
            yield f".{key}", value
        else:
            yield f".__getstate__()[{_key(key)}]", value


def _parts_children(
    obj: Any, parts: tuple[Any, ...], own: dict[int, str], step: str
) -> Iterator[_Child]:
    """The parts of a state; those that are its attributes, slots or items are known by name."""
    for index, part in enumerate(parts):
        if type(part) is dict and all(type(n) is str and id(part[n]) in own for n in part):
            for name, value in list(part.items()):
                yield f".{name}", value
        elif type(part) is list and part and all(_is_slot(entry) for entry in part):
            for _, name, value in part:
                yield f".{name}", value
        elif type(part) is list and issubclass(type(obj), dict) and all(_is_pair(e) for e in part):
            for key, value in part:
                if type(key) not in _ATOMS:
                    yield f"<key {_key(key)}>", key
                yield f"[{_key(key)}]", value
        elif type(part) is list and issubclass(type(obj), _SEQUENCES):
            for position, value in enumerate(part):
                yield f"[{position}]", value
        elif type(part) is tuple and part and type(part[0]) in (dict, type(None), list):
            yield from _parts_children(obj, part, own, f"{step}[{index}]")
        elif type(part) not in _ATOMS and id(part) in own:
            yield f".{own[id(part)]}", part
        else:
            yield f"{step}[{index}]", part


_SEQUENCES = (list, collections.deque, set)


def _is_slot(entry: Any) -> bool:
    return type(entry) is tuple and len(entry) == 3 and isinstance(entry[0], type)


def _is_pair(entry: Any) -> bool:
    return type(entry) is tuple and len(entry) == 2


def _join(steps: list[str]) -> str:
    if len(steps) <= _PATH_STEPS_MAX:
        return "".join(steps)
    head, tail = steps[: _PATH_STEPS_MAX // 2], steps[-4:]
    skipped = len(steps) - len(head) - len(tail)
    return f"{''.join(head)} ...{skipped} steps... {''.join(tail)}"


# --- loading -------------------------------------------------------------------------------------


def explain_load(body: bytes | memoryview, cause: BaseException) -> LoadFailed:
    """Say why a body could not be loaded; raise the result from `cause`."""
    if isinstance(cause, LoadFailed):
        return cause
    if isinstance(cause, ImportError | AttributeError):
        missing = _missing_global(body)
        if missing is not None:
            return missing
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        return LoadFailed(
            f"no module named {cause.name!r} here",
            "install it here, or serializers.register_by_value it where it was written",
            cause.name,
        )
    if isinstance(cause, MemoryError):
        return LoadFailed("this process has not enough memory for it", "load it on a larger node")
    text = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
    if isinstance(cause, pickle.UnpicklingError | EOFError | IndexError | OverflowError):
        return LoadFailed(f"the pickle is damaged or cut short ({text})")
    return LoadFailed(f"rebuilding an object failed ({text})")


def _missing_global(body: bytes | memoryview) -> LoadFailed | None:
    """Find the first class or function in a pickle that is not there, without running any."""
    checked: set[tuple[str, str]] = set()
    for module_name, name in _globals_of(body):
        if (module_name, name) in checked:
            continue
        checked.add((module_name, name))
        if find_former(module_name, name) is not None:
            continue
        module = sys.modules.get(module_name)
        if module is None:
            # It was imported by the failed load, had that been possible.
            return LoadFailed(
                f"no module named {module_name!r} here (looking for {name!r})",
                "install it here, or serializers.register_by_value it where it was written",
                module_name,
                name,
            )
        found: Any = module
        for piece in name.split("."):
            try:
                found = getattr(found, piece)
            except AttributeError:
                return LoadFailed(
                    f"module {module_name!r} has no attribute {name!r}",
                    "bring the module here to the version where it was written",
                    module_name,
                    name,
                )
    return None


def _globals_of(body: bytes | memoryview) -> Iterator[tuple[str, str]]:
    """(module, qualified name) of the globals that a pickle of protocol 4 or later refers to."""
    memo: list[str | None] = []
    strings: list[str] = []
    last: str | None = None
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(bytes(body))):
            if count > _OPCODES_MAX:
                return
            name = opcode.name
            if name.endswith("UNICODE") or name == "SHORT_BINUNICODE":
                last = str(argument)
                strings = [*strings[-1:], last]
            elif name == "MEMOIZE":
                memo.append(last)
                last = None
            elif name in ("BINGET", "LONG_BINGET"):
                index = int(argument or 0)
                known = memo[index] if index < len(memo) else None
                if known is not None:
                    strings = [*strings[-1:], known]
                last = None
            elif name == "STACK_GLOBAL":
                if len(strings) == 2:
                    yield strings[0], strings[1]
                last = None
            elif name not in ("FRAME", "PROTO"):
                last = None
    except ValueError:
        return  # Damaged from here on; the caller reports what pickle said.


# --- command line --------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Check what is named on the command line; see the module for the exit status."""
    from . import check

    as_json = "--json" in arguments
    names = [argument for argument in arguments if argument != "--json"]
    if any(name in ("-h", "--help") for name in names):
        print(__doc__.strip())
        return 0
    module_name, colon, place = names[0].partition(":") if len(names) == 1 else ("", "", "")
    if not module_name or not colon or not place or module_name.startswith("-"):
        print("usage: python -m serializers.explain MODULE:OBJECT [--json]", file=sys.stderr)
        return 2
    # As for a script: what lies in the current folder can be named.
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
        for piece in place.split("."):
            found = getattr(found, piece)
    except Exception as exc:
        print(f"{names[0]} cannot be had: {type(exc).__name__}: {exc}", file=sys.stderr)
        return 2
    checked = check(found)
    if as_json:
        print(json.dumps({"ok": checked.ok, **dataclasses.asdict(checked)}, indent=2))
    else:
        print(checked)
    return 0 if checked.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
