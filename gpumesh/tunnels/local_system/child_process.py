"""Two services for our child processes: a child ends together with its parent, and it has a title in ``ps``.

Both need Linux. On other systems (macOS) a worker still ends when its socket ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def die_with_parent() -> None:
    """Makes the kernel kill this process (SIGKILL) when that thread of the parent ends which made the process. Linux
    only."""
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def set_title(title: str) -> None:
    """Sets the title that ``ps`` and ``top`` show. Linux only. The title is cut to the length of the original
    arguments."""
    raw = title.encode("ascii", "replace")
    _prctl(_PR_SET_NAME, raw[:15])  # the kernel keeps 15 characters
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Fields 48 and 49 (counted from 1) of proc(5) stat; the name in parentheses may hold spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        room = end - start - 1
        if room > 0:
            # Python has copied its arguments, so only the kernel reads this memory.
            ctypes.memmove(start, raw[:room].ljust(room, b"\0"), room)


def _prctl(option: int, value: int | bytes) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
