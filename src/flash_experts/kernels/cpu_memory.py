"""Keeping freed memory for the next step, on Linux.

The C library gives large blocks back to the system as soon as they are freed, and each step then asks for them anew:
Linux has to find and clear the pages again. Gradients of experts are the worst case, for they are large next to the
arithmetic that fills them: at 2,048 tokens and eight experts of GPT-2's size (150 MB) a sixth of a step went into that.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_MOST_KEPT = 2**31 - 2**12


def keep_freed_memory() -> bool:
    """Makes the process keep what it frees, for itself. Its peak stays what it was; between peaks it shrinks less.

    Returns:
        False where the C library has no such setting (it is not glibc): nothing has changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT))
