"""Finds a run that does not belong to the others of its result. Pure.

A pause of the machine in one of five runs widens the interval of a rate so much that no change is found. So one run is
left out of a figure if it is an outlier by Grubbs' test ("Procedures for detecting outlying observations in samples",
Technometrics 11, 1969), as ISO 5725-2 (7.3.4) does it between laboratories: at most one, and it is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gpumesh.bench.student_t import critical_value, spread_of

MIN_RUNS = 5  # of fewer, the others do not tell what is usual
# At 5 % more changes would be found beside pauses, and twice as many verdicts would be false.
ERROR_PROBABILITY = 0.01
# A run that differs by less is left in, however equal the others are. The error of the figure is small then anyway.
MIN_DIFFERENCE = 0.01


def find_outlier(values: Sequence[float]) -> int | None:
    """The index of the run whose figure is an outlier; ``None`` if there is none, and if a value is not above 0."""
    n = len(values)
    if n < MIN_RUNS or min(values) <= 0:
        return None
    logs = [math.log(value) for value in values]
    spread = spread_of(logs)
    deviation = spread.error * math.sqrt(n)
    distances = [abs(value - spread.mean) for value in logs]
    farthest = max(range(n), key=lambda index: distances[index])
    t = critical_value(ERROR_PROBABILITY / n, n - 2)
    limit = (n - 1) / math.sqrt(n) * math.sqrt(t * t / (n - 2 + t * t))
    if deviation == 0 or distances[farthest] / deviation <= limit or distances[farthest] < MIN_DIFFERENCE:
        return None
    return farthest
