"""Verdicts on differences that are there, that are not, and that nobody can see."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.bench.comparison.compare import Difference, DifferenceVerdict, compare
from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.load.samples import ClientLoad
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.workload.settings import BenchSettings, Scenario
from tests.bench.example_results import MODEL, failed_record, make_stage_run, record, result, stage, summarize_only


def measured(name: str = "mesh", *, ttft_ms: float = 100.0, gap_ms: float = 10.0, count: int = 20) -> StageResult:
    """``count`` answers, one after the other; each a little different, so that medians have an interval."""
    records = [record(n, ttft_ms=ttft_ms + n % 5, gap_ms=gap_ms, server_ms=ttft_ms) for n in range(count)]
    return summarize_only(make_stage_run(*records, of=stage(name), duration_s=count * (ttft_ms + 11 * gap_ms) / 1000.0))


def verdicts(a: BenchResult, b: BenchResult) -> dict[str, DifferenceVerdict]:
    return {one.figure: one.verdict for one in compare(a, b).differences}


def test_better_and_worse_each_in_its_own_direction() -> None:
    slow, quick = result(measured(ttft_ms=100.0, gap_ms=10.0)), result(measured(ttft_ms=50.0, gap_ms=5.0))
    assert set(verdicts(slow, quick).values()) == {DifferenceVerdict.BETTER}
    assert set(verdicts(quick, slow).values()) == {DifferenceVerdict.WORSE}
    assert set(verdicts(slow, slow).values()) == {DifferenceVerdict.SAME}


def test_a_difference_has_both_values_and_their_ratio() -> None:
    found = compare(result(measured(gap_ms=10.0)), result(measured(gap_ms=20.0))).differences
    tpot = next(one for one in found if one.figure == "tpot p50")
    assert (tpot.stage, tpot.unit, tpot.verdict) == ("mesh", "ms", DifferenceVerdict.WORSE)
    assert [tpot.a, tpot.b, tpot.ratio] == pytest.approx([10.0, 20.0, 2.0])


def test_few_values_tell_nothing() -> None:
    few = verdicts(result(measured(count=5)), result(measured(count=5, ttft_ms=500.0)))
    assert few["ttft p50"] is DifferenceVerdict.UNKNOWN
    assert few["output tokens/s"] is DifferenceVerdict.WORSE, "a rate of the whole stage is known"


def test_medians_whose_intervals_touch_are_the_same() -> None:
    """Their own spread is 4 ms: a median 2 ms higher is no difference."""
    assert verdicts(result(measured()), result(measured(ttft_ms=102.0)))["ttft p50"] is DifferenceVerdict.SAME


def test_what_nobody_would_notice_is_no_difference_however_sure() -> None:
    exact, nearly = result(measured(gap_ms=10.0)), result(measured(gap_ms=10.05))
    assert verdicts(exact, nearly)["tpot p50"] is DifferenceVerdict.SAME
    assert verdicts(exact, result(measured(gap_ms=10.2)))["tpot p50"] is DifferenceVerdict.WORSE


def test_failures_are_compared_by_their_share() -> None:
    fine = result(summarize_only(make_stage_run(*(record(n) for n in range(8)))))
    broken = result(summarize_only(make_stage_run(*(record(n) for n in range(6)), failed_record(6), failed_record(7))))
    assert "failed share" not in verdicts(fine, fine)
    share = next(one for one in compare(fine, broken).differences if one.figure == "failed share")
    assert share == Difference("mesh", "failed share", "", 0.0, 0.25, None, DifferenceVerdict.WORSE)
    assert verdicts(broken, fine)["failed share"] is DifferenceVerdict.BETTER
    assert verdicts(broken, broken)["failed share"] is DifferenceVerdict.SAME


def test_stages_without_a_counterpart() -> None:
    found = compare(result(measured("c=1"), measured("c=2")), result(measured("c=2"), measured("c=4")))
    assert (found.only_a, found.only_b) == (("c=1",), ("c=4",))
    assert {one.stage for one in found.differences} == {"c=2"}
    assert compare(result(), result()).differences == ()


def test_routes_are_stages_of_their_own() -> None:
    made = replace(measured("iceland"), route="tunnel")
    assert stage_label(made) == "iceland via tunnel"
    assert {one.stage for one in compare(result(made), result(made)).differences} == {"iceland via tunnel"}


def test_what_else_is_different_is_said() -> None:
    plain = result(measured())
    assert compare(plain, plain).caveats == ()
    other = replace(
        plain, scenario=Scenario.SCALE, settings=BenchSettings(MODEL, tokens=128, think=True, prompt_tokens=99)
    )
    assert compare(plain, other).caveats == (
        "the scenarios differ: quick and scale",
        "not the same tokens: 64 and 128",
        "not the same prompt tokens: 32 and 99",
        "not the same think: False and True",
    )


def test_other_machines_are_said() -> None:
    plain = result(measured())
    (node,) = plain.environment.nodes

    def on(**changes: object) -> BenchResult:
        return replace(plain, environment=replace(plain.environment, **changes))  # type: ignore[arg-type]

    (machine,) = compare(plain, on(cpus=64)).caveats
    assert "different machines" in machine
    (changed,) = compare(plain, on(nodes=(replace(node, gpus=("NVIDIA H100",)),))).caveats
    assert changed == "node iceland is not the same: its GPUs, server or transport changed"
    assert compare(plain, on(nodes=(replace(node, rtt_ms=1.0),))).caveats == ()
    (simulated,) = compare(plain, on(nodes=(replace(node, simulated=True),))).caveats
    assert "simulated" in simulated


def test_a_node_in_only_one_of_the_results_is_named() -> None:
    plain = result(measured())
    (node,) = plain.environment.nodes
    both = replace(plain, environment=replace(plain.environment, nodes=(node, replace(node, name="norway"))))
    assert compare(plain, both).caveats == ("node norway is only in B",)
    assert compare(both, plain).caveats == ("node norway is only in A",)


def test_changed_nodes_are_named_in_the_order_of_the_file() -> None:
    plain = result(measured())
    (node,) = plain.environment.nodes
    names = [f"node-{number}" for number in range(9, 0, -1)]
    before = tuple(replace(node, name=name) for name in names)
    after = tuple(replace(node, name=name, gpus=("NVIDIA H100",)) for name in names)
    a, b = (replace(plain, environment=replace(plain.environment, nodes=nodes)) for nodes in (before, after))
    assert [caveat.split()[1] for caveat in compare(a, b).caveats] == names


def test_a_client_that_limited_is_said() -> None:
    bound = replace(measured(), client=ClientLoad(cpu=1.0, lag_p99_ms=50.0, bound="this process used 100% of a core"))
    assert compare(result(measured()), result(bound)).caveats == (
        "B was bound by the client in some stage (see its notes)",
    )
