"""The Serializer interface, and Snapshot: the value that all serializers exchange.

Layout of a head, little-endian, `HEAD_SIZE_BYTES` long::

    magic 4 | format 1 | flags 1 | implementation 1 | major 1 | minor 1 | zero 3
    | number of buffers 4 | body size 8 | check 8

The check is the XXH3 hash (64 bits) of the body, seeded with that of the head and its table, so
that damage is seen before any opcode of the body is executed. It does not cover the buffers, which
are data and cannot do harm. It is no protection against malice: what comes from elsewhere has a
MAC, verified before it gets here. Source of the choice: measured, zlib's CRC-32 took a tenth of the
time of a dump.

The head is followed, if there are buffers, by their sizes (8 bytes each) and kinds (1 byte each).
In one self-contained string the body comes next, then each buffer at the next multiple of 64 bytes
from the string's beginning, so that arrays that are used in place start on a cache line.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, TypeAlias

from xxhash import xxh3_64_intdigest as hash_of

from .errors import LoadFailed

Part: TypeAlias = bytes | memoryview

MAGIC = b"\x93LMS"
FORMAT_VERSION = 1
FLAG_CODE_BY_VALUE = 1
ALIGNMENT_BYTES = 64
"""Start of each buffer. Source: size of a cache line on x86-64; what Arrow's format asks for."""
BUFFERS_MAX = 1 << 20
"""Most buffers in one snapshot; what is beyond that stays in the body."""

_FIELDS = struct.Struct("<4sBBBBB3xIQ")
_CHECK_BYTES = 8
HEAD_SIZE_BYTES = _FIELDS.size + _CHECK_BYTES
_IMPLEMENTATIONS = {"cpython": 1, "pypy": 2, "graalpy": 3}
_NAMES = {number: name for name, number in _IMPLEMENTATIONS.items()}
_IMPLEMENTATION = _IMPLEMENTATIONS.get(sys.implementation.name, 255)

PLAIN_PREFIX = _FIELDS.pack(
    MAGIC, FORMAT_VERSION, 0, _IMPLEMENTATION, sys.version_info[0], sys.version_info[1], 0, 0
)[:16]
"""Head, up to its body size, of a string without buffers and without code, made by this Python."""


def is_plain(data: bytes) -> bool:
    """Tell whether a string is whole, undamaged and of that kind; if not, it may be another one."""
    return (
        data.startswith(PLAIN_PREFIX)
        and len(data) - HEAD_SIZE_BYTES == int.from_bytes(data[16 : _FIELDS.size], "little")
        and hash_of(memoryview(data)[HEAD_SIZE_BYTES:], hash_of(data[: _FIELDS.size]))
        == int.from_bytes(data[_FIELDS.size : HEAD_SIZE_BYTES], "little")
    )


def plain_head(body: bytes | memoryview) -> bytes:
    """The whole head of such a string."""
    fields = PLAIN_PREFIX + len(body).to_bytes(8, "little")
    return fields + hash_of(body, hash_of(fields)).to_bytes(_CHECK_BYTES, "little")


class BufferKind(IntEnum):
    """What a buffer was, hence what has to be rebuilt from it."""

    READ_ONLY = 0
    WRITABLE = 1
    BYTES = 2
    BYTEARRAY = 3


@dataclass(frozen=True, slots=True)
class Head:
    """The parsed head of a snapshot.

    Attributes:
        code_by_value: Code objects are in the body, so only the same Python minor can load it.
        implementation: Name of the Python implementation that wrote it, such as `cpython`.
        python: Its (major, minor).
        body_size_bytes: Length of the pickle.
        check: What the hash of the body must be, seeded with `begun`, that of head and table.
        buffer_sizes_bytes: Length of each buffer, in order.
        kinds: Kind of each buffer, in order.
    """

    code_by_value: bool
    implementation: str
    python: tuple[int, int]
    body_size_bytes: int
    buffer_sizes_bytes: tuple[int, ...]
    kinds: bytes
    check: int
    begun: int

    @property
    def size_bytes(self) -> int:
        """Length of the head itself, including the table of buffers."""
        return HEAD_SIZE_BYTES + 9 * len(self.kinds)

    def check_body(self, body: Part | bytearray) -> None:
        """Refuse a body that is not the one that was written, before anything is unpickled.

        Raises:
            LoadFailed: Head or body were changed.
        """
        if hash_of(body, self.begun) != self.check:
            raise LoadFailed("damaged: its bytes are not those that were written")

    def check_loadable(self) -> None:
        """Refuse code that this Python cannot run, before anything is unpickled.

        Raises:
            LoadFailed: The body holds code of another implementation or minor version.
        """
        if not self.code_by_value:
            return
        here = (sys.implementation.name, sys.version_info[:2])
        if (self.implementation, self.python) != here:
            written = f"{self.implementation} {self.python[0]}.{self.python[1]}"
            reader = f"{here[0]} {here[1][0]}.{here[1][1]}"
            raise LoadFailed(
                f"holds code by value written by {written}, and this is {reader}: "
                "bytecode does not carry over between minor versions",
                "run both sides on one minor version, or put the classes into a module "
                "that both can import",
            )


def pack_head(
    *, code_by_value: bool, body: Part, buffer_sizes_bytes: Sequence[int], kinds: bytes
) -> bytes:
    """Build the head of `body` for this Python; one kind for each buffer size."""
    count = len(buffer_sizes_bytes)
    flags = FLAG_CODE_BY_VALUE if code_by_value else 0
    major, minor = sys.version_info[:2]
    fields = _FIELDS.pack(
        MAGIC, FORMAT_VERSION, flags, _IMPLEMENTATION, major, minor, count, len(body)
    )
    table = struct.pack(f"<{count}Q", *buffer_sizes_bytes) + kinds
    check = hash_of(body, hash_of(fields + table))
    return fields + check.to_bytes(_CHECK_BYTES, "little") + table


def parse_head(data: Part | bytearray) -> Head:
    """Read the head at the beginning of `data`, whatever follows it.

    Raises:
        LoadFailed: Not ours, cut short, of a newer format, or out of bounds.
    """
    if len(data) < HEAD_SIZE_BYTES:
        prefix = bytes(data[:4])
        if prefix and MAGIC.startswith(prefix):
            raise LoadFailed(f"truncated: {len(data)} bytes do not hold a whole head")
        raise LoadFailed("not a livemigrate snapshot: its magic is missing")
    magic, version, flags, implementation, major, minor, count, body = _FIELDS.unpack_from(data)
    if magic != MAGIC:
        raise LoadFailed("not a livemigrate snapshot: its magic is missing")
    if version > FORMAT_VERSION:
        raise LoadFailed(
            f"written in format {version}, and this release reads up to {FORMAT_VERSION}",
            "upgrade livemigrate here",
        )
    if version < 1 or flags & ~FLAG_CODE_BY_VALUE or data[9:12] != b"\0\0\0":
        raise LoadFailed("damaged: the head has values that no release writes")
    if count > BUFFERS_MAX:
        raise LoadFailed(f"damaged: {count} buffers, and at most {BUFFERS_MAX} are allowed")
    if len(data) < HEAD_SIZE_BYTES + 9 * count:
        raise LoadFailed(f"truncated: the table of its {count} buffers is incomplete")
    sizes = struct.unpack_from(f"<{count}Q", data, HEAD_SIZE_BYTES)
    kinds = bytes(data[HEAD_SIZE_BYTES + 8 * count : HEAD_SIZE_BYTES + 9 * count])
    if kinds and max(kinds) > max(BufferKind):
        raise LoadFailed("damaged: a buffer of unknown kind")
    name = _NAMES.get(implementation, f"implementation {implementation}")
    by_value = bool(flags & FLAG_CODE_BY_VALUE)
    check = int.from_bytes(data[_FIELDS.size : HEAD_SIZE_BYTES], "little")
    table = bytes(data[HEAD_SIZE_BYTES : HEAD_SIZE_BYTES + 9 * count])
    begun = hash_of(bytes(data[: _FIELDS.size]) + table)
    return Head(by_value, name, (major, minor), body, sizes, kinds, check, begun)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Whole state of an object graph, ready to be shipped in parts.

    Buffers made by `encode` are read-only views of live memory, not copies: they show later
    changes, and they must have been sent or joined before the objects change. Buffers received in
    writable memory (`bytearray`) are taken over by `decode`, which then copies nothing.

    Attributes:
        head: Small header: versions, sizes, kinds.
        body: The pickle.
        buffers: Memory out of band, each one-dimensional, contiguous and of single bytes.
    """

    head: bytes
    body: bytes | memoryview
    buffers: tuple[memoryview, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts together, without padding."""
        return len(self.head) + len(self.body) + sum(b.nbytes for b in self.buffers)

    def parts(self) -> list[bytes | memoryview]:
        """Head, body, then each buffer; nothing is copied."""
        return [self.head, self.body, *self.buffers]

    @classmethod
    def from_parts(cls, parts: Sequence[bytes | bytearray | memoryview]) -> Snapshot:
        """Put together what `parts` gave, as received; nothing is copied but the head.

        Raises:
            LoadFailed: Missing or surplus parts, or sizes that differ from the head's.
        """
        if len(parts) < 2:
            raise LoadFailed(f"truncated: {len(parts)} parts, and a snapshot has at least 2")
        head = parse_head(parts[0])
        if len(parts[0]) != head.size_bytes:
            raise LoadFailed("damaged: the head's size does not fit its number of buffers")
        if len(parts) - 2 != len(head.kinds):
            raise LoadFailed(f"has {len(parts) - 2} buffers, and its head names {len(head.kinds)}")
        views = tuple(memoryview(part).cast("B") for part in parts[1:])
        for index, (view, size) in enumerate(
            zip(views, (head.body_size_bytes, *head.buffer_sizes_bytes), strict=True)
        ):
            if view.nbytes != size:
                what = f"buffer {index - 1}" if index else "the body"
                raise LoadFailed(f"{what} has {view.nbytes} bytes, and its head says {size}")
        body = parts[1]
        return cls(bytes(parts[0]), body if isinstance(body, bytes) else views[0], views[1:])

    def pieces(self) -> list[bytes | memoryview]:
        """What `to_bytes` joins: the parts, with padding between them; nothing is copied."""
        pieces: list[bytes | memoryview] = [self.head, self.body]
        offset = len(self.head) + len(self.body)
        for buffer in self.buffers:
            start = _aligned(offset)
            pieces += (bytes(start - offset), buffer)
            offset = start + buffer.nbytes
        return pieces

    def to_bytes(self) -> bytes:
        """One self-contained string: parts joined, each buffer aligned to 64 bytes."""
        return b"".join(self.pieces())

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Snapshot:
        """Split what `to_bytes` gave; the parts are views into `data`.

        Raises:
            LoadFailed: Garbage, cut short, bytes left over, or a newer format.
        """
        view = memoryview(data)
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        head = parse_head(view)
        offset = head.size_bytes + head.body_size_bytes
        bounds: list[tuple[int, int]] = []
        end = offset
        for size in head.buffer_sizes_bytes:
            start = _aligned(end)
            end = start + size
            bounds.append((start, end))
        if end != len(view):
            kind = "truncated" if end > len(view) else "damaged"
            raise LoadFailed(f"{kind}: the head announces {end} bytes, and there are {len(view)}")
        buffers = tuple(view[start:stop] for start, stop in bounds)
        return cls(bytes(view[: head.size_bytes]), view[head.size_bytes : offset], buffers)


_notes: ContextVar[list[str] | None] = ContextVar("serializers.notes", default=None)


def lossy(reason: str) -> None:
    """Say, from within a reducer, what of its object will not arrive as it is.

    It is noted with the object's path while somebody checks; a dump itself goes on.

    Args:
        reason: What is lost, as in "its cached results are left behind".
    """
    notes = _notes.get()
    if notes is not None:
        notes.append(reason)


def is_checking() -> bool:
    """Tell a reducer whether it is asked ahead of time: then nothing may change, files included."""
    return _notes.get() is not None


@contextmanager
def gathering() -> Iterator[list[str]]:
    """Gather what reducers call lossy into the list that it gives."""
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


_comparing: ContextVar[bool] = ContextVar("serializers.comparing", default=False)


def is_comparing() -> bool:
    """Tell a reducer whether states are compared: then what is no part of one must not count."""
    return _comparing.get()


@contextmanager
def comparing() -> Iterator[None]:
    """Let reducers know, meanwhile, that what they give is compared and not written."""
    token = _comparing.set(True)
    try:
        yield
    finally:
        _comparing.reset(token)


class Serializer(Protocol):
    """Turns live objects into snapshots and back."""

    def encode(self, obj: object) -> Snapshot:
        """Capture `obj` and all that it refers to, leaving the original untouched.

        Raises:
            NotSerializable: Something cannot travel.
        """

    def decode(self, snapshot: Snapshot) -> object:
        """Rebuild what `encode` captured, as new objects.

        Raises:
            LoadFailed: The snapshot is damaged or does not fit this process.
        """
