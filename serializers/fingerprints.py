"""What plain records consist of, by identity: to tell without pickling which of them changed.

A *record* is one value of a large dict or list. It is *plain* if it is made of immutable values,
built-in containers, and instances of classes that leave pickling to Python and that can be
imported. Such a record changes only in that something in it becomes another object, or that an
attribute or item comes or goes; so it is as it was if each object in it still refers to the same
objects, in the same order. `Fingerprint` takes down these references for a range of records, level
by level (all records, then all that they hold, ...), as arrays of addresses; comparing them again
runs in C throughout and costs a fraction of pickling. Dicts, and instances by their `__dict__`,
that hold immutable values alone are not even looked into, if their `versions` are as they were.

Why equal addresses mean equal values. Immutable values are held by the fingerprint, so their
addresses cannot be given to others. Containers and instances are not held, lest they outlive their
last user; if one has gone and another one sits at its address, then at all places that referred to
it, and in the same type with the same contents: there is no difference to be seen from within.

Not safe against changes while it runs: call it where no other thread changes the records.
"""

from __future__ import annotations

import copyreg
import ctypes
import datetime
import decimal
import enum
import fractions
import inspect
import operator
import pathlib
import sys
import types
import uuid
import zoneinfo
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate, chain, compress, repeat
from typing import Any, Final, Protocol

from .auto import leaves_to_pickle
from .by_value import is_importable
from .versions import Versions, patched, picked, versions_of

LEVELS_MAX: Final = 24
"""Deepest nesting within a record; beyond, records are not plain."""
NODES_MAX: Final = 200
"""Most different places (by path and type) within the records of one range."""

ATOMS: Final[set[type]] = {
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    range,
    type(None),
    type(...),
    type(NotImplemented),
    datetime.date,
    datetime.datetime,
    datetime.time,
    datetime.timedelta,
    datetime.timezone,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    pathlib.PurePosixPath,
    pathlib.PosixPath,
}
"""Types of immutable values, which plain pickle takes and whose identity means nothing."""

_SEQUENCES: Final = (list, tuple, set, frozenset)
_IMMUTABLE: Final = (tuple, frozenset)
_ATOM_SIZE_MAX: Final = 1024
"""Longer strings (and integers of more bits) are no atoms: one that many records share would travel
once with each range."""

_POINTER_BYTES: Final = ctypes.sizeof(ctypes.c_void_p)
_ITEMS_OFFSET: Final = tuple.__basicsize__


def _read_addresses(items: tuple[Any, ...]) -> bytes:
    return ctypes.string_at(id(items) + _ITEMS_OFFSET, _POINTER_BYTES * len(items))


def _ask_addresses(items: tuple[Any, ...]) -> bytes:
    return b"".join([id(item).to_bytes(8, sys.byteorder) for item in items])


def _can_be_read() -> bool:
    """Whether a tuple's items lie where CPython keeps them, right after its fixed part."""
    if sys.implementation.name != "cpython" or sys.byteorder != "little" or _POINTER_BYTES != 8:
        return False
    sample: tuple[Any, ...] = (object(), 1, "two", None)
    return _read_addresses(sample) == _ask_addresses(sample)


_reads_addresses: Final = _can_be_read()
addresses: Final[Callable[[tuple[Any, ...]], bytes]] = (
    _read_addresses if _reads_addresses else _ask_addresses
)
"""The addresses of a tuple's items, 8 bytes each: what `id` gives, without an object for each."""


def _compare_copies(items: tuple[Any, ...], where: bytes) -> bool:
    return addresses(items) == where


def _compare_in_place(items: tuple[Any, ...], where: bytes) -> bool:
    size = len(where)
    return _POINTER_BYTES * len(items) == size and not _memcmp(
        id(items) + _ITEMS_OFFSET, where, size
    )


if _reads_addresses:
    _memcmp = ctypes.PyDLL(None).memcmp  # Keeps the interpreter's lock, for it takes microseconds.
    _memcmp.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
are_at: Final[Callable[[tuple[Any, ...], bytes], bool]] = (
    _compare_in_place if _reads_addresses else _compare_copies
)
"""Whether the items of a tuple have these addresses."""


class NotPlain(Exception):
    """Something in the records is not plain; they have to be pickled to know what they are."""


_ATOM, _PLAIN, _OTHER = range(3)
_verdicts: dict[type, int] = {}
generation = 0
"""Rises when a class is found not to be any more what it was taken for."""
_HEAP_TYPE: Final = 1 << 9
"""`Py_TPFLAGS_HEAPTYPE`. Source: CPython's Include/object.h."""

_OWN_WAYS: Final = (
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__setstate__",
    "__getnewargs__",
    "__getnewargs_ex__",
    "__new__",
    "__getattribute__",
    "__getattr__",
    "__del__",
    "__class__",
)
"""What a class may define that makes it more than its `__dict__`, or that must not run for the
copies of its instances that only pass through."""


def look_again() -> int:
    """Look anew at all classes that were met, in case one was patched or something registered.

    Returns:
        `generation`. If it has risen, what was written or noted before may be of another form.
    """
    global generation
    for kind, verdict in list(_verdicts.items()):
        if verdict == _OTHER:
            del _verdicts[kind]
        elif _look_at(kind) != verdict:
            del _verdicts[kind]
            generation += 1
    return generation


def _verdict(kind: type) -> int:
    known = _verdicts.get(kind)
    if known is None:
        known = _verdicts[kind] = _look_at(kind)
    return known


def _look_at(kind: type) -> int:
    if kind in _UNASKED:
        return _ATOM
    if kind in copyreg.dispatch_table and kind is not complex:
        return _OTHER
    if kind in ATOMS:
        return _ATOM if leaves_to_pickle(kind) else _OTHER
    if isinstance(kind, enum.EnumMeta):
        # Members are singletons, which pickle looks up, unless they say something else.
        return _ATOM if _is_plain_enumeration(kind) else _OTHER
    return _PLAIN if _is_plain_class(kind) else _OTHER


def _is_plain_enumeration(kind: enum.EnumMeta) -> bool:
    """Whether pickle finds each member again by its value, which is all that it writes of it."""
    if getattr(kind.__reduce_ex__, "__module__", None) != enum.__name__ or not is_importable(kind):
        return False
    members: list[Any] = list(kind.__members__.values())
    try:
        return all(
            type(member._value_) in _UNASKED and kind(member._value_) is member
            for member in members
        )
    except (ValueError, TypeError):
        return False


_UNASKED: Final = {int, float, bool, str, bytes, type(None), type(...), type(NotImplemented)}
"""Types that pickle writes by itself, whatever was registered for them."""


def _is_plain_class(kind: type) -> bool:
    """Whether instances are nothing but their `__dict__` or slots, and are pickled as such."""
    if type(kind) is not type or kind.__itemsize__:
        return False
    for base in kind.__mro__[:-1]:
        own = vars(base)
        if any(name in own for name in _OWN_WAYS) or not base.__flags__ & _HEAP_TYPE:
            return False
        given = own.get("__dict__")
        if given is not None and type(given) is not types.GetSetDescriptorType:
            return False
    slots = _slots_of(kind)
    if bool(slots) is bool(kind.__dictoffset__):
        return False  # Both, or nothing to compare.
    if any(inspect.getattr_static(kind, slot.__name__, None) is not slot for slot in slots):
        return False  # Pickle reads it by its name, which something else has in a subclass.
    return leaves_to_pickle(kind)


def _slots_of(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    """The slots of a class and its bases; where two have the same name, both."""
    return tuple(
        member
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if type(member) is types.MemberDescriptorType
    )


def _is_atom(kind: type) -> bool:
    return _verdict(kind) == _ATOM


_dict_of = operator.attrgetter("__dict__")


class _Flat:
    """The objects that all objects of a node refer to, in one row.

    Attributes:
        where: Their addresses.
        held: Those that are immutable values; they stay alive, so that their addresses stay theirs.
        more: The same, of those that came later in the place of others.
        children: The other ones, by type: which of the row they are (None: all), and their node.
    """

    __slots__ = ("children", "held", "more", "where")

    def __init__(self, items: tuple[Any, ...]) -> None:
        self.where = addresses(items)
        self.held: tuple[Any, ...] = ()
        # NB: apart from the many, which the collector then need not go through again.
        self.more: list[Any] = []
        self.children: list[tuple[bytes | None, _Node]] = []

    def replace(self, places: list[int], items: tuple[Any, ...]) -> bool:
        """Have other immutable values in some places; False if too much is held by now."""
        if _POINTER_BYTES * len(self.more) > len(self.where):
            return False  # Most of it has been replaced in its turn.
        self.where = patched(self.where, places, addresses(items))
        self.more += items
        return True


class _Node:
    """All objects of one type at one place in the records of a range, in the records' order.

    Attributes:
        kind: Their type.
        owners: For each the number of its record.
        where: Their addresses.
        dicts: Of instances the addresses of their `__dict__`.
        sizes: For each how many items it has.
        ends: `sizes`, added up.
        flats: Their items; of dicts and instances the keys, then the values; or slot by slot.
        versions: Of dicts and instances that hold immutable values alone, if they can be had.
    """

    __slots__ = ("dicts", "ends", "flats", "kind", "owners", "sizes", "versions", "where")

    def __init__(self, kind: type, owners: Sequence[int], objects: tuple[Any, ...]) -> None:
        self.kind = kind
        self.owners = owners
        self.where = addresses(objects)
        self.dicts = b""
        self.sizes: tuple[int, ...] = ()
        self.ends = array("Q")
        self.flats: list[_Flat] = []
        self.versions: Versions | None = None


def _dicts_of(kind: type, objects: tuple[Any, ...]) -> tuple[Any, ...]:
    """What holds the items of each object: itself, or the `__dict__` of an instance."""
    if kind is dict or kind in _SEQUENCES or not kind.__dictoffset__:
        return objects
    return tuple(map(_dict_of, objects))


def _rows(kind: type, holders: tuple[Any, ...]) -> tuple[tuple[int, ...], list[tuple[Any, ...]]]:
    """How many items each holder has, and all items in one row.

    Keys and values are in two; of objects with slots each slot has a row of its own.
    """
    if kind is not dict and kind not in _SEQUENCES and not kind.__dictoffset__:
        return (1,) * len(holders), [_slot(member, holders) for member in _slots_of(kind)]
    sizes = tuple(map(len, holders))
    if kind in _SEQUENCES:
        return sizes, [tuple(chain.from_iterable(holders))]
    return sizes, [
        tuple(chain.from_iterable(holders)),
        tuple(chain.from_iterable(map(dict.values, holders))),
    ]


def _slot(member: types.MemberDescriptorType, objects: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        return tuple(map(member.__get__, objects))
    except AttributeError:
        return tuple([_get(member, obj) for obj in objects])


def _get(member: types.MemberDescriptorType, obj: Any) -> Any:
    try:
        return member.__get__(obj)
    except AttributeError:
        return _UNSET


class _Unset:
    """Stands for a slot without a value. It is of no plain type, so a record with it is not."""


_UNSET: Final = _Unset()


class Changes:
    """What a comparison found.

    Attributes:
        records: Numbers of the records that are not what they were, ascending.
        is_shallow: Nothing but immutable values were replaced by others, in their places; so what
            belongs to whom is as it was.
    """

    __slots__ = ("_found", "_rows", "_versions", "is_shallow", "records")

    def __init__(self) -> None:
        self.records: list[int] = []
        self.is_shallow = True
        self._found: set[int] = set()
        # Rows in which immutable values were replaced, where, and by what.
        self._rows: list[tuple[_Flat, list[int], tuple[Any, ...]]] = []
        # Where versions have changed, and to what.
        self._versions: list[tuple[Versions, list[int], bytes]] = []

    def add(self, others: Changes, numbers: Sequence[int]) -> None:
        """Have all changes of other records as well, whose numbers here are given."""
        self.records = sorted([*self.records, *map(numbers.__getitem__, others.records)])
        self.is_shallow = self.is_shallow and others.is_shallow
        self._rows += others._rows
        self._versions += others._versions

    def _replaced(self, flat: _Flat, places: list[int], items: tuple[Any, ...]) -> None:
        """Note what stands in some places of a row, instead of what stood there."""
        if not self.is_shallow:
            return
        for at, item in zip(places, items, strict=True):
            was_atom = all(mask is not None and not mask[at] for mask, _ in flat.children)
            if not was_atom or not _is_atom(type(item)):
                self.is_shallow = False
                return
        self._rows.append((flat, places, items))

    def equals(self, other: Changes) -> bool:
        """Whether two shallow changes of a fingerprint lead to the same."""
        if not self.is_shallow or self.records != other.records:
            return False
        return len(self._rows) == len(other._rows) and all(
            mine[:2] == theirs[:2] and are_at(mine[2], addresses(theirs[2]))
            for mine, theirs in zip(self._rows, other._rows, strict=True)
        )

    def check(self) -> None:
        """Look at the new values of a shallow change.

        Raises:
            NotPlain: They are not plain.
        """
        for _, _, items in self._rows:
            _check_atoms(items, set(map(type, items)))

    def apply(self) -> bool:
        """Let the fingerprint be that of the records as they are now, if the change is shallow.

        Returns:
            False if it has to be taken anew.

        Raises:
            NotPlain: The new values are not.
        """
        if not self.is_shallow:
            return False
        self.check()
        for versions, places, now in self._versions:
            versions.settle(places, now)
        return all([flat.replace(places, items) for flat, places, items in self._rows])


class Held(Protocol):
    """Records that somebody else has."""

    def value(self, number: int) -> Any: ...
    def values(self) -> tuple[Any, ...]: ...


class Fingerprint:
    """The references within a range of plain records; see the module.

    Attributes:
        count: Number of records.
        left_out: Numbers of those that do not count (any more), whatever they are.
    """

    __slots__ = ("_nodes", "_root", "_seen", "count", "left_out")

    def __init__(self, records: tuple[Any, ...]) -> None:
        """Take down what the records refer to.

        Raises:
            NotPlain: Some are not, or share with one another what can change.
        """
        self.count = len(records)
        self.left_out: set[int] = set()
        self._nodes: list[_Node] = []
        self._seen: set[int] = set()
        self._root = _Flat(records)
        self._descend(self._root, records, range(len(records)), 0)
        del self._seen

    def _descend(
        self, flat: _Flat, items: tuple[Any, ...], owners: Sequence[int], level: int
    ) -> None:
        row = tuple(map(type, items))
        kinds = set(row)
        atoms = {kind for kind in kinds if _is_atom(kind)}
        if atoms == kinds:
            _check_atoms(items, kinds)
            flat.held = items
            return
        if level >= LEVELS_MAX:
            raise NotPlain("nested too deep")
        if atoms:
            flat.held = tuple(item for item, kind in zip(items, row, strict=True) if kind in atoms)
            _check_atoms(flat.held, atoms)
        # In the order in which they come up, the same in each process.
        for kind in dict.fromkeys(row):
            if kind in atoms:
                continue
            if kind is not dict and kind not in _SEQUENCES and _verdict(kind) != _PLAIN:
                raise NotPlain(f"a {kind.__module__}.{kind.__qualname__}")
            mask: bytes | None = None
            objects = items
            whose = owners
            if len(kinds) > 1:
                mask = bytes(map(operator.is_, row, repeat(kind)))
                objects = tuple(compress(items, mask))
                whose = tuple(compress(owners, mask))
            flat.children.append((mask, self._node(kind, objects, whose, level)))

    def _node(
        self, kind: type, objects: tuple[Any, ...], owners: Sequence[int], level: int
    ) -> _Node:
        if len(self._nodes) >= NODES_MAX:
            raise NotPlain("records of too many shapes")
        node = _Node(kind, owners, objects)
        self._nodes.append(node)
        if kind not in _IMMUTABLE:
            self._see(objects)
        holders = _dicts_of(kind, objects)
        if holders is not objects:
            self._see(holders)
            if set(map(type, holders)) != {dict}:
                raise NotPlain("an instance whose __dict__ is no dict")
            node.dicts = addresses(holders)
        node.sizes, rows = _rows(kind, holders)
        node.ends = array("Q", accumulate(node.sizes))
        for items in rows:
            below = _Flat(items)
            node.flats.append(below)
            whose: Sequence[int] = ()
            if not set(map(type, items)) <= ATOMS:
                whose = tuple(chain.from_iterable(map(repeat, owners, node.sizes)))
            self._descend(below, items, whose, level + 1)
        if (kind is dict or node.dicts) and not any([flat.children for flat in node.flats]):
            node.versions = versions_of(holders)
        return node

    def _see(self, objects: tuple[Any, ...]) -> None:
        ids = set(map(id, objects))
        if len(ids) != len(objects) or not self._seen.isdisjoint(ids):
            raise NotPlain("records that share what can change")
        self._seen |= ids

    def owned(self, changed: Sequence[int] | None = None) -> list[tuple[int, int]]:
        """(id, number of its record) of each object that can change.

        Args:
            changed: Of these records only; of all by default, but for those left out.
        """
        found: list[tuple[int, int]] = []
        if changed is None and self.left_out:
            changed = [record for record in range(self.count) if record not in self.left_out]
        for node in self._nodes:
            if node.kind in _IMMUTABLE:
                continue
            for where in filter(None, (node.where, node.dicts)):
                ids = memoryview(where).cast("Q")
                if changed is None:
                    found += zip(ids, node.owners, strict=True)
                    continue
                for record in changed:
                    start = bisect_left(node.owners, record)
                    end = bisect_right(node.owners, record, start)
                    found += zip(ids[start:end], repeat(record))
        return found

    def references(self, others: Collection[int]) -> int:
        """How many objects the records and what they have refer to: each takes a byte or more.

        What is in tuples is not counted, for many may have one of them.

        Args:
            others: Numbers of records that do not count.
        """
        found = self.count - len(others)
        for node in self._nodes:
            if node.kind in _IMMUTABLE or not node.ends:
                continue
            items = node.ends[-1]
            for record in others:
                start = bisect_left(node.owners, record)
                items -= sum(node.sizes[start : bisect_right(node.owners, record, start)])
            found += items * len(node.flats)
        return found

    def atoms(self) -> tuple[Any, ...] | None:
        """The records as they were taken down, if they are immutable values; else None."""
        root = self._root
        return None if root.children or root.more else root.held

    def changed(self, records: tuple[Any, ...]) -> list[int]:
        """Numbers of the records that are not what they were, ascending; see `compare`."""
        return self.compare(records).records

    def compare(self, records: tuple[Any, ...]) -> Changes:
        """Find out which records are not what they were.

        Args:
            records: As many as there were.
        """
        changes = Changes()
        if not are_at(records, self._root.where):
            places = self._places(self._root, records, range(self.count))
            changes._found.update(places)
            changes._replaced(self._root, places, tuple([records[at] for at in places]))
        self._compare_below(self._root, records, changes)
        changes.records = sorted(changes._found - self.left_out)
        return changes

    def compare_held(self, held: Held) -> Changes:
        """As `compare`, of the very records that there were, each in its place and never away.

        Args:
            held: The records.
        """
        changes = Changes()
        for mask, node in self._root.children:
            versions = node.versions
            if versions is not None and node.kind is dict:
                # They are alive, so nothing else can lie where they do.
                now = versions.look()
                if now == versions.seen:
                    continue
                unlike = _differences(versions.seen, now)
                if len(unlike) * _LOOK_SHARE <= len(node.owners):
                    dicts = {at: held.value(node.owners[at]) for at in unlike}
                    self._look_into(node, dicts, unlike, now, changes)
                    continue
            items = held.values()
            objects = items if mask is None else tuple(compress(items, mask))
            self._compare(node, objects, changes)
        changes.records = sorted(changes._found - self.left_out)
        return changes

    def _compare_below(self, flat: _Flat, items: tuple[Any, ...], changes: Changes) -> None:
        """Compare what the objects of a row refer to.

        Args:
            flat: The row as it was.
            items: The row as it is, the same but for those of records found before, in whose place
                may be anything.
            changes: Grows.
        """
        for mask, node in flat.children:
            objects = items if mask is None else tuple(compress(items, mask))
            self._compare(node, objects, changes)

    def _compare(self, node: _Node, objects: tuple[Any, ...], changes: Changes) -> None:
        kind, owners, found = node.kind, node.owners, changes._found
        left_out = self.left_out
        if set(map(type, objects)) - {kind}:
            # Those of records that are known to have changed, or an address that was used again.
            patched = list(objects)
            for at, obj in enumerate(objects):
                if type(obj) is not kind:
                    found.add(owners[at])
                    changes.is_shallow &= owners[at] in left_out
                    patched[at] = _stand_in(kind)
            objects = tuple(patched)
        holders = _dicts_of(kind, objects)
        if holders is not objects:
            if set(map(type, holders)) - {dict}:
                odd = {owners[at] for at, held in enumerate(holders) if type(held) is not dict}
                changes.is_shallow &= odd <= left_out
                found |= odd
            if not are_at(holders, node.dicts):
                elsewhere = _differences(node.dicts, addresses(holders))
                moved = {owners[at] for at in elsewhere}
                changes.is_shallow &= moved <= left_out
                found |= moved
        unlike: list[int] = []
        versions, now = node.versions, b""
        if versions is not None:
            is_here = are_at(holders, node.dicts or node.where)
            now = versions.look() if is_here else versions.look_at(holders)
            if now == versions.seen:
                return
            unlike = _differences(versions.seen, now)
            if len(unlike) * _LOOK_SHARE <= len(holders):
                self._look_into(node, holders, unlike, now, changes)
                return
        sizes, rows = _rows(kind, holders)
        if sizes != node.sizes:
            rows, resized = self._align(node, sizes, rows)
            changes.is_shallow &= resized <= left_out
            found |= resized
        for flat, items in zip(node.flats, rows, strict=True):
            if not are_at(items, flat.where):
                ends = node.ends
                places = self._places(flat, items, owners, ends)
                found.update([owners[bisect_right(ends, at)] for at in places])
                changes._replaced(flat, places, tuple([items[at] for at in places]))
        if versions is not None:
            changed = [at for at in unlike if owners[at] in found and owners[at] not in left_out]
            changes._versions.append((versions, changed, picked(now, changed)))
            same = sorted(set(unlike) - set(changed))
            versions.settle(same, picked(now, same))
        for flat, items in zip(node.flats, rows, strict=True):
            if flat.children:
                self._compare_below(flat, items, changes)

    def _look_into(
        self,
        node: _Node,
        holders: Mapping[int, Any] | tuple[Any, ...],
        numbers: list[int],
        now: bytes,
        changes: Changes,
    ) -> None:
        """Compare what some dicts hold, all of it immutable values as it was.

        Args:
            node: Whose they are.
            holders: Its dicts as they are, by number; others in the place of those of records that
                were found before.
            numbers: Which to compare.
            now: The versions of all.
            changes: Grows.
        """
        versions = node.versions
        assert versions is not None
        same: list[int] = []
        changed: list[int] = []
        for number in numbers:
            owner = node.owners[number]
            if owner in self.left_out:
                same.append(number)  # It is not to be found again and again.
                continue
            held = holders[number]
            end = node.ends[number]
            start = end - node.sizes[number]
            if len(held) != end - start:
                changes._found.add(owner)
                changes.is_shallow = False
                continue
            is_same = True
            for flat, items in zip(node.flats, (tuple(held), tuple(held.values())), strict=True):
                before = flat.where[start * _POINTER_BYTES : end * _POINTER_BYTES]
                if not are_at(items, before):
                    is_same = False
                    places = _differences(before, addresses(items))
                    new = tuple([items[at] for at in places])
                    changes._replaced(flat, [start + at for at in places], new)
            if is_same:
                same.append(number)  # It was changed, and changed back.
            else:
                changed.append(number)
                changes._found.add(owner)
        if same:
            versions.settle(same, picked(now, same))
        if changed:
            changes._versions.append((versions, changed, picked(now, changed)))

    def _places(
        self,
        flat: _Flat,
        items: tuple[Any, ...],
        owners: Sequence[int],
        ends: Sequence[int] | None = None,
    ) -> list[int]:
        """Where the items of a row are not what they were, but for records that are left out."""
        now = addresses(items)
        places = _differences(flat.where, now)
        if not self.left_out:
            return places
        found: list[int] = []
        row: bytearray | None = None
        for at in places:
            if owners[at if ends is None else bisect_right(ends, at)] not in self.left_out:
                found.append(at)
                continue
            # It does not count, and is not to be found again and again.
            row = bytearray(flat.where) if row is None else row
            start = at * _POINTER_BYTES
            row[start : start + _POINTER_BYTES] = now[start : start + _POINTER_BYTES]
        if row is not None:
            flat.where = bytes(row)
        return found

    def _align(
        self,
        node: _Node,
        sizes: tuple[int, ...],
        rows: list[tuple[Any, ...]],
    ) -> tuple[list[tuple[Any, ...]], set[int]]:
        """Put items of objects that grew or shrank out of the way of the others; whose they are."""
        ends = list(accumulate(sizes))
        unequal = [at for at, (a, b) in enumerate(zip(node.sizes, sizes, strict=True)) if a != b]
        made = []
        for items in rows:
            aligned: list[Any] = []
            start = 0
            for at in unequal:
                aligned += items[start : ends[at] - sizes[at]]
                aligned += repeat(None, node.sizes[at])
                start = ends[at]
            aligned += items[start:]
            made.append(tuple(aligned))
        return made, {node.owners[at] for at in unequal}


def _check_atoms(items: tuple[Any, ...], kinds: set[type]) -> None:
    for kind in (str, bytes, int):
        if kind in kinds:
            only = items if len(kinds) == 1 else [item for item in items if type(item) is kind]
            size = int.bit_length if kind is int else len
            if max(map(size, only), default=0) > _ATOM_SIZE_MAX:
                raise NotPlain("large immutable values")
    if not kinds.isdisjoint(_ZONED):
        zones = {id(item.tzinfo): item.tzinfo for item in items if type(item) in _ZONED}
        if not all(map(_is_plain_zone, zones.values())):
            raise NotPlain("times in zones of their own kind")


_ZONED: Final = {datetime.datetime, datetime.time}


def _is_plain_zone(zone: datetime.tzinfo | None) -> bool:
    """Whether all pickles of a zone give the same object, or one of which it does not matter."""
    kind = type(zone)
    if kind is zoneinfo.ZoneInfo:
        named: Any = zone
        try:
            # Those that bypass the cache are as many objects as there are pickles of them.
            return named.key is not None and zoneinfo.ZoneInfo(named.key) is zone
        except (ValueError, OSError):  # There is no such zone any more.
            return False
    return zone is None or kind is datetime.timezone


_LOOK_SHARE: Final = 16
"""Dicts are looked into one by one if no more than one in so many has another version. Source:
measured, that takes about 2 us for one of four items, and 0.17 us for each if all are."""

_stand_ins: dict[type, Any] = {}


def _stand_in(kind: type) -> Any:
    """An empty object of a kind, in place of one that is of no interest any more."""
    built_in = kind is dict or kind in _SEQUENCES
    return _stand_ins.setdefault(kind, kind()) if built_in else object.__new__(kind)


_LEAF_BYTES: Final = 16 * _POINTER_BYTES


def _differences(before: bytes, now: bytes) -> list[int]:
    """Numbers of the addresses in which two rows of the same length differ, ascending."""
    found: list[int] = []
    pending = [(0, len(before))]
    while pending:
        start, end = pending.pop()
        if before[start:end] == now[start:end]:
            continue
        if end - start <= _LEAF_BYTES:
            for at in range(start, end, _POINTER_BYTES):
                if before[at : at + _POINTER_BYTES] != now[at : at + _POINTER_BYTES]:
                    found.append(at // _POINTER_BYTES)
            continue
        middle = (start + end) // 2 // _POINTER_BYTES * _POINTER_BYTES
        pending += ((middle, end), (start, middle))
    return found
