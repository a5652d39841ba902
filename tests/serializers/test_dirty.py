"""No write is missed, whatever happens to the memory; see dirty_campaign.py for random ones."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import mmap
import os
import pathlib
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from rpc import shared_memory
from serializers import dirty
from serializers.dirty import DirtyTracker, Region
from serializers.errors import TrackingUnavailable
from tests.serializers import dirty_campaign as campaign
from tests.serializers.dirty_campaign import (
    ANONYMOUS,
    PAGE,
    PROT_NONE,
    address_of,
    advise,
    map_memory,
    move_memory,
    unmap_memory,
    write,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")

NO_PAGES = dirty.pages_refusal()
needs_pages = pytest.mark.skipif(bool(NO_PAGES), reason=f"the pages engine: {NO_PAGES}")
ENGINES = [pytest.param("pages", marks=needs_pages), "hash"]
both_engines = pytest.mark.parametrize("engine", ENGINES)

Mapped = Callable[..., int]


@pytest.fixture
def mapped() -> Iterator[Mapped]:
    """Map memory that the test owns: mapped(pages) -> address."""
    made: list[tuple[int, int]] = []

    def make(pages: int, **arguments: Any) -> int:
        made.append((map_memory(pages * PAGE, **arguments), pages * PAGE))
        return made[-1][0]

    yield make
    for address, size in made:
        unmap_memory(address, size)


def take_all(tracker: DirtyTracker, *regions: Region) -> None:
    for region, ranges in zip(regions, tracker.dirty(regions), strict=True):
        for offset, size in ranges:
            assert tracker.take(region, offset, size) is not None


def sent(tracker: DirtyTracker, address: int, size: int, alone: bool = True) -> Region:
    """Track memory and send all of it; `alone` if its pages hold nothing else."""
    region = tracker.track(address, size)
    take_all(tracker, region)
    assert not alone or tracker.dirty([region]) == [[]]
    return region


def covers(ranges: list[tuple[int, int]], offset: int, size: int = 1) -> bool:
    return any(first <= offset and offset + size <= first + count for first, count in ranges)


def registered() -> list[str]:
    """The mappings of this process that the kernel tracks."""
    found, mapping = [], ""
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("VmFlags:"):
            if " uw" in line:
                found.append(mapping)
        elif "-" in line.split()[0]:
            mapping = line
    return found


def descriptors() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if "userfaultfd" in target or "pagemap" in target:
                found.append(target)
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    gc.collect()
    assert registered() == [] and descriptors() == []
    assert dirty._pages.regions == {}


# What a caller sees


@both_engines
def test_all_of_a_region_is_dirty_at_first_and_until_it_is_taken(engine: Any, mapped: Mapped):
    address = mapped(40) + 100
    with DirtyTracker(engine) as tracker:
        region = tracker.track(address, 30 * PAGE)

        assert tracker.dirty([region]) == tracker.dirty([region]) == [[(0, 30 * PAGE)]]

        assert tracker.take(region, 1_000, 50_000) == bytes(50_000)
        assert tracker.dirty([region]) == [[(0, 1_000), (51_000, 30 * PAGE - 51_000)]]


@both_engines
def test_only_what_is_written_is_dirty_again(engine: Any, mapped: Mapped):
    address = mapped(100)
    with DirtyTracker(engine) as tracker:
        region = sent(tracker, address, 100 * PAGE)

        write(address + 50 * PAGE + 7, b"x")

        [[(offset, size)]] = tracker.dirty([region])
        assert covers([(offset, size)], 50 * PAGE + 7)
        assert size == (PAGE if engine == "pages" else dirty.CHUNK_BYTES)
        assert tracker.dirty([region]) == [[(offset, size)]]
        tracker.settle(region, offset, size)
        assert tracker.dirty([region]) == [[]]
        write(address + 50 * PAGE + 7, b"y")
        assert tracker.dirty([region]) == [[(offset, size)]]


@both_engines
def test_a_range_is_never_outside_its_region(engine: Any, mapped: Mapped):
    address = mapped(3)
    with DirtyTracker(engine) as tracker:
        region = sent(tracker, address + PAGE - 5, PAGE + 10)

        write(address, bytes([1]) * 3 * PAGE)

        assert tracker.dirty([region]) == [[(0, PAGE + 10)]]


@both_engines
def test_a_page_that_regions_share_is_dirty_for_each_whoever_asks_first(
    engine: Any, mapped: Mapped
):
    address = mapped(4)
    with DirtyTracker(engine) as tracker, DirtyTracker(engine) as other:
        left = sent(tracker, address, PAGE + 100)
        right = sent(tracker, address + PAGE + 100, PAGE)
        across = sent(other, address + PAGE, PAGE)

        write(address + PAGE + 98, b"abcd")

        for each, region in ((tracker, left), (other, across), (tracker, right)):
            [ranges] = each.dirty([region])
            assert covers(ranges, address + PAGE + 99 - region.address) or covers(
                ranges, address + PAGE + 100 - region.address
            )


@both_engines
def test_regions_of_nothing_and_ranges_of_nothing(engine: Any, mapped: Mapped):
    address = mapped(1)
    with DirtyTracker(engine) as tracker:
        empty, inner = tracker.track(address, 0), tracker.track(address + 5, 0)
        region = tracker.track(address, PAGE)

        for _ in range(2):
            assert tracker.dirty([empty, inner, region]) == [[], [], [(0, PAGE)]]
            assert tracker.dirty([]) == []
            assert tracker.take(empty, 0, 0) == b""
            assert tracker.take(region, 5, 0) == b""
            tracker.settle(region, PAGE, 0)
            tracker.settle(region, 7, 0)


@both_engines
def test_wrong_use_is_refused(engine: Any, mapped: Mapped):
    address = mapped(1)
    with DirtyTracker(engine) as tracker, DirtyTracker(engine) as other:
        region = tracker.track(address, PAGE)
        for offset, size in ((-1, 2), (0, PAGE + 1), (PAGE, 1), (5, -1)):
            with pytest.raises(ValueError, match="are not in"):
                tracker.take(region, offset, size)
            with pytest.raises(ValueError, match="are not in"):
                tracker.settle(region, offset, size)
        with pytest.raises(ValueError, match="not tracked here"):
            other.dirty([region])
        tracker.untrack(region)
        tracker.untrack(region)
        with pytest.raises(ValueError, match="not tracked here"):
            tracker.take(region, 0, 1)
        with pytest.raises(ValueError, match="not memory"):
            tracker.track(address, -1)
    tracker.close()
    with pytest.raises(ValueError, match="closed"):
        tracker.track(address, 1)
    with pytest.raises(ValueError, match="engine is"):
        DirtyTracker("soft-dirty")  # type: ignore[arg-type]


# How objects come and go


@both_engines
def test_objects_are_neither_held_nor_exported(engine: Any):
    buffer = bytearray(100_000)
    array = np.zeros(100_000, dtype="u1")
    before = sys.getrefcount(array), sys.getrefcount(buffer)
    with DirtyTracker(engine) as tracker:
        regions = [
            sent(tracker, address_of(buffer), len(buffer), alone=False),
            sent(tracker, array.ctypes.data, array.nbytes, alone=False),
        ]
        assert (sys.getrefcount(array), sys.getrefcount(buffer)) == before

        buffer.extend(b"more" * 100_000)
        array.resize(300_000)
        del array

        tracker.dirty(regions)


@both_engines
@pytest.mark.parametrize("size", [60_000, 3_000_000], ids=["from the heap", "mapped alone"])
def test_memory_that_another_object_reuses_is_followed_as_memory(engine: Any, size: int):
    # The allocator mostly gives the same memory again; an arena of our own always does.
    arena = bytearray(size)
    makers: list[Callable[[], Any]] = [lambda: np.empty(size, dtype="u1")] * 20
    makers += [lambda: np.frombuffer(arena, dtype="u1")]
    reused = 0
    with DirtyTracker(engine) as tracker:
        for round_, make in enumerate(makers):
            first = make()
            first[:] = round_
            address = first.ctypes.data
            region = sent(tracker, address, size, alone=False)
            del first
            second = make()
            second[:] = 0
            if second.ctypes.data == address:
                reused += 1
                copy = bytearray([round_]) * size
                for offset, count in tracker.dirty([region])[0]:
                    copy[offset : offset + count] = tracker.take(region, offset, count) or b""
                assert copy == second.tobytes()
            tracker.untrack(region)
            del second
    assert reused


@both_engines
def test_resized_arrays_are_followed(engine: Any):
    chance = random.Random(5)
    buffer = bytearray(b"a" * 50_000)
    with DirtyTracker(engine) as tracker:
        region = tracker.track(address_of(buffer), len(buffer))
        copy = bytearray(len(buffer))
        for _ in range(40):
            if (address_of(buffer), len(buffer)) != (region.address, region.size):
                tracker.untrack(region)
                region = tracker.track(address_of(buffer), len(buffer))
                copy = bytearray(len(buffer))
            for offset, size in tracker.dirty([region])[0]:
                copy[offset : offset + size] = tracker.take(region, offset, size) or b""
            assert copy == buffer
            if chance.random() < 0.5:
                size = chance.choice((10, 50_000, 200_000, 2_000_000))
                del buffer[size:]
                buffer.extend(chance.randbytes(size - len(buffer)))
            else:
                place = chance.randrange(len(buffer))
                buffer[place : place + 8] = bytes(len(buffer[place : place + 8]))


# What happens to memory


@both_engines
def test_memory_that_is_gone_is_none_and_no_fault(engine: Any, mapped: Mapped):
    address = mapped(64)
    with DirtyTracker(engine) as tracker:
        region = sent(tracker, address, 64 * PAGE)
        map_memory(8 * PAGE, address + 20 * PAGE, access=PROT_NONE)

        [ranges] = tracker.dirty([region])

        assert covers(ranges, 20 * PAGE, 8 * PAGE)
        assert tracker.take(region, 19 * PAGE, 2 * PAGE) is None
        tracker.settle(region, 20 * PAGE, PAGE) if engine == "hash" else None
        assert covers(tracker.dirty([region])[0], 20 * PAGE, 8 * PAGE)
        assert tracker.take(region, 0, 20 * PAGE) == bytes(20 * PAGE)


@both_engines
def test_unmapped_memory_is_none_and_dirty_when_something_is_mapped_there(engine: Any):
    # Reserved wholly by this test, so that nobody else maps memory in the hole.
    address = map_memory(64 * PAGE)
    with DirtyTracker(engine) as tracker:
        write(address, b"\x01" * 64 * PAGE)
        region = sent(tracker, address, 64 * PAGE)
        unmap_memory(address, 64 * PAGE)
        gone = tracker.take(region, 0, 64 * PAGE)
        map_memory(64 * PAGE, address)

        assert gone is None
        assert tracker.dirty([region]) == [[(0, 64 * PAGE)]]
        assert tracker.take(region, 0, 64 * PAGE) == bytes(64 * PAGE)
        write(address + 5, b"x")
        assert covers(tracker.dirty([region])[0], 5)
    unmap_memory(address, 64 * PAGE)


@both_engines
def test_memory_mapped_anew_is_dirty_though_nobody_wrote(engine: Any, mapped: Mapped):
    address = mapped(64)
    write(address, b"\x01" * 64 * PAGE)
    with DirtyTracker(engine) as tracker:
        region = sent(tracker, address, 64 * PAGE)
        map_memory(PAGE, address + 33 * PAGE)

        [ranges] = tracker.dirty([region])
        assert covers(ranges, 33 * PAGE, PAGE)
        # It is registered and armed by the same call: once is enough.
        for offset, size in ranges:
            tracker.take(region, offset, size)
        assert tracker.dirty([region]) == [[]]
        write(address + 33 * PAGE, b"x")
        assert covers(tracker.dirty([region])[0], 33 * PAGE)


@both_engines
def test_pages_moved_in_or_away_are_dirty(engine: Any, mapped: Mapped):
    here, there = mapped(16), mapped(16)
    write(here, b"\x01" * 16 * PAGE)
    write(there, b"\x02" * 16 * PAGE)
    with DirtyTracker(engine) as tracker:
        region = sent(tracker, here, 16 * PAGE)

        assert move_memory(here + PAGE, PAGE, there)
        assert covers(tracker.dirty([region])[0], PAGE, PAGE)
        take_all(tracker, region)
        assert move_memory(there + 3 * PAGE, PAGE, here + 3 * PAGE)
        assert covers(tracker.dirty([region])[0], 3 * PAGE, PAGE)


@both_engines
def test_emptied_pages_are_dirty(engine: Any, mapped: Mapped):
    address = mapped(1_100)
    write(address, b"\x01" * 1_100 * PAGE)
    with DirtyTracker(engine) as tracker:
        region = sent(tracker, address, 1_100 * PAGE)

        # One page, and some 512 of them with the page table that they have alone.
        advise(address + 3 * PAGE, PAGE, mmap.MADV_DONTNEED)
        advise(address + 20 * PAGE, 1_050 * PAGE, mmap.MADV_DONTNEED)

        [ranges] = tracker.dirty([region])
        assert covers(ranges, 3 * PAGE, PAGE) and covers(ranges, 20 * PAGE, 1_050 * PAGE)


@both_engines
def test_pages_that_were_never_touched(engine: Any, mapped: Mapped):
    address = mapped(1_100)
    with DirtyTracker(engine) as tracker:
        region = tracker.track(address, 1_100 * PAGE)
        tracker.dirty([region])
        tracker.settle(region, 0, region.size)
        assert tracker.dirty([region]) == [[]]

        write(address + 700 * PAGE, b"x")

        assert covers(tracker.dirty([region])[0], 700 * PAGE)


@both_engines
def test_huge_pages(engine: Any):
    size = 4 << 20
    base = map_memory(2 * size)
    address = -(-base // size) * size
    advise(address, size, campaign.MADV_HUGEPAGE)
    write(address, b"\x01" * size)
    with DirtyTracker(engine) as tracker:
        # One that begins and ends amid huge pages, and one of whole ones.
        inner = sent(tracker, address + PAGE + 1, size - 3 * PAGE)
        outer = sent(tracker, address, size)
        for offset in (PAGE + 1, size // 2 - 1, size // 2, size - 2 * PAGE):
            write(address + offset, b"\x02")
            for region in (inner, outer):
                assert covers(tracker.dirty([region])[0], address + offset - region.address)
            take_all(tracker, inner, outer)
        advise(address + size // 2, size // 2, mmap.MADV_DONTNEED)
        assert covers(tracker.dirty([outer])[0], size // 2, size // 2)
        assert covers(tracker.dirty([inner])[0], size // 2, size // 4)
    unmap_memory(base, 2 * size)


@both_engines
def test_memory_made_read_only_and_writable_again(engine: Any):
    memory = mmap.mmap(-1, 8 * PAGE, flags=ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    with DirtyTracker(engine) as tracker:
        libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(8 * PAGE), mmap.PROT_READ)
        region = sent(tracker, address, 8 * PAGE)
        libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(8 * PAGE), campaign.PROT_RW)
        write(address + 5 * PAGE, b"x")

        assert covers(tracker.dirty([region])[0], 5 * PAGE)


# Memory of files, and shared


@contextlib.contextmanager
def a_file(size: int) -> Iterator[int]:
    file = os.memfd_create("test")
    try:
        os.pwrite(file, b"\x01" * size, 0)
        yield file
    finally:
        os.close(file)


@both_engines
def test_shared_memory_that_another_process_writes_to(engine: Any):
    with (
        a_file(16 * PAGE) as file,
        mmap.mmap(file, 16 * PAGE) as shared,
        DirtyTracker(engine) as tracker,
    ):
        address = address_of(shared)  # type: ignore[arg-type]
        region = sent(tracker, address, 16 * PAGE)

        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import mmap; mmap.mmap({file}, 0)[{9 * PAGE}] = 7",
            ],
            pass_fds=[file],
            check=True,
        )

        assert covers(tracker.dirty([region])[0], 9 * PAGE)
        assert region.hashed


@both_engines
@pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
@pytest.mark.parametrize("access", [mmap.PROT_READ, campaign.PROT_RW])
def test_a_file_that_changes_beneath_its_mapping(
    engine: Any, flags: int, access: int, mapped: Mapped
):
    with a_file(16 * PAGE) as file, DirtyTracker(engine) as tracker:
        address = mapped(16, flags=flags, file=file, access=access)
        region = sent(tracker, address, 16 * PAGE)

        os.pwrite(file, b"x", 9 * PAGE)

        assert covers(tracker.dirty([region])[0], 9 * PAGE)
        if access & mmap.PROT_WRITE:
            write(address + 3, b"y")
            assert covers(tracker.dirty([region])[0], 3)
        # A file that becomes shorter takes its memory away.
        os.ftruncate(file, 0)
        assert tracker.take(region, 0, PAGE) is None
        tracker.dirty([region])


@needs_pages
def test_memory_that_becomes_shared_while_it_is_registered_is_hashed(
    monkeypatch: pytest.MonkeyPatch, mapped: Mapped
):
    address = mapped(4)
    register = dirty._Pages.register

    def replaced(self: Any, start: int, end: int) -> None:
        if self is dirty._pages:
            register(self, start, end)
            map_memory(4 * PAGE, address, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)

    monkeypatch.setattr(dirty._Pages, "register", replaced)
    with DirtyTracker("pages") as tracker:
        region = tracker.track(address, 4 * PAGE)
        tracker.dirty([region])

        assert region.hashed


@needs_pages
@pytest.mark.parametrize("kind", ["shared", "private"])
def test_memory_that_is_replaced_once_its_mapping_was_looked_at_is_noticed(
    kind: str, monkeypatch: pytest.MonkeyPatch, mapped: Mapped
):
    address = mapped(4)
    mappings = dirty._mappings
    turns = itertools.count()

    def replaced() -> list[tuple[int, int, bool]]:
        found = list(mappings())
        if next(turns) == 0:
            shared = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
            map_memory(4 * PAGE, address, flags=shared if kind == "shared" else ANONYMOUS)
        return found

    monkeypatch.setattr(dirty, "_mappings", replaced)
    with DirtyTracker("pages") as tracker:
        region = tracker.track(address, 4 * PAGE)
        take_all(tracker, region)
        write(address, b"x")

        assert covers(tracker.dirty([region])[0], 0)
        assert region.hashed == (kind == "shared")


@needs_pages
@pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_memory_of_a_file_that_another_region_meets_first_is_noticed(flags: int, mapped: Mapped):
    address = mapped(16)
    with a_file(16 * PAGE) as file, DirtyTracker("pages") as tracker:
        region = sent(tracker, address, 16 * PAGE)
        map_memory(8 * PAGE, address + 4 * PAGE, flags=flags, file=file)
        # The kernel is asked to track it for this one, which is then hashed.
        late = tracker.track(address + 2 * PAGE, 11 * PAGE)
        take_all(tracker, late)
        assert late.hashed
        # More than once: reading pages of a file maps others of it, which looks like writing.
        for _ in range(3):
            take_all(tracker, region)

        os.pwrite(file, b"x", 5 * PAGE)

        assert covers(tracker.dirty([region])[0], 9 * PAGE)


# Who writes


@both_engines
def test_what_the_kernel_writes_is_dirty(engine: Any, mapped: Mapped):
    address = mapped(64)
    near, far = socket.socketpair()
    with a_file(5) as file, near, far, DirtyTracker(engine) as tracker:
        region = sent(tracker, address, 64 * PAGE)

        os.preadv(file, [(ctypes.c_char * 5).from_address(address + 3 * PAGE - 2)], 0)
        far.send(b"abc")
        near.recv_into((ctypes.c_char * 3).from_address(address + 40 * PAGE))

        [ranges] = tracker.dirty([region])
        assert covers(ranges, 3 * PAGE - 2, 5) and covers(ranges, 40 * PAGE, 3)


@both_engines
def test_a_thread_that_never_stops_writing(engine: Any, mapped: Mapped):
    """Each page holds counters that only grow; a copy older than a scan must not stay."""
    pages = 48
    address = mapped(pages)
    array = np.frombuffer((ctypes.c_char * (pages * PAGE)).from_address(address), dtype="u8")
    stop, written = threading.Event(), threading.Event()

    def writes() -> None:
        chance = np.random.default_rng(3)
        while not stop.is_set():
            array[chance.integers(0, len(array), 50)] += 1
            written.set()

    copy = np.zeros_like(array)
    writer = threading.Thread(target=writes)
    with DirtyTracker(engine) as tracker:
        region = tracker.track(address, pages * PAGE)
        writer.start()
        try:
            for _ in range(60):
                written.clear()
                follow(tracker, region, copy)
                assert written.wait(60)
        finally:
            stop.set()
            writer.join()
        follow(tracker, region, copy)
    assert array.any() and (copy == array).all()


def follow(tracker: DirtyTracker, region: Region, copy: Any) -> None:
    target = copy.view("u1")
    for offset, size in tracker.dirty([region])[0]:
        data = tracker.take(region, offset, size)
        assert data is not None
        target[offset : offset + size] = np.frombuffer(data, dtype="u1")


FORKING = """
import os, sys
from serializers import dirty
from serializers.dirty import DirtyTracker
from tests.serializers.dirty_campaign import PAGE, map_memory, write
from tests.serializers.test_dirty import covers, descriptors, registered, sent

engine = sys.argv[1]
address = map_memory(64 * PAGE)
tracker = DirtyTracker(engine)
region = sent(tracker, address, 64 * PAGE)
reader, writer = os.pipe()
with tracker._lock:
    # As if another thread used it; that thread is not in the child.
    child = os.fork()
if child == 0:
    os.close(writer)
    try:
        assert descriptors() == [] and registered() == [], descriptors()
        for call in (lambda: tracker.dirty([region]), lambda: tracker.track(address, 1)):
            try:
                call()
            except ValueError:
                pass
            else:
                raise AssertionError("used in a child")
        tracker.close()
        with DirtyTracker(engine) as own:
            mine = sent(own, address, 64 * PAGE)
            write(address + 9 * PAGE, b"child")
            assert covers(own.dirty([mine])[0], 9 * PAGE)
            # The parent has written meanwhile, and closed.
            assert os.read(reader, 1) == b""
            assert own.take(mine, 0, 1) == b"\\0"
        assert descriptors() == []
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
write(address, b"parent")
assert tracker.dirty([region])[0] != [] and covers(tracker.dirty([region])[0], 0)
assert not covers(tracker.dirty([region])[0], 30 * PAGE)
assert tracker.take(region, 0, 6) == b"parent"
tracker.close()
assert registered() == [] and descriptors() == []
os.close(writer)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@both_engines
def test_a_forked_child_has_its_own_memory_and_none_of_the_trackers(engine: Any):
    # In a process of its own, which has no threads.
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FORKING, engine], cwd=root, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr


# What is held in the kernel


@needs_pages
def test_nothing_is_opened_before_it_is_needed_or_kept_after(mapped: Mapped):
    address = mapped(4)
    with DirtyTracker("pages") as tracker:
        region = tracker.track(address, PAGE)
        assert descriptors() == []
        tracker.dirty([region])
        assert len(descriptors()) == 2 and len(registered()) == 1
        assert not any(
            os.get_inheritable(each) for each in (dirty._pages._userfaultfd, dirty._pages._pagemap)
        )
        tracker.untrack(region)
        assert descriptors() == registered() == []
        tracker.dirty([tracker.track(address, PAGE)])
    assert descriptors() == registered() == []


@needs_pages
def test_a_tracker_that_is_dropped_releases_everything(mapped: Mapped):
    address = mapped(4)
    kept = DirtyTracker("pages")
    dropped = DirtyTracker("pages")
    region = sent(kept, address, PAGE)
    sent(dropped, address + 2 * PAGE, PAGE)
    assert len(dirty._pages.regions) == 2

    # As if the collector ran while a call is under way.
    with dirty._pages:
        del dropped
        gc.collect()
        assert len(dirty._pages.regions) == 2

    assert len(dirty._pages.regions) == 1
    write(address, b"x")
    assert kept.dirty([region]) == [[(0, PAGE)]]
    kept.close()


@needs_pages
def test_releasing_one_region_leaves_the_pages_of_others_armed(mapped: Mapped):
    address = mapped(4)
    with DirtyTracker("pages") as tracker, DirtyTracker("pages") as other:
        left = sent(tracker, address, PAGE + 10)
        right = sent(other, address + PAGE + 10, PAGE)
        inner = sent(other, address + PAGE, 5)
        tracker.untrack(left)

        assert other.dirty([right, inner]) == [[], []]
        write(address + PAGE + 10, b"x")
        assert other.dirty([right]) == [[(0, PAGE - 10)]]


@needs_pages
def test_releasing_works_when_something_else_is_mapped_there(mapped: Mapped):
    address = mapped(8)
    with DirtyTracker("pages") as tracker:
        sent(tracker, address, 8 * PAGE)
        with a_file(PAGE) as file:
            map_memory(PAGE, address + PAGE, flags=mmap.MAP_SHARED, file=file)
        map_memory(PAGE, address + 3 * PAGE, access=PROT_NONE)
        map_memory(PAGE, address + 5 * PAGE)
        foreign = dirty._Pages()
        foreign.open()
        foreign.register(address + 5 * PAGE, address + 6 * PAGE)
        # Keeps the descriptors open, so that closing them is not what releases.
        with DirtyTracker("pages") as other:
            sent(other, mapped(1), PAGE)
            tracker.close()
            assert len(registered()) == 2
        foreign.close()


@needs_pages
def test_a_neighbour_that_is_mapped_anew_leaves_large_regions_clean(mapped: Mapped):
    pages = dirty.SPAN_BYTES_MAX // PAGE
    address = mapped(2 * pages)
    with DirtyTracker("pages") as tracker:
        left = sent(tracker, address, pages * PAGE)
        right = sent(tracker, address + pages * PAGE, pages * PAGE)

        map_memory(pages * PAGE, address)

        assert tracker.dirty([left, right]) == [[(0, pages * PAGE)], []]


@needs_pages
def test_more_regions_than_the_kernel_shall_track_are_hashed(
    monkeypatch: pytest.MonkeyPatch, mapped: Mapped
):
    monkeypatch.setattr(dirty, "REGISTERED_MAX", 2)
    address = mapped(8)
    with DirtyTracker("pages") as tracker:
        regions = [tracker.track(address + index * PAGE, PAGE) for index in range(3)]
        assert [region.hashed for region in regions] == [False, False, True]
        take_all(tracker, *regions)
        write(address, b"x" * 3 * PAGE)
        assert tracker.dirty(regions) == [[(0, PAGE)]] * 3


def test_what_is_scanned_is_all_of_it_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dirty, "SPAN_BYTES_MAX", 4 * PAGE)
    chance = random.Random(1)
    for _ in range(300):
        regions = [
            Region(chance.randrange(40 * PAGE), chance.choice((0, 1, PAGE, 9 * PAGE)))
            for _ in range(chance.randrange(8))
        ]

        spans = dirty._spans(regions)

        assert all(start < end for start, end in spans)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
        wanted = {
            page for each in regions if each.size for page in range(*each._page_bounds(), PAGE)
        }
        assert {page for span in spans for page in range(*span, PAGE)} == wanted


def test_arithmetic_of_ranges():
    def bytes_of(ranges: list[tuple[int, int]]) -> set[int]:
        return {byte for start, end in ranges for byte in range(start, end)}

    def sound(ranges: list[tuple[int, int]]) -> bool:
        return all(start < end for start, end in ranges) and all(
            left[1] < right[0] for left, right in itertools.pairwise(ranges)
        )

    chance = random.Random(2)
    for _ in range(3_000):
        left, right = (
            dirty._joined(
                sorted(
                    (start, start + chance.randint(1, 6))
                    for start in (chance.randrange(40) for _ in range(chance.randrange(6)))
                )
            )
            for _ in range(2)
        )
        start, end = sorted((chance.randrange(50), chance.randrange(50)))
        removed = list(left)
        dirty._remove(removed, start, end)
        clipped = dirty._clipped(left, start, end)
        union = dirty._union(left, right)

        assert all(map(sound, (left, right, removed, clipped, union)))
        assert bytes_of(removed) == bytes_of(left) - set(range(start, end))
        assert bytes_of(clipped) == {i - start for i in bytes_of(left) if start <= i < end}
        assert bytes_of(union) == bytes_of(left) | bytes_of(right)
        wide = dirty._joined(left, 2)
        assert bytes_of(wide) >= bytes_of(left)
        assert all(a[1] + 2 < b[0] for a, b in itertools.pairwise(wide))


# What is bounded


@needs_pages
def test_small_gaps_are_sent_and_large_ones_are_not(mapped: Mapped):
    address = mapped(64)
    with DirtyTracker("pages") as tracker:
        region = sent(tracker, address, 64 * PAGE)
        gap = dirty.GAP_BYTES_MAX // PAGE
        for page in (2, 3 + gap, 40, 42 + gap):
            write(address + page * PAGE, b"x")

        assert tracker.dirty([region]) == [
            [(2 * PAGE, (2 + gap) * PAGE), (40 * PAGE, PAGE), ((42 + gap) * PAGE, PAGE)]
        ]


@both_engines
def test_the_ranges_of_a_region_are_bounded(
    engine: Any, mapped: Mapped, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dirty, "RANGES_MAX", 3)
    pages = [0, 40, 60, 130, 131, 200]
    address = mapped(256)
    with DirtyTracker(engine) as tracker:
        region = sent(tracker, address, 256 * PAGE)
        for page in pages:
            write(address + page * PAGE, b"x")

        [ranges] = tracker.dirty([region])

        assert len(ranges) == 3
        assert all(covers(ranges, page * PAGE) for page in pages)
        # The largest gaps are those that stay.
        assert not covers(ranges, 100 * PAGE) and not covers(ranges, 180 * PAGE)


@needs_pages
def test_more_written_ranges_than_one_answer_of_the_kernel_holds(mapped: Mapped):
    step = 2 + dirty.GAP_BYTES_MAX // PAGE
    count = dirty._VECTOR_RANGES + 100
    address = mapped(step * count)
    with DirtyTracker("pages") as tracker:
        region = sent(tracker, address, step * count * PAGE)
        for index in range(count):
            write(address + index * step * PAGE, b"x")

        assert tracker.dirty([region]) == [[(i * step * PAGE, PAGE) for i in range(count)]]
        take_all(tracker, region)
        assert tracker.dirty([region]) == [[]]


# What the system may lack


@pytest.mark.parametrize("known", [False, True])
def test_without_the_system_call_auto_is_hash_and_pages_is_refused(
    known: bool, monkeypatch: pytest.MonkeyPatch
):
    # There is no system call -1.
    numbers = dict.fromkeys(dirty._USERFAULTFD, -1)
    monkeypatch.setattr(dirty, "_USERFAULTFD", numbers if known else {})
    dirty.pages_refusal.cache_clear()
    try:
        with DirtyTracker() as tracker:
            assert tracker.engine == "hash"
        with pytest.raises(TrackingUnavailable, match="the pages engine is not available"):
            DirtyTracker("pages")
    finally:
        monkeypatch.undo()
        dirty.pages_refusal.cache_clear()


@needs_pages
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("_PM_SCAN_WP_MATCHING", 0, "untouched"),
        ("_PM_SCAN_CHECK_WPASYNC", 0, "not registered"),
        ("_PAGE_IS_WRITTEN", 2 | 8, "untouched"),
        ("_WP_ASYNC", 1 << 40, "Invalid argument"),
        ("_PAGEMAP_SCAN", 12345, "PAGEMAP_SCAN"),
    ],
)
def test_a_kernel_that_behaves_otherwise_is_refused(
    name: str, value: int, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dirty, name, value)

    assert reason in dirty.pages_refusal.__wrapped__()


@needs_pages
def test_where_the_kernel_stops_giving_descriptors_regions_are_hashed(
    monkeypatch: pytest.MonkeyPatch, mapped: Mapped
):
    address = mapped(4)

    def refused(self: Any) -> None:
        raise PermissionError(1, "forbidden since")

    with DirtyTracker("pages") as tracker:
        monkeypatch.setattr(dirty._Pages, "open", refused)
        region = sent(tracker, address, 4 * PAGE)
        write(address, b"x")
        assert region.hashed and covers(tracker.dirty([region])[0], 0)


@pytest.mark.parametrize("way", [dirty._read_by_process_vm, dirty._read_by_pipe])
def test_every_way_of_reading_stops_where_memory_does(way: Any, mapped: Mapped):
    read = way(ctypes.CDLL(None, use_errno=True))
    address = mapped(64)
    data = random.Random(1).randbytes(64 * PAGE)
    write(address, data)
    target = ctypes.create_string_buffer(64 * PAGE)
    place = ctypes.addressof(target)

    assert read(address, 64 * PAGE, place) == 64 * PAGE and target.raw == data
    assert read(address + 5, 10, place) == 10 and target.raw[:10] == data[5:15]
    assert read(address, 0, place) == 0
    map_memory(PAGE, address + 40 * PAGE, access=PROT_NONE)
    assert read(address + 40 * PAGE, 1, place) == 0
    assert read(0, 1, place) == 0
    assert 0 <= read(address + PAGE, 50 * PAGE, place) <= 39 * PAGE
    assert read(address + 41 * PAGE, 23 * PAGE, place) == 23 * PAGE


def test_without_a_safe_way_of_reading_there_is_no_tracker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dirty, "_reader", lambda: None)

    with pytest.raises(TrackingUnavailable, match="no system call reads"):
        DirtyTracker("hash")


def test_the_module_loads_where_there_is_nothing_of_this():
    code = """
import ctypes, os, sys, serializers, xxhash
sys.modules["fcntl"] = None
sys.modules.pop("serializers.dirty", None)
del os.register_at_fork
os.name = "nt"
import serializers.dirty as dirty
try:
    dirty.DirtyTracker()
except dirty.TrackingUnavailable as error:
    print(error)
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)

    assert "no system call reads memory" in done.stdout, done.stderr


# Random patterns, and what they find


@both_engines
def test_random_patterns(engine: Any):
    for seed in range(300):
        campaign.run_pattern(seed, engine)


@both_engines
def test_random_patterns_read_through_a_pipe(engine: Any, monkeypatch: pytest.MonkeyPatch):
    read = dirty._read_by_pipe(ctypes.CDLL(None, use_errno=True))
    monkeypatch.setattr(dirty, "_reader", lambda: read)
    for seed in range(40):
        campaign.run_pattern(seed, engine)


@needs_pages
@pytest.mark.parametrize("name", campaign.BROKEN)
def test_a_tracker_that_lacks_something_is_found_out(name: str):
    print(f"{name}: {campaign.caught(name)} patterns")


@needs_pages
def test_private_mappings_of_sealed_memory_are_followed_by_pages():
    size = 3 << 20
    view = shared_memory.put([bytes(range(256)) * (size // 256)])
    if view is None:
        pytest.skip("no sealed memory here")
    place = shared_memory._Found().where(view)
    assert place is not None
    array = np.frombuffer(shared_memory._map(place.sealed, 0, size), dtype="u1")
    chance = random.Random(3)
    array[chance.randrange(size)] += 1
    with DirtyTracker() as tracker:
        region = tracker.track(array.ctypes.data, size)
        copy = bytearray(size)
        for round_ in range(60):
            ranges = tracker.dirty([region])[0]
            if round_ == 1:
                assert ranges == [], "what is only read is not dirty"
            for offset, count in ranges:
                copy[offset : offset + count] = tracker.take(region, offset, count) or b""
            assert copy == array.tobytes()
            for _ in range(chance.choice((1, 20)) if round_ else 0):
                at = chance.randrange(size - 9000)
                array[at : at + chance.choice((1, 9000))] += 1
        assert not region.hashed
    assert view.readonly
