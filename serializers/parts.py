"""Large dicts and lists in parts: what of them changed since it was last written, and nothing else.

A *cut* container is written as ranges of its items, each a pickle of its own, which its reader
loads apart. The writer keeps a `Fingerprint` of each part, so that it can tell without pickling
which records changed since; those alone are written again, by their position in the part. What
lies between parts may grow, shrink and move: parts are found again by the identity of their keys
(in a list: of their items).

Identity. What can change belongs to one record. If it does not (two records share a list;
something outside refers to what is inside a record), the container cannot be cut, and is pickled
with all else. A record itself may be referred to from outside: it is named by its place.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final

from .fingerprints import Changes, Fingerprint, NotPlain, addresses, are_at
from .sink import PROTOCOL

CUT_ITEMS_MIN: Final = 1024
"""Containers with fewer items are pickled with all else, which takes about 0.3 ms."""
PART_BYTES: Final = 48 * 1024
"""What a part's pickle should take: some hundred records, hence 1 to 3 ms to look at and write."""
PART_ITEMS_FIRST: Final = 256
PART_ITEMS_MAX: Final = 8192
RIVALS_MAX: Final = 3
"""Times that two parts may claim one object before it is taken to be shared for good."""
HOT_SHARE: Final = 4
"""A container of which more than one in so many records changed between two rounds is pickled
whole. Source: measured, noting what a record refers to takes 2 to 3 times its pickle."""
_WORD: Final = 8

Cuttable = dict[Any, Any] | list[Any]


class Part:
    """One range of a cut container's items.

    Attributes:
        cut: Whose.
        number: Its name on the wire, used once in a container.
        count: How many items it has.
        anchors: Addresses of its keys (in a list, of its items) as they were last written.
        keys: Fingerprint of its keys then; None in a list.
        values: Fingerprint of its values then; None if they were not written, or not as they are.
    """

    __slots__ = ("anchors", "count", "cut", "keys", "number", "values")

    def __init__(self, cut: Cut, number: int, count: int) -> None:
        self.cut = cut
        self.number = number
        self.count = count
        self.anchors = b""
        self.keys: Fingerprint | None = None
        self.values: Fingerprint | None = None


class Change:
    """What of one part is to be written.

    Attributes:
        part: Which.
        data: Pickle of all its items as a dict or list; None if only `records` changed.
        records: Values that changed, by position.
    """

    __slots__ = ("data", "part", "records")

    def __init__(self, part: Part, data: bytes | None, records: dict[int, Any]) -> None:
        self.part = part
        self.data = data
        self.records = records


class Cut:
    """One cut container at its writer.

    Attributes:
        number: Its name on the wire.
        container: The live dict or list.
        parts: Its parts, in order.
        has_moved: The reader has not been told the present order of the parts.

    Raises:
        NotPlain: Its first records are not plain.
    """

    def __init__(self, number: int, container: Cuttable, owners: dict[int, Part]):
        self.number = number
        self.container = container
        self.parts: list[Part] = []
        self.has_moved = True
        self._owners = owners
        self._next = 0
        self._rivals = 0
        self._items_per_part = PART_ITEMS_FIRST
        _, sample = self._slice(0, PART_ITEMS_FIRST)
        Fingerprint(sample)
        self._learn_size(len(pickle.dumps(list(sample), PROTOCOL)), len(sample))

    def _learn_size(self, size_bytes: int, items: int) -> None:
        per_item = max(1, size_bytes // max(1, items))
        self._items_per_part = max(16, min(PART_ITEMS_MAX, PART_BYTES // per_item))

    def _slice(self, start: int, count: int) -> tuple[tuple[Any, ...] | None, tuple[Any, ...]]:
        """Keys (None for a list) and values of a range of the items."""
        if type(self.container) is list:
            return None, tuple(self.container[start : start + count])
        held: Any = self.container
        keys = tuple(islice(held, start, start + count))
        return keys, tuple(islice(held.values(), start, start + count))

    def all_slices(self) -> Iterator[tuple[Part, tuple[Any, ...] | None, tuple[Any, ...]]]:
        """Each part with its keys (None for a list) and values, while nothing changes."""
        held: Any = self.container
        is_list = type(held) is list
        keys = None if is_list else tuple(held)
        values = tuple(held if is_list else held.values())
        start = 0
        for part in self.parts:
            end = start + part.count
            yield part, None if keys is None else keys[start:end], values[start:end]
            start = end

    def align(self) -> None:
        """Find the parts again after items came or went; what lies between them is new parts."""
        now = tuple(self.container)
        if type(self.container) is list and len(now) == sum(part.count for part in self.parts):
            return  # Whatever changed was replaced in its place.
        row = addresses(now)
        if self.parts and row == b"".join([part.anchors for part in self.parts]):
            return
        parts: list[Part] = []
        end = 0
        for part in self.parts:
            if not part.anchors:
                continue  # Never written, so nothing is lost with it.
            size = len(part.anchors)
            start = end if row[end : end + size] == part.anchors else _find(row, part.anchors, end)
            if start < 0:
                self._disown(part)
                continue
            parts += self._new_parts((start - end) // _WORD)
            parts.append(part)
            end = start + size
        parts += self._new_parts((len(row) - end) // _WORD)
        self.parts = parts
        self.has_moved = True

    def _new_parts(self, count: int) -> Iterator[Part]:
        pieces = -(-count // self._items_per_part)
        for piece in range(pieces):
            self._next += 1
            size = count * (piece + 1) // pieces - count * piece // pieces
            yield Part(self, self._next - 1, size)

    # -- a round, in steps

    def round(self) -> Iterator[Change | None]:
        """Look at each part once, giving what changed; None where nothing did.

        Between two steps the container may change; during a step it must not. So what was written
        is of no one instant, and only `last` makes it so.

        Raises:
            NotPlain: The container cannot be cut (any more).
        """
        self.align()
        looked: set[Part] = set()
        changes = seen = 0
        is_first = all(part.values is None for part in self.parts)
        while True:
            # NB: an iterator of a dict goes on where it was, however the values changed.
            read = self._reader()
            at = 0
            for part in self.parts:
                keys, values = read(part.count)
                if not self._is_aligned(part, keys, values, at):
                    break
                at += part.count
                if part in looked:
                    continue
                looked.add(part)
                change = self._look(part, keys, values)
                del keys, values
                seen += part.count
                if change is not None:
                    changes += part.count if change.data is not None else len(change.records)
                    if not is_first and changes * HOT_SHARE > len(self.container) + seen:
                        raise NotPlain("most records change between two rounds")
                yield change
            else:
                break
            self.align()

    def _reader(self) -> Callable[[int], tuple[tuple[Any, ...] | None, tuple[Any, ...]]]:
        """Gives keys (None for a list) and values of the next so many items at each call."""
        held: Any = self.container
        if type(held) is list:
            items = iter(held)
            return lambda count: (None, tuple(islice(items, count)))
        keys, values = iter(held), iter(held.values())

        def read(count: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            try:
                return tuple(islice(keys, count)), tuple(islice(values, count))
            except RuntimeError:  # Its size has changed.
                return (), ()

        return read

    def _is_aligned(
        self, part: Part, keys: tuple[Any, ...] | None, values: tuple[Any, ...], at: int
    ) -> bool:
        """Whether what was read is the part, as far as can be told without comparing records."""
        if len(values) != part.count or len(self.container) != sum([p.count for p in self.parts]):
            return False
        if keys is None:
            return True
        if part.anchors:
            return are_at(keys, part.anchors)
        # A new part: see whether it is still the same items that lie between the others.
        there, _ = self._slice(at, 1)
        return there is not None and there[0] is keys[0]

    def _look(
        self, part: Part, keys: tuple[Any, ...] | None, values: tuple[Any, ...]
    ) -> Change | None:
        changes = self._compare(part, keys, values)
        if changes is not None:
            if not changes.records:
                return None
            if changes.apply():
                if keys is None:
                    part.anchors = addresses(values)
                return self._change(part, keys, values, changes.records)
        if not self._note(part, keys, values):
            return None
        return self._change(part, keys, values, None if changes is None else changes.records)

    def _compare(
        self, part: Part, keys: tuple[Any, ...] | None, values: tuple[Any, ...]
    ) -> Changes | None:
        """What changed since the part was written; None: all may have."""
        if part.values is None:
            return None
        if keys is not None and part.keys is not None and part.keys.changed(keys):
            return None
        changes = part.values.compare(values)
        return changes if len(changes.records) * 4 <= part.count else None

    def _note(self, part: Part, keys: tuple[Any, ...] | None, values: tuple[Any, ...]) -> bool:
        """Take down what the part is now; False if another one claims an object of it."""
        self._disown(part)
        part.values = None
        part.anchors = addresses(values if keys is None else keys)
        part.keys = None if keys is None else _of_keys(keys)
        made = Fingerprint(values)
        ids = [where for where, _ in made.owned()]
        rivals = {rival for rival in map(self._owners.get, ids) if rival is not None}
        if rivals:
            # One of them may only not have been looked at since it let go of the object.
            self._rivals += 1
            if self._rivals > RIVALS_MAX:
                raise NotPlain("records that share what can change")
            for rival in rivals:
                self._disown(rival)
                rival.values = None
            return False
        part.values = made
        self._owners.update(dict.fromkeys(ids, part))
        return True

    def _disown(self, part: Part) -> None:
        if part.values is not None:
            for where, _ in part.values.owned():
                if self._owners.get(where) is part:
                    del self._owners[where]

    def _change(
        self,
        part: Part,
        keys: tuple[Any, ...] | None,
        values: tuple[Any, ...],
        changed: list[int] | None,
    ) -> Change:
        if changed is not None:
            return Change(part, None, {position: values[position] for position in changed})
        items: Any = list(values) if keys is None else dict(zip(keys, values, strict=True))
        data = pickle.dumps(items, PROTOCOL)
        self._learn_size(len(data), part.count)
        return Change(part, data, {})

    def disown_all(self) -> None:
        """Claim nothing any more."""
        for part in self.parts:
            self._disown(part)

    def claim_all(self) -> None:
        """Claim, as the only one, what its parts held when they were written."""
        for part in self.parts:
            if part.values is not None:
                ids = [where for where, _ in part.values.owned()]
                self._owners.update(dict.fromkeys(ids, part))


def last(cuts: list[Cut], owners: dict[int, Part]) -> dict[Cut, list[Change]]:
    """What changed in all cut containers, at one instant; ends their stream.

    Nothing of them may change from here until it was written. Afterwards `owners` has all objects
    within their records that can change.

    Raises:
        Shared: A container cannot be cut any more; nothing was changed but that it is named.
    """
    pending: list[tuple[Cut, Part, Any, tuple[Any, ...], list[int] | None]] = []
    found: dict[Cut, list[Change]] = {cut: [] for cut in cuts}
    for cut in cuts:
        cut.align()
        total = 0
        for part, keys, values in cut.all_slices():
            changes = cut._compare(part, keys, values)
            changed = None if changes is None else changes.records
            if changed == []:
                continue
            total += part.count if changed is None else len(changed)
            if total * HOT_SHARE > len(cut.container):
                raise Shared(cut)
            if changes is not None and changes.is_shallow:
                changes.check()
                found[cut].append(cut._change(part, keys, values, changed))
                continue
            pending.append((cut, part, keys, values, changed))
            if part.values is not None:
                for where, _ in part.values.owned(changed):
                    if owners.get(where) is part:
                        del owners[where]
    # Only now does `owners` have what is owned at this instant, and by whom.
    for cut, part, keys, values, changed in pending:
        try:
            if changed is None and keys is not None:
                _of_keys(keys)
            now = values if changed is None else tuple(values[at] for at in changed)
            ids = [where for where, _ in Fingerprint(now).owned()]
        except NotPlain as exc:
            raise Shared(cut) from exc
        if not owners.keys().isdisjoint(ids):
            raise Shared(cut)
        owners.update(dict.fromkeys(ids, part))
        found[cut].append(cut._change(part, keys, values, changed))
    return found


class Shared(Exception):
    """A container cannot be cut: its records are not plain, or share what can change.

    Attributes:
        cut: Which.
    """

    def __init__(self, cut: Cut) -> None:
        super().__init__(cut)
        self.cut = cut


def place(part: Part, obj: object) -> int | None:
    """Position of a record in its part; None if `obj` is not a record but within one."""
    at = 0
    cut = part.cut
    for other in cut.parts:
        if other is part:
            break
        at += other.count
    _, values = cut._slice(at, part.count)
    where = _find(addresses(values), addresses((obj,)), 0)
    return None if where < 0 else where // _WORD


def _of_keys(keys: tuple[Any, ...]) -> Fingerprint:
    """Fingerprint of the keys of a dict.

    Raises:
        NotPlain: Some are not, or can change.
    """
    made = Fingerprint(keys)
    if any(True for _ in made.owned()):
        raise NotPlain("keys that can change")
    return made


def _find(row: bytes, anchors: bytes, start: int) -> int:
    """Where in a row of addresses others stand; -1 if nowhere from `start` on."""
    at = row.find(anchors, start)
    while at >= 0 and at % _WORD:
        at = row.find(anchors, at + 1)
    return at
