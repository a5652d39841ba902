"""Large buffers between processes of one host, in memory that is sealed before it is sent.

The sender writes what is large into a memfd and seals it against every change by others; its
descriptor goes to the other process over the Unix socket, and a small table in the frame says what
lies where. The reader maps it privately: what it writes there is its own, page by page, and is seen
by nobody. So a reader may keep what it got and change it, as if it had been copied, and neither a
move that is rolled back, nor a fork, nor a process that was stopped and goes on can ever share
writable memory with another. The kernel frees the pages when the last mapping and descriptor are
gone, however their process ended. A memfd has no name, and nothing is left under /dev/shm.

New memory costs twice what it takes to write into memory that is there (64 MiB: 30 ms against 10).
So arguments and results go into memory that is lent: its writer keeps one writable mapping, and
writes there again once nobody looks any more. For that each reader says when its last use has
ended, or that it never will be known: it sent the descriptor on, or forked. Until all have said so,
or if any link ends first, or by a fork of the writer, the memory is never written again: the writer
unmaps it and seals it against itself as well. States that move are sealed so from the beginning.

What already lives in such a mapping goes on to the next process uncopied. Its descriptor is sent
again, with the bytes of those pages that were written meanwhile; the kernel tells which they are
(/proc/self/pagemap).

Trust: the table is in a frame, and has its MAC. The bytes have none. Whoever could change them
before they are sealed is a process of the same user that could read the cluster's secret as well,
and afterwards nobody can; of memory that is lent, nobody but the peer that sent it. A reader takes
a memfd only with the seals set, so a peer that cuts it short cannot end its reader by SIGBUS.

A table, little-endian: the token of its descriptors, how many there are (and in the lowest bit
whether the first of them is missing), how many parts and patches, and the size of what comes first,
which all small parts share, and which follows the table if no descriptor has it; for each
descriptor its size; for each part its descriptor (0 for what comes first), offset, length and
number of patches; for each patch its offset in the part, and offset and length in what comes first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from rpc.channel import DESCRIPTORS_MAX, Buffer
from rpc.errors import FrameError
from rpc.frames import Gathered, Memory

AVAILABLE: Final = sys.platform == "linux" and sys.implementation.name == "cpython"
"""Whether this system has memfd, and this Python tells where a buffer lies."""

NAME: Final = "livemigrate-sealed"
"""Of the memory, in /proc; what is mapped under it has been sealed (see `serializers.dirty`)."""

SHARED_BYTES_MIN: Final = 64 << 10
"""A message from this size on goes by shared memory where it can. Source: measured, medians of 360
alternating round trips, shared (and lent) against inline: 32 KiB 310 and 280 us, 48 KiB 297 and
334, 64 KiB 303 and 367, 256 KiB 357 and 1114. New memory instead of lent: 64 KiB 335, 256 KiB 476,
1 MiB 849 against 540, 16 MiB 5.6 ms against 2.3.
"""

REFERRED_BYTES_MIN: Final = 64 << 10
"""Parts from this size on are looked for in mappings that are there already."""

KEPT_BYTES_MIN: Final = 1 << 20
"""Mappings from this size on keep their descriptor, to be sent again; others are copied then."""

KEPT_MAX: Final = 256
"""Descriptors kept for that. Source: a quarter of the usual limit of a process."""

PARTS_MAX: Final = 1024
"""Parts and patches of one message; more are put together, or sent otherwise."""

INLINE_BYTES_MAX: Final = 16 << 10
"""Up to so much beside the referred parts travels with the table instead of in a memfd."""

PATCHED_SHARE_MAX: Final = 4
"""A part more than a quarter of which was written is copied as a whole: it would not do so
next time, and the memory of what it replaces is let go."""

TRAVELS_BYTES_MAX: Final = 1 << 20
"""Patches that a state may have and still travel by reference, without being sent ahead: copying
them takes a fraction of a millisecond. They add up from move to move."""

FEATURE: Final = "lent-memory"
"""Of peers that say when they have ceased to use memory."""

LENT_MAX: Final = 64
"""Pieces of memory that are lent on one link at one time."""

IDLE_BYTES_MAX: Final = 256 << 20
"""Memory kept to be written again, in all."""

IDLE_MAX: Final = 64
"""The same, in pieces: each has a descriptor."""

IDLE_S: Final = 4.0
"""What nobody needed for so long is freed, when the next link looks."""

_NUMBERS: Final = 6
"""Bits for the place of a descriptor in its table: `DESCRIPTORS_MAX`."""

_HEAD: Final = struct.Struct("<QIIIQ")
_SIZE: Final = struct.Struct("<Q")
_PART: Final = struct.Struct("<IQQI")
_PATCH: Final = struct.Struct("<QQQ")
_ALIGNMENT: Final = 64
_PAGE: Final = mmap.PAGESIZE

# Of fcntl in Python from 3.13 on, or not at all. Source: include/uapi/linux/fcntl.h.
_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034
_SEALS: Final = 0x1 | 0x2 | 0x4 | 0x8  # seal, shrink, grow, write
_SEALS_LENT: Final = 0x2 | 0x4 | 0x10  # shrink, grow, write anew; the last since Linux 5.1
_SHRINK: Final = 0x2
_WRITE: Final = 0x8
_MADV_DONTFORK: Final = 10
_IOV_MAX: Final = 1024


class _PyBuffer(ctypes.Structure):
    """`Py_buffer`. Source: Include/cpython/object.h."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


if AVAILABLE:
    _libc: Any = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _libc.mmap.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_int64,
    )
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def _address(view: Any) -> int:
    """Where the memory of a buffer begins."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    try:
        return int(buffer.buf or 0)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


_T = TypeVar("_T")


def _register(registry: dict[int, weakref.ref[_T]], new: _T) -> None:
    """List an object as long as it lives."""
    key = id(new)
    registry[key] = weakref.ref(new, lambda _: registry.pop(key, None))


class Loan:
    """Another process's memory that is used here; tells once how the use ended, in any thread."""

    __slots__ = ("__weakref__", "_number", "_tell")

    def __init__(self, number: int, tell: Callable[[int], None]) -> None:
        """Begin a use.

        Args:
            number: Of the loan; see `loan_number`.
            tell: Called in any thread, at any moment, with twice the number, and one more if it
                can never be known when the use ends.
        """
        self._number = number
        self._tell: Callable[[int], None] | None = tell
        _register(_loans, self)
        if _pool.closed_by_fork:
            self.keep()

    def keep(self) -> None:
        """Say that others may use it from now on, so that it must never be written again."""
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(self._number << 1 | 1)

    def __del__(self) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(self._number << 1)


_loans: dict[int, weakref.ref[Loan]] = {}


def loan_number(token: int, index: int) -> int:
    """The number under which a descriptor of a table is lent on its link."""
    return token << _NUMBERS | index


class _Idle(NamedTuple):
    """Memory that nobody uses."""

    descriptor: int
    size: int
    memory: _Mapping
    since_s: float


class _Pool:
    """Memory of this process that is there to be written again."""

    def __init__(self) -> None:
        self._close = os.close
        self._now = time.monotonic
        self._idle: dict[int, _Idle] = {}
        # NB: changed by `__del__` of others, in any thread and at any moment, so under no lock:
        # each step is one operation of a dict.
        self._links = 0
        self.closed_by_fork = False

    @property
    def is_open(self) -> bool:
        return self._links > 0 and not self.closed_by_fork

    def begin(self) -> None:
        self._links += 1

    def end(self) -> None:
        self._links -= 1
        if not self._links:
            self.trim(0)

    def add(self, descriptor: int, size: int, memory: _Mapping) -> None:
        """Keep some memory, or let it go."""
        if not self.is_open:
            self._close(descriptor)
            return
        self._idle[descriptor] = _Idle(descriptor, size, memory, self._now())
        for idle in list(self._idle.values()):
            if len(self._idle) <= IDLE_MAX and self.idle_bytes() <= IDLE_BYTES_MAX:
                break
            self._free(idle)

    def idle_bytes(self) -> int:
        return sum(idle.size for idle in list(self._idle.values()))

    def take(self, size: int) -> _Idle | None:
        """The smallest that has room, unless most of it would be left over."""
        fitting = [each for each in list(self._idle.values()) if size <= each.size <= 2 * size]
        for idle in sorted(fitting, key=lambda idle: idle.size):
            if self._idle.pop(idle.descriptor, None) is not None:
                return idle
        return None

    def trim(self, older_than_s: float) -> None:
        """Free what nobody needed for so long."""
        until_s = self._now() - older_than_s
        for idle in list(self._idle.values()):
            if idle.since_s <= until_s:
                self._free(idle)

    def _free(self, idle: _Idle) -> None:
        if self._idle.pop(idle.descriptor, None) is not None:
            self._close(idle.descriptor)

    def before_fork(self) -> None:
        # The child shares all mappings, and nobody will know when it is through with them.
        self.closed_by_fork = True
        self.trim(0)
        for lent in list(_lent.values()):
            sealed = lent()
            if sealed is not None:
                sealed.fix()
        for used in list(_loans.values()):
            loan = used()
            if loan is not None:
                loan.keep()

    def after_fork(self) -> None:
        self.closed_by_fork = False

    def after_fork_in_child(self) -> None:
        self.closed_by_fork = False
        self._links = 0


_pool: Final = _Pool()


class Sealed:
    """A descriptor of sealed memory, closed with its last user, or kept to be written again."""

    __slots__ = ("__weakref__", "_memory", "descriptor", "loan", "size")

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self.size = size
        self.loan: Loan | None = None
        """Of memory that another process may write again."""
        self._memory: _Mapping | None = None

    def lend(self, memory: _Mapping) -> Sealed:
        """Have it written again, where it is mapped for that, once nobody uses it."""
        self._memory = memory
        _register(_lent, self)
        if _pool.closed_by_fork:
            self.fix()
        return self

    @property
    def is_lent(self) -> bool:
        """Whether it is written again once nobody uses it."""
        return self._memory is not None

    def fix(self) -> None:
        """Seal it for good."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        del memory  # Its mapping with it, else the kernel does not allow the seal.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.descriptor, _F_ADD_SEALS, _SEALS)

    def check(self, size: int, lend: Callable[[], Loan] | None) -> None:
        """Take the size that is said, if it holds and can never change.

        Args:
            size: In bytes.
            lend: Begins the use of memory that may be written again; None: such is refused.

        Raises:
            FrameError: It does not, or can.
        """
        seals = 0
        with contextlib.suppress(OSError):  # It is no memfd.
            seals = fcntl.fcntl(self.descriptor, _F_GET_SEALS)
        is_lent = not seals & _WRITE and seals & _SEALS_LENT == _SEALS_LENT
        if not seals & _SHRINK or not (seals & _WRITE or (is_lent and lend is not None)):
            raise FrameError("memory that is not sealed, or has another size than it says")
        if os.fstat(self.descriptor).st_size != size:
            raise FrameError("memory that is not sealed, or has another size than it says")
        self.size = size
        if is_lent and lend is not None:
            self.loan = lend()

    def __del__(self, close: Callable[[int], None] = os.close, pool: _Pool = _pool) -> None:
        # Bound beforehand: at the end of the interpreter modules are empty.
        memory, self._memory = self._memory, None
        if memory is None:
            close(self.descriptor)
        else:
            pool.add(self.descriptor, self.size, memory)


_lent: dict[int, weakref.ref[Sealed]] = {}
"""Memory of this process that may be written again."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_pool.before_fork,
        after_in_parent=_pool.after_fork,
        after_in_child=_pool.after_fork_in_child,
    )


def begin_lending() -> None:
    """A link has come up whose peer says when it has ceased to use memory."""
    _pool.begin()


def end_lending() -> None:
    """It has ended; with the last one all memory is freed that is kept to be written again."""
    _pool.end()


def trim() -> None:
    """Free memory that was kept to be written again, and that nobody needed."""
    _pool.trim(IDLE_S)


def idle_bytes() -> int:
    """Memory kept to be written again."""
    return _pool.idle_bytes()


class _Mapping(mmap.mmap):
    """A private mapping of sealed memory; what is written there stays in this process."""

    __received__ = True
    """Tells `serializers` that it is no object of the program's."""

    loan: Loan | None = None
    """Of the memory, if it is lent: its use ends with the mapping."""

    # Set for those that are in `_mappings`; the first also where the memory is this process's own.
    sealed: Sealed
    offset: int
    start: int
    pristine: bool


_mappings: dict[int, weakref.ref[_Mapping]] = {}
"""Mappings that know their descriptor, by address."""


def kept() -> int:
    """How many mappings keep a descriptor."""
    return len(_mappings)


def _write(pieces: Sequence[Buffer], lends: bool = False) -> Sealed:
    """Sealed memory that holds the pieces, one after the other.

    What is lent may be larger than they are, and have been used before.
    """
    # Views, so that none can change its size while others run.
    views = [memoryview(piece) for piece in pieces]
    size = sum(map(len, views))
    lends = lends and _pool.is_open
    idle = _pool.take(size) if lends else None
    if idle is not None:
        _copy(views, idle.memory)
        return Sealed(idle.descriptor, idle.size).lend(idle.memory)
    descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    sealed = Sealed(descriptor, size)
    for start in range(0, len(views), _IOV_MAX):
        batch = views[start : start + _IOV_MAX]
        while batch:
            count = os.writev(descriptor, batch)
            while batch and count >= len(batch[0]):
                count -= len(batch.pop(0))
            if count:
                batch[0] = batch[0][count:]
    if lends:
        # NB: mapped after it was written, so that what has no memory is an error, not a signal.
        memory = _mapping(sealed, 0, size, mmap.MAP_SHARED)
        if memory is not None:
            _libc.madvise(memory.start, size, _MADV_DONTFORK)
            try:
                fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS_LENT)
                return sealed.lend(memory)
            except OSError:  # A kernel that does not know the seal.
                del memory
    fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
    return sealed


def _copy(pieces: Sequence[memoryview], memory: _Mapping) -> None:
    """Write pieces one after the other; other threads go on meanwhile."""
    whole = memoryview(memory)
    at = 0
    for piece in pieces:
        size = len(piece)
        if size < _COPIED_APART_MIN:
            whole[at : at + size] = piece
        else:
            ctypes.memmove(_address(whole) + at, _address(piece), size)
        at += size


_COPIED_APART_MIN: Final = 64 << 10
"""A call without the interpreter's lock costs some microseconds."""


def _mapping(sealed: Sealed, offset: int, length: int, flags: int) -> _Mapping | None:
    """Map whole pages; None if no more can be mapped.

    Raises:
        OSError: It cannot be done.
    """
    # NB: not by the module `mmap`, which would hold a descriptor for each mapping. It makes an
    # anonymous one, which the memory then replaces; its end is the same for both.
    made = _Mapping(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.start = _address(made)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    found = _libc.mmap(
        made.start, length, protection, flags | _MAP_FIXED, sealed.descriptor, offset
    )
    if found != _MAP_FAILED:
        return made
    number = ctypes.get_errno()
    if number not in (errno.ENOMEM, errno.EAGAIN):
        raise OSError(number, os.strerror(number))
    return None


def _map(sealed: Sealed, offset: int, length: int, pristine: bool = False) -> memoryview:
    """Map a stretch of sealed memory, or read it if no more can be mapped.

    Raises:
        OSError: Neither can be done.
    """
    skip = offset % _PAGE
    made = _mapping(sealed, offset - skip, length + skip, mmap.MAP_PRIVATE)
    if made is None:
        data = Memory(length)
        if os.preadv(sealed.descriptor, [data], offset) != length:
            raise OSError(errno.EIO, "sealed memory was read short")
        return memoryview(data)
    made.loan = sealed.loan
    if length >= KEPT_BYTES_MIN and len(_mappings) < KEPT_MAX:
        start = made.start
        made.sealed = sealed
        made.offset = offset - skip
        made.pristine = pristine
        _mappings[start] = weakref.ref(made, lambda _: _mappings.pop(start, None))
    elif sealed.is_lent:
        made.sealed = sealed  # As long as it is looked at here, it is not written again.
    return memoryview(made)[skip : skip + length]


def put(pieces: Sequence[Buffer], lends: bool = False) -> memoryview | None:
    """Copy pieces into sealed memory, one after the other, so that they can be sent uncopied.

    Takes as long as the copy does; may be called in any thread.

    Args:
        pieces: What to copy.
        lends: Whether the memory may be written again after its last use, here and where it was
            sent: for what is used for a short time.

    Returns:
        All their bytes, read-only; None if it cannot be done, or is not worth it.
    """
    pieces = [memoryview(piece) for piece in pieces]
    size = sum(map(len, pieces))
    if not AVAILABLE or size < KEPT_BYTES_MIN or len(_mappings) >= KEPT_MAX:
        return None
    try:
        return _map(_write(pieces, lends), 0, size, pristine=True).toreadonly()
    except OSError:
        return None


class Store:
    """Sealed memory that is written piece by piece, and sent uncopied once it is whole.

    Raises:
        OSError: There is no memory, or no descriptor.
    """

    def __init__(self) -> None:
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._sealed = Sealed(descriptor, 0)

    def write(self, data: Buffer) -> None:
        """Add some bytes.

        Raises:
            OSError: There is no memory.
        """
        view = memoryview(data)
        while view:
            written = os.write(self._sealed.descriptor, view)
            self._sealed.size += written
            view = view[written:]

    def seal(self) -> memoryview:
        """All that was written, read-only; nothing can be written any more.

        Raises:
            OSError: It cannot be mapped.
        """
        fcntl.fcntl(self._sealed.descriptor, _F_ADD_SEALS, _SEALS)
        return _map(self._sealed, 0, self._sealed.size, pristine=True).toreadonly()


def store() -> Store:
    """Sealed memory to be written piece by piece; see `Store`."""
    return Store()


def has_room() -> bool:
    """Whether memory that is sealed now could be sent uncopied."""
    return AVAILABLE and len(_mappings) < KEPT_MAX


def travels(part: memoryview) -> bool:
    """Whether a large part would go by reference, with a few patches, rather than be copied."""
    place = _Found().where(part)
    if place is None:
        return False
    runs = [] if place.pristine else written(place.address, len(part))
    most = min(TRAVELS_BYTES_MAX, len(part) // PATCHED_SHARE_MAX)
    return runs is not None and sum(length for _, length in runs) <= most


def settled(message: Gathered) -> Gathered:
    """The same message, with all that is not in sealed memory yet copied there; in any thread."""
    if len(message) < KEPT_BYTES_MIN:
        return message
    found = _Found()
    loose = [part for part in message.parts if found.where(part) is None]
    view = put([piece for part in loose for piece in (part, bytes(-len(part) % _ALIGNMENT))])
    if view is None:
        return message
    parts: list[memoryview] = []
    at = 0
    for part in message.parts:
        if found.where(part) is not None:
            parts.append(part)
            continue
        parts.append(view[at : at + len(part)])
        at += len(part) + -len(part) % _ALIGNMENT
    return Gathered(parts)


class _Place(NamedTuple):
    """Where a part lies: in which memory, and here."""

    sealed: Sealed
    offset: int
    address: int
    pristine: bool


class _Found:
    """The mappings at one moment, to be searched by address."""

    def __init__(self) -> None:
        self._starts = sorted(list(_mappings))

    def where(self, part: memoryview) -> _Place | None:
        """Where a large part lies, if it is in one of them."""
        if len(part) < REFERRED_BYTES_MIN or not self._starts:
            return None
        address = _address(part)
        index = bisect_right(self._starts, address) - 1
        reference = _mappings.get(self._starts[index]) if index >= 0 else None
        mapping = reference() if reference is not None else None
        if mapping is None:
            return None
        offset = address - mapping.start
        if offset + len(part) > len(mapping):
            return None
        return _Place(mapping.sealed, mapping.offset + offset, address, mapping.pristine)


_STATES: Final = bytes(
    # Present or swapped out, and no page of a file: a private copy, which somebody wrote.
    bool(byte & 0xC0) and not byte & 0x20
    for byte in range(256)
)


def written(address: int, length: int) -> list[tuple[int, int]] | None:
    """Stretches of a private mapping that were written, as (offset, length) in whole pages.

    Source: Documentation/admin-guide/mm/pagemap.rst: a page that is present or swapped out, and is
    no page of a file, is a private copy. PAGEMAP_SCAN (Linux 6.7) looks for them in the kernel;
    else they are found in the entries of pagemap, of which bits 61 to 63 say the same.

    Returns:
        The stretches in order, clipped to the bytes asked for; None if it cannot be known.
    """
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            return _scanned(descriptor, address, length)
        except OSError:
            return _looked_up(descriptor, address, length)
    except OSError:
        return None
    finally:
        os.close(descriptor)


_SCAN: Final = struct.Struct("12Q")
_PAGEMAP_SCAN: Final = 0xC0606610
"""`_IOWR('f', 16, struct pm_scan_arg)`. Source: include/uapi/linux/fs.h."""
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_REGIONS_MAX: Final = 1024


def _scanned(descriptor: int, address: int, length: int) -> list[tuple[int, int]]:
    end = -(-(address + length) // _PAGE) * _PAGE
    at = address // _PAGE * _PAGE
    regions = (ctypes.c_uint64 * (3 * _REGIONS_MAX))()
    runs: list[tuple[int, int]] = []
    while at < end:
        # Size, flags, start, end, walk end, regions and their number, most pages, inverted, all
        # of, any of, returned.
        request = bytearray(
            _SCAN.pack(
                *(_SCAN.size, 0, at, end, 0, ctypes.addressof(regions), _REGIONS_MAX, 0),
                *(_IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, _IS_PRESENT),
            )
        )
        count = fcntl.ioctl(descriptor, _PAGEMAP_SCAN, request)
        for index in range(count):
            begin = max(regions[3 * index], address) - address
            stop = min(regions[3 * index + 1], address + length) - address
            if runs and sum(runs[-1]) == begin:
                begin, _ = runs.pop()
            runs.append((begin, stop - begin))
        at = _SCAN.unpack(request)[4]
    return runs


def _looked_up(descriptor: int, address: int, length: int) -> list[tuple[int, int]] | None:
    first = address // _PAGE
    count = (address + length - 1) // _PAGE - first + 1
    entries = bytearray(8 * count)
    if os.preadv(descriptor, [entries], 8 * first) != len(entries):
        return None
    states = entries[7::8].translate(_STATES)
    runs: list[tuple[int, int]] = []
    at = states.find(1)
    while at >= 0:
        end = states.find(0, at)
        end = count if end < 0 else end
        begin = max((first + at) * _PAGE, address)
        stop = min((first + end) * _PAGE, address + length)
        runs.append((begin - address, stop - begin))
        at = states.find(1, end)
    return runs


class Table(NamedTuple):
    """A message laid out: what its frame carries, and the memory that it refers to, in order."""

    data: bytes
    sealed: list[Sealed]


def lay_out(parts: Sequence[memoryview], token: int, room: int | None = None) -> Table | None:
    """Put a message into sealed memory, as far as it is not there already.

    The bytes are taken as they are at the call.

    Args:
        parts: The message.
        token: Under which the descriptors are sent.
        room: Pieces of memory that may still be lent to the reader; None: it does not say when it
            has ceased to use them (see `FEATURE`). What is not lent is sealed for good.

    Returns:
        The table; None if the message has too many parts.

    Raises:
        OSError: There is no memory, or no descriptor.
    """
    found = _Found()
    sealed: list[Sealed] = []
    first: list[Buffer] = []
    first_bytes = 0
    rows: list[bytes] = []
    patches: list[bytes] = []

    def add(data: memoryview) -> int:
        nonlocal first_bytes
        begin = first_bytes
        padding = -len(data) % _ALIGNMENT
        first.extend((data, bytes(padding)))
        first_bytes += len(data) + padding
        return begin

    for part in parts:
        place = found.where(part)
        runs = None
        if (
            place is not None
            and (place.sealed in sealed or len(sealed) < DESCRIPTORS_MAX - 1)
            and (room is not None or place.sealed.loan is None)
        ):
            runs = [] if place.pristine else written(place.address, len(part))
        if (
            place is None
            or runs is None
            or sum(length for _, length in runs) * PATCHED_SHARE_MAX > len(part)
        ):
            rows.append(_PART.pack(0, add(part), len(part), 0))
            continue
        if place.sealed.loan is not None:
            place.sealed.loan.keep()
        if place.sealed not in sealed:
            sealed.append(place.sealed)
        index = sealed.index(place.sealed) + 1
        rows.append(_PART.pack(index, place.offset, len(part), len(runs)))
        for begin, length in runs:
            patches.append(_PATCH.pack(begin, add(part[begin : begin + length]), length))
    if len(rows) + len(patches) > PARTS_MAX:
        return None
    inline = first_bytes <= INLINE_BYTES_MAX
    if not inline:
        sealed.insert(0, _write(first, bool(room)))
    if room is None or room < len(sealed):
        for memory in sealed:
            memory.fix()
    head = _HEAD.pack(token, len(sealed) << 1 | inline, len(rows), len(patches), first_bytes)
    sizes = [_SIZE.pack(memory.size) for memory in sealed]
    data = b"".join((head, *sizes, *rows, *patches, *(first if inline else ())))
    return Table(data, sealed)


def collect(
    data: Buffer,
    take: Callable[[int], list[int]],
    message_bytes_max: int,
    tell: Callable[[int], None] | None = None,
) -> list[memoryview]:
    """Map what a table describes.

    Args:
        data: The table, from an authenticated peer.
        take: Gives the descriptors that were sent under a token, to be closed here.
        message_bytes_max: Larger messages are refused.
        tell: See `Loan`; None: memory that is lent is refused.

    Returns:
        The message's parts, each in memory of its own, writable.

    Raises:
        FrameError: The table is malformed, or refers to what it must not.
        OSError: There is no memory.
    """
    try:
        return list(_collected(memoryview(data), take, message_bytes_max, tell))
    except struct.error as error:
        raise FrameError(f"a table of shared memory is cut off: {error}") from error


def _collected(
    data: memoryview,
    take: Callable[[int], list[int]],
    message_bytes_max: int,
    tell: Callable[[int], None] | None,
) -> Iterator[memoryview]:
    token, flags, part_count, patch_count, first_bytes = _HEAD.unpack_from(data)
    inline, count = flags & 1, flags >> 1
    # All are taken over at once, so that none is left open whatever is wrong with them.
    sealed = [Sealed(descriptor, 0) for descriptor in (take(token) if count else ())]
    if part_count + patch_count > PARTS_MAX or count != len(sealed):
        raise FrameError("a table of shared memory with other entries than it says")
    at = _HEAD.size
    for index, memory in enumerate(sealed):
        lend = None if tell is None else partial(Loan, loan_number(token, index), tell)
        memory.check(_SIZE.unpack_from(data, at)[0], lend)
        at += _SIZE.size
    rows = [_PART.unpack_from(data, at + i * _PART.size) for i in range(part_count)]
    at += part_count * _PART.size
    patches = [_PATCH.unpack_from(data, at + i * _PATCH.size) for i in range(patch_count)]
    at += patch_count * _PATCH.size
    if inline:
        if len(data) - at != first_bytes:
            raise FrameError("a table of shared memory of another size than it says")
        first = memoryview(Memory(data[at:]))
    elif len(data) != at or not sealed or sealed[0].size < first_bytes:
        raise FrameError("a table of shared memory of another size than it says")
    else:
        first = _map(sealed.pop(0), 0, first_bytes)
    if sum(row[2] for row in rows) > message_bytes_max:
        raise FrameError("a message in shared memory over the limit; see message_bytes_max")
    of_patches = iter(patches)
    ends: list[tuple[int, int]] = []
    for index, offset, length, patched in rows:
        if index == 0:
            if patched or offset + length > first_bytes:
                raise FrameError("a part of a message lies outside of its memory")
            ends.append((offset, length))
            yield first[offset : offset + length]
            continue
        if index > len(sealed) or not length or offset + length > sealed[index - 1].size:
            raise FrameError("a part of a message lies outside of its memory")
        # NB: a mapping for each part, since two may overlap and must not be one.
        view = _map(sealed[index - 1], offset, length)
        for _ in range(patched):
            try:
                begin, source, size = next(of_patches)
            except StopIteration:
                raise FrameError("fewer patches than parts ask for") from None
            if begin + size > length or source + size > first_bytes:
                raise FrameError("a patch lies outside of its memory")
            view[begin : begin + size] = first[source : source + size]
        yield view
    end = 0
    for offset, length in sorted(ends):
        if offset < end:
            raise FrameError("two parts of a message overlap")
        end = offset + length
