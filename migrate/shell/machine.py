"""Which machine this is, and since when it has been up."""

from __future__ import annotations

import functools
from pathlib import Path

import psutil


@functools.cache
def boot_id() -> str:
    """Names this boot of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{psutil.boot_time():.0f}"
