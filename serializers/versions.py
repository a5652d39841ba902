"""Which dicts were changed, without a look into them: by the version that CPython gives each one.

Whatever changes a dict, be it by replacing a value with another object, gives it a number that no
dict of the process had before (PEP 509). It stands at a fixed place in the dict. Source: CPython's
Include/cpython/dictobject.h and Objects/dictobject.c, of 3.11 to 3.13; 3.14 has no such number.

To look at 1024 dicts takes 40 us; to compare the keys and values of as many, four of each, 170,
mostly since that touches each of these objects.
"""

from __future__ import annotations

import ctypes
import operator
import struct
import sys
from collections.abc import Callable
from typing import Any, Final

_WORD: Final = 8
_VERSION_OFFSET: Final = 3 * _WORD
_VALUES_OFFSET: Final = 5 * _WORD
_DICT_BYTES: Final = 6 * _WORD
_WORDS: Final = 1 << 57


def _words_from(offset: int) -> memoryview[int]:
    """All memory as words: item n is the one at `offset` + 8 n. NB: not all of it is there."""
    every = (ctypes.c_uint64 * _WORDS).from_address(offset)
    return memoryview(every).cast("B").cast("Q")


def _ask(dicts: tuple[dict[Any, Any], ...]) -> Callable[[memoryview[int]], tuple[int, ...]]:
    """Gives a word of each of the dicts, of which there are two at least."""
    ask: Any = operator.itemgetter(*[id(held) // _WORD for held in dicts])
    return ask  # type: ignore[no-any-return]


class Versions:
    """The versions of some dicts, which must be alive, and where they are, at each look.

    Attributes:
        seen: What they were when somebody last looked into the dicts, 8 bytes each.
    """

    __slots__ = ("_ask", "_pack", "seen")

    def __init__(self, dicts: tuple[dict[Any, Any], ...]) -> None:
        self._ask = _ask(dicts)
        self._pack = struct.Struct(f"{len(dicts)}Q").pack
        self.seen = self.look()

    def look(self) -> bytes:
        """The versions that they have now."""
        return self._pack(*self._ask(_versions))

    def look_at(self, dicts: tuple[dict[Any, Any], ...]) -> bytes:
        """The versions of as many other dicts."""
        return self._pack(*_ask(dicts)(_versions))

    def settle(self, places: list[int], versions: bytes) -> None:
        """Somebody looked into some of the dicts when they had these versions."""
        self.seen = patched(self.seen, places, versions)


def patched(row: bytes, places: list[int], words: bytes) -> bytes:
    """A row of words with others in some places."""
    made = bytearray(row)
    for at, place in enumerate(places):
        made[place * _WORD : (place + 1) * _WORD] = words[at * _WORD : (at + 1) * _WORD]
    return bytes(made)


def picked(row: bytes, places: list[int]) -> bytes:
    """The words in some places of a row."""
    return b"".join([row[place * _WORD : (place + 1) * _WORD] for place in places])


def versions_of(dicts: tuple[dict[Any, Any], ...]) -> Versions | None:
    """The versions of dicts, of that very type; None if they do not tell of each change."""
    if not are_known or len(dicts) < _DICTS_MIN:
        return None
    if sys.version_info >= (3, 13) and any(_ask(dicts)(_values)):
        return None  # What is stored in an instance is not counted in a `__dict__` that shares it.
    return Versions(dicts)


def version_of(held: object) -> int:
    """The version of a dict; 0 of anything else, or if it does not tell of each change."""
    if not are_known or type(held) is not dict:
        return 0
    if sys.version_info >= (3, 13) and _values[id(held) // _WORD]:
        return 0
    return _version(held)


_DICTS_MIN: Final = 2
"""Of one dict alone `operator.itemgetter` does not give a tuple."""


def _can_be_read() -> bool:
    """Whether a dict's version stands where it is looked for."""
    return (
        sys.implementation.name == "cpython"
        and (3, 11) <= sys.version_info < (3, 14)
        and dict.__basicsize__ == _DICT_BYTES
        and ctypes.sizeof(ctypes.c_void_p) == _WORD
    )


def _tell_changes() -> bool:
    """Whether versions change with their dicts, and only then: tried out."""
    held: dict[Any, Any] = {"a": 1, "b": 2}
    changes: tuple[Callable[[], object], ...] = (
        lambda: held.__setitem__("a", True),
        lambda: held.__setitem__("c", 3),
        lambda: held.__delitem__("b"),
        lambda: held.update(a=4),
        lambda: held.pop("a"),
        lambda: held.setdefault("d", 5),
        lambda: held.popitem(),
        lambda: held.clear(),
        lambda: held.update({"a": 6, "b": 7}),
        lambda: held.__ior__({8: 9}),
        lambda: held.__init__(a=10),  # type: ignore[misc]
    )
    seen = [_version(dict(held)), _version(held)]
    for change in changes:
        change()
        seen.append(_version(held))
    held["a"] = held["a"]
    repr(held), list(held.items()), held.get("none"), held == dict(held)
    return len(set(seen)) == len(seen) and _version(held) == seen[-1]


def _version(held: dict[Any, Any]) -> int:
    return _versions[id(held) // _WORD]


_nothing: Final = memoryview(bytes(_WORD)).cast("Q")
_versions: Final = _words_from(_VERSION_OFFSET) if _can_be_read() else _nothing
_values: Final = _words_from(_VALUES_OFFSET) if _can_be_read() else _nothing
are_known: Final = _can_be_read() and _tell_changes()
"""Whether `versions_of` can give any."""
