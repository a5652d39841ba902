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
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice, repeat
from typing import Any, Final

from .fingerprints import Changes, Fingerprint, NotPlain, addresses, are_at
from .sink import PROTOCOL
from .versions import version_of

CUT_ITEMS_MIN: Final = 1024
"""Containers with fewer items are pickled with all else, which takes about 0.3 ms."""
PART_BYTES: Final = 48 * 1024
"""What a part's pickle should take: some hundred records, hence 1 to 3 ms to look at and write."""
PART_ITEMS_FIRST: Final = 256
PART_ITEMS_MAX: Final = 1024
"""A part that loses an item is written anew, and that of a queue does so all the time."""
SEARCH_BYTES_MAX: Final = 32 << 20
SEARCHES_MAX: Final = 8
"""So much, and all the places so many times, are looked through for parts that have moved, at about
3 GB/s; what is not found by then is new."""
LATE_SHARE: Final = 4
"""Once one in so many records of a part was written later than the others, all are noted anew."""
RIVALS_MAX: Final = 3
"""Times that two parts may claim one object before it is taken to be shared for good."""
RUN_PARTS: Final = 16
"""Small parts in a row that are joined: those of less than so many items, then those of less than
the square. So what is added item by item is written about three times in all. Source: to look at a
part takes 3 us and at a record 0.4, so parts of some hundred records are as good as any."""
HEAT_MAX: Final = 3
"""Deltas in a row that may find a container changed throughout before it is pickled whole. Once is
no reason: afterwards it may be at rest again."""
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
        late: Fingerprint of those that were written later than the others, which `values` leaves
            out; None if there are none.
        places: Their positions, ascending.
        version: That of the container when it had what is noted here; 0: unknown.
    """

    __slots__ = (
        *("anchors", "count", "cut", "keys", "late", "number", "places", "values"),
        "version",
    )

    def __init__(self, cut: Cut, number: int, count: int) -> None:
        self.cut = cut
        self.number = number
        self.count = count
        self.anchors = b""
        self.keys: Fingerprint | None = None
        self.values: Fingerprint | None = None
        self.late: Fingerprint | None = None
        self.places: list[int] = []
        self.version = 0

    def note(self, values: Fingerprint | None) -> None:
        """Have all values as they were written in one fingerprint."""
        self.values = values
        self.late = None
        self.places = []

    def note_some(self, changed: list[int], made: Fingerprint, values: tuple[Any, ...]) -> None:
        """Have some of the values as they were written now.

        Args:
            changed: Their positions.
            made: Fingerprint of them.
            values: All values.

        Raises:
            NotPlain: They cannot be had together with what is there.
        """
        assert self.values is not None
        places = sorted({*self.places, *changed})
        if len(places) * LATE_SHARE > self.count:
            self.note(Fingerprint(values))
            return
        self.late = made if places == changed else Fingerprint(tuple(values[at] for at in places))
        self.values.left_out.update(changed)
        self.places = places

    def owned(self, changed: list[int] | None = None) -> Iterator[int]:
        """Ids of the objects in it that can change, as it was written.

        Args:
            changed: Of the values at these positions only.
        """
        if self.values is None:
            return
        late = self.late
        if late is None:
            numbers = None
        elif changed is None:
            numbers = None
        else:
            where = {place: number for number, place in enumerate(self.places)}
            numbers = [where[at] for at in changed if at in where]
            changed = [at for at in changed if at not in where]
        for found, _ in self.values.owned(changed):
            yield found
        if late is not None:
            for found, _ in late.owned(numbers):
                yield found


class Items:
    """What stands in one part, as long as nothing changes its container."""

    __slots__ = ("_all", "_count", "_keys", "_start")

    def __init__(self, held: _All, start: int, count: int) -> None:
        self._all = held
        self._start = start
        self._count = count
        self._keys: tuple[Any, ...] | None = None

    def know_keys(self, keys: tuple[Any, ...] | None) -> None:
        """Find single values by these keys, which the part has, rather than take out all values."""
        self._keys = keys

    def keys(self) -> tuple[Any, ...] | None:
        """Its keys; None in a list."""
        keys = self._all.keys()
        return None if keys is None else keys[self._start : self._start + self._count]

    def values(self) -> tuple[Any, ...]:
        """Its values."""
        return self._all.values()[self._start : self._start + self._count]

    def value(self, number: int) -> Any:
        """One of its values."""
        if self._keys is not None:
            return self._all.container[self._keys[number]]
        return self._all.values()[self._start + number]


class _All:
    """What stands in a container, taken out once it is asked for."""

    __slots__ = ("_keys", "_values", "container")

    def __init__(self, container: Cuttable) -> None:
        self.container: Any = container
        self._keys: tuple[Any, ...] | None = None
        self._values: tuple[Any, ...] | None = None

    def keys(self) -> tuple[Any, ...] | None:
        if self._keys is None and type(self.container) is dict:
            self._keys = tuple(self.container)
        return self._keys

    def values(self) -> tuple[Any, ...]:
        if self._values is None:
            held = self.container
            self._values = tuple(held if type(held) is list else held.values())
        return self._values


class _Late:
    """Those of some items that were written later."""

    __slots__ = ("_items", "_places")

    def __init__(self, items: Items, places: list[int]) -> None:
        self._items = items
        self._places = places

    def value(self, number: int) -> Any:
        return self._items.value(self._places[number])

    def values(self) -> tuple[Any, ...]:
        values = self._items.values()
        return tuple([values[at] for at in self._places])


class Change:
    """What of one part is to be written.

    Attributes:
        part: Which.
        items: All its items as a dict or list; None if only `records` changed.
        records: Values that changed, by position.
    """

    __slots__ = ("items", "part", "records")

    def __init__(self, part: Part, items: Cuttable | None, records: dict[int, Any]) -> None:
        self.part = part
        self.items = items
        self.records = records


class Cut:
    """One cut container at its writer.

    Attributes:
        number: Its name on the wire.
        container: The live dict or list.
        parts: Its parts, in order.
        version: Of the container when its parts were found in it, all of them; 0: unknown.
        has_moved: The reader has not been told the present order of the parts.
        next_part: Number of the next new part.
        heat: Deltas of late that found most of it changed, less those that did not.

    Raises:
        NotPlain: Its first records are not plain.
    """

    def __init__(self, number: int, container: Cuttable, owners: dict[int, Part]):
        self.number = number
        self.container = container
        self.parts: list[Part] = []
        self.version = 0
        self.has_moved = True
        self._owners = owners
        self.next_part = 0
        self.heat = 0
        self._rivals = 0
        self._items_per_part = PART_ITEMS_FIRST
        _, sample = self._slice(0, PART_ITEMS_FIRST)
        Fingerprint(sample)
        self.learn_size(len(pickle.dumps(list(sample), PROTOCOL)), len(sample))

    @property
    def about_bytes(self) -> int:
        """What a pickle of it takes, about."""
        return len(self.container) * PART_BYTES // self._items_per_part

    def learn_size(self, size_bytes: int, items: int) -> None:
        """Note what some items took, for parts to come."""
        per_item = max(1, size_bytes // max(1, items))
        self._items_per_part = max(16, min(PART_ITEMS_MAX, PART_BYTES // per_item))

    def _slice(self, start: int, count: int) -> tuple[tuple[Any, ...] | None, tuple[Any, ...]]:
        """Keys (None for a list) and values of a range of the items."""
        if type(self.container) is list:
            return None, tuple(self.container[start : start + count])
        held: Any = self.container
        keys = tuple(islice(held, start, start + count))
        return keys, tuple(islice(held.values(), start, start + count))

    def all_items(self) -> Iterator[tuple[Part, Items]]:
        """Each part with what stands in it, while nothing changes."""
        held = _All(self.container)
        start = 0
        for part in self.parts:
            yield part, Items(held, start, part.count)
            start += part.count

    def align(self) -> None:
        """Find the parts again after items came or went; what lies between them is new parts."""
        version = version_of(self.container)
        if version == self.version != 0:
            return
        self.version = version
        row = addresses(tuple(self.container))
        before = b"".join([part.anchors for part in self.parts])
        if self.parts and row == before:
            return
        if type(self.container) is list and len(row) == len(before) and _are_alike(row, before):
            return  # What changed was replaced in its place.
        parts: list[Part] = []
        end = 0
        left = SEARCH_BYTES_MAX + SEARCHES_MAX * len(row)
        for part in self.parts:
            if not part.anchors:
                continue  # Never written, so nothing is lost with it.
            size = len(part.anchors)
            start = end if row.startswith(part.anchors, end) else -1
            if start < 0 < left:
                start = _find(row, part.anchors, end)
                left -= (len(row) if start < 0 else start) - end
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
            self.next_part += 1
            size = count * (piece + 1) // pieces - count * piece // pieces
            yield Part(self, self.next_part - 1, size)

    def join(self) -> set[Part]:
        """Join small neighbours, lest a container that grows bit by bit have ever more parts.

        Returns:
            The parts that were made of others, all of which are to be written.
        """
        before = set(self.parts)
        for power in (1, 2):
            self._join(RUN_PARTS**power)
        return set(self.parts) - before

    def _join(self, items: int) -> None:
        """Join runs of parts with less than so many items each."""
        parts: list[Part] = []
        run: list[Part] = []
        total = 0
        for part in (*self.parts, None):
            if part is not None and part.count < items:
                if total + part.count <= self._items_per_part:
                    run.append(part)
                    total += part.count
                    continue
                following, total_then = [part], part.count
            else:
                following, total_then = [], 0
            most = max([old.count for old in run], default=0)
            if len(run) >= RUN_PARTS and 2 * most <= total:
                for old in run:
                    self._disown(old)
                parts += self._new_parts(total)
                self.has_moved = True
            else:
                parts += run
            if part is not None and not following:
                parts.append(part)
            run, total = following, total_then
        self.parts = parts

    # -- a round, in steps

    def round(self) -> Iterator[Change | None]:
        """Look at each part once, giving what changed; None where nothing did.

        Between two steps the container may change; during a step it must not. So what was written
        is of no one instant, and only `last` makes it so. What comes to the container meanwhile is
        left to the next round, lest a round never catch up with those who add to it.

        Raises:
            NotPlain: The container cannot be cut (any more).
        """
        self.align()
        to_come = self.next_part
        looked: set[Part] = set()
        changes = seen = 0
        is_first = all(part.values is None for part in self.parts)
        while True:
            # NB: an iterator of a dict goes on where it was, however the values changed.
            read = self._reader()
            last_key = self._last_key()
            for part in self.parts:
                keys, values = read(part.count)
                if not self._is_aligned(part, keys, values, last_key):
                    break
                if part in looked or part.number >= to_come:
                    continue
                looked.add(part)
                change = self._look(part, keys, values)
                del keys, values
                seen += part.count
                if change is not None:
                    changes += len(change.records) if change.items is None else part.count
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

    def _last_key(self) -> Any:
        """The key that was put into a dict last: another one if any was since."""
        held: Any = self.container
        return next(reversed(held), None) if type(held) is dict else None

    def _is_aligned(
        self, part: Part, keys: tuple[Any, ...] | None, values: tuple[Any, ...], last_key: Any
    ) -> bool:
        """Whether what was read is the part, as far as can be told without comparing records."""
        if len(values) != part.count or len(self.container) != sum([p.count for p in self.parts]):
            return False
        if keys is None:
            return True
        if part.anchors:
            return are_at(keys, part.anchors)
        # NB: of a new part nothing is known. Where it stands would take a walk through all before
        # it to find out, for each of them: seconds with some 100,000 records.
        return self._last_key() is last_key

    def _look(
        self, part: Part, keys: tuple[Any, ...] | None, values: tuple[Any, ...]
    ) -> Change | None:
        changes = self.compare(part, keys, values)
        part.version = version_of(self.container)
        if changes is not None:
            if not changes.records:
                return None
            if changes.apply():
                if keys is None:
                    part.anchors = addresses(values)
                return _change(part, keys, values, changes.records)
        if not self._note(part, keys, values):
            return None
        return _change(part, keys, values, None if changes is None else changes.records)

    def compare(
        self, part: Part, keys: tuple[Any, ...] | None, values: tuple[Any, ...]
    ) -> Changes | None:
        """What changed since the part was written; None: all may have."""
        if part.values is None:
            return None
        if keys is not None and part.keys is not None and part.keys.changed(keys):
            return None
        changes = part.values.compare(values)
        if part.late is not None:
            late = part.late.compare(tuple(values[at] for at in part.places))
            changes.add(late, part.places)
        return changes if len(changes.records) * 4 <= part.count else None

    def compare_items(self, part: Part, items: Items) -> Changes | None:
        """As `compare`, of what stands in the part now that all were found in their places."""
        if not part.version or part.version != version_of(self.container):
            return self.compare(part, items.keys(), items.values())
        # So it has the very keys and values that it had, and had them all the while.
        if part.values is None:
            return None
        if part.keys is not None:
            items.know_keys(part.keys.atoms())
        changes = part.values.compare_held(items)
        if part.late is not None:
            changes.add(part.late.compare_held(_Late(items, part.places)), part.places)
        return changes if len(changes.records) * 4 <= part.count else None

    def _note(self, part: Part, keys: tuple[Any, ...] | None, values: tuple[Any, ...]) -> bool:
        """Take down what the part is now; False if another one claims an object of it."""
        self._disown(part)
        part.note(None)
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
                rival.note(None)
            return False
        part.note(made)
        self._owners.update(dict.fromkeys(ids, part))
        return True

    def _disown(self, part: Part) -> None:
        for where in part.owned():
            if self._owners.get(where) is part:
                del self._owners[where]

    def release(self) -> None:
        """Claim nothing any more, and let go of the container at once, not with some collection."""
        for part in self.parts:
            self._disown(part)
        self.let_go()

    def let_go(self) -> None:
        """As `release`, when nobody claims anything any more."""
        # One by one: other threads may run in between.
        while self.parts:
            self.parts.pop()
        self.container = type(self.container)()

    def claim_all(self) -> None:
        """Claim, as the only one, what its parts held when they were written."""
        for part in self.parts:
            self._owners.update(dict.fromkeys(part.owned(), part))


def _change(
    part: Part,
    keys: tuple[Any, ...] | None,
    values: tuple[Any, ...],
    changed: list[int] | None,
) -> Change:
    if changed is not None:
        return Change(part, None, {position: values[position] for position in changed})
    items: Any = list(values) if keys is None else dict(zip(keys, values, strict=True))
    return Change(part, items, {})


class Instant:
    """What changed in all cut containers, at one instant.

    Nothing of them may change from here until it was written. Afterwards `owners` has all objects
    within their records that can change.

    Args:
        cuts: The containers.
        owners: Who has what, as it was; changed, also if it fails.
        goes_on: What is written is the beginning of more: `commit` follows. Then containers may
            be among them of which nothing was written yet.

    Attributes:
        changes: By container.

    Raises:
        Shared: A container cannot be cut any more; nothing was changed but that it is named.
    """

    def __init__(self, cuts: list[Cut], owners: dict[int, Part], *, goes_on: bool = False) -> None:
        self.changes: dict[Cut, list[Change]] = {cut: [] for cut in cuts}
        self._shallow: dict[Part, Changes] = {}
        self._looked: dict[Part, tuple[list[int] | None, Fingerprint | None, Fingerprint]] = {}
        self._seen: dict[Part, Items] = {}
        self._heat: dict[Cut, int] = {}
        pending: list[tuple[Part, list[int] | None]] = []
        for cut in cuts:
            pending += self._compare(cut, owners, goes_on)
        # Only now does `owners` have what is owned at this instant, and by whom.
        for part, changed in pending:
            cut = part.cut
            keys, values = self._seen[part].keys(), self._seen[part].values()
            try:
                held = None if changed is not None or keys is None else _of_keys(keys)
                now = values if changed is None else tuple(values[at] for at in changed)
                made = Fingerprint(now)
            except NotPlain as exc:
                raise Shared(cut) from exc
            ids = [where for where, _ in made.owned()]
            if not owners.keys().isdisjoint(ids):
                raise Shared(cut)
            owners.update(dict.fromkeys(ids, part))
            self.changes[cut].append(_change(part, keys, values, changed))
            self._looked[part] = changed, held, made
        if not goes_on:
            self._seen.clear()
        for cut in cuts:
            # A record has it, and would have a copy of its own.
            rival = owners.get(id(cut.container))
            if rival is not None:
                raise Shared(rival.cut)

    def _compare(
        self, cut: Cut, owners: dict[int, Part], goes_on: bool
    ) -> list[tuple[Part, list[int] | None]]:
        """Look at all parts of a container; those that have to be noted anew."""
        cut.align()
        joined = cut.join() if goes_on and cut.has_moved else set()
        is_new = goes_on and all(part.values is None for part in cut.parts)
        may_be_hot = is_new or (goes_on and cut.heat < HEAT_MAX)
        total = 0
        pending: list[tuple[Part, list[int] | None]] = []
        for part, items in cut.all_items():
            changes = cut.compare_items(part, items)
            changed = None if changes is None else changes.records
            if changed == []:
                continue
            if part not in joined:
                total += part.count if changed is None else len(changed)
            if total * HOT_SHARE > len(cut.container) and not may_be_hot:
                raise Shared(cut)
            self._seen[part] = items
            if changes is not None and changes.is_shallow:
                # What belongs to whom is as it was.
                self._check(cut, changes)
                self._shallow[part] = changes
                records = {at: items.value(at) for at in changes.records}
                self.changes[cut].append(Change(part, None, records))
                continue
            pending.append((part, changed))
            for where in part.owned(changed):
                if owners.get(where) is part:
                    del owners[where]
        is_hot = total * HOT_SHARE > len(cut.container) and not is_new
        self._heat[cut] = cut.heat + 1 if is_hot else max(0, cut.heat - 1)
        return pending

    @staticmethod
    def _check(cut: Cut, changes: Changes) -> None:
        try:
            changes.check()
        except NotPlain as exc:
            raise Shared(cut) from exc

    def commit(self, cut: Cut) -> None:
        """Take down what was written of a container: what changes from here on is found next.

        Raises:
            NotPlain: It cannot be cut any more; what was written is right.
        """
        cut.heat = self._heat[cut]
        for change in self.changes[cut]:
            part = change.part
            items = self._seen.pop(part)
            keys, values = items.keys(), items.values()
            shallow = self._shallow.get(part)
            if shallow is None:
                changed, held, made = self._looked[part]
                if changed is None:
                    part.keys = held
                    part.note(made)
                else:
                    part.note_some(changed, made, values)
            elif not shallow.apply():
                part.note(Fingerprint(values))
            part.anchors = addresses(values if keys is None else keys)
        for part in cut.parts:
            part.version = cut.version

    def unchanged_bytes_min(self, cuts: Iterable[Cut], *, closely: bool) -> int:
        """What the pickle of all that did not change takes at least, with names for what is shared.

        Args:
            cuts: The containers.
            closely: Look at what the records refer to, rather than count them.
        """
        found = 0
        for cut in cuts:
            per_item = 2 if type(cut.container) is dict else 1  # A key, and a value: True, say.
            changes = {change.part: change for change in self.changes[cut]}
            found += per_item * len(cut.container)
            for part, change in changes.items():
                changed = part.count if change.items is not None else len(change.records)
                found -= per_item * changed
            for part in cut.parts if closely else ():
                change_of = changes.get(part)
                if part.values is None or (change_of is not None and change_of.items is not None):
                    continue
                others = part.values.left_out.union(change_of.records if change_of else ())
                found += part.values.references(others) - (part.count - len(others))
        return found

    def extra_bytes_max(self, cuts: Iterable[Cut]) -> int:
        """What the pickle of all that changed takes at most to say what it is of.

        That is two numbers and a tuple for each part, a position for each record, and for each
        container a sample, named; once more the beginning and the end of a pickle.
        """
        changes = [change for cut in cuts for change in self.changes[cut]]
        return 64 + sum([32 + 3 * len(change.records) for change in changes])

    def still_holds(self) -> bool:
        """Whether the containers are as they were when they were looked at."""
        for cut in self.changes:
            if len(cut.container) != sum([part.count for part in cut.parts]):
                return False
            for part, items in cut.all_items():
                if not self._is_as_looked_at(part, items):
                    return False
        return True

    def _is_as_looked_at(self, part: Part, items: Items) -> bool:
        looked = self._looked.get(part)
        if looked is not None and looked[0] is None:
            _, held, made = looked
            return not made.changed(items.values()) and (
                held is None or not held.changed(items.keys() or ())
            )
        now = part.cut.compare_items(part, items)
        if now is None:
            return False
        shallow = self._shallow.get(part)
        if shallow is not None:
            return now.equals(shallow)
        if looked is None:
            return not now.records
        changed, _, made = looked
        values = items.values()
        return now.records == changed and not made.changed(tuple(values[at] for at in changed))


class Shared(Exception):
    """A container cannot be cut: its records are not plain, or share what can change.

    Attributes:
        cut: Which.
    """

    def __init__(self, cut: Cut) -> None:
        super().__init__(cut)
        self.cut = cut


def places(cut: Cut) -> dict[int, tuple[int, int]]:
    """Where each record is: number of its part and position in it, by id; while nothing changes."""
    found: dict[int, tuple[int, int]] = {}
    for part, items in cut.all_items():
        found.update(zip(map(id, items.values()), zip(repeat(part.number), count()), strict=False))
    return found


def _of_keys(keys: tuple[Any, ...]) -> Fingerprint:
    """Fingerprint of the keys of a dict.

    Raises:
        NotPlain: Some are not, or can change.
    """
    made = Fingerprint(keys)
    if any(True for _ in made.owned()):
        raise NotPlain("keys that can change")
    return made


def _are_alike(row: bytes, other: bytes) -> bool:
    """Whether most places of two rows of one length are the same, by a sample."""
    step = max(_WORD, len(row) // _SAMPLES // _WORD * _WORD)
    places = range(0, len(row), step)
    same = sum(row[at : at + _WORD] == other[at : at + _WORD] for at in places)
    return 2 * same >= len(places)


_SAMPLES: Final = 256


def _find(row: bytes, anchors: bytes, start: int) -> int:
    """Where in a row of addresses others stand; -1 if nowhere from `start` on."""
    at = row.find(anchors, start)
    while at >= 0 and at % _WORD:
        at = row.find(anchors, at + 1)
    return at
