"""The estimate of a paired difference and its interval, against published values and against a simulation."""

from __future__ import annotations

from random import Random

import pytest

from gpumesh.bench import paired_differences
from gpumesh.bench.paired_differences import PairedDifference, paired_difference

# Hollander and Wolfe, example 3.1: a depression scale of nine patients before and after a tranquilizer.
BEFORE = (1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30)
AFTER = (0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29)


def test_the_example_of_the_book() -> None:
    found = paired_difference([after - before for before, after in zip(BEFORE, AFTER, strict=True)])
    assert found is not None
    assert (found.pairs, round(found.estimate, 2)) == (9, -0.46)
    assert found.low == pytest.approx(-0.786)
    assert found.high == pytest.approx(-0.010)


def test_few_differences_have_no_interval() -> None:
    assert paired_difference([]) is None
    assert paired_difference([1.0, 2.0, 4.0, 5.0, 5.0]) == PairedDifference(5, 3.5)
    assert paired_difference([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == PairedDifference(6, 3.5, 1.0, 6.0)


@pytest.mark.parametrize("n", [61, 100])
def test_the_approximation_for_many_pairs_is_next_to_the_exact_value(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    approximate = paired_differences._averages_outside(n)
    monkeypatch.setattr(paired_differences, "MAX_EXACT_PAIRS", n)
    exact = paired_differences._averages_outside(n)
    assert approximate is not None
    assert exact is not None
    assert abs(approximate - exact) <= 1


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """With differences of heavy tails, as latencies have them. Of 400 intervals 380 should hold the truth; 3.3 standard
    deviations below that are 365."""
    rng, truth, held = Random(20261130), 0.6, 0
    for _ in range(400):
        sample = [truth + rng.gauss(0, 0.2) + (rng.gauss(0, 5) if rng.random() < 0.1 else 0.0) for _ in range(20)]
        found = paired_difference(sample)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    assert 365 <= held <= 395


def test_intervals_overlap_or_not() -> None:
    noise, real, wide = (
        PairedDifference(9, 0.0, -0.1, 0.1),
        PairedDifference(9, 0.6, 0.5, 0.7),
        PairedDifference(9, 0.6),
    )
    assert noise.overlaps(real) is False
    assert noise.overlaps(PairedDifference(9, 0.2, 0.1, 0.3)) is True
    assert noise.overlaps(wide) is None


def test_thousands_of_pairs_are_thinned_out() -> None:
    found = paired_difference([float(number % 3) for number in range(4001)])
    assert found is not None
    assert (found.pairs, found.estimate) == (4001, 1.0)
