"""Private copies of arguments and results between servers of one node, as if they had travelled.

Whoever gets a value must not see what its giver writes later, and the other way round. Immutable
values pass as they are; builtin containers and arrays of numpy are copied here, with what they
share among themselves still shared; anything else takes the long way through `serializers`, which
also refuses what cannot travel, so that a call means the same wherever its server runs. Arguments
that go that way stay bytes until their handler begins.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import ipaddress
import pathlib
import re
import sys
import types
import uuid
from collections.abc import Callable
from sys import getsizeof
from typing import Any, Final, TypeAlias

import serializers
from migrate.ref import RefObject, Runtime
from migrate.shell.wire import PLAIN, unpack
from serializers.by_value import is_importable

Memo: TypeAlias = dict[int, Any]
Copier: TypeAlias = Callable[[Any, Memo, Runtime], Any]

IMMUTABLE: Final = PLAIN | {
    *(complex, range, type(...), type(NotImplemented), decimal.Decimal, fractions.Fraction),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.timezone, uuid.UUID, re.Pattern),
    *(pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath),
    *(ipaddress.IPv4Address, ipaddress.IPv6Address),
    *(ipaddress.IPv4Network, ipaddress.IPv6Network),
}
"""Types whose values nobody can change; only exactly these, since a subclass may have attributes.

A `datetime` may hold a time zone of the user's, so it is asked for that.
"""

_KINDS_MAX: Final = 10_000

_ITEMS_MAX: Final = 16
"""A container of more items that are not all immutable takes the long way, which is in C. Source:
measured, pickled and here: 1,000 dicts in a list 183 and 527 us, a list of three numbers 3.3 and
0.8 us, a dict of a list and a list 4.7 and 2.8 us, an array of 1 MiB 746 and 18 us.
"""


class _TakesTheLongWay(Exception):
    """There is something in a value that is not copied here."""


def isolate(value: Any, runtime: Runtime) -> Any:
    """A private copy of a value, as if it had travelled; immutable values as they are.

    Args:
        value: Whatever a call takes or returns.
        runtime: What refs in it are bound to.

    Raises:
        SerializerError: Something in it cannot travel.
    """
    if type(value) in IMMUTABLE:
        return value
    try:
        return _copy(value, {}, runtime)
    except (_TakesTheLongWay, RecursionError):
        return unpack(serializers.dumps(value), runtime)


def isolate_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], runtime: Runtime
) -> tuple[tuple[Any, ...], dict[str, Any]] | bytes:
    """Private copies of a call's arguments; see `isolate`. `kwargs` itself is the caller's gift.

    Returns:
        The copies, or where something takes the long way, the pickle of all of them.

    Raises:
        SerializerError: Something in them cannot travel.
    """
    memo: Memo = {}
    try:
        made = tuple(
            [item if type(item) in IMMUTABLE else _copy(item, memo, runtime) for item in args]
        )
        if kwargs and not IMMUTABLE.issuperset(map(type, kwargs.values())):
            kwargs = {key: _copy(item, memo, runtime) for key, item in kwargs.items()}
        return made, kwargs
    except (_TakesTheLongWay, RecursionError):
        return serializers.dumps((args, kwargs))


def size_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """About how many bytes isolated arguments take in memory.

    What the values of a container take counts with it, once; whatever else holds others (a frozen
    dataclass, say) counts without them, as it is small.
    """
    size = 0
    seen: set[int] = set()
    left: list[Any] = [*args, *kwargs.values()]
    while left:
        value = left.pop()
        if type(value) in IMMUTABLE:
            size += getsizeof(value)
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        # NB: an array that is a view of another one says nothing of what it shows.
        nbytes = getattr(value, "nbytes", 0)
        size += max(getsizeof(value), nbytes if type(nbytes) is int else 0)
        if isinstance(value, dict):
            left += value.keys()
            left += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            left += value
    return size


def _copy(value: Any, memo: Memo, runtime: Runtime) -> Any:
    kind = type(value)
    if kind in IMMUTABLE:
        return value
    copier = _copiers.get(kind)
    if copier is None:
        copier = _decide(kind)
    return copier(value, memo, runtime)


def _list(value: list[Any], memo: Memo, runtime: Runtime) -> list[Any]:
    found: list[Any] | None = memo.get(id(value))
    if found is not None:
        return found
    made = memo[id(value)] = value[:]
    if not IMMUTABLE.issuperset(map(type, made)):
        if len(made) > _ITEMS_MAX:
            raise _TakesTheLongWay
        for index, item in enumerate(value):
            if type(item) not in IMMUTABLE:
                made[index] = _copy(item, memo, runtime)
    return made


def _dict(value: dict[Any, Any], memo: Memo, runtime: Runtime) -> dict[Any, Any]:
    found: dict[Any, Any] | None = memo.get(id(value))
    if found is not None:
        return found
    if IMMUTABLE.issuperset(map(type, value)):
        made = memo[id(value)] = value.copy()
        if not IMMUTABLE.issuperset(map(type, value.values())):
            if len(made) > _ITEMS_MAX:
                raise _TakesTheLongWay
            for key, item in value.items():
                if type(item) not in IMMUTABLE:
                    made[key] = _copy(item, memo, runtime)
        return made
    if len(value) > _ITEMS_MAX:
        raise _TakesTheLongWay
    made = memo[id(value)] = {}
    for key, item in value.items():
        made[_copy(key, memo, runtime)] = _copy(item, memo, runtime)
    return made


def _tuple(value: tuple[Any, ...], memo: Memo, runtime: Runtime) -> tuple[Any, ...]:
    if IMMUTABLE.issuperset(map(type, value)):
        return value
    found: tuple[Any, ...] | None = memo.get(id(value))
    if found is not None:
        return found
    if len(value) > _ITEMS_MAX:
        raise _TakesTheLongWay
    made = tuple(_copy(item, memo, runtime) for item in value)
    if all(new is old for new, old in zip(made, value, strict=True)):
        made = value
    # A list within it may hold the tuple itself; then it was made there.
    return memo.setdefault(id(value), made)  # type: ignore[no-any-return]


def _set(value: set[Any], memo: Memo, runtime: Runtime) -> set[Any]:
    found: set[Any] | None = memo.get(id(value))
    if found is None:
        if IMMUTABLE.issuperset(map(type, value)):
            found = value.copy()
        elif len(value) > _ITEMS_MAX:
            raise _TakesTheLongWay
        else:
            found = {_copy(item, memo, runtime) for item in value}
        memo[id(value)] = found
    return found


def _same_inside(items: Any, memo: Memo, runtime: Runtime) -> None:
    for item in items:
        if _copy(item, memo, runtime) is not item:
            raise _TakesTheLongWay


def _frozenset(value: frozenset[Any], memo: Memo, runtime: Runtime) -> frozenset[Any]:
    _same_inside(value, memo, runtime)
    return value


def _datetime(value: datetime.datetime, memo: Memo, runtime: Runtime) -> datetime.datetime:
    if value.tzinfo is not None and type(value.tzinfo) is not datetime.timezone:
        raise _TakesTheLongWay
    return value


def _bytearray(value: bytearray, memo: Memo, runtime: Runtime) -> bytearray:
    found: bytearray | None = memo.get(id(value))
    if found is None:
        found = memo[id(value)] = bytearray(value)
    return found


def _array(value: Any, memo: Memo, runtime: Runtime) -> Any:
    found = memo.get(id(value))
    if found is None:
        if value.dtype.hasobject:
            raise _TakesTheLongWay
        found = value.copy(order="K")
        found.flags.writeable = value.flags.writeable
        memo[id(value)] = found
    return found


def _ref(value: RefObject, memo: Memo, runtime: Runtime) -> RefObject:
    return value._bound_to(runtime)


def _by_name(value: Any, memo: Memo, runtime: Runtime) -> Any:
    """A class or function: itself, if others would import it."""
    if not is_importable(value):
        raise _TakesTheLongWay
    return value


def _itself(value: Any, memo: Memo, runtime: Runtime) -> Any:
    return value


def _frozen(value: Any, memo: Memo, runtime: Runtime) -> Any:
    """An instance of a frozen dataclass: itself, if all that it holds is immutable."""
    held = getattr(value, "__dict__", None)
    if held is None or not held.keys() <= {field.name for field in dataclasses.fields(value)}:
        raise _TakesTheLongWay
    _same_inside(held.values(), memo, runtime)
    return value


def _long_way(value: Any, memo: Memo, runtime: Runtime) -> Any:
    raise _TakesTheLongWay


_copiers: Final[dict[type, Copier]] = {
    list: _list,
    dict: _dict,
    tuple: _tuple,
    set: _set,
    frozenset: _frozenset,
    bytearray: _bytearray,
    datetime.datetime: _datetime,
    RefObject: _ref,
    type: _by_name,
    types.FunctionType: _by_name,
}
_OWN_WAY: Final = (
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"),
    *("__getnewargs__", "__getnewargs_ex__"),
)
"""Methods by which a class says itself what travels."""


def _decide(kind: type) -> Copier:
    """How values of a type that was not met before are copied."""
    copier: Copier = _long_way
    numpy: Any = sys.modules.get("numpy")
    own_way = any(getattr(kind, name, None) is not getattr(object, name, None) for name in _OWN_WAY)
    if numpy is not None and kind is getattr(numpy, "ndarray", None):
        copier = _array
    elif numpy is not None and kind.__module__ == "numpy" and issubclass(kind, numpy.generic):
        if issubclass(kind, numpy.number | numpy.bool_ | numpy.datetime64 | numpy.timedelta64):
            copier = _itself
    elif issubclass(kind, enum.Enum) and is_importable(kind):
        copier = _itself
    elif (
        dataclasses.is_dataclass(kind)
        and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        and "__dataclass_params__" in vars(kind)
        and kind.__mro__[1:] == (object,)
        and not own_way
        and is_importable(kind)
    ):
        copier = _frozen
    if is_importable(kind) and len(_copiers) < _KINDS_MAX:
        _copiers[kind] = copier
    return copier
