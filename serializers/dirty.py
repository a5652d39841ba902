"""Which bytes of large live buffers were written since they were last sent.

Theory. A buffer is tracked as memory, by address: nothing here refers to the object that lies in
it, so it can be resized and freed as if nobody looked. What is known of a region is its *pending*
ranges: the bytes that may differ from what was last taken. `dirty` adds to them, `take` and
`settle` remove from them. Two engines find what to add:

*pages* lets the kernel note the first write to each page: asynchronous write-protection of
userfaultfd, read and set again ("armed") by one and the same PAGEMAP_SCAN, so that no write falls
between reading and arming. Bytes are copied only after that, so a write is in the copy, or is
found by the next scan, or both. What the kernel cannot promise is not asked of it:

- Only private anonymous memory is registered, and private mappings of memory that was sealed.
  Shared memory is written through other address spaces, and other files change beneath private
  mappings; such regions are hashed. The mappings are
  read after registering: what is mapped anew after that is not registered, and a scan fails there.
- A scan that fails may have armed pages without saying which: the whole span counts as dirty, and
  its regions are registered again. Large regions are scanned apart, so that one that was mapped
  anew does not make its neighbours dirty.
- Arming belongs to the page, not to who asked for it. All trackers of a process therefore share
  one userfaultfd, and what a scan finds is credited to every region of every tracker there.
- Unregistering clears all marks of the memory, and so does moving it (see `pages_refusal`); what is
  registered counts as wholly dirty.

NB: a device that writes to pinned pages (O_DIRECT, io_uring with registered buffers) does so
without a fault. Transfers that are in flight across a scan are seen by the hash engine alone.
So is memory that something else in the process registers in the same asynchronous way.

*hash* remembers a digest of each piece that was taken, of the very bytes handed out, and compares
memory with it. Memory is read only by system calls that fail where nothing is mapped.

Measured with 200 MiB (Linux 6.18, two cores): pages are registered in 0.7 ms and armed in 0.5;
`dirty` takes 0.04 ms with nothing written, 0.4 with 1 % of the pages and 0.7 with all; to release
them takes 0.9 ms. The first write to an armed page takes 1.1 us more, once per scan; after the
first writes into huge pages, which splits them, one scan takes 2 to 4 ms. Hashing takes 36 ms
whatever was written, and copying 27.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import mmap
import os
import platform
import secrets
import struct
import threading
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal

import xxhash

from .errors import TrackingUnavailable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CHUNK_BYTES = 32 << 10
"""What one digest covers at most.

Source: measured over 200 MiB with 1 % of the pages written, anywhere. Chunks of 16, 32, 64 and 256
KiB take 43, 37, 34 and 32 ms to compare, make 7.9, 15.6, 30 and 97 MiB dirty, and keep 4.2, 2.1,
1.1 and 0.5 MiB. Sent at 1.4 GB/s, the first two come out even, and ahead of the others.
"""

GAP_BYTES_MAX = 8 << 10
"""Clean bytes between two ranges that are sent rather than start another range.

Source: measured, a `take` is 5 us and 0.5 us for each page, and a page is 3 us on the wire at
1.4 GB/s; what a range costs beyond that, to frame and to install, is about as much again.
"""

RANGES_MAX = 16_384
"""Ranges of one region; beyond that the smallest gaps are sent too."""

SPAN_BYTES_MAX = 4 << 20
"""Regions that touch are scanned together up to this size, and are lost together."""

REGISTERED_MAX = 8_192
"""Regions that the kernel tracks for this process. Each can split mappings, of which a process
has 65,530; regions beyond it are hashed."""

_SCRATCH_BYTES = 8 * CHUNK_BYTES
"""Read at a time for hashing: small enough to stay in the cache."""

# Source: include/uapi/linux/userfaultfd.h and fs.h of Linux 6.7.
_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_USER_MODE_ONLY = 1
_UFFD_API_VERSION = 0xAA
_WP_UNPOPULATED = 1 << 13
_WP_ASYNC = 1 << 15
_REGISTER_MODE_WP = 2
_PM_SCAN_WP_MATCHING = 1
_PM_SCAN_CHECK_WPASYNC = 2
_PAGE_IS_WRITTEN = 2


def _request(direction: int, kind: int, number: int, size: int) -> int:
    """Return the number of an ioctl; direction 2 reads, 3 reads and writes."""
    return direction << 30 | size << 16 | kind << 8 | number


_UFFDIO_API = _request(3, 0xAA, 0x3F, 24)
_UFFDIO_REGISTER = _request(3, 0xAA, 0x00, 32)
_UFFDIO_UNREGISTER = _request(2, 0xAA, 0x01, 16)
_PAGEMAP_SCAN = _request(3, ord("f"), 16, 96)

_PAGE = mmap.PAGESIZE
_VECTOR_RANGES = 4_096

Engine = Literal["auto", "pages", "hash"]

_Ranges = list[tuple[int, int]]
"""Ranges as (start, end): ascending, neither empty nor overlapping nor touching."""

_numbers = itertools.count(1)


# Ranges


def _start(span: tuple[int, int]) -> int:
    return span[0]


def _end(span: tuple[int, int]) -> int:
    return span[1]


def _joined(ranges: Iterable[tuple[int, int]], gap: int = 0) -> _Ranges:
    """Join ranges, given in ascending order, that overlap or are at most `gap` bytes apart."""
    joined: _Ranges = []
    rest = iter(ranges)
    for first, last in rest:
        for start, end in rest:
            if start - last > gap:
                joined.append((first, last))
                first, last = start, end
            elif end > last:
                last = end
        joined.append((first, last))
    return joined


def _union(ranges: _Ranges, more: _Ranges) -> _Ranges:
    """Return the ranges of both, at most RANGES_MAX of them; they may cover more than both."""
    union = _joined(sorted(ranges + more)) if ranges and more else ranges or more
    if len(union) <= RANGES_MAX:
        return union
    gaps = sorted(range(1, len(union)), key=lambda i: union[i - 1][1] - union[i][0])
    cuts = sorted(gaps[: RANGES_MAX - 1])
    return [
        (union[begin][0], union[stop - 1][1])
        for begin, stop in itertools.pairwise([0, *cuts, len(union)])
    ]


def _remove(ranges: _Ranges, start: int, end: int) -> None:
    """Take [start, end) out of `ranges`, in place."""
    if start == end:
        return
    # Mostly the first one, since they are taken in order.
    low = 0 if ranges and start < ranges[0][1] else bisect_right(ranges, start, key=_end)
    high = low
    rest: _Ranges = []
    while high < len(ranges) and ranges[high][0] < end:
        left, right = ranges[high]
        if left < start:
            rest.append((left, start))
        if end < right:
            rest.append((end, right))
        high += 1
    ranges[low:high] = rest


def _clipped(ranges: _Ranges, start: int, end: int) -> _Ranges:
    """Return the parts of `ranges` in [start, end), counted from `start`."""
    if start == end:
        return []
    low = bisect_right(ranges, start, key=_end)
    high = bisect_left(ranges, end, key=_start)
    clipped = [(left - start, right - start) for left, right in ranges[low:high]]
    if clipped:
        clipped[0] = max(0, clipped[0][0]), clipped[0][1]
        clipped[-1] = clipped[-1][0], min(end - start, clipped[-1][1])
    return clipped


class Region:
    """Memory [address, address + size), tracked by the tracker that made it.

    Attributes:
        number: Unique in the process.
        address: Of the first byte.
        size: Bytes.
    """

    __slots__ = ("_known", "_lost", "_pending", "address", "number", "size")

    def __init__(self, address: int, size: int) -> None:
        self.number = next(_numbers)
        self.address = address
        self.size = size
        self._pending: _Ranges = []
        # Whether the kernel does not watch the memory, or not all of it: before the first scan,
        # and after it was mapped anew.
        self._lost = True
        # Of hashed regions: by chunk, the pieces (start, end, digest) that were taken. They do
        # not overlap, and each byte that is not pending is in one.
        self._known: dict[int, list[tuple[int, int, bytes]]] | None = None
        self._all_pending()

    def __repr__(self) -> str:
        return f"<Region {self.number}: {self.size} bytes at {self.address:#x}>"

    @property
    def hashed(self) -> bool:
        """Whether this region is hashed, whatever the engine of its tracker."""
        return self._known is not None

    def _all_pending(self) -> None:
        self._pending = [(0, self.size)] if self.size else []

    def _page_bounds(self) -> tuple[int, int]:
        """Return the start and the end of the pages that the region touches."""
        return self.address // _PAGE * _PAGE, -(-(self.address + self.size) // _PAGE) * _PAGE


def _spans(regions: Iterable[Region]) -> _Ranges:
    """Return what to scan: disjoint, and all pages of the regions; see SPAN_BYTES_MAX."""
    spans: _Ranges = []
    for start, end in sorted(region._page_bounds() for region in regions if region.size):
        if spans:
            first, last = spans[-1]
            if start <= last and max(end, last) - first <= SPAN_BYTES_MAX:
                spans[-1] = first, max(end, last)
                continue
            start = max(start, last)
        if start < end:
            spans.append((start, end))
    return spans


# The kernel's view


class _Pages:
    """The write-protection of this process: one userfaultfd, shared by all trackers.

    It is open while it has regions. `with` holds it; everything but `abandon` is called by who
    does.
    """

    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}
        self._lock = threading.Lock()
        self._abandoned: list[list[Region]] = []
        self._userfaultfd = -1
        self._pagemap = -1
        self._vector: Any = None
        self._view: memoryview[int] | None = None

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        self._sweep()

    def abandon(self, regions: dict[int, Region]) -> None:
        """Discard the regions of a tracker that was dropped; the collector calls this anywhere."""
        self._abandoned.append(list(regions.values()))
        self._sweep()

    def _sweep(self) -> None:
        # The lock may be held by this very thread, which the collector interrupted; whoever
        # holds it sweeps after it.
        while self._abandoned and self._lock.acquire(blocking=False):
            try:
                if self._abandoned:
                    self.discard(self._abandoned.pop())
            finally:
                self._lock.release()

    def before_fork(self) -> None:
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        self.__exit__()

    def after_fork_in_child(self) -> None:
        # These descriptors are of the parent's memory. Nothing of the child's is registered.
        self._lock = threading.Lock()
        self._abandoned.clear()
        self.regions.clear()
        self.close()

    def open(self) -> None:
        """Open what is needed, if it is not.

        Raises:
            OSError: The kernel lacks it or refuses; nothing was opened.
        """
        if self._userfaultfd >= 0:
            return
        number = _USERFAULTFD.get(platform.machine())
        if platform.system() != "Linux" or number is None:
            raise OSError(errno.ENOSYS, "not Linux on x86-64 or aarch64")
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        flags = os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY
        self._userfaultfd = libc.syscall(ctypes.c_long(number), ctypes.c_long(flags))
        try:
            if self._userfaultfd < 0:
                raise OSError(ctypes.get_errno(), "userfaultfd: " + os.strerror(ctypes.get_errno()))
            features = _WP_ASYNC | _WP_UNPOPULATED
            self._ioctl(_UFFDIO_API, struct.pack("QQQ", _UFFD_API_VERSION, features, 0))
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._vector = (ctypes.c_uint64 * (3 * _VECTOR_RANGES))()
            self._view = memoryview(self._vector).cast("B").cast("Q")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for descriptor in (self._userfaultfd, self._pagemap):
            if descriptor >= 0:
                os.close(descriptor)
        self._userfaultfd = self._pagemap = -1
        self._view = self._vector = None

    def _ioctl(self, request: int, argument: bytes) -> None:
        fcntl.ioctl(self._userfaultfd, request, bytearray(argument))

    def register(self, start: int, end: int) -> None:
        """Have the kernel track pages; those already tracked stay as they are.

        Raises:
            OSError: Nothing is mapped there, or not what can be tracked.
        """
        argument = struct.pack("QQQQ", start, end - start, _REGISTER_MODE_WP, 0)
        self._ioctl(_UFFDIO_REGISTER, argument)

    def unregister(self, start: int, end: int) -> None:
        """Have the kernel forget pages, whatever is mapped there by now."""
        try:
            self._ioctl(_UFFDIO_UNREGISTER, struct.pack("QQ", start, end - start))
        except OSError:
            # One foreign mapping among them spoils the call for all.
            for left, right, _ in _mappings():
                if left < end and start < right:
                    piece = max(left, start), min(right, end)
                    with contextlib.suppress(OSError):
                        argument = struct.pack("QQ", piece[0], piece[1] - piece[0])
                        self._ioctl(_UFFDIO_UNREGISTER, argument)

    def written(self, start: int, end: int) -> _Ranges:
        """Return the pages of [start, end) written since they were armed, and arm them again.

        Pages that were never armed, or that lost their contents (MADV_DONTNEED), count as
        written.

        Raises:
            OSError: Some of it is mapped but not tracked; any of it may have been armed.
        """
        assert self._view is not None
        found: _Ranges = []
        vector = ctypes.addressof(self._vector)
        while start < end:
            argument = bytearray(
                struct.pack(
                    "12Q",
                    96,
                    _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC,
                    start,
                    end,
                    0,
                    vector,
                    _VECTOR_RANGES,
                    0,
                    0,
                    # The kernel has a fast path for just this mask, without any other.
                    _PAGE_IS_WRITTEN,
                    0,
                    _PAGE_IS_WRITTEN,
                )
            )
            count: int = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, argument)
            start = struct.unpack_from("Q", argument, 32)[0]
            if count:
                flat = self._view[: 3 * count].tolist()
                found += zip(flat[0::3], flat[1::3], strict=True)
        return found

    def scan(self, regions: Sequence[Region]) -> None:
        """Add what was written to the pending ranges of all regions there; arm all of `regions`.

        Regions that cannot be tracked become hashed ones, all of them pending.
        """
        # Twice: what turns out to be mapped anew is registered, and armed, by the second turn.
        for _ in range(2):
            self._register([region for region in regions if region._lost and not region.hashed])
            found: _Ranges = []
            lost: _Ranges = []
            for start, end in _spans(region for region in regions if not region.hashed):
                try:
                    found += self.written(start, end)
                except OSError:
                    lost.append((start, end))
            self._credit(_joined(found, GAP_BYTES_MAX), lost)
            if not lost:
                return

    def _register(self, regions: list[Region]) -> None:
        if not regions:
            return
        refused: list[Region] = []
        try:
            self.open()
        except OSError:
            refused = regions
        else:
            for region in regions:
                try:
                    self.register(*region._page_bounds())
                except OSError:
                    refused.append(region)
            # After registering, never before: see the theory above.
            trackable: _Ranges = []
            with contextlib.suppress(OSError):
                trackable = _joined((start, end) for start, end, fits in _mappings() if fits)
            for region in regions:
                start, end = region._page_bounds()
                index = bisect_right(trackable, start, key=_end)
                if index == len(trackable) or not (
                    trackable[index][0] <= start and end <= trackable[index][1]
                ):
                    refused.append(region)
                region._lost = False
            self._release_untrackable(refused, trackable)
        for region in regions:
            region._all_pending()
        for region in refused:
            region._known = {}
        self.discard(refused)

    def _release_untrackable(self, refused: list[Region], trackable: _Ranges) -> None:
        """Unregister what should not have been, other regions' part of it too.

        It may have been mapped into theirs meanwhile, and must be an error to their next scan.
        """
        for region in refused:
            rest = [region._page_bounds()] if region.size else []
            for start, end in trackable:
                _remove(rest, start, end)
            for start, end in rest:
                self.unregister(start, end)

    def _credit(self, found: _Ranges, lost: _Ranges) -> None:
        if not found and not lost:
            return
        for region in self.regions.values():
            end = region.address + region.size
            if written := _clipped(found, region.address, end):
                region._pending = _union(region._pending, written)
            if lost and _clipped(lost, region.address, end):
                region._lost = True
                region._all_pending()

    def discard(self, regions: Iterable[Region]) -> None:
        """Forget regions, and release in the kernel what no other region shares with them."""
        gone = [
            self.regions.pop(region.number) for region in regions if region.number in self.regions
        ]
        if not gone:
            return
        if self._userfaultfd >= 0:
            released = _joined(sorted(region._page_bounds() for region in gone))
            for start, end in sorted(region._page_bounds() for region in self.regions.values()):
                _remove(released, start, end)
            for start, end in released:
                self.unregister(start, end)
        if not self.regions:
            self.close()


def _mappings() -> Iterator[tuple[int, int, bool]]:
    """Yield the mappings of this process in ascending order: start, end, whether trackable.

    Trackable is private memory with no file behind it, or one that can never change.
    """
    with open("/proc/self/maps", "rb") as maps:
        # At once: the shorter the time over which the kernel is asked, the better.
        lines = maps.read().splitlines()
    for line in lines:
        bounds, access, _, _, inode, *path = line.split(None, 5)
        start, _, end = bounds.partition(b"-")
        fixed = inode == b"0" or path == [SEALED_MAPPING]
        yield int(start, 16), int(end, 16), access.endswith(b"p") and fixed


SEALED_MAPPING = b"/memfd:livemigrate-sealed (deleted)"
"""How /proc names a mapping of memory that `rpc.shared_memory` has sealed against every change, and
maps only then: what is written to a private mapping of it is all that can change there."""


_pages = _Pages()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_pages.before_fork,
        after_in_parent=_pages.after_fork_in_parent,
        after_in_child=_pages.after_fork_in_child,
    )


@functools.cache
def pages_refusal() -> str:
    """Return why the pages engine cannot be used here; empty if it can. Asked once.

    What the engine relies on is tried out, because kernels, and sandboxes that imitate them,
    differ: that untouched, written, emptied and moved pages are found, others not, and that
    memory that is not registered is an error.
    """
    trial = _Pages()
    try:
        trial.open()
    except OSError as error:
        return str(error)
    try:
        return _try_out(trial)
    except OSError as error:
        return f"PAGEMAP_SCAN: {error}"
    finally:
        trial.close()


def _try_out(trial: _Pages) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    word = ctypes.c_size_t
    # A page table covers 512 pages: of the second one of these nothing exists before the scan.
    size = 1_024 * _PAGE
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    access = mmap.PROT_READ | mmap.PROT_WRITE
    base = libc.mmap(None, word(2 * size), access, private, -1, word(0))
    if base in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    end = base + size

    def written(start: int, end: int) -> _Ranges:
        return _joined(trial.written(start, end))

    whole = [(base, end)]
    try:
        trial.register(base, end)
        if written(base, end) != whole or written(base, end):
            return "this kernel does not report untouched pages"
        ctypes.memset(base + 3 * _PAGE, 1, 1)
        third = [(base + 3 * _PAGE, base + 4 * _PAGE)]
        if written(base, end) != third or written(base, end):
            return "this kernel does not report written pages"
        libc.madvise(ctypes.c_void_p(base), word(size), 4)  # MADV_DONTNEED
        if written(base, end) != whole:
            return "this kernel does not report emptied pages"
        try:
            written(base, end + _PAGE)
        except OSError:
            pass
        else:
            return "this kernel does not tell what is not registered"
        ctypes.memset(base, 1, 2 * _PAGE)
        written(base, end)
        # MREMAP_MAYMOVE, FIXED and DONTUNMAP: no hole is left that another thread could fill.
        moved = libc.mremap(ctypes.c_void_p(base), word(size), word(size), 7, ctypes.c_void_p(end))
        if moved != end:
            raise OSError(ctypes.get_errno(), "mremap")
        trial.register(end, end + size)
        if written(end, end + size) != [(end, end + size)]:
            return "this kernel keeps marks of moved memory"
        return ""
    finally:
        libc.munmap(ctypes.c_void_p(base), word(2 * size))


# Reading memory that may be gone


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_Read = Callable[[int, int, int], int]
"""(address, size, target) -> how many bytes from the first on were readable, and were copied."""


def _read_by_process_vm(libc: Any) -> _Read:
    readv = libc.process_vm_readv
    readv.restype = ctypes.c_ssize_t
    word = ctypes.c_ulong
    one, none = word(1), word(0)

    def read(address: int, size: int, target: int) -> int:
        done = 0
        while done < size:
            source = _IoVector(address + done, size - done)
            copy = _IoVector(target + done, size - done)
            # Asked each time: a child of this process has another one.
            count: int = readv(
                os.getpid(), ctypes.byref(copy), one, ctypes.byref(source), one, none
            )
            if count <= 0:
                break
            done += count
        return done

    return read


def _read_by_pipe(libc: Any) -> _Read:
    """Where a sandbox forbids the above, or the system is another one: write(2) checks as well."""
    write = libc.write
    write.restype = ctypes.c_ssize_t

    def read(address: int, size: int, target: int) -> int:
        reader, writer = os.pipe()
        try:
            os.set_blocking(writer, False)
            done = 0
            while done < size:
                count: int = write(writer, ctypes.c_void_p(address + done), min(size - done, 65536))
                if count <= 0:
                    break
                stop = done + count
                while done < stop:
                    piece = (ctypes.c_char * (stop - done)).from_address(target + done)
                    done += os.readv(reader, [piece])
            return done
        finally:
            os.close(reader)
            os.close(writer)

    return read


@functools.cache
def _reader() -> _Read | None:
    """Return the best way to read memory that works here."""
    if os.name != "posix":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    for name, way in (("process_vm_readv", _read_by_process_vm), ("write", _read_by_pipe)):
        if hasattr(libc, name):
            read = way(libc)
            source, target = ctypes.create_string_buffer(b"live"), ctypes.create_string_buffer(4)
            if read(ctypes.addressof(source), 4, ctypes.addressof(target)) == 4:
                return read
    return None


_new_bytes: Any = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_address_of_bytes: Any = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(
    ("PyBytes_AsString", ctypes.pythonapi)
)


class DirtyTracker:
    """Says what to send again of memory that others write to.

    Give each region's dirty ranges to `take`, or at the end, with the writers frozen, to `settle`,
    as often as wanted; a copy put together from them equals the memory as soon as a `dirty` that
    nobody wrote after has been taken wholly.

    Its methods may be called by any thread. A process forked from this one must not use it.

    Args:
        engine: How to find out: `pages` asks the kernel, which costs nothing for what is not
            written; `hash` reads everything each time. `auto` takes pages where there are any.

    Attributes:
        engine: What was chosen, `pages` or `hash`. Single regions may be hashed in any case.

    Raises:
        TrackingUnavailable: `pages` was asked for and the system lacks it; or the system has no
            safe way to read memory that may be gone, as Windows.
        ValueError: There is no such engine.
    """

    engine: str

    def __init__(self, engine: Engine = "auto") -> None:
        if engine not in ("auto", "pages", "hash"):
            raise ValueError(f"engine is 'auto', 'pages' or 'hash', not {engine!r}")
        read = _reader()
        if read is None:
            raise TrackingUnavailable("hash", "no system call reads memory that may be gone")
        refusal = "" if engine == "hash" else pages_refusal()
        if engine == "pages" and refusal:
            raise TrackingUnavailable("pages", refusal)
        self.engine = "hash" if engine == "hash" or refusal else "pages"
        self._read = read
        self._lock = threading.Lock()
        self._regions: dict[int, Region] = {}
        self._process = os.getpid()
        self._scratch: Any = None
        self._view: memoryview[int] | None = None
        # Digests that only this tracker compares: what collides must not be known beforehand.
        self._seed = secrets.randbits(64)
        self._finalizer = weakref.finalize(self, _pages.abandon, self._regions)
        # At the end of the process the kernel releases everything by itself.
        self._finalizer.atexit = False

    def __enter__(self) -> DirtyTracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def track(self, address: int, size: int) -> Region:
        """Track memory from now on; all of it is dirty at first.

        Nothing is asked of the kernel before the next `dirty`, and what is taken before that is
        dirty once more. The memory need not stay mapped.

        Args:
            address: Of the first byte; regions may overlap.
            size: Bytes, at least 0.

        Raises:
            ValueError: The size or the address is negative, or the tracker is closed.
        """
        if size < 0 or address < 0:
            raise ValueError(f"not memory: {size} bytes at {address:#x}")
        region = Region(address, size)
        with self._held(), _pages:
            self._check_usable()
            if self.engine == "pages" and len(_pages.regions) < REGISTERED_MAX:
                _pages.regions[region.number] = region
            else:
                region._known = {}
            self._regions[region.number] = region
        return region

    def untrack(self, region: Region) -> None:
        """Track a region no longer; nothing happens if it is not tracked."""
        with self._held(), _pages:
            if self._regions.pop(region.number, None) is not None:
                _pages.discard([region])

    def dirty(self, regions: Sequence[Region]) -> list[list[tuple[int, int]]]:
        """Find what may differ from what `take` or `settle` last gave for it.

        Returns:
            For each region its ranges as (offset, size): ascending, not touching, at most
            RANGES_MAX. They may contain bytes that were not written, never the other way round.
            Memory that is not mapped has no dirty bytes to be found, but keeps those it had.

        Raises:
            ValueError: A region is not tracked here, or the tracker is closed.
        """
        with self._held():
            self._check_usable()
            for region in regions:
                self._check_tracked(region)
            with _pages:
                _pages.scan([region for region in regions if not region.hashed])
            for region in regions:
                if region.hashed:
                    self._compare(region)
            return [[(start, end - start) for start, end in region._pending] for region in regions]

    def take(self, region: Region, offset: int, size: int) -> bytes | None:
        """Copy bytes as they are now; from this instant they count as sent.

        Returns:
            The copy; None if some of it cannot be read any more, and then nothing counts as sent.

        Raises:
            ValueError: The range is not in the region, or the region is not tracked here.
        """
        with self._held():
            self._check_range(region, offset, size)
            # Before copying: a scan for another tracker may find new writes meanwhile.
            self._sent(region, offset, size)
            copy: bytes | None = None
            try:
                data: bytes = _new_bytes(None, size)
                if self._read(region.address + offset, size, _address_of_bytes(data)) == size:
                    self._remember(region, offset, memoryview(data))
                    copy = data
            finally:
                if copy is None:
                    self._unsent(region, offset, size)
            return copy

    def settle(self, region: Region, offset: int, size: int) -> None:
        """Count bytes as sent that the caller sends from where they lie, nobody writing to them.

        Raises:
            ValueError: The range is not in the region, or the region is not tracked here.
        """
        with self._held():
            self._check_range(region, offset, size)
            self._sent(region, offset, size)
            end = offset + size
            while region.hashed and offset < end:
                count = min(end - offset, _SCRATCH_BYTES)
                piece = self._look(region.address + offset, count)
                self._remember(region, offset, piece)
                if len(piece) < count:
                    self._unsent(region, offset + len(piece), end - offset - len(piece))
                    return
                offset += count

    def unsettle(self, region: Region) -> None:
        """Count all of a region as dirty again: what was taken of it has not been sent.

        Raises:
            ValueError: The region is not tracked here.
        """
        with self._held():
            self._check_range(region, 0, 0)
            self._unsent(region, 0, region.size)

    def close(self) -> None:
        """Track nothing any longer and release everything in the kernel; may be called again."""
        if os.getpid() != self._process:
            return
        with self._held(), _pages:
            _pages.discard(self._regions.values())
            self._regions.clear()
            self._finalizer.detach()

    def _held(self) -> threading.Lock:
        # Before locking: who held the lock when this process was forked is not here to release it.
        if os.getpid() != self._process:
            raise ValueError("this tracker belongs to the process that this one was forked from")
        return self._lock

    def _check_usable(self) -> None:
        if not self._finalizer.alive:
            raise ValueError("this tracker is closed")

    def _check_tracked(self, region: Region) -> None:
        if self._regions.get(region.number) is not region:
            raise ValueError(f"{region!r} is not tracked here")

    def _check_range(self, region: Region, offset: int, size: int) -> None:
        self._check_usable()
        self._check_tracked(region)
        if offset < 0 or size < 0 or offset + size > region.size:
            raise ValueError(f"{size} bytes at {offset} are not in {region!r}")

    def _sent(self, region: Region, offset: int, size: int) -> None:
        with _pages:
            _remove(region._pending, offset, offset + size)

    def _unsent(self, region: Region, offset: int, size: int) -> None:
        if not size:
            return
        with _pages:
            region._pending = _union(region._pending, [(offset, offset + size)])

    # What the hash engine does

    def _look(self, address: int, size: int) -> memoryview[int]:
        """Return a passing view of up to _SCRATCH_BYTES of memory; shorter where it ends."""
        if self._view is None:
            self._scratch = (ctypes.c_char * _SCRATCH_BYTES)()
            self._view = memoryview(self._scratch).cast("B")
        return self._view[: self._read(address, size, ctypes.addressof(self._scratch))]

    def _compare(self, region: Region) -> None:
        """Make pending the pieces of a region that are not what was taken."""
        assert region._known is not None
        changed: _Ranges = []
        for base in range(0, region.size, _SCRATCH_BYTES):
            first = base // CHUNK_BYTES
            known = {
                chunk: region._known[chunk]
                for chunk in range(first, first + _SCRATCH_BYTES // CHUNK_BYTES)
                if chunk in region._known
            }
            if not known:
                continue
            now = self._look(region.address + base, min(_SCRATCH_BYTES, region.size - base))
            for chunk, pieces in known.items():
                same = [
                    (start, end, digest)
                    for start, end, digest in pieces
                    # Of what cannot be read there is less, and its digest another one.
                    if xxhash.xxh3_128_digest(now[start - base : end - base], self._seed) == digest
                ]
                if len(same) < len(pieces):
                    changed += [(start, end) for start, end, _ in set(pieces).difference(same)]
                    region._known[chunk] = same
        if changed:
            region._pending = _union(region._pending, _joined(sorted(changed)))

    def _remember(self, region: Region, offset: int, data: memoryview[int]) -> None:
        """Note digests of bytes that were sent; only for hashed regions."""
        if region._known is None:
            return
        end = offset + len(data)
        rest: _Ranges = []
        start = offset
        while start < end:
            chunk = start // CHUNK_BYTES
            stop = min(end, (chunk + 1) * CHUNK_BYTES)
            pieces = []
            for piece in region._known.get(chunk, ()):
                if piece[1] <= start or stop <= piece[0]:
                    pieces.append(piece)
                else:
                    # The digest of the whole says nothing of what is left of it.
                    rest += [(piece[0], start)] if piece[0] < start else []
                    rest += [(stop, piece[1])] if stop < piece[1] else []
            digest = xxhash.xxh3_128_digest(data[start - offset : stop - offset], self._seed)
            pieces.append((start, stop, digest))
            region._known[chunk] = pieces
            start = stop
        if rest:
            region._pending = _union(region._pending, _joined(sorted(rest)))
