"""How long requests that are sent together wait for the mesh's process. Pure.

A server with slots ends many answers at once, and a closed loop then sends as many requests at once. The mesh's process
works on them one after another, while its mean CPU over the stage stays low. That wait is part of TTFT, and belongs to
no server.

The estimate: while a request waits for its first token, the mesh's process works on the tokens of other streams, which
are short pieces of work, and on other requests. Of the work on requests, half is done before this one on average.
Measured against a server whose times were known (`benchmarks/load_honesty.py`), it is right within a third.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from statistics import median

# What a request costs the mesh's process, in tokens of a stream: 145 µs and 25 µs by `benchmarks/cpu_cost.py`.
TOKENS_PER_REQUEST = 6.0


def time_per_piece_s(cpu_s: float, requests: int, pieces: int) -> float:
    """The CPU time of one piece, by the CPU time of a stage with so many requests and pieces."""
    total = requests * TOKENS_PER_REQUEST + pieces
    return cpu_s / total if total else 0.0


def median_wait_ms(
    windows: Sequence[tuple[float, float]],
    arrivals_s: Sequence[float],
    run_time_s: Callable[[float, float], float],
    piece_s: float,
) -> float | None:
    """The median over ``windows`` of the estimated wait; ``None`` without windows.

    A window is from the sending of a request to its first token. ``arrivals_s``: when the pieces of all answers came,
    sorted. ``run_time_s(begin, end)``: how long the mesh's main thread ran between these moments. ``piece_s``: what a
    piece costs it.
    """
    waits_s = []
    for begin_s, end_s in windows:
        pieces = bisect_left(arrivals_s, end_s) - bisect_left(arrivals_s, begin_s)
        waits_s.append(max(run_time_s(begin_s, end_s) - pieces * piece_s, 0.0) / 2.0)
    return median(waits_s) * 1000.0 if waits_s else None
