"""The texts of a comparison that the terminal and the report have in common. Pure."""

from __future__ import annotations

from collections import Counter

from gpumesh.bench.comparison.compare import Comparison, Difference, DifferenceVerdict

UNKNOWN = "–"  # noqa: RUF001  # the dash of the tables
_MAX_PERCENT_RATIO = 10.0  # from ten times as much on, a percentage is hard to read


def change_text(difference: Difference) -> str:
    """By how much the figure has changed: in percent, ``+5.1 %``, or as a factor from ten times as much on.

    If nothing failed in A, the share of failures has no ratio, and its change is in percentage points: ``+2.0 points``.
    """
    if difference.ratio is not None:
        return _ratio_text(difference.ratio)
    is_share = not difference.unit  # only the share of failures has no unit
    if difference.a is not None and difference.b is not None and is_share:
        return f"{100.0 * (difference.b - difference.a):+.1f} points"
    return UNKNOWN


def interval_text(difference: Difference) -> str:
    """The interval of the change: ``+3.9 to +6.3 %``."""
    low, high = difference.ratio_low, difference.ratio_high
    if low is None or high is None:
        return UNKNOWN
    if high < _MAX_PERCENT_RATIO:
        return f"{_ratio_text(low).removesuffix(' %')} to {_ratio_text(high)}"
    return f"{_ratio_text(low)} to {_ratio_text(high)}"


def _ratio_text(ratio: float) -> str:
    """The change by a ratio: in percent, or as a factor where a percentage is hard to read."""
    if ratio >= _MAX_PERCENT_RATIO:
        return f"×{ratio:.3g}"  # noqa: RUF001  # the sign of a factor
    return f"{100.0 * (ratio - 1.0):+.1f} %"


def summary_sentence(comparison: Comparison) -> str:
    """How many figures are better, worse, and neither: the answer of the comparison."""
    counts = Counter(difference.verdict for difference in comparison.differences)
    if not comparison.differences:
        return "A and B have no figure in common."
    parts = [
        f"{counts[verdict]} {text}"
        for verdict, text in (
            (DifferenceVerdict.WORSE, "worse"),
            (DifferenceVerdict.BETTER, "better"),
            (DifferenceVerdict.SAME, "without a clear difference"),
            (DifferenceVerdict.UNKNOWN, "with too few requests or runs to tell"),
        )
        if counts[verdict]
    ]
    noun = "figure" if len(comparison.differences) == 1 else "figures"
    return f"B against A, {len(comparison.differences)} {noun}: {', '.join(parts)}."
