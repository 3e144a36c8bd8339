"""Against the tables of Abramowitz and Stegun, and against the formulas for 1, 2 and infinitely many degrees."""

from __future__ import annotations

import math

import pytest

from gpumesh.bench.student_t import critical_value, spread_of, tail_probability


@pytest.mark.parametrize(
    ("probability", "df", "expected"),
    [  # Abramowitz and Stegun, table 26.10
        (0.05, 1, 12.706),
        (0.05, 4, 2.776),
        (0.05, 9, 2.262),
        (0.05, 30, 2.042),
        (0.05, 120, 1.980),
        (0.01, 8, 3.355),
        (0.001, 8, 5.041),
        (0.05, math.inf, 1.960),
        (0.01, math.inf, 2.576),
    ],
)
def test_critical_values_are_those_of_the_table(probability: float, df: float, expected: float) -> None:
    assert critical_value(probability, df) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 3.0, 40.0])
def test_tail_probabilities_have_closed_forms_for_few_degrees(t: float) -> None:
    assert tail_probability(t, 1) == pytest.approx(1.0 - 2.0 * math.atan(t) / math.pi, abs=1e-12)
    assert tail_probability(t, 2) == pytest.approx(1.0 - t / math.sqrt(2.0 + t * t), abs=1e-12)
    assert tail_probability(t, 9e5) == pytest.approx(math.erfc(t / math.sqrt(2.0)), abs=1e-5)


def test_a_fractional_degree_lies_between_its_neighbours() -> None:
    """Welch's formula gives such degrees."""
    assert tail_probability(2.0, 4) < tail_probability(2.0, 3.5) < tail_probability(2.0, 3)


def test_nothing_is_infinitely_far_away() -> None:
    assert tail_probability(math.inf, 3) == 0.0
    assert tail_probability(0.0, 3) == 1.0


def test_the_spread_of_independent_values() -> None:
    spread = spread_of([1.0, 2.0, 3.0, 4.0])
    assert (spread.mean, spread.df) == (2.5, 3)
    assert spread.error == pytest.approx(math.sqrt(5.0 / 3.0 / 4.0))
    with pytest.raises(ValueError, match="no spread"):
        spread_of([1.0])
