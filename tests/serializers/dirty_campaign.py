"""Random writes to random memory, and copies rebuilt from what a tracker says of them.

`python -m tests.serializers.dirty_campaign [--patterns N] [--from SEED] [--engine pages|hash]`

One pattern: slots of mapped memory, bytearrays and arrays; overlapping regions on them of one or
two trackers; rounds of operations, `dirty`, and `take` or `settle` of some of it, in pieces. The
operations write, write back, empty, map anew, move, resize and free. They happen between the
calls and, by hooks, within them: before and after each scan, and before and after each copy, which
is where a concurrent writer could do most harm. At each answer of `dirty`, what is not in the
ranges must be what was taken; at the end, the rebuilt copies must equal the memory byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serializers import dirty
from serializers.dirty import DirtyTracker, Region

PAGE = mmap.PAGESIZE
PROT_NONE = 0
PROT_RW = mmap.PROT_READ | mmap.PROT_WRITE
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MAP_FIXED = 0x10
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_DONTNEED, MADV_HUGEPAGE = 4, 14
HUGE = 2 << 20

libc: Any = ctypes.CDLL(None, use_errno=True)
if hasattr(libc, "mremap"):
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p


class Missed(AssertionError):
    """A byte that had changed was said to be clean, or a copy is wrong."""


def map_memory(
    size: int, at: int = 0, access: int = PROT_RW, flags: int = ANONYMOUS, file: int = -1
) -> int:
    """Map memory; with `at`, just there, in place of what is there."""
    address = libc.mmap(
        ctypes.c_void_p(at),
        ctypes.c_size_t(size),
        access,
        flags | (MAP_FIXED if at else 0),
        file,
        ctypes.c_size_t(0),
    )
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return int(address)


def unmap_memory(address: int, size: int) -> None:
    assert libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0


def move_memory(address: int, size: int, to: int) -> bool:
    """Move pages to an address, in place of what is there; the mapping stays, and is empty.

    Returns:
        Whether they moved: not if they are of several mappings, or of a file.
    """
    moved = libc.mremap(
        ctypes.c_void_p(address),
        ctypes.c_size_t(size),
        ctypes.c_size_t(size),
        MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
        ctypes.c_void_p(to),
    )
    return bool(moved == to)


def advise(address: int, size: int, advice: int) -> None:
    assert libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice) == 0


def write(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def address_of(buffer: bytearray) -> int:
    """Return where a bytearray's bytes are; its export is gone when this returns."""
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer)) if buffer else 0


def readable(address: int, size: int) -> bytes | None:
    """Return memory, or None if some of it cannot be read."""
    copy = ctypes.create_string_buffer(size)
    read = dirty._reader()
    assert read is not None
    return copy.raw if read(address, size, ctypes.addressof(copy)) == size else None


class Follower:
    """One region of one tracker, and the copy rebuilt from it."""

    def __init__(self, tracker: DirtyTracker, address: int, size: int) -> None:
        self.tracker = tracker
        self.region: Region = tracker.track(address, size)
        self.copy = bytearray(b"\xee" * size)
        self.ranges: list[tuple[int, int]] = []

    def check_answer(self, answer: list[tuple[int, int]]) -> None:
        size = self.region.size
        end = -1
        for offset, count in answer:
            if count <= 0 or offset <= end or offset + count > size:
                raise Missed(f"not ascending, merged and clipped: {answer} of {size}")
            end = offset + count
        self.ranges = answer
        memory = readable(self.region.address, size)
        if memory is None:
            return
        patched = bytearray(self.copy)
        for offset, count in answer:
            patched[offset : offset + count] = memory[offset : offset + count]
        if patched != memory:
            wrong = next(i for i in range(size) if patched[i] != memory[i])
            raise Missed(f"byte {wrong} of {self.region!r} ({size} bytes)")

    def take(self, offset: int, size: int) -> bool:
        data = self.tracker.take(self.region, offset, size)
        if data is None:
            if readable(self.region.address + offset, size) is not None:
                raise Missed(f"{size} readable bytes at {offset} of {self.region!r} not taken")
            return False
        self.copy[offset : offset + size] = data
        return True

    def settle(self, offset: int, size: int) -> None:
        memory = readable(self.region.address + offset, size)
        if memory is not None:
            self.copy[offset : offset + size] = memory
            self.tracker.settle(self.region, offset, size)


class Slot:
    """Mapped memory of the pattern's own."""

    def __init__(self, size: int, huge: bool) -> None:
        self.size = size
        self.mapped = size + (HUGE if huge else 0)
        self.base = map_memory(self.mapped)
        self.address = -(-self.base // HUGE) * HUGE if huge else self.base
        if huge:
            advise(self.address, size, MADV_HUGEPAGE)
        # Where a file's memory is also written, as another process would.
        self.file = -1
        self.alias = 0
        # Where pages move to.
        self.aside = map_memory(size)

    def close(self) -> None:
        unmap_memory(self.base, self.mapped)
        unmap_memory(self.aside, self.size)
        if self.file >= 0:
            unmap_memory(self.alias, self.size)
            os.close(self.file)

    def open_file(self) -> None:
        if self.file < 0:
            self.file = os.memfd_create("slot")
            os.ftruncate(self.file, self.size)
            self.alias = map_memory(self.size, flags=mmap.MAP_SHARED, file=self.file)


class Pattern:
    """One seeded run; `run` raises Missed."""

    def __init__(self, seed: int, engine: dirty.Engine) -> None:
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        chance = self.random
        huge = chance.random() < 0.02
        pages = [chance.randint(1, 48) for _ in range(chance.randint(1, 3))]
        sizes = [HUGE] if huge else [PAGE * count for count in pages]
        self.slots = [Slot(size, huge) for size in sizes]
        self.objects = [bytearray(self.size_of_object()) for _ in range(chance.randint(0, 2))]
        self.trackers = [DirtyTracker(engine)]
        if chance.random() < 0.5:
            self.trackers.append(DirtyTracker(engine if chance.random() < 0.5 else "auto"))
        self.followers: list[Follower] = []
        self.of_objects: dict[int, list[Follower]] = {}
        self.overwritten: list[tuple[int, bytes]] = []
        self.hooks = chance.choice((0.0, 0.0, 0.3))
        self.span_bytes_max = chance.choice((4 * PAGE, dirty.SPAN_BYTES_MAX))
        self.in_hook = False

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        for slot in self.slots:
            slot.close()

    def size_of_object(self) -> int:
        return self.random.choice((100, 5_000, 70_000, 300_000)) + self.random.randint(0, 5_000)

    def run(self) -> None:
        chance = self.random
        with self.hooked():
            for slot in self.slots:
                if chance.random() < 0.7:
                    write(slot.address, chance.randbytes(slot.size))
                for _ in range(chance.randint(1, 3)):
                    self.track_in(slot)
            for index in range(len(self.objects)):
                self.track_object(index)
            for _ in range(chance.randint(2, 6)):
                for _ in range(chance.randint(0, 4)):
                    self.operate()
                self.ask(self.chosen())
                for _ in range(chance.choice((0, 0, 1, 3))):
                    self.operate(between=True)
                self.send()
                if self.followers and chance.random() < 0.2:
                    follower = chance.choice(self.followers)
                    follower.take(*self.piece_of(0, follower.region.size))
        self.finish()

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Have operations happen at the worst instants within the calls."""
        if not self.hooks:
            yield
            return
        pages, written = dirty._pages, dirty._Pages.written

        def hooked_written(self_: Any, start: int, end: int) -> list[tuple[int, int]]:
            if self_ is pages:
                self.hook()
            found = written(self_, start, end)
            if self_ is pages:
                self.hook()
            return found

        def hooked_read(read: Callable[[int, int, int], int]) -> Callable[[int, int, int], int]:
            def hooked(address: int, size: int, target: int) -> int:
                self.hook()
                count = read(address, size, target)
                self.hook(others=True)
                return count

            return hooked

        reads = [tracker._read for tracker in self.trackers]
        for tracker in self.trackers:
            tracker._read = hooked_read(tracker._read)
        dirty._Pages.written = hooked_written  # type: ignore[method-assign]
        try:
            yield
        finally:
            dirty._Pages.written = written  # type: ignore[method-assign]
            for tracker, read in zip(self.trackers, reads, strict=True):
                tracker._read = read

    def hook(self, others: bool = False) -> None:
        if self.in_hook or self.random.random() >= self.hooks:
            return
        self.in_hook = True
        try:
            self.counts["hook"] += 1
            self.operate(between=True, plain=True)
            if others and self.random.random() < 0.7:
                # Another tracker of the process scans while this one copies.
                for tracker in self.trackers:
                    if not tracker._lock.locked():
                        mine = [each for each in self.followers if each.tracker is tracker]
                        tracker.dirty([each.region for each in mine])
        finally:
            self.in_hook = False

    # Regions

    def piece_of(self, start: int, size: int) -> tuple[int, int]:
        """Return a random part (start, size) of bytes; at least one of them."""
        first, last = sorted(self.random.randrange(size) for _ in range(2))
        return start + first, last - first + 1

    def track_in(self, slot: Slot) -> None:
        address, size = self.piece_of(slot.address, slot.size)
        self.followers.append(Follower(self.random.choice(self.trackers), address, size))

    def track_object(self, index: int) -> None:
        buffer = self.objects[index]
        if buffer:
            made = [
                Follower(tracker, address_of(buffer), len(buffer))
                for tracker in self.trackers
                if self.random.random() < 0.8
            ]
            self.of_objects[index] = made
            self.followers += made

    def forget(self, follower: Follower) -> None:
        self.followers.remove(follower)
        follower.tracker.untrack(follower.region)

    def chosen(self) -> list[Follower]:
        share = self.random.choice((0.3, 0.8, 1.0))
        return [each for each in self.followers if self.random.random() < share]

    # Operations

    def operate(self, between: bool = False, plain: bool = False) -> None:
        """Do something to memory; `between` calls nothing is tracked or untracked."""
        names = ["write"] * 8 + ["write_back"] * 3 + ["read_into"] * 2 + ["empty"]
        if not plain:
            names += ["map_anew", "move", "alias", "alias"]
        if not between:
            names += ["resize", "replace", "track", "untrack"]
        name = self.random.choice(names)
        self.counts[name] += 1
        getattr(self, name)()

    def place(self) -> tuple[int, int]:
        """Return some memory that can be written: (address, size)."""
        chance = self.random
        if self.objects and chance.random() < 0.3:
            buffer = chance.choice(self.objects)
            if buffer:
                return self.piece_of(address_of(buffer), len(buffer))
        slot = chance.choice(self.slots)
        address, size = self.piece_of(slot.address, slot.size)
        return address, min(size, chance.choice((1, 8, 300, 5_000, 100_000)))

    def write(self) -> None:
        address, size = self.place()
        before = readable(address, size)
        if before is not None:
            self.overwritten.append((address, before))
            write(address, self.random.randbytes(size))

    def write_back(self) -> None:
        """Write what was there before."""
        if self.overwritten:
            address, before = self.overwritten.pop()
            if readable(address, len(before)) is not None:
                write(address, before)

    def read_into(self) -> None:
        """Have the kernel write, as recv_into and readinto do."""
        address, size = self.place()
        if readable(address, size) is None:
            return
        file = os.memfd_create("source")
        try:
            os.write(file, self.random.randbytes(size))
            os.preadv(file, [(ctypes.c_char * size).from_address(address)], 0)
        finally:
            os.close(file)

    def pages_of(self, slot: Slot) -> tuple[int, int]:
        first, count = self.piece_of(0, slot.size // PAGE)
        return slot.address + first * PAGE, count * PAGE

    def empty(self) -> None:
        slot = self.random.choice(self.slots)
        advise(*self.pages_of(slot), MADV_DONTNEED)

    def map_anew(self) -> None:
        slot = self.random.choice(self.slots)
        address, size = self.pages_of(slot)
        kind = self.random.choice(("private", "private", "none", "shared", "file", "file"))
        if kind == "private":
            map_memory(size, address)
        elif kind == "none":
            map_memory(size, address, access=PROT_NONE)
        elif kind == "shared":
            map_memory(size, address, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        else:
            slot.open_file()
            flags = self.random.choice((mmap.MAP_SHARED, mmap.MAP_PRIVATE))
            map_memory(size, address, flags=flags, file=slot.file)
            if self.random.random() < 0.5:
                # A new region meets it before the older ones do.
                self.followers.append(Follower(self.random.choice(self.trackers), address, size))
                self.ask(self.followers[-1:])
                self.send()
                self.ask(self.followers)
                self.send()
                self.alias()

    def move(self) -> None:
        """Move pages away, or others in; what stays behind is empty."""
        slot = self.random.choice(self.slots)
        address, size = self.pages_of(slot)
        there = slot.aside + address - slot.address
        if readable(address, size) is None:
            return
        map_memory(size, there)
        write(there, self.random.randbytes(size))
        if self.random.random() < 0.5:
            self.counts["moved in"] += move_memory(there, size, address)
        else:
            self.counts["moved away"] += move_memory(address, size, there)

    def alias(self) -> None:
        """Write to a file, or through another mapping of it."""
        slot = self.random.choice(self.slots)
        if slot.file >= 0:
            offset, size = self.piece_of(0, slot.size)
            data = self.random.randbytes(size)
            if self.random.random() < 0.5:
                write(slot.alias + offset, data)
            else:
                os.pwrite(slot.file, data, offset)

    def resize(self) -> None:
        if not self.objects:
            return
        index = self.random.randrange(len(self.objects))
        for follower in self.of_objects.pop(index, ()):
            if follower in self.followers:
                self.forget(follower)
        self.overwritten.clear()
        buffer = self.objects[index]
        size = self.size_of_object()
        del buffer[size:]
        buffer.extend(bytes(size - len(buffer)))
        self.track_object(index)

    def replace(self) -> None:
        """Free an object; its memory goes to another one."""
        if not self.objects:
            return
        index = self.random.randrange(len(self.objects))
        old = self.of_objects.pop(index, [])
        late = self.random.random() < 0.5
        self.overwritten.clear()
        size = len(self.objects[index])
        self.objects[index] = bytearray()
        self.objects[index] = bytearray(size)
        if late:
            # The stream has not noticed yet and asks once more. Both regions are there.
            self.track_object(index)
            self.ask([each for each in old if each in self.followers], check=False)
        for follower in old:
            if follower in self.followers:
                self.forget(follower)
        if not late:
            self.track_object(index)

    def track(self) -> None:
        self.track_in(self.random.choice(self.slots))

    def untrack(self) -> None:
        if len(self.followers) > 1:
            self.forget(self.random.choice(self.followers))

    # The stream's side

    def ask(self, followers: list[Follower], check: bool = True) -> None:
        for tracker in self.trackers:
            mine = [each for each in followers if each.tracker is tracker]
            answers = tracker.dirty([each.region for each in mine])
            for follower, answer in zip(mine, answers, strict=True):
                if check and not self.hooks:
                    follower.check_answer(answer)
                follower.ranges = answer

    def send(self) -> None:
        chance = self.random
        share = chance.choice((0.3, 1.0, 1.0))
        for follower in self.followers:
            for offset, size in follower.ranges:
                if chance.random() >= share:
                    continue
                if chance.random() < 0.2:
                    self.in_hook = True
                    follower.settle(offset, size)
                    self.in_hook = False
                elif chance.random() < 0.3:
                    follower.take(*self.piece_of(offset, size))
                else:
                    middle = offset + chance.randint(0, size)
                    follower.take(offset, middle - offset)
                    follower.take(middle, offset + size - middle)
            follower.ranges = []

    def finish(self) -> None:
        """The final round: nobody writes any more."""
        self.hooks = 0.0
        self.ask(self.followers)
        for follower in self.followers:
            whole = all([follower.take(*piece) for piece in follower.ranges])
            memory = readable(follower.region.address, follower.region.size)
            if whole and memory is not None and memory != follower.copy:
                raise Missed(f"the copy of {follower.region!r}")
            self.counts["compared"] += memory is not None


# Trackers with one mechanism taken away; the campaign must find out.

Patch = Callable[[pytest.MonkeyPatch], None]
BROKEN: dict[str, tuple[dirty.Engine, Patch]] = {}


def broken(engine: dirty.Engine) -> Callable[[Patch], Patch]:
    def add(patch: Patch) -> Patch:
        BROKEN[f"{patch.__name__} ({engine})"] = engine, patch
        return patch

    return add


@broken("pages")
def arms_after_copying(patch: pytest.MonkeyPatch) -> None:
    take = DirtyTracker.take
    patch.setattr(dirty, "_PM_SCAN_WP_MATCHING", 0)

    def late(self: DirtyTracker, region: Region, offset: int, size: int) -> bytes | None:
        data = take(self, region, offset, size)
        if size and not region.hashed and not region._lost:
            first = (region.address + offset) // PAGE * PAGE
            end = -(-(region.address + offset + size) // PAGE) * PAGE
            with dirty._pages, pytest.MonkeyPatch.context() as armed, contextlib.suppress(OSError):
                armed.setattr(dirty, "_PM_SCAN_WP_MATCHING", 1)
                dirty._pages.written(first, end)
        return data

    patch.setattr(DirtyTracker, "take", late)


@broken("pages")
def credits_only_who_asked(patch: pytest.MonkeyPatch) -> None:
    scan = dirty._Pages.scan

    def narrow(self: Any, regions: list[Region]) -> None:
        everyone = self.regions
        self.regions = {each.number: each for each in regions}
        try:
            scan(self, regions)
        finally:
            self.regions = {number: each for number, each in everyone.items() if not each.hashed}

    patch.setattr(dirty._Pages, "scan", narrow)


@broken("hash")
@broken("pages")
def forgets_what_was_not_taken(patch: pytest.MonkeyPatch) -> None:
    ask = DirtyTracker.dirty
    asked: set[int] = set()

    def forgetful(self: DirtyTracker, regions: list[Region]) -> list[list[tuple[int, int]]]:
        for region in regions:
            if region.number in asked:
                region._pending = []
            asked.add(region.number)
        return ask(self, regions)

    patch.setattr(DirtyTracker, "dirty", forgetful)


@broken("hash")
@broken("pages")
def takes_more_than_was_copied(patch: pytest.MonkeyPatch) -> None:
    def whole(ranges: list[tuple[int, int]], start: int, end: int) -> None:
        ranges[:] = [each for each in ranges if each[1] <= start or end <= each[0]]

    patch.setattr(dirty, "_remove", whole)


@broken("pages")
def looks_at_whole_pages_only(patch: pytest.MonkeyPatch) -> None:
    def inner(self: Region) -> tuple[int, int]:
        start = -(-self.address // PAGE) * PAGE
        return start, max(start, (self.address + self.size) // PAGE * PAGE)

    def spans(regions: list[Region]) -> list[tuple[int, int]]:
        return dirty._joined(sorted(each for each in map(inner, regions) if each[0] < each[1]))

    patch.setattr(dirty, "_spans", spans)


@broken("pages")
def does_not_see_what_is_mapped_anew(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dirty, "_PM_SCAN_CHECK_WPASYNC", 0)


@broken("pages")
def keeps_what_was_sent_of_memory_mapped_anew(patch: pytest.MonkeyPatch) -> None:
    begun: set[int] = set()
    all_pending = Region._all_pending

    def once(self: Region) -> None:
        if self.number not in begun:
            begun.add(self.number)
            all_pending(self)

    patch.setattr(Region, "_all_pending", once)


@broken("pages")
def keeps_the_neighbours_of_memory_mapped_anew(patch: pytest.MonkeyPatch) -> None:
    credit = dirty._Pages._credit

    def narrow(self: Any, found: list[tuple[int, int]], lost: list[tuple[int, int]]) -> None:
        credit(self, found, [])
        everyone = self.regions
        for start, end in lost:
            there = [each for each in everyone.values() if start <= each.address < end]
            self.regions = {each.number: each for each in there[:1]}
            credit(self, [], [(start, end)])
        self.regions = everyone

    patch.setattr(dirty._Pages, "_credit", narrow)


def mappings_that_fit(
    fits: Callable[[bytes], bool],
) -> Callable[[], Iterator[tuple[int, int, bool]]]:
    def mappings() -> Iterator[tuple[int, int, bool]]:
        with open("/proc/self/maps", "rb") as maps:
            lines = maps.read().splitlines()
        for line in lines:
            start, _, end = line.split()[0].partition(b"-")
            yield int(start, 16), int(end, 16), fits(line)

    return mappings


@broken("pages")
def asks_the_kernel_about_shared_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        dirty,
        "_mappings",
        mappings_that_fit(lambda line: line.split()[1].endswith(b"s") or line.split()[4] == b"0"),
    )


@broken("pages")
def asks_the_kernel_about_private_files(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        dirty, "_mappings", mappings_that_fit(lambda line: line.split()[1].endswith(b"p"))
    )


@broken("pages")
def leaves_shared_memory_registered_for_others(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dirty._Pages, "_release_untrackable", lambda *arguments: None)


@broken("pages")
def does_not_see_emptied_pages(patch: pytest.MonkeyPatch) -> None:
    # Written and present.
    patch.setattr(dirty, "_PAGE_IS_WRITTEN", 2 | 8)


@broken("pages")
def credits_only_its_own_tracker(patch: pytest.MonkeyPatch) -> None:
    scan = dirty._Pages.scan
    owners: dict[int, DirtyTracker] = {}
    track = DirtyTracker.track

    def noting(self: DirtyTracker, address: int, size: int) -> Region:
        region = track(self, address, size)
        owners[region.number] = self
        return region

    def narrow(self: Any, regions: list[Region]) -> None:
        if not regions:
            return
        everyone = self.regions
        owner = owners[regions[0].number]
        self.regions = {n: each for n, each in everyone.items() if owners[n] is owner}
        try:
            scan(self, regions)
        finally:
            self.regions = {n: each for n, each in everyone.items() if not each.hashed}

    patch.setattr(DirtyTracker, "track", noting)
    patch.setattr(dirty._Pages, "scan", narrow)


@broken("pages")
def counts_as_sent_after_copying(patch: pytest.MonkeyPatch) -> None:
    sent = DirtyTracker._sent
    remember = DirtyTracker._remember

    def late(self: DirtyTracker, region: Region, offset: int, data: memoryview[int]) -> None:
        remember(self, region, offset, data)
        sent(self, region, offset, len(data))

    patch.setattr(DirtyTracker, "_remember", late)


@broken("hash")
def hashes_before_copying(patch: pytest.MonkeyPatch) -> None:
    take = DirtyTracker.take

    def early(self: DirtyTracker, region: Region, offset: int, size: int) -> bytes | None:
        self.settle(region, offset, size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DirtyTracker, "_remember", lambda *arguments: None)
            return take(self, region, offset, size)

    patch.setattr(DirtyTracker, "take", early)


@broken("hash")
def hashes_after_copying(patch: pytest.MonkeyPatch) -> None:
    take = DirtyTracker.take

    def late(self: DirtyTracker, region: Region, offset: int, size: int) -> bytes | None:
        data = take(self, region, offset, size)
        if data is not None:
            self.settle(region, offset, size)
        return data

    patch.setattr(DirtyTracker, "take", late)


@broken("hash")
def keeps_half_a_piece(patch: pytest.MonkeyPatch) -> None:
    remember = DirtyTracker._remember

    def careless(self: DirtyTracker, region: Region, offset: int, data: memoryview[int]) -> None:
        pending = list(region._pending)
        remember(self, region, offset, data)
        region._pending = pending

    patch.setattr(DirtyTracker, "_remember", careless)


@broken("hash")
def hashes_half_of_a_piece(patch: pytest.MonkeyPatch) -> None:
    digest = dirty.xxhash.xxh3_128_digest

    def half(data: memoryview[int], seed: int) -> bytes:
        return digest(data[: len(data) // 2], seed)

    patch.setattr(dirty.xxhash, "xxh3_128_digest", half)


def caught(name: str, patterns_max: int = 2_000) -> int:
    """Return how many patterns it takes to see that a mechanism is missing.

    Raises:
        AssertionError: Nothing was seen.
    """
    engine, patch = BROKEN[name]
    # Asked before patching: some of these would not pass as a kernel.
    dirty.pages_refusal()
    for seed in range(patterns_max):
        with pytest.MonkeyPatch.context() as monkeypatch:
            patch(monkeypatch)
            try:
                run_pattern(seed, engine)
            except Missed:
                return seed + 1
    raise AssertionError(f"{name}: not seen in {patterns_max} patterns")


def run_pattern(seed: int, engine: dirty.Engine) -> Counter[str]:
    """Run one pattern and return how often what happened.

    Raises:
        Missed: The tracker is wrong.
    """
    pattern = Pattern(seed, engine)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dirty, "SPAN_BYTES_MAX", pattern.span_bytes_max)
            pattern.run()
    finally:
        pattern.close()
    return pattern.counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.serializers.dirty_campaign")
    parser.add_argument("--patterns", type=int, default=10_000, help="patterns for each engine")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first seed")
    parser.add_argument("--engine", choices=("pages", "hash"), help="only this one")
    arguments = parser.parse_args()
    failed = 0
    for engine in (arguments.engine,) if arguments.engine else ("pages", "hash"):
        if engine == "pages" and dirty.pages_refusal():
            print(f"pages: not here: {dirty.pages_refusal()}")
            continue
        counts: Counter[str] = Counter()
        begin = time.perf_counter()
        for seed in range(arguments.first, arguments.first + arguments.patterns):
            try:
                counts += run_pattern(seed, engine)
            except Missed as missed:
                failed += 1
                print(f"{engine}: seed {seed}: {missed}")
        print(
            f"{engine}: {arguments.patterns} patterns in {time.perf_counter() - begin:.1f} s; "
            + ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
        )
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
