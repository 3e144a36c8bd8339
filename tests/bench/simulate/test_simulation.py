"""Whole simulations: small cases calculated by hand, conservation, determinism, and the theory of queues."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.bench.simulate.decisions import POLICY_NAMES
from gpumesh.bench.simulate.fleet import Fault, FaultKind
from gpumesh.bench.simulate.simulation import Simulation
from gpumesh.errors import GPUMeshError
from tests.bench.simulate.build import MODEL, OTHER, node, request, simulate


def test_one_request_takes_the_way_the_reading_and_the_generating() -> None:
    measures = simulate([node(rtt_s=0.05)], [request(0, 3.0)])
    assert measures.completion_s[0] == pytest.approx(0.05 + 0.1 + 1.0)
    assert measures.ttft_s[0] == pytest.approx(0.05 + 0.1)
    assert measures.wait_s[0] == 0.0


def test_two_streams_slow_each_other_down_while_both_run() -> None:
    # Both read for 0.1 s. Until the shorter ends, each token takes 1.5 times as long: 50 tokens take 0.75 s. Then the
    # longer has 50 tokens left, which take 0.5 s.
    measures = simulate([node(share=0.5, max_parallel=2)], [request(0, tokens=50), request(1, tokens=100)])
    assert list(measures.completion_s) == pytest.approx([0.85, 1.35])


def test_a_prompt_that_is_read_stalls_the_streams() -> None:
    # The second prompt comes when the first answer has 0.5 s left. It is read for 0.1 s, and nothing is generated then.
    measures = simulate([node(prefill_stall=1.0, max_parallel=2)], [request(0), request(1, 0.6)])
    assert list(measures.completion_s) == pytest.approx([1.2, 1.1])


def test_prompts_are_read_one_after_another_in_one_lane() -> None:
    measures = simulate([node(prefill_lanes=1, max_parallel=2)], [request(0), request(1)])
    assert list(measures.ttft_s) == pytest.approx([0.1, 0.2])


def test_what_the_node_does_not_run_at_once_waits_in_the_gateway() -> None:
    measures = simulate([node(max_parallel=2)], [request(number) for number in range(3)])
    assert list(measures.wait_s) == pytest.approx([0.0, 0.0, 1.1])
    assert list(measures.completion_s) == pytest.approx([1.1, 1.1, 2.2])


def test_what_is_not_in_memory_is_loaded_once() -> None:
    measures = simulate([node(loaded=(), max_parallel=2)], [request(0), request(1, 1.0)])
    assert list(measures.completion_s) == pytest.approx([5.1, 4.1])
    assert measures.result().loads == 1


def test_what_is_pushed_out_is_drained_first() -> None:
    # One model in memory at a time. The first request ends at 1.1; then the other model is loaded for 4 s, and so on.
    requests = [request(0), request(1, model=OTHER.name), request(2, model=MODEL.name)]
    fleet = [node(models=(MODEL, OTHER), max_loaded=1, max_parallel=10)]
    measures = simulate(fleet, requests)
    # The third joins the first at once: its runner takes requests for its own model until it is gone.
    assert sorted(measures.completion_s) == pytest.approx([1.1, 1.1, 1.1 + 4.0 + 1.1])
    assert measures.result().loads == 1


def test_another_context_length_is_another_load() -> None:
    measures = simulate([node(max_parallel=2)], [request(0), request(1, 2.0, context=8192), request(2, 8.0)])
    assert list(measures.completion_s) == pytest.approx([1.1, 5.1, 5.1])


def test_the_beginning_of_a_prompt_is_read_only_once() -> None:
    first = request(0, prompt=1000, blocks=(1, 2, 3), end_blocks=(1, 2, 3, 4), block_tokens=256)
    second = request(1, 5.0, prompt=1500, blocks=(1, 2, 3, 4, 5), block_tokens=256)
    measures = simulate([node()], [first, second])
    assert measures.ttft_s[1] == pytest.approx((1500 - 4 * 256) / 1000.0)
    assert measures.result().read_tokens == 1000 + 1500 - 4 * 256


def test_the_next_turn_comes_after_the_answer() -> None:
    second = request(1, think_s=0.0)
    measures = simulate([node()], [request(0, 1.0, next_turn=second, think_s=3.0)])
    assert list(measures.completion_s) == pytest.approx([1.1, 1.1])
    assert measures.result().makespan_s == pytest.approx(1.0 + 1.1 + 3.0 + 1.1)


def test_an_answer_that_was_cut_goes_on_elsewhere() -> None:
    away = Fault(FaultKind.AWAY, 0.6, math.inf)
    measures = simulate([node("a", faults=(away,)), node("b")], [request(0), request(1)])
    # One of the two runs on a: at 0.6 s it has 50 of its tokens. b reads the prompt with them, and generates the rest.
    assert sorted(measures.completion_s) == pytest.approx([1.1, 0.6 + 0.15 + 0.5])
    assert measures.lost == 0
    assert measures.moved == 1


def test_a_server_that_refuses_is_left() -> None:
    busy = Fault(FaultKind.BUSY, 0.0, 100.0)
    requests = [request(number, 1.0 + number * 2.0) for number in range(10)]
    measures = simulate([node("a", faults=(busy,)), node("b")], requests)
    assert measures.lost == 0
    assert [each.served for each in measures.result().nodes] == [0, 10]


def test_a_slow_node_takes_longer_from_then_on() -> None:
    slow = Fault(FaultKind.SLOW, 0.6, 100.0, factor=3.0)
    measures = simulate([node(faults=(slow,))], [request(0)])
    assert measures.completion_s[0] == pytest.approx(0.6 + 0.5 * 3.0)


def test_a_full_queue_refuses() -> None:
    # A tenth of the queue is kept for interactive requests: of 10 places, these normal ones get 9. One runs at once.
    requests = [request(number) for number in range(12)]
    measures = Simulation([node(max_parallel=1)], requests, "round-robin", max_queue=10).run()
    assert (len(measures.completion_s), measures.lost) == (10, 2)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_each_request_ends_once_and_busy_time_is_work(policy: str, seed: int) -> None:
    rng = Random(seed)
    fleet = [
        node("a", share=0.3, prefill_stall=0.5, prefill_lanes=1, models=(MODEL, OTHER), max_loaded=1, rtt_s=0.01),
        node("b", share=0.1, models=(MODEL, OTHER), max_loaded=2),
    ]
    requests = [
        request(
            number,
            number * 0.1,
            prompt=rng.randrange(1, 2000),
            tokens=rng.randrange(1, 300),
            model=rng.choice((MODEL.name, OTHER.name)),
        )
        for number in range(60)
    ]
    simulation = Simulation(fleet, requests, policy, seed=seed)
    measures = simulation.run()
    assert len(measures.completion_s) + measures.lost == len(requests)
    assert measures.lost == 0
    servers = simulation.servers.values()
    assert sum(server.gpu.decoded_s for server in servers) == pytest.approx(
        sum(each.output_tokens for each in requests) / MODEL.tokens_per_s
    )
    assert sum(server.gpu.read_s for server in servers) == pytest.approx(
        sum(each.prompt_tokens for each in requests) / MODEL.prefill_tokens_per_s
    )
    for server in servers:
        assert not server.running
        assert not server.pending
        assert all(runner.users == 0 and len(runner.free_slots) == 2 for runner in server.runners.values())
    again = Simulation(fleet, requests, policy, seed=seed).run()
    assert list(again.completion_s) == list(measures.completion_s)


def erlang_c_wait_s(servers: int, load: float) -> float:
    """The mean wait in M/M/c with a mean service time of 1 s: Poisson arrivals, exponential service times."""
    offered = load * servers
    blocked = offered**servers / math.factorial(servers) / (1.0 - load)
    wait_chance = blocked / (sum(offered**k / math.factorial(k) for k in range(servers)) + blocked)
    return wait_chance / (servers * (1.0 - load))


def random_jobs(servers: int, load: float, count: int) -> Iterator[tuple[float, int]]:
    """Arrival times in s, and lengths in tokens; at 100,000 tokens/s a length is 1 s on the mean."""
    rng, at_s = Random(5), 0.0
    for _ in range(count):
        at_s += rng.expovariate(load * servers)
        yield at_s, max(round(rng.expovariate(1.0) * 1e5), 1)


def waits_of_a_queue(servers: int, jobs: Iterable[tuple[float, int]]) -> list[float]:
    """The wait of each job, in s, where the first in the queue takes the first server that gets free."""
    free_at_s, waits = [0.0] * servers, []
    for at_s, tokens in jobs:
        started_at_s = max(at_s, free_at_s[0])
        heapq.heapreplace(free_at_s, started_at_s + tokens / 1e5)
        waits.append(started_at_s - at_s)
    return waits


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (4, 0.7)])
def test_the_wait_is_that_of_erlang_c(servers: int, load: float) -> None:
    """The simulation gives each request the wait that a plain queue gives it. The plain queue is quick enough for the
    many requests that Erlang's formula, which is the mean over endless time, asks for."""
    jobs = list(random_jobs(servers, load, 4000))
    fast = replace(MODEL, slots=servers, tokens_per_s=1e5, prefill_tokens_per_s=1e9)
    requests = (request(number, at_s, prompt=1, tokens=tokens) for number, (at_s, tokens) in enumerate(jobs))
    measures = simulate([node(models=(fast,), max_parallel=servers)], requests, "round-robin")
    waits = waits_of_a_queue(servers, jobs)
    assert sum(wait > 0.0 for wait in waits) > 1000
    assert sorted(measures.wait_s) == pytest.approx(sorted(waits), abs=1e-3)
    many = waits_of_a_queue(servers, random_jobs(servers, load, 400_000))
    assert math.fsum(many) / len(many) == pytest.approx(erlang_c_wait_s(servers, load), rel=0.02)


def test_a_job_that_all_nodes_have_failed_is_tried_again() -> None:
    faults = (Fault(FaultKind.BUSY, 0.0, 0.35),)
    measures = simulate([node("a", faults=faults), node("b", faults=faults)], [request(0, 0.01)], "reference")
    # The nodes refuse at 0 s, after a pause of about 0.1 s, and after another of about 0.2 s; then 0.4 s.
    assert measures.lost == 0
    assert 0.35 + 1.1 < measures.completion_s[0] < 1.0 + 1.1


def test_requests_that_would_wait_for_ever_are_an_error() -> None:
    away = (Fault(FaultKind.AWAY, 0.0, math.inf),)
    with pytest.raises(GPUMeshError, match="policy reference: 1 requests wait for ever"):
        simulate([node("a", faults=away)], [request(0, 1.0)], "reference")


def test_a_balancer_that_asks_for_a_check_in_the_past_does_not_stop_the_clock() -> None:
    simulation = Simulation([node(max_parallel=1)], [request(0), request(1)], "round-robin")
    simulation.decisions.next_check = lambda now: now - 1.0  # type: ignore[method-assign]
    assert list(simulation.run().completion_s) == pytest.approx([1.1, 2.2])
