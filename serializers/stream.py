"""The state stream: an object as a snapshot that goes on as deltas, each against what was sent.

`StreamWriter` writes *chunks*, `StreamReader` takes them in the order in which they were written.
Rounds of chunks may be written while the object is in use, to send a large state ahead. A *delta*
is written while nothing changes the object, and makes of all that was sent before the object as it
is then; the stream goes on, and the next delta has only what changed since. So a standby follows
its server, and can build the object as of any delta. `last` ends the stream, as for a move: what
has to wait for it is what changed since the rounds, or since the last delta.

Two things go ahead. *Regions* are the memory of large buffers (arrays, byte strings), whose dirty
ranges `dirty.DirtyTracker` finds. *Cuts* are large dicts and lists of plain records, whose changed
records `parts.Cut` finds. All else, the *rest*, is pickled with each delta and the last chunk, and
names regions and cuts where it refers to them. What cannot go ahead goes with it, as in a snapshot.
A small object has neither regions nor cuts, and each of its deltas is a snapshot of it.

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
    CHANGES                                         pickle of samples and
                                                    [(cut, part, items, records)]
    LAYOUT   cut               0 dict, 1 list       numbers of its parts in order, 4 bytes each
    DROP     cut                                    (it is not cut any more)
    ROUND                                           (a round has ended)
    REST     buffers           size of the head     head and body of a snapshot
    INLINE                                          next buffer of the rest
    REFER    region            offset in it         size of the next buffer of the rest, 8 bytes
    PAD                                             zeros, so that what follows is aligned
    =======  ================  ===================  =====================================

Only a delta and a last chunk have a REST, once, followed by one INLINE or REFER for each of its
buffers, and then nothing else. A delta has no PART, RECORDS or ROUND.

What is found too late. New large buffers are found by pickling the rest, and are regions from then
on. Large containers that are new are looked for when the rest has grown, or when one that could not
be cut is due for another trial; so one of them may be pickled whole once before it is cut.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import re
import struct
import time
import types
from bisect import bisect_right
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias

from . import attributes, auto, memory, plain
from .auto import runs_code
from .base import BufferKind, Snapshot, parse_head
from .dirty import DirtyTracker, Region
from .errors import LoadFailed
from .fingerprints import NotPlain, look_again
from .memory import address_of
from .parts import CUT_ITEMS_MIN, Change, Cut, Instant, Part, Shared, places
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
DEARER_BYTES_MAX: Final = 1024
DEARER_SHARE: Final = 100
"""A delta, or a last chunk, may take so many bytes more than a snapshot, and one more for so many
of it; else a snapshot travels in its place. Changes and rest are pickles apart: what both of them
have is written twice, and what a snapshot names in 2 bytes, for it met it early, they may in 5."""
TRIALS_MAX: Final = 3
"""Times that the rest is pickled if doing so changes what goes ahead; then all goes as a snapshot.
"""
COPY_BYTES: Final = 1 << 20
"""Copied at a time while the object is in use."""

GROWN_BYTES_MIN: Final = 16 * 1024
"""A rest that has grown by so much and a quarter may have a container in it that can be cut."""
TRIAL_DELTAS_MIN: Final = 8
TRIAL_DELTAS_MAX: Final = 1024
"""After so many deltas a container that could not be cut is tried again, each time after twice as
many: perhaps it was only changed throughout, once. A trial takes up to five times its pickle."""
ASKED_BYTES: Final = 16
"""Containers are cut while they take so many bytes for each object of the rest, or else all are
pickled whole. Source: measured, with anything cut each object of the rest takes 0.2 us more, and a
container that is cut is looked at in a third of the 10 ns that a byte of its pickle takes."""
COLLECTED_BYTES_MIN: Final = 256 << 10
"""After so many bytes of new records a reader has the collector look at them, and it does not look
otherwise meanwhile. Source: measured, looking at so many takes 1.5 ms, and at 10 MiB of them 12;
left to chance it comes while the last chunk is loaded, and its server waits, or six times a move
of 50 MiB at all that the process has, which takes 25 to 110 ms and its other servers wait as well.
"""
NUMBERS_MAX: Final = 1 << 32

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
        named: What it has named itself, in that order.
        met: The same, and what it has named a record of.
        asked: Objects that it was to look for in containers.
        found: How many of them it found there.
        kinds: Types that it has met.
    """

    def __init__(self, sink: Sink, cuts: dict[int, Cut], owners: dict[int, Part]) -> None:
        super().__init__(sink)
        self._cuts = cuts
        self._owners = owners
        self.asked = 0
        self.found = 0
        self.met: dict[Cut, None] = {}
        self.named: dict[Cut, None] = {}
        self._places: dict[Cut, dict[int, tuple[int, int]]] = {}
        self.kinds: set[type] = set()

    def reducer_override(self, obj: Any) -> Any:
        self.kinds.add(type(obj))
        return super().reducer_override(obj)

    def persistent_id(self, obj: Any) -> Any:
        self.asked += 1
        which = id(obj)
        cut = self._cuts.get(which)
        if cut is not None:
            self.met[cut] = None
            self.named[cut] = None
            self.found += 1
            return cut.number
        part = self._owners.get(which)
        if part is None:
            return None
        cut = part.cut
        known = self._places.get(cut)
        if known is None:
            known = self._places[cut] = places(cut)
        position = known.get(which)
        if position is None:
            raise Shared(cut)  # It is not a record but within one.
        self.met[cut] = None
        self.found += 1
        return cut.number, *position


class _WholePickler(auto._AutoPickler):
    met: Mapping[Cut, None] = types.MappingProxyType({})
    named: Mapping[Cut, None] = types.MappingProxyType({})
    asked = 0
    found = 0
    kinds: frozenset[type] = frozenset()


class _Tracked(NamedTuple):
    """A region at its writer.

    Attributes:
        begin: Address of its first byte.
        end: Address behind its last one.
        region: For the tracker.
        number: Its name on the wire.
    """

    begin: int
    end: int
    region: Region
    number: int


class _Gathered(NamedTuple):
    """What there is to write at one instant.

    Attributes:
        instant: What changed in containers; None if none is cut.
        changes: By container, of those that the rest names.
        changed: The same, pickled; empty if nothing changed.
        rest: The rest.
        found: Its buffers.
        pickler: What has written that.
    """

    instant: Instant | None
    changes: dict[Cut, list[Change]]
    changed: bytes
    rest: Snapshot
    found: list[tuple[memoryview, BufferKind]]
    pickler: _RestPickler | _WholePickler


class _ApartRestPickler(attributes.Rooted, _RestPickler):
    """As `_RestPickler`, attribute by attribute."""


class _ApartWholePickler(attributes.Rooted, _WholePickler):
    """As `_WholePickler`, attribute by attribute."""


class StreamWriter:
    """Writes the stream of one object, of which there may be several at a time.

    Args:
        obj: The object.
        engine: How to find what was written to large buffers; see `DirtyTracker`.
        memory: What its reader shares, if it does.
        apart: The rest is written as `serializers.attributes` does, for `attributes.load`.

    Attributes:
        sizes: Of what was written last, `apart`: about how many bytes each attribute takes.
        rounds: How many were ended.
        round_bytes: What the present round took so far; of the last one, once it ended.
        is_open: It can be written to.
    """

    def __init__(
        self,
        obj: object,
        engine: Literal["auto", "pages", "hash"] = "auto",
        memory: Memory | None = None,
        *,
        apart: bool = False,
    ) -> None:
        self.sizes: dict[str, int] = {}
        self._apart = apart
        self.rounds = 0
        self.round_bytes = 0
        self.is_open = True
        self._obj = obj
        self._memory = memory
        self._tracker = DirtyTracker(engine)
        self._regions: list[_Tracked] = []  # by address; none overlaps another one
        self._cuts: dict[int, Cut] = {}  # by the container's id
        # By id, not held, lest they outlive their last user: which delta may try to cut it again,
        # and how many later that was than the former trial.
        self._uncut: dict[int, tuple[int, int]] = {}
        self._next_trial = _NEVER
        self._owners: dict[int, Part] = {}
        self._dropped: list[int] = []
        self._next_cut = 0
        self._next_region = 0
        self._deltas = 0
        self._is_surveyed = False
        self._rest_bytes = 0
        self._surveyed_bytes = -1  # of the rest, with all cut that could be; -1: not known yet
        self._small_bytes_max = -1  # as long as its body is no larger, a snapshot will do
        self._round: Generator[list[Piece], None, None] | None = None
        self._generation = look_again()

    def close(self) -> None:
        """Release what the stream holds; idempotent."""
        self.is_open = False
        self._small_bytes_max = -1
        self._round = None
        self._tracker.close()
        self._regions.clear()
        self._owners.clear()  # At once, not piece by piece.
        for cut in self._cuts.values():
            cut.let_go()
        self._cuts.clear()
        self._uncut.clear()
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

        Raises:
            ValueError: There was a delta, or the stream was closed.
        """
        if self._deltas or not self.is_open:
            raise ValueError("rounds come before the first delta, of a stream that is open")
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
        entries = list(self._regions)
        dirty = self._tracker.dirty([entry.region for entry in entries])
        for entry, ranges in zip(entries, dirty, strict=True):
            size = entry.end - entry.begin
            if ranges == [(0, size)] and self._can_share(size):
                yield from self._copy_shared(entry)
                continue
            for offset, length in ranges:
                yield from self._copy(entry, offset, length)
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

    def _copy(self, entry: _Tracked, offset: int, size: int) -> Generator[list[Piece], None, None]:
        for start in range(offset, offset + size, COPY_BYTES):
            length = min(COPY_BYTES, offset + size - start)
            data = self._tracker.take(entry.region, start, length)
            if data is None:
                yield self._free(entry)  # Its memory has been given back.
                return
            yield [_OP.pack(_BYTES, entry.number, start, len(data)), data]

    def _can_share(self, size: int) -> bool:
        memory = self._memory
        return (
            memory is not None
            and SHARED_BYTES_MIN <= size <= SHARED_BYTES_MAX
            and (memory.has_room())
        )

    def _copy_shared(self, entry: _Tracked) -> Generator[list[Piece], None, None]:
        """Copy all of a region to where its reader can use it in place."""
        assert self._memory is not None
        store = self._memory.store()
        size = entry.end - entry.begin
        is_written = False
        try:
            for start in range(0, size, COPY_BYTES):
                data = self._tracker.take(entry.region, start, min(COPY_BYTES, size - start))
                if data is None:
                    is_written = True
                    yield self._free(entry)
                    return
                store.write(data)
                yield []
            is_written = True
            yield [_OP.pack(_BYTES, entry.number, 0, size), store.seal()]
        finally:
            # NB: the round may be given up at any step.
            if not is_written and self.is_open:
                self._tracker.unsettle(entry.region)

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

    def _survey(self) -> int:
        """Look for large containers that are reached now, and cut those that can be.

        Returns:
            Items of those that cannot be, in all.
        """
        self._is_surveyed = True
        self._next_trial = _NEVER
        if self._classes_changed():
            for cut in list(self._cuts.values()):
                self._drop_cut(cut)
            self._uncut.clear()
        found = _large_containers(self._obj)
        if found is None:
            if self._deltas:
                self._next_trial = self._deltas + TRIAL_DELTAS_MAX
                return 0
            found = {}
        for which, cut in list(self._cuts.items()):
            if which not in found:
                self._drop_cut(cut)
        for which in self._uncut.keys() - found.keys():
            del self._uncut[which]
        for which, container in found.items():
            if which in self._cuts or len(self._cuts) >= CUTS_MAX:
                continue
            due, _ = self._uncut.get(which, (0, 0))
            if due > self._deltas:
                self._next_trial = min(self._next_trial, due)
                continue
            try:
                self._cuts[which] = Cut(self._next_cut, container, self._owners)
                self._next_cut += 1
            except Exception:  # Not plain; or what its classes define failed.
                self._leave_whole(which)
        return sum([len(found[which]) for which in found.keys() - self._cuts.keys()])

    def look(self, whole_items_max: int | None = None) -> list[Piece]:
        """Find the large buffers, by a trial of the last chunk; call it before the first step.

        Args:
            whole_items_max: No trial if large containers that cannot be cut have more items. By
                default there is one: it stops the server for a while, and all the less in the end.

        Returns:
            The beginning of the stream, to be sent before what the first `step` gives.
        """
        if not plain.stack_is_safe() or _large_containers(self._obj) is None:
            return []
        whole_items = self._survey()
        if whole_items_max is not None and whole_items > whole_items_max:
            return []
        try:
            sink, _ = self._pickle_rest()
        except Exception:
            # It may be ready to travel in the end.
            return []
        found = sink.found
        if self._memory is not None:
            # Of what travels by reference nothing needs to be copied.
            travels = self._memory.travels
            found = [entry for entry in found if not (_is_large(entry[0]) and travels(entry[0]))]
        return self._announce(_spans(found))

    # -- regions

    def _holder(self, begin: int, end: int) -> _Tracked | None:
        """The region in which some memory lies."""
        at = bisect_right(self._regions, begin, key=_begin) - 1
        if at >= 0 and end <= self._regions[at].end:
            return self._regions[at]
        return None

    def _announce(self, spans: Sequence[tuple[int, int, BufferKind]]) -> list[Piece]:
        """Track memory that is not tracked yet, and nothing that is of no more use."""
        if [span[:2] for span in spans] == [entry[:2] for entry in self._regions]:
            return []
        used = dict.fromkeys(self._regions, 0)
        outgrown: set[_Tracked] = set()
        for begin, end, _ in spans:
            holder = self._holder(begin, end)
            if holder is not None:
                used[holder] += end - begin
                continue
            at = bisect_right(self._regions, begin, key=_begin)
            for entry in self._regions[max(0, at - 1) :]:
                if entry.begin >= end:
                    break
                if begin < entry.end:
                    outgrown.add(entry)
        pieces: list[Piece] = []
        for entry, size in used.items():
            # Little of it is left, between which anything may lie.
            if entry in outgrown or 2 * size < entry.end - entry.begin:
                pieces += self._free(entry)
        for begin, end, kind in spans:
            if self._holder(begin, end) is None and len(self._regions) < REGIONS_MAX:
                region = self._tracker.track(begin, end - begin)
                number = self._new_number()
                entry = _Tracked(begin, end, region, number)
                self._regions.insert(bisect_right(self._regions, begin, key=_begin), entry)
                pieces += (_OP.pack(_REGION, number, end - begin, 1), bytes((kind,)))
        return pieces

    def _new_number(self) -> int:
        used = {entry.number for entry in self._regions} if self._next_region >= NUMBERS_MAX else ()
        while True:
            number = self._next_region % NUMBERS_MAX
            self._next_region += 1
            if number not in used:
                return number

    def _free(self, entry: _Tracked) -> list[Piece]:
        self._regions.remove(entry)
        self._tracker.untrack(entry.region)
        return [_OP.pack(_FREE, entry.number, 0, 0)]

    @property
    def is_worth_it(self) -> bool:
        """Whether anything was found that can go ahead."""
        return bool(self._regions or self._cuts)

    def _forget_cut(self, cut: Cut) -> None:
        """Pickle a container whole from now on, until it is tried again."""
        which = id(cut.container)
        if self._cuts.get(which) is cut:
            self._drop_cut(cut)
            self._leave_whole(which)

    def _drop_cut(self, cut: Cut) -> None:
        del self._cuts[id(cut.container)]
        cut.release()
        self._dropped.append(cut.number)

    def _leave_whole(self, which: int) -> None:
        _, wait = self._uncut.get(which, (0, TRIAL_DELTAS_MIN // 2))
        wait = min(2 * wait, TRIAL_DELTAS_MAX)
        # At the same deltas as others, for which all is looked through.
        due = (self._deltas // wait + 1) * wait
        self._uncut[which] = due, wait
        self._next_trial = min(self._next_trial, due)

    def _claim_anew(self) -> None:
        """What was claimed for what was not written may not be claimed any more."""
        self._owners.clear()
        for cut in self._cuts.values():
            cut.claim_all()

    # -- one instant

    def _gather(self, *, goes_on: bool) -> _Gathered | Snapshot | None:
        """Look at all that is cut, and pickle the rest.

        Returns:
            That; or a snapshot, which is smaller; or None if nothing may go but a snapshot.
        """
        if self._cuts and self._classes_changed():
            for cut in list(self._cuts.values()):
                self._forget_cut(cut)
        trials = 0
        while True:
            instant = None
            try:
                if self._cuts:
                    cuts = list(self._cuts.values())
                    instant = Instant(cuts, self._owners, goes_on=goes_on)
                sink, pickler = self._pickle_rest()
            except Shared as shared:
                self._forget_cut(shared.cut)
            except Exception:
                self._claim_anew()
                return None
            else:
                # NB: what is reached through its records alone must not be held.
                strays = pickler.met.keys() - pickler.named.keys() if goes_on else ()
                # What was called may have changed what was looked at before.
                is_quiet = instant is None or not any(map(runs_code, pickler.kinds))
                if not strays and (is_quiet or (instant is not None and instant.still_holds())):
                    break
                # NB: its memo holds what it has met, which reducers would take for shared.
                plain.let_go(sink, pickler)
                for cut in strays:
                    self._forget_cut(cut)
                trials += not strays
            self._claim_anew()
            if trials == TRIALS_MAX:
                return None
        rest = sink.snapshot(code_by_value=pickler.code_by_value)
        if instant is None:
            return _Gathered(None, {}, b"", rest, sink.found, pickler)
        # In the order of a snapshot, which gives those that come early shorter names.
        changes = {cut: instant.changes[cut] for cut in {**pickler.named, **pickler.met}}
        gathered = _Gathered(instant, changes, _pickled(changes), rest, sink.found, pickler)
        lesser = self._lesser(gathered)
        if lesser is not gathered:
            plain.let_go(sink, pickler)
            self._claim_anew()
        return lesser

    def _lesser(self, gathered: _Gathered) -> _Gathered | Snapshot | None:
        """What was gathered, or a snapshot in its place if that takes less; see DEARER_SHARE.

        A snapshot is made only if what it takes at least leaves that open.

        Returns:
            One of them; None if the one is of no use any more, and the other one failed.
        """
        instant, changes, changed, rest, _, pickler = gathered
        assert instant is not None
        pickled = len(rest.body) + len(changed)
        moved = [cut for cut in changes if cut.has_moved]
        dropped = len(self._dropped) + len(self._cuts) - len(changes)
        size = pickled + _OP.size * (2 + len(moved) + dropped)
        size += 4 * sum([len(cut.parts) for cut in moved])
        # At worst all that one of them has is in both, and each name takes 5 bytes, not 2.
        twice = min(len(rest.body), len(changed)) + _NAME_BYTES_MAX * pickler.found
        twice += instant.extra_bytes_max(changes)
        for closely in (False, True):
            names = _long_names(rest.body, closely) + _long_names(changed, closely)
            left = instant.unchanged_bytes_min(changes, closely=closely)
            if not _is_dearer(size, pickled + left - twice - 3 * names):
                return gathered
        pickler.clear_memo()  # Reducers would take what it holds for shared.
        whole = None
        # It may be too deep a nesting, that is none in parts.
        with contextlib.suppress(Exception):
            whole = self._encode()
        if whole is not None and _is_dearer(size, len(whole.body)):
            return whole
        # What was called may have changed what was looked at before.
        is_quiet = not any(map(runs_code, pickler.kinds))
        return gathered if is_quiet or instant.still_holds() else whole

    def _pickle_rest(self) -> tuple[Sink, _RestPickler | _WholePickler]:
        if not plain.stack_is_safe():
            raise RecursionError("too deep a nesting would overflow the stack")
        sink = Sink()
        # Nothing changes meanwhile, so bytearrays need not be copied to be looked at.
        sink.view_of = memoryview
        pickler: _RestPickler | _WholePickler
        if self._cuts:
            kind = _ApartRestPickler if self._apart else _RestPickler
            pickler = kind(sink, self._cuts, self._owners)
        else:
            pickler = (_ApartWholePickler if self._apart else _WholePickler)(sink)
        auto.notice_registrations()
        try:
            if isinstance(pickler, attributes.Rooted):
                self._write_apart(sink, pickler)
            else:
                pickler.dump(self._obj)
        except Exception:
            plain.let_go(sink, pickler)
            raise
        return sink, pickler

    def _write_apart(self, sink: Sink, pickler: Any) -> None:
        if self._cuts:
            pickler.kinds.add(type(self._obj))  # It is asked for its state without being met.
        sizes: dict[str, int] = {}
        told: set[Cut] = set()
        for name, written in attributes.write(self._obj, pickler, sink):
            new = pickler.named.keys() - told
            told |= new
            size = written + sum([cut.about_bytes for cut in new])
            sizes[name] = sizes.get(name, 0) + size
        self.sizes = sizes

    def _encode(self) -> Snapshot:
        """The object as a snapshot."""
        if not self._apart:
            return auto.encode(self._obj)
        snapshot, self.sizes = attributes.encode(self._obj)
        return snapshot

    def _take_changes(self, gathered: _Gathered) -> list[Piece]:
        pieces = self._take_dropped()
        if gathered.changed:
            pieces += (_OP.pack(_CHANGES, 0, 0, len(gathered.changed)), gathered.changed)
        for cut in gathered.changes:
            if cut.has_moved:
                pieces += self._layout(cut)
        return pieces

    # -- a delta

    def delta(self) -> list[Piece]:
        """Write what changed since the last delta; nothing may change the object meanwhile.

        The first one writes all that the rounds did not, or all.

        Returns:
            Pieces that are of no use to the object any more: it may change before they are sent.
            They have to reach the reader, or the stream has to be closed.

        Raises:
            NotSerializable: Something cannot travel; names the path to it. What this delta would
                have brought, the next one will.
            ValueError: The stream was closed.
        """
        whole = None
        if self._small_bytes_max >= 0:
            whole = self._encode()
            if len(whole.body) <= self._small_bytes_max and not whole.buffers:
                self._deltas += 1
                return _whole_chunk(whole)
            self._small_bytes_max = -1
        if not self.is_open:
            raise ValueError("this stream was closed")
        self._round = None
        if self._is_survey_due():
            self._survey()
        if self._cuts or self._regions or self._dropped:
            whole = None
        else:
            whole = whole or self._encode()
            if not whole.buffers:
                self._deltas += 1
                self._note_rest(len(whole.body))
                if self._next_trial == _NEVER:
                    self._small_bytes_max = self._grown_bytes()
                return _whole_chunk(whole)
            if any(map(_is_large, whole.buffers)):
                whole = None  # From here on they are regions.
        with plain.collector_off():
            gathered = whole or self._gather(goes_on=True) or self._encode()
            try:
                pieces = self._commit(gathered)
            except BaseException:
                self.close()  # Nobody knows what was noted as written.
                raise
        self._deltas += 1
        return pieces

    def _note_rest(self, size_bytes: int) -> None:
        self._rest_bytes = size_bytes
        if self._is_surveyed or not 0 <= self._surveyed_bytes <= size_bytes:
            self._is_surveyed = False
            self._surveyed_bytes = size_bytes

    def _is_survey_due(self) -> bool:
        if self._next_trial <= self._deltas:
            return True
        if self._surveyed_bytes < 0:
            return not self._is_surveyed and not is_small(self._obj)
        return self._rest_bytes > self._grown_bytes()

    def _grown_bytes(self) -> int:
        """From which size on the rest may have something in it that can be cut."""
        return self._surveyed_bytes + self._surveyed_bytes // 4 + GROWN_BYTES_MIN

    def _commit(self, gathered: _Gathered | Snapshot) -> list[Piece]:
        """From here on all of it counts as written."""
        if isinstance(gathered, Snapshot):
            for cut in list(self._cuts.values()):
                self._forget_cut(cut)
            pieces = self._take_dropped()
            snapshot, found = gathered, _buffers_of(gathered)
            # Those of bytearrays are copies, which nobody will have kept when the next delta comes.
            spans = _spans([entry for entry in found if entry[1] is not BufferKind.BYTEARRAY])
        else:
            for cut in list(self._cuts.values()):
                if cut not in gathered.pickler.named:
                    self._drop_cut(cut)  # The object does not have it any more.
            pieces = self._take_changes(gathered)
            instant, _, _, snapshot, found, pickler = gathered
            spans = _spans(found)
            if instant is not None:
                self._commit_cuts(instant, gathered.changes)
                about_bytes = sum([cut.about_bytes for cut in self._cuts.values()])
                if about_bytes < ASKED_BYTES * pickler.asked:
                    for cut in list(self._cuts.values()):
                        self._forget_cut(cut)
        self._note_rest(len(snapshot.body))
        head, body = snapshot.head, snapshot.body
        rest = _OP.pack(_REST, len(found), len(head), len(head) + len(body))
        if not found and not self._regions:
            return [*pieces, rest, head, body]
        changed = self._commit_regions(spans)
        table: list[Piece] = []
        for view, _ in found:
            size = view.nbytes
            begin = address_of(view) if _is_large(view) else 0
            entry = self._holder(begin, begin + size)
            if entry is None:
                table += (_OP.pack(_INLINE, 0, 0, size), _kept(view))
            else:
                refer = _OP.pack(_REFER, entry.number, begin - entry.begin, 8)
                table += (refer, size.to_bytes(8, "little"))
        return _aligned([*pieces, *changed, rest, head, body], table)

    def _commit_cuts(self, instant: Instant, changes: dict[Cut, list[Change]]) -> None:
        is_plain = True
        for cut in changes:
            try:
                instant.commit(cut)
            except NotPlain:
                is_plain = False
                self._forget_cut(cut)  # This delta is right; the next one brings it whole.
                continue
            if cut.next_part > NUMBERS_MAX - PARTS_MAX:
                self._drop_cut(cut)
                self._next_trial = 0  # Under another number, with parts that begin at 0.
        if not is_plain:
            self._claim_anew()

    def _commit_regions(self, spans: Sequence[tuple[int, int, BufferKind]]) -> list[Piece]:
        changed = self._announce(spans)
        entries = list(self._regions)
        regions = [entry.region for entry in entries]
        dirty = dict(zip(entries, self._tracker.dirty(regions), strict=True))
        for begin, end, _ in spans:
            entry = self._holder(begin, end)
            if entry is None:
                continue
            for at, length in _within(dirty[entry], begin - entry.begin, end - begin):
                data = self._tracker.take(entry.region, at, length)
                if data is None:
                    # Nobody but its owner can read it.
                    changed += self._free(entry)
                    break
                changed += (_OP.pack(_BYTES, entry.number, at, length), data)
        return changed

    # -- the last chunk

    def last(self) -> list[Piece]:
        """Write the last chunk; nothing may change the object until the chunk has been sent.

        Returns:
            Pieces, of which large ones are views of the live object's memory.

        Raises:
            NotSerializable: Something cannot travel; names the path to it.
            ValueError: The stream was closed.
        """
        if not self.is_open:
            raise ValueError("this stream was closed")
        self._round = None
        with plain.collector_off():
            gathered = self._gather(goes_on=False) or self._encode()
            if isinstance(gathered, Snapshot):
                # What cannot be had in another way, or takes less so.
                pieces = [_OP.pack(_DROP, cut.number, 0, 0) for cut in self._cuts.values()]
                return pieces + self._with_buffers(gathered, _buffers_of(gathered))
            return self._take_changes(gathered) + self._with_buffers(gathered.rest, gathered.found)

    def _classes_changed(self) -> bool:
        """Whether what was sent of some records may be of a form that they do not have any more."""
        before, self._generation = self._generation, look_again()
        return self._generation != before

    def _with_buffers(
        self, snapshot: Snapshot, found: Sequence[tuple[memoryview, BufferKind]]
    ) -> list[Piece]:
        head, body = snapshot.head, snapshot.body
        entries = list(self._regions)
        regions = [entry.region for entry in entries]
        dirty = dict(zip(entries, self._tracker.dirty(regions), strict=True))
        changed: list[Piece] = []
        table: list[Piece] = []
        for view, kind in found:
            size = view.nbytes
            begin = address_of(view) if _is_large(view) else 0
            entry = self._holder(begin, begin + size)
            offset = 0 if entry is None else begin - entry.begin
            ranges = [] if entry is None else _within(dirty[entry], offset, size)
            # If most of it is new, it is better taken as it comes than copied into its place.
            if entry is not None and sum(length for _, length in ranges) <= size // 2:
                for at, length in ranges:
                    piece: Piece = view[at - offset : at - offset + length]
                    if type(view.obj) is bytearray:
                        piece = bytes(piece)
                    changed += (_OP.pack(_BYTES, entry.number, at, length), piece)
                refer = _OP.pack(_REFER, entry.number, offset, 8)
                table += (refer, size.to_bytes(8, "little"))
                continue
            if kind is BufferKind.BYTEARRAY and type(view.obj) is bytearray:
                # A view of a live one would forbid its owner to resize it.
                view = memoryview(memory.copied_bytes(view))
            table += (_OP.pack(_INLINE, 0, 0, size), view)
        rest = _OP.pack(_REST, len(found), len(head), len(head) + len(body))
        return _aligned([*changed, rest, head, body], table)


_NEVER: Final = 1 << 62


def _whole_chunk(snapshot: Snapshot) -> list[Piece]:
    """The chunk of a snapshot without buffers, where nothing else is held."""
    head, body = snapshot.head, snapshot.body
    return [_OP.pack(_REST, 0, len(head), len(head) + len(body)), head, body]


def _begin(entry: _Tracked) -> int:
    return entry.begin


def _is_large(view: memoryview) -> bool:
    return view.nbytes >= REGION_BYTES_MIN


def _spans(
    found: Sequence[tuple[memoryview, BufferKind]],
) -> list[tuple[int, int, BufferKind]]:
    """Where the large buffers lie, by address; those that share memory are one."""
    spans: list[tuple[int, int, BufferKind]] = []
    places = [(address_of(view), view.nbytes, kind) for view, kind in found if _is_large(view)]
    for begin, size, kind in sorted(places):
        end = begin + size
        if spans and begin < spans[-1][1]:
            first, other_end, other_kind = spans[-1]
            # As immutable memory its reader would copy it for each change.
            kind = kind if kind is other_kind else BufferKind.WRITABLE
            spans[-1] = first, max(end, other_end), kind
        else:
            spans.append((begin, end, kind))
    return spans


def _kept(view: memoryview) -> Piece:
    """The bytes of a buffer as they are now, whatever becomes of it."""
    return view if type(view.obj) is bytes else bytes(view)


def _buffers_of(snapshot: Snapshot) -> list[tuple[memoryview, BufferKind]]:
    kinds = parse_head(snapshot.head).kinds
    return [(view, BufferKind(kind)) for view, kind in zip(snapshot.buffers, kinds, strict=True)]


def _sample(change: Change) -> Any:
    """A record of those that are written."""
    held: Any = change.records if change.items is None else change.items
    return next(iter(held.values() if type(held) is dict else held))


def _pickled(changes: dict[Cut, list[Change]]) -> bytes:
    """What a CHANGES has; empty if nothing changed."""
    listed = [
        (cut.number, change.part.number, change.items, change.records)
        for cut, changed in changes.items()
        for change in changed
    ]
    if not listed:
        return b""
    # In one pickle, so that what changes share is in it once, as in a snapshot. Names of what was
    # met early are shorter; in a snapshot the rest may have met its like before.
    samples = [_sample(changed[0]) for changed in changes.values() if changed]
    return pickle.dumps((samples, listed), PROTOCOL)


_NAME_BYTES_MAX: Final = 16
"""What a container or a record takes in the rest, by its place: three numbers and three codes."""


def _long_names(data: Piece, closely: bool) -> int:
    """At most so many names of 5 bytes are in a pickle."""
    held: Any = data.obj if type(data) is memoryview else data
    if closely and len(held) < 1 << 24:
        return len(_LONG_NAME.findall(held))
    return int(held.count(b"j"))


_LONG_NAME: Final = re.compile(rb"j(?=...\0)", re.DOTALL)
"""LONG_BINGET, with the number of one of less than 1 << 24 objects."""


def _is_dearer(size_bytes: int, snapshot_bytes: int) -> bool:
    """Whether something takes more than it may, and a snapshot at least so much."""
    may_be_more = max(0, snapshot_bytes) // DEARER_SHARE + DEARER_BYTES_MAX
    return size_bytes > snapshot_bytes + may_be_more


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


_Operation: TypeAlias = tuple[int, int, int, memoryview]


class _Rest(NamedTuple):
    """What a delta or a last chunk ends with.

    Attributes:
        head: Of a snapshot, packed.
        body: Its pickle.
        buffers: Each as it came, or as (region, offset, size).
    """

    head: bytes
    body: bytes | memoryview
    buffers: list[memoryview | tuple[int, int, int]]


Load: TypeAlias = Callable[[bytes | memoryview, Sequence[object], plain.Resolve], object]
"""Builds an object from a body, its buffers and what gives the objects that it names."""


class StreamReader:
    """Takes a stream and builds its object.

    Args:
        limit_bytes: How much all that it holds may take, as it comes in.

    Attributes:
        taken_bytes: What it holds.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.taken_bytes = 0
        self._limit_bytes = limit_bytes
        self._regions: dict[int, memory.Memory] = {}
        self._shared: set[int] = set()  # regions that an object which was built has, too
        self._kinds: dict[int, int] = {}
        self._cuts: dict[int, _CutRead] = {}
        self._kept: _Rest | None = None
        self._kept_bytes = 0
        self._uncollected_bytes = 0  # of new records
        self._flaw = ""  # why no further chunk is taken

    def take(self, chunk: Sequence[Buffer]) -> None:
        """Take a chunk of a round, and install what it brings.

        Args:
            chunk: Its bytes, cut anywhere. A part in writable memory may be kept, and must not be
                used otherwise afterwards.

        Raises:
            LoadFailed: It is damaged, or too large; the stream is of no use any more.
        """
        self._check_open()
        self._flaw = "a chunk could not be taken"
        with plain.collector_off():
            for kind, number, extra, data in self._operations(chunk):
                given: Any = data
                if kind == _REGION:
                    given = self._announced(number, extra, data, self._regions, self._room())
                elif kind == _CHANGES or self._kept is not None:
                    raise LoadFailed("damaged: an operation that no round has")
                self._apply(kind, number, extra, given)
                if self._room() < 0:
                    raise self._too_large()
                if kind == _PART:
                    self._uncollected_bytes += len(data)
                    if self._uncollected_bytes >= COLLECTED_BYTES_MIN:
                        self._collect()
        self._flaw = ""

    def last(self, chunk: Sequence[Buffer]) -> object:
        """Take the last chunk; the reader is used up afterwards.

        Args:
            chunk: Its bytes, cut anywhere. Arrays use parts in writable memory in place.

        Returns:
            The object.

        Raises:
            LoadFailed: It is damaged, or something that it needs is missing here.
        """
        self._check_open()
        self._flaw = _USED_UP
        self._kept = None
        with plain.collector_off():
            operations, rest = self._parted(chunk)
            for operation in self._checked(operations, rest, self._limit_bytes):
                self._apply(*operation)
            return self._load(rest)

    # -- a stream that goes on

    @property
    def is_whole(self) -> bool:
        """Whether there is an object to build: that of the last delta that was kept."""
        return self._kept is not None

    def keep(self, chunk: Sequence[Buffer]) -> None:
        """Take a delta, wholly or not at all.

        Args:
            chunk: As for `take`.

        Raises:
            LoadFailed: It is damaged, too large, or something of its records is missing here. No
                further chunk is taken, but what was kept before can be built.
        """
        self._check_open()
        self._flaw = "a delta could not be kept"
        operations, rest = self._parted(chunk)
        kept = _Rest(rest.head, bytes(rest.body), list(map(_own, rest.buffers)))
        growth = len(kept.head) + len(kept.body) - self._kept_bytes
        growth += sum([0 if isinstance(part, tuple) else len(part) for part in kept.buffers])
        checked = self._checked(operations, kept, self._room() - growth)
        # Nothing of this can fail, unless in a way that was not thought of.
        self._kept = None
        self._kept_bytes += growth
        self.taken_bytes += growth
        for operation in checked:
            self._apply(*operation)
        self._kept = kept
        self._flaw = ""

    def build(self, load: Load = plain.load) -> object:
        """Build the object as of the last delta that was kept; the reader is used up afterwards.

        Args:
            load: How; `attributes.load` for what was written `apart`.

        Raises:
            LoadFailed: There is none, or something that it needs is missing here.
        """
        kept = self._kept
        if kept is None:
            raise LoadFailed(self._flaw or "no delta was kept")
        self._kept = None
        self._flaw = _USED_UP
        return self._load(kept, load)

    def rehearse(self) -> object:
        """Build the object as `build` would, of copies: the reader goes on as it is.

        Raises:
            LoadFailed: There is none, or something that it needs is missing here.
        """
        if self._kept is None:
            raise LoadFailed(self._flaw or "no delta was kept")
        other = StreamReader(self._limit_bytes)
        for number, region in self._regions.items():
            if type(region) is bytes:
                self._shared.add(number)
                other._regions[number] = region
            else:
                other._regions[number] = memory.copied(region, self._kinds[number])
        other._kinds = self._kinds
        other._cuts = {number: cut.copy() for number, cut in self._cuts.items()}
        head, body, buffers = self._kept
        # What is read-only is copied when it is used.
        views = [part if isinstance(part, tuple) else part.toreadonly() for part in buffers]
        other._kept = _Rest(head, body, list(views))
        return other.build()

    def _check_open(self) -> None:
        if self._flaw:
            raise LoadFailed(f"the stream is of no use any more: {self._flaw}")

    def _parted(self, chunk: Sequence[Buffer]) -> tuple[list[_Operation], _Rest]:
        """What comes before the rest, and the rest."""
        before: list[_Operation] = []
        head = body = None
        buffers: list[memoryview | tuple[int, int, int]] = []
        count = 0
        for operation in self._operations(chunk):
            kind, number, extra, data = operation
            if kind == _PAD:
                pass
            elif kind == _REST and head is None:
                head, body, count = data[:extra], data[extra:], number
            elif head is None:
                before.append(operation)
            elif kind == _INLINE and len(buffers) < count:
                buffers.append(data)
            elif kind == _REFER and len(buffers) < count and len(data) == 8:
                buffers.append((number, extra, int.from_bytes(data, "little")))
            else:
                raise LoadFailed("damaged: operations in an order that no writer gives them")
        if head is None or body is None or len(buffers) != count:
            raise LoadFailed("truncated: a chunk of the stream is not whole")
        return before, _Rest(bytes(head), body, buffers)

    def _checked(
        self, operations: Sequence[_Operation], rest: _Rest, room: int
    ) -> list[tuple[int, int, int, Any]]:
        """Load what has to be loaded, and check all against what is held.

        Args:
            operations: What comes before the rest.
            rest: The rest.
            room: Bytes that may come in.

        Returns:
            Operations for `_apply`, none of which can fail.
        """
        found: list[tuple[int, int, int, Any]] = []
        sizes: dict[int, Any] = dict(self._regions)
        brought: dict[int, dict[int, Any]] = {}  # parts, by cut and number
        for kind, number, extra, data in operations:
            given: Any = data
            if kind == _BYTES:
                if extra + len(data) > len(sizes.get(number, b"")):
                    raise LoadFailed("damaged: bytes beyond their region")
            elif kind == _REGION:
                given = self._announced(number, extra, data, sizes, room)
                sizes[number] = given[1]
                room -= extra
            elif kind == _FREE:
                room += len(sizes.pop(number, b""))
            elif kind == _CHANGES:
                given = _Changes(plain.load(bytes(data), ()), len(data))
                room -= given.check(self._cuts, brought)
            elif kind == _LAYOUT:
                cut = self._cuts.get(number) or _CutRead()
                room += cut.check_order(extra, data, brought.get(number, {}))
            elif kind == _DROP:
                cut = self._cuts.get(number) or _CutRead()
                room += sum(cut.sizes.values())
            else:
                raise LoadFailed("damaged: an operation that only rounds have")
            found.append((kind, number, extra, given))
        if brought and len(self._cuts.keys() | brought.keys()) > CUTS_MAX:
            raise LoadFailed(f"damaged: more than {CUTS_MAX} containers in parts")
        if room < 0:
            raise self._too_large()
        head = parse_head(rest.head)
        head.check_loadable()
        held = [part[2] if isinstance(part, tuple) else len(part) for part in rest.buffers]
        if len(rest.head) != head.size_bytes or (
            (head.body_size_bytes, *head.buffer_sizes_bytes) != (len(rest.body), *held)
        ):
            raise LoadFailed("damaged: the sizes of its parts are not those in its head")
        for part in rest.buffers:
            if isinstance(part, tuple) and part[1] + part[2] > len(sizes.get(part[0], b"")):
                raise LoadFailed("damaged: a buffer beyond its region")
        head.check_body(rest.body)
        return found

    def _announced(
        self, number: int, size: int, data: memoryview, regions: Mapping[int, Any], room: int
    ) -> tuple[int, memory.Memory]:
        """Kind and memory of a new region."""
        if number in regions or len(regions) >= REGIONS_MAX or len(data) != 1:
            raise LoadFailed("damaged: a region announced twice, or too many of them")
        if size > room:
            raise self._too_large()
        try:
            return data[0], memory.blank(size, data[0])
        except (MemoryError, OverflowError) as exc:
            raise LoadFailed("this process has not enough memory for it") from exc

    def _room(self) -> int:
        return self._limit_bytes - self.taken_bytes

    def _too_large(self) -> LoadFailed:
        return LoadFailed(
            f"the stream brings more than {self._limit_bytes} bytes",
            "raise state_bytes_max here",
        )

    def _operations(
        self, chunk: Sequence[Buffer]
    ) -> Generator[tuple[int, int, int, memoryview], None, None]:
        read = _Cursor(chunk)
        while read.left:
            kind, number, extra, size = _OP.unpack(read.take(_OP.size))
            yield kind, number, extra, read.take(size)

    def _region(self, number: int) -> memory.Memory:
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

    def _apply(self, kind: int, number: int, extra: int, data: Any) -> None:
        """Do what an operation says.

        Args:
            kind: Which it is.
            number: Of its region or cut.
            extra: As in its head.
            data: Its bytes; of a REGION what `_announced` gave, of CHANGES what `_Changes` is.
        """
        if kind == _BYTES:
            self._write(number, extra, data)
        elif kind == _PART:
            cut = self._cut(number)
            self.taken_bytes += len(data) - cut.sizes.get(extra, 0)
            cut.put(extra, len(data), plain.load(bytes(data), ()))
        elif kind == _CHANGES:
            for where, part, items, records, size in data.listed:
                cut = self._cut(where)
                self.taken_bytes += size - cut.sizes.get(part, 0)
                if items is None:
                    cut.patch(part, records)
                    cut.sizes[part] = size
                else:
                    cut.put(part, size, items)
        elif kind == _RECORDS:
            self._cut(number).patch(extra, plain.load(bytes(data), ()))
        elif kind == _LAYOUT:
            if extra > 1 or len(data) % 4:
                raise LoadFailed("damaged: an order of parts that no writer gives")
            self.taken_bytes -= self._cut(number).arrange(extra == 0, data)
        elif kind == _REGION:
            self._kinds[number], self._regions[number] = data
            self.taken_bytes += extra
        elif kind == _FREE:
            self.taken_bytes -= len(self._regions.pop(number, b""))
            self._shared.discard(number)
        elif kind == _DROP:
            dropped = self._cuts.pop(number, None)
            if dropped is not None:
                self.taken_bytes -= sum(dropped.sizes.values())
        elif kind == _ROUND:
            for cut in self._cuts.values():
                cut.build(must_be_whole=False)
            if self._uncollected_bytes and self.taken_bytes >= COLLECTED_BYTES_MIN:
                self._collect()
        else:
            raise LoadFailed("damaged: an operation that no release writes")

    def _collect(self) -> None:
        self._uncollected_bytes = 0
        gc.collect(_YOUNG)

    def _write(self, number: int, offset: int, data: memoryview) -> None:
        region = self._region(number)
        if offset + len(data) > len(region):
            raise LoadFailed("damaged: bytes beyond their region")
        kind = self._kinds[number]
        is_whole = len(data) == len(region)
        if is_whole and len(data) >= SHARED_BYTES_MIN and not data.readonly and kind not in _OWN:
            self._regions[number] = data
            return
        if number in self._shared:
            self._shared.remove(number)
            region = self._regions[number] = memory.copied(region, kind)
        memory.write(region, offset, data)

    def _load(self, rest: _Rest, load: Load = plain.load) -> object:
        """Build the object of a rest that was checked."""
        used: dict[int, list[tuple[int, int]]] = {}
        buffers: list[object] = []
        for part, kind in zip(rest.buffers, parse_head(rest.head).kinds, strict=True):
            if not isinstance(part, tuple):
                buffers.append(plain._revive(part, kind))
                continue
            number, start, size = part
            end = start + size
            region = self._region(number)
            view = memoryview(region)[start:end]
            others = used.setdefault(number, [])
            if any(start < other_end and other < end for other, other_end in others):
                # Two buffers that were apart stay apart.
                view = memoryview(memory.copied(view, kind))
            others.append((start, end))
            is_all = len(region) == size and view.obj is region
            if kind == BufferKind.BYTEARRAY and type(region) is bytearray and is_all:
                buffers.append(region)
            else:
                buffers.append(plain._revive(view, kind))
        return load(rest.body, buffers, self._resolve)

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


def _own(part: memoryview | tuple[int, int, int]) -> memoryview | tuple[int, int, int]:
    """A buffer that keeps no more alive than itself."""
    if isinstance(part, tuple) or (len(part) >= SHARED_BYTES_MIN and not part.readonly):
        return part
    return memoryview(bytes(part))


_YOUNG: Final = 1
"""The older one of the generations that are collected again and again."""
_USED_UP: Final = "its object was built"
_OWN: Final = (BufferKind.BYTES, BufferKind.BYTEARRAY)
"""Kinds of what an object of that type has to hold itself."""


class _Changes:
    """Changes of containers, loaded.

    Attributes:
        listed: For each part that changed: cut, part, all items or None, else records by position,
            and about what the pickle of the part takes now; after `check`.
    """

    def __init__(self, loaded: Any, size: int) -> None:
        self.listed: list[tuple[int, int, Any, Any, int]] = []
        self._loaded = loaded
        self._size = size

    def check(self, cuts: Mapping[int, _CutRead], brought: dict[int, dict[int, Any]]) -> int:
        """See whether they can be applied.

        Args:
            cuts: What is there.
            brought: Parts, by cut and number, to which whole ones are added.

        Returns:
            By how many bytes what is held grows, about.

        Raises:
            LoadFailed: They cannot.
        """
        growth = 0
        try:
            _, listed = self._loaded
            changed = [items or records for _, _, items, records in listed]
            per_record = self._size / max(1, sum(map(len, changed)))
            for number, part, items, records in listed:
                if type(number) is not int or type(part) is not int:
                    raise LoadFailed("damaged: changes of what has no number")
                cut = cuts.get(number) or _CutRead()
                before = cut.sizes.get(part, 0)
                mine = brought.setdefault(number, {})
                if items is None:
                    there = mine.get(part, cut.parts.get(part))
                    if type(records) is not dict or not there:
                        raise LoadFailed("damaged: records of a part that is not there")
                    if records and not _are_places(records, len(there)):
                        raise LoadFailed("damaged: records at places that are none")
                    size = int(before + len(records) * (per_record - before / len(there)))
                elif type(items) is dict or type(items) is list:
                    mine[part] = items
                    size = int(per_record * len(items))
                    if len(cut.parts) + len(mine) > PARTS_MAX:
                        raise LoadFailed(f"damaged: more than {PARTS_MAX} parts in a container")
                else:
                    raise LoadFailed("damaged: a part that is neither a dict nor a list")
                growth += size - before
                self.listed.append((number, part, items, records, size))
        except (TypeError, ValueError) as exc:
            raise LoadFailed("damaged: changes that are none") from exc
        return growth


def _are_places(records: dict[Any, Any], count: int) -> bool:
    """Whether records stand at positions among so many."""
    return {int}.issuperset(map(type, records)) and min(records) >= 0 and max(records) < count


class _CutRead:
    """A cut container at its reader.

    Attributes:
        parts: Items of each part, by its number.
        sizes: Bytes of its pickle.
    """

    __slots__ = ("_built", "_is_dict", "_layout", "_lists", "parts", "sizes")

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.parts: dict[int, Any] = {}
        self._lists: dict[int, list[Any]] = {}  # keys of a dict's part, by position
        self._layout: list[int] = []
        self._is_dict = True
        self._built: Any = None

    def put(self, number: int, size: int, items: object) -> None:
        """Install all of a part."""
        if type(items) is not dict and type(items) is not list:
            raise LoadFailed("damaged: a part that is neither a dict nor a list")
        if len(self.parts) >= PARTS_MAX:
            raise LoadFailed(f"damaged: more than {PARTS_MAX} parts in a container")
        self.parts[number] = items
        self.sizes[number] = size
        self._lists.pop(number, None)
        self._built = None

    def patch(self, number: int, records: object) -> None:
        """Install records of a part, by position."""
        items = self.parts.get(number)
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
            keys = self._lists[number] = list(self.parts[number])
        return keys

    def copy(self) -> _CutRead:
        """Another one with records of its own."""
        other = _CutRead()
        other.parts = pickle.loads(pickle.dumps(self.parts, PROTOCOL))
        other.sizes = dict(self.sizes)
        other._is_dict = self._is_dict
        other._layout = self._layout
        return other

    def check_order(self, kind: int, numbers: memoryview, brought: Mapping[int, Any]) -> int:
        """See whether parts can be put in an order.

        Args:
            kind: 0: they are of a dict, 1: of a list.
            numbers: Of the parts.
            brought: Those that are new.

        Returns:
            Bytes of those that are held and not needed any more.

        Raises:
            LoadFailed: They cannot.
        """
        if kind > 1 or len(numbers) % 4:
            raise LoadFailed("damaged: an order of parts that no writer gives")
        wanted = list if kind else dict
        layout = _order(numbers)
        for number in layout:
            items = brought.get(number, self.parts.get(number))
            if items is None:
                raise LoadFailed("damaged: a part that was never written")
            if type(items) is not wanted:
                raise LoadFailed("damaged: parts of another kind than their container")
        kept = set(layout)
        return sum(size for number, size in self.sizes.items() if number not in kept)

    def arrange(self, is_dict: bool, numbers: memoryview) -> int:
        """Put the parts in order; gives the bytes of those that are not needed any more."""
        self._is_dict = is_dict
        layout = _order(numbers)
        kept = set(layout)
        if layout != self._layout:
            self._built = None
        self._layout = layout
        gone = [number for number in self.parts if number not in kept]
        for number in gone:
            del self.parts[number]
            self._lists.pop(number, None)
        return sum([self.sizes.pop(number) for number in gone])

    def build(self, *, must_be_whole: bool) -> Any:
        """The container; None if parts of it are not written yet, and need not be."""
        if self._built is None:
            built: Any = {} if self._is_dict else []
            add = built.update if self._is_dict else built.extend
            wanted = dict if self._is_dict else list
            for number in self._layout:
                items = self.parts.get(number)
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
        items = self.parts[number]
        return items[self._keys(number)[position]] if type(items) is dict else items[position]


def _order(numbers: memoryview) -> list[int]:
    order = list(struct.unpack(f"<{len(numbers) // 4}I", numbers))
    if len(set(order)) != len(order):
        raise LoadFailed("damaged: a part that is twice in its container")
    return order


__all__ = ["Piece", "Snapshot", "StreamReader", "StreamWriter"]
