"""The wait before something that has failed is tried again: longer after each failure, and spread by chance. Pure."""

from __future__ import annotations

MAX_DOUBLINGS = 32  # after a long outage 2.0 ** 2000 would overflow


def backoff_delay_s(
    failures: int, jitter: float, *, initial_backoff_s: float, max_backoff_s: float, immediate_retry_s: float
) -> float:
    """Seconds until the next attempt: an interval that doubles with each failure, times 0.5 to 1.5 (by ``jitter``, a
    random number in [0, 1)).

    The result is between ``initial_backoff_s`` and ``max_backoff_s``. With no failure, which means that something
    stable broke, the result is at most ``immediate_retry_s``. Jitter keeps those that were lost together from coming
    back at the same moment.
    """
    if failures == 0:
        return immediate_retry_s * jitter
    interval_s = min(initial_backoff_s * 2.0 ** min(failures - 1, MAX_DOUBLINGS), max_backoff_s)
    return min(max_backoff_s, max(initial_backoff_s, interval_s * (0.5 + jitter)))
