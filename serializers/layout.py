"""Reads fields of C objects that Python code cannot ask for.

Some settings that an object was made with, such as a text file's `newline`, can be read back by
nothing. Where they lie in memory is found, not assumed: objects are made with known settings, and a
field is believed to be at the only place where all of them show theirs. If there is no such place,
the field is unknown on this Python, and whoever asks has to do without it or refuse.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any


def memory(obj: object) -> bytes:
    """The object's own C structure."""
    return ctypes.string_at(id(obj), type(obj).__basicsize__)


def find_field(samples: Sequence[tuple[object, int]], size_bytes: int) -> int | None:
    """Find where objects keep an unsigned number.

    Args:
        samples: Objects of one type, each with the number that it must show.
        size_bytes: Of the field; it is aligned to that.

    Returns:
        The offset, or None if no place, or more than one, shows all the numbers.
    """
    images = [(memory(obj), value.to_bytes(size_bytes, "little")) for obj, value in samples]
    places = [
        at
        for at in range(object.__basicsize__, len(images[0][0]) - size_bytes + 1, size_bytes)
        if all(image[at : at + size_bytes] == value for image, value in images)
    ]
    return places[0] if len(places) == 1 else None


def read_field(obj: Any, offset: int, size_bytes: int) -> int:
    """The number at `offset` of an object's structure."""
    return int.from_bytes(ctypes.string_at(id(obj) + offset, size_bytes), "little")
