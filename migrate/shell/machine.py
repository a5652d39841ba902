"""Which machine this is, and since when it has been up."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import psutil


@functools.cache
def processes_id() -> str:
    """Names what process numbers refer to: this boot of this machine, and the container if any.

    Two that are the same are certainly of one machine, at one time; two that differ may be.
    """
    try:
        # Kernels number them anew at each boot.
        return f"{boot_id()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return boot_id()


@functools.cache
def clock_id() -> str:
    """Names the clock that `time.monotonic` reads: this boot's, or a container's with its own."""
    try:
        return f"{boot_id()}/{os.stat('/proc/self/ns/time').st_ino}"
    except OSError:
        return boot_id()


@functools.cache
def boot_id() -> str:
    """Names this boot of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{psutil.boot_time():.0f}"
