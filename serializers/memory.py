"""Large pieces of memory, made and filled without holding up the other threads of the process.

`bytearray(size)`, `bytes(view)` and an assignment to a slice keep the interpreter's lock for all
the time that they take: 25 ms for 50 MiB of memory that has to be had from the kernel. A node's
loop waits as long, and all its servers with it. What is made here is had from the kernel page by
page, as it is written, and what is large is written with the lock released.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any, Final, TypeAlias

from .base import BufferKind

Memory: TypeAlias = bytearray | bytes | memoryview

LARGE_BYTES: Final = 256 * 1024
"""Copied with the interpreter's lock released from this size on. Source: measured, it takes 20 to
100 us to copy, and whoever releases the lock may have to wait 5 ms until it is had again."""
_SMALL_BYTES: Final = 4096
"""Immutable strings below this size are not filled after they were made: the interpreter has only
one of each of the shortest."""


class Pages(mmap.mmap):
    """Memory from the kernel, of this process alone."""

    __slots__ = ()

    __received__ = True
    """An array in it is one of its own, and no view of an object of the program's."""


_uninitialised: Any = ctypes.pythonapi.PyByteArray_FromStringAndSize
_uninitialised.restype = ctypes.py_object
_uninitialised.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)


def blank(size: int, kind: int) -> Memory:
    """Memory to be filled by `write`, all zeros before.

    Args:
        size: Bytes.
        kind: What it is for. Of BYTES and READ_ONLY it is a `bytes` that nobody else may have
            seen before the last `write`; of BYTEARRAY a bytearray; else a writable view.

    Raises:
        MemoryError: There is not as much.
        OverflowError: There cannot be.
    """
    if size < _SMALL_BYTES:
        return bytearray(size)
    if kind == BufferKind.BYTES or kind == BufferKind.READ_ONLY:
        return bytes(size)
    if kind == BufferKind.BYTEARRAY:
        return _blank_bytearray(size)
    try:
        return memoryview(Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError as error:
        raise MemoryError(str(error)) from error


def write(memory: Memory, offset: int, data: memoryview) -> None:
    """Write into memory from `blank`, or into any that is writable.

    Args:
        memory: Where to; at least `offset + len(data)` bytes.
        offset: Where in it.
        data: Contiguous bytes, which do not change meanwhile.
    """
    size = data.nbytes
    if offset < 0 or offset + size > len(memory):
        raise ValueError(f"{size} bytes at {offset} of {len(memory)}")
    if type(memory) is bytes or size >= LARGE_BYTES:
        ctypes.memmove(address_of(memory) + offset, address_of(data), size)
    else:
        memory[offset : offset + size] = data  # type: ignore[index]


def copied(memory: Memory, kind: int) -> Memory:
    """A copy of some memory, as `blank` makes it.

    Args:
        memory: Contiguous bytes, which do not change meanwhile.
        kind: What the copy is for.
    """
    made = blank(len(memory), kind)
    write(made, 0, memoryview(memory))
    return made


def copied_bytes(view: memoryview) -> bytes:
    """`bytes(view)`.

    Args:
        view: Contiguous bytes, which do not change meanwhile.
    """
    if view.nbytes < LARGE_BYTES:
        return bytes(view)
    made = copied(view.cast("B"), BufferKind.BYTES)
    assert type(made) is bytes
    return made


def _blank_bytearray(size: int) -> bytearray:
    made: bytearray = _uninitialised(None, size)
    if size < LARGE_BYTES:
        made[:] = bytes(size)
    else:
        ctypes.memset(address_of(made), 0, size)
    return made


class _PyBuffer(ctypes.Structure):
    """`Py_buffer`. Source: CPython's Include/pybuffer.h."""

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


_PY_BUF_FULL_RO = 0x11C


def address_of(obj: Any) -> int:
    """Address of the first element of an exporter's memory."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(
        ctypes.py_object(obj), ctypes.byref(buffer), ctypes.c_int(_PY_BUF_FULL_RO)
    )
    address = buffer.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address
