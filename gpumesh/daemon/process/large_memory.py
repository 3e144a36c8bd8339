"""Large blocks of memory go back to the system when they are freed, and grow without being copied.

glibc maps a large block for itself only until the first such block is freed: from then on blocks of up to 32 MiB come
from the heap, where bodies that grow side by side move about and leave holes. Ten uploads at once then cost nearly
twice what they hold (measured: ``tests/real/test_large_bodies.py``). A bound that is set by hand stays as it is.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 1 << 20
SPARE = 16 << 20  # of the heap's end, that is kept: to give it back and take it again costs more than it is worth


def map_large_blocks() -> None:
    """For this process. Elsewhere than on Linux, and with another libc, nothing need be done."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE)
            mallopt(M_TRIM_THRESHOLD, SPARE)
