"""The moments at which an open loop sends."""

from __future__ import annotations

from itertools import islice, pairwise
from random import Random
from statistics import fmean, pstdev

import pytest

from gpumesh.bench.workload.arrivals import ArrivalProcess, arrival_times_s


def times(process: ArrivalProcess, count: int, *, rate: float = 4.0, burst: int = 1, seed: int = 1) -> list[float]:
    return list(islice(arrival_times_s(process, rate, burst=burst, rng=Random(seed)), count))


def test_constant_arrivals_have_equal_gaps() -> None:
    assert times(ArrivalProcess.CONSTANT, 4) == [0.0, 0.25, 0.5, 0.75]


def test_bursts_come_together_and_keep_the_rate() -> None:
    assert times(ArrivalProcess.BURST, 7, burst=3) == [0.0, 0.0, 0.0, 0.75, 0.75, 0.75, 1.5]


def test_poisson_gaps_vary_as_much_as_they_last() -> None:
    moments = times(ArrivalProcess.POISSON, 5001)
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    assert fmean(gaps) == pytest.approx(0.25, rel=0.05)
    assert pstdev(gaps) == pytest.approx(fmean(gaps), rel=0.05)
    assert moments[:9] == times(ArrivalProcess.POISSON, 9), "the same seed gives the same load"
    assert moments[:9] != times(ArrivalProcess.POISSON, 9, seed=2)
