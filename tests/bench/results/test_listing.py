"""A result as a line of a list."""

from __future__ import annotations

from dataclasses import replace

from gpumesh.bench.results.joint import join_runs
from gpumesh.bench.results.listing import list_result, main_rate
from gpumesh.bench.workload.settings import Scenario
from gpumesh.bench.workload.stages import StageKind
from tests.bench.comparison.test_compare import measured, repeated
from tests.bench.example_results import full_result, result


def test_a_listed_result() -> None:
    listed = list_result("20261124-041000-quick", full_result())
    assert (listed.name, listed.scenario, listed.model) == ("20261124-041000-quick", Scenario.QUICK, "qwen2.5:7b")
    assert (listed.nodes, listed.runs, listed.partial, listed.simulated) == (("moon",), 1, False, True)
    assert list_result("x", repeated(10.0, 11.0)).runs == 2


def test_the_main_rate_is_the_highest_of_the_mesh() -> None:
    slow, fast = measured("c=1", gap_ms=20.0), measured("c=2", gap_ms=10.0)
    alone = replace(measured("alpha", gap_ms=1.0), kind=StageKind.NODE)
    assert main_rate(result(alone, slow, fast)) == fast.rates.best_tokens_per_s
    assert main_rate(result(alone)) == alone.rates.best_tokens_per_s
    assert main_rate(result()) is None
    assert main_rate(result(slow, scenario=Scenario.OVERHEAD)) is None
    assert main_rate(join_runs([result(slow), result(slow)])) == slow.rates.best_tokens_per_s
