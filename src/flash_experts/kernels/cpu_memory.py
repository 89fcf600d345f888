"""malloc settings on Linux that keep freed memory in the process for the next training step.

glibc returns large blocks to the system, and Linux clears their pages at the next step, which is slow for the large
gradients of experts.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

ENVIRONMENT_VARIABLE = "FLASH_EXPERTS_KEEP_MEMORY"  # 0 turns it off
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_MOST_KEPT = 2**31 - 2**12
_MMAP_THRESHOLD, _MMAP_MAX = 2**25, 2**16  # what glibc's dynamic rules reach in a process with large blocks


def keep_freed_memory() -> bool:
    """Returns False if it is not supported, or turned off."""
    return os.environ.get(ENVIRONMENT_VARIABLE) != "0" and _set(0, _MOST_KEPT)


keep_freed_memory_once = cache(keep_freed_memory)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Restores glibc's default within the context."""
    _set(_MMAP_MAX, 2 * _MMAP_THRESHOLD, _MMAP_THRESHOLD)
    try:
        yield
    finally:
        keep_freed_memory()


def _set(mmap_max: int, trim_threshold: int, mmap_threshold: int | None = None) -> bool:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if libc is None or mallopt is None:
        return False
    if mmap_threshold is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        libc.malloc_trim(0)
    return bool(mallopt(_M_MMAP_MAX, mmap_max)) and bool(mallopt(_M_TRIM_THRESHOLD, trim_threshold))
