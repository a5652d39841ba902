"""Reducers for arrays of numpy, not imported for that: what shares memory goes on doing so.

numpy pickles every array by itself, so a view arrives as a copy, and writes through the one are no
longer seen by the other. Here a view is carried as one: of the array that it looks into in the end,
the root, or of what gave the root its memory, such as a bytearray. The root travels whole.
"""

from __future__ import annotations

import array as arrays_of_python
import ctypes
import importlib
import mmap
import sys
from typing import Any

from .base import lossy
from .memory import address_of
from .resources import Reduced, set_state

_DRAGS_BYTES_MIN = 1 << 20


def reduce_array(array: Any) -> Reduced:
    """Reduce an ndarray, or an instance of a subclass that does not say how."""
    numpy = sys.modules["numpy"]
    kind = type(array)
    if kind is not numpy.ndarray and not _is_pickled_as_array(kind, numpy.ndarray):
        return NotImplemented
    root = array
    while isinstance(base := _base_of(root), numpy.ndarray):
        root = base
    if root is not array:
        view = _reduce_view(array, root)
    elif isinstance(root.base, memoryview):
        view = _reduce_over(array, root.base.obj)
    else:
        view = _reduce_over(array, root.base)
    if view is not NotImplemented:
        return view
    attributes = getattr(array, "__dict__", None)
    if kind is numpy.ndarray or kind.__module__.partition(".")[0] == "numpy" or not attributes:
        return NotImplemented
    # Its own way forgets the attributes that a subclass adds.
    return _make_array_subclass, (kind, _plain_array(array)), attributes, None, None, set_state


def _base_of(array: Any) -> Any:
    base = array.base
    # What numpy's stride tricks put between a view and its array.
    return base.base if type(base).__name__ == "DummyArray" else base


def _is_pickled_as_array(kind: Any, ndarray: Any) -> bool:
    ways = ("__reduce__", "__reduce_ex__", "__setstate__")
    return all(getattr(kind, way) is getattr(ndarray, way) for way in ways)


def _plain_array(array: Any) -> Any:
    """The array without its class, and not a view of it, which would have to bring it along."""
    ndarray = sys.modules["numpy"].ndarray
    plain = array.view(ndarray)
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    if (
        array.dtype.hasobject
        or not array.size
        or not getattr(array.flags, f"{order}_contiguous".lower())
    ):
        return ndarray.copy(plain, order=order)
    memory = memoryview(plain.reshape(-1, order=order).view("u1"))
    return ndarray(array.shape, array.dtype, buffer=memory, strides=array.strides)


def _reduce_view(array: Any, root: Any) -> Reduced:
    ordered = root.flags.c_contiguous or root.flags.f_contiguous
    if not ordered or (array.flags.writeable and not root.flags.writeable):
        return NotImplemented
    objects = array.dtype.hasobject or root.dtype.hasobject
    if objects and array.dtype != root.dtype:
        return NotImplemented
    if root.nbytes - array.nbytes > max(_DRAGS_BYTES_MIN, array.nbytes):
        lossy(f"it drags along the {root.nbytes} bytes of the array that it is a view of")
    offset = array.ctypes.data - root.ctypes.data if array.size else 0
    return _view(array, root, offset)


def _reduce_over(array: Any, owner: Any) -> Reduced:
    """Reduce an array over memory that something else owns, and that may be written there.

    The memory of a message that arrived is nobody else's: it holds other things besides, and an
    array in it is one of its own.
    """
    if getattr(owner, "__received__", False):
        return NotImplemented
    if not isinstance(owner, _OWNERS) or not array.flags.writeable or not array.size:
        return NotImplemented
    return _view(array, owner, array.ctypes.data - address_of(owner))


_OWNERS = (
    bytearray,
    arrays_of_python.array,
    mmap.mmap,
    ctypes.Array,
    ctypes.Structure,
    ctypes.Union,
)


def _view(array: Any, owner: Any, offset: int) -> Reduced:
    arguments = (owner, offset, array.shape, array.strides, array.dtype, array.flags.writeable)
    kind = type(array)
    if kind is sys.modules["numpy"].ndarray:
        return make_ndarray_view, arguments
    attributes = getattr(array, "__dict__", None) or None
    return _make_subclass_view, (kind, *arguments), attributes, None, None, set_state


def make_ndarray_view(
    base: Any, offset: int, shape: Any, strides: Any, dtype: Any, writeable: bool
) -> Any:
    """Rebuild a view of an array, or of what else gives its memory away."""
    numpy: Any = importlib.import_module("numpy")
    memory = base
    if isinstance(base, numpy.ndarray):
        order = "F" if base.flags.f_contiguous else "C"
        memory = base.view(numpy.ndarray).reshape(-1, order=order)
        if dtype.hasobject:
            rest = memory[offset // dtype.itemsize :]
            strided = numpy.lib.stride_tricks.as_strided
            return strided(rest, shape, strides, writeable=writeable)
        memory = memory.view("u1")
    view = numpy.ndarray(shape, dtype, buffer=memory, offset=offset, strides=strides)
    if not writeable:
        view.flags.writeable = False
    return view


def _make_subclass_view(kind: Any, *arguments: Any) -> Any:
    return make_ndarray_view(*arguments).view(kind)


def _make_array_subclass(kind: Any, array: Any) -> Any:
    return array.view(kind)


# --- arrays in files -----------------------------------------------------------------------------


def reduce_memmap(array: Any) -> Reduced:
    """Reduce an array that is mapped from a file, or a part of one."""
    if not isinstance(array.base, mmap.mmap) or array.filename is None:
        return reduce_array(array)
    if array.mode == "c":
        return NotImplemented  # It differs from its file, so it travels as an array.
    if array.mode != "r":
        array.flush()
    lossy("its file is mapped again by its path: the same one must be there at the other end")
    mode = "r" if array.mode == "r" else "r+"
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    args = (str(array.filename), array.dtype, mode, array.offset, array.shape, order)
    return _make_memmap, (type(array), args)


def _make_memmap(kind: Any, args: tuple[Any, ...]) -> Any:
    return kind(*args)
