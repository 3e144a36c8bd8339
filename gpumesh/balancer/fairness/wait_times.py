"""``WaitTimes``: how long requests of each class have waited lately, for Retry-After."""

from __future__ import annotations

from math import isfinite

from gpumesh.balancer.base import Priority

FIRST_GUESS_S = 1.0  # while no request of the class has waited
MAX_WAIT_S = 24 * 3600.0  # a greater wait is a defect of a clock
SMOOTHING = 0.2  # weight of the newest wait


class WaitTimes:
    """The smoothed mean of the waits of each class, in seconds."""

    def __init__(self) -> None:
        self._mean_s = dict.fromkeys(Priority, FIRST_GUESS_S)

    def record(self, priority: Priority, wait_s: float) -> None:
        """Notes that a request of this class got a slot after this wait. A wait that is not finite is ignored."""
        if isfinite(wait_s):
            bounded_s = min(max(wait_s, 0.0), MAX_WAIT_S)
            self._mean_s[priority] += SMOOTHING * (bounded_s - self._mean_s[priority])

    def usual_s(self, priority: Priority) -> float:
        """How long a request of this class usually waits, in seconds: at least as long as a request of a higher class,
        because a class that got no slots lately has no recent waits."""
        longest_s = 0.0
        for other in Priority:  # from the highest class down
            longest_s = max(longest_s, self._mean_s[other])
            if other is priority:
                break
        return longest_s
