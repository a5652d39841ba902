"""What a pickler writes into: chunks of a body, and the buffers between them.

`assemble` turns what a C pickler wrote into a body and buffers. CPython's pickler hands bytes and
bytearrays of 64 KiB and more to its file as they are, outside of any frame, right after a chunk
that ends in their opcode and length. That boundary lets them leave the body without being copied
into it: their opcode is replaced by NEXT_BUFFER. Bytearrays are copied once, since a view of a live
one would forbid its owner to resize it. Source: `_Pickler_write_bytes` in CPython's
Modules/_pickle.c; framing as in PEP 3154, buffers as in PEP 574.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import cast

from .base import BUFFERS_MAX, BufferKind, Snapshot, pack_head

PROTOCOL = 5
IN_BAND_BYTES_MAX = 4096
"""Arrays up to this size stay in the body: a part of its own costs more than copying a page."""
LARGE_BYTES_MIN = 64 * 1024
"""Byte strings from this size on leave the body. Source: `FRAME_SIZE_TARGET` of CPython's pickler,
which hands them over uncopied."""

_OPCODE_PROTO = 0x80
_OPCODE_FRAME = 0x95
_OPCODE_NEXT_BUFFER = b"\x97"


class Sink:
    """A file for a pickler that keeps the chunks as they come, and the buffers between them."""

    __slots__ = ("buffers", "chunks", "found", "pieces", "view_of", "write")

    def __init__(self) -> None:
        self.chunks: list[bytes | bytearray | memoryview] = []
        self.write = self.chunks.append
        self.buffers: list[tuple[int, memoryview, BufferKind]] = []
        self.pieces: list[bytes | bytearray | memoryview] = []
        self.found: list[tuple[memoryview, BufferKind]] = []

        # How the memory of a large byte string or bytearray is handed out.
        self.view_of: Callable[[bytes | bytearray], memoryview] = copied_unless_bytes

    def take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Buffer callback: True to keep it in the body.

        Raises:
            BufferError: The memory is not contiguous.
        """
        raw = buffer.raw()
        if raw.nbytes <= IN_BAND_BYTES_MAX or len(self.buffers) >= BUFFERS_MAX // 2:
            return True
        kind = BufferKind.READ_ONLY if raw.readonly else BufferKind.WRITABLE
        # NB: read-only, so that no decoder in this process can make two objects share memory.
        self.buffers.append((len(self.chunks), raw.toreadonly(), kind))
        return False

    @property
    def has_room(self) -> bool:
        """Whether another buffer may be put into `found` by the pickler itself."""
        return len(self.found) < BUFFERS_MAX // 2

    def assemble(self) -> None:
        """Fill `pieces` of the body, and `found`, the buffers that it asks for in order.

        Once all is written.

        Raises:
            BufferError: A bytearray changed its size in the meantime.
        """
        self.pieces, self.found = assemble(self.chunks, self.buffers, self.view_of)

    @property
    def body(self) -> bytes:
        """What was assembled, joined anew each time unless it is one piece."""
        first = self.pieces[0]
        return first if len(self.pieces) == 1 and type(first) is bytes else b"".join(self.pieces)

    def snapshot(self, *, code_by_value: bool) -> Snapshot:
        """What was assembled, as a snapshot."""
        body, found = self.body, self.found
        head = pack_head(
            code_by_value=code_by_value,
            body=body,
            buffer_sizes_bytes=[view.nbytes for view, _ in found],
            kinds=bytes(kind for _, kind in found),
        )
        return Snapshot(head, body, tuple(view for view, _ in found))


def copied_unless_bytes(chunk: bytes | bytearray) -> memoryview:
    """A view of a large byte string; of a bytearray, which must stay free to change, a copy's."""
    return memoryview(bytes(chunk))


def assemble(
    chunks: list[bytes | bytearray | memoryview],
    taken: list[tuple[int, memoryview, BufferKind]],
    view_of: Callable[[bytes | bytearray], memoryview] = copied_unless_bytes,
) -> tuple[list[bytes | bytearray | memoryview], list[tuple[memoryview, BufferKind]]]:
    """Separate large byte strings from what a C pickler wrote.

    Args:
        chunks: Arguments of the file's `write`, in order.
        taken: Buffers taken out of band: how many chunks were written before, memory, kind.
        view_of: Gives the memory of what leaves the body.

    Returns:
        Pieces of the body, and all buffers in the order in which the body asks for them.
    """
    if len(chunks) == 1:
        return chunks, [(view, kind) for _, view, kind in taken]
    pieces: list[bytes | bytearray | memoryview] = []
    buffers: list[tuple[memoryview, BufferKind]] = []
    at = 0
    own = 0
    loose = b""
    for index, chunk in enumerate(chunks):
        # A buffer taken while this chunk was being filled comes before whatever follows it.
        while at < len(taken) and taken[at][0] < index:
            buffers.append(taken[at][1:])
            at += 1
        kind = _payload_kind(chunk, loose) if loose and own < BUFFERS_MAX // 2 else None
        if kind is not None:
            header = 9 if kind is BufferKind.BYTEARRAY or len(chunk) > 0xFFFFFFFF else 5
            pieces[-1] = b"".join((memoryview(pieces[-1])[:-header], _OPCODE_NEXT_BUFFER))
            buffers.append((view_of(cast("bytes | bytearray", chunk)), kind))
            own += 1
            loose = b""
        else:
            pieces.append(chunk)
            # What follows the header of a payload that stays is never itself a header.
            loose = b"" if loose else _unframed_tail(chunk)
    buffers.extend(entry[1:] for entry in taken[at:])
    return pieces, buffers


def _unframed_tail(chunk: bytes | bytearray | memoryview) -> bytes:
    """What follows the last whole frame: empty unless a payload, or the end, comes next."""
    view = memoryview(chunk)
    at = 2 if len(view) > 2 and view[0] == _OPCODE_PROTO else 0
    while len(view) - at >= 9 and view[at] == _OPCODE_FRAME:
        at += 9 + int.from_bytes(view[at + 1 : at + 9], "little")
    return bytes(view[at:])


def _payload_kind(chunk: object, loose: bytes) -> BufferKind | None:
    """Tell whether `chunk` is the payload that the opcode at the end of `loose` announces."""
    if type(chunk) is bytearray:
        announced = b"\x96" + len(chunk).to_bytes(8, "little")
        kind = BufferKind.BYTEARRAY
    elif type(chunk) is bytes:
        size = len(chunk)
        announced = (
            b"B" + size.to_bytes(4, "little")
            if size <= 0xFFFFFFFF
            else b"\x8e" + size.to_bytes(8, "little")
        )
        kind = BufferKind.BYTES
    else:
        return None
    if loose.endswith(announced):
        return kind
    if kind is BufferKind.BYTEARRAY:
        raise BufferError("a bytearray changed its size while it was being captured")
    return None
