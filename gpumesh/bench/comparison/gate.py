"""Decides for CI whether a result is worse than another by more than a limit. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gpumesh.bench.comparison.compare import FAILED_SHARE, Comparison, Difference, DifferenceVerdict


@dataclass(frozen=True, slots=True)
class GateDecision:
    """``failures``: a sentence for each figure that is surely worse by more than the limit.

    ``undecided``: a sentence for each figure that may be, because its interval reaches beyond the limit or is unknown.
    """

    failures: tuple[str, ...]
    undecided: tuple[str, ...]


def parse_limit(text: str) -> float:
    """The limit as a share: 0.05 for ``5%``, ``5 %`` and ``0.05``. Raises ``ValueError`` for any other text.

    A number without a percent sign must be below 1, because ``5`` may mean 5 % or 500 %.
    """
    number = text.strip()
    is_percent = number.endswith("%")
    limit = float(number.removesuffix("%")) / (100.0 if is_percent else 1.0)
    if not 0.0 <= limit < math.inf or (not is_percent and limit >= 1.0):
        raise ValueError(f"{text!r} is no share")
    return limit


def check_gate(comparison: Comparison, limit: float) -> GateDecision:
    """Checks each figure against the limit (a share, 0.05 for 5 %).

    A figure fails if its whole interval lies beyond the limit. The share of failed requests fails if it has surely
    grown, and by more than the limit.
    """
    failures: list[str] = []
    undecided: list[str] = []
    for difference in comparison.differences:
        label = f"{difference.stage}, {difference.figure}"
        if difference.figure == FAILED_SHARE:
            failures.extend(_check_failed_share(difference, label, limit))
            continue
        if difference.ratio is None or difference.ratio_low is None or difference.ratio_high is None:
            undecided.append(f"{label}: too few requests or runs to tell")
            continue
        worse, low, high = (
            _worse_by(difference, ratio)
            for ratio in (difference.ratio, *_from_good_to_bad(difference, difference.ratio_low, difference.ratio_high))
        )
        interval = f"{low * 100:+.1f} to {high * 100:+.1f} %"
        if difference.verdict is DifferenceVerdict.WORSE and low > limit:
            failures.append(
                f"{label}: worse by {worse * 100:.1f} % (interval {interval}), and the gate is {limit * 100:g} %"
            )
        elif high > limit:
            undecided.append(f"{label}: the interval of what it is worse by ({interval}) reaches beyond the gate")
    return GateDecision(tuple(failures), tuple(undecided))


def _check_failed_share(difference: Difference, label: str, limit: float) -> Iterator[str]:
    """Yields a sentence if the share of failed requests has grown by more than the limit."""
    growth = (difference.b or 0.0) - (difference.a or 0.0)
    if difference.verdict is DifferenceVerdict.WORSE and growth > limit:
        yield f"{label}: {100 * (difference.b or 0.0):.1f} %, and {100 * (difference.a or 0.0):.1f} % before"


def _worse_by(difference: Difference, ratio: float) -> float:
    """By which share the figure is worse with this ratio B ÷ A; negative if it is better."""
    return 1.0 - ratio if difference.more_is_better else ratio - 1.0


def _from_good_to_bad(difference: Difference, low: float, high: float) -> tuple[float, float]:
    """The ends of the interval of the ratio, the better one first."""
    return (high, low) if difference.more_is_better else (low, high)
