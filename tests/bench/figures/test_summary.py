"""Figures of a stage, computed by hand beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.bench.figures.answers.answer import read_answer
from gpumesh.bench.figures.gpu_meter import GpuUse
from gpumesh.bench.figures.routes.route_costs import route_costs
from gpumesh.bench.figures.scaling import scaling
from gpumesh.bench.figures.summary import FailureCount, StageResult, summarize_stage
from gpumesh.bench.load.samples import SampleOutcome
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.stages import StageKind
from tests.bench.example_results import failed_record, make_stage_run, record, stage, summarize_only


def test_one_answer() -> None:
    """100 ms to the first of 11 tokens, 10 ms to each other."""
    made = summarize_only(make_stage_run(record(), duration_s=2.0))
    assert (made.requests, made.served, made.failed, made.cut, made.retried) == (1, 1, 0, 0, 0)
    assert (made.prompt_tokens, made.output_tokens) == (7, 11)
    assert made.latency.ttft.mean == pytest.approx(100.0)
    assert made.latency.tpot.mean == pytest.approx(10.0)
    assert made.latency.itl.n == 10
    assert made.latency.itl.mean == pytest.approx(10.0)
    assert made.latency.end_to_end.mean == pytest.approx(200.0)
    assert made.latency.outside_server.n == 0, "the server did not say"
    assert made.rates.wall.mean == pytest.approx(100.0)
    assert made.rates.server.n == 0
    assert made.rates.output_tokens_per_s == pytest.approx(5.5)
    assert made.rates.total_tokens_per_s == pytest.approx(9.0)
    assert made.rates.requests_per_s == pytest.approx(0.5)
    assert made.rates.goodput_per_s == pytest.approx(0.5)
    assert made.rates.good_share == 1.0


def test_the_servers_own_clock() -> None:
    made = summarize_only(make_stage_run(record(server_ms=180.0)))
    assert made.rates.server.mean == pytest.approx(110.0), "as Ollama counts: 11 tokens in 10 gaps"
    assert made.latency.outside_server.mean == pytest.approx(20.0)
    assert made.latency.server_load.mean == 0.0


def test_pieces_of_several_tokens() -> None:
    """12 tokens in 3 pieces: the gaps are those of the pieces, the time per token is not."""
    one = record(tokens=3, gap_ms=40.0)
    assert read_answer(one).tpot_ms == pytest.approx(40.0)
    twelve = replace(one, tokens=12, counters=ServerCounters(tokens=12, eval_ms=100.0))
    made = summarize_only(make_stage_run(twelve))
    assert made.latency.itl.mean == pytest.approx(40.0)
    assert made.latency.tpot.mean == pytest.approx(100.0 / 11), "the server's clock starts at its first token"
    assert made.rates.server.mean == pytest.approx(120.0)


def test_the_final_frame_is_not_a_token() -> None:
    """It may come late: end-to-end holds it, the time per token does not."""
    one = record(ended_s=1.0)
    made = summarize_only(make_stage_run(one))
    assert made.latency.end_to_end.mean == pytest.approx(1000.0)
    assert made.latency.tpot.mean == pytest.approx(10.0)


def test_failures_are_no_latency_and_told_by_reason() -> None:
    cut = record(3, outcome=SampleOutcome.CUT, error_code="stream-cut", error="stopped short", tokens=2)
    many = [failed_record(number) for number in (1, 2)]
    made = summarize_only(make_stage_run(record(0), *many, cut, failed_record(4, error="another"), duration_s=2.0))
    assert (made.requests, made.served, made.failed, made.cut) == (5, 1, 3, 1)
    assert made.latency.end_to_end.n == 1
    assert made.output_tokens == 13, "what was cut was generated all the same"
    assert made.failures == (
        FailureCount("backend-unreachable", "no answer", 2),
        FailureCount("stream-cut", "stopped short", 1),
        FailureCount("backend-unreachable", "another", 1),
    )
    assert made.rates.requests_per_s == pytest.approx(0.5)
    assert made.rates.good_share == pytest.approx(0.2)


def test_goodput_counts_what_met_all_objectives() -> None:
    objective = Objective(ttft_ms=150.0, tpot_ms=12.0)
    good, late, slow = record(0), record(1, ttft_ms=151.0), record(2, gap_ms=12.5)
    short = record(3, tokens=1)
    made = summarize_only(make_stage_run(good, late, slow, short, duration_s=1.0), objective)
    assert made.rates.goodput_per_s == pytest.approx(2.0)
    assert made.rates.good_share == pytest.approx(0.5)
    nothing = record(4, tokens=0, arrivals_s=())
    assert summarize_only(make_stage_run(nothing, duration_s=1.0), objective).rates.good_share == 0.0


def test_who_served_what() -> None:
    records = [record(number, node="alpha", server_ms=150.0) for number in range(3)]
    made = summarize_only(make_stage_run(*records, record(3, node="beta", gap_ms=20.0, server_ms=250.0, attempts=2)))
    alpha, beta = made.nodes
    assert (alpha.node, alpha.served, alpha.share, alpha.output_tokens) == ("alpha", 3, 0.75, 33)
    assert alpha.server_tokens_per_s == pytest.approx(110.0)
    assert (beta.node, beta.served) == ("beta", 1)
    assert beta.server_tokens_per_s == pytest.approx(55.0)
    assert made.retried == 1


def test_while_every_place_was_taken() -> None:
    """Two at a time, three requests: one token at 0.0, 0.5, 1.0 and so on of each; the last is sent at 1.0."""
    spread: dict[str, Any] = {"ttft_ms": 0.0, "gap_ms": 500.0, "tokens": 3}
    records = [record(0, **spread), record(1, **spread), record(2, sent_s=1.0, **spread)]
    made = summarize_only(make_stage_run(*records, of=stage(count=3, concurrency=2)))
    assert made.duration_s == pytest.approx(2.0)
    assert made.rates.output_tokens_per_s == pytest.approx(4.5)
    assert made.rates.loaded_tokens_per_s == pytest.approx(4.0), "two of each of the first two came before 1.0"
    all_at_once = summarize_only(make_stage_run(*records, of=stage(count=3, concurrency=3)))
    assert all_at_once.rates.loaded_tokens_per_s is None
    open_loop = summarize_only(make_stage_run(*records, of=stage(count=3, concurrency=None)))
    assert open_loop.rates.loaded_tokens_per_s is None


def test_the_parts_of_a_stage_with_a_disturbance() -> None:
    """A request belongs to the part in which it was sent, a token to that in which it came."""
    whole: dict[str, Any] = {"ttft_ms": 0.0, "gap_ms": 500.0}
    records = [
        record(0, sent_s=0.0, tokens=5, **whole),  # 0.0 to 2.0
        record(1, sent_s=1.0, tokens=3, attempts=2, **whole),  # 1.0 to 2.0
        failed_record(2, sent_s=1.2),
        record(3, sent_s=2.5, tokens=2, **whole),  # 2.5 to 3.0
    ]
    run = make_stage_run(*records, duration_s=4.0, disturbed_s=(1.0, 2.0), disturbance="alpha drained")
    made = summarize_only(run)
    assert made.disturbance == "alpha drained"
    before, during, after = made.phases
    assert [phase.name for phase in made.phases] == ["before", "during", "after"]
    assert [(phase.requests, phase.failed, phase.retried) for phase in made.phases] == [(1, 0, 0), (2, 1, 1), (1, 0, 0)]
    assert before.output_tokens_per_s == pytest.approx(2.0)  # 0.0, 0.5
    assert during.output_tokens_per_s == pytest.approx(4.0)  # 1.0 and 1.5 of each of the two
    assert after.output_tokens_per_s == pytest.approx(2.0)  # 2.0 of each, and 2.5 and 3.0
    assert [phase.longest_gap_ms for phase in made.phases] == [pytest.approx(500.0)] * 3
    assert summarize_only(make_stage_run(record())).phases == ()


def test_tokens_per_joule() -> None:
    gpu = GpuUse(gpus=1, samples=5, power_w=300.0, energy_j=22.0)
    (made,) = summarize_stage(make_stage_run(record()), Objective(), gpu)
    assert (made.gpu, made.tokens_per_joule) == (gpu, 0.5)
    (unknown,) = summarize_stage(make_stage_run(record()), Objective(), GpuUse(gpus=1, samples=5))
    assert unknown.tokens_per_joule is None
    of_routes = summarize_stage(make_stage_run(record(route="a"), record(route="b")), Objective(), gpu)
    assert [(one.gpu, one.tokens_per_joule) for one in of_routes] == [(None, None)] * 2, "nobody knows whose it was"


def test_routes_each_have_their_own_time_and_what_they_add() -> None:
    of = stage("iceland", count=4, kind=StageKind.NODE, node="iceland")
    tunnel = [record(number, stage="iceland", route="tunnel", ttft_ms=100.0, server_ms=195.0) for number in (0, 1)]
    mesh = [record(number, stage="iceland", route="mesh", ttft_ms=102.0, server_ms=195.0) for number in (2, 3)]
    made = summarize_stage(make_stage_run(*tunnel, *mesh, of=of, duration_s=99.0), Objective())
    assert [(one.route, one.requests) for one in made] == [("tunnel", 2), ("mesh", 2)]
    assert [one.duration_s for one in made] == [pytest.approx(0.4), pytest.approx(0.404)]
    assert [one.rates.loaded_tokens_per_s for one in made] == [None, None]
    barest, other = route_costs(made)
    assert (barest.node, barest.route, barest.added_p50_ms) == ("iceland", "tunnel", 0.0)
    assert barest.outside_server_p50_ms == pytest.approx(5.0)
    assert other.route == "mesh"
    assert other.added_p50_ms == pytest.approx(2.0)
    assert route_costs([summarize_only(make_stage_run(record()))]) == ()


def test_without_the_servers_clock_whole_times_are_compared() -> None:
    of = stage("iceland", count=4, kind=StageKind.NODE, node="iceland")
    records = [record(n, route=route, ttft_ms=ms) for n, (route, ms) in enumerate([("a", 100), ("b", 103)] * 2)]
    costs = route_costs(summarize_stage(make_stage_run(*records, of=of), Objective()))
    assert [cost.added_p50_ms for cost in costs] == [0.0, pytest.approx(3.0)]


def alone(node: str, tokens: int, seconds: float) -> StageResult:
    one = record(stage=node, tokens=tokens, node=node)
    return summarize_only(make_stage_run(one, of=stage(node, kind=StageKind.NODE, node=node), duration_s=seconds))


def test_scaling_is_the_mesh_against_the_sum_of_its_nodes() -> None:
    mesh = summarize_only(make_stage_run(record(tokens=270), of=stage("mesh"), duration_s=2.0))
    made = scaling([alone("alpha", 100, 1.0), alone("beta", 50, 1.0), mesh])
    assert made is not None
    assert (made.sum_tokens_per_s, made.mesh_tokens_per_s) == (150.0, 135.0)
    assert made.efficiency == pytest.approx(0.9)
    assert made.nodes == (("alpha", 100.0), ("beta", 50.0))


def test_there_is_no_scaling_without_all_of_them() -> None:
    mesh = summarize_only(make_stage_run(record(), of=stage("mesh")))
    node, silent = alone("alpha", 100, 1.0), alone("beta", 0, 1.0)
    assert scaling([mesh]) is None
    assert scaling([node]) is None
    assert scaling([node, mesh]) is None, "one node has nothing to scale with"
    assert scaling([node, silent, mesh]) is None
    disturbed = summarize_only(
        make_stage_run(record(), of=stage("mesh"), disturbed_s=(0.1, 0.1), disturbance="alpha drained")
    )
    assert scaling([node, disturbed]) is None
    assert scaling([]) is None
