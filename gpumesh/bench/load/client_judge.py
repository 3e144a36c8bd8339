"""Judges whether the load generator itself limited the figures of a stage. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from gpumesh.bench.load.samples import ClientLoad
from gpumesh.bench.stats import percentile

# Above these values the figures describe this machine rather than the mesh.
BUSY_CLIENT_CPU = 0.85  # of one core
LATE_CLIENT_MS = 5.0  # of the event loop, or of a request that should have been sent
MAX_LATE_SHARE = 0.01  # of an open loop's requests: a smaller share does not move a median


def judge_client(cpu: float, lags_ms: Sequence[float], late_sends: int, sends: int) -> ClientLoad:
    """Judges whether this process itself limited the figures of a stage. Pure.

    ``cpu``: CPU time ÷ wall time. ``lags_ms``: of the event loop. ``late_sends``: how many of the ``sends`` requests
    of an open loop were sent more than ``LATE_CLIENT_MS`` after their intended moment.
    """
    ordered = sorted(lags_ms)
    # The 90th percentile: a single pause of the machine is no reason to doubt all figures.
    lag_p90_ms = percentile(ordered, 0.9) if ordered else 0.0
    lag_p99_ms = percentile(ordered, 0.99) if ordered else 0.0
    bound = None
    if cpu >= BUSY_CLIENT_CPU:
        bound = f"this process used {cpu:.0%} of a core: the load generator may be what limits"
    elif lag_p90_ms >= LATE_CLIENT_MS:
        bound = f"this process often ran {lag_p90_ms:.0f} ms late: something else uses this machine's cores"
    elif sends and late_sends / sends > MAX_LATE_SHARE:
        bound = f"{late_sends} of {sends} requests went out late: the load generator could not keep up"
    return ClientLoad(cpu, lag_p99_ms, late_sends, bound)
