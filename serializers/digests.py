"""A canonical digest of a state: equal for equal states, whichever process holds them.

What counts: types, values, the order of dicts and lists, and which mutable objects are one and the
same. What does not: the order of sets, whether equal immutable values are one object or two, where
things lie in memory, the hash seed, and what an import system or a pickler notes for itself.

Theory. The graph is walked as the pickler walks it, each object by its own reduction. An object is
given the next number when it is met first, and stands as that number when it is met again; its
digest is made of those of its parts. Immutable values get no number: theirs is their content's.
The walk has a stack of its own, so depth is no obstacle.

Sets need an order that does not depend on hashes. Each member is first digested on trial, with
numbers that are taken back, and the members are then walked in the order of those digests. Members
that look the same, as two empty objects do, can be walked in either order, and it makes no
difference unless something else refers to one of them, or into it: which one cannot then be told
in a canonical way, and the state is refused by the path to the set. (To decide it would be to
decide whether two graphs are isomorphic.)

Digests of states that hold code by value can be compared within one minor version of Python.
"""

from __future__ import annotations

import copyreg
import datetime
import decimal
import fractions
import pathlib
import pickle
import re
import struct
import types
import uuid
import weakref
from collections.abc import Callable, Generator, Iterable
from enum import Enum
from hashlib import blake2b
from typing import Any

from cloudpickle import cloudpickle as machinery

from .base import comparing
from .errors import NotSerializable
from .resources import refuse

DIGEST_BYTES = 20
"""Length of a digest. Collisions need about 2**80 states."""

VISITS_MAX = 50_000_000
"""Visits of one digest; sets of sets of objects can multiply them."""

_Reduce = Callable[[Any], Any]
_Steps = Generator[Any, bytes, bytes]
"""Yields objects, is sent their tokens, returns the token of the whole."""

_VALUES: tuple[type, ...] = (
    datetime.date,
    datetime.time,
    datetime.datetime,
    datetime.timedelta,
    datetime.timezone,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    pathlib.PosixPath,
    re.Pattern,
    range,
    slice,
    complex,
)
"""Immutable types besides the atoms, by exact type: which object one is does not matter."""

_NOT_OF_THE_STATE = frozenset(("__slotnames__", "__static_attributes__", "__firstlineno__"))
"""Attributes of classes that Python, or pickle, notes for itself."""
_INLINE_BYTES_MAX = 32


def _token(tag: bytes, data: bytes) -> bytes:
    """Tag, length, data: no token is the beginning of another one."""
    if len(data) > _INLINE_BYTES_MAX:
        return b"#" + blake2b(tag + data, digest_size=DIGEST_BYTES).digest()
    return tag + len(data).to_bytes(1, "little") + data


def _joined(tag: bytes, tokens: Iterable[bytes]) -> bytes:
    return b"#" + blake2b(tag + b"|" + b"".join(tokens), digest_size=DIGEST_BYTES).digest()


_ATOMS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"n\0",
    type(...): lambda _: b"e\0",
    type(NotImplemented): lambda _: b"m\0",
    bool: lambda value: _token(b"t", b"1" if value else b"0"),
    int: lambda value: _token(
        b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    ),
    float: lambda value: _token(b"f", struct.pack("<d", value)),
    str: lambda value: _token(b"s", value.encode("utf-8", "surrogatepass")),
    bytes: lambda value: _token(b"b", value),
}


class _Digester:
    """One walk; `reduce` is the `reducer_override` of the pickler whose walk it follows."""

    def __init__(self, reduce: _Reduce) -> None:
        self._reduce = reduce
        self._visits = 0
        # By id of an object, or by the place of a block of memory; in the order of numbers.
        self._numbers: dict[Any, int] = {}
        # Tokens of immutable containers in which everything mutable has its number already.
        self._known: dict[int, bytes] = {}
        # Keeps alive whatever was met, lest an id be given out again.
        self._kept: list[Any] = []
        # Numbers given within a set's member that looks like another one: by member.
        self._member_of: dict[int, int] = {}
        self._members = 0
        self._inside: set[int] = set()
        self.current: Any = None

    def run(self, root: Any) -> bytes:
        """The token of `root`."""
        stack: list[_Steps] = []
        objects: list[Any] = []
        value: bytes | _Steps = self._begin(root)
        while True:
            try:
                if isinstance(value, bytes):
                    if not stack:
                        return value
                    child = stack[-1].send(value)
                else:
                    stack.append(value)
                    objects.append(self.current)
                    child = next(value)
            except StopIteration as stop:
                stack.pop()
                objects.pop()
                value = stop.value
                continue
            except NotSerializable:
                self.current = objects[-1]
                raise
            value = self._begin(child)

    def _begin(self, obj: Any) -> bytes | _Steps:
        kind = type(obj)
        atom = _ATOMS.get(kind)
        if atom is not None:
            return atom(obj)
        self.current = obj
        self._visits += 1
        if self._visits > VISITS_MAX:
            refuse(obj, "its sets hold too many objects in each other", "keep them in lists")
        known = self._known.get(id(obj))
        if known is not None:
            return known
        if kind is tuple:
            return self._immutable(obj, self._sequence(b"(", obj))
        if kind is frozenset:
            return self._immutable(obj, self._set(b"{", obj))
        number = self._numbers.get(id(obj))
        if number is not None:
            return self._reference(number)
        if kind is pickle.PickleBuffer:
            raw = obj.raw()
            return _joined(b"p" if raw.readonly else b"P", [blake2b(raw).digest()])
        if kind is list:
            self._number(obj)
            return self._sequence(b"[", obj)
        if kind is dict:
            self._number(obj)
            return self._dict(obj)
        if kind is set:
            self._number(obj)
            return self._set(b"<", obj)
        if kind is bytearray:
            self._number(obj)
            return _joined(b"B", [blake2b(obj).digest()])
        if kind.__module__ == "numpy" and kind.__name__ == "ndarray" and not obj.dtype.hasobject:
            return self._array(obj)
        return self._object(obj, kind)

    # --- numbers ---------------------------------------------------------------------------------

    def _number(self, obj: Any, key: Any = None) -> None:
        number = len(self._numbers)
        self._numbers[id(obj) if key is None else key] = number
        self._kept.append(obj)
        for member in self._inside:
            self._member_of.setdefault(number, member)

    def _reference(self, number: int) -> bytes:
        member = self._member_of.get(number)
        if member is not None and member not in self._inside:
            raise NotSerializable(
                "",
                "set",
                "something refers to one of several members that cannot be told apart, so the "
                "state has no canonical form",
                "give the members something to tell them by, or keep them in a list",
            )
        return _token(b"r", number.to_bytes(8, "little"))

    def _take_back(self, numbers: int, kept: int) -> None:
        """Forget what a trial has numbered."""
        while len(self._numbers) > numbers:
            self._numbers.popitem()
            self._member_of.pop(len(self._numbers), None)
        # What it met is kept alive all the same; only tokens that may name its numbers go.
        for obj in self._kept[kept:]:
            self._known.pop(id(obj), None)

    # --- containers ------------------------------------------------------------------------------

    def _immutable(self, obj: Any, steps: _Steps) -> _Steps:
        before = len(self._numbers)
        token = yield from steps
        if len(self._numbers) == before:
            self._known[id(obj)] = token
            self._kept.append(obj)
        return token

    def _sequence(self, tag: bytes, items: Iterable[Any]) -> _Steps:
        tokens = []
        for item in list(items):
            tokens.append((yield item))
        return _joined(tag, tokens)

    def _dict(self, mapping: dict[Any, Any]) -> _Steps:
        tokens = []
        for key, value in list(mapping.items()):
            tokens.append((yield key))
            tokens.append((yield value))
        return _joined(b"d", tokens)

    def _set(self, tag: bytes, members: Iterable[Any]) -> _Steps:
        trials: list[tuple[bytes, bool, Any]] = []
        for member in list(members):
            numbers, kept = len(self._numbers), len(self._kept)
            token = yield member
            new = len(self._numbers) > numbers
            self._take_back(numbers, kept)
            trials.append((token, new, member))
        trials.sort(key=lambda trial: trial[0])
        tokens = []
        for index, (token, new, member) in enumerate(trials):
            if not new:
                tokens.append(token)
                continue
            alike = any(
                0 <= other < len(trials) and trials[other][0] == token
                for other in (index - 1, index + 1)
            )
            if alike:
                self._members += 1
                mark = self._members
                self._inside.add(mark)
                tokens.append((yield member))
                self._inside.discard(mark)
            else:
                tokens.append((yield member))
        return _joined(tag, tokens)

    # --- memory ----------------------------------------------------------------------------------

    def _array(self, array: Any) -> bytes | _Steps:
        owner = array
        while type(owner.base) is type(array):
            owner = owner.base
        if not (owner.flags.c_contiguous or owner.flags.f_contiguous) or owner.dtype.hasobject:
            return self._object(array, type(array))
        self._number(array)
        start = owner.__array_interface__["data"][0]
        key = ("memory", start, owner.nbytes)
        block = self._numbers.get(key) if owner.nbytes else None
        if block is None:
            self._number(owner, key)
            flat = owner.reshape(-1, order="A").view("u1") if owner.nbytes else owner
            memory = _joined(b"M", [blake2b(flat).digest()])
        else:
            memory = self._reference(block)
        dtype = array.dtype
        facts = (
            str(dtype.descr) if dtype.names else dtype.str,
            array.shape,
            array.strides if array.size else (),
            bool(array.flags.writeable),
            array.__array_interface__["data"][0] - start if array.size else 0,
            owner.nbytes,
        )
        return _joined(b"A", [memory, _token(b"s", repr(facts).encode())])

    # --- everything else -------------------------------------------------------------------------

    def _object(self, obj: Any, kind: Any) -> bytes | _Steps:
        reduced = self._reduce(obj)
        if reduced is NotImplemented:
            if kind is types.FunctionType or issubclass(kind, type):
                return _token(b"g", f"{obj.__module__}:{obj.__qualname__}".encode())
            special = copyreg.dispatch_table.get(kind)
            reduced = special(obj) if special is not None else obj.__reduce_ex__(5)
        if isinstance(reduced, str):
            return _token(b"g", f"{getattr(obj, '__module__', '')}:{reduced}".encode())
        if not isinstance(reduced, tuple) or not 2 <= len(reduced) <= 6:
            raise pickle.PicklingError("its __reduce__ must return a string or 2 to 6 items")
        self._kept.append(reduced)
        if kind in _VALUES or isinstance(obj, Enum):
            return self._immutable(obj, self._reduction(reduced))
        self._number(obj)
        if isinstance(obj, type):
            return self._class(obj, reduced)
        if isinstance(obj, set | frozenset | weakref.WeakSet):
            return self._kind_of_set(obj, reduced)
        if kind is types.FunctionType:
            return self._function(reduced)
        return self._reduction(reduced)

    def _reduction(self, reduced: tuple[Any, ...]) -> _Steps:
        function, args, state, items, pairs, setter = reduced + (None,) * (6 - len(reduced))
        tokens = [(yield function), (yield args), (yield state), (yield setter)]
        for item in items or ():
            tokens.append((yield item))
        tokens.append(b"|")
        for key, value in pairs or ():
            tokens.append((yield key))
            tokens.append((yield value))
        return _joined(b"O", tokens)

    def _kind_of_set(self, obj: Any, reduced: tuple[Any, ...]) -> _Steps:
        # Its reduction has the members in a list, in the order of their hashes.
        tokens = [(yield type(obj))]
        if reduced[0] is type(obj):
            tokens.append((yield reduced[2] if len(reduced) > 2 else None))
        tokens.append((yield from self._set(b"<", obj)))
        return _joined(b"S", tokens)

    def _function(self, reduced: tuple[Any, ...]) -> _Steps:
        """A function that travels by value, without what its process has imported besides."""
        function, args, state, *_ = reduced
        tokens = [(yield function), (yield args)]
        for name, value in state.items():
            if name != "submodules":
                tokens.append((yield name))
                tokens.append((yield value))
        return _joined(b"F", tokens)

    def _class(self, cls: type, reduced: tuple[Any, ...]) -> _Steps:
        """A class that travels by value: without the id it has among the processes that met it.

        The order of its attributes is that in which they were set, which loading changes.
        """
        function, args, *rest = reduced
        tracker = machinery._DYNAMIC_CLASS_TRACKER_BY_CLASS.get(cls)
        tokens = [(yield function)]
        for arg in args:
            if not (isinstance(arg, str) and arg == tracker):
                tokens.append((yield arg))
        state = rest[0] if rest and isinstance(rest[0], dict) else {}
        for part, content in sorted(state.items()):
            if isinstance(content, str) and content == tracker:
                continue
            tokens.append((yield part))
            if part == "attributes":
                for name in sorted(content.keys() - _NOT_OF_THE_STATE):
                    if not getattr(type(content[name]), "__cached_facts__", False):
                        tokens.append((yield name))
                        tokens.append((yield content[name]))
            elif part == "registry":
                tokens.append((yield from self._set(b"<", content)))
            else:
                tokens.append((yield content))
        return _joined(b"C", tokens)


def digest_of(root: Any, reduce: _Reduce) -> str:
    """Digest `root` as a pickler walks it whose `reducer_override` is `reduce`.

    Raises:
        NotSerializable: Something cannot be digested; names the path to it.
    """
    from .explain import explain_dump, path_to

    digester = _Digester(reduce)
    try:
        with comparing():
            token = digester.run(root)
    except MemoryError:
        raise
    except NotSerializable as exc:
        path = path_to(root, digester.current, reduce)
        raise NotSerializable(path, exc.type_name, exc.reason, exc.remedy) from exc
    except Exception as exc:
        raise explain_dump(root, exc, reduce) from exc
    return blake2b(b"livemigrate state 1|" + token, digest_size=DIGEST_BYTES).hexdigest()
