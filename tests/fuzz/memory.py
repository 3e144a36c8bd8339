"""How much memory this process has needed."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path


def _trim_heap() -> None:
    """What earlier tests freed goes back to the system (glibc), or a parser could use it without being seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_mib(*, reset: bool = False) -> float:
    """The most memory that this process has had since the last reset. Where it cannot be reset, since its start: then
    only what is more than ever before is seen."""
    if reset:
        _trim_heap()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
