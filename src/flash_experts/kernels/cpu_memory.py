"""Keeping freed memory for the next step, on Linux.

The C library gives large blocks back to the system as soon as they are freed, and each step then asks for them again:
Linux has to find and clear the pages. Gradients of experts are the worst case, for they are large next to the FLOPs
that fill them. So the first training forward of experts on a CPU calls `keep_freed_memory`, and so do our commands;
``FLASH_EXPERTS_KEEP_MEMORY=0`` in the environment leaves the C library as it is.

Where Linux offers pages of 2 MB on request (``madvise`` in /sys/kernel/mm/transparent_hugepage/enabled),
``THP_MEM_ALLOC_ENABLE=1`` asks for them. PyTorch reads it at its first tensor, so it must be in the environment before:
our commands set it, a script of your own sets it in ``os.environ`` above ``import torch``.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

ENVIRONMENT_VARIABLE = "FLASH_EXPERTS_KEEP_MEMORY"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_MOST_KEPT = 2**31 - 2**12
_MMAP_THRESHOLD, _MMAP_MAX = 2**25, 2**16  # what glibc's own rules arrive at in a process with large blocks


def keep_freed_memory() -> bool:
    """Makes the process keep what it frees, for itself. Its peak stays what it was; between peaks it shrinks less.

    Returns:
        False if nothing has changed: the C library is not glibc and has no such setting, or the environment forbids it.
    """
    return os.environ.get(ENVIRONMENT_VARIABLE) != "0" and _set(0, _MOST_KEPT)


@cache
def keep_freed_memory_once() -> bool:
    """`keep_freed_memory`, called as often as you like."""
    return keep_freed_memory()


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Meanwhile large blocks go back to the system when they are freed, as glibc does by default."""
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
