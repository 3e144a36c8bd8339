"""The resources of a process (descriptors, threads, children, memory), to compare them before and after a test."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tests.tunnels.polling import children


@dataclass(frozen=True)
class ProcessResources:
    """Open file descriptors, threads, child processes and KiB of memory."""

    fds: int
    threads: int
    children: int
    rss_kib: int

    @classmethod
    def of(cls, pid: int) -> ProcessResources:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        fds = len(os.listdir(f"/proc/{pid}/fd"))
        return cls(fds, int(status["Threads"]), len(children(pid)), int(status["VmRSS"].split()[0]))

    @property
    def countable(self) -> tuple[int, int, int]:
        """The figures that must be exactly equal before and after; memory may vary."""
        return self.fds, self.threads, self.children


def command_line(pid: int) -> str:
    """The arguments of a process as ``ps`` shows them; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def zygotes(pid: int) -> list[int]:
    """The processes that fork the workers of the mesh that runs in ``pid``."""
    return [child for child in children(pid) if command_line(child).startswith("gpumesh tunnels")]


def workers(pid: int) -> list[int]:
    """The worker processes of the tunnels of the mesh that runs in ``pid``."""
    return [worker for zygote in zygotes(pid) for worker in children(zygote)]
