"""Reads from Linux's /proc how busy this machine and its processes are. On other systems everything is unknown.

proc(5) describes the files; /proc/PID/schedstat is described in the kernel's Documentation/scheduler/sched-stats.rst.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
MAX_PROCESSES = 20_000  # of a machine that are looked at


@dataclass(frozen=True, slots=True)
class MachineTimes:
    """The CPU time of all cores since the machine started, in seconds: ``busy_s`` of ``total_s``."""

    busy_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class ThreadTimes:
    """The times of a main thread since it started, in seconds: how long it ran, and how long it waited for a core."""

    run_s: float
    wait_s: float


def read_machine_times() -> MachineTimes | None:
    """The times of this machine; ``None`` if the system does not say."""
    try:
        first_line, _, _ = Path("/proc/stat").read_text().partition("\n")
        # cpu user nice system idle iowait irq softirq steal guest guest_nice. Guests are in user and nice already.
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, first_line.split()[1:9])
    except (OSError, ValueError):
        return None
    busy = user + nice + system + irq + softirq + steal
    return MachineTimes(busy / _TICKS_PER_S, (busy + idle + iowait) / _TICKS_PER_S)


def read_process_times(root: int) -> Mapping[int, float]:
    """The CPU time in seconds of the process ``root`` and of all its descendants, by pid; empty if unknown."""
    parents: dict[int, int] = {}
    times_s: dict[int, float] = {}
    with suppress(OSError):
        pids = [name for name in os.listdir("/proc") if name.isdecimal()]
        for name in pids[:MAX_PROCESSES]:
            with suppress(OSError, ValueError, IndexError):  # the process has ended
                # Field 2, the name in parentheses, may hold spaces, so fields are counted from field 3.
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                parents[int(name)] = int(fields[4 - 3])
                times_s[int(name)] = (int(fields[14 - 3]) + int(fields[15 - 3])) / _TICKS_PER_S
    return {pid: cpu_s for pid, cpu_s in times_s.items() if _descends(pid, root, parents)}


def _descends(pid: int, root: int, parents: Mapping[int, int]) -> bool:
    """Whether ``pid`` is ``root`` or one of its descendants."""
    for _ in range(64):  # the tree of processes is not deeper; while it is read, it may change and hold a circle
        if pid == root:
            return True
        if pid not in parents:
            return False
        pid = parents[pid]
    return False


class MainThread:
    """The main thread of a process, whose times are read again and again through one open file."""

    def __init__(self, pid: int) -> None:
        self._descriptor: int | None = None
        with suppress(OSError):  # another system, or no such process
            self._descriptor = os.open(f"/proc/{pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> ThreadTimes | None:
        """The thread's times; ``None`` if the system does not say, or if the process has ended."""
        if self._descriptor is None:
            return None
        try:
            run_ns, wait_ns, _ = os.pread(self._descriptor, 100, 0).split()
            return ThreadTimes(int(run_ns) / 1e9, int(wait_ns) / 1e9)
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
