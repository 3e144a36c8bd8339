"""Twenty pairs of equal results and twenty with 5 % slower decoding: few false verdicts, and few that are missed.

``benchmarks/bench_compare_check.py`` shows the same for other numbers of runs and requests, and with real runs.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from gpumesh.bench.comparison.compare import compare
from gpumesh.bench.comparison.gate import check_gate
from tests.bench.comparison.simulated_runs import false_verdicts, make_result, missed_decode_figures

PAIRS = 20
REPEAT = 6


@pytest.mark.slow
def test_equal_results_have_no_verdict_and_slower_decoding_is_found_in_every_figure() -> None:
    rng = random.Random(1)
    pairs_with_false_verdicts = gate_failures = 0
    missed: Counter[tuple[str, str]] = Counter()
    for _ in range(PAIRS):
        before, same = make_result(rng, repeat=REPEAT), make_result(rng, repeat=REPEAT)
        slower = make_result(rng, repeat=REPEAT, slower=1.05)
        pairs_with_false_verdicts += bool(false_verdicts(compare(before, same)))
        gate_failures += bool(check_gate(compare(before, same), 0.01).failures)
        missed.update((one.stage, one.figure) for one in missed_decode_figures(compare(before, slower)))
    assert pairs_with_false_verdicts <= 1
    assert gate_failures <= 1
    assert max(missed.values(), default=0) <= PAIRS - 18, missed


def test_single_runs_of_the_same_thing_have_hardly_any_verdict() -> None:
    rng = random.Random(2)
    pairs = [(make_result(rng), make_result(rng)) for _ in range(PAIRS)]
    assert sum(bool(false_verdicts(compare(a, b))) for a, b in pairs) <= 1


def test_a_decline_beyond_the_gate_fails_it() -> None:
    rng = random.Random(3)
    before, slower = make_result(rng, repeat=REPEAT), make_result(rng, repeat=REPEAT, slower=1.15)
    decision = check_gate(compare(before, slower), 0.05)
    assert any(failure.startswith("mesh, tpot p50: worse by ") for failure in decision.failures)
