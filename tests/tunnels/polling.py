"""Waiting for what other processes do: by looking until it is so, under a generous deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 20.0


async def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Returns when ``condition`` holds; fails with ``what`` after ``DEADLINE_S``."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + DEADLINE_S
    while not condition():
        assert loop.time() < ends, f"not within {DEADLINE_S:g} s: {what}"
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Its child processes, those that are dead and not reaped, too. Not by pathlib, which keeps every number that it
    has seen for ever: some tests watch the memory."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has just ended
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += [int(child) for child in file.read().split()]
    return found
