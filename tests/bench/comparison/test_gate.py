"""A gate for CI: what is surely worse by more than the limit fails, what may be is named."""

from __future__ import annotations

import pytest

from gpumesh.bench.comparison.compare import Comparison, Difference, DifferenceVerdict
from gpumesh.bench.comparison.gate import GateDecision, check_gate, parse_limit

WORSE, SAME, UNKNOWN = DifferenceVerdict.WORSE, DifferenceVerdict.SAME, DifferenceVerdict.UNKNOWN


def tpot(ratio: float, low: float | None, high: float | None, verdict: DifferenceVerdict = WORSE) -> Difference:
    return Difference("mesh", "tpot p50", "ms", 10.0, 10.0 * ratio, ratio, verdict, low, high)


def decide(*differences: Difference, limit: float = 0.05) -> GateDecision:
    return check_gate(Comparison(differences, (), (), ()), limit)


def test_a_figure_fails_if_its_whole_interval_is_beyond_the_limit() -> None:
    assert decide(tpot(1.10, 1.06, 1.14)).failures == (
        "mesh, tpot p50: worse by 10.0 % (interval +6.0 to +14.0 %), and the gate is 5 %",
    )
    assert decide(tpot(1.10, 1.04, 1.16)) == GateDecision(
        (), ("mesh, tpot p50: the interval of what it is worse by (+4.0 to +16.0 %) reaches beyond the gate",)
    )
    assert decide(tpot(1.03, 1.02, 1.04)) == GateDecision((), ())
    assert decide(tpot(1.03, 1.02, 1.04), limit=0.01).failures != ()


def test_less_is_worse_where_more_is_better() -> None:
    rate = Difference("mesh", "goodput", "req/s", 10.0, 9.0, 0.9, WORSE, 0.88, 0.92, more_is_better=True)
    assert decide(rate).failures == ("mesh, goodput: worse by 10.0 % (interval +8.0 to +12.0 %), and the gate is 5 %",)
    gained = Difference(
        "mesh", "goodput", "req/s", 9.0, 10.0, 1.1, DifferenceVerdict.BETTER, 1.08, 1.12, more_is_better=True
    )
    assert decide(gained) == GateDecision((), ())
    assert decide(tpot(0.9, 0.88, 0.92, DifferenceVerdict.BETTER)) == GateDecision((), ())


def test_what_nothing_is_known_of_is_undecided() -> None:
    assert decide(tpot(1.5, None, None, UNKNOWN)).undecided == ("mesh, tpot p50: too few requests or runs to tell",)
    assert len(decide(tpot(1.0, 0.9, 1.1, SAME)).undecided) == 1
    assert decide(tpot(1.0, 0.97, 1.03, SAME)) == GateDecision((), ())


def test_failed_requests_fail_by_their_share() -> None:
    def share(a: float, b: float, verdict: DifferenceVerdict = WORSE) -> Difference:
        return Difference("mesh", "failed share", "", a, b, None, verdict)

    assert decide(share(0.0, 0.5)).failures == ("mesh, failed share: 50.0 %, and 0.0 % before",)
    assert decide(share(0.0, 0.04)) == GateDecision((), ()), "not by more than the limit"
    assert decide(share(0.0, 0.2, SAME)) == GateDecision((), ()), "it may be chance"


@pytest.mark.parametrize(("text", "limit"), [("5%", 0.05), ("5 %", 0.05), ("0.05", 0.05), ("0", 0.0), ("150%", 1.5)])
def test_limits(text: str, limit: float) -> None:
    assert parse_limit(text) == pytest.approx(limit)


@pytest.mark.parametrize("text", ["5", "", "%", "-5%", "nan%", "inf", "five"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(ValueError):
        parse_limit(text)
