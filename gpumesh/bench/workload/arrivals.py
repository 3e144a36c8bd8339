"""The moments at which an open loop sends its requests. Pure; the same seed gives the same moments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from enum import StrEnum
from random import Random


class ArrivalProcess(StrEnum):
    """How requests come.

    ``constant``: one after each equal time. ``poisson``: at random, independently of each other, as those of many users
    do. ``burst``: several at once, and then none for a while.
    """

    CONSTANT = "constant"
    POISSON = "poisson"
    BURST = "burst"


def arrival_times_s(process: ArrivalProcess, rate: float, *, burst: int, rng: Random) -> Iterator[float]:
    """Yields the moments (seconds from the start) without end, ``rate`` a second in the long run, in order of time.

    ``burst`` is the number of requests that come together; only ``ArrivalProcess.BURST`` uses it. The first request of
    a Poisson process comes after a random time, all others begin at 0.
    """
    match process:
        case ArrivalProcess.CONSTANT:
            yield from (number / rate for number in itertools.count())
        case ArrivalProcess.POISSON:
            # The gaps of a Poisson process have an exponential distribution (Kingman, "Poisson Processes").
            yield from itertools.accumulate(rng.expovariate(rate) for _ in itertools.count())
        case ArrivalProcess.BURST:
            yield from ((number // burst) * burst / rate for number in itertools.count())
