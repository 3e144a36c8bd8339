"""The result of a simulation as JSON and as a page."""

from __future__ import annotations

import json

import pytest

from gpumesh.bench.simulate.report import FIGURE_NAMES, figures, simulation_html, simulation_json
from gpumesh.bench.simulate.run import simulate_policies
from gpumesh.bench.simulate.workloads import Mix, Workload
from gpumesh.errors import UsageError
from tests.bench.simulate.build import MODEL, node

WORKLOAD = Workload(Mix((MODEL.name,), (1.0,)), 200, rate=1.0)


def test_a_result_as_json_and_as_a_page() -> None:
    fleet = [node("a<b"), node("b")]
    result = simulate_policies(fleet, WORKLOAD, ("adaptive", "reference"), source="requests", load=0.5)
    document = json.loads(json.dumps(simulation_json(result), allow_nan=False))
    assert document["schema"] == "gpumesh.simulation/1"
    assert [each["policy"] for each in document["policies"]] == ["adaptive", "reference"]
    adaptive = document["policies"][0]
    assert (adaptive["served"], adaptive["lost"]) == (200, 0)
    assert adaptive["completion"]["n"] == 200
    assert document["offered_per_s"] / document["capacity_per_s"] == pytest.approx(0.5)
    page = simulation_html(result)
    assert "a&lt;b" in page
    assert "a<b" not in page
    assert page.count('<svg class="plot"') == 4


def test_the_figures_have_names() -> None:
    result = simulate_policies([node()], WORKLOAD, ("round-robin",), source="requests")
    row = figures(result.policies[0])
    assert len(row) == len(FIGURE_NAMES)
    assert (row[0], row[-1]) == ("round-robin", "0")


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(UsageError, match=r"--policy 'best' is none of: .*adaptive, reference"):
        simulate_policies([node()], WORKLOAD, ("best",), source="requests")
