"""The difference between two things that were measured in pairs, with its 95 % interval (Hodges and Lehmann). Pure.

In each round both things are measured right after each other, so drift of the machine or the network meets both alike.
The estimate is the median of the Walsh averages, that is of the means of all pairs of differences, each difference
with itself included (Hodges and Lehmann, "Estimates of location based on rank tests", Annals of Mathematical
Statistics 34, 1963). Its interval has two Walsh averages as its ends, which the distribution of Wilcoxon's signed-rank
statistic gives (Hollander, Wolfe and Chicken, "Nonparametric Statistical Methods", 3rd edition, 3.2 and 3.3). It
assumes that the differences are symmetric around their centre, not that they are normal: one wild value moves it
little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

TAIL = 0.025  # of the interval, on each side
MAX_EXACT_PAIRS = 60  # for more pairs, the normal approximation of the distribution is right to the third digit
# Of more pairs, so many are used, spread evenly: the number of Walsh averages grows with the square.
MAX_PAIRS = 1000


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The estimated difference, and the ends of its 95 % interval; ``low`` and ``high`` are ``None`` for fewer than 6
    pairs, because even all values together do not reach 95 % then."""

    pairs: int
    estimate: float
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: PairedDifference) -> bool | None:
        """Whether the two intervals have a value in common; ``None`` if an interval is unknown."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.low <= other.high and other.low <= self.high


def paired_difference(differences: Sequence[float]) -> PairedDifference | None:
    """The centre of the differences, with its interval. ``None`` without a difference."""
    pairs = len(differences)
    if pairs == 0:
        return None
    step = math.ceil(pairs / MAX_PAIRS)
    used = differences[::step]
    averages = sorted((used[i] + used[j]) / 2.0 for i in range(len(used)) for j in range(i, len(used)))
    count = len(averages)
    estimate = (averages[(count - 1) // 2] + averages[count // 2]) / 2.0
    outside = _averages_outside(len(used))
    if outside is None:
        return PairedDifference(pairs, estimate)
    return PairedDifference(pairs, estimate, averages[outside], averages[count - 1 - outside])


def _averages_outside(n: int) -> int | None:
    """How many Walsh averages of ``n`` differences lie outside the interval, on each side. ``None``: there is no
    interval of 95 %.

    It is one more than the largest value that the signed-rank statistic does not exceed with a probability of at most
    ``TAIL``; the interval then begins at the average with this index (which counts from 0).
    """
    if n > MAX_EXACT_PAIRS:
        mean, deviation = n * (n + 1) / 4.0, math.sqrt(n * (n + 1) * (2 * n + 1) / 24.0)
        return max(math.floor(mean - 1.959964 * deviation), 0)
    probability, outside = 0.0, 0
    for weight in _signed_rank_counts(n):
        probability += weight / 2.0**n
        if probability > TAIL:
            break
        outside += 1
    return outside - 1 if outside else None


@cache
def _signed_rank_counts(n: int) -> tuple[int, ...]:
    """For each value of the signed-rank statistic of ``n`` differences, from 0 on, how many of the ``2 ** n``
    assignments of signs give it: the number of subsets of 1, 2, …, n with this sum."""
    counts = [1] + [0] * (n * (n + 1) // 2)
    for rank in range(1, n + 1):
        for total in range(len(counts) - 1, rank - 1, -1):
            counts[total] += counts[total - rank]
    return tuple(counts)
