"""What a process of ours asks of its kernel: to end with its parent, and to be told apart in ``ps``.

Both are niceties: where the kernel has none of it (macOS), the worker still ends with its socket.
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
    """Linux: SIGKILL for this process when its parent's thread that made it ends. Elsewhere nothing."""
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def set_title(title: str) -> None:
    """What ``ps`` and ``top`` show. Linux only; cut to the room that the original arguments take."""
    raw = title.encode("ascii", "replace")
    _prctl(_PR_SET_NAME, raw[:15])
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Fields 48 and 49 (counted from 1) of proc(5) stat; the name in parentheses may hold spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        room = end - start - 1
        if room > 0:
            # Python has copied its arguments, so this memory has no other reader than the kernel.
            ctypes.memmove(start, raw[:room].ljust(room, b"\0"), room)


def _prctl(option: int, value: int | bytes) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
