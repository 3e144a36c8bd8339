"""The reference policy: small cases in which the best node is known, and that its forecast is what happens."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from gpumesh.bench.simulate.measures import Measures
from gpumesh.bench.simulate.reference import ReferenceDecisions, _finish_times
from gpumesh.bench.simulate.requests import Attempt
from gpumesh.bench.simulate.simulation import Simulation
from tests.bench.simulate.build import MODEL, OTHER, node, request, simulate


def served_by(measures: Measures) -> dict[str, int]:
    return {each.name: each.served for each in measures.result().nodes}


def test_it_knows_who_ends_first() -> None:
    # The third request waits for the node with the short answer.
    fleet = [node("a", models=[replace(MODEL, slots=1)]), node("b", models=[replace(MODEL, slots=1)])]
    measures = simulate(fleet, [request(0, tokens=1000), request(1, tokens=50), request(2, tokens=50)], "reference")
    assert sorted(measures.completion_s) == pytest.approx([0.6, 1.2, 10.1])


def test_it_goes_where_the_prompt_is() -> None:
    fleet = [node("a"), node("b")]
    first = request(0, prompt=1000, blocks=(1, 2), block_tokens=500)
    again = [request(n, n * 5.0, prompt=1000, blocks=(1, 2), block_tokens=500) for n in range(1, 5)]
    assert sorted(served_by(simulate(fleet, [first, *again], "reference")).values()) == [0, 5]


def test_it_does_not_load_where_a_copy_is() -> None:
    fleet = [node("a", models=(MODEL, OTHER), max_loaded=1), node("b", models=(MODEL, OTHER), max_loaded=1)]
    requests = [request(n, n * 0.5, model=(MODEL, OTHER)[n % 2].name) for n in range(40)]
    measures = simulate(fleet, requests, "reference")
    assert measures.result().loads == 1


def test_its_forecast_is_what_happens_if_nothing_else_comes() -> None:
    rng = Random(3)
    fleet = [node("a", share=0.3, prefill_stall=0.7, prefill_lanes=1, models=[replace(MODEL, slots=3)])]
    requests = [
        request(number, rng.random(), prompt=rng.randrange(1, 900), tokens=rng.randrange(1, 300)) for number in range(9)
    ]
    requests.sort(key=lambda each: each.at_s)
    simulation = Simulation(fleet, requests, "round-robin")
    server = simulation.servers["a"]
    forecasts: list[list[float]] = []
    original = server.accept

    def accept(attempt: Attempt, now: float) -> None:
        original(attempt, now)
        lines = ReferenceDecisions([server])._lines(server, now)
        forecasts.append(sorted(_finish_times(server, lines, now)))

    server.accept = accept  # type: ignore[method-assign]
    measures = simulation.run()
    assert len(forecasts) == len(requests)
    assert forecasts[-1][-1] == pytest.approx(measures.result().makespan_s)


def test_it_gives_each_context_length_a_node() -> None:
    fleet = [node("a"), node("b")]
    requests = [request(n, n * 0.4, context=(4096, 8192)[n % 2]) for n in range(40)]
    assert simulate(fleet, requests, "reference").result().loads == 1
