"""Makes glibc give large blocks of memory back to the system when they are freed, and grow them without copying.

From a certain size on, glibc gives a block a memory mapping of its own. This threshold is dynamic: it rises when the
first such block is freed. From then on, blocks of up to 32 MiB come from the heap. Request bodies that grow at the same
time are then copied again and again, and leave holes: ten concurrent uploads cost nearly twice their size (measured by
``tests/real/test_large_bodies.py``). A threshold that a program sets stays fixed.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BYTES = 1 << 20  # from this size on, a block gets a mapping of its own
# Free memory that may stay at the end of the heap. To give it back and to take it again would cost more than it saves.
SPARE_BYTES = 16 << 20


def map_large_blocks() -> None:
    """Sets glibc's thresholds for this process to ``LARGE_BYTES`` and ``SPARE_BYTES``. Does nothing on a system without
    glibc."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
            mallopt(M_TRIM_THRESHOLD, SPARE_BYTES)
