"""Polls until a condition holds that other processes bring about, under a generous deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 40.0  # generous: a machine where many others compute takes ten times as long


async def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Returns when ``condition`` holds; fails with ``what`` after ``DEADLINE_S``."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DEADLINE_S
    while not condition():
        assert loop.time() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs. A dead process that is not reaped yet does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Its child processes, also dead ones that are not reaped yet. Without pathlib, which keeps each part of a path for
    ever: some tests watch the memory."""
    child_pids: list[int] = []
    with contextlib.suppress(OSError):  # the process has just ended
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                child_pids += [int(child) for child in file.read().split()]
    return child_pids
