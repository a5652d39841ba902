"""What a pickler writes into: a body, and the buffers that leave it.

CPython's pickler hands bytes and bytearrays of 64 KiB and more to its file as they are, outside of
any frame, right after a chunk that ends in their opcode and length. That boundary lets them leave
the body without being copied into it: their opcode is replaced by NEXT_BUFFER. Bytearrays are
copied once, since a view of a live one would forbid its owner to resize it. Source:
`_Pickler_write_bytes` in CPython's Modules/_pickle.c; framing as in PEP 3154, buffers as in PEP
574.

Each chunk is copied into one growing string as it comes, while the processor's cache still holds
it, behind room for the head; so the string of `dumps` is complete without its pieces being joined.
Source: measured, to keep the chunks and to join them took a twentieth of the time of a dump more.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable

from .base import BUFFERS_MAX, HEAD_SIZE_BYTES, BufferKind, Snapshot, pack_head, plain_head

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
    """A file for one pickler.

    Attributes:
        found: Buffers that left the body, in the order in which it asks for them.
        view_of: How the memory of a large byte string or bytearray is handed out. A bytearray is
            copied by default, since a view of a live one would forbid its owner to resize it.
    """

    __slots__ = ("_last", "_stream", "found", "view_of")

    def __init__(self) -> None:
        self.found: list[tuple[memoryview, BufferKind]] = []
        self.view_of: Callable[[bytes | bytearray], memoryview] = _view_of_bytes
        # The chunk that came last, which may have to lose the opcode at its end. Most states are
        # one chunk, so the stream is made when a second one comes.
        self._last: bytes | None = None
        self._stream: io.BytesIO | None = None

    def write(self, chunk: bytes | bytearray) -> None:
        """Take what a pickler writes.

        Raises:
            BufferError: A bytearray changed its size in the meantime.
        """
        last = self._last
        if last is None:
            self._last = bytes(chunk)
        elif len(chunk) >= LARGE_BYTES_MIN and self._leaves(chunk, last):
            pass
        else:
            self._append(last)
            self._last = bytes(chunk)

    def _append(self, chunk: bytes | memoryview) -> None:
        if self._stream is None:
            self._stream = io.BytesIO()
            self._stream.write(bytes(HEAD_SIZE_BYTES))
        self._stream.write(chunk)

    def _leaves(self, chunk: bytes | bytearray, last: bytes) -> bool:
        """Let a chunk leave if it is the payload that the opcode at the end of `last` announces."""
        if not self.has_room:
            return False
        size = len(chunk)
        if type(chunk) is bytearray:
            header = b"\x96" + size.to_bytes(8, "little")
            kind = BufferKind.BYTEARRAY
        else:
            kind = BufferKind.BYTES
            if size <= 0xFFFFFFFF:
                header = b"B" + size.to_bytes(4, "little")
            else:
                header = b"\x8e" + size.to_bytes(8, "little")
        if not last.endswith(header) or len(_unframed_tail(last)) < len(header):
            if kind is BufferKind.BYTEARRAY:
                raise BufferError("a bytearray changed its size while it was being captured")
            return False
        self._append(memoryview(last)[: -len(header)])
        self._append(_OPCODE_NEXT_BUFFER)
        self._last = None
        self.found.append((self.view_of(chunk), kind))
        return True

    def take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Buffer callback: True to keep it in the body.

        Raises:
            BufferError: The memory is not contiguous.
        """
        raw = buffer.raw()
        if raw.nbytes <= IN_BAND_BYTES_MAX or not self.has_room:
            return True
        kind = BufferKind.READ_ONLY if raw.readonly else BufferKind.WRITABLE
        # NB: read-only, so that no decoder in this process can make two objects share memory.
        self.found.append((raw.toreadonly(), kind))
        return False

    def abandon(self) -> None:
        """Let go of the memory of live objects: an error that somebody keeps must not hold it."""
        self.found.clear()
        self._last = self._stream = None

    @property
    def has_room(self) -> bool:
        """Whether another buffer may leave the body."""
        return len(self.found) < BUFFERS_MAX

    def settle(self) -> int:
        """End one pickle, of which another one may follow.

        Returns:
            Bytes of all that was written so far, buffers included.
        """
        if self._last is not None:
            self._append(self._last)
            self._last = None
        written = 0 if self._stream is None else self._stream.tell() - HEAD_SIZE_BYTES
        return written + sum(view.nbytes for view, _ in self.found)

    def snapshot(self, *, code_by_value: bool) -> Snapshot:
        """All that was written, as a snapshot; nothing may be written any more."""
        body: bytes | memoryview = self._last or b""
        if self._stream is not None:
            self.settle()
            body = memoryview(self._stream.getvalue())[HEAD_SIZE_BYTES:]
        found = self.found
        head = pack_head(
            code_by_value=code_by_value,
            body=body,
            buffer_sizes_bytes=[view.nbytes for view, _ in found],
            kinds=bytes(kind for _, kind in found),
        )
        return Snapshot(head, body, tuple(view for view, _ in found))

    def plain_string(self) -> bytes:
        """All that was written, with its head, if it has neither buffers nor code by value."""
        if self._stream is None:
            body = self._last or b""
            return plain_head(body) + body
        self.settle()
        with self._stream.getbuffer() as whole, whole[HEAD_SIZE_BYTES:] as written:
            whole[:HEAD_SIZE_BYTES] = plain_head(written)
        # NB: only now, without views of it, is its memory given away rather than copied.
        return self._stream.getvalue()


def _unframed_tail(chunk: bytes) -> bytes:
    """What follows the last whole frame: empty unless a payload, or the end, comes next."""
    at = 2 if len(chunk) > 2 and chunk[0] == _OPCODE_PROTO else 0
    while len(chunk) - at >= 9 and chunk[at] == _OPCODE_FRAME:
        at += 9 + int.from_bytes(chunk[at + 1 : at + 9], "little")
    return chunk[at:]


def _view_of_bytes(chunk: bytes | bytearray) -> memoryview:
    return memoryview(bytes(chunk))
