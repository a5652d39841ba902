"""The state stream: an object as a snapshot that goes on as deltas, each against what was sent.

`StreamWriter` writes *chunks*, `StreamReader` takes them in the order in which they were written.
Rounds of chunks may be written while the object is in use; `last` is written while nothing changes
it, and makes of all that was sent before the object as it is then. So a large state can be sent
ahead, and what has to wait for the last chunk is only what changed since.

Two things go ahead. *Regions* are the memory of large buffers (arrays, byte strings), whose dirty
ranges `dirty.DirtyTracker` finds. *Cuts* are large dicts and lists of plain records, whose changed
records `parts.Cut` finds. All else, the *rest*, is pickled with the last chunk, and names regions
and cuts where it refers to them. What cannot go ahead goes with the last chunk, as in a snapshot.

A chunk is a sequence of operations, each `kind 1 | number 4 | extra 8 | size 8`, little-endian,
followed by `size` bytes:

    =======  ================  ===================  =====================================
    kind     number            extra                bytes
    =======  ================  ===================  =====================================
    REGION   region            size of the region   its BufferKind
    FREE     region                                 (it is of no use any more)
    BYTES    region            offset in it         what stands there
    PART     cut               part                 pickle of its items, as a dict or list
    RECORDS  cut               part                 pickle of {position: value}
    CHANGES                                         pickle of [(cut, part, items, records)]
    LAYOUT   cut               0 dict, 1 list       numbers of its parts in order, 4 bytes each
    DROP     cut                                    (it is not cut any more)
    ROUND                                           (a round has ended)
    REST     buffers           size of the head     head and body of a snapshot
    INLINE                                          next buffer of the rest
    REFER    region            offset in it         size of the next buffer of the rest, 8 bytes
    PAD                                             zeros, so that what follows is aligned
    =======  ================  ===================  =====================================

Only a last chunk has a REST, once, followed by one INLINE or REFER for each of its buffers.
"""

from __future__ import annotations

import io
import pickle
import struct
import time
import types
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias

from . import auto, plain
from .auto import runs_code
from .base import BufferKind, Snapshot, parse_head
from .dirty import DirtyTracker, Region
from .errors import LoadFailed
from .fingerprints import look_again
from .parts import CUT_ITEMS_MIN, Change, Cut, Last, Part, Shared, places
from .resources import address_of
from .sink import PROTOCOL, Sink

Piece: TypeAlias = bytes | memoryview
Buffer: TypeAlias = bytes | bytearray | memoryview

REGION_BYTES_MIN: Final = 256 * 1024
"""Smaller buffers go with the last chunk, which takes them less time than being looked after."""
REGIONS_MAX: Final = 4096
CUTS_MAX: Final = 4096
PARTS_MAX: Final = 1 << 20
WALK_OBJECTS_MAX: Final = 20_000
"""Objects looked at for what can go ahead. An object graph with more of them outside of large
containers is pickled whole in the end, and a trial of that would stop its server for as long."""
SHARED_BYTES_MIN: Final = 1 << 20
"""Regions from this size on are written into memory that the reader shares, if it can be had."""
SHARED_BYTES_MAX: Final = 1 << 30
"""Larger ones travel in chunks: a message of the link holds up to twice as much."""
TWICE_BYTES_MAX: Final = 16 * 1024
TWICE_SHARE: Final = 100
"""Strings that both the changes and the rest have may take so much, or one in so many bytes of the
rest. The pickler of the rest cannot know those of the changes, so they would be written twice."""
_TEXT_BYTES_MIN: Final = 16
TRIALS_MAX: Final = 3
"""Times that the rest is pickled if doing so changes what goes ahead; then all goes as a snapshot.
"""
COPY_BYTES: Final = 1 << 20
"""Copied at a time while the object is in use."""

_OP = struct.Struct("<BIQQ")
_REGION, _FREE, _BYTES, _PART, _RECORDS, _LAYOUT, _DROP, _ROUND = range(8)
_REST, _INLINE, _REFER, _PAD, _CHANGES = range(8, 13)


class Store(Protocol):
    """Memory that is written piece by piece, then sealed and sent without being copied."""

    def write(self, data: bytes) -> None: ...
    def seal(self) -> memoryview: ...


class Memory(Protocol):
    """Memory that the writer's process shares with its reader's: `rpc.shared_memory`."""

    def has_room(self) -> bool: ...
    def store(self) -> Store: ...
    def travels(self, part: memoryview) -> bool: ...


class _RestPickler(auto._AutoPickler):
    """Pickles all but what is cut, which it names.

    Attributes:
        met: What it has named, or named a record of.
        kinds: Types that it has met.
        texts: Sizes of the longer strings that it has met, by id.
    """

    def __init__(self, sink: Sink, cuts: dict[int, Cut], owners: dict[int, Part]) -> None:
        super().__init__(sink)
        self._cuts = cuts
        self._owners = owners
        self.met: set[Cut] = set()

        self._places: dict[Cut, dict[int, tuple[int, int]]] = {}
        self.kinds: set[type] = set()
        self.texts: dict[int, int] = {}

    def reducer_override(self, obj: Any) -> Any:
        self.kinds.add(type(obj))
        return super().reducer_override(obj)

    def persistent_id(self, obj: Any) -> Any:
        which = id(obj)
        cut = self._cuts.get(which)
        if cut is not None:
            self.met.add(cut)
            return cut.number
        part = self._owners.get(which)
        if part is None:
            kind = type(obj)
            if (kind is str or kind is bytes) and len(obj) >= _TEXT_BYTES_MIN:
                self.texts[which] = len(obj)
            return None
        cut = part.cut
        known = self._places.get(cut)
        if known is None:
            known = self._places[cut] = places(cut)
        position = known.get(which)
        if position is None:
            raise Shared(cut)  # It is not a record but within one.
        self.met.add(cut)
        return cut.number, *position


class _TextCounter(pickle.Pickler):
    """Pickles changes, counting the bytes of strings that the rest has as well."""

    def __init__(self, texts: Mapping[int, int]) -> None:
        super().__init__(io.BytesIO(), PROTOCOL)
        self._texts = texts
        self._met: set[int] = set()

    def persistent_id(self, obj: Any) -> Any:
        if id(obj) in self._texts:
            self._met.add(id(obj))
        return None

    def count(self, changes: object) -> int:
        self.dump(changes)
        return sum(map(self._texts.__getitem__, self._met))


class _WholePickler(auto._AutoPickler):
    met: frozenset[Cut] = frozenset()
    texts: Mapping[int, int] = types.MappingProxyType({})
    kinds: frozenset[type] = frozenset()


class StreamWriter:
    """Writes the stream of one object.

    Attributes:
        rounds: How many were ended.
        round_bytes: What the present round took so far; of the last one, once it ended.
        is_open: Something can go ahead.
    """

    def __init__(
        self,
        obj: object,
        engine: Literal["auto", "pages", "hash"] = "auto",
        memory: Memory | None = None,
    ) -> None:
        self.rounds = 0
        self.round_bytes = 0
        self.is_open = True
        self._obj = obj
        self._memory = memory
        self._tracker = DirtyTracker(engine)
        self._regions: list[tuple[int, int, Region]] = []  # begin, end
        self._cuts: dict[int, Cut] = {}  # by the container's id
        self._uncut: set[int] = set()  # ids; not held, lest they outlive their last user
        self._owners: dict[int, Part] = {}
        self._dropped: list[int] = []
        self._next_cut = 0
        self._round: Generator[list[Piece], None, None] | None = None
        self._generation = look_again()

    def close(self) -> None:
        """Release what the stream holds; idempotent."""
        self.is_open = False
        self._round = None
        self._tracker.close()
        self._regions.clear()
        for cut in self._cuts.values():
            cut.release()
        self._cuts.clear()
        self._uncut.clear()
        self._owners.clear()
        self._obj = None

    # -- rounds

    def step(self, seconds: float, size_bytes: int) -> tuple[list[Piece], bool]:
        """Write the next chunk of a round.

        The object may change between two steps, but not during one: no handler, no thread.

        Args:
            seconds: How long to go on at most, roughly.
            size_bytes: How much to write at most, roughly.

        Returns:
            The chunk in pieces, copies all of them (perhaps none: nothing was found in the time),
            and whether the round has ended with it.
        """
        if self._round is None:
            self._round = self._new_round()
            self.round_bytes = 0
        end = time.perf_counter() + seconds
        pieces: list[Piece] = []
        size = 0
        # What a step allocates is no garbage before it ends, so looking for some is in vain.
        with plain.collector_off():
            for written in self._round:
                pieces += written
                for piece in written:
                    size += len(piece)
                if size >= size_bytes or time.perf_counter() >= end:
                    self.round_bytes += size
                    return pieces, False
        self.round_bytes += size
        self._round = None
        self.rounds += 1
        return pieces, True

    def _new_round(self) -> Generator[list[Piece], None, None]:
        self._survey()
        yield self._take_dropped()
        regions = [region for _, _, region in self._regions]
        for region, ranges in zip(regions, self._tracker.dirty(regions), strict=True):
            if ranges == [(0, region.size)] and self._can_share(region):
                yield from self._copy_shared(region)
                continue
            for offset, size in ranges:
                yield from self._copy(region, offset, size)
        for cut in list(self._cuts.values()):
            try:
                for change in cut.round():
                    yield [] if change is None else self._changed(cut, change)
            except Exception:  # Not plain (any more); or what its classes define failed.
                self._forget_cut(cut)
            yield self._take_dropped()
            if cut.has_moved and id(cut.container) in self._cuts:
                yield self._layout(cut)
        yield [_OP.pack(_ROUND, 0, 0, 0)]

    def _copy(self, region: Region, offset: int, size: int) -> Generator[list[Piece], None, None]:
        for start in range(offset, offset + size, COPY_BYTES):
            data = self._tracker.take(region, start, min(COPY_BYTES, offset + size - start))
            if data is None:
                yield from self._give_up(region)
                return
            yield [_OP.pack(_BYTES, region.number, start, len(data)), data]

    def _can_share(self, region: Region) -> bool:
        memory = self._memory
        fits = SHARED_BYTES_MIN <= region.size <= SHARED_BYTES_MAX
        return memory is not None and fits and memory.has_room()

    def _copy_shared(self, region: Region) -> Generator[list[Piece], None, None]:
        """Copy all of a region to where its reader can use it in place."""
        assert self._memory is not None
        store = self._memory.store()
        for start in range(0, region.size, COPY_BYTES):
            data = self._tracker.take(region, start, min(COPY_BYTES, region.size - start))
            if data is None:
                yield from self._give_up(region)
                return
            store.write(data)
            yield []
        yield [_OP.pack(_BYTES, region.number, 0, region.size), store.seal()]

    def _give_up(self, region: Region) -> Generator[list[Piece], None, None]:
        """The region's memory has been given back."""
        self._regions = [entry for entry in self._regions if entry[2] is not region]
        self._tracker.untrack(region)
        yield [_OP.pack(_FREE, region.number, 0, 0)]

    def _changed(self, cut: Cut, change: Change) -> list[Piece]:
        number = change.part.number
        if change.items is not None:
            data = pickle.dumps(change.items, PROTOCOL)
            cut.learn_size(len(data), change.part.count)
            return [_OP.pack(_PART, cut.number, number, len(data)), data]
        data = pickle.dumps(change.records, PROTOCOL)
        return [_OP.pack(_RECORDS, cut.number, number, len(data)), data]

    def _layout(self, cut: Cut) -> list[Piece]:
        cut.has_moved = False
        numbers = struct.pack(f"<{len(cut.parts)}I", *[part.number for part in cut.parts])
        kind = 0 if type(cut.container) is dict else 1
        return [_OP.pack(_LAYOUT, cut.number, kind, len(numbers)), numbers]

    def _take_dropped(self) -> list[Piece]:
        dropped, self._dropped = self._dropped, []
        return [_OP.pack(_DROP, number, 0, 0) for number in dropped]

    # -- what can go ahead

    def _survey(self) -> None:
        """Look for large containers that are reached now; in the first round, for buffers too."""
        found = _large_containers(self._obj)
        if found is None or self._classes_changed():
            found = {}
        for which, cut in list(self._cuts.items()):
            if which not in found:
                self._forget_cut(cut)
        self._uncut.intersection_update(found)
        for which, container in found.items():
            if which in self._cuts or which in self._uncut or len(self._cuts) >= CUTS_MAX:
                continue
            try:
                self._cuts[which] = Cut(self._next_cut, container, self._owners)
                self._next_cut += 1
            except Exception:  # Not plain; or what its classes define failed.
                self._uncut.add(which)

    def look(self) -> list[Piece]:
        """Find the large buffers, by a trial of the last chunk; call it before the first step.

        Returns:
            The beginning of the stream, to be sent before what the first `step` gives.
        """
        if not plain.stack_is_safe() or _large_containers(self._obj) is None:
            return []
        self._survey()
        try:
            sink, _ = self._pickle_rest()
        except Exception:
            # It may be ready to travel in the end.
            return []
        pieces: list[Piece] = []
        for view, kind in sink.found:
            if view.nbytes < REGION_BYTES_MIN or len(self._regions) >= REGIONS_MAX:
                continue
            begin = address_of(view)
            end = begin + view.nbytes
            if any(begin < other_end and other < end for other, other_end, _ in self._regions):
                continue  # Memory that two buffers share is sent once.
            if self._memory is not None and self._memory.travels(view):
                continue  # Nothing of it needs to be copied.
            region = self._tracker.track(begin, view.nbytes)
            self._regions.append((begin, end, region))
            pieces += (_OP.pack(_REGION, region.number, region.size, 1), bytes((kind,)))
        return pieces

    @property
    def is_worth_it(self) -> bool:
        """Whether anything was found that can go ahead."""
        return bool(self._regions or self._cuts)

    def _forget_cut(self, cut: Cut) -> None:
        which = id(cut.container)
        if self._cuts.pop(which, None) is not None:
            cut.release()
            self._uncut.add(which)
            self._dropped.append(cut.number)

    # -- the last chunk

    def _pickle_rest(self) -> tuple[Sink, _RestPickler | _WholePickler]:
        if not plain.stack_is_safe():
            raise RecursionError("too deep a nesting would overflow the stack")
        sink = Sink()
        # Nothing changes meanwhile, so bytearrays need not be copied to be looked at.
        sink.view_of = memoryview
        pickler = (
            _RestPickler(sink, self._cuts, self._owners) if self._cuts else _WholePickler(sink)
        )
        auto.notice_registrations()
        try:
            pickler.dump(self._obj)
        except Exception:
            plain.let_go(sink, pickler)
            raise
        return sink, pickler

    def last(self) -> list[Piece]:
        """Write the last chunk; nothing may change the object until the chunk has been sent.

        Returns:
            Pieces, of which large ones are views of the live object's memory.

        Raises:
            NotSerializable: Something cannot travel; names the path to it.
        """
        self._round = None
        with plain.collector_off():
            return self._last()

    def _last(self) -> list[Piece]:
        if self._classes_changed():
            for cut in list(self._cuts.values()):
                self._forget_cut(cut)
        trials = 0
        while True:
            try:
                found = Last(list(self._cuts.values()), self._owners)
                sink, pickler = self._pickle_rest()
                # What it calls may have changed what was looked at before.
                if not any(map(runs_code, pickler.kinds)) or found.still_holds():
                    break
                # NB: its memo holds what it has met, which reducers would take for shared.
                plain.let_go(sink, pickler)
                trials += 1
            except Shared as shared:
                self._forget_cut(shared.cut)
            except Exception:
                return self._whole()
            if trials == TRIALS_MAX:
                return self._whole()
            # What was claimed on the way may not be claimed again.
            self._owners.clear()
            for cut in self._cuts.values():
                cut.claim_all()
        changes = {cut: found.changes[cut] for cut in found.changes if cut in pickler.met}
        listed = _listed(changes)
        if _share_too_much(listed, pickler.texts, sink.settle()):
            plain.let_go(sink, pickler)
            return self._whole()
        pieces = self._take_dropped()
        if listed:
            # In one pickle, so that what changes share is in it once, as in a snapshot.
            data = pickle.dumps(listed, PROTOCOL)
            pieces += (_OP.pack(_CHANGES, 0, 0, len(data)), data)
        for cut in changes:
            if cut.has_moved:
                pieces += self._layout(cut)
        return pieces + self._rest(sink, pickler.code_by_value)

    def _classes_changed(self) -> bool:
        """Whether what was sent of some records may be of a form that they do not have any more."""
        before, self._generation = self._generation, look_again()
        return self._generation != before

    def _whole(self) -> list[Piece]:
        """The object as a snapshot, where it cannot be had in another way."""
        snapshot = auto.encode(self._obj)
        pieces = [_OP.pack(_DROP, cut.number, 0, 0) for cut in self._cuts.values()]
        found = [
            (view, BufferKind(kind))
            for view, kind in zip(snapshot.buffers, parse_head(snapshot.head).kinds, strict=True)
        ]
        return pieces + self._with_buffers(snapshot.head, snapshot.body, found)

    def _rest(self, sink: Sink, code_by_value: bool) -> list[Piece]:
        snapshot = sink.snapshot(code_by_value=code_by_value)
        return self._with_buffers(snapshot.head, snapshot.body, sink.found)

    def _with_buffers(
        self, head: bytes, body: Piece, found: Sequence[tuple[memoryview, BufferKind]]
    ) -> list[Piece]:
        regions = [region for _, _, region in self._regions]
        dirty = dict(zip(regions, self._tracker.dirty(regions), strict=True))
        changed: list[Piece] = []
        table: list[Piece] = []
        for view, kind in found:
            size = view.nbytes
            begin = address_of(view) if size >= REGION_BYTES_MIN else 0
            for start, end, region in self._regions:
                if start <= begin and begin + size <= end:
                    offset = begin - start
                    ranges = _within(dirty[region], offset, size)
                    if sum(length for _, length in ranges) > size // 2:
                        continue  # Better taken as it comes than copied into its place.
                    for at, length in ranges:
                        piece: Piece = view[at - offset : at - offset + length]
                        if type(view.obj) is bytearray:
                            piece = bytes(piece)
                        changed += (_OP.pack(_BYTES, region.number, at, length), piece)
                    table += (
                        _OP.pack(_REFER, region.number, offset, 8),
                        size.to_bytes(8, "little"),
                    )
                    break
            else:
                if kind is BufferKind.BYTEARRAY and type(view.obj) is bytearray:
                    # A view of a live one would forbid its owner to resize it.
                    view = memoryview(bytes(view))
                table += (_OP.pack(_INLINE, 0, 0, size), view)
        rest = _OP.pack(_REST, len(found), len(head), len(head) + len(body))
        return _aligned([*changed, rest, head, body], table)


def _listed(changes: dict[Cut, list[Change]]) -> list[Any]:
    return [
        (cut.number, change.part.number, change.items, change.records)
        for cut, changed in changes.items()
        for change in changed
    ]


def _share_too_much(changes: list[Any], texts: Mapping[int, int], rest_bytes: int) -> bool:
    """Whether strings would be written twice that a snapshot has once; see TWICE_SHARE."""
    may_be = max(TWICE_BYTES_MAX, rest_bytes // TWICE_SHARE)
    if not changes or sum(texts.values()) <= may_be:
        return False
    return _TextCounter(texts).count(changes) > may_be


def _aligned(before: list[Piece], table: Sequence[Piece]) -> list[Piece]:
    """Put the entries of the table after what comes before, large buffers at multiples of 64."""
    pieces = before
    at = sum(map(len, before))
    for entry, data in zip(table[::2], table[1::2], strict=True):
        if len(data) > _ALIGNMENT:
            padding = -(at + 2 * _OP.size) % _ALIGNMENT
            pieces += (_OP.pack(_PAD, 0, 0, padding), bytes(padding))
            at += _OP.size + padding
        pieces += (entry, data)
        at += len(entry) + len(data)
    return pieces


_ALIGNMENT: Final = 64


def _within(ranges: Sequence[tuple[int, int]], offset: int, size: int) -> list[tuple[int, int]]:
    """What of some (offset, size) ranges lies within another one."""
    found = []
    for start, length in ranges:
        begin, end = max(start, offset), min(start + length, offset + size)
        if begin < end:
            found.append((begin, end - begin))
    return found


def is_small(obj: object) -> bool:
    """Whether a glance shows that nothing of an object is large enough to go ahead.

    It looks at a few plain attributes; what it does not know might be large.
    """
    kind = type(obj)
    if not kind.__dictoffset__ or isinstance(obj, type):
        return False
    try:
        pending = list(object.__getattribute__(obj, "__dict__").values())
    except AttributeError:
        return False
    for value in pending:
        kind = type(value)
        if kind is str or kind is bytes or kind is bytearray:
            if len(value) >= REGION_BYTES_MIN:
                return False
        elif kind in _CONTAINERS:
            if len(pending) + len(value) > _GLANCE:
                return False
            pending += value.values() if kind is dict else value
        elif kind not in _LEAVES:
            return False
    return True


_GLANCE: Final = 64
_CONTAINERS: Final = (dict, list, tuple, set, frozenset)


def _large_containers(root: object) -> dict[int, Any] | None:
    """Large dicts and lists that are reached through plain attributes and small containers.

    Returns:
        By id; None if there is too much to look at.
    """
    found: dict[int, Any] = {}
    pending: list[Any] = [root]
    seen: set[int] = set()
    while pending:
        obj = pending.pop()
        kind = type(obj)
        if kind in _LEAVES or id(obj) in seen:
            continue
        seen.add(id(obj))
        if len(seen) + len(pending) > WALK_OBJECTS_MAX:
            return None
        if kind is dict or kind is list:
            if len(obj) >= CUT_ITEMS_MIN:
                found[id(obj)] = obj
            elif kind is dict:
                pending += obj
                pending += obj.values()
            else:
                pending += obj
        elif kind is tuple or kind is set or kind is frozenset:
            if len(obj) <= WALK_OBJECTS_MAX:
                pending += obj
        elif not isinstance(obj, type) and kind.__dictoffset__:
            try:
                pending.append(object.__getattribute__(obj, "__dict__"))
            except AttributeError:
                continue
    return found


_LEAVES: Final = frozenset((int, str, float, bool, bytes, bytearray, type(None)))


class StreamReader:
    """Takes a stream and builds its object.

    Args:
        limit_bytes: How much all that it holds may take, as it comes in.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.taken_bytes = 0
        self._limit_bytes = limit_bytes
        self._regions: dict[int, bytearray | bytes | memoryview] = {}
        self._kinds: dict[int, int] = {}
        self._cuts: dict[int, _CutRead] = {}

    def take(self, chunk: Sequence[Buffer]) -> None:
        """Take a chunk of a round, and install what it brings.

        Args:
            chunk: Its bytes, cut anywhere. A part in writable memory may be kept, and must not be
                used otherwise afterwards.

        Raises:
            LoadFailed: It is damaged, or too large; the stream is of no use any more.
        """
        for kind, number, extra, data in self._operations(chunk):
            self._apply(kind, number, extra, data)

    def last(self, chunk: Sequence[Buffer]) -> object:
        """Take the last chunk.

        Args:
            chunk: Its bytes, cut anywhere. Arrays use parts in writable memory in place.

        Returns:
            The object.

        Raises:
            LoadFailed: It is damaged, or something that it needs is missing here.
        """
        head = body = None
        buffers: list[tuple[memoryview, tuple[int, int] | None]] = []
        count = 0
        for kind, number, extra, data in self._operations(chunk):
            if kind == _REST and head is None:
                head, body, count = data[:extra], data[extra:], number
            elif kind == _INLINE and head is not None and len(buffers) < count:
                buffers.append((data, None))
            elif kind == _PAD:
                pass
            elif kind == _REFER and head is not None and len(buffers) < count and len(data) == 8:
                size = int.from_bytes(data, "little")
                region = self._region(number)
                if extra + size > len(region):
                    raise LoadFailed("damaged: a buffer beyond its region")
                whole = memoryview(region)
                buffers.append((whole[extra : extra + size], (number, extra)))
            elif head is None:
                self._apply(kind, number, extra, data)
            else:
                raise LoadFailed("damaged: operations in an order that no writer gives them")
        if head is None or body is None or len(buffers) != count:
            raise LoadFailed("truncated: the last chunk of the stream is not whole")
        return self._load(bytes(head), body, buffers)

    def _operations(
        self, chunk: Sequence[Buffer]
    ) -> Generator[tuple[int, int, int, memoryview], None, None]:
        read = _Cursor(chunk)
        while read.left:
            kind, number, extra, size = _OP.unpack(read.take(_OP.size))
            yield kind, number, extra, read.take(size)

    def _region(self, number: int) -> bytearray | bytes | memoryview:
        region = self._regions.get(number)
        if region is None:
            raise LoadFailed("damaged: a region that was not announced")
        return region

    def _cut(self, number: int) -> _CutRead:
        cut = self._cuts.get(number)
        if cut is None:
            if len(self._cuts) >= CUTS_MAX:
                raise LoadFailed(f"damaged: more than {CUTS_MAX} containers in parts")
            cut = self._cuts[number] = _CutRead()
        return cut

    def _count(self, size: int) -> None:
        self.taken_bytes += size
        if self.taken_bytes > self._limit_bytes:
            raise LoadFailed(
                f"the stream brings more than {self._limit_bytes} bytes",
                "raise state_bytes_max here",
            )

    def _apply(self, kind: int, number: int, extra: int, data: memoryview) -> None:
        if kind == _BYTES:
            region = self._region(number)
            if extra + len(data) > len(region):
                raise LoadFailed("damaged: bytes beyond their region")
            whole = len(data) == len(region) and len(data) >= SHARED_BYTES_MIN
            if whole and not data.readonly:
                self._regions[number] = data
                return
            if type(region) is bytes:
                region = self._regions[number] = bytearray(region)
            region[extra : extra + len(data)] = data  # type: ignore[index]
        elif kind == _PART:
            cut = self._cut(number)
            self._count(len(data) - cut.sizes.get(extra, 0))
            cut.put(extra, len(data), plain.load(bytes(data), ()))
        elif kind == _CHANGES:
            self._count(len(data))
            self._change_all(plain.load(bytes(data), ()))
        elif kind == _RECORDS:
            self._cut(number).patch(extra, plain.load(bytes(data), ()))
        elif kind == _LAYOUT:
            if extra > 1 or len(data) % 4:
                raise LoadFailed("damaged: an order of parts that no writer gives")
            for size in self._cut(number).arrange(extra == 0, data):
                self._count(-size)
        elif kind == _REGION:
            if number in self._regions or len(self._regions) >= REGIONS_MAX or len(data) != 1:
                raise LoadFailed("damaged: a region announced twice, or too many of them")
            self._count(extra)
            self._kinds[number] = data[0]
            try:
                self._regions[number] = bytearray(extra)
            except (MemoryError, OverflowError) as exc:
                raise LoadFailed("this process has not enough memory for it") from exc
        elif kind == _FREE:
            region = self._regions.pop(number, b"")
            self._count(-len(region))
        elif kind == _DROP:
            dropped = self._cuts.pop(number, None)
            if dropped is not None:
                self._count(-sum(dropped.sizes.values()))
        elif kind == _ROUND:
            self._end_round()
        else:
            raise LoadFailed("damaged: an operation that no release writes")

    def _change_all(self, changes: Any) -> None:
        try:
            for number, part, items, records in changes:
                cut = self._cut(number)
                if items is None:
                    cut.patch(part, records)
                else:
                    cut.put(part, cut.sizes.get(part, 0), items)
        except (TypeError, ValueError) as exc:
            raise LoadFailed("damaged: changes that are none") from exc

    def _end_round(self) -> None:
        for cut in self._cuts.values():
            cut.build(must_be_whole=False)
        for number, region in self._regions.items():
            # What is immutable in the end must be bytes, which takes a copy: better now.
            if type(region) is not bytes and self._kinds[number] in _IMMUTABLE:
                self._regions[number] = bytes(region)

    def _load(
        self,
        packed: bytes,
        body: memoryview,
        found: Sequence[tuple[memoryview, tuple[int, int] | None]],
    ) -> object:
        head = parse_head(packed)
        head.check_loadable()
        sizes = (head.body_size_bytes, *head.buffer_sizes_bytes)
        if len(packed) != head.size_bytes or sizes != (len(body), *(len(v) for v, _ in found)):
            raise LoadFailed("damaged: the sizes of its parts are not those in its head")
        head.check_body(body)
        used: dict[int, list[tuple[int, int]]] = {}
        buffers: list[object] = []
        for (view, where), kind in zip(found, head.kinds, strict=True):
            if where is None:
                buffers.append(plain._revive(view, kind))
                continue
            number, start = where
            end = start + len(view)
            others = used.setdefault(number, [])
            if any(start < other_end and other < end for other, other_end in others):
                view = memoryview(bytearray(view))  # Two buffers that were apart stay apart.
            others.append((start, end))
            region = self._regions[number]
            is_all = len(region) == len(view) and view.obj is region
            if kind == BufferKind.BYTEARRAY and type(region) is bytearray and is_all:
                buffers.append(region)
            else:
                buffers.append(plain._revive(view, kind))
        return plain.load(body, buffers, self._resolve)

    def _resolve(self, name: Any) -> object:
        if type(name) is int:
            cut = self._cuts.get(name)
            if cut is None:
                raise LoadFailed("damaged: a container that was not written")
            return cut.build(must_be_whole=True)
        number, part, position = name
        return self._cut(number).record(part, position)


class _Cursor:
    """Reads bytes that lie in several parts.

    Attributes:
        left: Bytes not read yet.
    """

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self._parts = [view for view in map(_bytes_of, parts) if len(view)]
        self._parts.reverse()
        self.left = sum(map(len, self._parts))

    def take(self, size: int) -> memoryview:
        """The next bytes; a view of them if they lie in one part.

        Raises:
            LoadFailed: There are not as many.
        """
        if size > self.left:
            raise LoadFailed("truncated: a chunk of the stream ends within an operation")
        self.left -= size
        if not size:
            return memoryview(b"")
        part = self._parts.pop()
        if len(part) < size:
            found = bytearray(part)
            while len(found) < size:
                part = self._parts.pop()
                missing = size - len(found)
                found += part[:missing]
                size_of_rest = len(part) - missing
                part = part[missing:] if size_of_rest > 0 else part[:0]
            view = memoryview(found)
        else:
            view, part = part[:size], part[size:]
        if len(part):
            self._parts.append(part)
        return view


def _bytes_of(part: Buffer) -> memoryview:
    return memoryview(part).cast("B")


_IMMUTABLE: Final = (BufferKind.BYTES, BufferKind.READ_ONLY)


class _CutRead:
    """A cut container at its reader.

    Attributes:
        sizes: Bytes of each part's pickle, by its number.
    """

    __slots__ = ("_built", "_is_dict", "_layout", "_lists", "_parts", "sizes")

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self._parts: dict[int, Any] = {}
        self._lists: dict[int, list[Any]] = {}  # keys of a dict's part, by position
        self._layout: list[int] = []
        self._is_dict = True
        self._built: Any = None

    def put(self, number: int, size: int, items: object) -> None:
        """Install all of a part."""
        if type(items) is not dict and type(items) is not list:
            raise LoadFailed("damaged: a part that is neither a dict nor a list")
        if len(self._parts) >= PARTS_MAX:
            raise LoadFailed(f"damaged: more than {PARTS_MAX} parts in a container")
        self._parts[number] = items
        self.sizes[number] = size
        self._lists.pop(number, None)
        self._built = None

    def patch(self, number: int, records: object) -> None:
        """Install records of a part, by position."""
        items = self._parts.get(number)
        if type(records) is not dict or items is None:
            raise LoadFailed("damaged: records of a part that is not there")
        try:
            if type(items) is list:
                places: Any = list(records.items())
                self._built = None
            else:
                keys = self._keys(number)
                places = [(keys[position], value) for position, value in records.items()]
                if self._built is not None:
                    self._built.update(places)
            for at, value in places:
                items[at] = value
        except (IndexError, TypeError) as exc:
            raise LoadFailed("damaged: records at places that are none") from exc

    def _keys(self, number: int) -> list[Any]:
        keys = self._lists.get(number)
        if keys is None:
            keys = self._lists[number] = list(self._parts[number])
        return keys

    def arrange(self, is_dict: bool, numbers: memoryview) -> list[int]:
        """Put the parts in order; gives the sizes of those that are not needed any more."""
        self._is_dict = is_dict
        layout = list(struct.unpack(f"<{len(numbers) // 4}I", numbers))
        kept = set(layout)
        if len(kept) != len(layout):
            raise LoadFailed("damaged: a part that is twice in its container")
        if layout != self._layout:
            self._built = None
        self._layout = layout
        gone = [number for number in self._parts if number not in kept]
        for number in gone:
            del self._parts[number]
            self._lists.pop(number, None)
        return [self.sizes.pop(number) for number in gone]

    def build(self, *, must_be_whole: bool) -> Any:
        """The container; None if parts of it are not written yet, and need not be."""
        if self._built is None:
            built: Any = {} if self._is_dict else []
            add = built.update if self._is_dict else built.extend
            wanted = dict if self._is_dict else list
            for number in self._layout:
                items = self._parts.get(number)
                if items is None:
                    if must_be_whole:
                        raise LoadFailed("damaged: a part that was never written")
                    return None  # Not written yet.
                if type(items) is not wanted:
                    raise LoadFailed("damaged: parts of another kind than their container")
                add(items)
            self._built = built
        return self._built

    def record(self, number: int, position: int) -> object:
        """A record by its place."""
        items = self._parts[number]
        return items[self._keys(number)[position]] if type(items) is dict else items[position]


__all__ = ["Piece", "Snapshot", "StreamReader", "StreamWriter"]
