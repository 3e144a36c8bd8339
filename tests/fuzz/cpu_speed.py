"""How fast this machine is now, measured by work of a fixed size: bounds of CPU time are scaled by it."""

from __future__ import annotations

import json
import time

REFERENCE_S = 0.004
"""The CPU time of ``do_reference_work`` where the bounds were set: an idle core of the machine that runs the tests."""
_RUNS = 5


def do_reference_work() -> None:
    """Work of the kind that parsers do."""
    for line in (b'{"a":[1,2,3],"b":{"c":"text"}}\n' * 2000).split(b"\n"):
        if line:
            json.loads(line)


def measure_slowdown() -> float:
    """How much more CPU time than ``REFERENCE_S`` the same work takes here and now; at least 1.

    A second busy core can add a half: cores share caches and, as hyperthreads, their execution units.
    """
    began = time.process_time()
    for _ in range(_RUNS):
        do_reference_work()
    return max((time.process_time() - began) / _RUNS / REFERENCE_S, 1.0)
