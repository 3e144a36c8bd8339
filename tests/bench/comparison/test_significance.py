"""The procedures over many figures, against published examples and exact probabilities."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from gpumesh.bench.comparison import significance
from gpumesh.bench.comparison.estimates import Estimate
from gpumesh.bench.comparison.significance import (
    FALSE_SHARE,
    change_between,
    count_discoveries,
    fisher_p_value,
    interval_errors,
    verdict_threshold,
)

# The 15 p values of the example in Benjamini and Hochberg (1995), section 4: at 5 % the first four are discoveries.
PUBLISHED = (
    0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0
)  # fmt: skip


def test_the_published_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "FALSE_SHARE", 0.05)
    assert count_discoveries(PUBLISHED) == 4
    assert count_discoveries(PUBLISHED[::-1]) == 4, "in any order"
    assert verdict_threshold(PUBLISHED) == pytest.approx(4 * 0.05 / 15)


def test_one_figure_alone_has_the_plain_level() -> None:
    assert verdict_threshold([0.5]) == 0.0
    assert verdict_threshold([FALSE_SHARE]) == FALSE_SHARE
    assert interval_errors([0.5]) == (0.0, FALSE_SHARE)


def test_no_figures_have_no_verdict() -> None:
    assert (count_discoveries([]), verdict_threshold([])) == (0, 0.0)


def test_an_interval_holds_no_change_exactly_if_there_is_no_verdict() -> None:
    """For every number of discoveries among ten figures."""
    for strong in range(11):
        differences = [0.4 + 0.05 * n for n in range(strong)] + [0.05 * n for n in range(10 - strong)]
        changes = [change_between(Estimate(0.0, 0.1, 9), Estimate(one, 0.1, 9)) for one in differences]
        p_values = [change.p_value for change in changes]
        threshold = verdict_threshold(p_values)
        changed_error, same_error = interval_errors(p_values)
        for change in changes:
            is_verdict = change.p_value <= threshold
            low, high = change.interval(changed_error if is_verdict else same_error)
            assert (low > 0 or high < 0) is is_verdict


def test_welchs_degrees_of_freedom() -> None:
    """Equal errors of equally many runs: the degrees add up. If one error dominates, its degrees count."""
    assert change_between(Estimate(0.0, 1.0, 4), Estimate(1.0, 1.0, 4)).df == pytest.approx(8)
    assert change_between(Estimate(0.0, 1.0, 4), Estimate(1.0, 0.001, 100)).df == pytest.approx(4, rel=1e-3)
    assert math.isinf(change_between(Estimate(0.0, 0.0, 4), Estimate(1.0, 0.0, 4)).df)


def test_without_any_error_every_difference_is_sure() -> None:
    same, other = Estimate(1.0, 0.0, 4), Estimate(1.5, 0.0, 4)
    assert change_between(same, same).p_value == 1.0
    assert change_between(same, other).p_value == 0.0
    assert change_between(same, other).interval(0.01) == (0.5, 0.5)


def test_fishers_exact_test() -> None:
    """His own example of the lady who tastes tea, and a table by exact fractions."""
    assert fisher_p_value(3, 4, 1, 4) == pytest.approx(34 / 70)
    assert fisher_p_value(4, 4, 0, 4) == pytest.approx(2 / 70)

    def probability(k: int) -> Fraction:
        return Fraction(math.comb(20, k) * math.comb(30, 7 - k), math.comb(50, 7))

    expected = sum(probability(k) for k in range(8) if probability(k) <= probability(6))
    assert fisher_p_value(6, 20, 1, 30) == pytest.approx(float(expected))
    assert fisher_p_value(0, 20, 0, 20) == 1.0
