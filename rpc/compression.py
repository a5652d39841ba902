"""Compression of what waits for a link that is slower than compressing it.

`Compressor` decides chunk by chunk. It pays where 1 / c + r / b < 1 / b, with c the bytes a second
that are compressed here, r the share that is left, and b the bytes a second that the link carries,
all of them measured on this link's own chunks: where b < c (1 - r).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter
from typing import Final

from rpc.errors import FrameError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FEATURE: Final = "zstd"
"""What a peer says that reads such chunks."""

LEVEL: Final = 1
"""Source: measured on text of numbers, 256 KiB at a time: level 1 gave 0.41 of it at 184 MB/s,
level 3 the same at 98, level -1 0.61 at 51; unpacking 890 MB/s."""

_RATE_FIRST: Final = 200e6
_LEFT_FIRST: Final = 0.5
"""Taken for granted until the first chunk was compressed."""

_WEIGHT: Final = 0.25
_LEFT_MAX: Final = 0.9
"""A chunk that shrinks less goes as it is, which spares the reader its work."""

_SKIP: Final = 32
"""Chunks that are left alone after one that did not shrink: 8 MiB."""

_BYTES_MIN: Final = 1024
"""Smaller chunks are ends of messages, and leave as they are."""


def unpack(data: bytes | bytearray | memoryview, bytes_max: int) -> bytes:
    """The bytes that were compressed.

    Raises:
        FrameError: They are damaged, or more than `bytes_max`.
    """
    try:
        opened = zstd.ZstdDecompressor()
        found = opened.decompress(data, bytes_max)
    except (zstd.ZstdError, EOFError) as error:
        raise FrameError(f"a compressed chunk is damaged: {error}") from error
    if not opened.eof or opened.unused_data:
        raise FrameError("a compressed chunk is cut off, or larger than a frame")
    return found


class Compressor:
    """Compresses chunks of one link while that makes them arrive sooner."""

    __slots__ = ("_clock", "_left", "_rate", "_skip", "link_rate")

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        """Begin with nothing known.

        Args:
            clock: Seconds, to measure the work with.
        """
        self._clock = clock
        self._rate = _RATE_FIRST
        self._left = _LEFT_FIRST
        self._skip = 0
        self.link_rate: float | None = None
        """Bytes a second that the link carries, as far as is known."""

    def __call__(self, chunk: bytes | bytearray | memoryview) -> bytes | None:
        """The chunk compressed; None if it is to leave as it is."""
        link_rate = self.link_rate
        if link_rate is None or len(chunk) < _BYTES_MIN:
            return None
        if self._skip:
            self._skip -= 1
            return None
        if link_rate >= self._rate * (1 - self._left):
            # It may shrink better, or faster, later on.
            self._left += (_LEFT_FIRST - self._left) / _SKIP
            return None
        begun = self._clock()
        packed = zstd.compress(chunk, LEVEL)
        took = max(self._clock() - begun, 1e-9)
        left = len(packed) / len(chunk)
        self._rate += (len(chunk) / took - self._rate) * _WEIGHT
        if left > _LEFT_MAX:
            self._skip = _SKIP
            return None
        self._left += (left - self._left) * _WEIGHT
        return packed
