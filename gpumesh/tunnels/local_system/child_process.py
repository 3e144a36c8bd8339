"""Makes a child process end together with its parent (PR_SET_PDEATHSIG), and sets its title in ``ps``.

Both need Linux. On other systems (macOS) a worker still ends when its socket ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def die_with_parent(parent: int | None = None) -> None:
    """Makes the kernel kill this process (SIGKILL) when its parent ends. Linux only.

    More exactly: when the thread that made this process ends. ``parent`` is the parent's pid; if that process has ended
    before this call, the kernel sends no signal, so this process ends here. A caller whose process also ends in another
    way, as when its socket to the parent ends, need not give it.
    """
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def set_title(title: str) -> None:
    """Sets the title of this process in ``ps`` and ``top``, cut to the length of the original arguments. Linux only."""
    raw = title.encode("ascii", "replace")
    _prctl(_PR_SET_NAME, raw[:15])  # the kernel keeps 15 characters
    with contextlib.suppress(OSError, ValueError, IndexError):
        # proc(5), /proc/PID/stat: fields 48 and 49 (counted from 1), arg_start and arg_end, are the place of the
        # arguments in memory. Field 2, the name in parentheses, may hold spaces, so fields are counted from field 3.
        _before, _, fields_from_third = Path("/proc/self/stat").read_text().rpartition(")")
        fields = fields_from_third.split()
        start, end = int(fields[48 - 3]), int(fields[49 - 3])
        room = end - start - 1
        if room > 0:
            # Safe: Python has copied its arguments, so only the kernel still reads this memory.
            ctypes.memmove(start, raw[:room].ljust(room, b"\0"), room)


def _prctl(option: int, value: int | bytes) -> None:
    """Calls prctl(2); does nothing on other systems than Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
